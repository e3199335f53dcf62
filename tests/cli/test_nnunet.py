from __future__ import annotations

import json
from pathlib import Path

import pytest

from monai_unetq.cli import main
from monai_unetq.nnunet import external_folder


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "Dataset004_Hippocampus"
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(
        json.dumps({"plans_name": "nnUNetPlans", "configurations": {"2d": {}}})
    )
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return folder


def test_path_prints_the_folder_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nnunet", "path"]) == 0
    assert capsys.readouterr().out == f"{external_folder()}\n"


def test_plan_writes_what_the_options_say(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "nnunet plan -d 4 -c 2d --budget weights=4.0bits --choices 2,4,8 --activations int6 --epochs 9 -o Mixed"
    assert main([*words.split(), "--no-equalization", "--norms", "int8"]) == 0
    out = capsys.readouterr().out
    assert "plans: " in out and "next: nnUNetv2_train 4 2d 0 -tr nnUNetTrainerSSQAT -p Mixed" in out
    section = json.loads((dataset / "Mixed.json").read_text())["configurations"]["2d"]["monai_unetq"]
    assert section == {
        "base_plans": "nnUNetPlans", "budget": ["weights=4.0bits"], "choices": [2, 4, 8], "activations": "int6", "epochs": 9,
        "norms": "int8", "equalized": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--weights int4 --activations int6 -c 3d", "has no configuration '3d', expected one of 2d"),
        ("--weights int4 --activations sparse -c 2d", "sparse"),
        ("--budget weights=4parsecs --activations int6 -c 2d", "budget 'weights=4parsecs' is none"),
        ("--budget weights=4bits -c 2d --epochs 0", "epochs is 0"),
    ],
)
def test_what_cannot_be_planned(
    dataset: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nnunet", "plan", "-d", "4", "-o", "New", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (dataset / "New.json").exists()


def test_weights_need_activations(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nnunet", "plan", "-d", "4", "-c", "2d", "--weights", "int4", "-o", "New"])
    assert "--activations is missing" in capsys.readouterr().err
