"""The training loop of float and quantized networks: MONAI's trainer, deterministic and resumable."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.metrics import DiceMetric
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandFlipd,
    RandRotate90d,
    RandShiftIntensityd,
    RandSpatialCropd,
    SpatialPadd,
)
from monai.utils import convert_to_tensor
from torch import nn
from torch.utils.data import RandomSampler
from tqdm import tqdm

from ..datasets import Case
from .handlers import EpochSeed, IncrementalFreezing, TernaryAnnealing
from .handlers.checkpoint import save_checkpoint
from .losses import bce_dice_loss
from .norms import freeze_norms
from .predict import predict

__all__ = ["History", "Schedule", "train", "validation_score"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How long and how a network is trained.

    Args:
        steps: optimizer steps in all, at least 1.
        batch_size: crops a step.
        patch_size: side of a square (or cubic) crop in pixels, divisible by 8; smaller images are padded.
        learning_rate: Adam's, falling to zero along a half cosine.
        epoch_steps: steps an epoch; after each the network is validated and the run can be resumed.
        freeze_norms_at: share of the steps after which paired batch norms keep their statistics, so that the
            last steps train exactly the folded network; 1 for never.
        seed: of crops, augmentation and order; the network's initial weights are the caller's.
    """

    steps: int
    batch_size: int = 4
    patch_size: int = 192
    learning_rate: float = 1e-3
    epoch_steps: int = 50
    freeze_norms_at: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "patch_size", "epoch_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"schedule: '{name}' is {getattr(self, name)}, expected 1 or more")

    @property
    def epochs(self) -> int:
        """Number of epochs, the last one included that may be longer than the steps asked for."""
        return math.ceil(self.steps / self.epoch_steps)


@dataclass
class History:
    """What a training run went through; part of its checkpoint.

    Attributes:
        loss: (step, mean loss of the epoch).
        validation: (step, mean background Dice in percent): the thin class decides, see ``train``.
        best: the best validation score so far.
        best_state: the network's state at that score.
    """

    loss: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: float = -1.0
    best_state: dict[str, torch.Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)


def train(
    network: nn.Module,
    train_cases: Sequence[Case],
    validation_cases: Sequence[Case],
    schedule: Schedule,
    checkpoint: Path | None = None,
    label: str = "training",
    device: str = "cpu",
) -> History:
    """Train a float or quantized network, in place; it ends with the weights of its best validation.

    Validation is whole images through the network in evaluation mode, quantized as it is; the score is the mean
    Dice of foreground and background, where an answer of all foreground scores far below any that finds the
    thin background class. Every step follows from the seed: a run that was interrupted and resumed ends with the
    same weights, bit for bit on a CPU.

    Args:
        network: float or quantized, calibrated where its formats need it.
        train_cases: what is learned from.
        validation_cases: what the best weights are chosen by; none of ``train_cases``.
        schedule: length, learning rate, crops, seed.
        checkpoint: file to resume from and to save to after each epoch; removed by nobody.
        label: what the progress bar says.
        device: ``"cpu"``, ``"cuda"``, ….

    Returns:
        the run's history.

    Raises:
        ValueError: if training and validation share a case, or the loss is not finite.
    """
    shared = {case.name for case in train_cases} & {case.name for case in validation_cases}
    if shared:
        raise ValueError(f"cases {sorted(shared)} are in training and validation: split them")
    network.to(device, memory_format=_channels_last(train_cases[0].image.ndim - 1))  # type: ignore[call-overload]
    loader = _loader(train_cases, schedule)
    optimizer = torch.optim.Adam(network.parameters(), lr=schedule.learning_rate)
    total = schedule.epochs * schedule.epoch_steps
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    history = History()
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=schedule.epochs,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=bce_dice_loss(),
        prepare_batch=_prepare_batch,
        train_handlers=[LrScheduleHandler(scheduler, print_lr=False, epoch_level=False)],  # type: ignore[arg-type]
        optim_set_to_none=True,
        decollate=False,
    )
    trainer.logger.setLevel(logging.WARNING)
    freezing = IncrementalFreezing(network, schedule.epochs)
    freezing.attach(trainer)
    TernaryAnnealing(network, schedule.epochs).attach(trainer)
    state = {
        "network": network,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "trainer": trainer,
        "history": history,
        "freezing": freezing,
    }
    if checkpoint is not None and checkpoint.exists():
        _restore(checkpoint, state, schedule)
    if trainer.state.epoch < schedule.epochs:
        handlers = _EpochHandlers(schedule, loader, network, validation_cases, history, state, checkpoint)
        with tqdm(
            total=total,
            initial=trainer.state.iteration or 0,
            desc=label,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
        ) as bar:
            handlers.attach(trainer, bar)
            trainer.run()
    network.load_state_dict(history.best_state)
    return history


def _prepare_batch(
    batch: Mapping[str, torch.Tensor], device: torch.device, non_blocking: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    image, label = (
        convert_to_tensor(batch[key], dtype=torch.float32, device=device, track_meta=False)
        for key in ("image", "label")
    )
    return image.to(memory_format=_channels_last(image.dim() - 2)), label


def _channels_last(spatial_dims: int) -> torch.memory_format:
    """The memory format that CPU and GPU convolutions like best."""
    return torch.channels_last if spatial_dims == 2 else torch.channels_last_3d


def _loader(cases: Sequence[Case], schedule: Schedule) -> DataLoader:
    keys, size = ("image", "label"), schedule.patch_size
    dimensions = cases[0].image.ndim - 1
    transform = Compose(
        [
            SpatialPadd(keys, [size] * dimensions, mode="reflect"),
            RandSpatialCropd(keys, [size] * dimensions, random_size=False),
            *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(dimensions)),
            RandRotate90d(keys, prob=0.75, spatial_axes=(dimensions - 2, dimensions - 1)),
            RandAdjustContrastd("image", prob=0.5, gamma=(0.75, 1.33)),
            RandShiftIntensityd("image", offsets=0.05, prob=0.5),
        ]
    )
    records = [{"image": case.image, "label": case.label.astype(np.float32)} for case in cases]
    dataset = CacheDataset(records, transform, progress=False)
    sampler = RandomSampler(
        dataset,
        replacement=True,
        num_samples=schedule.epoch_steps * schedule.batch_size,
        generator=torch.Generator(),
    )
    return DataLoader(dataset, batch_size=schedule.batch_size, sampler=sampler, num_workers=0)


def validation_score(network: nn.Module, cases: Sequence[Case]) -> float:
    """Mean Dice of foreground and background over the cases, in percent."""
    metric = DiceMetric(include_background=True, num_classes=2, ignore_empty=False)
    for case in cases:
        foreground = torch.as_tensor(predict(network, case.image)).long()
        metric(foreground[None], torch.as_tensor(case.label).long()[None])
    mean = metric.aggregate()
    assert isinstance(mean, torch.Tensor)
    return 100 * mean.item()


@dataclass
class _EpochHandlers:
    schedule: Schedule
    loader: DataLoader
    network: nn.Module
    validation_cases: Sequence[Case]
    history: History
    state: dict[str, Any]
    checkpoint: Path | None
    losses: list[float] = field(default_factory=list)

    def attach(self, trainer: SupervisedTrainer, bar: tqdm[Any]) -> None:
        EpochSeed(self.schedule.seed, self.loader).attach(trainer)
        trainer.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.after_step, bar)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.end_epoch, bar)

    def start_epoch(self, trainer: Engine) -> None:
        freeze_norms(self.network, trainer.state.epoch, self.schedule.epochs, self.schedule.freeze_norms_at)
        self.losses.clear()

    def after_step(self, trainer: Engine, bar: tqdm[Any]) -> None:
        loss = trainer.state.output["loss"].item()  # type: ignore[index]
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {trainer.state.iteration}: lower the learning rate")
        self.losses.append(loss)
        bar.update()

    def end_epoch(self, trainer: Engine, bar: tqdm[Any]) -> None:
        step = trainer.state.iteration
        score = validation_score(self.network, self.validation_cases)
        loss = float(np.mean(self.losses))
        self.history.loss.append((step, loss))
        self.history.validation.append((step, score))
        bar.set_postfix(loss=f"{loss:.3f}", validation=f"{score:.2f}", refresh=False)
        if score > self.history.best:
            self.history.best = score
            self.history.best_state = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.state, schedule=vars(self.schedule))


def _restore(path: Path, objects: Mapping[str, Any], schedule: Schedule) -> None:
    """Continue from a checkpoint of the same schedule.

    Raises:
        ValueError: if the file is none of ours, or of another schedule.
    """
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
        found = document["schedule"]
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({error}); delete it to start again"
        ) from error
    if found != vars(schedule):
        changed = sorted(k for k in vars(schedule) if found.get(k) != getattr(schedule, k))
        raise ValueError(
            f"{path}: made with another schedule ({', '.join(changed)} differ); delete it to start again"
        )
    missing = sorted(objects.keys() - document.keys())
    if missing:
        raise ValueError(
            f"{path}: holds no {', '.join(missing)}, an older version's; delete it to start again"
        )
    for name, thing in objects.items():
        thing.load_state_dict(document[name])
