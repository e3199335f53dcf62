"""Quantized network ↔ files."""

from .bits import pack_codes, unpack_codes
from .packed import inspect_packed, pack, unpack

__all__ = ["inspect_packed", "pack", "pack_codes", "unpack", "unpack_codes"]
