"""``VolumeWriter``: MONAI's NIfTI writer, but a volume of one slice stays a volume."""

from __future__ import annotations

from typing import Any

from monai.config import NdarrayOrTensor
from monai.data import NibabelWriter

__all__ = ["VolumeWriter"]


class VolumeWriter(NibabelWriter):
    """Writer for ``SaveImaged`` of segmentations with one channel, as NIfTI.

    MONAI's own drops every trailing axis of length one with the channel's, so that a volume (1, W, H, 1) becomes an
    image (W, H) without a third axis, which no longer fits the volume that it segments.
    """

    def set_data_array(
        self,
        data_array: NdarrayOrTensor,
        channel_dim: int | None = 0,
        squeeze_end_dims: bool = True,
        **kwargs: Any,
    ) -> None:
        """Take (1, W, H, D), channel first.

        Raises:
            ValueError: if there is more than one channel.
        """
        if data_array.shape[0] != 1:
            raise ValueError(f"found shape {tuple(data_array.shape)}, expected one channel, in front")
        super().set_data_array(data_array, channel_dim=0, squeeze_end_dims=False, **kwargs)
        self.data_obj = self.data_obj[..., 0]
