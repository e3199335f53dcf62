"""What ``unetq allocate`` accepts and prints: bit widths under budgets, from measured sensitivities."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inspect import aligned

if TYPE_CHECKING:
    from ..plan import QuantPlan
    from ..sensitivity import Sensitivities

__all__ = ["add_allocate_command"]

_EXAMPLES = """\
examples:
  unetq allocate sensitivity.json --budget size=8x --out plan.json
  unetq allocate sensitivity.json --budget weights=4bits --budget activations=6bits --choices 2,4,8 --out plan.json
  unetq allocate sensitivity.json --budget bops=40x --fix first=8 --keep-float last --out plan.json
  unetq allocate sensitivity.json --budget size=10x --at-least '*[skip]=4' --group 'down.*,up.*' --out plan.json
  unetq allocate sensitivity.json --budget size=8x --out plan.json --pareto front.png
  unetq allocate sensitivity.json --budget size=8x --method random --seed 1 --out control.json

Budgets: size=8x or size=1.5MiB (all parameters), weights=4bits and activations=6bits (averages), bops=40x, energy=10x;
8x is 8 times less than in float32. All of them are kept. Patterns are layers (up.0.conv), parts (up.0.conv[skip]) or
tensors (up.0.conv.weight[skip]), with * and ? for anything.
"""


def add_allocate_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``allocate`` to the commands of ``unetq``.

    Args:
        commands: argparse's object for subcommands.
        command: makes the parser of one, from commands, name, summary and examples.
    """
    allocate = command(
        commands, "allocate", "choose each layer's bit widths under a budget, the least sensitivity lost", _EXAMPLES
    )  # fmt: skip
    allocate.add_argument("sensitivities", type=Path, metavar="FILE", help="what 'unetq sensitivity' wrote")
    allocate.add_argument(
        "--budget",
        action="append",
        required=True,
        metavar="WHAT=HOW-MUCH",
        help="such as size=8x; repeatable",
    )
    allocate.add_argument("--out", type=Path, metavar="FILE", required=True, help="the plan to write")
    allocate.add_argument(
        "--choices",
        type=_widths,
        metavar="BITS,…",
        default=(2, 3, 4, 6, 8),
        help="bit widths (default: 2,3,4,6,8)",
    )
    allocate.add_argument(
        "--method",
        choices=("optimal", "uniform", "random"),
        default="optimal",
        help="uniform and random are controls at the same budget (default: %(default)s)",
    )
    allocate.add_argument("--seed", type=int, metavar="N", default=0, help="of random (default: %(default)s)")
    allocate.add_argument(
        "--keep-float", nargs="+", metavar="PATTERN", default=[], help="tensors that stay float"
    )
    for name, what in (("fix", "exactly"), ("at-least", "at least"), ("at-most", "at most")):
        allocate.add_argument(
            f"--{name}",
            type=_pattern,
            nargs="+",
            metavar="PATTERN=BITS",
            default=[],
            help=f"tensors of {what} so many bits",
        )
    allocate.add_argument(
        "--group",
        type=lambda text: text.split(","),
        action="append",
        metavar="PATTERN,…",
        default=[],
        help="layers that get the same widths; repeatable",
    )
    allocate.add_argument(
        "--pareto",
        type=Path,
        metavar="FILE.png",
        help="draw the front over the first budget, the other budgets kept",
    )
    allocate.set_defaults(run=_allocate, after_interrupt="")


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(bits) for bits in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected bit widths such as 2,4,8, found {text!r}") from None


def _pattern(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdecimal():
        raise argparse.ArgumentTypeError(f"expected PATTERN=BITS such as 'up.*=4', found {text!r}")
    return pattern, int(bits)


def _allocate(options: argparse.Namespace) -> None:
    from ..allocation import Budget, allocate, budget_steps, budgets_reached, pareto
    from ..sensitivity import Sensitivities

    sensitivities = Sensitivities.load(options.sensitivities)
    constraints: dict[str, Any] = {
        "choices": options.choices,
        "keep_float": options.keep_float,
        "fixed": dict(options.fix),
        "at_least": dict(options.at_least),
        "at_most": dict(options.at_most),
        "groups": options.group,
    }
    plan = allocate(
        sensitivities, budget=options.budget, method=options.method, seed=options.seed, **constraints
    )
    points = []
    if options.pareto is not None:
        first, *others = options.budget
        steps = budget_steps(sensitivities, Budget.parse(first).quantity, **constraints)
        points = pareto(sensitivities, budgets=steps, beside=others, **constraints)
    plan.save(options.out)
    if options.pareto is not None:
        from ..report.allocation import pareto_figure

        pareto_figure([point.to_json() for point in points], options.pareto)
    print(_table(sensitivities, plan))
    reached = budgets_reached(sensitivities, options.budget, plan)
    print()
    for asked, found in zip(options.budget, reached, strict=True):
        print(f"{asked}: {found}")
    print(f"plan: {options.out}")


def _table(sensitivities: Sensitivities, plan: QuantPlan) -> str:
    from ..allocation import omega_of
    from ..parts import WHOLE
    from ..sensitivity.table import tensor_name

    omegas = omega_of(sensitivities, plan)
    rows, total = [], 0.0
    for unit in sensitivities.units:
        layer = plan[unit.layer]
        names = [tensor_name(unit.layer, unit.part, kind) for kind in ("weight", "input")]
        omega = math.fsum(omegas.get(name, 0.0) for name in names)
        total += omega
        part = "" if unit.part == WHOLE else unit.part
        weight, input = layer.weight_of(unit.part), layer.input_of(unit.part)
        rows.append((unit.layer, part, str(weight), str(input), f"{omega:.3g}"))
    return aligned(("layer", "part", "weight", "input", "Ω"), [*rows, ("total", "", "", "", f"{total:.3g}")])
