"""Integer codes ↔ bytes at their true bit width."""

from __future__ import annotations

import numpy as np

__all__ = ["pack_codes", "unpack_codes"]

_CHUNK = 1 << 19  # codes at a time, a multiple of 8 so that chunks end on whole bytes


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
    flat = np.ascontiguousarray(codes).reshape(-1).astype(np.int64) - lowest
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
    if data.size != -(-count * bits // 8):
        raise ValueError(
            f"found {data.size} bytes, expected {-(-count * bits // 8)} for {count} codes of {bits} bits"
        )
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
