"""How NIH Pancreas-CT lies on disk, as TCIA's DICOM series with NIfTI labels or as JPEG slices: found, checked
and read in HU."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from .sources import Pair, Source, Survey, listing
from .volumes import classes, flat_volume, label_like, read_volume

__all__ = ["survey_nih"]

LABEL_THRESHOLD = 127
GREY_SHARE = 0.25  # of the foreground; the compression of a real mask leaves 0.02 at most
SAME_PLACE = 0.01  # mm between slices
UNEVEN = 0.1  # of the usual distance of slices
SOFT_TISSUE = (0, 200)  # HU; the pancreas in the portal-venous phase is at about 100
WITHDRAWN = {
    "0025",
    "0070",
}  # duplicates that TCIA took out of the images, while label archives still hold them
REFERENCE = (
    "Roth et al., Data From Pancreas-CT, The Cancer Imaging Archive, 2016, doi 10.7937/K9/TCIA.2016.tNB1kqBU"
)
LICENCE = "CC BY 3.0"
_AXES = ("slices", "rows", "columns")
_MODALITY, _SERIES = "0008|0060", "0020|000e"
_PATIENT = re.compile(r"PANCREAS_(\d{4})", re.IGNORECASE)
_LABEL = re.compile(r"label(\d{4})\.nii(\.gz)?", re.IGNORECASE)
_SLICE = re.compile(r"(PANCREAS_\d{4})_(\d+)\.jpe?g", re.IGNORECASE)


@dataclass(frozen=True)
class _Slice:
    """What the header of one DICOM file says."""

    path: Path
    series: str
    instance: int
    size: tuple[int, int]  # columns, rows
    spacing: tuple[float, ...]  # mm between rows, between columns
    position: npt.NDArray[np.float64]  # of the first pixel in the patient, mm
    orientation: npt.NDArray[np.float64]  # (2, 3): directions along a row and down a column


def survey_nih(folder: Path) -> Survey:
    """Find the scans of NIH Pancreas-CT to prepare.

    Accepted are TCIA's download, ``PANCREAS_NNNN/<study>/<series>/*.dcm`` with ``labelNNNN.nii.gz`` anywhere
    below the folder (a case is a patient's volume); and JPEG slices ``image/PANCREAS_NNNN_SSS.jpg`` with
    ``label/`` of the same names (a case is a slice; grey values are HU clipped to [0, 255], the label is
    foreground above 127).

    TCIA's labels say nothing of use about their place in space. Their voxel (i, j, k) is column i, row j of
    the slice with the (k + 1)-th smallest InstanceNumber, as stored: that is how the public code bases read
    them that train on this data set. The label gets the place of the image.

    Args:
        folder: the folder that holds them.

    Returns:
        a case per volume or slice; reading one gives the image in HU (int16) with the spacing, origin and
        direction of the DICOM series, and the label in the same place, 1 = pancreas.

    Raises:
        FileNotFoundError: neither layout is there.
    """
    series = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ".dcm" and path.is_file() and not path.name.startswith(".")
    ]
    if series:
        return _survey_tcia(folder, series)
    if (folder / "image").is_dir() or (folder / "label").is_dir():
        return _survey_jpeg(folder)
    found = listing(sorted(entry.name for entry in folder.iterdir()))
    raise FileNotFoundError(
        f"{folder}: no CT in it (found {found}); expected PANCREAS_NNNN/**/*.dcm with labelNNNN.nii.gz, or "
        "image/PANCREAS_NNNN_SSS.jpg and label/ of the same names"
    )


def _survey_tcia(folder: Path, paths: Sequence[Path]) -> Survey:
    problems: list[str] = []
    patients: dict[str, list[Path]] = {}
    strays: list[Path] = []
    for path in paths:
        place = (folder.name, *path.relative_to(folder).parts[:-1])
        numbers = [match[1] for part in place if (match := _PATIENT.fullmatch(part))]
        patients.setdefault(numbers[-1], []).append(path) if numbers else strays.append(path)
    if strays:
        problems.append(
            f"{strays[0]}: DICOM file outside a folder PANCREAS_NNNN ({len(strays)} such file(s)); expected "
            "PANCREAS_NNNN/<study>/<series>/*.dcm. Move or remove them"
        )
    labels: dict[str, Path] = {}
    for path in sorted(folder.rglob("label*.nii*")):
        if match := _LABEL.fullmatch(path.name):
            if match[1] in labels:
                problems.append(f"{path}: {labels[match[1]]} is there too; expected one file. Remove one")
            labels.setdefault(match[1], path)
    problems += [
        f"{patients[number][0].parent}: no label for PANCREAS_{number}; expected label{number}.nii.gz. Add it or "
        "remove the patient"
        for number in sorted(patients.keys() - labels.keys())
    ]
    problems += [
        f"{labels[number]}: no DICOM series for it; expected PANCREAS_{number}/**/*.dcm. Add it or remove the label"
        for number in sorted(labels.keys() - patients.keys() - WITHDRAWN)
    ]
    cases = tuple(
        Source(
            name=f"PANCREAS_{number}",
            read=_volume_reader(patients[number], labels[number]),
            files=(*patients[number], labels[number]),
            group=f"PANCREAS_{number}",
        )
        for number in sorted(patients.keys() & labels.keys())
    )
    return Survey(
        cases,
        tuple(problems),
        description=f"{len(cases)} portal-venous CT volumes of the abdomen in HU, from TCIA's DICOM series.",
        reference=REFERENCE,
        licence=LICENCE,
    )


def _volume_reader(series: Sequence[Path], label_file: Path) -> Callable[[], Pair]:
    def read() -> Pair:
        slices = _in_order([_read_header(path) for path in series])
        image = _read_series(slices)
        label = read_volume(label_file)
        if label.GetSize() != image.GetSize():
            raise ValueError(
                f"{label_file}: {label.GetSize()} voxels, but the DICOM series in {slices[0].path.parent} has "
                f"{image.GetSize()} (columns, rows, slices); expected the same. Download the series again if slices "
                "are missing"
            )
        foreground = classes(label, label_file, {0: 0, 1: 1})
        if slices[0].instance > slices[-1].instance:  # label slices follow the instances, ours the positions
            foreground = foreground[::-1]
        _check_tissue(sitk.GetArrayViewFromImage(image), foreground, label_file)
        return image, label_like(image, foreground)

    return read


def _read_header(path: Path) -> _Slice:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(
            f"{path}: not readable as DICOM; expected a whole CT slice. Download it again"
        ) from error

    def numbers(tag: str, name: str, count: int) -> list[float]:
        text = reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else ""
        try:
            values = [float(part) for part in text.split("\\")]
        except ValueError:
            values = []
        if len(values) != count or not np.isfinite(values).all():
            raise ValueError(
                f"{path}: {name} is {text.strip()!r}, expected {count} number(s). Download the series again"
            )
        return values

    modality = reader.GetMetaData(_MODALITY).strip() if reader.HasMetaDataKey(_MODALITY) else ""
    if modality != "CT":
        raise ValueError(
            f"{path}: modality {modality!r}, expected 'CT'. Move the file out of the patient's folder"
        )
    columns, rows, *_ = reader.GetSize()
    row, column = numbers("0028|0030", "PixelSpacing", 2)
    return _Slice(
        path=path,
        series=reader.GetMetaData(_SERIES).strip() if reader.HasMetaDataKey(_SERIES) else "",
        instance=int(numbers("0020|0013", "InstanceNumber", 1)[0]),
        size=(columns, rows),
        spacing=(row, column),
        position=np.array(numbers("0020|0032", "ImagePositionPatient", 3)),
        orientation=np.array(numbers("0020|0037", "ImageOrientationPatient", 6)).reshape(2, 3),
    )


def _in_order(slices: Sequence[_Slice]) -> list[_Slice]:
    """The slices of one volume along their normal, after checking that they are one volume without holes."""
    first = slices[0]
    by_series: dict[str, list[_Slice]] = {}
    for each in slices:
        by_series.setdefault(each.series, []).append(each)
    if len(by_series) > 1:
        listed = "; ".join(
            f"{len(group)} file(s) of series {uid}, such as {group[0].path}"
            for uid, group in by_series.items()
        )
        raise ValueError(
            f"{first.path.parent}: {len(by_series)} series ({listed}); expected one. Keep the labelled one"
        )
    for each in slices:
        for what, same, found, expected in (
            ("columns and rows", each.size == first.size, each.size, first.size),
            (
                "PixelSpacing",
                np.allclose(each.spacing, first.spacing, rtol=1e-4),
                each.spacing,
                first.spacing,
            ),
            (
                "ImageOrientationPatient",
                np.allclose(each.orientation, first.orientation, atol=1e-4),
                each.orientation.ravel().tolist(),
                first.orientation.ravel().tolist(),
            ),
        ):
            if not same:
                raise ValueError(
                    f"{each.path}: {what} {found}, but {first.path} has {expected}; expected one volume. Remove the "
                    "files of the other"
                )
    if len(slices) < 2:
        raise ValueError(
            f"{first.path}: the only slice of its series; expected a volume. Download the series again"
        )

    normal = np.cross(*first.orientation)
    along = {id(each): float(each.position @ normal) for each in slices}
    ordered = sorted(slices, key=lambda each: along[id(each)])
    steps = np.diff([along[id(each)] for each in ordered])
    usual = float(np.median(steps))
    pairs = list(zip(ordered[:-1], ordered[1:], steps.tolist(), strict=True))
    same_place = [f"{one.path} and {two.path}" for one, two, step in pairs if step < SAME_PLACE]
    if same_place:
        raise ValueError(
            f"{listing(same_place, 3)}: slices in the same place; expected one. Remove one of each pair"
        )
    gaps = [
        f"about {round(step / usual) - 1} between {one.path} and {two.path}, {step:.3g} mm apart"
        for one, two, step in pairs
        if step > 1.5 * usual
    ]
    if gaps:
        raise ValueError(
            f"{first.path.parent}: slices are missing: {listing(gaps, 3)}; expected {usual:.3g} mm. Download the "
            "series again"
        )
    uneven = [f"{one.path} and {two.path}" for one, two, step in pairs if abs(step - usual) > UNEVEN * usual]
    if uneven:
        raise ValueError(
            f"{listing(uneven, 3)}: the distance of these slices is not the usual {usual:.4g} mm; expected even "
            "distances. Resample the series"
        )
    drift = np.array([each.position - along[id(each)] * normal for each in slices])
    if float(np.ptp(drift, axis=0).max()) > 0.5 * min(first.spacing):
        raise ValueError(
            f"{first.path.parent}: the slices are shifted against each other (tilted gantry?); expected them above "
            "each other. Resample the series"
        )
    instances = np.diff([each.instance for each in ordered])
    if not ((instances > 0).all() or (instances < 0).all()):
        wrong = next(i for i, step in enumerate(instances) if step * np.sign(instances.sum() or 1) <= 0)
        raise ValueError(
            f"{ordered[wrong + 1].path}: InstanceNumber {ordered[wrong + 1].instance} follows "
            f"{ordered[wrong].instance} of {ordered[wrong].path} in space; expected them to rise or fall throughout, "
            "since the label's slices follow them. Download the series again"
        )
    return ordered


def _read_series(slices: Sequence[_Slice]) -> sitk.Image:
    """The volume in HU (RescaleSlope and RescaleIntercept of each file applied), int16."""
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(each.path) for each in slices])
    reader.SetOutputPixelType(sitk.sitkFloat32)  # slopes need not be whole numbers
    try:
        stored = reader.Execute()
    except RuntimeError as error:
        raise ValueError(
            f"{slices[0].path.parent}: the series is not readable ({str(error).strip().splitlines()[-1]}); expected "
            "whole files. Download it again"
        ) from error
    hu = np.rint(sitk.GetArrayViewFromImage(stored))
    limits = np.iinfo(np.int16)
    if hu.min() < limits.min or hu.max() > limits.max:
        raise ValueError(
            f"{slices[0].path.parent}: values from {hu.min():.0f} to {hu.max():.0f} HU, expected {limits.min} to "
            f"{limits.max}. Check RescaleSlope and RescaleIntercept"
        )
    first, last = slices[0], slices[-1]
    normal = np.cross(*first.orientation)
    between = float((last.position - first.position) @ normal) / (len(slices) - 1)
    volume = sitk.GetImageFromArray(hu.astype(np.int16))
    volume.SetSpacing((first.spacing[1], first.spacing[0], between))
    volume.SetOrigin(first.position.tolist())
    volume.SetDirection(np.stack((*first.orientation, normal), axis=1).ravel().tolist())
    return volume


def _check_tissue(hu: npt.NDArray[np.int16], label: npt.NDArray[np.uint8], label_file: Path) -> None:
    """Refuse a label that does not lie on soft tissue, and say which flip would put it there."""
    under = hu[label == 1]
    if under.size == 0:
        raise ValueError(f"{label_file}: the label is empty; expected a pancreas. Download it again")
    low, high = SOFT_TISSUE
    median = float(np.median(under))
    if low <= median <= high:
        return
    where = np.nonzero(label)
    repairs: list[tuple[float, str]] = []
    for flips in itertools.product((False, True), repeat=3):
        mirrored = tuple(
            size - 1 - index if flip else index
            for size, index, flip in zip(hu.shape, where, flips, strict=True)
        )
        values = hu[mirrored]
        if low <= float(np.median(values)) <= high:
            axes = " and ".join(axis for axis, flip in zip(_AXES, flips, strict=True) if flip)
            repairs.append((float(np.mean((values >= low) & (values <= high))), axes))
    advice = (
        f"It seems to be flipped along the {max(repairs)[1]}: mirrored so it lies on soft tissue"
        if repairs
        else "No flip repairs it; check that it belongs to this patient"
    )
    raise ValueError(
        f"{label_file}: the median under the label is {median:.0f} HU, expected soft tissue, {low} to {high} HU. {advice}"
    )


def _survey_jpeg(folder: Path) -> Survey:
    problems: list[str] = []
    parts: dict[str, dict[str, Path]] = {}
    for kind in ("image", "label"):
        files: dict[str, Path] = {}
        if not (folder / kind).is_dir():
            problems.append(
                f"{folder / kind}: no such folder; expected image/ and label/ with the same file names"
            )
            continue
        for path in sorted((folder / kind).iterdir()):
            if path.name.startswith(".") or path.suffix.lower() not in (".jpg", ".jpeg"):
                continue
            match = _SLICE.fullmatch(path.name)
            if match is None:
                problems.append(
                    f"{path}: expected a name like PANCREAS_0001_106.jpg (patient, slice). Rename it"
                )
            elif path.stem in files:
                problems.append(f"{path}: {files[path.stem]} is there too; expected one file. Remove one")
            else:
                files[path.stem] = path
        parts[kind] = files
    images, labels = parts.get("image", {}), parts.get("label", {})
    if len(parts) == 2:
        problems += [
            f"{files[name]}: this {kind} has no {other}; expected {folder / other / files[name].name}. Add the "
            f"{other} or remove the {kind}"
            for kind, files, other, others in (
                ("image", images, "label", labels),
                ("label", labels, "image", images),
            )
            for name in sorted(files.keys() - others.keys())
        ]
    names = sorted(images.keys() & labels.keys())
    cases = tuple(
        Source(
            name=name,
            read=_jpeg_reader(images[name], labels[name]),
            files=(images[name], labels[name]),
            group=name.rpartition("_")[0],
        )
        for name in names
    )
    return Survey(
        cases,
        tuple(problems),
        description=f"{len(cases)} axial slices of abdominal CT from 8-bit JPEG: HU clipped to [0, 255]. The pixel "
        "spacing is unknown; 1 mm stands in its place.",
        reference=REFERENCE,
        licence=LICENCE,
    )


def _jpeg_reader(image_file: Path, label_file: Path) -> Callable[[], Pair]:
    def read() -> Pair:
        image, label = _read_jpeg(image_file), _read_jpeg(label_file)
        if image.shape != label.shape:
            raise ValueError(
                f"{label_file}: {label.shape[0]}x{label.shape[1]} pixels, its image {image_file} has "
                f"{image.shape[0]}x{image.shape[1]} (height x width); expected the same size"
            )
        grey, foreground = int(((label > 32) & (label < 223)).sum()), int((label > LABEL_THRESHOLD).sum())
        if grey > GREY_SHARE * max(foreground, 1):
            raise ValueError(
                f"{label_file}: {grey} pixels are between black and white, {foreground} are foreground; expected "
                "a mask of 0 and 255. Check that it is not an image"
            )
        volume = flat_volume(image.astype(np.int16))
        return volume, label_like(volume, (label > LABEL_THRESHOLD).astype(np.uint8)[np.newaxis])

    return read


def _read_jpeg(path: Path) -> npt.NDArray[np.uint8]:
    """The grey values (H, W) of a JPEG, uint8; a colour JPEG must be grey."""
    try:
        with Image.open(path, formats=["JPEG"]) as file:
            pixels = np.asarray(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path}: not readable as JPEG ({error}); expected a whole file. Copy it again"
        ) from error
    if pixels.ndim == 3 and pixels.shape[2] == 3 and not np.ptp(pixels, axis=2).any():
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        raise ValueError(
            f"{path}: shape {pixels.shape} with unequal channels; expected grey values. Convert it"
        )
    return pixels.astype(np.uint8)
