"""Rounding and its gradients: against Brevitas, against float64 numpy, and against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from monai_unetq.formats import QFormat
from monai_unetq.quantizers import (
    fake_quantize,
    learned_fake_quantize,
    literal_fake_quantize,
    to_codes,
)

INF, NAN = math.inf, math.nan


def limits(bits: int, signed: bool) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal value for value, NaN where the other is NaN."""
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) and a.dtype == b.dtype


def by_numpy(values: np.ndarray, scale: np.ndarray, qmin: int, qmax: int) -> np.ndarray:
    """clip(rint(x / s), qmin, qmax) · s in float64; rint rounds half to even and NaN stays."""
    with np.errstate(invalid="ignore"):
        return np.clip(np.rint(values.astype(np.float64) / scale), qmin, qmax) * scale


def by_brevitas(tensor: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """What Brevitas' fixed-point quantizers compute once their scale is known."""
    from brevitas.core.function_wrapper import Identity, RoundSte, TensorClamp
    from brevitas.core.quant import IntQuant

    quantizer = IntQuant(
        narrow_range=False,
        signed=signed,
        input_view_impl=Identity(),
        float_to_int_impl=RoundSte(),
        tensor_clamp_impl=TensorClamp(),
    )
    out: Tensor = quantizer(scale, torch.tensor(0.0), torch.tensor(float(bits)), tensor)
    return out


def awkward(scale: float, qmin: int, qmax: int) -> Tensor:
    """Values on ties, beside ties, at and beyond the limits, zeros, infinities and NaN, for one scale."""
    codes = torch.tensor([qmin - 1, qmin, -2, -1, 0, 1, 2, 3, qmax - 1, qmax, qmax + 1], dtype=torch.float32)
    ties = (codes + 0.5) * scale
    beside = torch.cat([torch.nextafter(ties, torch.full_like(ties, e)) for e in (-INF, INF)])
    rest = torch.tensor([0.0, -0.0, 3e38, -3e38, 1e-40, -1e-40, INF, -INF, NAN])
    return torch.cat([codes * scale, ties, beside, rest])


widths = st.integers(1, 16)
exponents = st.integers(-16, 8)


@st.composite
def tensors(draw: st.DrawFn, scale: float, dimensions: int = 1) -> Tensor:
    """Float32 values of about the grid's size, many of them on ties, and any other float."""
    near = st.integers(-(1 << 18), 1 << 18).map(lambda k: k * scale / 4)
    shape = draw(hnp.array_shapes(min_dims=dimensions, max_dims=dimensions, max_side=6))
    array = draw(hnp.arrays(np.float32, shape, elements=near | st.floats(width=32), fill=st.nothing()))
    return torch.from_numpy(array)


# Forward


@settings(max_examples=150)
@given(st.data(), widths, st.booleans(), exponents)
def test_matches_float64_numpy_per_tensor(
    data: st.DataObject, bits: int, signed: bool, exponent: int
) -> None:
    scale = 2.0**exponent
    tensor = data.draw(tensors(scale))
    qmin, qmax = limits(bits, signed)
    expected = by_numpy(tensor.numpy(), np.array(scale), qmin, qmax)
    assert same(fake_quantize(tensor, torch.tensor(scale), qmin, qmax).double(), torch.from_numpy(expected))
    learned = learned_fake_quantize(tensor, torch.tensor(scale), qmin, qmax)
    assert same(learned.double(), torch.from_numpy(expected))


@settings(max_examples=100)
@given(st.data(), widths, st.booleans(), st.integers(0, 2))
def test_matches_float64_numpy_per_channel(data: st.DataObject, bits: int, signed: bool, axis: int) -> None:
    tensor = data.draw(tensors(2.0**-4, dimensions=3))
    channels = tensor.shape[axis]
    powers = np.array(data.draw(st.lists(exponents, min_size=channels, max_size=channels)))
    shape = [-1 if d == axis else 1 for d in range(3)]
    qmin, qmax = limits(bits, signed)
    expected = torch.from_numpy(by_numpy(tensor.numpy(), (2.0**powers).reshape(shape), qmin, qmax))
    scale = torch.from_numpy((2.0**powers).astype(np.float32))
    for quantize in (fake_quantize, learned_fake_quantize):
        assert same(quantize(tensor, scale, qmin, qmax, axis).double(), expected)
        assert same(quantize(tensor, scale, qmin, qmax, axis - 3).double(), expected)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 17))
def test_matches_brevitas_per_tensor(bits: int, signed: bool) -> None:
    qmin, qmax = limits(bits, signed)
    generator = torch.Generator().manual_seed(bits)
    for exponent in (-12, -4, 0, 3):
        scale = torch.tensor(2.0**exponent)
        spread = torch.randn(500, generator=generator) * scale * 2**bits
        tensor = torch.cat([spread, awkward(scale.item(), qmin, qmax)])
        expected = by_brevitas(tensor, scale, bits, signed)
        assert same(fake_quantize(tensor, scale, qmin, qmax), expected)
        assert same(learned_fake_quantize(tensor, scale, qmin, qmax), expected)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 17))
def test_matches_brevitas_per_channel(bits: int, signed: bool) -> None:
    qmin, qmax = limits(bits, signed)
    generator = torch.Generator().manual_seed(100 + bits)
    scale = 2.0 ** torch.randint(-12, 4, (6,), generator=generator).float()
    rows = [awkward(s, qmin, qmax) for s in scale.tolist()]
    tensor = torch.stack([torch.cat([r, torch.randn(200, generator=generator) * r[9].abs()]) for r in rows])
    expected = by_brevitas(tensor, scale[:, None], bits, signed)
    assert same(fake_quantize(tensor, scale, qmin, qmax, 0), expected)
    assert same(fake_quantize(tensor.T, scale, qmin, qmax, 1), expected.T)
    assert same(learned_fake_quantize(tensor, scale, qmin, qmax, 0), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_matches_a_whole_brevitas_weight_quantizer(bits: int) -> None:
    import brevitas.nn as qnn
    from brevitas.quant.fixed_point import Int8WeightPerTensorFixedPoint

    torch.manual_seed(bits)
    layer = qnn.QuantConv2d(
        3, 5, 3, weight_quant=Int8WeightPerTensorFixedPoint, weight_bit_width=bits, weight_narrow_range=False
    )
    theirs = layer.quant_weight()
    scale = theirs.scale.detach()
    assert math.log2(scale.item()).is_integer()
    assert same(fake_quantize(layer.weight, scale, *limits(bits, True)).detach(), theirs.value.detach())


@pytest.mark.parametrize(
    ("value", "signed", "unsigned"),
    [
        (0.5, 0.0, 0.0),  # ties to even
        (1.5, 2.0, 2.0),
        (2.5, 2.0, 2.0),
        (-0.5, 0.0, 0.0),
        (-1.5, -2.0, 0.0),
        (6.5, 6.0, 6.0),
        (7.4, 7.0, 7.0),
        (7.5, 7.0, 8.0),  # saturates: the signed range ends at 7
        (-8.5, -8.0, 0.0),
        (-9.0, -8.0, 0.0),
        (100.0, 7.0, 15.0),
        (3e38, 7.0, 15.0),
        (INF, 7.0, 15.0),
        (-INF, -8.0, 0.0),
        (NAN, NAN, NAN),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.0**-9])
def test_by_hand_at_four_bits(value: float, signed: float, unsigned: float, scale: float) -> None:
    for expected, (qmin, qmax) in ((signed, limits(4, True)), (unsigned, limits(4, False))):
        tensor, wanted = torch.tensor([value]) * scale, torch.tensor([expected]) * scale
        assert same(fake_quantize(tensor, torch.tensor(scale), qmin, qmax), wanted)
        assert same(fake_quantize(tensor, torch.tensor([scale]), qmin, qmax, 0), wanted)
        assert same(learned_fake_quantize(tensor, torch.tensor(scale), qmin, qmax), wanted)


@settings(max_examples=60)
@given(st.data(), widths, st.booleans(), exponents)
def test_codes_times_scale_is_the_rounded_tensor(
    data: st.DataObject, bits: int, signed: bool, exponent: int
) -> None:
    tensor, scale = data.draw(tensors(2.0**exponent)), torch.tensor(2.0**exponent)
    qmin, qmax = limits(bits, signed)
    codes = to_codes(tensor, scale, qmin, qmax)
    known = codes[~tensor.isnan()]
    assert torch.equal(known, known.round().clamp(qmin, qmax))
    assert torch.equal(codes.isnan(), tensor.isnan())
    assert same(codes * scale, fake_quantize(tensor, scale, qmin, qmax))


def test_free_scale_is_used_as_it_is() -> None:
    # LSQ used to run with a scale that differed from the stored one by an ulp.
    scale = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e-4
    tensor = (scale * 3)[:, None].repeat(1, 7)
    expected = (scale * 3)[:, None].repeat(1, 7)
    assert torch.equal(fake_quantize(tensor, scale, -8, 7, 0), expected)
    assert torch.equal(learned_fake_quantize(tensor, scale.requires_grad_(), -8, 7, 0), expected)


def test_rounding_twice_changes_nothing() -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(0.013)
    once = fake_quantize(tensor, scale, -8, 7)
    assert torch.equal(fake_quantize(once, scale, -8, 7), once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_shape_and_input_are_kept(dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = tensor.clone()
    for scale, axis in ((torch.tensor(0.25), None), (torch.full((3,), 0.25), 1)):
        for quantize in (fake_quantize, learned_fake_quantize):
            out = quantize(tensor, scale, -8, 7, axis)
            assert (out.dtype, out.shape) == (dtype, tensor.shape)
            assert torch.equal(out, (before.double() * 4).round().clamp(-8, 7).div(4).to(dtype))
    assert torch.equal(tensor, before), "the tensor was changed in place"


# Straight-through gradient


def test_gradient_is_one_inside_and_zero_outside_by_hand() -> None:
    values = [-INF, -9.0, -8.6, -8.4, -8.0, -0.5, 0.0, 0.3, 7.0, 7.4, 7.6, 9.0, INF, NAN]
    inside = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    grad = torch.arange(1.0, len(values) + 1)
    for scale in (1.0, 0.125):
        for shaped, axis in ((torch.tensor(scale), None), (torch.tensor([scale]), 0)):
            for quantize in (fake_quantize, learned_fake_quantize):
                tensor = (torch.tensor([values]) * scale).requires_grad_()
                quantize(tensor, shaped, -8, 7, axis).backward(grad[None])
                assert tensor.grad is not None
                assert tensor.grad[0, :-1].tolist() == [
                    g * i for g, i in zip(grad.tolist(), inside, strict=False)
                ]


def test_gradient_of_an_unsigned_format_by_hand() -> None:
    tensor = torch.tensor([-1.0, -0.6, -0.4, 0.0, 3.0, 3.4, 3.6, 50.0], requires_grad=True)
    fake_quantize(tensor, torch.tensor(1.0), 0, 3).sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_static_scale_gets_no_gradient() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    tensor = torch.randn(10, requires_grad=True)
    fake_quantize(tensor, scale, -8, 7).sum().backward()
    assert scale.grad is None
    assert tensor.grad is not None


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return tensor.round()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def by_autograd(tensor: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """LSQ with a straight-through round, all else left to autograd; the scale's gradient times its gain."""
    gain = 1 / math.sqrt(tensor.numel() / scale.numel() * qmax)
    scaled = scale * gain + (scale - scale * gain).detach()
    if axis is not None:
        scaled = scaled.view([-1 if d == axis else 1 for d in range(tensor.dim())])
    codes = _Round.apply(tensor / scaled)
    # Not clamp's own gradient: at the outermost codes themselves it is 1 in some versions of torch, 0 in others.
    saturated = codes.detach().clamp(qmin, qmax)
    return torch.where(codes == saturated, codes, saturated) * scaled


def gradients(
    quantize: Callable[..., Tensor],
    tensor: Tensor,
    scale: Tensor,
    grad: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
) -> tuple[Tensor, Tensor]:
    tensor, scale = tensor.detach().requires_grad_(), scale.clone().requires_grad_()
    of_tensor, of_scale = torch.autograd.grad(
        quantize(tensor, scale, qmin, qmax, axis), (tensor, scale), grad
    )
    return of_tensor, of_scale


def layouts() -> dict[str, Tensor]:
    """Tensors in all the memory layouts that reach a quantizer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "contiguous": normal(6, 4, 10, 8),
        "channels_last": normal(6, 4, 10, 8).to(memory_format=torch.channels_last),
        "transposed": normal(4, 6, 10, 8).transpose(0, 1),
        "every second": normal(6, 8, 10, 16)[:, ::2, :, ::2],
        "slice with an offset": normal(8, 4, 10, 8)[2:],
        "crop": normal(6, 4, 12, 12)[:, :, 1:11, 2:10],
        "expanded": normal(6, 1, 10, 8).expand(6, 4, 10, 8),
        "large": normal(20, 4, 32, 32),
        "some channels": normal(6, 8, 10, 8)[:, 2:6],
        "many channels": normal(2, 160, 32, 32)[:, 20:],
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("qmin", [-8, 0])
def test_lsq_gradient_matches_autograd(layout: str, axis: int | None, qmin: int) -> None:
    tensor = layouts()[layout]
    generator = torch.Generator().manual_seed(1)
    shape = () if axis is None else (tensor.shape[axis],)
    scale = torch.rand(shape, generator=generator) * 0.1 + 0.1
    for grad in (
        torch.randn(tensor.shape, generator=generator),
        torch.randn(tensor.shape, generator=generator).to(memory_format=torch.channels_last),
        torch.ones(()).expand(tensor.shape),
    ):
        ours = gradients(learned_fake_quantize, tensor, scale, grad, qmin, 7, axis)
        theirs = gradients(by_autograd, tensor.double(), scale.double(), grad.double(), qmin, 7, axis)
        torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_lsq_gradient_survives_float32(bits: int) -> None:
    # With a gradient proportional to the values the two sums Σ g·q and Σ g·x agree in almost all their digits.
    tensor = torch.randn(1 << 18, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    qmin, qmax = limits(bits, True)
    scale = (tensor.abs().max() / qmax).float()
    ours = gradients(learned_fake_quantize, tensor.float(), scale, tensor.float(), qmin, qmax, None)
    wide = tensor.float().double()
    theirs = gradients(by_autograd, wide, scale.double(), wide, qmin, qmax, None)
    assert abs(ours[1].item() - theirs[1].item()) < 1e-3 / bits


def test_lsq_gradient_of_the_scale_by_the_papers_formula() -> None:
    # Equation 3: round(v/s) - v/s inside the range, -QN below, QP above; times g = 1/√(N·QP).
    scale, qmin, qmax = 0.5, -4, 3
    values = [-10.0, -1.9, -0.3, 0.0, 0.2, 0.75, 1.4, 5.0]
    slopes = [-4.0, -4 + 3.8, -1 + 0.6, 0.0, 0 - 0.4, 2 - 1.5, 3 - 2.8, 3.0]
    weights = [1.0, -2.0, 3.0, 4.0, 0.5, 1.5, -1.0, 2.0]
    expected = sum(w * s for w, s in zip(weights, slopes, strict=True)) / math.sqrt(8 * 3)
    grads = gradients(
        learned_fake_quantize,
        torch.tensor(values),
        torch.tensor(scale),
        torch.tensor(weights),
        qmin,
        qmax,
        None,
    )
    assert grads[1].item() == pytest.approx(expected, rel=1e-5)
    assert grads[0].tolist() == [0, -2.0, 3.0, 4.0, 0.5, 1.5, -1.0, 0]


def test_lsq_gain_counts_the_values_that_share_a_scale() -> None:
    # Both rows are outside, where d/ds is the code 7; N is 5 per channel and 10 per tensor.
    tensor, grad = torch.full((2, 5), 100.0), torch.ones(2, 5)
    per_channel = gradients(learned_fake_quantize, tensor, torch.tensor([1.0, 2.0]), grad, -8, 7, 0)[1]
    assert per_channel.tolist() == pytest.approx([35 / math.sqrt(5 * 7)] * 2)
    per_tensor = gradients(learned_fake_quantize, tensor, torch.tensor(1.0), grad, -8, 7, None)[1]
    assert per_tensor.item() == pytest.approx(70 / math.sqrt(10 * 7))


def test_half_a_step_beyond_the_last_code_is_inside() -> None:
    # 7.4 rounds to the code 7, so it is inside: slope 7 - 7.4 (the paper's range would end at 7: slope 7).
    grads = gradients(
        learned_fake_quantize, torch.tensor([7.4]), torch.tensor(1.0), torch.tensor([1.0]), -8, 7, None
    )
    assert grads[0].item() == 1
    assert grads[1].item() == pytest.approx(-0.4 / math.sqrt(7), rel=1e-4)


def test_a_step_along_the_scales_gradient_lowers_the_error() -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    errors = []
    for start in (0.02, 1.5):
        scale = torch.tensor(start, requires_grad=True)
        for _ in range(100):
            error = (learned_fake_quantize(tensor, scale, -8, 7) - tensor).square().mean()
            (slope,) = torch.autograd.grad(error, scale)
            with torch.no_grad():
                scale -= 20 * slope
        errors.append(error.item())
    best = min(
        (fake_quantize(tensor, torch.tensor(s), -8, 7) - tensor).square().mean().item()
        for s in np.linspace(0.1, 0.8, 71)
    )
    assert max(errors) < 1.05 * best


# The paper's literal formula


@pytest.mark.parametrize(
    ("integer_bits", "fraction_bits", "value", "expected"),
    [
        (0, 4, 1.3, 0.3125),  # wraps: the integer part is clamped to 0, the fraction is kept
        (0, 4, -1.3, -0.3125),
        (0, 4, 0.97, 1.0),  # the fraction rounds up to one
        (0, 4, -0.97, -1.0),
        (0, 4, -0.5, -0.5),
        (0, 4, 0.5, 0.5),
        (0, 4, 0.03125, 0.0),  # a tie, to even
        (0, 4, 0.09375, 0.125),
        (0, 4, 1.0, 0.0),
        (0, 4, 0.0, 0.0),
        (6, 0, 3.9, 3.0),  # no fraction bits: floor
        (6, 0, -3.9, -3.0),
        (6, 0, 63.99, 63.0),
        (6, 0, 100.7, 63.0),
        (2, 2, 1.3, 1.25),
        (2, 2, 2.9, 3.0),
        (2, 2, -5.25, -3.25),
        (2, 2, 3.9, 4.0),
        (0, 4, INF, 1.0),
        (0, 4, -INF, -1.0),
        (6, 0, INF, 63.0),
        (2, 2, -INF, -4.0),
        (0, 4, NAN, NAN),
    ],
)
def test_literal_by_hand(integer_bits: int, fraction_bits: int, value: float, expected: float) -> None:
    tensor = torch.tensor([value])
    assert same(literal_fake_quantize(tensor, integer_bits, fraction_bits), torch.tensor([expected]))
    unsigned = literal_fake_quantize(tensor, integer_bits, fraction_bits, signed=False)
    assert same(unsigned, torch.tensor([expected]).clamp(min=0))


@settings(max_examples=100)
@given(st.floats(-300, 300, width=32), st.integers(0, 6), st.integers(0, 8))
def test_literal_is_the_printed_formula(x: float, i: int, f: int) -> None:
    def quantize(value: float, n: int) -> float:
        clamped = 2**n - 1 if value >= 2**n - 1 else value
        return round(clamped * 2**n) / 2**n

    whole = math.floor(abs(x))
    expected = math.copysign(quantize(whole, i) + quantize(abs(x) - whole, f), x)
    assert literal_fake_quantize(torch.tensor(x), i, f).item() == expected


@settings(max_examples=30)
@given(st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_literal_stays_within_the_formats_levels(i: int, f: int, signed: bool) -> None:
    if not i + f:
        return
    number_format = QFormat(f"{'' if signed else 'U'}Q{i}.{f}:literal")
    tensor = torch.linspace(-3 * 2.0**i, 3 * 2.0**i, 5001)
    codes = literal_fake_quantize(tensor, i, f, signed) * 2**f
    assert torch.equal(codes, codes.round())
    assert (codes.min().item(), codes.max().item()) == (number_format.qmin, number_format.qmax)


def test_literal_gradient_is_zero_where_it_wraps() -> None:
    values = [-2.0, -1.0, -0.99, -0.2, 0.0, 0.2, 0.99, 1.0, 1.3, INF, NAN]
    for signed, expected in (
        (True, [0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]),
        (False, [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]),
    ):
        tensor = torch.tensor(values, requires_grad=True)
        literal_fake_quantize(tensor, 0, 4, signed).backward(torch.ones(len(values)))
        assert tensor.grad is not None
        assert tensor.grad.tolist() == expected
