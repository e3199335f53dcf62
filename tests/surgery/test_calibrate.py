"""Calibration: what batches may be, what is refused, and what comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_unetq.quantizers import weight_scale
from monai_unetq.surgery import calibrate, dequantize
from monai_unetq.surgery.calibrate import image_of
from monai_unetq.surgery.quantize import quantized_layers
from tests.surgery.learned import IMAGES, quantized, run, same, state, unet


@pytest.mark.parametrize(
    ("formats", "factor"),
    [
        ({"weights": "Q0.4", "activations": "Q6.0", "input": "UQ0.8", "first": "int8", "last": "int8"}, 0.5),
        ({"weights": "int4", "activations": "int6"}, 0.5),
        ({"weights": "int8", "activations": "int8", "scale": "free"}, 0.01),
        ({"weights": "int8", "activations": "int8", "granularity": "tensor", "learned": True}, 0.1),
        ({"weights": "Q0.4", "activations": "int8", "first": "int8", "last": "int8"}, 0.5),
    ],
)
def test_the_float_function_stays_and_the_error_shrinks(formats: dict[str, Any], factor: float) -> None:
    expected = run(unet())
    network = quantized(**formats)
    before = (run(network) - expected).square().mean()
    assert calibrate(network, IMAGES) is network
    after = (run(network) - expected).square().mean()
    assert after < factor * before
    restored = run(dequantize(copy.deepcopy(network)))
    assert (restored - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_more_bits_are_nearer() -> None:
    expected = run(unet())
    errors = []
    for bits in (4, 6, 8):
        network = calibrate(quantized(weights=f"int{bits}", activations=f"int{bits}"), IMAGES)
        errors.append(float((run(network) - expected).square().mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_minmax_covers_what_was_seen() -> None:
    network = quantized(weights="int8", activations="int8", scale="free")
    calibrate(network, IMAGES, method="minmax")
    first = quantized_layers(network)["encoder.0.conv1"]
    largest = float(IMAGES.max())  # the image is seen signed: its largest value stands on code 127
    assert float(first.input_quantizer.scale) * 127 == pytest.approx(largest, rel=1e-5)
    weight = first.folded_weight().flatten(1)
    needed = torch.where(weight >= 0, weight / 127, weight / -128).amax(dim=1)
    torch.testing.assert_close(first.weight_quantizer.scale, needed.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize(
    ("weights", "activations"), [("binary", "binary"), ("ternary", "int4"), ("pow2-3", "Q6.0")]
)
def test_low_bit_scales_are_the_formulas_whatever_the_method(
    weights: str, activations: str, method: Any
) -> None:
    network = calibrate(
        quantized(weights=weights, activations=activations, input="UQ0.8", scale="free"), IMAGES, method
    )
    for layer in quantized_layers(network).values():
        rows = layer.folded_weight().flatten(1)
        expected = weight_scale(rows, layer.weight_quantizer.number_format, power_of_two=False)
        torch.testing.assert_close(layer.weight_quantizer.scale, expected, rtol=1e-5, atol=0)


def test_binary_activations_are_calibrated_to_the_mean_magnitude() -> None:
    network = quantized(weights="int8", activations="binary", scale="free")
    calibrate(network, IMAGES)
    first = quantized_layers(network)["encoder.0.conv1"]
    assert str(first.input_quantizer.number_format) == "binary"  # to quantize, the image may be negative
    assert float(first.input_quantizer.scale) == pytest.approx(float(IMAGES.abs().mean()), rel=1e-2)
    inner = quantized_layers(network)["encoder.0.conv2"]
    assert str(inner.input_quantizer.number_format) == "uint1"


def test_the_method_holds_for_weights_beside_static_activations() -> None:
    """Static activations rescale the network, after which weight scales are found again: by the same method."""
    network = calibrate(
        quantized(weights="int4", activations="Q6.0", input="UQ0.8", scale="free"), IMAGES, "minmax"
    )
    for layer in quantized_layers(network).values():
        weight = layer.folded_weight().flatten(1)
        needed = torch.where(weight >= 0, weight / 7, weight / -8).amax(dim=1)
        torch.testing.assert_close(layer.weight_quantizer.scale, needed.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda image: image,
        lambda image: (image, torch.zeros(1)),
        lambda image: [image],
        lambda image: {"image": image, "label": None},
        lambda image: MetaTensor(image),
        lambda image: {"image": MetaTensor(image)},
    ],
)
def test_kinds_of_batches(wrap: Any) -> None:
    formats = {"weights": "int4", "activations": "int6"}
    expected = calibrate(quantized(**formats), IMAGES)
    found = calibrate(quantized(**formats), (wrap(image) for image in IMAGES))
    assert same(state(found), state(expected))
    assert type(image_of(wrap(IMAGES[0]))) is Tensor


@pytest.mark.parametrize(
    "batch", [{"label": torch.zeros(1)}, [], "image.png", None, [{"image": torch.zeros(1)}]]
)
def test_other_batches_are_refused(batch: Any) -> None:
    with pytest.raises(
        ValueError, match=r"a batch is a tensor, a sequence .* or a dictionary with 'image'; found"
    ):
        image_of(batch)


FORMATS = [
    {"weights": "Q0.4", "activations": "Q6.0", "input": "UQ0.8"},
    {"weights": "int4", "activations": "int6"},
]


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_data_is_refused_and_nothing_changes(formats: dict[str, Any], bad: float) -> None:
    network = quantized(**formats)
    before = state(network)
    images = IMAGES.clone()
    images[1, 0, 0, 3, 3] = bad
    with pytest.raises(ValueError, match="batch 1 holds NaN or infinity"):
        calibrate(network, images)
    assert same(state(network), before)
    assert all(layer.input_quantizer.observer is None for layer in quantized_layers(network).values())


@pytest.mark.parametrize("formats", FORMATS)
def test_other_bad_input_is_refused_and_nothing_changes(formats: dict[str, Any]) -> None:
    network = quantized(**formats)
    before = state(network)
    with pytest.raises(ValueError, match="no batch was given"):
        calibrate(network, [])
    with pytest.raises(ValueError, match="method 'best' is unknown"):
        calibrate(network, IMAGES, method="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not divisible"):
        calibrate(network, [IMAGES[0], torch.zeros(1, 1, 9, 9)])
    assert same(state(network), before)
    assert all(layer.input_quantizer.observer is None for layer in quantized_layers(network).values())
    with pytest.raises(ValueError, match="FixedPointUNet is not quantized: call quantize"):
        calibrate(unet(), IMAGES)


def test_calibration_keeps_every_modules_mode() -> None:
    network = quantized(weights="int4", activations="int6").train()
    network.get_submodule("encoder").eval()
    modes = {name: module.training for name, module in network.named_modules()}
    statistics = network.get_buffer("decoder.0.norm1.running_mean").clone()
    calibrate(network, IMAGES)
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert torch.equal(network.get_buffer("decoder.0.norm1.running_mean"), statistics)


def test_calibration_is_deterministic() -> None:
    a, b = (calibrate(quantized(weights="int4", activations="int6"), IMAGES) for _ in range(2))
    assert same(state(a), state(b))
