"""Hessian traces against the whole Hessian, squared gradients against autograd, and errors that name the layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import weight_norm

import monai_unetq as uq
from monai_unetq.sensitivity.derivatives import Derivatives, targets
from tests.sensitivity.networks import DeepSupervised, Level, Linear, bce, deep_bce, exact, normed, solid


def data(size: int = 4, dimensions: int = 2, images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (images, 1, *[size] * dimensions)
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator).round()


def layers_of(network: nn.Module) -> list[str]:
    return [n for n, m in network.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]


def derivatives(network: nn.Module, loss: Any = bce) -> Derivatives:
    network.eval()
    return Derivatives(network, loss, targets(layers_of(network), ()))


def samples(found: Derivatives, image: Tensor, label: Any, count: int) -> dict[str, Tensor]:
    """One number for each probe."""
    runs = [found.products(image, label, [seed]) for seed in range(count)]
    return {name: torch.tensor([run[name] for run in runs], dtype=torch.float64) for name in runs[0]}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "conv and transposed conv": (Level, bce, 2),
    "deep supervision": (DeepSupervised, deep_bce, 2),
    "linear, called by name": (Linear, bce, 2),
    "3D": (solid, lambda o, y: bce(o[..., ::2, ::2, ::2], y), 3),
    "batch norm": (lambda: normed(nn.BatchNorm2d(2)), bce, 2),
    "batch norm without statistics": (lambda: normed(nn.BatchNorm2d(2, track_running_stats=False)), bce, 2),
    "instance norm": (lambda: normed(nn.InstanceNorm2d(2, affine=True)), bce, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_traces_are_those_of_the_whole_hessian(name: str) -> None:
    make, loss, dimensions = NETWORKS[name]
    torch.manual_seed(0)
    network = make()
    image, label = data(4, dimensions)
    found = samples(derivatives(network, loss), image, label, 150)
    for layer in layers_of(network):
        for kind in ("weight", "input"):
            numbers = found[f"{layer}.{kind}"]
            error = float(numbers.std()) / math.sqrt(len(numbers))
            expected = float(exact(network, loss, image, label, layer, kind).sum())
            assert abs(float(numbers.mean()) - expected) <= 4 * error + 1e-7, (layer, kind)


def test_halves_of_a_split_convolution_are_apart() -> None:
    torch.manual_seed(0)
    network = uq.split(Level(), torch.zeros(1, 1, 4, 4))
    image, label = data()
    found = samples(derivatives(network), image, label, 150)
    assert "read.weight" not in found
    for kind in ("weight", "input"):
        halves = exact(network, bce, image, label, "read", kind).split(2, 1)
        for part, half in zip(("skip", "up"), halves, strict=True):
            numbers = found[f"read.{kind}[{part}]"]
            error = float(numbers.std()) / math.sqrt(len(numbers))
            assert abs(float(numbers.mean()) - float(half.sum())) <= 4 * error


def test_standard_error_is_calibrated() -> None:
    torch.manual_seed(0)
    network = Level().eval()
    image, label = data()
    numbers = samples(derivatives(network), image, label, 480)["read.input"].reshape(32, 15)
    expected = float(exact(network, bce, image, label, "read", "input").sum())
    within = (numbers.mean(1) - expected).abs() <= 2 * numbers.std(1) / math.sqrt(15)
    assert 0.8 <= float(within.double().mean()) <= 1


def test_probes_of_one_pass_are_averaged() -> None:
    image, label = data()
    found = derivatives(Level())
    apart = [found.products(image, label, [seed]) for seed in (3, 4, 5)]
    together = found.products(image, label, [3, 4, 5])
    for name, value in together.items():
        assert value == pytest.approx(sum(run[name] for run in apart) / 3, rel=1e-4, abs=1e-9)


def test_signs_are_fair_and_independent_of_the_tensor_beside() -> None:
    from monai_unetq.sensitivity.derivatives import _signs

    first, second = _signs([torch.zeros(40_001), torch.zeros(3, 5)], 7)
    assert first.unique().tolist() == [-1, 1]
    assert abs(float(first.float().mean())) < 4 / math.sqrt(40_001)
    assert abs(float((first[1:] * first[:-1]).float().mean())) < 4 / math.sqrt(40_000)
    assert torch.equal(first, _signs([torch.zeros(40_001)], 7)[0])
    assert second.shape == (3, 5)
    assert not torch.equal(first, _signs([torch.zeros(40_001)], 8)[0])


def test_squares_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    network = uq.split(Level(), torch.zeros(1, 1, 4, 4)).eval()
    image, label = data(images=1)
    found = derivatives(network).squares(image, label)
    inputs: dict[str, Tensor] = {}
    for name in layers_of(network):

        def keep(m: nn.Module, args: Any, name: str = name) -> Any:
            inputs[name] = args[0].detach().clone().requires_grad_() if name == "enter" else args[0] * 1
            return (inputs[name],)

        network.get_submodule(name).register_forward_pre_hook(keep)
    value = bce(network(image), label)
    for name, tensor in inputs.items():
        (gradient,) = torch.autograd.grad(value, tensor, retain_graph=True)
        (slope,) = torch.autograd.grad(
            value, network.get_submodule(name).get_parameter("weight"), retain_graph=True
        )
        if name == "read":
            for part, half in zip(("skip", "up"), gradient.split(2, 1), strict=True):
                assert found[f"read.input[{part}]"] == pytest.approx(float(half.square().sum()), rel=1e-4)
            for part, half in zip(("skip", "up"), slope.split(2, 1), strict=True):
                assert found[f"read.weight[{part}]"] == pytest.approx(float(half.square().sum()), rel=1e-4)
        else:
            assert found[f"{name}.input"] == pytest.approx(float(gradient.square().sum()), rel=1e-4)
            assert found[f"{name}.weight"] == pytest.approx(float(slope.square().sum()), rel=1e-4)


def test_a_weight_that_is_computed_counts_as_it_is_used() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))
    computed = nn.Sequential(
        weight_norm(nn.Conv2d(1, 2, 3, padding=1)), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1)
    )
    state = {k.replace("0.parametrizations.weight.", ""): v for k, v in computed.state_dict().items()}
    plain.load_state_dict(
        {**{k: v for k, v in state.items() if k in plain.state_dict()}, "0.weight": computed[0].weight}
    )
    image, label = data()
    expected, found = (derivatives(n).products(image, label, [0]) for n in (plain, computed))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_the_network_is_left_as_it_was() -> None:
    network: Any = normed(nn.BatchNorm2d(2))
    network[3].weight.requires_grad_(False)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    image, label = data()
    derivatives(network).products(image, label, [0, 1])
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == [True, True, True, True, False, True]
    assert all(p.grad is None for p in network.parameters())
    assert all(
        not m._forward_pre_hooks and not m._forward_hooks and "forward" not in vars(m)
        for m in network.modules()
    )


class Rounded(torch.autograd.Function):
    """Has a first derivative only."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (tensor,) = ctx.saved_tensors
        return gradient * 3 * tensor**2


class Faulty(nn.Module):
    """Three convolutions with something between the second and the third."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.third, self.between = nn.Conv2d(2, 1, 3, padding=1), between

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.third(self.between(self.second(torch.tanh(self.first(image)))))
        return out


class Forked(Faulty):
    """Adds what a layer of its own makes of the image, detached."""

    def __init__(self) -> None:
        super().__init__(torch.tanh)
        self.beside = nn.Conv2d(1, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + self.beside(image).detach()


@pytest.mark.parametrize(
    ("network", "loss", "message"),
    [
        (Faulty(torch.detach), bce, "the loss does not depend on layer 'first'"),
        (Forked(), bce, "the loss does not depend on layer 'beside'.*without="),
        (DeepSupervised(), lambda o, y: bce(o[0], y), "the loss does not depend on layer 'head'"),
        (Level(), lambda o, y: y.sum(), "the loss does not depend on any layer, not even on the last one, layer 'read'"),
        (Faulty(Rounded.apply), bce, "an operation behind layer 'second' cannot be differentiated twice"),
        (Level(), lambda o, y: Rounded.apply(o).mean(), "an operation behind layer 'read' cannot be"),
        (Faulty(torch.log), bce, "the loss is nan: the first layer whose output is not finite is 'third'"),
        (Level(), lambda o, y: o.mean() * math.nan, "the loss is nan: the network's output is finite"),
        (Level(), lambda o, y: o, r"the loss is of shape \(2, 1, 4, 4\), expected one number"),
        (Level(), lambda o, y: 3.0, "the loss is float, expected one number"),
        (Level(), lambda o, y: (0 * o).abs().sqrt().mean(), "the derivative by '.*' is nan, though the loss"),
    ],
    ids=["detach", "beside", "head", "constant", "once", "once in the loss", "log", "nan", "shape", "type", "derivative"],
)  # fmt: skip
def test_mistakes_are_named(network: nn.Module, loss: Any, message: str) -> None:
    image, label = data()
    with pytest.raises(ValueError, match=message):
        derivatives(network, loss).products(image, label, [0])
    assert all(p.requires_grad for p in network.parameters())


def test_a_layer_that_does_not_run_is_named() -> None:
    class Idle(Level):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(2, 1, 1)

    image, label = data()
    with pytest.raises(ValueError, match="layer 'head' does not run on this batch"):
        derivatives(Idle()).products(image, label, [0])


def test_a_linear_network_with_a_linear_loss_has_no_curvature() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 3))
    image, label = data()
    (weight, _) = targets(["0"], ())
    found = Derivatives(network, lambda o, y: o.mean(), [weight]).products(image, label, [0])
    assert found == {"0.weight": 0.0}


def test_patterns_that_match_nothing_or_everything_are_refused() -> None:
    with pytest.raises(ValueError, match=r"without: 'b\*' matches none of the layers a, c"):
        targets(["a", "c"], ["b*"])
    with pytest.raises(ValueError, match="no layer to measure"):
        targets(["a", "c"], ["*"])
    assert [target.layer for target in targets(["a.b", "c"], ["a.*"])] == ["c", "c"]
