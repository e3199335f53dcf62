"""``split``: every convolution over a concatenation of skips and an upsampled path becomes a split convolution."""

from __future__ import annotations

import logging
from typing import cast

from torch import Tensor, nn

from ..layers import QuantizedLayer, SplitLayer, split_layer
from .skips import find_skips
from .supervise import refuse_supervised

__all__ = ["split"]

logger = logging.getLogger(__name__)


def split(network: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Turn every convolution over a concatenation of skips and an upsampled path into a split one, in place.

    The network computes the same, bit for bit, and keeps its parameters, their names and its checkpoints: a split
    convolution is the same object that knows the parts of its input channels. ``quantize`` gives each part of its
    input and of its weight a quantizer of its own. What cannot be split is left alone and logged; ``find_skips`` says
    what there is. Split again, nothing changes.

    Args:
        network: float; any ``nn.Module``.
        example: an input that the network accepts; found out from its first convolution by default.

    Returns:
        the network.

    Raises:
        ValueError: if a layer that is to be split is quantized already, or is split into other parts, or the network
            fails on the example or has supervision heads; nothing is changed then.
    """
    refuse_supervised(network, "split")
    modules = dict(network.named_modules())
    found = find_skips(network, example)
    for entry in found.splittable:
        module = modules[entry.layer]
        if isinstance(module, QuantizedLayer) and not module.parts:
            raise ValueError(
                f"split: layer '{entry.layer}' is quantized already, with one format for all its channels: split first, "
                "then quantize (dequantize takes the quantizers out again)"
            )
        if isinstance(module, (SplitLayer, QuantizedLayer)):
            there, here = ([(p.name, p.channels) for p in parts] for parts in (module.parts, entry.parts))
            if there != here:
                raise ValueError(f"split: layer '{entry.layer}' is split into {there} already, found {here}")
    for entry in found:
        module = modules.get(entry.layer, network)
        if entry.reason:
            logger.info("'%s' is not split: %s", entry.layer or type(network).__name__, entry.reason)
        elif not isinstance(module, (SplitLayer, QuantizedLayer)):
            split_layer(cast(nn.Module, module), entry.parts)
    return network
