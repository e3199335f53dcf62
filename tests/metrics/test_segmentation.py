"""Segmentation measures against values computed by hand and against plain numpy and scipy."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import ndimage, stats

from monai_unetq.metrics import METRICS, Summary, score, summarize


def constant(value: int, shape: tuple[int, ...] = (1, 6, 8)) -> np.ndarray:
    return np.full(shape, value, dtype=np.uint8)


def vertical_membrane(*columns: int, shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    """Interior everywhere but in the given columns."""
    mask = np.ones((1, *shape), dtype=np.uint8)
    mask[..., list(columns)] = 0
    return mask


def cells(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random blobs, about a quarter of which is background."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    return (noise > np.quantile(noise, 0.25)).astype(np.uint8)[None]


def reference(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """The four measures by numpy and distance transforms, in float64."""

    def dice(a: np.ndarray, b: np.ndarray) -> float:
        return 200.0 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))

    def boundary(mask: np.ndarray) -> np.ndarray:
        return mask & ~ndimage.binary_erosion(mask)

    p, y = prediction[0] == 1, label[0] == 1
    edge_p, edge_y = boundary(~p), boundary(~y)
    p_to_y = ndimage.distance_transform_edt(~edge_y)[edge_p]
    y_to_p = ndimage.distance_transform_edt(~edge_p)[edge_y]
    return {
        "dice": dice(p, y),
        "membrane_dice": dice(~p, ~y),
        "nsd": 100.0 * ((p_to_y <= 1).sum() + (y_to_p <= 1).sum()) / (len(p_to_y) + len(y_to_p)),
        "hd95": max(np.percentile(p_to_y, 95), np.percentile(y_to_p, 95)),
    }


@pytest.mark.parametrize("shape", [(64, 48), (16, 24, 20)], ids=["2d", "3d"])
@pytest.mark.parametrize("seed", [0, 1])
def test_score_agrees_with_numpy_and_scipy(shape: tuple[int, ...], seed: int) -> None:
    prediction, label = cells(shape, seed), cells(shape, seed + 10)
    assert score(prediction, label) == pytest.approx(reference(prediction, label), rel=1e-5)


def test_score_of_half_overlap_by_hand() -> None:
    label = vertical_membrane(4, 5)  # membrane 40 px, interior 360 px
    prediction = vertical_membrane(5, 6)  # 20 px of membrane and 340 px of interior in common
    result = score(prediction, label)
    assert tuple(result) == METRICS
    assert result["dice"] == pytest.approx(100 * 340 / 360, abs=1e-4)
    assert result["membrane_dice"] == pytest.approx(50.0, abs=1e-4)
    assert result["nsd"] == 100.0  # every boundary pixel lies 0 or 1 px from the other boundary
    assert result["hd95"] == 1.0


@pytest.mark.parametrize(("shift", "nsd"), [(1, 100.0), (2, 0.0), (5, 0.0)])
def test_surface_dice_tolerates_one_pixel(shift: int, nsd: float) -> None:
    result = score(vertical_membrane(4 + shift), vertical_membrane(4))
    assert result["nsd"] == nsd
    assert result["hd95"] == float(shift)


def test_the_image_border_of_the_interior_is_no_boundary() -> None:
    # Were the interior's outline measured, most of it would be the image border, right by construction.
    assert score(vertical_membrane(15), vertical_membrane(4))["nsd"] == 0.0


def test_hd95_ignores_a_rare_outlier_that_the_maximum_would_not() -> None:
    label = vertical_membrane(10, shape=(100, 100))
    prediction = label.copy()
    prediction[0, 50, 90] = 0  # 1 of 101 boundary pixels, 80 px off
    assert score(prediction, label)["hd95"] == 0.0


def test_perfect_prediction() -> None:
    label = cells((32, 32), 3)
    assert score(label.copy(), label) == {"dice": 100.0, "membrane_dice": 100.0, "nsd": 100.0, "hd95": 0.0}


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 3, 6, 8)], ids=["2d", "3d"])
def test_a_class_absent_in_both_counts_as_found(value: int, shape: tuple[int, ...]) -> None:
    perfect = {"dice": 100.0, "membrane_dice": 100.0, "nsd": 100.0, "hd95": 0.0}
    assert score(constant(value, shape), constant(value, shape)) == perfect


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("value", "absent"), [(1, "membrane_dice"), (0, "dice")])
def test_a_class_absent_in_one_is_the_worst_case(value: int, absent: str, swap: bool) -> None:
    mixed = constant(value)
    mixed[0, 2:4, 2:4] = 1 - value
    pair = (mixed, constant(value)) if swap else (constant(value), mixed)
    result = score(*pair)
    assert result[absent] == 0.0
    assert result["nsd"] == 0.0
    assert result["hd95"] == pytest.approx(10.0)  # the diagonal of 6 x 8
    other = "dice" if absent == "membrane_dice" else "membrane_dice"
    assert result[other] == pytest.approx(100 * 2 * 44 / (48 + 44), abs=1e-4)


def test_opposite_constants_share_nothing() -> None:
    result = score(constant(0, (1, 2, 3, 6)), constant(1, (1, 2, 3, 6)))
    assert result == {"dice": 0.0, "membrane_dice": 0.0, "nsd": 0.0, "hd95": 7.0}


def test_other_dtypes_of_the_same_values_give_the_same() -> None:
    prediction, label = cells((24, 24), 5), cells((24, 24), 6)
    assert score(prediction.astype(bool), label.astype(np.float32)) == score(prediction, label)


def test_score_leaves_its_arguments_alone() -> None:
    prediction, label = cells((24, 24), 5), cells((24, 24), 6)
    copies = prediction.copy(), label.copy()
    score(prediction, label)
    np.testing.assert_array_equal(prediction, copies[0])
    np.testing.assert_array_equal(label, copies[1])


def test_shape_mismatch_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 6, 8\).*\(1, 6, 9\)"):
        score(constant(1), constant(1, (1, 6, 9)))


@pytest.mark.parametrize("shape", [(6, 8), (2, 6, 8), (1, 1, 2, 6, 8), (1, 0, 8)])
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prediction has shape"):
        score(constant(1, shape), constant(1, shape))


@pytest.mark.parametrize("value", [255, 2])
def test_other_integers_are_refused_with_the_role_and_the_values(value: int) -> None:
    label = constant(0)
    label[0, 0, 0] = value
    with pytest.raises(ValueError, match=f"label holds the values 0, {value}, expected 0 and 1"):
        score(constant(1), label)


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_probabilities_and_nan_are_refused(value: float) -> None:
    prediction = np.zeros((1, 6, 8), dtype=np.float32)
    prediction[0, 0, 0] = value
    with pytest.raises(ValueError, match="prediction holds the values"):
        score(prediction, constant(1))


def test_a_slice_of_512_squared_takes_less_than_a_second() -> None:
    prediction, label = cells((512, 512), 0), cells((512, 512), 1)
    score(prediction, label)  # MONAI resolves optional imports in the first call
    durations = []
    for _ in range(3):  # the best of three, so that a busy machine does not fail the test
        start = time.perf_counter()
        score(prediction, label)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 1.0


def test_summarize_by_hand() -> None:
    summary = summarize({"a": 90.0, "b": 94.0, "c": 98.0})
    # t(0.975, 2) = 4.302653, s = 4, n = 3: half width 9.936550
    assert summary.mean == pytest.approx(94.0)
    assert summary.low == pytest.approx(94.0 - 9.936550, abs=1e-5)
    assert summary.high == pytest.approx(94.0 + 9.936550, abs=1e-5)
    assert (summary.worst, summary.worst_case, summary.count) == (90.0, "a", 3)
    assert summary.values == {"a": 90.0, "b": 94.0, "c": 98.0}


def test_summarize_agrees_with_scipys_t_test() -> None:
    values = np.random.default_rng(0).normal(90, 3, 12)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    summary = summarize({str(i): v for i, v in enumerate(values)}, confidence=0.9)
    assert (summary.low, summary.high) == pytest.approx((expected.low, expected.high))


def test_worst_is_the_largest_where_lower_is_better() -> None:
    summary = summarize({"a": 1.0, "b": 7.0, "c": 7.0}, higher_is_better=False)
    assert (summary.worst, summary.worst_case) == (7.0, "b")


def test_one_case_has_no_interval() -> None:
    summary = summarize({"a": 93.0})
    assert (summary.mean, summary.worst, summary.count) == (93.0, 93.0, 1)
    assert math.isnan(summary.low)
    assert math.isnan(summary.high)


def test_equal_values_have_an_interval_of_width_zero() -> None:
    summary = summarize({"a": 93.0, "b": 93.0})
    assert (summary.low, summary.high) == (93.0, 93.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_with_the_case(value: float) -> None:
    with pytest.raises(ValueError, match="case '07'"):
        summarize({"06": 93.0, "07": value})


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        summarize({})


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_confidence_outside_zero_to_one_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        summarize({"a": 1.0, "b": 2.0}, confidence=confidence)


def test_summary_holds_plain_numbers_for_json() -> None:
    values = {"a": np.float32(1.0), "b": np.float32(2.0)}
    summary = summarize(values)  # type: ignore[arg-type]
    assert isinstance(summary, Summary)
    assert {type(v) for v in summary.values.values()} == {float}
    assert {type(v) for v in (summary.mean, summary.low, summary.high, summary.worst)} == {float}
