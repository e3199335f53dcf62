"""The page of the paper's comparison: tables between their marks, the JSON beside it, all else untouched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def run(study: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "reproduction.py"),
        "--study",
        str(study),
        "--out",
        str(out),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_page_in_the_repository_is_what_its_json_gives(tmp_path: Path) -> None:
    study, out = tmp_path / "study", tmp_path / "out"
    out.mkdir()
    shutil.copy(RESULTS / "reproduction.md", out)
    for kind in ("em", "gm", "nih"):
        (study / kind / "cpu").mkdir(parents=True)
        shutil.copy(RESULTS / f"reproduction-{kind}.json", study / kind / "cpu" / "results.json")
    done = run(study, out)
    assert done.returncode == 0, done.stderr
    assert (out / "reproduction.md").read_text() == (RESULTS / "reproduction.md").read_text()
    for kind in ("em", "gm", "nih"):
        name = f"reproduction-{kind}.json"
        assert json.loads((out / name).read_text()) == json.loads((RESULTS / name).read_text())


def test_a_data_set_without_results_keeps_its_table_and_a_page_without_marks_is_refused(
    tmp_path: Path,
) -> None:
    study, out = tmp_path / "study", tmp_path / "out"
    out.mkdir()
    page = out / "reproduction.md"
    page.write_text("no marks\n")
    assert run(study, out).returncode == 0
    assert page.read_text() == "no marks\n"
    (study / "nih" / "cpu").mkdir(parents=True)
    shutil.copy(RESULTS / "reproduction-nih.json", study / "nih" / "cpu" / "results.json")
    refused = run(study, out)
    assert refused.returncode != 0
    assert "nih: made by benchmarks/reproduction.py" in refused.stderr
    assert page.read_text() == "no marks\n"
    assert not (out / "reproduction-nih.json").exists()
