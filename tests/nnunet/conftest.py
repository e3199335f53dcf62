"""The preprocessed data sets, made once for all processes of a test session, and nnU-Net's folders as environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.nnunet.datasets import environment, prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with nnU-Net's raw and preprocessed folders."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared if worker_id == "master" else shared.parent
    base = shared / "nnunet"
    with FileLock(shared / "nnunet.lock"):
        if not (base / "done").exists():
            prepare(base)
            (base / "done").touch()
    return base


@pytest.fixture
def folders(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """nnU-Net's folders for one test: the preprocessed data, results of its own."""
    for name, value in environment(prepared).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    yield prepared
