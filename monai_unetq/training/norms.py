"""Batch norm statistics that stand still in a part of a training."""

from __future__ import annotations

from torch import nn

from ..layers import PairedNorm

__all__ = ["freeze_norms"]


def freeze_norms(
    network: nn.Module, epoch: int, epochs: int, share: float, start_epoch: int = 0
) -> nn.Module:
    """Freeze the paired batch norms in a quantized training or its last epochs, in place, or let them go on.

    With frozen statistics the folded network itself is trained.

    Args:
        network: float or quantized; only a quantized one has paired batch norms.
        epoch: the epoch that begins, from 1.
        epochs: length of the whole training.
        share: of the quantized epochs, after which the statistics stand still; 0 for in all of them, 1 for never.
        start_epoch: epochs in float at the beginning.

    Returns:
        the network.
    """
    frozen = epoch > start_epoch + share * (epochs - start_epoch)
    for module in network.modules():
        if isinstance(module, PairedNorm):
            module.frozen = frozen
    return network
