"""``SupervisionDecay`` step by step, and what is left of the heads when a supervised training is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from monai_unetq.deploy import unpack
from monai_unetq.networks import FixedPointUNet
from monai_unetq.surgery import attach_supervision
from monai_unetq.training import SkipSupervisionLoss, SupervisionDecay, soft_dice_loss


def weights_of(
    epochs: int, start_epoch: int = 0, steps: int = 2, done: int = 0, stop: int | None = None, first: bool = True
) -> tuple[list[float], float]:  # fmt: skip
    """λ in each step of a training that goes on after ``done`` epochs, and after it; the loss's own is 0.5."""
    loss = SkipSupervisionLoss(soft_dice_loss(), weight=0.5)
    decay, seen = SupervisionDecay(loss, epochs, start_epoch), list[float]()
    engine = Engine(lambda *_: seen.append(loss.weight))
    engine.load_state_dict({"epoch": done, "max_epochs": stop or epochs, "epoch_length": steps})
    if first:
        decay.attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: None)
    if not first:
        decay.attach(engine)
    engine.run([0] * steps, max_epochs=stop or epochs)
    return seen, loss.weight


@pytest.mark.parametrize("first", [True, False])
def test_the_weight_falls_along_half_a_cosine_step_by_step(first: bool) -> None:
    seen, _ = weights_of(epochs=2, first=first)
    assert seen == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * share)) / 2 for share in (0, 0.25, 0.5, 0.75)]
    )
    assert seen[0] == 0.5


def test_it_stands_still_in_the_float_epochs() -> None:
    seen, _ = weights_of(epochs=4, start_epoch=2)
    assert seen[:5] == [0.5] * 5
    assert seen[4:] == weights_of(epochs=2)[0]


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resumed_training_goes_on_where_it_was(done: int) -> None:
    whole, _ = weights_of(epochs=4, start_epoch=1, steps=3)
    before, _ = weights_of(epochs=4, start_epoch=1, steps=3, stop=done)
    after, _ = weights_of(epochs=4, start_epoch=1, steps=3, done=done)
    assert before + after == whole


def test_the_loss_has_its_own_weight_again_after_the_training() -> None:
    assert weights_of(epochs=3)[1] == 0.5


@pytest.mark.parametrize(("epochs", "start_epoch"), [(2, 2), (2, -1), (0, 0), (1, 5)])
def test_it_needs_an_epoch_to_fall_in(epochs: int, start_epoch: int) -> None:
    with pytest.raises(ValueError, match=f"start_epoch is {start_epoch} of {epochs} epochs"):
        SupervisionDecay(SkipSupervisionLoss(soft_dice_loss()), epochs, start_epoch)


@pytest.fixture
def trained(training: Callable[..., Any], network: Callable[..., nn.Module], tmp_path: Path) -> Any:
    """A supervised training of MONAI's with every handler, done; in float first."""
    supervised = attach_supervision(network(), torch.rand(1, 1, 16, 16))
    run = training(tmp_path, supervised, epochs=3, start_epoch=1)
    loss = SkipSupervisionLoss(soft_dice_loss(), weight=1.0)
    run.trainer.loss_function = loss
    SupervisionDecay(loss, 3, 1).attach(run.trainer)
    run.before = {key: value.clone() for key, value in supervised.state_dict().items()}
    run.run()
    return run


def test_the_best_model_and_its_package_have_no_heads(
    trained: Any, network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    state: dict[str, Tensor] = torch.load(tmp_path / "model.pt", weights_only=True)
    plain = network()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    unpacked = unpack(tmp_path / "model.unetq", FixedPointUNet(1, 1, width=2))
    image = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(unpacked.eval()(image), plain.eval()(image), atol=1e-5, rtol=1e-5)


def test_checkpoints_have_the_heads_and_these_have_learned(trained: Any, tmp_path: Path) -> None:
    (checkpoint, *_) = sorted((tmp_path / "checkpoints").glob("*.pt"))
    heads = [key for key in trained.before if key.startswith("skip_supervision.")]
    stored = torch.load(checkpoint, weights_only=True)["network"]
    assert len(heads) == 6 and set(heads) <= stored.keys()
    after = trained.network.state_dict()
    assert all(not torch.equal(after[key], trained.before[key]) for key in heads)
