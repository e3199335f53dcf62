"""``trace``: what it records, what it refuses, and what ``simplify`` makes of it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import monai_unetq as uq
from monai_unetq.deploy.simplify import is_quant, simplify
from monai_unetq.deploy.trace import DOMAIN, TracedLayer, trace
from monai_unetq.surgery import quantized_layers
from tests.deploy.networks import NETWORKS, paper_unet, quantized, traced


def operators(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


def test_codes_times_scale_are_the_rounded_weights() -> None:
    case = traced("paper")
    folded = uq.fold(copy.deepcopy(case.network), case.image)
    layers = quantized_layers(folded)
    assert case.trace.layers.keys() == layers.keys()
    for name, layer in case.trace.layers.items():
        whole, _ = layers[name].effective_parameters()
        found = [
            part.codes * part.scale.reshape(-1, *[1] * (part.codes.ndim - 1))
            for part in layer.weights.values()
        ]
        assert np.array_equal(layer.to_layout(np.concatenate(found, 1)), whole.detach().numpy())
    assert list(case.trace.layers["decoder.0.conv1"].weights) == ["skip", "up"]
    assert case.trace.plan == uq.plan_of(case.network)


def test_transposed_weights_go_back_to_their_layout() -> None:
    rows = np.arange(2 * 6 * 5).reshape(6, 2, 5)  # 2 groups of 3 output and 2 input channels
    found = TracedLayer("up", {}, True, 2).to_layout(rows)
    assert found.shape == (4, 3, 5)
    # group 1, its input channel 0 and output channel 2 is row 3 + 2
    assert np.array_equal(found[2, 2], rows[5, 0])


def test_the_network_is_left_as_it_was() -> None:
    network = quantized(NETWORKS["nnunet plain"].build, (1, 1, 32, 32), True)
    before, classes = copy.deepcopy(network.state_dict()), [type(m) for m in network.modules()]
    network.train()
    trace(network, torch.rand(1, 1, 32, 32), dynamic=False)
    assert network.training and [type(m) for m in network.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class _Positions(nn.Module):
    """A convolution of patches that are told their places, as vision transformers do: rows for 4 patches, any width."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 3, 4, stride=4)
        self.rows = nn.Parameter(torch.randn(1, 3, 4, 1))
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.head(self.patches(image) + self.rows)
        return out


@pytest.mark.parametrize(("build", "free"), [(_Positions, (0, 3)), (paper_unet, (0, 2, 3))])
def test_sizes_are_free_that_the_network_leaves_free(
    build: Callable[[], nn.Module], free: tuple[int, ...]
) -> None:
    image = torch.rand(1, 1, 16, 16)
    found = trace(quantized(build, tuple(image.shape), False), image)
    assert found.dynamic == free
    sizes = found.model.graph.input[0].type.tensor_type.shape.dim
    assert tuple(axis for axis, size in enumerate(sizes) if size.dim_param) == free


class _Rounded(nn.Module):
    """Twice a strided convolution, ⌈size / 2⌉, and what is pooled beside it, ⌊size / 2⌋, as in a residual encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, 3, 3, stride=2, padding=1) for n in (1, 3))
        self.beside = nn.ModuleList(nn.Conv2d(n, 3, 1) for n in (1, 3))
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        for conv, beside in zip(self.convs, self.beside, strict=True):
            image = conv(image) + beside(nn.functional.avg_pool2d(image, 2))
        out: Tensor = self.head(image)
        return out


def test_sizes_that_the_exporter_does_not_find_equal_are_multiples_of_what_is_halved() -> None:
    """It cannot solve ⌊⌊x / 2⌋ / 2⌋ = x / 4, which holds for multiples of 4."""
    image = torch.rand(1, 1, 16, 16)
    found = trace(quantized(_Rounded, tuple(image.shape), False), image)
    sizes = [size.dim_param for size in found.model.graph.input[0].type.tensor_type.shape.dim]
    assert found.dynamic == (0, 2, 3) and sizes[2:] == ["4*size2", "4*size3"]


def test_what_cannot_be_traced_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, image: Tensor) -> list[Tensor]:
            return [self.conv(image), image]

    image = torch.rand(1, 1, 16, 16)
    two = Two()
    uq.quantize(two, uq.QuantPlan.uniform(two, weights="int4", activations="int4"), image)
    uq.calibrate(two, [image])
    with pytest.raises(ValueError, match="more than one tensor: switch its deep supervision off"):
        trace(two, image)
    with pytest.raises(ValueError, match="not quantized"):
        trace(paper_unet(), image)
    supervised = quantized(paper_unet, (1, 1, 32, 32), False)
    uq.attach_supervision(supervised, torch.rand(1, 1, 32, 32), num_classes=2)
    with pytest.raises(ValueError, match="strip"):
        trace(supervised, torch.rand(1, 1, 32, 32))


def test_simplify_leaves_one_rounding_for_each_use() -> None:
    graph = ir.from_proto(traced("paper").trace.model).graph
    before = operators(graph)
    assert before["Split"] == 3 and before["Concat"] == 6 and before["Relu"] == 14
    simplify(graph)
    after = operators(graph)
    assert "Split" not in after and after["Concat"] == 3
    # Only what is resized or goes two ways keeps its ReLU.
    assert after["Relu"] <= 6
    for node in graph:
        if node.op_type == "Concat":
            assert all(is_quant(value.producer()) for value in node.inputs if value is not None)
        if node.op_type == "MaxPool" and len(node.inputs[0].uses()) == 1:  # type: ignore[union-attr]
            assert is_quant(node.inputs[0].producer())  # type: ignore[union-attr]
    assert {node.domain for node in graph} == {"", DOMAIN}
