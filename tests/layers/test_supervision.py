"""The skip-supervision head: torch's convolution in what it computes, and none of the network's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from monai_unetq.layers import QUANTIZED_LAYERS, SupervisionHead, is_quantizable


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_it_computes_what_a_convolution_of_the_same_weights_does(dimensions: int, kernel: int) -> None:
    head = SupervisionHead(4, 3, dimensions, kernel)
    convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](4, 3, kernel, padding=kernel // 2)
    nn.init.uniform_(head.bias)
    convolution.load_state_dict(head.state_dict())
    feature = torch.rand(2, 4, *[5, 6, 7][:dimensions])
    logits = head(feature)
    assert logits.shape == (2, 3, *feature.shape[2:])
    assert torch.equal(logits, convolution(feature))


def test_it_begins_as_a_convolution_that_knows_nothing() -> None:
    torch.manual_seed(0)
    head = SupervisionHead(8, 2, 2)
    torch.manual_seed(0)
    assert torch.equal(head.weight, nn.Conv2d(8, 2, 3).weight)
    assert not head.bias.any()


def test_nobody_takes_it_for_a_layer_of_the_network() -> None:
    head = SupervisionHead(4, 1, 2)
    assert not isinstance(head, tuple(QUANTIZED_LAYERS))
    assert not is_quantizable(head)


@pytest.mark.parametrize(
    ("feature", "head"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32)]
)  # fmt: skip
def test_features_of_another_precision_come_to_its_own(feature: torch.dtype, head: torch.dtype) -> None:
    module = SupervisionHead(4, 1, 2).to(head)
    value = torch.rand(1, 4, 8, 8, dtype=feature, requires_grad=True)
    logits = module(value)
    assert logits.dtype == head
    assert torch.equal(logits, module(value.to(head)))
    logits.sum().backward()
    assert value.grad is not None and value.grad.dtype == feature and value.grad.any()


@pytest.mark.parametrize("feature", [torch.bfloat16, torch.float32])
def test_under_autocast_it_runs_in_half_precision(feature: torch.dtype) -> None:
    head, value = SupervisionHead(4, 1, 2), torch.rand(1, 4, 8, 8).to(feature)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(value)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, head.bfloat16()(value.bfloat16()))


def test_it_goes_where_it_is_told_and_says_what_it_is() -> None:
    head = SupervisionHead(4, 3, 3, kernel_size=1, device=torch.device("meta"))
    assert head.weight.is_meta and head.bias.is_meta
    assert head(torch.rand(1, 4, 2, 2, 2, device="meta")).shape == (1, 3, 2, 2, 2)
    assert repr(head) == "SupervisionHead(4, 3, kernel_size=(1, 1, 1))"
