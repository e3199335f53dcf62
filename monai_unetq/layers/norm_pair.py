"""Batch norm that has been paired with the convolution in front of it, so that the weight quantizer sees
the folded weight.

In evaluation, and where its statistics are frozen, the convolution computes the whole pair from the quantized
folded weight w·γ/√(σ²+ε) and the batch norm passes its input on: exactly what is left after ``fold``. In
training the convolution runs with the quantized folded weight brought back to w's scale, and the batch norm
normalizes with the batch's statistics as ever (Jacob et al., CVPR 2018, section 3.2, at the cost of
operations on the weight only).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["PAIRED_NORMS", "PairedNorm"]


class PairedNorm(_BatchNorm):
    """A batch norm whose convolution applies it in evaluation; made in place by ``surgery.quantize``.

    ``frozen`` keeps it in evaluation whatever mode the network is set to, so that training goes on with fixed
    statistics in any training loop.
    """

    frozen: bool = False

    def train(self, mode: bool = True) -> PairedNorm:
        """Training mode, unless frozen."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Batch norm of (N, C, …) in training; in evaluation the input, normalized by the convolution."""
        return super().forward(input) if self.training else input

    def gain(self) -> Tensor:
        """γ/√(σ²+ε) from the running statistics, (C,); the folded weight is w · gain."""
        assert self.running_var is not None  # a batch norm without statistics is never paired
        inverse = torch.rsqrt(self.running_var + self.eps)
        return inverse if self.weight is None else inverse * self.weight

    def shift(self, gain: Tensor, bias: Tensor | None) -> Tensor:
        """The folded bias β + (b - μ)·gain, (C,)."""
        assert self.running_mean is not None
        mean = -self.running_mean if bias is None else bias - self.running_mean
        return mean * gain if self.bias is None else torch.addcmul(self.bias, mean, gain)


class PairedBatchNorm1d(PairedNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` of a pair."""


class PairedBatchNorm2d(PairedNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` of a pair."""


class PairedBatchNorm3d(PairedNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` of a pair."""


class PairedSyncBatchNorm(PairedNorm, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` of a pair."""


PAIRED_NORMS: dict[type[nn.Module], type[PairedNorm]] = {
    nn.BatchNorm1d: PairedBatchNorm1d,
    nn.BatchNorm2d: PairedBatchNorm2d,
    nn.BatchNorm3d: PairedBatchNorm3d,
    nn.SyncBatchNorm: PairedSyncBatchNorm,
}
"""Class of a batch norm → class of the same module in a pair."""
