"""What ``unetq data`` accepts and prints: downloaded data sets, or phantoms, in the layout of nnU-Net."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundle import KINDS

__all__ = ["add_data_command"]

_EXAMPLES = """\
examples:
  unetq data em --source isbi --out nnUNet_raw        train-volume.tif and train-labels.tif, or image/ and label/
  unetq data gm --source gm2016 --out nnUNet_raw      siteN-scMM-image.nii.gz with four masks each, or BIDS
  unetq data nih --source Pancreas-CT --out nnUNet_raw
                                                      TCIA's PANCREAS_*/ and label*.nii.gz, or JPEG slices
  unetq data em --phantom --out nnUNet_raw            drawn slices, where there is no data

The same command goes on after an interruption, and prepares again what changed.
"""

_PHANTOM_OPTIONS = ("dimensions", "size", "seed")


def add_data_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``data`` to the commands of ``unetq``.

    Args:
        commands: argparse's object for subcommands.
        command: makes the parser of one, from commands, name, summary and examples.
    """
    data = command(commands, "data", "prepare a data set for nnU-Net and MONAI, checked and split", _EXAMPLES)
    data.add_argument("kind", choices=KINDS, help="EM membranes, spinal cord grey matter, NIH pancreas CT")
    origin = data.add_mutually_exclusive_group(required=True)
    origin.add_argument("--source", type=Path, metavar="DIR", help="the downloaded data set")
    origin.add_argument("--phantom", action="store_true", help="draw a phantom instead")
    data.add_argument("--out", type=Path, metavar="DIR", required=True, help="where DatasetNNN_NAME is made")
    data.add_argument(
        "--dimensions", type=int, choices=(2, 3), help="of a phantom: slices or volumes (default: 2)"
    )
    data.add_argument("--size", type=int, metavar="N", help="of a phantom: height and width in px")
    data.add_argument("--seed", type=int, metavar="N", help="of a phantom (default: 0)")
    data.set_defaults(run=_data, after_interrupt="; the same command goes on", parser=data)


def _data(options: argparse.Namespace) -> None:
    chosen = {name: getattr(options, name) for name in _PHANTOM_OPTIONS if getattr(options, name) is not None}
    if chosen and not options.phantom:
        options.parser.error(f"--{next(iter(chosen))} is for --phantom")
    from ..datasets import folds, prepare, write_phantom

    if options.phantom:
        dataset = write_phantom(options.kind, options.out, **chosen)
    else:
        dataset = prepare(options.kind, options.source, options.out)
    splits = folds(dataset)
    first = splits[0]
    cases = len({name for split in splits for name in (*split.train, *split.validation, *split.test)})
    if options.kind == "em" and options.dimensions == 3:
        command = "nnUNetv2_plan_and_preprocess -d 501  (em_unet takes slices)"
    else:
        command = (
            f"python -m monai.bundle run --config_file bundles/{options.kind}_unet/configs/train.yaml "
            f"--dataset_dir {dataset}"
        )
    print(
        f"data set  {dataset}\n"
        f"cases     {cases}\n"
        f"folds     {len(splits)}; fold 0: {len(first.train)} train, {len(first.validation)} validation, "
        f"{len(first.test)} test\n\n"
        f"next: {command}"
    )
