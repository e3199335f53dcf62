"""The page of the paper's comparison: tables between their marks, the JSON beside it, all else untouched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.scripts import load

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    return load("reproduction")


def test_the_page_in_the_repository_is_what_its_json_gives(script: ModuleType, tmp_path: Path) -> None:
    study, out = tmp_path / "study", tmp_path / "out"
    out.mkdir()
    shutil.copy(RESULTS / "reproduction.md", out)
    for kind in ("em", "gm", "nih"):
        (study / kind / "cpu").mkdir(parents=True)
        shutil.copy(RESULTS / f"reproduction-{kind}.json", study / kind / "cpu" / "results.json")
    script.main(["--study", str(study), "--out", str(out)])
    assert (out / "reproduction.md").read_text() == (RESULTS / "reproduction.md").read_text()
    for kind in ("em", "gm", "nih"):
        name = f"reproduction-{kind}.json"
        assert json.loads((out / name).read_text()) == json.loads((RESULTS / name).read_text())


def test_a_data_set_without_results_keeps_its_table_and_a_page_without_marks_is_refused(
    script: ModuleType, tmp_path: Path
) -> None:
    study, out = tmp_path / "study", tmp_path / "out"
    out.mkdir()
    page = out / "reproduction.md"
    page.write_text("no marks\n")
    script.main(["--study", str(study), "--out", str(out)])
    assert page.read_text() == "no marks\n"
    (study / "nih" / "cpu").mkdir(parents=True)
    shutil.copy(RESULTS / "reproduction-nih.json", study / "nih" / "cpu" / "results.json")
    with pytest.raises(ValueError, match=r"nih: made by benchmarks/reproduction\.py"):
        script.main(["--study", str(study), "--out", str(out)])
    assert page.read_text() == "no marks\n"
    assert not (out / "reproduction-nih.json").exists()
