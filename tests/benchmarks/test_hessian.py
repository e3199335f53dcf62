"""The Hessian benchmark runs, its page is made from its JSON, and all its rows estimate the same number."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.scripts import BENCHMARKS, load

SCRIPT = BENCHMARKS / "hessian.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script as a module."""
    return load("hessian")


def test_json_and_page_hold_every_row_and_rows_agree(benchmark: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("pyhessian", reason="PyHessian is a peer of the benchmarks")
    out = tmp_path / "hessian.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--rounds",
        "1",
        "--width",
        "2",
        "--size",
        "16",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    results = document["results"]
    assert list(results) == list(benchmark.CONTENDERS)
    assert results[benchmark.PEER]["ratio"]["median"] == 1
    page = out.with_suffix(".md").read_text()
    assert page == benchmark.markdown(document, "hessian.json")
    assert all(page.count(f"| {name} |") == 1 for name in benchmark.CONTENDERS)
    peer = results[benchmark.PEER_WEIGHTS]
    for row in (results[benchmark.WEIGHTS], results[benchmark.BOTH]):
        assert abs(row["trace"] - peer["trace"]) <= 4 * math.hypot(row["error"], peer["error"]) + 1e-9


def test_without_the_peer_our_rows_are_measured(benchmark: ModuleType) -> None:
    found = benchmark.measure(2, 16, 1, 2, 1, [benchmark.WEIGHTS, benchmark.BOTH])
    assert all(row["ratio"] is None for row in found.values())
    document = {
        "command": "", "versions": {}, "results": found,
        "conditions": dict.fromkeys(("threads", "rounds", "probes", "width", "size", "images", "cpu_capability"), 1),
    }  # fmt: skip
    assert "| – | – |" in benchmark.markdown(document, "hessian.json")
