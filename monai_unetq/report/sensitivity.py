"""How sensitivities look as a picture: the trace of every layer, skip half beside up half, and the layer's computation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .figures import _COLORS, _SOFT, _figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..sensitivity import Sensitivities, Sensitivity

__all__ = ["sensitivity_figure"]

_KINDS = {"skip": _COLORS[0], "up": _COLORS[1], "layer": _SOFT}
_NAMES = {"hessian": "average Hessian trace", "fisher": "mean squared gradient", "sqnr": "1/power"}


class _Bar(NamedTuple):
    layer: str
    part: str
    value: float
    error: float

    @property
    def kind(self) -> str:
        return self.part.partition(".")[0] if self.part != "input" else "layer"


def sensitivity_figure(sensitivities: Sensitivities, path: Path) -> Path:
    """Show the metric's number for each layer's weight and input, and the layer's MACs, in the order layers run.

    The parts of a split layer stand beside each other in colours. Where the metric has no one number for all widths
    (the score's drop), Ω at the smallest width is shown.

    Args:
        sensitivities: of any metric.
        path: the PNG file to write.

    Returns:
        ``path``.

    Raises:
        ValueError: there is nothing in it.
    """
    if not sensitivities:
        raise ValueError("there are no sensitivities, so there is nothing to draw")
    entries = list(sensitivities.values())
    bits = min(min(entry.omega) for entry in entries)
    what = _NAMES.get(sensitivities.metric, f"score lost at {bits} bits")
    layers = list(dict.fromkeys(entry.layer for entry in entries))
    panels = {
        f"{what} of weights": [_bar(entry, bits) for entry in entries if entry.kind == "weight"],
        f"{what} of inputs": [_bar(entry, bits) for entry in entries if entry.kind == "input"],
        "multiply-accumulates for one image": [
            _Bar(unit.layer, unit.part, unit.macs, 0.0)
            for unit in sensitivities.units
            if unit.layer in layers
        ],
    }
    with _figure(path, (max(5.0, 0.45 * len(layers) + 1.5), 7.5)) as figure:
        axes = figure.subplots(len(panels), 1, sharex=True)
        for axis, (title, bars) in zip(axes, panels.items(), strict=True):
            _bars(axis, bars, {layer: place for place, layer in enumerate(layers)})
            axis.set_title(title, loc="left")
            axis.grid(axis="y")
        axes[-1].set_xticks(range(len(layers)), layers, rotation=45, ha="right", rotation_mode="anchor")
        handles, labels = axes[-1].get_legend_handles_labels()
        if len(labels) > 1:
            axes[0].legend(handles, labels, loc="best", ncols=len(labels))
    return path


def _bar(entry: Sensitivity, bits: int) -> _Bar:
    if math.isfinite(entry.trace):
        return _Bar(entry.layer, entry.part, entry.trace, entry.error if math.isfinite(entry.error) else 0.0)
    return _Bar(entry.layer, entry.part, entry.omega[bits], 0.0)


def _bars(axis: Axes, bars: list[_Bar], places: Mapping[str, int]) -> None:
    """A group of bars for each layer; the standard error as a whisker."""
    named: set[str] = set()
    for layer, place in places.items():
        group = [bar for bar in bars if bar.layer == layer]
        width = 0.8 / len(group)
        for number, bar in enumerate(group):
            axis.bar(
                place + (number - (len(group) - 1) / 2) * width,
                bar.value,
                width * 0.92,
                yerr=bar.error or None,
                color=_KINDS[bar.kind],
                ecolor="black",
                error_kw={"elinewidth": 1.0},
                label=None if bar.kind in named else bar.kind,
            )
            named.add(bar.kind)
    axis.axhline(0, color=_SOFT, linewidth=0.8)
