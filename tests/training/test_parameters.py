"""``parameter_groups``: every parameter once, each with the learning rate of its kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.quantizers import Quantizer
from monai_unetq.surgery import attach_supervision, quantize, split
from monai_unetq.training import cosine, parameter_groups

IMAGE = torch.rand(1, 1, 16, 16)


def make(learned: bool = True, heads: bool = True) -> nn.Module:
    torch.manual_seed(0)
    network = split(FixedPointUNet(1, 1, width=2), IMAGE)
    quantize(network, QuantPlan.uniform(network, "int4", "int4", learned=learned), IMAGE)
    return attach_supervision(network, IMAGE) if heads else network


def kinds(network: nn.Module) -> list[list[nn.Parameter]]:
    """Weights, step sizes and heads' parameters, by their names."""
    found: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in network.named_parameters():
        found[2 if "skip_supervision" in name else 1 if name.endswith("log2_scale") else 0].append(parameter)
    return found


def identities(parameters: Any) -> set[int]:
    return {id(parameter) for parameter in parameters}


def holder(network: nn.Module) -> nn.Module:
    """Holds a network and a layer of its own."""
    whole = nn.Module()
    whole.network, whole.more = network, nn.Conv2d(1, 1, 3)
    return whole


WRAPPERS: list[Callable[[nn.Module], Any]] = [
    lambda network: network,
    DataParallel,
    partial(torch.compile, backend="eager"),
    holder,
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_every_parameter_is_in_one_group_with_its_learning_rate(wrap: Callable[[nn.Module], Any]) -> None:
    whole = wrap(make())
    groups = parameter_groups(whole, 1e-3, scales=20, heads=5)
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 2e-2, 5e-3])
    assert [identities(group["params"]) for group in groups] == [identities(kind) for kind in kinds(whole)]
    listed = [parameter for group in groups for parameter in group["params"]]
    assert len(listed) == len(identities(listed)) == len(list(whole.parameters()))


def test_step_sizes_are_the_quantizers_parameters() -> None:
    network = make()
    quantizers = [module for module in network.modules() if isinstance(module, Quantizer)]
    assert identities(parameter_groups(network, 1e-3)[1]["params"]) == identities(
        parameter for quantizer in quantizers for parameter in quantizer.parameters()
    )
    assert len(quantizers) > 30


def test_groups_without_a_parameter_are_left_out() -> None:
    plain = FixedPointUNet(1, 1, width=2)
    for network, rates in (
        (plain, [1e-3]),
        (make(learned=False, heads=False), [1e-3]),
        (make(heads=False), [1e-3, 3e-3]),
        (make(learned=False), [1e-3, 1e-2]),
        (make(), [1e-3, 3e-3, 1e-2]),
    ):
        assert [group["lr"] for group in parameter_groups(network, 1e-3)] == pytest.approx(rates)


def test_schedules_keep_the_proportions() -> None:
    optimizer = torch.optim.Adam(parameter_groups(make(), 1e-3, scales=10, heads=4))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(4))
    for _ in range(3):
        weights, scales, heads = (group["lr"] for group in optimizer.param_groups)
        assert (scales / weights, heads / weights) == pytest.approx((10, 4))
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] < 1e-3


def test_only_weights_decay() -> None:
    network = make()
    before = [copy.deepcopy(kind) for kind in kinds(network)]
    optimizer = torch.optim.AdamW(parameter_groups(network, 1e-2), weight_decay=0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = [
        all(torch.equal(a, b) for a, b in zip(kind, old, strict=True))
        for kind, old in zip(kinds(network), before, strict=True)
    ]
    assert decayed == [False, True, True]
    torch.testing.assert_close(kinds(network)[0][0], before[0][0] * (1 - 1e-2 * 0.5))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", ["learning_rate", "scales", "heads"])
def test_learning_rates_are_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"parameter_groups: {name} is {value}, expected a positive number"):
        parameter_groups(FixedPointUNet(1, 1, width=2), **{"learning_rate": 1e-3, name: value})
