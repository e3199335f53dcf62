"""How segmentations of many networks look beside the truth: what each found, missed and invented, in three colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .figures import _COLORS, _FOUND, _INVENTED, _MISSED, _SOFT, _figure, _picture
from .tables import format_bytes, require

__all__ = ["accuracy_figure", "comparison_figure", "segmentation_figure"]

_SMALLEST = 48  # pixels: the side of the smallest section that is shown
_MARGIN = 0.25  # of the structure's extent, on each of its sides
_WIDEST = 2.0  # times the section around the truth: what lies farther out is counted, not shown
_COLUMNS = 7  # at most
_MARKERS = ("o", "s")
_LINEAR = 2.0  # Dice points: changes within are drawn to scale, larger ones on a logarithmic axis


@dataclass(frozen=True)
class _Section:
    """A square part of the image, in pixels."""

    top: int
    left: int
    side: int

    def of(self, array: np.ndarray) -> np.ndarray:
        return array[self.top : self.top + self.side, self.left : self.left + self.side]


@dataclass(frozen=True)
class _Colors:
    """What is found, invented and missed, laid over a picture with an opacity from 0 to 1."""

    found: str
    invented: str
    missed: str
    opacity: float

    def over(self, picture: np.ndarray, true: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Grey values in [0, 1] and two masks, all (H, W), to red, green and blue in [0, 1], (H, W, 3)."""
        result = np.repeat(picture[..., None].astype(float), 3, axis=2)
        for where, color in (
            (true & found, self.found),
            (found & ~true, self.invented),
            (true & ~found, self.missed),
        ):
            result[where] = (1 - self.opacity) * result[where] + self.opacity * np.array(to_rgb(color))
        return result

    def legend(self, positive: str) -> list[Patch]:
        return [
            Patch(facecolor=self.found, label=f"{positive} found (true positive)"),
            Patch(facecolor=self.invented, label="invented (false positive)"),
            Patch(facecolor=self.missed, label="missed (false negative)"),
        ]


_ON_WHITE = _Colors(_FOUND, _INVENTED, _MISSED, 1.0)
_ON_IMAGE = _Colors("#56B4E9", "#F0E442", "#D55E00", 0.75)  # the same palette: bright on grey


def segmentation_figure(
    image: np.ndarray, label: np.ndarray, predictions: Mapping[str, np.ndarray], path: Path
) -> Path:
    """Show an image, its true membrane, and where each prediction found, missed or invented membrane.

    Args:
        image: shape (1, H, W), values in [0, 1].
        label: shape (1, H, W), 0 = membrane, 1 = interior.
        predictions: predicted classes by the name of the network, each of the label's shape.
        path: the PNG file to write.

    Returns:
        ``path``.

    Raises:
        ValueError: the image is not (1, H, W), or the label or a prediction has another shape.
    """
    if image.ndim != 3 or image.shape[0] != 1:
        raise ValueError(f"the image has shape {image.shape}, expected (1, H, W)")
    _check_shapes(image, label, predictions)
    panels = 2 + len(predictions)
    columns = panels if panels <= 4 else min(4, math.ceil(panels / 2))
    found = {name: prediction[0] == 0 for name, prediction in predictions.items()}
    true = label[0] == 0
    titles = {name: f"{name} (membrane Dice {_dice(true, mask):.1f})" for name, mask in found.items()}
    # 3.6 inches: a pixel of a 512 x 512 slice is no smaller than one of the figure.
    return _draw(image[0], true, found, titles, "membrane", path, columns, 3.6, None, _ON_WHITE)


def comparison_figure(
    image: np.ndarray,
    label: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    path: Path,
    *,
    positive: str,
    window: tuple[float, float] | None = None,
) -> Path:
    """Show an image, the true structure, and where each of many networks found, missed or invented it.

    Where the structure is small, all panels but the first show a square section around it, which is marked in the first.
    The section holds the truth and all predictions, but is at most twice as wide as the truth and its margin need: a
    panel's title counts the pixels of its prediction that lie outside. Dice is that of the whole image.

    Args:
        image: shape (H, W), any real values.
        label: shape (H, W), not 0 where the structure is.
        predictions: by the name of the network, each of the label's shape, not 0 where the structure is predicted.
        path: the PNG file to write.
        positive: what the structure is called, such as ``"membrane"``.
        window: the values shown as black and white; None for the 1st and 99th percentile of the image.

    Returns:
        ``path``.

    Raises:
        ValueError: the image is not (H, W), the label or a prediction has another shape, or the window's ends do
            not ascend.
    """
    if image.ndim != 2:
        raise ValueError(f"the image has shape {image.shape}, expected (H, W)")
    _check_shapes(image, label, predictions)
    grey = _windowed(image, window)
    true = label != 0
    found = {name: prediction != 0 for name, prediction in predictions.items()}
    section = _section(true, list(found.values()))
    titles = {}
    for name, mask in found.items():
        outside = np.count_nonzero(mask) - np.count_nonzero(section.of(mask)) if section else 0
        titles[name] = f"{name}\nDice {_dice(true, mask):.1f}" + (
            f", {outside} px outside" if outside else ""
        )
    columns = _columns(2 + len(found))
    return _draw(
        grey, true, found, titles, positive, path, columns, 2.4, section, _ON_IMAGE if section else _ON_WHITE
    )


def accuracy_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Show how far each network's Dice lies from full precision, the largest weights at the top, beside what a paper
    published.

    One panel for each measure. A row without changes is one that failed, and is shown as such.

    Args:
        rows: one dictionary a network: name, activation function, bytes of the weights, and in Dice points the changes with their 95 % intervals and the published ones.
        path: the PNG file to write.

    Returns:
        ``path``.

    Raises:
        ValueError: no row has a change, or a row lacks a required key.
    """
    points = [_accuracy_row(row, f"rows[{index}]") for index, row in enumerate(rows)]
    titles = list(dict.fromkeys(title for point in points for title in point.changes))
    if not titles:
        raise ValueError("no row has a change to full precision, so there is nothing to draw")
    sizes: dict[str, int] = {}
    for point in points:
        sizes[point.name] = max(sizes.get(point.name, 0), point.size or 0)
    names = sorted(sizes, key=lambda name: -sizes[name])  # stable: rows of one size keep their order
    activations = list(dict.fromkeys(point.activation for point in points))
    with _figure(path, (2.6 + 4.0 * len(titles), 1.2 + 0.36 * len(names))) as figure:
        axes = figure.subplots(1, len(titles), squeeze=False, sharex=True, sharey=True)[0]
        for axis, title in zip(axes, titles, strict=True):
            for point in points:
                order = activations.index(point.activation)
                y = names.index(point.name) + 0.22 * (order - (len(activations) - 1) / 2)
                _change(axis, point, title, y, _COLORS[order], _MARKERS[order])
            axis.axvline(0.0, color=_SOFT, linewidth=0.8, zorder=0)
            axis.set_xscale("symlog", linthresh=_LINEAR, linscale=1.0)
            axis.xaxis.set_major_locator(FixedLocator([-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50]))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
            axis.set_title(f"{title}: change to full precision", loc="left")
            axis.grid()
            axis.margins(x=0.08)
        axes[0].set_yticks(
            range(len(names)), [f"{n}, {format_bytes(sizes[n])}" if sizes[n] else n for n in names]
        )
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        handles = [
            Line2D(
                [],
                [],
                color=_COLORS[i],
                marker=_MARKERS[i],
                linewidth=1.2,
                label=f"{activation}, 95 % interval",
            )
            for i, activation in enumerate(activations)
        ]
        if any(point.published for point in points):
            handles.append(
                Line2D(
                    [],
                    [],
                    color=_SOFT,
                    marker="o",
                    markerfacecolor="white",
                    linestyle="",
                    label="the paper's",
                )
            )
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return path


@dataclass(frozen=True)
class _AccuracyRow:
    name: str
    activation: str
    size: int | None  # bytes
    changes: Mapping[str, Sequence[float]]  # mean and ends in Dice points, by the measure's title
    published: Mapping[str, float]


def _accuracy_row(row: Mapping[str, Any], where: str) -> _AccuracyRow:
    keys = ("name", "activation", "weight_bytes", "changes", "published")
    return _AccuracyRow(*(require(row, key, where) for key in keys))


def _change(axis: Axes, point: _AccuracyRow, title: str, y: float, color: str, marker: str) -> None:
    """Draw one row's change and the published one; a row that has none failed."""
    if title in point.changes:
        mean, low, high = point.changes[title]
        whiskers = [[mean - low], [high - mean]] if math.isfinite(low) else None
        axis.errorbar(
            mean, y, xerr=whiskers, color=color, marker=marker, markersize=5, elinewidth=1.2, linestyle=""
        )
    else:
        text = f"{point.activation}: failed"
        axis.text(
            0.99,
            y,
            text,
            transform=axis.get_yaxis_transform(),
            color=color,
            fontsize=8,
            ha="right",
            va="center",
        )
    if title in point.published:
        axis.plot(
            point.published[title],
            y,
            color=color,
            marker=marker,
            markersize=5,
            markerfacecolor="white",
            linestyle="",
        )


def _draw(
    grey: np.ndarray,
    true: np.ndarray,
    found: Mapping[str, np.ndarray],
    titles: Mapping[str, str],
    positive: str,
    path: Path,
    columns: int,
    side: float,
    section: _Section | None,
    colors: _Colors,
) -> Path:
    """Image, truth and predictions, all (H, W), in panels of a width in inches."""
    panels = 2 + len(found)
    rows = math.ceil(panels / columns)
    height, width = (section.side, section.side) if section else grey.shape
    lines = 1 + max((title.count("\n") for title in titles.values()), default=0)
    below = grey if colors.opacity < 1 else np.ones_like(grey, dtype=float)
    with _figure(
        path, (columns * side, rows * (side * height / width + 0.24 + 0.18 * lines) + 0.35)
    ) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flat
        _picture(axes[0], "image", grey, cmap="gray", vmin=0.0, vmax=1.0)
        if section:
            axes[0].add_patch(_frame(section))
        drawn = {f"true {positive}": true, **{titles[name]: mask for name, mask in found.items()}}
        for axis, (title, mask) in zip(axes[1:], drawn.items(), strict=False):
            shown = colors.over(below, true, mask)
            _picture(axis, title, section.of(shown) if section else shown)
        for axis in axes[panels:]:
            axis.set_axis_off()
        if found:
            figure.legend(handles=colors.legend(positive), loc="outside lower center", ncols=3)
    return path


def _frame(section: _Section) -> Rectangle:
    """The section's outline, in the image's coordinates: a pixel's centre is a whole number."""
    corner = (section.left - 0.5, section.top - 0.5)
    return Rectangle(
        corner, section.side, section.side, fill=False, edgecolor=_ON_IMAGE.invented, linewidth=1.2
    )


def _section(true: np.ndarray, found: Sequence[np.ndarray]) -> _Section | None:
    """The square around the truth and all predictions; None where the image is no larger, or holds neither.

    Around the truth alone where predictions lie too far from it.
    """
    everything = np.logical_or.reduce([true, *found])
    if not everything.any():
        return None
    rows, columns, side = _extent(everything)
    if true.any():
        true_rows, true_columns, true_side = _extent(true)
        if side > _WIDEST * true_side:
            rows, columns, side = true_rows, true_columns, round(_WIDEST * true_side)
    height, width = true.shape
    if side >= min(height, width):
        return None
    top = min(max(sum(rows) // 2 - side // 2, 0), height - side)
    left = min(max(sum(columns) // 2 - side // 2, 0), width - side)
    return _Section(top, left, side)


def _extent(mask: np.ndarray) -> tuple[tuple[int, int], tuple[int, int], int]:
    """The rows and columns that a mask reaches, ends excluded, and the side of the square that shows them."""
    ends = []
    for axis in (1, 0):
        reached = np.flatnonzero(mask.any(axis=axis))
        ends.append((int(reached[0]), int(reached[-1]) + 1))
    longest = max(high - low for low, high in ends)
    return ends[0], ends[1], max(_SMALLEST, math.ceil((1 + 2 * _MARGIN) * longest))


def _columns(panels: int) -> int:
    """Columns of a grid with few empty places, wide rather than high."""
    if panels <= _COLUMNS:
        return panels
    return min(range(_COLUMNS, 3, -1), key=lambda columns: -panels % columns)


def _windowed(image: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    """Grey values so that the window becomes [0, 1], and what lies outside 0 or 1."""
    low, high = np.percentile(image, (1, 99)) if window is None else window
    if window is None and low == high:  # one value nearly everywhere
        low, high = float(image.min()), float(image.max())
        if low == high:
            return np.zeros(image.shape)
    if not low < high:
        raise ValueError(f"the window is {window}, expected two ascending values, such as (-160, 240)")
    scaled: np.ndarray = np.clip((image.astype(float) - low) / (high - low), 0.0, 1.0)
    return scaled


def _dice(true: np.ndarray, found: np.ndarray) -> float:
    """Dice of two masks in percent, 100 where both are empty."""
    both = np.count_nonzero(true) + np.count_nonzero(found)
    return 200.0 * np.count_nonzero(true & found) / both if both else 100.0


def _check_shapes(image: np.ndarray, label: np.ndarray, predictions: Mapping[str, np.ndarray]) -> None:
    named = {f"prediction {name!r}": prediction for name, prediction in predictions.items()}
    for name, array in {"label": label, **named}.items():
        if array.shape != image.shape:
            raise ValueError(f"{name} has shape {array.shape}, expected the image's, {image.shape}")
