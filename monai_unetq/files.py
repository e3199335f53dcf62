"""Files that are written as a whole or not at all. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["replace_file", "write_json"]


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file, atomically."""
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, and put it in its place when it is whole; else nothing of it stays."""
    scratch = path.with_name(path.name + ".part")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
