"""``Request``: what a configuration of nnU-Net's plans asks for, its section ``monai_unetq``; read, checked and written.

Imports neither torch nor nnunetv2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ..formats import QFormat

__all__ = ["SECTION", "Request"]

SECTION = "monai_unetq"
"""The section's key in ``plans["configurations"][…]``."""

Metric = Literal["hessian", "fisher", "sqnr"]
Scale = Literal["power-of-two", "free"]

_COUNTS = ("epochs", "iterations", "val_iterations", "calibration_batches")


@dataclass(frozen=True)
class Request:
    """How a configuration of nnU-Net's plans is to be trained.

    Weights have one format (``weights``) or are allocated in each fold under ``budget``. The image has 8 bits, and so
    have the first and the last layer's weights.

    Attributes:
        base_plans: identifier of the plans that a float network was trained with; these plans' own by default.
        base_trainer: trainer of that float network. Where its fold is finished, there is no float phase.
        weights: format of the weights, such as ``int4`` or ``Q1.7``; None where a budget decides.
        budget: such as ``("weights=4.0bits",)``, see ``allocation.allocate``; empty where ``weights`` decides.
        choices: bit widths for the budget.
        activations: format of all activations; None where the budget decides on them, too.
        norms: format of what instance norms read, such as ``int8``: engines then run them on integers; None leaves it float.
        scale: of ``intN`` formats: ``power-of-two`` or ``free``.
        metric: of the allocation: ``sqnr``, ``fisher`` or ``hessian``.
        float_epochs: of the float phase, where there is one.
        epochs: of quantization-aware training.
        iterations: steps an epoch; nnU-Net's 250.
        val_iterations: of each epoch's validation; nnU-Net's 50.
        learning_rate: Adam's, of quantization-aware training.
        supervision: λ at the beginning, weight of the heads on the skips; 0 for none.
        distillation: μ, weight of the float network as a teacher; 0 for none.
        equalized: whether the channels of activations are brought to one range first, see ``surgery.equalize``.
        calibration_batches: batches of training cases for equalization, calibration and sensitivities.
    """

    base_plans: str | None = None
    base_trainer: str = "nnUNetTrainer"
    weights: str | None = None
    budget: tuple[str, ...] = ()
    choices: tuple[int, ...] = (2, 3, 4, 6, 8)
    activations: str | None = None
    norms: str | None = None
    scale: Scale = "power-of-two"
    metric: Metric = "sqnr"
    float_epochs: int = 1000
    epochs: int = 100
    iterations: int = 250
    val_iterations: int = 50
    learning_rate: float = 1e-3
    supervision: float = 0.1
    distillation: float = 1.0
    equalized: bool = True
    calibration_batches: int = 8

    def __post_init__(self) -> None:
        if (self.weights is None) == (not self.budget):
            raise ValueError(
                f"weights is {self.weights!r}, budget {list(self.budget)}; expected one of them: a format for all "
                "weights, such as 'int4', or a budget, such as 'weights=4.0bits'"
            )
        if self.activations is None and not any("activations" in text for text in self.budget):
            raise ValueError("activations is missing, expected a format such as 'int6'")
        for name in ("weights", "activations", "norms"):
            text = getattr(self, name)
            if text is not None and QFormat(text).is_float:
                raise ValueError(
                    f"{name} is {text!r}, expected a format that rounds; for a float network use nnUNetTrainer"
                )
        if self.budget and self.activations is not None and QFormat(self.activations).kind != "int":
            raise ValueError(f"activations is {self.activations!r} beside a budget, expected intN")
        for name in _COUNTS:
            _check(name, getattr(self, name), int, 1)
        _check("float_epochs", self.float_epochs, int, 1)
        for name in ("supervision", "distillation"):
            _check(name, getattr(self, name), (int, float), 0)
        _check("learning_rate", self.learning_rate, (int, float), 0)
        if self.learning_rate == 0:
            raise ValueError("learning_rate is 0, expected a positive number")
        if not isinstance(self.equalized, bool):
            raise ValueError(f"equalized is {self.equalized!r}, expected true or false")
        for name, known in (("scale", Scale), ("metric", Metric)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(get_args(known))}"
                )
        if not self.choices or not all(type(bits) is int and 2 <= bits <= 16 for bits in self.choices):
            raise ValueError(f"choices is {list(self.choices)}, expected whole numbers from 2 to 16")

    @property
    def activation_bits(self) -> int | None:
        """Width of the activations beside a budget; None where it decides."""
        return None if self.activations is None else QFormat(self.activations).bits

    def with_section(self, section: Mapping[str, Any], where: str = SECTION) -> Request:
        """This request where the section says nothing, and the section where it does.

        Weights and a budget replace each other.

        Args:
            section: of the plans, JSON.
            where: what errors call it.

        Raises:
            ValueError: if the section has an unknown key or a value out of its range.
        """
        if not isinstance(section, Mapping):
            raise ValueError(
                f"{where}: found {type(section).__name__}, expected an object with keys such as 'weights'"
            )
        known = {field.name for field in fields(self)}
        unknown = sorted(set(section) - known)
        if unknown:
            raise ValueError(
                f"{where}: unknown key {unknown[0]!r}, expected some of {', '.join(sorted(known))}"
            )
        given: dict[str, Any] = dict(section)
        for name, kinds in (
            ("weights", str),
            ("activations", str),
            ("norms", str),
            ("base_plans", str),
            ("base_trainer", str),
        ):
            if not isinstance(given.get(name, ""), (kinds, type(None))):
                raise ValueError(f"{where}: {name} is {given[name]!r}, expected a string")
        for name, kind in (("budget", str), ("choices", int)):
            if name in given:
                if not (
                    isinstance(given[name], (list, tuple)) and all(isinstance(v, kind) for v in given[name])
                ):
                    raise ValueError(
                        f"{where}: {name} is {given[name]!r}, expected a list of {kind.__name__}"
                    )
                given[name] = tuple(given[name])
        if "weights" in given and "budget" not in given:
            given["budget"] = ()
        if "budget" in given and "weights" not in given:
            given["weights"] = None
            if any("activations" in text for text in given["budget"]) and "activations" not in given:
                given["activations"] = None
        try:
            return replace(self, **given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _check(name: str, value: Any, kinds: Any, least: int) -> None:
    found: Any = value if isinstance(value, kinds) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(found) and found >= least):
        what = "a whole number" if kinds is int else "a number"
        raise ValueError(f"{name} is {value!r}, expected {what} from {least} on")
