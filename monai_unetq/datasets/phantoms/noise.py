"""Random fields that vary smoothly in space: the irregularity of everything that phantoms draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Field", "smooth_noise"]

Field = npt.NDArray[np.float64]


def smooth_noise(shape: tuple[int, ...], scale: Sequence[float], generator: np.random.Generator) -> Field:
    """Gaussian noise of zero mean and unit variance, smooth over about ``scale`` pixels along each axis.

    Normal numbers on a lattice of that spacing, joined by cubic B-splines.

    Args:
        shape: of the field, any number of axes.
        scale: one for each axis, in samples of that axis, above 0.
        generator: source of the normal numbers; one draw of a size that follows from shape and scale.

    Returns:
        The field, float64, of the given shape.
    """
    lattice = [math.ceil(length / step) + 4 for length, step in zip(shape, scale, strict=True)]
    field = generator.standard_normal(lattice)
    for length, step in zip(shape, scale, strict=True):  # contracts the first axis, appends it at the end
        positions = np.arange(length) / step + 1.5
        offset = np.abs(positions[:, np.newaxis] - np.arange(field.shape[0])[np.newaxis, :])
        spline = np.where(
            offset < 1.0, 2.0 / 3.0 - offset**2 + offset**3 / 2.0, np.maximum(2.0 - offset, 0.0) ** 3 / 6.0
        )
        spline /= np.sqrt(np.square(spline).sum(axis=1, keepdims=True))
        field = np.tensordot(field, spline, axes=(0, 1))
    return field
