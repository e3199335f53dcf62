"""Calibration inside a training, the plan's log, and the statistics, against numbers by hand."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler, TensorBoardStatsHandler
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from monai_unetq.formats import QFormat
from monai_unetq.layers import PairedNorm, quantize_layer
from monai_unetq.networks import FixedPointUNet
from monai_unetq.parts import WHOLE
from monai_unetq.plan import LayerPlan, QuantPlan
from monai_unetq.surgery import dequantize, plan_of, quantize, quantized_layers, set_quantizers
from monai_unetq.training import (
    Calibration,
    PlanLog,
    QuantizationStats,
    calibrate,
    settle_norms,
)
from monai_unetq.training.handlers import CalibrationEvents
from monai_unetq.training.handlers import quantization as module
from monai_unetq.training.handlers.quantization import is_rounding, weight_statistics
from tests.processes import run_two

BATCHES = list(torch.rand(2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(5)))


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def engine_at(
    epoch: int, max_epochs: int, *handlers: Any, step: Callable[..., Any] = lambda *_: None
) -> Engine:
    """An engine that has done ``epoch`` epochs."""
    engine = Engine(step)
    engine.load_state_dict({"epoch": epoch, "max_epochs": max_epochs, "epoch_length": 1})
    for handler in handlers:
        handler.attach(engine)
    return engine


@pytest.mark.parametrize(("start", "begin"), [(0, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_quantizers_go_on_after_the_float_phase_and_are_calibrated_once(
    start: int, begin: int, network: Callable[..., nn.Module]
) -> None:
    net = network()
    calibration = Calibration(net, BATCHES, epochs=4, start_epoch=start)
    rounding, calibrated, at_start = [], [], []

    engine = engine_at(begin, 4, calibration, step=lambda *_: rounding.append(is_rounding(net)))
    engine.add_event_handler(CalibrationEvents.CALIBRATED, lambda e: calibrated.append(e.state.epoch))
    engine.add_event_handler(Events.STARTED, lambda: at_start.append(is_rounding(net)))
    engine.run([0], max_epochs=4)
    assert rounding == [epoch > start for epoch in range(begin + 1, 5)]
    assert calibrated == ([start + 1] if begin <= start else [])
    assert at_start == [begin >= start]


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_it_does_what_calibrate_and_settle_norms_do(method: Any, network: Callable[..., nn.Module]) -> None:
    net = network()
    expected = calibrate(copy.deepcopy(net), BATCHES, method)
    scales_only = state_of(expected)
    settle_norms(expected, BATCHES, method)
    engine_at(0, 1, Calibration(net, BATCHES, 1, method=method)).run([0], max_epochs=1)
    assert same(state_of(net), state_of(expected))
    assert not same(state_of(net), scales_only)


def test_the_float_phase_computes_in_float(network: Callable[..., nn.Module]) -> None:
    net = network()
    differences = []

    def step(*_: Any) -> None:
        plain = dequantize(copy.deepcopy(net))
        with torch.no_grad():
            differences.append(float((net.eval()(BATCHES[0]) - plain.eval()(BATCHES[0])).abs().max()))

    engine_at(0, 3, Calibration(net, BATCHES, 3, 2), step=step).run([0], max_epochs=3)
    assert max(differences[:2]) < 1e-5
    assert differences[2] > 1e-3


@pytest.mark.parametrize(
    ("start", "share", "frozen"),
    [
        (0, 0.5, [False, False, True, True]),
        (0, 1.0, [False] * 4),
        (2, 0.5, [False, False, False, True]),
        (2, 0.0, [False, False, True, True]),
    ],
)
def test_norms_stand_still_in_the_last_part_of_the_quantized_epochs(
    start: int, share: float, frozen: list[bool], network: Callable[..., nn.Module]
) -> None:
    net = network()
    norms = [m for m in net.modules() if isinstance(m, PairedNorm)]
    seen = []
    calibration = Calibration(net, BATCHES, 4, start, freeze_norms_at=share)
    engine_at(0, 4, calibration, step=lambda *_: seen.append({m.frozen for m in norms})).run(
        [0], max_epochs=4
    )
    assert seen == [{value} for value in frozen]
    # The statistics of the calibration batches reached the norms in any case.
    assert all(norm.num_batches_tracked == len(BATCHES) for norm in norms)


@pytest.mark.parametrize("first", [True, False])
def test_the_trainings_random_numbers_are_those_without_calibration(
    first: bool, loader: Callable[..., Any], network: Callable[..., nn.Module]
) -> None:
    from monai_unetq.training import EpochSeed

    def drawn(calibrated: bool) -> list[Tensor]:
        seen: list[Tensor] = []
        data = loader()
        handlers: list[Any] = [EpochSeed(3, data)]
        if calibrated:
            handlers.insert(0 if first else 1, Calibration(network(), data, 2, 1))
        engine = Engine(lambda e, batch: seen.append(batch["image"].as_tensor() + torch.rand(())))
        for handler in handlers:
            handler.attach(engine)
        engine.run(data, max_epochs=2)
        return seen

    assert all(torch.equal(a, b) for a, b in zip(drawn(False), drawn(True), strict=True))


def test_calibration_from_random_crops_does_not_depend_on_what_came_before(
    loader: Callable[..., Any], network: Callable[..., nn.Module]
) -> None:
    found = []
    for seed in (1, 2):
        net, data = network(), loader()
        torch.manual_seed(seed)
        data.dataset.transform.set_random_state(seed)
        engine_at(0, 1, Calibration(net, data, 1)).run([0], max_epochs=1)
        found.append(state_of(net))
    assert same(*found)


@pytest.mark.parametrize("begin", [0, 2])
def test_a_float_network_is_left_alone(
    begin: int, network: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    net = network(quantized=False)
    before = state_of(net)
    handlers = Calibration(net, BATCHES, 4, 1), PlanLog(net, tmp_path / "plan.json"), QuantizationStats(net)
    engine = engine_at(begin, 4, *handlers)
    engine.logger.setLevel(logging.INFO)
    engine.run([0], max_epochs=4)
    assert same(state_of(net), before)
    assert engine.state.metrics == {}
    assert "plan: FixedPointUNet is float" in caplog.text
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 4, "start_epoch": 4}, "start_epoch is 4, expected 0 to 3"),
        ({"epochs": 4, "start_epoch": -1}, "start_epoch is -1"),
        ({"epochs": 4, "freeze_norms_at": 1.5}, "freeze_norms_at is 1.5"),
        ({"epochs": 4, "method": "best"}, "method is 'best'"),
        ({"epochs": 4, "batches": iter(BATCHES)}, "batches is an iterator"),
    ],
)
def test_bad_arguments_are_refused(
    options: dict[str, Any], message: str, network: Callable[..., nn.Module]
) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration(**{"network": network(), "batches": BATCHES, **options})


class Wrapped(DataParallel):
    """Stands for ``DistributedDataParallel``, which needs a group of processes."""

    find_unused_parameters = False


@pytest.mark.parametrize(("learned", "start"), [(True, 1), (True, 0), (False, 1)])
def test_learned_scales_that_rest_need_a_wrapper_that_allows_it(learned: bool, start: int) -> None:
    net = FixedPointUNet(1, 1, width=2)
    quantize(net, QuantPlan.uniform(net, "int4", "int6", learned=learned))
    wrapped = Wrapped(net)
    engine = engine_at(0, 2, Calibration(wrapped, BATCHES, 2, start))
    if learned and start:
        with pytest.raises(ValueError, match="wrap the network with find_unused_parameters=True"):
            engine.run([0], max_epochs=2)
        wrapped.find_unused_parameters = True
    engine.run([0], max_epochs=2)


def test_wrapped_networks_are_reached(network: Callable[..., nn.Module]) -> None:
    net = network()
    wrapped = DataParallel(net, device_ids=None)
    engine = engine_at(0, 2, Calibration(wrapped, BATCHES, 2, 1), QuantizationStats(wrapped))
    states = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: states.append(is_rounding(net)))
    engine.run([0], max_epochs=2)
    assert states == [False, True]
    assert "mean_weight_bits" in engine.state.metrics


def two_layers() -> nn.Sequential:
    """A Q0.2 convolution with weights by hand and 6-bit input, then a float one of as many weights."""
    quantized, plain = (nn.Conv2d(1, 1, (1, 4), bias=False) for _ in range(2))
    set_weight(quantized, 0.25, -0.5, 0.1, 0.3)
    quantize_layer(quantized, QFormat("Q0.2"), QFormat("UQ6.0"))
    return nn.Sequential(quantized, plain)


@torch.no_grad()
def set_weight(layer: nn.Conv2d, *values: float) -> None:
    layer.weight.copy_(torch.tensor(values).view(1, 1, 1, 4))


def test_statistics_by_hand() -> None:
    # Rounded: 0.25, -0.5, 0, 0.25. Signal 0.4125, noise 0.1² + 0.05² = 0.0125; three of the four codes -2…1.
    net = two_layers()
    engine = engine_at(0, 1, QuantizationStats(net))
    engine.run([0], max_epochs=1)
    assert engine.state.metrics == {
        "mean_weight_bits": (4 * 2 + 4 * 32) / 8,
        "mean_activation_bits": (6 + 32) / 2,
        "weight_sqnr_db/0": pytest.approx(10 * math.log10(33), abs=1e-4),
        "weight_codes_used/0": 0.75,
    }


def test_statistics_are_those_of_the_folded_weight() -> None:
    convolution, norm = nn.Conv2d(1, 1, (1, 4), bias=False), nn.BatchNorm2d(1, eps=0.0)
    set_weight(convolution, 0.5, -1.0, 0.2, 0.6)
    assert norm.running_var is not None
    norm.running_var.fill_(4.0)
    net = nn.Sequential(convolution, norm)
    quantize(
        net,
        QuantPlan({"0": LayerPlan({WHOLE: QFormat("Q0.2")}, {"input": QFormat("UQ6.0")})}),
        torch.ones(1, 1, 4, 4),
    )
    (layer,) = quantized_layers(net).values()
    assert layer.paired_norm is not None
    decibel, share = weight_statistics(layer)
    assert decibel == pytest.approx(10 * math.log10(33), abs=1e-4)
    assert share == 0.75


@pytest.mark.parametrize(
    ("value", "decibel"), [(0.0, 0.0), (0.25, 200.0), (1e-30, 0.0), (1e30, 0.0), (math.nan, -200.0)]
)
def test_statistics_of_extreme_weights(value: float, decibel: float) -> None:
    layer = quantized_layers(two_layers())["0"]
    set_weight(layer, *[value] * 4)
    found, share = weight_statistics(layer)
    assert found == pytest.approx(decibel, abs=1e-6)
    assert share == 0.25


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=4, max_size=4),
    st.sampled_from(["Q0.2", "int4", "UQ2.2", "Q2.4", "Q8.8"]),
)
def test_statistics_are_finite(weights: list[float], number_format: str) -> None:
    net = nn.Conv2d(1, 1, (1, 4), bias=False)
    layer = quantize_layer(net, QFormat(number_format), QFormat("UQ6.0"))
    set_weight(layer, *weights)
    decibel, share = weight_statistics(layer)
    assert -200 <= decibel <= 200
    assert 0 < share <= 1


def test_statistics_wait_for_the_quantized_phase(network: Callable[..., nn.Module]) -> None:
    net = network()
    engine = engine_at(0, 3, QuantizationStats(net, start_epoch=2))
    found = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: found.append(len(engine.state.metrics)))
    engine.run([0], max_epochs=3)
    assert found == [0, 0, 2 + 2 * len(quantized_layers(net))]
    set_quantizers(net, False)
    engine = engine_at(0, 1, QuantizationStats(net))
    engine.run([0], max_epochs=1)
    assert engine.state.metrics == {}


def test_names_that_trackers_refuse_are_replaced() -> None:
    net = nn.Module()
    net.blocks = nn.ModuleDict({"a (1)/b|ü": two_layers()})
    engine = engine_at(0, 1, QuantizationStats(net))
    engine.run([0], max_epochs=1)
    assert "weight_sqnr_db/blocks.a__1__b__.0" in engine.state.metrics
    single = two_layers()[0]
    engine = engine_at(0, 1, QuantizationStats(single))
    engine.run([0], max_epochs=1)
    assert engine.state.metrics["weight_codes_used/network"] == 0.75


def test_tensorboard_logs_the_statistics(network: Callable[..., nn.Module], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    net = network()
    stats, board = QuantizationStats(net), TensorBoardStatsHandler(log_dir=str(tmp_path), iteration_log=False)
    engine = engine_at(0, 2, stats, board)
    engine.run([0], max_epochs=2)
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(engine.state.metrics)
    for name, value in engine.state.metrics.items():
        assert [e.step for e in events.Scalars(name)] == [1, 2]
        assert events.Scalars(name)[-1].value == pytest.approx(value, rel=1e-5)


def test_mlflow_logs_the_statistics(
    network: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/runs.db"
    net = network()
    net.add_module("odd (name)|", two_layers())
    tracker = MLFlowHandler(tracking_uri=uri, iteration_log=False, close_on_complete=True)
    engine = engine_at(0, 2, QuantizationStats(net), tracker)
    engine.run([0], max_epochs=2)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name != "Default"])
    assert run.data.metrics == pytest.approx(engine.state.metrics)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "mean_weight_bits")] == [1, 2]


TABLE = """plan: 15 of 15 layers of FixedPointUNet are quantized
  layer                                   weight  input
  encoder.0.conv1                         int8    UQ0.8
  encoder.0.conv2 … decoder.2.conv2 (13)  Q0.4    UQ6.0
  last                                    int8    UQ6.0"""


def test_the_plan_is_logged_as_a_table_and_written(
    network: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    net = network(quantized=False)
    quantize(net, QuantPlan.uniform(net, "Q0.4", "Q6.0", input="UQ0.8", first="int8", last="int8"))
    path = tmp_path / "run" / "plan.json"
    log = PlanLog(net, path)
    calibration = Calibration(net, BATCHES, 2, 1)
    engine = engine_at(0, 2, log, calibration)
    engine.logger.setLevel(logging.INFO)
    engine.run([0], max_epochs=2)
    plans = [m for m in caplog.messages if m.startswith("plan:")]
    assert len(plans) == 2
    assert plans[0] == TABLE
    first = quantized_layers(net)["encoder.0.conv1"].weight_quantizer.log2_scale
    low, high = int(first.min()), int(first.max())
    assert f"int8 × 2^{low}…2^{high}" in plans[1] or f"int8 × 2^{low}  " in plans[1]
    assert "UQ6.0 ×" not in plans[1]
    assert json.loads(path.read_text(encoding="utf-8")) == plan_of(net).to_json()
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_only_the_first_process_logs_and_writes(
    network: Callable[..., nn.Module],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "rank", lambda: 1)
    engine = engine_at(0, 1, PlanLog(network(), tmp_path / "plan.json"))
    engine.logger.setLevel(logging.INFO)
    engine.run([0], max_epochs=1)
    assert "plan:" not in caplog.text
    assert list(tmp_path.iterdir()) == []


PROCESS = """
import sys
from pathlib import Path
import torch
from ignite.engine import Engine, Events
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from monai_unetq.networks import FixedPointUNet
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import quantize
from monai_unetq.training import BestModel, Calibration, EpochSeed, Pack, PlanLog, QuantizationStats

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
torch.manual_seed(0)
net = FixedPointUNet(1, 1, width=2)
quantize(net, QuantPlan.uniform(net, "int4", "int6", input="UQ0.8"))
wrapped = DistributedDataParallel(net)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
# Other batches in each process, against the rule: equal scales can then only come from process 0.
batches = list(torch.rand(2, 1, 1, 16, 16, generator=torch.Generator().manual_seed(rank)) * (rank + 1))
numbers, calibrated = [], {}

def step(engine, batch):
    if engine.state.epoch == 2:
        calibrated.update({k: v.clone() for k, v in net.state_dict().items()})
    numbers.append(float(torch.rand(())))
    wrapped.train()
    optimizer.zero_grad()
    wrapped(torch.rand(1, 1, 16, 16)).square().mean().backward()
    optimizer.step()

best = BestModel(wrapped, folder / "out", 1)
validator = Engine(lambda engine, batch: None)
validator.metric_cmp_fn = lambda new, old: new > old
validator.state.key_metric_name = "dice"
best.attach(validator)
trainer = Engine(step)
stats = QuantizationStats(wrapped, 1)
for handler in (EpochSeed(3, [0]), Calibration(wrapped, batches, 2, 1), PlanLog(wrapped), stats, Pack(best)):
    handler.attach(trainer)

def validate(engine):
    validator.state.metrics = {"dice": 0.5}
    validator.state.epoch = engine.state.epoch
    best(validator)

trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
trainer.run([0], max_epochs=2)
result = {"numbers": torch.tensor(numbers), "bits": torch.tensor(trainer.state.metrics["mean_weight_bits"])}
state = {"end." + k: v for k, v in net.state_dict().items() if "running" not in k and "tracked" not in k}
torch.save({**result, **calibrated, **state}, folder / f"{rank}.pt")
torch.save(best.weights, folder / f"best{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_end_with_one_network(tmp_path: Path) -> None:
    first, second = run_two(PROCESS, tmp_path)
    numbers = [state.pop("numbers") for state in (first, second)]
    assert not torch.equal(*numbers)
    assert same(first, second)
    written = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert same(written, torch.load(tmp_path / "best0.pt", weights_only=True))
    assert not any(key.startswith("module.") for key in written)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.pt", "model.unetq", "plan.json"]


def test_unquantized_layers_do_not_count_as_rounding(network: Callable[..., nn.Module]) -> None:
    assert not is_rounding(network(quantized=False))
    net = network()
    assert is_rounding(net)
    quantized_layers(net)["last"].input_quantizer.enabled = False
    assert not is_rounding(net)
