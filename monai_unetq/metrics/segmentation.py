"""What a two-class segmentation is worth: overlap and boundary measures of one case, and their mean, interval
and worst case over many. The measures are MONAI's; what this file adds is a defined answer where a class is
absent."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.surface_dice import compute_surface_dice
from scipy import stats

__all__ = ["METRICS", "Summary", "score", "summarize"]

METRICS = ("dice", "membrane_dice", "nsd", "hd95")
"""The keys of :func:`score`, in the order in which tables show them. Higher is better, except for
``hd95``."""

NSD_TOLERANCE = 1.0  # px: how far a boundary may lie off and still count as found
HAUSDORFF_PERCENTILE = 95.0


@dataclass(frozen=True)
class Summary:
    """One measure over the cases of a test set.

    Attributes:
        mean: arithmetic mean over the cases, in the measure's own unit.
        low: lower end of the confidence interval of the mean; nan for one case.
        high: upper end of the confidence interval of the mean; nan for one case.
        worst: the worst value of all cases.
        worst_case: the name of the case with the worst value, the first one where several share it.
        count: number of cases.
        values: the value of each case, by name.
    """

    mean: float
    low: float
    high: float
    worst: float
    worst_case: str
    count: int
    values: dict[str, float]


def score(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    r"""Measure one binary segmentation against its label.

    - ``dice``: :math:`2|P \cap L| / (|P| + |L|)` of the foreground (1; in EM the cell interior), in percent.
    - ``membrane_dice``: the same of the background class (0; in EM the membrane), in percent.
    - ``nsd``: normalized surface Dice at a tolerance of 1 px, in percent: the fraction of the boundary pixels
      of prediction and label that have a boundary pixel of the other within 1 px (Nikolov et al., arXiv
      1809.04430, in the pixel-counting form of arXiv 2111.05408, as in
      :func:`monai.metrics.compute_surface_dice`).
    - ``hd95``: the larger of the two directed 95th-percentile distances between the boundaries, in px
      (:func:`monai.metrics.compute_hausdorff_distance`).

    The boundary is that of the background (membrane) class: those of its pixels that have a face neighbour in
    the foreground or outside the image. It runs along the same interface as the foreground's boundary; they
    differ at the image border, which MONAI counts as boundary of whatever touches it. The membrane touches
    the border in a few places only, whereas the cell interiors touch most of it, and hundreds of border
    pixels that are right by construction would flatter every prediction.

    Where a class is absent there is nothing to divide by, and the answer is defined as follows:

    - Dice of a class that is absent in both is 100; of a class that is absent in one of them, 0.
    - An array of one class only has no boundary between classes. If prediction and label are the same
      constant, ``nsd`` is 100 and ``hd95`` is 0; if only one of them has a boundary, or they are different
      constants, ``nsd`` is 0 and ``hd95`` is the diagonal of the image, :math:`\sqrt{H^2 + W^2}` or
      :math:`\sqrt{D^2 + H^2 + W^2}`, which no real distance reaches.

    Args:
        prediction: predicted classes, shape (1, H, W) or (1, D, H, W), values 0 and 1, normally uint8.
        label: true classes, of the same shape, values 0 and 1.

    Returns:
        One finite float for each name in :data:`METRICS`, in that order.

    Raises:
        ValueError: a shape is not (1, H, W) or (1, D, H, W), the shapes differ, an array is empty, or a value
            is neither 0 nor 1.
    """
    predicted, true = _foreground("prediction", prediction), _foreground("label", label)
    if predicted.shape != true.shape:
        raise ValueError(
            f"prediction has shape {prediction.shape} and label has shape {label.shape}; must be the same; "
            "crop or resample the prediction to the label's grid first."
        )
    y_pred, y = _one_hot(predicted), _one_hot(true)
    membrane_dice, dice = (
        100.0 * compute_dice(y_pred, y, include_background=True, ignore_empty=False)[0].double()
    ).tolist()

    if _is_constant(predicted) or _is_constant(true):
        same = bool(np.array_equal(predicted, true))
        nsd, hd95 = (100.0, 0.0) if same else (0.0, math.hypot(*true.shape))
    else:
        nsd, hd95 = _boundary_measures(y_pred[:, :1], y[:, :1])
    return dict(zip(METRICS, (dice, membrane_dice, nsd, hd95), strict=True))


def summarize(
    values: Mapping[str, float], higher_is_better: bool = True, confidence: float = 0.95
) -> Summary:
    r"""Summarize one measure over cases: mean, confidence interval of the mean, worst case.

    The interval is Student's, :math:`\bar{x} \pm t_{n-1} \, s / \sqrt{n}`. It takes cases as independent,
    which neighbouring slices of one stack are not, and it is not clipped to the measure's range: a high end
    above 100 % says that there are too few cases. One case has no spread, and its interval is nan, not a
    point.

    Args:
        values: the measure of each case, by the case's name.
        higher_is_better: whether the worst value is the smallest (Dice, surface Dice) or the largest
            (distances).
        confidence: coverage of the interval, between 0 and 1.

    Returns:
        The summary, with a copy of ``values``.

    Raises:
        ValueError: there are no values, a value is nan or infinite, or ``confidence`` is not between 0 and 1.
    """
    if not values:
        raise ValueError("there are no values to summarize; at least one case is needed")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1, such as 0.95")
    cases = {name: float(value) for name, value in values.items()}
    for name, value in cases.items():
        if not math.isfinite(value):
            raise ValueError(f"the value of case {name!r} is {value}; a mean over cases needs finite values")

    numbers = np.fromiter(cases.values(), dtype=np.float64)
    mean, count = float(numbers.mean()), len(cases)
    if count == 1:
        low = high = math.nan
    else:
        half_width = float(
            stats.t.ppf(0.5 + confidence / 2, count - 1) * numbers.std(ddof=1) / math.sqrt(count)
        )
        low, high = mean - half_width, mean + half_width
    worst_case = min(cases, key=cases.__getitem__) if higher_is_better else max(cases, key=cases.__getitem__)
    return Summary(mean, low, high, cases[worst_case], worst_case, count, cases)


def _boundary_measures(y_pred: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Surface Dice in percent and HD95 in px of two masks of shape (1, 1, …), both with a boundary."""
    with warnings.catch_warnings():  # MONAI 1.6 warns about an argument that only MONAI itself passes
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        nsd = compute_surface_dice(y_pred, y, class_thresholds=[NSD_TOLERANCE], include_background=True)
        hd95 = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=HAUSDORFF_PERCENTILE)
    return 100.0 * float(nsd), float(hd95)


def _foreground(role: str, array: np.ndarray) -> np.ndarray:
    """The array without its channel axis, as bool, after checking shape and values."""
    if array.ndim not in (3, 4) or array.shape[0] != 1:
        raise ValueError(f"{role} has shape {array.shape}, expected (1, H, W) or (1, D, H, W)")
    if array.size == 0:
        raise ValueError(f"{role} has shape {array.shape}, which holds no pixel")
    if not np.isin(array, (0, 1)).all():
        found = np.unique(array)
        some = ", ".join(str(value) for value in found[:5]) + (", …" if len(found) > 5 else "")
        raise ValueError(
            f"{role} holds the values {some}, expected 0 and 1 only; threshold probabilities, and divide "
            "a label of 0 and 255 by 255"
        )
    foreground: np.ndarray = array[0].astype(bool)
    return foreground


def _one_hot(foreground: np.ndarray) -> torch.Tensor:
    """(…) bool to (1, 2, …) float32: channel 0 is the background (membrane), channel 1 the foreground
    (interior)."""
    return torch.from_numpy(np.stack((~foreground, foreground))[None].astype(np.float32))


def _is_constant(foreground: np.ndarray) -> bool:
    return bool(foreground.all() or not foreground.any())
