"""Cost against a count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_unetq.allocation import Cost, cost_of
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import fold, quantize

IMAGE = torch.zeros(1, 1, 8, 8)


def tiny() -> nn.Module:
    """27 + 6 weights and 3 + 2 biases; inputs of 1 × 8 × 8 and 3 × 6 × 6 values."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))


def test_float() -> None:
    assert cost_of(tiny(), IMAGE) == Cost(weight_bytes=4 * 38, activation_bytes=4 * (64 + 108))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "free"},
        {"granularity": "tensor"},
        {"learned": True},
        {"learned": True, "granularity": "tensor"},
    ],
)
@pytest.mark.parametrize("weights", ["Q0.4", "int4"])
def test_four_bit_weights_and_six_bit_activations(weights: str, options: dict[str, object]) -> None:
    network = tiny()
    quantize(network, QuantPlan.uniform(network, weights, "Q6.0", **options), IMAGE)  # type: ignore[arg-type]
    bits = 33 * 4 + 5 * 32  # rounded up to whole bytes
    assert cost_of(network, IMAGE) == Cost(weight_bytes=-(-bits // 8), activation_bytes=(64 + 108) * 6 // 8)


def test_layers_that_stay_float() -> None:
    network = tiny()
    quantize(network, QuantPlan.uniform(network, "int4", "int6", last="float"), IMAGE)
    assert cost_of(network, IMAGE) == Cost((27 * 4 + (6 + 5) * 32) // 8 + 1, (64 * 6 + 108 * 32) // 8)
    network = tiny()
    quantize(network, QuantPlan.uniform(network, "float", "int8"), IMAGE)
    assert cost_of(network, IMAGE) == Cost(4 * 38, 64 + 108)


def test_the_literal_mode_takes_the_bits_it_needs() -> None:
    network = tiny()
    quantize(network, QuantPlan.uniform(network, "Q0.4:literal", "Q6.0"), IMAGE)
    assert cost_of(network, IMAGE).weight_bytes == -(-(33 * 6 + 5 * 32) // 8)  # 33 levels: 6 bits


@pytest.mark.parametrize(
    ("weights", "weight_bits"),
    [
        ("binary", 27 + 6),
        ("ternary", 8 * (6 + 2)),  # five in a byte, 27 in 6 bytes, 6 in 2
        ("pow2-3", 3 * 33),
        ("pow2-5", 5 * 33),
    ],
)
def test_low_bit_weights(weights: str, weight_bits: int) -> None:
    network = tiny()
    quantize(network, QuantPlan.uniform(network, weights, "int6"), IMAGE)
    assert cost_of(network, IMAGE) == Cost(-(-(weight_bits + 5 * 32) // 8), (64 + 108) * 6 // 8)


@pytest.mark.parametrize(("activations", "bits"), [("binary", 1), ("ternary", 2), ("uternary", 2)])
def test_low_bit_activations(activations: str, bits: int) -> None:
    """Ternary activations take 2 bits: they are not packed five in a byte."""
    network = tiny()
    quantize(network, QuantPlan.uniform(network, "ternary", activations), IMAGE)
    assert cost_of(network, IMAGE).activation_bytes == -(-(64 + 108) * bits // 8)


def test_batch_norms_count_until_they_are_folded() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    assert cost_of(network, IMAGE).weight_bytes == 4 * (36 + 8)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"), IMAGE)
    assert cost_of(network, IMAGE).weight_bytes == 36 // 2 + 4 * 8
    assert cost_of(fold(network), IMAGE).weight_bytes == 36 // 2 + 4 * 4  # a bias is what is left


def test_a_layer_that_runs_twice_has_one_weight_and_two_inputs() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1)
    network = nn.Sequential(conv, conv)
    assert cost_of(network, IMAGE) == Cost(4 * 10, 2 * 4 * 64)


def test_the_papers_ratios() -> None:
    """Weights of Q0.4 beside float32 biases and norms: a little under 8 times; activations of six bits: 32/6."""
    network, image = FixedPointUNet(1, 1, width=16).eval(), torch.zeros(1, 1, 32, 32)
    before = cost_of(network, image)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"), image)
    after = cost_of(fold(network), image)
    assert 7.8 < before.weight_bytes / after.weight_bytes < 8.0
    assert before.activation_bytes / after.activation_bytes == pytest.approx(32 / 6)
