"""How the cases of a data set are divided in folds, so that no person, patient or block of slices stands on two
sides of one fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .cases import Split, block_split

__all__ = ["block_folds", "check_groups", "patient_folds", "person_folds"]

LEAVE_ONE_OUT_UP_TO = 8  # persons; from there on every fold would be a training of its own for one person
PERSON_FOLDS = 5
PATIENT_FOLDS = 4
BLOCK_FOLDS = 5


def block_folds(names: Sequence[str]) -> tuple[list[Split], dict[str, str]]:
    """Folds of one stack of slices, in blocks of consecutive slices.

    Fold 0 is :func:`~monai_unetq.datasets.block_split`: the last slices are its test block. The slices before
    are divided in four test blocks of about equal length, one for each further fold, so that every slice is
    tested once. A further fold validates on as many slices as fold 0, beside its test block (before it, or
    after it where there is no room), and trains on the rest, without the one slice that touches the test
    block from the other side: neighbouring slices are nearly the same image. A stack too short for a fold
    (nothing left to train on) goes without it.

    Args:
        names: unique names in the order of the stack, at least three.

    Returns:
        the folds, at most five; and the block that each slice belongs to: slices of one block, such as
        ``"slices 02-04"``, are on the same side in every fold.

    Raises:
        ValueError: fewer than three names, or a name that stands twice.
    """
    first = block_split(names)
    count, validated = len(names), len(first.validation)
    folds = [first]
    before = np.array_split(np.arange(count - len(first.test)), BLOCK_FOLDS - 1)
    for block in before:
        if block.size == 0:
            continue
        start, end = int(block[0]), int(block[-1]) + 1
        if start > validated:  # something to train on is left in front of the validation slices, or behind
            validation = range(start - validated, start)
            touching = end
        else:
            validation = range(end, min(end + validated, count))
            touching = start - 1
        kept_out = {*range(start, end), *validation, touching}
        train = [index for index in range(count) if index not in kept_out]
        if train:
            folds.append(_split(names, train, validation, range(start, end)))
    return folds, _blocks(names, folds)


def person_folds(persons: Mapping[str, str], sites: Mapping[str, str] | None = None) -> list[Split]:
    """Folds by person: leave one out for up to eight persons, else five folds balanced over sites.

    Leaving one out, fold k tests the k-th person, validates on the next one and trains on the others. With
    more than eight persons, those of each site are dealt to five parts in turn; fold k tests part k,
    validates on part k + 1 and trains on the rest.

    Args:
        persons: the person of each case.
        sites: the site (scanner) of each person; persons without one count as one site.

    Returns:
        the folds.

    Raises:
        ValueError: fewer than three persons.
    """
    order = _groups_in_order(persons, "person")
    if len(order) <= LEAVE_ONE_OUT_UP_TO:
        return _rotate(persons, [[person] for person in order])
    by_site: dict[str, list[str]] = {}
    for person in order:
        by_site.setdefault((sites or {}).get(person, ""), []).append(person)
    dealt = [person for site in sorted(by_site) for person in by_site[site]]
    return _rotate(persons, [dealt[part::PERSON_FOLDS] for part in range(PERSON_FOLDS)])


def patient_folds(patients: Mapping[str, str]) -> list[Split]:
    """Four folds by patient: a quarter of them is tested, an eighth validates, the rest trains.

    Patients are dealt to four parts in turn; fold k tests part k and validates on every other patient of part
    k + 1. With three patients there are three folds.

    Args:
        patients: the patient of each case.

    Returns:
        the folds.

    Raises:
        ValueError: fewer than three patients.
    """
    order = _groups_in_order(patients, "patient")
    count = min(PATIENT_FOLDS, len(order))
    return _rotate(patients, [order[part::count] for part in range(count)], every=2)


def check_groups(split: Split, groups: Mapping[str, str]) -> None:
    """Check that the parts of a fold share no person, patient or block.

    Args:
        split: the fold.
        groups: the group of each case.

    Raises:
        ValueError: a case has no group, or a group has cases in two parts; it is named.
    """
    part_of: dict[str, tuple[str, str]] = {}
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    for part, names in parts.items():
        for name in names:
            if name not in groups:
                raise ValueError(
                    f"case {name!r} is in the {part} part, but has no group; expected one a case"
                )
            other, first = part_of.setdefault(groups[name], (part, name))
            if other != part:
                raise ValueError(
                    f"group {groups[name]!r} is in two parts: {first!r} in {other}, {name!r} in {part}; "
                    "expected every person, patient or block in one part only"
                )


def _rotate(groups: Mapping[str, str], parts: Sequence[Sequence[str]], every: int = 1) -> list[Split]:
    """Fold k tests part k, validates on every ``every``-th group of the next part and trains on the rest."""
    folds = []
    for index, part in enumerate(parts):
        test, validation = set(part), set(parts[(index + 1) % len(parts)][::every])
        folds.append(
            Split(
                tuple(name for name, group in groups.items() if group not in test | validation),
                tuple(name for name, group in groups.items() if group in validation),
                tuple(name for name, group in groups.items() if group in test),
            )
        )
    return folds


def _groups_in_order(groups: Mapping[str, str], what: str) -> list[str]:
    order = sorted(set(groups.values()))
    if len(order) < 3:
        raise ValueError(
            f"found {len(order)} {what}(s) {order}, expected at least 3: one each for train, validation and "
            f"test. Add cases of another {what}"
        )
    return order


def _split(names: Sequence[str], train: Sequence[int], validation: range, test: range) -> Split:
    return Split(*(tuple(names[index] for index in part) for part in (train, validation, test)))


def _blocks(names: Sequence[str], folds: Sequence[Split]) -> dict[str, str]:
    """The longest runs of slices that are on the same side in every fold, by name of the slice."""
    parts = [
        {name: part for part, group in enumerate((f.train, f.validation, f.test)) for name in group}
        for f in folds
    ]
    sides = [tuple(part.get(name, -1) for part in parts) for name in names]
    starts = [i for i in range(len(names)) if i == 0 or sides[i] != sides[i - 1]]
    width = max(2, len(str(len(names) - 1)))
    blocks = {}
    for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
        block = f"slices {start:0{width}d}-{end - 1:0{width}d}"
        blocks.update({names[index]: block for index in range(start, end)})
    return blocks
