"""Weight maps that let a loss count pixels near the boundary between classes more."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import Transform
from scipy import ndimage

from .beside import BesideTransform
from .tracking import BACKENDS, label_map, like

__all__ = [
    "BoundaryWeight",
    "BoundaryWeightD",
    "BoundaryWeightDict",
    "BoundaryWeightd",
    "boundary_distance",
]


class BoundaryWeight(Transform):
    r"""Weights that fall off with the distance to the nearest boundary between classes.

    .. math:: w = 1 + a \exp\left(-\frac{d^2}{2 \sigma^2}\right)

    with a = ``weight`` and d the Euclidean distance from a pixel to the nearest pixel of another class, centre
    to centre: 1 for the pixels on both sides of a boundary. It is Ronneberger et al., 2015 (arXiv
    1505.04597), section 3, equation 2, with one distance in the place of :math:`d_1 + d_2` and without the class
    weights. Distances are in pixels, whatever the spacing: resample to one spacing first where it differs.

    Ignored pixels have weight 0 and make no boundary. A label map of one class has weight 1 everywhere else.

    Args:
        sigma: standard deviation in pixels; positive. 5 in the paper ("approximately").
        weight: what is added on the boundary; not negative. 10 in the paper.
        ignore_label: the value of pixels without a label.

    Raises:
        ValueError: ``sigma`` is not positive and finite, or ``weight`` is negative or not finite.
    """

    backend = BACKENDS

    def __init__(self, sigma: float = 5.0, weight: float = 10.0, ignore_label: int | None = None) -> None:
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(
                f"BoundaryWeight: sigma is {sigma}; expected a positive number of pixels, such as 5"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"BoundaryWeight: weight is {weight}; expected a number from 0 on, such as 10")
        self.sigma = sigma
        self.weight = weight
        self.ignore_label = ignore_label

    def __call__(self, img: NdarrayOrTensor) -> torch.Tensor:
        """Weights of a label map.

        Args:
            img: a label map (1, spatial…) of whole numbers, or one-hot (classes, spatial…); one to three spatial
                axes.

        Returns:
            shape (1, spatial…), float32, in [1, 1 + weight], and 0 where ignored.

        Raises:
            TypeError: the input is not an array or tensor of real numbers.
            ValueError: it is no label map, or it is one-hot and there is an ``ignore_label``, which one-hot
                cannot hold.
        """
        tracked, labels = label_map("BoundaryWeight", img)
        if tracked.shape[0] > 1 and self.ignore_label is not None:
            raise ValueError(
                f"BoundaryWeight: a one-hot label of {tracked.shape[0]} channels and ignore_label="
                f"{self.ignore_label}; one-hot has no ignored pixels. Give the label map itself"
            )
        classes = labels.cpu().numpy()
        distance = boundary_distance(classes, self.ignore_label)
        weights = 1.0 + self.weight * np.exp(-(distance**2) / (2 * self.sigma**2))
        if self.ignore_label is not None:
            weights[classes == self.ignore_label] = 0.0
        return like(torch.from_numpy(weights[None]).to(torch.float32), tracked)


def boundary_distance(
    labels: npt.NDArray[np.int64], ignore_label: int | None = None
) -> npt.NDArray[np.float64]:
    """Distance of every pixel to the nearest pixel of another class.

    Args:
        labels: classes, any shape.
        ignore_label: the value of pixels that belong to no class.

    Returns:
        the same shape, in pixels from centre to centre; inf where there is no other class, and in ignored pixels.
    """
    distance = np.full(labels.shape, np.inf)
    ignored = np.zeros(labels.shape, dtype=bool) if ignore_label is None else labels == ignore_label
    classes = np.unique(labels[~ignored])
    if len(classes) > 1:
        for value in classes:
            own = labels == value
            distance[own] = ndimage.distance_transform_edt(own | ignored)[own]
    return distance


class BoundaryWeightd(BesideTransform):
    """Dictionary version of :class:`BoundaryWeight`: the weights of ``label`` go to ``label_weight``.

    Args:
        keys: the label maps; see :class:`monai.transforms.MapTransform`.
        sigma: see :class:`BoundaryWeight`.
        weight: see :class:`BoundaryWeight`.
        ignore_label: see :class:`BoundaryWeight`.
        output_postfix: the new key is ``{key}_{output_postfix}``.
        allow_missing_keys: pass over keys that are absent instead of raising ``KeyError``.
    """

    backend = BoundaryWeight.backend

    def __init__(
        self,
        keys: KeysCollection,
        sigma: float = 5.0,
        weight: float = 10.0,
        ignore_label: int | None = None,
        output_postfix: str = "weight",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys, BoundaryWeight(sigma, weight, ignore_label), output_postfix, allow_missing_keys
        )


BoundaryWeightD = BoundaryWeightDict = BoundaryWeightd
