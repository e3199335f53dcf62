"""``unetq bundle``: where the MONAI bundles lie in a checkout or an installation, and how a copy is made."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "add_bundle_command", "copy_bundle", "find_bundle"]

KINDS = ("em", "gm", "nih")

_EXAMPLES = """\
examples:
  unetq bundle em --out em_unet
  python -m monai.bundle run --config_file em_unet/configs/train.yaml --bundle_root em_unet --dataset_dir Dataset501_EM

Running bundles needs: pip install monai-unetq[bundle]
"""


def add_bundle_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``bundle`` to the commands of ``unetq``.

    Args:
        commands: argparse's object for subcommands.
        command: makes the parser of one, from commands, name, summary and examples.
    """
    bundle = command(
        commands, "bundle", "copy a MONAI bundle: its configurations, metadata and documentation", _EXAMPLES
    )
    bundle.add_argument("kind", choices=KINDS, help="EM membranes, spinal cord grey matter, NIH pancreas CT")
    bundle.add_argument(
        "--out", type=Path, metavar="DIR", help="the bundle's folder, new or empty (default: ./KIND_unet)"
    )
    bundle.set_defaults(run=_bundle, after_interrupt="; nothing was written")


def copy_bundle(kind: str, out: Path) -> Path:
    """Copy a bundle to a new folder.

    Args:
        kind: ``em``, ``gm`` or ``nih``.
        out: a folder that does not exist, or is empty.

    Returns:
        the folder.

    Raises:
        FileExistsError: if the folder holds something, or is a file.
        FileNotFoundError: if the installation lacks the bundle.
    """
    source = find_bundle(kind)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not an empty folder; give another --out, or remove it")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    scratch.chmod(0o755)
    try:
        for file in _files(source):
            target = scratch / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _files(bundle: Path) -> list[Path]:
    """What a bundle consists of; not what trainings left in its ``models`` folder."""
    return [
        bundle / "LICENSE",
        *sorted(file for part in ("configs", "docs") for file in (bundle / part).iterdir() if file.is_file()),
        bundle / "models" / ".gitignore",
    ]


def find_bundle(kind: str) -> Path:
    """The folder of a bundle: beside the package in a checkout, among the installation's shared files in a wheel.

    Raises:
        FileNotFoundError: if the installation lacks the bundle.
    """
    name = f"{kind}_unet"
    beside = Path(__file__).resolve().parents[2]
    shared = Path("share") / "monai-unetq" / "bundles" / name
    candidates = [beside / "bundles" / name, Path(sys.prefix) / shared, beside / shared]  # last: pip --target
    try:
        listed = files("monai-unetq") or []
    except PackageNotFoundError:
        listed = []
    candidates += [Path(str(f.locate())).parent for f in listed if f.parts[-2:] == (name, "LICENSE")]
    for folder in candidates:
        if (folder / "LICENSE").is_file():
            return folder
    raise FileNotFoundError(
        f"bundle {name!r} is not part of this installation; install monai-unetq from its wheel again"
    )


def _bundle(options: argparse.Namespace) -> None:
    out = copy_bundle(options.kind, options.out or Path(f"{options.kind}_unet"))
    print(f"bundle: {out}")
    print(f"documentation: {out / 'docs' / 'README.md'}")
    print(
        f"next: unetq data {options.kind} --phantom --out .   (or --source DIR), then\n"
        f"  python -m monai.bundle run --config_file {out / 'configs' / 'train.yaml'} --bundle_root {out} "
        "--dataset_dir DIR"
    )
