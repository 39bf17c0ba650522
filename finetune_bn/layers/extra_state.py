"""Facts that a layer computes by, packed into one tensor of its state dict, where no tool loses them.

The metadata of a state dict is dropped by whatever makes a new dict of it: prefix stripping, safetensors, averaging,
most loaders. A tensor under torch's own name for such things, `_extra_state`, is not: it is copied like a weight.
It holds bytes, so casting the file to another dtype and back changes nothing, and no average of two falls between.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

EXTRA_STATE = "_extra_state"
_FORMAT = "finetune_bn 1"
_HEADER = 512  # bytes; a fixed size for a layer, as tools copy one state dict into another tensor by tensor
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
}


def pack(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """Return facts (plain JSON values) and tensors as one tensor of bytes, uint8 [n], on the CPU."""
    listed = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    line = json.dumps({"format": _FORMAT, **facts, "tensors": listed}).encode("ascii")
    line = line.ljust(math.ceil((len(line) + 1) / _HEADER) * _HEADER - 1) + b"\n"
    parts = [torch.frombuffer(bytearray(line), dtype=torch.uint8)]
    parts += [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors.values()]
    return torch.cat(parts)


def unpack(packed: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `pack` was given.

    Raises:
        ValueError: it is no such tensor, or not a whole one.
    """
    if not isinstance(packed, Tensor) or packed.dim() != 1 or packed.is_meta:
        raise ValueError("it is no tensor of bytes")
    data = packed.detach().cpu().to(torch.uint8)
    if not torch.equal(data.to(torch.float64), packed.detach().cpu().to(torch.float64)):
        raise ValueError("it holds numbers that are no bytes: an average, or another dtype, has changed them")
    content = data.numpy().tobytes()
    end = content.find(b"\n")
    try:
        facts = json.loads(content[:end])
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.pop("format", None) != _FORMAT:
        raise ValueError(f"it does not begin with the format {_FORMAT!r} of this version of finetune_bn")
    tensors, start = {}, end + 1
    try:
        for name, kind, shape in facts.pop("tensors"):
            dtype = _DTYPES[kind]
            stop = start + math.prod(shape) * dtype.itemsize
            tensors[str(name)] = data[start:stop].clone().view(dtype).reshape(shape)
            start = stop
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError("its tensors are not whole") from error
    if start != len(content):
        raise ValueError("its tensors are not whole")
    return facts, tensors
