"""nnU-Net's networks, quantized as a request asks: what a trained fold's weights are loaded into, and how a trained
float network becomes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import QuantPlan
from ..recipe import END_BITS
from ..surgery import observe, quantize, split
from .request import Request

__all__ = [
    "example_image",
    "float_layers",
    "on_batch_norm",
    "request_plan",
    "requested_network",
    "with_norms",
    "without_deep_supervision",
]


def example_image(configuration: Any, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """An image (1, channels, spatial…) of zeros, the smallest that every resolution halves without rest.

    Args:
        configuration: nnU-Net's ``ConfigurationManager``.
        channels: of the network's input; in a cascade with the previous stage's labels.
        device: where the network is.
    """
    strides = configuration.pool_op_kernel_sizes
    # Twice the deepest resolution's stride: an instance norm over one pixel is nothing in training.
    sizes = [
        2 * math.prod(stride if isinstance(stride, int) else stride[axis] for stride in strides)
        for axis in range(len(configuration.patch_size))
    ]
    return torch.zeros(1, channels, *sizes, device=device)


def float_layers(network: nn.Module) -> list[str]:
    """Layers that only deep supervision runs: nothing reads them in inference, so they stay float."""
    heads = network.decoder.seg_layers  # type: ignore[union-attr]
    return [
        name
        for name, module in network.named_modules()
        if any(module is head for head in list(heads)[:-1])  # type: ignore[arg-type]
    ]


def on_batch_norm(configuration: Any) -> Any:
    """The configuration with batch norms and ReLU in the network, which an integer data path can hold.

    Args:
        configuration: nnU-Net's ``ConfigurationManager``; it is left as it is.
    """
    changed = copy.deepcopy(configuration)
    options = changed.network_arch_init_kwargs
    dimensions = len(changed.patch_size)
    options["norm_op"] = f"torch.nn.modules.batchnorm.BatchNorm{dimensions}d"
    options["norm_op_kwargs"] = {"eps": 1e-5, "affine": True}
    options["nonlin"] = "torch.nn.ReLU"
    options["nonlin_kwargs"] = {"inplace": True}
    return changed


def request_plan(network: nn.Module, request: Request, example: Tensor, learned: bool) -> QuantPlan:
    """The plan of a request for uniform widths; for a budget, one of the same layers, whose widths a trained fold's
    state replaces.

    Args:
        network: float, split or not, with deep supervision off.
        request: what is asked for.
        example: see ``example_image``.
        learned: see ``QuantPlan``.
    """
    trace = observe(network, example)
    end = f"int{END_BITS}"
    plan = QuantPlan.uniform(
        network, request.weights or end, request.activations or end, input=end, first=end, last=end,
        keep_float=float_layers(network), scale=request.scale, learned=learned,
        image_layers=trace.image_layers(), last_layer=trace.layers()[-1],
    )  # fmt: skip
    return with_norms(plan, network, request, example)


def with_norms(plan: QuantPlan, network: nn.Module, request: Request, example: Tensor) -> QuantPlan:
    """The plan, and what instance norms read rounded as the request says; arguments as in ``request_plan``."""
    if request.norms is None:
        return plan
    return plan.with_outputs(observe(network, example).normalized_layers(), request.norms)


def requested_network(network: nn.Module, request: Request, example: Tensor, splits: bool) -> nn.Module:
    """Quantize a network in place so that the state of any fold that was trained for the request loads strictly.

    Formats, scales and widths come with that state (design decision 2); what they are before means nothing.

    Args:
        network: float, as nnU-Net builds it.
        request: what is asked for.
        example: see ``example_image``.
        splits: whether convolutions over skip and up are split.
    """
    with without_deep_supervision(network):
        if splits:
            split(network, example)
        return quantize(network, request_plan(network, request, example, learned=False), example)


@contextmanager
def without_deep_supervision(*networks: nn.Module) -> Iterator[None]:
    """Within it, nnU-Net's networks predict at full resolution only."""
    before = [network.decoder.deep_supervision for network in networks]  # type: ignore[union-attr]
    try:
        for network in networks:
            network.decoder.deep_supervision = False  # type: ignore[union-attr]
        yield
    finally:
        for network, enabled in zip(networks, before, strict=True):
            network.decoder.deep_supervision = enabled  # type: ignore[union-attr]
