"""Folding batch norm: not one quantized weight changes, and the network computes what it computed."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_unetq.layers import PairedNorm
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import fold, quantize
from monai_unetq.surgery.fold import FoldedNorm, fold_pairs
from monai_unetq.surgery.quantize import quantized_layers

TOLERANCE = 1e-5


def trained(network: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training; every third γ is negative."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            shape = (module.num_features,)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(0.2 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(2.0 + torch.rand(shape, generator=generator))
                    module.weight[::3] *= -1
                    module.bias.copy_(0.3 * torch.randn(shape, generator=generator) + 0.5)
    return network.eval()


def plain(dimensions: int, affine: bool = True, bias: bool = True) -> nn.Module:
    """Convolution, strided convolution in groups, transposed convolution, each with a batch norm, and a last one."""
    torch.manual_seed(0)
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    return trained(
        nn.Sequential(
            convolution(2, 6, 3, padding=1, bias=bias), norm(6, affine=affine), nn.ReLU(inplace=True),
            convolution(6, 6, 2, stride=2, groups=3, bias=bias), norm(6, affine=affine), nn.ReLU(),
            transposed(6, 8, 2, stride=2, groups=2, bias=bias), norm(8, affine=affine), nn.ReLU(),
            transposed(8, 4, 3, padding=1, bias=bias), norm(4, affine=affine), nn.ReLU(),
            convolution(4, 1, 1),
        )
    )  # fmt: skip


def unet() -> nn.Module:
    torch.manual_seed(0)
    return trained(FixedPointUNet(2, 1, width=2, upsample="transposed"))


def image(dimensions: int, seed: int = 0) -> Tensor:
    return torch.rand(2, 2, *[8] * dimensions, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(network: nn.Module, example: Tensor) -> Tensor:
    out: Tensor = network(example)
    return out


def codes(network: nn.Module) -> dict[str, Tensor]:
    """The integer codes that every quantized layer runs with, output channels first."""
    return {
        name: layer.weight_quantizer.codes(layer.folded_weight())
        for name, layer in quantized_layers(network).items()
    }


FORMATS: dict[str, dict[str, Any]] = {
    "static": {"weights": "Q0.4", "activations": "Q4.4", "input": "UQ0.8"},
    "Q6.0/Q0.4": {"weights": "Q0.4", "activations": "Q6.0", "input": "UQ0.8"},
    "power of two, per channel": {"weights": "int4", "activations": "Q4.4"},
    "power of two, per tensor": {"weights": "int4", "activations": "Q4.4", "granularity": "tensor"},
    "power of two, learned": {"weights": "int4", "activations": "Q4.4", "learned": True},
    "free, per tensor": {"weights": "int6", "activations": "Q4.4", "scale": "free", "granularity": "tensor"},
    "first and last float": {"weights": "Q0.4", "activations": "Q4.4", "first": "float", "last": "float"},
    **{
        f"{weights}, {granularity}, {scale}": {
            "weights": weights,
            "activations": "Q4.4",
            "granularity": granularity,
            "scale": scale,
        }
        for weights in ("binary", "ternary", "pow2-4")
        for granularity in ("channel", "tensor")
        for scale in ("power-of-two", "free")
    },
    "binary, learned": {"weights": "binary", "activations": "Q4.4", "learned": True},
    "ternary, learned": {"weights": "ternary", "activations": "Q4.4", "scale": "free", "learned": True},
}
FREE: dict[str, dict[str, Any]] = {
    "free": {"weights": "int8", "activations": "Q4.4", "scale": "free"},
    "free, learned": {"weights": "int4", "activations": "Q4.4", "scale": "free", "learned": True},
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "1D": (lambda: plain(1), 1),
    "2D": (lambda: plain(2), 2),
    "2D, no bias": (lambda: plain(2, bias=False), 2),
    "2D, not affine": (lambda: plain(2, affine=False), 2),
    "3D": (lambda: plain(3), 3),
    "U-Net": (unet, 2),
}


def fold_and_compare(build: Callable[[], nn.Module], dimensions: int, formats: dict[str, Any]) -> float:
    """Largest change of the output; asserts that no code changes."""
    example = image(dimensions)
    network = build()
    quantize(network, QuantPlan.uniform(network, **formats), example)
    paired = [name for name, layer in quantized_layers(network).items() if layer.paired_norm is not None]
    assert len(paired) >= 3
    before, codes_before = run(network, example), codes(network)
    assert before.std() > 1e-3
    assert fold(network, example) is network
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    assert not any("norm" in key or "running" in key for key in network.state_dict())
    for name, found in codes(network).items():
        assert torch.equal(found, codes_before[name]), name
    for name in paired:  # the stored weight is on the grid: it is its own rounding
        layer = quantized_layers(network)[name]
        assert torch.equal(layer.effective_parameters()[0], layer.weight)
    return float((run(network, example) - before).abs().max())


@pytest.mark.parametrize(
    ("name", "formats"),
    # Without γ nothing is large enough for Q6.0.
    [(n, f) for n in NETWORKS for f in FORMATS if (n, f) != ("2D, not affine", "Q6.0/Q0.4")],
)
def test_no_weight_and_no_output_changes(name: str, formats: str) -> None:
    build, dimensions = NETWORKS[name]
    change = fold_and_compare(build, dimensions, FORMATS[formats])
    if formats == "first and last float":
        assert change <= TOLERANCE
    else:
        assert change == 0


@pytest.mark.parametrize("formats", list(FREE))
@pytest.mark.parametrize("name", list(NETWORKS))
def test_free_scales_take_the_gain(name: str, formats: str) -> None:
    build, dimensions = NETWORKS[name]
    assert fold_and_compare(build, dimensions, FREE[formats]) <= TOLERANCE


def test_free_scales_change_no_activations_code() -> None:
    """A change of one unit in the last place flips an activation's rounding sooner or later: over many networks
    the output must not change by a step."""
    changes = []
    for seed in range(8):

        def build(seed: int = seed) -> nn.Module:
            torch.manual_seed(seed)
            return trained(FixedPointUNet(2, 1, width=2), seed)

        example = image(2, seed)
        network = build()
        quantize(network, QuantPlan.uniform(network, "int8", "Q2.6", scale="free"), example)
        before = run(network, example)
        changes.append(float((run(fold(network), example) - before).abs().max()))
    assert max(changes) <= TOLERANCE


@pytest.mark.parametrize("formats", [*(f for f in FORMATS if not re.match("(bi|ter)nary, tensor", f)), *FREE])
def test_a_channel_with_a_vanishing_gain_keeps_its_shift(formats: str) -> None:
    """γ = 0 prunes a channel: what is left is β, before and after folding."""
    torch.manual_seed(0)
    network = trained(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)))
    with torch.no_grad():
        network[1].weight[1] = 0.0  # type: ignore[index]
        network[1].bias[1] = 0.75  # type: ignore[index]
    example = image(2)
    quantize(network, QuantPlan.uniform(network, **{**FORMATS, **FREE}[formats]), example)
    before = run(network[:2], example)[:, 1]  # type: ignore[index]
    torch.testing.assert_close(before, torch.full_like(before, 0.75), rtol=0, atol=1e-3)
    after = run(fold(network, example)[:2], example)[:, 1]  # type: ignore[index]
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE)


def test_the_literal_mode_survives_folding() -> None:
    """The printed formula sends 0.98 to 1.0 but 1.0 to 0: a folded weight must not be rounded to something else."""
    network = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([0.98, -0.98, 0.3, 1.3]).view(4, 1, 1, 1))  # type: ignore[operator]
    example = torch.ones(1, 1, 2, 2)
    quantize(network, QuantPlan.uniform(network, "Q0.4:literal", "UQ1.0"), example)
    before, codes_before = run(network, example), codes(network)["0"]
    assert codes_before.flatten().tolist() == [16, -16, 5, 5]
    assert torch.equal(run(fold(network), example), before)
    assert torch.equal(codes(network)["0"], codes_before)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_float_networks_fold_too(name: str) -> None:
    build, dimensions = NETWORKS[name]
    network, example = build().train(), image(dimensions)
    expected = run(copy.deepcopy(network).eval(), example)
    assert fold(network, example) is network
    assert not network.training
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    assert (run(network, example) - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_float_network_folds_without_an_example() -> None:
    network = trained(FixedPointUNet(1, 1, width=2))
    example = torch.rand(1, 1, 16, 16)
    expected = run(network, example)
    assert (run(fold(network), example) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("quantized", [False, True])
def test_conv_relu_norm_is_left_with_a_warning(quantized: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = trained(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )
    example = image(2)
    if quantized:
        quantize(network, QuantPlan.uniform(network, "Q0.4", "Q4.4"), example)
    before = run(network, example)
    caplog.clear()  # what quantize says, where another test has set MONAI's level of logging
    with caplog.at_level(logging.WARNING, logger="monai_unetq"):
        fold(network, example)
    assert [r.getMessage() for r in caplog.records] == [
        "batch norm '2' cannot be folded: no plain convolution has it as its only consumer"
    ]
    assert type(network[2]) is nn.BatchNorm2d  # type: ignore[index]
    assert isinstance(network[4], nn.Identity)  # type: ignore[index]
    torch.testing.assert_close(run(network, example), before, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("quantized", [False, True])
def test_folding_twice_is_folding_once(quantized: bool) -> None:
    network = plain(2)
    example = image(2)
    if quantized:
        quantize(network, QuantPlan.uniform(network, "int4", "Q4.4", scale="free"), example)
    fold(network, example)
    state, out = copy.deepcopy(network.state_dict()), run(network, example)
    fold(network, example)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.equal(run(network, example), out)


class Standardized(nn.Conv2d):
    """A subclass that standardizes its weight in every forward: a folded gain would be divided out again."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight / self.weight.std(), self.bias)


class NormWithActivation(nn.BatchNorm2d):
    """A subclass that does more than its base."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(Standardized(2, 4, 3), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), NormWithActivation(4)),
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm2d(2)),
    ],
)
def test_what_cannot_be_folded_is_left_as_it_is(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = build().eval()
    with torch.no_grad():
        network[1].weight.mul_(3.0)  # type: ignore[index]
    example = image(2)
    before = run(network, example)
    assert torch.equal(run(fold(network, example), example), before)
    assert isinstance(network[1], nn.BatchNorm2d)  # type: ignore[index]


def test_an_unfinished_calibration_is_refused_and_nothing_is_folded() -> None:
    network = plain(2)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q4.4"), image(2))
    from monai_unetq.quantizers import RangeObserver

    quantized_layers(network)["12"].input_quantizer.observer = RangeObserver()
    pairs = sum(isinstance(m, PairedNorm) for m in network.modules())
    with pytest.raises(ValueError, match="'12' is being calibrated"):
        fold(network)
    assert sum(isinstance(m, PairedNorm) for m in network.modules()) == pairs == 4


def test_a_failing_example_folds_nothing() -> None:
    network = unet()
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q4.4", first="float"), image(2))
    with pytest.raises(ValueError, match=r"failed on an example of shape \(1, 2, 9, 9\)"):
        fold(network, torch.zeros(1, 2, 9, 9))
    assert not any(isinstance(m, FoldedNorm) for m in network.modules())


def test_fold_pairs_leaves_float_layers_alone() -> None:
    network = unet()
    example = image(2)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q4.4", first="float"), example)
    before = run(network, example)
    fold_pairs(network)
    assert type(network.get_submodule("encoder.0.norm1")) is nn.BatchNorm2d
    assert isinstance(network.get_submodule("encoder.0.norm2"), FoldedNorm)
    assert torch.equal(run(network, example), before)


@pytest.mark.parametrize("quantized", [False, True])
def test_layers_that_share_a_weight_are_left_as_they_are(quantized: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
    )
    network[2].weight = network[0].weight
    for norm in network:
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
            norm.running_var.uniform_(0.1, 0.2)
    image = torch.rand(1, 2, 16, 16)
    if quantized:
        quantize(network, QuantPlan.uniform(network, "int8", "float"), image)
    network.eval()
    with torch.no_grad():
        before = network(image)
        fold(network, image)
        assert torch.equal(network(image), before)
    assert isinstance(network[1], nn.BatchNorm2d)
