"""Rounding noise against rounding by hand: weights, inputs, halves of a split layer, and a paired batch norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import monai_unetq as uq
from monai_unetq.sensitivity.noise import Rounding, rounded_twin, rounding_noise
from tests.sensitivity.networks import Level, Linear, normed


def roundings(tensor: Tensor, bits: int) -> list[Tensor]:
    """The tensor rounded to signed codes of every power-of-two step."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [(tensor / s).round().clamp(low, high) * s for s in (2.0**e for e in range(-20, 8))]


def nearest(tensor: Tensor, bits: int) -> Tensor:
    """Of these the one with the least squared error."""
    return min(roundings(tensor, bits), key=lambda rounded: squared(rounded - tensor))


def squared(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_rounded_per_output_channel_and_halves_apart(bits: int) -> None:
    torch.manual_seed(0)
    network: Any = uq.split(Level(), torch.zeros(1, 1, 8, 8)).eval()
    noise, power = rounding_noise(network, [torch.randn(2, 1, 8, 8)], Rounding((bits,)))
    weight = network.enter.weight.detach()
    expected = sum(squared(nearest(row, bits) - row) for row in weight)
    assert noise["enter.weight"][bits] == pytest.approx(expected, rel=1e-5)
    assert power["enter.weight"] == pytest.approx(squared(weight))
    for part, half in zip(("skip", "up"), network.read.weight.detach().split(2, 1), strict=True):
        expected = sum(squared(nearest(row, bits) - row) for row in half)
        assert noise[f"read.weight[{part}]"][bits] == pytest.approx(expected, rel=1e-5)
    transposed = network.up.weight.detach().transpose(0, 1)
    expected = sum(squared(nearest(row, bits) - row) for row in transposed)
    assert noise["up.weight"][bits] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_inputs_are_rounded_and_counted_for_one_image(bits: int) -> None:
    torch.manual_seed(0)
    network: Any = uq.split(Level(), torch.zeros(1, 1, 8, 8)).eval()
    images = [torch.randn(2, 1, 8, 8), torch.randn(1, 1, 8, 8)]
    noise, power = rounding_noise(network, images, Rounding((bits,)))
    seen: dict[str, Any] = {"enter": torch.cat(images)}
    network.read.register_forward_pre_hook(lambda m, args: seen.update(read=args[0]))
    with torch.no_grad():
        network(seen["enter"])
    for name, tensor in (
        ("enter.input", seen["enter"]),
        ("read.input[skip]", seen["read"][:, :2]),
        ("read.input[up]", seen["read"][:, 2:]),
    ):
        errors = [squared(rounded - tensor) / 3 for rounded in roundings(tensor, bits)]
        assert min(abs(noise[name][bits] / error - 1) for error in errors) < 1e-4, name
        assert noise[name][bits] < 1.3 * min(errors), "far from the best step"  # found on a histogram
        assert power[name] == pytest.approx(squared(tensor) / 3, rel=1e-5)


def test_a_paired_batch_norm_rounds_the_folded_weight_and_noise_is_that_of_the_weight() -> None:
    torch.manual_seed(0)
    network: Any = normed(nn.BatchNorm2d(2))
    noise, _ = rounding_noise(network, [torch.randn(2, 1, 4, 4)], Rounding((4,)))
    norm: Any = network[1]
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    weight = network[0].weight.detach()
    expected = sum(squared(nearest(w * g, 4) / g - w) for w, g in zip(weight, gain, strict=True))
    assert noise["0.weight"][4] == pytest.approx(expected, rel=1e-4)


def test_free_scales_and_one_scale_for_all_channels() -> None:
    torch.manual_seed(0)
    network = Level().eval()
    images = [torch.randn(2, 1, 8, 8)]
    whole, _ = rounding_noise(network, images, Rounding((3,), granularity="tensor"))
    weight = network.enter.weight.detach()
    assert whole["enter.weight"][3] == pytest.approx(squared(nearest(weight, 3) - weight), rel=1e-5)
    free, _ = rounding_noise(network, images, Rounding((3,), scale="free"))
    bound, _ = rounding_noise(network, images, Rounding((3,)))
    assert free["enter.weight"][3] < bound["enter.weight"][3]


def test_inputs_by_name_and_layers_that_do_not_run() -> None:
    class WithHead(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

    network = WithHead().eval()
    twin = rounded_twin(network, 4, Rounding(), [torch.randn(2, 1, 4, 4)])
    assert type(twin.head) is nn.Linear
    noise, _ = rounding_noise(network, [torch.randn(2, 1, 4, 4)], Rounding((4,)))
    assert set(noise) == {"first.weight", "first.input", "second.weight", "second.input"}
    assert all(value[4] > 0 for value in noise.values())


@pytest.mark.parametrize("widths", [(), (1,), (4, 17)])
def test_widths_out_of_range(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected bit widths between 2 and 16"):
        Rounding(widths)
