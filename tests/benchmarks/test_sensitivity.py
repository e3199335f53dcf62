"""The study of sensitivities: the page in the repository is what its JSON gives, ratios and intervals by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.scripts import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """The script as a module."""
    return load("sensitivity")


def test_the_page_in_the_repository_is_what_its_json_gives(study: ModuleType, tmp_path: Path) -> None:
    out, pages = tmp_path / "out", tmp_path / "pages"
    out.mkdir()
    pages.mkdir()
    shutil.copy(RESULTS / "sensitivity.md", pages)
    kinds = [kind for kind in ("em", "gm", "nih") if (RESULTS / f"sensitivity-{kind}.json").exists()]
    assert kinds
    for kind in kinds:
        shutil.copy(RESULTS / f"sensitivity-{kind}.json", out / f"{kind}.json")
    assert study.main(["page", "--out", str(out), "--page", str(pages)]) == 0
    assert (pages / "sensitivity.md").read_text() == (RESULTS / "sensitivity.md").read_text()
    for kind in kinds:
        name = f"sensitivity-{kind}.json"
        assert json.loads((pages / name).read_text()) == json.loads((RESULTS / name).read_text())
        # Drawn by another matplotlib it differs in places, not in what it shows.
        figures = [(folder / f"sensitivity-{kind}.svg").read_text() for folder in (pages, RESULTS)]
        titles = [
            re.findall(r"average Hessian trace[^<]*|multiply-accumulates[^<]*", text) for text in figures
        ]
        assert titles[0] == titles[1] and len(titles[0]) == 3


def test_ratios_are_of_the_halves_of_one_layer(study: ModuleType) -> None:
    rows = [
        {"layer": "a", "part": "input", "macs": 5},
        {"layer": "b", "part": "up", "macs": 4},
        {"layer": "b", "part": "skip", "macs": 6},
    ]
    assert study.ratios(rows, "macs") == [("b", 1.5)]
    halves = [
        {"layer": "b", "part": part, "input_trace": trace, "input_error": 1.0}
        for part, trace in (("up", 4.0), ("skip", 6.0))
    ]
    assert study.ratios(halves, "input_trace") == [("b", 1.5)]
    halves[0]["input_trace"] = 1.9
    assert study.ratios(halves, "input_trace") == [("b", None)], "within two standard errors of 0"


def test_the_score_is_the_mean_of_both_classes(study: ModuleType) -> None:
    import torch

    output = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(1, 1, 2, 2)
    label = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
    # foreground 2·1/(2 + 1), background 2·2/(2 + 3)
    assert study.dice_of(output, label) == pytest.approx(100 * (2 / 3 + 4 / 5) / 2, abs=1e-3)
