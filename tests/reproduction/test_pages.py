"""Pages of results: only what stands between the marks changes; intervals by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from monai_unetq.reproduction.pages import between, interval, write_page


def test_the_interval_is_students() -> None:
    # mean 2, standard deviation 1, t(0.975, 2) = 4.303: 4.303 / √3 = 2.48
    assert interval([1.0, 2.0, 3.0]) == "2.00 ± 2.48"
    assert interval([1.0, 2.0, 3.0], "+") == "+2.00 ± 2.48"
    assert interval([1.5]) == "1.50"
    assert interval([-1.0], "+") == "-1.00"


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    assert between("before <a>old<b> after", "<a>", "<b>", "new") == "before <a>\nnew<b> after"
    for text in ("<a> alone", "alone <b>", "<b> wrong order <a>"):
        with pytest.raises(ValueError, match="are missing"):
            between(text, "<a>", "<b>", "new")


def test_a_page_and_its_documents(tmp_path: Path) -> None:
    source, page = tmp_path / "source", tmp_path / "study.md"
    source.mkdir()
    (source / "gm.json").write_text(json.dumps({"dice": 1}))
    page.write_text("text\n<a>\n<b>\nrest\n")
    found = write_page("study", source, tmp_path, ("<a>", "<b>"), lambda documents: f"{dict(documents)}\n")
    assert found == {"gm": {"dice": 1}}
    assert page.read_text() == "text\n<a>\n{'gm': {'dice': 1}}\n<b>\nrest\n"
    assert json.loads((tmp_path / "study-gm.json").read_text()) == {"dice": 1}
    page.write_text("no marks")
    (tmp_path / "study-gm.json").unlink()
    with pytest.raises(ValueError, match="are missing"):
        write_page("study", source, tmp_path, ("<a>", "<b>"), lambda documents: "")
    assert page.read_text() == "no marks" and not (tmp_path / "study-gm.json").exists()
