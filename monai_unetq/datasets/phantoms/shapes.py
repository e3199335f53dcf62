"""Distances to the simple bodies that phantoms are built of, and how bodies are painted into an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .noise import Field

__all__ = ["coverage", "ellipsoid", "paint", "tube"]

Vector = Sequence[Field | float]


def ellipsoid(offsets: Vector, radii: Vector) -> Field:
    """Signed distance to the surface of an ellipse or ellipsoid, negative inside.

    First order: with f the scaled radius, sqrt(sum((x/r)²)), it is (f - 1) / |grad f|. Exact for a sphere.

    Args:
        offsets: coordinates relative to the centre, one array for each axis; they broadcast.
        radii: half axes, one for each axis, numbers or arrays that broadcast; above 0.

    Returns:
        The distance in the unit of the coordinates, float64, of the broadcast shape.
    """
    scaled: Field | float = 0.0
    slope: Field | float = 0.0
    for offset, radius in zip(offsets, radii, strict=True):
        square = np.square(offset / radius)
        scaled = scaled + square
        slope = slope + square / np.square(radius)
    f = np.sqrt(scaled)
    smallest = np.minimum.reduce(np.broadcast_arrays(*radii))
    with np.errstate(invalid="ignore"):  # 0 / 0 at the centre, where the gradient is not defined
        per_unit = np.where(slope > 0.0, f / np.sqrt(slope), smallest)
    distance: Field = (f - 1.0) * per_unit
    return distance


def tube(offsets: Vector, path: Sequence[Vector], radii: Sequence[Field | float]) -> Field:
    """Signed distance to a tube around a path of straight pieces, negative inside.

    The radius runs linearly along each piece; the distance is that to the point of the axis that is nearest,
    less the radius there.

    Args:
        offsets: coordinates, one array for each axis; they broadcast.
        path: two points or more, each with one number or array for each axis.
        radii: one for each point.

    Returns:
        The distance in the unit of the coordinates, float64, of the broadcast shape.
    """
    nearest: Field | None = None
    for start, end, first, last in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
        direction = [b - a for a, b in zip(start, end, strict=True)]
        relative = [x - a for x, a in zip(offsets, start, strict=True)]
        length = sum(np.square(d) for d in direction)
        along = sum(x * d for x, d in zip(relative, direction, strict=True)) / np.maximum(length, 1e-12)
        along = np.clip(along, 0.0, 1.0)
        squares = sum(np.square(x - along * d) for x, d in zip(relative, direction, strict=True))
        distance = np.sqrt(squares) - (first + along * (last - first))
        nearest = distance if nearest is None else np.minimum(nearest, distance)
    if nearest is None:
        raise ValueError(f"tube: the path has {len(path)} point(s), expected two or more")
    return nearest


def coverage(distance: Field, width: float) -> Field:
    """The share of a pixel that lies inside a surface at a signed distance; ``width`` is the pixel's."""
    return np.clip(0.5 - distance / width, 0.0, 1.0)


def paint(image: Field, share: Field, value: npt.ArrayLike) -> None:
    """Mix a value into an image, in place: all of it where the share is 1, none where it is 0."""
    image += share * (np.asarray(value) - image)
