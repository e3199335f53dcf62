"""``Sensitivities``: how much each tensor minds being rounded to each width; a JSON document, in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..parts import WHOLE
from ..surgery.workload import Unit

__all__ = ["KINDS", "Kind", "Metric", "Sensitivities", "Sensitivity"]

VERSION = 1

Metric = Literal["hessian", "fisher", "sqnr", "drop"]
Kind = Literal["weight", "input"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Sensitivity:
    """One tensor: a layer's weight or input, or a part of it.

    Attributes:
        layer: the layer's name.
        part: ``input`` where the layer is not split; else the part's name.
        kind: ``weight`` or ``input``.
        count: values in it; of an input for one image.
        trace: the metric's number: the average Hessian trace tr(H)/count, the mean squared gradient, 1/‖T‖² for
            SQNR; NaN where the metric is measured for each width apart.
        error: its standard error; 0 where there is none.
        noise: bits → ‖Q(T) - T‖², for one image where it is an input.
        omega: bits → Ω, which allocation adds up: trace × noise (HAWQ-V2, Dong et al., arXiv 1911.03852, equation
            2.11), or what was measured. Never negative: a trace below 0 counts as 0.
    """

    layer: str
    part: str
    kind: Kind
    count: int
    trace: float
    error: float
    noise: Mapping[int, float]
    omega: Mapping[int, float]

    @property
    def name(self) -> str:
        """``layer.weight``, ``layer.input``, and where the layer is split ``layer.weight[skip]`` and so on."""
        return tensor_name(self.layer, self.part, self.kind)


def tensor_name(layer: str, part: str, kind: Kind) -> str:
    """What a tensor is called; see ``Sensitivity.name``."""
    base = f"{layer}.{kind}" if layer else kind
    return base if part == WHOLE else f"{base}[{part}]"


@dataclass(frozen=True)
class Sensitivities(Mapping[str, Sensitivity]):
    """Name → sensitivity, in the order in which layers run; with what allocation has to know of the network.

    Attributes:
        entries: by name.
        metric: what was measured.
        units: what each layer's parts hold and compute, for one image.
        other_parameters: values of parameters that stay float.
        image: shape of that image, (1, C, spatial…).
        conditions: what was run: seed, probes, images, formats' options; anything JSON holds.
    """

    entries: Mapping[str, Sensitivity]
    metric: Metric
    units: tuple[Unit, ...]
    other_parameters: int
    image: tuple[int, ...]
    conditions: Mapping[str, Any]

    def __getitem__(self, name: str) -> Sensitivity:
        try:
            return self.entries[name]
        except KeyError:
            raise KeyError(f"{name!r}; there are {', '.join(self.entries)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return {
            "version": VERSION,
            "metric": self.metric,
            "conditions": dict(self.conditions),
            "image": list(self.image),
            "other_parameters": self.other_parameters,
            "units": [unit.to_json() for unit in self.units],
            "tensors": {
                name: {
                    "layer": entry.layer,
                    "part": entry.part,
                    "kind": entry.kind,
                    "count": entry.count,
                    "trace": entry.trace if math.isfinite(entry.trace) else None,
                    "error": entry.error if math.isfinite(entry.error) else None,
                    "noise": {str(bits): value for bits, value in entry.noise.items()},
                    "omega": {str(bits): value for bits, value in entry.omega.items()},
                }
                for name, entry in self.entries.items()
            },
        }

    @classmethod
    def from_json(cls, document: Any, source: str = "sensitivities") -> Sensitivities:
        """What ``to_json`` wrote.

        Raises:
            ValueError: if it is none; the message names the source and the key.
        """
        if not isinstance(document, dict) or document.get("version") != VERSION:
            found = document.get("version") if isinstance(document, dict) else type(document).__name__
            raise ValueError(f"{source}: 'version' is {found!r}, this program reads {VERSION}")
        if document.get("metric") not in get_args(Metric):
            raise ValueError(
                f"{source}: 'metric' is {document.get('metric')!r}, expected one of {get_args(Metric)}"
            )
        where = source
        try:
            entries = {}
            for name, entry in document["tensors"].items():
                where = f"{source}: '{name}'"
                if entry["kind"] not in KINDS:
                    raise ValueError(f"'kind' is {entry['kind']!r}, expected one of {KINDS}")
                if not isinstance(entry["layer"], str) or not isinstance(entry["part"], str):
                    raise ValueError("'layer' and 'part' are no texts")
                trace = math.nan if entry["trace"] is None else float(entry["trace"])
                noise, omega = (
                    {int(bits): float(value) for bits, value in entry[key].items()}
                    for key in ("noise", "omega")
                )
                entries[name] = Sensitivity(
                    entry["layer"], entry["part"], entry["kind"], int(entry["count"]), trace,
                    math.inf if entry["error"] is None else float(entry["error"]), noise, omega,
                )  # fmt: skip
                if entries[name].name != name:
                    raise ValueError(f"it is of {entries[name].name}")
                for key, values in (("noise", noise), ("omega", omega)):
                    if not all(math.isfinite(value) and value >= 0 for value in values.values()):
                        raise ValueError(f"{key!r} holds a number that is negative, infinite or none")
                if set(noise) != set(omega):
                    raise ValueError(f"'noise' is of the widths {list(noise)}, 'omega' of {list(omega)}")
            where = source
            return cls(
                entries,
                document["metric"],
                tuple(Unit.from_json(unit) for unit in document["units"]),
                int(document["other_parameters"]),
                tuple(int(size) for size in document["image"]),
                dict(document["conditions"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"{where}: {type(error).__name__} {error}: not what 'unetq sensitivity' wrote"
            ) from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write them as a JSON file, atomically."""
        path = Path(path)
        scratch = path.with_name(path.name + ".part")
        try:
            scratch.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivities:
        """Read a file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds no sensitivities; the message names the file and the key.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from None
        return cls.from_json(document, str(path))
