"""How numbers look as pictures: training curves, the use of weight codes, and accuracy against size; and the style
that all figures share. Every function writes one PNG file."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError(
        "figures need matplotlib, which is not installed: pip install monai-unetq[report]"
    ) from error

from .tables import format_bytes, require

__all__ = ["size_figure", "training_figure", "weight_figure"]

# Okabe and Ito's palette, made for colour vision deficiencies; without its yellow, too faint on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FOUND, _INVENTED, _MISSED = "#3F4750", "#E69F00", "#0072B2"
_SOFT, _FAINT = "#5B6670", "#D8DDE2"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 10.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": "black",
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "axes.grid": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.prop_cycle": cycler(color=_COLORS),
}
_DPI = 150
_SMOOTHED_FROM = 40  # losses; a shorter curve is drawn as it is


def training_figure(training: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: Path) -> Path:
    """Show loss and validation Dice over training steps, one line for each network.

    Args:
        training: for each network ``{"loss": [[step, value], …], "validation": [[step, dice], …]}``, Dice in
            percent. A long loss is drawn faintly, with its running mean on top.
        path: the PNG file to write.

    Returns:
        ``path``.

    Raises:
        ValueError: no network has a loss or a validation to draw.
    """
    if not any(run.get(part) for run in training.values() for part in ("loss", "validation")):
        raise ValueError("training holds no loss and no validation, so there is nothing to draw")
    with _figure(path, (9.0, 3.4)) as figure:
        left, right = figure.subplots(1, 2, sharex=True)
        for (name, run), color in zip(training.items(), _cycle(), strict=False):
            if run.get("loss"):
                _loss(left, np.asarray(run["loss"], dtype=float), name, color)
            if run.get("validation"):
                step, dice = np.asarray(run["validation"], dtype=float).T
                right.plot(step, dice, color=color, label=name, marker="o", markersize=3.5, linewidth=1.6)
        for axis, title in ((left, "training loss"), (right, "validation Dice [%]")):
            axis.set_title(title, loc="left")
            axis.set_xlabel("step")
            axis.grid(axis="y")
            if axis.has_data():
                axis.legend(loc="best")
    return path


def weight_figure(layers: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Show for each layer how often each weight code is used.

    Args:
        layers: the layers as in ``results["layers"]``. A layer without a ``histogram`` (a float layer) is
            left out.
        path: the PNG file to write.

    Returns:
        ``path``.

    Raises:
        ValueError: no layer has a histogram, or a layer lacks its name or weight format.
    """
    drawn = [(layer, f"layers[{index}]") for index, layer in enumerate(layers) if layer.get("histogram")]
    if not drawn:
        raise ValueError("no layer has a histogram of weight codes, so there is nothing to draw")
    ranges: dict[
        str, list[int]
    ] = {}  # layers of one format share their axis: the codes that any of them uses
    for layer, where in drawn:
        ranges.setdefault(require(layer, "weight", where), []).extend(map(int, layer["histogram"]))
    columns = min(4, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    with _figure(path, (2.5 * columns, 1.65 * rows + 0.45)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, (layer, where) in zip(axes, drawn, strict=False):
            weight = require(layer, "weight", where)
            _codes(axis, layer["histogram"], ranges[weight])
            axis.set_title(f"{require(layer, 'name', where)}\n{weight}", fontsize=9)
        for axis in axes[len(drawn) :]:
            axis.set_axis_off()
        figure.supxlabel("weight code", fontsize=10)
        figure.supylabel("share of the layer's weights [%]", fontsize=10)
    return path


def size_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Show Dice with its 95 % interval against the size of the weights, on a logarithmic axis.

    Formats of the same size are set apart sideways, so that their intervals can be told apart.

    Args:
        rows: the rows as in ``results["rows"]``.
        path: the PNG file to write.

    Returns:
        ``path``.

    Raises:
        ValueError: there is no row, or a row lacks a required key.
    """
    if not rows:
        raise ValueError("there are no rows, so there is nothing to draw")
    points = [_size_point(row, f"rows[{index}]") for index, row in enumerate(rows)]
    ends = [end for point in points for end in (point.low, point.high)]
    smallest, largest = min(point.size for point in points), max(point.size for point in points)
    span = max(math.log(largest / smallest), math.log(2))
    margin = 0.06 * max(max(ends) - min(ends), 1.0)
    bottom, top = min(ends) - margin, max(ends) + margin
    with _figure(path, (8.0, 4.2)) as figure:
        axis = figure.subplots()
        for group in _same_size(points):
            right = 0.0
            for index, (point, color) in enumerate(zip(group, _cycle(), strict=False)):
                x = point.size * math.exp(0.02 * span * (index - (len(group) - 1) / 2))
                right = max(right, x)
                whiskers = [[point.dice - point.low], [point.high - point.dice]]
                axis.errorbar(x, point.dice, whiskers, color=color, marker="o", markersize=6, elinewidth=1.2)
            heights = _spread([(point.dice - bottom) / (top - bottom) for point in group], gap=0.055)
            for point, height, color in zip(group, heights, _cycle(), strict=False):
                where = (right, bottom + height * (top - bottom))
                axis.annotate(
                    point.name, where, xytext=(9, 0), textcoords="offset points", va="center", color=color
                )
        axis.set_xscale("log", base=2)
        axis.set_xlim(smallest * math.exp(-0.06 * span), largest * math.exp(0.16 * span))
        axis.set_ylim(bottom, top)
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(_size_tick))
        axis.set_xlabel("size of the weights")
        axis.set_title("Dice [%], mean and 95 % interval", loc="left")
        axis.grid()
    return path


@dataclass(frozen=True)
class _SizePoint:
    name: str
    size: int  # bytes
    dice: float  # percent, as are the ends of its interval; they equal it where there is none
    low: float
    high: float


def _size_point(row: Mapping[str, Any], where: str) -> _SizePoint:
    place = f"{where}.metrics"
    summary = require(require(row, "metrics", where), "dice", place)
    dice = require(summary, "mean", f"{place}.dice")
    low, high = (require(summary, key, f"{place}.dice") for key in ("low", "high"))
    known = all(end is not None and math.isfinite(end) for end in (low, high))
    return _SizePoint(
        name=str(require(row, "name", where)),
        size=require(row, "weight_bytes", where),
        dice=dice,
        low=low if known else dice,
        high=high if known else dice,
    )


def _same_size(points: Sequence[_SizePoint]) -> list[list[_SizePoint]]:
    """Put points whose sizes differ by less than 8 % together, the best Dice of a group first."""
    groups: list[list[_SizePoint]] = []
    for point in sorted(points, key=lambda point: point.size):
        if groups and point.size < 1.08 * groups[-1][0].size:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [sorted(group, key=lambda point: -point.dice) for group in groups]


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move falling heights in [0, 1] so that neighbours are at least ``gap`` apart, and back into [0, 1]."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else height)
    drift = sum(placed) / len(placed) - sum(heights) / len(heights)
    shift = min(max(-drift, -placed[-1]), 1.0 - placed[0])
    return [height + shift for height in placed]


def _size_tick(size: float, _position: int | None) -> str:
    return re.sub(r"\.0+ ", " ", format_bytes(round(size)))


def _cycle() -> Iterator[str]:
    while True:
        yield from _COLORS


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Give a figure in this file's style, and save it to ``path`` if drawing succeeds. No pyplot, no global
    state."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
        FigureCanvasAgg(figure)  # attaches itself
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix.removeprefix(".") or "png"
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=f".{kind}")
        try:
            # An SVG is the same for the same data: no date, and names that follow from the file's.
            with (
                os.fdopen(handle, "wb") as file,
                rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}),
            ):
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(file, format=kind, dpi=_DPI, metadata=metadata)
            os.chmod(temporary, 0o644)  # mkstemp makes files for the owner alone
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _picture(axis: Axes, title: str, array: np.ndarray, **options: Any) -> None:
    axis.imshow(array, **options)
    axis.set_title(title)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color(_FAINT)


def _loss(axis: Axes, points: np.ndarray, name: str, color: str) -> None:
    """Draw (N, 2) steps and losses."""
    step, loss = points.T
    if len(loss) < _SMOOTHED_FROM:
        axis.plot(step, loss, color=color, label=name, linewidth=1.6)
        return
    window = len(loss) // 20
    mean = np.convolve(loss, np.full(window, 1 / window), mode="valid")
    start = (window - 1) // 2
    axis.plot(step, loss, color=color, alpha=0.22, linewidth=0.8)
    axis.plot(step[start : start + len(mean)], mean, color=color, label=name, linewidth=1.6)


def _codes(axis: Axes, histogram: Mapping[str, int], used: Sequence[int]) -> None:
    """Draw the share of each code, from the smallest to the largest of ``used``."""
    codes = range(min(used), max(used) + 1)
    counts = {int(code): count for code, count in histogram.items()}  # JSON makes the codes strings
    share = [100.0 * counts.get(code, 0) / sum(counts.values()) for code in codes]
    axis.stairs(share, np.arange(codes.start, codes.stop + 1) - 0.5, fill=True, color=_COLORS[0])
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=3))
    axis.set_xlim(codes.start - 1, codes.stop)
    axis.set_ylim(bottom=0)
