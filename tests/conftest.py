"""Threads, hypothesis profiles and the real data that tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Read by torch when it is first imported, here and in the processes that tests start. Under pytest-xdist every
# worker is a process, so one thread each; it inherits what this file set in the process that started it.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ[_variable] = "1"
    else:
        os.environ.setdefault(_variable, "2")
# nnU-Net takes every core for itself on a CPU. Beside another process its threads then wait for each other at every
# operation; GCC's OpenMP lets them do so by turning in circles for milliseconds, unless it is told to let them sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")

# Examples that load a network for the first time are slow: no deadline. In CI the same examples every time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def em_folder() -> Path:
    """The folder of the real EM slices; tests that need them are skipped where it is absent."""
    data = os.environ.get("UNETQ_DATA")
    folder = (Path(data) if data else Path(__file__).parents[2] / "shared" / "data") / "em"
    if not folder.is_dir():
        pytest.skip(f"no real EM slices at {folder}; set UNETQ_DATA to the folder that holds em/")
    return folder
