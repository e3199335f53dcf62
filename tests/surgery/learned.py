"""A small network that has learned something, and images for it: what calibration is tried on."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import quantize

IMAGES = nn.functional.avg_pool2d(
    torch.rand(6, 1, 20, 20, generator=torch.Generator().manual_seed(0)), 5, 1
).unflatten(0, (3, 2))
IMAGES = (IMAGES - IMAGES.min()) / (IMAGES.max() - IMAGES.min())  # three batches, smooth, in [0, 1]


@cache
def _trained() -> nn.Module:
    torch.manual_seed(0)
    # From rounded weights and in float64: with float32's last digit, which depends on the processor and the number
    # of threads, sixty steps would end at another network on every machine.
    network = FixedPointUNet(1, 1, width=4).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_((parameter * 2**10).round() / 2**10)
    image = IMAGES.flatten(0, 1).double()
    optimizer, label = torch.optim.Adam(network.parameters(), 1e-2), (image.mean() < image).double()
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.float().eval()


def unet() -> nn.Module:
    """A small network that has learned to threshold the image."""
    return copy.deepcopy(_trained())


def quantized(**formats: Any) -> nn.Module:
    network = unet()
    return quantize(network, QuantPlan.uniform(network, **formats))


@torch.no_grad()
def run(network: nn.Module) -> Tensor:
    out: Tensor = network(IMAGES[0])
    return out


def state(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
