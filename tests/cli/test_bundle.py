"""``unetq bundle``: a complete copy, from a checkout and from a wheel, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from monai_unetq.cli import main
from monai_unetq.cli.bundle import copy_bundle

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"train", "evaluate", "inference", "multi_gpu_train", "fixed_point"}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["em", "gm", "nih"])
def test_a_copy_is_complete(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "copy"
    assert main(["bundle", kind, "--out", str(out)]) == 0
    assert f"--bundle_root {out}" in capsys.readouterr().out
    found = names(out)
    assert {f"configs/{name}.yaml" for name in CONFIGS} <= found
    assert {"LICENSE", "configs/metadata.json", "configs/logging.conf", "docs/README.md"} <= found
    assert {"docs/data_license.txt", "models/.gitignore"} <= found
    assert not any(name.endswith((".pt", ".unetq")) for name in found)
    assert (out / "configs" / "train.yaml").read_bytes() == (
        ROOT / "bundles" / f"{kind}_unet" / "configs" / "train.yaml"
    ).read_bytes()


def test_a_folder_that_holds_something_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["bundle", "em", "--out", str(tmp_path)]) == 2
    assert "exists and is not an empty folder; give another --out" in capsys.readouterr().err
    assert names(tmp_path) == {"mine.txt"}
    empty = tmp_path / "empty"
    empty.mkdir()
    assert copy_bundle("em", empty) == empty
    assert (empty / "LICENSE").is_file()


def test_the_wheel_holds_the_bundles_and_its_command_finds_them(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools builds in the folder that it is given
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "*.pt", "*.unetq", "tensorboard"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    for kind in ("em", "gm", "nih"):
        shutil.copy(ROOT / f"bundles/{kind}_unet/models/.gitignore", source / f"bundles/{kind}_unet/models")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name.partition("/bundles/")[2] for name in archive.namelist() if "/bundles/" in name}
    for kind in ("em", "gm", "nih"):
        assert held >= {f"{kind}_unet/{name}" for name in names_in_git(kind)}
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    command = "import sys; from monai_unetq.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", command, "bundle", "gm", "--out", str(tmp_path / "gm")],
        env={"PYTHONPATH": str(target), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "gm") == names_in_git("gm")


def names_in_git(kind: str) -> set[str]:
    """What a bundle holds, without what trainings left in it."""
    bundle = ROOT / "bundles" / f"{kind}_unet"
    return {name for name in names(bundle) if not name.startswith("models/")} | {"models/.gitignore"}


def test_the_working_directory_may_be_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(["bundle", "em", "--out", "."]) == 0
    assert (folder / "configs" / "train.yaml").is_file()
    assert list(tmp_path.iterdir()) == [folder]
