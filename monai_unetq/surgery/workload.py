"""``workload``: what every part of every layer holds and computes, counted in one observed forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, cast

from torch import Tensor, nn

from ..parts import WHOLE
from .observe import example_for, observe
from .skips import applications

__all__ = ["Unit", "Workload", "workload"]


@dataclass(frozen=True)
class Unit:
    """One layer, or one part of a split one: what gets a weight format and an input format of its own.

    Attributes:
        layer: its name.
        part: ``input`` for a layer that is not split; else ``skip``, ``skip.1``, …, ``up``.
        weights: number of weights.
        inputs: values that go in, for one image, in all calls.
        outputs: values that come out; of a split layer all of them are counted with its first part.
        macs: multiply-accumulates for one image.
        channels: input channels; 0 where they are not known.
    """

    layer: str
    part: str
    weights: int
    inputs: int
    outputs: int
    macs: int
    channels: int = 0

    @property
    def name(self) -> str:
        """``layer``, or ``layer[part]``."""
        return self.layer if self.part == WHOLE else f"{self.layer}[{self.part}]"

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Unit:
        """What ``to_json`` wrote.

        Raises:
            KeyError: if a key is missing.
        """
        numbers = {key: int(document[key]) for key in ("weights", "inputs", "outputs", "macs")}
        channels = int(document.get("channels", 0))
        return cls(str(document["layer"]), str(document["part"]), **numbers, channels=channels)


@dataclass(frozen=True)
class Workload:
    """A network's units in the order in which they run, and what else it holds.

    Attributes:
        units: see ``Unit``; layers that do not run on the example are not among them.
        other_parameters: values of parameters that no weight format is for: biases, norms, embeddings.
        image: shape of the example, batch of one.
    """

    units: tuple[Unit, ...]
    other_parameters: int
    image: tuple[int, ...]


def workload(network: nn.Module, example: Tensor | None = None) -> Workload:
    """Count what a network holds and computes, for one image.

    Args:
        network: float or quantized, split or not.
        example: an input that it accepts, (N, C, spatial…); found out from its first convolution by default.

    Raises:
        ValueError: if the network fails on the example.
    """
    example = example_for(network) if example is None else example
    images = example.shape[0]
    trace = observe(network, example)
    modules = dict(network.named_modules())
    units: dict[tuple[str, str], Unit] = {}
    for call in trace.calls:
        module: Any = modules[call.layer]
        whole = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        parts = {part.name: part.channels for part in getattr(module, "parts", ())} or {WHOLE: whole}
        times, weights = applications(call, module), cast(Tensor, module.weight).numel()
        for number, (part, channels) in enumerate(parts.items()):
            # The channels of all parts are all input channels, so these divisions leave no rest.
            share = weights * channels // sum(parts.values())
            inputs = prod(call.input_shape) * channels // sum(parts.values()) // images
            outputs = 0 if number else prod(call.output_shape) // images
            known = units.get((call.layer, part), Unit(call.layer, part, share, 0, 0, 0))
            units[call.layer, part] = Unit(
                call.layer,
                part,
                share,
                known.inputs + inputs,
                known.outputs + outputs,
                known.macs + share * times // images,
                channels,
            )
    weighted = {id(cast(Any, modules[unit.layer]).weight) for unit in units.values()}
    others = sum(
        p.numel()
        for name, p in network.named_parameters()
        if id(p) not in weighted and not name.endswith("log2_scale")
    )
    return Workload(tuple(units.values()), others, (1, *example.shape[1:]))
