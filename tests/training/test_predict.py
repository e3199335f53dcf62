"""Prediction of images of any size, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import quantize
from monai_unetq.training import WholeSliceInferer, predict, predict_logits


def unet(spatial_dims: int = 2, channels: int = 1) -> FixedPointUNet:
    """A small network whose output varies over the image."""
    torch.manual_seed(0)
    network = FixedPointUNet(channels, 1, width=2, spatial_dims=spatial_dims)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 4.0)
    return network.eval()


def image(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_divisible_sizes_go_straight_through() -> None:
    network, x = unet(), image(2, 1, 16, 24)
    assert torch.equal(predict_logits(network, x), network(x))


@torch.no_grad()
def test_odd_sizes_are_padded_at_the_far_ends_and_cropped_back() -> None:
    network, x = unet(), image(2, 1, 13, 22)
    padded = F.pad(x, (0, 2, 0, 3), mode="reflect")
    assert padded.shape[2:] == (16, 24)
    assert torch.equal(predict_logits(network, x), network(padded)[:, :, :13, :22])


@torch.no_grad()
def test_odd_volumes_too() -> None:
    network, x = unet(spatial_dims=3), image(1, 1, 5, 8, 7)
    padded = F.pad(x, (0, 1, 0, 0, 0, 3), mode="reflect")
    assert torch.equal(predict_logits(network, x), network(padded)[:, :, :5, :8, :7])


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (2, 16), (4, 30)])
@torch.no_grad()
def test_tiny_images_are_padded_by_repetition(sizes: tuple[int, int]) -> None:
    network, x = unet(), image(1, 1, *sizes)
    missing = [-size % 8 for size in sizes]
    padded = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
    found = predict_logits(network, x)
    assert found.shape == x.shape
    assert torch.equal(found, network(padded)[:, :, : sizes[0], : sizes[1]])


def test_another_divisor() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2:] == (30, 15)
            return x

    x = image(1, 1, 28, 14)
    assert torch.equal(predict_logits(Strict(), x, divisor=15), x)


@pytest.mark.parametrize("quantized", [False, True])
def test_foreground_is_where_the_logit_is_positive(quantized: bool) -> None:
    network = unet()
    if quantized:
        quantize(network, QuantPlan.uniform(network, "int8", "Q4.4", input="UQ0.8"))
    with torch.no_grad():
        network.last.bias.copy_(torch.tensor([0.0]))  # type: ignore[union-attr]
        middle = float(network(image(1, 1, 16, 24)).median())
        network.last.bias.copy_(torch.tensor([-middle]))  # type: ignore[union-attr]
    network.train()
    x = image(1, 16, 24)
    found = predict(network, x.numpy())
    assert not network.training
    assert (found.dtype, found.shape) == (np.dtype(np.uint8), (1, 16, 24))
    with torch.no_grad():
        expected = (network(x[None])[0] > 0).numpy()
    assert np.array_equal(found, expected)
    assert set(np.unique(found)) == {0, 1}


def test_any_float_array_is_taken() -> None:
    network, x = unet(), image(1, 13, 9).double().numpy()
    expected = predict(network, x)
    read_only = x.copy()
    read_only.setflags(write=False)
    flipped = x[:, ::-1].copy()[:, ::-1]  # negative strides
    assert np.array_equal(predict(network, read_only), expected)
    assert np.array_equal(predict(network, flipped), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_is_refused(bad: float) -> None:
    x = image(1, 16, 16).numpy()
    x[0, 3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        predict(unet(), x)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("takes", "has"), [(1, 3), (3, 1)])
def test_wrong_channels_are_refused(takes: int, has: int, quantized: bool) -> None:
    network = unet(channels=takes)
    if quantized:
        quantize(network, QuantPlan.uniform(network, "int8", "Q4.4"))
    with pytest.raises(ValueError, match=f"the image has {has} channels, the network takes {takes}"):
        predict(network, image(has, 16, 16).numpy())


def test_a_slice_for_a_volume_network_is_refused() -> None:
    with pytest.raises(ValueError, match="depth, height, width"):
        predict(unet(spatial_dims=3), image(1, 16, 16).numpy())


def test_the_inferer_takes_whole_slices_of_images_and_volumes() -> None:
    network = unet()
    volume = image(2, 1, 20, 13, 5)  # not divisible by 8, more slices than go through at once
    with torch.no_grad():
        logits = WholeSliceInferer(slices=3)(volume, network)
        assert logits.shape == volume.shape
        for index in range(5):
            expected = predict_logits(network, volume[..., index])
            torch.testing.assert_close(logits[..., index], expected)
            torch.testing.assert_close(WholeSliceInferer()(volume[..., index], network), expected)


def test_the_inferer_refuses_what_is_neither_image_nor_volume() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), expected \(batch, channels, height, width\)"):
        WholeSliceInferer()(image(1, 8, 8), unet())
