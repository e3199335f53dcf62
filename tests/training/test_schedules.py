"""Schedules against torch's own schedulers and hand-computed multipliers."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR

from monai_unetq.training import cosine, restart, step_decay


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)


def rates(make: Callable[[torch.optim.Optimizer], LRScheduler], epochs: int) -> list[float]:
    """The learning rate of each epoch, and the one after the last."""
    sgd = optimizer()
    scheduler = make(sgd)
    found = [sgd.param_groups[0]["lr"]]
    for _ in range(epochs):
        sgd.step()
        scheduler.step()
        found.append(sgd.param_groups[0]["lr"])
    return found


def test_step_decay_is_torchs_step_schedule_at_a_fifth() -> None:
    found = rates(lambda sgd: LambdaLR(sgd, step_decay(200)), 199)
    assert found == pytest.approx(rates(lambda sgd: StepLR(sgd, 40, 0.1), 199))


def test_cosine_is_torchs_cosine() -> None:
    found = rates(lambda sgd: LambdaLR(sgd, cosine(30)), 30)
    assert found == pytest.approx(rates(lambda sgd: CosineAnnealingLR(sgd, 30), 30), abs=1e-12)


def test_step_decay_by_hand() -> None:
    assert [step_decay(7, 0.5, 3)(epoch) for epoch in range(9)] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert [step_decay(2)(epoch) for epoch in range(3)] == pytest.approx([1, 0.01, 1e-4])


def test_cosine_by_hand() -> None:
    assert [cosine(4)(epoch) for epoch in range(6)] == pytest.approx(
        [1, 0.853553391, 0.5, 0.146446609, 0, 0], abs=1e-9
    )


@pytest.mark.parametrize("schedule", [cosine, step_decay])
@given(float_epochs=st.integers(0, 40), quantized=st.integers(0, 40))
def test_restart_is_one_schedule_after_the_other(
    schedule: Callable[[int], Callable[[int], float]], float_epochs: int, quantized: int
) -> None:
    epochs = float_epochs + quantized
    if not epochs:
        return
    found = [restart(schedule, float_epochs, epochs)(epoch) for epoch in range(epochs)]
    parts = [length for length in (float_epochs, quantized) if length]
    assert found == [schedule(length)(epoch) for length in parts for epoch in range(length)]


@given(epochs=st.integers(1, 500), epoch=st.integers(0, 600))
def test_multipliers_fall_and_stay_between_nothing_and_one(epochs: int, epoch: int) -> None:
    for schedule in (cosine(epochs), step_decay(epochs)):
        assert 0 <= schedule(epoch + 1) <= schedule(epoch) <= 1
        assert schedule(0) == 1


@pytest.mark.parametrize("schedule", [cosine(9), step_decay(9), restart(cosine, 3, 9)])
def test_schedules_can_be_pickled_and_resumed(schedule: Callable[[int], float]) -> None:
    expected = rates(lambda sgd: LambdaLR(sgd, schedule), 9)
    assert rates(lambda sgd: LambdaLR(sgd, pickle.loads(pickle.dumps(schedule))), 9) == expected

    sgd = optimizer()
    scheduler = LambdaLR(sgd, schedule)
    for _ in range(4):
        sgd.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save({"scheduler": scheduler.state_dict(), "optimizer": sgd.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    again = optimizer()
    resumed = LambdaLR(again, schedule)
    again.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["scheduler"])
    found = []
    for _ in range(5):
        found.append(again.param_groups[0]["lr"])
        again.step()
        resumed.step()
    assert found == expected[4:9]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine(0), "cosine: epochs is 0, expected 1 or more"),
        (lambda: step_decay(10, parts=0), "step_decay: parts is 0"),
        (lambda: step_decay(-1), "step_decay: epochs is -1"),
        (lambda: restart(cosine, 5, 4), "float_epochs is 5, expected 0 to 4"),
        (lambda: restart(cosine, -1, 4), "float_epochs is -1"),
        (lambda: restart(cosine, 0, 0), "restart: epochs is 0"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
