"""How grey-matter data sets of the spinal cord lie on disk, the 2016 challenge's files and BIDS: found, checked
and read, four raters merged to one label."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813

from .sources import Pair, Source, Survey, listing
from .volumes import check_same_place, classes, label_like, read_volume

__all__ = ["majority", "survey_gm"]

RATERS = (1, 2, 3, 4)
CHALLENGE_VALUES = {0: 0, 1: 1, 2: 0}  # background, grey matter, white matter
BIDS_VALUES = {0: 0, 1: 1}
_CHALLENGE = re.compile(r"(site\d+)-(sc\d+)-(image|mask-r(\d+))\.nii(\.gz)?", re.IGNORECASE)
_IMAGE_SUFFIX = "_T2starw.nii.gz"
_LABEL_SUFFIX = "_T2starw_gmseg-manual.nii.gz"
_SESSION = re.compile(r"ses-?\d+$", re.IGNORECASE)


def survey_gm(folder: Path) -> Survey:
    """Find the scans of a grey-matter data set to prepare.

    Accepted are the 2016 challenge's ``siteN-scMM-image.nii.gz`` with ``siteN-scMM-mask-r1.nii.gz`` to ``-r4``
    (0 background, 1 grey matter, 2 white matter; each sc number of a site is a person), in the folder or
    below; and BIDS: ``sub-*/**/*_T2starw.nii.gz`` with ``*_T2starw_gmseg-manual.nii.gz`` of the same place
    under ``derivatives/labels`` (0 and 1; ``sub-NAMESes1`` and ``sub-NAMESes2`` are one person). Other files,
    such as levels or masks of the whole cord, are passed over.

    Args:
        folder: the folder that holds them.

    Returns:
        a case per scan; reading one gives image and label as volumes in the image's place, 1 = grey matter.

    Raises:
        FileNotFoundError: neither layout is there.
    """
    challenge = [path for path in sorted(folder.rglob("*.nii*")) if _CHALLENGE.fullmatch(path.name)]
    if challenge:
        return _survey_challenge(challenge)
    if any(folder.glob(f"sub-*/**/*{_IMAGE_SUFFIX}")) or (folder / "derivatives" / "labels").is_dir():
        return _survey_bids(folder)
    found = listing(sorted(entry.name for entry in folder.iterdir()))
    raise FileNotFoundError(
        f"{folder}: no grey-matter scans in it (found {found}); expected siteN-scMM-image.nii.gz with "
        f"siteN-scMM-mask-r1.nii.gz to -r4, or BIDS with sub-*/anat/*{_IMAGE_SUFFIX}"
    )


def majority(votes: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Merge the raters of one scan: foreground where more than half of them say so, so a tie is background.

    Args:
        votes: one array of 0 and 1 for each rater, all of one shape.

    Returns:
        of the same shape, uint8, 0 and 1.
    """
    counts: npt.NDArray[np.int64] = np.stack(votes).sum(axis=0, dtype=np.int64)
    return (2 * counts > len(votes)).astype(np.uint8)


def _survey_challenge(paths: Sequence[Path]) -> Survey:
    problems: list[str] = []
    images: dict[str, Path] = {}
    masks: dict[str, dict[int, Path]] = {}
    for path in paths:
        match = _CHALLENGE.fullmatch(path.name)
        if match is None:
            continue
        name, rater = f"{match[1]}-{match[2]}".lower(), int(match[4] or 0)
        other = masks.get(name, {}).get(rater) if rater else images.get(name)
        if other is not None:
            problems.append(f"{path}: {other} is there too; expected one file. Remove one")
        elif match[4]:
            masks.setdefault(name, {})[rater] = path
        else:
            images[name] = path
    for name in sorted(images.keys() | masks.keys()):
        given = masks.get(name, {})
        if name not in images:
            first = next(iter(given.values()))
            problems.append(
                f"{first}: no image for it; expected {name}-image.nii.gz. Add it or remove its masks"
            )
        elif not given:
            problems.append(
                f"{images[name]}: no mask for it; expected {name}-mask-r1.nii.gz to -r4. The challenge's test "
                "scans have none: leave them out"
            )
        elif missing := [rater for rater in RATERS if rater not in given]:
            wanted = ", ".join(f"{name}-mask-r{rater}.nii.gz" for rater in missing)
            problems.append(f"{images[name]}: mask(s) missing: {wanted}; expected four raters. Add them")
        problems += [
            f"{given[rater]}: rater {rater}, expected 1 to 4"
            for rater in sorted(given)
            if rater not in RATERS
        ]
    cases = tuple(
        Source(
            name=name,
            read=_challenge_reader(images[name], [masks[name][rater] for rater in RATERS]),
            files=(images[name], *(masks[name][rater] for rater in RATERS)),
            group=name,
            site=name.partition("-")[0],
        )
        for name in sorted(images)
        if all(rater in masks.get(name, {}) for rater in RATERS)
    )
    return Survey(
        cases,
        tuple(problems),
        description=f"{len(cases)} T2*-weighted scans of the spinal cord from the 2016 grey matter segmentation "
        "challenge; grey matter where more than half of four raters say so.",
        reference="Prados et al., NeuroImage 152:312-329, 2017",
        licence="terms of the 2016 spinal cord grey matter segmentation challenge (license.txt of the download)",
    )


def _challenge_reader(image_file: Path, mask_files: Sequence[Path]) -> Callable[[], Pair]:
    def read() -> Pair:
        image = read_volume(image_file)
        votes = [_votes(image, image_file, mask_file, CHALLENGE_VALUES) for mask_file in mask_files]
        return image, label_like(image, majority(votes))

    return read


def _survey_bids(folder: Path) -> Survey:
    labels_folder = folder / "derivatives" / "labels"
    images = {path.relative_to(folder): path for path in sorted(folder.glob(f"sub-*/**/*{_IMAGE_SUFFIX}"))}
    labels = {
        (path.parent / (path.name.removesuffix(_LABEL_SUFFIX) + _IMAGE_SUFFIX)).relative_to(
            labels_folder
        ): path
        for path in sorted(labels_folder.glob(f"sub-*/**/*{_LABEL_SUFFIX}"))
    }
    problems = [
        f"{images[place]}: no grey-matter mask for it; expected "
        f"{labels_folder / place.parent / (_stem(place) + _LABEL_SUFFIX)}. Add it or remove the scan"
        for place in sorted(images.keys() - labels.keys())
    ]
    problems += [
        f"{labels[place]}: no scan for it; expected {folder / place}. Add it or remove the mask"
        for place in sorted(labels.keys() - images.keys())
    ]
    sites = _bids_sites(folder / "participants.tsv")
    cases = tuple(
        Source(
            name=_stem(place),
            read=_bids_reader(images[place], labels[place]),
            files=(images[place], labels[place]),
            group=_SESSION.sub("", place.parts[0]),
            site=sites.get(place.parts[0], ""),
        )
        for place in sorted(images.keys() & labels.keys())
    )
    return Survey(
        cases,
        tuple(problems),
        description=f"{len(cases)} T2*-weighted scans of the spinal cord from a BIDS data set; grey matter as "
        "drawn by hand.",
        reference="dataset_description.json and README of the source",
        licence="the LICENSE file of the source",
    )


def _bids_reader(image_file: Path, label_file: Path) -> Callable[[], Pair]:
    def read() -> Pair:
        image = read_volume(image_file)
        return image, label_like(image, _votes(image, image_file, label_file, BIDS_VALUES))

    return read


def _votes(
    image: sitk.Image, image_file: Path, mask_file: Path, meaning: dict[int, int]
) -> npt.NDArray[np.uint8]:
    mask = read_volume(mask_file)
    check_same_place(image, mask, image_file, mask_file)
    return classes(mask, mask_file, meaning)


def _stem(place: Path) -> str:
    return place.name.removesuffix(_IMAGE_SUFFIX)


def _bids_sites(table: Path) -> dict[str, str]:
    """The site of each participant, where the table names one."""
    if not table.is_file():
        return {}
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = [
            {str(k).lower(): v or "" for k, v in row.items()} for row in csv.DictReader(file, delimiter="\t")
        ]
    columns = ("site", "institution", "institution_id")
    return {
        row["participant_id"]: next((row[column] for column in columns if row.get(column)), "")
        for row in rows
        if row.get("participant_id")
    }
