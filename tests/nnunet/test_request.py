from __future__ import annotations

from typing import Any

import pytest

from monai_unetq.nnunet import Request

BASE = Request(weights="int4", activations="int6")


def test_a_section_replaces_what_it_names() -> None:
    found = BASE.with_section({"weights": "Q1.7", "activations": "Q4.4", "epochs": 7, "supervision": 0})
    assert (found.weights, found.activations, found.epochs, found.supervision) == ("Q1.7", "Q4.4", 7, 0)
    assert found.learning_rate == BASE.learning_rate


def test_weights_and_a_budget_replace_each_other() -> None:
    mixed = BASE.with_section({"budget": ["weights=4.0bits"], "choices": [2, 4]})
    assert (mixed.weights, mixed.budget, mixed.choices) == (None, ("weights=4.0bits",), (2, 4))
    assert (mixed.activations, mixed.activation_bits) == ("int6", 6)
    again = mixed.with_section({"weights": "int8"})
    assert (again.weights, again.budget) == ("int8", ())


def test_a_budget_for_activations_decides_on_them() -> None:
    found = BASE.with_section({"budget": ["weights=4bits", "activations=5bits"]})
    assert found.activations is None and found.activation_bits is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"wieghts": "int4"}, "unknown key 'wieghts', expected some of activations, base_plans"),
        ({"weights": "int99x"}, "int99x"),
        ({"weights": "float"}, "weights is 'float', expected a format that rounds"),
        ({"weights": 4}, "weights is 4, expected a string"),
        ({"norms": "float"}, "norms is 'float', expected a format that rounds"),
        ({"norms": True}, "norms is True, expected a string"),
        ({"budget": "weights=4bits"}, "budget is 'weights=4bits', expected a list of str"),
        ({"budget": ["weights=4bits"], "weights": "int4"}, "expected one of them"),
        ({"budget": ["weights=4bits"], "activations": "Q4.4"}, "beside a budget, expected intN"),
        ({"choices": [4, 99]}, "choices is [4, 99]"),
        ({"choices": ["4"]}, "choices is ['4'], expected a list of int"),
        ({"epochs": 0}, "epochs is 0, expected a whole number from 1 on"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"epochs": True}, "epochs is True"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"supervision": -1}, "supervision is -1, expected a number from 0 on"),
        ({"equalized": 1}, "equalized is 1, expected true or false"),
        ({"scale": "log"}, "scale is 'log', expected one of power-of-two, free"),
        ({"metric": "luck"}, "metric is 'luck'"),
        ([], "found list, expected an object"),
    ],
)
def test_a_broken_section_is_refused(section: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        BASE.with_section(section, "plans")
    assert str(raised.value).startswith("plans: ") and message in str(raised.value)


def test_a_request_needs_widths() -> None:
    with pytest.raises(ValueError, match="expected one of them"):
        Request(activations="int6")
    with pytest.raises(ValueError, match="activations is missing"):
        Request(weights="int4")
