"""The split benchmark runs, its page is made from its JSON, and what it times computes the same."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.benchmarks.scripts import BENCHMARKS, load

SCRIPT = BENCHMARKS / "split.py"


@pytest.fixture(scope="module")
def split() -> ModuleType:
    """The script as a module."""
    return load("split")


def test_json_and_page_hold_every_row(split: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "split.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--rounds",
        "1",
        "--width",
        "4",
        "--size",
        "32",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert len(document["results"]) == 4
    for results in document["results"].values():
        assert list(results) == [contender.name for contender in split.CONTENDERS]
        assert results["float"]["ratio"]["median"] == 1
    page = out.with_suffix(".md").read_text()
    assert page == split.markdown(document, "split.json")
    assert all(page.count(f"| {contender.name} |") == 4 for contender in split.CONTENDERS)


def test_all_float_rows_compute_the_same(split: ModuleType) -> None:
    for network, images in split.float_networks(4, 32).values():
        network.eval()
        expected = network(images)
        for contender in split.CONTENDERS[:4]:
            found = contender.build(copy.deepcopy(network), images[:1]).eval()(images)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), contender.name
        whole, halves = (
            c.build(copy.deepcopy(network), images[:1]).eval()(images) for c in split.CONTENDERS[5:]
        )
        assert not torch.equal(whole, halves)
