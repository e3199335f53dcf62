"""``attach_supervision``, ``attach_teacher`` and ``strip``: heads on the skip connections, and a teacher beside the
network, for the time of training, and off again.

The heads read what the decoder reads: the quantized skip feature, tapped by hooks where the layer behind the
concatenation has rounded it. A teacher sees what the network sees. In training mode the network then returns
``SupervisedOutput``; in evaluation it runs as if there were neither.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..layers import PartQuantizers, QuantizedLayer, SupervisionHead
from ..parts import kind_of
from .observe import example_for
from .skips import SkipConvolution, find_skips

__all__ = [
    "SkipSupervision",
    "SupervisedOutput",
    "attach_supervision",
    "attach_teacher",
    "inference_state",
    "refuse_supervised",
    "strip",
]

NAME = "skip_supervision"
"""What the network calls the heads: its attribute, and the beginning of their keys in the state dict."""


class SupervisedOutput(NamedTuple):
    """What a supervised network returns in training.

    Attributes:
        prediction: what it returned before: a tensor, or deep supervision's list.
        skips: logits of the heads, (N, num_classes, spatial…) at each skip's resolution, in the order of the heads.
        teacher: what the teacher returned, as ``prediction``; None without one, and where no gradients are recorded.
    """

    prediction: Any
    skips: tuple[Tensor, ...]
    teacher: Any = None


@dataclass(frozen=True)
class Reading:
    """Where one head reads.

    Attributes:
        layer: the layer behind the concatenation.
        part: its part, ``skip``, ``skip.1``, ….
        source: the layer that made the skip.
        start: first channel of the part in the concatenation.
        channels: how many.
        resolution: spatial shape of the feature for the example.
    """

    layer: str
    part: str
    source: str
    start: int
    channels: int
    resolution: tuple[int, ...]


class SkipSupervision(nn.Module):
    """The heads of one network, what they read, its teacher, and what was read in the pass that is running.

    Args:
        readings: one for each head.
        num_classes: channels of the logits.
        kernel_size: of the heads' convolutions.
        device: of the heads.
        teacher: is asked in training; neither its parameters nor its state are the network's.
    """

    def __init__(
        self,
        readings: Sequence[Reading] = (),
        num_classes: int = 1,
        kernel_size: int = 3,
        device: torch.device | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.readings = tuple(readings)
        self.heads = nn.ModuleList(
            SupervisionHead(r.channels, num_classes, len(r.resolution), kernel_size, device) for r in readings
        )
        self._teacher = () if teacher is None else (teacher,)  # in a tuple it is no module of this one
        self._features: dict[int, Tensor] | None = None  # while a pass in training runs
        self._taught: Any = None
        self._learns = False  # whether that pass records gradients

    def begin(self, network: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook in front of the network: features, and the teacher's answer, are wanted in training only.

        Raises:
            RuntimeError: if the network is one of the copies that ``DataParallel`` trains.
        """
        if network.training and getattr(network, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel runs copies of the network at the same time, which share the hooks of the heads and of "
                "the teacher, so one would get another's features; use DistributedDataParallel"
            )
        self._features = {} if network.training else None
        self._learns = torch.is_grad_enabled()
        self._taught = None
        if self._teacher and network.training and self._learns:
            with torch.no_grad():
                self._taught = self._teacher[0](*args, **kwargs)

    def end(self, network: nn.Module, args: Any, output: Any) -> SupervisedOutput | None:
        """Hook behind the network: the heads' logits and the teacher's answer beside its output.

        Raises:
            RuntimeError: if a skip was not read, or no gradient reaches any of them.
        """
        features, self._features = self._features, None
        taught, self._taught = self._taught, None
        if features is None:
            return None
        missing = [r for number, r in enumerate(self.readings) if number not in features]
        if missing:
            raise RuntimeError(
                f"'{missing[0].layer}' did not read '{missing[0].part}' in this pass, so its skip cannot be supervised; "
                "strip the network and attach the heads to it as it is now; where torch.compile has run it without "
                "heads, call torch._dynamo.reset()"
            )
        if features and torch.is_grad_enabled() and not any(f.requires_grad for f in features.values()):
            raise RuntimeError(
                "no gradient reaches the skip connections: what makes them is frozen, so strip the network"
            )
        logits = tuple(head(features[number]) for number, head in enumerate(self.heads))
        return SupervisedOutput(output, logits, taught)

    def take(self, number: int, feature: Tensor) -> None:
        """Keep a head's feature, the first one of a pass; nothing outside of a pass (when it is computed once more).

        Raises:
            RuntimeError: if it is read under reentrant checkpointing, or has no batch axis.
        """
        if self._features is None or number in self._features:
            return
        reading = self.readings[number]
        if self._learns and not torch.is_grad_enabled():
            raise RuntimeError(
                f"'{reading.layer}' runs without gradients, so none reaches its skip: a checkpointed network needs "
                "torch.utils.checkpoint(…, use_reentrant=False)"
            )
        if feature.dim() != len(reading.resolution) + 2:
            raise RuntimeError(
                f"'{reading.layer}' reads '{reading.part}' of shape {tuple(feature.shape)}, without a batch axis, so "
                "its skip cannot be supervised; strip the network"
            )
        self._features[number] = feature

    def __getstate__(self) -> dict[str, Any]:
        # A pass that was broken off leaves features behind, which can be neither copied nor pickled.
        return {**self.__dict__, "_features": None, "_taught": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SkipSupervision:
        for teacher in self._teacher:  # goes to the network's device and type with it
            teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


class _Tap:
    """Hooks that hand over the channels of a concatenation: of a quantizer's result, or of a float layer's input."""

    def __init__(self, supervision: SkipSupervision, numbers: Sequence[int]) -> None:
        self.supervision = supervision
        self.numbers = tuple(numbers)

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of a float layer."""
        self._take(args[0] if args else kwargs["input"])

    def behind(self, quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Behind a quantized layer's input quantizer."""
        self._take(output)

    def part(self, feature: Tensor) -> None:
        """One part by itself, which spares cutting it out of the concatenation."""
        for number in self.numbers:
            self.supervision.take(number, feature)

    def _take(self, tensor: Tensor) -> None:
        for number in self.numbers:
            reading = self.supervision.readings[number]
            axis = -1 - len(reading.resolution)
            self.supervision.take(number, tensor.narrow(axis, reading.start, reading.channels))


def attach_supervision(
    network: nn.Module,
    example: Tensor | None = None,
    num_classes: int = 1,
    kernel_size: int = 3,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """Put a head, a convolution, on each skip connection of a network, in place, for the time of training.

    Which tensors are skips is observed (``find_skips``), so it works on any network whose decoder concatenates. A skip
    that several layers read gets one head; the image itself is no skip to learn from. In training mode the network
    returns ``SupervisedOutput(prediction, skips)``, which ``training.SkipSupervisionLoss`` takes; in evaluation it
    returns what it always did. The heads are parameters of the network (``skip_supervision.…``).

    Args:
        network: quantized, or float: the features are what its decoder's layers see, rounded where these round.
        example: an input that it accepts; found out from its first convolution by default.
        num_classes: channels of each head: 1 for two classes, otherwise what the segmentation has.
        kernel_size: of the heads, odd.
        teacher: see ``attach_teacher``; None for none.

    Returns:
        the network.

    Raises:
        ValueError: if it has heads already, there is no skip to supervise, it is an ``nn.Sequential`` or wrapped for
            several processes or compilation, an argument is out of its range, or it fails on the example; nothing is
            changed then.

    Example:
        >>> attach_supervision(quantize(split(network), plan), num_classes=1)
        >>> loss = SkipSupervisionLoss(soft_dice_loss())
        >>> loss(network.train()(image), label).backward()
        >>> strip(network)
    """
    _check(network, "attach_supervision")
    if num_classes < 1:
        raise ValueError(f"attach_supervision: num_classes is {num_classes}, expected at least 1")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"attach_supervision: kernel_size is {kernel_size}, expected an odd number")
    example = example_for(network) if example is None else example
    readings = _readings(find_skips(network, example))
    if not readings:
        raise ValueError(
            f"{type(network).__name__} has no concatenation of a skip and an upsampled path, so there is nothing to "
            "supervise; find_skips(network) says what there is"
        )
    supervision = SkipSupervision(readings, num_classes, kernel_size, example.device, _frozen(teacher))
    modules = dict(network.named_modules())
    for layer in dict.fromkeys(reading.layer for reading in readings):
        tap = _Tap(supervision, [n for n, reading in enumerate(readings) if reading.layer == layer])
        module = modules[layer]
        if isinstance(module, QuantizedLayer):
            for number in tap.numbers if module.parts else ():
                reading = readings[number]
                if module.part_channels.get(reading.part) == reading.channels:  # a plan may cut it otherwise
                    module.input_parts.taps[reading.part] = _Tap(supervision, [number]).part
            # Of a split layer, too: its parts' quantizers do not run while none of them rounds.
            place = module.input_parts if module.parts else module.input_quantizer
            place.register_forward_hook(tap.behind)
        else:
            module.register_forward_pre_hook(tap.before, with_kwargs=True)
    return _add(network, supervision)


def attach_teacher(network: nn.Module, teacher: nn.Module) -> nn.Module:
    """Put a teacher beside a network, in place, for the time of training: usually the float network that it was.

    In training, where gradients are recorded, the teacher gets what the network gets, and the network returns
    ``SupervisedOutput(prediction, (), teacher)``; the loss is ``training.SkipSupervisionLoss(…, distillation=…)``. With
    heads, too: ``attach_supervision(…, teacher=…)``.

    Args:
        network: as for ``attach_supervision``, but it needs no skips.
        teacher: takes the same inputs and gives logits of the same shape. A copy of it is kept, in evaluation mode,
            without heads of its own; it is no part of the network's modules, parameters and state.

    Returns:
        the network.

    Raises:
        ValueError: if the network has heads or a teacher already, or is wrapped for several processes or compilation.

    Example:
        >>> teacher = copy.deepcopy(network)
        >>> attach_teacher(quantize(network, plan), teacher)
        >>> loss = SkipSupervisionLoss(soft_dice_loss(), distillation=1.0)
    """
    _check(network, "attach_teacher")
    return _add(network, SkipSupervision(teacher=_frozen(teacher)))


def _check(network: nn.Module, verb: str) -> None:
    """Raises ValueError where hooks, or parameters that come now, would do something else than they should."""
    refuse_supervised(network, verb)
    kind = type(network).__name__
    if isinstance(network, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            f"{verb}: a {kind} runs every module that it holds, so it would run the heads; put it into a module of its "
            "own"
        )
    if isinstance(network, (DistributedDataParallel, DataParallel)) or hasattr(network, "_orig_mod"):
        raise ValueError(
            f"{verb}: the network is inside a {kind}, which knows nothing of parameters that come later; attach the "
            "heads to the network itself, then wrap it"
        )
    if hasattr(network, NAME):
        raise ValueError(
            f"{verb}: {kind} has an attribute '{NAME}' of its own, which is what the heads are called; rename it"
        )


def _frozen(teacher: nn.Module | None) -> nn.Module | None:
    return None if teacher is None else strip(copy.deepcopy(teacher)).eval().requires_grad_(False)


def _add(network: nn.Module, supervision: SkipSupervision) -> nn.Module:
    network.add_module(NAME, supervision)
    network.register_forward_pre_hook(supervision.begin, with_kwargs=True)
    network.register_forward_hook(supervision.end)
    supervision.train(network.training)
    return network


def _readings(found: Sequence[SkipConvolution]) -> list[Reading]:
    """What heads read: the first reader of each skip."""
    readings: dict[tuple[str, int, tuple[int, ...]], Reading] = {}
    for entry in found:
        start = 0
        for part in entry.parts:
            key = (part.source, part.channels, entry.resolution)
            if not entry.reason and kind_of(part.name) == "skip" and part.source and key not in readings:
                readings[key] = Reading(
                    entry.layer, part.name, part.source, start, part.channels, entry.resolution
                )
            start += part.channels
    return list(readings.values())


def strip(network: nn.Module) -> nn.Module:
    """Take the heads off again, in place: no module, no hook and no key of them is left.

    Args:
        network: what ``attach_supervision`` was called with, or what holds it, such as ``DistributedDataParallel``.

    Returns:
        the network, which may have had none.
    """
    for name, supervision in list(_supervisions(network).items()):
        for module in network.modules():
            for hooks, with_kwargs in (
                (module._forward_hooks, module._forward_hooks_with_kwargs),
                (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            ):
                for key, hook in list(hooks.items()):
                    if _belongs(hook, supervision):
                        del hooks[key]
                        with_kwargs.pop(key, None)
            if isinstance(module, PartQuantizers):
                module.taps = {
                    part: tap for part, tap in module.taps.items() if not _belongs(tap, supervision)
                }
        holder = network.get_submodule(name.rpartition(".")[0])
        if NAME in holder._modules:  # no longer where it is registered under several names
            delattr(holder, NAME)
    return network


def _belongs(hook: Callable[..., Any], supervision: SkipSupervision) -> bool:
    """Whether it is a method of these heads, or of one of their taps."""
    owner = getattr(hook, "__self__", None)
    return (owner.supervision if isinstance(owner, _Tap) else owner) is supervision


def inference_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's state dict without the heads: that of the stripped network."""
    heads = tuple(f"{name}." for name in _supervisions(network))
    return {key: value for key, value in network.state_dict().items() if not key.startswith(heads)}


def refuse_supervised(network: nn.Module, verb: str) -> None:
    """Raise a ValueError if the network has heads or a teacher: what is done to its layers would leave heads without a
    feature.
    """
    if _supervisions(network):
        raise ValueError(f"{verb}: the network has supervision heads or a teacher; call strip(network) first")


def _supervisions(network: nn.Module) -> dict[str, SkipSupervision]:
    """Name → heads, under all their names: of the network itself, or of what it wraps."""
    modules = network.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, SkipSupervision)}
