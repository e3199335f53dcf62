"""``calibrate``: find every scale that the formats leave open, from batches of training data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..quantizers import RangeMethod, RangeObserver
from .observe import evaluating, observe
from .quantize import quantized_layers
from .rescale import rescale
from .tie import tie_layer

__all__ = ["calibrate", "image_of"]


def image_of(batch: Any) -> Tensor:
    """The image of a batch: the tensor itself, the first of a sequence, or ``batch["image"]``.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(batch, Mapping) and "image" in batch:
        batch = batch["image"]
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ValueError(f"a batch is a tensor, a sequence that begins with one, or a dictionary with 'image'; found {type(batch).__name__}")  # fmt: skip
    return batch.as_tensor() if hasattr(batch, "as_tensor") else batch


@torch.no_grad()
def calibrate(
    network: nn.Module, batches: Iterable[Any], method: RangeMethod = "mse", *, tied: bool = True
) -> nn.Module:
    """Fit a quantized network to its formats, in place, from a few batches of *training* data.

    Scales of ``intN`` activations, outputs and weights are set from the values seen; those of a split convolution's parts then meet
    on one grid (``tie``) where they are powers of two. Static formats have no scale to set:
    there the network is rescaled to the formats, by powers of two in its paired batch norms (``surgery.rescale``).

    Args:
        network: quantized; its mode is kept.
        batches: tensors (N, C, …), or batches with the image first or under ``"image"``; at least one.
        method: ``"mse"`` least squared rounding error, ``"minmax"`` the whole range, ``"percentile"`` 99.9 %.
        tied: whether power-of-two scales of parts meet; False measures each tensor's own rounding.

    Returns:
        the network.

    Raises:
        ValueError: if the network is not quantized, there is no batch, or the data holds NaN or infinity;
            nothing is changed then.
    """
    if method not in get_args(RangeMethod):
        raise ValueError(f"range method {method!r} is unknown, expected one of {get_args(RangeMethod)}")
    layers = quantized_layers(network)
    if not layers:
        raise ValueError(f"{type(network).__name__} is not quantized: call quantize(network, plan) first")
    device = next(network.parameters()).device
    observers = {
        name: {part: RangeObserver() for part in layer.input_quantizers} for name, layer in layers.items()
    }
    outputs = {name: q for name, layer in layers.items() if (q := layer.output_quantizer) is not None}
    output_observers = {name: RangeObserver() for name in outputs}
    example: Tensor | None = None
    try:
        for name, layer in layers.items():
            for part, quantizer in layer.input_quantizers.items():
                quantizer.observer = observers[name][part]
        for name, quantizer in outputs.items():
            quantizer.observer = output_observers[name]
        with evaluating(network):
            for number, batch in enumerate(batches):
                image = image_of(batch).to(device)
                if not torch.isfinite(image).all():
                    raise ValueError(f"calibrate: batch {number} holds NaN or infinity: repair or exclude it")
                example = image[:1] if example is None else example
                network(image)
    finally:
        for layer in layers.values():
            for quantizer in layer.quantizers:
                quantizer.observer = None
    if example is None:
        raise ValueError("calibrate: no batch was given, expected at least one batch of training images")
    found = []
    seen_by = [
        *((n, quantizer, observers[n][p]) for n, m in layers.items() for p, quantizer in m.input_quantizers.items()),
        *((name, quantizer, output_observers[name]) for name, quantizer in outputs.items()),
    ]  # fmt: skip
    for name, quantizer, observer in seen_by:
        if quantizer.number_format.has_free_scale:
            try:
                scale = observer.scale(quantizer.number_format, method, quantizer.power_of_two)
            except ValueError as error:
                raise ValueError(f"layer '{name}': {error}") from None
            found.append((quantizer, scale))
    for quantizer, scale in found:
        quantizer.set_scale(scale)
    for layer in layers.values():
        layer.calibrate_weight(method)
        if tied and all(quantizer.power_of_two for quantizer in layer.quantizers):
            tie_layer(layer)
    quantizers = [quantizer for layer in layers.values() for quantizer in layer.quantizers]
    if any(quantizer.number_format.step is not None for quantizer in quantizers):
        seen = {
            name: {part: o.values() for part, o in by_part.items()} for name, by_part in observers.items()
        }
        rescale(network, observe(network, example), seen, method)
    return network
