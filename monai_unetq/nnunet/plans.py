"""Plans with a request: a new plans file that reuses the preprocessed data of the plans that it is made from.

Imports neither torch nor nnunetv2.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_json
from .request import SECTION, Request

__all__ = ["find_dataset", "write_plans"]

PREPROCESSED = "nnUNet_preprocessed"


def find_dataset(dataset: str) -> Path:
    """The folder of a preprocessed data set.

    Args:
        dataset: its number or name, ``4`` or ``Dataset004_Hippocampus``.

    Raises:
        ValueError: if nnUNet_preprocessed is not set, or there is no such data set or more than one.
    """
    base = os.environ.get(PREPROCESSED)
    if not base:
        raise ValueError(f"{PREPROCESSED} is not set: export it, as for nnUNetv2_plan_and_preprocess")
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdecimal() else dataset
    found = sorted(folder for folder in Path(base).glob(pattern) if folder.is_dir())
    if len(found) != 1:
        listed = ", ".join(folder.name for folder in found) or "none"
        raise ValueError(
            f"{base}: found {listed} for data set {dataset!r}, expected one; run nnUNetv2_plan_and_preprocess first"
        )
    return found[0]


def write_plans(
    folder: Path,
    base: str,
    configuration: str,
    name: str,
    section: Mapping[str, Any],
    defaults: Request,
) -> Path:
    """Write plans whose configuration has a request.

    Further configurations can be added to the same plans by further calls.

    Args:
        folder: of the preprocessed data set.
        base: identifier of the plans to begin with; the float network's.
        configuration: such as ``3d_fullres``.
        name: identifier of the new plans.
        section: the request's keys that are not to have their defaults.
        defaults: of the trainer; the section is checked against them.

    Returns:
        the file.

    Raises:
        FileNotFoundError: if the base plans are missing.
        FileExistsError: if there are such plans already, with another request or made from other plans.
        ValueError: if the configuration is missing, the name is the base's, or the section is broken.
    """
    if name == base:
        raise ValueError(f"-o is {name!r}, the plans to begin with: give the new plans another name")
    source, target = folder / f"{base}.json", folder / f"{name}.json"
    plans = _plans(source)
    known = plans["configurations"]
    if configuration not in known:
        raise ValueError(
            f"{source}: has no configuration {configuration!r}, expected one of {', '.join(known)}"
        )
    if SECTION in known[configuration]:
        first = known[configuration][SECTION].get("base_plans")
        raise ValueError(
            f"{source}: {configuration} has a request already; begin with the plans {first!r}: -p {first}"
        )
    section = {"base_plans": base, **section}
    defaults.with_section(section, SECTION)
    plans = copy.deepcopy(plans)
    plans["plans_name"] = name
    if target.is_file():
        there = _plans(target)
        if _without_requests(there) != _without_requests(plans):
            raise FileExistsError(
                f"{target}: exists, and was not made from {base}; give another -o, or remove it"
            )
        for key, found in there["configurations"].items():
            if SECTION in found:
                plans["configurations"][key][SECTION] = found[SECTION]
        before = plans["configurations"][configuration].get(SECTION, section)
        if before != section:
            raise FileExistsError(
                f"{target}: {configuration} has the request {json.dumps(before)} already; networks may have been trained "
                "for it: give another -o, or remove the file"
            )
    plans["configurations"][configuration][SECTION] = dict(section)
    write_json(target, plans)
    return target


def _plans(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such plans; run nnUNetv2_plan_and_preprocess, or give others with -p"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: no JSON ({error}); make the plans anew") from None
    if not isinstance(found, dict) or not isinstance(found.get("configurations"), dict):
        raise ValueError(f"{file}: no plans of nnU-Net, expected an object with 'configurations'")
    return found


def _without_requests(plans: Mapping[str, Any]) -> dict[str, Any]:
    stripped = copy.deepcopy(dict(plans))
    for configuration in stripped["configurations"].values():
        configuration.pop(SECTION, None)
    return stripped
