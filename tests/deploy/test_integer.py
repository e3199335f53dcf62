"""Integers equal fake quantization in float64, bit for bit, on every network; what they cannot hold is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from monai.networks.nets import BasicUNet, DynUNet, UNet
from torch import Tensor, nn
from torch.nn import functional as F

from monai_unetq.deploy.integer import lower, write
from monai_unetq.deploy.trace import trace
from monai_unetq.formats import QFormat
from monai_unetq.networks import FixedPointUNet
from monai_unetq.parts import WHOLE
from monai_unetq.plan import LayerPlan, QuantPlan
from monai_unetq.runtime.integer import load
from monai_unetq.runtime.program import Convolve, Program
from monai_unetq.surgery import fold, quantize, split
from monai_unetq.surgery.quantize import quantized_layers
from monai_unetq.training import calibrate

W8A8: dict[str, Any] = {"weights": "int8", "activations": "int8", "input": "int8"}
W4A6: dict[str, Any] = {"weights": "int4", "activations": "int6", "input": "uint8", "last": "int8"}
MIXED = ("int2", "int8", "ternary", "int3", "binary", "pow2-4", "int5", "Q0.4")


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch norms as after training: some gains negative, one 0."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            shape = (module.num_features,)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(0.2 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            with torch.no_grad():
                module.weight.copy_(1 + torch.rand(shape, generator=generator))
                module.weight[::3] *= -1
                module.weight[1] = 0
                module.bias.copy_(0.3 * torch.randn(shape, generator=generator) + 0.3)
    return network.eval()


def example_of(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))


def quantized(
    network: nn.Module, example: Tensor, plan: Callable[[nn.Module], QuantPlan] | dict[str, Any]
) -> nn.Module:
    made = plan(network) if callable(plan) else QuantPlan.uniform(network, **plan)
    # Heads of deep supervision that do not run.
    unused = [f"decoder.seg_layers.{i}" for i in range(8) if f"decoder.seg_layers.{i}" in made][:-1]
    quantize(network, made.without(unused), example)
    calibrate(network, [example])
    return network.eval()


def mixed(network: nn.Module) -> QuantPlan:
    """Another format for every layer, and other activations."""
    plan = QuantPlan.uniform(network, **W4A6)
    layers = {}
    for number, (name, layer) in enumerate(plan.layers.items()):
        activation = layer.input if not number else QFormat(f"int{3 + number % 6}")
        layers[name] = LayerPlan.whole(QFormat(MIXED[number % len(MIXED)]), activation)
    return plan.with_layers(layers)


def check(network: nn.Module, example: Tensor, folder: Path, sizes: tuple[int, ...] | None = None) -> Program:
    """Export, load, run two images of another content (and size), compare with float64; the program."""
    before = copy.deepcopy(network.state_dict())
    program = write(trace(network, example, dynamic=False), network, folder)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    shape = (2, example.shape[1], *(sizes or example.shape[2:]))
    image = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.7 + 0.3
    logits, exponents = load(folder)(image.numpy())
    exact = fold(copy.deepcopy(network), example).double()
    with torch.no_grad():
        expected = exact(image.double()).numpy()
    assert expected.std() > 1e-4
    assert logits.dtype.kind == "i"
    found = np.ldexp(logits.astype(np.float64), -exponents.reshape(-1, *[1] * (logits.ndim - 2)))
    assert np.array_equal(found, expected)
    return program


def nnunet(cls: type, dimensions: int, strides: list[Any], **blocks: Any) -> nn.Module:
    network: nn.Module = cls(
        1, len(strides), [4, 6, 8][: len(strides)], (nn.Conv2d, nn.Conv3d)[dimensions - 2], 3, strides, num_classes=3,
        conv_bias=True, norm_op=(nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 2], norm_op_kwargs={"eps": 1e-5},
        nonlin=nn.ReLU, nonlin_kwargs={"inplace": True}, deep_supervision=False, **blocks,
    )  # fmt: skip
    return network


BASIC = (4, 4, 6, 6, 8, 4)
SMALL: dict[str, Any] = {
    "kernel_size": (3, 3, 1), "strides": (1, 2, 1), "upsample_kernel_size": (2, 1), "filters": (4, 6, 6),
}  # fmt: skip
LEAKY = ("leakyrelu", {"negative_slope": 0.125})

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, Any]] = {
    "FixedPointUNet, split": (lambda: FixedPointUNet(2, 1, width=2), (2, 16, 8), True, W4A6),
    "FixedPointUNet 3D, hardtanh": (
        lambda: FixedPointUNet(1, 2, width=2, spatial_dims=3, activation="hardtanh"), (1, 8, 8, 8), False, mixed),
    "UNet, PReLU at its start, split": (lambda: UNet(2, 1, 2, (4, 8), (2,), norm="batch"), (1, 8, 12), True, W8A8),
    "UNet 3D, residual": (
        lambda: UNet(3, 1, 2, (4, 8), (2,), num_res_units=2, act="relu", norm="batch"), (1, 6, 6, 6), False, W4A6),
    "BasicUNet, leaky": (lambda: BasicUNet(2, 1, 2, BASIC, act=LEAKY, norm="batch"), (1, 16, 16), False, W8A8),
    "DynUNet 3D, residual, split": (
        lambda: DynUNet(3, 1, 2, **SMALL, norm_name="batch", act_name="relu", res_block=True), (1, 6, 6, 6), True, W4A6),
    "PlainConvUNet, split": (
        lambda: nnunet(PlainConvUNet, 2, [1, 2], n_conv_per_stage=2, n_conv_per_stage_decoder=1), (1, 8, 8), True, mixed),
    "ResidualEncoderUNet 3D": (
        lambda: nnunet(ResidualEncoderUNet, 3, [1, [1, 2, 2]], n_blocks_per_stage=1, n_conv_per_stage_decoder=1),
        (1, 4, 8, 8), False, W4A6),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_equal_bit_for_bit(name: str, tmp_path: Path) -> None:
    build, shape, splits, plan = NETWORKS[name]
    torch.manual_seed(0)
    network, example = with_statistics(build()), example_of(shape)
    if splits:
        split(network, example)
    quantized(network, example, plan)
    program = check(network, example, tmp_path, tuple(2 * size for size in shape[1:]))
    layers = quantized_layers(network)
    heads = [name for name in layers if "seg_layers" in name][:-1]
    assert set(program.layers()) == set(layers) - set(heads)
    assert {entry["accumulator"] for entry in program.layers().values()} == {"int32"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.unetq", "program.json"]


class Everything(nn.Module):
    """Groups, dilations, average pooling, both ways to upsample, cropping, clipping, output padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(
            8, 4, 3, stride=(2, 3), padding=(1, 0), output_padding=1, dilation=(1, 2)
        )
        self.beside = nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate")
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        low = F.relu6(self.wide(F.avg_pool2d(torch.relu(self.first(image)), 2)))
        near, smooth = (F.interpolate(low, scale_factor=2.0, mode=mode) for mode in ("nearest", "bilinear"))
        up = F.leaky_relu(self.up(torch.cat([near, smooth], 1))[:, :, 1:9, 2:-1], 0.25)
        out: Tensor = self.last(up + F.hardtanh(self.beside(up), -0.5, 0.75))
        return out


FORMATS: dict[str, dict[str, Any]] = {
    "static": {"weights": "Q0.4", "activations": "Q3.3", "input": "UQ0.8"},
    "ternary": {"weights": "ternary", "activations": "ternary", "input": "int8"},
    "binary": {"weights": "binary", "activations": "binary", "input": "int8"},
    "the printed formula": {"weights": "Q1.3:literal", "activations": "Q2.3:literal"},
    "powers of two": {"weights": "pow2-4", "activations": "UQ4.4", "input": "Q3.5"},
    "one scale, wide": {"weights": "int16", "activations": "int16", "granularity": "tensor"},
    "learned": {"weights": "int3", "activations": "int4", "learned": True},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_equal_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    example = example_of((2, 8, 8))
    network = quantized(Everything().eval(), example, FORMATS[name])
    program = check(network, example, tmp_path)
    needed = {entry["accumulator"] for entry in program.layers().values()}
    assert ("int64" in needed) == (name == "one scale, wide")


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.last = (
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.Linear(64, 6),
            nn.Linear(6, 3),
        )

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.wide(torch.relu(self.first(image)).flatten(1))))
        return out


@pytest.mark.parametrize("dimensions", [1, 0])
def test_other_dimensions_and_linear_layers(dimensions: int, tmp_path: Path) -> None:
    torch.manual_seed(4)
    network: nn.Module = Perceptron()
    shape: tuple[int, ...] = (2, 8, 8)
    if dimensions == 1:
        network = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 2))
        shape = (2, 9)
    check(quantized(with_statistics(network), example_of(shape), W4A6), example_of(shape), tmp_path)


def test_a_bias_that_is_not_rounded(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network, example = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 1)).eval(),
        example_of((1, 8, 8)),
    )

    def floats(net: nn.Module) -> QuantPlan:
        plan = QuantPlan.uniform(net, **W8A8)
        return plan.with_layers(
            {name: LayerPlan(p.weights, p.inputs, "float") for name, p in plan.layers.items()}
        )

    quantized(network, example, floats)
    program = check(network, example, tmp_path)
    assert program.layers()["0"]["bound"] > 1 << 20


def test_one_image_read_twice_and_as_a_skip(tmp_path: Path) -> None:
    """The image is a part of a split convolution, unrounded until there."""

    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.below = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
            self.read = nn.Conv2d(6, 2, 3, padding=1)

        def forward(self, image: Tensor) -> Tensor:
            skip = torch.relu(self.enter(image))
            up = F.interpolate(torch.relu(self.below(F.max_pool2d(skip, 2))), scale_factor=2.0)
            out: Tensor = self.read(torch.cat([skip, up, image], 1))
            return out

    torch.manual_seed(6)
    network, example = Level().eval(), example_of((1, 8, 8))
    split(network, example)
    quantized(network, example, W4A6)
    program = check(network, example, tmp_path)
    assert sum("image" in operation.inputs for operation in program.operations) == 2


# Refusals


def two(*between: nn.Module, channels: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), *between, nn.Conv2d(channels, 2, 1)).eval()


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


REFUSED: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "instance norm": (two(nn.InstanceNorm2d(4), nn.ReLU()), W8A8, r"'1' \(InstanceNorm2d\).*train with batch norm"),
    "group norm": (two(nn.GroupNorm(2, 4), nn.ReLU()), W8A8, r"'1' \(GroupNorm\)"),
    "slope": (two(nn.LeakyReLU(0.01)), W8A8, r"'1' \(LeakyReLU\).*slope 0.01 is no power of two.*0.0078125"),
    "learned slope": (two(nn.PReLU(init=0.3)), W8A8, r"'1' \(PReLU\).*slope 0.3 is no power of two.*0.25"),
    "tanh": (two(nn.Tanh()), W8A8, r"'1' \(Tanh\).*hardtanh"),
    "sigmoid at the end": (nn.Sequential(two(), nn.Sigmoid()), W8A8, r"'1' \(Sigmoid\).*leave it out"),
    "softmax at the end": (nn.Sequential(two(), nn.Softmax(1)), W8A8, r"'1' \(Softmax\).*leave it out"),
    "GELU": (two(nn.GELU()), W8A8, r"'1' \(GELU\)"),
    "product": (two(Gate()), W8A8, r"'1' \(Gate\).*Mul"),
    "corners": (
        nn.Sequential(two(), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)), W8A8,
        r"'1' \(Upsample\).*align_corners=False"),
    "a factor of three": (
        two(nn.Upsample(scale_factor=3, mode="bilinear")), W8A8, r"'1' \(Upsample\).*powers of two"),
    "a window of nine": (two(nn.AvgPool2d(3)), W8A8, r"'1' \(AvgPool2d\).*9 values"),
    "a layer kept float": (two(nn.ReLU()), {**W8A8, "keep_float": ["2"]}, "layer '2' is kept float"),
    "a float input": (two(nn.ReLU()), {**W8A8, "activations": "float"}, "layer '2': its input is not rounded"),
    "a free scale": (two(nn.ReLU()), {**W8A8, "scale": "free"}, "layer '0': .* no power of two: .*'power-of-two'"),
    "the image first": (
        nn.Sequential(nn.MaxPool2d(2), *two(nn.ReLU())), W8A8, r"'0' \(MaxPool2d\).*before that is rounded"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_integers_cannot_hold_is_refused_by_name(name: str) -> None:
    network, formats, message = REFUSED[name]
    example = example_of((1, 9, 9))
    quantized(network, example, formats)
    with pytest.raises(ValueError, match=message):
        lower(trace(network, example, dynamic=False))


def test_sums_beyond_64_bits_are_refused_by_name() -> None:
    network, example = two(nn.ReLU()), example_of((1, 8, 8))
    quantized(network, example, {"weights": "int8", "activations": "int8"})
    layer = quantized_layers(network)["2"]
    with torch.no_grad():  # one tiny weight beside a large bias
        assert layer.bias is not None
        layer.weight_quantizer.log2_scale.sub_(45)
        layer.weight.mul_(2.0**-45)
        layer.bias.fill_(1.5)
    with pytest.raises(ValueError, match=r"layer '2': .*64-bit accumulator"):
        lower(trace(network, example, dynamic=False))


def test_channels_that_their_bias_drowns(tmp_path: Path) -> None:
    """A batch norm's gain of almost 0: float64 does not see the weights beside the bias, but does where there is none."""
    torch.manual_seed(9)
    network, example = two(nn.ReLU()), example_of((1, 8, 8))
    quantized(network, example, W8A8)
    layer = quantized_layers(network)["0"]
    with torch.no_grad():
        assert layer.bias is not None
        layer.weight_quantizer.log2_scale[:2] -= 90
        layer.weight[:2] *= 2.0**-90
        layer.bias[:2] = torch.tensor([0.3, 0.0])
    program = check(network, example, tmp_path)
    (first,) = (op for op in program.operations if isinstance(op, Convolve) and op.layer == "0")
    assert first.silent == (0,)
    assert program.grids[first.output].exponents[1] > 90


# Files


def test_another_network_than_the_traced_one_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(7)
    example = example_of((1, 8, 8))
    network = quantized(two(nn.ReLU()), example, W8A8)
    traced = trace(network, example, dynamic=False)
    with torch.no_grad():
        network[0].weight[0] *= -1  # type: ignore[index]
    with pytest.raises(ValueError, match="layer '0' is not what was traced"):
        write(traced, network, tmp_path)
    assert not (tmp_path / "program.json").exists()


def test_what_is_written(tmp_path: Path) -> None:
    torch.manual_seed(8)
    example = example_of((1, 8, 8))
    network = quantized(two(nn.ReLU()), example, W4A6)
    traced = trace(network, example, dynamic=False)
    program = write(traced, network, tmp_path)
    document = json.loads((tmp_path / "program.json").read_text())
    assert Program.from_json(document) == program == load(tmp_path).program
    assert document["packed"]["file"] == "model.unetq"
    assert lower(traced).packed is None
    assert [operation["op"] for operation in document["operations"]] == [
        "round",
        "convolve",
        "clip",
        "round",
        "convolve",
    ]
    first = document["operations"][1]
    assert (first["layer"], first["accumulator"]) == ("0", "int32")
    assert {WHOLE} == {part["part"] for part in first["parts"]}
    # As large as 9 weights of at most 8, pixels of at most 255 and a bias make it.
    assert max(program.grids[program.operations[1].output].bounds) <= 9 * 8 * 255 + 2**16
    with pytest.raises(OSError, match="missing"):
        write(traced, network, tmp_path / "missing")
