"""Learning rate schedules: multipliers by epoch, for torch's ``LambdaLR``.

All of them can be pickled, and add nothing to a scheduler's state that would not load with ``weights_only``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

__all__ = ["cosine", "restart", "step_decay"]

Multiplier = Callable[[int], float]
"""Epoch, from 0 → what the learning rate is multiplied with."""


def step_decay(epochs: int, factor: float = 0.1, parts: int = 5) -> Multiplier:
    """The schedule cut into equal parts; each one's learning rate is ``factor`` times that of the part before.

    AskariHemmat et al. (2019) train EM so, with a tenth after every fifth.

    Args:
        epochs: length of the schedule; after it the last part's multiplier stays.
        factor: from one part to the next.
        parts: number of parts.

    Raises:
        ValueError: if ``epochs`` or ``parts`` is not positive.
    """
    _check_positive("step_decay", epochs=epochs, parts=parts)
    return partial(_step_decay, epochs=epochs, factor=factor, parts=parts)


def cosine(epochs: int) -> Multiplier:
    """Half a cosine from 1 to 0, which it reaches after the last epoch (Loshchilov and Hutter, ICLR 2017).

    Args:
        epochs: length of the schedule; after it the multiplier stays 0.

    Raises:
        ValueError: if ``epochs`` is not positive.
    """
    _check_positive("cosine", epochs=epochs)
    return partial(_cosine, epochs=epochs)


def restart(schedule: Callable[[int], Multiplier], float_epochs: int, epochs: int) -> Multiplier:
    """A schedule over the float phase of a training, and the same one again over its quantized rest.

    Args:
        schedule: length in epochs → schedule, such as ``cosine``.
        float_epochs: epochs of the float phase; 0 where there is none.
        epochs: epochs of both phases together.

    Raises:
        ValueError: unless 0 <= ``float_epochs`` <= ``epochs`` and ``epochs`` is positive.
    """
    _check_positive("restart", epochs=epochs)
    if not 0 <= float_epochs <= epochs:
        raise ValueError(
            f"restart: float_epochs is {float_epochs}, expected 0 to {epochs}, the epochs in all"
        )
    if float_epochs in (0, epochs):
        return schedule(epochs)
    first, second = schedule(float_epochs), schedule(epochs - float_epochs)
    return partial(_restart, first=first, second=second, float_epochs=float_epochs)


# Module-level functions in ``partial``: a lambda cannot be pickled, and an object's attributes would be put into
# the scheduler's state.
def _step_decay(epoch: int, epochs: int, factor: float, parts: int) -> float:
    return factor ** min(epoch * parts // epochs, parts - 1)


def _cosine(epoch: int, epochs: int) -> float:
    return (1 + math.cos(math.pi * min(epoch, epochs) / epochs)) / 2


def _restart(epoch: int, first: Multiplier, second: Multiplier, float_epochs: int) -> float:
    return first(epoch) if epoch < float_epochs else second(epoch - float_epochs)


def _check_positive(schedule: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{schedule}: {name} is {value}, expected 1 or more")
