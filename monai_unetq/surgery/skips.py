"""``find_skips``: which convolutions run over a concatenation of skip connections and an upsampled path.

Every tensor of one observed pass carries what is known of its channels: which layer made them, what they depend on,
and whether all of them came from a lower resolution. Operations that keep channels apart (normalization, activation,
dropout, pooling, interpolation, views) pass this on, concatenations put it side by side, all others merge it. No
class name decides anything (design decision 4).

Of the parts of a concatenation those are ``up`` whose information at this resolution all came from a lower one, and
the others ``skip``: a skip brings in what never left this resolution, also where it was gated by the upsampled path
or has passed a decoder of its own. One value for the whole image, spread out again, is no upsampled path. Where that
tells nothing, the deepest part is ``up`` and the others, which it goes around, are ``skip``: at the bottom of a U-Net,
which has no lower resolution, and in a network that draws its skips from tokens. Elsewhere (dense blocks, parallel
branches) a concatenation is none of a skip and an upsampled path, and not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import prod
from typing import Any, cast

from torch import Tensor, nn

from ..layers import SPLIT_LAYERS, QuantizedLayer, SplitLayer
from ..parts import Part, PartKind, parts_of
from .observe import TRANSPOSED, LayerCall, Operation, Trace, example_for, observe

__all__ = ["SkipConvolution", "Skips", "find_skips"]


@dataclass(frozen=True)
class SkipConvolution:
    """A concatenation of skips and an upsampled path, and the layer that reads it.

    Attributes:
        layer: the layer's name; for what reads the concatenation without being a layer, the module it is in.
        parts: the parts of its input channels, in order, with the layers that made them.
        resolution: spatial shape of its input.
        parameters: weights of each part.
        macs: multiply-accumulates of each part, for one image of the example's size.
        reason: why ``split`` leaves it alone; empty where it can be split.
    """

    layer: str
    parts: tuple[Part, ...]
    resolution: tuple[int, ...]
    parameters: tuple[int, ...] = ()
    macs: tuple[int, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SkipConvolution:
        """What a JSON document says that ``to_json`` made.

        Raises:
            KeyError: if a key is missing.
            TypeError: if something is of another kind.
            ValueError: if there are not as many weights and MACs as parts.
        """
        numbers = {key: tuple(map(int, document[key])) for key in ("resolution", "parameters", "macs")}
        parts = tuple(Part(**part) for part in document["parts"])
        found = cls(str(document["layer"]), parts, **numbers, reason=str(document["reason"]))
        if not found.reason and not len(parts) == len(found.parameters) == len(found.macs):
            raise ValueError(f"'{found.layer}' has {len(parts)} parts, expected parameters and MACs of each")
        return found


class Skips(tuple[SkipConvolution, ...]):
    """What ``find_skips`` found, in the order in which the layers run; prints as a table."""

    __slots__ = ()

    @property
    def splittable(self) -> Skips:
        """Those that ``split`` turns into split convolutions."""
        return Skips(found for found in self if not found.reason)

    def to_json(self) -> list[dict[str, Any]]:
        """As a JSON document."""
        return [found.to_json() for found in self]

    @classmethod
    def from_json(cls, document: Any, source: str = "skips") -> Skips:
        """What a JSON document says that ``to_json`` made.

        Args:
            document: the document, or a file's parsed content.
            source: what error messages call it.

        Raises:
            ValueError: if it is none.
        """
        try:
            return cls(SkipConvolution.from_json(entry) for entry in document)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: not what find_skips found: {error}") from None

    def __str__(self) -> str:
        if not self:
            return "no concatenation of a skip and an upsampled path"
        header = ("layer", "part", "channels", "made by", "resolution", "parameters", "MACs")
        rows: list[tuple[str, ...]] = [header]
        for found in self.splittable:
            resolution = "×".join(map(str, found.resolution))
            for number, part in enumerate(found.parts):
                cells = (found.layer, resolution) if number == 0 else ("", "")
                rows.append(
                    (cells[0], part.name, str(part.channels), part.source or "the input", cells[1],
                     f"{found.parameters[number]:,}", f"{found.macs[number]:,}")
                )  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in widths))
        numbers = {2, 5, 6}
        lines = [
            "  ".join(
                cell.rjust(width) if column in numbers else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        alone = [
            f"left alone: {found.layer or 'the network'}: {found.reason}" for found in self if found.reason
        ]
        return "\n".join((lines if self.splittable else []) + alone)


def find_skips(network: nn.Module, example: Tensor | None = None) -> Skips:
    """Find every convolution over a concatenation of skip connections and an upsampled path, in one forward pass.

    The network is left as it is: no hooks, no state, the same random numbers after it. Nothing is read off class
    names, so it works on any network whose forward runs, also on the meta device.

    Args:
        network: float or quantized, split or not.
        example: an input that it accepts, (N, C, spatial…), on its device; found out from its first convolution by
            default. Its size decides the resolutions and MACs that are reported, nothing else.

    Returns:
        what was found, also what cannot be split and why; ``print`` shows it as a table.

    Raises:
        ValueError: if the network fails on the example.

    Example:
        >>> print(find_skips(network, torch.zeros(1, 1, 128, 128)))
    """
    example = example_for(network) if example is None else example
    trace = observe(network, example)
    modules = dict(network.named_modules())
    flow = _Flow(trace, modules)
    flow.run()
    return Skips(flow.found(example.shape[0]))


@dataclass(frozen=True)
class _Leaf:
    """What is known of channels that came together.

    Attributes:
        source: the layer that made them; empty for the network's input.
        made: number of that layer's call, -1 for the network's input, -2 for a constant.
        seen: the calls that they depend on, a bit each.
        depth: layers on the longest way to them.
        below: whether all of it, at the resolution it has, came from a lower one.
        kind: what it is in the last concatenation that it went into; None before, and where that is none of ours.
    """

    source: str
    made: int
    seen: int
    depth: int
    below: bool
    kind: PartKind | None = None


@dataclass(frozen=True)
class _Value:
    """What is known of one tensor: its leaves, which of them each channel belongs to, and how many voxels it had
    where its layout was last known.
    """

    leaves: tuple[_Leaf, ...]
    voxels: int
    axis: int = 0
    owners: tuple[int, ...] = ()  # empty where there is one leaf

    def each(self, change: Callable[[_Leaf], _Leaf]) -> _Value:
        return replace(self, leaves=tuple(change(leaf) for leaf in self.leaves))

    def with_owners(self, axis: int, owners: Sequence[int]) -> _Value:
        """The same leaves, as far as channels of them are left."""
        kept = sorted(set(owners))
        if len(kept) < 2:
            return _Value(tuple(self.leaves[i] for i in kept) or self.leaves[:1], self.voxels)
        number = {leaf: i for i, leaf in enumerate(kept)}
        return _Value(
            tuple(self.leaves[i] for i in kept), self.voxels, axis, tuple(number[i] for i in owners)
        )


_CONSTANT = _Leaf("", -2, 0, 0, False)

# Operations that give every channel a result of its own, of the same number of channels, in the same layout.
_RESAMPLING = (
    "max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "upsample_",
    "_upsample_", "grid_sampler", "fractional_max_pool",
)  # fmt: skip
_NORMS = ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm")
_SAME = {
    "clone", "contiguous", "_to_copy", "detach", "alias", "native_dropout", "dropout", "feature_dropout",
    "lift_fresh", "expand", "copy_", "_reshape_alias",
    # Functions of single values that torch does not tag as such.
    "_prelu_kernel", "hardswish", "hardswish_", "rrelu_with_noise", "rrelu_with_noise_", "log_sigmoid_forward",
}  # fmt: skip
_STATISTICS = {
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "linalg_vector_norm",
    "norm",
}
_VIEWS = {"view", "_unsafe_view", "reshape"}


_MOST_OWNERS = 1 << 18


class _Flow:
    """Follows the channels through a trace."""

    def __init__(self, trace: Trace, modules: Mapping[str, nn.Module]) -> None:
        self.trace = trace
        self.modules = modules
        self.values: dict[int, _Value] = {}
        self.readers: dict[tuple[str, str], list[SkipConvolution]] = {}
        self.buffers: set[int] = set()  # made empty, and filled piece by piece
        self.slices: dict[int, tuple[int, int, int]] = {}  # view of a buffer → buffer, axis, where it begins

    def run(self) -> None:
        shape = self.trace.shapes[self.trace.network_input]
        voxels = prod(shape[2:])
        self.bottom = self._bottom()
        self.values[self.trace.network_input] = _Value((_Leaf("", -1, 0, 0, False),), voxels)
        calls = list(enumerate(self.trace.calls))
        for position, operation in enumerate(self.trace.operations):
            while calls and calls[0][1].position <= position:
                self._call(*calls.pop(0))
            if not operation.layer:
                self._operation(operation)
        for number, call in calls:
            self._call(number, call)

    def _bottom(self) -> int:
        """Voxels of the lowest resolution that a convolution runs at, of a network that comes up again; else 0."""
        sizes, changes = [], []
        for call in self.trace.calls:
            module = self.modules[call.layer]
            if not isinstance(module, nn.Linear):
                axis = 1 - cast(Tensor, module.weight).dim()
                sizes += [prod(shape[axis + 1 :]) for shape in (call.input_shape, call.output_shape)]
                changes.append(_call_change(module))
        for op in self.trace.operations:
            if op.name.startswith(_RESAMPLING) and not op.layer:
                shape, after = (self.trace.shapes[t] for t in (op.inputs[0], op.outputs[0]))
                changes.append(_operation_change(op, shape, after))
        comes_up = any(change > 0 for change in changes) or not any(change < 0 for change in changes)
        return min((size for size in sizes if size > 1), default=0) if comes_up else 0

    def found(self, batch: int) -> list[SkipConvolution]:
        """One entry for each layer, whatever the number of its calls; MACs for one image."""
        result = []
        for entries in self.readers.values():
            first = entries[0]
            names = {tuple((p.name, p.channels) for p in entry.parts) for entry in entries}
            calls = len(self.trace.calls_of(first.layer)) if first.parameters else len(entries)
            if len(names) > 1 or calls != len(entries):
                first = replace(first, reason="it runs on several inputs, whose parts differ")
            macs = tuple(sum(entry.macs[i] for entry in entries) // batch for i in range(len(first.macs)))
            result.append(replace(first, macs=macs))
        return result

    def _call(self, number: int, call: LayerCall) -> None:
        """A layer: its result is one new leaf."""
        module = self.modules[call.layer]
        value = self.values.get(call.input) or _Value((_CONSTANT,), prod(call.input_shape[2:]))
        dimensions = cast(Tensor, module.weight).dim()
        leaf = _merged(value.leaves)
        voxels = value.voxels
        if not isinstance(module, nn.Linear):
            axis = len(call.input_shape) - dimensions + 1
            self._read(call, module, value, axis)
            before, voxels = prod(call.input_shape[axis + 1 :]), prod(call.output_shape[axis + 1 :])
            leaf = _resampled(leaf, before - value.voxels)
            leaf = _resampled(leaf, _call_change(module))
        else:
            self._read(call, module, value, len(call.input_shape) - 1)
        made = _Leaf(call.layer, number, leaf.seen | 1 << number, leaf.depth + 1, leaf.below)
        self.values[call.output] = _Value((made,), voxels)

    def _read(self, call: LayerCall, module: nn.Module, value: _Value, axis: int) -> None:
        """Take note of a layer that reads a concatenation."""
        if not value.owners or value.axis != axis or len(value.owners) != call.input_shape[axis]:
            return
        runs = [(owner, len(list(run))) for owner, run in groupby(value.owners)]
        parts = _parts(value, runs)
        if not parts:
            return
        interleaved = len({owner for owner, _ in runs}) < len(runs)
        reason = "the channels of its parts are interleaved" if interleaved else _unfit(module)
        weight = cast(Tensor, module.weight)
        places = applications(call, module)
        counts = tuple(weight.numel() * part.channels // len(value.owners) for part in parts)
        entry = SkipConvolution(
            call.layer,
            parts,
            call.input_shape[axis + 1 :],
            counts,
            tuple(count * places for count in counts),
            reason,
        )
        self.readers.setdefault((call.layer, ""), []).append(entry)

    def _mix(self, operation: Operation, tensor: int, value: _Value) -> None:
        """Take note of an operation that mixes the parts of a concatenation without being a layer."""
        if not value.owners:
            return
        runs = [(owner, len(list(run))) for owner, run in groupby(value.owners)]
        parts = _parts(value, runs)
        # A number for each channel, or a copy, reads the concatenation and leaves it as it is.
        if not parts or operation.name in _STATISTICS:
            return
        reason = (
            f"'{operation.name}' reads the concatenation of {_spoken(parts)}, and is no convolution layer"
        )
        spatial = self.trace.shapes[tensor][value.axis + 1 :]
        entry = SkipConvolution(operation.module, parts, spatial, reason=reason)
        self.readers.setdefault((operation.module, operation.name), [entry])

    def _operation(self, op: Operation) -> None:
        known = [t for t in op.inputs if t in self.values]
        if op.name == "slice" and (op.inputs[0] not in self.values or op.inputs[0] in self.buffers):
            self._sliced(op)
        if not known or op.name.endswith("_like") or op.name.startswith("new_"):
            return  # made of constants and parameters only, or of no values at all
        if op.name in ("cat", "stack"):
            results: list[_Value] | None = [self._concatenated(op)]
        elif op.name == "copy_" and op.inputs[0] in self.slices:
            results = [self._written(op)]
        else:
            results = self._passed(op, known)
        if results is None:
            for tensor in known:
                self._mix(op, tensor, self.values[tensor])
            results = [self._collapsed(known)] * len(op.outputs)
        for tensor, value in zip(op.outputs, results, strict=False):
            self.values[tensor] = value

    def _collapsed(self, tensors: Sequence[int]) -> _Value:
        """One leaf of all that goes in; its source is that of the largest tensor, of equal ones the last that was made."""
        size = {t: prod(self.trace.shapes[t]) for t in tensors}
        largest = [t for t in tensors if size[t] == max(size.values())]
        leaf = _merged([leaf for t in tensors for leaf in self.values[t].leaves])
        main = _merged([leaf for t in largest for leaf in self.values[t].leaves])
        return _Value(
            (replace(leaf, source=main.source, made=main.made),), max(self.values[t].voxels for t in tensors)
        )

    def _concatenated(self, op: Operation) -> _Value:
        axis = _axis(op.arguments.get("dim", 0), len(self.trace.shapes[op.outputs[0]]))
        operands = [t for t in op.inputs if prod(self.trace.shapes[t])]  # cat skips empty tensors
        known = [t for t in operands if t in self.values]
        first = self.values[known[0]]
        if (
            first.owners
            and first.axis != axis
            and all(
                t in self.values
                and (self.values[t].axis, self.values[t].owners) == (first.axis, first.owners)
                for t in operands
            )
        ):
            return first  # images put together, with the same parts
        leaves: list[_Leaf] = []
        owners: list[int] = []
        images = len(self.trace.shapes[op.outputs[0]]) == len(self.trace.shapes[self.trace.network_input])
        for tensor in operands:
            shape = self.trace.shapes[tensor]
            value = self.values.get(tensor, _Value((_CONSTANT,), prod(shape[2:])))
            if axis == 1 and images:
                value = _settled(value, prod(shape[2:]))
            if value.owners and value.axis == axis and op.name == "cat":
                owners += [len(leaves) + owner for owner in value.owners]
                leaves += value.leaves
            else:
                if value.owners and tensor in self.values:
                    value = self._collapsed([tensor])
                owners += [len(leaves)] * (shape[axis] if op.name == "cat" else 1)
                leaves += value.leaves
        voxels = max(self.values[t].voxels for t in known)
        if axis == 1 and images:
            voxels = prod(self.trace.shapes[op.outputs[0]][2:])
        return self._decided(_Value(tuple(leaves), voxels).with_owners(axis, owners))

    def _sliced(self, op: Operation) -> None:
        """Remember which part of a buffer a view of it is; one along a single axis."""
        buffer, view = op.inputs[0], op.outputs[0]
        shape, after = self.trace.shapes[buffer], self.trace.shapes[view]
        axis = _axis(op.arguments.get("dim", 0), len(shape))
        root, along, start = self.slices.get(buffer, (buffer, axis, 0))
        self.buffers.update((root, view))
        if shape == after:
            self.slices[view] = (root, along, start)
        elif along == axis and op.arguments.get("step", 1) == 1:
            begin = op.arguments.get("start") or 0
            self.slices[view] = (root, axis, start + (begin if begin >= 0 else begin + shape[axis]))

    def _written(self, op: Operation) -> _Value:
        """What a copy into a part of a buffer makes of the buffer: a concatenation, made piece by piece."""
        buffer, axis, start = self.slices[op.inputs[0]]
        source, shape = op.inputs[-1], self.trace.shapes[buffer]
        new = self._collapsed([source]) if source in self.values else _Value((_CONSTANT,), prod(shape[2:]))
        old = self.values.get(buffer, _Value((_CONSTANT,), prod(shape[2:])))
        if old.owners and old.axis != axis:
            old = self._collapsed([buffer])
        owners = list(old.owners or [0] * shape[axis])
        size = self.trace.shapes[op.inputs[0]][axis]
        owners[start : start + size] = [len(old.leaves)] * size
        value = _Value((*old.leaves, *new.leaves), prod(shape[2:])).with_owners(axis, owners)
        self.values[buffer] = self._decided(value)
        return new

    def _decided(self, value: _Value) -> _Value:
        """The value of a concatenation once its parts are told apart, as they are when they meet."""
        kinds = _kinds(value.leaves, value.voxels == self.bottom)
        leaves = [replace(leaf, kind=kind) for leaf, kind in zip(value.leaves, kinds, strict=True)]
        return replace(value, leaves=tuple(leaves))

    def _passed(self, op: Operation, known: list[int]) -> list[_Value] | None:
        """What an operation that keeps channels apart makes of them; None for one that mixes them."""
        first = op.inputs[-1 if op.name == "copy_" else 0]
        if first not in self.values:
            return self._pointwise(op, known) if op.pointwise else None
        value, shape, after = (
            self.values[first],
            self.trace.shapes[first],
            self.trace.shapes[op.outputs[0]],
        )
        name = op.name
        if any(norm in name for norm in _NORMS) or name in _SAME:
            if len(shape) != len(after):
                return None
            # Further results are statistics and masks.
            return [value] + [_Value((_merged(value.leaves),), value.voxels)] * (len(op.outputs) - 1)
        if name.startswith(_RESAMPLING):
            change = _operation_change(op, shape, after)
            value = _settled(value, prod(shape[2:])).each(lambda leaf: _resampled(leaf, change))
            return [replace(value, voxels=prod(after[2:]))] * len(op.outputs)
        if "_pad" in name:
            value = replace(value, voxels=value.voxels * prod(after) // max(prod(shape), 1))
        if op.pointwise:
            return self._pointwise(op, known)
        if not value.owners:
            return [value if known == [first] else self._collapsed(known)] * len(op.outputs)
        if name in _VIEWS:
            found = _reshaped(value, shape, after)
            return None if found is None else [found]
        return _moved(op, value, shape, after)

    def _pointwise(self, op: Operation, known: list[int]) -> list[_Value] | None:
        """A function of single values: a gate or a number for each channel changes nothing, a second operand of the
        same size mixes, unless it multiplies or has the same parts.
        """
        labelled = [t for t in known if self.values[t].owners]
        if not labelled:
            return [self._collapsed(known)] * len(op.outputs)
        value, shape = self.values[labelled[0]], self.trace.shapes[labelled[0]]
        if shape != self.trace.shapes[op.outputs[0]]:
            return None  # broadcast to more channels or voxels
        for tensor in known:
            other = self.values[tensor]
            if other.owners and (other.axis, other.owners) != (value.axis, value.owners):
                return None
            full = prod(self.trace.shapes[tensor]) == prod(shape)
            if not other.owners and full and op.name not in ("mul", "mul_", "div", "div_"):
                return None
        rest = [leaf for t in known for leaf in self.values[t].leaves if t != labelled[0]]

        def changed(leaf: _Leaf) -> _Leaf:
            with_rest = _merged([leaf, *rest])
            return replace(leaf, seen=with_rest.seen, depth=with_rest.depth)

        same = all(self.values[t].leaves == value.leaves for t in labelled) and len(labelled) == len(known)
        return [value if same else value.each(changed)] * len(op.outputs)


def applications(call: LayerCall, module: nn.Module) -> int:
    """How often a call applies the layer's weight: its multiply-accumulates, for each weight.

    A convolution applies it at every output voxel, a transposed one at every input voxel, a linear layer to every row.
    """
    if isinstance(module, nn.Linear):
        return prod(call.input_shape[:-1])
    transposed = isinstance(module, TRANSPOSED)
    shape = call.input_shape if transposed else call.output_shape
    return prod(shape) // shape[1 - cast(Tensor, module.weight).dim()]


def _parts(value: _Value, runs: Sequence[tuple[int, int]]) -> tuple[Part, ...]:
    """The parts of a concatenation, from its runs of channels; none where it is not one of skips and an upsampled path."""
    found: list[tuple[PartKind, int, str]] = []
    for owner, channels in runs:
        leaf = value.leaves[owner]
        if leaf.kind is None:
            return ()
        found.append((leaf.kind, channels, leaf.source))
    return parts_of(found) if len({kind for kind, _, _ in found}) > 1 else ()


def _kinds(leaves: Sequence[_Leaf], at_bottom: bool) -> list[PartKind | None]:
    """Skip or up for each part of a concatenation; None for all where it is not one of skips and an upsampled path."""
    neither: list[PartKind | None] = [None] * len(leaves)
    below = [leaf.below for leaf in leaves]
    if any(below) and not all(below):
        return ["up" if flag else "skip" for flag in below]
    deepest = max(leaf.depth for leaf in leaves)
    top = [leaf for leaf in leaves if leaf.depth == deepest]
    if len(top) != 1 or not (all(below) or at_bottom):
        return neither
    around = [leaf for leaf in leaves if leaf is not top[0]]
    if not all(below):
        for leaf in around:
            if leaf.made == _CONSTANT.made or (leaf.made >= 0 and not top[0].seen >> leaf.made & 1):
                return neither
    return ["up" if leaf is top[0] else "skip" for leaf in leaves]


def _unfit(module: nn.Module) -> str:
    """Why a layer cannot be split; empty where it can."""
    plain = isinstance(module, (SplitLayer, QuantizedLayer)) or type(module) in SPLIT_LAYERS
    if isinstance(module, nn.Linear) or not plain:
        name = (
            "Linear" if isinstance(module, nn.Linear) else type(module).__name__
        )  # also once it is quantized
        return f"it is a {name}, expected one of {', '.join(c.__name__ for c in SPLIT_LAYERS)}"
    groups = cast(int, module.groups)
    return f"it has {groups} groups, each of which sees a part of the channels only" if groups != 1 else ""


def _spoken(parts: Sequence[Part]) -> str:
    return " and ".join(f"{part.name} ({part.source or 'the input'})" for part in parts)


def _merged(leaves: Sequence[_Leaf]) -> _Leaf:
    """One leaf of several: it depends on all of them; its source is the last that was made."""
    last = max(leaves, key=lambda leaf: leaf.made)
    seen = 0
    for leaf in leaves:
        seen |= leaf.seen
    varying = [leaf for leaf in leaves if leaf.made != _CONSTANT.made] or leaves
    return _Leaf(
        last.source,
        last.made,
        seen,
        max(leaf.depth for leaf in leaves),
        all(leaf.below for leaf in varying),
    )


def _resampled(leaf: _Leaf, change: int) -> _Leaf:
    """To a higher resolution (above 0), to a lower one (below 0), or to none other."""
    return replace(leaf, below=change > 0) if change else leaf


def _call_change(module: nn.Module) -> int:
    """1 where a layer raises the resolution, -1 where it lowers it; what it crops at the border does not count."""
    if isinstance(module, nn.Linear) or all(stride == 1 for stride in cast(tuple[int, ...], module.stride)):
        return 0
    return 1 if isinstance(module, TRANSPOSED) else -1


def _operation_change(op: Operation, shape: tuple[int, ...], after: tuple[int, ...]) -> int:
    """As ``_call_change``, of pooling and interpolation. One voxel that is spread out is not raised: it has no place."""
    before, voxels = prod(shape[2:]), prod(after[2:])
    if "pool" in op.name and "adaptive" not in op.name:
        stride = op.arguments.get("stride") or op.arguments.get("kernel_size", 2)
        if all(step == 1 for step in (stride if isinstance(stride, (list, tuple)) else (stride,))):
            return 0
    return 0 if before == 1 else voxels - before


def _settled(value: _Value, voxels: int) -> _Value:
    """The value once its layout is known: moving values about may have changed the resolution (pixel shuffle)."""
    change = voxels - value.voxels
    return replace(value.each(lambda leaf: _resampled(leaf, change)), voxels=voxels)


def _axis(dim: Any, rank: int) -> int:
    return int(dim) % max(rank, 1)


def _reshaped(value: _Value, shape: tuple[int, ...], after: tuple[int, ...]) -> _Value | None:
    """Channels after a view: value number i belongs to owners[i // inner % channels]; is that so for an axis of the
    result, too?
    """
    inner = prod(shape[value.axis + 1 :])
    for axis, size in enumerate(after):
        within = prod(after[axis + 1 :])
        if within == 0 or inner % within or (size * within) % inner:
            continue
        if len(value.owners) * (inner // within) > _MOST_OWNERS:
            return None  # as no layer over channels is so wide, nothing is lost
        period = [owner for owner in value.owners for _ in range(inner // within)]
        if size % len(period) == 0:
            return value.with_owners(axis, period * (size // len(period)))
        if len(period) % size == 0 and period == period[:size] * (len(period) // size):
            return value.with_owners(axis, period[:size])
    return None


def _moved(
    op: Operation, value: _Value, shape: tuple[int, ...], after: tuple[int, ...]
) -> list[_Value] | None:
    """Channels after an operation that moves values about; None for one that is not known to."""
    arguments, axis, rank = op.arguments, value.axis, len(shape)
    if op.name == "permute":
        order = [_axis(dim, rank) for dim in arguments["dims"]]
        return [value.with_owners(order.index(axis), value.owners)]
    if op.name == "flip":
        turned = axis in {_axis(dim, rank) for dim in arguments["dims"]}
        return [value.with_owners(axis, value.owners[::-1] if turned else value.owners)]
    if op.name == "roll":
        if not arguments.get("dims"):
            return None  # through all axes as one
        for shift, dim in zip(arguments["shifts"], arguments["dims"], strict=True):
            if _axis(dim, rank) == axis:
                start = -shift % len(value.owners)
                value = value.with_owners(axis, value.owners[start:] + value.owners[:start])
        return [value]
    if op.name in ("transpose", "t"):
        first, second = (
            _axis(arguments.get(key, default), rank) for key, default in (("dim0", 0), ("dim1", 1))
        )
        swapped = {first: second, second: first}
        return [value.with_owners(swapped.get(axis, axis), value.owners)]
    if op.name == "unsqueeze":
        new = _axis(arguments["dim"], rank + 1)
        return [value.with_owners(axis + (new <= axis), value.owners)]
    if op.name == "squeeze":
        given = arguments.get("dim", list(range(rank)))
        dims = {_axis(dim, rank) for dim in (given if isinstance(given, (list, tuple)) else [given])}
        gone = sum(shape[dim] == 1 for dim in dims if dim < axis)
        return [value.with_owners(axis - gone, value.owners)]
    if op.name == "slice":
        if _axis(arguments.get("dim", 0), rank) != axis:
            return [value]
        start, end = arguments.get("start"), arguments.get("end")
        return [value.with_owners(axis, value.owners[start : end : arguments.get("step", 1)])]
    if op.name == "select":
        dim = _axis(arguments["dim"], rank)
        return None if dim == axis else [value.with_owners(axis - (dim < axis), value.owners)]
    if op.name in ("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split"):
        dim = _axis(arguments.get("dim", 0), rank)
        if dim != axis:
            return [value] * len(op.outputs)
        given = arguments.get("split_sizes", arguments.get("split_size"))
        sizes = (
            given if isinstance(given, (list, tuple)) else _even(len(value.owners), given, len(op.outputs))
        )
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [
            value.with_owners(axis, value.owners[start : start + size])
            for start, size in zip(starts, sizes, strict=True)
        ]
    if op.name.endswith("pad_nd") or "_pad" in op.name:
        # Padding is given from the last axis on, two numbers each.
        padded = len(arguments.get("pad", arguments.get("padding", ()))) // 2
        return [value] if axis < rank - padded or after[axis] == shape[axis] else None
    if op.name in ("mean", "sum", "amax", "amin", "var", "std") and len(after) == rank:
        return [value] if after[axis] == shape[axis] else None
    if op.name == "repeat" and len(after) == rank:
        times = after[axis] // shape[axis]
        return [value.with_owners(axis, value.owners * times)]
    return None


def _even(count: int, size: int | None, pieces: int) -> list[int]:
    size = size or -(-count // pieces)
    return [min(size, count - start) for start in range(0, count, size)]
