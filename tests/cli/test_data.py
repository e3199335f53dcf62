"""``unetq data``: what it accepts, prints and refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from monai_unetq.cli import main


def test_phantom_prints_the_folder_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "em", "--phantom", "--size", "32", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    dataset = tmp_path / "Dataset501_EM"
    assert f"data set  {dataset}\n" in printed
    assert "cases     24\n" in printed
    assert "folds     5; fold 0: 16 train, 3 validation, 5 test\n" in printed
    command = "python -m monai.bundle run --config_file bundles/em_unet/configs/train.yaml --dataset_dir"
    assert f"next: {command} {dataset}\n" in printed


def test_source_is_prepared_again_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.datasets.official import write_isbi
    from tests.datasets.test_em_sources import stack

    write_isbi(tmp_path / "isbi", *map(list, stack()))
    arguments = ["data", "em", "--source", str(tmp_path / "isbi"), "--out", str(tmp_path / "raw")]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


def test_problems_are_an_error_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gm").mkdir()
    assert main(["data", "gm", "--source", str(tmp_path / "gm"), "--out", str(tmp_path / "raw")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"unetq: error: {tmp_path / 'gm'}: no grey-matter scans in it")
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["em", "--out", "raw"], "one of the arguments --source --phantom is required"),
        (["em", "--source", "a", "--phantom", "--out", "raw"], "not allowed with argument"),
        (["em", "--phantom"], "the following arguments are required: --out"),
        (["ct", "--phantom", "--out", "raw"], "invalid choice: 'ct'"),
        (["em", "--phantom", "--dimensions", "4", "--out", "raw"], "invalid choice: 4"),
        (["em", "--source", "a", "--out", "raw", "--seed", "1"], "--seed is for --phantom"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_examples_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom monai_unetq.cli import main\n"
        "try:\n    main(['data', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('heavy:', [m for m in ('torch', 'monai', 'numpy', 'SimpleITK') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert "examples:\n  unetq data em" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_data_sets_need_no_torch() -> None:
    program = "import sys\nimport monai_unetq.datasets\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
