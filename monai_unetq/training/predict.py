"""Prediction of whole images of any size: pad to what the network needs, run, crop back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["predict", "predict_logits"]


@torch.no_grad()
def predict_logits(network: nn.Module, image: Tensor, divisor: int = 8) -> Tensor:
    """Logits for an image whose sizes need not be divisible.

    The image is padded at its far ends by reflection (by repetition where it is too small to reflect) and the
    logits are cropped back.

    Args:
        network: in whatever mode it is; evaluation is the caller's to set.
        image: (N, C, spatial…).
        divisor: what every spatial size must be divisible by.

    Returns:
        (N, classes, spatial…) of the image's size.
    """
    sizes = image.shape[2:]
    missing = [-size % divisor for size in sizes]
    if any(missing):
        mode = "reflect" if all(m < s for m, s in zip(missing, sizes, strict=True)) else "replicate"
        image = F.pad(image, [p for m in reversed(missing) for p in (0, m)], mode=mode)
    logits: Tensor = network(image)
    for axis, size in enumerate(sizes, start=2):
        logits = logits.narrow(axis, 0, size)
    return logits


def predict(network: nn.Module, image: np.ndarray, divisor: int = 8) -> np.ndarray:
    """The foreground of one image, where the logit is positive (probability above 0.5).

    Args:
        network: with one output channel; set to evaluation here.
        image: (C, spatial…), float.
        divisor: what every spatial size must be divisible by.

    Returns:
        (1, spatial…), uint8, {0, 1}.

    Raises:
        ValueError: if the image has another number of channels than the network takes, or holds NaN.
    """
    first = next((m for m in network.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if first is not None and first.in_channels != image.shape[0]:
        raise ValueError(f"the image has {image.shape[0]} channels, the network takes {first.in_channels}")
    if not np.isfinite(image).all():
        raise ValueError("the image holds NaN or infinity: repair or exclude it")
    network.eval()
    device = next(network.parameters()).device
    logits = predict_logits(
        network, torch.tensor(np.ascontiguousarray(image), dtype=torch.float32, device=device)[None], divisor
    )
    return (logits[0] > 0).to(torch.uint8).cpu().numpy()
