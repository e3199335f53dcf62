"""A comparison runs row by row, goes on where it was, shares its folder, and survives a row that fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from monai_unetq.datasets import data_list, write_phantom
from monai_unetq.reproduction import (
    PRESETS,
    Comparison,
    Row,
    Settings,
    paper_rows,
    prepared,
    score,
    write_results,
)
from monai_unetq.reproduction.run import alone, prediction_file, read_mask

ROOT = Path(__file__).resolve().parents[2]
TINY = Settings(width=2, float_epochs=1, epochs=1, steps_per_epoch=2, batch_size=2, patch_size=(32, 32))
NAMED = {(row.name, row.activation): row for row in paper_rows("em")}
Q6 = NAMED["Q6.0/Q0.4", "relu"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom("em", tmp_path_factory.mktemp("raw"), size=64)


@pytest.fixture
def comparison(dataset: Path, tmp_path: Path) -> Comparison:
    return Comparison("em", dataset, ROOT / "bundles" / "em_unet", tmp_path / "study", "tiny", TINY)


def test_rows_are_measured_on_their_files_and_not_run_twice(
    comparison: Comparison, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [NAMED["Full precision", "relu"], Q6, NAMED["Q6.0/Q0.4", "tanh"]]
    results = comparison.run(rows)
    printed = capsys.readouterr()
    assert [line.partition(": Dice")[0] for line in printed.out.splitlines()] == [
        f"em: {row.name}, {row.activation}" for row in rows
    ]
    assert (comparison.row_folder(Q6, 0) / "training.log").is_file()
    assert [(r["name"], r["activation"], r["status"]) for r in results] == [
        (row.name, row.activation, "done") for row in rows
    ]
    cases = data_list(dataset, 0, "test")
    for row, result in zip(rows, results, strict=True):
        assert result["steps"] == 2 * (1 + row.length)
        for case in cases:  # Dice by hand, from the file that was written
            predicted = read_mask(prediction_file(comparison.row_folder(row, 0) / "predictions", case))
            label = read_mask(Path(case["label"]))
            both = np.logical_and(predicted, label).sum()
            expected = 100 * 2 * both / (predicted.sum() + label.sum())
            assert result["dice"][case["case"]] == pytest.approx(expected)
            both = np.logical_or(predicted, label)
            expected = 100 * 2 * (~both).sum() / ((~predicted).sum() + (~label).sum())
            assert result["membrane_dice"][case["case"]] == pytest.approx(expected)
    # 4 bits; first and last layer have 8, biases stay float, and weigh much in so narrow a network.
    assert 2 < results[0]["weight_bytes"] / results[1]["weight_bytes"] < 8
    # The image has 8 bits, all other inputs 6.
    assert 32 / 7 < results[0]["activation_bytes"] / results[1]["activation_bytes"] < 32 / 6
    files = {path: path.stat().st_mtime_ns for path in comparison.folder.rglob("*") if path.is_file()}
    assert comparison.run(rows) == results
    assert files == {path: path.stat().st_mtime_ns for path in comparison.folder.rglob("*") if path.is_file()}


def test_a_failing_row_is_recorded_and_tried_again(comparison: Comparison) -> None:
    bad = Row("bad", "relu", {"weights": "Q0.99", "activations": "Q6.0"})
    assert comparison.document()["rows"] == []
    results = comparison.run([bad, Q6])
    assert [result["status"] for result in results] == ["failed", "done"]
    assert "Q0.99" in results[0]["error"]
    log = comparison.row_folder(bad, 0) / "training.log"
    assert "Traceback" in log.read_text()
    size = log.stat().st_size
    assert comparison.run([bad])[0]["status"] == "failed"
    assert log.stat().st_size > size


def test_an_interrupted_row_goes_on_from_its_checkpoint(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = replace(TINY, epochs=2)
    undisturbed = replace(comparison, settings=settings, folder=tmp_path / "undisturbed")
    expected = undisturbed.run_row(Q6)
    stopped = replace(comparison, settings=settings)

    from monai_unetq.training import BestModel

    original, calls = BestModel.__call__, []

    def interrupt(self: BestModel, engine: Any) -> None:
        calls.append(engine.state.epoch)
        if len(calls) == 3:  # the float network's epoch, the row's first, the row's second
            raise KeyboardInterrupt
        original(self, engine)

    monkeypatch.setattr(BestModel, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.run_row(Q6)
    assert stopped.result(Q6) is None
    assert (stopped.row_folder(Q6, 0) / "checkpoint.pt").exists()
    calls.clear()
    found = stopped.run_row(Q6)
    assert calls == [2]  # of all epochs only the one that was interrupted runs again
    assert found["dice"] == expected["dice"]
    assert found["validation"] == expected["validation"]


def test_other_settings_are_other_results(comparison: Comparison, tmp_path: Path) -> None:
    comparison.run_row(Q6)
    other = tmp_path / "bundle"
    shutil.copytree(comparison.bundle / "configs", other / "configs")
    assert replace(comparison, bundle=other).result(Q6) == comparison.result(Q6)  # a copy is the same bundle
    configuration = other / "configs" / "train.yaml"
    configuration.write_text(configuration.read_text().replace("prob: 0.5", "prob: 0.6"))
    for changed in (
        replace(comparison, settings=replace(TINY, epochs=2)),
        replace(comparison, seed=1),
        replace(comparison, folds=(1,)),
        replace(comparison, bundle=other),
    ):
        assert changed.result(Q6) is None
    assert comparison.result(replace(Q6, dropout=0.5)) is None
    assert replace(comparison, device="cuda").result(Q6) == comparison.result(Q6)


def test_parts_and_folds_merge(comparison: Comparison, dataset: Path) -> None:
    rows = [NAMED["Full precision", "relu"], Q6]
    for part in (0, 1):
        replace(comparison).run(rows[part::2])
    both = replace(comparison, folds=(0, 1))
    assert both.document()["rows"] == []  # fold 1 is still to come
    results = both.run(rows)
    assert both.document()["rows"] == results
    units = [{case["case"] for case in data_list(dataset, fold, "test")} for fold in (0, 1)]
    assert set(results[0]["dice"]) == units[0] | units[1]
    for unit in units[0]:
        single = comparison.result(Q6)
        assert single is not None
        assert results[1]["dice"][unit] == single["dice"][unit]


def test_folds_and_devices_that_are_not_there_are_refused(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="there is no fold 99"):
        replace(comparison, folds=(99,)).run([Q6])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' is not there"):
        replace(comparison, device="cuda").run([Q6])
    assert not comparison.folder.exists()


def test_another_kind_of_data_is_refused(dataset: Path, tmp_path: Path) -> None:
    assert prepared("em", dataset, tmp_path) == dataset.resolve()
    with pytest.raises(ValueError, match="'labels' are background, cell interior, expected 'pancreas'"):
        prepared("nih", dataset, tmp_path)


def test_results_are_written_as_json_tables_and_figures(comparison: Comparison) -> None:
    comparison.run([NAMED["Full precision", "relu"], Q6])
    text = write_results(comparison)
    folder = comparison.folder
    assert (folder / "results.md").read_text() == text
    assert "Q6.0/Q0.4" in text
    assert "94.05" in text  # the paper's number beside ours
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(comparison.document()))
    for name in ("comparison-relu.png", "accuracy.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 150
    assert not (folder / "comparison-tanh.png").exists()


def test_a_folder_is_one_processs_at_a_time(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = f"""
import fcntl
file = open({str(tmp_path / "row" / ".lock")!r}, "w")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except BlockingIOError:
    print("held")
"""
    with alone(tmp_path / "row"):
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "held"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "free"


def test_the_last_epoch_of_every_training_is_validated() -> None:
    for settings in (s for kinds in PRESETS.values() for s in kinds.values()):
        assert settings.float_epochs % settings.val_interval == 0
        assert settings.epochs % min(settings.val_interval, settings.epochs) == 0


def test_constant_answer(dataset: Path) -> None:
    cases = data_list(dataset, 0, "test")
    found = score("em", cases, None)
    for case in cases:
        share = read_mask(Path(case["label"])).mean()
        assert found["dice"][case["case"]] == pytest.approx(100 * 2 * share / (1 + share))
        assert found["membrane_dice"][case["case"]] == 0
