"""The packed checkpoint: a quantized network in one safetensors file, weights at their true bit width.

Every rounded weight is one uint8 tensor, a stream of integer codes, under its state-dict key; all other state (biases,
scales, norms that could not be folded) stands beside it as it is. What is registered under several names is there
once. The file's metadata carries one JSON document: plan, network, how ternary weights are coded, what was folded,
versions, and a checksum over all of it. Nothing in it is executed.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..coding import TernaryCoding, check_coding, encode, is_ternary
from ..layers import (
    PAIRED_NORMS,
    QUANTIZED_LAYERS,
    PairedNorm,
    QuantizedLayer,
    SplitLayer,
    quantize_layer,
    split_layer,
)
from ..parts import WHOLE, Part
from ..plan import LayerPlan, QuantPlan
from ..quantizers import Quantizer
from ..runtime.packed import (
    KEY,
    PLAIN,
    WITH_CODINGS,
    WITH_PARTS,
    PackedFile,
    StoredTensor,
    checksum,
    layer_and_part,
    part_key,
    read,
)
from ..surgery import find_skips, plan_of
from ..surgery.fold import FoldedNorm, fold_pairs, take_norm_out
from ..surgery.quantize import quantized_layers
from ..surgery.supervise import refuse_supervised

__all__ = ["inspect_packed", "installed_version", "pack", "packed_shapes", "unpack"]

_WITH_BIAS: Any = (*QUANTIZED_LAYERS, QuantizedLayer)


def pack(
    network: nn.Module,
    path: str | Path,
    ternary: TernaryCoding = "base3",
    example: Tensor | None = None,
) -> Path:
    """Write a quantized network as a packed checkpoint, atomically.

    The network is left as it is; batch norms that are paired with a convolution are folded in the file. Each part of
    a split convolution's weight is stored on its own, and the file says what ``find_skips`` found.

    Args:
        network: quantized (and trained or calibrated).
        path: the file to write; its folder must exist.
        ternary: how ternary weights are stored: ``"base3"``, five digits in a byte (1.6 bits each), or ``"2bit"``,
            larger, for a reader that wants each code at a bit position of its own.
        example: an input that a split network accepts, for the resolutions and MACs that the file tells; found out
            from its first convolution by default, and where the network refuses that, the file tells none.

    Returns:
        the path.

    Raises:
        ValueError: if the network is not quantized, its state holds NaN or infinity, there is no such coding, it
            fails on the example given, or has supervision heads.
        OSError: if the file cannot be written; what was there before is kept.
    """
    path = Path(path)
    check_coding(ternary)
    refuse_supervised(network, "pack")
    plan = plan_of(network)
    for key, value in network.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(f"'{key}' holds NaN or infinity: the network is not fit to be packed")
    _check_shared(quantized_layers(network))
    paired = any(isinstance(module, PairedNorm) for module in network.modules())
    baked = fold_pairs(copy.deepcopy(network).cpu()) if paired else network
    layers = quantized_layers(baked)
    state = {key: value.detach().cpu() for key, value in _state(baked).items()}
    tensors: dict[str, Tensor] = {}
    packed: dict[str, list[int]] = {}
    codings: dict[str, str] = {}
    for key, value in state.items():
        layer = layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if layer is None or all(q.number_format.is_float for q in layer.weight_quantizers.values()):
            tensors[key] = value.contiguous().clone()
            continue
        pieces = layer.pieces(layer.output_major(value))
        for part, quantizer in layer.weight_quantizers.items():
            name = part_key(key, part)
            if quantizer.number_format.is_float:
                tensors[name] = pieces[part].contiguous().clone()
                continue
            tensors[name] = torch.from_numpy(_packed_weight(quantizer, pieces[part], ternary, name))
            packed[name] = list(value.shape if part == WHOLE else pieces[part].shape)
            if is_ternary(quantizer.number_format):
                codings[name] = ternary
    split = any(layer.parts for layer in layers.values())
    document: dict[str, Any] = {
        "version": WITH_PARTS if split else WITH_CODINGS if codings else PLAIN,
        "network": f"{type(network).__module__}.{type(network).__qualname__}",
        "plan": plan.to_json(),
        "packed": packed,
        **({"codings": codings} if codings or split else {}),
        **({"skips": _skips(baked, example)} if split else {}),
        "folded": sorted(name for name, module in baked.named_modules() if isinstance(module, FoldedNorm)),
        "functions": _functions(baked),
        "versions": {name: installed_version(name) for name in ("monai-unetq", "torch")},
    }
    document["checksum"] = _checksum(document, tensors)
    data = save(tensors, {KEY: json.dumps(document)})
    scratch = path.with_name(path.name + ".part")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def unpack(path: str | Path, network: nn.Module) -> nn.Module:
    """Load a packed checkpoint into a network of the same architecture, in place.

    Args:
        path: a file written by ``pack``.
        network: float, of the class and arguments that the packed one had; its weights are replaced.

    Returns:
        the network, quantized and folded, in evaluation mode: its outputs are those of the packed one, bit for
        bit (on one device, and with weights in the same memory format).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, corrupted or foreign, or the network is another one; the network
            is not changed then.
    """
    path = Path(path)
    file, tensors = _read(path)
    document, plan = file.document, file.plan
    if any(isinstance(m, QuantizedLayer) for m in network.modules()):
        raise ValueError(
            f"{path} cannot be unpacked into a quantized {type(network).__name__}: give a float network of the "
            "same architecture"
        )
    packed_type, found_type = document["network"], f"{type(network).__module__}.{type(network).__qualname__}"
    wrong = f"{path} holds a {packed_type.rpartition('.')[2]} that does not fit this {found_type.rpartition('.')[2]}"
    trial = copy.deepcopy(network)  # so that a file that does not fit leaves the network as it was
    _prepare(trial, plan, document["folded"], tensors, wrong)
    codes = {key: file.codes(key) for key in document["packed"]}
    _load(trial, tensors, codes, document["packed"], wrong)
    found, expected = _functions(network), document["functions"]
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{wrong}: '{name}' is {found.get(name, 'missing')}, expected {expected.get(name, 'no such module')}"
            )
    _prepare(network, plan, document["folded"], tensors, wrong)
    network.load_state_dict(trial.state_dict())
    return network.eval()


def inspect_packed(path: str | Path) -> dict[str, Any]:
    """What a packed checkpoint says and holds, counted on the file as it is read back.

    Args:
        path: a file written by ``pack``.

    Returns:
        a JSON document: network, versions, plan, ``file_bytes``, ``weight_bytes`` (packed codes),
        ``float_bytes`` (what the same weights take in float32), and for each layer its formats, number of
        weights, bytes, bits for each weight, number of distinct codes and how often each occurs; parts of a split
        layer apart, as ``layer[skip]``. ``skips`` is what ``find_skips`` found in it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, corrupted or foreign.
    """
    path = Path(path)
    file = read(path)
    document, plan = file.document, file.plan
    layers: list[dict[str, Any]] = []
    for key in document["packed"]:
        name, part = layer_and_part(key)
        codes = file.codes(key)
        values, counts = np.unique(codes, return_counts=True)
        layers.append(
            {
                "name": part_key(name, part),
                "weight": str(plan[name].weight_of(part)),
                "input": str(plan[name].input_of(part)),
                "parameters": int(codes.size),
                "bytes": len(file.tensors[key].data),
                "bits": 8 * len(file.tensors[key].data) / max(codes.size, 1),
                "codes": int(values.size),
                "histogram": {str(v): int(c) for v, c in zip(values, counts, strict=True)},
            }
        )
    return {
        "path": str(path),
        "network": document["network"],
        "versions": document["versions"],
        "file_bytes": path.stat().st_size,
        "weight_bytes": sum(layer["bytes"] for layer in layers),
        "float_bytes": 4 * sum(layer["parameters"] for layer in layers),
        "layers": layers,
        "skips": document["skips"],
        "plan": document["plan"],
    }


def packed_shapes(path: str | Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes of the weights in a packed file, in the layers' own layout, and what its modules without state are.

    A split weight stands under its layer's key, its parts together.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, corrupted or foreign.
    """
    packed = read(path)
    shapes: dict[str, list[int]] = {}
    for key, tensor in packed.tensors.items():
        layer, part = layer_and_part(key)
        shape = [*packed.document["packed"].get(key, tensor.shape)]
        name = key if part == WHOLE else f"{layer}.weight"
        if name in shapes:
            shapes[name][1] += shape[1]
        else:
            shapes[name] = shape
    return shapes, dict(packed.document["functions"])


def _functions(network: nn.Module) -> dict[str, str]:
    """Name → what it is, for every module that computes without state: activations, pooling, upsampling.

    No tensor tells a network with tanh from one with ReLU; this does.
    """
    return {
        name: repr(module).replace("inplace=True", "")
        for name, module in network.named_modules()
        if not isinstance(module, (nn.Identity, _DropoutNd))
        and not any(True for _ in module.children())
        and not module.state_dict()
    }


def _check_shared(layers: Mapping[str, QuantizedLayer]) -> None:
    """Raise a ValueError where two layers round one weight parameter differently: only one of them could come back."""
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        first = layers[seen.setdefault(id(layer.weight), name)]
        formats = [{p: q.number_format for p, q in m.weight_quantizers.items()} for m in (first, layer)]
        if formats[0] != formats[1]:
            raise ValueError(
                f"layers '{seen[id(layer.weight)]}' and '{name}' share one weight and round it differently: give both "
                "the same format"
            )


def _skips(network: nn.Module, example: Tensor | None) -> list[dict[str, Any]]:
    if example is not None:
        return find_skips(network, example.cpu()).to_json()
    try:
        return find_skips(network).to_json()
    except ValueError:
        return []


def _packed_weight(quantizer: Quantizer, weight: Tensor, ternary: TernaryCoding, key: str) -> np.ndarray:
    codes = quantizer.codes(weight).cpu().numpy()
    try:
        return encode(codes, quantizer.number_format, ternary)
    except ValueError as error:
        raise ValueError(f"'{key}' cannot be packed: {error}") from None


def _state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict, modules that are registered under several names under their first one only."""
    names = {name for name, _ in network.named_modules()}
    return {key: value for key, value in network.state_dict().items() if key.rpartition(".")[0] in names}


def _prepare(
    network: nn.Module, plan: QuantPlan, folded: list[str], tensors: Mapping[str, Tensor], wrong: str
) -> None:
    """Give a float network the layers, and take the norms, that the packed one had."""
    modules = dict(network.named_modules(remove_duplicate=False))
    unknown = [name for name in [*plan, *folded] if name not in modules]
    if unknown:
        raise ValueError(f"{wrong}: it has no {', '.join(unknown[:5])}")
    for name, layer in plan.layers.items():
        try:
            _quantize_as_packed(modules[name], layer, plan)
        except ValueError as error:
            raise ValueError(f"{wrong}: {name}: {error}") from None
    for name in folded:
        norm = modules[name]
        if type(norm) not in PAIRED_NORMS and not isinstance(norm, nn.Identity):
            raise ValueError(f"{wrong}: {name} is a {type(norm).__name__}, expected a batch norm")
        take_norm_out(norm)
    for name, module in modules.items():  # folding gave the layer a bias, whether or not it had one
        bias = tensors.get(f"{name}.bias")
        if bias is not None and isinstance(module, _WITH_BIAS) and module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(bias.shape))


def _quantize_as_packed(module: nn.Module, layer: LayerPlan, plan: QuantPlan) -> None:
    if isinstance(module, QuantizedLayer):  # registered under two names
        return
    if isinstance(module, SplitLayer):
        here = tuple((part.name, part.channels) for part in module.parts)
        if here != layer.channels:
            raise ValueError(f"it is split into {here} here, {layer.channels or 'whole'} there")
    elif layer.channels is not None:
        split_layer(module, [Part(*part) for part in layer.channels])
    quantize_layer(
        module,
        layer.weights,
        layer.inputs,
        per_channel=plan.granularity == "channel",
        power_of_two=plan.scale == "power-of-two",
        learned=plan.learned,
        rounds_bias=layer.bias == "accumulator",
        output=layer.output,
    )


def _load(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    codes: Mapping[str, np.ndarray],
    shapes: Mapping[str, list[int]],
    wrong: str,
) -> None:
    layers, state = quantized_layers(network), _state(network)
    expected = {}
    for key, value in state.items():
        layer = layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        pieces = {} if layer is None else layer.pieces(layer.output_major(value))
        # A weight of which no part is rounded stands there whole.
        if layer is not None and any(part_key(key, part) in codes for part in pieces if part != WHOLE):
            expected.update({part_key(key, part): piece for part, piece in pieces.items()})
        else:
            expected[key] = value
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{wrong}: missing {missing[:5]}, unknown {unknown[:5]}")
    for key, value in expected.items():
        found = tuple(shapes[key] if key in codes else tensors[key].shape)
        if found != tuple(value.shape):
            raise ValueError(f"{wrong}: '{key}' has the shape {found}, expected {tuple(value.shape)}")
    network.load_state_dict(
        {key: tensors[key] for key in state if key in tensors and key not in codes}, strict=False
    )
    for name, layer in layers.items():
        keys = {part: part_key(f"{name}.weight", part) for part in layer.weight_quantizers}
        layer.set_codes({part: torch.from_numpy(codes[key]) for part, key in keys.items() if key in codes})
        if layer.parts:
            layer.set_weights({p: tensors[k] for p, k in keys.items() if k in tensors and k not in codes})


def _read(path: Path) -> tuple[PackedFile, dict[str, Tensor]]:
    """A packed file, its checksum compared, and its tensors."""
    file = read(path)
    return file, {key: _tensor(stored) for key, stored in file.tensors.items()}


def _tensor(stored: StoredTensor) -> Tensor:
    dtype = getattr(torch, stored.dtype)
    if not stored.data:  # which frombuffer refuses
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(bytearray(stored.data), dtype=dtype).reshape(stored.shape)


def _stored(tensor: Tensor) -> StoredTensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return StoredTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def _checksum(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return checksum(document, {key: _stored(tensor) for key, tensor in tensors.items()})


def installed_version(name: str) -> str:
    """The version of a package, ``unknown`` where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
