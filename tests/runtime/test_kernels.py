"""Integer arithmetic against fractions, float64 and PyTorch's layers in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from monai_unetq.quantizers.functional import literal_fake_quantize
from monai_unetq.runtime import kernels

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.floats(-300, 300, width=32),
    st.integers(-2000, 2000).map(lambda n: n / 16),  # ties
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, 2.0**-149, -(2.0**-126), 3.4028234663852886e38]),
)


def half_to_even(value: Fraction) -> int:
    return round(value)  # which is what Python's Fraction does


@given(st.data())
def test_rounding_to_another_grid(data: st.DataObject) -> None:
    bits, dtype = data.draw(st.sampled_from([(29, np.int32), (60, np.int64)]))
    bound = data.draw(st.integers(0, (1 << bits) - 1))
    values = data.draw(st.lists(st.integers(-bound, bound), min_size=1, max_size=8))
    exponent = data.draw(st.integers(-40, 80))
    to = exponent - data.draw(st.integers(-4, 90))
    width = data.draw(st.integers(1, 24))
    low, high = data.draw(
        st.sampled_from([(0, (1 << width) - 1), (-(1 << (width - 1)), (1 << (width - 1)) - 1), (-1, 1)])
    )
    if to > exponent and dtype == np.int32 and width > 20:
        dtype = np.int64
    found = kernels.round_to(np.array(values, dtype), exponent, to, low, high, bound)
    expected = [min(max(half_to_even(value * Fraction(2) ** (to - exponent)), low), high) for value in values]
    assert found.dtype == dtype
    assert found.tolist() == expected


@given(st.integers(-(1 << 40), 1 << 40), st.integers(0, 45))
def test_shift_with_rounding(value: int, shift: int) -> None:
    found = kernels.round_shift(np.array([value], np.int64), shift)
    assert found.tolist() == [half_to_even(Fraction(value, 1 << shift))]


@given(st.lists(FLOATS, min_size=1, max_size=8), st.integers(-130, 140), st.integers(1, 24), st.booleans())
def test_floats_by_their_bits(values: list[float], exponent: int, bits: int, signed: bool) -> None:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    array = np.array(values, np.float32)
    found = kernels.round_float_bits(array, exponent, low, high)
    expected = np.clip(np.rint(array.astype(np.float64) * 2.0**exponent), low, high)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)


def test_nan_and_other_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        kernels.round_float_bits(np.array([1.0, np.nan], np.float32), 4, 0, 15)
    with pytest.raises(ValueError, match="float64, expected float32"):
        kernels.round_float_bits(np.array([1.0]), 4, 0, 15)


@given(st.lists(FLOATS, min_size=1, max_size=8), st.integers(0, 8), st.integers(0, 8), st.booleans())
def test_the_printed_formula(values: list[float], whole: int, fraction: int, signed: bool) -> None:
    if not whole + fraction:
        whole = 1
    array = np.array(values, np.float32)
    high = ((1 << whole) - 1 + (1 if fraction else 0)) << fraction
    low = -high if signed else 0
    rounded = literal_fake_quantize(torch.from_numpy(array).double(), whole, fraction, signed)
    expected = rounded.numpy() * 2.0**fraction
    assert np.array_equal(kernels.round_float_literally(array, fraction, low, high), expected)


@given(st.integers(-(1 << 45), 1 << 45), st.integers(-5, 50), st.integers(0, 8), st.integers(1, 8))
def test_the_printed_formula_of_integers(value: int, exponent: int, fraction: int, whole: int) -> None:
    high = ((1 << whole) - 1 + (1 if fraction else 0)) << fraction
    found = kernels.round_literally(np.array([value], np.int64), exponent, fraction, -high, high)
    exact = torch.tensor([value * 2.0**-exponent], dtype=torch.float64)
    assert found.tolist() == (literal_fake_quantize(exact, whole, fraction) * 2**fraction).tolist()


def integers(shape: tuple[int, ...], bound: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-bound, bound + 1, shape)


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel": (3,)},
    {"kernel": (3,), "strides": (2,), "pads": (1, 1), "transposed": True, "output_padding": (1,)},
    {"kernel": (3, 3), "pads": (1, 1, 1, 1)},
    {"kernel": (2, 3), "strides": (2, 1), "pads": (0, 1, 0, 1), "groups": 2},
    {"kernel": (3, 3), "strides": (3, 2), "pads": (2, 2, 2, 2), "dilations": (2, 1)},
    {"kernel": (1, 1), "strides": (2, 2)},
    {"kernel": (5, 1), "pads": (4, 0, 4, 0), "dilations": (2, 3), "groups": 4},
    {"kernel": (2, 2), "strides": (2, 2), "transposed": True},
    {"kernel": (3, 2), "strides": (2, 3), "pads": (1, 0, 1, 0), "transposed": True, "output_padding": (1, 2), "groups": 2},
    {"kernel": (3, 3), "dilations": (1, 2), "pads": (1, 2, 1, 2), "transposed": True},
    {"kernel": (3, 3, 3), "pads": (1, 1, 1, 1, 1, 1), "strides": (1, 2, 2)},
    {"kernel": (1, 2, 2), "strides": (1, 2, 2), "transposed": True},
    {"kernel": ()},
]  # fmt: skip


@pytest.mark.parametrize("bounds", [(7, 63), (127, 255), (1 << 16, 1 << 20), (1 << 30, 1 << 16)])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions(case: dict[str, Any], bounds: tuple[int, int]) -> None:
    kernel = case["kernel"]
    n, groups, transposed = len(kernel), case.get("groups", 1), case.get("transposed", False)
    strides, dilations = case.get("strides", (1,) * n), case.get("dilations", (1,) * n)
    pads, extra = case.get("pads", (0,) * 2 * n), case.get("output_padding", (0,) * n)
    inputs, outputs = 40 if groups == 1 else 8, 4
    weight = integers((outputs, inputs // groups, *kernel), bounds[0], 1)
    bias = integers((outputs,), 1000, 2)
    image = integers((inputs, 2, *(6, 7, 5)[:n]), bounds[1], 3)
    image = np.where(image % 3 == 0, bounds[1], image)  # as large as they may be
    worst = int(np.abs(weight).reshape(outputs, -1).sum(1).max()) * bounds[1] + 1000
    plan = kernels.plan_convolution(
        weight, bias, [bounds[1]] * inputs, strides=strides, pads=pads, dilations=dilations, groups=groups,
        transposed=transposed, output_padding=extra, accumulator=kernels.integer_dtype(worst, 32),
    )  # fmt: skip
    found = kernels.convolve(image.astype(kernels.integer_dtype(bounds[1])), plan)
    assert found.dtype == plan.bias.dtype
    x, b = torch.from_numpy(image).double().swapaxes(0, 1), torch.from_numpy(bias).double()
    w = torch.from_numpy(weight).double()
    if not n:
        expected = F.linear(x, w, b)
    elif transposed:
        own = w.unflatten(0, (groups, -1)).swapaxes(1, 2).flatten(0, 1)
        run: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
        expected = run(x, own, b, strides, pads[:n], extra, groups, dilations)
    else:
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
        expected = conv(x, w, b, strides, pads[:n], dilations, groups)
    assert np.array_equal(found.swapaxes(0, 1), expected.numpy())


def test_partial_sums_are_narrow_only_where_that_is_proven() -> None:
    def planned(weight: int, image: int, inputs: int = 64) -> kernels.ConvolutionPlan:
        bound = weight * image * inputs
        return kernels.plan_convolution(
            np.full((2, inputs, 1), weight), np.zeros(2, np.int64), [image] * inputs, strides=(1,), pads=(0, 0),
            dilations=(1,), groups=1, transposed=False, output_padding=(0,),
            accumulator=kernels.integer_dtype(bound, 32),
        )  # fmt: skip

    for weight, image, expected in ((7, 63, "int16"), (127, 255, "int32"), (1 << 15, 1 << 12, "int32"), (1 << 30, 8, "int64"), (1 << 40, 1, "int64")):  # fmt: skip
        plan = planned(weight, image)
        assert plan.partial == expected
        top = np.iinfo(plan.partial).max
        for piece in plan.passes[0].pieces[0]:
            assert int(np.abs(piece.weights.astype(object)).sum(1).max()) * image <= top
        found = kernels.convolve(np.full((64, 1, 3), image, kernels.integer_dtype(image)), plan)
        assert (found == weight * image * 64).all()


def test_a_transposed_convolution_by_hand() -> None:
    weight, bias = np.array([[[1, 2, 3]]]), np.array([10])
    plan = kernels.plan_convolution(
        weight, bias, [9], strides=(2,), pads=(0, 0), dilations=(1,), groups=1, transposed=True,
        output_padding=(0,), accumulator=np.dtype(np.int32),
    )  # fmt: skip
    found = kernels.convolve(np.array([[[4, 5]]], np.int16), plan)
    # 4·(1 2 3) from pixel 0 on, 5·(1 2 3) from pixel 2 on
    assert found.tolist() == [[[14, 18, 10 + 12 + 5, 20, 25]]]


def test_an_image_smaller_than_the_kernel_is_refused() -> None:
    plan = kernels.plan_convolution(
        np.ones((1, 1, 3), np.int64), np.zeros(1, np.int64), [1], strides=(1,), pads=(0, 0), dilations=(1,), groups=1,
        transposed=False, output_padding=(0,), accumulator=np.dtype(np.int32),
    )  # fmt: skip
    with pytest.raises(ValueError, match="too small"):
        kernels.convolve(np.ones((1, 1, 2), np.int16), plan)


def test_interpolation_by_hand() -> None:
    # Output pixels lie a quarter of a pixel beside the input's: 1/4 and 3/4 of neighbours; times 4.
    assert kernels.interpolate(np.array([[[4, 8, 0]]], np.int16), (2,)).tolist() == [[[16, 20, 28, 24, 8, 0]]]
    flat = kernels.interpolate(np.array([[[[1, 0], [0, 0]]]], np.int32), (2, 2))
    assert flat[0, 0].tolist() == [[16, 12, 4, 0], [12, 9, 3, 0], [4, 3, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("factors", [(2,), (4,), (2, 1), (8, 2), (2, 2, 2), (1, 2, 4)])
def test_interpolation_is_torchs(factors: tuple[int, ...]) -> None:
    image = integers((3, 2, *(3, 4, 1)[: len(factors)]), 100, 4)
    found = kernels.interpolate(image.astype(np.int64), factors)
    mode = ("linear", "bilinear", "trilinear")[len(factors) - 1]
    scales = tuple(map(float, factors))
    expected = F.interpolate(torch.from_numpy(image).double(), scale_factor=scales, mode=mode)
    assert np.array_equal(found, expected.numpy() * math.prod(2 * f for f in factors if f > 1))


@pytest.mark.parametrize(
    ("kernel", "strides", "padding"),
    [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((4, 1), (1, 2), (2, 0))],
)
def test_pooling(kernel: tuple[int, ...], strides: tuple[int, ...], padding: tuple[int, ...]) -> None:
    image = integers((3, 2, 8, 9), 100, 5).astype(np.int16)
    exact = torch.from_numpy(image).double()
    found = kernels.max_pool(image, kernel, strides, (*padding, *padding), (1, 1))
    assert np.array_equal(found, F.max_pool2d(exact, kernel, strides, padding).numpy())
    sums = kernels.sum_pool(image, kernel, strides, (*padding, *padding))
    expected = F.avg_pool2d(exact, kernel, strides, padding) * math.prod(kernel)
    assert np.allclose(sums, expected.numpy(), atol=1e-9)
    assert found.dtype == sums.dtype == np.int16


def test_padding_and_cropping() -> None:
    image = np.arange(1, 5, dtype=np.int16).reshape(1, 1, 4)
    assert kernels.pad_spatial(image, (1, 2), 0).tolist() == [[[0, 1, 2, 3, 4, 0, 0]]]
    assert kernels.pad_spatial(image, (-1, 1), 0).tolist() == [[[2, 3, 4, 0]]]
    assert kernels.pad_spatial(image, (1, 1), None).tolist() == [[[1, 1, 2, 3, 4, 4]]]


@settings(max_examples=20)
@given(st.integers(0, (1 << 63) - 1))
def test_the_narrowest_type(bound: int) -> None:
    dtype = kernels.integer_dtype(bound)
    assert bound <= np.iinfo(dtype).max
    assert dtype == np.int16 or bound > np.iinfo(f"int{4 * dtype.itemsize}").max
    assert kernels.integer_dtype(bound, 32).itemsize >= 4
    with pytest.raises(ValueError, match="does not fit int64"):
        kernels.integer_dtype(bound + (1 << 63))
