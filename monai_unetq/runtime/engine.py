"""Exported folders read back and run: ONNX Runtime, OpenVINO, or integers in numpy. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line

__all__ = [
    "ENGINES",
    "EXPORT_VERSION",
    "GOLDEN",
    "Engine",
    "document_checksum",
    "load",
    "read_export",
]

EXPORT_VERSION = 1
"""Of ``export.json``."""

Engine = Callable[[np.ndarray], np.ndarray]
"""An image, float32 (N, C, spatial…), to logits, float32 (N, classes, spatial…)."""

GOLDEN = "golden.safetensors"
"""An image and its logits, in every export."""

_KEYS = {"version": int, "target": str, "network": str, "image": list, "preprocessing": dict, "versions": dict, "notes": dict, "files": dict, "sha256": str}  # fmt: skip

_FILES = {
    "onnx": ("model.onnx",),
    "openvino": ("model.xml", "model.bin"),
    "qonnx": ("model.onnx",),
    "integer": ("model.unetq", "program.json"),
    "packed": ("model.unetq",),
}
"""Target → files that its export consists of, beside the golden image."""


def read_export(folder: str | Path) -> dict[str, Any]:
    """What ``export.json`` says; it and every file of the export compared with their checksums.

    Raises:
        FileNotFoundError: if there is no such folder, or a file is missing.
        ValueError: if it is no export, names not all of its files, or a file is truncated or changed.
    """
    folder = Path(folder)
    file = folder / "export.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected a folder written by 'unetq export'")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: truncated, corrupted, or no JSON ({error})") from None
    for key, kind in _KEYS.items():
        if not isinstance(document, dict) or not isinstance(document.get(key), kind):
            raise ValueError(
                f"{file}: '{key}' is missing or no {kind.__name__}; expected what 'unetq export' writes"
            )
    if document["version"] != EXPORT_VERSION:
        raise ValueError(
            f"{file}: has version {document['version']}, this program reads {EXPORT_VERSION}; update monai-unetq or "
            "export again"
        )
    if document_checksum(document) != document["sha256"]:
        raise ValueError(
            f"{file}: changed since it was written: its 'sha256' is of another content; export again"
        )
    image = document["image"]
    if len(image) < 3 or not all(type(size) is int and size > 0 for size in image):
        raise ValueError(
            f"{file}: 'image' is {image}, expected the shape (N, C, spatial…) of an image; export again"
        )
    for name in (*_FILES.get(document["target"], ()), GOLDEN):
        if name not in document["files"]:
            raise ValueError(
                f"{file}: 'files' has no {name}, which an export for '{document['target']}' consists of; export again"
            )
    for name, expected in document["files"].items():
        if Path(name).name != name:
            raise ValueError(f"{file}: names the file {name!r}, expected one in its own folder")
        if not isinstance(expected, str):
            raise ValueError(
                f"{file}: the checksum of {name} is {expected!r}, expected its SHA-256; export again"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: is missing from the export; export again")
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / name}: truncated or changed: its SHA-256 begins with {found[:12]}, expected "
                f"{expected[:12]}; export again"
            )
    return document


def document_checksum(document: Mapping[str, Any]) -> str:
    """What ``sha256`` of an ``export.json`` must be: over all of it but that key, as read back from JSON."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load(folder: str | Path) -> Engine:
    """The engine of an exported folder; it raises ValueError for an image that the network does not take.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder is damaged, or its target is for other programs.
        ImportError: without the engine's package.
    """
    folder = Path(folder)
    document = read_export(folder)
    target = document["target"]
    if target not in ENGINES:
        why = (
            "needs the network's own code (monai_unetq.unpack)"
            if target == "packed"
            else "this program does not know"
        )
        raise ValueError(
            f"{folder}: was exported for '{target}', which {why}; expected one of {', '.join(ENGINES)}"
        )
    engine = ENGINES[target](folder)

    def run(image: np.ndarray) -> np.ndarray:
        try:
            return engine(image)
        except Exception as error:  # the engines' errors have no common class
            exported = tuple(document["image"])
            what = "which it was exported with: export again"
            if image.shape != exported:
                what = (
                    f"expected {exported}, which it was exported with, or another size that the network takes"
                )
            raise ValueError(
                f"{folder}: cannot run an image of the shape {image.shape}, {what} ({one_line(error)})"
            ) from error

    return run


def _onnx_runtime(folder: Path) -> Engine:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{folder}: needs ONNX Runtime: pip install monai-unetq[onnx] ({error})") from None
    try:
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ValueError(f"{folder / 'model.onnx'}: ONNX Runtime refuses it ({one_line(error)})") from None

    def run(image: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run(None, {"image": image})[0]
        return logits

    return run


def _openvino(folder: Path) -> Engine:
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"{folder}: needs OpenVINO: pip install monai-unetq[openvino] ({error})") from None
    core = openvino.Core()
    try:
        model = core.read_model(folder / "model.xml")
    except Exception as error:  # whatever a damaged model makes it raise
        raise ValueError(
            f"{folder / 'model.xml'}: OpenVINO refuses it or its model.bin ({one_line(error)})"
        ) from None
    shape: tuple[int, ...] | None = None
    compiled: Any = None

    def run(image: np.ndarray) -> np.ndarray:
        nonlocal shape, compiled
        if image.shape != shape:  # one is kept: a compiled model holds all weights and buffers
            shape = compiled = None
            resized = model.clone()
            resized.reshape(list(image.shape))
            # float32 for what stays float: bf16, its default where processors have it, changes the numbers.
            compiled = core.compile_model(resized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            shape = image.shape
        return np.array(compiled(image)[0])

    return run


def _integer(folder: Path) -> Engine:
    from .integer import load as load_program

    network = load_program(folder)

    def run(image: np.ndarray) -> np.ndarray:
        codes, exponents = network(image)
        column = np.asarray(exponents).reshape(-1, *[1] * (image.ndim - 2))
        return np.asarray(np.ldexp(codes.astype(np.float64), -column), dtype=np.float32)

    return run


def _qonnx(folder: Path) -> Engine:
    try:
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
    except ImportError as error:
        raise ImportError(f"{folder}: needs the qonnx package: pip install qonnx ({error})") from None
    try:
        model = ModelWrapper(str(folder / "model.onnx"))
    except Exception as error:  # whatever a damaged model makes it raise
        raise ValueError(f"{folder / 'model.onnx'}: qonnx refuses it ({one_line(error)})") from None

    def run(image: np.ndarray) -> np.ndarray:
        logits: np.ndarray = execute_onnx(model, {"image": image})["logits"]
        return logits

    return run


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "onnx": _onnx_runtime,
    "openvino": _openvino,
    "qonnx": _qonnx,
    "integer": _integer,
}
"""Target of an export → what makes its engine. A packed file has none: it holds no network."""
