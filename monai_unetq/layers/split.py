"""Split convolutions: which of a layer's input channels came over a skip connection and which from below, and
quantizers of their own for each of these parts.

The sum conv(skip) + conv(up) is one convolution over the concatenation, so a split layer is the same object with the
same weight and computes the same in float. What differs is that every part of the input and of the weight is rounded
to its own format at its own scale (Guo et al., ISCAS 2022, split convolution; design decision 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..parts import Part, check_part_names, decode, encode, state_key
from ..quantizers import Quantizer, learned_fake_quantize_parts, recorded

__all__ = ["SPLIT_LAYERS", "PartQuantizers", "SplitLayer", "split_layer"]

if TYPE_CHECKING:

    class _Layer(nn.Conv2d):
        pass

else:
    _Layer = nn.Module


class SplitLayer(_Layer):
    """What the split convolutions share: the parts of their input channels, in order."""

    parts: tuple[Part, ...]

    def extra_repr(self) -> str:
        """The layer's own line, and the channels of each part."""
        return f"{super().extra_repr()}, {describe(self.parts)}"


def describe(parts: Sequence[Part]) -> str:
    """Parts and their channels: ``up=64 | skip=64``."""
    return " | ".join(f"{part.name}={part.channels}" for part in parts)


class SplitConv1d(SplitLayer, nn.Conv1d):
    """``nn.Conv1d`` over a concatenation whose parts are known."""


class SplitConv2d(SplitLayer, nn.Conv2d):
    """``nn.Conv2d`` over a concatenation whose parts are known."""


class SplitConv3d(SplitLayer, nn.Conv3d):
    """``nn.Conv3d`` over a concatenation whose parts are known."""


class SplitConvTranspose1d(SplitLayer, nn.ConvTranspose1d):  # type: ignore[misc]
    """``nn.ConvTranspose1d`` over a concatenation whose parts are known."""


class SplitConvTranspose2d(SplitLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    """``nn.ConvTranspose2d`` over a concatenation whose parts are known."""


class SplitConvTranspose3d(SplitLayer, nn.ConvTranspose3d):  # type: ignore[misc]
    """``nn.ConvTranspose3d`` over a concatenation whose parts are known."""


SPLIT_LAYERS: dict[type[nn.Module], type[SplitLayer]] = {
    nn.Conv1d: SplitConv1d,
    nn.Conv2d: SplitConv2d,
    nn.Conv3d: SplitConv3d,
    nn.ConvTranspose1d: SplitConvTranspose1d,
    nn.ConvTranspose2d: SplitConvTranspose2d,
    nn.ConvTranspose3d: SplitConvTranspose3d,
}
"""Class of a float convolution → class of the same convolution once it is split."""


def split_layer(layer: nn.Module, parts: Sequence[Part]) -> SplitLayer:
    """Make a float convolution a split one, in place; it computes the same as before.

    Args:
        layer: a convolution or transposed convolution without groups; its class changes.
        parts: at least two, in the order of the input channels.

    Raises:
        ValueError: if the layer cannot be split, the parts have other names than split convolutions give theirs, or do
            not add up to its input channels; it stays as it is then.
    """
    target = SPLIT_LAYERS.get(type(layer))
    if target is None:
        known = ", ".join(cls.__name__ for cls in SPLIT_LAYERS)
        raise ValueError(f"cannot split a layer of class {type(layer).__name__}; expected one of {known}")
    groups, channels = cast(int, layer.groups), cast(int, layer.in_channels)
    if groups != 1:
        raise ValueError(
            f"cannot split a convolution with {groups} groups: each sees a part of the channels only"
        )
    check_part_names([part.name for part in parts], "parts")
    if len(parts) < 2 or sum(part.channels for part in parts) != channels:
        raise ValueError(f"the parts {describe(parts)} are not the layer's {channels} input channels")
    layer.__class__ = target
    found = cast(SplitLayer, layer)
    found.parts = tuple(parts)
    return found


class PartQuantizers(nn.Module):
    """One quantizer for each part of a tensor; the parts stand side by side along one axis.

    State: ``parts``, int32 (number of parts, 3), their kind, number and channels in their order (``parts.encode``), and
    the quantizers' own, under the parts' names (``skip_1`` for ``skip.1``). A network whose layer is split otherwise
    refuses to load it.

    Args:
        quantizers: by part.
        parts: in the order of the channels.
        axis: where the channels are; counted from the end, it holds with and without a batch axis.

    Attributes:
        taps: part → what is called with that part of every result, rounded; no state.
    """

    def __init__(self, quantizers: Mapping[str, Quantizer], parts: Sequence[Part], axis: int) -> None:
        super().__init__()
        device = next(iter(quantizers.values())).log2_scale.device
        self.register_buffer("parts", torch.tensor(encode(parts), dtype=torch.int32, device=device))
        self._parts = tuple(parts)
        self._axis = axis
        self.taps: dict[str, Callable[[Tensor], None]] = {}
        for part in parts:
            self.add_module(state_key(part.name), quantizers[part.name])

    def by_name(self) -> dict[str, Quantizer]:
        """Part → quantizer."""
        return {part.name: cast(Quantizer, getattr(self, state_key(part.name))) for part in self._parts}

    def forward(self, tensor: Tensor) -> Tensor:
        """The tensor, each part rounded by its own quantizer; the same shape."""
        quantizers = self.by_name()
        if not any(q.rounds or q.observer is not None for q in quantizers.values()):
            return tensor
        sizes = [part.channels for part in self._parts]
        if _at_once(tensor, quantizers.values()):
            limits = [(q.number_format.qmin, q.number_format.qmax) for q in quantizers.values()]
            scales, apart = [q.scale for q in quantizers.values()], [name in self.taps for name in quantizers]
            whole, *tapped = learned_fake_quantize_parts(tensor, scales, limits, sizes, self._axis, apart)
            wanted = [name for name in quantizers if name in self.taps]
        else:
            wanted = list(quantizers)
            tapped = [
                q(piece)
                for q, piece in zip(quantizers.values(), tensor.split(sizes, self._axis), strict=True)
            ]
            whole = torch.cat(tapped, self._axis)
        for name, piece in zip(wanted, tapped, strict=True):
            if name in self.taps:
                self.taps[name](piece)
        return whole

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        stored = state_dict.get(prefix + "parts")
        if stored is None and not any(key.startswith(prefix) for key in state_dict):
            return  # the state of a float network, as in Quantizer
        if stored is not None and stored.tolist() != encode(self._parts):
            args[-1].append(
                f"{prefix}parts: {_stored(stored)} there, {describe(self._parts)} here; split the same way"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The channels of each part."""
        return describe(self._parts)


def _at_once(tensor: Tensor, quantizers: Iterable[Quantizer]) -> bool:
    """Whether parts are rounded without being cut out and joined: in training on a CPU, each with one learned scale, and
    where nobody watches the quantizers.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return False
    return (
        torch.is_grad_enabled()
        and not recorded()
        and all(
            q.rounds_evenly and q.learns and not (q.channels or q._forward_hooks or q._forward_pre_hooks)
            for q in quantizers
        )
    )


def _stored(parts: Tensor) -> str:
    try:
        return describe(decode(parts.tolist()))
    except (TypeError, ValueError):
        return f"{parts.tolist()}, which are no parts,"
