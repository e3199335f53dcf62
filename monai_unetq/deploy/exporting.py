"""``export``: a quantized network as a folder that runs without it, with what is needed to check that it does.

Every folder holds ``export.json`` (target, plan, preprocessing, versions, notes, a checksum of each file and of itself)
and ``golden.safetensors``, an image and the logits of fake quantization for it, which ``runtime.verify`` compares.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import write_json
from ..runtime.engine import EXPORT_VERSION, GOLDEN, document_checksum
from ..surgery import fold
from .packed import installed_version, pack
from .qdq import Store, Target, to_qdq
from .qonnx import to_qonnx
from .trace import trace

__all__ = ["PROFILES", "TARGETS", "ExportTarget", "Profile", "export"]

ExportTarget = Literal["onnx", "openvino", "qonnx", "integer", "packed"]
TARGETS: tuple[ExportTarget, ...] = get_args(ExportTarget)
Profile = Literal["onnxruntime", "tensorrt", "vnni", "avx2"]
PROFILES: Mapping[str, tuple[Profile, ...]] = {
    "onnx": ("onnxruntime", "tensorrt"),
    "openvino": ("vnni", "avx2"),
}
"""Target → whose rules the model can keep, the usual first."""

_PACKAGES = ("monai-unetq", "torch", "onnx", "onnxruntime", "openvino", "qonnx")
"""Packages whose versions are kept."""


@torch.no_grad()
def export(
    network: nn.Module,
    example: Tensor,
    target: ExportTarget,
    folder: str | Path,
    *,
    store: Store = "int8",
    profile: Profile | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a quantized network for an engine, as a whole or not at all.

    ============  ==========================================  =================================================
    target        files                                       runs in
    ============  ==========================================  =================================================
    ``onnx``      ``model.onnx``                              ONNX Runtime, OpenVINO, TensorRT (its ``profile``)
    ``openvino``  ``model.xml``, ``model.bin``                OpenVINO
    ``qonnx``     ``model.onnx``                              FINN, hls4ml, the ``qonnx`` package
    ``integer``   ``model.unetq``, ``program.json``           ``runtime.integer``: numpy, integers only
    ``packed``    ``model.unetq``                             ``unpack``, with the network's own code
    ============  ==========================================  =================================================

    Args:
        network: quantized and calibrated; it is left as it is.
        example: (N, C, spatial…), an image that it accepts; it becomes the golden input, so a real one checks more.
        target: see the table.
        folder: new, or empty; it may be a link.
        store: type of the weights' constants in ``onnx``.
        profile: whose rules it keeps. ``onnx``: ``onnxruntime`` (default) or ``tensorrt``. ``openvino``: ``vnni`` (default),
            or ``avx2`` for processors without VNNI, where transposed convolutions would run in float.
        preprocessing: what the image must go through first, kept in ``export.json``.

    Returns:
        the content of ``export.json``.

    Raises:
        FileExistsError: if the folder holds something.
        ValueError: if the network is not quantized, or the target cannot hold one of its layers, by name.
        ImportError: without the target's package.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if store != "int8" and target != "onnx":
        raise ValueError(f"store is {store!r}, but {target} has no such choice; it is of onnx")
    known = PROFILES.get(target, ())
    if profile is not None and profile not in known:
        other = f"expected one of {', '.join(known)}" if known else "which has no such choice"
        raise ValueError(f"profile is {profile!r} for {target}, {other}")
    profile = profile or next(iter(known), None)
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"{folder}: exists and is not an empty folder; give another --out, or remove it"
        )
    image = example.detach().cpu().float()
    document: dict[str, Any] = {
        "version": EXPORT_VERSION,
        "target": target,
        "network": f"{type(network).__module__}.{type(network).__qualname__}",
        "image": list(image.shape),
        "preprocessing": dict(preprocessing or {}),
        "versions": {name: installed_version(name) for name in _PACKAGES},
    }
    place = folder.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is there is filled, not replaced: it may be a mount, or the one that its user stands in.
    fill = place.exists()
    scratch = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place if fill else place.parent))
    scratch.chmod(0o755)
    try:
        document |= _writer(target, store, profile)(network, image, scratch, document)
        _write_golden(network, image, scratch)
        document["files"] = {file.name: _sha256(file) for file in sorted(scratch.iterdir())}
        document = json.loads(json.dumps(document))  # the checksum is of what will be read back
        document["sha256"] = document_checksum(document)
        write_json(scratch / "export.json", document)
        if fill:
            _move(scratch, place)
        else:
            os.replace(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return document


_Writer = Callable[[nn.Module, Tensor, Path, Mapping[str, Any]], dict[str, Any]]


def _writer(target: ExportTarget, store: Store, profile: Profile | None) -> _Writer:
    """What writes a target's files into a folder, and returns what ``export.json`` says of them."""

    def onnx_files(
        network: nn.Module, image: Tensor, folder: Path, head: Mapping[str, Any]
    ) -> dict[str, Any]:
        traced = trace(network, image, dynamic=target == "onnx")
        engine: Target = "tensorrt" if profile == "tensorrt" else "onnxruntime"
        lowered = to_qdq(traced, store=store, target=engine) if target == "onnx" else to_qonnx(traced)
        said = {"plan": traced.plan.to_json(), "dynamic": list(traced.dynamic), "notes": lowered.notes}
        entry = lowered.model.metadata_props.add()
        entry.key, entry.value = "monai_unetq", json.dumps({**head, **said})
        onnx.save(lowered.model, folder / "model.onnx")
        return {**said, **({"store": store, "profile": profile} if target == "onnx" else {})}

    def openvino_files(
        network: nn.Module, image: Tensor, folder: Path, head: Mapping[str, Any]
    ) -> dict[str, Any]:
        from .openvino import write_openvino

        traced = trace(network, image)
        said: dict[str, Any] = {"plan": traced.plan.to_json(), "dynamic": [], "profile": profile}
        info = {key: json.dumps(value) for key, value in {**head, **said}.items()}
        shuffled = profile == "avx2"
        return {**said, "notes": write_openvino(traced, folder, tuple(image.shape), info, shuffled=shuffled)}

    def integer_files(
        network: nn.Module, image: Tensor, folder: Path, head: Mapping[str, Any]
    ) -> dict[str, Any]:
        from .integer import write

        traced = trace(network, image[:1], dynamic=False)
        write(traced, network, folder)
        return {"plan": traced.plan.to_json(), "notes": {}}

    def packed_file(
        network: nn.Module, image: Tensor, folder: Path, head: Mapping[str, Any]
    ) -> dict[str, Any]:
        pack(network, folder / "model.unetq", example=image[:1])
        return {"notes": {}}

    writers: dict[str, _Writer] = {
        "openvino": openvino_files,
        "integer": integer_files,
        "packed": packed_file,
    }
    return writers.get(target, onnx_files)


def _write_golden(network: nn.Module, image: Tensor, folder: Path) -> None:
    """An image and its logits by fake quantization, computed in float64 where every sum is exact."""
    exact = fold(copy.deepcopy(network).cpu().float(), image[:1]).double().eval()
    logits = exact(image.double()).float().contiguous()
    file = folder / GOLDEN
    save_file({"image": image.contiguous(), "logits": logits}, file)
    file.chmod(0o644)  # safetensors lets nobody else read it


def _move(scratch: Path, folder: Path) -> None:
    """Every file of a folder into another; ``export.json`` last, so that a part of them is no export."""
    names = [file.name for file in scratch.iterdir()]
    try:
        for name in sorted(names, key=lambda name: name == "export.json"):
            os.replace(scratch / name, folder / name)
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
