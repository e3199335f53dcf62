"""The paper's numbers: complete, and consistent with what its text says about them."""

from __future__ import annotations

import pytest

from monai_unetq.reproduction.paper import FULL_PRECISION, PAPER, paper_change, paper_row
from monai_unetq.reproduction.rows import ACTIVATIONS, Kind, paper_rows


def test_every_row_of_the_paper_is_one_of_ours() -> None:
    for kind in ACTIVATIONS:
        ours = [row.name for row in paper_rows(kind)]
        assert ours[: len(PAPER)] == [row.name for row in PAPER]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (("em", "relu"), [94.05, 92.02, 92.21, 91.03, 79.80, 78.53, None]),
        (("em", "tanh"), [93.02, 91.08, 88.42, 90.93, 54.23, None, 82.66]),
        (("gm", "relu"), [56.32, 56.11, 56.10, 55.85, 51.80, 31.44, None]),
        (("gm", "tanh"), [56.26, 56.01, 53.78, 52.34, 48.23, None, 43.02]),
        (("nih", "relu"), [75.69, 74.61, 73.05, 73.48, 71.77, 72.56, 73.9]),
        (("nih", "tanh"), [None] * 7),
    ],
)
def test_columns(column: tuple[Kind, str], expected: list[float | None]) -> None:
    assert [row.dice(*column) for row in PAPER] == expected


def test_sizes_are_those_of_the_bits_in_mib() -> None:
    """The paper's network has 4,837,249 parameters or a few more; its sizes in 2^20 bytes follow from the bits."""
    bits = {"Full precision": 32, "Q8.8/Q8.8": 16, "Q8.0/Q0.8": 8, "Q6.0/Q0.4": 4, "Q4.0/Q0.2": 2, "BNN": 1}
    for name, width in bits.items():
        row = paper_row(name)
        assert row is not None
        assert row.megabytes == pytest.approx(4_837_249 * width / 8 / 2**20, abs=0.035)


def test_the_abstracts_change_on_nih() -> None:
    """ "… while losing only … 2.21 …": Q6.0/Q0.4 of NIH, 73.48 − 75.69."""
    assert paper_change("Q6.0/Q0.4", "nih", "relu") == pytest.approx(-2.21)
    assert paper_change("BNN", "gm", "relu") == pytest.approx(-24.88)


def test_what_the_paper_lacks_is_none() -> None:
    assert paper_row("int8/pow2-4") is None
    assert paper_change("int8/pow2-4", "em", "relu") is None
    assert paper_change("BNN", "em", "tanh") is None
    assert paper_change(FULL_PRECISION, "em", "relu") is None
    assert paper_change("BNN", "nih", "tanh") is None
