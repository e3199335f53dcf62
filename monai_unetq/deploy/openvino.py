"""A traced network as OpenVINO's IR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .qdq import to_qdq
from .subpixel import SHUFFLE
from .trace import DOMAIN, Trace

__all__ = ["read", "write_openvino"]


def write_openvino(
    traced: Trace, folder: Path, shape: tuple[int, ...], info: Mapping[str, str], *, shuffled: bool = False
) -> dict[str, str]:
    """Write ``model.xml`` and ``model.bin``, weights in 8 bits.

    The image's size is fixed: with free sizes OpenVINO 2026.4 computes transposed INT8 convolutions wrongly.
    ``Model.reshape`` gives it another one.

    Args:
        traced: of a quantized network.
        folder: where to write.
        shape: of the image, (N, C, spatial…).
        info: written into the model's runtime information, under ``monai_unetq``.
        shuffled: whether transposed convolutions are convolutions with a pixel shuffle, which run in INT8 without VNNI, too.
            With VNNI OpenVINO's own transposed ones are faster.

    Returns:
        layer → why it is not one INT8 convolution.

    Raises:
        ImportError: without OpenVINO.
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            f"writing OpenVINO's IR needs it: pip install monai-unetq[openvino] ({error})"
        ) from None
    lowered = to_qdq(traced, target="openvino", shuffled=shuffled)
    model = read(lowered.model)
    model.reshape(list(shape))
    for key, value in info.items():
        model.set_rt_info(value, ["monai_unetq", key])
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return lowered.notes


def read(model: onnx.ModelProto) -> Any:
    """A model of ``to_qdq`` for OpenVINO as an ``openvino.Model``."""
    import openvino
    from openvino import opset13
    from openvino.frontend.onnx import ConversionExtension

    def shuffle(node: Any) -> Any:
        read, size, kept = node.get_input(0), node.get_attribute("blocksize"), node.get_attribute("kept")
        if not kept:
            return opset13.depth_to_space(read, "blocks_first", size).outputs()
        # The axes that stay become one with the first that grows: (…, d, h) is place d·H + h, and s·(d·H + h) + r of the
        # shuffled axis is place s·h + r of slice d.
        shape = opset13.shape_of(read, output_type="i64")

        def sizes(begin: int, end: int) -> Any:
            return opset13.gather(shape, np.arange(begin, end), np.int64(0))

        rank = read.get_partial_shape().rank.get_length()
        batch, slices, others = sizes(0, 2), sizes(2, 2 + kept), sizes(3 + kept, rank)
        free = np.array([-1])
        merged = opset13.reshape(read, opset13.concat([batch, free, others], 0), special_zero=False)
        larger = opset13.depth_to_space(merged, "blocks_first", size)
        grown = opset13.multiply(others, np.int64(size))
        kept_sizes = [np.array([0, 0]), slices, free, grown]
        return opset13.reshape(larger, opset13.concat(kept_sizes, 0), special_zero=True).outputs()

    core = openvino.Core()
    core.add_extension(ConversionExtension(SHUFFLE, DOMAIN, shuffle))
    return core.read_model(model.SerializeToString())
