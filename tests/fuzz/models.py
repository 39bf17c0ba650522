"""Files of trained models, damaged at random: `load` gives the network that was saved, or names what is wrong."""

from __future__ import annotations

import json
import struct
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from hypothesis import strategies as st

import finetune_bn as fbn
from finetune_bn.backbones.card import Transform
from finetune_bn.errors import FinetuneBNError
from tests.fuzz.configs import places
from tests.fuzz.images import Damage, damage
from tests.models import settle

FILE = "model.safetensors"


def trained(folder: Path) -> Any:
    """Save a tiny network in a folder, and return it as it is loaded from there."""
    torch.manual_seed(0)
    net = settle(timm.create_model("test_resnet", num_classes=3))
    half = (0.5, 0.5, 0.5)
    fbn.save(net, folder / FILE, classes=["a", "b", "c"], transform=Transform((32, 32), half, half))
    return fbn.load(folder / FILE)


def damages() -> st.SearchStrategy[list[Damage]]:
    """Draw what is done to the file: to its bytes, most of them those of the header, or to a key of the header."""
    place = st.one_of(st.floats(0, 0.01), st.floats(0, 1))
    values = st.sampled_from([None, 1, -1, "", "x", [], {}, [1], {"a": 1}, True, 2**40, "../../x", "test_vit"])
    byte = st.one_of(
        st.tuples(st.just("cut"), place),
        st.tuples(st.just("flip"), st.lists(st.tuples(place, st.integers(0, 7)), min_size=1, max_size=5)),
        st.tuples(st.just("noise"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("other"), st.sampled_from(["", "text", "zip", "random"]), st.binary(max_size=60)),
    )
    card = st.tuples(st.just("card"), st.floats(0, 0.999), values)
    return st.lists(st.one_of(byte, card, card), min_size=1, max_size=2)


def load(damages: list[Damage], folder: Path, work: Path) -> Counter[str]:
    """Load a damaged file; a network that comes of it predicts, and only its numbers may be others.

    Args:
        damages: see `damages`.
        folder: where `trained` left the file.
        work: an empty folder.
    """
    content = (folder / FILE).read_bytes()
    for each in damages:
        content = _with_card(content, *each[1:]) if each[0] == "card" else damage(content, [each])
    path = work / FILE
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = fbn.load(path)
            answers = model.predict([torch.zeros(3, 32, 32)])
            assert len(answers) == 1
        except FinetuneBNError as error:
            assert str(error).strip()
            return Counter({"refused by name": 1})
    return Counter({"loaded": 1})


def _with_card(content: bytes, place: float, value: Any) -> bytes:
    """Write another value into the card that lies in the header of a safetensors file."""
    try:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        card = json.loads(header["__metadata__"]["finetune_bn"])
    except (ValueError, KeyError, TypeError, struct.error):
        return content
    found = places(card)
    *way, last = found[int(place * len(found))]
    owner = card
    for key in way:
        owner = owner[key]
    owner[last] = value
    header["__metadata__"]["finetune_bn"] = json.dumps(card)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]
