"""What ``unetq reproduce`` accepts and prints: the 2019 paper's comparison on a data set of one's own."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundle import KINDS, find_bundle

__all__ = ["add_reproduce_command"]

_EXAMPLES = """\
examples:
  unetq reproduce em --data isbi --out study --preset quick        every row, minutes each on a CPU, to see it work
  unetq reproduce em --data isbi --out study                       width 16: about half an hour on 2 cores
  unetq reproduce nih --data Pancreas-CT --out study --preset paper --device cuda
  unetq reproduce gm --data gm2016 --out study --part 3/26         one row of 26: a job of a cluster's array
  unetq reproduce em --data isbi --out study --rows BNN "int4/binary learned"
  unetq reproduce gm --data gm2016 --out study --study dropout     the paper's finding on dropout; or float-layers

--data is a downloaded data set as 'unetq data' takes it, or a DatasetNNN_NAME that it made. The same command goes on
after an interruption, row by row; parts that share --out merge their results. Needs: pip install monai-unetq[bundle]
"""


def add_reproduce_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``reproduce`` to the commands of ``unetq``.

    Args:
        commands: argparse's object for subcommands.
        command: makes the parser of one, from commands, name, summary and examples.
    """
    reproduce = command(
        commands,
        "reproduce",
        "compare fixed-point, binary and ternary U-Nets as AskariHemmat et al. (2019) did",
        _EXAMPLES,
    )
    reproduce.add_argument(
        "kind", choices=KINDS, help="EM membranes, spinal cord grey matter, NIH pancreas CT"
    )
    reproduce.add_argument("--data", type=Path, metavar="DIR", required=True, help="the data set")
    reproduce.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="where everything is written"
    )
    reproduce.add_argument(
        "--preset",
        choices=("quick", "cpu", "paper"),
        default="cpu",
        help="quick: width 8, a few steps; cpu: width 16; paper: width 64, as long as the paper, for a GPU "
        "(default: %(default)s)",
    )
    reproduce.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        default=(1, 1),
        help="every N-th row, from the K-th (default: all)",
    )
    reproduce.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only, by their names")
    reproduce.add_argument(
        "--study",
        choices=("dropout", "float-layers"),
        help="instead of the table: dropout with and without quantization; first and last layer in float",
    )
    reproduce.add_argument(
        "--folds",
        type=_count,
        nargs="+",
        metavar="N",
        default=[0],
        help="splits of the data set, each row in all of them; their test cases are put together (default: 0)",
    )
    reproduce.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of weights, crops and order (default: %(default)s)"
    )
    reproduce.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: %(default)s)"
    )
    reproduce.set_defaults(run=_reproduce, after_interrupt="; the same command goes on")


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected K/N with 1 <= K <= N, such as 2/8, found {text!r}")
    return int(match[1]), int(match[2])


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")
    return int(text)


def _reproduce(options: argparse.Namespace) -> None:
    from ..reproduction import PRESETS, Comparison, paper_rows, prepared, study_rows, write_results

    kind = options.kind
    rows = paper_rows(kind) if options.study is None else study_rows(options.study)
    if options.rows:
        names = {row.name for row in rows}
        unknown = [name for name in options.rows if name not in names]
        if unknown:
            raise ValueError(f"--rows: there is no row {unknown[0]!r}; expected {', '.join(sorted(names))}")
        rows = tuple(row for row in rows if row.name in options.rows)
    number, parts = options.part
    comparison = Comparison(
        kind,
        prepared(kind, options.data, options.out),
        find_bundle(kind),
        options.out.resolve() / kind / options.preset,
        options.preset,
        PRESETS[options.preset][kind],
        tuple(dict.fromkeys(options.folds)),
        options.seed,
        options.device,
    )
    results = comparison.run(rows[number - 1 :: parts], lambda: write_results(comparison, figures=False))
    table = write_results(comparison)
    print(table)
    print(f"\nresults: {comparison.folder / 'results.md'}")
    failed = [result for result in results if result["status"] == "failed"]
    if failed:
        listed = ", ".join(f"{result['name']} ({result['activation']})" for result in failed)
        raise ValueError(
            f"{len(failed)} of {len(results)} rows failed: {listed}; each row's training.log under "
            f"{comparison.folder / 'rows'} says why; the same command tries them again"
        )
