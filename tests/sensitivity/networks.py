"""Tiny networks whose whole Hessian can be computed, and the exact trace of each of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

Loss = Callable[[Any, Any], Tensor]


class Level(nn.Module):
    """One level of a U-Net in 2D: a skip, a strided and a transposed convolution, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 2, 3, padding=1)
        self.down, self.up = nn.Conv2d(2, 2, 2, stride=2), nn.ConvTranspose2d(2, 2, 2, stride=2)
        self.read = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        skip = torch.tanh(self.enter(image))
        up = torch.tanh(self.up(torch.tanh(self.down(skip))))
        out: Tensor = self.read(torch.cat([skip, up], 1))
        return out


class DeepSupervised(Level):
    """Returns a list: the result, and one from below."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, 1, 1)

    def forward(self, image: Tensor) -> Any:
        skip = torch.tanh(self.enter(image))
        low = torch.tanh(self.down(skip))
        up = torch.tanh(self.up(low))
        return [self.read(torch.cat([skip, up], 1)), self.head(low)]


class Linear(nn.Module):
    """Two linear layers on the pixels of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.second(input=torch.tanh(self.first(image)))
        return out


def normed(norm: nn.Module) -> nn.Module:
    """Two convolutions with a norm of two channels between them; running statistics that are not 0 and 1."""
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), norm, nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1)
    ).train()
    with torch.no_grad():
        network(1 + 2 * torch.randn(4, 1, 4, 4))
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def solid() -> nn.Module:
    """In 3D."""
    return nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Tanh(), nn.ConvTranspose3d(2, 1, 2, stride=2))


def bce(output: Tensor, label: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, label)


def deep_bce(outputs: Any, label: Tensor) -> Tensor:
    return bce(outputs[0], label) + 0.5 * bce(outputs[1], F.max_pool2d(label, 2))


def exact(network: nn.Module, loss: Loss, image: Tensor, label: Any, layer: str, kind: str) -> Tensor:
    """The exact Hessian's diagonal for a weight, or for a layer's input, in the tensor's shape."""
    module = dict(network.named_modules())[layer]
    if kind == "weight":
        tensor = module.get_parameter("weight").detach()

        def value(moved: Tensor) -> Tensor:
            return loss(functional_call(network, {f"{layer}.weight": moved}, (image,)), label)
    else:
        seen: list[Tensor] = []
        hook = module.register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["input"]), with_kwargs=True
        )
        network(image)
        hook.remove()
        tensor = torch.zeros_like(seen[0])

        def value(moved: Tensor) -> Tensor:
            def change(m: nn.Module, args: Any, kwargs: Any) -> Any:
                return (args[0] + moved,) if args else (), {n: t + moved for n, t in kwargs.items()}

            hook = module.register_forward_pre_hook(change, with_kwargs=True)
            try:
                return loss(network(image), label)
            finally:
                hook.remove()

    size = tensor.numel()
    return hessian(value)(tensor).reshape(size, size).diagonal().reshape(tensor.shape).detach()
