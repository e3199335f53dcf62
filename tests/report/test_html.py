"""The HTML report: complete, self-contained, escaped, written as a whole or not at all."""

from __future__ import annotations

import base64
import copy
import os
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from monai_unetq.report import write_report


def summary(mean: float) -> dict[str, Any]:
    return {
        "mean": mean,
        "low": mean - 1,
        "high": mean + 1,
        "worst": mean - 2,
        "worst_case": "21",
        "count": 5,
        "values": {},
    }


def row(name: str, weights: str, activations: str, dice: float, ratio: float) -> dict[str, Any]:
    return {
        "name": name,
        "weights": weights,
        "activations": activations,
        "metrics": {
            "dice": summary(dice),
            "membrane_dice": summary(dice - 14),
            "nsd": summary(88.4),
            "hd95": summary(3.2),
        },
        "weight_bytes": int(1_215_364 / ratio),
        "activation_bytes": 14_000_000,
        "file_bytes": None,
        "weight_ratio": ratio,
        "activation_ratio": 5.3,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        "title": "Fixed point on a phantom",
        "command": "unetq demo --out runs/demo",
        "created": "2026-03-01T12:00:00+00:00",
        "versions": {"torch": "2.15.0"},
        "data": {
            "name": "membrane phantom",
            "split": {"train": ["00", "01"], "validation": ["02"], "test": ["03", "04"]},
            "image_shape": [1, 192, 192],
        },
        "network": {"name": "FixedPointUNet", "width": 16, "parameters": 303841},
        "rows": [row("float", "float", "float", 95.3, 1.0), row("Q6.0/Q0.4", "Q0.4", "Q6.0", 94.9, 8.0)],
        "training": {"float": {"loss": [[1, 0.5]], "validation": [[1, 90.0]]}},
        "layers": [
            {"name": "down.0.conv1", "weight": "Q0.4", "input": "UQ6.0", "parameters": 1440, "codes": 16},
            {"name": "last", "weight": "float", "input": None, "parameters": 17},
        ],
    }


@pytest.fixture
def png(tmp_path: Path) -> Path:
    """One white pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "pixel.png"
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00\xff")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


class Page(HTMLParser):
    """Text, tags and attributes of a page; checks that every tag is closed in order."""

    VOID = frozenset({"meta", "img", "br", "hr", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(out: Path, results: dict[str, Any], figures: list[tuple[str, Path]] | None = None) -> Page:
    return Page(write_report(out, results, figures or []).read_text(encoding="utf-8"))


def test_everything_of_the_results_is_there(tmp_path: Path, results: dict[str, Any]) -> None:
    text = written(tmp_path, results).text
    for part in (
        "Fixed point on a phantom",
        "unetq demo --out runs/demo",
        "2026-03-01T12:00:00+00:00",
        "FixedPointUNet, width 16, 303,841 parameters",
        "94.90 [93.90, 95.90] 80.90 88.40 3.20 92.90 (21) 148.4 KiB 8.0x",
        "membrane phantom",
        "1 × 192 × 192",
        "train (2) 00, 01",
        "validation (1) 02",
        "test (2) 03, 04",
        "torch 2.15.0",
        "down.0.conv1 Q0.4 UQ6.0 1,440 16",
        "last float - 17 -",
    ):
        assert part in " ".join(text.split()), part


def test_path_and_folder(tmp_path: Path, results: dict[str, Any]) -> None:
    out = tmp_path / "new" / "folder"
    assert write_report(out, results, []) == out / "report.html"
    assert list(out.iterdir()) == [out / "report.html"]


def test_summary_states_size_and_loss(tmp_path: Path, results: dict[str, Any]) -> None:
    page = written(tmp_path, results)
    assert "Q6.0/Q0.4 is 8.0 times smaller at −0.40 Dice (membrane Dice −0.40)." in page.text
    assert "Float reaches 95.30 Dice on 5 test cases." in page.text
    assert not any(attrs.get("class") == "lost" for _, attrs in page.tags)


@pytest.mark.parametrize(
    ("dice", "ratio", "sentence"),
    [
        (
            92.1,
            8.0,
            "Q6.0/Q0.4 is 8.0 times smaller, but it lost 3.20 Dice, more than 1 (membrane Dice −3.20).",
        ),
        (94.3, 8.0, "Q6.0/Q0.4 is 8.0 times smaller at −1.00 Dice"),
        (94.29, 8.0, "it lost 1.01 Dice, more than 1"),
        (95.5, 2.0, "Q6.0/Q0.4 is 2.0 times smaller at +0.20 Dice"),
        (95.3, 1.0, "Q6.0/Q0.4 is as large as float at ±0.00 Dice"),
        (95.3, 0.5, "Q6.0/Q0.4 is 2.0 times larger at ±0.00 Dice"),
    ],
)
def test_summary_sentence(
    tmp_path: Path, results: dict[str, Any], dice: float, ratio: float, sentence: str
) -> None:
    results["rows"][1] = row("Q6.0/Q0.4", "Q0.4", "Q6.0", dice, ratio)
    assert sentence.replace(" ", "") in written(tmp_path, results).text.replace(" ", "")


def test_summary_compares_with_float_wherever_it_stands(tmp_path: Path, results: dict[str, Any]) -> None:
    results["rows"].reverse()
    assert "Q6.0/Q0.4 is 8.0 times smaller at −0.40 Dice" in written(tmp_path, results).text


def test_without_float_nothing_is_claimed(tmp_path: Path, results: dict[str, Any]) -> None:
    del results["rows"][0]
    text = written(tmp_path, results).text
    assert "There is no float row" in text
    assert "times smaller at" not in text


def test_figures_are_embedded_and_nothing_is_external(
    tmp_path: Path, results: dict[str, Any], png: Path
) -> None:
    page = written(tmp_path / "out", results, [("One pixel.", png), ("Again.", png)])
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    expected = "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()
    assert sources == [expected, expected]
    assert page.text.index("One pixel.") < page.text.index("Again.")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    raw = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "http://" not in raw
    assert "https://" not in raw
    assert "url(" not in raw
    assert str(tmp_path) not in raw


def test_every_string_is_escaped(tmp_path: Path, results: dict[str, Any], png: Path) -> None:
    evil = "<script>alert(\"x\")</script> & 'y'"
    results.update(title=evil, command=evil, created=evil, versions={evil: evil})
    results["data"].update(name=evil, split={"train": [evil], "validation": [evil], "test": [evil]})
    results["network"]["name"] = evil
    results["rows"][1]["name"] = evil
    results["rows"][1]["metrics"]["dice"]["worst_case"] = evil
    results["layers"][0].update(name=evil, weight=evil, input=evil, codes=evil)
    page = written(tmp_path / "out", results, [(evil, png)])
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 14
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == [evil]


@pytest.mark.parametrize("null", [True, False])
def test_optional_parts_may_be_missing_or_null(tmp_path: Path, results: dict[str, Any], null: bool) -> None:
    for key in ("training", "layers"):
        results[key] = None
        if not null:
            del results[key]
    if not null:
        for part in results["rows"]:
            del part["file_bytes"]
    text = written(tmp_path, results).text
    assert "Layers" not in text
    assert "Figures" not in text


REQUIRED: list[tuple[Any, ...]] = [
    ("title",),
    ("command",),
    ("created",),
    ("versions",),
    ("data",),
    ("data", "name"),
    ("data", "image_shape"),
    ("data", "split"),
    ("data", "split", "test"),
    ("network",),
    ("network", "name"),
    ("network", "parameters"),
    ("rows",),
    ("rows", 1, "weights"),
    ("rows", 1, "activations"),
    ("rows", 1, "weight_ratio"),
    ("rows", 1, "metrics", "dice", "mean"),
    ("layers", 1, "weight"),
]


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: ".".join(map(str, path)))
def test_a_missing_key_is_named_and_nothing_is_written(
    tmp_path: Path, results: dict[str, Any], path: tuple[Any, ...]
) -> None:
    broken = copy.deepcopy(results)
    part: Any = broken
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    named = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
    with pytest.raises(ValueError) as error:
        write_report(tmp_path / "out", broken, [])
    assert repr(named) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_figure_that_is_missing_or_no_png_is_named(
    tmp_path: Path, results: dict[str, Any], png: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        write_report(out, results, [("a", png), ("b", tmp_path / "gone.png")])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png is no PNG"):
        write_report(out, results, [("b", tmp_path / "text.png")])
    assert not out.exists()


def test_a_failed_write_keeps_the_older_report(
    tmp_path: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("older")

    def replace(source: object, target: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path, results, [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "older"
