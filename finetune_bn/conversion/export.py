"""Write models, converted or not, to files that need none of their code: ONNX, and the programs of `torch.export`."""

from __future__ import annotations

import importlib.util
import io
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from finetune_bn.conversion.merge import allowed_distance
from finetune_bn.conversion.plan import check_model
from finetune_bn.errors import ConversionMismatch, FinetuneBNError, MissingDependency, complaint
from finetune_bn.utilities.batch_size import count_in_call
from finetune_bn.utilities.files import check_output, write_atomically
from finetune_bn.utilities.probe import Probe, distance, find_probes, quietly, tensors_in

log = logging.getLogger("finetune_bn")

_LARGEST_ONNX = 2**31 - 2**24  # the format's limit, less what the graph takes
_DIVERGED = "The training has diverged: export a checkpoint from before."


def export(model: nn.Module, output: str | Path, example_input: Any = None) -> Path:
    """Write the eval-mode model to a file that needs none of its code: `.onnx`, or `.pt2` of `torch.export`.

    The file is loaded again and its outputs are compared with the model's (ONNX where onnxruntime is installed), and
    then written as a whole or not at all. The model is not changed. Converted layers, folded or not, need no `revert`.

    Args:
        model: any module.
        output: the file, overwritten if it is there.
        example_input: a tensor, tuple or dict that `model.forward` takes. With two images or more, and a model that
            allows it, the file takes any number of them. Not needed for timm models.

    Returns:
        The path.

    Raises:
        FinetuneBNError: an argument is wrong, a weight or an output is NaN, or the network cannot be captured, or does
            not fit into the file.
        ConversionMismatch: the file would compute something else.
        MissingDependency: onnx or onnxscript is not installed.
    """
    path = Path(output)
    if path.suffix not in (".onnx", ".pt2"):
        raise FinetuneBNError(complaint("output", str(output), "a name that ends in .onnx or .pt2"))
    check_output("output", path)
    check_model(model)
    if path.suffix == ".onnx":
        _check_size(model)
    _check_values(model)
    probe = _probe(model, example_input)
    before = probe.run(model)
    if any(tensor.isnan().any() for tensor in before):
        raise FinetuneBNError(complaint("model", "outputs that are NaN", "a network that computes numbers", _DIVERGED))
    with quietly(model):
        try:
            content, after = (_onnx if path.suffix == ".onnx" else _pt2)(model, probe)
        except FinetuneBNError:
            raise
        except Exception as error:  # of whatever kind the exporter, its passes and the runtime raise
            why = (str(error).strip().splitlines() or [""])[0]
            fits = "a network that torch.export captures"
            why = f"{type(error).__name__}: {why}"
            raise FinetuneBNError(complaint("model", type(model).__name__, fits, why)) from error
    off = 0.0 if after is None else distance(after, before)
    allowed = allowed_distance(model)
    if not off <= allowed:
        raise ConversionMismatch(
            f"output: the exported network's outputs differ from the model's by {off:.2g} of the largest value; "
            f"allowed: {allowed:.0e}. No file was written.",
            in_values=True,
        )
    try:
        write_atomically(path, content)
    except OSError as error:
        raise FinetuneBNError(complaint("output", str(output), "a file that can be written", f"{error}.")) from error
    return path


def _check_values(model: nn.Module) -> None:
    """Raise where a weight or a statistic is no number: the file would be as the network, and of no use."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    statistics = ("running_mean", "running_var")
    bad = [
        name
        for name, tensor in tensors
        if (isinstance(tensor, nn.Parameter) or name.endswith(statistics)) and not tensor.is_meta
        if not torch.isfinite(tensor).all()
    ]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        given = f"NaN or infinite values in {bad[0]}{more}"
        raise FinetuneBNError(complaint("model", given, "a network whose weights are numbers", _DIVERGED))


def _check_size(model: nn.Module) -> None:
    size = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    if size > _LARGEST_ONNX:
        given = f"weights of {size / 2**30:.1f} GB"
        allowed = f"up to {_LARGEST_ONNX / 2**30:.0f} GB in one .onnx file"
        raise FinetuneBNError(complaint("output", given, allowed, "Write a .pt2 file."))


def _probe(model: nn.Module, example_input: Any) -> Probe:
    probes = find_probes(model, example_input)
    if len(probes) != 1 or probes[0].name:
        raise FinetuneBNError(complaint("example_input", None, f"what {type(model).__name__}.forward takes"))
    if probes[0].given:
        return probes[0]
    # The one image that a timm model's input size gives, twice: an exported program takes a batch of 1 for a constant.
    args, kwargs = tree_map_only(
        Tensor, lambda t: t if len(t) > 1 else torch.cat([t, t]), (probes[0].args, probes[0].kwargs)
    )
    return Probe("", args, kwargs, given=False)


def _dynamic_shapes(probe: Probe) -> Any:
    """Return, for `torch.export`, that the first dimension of what goes in may be any where the model allows it."""
    count = count_in_call(probe.args, probe.kwargs)
    images = count.images if count.first else 0  # no dimension counts them in a list of images

    def of(leaf: Any) -> Any:
        batch = torch.is_tensor(leaf) and leaf.dim() > 0 and len(leaf) == images > 1
        return {0: torch.export.Dim.AUTO} if batch else None

    return tree_map(of, probe.args or probe.kwargs)


def _pt2(model: nn.Module, probe: Probe) -> tuple[bytes, list[Tensor]]:
    program = torch.export.export(model, probe.args, probe.kwargs, dynamic_shapes=_dynamic_shapes(probe))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    return buffer.getvalue(), tensors_in(loaded(*probe.args, **probe.kwargs))


def _onnx(model: nn.Module, probe: Probe) -> tuple[bytes, list[Tensor] | None]:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"writing .onnx needs {' and '.join(missing)}: pip install 'finetune-bn[export]'")
    program = torch.onnx.export(
        model, probe.args, kwargs=probe.kwargs, dynamo=True, dynamic_shapes=_dynamic_shapes(probe), verbose=False
    )
    assert program is not None
    content = program.model_proto.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        log.warning("the ONNX file was not compared with the model: onnxruntime is not installed")
        return content, None
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = [t.cpu().numpy() for t in tree_leaves((probe.args, probe.kwargs)) if torch.is_tensor(t)]
    feed = {node.name: array for node, array in zip(session.get_inputs(), given, strict=True)}
    like = next((p.device for p in model.parameters()), torch.device("cpu"))
    return content, [torch.from_numpy(array).to(like) for array in session.run(None, feed)]
