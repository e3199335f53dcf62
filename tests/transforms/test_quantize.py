"""Images rounded to fixed point: the same numbers as fake quantization, and codes that turn back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, Invertd, Rotate90d

from monai_unetq.formats import QFormat
from monai_unetq.quantizers import fake_quantize
from monai_unetq.transforms import QuantizeIntensity, QuantizeIntensityd

formats = st.builds(
    lambda unsigned, integer, fraction: f"{'U' if unsigned else ''}Q{integer}.{fraction}",
    st.booleans(),
    st.integers(0, 10),
    st.integers(1, 14),
)


def images(dtype: Any) -> st.SearchStrategy[np.ndarray]:
    width = np.dtype(dtype).itemsize * 8
    shapes = hnp.array_shapes(min_dims=2, max_dims=4, max_side=5)
    return hnp.arrays(dtype, shapes, elements=st.floats(width=width))


def oracle(image: np.ndarray, spec: str) -> np.ndarray:
    form = QFormat(spec)
    assert form.step is not None
    return fake_quantize(torch.from_numpy(image), torch.tensor(form.step), form.qmin, form.qmax).numpy()


@given(image=st.one_of(images(np.float32), images(np.float64)), spec=formats)
@example(image=np.array([[0.5, 1.5, 2.5, -0.5, np.inf, -np.inf, np.nan, -0.0, 1e-40]]), spec="Q4.0")
def test_values_are_those_of_fake_quantization_bit_for_bit(
    as_kind: Callable[[np.ndarray], Any], image: np.ndarray, spec: str
) -> None:
    out = QuantizeIntensity(spec)(as_kind(image)).numpy()
    assert out.dtype == image.dtype
    assert out.shape == image.shape
    assert np.array_equal(out, oracle(image, spec), equal_nan=True)
    assert np.array_equal(np.signbit(out), np.signbit(oracle(image, spec)))


@pytest.mark.parametrize("number_format", ["Q2.2", QFormat("Q2.2")])
def test_by_hand(number_format: str | QFormat) -> None:
    # Steps of 1/4 from -2 to 1.75; 0.125 and 0.375 are ties and go to the even codes 0 and 2.
    image = torch.tensor([[0.125, 0.375, -0.3, 1.9, -5.0, torch.inf]])
    out = QuantizeIntensity(number_format)(image)
    assert out.tolist() == [[0.0, 0.5, -0.25, 1.75, -2.0, 1.75]]
    codes = QuantizeIntensity(number_format, codes=True)(image)
    assert codes.tolist() == [[0, 2, -1, 7, -8, 7]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint16, np.bool_, np.float16])
def test_other_types_become_float32(as_kind: Callable[[np.ndarray], Any], dtype: Any) -> None:
    image = np.array([[0, 1, 1, 0]], dtype=dtype)
    out = QuantizeIntensity("UQ1.4")(as_kind(image))
    assert out.dtype == torch.float32
    assert out.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_bfloat16_becomes_float32() -> None:
    # 12 bits of code do not fit bfloat16's 8.
    out = QuantizeIntensity("UQ0.12")(torch.tensor([[2.0]], dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert out.item() == 4095 / 4096


def test_an_8_bit_image_is_kept_as_it_is() -> None:
    image = torch.arange(256)[None] / 256
    assert np.array_equal(QuantizeIntensity("UQ0.8")(image).numpy(), image.numpy())


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("UQ0.8", torch.int16),
        ("Q8.8", torch.int16),
        ("UQ8.7", torch.int16),
        ("UQ8.8", torch.int32),
        ("Q9.8", torch.int32),
        ("UQ24.0", torch.int32),
    ],
)
def test_codes_take_the_smaller_type_that_holds_them(spec: str, dtype: torch.dtype) -> None:
    form = QFormat(spec)
    codes = QuantizeIntensity(spec, codes=True)(torch.tensor([[-torch.inf, torch.inf]]))
    assert codes.dtype == dtype
    assert codes.tolist() == [[form.qmin, form.qmax]]


@given(
    image=hnp.arrays(np.float32, (1, 3, 4), elements=st.floats(-100, 100, width=32)),
    spec=formats,
)
def test_inverse_gives_the_values_of_the_codes(
    as_kind: Callable[[np.ndarray], Any], image: np.ndarray, spec: str
) -> None:
    transform = QuantizeIntensity(spec, codes=True)
    values = transform.inverse(transform(as_kind(image)))
    assert isinstance(values, MetaTensor)
    assert values.dtype == torch.float32
    assert np.array_equal(values.numpy(), oracle(image, spec))
    assert values.applied_operations == []


def test_input_is_left_alone(as_kind: Callable[[np.ndarray], Any]) -> None:
    image = as_kind(np.full((1, 2, 2), 0.3, dtype=np.float32))
    QuantizeIntensity("UQ0.2")(image)
    QuantizeIntensity("UQ0.2", codes=True)(image)
    assert (image == np.float32(0.3)).all()
    assert getattr(image, "applied_operations", []) == []


@pytest.mark.parametrize("spec", ["int8", "uint4", "float", "ternary", "binary", "Q0.4:literal"])
def test_formats_without_a_grid_that_saturates_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=f"the format is '{spec}'; an image needs"):
        QuantizeIntensity(spec)


def test_nan_has_no_code() -> None:
    image = torch.tensor([[0.0, torch.nan, torch.nan]])
    with pytest.raises(ValueError, match=r"2 of 3 values are NaN, which has no code in UQ0\.8"):
        QuantizeIntensity("UQ0.8", codes=True)(image)


def test_a_pipeline_is_inverted() -> None:
    image = MetaTensor(torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(0)))
    pipeline = Compose(
        [Flipd("image", 1), QuantizeIntensityd("image", "UQ0.8", codes=True), Rotate90d("image")]
    )
    done = pipeline({"image": image})
    assert done["image"].dtype == torch.int16
    back = pipeline.inverse(done)["image"]
    assert torch.equal(back.as_tensor(), torch.from_numpy(oracle(image.numpy(), "UQ0.8")))
    assert back.applied_operations == []


def test_predictions_pass_the_inverse_of_rounded_values_unchanged() -> None:
    image = MetaTensor(torch.rand(1, 4, 6))
    pipeline = Compose([Flipd("image", 1), QuantizeIntensityd("image", "UQ0.8")])
    item = pipeline({"image": image})
    prediction = torch.rand(2, 4, 6)
    item["pred"] = MetaTensor(prediction)
    inverted = Invertd("pred", transform=pipeline, orig_keys="image", nearest_interp=False)(item)
    assert torch.equal(inverted["pred"].as_tensor(), prediction.flip(2))


def test_predictions_of_codes_are_inverted_with_the_spatial_transforms_alone() -> None:
    spatial = Compose([Flipd("image", 1)])
    item = Compose([spatial, QuantizeIntensityd("image", "UQ0.8", codes=True)])(
        {"image": torch.rand(1, 4, 6)}
    )
    prediction = torch.rand(2, 4, 6)
    item["pred"] = MetaTensor(prediction)
    inverted = Invertd("pred", transform=spatial, orig_keys="image", nearest_interp=False)(item)
    assert torch.equal(inverted["pred"].as_tensor(), prediction.flip(2))
