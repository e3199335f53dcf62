"""The three kinds of data that every transform takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

AFFINE = torch.tensor(
    [[0.0, -2.0, 0, 10], [3.0, 0, 0, 20], [0, 0, 5.0, 30], [0, 0, 0, 1]], dtype=torch.float64
)


def as_meta(array: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(array.copy()), affine=AFFINE, meta={"filename_or_obj": "case.nii"})


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": lambda array: array.copy(),
    "tensor": lambda array: torch.from_numpy(array.copy()),
    "metatensor": as_meta,
}


@pytest.fixture(scope="session", params=list(KINDS))
def as_kind(request: pytest.FixtureRequest) -> Callable[[np.ndarray], Any]:
    """Makes a numpy array into one of the kinds."""
    return KINDS[request.param]
