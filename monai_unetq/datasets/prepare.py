"""How a downloaded data set, or a phantom, becomes a prepared one: checked as a whole, written case by case,
taken up again where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from tqdm import tqdm

from .cases import Case, Split
from .em import survey_em
from .gm import survey_gm
from .layout import DESCRIPTION, image_path, label_path, write_folds, write_json
from .nih import survey_nih
from .sources import Pair, Pixels, Source, Survey, listing, refuse
from .splits import block_folds, check_groups, patient_folds, person_folds
from .volumes import flat_volume, label_like, write_volume

__all__ = ["KindName", "foreground", "prepare", "write_phantom"]

KindName = Literal["em", "gm", "nih"]

RECORD = "prepared.json"
VERSION = 1  # of what is written for a case; a change makes everything be prepared again
PARTIAL = ".partial-"


@dataclass(frozen=True)
class _Kind:
    """What is the same for a data set whatever it is prepared from."""

    folder: str
    channel: str
    label: str
    survey: Callable[[Path], Survey]

    @property
    def name(self) -> str:
        return self.folder.partition("_")[2]


_KINDS = {
    "em": _Kind("Dataset501_EM", "ssTEM", "cell interior", survey_em),
    "gm": _Kind("Dataset502_GM", "T2starw", "grey matter", survey_gm),
    "nih": _Kind(
        "Dataset503_NIH", "CT", "pancreas", survey_nih
    ),  # nnU-Net normalizes a channel of this name as CT
}


def foreground(kind: KindName) -> str:
    """What the label 1 of a prepared data set is called."""
    return _KINDS[kind].label


def prepare(kind: KindName, source: Path, out: Path) -> Path:
    """Prepare a downloaded data set: check it, and write it in nnU-Net's raw layout with folds.

    The whole source is checked before anything is written. Cases that were prepared before from the same
    files are left as they are, so the same call goes on after an interruption; cases whose files changed are
    prepared again. ``dataset.json`` is written last.

    Args:
        kind: ``"em"``, ``"gm"`` or ``"nih"``.
        source: the downloaded folder; see docs/data.md for the layouts.
        out: where the data set's folder is made; nnU-Net's ``nnUNet_raw`` serves.

    Returns:
        the data set's folder, such as ``out/Dataset501_EM``.

    Raises:
        ValueError: the source is not what it should be (up to ten problems are listed, each by file), or the
            folder holds cases that are not in the source.
        FileNotFoundError: there is no such source.
    """
    description = _kind(kind)
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder; expected a downloaded data set. Check the path")
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: is a file, not a folder; give the folder that holds the data set")
    survey = description.survey(source)
    return _write(kind, survey, str(source), Path(out), "source")


def write_phantom(
    kind: KindName,
    out: Path,
    dimensions: int = 2,
    size: int | None = None,
    seed: int = 0,
    count: int | None = None,
) -> Path:
    """Write a phantom in the layout of a prepared data set.

    Args:
        kind: ``"em"`` (membranes), ``"gm"`` (spinal cord) or ``"nih"`` (abdomen).
        out: where the data set's folder is made.
        dimensions: 2 for slices, 3 for volumes.
        size: height and width in px; the phantom's own by default.
        seed: a number from 0.
        count: how many, as the phantom counts; the phantom's own by default.

    Returns:
        the data set's folder.

    Raises:
        ValueError: an argument is out of range, or the folder holds other cases.
    """
    from . import phantoms

    _kind(kind)
    draw: Callable[..., list[Case]] = {
        "em": phantoms.membrane_phantom,
        "gm": phantoms.cord_phantom,
        "nih": phantoms.abdomen_phantom,
    }[kind]
    chosen = {key: value for key, value in (("size", size), ("count", count)) if value is not None}
    cases = draw(seed=seed, dimensions=dimensions, **chosen)
    ending = ".png" if kind == "em" and dimensions == 2 else ".nii.gz"
    grouped = any(case.group for case in cases) or ending == ".nii.gz"
    survey = Survey(
        tuple(
            Source(
                name=case.name if case.group else f"{kind}_{case.name}",
                read=_phantom_reader(kind, case, ending),
                made=_digest(case.image, case.label),
                group=(case.group or f"{kind}_{case.name}") if grouped else "",
            )
            for case in cases
        ),
        ending=ending,
        description=f"A phantom drawn by {draw.__name__} from seed {seed}; no real data.",
        reference="monai_unetq.datasets.phantoms",
        licence="none; drawn by a program",
    )
    return _write(kind, survey, draw.__name__, Path(out), "phantom")


def _write(kind: KindName, survey: Survey, origin: str, out: Path, made_from: str) -> Path:
    """Check all cases of a survey, then write those that are not there yet."""
    description = _KINDS[kind]
    dataset = out / description.folder
    record = _Record.read(dataset / RECORD)
    _refuse_leftovers(dataset, record, made_from, [case.name for case in survey.cases], survey.ending)
    waiting = _check(survey, origin, dataset, record, description.name)
    try:
        splits, groups = _folds(kind, survey.cases)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error

    for folder in (dataset / "imagesTr", dataset / "labelsTr"):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{PARTIAL}*"):  # of a run that was killed while it wrote
            left.unlink()
    if waiting:  # while cases are replaced the data set is not usable
        (dataset / DESCRIPTION).unlink(missing_ok=True)
    record.made_from = made_from
    for case, mark in tqdm(waiting, desc=f"writing {description.name}", unit="case", disable=None):
        image, label = case.read()
        record.cases.pop(case.name, None)
        record.write(dataset / RECORD)  # between the two files below the case is neither the old nor the new
        _write_pixels(image, image_path(dataset, case.name, survey.ending))
        _write_pixels(label, label_path(dataset, case.name, survey.ending))
        record.cases[case.name] = mark
        record.write(dataset / RECORD)
    write_folds(dataset, splits)
    write_json(
        dataset / DESCRIPTION,
        {
            "name": description.name,
            "description": survey.description,
            "reference": survey.reference,
            "licence": survey.licence,
            "channel_names": {"0": description.channel},
            "labels": {"background": 0, description.label: 1},
            "numTraining": len(survey.cases),
            "file_ending": survey.ending,
            "groups": groups,
        },
    )
    return dataset


def _check(
    survey: Survey, origin: str, dataset: Path, record: _Record, name: str
) -> list[tuple[Source, str]]:
    """Read every case that is not prepared yet; those cases with their fingerprints, or one error for all."""
    counts = Counter(case.name for case in survey.cases)
    repeated = sorted(case for case, count in counts.items() if count > 1)
    problems = list(survey.problems)
    problems += [f"case {case!r} is there more than once; expected one source a case" for case in repeated]
    waiting: list[tuple[Source, str]] = []
    hashes: dict[Path, bytes] = {}
    for case in tqdm(survey.cases, desc=f"checking {name}", unit="case", leave=False, disable=None):
        try:
            mark = _fingerprint(case, hashes)
            if not record.holds(dataset, case.name, mark, survey.ending):
                case.read()
                waiting.append((case, mark))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    refuse(origin, problems)
    return waiting


@dataclass
class _Record:
    """What was prepared: the fingerprint of each case that lies there whole."""

    made_from: str
    cases: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> _Record:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(content["made_from"]), dict(content["cases"]))
        except FileNotFoundError:
            return cls("", {})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not what unetq data writes ({error!r}). Remove the folder {path.parent} to prepare it anew"
            ) from error

    def write(self, path: Path) -> None:
        write_json(path, {"version": VERSION, "made_from": self.made_from, "cases": self.cases})

    def holds(self, dataset: Path, name: str, mark: str, ending: str) -> bool:
        paths = (image_path(dataset, name, ending), label_path(dataset, name, ending))
        return self.cases.get(name) == mark and all(path.is_file() for path in paths)


def _refuse_leftovers(
    dataset: Path, record: _Record, made_from: str, names: Sequence[str], ending: str
) -> None:
    """Raise if the folder holds anything that this run does not account for. Nothing is deleted."""
    advice = f"Remove the folder, or give another --out: {dataset}"
    if record.made_from not in ("", made_from):
        raise ValueError(
            f"{dataset}: was prepared from a {record.made_from}, not from a {made_from}; the two are not mixed. "
            f"{advice}"
        )
    expected = {path(dataset, name, ending) for name in names for path in (image_path, label_path)}
    found = {
        entry
        for folder in ("imagesTr", "labelsTr")
        if (dataset / folder).is_dir()
        for entry in (dataset / folder).iterdir()
        if not entry.name.startswith(".")
    }
    leftover = sorted(str(entry.relative_to(dataset)) for entry in found - expected)
    if leftover:
        raise ValueError(
            f"{dataset}: holds {len(leftover)} file(s) that are not in the source: {listing(leftover)}. Nothing "
            f"was changed. Remove them if they are not wanted. {advice}"
        )


def _folds(kind: KindName, cases: Sequence[Source]) -> tuple[list[Split], dict[str, str]]:
    groups = {case.name: case.group for case in cases}
    if not any(groups.values()):
        splits, groups = block_folds(list(groups))
    elif kind == "gm":
        splits = person_folds(groups, {case.group: case.site for case in cases})
    else:
        splits = patient_folds(groups)
    for split in splits:
        check_groups(split, groups)
    return splits, groups


def _fingerprint(case: Source, hashes: dict[Path, bytes]) -> str:
    """A hash of all that a prepared case depends on; the pages of a stack share the hash of its file."""
    digest = hashlib.sha256(f"{VERSION} {case.name} {case.made}".encode())
    for path in case.files:
        if path not in hashes:
            hashes[path] = _hash(path)
        digest.update(path.name.encode() + hashes[path])
    return digest.hexdigest()


def _hash(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _digest(*arrays: npt.NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _write_pixels(pixels: Pixels, path: Path) -> None:
    """Write an image or a label so that it is there whole or not at all."""
    temporary = path.with_name(f"{PARTIAL}{path.name}")
    if isinstance(pixels, sitk.Image):
        write_volume(pixels, temporary)
    else:
        Image.fromarray(pixels).save(temporary)
    os.replace(temporary, path)


def _phantom_reader(kind: KindName, case: Case, ending: str) -> Callable[[], Pair]:
    """Gives a phantom's case the number type of the real data: 8 bits for EM, HU in int16 for CT."""

    def read() -> Pair:
        image: npt.NDArray[np.generic] = case.image[0]
        if kind == "em":
            image = np.rint(case.image[0] * 255).astype(np.uint8)
        elif kind == "nih":
            image = np.rint(case.image[0]).astype(np.int16)
        if ending == ".png":
            return image.astype(np.uint8), case.label[0]
        volume = flat_volume(image, case.spacing)
        label = case.label[0] if case.label.ndim == 4 else case.label
        return volume, label_like(volume, label)

    return read


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise ValueError(f"kind is {name!r}, expected one of {', '.join(map(repr, _KINDS))}")
    return _KINDS[name]
