"""Makes trained medical segmentation networks small and fast, inside MONAI and nnU-Net.

Names resolve when they are first used (PEP 562), so that importing the package imports neither torch nor MONAI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import datasets, networks, recipe, sensitivity, training, transforms
    from .allocation import allocate
    from .deploy import export, inspect_packed, pack, unpack
    from .formats import QFormat
    from .plan import LayerPlan, QuantPlan
    from .sensitivity import hessian_traces
    from .surgery import (
        attach_supervision,
        attach_teacher,
        dequantize,
        equalize,
        find_skips,
        fold,
        observe,
        plan_of,
        quantize,
        split,
        strip,
        tie,
    )
    from .training import calibrate

__version__ = "0.2.0"

__all__ = [
    "LayerPlan",
    "QFormat",
    "QuantPlan",
    "__version__",
    "allocate",
    "attach_supervision",
    "attach_teacher",
    "calibrate",
    "datasets",
    "dequantize",
    "equalize",
    "export",
    "find_skips",
    "fold",
    "hessian_traces",
    "inspect_packed",
    "networks",
    "observe",
    "pack",
    "plan_of",
    "quantize",
    "recipe",
    "sensitivity",
    "split",
    "strip",
    "tie",
    "training",
    "transforms",
    "unpack",
]

_HOME = {
    "LayerPlan": "plan",
    "QFormat": "formats",
    "QuantPlan": "plan",
    "allocate": "allocation",
    "attach_supervision": "surgery",
    "attach_teacher": "surgery",
    "calibrate": "training",
    "dequantize": "surgery",
    "equalize": "surgery",
    "export": "deploy",
    "find_skips": "surgery",
    "fold": "surgery",
    "hessian_traces": "sensitivity",
    "inspect_packed": "deploy",
    "observe": "surgery",
    "pack": "deploy",
    "plan_of": "surgery",
    "quantize": "surgery",
    "split": "surgery",
    "strip": "surgery",
    "tie": "surgery",
    "unpack": "deploy",
}
"""Public name → the module of ours that defines it."""

_SUBMODULES = frozenset({"datasets", "networks", "recipe", "sensitivity", "training", "transforms"})


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
