"""Makes monai-unetq's trainers known to nnU-Net, which imports every module of the folders in nnUNet_extTrainer."""

from monai_unetq.nnunet.trainer import nnUNetTrainerFixedPoint, nnUNetTrainerQAT, nnUNetTrainerSSQAT

__all__ = ["nnUNetTrainerFixedPoint", "nnUNetTrainerQAT", "nnUNetTrainerSSQAT"]
