"""Plain tables: columns as wide as what is in them."""

from __future__ import annotations

import pytest

from finetune_bn.utilities.tables import text_table


def test_columns_are_as_wide_as_their_cells_and_lines_have_no_blanks_at_the_end() -> None:
    assert text_table(("layer", "MiB"), [("a", "1.00"), ("conv.bn", "")], right=(1,)) == [
        "layer     MiB",
        "-------------",
        "a        1.00",
        "conv.bn",
    ]
    assert text_table(("a",), [], line=False) == ["a"]


def test_a_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        text_table(("a", "b"), [("1", "2", "3")])
