"""What ``unetq`` accepts on the command line, what it prints, and how it fails.

Imports nothing heavy: each command imports what it runs, so that ``unetq --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..formats import QFormat
from .allocate import add_allocate_command
from .bundle import add_bundle_command
from .cost import add_cost_command
from .data import add_data_command
from .export import add_export_command, add_verify_command
from .inspect import add_inspect_command, aligned
from .nnunet import add_nnunet_command
from .reproduce import add_reproduce_command
from .sensitivity import add_sensitivity_command

__all__ = ["main"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""

_DEMO_EXAMPLES = """\
examples:
  unetq demo                                  on a generated membrane phantom, about 5 minutes on 2 cores
  unetq demo --data em --out em-demo          on EM slices: em/image/*.png and em/label/*.png
  unetq demo --data em --weights int4 --activations int6 --width 32

An interrupted run goes on where it was when the same command is given again.
"""

_FORMAT_EXAMPLES = """\
examples:
  unetq format Q0.4                           signed fixed point, -8/16 to 7/16
  unetq format UQ6.0 Q8.8 int4 ternary float
"""

_EPILOG = """\
examples:
  unetq demo --out unetq-demo                 train, quantize and measure a small U-Net; write a report
  unetq format Q0.4 UQ6.0                     what number formats can represent
  unetq inspect unetq-demo/model.unetq        what a packed model, a bundle or an nnU-Net holds
  unetq data em --source DIR --out DIR        prepare a downloaded data set for nnU-Net and MONAI
  unetq reproduce em --data DIR --out DIR     the 2019 paper's comparison on your data
  unetq sensitivity MODEL --data DIR --out F  how much each tensor minds being rounded
  unetq nnunet path                           let nnU-Net train quantized networks
  unetq export MODEL --to openvino --out DIR  a trained model for OpenVINO, ONNX Runtime, FINN or integers
  unetq verify DIR                            does an exported model compute what it should?

'unetq COMMAND --help' explains a command. UNETQ_DEBUG=1 shows the traceback of an error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``unetq``.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` by default.

    Returns:
        the exit status: 0, 2 for an error of the user's, 130 when interrupted.

    Raises:
        SystemExit: for ``--help``, ``--version`` and arguments that do not parse, as argparse does.
        Exception: with ``UNETQ_DEBUG=1`` in the environment, errors come through as they are.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["unetq", *arguments])
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"unetq: interrupted{options.after_interrupt}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("UNETQ_DEBUG", "0") not in ("", "0"):
            raise
        print(f"unetq: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unetq",
        description="Make trained medical segmentation networks small: quantize, measure, pack.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"unetq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _command(
        commands,
        "demo",
        "train a small U-Net in float, make it fixed point, measure both and write a report",
        _DEMO_EXAMPLES,
    )
    demo.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with image/ and label/ (default: a phantom)"
    )
    demo.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("unetq-demo"), help="results (default: ./%(default)s)"
    )
    demo.add_argument(
        "--width", type=_positive, metavar="N", help="channels of the first level (64 in the paper)"
    )
    demo.add_argument("--steps", type=_positive, metavar="N", help="training steps in float")
    demo.add_argument("--qat-steps", type=_positive, metavar="N", help="steps of quantization-aware training")
    demo.add_argument(
        "--weights", metavar="FORMAT", default="Q0.4", help="format of weights (default: %(default)s)"
    )
    demo.add_argument(
        "--activations", metavar="FORMAT", default="Q6.0", help="format of activations (default: %(default)s)"
    )
    demo.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="seed of data, weights and order (default: %(default)s)",
    )
    demo.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: %(default)s)"
    )
    demo.set_defaults(run=_demo, after_interrupt="; the same command resumes the run")

    formats = _command(
        commands, "format", "print bits, levels, step and range of number formats", _FORMAT_EXAMPLES
    )
    formats.add_argument(
        "names", nargs="+", metavar="NAME", help="Q0.4, UQ6.0, int4, uint8, ternary, binary, float, …"
    )
    formats.set_defaults(run=_format, after_interrupt="")

    add_inspect_command(commands, _command)
    add_allocate_command(commands, _command)
    add_cost_command(commands, _command)
    add_data_command(commands, _command)
    add_bundle_command(commands, _command)
    add_nnunet_command(commands, _command)
    add_reproduce_command(commands, _command)
    add_sensitivity_command(commands, _command)
    add_export_command(commands, _command)
    add_verify_command(commands, _command)
    return parser


def _command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _demo(options: argparse.Namespace) -> None:
    for text in (options.weights, options.activations):
        QFormat(text)  # a misspelled format fails before torch is imported
    from .. import recipe
    from ..report import text_table

    result = recipe.demo(
        data=options.data,
        out=options.out,
        width=options.width,
        steps=options.steps,
        qat_steps=options.qat_steps,
        weights=options.weights,
        activations=options.activations,
        seed=options.seed,
        device=options.device,
        command=options.command,
    )
    print(text_table(result))
    print(f"\nreport: {options.out / 'report.html'}")


def _format(options: argparse.Namespace) -> None:
    rows = [_format_row(QFormat(name)) for name in options.names]
    print(aligned(("format", "kind", "signed", "bits", "levels", "step", "min", "max"), rows))


def _format_row(number_format: QFormat) -> tuple[str, ...]:
    absent = "-" if number_format.is_float else "calibrated"
    values = (number_format.step, number_format.min, number_format.max)
    return (
        str(number_format),
        number_format.kind,
        "yes" if number_format.signed else "no",
        str(number_format.bits),
        str(number_format.levels),
        *(absent if value is None else f"{value:.10g}" for value in values),
    )
