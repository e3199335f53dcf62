"""An exported model as a module, so that MONAI's inferers and bundles run it as they run the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from ..runtime.engine import load

__all__ = ["ExportedNetwork"]


class ExportedNetwork(nn.Module):
    """What ``unetq export`` wrote for ONNX Runtime, OpenVINO or integers, run on the CPU; for inference only.

    Args:
        folder: the exported folder.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder is damaged, or its target is for other programs.
        ImportError: without the engine's package.

    Example:
        >>> network = ExportedNetwork("em-openvino")  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._engine = load(folder)
        self.folder = Path(folder)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, classes, spatial…) of an image (N, C, spatial…), on the image's device, in float32; a MetaTensor of one."""
        array = np.ascontiguousarray(image.detach().cpu().numpy(), dtype=np.float32)
        logits = torch.from_numpy(np.ascontiguousarray(self._engine(array))).to(image.device)
        # As a network of layers: the image's file name and affine go on to what saves the prediction.
        return MetaTensor(logits).copy_meta_from(image) if isinstance(image, MetaTensor) else logits

    def extra_repr(self) -> str:
        """The folder."""
        return str(self.folder)
