"""``one_line``."""

from __future__ import annotations

from monai_unetq.errors import one_line


def test_one_line() -> None:
    assert one_line(ValueError("no\n  such\tlayer ")) == "no such layer"
    assert one_line(KeyError()) == "KeyError"
