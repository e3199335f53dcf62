"""How the codes of each format are stored: exact sizes, there and back, and codes that a format does not have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_unetq.bits import pack_codes
from monai_unetq.coding import TERNARY_CODINGS, TernaryCoding, decode, encode
from monai_unetq.formats import QFormat

# Format, coding, bytes of 100 codes: by hand.
SIZES: list[tuple[str, TernaryCoding, int]] = [
    ("binary", "base3", 13),  # 12.5
    ("ternary", "base3", 20),  # 1.6 bits each
    ("ternary", "2bit", 25),
    ("uternary", "base3", 25),  # codes 0, 1, 2: only signed ones are weights
    ("uint1", "base3", 13),
    ("int2", "base3", 25),
    ("pow2-2", "base3", 25),
    ("pow2-3", "base3", 38),  # 37.5
    ("pow2-4", "2bit", 50),
    ("pow2-5", "base3", 63),  # 62.5
    ("pow2-6", "base3", 75),
    ("Q0.4", "base3", 50),
    ("Q0.4:literal", "base3", 75),
    ("Q8.8", "base3", 200),
]


def codes_of(number_format: QFormat) -> list[int]:
    """The codes that the format has, or those at the ends of many."""
    if number_format.kind == "binary":
        return [-1, 1]
    every = range(number_format.qmin, number_format.qmax + 1)
    return [*every] if len(every) < 100 else [*every[:20], *every[-20:]]


@pytest.mark.parametrize(("name", "coding", "size"), SIZES)
def test_sizes(name: str, coding: TernaryCoding, size: int) -> None:
    number_format = QFormat(name)
    codes = np.resize(np.array(codes_of(number_format), np.int32), 100)
    data = encode(codes, number_format, coding)
    assert data.dtype == np.uint8
    assert data.shape == (size,)
    assert np.array_equal(decode(data, number_format, 100, coding), codes)


@given(st.data())
def test_there_and_back(data: st.DataObject) -> None:
    name, coding, _ = data.draw(st.sampled_from(SIZES))
    number_format = QFormat(name)
    values = data.draw(st.lists(st.sampled_from(codes_of(number_format)), max_size=40))
    stored = encode(np.array(values, np.int32), number_format, coding)
    found = decode(stored, number_format, len(values), coding)
    assert found.dtype == np.int32
    assert found.tolist() == values


@pytest.mark.parametrize("coding", TERNARY_CODINGS)
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("binary", 0, "the code 0 is no sign"),
        ("binary", 2, "found codes -1 to 2, those of binary are -1 to 1"),
        ("ternary", 2, "found codes 1 to 2, those of ternary are -1 to 1"),
        ("ternary", -2, "found codes -2 to 1, those of ternary are -1 to 1"),
        ("pow2-3", 3, "found codes 1 to 3, those of pow2-3 are -2 to 2"),
        ("pow2-4", -5, "found codes -5 to 1, those of pow2-4 are -4 to 4"),
        ("pow2-5", 9, "found codes 1 to 9, those of pow2-5 are -8 to 8"),
        ("Q0.4", 8, "found codes 1 to 8, those of Q0.4 are -8 to 7"),
    ],
)
def test_codes_that_a_format_does_not_have_are_not_stored(
    name: str, code: int, message: str, coding: TernaryCoding
) -> None:
    values = [-1, code, 1] if name == "binary" else [1, code, 1]
    with pytest.raises(ValueError, match=message):
        encode(np.array(values), QFormat(name), coding)


@pytest.mark.parametrize(
    ("name", "code"),
    [("ternary", 2), ("pow2-2", 2), ("pow2-3", 3), ("pow2-4", 5), ("pow2-4", 11), ("pow2-6", 17)],
)
def test_codes_that_a_format_does_not_have_are_not_read(name: str, code: int) -> None:
    """The bits of a format may hold more codes than it has."""
    number_format = QFormat(name)
    data = pack_codes(np.array([0, code, 1]), number_format.bits, number_format.qmin)
    with pytest.raises(ValueError, match=f"found codes 0 to {code}, those of {name} are"):
        decode(data, number_format, 3, "2bit")


def test_float_has_no_codes() -> None:
    with pytest.raises(ValueError, match="'float' has no integer codes"):
        encode(np.zeros(3, np.int32), QFormat("float"))
    with pytest.raises(ValueError, match="'float' has no integer codes"):
        decode(np.zeros(12, np.uint8), QFormat("float"), 3)


@pytest.mark.parametrize("coding", ["base4", "", None, ["base3"], 2])
def test_unknown_codings_are_refused(coding: object) -> None:
    message = "is no coding of ternary weights, expected 'base3' or '2bit'"
    for name in ("ternary", "binary", "int4"):
        with pytest.raises(ValueError, match=message):
            encode(np.ones(3, np.int32), QFormat(name), coding)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            decode(np.zeros(1, np.uint8), QFormat(name), 3, coding)  # type: ignore[arg-type]
