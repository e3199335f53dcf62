"""Images read, preprocessed, padded and run through an exported folder. Imports no torch itself."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .engine import Engine, load, read_export
from .preprocessing import preprocessor
from .verify import labels

__all__ = ["find_cases", "read_channels", "read_image", "run_images"]

_DIVISOR = 32
"""Of an image's sizes, for five levels."""

_ENDINGS = (".png", ".nii", ".nii.gz", ".mha", ".nrrd", ".npy")
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
"""How nnU-Net names the file of one channel of a case, without its ending."""


def find_cases(data: Path, channels: int) -> dict[str, list[Path]]:
    """The files of each image of a folder: its name → one file a channel.

    With one channel every file is an image. With several, files are named as nnU-Net's: ``CASE_0000.nii.gz``,
    ``CASE_0001.nii.gz``, ….

    Args:
        data: the folder.
        channels: of the network's input.

    Raises:
        FileNotFoundError: if there is no image, or a channel of one is missing.
        ValueError: with several channels, if a name has no channel's number, or one that the network does not read.
    """
    files = sorted(file for file in data.glob("*") if file.name.lower().endswith(_ENDINGS))
    if not files:
        raise FileNotFoundError(f"{data}: found no image, expected {', '.join(_ENDINGS)}")
    if channels == 1:
        return {file.name: [file] for file in files}
    cases: dict[str, dict[int, Path]] = {}
    for file in files:
        ending = next(e for e in sorted(_ENDINGS, key=len, reverse=True) if file.name.lower().endswith(e))
        named = _CHANNEL.fullmatch(file.name[: -len(ending)])
        if named is None or int(named["channel"]) >= channels:
            raise ValueError(
                f"{file}: the network reads {channels} channels, expected the name CASE_0000{ending} to "
                f"CASE_{channels - 1:04d}{ending}, one file a channel"
            )
        cases.setdefault(named["case"], {})[int(named["channel"])] = file
    for case, found in cases.items():
        missing = sorted(set(range(channels)) - set(found))
        if missing:
            raise FileNotFoundError(
                f"{data}: case {case} has no channel {missing[0]:04d}; the network reads {channels}"
            )
    return {case: [found[channel] for channel in range(channels)] for case, found in cases.items()}


def read_image(file: Path, dimensions: int) -> np.ndarray:
    """An image as (1, 1, spatial…), float32; 8-bit images scaled to [0, 1], others as they are.

    A volume for a network in 2D becomes a batch of its slices.

    Args:
        file: PNG, NIfTI, MHA, NRRD, or NPY.
        dimensions: 2 or 3.

    Raises:
        ValueError: if the file is no image, in colour, no real numbers, or of other dimensions.
    """
    components = 1
    try:
        if file.suffix.lower() == ".npy":
            with file.open("rb") as opened:  # np.load would also take archives
                array = np.lib.format.read_array(opened, allow_pickle=False)
        else:
            import SimpleITK

            image = SimpleITK.ReadImage(str(file))
            components = image.GetNumberOfComponentsPerPixel()
            array = SimpleITK.GetArrayFromImage(image)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{file}: no image that can be read ({error})") from None
    if components > 1:  # they would be taken for an axis of the image
        raise ValueError(
            f"{file}: has {components} values a pixel (in colour?), expected 1; convert it to gray, or save each channel "
            "as a file"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{file}: holds {array.dtype}, expected real numbers")
    eight_bits = array.dtype == np.uint8
    found = np.asarray(array, dtype=np.float32) / (255 if eight_bits else 1)
    if found.ndim == dimensions:
        return found[None, None]
    if found.ndim == 3 and dimensions == 2:
        return found[:, None]
    raise ValueError(f"{file}: has {found.ndim} dimensions, expected {dimensions}")


def read_channels(files: Sequence[Path], dimensions: int) -> np.ndarray:
    """One image of files of one channel each, (1, C, spatial…); otherwise as ``read_image``.

    Raises:
        ValueError: if a file is no image, or their sizes differ.
    """
    images = [read_image(file, dimensions) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{file}: its size is {image.shape[2:]}, {files[0].name} is {images[0].shape[2:]}; expected one size "
                "for all channels of a case"
            )
    return np.concatenate(images, axis=1)


def run_images(folder: Path, data: Path, against: Path | None = None) -> list[dict[str, Any]]:
    """Run an export on every image of a folder: 2D whole, edges padded to a multiple of 32 and cut off again; volumes, and
    where the model has one fixed size, in tiles of the size that was exported.

    Images go through what ``export.json`` has under ``preprocessing``; where it has nothing, as ``read_image`` reads them.
    NPY files are taken as preprocessed.

    Args:
        folder: an export.
        data: images; see ``find_cases``.
        against: another export of the same network, which runs on the same images.

    Returns:
        for each: its name, seconds, and the share of each label; beside another export the share of voxels whose label
        differs, and the largest difference of a logit.

    Raises:
        FileNotFoundError: if there is no image, or a channel of one is missing.
        ValueError: if one cannot be read or preprocessed, or a network does not take it.
        ImportError: without MONAI or nnU-Net, which preprocess.
    """
    document = read_export(folder)
    shape, steps = document["image"], document["preprocessing"]
    dimensions = len(shape) - 2
    cases = find_cases(data, shape[1])
    arrays = {case for case, files in cases.items() if all(f.name.lower().endswith(".npy") for f in files)}
    prepared = preprocessor(steps, dimensions) if steps and arrays != set(cases) else None
    engine, other = load(folder), None if against is None else load(against)
    tile = _tile(document) or (None if against is None else _tile(read_export(against)))
    found = []
    for case, files in tqdm(cases.items(), desc=f"{folder.name}: images", unit="image", disable=None):
        image = read_channels(files, dimensions) if prepared is None or case in arrays else prepared(files)
        if image.shape[1] != shape[1]:
            raise ValueError(
                f"{files[0]}: has {image.shape[1]} channels, the network of {folder} reads {shape[1]}"
            )
        begin = time.perf_counter()
        logits = _logits(engine, image, tile, f"{folder}: {case}")
        seconds = time.perf_counter() - begin
        segmented = labels(logits)
        values, counts = np.unique(segmented, return_counts=True)
        shares = {str(v): float(c / counts.sum()) for v, c in zip(values, counts, strict=True)}
        result = {"image": case, "seconds": round(seconds, 3), "labels": shares}
        if other is not None:
            expected = _logits(other, image, tile, f"{against}: {case}")
            if expected.shape != logits.shape:
                raise ValueError(
                    f"{against}: returns logits of the shape {expected.shape} for {case}, {folder} of {logits.shape}: "
                    "not the same network"
                )
            result["labels_differ"] = float(np.mean(segmented != labels(expected)))
            result["largest"] = float(np.abs(logits.astype(np.float64) - expected).max(initial=0))
        found.append(result)
    return found


def _tile(document: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The size of the pieces that an image is run in; None for the whole image at once.

    Volumes are cut, as whole ones take much memory, and so is what a model of one fixed size reads.
    """
    shape = document["image"]
    fixed = document["target"] in ("onnx", "qonnx") and 2 not in document.get("dynamic", [])
    return tuple(shape[2:]) if fixed or len(shape) == 5 else None


def _logits(engine: Engine, image: np.ndarray, tile: tuple[int, ...] | None, what: str) -> np.ndarray:
    """Of each image of a batch, tile by tile, without the padding at its edges."""
    sizes = image.shape[2:]
    tile = tile or tuple(-(-size // _DIVISOR) * _DIVISOR for size in sizes)
    counts = [-(-size // step) for size, step in zip(sizes, tile, strict=True)]
    margins = [(0, count * step - size) for count, step, size in zip(counts, tile, sizes, strict=True)]
    padded = np.pad(image, [(0, 0), (0, 0), *margins], mode="edge")
    logits: np.ndarray | None = None
    for number, *place in np.ndindex(len(image), *counts):
        part = (
            number,
            slice(None),
            *(slice(k * step, (k + 1) * step) for k, step in zip(place, tile, strict=True)),
        )
        found = engine(np.ascontiguousarray(padded[part][None]))
        if not np.isfinite(found).all():
            raise ValueError(f"{what}: the logits hold NaN or infinity")
        if logits is None:
            logits = np.empty((len(image), found.shape[1], *padded.shape[2:]), dtype=found.dtype)
        logits[part] = found[0]
    assert logits is not None
    return logits[(slice(None), slice(None), *(slice(size) for size in sizes))]
