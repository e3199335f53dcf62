"""Dictionary transforms that write what they compute beside its source, under ``{key}_{output_postfix}``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform

__all__ = ["BesideTransform"]


class BesideTransform(MapTransform):
    """Writes ``transform(data[key])`` to ``{key}_{output_postfix}`` for every key; the source stays.

    Args:
        keys: see :class:`monai.transforms.MapTransform`.
        transform: the array transform.
        output_postfix: what follows the key and an underscore.
        allow_missing_keys: pass over keys that are absent instead of raising ``KeyError``.
    """

    def __init__(
        self,
        keys: KeysCollection,
        transform: Callable[[NdarrayOrTensor], torch.Tensor],
        output_postfix: str,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = transform
        self.output_postfix = output_postfix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``data`` with the result of every key beside it."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_{self.output_postfix}"] = self.transform(d[key])
        return d
