"""Binary, ternary and power-of-two rounding against the formulas of their papers, worked out by hand, and Brevitas."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from monai_unetq.formats import QFormat
from monai_unetq.quantizers import (
    power_of_two_codes,
    power_of_two_weights,
    sign_codes,
    sign_quantize,
    sign_weights,
    ternary_codes,
    ternary_tanh,
    ternary_weights,
    weight_scale,
)

INF, NAN = math.inf, math.nan
ONE_AND_A_BIT = 1 + 2.0**-23


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(function: Callable[..., Tensor], upstream: Tensor, *tensors: Tensor) -> list[Tensor | None]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    function(*leaves).backward(upstream)
    return [leaf.grad for leaf in leaves]


weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=7),
    elements=st.floats(-100, 100, width=32) | st.sampled_from((0.0, 0.5, -1.0, 1e-30)),
).map(torch.from_numpy)


# Sign: BNN and XNOR-Net


def test_sign_by_hand() -> None:
    tensor = torch.tensor([-2.0, -1e-40, -0.0, 0.0, 1e-40, 0.3, INF, -INF])
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(sign_codes(tensor.to(dtype)), expected.to(dtype))
        assert torch.equal(sign_quantize(tensor.to(dtype), torch.tensor(0.75)), 0.75 * expected.to(dtype))


@pytest.mark.parametrize("recorded", [True, False])
def test_nan_stays_nan_alone(recorded: bool) -> None:
    tensor = torch.tensor([1.0, NAN, -1.0]).requires_grad_(recorded)
    with torch.set_grad_enabled(recorded):
        for function in (sign_quantize, sign_weights):
            assert function(tensor, torch.tensor(0.5)).isnan().tolist() == [False, True, False]
        assert power_of_two_weights(tensor, torch.tensor(0.5), 4).isnan().tolist() == [False, True, False]
        # Its row has no mean any more, the other one has.
        rows = torch.stack([tensor, torch.ones(3)])
        assert ternary_weights(rows, torch.ones(2), 0).isnan().tolist()[1] == [False] * 3
        assert bool(ternary_codes(rows, 0)[0, 1].isnan())


def test_gradient_of_bnn_by_hand() -> None:
    # Equation 4 of Courbariaux et al.: g · 1{|x| ≤ 1}, times the scale.
    tensor = torch.tensor([-3.0, -ONE_AND_A_BIT, -1.0, -0.2, 0.0, 0.9, 1.0, ONE_AND_A_BIT, INF])
    upstream = torch.arange(1.0, 10.0)
    of_tensor, of_scale = gradients(sign_quantize, upstream, tensor, torch.tensor(0.5))
    assert of_tensor is not None
    assert of_tensor.tolist() == [0.0, 0.0, 1.5, 2.0, 2.5, 3.0, 3.5, 0.0, 0.0]
    assert of_scale == -1 - 2 - 3 - 4 + 5 + 6 + 7 + 8 + 9  # Σ g · sign(x)


def test_gradient_of_a_scale_per_channel_by_hand() -> None:
    tensor = torch.tensor([[-1.0, 2.0, 0.5], [0.0, -0.5, -4.0]])
    upstream = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    scale = torch.tensor([0.5, 2.0])
    of_tensor, of_scale = gradients(lambda t, s: sign_quantize(t, s, 0), upstream, tensor, scale)
    assert of_tensor is not None and of_scale is not None
    assert of_tensor.tolist() == [[0.5, 0.0, 2.0], [2.0, 4.0, 0.0]]
    assert of_scale.tolist() == [-1.0 + 2 + 4, 1.0 - 2 - 4]


def test_gradient_of_xnor_net_by_hand() -> None:
    # Section 3.1: g · (1/n + scale · 1{|w| ≤ 1}), with n = 4 weights to a scale of 3/4, their mean magnitude.
    rows = torch.tensor([[0.5, -1.5, 0.25, -0.75], [-1.0, 1.0, 1.0, 1.0]])
    scale = weight_scale(rows, QFormat("binary"), power_of_two=False)
    assert scale.tolist() == [0.75, 1.0]
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, -1.0, 0.0]])
    of_rows, of_scale = gradients(lambda w, s: sign_weights(w, s, 0), upstream, rows, scale)
    assert of_rows is not None
    assert of_rows.tolist() == [[1.0, 0.5, 3.0, 4.0], [1.25, 1.25, -1.25, 0.0]]
    assert of_scale is None
    assert sign_weights(rows, scale, 0).tolist() == [[0.75, -0.75, 0.75, -0.75], [-1.0, 1.0, 1.0, 1.0]]


def test_pieces_in_the_cache_change_nothing() -> None:
    tensor = normal(3, 1 << 17)  # three pieces
    upstream = normal(3, 1 << 17, seed=1)
    assert torch.equal(sign_quantize(tensor, torch.tensor(0.3)), torch.where(tensor >= 0, 0.3, -0.3))
    of_tensor, of_scale = gradients(sign_quantize, upstream, tensor, torch.tensor(0.3))
    assert of_tensor is not None and of_scale is not None
    torch.testing.assert_close(of_tensor, upstream * 0.3 * (tensor.abs() <= 1))
    torch.testing.assert_close(
        of_scale, (upstream * torch.where(tensor >= 0, 1.0, -1.0)).sum(), rtol=1e-4, atol=1e-2
    )
    strided = tensor.t()[::2]
    assert torch.equal(sign_quantize(strided, torch.tensor(0.3)), torch.where(strided >= 0, 0.3, -0.3))


def test_binary_matches_brevitas() -> None:
    from brevitas.core.quant import BinaryQuant
    from brevitas.core.scaling import ConstScaling

    tensor = torch.cat([normal(500), torch.tensor([0.0, -0.0, INF, -INF])])
    expected = BinaryQuant(ConstScaling(0.375))(tensor)[0]
    assert torch.equal(sign_quantize(tensor, torch.tensor(0.375)), expected)


# Ternary


def test_ternary_weight_networks_by_hand() -> None:
    # Mean magnitudes 0.6 and 2: thresholds 0.42 and 1.4. Scales (0.9 + 1.2 + 0.6 + 0.6) / 4 and (3 + 4) / 2.
    rows = torch.tensor([[0.1, -0.2, 0.9, -1.2, 0.6, -0.6], [3.0, -4.0, 1.4, 1.3, -1.3, 1.0]])
    assert ternary_codes(rows, 0).tolist() == [[0, 0, 1, -1, 1, -1], [1, -1, 0, 0, 0, 0]]
    scale = weight_scale(rows, QFormat("ternary"), power_of_two=False)
    torch.testing.assert_close(scale, torch.tensor([0.825, 3.5]))
    torch.testing.assert_close(weight_scale(rows, QFormat("ternary"), True), torch.tensor([1.0, 4.0]))
    # All together the mean is 7.8 / 6 = 1.3 and the threshold 0.91.
    assert ternary_codes(rows).tolist() == [[0, 0, 0, -1, 0, 0], [1, -1, 1, 1, -1, 1]]
    upstream = normal(2, 6)
    of_rows, of_scale = gradients(lambda w, s: ternary_weights(w, s, 0), upstream, rows, scale)
    assert of_rows is not None and of_scale is not None
    assert torch.equal(of_rows, upstream), "straight through, everywhere"
    torch.testing.assert_close(of_scale, (upstream * ternary_codes(rows, 0)).sum(1))


@settings(max_examples=60)
@given(weights)
def test_ternary_scale_is_the_best_for_its_codes(tensor: Tensor) -> None:
    """The scale of equation 5 has the least squared error that the codes allow (here against numpy's least squares)."""
    rows = tensor.flatten(1)
    scale = weight_scale(rows, QFormat("ternary"), power_of_two=False)
    for row, codes, found in zip(
        rows.double().numpy(), ternary_codes(rows, 0).double().numpy(), scale, strict=True
    ):
        if codes.any():
            best = np.linalg.lstsq(codes[:, None], row, rcond=None)[0].item()
            assert found.item() == pytest.approx(best, rel=1e-4)
        else:
            assert found > 0


def test_ternary_matches_brevitas() -> None:
    from brevitas.core.quant import TernaryQuant
    from brevitas.core.scaling import ConstScaling

    tensor = normal(400)
    threshold = 0.7 * tensor.abs().mean().item()
    scale = 0.5
    expected = TernaryQuant(ConstScaling(scale), threshold / scale)(tensor)[0]
    assert torch.equal(ternary_weights(tensor, torch.tensor(scale)), expected)


def test_ternary_tanh_by_hand() -> None:
    for beta in (0.5, 1.0, 3.0):
        at_half = 0.5 * math.tanh(2 * beta)
        expected = torch.tensor([0.0, at_half, -at_half], dtype=torch.float64)
        found = ternary_tanh(torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64), beta)
        torch.testing.assert_close(found, expected)
        x = torch.tensor([0.0, 0.3, 0.5, -1.0], dtype=torch.float64)
        (slope,) = gradients(lambda t, b=beta: ternary_tanh(t, b), torch.ones(4, dtype=torch.float64), x)
        squares = [
            math.tanh(beta * (2 * v - 1)) ** 2 + math.tanh(beta * (2 * v + 1)) ** 2 for v in x.tolist()
        ]
        assert slope is not None
        torch.testing.assert_close(
            slope, torch.tensor([beta * (2 - s) for s in squares], dtype=torch.float64)
        )


def test_ternary_tanh_tends_to_the_step_and_is_differentiable() -> None:
    tensor = torch.tensor([-5.0, -0.51, -0.49, 0.0, 0.49, 0.51, 5.0], dtype=torch.float64)
    step = torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(ternary_tanh(tensor, 1000.0), step)
    errors = [float((ternary_tanh(tensor, beta) - step).abs().max()) for beta in (1.0, 4.0, 16.0, 64.0)]
    assert errors == sorted(errors, reverse=True)
    probes = normal(20).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ternary_tanh(t, 2.5), (probes,))


# Powers of two


def by_the_paper(row: np.ndarray, bits: int) -> np.ndarray:
    """Zhou et al., equations 1 to 4, in float64 and one weight at a time."""
    largest = float(np.abs(row).max())
    first = math.floor(math.log2(4 * largest / 3))
    last = first + 1 - 2 ** (bits - 1) // 2
    candidates = [0.0, *(2.0**n for n in range(last, first + 1))]
    out = np.zeros_like(row, dtype=np.float64)
    for index, value in np.ndenumerate(row):
        for alpha, beta in pairwise(candidates):
            if (alpha + beta) / 2 <= abs(value) < 3 * beta / 2:
                out[index] = math.copysign(beta, value)
    return out


@pytest.mark.parametrize(
    ("largest", "bits", "scale"),
    # n1 = ⌊log2(4s/3)⌋; n2 = n1 + 1 - 2^(B-2).
    [
        (1.0, 3, 0.5),  # n1 = 0, n2 = -1
        (1.0, 2, 1.0),  # n2 = n1: zero and one power
        (0.75, 4, 0.125),  # 4s/3 = 1: n1 = 0, n2 = -3
        (0.7499999, 4, 0.0625),  # n1 = -1, n2 = -4
        (1.5, 4, 0.25),  # n1 = 1, n2 = -2
        (100.0, 5, 1.0),  # 133.3: n1 = 7, n2 = 0
        (0.01, 6, 2.0**-22),  # 0.01333: n1 = -7, n2 = -22
    ],
)
def test_incremental_network_quantization_scale_by_hand(largest: float, bits: int, scale: float) -> None:
    rows = torch.tensor([[0.0, -largest, largest / 5]])
    assert weight_scale(rows, QFormat(f"pow2-{bits}"), power_of_two=False).tolist() == [scale]


def test_powers_of_two_by_hand() -> None:
    # pow2-4 on the scale 1/8: values 0, 1/8, 1/4, 1/2, 1 with borders at 1/16, 3/16, 3/8, 3/4.
    tensor = torch.tensor([0.0, 0.0624, 0.0625, 0.1874, 0.1875, 0.3749, -0.375, 0.7499, 0.75, -1.4, 9.0, INF])
    codes = [0, 0, 1, 1, 2, 2, -3, 3, 4, -4, 4, 4]
    values = [0, 0, 0.125, 0.125, 0.25, 0.25, -0.5, 0.5, 1.0, -1.0, 1.0, 1.0]
    scale = torch.tensor(0.125)
    assert power_of_two_codes(tensor, scale, 4).tolist() == codes
    assert power_of_two_weights(tensor, scale, 4).tolist() == values
    upstream = normal(12)
    of_tensor, of_scale = gradients(lambda w, s: power_of_two_weights(w, s, 4), upstream, tensor, scale)
    assert of_tensor is not None
    assert torch.equal(of_tensor, upstream), "straight through, everywhere"
    assert of_scale is None


@settings(max_examples=80)
@given(weights, st.integers(2, 6))
def test_powers_of_two_are_the_papers(tensor: Tensor, bits: int) -> None:
    number_format, rows = QFormat(f"pow2-{bits}"), tensor.flatten(1)
    rows = rows[rows.abs().amax(1) > 2.0**-40]
    if not len(rows):
        return
    found = power_of_two_weights(rows, weight_scale(rows, number_format, True), number_format.qmax, 0)
    expected = np.stack([by_the_paper(row, bits) for row in rows.double().numpy()])
    assert torch.equal(found.double(), torch.from_numpy(expected))


# Scales


@pytest.mark.parametrize(("spelling", "empty"), [("binary", 2.0**-40), ("ternary", 3.0), ("pow2-3", 2.0)])
def test_a_row_of_zeros_has_a_scale(spelling: str, empty: float) -> None:
    rows = torch.tensor([[3.0, -3.0], [0.0, 0.0], [1.0, 1.0]])
    scale = weight_scale(rows, QFormat(spelling), power_of_two=False)
    assert scale[1] == empty
    alone = weight_scale(torch.zeros(2, 3), QFormat(spelling), power_of_two=False)
    assert alone.tolist() == [2.0**-40 if spelling == "binary" else 1.0] * 2


@settings(max_examples=40)
@given(weights, st.sampled_from(("binary", "ternary", "pow2-2", "pow2-5")), st.integers(-8, 8))
def test_each_row_by_itself_and_scaled_by_a_power_of_two(
    tensor: Tensor, spelling: str, exponent: int
) -> None:
    rows, number_format = tensor.flatten(1), QFormat(spelling)
    rows = rows[rows.abs().amax(1) > 2.0**-20]
    if not len(rows):
        return
    scale = weight_scale(rows, number_format, power_of_two=False)
    alone = torch.cat([weight_scale(row[None], number_format, power_of_two=False) for row in rows])
    torch.testing.assert_close(scale, alone, rtol=1e-6, atol=0)
    assert torch.equal(weight_scale(rows * 2.0**exponent, number_format, False), scale * 2.0**exponent)
