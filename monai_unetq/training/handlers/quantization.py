"""Handlers of quantization itself: when it begins and is calibrated, what the plan is, what rounding costs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import torch
from ignite.engine import Engine, EventEnum, Events
from torch import nn

from ...layers import QUANTIZED_LAYERS, QuantizedLayer
from ...parts import WHOLE
from ...quantizers import Quantizer, RangeMethod
from ...surgery import calibrate, plan_of, quantized_layers, set_quantizers, settle_norms
from ..norms import freeze_norms
from .processes import broadcast_state, rank, unwrapped
from .seeding import isolated_randomness

__all__ = [
    "Calibration",
    "CalibrationEvents",
    "PlanLog",
    "QuantizationStats",
    "is_rounding",
    "weight_statistics",
]

_LIMIT_DB = 200.0
_CALIBRATION_SEED = 0


class CalibrationEvents(EventEnum):
    """What ``Calibration`` fires at its trainer; ``CALIBRATED``: the quantizers are on and fitted."""

    CALIBRATED = "calibrated"


class Calibration:
    """Trains a quantized network in float first, then calibrates it and goes on quantized, in one training.

    The network is quantized from the beginning, so its structure, its state and the optimizer's never change; its
    quantizers are off until ``start_epoch`` epochs are done. Then they are switched on, ``calibrate`` and
    ``settle_norms`` fit the network, and in the last epochs its paired batch norms keep their statistics.
    The optimizer's moments of the float phase stay. A training that is resumed after that point is not
    calibrated again. A network without quantizers is left alone.

    Attach it to the trainer, listed after a ``CheckpointLoader``. Calibration changes none of the training's
    random numbers. Under ``DistributedDataParallel`` each process calibrates, on the same batches; all end with
    the state of process 0.

    Args:
        network: what is trained.
        batches: of *training* data; a data loader or a list, see ``calibrate``. It is gone through twice.
        epochs: length of the whole training.
        start_epoch: epochs in float, less than ``epochs``; 0 calibrates before the first.
        method: see ``calibrate``.
        freeze_norms_at: share of the quantized epochs after which the paired batch norms' statistics stand
            still; 0 for from the first one on, 1 for never.

    Raises:
        ValueError: for an argument out of its range, or batches that can be gone through only once.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Iterable[Any],
        epochs: int,
        start_epoch: int = 0,
        method: RangeMethod = "mse",
        freeze_norms_at: float = 0.7,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"Calibration: epochs is {epochs}, expected 1 or more")
        if not 0 <= start_epoch < epochs:
            raise ValueError(
                f"Calibration: start_epoch is {start_epoch}, expected 0 to {epochs - 1}: quantized training needs "
                f"at least the last of {epochs} epochs"
            )
        if not 0 <= freeze_norms_at <= 1:
            raise ValueError(f"Calibration: freeze_norms_at is {freeze_norms_at}, expected a share in [0, 1]")
        if method not in get_args(RangeMethod):
            raise ValueError(f"Calibration: method is {method!r}, expected one of {get_args(RangeMethod)}")
        if isinstance(batches, Iterator):
            raise ValueError("Calibration: batches is an iterator, which is empty after one pass; give a list or a loader")  # fmt: skip
        self.network = network
        self.batches = batches
        self.epochs = epochs
        self.start_epoch = start_epoch
        self.method: RangeMethod = method
        self.freeze_norms_at = freeze_norms_at

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint: when rounding begins, which a training that is resumed has to keep."""
        return {"start_epoch": self.start_epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """From a checkpoint.

        Raises:
            ValueError: if the checkpoint's training began to round at another epoch.
        """
        if state["start_epoch"] != self.start_epoch:
            raise ValueError(
                f"Calibration: the checkpoint's training begins to round after epoch {state['start_epoch']}, this one "
                f"after {self.start_epoch}; resume with the same float_epochs"
            )

    def attach(self, engine: Engine) -> None:
        """Act from now on at the engine's start and at the start of its epochs; the engine is a trainer."""
        engine.register_events(*CalibrationEvents)
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.EPOCH_STARTED, self.begin_epoch)

    def begin(self, engine: Engine) -> None:
        """Switch the quantizers as the engine's state asks: a checkpoint has been loaded by now.

        Raises:
            ValueError: if ``DistributedDataParallel`` would stop at learned scales that rest in the float phase.
        """
        network = unwrapped(self.network)
        rounds = engine.state.epoch >= self.start_epoch
        if (
            not rounds
            and _has_learned_scales(network)
            and not getattr(self.network, "find_unused_parameters", True)
        ):
            raise ValueError(
                "Calibration: learned scales are not used in the float phase, which DistributedDataParallel takes for "
                "an error; wrap the network with find_unused_parameters=True"
            )
        set_quantizers(network, rounds)
        self._freeze(network, engine.state.epoch)

    def begin_epoch(self, engine: Engine) -> None:
        """Switch the quantizers for the epoch that has just begun; calibrate if it is the first quantized one."""
        network = unwrapped(self.network)
        if not quantized_layers(network):
            return
        epoch = engine.state.epoch
        set_quantizers(network, epoch > self.start_epoch)
        if epoch == self.start_epoch + 1:
            with isolated_randomness(_CALIBRATION_SEED, self.batches):
                settle_norms(calibrate(network, self.batches, self.method), self.batches, self.method)
            broadcast_state(network)
            engine.logger.info(f"quantized training begins with epoch {epoch}: calibrated ({self.method})")
            engine.fire_event(CalibrationEvents.CALIBRATED)
        self._freeze(network, epoch)

    def _freeze(self, network: nn.Module, epoch: int) -> None:
        freeze_norms(network, epoch, self.epochs, self.freeze_norms_at, self.start_epoch)


class PlanLog:
    """Logs a network's plan as a table when the training starts and when the network has been calibrated.

    Consecutive layers with the same formats share a row. After calibration the scales that were found stand beside
    the formats that left them open. Process 0 logs, through the engine's logger.

    Attach it to the trainer, listed after a ``CheckpointLoader``, which may bring other formats.

    Args:
        network: what is trained; float networks are reported as such.
        path: file that the plan is written to as JSON, atomically; its folder is made. None writes none.
    """

    def __init__(self, network: nn.Module, path: str | Path | None = None) -> None:
        self.network = network
        self.path = None if path is None else Path(path)

    def attach(self, engine: Engine) -> None:
        """Log from now on at the engine's start and after calibration; the engine is a trainer."""
        engine.register_events(*CalibrationEvents)
        engine.add_event_handler(Events.STARTED, self, scales=False)
        engine.add_event_handler(CalibrationEvents.CALIBRATED, self, scales=True)

    def __call__(self, engine: Engine, scales: bool) -> None:
        """Log the plan, with the scales as they are now or without; write the file."""
        if rank():
            return
        network = unwrapped(self.network)
        layers = quantized_layers(network)
        if not layers:
            engine.logger.info(f"plan: {type(network).__name__} is float")
            return
        head = (
            f"plan: {len(layers)} of {len(_layers(network))} layers of {type(network).__name__} are quantized"
        )
        engine.logger.info("\n".join([head, *_table(layers, scales)]))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            plan_of(network).save(self.path)


class QuantizationStats:
    """Puts bit widths and rounding errors into the trainer's metrics after each quantized epoch.

    MONAI's ``TensorBoardStatsHandler`` and ``MLFlowHandler`` log what stands there, so list this handler before
    them, and after a ``StatsHandler``, which would print it all. The metrics, all finite numbers:

    - ``mean_weight_bits``: over all weights of convolutions and linear layers, float ones with 32 bits;
    - ``mean_activation_bits``: over the inputs of these layers, each layer counting once;
    - ``weight_sqnr_db/<layer>``: power of the weight over the power of its rounding error, in decibel, at most
      200 (no error), 0 for a weight that is all zero. The weight is the folded one that the quantizer sees;
    - ``weight_codes_used/<layer>``: share of the format's codes that occur in the weight, in [0, 1].

    Characters of layer names that trackers refuse become ``_``. Nothing is added for a network without quantizers,
    or while they are off. Attach it to the trainer.

    Args:
        network: what is trained.
        start_epoch: epochs in float, which are not measured.
    """

    def __init__(self, network: nn.Module, start_epoch: int = 0) -> None:
        self.network = network
        self.start_epoch = start_epoch

    def attach(self, engine: Engine) -> None:
        """Measure from now on after every epoch of the engine, a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Measure the network as it is now."""
        network = unwrapped(self.network)
        if engine.state.epoch > self.start_epoch and is_rounding(network):
            engine.state.metrics.update(_statistics(network))


def is_rounding(network: nn.Module) -> bool:
    """Whether the network has quantizers and all of them are on."""
    layers = quantized_layers(network).values()
    return bool(layers) and all(quantizer.enabled for layer in layers for quantizer in layer.quantizers)


def _has_learned_scales(network: nn.Module) -> bool:
    layers = quantized_layers(network).values()
    return any(quantizer.learned for layer in layers for quantizer in layer.quantizers)


@torch.no_grad()
def weight_statistics(layer: QuantizedLayer) -> tuple[float, float]:
    """Signal to rounding noise of a layer's weight as its quantizers see it, in decibel, and share of codes used.

    Args:
        layer: with weight formats that round, its quantizers on.

    Returns:
        decibels in [-200, 200], share in [0, 1], of a split layer that of all its parts' codes.
    """
    signal = noise = 0.0
    used = levels = 0
    quantizers = layer.weight_quantizers
    for part, weight in layer.folded_weights().items():
        quantizer = quantizers[part]
        signal += float(weight.double().square().sum())
        noise += float((quantizer(weight).double() - weight.double()).square().sum())
        if not quantizer.number_format.is_float:
            used += torch.unique(quantizer.codes(weight)).numel()
            levels += quantizer.number_format.levels
    return _decibel(signal, noise), used / levels


def _decibel(signal: float, noise: float) -> float:
    if signal == noise == 0:
        return 0.0
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal == 0:
        return -_LIMIT_DB
    if noise == 0:
        return _LIMIT_DB
    return min(_LIMIT_DB, max(-_LIMIT_DB, 10 * (math.log10(signal) - math.log10(noise))))


def _statistics(network: nn.Module) -> dict[str, float]:
    layers = quantized_layers(network)
    weights = weight_bits = 0
    input_bits = 0.0
    for name, module in _layers(network).items():
        count = module.weight.numel()
        weights += count
        if name not in layers:
            weight_bits, input_bits = weight_bits + 32 * count, input_bits + 32
            continue
        layer = layers[name]
        quantizers, pieces = layer.weight_quantizers, layer.weight_pieces()
        weight_bits += sum(q.number_format.bits * pieces[part].numel() for part, q in quantizers.items())
        channels = layer.part_channels
        bits = sum(q.number_format.bits * channels[part] for part, q in layer.input_quantizers.items())
        input_bits += bits / sum(channels.values())
    found = {
        "mean_weight_bits": weight_bits / weights,
        "mean_activation_bits": input_bits / len(_layers(network)),
    }
    for name, layer in layers.items():
        if not all(quantizer.number_format.is_float for quantizer in layer.weight_quantizers.values()):
            label = re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "network"
            found[f"weight_sqnr_db/{label}"], found[f"weight_codes_used/{label}"] = weight_statistics(layer)
    return found


def _layers(network: nn.Module) -> dict[str, Any]:
    """Name → module for everything that is or could be quantized."""
    return {name: m for name, m in network.named_modules() if isinstance(m, tuple(QUANTIZED_LAYERS))}


def _table(layers: dict[str, QuantizedLayer], scales: bool) -> list[str]:
    """The lines of a table: layers, weight format, input format; consecutive equal rows as one, parts apart."""
    found = [
        (name if part == WHOLE else f"{name}[{part}]", weight, layer.input_quantizers[part])
        for name, layer in layers.items()
        for part, weight in layer.weight_quantizers.items()
    ]

    def formats(item: tuple[str, Quantizer, Quantizer]) -> tuple[str, str]:
        return str(item[1].number_format), str(item[2].number_format)

    rows = [("layer", "weight", "input")]
    for _, group in groupby(found, formats):
        names, weights, inputs = zip(*group, strict=True)
        title = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        rows.append((title, _cell(list(weights), scales), _cell(list(inputs), scales)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows]


def _cell(quantizers: list[Quantizer], scales: bool) -> str:
    """A format, with the range of the scales found where it leaves them open."""
    number_format = quantizers[0].number_format
    if not (scales and number_format.has_free_scale):
        return str(number_format)
    exponents = torch.cat([torch.log2(q.scale.detach()).reshape(-1) for q in quantizers])
    low, high = (f"2^{round(float(e), 1):g}" for e in (exponents.min(), exponents.max()))
    return f"{number_format} × {low}" if low == high else f"{number_format} × {low}…{high}"
