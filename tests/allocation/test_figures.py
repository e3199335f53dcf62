"""Pictures of allocations: what they show, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from monai_unetq.allocation import layer_costs, pareto
from monai_unetq.report.allocation import cost_figure, pareto_figure
from monai_unetq.surgery.workload import Unit

from .problems import large


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_front_has_a_marker_for_each_plan(tmp_path: Path, drawn: list[Figure]) -> None:
    budgets = ["weights=2bits", "weights=4bits", "weights=8bits"]
    points = [point.to_json() for point in pareto(large(4, 0), budgets=budgets)]
    assert pareto_figure(points, tmp_path / "front.png").is_file()
    for axis, key in zip(drawn[0].axes, ("size_bytes", "bops"), strict=True):
        (line,) = axis.lines
        assert np.asarray(line.get_xdata()).tolist() == [point[key] for point in points]
        assert np.asarray(line.get_ydata()).tolist() == [point["omega"] for point in points]
        assert [text.get_text() for text in axis.texts] == [budgets[0], budgets[-1]]


def test_a_front_of_nothing_lost_is_drawn(tmp_path: Path) -> None:
    point = {"budget": "size=1x", "omega": 0.0, "size_bytes": 10, "bops": 5}
    assert pareto_figure([point], tmp_path / "front.png").is_file()


def test_layers_stand_from_the_first_to_the_last_and_parts_in_colours(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    units = (
        Unit("a", "input", 10, 4, 4, 100),
        Unit("b", "skip", 20, 4, 4, 200),
        Unit("b", "up", 30, 4, 0, 300),
    )
    layers = layer_costs(units, {"a": (4, 8)}, 0).to_json()["layers"]
    assert cost_figure(layers, tmp_path / "cost.png").is_file()
    macs = drawn[0].axes[0]
    assert [text.get_text() for text in macs.get_yticklabels()] == [
        "a  int4 · int8", "b[skip]  float · float", "b[up]  float · float",
    ]  # fmt: skip
    bars = [bar for bar in macs.patches if isinstance(bar, Rectangle)]
    assert [round(bar.get_width()) for bar in bars] == [100, 200, 300]
    assert len({bar.get_facecolor() for bar in bars}) == 3
    assert macs.yaxis_inverted()


@pytest.mark.parametrize("draw", [cost_figure, pareto_figure])
def test_nothing_to_draw(draw: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([], tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"s\[0\]"):
        draw([{}], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
