"""``unetq reproduce``: what it asks for, what it refuses, and a whole run on a phantom, in parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from monai_unetq.cli import main
from monai_unetq.datasets import write_phantom


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/0", "a/b", "1/2/3", "-1/2"])
def test_part_is_k_of_n(part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", "em", "--data", str(tmp_path), "--out", str(tmp_path), f"--part={part}"])
    assert "expected K/N with 1 <= K <= N, such as 2/8" in capsys.readouterr().err


def test_an_unknown_row_is_refused_with_those_there_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "em", "--data", str(tmp_path), "--out", str(out), "--rows", "Q6"]) == 2
    error = capsys.readouterr().err
    assert "'Q6'" in error
    assert "Q6.0/Q0.4, Q8.0/Q0.8" in error
    assert not out.exists()


def test_missing_data_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "em", "--data", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err
    assert not out.exists()


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    text = capsys.readouterr().out
    assert "unetq reproduce em --data isbi --out study" in text
    assert "--part 3/26" in text


def test_two_parts_of_a_phantoms_comparison_merge(tmp_path: Path) -> None:
    dataset = write_phantom("em", tmp_path / "raw", size=64)
    out = tmp_path / "study"
    base = [sys.executable, "-m", "monai_unetq.cli", "reproduce", "em", "--data", str(dataset)]
    base += ["--out", str(out), "--preset", "quick", "--rows", "BNN"]
    for part, columns in ((1, {"relu"}), (2, {"relu", "tanh"})):
        done = subprocess.run([*base, "--part", f"{part}/2"], text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        document = json.loads((out / "em" / "quick" / "results.json").read_text())
        assert {row["name"] for row in document["rows"]} == {"BNN"}
        assert {row["activation"] for row in document["rows"]} == columns
        assert "rows" in done.stderr  # progress
        assert "all rows done" in done.stderr + done.stdout
        assert "78.53" in done.stdout  # the paper's BNN
    assert all(row["status"] == "done" for row in document["rows"])
    assert (out / "em" / "quick" / "comparison-relu.png").exists()
