"""What ``find_skips`` says about every network, that it leaves them alone, and channels followed by an independent
bookkeeping through random networks.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import monai.networks.nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.networks.nets import DenseNet
from torch import Tensor, nn
from torch.nn import functional as F

import monai_unetq.surgery
from monai_unetq.parts import kind_of
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import Skips, find_skips, quantize, split
from tests.surgery.networks import LARGE, NETWORKS, Case, Level


def shown(skips: Skips) -> tuple[str, ...]:
    """Parts and channels of what can be split, as ``"skip=8 up=4"``."""
    return tuple(" ".join(f"{p.name}={p.channels}" for p in found.parts) for found in skips.splittable)


def check(skips: Skips, case: Case, network: nn.Module) -> None:
    """Compare findings with what is known of the network."""
    assert shown(skips) == case.parts
    reasons = [found.reason for found in skips if found.reason]
    assert len(reasons) == len(case.left)
    assert all(piece in reason for piece, reason in zip(case.left, reasons, strict=True))
    modules = dict(network.named_modules())
    sources = {part.source for found in skips for part in found.parts}
    assert all(not source or not list(modules[source].children()) for source in sources)
    for found in skips.splittable:
        layer = cast(nn.Conv2d, modules[found.layer])
        assert sum(part.channels for part in found.parts) == layer.in_channels
        assert sum(found.parameters) == layer.weight.numel()
        assert len({macs / count for macs, count in zip(found.macs, found.parameters, strict=True)}) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_the_findings_are_what_the_architecture_says(name: str) -> None:
    case = NETWORKS[name]
    network = case.build()
    check(find_skips(network, torch.zeros(case.shape)), case, network)


@pytest.mark.parametrize("name", LARGE)
def test_large_networks_on_the_meta_device(name: str) -> None:
    case = LARGE[name]
    network = case.build().to("meta")
    check(find_skips(network, torch.zeros(case.shape, device="meta")), case, network)


SOURCES: dict[str, list[tuple[str, tuple[int, ...], list[tuple[str, int, str]]]]] = {
    "UNet": [
        ("model.1.submodule.1.submodule.2.conv", (4, 4), [
            ("skip", 16, "model.1.submodule.1.submodule.0.conv"),
            ("up", 20, "model.1.submodule.1.submodule.1.submodule.conv")]),
        ("model.1.submodule.2.conv", (8, 8), [
            ("skip", 8, "model.1.submodule.0.conv"), ("up", 8, "model.1.submodule.1.submodule.2.conv")]),
        ("model.2.conv", (16, 16), [("skip", 4, "model.0.conv"), ("up", 4, "model.1.submodule.2.conv")]),
    ],
    "BasicUNetPlusPlus": [
        ("upcat_0_3.convs.conv_0.conv", (32, 32), [
            ("skip", 4, "conv_0_0.conv_1.conv"), ("skip.1", 4, "upcat_0_1.convs.conv_1.conv"),
            ("skip.2", 4, "upcat_0_2.convs.conv_1.conv"), ("up", 4, "upcat_0_3.upsample.deconv")]),
    ],
    "AttentionUnet": [  # gated: the skip is the encoder's, although the upsampled path decides how much of it
        ("model.1.merge.conv", (32, 32), [
            ("skip", 4, "model.0.conv.1.conv"), ("up", 4, "model.1.upconv.up.conv")]),
    ],
    "UNETR": [  # from the image itself
        ("decoder2.conv_block.conv3.conv", (32, 32), [
            ("up", 4, "decoder2.transp_conv.conv"), ("skip", 4, "encoder1.layer.conv3.conv")]),
    ],
    "PlainConvUNet 3D": [
        ("decoder.stages.0.convs.0.conv", (16, 8, 8), [
            ("up", 8, "decoder.transpconvs.0"), ("skip", 8, "encoder.stages.1.0.convs.1.conv")]),
        ("decoder.stages.1.convs.0.conv", (16, 16, 16), [
            ("up", 4, "decoder.transpconvs.1"), ("skip", 4, "encoder.stages.0.0.convs.1.conv")]),
    ],
    "FixedPointUNet": [
        ("decoder.0.conv1", (8, 8), [("skip", 8, "encoder.2.conv2"), ("up", 8, "encoder.3.conv2")]),
        ("decoder.1.conv1", (16, 16), [("skip", 4, "encoder.1.conv2"), ("up", 8, "decoder.0.conv2")]),
        ("decoder.2.conv1", (32, 32), [("skip", 2, "encoder.0.conv2"), ("up", 4, "decoder.1.conv2")]),
    ],
    "own, five parts": [
        ("read", (32, 32), [("skip", 4, "enter"), ("up", 6, "below"), ("skip.1", 1, ""),
                            ("skip.2", 4, "enter"), ("up.1", 6, "below")]),
    ],
    "own, sliced": [("read", (32, 32), [("skip", 1, "enter"), ("up", 6, "below")])],
    "own, unbatched": [("read", (32, 32), [("skip", 4, "enter"), ("up", 6, "widen")])],
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_layers_channels_and_sources_by_hand(name: str) -> None:
    case = NETWORKS[name]
    found = {
        entry.layer: (entry.resolution, [(part.name, part.channels, part.source) for part in entry.parts])
        for entry in find_skips(case.build(), torch.zeros(case.shape)).splittable
    }
    wanted = {layer: (size, parts) for layer, size, parts in SOURCES[name]}
    assert {layer: found[layer] for layer in wanted} == wanted
    assert len(wanted) in (1, len(found))


def test_parameters_and_macs_by_hand() -> None:
    read, shortcut = find_skips(NETWORKS["own, two readers"].build(), torch.zeros(3, 1, 32, 32))
    assert (read.parameters, shortcut.parameters) == ((2 * 4 * 9, 2 * 6 * 9), (2 * 4, 2 * 6))
    assert (read.macs, shortcut.macs) == ((72 * 1024, 108 * 1024), (8 * 1024, 12 * 1024))
    (transposed,) = find_skips(NETWORKS["own, nested"].build(), torch.zeros(1, 1, 32, 32))
    assert transposed.parameters == (8, 32, 48)  # 2 outputs, 2×2 taps, at every one of 32×32 input pixels
    assert transposed.macs == (8 * 1024, 32 * 1024, 48 * 1024)


class Between(Level):
    """Does something to the concatenation before it is read; the skip's 4 channels come first."""

    def __init__(self, change: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.change, self.read = change, nn.Conv2d(channels, 2, 1)

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(self.change(torch.cat([skip, up], 1)))
        return out


ACTIVATIONS: list[nn.Module] = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True), nn.PReLU(), nn.PReLU(10), nn.RReLU(), nn.ELU(),
    nn.CELU(), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Hardswish(), nn.Hardswish(inplace=True),
    nn.Hardsigmoid(), nn.Hardtanh(), nn.ReLU6(), nn.LogSigmoid(), nn.Softsign(), nn.Tanh(), nn.Dropout2d(),
    nn.AlphaDropout(), nn.BatchNorm2d(10), nn.InstanceNorm2d(10), nn.GroupNorm(5, 10), nn.LocalResponseNorm(2),
    nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(2),
    nn.AdaptiveAvgPool2d(4), nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Identity(),
]  # fmt: skip


@pytest.mark.parametrize("module", ACTIVATIONS, ids=lambda module: str(module))
def test_modules_that_keep_channels_apart(module: nn.Module) -> None:
    assert shown(find_skips(Between(module, 10), torch.zeros(1, 1, 16, 16))) == ("skip=4 up=6",)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "narrow": (lambda x: x.narrow(1, 2, 6), "skip=2 up=4"),
    "every second": (lambda x: x[:, 1::2], "skip=2 up=3"),
    "one channel": (lambda x: x[:, 3].unsqueeze(1), ""),
    "only one part": (lambda x: x[:, 4:], ""),
    "flip channels": (lambda x: x.flip(1), "up=6 skip=4"),
    "flip rows": (lambda x: x.flip(2), "skip=4 up=6"),
    "roll channels by a part": (lambda x: x.roll(6, 1), "up=6 skip=4"),
    "roll channels through a part": (lambda x: x.roll(2, 1), ""),
    "roll rows": (lambda x: x.roll((1, 2), (2, 3)), "skip=4 up=6"),
    "sum up channels": (lambda x: x.cumsum(1), ""),
    "sum up rows": (lambda x: x.cumsum(2), ""),  # rare enough to be left alone
    "split and turn round": (lambda x: torch.cat(x.split([4, 6], 1)[::-1], 1), "up=6 skip=4"),
    "halves": (lambda x: torch.cat(x.chunk(2, 1), 1), "skip=4 up=1 up.1=5"),
    "transpose": (lambda x: x.transpose(1, 3).relu().transpose(1, 3), "skip=4 up=6"),
    "flatten": (lambda x: x.flatten(2).softmax(1).view_as(x), ""),
    "flatten and back": (lambda x: x.flatten(2).tanh().unflatten(2, (16, 16)), "skip=4 up=6"),
    "layer norm over channels": (
        lambda x: F.layer_norm(x.movedim(1, -1), (10,)).movedim(-1, 1), "skip=4 up=6",
    ),
    "standardize": (lambda x: (x - x.mean((2, 3), True)) / (x.var((2, 3), keepdim=True) + 1), "skip=4 up=6"),
    "scale for each channel": (lambda x: torch.ones(1, 10, 1, 1) * x + torch.ones(10, 1, 1), "skip=4 up=6"),
    "mask": (lambda x: torch.where(x > 0, x, x * 0.1), "skip=4 up=6"),
    "in place": (lambda x: x.relu_().mul_(2).add_(1), "skip=4 up=6"),
    "half": (lambda x: x.half().float(), "skip=4 up=6"),
    "copy": (lambda x: torch.empty_like(x).copy_(x), "skip=4 up=6"),
    "noise": (lambda x: x + torch.randn_like(x), "skip=4 up=6"),
    "zeros": (lambda x: x + torch.zeros_like(x), "skip=4 up=6"),
    "softmax over channels": (lambda x: x.softmax(1), ""),
    "index": (lambda x: x[:, torch.tensor([0, 5, 1, 6, 2, 7, 3, 8, 4, 9])], ""),
    "gated linear unit": (lambda x: F.glu(torch.cat([x, x], 1), 1), ""),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2)[:, :10], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_between_concatenation_and_convolution(name: str) -> None:
    change, wanted = FUNCTIONS[name]
    image = torch.zeros(1, 1, 16, 16)
    channels = change(torch.zeros(1, 10, 16, 16)).shape[1]
    found = find_skips(Between(change, channels), image)
    assert shown(found) == ((wanted,) if wanted else ())
    if not wanted and name != "only one part":
        assert found[0].reason, "what is left alone is said"


class Random(Level):
    """Draws random numbers and changes a buffer, also in evaluation, and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.calls = nn.Dropout(0.5), torch.nn.Buffer(torch.zeros(2))

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().join(image, self.dropout(skip) * torch.rand(1), F.dropout(up, 0.5, training=True))


def everything(network: nn.Module) -> dict[str, Any]:
    """Classes, modes, hooks and attributes of all modules, and the objects that they hold."""
    return {
        name: (
            type(module),
            {
                key: dict(value) if isinstance(value, dict) else value
                for key, value in vars(module).items()
            },
        )
        for name, module in network.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("name", ["random", "FixedPointUNet", "PlainConvUNet", "UNETR", "VNet"])
def test_the_network_is_left_as_it_is(name: str) -> None:
    network = Random() if name == "random" else NETWORKS[name].build()
    for number, module in enumerate(network.modules()):
        module.training = number % 3 != 1  # each its own mode
    before, state = everything(network), copy.deepcopy(network.state_dict())
    random = torch.random.get_rng_state()
    find_skips(network, torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert everything(network) == before
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())
    after = network.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_one_forward_pass() -> None:
    network = Level()
    calls = []
    handle = network.read.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    find_skips(network, torch.zeros(1, 1, 8, 8))
    assert calls == [False]
    handle.remove()


def test_a_network_that_fails_keeps_no_hooks() -> None:
    network = NETWORKS["FixedPointUNet"].build().train()
    with pytest.raises(ValueError, match=r"FixedPointUNet failed on an example of shape \(1, 1, 9, 9\)"):
        find_skips(network, torch.zeros(1, 1, 9, 9))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    "name", ["UNet", "BasicUNet", "DynUNet", "AttentionUnet", "VNet", "ResidualUNet 3D", "FixedPointUNet", "UNETR"]
)  # fmt: skip
def test_the_meta_device_says_the_same(name: str) -> None:
    case = NETWORKS[name]
    network = case.build()
    found = find_skips(network, torch.zeros(case.shape))
    assert find_skips(network.to("meta"), torch.zeros(case.shape, device="meta")) == found


def test_the_example_is_found_out() -> None:
    network = NETWORKS["FixedPointUNet"].build()
    assert find_skips(network) == find_skips(network, torch.zeros(1, 1, 64, 64))


def network_classes() -> set[str]:
    """Names of all networks of MONAI and of nnU-Net's collection."""
    found = vars(monai.networks.nets)
    architectures = importlib.import_module("dynamic_network_architectures.architectures")
    for module in pkgutil.walk_packages(
        architectures.__path__, "dynamic_network_architectures.architectures."
    ):
        found = {**found, **vars(importlib.import_module(module.name))}
    return {
        name
        for name, value in found.items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and not value.__module__.startswith("torch.")
    }  # fmt: skip


def test_no_network_is_named_in_surgery() -> None:
    names = network_classes()
    assert {"UNet", "SwinUNETR", "VNet", "PlainConvUNet", "ResidualEncoderUNet"} <= names
    sources = list(Path(monai_unetq.surgery.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    for source in sources:
        assert not names & set(re.findall(r"\w+", source.read_text(encoding="utf-8"))), source.name


# Random networks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Consecutive channels of one origin: the layer that made them, and whether they came from a lower resolution."""

    source: str
    below: bool
    channels: int


@dataclass(frozen=True)
class Step:
    """One operation of a random network.

    Attributes:
        function: what it does to its operands.
        operands: numbers of the earlier results that it takes.
        module: the layer in it, if any.
    """

    function: Callable[..., Tensor]
    operands: tuple[int, ...]
    module: nn.Module | None = None


class Program(nn.Module):
    """Steps, one after the other; returns the results of the last few."""

    def __init__(self, steps: list[Step], outputs: list[int]) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        for number, step in enumerate(steps, 1):
            if step.module is not None:
                self.add_module(f"step{number}", step.module)

    def forward(self, image: Tensor) -> list[Tensor]:
        results = [image]
        for number, step in enumerate(self.steps, 1):
            layer = getattr(self, f"step{number}", None)
            operands = [results[i] for i in step.operands]
            results.append(step.function(*operands) if layer is None else step.function(layer, *operands))
        return [results[i] for i in self.outputs]


CHANNELWISE: dict[str, Callable[[int], nn.Module | None]] = {
    "relu": lambda channels: None,
    "leaky_relu": lambda channels: nn.LeakyReLU(0.1),
    "batch norm": lambda channels: nn.BatchNorm2d(channels),
    "instance norm": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "group norm": lambda channels: nn.GroupNorm(1, channels),
    "dropout": lambda channels: nn.Dropout(0.3),
    "pad and crop": lambda channels: nn.ZeroPad2d((1, 2, 0, 1)),
}


@dataclass
class Drawn:
    """A random network, and the origin of every channel that each of its layers reads, noted while it was drawn."""

    network: Program
    read: dict[str, list[Run]]


LEVELS = 3


@st.composite
def programs(draw: st.DrawFn) -> Drawn:
    """A network of 16×16, 8×8 and 4×4 pixels out of the operations that U-Nets are made of."""
    steps: list[Step] = []
    runs: list[list[Run]] = [[Run("", False, 2)]]  # of each result; the first is the image
    levels = [0]
    read: dict[str, list[Run]] = {}

    def add(function: Callable[..., Tensor], operands: tuple[int, ...], module: nn.Module | None,
            origin: list[Run], level: int) -> int:  # fmt: skip
        steps.append(Step(function, operands, module))
        runs.append(origin)
        levels.append(level)
        return len(steps)

    def width(of: int) -> int:
        return sum(run.channels for run in runs[of])

    def convolve(of: int, channels: int, step: int = 0, kernel: int = 1) -> int:
        """A convolution, down with step 1, a transposed one up with step -1."""
        layer: nn.Module = (
            nn.ConvTranspose2d(width(of), channels, 2, stride=2) if step < 0
            else nn.Conv2d(width(of), channels, kernel, stride=1 + step, padding=kernel // 2)
        )  # fmt: skip
        name = f"step{len(steps) + 1}"
        read[name] = runs[of]
        below = step < 0 or (step == 0 and all(run.below for run in runs[of]))
        return add(lambda module, x: module(x), (of,), layer, [Run(name, below, channels)], levels[of] + step)

    def resample(of: int, step: int) -> int:
        kind = draw(st.sampled_from(["nearest", "bilinear"]))

        def function(x: Tensor) -> Tensor:
            return F.max_pool2d(x, 2) if step > 0 else F.interpolate(x, scale_factor=2.0, mode=kind)

        origin = [Run(run.source, step < 0, run.channels) for run in runs[of]]
        return add(function, (of,), None, origin, levels[of] + step)

    def some(of: list[int]) -> int:
        return draw(st.sampled_from(of))

    channels = st.integers(1, 4)
    # One result at every level to begin with, then whatever comes; what was made last is taken most often.
    here = convolve(0, draw(channels), kernel=3)
    for _ in range(1, LEVELS):
        here = convolve(resample(here, 1), draw(channels), kernel=3)
    for _ in range(draw(st.integers(4, 14))):
        level = draw(st.integers(0, LEVELS - 1))
        at = [i for i, found in enumerate(levels) if found == level]
        of = some(at[-3:])
        kind = draw(st.sampled_from(["cat"] * 3 + ["channelwise", "slice", "gate", "resample", "convolve"]))
        if kind == "cat":
            lower = [i for i, found in enumerate(levels) if found == level + 1]
            operands = [some(at) for _ in range(draw(st.integers(1, 2)))]
            if lower:
                lifted = some(lower)
                operands.append(
                    convolve(lifted, draw(channels), -1) if draw(st.booleans()) else resample(lifted, -1)
                )
            operands = draw(st.permutations(operands))
            origin = [run for i in operands for run in runs[i]]
            here = add(lambda *x: torch.cat(x, 1), tuple(operands), None, origin, level)
        elif kind == "channelwise":
            name = draw(st.sampled_from(sorted(CHANNELWISE)))
            crop = name == "pad and crop"

            def function(module: Any, x: Tensor | None = None, crop: bool = crop) -> Tensor:
                if x is None:
                    return torch.relu(module)
                y: Tensor = module(x)
                return y[:, :, : x.shape[2], 1 : x.shape[3] + 1] if crop else y

            here = add(function, (of,), CHANNELWISE[name](width(of)), runs[of], level)
        elif kind == "slice":
            start = draw(st.integers(0, width(of) - 1))
            end = draw(st.integers(start + 1, width(of)))
            ends = [0]
            for run in runs[of]:
                ends.append(ends[-1] + run.channels)
            kept = [min(end, b) - max(start, a) for a, b in pairwise(ends)]
            origin = [
                Run(run.source, run.below, count)
                for run, count in zip(runs[of], kept, strict=True)
                if count > 0
            ]
            here = add(lambda x, s=start, e=end: x[:, s:e], (of,), None, origin, level)
        elif kind == "gate" and width(of) > 1:  # with one channel, gate and gated cannot be told apart
            gate = convolve(of, 1)
            here = add(lambda x, g: x * torch.sigmoid(g), (of, gate), None, runs[of], level)
        elif kind == "resample":
            here = resample(
                of, 1 if level == 0 else draw(st.sampled_from([1, -1])) if level < LEVELS - 1 else -1
            )
        else:
            step = draw(st.sampled_from([0, 0, 1] if level == 0 else [0, 0, -1]))
            here = convolve(of, draw(channels), step, draw(st.sampled_from([1, 3])))
    # Everything that nothing has read yet is read in the end.
    used = {i for step in steps for i in step.operands}
    outputs = [convolve(i, 2) for i in range(1, len(runs)) if i not in used]
    return Drawn(Program(steps, outputs), read)


def named(found: list[Run]) -> list[tuple[str, int, str]]:
    """Parts as they are to be called, by what came from below."""
    seen: Counter[str] = Counter()
    parts = []
    for run in found:
        kind = "up" if run.below else "skip"
        parts.append((kind + (f".{seen[kind]}" if seen[kind] else ""), run.channels, run.source))
        seen[kind] += 1
    return parts


@settings(max_examples=40)
@given(programs(), st.integers(0, 2**31))
def test_random_networks_are_understood_and_split_exactly(drawn: Drawn, seed: int) -> None:
    torch.manual_seed(seed)
    network = drawn.network.eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    image = torch.randn(2, 2, 16, 16)
    found = {entry.layer: entry for entry in find_skips(network, image)}
    for layer, runs in drawn.read.items():
        if len(runs) > 1 and len({run.below for run in runs}) > 1:
            assert [(p.name, p.channels, p.source) for p in found[layer].parts] == named(runs), layer
            assert not found[layer].reason
    for layer, entry in found.items():  # also where all parts are of one resolution, and depth decides
        assert [(p.channels, p.source) for p in entry.parts] == [
            (run.channels, run.source) for run in drawn.read[layer]
        ]
        assert {kind_of(p.name) for p in entry.parts} == {"skip", "up"}
    before = network(image)
    split(network, image)
    assert find_skips(network, image) == tuple(found.values())
    assert {name for name, m in network.named_modules() if type(m).__name__.startswith("Split")} == set(found)
    assert all(torch.equal(a, b) for a, b in zip(network(image), before, strict=True))
    quantize(network, QuantPlan.uniform(network, "int8", "int8"), image)
    assert find_skips(network, image) == tuple(found.values())


class Decoder(nn.Module):
    """One level of a U-Net whose concatenation is made and read as a function says."""

    def __init__(self, joined: Callable[[Tensor, Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 4, 3, padding=1)
        self.below = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.read = nn.Conv2d(channels, 2, 3, padding=1)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        return self.read(self.joined(skip, self.up(self.below(skip))))


def buffered(skip: Tensor, up: Tensor) -> Tensor:
    joined = skip.new_empty(skip.shape[0], 8, *skip.shape[2:])
    joined[:, :4] = up
    joined[:, 4:] = skip
    return joined


@pytest.mark.parametrize(
    ("joined", "expected"),
    [
        (lambda s, u: F.avg_pool2d(torch.cat([s * u.sigmoid(), u], 1), 2), "skip=4 up=4"),
        (lambda s, u: F.interpolate(torch.cat([u, s + u], 1), scale_factor=2.0), "up=4 skip=4"),
        (lambda s, u: torch.stack([u, s], 1).flatten(1, 2), "up=4 skip=4"),
        (buffered, "up=4 skip=4"),
        (lambda s, u: torch.cat([torch.cat([s, u], 1)] * 2, 0), "skip=4 up=4"),
    ],
)
def test_ways_to_join_and_to_go_on(joined: Callable[[Tensor, Tensor], Tensor], expected: str) -> None:
    (found,) = find_skips(Decoder(joined), torch.zeros(1, 1, 16, 16))
    assert " ".join(f"{part.name}={part.channels}" for part in found.parts) == expected
    assert found.layer == "read" and not found.reason


def test_an_example_with_meta_data_is_an_image_like_any_other() -> None:
    network: Any = Decoder(lambda s, u: torch.cat([s.relu(), u.relu()], 1))
    assert find_skips(network, MetaTensor(torch.zeros(1, 1, 16, 16))).splittable
    plan = QuantPlan.uniform(network, "int8", "Q6.0")
    quantize(network, plan, MetaTensor(torch.zeros(1, 1, 16, 16)))
    assert str(network.read.input_quantizer.number_format) == "UQ6.0"


def test_a_densely_connected_classifier_has_no_skips() -> None:
    network = DenseNet(2, 1, 2, init_features=8, growth_rate=4, block_config=(2, 3))
    assert not find_skips(network, torch.zeros(1, 1, 64, 64))


def test_the_pooled_branch_of_parallel_ones_is_no_upsampled_path() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(1, 2, 1) for _ in range(3))
            self.read = nn.Conv2d(6, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            whole = F.interpolate(self.third(x.mean((2, 3), keepdim=True)), size=x.shape[2:])
            return self.read(torch.cat([self.first(x), self.second(x), whole], 1))

    assert not find_skips(Parallel(), torch.zeros(1, 1, 8, 8))


def test_no_hook_stays_where_a_network_fails_or_holds_a_script() -> None:
    network = Decoder(lambda s, u: torch.cat([s, u], 1))
    network.scripted = torch.jit.script(nn.ReLU())
    assert find_skips(network, torch.zeros(1, 1, 16, 16)).splittable
    with pytest.raises(ValueError, match="failed on an example"):
        find_skips(network, torch.zeros(1, 3, 16, 16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_an_error_that_the_network_catches_itself_does_not_hide_what_follows() -> None:
    class Trying(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.read(x)  # one channel, where eight are expected
            return super().forward(x)

    assert find_skips(Trying(lambda s, u: torch.cat([s, u], 1)), torch.zeros(1, 1, 16, 16)).splittable
