"""``Program``: a network as a list of integer operations over named tensors; a JSON document, validated on the way in.

A tensor's value is integer × 2^-exponent. Each channel has its own exponent and its own bound, the largest magnitude
that its integers can have, proven from the weights when the program is made and again when it is loaded. Weights and
biases are not in the document: operations name the layer, whose numbers stand in the packed file beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

__all__ = [
    "IMAGE",
    "VERSION",
    "Add",
    "Clip",
    "Concat",
    "Convolve",
    "Flatten",
    "Grid",
    "Interpolate",
    "Leaky",
    "MaxPool",
    "Operation",
    "Packed",
    "Pad",
    "PartWeights",
    "Program",
    "Repeat",
    "Round",
    "Rounding",
    "Shift",
    "Slice",
    "SumPool",
]

VERSION = 1
IMAGE = "image"
"""Name of the input."""

KIND = "monai_unetq integer program"

Rounding = Literal["nearest", "sign", "literal"]
Ints = tuple[int, ...]
Accumulator = Literal["int32", "int64"]


@dataclass(frozen=True)
class Grid:
    """What is known of one tensor.

    Attributes:
        exponents: (C,), one for each channel; values are integer × 2^-exponent.
        bounds: (C,), the largest magnitude of the channel's integers.
    """

    exponents: Ints
    bounds: Ints

    @property
    def channels(self) -> int:
        """C."""
        return len(self.exponents)

    @property
    def bound(self) -> int:
        """The largest magnitude in the tensor."""
        return max(self.bounds)

    def to_json(self) -> dict[str, Any]:
        """As a JSON document; what is the same for all channels stands there once."""
        return {
            "channels": self.channels,
            "exponent": _short(self.exponents),
            "bound": _short(self.bounds),
        }

    @classmethod
    def from_json(cls, document: Any, where: str) -> Grid:
        """The grid of ``to_json``.

        Raises:
            ValueError: if the document is none.
        """
        _check_keys(document, where, ("channels", "exponent", "bound"))
        channels = document["channels"]
        if not _is_int(channels) or not 1 <= channels <= 1 << 20:
            raise ValueError(f"{where}: 'channels' is {channels!r}, expected a positive integer")
        exponents, bounds = (_long(document[k], channels, f"{where}: '{k}'") for k in ("exponent", "bound"))
        if min(bounds) < 0:
            raise ValueError(f"{where}: 'bound' is {min(bounds)}, expected 0 or more")
        return cls(exponents, bounds)


@dataclass(frozen=True)
class PartWeights:
    """The weight of one part of a layer's input channels.

    Attributes:
        part: its name, ``input`` where the layer is not split.
        shifts: (O,), how far each output channel's integers are shifted left, to where all parts meet.
    """

    part: str
    shifts: Ints


@dataclass(frozen=True)
class Operation:
    """One step: inputs by name, one output by name."""

    kind: ClassVar[str]
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Round(Operation):
    """Rounds to a grid: clamp(round half to even(x · 2^exponent), low, high).

    ``sign`` gives low where x < 0, else high. ``literal`` rounds whole and fraction of |x| apart (see
    ``literal_fake_quantize``). ``layer`` and ``part`` are whose input it makes.
    """

    kind = "round"
    layer: str
    part: str
    exponent: int
    low: int
    high: int
    rounding: Rounding = "nearest"


@dataclass(frozen=True)
class Convolve(Operation):
    """Convolution, transposed convolution or (without spatial axes) a linear layer.

    Attributes:
        layer: whose weight and bias.
        parts: in the order of the input channels.
        bias: whether there is one.
        bias_exponents: (O,), the grid that the bias is rounded to, half to even; empty where it stays as it is.
        silent: output channels that are their bias alone: all their weights together are less than 2^-54 of it, so
            that float64 does not see them either. Batch norm with a gain of almost 0 leaves such channels.
        pads: begin of each axis, then end of each axis.
        accumulator: what the proven bound needs.
    """

    kind = "convolve"
    layer: str
    parts: tuple[PartWeights, ...]
    bias: bool
    bias_exponents: Ints
    silent: Ints
    strides: Ints
    pads: Ints
    dilations: Ints
    groups: int
    transposed: bool
    output_padding: Ints
    accumulator: Accumulator


@dataclass(frozen=True)
class Shift(Operation):
    """The same values on a finer grid: x · 2^by, (C,)."""

    kind = "shift"
    by: Ints


@dataclass(frozen=True)
class Clip(Operation):
    """clamp(x, low, high), (C,) each; empty where there is no such limit. ReLU is ``low`` 0."""

    kind = "clip"
    low: Ints
    high: Ints


@dataclass(frozen=True)
class Leaky(Operation):
    """x · 2^positive where x > 0, else x · 2^negative, (C,) each: a slope that is a power of two."""

    kind = "leaky"
    positive: Ints
    negative: Ints


@dataclass(frozen=True)
class MaxPool(Operation):
    """Largest value of each window; ``pads`` begin of each axis, then end of each axis."""

    kind = "max_pool"
    kernel: Ints
    strides: Ints
    pads: Ints
    dilations: Ints


@dataclass(frozen=True)
class SumPool(Operation):
    """Sum of each window; with log2(window) more in the exponent it is the mean."""

    kind = "sum_pool"
    kernel: Ints
    strides: Ints
    pads: Ints


@dataclass(frozen=True)
class Add(Operation):
    """a · 2^left + b · 2^right, (C,) each."""

    kind = "add"
    left: Ints
    right: Ints


@dataclass(frozen=True)
class Concat(Operation):
    """Channels of all inputs, one after another."""

    kind = "concat"


@dataclass(frozen=True)
class Slice(Operation):
    """From ``start`` to ``stop`` (0: to the end; negative: from the end) of one axis, 0 for channels, then spatial."""

    kind = "slice"
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Repeat(Operation):
    """Nearest-neighbour upsampling by integer factors."""

    kind = "repeat"
    factors: Ints


@dataclass(frozen=True)
class Interpolate(Operation):
    """Linear upsampling by powers of two, ``align_corners=False``; each axis adds log2(2 · factor) to the exponent."""

    kind = "interpolate"
    factors: Ints


@dataclass(frozen=True)
class Pad(Operation):
    """Zeros, or the nearest pixels, around; ``pads`` begin of each axis, then end of each axis; negative ones crop."""

    kind = "pad"
    pads: Ints
    edge: bool


@dataclass(frozen=True)
class Flatten(Operation):
    """(N, C, …) → (N, C · …)."""

    kind = "flatten"
    size: int


_OPERATIONS: dict[str, type[Operation]] = {
    cls.kind: cls
    for cls in (
        Round, Convolve, Shift, Clip, Leaky, MaxPool, SumPool, Add, Concat, Slice, Repeat, Interpolate, Pad, Flatten,
    )
}  # fmt: skip
_INPUTS = {"add": 2}


@dataclass(frozen=True)
class Packed:
    """The packed file that a program's weights are in: its name, in the same folder, and its checksum."""

    file: str
    checksum: str


@dataclass(frozen=True)
class Program:
    """A network in integers.

    Attributes:
        channels: of the image.
        dimensions: spatial axes of the image.
        operations: in the order in which they run.
        grids: name → what is known of each operation's output.
        output: name of the logits.
        packed: where the weights are; None until the program is written.
    """

    channels: int
    dimensions: int
    operations: tuple[Operation, ...]
    grids: dict[str, Grid]
    output: str
    packed: Packed | None = field(default=None)

    def layers(self) -> dict[str, dict[str, Any]]:
        """Layer → its accumulator and the bound that was proven for it."""
        return {
            op.layer: {"accumulator": op.accumulator, "bound": self.grids[op.output].bound}
            for op in self.operations
            if isinstance(op, Convolve)
        }

    def to_json(self) -> dict[str, Any]:
        """The program as a JSON document, with a checksum over itself."""
        document: dict[str, Any] = {
            "kind": KIND,
            "version": VERSION,
            "image": {"channels": self.channels, "dimensions": self.dimensions},
            "output": self.output,
            "operations": [
                {**_operation_json(op), "result": self.grids[op.output].to_json()} for op in self.operations
            ],
        }
        if self.packed is not None:
            document["packed"] = {"file": self.packed.file, "checksum": self.packed.checksum}
        document["checksum"] = _checksum(document)
        return document

    @classmethod
    def from_json(cls, document: Any, source: str = "program") -> Program:
        """The program of ``to_json``.

        Args:
            document: a file's parsed content.
            source: what error messages call the document.

        Raises:
            ValueError: if it is none: foreign, damaged, of a newer version, or an operation that does not fit.
        """
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise ValueError(f"{source}: no integer program ('kind' is not '{KIND}')")
        version: Any = document.get("version")
        if not _is_int(version) or version < 1:
            raise ValueError(f"{source}: corrupted: 'version' is {version!r}, expected {VERSION}")
        if version > VERSION:
            raise ValueError(
                f"{source}: integer program {version}, this program reads up to {VERSION}: update monai-unetq"
            )
        if document.get("checksum") != _checksum({k: v for k, v in document.items() if k != "checksum"}):
            raise ValueError(f"{source}: corrupted: its checksum does not match its content")
        _check_keys(
            document,
            source,
            ("kind", "version", "image", "output", "operations", "checksum"),
            ("packed",),
        )
        image = document["image"]
        _check_keys(image, f"{source}: image", ("channels", "dimensions"))
        for key, top in (("channels", 1 << 20), ("dimensions", 3)):
            if not _is_int(image[key]) or not 0 <= image[key] <= top:
                raise ValueError(f"{source}: image: '{key}' is {image[key]!r}, expected 0 to {top}")
        if not isinstance(document["operations"], list):
            raise ValueError(f"{source}: 'operations' is no list")
        operations, grids = [], {}
        for number, entry in enumerate(document["operations"]):
            where = f"{source}: operation {number}"
            operation, grid = _operation(entry, where, image["dimensions"])
            for name in operation.inputs:
                if name != IMAGE and name not in grids:
                    raise ValueError(f"{where}: reads '{name}', which no earlier operation makes")
                if name == IMAGE and not isinstance(operation, Round):
                    raise ValueError(f"{where}: '{operation.kind}' reads the image, expected 'round' first")
            if operation.output in grids or operation.output == IMAGE:
                raise ValueError(f"{where}: makes '{operation.output}' a second time")
            operations.append(operation)
            grids[operation.output] = grid
        if document["output"] not in grids:
            raise ValueError(f"{source}: no operation makes the output {document['output']!r}")
        return cls(
            image["channels"],
            image["dimensions"],
            tuple(operations),
            grids,
            document["output"],
            _packed(document.get("packed"), source),
        )


def _packed(entry: Any, source: str) -> Packed | None:
    if entry is None:
        return None
    _check_keys(entry, f"{source}: packed", ("file", "checksum"))
    name = entry["file"]
    if not isinstance(name, str) or not isinstance(entry["checksum"], str):
        raise ValueError(f"{source}: packed: 'file' and 'checksum' are not both text")
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError(
            f"{source}: packed: 'file' is {name!r}, expected the name of a file in the same folder"
        )
    return Packed(name, entry["checksum"])


def _operation_json(operation: Operation) -> dict[str, Any]:
    document: dict[str, Any] = {"op": operation.kind}
    for entry in fields(operation):
        value = getattr(operation, entry.name)
        if entry.name == "parts":
            document["parts"] = [{"part": p.part, "shifts": _short(p.shifts)} for p in value]
        elif _per_channel(operation.kind, entry.name):
            document[entry.name] = _short(value) if value else []
        else:
            document[entry.name] = list(value) if isinstance(value, tuple) else value
    return document


_PER_CHANNEL = {
    "convolve": ("bias_exponents",),
    "shift": ("by",),
    "clip": ("low", "high"),
    "leaky": ("positive", "negative"),
    "add": ("left", "right"),
}


def _per_channel(kind: str, key: str) -> bool:
    return key in _PER_CHANNEL.get(kind, ())


def _operation(entry: Any, where: str, dimensions: int) -> tuple[Operation, Grid]:
    if not isinstance(entry, dict) or entry.get("op") not in _OPERATIONS:
        found = entry.get("op") if isinstance(entry, dict) else entry
        raise ValueError(f"{where}: {found!r} is no operation, expected one of {', '.join(_OPERATIONS)}")
    cls = _OPERATIONS[entry["op"]]
    required = tuple(f.name for f in fields(cls) if f.default is MISSING)
    optional = tuple(f.name for f in fields(cls) if f.default is not MISSING)
    _check_keys(entry, where, ("op", "result", *required), optional)
    grid = Grid.from_json(entry["result"], f"{where}: result")
    values = {}
    for entry_field in fields(cls):
        name = entry_field.name
        if name in entry:
            values[name] = _value(entry[name], name, str(entry_field.type), cls.kind, grid, where)
    operation = cls(**values)
    count = _INPUTS.get(cls.kind, 1)
    if len(operation.inputs) != count and not (isinstance(operation, Concat) and operation.inputs):
        raise ValueError(f"{where}: '{cls.kind}' has {len(operation.inputs)} inputs, expected {count}")
    _check_sizes(operation, where, dimensions)
    return operation, grid


def _value(value: Any, name: str, annotation: str, kind: str, grid: Grid, where: str) -> Any:
    place = f"{where}: '{name}'"
    if name == "parts":
        return _parts(value, grid.channels, place)
    if _per_channel(kind, name):
        return () if value == [] else _long(value, grid.channels, place)
    if name == "inputs":
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{place} is {value!r}, expected a list of names")
        return tuple(value)
    if annotation == "Ints":
        if not isinstance(value, list) or not all(_is_int(v) and abs(v) < 1 << 31 for v in value):
            raise ValueError(f"{place} is {value!r}, expected a list of integers")
        return tuple(value)
    if annotation in ("Rounding", "Accumulator"):
        accepted = get_args(Rounding if annotation == "Rounding" else Accumulator)
        if value not in accepted:
            raise ValueError(f"{place} is {value!r}, expected one of {', '.join(accepted)}")
        return value
    expected: type = {"str": str, "int": int, "bool": bool}[annotation]
    if type(value) is not expected or (isinstance(value, int) and abs(value) >= 1 << 31):
        raise ValueError(f"{place} is {value!r}, expected {annotation}")
    return value


def _parts(value: Any, channels: int, place: str) -> tuple[PartWeights, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} is {value!r}, expected a list of parts")
    parts = []
    for entry in value:
        _check_keys(entry, place, ("part", "shifts"))
        shifts = _long(entry["shifts"], channels, f"{place}: 'shifts'")
        if not isinstance(entry["part"], str) or min(shifts) < 0 or max(shifts) > 62:
            raise ValueError(f"{place}: expected a part's name and shifts of 0 to 62")
        parts.append(PartWeights(entry["part"], shifts))
    return tuple(parts)


def _check_sizes(operation: Operation, where: str, dimensions: int) -> None:
    """Raise a ValueError for attributes that do not fit the number of axes, or that no operation can have."""
    axes: dict[str, tuple[int, int | None]] = {}  # name → entries, least value
    if isinstance(operation, Convolve):
        n = len(operation.strides)
        if n not in (0, dimensions):
            raise ValueError(
                f"{where}: 'strides' are for {n} axes, expected {dimensions}, or 0 for a linear layer"
            )
        axes = {"strides": (n, 1), "pads": (2 * n, 0), "dilations": (n, 1), "output_padding": (n, 0)}
        if operation.groups < 1:
            raise ValueError(f"{where}: 'groups' is {operation.groups}, expected 1 or more")
    elif isinstance(operation, MaxPool):
        axes = {"kernel": (dimensions, 1), "strides": (dimensions, 1), "pads": (2 * dimensions, 0), "dilations": (dimensions, 1)}  # fmt: skip
    elif isinstance(operation, SumPool):
        axes = {"kernel": (dimensions, 1), "strides": (dimensions, 1), "pads": (2 * dimensions, 0)}
    elif isinstance(operation, (Repeat, Interpolate)):
        axes = {"factors": (dimensions, 1)}
    elif isinstance(operation, Pad):
        axes = {"pads": (2 * dimensions, None)}
    elif isinstance(operation, Slice) and not 0 <= operation.axis <= dimensions:
        raise ValueError(f"{where}: 'axis' is {operation.axis}, expected 0 to {dimensions}")
    elif isinstance(operation, Round) and not -(1 << 24) <= operation.low <= operation.high <= 1 << 24:
        raise ValueError(f"{where}: rounds to {operation.low} to {operation.high}, expected 24 bits at most")
    for name, (count, least) in axes.items():
        values: Sequence[int] = getattr(operation, name)
        if len(values) != count or (least is not None and any(v < least for v in values)):
            what = f"{count} integers" if least is None else f"{count} integers of at least {least}"
            raise ValueError(f"{where}: '{name}' is {list(values)}, expected {what}")
    if isinstance(operation, Interpolate) and any(f & (f - 1) for f in operation.factors):
        raise ValueError(f"{where}: 'factors' are {list(operation.factors)}, expected powers of two")


def _checksum(document: dict[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _short(values: Ints) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _long(value: Any, channels: int, where: str) -> Ints:
    if _is_int(value):
        return (value,) * channels
    if not isinstance(value, list) or len(value) != channels or not all(_is_int(v) for v in value):
        raise ValueError(f"{where} is {value!r}, expected an integer, or {channels} of them")
    return tuple(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_keys(document: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(document, dict):
        raise ValueError(f"{where}: found a {type(document).__name__}, expected an object")
    missing = [key for key in required if key not in document]
    unknown = [key for key in document if key not in required + optional]
    if missing or unknown:
        found = f"missing {missing}" if missing else f"unknown {unknown}"
        raise ValueError(f"{where}: {found}; expected the keys {', '.join(required + optional)}")
