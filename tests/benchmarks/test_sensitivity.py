"""The study of sensitivities: the page in the repository is what its JSON gives, ratios and intervals by hand."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
SCRIPT = ROOT / "benchmarks" / "sensitivity.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """The script as a module."""
    specification = importlib.util.spec_from_file_location("sensitivity_benchmark", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_the_page_in_the_repository_is_what_its_json_gives(tmp_path: Path) -> None:
    out, pages = tmp_path / "out", tmp_path / "pages"
    out.mkdir()
    pages.mkdir()
    shutil.copy(RESULTS / "sensitivity.md", pages)
    kinds = [kind for kind in ("em", "gm", "nih") if (RESULTS / f"sensitivity-{kind}.json").exists()]
    assert kinds
    for kind in kinds:
        shutil.copy(RESULTS / f"sensitivity-{kind}.json", out / f"{kind}.json")
    command = [sys.executable, str(SCRIPT), "page", "--out", str(out), "--page", str(pages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (pages / "sensitivity.md").read_text() == (RESULTS / "sensitivity.md").read_text()
    for kind in kinds:
        name = f"sensitivity-{kind}.json"
        assert json.loads((pages / name).read_text()) == json.loads((RESULTS / name).read_text())


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


def test_the_interval_is_students(study: ModuleType) -> None:
    # mean 2, standard deviation 1, t(0.975, 2) = 4.303: 4.303 / √3 = 2.48
    assert study.interval([1.0, 2.0, 3.0]) == "2.00 ± 2.48"
    assert study.interval([1.5]) == "1.50"


def test_the_score_is_the_mean_of_both_classes(study: ModuleType) -> None:
    import torch

    output = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(1, 1, 2, 2)
    label = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
    # foreground 2·1/(2 + 1), background 2·2/(2 + 3)
    assert study.dice_of(output, label) == pytest.approx(100 * (2 / 3 + 4 / 5) / 2, abs=1e-3)
