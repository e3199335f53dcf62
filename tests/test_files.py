"""``files``: written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from monai_unetq.files import replace_file, write_json


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    before = file.read_bytes()

    def fail(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        replace_file(file, fail)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
