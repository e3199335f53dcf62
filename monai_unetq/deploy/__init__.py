"""Quantized network ↔ files."""

from ..bits import pack_codes, pack_digits, pack_signs, unpack_codes, unpack_digits, unpack_signs
from .packed import inspect_packed, pack, unpack

__all__ = [
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
