"""How sensitivities look as a picture: the trace of every layer, skip half beside up half, and the layer's computation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.ticker import FixedLocator, NullLocator

from .figures import _COLORS, _SOFT, _figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..sensitivity import Sensitivities, Sensitivity

__all__ = ["sensitivity_figure"]

_KINDS = {"skip": _COLORS[0], "up": _COLORS[1], "layer": _SOFT}
_NAMES = {"hessian": "average Hessian trace", "fisher": "mean squared gradient", "sqnr": "1/power"}


_FLAT = 30.0
"""Largest number over the median beyond which a linear axis would show most bars flat."""


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
        path: the PNG or SVG file to write.

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
            threshold = _linear_up_to(bars)
            if threshold:
                axis.set_yscale("symlog", linthresh=threshold)
                axis.yaxis.set_major_locator(FixedLocator(_ticks(bars, threshold)))
                axis.yaxis.set_minor_locator(NullLocator())
                title += f" (logarithmic beyond ±{threshold:.0e})"
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


def _linear_up_to(bars: list[_Bar]) -> float | None:
    """Where a logarithmic axis has to begin so that every bar shows; None where a linear one shows them all.

    Numbers of one network span five decades, and noise has both signs: within the median standard error the axis is
    linear. Without errors (MACs have none) it begins at the smallest number.
    """
    sizes = sorted(abs(bar.value) for bar in bars if bar.value)
    if not sizes or sizes[-1] < _FLAT * sizes[len(sizes) // 2]:
        return None
    errors = sorted(bar.error for bar in bars if bar.error)
    return errors[len(errors) // 2] if errors else sizes[0]


def _ticks(bars: list[_Bar], threshold: float) -> list[float]:
    """0 and the powers of ten beyond the threshold, every other one where there are many, of the signs that occur."""
    largest = max(abs(bar.value) for bar in bars)
    powers = list(range(math.ceil(math.log10(threshold)), math.floor(math.log10(largest)) + 1))
    sizes = [10.0**power for power in powers[:: 1 + (len(powers) > 3)]]
    negative = [-size for size in sizes if any(bar.value - bar.error < -size for bar in bars)]
    return [*negative, 0.0, *sizes]


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
