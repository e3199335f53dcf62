"""Two processes with gloo train one network; nnU-Net's own launcher insists on NCCL and CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.nnunet.datasets import FLAT
from tests.processes import run_two

SCRIPT = f"""
import os
import sys
from pathlib import Path

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as base
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import monai_unetq as uq
from monai_unetq.nnunet.trainer import nnUNetTrainerSSQAT
from monai_unetq.sensitivity.metrics import from_first
from tests.nnunet.datasets import load

if __name__ == "__main__":  # nnU-Net's validation starts processes that read this file again
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{{folder / 'rendezvous'}}", rank=rank, world_size=2)
    base.DDP = lambda network, device_ids: DistributedDataParallel(network)  # nnU-Net names a GPU here
    torch.manual_seed(rank)
    plans, document = load(Path(os.environ["PREPARED"]), "{FLAT}")
    section = dict(budget=["weights=4.0bits"], activations="int6", float_epochs=1, epochs=2, iterations=2, val_iterations=1)
    plans["configurations"]["2d"]["monai_unetq"] = dict(section, calibration_batches=2)
    trainer = nnUNetTrainerSSQAT(plans, "2d", 0, document, torch.device("cpu"))
    trainer.run_training()
    state = {{key: value.clone() for key, value in trainer.core.state_dict().items()}}
    assert uq.plan_of(trainer.core).to_json() == from_first(lambda: uq.plan_of(trainer.core).to_json())
    torch.save(state, folder / f"{{rank}}.pt")
    dist.destroy_process_group()
"""


def test_two_processes_end_with_one_network(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREPARED", str(folders))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    first, second = run_two(SCRIPT, tmp_path)
    assert first.keys() == second.keys() and any("format_code" in key for key in first)
    assert not any("skip_supervision" in key for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)
    (fold,) = (tmp_path / "results" / FLAT).glob("nnUNetTrainerSSQAT__*/fold_0")
    saved = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.equal(saved[key], first[key]) for key in saved)
