"""Edge strength and frequency bands of images, as transforms over :mod:`monai_unetq.metrics.spectral`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import Transform

from ..metrics.spectral import FREQUENCY_EDGES, band_share, check_edges, edge_strength
from .beside import BesideTransform
from .tracking import BACKENDS, channel_first, like

__all__ = [
    "EdgeStrength",
    "EdgeStrengthD",
    "EdgeStrengthDict",
    "EdgeStrengthd",
    "FrequencyBands",
    "FrequencyBandsD",
    "FrequencyBandsDict",
    "FrequencyBandsd",
]


class EdgeStrength(Transform):
    """Gradient magnitude of each channel, see :func:`monai_unetq.metrics.edge_strength`."""

    backend = BACKENDS

    def __call__(self, img: NdarrayOrTensor) -> torch.Tensor:
        """Edge strength of ``img``.

        Args:
            img: shape (C, spatial…), one to three spatial axes, real numbers.

        Returns:
            the same shape, float32 (float64 for a float64 image), in grey values per pixel.

        Raises:
            TypeError: ``img`` is not an array or tensor of real numbers.
            ValueError: its shape is not (C, spatial…).
        """
        tracked, image = channel_first("EdgeStrength", img)
        return like(edge_strength(image), tracked)


class FrequencyBands(Transform):
    """Share of each channel's spectral power in radial bands, see :func:`monai_unetq.metrics.band_share`.

    Args:
        bands: edges of the bands in cycles per pixel, ascending from 0 on.

    Raises:
        ValueError: the edges are not ascending, or fewer than two.
    """

    backend = BACKENDS

    def __init__(self, bands: Sequence[float] = FREQUENCY_EDGES) -> None:
        check_edges(bands)
        self.bands = tuple(float(edge) for edge in bands)

    def __call__(self, img: NdarrayOrTensor) -> torch.Tensor:
        """Band shares of ``img``.

        Args:
            img: shape (C, spatial…), one to three spatial axes, real numbers.

        Returns:
            shape (C, len(bands) - 1), float32; 0 for a constant channel, NaN for one that holds NaN.

        Raises:
            TypeError: ``img`` is not an array or tensor of real numbers.
            ValueError: its shape is not (C, spatial…).
        """
        tracked, image = channel_first("FrequencyBands", img)
        return like(band_share(image, self.bands).to(torch.float32), tracked)


class EdgeStrengthd(BesideTransform):
    """Dictionary version of :class:`EdgeStrength`: the edges of ``image`` go to ``image_edge``.

    Args:
        keys: the images; see :class:`monai.transforms.MapTransform`.
        output_postfix: the new key is ``{key}_{output_postfix}``.
        allow_missing_keys: pass over keys that are absent instead of raising ``KeyError``.
    """

    backend = EdgeStrength.backend

    def __init__(
        self, keys: KeysCollection, output_postfix: str = "edge", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, EdgeStrength(), output_postfix, allow_missing_keys)


class FrequencyBandsd(BesideTransform):
    """Dictionary version of :class:`FrequencyBands`: the shares of ``image`` go to ``image_bands``.

    Args:
        keys: the images; see :class:`monai.transforms.MapTransform`.
        bands: see :class:`FrequencyBands`.
        output_postfix: the new key is ``{key}_{output_postfix}``.
        allow_missing_keys: pass over keys that are absent instead of raising ``KeyError``.
    """

    backend = FrequencyBands.backend

    def __init__(
        self,
        keys: KeysCollection,
        bands: Sequence[float] = FREQUENCY_EDGES,
        output_postfix: str = "bands",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, FrequencyBands(bands), output_postfix, allow_missing_keys)


EdgeStrengthD = EdgeStrengthDict = EdgeStrengthd
FrequencyBandsD = FrequencyBandsDict = FrequencyBandsd
