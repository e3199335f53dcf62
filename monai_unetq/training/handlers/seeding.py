"""``EpochSeed``: everything random in an epoch follows from the seed, the epoch's number and the process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd

from .processes import rank

__all__ = ["EpochSeed", "epoch_seed", "isolated_randomness", "seed_everything"]


class EpochSeed:
    """Seeds everything random at the start of every epoch, so that a resumed training is the undisturbed one.

    A training that goes on from a checkpoint of a finished epoch then draws the same random numbers as one that
    was never interrupted: bit for bit the same weights on a CPU, with the same number of workers.
    Seeded are Python's, numpy's and torch's global generators, the generators of the loader and its sampler, and
    the random transforms of the loader's data set. Workers take their seeds from torch's generator. Each epoch
    has an iterator of its own over the training data.

    Attach it to the trainer. Where it stands among the trainer's handlers does not matter.

    Args:
        seed: of the whole training.
        loader: what the trainer gets its batches from; where it is no ``DataLoader``, only the global
            generators are seeded.

    Raises:
        ValueError: if the loader keeps its workers from one epoch to the next, and with them their random states.
    """

    def __init__(self, seed: int, loader: object) -> None:
        if getattr(loader, "persistent_workers", False):
            raise ValueError(
                "EpochSeed: the loader has persistent_workers=True, whose random states depend on all epochs "
                "before; set persistent_workers to false, or a resumed training differs"
            )
        self.seed = seed
        self.loader = loader
        self._first = True

    def attach(self, engine: Engine) -> None:
        """Seed from now on at the start of every epoch of the engine, a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the epoch that has just begun."""
        seed_everything(epoch_seed(self.seed, engine.state.epoch, rank()), self.loader)
        # The engine makes the first epoch's iterator itself, after this event. It would take the later ones' from
        # the first iterator's rest, which can draw once more from the generators that have just been seeded.
        if not self._first and engine.state.dataloader is not None:
            engine.set_data(engine.state.dataloader)
        self._first = False

    def _start(self, engine: Engine) -> None:
        self._first = True


def epoch_seed(seed: int, epoch: int, process: int = 0) -> int:
    """The seed of one epoch (from 1) in one process, in [0, 2^63); different for neighbours of all three."""
    return (seed * 1_000_003 + epoch + process * 7_368_787) % (1 << 63)


def seed_everything(seed: int, loader: object) -> None:
    """Seed the global generators, and those of a loader, its sampler and its data set's transforms."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
    for generator in _generators(loader):
        generator.manual_seed(seed)
    set_rnd(getattr(loader, "dataset", None), seed)


@contextmanager
def isolated_randomness(seed: int, loader: object) -> Iterator[None]:
    """Seed everything for a while; afterwards every generator and transform goes on as if nothing had been drawn.

    Args:
        seed: what random numbers follow from inside.
        loader: its sampler's and its data set's random states are kept too.
    """
    generators = [(generator, generator.get_state()) for generator in _generators(loader)]
    transforms = [(t, t.R, t.R.get_state()) for t in _randomizables(getattr(loader, "dataset", None), set())]
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            seed_everything(seed, loader)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in generators:
                generator.set_state(state)
            for transform, random_state, state in transforms:  # seeding gave it another one
                transform.R = random_state
                random_state.set_state(state)


def _generators(loader: object) -> list[torch.Generator]:
    """The generators that a loader and its samplers own, each once."""
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None}
    return [generator for generator in found.values() if isinstance(generator, torch.Generator)]


def _randomizables(thing: Any, seen: set[int]) -> Iterator[Any]:
    """What has a random state of its own (``R``) in a data set and below it, as far as MONAI's seeding reaches."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, (tuple, list)):
        for item in thing:
            yield from _randomizables(item, seen)
    elif hasattr(thing, "__dict__"):
        if isinstance(getattr(thing, "R", None), np.random.RandomState):
            yield thing
        for value in list(vars(thing).values()):
            yield from _randomizables(value, seen)
