"""Folds: what is tested, what validates, and that no person, patient or neighbouring slice is on two sides."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_unetq.datasets import Split, block_split
from monai_unetq.datasets.splits import block_folds, check_groups, patient_folds, person_folds


def names(count: int) -> list[str]:
    return [f"em_{index:02d}" for index in range(count)]


def numbers(part: tuple[str, ...]) -> list[int]:
    return [int(name.rpartition("_")[2]) for name in part]


def test_block_folds_of_the_24_slices() -> None:
    folds, groups = block_folds(names(24))
    assert folds[0] == block_split(names(24))
    assert [numbers(fold.test) for fold in folds] == [
        [19, 20, 21, 22, 23],
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11, 12, 13, 14],
        [15, 16, 17, 18],
    ]
    assert [numbers(fold.validation) for fold in folds] == [
        [16, 17, 18],
        [5, 6, 7],
        [2, 3, 4],
        [7, 8, 9],
        [12, 13, 14],
    ]
    assert numbers(folds[2].train) == [0, 1, *range(11, 24)]  # 10 touches the test block
    assert groups["em_02"] == groups["em_04"] == "slices 02-04"


@given(st.integers(3, 120))
def test_block_folds_keep_neighbours_apart(count: int) -> None:
    folds, groups = block_folds(names(count))
    assert folds[0] == block_split(names(count))
    for fold in folds:
        check_groups(fold, groups)
        test, train = set(numbers(fold.test)), set(numbers(fold.train))
        assert not {number + step for number in test for step in (-1, 1)} & train
        left_out = count - len(test) - len(train) - len(fold.validation)
        assert left_out <= (fold is not folds[0])
    tested = list(chain.from_iterable(fold.test for fold in folds))
    assert len(tested) == len(set(tested))
    if count >= 12:
        assert len(folds) == 5 and sorted(tested) == sorted(names(count))


@given(st.integers(3, 120))
def test_blocks_are_runs_of_slices(count: int) -> None:
    order = list(block_folds(names(count))[1].values())
    assert len(order) == count
    changes = sum(one != two for one, two in pairwise(order))
    assert changes + 1 == len(set(order))


def test_person_folds_leave_one_out() -> None:
    persons = {"a1": "a", "a2": "a", "b": "b", "c": "c", "d": "d"}
    folds = person_folds(persons)
    assert folds[0] == Split(("c", "d"), ("b",), ("a1", "a2"))
    assert folds[3] == Split(("b", "c"), ("a1", "a2"), ("d",))
    assert len(folds) == 4


def test_person_folds_of_the_2016_challenge_balance_the_sites() -> None:
    persons = {
        f"site{site}-sc{number:02d}": f"site{site}-sc{number:02d}"
        for site in range(1, 5)
        for number in range(1, 11)
    }
    folds = person_folds(persons, {person: person[:5] for person in persons})
    assert len(folds) == 5
    for fold in folds:
        for part in (fold.test, fold.validation):
            assert sorted(name[:5] for name in part) == sorted(["site1", "site2", "site3", "site4"] * 2)
        assert len(fold.train) == 24


@given(st.lists(st.integers(0, 5), min_size=9, max_size=60))
def test_person_folds_balance_any_sites(sites: list[int]) -> None:
    persons = {f"p{index:02d}": f"p{index:02d}" for index in range(len(sites))}
    site_of = {person: str(site) for person, site in zip(persons, sites, strict=True)}
    folds = person_folds(persons, site_of)
    assert sorted(chain.from_iterable(fold.test for fold in folds)) == sorted(persons)
    for site in set(site_of.values()):
        for part in ("test", "validation"):
            shares = [sum(site_of[name] == site for name in getattr(fold, part)) for fold in folds]
            assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(("count", "parts"), [(48, (30, 6, 12)), (80, (50, 10, 20))])
def test_patient_folds_sizes(count: int, parts: tuple[int, int, int]) -> None:
    folds = patient_folds({f"P{index:04d}_000": f"P{index:04d}" for index in range(count)})
    assert [(len(fold.train), len(fold.validation), len(fold.test)) for fold in folds] == [parts] * 4


@given(st.lists(st.integers(0, 30), min_size=3, max_size=80).filter(lambda ids: len(set(ids)) > 2))
def test_patient_folds_test_every_case_once_and_share_no_patient(patients: list[int]) -> None:
    groups = {f"P{patient:04d}_{index:03d}": f"P{patient:04d}" for index, patient in enumerate(patients)}
    folds = patient_folds(groups)
    assert sorted(chain.from_iterable(fold.test for fold in folds)) == sorted(groups)
    for fold in folds:
        check_groups(fold, groups)
        assert sorted((*fold.train, *fold.validation, *fold.test)) == sorted(groups)


@pytest.mark.parametrize("folds", [person_folds, patient_folds])
def test_two_persons_are_too_few(folds: object) -> None:
    assert callable(folds)
    with pytest.raises(ValueError, match=r"found 2 (person|patient).*'a', 'b'.*at least 3"):
        folds({"1": "a", "2": "b", "3": "b"})


def test_a_shared_group_is_named() -> None:
    with pytest.raises(ValueError, match="group 'a' is in two parts: '1' in train, '3' in test"):
        check_groups(Split(("1",), ("2",), ("3",)), {"1": "a", "2": "b", "3": "a"})
    with pytest.raises(ValueError, match="case '3' is in the test part, but has no group"):
        check_groups(Split(("1",), ("2",), ("3",)), {"1": "a", "2": "b"})
