"""Sensitivities made up for tests: units and Ω as numbers, without a network."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from monai_unetq.parts import WHOLE
from monai_unetq.sensitivity.table import KINDS, Kind, Sensitivities, Sensitivity
from monai_unetq.surgery.workload import Unit

__all__ = ["WIDTHS", "large", "made_up"]

WIDTHS = (2, 3, 4, 6, 8)


def made_up(
    units: Sequence[Unit], omega: Mapping[tuple[str, Kind], Mapping[int, float]], others: int = 5
) -> Sensitivities:
    """Ω by name of the unit and kind."""
    found = []
    for unit in units:
        for kind in KINDS:
            count, values = unit.weights if kind == "weight" else unit.inputs, omega[unit.name, kind]
            # With a trace of 1 the noise is Ω.
            found.append(Sensitivity(unit.layer, unit.part, kind, count, 1.0, 0.0, values, values))
    return Sensitivities({s.name: s for s in found}, "hessian", tuple(units), others, (1, 1, 8, 8), {})


def large(layers: int, seed: int) -> Sensitivities:
    """Random layers whose Ω falls by about 4 with each bit and differs between layers by up to 10^6."""
    rng = random.Random(seed)
    units, omega = [], {}
    for number in range(layers):
        weights, inputs = rng.randrange(100, 3_000_000), rng.randrange(1000, 5_000_000)
        units.append(
            Unit(f"layer{number}", WHOLE, weights, inputs, inputs, weights * rng.randrange(16, 4096), 8)
        )
        for kind in KINDS:
            scale = 10 ** rng.uniform(-3, 3)
            omega[units[-1].name, kind] = {b: scale * 4.0**-b * rng.uniform(0.8, 1.2) for b in WIDTHS}
    return made_up(units, omega, 1000)
