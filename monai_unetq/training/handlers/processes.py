"""Which process of a distributed training this is, and the network inside what distributes it."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["broadcast_state", "rank", "unwrapped"]


def unwrapped(network: nn.Module) -> nn.Module:
    """The network itself where it is wrapped for several processes or devices."""
    if isinstance(network, (DistributedDataParallel, DataParallel)):
        module: nn.Module = network.module
        return module
    return network


def rank() -> int:
    """Number of this process, 0 for the only one."""
    return distributed.get_rank() if _is_distributed() else 0


@torch.no_grad()
def broadcast_state(network: nn.Module) -> None:
    """Give every process the parameters and buffers of process 0, in place; nothing to do for the only one."""
    if _is_distributed():
        for value in network.state_dict().values():
            distributed.broadcast(value, src=0)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
