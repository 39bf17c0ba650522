"""Fit one GroupNorm layer after the other, to what all images bring there in the BatchNorm network and in its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune_bn.errors import BadData, complaint
from finetune_bn.functional.balancing import balancing_factors
from finetune_bn.functional.group_norm import GroupMoments, ImagePairs, contrast_kept
from finetune_bn.layers.balance import multiply_channels
from finetune_bn.layers.group_norm import CENTERED, GroupNorm, group_variance
from finetune_bn.utilities.lockstep import FINISHED, DifferentPaths
from finetune_bn.utilities.processes import OtherProcessFailed, Ranks
from finetune_bn.utilities.progress import Report

# What is chosen from: numbers of groups ("auto") that divide the channels and leave a group more than one value in an
# image, and eps ("normalize") in units of the variance that the running statistics predict for a group; 0 is the
# layer's own. With more than 1 the error is smaller still, as the layer stops to normalize.
CANDIDATES = (1, 2, 4, 8, 16, 32)
EPS_CANDIDATES = (0.0, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class GroupNormSettings:
    """What a layer is set to, besides weight and bias.

    Attributes:
        groups: number of groups.
        eps: what is added to variances.
        balance: what the channels of the map in front are multiplied by, and where it is; None: by nothing.
    """

    groups: int
    eps: float
    balance: tuple[str, Tensor] | None

    @classmethod
    def of(cls, layer: GroupNorm) -> GroupNormSettings:
        """Return those of a layer."""
        return cls(layer.num_groups, layer.eps, layer.balance)

    def give(self, layer: GroupNorm) -> None:
        """Set a layer to these."""
        layer.num_groups, layer.eps, layer.balance = self.groups, self.eps, self.balance

    def factors(self, like: Tensor) -> Tensor:
        """Return the factors of the channels, in dtype and on the device of `like` [C]."""
        return torch.ones_like(like) if self.balance is None else self.balance[1].to(like)


@dataclass(frozen=True)
class _Option:
    """What a layer may be set to, and what its map's channels are to be multiplied by now, or None."""

    settings: GroupNormSettings
    factors: Tensor | None


class Fitting:
    """Fits each layer to what all images bring there.

    Args:
        layers: the layers, by number.
        producers: by number, for layers to balance: where the map in front is as seen from the layer, and the map.
        ranks: the processes whose images are pooled.
        report: moves the progress bar.

    Attributes:
        before: what each layer was set to.
        chosen: what it is set to now.
        errors: by number of the layer, in the order of their calls: its error before and now.
    """

    def __init__(
        self,
        layers: Sequence[GroupNorm],
        producers: Mapping[int, tuple[str, nn.Module]],
        ranks: Ranks,
        report: Report,
    ) -> None:
        self.layers, self.producers = layers, producers
        self.before = [GroupNormSettings.of(layer) for layer in layers]
        self.chosen = list(self.before)
        self.errors: dict[int, tuple[float, float]] = {}
        self._affine = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
        self._multiplied: list[tuple[nn.Module, Tensor]] = []
        self._sums: dict[int, Tensor] = {}
        self._ranks, self._report = ranks, report

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Give layers and maps back what they had if the block raises, and tell the other processes."""
        try:
            yield
        except BaseException as error:
            for layer, before, affine in zip(self.layers, self.before, self._affine, strict=True):
                before.give(layer)
                _write(layer, *affine)
            for producer, factors in self._multiplied:
                multiply_channels(producer, 1 / factors)
            if not isinstance(error, OtherProcessFailed):
                self._ranks.fail(1)
            raise

    def pool(self, place: int, brought: list[Tensor]) -> Tensor | bool | None:
        """Fit a layer: the first half of what was brought are BatchNorm's outputs, the second GroupNorm's inputs.

        Returns:
            What its inputs are to be multiplied by, as the map in front was; True where by nothing.
        """
        places = {int(row[0]) for row in self._ranks.agree(float(place))}
        if places == {FINISHED}:
            return None
        if len(places) > 1:
            raise DifferentPaths(complaint("model", "one that is called differently on each process", "the same"))
        layer, half = self.layers[place], len(brought) // 2
        x_pivot, y_pivot = self._pivots(place)
        pairs = [ImagePairs.of(x, y, x_pivot, y_pivot) for y, x in zip(brought[:half], brought[half:], strict=True)]
        options = self._options(place, brought[half], pairs)
        sums = torch.stack([_sums(pairs, x_pivot, option) for option in options])
        sums = torch.stack(self._ranks.gather(sums)).sum(0)
        if not torch.isfinite(sums).all():
            given = f"NaN or infinite values at layer number {place + 1} of the converted ones ({layer})"
            raise BadData(complaint("batches", given, "finite activations", "In float16, look for overflow."))
        if place in self._sums:  # a layer that is called again is fitted to all of its calls
            sums = sums + self._sums[place]
        self._sums[place] = sums
        weight, bias = self._affine[place]
        signs = [torch.ones_like(weight) if o.factors is None else o.factors.sign().to(weight) for o in options]
        moments = [GroupMoments.of_sums(each, y_pivot) for each in sums]
        fits = [each.match(weight * sign) for each, sign in zip(moments, signs, strict=True)]
        errors = [each.error(*fit) for each, fit in zip(moments, fits, strict=True)]
        # The last option is what the layer was set to before. It is there for comparison where channels are balanced.
        choice = range(len(options) - 1 if place in self.producers else len(options))
        index = min(choice, key=lambda i: errors[i])
        best = options[index]
        self.errors[place] = (moments[-1].error(weight, bias), errors[index])
        self.chosen[place] = best.settings
        best.settings.give(layer)
        _write(layer, *fits[index])
        self._report(len(self.errors), "")
        if best.factors is None:
            return True
        producer = self.producers[place][1]
        multiply_channels(producer, best.factors)
        self._multiplied.append((producer, best.factors))
        return best.factors

    def _pivots(self, place: int) -> tuple[Tensor, Tensor]:
        """Return pivots for the inputs and for the BatchNorm's outputs."""
        weight, bn = self.layers[place].weight, self.layers[place].source
        assert bn is not None
        zeros = torch.zeros_like(weight)
        mean, bias = (zeros if t is None else t.detach().to(zeros.device) for t in (bn.running_mean, bn.bias))
        return mean * self.before[place].factors(mean), bias

    def _options(self, place: int, x: Tensor, pairs: Sequence[ImagePairs]) -> list[_Option]:
        """Return what the layer may be set to; the last is what it is set to."""
        layer, before, bn = self.layers[place], self.before[place], self.layers[place].source
        assert bn is not None
        values, channels, automatic = x[0].numel(), layer.num_channels, layer.settings
        numbers = [before.groups]
        if automatic["groups"] == "auto" and automatic["channels_per_group"] is None:
            numbers += [c for c in CANDIDATES if channels % c == 0 and values > c and c != before.groups]
        covariance = self._covariance(pairs) if place in self.producers else None
        found = []
        for number in numbers:
            balance, factors = before.balance, None
            if covariance is not None:
                assert bn.running_var is not None
                # The BatchNorm is outside of the module tree: it may be on another device than the model.
                running = bn.running_var.to(covariance)
                old = before.factors(running)
                importance = torch.ones_like(old) if bn.weight is None else bn.weight.detach().to(old).square()
                factors = balancing_factors(covariance, running * old.square(), importance, number)
                balance = (self.producers[place][0], (old * factors).cpu())
            sizes = [before.eps]
            if bn.running_mean is not None and bn.running_var is not None:
                variance = self._variance(place, GroupNormSettings(number, before.eps, balance))
                if layer.eps_mode == "center":
                    sizes = [bn.eps + CENTERED * variance]
                elif layer.eps_mode == "normalize":
                    sizes += [bn.eps + share * variance for share in EPS_CANDIDATES]
            found += [_Option(GroupNormSettings(number, size, balance), factors) for size in dict.fromkeys(sizes)]
        return [*found, _Option(before, None)]

    def _variance(self, place: int, settings: GroupNormSettings) -> float:
        """Return the variance that the BatchNorm's running statistics predict for a group."""
        bn = self.layers[place].source
        assert bn is not None
        return group_variance(bn, settings.groups, None if settings.balance is None else settings.balance[1])

    def contrast(self, place: int) -> float | None:
        """Return the share of an image's contrast that passes now; None where no running statistics tell it."""
        bn, chosen = self.layers[place].source, self.chosen[place]
        if bn is None or bn.running_mean is None or bn.running_var is None:
            return None
        return contrast_kept(self._variance(place, chosen), chosen.eps)

    def _covariance(self, pairs: Sequence[ImagePairs]) -> Tensor:
        """Return the covariance over all images of the channels' means in an image, [C, C] float64."""
        means = torch.cat([p.x for p in pairs])
        means = torch.cat([torch.ones_like(means[:, :1]), means], 1)
        products = torch.stack(self._ranks.gather(means.T @ means)).sum(0)
        count, sums = products[0, 0], products[0, 1:]
        covariance = products[1:, 1:] / count - (sums / count) * (sums / count)[:, None]
        return covariance.nan_to_num(0.0, 0.0, 0.0)  # what is not finite is found in the sums, with a name


def _sums(pairs: Sequence[ImagePairs], x_pivot: Tensor, option: _Option) -> Tensor:
    """Return the sums of the images with an option, [6, C]."""
    if option.factors is not None:
        pairs = [p.scaled(option.factors) for p in pairs]
        x_pivot = x_pivot * option.factors.to(x_pivot)
    return sum(p.sums(x_pivot, option.settings.groups, option.settings.eps) for p in pairs)  # type: ignore[return-value]


def _write(layer: GroupNorm, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
