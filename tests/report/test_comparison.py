"""Segmentations beside the truth: every pixel in the colour of what it is, small structures large enough to see; and
changes of accuracy where they belong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="figures need the extra 'report'")

from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from monai_unetq.report import accuracy_figure, comparison, comparison_figure, figures, segmentation_figure

FOUND, INVENTED, MISSED = "#56B4E9", "#F0E442", "#D55E00"


def mask(*zeros: tuple[int, int]) -> np.ndarray:
    result = np.ones((1, 8, 8), dtype=np.uint8)
    for y, x in zeros:
        result[0, y, x] = 0
    return result


def test_segmentation_colours_found_invented_and_missed(tmp_path: Path, drawn: list[Figure]) -> None:
    label, prediction = mask((1, 1), (2, 2), (3, 3)), mask((1, 1), (2, 2), (6, 6))
    segmentation_figure(np.zeros((1, 8, 8), np.float32), label, {"net": prediction}, tmp_path / "a.png")
    (figure,) = drawn
    panel = figure.axes[2]
    assert panel.get_title() == "net (membrane Dice 66.7)"
    picture = panel.images[0]
    shown = np.asarray(picture.to_rgba(np.asarray(picture.get_array())))[..., :3]
    for (y, x), color in {
        (1, 1): figures._FOUND,
        (6, 6): figures._INVENTED,
        (3, 3): figures._MISSED,
        (0, 0): "white",
    }.items():
        assert tuple(shown[y, x]) == pytest.approx(to_rgb(color))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 3
    colors = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()]
    assert colors == [to_rgb(c) for c in (figures._FOUND, figures._INVENTED, figures._MISSED)]


def test_segmentation_of_many_networks(tmp_path: Path, drawn: list[Figure]) -> None:
    predictions = {f"net {i}": mask((i, i)) for i in range(8)}
    segmentation_figure(np.zeros((1, 8, 8), np.float32), mask((1, 1)), predictions, tmp_path / "a.png")
    titles = [axis.get_title() for axis in drawn[0].axes if axis.images]
    assert len(titles) == 10
    assert titles[-1].startswith("net 7")


def test_segmentation_without_membrane_has_dice_100(tmp_path: Path, drawn: list[Figure]) -> None:
    segmentation_figure(np.zeros((1, 8, 8), np.float32), mask(), {"net": mask()}, tmp_path / "a.png")
    assert drawn[0].axes[2].get_title() == "net (membrane Dice 100.0)"


def test_segmentation_names_what_has_another_shape(tmp_path: Path) -> None:
    image = np.zeros((1, 8, 8), np.float32)
    with pytest.raises(ValueError, match=r"prediction 'net' has shape \(1, 8, 9\)"):
        segmentation_figure(image, mask(), {"net": np.ones((1, 8, 9), np.uint8)}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"label has shape \(8, 8\)"):
        segmentation_figure(image, mask()[0], {}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"image has shape \(1, 4, 8, 8\)"):
        segmentation_figure(np.zeros((1, 4, 8, 8)), mask(), {}, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def shown(axis: Axes) -> np.ndarray:
    """Red, green and blue of a panel's picture, (H, W, 3)."""
    (picture,) = axis.images
    array: np.ndarray = np.asarray(picture.to_rgba(np.asarray(picture.get_array())))[..., :3]
    return array


def square(side: int, top: int, left: int, height: int, width: int) -> np.ndarray:
    result = np.zeros((side, side), dtype=np.uint8)
    result[top : top + height, left : left + width] = 1
    return result


def count(picture: np.ndarray, color: Any) -> int:
    """Pixels of a colour."""
    return int(np.isclose(picture, color, atol=1e-6).all(axis=-1).sum())


def blend(color: str, grey: float, opacity: float = 0.75) -> np.ndarray:
    return opacity * np.array(to_rgb(color)) + (1 - opacity) * grey


def test_comparison_counts_found_invented_and_missed_on_the_image(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    image = np.full((300, 300), 40.0)
    truth = square(300, 100, 120, 10, 20)
    # Rows 105 to 114: 5 of 10 are true. Dice = 2 * 100 / (200 + 200) = 50 %.
    prediction = square(300, 105, 120, 10, 20)
    path = comparison_figure(
        image, truth, {"net": prediction}, tmp_path / "a.png", positive="grey matter", window=(0, 100)
    )
    with Image.open(path) as png:
        assert png.format == "PNG"
    (figure,) = drawn
    whole, true, net = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["image", "true grey matter", "net\nDice 50.0"]
    assert shown(whole).shape == (300, 300, 3)
    assert shown(true).shape == shown(net).shape == (48, 48, 3)
    assert count(shown(true), blend(FOUND, 0.4)) == 200
    assert {c: count(shown(net), blend(c, 0.4)) for c in (FOUND, INVENTED, MISSED)} == {
        FOUND: 100,
        INVENTED: 100,
        MISSED: 100,
    }
    assert count(shown(net), 0.4) == 48 * 48 - 300
    legend = figure.legends[0]
    assert legend.get_texts()[0].get_text() == "grey matter found (true positive)"
    assert [p.get_facecolor()[:3] for p in legend.get_patches()] == [
        to_rgb(c) for c in (FOUND, INVENTED, MISSED)
    ]


def test_the_section_is_marked_where_it_is(tmp_path: Path, drawn: list[Figure]) -> None:
    # Ramps down and to the right: a pixel's value is its place.
    image = np.arange(300.0)[:, None] * 300 + np.arange(300.0)
    truth = square(300, 100, 120, 10, 20)
    comparison_figure(image, truth, {}, tmp_path / "a.png", positive="x", window=(0.0, 89_999.0))
    whole, true = drawn[0].axes
    (frame,) = (patch for patch in whole.patches if isinstance(patch, Rectangle))
    left, top = (round(corner + 0.5) for corner in frame.get_xy())
    assert (frame.get_width(), frame.get_height()) == (48, 48)
    assert top <= 100 < 110 <= top + 48
    assert left <= 120 < 140 <= left + 48
    assert shown(true)[0, 0, 0] * 89_999 == pytest.approx(top * 300 + left)


def test_a_structure_all_over_is_shown_whole_and_solid(tmp_path: Path, drawn: list[Figure]) -> None:
    truth = np.zeros((64, 80), dtype=bool)
    truth[::8] = True
    prediction = truth.copy()
    prediction[0] = False
    prediction[1, :40] = True
    comparison_figure(
        np.ones((64, 80)), truth, {"net": prediction}, tmp_path / "a.png", positive="membrane", window=(0, 2)
    )
    whole, true, net = drawn[0].axes
    assert not whole.patches
    assert count(shown(true), to_rgb(figures._FOUND)) == 8 * 80
    assert count(shown(net), to_rgb(figures._FOUND)) == 7 * 80
    assert count(shown(net), to_rgb(figures._MISSED)) == 80
    assert count(shown(net), to_rgb(figures._INVENTED)) == 40
    assert count(shown(net), to_rgb("white")) == 64 * 80 - 8 * 80 - 40


def test_far_predictions_do_not_shrink_the_structure_but_are_counted(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    truth = square(512, 250, 250, 20, 20)
    far = truth | square(512, 0, 0, 3, 5)
    comparison_figure(
        np.zeros((512, 512)), truth, {"near": truth, "far": far}, tmp_path / "a.png", positive="x"
    )
    near_title, far_title = (axis.get_title() for axis in drawn[0].axes[2:])
    assert near_title == "near\nDice 100.0"
    # Of the whole image: 2 * 400 / (400 + 415).
    assert far_title == "far\nDice 98.2, 15 px outside"
    assert shown(drawn[0].axes[2]).shape == (96, 96, 3)  # twice the 48 that the truth needs


def test_near_predictions_are_all_shown(tmp_path: Path, drawn: list[Figure]) -> None:
    truth = square(512, 250, 250, 40, 40)  # 60 with its margins
    near = square(512, 250, 250, 40, 70)  # 105 with its margins
    comparison_figure(np.zeros((512, 512)), truth, {"net": near}, tmp_path / "a.png", positive="x")
    panel = drawn[0].axes[2]
    assert panel.get_title() == f"net\nDice {200 * 1600 / (1600 + 2800):.1f}"
    assert shown(panel).shape == (105, 105, 3)
    assert count(shown(panel), blend(INVENTED, 0.0)) == 1200


@given(
    size=st.tuples(st.integers(8, 200), st.integers(8, 200)),
    boxes=st.lists(st.tuples(*[st.integers(0, 199)] * 4), min_size=1, max_size=4),
    empty=st.booleans(),
)
def test_a_section_lies_in_the_image_and_holds_the_truth(
    size: tuple[int, int], boxes: list[tuple[int, ...]], empty: bool
) -> None:
    masks = []
    for top, left, height, width in boxes:
        mask = np.zeros(size, dtype=bool)
        mask[top % size[0] : top % size[0] + height + 1, left % size[1] : left % size[1] + width + 1] = True
        masks.append(mask)
    truth = np.zeros(size, dtype=bool) if empty else masks[0]
    section = comparison._section(truth, masks)
    if section is None:
        return
    assert 0 <= section.top <= section.top + section.side <= size[0]
    assert 0 <= section.left <= section.left + section.side <= size[1]
    assert section.side < min(size)
    assert section.of(truth).sum() == truth.sum()
    if empty:
        assert section.of(np.logical_or.reduce(masks)).sum() == np.logical_or.reduce(masks).sum()


@pytest.mark.parametrize(
    ("panels", "columns"),
    [(2, 2), (7, 7), (8, 4), (9, 5), (13, 7), (15, 5), (28, 7), (29, 6)],
)
def test_panels_fill_their_grid(panels: int, columns: int) -> None:
    assert comparison._columns(panels) == columns


def test_all_rows_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    truth = square(64, 30, 30, 4, 4)
    predictions = {f"net {i}": truth for i in range(13)}
    comparison_figure(np.zeros((64, 64)), truth, predictions, tmp_path / "a.png", positive="x")
    titles = [axis.get_title() for axis in drawn[0].axes if axis.images]
    assert titles == ["image", "true x", *(f"net {i}\nDice 100.0" for i in range(13))]


def test_nothing_anywhere_is_shown_whole_with_dice_100(tmp_path: Path, drawn: list[Figure]) -> None:
    nothing = np.zeros((64, 64))
    comparison_figure(nothing, nothing, {"net": nothing}, tmp_path / "a.png", positive="x")
    assert drawn[0].axes[2].get_title() == "net\nDice 100.0"
    assert shown(drawn[0].axes[2]).shape == (64, 64, 3)


def test_without_a_window_the_percentiles_are_black_and_white(tmp_path: Path, drawn: list[Figure]) -> None:
    image = np.arange(101.0).repeat(101).reshape(101, 101)
    image[0, 0] = 1e6  # one bright pixel does not darken the picture
    comparison_figure(image, np.zeros((101, 101)), {}, tmp_path / "a.png", positive="x")
    picture = shown(drawn[0].axes[0])[..., 0]
    assert picture[1, 50] == 0.0
    assert picture[99, 50] == 1.0
    assert picture[50, 50] == pytest.approx(0.5, abs=0.01)


def test_comparison_names_what_does_not_fit(tmp_path: Path) -> None:
    image, mask = np.zeros((8, 8)), np.zeros((8, 8))
    with pytest.raises(ValueError, match=r"prediction 'net' has shape \(8, 9\)"):
        comparison_figure(image, mask, {"net": np.zeros((8, 9))}, tmp_path / "a.png", positive="x")
    with pytest.raises(ValueError, match=r"label has shape \(1, 8, 8\)"):
        comparison_figure(image, mask[None], {}, tmp_path / "a.png", positive="x")
    with pytest.raises(ValueError, match=r"image has shape \(1, 8, 8\), expected \(H, W\)"):
        comparison_figure(image[None], mask, {}, tmp_path / "a.png", positive="x")
    with pytest.raises(ValueError, match=r"window is \(5, 5\)"):
        comparison_figure(image, mask, {}, tmp_path / "a.png", positive="x", window=(5, 5))
    assert list(tmp_path.iterdir()) == []


def change(name: str, activation: str, size: int | None, *ends: float, paper: float | None = None) -> Any:
    return {
        "name": name,
        "activation": activation,
        "weight_bytes": size,
        "changes": {"cell Dice": list(ends)} if ends else {},
        "published": {} if paper is None else {"cell Dice": paper},
    }


def test_accuracy_draws_each_change_at_its_row_and_the_papers_beside_it(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    rows = [
        change("small", "ReLU", 1024, -3.0, -4.0, -2.0, paper=-15.5),
        change("large", "ReLU", 4096, -0.5, -0.75, -0.25),
        change("large", "tanh", 4096, 0.25, math.nan, math.nan),
        change("small", "tanh", None),
    ]
    accuracy_figure(rows, tmp_path / "a.png")
    (axis,) = drawn[0].axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["large, 4.0 KiB", "small, 1.0 KiB"]
    assert axis.yaxis_inverted()  # the first tick at the top
    filled = {
        (float(x), round(float(y)))
        for container in axis.containers
        for x, y in np.asarray(container[0].get_xydata())
    }
    assert filled == {(-3.0, 1), (-0.5, 0), (0.25, 0)}
    whiskers = [c.get_segments()[0][:, 0].tolist() for c in axis.collections if hasattr(c, "get_segments")]
    assert sorted(whiskers) == [[-4.0, -2.0], [-0.75, -0.25]]  # one unit has none
    hollow = [line.get_xydata() for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert [float(np.asarray(points)[0, 0]) for points in hollow] == [-15.5]
    assert [text.get_text() for text in axis.texts] == ["tanh: failed"]
    low, high = axis.get_xlim()
    assert low < -15.5 < 0.25 < high
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["ReLU, 95 % interval", "tanh, 95 % interval", "the paper's"]


def test_accuracy_has_a_panel_for_each_measure(tmp_path: Path, drawn: list[Figure]) -> None:
    row = change("a", "ReLU", 1024, -3.0, -4.0, -2.0)
    row["changes"]["membrane Dice"] = [-6.0, -7.0, -5.0]
    accuracy_figure([row], tmp_path / "a.png")
    assert [axis.get_title(loc="left") for axis in drawn[0].axes] == [
        "cell Dice: change to full precision",
        "membrane Dice: change to full precision",
    ]
    means = [np.asarray(axis.containers[0][0].get_xydata())[0, 0] for axis in drawn[0].axes]
    assert means == [-3.0, -6.0]


def test_accuracy_without_a_change_or_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row has a change"):
        accuracy_figure([change("a", "ReLU", None)], tmp_path / "a.png")
    broken = change("a", "ReLU", 1024, -3.0, -4.0, -2.0)
    del broken["published"]
    with pytest.raises(ValueError, match=r"rows\[0\]\.published"):
        accuracy_figure([broken], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
