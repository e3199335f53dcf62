"""The best model is the best quantized one, on disk and after resuming, and what is packed is that model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from torch import Tensor, nn

from monai_unetq.deploy import unpack
from monai_unetq.networks import FixedPointUNet
from monai_unetq.surgery import plan_of, set_quantizers
from monai_unetq.training import BestModel, Calibration, Pack
from monai_unetq.training.handlers.quantization import is_rounding


class Scripted:
    """Replaces the scores of the epochs, in the evaluator, and remembers the network's state at each."""

    def __init__(self, scores: list[float], network: nn.Module) -> None:
        self.scores, self.network = scores, network
        self.states: list[dict[str, Tensor]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        engine.state.metrics["val_mean_dice"] = self.scores[engine.state.epoch - 1]
        self.states.append({k: v.clone() for k, v in self.network.state_dict().items()})


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def read(path: Path) -> dict[str, Tensor]:
    found = torch.load(path, weights_only=True)
    assert isinstance(found, dict)
    return found


def test_the_best_is_chosen_among_quantized_validations(
    training: Callable[..., Any], network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    net = network()
    scripted = Scripted([0.9, 0.8, 0.3, 0.5, 0.4], net)
    run = training(tmp_path, net, epochs=5, start_epoch=2, validation_handlers=[scripted])
    run.run()
    assert (run.best.score, run.best.epoch) == (0.5, 4)
    assert same(read(tmp_path / "model.pt"), scripted.states[3])
    assert not same(scripted.states[3], scripted.states[4])


def test_a_float_network_is_chosen_among_all(
    training: Callable[..., Any], network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    net = network(quantized=False)
    scripted = Scripted([0.3, 0.9, 0.4], net)
    training(tmp_path, net, epochs=3, validation_handlers=[scripted]).run()
    assert same(read(tmp_path / "model.pt"), scripted.states[1])
    assert not (tmp_path / "model.unetq").exists()
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("scores", "smaller", "best"),
    [
        ([0.5, 0.5, 0.4], False, 1),
        ([float("nan"), 0.2, 0.1], False, 2),
        ([0.5, float("inf"), float("nan")], False, 1),
        ([0.5, 0.2, 0.4], True, 2),
    ],
)
def test_comparison(
    scores: list[float],
    smaller: bool,
    best: int,
    training: Callable[..., Any],
    network: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    net = network()
    run = training(
        tmp_path, net, epochs=3, start_epoch=0, validation_handlers=[Scripted(scores, net)],
        score_by=(lambda new, old: new < old) if smaller else None,
    )  # fmt: skip
    run.run()
    assert run.best.epoch == best


def test_the_last_is_kept_on_request(
    training: Callable[..., Any],
    network: Callable[..., nn.Module],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = network()
    scripted = Scripted([0.5, 0.9, 0.4, 0.3], net)
    run = training(tmp_path, net, start_epoch=1, validation_handlers=[scripted])
    run.best.last = True
    run.trainer.logger.setLevel(logging.INFO)
    run.run()
    assert (run.best.epoch, run.best.score) == (4, 0.3)
    assert same(read(tmp_path / "model.pt"), scripted.states[3])
    assert f"packed the last model, of epoch 4: {tmp_path / 'model.unetq'}" in caplog.text


def test_quantizers_that_are_off_are_seen_whatever_the_start_epoch_says(
    training: Callable[..., Any], tmp_path: Path
) -> None:
    run = training(tmp_path, epochs=3, start_epoch=2)
    run.best.start_epoch = 0
    run.run()
    assert run.best.epoch == 3


def test_a_validation_before_the_first_calibration_does_not_count(
    network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    best = BestModel(network(), tmp_path)
    engine = Engine(lambda *_: None)
    engine.state.epoch = 0
    best(engine)
    assert best.score is None


def test_an_evaluator_without_a_single_number_is_refused(
    network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    best = BestModel(network(), tmp_path)
    engine: Any = Engine(lambda *_: None)
    engine.state.epoch, engine.state.key_metric_name = 1, None
    with pytest.raises(ValueError, match="no key metric to compare; give it a key_val_metric"):
        best(engine)
    engine.state.key_metric_name, engine.state.metrics = "dice", {"dice": torch.tensor([0.1, 0.2])}
    with pytest.raises(ValueError, match=r"'dice' is .* expected one number"):
        best(engine)
    assert list(tmp_path.iterdir()) == []


def test_the_log_names_the_best(
    training: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = training(tmp_path, epochs=1, start_epoch=0)
    run.evaluator.logger.setLevel(logging.INFO)
    run.trainer.logger.setLevel(logging.INFO)
    run.run()
    assert f"best: val_mean_dice {run.best.score:.4f} in epoch 1, {tmp_path / 'model.pt'}" in caplog.text
    assert f"packed the best model, of epoch 1: {tmp_path / 'model.unetq'}" in caplog.text


def test_what_is_packed_is_the_best_model(
    training: Callable[..., Any], network: Callable[..., Any], tmp_path: Path
) -> None:
    net = network()
    scripted = Scripted([0.5, 0.9, 0.4, 0.3], net)
    run = training(tmp_path, net, start_epoch=1, validation_handlers=[scripted])
    end = run.run()
    assert run.best.epoch == 2
    expected = network(seed=5)
    expected.load_state_dict(read(tmp_path / "model.pt"))
    expected.eval()
    packed = unpack(tmp_path / "model.unetq", FixedPointUNet(1, 1, width=2))
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(packed(image), expected(image))
        assert not torch.equal(packed(image), run.network.eval()(image))
    document = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert document == plan_of(expected).to_json() == plan_of(packed).to_json()
    assert same(dict(run.network.state_dict()), end)  # packing left the trained network as it was
    assert is_rounding(run.network)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_nothing_is_packed_before_a_quantized_validation(
    training: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training(tmp_path, start_epoch=2, stop_after=2).run()
    assert "no validation of the quantized network was completed, so there is no best model" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(("stopped", "own_checkpoint"), [(1, False), (2, False), (3, False), (3, True)])
def test_a_resumed_training_ends_as_the_undisturbed_one(
    stopped: int,
    own_checkpoint: bool,
    training: Callable[..., Any],
    network: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    """Interrupted in the float phase, at its end (the next epoch calibrates), and in the quantized phase."""
    undisturbed = training(tmp_path / "undisturbed")
    expected = undisturbed.run()

    training(tmp_path / "run", stop_after=stopped, own_checkpoint=own_checkpoint).run()
    name = "checkpoint.pt" if own_checkpoint else f"checkpoints/checkpoint_epoch={stopped}.pt"
    checkpoint = tmp_path / "run" / name
    other = network(seed=99)
    torch.manual_seed(98)
    resumed = training(tmp_path / "resumed", other, resume=checkpoint, own_checkpoint=own_checkpoint)
    assert same(resumed.run(), expected)
    assert (resumed.best.score, resumed.best.epoch) == (undisturbed.best.score, undisturbed.best.epoch)
    for name in ("model.pt", "model.unetq", "plan.json"):
        found, wanted = (tmp_path / run / name for run in ("resumed", "undisturbed"))
        if name == "model.pt":
            assert same(read(found), read(wanted))
        else:
            assert found.read_bytes() == wanted.read_bytes()


def test_a_best_model_from_before_the_interruption_comes_back(
    training: Callable[..., Any], network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    net = network()
    scripted = Scripted([0.9, 0.2, 0.1], net)
    training(tmp_path / "run", net, 3, 0, stop_after=1, validation_handlers=[scripted]).run()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint_epoch=1.pt"
    other = network(seed=99)
    later = Scripted([0.9, 0.2, 0.1], other)
    resumed = training(tmp_path / "other", other, 3, 0, resume=checkpoint, validation_handlers=[later])
    resumed.run()
    assert resumed.best.epoch == 1
    assert same(read(tmp_path / "other" / "model.pt"), scripted.states[0])


def test_a_finished_training_that_is_resumed_packs_again(
    training: Callable[..., Any], network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    training(tmp_path / "run", start_epoch=1, epochs=2).run()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint_epoch=2.pt"
    training(tmp_path / "again", network(seed=99), start_epoch=1, epochs=2, resume=checkpoint).run()
    first, second = (tmp_path / name / "model.unetq" for name in ("run", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_failed_write_keeps_the_old_model(
    network: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network()
    best = BestModel(net, tmp_path / "out")
    state = {"score": 0.5, "epoch": 1, "weights": net.state_dict()}
    best.load_state_dict(state)
    before = (tmp_path / "out" / "model.pt").read_bytes()

    def fail(value: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        best.load_state_dict(state)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.pt"]
    assert (tmp_path / "out" / "model.pt").read_bytes() == before


def test_a_foreign_state_is_refused(network: Callable[..., nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \['epoch', 'weights'\]"):
        BestModel(network(), tmp_path).load_state_dict({"score": 1.0})


def test_later_changes_of_the_network_do_not_reach_the_kept_weights(
    network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    net = network()
    engine: Any = Engine(lambda *_: None)
    engine.state.epoch, engine.state.key_metric_name, engine.state.metrics = 1, "dice", {"dice": 0.5}
    best = BestModel(net, tmp_path)
    best(engine)
    kept = {key: value.clone() for key, value in best.state_dict()["weights"].items()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert same(best.state_dict()["weights"], kept)


def test_packing_switches_its_own_copys_quantizers_on(
    network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    net = network()
    best = BestModel(net, tmp_path)
    best.load_state_dict({"score": 0.5, "epoch": 1, "weights": net.state_dict()})
    set_quantizers(net, False)
    Pack(best)(Engine(lambda *_: None))
    assert (tmp_path / "model.unetq").exists()
    assert not is_rounding(net)


CONFIG = """
{
  "imports": ["$import torch"],
  "network": {"_target_": "monai_unetq.networks.QuantizedNetwork", "weights": "int4", "activations": "int6",
    "network": {"_target_": "monai_unetq.networks.FixedPointUNet", "in_channels": 1, "out_channels": 1, "width": 2}},
  "data": "$[{'image': torch.rand(1, 16, 16), 'label': torch.ones(1, 16, 16)} for _ in range(2)]",
  "loader": {"_target_": "DataLoader", "dataset": {"_target_": "Dataset", "data": "@data"}, "batch_size": 1},
  "best": {"_target_": "monai_unetq.training.handlers.BestModel", "network": "@network", "output_dir": "@output_dir",
    "start_epoch": 1},
  "validate": {
    "handlers": ["@best"],
    "evaluator": {"_target_": "SupervisedEvaluator", "device": "cpu", "val_data_loader": "@loader",
      "network": "@network", "val_handlers": "@validate#handlers", "postprocessing": {
        "_target_": "AsDiscreted", "keys": "pred", "threshold": 0.0},
      "key_val_metric": {"val_mean_dice": {"_target_": "MeanDice",
        "output_transform": "$monai.handlers.from_engine(['pred', 'label'])"}}}},
  "train": {
    "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()"},
    "handlers": [
      {"_target_": "monai_unetq.training.handlers.EpochSeed", "seed": 0, "loader": "@loader"},
      {"_target_": "monai_unetq.training.handlers.Calibration", "network": "@network", "batches": "@loader",
        "epochs": 2, "start_epoch": 1},
      {"_target_": "monai_unetq.training.handlers.PlanLog", "network": "@network"},
      {"_target_": "monai_unetq.training.handlers.QuantizationStats", "network": "@network", "start_epoch": 1},
      {"_target_": "ValidationHandler", "interval": 1, "validator": "@validate#evaluator"},
      {"_target_": "monai_unetq.training.handlers.Pack", "best": "@best"}],
    "trainer": {"_target_": "SupervisedTrainer", "device": "cpu", "max_epochs": 2, "train_data_loader": "@loader",
      "network": "@network", "optimizer": "@train#optimizer", "train_handlers": "@train#handlers",
      "loss_function": {"_target_": "monai_unetq.training.soft_dice_loss"}}}
}
"""


def test_all_handlers_stand_in_a_configuration(tmp_path: Path) -> None:
    parser = ConfigParser(json.loads(CONFIG))
    parser["output_dir"] = str(tmp_path)
    trainer = parser.get_parsed_content("train#trainer")
    trainer.run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "model.unetq", "plan.json"]
    assert trainer.state.metrics["mean_weight_bits"] == 4
    assert Calibration is type(parser.get_parsed_content("train#handlers#1"))
