"""Where an image or a feature map has its power: radial frequency bands, what a quantized version keeps of them,
and the strength of edges. Pure torch functions, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["FREQUENCY_EDGES", "band_power", "band_ratio", "band_share", "check_edges", "edge_strength"]

FREQUENCY_EDGES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Default edges of the bands, in cycles per pixel: one octave each, and everything below 1/16."""


def band_power(image: Tensor, edges: Sequence[float] = FREQUENCY_EDGES) -> Tensor:
    r"""Spectral power of each channel in radial frequency bands.

    With :math:`u = x - \bar{x}` (the channel without its mean), the window
    :math:`w = \prod_d \sin^2(\pi (n_d + 1/2) / N_d)` (Hann's, centred between the pixels; Harris, 1978, section
    V.C) and :math:`U` the discrete Fourier transform of :math:`w u` over N pixels, the power at frequency k is

    .. math:: P(k) = \frac{|U(k)|^2}{N \sum w^2}

    and a band is the sum of P over :math:`e_b \le |k| < e_{b+1}`, the last one with its upper edge. By
    Parseval's theorem all frequencies together give :math:`\sum (w u)^2 / \sum w^2`, the variance of the channel
    weighted by :math:`w^2`. |k| is the Euclidean length of the frequency in cycles per pixel, whatever the
    spacing: along an axis it ends at 1/2, in the corners of a plane at 0.71, of a volume at 0.87.

    Args:
        image: shape (C, spatial…), one to three spatial axes, real. For features (N, C, spatial…) give
            ``features.flatten(0, 1)``.
        edges: ascending, at least two, the first not negative; the last may be ``math.inf``.

    Returns:
        shape (C, len(edges) - 1), float64, squared units of the image. A constant channel has exactly 0
        everywhere; one that holds NaN or infinity has NaN everywhere. Differentiable.

    Raises:
        ValueError: the image has no channel axis or not one to three spatial ones, no pixels, complex values,
            or the edges are not ascending.
    """
    check_edges(edges)
    _check_image("band_power", image)
    power, radius = _spectrum(image)
    return _sum_bands(power, radius, edges)


def band_share(image: Tensor, edges: Sequence[float] = FREQUENCY_EDGES) -> Tensor:
    """The part of a channel's power that lies in each band: :func:`band_power` over the power of all frequencies.

    Args:
        image: as in :func:`band_power`.
        edges: as in :func:`band_power`.

    Returns:
        shape (C, len(edges) - 1), float64, in [0, 1]. The sum is at most 1, less by what lies outside the edges
        (with the default ones, the corners of the spectrum beyond 1/2). A constant channel has 0 everywhere.

    Raises:
        ValueError: as :func:`band_power`.
    """
    check_edges(edges)
    _check_image("band_share", image)
    power, radius = _spectrum(image)
    total = power.flatten(1).sum(1, keepdim=True)
    return _sum_bands(power, radius, edges) / torch.where(total == 0, 1.0, total)


def band_ratio(image: Tensor, reference: Tensor, edges: Sequence[float] = FREQUENCY_EDGES) -> Tensor:
    """How much of each band's power of a reference an image keeps: the quotient of the two :func:`band_power`.

    1 where the band is kept, less where detail is lost, more where noise (of rounding, say) was added to it.

    Args:
        image: as in :func:`band_power`; for instance a skip connection's features of a quantized network.
        reference: of the same shape; for instance the same features of the float network.
        edges: as in :func:`band_power`.

    Returns:
        shape (C, len(edges) - 1), float64; NaN where the reference has nothing to keep: less than 2^-52 of its
        channel's power, which is rounding noise.

    Raises:
        ValueError: as :func:`band_power`, or the shapes differ.
    """
    if image.shape != reference.shape:
        raise ValueError(
            f"band_ratio: the image has shape {tuple(image.shape)}, its reference {tuple(reference.shape)}; expected "
            "the same. Compare the same features of both networks, on the same input"
        )
    check_edges(edges)
    _check_image("band_ratio", reference)
    power, radius = _spectrum(reference)
    noise = torch.finfo(power.dtype).eps * power.flatten(1).sum(1, keepdim=True)
    expected = _sum_bands(power, radius, edges)
    return band_power(image, edges) / torch.where(expected <= noise, math.nan, expected)


def edge_strength(image: Tensor) -> Tensor:
    r"""Magnitude of the gradient of each channel, :math:`\sqrt{\sum_d (\partial_d x)^2}`.

    Central differences, :math:`(x_{n+1} - x_{n-1}) / 2`, and one-sided ones, :math:`x_1 - x_0`, at the border, as
    in :func:`numpy.gradient`. In grey values per pixel, whatever the spacing.

    Args:
        image: shape (C, spatial…), one to three spatial axes, real. An axis of one pixel has no gradient.

    Returns:
        the same shape; float64 for a float64 image, else float32. Differentiable.

    Raises:
        ValueError: the image has no channel axis or not one to three spatial ones, no pixels, or complex values.
    """
    _check_image("edge_strength", image)
    image = image if image.dtype == torch.float64 else image.to(torch.float32)
    axes = [axis for axis in range(1, image.dim()) if image.shape[axis] > 1]
    if not axes:
        return torch.zeros_like(image)
    squared = torch.zeros_like(image)
    for slope in torch.gradient(image, dim=axes):
        squared = squared + slope.square()
    flat = squared == 0  # where the square root has no derivative, the gradient is 0
    return squared.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)


def check_edges(edges: Sequence[float]) -> None:
    """Check that edges of frequency bands ascend.

    Raises:
        ValueError: fewer than two, a negative or NaN one, or not strictly ascending.
    """
    ascending = all(low < high for low, high in pairwise(edges))
    if len(edges) < 2 or not ascending or not edges[0] >= 0:
        raise ValueError(
            f"the edges of the frequency bands are {tuple(edges)}; expected at least two ascending frequencies from 0 "
            f"on, in cycles per pixel, such as {FREQUENCY_EDGES}"
        )


def _check_image(name: str, image: Tensor) -> None:
    if image.dim() not in (2, 3, 4) or image.numel() == 0 or image.is_complex():
        raise ValueError(
            f"{name}: found shape {tuple(image.shape)} of type {image.dtype}; expected real numbers in shape "
            "(C, spatial…) with one to three spatial axes and at least one pixel. For features (N, C, spatial…) give "
            "features.flatten(0, 1)"
        )


def _spectrum(image: Tensor) -> tuple[Tensor, Tensor]:
    """P(k) of shape (C, …, N // 2 + 1) for half of the frequencies, each with its mirror image, and their |k|."""
    sizes, axes = image.shape[1:], list(range(1, image.dim()))
    # Less the first pixel first: then a constant channel is exactly 0, which its rounded mean would not give.
    centred = image.to(torch.float64)
    centred = centred - centred.flatten(1)[:, :1].reshape(-1, *[1] * len(sizes))
    centred = centred - centred.mean(axes, keepdim=True)

    energy = 1.0
    squared_radius = torch.zeros((), dtype=torch.float64, device=image.device)
    for axis, size in zip(axes, sizes, strict=True):
        shape = [-1 if other == axis else 1 for other in axes]
        pixel = torch.arange(size, dtype=torch.float64, device=image.device)
        window = torch.sin(math.pi * (pixel + 0.5) / size) ** 2
        centred = centred * window.reshape(shape)
        energy *= float((window**2).sum())
        frequency = torch.minimum(pixel, size - pixel) / size
        kept = frequency if axis != axes[-1] else frequency[: size // 2 + 1]
        squared_radius = squared_radius + kept.reshape(shape) ** 2

    power = torch.fft.rfftn(centred, dim=axes).abs() ** 2 / (math.prod(sizes) * energy)
    # Along the last axis a frequency stands for its mirror image too, except 0 and, where there is one, N / 2.
    mirrored = torch.full((power.shape[-1],), 2.0, dtype=torch.float64, device=image.device)
    mirrored[0] = 1.0
    if sizes[-1] % 2 == 0:
        mirrored[-1] = 1.0
    return power * mirrored, squared_radius.sqrt()


def _sum_bands(power: Tensor, radius: Tensor, edges: Sequence[float]) -> Tensor:
    sums = []
    for low, high in pairwise(edges):
        below = radius <= high if high == edges[-1] else radius < high
        sums.append(power[:, (radius >= low) & below].sum(1))
    return torch.stack(sums, dim=1)
