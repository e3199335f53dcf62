"""Which bytes the codes of a number format are stored as, and which codes a format has."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from .bits import pack_codes, pack_digits, pack_signs, unpack_codes, unpack_digits, unpack_signs
from .formats import QFormat

__all__ = ["TERNARY_CODINGS", "TernaryCoding", "check_coding", "decode", "encode", "is_ternary"]

TernaryCoding = Literal["base3", "2bit"]

TERNARY_CODINGS: tuple[TernaryCoding, ...] = ("base3", "2bit")
"""Ways to store ternary codes: five digits of base 3 in a byte (1.6 bits each), or 2 bits each."""


def encode(codes: np.ndarray, number_format: QFormat, ternary: TernaryCoding = "base3") -> np.ndarray:
    """The codes of one tensor as bytes.

    Binary codes take one bit each, ternary ones what ``ternary`` says, all others ``number_format.bits``.

    Args:
        codes: any shape, integers; taken in C order.
        number_format: what the codes are of.
        ternary: one of ``TERNARY_CODINGS``; other formats are stored in one way only.

    Returns:
        (bytes,), uint8.

    Raises:
        ValueError: if the format does not have one of the codes, or has none at all (``float``), or there is no
            such coding.
    """
    check_coding(ternary)
    _check_codes(codes, number_format)
    if number_format.kind == "binary":
        return pack_signs(codes)
    if is_ternary(number_format) and ternary == "base3":
        return pack_digits(codes)
    return pack_codes(codes, number_format.bits, number_format.qmin)


def decode(
    data: np.ndarray, number_format: QFormat, count: int, ternary: TernaryCoding = "base3"
) -> np.ndarray:
    """The codes of ``encode``.

    Args:
        data: uint8, one-dimensional.
        number_format: what the codes are of.
        count: number of codes.
        ternary: how ternary codes were stored.

    Returns:
        (count,), int32.

    Raises:
        ValueError: if the data is not what ``encode`` writes for ``count`` codes of this format, or there is no
            such coding.
    """
    check_coding(ternary)
    if number_format.kind == "binary":
        return unpack_signs(data, count)
    if is_ternary(number_format) and ternary == "base3":
        return unpack_digits(data, count)
    codes = unpack_codes(data, number_format.bits, number_format.qmin, count)
    _check_codes(codes, number_format)
    return codes


def is_ternary(number_format: QFormat) -> bool:
    """Whether a tensor of this format can be stored in more than one way: codes -1, 0, 1 with a free scale."""
    return number_format.kind == "ternary" and number_format.signed


def check_coding(ternary: Any) -> None:
    """Refuse what is no way to store ternary codes.

    Raises:
        ValueError: if it is none of ``TERNARY_CODINGS``.
    """
    if ternary not in TERNARY_CODINGS:
        raise ValueError(
            f"{ternary!r} is no coding of ternary weights, expected {' or '.join(map(repr, TERNARY_CODINGS))}"
        )


def _check_codes(codes: np.ndarray, number_format: QFormat) -> None:
    lowest, highest = number_format.qmin, number_format.qmax
    if codes.size and not lowest <= codes.min() <= codes.max() <= highest:
        raise ValueError(
            f"found codes {codes.min()} to {codes.max()}, those of {number_format} are {lowest} to {highest}"
        )
