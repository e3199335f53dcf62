"""The float trainers of ``benchmarks/nnunet.py``, for nnU-Net's ``nnUNet_extTrainer``: nnU-Net's own, shortened by the plans, and
one that trains its network on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from monai_unetq.training import cosine

__all__ = ["nnUNetTrainerStudyFloat", "nnUNetTrainerStudyOn"]

SECTION = "study"
"""Key in ``plans["configurations"][…]``: ``float_epochs``, ``epochs``, ``iterations``, ``val_iterations``, ``learning_rate``, ``adam``."""

THREADS = "UNETQ_STUDY_THREADS"
"""nnU-Net gives torch all cores of a machine with ``-device cpu``; here is the last word."""

if THREADS in os.environ:
    torch.set_num_threads(int(os.environ[THREADS]))


class nnUNetTrainerStudyFloat(nnUNetTrainer):  # noqa: N801 (nnU-Net's way to call trainers)
    """nnU-Net's trainer and schedule, as long as the plans say, with Adam where they say so."""

    epochs_key = "float_epochs"

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.section: dict[str, Any] = self.configuration_manager.configuration[SECTION]
        self.num_epochs = self.section[self.epochs_key]
        self.num_iterations_per_epoch = self.section["iterations"]
        self.num_val_iterations_per_epoch = self.section["val_iterations"]

    def configure_optimizers(self) -> tuple[Any, Any]:
        """nnU-Net's SGD, or Adam along the same polynomial."""
        if not self.section["adam"]:
            return super().configure_optimizers()
        rate = self.section["learning_rate"]
        optimizer = torch.optim.Adam(self.network.parameters(), rate)
        return optimizer, PolyLRScheduler(optimizer, rate, self.num_epochs)


class nnUNetTrainerStudyOn(nnUNetTrainerStudyFloat):  # noqa: N801
    """The control: begins with ``nnUNetTrainerStudyFloat``'s network of the same fold, and is trained in float as the quantized
    epochs train: Adam, half a cosine, as many steps.
    """

    epochs_key = "epochs"

    def initialize(self) -> None:
        """nnU-Net's, with the float trainer's weights."""
        super().initialize()
        file = Path(self.output_folder.replace(type(self).__name__, nnUNetTrainerStudyFloat.__name__))
        checkpoint = torch.load(file / "checkpoint_final.pth", map_location=self.device, weights_only=False)
        self.network.load_state_dict(checkpoint["network_weights"])

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Those of the quantized epochs."""
        optimizer = torch.optim.Adam(self.network.parameters(), self.section["learning_rate"])
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(self.num_epochs))
