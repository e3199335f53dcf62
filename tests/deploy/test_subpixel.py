"""A transposed convolution is a convolution and a pixel shuffle: the same sums, and in OpenVINO the same bits in INT8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import monai_unetq as uq
from monai_unetq.deploy.openvino import read
from monai_unetq.deploy.qdq import to_qdq
from monai_unetq.deploy.subpixel import Phases
from monai_unetq.deploy.trace import trace
from monai_unetq.runtime.engine import load
from monai_unetq.runtime.executions import executions


def test_phases_by_hand() -> None:
    # Kernel = stride: output 2j + r reads x[j] with tap r.
    halves = Phases.of(2, 2, 0, 0, 0)
    assert (
        halves is not None and halves.taps.tolist() == [[0], [1]] and (halves.before, halves.after) == (0, 0)
    )
    # MONAI UNet's, 3 taps and padding 1: output 2j is x[j]·w[1], output 2j + 1 is x[j]·w[2] + x[j + 1]·w[0].
    thirds = Phases.of(3, 2, 1, 1, 1)
    assert thirds is not None and thirds.taps.tolist() == [[1, 3], [2, 0]]
    assert (thirds.before, thirds.after) == (0, 1)
    assert Phases.of(3, 2, 1, 1, 0) is None  # 2n − 1 outputs


@given(st.data())
def test_phases_sum_as_the_transposed_convolution_does(data: Any) -> None:
    stride = data.draw(st.integers(1, 4), "stride")
    kernel = data.draw(st.integers(1, 7), "kernel")
    padding = data.draw(st.integers(0, kernel - 1), "padding")
    more = data.draw(st.integers(0, stride - 1), "output padding")
    size = data.draw(st.integers(2, 5), "size")
    image = torch.randint(-9, 10, (1, 1, size)).double()
    weight = torch.randint(-9, 10, (1, 1, kernel)).double()
    assume((size - 1) * stride - 2 * padding + kernel + more >= 1)
    expected = F.conv_transpose1d(image, weight, stride=stride, padding=padding, output_padding=more)
    phases = Phases.of(kernel, stride, padding, padding, more)
    assume(phases is not None)
    assert phases is not None
    taps = np.append(weight.numpy().ravel(), 0)[phases.taps]
    padded = np.pad(image.numpy().ravel(), (phases.before, phases.after))
    found = np.stack([np.correlate(padded, row) for row in taps], 1).ravel()
    assert np.array_equal(found, expected.numpy().ravel())


def on_openvino(network: nn.Module, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Logits of OpenVINO and of fake quantization (7-bit weights: exact with and without VNNI), and what ran in INT8."""
    openvino = pytest.importorskip("openvino")
    plan = uq.QuantPlan.uniform(network, weights="int7", activations="int8", input="int8", last="int7")
    uq.quantize(network, plan, image)
    uq.calibrate(network, [image])
    model = read(to_qdq(trace(network, image, dynamic=False), target="openvino", shuffled=True).model)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        return np.array(compiled(image.numpy())[0]), network(image).numpy(), executions(compiled)


@pytest.mark.parametrize(
    ("dimensions", "kernel", "stride", "padding", "more"),
    [
        (2, 2, 2, 0, 0),
        (3, 2, 2, 0, 0),
        (2, 3, 2, 1, 1),
        (3, 3, 2, 1, 1),
        (2, 4, 2, 1, 0),
        (2, 4, 4, 0, 0),
        (2, 5, 3, 1, 0),
        (2, (1, 4), (1, 4), 0, 0),
        (3, (1, 2, 2), (1, 2, 2), 0, 0),
        (3, (1, 1, 2), (1, 1, 2), 0, 0),
        (3, (3, 3, 3), (1, 2, 2), 1, (0, 1, 1)),
    ],
)
def test_as_a_convolution_in_openvino(
    dimensions: int, kernel: Any, stride: Any, padding: int, more: Any
) -> None:
    torch.manual_seed(0)
    conv, transposed = ((nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))[dimensions - 2]
    network = nn.Sequential(
        conv(1, 6, 3, padding=1), transposed(6, 5, kernel, stride, padding, more), nn.ReLU(), conv(5, 2, 1)
    )
    found, expected, ran = on_openvino(network, torch.randn(1, 1, *[7, 6, 5][:dimensions]))
    assert np.array_equal(found, expected)
    assert [one.kind for one in ran] == ["Convolution"] * 3 and all(one.is_int8 for one in ran)


def test_thick_slices_of_another_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose3d(6, 5, (1, 2, 2), (1, 2, 2))
    network, image = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), up), torch.randn(1, 1, 3, 4, 5)
    uq.quantize(network, uq.QuantPlan.uniform(network, "int7", "int8", input="int8", last="int7"), image)
    uq.calibrate(network, [image])
    uq.export(network, image, "openvino", tmp_path / "ir", profile="avx2")
    other = torch.randn(2, 1, 4, 7, 3)
    with torch.no_grad():
        assert np.array_equal(load(tmp_path / "ir")(other.numpy()), network(other).numpy())


def test_a_large_one_that_openvino_would_run_in_float_runs_in_integers() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 256, 1), nn.ConvTranspose2d(256, 4, 2, 2))
    found, expected, ran = on_openvino(network, torch.randn(1, 1, 48, 48))
    assert np.array_equal(found, expected) and all(one.is_int8 for one in ran)


def test_what_cannot_be_shuffled_stays_and_a_float_kernel_is_told() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ConvTranspose2d(8, 2, (2, 4), (2, 4)))
    found, expected, ran = on_openvino(network, torch.randn(1, 1, 9, 8))
    assert np.allclose(found, expected, atol=1e-5)
    assert {one.kind: one.is_int8 for one in ran} == {"Convolution": True, "Deconvolution": False}


class _Twice(nn.Module):
    """One transposed convolution, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(1, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.up(torch.relu(self.up(torch.relu(self.first(image)))))
        return found


def test_a_layer_that_is_used_twice_stays() -> None:
    torch.manual_seed(0)
    found, expected, ran = on_openvino(_Twice(), torch.randn(1, 1, 6, 6))
    assert np.array_equal(found, expected)
    assert [one.kind for one in ran] == ["Convolution", "Deconvolution", "Deconvolution"]
