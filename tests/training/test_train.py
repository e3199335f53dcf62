"""Training: deterministic, resumable to the same weights, honest about what it selects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_unetq.datasets import Case, membrane_phantom
from monai_unetq.layers import PairedNorm
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import quantize
from monai_unetq.training import Schedule, calibrate, train, validation_score
from monai_unetq.training import train as train_function

SCHEDULE = Schedule(steps=6, batch_size=2, patch_size=32, epoch_steps=2, seed=3)
CASES = membrane_phantom(count=4, size=48, seed=1)
TRAIN, VALIDATION = CASES[:3], CASES[3:]


def network(quantized: bool = True) -> FixedPointUNet:
    torch.manual_seed(0)
    net = FixedPointUNet(1, 1, width=4)
    if quantized:
        quantize(net, QuantPlan.uniform(net, "int4", "int6", input="UQ0.8", learned=True))
        calibrate(net, [torch.as_tensor(case.image)[None] for case in TRAIN])
    return net


def weights(net: FixedPointUNet) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("quantized", [False, True])
def test_same_seed_same_weights_and_another_seed_others(quantized: bool) -> None:
    first, second, third = network(quantized), network(quantized), network(quantized)
    history = train(first, TRAIN, VALIDATION, SCHEDULE)
    assert train(second, TRAIN, VALIDATION, SCHEDULE).loss == history.loss
    train(third, TRAIN, VALIDATION, replace(SCHEDULE, seed=4))
    assert_same(weights(first), weights(second))
    assert not torch.equal(first.last.weight, third.last.weight)


class _InterruptedError(Exception):
    pass


@pytest.mark.parametrize("quantized", [False, True])
def test_interrupted_and_resumed_ends_with_the_weights_of_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    undisturbed = network(quantized)
    expected = train(undisturbed, TRAIN, VALIDATION, SCHEDULE)
    checkpoint = tmp_path / "checkpoint.pt"

    module = __import__(train_function.__module__, fromlist=["validation_score"])
    calls = []

    def interrupting(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise _InterruptedError
        return validation_score(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "validation_score", interrupting)
        with pytest.raises(_InterruptedError):
            train(network(quantized), TRAIN, VALIDATION, SCHEDULE, checkpoint)
    assert checkpoint.exists()

    torch.manual_seed(99)  # nothing may depend on the generator's state
    resumed = network(quantized)
    history = train(resumed, TRAIN, VALIDATION, SCHEDULE, checkpoint)
    assert history.loss == expected.loss
    assert history.validation == expected.validation
    assert_same(weights(undisturbed), weights(resumed))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    net = network()
    history = train(net, TRAIN, VALIDATION, SCHEDULE, tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()
    again = network()
    assert train(again, TRAIN, VALIDATION, SCHEDULE, tmp_path / "c.pt").validation == history.validation
    assert (tmp_path / "c.pt").read_bytes() == before
    assert_same(weights(net), weights(again))


def test_the_weights_are_those_of_the_best_validation() -> None:
    net = network()
    history = train(net, TRAIN, VALIDATION, SCHEDULE)
    assert history.best == max(score for _, score in history.validation)
    assert validation_score(net, VALIDATION) == pytest.approx(history.best, abs=1e-4)


def test_norms_freeze_for_the_last_steps() -> None:
    net = network()
    statistics: list[Tensor] = []

    norm = next(m for m in net.modules() if isinstance(m, PairedNorm))
    net.register_forward_pre_hook(
        lambda module, _: statistics.append(norm.running_mean.clone()) if module.training else None  # type: ignore[union-attr]
    )
    train(net, TRAIN, VALIDATION, replace(SCHEDULE, freeze_norms_at=0.5))
    # Steps 1 to 2 train with batch statistics (an epoch has 2 steps, half of 3 epochs is 1.5).
    assert not torch.equal(statistics[0], statistics[1])
    assert torch.equal(statistics[2], statistics[-1])
    assert len(statistics) == 6


def test_another_schedule_does_not_continue_a_checkpoint(tmp_path: Path) -> None:
    train(network(), TRAIN, VALIDATION, replace(SCHEDULE, steps=2), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: made with another schedule \(steps differ\)"):
        train(network(), TRAIN, VALIDATION, SCHEDULE, tmp_path / "c.pt")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"c\.pt: cannot be read as a checkpoint"):
        train(network(), TRAIN, VALIDATION, SCHEDULE, tmp_path / "c.pt")


def test_validation_cases_must_not_be_trained_on() -> None:
    with pytest.raises(ValueError, match="are in training and validation"):
        train(network(), CASES, VALIDATION, SCHEDULE)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    net = network(quantized=False)
    with torch.no_grad():
        net.last.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        train(net, TRAIN, VALIDATION, SCHEDULE)


def test_small_images_are_padded_to_the_patch() -> None:
    train(network(), TRAIN, VALIDATION, replace(SCHEDULE, steps=2, patch_size=64))


def test_schedule_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="'steps' is 0"):
        Schedule(steps=0)
    assert Schedule(steps=101, epoch_steps=50).epochs == 3


def test_validation_score_is_the_mean_dice_of_both_classes() -> None:
    class Answer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dummy = torch.nn.Parameter(torch.zeros(1))

        def forward(self, image: Tensor) -> Tensor:
            return image

    image = np.array([[[1.0, 1.0, -1.0, -1.0]]], dtype=np.float32).repeat(8, 1).repeat(2, 2)
    label = np.array([[[1, 0, 0, 0]]], dtype=np.uint8).repeat(8, 1).repeat(2, 2)
    # Foreground: 2·1/(2+1); background: 2·2/(2+3), in columns of equal size.
    score = validation_score(Answer(), [Case("a", image, label)])
    assert score == pytest.approx(100 * (2 / 3 + 4 / 5) / 2, abs=1e-3)
