"""The QAT benchmark runs, its table and JSON hold what they should, and it catches a network that rounds nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.benchmarks.scripts import BENCHMARKS, load

SCRIPT = BENCHMARKS / "qat_step.py"
ROUNDS = 2
OWN = (
    "monai-unetq int8/int8",
    "monai-unetq int8/int8 learned",
    "monai-unetq Q6.0/Q0.4",
    "monai-unetq int8/int8 SS-QAT",
)
PEERS = ("Brevitas int8/int8", "modelopt int8/int8", "modelopt int8/int8 default")
PLAIN = ("float", "float again (control)")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Standard output and JSON of one tiny run."""
    out = tmp_path_factory.mktemp("qat_step") / "qat_step.json"
    done = run(
        "--rounds", str(ROUNDS), "--batch", "2", "--size", "32", "--width", "4", "--norm", "both",
        "--threads", "1", "--channels-last", "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["qat_step.json", "qat_step.md"]
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(page.count(f"| {name} |") == 2 for name in (*PLAIN, *OWN, *PEERS))
    return done.stdout, json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def qat_step() -> ModuleType:
    """The script as a module."""
    return load("qat_step")


def test_table_has_a_row_for_each_contender_and_norm(measured: tuple[str, dict[str, Any]]) -> None:
    table, document = measured
    lines = table.splitlines()
    for name in (*PLAIN, *OWN, *PEERS):
        rows = [line for line in lines if line.startswith(name + "  ")]
        assert len(rows) == 2, name
        for norm, row in zip(("instance", "batch"), rows, strict=True):
            result = document["results"][norm][name]
            shown = result["skipped"] if "skipped" in result else f"{result['ratio']['median']:.3f}"
            assert shown in row


def test_json_has_every_time_and_the_conditions(measured: tuple[str, dict[str, Any]]) -> None:
    _, document = measured
    conditions = document["conditions"]
    assert conditions["input_shape"] == [2, 1, 32, 32]
    assert (conditions["threads"], conditions["rounds"], conditions["channels_last"]) == (1, ROUNDS, True)
    assert conditions["network"]["width"] == 4
    assert document["versions"]["torch"] == torch.__version__.split("+")[0]
    assert list(document["results"]) == ["instance", "batch"]
    for results in document["results"].values():
        for name in (*PLAIN, *OWN):
            row = results[name]
            assert len(row["seconds"]) == ROUNDS and min(row["seconds"]) > 0
            assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        for name in PEERS:
            assert "seconds" in results[name] or results[name]["skipped"].startswith(
                "not installed (pip install "
            )


def test_ratio_is_taken_within_each_pair(measured: tuple[str, dict[str, Any]]) -> None:
    results = measured[1]["results"]["instance"]
    assert results["float"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0, "interval": [1.0, 1.0]}
    row = results[OWN[0]]
    a, b = (own / plain for own, plain in zip(row["seconds"], row["float_seconds"], strict=True))
    assert math.isclose(row["ratio"]["median"], (a + b) / 2)
    assert row["ratio"]["interval"] == sorted(
        (a, b)
    )  # of two, the bootstrap's median is one of them often enough


def test_every_convolution_of_every_contender_is_rounded(measured: tuple[str, dict[str, Any]]) -> None:
    for results in measured[1]["results"].values():
        rows = [results[name] for name in (*OWN, *PEERS) if "skipped" not in results[name]]
        for check in (row["check"] for row in rows):
            assert check["convolutions"] == 23
            assert check["input_levels"] <= 256 and check["weight_levels"] <= 256
            assert check["output_error"] > 0


def test_check_refuses_a_float_network(qat_step: ModuleType) -> None:
    images = torch.rand(1, 1, 32, 32)
    network = qat_step.float_network("instance", 4, images)
    with pytest.raises(RuntimeError, match="distinct values, expected at most 256"):
        qat_step.check_quantized(network, network, images, 256)


@pytest.mark.parametrize(
    ("layer", "quantizer", "message"),
    [
        ("conv_0.conv_1.conv", "input_quantizer", "convolution 1 .*: input: .* distinct values"),
        (
            "down_4.convs.conv_1.conv",
            "weight_quantizer",
            "convolution 9 .*: weight, in one channel: 576 distinct",
        ),
        ("conv_0.conv_1.conv", "weight_quantizer", "convolution 1 .*: the weight is the float network's"),
    ],
)
def test_check_refuses_one_unrounded_tensor(
    qat_step: ModuleType, layer: str, quantizer: str, message: str
) -> None:
    images = torch.rand(1, 1, 32, 32)
    reference = qat_step.float_network("instance", 8, images)
    network = qat_step.unetq_network(qat_step.float_network("instance", 8, images), images, "int8", "int8")
    qat_step.check_quantized(network, reference, images, 256)
    network.get_submodule(f"{layer}.{quantizer}").forward = lambda tensor: tensor
    with pytest.raises(RuntimeError, match=message):
        qat_step.check_quantized(network, reference, images, 256)


def test_peer_that_is_not_installed_is_skipped(qat_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("brevitas.graph.calibrate", "modelopt.torch.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    images, labels = torch.rand(2, 1, 32, 32), torch.ones(2, 1, 32, 32)
    chosen = [c for c in qat_step.CONTENDERS if c.name in ("float", *PEERS)]
    results = qat_step.measure(chosen, "instance", images, labels, 1, 4, torch.contiguous_format)
    assert "not installed (pip install brevitas)" in results[PEERS[0]]["skipped"]
    assert "not installed (pip install nvidia-modelopt" in results[PEERS[1]]["skipped"]
    assert len(results["float"]["seconds"]) == 1
    assert "not installed (pip install brevitas)" in qat_step.table(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "40"), "expected a multiple of 16 from 32"),
        (("--rounds", "0"), "expected a whole number from 1"),
        (("--out", "no-such-folder/out.json"), "expected a file in a folder that exists"),
    ],
)
def test_bad_options_are_refused(
    qat_step: ModuleType, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        qat_step.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_examples(qat_step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        qat_step.main(["--help"])
    assert stopped.value.code == 0
    assert (
        "python benchmarks/qat_step.py --norm both --threads 2 --out qat_step.json" in capsys.readouterr().out
    )
