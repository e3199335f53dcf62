"""The inference benchmark: its page is made from its JSON, and its ratios are what they say."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from benchmarks.processors import KINDS, documents
from monai_unetq.reproduction.pages import between
from tests.benchmarks.scripts import BENCHMARKS, load

RESULTS = BENCHMARKS.parent / "docs" / "results"


@pytest.fixture(scope="module")
def inference() -> ModuleType:
    """The script as a module."""
    return load("inference")


def test_the_committed_page_is_made_from_the_committed_json(inference: ModuleType) -> None:
    kept = documents("inference", RESULTS)
    assert set(kept) == set(KINDS)
    page = (RESULTS / "inference.md").read_text(encoding="utf-8")
    begin, end = inference.MARKS
    assert between(page, begin, end, inference.markdown(kept)) == page


def test_ratios(inference: ModuleType) -> None:
    seconds = {inference.REFERENCE: 1.0, inference.PEER: 0.25, "OpenVINO, ours": 0.2}
    document = {
        "processor": "2 cores", "versions": {"openvino": "1"}, "activations": {"rows": [], "networks": []},
        "networks": [
            {
                "network": "2d", "norm": "batch", "size": [256, 256], "features": [32, 64],
                "engines": {engine: {"seconds": s, "peak_mib": 100.0} for engine, s in seconds.items()},
                "bytes": {"float32 ONNX": 400, "our ONNX": 100, "float32 IR": 400, "our IR": 104, "NNCF IR": 108},
            }
        ],
    }  # fmt: skip
    page = inference.markdown({"vnni": document})
    assert "| OpenVINO, ours | 200.0 | 5.00 | 1.25 | 100 |" in page
    assert "our ONNX 0.250 of float32's, our IR's weights 0.260, NNCF's 0.270" in page
    assert "rounds" not in page  # as documents of before do not have them


def test_ratios_of_what_ran_in_turns(inference: ModuleType) -> None:
    turns = {
        inference.PEER: [0.5, 0.25, 0.3], "OpenVINO, ours": [0.4, 0.25, 0.2], "OpenVINO, ours, split": [0.5, 0.2, 0.2]
    }  # fmt: skip
    rounds = {inference.REFERENCE: [2.0, 1.0], **turns}
    document = {
        "processor": "2 cores", "versions": {}, "activations": {"rows": [], "networks": []},
        "networks": [
            {
                "network": "2d", "norm": "batch", "size": [256, 256], "features": [32, 64], "repeats": 8, "turns": turns,
                "engines": {e: {"seconds": min(s), "rounds": s, "peak_mib": 100.0} for e, s in rounds.items()},
                "bytes": {"float32 ONNX": 400, "our ONNX": 100, "float32 IR": 400, "our IR": 104, "NNCF IR": 108},
            }
        ],
    }  # fmt: skip
    page = inference.markdown({"vnni": document})
    assert (
        "3 rounds of 8; a round's best is up to 150 % slower than the best of all (OpenVINO, ours, split)"
        in page
    )
    # 1.25, 1, 1.5; 1, 1.25, 1.5; 1.25, 0.8, 1: turn by turn.
    assert (
        "3 times; median of the ratios and its 95 % interval: ours is 1.250 [1.000, 1.500] times as fast"
        in page
    )
    assert "split 1.250 [1.000, 1.500] times; split takes 1.000 [0.800, 1.250] times what whole takes" in page


def test_activation_layers_are_timed(inference: ModuleType) -> None:
    pytest.importorskip("openvino")
    rows = inference.activations(1)
    assert len(rows) == 16 and all(row["microseconds"] > 0 for row in rows)
    both = {"engine": "OpenVINO", "layer": "tanh"}
    times = [{**both, "type": "float32", "milliseconds": 2.0}, {**both, "type": "INT8", "milliseconds": 1.0}]
    document = {
        "processor": "",
        "versions": {},
        "networks": [],
        "activations": {"rows": rows, "networks": times},
    }
    page = inference.markdown({"vnni": document})
    assert page.count("100×300") == 4 and "| OpenVINO | tanh | 2.0 | 1.0 |" in page


def test_a_measured_process_holds_nothing_but_its_engine() -> None:
    code = "import sys; from benchmarks import inference; print(*({'torch', 'monai', 'scipy'} & set(sys.modules)))"
    root = BENCHMARKS.parent
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, timeout=120
    )
    assert not found.stdout.strip(), "its memory would be counted, too"
