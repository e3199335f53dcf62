"""Sensitivities as a JSON document: in and out, and everything malformed refused with its source."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_unetq.sensitivity import Sensitivities, Sensitivity
from monai_unetq.sensitivity.table import tensor_name
from monai_unetq.surgery.workload import Unit

NUMBERS = st.floats(0, 1e30, allow_nan=False)
WIDTHS = st.lists(st.integers(2, 16), min_size=1, max_size=4, unique=True)


@st.composite
def sensitivities(draw: st.DrawFn) -> Sensitivities:
    """Of a few layers, some of them split."""
    entries, units = {}, []
    widths = draw(WIDTHS)
    for layer in draw(st.lists(st.sampled_from(["", "a", "b.conv", "encoder.0.1"]), min_size=1, unique=True)):
        for part in draw(st.sampled_from([("input",), ("skip", "up"), ("up", "skip", "skip.1")])):
            units.append(Unit(layer, part, *draw(st.tuples(*[st.integers(0, 10**12)] * 4))))
            for kind in ("weight", "input"):
                noise, omega = ({bits: draw(NUMBERS) for bits in widths} for _ in range(2))
                trace = draw(st.floats(-1e30, 1e30) | st.just(math.nan))
                error = draw(NUMBERS | st.just(math.inf))
                entry = Sensitivity(
                    layer, part, kind, draw(st.integers(1, 10**9)), trace, error, noise, omega
                )
                entries[entry.name] = entry
    conditions = draw(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())))
    metric: Any = draw(st.sampled_from(["hessian", "fisher", "sqnr", "drop"]))
    return Sensitivities(entries, metric, tuple(units), draw(st.integers(0, 10**9)), (1, 1, 8, 8), conditions)


@given(sensitivities())
def test_a_document_is_read_as_it_was_written(found: Sensitivities) -> None:
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Sensitivities.from_json(json.loads(text))
    assert repr(again) == repr(found)  # NaN is not equal to itself
    assert list(again) == list(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(sensitivities(), st.data())
def test_whatever_is_put_anywhere_is_read_or_refused(found: Sensitivities, data: st.DataObject) -> None:
    document = found.to_json()
    place: Any = document
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        deeper = isinstance(place[key], (dict, list)) and len(place[key]) > 0
        if deeper and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(JSON)
        break
    try:
        Sensitivities.from_json(document, "file.json")
    except ValueError as error:
        assert str(error).startswith("file.json: ")


def small() -> Sensitivities:
    entry = Sensitivity("a", "input", "weight", 9, 0.5, 0.1, {4: 2.0}, {4: 1.0})
    return Sensitivities(
        {"a.weight": entry}, "hessian", (Unit("a", "input", 9, 1, 1, 9),), 1, (1, 1, 8, 8), {}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "'version' is 2, this program reads 1"),
        ({"metric": "guess"}, "'metric' is 'guess', expected one of"),
        (
            {"tensors": {"b.weight": small().to_json()["tensors"]["a.weight"]}},
            "'b.weight': it is of a.weight",
        ),
        ({"tensors": {"a.weight": {}}}, "'a.weight': KeyError 'kind'"),
        ({"units": [{"layer": "a"}]}, "KeyError 'weights'"),
        ({"image": None}, "TypeError"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        Sensitivities.from_json({**small().to_json(), **change}, "here")


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_an_omega_that_cannot_be_added_up_is_refused(value: float) -> None:
    document = small().to_json()
    document["tensors"]["a.weight"]["omega"]["4"] = value
    with pytest.raises(
        ValueError, match=r"'a.weight': 'omega' holds a number that is negative, infinite or none"
    ):
        Sensitivities.from_json(document)


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    small().save(path)
    assert Sensitivities.load(path) == small()
    assert [entry.name for entry in tmp_path.iterdir()] == ["found.json"]
    broken = Sensitivities({}, "hessian", (), 0, (1,), {"seed": object()})
    with pytest.raises(TypeError):
        broken.save(path)
    assert Sensitivities.load(path) == small()
    assert [entry.name for entry in tmp_path.iterdir()] == ["found.json"]


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Sensitivities.load(tmp_path / "none.json")
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.json: not a JSON file"):
            Sensitivities.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bad.json: 'version' is 'list'"):
        Sensitivities.load(tmp_path / "bad.json")


def test_names() -> None:
    assert tensor_name("a.b", "input", "input") == "a.b.input"
    assert tensor_name("a.b", "skip.1", "weight") == "a.b.weight[skip.1]"
    assert tensor_name("", "input", "weight") == "weight"
    with pytest.raises(KeyError, match=r"'b'; there are a.weight"):
        small()["b"]
