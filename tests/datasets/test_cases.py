"""Splits of cases: blocks in order, no case in two parts, nothing empty."""

from __future__ import annotations

import pytest

from monai_unetq.datasets import Split, block_split


def names(count: int) -> list[str]:
    return [f"{index:02d}" for index in range(count)]


@pytest.mark.parametrize(
    ("count", "parts"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (24, (16, 3, 5)), (30, (20, 4, 6))]
)
def test_block_split_sizes(count: int, parts: tuple[int, int, int]) -> None:
    split = block_split(names(count))
    assert (len(split.train), len(split.validation), len(split.test)) == parts


@pytest.mark.parametrize("count", range(3, 60))
def test_block_split_keeps_every_name_in_order(count: int) -> None:
    split = block_split(names(count))
    assert [*split.train, *split.validation, *split.test] == names(count)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_block_split_refuses_too_few(count: int) -> None:
    with pytest.raises(ValueError, match=rf"found {count} case.*at least 3"):
        block_split(names(count))


def test_block_split_refuses_a_repeated_name() -> None:
    with pytest.raises(ValueError, match="'00' in train"):
        block_split(["00", "00", "01", "02", "03", "04"])


def test_split_refuses_a_case_in_two_parts() -> None:
    with pytest.raises(ValueError, match="'b' in train, test"):
        Split(train=("a", "b"), validation=("c",), test=("b", "d"))


@pytest.mark.parametrize("empty", ["train", "validation", "test"])
def test_split_refuses_an_empty_part(empty: str) -> None:
    parts = {"train": ("a",), "validation": ("b",), "test": ("c",)} | {empty: ()}
    with pytest.raises(ValueError, match=f"the {empty} part of the split is empty"):
        Split(**parts)
