"""Each bundle on a phantom in its data set's official layout, by the commands that users type."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import nibabel
import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import (
    ConfigParser,
    ConfigWorkflow,
    ckpt_export,
    create_workflow,
    onnx_export,
    run,
    verify_metadata,
    verify_net_in_out,
)
from PIL import Image

from monai_unetq import inspect_packed
from monai_unetq.cli import main
from monai_unetq.datasets import data_list, prepare, write_phantom
from monai_unetq.datasets.phantoms import abdomen_phantom, cord_phantom, membrane_phantom
from monai_unetq.networks import FixedPointUNet, QuantizedNetwork
from tests.bundles.schema import SCHEMA
from tests.datasets.official import write_gm2016, write_isbi, write_tcia

ROOT = Path(__file__).resolve().parents[2]
Kind = Literal["em", "gm", "nih"]
KINDS = get_args(Kind)
SMALL: dict[str, Any] = {
    "width": 2, "steps_per_epoch": 2, "batch_size": 2, "patch_size": [32, 32], "train#calibration#sampler#num_samples": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A bundle, its phantom in the common layout, and where its trainings go."""

    kind: Kind
    dataset: Path
    work: Path

    @property
    def bundle(self) -> Path:
        return ROOT / "bundles" / f"{self.kind}_unet"

    def config(self, name: str) -> str:
        return str(self.bundle / "configs" / f"{name}.yaml")

    def keys(self, **more: Any) -> dict[str, Any]:
        """What every run overrides."""
        keys = {"bundle_root": str(self.bundle), "dataset_dir": str(self.dataset), "device": "cpu"}
        return {**keys, "width": SMALL["width"], **more}

    def train(self, *configs: str, **more: Any) -> None:
        """Run a training in this process."""
        run(
            config_file=[self.config(name) for name in ("train", *configs)],
            **{**self.keys(), **SMALL, **more},
        )


def command_line(program: list[str], config: str, keys: dict[str, Any], cwd: Path) -> str:
    """What the program prints; fails with it where the program fails."""
    arguments = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, "monai.bundle", "run", "--config_file", config, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def official(kind: Kind, folder: Path) -> None:
    """A phantom as the data set's own download would be."""
    if kind == "em":
        cases = membrane_phantom(count=6, size=48)
        pixels = [np.rint(case.image[0] * 255).astype(np.uint8) for case in cases]
        write_isbi(folder, pixels, [case.label[0] * np.uint8(255) for case in cases])
    elif kind == "gm":
        for number, case in enumerate(cord_phantom(count=4, size=64, dimensions=3), start=1):
            depth, height, width = case.spacing
            affine = np.diag([width, height, depth, 1.0])
            write_gm2016(folder, f"site{number}-sc01", case.image[0], [case.label[0]] * 4, affine)
    else:
        for number, case in enumerate(abdomen_phantom(count=8, size=64, dimensions=3), start=1):
            with_pancreas = np.flatnonzero(case.label[0].any(axis=(1, 2)))
            part = slice(max(with_pancreas[0] - 1, 0), with_pancreas[0] + 5)
            write_tcia(folder, number, case.image[0][part], case.label[0][part])


@pytest.fixture(scope="module", params=KINDS)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    official(kind, folder / "official")
    return Prepared(kind, prepare(kind, folder / "official", folder / "raw"), folder)


@pytest.fixture(scope="module")
def float_run(prepared: Prepared) -> Path:
    """The folder of a two-epoch float training, started from another folder, with --bundle_root."""
    out = prepared.work / "float"
    keys = {**prepared.keys(output_dir=out, epochs=2), **SMALL}
    command_line([sys.executable, "-m"], prepared.config("train"), keys, prepared.work)
    return out


@pytest.fixture(scope="module")
def fixed_run(prepared: Prepared, float_run: Path) -> Path:
    """The folder of a two-epoch fixed-point training from the float network, started at the repository's root."""
    out = prepared.work / "fixed"
    keys = {**prepared.keys(output_dir=out, epochs=2, float_model=float_run / "model.pt"), **SMALL}
    keys |= {"activations": "Q6.0", "weights": "Q0.4"}
    del keys["bundle_root"]
    configs = [f"bundles/{prepared.kind}_unet/configs/{name}.yaml" for name in ("train", "fixed_point")]
    command_line([sys.executable, "-m"], str(configs), keys, ROOT)
    return out


def network_of(kind: str, state: Path | None) -> torch.nn.Module:
    return QuantizedNetwork(FixedPointUNet(1, 1, width=SMALL["width"]), state=state).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_metadata_follow_monais_schema(kind: str) -> None:
    if not SCHEMA.is_file():
        pytest.skip(f"MONAI's schema is not at {SCHEMA}")
    meta = ROOT / "bundles" / f"{kind}_unet" / "configs" / "metadata.json"
    verify_metadata(meta_file=str(meta), filepath=str(SCHEMA), create_dir=False)
    document = json.loads(meta.read_text())
    assert "monai-unetq" in document["required_packages_version"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
def test_the_network_takes_and_gives_what_the_metadata_say(kind: str, config: str) -> None:
    bundle = ROOT / "bundles" / f"{kind}_unet"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / f"{config}.yaml"),
        bundle_root=str(bundle),
        device="cpu",
        n=3,
    )


def test_a_float_training_leaves_weights_that_load_safely(float_run: Path) -> None:
    state = torch.load(float_run / "model.pt", weights_only=True)
    FixedPointUNet(1, 1, width=SMALL["width"]).load_state_dict(state)
    assert not (float_run / "model.unetq").exists()


def test_a_fixed_point_training_also_leaves_packed_weights_and_the_plan(
    prepared: Prepared, fixed_run: Path
) -> None:
    torch.load(fixed_run / "model.pt", weights_only=True)
    held = inspect_packed(fixed_run / "model.unetq")
    assert json.loads((fixed_run / "plan.json").read_text()) == held["plan"]
    formats = {layer["weight"] for layer in held["layers"][1:-1]}
    assert formats == {"Q0.4"}
    image = torch.rand(2, 1, 32, 32)
    quantized, packed = (network_of(prepared.kind, fixed_run / name) for name in ("model.pt", "model.unetq"))
    with torch.no_grad():
        assert torch.equal(quantized(image), packed(image))


@pytest.mark.parametrize("network", ["float", "fixed"])
def test_evaluation_writes_the_measures_of_every_test_case(
    prepared: Prepared, float_run: Path, fixed_run: Path, network: str
) -> None:
    model = float_run / "model.pt" if network == "float" else fixed_run / "model.unetq"
    out = prepared.work / f"eval-{network}"
    run(config_file=prepared.config("evaluate"), **prepared.keys(model=str(model), output_dir=str(out)))
    key = {"em": "cell_dice", "gm": "grey_matter_dice", "nih": "pancreas_dice"}[prepared.kind]
    with (out / f"{key}_raw.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases = data_list(prepared.dataset, 0, "test")
    assert {Path(row["filename"]).name for row in rows} == {Path(case["image"]).name for case in cases}
    # The same number by hand for the first case, from what inference writes.
    predictions = prepared.work / f"seg-{network}"
    run(
        config_file=prepared.config("inference"),
        **prepared.keys(model=str(model), output_dir=str(predictions)),
    )
    case = cases[0]
    name = Path(case["image"]).name
    ending = ".png" if prepared.kind == "em" else ".nii.gz"
    predicted = read(predictions / name.replace(ending, f"_seg{ending}")) > 0
    label = read(Path(case["label"])) > 0
    measured = next(float(row["mean"]) for row in rows if Path(row["filename"]).name == name)
    dice = 2 * (predicted & label).sum() / (predicted.sum() + label.sum())
    assert measured == pytest.approx(dice, abs=1e-6)


def read(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image)
    return np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]


def test_inference_keeps_the_geometry_of_the_image(prepared: Prepared, float_run: Path) -> None:
    out = prepared.work / "seg"
    images = [case["image"] for case in data_list(prepared.dataset, 0, "test")][:1]
    keys = prepared.keys(model=str(float_run / "model.pt"), output_dir=str(out), images=images)
    run(config_file=prepared.config("inference"), **keys)
    (file,) = out.iterdir()
    assert file.name.startswith(Path(images[0]).name.split(".")[0])
    if prepared.kind == "em":
        assert set(np.unique(read(file))) <= {0, 255}
        assert read(file).shape == read(Path(images[0])).shape
    else:
        found, expected = nibabel.load(file), nibabel.load(images[0])
        assert found.shape == expected.shape  # type: ignore[attr-defined]
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)  # type: ignore[attr-defined]
        assert set(np.unique(read(file))) <= {0, 1}


@pytest.mark.parametrize("prepared", ["em"], indirect=True)
def test_inference_runs_an_exported_model(prepared: Prepared, fixed_run: Path) -> None:
    exported, by_network, by_export = (prepared.work / name for name in ("exported", "seg-net", "seg-onnx"))
    model = fixed_run / "model.unetq"
    command = [
        "export",
        prepared.bundle,
        "--to",
        "onnx",
        "--out",
        exported,
        "--set",
        f"width={SMALL['width']}",
    ]
    assert main([*map(str, command), "--set", f"model={model}"]) == 0
    run(
        config_file=prepared.config("inference"),
        **prepared.keys(model=str(model), output_dir=str(by_network)),
    )
    keys = prepared.keys(
        exported=str(exported), model=str(prepared.work / "none.pt"), output_dir=str(by_export)
    )
    run(config_file=prepared.config("inference"), **keys)
    names = sorted(str(file.relative_to(by_network)) for file in by_network.rglob("*.png"))
    assert names and names == sorted(str(file.relative_to(by_export)) for file in by_export.rglob("*.png"))
    assert all((by_network / name).read_bytes() == (by_export / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_in_the_bundle_is_named_from_its_root(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = ConfigParser(
        ConfigParser.load_config_file(str(ROOT / "bundles" / f"{kind}_unet" / "configs" / "inference.yaml"))
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    parser["bundle_root"] = "bundle"
    for given, expected in (
        (None, None), ("here", "here"), (str(tmp_path), str(tmp_path)), ("/none", "/none"),
        ("models/openvino", "bundle/models/openvino"),
    ):  # fmt: skip
        parser["exported"] = given
        assert parser.get_parsed_content("exported_folder") == expected
    monkeypatch.setattr("monai_unetq.networks.ExportedNetwork", lambda folder: folder)
    assert parser.get_parsed_content("network") == "bundle/models/openvino"


def test_inference_without_weights_says_what_to_do(prepared: Prepared) -> None:
    with pytest.raises(RuntimeError) as caught:
        run(config_file=prepared.config("inference"), **prepared.keys(model=str(prepared.work / "none.pt")))
    assert "none.pt: no such file; train first" in str(caught.value.__cause__)


@pytest.mark.parametrize("network", ["float", "fixed"])
def test_export_to_torchscript_and_onnx_keeps_the_outputs(
    prepared: Prepared, float_run: Path, fixed_run: Path, network: str
) -> None:
    model = (float_run if network == "float" else fixed_run) / "model.pt"
    common: dict[str, Any] = {
        "net_id": "network_def",
        "ckpt_file": str(model),
        "meta_file": str(prepared.bundle / "configs" / "metadata.json"),
        "config_file": prepared.config("inference"),
        "input_shape": [1, 1, 32, 32],
        **prepared.keys(model=str(model)),
    }
    script, graph = prepared.work / f"{network}.ts", prepared.work / f"{network}.onnx"
    # Quantizers choose by their formats, which scripting cannot follow and tracing need not.
    ckpt_export(filepath=str(script), use_trace=network == "fixed", **common)
    onnx_export(filepath=str(graph), **common)
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        expected = network_of(prepared.kind, model)(image)
        torch.testing.assert_close(torch.jit.load(str(script))(image), expected)
    session = onnxruntime.InferenceSession(str(graph))
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bundles_share_one_configuration_of_several_processes(kind: Kind) -> None:
    first, other = (
        (ROOT / "bundles" / f"{k}_unet" / "configs" / "multi_gpu_train.yaml").read_text()
        for k in (KINDS[0], kind)
    )
    assert first == other


@pytest.mark.parametrize("prepared", ["gm"], indirect=True)
def test_two_processes_train_one_network(prepared: Prepared) -> None:
    out = prepared.work / "parallel"
    keys = {**prepared.keys(output_dir=out, epochs=2, float_epochs=1), **SMALL}
    configs = [prepared.config(name) for name in ("train", "fixed_point", "multi_gpu_train")]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command_line(program, str(configs), keys, prepared.work)
    network_of(prepared.kind, out / "model.unetq")
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    # Two epochs of two steps in all, shared by two processes.
    assert checkpoint["trainer"]["iteration"] == 2
    assert not any(key.startswith("module.") for key in checkpoint["network"])


def test_a_resumed_training_ends_as_the_undisturbed_one(prepared: Prepared) -> None:
    undisturbed, interrupted = prepared.work / "undisturbed", prepared.work / "interrupted"
    settings = {"epochs": 3, "float_epochs": 1}
    prepared.train("fixed_point", output_dir=str(undisturbed), **settings)
    stop = {"train#trainer#max_epochs": 2}
    prepared.train("fixed_point", output_dir=str(interrupted), **settings, **stop)
    prepared.train("fixed_point", output_dir=str(interrupted), resume=True, **settings)
    for name in ("model.pt", "model.unetq"):
        first, second = (network_of(prepared.kind, out / name) for out in (undisturbed, interrupted))
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), key
    one, other = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (undisturbed, interrupted))
    for key, value in one["network"].items():
        assert torch.equal(value, other["network"][key]), key


def ssqat(prepared: Prepared, float_run: Path, out: Path, *configs: str, **more: Any) -> None:
    """A three-epoch SS-QAT training of seconds."""
    keys = {
        "float_model": str(float_run / "model.pt"),
        "epochs": 3,
        "metric": "fisher",
        "output_dir": str(out),
    }
    prepared.train("ssqat", *configs, **{**keys, **more})


def test_ssqat_leaves_a_packed_network_of_mixed_widths_without_heads(
    prepared: Prepared, float_run: Path
) -> None:
    out = prepared.work / "ssqat"
    ssqat(prepared, float_run, out)
    packed, unfolded = (network_of(prepared.kind, out / name) for name in ("model.unetq", "model.pt"))
    assert not any("supervision" in key for key in (*packed.state_dict(), *unfolded.state_dict()))
    image = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(packed(image), unfolded(image))
    held = inspect_packed(out / "model.unetq")
    assert held["plan"]["layers"]["decoder.0.conv1"]["parts"] == [["skip", 8], ["up", 8]]
    keys = prepared.keys(model=str(out / "model.unetq"), output_dir=str(prepared.work / "seg-ssqat"))
    run(config_file=prepared.config("inference"), **keys)
    # In training there are heads, and they learn.
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)["network"]
    assert checkpoint["skip_supervision.heads.2.bias"].abs().sum() > 0


@pytest.mark.parametrize("prepared", ["em"], indirect=True)
def test_a_resumed_ssqat_training_ends_as_the_undisturbed_one(prepared: Prepared, float_run: Path) -> None:
    undisturbed, interrupted = prepared.work / "ssqat-undisturbed", prepared.work / "ssqat-interrupted"
    ssqat(prepared, float_run, undisturbed)
    ssqat(prepared, float_run, interrupted, **{"train#trainer#max_epochs": 1})
    plan = (interrupted / "allocation" / "allocation.json").stat().st_mtime_ns
    torch.rand(1)
    ssqat(prepared, float_run, interrupted, resume=True)
    assert (interrupted / "allocation" / "allocation.json").stat().st_mtime_ns == plan
    one, other = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (undisturbed, interrupted))
    for key, value in one["network"].items():
        assert torch.equal(value, other["network"][key]), key
    assert (undisturbed / "model.unetq").read_bytes() == (interrupted / "model.unetq").read_bytes()


@pytest.mark.parametrize("prepared", ["em"], indirect=True)
def test_two_processes_share_an_ssqat_training(prepared: Prepared, float_run: Path) -> None:
    out = prepared.work / "ssqat-parallel"
    keys = {**prepared.keys(output_dir=out, epochs=2, metric="hessian", probes=20), **SMALL}
    configs = [prepared.config(name) for name in ("train", "ssqat", "multi_gpu_train")]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command_line(program, str(configs), {**keys, "float_model": float_run / "model.pt"}, prepared.work)
    packed, unfolded = (network_of(prepared.kind, out / name) for name in ("model.unetq", "model.pt"))
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(packed(image), unfolded(image))
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 2  # two epochs of two steps, shared by two processes
    assert not any(key.startswith("module.") for key in checkpoint["network"])
    measured = json.loads((out / "sensitivity" / "sensitivities.json").read_text())
    assert measured["metric"] == "hessian" and measured["conditions"]["probes"] == 20


# EM's protocol of the paper validates in training mode, in which the network returns more than its prediction.
@pytest.mark.parametrize("prepared", ["em"], indirect=True)
def test_ssqat_takes_the_papers_protocol(prepared: Prepared, float_run: Path) -> None:
    out = prepared.work / "ssqat-paper"
    ssqat(prepared, float_run, out, protocol="paper", epochs=1)
    assert inspect_packed(out / "model.unetq")["layers"]


@pytest.mark.parametrize("prepared", ["em"], indirect=True)
def test_ssqat_without_a_float_network_says_what_to_do(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        ssqat(prepared, tmp_path, tmp_path / "out")
    causes: list[BaseException | None] = [caught.value]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__)
    assert any("model.pt: no such file; train first" in str(cause) for cause in causes)


def test_other_programs_drive_the_bundle_as_a_workflow(prepared: Prepared) -> None:
    out = prepared.work / "workflow"
    workflow = create_workflow(
        config_file=prepared.config("train"),
        workflow_type="train",
        **{**prepared.keys(output_dir=str(out), epochs=1), **SMALL},
    )
    assert isinstance(workflow, ConfigWorkflow)
    assert not workflow.check_properties()
    assert workflow.bundle_root == str(prepared.bundle)
    workflow.run()
    workflow.finalize()
    inference = ConfigWorkflow(
        config_file=prepared.config("inference"),
        meta_file=str(prepared.bundle / "configs" / "metadata.json"),
        workflow_type="infer",
        **prepared.keys(model=str(out / "model.pt"), output_dir=str(out / "seg")),
    )
    inference.initialize()
    assert not inference.check_properties()
    assert isinstance(inference.network_def, FixedPointUNet)
    inference.run()
    assert len(list((out / "seg").iterdir())) == len(data_list(prepared.dataset, 0, "test"))


# One bundle for all: the three files differ in the image's format only.
@pytest.mark.parametrize("prepared", ["em"], indirect=True)
@pytest.mark.parametrize(
    "formats",
    [
        {"weights": "int8", "activations": "int8", "scale": "free", "granularity": "tensor"},
        {"weights": "int4", "activations": "int6", "learned": True},
        {"weights": "Q0.4", "activations": "float"},
    ],
)
def test_fixed_point_takes_any_format(prepared: Prepared, formats: dict[str, Any]) -> None:
    out = prepared.work / "-".join(map(str, formats.values()))
    prepared.train("fixed_point", output_dir=str(out), epochs=1, float_epochs=0, **formats)
    held = inspect_packed(out / "model.unetq")
    assert held["layers"][3]["weight"] == formats["weights"]
    assert held["plan"]["scale"] == formats.get("scale", "power-of-two")


@pytest.mark.parametrize("prepared", ["em"], indirect=True)
def test_tracking_with_mlflow_records_the_training(prepared: Prepared) -> None:
    mlflow = pytest.importorskip("mlflow")
    out = prepared.work / "tracked"
    out.mkdir()
    prepared.train("fixed_point", output_dir=str(out), epochs=1, float_epochs=0, tracking="mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{out / 'mlruns.db'}")
    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")[:1]
    assert found.data.metrics["mean_weight_bits"] > 4
    assert any(name.startswith("weight_sqnr_db/") for name in found.data.metrics)


def test_the_papers_protocol_measures_as_the_released_code_does(prepared: Prepared) -> None:
    out = prepared.work / "paper"
    prepared.train(output_dir=str(out), epochs=1, protocol="paper")
    keys = prepared.keys(model=str(out / "model.pt"), output_dir=str(out / "eval"), protocol="paper")
    run(config_file=prepared.config("evaluate"), **keys)
    # After one epoch no probability reaches 0.999, so nothing is foreground.
    with (out / "eval" / "metrics.csv").open() as file:
        metrics = {row[0]: float(row[1]) for row in csv.reader(file)}
    assert metrics[{"em": "cell_dice", "gm": "grey_matter_dice", "nih": "pancreas_dice"}[prepared.kind]] == 0


@pytest.mark.parametrize("kind", ["gm", "nih"])
def test_a_volume_of_one_slice_stays_a_volume(kind: Kind, tmp_path: Path) -> None:
    dataset = write_phantom(kind, tmp_path / "raw", dimensions=2, size=48, count=6)
    bundle = Prepared(kind, dataset, tmp_path)
    bundle.train(output_dir=str(tmp_path / "out"), epochs=1)
    image = data_list(dataset, 0, "test")[0]["image"]
    keys = bundle.keys(
        model=str(tmp_path / "out" / "model.pt"), output_dir=str(tmp_path / "seg"), images=[image]
    )
    run(config_file=bundle.config("inference"), **keys)
    (file,) = (tmp_path / "seg").iterdir()
    assert nibabel.load(file).shape == nibabel.load(image).shape == (48, 48, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("prepared", ["em"], indirect=True)
def test_resuming_with_other_formats_or_another_float_phase_is_refused(prepared: Prepared) -> None:
    out = str(prepared.work / "trap")
    prepared.train("fixed_point", output_dir=out, epochs=2, float_epochs=1)
    for other in ({"weights": "Q2.2", "float_epochs": 1}, {"float_epochs": 2}):
        with pytest.raises(RuntimeError) as caught:
            prepared.train("fixed_point", output_dir=out, epochs=3, resume="true", **other)
        chain = repr(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)
        assert "trained with other formats" in chain or "begins to round after epoch 1" in chain


@pytest.mark.parametrize("prepared", ["em"], indirect=True)
def test_words_of_the_command_line_are_understood(prepared: Prepared, float_run: Path) -> None:
    out = prepared.work / "words"
    common = {"output_dir": str(out), "epochs": 1, "resume": "false", "amp": "false", "learned": "true"}
    formats = {"weights": "int4", "activations": "int6", "keep_float": "last"}
    prepared.train(
        "fixed_point", float_model=str(float_run / "model.pt"), val_interval=5, **common, **formats
    )
    held = inspect_packed(out / "model.unetq")  # validated although the interval is longer than the training
    assert held["plan"]["learned"] is True
    assert "last" not in held["plan"]["layers"]
    again = prepared.work / "again"
    prepared.train(
        "fixed_point", output_dir=str(again), epochs=1, float_epochs=0, plan=str(out / "plan.json")
    )
    assert inspect_packed(again / "model.unetq")["plan"] == held["plan"]


@pytest.mark.parametrize("prepared", ["em"], indirect=True)
def test_a_new_model_does_not_keep_the_packed_file_of_the_old(prepared: Prepared) -> None:
    out = prepared.work / "stale"
    prepared.train("fixed_point", output_dir=str(out), epochs=1, float_epochs=0)
    assert (out / "model.unetq").exists()
    prepared.train(output_dir=str(out), epochs=1)
    assert (out / "model.pt").exists()
    assert not (out / "model.unetq").exists() and not (out / "plan.json").exists()
