"""A phantom of electron microscopy: stacks of slices with cell membranes, drawn from a seed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import ndimage, spatial

from ..cases import Case
from .arguments import check_arguments
from .noise import Field, smooth_noise

__all__ = ["membrane_phantom"]

MEMBRANE_FRACTION = 0.22  # of all pixels of a stack, as in the ISBI 2012 EM slices
SLICE_DISTANCE = 9.0  # px from slice to slice; ssTEM of 50 nm slices and 4 nm pixels has 12.5
CELL_DIAMETER = 52.0  # px, mean distance of cell centres
DEFAULT_SLICES = 24  # in 2D
DEFAULT_STACKS = 4  # in 3D
STACK_SLICES = 16  # of one case in 3D
SPACING = (5e-5, 4e-6, 4e-6)  # mm, of ssTEM


def membrane_phantom(
    count: int | None = None, size: int = 192, seed: int = 0, dimensions: int = 2
) -> list[Case]:
    """Draw slices that look like serial-section electron microscopy of neurons.

    Cells are the regions of a power diagram (a Voronoi diagram with cells of unequal size) of random points
    in three dimensions, in coordinates that are bent by smooth noise and drift from slice to slice, so that
    cells change shape slowly from one slice to the next. A pixel is membrane where its distance to the
    nearest wall within the slice is below a thickness that varies smoothly; thickness is scaled so that
    22 % of the pixels of the stack are membrane. Where three walls meet they merge into a patch, as
    annotators draw them.

    The image shows walls as dark lines, wide and faint where they cut the slice obliquely, faint also where
    a smooth random contrast is low; they follow the label only to about a pixel, as drawn labels follow
    real membranes. Cytoplasm has its own brightness in each cell and a grain. Things that are dark without
    being membrane distract: mitochondria (with a wall and folds, through several slices) and vesicles
    (small rings) in the cells, and smudges over cells and walls. Shading, blur, shot noise and rounding to
    8 bits come last.

    Neighbouring slices are correlated: split them in blocks (:func:`~monai_unetq.datasets.block_split`).
    The numbers come from one ``numpy.random.Generator`` (PCG64); the same arguments give the same cases,
    whatever the global random state.

    Args:
        count: in 2D, slices in the one stack, 24 by default; in 3D, stacks, 4 by default. At least 1.
        size: height and width in px, at least 32.
        seed: a number from 0.
        dimensions: 2 for one case a slice, 3 for one case a stack of 16 slices.

    Returns:
        ``count`` cases named ``"00"``, ``"01"``, …; image (1, size, size) or (1, 16, size, size) float32,
        multiples of 1/255 in [0, 1]; label of the same shape, uint8, 1 = cell interior, 0 = membrane. In 3D
        the spacing is that of ssTEM, 50 nm between slices and 4 nm between pixels, in mm; in 2D it is left
        empty, as it is for image files without one.

    Raises:
        ValueError: count, size or seed is too small, or dimensions is neither 2 nor 3.
    """
    if count is None:
        count = DEFAULT_SLICES if dimensions == 2 else DEFAULT_STACKS
    check_arguments("membrane_phantom", count, size, seed, dimensions, least_size=32)
    generator = np.random.default_rng(seed)
    if dimensions == 3:
        stacks = [_stack((STACK_SLICES, size, size), generator) for _ in range(count)]
        return [
            Case(f"{index:02d}", image[np.newaxis], label[np.newaxis], spacing=SPACING)
            for index, (image, label) in enumerate(stacks)
        ]
    image, label = _stack((count, size, size), generator)
    return [
        Case(f"{index:02d}", image[index, np.newaxis], label[index, np.newaxis]) for index in range(count)
    ]


def _stack(
    shape: tuple[int, int, int], generator: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Image and label of one stack, in the given shape."""
    cell, distance, obliqueness, brightness = _tissue(shape, generator)
    distance *= np.exp(-0.25 * smooth_noise(shape, (2, 24, 24), generator))  # thick walls here, thin there
    drawn = distance + 0.5 * smooth_noise(shape, (1, 7, 7), generator)  # the annotator's hand, px
    half_width = float(np.quantile(drawn, MEMBRANE_FRACTION))
    label = drawn > half_width

    image = _cytoplasm(brightness, cell, generator)
    image -= _organelles(distance / half_width, generator)
    image -= _walls(distance / half_width, obliqueness, generator)
    return _microscope(image, generator), label.astype(np.uint8)


def _tissue(
    shape: tuple[int, int, int], generator: np.random.Generator
) -> tuple[npt.NDArray[np.intp], Field, Field, Field]:
    """Cells of the stack.

    Returns:
        per pixel: index of its cell; distance in px to the nearest wall within the slice, less up to 1.2 px
        where walls meet; tangent of the angle at which that wall leans from the vertical. Per cell:
        brightness of its cytoplasm.
    """
    count, size, _ = shape
    margin = 2.5 * CELL_DIAMETER
    extent = np.array([count * SLICE_DISTANCE, size, size]) + 2 * margin
    number = math.ceil(float(np.prod(extent)) / CELL_DIAMETER**3)
    points = generator.uniform(0.0, 1.0, (number, 3)) * extent - margin
    # The power of a point, px²: a larger one has a larger cell.
    weights = (CELL_DIAMETER * 0.75) ** 2 * generator.uniform(0.0, 1.0, number)
    brightness = 0.57 + 0.045 * generator.standard_normal(number)

    z, y, x = np.meshgrid(
        np.arange(count) * SLICE_DISTANCE,
        np.arange(size, dtype=float),
        np.arange(size, dtype=float),
        indexing="ij",
    )
    drift = np.cumsum(generator.normal(0.0, 1.0, (2, count)), axis=1)[:, :, np.newaxis, np.newaxis]
    y = (
        y
        + drift[0]
        + 7.0 * smooth_noise(shape, (4, 34, 34), generator)
        + 2.5 * smooth_noise(shape, (2, 15, 15), generator)
    )
    x = (
        x
        + drift[1]
        + 7.0 * smooth_noise(shape, (4, 34, 34), generator)
        + 2.5 * smooth_noise(shape, (2, 15, 15), generator)
    )

    # The power distance |p - s|² - w is, up to a constant, a squared Euclidean distance in one more
    # dimension, so a k-d tree finds its minima.
    lifted = np.column_stack([points, np.sqrt(weights.max() - weights)])
    pixels = np.column_stack([z.ravel(), y.ravel(), x.ravel(), np.zeros(z.size)])
    distances, nearest = spatial.cKDTree(lifted).query(pixels, k=3)
    squares = np.square(distances)
    apart = points[nearest[:, 1:]] - points[nearest[:, :1]]
    lateral = np.hypot(apart[..., 1], apart[..., 2])
    lateral = np.maximum(lateral, 0.5 * np.abs(apart[..., 0]))  # bounds the width of walls that lie flat
    to_wall = (squares[:, 1:] - squares[:, :1]) / (2.0 * lateral)
    order = np.argmin(to_wall, axis=1)
    first = np.take_along_axis(to_wall, order[:, np.newaxis], axis=1)[:, 0]
    second = to_wall.max(axis=1)
    lean = np.abs(apart[..., 0]) / lateral
    obliqueness = np.take_along_axis(lean, order[:, np.newaxis], axis=1)[:, 0]
    merged = first - 1.2 * np.exp(-(second - first) / 2.5 - first / 4.0)  # fills the corners where walls meet
    return nearest[:, 0].reshape(shape), merged.reshape(shape), obliqueness.reshape(shape), brightness


def _cytoplasm(brightness: Field, cell: npt.NDArray[np.intp], generator: np.random.Generator) -> Field:
    shape = (cell.shape[0], cell.shape[1], cell.shape[2])
    grain = generator.standard_normal(shape)
    grain = ndimage.gaussian_filter(grain, (0.0, 1.6, 1.6)) * (2.0 * math.sqrt(math.pi) * 1.6)
    cloud = smooth_noise(shape, (1.5, 12, 12), generator)
    cytoplasm: Field = brightness[cell] + 0.06 * grain + 0.035 * cloud
    return cytoplasm


def _walls(depth: Field, obliqueness: Field, generator: np.random.Generator) -> Field:
    """Darkness of the membranes and of the smudges.

    Args:
        depth: distance to the wall in units of half the mean thickness.
        obliqueness: tangent of the wall's lean.
        generator: source of the random contrast, displacement and smudges.
    """
    shape = (depth.shape[0], depth.shape[1], depth.shape[2])
    contrast = 0.38 * np.clip(0.95 + 0.26 * smooth_noise(shape, (1.5, 16, 16), generator), 0.15, 1.3)
    jitter = 0.18 * smooth_noise(shape, (1, 6, 6), generator)
    width = np.hypot(0.80, 0.30 * np.minimum(obliqueness, 3.0))
    line = contrast * np.sqrt(0.80 / width) * np.exp(-np.square((depth + jitter) / width))
    smudge = np.maximum(smooth_noise(shape, (1.5, 14, 14), generator) - 1.0, 0.0)
    return line + 0.24 * smudge * (0.35 + 0.65 * np.exp(-np.square(depth / 2.5)))


def _organelles(depth: Field, generator: np.random.Generator) -> Field:
    """Darkness of mitochondria and vesicles, which keep clear of the walls."""
    count, size, _ = depth.shape
    darkness = np.zeros(depth.shape)
    area = size * size / 192.0**2

    for _ in range(generator.poisson(1.6 * area * (count + 3))):
        z = generator.uniform(-1.5, count + 0.5)
        centre = generator.uniform(0.0, size, 2)
        reach = generator.uniform(1.2, 3.0)  # slices above and below
        radii = (generator.uniform(9.0, 17.0), generator.uniform(6.0, 10.0))
        angle, phase = generator.uniform(0.0, 2.0 * math.pi, 2)
        strength = generator.uniform(0.7, 1.2)
        for index in range(max(0, math.ceil(z - reach)), min(count, math.floor(z + reach) + 1)):
            shrink = math.sqrt(max(1.0 - ((index - z) / reach) ** 2, 0.05))
            middle = centre + generator.normal(0.0, 1.0, 2)
            rows, columns, y, x = _window(middle, 1.4 * max(radii), size)
            along = math.cos(angle) * x + math.sin(angle) * y
            across = math.cos(angle) * y - math.sin(angle) * x
            radius = np.hypot(along / (radii[0] * shrink), across / (radii[1] * shrink))
            rim = 0.22 * np.exp(-np.square((radius - 0.92) / 0.16))
            folds = 0.06 * (1.0 + np.sin(along * 1.1 + phase + 0.6 * np.sin(across * 0.5)))
            inside = (0.09 + folds) / (1.0 + np.exp((radius - 0.95) / 0.06))
            stamp = strength * (rim + inside)
            target = darkness[index, rows, columns]
            np.maximum(target, stamp, out=target)

    for index in range(count):
        for _ in range(generator.poisson(55 * area)):
            centre = generator.uniform(0.0, size, 2)
            radius_px = generator.uniform(1.0, 3.8)
            strength = generator.uniform(0.15, 0.42)
            rows, columns, y, x = _window(centre, radius_px + 4.0, size)
            ring = strength * np.exp(-np.square((np.hypot(y, x) - radius_px) / 1.1))
            target = darkness[index, rows, columns]
            np.maximum(target, ring, out=target)

    return darkness / (1.0 + np.exp(-(depth - 1.5) / 0.15))


def _window(centre: Field, reach: float, size: int) -> tuple[slice, slice, Field, Field]:
    """The pixels within reach of a centre: slices into an image, and coordinates relative to the centre."""
    low = np.clip(np.floor(centre - reach), 0, size).astype(int)
    high = np.clip(np.ceil(centre + reach) + 1, 0, size).astype(int)
    y = np.arange(low[0], high[0], dtype=float)[:, np.newaxis] - centre[0]
    x = np.arange(low[1], high[1], dtype=float)[np.newaxis, :] - centre[1]
    return slice(low[0], high[0]), slice(low[1], high[1]), y, x


def _microscope(image: Field, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """Shading, blur, shot noise and 8-bit rounding."""
    count, size, _ = image.shape
    gain = (
        1.0
        + 0.07 * generator.standard_normal((count, 1, 1))
        + 0.06 * smooth_noise((count, size, size), (1, 90, 90), generator)
    )
    image = ndimage.gaussian_filter(image * gain, (0.0, 0.6, 0.6))
    electrons = 30.0  # per pixel at full brightness
    image = generator.poisson(np.clip(image, 0.02, 1.5) * electrons) / electrons
    image = ndimage.gaussian_filter(image, (0.0, 0.62, 0.62))
    rounded: npt.NDArray[np.float32] = (np.rint(np.clip(image, 0.0, 1.0) * 255.0) / 255.0).astype(np.float32)
    return rounded
