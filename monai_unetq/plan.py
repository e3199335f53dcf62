"""``QuantPlan``: which layer gets which number formats; a small JSON document, validated on the way in.

Imports no torch: ``runtime/`` and the command line read plans too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .formats import QFormat
from .parts import WHOLE, check_part_names

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerPlan", "QuantPlan"]

VERSION = 1

BiasRounding = Literal["accumulator", "float"]

LAYER_CLASSES = (
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Linear",
)


@dataclass(frozen=True)
class LayerPlan:
    """Formats of one layer.

    A split convolution has a format for each of its parts, by the part's name (``skip``, ``skip.1``, …, ``up``). What
    is given once, as ``input``, holds for every part.

    Args:
        weights: format of the weight, or of each part of it.
        inputs: format of the input, or of each part of it.
        bias: ``accumulator`` rounds the bias to the grid input step × weight step (the finest of the parts'),
            ``float`` leaves it.
        channels: part and its input channels, for each part in their order, where the plan is to say how the layer
            is split.
        output: format of the output, for a layer in front of an instance or group norm; by default it is not rounded.

    Raises:
        ValueError: if parts have other names, or weights, inputs and channels are not those of the same parts, or the
            output's format is ``float``.
    """

    weights: Mapping[str, QFormat]
    inputs: Mapping[str, QFormat]
    bias: BiasRounding = "accumulator"
    channels: tuple[tuple[str, int], ...] | None = None
    output: QFormat | None = None

    def __post_init__(self) -> None:
        if self.output is not None and self.output.is_float:
            raise ValueError("'output' is float, expected a format, or none where it is not rounded")
        for key, formats in (("weights", self.weights), ("inputs", self.inputs)):
            if not isinstance(formats, Mapping):
                raise ValueError(
                    f"'{key}' is a {type(formats).__name__}, expected formats by part; LayerPlan.whole takes one for all"
                )
        given: dict[str, Sequence[str]] = {"weight": list(self.weights), "input": list(self.inputs)}
        if self.channels is not None:
            given["parts"] = [part for part, _ in self.channels]
        for key, entry in given.items():
            check_part_names(entry, f"'{key}'")
        named = {key: sorted(entry) for key, entry in given.items() if set(entry) != {WHOLE}}
        if len({tuple(names) for names in named.values()}) > 1:
            found = ", ".join(f"'{key}' has {names}" for key, names in named.items())
            raise ValueError(f"{found}; expected the same parts, or one format for all of them")
        if WHOLE in given.get("parts", ()):
            raise ValueError(f"'parts' names '{WHOLE}', expected the parts of a split convolution")

    @classmethod
    def whole(cls, weight: QFormat, input: QFormat, bias: BiasRounding = "accumulator") -> LayerPlan:
        """The formats of a layer that is not split, or one format for all parts."""
        return cls({WHOLE: weight}, {WHOLE: input}, bias)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that formats are given for, in the order of the channels where they are known."""
        for names in ([part for part, _ in self.channels or ()], self.weights, self.inputs):
            if names and WHOLE not in names:
                return tuple(names)
        return (WHOLE,)

    def weight_of(self, part: str) -> QFormat:
        """The weight's format in one part.

        Raises:
            KeyError: if there is no such part.
        """
        return self.weights[WHOLE] if WHOLE in self.weights else self.weights[part]

    def input_of(self, part: str) -> QFormat:
        """The input's format in one part.

        Raises:
            KeyError: if there is no such part.
        """
        return self.inputs[WHOLE] if WHOLE in self.inputs else self.inputs[part]

    @property
    def weight(self) -> QFormat:
        """The weight's one format.

        Raises:
            ValueError: if every part has its own.
        """
        return _only(self.weights, "weight")

    @property
    def input(self) -> QFormat:
        """The input's one format.

        Raises:
            ValueError: if every part has its own.
        """
        return _only(self.inputs, "input")

    @property
    def is_float(self) -> bool:
        """Whether nothing of the layer is quantized."""
        return all(f.is_float for f in (*self.weights.values(), *self.inputs.values()))


def _only(formats: Mapping[str, QFormat], what: str) -> QFormat:
    if set(formats) != {WHOLE}:
        raise ValueError(f"the layer's {what} has the parts {sorted(formats)}, not one format")
    return formats[WHOLE]


FLOAT_LAYER = LayerPlan.whole(QFormat("float"), QFormat("float"), "float")


@dataclass(frozen=True)
class QuantPlan:
    """Formats of a network's layers, by layer name, and how scales that are not static are found.

    Args:
        layers: layer name → formats. Layers that are not named stay float.
        scale: ``power-of-two`` keeps ``intN`` a fixed-point format whose radix point is found by calibration or
            training; ``free`` allows any scale (``pow2-B`` keeps powers of two).
        granularity: ``channel`` gives weights whose scale is open one for each output channel, ``tensor`` one in all.
        learned: scales that formats leave open are trained (LSQ), not only found from the values (those of ``pow2-B``
            are not).
    """

    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    scale: Literal["power-of-two", "free"] = "power-of-two"
    granularity: Literal["channel", "tensor"] = "channel"
    learned: bool = False

    def __post_init__(self) -> None:
        for key, value, accepted in (
            ("scale", self.scale, ("power-of-two", "free")),
            ("granularity", self.granularity, ("channel", "tensor")),
            ("learned", self.learned, (False, True)),
        ):
            if value not in accepted or not isinstance(value, type(accepted[0])):  # 1 == True
                raise ValueError(f"plan: '{key}' is {value!r}, expected one of {accepted}")

    def __getitem__(self, name: str) -> LayerPlan:
        return self.layers.get(name, FLOAT_LAYER)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    @classmethod
    def uniform(
        cls,
        network: nn.Module,
        weights: str | QFormat,
        activations: str | QFormat,
        input: str | QFormat | None = None,
        first: str | QFormat | None = None,
        last: str | QFormat | None = None,
        keep_float: Sequence[str] = (),
        scale: Literal["power-of-two", "free"] = "power-of-two",
        granularity: Literal["channel", "tensor"] = "channel",
        learned: bool = False,
        image_layers: Sequence[str] = (),
        last_layer: str | None = None,
    ) -> QuantPlan:
        """The same formats for every convolution, transposed convolution and linear layer of a network.

        Args:
            network: float or quantized.
            weights: format of all weights, such as ``"Q0.4"``.
            activations: format of all activations, such as ``"Q6.0"``; ``quantize`` makes it unsigned where the
                tensor cannot be negative.
            input: format of the first layer's input, the image; ``activations`` by default, which is rarely
                what an image in [0, 1] needs: ``UQ0.8`` fits.
            first: weight format of the first layer(s), ``"float"`` keeps all of them float.
            last: weight format of the last layer, ``"float"`` keeps all of it float.
            keep_float: names or shell patterns of layers that stay float.
            scale: see the class.
            granularity: see the class.
            learned: see the class.
            image_layers: the layers that ``input`` and ``first`` are for, where they are not the one that was
                registered first: ``observe(network, example).image_layers()``.
            last_layer: the one that ``last`` is for, where it is not the one that was registered last.

        Raises:
            ValueError: if the network has no such layer, a format is none, or a pattern matches no layer.
        """
        names = [n for n, m in network.named_modules() if _base_name(m) in LAYER_CLASSES]
        if not names:
            raise ValueError(
                f"{type(network).__name__} has no layer of the classes {', '.join(LAYER_CLASSES)}"
            )
        for pattern in keep_float:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"keep_float: {pattern!r} matches none of the layers {', '.join(names)}")
        weight, activation = QFormat(str(weights)), QFormat(str(activations))
        weight_of, input_of = dict.fromkeys(names, weight), dict.fromkeys(names, activation)
        begin = [name for name in image_layers if name in weight_of] or names[:1]
        end = last_layer if last_layer in weight_of else names[-1]
        if input is not None:
            input_of.update(dict.fromkeys(begin, QFormat(str(input))))
        for name, override in (*((name, first) for name in begin), (end, last)):
            if override is not None:
                weight_of[name] = QFormat(str(override))
                if weight_of[name].is_float:
                    input_of[name] = weight_of[name]
        layers = {
            name: LayerPlan.whole(weight_of[name], input_of[name])
            for name in names
            if not any(fnmatchcase(name, pattern) for pattern in keep_float)
        }
        layers = {name: layer for name, layer in layers.items() if not layer.is_float}
        return cls(layers, scale=scale, granularity=granularity, learned=learned)

    def with_layers(self, changes: Mapping[str, LayerPlan]) -> QuantPlan:
        """The same plan with some layers' formats replaced or added."""
        return replace(self, layers={**self.layers, **changes})

    def with_outputs(self, names: Iterable[str], output: str | QFormat) -> QuantPlan:
        """The same plan, the outputs of some layers rounded, where they are in the plan.

        Args:
            names: of layers in front of instance or group norms: ``observe(network, example).normalized_layers()``.
            output: their format, such as ``"int8"``: engines then run the norms on 8-bit integers.
        """
        number_format = QFormat(str(output))
        return self.with_layers(
            {name: replace(self.layers[name], output=number_format) for name in names if name in self.layers}
        )

    def without(self, patterns: Sequence[str]) -> QuantPlan:
        """The same plan, layers of these names or shell patterns left float.

        Raises:
            ValueError: if a pattern matches no layer of the plan.
        """
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.layers):
                raise ValueError(
                    f"keep_float: {pattern!r} matches none of the layers {', '.join(self.layers)}"
                )
        kept = {
            n: p for n, p in self.layers.items() if not any(fnmatchcase(n, pattern) for pattern in patterns)
        }
        return replace(self, layers=kept)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON document."""
        return {
            "version": VERSION,
            "scale": self.scale,
            "granularity": self.granularity,
            "learned": self.learned,
            "layers": {
                name: {
                    "weight": _spelled(layer.weights),
                    "input": _spelled(layer.inputs),
                    "bias": layer.bias,
                    **({} if layer.channels is None else {"parts": [list(part) for part in layer.channels]}),
                    **({} if layer.output is None else {"output": str(layer.output)}),
                }
                for name, layer in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, document: Any, source: str = "plan") -> QuantPlan:
        """The plan of a JSON document.

        Args:
            document: what ``to_json`` returns, or a file's parsed content.
            source: what error messages call the document.

        Raises:
            ValueError: if a key is missing, unknown or of the wrong kind, or a format is none.
        """
        _check_keys(
            document, source, required=("version", "layers"), optional=("scale", "granularity", "learned")
        )
        if document["version"] != VERSION or isinstance(document["version"], bool):
            raise ValueError(f"{source}: 'version' is {document['version']!r}, this program reads {VERSION}")
        if not isinstance(document["layers"], dict):
            raise ValueError(
                f"{source}: 'layers' is a {type(document['layers']).__name__}, expected an object"
            )
        layers = {}
        for name, entry in document["layers"].items():
            where = f"{source}: layer '{name}'"
            _check_keys(entry, where, required=("weight", "input"), optional=("bias", "parts", "output"))
            bias = entry.get("bias", "accumulator")
            if bias not in ("accumulator", "float"):
                raise ValueError(f"{where}: 'bias' is {bias!r}, expected 'accumulator' or 'float'")
            weights, inputs = (_formats(entry[key], f"{where}: '{key}'") for key in ("weight", "input"))
            channels = _channels(entry.get("parts"), where)
            output = _format(entry["output"], f"{where}: 'output'") if "output" in entry else None
            try:
                layers[name] = LayerPlan(weights, inputs, bias, channels, output)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        options = {key: document[key] for key in ("scale", "granularity", "learned") if key in document}
        try:
            return cls(layers, **options)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as a JSON file, atomically."""
        path = Path(path)
        scratch = path.with_name(path.name + ".part")
        try:
            scratch.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> QuantPlan:
        """Read a plan file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no plan; the message names the file and the key.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from None
        return cls.from_json(document, str(path))


def _base_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Quant").removeprefix("Split")


def _spelled(formats: Mapping[str, QFormat]) -> str | dict[str, str]:
    if set(formats) == {WHOLE}:
        return str(formats[WHOLE])
    return {part: str(number_format) for part, number_format in formats.items()}


def _formats(entry: Any, where: str) -> dict[str, QFormat]:
    if not isinstance(entry, dict):
        return {WHOLE: _format(entry, where)}
    if not entry:
        raise ValueError(f"{where} names no part, expected a format, or one for each part")
    return {part: _format(spelling, f"{where} ({part})") for part, spelling in entry.items()}


def _channels(entry: Any, where: str) -> tuple[tuple[str, int], ...] | None:
    if entry is None:
        return None
    # A list, because the order of an object's keys means nothing in JSON.
    if not isinstance(entry, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in entry):
        raise ValueError(
            f"{where}: 'parts' is {entry!r}, expected pairs of part and channels, in their order"
        )
    for part, count in entry:
        if not isinstance(part, str) or not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(
                f"{where}: 'parts' has {[part, count]}, expected a part and a positive number of channels"
            )
    return tuple((part, count) for part, count in entry)


def _format(spelling: Any, where: str) -> QFormat:
    try:
        return QFormat(spelling)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_keys(document: Any, source: str, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    if not isinstance(document, dict):
        raise ValueError(f"{source}: found a {type(document).__name__}, expected an object")
    missing = [key for key in required if key not in document]
    unknown = [key for key in document if key not in required + optional]
    if missing or unknown:
        found = f"missing {missing}" if missing else f"unknown {unknown}"
        raise ValueError(f"{source}: {found}; expected the keys {', '.join(required + optional)}")
