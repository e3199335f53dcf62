"""The matrix of exports: its page is made from its JSON, crops and comparisons are what they say, a case runs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.processors import KINDS, documents
from monai_unetq.reproduction.pages import between
from tests.benchmarks.scripts import BENCHMARKS, load
from tests.deploy.networks import paper_unet, quantized

RESULTS = BENCHMARKS.parent / "docs" / "results"


@pytest.fixture(scope="module")
def exports() -> ModuleType:
    """The script as a module."""
    return load("exports")


def test_the_committed_page_is_made_from_the_committed_json(exports: ModuleType) -> None:
    kept = documents("exports", RESULTS)
    assert set(kept) == set(KINDS)
    page = (RESULTS / "exports.md").read_text(encoding="utf-8")
    begin, end = exports.MARKS
    assert between(page, begin, end, exports.markdown(kept)) == page


def test_every_cell_that_is_not_equal_is_listed(exports: ModuleType) -> None:
    equal = {"equal": True, "largest": 0.0, "labels_differ": 0.0}
    other = {
        "equal": False,
        "largest": 0.25,
        "labels_differ": 0.01,
        "codes_equal": 0.9,
        "codes_within_1": 0.99,
    }
    case: dict[str, Any] = {
        "network": "A", "plan": "W8A8", "split": True, "onnxruntime": equal, "openvino": {**other, "int8_macs": 0.97},
        "qonnx": equal, "integer": {"refused": "no"},
    }  # fmt: skip
    document = {"processor": "x", "versions": {"onnx": "1"}, "cases": [case]}
    page = exports.markdown({"vnni": document})
    # A document of before the controls.
    assert "| A | W8A8 | yes | equal |  | 1.00% | equal | refused | 97.0% |" in page
    assert "| A, W8A8, split: openvino | 25.0% | 1.00% | 90.00% | 99.00% |  |  |  |" in page
    assert page.count("openvino |") == 1
    case |= {exports.CONTROL: {**equal, "equal": False}, exports.FREE: {"refused": "no"}}
    case["openvino"]["in_float"] = equal
    page = exports.markdown({"vnni": document})
    assert "| A | W8A8 | yes | equal | refused | 1.00% | equal | refused | 97.0% |" in page
    assert "| 99.00% | equal | 0.00% | integer kernels |" in page


@pytest.mark.parametrize(
    ("engine", "in_float", "cause"),
    [
        (0.01, 0.0, "integer kernels"),
        (0.01, 0.01, "float layers"),
        (0.011, 0.006, "float layers"),
        (0.012, 0.005, "float layers, integer kernels"),  # less than half of it is there in float
    ],
)
def test_causes_of_a_difference(exports: ModuleType, engine: float, in_float: float, cause: str) -> None:
    def found(share: float) -> dict[str, object]:
        return {"equal": not share, "labels_differ": share}

    case = {"openvino": {**found(engine), "in_float": found(in_float)}, exports.CONTROL: found(0.0)}
    assert exports.cause(case, "openvino") == cause


def test_float_norms_of_the_engines_are_close_to_float64(exports: ModuleType) -> None:
    pytest.importorskip("openvino")
    errors = exports.norm_errors()
    assert set(errors) == {"PyTorch", "ONNX Runtime", "OpenVINO"} and all(
        0 < e < 1e-5 for e in errors.values()
    )


def test_crops_lie_in_their_images(exports: ModuleType) -> None:
    image, mask = np.arange(100.0, dtype=np.float32).reshape(10, 10), np.eye(10, dtype=np.int64)
    pictures, masks = exports.crops([image], [mask], (4, 12), 3, 0)
    assert pictures.shape == (3, 1, 4, 12) and masks.shape == (3, 4, 12)
    first = int(pictures[0, 0, 0, 0]) // 10
    assert torch.equal(pictures[0, 0, :, :10], torch.from_numpy(image[first : first + 4]))
    assert torch.equal(masks[0, :, :10], torch.from_numpy(mask[first : first + 4]))


def test_one_case_on_all_targets(exports: ModuleType) -> None:
    pytest.importorskip("openvino")
    network = quantized(paper_unet, (1, 1, 16, 16), True)
    found = exports.verified(network, torch.rand(2, 1, 16, 16), torch.rand(1, 1, 24, 24), True)
    assert all(found[engine]["equal"] for engine in (*exports.COLUMNS, exports.CONTROL))
    assert found["onnxruntime"]["codes_equal"] == found["openvino"]["codes_within_1"] == 1
    assert found["openvino"]["int8_macs"] == 1 and found["openvino"]["float_layers"] == []
