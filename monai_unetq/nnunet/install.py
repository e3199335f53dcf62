"""How nnU-Net finds the trainers: a folder for nnUNet_extTrainer, or a module in nnunetv2's own folder.

Imports neither torch nor nnunetv2, and writes into nnunetv2's folder only what it can recognize again.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent

from ..files import replace_file

__all__ = ["external_folder", "link", "unlink"]

MODULE = "unetq_trainers.py"
MARK = "# Written by `unetq nnunet link`; `unetq nnunet unlink` removes it."


def external_folder() -> Path:
    """The folder to name in nnUNet_extTrainer."""
    return Path(__file__).parent / "external"


def link() -> Path:
    """Write the module into nnunetv2's trainer folder; once more, and nothing changes.

    Returns:
        the file.

    Raises:
        ImportError: if nnunetv2 is not installed.
        FileExistsError: if there is a file of that name that ``link`` has not written.
        PermissionError: if the folder cannot be written.
    """
    file = _target()
    if file.exists() and not _ours(file):
        raise FileExistsError(f"{file}: exists, and was not written by `unetq nnunet link`; move it away")
    # nnU-Net imports the module in every search; it must not fail where monai-unetq is gone.
    source = (external_folder() / MODULE).read_text(encoding="utf-8")
    text = f"{MARK}\ntry:\n{indent(source, '    ')}except ModuleNotFoundError:\n    pass\n"
    try:
        replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise PermissionError(
            f"{file.parent}: cannot be written ({error.strerror}); leave the installation as it is, and use\n"
            '  export nnUNet_extTrainer="$(unetq nnunet path)"'
        ) from None
    return file


def unlink() -> Path | None:
    """Remove the module again.

    Returns:
        the file that was removed; None where there was none.

    Raises:
        ImportError: if nnunetv2 is not installed.
        FileExistsError: if the file of that name is not one that ``link`` has written.
        PermissionError: if it cannot be removed.
    """
    file = _target()
    if not file.exists():
        return None
    if not _ours(file):
        raise FileExistsError(f"{file}: was not written by `unetq nnunet link`, so it stays")
    try:
        os.unlink(file)
    except OSError as error:
        raise PermissionError(f"{file}: cannot be removed ({error.strerror})") from None
    return file


def _target() -> Path:
    found = find_spec("nnunetv2")
    if found is None or found.origin is None:
        raise ImportError("nnunetv2 is not installed: pip install monai-unetq[nnunet]")
    return Path(found.origin).parent / "training" / "nnUNetTrainer" / MODULE


def _ours(file: Path) -> bool:
    return file.read_text(encoding="utf-8", errors="replace").startswith(MARK)
