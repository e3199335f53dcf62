"""Split convolutions: two halves with formats of their own are what rounding each by hand and concatenating gives."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from monai_unetq.formats import QFormat
from monai_unetq.layers import (
    SPLIT_LAYERS,
    QuantizedLayer,
    SplitLayer,
    dequantize_layer,
    quantize_layer,
    split,
    split_layer,
)
from monai_unetq.parts import WHOLE, Part
from monai_unetq.quantizers import learned_fake_quantize_parts

SKIP, UP = 3, 5
PARTS = (Part("skip", SKIP, "encoder"), Part("up", UP, "below"))
IMAGES = {1: (2, SKIP + UP, 17), 2: (2, SKIP + UP, 9, 8), 3: (2, SKIP + UP, 5, 6, 4)}

CASES: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    (
        nn.Conv2d,
        {"kernel_size": (3, 1), "stride": 2, "bias": False, "padding_mode": "reflect", "padding": (1, 0)},
    ),
    (nn.Conv3d, {"kernel_size": 3, "padding": 1, "dilation": 2}),
    (nn.ConvTranspose1d, {"kernel_size": 2, "stride": 2}),
    (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "output_padding": 1, "padding": 1}),
    (nn.ConvTranspose3d, {"kernel_size": 2, "stride": 2, "bias": False}),
]
NAMES = [f"{cls.__name__}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for cls, options in CASES]


def made(
    cls: type[nn.Module], options: dict[str, Any], parts: tuple[Part, ...] = PARTS
) -> tuple[Any, Tensor]:
    """A split layer and an image for it, the image's two parts of very different size."""
    torch.manual_seed(0)
    layer: Any = cls(sum(part.channels for part in parts), 4, **options)
    dimensions = layer.weight.dim() - 2
    image = torch.randn(IMAGES[dimensions]).abs()
    image[:, SKIP:] *= 10
    return split_layer(layer, parts), image


def weight_axis(layer: nn.Module) -> int:
    """The input channels' axis of a weight."""
    return 0 if "Transpose" in type(layer).__name__ else 1


def by_hand(values: Tensor, bits: int, scale: Tensor | float, signed: bool) -> Tensor:
    """round(x / scale) between the two ends, times scale; the scale is a number, or one for each output channel."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return (values / scale).round().clamp(low, high) * scale


@pytest.mark.parametrize(("cls", "options"), CASES, ids=NAMES)
def test_in_float_nothing_changes(cls: type[nn.Module], options: dict[str, Any]) -> None:
    layer, image = made(cls, options)
    torch.manual_seed(0)
    plain: Any = cls(SKIP + UP, 4, **options)
    assert isinstance(layer, SplitLayer) and isinstance(layer, cls)
    assert type(layer) is SPLIT_LAYERS[cls]
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(image), plain(image))
    assert "skip=3 | up=5" in repr(layer)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize(("cls", "options"), CASES, ids=NAMES)
def test_halves_of_different_widths_are_rounded_apart(
    cls: type[nn.Module], options: dict[str, Any], power_of_two: bool
) -> None:
    layer, image = made(cls, options)
    plain: Any = cls(SKIP + UP, 4, **options)
    plain.load_state_dict(layer.state_dict())
    weights = {"skip": QFormat("int8"), "up": QFormat("int3")}
    inputs = {"skip": QFormat("uint6"), "up": QFormat("uint4")}
    quantized = quantize_layer(layer, weights, inputs, power_of_two=power_of_two, rounds_bias=False)
    scales = {"skip": 0.0625, "up": 2.0} if power_of_two else {"skip": 0.07, "up": 1.9}
    for part, number in scales.items():
        quantized.input_quantizers[part].set_scale(torch.tensor(number))
    axis, pieces, values = weight_axis(layer), [], []
    for part, weight_bits, input_bits, span in (
        ("skip", 8, 6, slice(0, SKIP)),
        ("up", 3, 4, slice(SKIP, None)),
    ):
        # One scale for each output channel, along the weight's other axis.
        shape = [1] * plain.weight.dim()
        shape[1 - axis] = -1
        scale = quantized.weight_quantizers[part].scale.detach().view(shape)
        half = plain.weight.detach()[(slice(None),) * axis + (span,)]
        pieces.append(by_hand(half, weight_bits, scale, signed=True))
        step = quantized.input_quantizers[part].scale.detach()  # exp2(log2(s)) in float32
        values.append(by_hand(image[:, span], input_bits, step, signed=False))
    plain.weight.data = torch.cat(pieces, axis)
    assert torch.equal(quantized(image), plain(torch.cat(values, 1)))
    assert not torch.equal(values[1], image[:, SKIP:])


def test_the_sum_of_two_convolutions_on_a_hand_computed_example() -> None:
    layer = nn.Conv2d(2, 1, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.3, -0.8]).view(1, 2, 1, 1))
        layer.bias.fill_(0.3)  # type: ignore[union-attr]
    split_layer(layer, [Part("up", 1), Part("skip", 1)])
    quantized = quantize_layer(
        layer,
        {"up": QFormat("Q0.2"), "skip": QFormat("Q1.3")},
        {"up": QFormat("UQ3.0"), "skip": QFormat("UQ0.4")},
    )
    # up: 0.3 → 0.25, 2.6 → 3; skip: -0.8 → -0.75 (steps of 1/8: -6.4 → -6), 0.4 → 6/16 = 0.375
    # The bias's grid is the finest of 1 · 1/4 and 1/16 · 1/8 = 1/128: 0.3 → 38/128
    image = torch.tensor([2.6, 0.4]).view(1, 2, 1, 1)
    assert quantized(image).item() == 3 * 0.25 - 0.75 * 0.375 + 38 / 128


def test_a_batch_axis_is_not_needed() -> None:
    layer, image = made(nn.Conv2d, {"kernel_size": 3, "padding": 1})
    quantize_layer(layer, QFormat("int4"), {"skip": QFormat("UQ2.2"), "up": QFormat("UQ6.0")})
    assert torch.equal(layer(image)[1], layer(image[1]))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("weight", ["int4", "ternary", "binary", "pow2-4", "Q0.4", "Q0.4:literal", "float"])
def test_state_goes_there_and_back(weight: str, learned: bool) -> None:
    layer, image = made(nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2})
    other = copy.deepcopy(layer)
    weights = {"skip": QFormat(weight), "up": QFormat("int8")}
    quantize_layer(layer, weights, QFormat("UQ4.0"), learned=learned)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    # Formats are state: built with others, it strictly loads them.
    quantize_layer(other, QFormat("int2"), QFormat("UQ2.0"), learned=learned)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    layer.eval(), other.eval()
    assert torch.equal(other(image), layer(image))
    assert str(other.weight_quantizers["skip"].number_format) == weight
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(image), layer(image))
    assert twin.parts == PARTS


def test_a_float_state_loads_and_one_that_is_split_elsewhere_is_refused() -> None:
    layer, _ = made(nn.Conv2d, {"kernel_size": 3})
    state = copy.deepcopy(layer.state_dict())
    quantize_layer(layer, QFormat("int4"), QFormat("UQ4.0"))
    layer.load_state_dict(state)
    other, _ = made(nn.Conv2d, {"kernel_size": 3}, (Part("skip", 4), Part("up", 4)))
    quantize_layer(other, QFormat("int4"), QFormat("UQ4.0"))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        RuntimeError,
        match=r"weight_parts\.parts: skip=3 \| up=5 there, skip=4 \| up=4 here; split the same way",
    ):
        other.load_state_dict(layer.state_dict())
    assert torch.equal(other.state_dict()["weight_parts.parts"], before["weight_parts.parts"])


def test_three_parts_have_keys_without_dots() -> None:
    parts = (Part("skip", 2), Part("skip.1", 1), Part("up", 5))
    layer, image = made(nn.Conv2d, {"kernel_size": 1}, parts)
    quantized = quantize_layer(layer, QFormat("int8"), QFormat("UQ4.4"))
    assert {key.split(".")[1] for key in layer.state_dict() if "input_parts" in key} == {
        "parts", "skip", "skip_1", "up",
    }  # fmt: skip
    assert list(quantized.input_quantizers) == ["skip", "skip.1", "up"]
    assert layer(image).shape == (2, 4, 9, 8)


@pytest.mark.parametrize(("cls", "options"), CASES, ids=NAMES)
def test_dequantized_it_is_the_split_float_layer(cls: type[nn.Module], options: dict[str, Any]) -> None:
    layer, image = made(cls, options)
    expected, keys = layer(image), list(layer.state_dict())
    back: Any = dequantize_layer(quantize_layer(layer, QFormat("int4"), QFormat("UQ4.0")))
    assert type(back) is SPLIT_LAYERS[cls] and back.parts == PARTS
    assert list(back.state_dict()) == keys
    assert torch.equal(back(image), expected)


@pytest.mark.parametrize(("cls", "options"), CASES, ids=NAMES)
@pytest.mark.parametrize("spelling", ["int3", "Q0.4:literal", "binary", "ternary", "pow2-3"])
def test_codes_of_each_part_restore_the_weight(
    cls: type[nn.Module], options: dict[str, Any], spelling: str
) -> None:
    layer, image = made(cls, options)
    quantized = quantize_layer(layer, {"skip": QFormat("int8"), "up": QFormat(spelling)}, QFormat("UQ6.0"))
    quantized.eval()
    expected = quantized(image)
    codes = {p: quantized.weight_quantizers[p].codes(w) for p, w in quantized.folded_weights().items()}
    with torch.no_grad():
        quantized.weight.zero_()
    quantized.set_codes(codes)
    assert torch.equal(quantized(image), expected)


@given(st.data())
def test_gradients_are_those_of_the_halves(data: st.DataObject) -> None:
    """Autograd through parts equals autograd through two quantized layers whose results are added."""
    skip, up = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    bits = data.draw(st.sampled_from(("int2", "int4", "int8", "binary", "ternary")))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer = nn.Conv2d(skip + up, 3, 3, padding=1)
    halves = [nn.Conv2d(skip, 3, 3, padding=1), nn.Conv2d(up, 3, 3, padding=1, bias=False)]
    with torch.no_grad():
        halves[0].weight.copy_(layer.weight[:, :skip])
        halves[1].weight.copy_(layer.weight[:, skip:])
        halves[0].bias.copy_(layer.bias)  # type: ignore[union-attr,arg-type]
    split_layer(layer, [Part("skip", skip), Part("up", up)])
    options: dict[str, Any] = {"power_of_two": False, "rounds_bias": False, "learned": True}
    formats = {"skip": QFormat("uint4"), "up": QFormat(bits).with_sign(True)}
    quantized = quantize_layer(layer, {"skip": QFormat(bits), "up": QFormat("int4")}, formats, **options)
    others = [
        quantize_layer(halves[0], QFormat(bits), formats["skip"], **options),
        quantize_layer(halves[1], QFormat("int4"), formats["up"], **options),
    ]
    for part, other in zip(("skip", "up"), others, strict=True):
        for one in (quantized.input_quantizers[part], other.input_quantizer):
            one.set_scale(torch.tensor(0.21))
    image = torch.randn(1, skip + up, 5, 5).double().requires_grad_()
    twin = image.detach().clone().requires_grad_()
    quantized.double()(image).square().sum().backward()
    (others[0].double()(twin[:, :skip]) + others[1].double()(twin[:, skip:])).square().sum().backward()
    assert torch.allclose(image.grad, twin.grad, rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]
    halves_grad = torch.cat([half.weight.grad for half in halves], 1)  # type: ignore[misc]
    assert torch.allclose(layer.weight.grad, halves_grad, rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]
    for part, other in zip(("skip", "up"), others, strict=True):
        for mine, theirs in (
            (quantized.input_quantizers[part], other.input_quantizer),
            (quantized.weight_quantizers[part], other.weight_quantizer),
        ):
            found, expected = mine.log2_scale.grad, theirs.log2_scale.grad
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)  # type: ignore[arg-type]


def _learned(channels_last: bool) -> tuple[QuantizedLayer, Tensor]:
    torch.manual_seed(0)
    layer = split_layer(nn.Conv2d(SKIP + UP, 3, 3, padding=1), PARTS)
    quantized = quantize_layer(
        layer,
        QFormat("int8"),
        {"skip": QFormat("uint3"), "up": QFormat("int4")},
        power_of_two=False,
        learned=True,
    )
    for scale, quantizer in zip((0.21, 0.4), quantized.input_quantizers.values(), strict=True):
        quantizer.set_scale(torch.tensor(scale))
    image = torch.randn(2, SKIP + UP, 40, 50)
    return quantized, image.contiguous(memory_format=torch.channels_last) if channels_last else image


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("tapped", [(), ("skip",), ("up", "skip")])
def test_rounded_at_once_is_cut_rounded_and_joined_bit_for_bit(
    channels_last: bool, tapped: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients in training on a CPU, where parts are not cut out, against every quantizer by itself."""
    at_once = mock.Mock(wraps=learned_fake_quantize_parts)
    monkeypatch.setattr(split, "learned_fake_quantize_parts", at_once)
    results = []
    for watched in (False, True):
        quantized, image = _learned(channels_last)
        places = quantized.input_parts
        if watched:
            quantized.input_quantizers["up"].register_forward_hook(lambda *_: None)
        found: dict[str, Tensor] = {}
        places.taps = {part: partial(found.__setitem__, part) for part in tapped}
        image.requires_grad_()
        out = places(image)
        assert set(found) == set(tapped)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        for part in tapped:
            loss = loss + (found[part].square() * 0.3).sum()
        loss.backward()
        scales = [quantizer.log2_scale.grad for quantizer in quantized.input_quantizers.values()]
        results.append((out.detach(), *(found[part].detach() for part in tapped), image.grad, *scales))
    at_once.assert_called_once()  # the second time a hook watches
    for fast, slow in zip(*results, strict=True):
        assert fast is not None and slow is not None and torch.equal(fast, slow)


def test_a_part_that_is_tapped_learns_where_the_whole_is_not_used() -> None:
    quantized, image = _learned(False)
    found: dict[str, Tensor] = {}
    quantized.input_parts.taps = {"skip": partial(found.__setitem__, "skip")}
    image.requires_grad_()
    quantized.input_parts(image)
    found["skip"].sum().backward()
    # 1 where it rounds to a code of 0 … 7, steps of 0.21; nothing for the other part.
    inside = (image[:, :SKIP] > -0.105) & (image[:, :SKIP] < 7.5 * 0.21)
    assert image.grad is not None
    assert torch.equal(image.grad[:, :SKIP], inside.float()) and not image.grad[:, SKIP:].any()


def test_parts_rounded_at_once_can_be_differentiated_twice() -> None:
    """As Hessian-vector products need it: the gradient of a gradient against the one of the quantizers by themselves."""
    seconds = []
    for watched in (False, True):
        quantized, image = _learned(False)
        if watched:
            quantized.input_quantizers["up"].register_forward_hook(lambda *_: None)
        out = quantized(image.requires_grad_())
        (first,) = torch.autograd.grad(out.pow(3).mean(), image, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [image, quantized.weight]))
    for fast, slow in zip(*seconds, strict=True):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize(
    ("layer", "parts", "message"),
    [
        (nn.Conv2d(8, 4, 1, groups=2), PARTS, "cannot split a convolution with 2 groups"),
        (nn.Linear(8, 4), PARTS, "cannot split a layer of class Linear; expected one of Conv1d"),
        (nn.Conv2d(9, 4, 1), PARTS, r"skip=3 \| up=5 are not the layer's 9 input channels"),
        (nn.Conv2d(8, 4, 1), (Part("skip", 8),), "one part, .*expected at least two"),
    ],
)
def test_what_cannot_be_split_is_refused_and_stays(
    layer: nn.Module, parts: tuple[Part, ...], message: str
) -> None:
    kind = type(layer)
    with pytest.raises(ValueError, match=message):
        split_layer(layer, parts)
    assert type(layer) is kind and "parts" not in layer.__dict__


def test_formats_for_other_parts_are_refused_and_the_layer_stays() -> None:
    layer, _ = made(nn.Conv2d, {"kernel_size": 1})
    with pytest.raises(ValueError, match=r"for the parts skip, up\.1, but the layer has the parts skip, up"):
        quantize_layer(layer, {"skip": QFormat("int8"), "up.1": QFormat("int8")}, QFormat("int8"))
    whole = nn.Conv2d(8, 4, 1)
    with pytest.raises(ValueError, match="for the parts skip, up, but the layer is not split"):
        quantize_layer(whole, QFormat("int8"), {"skip": QFormat("int8"), "up": QFormat("int8")})
    assert not isinstance(layer, QuantizedLayer) and type(whole) is nn.Conv2d
    quantized = quantize_layer(layer, {WHOLE: QFormat("int4")}, {WHOLE: QFormat("int8")})
    assert [str(q.number_format) for q in quantized.quantizers] == ["int8", "int8", "int4", "int4"]


def test_under_autocast_each_half_keeps_its_values() -> None:
    layer, image = made(nn.Conv2d, {"kernel_size": 3, "padding": 1})
    quantized = quantize_layer(
        layer, {"skip": QFormat("Q1.6"), "up": QFormat("Q1.3")}, QFormat("UQ4.0"), rounds_bias=False
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = quantized(image)
    assert half.dtype == torch.bfloat16
    # Seven and four bits fit into bfloat16: only the accumulation and the result are rounded.
    assert torch.allclose(half.float(), quantized(image), rtol=0.02, atol=0.05)
    wide = quantize_layer(
        made(nn.Conv2d, {"kernel_size": 1})[0],
        QFormat("Q1.6"),
        {"skip": QFormat("UQ4.0"), "up": QFormat("Q8.8")},
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(image).dtype == torch.float32


def test_a_float_convolution_over_the_parts_is_the_sum_of_two() -> None:
    layer, image = made(nn.Conv3d, {"kernel_size": 3, "padding": 1})
    halves = F.conv3d(image[:, :SKIP], layer.weight[:, :SKIP], layer.bias, padding=1) + F.conv3d(
        image[:, SKIP:], layer.weight[:, SKIP:], padding=1
    )
    assert torch.allclose(layer(image), halves, rtol=1e-5, atol=1e-5)
