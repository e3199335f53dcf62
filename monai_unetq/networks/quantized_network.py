"""``QuantizedNetwork``: any network, quantized and loaded as a configuration says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..deploy import unpack
from ..parts import WHOLE
from ..plan import FLOAT_LAYER, LayerPlan, QuantPlan
from ..surgery import observe, plan_of, plan_of_state, quantize, quantized_layers
from ..surgery.observe import example_for

__all__ = ["QuantizedNetwork", "state_file"]


def QuantizedNetwork(  # noqa: N802 (a class to configurations)
    network: nn.Module,
    weights: str | None = None,
    activations: str | None = None,
    input: str | None = None,
    first: str | None = None,
    last: str | None = None,
    keep_float: str | Sequence[str] = (),
    plan: str | Path | QuantPlan | None = None,
    scale: Literal["power-of-two", "free"] | None = None,
    granularity: Literal["channel", "tensor"] | None = None,
    learned: bool = False,
    state: str | Path | None = None,
    example_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Quantize a network, in place, as a MONAI configuration says: the ``_target_`` of a ``network_def``.

    What comes back is the network that went in, with its class, attributes and keys, and its layers of the
    classes that they were (``isinstance(layer, nn.Conv3d)``): whatever the configuration does with the network
    still works. Formats come from ``weights`` and ``activations``, from ``plan``, or from a quantized
    ``state``; with none of them the network stays float.

    Args:
        network: float; from MONAI, nnU-Net or anywhere else.
        weights: format of all weights, such as ``"Q0.4"``; with ``activations``, and without ``plan``.
        activations: format of all activations, such as ``"Q6.0"``.
        input: format of the image; ``activations`` by default.
        first: weight format of the layers that the image goes into, ``"float"`` keeps all of them float.
        last: weight format of the layer that runs last, likewise.
        keep_float: names or shell patterns of layers that stay float.
        plan: a plan, or the file of one.
        scale: see ``QuantPlan``; ``"power-of-two"`` by default. A plan says it itself.
        granularity: see ``QuantPlan``; ``"channel"`` by default. A plan says it itself.
        learned: see ``QuantPlan``. A plan says it itself.
        state: file of trained weights: a state dict (``model.pt``) of the float network, which is then quantized
            as asked, or of a quantized one, whose formats and scales come with it; or a packed file
            (``model.unetq``), which says everything itself.
        example_shape: (1, channels, spatial…) of an input that the network accepts, where 64 pixels a side in
            2D, 32 in 3D, do not fit.

    Returns:
        the network.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if formats are given twice or in part, do not parse, name no layer, or a file does not fit.

    Example:
        >>> net = QuantizedNetwork(FixedPointUNet(1, 1), weights="Q0.4", activations="Q6.0", input="UQ0.8")
    """
    if (weights is None) != (activations is None):
        given = "weights" if activations is None else "activations"
        raise ValueError(
            f"QuantizedNetwork: only {given!r} is given, expected both of weights and activations"
        )
    if plan is not None and weights is not None:
        raise ValueError("QuantizedNetwork: 'plan' and 'weights' are both given, expected one of them")
    options = {"input": input, "first": first, "last": last, "scale": scale, "granularity": granularity}
    for key, value in (*options.items(), ("learned", learned or None)):
        if value is not None and weights is None:
            raise ValueError(
                f"QuantizedNetwork: {key!r} needs weights and activations; a plan names it itself"
            )
    patterns = [keep_float] if isinstance(keep_float, str) else list(keep_float)
    if patterns and plan is None and weights is None:
        raise ValueError("QuantizedNetwork: 'keep_float' needs weights and activations, or a plan")
    asked = plan is not None or weights is not None
    if state is not None and _is_packed(Path(state)):
        if asked:
            raise ValueError(
                f"{state} is packed and says its formats itself; give formats with a float model.pt, or none"
            )
        return unpack(state, network)
    tensors = None if state is None else _read_state(Path(state))
    carried = None if tensors is None else plan_of_state(tensors)
    example = None
    if example_shape is not None:
        device = next(network.parameters()).device
        example = torch.zeros(tuple(example_shape), device=device)
    if tensors is not None and carried is None:
        _load(network, tensors, str(state))
    if isinstance(plan, (str, Path)):
        plan = QuantPlan.load(plan)
    if plan is not None:
        plan = plan.without(patterns)
    elif weights is not None and activations is not None:
        trace = observe(network, example_for(network) if example is None else example)
        plan = QuantPlan.uniform(
            network, weights, activations, input, first, last, patterns, scale or "power-of-two",
            granularity or "channel", learned, image_layers=trace.image_layers(), last_layer=trace.layers()[-1],
        )  # fmt: skip
    else:
        plan = carried
    if plan is not None and plan.layers:
        quantize(network, plan if carried is None else _split_as(plan, carried), example)
    if tensors is not None and carried is not None:
        if asked:
            _check_formats(network, carried, str(state))
        _load(network, tensors, str(state))
    return network


def state_file(path: str | Path) -> Path:
    """The path of trained weights, checked: bundles build their network without them, but predict with them only.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; train first, or give the file of a trained network")
    return Path(path)


def _is_packed(path: Path) -> bool:
    """Whether a file is in safetensors' format, as packed files are; state dicts are not."""
    state_file(path)
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return False


def _check_formats(network: nn.Module, carried: QuantPlan, path: str) -> None:
    """Raise unless a quantized file has the formats that were asked for: they would silently be replaced by its own."""
    found = plan_of(network).layers if quantized_layers(network) else {}
    for name in sorted(set(found) | set(carried.layers)):
        there, here = carried[name], found.get(name, FLOAT_LAYER)
        if _formats(there, there.parts) != _formats(here, there.parts):
            raise ValueError(
                f"{path}: layer '{name}' is {_formats(there, there.parts)} there, {_formats(here, here.parts)} was "
                "asked for; ask for the same formats, for none, or begin with float weights"
            )


def _split_as(plan: QuantPlan, carried: QuantPlan) -> QuantPlan:
    """The plan, its layers split as those of a file are: how a network is split is a trained network's state."""
    changes = {
        name: replace(layer, channels=carried[name].channels)
        for name, layer in plan.layers.items()
        if carried[name].channels
        and layer.channels is None
        and layer.parts in ((WHOLE,), carried[name].parts)
    }
    return plan.with_layers(changes)


def _formats(layer: LayerPlan, parts: Sequence[str]) -> str:
    """Formats of a layer, of some parts of it; where it has others, all it has."""
    if layer.parts != (WHOLE,) and set(layer.parts) != set(parts):
        parts = layer.parts
    return ", ".join(
        f"{'' if part == WHOLE else part + ' '}{layer.weight_of(part)}/{layer.input_of(part)}"
        for part in parts
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: no state dict that loads safely ({error}); expected a model.pt") from None
    if not isinstance(document, Mapping) or not all(isinstance(v, Tensor) for v in document.values()):
        raise ValueError(f"{path}: holds no state dict, expected parameter names and tensors only")
    return dict(document)


def _load(network: nn.Module, tensors: Mapping[str, Tensor], path: str) -> nn.Module:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this {type(network).__name__}: {error}") from None
    return network
