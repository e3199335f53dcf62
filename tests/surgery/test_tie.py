"""``tie``: the grids of a split convolution's parts, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import monai_unetq as uq
from monai_unetq.deploy.qdq import meet
from monai_unetq.deploy.trace import TracedLayer, TracedWeight
from monai_unetq.formats import QFormat
from monai_unetq.surgery import quantized_layers
from tests.deploy.networks import paper_unet, quantized


def layer_of(scales: list[list[float]], codes: list[list[int]]) -> TracedLayer:
    """Two output channels, one input channel for each part."""
    weights = {
        part: TracedWeight(
            np.array(c, np.int32).reshape(2, 1), np.array(s, np.float32), QFormat("int4")
        )
        for part, s, c in zip(("skip", "up"), scales, codes, strict=True)
    }  # fmt: skip
    return TracedLayer("layer", weights, False, 1)


def test_codes_are_shifted_to_the_finer_grid() -> None:
    # channel 0: 2·0.5 = 1 and 0.25·0.5 = 0.125: the skip's code times 8; channel 1: 1 and 2·0.25 = 0.5
    codes, scale = meet(layer_of([[0.5, 0.5], [0.5, 2.0]], [[3, -7], [5, 6]]), [2.0, 0.25]) or ((), ())
    assert np.array_equal(codes, [[24, 5], [-14, 6]]) and np.array_equal(scale, [0.125, 0.5])


def test_a_part_without_weights_does_not_set_the_grid() -> None:
    found = meet(layer_of([[0.5, 0.5], [2.0**-20, 0.5]], [[3, 1], [0, 1]]), [1.0, 1.0])
    assert found is not None and found[1].tolist() == [0.5, 0.5] and found[0].tolist() == [[3, 0], [1, 1]]


@pytest.mark.parametrize("scales", [[[0.5, 0.5], [0.3, 0.5]], [[8.0, 0.5], [0.125, 0.5]]])
def test_scales_that_cannot_meet(scales: list[list[float]]) -> None:
    assert meet(layer_of(scales, [[7, 7], [7, 7]]), [1.0, 1.0]) is None


def test_after_calibration_eight_bit_parts_meet_on_one_grid() -> None:
    network = quantized(paper_unet, (1, 1, 32, 32), True, "int8", "int8", "int8")
    for layer in (layer for layer in quantized_layers(network).values() if layer.parts):
        skip, up = (
            layer.input_quantizers[p].scale * layer.weight_quantizers[p].scale for p in ("skip", "up")
        )
        assert torch.equal(skip, up)


def test_four_bits_have_room_for_four_shifts() -> None:
    network = quantized(paper_unet, (1, 1, 32, 32), True)
    layer = quantized_layers(network)["decoder.0.conv1"]
    inputs, weights = layer.input_quantizers, layer.weight_quantizers
    for part, step in (("skip", 1.0), ("up", 1.0)):
        inputs[part].set_scale(torch.tensor(step))
    before = {"skip": 1.0, "up": 2.0**-5}
    for part, step in before.items():
        weights[part].set_scale(torch.full_like(weights[part].scale, step))
    uq.tie(network)
    assert set(weights["skip"].scale.tolist()) == {1.0}
    assert set(weights["up"].scale.tolist()) == {2.0**-4}


def test_free_scales_meet_where_they_are_tied() -> None:
    network = quantized(paper_unet, (1, 1, 32, 32), True, scale="free")
    uq.tie(network)
    for layer in (layer for layer in quantized_layers(network).values() if layer.parts):
        skip, up = (
            layer.input_quantizers[p].scale * layer.weight_quantizers[p].scale for p in ("skip", "up")
        )
        shift = torch.log2(skip / up)
        assert torch.allclose(shift, shift.round(), atol=1e-4) and shift.abs().max() <= 4.01
