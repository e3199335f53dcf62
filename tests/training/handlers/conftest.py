"""A training of seconds, with every handler: a network of width 2 on images of 16 pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver, LrScheduleHandler, MeanDice, ValidationHandler
from monai.transforms import AsDiscreted, Compose, RandFlipd, RandGaussianNoised
from torch import nn

from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import quantize
from monai_unetq.training import (
    BestModel,
    Calibration,
    Checkpoint,
    EpochSeed,
    Pack,
    cosine,
    restart,
    soft_dice_loss,
)


def make_network(quantized: bool = True, seed: int = 0) -> FixedPointUNet:
    torch.manual_seed(seed)
    network = FixedPointUNet(1, 1, width=2)
    if quantized:
        quantize(network, QuantPlan.uniform(network, "int4", "int6", input="UQ0.8"))
    return network


def make_records(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 16, 16, generator=generator)
    images[:, :, 4:12, 4:12] *= 0.3
    labels = torch.zeros(count, 1, 16, 16)
    labels[:, :, 4:12, 4:12] = 1
    return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]


def make_loader(loader: Any = DataLoader, **options: Any) -> Any:
    transform = Compose(
        [RandFlipd(["image", "label"], prob=0.5, spatial_axis=0), RandGaussianNoised("image")]
    )
    dataset = CacheDataset(make_records(), transform, progress=False)
    return loader(dataset, **{"batch_size": 2, "shuffle": True, **options})


@dataclass
class Training:
    """Trainer, evaluator and what they hold, put together as a configuration would."""

    network: nn.Module
    trainer: SupervisedTrainer
    evaluator: SupervisedEvaluator
    best: BestModel
    loader: Any

    def run(self) -> dict[str, torch.Tensor]:
        """Train; the state that the network ends with."""
        self.trainer.run()
        return {key: value.clone() for key, value in self.network.state_dict().items()}


def make_training(
    folder: Path,
    network: nn.Module | None = None,
    epochs: int = 4,
    start_epoch: int = 2,
    stop_after: int | None = None,
    resume: Path | None = None,
    validation_handlers: Sequence[Any] = (),
    score_by: Any = None,
    own_checkpoint: bool = False,
) -> Training:
    network = make_network() if network is None else network
    loader = make_loader()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, restart(cosine, start_epoch, epochs))
    best = BestModel(network, folder, start_epoch)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(CacheDataset(make_records(2), progress=False), batch_size=1),
        network=network,
        postprocessing=AsDiscreted("pred", threshold=0.0),
        key_val_metric={
            "val_mean_dice": MeanDice(output_transform=lambda o: ([o[0]["pred"]], [o[0]["label"]]))
        },
        val_handlers=[*validation_handlers, best],
        **({} if score_by is None else {"metric_cmp_fn": score_by}),
    )
    state: dict[str, Any] = {"network": network, "optimizer": optimizer, "scheduler": scheduler, "best": best}
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs if stop_after is None else stop_after,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=soft_dice_loss(),
        key_train_metric=None,
    )
    state["trainer"] = trainer
    if own_checkpoint:
        objects = {name: thing for name, thing in state.items() if name != "trainer"}
        loading: list[Any] = [Checkpoint(resume.parent if resume else folder, objects, resume is not None)]
        saving: list[Any] = []
    else:
        loading = [] if resume is None else [CheckpointLoader(str(resume), state)]
        saving = [CheckpointSaver(str(folder / "checkpoints"), state, save_interval=1)]
    chain = [
        *loading,
        Calibration(network, loader, epochs, start_epoch),
        EpochSeed(3, loader),
        LrScheduleHandler(scheduler, print_lr=False),  # type: ignore[arg-type]
        ValidationHandler(1, evaluator),
        *saving,
        Pack(best),
    ]
    for handler in chain:
        handler.attach(trainer)
    for engine in (trainer, evaluator):
        engine.logger.setLevel("WARNING")
    return Training(network, trainer, evaluator, best, loader)


@pytest.fixture
def training() -> Callable[..., Training]:
    return make_training


@pytest.fixture
def network() -> Callable[..., FixedPointUNet]:
    return make_network


@pytest.fixture
def loader() -> Callable[..., Any]:
    return make_loader
