"""``unetq export`` and ``unetq verify`` on a packed model and a bundle."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import monai_unetq as uq
from monai_unetq.cli import main
from monai_unetq.cli.export import _check_size
from tests.deploy.networks import paper_unet, quantized

Printed = Callable[..., str]
BUNDLE = Path(__file__).parents[2] / "bundles" / "em_unet"


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What ``unetq`` prints; its error where it ends in one."""
    monkeypatch.delenv("UNETQ_DEBUG", raising=False)

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        status = main([*map(str, arguments)])
        captured = capsys.readouterr()
        error = next((x for x in captured.err.splitlines() if x.startswith("unetq: error: ")), "")
        assert status == (2 if error else 0), captured.err
        return error or captured.out

    return run


def test_a_packed_model_there_and_back(printed: Printed, tmp_path: Path) -> None:
    network = quantized(paper_unet, (1, 1, 32, 32), True)
    uq.pack(network, tmp_path / "model.unetq")
    out = printed("export", tmp_path / "model.unetq", "--to", "integer", "--out", tmp_path / "integer", "--size", "32", "48")  # fmt: skip
    assert "program.json" in out and f"next: unetq verify {tmp_path / 'integer'}" in out
    assert "equal, bit for bit" in printed("verify", tmp_path / "integer")
    np.save(tmp_path / "slice.npy", np.zeros((32, 32), np.uint8))
    document = json.loads(printed("verify", tmp_path / "integer", "--data", tmp_path, "--json"))
    assert document["equal"] and [image["image"] for image in document["images"]] == ["slice.npy"]
    assert "give them with --data" in printed(
        "verify", tmp_path / "integer", "--against", tmp_path / "integer"
    )
    both = ("--data", tmp_path, "--against", tmp_path / "integer")
    assert "differ: 0.0000%" in printed("verify", tmp_path / "integer", *both)
    with torch.no_grad():
        rare = int(document["images"][0]["labels"].get("1", 0) < 0.5)
        network.get_parameter("last.bias")[rare] += 50
    uq.export(network, torch.zeros(1, 1, 32, 32), "integer", tmp_path / "other")
    error = printed("verify", tmp_path / "integer", "--data", tmp_path, "--against", tmp_path / "other")
    assert "other labels than" in error and "of 1 of 1 images, most on slice.npy (" in error
    assert "not an empty folder" in printed("export", tmp_path / "model.unetq", "--to", "packed", "--out", tmp_path / "integer")  # fmt: skip
    assert "--fold" in printed("export", tmp_path / "model.unetq", "--to", "packed", "--out", tmp_path / "x", "--fold", "0")  # fmt: skip
    (tmp_path / "integer" / "model.unetq").write_bytes(b"")
    assert "truncated or changed" in printed("verify", tmp_path / "integer")


def test_a_bundle_with_its_keys(printed: Printed, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "em_unet"))
    network = quantized(lambda: uq.networks.FixedPointUNet(1, 1, width=4), (1, 1, 32, 32), False)
    uq.pack(network, bundle / "models" / "model.unetq")
    command = ("export", bundle, "--to", "packed", "--out", tmp_path / "out", "--set", "width=4")
    assert "is not quantized" in printed(*command)
    assert "model.unetq" in printed(*command, "--set", f"model={bundle / 'models' / 'model.unetq'}")
    document = json.loads((tmp_path / "out" / "export.json").read_text())
    steps = document["preprocessing"]["monai_transforms"]["transforms"]
    assert [step["_target_"] for step in steps][:2] == ["LoadImaged", "ScaleIntensityRanged"]
    assert steps[1]["a_max"] == 255, "a value, not a reference to another key"
    assert "expected KEY=VALUE" in printed(*command[:5], tmp_path / "y", "--set", "width")


def test_what_a_bundles_trainings_left_is_named(printed: Printed, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "em_unet"))
    command = ("export", bundle, "--to", "packed", "--out", tmp_path / "out", "--set", "width=4")
    assert "train it with configs/fixed_point.yaml" in printed(*command)
    network = quantized(lambda: uq.networks.FixedPointUNet(1, 1, width=4), (1, 1, 32, 32), False)
    flags = []
    for training in ("fixed_point", "ssqat"):
        (bundle / "models" / training).mkdir()
        uq.pack(network, bundle / "models" / training / "model.unetq")
        flags.append(f"--set model={bundle / 'models' / training / 'model.unetq'}")
    error = printed(*command)
    assert f"({bundle / 'models' / 'model.pt'}: no such file)" in error and ", or ".join(flags) in error
    assert "expected (64, 1, 3, 3); values that the training overrode" in printed(
        *command[:6], *flags[0].split()
    )
    assert "model.unetq" in printed(*command, *flags[1].split())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("widht=4", "one of its own: width"),
        ("network_def#network#with=4", "one of its own: network_def#network#width"),
        ("width#0=4", "one of its own: width"),
        ("zzzz=4", "one of its own: imports, bundle_root, model"),
        ("=4", "one of its own: imports, bundle_root, model"),
    ],
)
def test_a_key_that_the_bundle_does_not_have(
    printed: Printed, tmp_path: Path, given: str, named: str
) -> None:
    error = printed("export", BUNDLE, "--to", "packed", "--out", tmp_path / "out", "--set", given)
    assert f"--set {given.partition('=')[0]}: " in error and "has no such key" in error and named in error
    assert not (tmp_path / "out").exists()


def test_another_packed_network_needs_its_code(printed: Printed, tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
    uq.quantize(
        layer, uq.QuantPlan.uniform(layer, weights="int4", activations="int6"), torch.rand(1, 1, 8, 8)
    )
    uq.calibrate(layer, [torch.rand(1, 1, 8, 8)])
    uq.pack(layer, tmp_path / "model.unetq")
    out = printed("export", tmp_path / "model.unetq", "--to", "onnx", "--out", tmp_path / "out")
    assert "holds the weights of a Sequential, not its code" in out
    assert "no such file or folder" in printed("export", tmp_path / "none", "--to", "onnx", "--out", tmp_path)
    assert "export.json: no such file" in printed("verify", tmp_path)


def test_an_image_that_the_packed_network_does_not_take(printed: Printed, tmp_path: Path) -> None:
    uq.pack(quantized(paper_unet, (1, 1, 32, 32), True), tmp_path / "model.unetq")
    np.save(tmp_path / "slice.npy", np.zeros((32, 32), np.uint8))
    command = ("export", tmp_path / "model.unetq", "--to", "onnx", "--out", tmp_path / "out")
    assert "--size 0 32: expected numbers of at least 1" in printed(*command, "--size", "0", "32")
    assert "--size has 1 numbers, expected 2" in printed(*command, "--size", "32")
    assert "does not take images of the size 33 33" in printed(*command, "--size", "33", "33")
    two = printed(*command, "--image", tmp_path / "slice.npy", tmp_path / "slice.npy")
    assert "--image has 2 files" in two and "reads 1 channels" in two
    assert not (tmp_path / "out").exists()


def test_the_example_has_the_networks_dimensions() -> None:
    network = paper_unet()
    options = argparse.Namespace(model=Path("nnunet"), size=[32])
    with pytest.raises(ValueError, match="--size has 1 numbers, expected 2"):
        _check_size(network, torch.zeros(1, 1, 32), options)


def test_what_the_exporter_does_not_know_is_said(
    printed: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uq.pack(quantized(paper_unet, (1, 1, 32, 32), True), tmp_path / "model.unetq")

    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.onnx.OnnxExporterError("what failed\nand where") from TypeError("no operator 'x'")

    monkeypatch.setattr("monai_unetq.deploy.export", fail)
    error = printed("export", tmp_path / "model.unetq", "--to", "onnx", "--out", tmp_path / "out")
    assert "exporter fails on this network (no operator 'x'); --to packed needs no exporter" in error


def test_a_packed_export_is_verified_as_far_as_it_goes(printed: Printed, tmp_path: Path) -> None:
    uq.pack(quantized(paper_unet, (1, 1, 32, 32), True), tmp_path / "model.unetq")
    out = tmp_path / "out"
    assert f"unetq verify {out}" in printed(
        "export", tmp_path / "model.unetq", "--to", "packed", "--out", out
    )
    assert "not compared: 18 packed weights read back" in printed("verify", out)
    document = json.loads(printed("verify", out, "--json"))
    assert document["passed"] and document["equal"] is None and document["labels_differ"] is None
