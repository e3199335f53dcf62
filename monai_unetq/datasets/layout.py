"""How a prepared data set lies on disk: nnU-Net's raw layout, with groups in dataset.json and folds beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, Literal

from .cases import Split
from .splits import check_groups

__all__ = [
    "DESCRIPTION",
    "FOLDS",
    "data_list",
    "folds",
    "image_path",
    "label_path",
    "write_folds",
    "write_json",
]

DESCRIPTION = "dataset.json"
FOLDS = "splits_final.json"
Part = Literal["train", "validation", "test"]
IMAGE_ENDINGS = (".png", ".nii.gz", ".nii")
"""Files that the bundles take as images."""

_PARTS = ("train", "validation", "test")
_KEYS = {
    "train": "train",
    "validation": "val",
    "test": "test",
}  # nnU-Net reads train and val, and passes test by
_PREPARE = "Prepare it with 'unetq data em|gm|nih --source DIR --out DIR'"


def image_path(dataset: Path, case: str, ending: str) -> Path:
    """Where the image of a case lies; 0000 is its only channel."""
    return dataset / "imagesTr" / f"{case}_0000{ending}"


def label_path(dataset: Path, case: str, ending: str) -> Path:
    """Where the label of a case lies."""
    return dataset / "labelsTr" / f"{case}{ending}"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    temporary = path.with_name(f".partial-{path.name}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_folds(dataset: Path, splits: Sequence[Split]) -> None:
    """Write ``splits_final.json``, which nnU-Net copies to its preprocessed folder when it plans."""
    write_json(
        dataset / FOLDS,
        [{_KEYS[part]: list(getattr(split, part)) for part in _PARTS} for split in splits],
    )


def folds(dataset_dir: str | Path) -> list[Split]:
    """The folds of a prepared data set.

    Args:
        dataset_dir: the folder with ``dataset.json`` and ``splits_final.json``.

    Returns:
        names of cases; no person, patient or block stands in two parts of a fold.

    Raises:
        FileNotFoundError: the folder or one of the two files is missing.
        ValueError: a file is not what ``unetq data`` writes, names an unknown case, or a fold shares a group
            between its parts.
    """
    dataset = Path(dataset_dir)
    return _folds(dataset, _groups(dataset, _description(dataset)))


def data_list(
    dataset_dir: str | Path, fold: int = 0, part: Part | Sequence[Part] = "train"
) -> list[dict[str, str]]:
    """The cases of one part of a fold, or of several, as MONAI's data sets take them.

    Args:
        dataset_dir: the folder with ``dataset.json``.
        fold: number of the fold, from 0.
        part: ``"train"``, ``"validation"`` or ``"test"``, or several of them.

    Returns:
        one dictionary a case with the keys ``image`` and ``label`` (absolute paths), ``case`` (its name) and
        ``group`` (the person, patient or block).

    Raises:
        FileNotFoundError: the folder, ``dataset.json``, ``splits_final.json``, an image or a label is missing.
        ValueError: there is no such fold or part, or a file is not what ``unetq data`` writes.
    """
    parts = (part,) if isinstance(part, str) else tuple(part)
    for name in parts:
        if name not in _PARTS:
            raise ValueError(f"part is {name!r}, expected one of {', '.join(map(repr, _PARTS))}")
    dataset = Path(dataset_dir).absolute()
    description = _description(dataset)
    groups = _groups(dataset, description)
    splits = _folds(dataset, groups)
    if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < len(splits):
        raise ValueError(
            f"{dataset / FOLDS}: there is no fold {fold!r}; expected a number from 0 to {len(splits) - 1}"
        )
    ending = description["file_ending"]
    entries = []
    for name in (case for part in parts for case in getattr(splits[fold], part)):
        image, label = image_path(dataset, name, ending), label_path(dataset, name, ending)
        for path in (image, label):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: missing, but {FOLDS} names its case {name!r}. {_PREPARE} again"
                )
        entries.append({"image": str(image), "label": str(label), "case": name, "group": groups[name]})
    return entries


def image_list(images: str | Sequence[str]) -> list[dict[str, str]]:
    """Images to run a network on, as MONAI's data sets take them.

    Args:
        images: files; or one string: a file, a folder (all its images), or a pattern such as ``scans/*.nii.gz``.

    Returns:
        one dictionary an image with the key ``image``, sorted where they were not listed.

    Raises:
        FileNotFoundError: if there is no such file, or none that matches.
        ValueError: if two images have the same file name, under which results are written.
    """
    if isinstance(images, str):
        path = Path(images)
        found = sorted(path.iterdir()) if path.is_dir() else [Path(name) for name in sorted(glob(images))]
        files = [file for file in found if file.name.lower().endswith(IMAGE_ENDINGS)]
        if not files:
            raise FileNotFoundError(
                f"{images}: no image there, expected a file, a folder or a pattern of {', '.join(IMAGE_ENDINGS)}"
            )
    else:
        files = [Path(image) for image in images]
    names: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such image")
        if file.name in names:
            raise ValueError(
                f"{file} and {names[file.name]} have the same name, under which results are written; run them apart"
            )
        names[file.name] = file
    return [{"image": str(file)} for file in files]


def _description(dataset: Path) -> Mapping[str, Any]:
    if not dataset.is_dir():
        raise FileNotFoundError(f"{dataset}: no such folder; expected a prepared data set. {_PREPARE}")
    description = _read_json(dataset / DESCRIPTION)
    if not isinstance(description, dict) or not isinstance(description.get("file_ending"), str):
        raise ValueError(
            f"{dataset / DESCRIPTION}: no file_ending in it; expected nnU-Net's dataset.json. {_PREPARE}"
        )
    return description


def _groups(dataset: Path, description: Mapping[str, Any]) -> dict[str, str]:
    groups = description.get("groups")
    if not isinstance(groups, dict) or not all(isinstance(group, str) for group in groups.values()):
        raise ValueError(
            f"{dataset / DESCRIPTION}: no groups in it; expected the person, patient or block of each case. "
            f"{_PREPARE}"
        )
    return groups


def _folds(dataset: Path, groups: Mapping[str, str]) -> list[Split]:
    path = dataset / FOLDS
    entries = _read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path}: expected a list of folds, found {type(entries).__name__}. {_PREPARE} again"
        )
    splits = []
    for number, entry in enumerate(entries):
        parts: list[Any] = [entry.get(_KEYS[part]) for part in _PARTS] if isinstance(entry, dict) else [None]
        if not all(isinstance(part, list) and all(isinstance(n, str) for n in part) for part in parts):
            raise ValueError(
                f"{path}: fold {number} is not three lists of names under train, val and test. {_PREPARE} again"
            )
        try:
            split = Split(*(tuple(part) for part in parts))
            check_groups(split, groups)
        except ValueError as error:
            raise ValueError(f"{path}: fold {number}: {error}") from error
        splits.append(split)
    return splits


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; the folder is not a prepared data set, or its preparation was interrupted. "
            f"{_PREPARE}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}). {_PREPARE} again") from error
