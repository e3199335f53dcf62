"""Processes beside that of the tests: two that train together, and a data loader's workers."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["run_two", "worker_processes"]


def worker_processes() -> multiprocessing.context.BaseContext:
    """For a data loader: workers forked from a process of their own, as this one has the threads of several engines."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "monai.data"])
    return context


def run_two(script: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a script in two processes, ``script RANK FOLDER``, and give what they left in ``FOLDER/RANK.pt``."""
    file = folder / "process.py"
    file.write_text(script, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(file), str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return first, second
