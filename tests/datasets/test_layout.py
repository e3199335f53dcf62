"""Reading a prepared data set: paths of one part of a fold, and clear errors where it is not what it should be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monai_unetq.datasets import Split, data_list, folds, image_list, write_phantom

FOLDS = "splits_final.json"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom("em", tmp_path_factory.mktemp("raw"), size=32, count=12)


@pytest.fixture
def dataset(prepared: Path, tmp_path: Path) -> Path:
    """The same files under another name, to be broken."""
    import shutil

    return Path(shutil.copytree(prepared, tmp_path / "Dataset501_EM"))


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(edit(content)))


def test_parts_are_disjoint_and_complete(prepared: Path) -> None:
    for number, fold in enumerate(folds(prepared)):
        for part, names in (("train", fold.train), ("validation", fold.validation), ("test", fold.test)):
            entries = data_list(prepared, number, part)  # type: ignore[arg-type]
            assert tuple(entry["case"] for entry in entries) == names
            for entry in entries:
                assert list(entry) == ["image", "label", "case", "group"]
                assert Path(entry["image"]) == prepared / "imagesTr" / f"{entry['case']}_0000.png"
                assert Path(entry["label"]) == prepared / "labelsTr" / f"{entry['case']}.png"


def test_paths_are_absolute_from_a_relative_folder(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared.parent)
    entries = data_list("Dataset501_EM", 0, "test")
    assert all(
        os.path.isabs(entry[key]) and Path(entry[key]).is_file()
        for entry in entries
        for key in ("image", "label")
    )


def test_nnunet_reads_train_and_val(prepared: Path) -> None:
    entries = json.loads((prepared / FOLDS).read_text())
    assert [set(entry) for entry in entries] == [{"train", "val", "test"}] * len(entries)
    assert folds(prepared)[0] == Split(*(tuple(entries[0][key]) for key in ("train", "val", "test")))


@pytest.mark.parametrize("fold", [5, -1, 1.0, True, "0"])
def test_no_such_fold(prepared: Path, fold: Any) -> None:
    with pytest.raises(
        ValueError, match=r"splits_final.json: there is no fold .*; expected a number from 0 to 4"
    ):
        data_list(prepared, fold)


def test_no_such_part(prepared: Path) -> None:
    with pytest.raises(ValueError, match="part is 'val', expected one of 'train', 'validation', 'test'"):
        data_list(prepared, 0, "val")  # type: ignore[arg-type]


def test_no_folder_or_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"none: no such folder; expected a prepared data set.*unetq data"
    ):
        data_list(tmp_path / "none")
    with pytest.raises(
        FileNotFoundError, match=r"dataset.json: no such file.*not a prepared data set.*unetq data"
    ):
        folds(tmp_path)


def test_missing_files_are_named(dataset: Path) -> None:
    (dataset / "labelsTr" / "em_11.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"em_11.png: missing, but splits_final.json names its case 'em_11'"
    ):
        data_list(dataset, 0, "test")
    assert len(data_list(dataset, 0, "train")) == 8
    (dataset / FOLDS).unlink()
    with pytest.raises(FileNotFoundError, match=r"splits_final.json: no such file"):
        data_list(dataset)


def test_a_group_in_two_parts_is_refused(dataset: Path) -> None:
    groups = json.loads((dataset / "dataset.json").read_text())["groups"]
    groups["em_11"] = groups["em_00"]
    change(dataset / "dataset.json", lambda content: {**content, "groups": groups})
    with pytest.raises(
        ValueError, match=r"splits_final.json: fold 0: group .* is in two parts: 'em_00' in train, 'em_11'"
    ):
        data_list(dataset)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda entries: {"folds": entries}, "expected a list of folds, found dict"),
        (lambda entries: [], "expected a list of folds"),
        (lambda entries: [{"train": ["em_00"], "val": ["em_01"]}], "fold 0 is not three lists"),
        (lambda entries: [{**entries[0], "val": "em_01"}], "fold 0 is not three lists"),
        (lambda entries: [{**entries[0], "test": [1]}], "fold 0 is not three lists"),
        (lambda entries: [{**entries[0], "test": []}], "fold 0: the test part of the split is empty"),
        (lambda entries: [{**entries[0], "test": ["em_00"]}], "fold 0: .*'em_00' in train, test"),
        (lambda entries: [entries[0], {**entries[0], "test": ["em_99"]}], "fold 1: case 'em_99' is in the test part"),
    ],
)  # fmt: skip
def test_bad_folds_are_refused(dataset: Path, edit: Callable[[Any], Any], message: str) -> None:
    change(dataset / FOLDS, edit)
    with pytest.raises(ValueError, match=rf"splits_final.json: {message}"):
        folds(dataset)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable as JSON"), ("[]", "no file_ending"), ('{"file_ending": ".png"}', "no groups in it")],
)
def test_bad_descriptions_are_refused(dataset: Path, text: str, message: str) -> None:
    (dataset / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=rf"dataset.json: {message}"):
        data_list(dataset)


def test_images_are_a_file_a_folder_a_pattern_or_a_list(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    names = ["a.png", "b.png", "c.nii.gz"]
    assert image_list(str(tmp_path)) == [{"image": str(tmp_path / name)} for name in names]
    assert image_list(f"{tmp_path}/*.png") == [{"image": str(tmp_path / name)} for name in names[:2]]
    assert image_list(str(tmp_path / "b.png")) == [{"image": str(tmp_path / "b.png")}]
    listed = [str(tmp_path / name) for name in ("b.png", "a.png")]
    assert image_list(listed) == [{"image": name} for name in listed]


def test_images_that_are_missing_or_share_a_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t2.nii.gz").touch()
    with pytest.raises(ValueError, match="have the same name, under which results are written"):
        image_list(f"{tmp_path}/*/t2.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"\*\.png: no image there"):
        image_list(f"{tmp_path}/*.png")
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such image"):
        image_list([str(tmp_path / "none.png")])
