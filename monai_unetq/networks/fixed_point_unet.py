"""The U-Net of AskariHemmat et al., 2019, section 4.1, at any width, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["FixedPointUNet"]

LEVELS = 4

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
}


class FixedPointUNet(nn.Module):
    """U-Net with 64-128-256-256 features, two 3×3 convolutions with batch norm a level, and a 3×3 last one.

    With one channel in and out it has 4,837,249 parameters, 18.45 MiB in float32. Upsampling interpolates at
    ``align_corners=False``: a factor of two is then a sum of dyadic multiples (×16 in 2D, ×64 in 3D), exact in
    fixed point.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the logits; 1 for two classes.
        width: features of the first level; the others have 2, 4 and 4 times as many.
        spatial_dims: 2 or 3.
        activation: ``"relu"``, ``"tanh"``, or ``"hardtanh"``, which clips to [-1, 1]: a tanh that fixed point computes
            exactly.
        upsample: ``"linear"`` interpolates (bilinear, trilinear), ``"transposed"`` learns a 2×2 transposed
            convolution.
        dropout: share of the values that training sets to zero after each level's two convolutions; 0 for none.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> net = FixedPointUNet(in_channels=1, out_channels=1)
        >>> net(torch.zeros(1, 1, 64, 64)).shape
        torch.Size([1, 1, 64, 64])
    """

    __jit_unused_properties__ = ("divisor",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 64,
        spatial_dims: int = 2,
        activation: Literal["relu", "tanh", "hardtanh"] = "relu",
        upsample: Literal["linear", "transposed"] = "linear",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims}, expected 2 or 3")
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation is {activation!r}, expected one of {', '.join(map(repr, _ACTIVATIONS))}"
            )
        if upsample not in ("linear", "transposed"):
            raise ValueError(f"upsample is {upsample!r}, expected 'linear' or 'transposed'")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, expected a share of at least 0 and less than 1")
        self.spatial_dims = spatial_dims
        features = (width, 2 * width, 4 * width, 4 * width)
        convolution = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2]

        def block(inputs: int, outputs: int) -> _DoubleConv:
            return _DoubleConv(inputs, outputs, spatial_dims, activation, dropout)

        self.pool = (nn.MaxPool2d, nn.MaxPool3d)[spatial_dims - 2](2)
        self.encoder = nn.ModuleList(
            block(i, o) for i, o in zip((in_channels, *features), features, strict=False)
        )
        self.upsample = nn.ModuleList(
            _upsampling(features[level + 1], spatial_dims, upsample) for level in (2, 1, 0)
        )
        # Level by level upward: what comes up has the features of the level below it.
        below = (features[3], features[2], features[1])
        self.decoder = nn.ModuleList(
            block(features[level] + up, features[level]) for level, up in zip((2, 1, 0), below, strict=True)
        )
        self.last = convolution(width, out_channels, kernel_size=3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits for an image.

        Args:
            image: (N, in_channels, H, W) or (N, in_channels, D, H, W), sizes divisible by 8.

        Returns:
            (N, out_channels, …), of the image's size.

        Raises:
            ValueError: if a size is not divisible by 8; ``training.predict`` pads and crops.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(image)
        skips: list[Tensor] = []
        x = image
        for level, block in enumerate(self.encoder):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for upsample, block in zip(self.upsample, self.decoder, strict=True):
            x = block(torch.cat([skips.pop(), upsample(x)], dim=1))
        out: Tensor = self.last(x)
        return out

    @property
    def divisor(self) -> int:
        """What every spatial size must be divisible by."""
        return 2 ** (LEVELS - 1)

    def _check(self, image: Tensor) -> None:
        if image.dim() != self.spatial_dims + 2:
            raise ValueError(
                f"FixedPointUNet in {self.spatial_dims}D takes (batch, channels, "
                f"{'height, width' if self.spatial_dims == 2 else 'depth, height, width'}), "
                f"found shape {tuple(image.shape)}"
            )
        if any(size % self.divisor for size in image.shape[2:]):
            raise ValueError(
                f"sizes {tuple(image.shape[2:])} are not divisible by {self.divisor}: pad the image, "
                "or use monai_unetq.training.predict, which pads and crops back"
            )


class _DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, spatial_dims: int, activation: str, dropout: float) -> None:
        convolution = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2]
        norm = (nn.BatchNorm2d, nn.BatchNorm3d)[spatial_dims - 2]
        super().__init__()
        for number, channels in ((1, inputs), (2, outputs)):
            self.add_module(f"conv{number}", convolution(channels, outputs, kernel_size=3, padding=1))
            self.add_module(f"norm{number}", norm(outputs))
            self.add_module(f"act{number}", _ACTIVATIONS[activation]())
        if dropout:
            self.add_module("dropout", nn.Dropout(dropout))


def _upsampling(channels: int, spatial_dims: int, kind: str) -> nn.Module:
    if kind == "linear":
        mode = ("bilinear", "trilinear")[spatial_dims - 2]
        return nn.Upsample(scale_factor=2, mode=mode, align_corners=False)
    return (nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial_dims - 2](channels, channels, 2, stride=2)
