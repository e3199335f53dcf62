"""``unetq nnunet``: make the trainers known to nnU-Net, and write plans that say how they train."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_nnunet_command"]

_EXAMPLES = """\
examples:
  export nnUNet_extTrainer="$(unetq nnunet path)"
  nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerSSQAT          mixed 4-bit weights, 6-bit activations

  unetq nnunet plan -d 4 -c 3d_fullres --weights int4 --activations int6 -o nnUNetPlansW4A6
  nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerSSQAT -p nnUNetPlansW4A6
  nnUNetv2_predict -i in -o out -d 4 -c 3d_fullres -f 0 -tr nnUNetTrainerSSQAT -p nnUNetPlansW4A6
"""

_PATH_EXAMPLES = """\
examples:
  export nnUNet_extTrainer="$(unetq nnunet path)"
"""

_LINK_EXAMPLES = """\
examples:
  unetq nnunet link && nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerSSQAT
  unetq nnunet unlink
"""

_BUNDLE_EXAMPLES = """\
examples:
  unetq nnunet bundle nnUNet_results/Dataset004_Hippocampus/nnUNetTrainerSSQAT__nnUNetPlans__3d_fullres --out hippocampus
  python -m monai.bundle run --config_file hippocampus/configs/inference.yaml --bundle_root hippocampus --images in

Running bundles needs: pip install monai-unetq[bundle,nnunet]
"""

_PLAN_EXAMPLES = """\
examples:
  unetq nnunet plan -d 4 -c 3d_fullres --weights int4 --activations int6 -o nnUNetPlansW4A6
  unetq nnunet plan -d 4 -c 3d_fullres --budget weights=4.0bits --choices 2,3,4,6,8 --activations int6 -o nnUNetPlansM4A6
  unetq nnunet plan -d 4 -c 2d --weights int8 --activations int8 --epochs 2 --float-epochs 2 --iterations 4 -o nnUNetPlansShort

The new plans reuse the preprocessed data. Training begins with the finished fold of --base-trainer with -p, where there
is one; otherwise with --float-epochs in float.
"""


def add_nnunet_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``nnunet`` to the commands of ``unetq``.

    Args:
        commands: argparse's object for subcommands.
        command: makes the parser of one, from commands, name, summary and examples.
    """
    nnunet = command(commands, "nnunet", "train quantized networks with nnU-Net's own commands", _EXAMPLES)
    actions = nnunet.add_subparsers(title="commands", metavar="COMMAND", required=True)
    path = command(actions, "path", "print the folder to name in nnUNet_extTrainer", _PATH_EXAMPLES)
    path.set_defaults(run=_path, after_interrupt="")
    link = command(
        actions, "link", "write a module into nnunetv2's folder, instead of the variable", _LINK_EXAMPLES
    )
    link.set_defaults(run=_link, after_interrupt="")
    unlink = command(actions, "unlink", "remove that module again", _LINK_EXAMPLES)
    unlink.set_defaults(run=_unlink, after_interrupt="")
    bundle = command(
        actions, "bundle", "write a trained folder as a MONAI bundle for inference", _BUNDLE_EXAMPLES
    )
    bundle.add_argument("folder", type=Path, help="TRAINER__PLANS__CONFIGURATION in nnUNet_results")
    bundle.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the bundle's folder, new or empty"
    )
    bundle.add_argument(
        "-f", dest="folds", nargs="+", metavar="N", help="folds (default: all that are finished)"
    )
    bundle.set_defaults(run=_bundle, after_interrupt="; nothing was written")
    plan = command(actions, "plan", "write plans that say how a configuration is quantized", _PLAN_EXAMPLES)
    plan.add_argument("-d", dest="dataset", required=True, metavar="ID", help="data set, by number or name")
    plan.add_argument("-c", dest="configuration", required=True, metavar="NAME", help="2d, 3d_fullres, …")
    plan.add_argument(
        "-p",
        dest="plans",
        default="nnUNetPlans",
        metavar="NAME",
        help="plans to begin with (default: %(default)s)",
    )
    plan.add_argument("-o", dest="out", required=True, metavar="NAME", help="identifier of the new plans")
    widths = plan.add_mutually_exclusive_group(required=True)
    widths.add_argument("--weights", metavar="FORMAT", help="format of all weights: int4, Q1.7, …")
    widths.add_argument(
        "--budget", nargs="+", metavar="LIMIT", help="allocated in each fold: weights=4.0bits, …"
    )
    plan.add_argument(
        "--choices", type=_numbers, metavar="N,N", help="bit widths for the budget (default: 2,3,4,6,8)"
    )
    plan.add_argument("--activations", metavar="FORMAT", help="format of all activations: int6, Q4.4, …")
    plan.add_argument(
        "--norms",
        metavar="FORMAT",
        help="of what instance norms read: int8 runs them on integers (default: float)",
    )
    plan.add_argument("--scale", choices=("power-of-two", "free"), help="of intN (default: power-of-two)")
    plan.add_argument("--metric", choices=("sqnr", "fisher", "hessian"), help="of the budget (default: sqnr)")
    for name, kind, text in (
        ("epochs", int, "of quantized training (default: 100)"),
        ("float-epochs", int, "of the float phase, where it is not skipped (default: 1000)"),
        ("iterations", int, "steps an epoch (default: 250)"),
        ("val-iterations", int, "validation steps an epoch (default: 50)"),
        ("learning-rate", float, "Adam's, quantized (default: 0.001)"),
        ("supervision", float, "weight of the heads on the skips, SS-QAT only (default: 0.1)"),
        ("distillation", float, "weight of the float network as a teacher, SS-QAT only (default: 1)"),
        ("calibration-batches", int, "of training cases (default: 8)"),
    ):
        plan.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    plan.add_argument(
        "--no-equalization", dest="equalized", action="store_const", const=False,
        help="leave the channels of activations at the ranges that they have",
    )  # fmt: skip
    plan.add_argument(
        "--base-trainer", metavar="NAME", help="trainer of the float network (default: nnUNetTrainer)"
    )
    plan.set_defaults(run=_plan, after_interrupt="; nothing was written", parser=plan)


_KEYS = (
    "weights", "budget", "choices", "activations", "norms", "scale", "metric", "epochs", "float_epochs", "iterations",
    "val_iterations", "learning_rate", "supervision", "distillation", "equalized", "calibration_batches", "base_trainer",
)  # fmt: skip
"""Of the request, as the options spell them."""


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 2,3,4, found {text!r}") from None


def _path(options: argparse.Namespace) -> None:
    from ..nnunet import external_folder

    print(external_folder())


def _link(options: argparse.Namespace) -> None:
    from ..nnunet import link

    print(f"trainers: {link()}")


def _unlink(options: argparse.Namespace) -> None:
    from ..nnunet import unlink

    removed = unlink()
    print("nothing to remove" if removed is None else f"removed: {removed}")


def _bundle(options: argparse.Namespace) -> None:
    from ..nnunet.inference import write_bundle

    out = write_bundle(options.folder, options.out, options.folds)
    print(f"bundle: {out}")
    print(
        f"next: python -m monai.bundle run --config_file {out / 'configs' / 'inference.yaml'} --bundle_root {out} "
        "--images FOLDER"
    )


def _plan(options: argparse.Namespace) -> None:
    from ..allocation import Budget
    from ..nnunet import Request, find_dataset, write_plans

    for text in options.budget or ():
        Budget.parse(text)
    section = {key: getattr(options, key) for key in _KEYS if getattr(options, key) is not None}
    defaults = Request(weights="int8", activations="int8")
    if options.weights is not None and options.activations is None:
        options.parser.error("--activations is missing, such as --activations int6")
    file = write_plans(
        find_dataset(options.dataset), options.plans, options.configuration, options.out, section, defaults
    )
    print(f"plans: {file}")
    print(
        f"next: nnUNetv2_train {options.dataset} {options.configuration} 0 -tr nnUNetTrainerSSQAT -p {options.out}"
    )
