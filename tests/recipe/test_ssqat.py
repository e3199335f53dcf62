"""The SS-QAT recipe on a small network and phantom: what it leaves, what it reuses, that it goes on where it was."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, RandFlipd
from torch import Tensor, nn

from monai_unetq.datasets import membrane_phantom
from monai_unetq.deploy import inspect_packed, unpack
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.recipe import ssqat, ssqat_network, ssqat_plan
from monai_unetq.surgery import calibrate, equalize, find_skips, inference_state, quantized_layers, split
from monai_unetq.training import SkipSupervisionLoss, bce_dice_loss, reestimate_norms
from monai_unetq.training.supervision import supervision_weight

EPOCHS = 3
OPTIONS: dict[str, Any] = {
    "budget": ["weights=3.5bits", "activations=4bits"],
    "metric": "hessian",
    "probes": 16,
}


class KilledError(Exception):
    """As if the process had been killed."""


def make_network() -> FixedPointUNet:
    torch.manual_seed(0)
    network = FixedPointUNet(1, 1, width=2)
    return reestimate_norms(network, [torch.rand(4, 1, 32, 32)]).eval()  # type: ignore[return-value]


def make_loader() -> DataLoader:
    cases = membrane_phantom(count=4, size=32)
    records = [{"image": torch.tensor(c.image), "label": torch.tensor(c.label).float()} for c in cases]
    dataset = CacheDataset(records, Compose([RandFlipd(["image", "label"], prob=0.5)]), progress=False)
    return DataLoader(dataset, batch_size=2, shuffle=True, generator=torch.Generator())


class Validation:
    """Minus the loss on fixed images, as a score; stops where it is told to."""

    def __init__(self, stop_at: int = 0) -> None:
        self.calls = 0
        self.stop_at = stop_at
        case = membrane_phantom(count=1, size=32, seed=5)[0]
        self.image, self.label = torch.tensor(case.image)[None], torch.tensor(case.label)[None].float()

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> float:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KilledError
        out = network(self.image)
        assert isinstance(out, Tensor) and not network.training
        return -float(bce_dice_loss()(out, self.label))


def run(out: Path, validate: Any = None, loss: Any = None, **options: Any) -> Path:
    return ssqat(
        make_network(), loss or bce_dice_loss(), make_loader(), out,
        **{"epochs": EPOCHS, "validate": validate or Validation(), **OPTIONS, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ssqat")
    run(out)
    return out


def test_it_leaves_a_packed_network_with_parts_of_mixed_widths(done: Path) -> None:
    network = unpack(done / "model.unetq", FixedPointUNet(1, 1, width=2))
    layers = quantized_layers(network)
    split_layers = [layer for layer in layers.values() if layer.parts]
    assert len(split_layers) == 3
    assert (
        len({q.number_format.bits for layer in layers.values() for q in layer.weight_quantizers.values()}) > 1
    )
    assert not any("supervision" in key for key in network.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    first, last = layers["encoder.0.conv1"], layers["last"]
    widths = [first.input_quantizer, first.weight_quantizer, last.weight_quantizer]
    assert [q.number_format.bits for q in widths] == [8, 8, 8]
    held = inspect_packed(done / "model.unetq")
    assert json.loads((done / "plan.json").read_text()) == held["plan"]
    state = torch.load(done / "model.pt", weights_only=True)
    assert not any("supervision" in key for key in state)
    assert not (done / "checkpoint.pt").exists() and not list(done.rglob("*.part"))


def test_the_budget_is_kept(done: Path) -> None:
    plan = QuantPlan.load(done / "allocation" / "allocation.json")
    layers = quantized_layers(unpack(done / "model.unetq", FixedPointUNet(1, 1, width=2)))
    bits = [
        (q.number_format.bits, piece.numel())
        for layer in layers.values()
        for q, piece in zip(layer.weight_quantizers.values(), layer.weight_pieces().values(), strict=True)
    ]
    assert sum(b * n for b, n in bits) / sum(n for _, n in bits) <= 3.5
    assert plan.learned and plan.scale == "power-of-two"


def test_a_second_call_finds_everything_done(done: Path) -> None:
    before = (done / "model.unetq").stat().st_mtime_ns
    validate = Validation()
    assert run(done, validate) == done / "model.unetq"
    assert validate.calls == 0 and (done / "model.unetq").stat().st_mtime_ns == before


def test_the_last_epoch_is_packed_or_the_best(tmp_path: Path) -> None:
    """The first epoch is the only good one for a validation that says so; without one, epochs are not compared."""
    seen: list[dict[str, Tensor]] = []

    def first(network: nn.Module) -> float:
        seen.append({key: value.clone() for key, value in inference_state(network).items()})
        return -float(len(seen))

    def state(folder: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = torch.load(tmp_path / folder / "model.pt", weights_only=True)
        return found

    def kept(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
        return all(torch.equal(found[key], value) for key, value in expected.items())

    run(tmp_path / "best", first)
    ssqat(make_network(), bce_dice_loss(), make_loader(), tmp_path / "last", epochs=EPOCHS, **OPTIONS)
    assert len(seen) == EPOCHS and not kept(seen[0], seen[-1])
    assert kept(state("best"), seen[0]) and kept(state("last"), seen[-1])


@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_killed_run_ends_with_the_same_weights(done: Path, tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(KilledError):
        run(tmp_path, Validation(stop_at))
    assert not (tmp_path / "model.unetq").exists()
    torch.rand(3)  # what was drawn in between does not matter
    run(tmp_path)
    assert (tmp_path / "model.unetq").read_bytes() == (done / "model.unetq").read_bytes()


def test_another_request_is_made_anew_with_the_same_sensitivities(done: Path, tmp_path: Path) -> None:
    network, batches = make_network(), list(make_loader())
    split(network, batches[0]["image"][:1])
    options: dict[str, Any] = {"metric": "sqnr"}
    first = ssqat_plan(network, bce_dice_loss(), batches, tmp_path, **options)
    file = tmp_path / "sensitivity" / "sensitivities.json"
    before = file.stat().st_mtime_ns
    second = ssqat_plan(network, bce_dice_loss(), batches, tmp_path, budget="weights=3.5bits", **options)
    assert first != second and file.stat().st_mtime_ns == before
    assert ssqat_plan(network, bce_dice_loss(), [], tmp_path, budget="weights=3.5bits", **options) == second
    with torch.no_grad():
        network.last.weight.mul_(2)
    ssqat_plan(network, bce_dice_loss(), batches, tmp_path, **options)
    assert file.stat().st_mtime_ns > before


def test_without_supervision_there_are_no_heads() -> None:
    network, batches = make_network(), list(make_loader())
    ssqat_network(network, bce_dice_loss(), batches, metric="fisher", supervised=False, distilled=False)
    calibrate(network, batches)
    assert isinstance(network.train()(batches[0]["image"]), Tensor)
    assert len(find_skips(network).splittable) == 3


def test_channels_are_equalized_by_default() -> None:
    batches = list(make_loader())

    def gammas(network: nn.Module) -> Tensor:
        return torch.cat(
            [v for k, v in network.state_dict().items() if "norm" in k and k.endswith(".weight")]
        )

    def prepared(**more: Any) -> Tensor:
        network = make_network()
        ssqat_network(
            network, bce_dice_loss(), batches, metric="sqnr", supervised=False, distilled=False, **more
        )
        return gammas(network)

    before, after = gammas(make_network()), gammas(equalize(make_network(), batches))
    assert not torch.equal(before, after)
    assert torch.equal(prepared(), after) and torch.equal(prepared(equalized=False), before)


@pytest.mark.parametrize("supervised", [True, False])
def test_the_teacher_is_the_float_network(supervised: bool) -> None:
    network, batches = make_network(), list(make_loader())
    with torch.no_grad():
        wanted = make_network().eval()(batches[0]["image"])
    ssqat_network(network, bce_dice_loss(), batches, metric="fisher", supervised=supervised)
    calibrate(network, batches)
    output = network.train()(batches[0]["image"])
    assert torch.equal(output.teacher, wanted)
    assert len(output.skips) == (3 if supervised else 0)


def test_the_network_that_was_given_is_left_as_it_is(tmp_path: Path) -> None:
    network = make_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    ssqat(
        network,
        bce_dice_loss(),
        make_loader(),
        tmp_path,
        epochs=1,
        metric="sqnr",
        supervision=0,
    )
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_what_the_loss_is_given_and_how_its_weight_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[float] = []
    seen: list[tuple[Any, ...]] = []

    class Watched(SkipSupervisionLoss):
        def forward(self, output: Any, target: Any) -> Tensor:
            weights.append(self.weight)
            taught = isinstance(output.teacher, Tensor)
            seen.append((self.distillation, self.boundary, self.targets, len(output.skips), taught))
            return super().forward(output, target)

    # The function `ssqat` of the package hides its module of the same name.
    monkeypatch.setattr(importlib.import_module("monai_unetq.recipe.ssqat"), "SkipSupervisionLoss", Watched)
    run(
        tmp_path, epochs=2, metric="sqnr", supervision=0.2, distillation=0.5,
        supervision_options={"boundary": 2.0, "targets": "area"},
    )  # fmt: skip
    assert set(seen) == {(0.5, 2.0, "area", 3, True)}
    assert weights == pytest.approx([0.2 * supervision_weight(step / 4) for step in range(4)])


def test_step_sizes_and_heads_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run(tmp_path, Validation(2), metric="sqnr", learning_rate=2e-3)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert [group["initial_lr"] for group in kept["optimizer"]["param_groups"]] == pytest.approx(
        [2e-3, 6e-3, 2e-2]
    )


def test_batch_norms_are_estimated_anew_and_stand_still(tmp_path: Path) -> None:
    batches = list(make_loader())
    found: list[dict[str, Tensor]] = []

    def statistics(network: nn.Module) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in network.state_dict().items() if "running" in key}

    def validate(network: nn.Module) -> float:
        found.append(statistics(network))
        return 0.0

    run(tmp_path, validate, metric="sqnr", calibration=batches)
    first, second, third = found
    assert first and all(torch.equal(first[key], other[key]) for other in (second, third) for key in first)
    of_float = statistics(equalize(make_network(), batches))
    assert not any(torch.equal(first[key], of_float[key]) for key in first)


def test_the_best_network_is_packed(tmp_path: Path) -> None:
    image = torch.rand(1, 1, 32, 32)
    outputs: list[Tensor] = []

    def validate(network: nn.Module) -> float:
        with torch.no_grad():
            outputs.append(network(image))
        return [0.5, 0.9, 0.7][len(outputs) - 1]

    packed = unpack(run(tmp_path, validate, metric="sqnr"), FixedPointUNet(1, 1, width=2)).eval()
    with torch.no_grad():
        assert torch.equal(packed(image), outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_files_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"float")
    with pytest.raises(ValueError, match=r"holds model\.pt but no stage\.json"):
        run(tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == b"float"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_choices_may_be_any_sequence(tmp_path: Path) -> None:
    run(tmp_path, epochs=1, metric="sqnr", choices=range(2, 9))
    validate = Validation()
    run(tmp_path, validate, epochs=1, metric="sqnr", choices=list(range(2, 9)))
    assert validate.calls == 0


def test_other_trainers_go_on_saying_what_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SupervisedTrainer(
        device="cpu", max_epochs=1, train_data_loader=make_loader(), network=make_network(),
        optimizer=torch.optim.Adam(make_network().parameters()), loss_function=bce_dice_loss(),
    )  # fmt: skip
    assert isinstance(trainer, Engine)
    monkeypatch.setattr(trainer.logger, "level", logging.INFO)
    run(tmp_path, epochs=1, metric="sqnr")
    assert trainer.logger.level == logging.INFO


def test_batches_must_not_be_an_iterator(tmp_path: Path) -> None:
    batches = list(make_loader())
    with pytest.raises(ValueError, match="ssqat_network: batches is an iterator"):
        ssqat_network(make_network(), bce_dice_loss(), iter(batches), metric="sqnr")
    with pytest.raises(ValueError, match="ssqat: calibration is an iterator"):
        run(tmp_path / "out", calibration=iter(batches))
    assert not (tmp_path / "out").exists()


def test_preparing_draws_no_random_numbers_of_the_callers() -> None:
    loader = DataLoader(make_loader().dataset, batch_size=2, shuffle=True)
    torch.manual_seed(3)
    wanted = torch.rand(1)
    network = make_network()
    torch.manual_seed(3)
    ssqat_network(network, bce_dice_loss(), loader, metric="sqnr")
    assert torch.equal(torch.rand(1), wanted)


def test_traces_that_have_not_settled_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    network, batches = make_network(), list(make_loader())
    ssqat_plan(network, bce_dice_loss(), batches, metric="hessian", probes=2)
    assert "Hessian traces have not settled after 2 probes" in caplog.text
    assert "metric='sqnr'" in caplog.text


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'hessian', 'fisher' or 'sqnr'"):
        run(tmp_path, metric="drop")
    with pytest.raises(ValueError, match="out of reach"):
        run(tmp_path, budget="weights=1.5bits", metric="sqnr")
    with pytest.raises(ValueError, match="validate gave nan in epoch 1"):
        run(tmp_path, lambda network: float("nan"), metric="sqnr")
    with pytest.raises(ValueError, match="the loss is nan at step 1: lower the learning rate"):
        run(tmp_path, loss=lambda prediction, label: prediction.mean() * torch.nan, metric="sqnr")
    assert not (tmp_path / "model.unetq").exists()
