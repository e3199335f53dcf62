"""Edge strength and frequency bands as transforms; the numbers themselves are tested with the measures."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from monai_unetq.metrics import band_share, edge_strength
from monai_unetq.transforms import EdgeStrength, EdgeStrengthd, FrequencyBands, FrequencyBandsd

images = hnp.arrays(
    st.sampled_from([np.uint8, np.int16, np.float32, np.float64]),
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=6),
    elements=st.integers(0, 200),
)


@given(image=images)
def test_transforms_give_the_measures(as_kind: Callable[[np.ndarray], Any], image: np.ndarray) -> None:
    edges, bands = EdgeStrength()(as_kind(image)), FrequencyBands()(as_kind(image))
    assert np.array_equal(edges.numpy(), edge_strength(torch.from_numpy(image)).numpy())
    assert edges.dtype == (torch.float64 if image.dtype == np.float64 else torch.float32)
    assert edges.shape == image.shape
    assert bands.dtype == torch.float32
    assert bands.shape == (image.shape[0], 4)
    assert np.array_equal(bands.numpy(), band_share(torch.from_numpy(image)).float().numpy())


def test_bands_are_the_users() -> None:
    image = np.random.default_rng(0).random((2, 16, 16))
    out = FrequencyBands([0, 0.1, 0.8])(image)
    assert out.shape == (2, 2)
    assert out.sum(1).tolist() == pytest.approx([1, 1])


def test_results_stand_beside_the_image() -> None:
    item: dict[Hashable, Any] = {"image": np.random.default_rng(0).random((1, 8, 8))}
    out = FrequencyBandsd("image", bands=(0, 0.5))(EdgeStrengthd("image")(item))
    assert set(out) == {"image", "image_edge", "image_bands"}
    assert out["image"] is item["image"]
    assert out["image_bands"].shape == (1, 1)
    assert torch.equal(out["image_edge"], EdgeStrength()(item["image"]))


@pytest.mark.parametrize("bands", [(), (0.1,), (0.2, 0.1), (0.1, 0.1), (-0.1, 0.2), (0.0, float("nan"))])
def test_bands_that_do_not_ascend_are_refused(bands: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="edges of the frequency bands"):
        FrequencyBands(bands)
