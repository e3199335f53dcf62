"""``verify`` and the engines: damaged folders, another golden output, a process without torch."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from PIL import Image
from safetensors.numpy import load_file, save_file

import monai_unetq as uq
from monai_unetq.cli import main
from monai_unetq.deploy.exporting import ExportTarget
from monai_unetq.runtime import images
from monai_unetq.runtime.engine import document_checksum, load, read_export
from monai_unetq.runtime.executions import Execution
from monai_unetq.runtime.images import find_cases, read_image, run_images
from monai_unetq.runtime.verify import labels, verify
from tests.deploy.networks import traced


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Target → folder."""
    case, folder = traced("nnunet plain"), tmp_path_factory.mktemp("exports")
    targets: tuple[ExportTarget, ...] = ("onnx", "openvino", "integer", "qonnx", "packed")
    for target in targets:
        uq.export(case.network, case.image, target, folder / target)
    return {target: folder / target for target in targets}


@pytest.fixture
def copied(exported: dict[str, Path], tmp_path: Path) -> Path:
    """An ONNX export that may be damaged."""
    return Path(shutil.copytree(exported["onnx"], tmp_path / "onnx"))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change an export.json, and all checksums with it."""
    document = {**json.loads((folder / "export.json").read_text()), **changes}
    if "files" not in changes:
        document["files"] = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in document["files"]
        }
    document["sha256"] = document_checksum(document)
    (folder / "export.json").write_text(json.dumps(document))


def test_what_openvino_runs_on_integers_is_said(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verify(exported["openvino"])
    assert found.int8_share == 1.0 and found.float_layers == ()
    assert verify(exported["onnx"]).int8_share is None
    layers = [Execution("a", "Convolution", "i8", 30), Execution("b", "Deconvolution", "f32", 10)]
    monkeypatch.setattr("monai_unetq.runtime.verify.executed", lambda folder, shape: layers)
    assert main(["verify", str(exported["openvino"])]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "INT8       75.0% of the layers' multiplications, on this processor" in said
    assert "float      b (Deconvolution, f32)" in said


@pytest.mark.parametrize("target", ["onnx", "openvino", "qonnx", "integer"])
def test_an_export_as_written_passes(target: str, exported: dict[str, Path]) -> None:
    found = verify(exported[target])
    assert found.passed and found.equal and found.labels_differ == 0 and found.target == target


def test_engines_take_other_sizes_and_batches(exported: dict[str, Path]) -> None:
    case = traced("nnunet plain")
    image = torch.rand(2, 1, 48, 64)
    with torch.no_grad():
        expected = case.network(image).numpy()
    for target in ("onnx", "openvino"):
        assert np.array_equal(load(exported[target])(image.numpy()), expected)


def test_a_process_without_torch_runs_and_verifies(exported: dict[str, Path]) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from monai_unetq.runtime.verify import verify\n"
        "print([verify(folder).equal for folder in sys.argv[1:]])"
    )
    folders = [str(exported[target]) for target in ("onnx", "openvino", "integer")]
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True, True]", done.stderr


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors"])
def test_a_truncated_or_changed_file_is_named(name: str, copied: Path) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name}: truncated or changed"):
        verify(copied)
    (copied / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ValueError, match=f"{name}: truncated or changed"):
        load(copied)
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: is missing"):
        verify(copied)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"version": ' + "1" * 5000 + "}", "no JSON"),
        ("[]", "'version' is missing"),
        (json.dumps({"version": 1}), "'target' is missing"),
    ],
)
def test_a_foreign_export_json_is_refused(text: str, message: str, copied: Path) -> None:
    (copied / "export.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_export(copied)


def test_a_newer_version_and_a_path_outside_are_refused(copied: Path) -> None:
    document = json.loads((copied / "export.json").read_text())
    (copied / "export.json").write_text(json.dumps({**document, "version": 9}))
    with pytest.raises(ValueError, match="version 9"):
        verify(copied)
    rewrite(copied, version=1, files={**document["files"], "../secret": "0"})
    with pytest.raises(ValueError, match="expected one in its own folder"):
        verify(copied)


def test_a_changed_export_json_is_refused(copied: Path) -> None:
    document = json.loads((copied / "export.json").read_text())
    (copied / "export.json").write_text(json.dumps({**document, "preprocessing": {"spacing": [9]}}))
    with pytest.raises(ValueError, match=r"export\.json: changed since it was written"):
        read_export(copied)
    del document["sha256"]
    (copied / "export.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="'sha256' is missing"):
        read_export(copied)


@pytest.mark.parametrize("target", ["onnx", "openvino", "qonnx", "integer", "packed"])
def test_no_file_goes_unchecked(target: str, exported: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported[target], tmp_path / target))
    files = json.loads((folder / "export.json").read_text())["files"]
    for name in files:
        rewrite(folder, files={other: files[other] for other in files if other != name})
        with pytest.raises(ValueError, match=f"'files' has no {name}"):
            read_export(folder)
        rewrite(folder, files={**files, name: 5})
        with pytest.raises(ValueError, match=f"the checksum of {name} is 5"):
            read_export(folder)


@pytest.mark.parametrize(
    "image", [[], [1, 1], [1, 1, 0], [1, 1, "32", 32], [True, 1, 32, 32], [1, 1, 32.0, 32]]
)
def test_the_image_of_an_export_has_a_shape(image: list[Any], copied: Path) -> None:
    rewrite(copied, image=image)
    with pytest.raises(ValueError, match=r"export\.json: 'image' is .*, expected the shape"):
        read_export(copied)


@pytest.mark.parametrize(
    ("target", "name"), [("onnx", "model.onnx"), ("openvino", "model.xml"), ("qonnx", "model.onnx")]
)
def test_a_damaged_model_with_its_checksum_is_named(
    target: str, name: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported[target], tmp_path / target))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    rewrite(folder)
    with pytest.raises(ValueError, match=f"{name}: .* refuses it"):
        load(folder)


@pytest.mark.parametrize("target", ["onnx", "openvino", "qonnx", "integer"])
@pytest.mark.parametrize("shape", [(1, 1, 33, 33), (1, 2, 32, 32), (1, 1, 32)])
def test_an_image_that_the_network_does_not_take(
    target: str, shape: tuple[int, ...], exported: dict[str, Path]
) -> None:
    engine = load(exported[target])
    with pytest.raises(ValueError) as caught:
        engine(np.zeros(shape, dtype=np.float32))
    assert str(exported[target]) in str(caught.value) and str(shape) in str(caught.value)
    assert "expected (1, 1, 32, 32)" in str(caught.value) and "\n" not in str(caught.value)
    case = traced("nnunet plain")
    assert np.array_equal(engine(case.image.numpy()), case.logits.numpy())


def test_openvino_keeps_one_compiled_model(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    compiled: list[weakref.ref[Any]] = []
    plain = openvino.Core.compile_model

    def compile_model(*arguments: Any) -> Any:
        model = plain(*arguments)
        compiled.append(weakref.ref(model))
        return model

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    engine = load(exported["openvino"])
    for size in (32, 32, 64, 32):
        engine(np.zeros((1, 1, size, size), dtype=np.float32))
    assert len(compiled) == 3
    assert [model() is not None for model in compiled] == [False, False, True]


def test_a_packed_model_is_read_back_and_not_run(exported: dict[str, Path], tmp_path: Path) -> None:
    found = verify(exported["packed"])
    assert found.passed and found.equal is found.largest is found.relative is found.labels_differ is None
    assert "monai_unetq.unpack" in found.hint
    folder = Path(shutil.copytree(exported["packed"], tmp_path / "packed"))
    content = (folder / "model.unetq").read_bytes()
    (folder / "model.unetq").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.unetq: truncated or changed"):
        verify(folder)
    rewrite(folder)
    with pytest.raises(ValueError, match=r"model\.unetq: corrupted"):
        verify(folder)


def test_what_has_no_engine_here_says_where_it_runs(exported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the network's own code \(monai_unetq\.unpack\)"):
        load(exported["packed"])
    with pytest.raises(FileNotFoundError, match=r"export\.json: no such file"):
        verify(tmp_path)


def test_another_golden_output_fails(copied: Path) -> None:
    golden = load_file(copied / "golden.safetensors")
    save_file({**golden, "logits": -golden["logits"]}, copied / "golden.safetensors")
    rewrite(copied)
    found = verify(copied)
    assert not found.passed and not found.equal and found.hint
    assert found.labels_differ is not None and found.labels_differ > 0.9


def test_labels() -> None:
    assert labels(np.array([[[-1.0, 2.0]]])).tolist() == [[0, 1]]
    assert labels(np.array([[[-1.0, 2.0], [0.0, 1.0]]])).tolist() == [[1, 0]]


def test_images_are_padded_run_and_counted(exported: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.integers(0, 256, (40, 50), dtype=np.uint8))
    (found,) = run_images(exported["onnx"], tmp_path)
    assert found["image"] == "a.npy" and sum(found["labels"].values()) == pytest.approx(1)
    np.save(tmp_path / "b.npy", np.zeros(7))
    with pytest.raises(ValueError, match=r"b\.npy: has 1 dimensions, expected 2"):
        run_images(exported["onnx"], tmp_path)
    with pytest.raises(FileNotFoundError, match="found no image"):
        run_images(exported["onnx"], exported["onnx"])


def test_images_in_colour_and_of_no_numbers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "rgb.png")
    for dimensions in (2, 3):
        with pytest.raises(ValueError, match=r"rgb\.png: has 3 values a pixel"):
            read_image(tmp_path / "rgb.png", dimensions)
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    with pytest.raises(ValueError, match=r"text\.npy: holds <U1, expected real numbers"):
        read_image(tmp_path / "text.npy", 2)
    (tmp_path / "empty.npy").touch()
    with pytest.raises(ValueError, match=r"empty\.npy: no image that can be read"):
        read_image(tmp_path / "empty.npy", 2)


def test_endings_are_read_as_they_are_found(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((4, 5), 51, dtype=np.uint8))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    ((file,),) = find_cases(tmp_path, 1).values()
    assert read_image(file, 2) == pytest.approx(np.full((1, 1, 4, 5), 0.2))


def test_each_channel_is_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 2, 32, 64)
    network = uq.networks.FixedPointUNet(2, 1, width=2).eval()
    uq.quantize(network, uq.QuantPlan.uniform(network, "int4", "int8"), image)
    uq.calibrate(network, [image])
    with torch.no_grad():
        *_, last = (layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
        assert last.bias is not None
        values = network(image).unique()
        last.bias.sub_(values[len(values) // 2 :][:2].mean())  # both labels, and no logit at 0
        logits = network(image).numpy()
    folder = tmp_path / "onnx"
    uq.export(network, image, "onnx", folder)
    (tmp_path / "images").mkdir()
    for channel in range(2):
        np.save(tmp_path / "images" / f"a_000{channel}.npy", image[0, channel].numpy())
    (found,) = run_images(folder, tmp_path / "images")
    assert found["image"] == "a"
    assert found["labels"]["1"] == pytest.approx(labels(logits).mean(), abs=1e-3)
    with torch.no_grad():
        swapped = labels(network(image.flip(1)).numpy()).mean()
    assert abs(swapped - found["labels"]["1"]) > 0.01
    np.save(tmp_path / "images" / "a_0001.npy", np.zeros((32, 32), dtype=np.float32))
    with pytest.raises(ValueError, match=r"a_0001\.npy: its size is \(32, 32\), a_0000\.npy is \(32, 64\)"):
        run_images(folder, tmp_path / "images")


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (
            ["a_0000.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"],
            FileNotFoundError,
            "case a has no channel 0001",
        ),
        (
            ["a.nii.gz"],
            ValueError,
            r"a\.nii\.gz: the network reads 2 channels, expected the name CASE_0000\.nii\.gz",
        ),
        (["a_0000.png", "a_0001.png", "a_0002.png"], ValueError, r"a_0002\.png.*to CASE_0001\.png"),
    ],
)
def test_a_case_has_all_channels_and_no_other(
    names: list[str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(error, match=message):
        find_cases(tmp_path, 2)
    assert list(find_cases(tmp_path, 1)) == sorted(names)


def test_two_exports_are_compared_on_images(exported: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", rng.integers(0, 256, (40, 50), dtype=np.uint8))
    (same,) = run_images(exported["openvino"], tmp_path / "images", exported["integer"])
    assert same["labels_differ"] == same["largest"] == 0
    case = traced("nnunet plain")
    other = copy.deepcopy(case.network)
    last = [layer for layer in other.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    assert last.bias is not None
    rare = int(labels(case.logits.numpy()).mean() < 0.5)
    last.bias.data[rare] += 50
    uq.export(other, case.image, "onnx", tmp_path / "other")
    (found,) = run_images(exported["onnx"], tmp_path / "images", tmp_path / "other")
    assert found["labels_differ"] > 0 and found["largest"] > 0


@pytest.mark.parametrize(
    ("target", "dynamic", "shape"),
    [("integer", [], (2, 3, 4)), ("onnx", [0], (2, 3)), ("qonnx", [], (2, 3))],
)
def test_volumes_and_models_of_one_size_run_in_tiles(
    target: str,
    dynamic: list[int],
    shape: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document: dict[str, Any] = {
        "target": target,
        "dynamic": dynamic,
        "image": [1, 1, *shape],
        "preprocessing": {},
    }
    monkeypatch.setattr(images, "read_export", lambda folder: document)
    image = np.random.default_rng(0).normal(size=(5, 6, 7)[: len(shape)]).astype(np.float32)
    np.save(tmp_path / "a.npy", image)
    sizes = []

    def engine(part: np.ndarray) -> np.ndarray:
        sizes.append(part.shape)
        return np.concatenate([part, 0 * part], 1)

    monkeypatch.setattr(images, "load", lambda folder: engine)
    (found,) = run_images(tmp_path, tmp_path, tmp_path)
    assert set(sizes) == {(1, 1, *shape)} and len(sizes) == 2 * 3 * 2 * (2 if len(shape) == 3 else 1)
    assert found["labels"]["0"] == pytest.approx((image >= 0).mean(), abs=1e-9) and found["largest"] == 0


def test_an_exported_network_is_a_module(exported: dict[str, Path]) -> None:
    case = traced("nnunet plain")
    network = uq.networks.ExportedNetwork(exported["openvino"])
    assert torch.equal(network(case.image), case.logits)
    image = MetaTensor(case.image, affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0])))
    image.meta["filename_or_obj"] = "slice.png"
    logits = network(image)
    assert isinstance(logits, MetaTensor) and logits.meta["filename_or_obj"] == "slice.png"
    assert torch.equal(logits.affine, image.affine)
    assert str(exported["openvino"]) in repr(network)


@pytest.mark.parametrize("target", ["onnx", "openvino", "integer"])
def test_an_exported_network_runs_in_monais_sliding_window(target: str, exported: dict[str, Path]) -> None:
    case = traced("nnunet plain")
    inferer = SlidingWindowInferer(
        roi_size=case.image.shape[2:], sw_batch_size=2, overlap=0.5, mode="gaussian"
    )
    image = torch.rand(1, 1, 48, 80)
    with torch.no_grad():
        expected = inferer(image, case.network)
    found = inferer(image, uq.networks.ExportedNetwork(exported[target]))
    assert isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor)
    assert torch.allclose(found, expected, atol=1e-6)
