"""Kinds of processors, and pages that keep a document for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import processors


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("fpu avx2 avx512f avx512_vnni", "vnni"),
        ("avx2 avx_vnni", "vnni"),
        ("avx2 avx512f", "avx2"),
        ("fpu", "avx2"),
    ],
)
def test_vnni_is_told_by_the_instructions(flags: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        processors, "features", lambda: [name for name in processors._FEATURES if name in flags.split()]
    )
    assert processors.processor_kind() == kind


def test_a_page_keeps_what_another_kind_of_processor_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "speed.md"
    page.write_text("prose\n<a>\n<b>\n", encoding="utf-8")
    for kind, number in (("avx2", 1), ("vnni", 2), ("avx2", 3)):
        monkeypatch.setattr(processors, "processor_kind", lambda kind=kind: kind)
        processors.write_page(
            "speed", {"n": number}, tmp_path, ("<a>", "<b>"), lambda kept: f"{json.dumps(kept)}\n"
        )
    assert page.read_text(encoding="utf-8") == 'prose\n<a>\n{"vnni": {"n": 2}, "avx2": {"n": 3}}\n<b>\n'
    assert processors.documents("speed", tmp_path) == {"vnni": {"n": 2}, "avx2": {"n": 3}}
