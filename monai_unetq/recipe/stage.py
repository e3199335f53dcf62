"""What the stages of a recipe share: settings that a cached result depends on, versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..files import replace_file

__all__ = ["check_device", "open_stage", "versions"]


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: if it is not.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device '{device}' is not there: torch {torch.__version__} sees no GPU; use --device cpu"
        )


def versions(*more: str) -> dict[str, str]:
    """Versions that results depend on, and those of further packages."""
    found = {"python": platform.python_version()}
    for name in ("monai-unetq", "torch", "monai", "numpy", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def open_stage(folder: Path, settings: Mapping[str, Any], results: Sequence[str]) -> bool:
    """Make a stage's folder; True where it was begun with the same settings, else its results are cleared.

    Args:
        folder: of the stage.
        settings: what the results depend on; JSON.
        results: names of files.

    Raises:
        ValueError: if the folder holds such files but no ``stage.json``: the stage has not written them, so it does not
            remove them; nothing is changed then.
    """
    record = folder / "stage.json"
    text = json.dumps(settings, indent=1, sort_keys=True)
    if record.exists() and record.read_text(encoding="utf-8") == text:
        return True
    foreign = [] if record.exists() else [name for name in results if (folder / name).exists()]
    if foreign:
        raise ValueError(
            f"{folder}: holds {', '.join(foreign)} but no stage.json, so it was written by something else, and would be "
            "lost here; give another folder, or move the files away"
        )
    for name in results:
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(record, lambda path: path.write_text(text, encoding="utf-8"))
    return False
