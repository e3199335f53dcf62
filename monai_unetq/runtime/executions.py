"""What a model that OpenVINO compiled executes in INT8, layer by layer. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

__all__ = ["Execution", "executed", "executions", "int8_share"]

_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_INTEGERS = ("u8", "i8")


@dataclass(frozen=True)
class Execution:
    """How OpenVINO runs one layer.

    Attributes:
        name: of the node in the compiled model.
        kind: Convolution, Deconvolution, FullyConnected or MatMul.
        precision: u8 or i8 where it is computed in INT8, else f32, bf16, …
        macs: multiplications of one image; 0 where a size is not known.
    """

    name: str
    kind: str
    precision: str
    macs: int

    @property
    def is_int8(self) -> bool:
        """Whether it runs on integers."""
        return self.precision in _INTEGERS


def executed(folder: Path, shape: Sequence[int]) -> list[Execution]:
    """The layers of an exported folder's ``model.xml``, compiled for images of a shape (N, C, spatial…) on this processor.

    Raises:
        ImportError: without OpenVINO.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / "model.xml")
    model.reshape(list(shape))
    return executions(core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}))


def int8_share(layers: Sequence[Execution]) -> float | None:
    """Share of the multiplications that run on integers; None where no size is known."""
    every = sum(one.macs for one in layers)
    return sum(one.macs for one in layers if one.is_int8) / every if every else None


def executions(compiled: Any) -> list[Execution]:
    """The layers of a compiled model, as its runtime information tells them.

    Products of two activations, as in attention, are no layers here: OpenVINO fuses them with what is around them.

    Args:
        compiled: ``openvino.CompiledModel``.
    """
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind = str(info["layerType"].value)
        if kind in _LAYERS:
            # "runtimePrecision" is of the weight, which a float kernel may read from 8 bits.
            precision = str(info["primitiveType"].value).rpartition("_")[2].lower()
            found.append(Execution(node.get_friendly_name(), kind, precision, _macs(node, kind)))
    return found


def _macs(node: Any, kind: str) -> int:
    try:
        places = (node.input_value(0), node.input_value(1), node.output(0))
        image, weight, out = ([int(size) for size in place.get_shape()] for place in places)
    except RuntimeError:  # free sizes
        return 0
    if kind == "Convolution":
        return prod(out) * prod(weight) // (out[1] or 1)
    if kind == "Deconvolution":
        return prod(image) * prod(weight) // (image[1] or 1)
    return prod(out) * image[-1]
