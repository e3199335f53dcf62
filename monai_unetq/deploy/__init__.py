"""Quantized network ↔ files. What needs ONNX is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..bits import pack_codes, pack_digits, pack_signs, unpack_codes, unpack_digits, unpack_signs
from .packed import inspect_packed, pack, unpack

if TYPE_CHECKING:
    from .exporting import export

__all__ = [
    "export",
    "inspect_packed",
    "pack",
    "pack_codes",
    "pack_digits",
    "pack_signs",
    "unpack",
    "unpack_codes",
    "unpack_digits",
    "unpack_signs",
]


def __getattr__(name: str) -> Any:
    if name != "export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(f"{__name__}.exporting").export
    except ImportError as error:
        raise ImportError(f"exporting needs ONNX: pip install monai-unetq[onnx] ({error})") from error
