"""``verify``: an exported folder against the golden image and logits that lie in it. Imports no torch."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from .engine import GOLDEN, load, read_export
from .executions import executed, int8_share
from .packed import read

__all__ = ["ALLOWED_DIFFERENCE", "Verification", "labels", "verify"]

ALLOWED_DIFFERENCE = 1e-4
"""Share of voxels whose label may differ from fake quantization's (1 in 10,000)."""


@dataclass(frozen=True)
class Verification:
    """How an export compares with fake quantization on its golden image.

    Of a packed model, which holds no network to run, ``equal`` to ``labels_differ`` are None.

    Attributes:
        target: what it was exported for.
        equal: whether all logits are the same, bit for bit.
        largest: largest difference of a logit.
        relative: the same, as a share of the largest logit.
        labels_differ: share of voxels with another label.
        passed: whether the labels agree; for ``integer``, whether the logits are equal; for ``packed``, that the file reads
            back.
        hint: what may have caused a difference, or why nothing was compared.
        int8_share: of ``openvino``, share of the layers' multiplications that run on integers on this processor.
        float_layers: of ``openvino``, the layers that do not.
    """

    target: str
    equal: bool | None
    largest: float | None
    relative: float | None
    labels_differ: float | None
    passed: bool
    hint: str = ""
    int8_share: float | None = None
    float_layers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)


def verify(folder: str | Path) -> Verification:
    """Check an exported folder's files, run it on its golden image, and compare.

    A packed model is not run: its file is read back, every weight of it decoded.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder is no export, damaged, or for an engine that this program does not know.
        ImportError: without the engine's package.
    """
    folder = Path(folder)
    document = read_export(folder)
    engine = None if document["target"] == "packed" else load(folder)
    try:
        golden = load_file(folder / GOLDEN)
        image, expected = golden["image"], golden["logits"]
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{folder / GOLDEN}: no golden image and logits ({error})") from None
    if engine is None:
        return _read_back(folder)
    found = engine(image)
    if found.shape != expected.shape:
        raise ValueError(f"{folder}: returns logits of the shape {found.shape}, expected {expected.shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{folder}: returns NaN or infinity on its golden image")
    difference = float(np.abs(found.astype(np.float64) - expected).max(initial=0))
    equal = bool(np.array_equal(found, expected))
    differ = float(np.mean(labels(found) != labels(expected)))
    layers = executed(folder, image.shape) if document["target"] == "openvino" else []
    passed = equal if document["target"] == "integer" else differ <= ALLOWED_DIFFERENCE
    return Verification(
        document["target"],
        equal,
        difference,
        difference / max(float(np.abs(expected).max(initial=0)), 1e-30),
        differ,
        passed,
        "" if passed else _hint(document["target"]),
        int8_share(layers),
        tuple(f"{one.name} ({one.kind}, {one.precision})" for one in layers if not one.is_int8),
    )


def _read_back(folder: Path) -> Verification:
    file = read(folder / "model.unetq")
    for key in file.document["packed"]:
        file.codes(key)
    why = (
        f"{len(file.document['packed'])} packed weights read back, but the file holds no network to run: "
        "monai_unetq.unpack puts them into one"
    )
    return Verification("packed", None, None, None, None, True, why)


def labels(logits: np.ndarray) -> np.ndarray:
    """Labels (N, spatial…) of logits (N, classes, spatial…): above 0 for one class, the largest for more."""
    return (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else logits.argmax(1)


def _hint(target: str) -> str:
    if target == "integer":
        return "integers must agree bit for bit; export again, and report it if they still do not"
    norms = (
        "instance, group and layer norm between integer layers differ between engines in their last bits, which "
        "rounding can enlarge (check on a real image: unetq export --image)"
    )
    if _has_vnni():
        return norms
    return (
        "this processor has no VNNI, so its INT8 products of 8-bit weights and 8-bit activations saturate at 16 bits "
        f"(7-bit weights do not); or {norms}"
    )


def _has_vnni() -> bool:
    """Whether the processor adds INT8 products without saturating; True where that cannot be told."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "vnni" in flags or "amx_int8" in flags
