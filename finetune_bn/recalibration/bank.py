"""Keep the statistics of several domains for one model, and switch between them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.sites import BatchNormSite, find_batch_norms
from finetune_bn.layers.statistics import statistics_of, store, why_no_statistics
from finetune_bn.recalibration.nearest import domain_distances
from finetune_bn.utilities.batches import Feeder, Forward
from finetune_bn.utilities.files import write_atomically
from finetune_bn.utilities.probe import unwrapped

_FORMAT = "finetune_bn.StatisticsBank 1"


class StatisticsBank:
    """Running statistics by domain, for models that share all the rest.

    Weights, gamma and beta stay those of the model: what is kept of a domain is the mean and the variance by which
    each BatchNorm layer, live or frozen, normalizes (domain-specific statistics as in AdaBN, Li et al. 2016). Fill it
    after `recalibrate`:

        bank = StatisticsBank()
        for domain, loader in loaders.items():
            with bank.restoring(model):
                recalibrate(model, loader)
                bank.keep(domain, model)
        with bank.using("sketch", model):
            evaluate(model)

    Where nobody says which domain a batch is from, `nearest` finds out by its activations.
    """

    def __init__(self) -> None:
        self._domains: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The domains, in the order in which they were first kept."""
        return tuple(self._domains)

    def keep(self, name: str, model: nn.Module) -> None:
        """Copy the statistics that the model has now under the name of a domain; one that is there is replaced.

        Raises:
            FinetuneBNError: the name is none, or the model has no statistics, or such as are NaN or negative.
        """
        if not isinstance(name, str) or not name:
            raise FinetuneBNError(complaint("name", name, "the name of a domain, a text"))
        layers = _read(model)
        trouble = _trouble(layers)
        if trouble:
            raise FinetuneBNError(complaint("model", type(model).__name__, "sound statistics", f"It {trouble}."))
        self._domains[name] = layers

    def use(self, name: str, model: nn.Module) -> None:
        """Write the statistics of a domain into the model's layers, in place; gamma and beta keep their values.

        Raises:
            FinetuneBNError: there is no such domain, or its layers are not those of the model; which is unchanged.
        """
        if name not in self._domains:
            raise FinetuneBNError(complaint("name", name, ", ".join(map(repr, self._domains)) or "none is kept yet"))
        _write(model, self._domains[name])

    @contextlib.contextmanager
    def using(self, name: str, model: nn.Module) -> Iterator[None]:
        """Give the model the statistics of a domain for the time of the block."""
        with self.restoring(model):
            self.use(name, model)
            yield

    def nearest(self, model: nn.Module, batch: Any, forward: Forward | None = None) -> str:
        """Return the domain that a batch is from, all of it, as its activations tell; nothing is changed.

        The one whose statistics are nearest, see `distances`. It costs a forward pass for each domain.

        Args:
            model: the model whose statistics were kept.
            batch: as for `recalibrate`: a tensor [N, ...], or a tuple or dict with one.
            forward: `(model, batch)` that passes the batch to the model, as for `recalibrate`.

        Raises:
            FinetuneBNError: the bank is empty, or its layers are not those of the model.
            BadData: the batch holds no images, or gives activations that are not finite.
        """
        return self.names[int(self.distances(model, batch, forward=forward).argmin())]

    def nearest_each(self, model: nn.Module, batch: Any, forward: Forward | None = None) -> list[str]:
        """Return the domain that each image of a batch is from; as `nearest`, for batches of several domains.

        One image says less than a batch of its domain: where they come in batches, use `nearest`.
        """
        chosen = self.distances(model, batch, each=True, forward=forward).argmin(dim=1)
        return [self.names[number] for number in chosen.tolist()]

    def distances(self, model: nn.Module, batch: Any, *, each: bool = False, forward: Forward | None = None) -> Tensor:
        """Return how far a batch is from each domain, float64 [domains], in the order of `names`; nothing is changed.

        The mean, over channels and layers, of the Kullback-Leibler divergence of the activations from the domain's
        statistics, both as normal distributions, while the domain's statistics are in use.

        Args:
            model: see `nearest`.
            batch: see `nearest`.
            each: for each image by itself, [images, domains].
            forward: see `nearest`.

        Raises:
            FinetuneBNError: see `nearest`.
        """
        if not self._domains:
            raise FinetuneBNError(complaint("bank", "no domain", "one domain or more", "Fill it with keep."))
        model = unwrapped(model)
        for layers in self._domains.values():
            sites = _sites_of(model, layers)
        feeder = Feeder(model, forward, None, keep=True)
        chosen = [sites[name] for name in next(iter(self._domains.values()))]
        return domain_distances(chosen, feeder, batch, list(self._domains.values()), each=each).cpu()

    @staticmethod
    def restoring(model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Give the model its present statistics back at the end of the block, bit for bit, whatever happens in it."""
        return _Restoring(model)

    def save(self, path: str | Path) -> None:
        """Write the bank to a file, as a whole or not at all.

        Raises:
            FinetuneBNError: it cannot be written.
        """
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "domains": self._domains}, buffer)
        try:
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise FinetuneBNError(complaint("path", str(path), "a file that can be written", f"{error}.")) from error

    @classmethod
    def load(cls, path: str | Path) -> StatisticsBank:
        """Return the bank in a file that `save` wrote; tensors are read, no code is run.

        Raises:
            FinetuneBNError: there is no such file, or it holds no bank.
        """
        allowed = "a file that StatisticsBank.save wrote"
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever broken bytes lead it to
            why = (str(error).strip().splitlines() or [""])[0]
            raise FinetuneBNError(complaint("path", str(path), allowed, f"{type(error).__name__}: {why}")) from error
        domains = content.get("domains") if isinstance(content, dict) and content.get("format") == _FORMAT else None
        if not isinstance(domains, dict):
            raise FinetuneBNError(complaint("path", str(path), allowed))
        for name, layers in domains.items():
            trouble = "is no name" if not isinstance(name, str) or not name else _trouble(layers)
            if trouble:
                raise FinetuneBNError(complaint("path", str(path), allowed, f"Its domain {name!r} {trouble}."))
        bank = cls()
        bank._domains = domains
        return bank

    def __repr__(self) -> str:
        return f"StatisticsBank({', '.join(self._domains)})"


class _Restoring(contextlib.AbstractContextManager[None]):
    """Not a generator: one that is dropped, as by `ExitStack.pop_all`, would restore when it is collected."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._sources: list[tuple[FrozenBatchNorm, _BatchNorm | None]] = []

    def __enter__(self) -> None:
        modules = _modules(self._model)
        tensors = [t for module in modules for t in (*module.parameters(False), *module.buffers(False))]
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._sources = [(m, m.source) for m in modules if isinstance(m, FrozenBatchNorm)]

    def __exit__(self, *exception: object) -> None:
        for module, source in self._sources:
            module.remember(source)
        with torch.no_grad():
            for tensor, copy in self._copies:
                tensor.copy_(copy)


def _trouble(layers: object) -> str | None:
    """Return why this is no mean and variance of each layer by its name, or None where it is."""
    if not isinstance(layers, dict) or not layers:
        return "has no layers"
    for name, pair in layers.items():
        if not isinstance(name, str) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
            return f"has no pair of mean and variance for {name!r}"
        if not all(isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 1 for t in pair):
            return f"has statistics for {name!r} that are no tensors of floating-point numbers, one a channel"
        mean, var = pair
        if mean.shape != var.shape:
            return f"has {len(mean)} means and {len(var)} variances for {name!r}"
        if not torch.isfinite(mean).all() or not (torch.isfinite(var) & (var >= 0)).all():
            return f"has statistics for {name!r} that are NaN, infinite, or a variance below 0"
    return None


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose tensors a switch can write, with the BatchNorm that a frozen one turns back into."""
    layers = [site.module for site in find_batch_norms(model)]
    return layers + [
        layer.source for layer in layers if isinstance(layer, FrozenBatchNorm) and layer.source is not None
    ]


def _read(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for site in find_batch_norms(model):
        if why_no_statistics(site.module, preserve=False) is None:
            now = statistics_of(site.module)
            found[site.names[0]] = (now.mean.cpu(), now.var.cpu())
    if not found:
        raise FinetuneBNError(
            complaint("model", type(model).__name__, "a model whose BatchNorm layers have statistics")
        )
    return found


def _sites_of(model: nn.Module, kept: dict[str, tuple[Tensor, Tensor]]) -> dict[str, BatchNormSite]:
    """Return the layers of a model by name; raise where they are not those that are kept."""
    sites = {site.names[0]: site for site in find_batch_norms(model)}
    for name, (mean, _) in kept.items():
        trouble = "there is none of that name" if name not in sites else None
        if trouble is None and sites[name].num_features != len(mean):
            trouble = f"it has {sites[name].num_features} channels and not {len(mean)}"
        trouble = trouble or why_no_statistics(sites[name].module, preserve=False)
        if trouble:
            raise FinetuneBNError(complaint("model", f"layer {name!r}: {trouble}", "the model that the bank is of"))
    # With statistics of two domains at once the network would be none of the two.
    left = [n for n, site in sites.items() if n not in kept and why_no_statistics(site.module, preserve=False) is None]
    if left:
        trouble = f"the bank has no statistics of {', '.join(left[:3])}{'...' if len(left) > 3 else ''}"
        raise FinetuneBNError(complaint("model", trouble, "the model that the bank is of"))
    return sites


def _write(model: nn.Module, kept: dict[str, tuple[Tensor, Tensor]]) -> None:
    sites = _sites_of(model, kept)
    for name, (mean, var) in kept.items():
        layer = sites[name].module
        now = statistics_of(layer)
        store(layer, now.moved_to(mean.to(now.mean.device), var.to(now.var.device), preserve=False), preserve=False)
