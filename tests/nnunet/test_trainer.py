"""The trainers in this process, on small data sets; ``test_commands`` runs nnU-Net's own commands."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

import monai_unetq as uq
from monai_unetq.cli import main
from monai_unetq.layers import PairedNorm
from monai_unetq.nnunet import SECTION
from monai_unetq.nnunet.trainer import nnUNetTrainerFixedPoint, nnUNetTrainerQAT, nnUNetTrainerSSQAT
from monai_unetq.surgery import plan_of, plan_of_state, quantized_layers, set_quantizers
from monai_unetq.surgery.supervise import SkipSupervision
from tests.nnunet.datasets import FLAT, REGIONS, load, pools_of_threads

SHORT = {"float_epochs": 1, "epochs": 2, "iterations": 2, "val_iterations": 1, "calibration_batches": 2}
MIXED = {"budget": ["weights=4.0bits"], "activations": "int6", **SHORT}
UNIFORM = {"weights": "int4", "activations": "int6", **SHORT}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's progress.png takes seconds to draw; ``test_commands`` has the real one."""

    def plot(self: LocalLogger, output_folder: str) -> None:
        Image.new("RGB", (300, 540), "white").save(Path(output_folder) / "progress.png")

    monkeypatch.setattr(LocalLogger, "plot_progress_png", plot)


def make(
    folders: Path, cls: type[nnUNetTrainer], section: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """A trainer, as ``nnUNetv2_train`` makes it."""
    dataset = options.get("dataset", FLAT)
    configuration = "2d" if dataset == FLAT else "3d_fullres"
    plans, document = load(folders, dataset, "nnUNetPlans" if dataset == FLAT else "nnUNetResEncUNetMPlans")
    if section is not None:
        plans["configurations"][configuration][SECTION] = {"base_plans": plans["plans_name"], **section}
        plans["plans_name"] = "Quantized"
    return cls(plans, configuration, options.get("fold", 0), document, CPU)


def trained(trainer: Any) -> dict[str, Any]:
    """Train, and give the final checkpoint."""
    trainer.run_training()
    return read(trainer, "final")


def read(trainer: Any, which: str) -> dict[str, Any]:
    file = Path(trainer.output_folder) / f"checkpoint_{which}.pth"
    return dict(torch.load(file, weights_only=False))


def inference_network(trainer: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """What ``nnUNetPredictor`` builds and loads."""
    plans = PlansManager(trainer.plans_manager.plans)
    configuration = plans.get_configuration(trainer.configuration_name)
    heads = plans.get_label_manager(trainer.dataset_json).num_segmentation_heads
    channels = determine_num_input_channels(plans, configuration, trainer.dataset_json)
    network: nn.Module = type(trainer).build_network_architecture(
        plans, configuration, channels, heads, False
    )
    network.load_state_dict(weights)
    return network.eval()


def test_a_training_has_a_float_and_a_quantized_phase(folders: Path) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    phases: list[tuple[int, str, bool]] = []
    step = trainer.train_step

    def train_step(batch: Any) -> Any:
        supervised = any(isinstance(m, SkipSupervision) for m in trainer.network.modules())
        phases.append((trainer.current_epoch, trainer.phase, supervised))
        return step(batch)

    trainer.train_step = train_step
    final = trained(trainer)
    assert phases == [(0, "float", False)] * 2 + [(1, "quantized", True)] * 2 + [(2, "quantized", True)] * 2
    for which in (final, read(trainer, "best")):
        plan = plan_of_state(which["network_weights"])
        assert plan is not None and plan.layers["decoder.stages.0.convs.0.conv"].parts == ("up", "skip")
        assert not any("skip_supervision" in key for key in which["network_weights"])
    assert final["trainer_name"] == "nnUNetTrainerSSQAT" and final["current_epoch"] == 3
    folder = Path(trainer.output_folder)
    assert not list(folder.glob("*.part")) and not (folder / "checkpoint_latest.pth").exists()
    log = next(folder.glob("training_log_*.txt")).read_text()
    assert "epochs 0 to 0 in float, epochs 1 to 2 quantized" in log and "quantized 1" in log
    with Image.open(folder / "progress.png") as figure:
        assert figure.height > 540  # the line that names the phases


def test_the_mixed_plan_keeps_its_budget_and_packs(folders: Path) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    final = trained(trainer)
    plan = plan_of_state(final["network_weights"])
    assert plan is not None
    saved = uq.QuantPlan.load(trainer.folder / "plan.json")
    for name, layer in saved.layers.items():  # the state has every layer under each of nnU-Net's names for it
        assert (plan.layers[name].weights, plan.layers[name].inputs) == (layer.weights, layer.inputs)
    inner = {name: layer for name, layer in saved.layers.items() if name != "encoder.stages.0.0.convs.0.conv"}
    assert {f.bits for layer in inner.values() for f in layer.inputs.values()} == {6}
    sizes = {name: trainer.core.get_submodule(name).weight.numel() for name in saved.layers}
    network = inference_network(trainer, final["network_weights"])
    bits = sum(
        quantizer.number_format.bits * weight.numel()
        for layer in quantized_layers(network).values()
        for quantizer, weight in zip(
            layer.weight_quantizers.values(), layer.weight_pieces().values(), strict=True
        )
    )
    assert bits <= 4 * sum(sizes.values())
    packed = uq.unpack(Path(trainer.output_folder) / "model.unetq", trainer._float_network(None))
    packed.decoder.deep_supervision = False  # type: ignore[union-attr]
    image = torch.randn(1, 1, 32, 32)
    assert torch.allclose(packed.eval()(image), network(image), atol=1e-4)


def test_inference_computes_what_training_validated_and_quantizers_matter(folders: Path) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    final = trained(trainer)
    network = inference_network(trainer, final["network_weights"])
    trainer.set_deep_supervision_enabled(False)
    image = torch.randn(2, 1, 32, 32)
    quantized = network(image)
    assert torch.equal(trainer.network.eval()(image), quantized)
    assert not torch.allclose(set_quantizers(network, False)(image), quantized, atol=1e-3)


def test_folds_with_their_own_allocations_load_into_one_network(folders: Path) -> None:
    folds = [make(folders, nnUNetTrainerSSQAT, MIXED, fold=fold) for fold in (0, 1)]
    states = [trained(trainer)["network_weights"] for trainer in folds]
    image = torch.randn(1, 1, 32, 32)
    alone = [inference_network(folds[0], state)(image) for state in states]
    other = {**MIXED, "budget": ["weights=3.0bits"]}
    third = trained(make(folders, nnUNetTrainerSSQAT, other, fold=2))["network_weights"]
    assert plan_of_state(third) != plan_of_state(states[0])
    shared = inference_network(folds[0], third)
    for state, expected in zip(states, alone, strict=True):
        shared.load_state_dict(state)
        assert torch.equal(shared(image), expected)


def test_the_float_trainers_fold_replaces_the_float_phase(folders: Path) -> None:
    base = make(folders, nnUNetTrainer)
    base.num_epochs, base.num_iterations_per_epoch, base.num_val_iterations_per_epoch = 1, 2, 1
    weights = trained(base)["network_weights"]
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    final = trained(trainer)
    assert (trainer.float_epochs, trainer.num_epochs, final["current_epoch"]) == (0, 2, 2)
    kept = torch.load(trainer.folder / "float.pt", weights_only=True)
    assert kept.keys() == weights.keys() and all(torch.equal(kept[key], weights[key]) for key in kept)


def test_a_float_checkpoint_of_other_plans_is_named(folders: Path) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    trainer.initialize()
    file = trainer.float_checkpoint()
    file.parent.mkdir(parents=True)
    weights = dict(trainer.core.state_dict())
    changed = {**weights, "decoder.seg_layers.0.weight": torch.zeros(2, 9, 1, 1)}
    for broken, message in (
        (changed, r"'decoder.seg_layers.0.weight' has the shape \(2, 9, 1, 1\).*base_plans"),
        ({"other": weights["decoder.seg_layers.0.weight"]}, "holds no 'encoder.*expected|of other plans"),
    ):
        torch.save({"network_weights": broken}, file)
        with pytest.raises(ValueError, match=message):
            trainer._skip_float_phase()


def test_pretrained_weights_replace_the_float_phase_and_the_teacher(folders: Path, tmp_path: Path) -> None:
    source = make(folders, nnUNetTrainer)
    source.initialize()
    torch.save({"network_weights": source.network.state_dict()}, tmp_path / "pretrained.pth")
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(tmp_path / "pretrained.pth"))
    final = trained(trainer)
    assert trainer.float_epochs == 0 and trainer.request.distillation == 0
    assert (
        not final["monai_unetq"]["teacher"]
        and "pretrained weights were given"
        in next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    )


class KilledError(Exception):
    """What ends a training early."""


@pytest.mark.parametrize(("epoch", "phase"), [(1, "float"), (2, "quantized"), (3, "quantized")])
def test_a_killed_training_goes_on_in_its_phase(folders: Path, epoch: int, phase: str) -> None:
    section = {**MIXED, "float_epochs": 2}
    trainer = make(folders, nnUNetTrainerSSQAT, section)
    trainer.save_every = 1
    step = trainer.train_step

    def train_step(batch: Any) -> Any:
        if trainer.current_epoch == epoch:
            raise KilledError
        return step(batch)

    trainer.train_step = train_step
    with pytest.raises(KilledError):
        trainer.run_training()
    latest = read(trainer, "latest")
    assert latest["current_epoch"] == epoch and latest["monai_unetq"]["phase"] == phase
    again = make(folders, nnUNetTrainerSSQAT, section)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    expected, found = trainer.core.state_dict(), again.core.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert any("skip_supervision" in key for key in found) == (phase == "quantized")
    saved, restored = latest["optimizer_state"], again.optimizer.state_dict()
    assert (
        saved["param_groups"] == restored["param_groups"]
        and saved["state"].keys() == restored["state"].keys()
    )
    if phase == "quantized":
        assert again.lr_scheduler._rates == trainer.lr_scheduler._rates
    final = trained(again)
    assert final["current_epoch"] == 4 and len(final["logging"]["mean_fg_dice"]) == 4


def test_a_training_killed_at_the_end_of_the_float_phase_quantizes_then(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer), "_begin_quantized", lambda self: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            trainer.run_training()
    latest = read(trainer, "latest")
    assert latest["monai_unetq"] == {"phase": "float", "float_epochs": 1} and latest["current_epoch"] == 1
    again = make(folders, nnUNetTrainerSSQAT, MIXED)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    assert plan_of_state(trained(again)["network_weights"]) is not None


def test_no_validation_case_reaches_calibration_sensitivities_or_training(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    trainer.initialize()
    training, validation = trainer.do_split()
    loaded: list[str] = []
    original = trainer.dataset_class.load_case

    def load_case(self: Any, identifier: str) -> Any:
        loaded.append(identifier)
        return original(self, identifier)

    monkeypatch.setattr(trainer.dataset_class, "load_case", load_case)
    trainer.current_epoch = trainer.float_epochs
    trainer._begin_quantized()
    assert loaded and set(loaded) <= set(training) and not set(loaded) & set(validation)
    loaded.clear()
    batches, _ = trainer.get_dataloaders()
    validated = set(loaded) & set(validation)  # the validation loader draws one batch at once
    loaded.clear()
    for _ in range(5):
        next(batches)
    assert validated and loaded and not set(loaded) & set(validation)


@pytest.mark.parametrize(("equalized", "deep_supervision"), [(True, True), (True, False), (False, True)])
def test_equalization_leaves_the_float_network_what_it_is(
    folders: Path, equalized: bool, deep_supervision: bool
) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, {**MIXED, "equalized": equalized})
    trainer.enable_deep_supervision = deep_supervision
    trainer.initialize()
    norm = trainer.core.encoder.stages[0][0].convs[0].norm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.1, 2.0, len(norm.weight)))
    weights = copy.deepcopy(trainer.core.state_dict())
    trainer.current_epoch = trainer.float_epochs
    trainer._begin_quantized()
    moved = not torch.equal(trainer.core.encoder.stages[0][0].convs[0].norm.weight, norm.weight)
    assert moved == equalized
    found = set_quantizers(uq.strip(trainer.core), False).eval()
    assert found.decoder.deep_supervision == deep_supervision  # type: ignore[union-attr]
    image = torch.randn(1, 1, 32, 32)
    outputs = [network(image) for network in (trainer._float_network(weights), found)]
    pairs = zip(*outputs, strict=True) if deep_supervision else [outputs]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("widths", [MIXED, UNIFORM], ids=["allocated", "uniform"])
def test_what_norms_read_is_rounded_on_request(folders: Path, widths: dict[str, Any]) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, {**widths, "norms": "int8"})
    trainer.initialize()
    trainer.current_epoch = trainer.float_epochs
    trainer._begin_quantized()
    plan = plan_of(uq.strip(trainer.core))
    rounded = {name for name, layer in plan.layers.items() if layer.output is not None}
    assert rounded == {name for name in plan if ".convs." in name} and rounded


def test_the_moving_average_begins_anew_with_the_quantized_network(folders: Path) -> None:
    trainer = make(folders, nnUNetTrainerQAT, {**UNIFORM, "float_epochs": 2})
    logged = trained(trainer)["logging"]
    average, dice = logged["ema_fg_dice"], logged["mean_fg_dice"]
    assert average[2] == dice[2]
    assert average[3] == pytest.approx(0.9 * dice[2] + 0.1 * dice[3])


def test_the_control_has_neither_heads_nor_teacher_nor_parts(folders: Path) -> None:
    trainer = make(folders, nnUNetTrainerQAT, {**UNIFORM, "supervision": 0.4, "distillation": 1.0})
    final = trained(trainer)
    plan = plan_of_state(final["network_weights"])
    assert plan is not None and all(
        layer.parts == ("input",) or len(layer.parts) == 1 for layer in plan.layers.values()
    )
    assert not final["monai_unetq"]["heads"] and not final["monai_unetq"]["teacher"]
    with pytest.raises(
        ValueError, match=r"budget .* is for nnUNetTrainerSSQAT; nnUNetTrainerQAT has uniform widths"
    ):
        make(folders, nnUNetTrainerQAT, MIXED)


def test_regions_with_an_ignore_label_in_a_residual_network(folders: Path) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, UNIFORM, dataset=REGIONS)
    assert trainer.label_manager.has_regions and trainer.label_manager.has_ignore_label
    final = trained(trainer)
    heads = [value for key, value in final["monai_unetq"]["heads"].items() if key.endswith("weight")]
    assert heads and {head.shape[0] for head in heads} == {2} and trainer.loss.activation == "sigmoid"
    network = inference_network(trainer, final["network_weights"])
    assert network(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


def test_fixed_point_folds_its_batch_norms(folders: Path) -> None:
    section = {**SHORT, "epochs": 3}
    other = make(folders, nnUNetTrainerQAT, UNIFORM, dataset=REGIONS).float_checkpoint()
    other.parent.mkdir(parents=True)
    torch.save({"network_weights": {}}, other)  # of a network with instance norm: it is not for this trainer
    trainer = make(folders, nnUNetTrainerFixedPoint, section, dataset=REGIONS)
    final = trained(trainer)
    assert trainer.float_epochs == 1
    plan = plan_of_state(final["network_weights"])
    assert plan is not None and plan.scale == "power-of-two"
    formats = {str(f) for layer in plan.layers.values() for f in layer.inputs.values()}
    assert {name.lstrip("U") for name in formats} == {"Q4.4", "int8"}
    norms = [m for m in trainer.core.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, PairedNorm) and norm.frozen for norm in norms)
    assert not any(isinstance(m, nn.LeakyReLU) for m in trainer.core.modules())
    network = inference_network(trainer, final["network_weights"])
    image = torch.randn(1, 1, 16, 16, 16)
    folded = uq.fold(copy.deepcopy(network), image)
    assert torch.allclose(folded(image), network(image), atol=1e-4)
    with pytest.raises(ValueError, match="scale is 'free', nnUNetTrainerFixedPoint has powers of two"):
        make(folders, nnUNetTrainerFixedPoint, {**section, "scale": "free"}, dataset=REGIONS)


def test_nnunet_finds_the_trainers_by_its_variable(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("nnUNetTrainerSSQAT", "nnUNetTrainerQAT", "nnUNetTrainerFixedPoint")
    found = [recursive_find_trainer_class_by_name(name) for name in names]
    assert found == [nnUNetTrainerSSQAT, nnUNetTrainerQAT, nnUNetTrainerFixedPoint]
    monkeypatch.delenv("nnUNet_extTrainer")
    with pytest.raises(RuntimeError, match="specify the external path via the `nnUNet_extTrainer`"):
        recursive_find_trainer_class_by_name(names[0])


def test_without_deep_supervision(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    trainer.enable_deep_supervision = False
    assert plan_of_state(trained(trainer)["network_weights"]) is not None


def test_a_compiled_training_is_resumed_and_loads_uncompiled(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnUNetTrainerSSQAT, "_do_i_compile", lambda self: True)  # nnU-Net: never on a CPU
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    trainer = make(folders, nnUNetTrainerSSQAT, {**MIXED, "epochs": 1})
    final = trained(trainer)
    assert isinstance(trainer.network, OptimizedModule)
    inference_network(trainer, final["network_weights"])
    again = make(folders, nnUNetTrainerSSQAT, {**MIXED, "epochs": 1})
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert isinstance(again.network, OptimizedModule)
    found = uq.surgery.inference_state(again.core)
    assert all(torch.equal(found[key], value) for key, value in final["network_weights"].items())


def test_both_stages_of_a_cascade(
    prepared: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(prepared / "preprocessed" / REGIONS, base / "preprocessed" / REGIONS)
    monkeypatch.setenv("nnUNet_preprocessed", str(base / "preprocessed"))
    file = base / "preprocessed" / REGIONS / "nnUNetResEncUNetMPlans.json"
    plans = json.loads(file.read_text())
    stages = "3d_lowres", "3d_cascade_fullres"
    # The first stage at the data's own resolution: what is resampled between stages is nnU-Net's.
    plans["configurations"] |= {
        stages[0]: {"inherits_from": "3d_fullres", "next_stage": stages[1]},
        stages[1]: {"inherits_from": "3d_fullres", "previous_stage": stages[0]},
    }
    file.write_text(json.dumps(plans))
    cases = [f"case_{number:02d}" for number in range(4)]  # fewer than there are: each is predicted twice
    halves = [{"train": cases[:2], "val": cases[2:]}, {"train": cases[2:], "val": cases[:2]}]
    (file.parent / "splits_final.json").write_text(json.dumps(halves))
    options = ("--budget", "weights=4.0bits", "--activations", "int6", "--float-epochs", "1", "--epochs", "1")
    for stage in stages:
        words = ("-d", "902", "-c", stage, "-p", "nnUNetResEncUNetMPlans", "-o", "Mixed", *options)
        more = ("--iterations", "2", "--val-iterations", "1", "--calibration-batches", "2")
        assert main(["nnunet", "plan", *words, *more]) == 0
    plans, document = load(base, REGIONS, "Mixed")
    for stage, fold in ((stages[0], 0), (stages[0], 1), (stages[1], 0)):
        trainer: Any = nnUNetTrainerSSQAT(copy.deepcopy(plans), stage, fold, document, CPU)
        final = trained(trainer)
        assert trainer.is_cascaded == (stage == stages[1])
        channels = 1 + 2 * trainer.is_cascaded  # the image, and both regions of the stage before
        assert trainer.num_input_channels == channels
        with pools_of_threads():
            trainer.perform_actual_validation()
        assert sorted(path.stem for path in Path(trainer.output_folder, "validation").glob("*.nii.gz"))
        network = inference_network(trainer, final["network_weights"])
        assert network(torch.zeros(1, channels, 16, 16, 16)).shape[2:] == (16, 16, 16)


def test_without_a_section_there_are_defaults(folders: Path) -> None:
    request = make(folders, nnUNetTrainerSSQAT).request
    assert (request.budget, request.activations, request.epochs) == (("weights=4bits",), "int6", 100)
    assert (request.float_epochs, request.iterations, request.val_iterations) == (1000, 250, 50)


def test_broken_and_unsupported_requests_are_refused_at_once(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="plans, section 'monai_unetq': unknown key 'bits'"):
        make(folders, nnUNetTrainerSSQAT, {**MIXED, "bits": 4})
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    trainer.device = torch.device("mps")
    with pytest.raises(NotImplementedError, match="runs on cuda and cpu"):
        trainer.initialize()
    with pytest.raises(NotImplementedError, match="Sequential has no decoder with seg_layers"):
        monkeypatch.setattr(
            nnUNetTrainer, "build_network_architecture", lambda *a: nn.Sequential(nn.Conv2d(1, 2, 1))
        )
        make(folders, nnUNetTrainerSSQAT, MIXED).initialize()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"budget": ["weights=4parsecs"]}, "budget 'weights=4parsecs' is none"),
        (
            {"budget": ["weights=1.5bits"]},
            r"weights=1\.5bits is out of reach; the nearest that is not is weights=2\.\d+bits",
        ),
        ({"weights": "int4", "activations": "pow2-4"}, "input of layer"),
    ],
)
def test_what_cannot_be_quantized_fails_before_the_float_phase(
    folders: Path, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(folders, nnUNetTrainerSSQAT, {"activations": "int6", **SHORT, **section}).initialize()


def test_sensitivities_are_used_again_for_the_same_cases_only(folders: Path) -> None:
    kept = []
    for batches in (2, 3):
        trainer = make(folders, nnUNetTrainerSSQAT, {**MIXED, "calibration_batches": batches})
        trainer.initialize()
        trainer._plan(trainer._float_network(trainer.core.state_dict()), trainer._batches())
        kept.append({path.parent.parent.name for path in trainer.folder.rglob("sensitivities.json")})
    assert len(kept[0]) == 1 and len(kept[1]) == 2


def test_a_checkpoint_of_another_trainer_is_refused(folders: Path, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    torch.save({"trainer_name": "nnUNetTrainer", "network_weights": {}}, file)
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    with pytest.raises(
        ValueError, match=r"made by nnUNetTrainer, expected a checkpoint of nnUNetTrainerSSQAT; give"
    ):
        trainer.load_checkpoint(str(file))


def test_a_missing_float_file_is_named(folders: Path) -> None:
    trainer = make(folders, nnUNetTrainerSSQAT, MIXED)
    trained(trainer)
    (trainer.folder / "float.pt").unlink()
    again = make(folders, nnUNetTrainerSSQAT, MIXED)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))  # enough for --val
    with pytest.raises(FileNotFoundError, match=r"float\.pt: no such file, expected the float weights"):
        again.run_training()


def test_monais_way_into_nnunet(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai.apps.nnunet import get_nnunet_trainer, nnUNetV2Runner

    base = make(folders, nnUNetTrainer)
    base.num_epochs, base.num_iterations_per_epoch, base.num_val_iterations_per_epoch = 1, 1, 1
    trained(base)
    trainer = get_nnunet_trainer(FLAT, "2d", 0, trainer_class_name="nnUNetTrainerSSQAT", device="cpu")
    batch = next(trainer.dataloader_train)
    assert trainer.phase == "quantized"  # MONAI's trainer takes network, loss and optimizer from here
    trainer.loss(trainer.network.train()(batch["data"]), batch["target"]).backward()
    trainer.optimizer.step()
    runner = nnUNetV2Runner.__new__(nnUNetV2Runner)  # its __init__ converts a data list
    runner.dataset_name_or_id, runner.trainer_class_name = "901", "nnUNetTrainerSSQAT"
    runner.export_validation_probabilities = True
    words, _ = runner.train_single_model_command("2d", 0, 0, {"p": "Mixed", "c": True})
    assert words[:6] == ["nnUNetv2_train", "901", "2d", "0", "-tr", "nnUNetTrainerSSQAT"]
    assert words[-4:] == ["--npz", "-p", "Mixed", "--c"]
