"""``Quantizer`` as a module: its state, its gradients, and the ways torch runs a module."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from monai_unetq.formats import QFormat
from monai_unetq.quantizers import Quantizer, RangeObserver, fake_quantize, literal_fake_quantize

SPELLINGS = ("Q0.4", "UQ6.0", "Q8.8", "Q0.4:literal", "int4", "uint8", "int2", "float")
spellings = st.sampled_from(SPELLINGS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(
    spelling: str, channels: int = 0, power_of_two: bool = True, learned: bool = False
) -> Quantizer:
    quantizer = Quantizer(QFormat(spelling), channels, power_of_two, learned)
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


@pytest.mark.parametrize("spelling", ["ternary", "binary"])
def test_formats_without_a_quantizer(spelling: str) -> None:
    with pytest.raises(ValueError, match=f"'{spelling}' can be stored but has no quantizer yet; use int2"):
        Quantizer(QFormat(spelling))


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


# State


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
@pytest.mark.parametrize("spelling", ["Q0.4", "int4", "Q0.4:literal"])
def test_compiles_whole_with_equal_values_and_gradients(spelling: str, channels: int) -> None:
    torch._dynamo.reset()
    quantizer = calibrated(spelling, channels, learned=spelling == "int4")
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
