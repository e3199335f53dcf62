"""``VolumeWriter`` keeps the shape and geometry of what it writes."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage

from monai_unetq.transforms import VolumeWriter


@pytest.mark.parametrize("shape", [(5, 4, 1), (5, 4, 3), (1, 4, 3)])
def test_a_volume_keeps_its_axes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    affine = torch.diag(torch.tensor([0.5, 0.7, 3.0, 1.0], dtype=torch.float64))
    volume = MetaTensor((torch.arange(int(np.prod(shape))) % 2).reshape(1, *shape), affine=affine)
    save = SaveImage(output_dir=tmp_path, output_dtype=np.uint8, resample=False, separate_folder=False, writer=VolumeWriter)  # fmt: skip
    save(volume)
    (file,) = tmp_path.iterdir()
    found = nibabel.load(file)
    assert found.shape == shape  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(found.dataobj), volume[0].numpy())  # type: ignore[attr-defined]
    np.testing.assert_allclose(found.affine, affine)  # type: ignore[attr-defined]


def test_several_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found shape \(2, 3, 3, 1\), expected one channel"):
        VolumeWriter().set_data_array(torch.zeros(2, 3, 3, 1))
