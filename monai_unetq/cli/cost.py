"""What ``unetq cost`` accepts and prints: size, memory, operations and energy of a model under a plan."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inspect import LoadedModel, add_model_arguments, aligned, load_model, on_meta

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..allocation import NetworkCost
    from ..plan import QuantPlan
    from ..surgery.workload import Workload

__all__ = ["add_cost_command"]

_EXAMPLES = """\
examples:
  unetq cost bundles/em_unet                                everything in float32
  unetq cost bundles/em_unet --plan plan.json --size 512 512
  unetq cost nnUNet_results/Dataset502_GM/nnUNetTrainer__nnUNetPlans__3d_fullres --plan plan.json --figure cost.png
  unetq cost bundles/em_unet --plan model.unetq --json      the plan that a packed model carries
  unetq cost model.unetq                                    a packed model's weights

BOPs are MACs × bits of the weight × bits of the input. Energy is that of the MACs by Horowitz's table for 45 nm; memory
is not in it. A packed model holds no network, so MACs and activations need the bundle or the folder it came from.
"""


def add_cost_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``cost`` to the commands of ``unetq``.

    Args:
        commands: argparse's object for subcommands.
        command: makes the parser of one, from commands, name, summary and examples.
    """
    cost = command(commands, "cost", "print what each layer of a model costs under a plan", _EXAMPLES)
    add_model_arguments(cost)
    cost.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="a plan, or a packed model for the plan that it carries (default: all float)",
    )
    cost.add_argument("--figure", type=Path, metavar="FILE.png", help="draw what each layer costs")
    cost.set_defaults(run=_cost, after_interrupt="")


def _cost(options: argparse.Namespace) -> None:
    loaded = load_model(options)
    if loaded is None:
        _packed(options)
        return
    from ..allocation import layer_costs
    from ..plan import QuantPlan

    plan = QuantPlan() if options.plan is None else _plan(options.plan)
    held = _workload(loaded, plan)
    try:
        cost = layer_costs(held.units, plan, held.other_parameters)
    except ValueError as error:
        raise ValueError(f"{options.plan}: {error}") from None
    in_float = layer_costs(held.units, {}, held.other_parameters)
    document = {**loaded.head, "image": list(held.image[1:]), **cost.to_json()}
    if options.figure is not None:
        from ..report.allocation import cost_figure

        cost_figure(document["layers"], options.figure)
    print(json.dumps(document, indent=1) if options.json else _text(cost, in_float, held))


def _plan(file: Path) -> QuantPlan:
    from ..plan import QuantPlan

    if file.suffix == ".json":
        return QuantPlan.load(file)
    from ..deploy import inspect_packed

    return QuantPlan.from_json(inspect_packed(file)["plan"], f"{file}: plan")


def _workload(loaded: LoadedModel, plan: QuantPlan) -> Workload:
    """What the network computes, split where the plan has formats for parts."""
    from ..parts import WHOLE
    from ..surgery import split
    from ..surgery.workload import workload

    in_parts = any(layer.parts != (WHOLE,) for layer in plan.layers.values())

    def counted(network: nn.Module, example: Tensor) -> Workload:
        return workload(split(network, example) if in_parts else network, example)

    return on_meta(loaded.network, loaded.example, counted)


def _packed(options: argparse.Namespace) -> None:
    """A packed model's weights: it does not hold the network, so nothing is known of what is computed."""
    from ..deploy import inspect_packed

    for name in ("plan", "figure"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name}: the packed file {options.model} holds no network, so there are no MACs and no activations "
                f"to count; give the bundle or nnU-Net folder it came from, with --plan {options.model}"
            )
    found = inspect_packed(options.model)
    keys = ("name", "weight", "input", "parameters", "bytes")
    layers = [{key: layer[key] for key in keys} for layer in found["layers"]]
    totals = {key: sum(layer[key] for layer in layers) for key in ("parameters", "bytes")}
    if options.json:
        print(json.dumps({"path": found["path"], "layers": layers, "total": totals}, indent=1))
        return
    total = ("total", "", "", *(f"{totals[key]:,}" for key in ("parameters", "bytes")))
    rows = [
        tuple(f"{layer[key]:,}" if isinstance(layer[key], int) else layer[key] for key in keys)
        for layer in layers
    ]
    print(aligned(("layer", "weight", "input", "parameters", "weight bytes"), [*rows, total]))
    print(f"\nMACs and activations need the network: unetq cost BUNDLE --plan {options.model}")


_COLUMNS = (
    ("parameters", "parameters"),
    ("MACs", "macs"),
    ("weight bytes", "weight_bytes"),
    ("input bytes", "activation_bytes"),
    ("held bytes", "held_bytes"),
    ("BOPs", "bops"),
)


def _text(cost: NetworkCost, in_float: NetworkCost, held: Workload) -> str:
    rows = [
        (
            layer.name, layer.weight, layer.input, *(f"{getattr(layer, key):,}" for _, key in _COLUMNS),
            _energy(layer.energy),
        )
        for layer in cost.layers
    ]  # fmt: skip
    table = aligned(("layer", "weight", "input", *(title for title, _ in _COLUMNS), "energy"), rows)
    totals = (
        ("parameters", "parameters", "{:,}"),
        ("MACs", "macs", "{:,}"),
        ("size of all parameters", "size_bytes", "{:,} bytes"),
        ("inputs of all layers", "activation_bytes", "{:,} bytes"),
        ("most held by a layer", "peak_bytes", "{:,} bytes"),
        ("BOPs", "bops", "{:,}"),
        ("energy of the MACs", "energy", ""),
    )
    lines = [("image", "×".join(map(str, held.image[1:])))]
    for title, key, spelled in totals:
        value, before = getattr(cost, key), getattr(in_float, key)
        ratio = f" ({before / value:.2f} times less than in float32)" if value != before else ""
        lines.append((title, f"{spelled.format(value) if spelled else _energy(value)}{ratio}"))
    width = max(len(title) for title, _ in lines)
    return "\n".join([table, "", *(f"{title.ljust(width)}  {value}" for title, value in lines)])


def _energy(picojoules: float) -> str:
    for unit, size in (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3)):
        if picojoules >= size:
            return f"{picojoules / size:.3g} {unit}"
    return f"{picojoules:.3g} pJ"
