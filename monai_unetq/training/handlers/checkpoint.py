"""``Checkpoint``: what a MONAI trainer saves after every epoch so that an interrupted run goes on as if it had not been."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader
from torch import nn

from ...surgery import plan_of_state
from .processes import rank, unwrapped

__all__ = ["Checkpoint", "save_checkpoint"]


class Checkpoint:
    """Save after every epoch, and resume.

    The trainer's own state (epoch, step) is saved too. MONAI's ``CheckpointSaver`` cannot do that from a
    configuration: a trainer whose handlers name the trainer is a circular reference. List it first: it loads before
    the other handlers act at the start, and saves after they have acted at an epoch's end.

    Args:
        output_dir: folder of ``checkpoint.pt``, which is replaced after every epoch.
        objects: name → network, optimizer, scheduler, handler: anything with ``state_dict``.
        resume: load ``checkpoint.pt`` before training.
    """

    def __init__(self, output_dir: str | Path, objects: Mapping[str, Any], resume: bool = False) -> None:
        self.path = Path(output_dir) / "checkpoint.pt"
        self.objects = {name: unwrapped(thing) for name, thing in objects.items()}
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer.

        Raises:
            FileNotFoundError: if there is nothing to resume from.
            ValueError: if the checkpoint's network has other formats: they would silently replace those asked for.
        """
        objects = {**self.objects, "trainer": engine}
        if self.resume:
            if not self.path.is_file():
                raise FileNotFoundError(
                    f"{self.path}: no checkpoint to resume from; train without resume first"
                )
            self._check_formats()
            CheckpointLoader(str(self.path), objects, map_location="cpu").attach(engine)  # type: ignore[arg-type]
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self._save_from_now_on)

    def _check_formats(self) -> None:
        document = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, thing in self.objects.items():
            if isinstance(thing, nn.Module) and name in document:
                there, here = (plan_of_state(state) for state in (document[name], thing.state_dict()))
                if (there and there.layers) != (here and here.layers):
                    raise ValueError(
                        f"{self.path}: '{name}' was trained with other formats; resume with the same, or train anew"
                    )

    def _save_from_now_on(self, engine: Engine) -> None:
        # Attached when all other handlers are, to run after them: what they change at an epoch's end (learning
        # rate, best model) belongs in the epoch's checkpoint. Loading, though, has to come before them.
        if not engine.has_event_handler(self._save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _save(self, engine: Engine) -> None:
        save_checkpoint(self.path, {**self.objects, "trainer": engine})


def save_checkpoint(path: Path, objects: Mapping[str, Any], **facts: Any) -> None:
    """Write the state of several objects to one file, atomically; ``facts`` are stored beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    torch.save({**{name: thing.state_dict() for name, thing in objects.items()}, **facts}, scratch)
    os.replace(scratch, path)
