"""``Quantizer``: the module that rounds one tensor, its format and scale kept as fixed-shape state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QFormat
from .functional import fake_quantize, learned_fake_quantize, literal_fake_quantize, to_codes
from .ranges import RangeMethod, RangeObserver, find_scale

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


class Quantizer(nn.Module):
    """Rounds one tensor to a number format; what it learned is state.

    State, of fixed shape whatever the format (design decision 2), so that a trained network loads strictly into
    one that was built with another format, and formats change with ``load_state_dict``:

    - ``format_code``: int32 (5,), ``QFormat.to_code`` and whether the scale is a power of two
    - ``log2_scale``: float32, () or (channels,), the scale's base-2 logarithm. Its being an integer makes a
      fixed-point format; static formats hold -f. The logarithm, because a step of an optimizer then changes
      a scale by a ratio, whatever its size (as in TQT, Jain et al., MLSys 2020), and cannot turn its sign.

    Args:
        number_format: what to round to; ``ternary`` and ``binary`` are not trained yet.
        channels: where positive, there is one scale for each index of the tensor's first axis; else one in all.
        power_of_two: scales that calibration or training finds are powers of two.
        learned: the scale is a parameter (LSQ); otherwise a buffer that calibration sets.

    Attributes:
        enabled: whether it rounds; no state. Off, it passes tensors through: the float phase of a training.

    Raises:
        ValueError: for a format that has no quantizer.
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
    ) -> None:
        super().__init__()
        if number_format.kind in ("ternary", "binary"):
            raise ValueError(
                f"format '{number_format}' can be stored but has no quantizer yet; use int2 or Q0.2"
            )
        self.channels = channels
        self.power_of_two = power_of_two or not number_format.has_free_scale
        shape = (channels,) if channels else ()
        log2_scale = torch.zeros(shape, device=device)
        if number_format.step is not None:
            log2_scale -= number_format.fraction_bits
        self.learned = learned and number_format.has_free_scale
        code = (*number_format.to_code(), int(self.power_of_two))
        self.register_buffer("format_code", torch.tensor(code, dtype=torch.int32, device=device))
        if self.learned:
            self.log2_scale = nn.Parameter(log2_scale)
        else:
            self.register_buffer("log2_scale", log2_scale)
        self.number_format = number_format
        self.observer: RangeObserver | None = None
        self.enabled = True

    @property
    def rounds(self) -> bool:
        """Whether ``forward`` rounds now: not where it is off, observed, or kept float."""
        return self.enabled and self.observer is None and not self.number_format.is_float

    @property
    def scale(self) -> Tensor:
        """The scale in use, () or (channels,), float32; differentiable where it is learned."""
        if self.power_of_two:
            if not torch.is_grad_enabled():  # tracing and export follow plain operations only
                return _power_of_two(self.log2_scale)
            return _RoundPowerOfTwo.apply(self.log2_scale)
        return torch.exp2(self.log2_scale)

    def set_scale(self, scale: Tensor) -> None:
        """Set the scale: 0-dim, or (channels,)."""
        with torch.no_grad():
            self.log2_scale.copy_(torch.log2(scale.to(self.log2_scale)))

    def calibrate(self, tensor: Tensor, method: RangeMethod = "mse") -> None:
        """Set the scale from the values of one tensor (a weight); nothing to do for static formats."""
        if self.number_format.has_free_scale:
            rows = tensor.detach().flatten(1) if self.channels else tensor.detach().reshape(1, -1)
            scale = find_scale(rows, self.number_format, method, self.power_of_two)
            self.set_scale(scale if self.channels else scale[0])

    def forward(self, tensor: Tensor) -> Tensor:
        """The tensor rounded to the format, in its own dtype; as it is while off, observed, or where kept float."""
        if not self.rounds:
            if self.observer is not None:
                self.observer.update(tensor)
            return tensor
        number_format = self.number_format
        if number_format.kind == "literal":
            return literal_fake_quantize(
                tensor, number_format.integer_bits, number_format.fraction_bits, number_format.signed
            )
        # A static format may have been loaded into a quantizer that was built to learn its scale.
        quantize = learned_fake_quantize if self.learned and number_format.has_free_scale else fake_quantize
        axis = 0 if self.channels else None
        values = _wide(tensor)
        return quantize(values, self.scale, number_format.qmin, number_format.qmax, axis).to(tensor.dtype)

    def codes(self, tensor: Tensor) -> Tensor:
        """The integer codes, int32, of a tensor that is to be stored; code × scale is what ``forward`` gives.

        Raises:
            ValueError: for a float format.
        """
        if self.number_format.kind == "literal":
            return (self.forward(tensor.detach()) * 2.0**self.number_format.fraction_bits).round().int()
        limits = self.number_format.qmin, self.number_format.qmax
        return to_codes(_wide(tensor.detach()), self.scale, *limits, 0 if self.channels else None).int()

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
                self.number_format, self.power_of_two = QFormat.from_code(format_code), bool(power_of_two)
            except ValueError as error:
                args[-1].append(f"{prefix}format_code: {error}")  # load_state_dict's list of errors

    def extra_repr(self) -> str:
        scale = (
            "static" if not self.number_format.has_free_scale else "learned" if self.learned else "calibrated"
        )
        grid = ", per channel" if self.channels else ""
        return f"{self.number_format}, {scale}{grid}"


def _wide(tensor: Tensor) -> Tensor:
    """In float32 what comes in half precision, which holds the rounded values (wider formats come as float32, see
    ``QuantizedLayer``), but not the quotients that decide the rounding.
    """
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
