"""The networks that surgery is tested on, small: MONAI's, nnU-Net's, the paper's, and what a user may write.

Each stands beside what its architecture says about it: the parts of every splittable convolution in the order in
which the layers run, written by hand as ``"skip=8 up=4"``, and what is left alone, by a piece of the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from monai.networks.nets import (
    UNETR,
    AttentionUnet,
    BasicUNet,
    BasicUNetPlusPlus,
    DynUNet,
    FlexibleUNet,
    SegResNet,
    SwinUNETR,
    UNet,
    VNet,
)
from torch import Tensor, nn
from torch.nn import functional as F

from monai_unetq.networks import FixedPointUNet

__all__ = ["LARGE", "NETWORKS", "Case"]


@dataclass(frozen=True)
class Case:
    """A network and what is known of it.

    Attributes:
        build: makes it.
        shape: of an example, batch of one.
        parts: for each splittable convolution its parts, as ``"skip=8 up=4"``.
        left: for each reader that is left alone a piece of the reason.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    parts: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def image(self, batch: int = 1) -> Tensor:
        """Random numbers of the example's shape, always the same."""
        return torch.rand(batch, *self.shape[1:], generator=torch.Generator().manual_seed(1))


def from_plans(kind: str, dimensions: int, strides: list[list[int]], **blocks: list[int]) -> nn.Module:
    """A network as nnU-Net builds it from the ``architecture`` section of a plans file, with deep supervision."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    section: dict[str, Any] = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": len(strides),
            "features_per_stage": [4, 8, 12, 12][: len(strides)],
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[1 if s == 1 and stage else 3 for s in st] for stage, st in enumerate(strides)],
            "strides": strides,
            **blocks,
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return cast(
        nn.Module,
        get_network_from_plans(
            section["network_class_name"],
            section["arch_kwargs"],
            section["_kw_requires_import"],
            1,
            3,
            deep_supervision=True,
        ),
    )


def plain(dimensions: int, strides: list[list[int]]) -> nn.Module:
    stages = len(strides)
    return from_plans(
        "PlainConvUNet",
        dimensions,
        strides,
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )


def residual(kind: str, dimensions: int, strides: list[list[int]]) -> nn.Module:
    stages = len(strides)
    return from_plans(
        kind, dimensions, strides, n_blocks_per_stage=[1, 2, 2, 2][:stages],
        n_conv_per_stage_decoder=[1] * (stages - 1),
    )  # fmt: skip


class Level(nn.Module):
    """What a user may write: one level down, one up, and ``read`` for what the concatenation goes into.

    The skip, ``enter``'s result, has 4 channels, the upsampled path, ``below``'s, 6.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.below = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.read = nn.Conv2d(10, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        skip = torch.relu(self.enter(image))
        return self.join(image, skip, self.up(torch.relu(self.below(F.max_pool2d(skip, 2)))))

    def up(self, low: Tensor) -> Tensor:
        return F.interpolate(low, scale_factor=2.0, mode="nearest")

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(torch.cat([skip, up], 1))
        return out


class Normalized(Level):
    """A norm, an activation and dropout between concatenation and convolution."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.between = nn.Sequential(norm, activation, nn.Dropout(0.2))

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(self.between(torch.cat([up, skip], 1)))
        return out


class WithImage(Level):
    """Five parts: a skip, the upsampled path, the image itself, the skip once more, and the path negated."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(21, 2, 3)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(torch.cat([skip, up, image, skip.sigmoid(), -up], 1))
        return out


class Nested(Level):
    """A concatenation within a concatenation, in front of a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.ConvTranspose2d(11, 2, 2, stride=2)  # type: ignore[assignment]

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(torch.cat([F.elu(torch.cat([image, skip], 1)), up], 1))
        return out


class TwoReaders(Level):
    """One concatenation that feeds two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(10, 2, 1)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        both = torch.cat([skip, up], 1)
        out: Tensor = self.read(both) + self.shortcut(both)
        return out


class Grouped(Level):
    """A grouped convolution beside the plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(10, 2, 3, padding=1, groups=2)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        both = torch.cat([skip, up], 1)
        out: Tensor = self.read(both) + self.grouped(both)
        return out


class ToLinear(Level):
    """A linear layer over the channels, beside the plain convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 2)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        both = torch.cat([skip, up], 1)
        out: Tensor = self.read(both) + self.linear(both.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class Functional(Level):
    """A convolution that is a function call with a parameter, and no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(2, 10, 3, 3) - 0.5)
        self.read = nn.Conv2d(2, 2, 3, padding=1)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(F.conv2d(torch.cat([skip, up], 1), self.kernel, padding=1))
        return out


class ResidualAdd(Level):
    """A residual addition onto the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.last = nn.Conv2d(10, 10, 3, padding=1), nn.Conv2d(10, 2, 1)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        both = torch.cat([skip, up], 1)
        out: Tensor = self.last(self.read(both) + both)
        return out


class ChannelsLast(Level):
    """Concatenates with the channels in the last axis, in memory, too."""

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        both = torch.cat([skip.permute(0, 2, 3, 1), up.permute(0, 2, 3, 1)], -1)
        out: Tensor = self.read(both.movedim(-1, 1))
        return out


class ChannelsLastMemory(Level):
    """Runs in the memory format that is fastest for many convolutions."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.contiguous(memory_format=torch.channels_last))


class Unbatched(Level):
    """Runs its layers on a single image without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.ConvTranspose2d(6, 6, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack([super(Unbatched, self).forward(single) for single in image.unbind(0)])

    def up(self, low: Tensor) -> Tensor:
        out: Tensor = self.widen(low)
        return out

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(torch.cat([skip, up], 0))
        return out


class Sliced(Level):
    """Takes channels 1 and 2 of the skip, concatenates, and reads all but the first of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(7, 2, 3, padding=1)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(torch.cat([skip[:, 1:3], up], 1)[:, 1:])
        return out


class Interleaved(Level):
    """Reads the concatenation twice over, so that no part of it is in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(20, 2, 3, padding=1)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(torch.cat([skip, up], 1).repeat(1, 2, 1, 1))
        return out


class ChannelShuffle(Level):
    """Shuffles the channels of the concatenation."""

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        both = torch.cat([skip, up], 1)
        n, _, h, w = both.shape
        out: Tensor = self.read(both.view(n, 2, 5, h, w).transpose(1, 2).reshape(n, 10, h, w))
        return out


class Shuffled(Level):
    """Pixel shuffle in the way up: fewer channels, more pixels, and no interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Conv2d(4, 24, 3, padding=1)

    def up(self, low: Tensor) -> Tensor:
        return F.pixel_shuffle(low, 2)


class DeepSkip(Shuffled):
    """The skip has passed more layers than what comes up, so that depth alone would take it for the upsampled path."""

    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        return super().join(image, self.path(skip), up)


class Squeezed(Level):
    """Squeeze and excitation of both parts: gates made from means over all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.excite_skip, self.excite_up = nn.Conv2d(4, 4, 1), nn.Linear(6, 6)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        skip = skip * torch.sigmoid(self.excite_skip(F.adaptive_avg_pool2d(skip, 1)))
        up = up * torch.sigmoid(self.excite_up(up.mean((2, 3))))[:, :, None, None]
        return super().join(image, skip, up)


class Padded(Level):
    """Odd sizes: what comes up is padded to the skip's size."""

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        high, wide = (a - b for a, b in zip(skip.shape[2:], up.shape[2:], strict=True))
        return super().join(image, skip, F.pad(up, (0, wide, 0, high)))


class Cropped(Level):
    """Valid convolutions, as in the first U-Net: the skip is cropped to what comes up."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Conv2d(4, 6, 3)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        high, wide = ((a - b) // 2 for a, b in zip(skip.shape[2:], up.shape[2:], strict=True))
        skip = skip[:, :, high : high + up.shape[2], wide : wide + up.shape[3]]
        return super().join(image, skip, up)


class CalledTwice(Level):
    """One convolution over two concatenations: the parts stand the other way round in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Conv2d(4, 4, 3, padding=1)
        self.read, self.last = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.last(self.read(torch.cat([skip, up], 1)) + self.read(torch.cat([up, skip], 1)))
        return out


class Branches(nn.Module):
    """Parallel branches of one resolution, of different depths, concatenated: no skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 4, 3, padding=1)
        wide = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1))
        self.branches = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1), wide])
        self.read = nn.Conv2d(6, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.enter(image))
        out: Tensor = self.read(torch.cat([torch.relu(branch(x)) for branch in self.branches], 1))
        return out


class Level3d(nn.Module):
    """A user's network in 3D, with the upsampled path first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.below = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 6, 3, padding=1, stride=2)
        self.up, self.norm = nn.ConvTranspose3d(6, 6, 2, stride=2), nn.GroupNorm(5, 10)
        self.read = nn.Conv3d(10, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        skip = torch.relu(self.enter(image))
        both = torch.cat((self.up(torch.relu(self.below(skip))), skip), dim=-4)
        out: Tensor = self.read(F.leaky_relu(self.norm(both)))
        return out


MONAI_FEATURES = (4, 4, 8, 8, 16, 4)
SWIN: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 2,
    "feature_size": 12,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
}
UNETR_SIZES: dict[str, Any] = {"feature_size": 4, "hidden_size": 16, "mlp_dim": 16, "num_heads": 2}
DYNAMIC: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 2,
    "kernel_size": (3, 3, 3),
    "strides": (1, 2, 2),
    "upsample_kernel_size": (2, 2),
    "filters": (4, 8, 12),
    "deep_supervision": True,
}

SMALL_2D, SMALL_3D = (1, 1, 32, 32), (1, 1, 16, 16, 16)
BASIC = ("skip=8 up=8", "skip=8 up=4", "skip=4 up=4", "skip=4 up=4")
DENSE = tuple(
    f"{skips} up={up}"
    for skips, up in (
        ("skip=4", 4),
        ("skip=4", 4),
        ("skip=4 skip.1=4", 4),
        ("skip=8", 4),
        ("skip=4 skip.1=4", 4),
        ("skip=4 skip.1=4 skip.2=4", 4),
        ("skip=8", 8),
        ("skip=8 skip.1=8", 4),
        ("skip=4 skip.1=4 skip.2=4", 4),
        ("skip=4 skip.1=4 skip.2=4 skip.3=4", 4),
    )
)
ADDS = ("'add' reads the concatenation of up (",) * 4  # the block's input is added to its result
LEVEL = ("skip=4 up=6",)

_MONAI: dict[str, Case] = {
    "UNet": Case(
        lambda: UNet(2, 1, 2, (4, 8, 16, 20), (2, 2, 2)),
        SMALL_2D,
        ("skip=16 up=20", "skip=8 up=8", "skip=4 up=4"),
    ),
    "UNet residual 3D": Case(
        lambda: UNet(3, 1, 2, (4, 8, 12), (2, 2), num_res_units=2),
        SMALL_3D,
        ("skip=8 up=12", "skip=4 up=4"),
    ),
    "BasicUNet": Case(lambda: BasicUNet(2, 1, 2, MONAI_FEATURES), SMALL_2D, BASIC),
    "BasicUNet 3D": Case(lambda: BasicUNet(3, 1, 2, MONAI_FEATURES), (1, 1, 32, 32, 32), BASIC),
    "BasicUNet nontrainable": Case(
        lambda: BasicUNet(2, 1, 2, MONAI_FEATURES, upsample="nontrainable"), SMALL_2D, BASIC
    ),
    "BasicUNet pixelshuffle": Case(
        lambda: BasicUNet(2, 1, 2, MONAI_FEATURES, upsample="pixelshuffle"), SMALL_2D, BASIC
    ),
    "BasicUNetPlusPlus": Case(lambda: BasicUNetPlusPlus(2, 1, 2, MONAI_FEATURES), SMALL_2D, DENSE),
    "FlexibleUNet": Case(
        lambda: FlexibleUNet(
            1, 2, "resnet18", pretrained=False, decoder_channels=(16, 8, 8, 8, 4), spatial_dims=2
        ),
        SMALL_2D,
        ("skip=256 up=256", "skip=128 up=8", "skip=64 up=4", "skip=64 up=4"),
    ),
    "DynUNet": Case(
        lambda: DynUNet(2, **DYNAMIC),
        SMALL_2D,
        ("up=8 skip=8", "up=4 skip=4"),
    ),
    "DynUNet residual 3D": Case(
        lambda: DynUNet(3, **DYNAMIC, res_block=True),
        SMALL_3D,
        ("up=8 skip=8", "up=4 skip=4"),
    ),
    "AttentionUnet": Case(
        lambda: AttentionUnet(2, 1, 2, (4, 8, 12), (2, 2)), SMALL_2D, ("skip=8 up=8", "skip=4 up=4")
    ),
    "AttentionUnet 3D": Case(
        lambda: AttentionUnet(3, 1, 2, (4, 8, 12), (2, 2)), SMALL_3D, ("skip=8 up=8", "skip=4 up=4")
    ),
    # Every concatenation feeds a residual block: its first convolution and its 1×1 shortcut.
    "UNETR": Case(
        lambda: UNETR(1, 2, (32, 32), spatial_dims=2, **UNETR_SIZES),
        SMALL_2D,
        tuple(f"up={n} skip={n}" for n in (32, 32, 16, 16, 8, 8, 4, 4)),
    ),
    "UNETR perceptron 3D": Case(
        lambda: UNETR(1, 2, (16, 16, 16), proj_type="perceptron", **UNETR_SIZES),
        SMALL_3D,
        tuple(f"up={n} skip={n}" for n in (32, 32, 16, 16, 8, 8, 4, 4)),
    ),
    "SwinUNETR": Case(
        lambda: SwinUNETR(**SWIN, spatial_dims=2),
        (1, 1, 64, 64),
        tuple(f"up={n} skip={n}" for n in (96, 96, 48, 48, 24, 24, 12, 12, 12, 12)),
    ),
    "VNet": Case(lambda: VNet(2, 1, 2), SMALL_2D, tuple(f"up={n} skip={n}" for n in (128, 64, 32, 16)), ADDS),
    "SegResNet": Case(lambda: SegResNet(2, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), SMALL_2D),
    "SegResNet 3D": Case(lambda: SegResNet(3, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), SMALL_3D),
}

_NNUNET: dict[str, Case] = {
    "PlainConvUNet": Case(
        lambda: plain(2, [[1, 1], [2, 2], [2, 2]]), SMALL_2D, ("up=8 skip=8", "up=4 skip=4")
    ),
    "PlainConvUNet 3D": Case(  # anisotropic, as for thick slices
        lambda: plain(3, [[1, 1, 1], [1, 2, 2], [2, 2, 2]]), SMALL_3D, ("up=8 skip=8", "up=4 skip=4")
    ),
    "ResidualEncoderUNet": Case(
        lambda: residual("ResidualEncoderUNet", 2, [[1, 1], [2, 2], [2, 2], [2, 1]]),
        SMALL_2D,
        ("up=12 skip=12", "up=8 skip=8", "up=4 skip=4"),
    ),
    "ResidualEncoderUNet 3D": Case(
        lambda: residual("ResidualEncoderUNet", 3, [[1, 1, 1], [2, 2, 2], [2, 2, 2]]),
        SMALL_3D,
        ("up=8 skip=8", "up=4 skip=4"),
    ),
    # Residual blocks in the decoder, too: a first convolution and a 1×1 shortcut on every concatenation.
    "ResidualUNet": Case(
        lambda: residual("ResidualUNet", 2, [[1, 1], [2, 2], [2, 2]]),
        SMALL_2D,
        ("up=8 skip=8", "up=8 skip=8", "up=4 skip=4", "up=4 skip=4"),
    ),
    "ResidualUNet 3D": Case(
        lambda: residual("ResidualUNet", 3, [[1, 1, 1], [2, 2, 2], [2, 2, 2]]),
        SMALL_3D,
        ("up=8 skip=8", "up=8 skip=8", "up=4 skip=4", "up=4 skip=4"),
    ),
}

_PAPER: dict[str, Case] = {
    "FixedPointUNet": Case(
        lambda: FixedPointUNet(1, 1, width=2, dropout=0.2),
        SMALL_2D,
        ("skip=8 up=8", "skip=4 up=8", "skip=2 up=4"),
    ),
    "FixedPointUNet 3D": Case(
        lambda: FixedPointUNet(1, 1, width=2, spatial_dims=3, upsample="transposed", activation="tanh"),
        SMALL_3D,
        ("skip=8 up=8", "skip=4 up=8", "skip=2 up=4"),
    ),
}

_OWN: dict[str, Case] = {
    "own, batch norm and ReLU between": Case(
        lambda: Normalized(nn.BatchNorm2d(10), nn.ReLU(inplace=True)), SMALL_2D, ("up=6 skip=4",)
    ),
    "own, group norm between": Case(
        lambda: Normalized(nn.GroupNorm(2, 10), nn.GELU()), SMALL_2D, ("up=6 skip=4",)
    ),
    "own, instance norm between": Case(
        lambda: Normalized(nn.InstanceNorm2d(10, affine=True), nn.PReLU(10)), SMALL_2D, ("up=6 skip=4",)
    ),
    "own, five parts": Case(WithImage, SMALL_2D, ("skip=4 up=6 skip.1=1 skip.2=4 up.1=6",)),
    "own, nested": Case(Nested, SMALL_2D, ("skip=1 skip.1=4 up=6",)),
    "own, two readers": Case(TwoReaders, SMALL_2D, LEVEL * 2),
    "own, grouped": Case(Grouped, SMALL_2D, LEVEL, ("it has 2 groups",)),
    "own, linear": Case(ToLinear, SMALL_2D, LEVEL, ("it is a Linear, expected one of Conv1d",)),
    "own, functional": Case(Functional, SMALL_2D, (), ("'convolution' reads the concatenation of skip (enter)",)),
    "own, residual add": Case(ResidualAdd, SMALL_2D, LEVEL, ("'add' reads the concatenation",)),
    "own, channels last": Case(ChannelsLast, SMALL_2D, LEVEL),
    "own, channels last in memory": Case(ChannelsLastMemory, SMALL_2D, LEVEL),
    "own, unbatched": Case(Unbatched, SMALL_2D, LEVEL),
    "own, sliced": Case(Sliced, SMALL_2D, ("skip=1 up=6",)),
    "own, interleaved": Case(Interleaved, SMALL_2D, (), ("interleaved",)),
    "own, channel shuffle": Case(ChannelShuffle, SMALL_2D, (), ("'view' reads the concatenation",)),
    "own, pixel shuffle": Case(Shuffled, SMALL_2D, LEVEL),
    "own, deep skip": Case(DeepSkip, SMALL_2D, LEVEL),
    "own, squeeze and excitation": Case(Squeezed, SMALL_2D, LEVEL),
    "own, padded": Case(Padded, (1, 1, 15, 17), LEVEL),
    "own, cropped": Case(Cropped, SMALL_2D, LEVEL),
    "own, called twice": Case(CalledTwice, SMALL_2D, (), ("several inputs",)),
    "own, branches": Case(Branches, SMALL_2D),
    "own, 3D": Case(Level3d, SMALL_3D, ("up=6 skip=4",)),
}  # fmt: skip

NETWORKS: dict[str, Case] = {**_MONAI, **_NNUNET, **_PAPER, **_OWN}

LARGE: dict[str, Case] = {
    "VNet 3D": Case(
        lambda: VNet(3, 1, 2),
        (1, 1, 32, 32, 32),
        tuple(f"up={n} skip={n}" for n in (128, 64, 32, 16)),
        ADDS,
    ),
    "SwinUNETR 3D": Case(
        lambda: SwinUNETR(**SWIN, spatial_dims=3),
        (1, 1, 64, 64, 64),
        tuple(f"up={n} skip={n}" for n in (96, 96, 48, 48, 24, 24, 12, 12, 12, 12)),
    ),
    "FlexibleUNet 3D": Case(
        lambda: FlexibleUNet(1, 2, "resnet18", pretrained=False, spatial_dims=3),
        (1, 1, 32, 32, 32),
        ("skip=256 up=256", "skip=128 up=128", "skip=64 up=64", "skip=64 up=32"),
    ),
    "BasicUNetPlusPlus 3D": Case(
        lambda: BasicUNetPlusPlus(3, 1, 2, MONAI_FEATURES), (1, 1, 32, 32, 32), DENSE
    ),
    "UNETR 3D": Case(
        lambda: UNETR(1, 2, (96, 96, 96)),
        (1, 1, 96, 96, 96),
        tuple(f"up={n} skip={n}" for n in (128, 128, 64, 64, 32, 32, 16, 16)),
    ),
}
"""Too large to run in a test: looked at on the meta device only."""
