"""Quantized layers against float layers that are given explicitly rounded weights, biases and inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_unetq.formats import QFormat
from monai_unetq.layers import QUANTIZED_LAYERS, QuantizedLayer, dequantize_layer, quantize_layer
from monai_unetq.parts import WHOLE
from monai_unetq.quantizers import Quantizer, find_scale

SIZES = {1: (11,), 2: (9, 10), 3: (5, 6, 7)}

# Class, its arguments; between them every option of the float layers, in every dimension.
CASES: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2}),
    (nn.Conv1d, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, {"kernel_size": (3, 1), "stride": (2, 1), "padding": (2, 0), "bias": False}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "groups": 4}),
    (nn.Conv2d, {"kernel_size": 2, "padding": "valid", "dilation": (1, 3)}),
    (nn.Conv3d, {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"}),
    (nn.Conv3d, {"kernel_size": (1, 3, 3), "stride": 2, "groups": 2}),
    (nn.ConvTranspose1d, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
    (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2}),
    (nn.ConvTranspose2d, {"kernel_size": 3, "stride": (2, 3), "groups": 4, "dilation": 2, "bias": False}),
    (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "output_padding": (1, 0), "groups": 2}),
    (nn.ConvTranspose3d, {"kernel_size": 2, "stride": 2, "groups": 2}),
    (nn.ConvTranspose3d, {"kernel_size": 3, "padding": (1, 0, 1), "bias": False}),
    (nn.Linear, {}),
    (nn.Linear, {"bias": False}),
]
IDS = [f"{c.__name__}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for c, options in CASES]


def build(cls: type[nn.Module], options: dict[str, Any], seed: int = 0) -> tuple[Any, Tensor]:
    """A float layer with 4 channels in and 8 out, of very different size per channel, and an input for it."""
    torch.manual_seed(seed)
    layer: Any = cls(4, 8, **options)
    factors = 2.0 ** torch.linspace(-4, 2, 8)
    with torch.no_grad():
        for channel, rows in enumerate(channel_views(layer)):
            rows.mul_(factors[channel])
    if cls is nn.Linear:
        return layer, torch.randn(3, 5, 4)
    return layer, torch.randn(2, 4, *SIZES[int(cls.__name__[-2])])


def channel_views(layer: Any) -> Iterator[Tensor]:
    """The weights of one output channel after another, by explicit index arithmetic."""
    weight = layer.weight.data
    if not type(layer).__name__.endswith(("Transpose1d", "Transpose2d", "Transpose3d")):
        yield from weight
        return
    per_group, inputs = weight.shape[1], weight.shape[0] // layer.groups
    for channel in range(layer.out_channels):
        group, inside = divmod(channel, per_group)
        yield weight[group * inputs : (group + 1) * inputs, inside]


def grid(tensor: Tensor, step: float, number_format: QFormat) -> Tensor:
    """Nearest values of the grid, in float64."""
    codes = (tensor.double() / step).round().clamp(number_format.qmin, number_format.qmax)
    return (codes * step).float()


def explicitly_rounded(layer: Any, weight: QFormat, input_step: float) -> tuple[Any, list[float]]:
    """The float layer with every output channel's weights and bias rounded in a loop, and the scales used."""
    rounded, steps = copy.deepcopy(layer), []
    for channel, values in enumerate(channel_views(rounded)):
        step = weight.step
        if step is None:
            step = find_scale(values.reshape(1, -1), weight, "mse", True).item()
        values.copy_(grid(values, step, weight))
        steps.append(step)
        if rounded.bias is not None:
            accumulator = step * input_step
            bias = rounded.bias.data
            bias[channel] = (bias[channel].double() / accumulator).round() * accumulator
    return rounded, steps


def weight_bits(layer: QuantizedLayer) -> Tensor:
    return layer.effective_parameters()[0].detach()


# Identity


def test_every_class_has_a_case() -> None:
    assert {cls for cls, _ in CASES} == set(QUANTIZED_LAYERS)


@pytest.mark.parametrize("cls", QUANTIZED_LAYERS)
def test_is_the_same_object_of_a_subclass_with_the_float_keys(cls: type[nn.Module]) -> None:
    layer, _ = build(cls, {} if cls is nn.Linear else {"kernel_size": 2})
    weight, bias, keys = layer.weight, layer.bias, list(layer.state_dict())
    quantized = quantize_layer(layer, QFormat("Q0.4"), QFormat("Q6.0"))
    assert quantized is layer
    assert isinstance(layer, cls)
    assert isinstance(layer, QuantizedLayer)
    assert type(layer) is QUANTIZED_LAYERS[cls]
    assert layer.weight is weight
    assert layer.bias is bias
    state = layer.state_dict()
    assert list(state)[: len(keys)] == keys == ["weight", "bias"]
    assert all(k.startswith(("input_quantizer.", "weight_quantizer.")) for k in list(state)[len(keys) :])


def test_float_checkpoint_loads_and_every_registration_sees_the_quantized_layer() -> None:
    class TwoNames(nn.Module):  # nnU-Net registers a convolution under four
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3)
            self.all = nn.Sequential(self.conv, nn.ReLU())

        def forward(self, image: Tensor) -> Tensor:
            out: Tensor = self.all(image)
            return out

    torch.manual_seed(0)
    network, image = TwoNames(), torch.randn(1, 2, 6, 6)
    checkpoint = {k: v.clone() + 0.25 for k, v in network.state_dict().items()}
    quantize_layer(network.conv, QFormat("Q1.3"), QFormat("Q6.0"))
    assert network.all[0] is network.conv
    missing, unexpected = network.load_state_dict(checkpoint, strict=False)
    assert not unexpected
    assert all("_quantizer." in key for key in missing)
    plain: Any = copy.deepcopy(network.conv)
    dequantize_layer(plain)
    plain.weight.data = grid(checkpoint["conv.weight"], 2**-3, QFormat("Q1.3"))
    plain.bias.data = (checkpoint["conv.bias"] * 8).round() / 8
    assert torch.equal(network(image), plain(grid(image, 1.0, QFormat("Q6.0"))).relu())


def test_state_of_a_trained_layer_loads_into_one_of_another_format() -> None:
    layer, image = build(nn.ConvTranspose2d, {"kernel_size": 2, "groups": 2})
    other = copy.deepcopy(layer)
    quantize_layer(layer, QFormat("int4"), QFormat("Q3.4"))
    quantize_layer(other, QFormat("Q0.4"), QFormat("int8"), power_of_two=False)
    with torch.no_grad():
        other.weight.zero_()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(image), layer(image))


# Forward


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("weight", ["Q0.4", "int4"])
def test_forward_is_the_float_layer_on_rounded_values(
    cls: type[nn.Module], options: dict[str, Any], weight: str
) -> None:
    layer, image = build(cls, options)
    input_format = QFormat("Q3.4")
    rounded, steps = explicitly_rounded(layer, QFormat(weight), 2**-4)
    quantize_layer(layer, QFormat(weight), input_format)
    assert layer.weight_quantizer.scale.tolist() == steps
    if weight == "int4":
        assert len(set(steps)) > 2, "the case does not tell scales per channel from one for all"
    assert torch.equal(weight_bits(layer), rounded.weight)
    assert torch.equal(layer(image), rounded(grid(image, 2**-4, input_format)))


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_one_scale_for_all_channels(cls: type[nn.Module], options: dict[str, Any]) -> None:
    layer, image = build(cls, options)
    scale = find_scale(layer.weight.data.reshape(1, -1), QFormat("int4"), "mse", True).item()
    plain = copy.deepcopy(layer)
    plain.weight.data = grid(layer.weight.data, scale, QFormat("int4"))
    quantize_layer(layer, QFormat("int4"), QFormat("float"), per_channel=False)
    assert layer.weight_quantizer.scale.tolist() == scale
    assert torch.equal(layer(image), plain(image))


@pytest.mark.parametrize("cls", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_scales_of_a_transposed_convolution_are_per_output_channel_by_hand(cls: type[nn.Module]) -> None:
    # Axis 0 holds the input channels. Along it every scale would be that of 96, and the ones would be lost.
    layer: Any = cls(2, 2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 96.0], [1.0, 96.0]]).reshape(layer.weight.shape)
    quantize_layer(layer, QFormat("int4"), QFormat("float"))
    assert weight_bits(layer).flatten().tolist() == [1.0, 96.0, 1.0, 96.0]
    image = torch.ones(1, 2, *[1] * (layer.weight.dim() - 2))
    assert layer(image).flatten().tolist() == [2.0, 192.0]


def test_scales_of_a_grouped_transposed_convolution_by_hand() -> None:
    # Two groups of two inputs and two outputs: the output channels are 1, 96 (group 0), 1/64, 1536 (group 1).
    layer: Any = nn.ConvTranspose2d(4, 4, 1, groups=2, bias=False)
    values = [[1.0, 96.0], [-1.0, 96.0], [2**-6, 1536.0], [2**-6, -1536.0]]
    layer.weight.data = torch.tensor(values)[..., None, None]
    quantize_layer(layer, QFormat("int4"), QFormat("float"))
    assert weight_bits(layer)[..., 0, 0].tolist() == values
    image = torch.tensor([3.0, 1.0, 5.0, 2.0]).view(1, 4, 1, 1)
    assert layer(image).flatten().tolist() == [2.0, 384.0, 7 / 64, 4608.0]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_output_major_order_and_back(groups: int) -> None:
    layer, _ = build(nn.ConvTranspose2d, {"kernel_size": 2, "groups": groups})
    channels = torch.stack(list(channel_views(layer)))
    quantize_layer(layer, QFormat("Q0.4"), QFormat("float"))
    assert torch.equal(layer.output_major(layer.weight), channels)
    assert torch.equal(layer.from_output_major(channels), layer.weight)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_output_size_of_transposed_convolutions(dimensions: int) -> None:
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    layer, image = build(cls, {"kernel_size": 3, "stride": 2})
    rounded, _ = explicitly_rounded(layer, QFormat("Q0.4"), 1.0)
    quantize_layer(layer, QFormat("Q0.4"), QFormat("Q6.0"))
    sizes = [2 * s + 2 for s in image.shape[2:]]
    expected = rounded(grid(image, 1.0, QFormat("Q6.0")), sizes)
    assert torch.equal(layer(image, sizes), expected)
    assert torch.equal(layer(image, output_size=sizes), expected)
    assert list(layer(image).shape[2:]) == [2 * s + 1 for s in image.shape[2:]]


def test_without_a_batch_dimension() -> None:
    for cls in (nn.Conv2d, nn.ConvTranspose2d):
        layer, image = build(cls, {"kernel_size": 3})
        quantize_layer(layer, QFormat("Q0.4"), QFormat("Q3.4"))
        torch.testing.assert_close(layer(image[0]), layer(image)[0])


def test_float_formats_change_nothing() -> None:
    for cls, options in CASES:
        layer, image = build(cls, options)
        expected = layer(image)
        assert torch.equal(quantize_layer(layer, QFormat("float"), QFormat("float"))(image), expected)


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_binary_ternary_and_power_of_two_weights_are_per_output_channel(
    cls: type[nn.Module], options: dict[str, Any]
) -> None:
    """Every output channel's weights by the papers' formulas, in a loop and float64."""
    for spelling in ("binary", "ternary", "pow2-3"):
        layer, _ = build(cls, options)
        expected = []
        for values in channel_views(layer):
            w = values.double()
            size = w.abs()
            if spelling == "binary":
                row = size.mean() * torch.where(w >= 0, 1.0, -1.0)
            elif spelling == "ternary":
                kept = size > 0.7 * size.mean()
                row = size[kept].mean() * w.sign() * kept
            else:
                top = 2.0 ** math.floor(math.log2(4 * size.max().item() / 3))
                row = w.sign() * torch.where(
                    size >= 0.75 * top, top, torch.where(size >= top / 4, top / 2, 0.0)
                )
            expected.append(row.float())
        quantize_layer(layer, QFormat(spelling), QFormat("float"), power_of_two=False)
        rounded = copy.deepcopy(layer)
        rounded.weight.data = weight_bits(layer)
        for found, row in zip(channel_views(rounded), expected, strict=True):
            torch.testing.assert_close(found, row, rtol=1e-5, atol=0)


# Bias


@pytest.mark.parametrize("power_of_two", [True, False])
def test_bias_stands_on_the_accumulators_grid(power_of_two: bool) -> None:
    layer, _ = build(nn.Conv2d, {"kernel_size": 3})
    before = layer.bias.detach().clone()
    quantize_layer(layer, QFormat("int4"), QFormat("int8"), power_of_two=power_of_two)
    layer.input_quantizer.set_scale(torch.tensor(0.25))
    step = 0.25 * layer.weight_quantizer.scale
    bias = layer.effective_parameters()[1].detach()
    codes = bias / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert bool(((bias - before).abs() <= step / 2 * 1.0001).all())
    assert not torch.equal(bias, before)
    assert torch.equal(layer.bias, before), "the parameter itself was rounded"


def test_bias_stays_where_it_is_told_to_or_there_is_no_grid() -> None:
    for weight, image, rounds in (("Q0.4", "Q6.0", False), ("float", "Q6.0", True), ("Q0.4", "float", True)):
        layer, _ = build(nn.Conv2d, {"kernel_size": 3})
        quantize_layer(layer, QFormat(weight), QFormat(image), rounds_bias=rounds)
        assert torch.equal(layer.effective_parameters()[1], layer.bias)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_bias_outlives_weights_that_are_almost_nothing(power_of_two: bool) -> None:
    # A channel that batch norm has switched off: 32 bits on so fine a grid would not reach its bias.
    layer, _ = build(nn.Conv2d, {"kernel_size": 3})
    with torch.no_grad():
        for channel, factor in enumerate((0.0, 1e-20, 1e-12, 1e-9, 1e-6)):
            layer.weight[channel] *= factor
        layer.bias.copy_(torch.linspace(-3, 3, 8))
    quantize_layer(layer, QFormat("int8"), QFormat("int8"), power_of_two=power_of_two)
    layer.input_quantizer.set_scale(torch.tensor(2.0**-8))
    bias = layer.effective_parameters()[1]
    torch.testing.assert_close(bias.detach(), layer.bias.detach(), rtol=0, atol=1e-3)


def test_bias_is_not_rounded_while_the_input_is_observed() -> None:
    from monai_unetq.quantizers import RangeObserver

    layer, image = build(nn.Conv2d, {"kernel_size": 3})
    quantize_layer(layer, QFormat("Q0.4"), QFormat("int8"))
    layer.input_quantizer.observer = RangeObserver()
    expected = F.conv2d(image, weight_bits(layer), layer.bias)
    assert torch.equal(layer(image), expected)


# Gradients


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_gradients_are_straight_through(cls: type[nn.Module], options: dict[str, Any]) -> None:
    layer, image = build(cls, options)
    image *= 3
    number_format, input_format = QFormat("Q0.4"), QFormat("Q2.3")
    rounded, _ = explicitly_rounded(layer, number_format, 2**-3)
    expected_image = grid(image, 2**-3, input_format).requires_grad_()
    out = rounded(expected_image)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    quantize_layer(layer, number_format, input_format)
    ours = image.clone().requires_grad_()
    layer(ours).backward(upstream)

    def inside(values: Tensor, step: float, f: QFormat) -> Tensor:
        return (values > (f.qmin - 0.5) * step) & (values < (f.qmax + 0.5) * step)

    of_weight = rounded.weight.grad * inside(layer.weight, 2**-4, number_format)
    torch.testing.assert_close(layer.weight.grad, of_weight, rtol=1e-4, atol=1e-5)
    assert expected_image.grad is not None
    of_image = expected_image.grad * inside(image, 2**-3, input_format)
    torch.testing.assert_close(ours.grad, of_image, rtol=1e-4, atol=1e-5)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, rounded.bias.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_learned_scales_get_gradients(cls: type[nn.Module]) -> None:
    layer, image = build(cls, {"kernel_size": 3})
    quantize_layer(layer, QFormat("int4"), QFormat("int4"), learned=True)
    layer.input_quantizer.set_scale(torch.tensor(0.25))
    layer(image).square().sum().backward()
    shapes = {n: p.grad.shape for n, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert shapes["weight_quantizer.log2_scale"] == (8,)
    assert shapes["input_quantizer.log2_scale"] == ()


# Autocast


def half_conv(layer: Any, image: Tensor, input_format: QFormat, dtype: torch.dtype) -> Tensor:
    """The convolution, in half precision, of exactly the rounded values."""
    weight, bias = (None if p is None else p.detach() for p in layer.effective_parameters())
    assert weight is not None
    assert input_format.step is not None
    rounded = grid(image.float(), input_format.step, input_format)
    assert torch.equal(weight.to(dtype).float(), weight), "the weights do not fit the type"
    assert torch.equal(rounded.to(dtype).float(), rounded), "the inputs do not fit the type"
    with torch.autocast("cpu", dtype=dtype):
        return F.conv2d(rounded, weight, bias, padding=1)


@pytest.mark.parametrize(
    ("dtype", "weight", "image_format"),
    [
        (torch.bfloat16, "Q0.4", "UQ6.0"),
        (torch.bfloat16, "int8", "Q4.4"),
        (torch.bfloat16, "Q0.8", "UQ0.8"),
        (torch.bfloat16, "Q0.4:literal", "UQ8.0"),
        (torch.float16, "Q0.8", "Q3.8"),
        (torch.float16, "int8", "UQ2.9"),
    ],
)
def test_autocast_convolves_exactly_the_rounded_values(
    dtype: torch.dtype, weight: str, image_format: str
) -> None:
    layer, image = build(nn.Conv2d, {"kernel_size": 3, "padding": 1})
    quantize_layer(layer, QFormat(weight), QFormat(image_format))
    for given in (image, image.to(dtype)):
        with torch.autocast("cpu", dtype=dtype):
            out = layer(given)
        assert out.dtype == dtype
        assert torch.equal(out, half_conv(layer, given, QFormat(image_format), dtype))


@pytest.mark.parametrize(
    ("dtype", "weight", "image_format"),
    [
        (torch.bfloat16, "Q8.8", "Q8.8"),
        (torch.bfloat16, "Q0.4", "Q8.8"),
        (torch.bfloat16, "Q0.9", "Q6.0"),
        (torch.bfloat16, "float", "UQ0.12"),
        (torch.float16, "Q0.12", "Q6.0"),
        (torch.float16, "Q8.8", "Q8.8"),
    ],
)
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_formats_too_wide_for_autocast_stay_in_float32(
    cls: type[nn.Module], dtype: torch.dtype, weight: str, image_format: str
) -> None:
    layer, image = build(cls, {} if cls is nn.Linear else {"kernel_size": 3})
    quantize_layer(layer, QFormat(weight), QFormat(image_format))
    for given in (image, image.to(dtype)):
        expected = layer(given.float())
        with torch.autocast("cpu", dtype=dtype):
            out = layer(given)
        assert out.dtype == torch.float32
        assert torch.equal(out, expected)


def test_float_layers_keep_autocasts_own_type() -> None:
    layer, image = build(nn.Conv2d, {"kernel_size": 3})
    quantize_layer(layer, QFormat("float"), QFormat("float"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(image).dtype == torch.bfloat16


def test_training_under_autocast_reaches_every_parameter() -> None:
    for number_format in ("Q1.6", "Q8.8"):
        layer, image = build(nn.ConvTranspose2d, {"kernel_size": 3, "groups": 2})
        quantize_layer(layer, QFormat(number_format), QFormat(number_format))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(image).float().square().mean()
        loss.backward()
        assert all(
            p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters()
        )


# Codes


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("weight", ["Q0.4", "int4", "Q0.4:literal", "binary", "ternary", "pow2-4"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_restore_the_rounded_weight(
    cls: type[nn.Module], options: dict[str, Any], weight: str, per_channel: bool
) -> None:
    layer, image = build(cls, options)
    quantize_layer(layer, QFormat(weight), QFormat("Q3.4"), per_channel=per_channel)
    out, rounded = layer(image), weight_bits(layer)
    codes = layer.weight_quantizer.codes(layer.output_major(layer.weight))
    assert codes.shape[0] == 8
    with torch.no_grad():
        layer.weight.zero_()
    layer.set_codes({WHOLE: codes})
    assert torch.equal(weight_bits(layer), rounded), "rounded again it is another weight"
    assert torch.equal(layer(image), out)
    if weight != "Q0.4:literal":  # a whole magnitude would wrap to 0 when rounded again, so it stands below
        assert torch.equal(layer.weight, rounded)


# There and back


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_dequantize_restores_class_keys_and_outputs(cls: type[nn.Module], options: dict[str, Any]) -> None:
    layer, image = build(cls, options)
    expected, attributes = layer(image), set(vars(layer))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    quantize_layer(layer, QFormat("int4"), QFormat("Q3.4"), learned=True)
    assert not torch.equal(layer(image), expected)
    assert dequantize_layer(layer) is layer
    assert type(layer) is cls
    assert set(vars(layer)) == attributes
    assert not list(layer.children())
    assert list(layer.state_dict()) == list(state)
    assert torch.equal(layer(image), expected)
    quantize_layer(layer, QFormat("Q0.4"), QFormat("Q6.0"))


class _OwnConv(nn.Conv2d):
    pass


@pytest.mark.parametrize("make", [nn.ReLU, lambda: _OwnConv(1, 1, 1), lambda: nn.Bilinear(1, 1, 1)])
def test_foreign_classes_are_refused(make: Any) -> None:
    layer = make()
    name = type(layer).__name__
    with pytest.raises(
        ValueError, match=f"cannot quantize a layer of class {name}; expected one of Conv1d, "
    ):
        quantize_layer(layer, QFormat("Q0.4"), QFormat("Q6.0"))
    assert type(layer).__name__ == name


def test_quantizing_twice_is_refused() -> None:
    layer = quantize_layer(nn.Conv2d(1, 1, 1), QFormat("Q0.4"), QFormat("Q6.0"))
    with pytest.raises(ValueError, match="layer of class QuantConv2d"):
        quantize_layer(layer, QFormat("int8"), QFormat("int8"))
    assert str(layer.weight_quantizer.number_format) == "Q0.4"


@pytest.mark.parametrize("problem", ["input format", "NaN", "infinity"])
def test_refused_layer_stays_as_it_was(problem: str) -> None:
    layer, image = build(nn.Conv2d, {"kernel_size": 3})
    formats = ("int8", "pow2-4") if problem == "input format" else ("int8", "int8")
    if problem in ("NaN", "infinity"):
        layer.weight.data[0, 0, 0, 0] = math.nan if problem == "NaN" else math.inf
    expected, attributes = layer(image), set(vars(layer))
    with pytest.raises(ValueError):
        quantize_layer(layer, *map(QFormat, formats))
    assert type(layer) is nn.Conv2d
    assert set(vars(layer)) == attributes
    assert not list(layer.children())
    torch.testing.assert_close(layer(image), expected, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"learned": True, "power_of_two": False}])
def test_deepcopy_is_independent(options: dict[str, Any]) -> None:
    layer, image = build(nn.ConvTranspose2d, {"kernel_size": 2})
    quantize_layer(layer, QFormat("int4"), QFormat("Q3.4"), **options)
    expected = layer(image).detach()
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(image), expected)
    with torch.no_grad():
        copied.weight.zero_()
        copied.weight_quantizer.set_scale(torch.full((8,), 5.0))
    assert torch.equal(layer(image), expected)


def test_quantizers_stand_on_the_layers_device() -> None:
    layer = nn.Conv2d(1, 2, 1, device="meta")
    quantizer = Quantizer(QFormat("Q0.4"), 2, device=layer.weight.device)
    assert quantizer.scale.device.type == quantizer.format_code.device.type == "meta"
    quantize_layer(layer, QFormat("Q0.4"), QFormat("Q6.0"))
    assert all(tensor.device.type == "meta" for tensor in layer.state_dict().values())


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_compiles_whole(cls: type[nn.Module]) -> None:
    torch._dynamo.reset()
    layer, image = build(cls, {"kernel_size": 3, "groups": 2})
    quantize_layer(layer, QFormat("int4"), QFormat("Q3.4"), learned=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (layer, compiled):
        layer.zero_grad()
        run(image).square().mean().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(compiled(image), layer(image))
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
