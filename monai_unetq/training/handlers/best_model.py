"""The best model of a training, chosen by quantized validation; packed at the training's end."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from ...deploy import pack
from ...surgery import inference_state, plan_of, quantized_layers, set_quantizers, strip
from .processes import rank, unwrapped
from .quantization import is_rounding

__all__ = ["BestModel", "Pack"]


class BestModel:
    """Keeps the weights with the best validation, and writes them as ``model.pt``.

    The score is the evaluator's key metric, compared with its ``metric_cmp_fn`` (greater is better by default). With
    ``last``, scores are not compared: every validation replaces the one before, so the last epoch's network is left.
    Validations of a quantized network count only while its quantizers are on, so the best is the best
    *quantized* model, however good the float phase was. Every improvement is written by process 0, atomically,
    as the state dict of the network without any wrapper and without supervision heads; it loads with
    ``weights_only=True``.

    Attach it to the evaluator that a ``ValidationHandler`` runs. To resume, put it into the ``save_dict`` of a
    ``CheckpointSaver`` and the ``load_dict`` of a ``CheckpointLoader``. Its state holds the best weights, so a
    training that goes on in another folder, or from an older checkpoint, ends with its own best model. List the
    ``ValidationHandler`` before the ``CheckpointSaver``.

    Args:
        network: what is trained and validated.
        output_dir: folder for ``model.pt``; made when something is written.
        start_epoch: epochs in float, whose validations do not count for a quantized network.
        last: keep the last network that was validated instead of the best.
    """

    def __init__(
        self, network: nn.Module, output_dir: str | Path, start_epoch: int = 0, last: bool = False
    ) -> None:
        self.network = network
        self.output_dir = Path(output_dir)
        self.start_epoch = start_epoch
        self.last = last
        self.score: float | None = None
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        """Compare from now on after every run of the engine, an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Keep the network if the validation that has just been completed is the best.

        Raises:
            ValueError: if the evaluator has no key metric, or it is no single number.
        """
        network = unwrapped(self.network)
        epoch = engine.state.epoch  # the trainer's, see monai.handlers.ValidationHandler
        if quantized_layers(network) and not (epoch > self.start_epoch and is_rounding(network)):
            return
        name = engine.state.key_metric_name
        if name is None:
            raise ValueError(
                "BestModel: the evaluator has no key metric to compare; give it a key_val_metric"
            )
        score = _number(name, engine.state.metrics[name])
        if not math.isfinite(score):
            engine.logger.warning(f"epoch {epoch}: {name} is {score}, which is not compared")
        elif self.last or self.score is None or engine.metric_cmp_fn(score, self.score):
            self.keep(score, epoch)
            engine.logger.info(
                f"{'last' if self.last else 'best'}: {name} {score:.4f} in epoch {epoch}, {self.output_dir / 'model.pt'}"
            )

    def keep(self, score: float, epoch: int) -> None:
        """Take the network as it is now for the best one."""
        self.score, self.epoch = score, epoch
        state = inference_state(unwrapped(self.network))
        self.weights = {key: value.detach().cpu().clone() for key, value in state.items()}
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """Best score and its epoch, and the weights; tensors and numbers only."""
        return {"score": self.score, "epoch": self.epoch, "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint; its best weights are written as ``model.pt`` again.

        Raises:
            ValueError: if the state is none of ``state_dict``.
        """
        missing = [key for key in ("score", "epoch", "weights") if key not in state]
        if missing:
            raise ValueError(
                f"BestModel: the checkpoint's state has no {missing}, expected what state_dict gives"
            )
        self.score, self.epoch = state["score"], state["epoch"]
        self.weights = {key: value.cpu().clone() for key, value in state["weights"].items()}
        if self.score is not None:
            self._write()

    def _write(self) -> None:
        if rank():
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / "model.pt"
        for packed in ("model.unetq", "plan.json"):  # of the model that is replaced
            (self.output_dir / packed).unlink(missing_ok=True)
        scratch = path.with_name(path.name + ".part")
        try:
            torch.save(self.weights, scratch)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


class Pack:
    """Packs the best model at the training's end: ``model.unetq`` and ``plan.json`` beside its ``model.pt``.

    Attach it to the trainer. A network without quantizers is left alone; where no quantized validation has been
    completed there is nothing to pack, and the log says so. The trained network is not changed.

    Args:
        best: attached to the evaluator.
    """

    def __init__(self, best: BestModel) -> None:
        self.best = best

    def attach(self, engine: Engine) -> None:
        """Pack when the engine, a trainer, is done."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Pack the best model so far."""
        network = unwrapped(self.best.network)
        if rank():
            return
        if self.best.score is None:
            kind = "quantized network" if quantized_layers(network) else "network"
            engine.logger.warning(
                f"no validation of the {kind} was completed, so there is no best model: validate more often"
            )
            return
        if not quantized_layers(network):
            return
        best = strip(copy.deepcopy(network)).cpu()
        best.load_state_dict(self.best.weights)
        path = pack(set_quantizers(best, True).eval(), self.best.output_dir / "model.unetq")
        plan_of(best).save(self.best.output_dir / "plan.json")
        kind = "last" if self.best.last else "best"
        engine.logger.info(f"packed the {kind} model, of epoch {self.best.epoch}: {path}")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"BestModel: the key metric '{name}' is {value!r}, expected one number; choose a reduction such as 'mean'"
        ) from None
