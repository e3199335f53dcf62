"""Reads a packed checkpoint without torch: header, checksum, weight codes, and all other tensors as numpy arrays.

``deploy.packed`` writes the file and says what is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from ..coding import decode, is_ternary
from ..formats import QFormat
from ..parts import WHOLE
from ..plan import QuantPlan

__all__ = [
    "KEY",
    "PLAIN",
    "WITH_CODINGS",
    "WITH_PARTS",
    "PackedFile",
    "StoredTensor",
    "checksum",
    "layer_and_part",
    "part_key",
    "read",
]

KEY = "monai_unetq"
PLAIN, WITH_CODINGS, WITH_PARTS = 1, 2, 3
"""Versions: 2 adds ``codings``, 3 split layers and ``skips``; each is written only where it is needed, so that older
programs read the rest.
"""

_KINDS: dict[str, type] = {
    "version": int,
    "network": str,
    "plan": dict,
    "packed": dict,
    "folded": list,
    "functions": dict,
    "versions": dict,
    "checksum": str,
}

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""What safetensors calls a type → what torch calls it."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file, as it stands there.

    Attributes:
        dtype: as torch calls it, ``float32``.
        shape: of the tensor.
        data: its bytes, little endian, in C order.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        """The tensor, read-only.

        Raises:
            ValueError: for a type that numpy does not have, ``bfloat16``.
        """
        if self.dtype.startswith(("bfloat", "float8")):
            raise ValueError(f"numpy has no type {self.dtype}")
        return np.frombuffer(self.data, np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)


@dataclass(frozen=True)
class PackedFile:
    """A packed checkpoint, its header and checksum checked.

    Attributes:
        path: where it was read from, for messages.
        document: the header, ``codings`` and ``skips`` filled up where an older version has none.
        tensors: key → tensor.
        plan: the network's plan.
    """

    path: Path
    document: dict[str, Any]
    tensors: dict[str, StoredTensor]
    plan: QuantPlan

    def number_format(self, key: str) -> QFormat:
        """What the weight (or the part of one) of this key was rounded to."""
        layer, part = layer_and_part(key)
        return self.plan[layer].weight_of(part)

    def codes(self, key: str) -> np.ndarray:
        """The codes of one packed weight, (count,), int32, output channels first.

        Args:
            key: one of ``document["packed"]``.

        Raises:
            ValueError: if the bytes are not what this format's codes are stored as.
        """
        try:
            number_format = self.number_format(key)
        except KeyError:
            raise ValueError(f"{self.path}: corrupted: the plan has no format for '{key}'") from None
        # Without an entry, ternary codes take the bits of their format, as all others do.
        coding = self.document["codings"].get(key, "2bit")
        if key in self.document["codings"] and not is_ternary(number_format):
            raise ValueError(
                f"{self.path}: corrupted: '{key}' has the coding {coding!r}, but is {number_format}, not ternary"
            )
        try:
            data = np.frombuffer(self.tensors[key].data, np.uint8)
            return decode(data, number_format, prod(self.document["packed"][key]), coding)
        except ValueError as error:
            raise ValueError(f"{self.path}: '{key}': {error}") from None


def read(path: str | Path) -> PackedFile:
    """Read a packed file, its checksum compared.

    Args:
        path: a file written by ``monai_unetq.pack``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no packed checkpoint of ours, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, expected a packed checkpoint (written by monai_unetq.pack)"
        )
    try:
        data = path.read_bytes()
        tensors = {key: _stored(held) for key, held in deserialize(data)}
        length = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + length]).get("__metadata__", {}).get(KEY)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: truncated, corrupted, or no safetensors file ({error})") from None
    if text is None:
        raise ValueError(f"{path}: a safetensors file, but no packed checkpoint (no '{KEY}' in its metadata)")
    document = _checked(path, text, tensors)
    return PackedFile(path, document, tensors, QuantPlan.from_json(document["plan"], f"{path}: plan"))


def checksum(document: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str:
    """What the header's ``checksum`` must be: over the header without it, and all tensors."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}:torch.{tensor.dtype}:{tensor.shape};".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def part_key(key: str, part: str) -> str:
    """What a part of a weight is called in the file: ``….weight[skip]``; the weight's key where it is whole."""
    return key if part == WHOLE else f"{key}[{part}]"


def layer_and_part(key: str) -> tuple[str, str]:
    """Layer and part that a packed weight is of."""
    name, _, part = key.partition(".weight[") if key.endswith("]") else (key.removesuffix(".weight"), "", "")
    return name, part.removesuffix("]") or WHOLE


def _stored(held: Mapping[str, Any]) -> StoredTensor:
    dtype = _DTYPES.get(held["dtype"])
    if dtype is None:
        raise ValueError(f"a tensor of type {held['dtype']}, expected one of {', '.join(_DTYPES)}")
    return StoredTensor(dtype, tuple(held["shape"]), bytes(held["data"]))


def _checked(path: Path, text: str, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: corrupted: its header is not JSON ({error})") from None
    found = document.get("version") if isinstance(document, dict) else None
    if isinstance(found, int) and found > WITH_PARTS:
        raise ValueError(
            f"{path}: packed format {found}, this program reads up to {WITH_PARTS}: update monai-unetq"
        )
    kinds = dict(_KINDS)
    if found in (WITH_CODINGS, WITH_PARTS):
        kinds["codings"] = dict
    if found == WITH_PARTS:
        kinds["skips"] = list
    for key, kind in kinds.items():
        if not isinstance(document, dict) or not isinstance(document.get(key), kind):
            raise ValueError(f"{path}: corrupted: '{key}' is missing from its header or no {kind.__name__}")
    if document["version"] not in (PLAIN, WITH_CODINGS, WITH_PARTS):
        raise ValueError(
            f"{path}: corrupted: packed format {document['version']}, expected {PLAIN} to {WITH_PARTS}"
        )
    if checksum({k: v for k, v in document.items() if k != "checksum"}, tensors) != document["checksum"]:
        raise ValueError(f"{path}: corrupted: its checksum does not match its content")
    missing = [key for key in document["packed"] if key not in tensors or tensors[key].dtype != "uint8"]
    if missing:
        raise ValueError(f"{path}: corrupted: no packed tensor {missing[0]}")
    document = {"codings": {}, "skips": [], **document}
    unknown = sorted(document["codings"].keys() - document["packed"].keys())
    if unknown:
        raise ValueError(f"{path}: corrupted: a coding for '{unknown[0]}', which is no packed weight")
    return document
