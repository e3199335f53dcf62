"""Figures: a PNG that shows what it should, nothing left open, nothing half-written."""

from __future__ import annotations

import builtins
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import monai_unetq.report

pytest.importorskip("matplotlib", reason="figures need the extra 'report'")

from matplotlib.figure import Figure
from PIL import Image

from monai_unetq.report import segmentation_figure, size_figure, training_figure, weight_figure


def row(name: str, size: int, dice: float, half_width: float | None) -> dict[str, Any]:
    ends = (None, None) if half_width is None else (dice - half_width, dice + half_width)
    return {
        "name": name,
        "weight_bytes": size,
        "metrics": {"dice": {"mean": dice, "low": ends[0], "high": ends[1]}},
    }


ROWS = [
    row("float", 1_215_364, 95.3, 1.2),
    row("Q6.0/Q0.4", 151_920, 94.9, 1.3),
    row("int6/int4", 151_920, 95.0, 1),
]
TRAINING = {
    "float": {"loss": [[i, 1 / i] for i in range(1, 200)], "validation": [[50, 90.0], [100, 94.0]]},
    "Q6.0/Q0.4": {"loss": [[1, 0.3], [2, 0.2]], "validation": []},
}
LAYERS: list[dict[str, Any]] = [
    {"name": "first", "weight": "Q0.4", "histogram": {"-8": 3, "0": 5, "2": 2}},
    {"name": "second", "weight": "Q0.4", "histogram": {"-1": 1, "7": 1}},
    {"name": "last", "weight": "float", "histogram": None},
]


def mask(*zeros: tuple[int, int]) -> np.ndarray:
    result = np.ones((1, 8, 8), dtype=np.uint8)
    for y, x in zeros:
        result[0, y, x] = 0
    return result


def draw_all(folder: Path) -> list[Path]:
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    return [
        segmentation_figure(image, mask((1, 1)), {"float": mask((1, 1))}, folder / "segmentation.png"),
        training_figure(TRAINING, folder / "training.png"),
        weight_figure(LAYERS, folder / "weights.png"),
        size_figure(ROWS, folder / "size.png"),
    ]


def test_every_figure_is_a_png_and_nothing_else_is_left(tmp_path: Path) -> None:
    paths = draw_all(tmp_path / "figures")
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 250
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10  # not blank
    assert sorted((tmp_path / "figures").iterdir()) == sorted(paths)


def test_no_figure_stays_open_and_no_style_is_changed(tmp_path: Path) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    before = plt.get_fignums(), dict(mpl.rcParams)
    draw_all(tmp_path)
    assert (plt.get_fignums(), dict(mpl.rcParams)) == before


def test_a_failed_save_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "size.png"
    path.write_bytes(b"older")

    def savefig(self: Figure, file: Any, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="no space"):
        size_figure(ROWS, path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_training_draws_loss_and_validation_of_each_network(tmp_path: Path, drawn: list[Figure]) -> None:
    training_figure(TRAINING, tmp_path / "a.png")
    loss, validation = drawn[0].axes
    legend = loss.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["float", "Q6.0/Q0.4"]
    (line,) = validation.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[50, 90.0], [100, 94.0]])
    short = next(line for line in loss.get_lines() if line.get_label() == "Q6.0/Q0.4")
    np.testing.assert_array_equal(short.get_xydata(), [[1, 0.3], [2, 0.2]])


def test_running_mean_of_a_straight_loss_lies_on_it(tmp_path: Path, drawn: list[Figure]) -> None:
    training_figure({"float": {"loss": [[i, 2.0 * i] for i in range(100)]}}, tmp_path / "a.png")
    mean = next(line for line in drawn[0].axes[0].get_lines() if line.get_label() == "float")
    x, y = np.asarray(mean.get_xydata(), dtype=float).T
    np.testing.assert_allclose(y, 2.0 * x)
    assert len(x) > 90


def test_training_without_a_curve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no loss and no validation"):
        training_figure({"float": {"loss": [], "validation": []}}, tmp_path / "a.png")


@pytest.mark.parametrize("as_json", [True, False])
def test_weight_codes_are_shown_in_percent(tmp_path: Path, drawn: list[Figure], as_json: bool) -> None:
    layers = [dict(layer) for layer in LAYERS]
    if not as_json:
        layers[0]["histogram"] = {int(code): count for code, count in layers[0]["histogram"].items()}
    weight_figure(layers, tmp_path / "a.png")
    panels = [axis for axis in drawn[0].axes if axis.get_title()]
    assert [panel.get_title() for panel in panels] == [
        "first\nQ0.4",
        "second\nQ0.4",
    ]  # the float layer is left out
    values, edges, _ = panels[0].patches[0].get_data()  # type: ignore[attr-defined]
    share = dict(zip((edges[:-1] + 0.5).astype(int).tolist(), values, strict=True))
    assert set(share) == set(range(-8, 8))  # what the other layer of this format uses, too
    assert {code: value for code, value in share.items() if value} == {-8: 30.0, 0: 50.0, 2: 20.0}


def test_weights_without_histogram_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer has a histogram"):
        weight_figure([{"name": "last", "weight": "float"}], tmp_path / "a.png")


def test_weights_without_format_are_refused_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\[0\]\.weight"):
        weight_figure([{"name": "last", "histogram": {"0": 1}}], tmp_path / "a.png")


def test_size_draws_each_row_at_its_dice_with_its_name(tmp_path: Path, drawn: list[Figure]) -> None:
    size_figure(ROWS, tmp_path / "a.png")
    axis = drawn[0].axes[0]
    assert axis.get_xscale() == "log"
    assert len(axis.containers) == 3
    assert {text.get_text() for text in axis.texts} == {"float", "Q6.0/Q0.4", "int6/int4"}
    drawn_points = [tuple(container[0].get_xydata()[0]) for container in axis.containers]
    assert sorted(y for _, y in drawn_points) == [94.9, 95.0, 95.3]
    for x, y in drawn_points:
        expected = {94.9: 151_920, 95.0: 151_920, 95.3: 1_215_364}[y]
        assert x == pytest.approx(expected, rel=0.05)
    assert len({x for x, _ in drawn_points}) == 3  # set apart where sizes are the same


def test_labels_of_equal_points_do_not_overlap(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [row(f"format {i}", 1000, 95.0 + 0.001 * i, 1.0) for i in range(5)]
    size_figure([*rows, row("float", 8000, 95.0, 1.0)], tmp_path / "a.png")
    boxes = [text.get_window_extent() for text in drawn[0].axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    "rows", [[row("float", 4000, 95.0, None)], [row("float", 4000, math.pi, None), ROWS[0]]]
)
def test_size_without_interval(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert size_figure(rows, tmp_path / "a.png").stat().st_size > 0


def test_size_names_a_missing_key(tmp_path: Path) -> None:
    broken = {key: value for key, value in ROWS[1].items() if key != "weight_bytes"}
    with pytest.raises(ValueError, match=r"rows\[1\]\.weight_bytes"):
        size_figure([ROWS[0], broken], tmp_path / "a.png")
    with pytest.raises(ValueError, match="no rows"):
        size_figure([], tmp_path / "a.png")


def test_without_matplotlib_only_the_figures_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[:2] == ["monai_unetq", "report"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(monai_unetq, "report", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    report = importlib.import_module("monai_unetq.report")
    assert report.text_table
    assert report.write_report
    with pytest.raises(ImportError, match=r"pip install monai-unetq\[report\]"):
        report.size_figure  # noqa: B018


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'figure'"):
        monai_unetq.report.figure  # noqa: B018
