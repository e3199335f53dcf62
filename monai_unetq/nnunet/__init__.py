"""The plugin for nnU-Net v2: trainers, requests in the plans, and how nnU-Net finds them.

The trainers are in ``nnunet.trainer``, which imports nnunetv2; nothing else here does.
"""

from .install import external_folder, link, unlink
from .plans import find_dataset, write_plans
from .request import SECTION, Request

__all__ = ["SECTION", "Request", "external_folder", "find_dataset", "link", "unlink", "write_plans"]
