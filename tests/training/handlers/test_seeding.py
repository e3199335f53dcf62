"""Every epoch's randomness follows from the seed, its number and the process, and from nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import DataLoader, ThreadDataLoader
from monai.utils import set_determinism
from torch.utils.data import RandomSampler

from monai_unetq.training import EpochSeed
from monai_unetq.training.handlers import seeding
from monai_unetq.training.handlers.seeding import epoch_seed, isolated_randomness, seed_everything
from tests.processes import worker_processes


def drawn(loader: Any, seed: int = 3, first: int = 1, last: int = 3, epoch_length: int | None = None) -> Any:
    """What epochs ``first`` to ``last`` draw: images, and a number of each global generator a step."""
    seen: list[Any] = []

    def step(engine: Engine, batch: Any) -> None:
        numbers = (float(torch.rand(())), float(np.random.rand()), random.random())
        seen.append((engine.state.epoch, batch["image"].as_tensor().clone(), numbers))

    engine = Engine(step)
    EpochSeed(seed, loader).attach(engine)
    length = len(loader) if epoch_length is None else epoch_length
    engine.load_state_dict({"epoch": first - 1, "max_epochs": last, "epoch_length": length})
    engine.run(loader, max_epochs=last)
    return seen


def same(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(first, second, strict=True)
    )


def with_generator(loader: Callable[..., Any]) -> Any:
    return loader(generator=torch.Generator())


def with_sampler(loader: Callable[..., Any]) -> Any:
    made = loader()
    sampler = RandomSampler(made.dataset, generator=torch.Generator())
    return DataLoader(made.dataset, batch_size=2, sampler=sampler)


LOADERS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "in process": lambda loader: loader(),
    "two workers": lambda loader: loader(num_workers=2, multiprocessing_context=worker_processes()),
    "thread": lambda loader: loader(ThreadDataLoader),
    "torch's": lambda loader: loader(torch.utils.data.DataLoader, num_workers=0),
    "own generator": with_generator,
    "sampler with a generator": with_sampler,
}


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_is_the_same_whatever_came_before(kind: str, loader: Callable[..., Any]) -> None:
    set_determinism(0)
    undisturbed = drawn(LOADERS[kind](loader))
    assert len(undisturbed) == 9
    set_determinism(77)
    torch.rand(5), np.random.rand(5), random.random()
    assert same(drawn(LOADERS[kind](loader), first=3), undisturbed[6:])
    assert same(drawn(LOADERS[kind](loader), first=2), undisturbed[3:])
    set_determinism(None)


def test_epochs_and_seeds_differ(loader: Callable[..., Any]) -> None:
    first, second = drawn(loader(), last=2), drawn(loader(), seed=4, last=2)
    for a, b in ((first[0], first[3]), (first[0], second[0])):
        assert not torch.equal(a[1], b[1])
        assert all(x != y for x, y in zip(a[2], b[2], strict=True))


def test_epochs_shorter_than_the_loader_begin_anew(loader: Callable[..., Any]) -> None:
    undisturbed = drawn(loader(), epoch_length=2)
    assert len(undisturbed) == 6
    assert same(drawn(loader(), first=3, epoch_length=2), undisturbed[4:])


def test_a_second_run_of_the_engine_repeats_the_first(loader: Callable[..., Any]) -> None:
    images = []
    engine = Engine(lambda engine, batch: images.append(batch["image"].as_tensor().clone()))
    data = loader()
    EpochSeed(3, data).attach(engine)
    engine.run(data, max_epochs=2)
    engine.run(data, max_epochs=2)
    assert len(images) == 12
    assert all(torch.equal(a, b) for a, b in zip(images[:6], images[6:], strict=True))


def test_processes_draw_other_numbers(loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn(loader(), last=1)
    monkeypatch.setattr(seeding, "rank", lambda: 1)
    second = drawn(loader(), last=1)
    assert not torch.equal(first[0][1], second[0][1])
    assert first[0][2] != second[0][2]


def test_formula_of_the_seed() -> None:
    assert epoch_seed(3, 7) == 3_000_016
    assert epoch_seed(0, 1, 0) == 1


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 64)),
        min_size=2, max_size=2, unique=True,
    )
)  # fmt: skip
def test_seeds_of_one_training_are_all_different(places: list[tuple[int, int, int]]) -> None:
    (seed, *first), (_, *second) = places
    if first != second:
        assert epoch_seed(seed, *first) != epoch_seed(seed, *second)


@given(st.integers())
def test_any_integer_is_a_seed(seed: int) -> None:
    with isolated_randomness(epoch_seed(seed, 1), None):
        torch.rand(1)


def test_a_list_of_batches_needs_no_loader() -> None:
    numbers = []
    engine = Engine(lambda engine, batch: numbers.append(float(torch.rand(()))))
    batches = [1, 2]
    EpochSeed(0, batches).attach(engine)
    engine.run(batches, max_epochs=2)
    torch.manual_seed(epoch_seed(0, 2))
    assert numbers[2] == float(torch.rand(()))


def test_workers_that_outlive_an_epoch_are_refused(loader: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="persistent_workers=True"):
        EpochSeed(0, loader(num_workers=1, persistent_workers=True))


def test_isolated_randomness_leaves_no_trace(loader: Callable[..., Any]) -> None:
    def following(data: Any) -> list[Any]:
        images = [batch["image"].as_tensor() for batch in data]
        return [torch.cat(images), torch.rand(2), torch.tensor([np.random.rand(), random.random()])]

    def prepared() -> Any:
        data = with_sampler(loader)
        seed_everything(5, data)
        return data

    expected = following(prepared())
    data = prepared()
    inside = []
    for _ in range(2):
        with isolated_randomness(9, data):
            inside.append(following(data))
    assert all(torch.equal(a, b) for a, b in zip(*inside, strict=True))
    assert not torch.equal(inside[0][0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(following(data), expected, strict=True))


def test_isolated_randomness_leaves_no_trace_after_an_error(loader: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    with pytest.raises(KeyError), isolated_randomness(9, loader()):
        raise KeyError
    assert torch.rand(()) == expected


def test_seeds_before_the_engine_takes_the_first_batch(loader: Callable[..., Any]) -> None:
    data = loader()
    engine = Engine(lambda engine, batch: None)
    EpochSeed(3, data).attach(engine)
    seeds = []
    engine.add_event_handler(Events.GET_BATCH_STARTED(once=1), lambda: seeds.append(torch.initial_seed()))
    engine.run(data, max_epochs=1)
    assert seeds == [epoch_seed(3, 1)]
