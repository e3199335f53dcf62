"""``SupervisionDecay``: how much the heads on the skip connections count, from step to step."""

from __future__ import annotations

from ignite.engine import Engine, Events

from ..supervision import SkipSupervisionLoss, supervision_weight

__all__ = ["SupervisionDecay"]


class SupervisionDecay:
    """Lets the weight of the supervision heads fall to zero over the quantized part of a training.

    λ of a step is the loss's own at the beginning times half a cosine from 1 to 0 (``supervision_weight``), so that the
    last steps train what is left when the heads are gone. There is no state: λ follows from the step. Attach it to
    the trainer; where it stands does not matter.

    Args:
        loss: the trainer's loss.
        epochs: length of the whole training.
        start_epoch: epochs in float, less than ``epochs``, in which λ is the loss's own.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(self, loss: SkipSupervisionLoss, epochs: int, start_epoch: int = 0) -> None:
        if not 0 <= start_epoch < epochs:
            raise ValueError(
                f"SupervisionDecay: start_epoch is {start_epoch} of {epochs} epochs, expected less, and at least 0"
            )
        self.loss = loss
        self.weight = loss.weight
        self.epochs = epochs
        self.start_epoch = start_epoch

    def attach(self, engine: Engine) -> None:
        """Set λ from now on before every step of the engine, a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)
        engine.add_event_handler(Events.COMPLETED, self._restore)

    def __call__(self, engine: Engine) -> None:
        """Set λ for the step that has just begun."""
        steps = engine.state.epoch_length or 1
        done = engine.state.iteration - 1 - self.start_epoch * steps
        self.loss.weight = self.weight * supervision_weight(done / ((self.epochs - self.start_epoch) * steps))

    def _restore(self, engine: Engine) -> None:
        self.loss.weight = self.weight
