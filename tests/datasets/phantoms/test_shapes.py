"""Distances against brute force, and paint against what it means."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from monai_unetq.datasets.phantoms.noise import Field
from monai_unetq.datasets.phantoms.shapes import coverage, ellipsoid, paint, tube

GRID = np.meshgrid(np.linspace(-9.0, 9.0, 25), np.linspace(-9.0, 9.0, 25), indexing="ij")
coordinate = st.floats(-8.0, 8.0)
radius = st.floats(0.5, 6.0)


def nearest(points: Field) -> Field:
    """Distance from each point of the grid to the nearest of some points."""
    distances, _ = cKDTree(points).query(np.stack([axis.ravel() for axis in GRID], axis=1))
    return np.asarray(distances, dtype=np.float64).reshape(GRID[0].shape)


@given(radius, coordinate, coordinate)
def test_a_circle_is_exact(size: float, y: float, x: float) -> None:
    distance = ellipsoid((GRID[0] - y, GRID[1] - x), (size, size))
    np.testing.assert_allclose(distance, np.hypot(GRID[0] - y, GRID[1] - x) - size, atol=1e-5)


@given(radius, radius)
def test_inside_an_ellipse_is_negative(height: float, width: float) -> None:
    distance = ellipsoid((GRID[0], GRID[1]), (height, width))
    scaled = np.square(GRID[0] / height) + np.square(GRID[1] / width)
    assert (distance[scaled < 1.0 - 1e-9] < 0.0).all()
    assert (distance[scaled > 1.0 + 1e-9] > 0.0).all()


def test_near_its_surface_the_distance_to_an_ellipse_is_right_to_first_order() -> None:
    turn = np.linspace(0.0, 2.0 * np.pi, 20_001)
    true = nearest(np.stack([4.0 * np.sin(turn), 7.0 * np.cos(turn)], axis=1))
    distance = ellipsoid((GRID[0], GRID[1]), (4.0, 7.0))
    near = true < 0.7
    assert near.sum() > 50
    np.testing.assert_allclose(np.abs(distance[near]), true[near], atol=0.08)


def test_an_ellipsoid_has_three_axes_and_radii_may_be_arrays() -> None:
    z = np.array([-1.0, 0.0, 2.0])[:, None, None]
    distance = ellipsoid((z, np.zeros((1, 2, 1)), np.zeros((1, 1, 2))), (1.5, 3.0, np.full((3, 1, 1), 4.0)))
    assert distance.shape == (3, 2, 2)
    np.testing.assert_allclose(distance[:, 0, 0], [-0.5, -1.5, 0.5])  # on an axis the distance is exact


@given(st.lists(st.tuples(coordinate, coordinate), min_size=2, max_size=4), radius)
def test_a_tube_is_a_path_with_a_radius(path: list[tuple[float, float]], size: float) -> None:
    steps = np.linspace(0.0, 1.0, 400)[:, None]
    axis = np.concatenate(
        [np.asarray(a) + steps * (np.asarray(b) - np.asarray(a)) for a, b in pairwise(path)]
    )
    distance = tube((GRID[0], GRID[1]), path, [size] * len(path))
    np.testing.assert_allclose(distance, nearest(axis) - size, atol=0.05)


def test_the_radius_of_a_tube_runs_from_point_to_point() -> None:
    x = np.array([0.0, 2.0, 4.0, 8.0])
    distance = tube((np.zeros(4), x), ((0.0, 0.0), (0.0, 4.0)), (1.0, 3.0))
    np.testing.assert_allclose(distance, [-1.0, -2.0, -3.0, 1.0])


def test_a_tube_needs_two_points() -> None:
    with pytest.raises(ValueError, match=r"1 point.*two or more"):
        tube((GRID[0], GRID[1]), ((0.0, 0.0),), (1.0,))


def test_coverage_is_the_share_of_a_pixel() -> None:
    distance = np.array([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0])  # of the centre of a pixel 2 wide
    np.testing.assert_allclose(coverage(distance, 2.0), [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_paint_mixes_in_place() -> None:
    image = np.array([10.0, 10.0, 10.0])
    paint(image, np.array([0.0, 0.5, 1.0]), 20.0)
    np.testing.assert_array_equal(image, [10.0, 15.0, 20.0])
