"""``Quantizer``: the module that rounds one tensor, its format and scale kept as fixed-shape state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QFormat
from .functional import along_axis, fake_quantize, learned_fake_quantize, literal_fake_quantize, to_codes
from .low_bit import (
    power_of_two_codes,
    power_of_two_multipliers,
    power_of_two_weights,
    sign_codes,
    sign_quantize,
    sign_weights,
    ternary_codes,
    ternary_tanh,
    ternary_weights,
)
from .ranges import RangeMethod, RangeObserver, find_scale, weight_scale

__all__ = ["Quantizer"]


class _RoundPowerOfTwo(torch.autograd.Function):
    """2^round(x), exact, with the gradient of 2^x at the rounded point."""

    @staticmethod
    def forward(ctx: Any, log2_scale: Tensor) -> Tensor:
        scale = _power_of_two(log2_scale)
        ctx.save_for_backward(scale)
        return scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return grads[0] * scale * 0.6931471805599453


def _power_of_two(log2_scale: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(log2_scale), log2_scale.round())


class _Gained(torch.autograd.Function):
    """The tensor itself, its gradient multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.gain, None


class Quantizer(nn.Module):
    """Rounds one tensor to a number format; what it learned is state.

    What the papers of the lowest bit widths do with a weight is not what they do with an activation:

    ============  =====================================================  =============================================
    format        weight                                                 activation
    ============  =====================================================  =============================================
    ``binary``    XNOR-Net: sign, times the mean magnitude               BNN: sign, times the calibrated mean magnitude
    ``ternary``   Ternary Weight Networks: 0 within 0.7·mean magnitude,  TernaryNet: ``ternary_tanh`` while ``beta`` is
                  times the mean of what is beyond                       set, then rounded to -1, 0, 1 × scale
    ``pow2-B``    Incremental Network Quantization                       –
    ============  =====================================================  =============================================

    A binary or ternary weight's scale follows the weight: every forward in training with gradients computes it anew,
    without a gradient of its own, and keeps it in the state, which evaluation and packed files read. Learned, it is a
    parameter that begins there. All other formats round weights and activations alike.

    State, of fixed shape whatever the format (design decision 2), so that a trained network loads strictly into
    one that was built with another format, and formats change with ``load_state_dict``:

    - ``format_code``: int32 (5,), ``QFormat.to_code`` and whether the scale is a power of two
    - ``log2_scale``: float32, () or (channels,), the scale's base-2 logarithm. Its being an integer makes a
      fixed-point format; static formats hold -f. The logarithm, because a step of an optimizer then changes
      a scale by a ratio, whatever its size (as in TQT, Jain et al., MLSys 2020), and cannot turn its sign.

    Args:
        number_format: what to round to.
        channels: where positive, there is one scale for each index of the tensor's first axis; else one in all.
        power_of_two: scales that calibration or training finds are powers of two; those of ``pow2-B`` always are.
        learned: the scale is a parameter (LSQ); otherwise a buffer that calibration sets. ``pow2-B`` learns none.
        weight: the tensor is a weight, output channels first.

    Attributes:
        enabled: whether it rounds; no state. Off, it passes tensors through: the float phase of a training.
        beta: while training a ternary activation, steepness of its ``ternary_tanh``; None rounds. No state.
        frozen: while training a ``pow2-B`` weight, with gradients, bool mask of its shape, output channels first: only
            there it is rounded, and gets no gradient; elsewhere it passes as it is. None rounds all of it. No state.

    Raises:
        ValueError: for a ``pow2-B`` that is not a weight's.
    """

    format_code: Tensor
    log2_scale: Tensor

    def __init__(
        self,
        number_format: QFormat,
        channels: int = 0,
        power_of_two: bool = True,
        learned: bool = False,
        device: torch.device | None = None,
        weight: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.weight = weight
        self._check(number_format)
        self.power_of_two = _always_power_of_two(number_format) or power_of_two
        shape = (channels,) if channels else ()
        log2_scale = torch.zeros(shape, device=device)
        if number_format.step is not None:
            log2_scale -= number_format.fraction_bits
        self.learned = learned and not _always_power_of_two(number_format)
        code = (*number_format.to_code(), int(self.power_of_two))
        self.register_buffer("format_code", torch.tensor(code, dtype=torch.int32, device=device))
        if self.learned:
            self.log2_scale = nn.Parameter(log2_scale)
        else:
            self.register_buffer("log2_scale", log2_scale)
        self.number_format = number_format
        self.observer: RangeObserver | None = None
        self.enabled = True
        self.beta: float | None = None
        self.frozen: Tensor | None = None

    def _check(self, number_format: QFormat) -> None:
        if number_format.kind == "pow2" and not self.weight:
            raise ValueError(
                f"format '{number_format}' is for weights; give activations another, such as int4"
            )

    @property
    def follows_weight(self) -> bool:
        """Whether codes come from the tensor alone (a binary or ternary weight): a row's size changes its scale only."""
        signed = self.number_format.signed
        return self.weight and signed and self.number_format.kind in ("binary", "ternary")

    @property
    def rounds(self) -> bool:
        """Whether ``forward`` rounds now: not where it is off, observed, or kept float."""
        return self.enabled and self.observer is None and not self.number_format.is_float

    @property
    def rounds_evenly(self) -> bool:
        """Whether ``forward`` rounds now to the codes of an even grid and nothing else is done:
        ``learned_fake_quantize``, or without a learned scale ``fake_quantize``.
        """
        kind = self.number_format.kind
        if not self.rounds or kind in ("literal", "pow2") or self.follows_weight:
            return False
        if not self.number_format.signed or kind not in ("binary", "ternary"):
            return True
        return kind == "ternary" and not (self.training and self.beta is not None)

    @property
    def scale(self) -> Tensor:
        """The scale in use, () or (channels,), float32; differentiable where it is learned."""
        return self.scale_at(self.log2_scale)

    def scale_at(self, log2_scale: Tensor) -> Tensor:
        """The scale that a logarithm stands for here: rounded to a power of two, straight through, or as it is."""
        if self.power_of_two:
            if not torch.is_grad_enabled():  # tracing and export follow plain operations only
                return _power_of_two(log2_scale)
            return _RoundPowerOfTwo.apply(log2_scale)
        return torch.exp2(log2_scale)

    def set_scale(self, scale: Tensor) -> None:
        """Set the scale: 0-dim, or (channels,)."""
        with torch.no_grad():
            self.log2_scale.copy_(torch.log2(scale.to(self.log2_scale)))

    def calibrate(self, tensor: Tensor, method: RangeMethod = "mse") -> None:
        """Set the scale from the values of one tensor (a weight); nothing to do for static formats.

        Weights in ``binary``, ``ternary`` and ``pow2-B`` have formulas for it (``weight_scale``), whatever the method.

        Raises:
            ValueError: for an unknown method, or a tensor that holds NaN or infinity; the scale stays as it is.
        """
        if self.number_format.has_free_scale:
            rows = self._rows(tensor.detach())
            scale = find_scale(rows, self.number_format, method, self.power_of_two)
            if self.follows_weight:
                scale = weight_scale(rows, self.number_format, self.power_of_two)
            self.set_scale(scale if self.channels else scale[0])

    def _rows(self, tensor: Tensor) -> Tensor:
        """(channels, values), or (1, values): the values that share a scale."""
        return tensor.flatten(1) if self.channels else tensor.reshape(1, -1)

    def forward(self, tensor: Tensor) -> Tensor:
        """The tensor rounded to the format, in its own dtype; as it is while off, observed, or where kept float."""
        if not self.rounds:
            if self.observer is not None:
                self.observer.update(tensor)
            return tensor
        number_format, values = self.number_format, _wide(tensor)
        if self.rounds_evenly:
            quantize = learned_fake_quantize if self.learns else fake_quantize
            rounded = quantize(values, self.scale, number_format.qmin, number_format.qmax, self._axis)
        elif number_format.kind == "literal":
            rounded = literal_fake_quantize(
                tensor, number_format.integer_bits, number_format.fraction_bits, number_format.signed
            )
        elif number_format.kind == "pow2":
            rounded = self._round_incrementally(values)
        elif self.follows_weight:
            rounded = self._round_following(values)
        elif number_format.kind == "binary":
            rounded = sign_quantize(values, self._gained_scale(values), self._axis)
        else:
            assert self.beta is not None
            scale = along_axis(self._gained_scale(values), values, self._axis)
            rounded = scale * ternary_tanh(values / scale, self.beta)
        return rounded.to(tensor.dtype)

    def _round_incrementally(self, values: Tensor) -> Tensor:
        rounded = power_of_two_weights(values, self.scale, self.number_format.qmax, self._axis)
        if self.frozen is None or not (self.training and torch.is_grad_enabled()):
            return rounded
        return torch.where(self.frozen, rounded.detach(), values)

    def _round_following(self, values: Tensor) -> Tensor:
        binary = self.number_format.kind == "binary"
        if self.learns:
            learned = sign_quantize if binary else ternary_weights
            return learned(values, self._gained_scale(values), self._axis)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                scale = weight_scale(self._rows(values), self.number_format, self.power_of_two)
                self.set_scale(scale if self.channels else scale[0])
        return (sign_weights if binary else ternary_weights)(values, self.scale, self._axis)

    @property
    def _axis(self) -> int | None:
        return 0 if self.channels else None

    @property
    def learns(self) -> bool:
        """Whether the scale is trained now: a static format may be loaded into a quantizer that was built to learn."""
        return self.learned and not _always_power_of_two(self.number_format)

    def _gained_scale(self, values: Tensor) -> Tensor:
        """The scale, its gradient multiplied by 1/√N, N the number of values that share it (LSQ, section 2.2; qmax is
        1).
        """
        scale = self.scale
        if not (self.learns and torch.is_grad_enabled()):
            return scale.detach()
        out: Tensor = _Gained.apply(scale, (scale.numel() / max(values.numel(), 1)) ** 0.5)
        return out

    def codes(self, tensor: Tensor) -> Tensor:
        """The integer codes, int32, of a tensor that is to be stored; ``values(codes)`` is what ``forward`` gives.

        Raises:
            ValueError: for a float format.
        """
        number_format, values = self.number_format, _wide(tensor.detach())
        if number_format.kind == "literal":
            return (self.forward(tensor.detach()) * 2.0**number_format.fraction_bits).round().int()
        if number_format.kind == "pow2":
            codes = power_of_two_codes(values, self.scale, number_format.qmax, self._axis)
        elif self.follows_weight and number_format.kind == "ternary":
            codes = ternary_codes(values, self._axis)
        elif number_format.kind == "binary":
            codes = sign_codes(values)
        else:
            codes = to_codes(values, self.scale, number_format.qmin, number_format.qmax, self._axis)
        return codes.int()

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, float32, same shape: code × scale; for ``pow2-B`` ±2^(k-1) × scale.

        In evaluation they are rounded to themselves, bit for bit (but not the literal formula's largest ones).

        Args:
            codes: integers between the format's lowest and highest code; (channels, …) where the scale is per channel.

        Raises:
            ValueError: for a float format.
        """
        qmax, scale = self.number_format.qmax, self.scale.detach()
        codes = codes.to(scale.device)
        if self.number_format.kind == "pow2":
            table = torch.tensor(power_of_two_multipliers(qmax), dtype=scale.dtype, device=scale.device)
            multipliers = table[codes.abs().long()] * codes.sign()
        else:
            multipliers = codes.to(scale.dtype)
        return multipliers * along_axis(scale, multipliers, self._axis)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if not any(prefix + key in state_dict for key in ("format_code", "log2_scale")):
            return  # the state of a float network: formats and scales stay as they are, also under strict loading
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        code = state_dict.get(prefix + "format_code")
        if code is not None and tuple(code.shape) == (5,):
            *format_code, power_of_two = code.tolist()
            try:
                number_format = QFormat.from_code(format_code)
                self._check(number_format)
                self.number_format, self.power_of_two = number_format, bool(power_of_two)
            except ValueError as error:
                args[-1].append(f"{prefix}format_code: {error}")  # load_state_dict's list of errors

    def extra_repr(self) -> str:
        scale = "learned" if self.learns else "the weight's own" if self.follows_weight else "calibrated"
        scale = scale if self.number_format.has_free_scale else "static"
        grid = ", per channel" if self.channels else ""
        return f"{self.number_format}, {scale}{grid}"


def _always_power_of_two(number_format: QFormat) -> bool:
    """Whether the format's scales are powers of two and not trained, however the quantizer was built."""
    return not number_format.has_free_scale or number_format.kind == "pow2"


def _wide(tensor: Tensor) -> Tensor:
    """In float32 what comes in half precision, which holds the rounded values (wider formats come as float32, see
    ``QuantizedLayer``), but not the quotients that decide the rounding.
    """
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
