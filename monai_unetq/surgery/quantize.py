"""``quantize`` and ``dequantize``: put a plan's quantizers into a network in place, read them back, take them out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..formats import QFormat
from ..layers import (
    PAIRED_NORMS,
    QUANTIZED_LAYERS,
    PairedNorm,
    QuantizedLayer,
    SplitLayer,
    dequantize_layer,
    is_quantizable,
    quantize_layer,
    split_layer,
)
from ..parts import WHOLE, Part, decode, state_key
from ..plan import LayerPlan, QuantPlan
from ..quantizers import Quantizer
from .observe import NORMS, TRANSPOSED, Trace, example_for, observe, shares_weight
from .supervise import refuse_supervised

__all__ = [
    "dequantize",
    "pair_norms",
    "plan_of",
    "plan_of_state",
    "quantize",
    "quantized_layers",
    "set_quantizers",
]

logger = logging.getLogger(__name__)

_FLOAT_NORMS: dict[type[PairedNorm], type[nn.Module]] = {
    paired: plain for plain, paired in PAIRED_NORMS.items()
}


def quantize(network: nn.Module, plan: QuantPlan, example: Tensor | None = None) -> nn.Module:
    """Put the plan's quantizers into the network, in place.

    Layers keep their names and keys (a float checkpoint still loads). Signed activation formats become unsigned
    where one observed forward pass shows that the tensor cannot be negative. A batch norm that is the only
    consumer of a quantized layer is paired with it: its weight quantizer then sees the folded weight. Batch
    norms that cannot be folded (conv → ReLU → BN) are left as they are and logged.

    Weight scales are calibrated at once; activations of ``intN`` formats need ``calibrate``.

    Args:
        network: float; any ``nn.Module``.
        plan: which layer gets which formats.
        example: an input that the network accepts; found out from its first convolution by default.

    Returns:
        the network.

    Raises:
        ValueError: if the plan names a layer that is missing, of another class, quantized already, or did not
            run on the example, an input's format is for weights, a weight or a batch norm's statistic holds NaN, or
            the network has supervision heads; nothing is changed then.
    """
    refuse_supervised(network, "quantize")
    modules = dict(network.named_modules(remove_duplicate=False))
    for name in plan:
        if name not in modules:
            raise ValueError(f"plan: layer '{name}' is not in {type(network).__name__}")
        if isinstance(modules[name], QuantizedLayer):
            raise ValueError(f"plan: layer '{name}' is quantized already; call dequantize first")
        if not is_quantizable(modules[name]):
            raise ValueError(
                f"plan: layer '{name}' is a {type(modules[name]).__name__}, expected one of "
                + ", ".join(cls.__name__ for cls in QUANTIZED_LAYERS)
            )
    trace = observe(network, example_for(network) if example is None else example)
    ran, pairs = set(trace.layers()), trace.paired_norms()
    inputs = {}
    for name in plan:
        same = {other for other, module in modules.items() if module is modules[name]} & ran
        if not same:
            raise ValueError(f"plan: layer '{name}' did not run on the example, so its input is unknown")
        _check_parts(name, plan[name], modules[name])
        for other in plan:
            if modules[other] is modules[name] and plan[other] != plan[name]:
                raise ValueError(
                    f"plan: '{other}' and '{name}' are the same layer, but have different formats; plan one of them"
                )
        inputs[name] = _resolve(plan[name], trace, min(same), modules[name])
        _check_values(name, modules[name])
        output = plan[name].output
        for what, number_format in (
            *(("input", number_format) for number_format in inputs[name].values()),
            *([] if output is None else [("output", output)]),
        ):
            try:
                Quantizer(number_format)
            except ValueError as error:
                raise ValueError(f"plan: {what} of layer '{name}': {error}") from None
        if output is not None and (norm := next((pairs[other] for other in same & pairs.keys()), None)):
            raise ValueError(
                f"plan: layer '{name}' folds the batch norm '{norm}', so that its output is what comes behind it; leave "
                "'output' out of the plan"
            )
    for layer_name, norm_name in pairs.items():
        if modules[layer_name] in [modules[name] for name in plan]:
            _check_values(norm_name, modules[norm_name])
    for name, layer in plan.layers.items():
        if isinstance(modules[name], QuantizedLayer):  # registered under two names, planned under both
            continue
        if layer.channels is not None and not isinstance(modules[name], SplitLayer):
            split_layer(modules[name], [Part(*part) for part in layer.channels])
        quantize_layer(
            modules[name],
            layer.weights,
            inputs[name],
            per_channel=plan.granularity == "channel",
            power_of_two=plan.scale == "power-of-two",
            learned=plan.learned,
            rounds_bias=layer.bias == "accumulator",
            output=layer.output,
        )
    pair_norms(network, trace)
    return network


def _check_parts(name: str, layer: LayerPlan, module: nn.Module) -> None:
    """Raise a ValueError unless the layer has the parts that the plan has formats for, or can be split into them."""
    if isinstance(module, SplitLayer):
        has = tuple((part.name, part.channels) for part in module.parts)
        names = {part for part, _ in has}
        fits = layer.channels == has if layer.channels else set(layer.parts) in ({WHOLE}, names)
        if not fits:
            asked = _listed(layer.channels) if layer.channels else ", ".join(layer.parts)
            raise ValueError(
                f"plan: layer '{name}' has formats for the parts {asked}, but is split into {_listed(has)}"
            )
    elif layer.channels is not None:
        try:
            split_layer(copy.copy(module), [Part(*part) for part in layer.channels])
        except ValueError as error:
            raise ValueError(f"plan: layer '{name}': {error}") from None
    elif layer.parts != (WHOLE,):
        raise ValueError(
            f"plan: layer '{name}' has formats for the parts {', '.join(layer.parts)}, but is not split; call "
            "split(network, example) first"
        )


def _listed(parts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{part}={count}" for part, count in parts)


def _check_values(name: str, module: nn.Module) -> None:
    for key, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(f"'{name}.{key}' holds NaN or infinity: the network is not fit to be quantized")


def _resolve(layer: LayerPlan, trace: Trace, name: str, module: nn.Module) -> dict[str, QFormat]:
    """Signed formats become unsigned where the input cannot be negative; what is written unsigned stays so.

    Each part of a split convolution has its own sign: a skip behind ReLU keeps all its levels beside a signed part. The
    parts of a transposed one share theirs, as engines take one type with zero point 0 there.
    """
    channels = (
        module.parts if isinstance(module, SplitLayer) else [Part(*part) for part in layer.channels or ()]
    )
    formats = dict(layer.inputs)
    if channels and set(formats) == {WHOLE}:
        formats = {part.name: formats[WHOLE] for part in channels}
    if not trace.takes_negative(name):
        return {part: number_format.with_sign(False) for part, number_format in formats.items()}
    if not any(f.signed and not f.is_float for f in formats.values()):
        return formats
    negative = dict.fromkeys(formats, True)
    if not isinstance(module, TRANSPOSED):
        begin = 0
        for part in channels:
            negative[part.name] = trace.takes_negative(name, range(begin, begin + part.channels))
            begin += part.channels
    return {part: formats[part].with_sign(negative[part]) for part in formats}


def pair_norms(network: nn.Module, trace: Trace) -> dict[str, str]:
    """Pair every quantized layer with the batch norm that is its only consumer; layer name → norm name."""
    modules = dict(network.named_modules())
    pairs = trace.paired_norms()
    made = {}
    for layer_name, norm_name in pairs.items():
        layer, norm = modules[layer_name], modules[norm_name]
        if not isinstance(layer, QuantizedLayer):
            continue
        if type(norm) not in PAIRED_NORMS or norm.running_var is None:
            continue
        # weight_norm computes the weight anew in every forward: nothing to fold into. Nor a weight of two layers.
        if "weight" not in layer._parameters or shares_weight(network, layer):
            continue
        norm.__class__ = PAIRED_NORMS[type(norm)]
        assert isinstance(norm, PairedNorm)
        layer.pair_with(norm)
        layer.calibrate_weight()
        made[layer_name] = norm_name
    for name, module in modules.items():
        if isinstance(module, NORMS) and not isinstance(module, PairedNorm):
            logger.info("batch norm '%s' stays float: no convolution has it as its only consumer", name)
    return made


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    """Name → layer for every quantized layer, each under its first name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}


def set_quantizers(network: nn.Module, enabled: bool) -> nn.Module:
    """Switch every quantizer of the network on or off, in place; off, the network computes in float.

    Nothing of it is state: formats, scales and keys stay, and a network that was loaded has its quantizers on.

    Returns:
        the network.
    """
    for layer in quantized_layers(network).values():
        for quantizer in layer.quantizers:
            quantizer.enabled = enabled
    return network


def dequantize(network: nn.Module) -> nn.Module:
    """Take every quantizer out again, in place: the float network with the float weights it has now.

    Returns:
        the network.

    Raises:
        ValueError: if the network has supervision heads.
    """
    refuse_supervised(network, "dequantize")
    for module in network.modules():
        if isinstance(module, QuantizedLayer):
            dequantize_layer(module)
        elif isinstance(module, PairedNorm):
            module.__dict__.pop("frozen", None)
            module.__class__ = _FLOAT_NORMS[type(module)]  # type: ignore[assignment]
    return network


def plan_of(network: nn.Module) -> QuantPlan:
    """The plan that a quantized network carries in its quantizers' state, with signs resolved.

    Raises:
        ValueError: if nothing in the network is quantized.
    """
    layers = quantized_layers(network)
    if not layers:
        raise ValueError(f"{type(network).__name__} is not quantized: call quantize(network, plan) first")
    found = {
        name: LayerPlan(
            {part: quantizer.number_format for part, quantizer in layer.weight_quantizers.items()},
            {part: quantizer.number_format for part, quantizer in layer.input_quantizers.items()},
            "accumulator" if layer.rounds_bias else "float",
            tuple((part.name, part.channels) for part in layer.parts) or None,
            None if layer.output_quantizer is None else layer.output_quantizer.number_format,
        )
        for name, layer in layers.items()
    }
    quantizers = [quantizer for layer in layers.values() for quantizer in layer.quantizers]
    weights = [quantizer for layer in layers.values() for quantizer in layer.weight_quantizers.values()]
    # The scales of pow2 are powers of two in any plan.
    free = [q for q in quantizers if q.number_format.has_free_scale and q.number_format.kind != "pow2"]
    return QuantPlan(
        found,
        scale="power-of-two" if all(q.power_of_two for q in free) else "free",
        granularity="channel" if any(quantizer.channels for quantizer in weights) else "tensor",
        learned=any(q.learned for q in free),
    )


def plan_of_state(state: Mapping[str, Tensor]) -> QuantPlan | None:
    """The plan that a quantized network's state dict carries; None for the state of a float network.

    Whether scales were learned is no state; quantizers built from this plan keep them fixed.

    Raises:
        ValueError: if a quantizer's state is incomplete or holds no format; the message names the key.
    """
    layers, flags, per_channel = {}, [], False
    for name, keys, channels in _quantizers_in(state):
        formats: dict[str, dict[str, QFormat]] = {"weight": {}, "input": {}, "output": {}}
        for part, what, key in keys:
            code, scale = (state.get(f"{key}.{entry}") for entry in ("format_code", "log2_scale"))
            if code is None or scale is None or tuple(code.shape) != (5,):
                raise ValueError(f"state: '{key}' is incomplete, expected format_code (5,) and log2_scale")
            *number_format, power_of_two = code.tolist()
            try:
                found = formats[what][part] = QFormat.from_code(number_format)
            except ValueError as error:
                raise ValueError(f"state: '{key}.format_code': {error}") from None
            if found.has_free_scale and found.kind != "pow2":
                flags.append(bool(power_of_two))
            per_channel |= scale.dim() > 0
        output = formats["output"].get(WHOLE)
        layers[name] = LayerPlan(formats["weight"], formats["input"], channels=channels, output=output)
    if not layers:
        return None
    return QuantPlan(
        layers,
        scale="power-of-two" if all(flags) else "free",
        granularity="channel" if per_channel else "tensor",
    )


def _quantizers_in(
    state: Mapping[str, Tensor],
) -> Iterator[tuple[str, list[tuple[str, str, str]], tuple[tuple[str, int], ...] | None]]:
    """Quantized layers of a state: name; part, weight or input, and key of each quantizer; channels of the parts."""
    whole, split = ".weight_quantizer.format_code", ".weight_parts.parts"

    def output_of(name: str) -> list[tuple[str, str, str]]:
        quantizer = f"{name}.output_quantizer"
        return [(WHOLE, "output", quantizer)] if f"{quantizer}.format_code" in state else []

    for key, value in state.items():
        if key.endswith(whole):
            name = key.removesuffix(whole)
            keys = [(WHOLE, what, f"{name}.{what}_quantizer") for what in ("weight", "input")]
            yield name, keys + output_of(name), None
        elif key.endswith(split):
            name = key.removesuffix(split)
            try:
                parts = decode(value.tolist())
            except (TypeError, ValueError) as error:
                raise ValueError(f"state: '{key}': {error}") from None
            keys = [
                (part.name, what, f"{name}.{what}_parts.{state_key(part.name)}")
                for part in parts
                for what in ("weight", "input")
            ]
            yield name, keys + output_of(name), tuple((part.name, part.channels) for part in parts)
