"""The public face: what ``import monai_unetq`` offers, and that it stays cheap."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import monai_unetq

HEAVY = ("torch", "monai", "numpy", "scipy", "ignite", "matplotlib")


def run_python(program: str) -> str:
    """What a fresh interpreter prints for ``program``."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = run_python(f"import sys, monai_unetq; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_import_takes_less_than_half_a_second() -> None:
    seconds = run_python(
        "import time; start = time.perf_counter(); import monai_unetq; print(time.perf_counter() - start)"
    )
    assert float(seconds) < 0.5


@pytest.mark.parametrize("name", monai_unetq.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(monai_unetq, name)
    assert name in dir(monai_unetq)
    if name in monai_unetq._HOME:
        home = importlib.import_module(f"monai_unetq.{monai_unetq._HOME[name]}")
        assert value is getattr(home, name)
        assert monai_unetq.__dict__[name] is value, "resolved again at each use"


def test_networks_is_a_submodule() -> None:
    assert monai_unetq.networks is importlib.import_module("monai_unetq.networks")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = monai_unetq.quantise


def test_type_checkers_see_the_names_that_resolve() -> None:
    tree = ast.parse(Path(monai_unetq.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == {**monai_unetq._HOME, **dict.fromkeys(monai_unetq._SUBMODULES)}
    assert seen.keys() | {"__version__"} == set(monai_unetq.__all__)


def test_version_is_the_installed_one() -> None:
    assert monai_unetq.__version__ == version("monai-unetq")


def test_package_is_marked_as_typed() -> None:
    assert (Path(monai_unetq.__file__).parent / "py.typed").is_file()
