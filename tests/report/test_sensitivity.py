"""The figure of sensitivities: every layer, halves beside each other, and whatever has no trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="figures need the extra 'report'")

from matplotlib.axes import Axes

from monai_unetq.report.sensitivity import sensitivity_figure
from monai_unetq.sensitivity import Sensitivities, Sensitivity
from monai_unetq.surgery.workload import Unit


def found(trace: float = 1.0, metric: Any = "hessian") -> Sensitivities:
    entries, units = {}, []
    for number, (layer, part) in enumerate((("a", "input"), ("b", "skip"), ("b", "up"))):
        units.append(Unit(layer, part, 9, 16, 16, 100 * (number + 1)))
        for kind in ("weight", "input"):
            entry = Sensitivity(layer, part, kind, 9, trace * (number - 1), 0.1, {2: 1.0}, {2: 5.0 + number})
            entries[entry.name] = entry
    return Sensitivities(entries, metric, tuple(units), 1, (1, 1, 4, 4), {})


def heights(
    monkeypatch: pytest.MonkeyPatch, sensitivities: Sensitivities, path: Path
) -> list[tuple[float, float]]:
    """Place and height of every bar."""
    drawn: list[tuple[float, float]] = []
    bar = Axes.bar

    def record(self: Axes, x: Any, height: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append((x, height))
        return bar(self, x, height, *args, **kwargs)

    monkeypatch.setattr(Axes, "bar", record)
    assert sensitivity_figure(sensitivities, path) == path
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return drawn


def test_traces_and_macs_with_halves_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = heights(monkeypatch, found(), tmp_path / "figure.png")
    assert [height for _, height in drawn] == [-1, 0, 1, -1, 0, 1, 100, 200, 300]
    places = [x for x, _ in drawn[:3]]
    assert places[0] == 0 and places[1] < 1 < places[2] and round(sum(places[1:]) / 2, 9) == 1


def test_without_traces_omega_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = heights(monkeypatch, found(math.nan, "drop"), tmp_path / "figure.png")
    assert [height for _, height in drawn[:3]] == [5, 6, 7]


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        sensitivity_figure(Sensitivities({}, "hessian", (), 0, (1, 1), {}), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def spread(*traces: float) -> Sensitivities:
    """Layers of one weight and input each, with these traces, their errors 0.01."""
    entries, units = {}, []
    for number, trace in enumerate(traces):
        units.append(Unit(f"layer{number}", "input", 9, 16, 16, 100))
        for kind in ("weight", "input"):
            entry = Sensitivity(f"layer{number}", "input", kind, 9, trace, 0.01, {2: 1.0}, {2: 1.0})
            entries[entry.name] = entry
    return Sensitivities(entries, "hessian", tuple(units), 1, (1, 1, 4, 4), {})


def test_small_traces_show_beside_large_ones(tmp_path: Path) -> None:
    text = sensitivity_figure(spread(1000.0, 0.5, -0.2, 0.1), tmp_path / "wide.svg").read_text()
    assert "average Hessian trace of weights (logarithmic beyond ±1e-02)" in text
    assert "multiply-accumulates for one image (" not in text
    assert "logarithmic" not in sensitivity_figure(spread(3.0, 2.0, 1.0), tmp_path / "even.svg").read_text()


def test_the_same_numbers_give_the_same_svg(tmp_path: Path) -> None:
    files = [tmp_path / folder / "figure.svg" for folder in ("one", "two")]
    first, second = (sensitivity_figure(found(), file).read_bytes() for file in files)
    assert first == second and b"<svg" in first
