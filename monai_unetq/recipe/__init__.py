"""The whole way from data or a float network to a packed quantized one, stage by stage, cached on disk."""

from .demo import IMAGE_FORMAT, Data, demo, evaluate, result_row, train_float, train_quantized
from .ssqat import END_BITS, ssqat, ssqat_network, ssqat_plan
from .stage import check_device, versions

__all__ = [
    "END_BITS",
    "IMAGE_FORMAT",
    "Data",
    "check_device",
    "demo",
    "evaluate",
    "result_row",
    "ssqat",
    "ssqat_network",
    "ssqat_plan",
    "train_float",
    "train_quantized",
    "versions",
]
