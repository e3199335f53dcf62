"""Frequency bands against numpy's FFT, known sines and Parseval's theorem; edges against numpy.gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from monai_unetq.metrics import band_power, band_ratio, band_share, edge_strength

ALL = (0.0, math.inf)
images = hnp.arrays(
    np.int16, hnp.array_shapes(min_dims=2, max_dims=4, max_side=7), elements=st.integers(-1000, 1000)
).map(lambda array: array / 8)


def windowed(channel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The channel without its mean times the window, and the window."""
    window = np.ones(())
    for size in channel.shape:
        window = np.multiply.outer(window, 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(size) + 0.5) / size))
    return (channel - channel.mean()) * window, window


def power_by_numpy(channel: np.ndarray, edges: tuple[float, ...]) -> list[float]:
    """The definition, on the whole spectrum."""
    signal, window = windowed(channel)
    power = np.abs(np.fft.fftn(signal)) ** 2 / (signal.size * (window**2).sum())
    grids = np.meshgrid(*(np.fft.fftfreq(size) for size in channel.shape), indexing="ij")
    radius = np.sqrt(sum(grid**2 for grid in grids))
    sums = []
    for low, high in pairwise(edges):
        inside = (radius >= low - 1e-12) & (
            (radius < high - 1e-12) | (high == edges[-1]) & (radius <= high + 1e-12)
        )
        sums.append(float(power[inside].sum()))
    return sums


@given(
    image=images, edges=st.sampled_from([(0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2), (0.0, 0.25, 0.9), (0.1, 0.3)])
)
def test_bands_are_those_of_the_whole_spectrum(image: np.ndarray, edges: tuple[float, ...]) -> None:
    out = band_power(torch.from_numpy(image), edges)
    assert out.dtype == torch.float64
    assert out.shape == (image.shape[0], len(edges) - 1)
    expected = np.array([power_by_numpy(channel, edges) for channel in image])
    assert np.allclose(out.numpy(), expected, rtol=1e-9, atol=1e-9)


@given(image=images)
def test_all_frequencies_give_the_weighted_variance(image: np.ndarray) -> None:
    expected = []
    for channel in image:
        signal, window = windowed(channel)
        expected.append((signal**2).sum() / (window**2).sum())
    assert np.allclose(band_power(torch.from_numpy(image), ALL)[:, 0].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("cycles", "band"), [(2, 0), (6, 1), (12, 2), (24, 3)])
@pytest.mark.parametrize("other_axes", [(), (64,), (32, 32)])
def test_a_sine_lies_in_its_band(cycles: int, band: int, other_axes: tuple[int, ...]) -> None:
    # 64 pixels: 1/32, 3/32, 3/16 and 3/8 cycles per pixel. The window spreads a line over one bin either side.
    sine = torch.sin(2 * math.pi * cycles * torch.arange(64) / 64)
    image = sine.reshape(1, 64, *(1 for _ in other_axes)).expand(1, 64, *other_axes)
    assert band_share(image)[0, band].item() > 0.98
    assert band_power(image, ALL).item() == pytest.approx(0.5, rel=1e-5)


def test_a_slanted_wave_has_the_length_of_its_frequency() -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    wave = torch.cos(2 * math.pi * (12 * y + 16 * x) / 64)  # |k| = 20/64
    share = band_share(wave[None], (0, 17 / 64, 23 / 64, math.inf))
    assert share[0].tolist() == pytest.approx([0, 1, 0], abs=1e-6)


def test_the_highest_frequency_belongs_to_the_last_band() -> None:
    alternating = torch.tensor([1.0, -1.0]).repeat(16)[None]
    assert band_share(alternating)[0, -1].item() == pytest.approx(1)


@given(image=images)
def test_shares_are_parts_of_one(image: np.ndarray) -> None:
    share = band_share(torch.from_numpy(image), (0, 0.2, 0.4, math.inf))
    assert bool(((share >= 0) & (share <= 1 + 1e-12)).all())
    varied = np.array([np.ptp(channel) > 0 for channel in image])
    assert np.allclose(share.sum(1).numpy(), varied.astype(float))


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.3, 1e30])
def test_a_constant_has_exactly_no_power(value: float) -> None:
    image = torch.full((2, 37, 41), value, dtype=torch.float64)
    assert (band_power(image) == 0).all()
    assert (band_share(image) == 0).all()


def test_nan_stays_in_its_channel() -> None:
    image = torch.rand(2, 8, 8)
    image[0, 3, 3] = torch.nan
    share = band_share(image)
    assert share[0].isnan().all()
    assert share[1].isfinite().all()


def test_channels_are_alone() -> None:
    image = torch.rand(3, 8, 9)
    assert torch.allclose(band_share(image)[1:2], band_share(image[1:2]))


@pytest.mark.parametrize("measure", [band_power, edge_strength])
def test_measures_can_be_trained_on(measure: Callable[..., torch.Tensor]) -> None:
    image = torch.zeros(1, 4, 4, dtype=torch.float64)
    image[0, 1, 2] = 1
    image.requires_grad_(True)
    measure(image).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0


def test_ratio_says_what_is_kept() -> None:
    n = torch.arange(64, dtype=torch.float64)
    low, high = torch.sin(2 * math.pi * 2 * n / 64), torch.sin(2 * math.pi * 24 * n / 64)
    ratio = band_ratio((low + 0.5 * high)[None], (low + high)[None], (0, 0.25, 0.5))
    assert ratio[0].tolist() == pytest.approx([1, 0.25])
    assert band_ratio(low[None], low[None], (0, 0.25, 0.5))[0].isnan().tolist() == [False, True]


@given(image=images)
def test_ratio_to_itself_is_one_or_nothing(image: np.ndarray) -> None:
    ratio = band_ratio(torch.from_numpy(image), torch.from_numpy(image))
    assert bool(((ratio == 1) | ratio.isnan()).all())


def test_coarser_rounding_adds_power_at_high_frequencies() -> None:
    n = torch.arange(256) / 256
    smooth = (0.45 + 0.4 * torch.sin(2 * math.pi * 3.3 * n) * n)[None]
    fine, coarse = ((smooth * levels).round() / levels for levels in (256, 8))
    kept = [band_ratio(rounded, smooth)[0] for rounded in (fine, coarse)]
    assert kept[0][0].item() == pytest.approx(1, abs=0.01)
    assert kept[1][-1] > 10 * kept[0][-1] > 10


@given(image=images)
def test_edges_are_numpys_gradients(image: np.ndarray) -> None:
    axes = [axis for axis in range(1, image.ndim) if image.shape[axis] > 1]
    gradients = [np.gradient(image, axis=axis) for axis in axes]
    expected = np.sqrt(sum((g**2 for g in gradients), np.zeros_like(image)))
    out = edge_strength(torch.from_numpy(image))
    assert out.dtype == torch.float64
    assert np.allclose(out.numpy(), expected)


def test_edges_by_hand() -> None:
    step = torch.tensor([[[0, 0, 8, 8], [0, 0, 8, 8]]], dtype=torch.uint8)
    assert edge_strength(step).tolist() == [[[0, 4, 4, 0], [0, 4, 4, 0]]]
    slope = torch.tensor([[[0.0, 3.0], [4.0, 7.0]]])
    assert edge_strength(slope).tolist() == [[[5, 5], [5, 5]]]
    assert edge_strength(slope).dtype == torch.float32


@pytest.mark.parametrize("measure", [band_power, band_share, edge_strength])
@pytest.mark.parametrize(
    "image",
    [torch.ones(4), torch.ones(1, 1, 4, 4, 4), torch.ones(1, 0), torch.ones(1, 4, dtype=torch.complex64)],
)
def test_what_is_no_image_is_refused(measure: Callable[..., Any], image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"found shape .*; expected real numbers in shape \(C, spatial…\)"):
        measure(image)


def test_ratio_needs_one_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4\), its reference \(1, 5\)"):
        band_ratio(torch.ones(1, 4), torch.ones(1, 5))


@pytest.mark.parametrize("edges", [(), (0.1,), (0.2, 0.1), (-0.1, 0.2), (math.nan, 1.0)])
def test_edges_must_ascend(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending frequencies"):
        band_power(torch.ones(1, 4), edges)
