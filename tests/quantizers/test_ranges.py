"""Scales found from values: what each method promises, and the observer's memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monai_unetq.formats import QFormat
from monai_unetq.quantizers import (
    RangeMethod,
    RangeObserver,
    fake_quantize,
    find_scale,
    round_to_power_of_two,
)

METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse")
formats = st.sampled_from(("int2", "int4", "int8", "int16", "uint1", "uint4", "uint8")).map(QFormat)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(rows: Tensor, scale: Tensor, number_format: QFormat) -> Tensor:
    """Mean squared error of every row, in float64."""
    rounded = fake_quantize(rows.double(), scale.double(), number_format.qmin, number_format.qmax, 0)
    return (rounded - rows.double()).square().mean(dim=1)


def is_power_of_two(scale: Tensor) -> bool:
    return all(math.frexp(s)[0] == 0.5 for s in scale.tolist())


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Rows of very different size, normal, heavy-tailed, one-sided or zero."""
    rows = normal(4, draw(st.integers(1, 300)), seed=draw(st.integers(0, 1000)))
    rows = draw(st.sampled_from((rows, rows**3, rows.abs(), -rows.abs(), rows.relu())))
    return rows * 10.0 ** torch.tensor(draw(st.lists(st.integers(-6, 4), min_size=4, max_size=4)))[:, None]


@settings(max_examples=60)
@given(matrices(), formats, st.sampled_from(METHODS), st.booleans())
def test_scales_are_positive_one_a_row(
    rows: Tensor, number_format: QFormat, method: RangeMethod, power_of_two: bool
) -> None:
    scale = find_scale(rows, number_format, method, power_of_two)
    assert (scale.shape, scale.dtype) == ((4,), torch.float32)
    assert bool((scale > 0).all())
    if power_of_two:
        assert is_power_of_two(scale)


@settings(max_examples=60)
@given(matrices(), formats, st.booleans())
def test_mse_is_never_worse_than_minmax(rows: Tensor, number_format: QFormat, power_of_two: bool) -> None:
    by_mse = error(rows, find_scale(rows, number_format, "mse", power_of_two), number_format)
    by_minmax = error(rows, find_scale(rows, number_format, "minmax", power_of_two), number_format)
    assert bool((by_mse <= by_minmax * (1 + 1e-5)).all())


@settings(max_examples=40)
@given(matrices(), st.booleans())
def test_mse_finds_the_best_of_a_fine_search(rows: Tensor, power_of_two: bool) -> None:
    number_format = QFormat("int4")
    found = error(rows, find_scale(rows, number_format, "mse", power_of_two), number_format)
    top = find_scale(rows, number_format, "minmax", power_of_two)
    shrinks = [2.0**-k for k in range(12)] if power_of_two else [k / 400 for k in range(8, 401)]
    best = torch.stack([error(rows, top * shrink, number_format) for shrink in shrinks]).amin(dim=0)
    assert bool((found <= best * (1.0 if power_of_two else 1.2) + 1e-30).all())


@settings(max_examples=60)
@given(matrices(), st.sampled_from(("int4", "int8")).map(QFormat), st.booleans())
def test_minmax_cuts_nothing(rows: Tensor, number_format: QFormat, power_of_two: bool) -> None:
    scale = find_scale(rows, number_format, "minmax", power_of_two)[:, None]
    assert bool((rows <= (number_format.qmax + 1e-3) * scale).all())
    assert bool((rows >= (number_format.qmin - 1e-3) * scale).all())


def test_minmax_by_hand() -> None:
    rows = torch.tensor([[0.5, 7.0], [-8.0, 0.1], [-4.0, 7.0], [-16.0, 7.0]])
    assert find_scale(rows, QFormat("int4"), "minmax", False).tolist() == [1.0, 1.0, 1.0, 2.0]
    # The negative end has one code more: -8 fits at scale 1, 8 does not.
    rows = torch.tensor([[8.0], [-8.0], [7.0], [-9.0]])
    assert find_scale(rows, QFormat("int4"), "minmax", True).tolist() == [2.0, 1.0, 1.0, 2.0]
    assert find_scale(torch.tensor([[30.0, 1.0]]), QFormat("uint4"), "minmax", False).tolist() == [2.0]


def test_mse_cuts_outliers_that_minmax_keeps() -> None:
    rows = torch.cat([normal(1, 10000), torch.tensor([[60.0]])], dim=1)
    number_format = QFormat("int4")
    for power_of_two in (True, False):
        wide = find_scale(rows, number_format, "minmax", power_of_two)
        narrow = find_scale(rows, number_format, "mse", power_of_two)
        assert narrow < wide / 4
        assert error(rows, narrow, number_format) < error(rows, wide, number_format) / 2


def test_percentile_cuts_one_in_a_thousand() -> None:
    rows = torch.arange(100_000.0).flip(0)[None]
    scale = find_scale(rows, QFormat("uint8"), "percentile", False)
    share = (rows > scale * 255 * (1 + 1e-6)).double().mean().item()
    assert share == pytest.approx(0.001, rel=0.02)
    assert find_scale(-rows, QFormat("int8"), "percentile", False) == pytest.approx(99_900 / 128, rel=1e-3)


def test_percentile_of_nearly_all_zeros_goes_by_the_others() -> None:
    # It used to be 2^-40, which cut every value that is not zero.
    rows = torch.zeros(1, 100_000)
    rows[0, :50] = 255.0
    assert find_scale(rows, QFormat("uint8"), "percentile", False).tolist() == [1.0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_rows_without_values_take_the_largest_scale_of_the_others(
    method: RangeMethod, power_of_two: bool
) -> None:
    # A scale of almost nothing would cut all that training puts there, and the gradient with it.
    rows = torch.zeros(3, 8)
    assert find_scale(rows, QFormat("int4"), method, power_of_two).tolist() == [1.0] * 3
    rows[1], rows[2] = 7.0, 14.0
    rows[0, 0] = 1e-20
    zero, small, large = find_scale(rows, QFormat("int4"), method, power_of_two).tolist()
    assert (small, large) == pytest.approx((1.0, 2.0), rel=0.5)
    assert zero >= large / 2
    assert find_scale(rows[2:], QFormat("int4"), method, power_of_two).tolist() == [large]


@pytest.mark.parametrize("method", METHODS)
def test_unsigned_formats_go_by_the_positive_values(method: RangeMethod) -> None:
    positive = normal(1, 5000).abs()
    both = torch.cat([positive, -1000 * positive[:, :1]], dim=1)
    scales = [find_scale(rows, QFormat("uint4"), method, False).item() for rows in (positive, both)]
    assert scales[1] == pytest.approx(scales[0], rel=0.1 if method == "percentile" else 0.02)
    assert find_scale(-positive, QFormat("uint4"), method, False).tolist() == [1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinity_are_refused(bad: float, method: RangeMethod) -> None:
    rows = normal(2, 10)
    rows[1, 3] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        find_scale(rows, QFormat("int8"), method, True)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'max' is unknown, expected one of \('minmax', 'percentile', 'mse'\)"
    ):
        find_scale(normal(1, 4), QFormat("int8"), "max", True)  # type: ignore[arg-type]


def test_round_to_power_of_two() -> None:
    exponents = torch.arange(-120.0, 121.0)
    powers = torch.from_numpy(2.0 ** exponents.double().numpy()).float()
    assert torch.equal(round_to_power_of_two(powers), powers)
    assert torch.equal(round_to_power_of_two(powers * 1.4), powers), "below √2: down"
    assert torch.equal(round_to_power_of_two(powers * 1.42), powers * 2), "above √2: up"


# Observer


def test_observer_keeps_small_batches_whole() -> None:
    observer = RangeObserver()
    batches = [normal(2, 3, 8, 8, seed=s) for s in range(3)]
    for batch in batches:
        observer.update(batch)
    seen = torch.cat([b.flatten() for b in batches])
    assert set(seen.tolist()) == set(observer.values().tolist())
    for method in METHODS:
        expected = find_scale(observer.values()[None], QFormat("int8"), method, True)[0]
        assert torch.equal(observer.scale(QFormat("int8"), method, True), expected)
    assert observer.scale(QFormat("int8"), "minmax", False).shape == ()


def test_observer_never_loses_an_extreme() -> None:
    observer = RangeObserver()
    for seed in range(80):
        batch = normal(200_000, seed=seed)
        batch[123_457] = 10.0 + seed
        batch[77_777] = -10.0 - seed
        observer.update(batch)
    assert observer.values().aminmax().min.item() == -89.0
    assert observer.values().aminmax().max.item() == 89.0


def test_observer_memory_is_bounded_and_batches_weigh_alike() -> None:
    observer = RangeObserver()
    largest = 0
    for number in range(150):
        observer.update(torch.full((60_000,), float(number)))
        largest = max(largest, observer.values().numel())
    assert largest <= RangeObserver.IN_ALL
    counts = torch.bincount(observer.values().long(), minlength=150)
    assert int(counts.min()) > 1000
    assert int(counts.max()) <= 1.1 * int(counts.min())


def test_observer_samples_all_columns_and_rows_of_an_image() -> None:
    # A stride of a power of two took its sample of a 512² image from a single column.
    shape = (1, 8, 512, 512)
    for dim, sizes in ((3, (1, 1, 1, 512)), (2, (1, 1, 512, 1)), (1, (1, 8, 1, 1))):
        observer = RangeObserver()
        observer.update(torch.arange(float(shape[dim])).view(sizes).expand(shape))
        counts = torch.bincount(observer.values().long(), minlength=shape[dim])
        mean = counts.double().mean().item()
        assert abs(counts - mean).max() < 5 * mean**0.5 + 1, "not evenly"


def test_observer_is_deterministic_and_holds_no_graph() -> None:
    values = []
    for _ in range(2):
        observer = RangeObserver()
        for seed in range(3):
            batch = normal(1, 4, 64, 700, seed=seed).requires_grad_()
            observer.update(batch.to(memory_format=torch.channels_last) if seed else batch)
        values.append(observer.values())
    assert torch.equal(*values)
    assert not values[0].requires_grad


def test_observer_takes_half_precision_and_empty_batches() -> None:
    observer = RangeObserver()
    observer.update(torch.zeros(0, 3))
    observer.update(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert observer.values().dtype == torch.float32
    assert observer.values().max() == 2.0


def test_observer_without_values() -> None:
    for ask in (RangeObserver().values, lambda: RangeObserver().scale(QFormat("int8"), "mse", True)):
        with pytest.raises(ValueError, match="no values seen: calibrate with at least one batch"):
            ask()


def test_observer_shows_nan_to_the_search() -> None:
    observer = RangeObserver()
    batch = torch.zeros(1_000_000)
    batch[500_001] = math.nan  # not in the sample, but in the extremes
    observer.update(batch)
    with pytest.raises(ValueError, match="NaN"):
        observer.scale(QFormat("int8"), "mse", True)


@settings(max_examples=40)
@given(matrices(), st.sampled_from(METHODS))
def test_binary_scale_is_the_least_squares_optimum_whatever_the_method(
    rows: Tensor, method: RangeMethod
) -> None:
    # XNOR-Net, equation 6. Error of ±scale: Σ(w - scale · sign(w))².
    rows = rows[rows.abs().amax(1) > 1e-4]
    if not len(rows):
        return
    scale = find_scale(rows, QFormat("binary"), method, False)

    def squared(scale: Tensor) -> Tensor:
        return (rows.abs().double() - scale.double()[:, None]).square().sum(1)

    for factor in (0.99, 1.01):
        assert bool((squared(scale) < squared(scale * factor)).all())
    assert is_power_of_two(find_scale(rows, QFormat("binary"), method, True))


def test_binary_scale_of_nothing_is_that_of_the_others() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, -1.0], [0.5, 0.5]])
    assert find_scale(rows, QFormat("binary"), "mse", False).tolist() == [2.0, 2.0, 0.5]
    assert find_scale(torch.zeros(1, 3), QFormat("binary"), "mse", False).tolist() == [1.0]


@pytest.mark.parametrize("spelling", ["binary", "pow2-4"])
def test_formulas_refuse_nan_too(spelling: str) -> None:
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        find_scale(torch.tensor([[1.0, math.nan]]), QFormat(spelling), "mse", True)
