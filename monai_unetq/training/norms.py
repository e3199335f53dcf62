"""Batch norm statistics of a training: estimated again from batches, and frozen in its last part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..layers import PairedNorm
from ..surgery.calibrate import image_of
from ..surgery.observe import evaluating

__all__ = ["freeze_norms", "norms_stand_still", "reestimate_norms"]


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
    frozen = norms_stand_still(epoch, epochs, share, start_epoch)
    for module in network.modules():
        if isinstance(module, PairedNorm):
            module.frozen = frozen
    return network


def norms_stand_still(epoch: int, epochs: int, share: float, start_epoch: int = 0) -> bool:
    """Whether the paired batch norms keep their statistics in an epoch; arguments as ``freeze_norms``'s."""
    return epoch > start_epoch + share * (epochs - start_epoch)
