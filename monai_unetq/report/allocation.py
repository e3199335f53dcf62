"""How a bit allocation looks as pictures: Ω against what it costs, and what each layer costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import _COLORS, _SOFT, _figure
from .tables import require

__all__ = ["cost_figure", "pareto_figure"]

_KINDS = {"skip": _COLORS[0], "up": _COLORS[1], "whole": _SOFT}
_PANELS = (("macs", "MACs"), ("bops", "bit operations"), ("weight_bytes", "weights [byte]"))


def pareto_figure(points: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Show the least total Ω for each budget, against the size and against the bit operations of its plan.

    Args:
        points: for each plan ``budget``, ``omega``, ``size_bytes`` and ``bops``, as ``Point.to_json`` gives them.
        path: the PNG file to write.

    Returns:
        ``path``.

    Raises:
        ValueError: there is no point, or a point lacks a key.
    """
    if not points:
        raise ValueError("there are no points, so there is nothing to draw")
    keys = ("size_bytes", "bops", "omega", "budget")
    columns = {key: [require(point, key, f"points[{i}]") for i, point in enumerate(points)] for key in keys}
    positive = [omega for omega in columns["omega"] if omega > 0]
    with _figure(path, (9.0, 3.6)) as figure:
        for axis, key, label in zip(
            figure.subplots(1, 2, sharey=True),
            ("size_bytes", "bops"),
            ("size of all parameters [byte]", "bit operations for an image"),
            strict=True,
        ):
            axis.plot(columns[key], columns["omega"], marker="o", markersize=4, linewidth=1.4)
            axis.set_xscale("log")
            if positive:
                axis.set_yscale("symlog", linthresh=min(positive))
            axis.set_xlabel(label)
            axis.grid()
            for place in (0, len(points) - 1):
                where = (columns[key][place], columns["omega"][place])
                axis.annotate(columns["budget"][place], where, xytext=(6, 4), textcoords="offset points")
        figure.supylabel("total Ω", fontsize=10)
    return path


def cost_figure(layers: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Show MACs, bit operations and bytes of weights for each layer, skip and up parts of a layer in colours.

    Args:
        layers: ``name``, ``macs``, ``bops``, ``weight_bytes``, ``weight`` and ``input`` of each, as in
            ``NetworkCost.to_json()["layers"]``.
        path: the PNG file to write.

    Returns:
        ``path``.

    Raises:
        ValueError: there is no layer, or a layer lacks a key.
    """
    if not layers:
        raise ValueError("there are no layers, so there is nothing to draw")
    places = range(len(layers))
    names = [str(require(layer, "name", f"layers[{i}]")) for i, layer in enumerate(layers)]
    formats = [
        " · ".join(str(require(layer, key, f"layers[{i}]")) for key in ("weight", "input"))
        for i, layer in enumerate(layers)
    ]
    kinds = [_kind(name) for name in names]
    with _figure(path, (11.0, 0.8 + 0.2 * len(layers))) as figure:
        axes = figure.subplots(1, len(_PANELS), sharey=True)
        for axis, (key, title) in zip(axes, _PANELS, strict=True):
            values = [require(layer, key, f"layers[{i}]") for i, layer in enumerate(layers)]
            for kind in dict.fromkeys(kinds):
                mine = [place for place in places if kinds[place] == kind]
                axis.barh(mine, [values[place] for place in mine], color=_KINDS[kind], label=kind, height=0.8)
            axis.set_title(title, loc="left")
            axis.grid(axis="x")
        axes[0].set_yticks(
            list(places), [f"{n}  {f}" for n, f in zip(names, formats, strict=True)], fontsize=7
        )
        axes[0].set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
        if len(set(kinds)) > 1:
            axes[-1].legend(loc="best")
    return path


def _kind(name: str) -> str:
    part = name.rpartition("[")[2] if name.endswith("]") else ""
    return "skip" if part.startswith("skip") else "up" if part.startswith("up") else "whole"
