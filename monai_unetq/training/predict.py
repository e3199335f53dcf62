"""Prediction of whole images of any size: pad to what the network needs, run, crop back; volumes slice by slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WholeSliceInferer", "predict", "predict_logits"]


@torch.no_grad()
def predict_logits(network: Callable[..., Tensor], image: Tensor, divisor: int = 8) -> Tensor:
    """Logits for an image whose sizes need not be divisible.

    The image is padded at its far ends by reflection (by repetition where it is too small to reflect) and the
    logits are cropped back.

    Args:
        network: or any function of a tensor; evaluation mode is the caller's to set.
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


class WholeSliceInferer(Inferer):
    """MONAI inferer that runs a 2D network on whole slices: of images as they are, of volumes one after another.

    A slice goes through in one piece, so that nothing depends on where windows fall.

    Args:
        divisor: what height and width must be divisible by; slices are padded and cropped back.
        slices: how many slices of a volume go through the network at once.
    """

    def __init__(self, divisor: int = 8, slices: int = 4) -> None:
        super().__init__()
        self.divisor = divisor
        self.slices = slices

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Logits of images (N, C, H, W), or of volumes (N, C, H, W, slices); of the input's size.

        Raises:
            ValueError: for a tensor of another rank.
        """

        def run(image: Tensor) -> Tensor:
            return network(image, *args, **kwargs)

        if inputs.dim() == 4:
            return predict_logits(run, inputs, self.divisor)
        if inputs.dim() != 5:
            raise ValueError(
                f"found a tensor of shape {tuple(inputs.shape)}, expected (batch, channels, height, width) or "
                "(batch, channels, height, width, slices)"
            )
        stack = inputs.movedim(-1, 1).flatten(0, 1)
        logits = torch.cat([predict_logits(run, part, self.divisor) for part in stack.split(self.slices)])
        return logits.unflatten(0, (inputs.shape[0], inputs.shape[-1])).movedim(1, -1)
