"""The skip-supervision head: a convolution over a skip connection's feature that predicts the ground truth in training.

Guo et al. (ISCAS 2022) put one, followed by a sigmoid, on each skip connection during quantization-aware training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SupervisionHead"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class SupervisionHead(nn.Module):
    """A convolution of its own class, so that nothing that looks for a network's layers takes it for one of them.

    It stays float: it is gone when the network is used. The sigmoid (or softmax) is the loss's, which needs logits.

    Args:
        channels: of the skip feature.
        num_classes: channels of the logits, at least 1.
        spatial_dims: 1, 2 or 3.
        kernel_size: odd; the logits have the feature's size.
        device: of the weights.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        spatial_dims: int,
        kernel_size: int = 3,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_classes, channels, *[kernel_size] * spatial_dims, device=device)
        )
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch's convolutions

    def forward(self, feature: Tensor) -> Tensor:
        """Logits (N, num_classes, spatial…) of a feature (N, channels, spatial…)."""
        weight = self.weight
        # The network may be of half precision, or run its layers under an autocast that has ended.
        if feature.dtype != weight.dtype and not torch.is_autocast_enabled(feature.device.type):
            feature = feature.to(weight.dtype)
        out: Tensor = _CONVOLUTIONS[weight.dim() - 2](
            feature, weight, self.bias, padding=weight.shape[-1] // 2
        )
        return out

    def extra_repr(self) -> str:
        """Channels, classes and kernel."""
        classes, channels, *kernel = self.weight.shape
        return f"{channels}, {classes}, kernel_size={tuple(kernel)}"
