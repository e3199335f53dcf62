"""``unetq`` as its users start it: in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path
from typing import Any

import pytest

import monai_unetq
from monai_unetq.cli import main

RESULT: dict[str, Any] = {"rows": []}


def unetq(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from monai_unetq.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120", **environment},
    )


def test_installed_command_prints_its_version() -> None:
    script = Path(sysconfig.get_path("scripts")) / "unetq"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"unetq {monai_unetq.__version__}\n")


@pytest.mark.parametrize("command", [(), ("demo",), ("format",), ("inspect",)], ids=" ".join)
def test_help_shows_examples(command: tuple[str, ...]) -> None:
    done = unetq(*command, "--help")
    assert done.returncode == 0
    assert f"examples:\n  unetq {' '.join(command)}" in done.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("format", "Q0.4")], ids=" ".join)
def test_answers_within_a_second(arguments: tuple[str, ...]) -> None:
    start = time.perf_counter()
    assert unetq(*arguments).returncode == 0
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("arguments", [["--help"], ["format", "Q0.4", "int4"]], ids=" ".join)
def test_imports_neither_torch_nor_numpy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom monai_unetq.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print('heavy:', [m for m in ('torch', 'monai', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_no_command_shows_usage() -> None:
    done = unetq()
    assert done.returncode == 2
    assert "usage: unetq" in done.stderr and "COMMAND" in done.stderr


def test_format_prints_what_formats_can_represent() -> None:
    done = unetq("format", "Q0.4", "UQ6.0", "int4", "float")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["format", "kind", "signed", "bits", "levels", "step", "min", "max"]
    assert rows[2:] == [
        ["Q0.4", "fixed", "yes", "4", "16", "0.0625", "-0.5", "0.4375"],
        ["UQ6.0", "fixed", "no", "6", "64", "1", "0", "63"],
        ["int4", "int", "yes", "4", "16", "calibrated", "calibrated", "calibrated"],
        ["float", "float", "yes", "32", str(2**32), "-", "-", "-"],
    ]


def test_bad_format_is_an_error_without_traceback_and_without_table() -> None:
    done = unetq("format", "Q0.4", "Q4", UNETQ_DEBUG="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("unetq: error: 'Q4' is not a number format; accepted: Q<i>.<f>")
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = unetq("format", "Q4", UNETQ_DEBUG="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr and "ValueError" in done.stderr


def test_demo_refuses_a_bad_format_before_it_writes_anything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = unetq("demo", "--weights", "Q0,4", "--out", str(out))
    assert done.returncode == 2
    assert done.stderr.startswith("unetq: error: 'Q0,4' is not a number format")
    assert not out.exists()


@pytest.mark.parametrize("steps", ["0", "-5", "many"])
def test_demo_refuses_steps_below_one(steps: str) -> None:
    done = unetq("demo", f"--steps={steps}")
    assert done.returncode == 2
    assert f"--steps: expected a whole number of at least 1, found '{steps}'" in done.stderr


@pytest.fixture
def recipe_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A recipe that trains nothing: the arguments of each call of ``recipe.demo``."""
    calls: list[dict[str, Any]] = []

    def demo(**arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return RESULT

    recipe = types.ModuleType("monai_unetq.recipe")
    recipe.demo = demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "monai_unetq.recipe", recipe)
    monkeypatch.setattr(monai_unetq, "recipe", recipe, raising=False)
    monkeypatch.setattr(
        "monai_unetq.report.text_table", lambda result: f"table of {len(result['rows'])} rows"
    )
    return calls


def test_demo_leaves_lengths_to_the_recipe(
    recipe_calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo"]) == 0
    assert recipe_calls == [
        {
            "data": None,
            "out": Path("unetq-demo"),
            "width": None,
            "steps": None,
            "qat_steps": None,
            "weights": "Q0.4",
            "activations": "Q6.0",
            "seed": 0,
            "device": "cpu",
            "command": "unetq demo",
        }
    ]
    assert capsys.readouterr().out == f"table of 0 rows\n\nreport: {Path('unetq-demo') / 'report.html'}\n"


def test_demo_passes_every_option_on(recipe_calls: list[dict[str, Any]]) -> None:
    arguments = (
        "--data 'my em' --out there --width 32 --steps 400 --qat-steps 100 --weights int4 --activations int6"
    )
    assert main(["demo", *shlex.split(arguments), "--seed", "7", "--device", "cuda"]) == 0
    assert recipe_calls == [
        {
            "data": Path("my em"),
            "out": Path("there"),
            "width": 32,
            "steps": 400,
            "qat_steps": 100,
            "weights": "int4",
            "activations": "int6",
            "seed": 7,
            "device": "cuda",
            "command": f"unetq demo {arguments} --seed 7 --device cuda",
        }
    ]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("em/label/07.png: 3 channels, expected 1"),
        FileNotFoundError("em: no such folder"),
        ImportError("figures need matplotlib: pip install monai-unetq[report]"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_recipe_become_one_line(
    error: Exception,
    recipe_calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**arguments: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["monai_unetq.recipe"], "demo", fail)
    monkeypatch.delenv("UNETQ_DEBUG", raising=False)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f"unetq: error: {error}\n"


def test_interrupted_demo_says_how_to_resume(
    recipe_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(**arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["monai_unetq.recipe"], "demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "unetq: interrupted; the same command resumes the run\n"
