"""Exported folders read back and run: ONNX Runtime, OpenVINO, or integers in numpy. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ENGINES", "EXPORT_VERSION", "Engine", "load", "read_export"]

EXPORT_VERSION = 1
"""Of ``export.json``."""

Engine = Callable[[np.ndarray], np.ndarray]
"""An image, float32 (N, C, spatial…), to logits, float32 (N, classes, spatial…)."""

_KEYS = {"version": int, "target": str, "network": str, "image": list, "preprocessing": dict, "versions": dict, "notes": dict, "files": dict}  # fmt: skip


def read_export(folder: str | Path) -> dict[str, Any]:
    """What ``export.json`` says, every file it names compared with its checksum.

    Raises:
        FileNotFoundError: if there is no such folder, or a file is missing.
        ValueError: if it is no export, or a file is truncated or changed.
    """
    folder = Path(folder)
    file = folder / "export.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected a folder written by 'unetq export'")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
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
    for name, expected in document["files"].items():
        if Path(name).name != name:
            raise ValueError(f"{file}: names the file {name!r}, expected one in its own folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: is missing from the export; export again")
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / name}: truncated or changed: its SHA-256 begins with {found[:12]}, expected "
                f"{str(expected)[:12]}; export again"
            )
    return document


def load(folder: str | Path) -> Engine:
    """The engine of an exported folder.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder is damaged, or its target is for other programs.
        ImportError: without the engine's package.
    """
    folder = Path(folder)
    target = read_export(folder)["target"]
    if target not in ENGINES:
        why = (
            "needs the network's own code (monai_unetq.unpack)"
            if target == "packed"
            else "this program does not know"
        )
        raise ValueError(
            f"{folder}: was exported for '{target}', which {why}; expected one of {', '.join(ENGINES)}"
        )
    return ENGINES[target](folder)


def _onnx_runtime(folder: Path) -> Engine:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{folder}: needs ONNX Runtime: pip install monai-unetq[onnx] ({error})") from None
    try:
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ValueError(f"{folder / 'model.onnx'}: ONNX Runtime refuses it ({error})") from None

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
    compiled: dict[tuple[int, ...], Any] = {}

    def run(image: np.ndarray) -> np.ndarray:
        if image.shape not in compiled:
            model = core.read_model(folder / "model.xml")
            model.reshape(list(image.shape))
            # float32 for what stays float: bf16, its default where processors have it, changes the numbers.
            compiled[image.shape] = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.array(compiled[image.shape](image)[0])

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
    model = ModelWrapper(str(folder / "model.onnx"))

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
