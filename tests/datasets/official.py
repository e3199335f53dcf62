"""Writes the official downloads in miniature, with other libraries than those that read them: multi-page TIFF
with Pillow, NIfTI with nibabel, DICOM with pydicom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

Array = npt.NDArray[Any]


def write_isbi(folder: Path, images: Iterable[Array], labels: Iterable[Array]) -> None:
    """The EM challenge: ``train-volume.tif`` and ``train-labels.tif``, a page per slice, labels 0 and 255."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, slices in (("train-volume.tif", images), ("train-labels.tif", labels)):
        pages = [Image.fromarray(pixels) for pixels in slices]
        pages[0].save(folder / name, save_all=True, append_images=pages[1:])


def write_nifti(path: Path, voxels: Array, affine: Array | None = None) -> None:
    """Voxels (D, H, W) as NIfTI; the affine is in NIfTI's axes (column, row, slice) and RAS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    placed = np.eye(4) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(np.transpose(voxels, (2, 1, 0)), placed), path)


def write_gm2016(
    folder: Path, name: str, image: Array, masks: Sequence[Array], affine: Array | None = None
) -> None:
    """A scan of the 2016 grey matter challenge, such as ``site1-sc01``: image, levels and a mask a rater."""
    write_nifti(folder / f"{name}-image.nii.gz", image, affine)
    for rater, mask in enumerate(masks, start=1):
        write_nifti(folder / f"{name}-mask-r{rater}.nii.gz", mask.astype(np.uint8), affine)
    (folder / f"{name}-levels.txt").write_text("1,2\n")


def write_bids(folder: Path, subject: str, image: Array, label: Array, affine: Array | None = None) -> None:
    """A scan in BIDS with its grey-matter mask and a mask of the whole cord."""
    write_nifti(folder / subject / "anat" / f"{subject}_run-1_T2starw.nii.gz", image, affine)
    masks = folder / "derivatives" / "labels" / subject / "anat"
    write_nifti(masks / f"{subject}_run-1_T2starw_gmseg-manual.nii.gz", label.astype(np.float64), affine)
    write_nifti(masks / f"{subject}_run-1_T2starw_seg-manual.nii.gz", np.ones_like(label, np.float64), affine)


def write_tcia(
    folder: Path,
    number: int,
    hu: Array,
    label: Array,
    *,
    spacing: tuple[float, float, float] = (1.0, 0.7, 0.8),
    origin: tuple[float, float, float] = (-10.0, -20.0, -300.0),
    descending: bool = False,
    slope: float = 1.0,
    intercept: float = -1024.0,
    tags: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[Path]:
    """A patient of NIH Pancreas-CT: a DICOM series and ``labelNNNN.nii.gz``.

    Args:
        hu: (slices, rows, columns), slices from the feet to the head.
        label: of the same shape.
        spacing: mm between slices, rows and columns.
        origin: of the lowest slice.
        descending: InstanceNumber falls from the feet to the head.
        tags: DICOM attributes to change, by index of the slice from the feet; None removes one.

    Returns:
        the DICOM files from the feet to the head.
    """
    series = folder / f"PANCREAS_{number:04d}" / "11-24-2015-PANCREAS" / "Pancreas-99667"
    series.mkdir(parents=True, exist_ok=True)
    uid, paths = generate_uid(), []
    for index, pixels in enumerate(hu):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.PatientID, ds.Modality, ds.SeriesInstanceUID = f"PANCREAS_{number:04d}", "CT", uid
        ds.StudyTime = f"165447.{993059 - 1600 * index:06d}"  # TCIA's differ from slice to slice
        ds.InstanceNumber = len(hu) - index if descending else index + 1
        ds.ImagePositionPatient = [origin[0], origin[1], origin[2] + index * spacing[0]]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing = [spacing[1], spacing[2]]
        ds.Rows, ds.Columns = pixels.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        for name, value in (tags or {}).get(index, {}).items():
            if value is None:
                delattr(ds, name)
            else:
                setattr(ds, name, value)
        ds.PixelData = np.rint((pixels - intercept) / slope).astype("<i2").tobytes()
        # names in no order of use, as TCIA's are
        path = series / f"{(index * 7919) % 1000:03d}-{index + 65:03d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    stored = label[::-1] if descending else label
    mirrored = np.diag([-1.0, -1.0, 1.0, 1.0])  # a place that says nothing, as TCIA's
    write_nifti(folder / "TCIA_pancreas_labels-02-05-2017" / f"label{number:04d}.nii.gz", stored, mirrored)
    return paths
