"""Integer codes ↔ bytes: at their true bit width, signs as bits, and ternary digits five in a byte."""

from __future__ import annotations

import numpy as np

__all__ = ["pack_codes", "pack_digits", "pack_signs", "unpack_codes", "unpack_digits", "unpack_signs"]

_CHUNK = 1 << 19  # codes at a time, a multiple of 8 so that chunks end on whole bytes

_DIGITS_IN_A_BYTE = 5  # 3^5 = 243 of 256 values: 1.6 bits a digit, where log2(3) = 1.585 is the least
_PLACES = 3 ** np.arange(_DIGITS_IN_A_BYTE, dtype=np.uint8)
_HIGHEST_BYTE = 3**_DIGITS_IN_A_BYTE - 1
_DIGITS = np.arange(_HIGHEST_BYTE + 1, dtype=np.uint8)[:, None] // _PLACES % 3  # byte → its digits


def pack_codes(codes: np.ndarray, bits: int, lowest: int) -> np.ndarray:
    """Codes as a bit stream: code - lowest in ``bits`` bits, least significant bit first, no padding between.

    Args:
        codes: any shape, integers in [lowest, lowest + 2^bits - 1]; taken in C order.
        bits: 1 to 24.
        lowest: the code that is stored as 0.

    Returns:
        (⌈n·bits / 8⌉,), uint8; the last byte is filled up with zeros.

    Raises:
        ValueError: if a code is out of range.
    """
    flat = _flat(codes) - lowest
    if flat.size and (flat.min() < 0 or flat.max() >> bits):
        found = f"{flat.min() + lowest} to {flat.max() + lowest}"
        raise ValueError(f"codes {found} do not fit in {bits} bits from {lowest}")
    places = np.arange(bits, dtype=np.uint32)
    parts = [
        np.packbits(
            ((chunk.astype(np.uint32)[:, None] >> places) & 1).astype(np.uint8), axis=None, bitorder="little"
        )
        for chunk in (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack_codes(data: np.ndarray, bits: int, lowest: int, count: int) -> np.ndarray:
    """The codes of ``pack_codes``.

    Args:
        data: uint8, one-dimensional.
        bits: 1 to 24.
        lowest: the code that is stored as 0.
        count: number of codes.

    Returns:
        (count,), int32.

    Raises:
        ValueError: if the data is not as long as ``count`` codes are, or its padding is not zero.
    """
    _check_size(data, -(-count * bits // 8), f"{count} codes of {bits} bits")
    weights = (1 << np.arange(bits)).astype(np.int64)
    step = _CHUNK * bits // 8
    parts = []
    for index, start in enumerate(range(0, data.size, step)):
        stream = np.unpackbits(data[start : start + step], bitorder="little")
        held = min(_CHUNK, count - index * _CHUNK)
        if stream[held * bits :].any():
            raise ValueError("the bits after the last code are not zero")
        parts.append(stream[: held * bits].reshape(held, bits) @ weights + lowest)
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


def pack_signs(codes: np.ndarray) -> np.ndarray:
    """Codes -1 and 1 as single bits, 1 for the code 1: the stream of ``pack_codes`` with 1 bit.

    Args:
        codes: any shape, integers; taken in C order.

    Returns:
        (⌈n / 8⌉,), uint8; the last byte is filled up with zeros.

    Raises:
        ValueError: if a code is neither -1 nor 1.
    """
    flat = _flat(codes)
    foreign = flat[np.abs(flat) != 1]
    if foreign.size:
        raise ValueError(f"the code {foreign[0]} is no sign, expected -1 or 1")
    return pack_codes(flat > 0, 1, 0)


def unpack_signs(data: np.ndarray, count: int) -> np.ndarray:
    """The codes of ``pack_signs``.

    Args:
        data: uint8, one-dimensional.
        count: number of codes.

    Returns:
        (count,), int32, -1 or 1.

    Raises:
        ValueError: if the data is not as long as ``count`` codes are, or its padding is not zero.
    """
    return 2 * unpack_codes(data, 1, 0, count) - 1


def pack_digits(codes: np.ndarray) -> np.ndarray:
    """Codes -1, 0, 1 as digits of base 3 (code + 1), five in a byte, least significant digit first.

    Args:
        codes: any shape, integers; taken in C order.

    Returns:
        (⌈n / 5⌉,), uint8, each Σ digit·3^place, 0 to 242; the last byte is filled up with digits 0.

    Raises:
        ValueError: if a code is not -1, 0 or 1.
    """
    flat = _flat(codes) + 1
    if flat.size and (flat.min() < 0 or flat.max() > 2):
        raise ValueError(
            f"codes {flat.min() - 1} to {flat.max() - 1} are no ternary digits, expected -1, 0 or 1"
        )
    digits = np.pad(flat.astype(np.uint8), (0, -flat.size % _DIGITS_IN_A_BYTE))
    return digits.reshape(-1, _DIGITS_IN_A_BYTE) @ _PLACES


def unpack_digits(data: np.ndarray, count: int) -> np.ndarray:
    """The codes of ``pack_digits``.

    Args:
        data: uint8, one-dimensional.
        count: number of codes.

    Returns:
        (count,), int32, -1, 0 or 1.

    Raises:
        ValueError: if the data is not as long as ``count`` codes are, a byte is above 242, or a digit after the
            last code is not 0.
    """
    _check_size(data, -(-count // _DIGITS_IN_A_BYTE), f"{count} ternary digits, five in a byte")
    above = np.flatnonzero(data > _HIGHEST_BYTE)
    if above.size:
        raise ValueError(
            f"byte {above[0]} is {data[above[0]]}, five ternary digits give {_HIGHEST_BYTE} at most"
        )
    digits = _DIGITS[data].reshape(-1)
    if digits[count:].any():
        raise ValueError("the digits after the last code are not zero")
    return digits[:count].astype(np.int32) - 1


def _flat(codes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(codes).reshape(-1).astype(np.int64)


def _check_size(data: np.ndarray, expected: int, what: str) -> None:
    if data.size != expected:
        raise ValueError(f"found {data.size} bytes, expected {expected} for {what}")
