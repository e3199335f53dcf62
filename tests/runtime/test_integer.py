"""Integer programs: by hand, from a folder, without torch, and every way a folder can be wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from monai_unetq.deploy import integer as lowering
from monai_unetq.deploy.trace import trace
from monai_unetq.plan import QuantPlan
from monai_unetq.runtime import integer
from monai_unetq.runtime.grids import Constants, assemble, settled_bias
from monai_unetq.runtime.integer import IntegerNetwork, load
from monai_unetq.runtime.program import (
    IMAGE,
    Add,
    Clip,
    Concat,
    Convolve,
    Flatten,
    Grid,
    Interpolate,
    Leaky,
    MaxPool,
    Operation,
    Pad,
    PartWeights,
    Program,
    Repeat,
    Round,
    Shift,
    Slice,
    SumPool,
)
from monai_unetq.surgery import quantize
from monai_unetq.training import calibrate

# By hand


def convolve(name: str, **options: Any) -> Convolve:
    usual: dict[str, Any] = {
        "inputs": ("x",), "output": name, "layer": name, "parts": (PartWeights("input", (0,)),), "bias": True,
        "bias_exponents": (), "silent": (), "strides": (1,), "pads": (0, 0), "dilations": (1,), "groups": 1, "transposed": False,
        "output_padding": (0,), "accumulator": "int32",
    }  # fmt: skip
    return Convolve(**{**usual, **options})


ROUND = Round((IMAGE,), "x", "a", "input", exponent=2, low=0, high=15)


def network(
    operations: list[Operation], grids: dict[str, Grid], channels: int = 1, **constants: Constants
) -> IntegerNetwork:
    program = Program(channels, 1, tuple(operations), grids, operations[-1].output)
    again = Program.from_json(json.loads(json.dumps(program.to_json())))
    assert again == program
    return IntegerNetwork(again, constants)


def after_rounding(
    *operations: Operation, grids: dict[str, Grid], channels: int = 1, **constants: Constants
) -> IntegerNetwork:
    rounded = Grid((2,) * channels, (15,) * channels)
    return network([ROUND, *operations], {"x": rounded, **grids}, channels, **constants)


def run(net: IntegerNetwork, image: list[Any]) -> tuple[list[Any], list[int]]:
    out, exponents = net(np.array(image, np.float32))
    assert out.dtype in (np.int32, np.int64)
    assert exponents.dtype == np.int64
    return out.tolist(), exponents.tolist()


def test_a_convolution_by_hand() -> None:
    # x = 1, 3, 15 quarters (0.875 is a tie: 3.5 quarters round to 4); 2·x - 1·next + 5, in eighths.
    net = after_rounding(
        convolve("y"),
        grids={"y": Grid((3,), (15 * 3 + 5,))},
        y=Constants(np.array([[[2, -1]]]), np.array([5])),
    )
    assert run(net, [[[0.25, 0.875, 9.0]]]) == ([[[2 - 4 + 5, 8 - 15 + 5]]], [3])


def test_operations_by_hand() -> None:
    one = Grid((2,), (15,))
    cases: list[tuple[list[Operation], dict[str, Grid], list[Any], list[int]]] = [
        ([Shift(("x",), "y", (3,))], {"y": Grid((5,), (120,))}, [[[8, 16, 24, 32]]], [5]),
        ([Clip(("x",), "y", (2,), (3,))], {"y": Grid((2,), (3,))}, [[[2, 2, 3, 3]]], [2]),
        ([MaxPool(("x",), "y", (2,), (2,), (0, 0), (1,))], {"y": one}, [[[2, 4]]], [2]),
        ([MaxPool(("x",), "y", (3,), (1,), (1, 1), (1,))], {"y": one}, [[[2, 3, 4, 4]]], [2]),
        ([SumPool(("x",), "y", (2,), (2,), (0, 0))], {"y": Grid((3,), (30,))}, [[[3, 7]]], [3]),
        ([Add(("x", "x"), "y", (0,), (0,))], {"y": Grid((2,), (30,))}, [[[2, 4, 6, 8]]], [2]),
        ([Concat(("x", "x"), "y")], {"y": Grid((2, 2), (15, 15))}, [[[1, 2, 3, 4], [1, 2, 3, 4]]], [2, 2]),
        ([Slice(("x",), "y", 1, 1, -1)], {"y": one}, [[[2, 3]]], [2]),
        ([Repeat(("x",), "y", (2,))], {"y": one}, [[[1, 1, 2, 2, 3, 3, 4, 4]]], [2]),
        ([Interpolate(("x",), "y", (2,))], {"y": Grid((4,), (60,))}, [[[4, 5, 7, 9, 11, 13, 15, 16]]], [4]),
        ([Pad(("x",), "y", (1, -2), False)], {"y": one}, [[[0, 1, 2]]], [2]),
        ([Pad(("x",), "y", (0, 2), True)], {"y": one}, [[[1, 2, 3, 4, 4, 4]]], [2]),
        ([Flatten(("x",), "y", 4)], {"y": Grid((2,) * 4, (15,) * 4)}, [[1, 2, 3, 4]], [2] * 4),
        ([Round(("x",), "y", "b", "input", 1, 0, 1)], {"y": Grid((1,), (1,))}, [[[0, 1, 1, 1]]], [1]),
        ([Round(("x",), "y", "b", "input", 3, -8, 7)], {"y": Grid((3,), (8,))}, [[[2, 4, 6, 7]]], [3]),
        ([Round(("x",), "y", "b", "input", 1, -1, 1, "sign")], {"y": Grid((1,), (1,))}, [[[1, 1, 1, 1]]], [1]),
    ]  # fmt: skip
    for operations, grids, expected, exponents in cases:
        assert run(after_rounding(*operations, grids=grids), [[[0.25, 0.5, 0.75, 1.0]]]) == (
            expected,
            exponents,
        )


def test_a_slope_of_a_power_of_two_by_hand() -> None:
    signed = replace(ROUND, low=-8, high=7)
    net = network([signed, Leaky(("x",), "y", (3,), (0,))], {"x": Grid((2,), (8,)), "y": Grid((5,), (64,))})
    # -1.25 · 1/8 = -5 / 32; 1.5 = 48 / 32
    assert run(net, [[[-1.25, 1.5]]]) == ([[[-5, 48]]], [5])


def test_channels_with_grids_of_their_own() -> None:
    weight, bias = np.array([[[1]], [[1]], [[-3]]]), np.array([0, 0, 7])
    y = convolve("y", parts=(PartWeights("input", (0, 0, 0)),))
    grids = {"y": Grid((2, 5, -1), (15, 15, 52)), "z": Grid((1, 1, 1), (3, 3, 3))}
    net = after_rounding(
        y, Round(("y",), "z", "b", "input", 1, -3, 3), grids=grids, y=Constants(weight, bias)
    )
    # 6: quarters to halves 3; 6/32 to 0; (7 - 18)·2 = -22 saturates.
    assert run(net, [[[1.5]]]) == ([[[3], [0], [-3]]], [1, 1, 1])


def test_parts_meet_on_one_grid() -> None:
    operation = convolve(
        "y", inputs=("x",), parts=(PartWeights("skip", (0, 2)), PartWeights("up", (1, 0))), bias_exponents=(4, 5)
    )  # fmt: skip
    codes = {"skip": np.array([[[1]], [[1]]]), "up": np.array([[[3]], [[-3]]])}
    found = assemble(operation, codes, np.array([0.28125, -0.015625], np.float32), (4, 6))
    assert found.weight.tolist() == [[[1], [6]], [[4], [-3]]]
    # 0.28125 is 4.5 sixteenths: a tie, to even. -1/64 is half of 1/32: to 0.
    assert found.bias.tolist() == [4, 0]
    with pytest.raises(ValueError, match=r"layer 'y': there is no weight of part 'up'"):
        assemble(operation, {"skip": codes["skip"]}, None, (4, 6))
    with pytest.raises(ValueError, match="bias of output channel 0 is not on the accumulator's grid"):
        assemble(replace(operation, bias_exponents=()), codes, np.array([0.28125, 0.0], np.float32), (4, 6))


def test_a_bias_as_it_runs() -> None:
    bias = np.array([0.75, -3.0, 0.0, 1e-3, 2.0**-140], np.float32)
    exact = settled_bias(bias, ())
    assert [integer * 2.0**-exponent for integer, exponent in exact] == bias.tolist()
    assert exact[0] == (3, 2)
    assert exact[4] == (1, 140)
    assert settled_bias(bias, (1, 0, 0, 8, 8)) == [(1, 0), (-3, 0), (0, 0), (0, 0), (0, 0)]
    with pytest.raises(ValueError, match="infinite"):
        settled_bias(np.array([np.inf], np.float32), ())


def test_images() -> None:
    net = after_rounding(Shift(("x",), "y", (0,)), grids={"y": Grid((2,), (15,))})
    floats = np.array([[[0.1, 0.375, 0.625, np.inf, -np.inf, -0.0]]], np.float32)
    assert net(floats)[0].tolist() == [[[0, 2, 2, 15, 0, 0]]]
    pixels = np.array([[[0, 25, 96, 160, 255, 32]]], np.uint8)
    assert np.array_equal(net(pixels, exponent=8)[0], net((pixels / 256).astype(np.float32))[0])
    assert net(np.array([[[3, -9, 1 << 50]]]), exponent=-1)[0].tolist() == [[[15, 0, 15]]]
    assert net(floats.repeat(3, 0))[0].shape == (3, 1, 6)
    wrong: list[tuple[np.ndarray, dict[str, int], str]] = [
        (floats[0], {}, r"shape \(1, 6\), expected \(N, 1, size\)"),
        (floats.repeat(2, 1), {}, r"shape \(1, 2, 6\)"),
        (floats.astype(np.float64), {}, "an image of float64, expected float32"),
        (floats, {"exponent": 3}, "an exponent is for an image of integers"),
        (pixels, {}, "an image of uint8 without an exponent"),
        (np.full((1, 1, 2), np.nan, np.float32), {}, "the image: a value is NaN"),
        (np.full((1, 1, 2), 1 << 62), {"exponent": 0}, "do not fit in 61 bits"),
    ]
    for image, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            net(image, **options)


def test_what_is_stated_must_be_proven() -> None:
    good, constants = Grid((3,), (50,)), Constants(np.array([[[2, -1]]]), np.array([5]))
    after_rounding(convolve("y"), grids={"y": good}, y=constants)
    with pytest.raises(ValueError, match=r"'y' .* other exponents or bounds than stated"):
        after_rounding(convolve("y"), grids={"y": Grid((3,), (49,))}, y=constants)
    with pytest.raises(ValueError, match="layer 'y' states int64, its bound 50 needs int32"):
        after_rounding(convolve("y", accumulator="int64"), grids={"y": good}, y=constants)
    large = Constants(np.array([[[1 << 30, -1]]]), np.array([5]))
    with pytest.raises(ValueError, match="states int32, its bound 16106127380 needs int64"):
        after_rounding(convolve("y"), grids={"y": Grid((3,), ((15 << 30) + 20,))}, y=large)
    with pytest.raises(ValueError, match="does not fit in 61 bits"):
        after_rounding(
            convolve("y"), grids={"y": good}, y=Constants(np.array([[[1 << 58, 0]]]), np.array([0]))
        )
    with pytest.raises(ValueError, match="do not meet on one grid"):
        after_rounding(Add(("x", "x"), "y", (0,), (1,)), grids={"y": Grid((2,), (30,))})


def test_no_float_anywhere(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.dtype] = []
    checked = integer._checked

    def spy(values: np.ndarray, operation: Operation, grid: Grid) -> np.ndarray:
        seen.append(values.dtype)
        assert int(np.abs(values.astype(np.int64)).max()) <= grid.bound
        return checked(values, operation, grid)

    monkeypatch.setattr(integer, "_checked", spy)
    net = load(exported)
    net(EXAMPLE.numpy())
    assert len(seen) == len(net.program.operations)
    assert all(dtype.kind == "i" for dtype in seen)
    with pytest.raises(AssertionError, match="is float64"):
        checked(np.zeros((1, 1)), ROUND, Grid((0,), (1,)))


# Folders

EXAMPLE = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2, stride=2), nn.ReLU(), nn.Conv2d(3, 2, 1),
    ).eval()  # fmt: skip
    quantize(net, QuantPlan.uniform(net, "int4", "int6", input="uint8", last="int8"), EXAMPLE)
    calibrate(net, [EXAMPLE])
    return net


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, net = tmp_path_factory.mktemp("exported"), small()
    lowering.write(trace(net, EXAMPLE, dynamic=False), net, folder)
    return folder


def expected_logits(image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out: np.ndarray = small().double()(torch.from_numpy(image).double()).numpy()
    return out


def values(logits: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    return np.ldexp(logits.astype(np.float64), -exponents.reshape(-1, 1, 1))


def test_it_runs_without_torch(exported: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(0.5, 1, (2, 1, 12, 16)).astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from monai_unetq.runtime import integer\n"
        f"logits, exponents = integer.load({str(exported)!r})(np.load({str(tmp_path / 'image.npy')!r}))\n"
        f"np.savez({str(tmp_path / 'out.npz')!r}, logits=logits, exponents=exponents)\n"
        "assert not [name for name in sys.modules if name.startswith(('torch.', 'monai.', 'onnx'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    assert out["logits"].dtype == np.int32
    assert np.array_equal(values(out["logits"], out["exponents"]), expected_logits(image))


def damaged(exported: Path, folder: Path, change: Callable[[dict[str, Any]], None], sign: bool = True) -> str:
    """The message with which a changed program is refused; ``sign`` gives it the checksum of what it says."""
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    path = folder / "program.json"
    document = json.loads(path.read_text())
    change(document)
    if sign:
        body = {key: value for key, value in document.items() if key != "checksum"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        document["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(folder)
    return str(caught.value)


def operation(document: dict[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in document["operations"] if entry["op"] == kind)
    return found


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.update(version=2), "integer program 2, this program reads up to 1: update monai-unetq"),
    (lambda d: d.update(version="1"), "'version' is '1'"),
    (lambda d: d.update(kind="other"), "no integer program"),
    (lambda d: d.update(more=1), r"unknown \['more'\]"),
    (lambda d: d.pop("image"), r"missing \['image'\]"),
    (lambda d: d.pop("packed"), "names no packed file"),
    (lambda d: d["packed"].update(file="../model.unetq"), "expected the name of a file in the same folder"),
    (lambda d: d["packed"].update(checksum="0"), "was written for another model.unetq"),
    (lambda d: d["image"].update(channels=-1), "'channels' is -1"),
    (lambda d: d["image"].update(channels=2), "other exponents or bounds than stated"),
    (lambda d: d["image"].update(dimensions=3), "'strides' are for 2 axes, expected 3"),
    (lambda d: d.update(output="none"), "no operation makes the output 'none'"),
    (lambda d: d["operations"].pop(0), "which no earlier operation makes"),
    (lambda d: d["operations"].append(d["operations"][0]), "a second time"),
    (lambda d: d["operations"][0].update(op="exec"), "'exec' is no operation"),
    (lambda d: operation(d, "convolve").update(inputs=[IMAGE]), "reads the image, expected 'round' first"),
    (lambda d: operation(d, "convolve").update(strides=[0, 1]), r"'strides' is \[0, 1\]"),
    (lambda d: operation(d, "convolve").update(strides=[1.0, 1]), "expected a list of integers"),
    (lambda d: operation(d, "convolve").update(layer="9"), "layer '9': .* holds no packed '9.weight'"),
    (lambda d: operation(d, "convolve").update(bias=False), "other exponents or bounds than stated"),
    (lambda d: operation(d, "convolve").update(bias=1), "'bias' is 1, expected bool"),
    (lambda d: operation(d, "convolve").update(groups=2), "layer '0'"),
    (lambda d: operation(d, "convolve").update(silent=[9]), "'silent' names a channel that it has not"),
    (lambda d: operation(d, "convolve").update(silent=[0]), "other exponents or bounds than stated"),
    (lambda d: operation(d, "convolve").update(accumulator="int16"), "'accumulator' is 'int16'"),
    (lambda d: operation(d, "convolve")["parts"][0].update(shifts=-1), "shifts of 0 to 62"),
    (lambda d: operation(d, "convolve")["parts"][0].update(shifts=[1, 2]), "expected an integer, or 4 of them"),
    (lambda d: operation(d, "convolve")["parts"][0].update(shifts=1), "other exponents or bounds than stated"),
    (lambda d: operation(d, "round").update(rounding="up"), "'rounding' is 'up'"),
    (lambda d: operation(d, "round").update(low=-(1 << 30)), "expected 24 bits at most"),
    (lambda d: operation(d, "round").update(exponent="8"), "'exponent' is '8', expected int"),
    (lambda d: operation(d, "clip")["result"].update(bound=-3), "'bound' is -3"),
    (lambda d: operation(d, "clip")["result"].update(bound=7), "other exponents or bounds than stated"),
    (lambda d: operation(d, "max_pool").update(kernel=[2]), r"'kernel' is \[2\], expected 2 integers"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_changed_programs_are_refused(number: int, exported: Path, tmp_path: Path) -> None:
    change, message = CHANGES[number]
    assert re.search(message, damaged(exported, tmp_path, change))


def test_a_change_is_seen_by_the_checksum(exported: Path, tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        operation(document, "round")["exponent"] += 1

    assert "checksum does not match" in damaged(exported, tmp_path, change, sign=False)


def test_truncated_flipped_and_foreign_programs(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "program.json"
    data = path.read_bytes()
    contents = [data[:length] for length in np.linspace(0, len(data) - 2, 20).astype(int)]
    for offset in range(5, len(data), 211):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << offset % 7
        contents.append(bytes(flipped))
    contents += [b"[]", b"null", b"\xff\xfe", b"[" * 100_000]
    same = 0
    for content in contents:
        path.write_bytes(content)
        try:
            load(tmp_path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # white space
            assert json.loads(content) == json.loads(data)
            same += 1
    assert same < len(contents) / 3


def test_missing_files_and_those_of_another_export(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"program\.json: no such file"):
        load(tmp_path)
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    packed = tmp_path / "model.unetq"
    data = bytearray(packed.read_bytes())
    data[-1] ^= 1
    packed.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.unetq: corrupted"):
        load(tmp_path)
    packed.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.unetq: no such file"):
        load(tmp_path)


def test_the_program_says_accumulators_and_bounds(exported: Path) -> None:
    program = load(exported).program
    layers = program.layers()
    assert list(layers) == ["0", "3", "5", "7"]
    for entry in layers.values():
        assert entry["accumulator"] == "int32"
        assert 0 < entry["bound"] < 1 << 31
    assert Program.from_json(copy.deepcopy(program.to_json())) == program


def test_sizes_that_do_not_fit(exported: Path) -> None:
    with pytest.raises(ValueError, match="too small"):
        load(exported)(np.zeros((1, 1, 1, 1), np.float32))
