"""Parameter groups of quantization-aware training: weights, learned step sizes and supervision heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers import SupervisionHead
from ..quantizers import Quantizer

__all__ = ["parameter_groups"]


def parameter_groups(
    network: nn.Module, learning_rate: float, scales: float = 3.0, heads: float = 10.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with its learning rate; schedulers that multiply keep their proportions.

    A step size is trained by its logarithm: with Adam a step changes it by about the learning rate, in powers of two,
    whatever its size. At the learning rate of trained weights it would hardly move in a short training. The heads begin
    with random weights. Neither decays.

    Args:
        network: quantized, with or without learned scales and heads, or what distributes it; groups without a parameter
            are left out.
        learning_rate: of weights, biases and norms.
        scales: the step sizes' learning rate over that.
        heads: the heads' learning rate over that.

    Raises:
        ValueError: if a learning rate is not positive.
    """
    for name, value in (("learning_rate", learning_rate), ("scales", scales), ("heads", heads)):
        if not value > 0:
            raise ValueError(f"parameter_groups: {name} is {value}, expected a positive number")
    steps = {id(p) for m in network.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    of_heads = {id(p) for m in network.modules() if isinstance(m, SupervisionHead) for p in m.parameters()}
    weights: list[nn.Parameter] = []
    learned: list[nn.Parameter] = []
    supervision: list[nn.Parameter] = []
    for parameter in network.parameters():
        head = id(parameter) in of_heads
        (learned if id(parameter) in steps else supervision if head else weights).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": learning_rate},
        {"params": learned, "lr": scales * learning_rate, "weight_decay": 0.0},
        {"params": supervision, "lr": heads * learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
