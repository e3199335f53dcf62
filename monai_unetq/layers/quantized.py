"""Quantized convolution, transposed convolution and linear layer: the float layer's own object with another class.

Weight and bias keep their names; only the two quantizers are new (design decision 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats import QFormat
from ..quantizers import Quantizer
from .norm_pair import PairedNorm

__all__ = ["QUANTIZED_LAYERS", "QuantizedLayer", "dequantize_layer", "quantize_layer"]

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
    """

    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    rounds_bias: bool
    _norm: tuple[PairedNorm, ...]  # in a tuple, so that the batch norm is not registered a second time

    @property
    def paired_norm(self) -> PairedNorm | None:
        """The batch norm that this layer folds, if any."""
        return self._norm[0] if self._norm else None

    def pair_with(self, norm: PairedNorm | None) -> None:
        """Fold ``norm``, this layer's only consumer, from now on; None ends the pair."""
        self._norm = () if norm is None else (norm,)

    def forward(self, input: Tensor) -> Tensor:
        """The float layer's forward with rounded input, weight and bias; same shapes.

        Under autocast, formats wider than the half-precision type holds, and scales that are no powers of two,
        run in float32.
        """
        return self._run_rounded(input)

    def _run_rounded(self, input: Tensor, *args: Any) -> Tensor:
        half = (
            torch.get_autocast_dtype(input.device.type)
            if torch.is_autocast_enabled(input.device.type)
            else None
        )
        if half is not None and self._widest() > _EXACT_BITS.get(half, 32):
            with torch.autocast(input.device.type, enabled=False):
                return self._run(self.input_quantizer(input.float()), *self.effective_parameters(), *args)
        return self._run(self.input_quantizer(input), *self.effective_parameters(), *args)

    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The rounded weight and bias that the layer runs with now, in the layer's own layout.

        With a paired batch norm in evaluation these are the folded ones. In training the weight is the rounded
        folded weight divided by the gain, and the bias is as it is: the batch norm subtracts its mean.
        """
        norm = self.paired_norm
        if norm is None:
            weight = self.weight_quantizer(self.output_major(self.weight))
            return self.from_output_major(weight), self._round_bias(self.bias, self.weight_quantizer.scale)
        before, after = self.norm_factors(norm)
        rounded = self.weight_quantizer(_scale_rows(self.output_major(self.weight), before))
        if norm.training:
            return self.from_output_major(_scale_rows(rounded, 1 / before)), self.bias
        weight, step = rounded, self.weight_quantizer.scale
        if after is not None:
            # The gradient is that of rounded · after; the value is code × folded scale, as it will be after fold.
            step = self.weight_quantizer.scale_at(self.folded_log2_scale(after))
            weight = _scale_rows(rounded, after)
            if self.weight_quantizer.rounds:
                codes = (rounded.detach() / _column(self.weight_quantizer.scale, rounded)).round()
                weight = weight + (_scale_rows(codes, step) - weight).detach()
        return self.from_output_major(weight), self._round_bias(self.folded_bias(norm), step)

    def norm_factors(self, norm: PairedNorm) -> tuple[Tensor, Tensor | None]:
        """What the weight is multiplied with before and after rounding so that both make the gain, (C,) each.

        Static and power-of-two grids, and one scale for all channels, must hold the folded weight itself:
        (gain, 1). Free scales per channel take the gain's magnitude into themselves: (sign, |gain|). A
        vanishing gain in training is replaced by 1: it could not be divided out again.

        The codes of binary and ternary weights do not know the gain's magnitude, so their scale takes it, whatever it
        is: rounded to a power of two where the scale is one (as in the shift-based batch norm of Courbariaux et al.,
        2016), the mean of all channels, 0-dim, where there is one scale for all. Before rounding, the gain would
        change nothing but the quotient in training, scale/gain; σ follows that quotient, the gain is γ/σ, and the
        running statistics would drift away in a circle.
        """
        gain, quantizer = norm.gain(), self.weight_quantizer
        if not quantizer.follows_weight and (quantizer.power_of_two or not quantizer.channels):
            return torch.where(
                gain.abs() < 1e-12, torch.ones_like(gain), gain
            ) if norm.training else gain, None
        sign, size = torch.where(gain < 0, -torch.ones_like(gain), torch.ones_like(gain)), gain.abs()
        if quantizer.follows_weight and quantizer.rounds:
            size = size if quantizer.channels else size.mean()
            size = (
                quantizer.scale_at(torch.log2(size.clamp(min=_LEAST_GAIN)))
                if quantizer.power_of_two
                else size
            )
        return sign, size

    def folded_bias(self, norm: PairedNorm) -> Tensor:
        """The folded bias β + (b - μ)·gain, (C,), with the gain that the folded weight has."""
        before, after = self.norm_factors(norm)
        return norm.shift(before if after is None else before * after, self.bias)

    def folded_weight(self) -> Tensor:
        """What the weight quantizer sees now, output channels first: the weight times the pair's factor."""
        weight, norm = self.output_major(self.weight), self.paired_norm
        return weight if norm is None else _scale_rows(weight, self.norm_factors(norm)[0])

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Set the weight to what codes stand for, or to what rounds to it (the literal formula sends its top to 0).

        Args:
            codes: integers, one for each weight, output channels first.
        """
        weight = self.weight_quantizer.values(codes.reshape(self.output_major(self.weight).shape))
        literal = self.weight_quantizer.number_format
        if literal.kind == "literal" and literal.fraction_bits:
            limit = 2.0**literal.integer_bits - 2.0 ** -(
                literal.fraction_bits + 2
            )  # a quarter step below the top
            weight = weight.clamp(-limit, limit)
        self.weight.copy_(self.from_output_major(weight))

    def folded_log2_scale(self, after: Tensor) -> Tensor:
        """log2(scale × after), shaped as ``log2_scale``: what the weight quantizer's state holds after folding."""
        return torch.log2(self.weight_quantizer.scale.detach() * after.detach().clamp(min=_LEAST_GAIN))

    def _round_bias(self, bias: Tensor | None, weight_step: Tensor) -> Tensor | None:
        """The bias on the accumulator's grid, input step × weight step; as it is where one of both does not round."""
        if bias is None or not self.rounds_bias:
            return bias
        if not (self.input_quantizer.rounds and self.weight_quantizer.rounds):
            return bias
        step = (self.input_quantizer.scale * weight_step).detach()
        codes = (bias.detach() / step.clamp(min=1e-30)).round()
        # Beyond 2^24 codes the grid is finer than float32, so the bias stands on it already. A weight that is
        # almost nothing beside its bias gets there; saturating at 32 bits would lose the bias.
        rounded = torch.where(codes.abs() < 2.0**24, codes * step, bias.detach())
        return bias + (rounded - bias.detach())

    def _widest(self) -> int:
        """Significant bits that the rounded values need; all of float32's where a scale is no power of two."""
        quantizers = [q for q in (self.input_quantizer, self.weight_quantizer) if q.rounds]
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
        return self._run_rounded(input, output_size)

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


def quantize_layer(
    layer: nn.Module,
    weight: QFormat,
    input: QFormat,
    *,
    per_channel: bool = True,
    power_of_two: bool = True,
    learned: bool = False,
    rounds_bias: bool = True,
) -> QuantizedLayer:
    """Make a float layer a quantized one, in place.

    Args:
        layer: a convolution, transposed convolution or linear layer; its class changes.
        weight: the weight's format.
        input: the input's format, signed or unsigned as it is to be.
        per_channel: calibrated and learned weight scales are one for each output channel, else all equal.
        power_of_two: calibrated and learned scales are powers of two.
        learned: scales that formats leave open are parameters.
        rounds_bias: the bias is rounded to the accumulator's grid.

    Raises:
        ValueError: if there is no quantized class for the layer's class, the input's format is for weights, or NaN
            or infinity in a weight whose scale is to be found; the layer stays as it is then.
    """
    target = QUANTIZED_LAYERS.get(type(layer))
    if target is None:
        known = ", ".join(cls.__name__ for cls in QUANTIZED_LAYERS)
        raise ValueError(f"cannot quantize a layer of class {type(layer).__name__}; expected one of {known}")
    device = cast(Tensor, layer.weight).device
    options: dict[str, Any] = {"power_of_two": power_of_two, "learned": learned, "device": device}
    channels = cast(int, layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
    input_quantizer = Quantizer(input, **options)
    weight_quantizer = Quantizer(weight, channels=channels if per_channel else 0, weight=True, **options)
    layer.__class__ = target
    quantized = cast(QuantizedLayer, layer)
    quantized.input_quantizer = input_quantizer
    quantized.weight_quantizer = weight_quantizer
    quantized.rounds_bias = rounds_bias
    quantized.pair_with(None)
    try:
        weight_quantizer.calibrate(quantized.folded_weight())
    except ValueError:
        dequantize_layer(quantized)
        raise
    return quantized


def dequantize_layer(layer: QuantizedLayer) -> nn.Module:
    """Make a quantized layer the float layer that it was, in place; the float weight is kept."""
    for name in ("input_quantizer", "weight_quantizer"):
        delattr(layer, name)
    for name in ("rounds_bias", "_norm"):
        del layer.__dict__[name]
    layer.__class__ = _FLOAT_LAYERS[type(layer)]  # type: ignore[assignment]
    return layer


def _column(scale: Tensor, weight: Tensor) -> Tensor:
    return scale if scale.dim() == 0 else scale.view(-1, *[1] * (weight.dim() - 1))


def _scale_rows(weight: Tensor, factor: Tensor) -> Tensor:
    """weight[c, …] · factor[c], or · factor where it is 0-dim"""
    return weight * _column(factor, weight)
