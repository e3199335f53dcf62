"""Rescaling: the float function stays, the rounding error shrinks, and gains are shared where tensors meet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_unetq.networks import FixedPointUNet
from monai_unetq.parts import WHOLE
from monai_unetq.plan import QuantPlan
from monai_unetq.quantizers import RangeObserver
from monai_unetq.surgery import dequantize, observe, quantize
from monai_unetq.surgery.quantize import quantized_layers
from monai_unetq.surgery.rescale import rescale

IMAGE = torch.nn.functional.avg_pool2d(
    torch.rand(4, 1, 20, 20, generator=torch.Generator().manual_seed(0)), 5, 1
)
IMAGE = (IMAGE - IMAGE.min()) / (IMAGE.max() - IMAGE.min())  # smooth, in [0, 1]


@cache
def _trained_unet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    network = FixedPointUNet(1, 1, width=4, **options)
    optimizer, label = torch.optim.Adam(network.parameters(), 1e-2), (IMAGE.mean() < IMAGE).float()
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(network(IMAGE), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def unet(**options: Any) -> nn.Module:
    """A small network that has learned to threshold the image."""
    return copy.deepcopy(_trained_unet(**options))


def with_statistics(network: nn.Module, gain: float = 1.0) -> nn.Module:
    """Batch norms as after training, their results ``gain`` times as large."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = (module.num_features,)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(0.1 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.05 + 0.2 * torch.rand(shape, generator=generator))
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(gain * (0.8 + 0.4 * torch.rand(shape, generator=generator)))
                    module.weight[::4] *= -1
                    if module.bias is not None:
                        module.bias.copy_(gain * 0.3 * torch.randn(shape, generator=generator))
    return network.eval()


@torch.no_grad()
def run(network: nn.Module) -> Tensor:
    out: Tensor = network(IMAGE)
    return out


@torch.no_grad()
def run_float(network: nn.Module) -> Tensor:
    """What the network computes without any rounding."""
    return run(dequantize(copy.deepcopy(network)).eval())


def rescaled(network: nn.Module) -> dict[str, int]:
    """``rescale`` with the inputs that the image makes, as ``calibrate`` calls it."""
    layers = quantized_layers(network)
    observers = {name: RangeObserver() for name in layers}
    for name, layer in layers.items():
        layer.input_quantizer.observer = observers[name]
    run(network)
    for layer in layers.values():
        layer.input_quantizer.observer = None
    return rescale(
        network, observe(network, IMAGE), {name: {WHOLE: o.values()} for name, o in observers.items()}
    )


def assert_same_function(after: Tensor, before: Tensor) -> None:
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


ENDS: dict[str, Any] = {"first": "int8", "last": "int8", "input": "UQ0.8"}


@pytest.mark.parametrize(
    "formats",
    [
        {"weights": "Q0.4", "activations": "Q6.0", **ENDS},
        {"weights": "Q0.6", "activations": "Q6.0", **ENDS},
        {"weights": "int4", "activations": "Q6.0", "scale": "free", **ENDS},
        {"weights": "int8", "activations": "UQ0.6", **ENDS},
    ],
)
@pytest.mark.parametrize("upsample", ["linear", "transposed"])
def test_the_function_stays_and_the_error_shrinks(formats: dict[str, Any], upsample: str) -> None:
    network = unet(upsample=upsample)
    expected = run(network)
    quantize(network, QuantPlan.uniform(network, **formats), IMAGE)
    error_before = (run(network) - expected).square().mean()
    assert rescaled(network)
    assert_same_function(run_float(network), expected)
    error_after = (run(network) - expected).square().mean()
    assert error_after < 0.7 * error_before


def test_gains_are_powers_of_two_on_gamma_and_beta() -> None:
    network = unet()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", **ENDS), IMAGE)
    gains = rescaled(network)
    assert gains
    assert all(isinstance(exponent, int) for exponent in gains.values())
    for name in quantized_layers(network):
        if name == "last":
            continue
        factor = 2.0 ** gains.get(name, 0)
        norm = name.replace("conv", "norm")
        for key in (f"{norm}.weight", f"{norm}.bias"):
            assert torch.equal(network.get_parameter(key), before[key] * factor)
        assert torch.equal(network.get_parameter(f"{name}.weight"), before[f"{name}.weight"])
    # The last layer has no batch norm: its weight takes the factor out.
    assert "last" not in gains
    factor = 2.0 ** gains["decoder.2.conv2"]
    assert torch.equal(network.get_parameter("last.weight"), before["last.weight"] / factor)
    assert torch.equal(network.get_parameter("last.bias"), before["last.bias"])


def test_a_layer_without_batch_norm_gains_through_weight_and_bias() -> None:
    network = unet(upsample="transposed")
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", **ENDS), IMAGE)
    gains = rescaled(network)
    assert any(gains.get(f"upsample.{level}", 0) for level in range(3))
    for level, source in enumerate(("encoder.3.conv2", "decoder.0.conv2", "decoder.1.conv2")):
        own, read = 2.0 ** gains.get(f"upsample.{level}", 0), 2.0 ** gains.get(source, 0)
        for key, factor in ((f"upsample.{level}.weight", own / read), (f"upsample.{level}.bias", own)):
            assert torch.equal(network.get_parameter(key), before[key] * factor)


@pytest.mark.parametrize("upsample", ["linear", "transposed"])
def test_tensors_that_meet_in_a_concatenation_share_a_gain(upsample: str) -> None:
    network = unet(upsample=upsample)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", **ENDS), IMAGE)
    gains = rescaled(network)
    skips = ["encoder.0.conv2", "encoder.1.conv2", "encoder.2.conv2"]
    ups = ["decoder.1.conv2", "decoder.0.conv2", "encoder.3.conv2"]
    if upsample == "transposed":
        ups = ["upsample.2", "upsample.1", "upsample.0"]
    assert [gains.get(name, 0) for name in skips] == [gains.get(name, 0) for name in ups] != [0, 0, 0]


def test_tanh_gets_no_gain() -> None:
    network = unet(activation="tanh")
    before = copy.deepcopy(network.state_dict())
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", **ENDS), IMAGE)
    assert rescaled(network) == {}
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


class Joined(nn.Module):
    """Two convolutions with batch norm and ReLU, something between them, and a last convolution."""

    def __init__(self, between: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm_a = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, **options)
        self.b, self.norm_b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **options)
        self.last = nn.Conv2d(4, 1, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm_b(self.b(self.between(self.norm_a(self.a(x))))).relu())


@pytest.mark.parametrize(
    "between",
    [
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.1),
        nn.Identity(),
        lambda x: nn.functional.avg_pool2d(x.relu(), 2),
        lambda x: nn.functional.pad(x.relu(), (1, 1)),
        lambda x: torch.cat([x[:, :2], x[:, 2:]], dim=1).relu(),
        lambda x: x.relu_() + x,
    ],
)
def test_homogeneous_operations_pass_a_gain_on(between: Callable[[Tensor], Tensor]) -> None:
    network = with_statistics(Joined(between), gain=1 / 16)
    expected = run(network)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8"), IMAGE)
    assert "a" in rescaled(network)
    assert_same_function(run_float(network), expected)


@pytest.mark.parametrize(
    "between",
    [
        nn.Tanh(),
        nn.Sigmoid(),
        nn.ReLU6(),
        nn.GELU(),
        nn.InstanceNorm2d(4),
        lambda x: x.relu() + 0.5,
        lambda x: x.relu().add_(0.5),
        lambda x: nn.functional.pad(x.relu(), (1, 1), value=1.0),
        lambda x: x.relu() * x,
        lambda x: torch.cat([x[:, :2].relu(), torch.ones_like(x[:, 2:])], dim=1),
    ],
)
def test_other_operations_keep_the_gain_at_one(between: Callable[[Tensor], Tensor]) -> None:
    network = with_statistics(Joined(between), gain=1 / 16)
    expected = run(network)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8"), IMAGE)
    assert "a" not in rescaled(network)
    assert_same_function(run_float(network), expected)


def test_what_leaves_the_network_keeps_its_scale() -> None:
    torch.manual_seed(0)
    network = with_statistics(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()))
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"), IMAGE)
    assert rescaled(network) == {}


def test_a_gain_below_one_with_small_variances() -> None:
    """σ² + ε cannot fall below ε: the factor that does not fit there must not be lost."""
    network = with_statistics(Joined(nn.ReLU()), gain=200.0)
    network.get_buffer("norm_b.running_var").copy_(torch.tensor([1e-4, 1e-6, 0.0, 30.0]))
    network.get_buffer("norm_b.running_mean").zero_()
    expected = run(network)
    quantize(network, QuantPlan.uniform(network, "int8", "UQ0.8"), IMAGE)
    gains = rescaled(network)
    assert gains["a"] < -3
    assert_same_function(run_float(network), expected)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}])
def test_batch_norms_without_gamma_or_beta(options: dict[str, bool]) -> None:
    network = with_statistics(Joined(nn.ReLU(), **options), gain=1 / 16)
    expected = run(network)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8"), IMAGE)
    gains = rescaled(network)
    assert ("a" in gains) == ("affine" not in options)
    assert_same_function(run_float(network), expected)


def test_a_calibrated_input_scale_follows_the_gain() -> None:
    """In a plan of mixed formats a layer with a calibrated input may read what a static one made larger."""
    network = with_statistics(Joined(nn.ReLU()), gain=1 / 16)
    plan = QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8")
    mixed = QuantPlan.uniform(network, "Q0.4", "int8")
    quantize(network, plan.with_layers({"b": mixed["b"]}), IMAGE)
    layer = quantized_layers(network)["b"]
    layer.input_quantizer.set_scale(torch.tensor(2.0**-6))
    gains = rescaled(network)
    assert gains["a"] != 0
    assert layer.input_quantizer.scale.item() == 2.0 ** (gains["a"] - 6)


def test_twice_is_once() -> None:
    network = unet()
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", **ENDS), IMAGE)
    assert rescaled(network)
    assert rescaled(network) == {}
