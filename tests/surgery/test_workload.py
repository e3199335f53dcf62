"""What each part of a layer holds and computes, by hand and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import monai_unetq as uq
from monai_unetq.surgery.workload import Unit, workload
from tests.sensitivity.networks import Level, Linear


def counted(network: nn.Module, image: torch.Tensor) -> int:
    """MACs by ``torch.utils.flop_counter``."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(image)
    return counter.get_total_flops() // 2


def test_units_by_hand() -> None:
    network = uq.split(Level(), torch.zeros(1, 1, 8, 8))
    found = workload(network, torch.zeros(3, 1, 8, 8))
    assert found.image == (1, 1, 8, 8)
    assert found.other_parameters == 2 + 2 + 2 + 1  # biases
    assert {unit.name: unit for unit in found.units} == {
        "enter": Unit("enter", "input", 18, 64, 128, 18 * 64, 1),
        "down": Unit("down", "input", 16, 128, 32, 16 * 16, 2),
        "up": Unit("up", "input", 16, 32, 128, 16 * 16, 2),
        "read[skip]": Unit("read", "skip", 18, 128, 64, 18 * 64, 2),
        "read[up]": Unit("read", "up", 18, 128, 0, 18 * 64, 2),
    }


@pytest.mark.parametrize("dimensions", [2, 3])
def test_macs_and_parameters_are_complete(dimensions: int) -> None:
    network = uq.networks.FixedPointUNet(1, 2, width=2, spatial_dims=dimensions, upsample="transposed")
    image = torch.zeros(1, 1, *[16] * dimensions)
    for made in (network, uq.split(network, image)):
        found = workload(made, image)
        assert sum(unit.macs for unit in found.units) == counted(made, image)
        weights = sum(unit.weights for unit in found.units)
        assert weights + found.other_parameters == sum(p.numel() for p in made.parameters())


def test_a_layer_called_twice_counts_its_weight_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(self.layer(image))
            return out

    (unit,) = workload(Twice(), torch.zeros(2, 1, 4, 4)).units
    assert unit == Unit("layer", "input", 9, 32, 32, 2 * 9 * 16, 1)


def test_linear_layers_on_every_row() -> None:
    first, second = workload(Linear(), torch.zeros(2, 1, 5, 4)).units
    assert (first.macs, second.macs) == (12 * 5, 12 * 5)
    assert (first.inputs, first.outputs, second.inputs) == (20, 15, 15)


def test_quantizers_are_no_parameters_of_the_network() -> None:
    network = uq.split(Level(), torch.zeros(1, 1, 8, 8))
    image = torch.zeros(1, 1, 8, 8)
    expected = workload(network, image)
    plan = uq.QuantPlan.uniform(network, "int4", "int4", scale="free", learned=True)
    assert workload(uq.quantize(network, plan, image), image) == expected


def test_an_example_is_found_and_a_wrong_one_refused() -> None:
    assert workload(Level()).image == (1, 1, 64, 64)
    with pytest.raises(ValueError, match="failed on an example of shape"):
        workload(Level(), torch.zeros(1, 2, 8, 8))


def test_json() -> None:
    unit = Unit("a", "skip.1", 1, 2, 3, 4)
    assert Unit.from_json(unit.to_json()) == unit
    assert unit.name == "a[skip.1]"
    with pytest.raises(KeyError):
        Unit.from_json({"layer": "a"})
