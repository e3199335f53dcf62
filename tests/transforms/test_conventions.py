"""What MONAI's programs rely on, for every transform: names, keys, lazy pipelines, caches, loaders, configurations."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, MapTransform, RandAffined, Spacingd, Transform

from monai_unetq import transforms
from tests.processes import worker_processes

DICTIONARY: dict[str, Callable[..., MapTransform]] = {
    "quantize": lambda **kw: transforms.QuantizeIntensityd("image", "UQ0.4", **kw),
    "codes": lambda **kw: transforms.QuantizeIntensityd("image", "UQ0.4", codes=True, **kw),
    "targets": lambda **kw: transforms.SkipTargetsd("label", (2, 4), **kw),
    "area": lambda **kw: transforms.SkipTargetsd("label", (2, 4), "area", num_classes=3, **kw),
    "weight": lambda **kw: transforms.BoundaryWeightd("label", **kw),
    "edge": lambda **kw: transforms.EdgeStrengthd("image", **kw),
    "bands": lambda **kw: transforms.FrequencyBandsd("image", **kw),
}
NAMES = [name for name in transforms.__all__ if not name.endswith(("d", "D", "Dict", "Writer"))]
PAGE = (Path(__file__).parents[2] / "docs" / "transforms.md").read_text(encoding="utf-8")
YAML = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "_target_: monai_unetq" in text]


def case(seed: int = 0, shape: tuple[int, ...] = (9, 12, 7)) -> dict[Hashable, Any]:
    """An image and its label of three classes, with an affine."""
    rng = np.random.default_rng(seed)
    affine = torch.diag(torch.tensor([2.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    return {
        "image": MetaTensor(torch.from_numpy(rng.random((1, *shape), dtype=np.float32)), affine=affine),
        "label": MetaTensor(
            torch.from_numpy(rng.integers(0, 3, (1, *shape)).astype(np.uint8)), affine=affine
        ),
    }


def assert_same(first: dict[Hashable, Any], second: dict[Hashable, Any]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        a, b = first[key], second[key]
        assert a.dtype == b.dtype, key
        torch.testing.assert_close(a.as_tensor(), b.as_tensor(), msg=str(key))
        assert torch.allclose(a.affine, b.affine), key


@pytest.mark.parametrize("name", NAMES)
def test_every_transform_has_its_dictionary_version_and_aliases(name: str) -> None:
    array, dictionary = getattr(transforms, name), getattr(transforms, f"{name}d")
    assert issubclass(array, Transform)
    assert issubclass(dictionary, MapTransform)
    assert getattr(transforms, f"{name}D") is dictionary
    assert getattr(transforms, f"{name}Dict") is dictionary
    assert dictionary.backend == array.backend
    first, *_, last = inspect.signature(dictionary).parameters
    assert (first, last) == ("keys", "allow_missing_keys")


@pytest.mark.parametrize("make", DICTIONARY.values(), ids=DICTIONARY)
def test_missing_keys(make: Callable[..., MapTransform]) -> None:
    with pytest.raises(KeyError, match="allow_missing_keys"):
        make()({"other": 1})
    assert make(allow_missing_keys=True)({"other": 1}) == {"other": 1}


@pytest.mark.parametrize("make", DICTIONARY.values(), ids=DICTIONARY)
def test_same_in_same_out(make: Callable[..., MapTransform]) -> None:
    item = case()
    before = {key: value.clone() for key, value in item.items()}
    transform = make()
    assert_same(transform(item), transform(item))
    assert_same(item, before)
    assert_same(pickle.loads(pickle.dumps(transform))(item), transform(item))


@pytest.mark.parametrize("make", DICTIONARY.values(), ids=DICTIONARY)
def test_arrays_tensors_and_metatensors_give_the_same(make: Callable[..., MapTransform]) -> None:
    item = case()
    out = make()(item)
    for kind in (
        {key: value.numpy() for key, value in item.items()},
        {key: value.as_tensor() for key, value in item.items()},
    ):
        other = make()(kind)
        assert other.keys() == out.keys()
        for key in out:
            assert np.array_equal(np.asarray(other[key]), out[key].numpy()), key


@pytest.mark.parametrize("make", DICTIONARY.values(), ids=DICTIONARY)
def test_metadata_is_kept(make: Callable[..., MapTransform]) -> None:
    item = case()
    for value in item.values():
        value.meta["filename_or_obj"] = "07.nii.gz"
    for key, value in make()(item).items():
        assert isinstance(value, MetaTensor), key
        assert value.meta["filename_or_obj"] == "07.nii.gz", key
        if value.shape == item["image"].shape:
            assert torch.equal(value.affine, item["image"].affine), key


@pytest.mark.parametrize("make", DICTIONARY.values(), ids=DICTIONARY)
def test_a_lazy_pipeline_gives_what_the_eager_one_gives(make: Callable[..., MapTransform]) -> None:
    def pipeline(lazy: bool) -> Compose:
        both, modes = ["image", "label"], ("bilinear", "nearest")
        return Compose(
            [
                Spacingd(both, pixdim=(1.5, 1.5, 2.0), mode=modes),
                make(),
                RandAffined(both, prob=1.0, rotate_range=0.3, scale_range=0.1, mode=modes),
            ],
            lazy=lazy,
            # MONAI's lazy RandAffined loses the mode of a label, with or without another transform in the pipeline.
            overrides={key: {"mode": mode} for key, mode in zip(both, modes, strict=True)} if lazy else None,
        ).set_random_state(seed=3)

    eager, lazy = pipeline(False)(case()), pipeline(True)(case())
    assert eager["image"].shape != case()["image"].shape
    assert_same(eager, lazy)
    assert all(not value.pending_operations for value in lazy.values())


@pytest.mark.parametrize("make", DICTIONARY.values(), ids=DICTIONARY)
def test_a_cached_loader_makes_batches(make: Callable[..., MapTransform]) -> None:
    items = [case(seed, (8, 8)) for seed in range(3)]
    cached = CacheDataset(items, transform=Compose([make()]), progress=False)
    (batch,) = DataLoader(cached, batch_size=3)
    expected = [make()(item) for item in items]
    assert batch.keys() == expected[0].keys()
    for key, value in batch.items():
        assert torch.equal(value.as_tensor(), torch.stack([item[key].as_tensor() for item in expected])), key
    for one, item in zip(decollate_batch(batch), expected, strict=True):
        assert_same(one, item)


def test_worker_processes() -> None:
    transform = Compose([make() for name, make in DICTIONARY.items() if name not in ("codes", "area")])
    items = [case(seed, (8, 8)) for seed in range(2)]
    (batch,) = DataLoader(
        Dataset(items, transform), batch_size=2, num_workers=1, multiprocessing_context=worker_processes()
    )
    expected = [transform(item) for item in items]
    for key, value in batch.items():
        assert torch.equal(value.as_tensor(), torch.stack([item[key].as_tensor() for item in expected])), key


def test_codes_of_a_batch_turn_back() -> None:
    transform = Compose([DICTIONARY["codes"]()])
    items = [case(seed, (8, 8)) for seed in range(2)]
    (batch,) = DataLoader(Dataset(items, transform), batch_size=2)
    values = DICTIONARY["quantize"]()
    for one, item in zip(decollate_batch(batch), items, strict=True):
        assert torch.equal(transform.inverse(one)["image"].as_tensor(), values(item)["image"].as_tensor())


@pytest.mark.parametrize("text", YAML)
def test_documented_configurations_run(text: str, tmp_path: Path) -> None:
    file = tmp_path / "transform.yaml"
    file.write_text(text, encoding="utf-8")
    parser = ConfigParser({"transform": ConfigParser.load_config_file(file)})
    transform = parser.get_parsed_content("transform")
    assert isinstance(transform, MapTransform)
    assert transform(case()).keys() >= case().keys()


def test_every_transform_has_a_documented_configuration() -> None:
    shown = {name for text in YAML for name in re.findall(r"_target_: monai_unetq\.transforms\.(\w+)", text)}
    assert shown == {f"{name}d" for name in NAMES}
