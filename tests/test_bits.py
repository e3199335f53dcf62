"""Integer codes and bytes: there and back, against bytes by hand, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_unetq import bits as module
from monai_unetq.bits import (
    pack_codes,
    pack_digits,
    pack_signs,
    unpack_codes,
    unpack_digits,
    unpack_signs,
)


@st.composite
def codes(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Codes, their number of bits, and the lowest code; unsigned, two's complement or any offset."""
    bits = draw(st.integers(1, 24))
    lowest = draw(st.sampled_from([0, -(1 << (bits - 1)), -(1 << bits) + 1]))
    values = st.one_of(
        st.integers(lowest, lowest + (1 << bits) - 1), st.sampled_from([lowest, lowest + (1 << bits) - 1])
    )
    return np.array(draw(st.lists(values, max_size=60)), dtype=np.int32), bits, lowest


@given(codes())
def test_there_and_back(case: tuple[np.ndarray, int, int]) -> None:
    values, bits, lowest = case
    data = pack_codes(values, bits, lowest)
    assert data.dtype == np.uint8
    assert data.shape == (-(-values.size * bits // 8),)
    found = unpack_codes(data, bits, lowest, values.size)
    assert found.dtype == np.int32
    assert np.array_equal(found, values)


@given(codes())
def test_the_stream_is_the_codes_bits_least_significant_first(case: tuple[np.ndarray, int, int]) -> None:
    values, bits, lowest = case
    number = sum((int(v) - lowest) << (i * bits) for i, v in enumerate(values))
    assert pack_codes(values, bits, lowest).tobytes() == number.to_bytes(
        -(-values.size * bits // 8), "little"
    )


@pytest.mark.parametrize(
    ("values", "bits", "lowest", "expected"),
    [
        ([1, 0, 1, 1, 0, 0, 0, 1, 1], 1, 0, [0b10001101, 0b1]),
        ([-8, 7, 0], 4, -8, [0xF0, 0x08]),  # 0, 15 | 8
        ([0, 63, 1], 6, 0, [0b11000000, 0b00011111, 0b00]),  # 000000 111111 100000, first bit lowest
        ([5, 3], 3, 0, [0b00011101]),
        ([-1, 1, -2, 0], 2, -2, [0b10001101]),
        ([0x123456], 24, 0, [0x56, 0x34, 0x12]),
        ([], 4, -8, []),
    ],
)
def test_bytes_by_hand(values: list[int], bits: int, lowest: int, expected: list[int]) -> None:
    assert pack_codes(np.array(values, dtype=np.int64), bits, lowest).tolist() == expected
    assert unpack_codes(np.array(expected, np.uint8), bits, lowest, len(values)).tolist() == values


def test_any_shape_is_taken_in_c_order() -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(2, 0, 1) - 12
    assert np.array_equal(unpack_codes(pack_codes(values, 5, -12), 5, -12, 24), values.reshape(-1))


@pytest.mark.parametrize("chunk", [8, 16])
@pytest.mark.parametrize("bits", [1, 3, 4, 7, 24])
def test_chunks_meet_without_a_seam(chunk: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for count in (chunk - 1, chunk, chunk + 1, 3 * chunk, 3 * chunk + 5):
        values = generator.integers(0, 1 << bits, count).astype(np.int32)
        whole = pack_codes(values, bits, 0)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_CHUNK", chunk)
            assert np.array_equal(pack_codes(values, bits, 0), whole)
            assert np.array_equal(unpack_codes(whole, bits, 0, count), values)


def test_real_chunks_meet_too() -> None:
    values = np.random.default_rng(0).integers(-4, 4, module._CHUNK + 3).astype(np.int32)
    assert np.array_equal(unpack_codes(pack_codes(values, 3, -4), 3, -4, values.size), values)


@pytest.mark.parametrize(
    ("values", "found"), [([0, 8], "0 to 8"), ([-9, 0], "-9 to 0"), ([-100, 100], "-100 to 100")]
)
def test_codes_out_of_range_are_refused(values: list[int], found: str) -> None:
    with pytest.raises(ValueError, match=f"codes {found} do not fit in 4 bits from -8"):
        pack_codes(np.array(values), 4, -8)


@pytest.mark.parametrize("size", [0, 2, 4, 5])
def test_wrong_lengths_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"found {size} bytes, expected 3 for 5 codes of 4 bits"):
        unpack_codes(np.zeros(size, np.uint8), 4, -8, 5)


def test_bits_behind_the_last_code_are_refused() -> None:
    data = pack_codes(np.array([1, 2, 3]), 4, 0)
    data[-1] |= 0x80
    with pytest.raises(ValueError, match="after the last code"):
        unpack_codes(data, 4, 0, 3)


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=60))
def test_digits_there_and_back(values: list[int]) -> None:
    data = pack_digits(np.array(values, dtype=np.int32))
    assert data.dtype == np.uint8
    assert data.shape == (-(-len(values) // 5),)
    for place, byte in enumerate(data.tolist()):
        assert byte == sum((code + 1) * 3**i for i, code in enumerate(values[5 * place : 5 * place + 5]))
    found = unpack_digits(data, len(values))
    assert found.dtype == np.int32
    assert found.tolist() == values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1, 1, 1, 1], [242]),
        ([-1, -1, -1, -1, -1], [0]),
        ([-1, 0, 1, -1, 0], [0 + 3 + 18 + 0 + 81]),
        ([0, 0, 0, 0, 0, 1], [121, 2]),
        ([1, -1, 0], [2 + 0 + 9]),
        ([], []),
    ],
)
def test_digits_by_hand(values: list[int], expected: list[int]) -> None:
    assert pack_digits(np.array(values, dtype=np.int64)).tolist() == expected
    assert unpack_digits(np.array(expected, np.uint8), len(values)).tolist() == values


def test_every_byte_of_five_digits() -> None:
    """All 243 bytes stand for different digits, and give themselves back."""
    whole = np.arange(243, dtype=np.uint8)
    codes = unpack_digits(whole, 5 * 243)
    assert len({tuple(row) for row in codes.reshape(-1, 5).tolist()}) == 243
    assert np.array_equal(pack_digits(codes), whole)


@pytest.mark.parametrize("byte", [243, 244, 255])
@pytest.mark.parametrize("place", [0, 2])
def test_bytes_above_five_digits_are_refused(byte: int, place: int) -> None:
    data = pack_digits(np.zeros(15, np.int8))
    data[place] = byte
    with pytest.raises(ValueError, match=f"byte {place} is {byte}, five ternary digits give 242 at most"):
        unpack_digits(data, 15)


@given(st.integers(1, 4), st.integers(0, 2), st.integers(1, 2))
def test_digits_behind_the_last_code_are_refused(held: int, bytes_before: int, digit: int) -> None:
    data = pack_digits(np.ones(5 * bytes_before + held, np.int8))
    for place in range(held, 5):
        longer = data.copy()
        longer[-1] += digit * 3**place
        with pytest.raises(ValueError, match="digits after the last code"):
            unpack_digits(longer, 5 * bytes_before + held)


@pytest.mark.parametrize("size", [0, 1, 3, 4])
def test_wrong_lengths_of_digits_are_refused(size: int) -> None:
    with pytest.raises(
        ValueError, match=f"found {size} bytes, expected 2 for 7 ternary digits, five in a byte"
    ):
        unpack_digits(np.zeros(size, np.uint8), 7)


@pytest.mark.parametrize(
    ("values", "found"), [([0, 2], "0 to 2"), ([-2, 1], "-2 to 1"), ([257, 0], "0 to 257")]
)
def test_codes_that_are_no_digits_are_refused(values: list[int], found: str) -> None:
    with pytest.raises(ValueError, match=f"codes {found} are no ternary digits, expected -1, 0 or 1"):
        pack_digits(np.array(values))


@given(st.lists(st.sampled_from([-1, 1]), max_size=40))
def test_signs_there_and_back(values: list[int]) -> None:
    data = pack_signs(np.array(values, dtype=np.int32))
    assert data.dtype == np.uint8
    assert data.tobytes() == sum((v > 0) << i for i, v in enumerate(values)).to_bytes(
        -(-len(values) // 8), "little"
    )
    found = unpack_signs(data, len(values))
    assert found.dtype == np.int32
    assert found.tolist() == values


@pytest.mark.parametrize("foreign", [0, 2, -2, 255])
def test_codes_that_are_no_signs_are_refused(foreign: int) -> None:
    with pytest.raises(ValueError, match=f"the code {foreign} is no sign, expected -1 or 1"):
        pack_signs(np.array([1, -1, foreign, 1]))


def test_wrong_lengths_and_padding_of_signs_are_refused() -> None:
    with pytest.raises(ValueError, match="found 1 bytes, expected 2 for 9 codes of 1 bits"):
        unpack_signs(np.zeros(1, np.uint8), 9)
    with pytest.raises(ValueError, match="after the last code"):
        unpack_signs(np.array([255, 0b10], np.uint8), 9)


@pytest.mark.parametrize("pack", [pack_signs, pack_digits])
def test_signs_and_digits_of_any_shape_are_taken_in_c_order(pack: Callable[[np.ndarray], np.ndarray]) -> None:
    values = np.where(np.arange(24) % 5 > 1, 1, -1).reshape(2, 3, 4).transpose(2, 0, 1)
    assert np.array_equal(pack(values), pack(values.reshape(-1)))
    assert not np.array_equal(pack(values), pack(values.transpose(1, 2, 0).reshape(-1)))
