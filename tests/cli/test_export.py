"""``unetq export`` and ``unetq verify`` on a packed model and a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import monai_unetq as uq
from monai_unetq.cli import main
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
    assert "expected KEY=VALUE" in printed(*command[:5], tmp_path / "y", "--set", "width")


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
