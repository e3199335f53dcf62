"""``verify`` and the engines: damaged folders, another golden output, a process without torch."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from safetensors.numpy import load_file, save_file

import monai_unetq as uq
from monai_unetq.deploy.exporting import ExportTarget
from monai_unetq.runtime.engine import load, read_export
from monai_unetq.runtime.images import find_cases, run_images
from monai_unetq.runtime.verify import labels, verify
from tests.deploy.networks import traced


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Target → folder."""
    case, folder = traced("nnunet plain"), tmp_path_factory.mktemp("exports")
    targets: tuple[ExportTarget, ...] = ("onnx", "openvino", "integer", "qonnx")
    for target in targets:
        uq.export(case.network, case.image, target, folder / target)
    return {target: folder / target for target in targets}


@pytest.fixture
def copied(exported: dict[str, Path], tmp_path: Path) -> Path:
    """An ONNX export that may be damaged."""
    return Path(shutil.copytree(exported["onnx"], tmp_path / "onnx"))


@pytest.mark.parametrize("target", ["onnx", "openvino", "qonnx", "integer"])
def test_an_export_as_written_passes(target: str, exported: dict[str, Path]) -> None:
    found = verify(exported[target])
    assert found.passed and found.equal and found.labels_differ == 0 and found.target == target


def test_engines_take_other_sizes(exported: dict[str, Path]) -> None:
    case = traced("nnunet plain")
    image = torch.rand(1, 1, 48, 64)
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
    (copied / "export.json").write_text(json.dumps({**document, "files": {"../secret": "0"}}))
    with pytest.raises(ValueError, match="expected one in its own folder"):
        verify(copied)


def test_what_has_no_engine_here_says_where_it_runs(exported: dict[str, Path], tmp_path: Path) -> None:
    case = traced("nnunet plain")
    uq.export(case.network, case.image, "packed", tmp_path / "packed")
    with pytest.raises(ValueError, match=r"needs the network's own code \(monai_unetq\.unpack\)"):
        load(tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match=r"export\.json: no such file"):
        verify(tmp_path)


def test_another_golden_output_fails(copied: Path) -> None:
    golden = load_file(copied / "golden.safetensors")
    save_file({**golden, "logits": -golden["logits"]}, copied / "golden.safetensors")
    document = json.loads((copied / "export.json").read_text())
    del document["files"]["golden.safetensors"]
    (copied / "export.json").write_text(json.dumps(document))
    found = verify(copied)
    assert not found.passed and not found.equal and found.labels_differ > 0.9 and found.hint


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
