"""``unetq reproduce``: what it asks for, what it refuses, and a whole run on a phantom, in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from monai_unetq.cli import main
from monai_unetq.datasets import write_phantom
from monai_unetq.reproduction import Settings


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


def test_two_parts_of_a_phantoms_comparison_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Settings(width=2, float_epochs=1, epochs=1, steps_per_epoch=2, batch_size=2, patch_size=(32, 32))
    monkeypatch.setattr("monai_unetq.reproduction.PRESETS", {"quick": {"em": tiny}})
    dataset = write_phantom("em", tmp_path / "raw", size=64)
    out = tmp_path / "study"
    words = f"reproduce em --data {dataset} --out {out} --preset quick --rows BNN".split()
    for part, columns in ((1, {"relu"}), (2, {"relu", "tanh"})):
        assert main([*words, "--part", f"{part}/2"]) == 0
        printed = capsys.readouterr()
        document = json.loads((out / "em" / "quick" / "results.json").read_text())
        assert {row["name"] for row in document["rows"]} == {"BNN"}
        assert {row["activation"] for row in document["rows"]} == columns
        assert "rows" in printed.err  # progress
        assert "all rows done" in printed.err + printed.out
        assert "78.53" in printed.out  # the paper's BNN
    assert all(row["status"] == "done" for row in document["rows"])
    assert (out / "em" / "quick" / "comparison-relu.png").exists()
