"""Convolution and batch norm as a pair: evaluation is what folding leaves, training is batch norm as ever."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_unetq.formats import QFormat
from monai_unetq.layers import PAIRED_NORMS, PairedNorm, quantize_layer
from monai_unetq.surgery import fold

NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LAYERS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 2}),
    (nn.Conv3d, {"kernel_size": 2, "bias": False}),
    (nn.ConvTranspose1d, {"kernel_size": 2, "bias": False}),
    (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2}),
    (nn.ConvTranspose2d, {"kernel_size": 3, "groups": 2}),
    (nn.ConvTranspose3d, {"kernel_size": 2, "stride": 2, "groups": 4}),
]
IDS = [f"{c.__name__}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for c, options in LAYERS]
SCALES: list[tuple[str, dict[str, Any]]] = [
    ("Q1.6", {}),
    ("Q0.4", {}),
    ("int8", {}),
    ("int4", {"per_channel": False}),
    ("int8", {"power_of_two": False}),
    ("int4", {"power_of_two": False, "learned": True}),
    ("int4", {"power_of_two": False, "per_channel": False}),
    ("pow2-3", {}),
    ("pow2-5", {"per_channel": False}),
]
UNIFORM = [s for s in SCALES if not s[0].startswith("pow2")]
LOW_BIT: list[tuple[str, dict[str, Any]]] = [
    (weight, {"power_of_two": power_of_two, "per_channel": per_channel, "learned": learned})
    for weight in ("binary", "ternary")
    for power_of_two in (True, False)
    for per_channel in (True, False)
    for learned in (True, False)
]
LOW_BIT_IDS = [f"{weight}-{'-'.join(name for name, on in o.items() if on)}" for weight, o in LOW_BIT]
SCALE_IDS = [f"{weight}-{'-'.join(o)}" for weight, o in SCALES]
FREE = [s for s in SCALES if "power_of_two" in s[1] and "per_channel" not in s[1]]
"""Those that take γ/√(σ²+ε) into the scale."""


def float_pair(cls: type[nn.Module], options: dict[str, Any], seed: int = 0) -> tuple[Any, Tensor]:
    """A trained-looking pair with eight channels, one gamma zero and three negative, in evaluation; an input."""
    torch.manual_seed(seed)
    dimensions = int(cls.__name__[-2])
    norm: Any = NORMS[dimensions](8)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -0.7, 0.0, 1.5, -0.1, 0.02, 1.0, -2.0]))
        norm.bias.copy_(torch.linspace(-1, 1, 8))
        norm.running_mean.copy_(torch.randn(8) / 2)
        norm.running_var.copy_(torch.rand(8) + 0.05)
    return nn.Sequential(cls(4, 8, **options), norm).eval(), torch.randn(
        3, 4, *[(9,), (8, 9), (4, 5, 6)][dimensions - 1]
    )


def pair(network: Any, weight: str, image: str = "Q3.5", **options: Any) -> Any:
    """Quantize and pair in place, as ``surgery.quantize`` does."""
    layer: Any = network[0]
    quantize_layer(layer, QFormat(weight), QFormat(image), **options)
    network[1].__class__ = PAIRED_NORMS[type(network[1])]
    layer.pair_with(network[1])
    layer.weight_quantizer.calibrate(layer.folded_weight())
    return network


def by_output_channel(layer: Any, vector: Tensor) -> Tensor:
    """The vector in a shape that broadcasts over the weight's output channels; weight order of the layer."""
    shape = [1] * layer.weight.dim()
    if "Transpose" not in type(layer).__name__:
        shape[0] = -1
        return vector.view(shape)
    inputs = layer.weight.shape[0] // layer.groups
    rows = vector.view(layer.groups, 1, -1).expand(-1, inputs, -1).flatten(0, 1)
    return rows.reshape(*layer.weight.shape[:2], *shape[2:])


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).detach().abs().max().item()


def folded(network: Any) -> tuple[Tensor, Tensor]:
    """w·γ/√(σ²+ε) and β + (b - μ)·γ/√(σ²+ε) in float64."""
    layer, norm = network
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = 0 if layer.bias is None else layer.bias.double()
    return (
        (layer.weight.double() * by_output_channel(layer, gain)).detach(),
        (norm.bias.double() + (bias - norm.running_mean.double()) * gain).detach(),
    )


# The table


def test_every_batch_norm_has_a_paired_class_that_is_also_its_own() -> None:
    assert set(PAIRED_NORMS) == {*NORMS.values(), nn.SyncBatchNorm}
    for plain, paired in PAIRED_NORMS.items():
        assert issubclass(paired, plain)
        assert issubclass(paired, PairedNorm)


def test_state_keeps_its_keys() -> None:
    network, _ = float_pair(nn.Conv2d, {"kernel_size": 3})
    norm, keys = network[1], list(network[1].state_dict())
    pair(network, "Q0.4")
    assert network[1] is norm
    assert isinstance(norm, nn.BatchNorm2d)
    assert list(norm.state_dict()) == keys
    assert not any("norm" in key for key in network[0].state_dict()), "registered a second time"
    assert len(list(network.modules())) == 5  # container, layer, two quantizers, norm


def test_sync_batch_norm_passes_its_input_on_in_evaluation() -> None:
    norm: Any = nn.SyncBatchNorm(3)
    norm.__class__ = PAIRED_NORMS[nn.SyncBatchNorm]
    image = torch.randn(2, 3, 4, 4)
    assert norm.eval()(image) is image
    assert torch.equal(norm.gain(), (1 + torch.tensor(norm.eps)).rsqrt().expand(3))


# Evaluation


@pytest.mark.parametrize(("cls", "options"), LAYERS, ids=IDS)
@pytest.mark.parametrize(("weight", "scale"), UNIFORM, ids=SCALE_IDS[: len(UNIFORM)])
def test_weight_quantizer_sees_the_folded_weight(
    cls: type[nn.Module], options: dict[str, Any], weight: str, scale: dict[str, Any]
) -> None:
    network, _ = float_pair(cls, options)
    exact_weight, exact_bias = folded(network)
    layer = pair(network, weight, **scale)[0]
    rounded, bias = (p.detach().double() for p in layer.effective_parameters())
    step = layer.weight_quantizer.scale.detach().double().expand(8)
    if (weight, scale) in FREE:
        norm = network[1]
        step = step * (norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()).abs().double()
    column = by_output_channel(layer, step)
    codes = torch.where(column > 0, rounded / column.clamp(min=1e-12), 0)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    f = layer.weight_quantizer.number_format
    expected = (exact_weight / column.clamp(min=1e-12)).clamp(f.qmin, f.qmax)
    assert float((codes - expected).abs().max()) < 0.5 + 1e-3
    accumulator = step / 2**5
    assert bool(((bias - exact_bias).abs() <= accumulator / 2 + 1e-6).all())


@pytest.mark.parametrize(("cls", "options"), LAYERS, ids=IDS)
@pytest.mark.parametrize(("weight", "powers", "per_channel"), [("pow2-3", 2, True), ("pow2-5", 8, False)])
def test_powers_of_two_are_those_nearest_to_the_folded_weight(
    cls: type[nn.Module], options: dict[str, Any], weight: str, powers: int, per_channel: bool
) -> None:
    network, _ = float_pair(cls, options)
    exact, _ = folded(network)
    layer = pair(network, weight, per_channel=per_channel)[0]
    rounded = layer.effective_parameters()[0].detach().double()
    step = by_output_channel(layer, layer.weight_quantizer.scale.double().expand(8))
    small = exact.abs() < step / 2
    assert bool((rounded[small] == 0).all())
    top = (exact.abs() >= 1.5 * 2.0 ** (powers - 1) * step) & ~small
    assert not top.any(), "the scale is that of the largest weight"
    ratio = (rounded / exact)[~small & (exact.abs() >= 0.75 * step)]
    assert bool(((ratio > 2 / 3) & (ratio <= 4 / 3)).all())


@pytest.mark.parametrize(("cls", "options"), LAYERS, ids=IDS)
@pytest.mark.parametrize(("weight", "scale"), [*SCALES, *LOW_BIT], ids=[*SCALE_IDS, *LOW_BIT_IDS])
def test_evaluation_is_what_fold_leaves(
    cls: type[nn.Module], options: dict[str, Any], weight: str, scale: dict[str, Any]
) -> None:
    network, image = float_pair(cls, options)
    pair(network, weight, **scale)
    layer: Any = network[0]
    expected, weights = network(image), layer.effective_parameters()[0].detach()
    fold(network, image)
    assert layer.paired_norm is None
    assert not isinstance(network[1], nn.modules.batchnorm._BatchNorm)
    assert torch.equal(layer.effective_parameters()[0], weights), "folding changed a quantized weight"
    assert distance(network(image), expected) <= 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_fold_with_free_scales_moves_no_bias_to_another_step(seed: int) -> None:
    # γ/σ in the scale is rounded anew when it is stored; bias codes of 2^15 steps notice that.
    torch.manual_seed(seed)
    network: Any = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64)).eval()
    with torch.no_grad():
        network[1].weight.uniform_(-2, 2)
        network[1].bias.normal_()
        network[1].running_mean.normal_()
        network[1].running_var.uniform_(0.1, 2)
    image = torch.randn(1, 8, 12, 12)
    pair(network, "int8", "int8", power_of_two=False)
    network[0].input_quantizer.set_scale(torch.tensor(3.7 / 127))
    expected = network(image)
    assert distance(fold(network, image)(image), expected) <= 1e-5


@pytest.mark.parametrize(("cls", "options"), LAYERS, ids=IDS)
def test_float_formats_compute_the_float_pair(cls: type[nn.Module], options: dict[str, Any]) -> None:
    network, image = float_pair(cls, options)
    expected = network(image)
    pair(network, "float", "float")
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "scale"),
    # One scale for all channels cannot hold the gain of one, which binary and ternary codes do not know.
    [*SCALES, *(s for s in LOW_BIT if s[1]["per_channel"])],
)
def test_channel_with_gamma_zero_is_its_beta(weight: str, scale: dict[str, Any]) -> None:
    # Its folded weight is zero, which must neither lose the bias nor make anything NaN.
    network, image = float_pair(nn.Conv2d, {"kernel_size": 3})
    beta = network[1].bias[2].item()
    pair(network, weight, **scale)
    for _ in range(2):
        out = network(image)
        assert bool(out.isfinite().all())
        step = 2.0**-5 * network[0].weight_quantizer.scale.max().item()
        assert distance(out[:, 2], torch.tensor(beta)) <= step
        fold(network, image)


@pytest.mark.parametrize(("weight", "scale"), [("int8", {}), ("int8", {"power_of_two": False}), ("Q3.9", {})])
def test_negative_gamma_follows_the_float_pair(weight: str, scale: dict[str, Any]) -> None:
    for cls, options in LAYERS:
        network, image = float_pair(cls, options)
        exact = network(image)
        out = pair(network, weight, **scale)(image)
        error = (out - exact).abs().flatten(2).amax(dim=(0, 2))
        assert bool((error <= 0.05 * exact.abs().flatten(2).amax(dim=(0, 2)) + 0.02).all()), (cls, error)


def test_without_affine_parameters() -> None:
    torch.manual_seed(0)
    network: Any = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False)).eval()
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2)
    image = torch.randn(2, 2, 6, 6)
    expected = network(image)
    torch.testing.assert_close(
        pair(copy.deepcopy(network), "float", "float")(image), expected, rtol=1e-4, atol=1e-5
    )
    quantized = pair(network, "int8")
    torch.testing.assert_close(quantized(image), expected, rtol=0, atol=0.1)


def test_deepcopy_pairs_with_the_copied_norm() -> None:
    network, image = float_pair(nn.Conv2d, {"kernel_size": 3})
    pair(network, "Q1.6")
    copied: Any = copy.deepcopy(network)
    assert copied[0].paired_norm is copied[1]
    expected = network(image)
    with torch.no_grad():
        copied[1].weight.fill_(3.0)
    assert torch.equal(network(image), expected)
    assert not torch.equal(copied(image), expected)


# Training


@pytest.mark.parametrize(("cls", "options"), LAYERS, ids=IDS)
def test_float_formats_train_as_the_float_pair(cls: type[nn.Module], options: dict[str, Any]) -> None:
    plain, image = float_pair(cls, options)
    with torch.no_grad():
        plain[1].weight[2] = 0.3
    quantized = pair(copy.deepcopy(plain), "float", "float")
    for network in (plain, quantized):
        network.train()
        out = network(image)
        out.square().mul(torch.linspace(0.1, 1, out.numel()).view(out.shape)).sum().backward()
    torch.testing.assert_close(quantized(image), plain(image), rtol=1e-4, atol=1e-4)
    for (name, ours), (_, theirs) in zip(quantized[1].named_buffers(), plain[1].named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=f"{name} differs")
    for name, parameter in plain.named_parameters():
        ours = quantized.get_parameter(name).grad
        assert parameter.grad is not None
        if name == "0.bias":  # batch norm subtracts it again: both are rounding noise around 0
            continue
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(("weight", "scale"), [*SCALES, *LOW_BIT], ids=[*SCALE_IDS, *LOW_BIT_IDS])
def test_training_normalizes_with_the_batch_and_follows_its_statistics(
    weight: str, scale: dict[str, Any]
) -> None:
    network, image = float_pair(nn.Conv2d, {"kernel_size": 3})
    pair(network, weight, **scale).train()
    layer: Any = network[0]
    norm: Any = network[1]
    before = norm.running_mean.clone(), norm.running_var.clone()
    inner = layer(image).transpose(0, 1).flatten(1).detach()
    out = network(image).transpose(0, 1).flatten(1).detach()
    alive = inner.var(dim=1) > 1e-3  # weights of a channel may all round to zero
    alive[2] = False
    torch.testing.assert_close(out.mean(dim=1), norm.bias.detach(), rtol=0, atol=1e-4)
    spread = norm.weight.detach().abs()
    torch.testing.assert_close(out.std(dim=1)[alive], spread[alive], rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(norm.running_mean, 0.9 * before[0] + 0.1 * inner.mean(dim=1))
    torch.testing.assert_close(norm.running_var, 0.9 * before[1] + 0.1 * inner.var(dim=1))
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize(("weight", "scale"), SCALES, ids=SCALE_IDS)
def test_training_and_evaluation_run_the_same_codes(weight: str, scale: dict[str, Any]) -> None:
    network, _ = float_pair(nn.ConvTranspose2d, {"kernel_size": 3, "groups": 2})
    pair(network, weight, **scale)
    layer: Any = network[0]
    norm: Any = network[1]
    evaluated = layer.effective_parameters()[0].detach()
    norm.train()
    trained = layer.effective_parameters()[0].detach() * by_output_channel(layer, norm.gain().detach())
    torch.testing.assert_close(trained, evaluated, rtol=1e-4, atol=1e-7)


def test_statistics_of_training_make_evaluation_the_same() -> None:
    # With the statistics of this very batch, training and evaluation differ by rounding only.
    torch.manual_seed(0)
    network, _ = float_pair(nn.Conv2d, {"kernel_size": 3})
    image = torch.randn(8, 4, 24, 24)
    pair(network, "Q6.12", "Q3.12").train()
    network[1].momentum = 1.0
    trained = network(image)
    torch.testing.assert_close(network.eval()(image), trained, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize(("weight", "scale"), [*SCALES, *LOW_BIT], ids=[*SCALE_IDS, *LOW_BIT_IDS])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_weight_gamma_and_beta(weight: str, scale: dict[str, Any], frozen: bool) -> None:
    network, image = float_pair(nn.Conv2d, {"kernel_size": 3})
    with torch.no_grad():
        network[0].weight.mul_(0.2)  # inside every format's range
    pair(network, weight, **scale)
    norm: Any = network[1]
    norm.frozen = frozen
    network.train()
    out = network(image)
    out.square().mul(torch.linspace(0.1, 1, out.numel()).view(out.shape)).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    for name in ("0.weight", "1.weight", "1.bias"):
        gradient = gradients[name]
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        nonzero = gradient.flatten(1).abs().amax(dim=1) if gradient.dim() > 1 else gradient.abs()
        if not (name == "0.weight" or (name == "1.weight" and weight in ("Q0.4", "int4"))):
            assert bool((nonzero[[0, 1, 3, 6, 7]] > 0).all()), name
        assert float(nonzero.max()) > 0, name


def test_gradients_of_a_fine_grid_are_those_of_the_float_pair() -> None:
    for frozen in (False, True):
        plain, image = float_pair(nn.ConvTranspose2d, {"kernel_size": 3, "groups": 2})
        with torch.no_grad():
            plain[1].weight[2] = 0.3
        quantized = pair(copy.deepcopy(plain), "Q6.14", "Q6.14", rounds_bias=False)
        quantized[1].frozen = frozen
        quantized.train()
        plain.train()
        plain[1].train(not frozen)
        for network in (plain, quantized):
            out = network(image)
            out.square().mul(torch.linspace(0.1, 1, out.numel()).view(out.shape)).sum().backward()
        for name in ("0.weight", "1.weight", "1.bias"):
            theirs, ours = plain.get_parameter(name).grad, quantized.get_parameter(name).grad
            assert theirs is not None
            assert ours is not None
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01 * float(theirs.abs().max()))


def test_vanishing_gamma_trains_without_nan() -> None:
    network, image = float_pair(nn.Conv2d, {"kernel_size": 3})
    for gamma in (0.0, 1e-30, -1e-13, 1e-11):
        for weight, scale in (*SCALES, *LOW_BIT):
            trained = pair(copy.deepcopy(network), weight, **scale).train()
            with torch.no_grad():
                trained[1].weight.fill_(gamma)
            out = trained(image)
            out.square().sum().backward()
            assert bool(out.isfinite().all()), (gamma, weight, scale)
            assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained.parameters())


# Binary and ternary weights


def tiny_pair(weight: str, **options: Any) -> Any:
    """Two channels with the weights (0.5, -1.5) and (3, 1), γ/σ = -3 and 0.4, μ = (1, -2), β = (0.25, 0.5)."""
    network: Any = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[0.5, -1.5], [3.0, 1.0]]).view(2, 2, 1, 1))
        network[1].weight.copy_(torch.tensor([-6.0, 0.2]))
        network[1].running_var.copy_(torch.tensor([4.0, 0.25]))
        network[1].running_mean.copy_(torch.tensor([1.0, -2.0]))
        network[1].bias.copy_(torch.tensor([0.25, 0.5]))
    return pair(network, weight, "float", **options)


@pytest.mark.parametrize(
    ("weight", "options", "expected", "bias"),
    [
        # Mean magnitudes 1 and 2; the gains -3 and 0.4 go into the scale.
        ("binary", {"power_of_two": False}, [[-3.0, 3.0], [0.8, 0.8]], [0.25 + 3, 0.5 + 0.8]),
        # Powers of two: 1 and 2; |gain| → 4 (log2 3 = 1.58) and 0.5 (log2 0.4 = -1.3).
        ("binary", {}, [[-4.0, 4.0], [1.0, 1.0]], [0.25 + 4, 0.5 + 1.0]),
        # One scale: mean magnitude 1.5, mean gain 1.7.
        ("binary", {"power_of_two": False, "per_channel": False}, [[-2.55, 2.55], [2.55, 2.55]], [1.95, 3.9]),
        # … as powers of two: 2 (log2 1.5 = 0.58) and 2 (log2 1.7 = 0.77).
        ("binary", {"per_channel": False}, [[-4.0, 4.0], [4.0, 4.0]], [2.25, 4.5]),
        # Thresholds 0.7 and 1.4: only 1.5 and 3 are left.
        ("ternary", {"power_of_two": False}, [[0.0, 4.5], [1.2, 0.0]], [3.25, 1.3]),
        ("ternary", {}, [[0.0, 8.0], [2.0, 0.0]], [4.25, 1.5]),
        # Threshold 0.7 · 1.5 = 1.05, scale 2.25.
        ("ternary", {"power_of_two": False, "per_channel": False}, [[0.0, 3.825], [3.825, 0.0]], [1.95, 3.9]),
    ],
)
def test_folded_low_bit_weights_by_hand(
    weight: str, options: dict[str, Any], expected: list[list[float]], bias: list[float]
) -> None:
    found = tiny_pair(weight, **options)[0].effective_parameters()
    torch.testing.assert_close(found[0].flatten(1).detach(), torch.tensor(expected))
    torch.testing.assert_close(found[1].detach(), torch.tensor(bias))


@pytest.mark.parametrize(("weight", "scale"), LOW_BIT, ids=LOW_BIT_IDS)
def test_running_statistics_settle(weight: str, scale: dict[str, Any]) -> None:
    """Training with the scale's quotient by the gain would drive them away: σ feeds back into the gain."""
    network, _ = float_pair(nn.Conv2d, {"kernel_size": 3})
    image = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pair(network, weight, "float", **scale).train()
    variances = []
    for _ in range(3):
        for _ in range(100):
            trained = network(image)
        variances.append(network[1].running_var.clone())
    torch.testing.assert_close(variances[1], variances[2], rtol=1e-4, atol=0)
    evaluated = network.eval()(image)
    gain = network[1].weight.detach().abs() > 0
    ratio = (evaluated.std(dim=(0, 2, 3)) / trained.std(dim=(0, 2, 3)))[gain].detach()
    if scale["per_channel"]:  # then evaluation is training, up to a gain that is rounded to a power of two
        apart = 2**0.5 if scale["power_of_two"] else 1.0
        assert bool(((ratio > 0.99 / apart) & (ratio < 1.01 * apart)).all())
    torch.testing.assert_close(evaluated.mean(dim=(0, 2, 3)), trained.mean(dim=(0, 2, 3)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("weight", ["binary", "ternary"])
def test_gamma_of_a_frozen_norm_moves_the_scale(weight: str, power_of_two: bool) -> None:
    """γ gets the gradient of a gain on the convolution's result and its mean, rounded straight through."""
    network, image = float_pair(nn.Conv2d, {"kernel_size": 3})
    with torch.no_grad():
        network[1].weight[2] = 0.3
    pair(network, weight, "float", power_of_two=power_of_two)
    layer, norm = network
    norm.frozen = True
    network.train()
    upstream = torch.randn(3, 8, 6, 7, generator=torch.Generator().manual_seed(1))
    network(image).backward(upstream)
    with torch.no_grad():
        gain = norm.gain()
        rounded = 2.0 ** gain.abs().log2().round() * gain.sign() if power_of_two else gain
        codes = layer.weight_quantizer(layer.folded_weight()) * gain.sign().view(-1, 1, 1, 1)
        # In the logarithm the rounded gain moves as the gain does: its derivative by γ is rounded / γ.
        centered = nn.functional.conv2d(image, codes, layer.bias) - norm.running_mean.view(-1, 1, 1)
        expected = (upstream * centered).sum(dim=(0, 2, 3)) * rounded / norm.weight
    shift_only = (
        upstream.sum(dim=(0, 2, 3)) * (layer.bias - norm.running_mean) * rounded / norm.weight
    ).detach()
    through_shift = norm.weight.grad
    assert through_shift is not None
    assert float((through_shift - shift_only).abs().max()) > 1.0, "the convolution's share is missing"
    torch.testing.assert_close(through_shift, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("weight", "scale"), LOW_BIT, ids=LOW_BIT_IDS)
def test_quantizers_that_are_off_leave_the_float_pair(weight: str, scale: dict[str, Any]) -> None:
    network, image = float_pair(nn.ConvTranspose2d, {"kernel_size": 3, "groups": 2})
    expected = network(image)
    pair(network, weight, **scale)
    network[0].weight_quantizer.enabled = network[0].input_quantizer.enabled = False
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)


# Freezing


def test_frozen_norm_stays_in_evaluation() -> None:
    network, image = float_pair(nn.Conv2d, {"kernel_size": 3})
    pair(network, "Q1.6")
    norm: Any = network[1]
    expected, state = network(image), {k: v.clone() for k, v in norm.state_dict().items()}
    norm.frozen = True
    network.train()
    assert network.training
    assert network[0].training
    assert not norm.training
    assert torch.equal(network(image), expected)
    assert all(torch.equal(v, state[k]) for k, v in norm.state_dict().items())
    norm.frozen = False
    network.train()
    assert norm.training
    network(image)
    assert not torch.equal(norm.running_mean, state["running_mean"])
    network.eval()
    assert not norm.training


def test_pair_can_be_ended() -> None:
    network, image = float_pair(nn.Conv2d, {"kernel_size": 3})
    pair(network, "Q1.6")
    layer: Any = network[0]
    assert layer.paired_norm is network[1]
    layer.pair_with(None)
    assert layer.paired_norm is None
    alone = quantize_layer(float_pair(nn.Conv2d, {"kernel_size": 3})[0][0], QFormat("Q1.6"), QFormat("Q3.5"))
    assert torch.equal(layer(image), alone(image))
