from __future__ import annotations

import json
from pathlib import Path

import pytest

from monai_unetq.nnunet import SECTION, Request, find_dataset, write_plans

DEFAULTS = Request(weights="int8", activations="int8")
SMALL = {"weights": "int4", "activations": "int6"}


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "Dataset004_Hippocampus"
    folder.mkdir()
    plans = {
        "plans_name": "nnUNetPlans",
        "configurations": {"2d": {"batch_size": 2}, "3d_fullres": {"batch_size": 9}},
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return folder


def written(dataset: Path, configuration: str = "2d", name: str = "W4A6", **section: object) -> dict:
    file = write_plans(dataset, "nnUNetPlans", configuration, name, section or SMALL, DEFAULTS)
    assert file == dataset / f"{name}.json"
    return dict(json.loads(file.read_text()))


def test_new_plans_have_a_name_a_request_and_everything_else_of_the_base(dataset: Path) -> None:
    found = written(dataset)
    assert found["plans_name"] == "W4A6"
    assert found["configurations"]["2d"] == {"batch_size": 2, SECTION: {"base_plans": "nnUNetPlans", **SMALL}}
    assert found["configurations"]["3d_fullres"] == {"batch_size": 9}


def test_a_second_configuration_joins_the_same_plans(dataset: Path) -> None:
    written(dataset)
    found = written(dataset, "3d_fullres", weights="int8", activations="int8")["configurations"]
    assert found["2d"][SECTION]["weights"] == "int4" and found["3d_fullres"][SECTION]["weights"] == "int8"
    assert written(dataset) == written(dataset)


def test_another_request_under_the_same_name_is_refused(dataset: Path) -> None:
    before = written(dataset)
    with pytest.raises(FileExistsError, match=r"2d has the request .*int4"):
        written(dataset, weights="int2", activations="int6")
    assert json.loads((dataset / "W4A6.json").read_text()) == before


def test_plans_made_from_others_are_not_replaced(dataset: Path) -> None:
    (dataset / "W4A6.json").write_text(json.dumps({"plans_name": "W4A6", "configurations": {}}))
    with pytest.raises(FileExistsError, match="was not made from nnUNetPlans"):
        written(dataset)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("other", "2d", "W4A6"),
            FileNotFoundError,
            "other.json: no such plans; run nnUNetv2_plan_and_preprocess",
        ),
        (
            ("nnUNetPlans", "3d_lowres", "W4A6"),
            ValueError,
            "no configuration '3d_lowres', expected one of 2d, 3d_fullres",
        ),
        (("nnUNetPlans", "2d", "nnUNetPlans"), ValueError, "give the new plans another name"),
    ],
)
def test_what_cannot_be_written(
    dataset: Path, arguments: tuple[str, str, str], error: type[Exception], message: str
) -> None:
    before = sorted(dataset.iterdir())
    with pytest.raises(error, match=message):
        write_plans(dataset, *arguments, SMALL, DEFAULTS)
    assert sorted(dataset.iterdir()) == before


def test_plans_with_a_request_are_no_base(dataset: Path) -> None:
    written(dataset)
    with pytest.raises(
        ValueError, match="2d has a request already; begin with the plans 'nnUNetPlans': -p nnUNetPlans"
    ):
        write_plans(dataset, "W4A6", "2d", "Other", SMALL, DEFAULTS)


def test_a_broken_request_writes_nothing(dataset: Path) -> None:
    with pytest.raises(ValueError, match="unknown key 'bits'"):
        written(dataset, bits=4, **SMALL)
    assert not (dataset / "W4A6.json").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"configurations": 3}'])
def test_plans_that_are_none(dataset: Path, content: str) -> None:
    (dataset / "nnUNetPlans.json").write_text(content)
    with pytest.raises(ValueError, match=r"nnUNetPlans\.json: no (JSON|plans of nnU-Net)"):
        written(dataset)


def test_a_data_set_is_found_by_number_and_name(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_dataset("4") == find_dataset("Dataset004_Hippocampus") == dataset
    with pytest.raises(ValueError, match="found none for data set '5', expected one; run nnUNetv2_plan"):
        find_dataset("5")
    (dataset.parent / "Dataset004_Other").mkdir()
    with pytest.raises(ValueError, match="found Dataset004_Hippocampus, Dataset004_Other"):
        find_dataset("4")
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(ValueError, match="nnUNet_preprocessed is not set: export it"):
        find_dataset("4")
