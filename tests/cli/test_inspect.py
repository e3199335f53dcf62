"""``unetq inspect`` on packed files, MONAI bundles and nnU-Net's plans."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNet, SegResNet, SwinUNETR
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import monai_unetq as uq
from monai_unetq.cli import main
from monai_unetq.surgery import Skips

BUNDLES = Path(__file__).parents[2] / "bundles"
BASIC_UNET = {
    "_target_": "BasicUNet",
    "spatial_dims": 2,
    "in_channels": 3,
    "out_channels": 2,
    "features": [8, 8, 16, 32, 64, 8],
}
DESCRIPTION = {
    "path": "model.unetq",
    "network": "monai_unetq.networks.fixed_point_unet.FixedPointUNet",
    "versions": {"monai-unetq": "0.1.0", "torch": "2.15.0"},
    "file_bytes": 1300,
    "weight_bytes": 1000,
    "float_bytes": 8000,
    "layers": [
        {
            "name": "down.0.conv1",
            "weight": "Q0.4",
            "input": "UQ0.8",
            "parameters": 2000,
            "bytes": 1000,
            "bits": 4.0,
            "codes": 16,
            "histogram": {"-8": 2000},
        }
    ],
    "skips": [],
    "plan": {},
}

Printed = Callable[..., str]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What ``unetq inspect`` prints; its error where it ends in one."""
    monkeypatch.delenv("UNETQ_DEBUG", raising=False)

    def run(*arguments: str | Path) -> str:
        status = main(["inspect", *map(str, arguments)])
        captured = capsys.readouterr()
        assert status == (2 if captured.err.startswith("unetq: error: ") else 0), captured.err
        assert status == 0 or captured.out == ""
        return captured.out if status == 0 else captured.err.removeprefix("unetq: error: ")

    return run


def bundle(folder: Path, network: Any, name: str = "train.json", spatial_shape: Any = None) -> Path:
    configs = folder / "configs"
    configs.mkdir(parents=True)
    (configs / name).write_text(json.dumps({"network_def": network}))
    if spatial_shape is not None:
        image = {"network_data_format": {"inputs": {"image": {"spatial_shape": spatial_shape}}}}
        (configs / "metadata.json").write_text(json.dumps(image))
    return folder


def trained(folder: Path, configuration: str = "3d_fullres") -> Path:
    """What nnU-Net leaves of a training, without the weights: three stages, 4, 8 and 16 features."""

    def architecture(dimensions: int) -> dict[str, Any]:
        return {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 16],
                "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
                "kernel_sizes": [[3] * dimensions] * 3,
                "strides": [[1] * dimensions, [2] * dimensions, [2] * dimensions],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": False,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }

    made = folder / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    made.mkdir(parents=True)
    configurations = {
        "2d": {"patch_size": [32, 48], "architecture": architecture(2)},
        "3d_fullres": {"patch_size": [16, 24, 8], "architecture": architecture(3)},
        "3d_small": {"inherits_from": "3d_fullres", "patch_size": [8, 8, 8]},
    }
    plans = {"label_manager": "LabelManager", "plans_name": "nnUNetPlans", "configurations": configurations}
    (made / "plans.json").write_text(json.dumps(plans))
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1, "b": 2}}
    (made / "dataset.json").write_text(json.dumps(dataset))
    return made


def rows(printed: str) -> list[list[str]]:
    """The table of skips, cell by cell."""
    table = printed[printed.index("layer ") :].split("\n\n")[0]
    return [re.split(r"\s{2,}", line) for line in table.splitlines()[2:]]


def convolution_macs(network: nn.Module, *shape: int) -> int:
    """Multiply-accumulates of the layers as torch's own counter has them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, *shape))
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    return sum(counts.get(f"aten.{name}", 0) for name in ("convolution", "addmm", "mm")) // 2


def test_help_shows_an_example_of_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    shown = capsys.readouterr().out
    for example in ("model.unetq", "bundles/em_unet", "__3d_fullres", "nnUNetPlans.json --configuration"):
        assert f"unetq inspect {example}" in shown or example in shown


def test_packed_file_prints_network_sizes_and_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inspect: Printed
) -> None:
    monkeypatch.setattr("monai_unetq.deploy.inspect_packed", lambda path: DESCRIPTION)
    (tmp_path / "model.unetq").touch()
    printed = inspect(tmp_path / "model.unetq")
    assert "network  monai_unetq.networks.fixed_point_unet.FixedPointUNet" in printed
    assert "file     1300 bytes" in printed
    assert "weights  1000 bytes (8.00 times smaller than 8000 bytes in float32)" in printed
    assert printed.splitlines()[-1].split() == [
        *("down.0.conv1", "Q0.4", "UQ0.8", "2000", "1000", "4.00", "16")
    ]
    assert json.loads(inspect(tmp_path / "model.unetq", "--json")) == DESCRIPTION


def test_packed_split_network_has_a_row_for_each_part_and_the_skips(tmp_path: Path, inspect: Printed) -> None:
    network = uq.networks.FixedPointUNet(1, 1, width=8)
    image = torch.rand(2, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    uq.split(network, image)
    plan = uq.QuantPlan.uniform(network, "int8", "int8", input="UQ0.8")
    formats = {"skip": uq.QFormat("int8"), "up": uq.QFormat("int4")}
    plan = plan.with_layers({"decoder.2.conv1": uq.LayerPlan(formats, {"input": uq.QFormat("int8")})})
    uq.calibrate(uq.quantize(network, plan, image), [image])
    found = uq.find_skips(network, image[:1])
    file = uq.pack(uq.fold(network), tmp_path / "model.unetq", example=image[:1])

    printed = inspect(file)
    layers = {line.split()[0]: line.split()[1:6] for line in printed.splitlines() if line}
    # 3×3 kernels, 8 features out; 8 channels of the skip and 16 from below.
    assert layers["decoder.2.conv1[skip]"] == ["int8", "uint8", "576", "576", "8.00"]
    assert layers["decoder.2.conv1[up]"] == ["int4", "uint8", "1152", "576", "4.00"]
    assert str(found) in printed
    # Up: 32, 32 and 16 channels, at 12, 24 and 48 px and 32, 16 and 8 features; skip: 32, 16 and 8 channels.
    up, skip = (
        sum(c * f * s**2 for c, f, s in zip(channels, (32, 16, 8), (12, 24, 48), strict=True))
        for channels in ((32, 32, 16), (32, 16, 8))
    )
    assert printed.endswith(f"\nthe up halves take {up / skip:.2f} times the MACs of the skip halves\n")
    assert Skips.from_json(json.loads(inspect(file, "--json"))["skips"]) == found


def test_bundle_of_ours(inspect: Printed) -> None:
    printed = inspect(BUNDLES / "em_unet", "--size", "32", "64")
    network = uq.networks.FixedPointUNet(1, 1)
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in printed.splitlines()[:4])
    assert lines == {
        "network": "monai_unetq.networks.fixed_point_unet.FixedPointUNet",
        "image": "1×32×64 (--size)",
        "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        "MACs": f"{convolution_macs(network, 1, 32, 64):,}",
    }
    assert str(uq.find_skips(network, torch.zeros(1, 1, 32, 64))) in printed


@pytest.mark.parametrize("name", ["train.json", "train.yaml", "inference.json"])
def test_bundle_of_another_network(name: str, tmp_path: Path, inspect: Printed) -> None:
    folder = bundle(tmp_path / "other", BASIC_UNET, name)
    described = json.loads(inspect(folder, "--json"))
    network = BasicUNet(2, 3, 2, (8, 8, 16, 32, 64, 8))
    example = torch.zeros(1, 3, 64, 64)
    assert described["network"] == "monai.networks.nets.basic_unet.BasicUNet"
    assert (described["image"], described["image_from"]) == ([3, 64, 64], "by default; see --size")
    assert described["macs"] == convolution_macs(network, 3, 64, 64)
    assert Skips.from_json(described["skips"]) == uq.find_skips(network, example)
    # Skips of 32, 16, 8 and 8 channels; from below come 32, 16, 8 and 8.
    assert described["up_to_skip_macs"] == 1


def test_bundle_that_says_its_size_is_taken_at_its_word_and_size_overrides(
    tmp_path: Path, inspect: Printed
) -> None:
    folder = bundle(tmp_path / "said", BASIC_UNET, spatial_shape=[32, 96])
    assert "3×32×96 (metadata.json)" in inspect(folder)
    assert "3×48×48 (--size)" in inspect(folder, "--size", "48", "48")
    said = bundle(tmp_path / "expression", BASIC_UNET, spatial_shape=["16*n", "16*n"])
    assert "3×64×64 (by default; see --size)" in inspect(said)


def test_bundle_of_a_quantized_network_is_described_in_float(tmp_path: Path, inspect: Printed) -> None:
    wrapped = {
        "_target_": "monai_unetq.networks.QuantizedNetwork",
        "network": BASIC_UNET,
        "weights": "int4",
        "activations": "int6",
        "scale": "free",
        "learned": True,  # scales that are parameters
    }
    quantized, plain = bundle(tmp_path / "quantized", wrapped), bundle(tmp_path / "plain", BASIC_UNET)
    described, expected = (json.loads(inspect(folder, "--json")) for folder in (quantized, plain))
    assert {**described, "path": ""} == {**expected, "path": ""}


def test_network_without_concatenations_and_linear_layers_are_counted(
    tmp_path: Path, inspect: Printed
) -> None:
    adds = bundle(tmp_path / "adds", {"_target_": "SegResNet", "spatial_dims": 2, "init_filters": 8})
    printed = inspect(adds)
    assert f"MACs        {convolution_macs(SegResNet(2, 8), 1, 64, 64):,}\n" in printed
    assert printed.endswith("\nno concatenation of a skip and an upsampled path\n")
    options = {"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2}
    tokens = bundle(tmp_path / "tokens", {"_target_": "SwinUNETR", **options})
    network = SwinUNETR(1, 2, feature_size=12, spatial_dims=2)
    assert f"MACs        {convolution_macs(network, 1, 64, 64):,}\n" in inspect(tokens)


class LooksAtValues(nn.Module):
    """Its forward needs values, which the meta device does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(image - image.min().item())
        return out


def test_network_that_looks_at_values_runs_on_the_cpu(
    tmp_path: Path, inspect: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_unetq.networks.LooksAtValues", LooksAtValues, raising=False)
    folder = bundle(tmp_path, {"_target_": "monai_unetq.networks.LooksAtValues"})
    assert f"MACs        {2 * 9 * 64 * 64:,}\n" in inspect(folder)


def test_weight_that_is_computed_is_counted(
    tmp_path: Path, inspect: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def normalized() -> nn.Module:
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3, padding=1)))

    monkeypatch.setattr("monai_unetq.networks.normalized", normalized, raising=False)
    folder = bundle(tmp_path, {"_target_": "monai_unetq.networks.normalized"})
    assert f"MACs        {2 * 9 * 64 * 64:,}\n" in inspect(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"network": {}}, "there is no 'network_def'"),
        ({"network_def": {"_target_": "BasicUNet", "widht": 3}}, "'network_def' cannot be built: "),
        ({"network_def": {"_target_": "nowhere.Network"}}, "PYTHONPATH="),
        ({"network_def": 3}, "'network_def' is a int, expected a torch.nn.Module"),
        ({"network_def": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2}}, "no convolution"),
    ],
    ids=["absent", "argument", "module", "number", "linear"],
)  # fmt: skip
def test_bundle_whose_network_cannot_be_had(
    content: Any, message: str, tmp_path: Path, inspect: Printed
) -> None:
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "train.json"
    file.write_text(json.dumps(content))
    error = inspect(tmp_path)
    assert error.startswith(f"{file}: ") and message in error


def test_damaged_files_are_named(tmp_path: Path, inspect: Printed) -> None:
    folder = bundle(tmp_path / "bundle", BASIC_UNET)
    (folder / "configs" / "metadata.json").write_text("{")
    assert inspect(folder).startswith(f"{folder / 'configs' / 'metadata.json'}: not a JSON file: ")
    (folder / "configs" / "metadata.json").unlink()
    (folder / "configs" / "train.json").write_text("{")
    assert inspect(folder).startswith(f"{folder / 'configs' / 'train.json'}: no configuration of a bundle: ")
    plans = tmp_path / "plans.json"
    plans.write_text("[]")
    assert inspect(plans) == f"{plans}: found a list, expected a JSON object\n"
    plans.write_text("{}")
    assert inspect(plans) == f"{plans}: there are no 'configurations', expected nnU-Net's plans\n"


@pytest.mark.parametrize("size", [["64"], ["0", "64"], ["8", "8", "8"]], ids=" ".join)
def test_size_of_another_number_of_dimensions_is_refused(
    size: list[str], tmp_path: Path, inspect: Printed
) -> None:
    error = inspect(bundle(tmp_path, BASIC_UNET), "--size", *size)
    assert error.startswith(f"--size: found {' '.join(size)}, expected 2 whole numbers of at least 1")


def test_size_that_the_network_refuses_is_its_own_error(tmp_path: Path, inspect: Printed) -> None:
    error = inspect(trained(tmp_path), "--size", "9", "9", "9")
    assert error.startswith("PlainConvUNet failed on an example of shape (1, 2, 9, 9, 9): ")
    assert error.endswith("; on the command line: --size\n")


def test_trained_nnunet_is_built_from_its_plans(tmp_path: Path, inspect: Printed) -> None:
    model = trained(tmp_path)
    printed = inspect(model)
    assert "network        dynamic_network_architectures.architectures.unet.PlainConvUNet\n" in printed
    assert "configuration  3d_fullres\n" in printed
    assert "image          2×16×24×8 (patch of 3d_fullres)\n" in printed
    # 3×3×3 kernels, 8 and 4 features out; the skip has as many channels, and as many come from below.
    low, high = 27 * 8 * 8 * (8 * 12 * 4), 27 * 4 * 4 * (16 * 24 * 8)
    assert rows(printed) == [
        ["decoder.stages.0.convs.0.conv", "up", "8", "decoder.transpconvs.0", "8×12×4", "1,728", f"{low:,}"],
        ["", "skip", "8", "encoder.stages.1.0.convs.0.conv", "1,728", f"{low:,}"],
        ["decoder.stages.1.convs.0.conv", "up", "4", "decoder.transpconvs.1", "16×24×8", "432", f"{high:,}"],
        ["", "skip", "4", "encoder.stages.0.0.convs.0.conv", "432", f"{high:,}"],
    ]
    assert printed.endswith("\nthe up halves take 1.00 times the MACs of the skip halves\n")
    # In all: encoder, transposed convolutions (at their inputs' voxels), decoder, and one head of three labels.
    voxels = 16 * 24 * 8
    encoder = 27 * (2 * 4 * voxels + 4 * 8 * voxels // 8 + 8 * 16 * voxels // 64)
    transposed = 8 * (16 * 8 * voxels // 64 + 8 * 4 * voxels // 8)
    macs = encoder + transposed + 2 * (low + high) + 4 * 3 * voxels
    assert f"MACs           {macs:,}\n" in printed


def test_configuration_comes_from_the_folder_or_is_asked_for(tmp_path: Path, inspect: Printed) -> None:
    model = trained(tmp_path)
    plans = model / "plans.json"
    assert "image          2×32×48 (patch of 2d)\n" in inspect(model, "--configuration", "2d")
    assert "image          2×8×8×8 (patch of 3d_small)\n" in inspect(plans, "--configuration", "3d_small")
    assert "image          2×64×32 (--size)\n" in inspect(
        *(plans, "--configuration", "2d", "--size", "64", "32")
    )
    known = "give --configuration, one of 2d, 3d_fullres, 3d_small\n"
    assert inspect(plans) == f"{plans}: no configuration was asked for; {known}"
    assert (
        inspect(plans, "--configuration", "3d_cascade")
        == f"{plans}: there is no configuration '3d_cascade'; {known}"
    )
    renamed = trained(tmp_path, "best")
    assert inspect(renamed) == f"{renamed / 'plans.json'}: there is no configuration 'best'; {known}"


def test_json_alone_reaches_standard_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "monai_unetq.cli", "inspect", "--json", str(trained(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["configuration"] == "3d_fullres"


def test_plans_that_lack_something(tmp_path: Path, inspect: Printed) -> None:
    model = trained(tmp_path)
    plans = json.loads((model / "plans.json").read_text())
    del plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_stages"]
    (model / "plans.json").write_text(json.dumps(plans))
    assert inspect(model).startswith(
        f"{model / 'plans.json'}: nnU-Net cannot build the configuration '3d_fullres' (TypeError: "
    )
    (model / "dataset.json").unlink()
    assert inspect(model / "plans.json").startswith(
        f"{model / 'dataset.json'}: no such file; it says how many"
    )


def test_without_nnunet_the_extra_is_named(
    tmp_path: Path, inspect: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nnunetv2.utilities.get_network_from_plans", None)
    assert "nnU-Net builds this network: pip install monai-unetq[nnunet]" in inspect(trained(tmp_path))


def test_what_is_no_model_is_refused(tmp_path: Path, inspect: Printed) -> None:
    expected = "expected a packed model, a MONAI bundle's folder, nnU-Net's folder of a trained model, or a plans file"
    assert inspect(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such file or folder, {expected}\n"
    assert inspect(tmp_path).startswith(
        f"{tmp_path}: neither a MONAI bundle (configs/train.yaml or .json) nor "
    )
    text = tmp_path / "model.pt"
    text.write_text("weights")
    assert inspect(text).startswith(f"{text}: truncated, corrupted, or no safetensors file")
    assert (
        inspect(text, "--size", "8", "8") == f"--size: the packed file {text} says it itself; leave it out\n"
    )
    folder = bundle(tmp_path / "bundle", BASIC_UNET)
    assert (
        inspect(folder, "--configuration", "2d")
        == "--configuration: a bundle has one network; leave it out\n"
    )


def test_mistakes_are_answered_before_torch_is_imported(tmp_path: Path) -> None:
    plans = trained(tmp_path) / "plans.json"
    program = (
        "import sys\nfrom monai_unetq.cli import main\n"
        f"for arguments in (['{tmp_path}'], ['{tmp_path}/nowhere'], ['{plans}'], ['{plans}', '--configuration', '4d']):\n"
        "    assert main(['inspect', *arguments]) == 2\n"
        "print([m for m in ('torch', 'monai', 'nnunetv2', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "document",
    [
        [{"layer": "a"}],
        [{"layer": "a", "parts": [{}], "resolution": [], "parameters": [], "macs": [], "reason": ""}],
        [
            {
                "layer": "a",
                "parts": [{"name": "up", "channels": 2}, {"name": "skip", "channels": 2}],
                "resolution": [4],
                "parameters": [2],
                "macs": [8, 8],
                "reason": "",
            }
        ],
        "skips",
        None,
    ],
    ids=["keys", "part", "counts", "text", "nothing"],
)
def test_skips_that_are_none_are_refused(
    document: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inspect: Printed
) -> None:
    described = {**DESCRIPTION, "skips": document or 3}
    monkeypatch.setattr("monai_unetq.deploy.inspect_packed", lambda path: described)
    (tmp_path / "model.unetq").touch()
    assert inspect(tmp_path / "model.unetq").startswith("model.unetq: 'skips': not what find_skips found: ")
