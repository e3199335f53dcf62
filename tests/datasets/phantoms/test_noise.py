"""Smooth noise: of unit variance everywhere, smooth over its scale and not beyond it."""

from __future__ import annotations

import numpy as np
import pytest

from monai_unetq.datasets.phantoms.noise import Field, smooth_noise


def fields(shape: tuple[int, ...], scale: tuple[float, ...], number: int) -> Field:
    generator = np.random.default_rng(0)
    return np.stack([smooth_noise(shape, scale, generator) for _ in range(number)])


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 9), (2, 3, 4)])
def test_shape_and_type(shape: tuple[int, ...]) -> None:
    field = smooth_noise(shape, (3.0,) * len(shape), np.random.default_rng(0))
    assert field.shape == shape
    assert field.dtype == np.float64


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5, 6.0])
def test_zero_mean_and_unit_variance_at_every_sample(scale: float) -> None:
    samples = fields((12,), (scale,), 4000)
    np.testing.assert_allclose(samples.mean(axis=0), 0.0, atol=0.08)  # 5 standard errors
    np.testing.assert_allclose(samples.std(axis=0), 1.0, atol=0.06)


def test_neighbours_within_the_scale_are_alike_and_those_beyond_are_not() -> None:
    samples = fields((60, 60), (1.0, 10.0), 200)
    products = {lag: float((samples[..., lag:] * samples[..., : 60 - lag]).mean()) for lag in (1, 5, 45)}
    assert products[1] > 0.97
    assert 0.6 < products[5] < 0.95
    assert abs(products[45]) < 0.05  # cubic B-splines four lattice steps apart share no number
    assert float((samples[:, 5:] * samples[:, :-5]).mean()) < 0.05  # the other axis has its own scale


def test_only_the_given_generator_counts() -> None:
    np.random.seed(1)
    first = smooth_noise((4, 5), (2.0, 2.0), np.random.default_rng(3))
    np.random.seed(2)
    np.testing.assert_array_equal(first, smooth_noise((4, 5), (2.0, 2.0), np.random.default_rng(3)))
