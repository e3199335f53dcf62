"""Cost against a count by hand, torch's, qonnx's and the packed file's."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from monai_unetq.allocation import Cost, NetworkCost, cost_of, layer_costs
from monai_unetq.allocation.cost import mac_energy
from monai_unetq.deploy import inspect_packed, pack
from monai_unetq.formats import QFormat
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import LayerPlan, QuantPlan
from monai_unetq.surgery import fold, plan_of, quantize, split
from monai_unetq.surgery.workload import workload
from tests.surgery.networks import NETWORKS

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


class Joined(nn.Module):
    """Two levels; ``read`` can be split into 4 channels of skip and 6 from below."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.below = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.read = nn.Conv2d(10, 2, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skip = torch.relu(self.enter(image))
        low = torch.relu(self.below(nn.functional.max_pool2d(skip, 2)))
        up = nn.functional.interpolate(low, scale_factor=2.0)
        out: torch.Tensor = self.read(torch.cat([skip, up], 1))
        return out


def test_a_split_layer_by_hand() -> None:
    network = split(Joined().eval(), IMAGE)
    found = workload(network, IMAGE)
    skip, up = LayerPlan.whole(QFormat("int4"), QFormat("uint6")), QFormat("ternary")
    plan = QuantPlan(
        {
            "enter": skip,
            "read": LayerPlan(
                {"skip": QFormat("int4"), "up": up}, {"skip": QFormat("uint3"), "up": QFormat("uint2")}
            ),
        }
    )
    cost = layer_costs(found.units, plan, found.other_parameters)
    assert [layer.name for layer in cost.layers] == ["enter", "below", "read[skip]", "read[up]"]
    assert [layer.parameters for layer in cost.layers] == [36, 216, 72, 108]
    assert [layer.macs for layer in cost.layers] == [36 * 64, 216 * 16, 72 * 64, 108 * 64]
    assert [layer.weight_bits for layer in cost.layers] == [144, 32 * 216, 288, 8 * 22]
    assert [layer.weight_bytes for layer in cost.layers] == [18, 864, 36, 22]
    assert [layer.activation_bits for layer in cost.layers] == [6 * 64, 32 * 64, 3 * 256, 2 * 384]
    assert [layer.bops for layer in cost.layers] == [24 * 2304, 1024 * 3456, 12 * 4608, 4 * 6912]
    # Outputs at the width that the next layer reads: 32 bits after enter, 3 (the wider part) after below, then float.
    held = [6 * 64 + 32 * 256, 32 * 64 + 3 * 96, *[3 * 256 + 2 * 384 + 32 * 128] * 2]
    assert [layer.held_bytes for layer in cost.layers] == [-(-bits // 8) for bits in held]
    assert cost.peak_bytes == held[0] // 8
    assert (cost.parameters, cost.other_parameters) == (432 + 12, 12)
    assert (cost.weight_bytes, cost.size_bytes) == (940, 940 + 48)
    assert cost.activation_bytes == (384 + 2048 + 768 + 768) // 8
    assert cost.macs == 36 * 64 + 216 * 16 + 180 * 64
    assert cost.bops == sum(layer.bops for layer in cost.layers)
    assert cost.energy == pytest.approx(sum(layer.energy for layer in cost.layers))
    assert NetworkCost.from_json(json.loads(json.dumps(cost.to_json()))) == cost


def test_widths_by_unit_are_formats() -> None:
    found = workload(split(Joined().eval(), IMAGE), IMAGE)
    plan = QuantPlan({"below": LayerPlan.whole(QFormat("int3"), QFormat("int5"))})
    assert layer_costs(found.units, {"below": (3, 5)}, 0) == layer_costs(found.units, plan, 0)
    assert layer_costs(found.units, {"below": (32, 32)}, 0) == layer_costs(found.units, {}, 0)


def test_energy_of_the_tables_own_widths() -> None:
    """Horowitz 2014: int8 multiply 0.2 pJ and int32 add 0.1, its accumulator; float32 3.7 and 0.9."""
    float32, int8, int16 = QFormat("float"), QFormat("int8"), QFormat("int16")
    assert mac_energy(int8, int8) == 300_000
    assert mac_energy(float32, float32) == mac_energy(int8, float32) == mac_energy(float32, int8) == 4_600_000
    # Through (64, 0.2) and (1024, 3.1) at 256, half of the way in log: √(0.2 · 3.1); 48 bits are 16 beyond 32.
    assert mac_energy(int16, int16) == round(1e6 * (math.sqrt(0.62) + 0.03 + 40 * 0.07 / 24))
    assert mac_energy(QFormat("int4"), QFormat("uint8")) == mac_energy(QFormat("int8"), QFormat("int4"))


def test_energy_grows_with_every_bit_and_stays_below_float() -> None:
    widths = [QFormat(f"uint{bits}") for bits in range(1, 17)]
    for fixed in widths:
        energies = [mac_energy(width, fixed) for width in widths]
        assert energies == sorted(set(energies))
    assert mac_energy(widths[-1], widths[-1]) < mac_energy(QFormat("float"), QFormat("float"))


# One network convolves with a function beside its layers, which no plan has a format for.
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"own, functional"}))
def test_macs_are_half_of_what_torch_counts_as_operations(name: str) -> None:
    case = NETWORKS[name]
    network = case.build().eval()
    split(network, case.image())
    units = workload(network, case.image()).units
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(case.image())
    # Attention multiplies activations with each other; only what has weights is counted here.
    products = {"mm", "addmm", "convolution", "_convolution"}
    counted = counter.get_flop_counts()["Global"]
    flops = sum(n for operation, n in counted.items() if operation.__name__.split(".")[0] in products)
    assert 2 * layer_costs(units, {}, 0).macs == flops


@pytest.mark.parametrize(("weights", "ending"), [("int4", "int3"), ("ternary", "binary"), ("pow2-3", "Q0.5")])
def test_sizes_are_those_of_the_packed_file(weights: str, ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = split(Joined().eval(), IMAGE)
    read = LayerPlan(
        {"skip": QFormat(weights), "up": QFormat(ending)}, {"skip": QFormat("uint4"), "up": QFormat("uint4")}
    )
    plan = QuantPlan({"below": LayerPlan.whole(QFormat(ending), QFormat("uint4")), "read": read})
    found = workload(network, IMAGE)
    cost = layer_costs(found.units, plan, found.other_parameters)
    quantize(network, plan, IMAGE)
    held = inspect_packed(pack(network, tmp_path / "model.unetq"))
    packed = {layer["name"].replace(".weight", ""): layer["bytes"] for layer in held["layers"]}
    assert packed == {layer.name: layer.weight_bytes for layer in cost.layers if layer.weight != "float"}
    assert cost == layer_costs(workload(network, IMAGE).units, plan_of(network), found.other_parameters)


def test_bops_are_those_of_qonnx(tmp_path: Path) -> None:
    """A network of convolutions, exported by Brevitas, counted by qonnx."""
    pytest.importorskip("onnxoptimizer", reason="Brevitas exports with it")
    brevitas = pytest.importorskip("brevitas.nn")
    export = pytest.importorskip("brevitas.export").export_qonnx
    inference_cost = pytest.importorskip("qonnx.util.inference_cost").inference_cost
    widths, channels, layers = [(4, 8), (3, 6), (6, 5)], [1, 4, 6, 2], []
    for (weight, input), here, there in zip(widths, channels[:-1], channels[1:], strict=True):
        conv = brevitas.QuantConv2d(here, there, 3, padding=1, bias=False, weight_bit_width=weight)
        layers += [brevitas.QuantIdentity(bit_width=input, return_quant_tensor=True), conv]
    network = nn.Sequential(*layers).eval()
    network(torch.rand(1, 1, 8, 8))
    exported = tmp_path / "network.onnx"
    export(network, args=torch.rand(1, 1, 8, 8), export_path=str(exported))
    counted = inference_cost(str(exported), discount_sparsity=False)["total_cost"]
    plain = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(channels)))
    units = workload(plain, IMAGE).units
    cost = layer_costs(units, {str(i): pair for i, pair in enumerate(widths)}, 0)
    assert (cost.macs, cost.bops) == (counted["total_macs"], counted["total_bops"])


def test_plans_of_other_networks() -> None:
    whole, parts = (workload(n, IMAGE).units for n in (Joined().eval(), split(Joined().eval(), IMAGE)))
    four = QFormat("int4")
    with pytest.raises(ValueError, match="layer 'gone' is none of those that run: below, enter, read"):
        layer_costs(whole, QuantPlan({"gone": LayerPlan.whole(four, four)}), 0)
    with pytest.raises(ValueError, match="'gone' is none of those that run"):
        layer_costs(whole, {"gone": (4, 4)}, 0)
    formats = {"skip": four, "up": four}
    with pytest.raises(
        ValueError, match=r"'read' has formats for the parts skip, up, .* has input; call split"
    ):
        layer_costs(whole, QuantPlan({"read": LayerPlan(formats, formats)}), 0)
    assert layer_costs(parts, QuantPlan({"read": LayerPlan.whole(four, four)}), 0).layers[3].weight == "int4"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "cost: TypeError"),
        ({"layers": []}, "cost: KeyError 'other_parameters'"),
        ({"layers": [{"name": "a"}], "other_parameters": 0}, r"cost: layers\[0\] has \['name'\], expected"),
    ],
)
def test_what_is_no_cost(document: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkCost.from_json(document)
