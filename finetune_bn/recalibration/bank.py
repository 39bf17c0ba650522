"""Keep the statistics of several domains for one model, and switch between them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.layers.statistics import statistics_of, store, why_no_statistics
from finetune_bn.utilities.files import write_atomically

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


def _write(model: nn.Module, kept: dict[str, tuple[Tensor, Tensor]]) -> None:
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
    for name, (mean, var) in kept.items():
        layer = sites[name].module
        now = statistics_of(layer)
        store(layer, now.moved_to(mean.to(now.mean.device), var.to(now.var.device), preserve=False), preserve=False)
