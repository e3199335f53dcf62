from __future__ import annotations

import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

from monai_unetq.nnunet import external_folder, install, link, unlink


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trainer folder of an installation of nnunetv2 that tests may change."""
    folder = tmp_path / "site" / "nnunetv2" / "training" / "nnUNetTrainer"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "nnunetv2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in sys.modules if name.split(".")[0] == "nnunetv2"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def test_the_folder_holds_one_module_that_names_the_trainers() -> None:
    (file,) = external_folder().glob("*.py")
    assert file.name == "unetq_trainers.py" and "nnUNetTrainerSSQAT" in file.read_text()


def test_link_and_unlink_can_be_repeated(installed: Path) -> None:
    file = link()
    text = file.read_text()
    assert file.parent == installed and text.startswith("# Written by `unetq nnunet link`")
    assert "from monai_unetq.nnunet.trainer import" in text
    compile(text, str(file), "exec")
    assert link() == file and file.read_text() == text
    assert sorted(installed.iterdir()) == [file]
    assert unlink() == file and unlink() is None
    assert not any(installed.iterdir())


def test_a_module_that_was_left_behind_does_not_fail(installed: Path) -> None:
    text = link().read_text()
    exec(compile(text.replace("monai_unetq", "no_longer_installed"), "module", "exec"), {})


def test_a_wheel_holds_the_folder() -> None:
    settings = ConfigParser()
    settings.read(Path(__file__).parents[2] / "setup.cfg")
    assert settings["options.package_data"]["monai_unetq.nnunet"] == "external/*.py"


def test_a_file_of_somebody_else_stays(installed: Path) -> None:
    file = installed / "unetq_trainers.py"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="was not written by `unetq nnunet link`; move it away"):
        link()
    with pytest.raises(FileExistsError, match="so it stays"):
        unlink()
    assert file.read_text() == "mine"


def test_a_folder_that_cannot_be_written(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(install, "replace_file", refuse)
    with pytest.raises(PermissionError, match=r"Read-only file system.*\n +export nnUNet_extTrainer="):
        link()
    assert not any(installed.iterdir())


def test_without_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install monai-unetq\[nnunet\]"):
        link()
