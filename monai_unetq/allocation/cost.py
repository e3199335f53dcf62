"""Cost of number formats: bytes of weights and activations at their true bit widths, bit operations, energy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from torch import Tensor, nn

from ..formats import QFormat
from ..parts import WHOLE
from ..plan import QuantPlan
from ..surgery.observe import observe
from ..surgery.quantize import quantized_layers
from ..surgery.workload import Unit

__all__ = ["Cost", "LayerCost", "NetworkCost", "cost_of", "layer_costs", "mac_energy", "weight_bits"]

FLOAT = QFormat("float")
ATTOJOULES = 10**6
"""In a picojoule."""


@dataclass(frozen=True)
class Cost:
    """Bytes for one image.

    Attributes:
        weight_bytes: all parameters: rounded weights at their formats' bits, ternary ones five in a byte as ``pack``
            stores them (1.6 bits, the last byte of each tensor whole), the rest (biases, norms) as float32.
        activation_bytes: the inputs of all convolutions, transposed convolutions and linear layers at their
            formats' bits (ternary: 2, they are not packed), float ones as float32.
    """

    weight_bytes: int
    activation_bytes: int


def cost_of(network: nn.Module, example: Tensor) -> Cost:
    """What a network's weights and activations take, in bytes.

    Args:
        network: float or quantized.
        example: (1, C, spatial…), the image whose activations are counted.
    """
    quantized = quantized_layers(network)
    bits = sum(p.numel() for p in network.parameters() if p.dim() > 0) * 32
    for layer in quantized.values():
        pieces = layer.weight_pieces()
        for part, quantizer in layer.weight_quantizers.items():
            count = pieces[part].numel()
            bits += weight_bits(quantizer.number_format, count) - 32 * count
        for quantizer in layer.quantizers:  # learned scales are formats, not weights
            bits -= 32 * sum(p.numel() for p in quantizer.parameters() if p.dim() > 0)
    activation_bits = 0
    for call in observe(network, example).calls:
        values, found = prod(call.input_shape), quantized.get(call.layer)
        if found is None:
            activation_bits += 32 * values
            continue
        channels = found.part_channels
        for part, quantizer in found.input_quantizers.items():
            share = values * channels[part] // sum(channels.values())
            activation_bits += share * quantizer.number_format.bits
    return Cost(_in_bytes(bits), _in_bytes(activation_bits))


@dataclass(frozen=True)
class LayerCost:
    """One layer, or one part of a split one, for one image.

    Attributes:
        name: ``layer``, or ``layer[part]``.
        weight: the weight's format.
        input: the input's format.
        parameters: number of weights; biases are counted with the network's other parameters.
        macs: multiply-accumulates.
        weight_bits: of all its weights, ternary ones five in a byte.
        weight_bytes: the same in whole bytes, as each tensor is packed.
        activation_bits: of its input, in all calls.
        activation_bytes: the same in whole bytes.
        held_bytes: the layer's inputs and outputs, of all its parts, which are in memory at once. Outputs are
            counted at the width at which the layer that runs next reads its input, those of the last layer as
            float32: what a device holds that rounds a result before it writes it.
        bops: bit operations, MACs × bits of the weight × bits of the input; float tensors have 32 (Baskin et al.,
            UNIQ, ACM TOCS 2021, section 4, without their term for the accumulator, as qonnx counts them).
        energy: of the MACs, in picojoules; see ``mac_energy``.
    """

    name: str
    weight: str
    input: str
    parameters: int
    macs: int
    weight_bits: int
    weight_bytes: int
    activation_bits: int
    activation_bytes: int
    held_bytes: int
    bops: int
    energy: float


@dataclass(frozen=True)
class NetworkCost:
    """All layers, and what is left.

    Attributes:
        layers: in the order in which they run.
        other_parameters: biases, norms and what else stays float32.
    """

    layers: tuple[LayerCost, ...]
    other_parameters: int

    @cached_property
    def parameters(self) -> int:
        """Weights and everything else."""
        return sum(layer.parameters for layer in self.layers) + self.other_parameters

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def weight_bytes(self) -> int:
        """Weights as a packed file holds them, without other parameters."""
        return sum(layer.weight_bytes for layer in self.layers)

    @cached_property
    def size_bytes(self) -> int:
        """Weights, and all other parameters as float32: what the budget ``size`` limits."""
        return self.weight_bytes + 4 * self.other_parameters

    @cached_property
    def activation_bytes(self) -> int:
        """Inputs of all layers."""
        return _in_bytes(sum(layer.activation_bits for layer in self.layers))

    @cached_property
    def peak_bytes(self) -> int:
        """Most of ``held_bytes``; skip connections that wait for their decoder are not in it."""
        return max((layer.held_bytes for layer in self.layers), default=0)

    @cached_property
    def bops(self) -> int:
        """Bit operations of all layers."""
        return sum(layer.bops for layer in self.layers)

    @cached_property
    def energy(self) -> float:
        """Of all layers' MACs, in picojoules."""
        return math.fsum(layer.energy for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """As a JSON document, with the totals."""
        totals = (
            "parameters", "macs", "weight_bytes", "size_bytes", "activation_bytes", "peak_bytes", "bops", "energy",
        )  # fmt: skip
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "other_parameters": self.other_parameters,
            "total": {name: getattr(self, name) for name in totals},
        }

    @classmethod
    def from_json(cls, document: Any, source: str = "cost") -> NetworkCost:
        """What ``to_json`` wrote; totals are counted anew.

        Raises:
            ValueError: if it is none; the message names the source and the layer.
        """
        names = [entry.name for entry in fields(LayerCost)]
        try:
            layers, others = document["layers"], int(document["other_parameters"])
            for number, layer in enumerate(layers):
                if sorted(layer) != sorted(names):
                    raise ValueError(
                        f"{source}: layers[{number}] has {sorted(layer)}, expected {sorted(names)}"
                    )
            return cls(tuple(LayerCost(**layer) for layer in layers), others)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{source}: {type(error).__name__} {error}: not what 'unetq cost' wrote"
            ) from None


def layer_costs(
    units: Sequence[Unit], plan: QuantPlan | Mapping[str, tuple[int, int]], other_parameters: int
) -> NetworkCost:
    """What a network costs under a plan, without running it.

    Args:
        units: of ``workload(network, example)``, or of sensitivities.
        plan: formats by layer; or widths of weight and input by unit name, where 32 is float. What is not named is
            float.
        other_parameters: values of parameters that stay float32.

    Raises:
        ValueError: if the plan names a layer or a part that the units do not have.
    """
    formats = _formats_of_plan(units, plan) if isinstance(plan, QuantPlan) else _formats_of_bits(units, plan)
    layers: dict[str, list[Unit]] = {}
    for unit in units:
        layers.setdefault(unit.layer, []).append(unit)
    reads = {name: max(formats[unit.name][1].bits for unit in parts) for name, parts in layers.items()}
    held, order = {}, list(layers)
    for name, follower in zip(order, [*order[1:], ""], strict=True):
        inputs = sum(unit.inputs * formats[unit.name][1].bits for unit in layers[name])
        outputs = sum(unit.outputs for unit in layers[name]) * reads.get(follower, FLOAT.bits)
        held[name] = _in_bytes(inputs + outputs)
    return NetworkCost(
        tuple(_layer_cost(unit, *formats[unit.name], held[unit.layer]) for unit in units), other_parameters
    )


def _formats_of_plan(units: Sequence[Unit], plan: QuantPlan) -> dict[str, tuple[QFormat, QFormat]]:
    known = {unit.layer for unit in units}
    for name in plan:
        if name not in known:
            raise ValueError(f"plan: layer '{name}' is none of those that run: {', '.join(sorted(known))}")
        has = [unit.part for unit in units if unit.layer == name]
        if plan[name].parts != (WHOLE,) and sorted(plan[name].parts) != sorted(has):
            hint = "; call split(network, example) first" if has == [WHOLE] else ""
            raise ValueError(
                f"plan: layer '{name}' has formats for the parts {', '.join(plan[name].parts)}, but the network's "
                f"layer has {', '.join(has)}{hint}"
            )
    return {u.name: (plan[u.layer].weight_of(u.part), plan[u.layer].input_of(u.part)) for u in units}


def _formats_of_bits(
    units: Sequence[Unit], bits: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[QFormat, QFormat]]:
    known = {unit.name for unit in units}
    for name in bits:
        if name not in known:
            raise ValueError(f"bits: '{name}' is none of those that run: {', '.join(sorted(known))}")
    both = {name: (of_width(weight), of_width(input)) for name, (weight, input) in bits.items()}
    return {unit.name: both.get(unit.name, (FLOAT, FLOAT)) for unit in units}


def _layer_cost(unit: Unit, weight: QFormat, input: QFormat, held: int) -> LayerCost:
    stored, read = weight_bits(weight, unit.weights), unit.inputs * input.bits
    return LayerCost(
        unit.name, str(weight), str(input), unit.weights, unit.macs, stored, _in_bytes(stored), read,
        _in_bytes(read), held, unit.macs * weight.bits * input.bits,
        unit.macs * mac_energy(weight, input) / ATTOJOULES,
    )  # fmt: skip


@lru_cache(maxsize=64)
def of_width(bits: int) -> QFormat:
    """The format that allocation gives a tensor for a width: ``intB``; 32 is float.

    Raises:
        ValueError: if there is no such format.
    """
    return FLOAT if bits == FLOAT.bits else QFormat(f"int{bits}")


def weight_bits(number_format: QFormat, count: int) -> int:
    """What ``count`` weights of one tensor take when packed; ternary ones stand five in a byte."""
    in_base_3 = number_format.kind == "ternary" and number_format.signed
    return 8 * -(-count // 5) if in_base_3 else number_format.bits * count


@lru_cache(maxsize=1024)
def mac_energy(weight: QFormat, input: QFormat) -> int:
    """Energy of one multiply-accumulate in attojoules (10⁻⁶ pJ), after Horowitz's table for 45 nm.

    The table (M. Horowitz, Computing's Energy Problem, ISSCC 2014, figure 1.1.9) has, in picojoules, integers of
    8 bits: multiply 0.2, add 0.03; of 32 bits: 3.1 and 0.1; float32: 3.7 and 0.9. In between:

    - A product of b_w × b_a bits takes as many cells as a multiplier has, so its energy is a power of b_w·b_a through
      the table's two points: 0.2 · (b_w·b_a / 64)^0.9886, where 0.9886 = ln(3.1/0.2) / ln(1024/64).
    - A sum is as wide as its accumulator, b_w + b_a + 16 bits, which holds 2^16 products: 32 bits for 8 × 8. Its
      energy is on the line through the table's two points: 0.03 + (b - 8) · 0.07/24.

    So int8 × int8 takes 0.2 + 0.1 pJ. Where weight or input is float, the MAC is one in float32: 4.6 pJ. Memory is not
    in it.
    """
    if weight.is_float or input.is_float:
        return round((3.7 + 0.9) * ATTOJOULES)
    exponent = math.log(3.1 / 0.2) / math.log(1024 / 64)
    multiply = 0.2 * (weight.bits * input.bits / 64) ** exponent
    add = 0.03 + (weight.bits + input.bits + 16 - 8) * (0.1 - 0.03) / (32 - 8)
    return round((multiply + add) * ATTOJOULES)


def _in_bytes(bits: int) -> int:
    return -(-bits // 8)
