"""What the paper measured: the tables of AskariHemmat et al., "U-Net Fixed-Point Quantization for Medical Image
Segmentation" (MICCAI 2019 workshop, arXiv 1908.01073), as data beside which our own numbers are set."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL_PRECISION", "PAPER", "PaperRow", "paper_change", "paper_row"]

FULL_PRECISION = "Full precision"
"""The row that every other one is compared with, in the paper and in ours."""


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's tables 1 to 3 (EM, GM, NIH) put together. None where the paper has a dash.

    Attributes:
        name: activations/weights as the paper writes them, or the name of the method.
        megabytes: size of all parameters in the paper's MB, which are 2^20 bytes.
        em_relu: Dice of the cells in percent, ReLU networks; likewise the following.
        em_tanh: with tanh.
        gm_relu: Dice of the grey matter.
        gm_tanh: with tanh.
        nih_relu: Dice of the pancreas; the paper's NIH table has one column only.
    """

    name: str
    megabytes: float
    em_relu: float | None
    em_tanh: float | None
    gm_relu: float | None
    gm_tanh: float | None
    nih_relu: float | None

    def dice(self, kind: str, activation: str) -> float | None:
        """The Dice in percent in the column of a data set and an activation function, ``"relu"`` or ``"tanh"``."""
        columns = {
            ("em", "relu"): self.em_relu,
            ("em", "tanh"): self.em_tanh,
            ("gm", "relu"): self.gm_relu,
            ("gm", "tanh"): self.gm_tanh,
            ("nih", "relu"): self.nih_relu,
        }
        return columns.get((kind, activation))


PAPER: tuple[PaperRow, ...] = (
    PaperRow(FULL_PRECISION, 18.48, 94.05, 93.02, 56.32, 56.26, 75.69),
    PaperRow("Q8.8/Q8.8", 9.23, 92.02, 91.08, 56.11, 56.01, 74.61),
    PaperRow("Q8.0/Q0.8", 4.61, 92.21, 88.42, 56.10, 53.78, 73.05),
    PaperRow("Q6.0/Q0.4", 2.31, 91.03, 90.93, 55.85, 52.34, 73.48),
    PaperRow("Q4.0/Q0.2", 1.15, 79.80, 54.23, 51.80, 48.23, 71.77),
    PaperRow("BNN", 0.56, 78.53, None, 31.44, None, 72.56),
    PaperRow("TernaryNet", 1.15, None, 82.66, None, 43.02, 73.9),
)
"""The rows in the paper's order."""

_BY_NAME = {row.name: row for row in PAPER}


def paper_row(name: str) -> PaperRow | None:
    """The paper's row of this name, None for a row that is ours alone."""
    return _BY_NAME.get(name)


def paper_change(name: str, kind: str, activation: str) -> float | None:
    """How far the paper's row lies from its full precision in the same column, in Dice points.

    None where the paper lacks the row or has a dash, and for full precision itself.
    """
    row, full = paper_row(name), _BY_NAME[FULL_PRECISION]
    if row is None or row is full:
        return None
    reached, possible = row.dice(kind, activation), full.dice(kind, activation)
    return None if reached is None or possible is None else reached - possible
