"""``calibrate``: find every scale that the formats leave open, from batches of training data; batch norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..layers import PairedNorm
from ..quantizers import RangeMethod, RangeObserver
from ..surgery.observe import evaluating, observe
from ..surgery.quantize import quantized_layers
from ..surgery.rescale import rescale

__all__ = ["calibrate", "freeze_norms", "image_of", "reestimate_norms"]


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
def calibrate(network: nn.Module, batches: Iterable[Any], method: RangeMethod = "mse") -> nn.Module:
    """Fit a quantized network to its formats, in place, from a few batches of *training* data.

    Scales of ``intN`` activations and weights are set from the values seen. Static formats have no scale to set:
    there the network is rescaled to the formats, by powers of two in its paired batch norms (``surgery.rescale``).

    Args:
        network: quantized; its mode is kept.
        batches: tensors (N, C, …), or batches with the image first or under ``"image"``; at least one.
        method: ``"mse"`` least squared rounding error, ``"minmax"`` the whole range, ``"percentile"`` 99.9 %.

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
    example: Tensor | None = None
    try:
        for name, layer in layers.items():
            for part, quantizer in layer.input_quantizers.items():
                quantizer.observer = observers[name][part]
        with evaluating(network):
            for number, batch in enumerate(batches):
                image = image_of(batch).to(device)
                if not torch.isfinite(image).all():
                    raise ValueError(f"calibrate: batch {number} holds NaN or infinity: repair or exclude it")
                example = image[:1] if example is None else example
                network(image)
    finally:
        for layer in layers.values():
            for quantizer in layer.input_quantizers.values():
                quantizer.observer = None
    if example is None:
        raise ValueError("calibrate: no batch was given, expected at least one batch of training images")
    found = []
    for name, layer in layers.items():
        for part, quantizer in layer.input_quantizers.items():
            if quantizer.number_format.has_free_scale:
                try:
                    scale = observers[name][part].scale(
                        quantizer.number_format, method, quantizer.power_of_two
                    )
                except ValueError as error:
                    raise ValueError(f"layer '{name}': {error}") from None
                found.append((quantizer, scale))
    for quantizer, scale in found:
        quantizer.set_scale(scale)
    for layer in layers.values():
        layer.calibrate_weight(method)
    quantizers = [quantizer for layer in layers.values() for quantizer in layer.quantizers]
    if any(quantizer.number_format.step is not None for quantizer in quantizers):
        seen = {
            name: {part: o.values() for part, o in by_part.items()} for name, by_part in observers.items()
        }
        rescale(network, observe(network, example), seen, method)
    return network


@torch.no_grad()
def reestimate_norms(network: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Set the running statistics of every batch norm to their plain average over the batches, in place.

    The statistics kept during training lag behind the weights; the quantized network's own are better.

    Args:
        network: float or quantized; its mode is kept.
        batches: see ``calibrate``.

    Raises:
        ValueError: if there is no batch.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    device = next(network.parameters()).device
    batch = None
    try:
        with evaluating(network):
            for norm in norms:
                norm.train()
                norm.momentum = None  # cumulative average
            for number, batch in enumerate(batches):
                if number == 0:
                    for norm in norms:
                        if norm.num_batches_tracked is not None:
                            norm.num_batches_tracked.zero_()
                network(image_of(batch).to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if batch is None:
        raise ValueError(
            "reestimate_norms: no batch was given, expected at least one batch of training images"
        )
    return network


def freeze_norms(
    network: nn.Module, epoch: int, epochs: int, share: float, start_epoch: int = 0
) -> nn.Module:
    """Freeze the paired batch norms in the last epochs of a quantized training, in place, or let them go on.

    With frozen statistics the folded network itself is trained.

    Args:
        network: float or quantized; only a quantized one has paired batch norms.
        epoch: the epoch that begins, from 1.
        epochs: length of the whole training.
        share: of the quantized epochs, after which the statistics stand still; 1 for never.
        start_epoch: epochs in float at the beginning.

    Returns:
        the network.
    """
    frozen = epoch > start_epoch + share * (epochs - start_epoch)
    for module in network.modules():
        if isinstance(module, PairedNorm):
            module.frozen = frozen
    return network
