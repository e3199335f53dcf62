"""Rounds images to a fixed-point format, so that the data path is fixed point from the image on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform

from ..formats import QFormat
from .tracking import BACKENDS, channel_first, like

__all__ = ["QuantizeIntensity", "QuantizeIntensityD", "QuantizeIntensityDict", "QuantizeIntensityd"]


class QuantizeIntensity(InvertibleTransform):
    r"""Round an image to a fixed-point number format.

    A value x becomes :math:`s \cdot \mathrm{clamp}(\mathrm{round}(x / s), q_{min}, q_{max})` with step
    :math:`s = 2^{-f}`, rounding half to even: bit for bit what
    :func:`monai_unetq.quantizers.fake_quantize` gives. ±inf saturates.

    Float32 and float64 images are rounded in their own type and keep it; all others (integers, bool, half
    precision) become float32, which holds every code exactly. The result is a MetaTensor while MONAI tracks
    metadata, else a tensor.

    Rounding has no inverse: for values, ``inverse`` returns what it is given. With ``codes`` it turns integer
    codes back to float32 values. It also does so to a prediction that ``Invertd`` passes through it: there,
    invert the spatial transforms only.

    Args:
        number_format: a fixed-point format such as ``"UQ0.8"`` or ``"Q3.4"``.
        codes: give integer codes, x / s, instead of values: int16 where the format's range fits, else int32.

    Raises:
        ValueError: the format is not fixed point: its scale is left to calibration (``int8``), it is float, or
            it does not saturate (``Q0.4:literal``); or it is no format at all.
    """

    backend = BACKENDS

    def __init__(self, number_format: str | QFormat, codes: bool = False) -> None:
        self.number_format = number_format if isinstance(number_format, QFormat) else QFormat(number_format)
        if self.number_format.kind != "fixed":
            raise ValueError(
                f"QuantizeIntensity: the format is {str(self.number_format)!r}; an image needs one with a fixed "
                "step that saturates. Give Q<i>.<f> or UQ<i>.<f>, such as 'UQ0.8' for an image in [0, 1]"
            )
        self.codes = codes

    def __call__(self, img: NdarrayOrTensor) -> torch.Tensor:
        """Round ``img``.

        Args:
            img: shape (C, spatial…), one to three spatial axes, real numbers.

        Returns:
            the same shape. Values: NaN stays NaN. Codes: int16 or int32.

        Raises:
            TypeError: ``img`` is not an array or tensor of real numbers.
            ValueError: its shape is not (C, spatial…), or it holds NaN and ``codes`` is set.
        """
        tracked, image = channel_first("QuantizeIntensity", img)
        if image.dtype not in (torch.float32, torch.float64):
            image = image.to(torch.float32)
        if self.codes and (missing := int(image.isnan().sum())):
            raise ValueError(
                f"QuantizeIntensity: {missing} of {image.numel()} values are NaN, which has no code in "
                f"{self.number_format}; expected numbers. Replace them, or leave codes=False to keep NaN"
            )
        form = self.number_format
        codes = torch.mul(image, 2.0**form.fraction_bits).round_().clamp_(form.qmin, form.qmax)
        if not self.codes:
            return like(codes.mul_(self.step), tracked)
        quantized = like(codes.to(self.code_dtype), tracked)
        if isinstance(quantized, MetaTensor):
            self.push_transform(quantized)
        return quantized

    def inverse(self, data: NdarrayOrTensor) -> NdarrayOrTensor:
        """Codes back to values, float32 of the same shape; without ``codes``, ``data`` as it is."""
        if not self.codes:
            return data
        tracked, codes = channel_first("QuantizeIntensity.inverse", data)
        values = like(codes.to(torch.float32).mul_(self.step), tracked)
        if isinstance(data, MetaTensor) and isinstance(values, MetaTensor):
            self.pop_transform(values)
        return values

    @property
    def step(self) -> float:
        """Distance of neighbouring values, 2^-f."""
        return 2.0**-self.number_format.fraction_bits

    @property
    def code_dtype(self) -> torch.dtype:
        """The type of the codes: int16 where the format's range fits, else int32."""
        short = np.iinfo(np.int16)
        fits = short.min <= self.number_format.qmin and self.number_format.qmax <= short.max
        return torch.int16 if fits else torch.int32


class QuantizeIntensityd(MapTransform, InvertibleTransform):
    """Dictionary version of :class:`QuantizeIntensity`.

    Args:
        keys: the images to round; see :class:`monai.transforms.MapTransform`.
        number_format: see :class:`QuantizeIntensity`.
        codes: see :class:`QuantizeIntensity`.
        allow_missing_keys: pass over keys that are absent instead of raising ``KeyError``.
    """

    backend = QuantizeIntensity.backend

    def __init__(
        self,
        keys: KeysCollection,
        number_format: str | QFormat,
        codes: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.quantizer = QuantizeIntensity(number_format, codes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``data`` with every image of ``keys`` rounded."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.quantizer(d[key])
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``data`` with the codes of every key turned back to values."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.quantizer.inverse(d[key])
        return d


QuantizeIntensityD = QuantizeIntensityDict = QuantizeIntensityd
