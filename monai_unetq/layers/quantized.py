"""Quantized convolution, transposed convolution and linear layer: the float layer's own object with another class.

Weight and bias keep their names; only the two quantizers are new (design decision 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats import QFormat
from ..parts import WHOLE, Part
from ..quantizers import Quantizer, RangeMethod
from .norm_pair import PairedNorm
from .split import SPLIT_LAYERS, PartQuantizers, SplitLayer, split_layer

__all__ = [
    "QUANTIZED_LAYERS",
    "QuantizedLayer",
    "dequantize_layer",
    "folded_log2_scale",
    "is_quantizable",
    "quantize_layer",
]

_EXACT_BITS = {torch.bfloat16: 8, torch.float16: 11}
"""Widest code that a half-precision type holds exactly."""

_LEAST_GAIN = 2.0**-100

if TYPE_CHECKING:
    # What the subclasses have in common, for the type checker: a weight, a bias, groups, a forward.
    class _Layer(nn.Conv2d):
        pass

else:
    _Layer = nn.Module


class QuantizedLayer(_Layer):
    """What the quantized layers share: quantizers for input and weight, a bias on the accumulator's grid.

    The weight quantizer works on the weight with its output channels first, whatever the layer's own order
    (a transposed convolution keeps them in axis 1, in groups), so scales are always per *output* channel.

    A split convolution has quantizers for each part of its input channels, ``input_parts`` and ``weight_parts``, in
    place of ``input_quantizer`` and ``weight_quantizer``; ``input_quantizers`` and ``weight_quantizers`` are for both.
    """

    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    input_parts: PartQuantizers
    weight_parts: PartQuantizers
    output_quantizer: Quantizer | None  # of a layer in front of a norm that cannot be folded
    parts: tuple[Part, ...]  # none where the layer is not split
    rounds_bias: bool
    _norm: tuple[PairedNorm, ...]  # in a tuple, so that the batch norm is not registered a second time

    @property
    def input_quantizers(self) -> dict[str, Quantizer]:
        """Part → the quantizer of that part of the input; one part, ``input``, where the layer is not split."""
        return self.input_parts.by_name() if self.parts else {WHOLE: self.input_quantizer}

    @property
    def weight_quantizers(self) -> dict[str, Quantizer]:
        """Part → the quantizer of the weight of that part's input channels."""
        return self.weight_parts.by_name() if self.parts else {WHOLE: self.weight_quantizer}

    @property
    def quantizers(self) -> list[Quantizer]:
        """All of them."""
        output = [] if self.output_quantizer is None else [self.output_quantizer]
        return [*self.input_quantizers.values(), *self.weight_quantizers.values(), *output]

    @property
    def part_channels(self) -> dict[str, int]:
        """Part → its input channels."""
        if self.parts:
            return {part.name: part.channels for part in self.parts}
        return {WHOLE: self.output_major(self.weight).shape[1] * int(getattr(self, "groups", 1))}

    def pieces(self, weight: Tensor) -> dict[str, Tensor]:
        """Part → its input channels of a weight with the output channels first, a view."""
        if not self.parts:
            return {WHOLE: weight}
        sizes = [part.channels for part in self.parts]
        return dict(zip(self.weight_quantizers, weight.split(sizes, 1), strict=True))

    def weight_pieces(self) -> dict[str, Tensor]:
        """Part → its weight, output channels first."""
        return self.pieces(self.output_major(self.weight))

    @property
    def paired_norm(self) -> PairedNorm | None:
        """The batch norm that this layer folds, if any."""
        return self._norm[0] if self._norm else None

    def pair_with(self, norm: PairedNorm | None) -> None:
        """Fold ``norm``, this layer's only consumer, from now on; None ends the pair."""
        self._norm = () if norm is None else (norm,)

    def forward(self, input: Tensor) -> Tensor:
        """The float layer's forward with rounded input, weight, bias and (where the plan has it) output; same shapes.

        Under autocast, formats wider than the half-precision type holds, and scales that are no powers of two,
        run in float32.
        """
        return self._round_output(self._run_rounded(input))

    def _round_output(self, output: Tensor) -> Tensor:
        return output if self.output_quantizer is None else self.output_quantizer(output)

    def _run_rounded(self, input: Tensor, *args: Any) -> Tensor:
        half = (
            torch.get_autocast_dtype(input.device.type)
            if torch.is_autocast_enabled(input.device.type)
            else None
        )
        rounding: Any = self.input_parts if self.parts else self.input_quantizer
        if half is not None and self._widest() > _EXACT_BITS.get(half, 32):
            with torch.autocast(input.device.type, enabled=False):
                return self._run(rounding(input.float()), *self.effective_parameters(), *args)
        return self._run(rounding(input), *self.effective_parameters(), *args)

    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The rounded weight and bias that the layer runs with now, in the layer's own layout.

        With a paired batch norm in evaluation these are the folded ones. In training the weight is the rounded
        folded weight divided by the gain, and the bias is as it is: the batch norm subtracts its mean.
        """
        norm = self.paired_norm
        rounded, steps = [], {}
        for (part, quantizer), piece in zip(
            self.weight_quantizers.items(), self.weight_pieces().values(), strict=True
        ):
            weight, steps[part] = self._effective(quantizer, piece, norm)
            rounded.append(weight)
        weight = self.from_output_major(rounded[0] if len(rounded) == 1 else torch.cat(rounded, 1))
        if norm is None:
            return weight, self._round_bias(self.bias, steps)
        return weight, self.bias if norm.training else self._round_bias(self.folded_bias(norm), steps)

    def _effective(
        self, quantizer: Quantizer, weight: Tensor, norm: PairedNorm | None
    ) -> tuple[Tensor, Tensor]:
        """One part of the weight, output channels first, as the layer runs with it now, and its step."""
        if norm is None:
            return quantizer(weight), quantizer.scale
        before, after = self.norm_factors(norm, quantizer)
        rounded = quantizer(_scale_rows(weight, before))
        step = quantizer.scale
        if norm.training:
            return _scale_rows(rounded, 1 / before), step
        if after is None:
            return rounded, step
        # The gradient is that of rounded · after; the value is code × folded scale, as it will be after fold.
        folded = quantizer.scale_at(folded_log2_scale(quantizer, after))
        effective = _scale_rows(rounded, after)
        if quantizer.rounds:
            codes = (rounded.detach() / _column(step, rounded)).round()
            effective = effective + (_scale_rows(codes, folded) - effective).detach()
        return effective, folded

    def norm_factors(self, norm: PairedNorm, quantizer: Quantizer) -> tuple[Tensor, Tensor | None]:
        """What a weight is multiplied with before and after rounding so that both make the gain, (C,) each.

        Static and power-of-two grids, and one scale for all channels, must hold the folded weight itself:
        (gain, 1). Free scales per channel take the gain's magnitude into themselves: (sign, |gain|). A
        vanishing gain in training is replaced by 1: it could not be divided out again.

        The codes of binary and ternary weights do not know the gain's magnitude, so their scale takes it, whatever it
        is: rounded to a power of two where the scale is one (as in the shift-based batch norm of Courbariaux et al.,
        2016), the mean of all channels, 0-dim, where there is one scale for all. Before rounding, the gain would
        change nothing but the quotient in training, scale/gain; σ follows that quotient, the gain is γ/σ, and the
        running statistics would drift away in a circle. The other parts of a split layer take the same gain then.

        Args:
            norm: the paired batch norm.
            quantizer: one of the layer's weight quantizers.
        """
        gain = norm.gain()
        sign, size = torch.where(gain < 0, -torch.ones_like(gain), torch.ones_like(gain)), gain.abs()
        following = [q for q in self.weight_quantizers.values() if q.follows_weight and q.rounds]
        if following:
            size = size if following[0].channels else size.mean()
            if following[0].power_of_two:
                size = following[0].scale_at(torch.log2(size.clamp(min=_LEAST_GAIN)))
            gain = sign * size
        if quantizer.follows_weight or (quantizer.channels and not quantizer.power_of_two):
            return sign, size
        if norm.training:
            gain = torch.where(gain.abs() < 1e-12, torch.ones_like(gain), gain)
        return gain, None

    def folded_bias(self, norm: PairedNorm) -> Tensor:
        """The folded bias β + (b - μ)·gain, (C,), with the gain that the folded weight has."""
        before, after = self.norm_factors(norm, next(iter(self.weight_quantizers.values())))
        return norm.shift(before if after is None else before * after, self.bias)

    def folded_weights(self) -> dict[str, Tensor]:
        """Part → what its weight quantizer sees now, output channels first: the weight times the pair's factor."""
        weights, norm = self.weight_pieces(), self.paired_norm
        if norm is None:
            return weights
        quantizers = self.weight_quantizers
        return {p: _scale_rows(w, self.norm_factors(norm, quantizers[p])[0]) for p, w in weights.items()}

    def folded_weight(self) -> Tensor:
        """What the weight quantizers see now, all parts of it, output channels first."""
        weights = list(self.folded_weights().values())
        return weights[0] if len(weights) == 1 else torch.cat(weights, 1)

    @torch.no_grad()
    def calibrate_weight(self, method: RangeMethod = "mse") -> None:
        """Set the weight's open scales from its values; see ``Quantizer.calibrate``."""
        for part, weight in self.folded_weights().items():
            self.weight_quantizers[part].calibrate(weight, method)

    @torch.no_grad()
    def set_codes(self, codes: Mapping[str, Tensor]) -> None:
        """Set the weight to what codes stand for, or to what rounds to it (the literal formula sends its top to 0).

        Args:
            codes: part → integers, one for each weight of the part, output channels first. Other parts stay.
        """
        shapes = {part: weight.shape for part, weight in self.weight_pieces().items()}
        weights = {}
        for part, values in codes.items():
            quantizer = self.weight_quantizers[part]
            weights[part] = quantizer.values(values.reshape(shapes[part]))
            literal = quantizer.number_format
            if literal.kind == "literal" and literal.fraction_bits:
                limit = 2.0**literal.integer_bits - 2.0 ** -(
                    literal.fraction_bits + 2
                )  # a quarter step below the top
                weights[part] = weights[part].clamp(-limit, limit)
        self.set_weights(weights)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set parts of the weight, each (output channels, the part's input channels, …); other parts stay."""
        if weights:
            pieces = {**self.weight_pieces(), **weights}
            self.weight.copy_(self.from_output_major(torch.cat(list(pieces.values()), 1)))

    def _round_bias(self, bias: Tensor | None, weight_steps: Mapping[str, Tensor]) -> Tensor | None:
        """The bias on the accumulator's grid, input step × weight step, the finest of the parts'; as it is where a
        part does not round.
        """
        if bias is None or not self.rounds_bias:
            return bias
        inputs = self.input_quantizers
        if not all(quantizer.rounds for quantizer in (*inputs.values(), *self.weight_quantizers.values())):
            return bias
        steps = [(inputs[part].scale * step).detach() for part, step in weight_steps.items()]
        step = steps[0]
        for other in steps[1:]:
            step = torch.minimum(step, other)
        codes = (bias.detach() / step.clamp(min=1e-30)).round()
        # Beyond 2^24 codes the grid is finer than float32, so the bias stands on it already. A weight that is
        # almost nothing beside its bias gets there; saturating at 32 bits would lose the bias.
        rounded = torch.where(codes.abs() < 2.0**24, codes * step, bias.detach())
        return bias + (rounded - bias.detach())

    def _widest(self) -> int:
        """Significant bits that the rounded values need; all of float32's where a scale is no power of two."""
        operands = (*self.input_quantizers.values(), *self.weight_quantizers.values())
        quantizers = [q for q in operands if q.rounds]
        return max((q.number_format.bits if q.power_of_two else 24 for q in quantizers), default=0)

    def output_major(self, weight: Tensor) -> Tensor:
        """The weight as (output channels, inputs of the group, …)."""
        return weight

    def from_output_major(self, weight: Tensor) -> Tensor:
        """What is (output channels, inputs of the group, …) in the weight's own order."""
        return weight

    def _run(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        return self._conv_forward(input, weight, bias)


class _QuantizedTransposed(QuantizedLayer):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See ``QuantizedLayer.forward``; ``output_size`` as in the float layer."""
        return self._round_output(self._run_rounded(input, output_size))

    def output_major(self, weight: Tensor) -> Tensor:
        # (groups · in, out, …) → (groups · out, in, …)
        grouped = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return grouped.flatten(0, 1)

    def from_output_major(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _run(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        layer: Any = self
        dimensions = weight.dim() - 2
        (output_size,) = args
        padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, dimensions, layer.dilation
        )
        transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
        return transposed(
            input, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )


class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """``nn.Conv1d`` with rounded input, weight and bias."""


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` with rounded input, weight and bias."""


class QuantConv3d(QuantizedLayer, nn.Conv3d):
    """``nn.Conv3d`` with rounded input, weight and bias."""


class QuantConvTranspose1d(_QuantizedTransposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with rounded input, weight and bias."""


class QuantConvTranspose2d(_QuantizedTransposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with rounded input, weight and bias."""


class QuantConvTranspose3d(_QuantizedTransposed, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with rounded input, weight and bias."""


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` with rounded input, weight and bias."""

    def _run(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        return F.linear(input, weight, bias)


QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
}
"""Class of a float layer → class of the same layer, quantized."""

_FLOAT_LAYERS = {quantized: plain for plain, quantized in QUANTIZED_LAYERS.items()}
_UNSPLIT: dict[type[nn.Module], type[nn.Module]] = {split: plain for plain, split in SPLIT_LAYERS.items()}


def is_quantizable(module: nn.Module) -> bool:
    """Whether it is a float layer, split or not, that ``quantize_layer`` takes: no subclass, which may do more."""
    return _UNSPLIT.get(type(module), type(module)) in QUANTIZED_LAYERS


def quantize_layer(
    layer: nn.Module,
    weight: QFormat | Mapping[str, QFormat],
    input: QFormat | Mapping[str, QFormat],
    *,
    per_channel: bool = True,
    power_of_two: bool = True,
    learned: bool = False,
    rounds_bias: bool = True,
    output: QFormat | None = None,
) -> QuantizedLayer:
    """Make a float layer a quantized one, in place.

    Args:
        layer: a convolution, transposed convolution or linear layer, split or not; its class changes.
        weight: the weight's format; for a split layer one for all parts, or one for each by its name.
        input: the input's format, signed or unsigned as it is to be; by part as the weight's.
        per_channel: calibrated and learned weight scales are one for each output channel, else all equal.
        power_of_two: calibrated and learned scales are powers of two.
        learned: scales that formats leave open are parameters.
        rounds_bias: the bias is rounded to the accumulator's grid.
        output: the output's format, signed or unsigned as it is to be; None leaves it as it is.

    Raises:
        ValueError: if there is no quantized class for the layer's class, the input's format is for weights, formats
            are given for parts that the layer has not, or NaN or infinity in a weight whose scale is to be found; the
            layer stays as it is then.
    """
    plain = _UNSPLIT.get(type(layer), type(layer))
    target = QUANTIZED_LAYERS.get(plain)
    if target is None:
        known = ", ".join(cls.__name__ for cls in QUANTIZED_LAYERS)
        raise ValueError(f"cannot quantize a layer of class {type(layer).__name__}; expected one of {known}")
    parts = layer.parts if isinstance(layer, SplitLayer) else ()
    names = [part.name for part in parts] or [WHOLE]
    weights, inputs = _spread(weight, names, "weight"), _spread(input, names, "input")
    values = cast(Tensor, layer.weight)
    options: dict[str, Any] = {"power_of_two": power_of_two, "learned": learned, "device": values.device}
    channels = cast(int, layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
    input_quantizers = {name: Quantizer(inputs[name], **options) for name in names}
    weight_quantizers = {
        name: Quantizer(weights[name], channels=channels if per_channel else 0, weight=True, **options)
        for name in names
    }
    output_quantizer = None if output is None else Quantizer(output, **options)
    layer.__class__ = target
    quantized = cast(QuantizedLayer, layer)
    quantized.parts = parts
    if parts:
        quantized.input_parts = PartQuantizers(input_quantizers, parts, axis=1 - values.dim())
        quantized.weight_parts = PartQuantizers(weight_quantizers, parts, axis=1)
    else:
        quantized.input_quantizer = input_quantizers[WHOLE]
        quantized.weight_quantizer = weight_quantizers[WHOLE]
    quantized.output_quantizer = output_quantizer
    quantized.rounds_bias = rounds_bias
    quantized.pair_with(None)
    try:
        quantized.calibrate_weight()
    except ValueError:
        dequantize_layer(quantized)
        raise
    return quantized


def _spread(
    formats: QFormat | Mapping[str, QFormat], names: Sequence[str], what: str
) -> Mapping[str, QFormat]:
    """A format for each part, from one for all or one for each."""
    if isinstance(formats, QFormat):
        return dict.fromkeys(names, formats)
    if set(formats) == {WHOLE}:
        return dict.fromkeys(names, formats[WHOLE])
    if set(formats) != set(names):
        has = "is not split" if list(names) == [WHOLE] else f"has the parts {', '.join(names)}"
        raise ValueError(f"{what} formats are given for the parts {', '.join(formats)}, but the layer {has}")
    return formats


def dequantize_layer(layer: QuantizedLayer) -> nn.Module:
    """Make a quantized layer the float layer that it was, split or not, in place; the float weight is kept."""
    parts = layer.parts
    for name in ("input_parts", "weight_parts") if parts else ("input_quantizer", "weight_quantizer"):
        delattr(layer, name)
    del layer.output_quantizer
    for name in ("rounds_bias", "_norm", "parts"):
        del layer.__dict__[name]
    layer.__class__ = _FLOAT_LAYERS[type(layer)]  # type: ignore[assignment]
    return split_layer(layer, parts) if parts else layer


def folded_log2_scale(quantizer: Quantizer, after: Tensor) -> Tensor:
    """log2(scale × after), shaped as ``log2_scale``: what the weight quantizer's state holds after folding."""
    return torch.log2(quantizer.scale.detach() * after.detach().clamp(min=_LEAST_GAIN))


def _column(scale: Tensor, weight: Tensor) -> Tensor:
    return scale if scale.dim() == 0 else scale.view(-1, *[1] * (weight.dim() - 1))


def _scale_rows(weight: Tensor, factor: Tensor) -> Tensor:
    """weight[c, …] · factor[c], or · factor where it is 0-dim"""
    return weight * _column(factor, weight)
