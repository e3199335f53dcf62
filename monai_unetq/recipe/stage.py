"""What the stages of a recipe share: settings that a cached result depends on, files written atomically, versions."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["check_device", "open_stage", "replace_file", "versions", "write_json"]


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: if it is not.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device '{device}' is not there: torch {torch.__version__} sees no GPU; use --device cpu"
        )


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("monai-unetq", "torch", "monai", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file, atomically."""
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def open_stage(folder: Path, settings: Mapping[str, Any], results: Sequence[str]) -> bool:
    """Make a stage's folder; True where it was begun with the same settings, else its results are cleared.

    Args:
        folder: of the stage.
        settings: what the results depend on; JSON.
        results: names of files.
    """
    record = folder / "stage.json"
    text = json.dumps(settings, indent=1, sort_keys=True)
    if record.exists() and record.read_text(encoding="utf-8") == text:
        return True
    for name in results:
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(record, lambda path: path.write_text(text, encoding="utf-8"))
    return False


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, and put it in its place when it is whole."""
    scratch = path.with_name(path.name + ".part")
    write(scratch)
    os.replace(scratch, path)
