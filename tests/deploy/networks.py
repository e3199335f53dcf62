"""Small quantized networks for the tests of export: one of each kind, traced once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from monai.networks.nets import UNETR, BasicUNet, DynUNet, SegResNet, UNet
from torch import Tensor, nn

import monai_unetq as uq
from monai_unetq.deploy.trace import Trace, trace
from monai_unetq.surgery import observe

__all__ = ["NETWORKS", "Network", "Traced", "paper_unet", "quantized", "traced"]

SQUARE, CUBE = (1, 1, 32, 32), (1, 1, 16, 16, 16)


@dataclass(frozen=True)
class Network:
    """How a network is built, the shape of its image, whether it is split, whether integers hold it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    split: bool
    holds: bool


def paper_unet() -> nn.Module:
    """The 2019 paper's U-Net, narrow."""
    return uq.networks.FixedPointUNet(1, 2, width=4)


def _nnunet(kind: Any, dimensions: int, **stages: int) -> nn.Module:
    convolution, norm = (
        ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.InstanceNorm3d))[dimensions - 2]
    )  # fmt: skip
    network: nn.Module = kind(
        1, 2, [4, 8], convolution, 3, [1, 2], num_classes=2, conv_bias=True, norm_op=norm, norm_op_kwargs={"affine": True},
        nonlin=nn.ReLU, nonlin_kwargs={"inplace": True}, deep_supervision=False, n_conv_per_stage_decoder=1, **stages,
    )  # fmt: skip
    return network


NETWORKS: dict[str, Network] = {
    "paper": Network(paper_unet, SQUARE, True, True),
    "unet": Network(
        lambda: UNet(2, 1, 2, (4, 8, 8), (2, 2), num_res_units=2, norm="batch", act="relu"), SQUARE, True, True
    ),
    "basicunet": Network(
        lambda: BasicUNet(2, 1, 2, (4, 4, 4, 8, 8, 4), norm="batch", act="relu"), SQUARE, True, True
    ),
    "dynunet": Network(
        lambda: DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 8], norm_name="instance"), CUBE, True, False
    ),
    "segresnet": Network(
        lambda: SegResNet(2, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)), SQUARE, False, False
    ),
    "unetr": Network(
        lambda: UNETR(1, 2, CUBE[2:], feature_size=4, hidden_size=24, mlp_dim=24, num_heads=2), CUBE, False, False
    ),
    "nnunet plain": Network(
        lambda: _nnunet(PlainConvUNet, 2, n_conv_per_stage=1), SQUARE, True, True
    ),
    "nnunet residual": Network(
        lambda: _nnunet(ResidualEncoderUNet, 3, n_blocks_per_stage=1), CUBE, False, False
    ),
}  # fmt: skip


@torch.no_grad()
def quantized(
    build: Callable[[], nn.Module], shape: tuple[int, ...], split: bool, weights: str = "int4", activations: str = "int6",
    last: str = "int7", scale: str = "power-of-two", image_format: str = "uint8",
) -> nn.Module:  # fmt: skip
    """A seeded network, its batch norms warmed up, quantized and calibrated."""
    torch.manual_seed(0)
    network, image = build().train(), torch.rand(shape)
    network(torch.rand(4, *shape[1:]))
    network.eval()
    if split:
        uq.split(network, image)
    seen = observe(network, image)
    ran = set(seen.layers())
    options: dict[str, Any] = {"scale": scale}
    plan = uq.QuantPlan.uniform(
        network, weights=weights, activations=activations, input=image_format, last=last,
        image_layers=seen.image_layers(), last_layer=seen.layers()[-1], **options,
    )  # fmt: skip
    uq.quantize(network, plan.without([name for name in plan.layers if name not in ran]), image)
    return uq.calibrate(network, [torch.rand(2, *shape[1:])])


@dataclass(frozen=True)
class Traced:
    """A network, its trace, an image that it was not calibrated on, and the logits of fake quantization."""

    network: nn.Module
    trace: Trace
    image: Tensor
    logits: Tensor


@functools.cache
def traced(name: str) -> Traced:
    """One of ``NETWORKS``, W4A6, with fixed sizes."""
    network_of = NETWORKS[name]
    network = quantized(network_of.build, network_of.shape, network_of.split)
    image = torch.rand(network_of.shape, generator=torch.Generator().manual_seed(7))
    folded = uq.fold(copy.deepcopy(network), image)
    with torch.no_grad():
        logits = folded(image)
    return Traced(network, trace(network, image, dynamic=False), image, logits)
