"""How EM slices lie on disk, in a folder with ``image/*.png`` and ``label/*.png`` or as the ISBI challenge's two
TIFF stacks: found, checked and read."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from .cases import Case
from .sources import Pair, Source, Survey, listing

__all__ = ["check_image", "read_em", "survey_em"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {
    2: "RGB (3 channels)",
    3: "palette",
    4: "greyscale with alpha (2 channels)",
    6: "RGBA (4 channels)",
}
_LAYOUT = "expected a folder with image/NN.png and label/NN.png of the same names"
REFERENCE = (
    "Cardona et al., PLoS Biology 8(10), 2010; Arganda-Carreras et al., Front. Neuroanat. 9:142, 2015 (ISBI 2012 "
    "challenge on segmentation in EM)"
)
LICENCE = "terms of the ISBI 2012 challenge; research use"
_STACKS = ("train-volume", "train-labels")
Slice = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


def read_em(folder: Path) -> list[Case]:
    """Read EM slices and their membrane labels.

    Expected are ``folder/image/*.png`` and ``folder/label/*.png`` with the same names, all of one size,
    greyscale with one channel of 8 or 16 bits. Grey values are divided by 255 or 65535. A label holds 0
    (membrane) and 255 or 1 (cell interior), or only one of them. Names are sorted as numbers where they
    hold numbers (``9`` before ``10``), so that neighbours in the list are neighbours in the stack. Files
    whose name begins with a dot are passed over.

    Args:
        folder: the folder that holds ``image`` and ``label``.

    Returns:
        one case per slice, named after the file without its suffix; image (1, H, W) float32 in [0, 1], label
        (1, H, W) uint8 with 1 = interior, 0 = membrane.

    Raises:
        FileNotFoundError: the folder, one of its two subfolders, every PNG, or the partner of an image or
            label is missing.
        ValueError: a file is unreadable, truncated or damaged, is not one channel of 8 or 16 bits, differs
            in size from the other slices or its partner, or a label holds other values; or two files share
            a name.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; {_LAYOUT}. Check the path")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: is a file, not a folder; {_LAYOUT}. Give the folder that holds them"
        )
    images = _find_slices(folder / "image")
    labels = _find_slices(folder / "label")
    _check_partners(images, labels)

    cases: list[Case] = []
    for name in sorted(images, key=_natural_order):
        pixels = _read_png(images[name])
        image = (pixels / np.float32(np.iinfo(pixels.dtype).max)).astype(np.float32)[np.newaxis]
        check_image(str(images[name]), image)
        label = _read_label(labels[name])[np.newaxis]
        if label.shape != image.shape:
            raise ValueError(
                f"{labels[name]}: the label has {_size(label)} pixels, its image {images[name]} has "
                f"{_size(image)} (height x width); expected the same size. Export both from the same slice"
            )
        if cases and image.shape != cases[0].image.shape:
            first = images[cases[0].name]
            raise ValueError(
                f"{images[name]}: {_size(image)} pixels, but {first} has {_size(cases[0].image)} (height x "
                "width); expected slices of one size. Crop or pad them, or give each stack its own folder"
            )
        cases.append(Case(name, image, label))
    return cases


def survey_em(folder: Path) -> Survey:
    """Find the slices of an EM data set to prepare.

    Accepted are the ISBI 2012 challenge's ``train-volume.tif`` and ``train-labels.tif`` (stacks of the same
    number of greyscale pages, labels 0 and 255), and the layout of :func:`read_em`.

    Args:
        folder: the folder that holds them.

    Returns:
        a case per slice in the order of the stack, named ``em_NN`` after page or file; reading one gives image
        (H, W) in its own 8 or 16 bits and label (H, W) uint8, 1 = cell interior, 0 = membrane.

    Raises:
        FileNotFoundError: neither layout is there.
    """
    stacks = [_stack(folder, name) for name in _STACKS]
    slices = [part for part in ("image", "label") if (folder / part).is_dir()]
    if any(stacks) and slices:
        return Survey(
            (),
            (
                f"{folder}: holds both a TIFF stack and the folder {slices[0]}; expected one of the two. Give the "
                "folder of the one that is meant",
            ),
        )
    if any(stacks):
        return _survey_stacks(folder, *stacks)
    if not slices:
        found = listing(sorted(entry.name for entry in folder.iterdir()))
        raise FileNotFoundError(
            f"{folder}: no EM slices in it (found {found}); expected train-volume.tif and train-labels.tif, or "
            "image/NN.png and label/NN.png"
        )
    return _survey_slices(folder)


def _survey_slices(folder: Path) -> Survey:
    try:
        images, labels = _find_slices(folder / "image"), _find_slices(folder / "label")
    except (ValueError, FileNotFoundError) as error:
        return Survey((), (str(error),))
    problems = tuple(
        f"{file}: this {kind} has no {other}; expected {folder / other / file.name}. Add the {other} or remove "
        f"the {kind}"
        for kind, files, other, others in (
            ("image", images, "label", labels),
            ("label", labels, "image", images),
        )
        for file in (files[name] for name in sorted(files.keys() - others.keys(), key=_natural_order))
    )
    names = sorted(images.keys() & labels.keys(), key=_natural_order)
    cases = tuple(
        Source(
            name=f"em_{name}",
            read=_slice_reader(images[name], labels[name], images[names[0]]),
            files=(images[name], labels[name]),
        )
        for name in names
    )
    description = f"{len(cases)} slices of serial-section EM from PNG files; the spacing is unknown."
    return Survey(cases, problems, ".png", description, REFERENCE, LICENCE)


def _slice_reader(image: Path, label: Path, first: Path) -> Callable[[], Pair]:
    def read() -> Pair:
        pixels, classes = _read_png(image), _read_label(label)
        if pixels.shape != classes.shape:
            raise ValueError(
                f"{label}: the label has {_size(classes)} pixels, its image {image} has {_size(pixels)} (height x "
                "width); expected the same size. Export both from the same slice"
            )
        with Image.open(first) as other:
            width, height = other.size
        if pixels.shape != (height, width):
            raise ValueError(
                f"{image}: {_size(pixels)} pixels, but {first} has {height}x{width} (height x width); expected "
                "slices of one size. Crop or pad them, or give each stack its own folder"
            )
        return pixels, classes

    return read


def _stack(folder: Path, name: str) -> Path | None:
    """The TIFF of that name, whatever the case of its suffix."""
    found = sorted(
        entry
        for entry in folder.iterdir()
        if entry.stem == name and entry.suffix.lower() in (".tif", ".tiff")
    )
    return found[0] if found else None


def _survey_stacks(folder: Path, volume: Path | None, labels: Path | None) -> Survey:
    problems = [
        f"{folder / name}.tif: no such file, but its partner is there. Download both"
        for name, path in zip(_STACKS, (volume, labels), strict=True)
        if path is None
    ]
    pages: dict[Path, int] = {}
    for path in (volume, labels):
        if path is not None:
            try:
                pages[path] = _count_pages(path)
            except ValueError as error:
                problems.append(str(error))
    if problems or volume is None or labels is None:
        return Survey((), tuple(problems), ".png")
    if pages[volume] != pages[labels]:
        problems.append(
            f"{labels}: {pages[labels]} page(s), but {volume} has {pages[volume]}; expected a label page for each "
            "image page. Download both again"
        )
    width = max(2, len(str(pages[volume] - 1)))
    cases = tuple(
        Source(
            name=f"em_{page:0{width}d}",
            read=_page_reader(volume, labels, page),
            files=(volume, labels),
            made=f"page {page}",
        )
        for page in range(pages[volume])
    )
    description = (
        f"{len(cases)} slices of serial-section EM, the ISBI 2012 training stack: pixels of 4 nm, 50 nm between "
        "slices (PNG keeps no spacing)."
    )
    return Survey(cases, tuple(problems), ".png", description, REFERENCE, LICENCE)


def _page_reader(volume: Path, labels: Path, page: int) -> Callable[[], Pair]:
    def read() -> Pair:
        pixels, label = _read_page(volume, page), _read_page(labels, page)
        if pixels.shape != label.shape:
            raise ValueError(
                f"{labels}: page {page} has {_size(label)} pixels, that of {volume} has {_size(pixels)} (height x "
                "width); expected the same size. Download both again"
            )
        return pixels, _binary(f"{labels}: page {page}", label)

    return read


def _count_pages(path: Path) -> int:
    try:
        with Image.open(path, formats=["TIFF"]) as file:
            return int(getattr(file, "n_frames", 1))
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise ValueError(
            f"{path}: not readable as TIFF ({error}); expected a whole file. Download it again"
        ) from error


def _read_page(path: Path, page: int) -> Slice:
    """The pixels (H, W) of one page of a greyscale TIFF of 8 or 16 bits, uint8 or uint16."""
    try:
        with Image.open(path, formats=["TIFF"]) as file:
            file.seek(page)
            mode = file.mode
            pixels = np.asarray(file)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(
            f"{path}: page {page} is not readable ({error}); expected a whole file. Download it again"
        ) from error
    if pixels.ndim != 2 or pixels.dtype not in (np.dtype(np.uint8), np.dtype("<u2"), np.dtype(">u2")):
        raise ValueError(
            f"{path}: page {page} has mode {mode}; expected one greyscale channel of 8 or 16 bits. Convert it"
        )
    return pixels.astype(np.uint8) if pixels.dtype == np.uint8 else pixels.astype(np.uint16)


def check_image(name: str, image: npt.NDArray[np.generic]) -> None:
    """Check that an image is one a network can take.

    Args:
        name: the case or file, for the message.
        image: expected in shape (1, H, W), of a real number type, with finite values.

    Raises:
        ValueError: wrong rank, not one channel, no pixels, not real numbers, or NaN or infinite values.
    """
    if image.ndim != 3:
        raise ValueError(
            f"{name}: the image has {image.ndim} dimensions, shape {image.shape}; expected 3: (1, height, "
            "width). Give one slice per case, with a channel axis in front"
        )
    if image.shape[0] != 1:
        raise ValueError(
            f"{name}: the image has {image.shape[0]} channels, shape {image.shape}; expected 1: (1, height, "
            "width). Select one channel or convert to greyscale"
        )
    if image.size == 0:
        raise ValueError(f"{name}: the image has no pixels, shape {image.shape}; expected (1, height, width)")
    if image.dtype.kind not in "biuf":
        raise ValueError(
            f"{name}: the image has type {image.dtype}; expected real numbers. Convert it to float32"
        )
    finite = np.isfinite(image)
    if not finite.all():
        nans = int(np.isnan(image).sum())
        infinities = int(image.size - finite.sum()) - nans
        row, column = (int(index) for index in np.argwhere(~finite)[0][1:])
        raise ValueError(
            f"{name}: the image has {nans} NaN and {infinities} infinite values of {image.size}, the first "
            f"at row {row}, column {column}; expected finite values. Repair the image or leave out the case"
        )


def _find_slices(folder: Path) -> dict[str, Path]:
    """The PNG files of a folder by name without suffix."""
    if not folder.is_dir():
        found = listing(entry.name for entry in folder.parent.iterdir())
        raise FileNotFoundError(f"{folder}: no such folder ({folder.parent} holds {found}); {_LAYOUT}")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.suffix.lower() == ".png"]
    if not files:
        found = listing(entry.name for entry in entries)
        raise FileNotFoundError(
            f"{folder}: no PNG file in it (found {found}); {_LAYOUT}. Convert them to 8-bit or 16-bit PNG"
        )
    slices: dict[str, Path] = {}
    for file in files:
        if file.stem in slices:
            raise ValueError(
                f"{file}: {slices[file.stem].name} is there too; expected one file per slice. Remove one"
            )
        slices[file.stem] = file
    return slices


def _check_partners(images: dict[str, Path], labels: dict[str, Path]) -> None:
    for kind, files, other_kind, others in (
        ("image", images, "label", labels),
        ("label", labels, "image", images),
    ):
        alone = sorted(files.keys() - others.keys(), key=_natural_order)
        if alone:
            file, other_folder = files[alone[0]], next(iter(others.values())).parent
            more = f" (and {len(alone) - 1} more: {listing(alone[1:])})" if len(alone) > 1 else ""
            raise FileNotFoundError(
                f"{file}: this {kind} has no {other_kind}{more}; expected {other_folder / file.name}. "
                f"Add the {other_kind} or remove the {kind}"
            )


def _read_label(path: Path) -> npt.NDArray[np.uint8]:
    """A label as (H, W) of 0 and 1."""
    return _binary(str(path), _read_png(path))


def _binary(name: str, pixels: Slice) -> npt.NDArray[np.uint8]:
    """0 and 1 from a label of 0 and 255 or 1; the name is for the message."""
    values = np.unique(pixels).tolist()
    if not (set(values) <= {0, 255} or set(values) <= {0, 1}):
        raise ValueError(
            f"{name}: the label holds the values {listing(values)}; expected 0 (membrane) and 255 "
            "or 1 (cell interior). Threshold it, e.g. numpy.where(label > 127, 255, 0)"
        )
    return (pixels > 0).astype(np.uint8)


def _read_png(path: Path) -> Slice:
    """The pixels (H, W) of a greyscale PNG of 8 or 16 bits, uint8 or uint16."""
    data = path.read_bytes()
    bits, colour_type = _check_png(path, data)
    if colour_type != 0:
        found = _COLOUR_TYPES.get(colour_type, f"colour type {colour_type}")
        raise ValueError(
            f"{path}: {found}; expected greyscale with one channel, also where all channels are equal. "
            "Convert it, e.g. PIL.Image.open(path).convert('L').save(path)"
        )
    if bits not in (8, 16):
        raise ValueError(
            f"{path}: {bits} bit(s) per pixel; expected 8 or 16. Convert it, e.g. "
            "PIL.Image.open(path).convert('L').save(path)"
        )
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
            pixels = np.asarray(file)
    except (
        OSError,
        SyntaxError,
        ValueError,
        zlib.error,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"{path}: not readable as PNG ({error}); expected a whole file. Copy or export it again"
        ) from error
    return pixels.astype(np.uint8) if bits == 8 else pixels.astype(np.uint16)


def _check_png(path: Path, data: bytes) -> tuple[int, int]:
    """Bit depth and colour type of a PNG whose chunks are all there with good checksums (PNG, section 5)."""
    if not data.startswith(_PNG_SIGNATURE):
        found = f"begins with {data[:8]!r}" if data else "is empty"
        raise ValueError(
            f"{path}: not a PNG file (it {found}); expected a PNG. Convert the file, do not only rename it"
        )
    position, chunk = len(_PNG_SIGNATURE), b""
    while chunk != b"IEND":
        if position + 12 > len(data):
            raise ValueError(
                f"{path}: truncated after {len(data)} bytes; expected a whole PNG. Copy or export it again"
            )
        length = int.from_bytes(data[position : position + 4], "big")
        chunk, end = data[position + 4 : position + 8], position + 8 + length
        if end + 4 > len(data):
            raise ValueError(
                f"{path}: truncated, it ends at byte {len(data)} and its {chunk!r} chunk at {end + 4}; "
                "expected a whole PNG. Copy or export it again"
            )
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(
                f"{path}: damaged, the checksum of the {chunk!r} chunk at byte {position} is wrong; expected "
                "an intact PNG. Copy or export it again"
            )
        position = end + 4
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ValueError(
            f"{path}: damaged, its first chunk is {data[12:16]!r}; expected IHDR. Copy or export it again"
        )
    return data[24], data[25]


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that reads runs of digits as numbers; the name itself decides between ``7`` and ``07``."""
    parts = [
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    ]
    return [*parts, (-1, 0, name)]


def _size(image: npt.NDArray[np.generic]) -> str:
    return f"{image.shape[-2]}x{image.shape[-1]}"
