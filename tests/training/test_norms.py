"""Batch norms that stand still in a part of a training."""

from __future__ import annotations

from typing import Any

from monai_unetq.layers import PairedNorm
from monai_unetq.training import freeze_norms
from tests.surgery.learned import quantized, unet


def test_paired_norms_freeze_in_the_last_share_of_the_quantized_epochs() -> None:
    network = quantized(weights="int4", activations="int6")
    norms = [m for m in network.modules() if isinstance(m, PairedNorm)]

    def frozen(*arguments: Any) -> list[bool]:
        return [
            freeze_norms(network, epoch, *arguments) is network and all(norm.frozen for norm in norms)
            for epoch in range(1, 7)
        ]

    assert frozen(6, 0.5) == [False, False, False, True, True, True]
    assert frozen(6, 0.7) == [False, False, False, False, True, True]  # after 4.2 epochs
    assert frozen(6, 0.5, 2) == [False, False, False, False, True, True]
    assert frozen(6, 1.0) == [False] * 6
    assert not any(
        module.training for module in freeze_norms(network, 6, 6, 0.0).train().modules() if module in norms
    )
    freeze_norms(unet(), 6, 6, 0.0)  # a float network has no pair


def test_norms_stand_still_from_one_epoch_on() -> None:
    network = quantized(weights="int4", activations="int6")
    (norm, *_) = (m for m in network.modules() if isinstance(m, PairedNorm))

    def still(epochs: int, share: float, start_epoch: int = 0) -> list[bool]:
        frozen = []
        for epoch in range(1, epochs + 1):
            freeze_norms(network, epoch, epochs, share, start_epoch)
            frozen.append(norm.frozen)
        return frozen

    assert still(4, 0.5) == [False, False, True, True]
    assert still(10, 0.7) == [False] * 7 + [True] * 3
    assert still(4, 0.5, start_epoch=2) == [False, False, False, True]
    assert still(4, 0.0, start_epoch=2) == [False, False, True, True]  # of the quantized epochs all
    assert still(4, 1.0) == [False] * 4
    assert still(1, 0.7) == [True]  # the only epoch ends after its share
