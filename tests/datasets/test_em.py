"""Reading EM slices from PNG files, and every way in which such a folder can be wrong."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from monai_unetq.datasets import read_em
from monai_unetq.datasets.em import check_image


def write(path: Path, pixels: npt.NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good slices of 20x24."""
    generator = np.random.default_rng(0)
    for name in ("00", "01", "02"):
        write(tmp_path / "image" / f"{name}.png", generator.integers(0, 256, (20, 24), dtype=np.uint8))
        write(tmp_path / "label" / f"{name}.png", generator.choice(np.array([0, 255], np.uint8), (20, 24)))
    return tmp_path


def refused(folder: Path, error: type[Exception], *fragments: str) -> None:
    with pytest.raises(error) as caught:
        read_em(folder)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_reads_images_and_labels(folder: Path) -> None:
    cases = read_em(folder)
    assert [case.name for case in cases] == ["00", "01", "02"]
    for case in cases:
        assert case.image.shape == case.label.shape == (1, 20, 24)
        assert case.image.dtype == np.float32
        assert case.label.dtype == np.uint8
        pixels = np.asarray(Image.open(folder / "image" / f"{case.name}.png"))
        label = np.asarray(Image.open(folder / "label" / f"{case.name}.png"))
        np.testing.assert_array_equal(case.image[0], pixels.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(case.label[0], label == 255)


def test_reads_16_bit_images(folder: Path) -> None:
    pixels = np.zeros((20, 24), np.uint16)
    pixels[0, :3] = (65535, 32768, 1)
    write(folder / "image" / "01.png", pixels)
    image = read_em(folder)[1].image[0]
    np.testing.assert_allclose(image[0, :4], [1.0, 32768 / 65535, 1 / 65535, 0.0], rtol=1e-6)
    assert image.dtype == np.float32


def test_reads_labels_of_zero_and_one(folder: Path) -> None:
    label = np.eye(20, 24, dtype=np.uint8)
    write(folder / "label" / "01.png", label)
    write(folder / "label" / "02.png", label.astype(np.uint16))
    cases = read_em(folder)
    np.testing.assert_array_equal(cases[1].label[0], label)
    np.testing.assert_array_equal(cases[2].label[0], label)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 1), (255, 1)])
def test_reads_labels_of_a_single_class(folder: Path, value: int, expected: int) -> None:
    write(folder / "label" / "01.png", np.full((20, 24), value, np.uint8))
    assert (read_em(folder)[1].label == expected).all()


def test_sorts_numbers_as_numbers(tmp_path: Path) -> None:
    for name in ("10", "2", "1", "b10", "b9"):
        write(tmp_path / "image" / f"{name}.png", np.zeros((8, 8), np.uint8))
        write(tmp_path / "label" / f"{name}.png", np.zeros((8, 8), np.uint8))
    assert [case.name for case in read_em(tmp_path)] == ["1", "2", "10", "b9", "b10"]


def test_passes_over_hidden_and_other_files(folder: Path) -> None:
    (folder / "image" / "._00.png").write_bytes(b"not a picture")
    (folder / "image" / "notes.txt").write_text("x")
    assert len(read_em(folder)) == 3


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", FileNotFoundError, str(tmp_path / "none"), "no such folder", "image/NN.png")


def test_file_for_folder(folder: Path) -> None:
    refused(folder / "image" / "00.png", FileNotFoundError, "00.png", "is a file, not a folder")


@pytest.mark.parametrize("kind", ["image", "label"])
def test_missing_subfolder(folder: Path, kind: str) -> None:
    shutil.rmtree(folder / kind)
    refused(
        folder,
        FileNotFoundError,
        str(folder / kind),
        "no such folder",
        "label" if kind == "image" else "image",
    )


@pytest.mark.parametrize("kind", ["image", "label"])
def test_no_png(folder: Path, kind: str) -> None:
    for path in (folder / kind).iterdir():
        path.rename(path.with_suffix(".tif"))
    refused(folder, FileNotFoundError, str(folder / kind), "no PNG file", "00.tif", "Convert")


@pytest.mark.parametrize(("missing", "kind"), [("label", "image"), ("image", "label")])
def test_image_or_label_alone(folder: Path, missing: str, kind: str) -> None:
    (folder / missing / "01.png").unlink()
    path = str(folder / kind / "01.png")
    refused(
        folder, FileNotFoundError, path, f"this {kind} has no {missing}", str(folder / missing / "01.png")
    )


def test_two_files_of_one_name(folder: Path) -> None:
    shutil.copy(folder / "image" / "01.png", folder / "image" / "01.PNG")
    if len(list((folder / "image").iterdir())) == 3:
        pytest.skip("the file system does not distinguish case")
    refused(folder, ValueError, "01.PNG", "01.png", "one file per slice")


def test_image_and_label_of_different_shape(folder: Path) -> None:
    write(folder / "label" / "01.png", np.zeros((24, 20), np.uint8))
    refused(folder, ValueError, str(folder / "label" / "01.png"), "24x20", "20x24", "same size")


def test_slices_of_different_sizes(folder: Path) -> None:
    write(folder / "image" / "02.png", np.zeros((16, 24), np.uint8))
    write(folder / "label" / "02.png", np.zeros((16, 24), np.uint8))
    refused(folder, ValueError, str(folder / "image" / "02.png"), "16x24", "00.png", "20x24")


@pytest.mark.parametrize(
    ("mode", "found"),
    [("RGB", "3 channels"), ("RGBA", "4 channels"), ("LA", "2 channels"), ("P", "palette"), ("1", "1 bit")],
)
@pytest.mark.parametrize("kind", ["image", "label"])
def test_other_pixel_types(folder: Path, kind: str, mode: str, found: str) -> None:
    path = folder / kind / "01.png"
    Image.open(path).convert(mode).save(path)  # RGB from grey: all channels are equal
    refused(folder, ValueError, str(path), found, "convert('L')")


def test_four_bits(folder: Path) -> None:
    path = folder / "image" / "01.png"
    header = struct.pack(">2I5B", 24, 20, 4, 0, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(12) for _ in range(20))
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
        )
    )
    refused(folder, ValueError, str(path), "4 bit", "8 or 16")


def test_other_label_values(folder: Path) -> None:
    path = folder / "label" / "01.png"
    for values in ((0, 1, 255), (0, 128, 255), (1, 255), (0, 7)):
        write(path, np.resize(np.array(values, np.uint8), (20, 24)))
        refused(folder, ValueError, str(path), "values " + ", ".join(map(str, values)), "Threshold")


@pytest.mark.parametrize("kind", ["image", "label"])
def test_truncated_anywhere(folder: Path, kind: str) -> None:
    path = folder / kind / "01.png"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(folder, ValueError, str(path))


def test_damaged_anywhere(folder: Path) -> None:
    path = folder / "image" / "01.png"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        refused(folder, ValueError, str(path))


def test_damaged_pixels_with_right_checksums(folder: Path) -> None:
    path = folder / "image" / "01.png"
    whole = path.read_bytes()
    start = whole.index(b"IDAT")
    length = int.from_bytes(whole[start - 4 : start], "big")
    chunk = b"IDAT" + bytes(length)
    path.write_bytes(
        whole[:start] + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[start + 8 + length :]
    )
    refused(folder, ValueError, str(path), "not readable as PNG")


def test_not_a_png(folder: Path) -> None:
    path = folder / "image" / "01.png"
    Image.fromarray(np.zeros((20, 24), np.uint8)).save(path, format="JPEG")
    refused(folder, ValueError, str(path), "not a PNG file", "Convert")


def test_check_image_passes_an_image() -> None:
    check_image("07", np.zeros((1, 8, 9), np.float32))
    check_image("07", np.zeros((1, 8, 9), np.int16))


@pytest.mark.parametrize(
    ("value", "found"),
    [(np.nan, "1 NaN and 0 infinite"), (np.inf, "0 NaN and 1 inf"), (-np.inf, "0 NaN and 1 inf")],
)
def test_check_image_refuses_values_that_are_not_finite(value: float, found: str) -> None:
    image = np.zeros((1, 8, 9), np.float32)
    image[0, 5, 6] = value
    with pytest.raises(ValueError, match=rf"^slice 07: .*{found}.*row 5, column 6"):
        check_image("slice 07", image)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((8, 9), "2 dimensions"),
        ((1, 1, 8, 9), "4 dimensions"),
        ((3, 8, 9), "3 channels"),
        ((1, 0, 9), "no pixels"),
    ],
)
def test_check_image_refuses_other_shapes(shape: tuple[int, ...], found: str) -> None:
    with pytest.raises(ValueError, match=f"^slice 07: .*{found}"):
        check_image("slice 07", np.zeros(shape, np.float32))


def test_check_image_refuses_other_types() -> None:
    with pytest.raises(ValueError, match=r"^slice 07: .*complex64"):
        check_image("slice 07", np.zeros((1, 8, 9), np.complex64))
