"""One observed pass: what pairs with what, what can be negative, and that nothing is touched."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import fold, observe, quantize
from monai_unetq.surgery.observe import example_for

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Between(nn.Module):
    """Two convolutions and any function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(channels, 2, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def less_in_a_view(x: Tensor) -> Tensor:
    x = x.relu()
    x[:, :1] -= 1.0  # in place, on a view
    return x


@pytest.mark.parametrize(
    ("between", "channels"),
    [
        (nn.ReLU(), 4),
        (nn.ReLU(inplace=True), 4),
        (F.relu, 4),
        (lambda x: F.relu(x, inplace=True), 4),
        (torch.relu, 4),
        (lambda x: x.relu(), 4),
        (lambda x: x.relu_(), 4),
        (nn.ReLU6(), 4),
        (lambda x: x.clamp(min=0), 4),
        (lambda x: torch.clamp(x, 0, 6), 4),
        (lambda x: x.clamp_min(0.0), 4),
        (torch.sigmoid, 4),
        (lambda x: F.max_pool2d(x.relu(), 2), 4),
        (lambda x: F.avg_pool2d(x.relu(), 2), 4),
        (lambda x: F.interpolate(x.relu(), scale_factor=2, mode="bilinear", align_corners=False), 4),
        (lambda x: F.interpolate(x.relu(), scale_factor=2, mode="nearest"), 4),
        (lambda x: torch.cat([x.relu(), F.max_pool2d(x.relu(), 3, 1, 1)], dim=1), 8),
        (lambda x: torch.cat([x.relu(), torch.sigmoid(x)], dim=1), 8),
        (lambda x: x.relu() + x.relu(), 4),
        (lambda x: x.relu() + 0.5, 4),
        (lambda x: x.relu() * 2, 4),
        (lambda x: F.pad(x.relu(), (1, 1)), 4),
        (lambda x: F.pad(x.relu(), (1, 1, 1, 1), mode="reflect"), 4),
        (lambda x: F.dropout(x.relu(), training=False), 4),
        (nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Identity()), 4),
        (lambda x: x.relu()[:, :, 1:], 4),
        (lambda x: torch.chunk(x.relu(), 2, dim=1)[0], 2),
    ],
)
def test_what_cannot_be_negative(between: Callable[[Tensor], Tensor], channels: int) -> None:
    assert not observe(Between(between, channels), IMAGE).takes_negative("second")


@pytest.mark.parametrize(
    ("between", "channels"),
    [
        (nn.Identity(), 4),
        (nn.Tanh(), 4),
        (nn.LeakyReLU(0.1), 4),
        (nn.LeakyReLU(0.1, inplace=True), 4),
        (nn.PReLU(), 4),
        (nn.GELU(), 4),
        (nn.BatchNorm2d(4), 4),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), 4),
        (nn.InstanceNorm2d(4), 4),
        (lambda x: x.clamp(max=0), 4),
        (lambda x: x.clamp(-1, 1), 4),
        (F.hardtanh, 4),
        (lambda x: torch.cat([x.relu(), x], dim=1), 8),
        (lambda x: x.relu() + x, 4),
        (lambda x: x.relu() - 1, 4),
        (lambda x: x.relu() + (-1), 4),
        (lambda x: x.relu() * -1, 4),
        (lambda x: torch.add(x.relu(), x.relu(), alpha=-2), 4),
        (lambda x: x.relu() - x.sigmoid(), 4),
        (lambda x: F.pad(x.relu(), (1, 1), value=-1.0), 4),
        (lambda x: F.interpolate(x.relu(), scale_factor=2, mode="bicubic"), 4),  # overshoots
        (lambda x: x.relu().sub_(1.0), 4),
        (less_in_a_view, 4),
    ],
)
def test_what_can_be_negative(between: Callable[[Tensor], Tensor], channels: int) -> None:
    assert observe(Between(between, channels), IMAGE).takes_negative("second")


def test_the_image_can_be_negative() -> None:
    assert observe(Between(nn.ReLU()), IMAGE.abs()).takes_negative("first")


def test_the_sign_is_the_one_when_the_layer_ran() -> None:
    class LaterInPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.before, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            before = self.before(x)
            return before + self.after(x.relu_())

    trace = observe(LaterInPlace(), IMAGE)
    assert trace.takes_negative("before")
    assert not trace.takes_negative("after")


@pytest.mark.parametrize(
    ("between", "negative"),
    [
        (lambda x: torch.cat([x.relu(), x], dim=1), [False, True]),
        (lambda x: torch.cat([x, x.relu()], dim=-3), [True, False]),
        (lambda x: torch.cat([x, torch.cat([x.relu(), x], dim=1)[:, :0], x.relu()], dim=1), [True, False]),
        (
            lambda x: torch.cat([torch.cat([x.relu(), x[:, :2]], dim=1), x[:, :2]], dim=1),
            [False, True],
        ),
        (lambda x: torch.cat([x.relu(), x], dim=1).sub_(1), [True, True]),
        (lambda x: torch.cat([x.relu(), x], dim=1) - 1, [True, True]),
        (lambda x: torch.cat([torch.cat([x.relu()] * 2, 2), torch.cat([x] * 2, 2)], 1), [False, True]),
        (
            lambda x: torch.cat([torch.cat([x, x], 1)[:, :, :4], torch.cat([x, x], 1)[:, :, 4:].relu()], 2),
            [True, True],
        ),
        (lambda x: torch.cat([x.relu(), x.relu()], dim=1), [False, False]),
    ],
)
def test_pieces_of_a_concatenation_that_can_be_negative(
    between: Callable[[Tensor], Tensor], negative: list[bool]
) -> None:
    trace = observe(Between(between, 8), IMAGE)
    halves = range(0, 4), range(4, 8)
    assert [trace.takes_negative("second", half) for half in halves] == negative
    assert trace.takes_negative("second") == any(negative)


def test_pieces_are_what_they_were_when_they_were_concatenated() -> None:
    class LaterInPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.reads = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            skip = x.relu()
            both = torch.cat([skip, x], dim=1)
            skip.sub_(1)  # a copy of it stands in the concatenation
            return self.reads(both)

    trace = observe(LaterInPlace(), IMAGE)
    assert [trace.takes_negative("reads", half) for half in (range(0, 4), range(4, 8))] == [False, True]


def test_a_layer_that_runs_twice_is_signed_if_one_call_is() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(self.first(x).relu()))

    trace = observe(Shared(), IMAGE)
    assert trace.takes_negative("shared")
    assert len(trace.calls_of("shared")) == 2
    assert trace.layers() == ["first", "shared"]


def conv_norm(*, between: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Conv2d(3, 4, 3), *([between] if between is not None else []), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("between", [None, nn.Dropout2d(0.5), nn.Identity()])
def test_conv_and_batch_norm_are_a_pair(between: nn.Module | None) -> None:
    network = conv_norm(between=between)
    norm = "1" if between is None else "2"
    assert observe(network, IMAGE).paired_norms() == {"0": norm}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_pairs_in_any_dimension(dimensions: int, transposed: bool) -> None:
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if transposed:
        convolutions = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # type: ignore[assignment]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    network = nn.Sequential(convolutions[dimensions - 1](2, 3, 2), norm(3))
    assert observe(network, torch.zeros(1, 2, *[4] * dimensions)).paired_norms() == {"0": "1"}


def test_all_pairs_of_the_papers_network_are_found() -> None:
    network = FixedPointUNet(1, 1, width=2)
    trace = observe(network, torch.zeros(1, 1, 16, 16))
    pairs = trace.paired_norms()
    assert len(pairs) == 14
    assert all(norm == layer.replace("conv", "norm") for layer, norm in pairs.items())
    negative = {layer for layer in trace.layers() if trace.takes_negative(layer)}
    assert negative == {"encoder.0.conv1"}  # all others read ReLU, pooled, upsampled or concatenated


def test_conv_relu_norm_is_no_pair_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    for relu in (nn.ReLU(), nn.ReLU(inplace=True)):
        network = conv_norm(between=relu)
        assert observe(network, IMAGE).paired_norms() == {}
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="monai_unetq"):
            quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"), IMAGE)
            fold(network, IMAGE)
        assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
        assert all("batch norm '2'" in r.getMessage() for r in caplog.records)
        assert isinstance(network[2], nn.BatchNorm2d)


class Twice(nn.Module):
    """A layer or a batch norm that is used twice, by ``which``."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.which == "norm":
            return self.norm(self.b(self.norm(self.a(x))))
        if self.which == "layer":
            return self.norm(self.a(self.a(x)))
        y = self.a(x)
        if self.which == "output added":
            return self.norm(y) + y
        if self.which == "output changed":
            out = self.norm(y)
            y.mul_(2)
            return out * y
        return torch.cat([self.norm(y), y]) if self.which == "output joined" else (self.norm(y), y)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "which", ["norm", "layer", "output added", "output changed", "output joined", "output returned"]
)
def test_what_is_used_twice_is_no_pair(which: str) -> None:
    assert observe(Twice(which), IMAGE).paired_norms() == {}


def test_a_linear_layer_on_sequences_is_no_pair() -> None:
    """Batch norm takes axis 1 for channels, a linear layer writes them to the last: equal sizes mislead."""
    network = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    assert observe(network, torch.zeros(2, 5, 5)).paired_norms() == {}
    assert observe(network, torch.zeros(2, 5)).paired_norms() == {"0": "1"}


def test_layers_called_by_keyword_are_seen() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.conv(input=x))

    trace = observe(Keywords(), IMAGE)
    assert trace.layers() == ["conv"]
    assert trace.paired_norms() == {"conv": "norm"}


def test_shapes_of_the_calls() -> None:
    (call,) = observe(conv_norm(), IMAGE).calls
    assert (call.layer, call.input_shape, call.output_shape) == ("0", (2, 3, 8, 8), (2, 4, 6, 6))


def test_mode_and_state_are_untouched() -> None:
    network = FixedPointUNet(1, 1, width=2)
    network.train()
    network.encoder[0].eval()  # a mixture of modes is kept too
    modes = {name: m.training for name, m in network.named_modules()}
    state = copy.deepcopy(network.state_dict())
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in network.named_modules()}
    example = torch.rand(1, 1, 16, 16)
    before = example.clone()
    observe(network, example)
    assert {name: m.training for name, m in network.named_modules()} == modes
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.equal(example, before)
    assert {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in network.named_modules()
    } == hooks
    assert all(p.grad is None for p in network.parameters())


def test_a_failing_network_is_a_value_error_with_the_shape() -> None:
    network = FixedPointUNet(1, 1, width=1).train()
    with pytest.raises(ValueError, match=r"FixedPointUNet failed.*\(1, 1, 12, 12\).*divisible.*example="):
        observe(network, torch.zeros(1, 1, 12, 12))
    assert all(m.training for m in network.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_an_example_is_found_from_the_first_convolution() -> None:
    assert example_for(FixedPointUNet(2, 1, width=1)).shape == (1, 2, 64, 64)
    assert example_for(FixedPointUNet(1, 1, width=1, spatial_dims=3)).shape == (1, 1, 32, 32, 32)
    assert example_for(nn.ConvTranspose1d(5, 2, 2)).shape == (1, 5, 64)
    assert example_for(nn.Conv2d(1, 1, 1).double()).dtype == torch.float64

    class Conv2dSame(nn.Conv2d):
        """A subclass whose name says nothing about its dimensions."""

    assert example_for(Conv2dSame(3, 1, 1)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"Linear has no convolution.*example="):
        example_for(nn.Linear(3, 3))


def test_image_layers_are_those_that_the_input_goes_into_as_it_is() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(4, 1, 1)
            self.unit = nn.Conv2d(3, 4, 3, padding=1)
            self.shortcut = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.unit(x) + self.shortcut(x))
            return out

    trace = observe(Residual(), IMAGE)
    assert trace.image_layers() == ["unit", "shortcut"]
    assert trace.layers()[-1] == "last"


class Normalized(nn.Module):
    """Convolutions in front of norms that no weight can hold, and in front of others."""

    def __init__(self) -> None:
        super().__init__()
        self.instance, self.instance_norm = nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True)
        self.group, self.group_norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.batch, self.batch_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4)
        self.unread = nn.Conv2d(4, 4, 1)
        self.last, self.last_norm = nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.batch_norm(self.batch(self.group_norm(self.group(self.instance_norm(self.instance(image))))))
        twice = self.twice(x)
        self.unread(x)
        last = self.last(twice + self.twice_norm(twice))
        return [last, self.last_norm(last)]


def test_normalized_layers_are_read_by_instance_and_group_norms_alone() -> None:
    assert observe(Normalized(), IMAGE).normalized_layers() == ["instance", "group"]
