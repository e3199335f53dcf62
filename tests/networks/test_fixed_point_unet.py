"""The paper's U-Net: its size, its shapes, its dyadic upsampling, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from monai_unetq.networks import FixedPointUNet


def test_paper_width_has_the_papers_number_of_parameters() -> None:
    count = sum(p.numel() for p in FixedPointUNet(in_channels=1, out_channels=1).parameters())
    assert count == 4_837_249
    assert round(count * 4 / 2**20, 2) == 18.45


def test_every_convolution_is_3x3_and_all_but_the_last_have_batch_norm() -> None:
    network = FixedPointUNet(1, 1, width=2)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert {m.kernel_size for m in convolutions} == {(3, 3)}
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == len(convolutions) - 1 == 14
    assert convolutions[-1] is network.last


@pytest.mark.parametrize(
    ("spatial_dims", "activation", "upsample"),
    list(itertools.product((2, 3), ("relu", "tanh", "hardtanh"), ("linear", "transposed"))),
)
def test_output_has_the_images_size(spatial_dims: int, activation: Any, upsample: Any) -> None:
    network = FixedPointUNet(
        2, 3, width=3, spatial_dims=spatial_dims, activation=activation, upsample=upsample
    ).eval()
    sizes = (16, 24, 8)[:spatial_dims]
    out = network(torch.rand(1, 2, *sizes))
    assert out.shape == (1, 3, *sizes)
    assert torch.isfinite(out).all()
    activations = {"relu": nn.ReLU, "tanh": nn.Tanh, "hardtanh": nn.Hardtanh}[activation]
    assert sum(isinstance(m, activations) for m in network.modules()) == 14
    transposed = [m for m in network.modules() if isinstance(m, (nn.ConvTranspose2d, nn.ConvTranspose3d))]
    assert len(transposed) == (3 if upsample == "transposed" else 0)


@pytest.mark.parametrize("width", [1, 5, 8])
def test_features_follow_the_width(width: int) -> None:
    network = FixedPointUNet(1, 1, width=width)
    widths = [block.conv2.out_channels for block in network.encoder]  # type: ignore[union-attr]
    assert widths == [width, 2 * width, 4 * width, 4 * width]
    assert [block.conv2.out_channels for block in network.decoder] == [4 * width, 2 * width, width]  # type: ignore[union-attr]


@pytest.mark.parametrize(("spatial_dims", "factor"), [(2, 16), (3, 64)])
def test_upsampling_is_dyadic(spatial_dims: int, factor: int) -> None:
    """Six-bit integers stay integers when multiplied by the factor, exactly: no rounding in fixed point."""
    network = FixedPointUNet(1, 1, width=1, spatial_dims=spatial_dims)
    integers = torch.randint(0, 64, (1, 4, *[6] * spatial_dims)).float()
    scaled = network.upsample[0](integers) * factor
    assert scaled.shape[2:] == (12,) * spatial_dims
    assert torch.equal(scaled, scaled.round())
    exact = scaled.double() / factor
    reference = nn.functional.interpolate(
        integers.double(), scale_factor=2, mode="bilinear" if spatial_dims == 2 else "trilinear"
    )
    assert torch.equal(exact, reference)
    # The factor is the smallest that does: half of it leaves fractions.
    assert not torch.equal(scaled / 2, (scaled / 2).round())


def test_skips_carry_the_resolution() -> None:
    """Each decoder block reads its own level's encoder output: without it, a change of one pixel is lost."""
    torch.manual_seed(0)
    network = FixedPointUNet(1, 1, width=2).eval()
    seen: dict[int, torch.Size] = {}
    for level, block in enumerate(network.decoder):
        block.register_forward_pre_hook(lambda _, args, level=level: seen.update({level: args[0].shape}))
    network(torch.rand(1, 1, 16, 16))
    assert seen == {0: (1, 16, 4, 4), 1: (1, 12, 8, 8), 2: (1, 6, 16, 16)}


@pytest.mark.parametrize(
    ("spatial_dims", "shape", "message"),
    [
        (2, (1, 16, 16), r"batch, channels, height, width.*\(1, 16, 16\)"),
        (2, (1, 1, 16, 16, 16), r"height, width.*\(1, 1, 16, 16, 16\)"),
        (3, (1, 1, 16, 16), r"depth, height, width.*\(1, 1, 16, 16\)"),
        (2, (1, 1, 20, 16), r"\(20, 16\) are not divisible by 8"),
        (2, (1, 1, 16, 4), r"\(16, 4\) are not divisible by 8"),
        (3, (1, 1, 8, 8, 9), r"\(8, 8, 9\) are not divisible by 8.*predict"),
    ],
)
def test_wrong_shapes_are_refused(spatial_dims: int, shape: tuple[int, ...], message: str) -> None:
    network = FixedPointUNet(1, 1, width=1, spatial_dims=spatial_dims)
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0, "out_channels": 1}, "in_channels is 0"),
        ({"in_channels": 1, "out_channels": 0}, "out_channels is 0"),
        ({"in_channels": 1, "out_channels": 1, "width": 0}, "width is 0"),
        ({"in_channels": 1, "out_channels": 1, "spatial_dims": 1}, "spatial_dims is 1"),
        (
            {"in_channels": 1, "out_channels": 1, "activation": "gelu"},
            "'gelu', expected one of 'relu', 'tanh', 'hardtanh'",
        ),
        ({"in_channels": 1, "out_channels": 1, "upsample": "nearest"}, "'nearest'.*'linear' or 'transposed'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedPointUNet(**arguments)


def test_dropout_acts_in_training_only_and_adds_no_state() -> None:
    network = FixedPointUNet(1, 1, width=2, dropout=0.5)
    assert network.state_dict().keys() == FixedPointUNet(1, 1, width=2).state_dict().keys()
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.5] * 7
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(network.eval()(image), network(image))
    block = network.train().encoder[0]
    ones = torch.ones(1, 2, 64, 64)
    assert 0.4 < float((block.dropout(ones) == 0).float().mean()) < 0.6  # type: ignore[operator]


def test_hardtanh_saturates_where_tanh_bends() -> None:
    block = FixedPointUNet(1, 1, width=1, activation="hardtanh").encoder[0]
    values = torch.tensor([-3.0, -1.0, -0.25, 0.5, 7.0])
    assert torch.equal(block.act1(values), torch.tensor([-1.0, -1.0, -0.25, 0.5, 1.0]))  # type: ignore[operator]
