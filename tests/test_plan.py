"""Quantization plans: the document in and out, uniform plans, and what a malformed document is answered with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from monai_unetq.formats import QFormat
from monai_unetq.layers import quantize_layer
from monai_unetq.parts import WHOLE
from monai_unetq.plan import LayerPlan, QuantPlan

formats = st.sampled_from(
    ("Q0.4", "UQ6.0", "Q8.8", "Q0.4:literal", "int4", "uint8", "ternary", "binary", "float")
).map(QFormat)
names = st.text(min_size=1, max_size=12)
part_names = st.sampled_from(
    (("skip", "up"), ("up", "skip"), ("skip", "skip.1", "up"), ("up", "up.1"), ("skip.1", "up", "skip"))
)


@st.composite
def layer_plans(draw: st.DrawFn) -> LayerPlan:
    """Of a whole layer, or of one with parts, each given once or by part."""
    names = draw(part_names)
    once = formats.map(lambda f: {WHOLE: f})
    each = st.fixed_dictionaries({name: formats for name in names})
    channels = st.none() | st.tuples(*(st.tuples(st.just(name), st.integers(1, 64)) for name in names))
    bias: Literal["accumulator", "float"] = draw(st.sampled_from(("accumulator", "float")))
    output = st.none() | formats.filter(lambda f: not f.is_float)
    return LayerPlan(draw(once | each), draw(once | each), bias, draw(channels), draw(output))


plans = st.builds(
    QuantPlan,
    st.dictionaries(names, layer_plans(), max_size=4),
    st.sampled_from(("power-of-two", "free")),
    st.sampled_from(("channel", "tensor")),
    st.booleans(),
)


def small_network() -> nn.Module:
    """Four layers of the quantizable classes and three of others."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.ConvTranspose2d(2, 2, 2), nn.Conv2d(2, 2, 3),
        nn.Dropout(), nn.Linear(4, 1),
    )  # fmt: skip


def document(**changes: Any) -> dict[str, Any]:
    """A well-formed document with some top-level keys changed."""
    layers = {"conv": {"weight": "Q0.4", "input": "UQ6.0", "bias": "accumulator"}}
    options = {"scale": "power-of-two", "granularity": "channel", "learned": False}
    return {"version": 1, **options, "layers": layers, **changes}


def with_layer(**changes: Any) -> dict[str, Any]:
    """A well-formed document with some keys of its layer changed."""
    return document(layers={"conv": {"weight": "Q0.4", "input": "UQ6.0", **changes}})


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in document().items() if k != key}


@given(plans)
def test_json_round_trip(plan: QuantPlan) -> None:
    text = json.dumps(plan.to_json())
    assert QuantPlan.from_json(json.loads(text)) == plan
    assert json.dumps(QuantPlan.from_json(json.loads(text)).to_json()) == text


@given(plans)
def test_file_round_trip(plan: QuantPlan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        assert QuantPlan.load(str(path)) == plan
        assert os.listdir(folder) == ["plan.json"]


def test_document_is_as_documented() -> None:
    plan = QuantPlan(
        {
            "a": LayerPlan({WHOLE: QFormat("Q0.4")}, {WHOLE: QFormat("UQ6.0")}),
            "b": LayerPlan(
                {WHOLE: QFormat("int4")}, {"skip": QFormat("uint8"), "up": QFormat("int8")}, "float"
            ),
        },
        scale="free",
        learned=True,
    )
    assert plan.to_json() == {
        "version": 1,
        "scale": "free",
        "granularity": "channel",
        "learned": True,
        "layers": {
            "a": {"weight": "Q0.4", "input": "UQ6.0", "bias": "accumulator"},
            "b": {"weight": "int4", "input": {"skip": "uint8", "up": "int8"}, "bias": "float"},
        },
    }


def test_what_a_document_leaves_out_has_defaults() -> None:
    plan = QuantPlan.from_json({"version": 1, "layers": {"conv": {"weight": "Q0.4", "input": "Q6.0"}}})
    assert (plan.scale, plan.granularity, plan.learned) == ("power-of-two", "channel", False)
    assert plan["conv"].bias == "accumulator"
    assert plan["conv"].input == QFormat("Q6.0")


def test_layers_that_are_not_named_stay_float() -> None:
    plan = QuantPlan.from_json(document())
    assert list(plan) == ["conv"]
    assert not plan["conv"].is_float
    assert plan["other"].is_float
    assert plan["other"].input == QFormat("float")


def test_is_float_only_where_nothing_is_quantized() -> None:
    real, fixed = QFormat("float"), QFormat("Q0.4")
    assert LayerPlan({WHOLE: real}, {WHOLE: real}).is_float
    assert not LayerPlan({WHOLE: fixed}, {WHOLE: real}).is_float
    assert not LayerPlan({WHOLE: real}, {"skip": real, "up": fixed}).is_float


def test_input_of_a_split_layer_is_an_error() -> None:
    layer = LayerPlan({WHOLE: QFormat("Q0.4")}, {"up": QFormat("Q6.0"), "skip": QFormat("Q6.0")})
    with pytest.raises(ValueError, match=r"input has the parts \['skip', 'up'\]"):
        _ = layer.input


def test_with_layers_replaces_and_adds() -> None:
    plan = QuantPlan.from_json(document(scale="free"))
    other = LayerPlan({WHOLE: QFormat("int8")}, {WHOLE: QFormat("int8")})
    changed = plan.with_layers({"conv": other, "new": other})
    assert (changed["conv"], changed["new"], changed.scale) == (other, other, "free")
    assert plan["conv"].weight == QFormat("Q0.4"), "the plan itself changed"
    with pytest.raises(FrozenInstanceError):
        plan.scale = "power-of-two"  # type: ignore[misc]


# uniform


def test_outputs_are_those_of_the_plans_layers() -> None:
    plan = QuantPlan.uniform(small_network(), "int4", "int6", keep_float=["3"])
    changed = plan.with_outputs(["0", "3"], "int8")
    assert changed["0"].output == QFormat("int8") and changed["0"].weight == plan["0"].weight
    assert changed["4"].output is None and "3" not in changed and plan["0"].output is None


def test_uniform_names_every_layer_that_can_be_quantized() -> None:
    plan = QuantPlan.uniform(small_network(), "Q0.4", "Q6.0")
    assert list(plan) == ["0", "3", "4", "6"]
    for name in plan:
        assert plan[name] == LayerPlan({WHOLE: QFormat("Q0.4")}, {WHOLE: QFormat("Q6.0")}, "accumulator")


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_uniform_covers_every_class(kind: str, dimensions: int) -> None:
    layer = getattr(nn, f"{kind}{dimensions}d")(1, 1, 1)
    assert list(QuantPlan.uniform(nn.Sequential(layer), "Q0.4", "Q6.0")) == ["0"]


def test_uniform_takes_a_quantized_network() -> None:
    network = small_network()
    expected = QuantPlan.uniform(network, "Q0.4", "Q6.0")
    quantize_layer(network[0], QFormat("int8"), QFormat("int8"))  # type: ignore[index]
    quantize_layer(network[3], QFormat("int8"), QFormat("int8"))  # type: ignore[index]
    assert QuantPlan.uniform(network, "Q0.4", "Q6.0") == expected


def test_uniform_first_last_and_input() -> None:
    plan = QuantPlan.uniform(
        small_network(), "Q0.4", "Q6.0", input="UQ0.8", first="int8", last=QFormat("int6")
    )
    assert [str(plan[n].weight) for n in plan] == ["int8", "Q0.4", "Q0.4", "int6"]
    assert [str(plan[n].input) for n in plan] == ["UQ0.8", "Q6.0", "Q6.0", "Q6.0"]


@pytest.mark.parametrize(("end", "name"), [("first", "0"), ("last", "6")])
def test_uniform_keeps_an_end_float_as_a_whole(end: str, name: str) -> None:
    plan = QuantPlan.uniform(small_network(), "Q0.4", "Q6.0", input="UQ0.8", **{end: "float"})  # type: ignore[arg-type]
    assert name not in list(plan)
    assert plan[name].is_float
    assert len(list(plan)) == 3


def test_uniform_keep_float_takes_names_and_patterns() -> None:
    network = nn.ModuleDict({k: nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}) for k in ("down", "up", "seg")})
    assert list(QuantPlan.uniform(network, "Q0.4", "Q6.0", keep_float=("seg.*",))) == ["down.conv", "up.conv"]
    assert list(QuantPlan.uniform(network, "Q0.4", "Q6.0", keep_float=("up.conv", "d*"))) == ["seg.conv"]


def test_uniform_passes_on_how_scales_are_found() -> None:
    plan = QuantPlan.uniform(
        small_network(), "int4", "int8", scale="free", granularity="tensor", learned=True
    )
    assert (plan.scale, plan.granularity, plan.learned) == ("free", "tensor", True)


def test_uniform_float_weights_still_round_inputs() -> None:
    plan = QuantPlan.uniform(small_network(), "float", "int8")
    assert [(str(plan[n].weight), str(plan[n].input)) for n in plan] == [("float", "int8")] * 4
    assert list(QuantPlan.uniform(small_network(), "float", "float")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "Q4"}, "'Q4' is not a number format"),
        ({"activations": "six"}, "'six' is not a number format"),
        ({"input": "Q"}, "'Q' is not a number format"),
        ({"first": "Q"}, "'Q' is not a number format"),
        ({"last": "Q"}, "'Q' is not a number format"),
        ({"keep_float": ("nothing",)}, "keep_float: 'nothing' matches none of the layers 0, 3, 4, 6"),
        ({"scale": "two"}, "'scale' is 'two'"),
        ({"granularity": "group"}, "'granularity' is 'group'"),
        ({"learned": "yes"}, "'learned' is 'yes'"),
    ],
)
def test_uniform_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantPlan.uniform(small_network(), **{"weights": "Q0.4", "activations": "Q6.0", **options})


def test_uniform_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="Sequential has no layer of the classes Conv1d"):
        QuantPlan.uniform(nn.Sequential(nn.ReLU()), "Q0.4", "Q6.0")


# malformed documents

MALFORMED: list[tuple[Any, str]] = [
    (None, "found a NoneType, expected an object"),
    ([], "found a list, expected an object"),
    ("plan", "found a str, expected an object"),
    ({}, "missing ['version', 'layers']"),
    (without("version"), "missing ['version']"),
    (without("layers"), "missing ['layers']"),
    (document(layer={}), "unknown ['layer']"),
    (document(version=2), "'version' is 2, this program reads 1"),
    (document(version="1"), "'version' is '1'"),
    (document(version=True), "'version' is True"),
    (document(version=None), "'version' is None"),
    (document(layers=[]), "'layers' is a list, expected an object"),
    (document(layers=None), "'layers' is a NoneType, expected an object"),
    (document(scale="any"), "'scale' is 'any', expected one of ('power-of-two', 'free')"),
    (document(scale=[]), "'scale' is []"),
    (document(scale=None), "'scale' is None"),
    (document(granularity={}), "'granularity' is {}"),
    (document(granularity="layer"), "'granularity' is 'layer', expected one of ('channel', 'tensor')"),
    (document(learned="true"), "'learned' is 'true'"),
    (document(learned=1), "'learned' is 1"),
    (document(learned=[]), "'learned' is []"),
    (document(layers={"conv": None}), "layer 'conv': found a NoneType"),
    (document(layers={"conv": "Q0.4"}), "layer 'conv': found a str"),
    (document(layers={"conv": {}}), "layer 'conv': missing ['weight', 'input']"),
    (document(layers={"conv": {"weight": "Q0.4"}}), "layer 'conv': missing ['input']"),
    (with_layer(scale="free"), "layer 'conv': unknown ['scale']"),
    (with_layer(output="Q4"), "layer 'conv': 'output': 'Q4' is not a number format"),
    (with_layer(output="float"), "layer 'conv': 'output' is float, expected a format"),
    (with_layer(weight="Q4"), "layer 'conv': 'weight': 'Q4' is not a number format"),
    (with_layer(weight=4), "layer 'conv': 'weight': a number format is a string, found int"),
    (with_layer(weight=None), "layer 'conv': 'weight': a number format is a string, found NoneType"),
    (with_layer(weight="int99"), "layer 'conv': 'weight': 'int99' has 99 bits"),
    (with_layer(input="Q6"), "layer 'conv': 'input'"),
    (with_layer(input=["UQ6.0"]), "layer 'conv': 'input'"),
    (with_layer(input=None), "layer 'conv': 'input'"),
    (with_layer(input={}), "layer 'conv': 'input' names no part"),
    (with_layer(input={"skip": "UQ6.0", "up": 6}), "layer 'conv': 'input' (up)"),
    (with_layer(bias="int32"), "layer 'conv': 'bias' is 'int32'"),
    (with_layer(bias=[]), "layer 'conv': 'bias' is []"),
    (with_layer(bias=None), "layer 'conv': 'bias' is None"),
]


@pytest.mark.parametrize(("content", "message"), MALFORMED, ids=[m for _, m in MALFORMED])
def test_malformed_document_names_file_and_key(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my plan.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        QuantPlan.load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"weight: Q0.4", b'{"version": 1,}', b"\xff\xfe\x00", b"\x80PK"]
)
def test_file_that_is_no_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a JSON file") as caught:
        QuantPlan.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        QuantPlan.load(tmp_path / "plan.json")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(("Q0.4", "free", "tensor")),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(("version", "layers", "weight", "input", "scale", "learned", "conv")),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_any_json_is_a_plan_or_a_value_error(content: Any) -> None:
    try:
        plan = QuantPlan.from_json(content, "plan.json")
    except ValueError as error:
        assert str(error).startswith("plan.json: ")
    else:
        assert QuantPlan.from_json(plan.to_json()) == plan


# saving


def test_save_replaces_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    QuantPlan.from_json(document()).save(path)
    QuantPlan.from_json(document(scale="free")).save(path)
    assert QuantPlan.load(path).scale == "free"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_interrupted_save_keeps_the_older_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    QuantPlan.from_json(document()).save(path)

    def fails(self: Path, text: str, **options: Any) -> int:
        with self.open("w", **options) as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="no space left"):
        QuantPlan.from_json(document(scale="free")).save(path)
    monkeypatch.undo()
    assert QuantPlan.load(path).scale == "power-of-two"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_save_onto_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(OSError):
        QuantPlan.from_json(document()).save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_needs_no_torch() -> None:
    program = (
        "import json, sys; from monai_unetq.plan import QuantPlan;"
        f"plan = QuantPlan.from_json(json.loads({json.dumps(json.dumps(document()))})); plan.to_json();"
        "print([m for m in ('torch', 'numpy', 'monai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
