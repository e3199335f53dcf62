"""Handlers that harden rounding step by step over the quantized epochs: of ternary activations, of power-of-two weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from ...layers import QuantizedLayer
from ...parts import WHOLE
from ...quantizers import Quantizer
from ...surgery import quantized_layers
from .processes import broadcast_state, unwrapped

__all__ = ["IncrementalFreezing", "TernaryAnnealing", "annealed_beta", "freeze_largest", "frozen_share"]

_SOFTEST, _HARDEST = 1.0, 8.0
"""β of the first and the last soft epoch. At 8 the output is within 2 % of a code 0.13 scales off the thresholds."""


class TernaryAnnealing:
    """Lets ternary activations begin soft and become hard, by the β of their ternary tanh.

    TernaryNet (Heinrich et al., IJCARS 2018) trains so: ``½·(tanh(β(2x - 1)) + tanh(β(2x + 1)))`` with a rising β,
    which tends to the ternary step. See ``annealed_beta`` for the values. Evaluation is hard at any time. Only
    signed ternary inputs have a β; a network without any is left alone.

    Attach it to the trainer; where it stands does not matter. There is no state: β follows from the epoch.

    Args:
        network: what is trained.
        epochs: length of the whole training.
        start_epoch: epochs in float, less than ``epochs``.
        hard_at: share of the quantized epochs after which activations are hard; below the share at which
            ``Calibration`` freezes the norms, so that these see the hard network's statistics.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(self, network: nn.Module, epochs: int, start_epoch: int = 0, hard_at: float = 0.5) -> None:
        _check_epochs("TernaryAnnealing", epochs, start_epoch)
        if not 0 <= hard_at <= 1:
            raise ValueError(f"TernaryAnnealing: hard_at is {hard_at}, expected a share in [0, 1]")
        self.network = network
        self.epochs = epochs
        self.start_epoch = start_epoch
        self.hard_at = hard_at

    def attach(self, engine: Engine) -> None:
        """Set β from now on at the start of every epoch of the engine, a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set β for the epoch that has just begun."""
        layers = quantized_layers(unwrapped(self.network)).values()
        inputs = [quantizer for layer in layers for quantizer in layer.input_quantizers.values()]
        ternary = [q for q in inputs if q.number_format.kind == "ternary" and q.number_format.signed]
        if not ternary:
            return
        epoch = engine.state.epoch
        beta = annealed_beta(epoch - self.start_epoch, self.epochs - self.start_epoch, self.hard_at)
        for quantizer in ternary:
            quantizer.beta = beta
        if epoch > self.start_epoch:
            softness = "hard" if beta is None else f"soft, β = {beta:.3g}"
            engine.logger.info(f"epoch {epoch}: ternary activations are {softness}")


def annealed_beta(epoch: int, epochs: int, hard_at: float = 0.5) -> float | None:
    """β of ternary activations in one quantized epoch: a geometric series from 1 to 8, then None, which is hard.

    The ends of the series are ours; TernaryNet's paper asks for a rising β. A single soft epoch has 8.

    Args:
        epoch: which quantized epoch, from 1; None is also the answer before.
        epochs: number of quantized epochs.
        hard_at: share of them that is soft, in [0, 1].
    """
    soft = math.floor(hard_at * epochs)
    if not 1 <= epoch <= soft:
        return None
    rise = (epoch - 1) / (soft - 1) if soft > 1 else 1.0
    return float(_SOFTEST * (_HARDEST / _SOFTEST) ** rise)


class IncrementalFreezing:
    """Rounds power-of-two weights little by little: the largest first, while the rest is trained on to make up for it.

    Incremental Network Quantization (Zhou et al., ICLR 2017, section 2.2): in each layer a share of the weights,
    those of the largest magnitude, is rounded and frozen, the others go on in float, until all are frozen. The shares
    follow each other in parts of equal length, the first one begins with the first quantized epoch, and all weights
    are frozen in the last part. What is frozen stays so, and the optimizer's momentum cannot move it: frozen weights
    are put back after every step. What is compared is the weight that its quantizer sees, with a paired batch norm
    folded. Biases and norms are trained on, also by the gain of the fold, so that a frozen weight can come to another
    code with its whole channel. Evaluation rounds all weights at any time. A network without such weights is left alone.

    Attach it to the trainer. It freezes after all other handlers of an epoch's start, ``Calibration`` among them. To
    resume, its state (the masks) belongs in the checkpoint. Under ``DistributedDataParallel`` every process chooses
    from the state of process 0.

    Args:
        network: what is trained.
        epochs: length of the whole training.
        start_epoch: epochs in float, less than ``epochs``.
        shares: of each layer's weights that are frozen, one after the other, rising to 1. The default is the paper's
            for VGG-16 and the ResNets (table 1; 0.3, 0.6, 0.8, 1 for AlexNet).

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        network: nn.Module,
        epochs: int,
        start_epoch: int = 0,
        shares: Sequence[float] = (0.5, 0.75, 0.875, 1.0),
    ) -> None:
        _check_epochs("IncrementalFreezing", epochs, start_epoch)
        steps = [0.0, *shares]
        if steps[-1] != 1 or any(low >= high for low, high in pairwise(steps)):
            raise ValueError(
                f"IncrementalFreezing: shares are {list(shares)}, expected rising shares above 0, the last of them 1"
            )
        self.network = network
        self.epochs = epochs
        self.start_epoch = start_epoch
        self.shares = tuple(shares)
        # A parameter, which of its values are frozen, and at what.
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint: weight → which of its values are frozen, bool, output channels first.

        A weight is called by its layer, and by its part where that is split: ``decoder.0.conv1[skip]``.
        """
        masks = {name: quantizer.frozen for name, quantizer, _ in _weights(self.network)}
        return {"masks": {name: mask for name, mask in masks.items() if mask is not None}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint.

        Raises:
            ValueError: if the masks are not those of this network's layers; nothing is changed then.
        """
        weights = {
            name: (quantizer, weight) for name, quantizer, weight in _weights(self.network, of_all=True)
        }
        masks = state.get("masks")
        if not isinstance(masks, Mapping):
            raise ValueError(
                "IncrementalFreezing: the checkpoint's state has no 'masks', expected what state_dict gives"
            )
        for name, mask in masks.items():
            if name not in weights:
                raise ValueError(f"IncrementalFreezing: the checkpoint has frozen weights of layer '{name}', which is not quantized here; resume with the same network")  # fmt: skip
            expected = tuple(weights[name][1].shape)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != expected:
                found = (
                    f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                )
                raise ValueError(f"IncrementalFreezing: the checkpoint's mask of layer '{name}' is {found}, expected torch.bool {expected}; resume with the same network")  # fmt: skip
        for name, (quantizer, weight) in weights.items():
            mask = masks.get(name)
            quantizer.frozen = None if mask is None else mask.to(weight.device)

    def attach(self, engine: Engine) -> None:
        """Freeze from now on at the start of the engine's epochs, and hold after its steps; the engine is a trainer."""
        engine.add_event_handler(Events.STARTED, self._freeze_from_now_on)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._hold)

    def _freeze_from_now_on(self, engine: Engine) -> None:
        # Attached when all other handlers are, to run after them: calibration may rescale the weights.
        if not engine.has_event_handler(self._freeze, Events.EPOCH_STARTED):
            engine.add_event_handler(Events.EPOCH_STARTED, self._freeze)

    @torch.no_grad()
    def _freeze(self, engine: Engine) -> None:
        self._held = []
        found = list(_weights(self.network))
        if not found:
            return
        epoch, epochs = engine.state.epoch - self.start_epoch, self.epochs - self.start_epoch
        share, before = (frozen_share(number, epochs, self.shares) for number in (epoch, epoch - 1))
        if share > 0:
            # Batch norms' statistics, and with them the folded weights, differ between processes by now.
            broadcast_state(unwrapped(self.network))
            found = list(_weights(self.network))
        for _, quantizer, weight in found:
            quantizer.frozen = (
                freeze_largest(weight, share, quantizer.frozen if before else None) if share else None
            )
        if share:
            self._held = [_held(layer) for layer in quantized_layers(unwrapped(self.network)).values()]
        if share > before:
            engine.logger.info(
                f"epoch {engine.state.epoch}: {share:.1%} of the power-of-two weights are frozen"
            )

    @torch.no_grad()
    def _hold(self, engine: Engine) -> None:
        for weight, mask, values in self._held:
            weight.copy_(torch.where(mask, values, weight))


def frozen_share(epoch: int, epochs: int, shares: Sequence[float]) -> float:
    """Share of the weights that is frozen in one quantized epoch: ``shares[⌈len(shares)·epoch/epochs⌉ - 1]``.

    Args:
        epoch: which quantized epoch, from 1; before it nothing is frozen, after ``epochs`` the last share.
        epochs: number of quantized epochs. Where there are fewer than shares, some shares are left out.
        shares: one after the other.
    """
    stage = -(-len(shares) * epoch // epochs)
    return 0.0 if stage < 1 else shares[min(stage, len(shares)) - 1]


def freeze_largest(weight: Tensor, share: float, frozen: Tensor | None = None) -> Tensor:
    """Which values of a weight are frozen: those that were, and the largest magnitudes until there are enough.

    Of equal magnitudes the first in memory order are taken, on every device and in every process.

    Args:
        weight: any shape.
        share: of its values that are to be frozen, rounded to a whole number of them.
        frozen: which ones are so far, bool, the weight's shape.

    Returns:
        bool, the weight's shape.
    """
    magnitude = weight.detach().abs().flatten()
    mask = torch.zeros_like(magnitude, dtype=torch.bool) if frozen is None else frozen.flatten().clone()
    missing = round(share * mask.numel()) - int(mask.sum())
    order = torch.sort(magnitude.masked_fill(mask, -1.0), descending=True, stable=True).indices
    mask[order[: max(missing, 0)]] = True
    return mask.view(weight.shape)


def _weights(network: nn.Module, of_all: bool = False) -> Iterator[tuple[str, Quantizer, Tensor]]:
    """Name, quantizer and weight as it sees it, of every power-of-two weight, or of all; parts of a layer apart."""
    for name, layer in quantized_layers(unwrapped(network)).items():
        weights = layer.folded_weights()
        for part, quantizer in layer.weight_quantizers.items():
            if of_all or quantizer.number_format.kind == "pow2":
                yield name if part == WHOLE else f"{name}[{part}]", quantizer, weights[part]


def _held(layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's weight, which of its values are frozen, and what they are."""
    pieces = layer.pieces(layer.output_major(layer.weight.detach()))
    masks = [
        torch.zeros_like(piece, dtype=torch.bool) if quantizer.frozen is None else quantizer.frozen
        for quantizer, piece in zip(layer.weight_quantizers.values(), pieces.values(), strict=True)
    ]
    return layer.weight, layer.from_output_major(torch.cat(masks, 1)), layer.weight.detach().clone()


def _check_epochs(handler: str, epochs: int, start_epoch: int) -> None:
    if not 0 <= start_epoch < epochs:
        raise ValueError(
            f"{handler}: start_epoch is {start_epoch} of {epochs} epochs, expected at least one quantized epoch after it"
        )
