"""How volumes are read from NIfTI with their place in space, checked against their labels, and written."""

from __future__ import annotations

import gzip
import itertools
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813

from .sources import listing

__all__ = ["check_same_place", "classes", "flat_volume", "label_like", "read_volume", "write_volume"]

TOLERANCE = 0.25  # voxels; headers of good public data differ by 0.15 at the corners, through rounded angles
_FLOATS = {16: "f4", 64: "f8"}  # NIfTI-1's datatype codes


def read_volume(path: Path) -> sitk.Image:
    """Read a NIfTI volume of one channel.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.

    Returns:
        three dimensions, with spacing (mm), origin and direction; float64 voxels become float32.

    Raises:
        ValueError: it is not readable, has not three dimensions and one channel, or holds NaN or infinities.
    """
    try:
        volume = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{path}: not readable as NIfTI ({reason}); expected a whole .nii.gz. Copy it again"
        ) from error
    if volume.GetDimension() != 3 or volume.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"{path}: {volume.GetDimension()} dimensions of size {volume.GetSize()} with "
            f"{volume.GetNumberOfComponentsPerPixel()} channel(s); expected 3 dimensions with 1 channel"
        )
    bad = _count_non_finite(path)
    if bad:
        raise ValueError(
            f"{path}: {bad} of {math.prod(volume.GetSize())} voxels are NaN or infinite; expected finite values. "
            "Repair it or leave out the case"
        )
    if volume.GetPixelID() == sitk.sitkFloat64:
        volume = sitk.Cast(volume, sitk.sitkFloat32)
    return volume


def check_same_place(image: sitk.Image, label: sitk.Image, image_path: Path, label_path: Path) -> None:
    """Check that two volumes have the same voxels in space.

    Args:
        image: the reference.
        label: what should lie on it.
        image_path: for the message.
        label_path: for the message.

    Raises:
        ValueError: sizes differ, or a corner voxel of one lies more than a quarter of a voxel from that of the
            other.
    """
    if image.GetSize() != label.GetSize():
        raise ValueError(
            f"{label_path}: size {label.GetSize()}, but its image {image_path} has {image.GetSize()}; expected "
            "the same. Export both from the same scan"
        )
    corners = itertools.product(*((0, size - 1) for size in image.GetSize()))
    distance = max(
        float(np.linalg.norm(np.subtract(*(v.TransformIndexToPhysicalPoint(c) for v in (image, label)))))
        for c in corners
    )
    if distance > TOLERANCE * min(image.GetSpacing()):
        differing = ", ".join(
            f"{what} {_rounded(theirs)} against {_rounded(ours)}"
            for what, ours, theirs in (
                ("spacing", image.GetSpacing(), label.GetSpacing()),
                ("origin", image.GetOrigin(), label.GetOrigin()),
                ("direction", image.GetDirection(), label.GetDirection()),
            )
            if not np.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        )
        raise ValueError(
            f"{label_path}: lies up to {distance:.3g} mm off its image {image_path} ({differing}); expected the "
            "same place in space. Resample the label to the image, or repair its header"
        )


def classes(volume: sitk.Image, path: Path, meaning: Mapping[int, int]) -> npt.NDArray[np.uint8]:
    """The classes of a label.

    Args:
        volume: the label as it was read.
        path: for the message.
        meaning: the class for each value that may occur.

    Returns:
        shape (D, H, W), uint8.

    Raises:
        ValueError: another value occurs.
    """
    values = sitk.GetArrayViewFromImage(volume)
    result, known = np.zeros(values.shape, np.uint8), np.zeros(values.shape, np.bool_)
    for value, number in meaning.items():
        here = values == value
        known |= here
        result[here] = number
    if not known.all():
        raise ValueError(
            f"{path}: the label holds the values {listing(np.unique(values).tolist())}; expected only "
            f"{listing(meaning)}. Repair it or leave out the case"
        )
    return result


def label_like(image: sitk.Image, label: npt.NDArray[np.uint8]) -> sitk.Image:
    """A label (D, H, W) as a volume in exactly the image's place."""
    volume = sitk.GetImageFromArray(label)
    volume.CopyInformation(image)
    return volume


def flat_volume(pixels: npt.NDArray[np.generic], spacing: tuple[float, ...] = ()) -> sitk.Image:
    """An array as a volume; a slice becomes a volume of one slice.

    Args:
        pixels: shape (H, W) or (D, H, W).
        spacing: mm per axis in the array's order; 1 mm where it is missing.

    Returns:
        size (W, H, 1) or (W, H, D), origin 0, axes along those of the patient.
    """
    stacked = pixels if pixels.ndim == 3 else pixels[np.newaxis]
    volume = sitk.GetImageFromArray(np.ascontiguousarray(stacked))
    steps = (*reversed(spacing), 1.0, 1.0, 1.0)[:3]
    volume.SetSpacing(steps)
    return volume


def write_volume(volume: sitk.Image, path: Path) -> None:
    """Write a volume as compressed NIfTI."""
    sitk.WriteImage(volume, str(path), useCompression=True)


def _count_non_finite(path: Path) -> int:
    """NaN and infinite voxels as they are stored; the library that SimpleITK reads NIfTI with makes them 0."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        header = file.read(348)
        order = "<" if header[:4] == (348).to_bytes(4, "little") else ">"
        (datatype,) = struct.unpack(f"{order}h", header[70:72])
        if datatype not in _FLOATS:
            return 0
        (offset,) = struct.unpack(f"{order}f", header[108:112])
        file.read(int(offset) - 348)
        voxels = np.frombuffer(file.read(), f"{order}{_FLOATS[datatype]}")
    return int(voxels.size - np.isfinite(voxels).sum())


def _rounded(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
