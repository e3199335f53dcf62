"""``export``: what a folder holds, and that a failure leaves nothing."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file

import monai_unetq as uq
from monai_unetq.deploy import exporting
from monai_unetq.runtime.engine import read_export
from tests.deploy.networks import NETWORKS, traced


@pytest.mark.parametrize(
    ("target", "files"),
    [("onnx", {"model.onnx"}), ("packed", {"model.unetq"}), ("integer", {"model.unetq", "program.json"})],
)
def test_what_a_folder_holds(target: exporting.ExportTarget, files: set[str], tmp_path: Path) -> None:
    case = traced("nnunet plain")
    out = tmp_path / "deep" / "out"
    document = uq.export(
        case.network, case.image, target, out, preprocessing={"spacing": (1, 2), "labels": {2: "a", 10: "b"}}
    )
    assert {file.name for file in out.iterdir()} == {"export.json", "golden.safetensors", *files}
    assert json.loads((out / "export.json").read_text()) == document
    assert document["files"].keys() == {"golden.safetensors", *files}
    assert document["preprocessing"] == {"spacing": [1, 2], "labels": {"2": "a", "10": "b"}}
    assert document["target"] == target
    assert read_export(out) == document
    assert document["versions"]["torch"] == version("torch")
    golden = load_file(out / "golden.safetensors")
    assert torch.equal(golden["image"], case.image) and torch.equal(golden["logits"], case.logits)
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_an_onnx_model_tells_its_plan_and_has_free_sizes(tmp_path: Path) -> None:
    case = traced("nnunet plain")
    document = uq.export(case.network, case.image, "onnx", tmp_path / "out")
    assert document["dynamic"] == [0, 2, 3]
    model = onnx.load(tmp_path / "out" / "model.onnx")
    (entry,) = model.metadata_props
    said = json.loads(entry.value)
    assert uq.QuantPlan.from_json(said["plan"], "metadata") == uq.plan_of(case.network)
    assert str(Path.home()) not in str(model) and "site-packages" not in str(model)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    case = traced("nnunet plain")
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        uq.export(case.network, case.image, "packed", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_is_there_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = traced("nnunet plain")
    for name in ("here", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("linked")
    (tmp_path / "dangling").symlink_to("new")
    monkeypatch.chdir(tmp_path / "here")
    before = Path().stat().st_ino
    for out in (Path(), tmp_path / "link", tmp_path / "dangling"):
        uq.export(case.network, case.image, "packed", out)
    assert Path().stat().st_ino == before and (tmp_path / "link").is_symlink()
    for name in ("here", "linked", "new"):
        found = sorted(file.name for file in (tmp_path / name).iterdir())
        assert found == ["export.json", "golden.safetensors", "model.unetq"]
    assert len(list(tmp_path.iterdir())) == 5


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    case = traced("segresnet")
    (tmp_path / "there").mkdir()
    for name in ("out", "there"):
        with pytest.raises(ValueError, match="cannot be computed in integers"):
            uq.export(case.network, case.image, "integer", tmp_path / name)
    assert [*tmp_path.rglob("*")] == [tmp_path / "there"]


def test_what_a_target_has_not_is_refused(tmp_path: Path) -> None:
    case = traced("nnunet plain")
    with pytest.raises(ValueError, match="expected one of onnx, openvino"):
        uq.export(case.network, case.image, "coreml", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="store is 'int4', but openvino"):
        uq.export(case.network, case.image, "openvino", tmp_path / "out", store="int4")
    with pytest.raises(ValueError, match="profile is 'vnni' for onnx, expected one of onnxruntime, tensorrt"):
        uq.export(case.network, case.image, "onnx", tmp_path / "out", profile="vnni")
    with pytest.raises(ValueError, match="profile is 'avx2' for qonnx, which has no such choice"):
        uq.export(case.network, case.image, "qonnx", tmp_path / "out", profile="avx2")
    with pytest.raises(ValueError, match="not quantized"):
        uq.export(NETWORKS["nnunet plain"].build(), case.image, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("profile", "kept"), [(None, "vnni"), ("vnni", "vnni"), ("avx2", "avx2")])
def test_the_ir_has_transposed_convolutions_but_for_avx2(
    tmp_path: Path, profile: exporting.Profile | None, kept: str
) -> None:
    openvino = pytest.importorskip("openvino")
    case = traced("nnunet plain")
    document = uq.export(case.network, case.image, "openvino", tmp_path / "ir", profile=profile)
    operators = {
        op.get_type_name() for op in openvino.Core().read_model(tmp_path / "ir" / "model.xml").get_ops()
    }
    assert document["profile"] == kept
    assert ("ConvolutionBackpropData" in operators) == (kept == "vnni")
    assert ("DepthToSpace" in operators) == (kept == "avx2")


def test_sizes_of_the_papers_network_beside_float32(tmp_path: Path) -> None:
    image = torch.rand(1, 1, 32, 32)
    targets: dict[str, tuple[exporting.ExportTarget, ...]] = {
        "int4": ("packed",),
        "int8": ("onnx", "openvino"),
    }
    for bits, some in targets.items():
        network = uq.networks.FixedPointUNet(1, 1, width=32).eval()
        float32 = 4 * sum(parameter.numel() for parameter in network.parameters())
        uq.quantize(network, uq.QuantPlan.uniform(network, bits, "int8"), image)
        uq.calibrate(network, [image], "minmax")
        for target in some:
            uq.export(network, image, target, tmp_path / target)
    sizes = {file.name: file.stat().st_size / float32 for file in tmp_path.glob("*/model.*")}
    assert 0.12 < sizes["model.unetq"] <= 0.14
    assert 0.24 < sizes["model.onnx"] <= 0.27 and 0.24 < sizes["model.bin"] <= 0.27
    assert sizes["model.xml"] < 0.05  # a text that does not grow with the width
