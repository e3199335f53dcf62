"""``Quantizer`` as a module: its state, its gradients, and the ways torch runs a module."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from monai_unetq.formats import QFormat
from monai_unetq.quantizers import (
    Quantizer,
    RangeObserver,
    fake_quantize,
    find_scale,
    learned_fake_quantize,
    literal_fake_quantize,
    sign_quantize,
    sign_weights,
    ternary_codes,
    ternary_tanh,
    ternary_weights,
    weight_scale,
)

SPELLINGS = (
    "Q0.4", "UQ6.0", "Q8.8", "Q0.4:literal", "int4", "uint8", "int2", "float", "binary", "uint1", "ternary", "uternary",
)  # fmt: skip
LOW_BIT = ("binary", "ternary", "pow2-2", "pow2-3", "pow2-4", "pow2-6")
spellings = st.sampled_from(SPELLINGS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(
    spelling: str, channels: int = 0, power_of_two: bool = True, learned: bool = False, weight: bool = False
) -> Quantizer:
    quantizer = Quantizer(QFormat(spelling), channels, power_of_two, learned, weight=weight)
    quantizer.calibrate(
        normal(max(channels, 1), 200, seed=1) * torch.arange(1.0, max(channels, 1) + 1)[:, None]
    )
    return quantizer


# Forward


@pytest.mark.parametrize("spelling", ["Q0.4", "UQ6.0", "Q8.8", "UQ0.8"])
def test_static_formats_need_no_calibration(spelling: str) -> None:
    f, tensor = QFormat(spelling), normal(1000) * 20
    assert f.step is not None
    expected = fake_quantize(tensor, torch.tensor(f.step), f.qmin, f.qmax)
    for channels in (0, 1000):
        quantizer = Quantizer(f, channels, power_of_two=False)
        assert torch.equal(quantizer(tensor), expected)
        assert torch.equal(quantizer.scale, torch.full_like(quantizer.scale, f.step))
        quantizer.calibrate(tensor[:, None] if channels else tensor)
        assert torch.equal(quantizer(tensor), expected), "a static format was calibrated"


def test_float_passes_and_literal_is_the_papers_formula() -> None:
    tensor = normal(100)
    assert Quantizer(QFormat("float"))(tensor) is tensor
    assert torch.equal(Quantizer(QFormat("Q1.3:literal"))(tensor), literal_fake_quantize(tensor, 1, 3))
    unsigned = Quantizer(QFormat("UQ1.3:literal"))(tensor)
    assert torch.equal(unsigned, literal_fake_quantize(tensor, 1, 3, signed=False))


def test_powers_of_two_are_for_weights() -> None:
    with pytest.raises(ValueError, match="'pow2-4' is for weights; give activations another"):
        Quantizer(QFormat("pow2-4"))
    quantizer = Quantizer(QFormat("int4"))
    with pytest.raises(RuntimeError, match="format_code: format 'pow2-4' is for weights"):
        quantizer.load_state_dict(Quantizer(QFormat("pow2-4"), weight=True).state_dict())
    assert quantizer.number_format == QFormat("int4")


@pytest.mark.parametrize("power_of_two", [True, False])
def test_per_channel_is_each_row_by_its_own_scale(power_of_two: bool) -> None:
    tensor = normal(3, 4, 5) * torch.tensor([0.01, 1.0, 50.0])[:, None, None]
    quantizer = Quantizer(QFormat("int4"), 3, power_of_two=power_of_two)
    quantizer.calibrate(tensor)
    for row, (whole, scale) in enumerate(zip(quantizer(tensor), quantizer.scale, strict=True)):
        alone = Quantizer(QFormat("int4"), power_of_two=power_of_two)
        alone.calibrate(tensor[row])
        assert torch.equal(alone.scale, scale)
        assert torch.equal(alone(tensor[row]), whole)


def test_power_of_two_scales_are_exact() -> None:
    exponents = torch.arange(-60.0, 61.0)
    quantizer = Quantizer(QFormat("int8"), len(exponents))
    quantizer.set_scale(2.0 ** exponents.double())
    assert torch.equal(quantizer.scale.double(), 2.0 ** exponents.double())
    quantizer.log2_scale += 0.4 * torch.sin(exponents)
    assert torch.equal(quantizer.scale.double(), 2.0 ** exponents.double())


def test_free_scale_is_what_was_set() -> None:
    scale = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 3 + 1e-5
    quantizer = Quantizer(QFormat("int8"), 50, power_of_two=False)
    quantizer.set_scale(scale)
    torch.testing.assert_close(quantizer.scale, scale, rtol=2e-6, atol=0)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s != "float"])
@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("options", [{}, {"power_of_two": False}, {"power_of_two": False, "learned": True}])
def test_codes_times_scale_is_forward(spelling: str, channels: int, options: dict[str, bool]) -> None:
    quantizer = calibrated(spelling, channels, **options)
    for dtype in (torch.float32, torch.bfloat16):
        tensor = (normal(3, 4, 5) * 2).to(dtype)
        codes = quantizer.codes(tensor)
        assert codes.dtype == torch.int32
        assert (
            quantizer.number_format.qmin
            <= int(codes.min())
            < int(codes.max())
            <= quantizer.number_format.qmax
        )
        scale = quantizer.scale.detach().view(-1, 1, 1)
        assert torch.equal((codes * scale).to(dtype), quantizer(tensor).detach())


def test_float_has_no_codes() -> None:
    with pytest.raises(ValueError, match="'float' has no integer codes"):
        Quantizer(QFormat("float")).codes(normal(3))


def test_observed_tensor_passes_and_is_noted() -> None:
    quantizer, tensor = Quantizer(QFormat("int4")), normal(100)
    quantizer.observer = RangeObserver()
    assert quantizer(tensor) is tensor
    assert quantizer.observer.values().max() == tensor.max()
    quantizer.observer = None
    assert quantizer(tensor) is not tensor


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("signed", [True, False])
def test_half_precision_is_exact_for_formats_that_it_holds(
    dtype: torch.dtype, bits: int, signed: bool
) -> None:
    # The result is that of rounding in float64; computed in bf16 the ties would fall wrongly.
    for width in range(2, bits + 1):
        for fraction in (0, width // 2, width):
            f = QFormat(f"{'' if signed else 'U'}Q{width - fraction}.{fraction}")
            assert f.step is not None
            tensor = (normal(3000, seed=width) * f.step * 2**width).to(dtype)
            exact = fake_quantize(tensor.double(), torch.tensor(f.step), f.qmin, f.qmax)
            out = Quantizer(f)(tensor)
            assert out.dtype == dtype
            assert torch.equal(out.double(), exact)


def test_autocast_changes_nothing() -> None:
    for spelling in ("Q8.8", "int4", "Q0.4:literal"):
        quantizer, tensor = calibrated(spelling, 3), normal(3, 50)
        expected = quantizer(tensor)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = quantizer(tensor)
        assert out.dtype == torch.float32
        assert torch.equal(out, expected)


# Gradients


def test_learned_scale_is_a_parameter_with_the_buffers_key() -> None:
    learned, buffered = calibrated("int4", 3, learned=True), calibrated("int4", 3)
    assert [n for n, _ in learned.named_parameters()] == ["log2_scale"]
    assert not list(buffered.parameters())
    assert learned.state_dict().keys() == buffered.state_dict().keys()
    assert torch.equal(learned.log2_scale, buffered.log2_scale)


@pytest.mark.parametrize("spelling", ["Q0.4", "UQ6.0", "Q0.4:literal", "float"])
def test_static_formats_learn_nothing(spelling: str) -> None:
    assert not list(Quantizer(QFormat(spelling), learned=True).parameters())


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_gradient_of_the_logarithm_by_hand(channels: int, power_of_two: bool) -> None:
    # Everything saturates, where the result is qmax · 2^x, whose slope is qmax · 2^x · ln 2.
    quantizer = calibrated("int4", channels, power_of_two=power_of_two, learned=True)
    tensor = torch.full((3, 5), 1e4)
    quantizer(tensor).sum().backward()
    assert quantizer.log2_scale.grad is not None
    rows, sharing = max(channels, 1), 15 // max(channels, 1)
    gain = 1 / (sharing * 7) ** 0.5
    slope = 7 * sharing * quantizer.scale.detach() * torch.log(torch.tensor(2.0)) * gain
    torch.testing.assert_close(quantizer.log2_scale.grad, slope)
    assert quantizer.log2_scale.grad.numel() == rows


@pytest.mark.parametrize("power_of_two", [True, False])
def test_training_finds_a_scale(power_of_two: bool) -> None:
    tensor = normal(4, 400)
    quantizer = Quantizer(QFormat("int4"), 4, power_of_two=power_of_two, learned=True)
    quantizer.set_scale(torch.tensor([4.0, 0.01, 0.3, 1.0]))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)

    def error() -> Tensor:
        return (quantizer(tensor) - tensor).square().mean()

    for _ in range(120):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    best = calibrated("int4", power_of_two=power_of_two)
    best.calibrate(tensor, "mse")
    assert error().item() < 1.5 * (best(tensor) - tensor).square().mean().item()
    if power_of_two:
        assert torch.equal(quantizer.scale.log2(), quantizer.scale.log2().round())


def test_straight_through_gradient_reaches_the_tensor() -> None:
    for learned in (False, True):
        tensor = torch.tensor([-3.0, 0.1, 3.0], requires_grad=True)
        quantizer = Quantizer(QFormat("int2"), learned=learned)
        quantizer(tensor).sum().backward()
        assert tensor.grad is not None
        assert tensor.grad.tolist() == [0.0, 1.0, 0.0]


# Binary, ternary and power-of-two weights

low_bit = st.sampled_from(LOW_BIT)
tensors = st.integers(0, 2**16).map(lambda seed: normal(3, 4, 5, seed=seed)) | st.sampled_from(
    (
        torch.zeros(3, 2),
        torch.ones(3, 7),
        torch.tensor([[0.0, 0.0], [1e-6, -3.0], [0.5, 0.7]]),
        normal(3, 1) * 1e-9,
    )
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"power_of_two": False},
    {"learned": True},
    {"power_of_two": False, "learned": True},
]


@settings(max_examples=80)
@given(low_bit, tensors, st.sampled_from((0, 3)), st.sampled_from(OPTIONS), st.booleans())
def test_weights_are_rounded_to_codes_and_back_bit_for_bit(
    spelling: str, tensor: Tensor, channels: int, options: dict[str, Any], training: bool
) -> None:
    """Twice is once; values of codes are the rounded weight; no more values than levels; a row is its own."""
    f = QFormat(spelling)
    quantizer = Quantizer(f, channels, weight=True, **options)
    quantizer.calibrate(tensor)
    if training:  # its scale is that of another tensor then
        quantizer.train()(tensor * 1.7)
    quantizer.eval()
    rounded, codes = quantizer(tensor).detach(), quantizer.codes(tensor)
    assert codes.dtype == torch.int32
    assert f.qmin <= int(codes.min()) <= int(codes.max()) <= f.qmax
    assert torch.equal(quantizer.values(codes), rounded)
    assert torch.equal(quantizer(rounded).detach(), rounded)
    assert torch.equal(quantizer.codes(rounded), codes)
    for row in rounded if channels else [rounded]:
        assert row.unique().numel() <= f.levels
    if channels:
        changed = torch.cat([tensor[:1] * 3, tensor[1:]])
        assert torch.equal(quantizer(changed)[1:].detach(), rounded[1:])


@settings(max_examples=80)
@given(low_bit, st.data(), st.sampled_from((0, 3)), st.booleans())
def test_values_of_any_codes_have_these_codes(
    spelling: str, data: st.DataObject, channels: int, power_of_two: bool
) -> None:
    """What a packed file holds: also codes that no trained weight has."""
    f = QFormat(spelling)
    allowed = [c for c in range(f.qmin, f.qmax + 1) if c or spelling != "binary"]
    codes = torch.tensor(data.draw(st.lists(st.sampled_from(allowed), min_size=12, max_size=12))).view(3, 4)
    quantizer = calibrated(spelling, channels, power_of_two, weight=True).eval()
    values = quantizer.values(codes)
    assert torch.equal(quantizer.codes(values), codes.int())
    assert torch.equal(quantizer(values), values)


@settings(max_examples=60)
@given(st.sampled_from(("int4", "uint8", "Q0.4", "UQ6.0", *LOW_BIT)), tensors, st.booleans())
def test_values_are_what_forward_gives(spelling: str, tensor: Tensor, power_of_two: bool) -> None:
    quantizer = calibrated(spelling, 3, power_of_two, weight=True).eval()
    assert torch.equal(quantizer.values(quantizer.codes(tensor)), quantizer(tensor))


def test_values_of_powers_of_two_by_hand() -> None:
    quantizer = Quantizer(QFormat("pow2-4"), 2, weight=True)
    quantizer.set_scale(torch.tensor([1.0, 0.25]))
    codes = torch.arange(-4, 5).expand(2, -1)
    expected = [-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0]
    assert quantizer.values(codes).tolist() == [expected, [v / 4 for v in expected]]
    with pytest.raises(ValueError, match="'float' has no integer codes"):
        Quantizer(QFormat("float")).values(codes)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("spelling", LOW_BIT)
def test_weights_are_calibrated_by_the_papers_formula(spelling: str, method: Any) -> None:
    rows = normal(3, 50) * torch.tensor([0.01, 1.0, 30.0])[:, None]
    for power_of_two in (True, False):
        quantizer = Quantizer(QFormat(spelling), 3, power_of_two, weight=True)
        quantizer.calibrate(rows, method)
        torch.testing.assert_close(quantizer.scale, weight_scale(rows, QFormat(spelling), power_of_two))
        if power_of_two or spelling.startswith("pow2"):
            assert torch.equal(quantizer.scale.log2(), quantizer.scale.log2().round())
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            quantizer.calibrate(rows / 0, method)


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("spelling", ["binary", "ternary"])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_the_scale_follows_the_weight_in_training_only(
    spelling: str, channels: int, power_of_two: bool
) -> None:
    f = QFormat(spelling)
    quantizer = Quantizer(f, channels, power_of_two, weight=True)
    quantizer.calibrate(normal(3, 40))
    before, tensor = quantizer.scale.clone(), normal(3, 40, seed=5) * 10
    quantizer.eval()(tensor)
    with torch.no_grad():
        quantizer.train()(tensor)
    assert torch.equal(quantizer.scale, before), "it followed without training"
    trained = quantizer.train()(tensor)
    rows = tensor if channels else tensor.reshape(1, -1)
    expected = weight_scale(rows, f, power_of_two)
    torch.testing.assert_close(quantizer.scale, expected if channels else expected[0])
    assert not quantizer.log2_scale.requires_grad
    assert torch.equal(quantizer.eval()(tensor), trained), "evaluation is another weight"


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("spelling", ["binary", "ternary"])
def test_gradients_of_weights_are_the_papers(spelling: str, channels: int) -> None:
    tensor, upstream = (normal(3, 8) * 1.5).requires_grad_(), normal(3, 8, seed=1)
    quantizer = Quantizer(QFormat(spelling), channels, power_of_two=False, weight=True)
    quantizer(tensor).backward(upstream)
    alone = tensor.detach().clone().requires_grad_()
    rule = sign_weights if spelling == "binary" else ternary_weights
    rule(alone, quantizer.scale, 0 if channels else None).backward(upstream)
    assert tensor.grad is not None and alone.grad is not None
    assert torch.equal(tensor.grad, alone.grad)
    if spelling == "binary":  # and not that of a binary activation
        number = 8 if channels else 24
        scale = quantizer.scale.view(-1, 1) if channels else quantizer.scale
        torch.testing.assert_close(tensor.grad, upstream * (1 / number + scale * (tensor.abs() <= 1)))
    else:
        assert torch.equal(tensor.grad, upstream)


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("spelling", ["binary", "ternary"])
def test_learned_scale_of_a_weight(spelling: str, channels: int) -> None:
    tensor, upstream = normal(3, 8).requires_grad_(), normal(3, 8, seed=1)
    quantizer = Quantizer(QFormat(spelling), channels, power_of_two=False, learned=True, weight=True)
    quantizer.calibrate(tensor)
    start = quantizer.scale.detach().clone()
    quantizer(tensor).backward(upstream)
    assert torch.equal(quantizer.scale, start), "a learned scale followed the weight"
    codes = quantizer.codes(tensor).float()
    number = 8 if channels else 24
    slope = (upstream * codes).sum(1) if channels else (upstream * codes).sum()
    expected = slope * start * math.log(2) / number**0.5  # d 2^x / dx = 2^x · ln 2, times the gain
    assert quantizer.log2_scale.grad is not None and tensor.grad is not None
    torch.testing.assert_close(quantizer.log2_scale.grad, expected)
    scale = start.view(-1, 1) if channels else start
    inside = scale * (tensor.abs() <= 1) if spelling == "binary" else torch.ones(3, 8)
    torch.testing.assert_close(tensor.grad, upstream * inside)


def test_powers_of_two_have_a_scale_that_is_a_power_of_two_and_not_learned() -> None:
    quantizer = calibrated("pow2-3", 3, power_of_two=False, learned=True, weight=True)
    assert not list(quantizer.parameters())
    assert torch.equal(quantizer.scale.log2(), quantizer.scale.log2().round())
    before, tensor = quantizer.scale.clone(), (normal(3, 20) * 99).requires_grad_()
    quantizer.train()(tensor).backward(normal(3, 20, seed=1))
    assert torch.equal(quantizer.scale, before), "found by calibrate, not in every step"
    assert tensor.grad is not None and torch.equal(tensor.grad, normal(3, 20, seed=1))
    # … also where such a state is loaded into a quantizer that was built to learn.
    learner = Quantizer(QFormat("int8"), 3, power_of_two=False, learned=True, weight=True)
    learner.load_state_dict(quantizer.state_dict())
    learner(normal(3, 20).requires_grad_()).sum().backward()
    assert learner.log2_scale.grad is None
    assert torch.equal(learner.scale, before)


def test_frozen_weights_are_rounded_and_the_others_pass() -> None:
    quantizer = calibrated("pow2-3", 2, weight=True)
    tensor = normal(2, 6).requires_grad_()
    whole = quantizer.eval()(tensor).detach()
    quantizer.frozen = tensor.detach().abs() > 0.5
    upstream = normal(2, 6, seed=1)
    out = quantizer.train()(tensor)
    out.backward(upstream)
    assert torch.equal(out, torch.where(quantizer.frozen, whole, tensor))
    assert torch.equal(tensor.grad, torch.where(quantizer.frozen, 0.0, upstream))  # type: ignore[arg-type]
    assert torch.equal(quantizer.eval()(tensor), whole), "evaluation rounds everything"
    assert "frozen" not in quantizer.state_dict()


# Binary and ternary activations


def test_binary_activations_are_signs_times_the_calibrated_mean() -> None:
    tensor = normal(500) + 0.3
    quantizer = Quantizer(QFormat("binary"), power_of_two=False)
    quantizer.observer = RangeObserver()
    quantizer(tensor)
    found = quantizer.observer.scale(QFormat("binary"), "mse", False)
    torch.testing.assert_close(
        found, torch.cat([tensor, tensor.min()[None], tensor.max()[None]]).abs().mean()
    )
    quantizer.observer = None
    quantizer.set_scale(found)
    quantizer.train()
    leaf = tensor.clone().requires_grad_()
    out = quantizer(leaf)
    out.backward(torch.ones(500))
    assert torch.equal(out, sign_quantize(tensor, quantizer.scale))
    torch.testing.assert_close(leaf.grad, quantizer.scale * (tensor.abs() <= 1))
    assert torch.equal(quantizer.eval()(tensor), out.detach())
    torch.testing.assert_close(quantizer.scale, found)


def test_learned_scale_of_a_binary_activation() -> None:
    quantizer = Quantizer(QFormat("binary"), power_of_two=False, learned=True)
    quantizer.set_scale(torch.tensor(0.5))
    tensor = torch.tensor([-2.0, 0.5, 0.1, 0.0])
    quantizer(tensor).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert quantizer.log2_scale.grad is not None
    assert quantizer.log2_scale.grad.item() == pytest.approx((-1 + 2 + 3 + 4) * 0.5 * math.log(2) / 4**0.5)


@pytest.mark.parametrize("learned", [True, False])
def test_ternary_activations_anneal_then_round(learned: bool) -> None:
    quantizer = Quantizer(QFormat("ternary"), power_of_two=False, learned=learned).train()
    quantizer.set_scale(torch.tensor(0.5))
    tensor = torch.tensor([-3.0, -0.26, -0.24, 0.0, 0.24, 0.26, 3.0])
    hard = torch.tensor([-0.5, -0.5, 0.0, 0.0, 0.0, 0.5, 0.5])
    assert torch.equal(quantizer(tensor).detach(), hard)
    quantizer.beta = 2.0
    leaf = tensor.clone().requires_grad_()
    soft = quantizer(leaf)
    torch.testing.assert_close(soft, 0.5 * ternary_tanh(tensor / 0.5, 2.0))
    soft.sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    if learned:
        assert quantizer.log2_scale.grad is not None and bool(quantizer.log2_scale.grad.isfinite())
    assert torch.equal(quantizer.eval()(tensor).detach(), hard), "evaluation is always hard"
    assert "beta" not in quantizer.state_dict()


@pytest.mark.parametrize("spelling", ["uternary", "uint1"])
def test_unsigned_activations_are_those_of_every_integer_format(spelling: str) -> None:
    f, tensor = QFormat(spelling), normal(50)
    for learned, function in ((True, learned_fake_quantize), (False, fake_quantize)):
        quantizer = Quantizer(f, learned=learned)
        quantizer.set_scale(torch.tensor(0.5))
        quantizer.beta = 1.0
        assert torch.equal(quantizer(tensor), function(tensor, torch.tensor(0.5), 0, f.qmax))


def test_ternary_activations_are_calibrated_on_their_three_codes() -> None:
    values = normal(4000)
    f = QFormat("ternary")
    scale = find_scale(values[None], f, "mse", False)
    errors = [
        (Quantizer(f)(values / s) * s - values).square().mean() for s in (scale * r for r in (0.9, 1.0, 1.1))
    ]
    assert errors[1] < errors[0] and errors[1] < errors[2]
    # The threshold is at half the scale, where a weight's is at 0.7 of the mean magnitude.
    assert not torch.equal(Quantizer(f)(values / scale), ternary_codes(values))


def test_representation_tells_where_a_weights_scale_comes_from() -> None:
    assert str(calibrated("binary", 3, weight=True)) == "Quantizer(binary, the weight's own, per channel)"
    assert str(calibrated("ternary", weight=True, learned=True)) == "Quantizer(ternary, learned)"
    assert str(calibrated("pow2-4", weight=True)) == "Quantizer(pow2-4, calibrated)"
    assert str(Quantizer(QFormat("ternary"))) == "Quantizer(ternary, calibrated)"


# State


@settings(max_examples=60)
@given(
    st.sampled_from((*SPELLINGS, *LOW_BIT)),
    st.sampled_from((*SPELLINGS, *LOW_BIT)),
    st.booleans(),
    st.booleans(),
)
def test_state_of_any_weight_loads_strictly_into_any_other(
    trained: str, built: str, power_of_two: bool, learned: bool
) -> None:
    source = calibrated(trained, 3, power_of_two=power_of_two, weight=True).eval()
    target = Quantizer(QFormat(built), 3, power_of_two=not power_of_two, learned=learned, weight=True).eval()
    target.load_state_dict(source.state_dict(), strict=True)
    tensor = normal(3, 100, seed=2) * 3
    assert target.number_format == source.number_format
    assert torch.equal(target(tensor).detach(), source(tensor))


@settings(max_examples=40)
@given(spellings, spellings, st.booleans(), st.booleans(), st.sampled_from((0, 3)))
def test_state_of_any_format_loads_strictly_into_any_other(
    trained: str, built: str, power_of_two: bool, learned: bool, channels: int
) -> None:
    source = calibrated(trained, channels, power_of_two=power_of_two)
    target = Quantizer(QFormat(built), channels, power_of_two=not power_of_two, learned=learned)
    assert {k: v.shape for k, v in source.state_dict().items()} == {
        k: v.shape for k, v in target.state_dict().items()
    }
    target.load_state_dict(source.state_dict(), strict=True)
    tensor = normal(3, 100, seed=2) * 3
    assert target.number_format == source.number_format
    assert torch.equal(target(tensor).detach(), source(tensor))
    assert torch.equal(target.scale.detach(), source.scale)
    target(tensor.requires_grad_())
    again = Quantizer(QFormat("int8"), channels)
    again.load_state_dict(target.state_dict())
    assert again.number_format == source.number_format


def test_static_format_is_not_trained_in_a_quantizer_built_to_learn() -> None:
    quantizer = Quantizer(QFormat("int8"), learned=True)
    quantizer.load_state_dict(Quantizer(QFormat("Q0.4")).state_dict())
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=100.0, weight_decay=0.1)
    tensor = normal(50).requires_grad_()
    quantizer(tensor).square().sum().backward()
    optimizer.step()
    assert quantizer.scale.item() == 2**-4


def test_formats_change_with_every_load() -> None:
    network = nn.Sequential(calibrated("Q0.4"), calibrated("int8", 3))
    other = nn.Sequential(calibrated("UQ6.0"), calibrated("Q1.3", 3))
    states = [copy.deepcopy(network.state_dict()), other.state_dict()]
    tensor = normal(3, 20)
    expected = [network(tensor), other(tensor)]
    for _ in range(2):
        for state, out in zip(states, expected, strict=True):
            network.load_state_dict(state)
            assert torch.equal(network(tensor), out)


def test_state_survives_a_file() -> None:
    source = calibrated("int4", 3, power_of_two=False)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = Quantizer(QFormat("Q8.8"), 3)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(target(normal(3, 9)), source(normal(3, 9)))


def test_state_with_other_channels_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for log2_scale"):
        Quantizer(QFormat("int4")).load_state_dict(calibrated("int4", 3).state_dict())


def test_state_with_an_unknown_format_is_refused_by_name() -> None:
    network = nn.Sequential(Quantizer(QFormat("int4")))
    state = network.state_dict()
    state["0.format_code"] = torch.tensor([9, 9, 9, 9, 9], dtype=torch.int32)
    with pytest.raises(
        RuntimeError, match=r"0\.format_code: \[9, 9, 9, 9\] is not the code of a number format"
    ):
        network.load_state_dict(state)


def test_float_checkpoint_leaves_the_format() -> None:
    quantizer = Quantizer(QFormat("Q0.4"))
    quantizer.load_state_dict({}, strict=False)
    assert quantizer.number_format == QFormat("Q0.4")


@pytest.mark.parametrize("learned", [True, False])
def test_deepcopy_is_independent(learned: bool) -> None:
    quantizer = calibrated("int4", 3, power_of_two=False, learned=learned)
    tensor = normal(3, 50)
    before = quantizer(tensor).detach()
    copied = copy.deepcopy(quantizer)
    assert torch.equal(copied(tensor).detach(), before)
    copied.set_scale(torch.full((3,), 9.0))
    copied.load_state_dict(Quantizer(QFormat("Q0.4"), 3).state_dict())
    assert torch.equal(quantizer(tensor).detach(), before)
    assert quantizer.number_format == QFormat("int4")


def test_representation_tells_format_and_scale() -> None:
    assert str(Quantizer(QFormat("Q0.4"))) == "Quantizer(Q0.4, static)"
    assert str(calibrated("int4", 3)) == "Quantizer(int4, calibrated, per channel)"
    assert str(calibrated("int4", learned=True)) == "Quantizer(int4, learned)"


# torch.compile


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize(
    ("spelling", "weight"),
    [("Q0.4", False), ("int4", False), ("Q0.4:literal", False), ("binary", True), ("ternary", True), ("pow2-3", True),
     ("binary", False), ("ternary", False)],
)  # fmt: skip
def test_compiles_whole_with_equal_values_and_gradients(spelling: str, weight: bool, channels: int) -> None:
    torch._dynamo.reset()
    quantizer = calibrated(spelling, channels, learned=spelling == "int4", weight=weight)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    results = []
    for run in (quantizer, compiled):
        tensor = normal(3, 40, 2, seed=3).mul(2).requires_grad_()
        quantizer.zero_grad()
        out = run(tensor)
        out.square().sum().backward()
        slope = quantizer.log2_scale.grad.clone() if quantizer.learned else torch.zeros(())  # type: ignore[union-attr]
        results.append((out.detach(), tensor.grad, slope))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][0], results[1][0])


def test_compiled_module_follows_a_loaded_format() -> None:
    torch._dynamo.reset()
    quantizer, tensor = calibrated("int4"), normal(30)
    compiled = torch.compile(quantizer, backend="aot_eager")
    compiled(tensor)
    quantizer.load_state_dict(Quantizer(QFormat("Q0.2")).state_dict())
    assert torch.equal(compiled(tensor), Quantizer(QFormat("Q0.2"))(tensor))
