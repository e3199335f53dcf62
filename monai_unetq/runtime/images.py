"""Images read, padded and run through an exported folder. Imports no torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from .engine import load, read_export
from .verify import labels

__all__ = ["read_image", "run_images"]

_DIVISOR = 32
"""Of an image's sizes, for five levels."""

_ENDINGS = (".png", ".nii", ".nii.gz", ".mha", ".nrrd", ".npy")


def read_image(file: Path, dimensions: int) -> np.ndarray:
    """An image as (1, 1, spatial…), float32; 8-bit images scaled to [0, 1], others as they are.

    A volume for a network in 2D becomes a batch of its slices.

    Args:
        file: PNG, NIfTI, MHA, NRRD, or NPY.
        dimensions: 2 or 3.

    Raises:
        ValueError: if the file is no image, or of other dimensions.
    """
    try:
        if file.suffix == ".npy":
            array = np.load(file, allow_pickle=False)
        else:
            import SimpleITK

            array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{file}: no image that can be read ({error})") from None
    eight_bits = array.dtype == np.uint8
    found = np.asarray(array, dtype=np.float32) / (255 if eight_bits else 1)
    if found.ndim == dimensions:
        return found[None, None]
    if found.ndim == 3 and dimensions == 2:
        return found[:, None]
    raise ValueError(f"{file}: has {found.ndim} dimensions, expected {dimensions}")


def run_images(folder: Path, data: Path) -> list[dict[str, Any]]:
    """Run an export on every image of a folder, edges padded to a multiple of 32 and cut off again.

    Returns:
        for each: its name, seconds, and the share of each label.

    Raises:
        FileNotFoundError: if there is no image.
        ValueError: if one cannot be read, or the network does not take it.
    """
    shape = read_export(folder)["image"]
    files = sorted(file for file in data.glob("*") if file.name.lower().endswith(_ENDINGS))
    if not files:
        raise FileNotFoundError(f"{data}: found no image, expected {', '.join(_ENDINGS)}")
    if shape[1] != 1:
        raise ValueError(f"{folder}: takes images of {shape[1]} channels; --data reads those of one")
    engine = load(folder)
    found = []
    for file in files:
        image = read_image(file, len(shape) - 2)
        margins = [(0, 0), (0, 0), *((0, -size % _DIVISOR) for size in image.shape[2:])]
        begin = time.perf_counter()
        logits = np.concatenate([engine(one[None]) for one in np.pad(image, margins, mode="edge")])
        seconds = time.perf_counter() - begin
        if not np.isfinite(logits).all():
            raise ValueError(f"{folder}: returns NaN or infinity for {file}")
        inside = (slice(None), slice(None), *(slice(size) for size in image.shape[2:]))
        values, counts = np.unique(labels(logits[inside]), return_counts=True)
        shares = {str(v): float(c / counts.sum()) for v, c in zip(values, counts, strict=True)}
        found.append({"image": file.name, "seconds": round(seconds, 3), "labels": shares})
    return found
