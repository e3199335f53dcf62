"""Equalization: factors by hand, the same outputs bit for bit on every network, even ranges, what stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

import monai_unetq as uq
from tests.surgery.networks import NETWORKS

# Whose activations follow norms without γ, or functions that are not homogeneous, so that nothing can be moved.
UNMOVED = {
    "UNet", "UNet residual 3D", "VNet", "own, group norm between", "own, five parts", "own, linear", "own, functional",
    "own, channels last", "own, unbatched", "own, sliced", "own, interleaved", "own, channel shuffle",
    "own, squeeze and excitation",
}  # fmt: skip


@torch.no_grad()
def uneven(network: nn.Module) -> nn.Module:
    """The network with channels of very different ranges, in evaluation."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, (_NormBase, nn.GroupNorm)) and module.weight is not None:
            module.weight.copy_(torch.exp2(2 * torch.randn(module.weight.shape, generator=generator)))
            module.bias.normal_(generator=generator)
        if isinstance(module, _NormBase) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


def changed(network: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of the parameters and buffers that are not what they were."""
    return [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def scaled(layer: nn.Module, factors: Tensor) -> None:
    """Multiply a layer's weight in place by what broadcasts to it."""
    assert isinstance(layer.weight, Tensor)
    layer.weight.data.mul_(factors)


def test_factors_by_hand() -> None:
    first, last = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 1, 1)
    network = nn.Sequential(first, nn.ReLU(), last)
    assert first.bias is not None
    first.weight.data.copy_(torch.tensor([8.0, 1.0, 1.0]).view(3, 1, 1, 1))
    first.bias.data.copy_(torch.tensor([0.0, 1.0, -5.0]))  # the third channel is dead
    last.weight.data.copy_(torch.tensor([1.0, 3.0, 7.0]).view(1, 3, 1, 1))
    # Largest values: 8·2 = 16, 8·1 = 8 in the batches, 12 on average; 3 and 2, 2.5 on average. Geometric mean √30, so
    # log2(12/√30) = 1.13 and -1.13.
    batches = [torch.full((1, 1, 2, 2), 2.0), {"image": torch.ones(1, 1, 2, 2)}]
    uq.equalize(network, batches)
    assert first.weight.flatten().tolist() == [4.0, 2.0, 1.0]
    assert first.bias.tolist() == [0.0, 2.0, -5.0]
    assert last.weight.flatten().tolist() == [2.0, 1.5, 7.0]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_computes_the_same_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    network, image = uneven(NETWORKS[name].build()), NETWORKS[name].image(2)
    before = state_of(network)
    with torch.no_grad():
        wanted = tree_leaves(network(image))
        uq.equalize(network, [image])
        found = tree_leaves(network(image))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True) if isinstance(a, Tensor))
    assert bool(changed(network, before)) == (name not in UNMOVED)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@torch.no_grad()
def spreads(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Convolution → the largest range of the channels that it reads over the smallest."""
    found: dict[str, float] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            ranges = args[0].abs().amax((0, 2, 3))
            found[name] = float(ranges.max() / ranges.min())

        return hook

    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_pre_hook(look(name)) for name, module in layers]
    network(image)
    for hook in hooks:
        hook.remove()
    return found


def test_channels_that_are_read_together_have_one_range() -> None:
    torch.manual_seed(0)
    network, image = uneven(uq.networks.FixedPointUNet(1, 1, width=8)), torch.rand(2, 1, 32, 32)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.bias.data.copy_(norm.weight.data.sqrt_())
    uq.training.reestimate_norms(network, [image])  # no channel is nearly dead
    before = spreads(network, image)
    after = spreads(uq.equalize(network, [image]), image)
    assert max(before.values()) > 20
    assert all(spread <= 2 for spread in after.values())  # powers of two: half an octave either way


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_and_grouped_layers_take_factors_on_the_right_axis(groups: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2, groups=groups),
        nn.LeakyReLU(0.25), nn.Conv2d(6, 4, 3, padding=1, groups=groups, padding_mode="reflect"), nn.PReLU(4),
        nn.AvgPool2d(2), nn.Conv2d(4, 1, 1),
    )  # fmt: skip
    uneven_channels = torch.tensor([1.0, 30.0, 5.0, 0.2]).view(4, 1, 1, 1)
    for number in (0, 4):
        scaled(network[number], uneven_channels)
    scaled(network[2], torch.exp2(torch.arange(6.0 // groups)).view(1, -1, 1, 1))
    with torch.no_grad():
        image = torch.randn(2, 1, 8, 8)
        before, wanted = state_of(network), network(image)
        assert torch.equal(uq.equalize(network, [image])(image), wanted)
    names = {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias", "7.weight"}
    assert set(changed(network, before)) == names


class _Branches(nn.Module):
    """Two convolutions whose results are added, beside one behind a sigmoid and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.gate = (nn.Conv2d(1, 4, 1) for _ in range(3))
        self.after_sum, self.after_gate, self.twice = (
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 1),
        )
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        total = torch.relu(self.left(image)) + torch.relu(self.right(image))
        gated = self.after_gate(torch.sigmoid(self.gate(image)))
        again = self.twice(torch.relu(self.twice(torch.relu(self.after_sum(total)))))
        out: Tensor = self.last(torch.cat([torch.relu(again), gated], 1))
        return out


def test_sums_share_a_factor_and_what_is_not_homogeneous_keeps_its_range() -> None:
    torch.manual_seed(0)
    network, image = _Branches().eval(), torch.rand(2, 1, 8, 8) + 0.1
    with torch.no_grad():
        for layer in (network.left, network.right, network.after_sum, network.twice, network.gate):
            layer.weight.abs_()
            layer.weight[1] *= 40
        before, wanted = copy.deepcopy(network), network(image)
        assert torch.equal(uq.equalize(network, [image])(image), wanted)
        factors = [
            (getattr(before, n).weight / getattr(network, n).weight).flatten() for n in ("left", "right")
        ]
    assert torch.equal(*factors) and factors[0].max() > 1
    assert torch.equal(network.gate.weight, before.gate.weight)
    assert not torch.equal(network.after_gate.weight, before.after_gate.weight)


def test_few_bits_hurt_no_more_than_where_the_channels_were_even() -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 1, 32, 32)
    parts = [part for c in (1, 8, 8) for part in (nn.Conv2d(c, 8, 3, padding=1), nn.ReLU())]
    even = nn.Sequential(*parts, nn.Conv2d(8, 1, 1))
    odd = copy.deepcopy(even)
    with torch.no_grad():
        wanted = even(image)
        for maker, reader in ((0, 2), (2, 4), (4, 6)):
            factors = torch.exp2(3 * torch.randn(8))
            scaled(odd[maker], factors.view(8, 1, 1, 1))
            odd[maker].get_parameter("bias").mul_(factors)
            scaled(odd[reader], 1 / factors.view(1, 8, 1, 1))
        assert torch.allclose(odd(image), wanted, atol=1e-5)
        errors = []
        for network in (even, odd, uq.equalize(copy.deepcopy(odd), [image])):
            uq.quantize(network, uq.QuantPlan.uniform(network, "int8", "int4", scale="free"), image)
            uq.calibrate(network, [image])
            errors.append(float((network(image) - wanted).square().mean() / wanted.var()))
    # Not equal: ranges are rounded to powers of two, and the even network's own were not all the same.
    assert errors[2] < 1.5 * errors[0] and 10 * errors[0] < errors[1]


class _Asleep(nn.Module):
    """A second output in training, as deep supervision has it in some networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.deep = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1), nn.Conv2d(2, 1, 1)

    def forward(self, image: Tensor) -> Any:
        inner = torch.relu(self.first(image))
        return (self.last(inner), self.deep(inner)) if self.training else self.last(inner)


def test_mistakes_leave_the_network_as_it_was() -> None:
    image = torch.rand(1, 1, 16, 16)
    network = uneven(uq.networks.FixedPointUNet(1, 1, width=2)).train()
    before = state_of(network)
    with pytest.raises(ValueError, match="no batch was given"):
        uq.equalize(network, [])
    with pytest.raises(ValueError, match="batch 1 holds NaN or infinity"):
        uq.equalize(network, [image, image / 0])
    with pytest.raises(ValueError, match="failed on an example of shape"):
        uq.equalize(network, [torch.rand(1, 3, 16, 16)])
    assert not changed(network, before) and network.training
    asleep = _Asleep()
    before = state_of(asleep)
    with pytest.raises(ValueError, match="layer 'deep' does not run in evaluation"):
        uq.equalize(asleep, [image])
    assert not changed(asleep, before)
    with pytest.raises(ValueError, match=r"layer 'decoder\.0\.conv1' is split: equalize the float network"):
        uq.equalize(uq.split(copy.deepcopy(network), image), [image])
    quantized = uq.quantize(network, uq.QuantPlan.uniform(network, "int4", "int4"), image)
    with pytest.raises(ValueError, match=r"layer 'encoder\.0\.conv1' is quantized"):
        uq.equalize(quantized, [image])
