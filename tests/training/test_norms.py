"""Batch norm statistics: estimated again, and frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_unetq.layers import PairedNorm
from monai_unetq.surgery import calibrate
from monai_unetq.training import freeze_norms, reestimate_norms
from monai_unetq.training.norms import norms_stand_still
from tests.surgery.learned import IMAGES, quantized, run, same, state, unet


def test_reestimated_statistics_are_the_plain_average() -> None:
    network = unet().train()
    network.get_submodule("last").eval()
    modes = {name: module.training for name, module in network.named_modules()}
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(
                (args[0].mean(dim=(0, 2, 3)), args[0].var(dim=(0, 2, 3), unbiased=True))
            )
        )
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    assert reestimate_norms(network, IMAGES) is network
    for name, norm in norms.items():
        assert len(seen[name]) == 3
        means, variances = (torch.stack(list(values)).mean(dim=0) for values in zip(*seen[name], strict=True))
        torch.testing.assert_close(norm.running_mean, means, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm.running_var, variances, rtol=1e-4, atol=1e-6)
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert {name: norm.momentum for name, norm in norms.items()} == momenta
    assert all(torch.equal(p, weights[name]) for name, p in network.named_parameters())


def test_reestimating_a_quantized_network_fits_it_to_its_own_rounding() -> None:
    network = calibrate(quantized(weights="int2", activations="int4"), IMAGES)
    expected = run(unet())
    before = (run(network) - expected).square().mean()
    reestimate_norms(network, IMAGES.flatten(0, 1).unsqueeze(0))
    assert (run(network) - expected).square().mean() < before


def test_reestimating_fails_cleanly() -> None:
    network = unet()
    before = state(network)
    with pytest.raises(ValueError, match="no batch was given"):
        reestimate_norms(network, [])
    assert same(state(network), before)
    with pytest.raises(ValueError, match="not divisible"):
        reestimate_norms(network, [torch.zeros(1, 1, 9, 9)])
    assert not any(module.training for module in network.modules())
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


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
    def still(epochs: int, share: float, start_epoch: int = 0) -> list[bool]:
        return [norms_stand_still(epoch, epochs, share, start_epoch) for epoch in range(1, epochs + 1)]

    assert still(4, 0.5) == [False, False, True, True]
    assert still(10, 0.7) == [False] * 7 + [True] * 3
    assert still(4, 0.5, start_epoch=2) == [False, False, False, True]
    assert still(4, 0.0, start_epoch=2) == [False, False, True, True]  # of the quantized epochs all
    assert still(4, 1.0) == [False] * 4
    assert still(1, 0.7) == [True]  # the only epoch ends after its share
