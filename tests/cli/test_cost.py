"""``unetq cost`` on bundles, nnU-Net's plans and packed files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNet

import monai_unetq as uq
from monai_unetq.allocation import layer_costs
from monai_unetq.cli import main
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery.workload import workload

Printed = Callable[..., str]

ARGUMENTS: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "features": [4, 4, 8, 8, 8, 4],
}
IMAGE = torch.zeros(1, 1, 32, 48)
SIZE = ("--size", "32", "48")


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What ``unetq cost`` prints; its error where it ends in one."""
    monkeypatch.delenv("UNETQ_DEBUG", raising=False)

    def run(*arguments: str | Path) -> str:
        status = main(["cost", *map(str, arguments)])
        captured = capsys.readouterr()
        assert status == (2 if captured.err.startswith("unetq: error: ") else 0), captured.err
        return captured.out if status == 0 else captured.err.removeprefix("unetq: error: ")

    return run


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    configs = tmp_path / "bundle" / "configs"
    configs.mkdir(parents=True)
    (configs / "train.json").write_text(json.dumps({"network_def": {"_target_": "BasicUNet", **ARGUMENTS}}))
    return configs.parent


@pytest.fixture(scope="module")
def split() -> torch.nn.Module:
    network = BasicUNet(**ARGUMENTS).eval()
    return uq.split(network, IMAGE)


def planned(network: torch.nn.Module) -> QuantPlan:
    return QuantPlan.uniform(network, "int4", "int6", last="int8")


def with_parts(network: torch.nn.Module, plan: QuantPlan) -> QuantPlan:
    """The plan with formats for each part of split layers."""
    layers: dict[str, tuple[dict[str, uq.QFormat], dict[str, uq.QFormat]]] = {}
    for unit in workload(network, IMAGE).units:
        if unit.part != "input":
            layer = plan[unit.layer]
            formats = layers.setdefault(unit.layer, ({}, {}))
            formats[0][unit.part], formats[1][unit.part] = layer.weight, layer.input
    return plan.with_layers({name: uq.LayerPlan(*formats) for name, formats in layers.items()})


def test_a_bundle_in_float(bundle: Path, printed: Printed) -> None:
    document = json.loads(printed(bundle, *SIZE, "--json"))
    found = workload(BasicUNet(**ARGUMENTS).eval(), IMAGE)
    assert document["image"] == [1, 32, 48]
    expected = layer_costs(found.units, {}, found.other_parameters).to_json()
    assert {key: document[key] for key in expected} == expected


def test_a_plan_with_parts_splits_the_network(
    bundle: Path, split: torch.nn.Module, tmp_path: Path, printed: Printed
) -> None:
    plan = with_parts(split, planned(split))
    plan.save(tmp_path / "plan.json")
    document = json.loads(printed(bundle, *SIZE, "--plan", tmp_path / "plan.json", "--json"))
    found = workload(split, IMAGE)
    assert document["layers"] == layer_costs(found.units, plan, found.other_parameters).to_json()["layers"]
    assert any(layer["name"].endswith("[skip]") for layer in document["layers"])


def test_the_table_ends_with_totals_and_ratios(
    bundle: Path, split: torch.nn.Module, tmp_path: Path, printed: Printed
) -> None:
    planned(split).save(tmp_path / "plan.json")
    picture = tmp_path / "cost.png"
    text = printed(bundle, *SIZE, "--plan", tmp_path / "plan.json", "--figure", picture)
    found = workload(BasicUNet(**ARGUMENTS).eval(), IMAGE)
    cost = layer_costs(found.units, planned(split), found.other_parameters)
    first = cost.layers[0]
    assert text.splitlines()[2].split()[:5] == [first.name, "int4", "int6", f"{first.parameters:,}", f"{first.macs:,}"]  # fmt: skip
    ratio = 1024 * cost.macs / cost.bops
    assert f"BOPs                    {cost.bops:,} ({ratio:.2f} times less than in float32)\n" in text
    assert f"MACs                    {cost.macs:,}\n" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_packed_models(bundle: Path, split: torch.nn.Module, tmp_path: Path, printed: Printed) -> None:
    """Weights of the file itself; everything, where the network is there and the file is its plan."""
    network = uq.quantize(BasicUNet(**ARGUMENTS).eval(), planned(split), IMAGE)
    uq.calibrate(network, [torch.rand(1, 1, 32, 48)])
    packed = uq.pack(network, tmp_path / "model.unetq")
    document = json.loads(printed(packed, "--json"))
    assert document["total"]["bytes"] == uq.inspect_packed(packed)["weight_bytes"]
    text = printed(packed)
    assert text.endswith(f"MACs and activations need the network: unetq cost BUNDLE --plan {packed}\n")
    whole = json.loads(printed(bundle, *SIZE, "--plan", packed, "--json"))
    assert whole["total"]["weight_bytes"] == document["total"]["bytes"]
    assert printed(packed, "--figure", tmp_path / "no.png").startswith("--figure: the packed file ")
    assert not (tmp_path / "no.png").exists()


def test_plans_of_nnunet(tmp_path: Path, printed: Printed) -> None:
    pytest.importorskip("nnunetv2")
    from tests.cli.test_inspect import trained

    text = printed(trained(tmp_path), "--json")
    document = json.loads(text)
    assert document["configuration"]
    assert document["total"]["macs"] > 0


def test_errors(bundle: Path, split: torch.nn.Module, tmp_path: Path, printed: Printed) -> None:
    plan = tmp_path / "plan.json"
    four = uq.LayerPlan.whole(uq.QFormat("int4"), uq.QFormat("int4"))
    QuantPlan({"gone": four}).save(plan)
    picture = tmp_path / "cost.png"
    error = printed(bundle, *SIZE, "--plan", plan, "--figure", picture)
    assert error.startswith(f"{plan}: plan: layer 'gone' is none of those that run: ")
    assert not picture.exists()
    assert printed(tmp_path / "nothing").startswith(f"{tmp_path / 'nothing'}: no such file or folder")
    plan.write_text("{}")
    assert printed(bundle, *SIZE, "--plan", plan).startswith(f"{plan}: missing ['version', 'layers']")
