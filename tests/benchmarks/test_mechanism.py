"""The study of the mechanism: a run of seconds on a phantom, the page from its JSON, and its numbers by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

import monai_unetq as uq
from monai_unetq.datasets import write_phantom
from monai_unetq.layers import QuantizedLayer
from monai_unetq.metrics import band_power
from tests.benchmarks.scripts import load

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """The script as a module."""
    return load("mechanism")


def test_signal_to_noise_and_alignment_by_hand(study: ModuleType) -> None:
    gradient = torch.tensor([[3.0, 1.0], [3.0, -1.0]])
    # mean (3, 0), variance 0 + 2
    assert study.signal_to_noise(gradient) == pytest.approx(4.5)
    assert study.mean_norm(gradient) == pytest.approx(math.sqrt(10))
    mean, error = study.alignment(gradient, torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
    assert (mean, error) == (pytest.approx(0.5), pytest.approx(0.5))  # 1 and 0


def test_gradients_are_of_one_step_and_leave_the_network_as_it_is(study: ModuleType) -> None:
    torch.manual_seed(0)
    network, loss = uq.networks.FixedPointUNet(1, 1, width=2), uq.training.bce_dice_loss()
    image = torch.rand(2, 1, 16, 16)
    batch = {"image": uq_meta(image), "label": uq_meta((image > 0.5).float())}
    before = {
        name: value.clone() for name, value in network.state_dict().items() if "num_batches" not in name
    }
    found = study.gradients(network, loss, [batch, batch])
    assert next(iter(found)) == "encoder.0.conv1" and list(found)[-1] == "last"
    assert torch.equal(found["last"][0], found["last"][1]), "the same batch gives the same gradient twice"
    network.zero_grad()
    loss(network(image), (image > 0.5).float()).backward()
    gradient = network.last.weight.grad
    assert gradient is not None and torch.allclose(found["last"][0], gradient.flatten())
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def uq_meta(tensor: torch.Tensor) -> torch.Tensor:
    """As a loader gives it."""
    from monai.data.meta_tensor import MetaTensor

    return MetaTensor(tensor)


def test_a_skip_is_read_before_and_behind_its_quantizer(study: ModuleType) -> None:
    torch.manual_seed(0)
    network, image = uq.networks.FixedPointUNet(1, 1, width=4).eval(), torch.rand(1, 1, 32, 32)
    skips = uq.find_skips(network, image).splittable
    with study.reading(network, skips) as floating:
        network(image)
    assert [tuple(before.shape) for before, _ in floating.values()] == [
        (1, 16, 8, 8), (1, 8, 16, 16), (1, 4, 32, 32)
    ]  # fmt: skip
    assert all(before is after or torch.equal(before, after) for before, after in floating.values())
    plan = uq.QuantPlan.uniform(network, "int8", "int2", scale="free")
    uq.calibrate(uq.quantize(network, plan, image), [image])
    with study.reading(network, skips) as found:
        network(image)
    before, after = found["decoder.2.conv1"]
    layer = network.get_submodule("decoder.2.conv1")
    assert isinstance(layer, QuantizedLayer)
    quantizer = layer.input_quantizer
    assert torch.equal(after, quantizer(before)) and len(after.unique()) <= 4 < len(before.unique())
    assert not quantizer._forward_hooks


def test_spectra_are_sums_over_channels_and_means_over_images(study: ModuleType) -> None:
    torch.manual_seed(0)
    network, images = uq.networks.FixedPointUNet(1, 1, width=2), [torch.rand(1, 1, 32, 32) for _ in range(2)]
    skips = uq.find_skips(network, images[0]).splittable
    found = study.spectra(network, skips, images)["decoder.2.conv1"]
    with torch.no_grad():
        power = [band_power(network.encoder[0](image)[0], study.EDGES).sum(0) for image in images]
    assert found["power"] == pytest.approx(((power[0] + power[1]) / 2).tolist())
    assert found["before"] == found["power"] and not any(found["change"])
    assert study.signal_to_rounding(found) is None


def test_shares_and_decibels_by_hand(study: ModuleType) -> None:
    flat = [1.0] * 17
    assert study.upper_share(flat) == pytest.approx(100 * 9 / 17)
    assert study.EDGES[study.UPPER] == 0.25
    assert study.signal_to_rounding({"before": flat, "change": [0.1] * 8 + [0.01] * 9}) == pytest.approx(
        (10, 20)
    )
    assert study.relative_to_float([2.0] * 17, flat) == pytest.approx([0.0] * 16), (
        "shares: gain does not count"
    )
    assert study.relative_to_float([4.0, *[1.0] * 16], flat)[0] == pytest.approx(10 * math.log10(4 / 20 * 17))


@pytest.mark.parametrize(("target", "kept"), [("skip", "up"), ("up", "skip")])
def test_one_part_of_the_last_concatenation_is_rounded(study: ModuleType, target: str, kept: str) -> None:
    class Study:
        scale = "free"

        def network(self) -> torch.nn.Module:
            torch.manual_seed(0)
            return uq.networks.FixedPointUNet(1, 1, width=4).eval()

    image = uq_meta(torch.rand(2, 1, 32, 32))
    network = study.one_rounded(Study(), target, 3, [{"image": image}])
    (layer,) = uq.plan_of(network)
    assert layer == "decoder.2.conv1"
    inputs = uq.plan_of(network)[layer].inputs
    assert (str(inputs[target]), str(inputs[kept])) == ("uint3", "float")
    everything = uq.plan_of(study.one_rounded(Study(), "all", 3, [{"image": image}]))
    found = {name: (str(plan.input), str(plan.weight)) for name, plan in everything.layers.items()}
    assert found.pop("encoder.0.conv1") == ("int8", "float")
    assert set(found.values()) == {("uint3", "float")} and len(found) == 14


def test_errors_are_counted_by_hand(study: ModuleType) -> None:
    true = np.zeros((2, 8, 8), dtype=bool)
    true[0, :, 4:] = True
    guess = true.copy()
    guess[0, 0, 3], guess[0, 0, 0], guess[0, 1, 5] = (
        True,
        True,
        False,
    )  # 1, 4 and 2 pixels from the other class
    guess[1, 0, 0] = True  # where there is no structure
    assert study.errors(true, guess).tolist() == [128, 3, 1, 2]


def test_the_section_holds_a_small_structure_and_stays_in_the_image(study: ModuleType) -> None:
    mask = np.zeros((200, 300), dtype=bool)
    mask[2:12, 250:298] = True
    rows, columns = study.section_of(mask)
    assert mask[rows, columns].sum() == mask.sum() and rows == slice(0, 60) and columns == slice(240, 300)
    assert study.section_of(np.ones((512, 512), dtype=bool)) == (slice(192, 320), slice(192, 320))


def test_an_error_map_is_small(study: ModuleType, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    grey = study.levels(gaussian_filter(noise.normal(size=(128, 128)), 1.5))
    wrong = noise.random((2, 128, 128)) < 0.05
    nothing = np.zeros((128, 128), dtype=bool)
    maps = {"one": (wrong[0], wrong[1]), "other": (wrong[0], nothing)}
    path = study.error_figure(grey, maps, "a case", tmp_path / "errors.svg")
    text = path.read_text()
    assert len(text) <= 60_000 and text.count("data:image/png;base64") == 2
    assert "false positive" in text and "a case" in text
    assert f"{wrong[0].sum()} invented" in text and "0 missed" in text


@given(st.integers(0, 2**12 - 1))
def test_masks_are_read_back_from_runs(study: ModuleType, bits: int) -> None:
    mask = np.array([bits >> place & 1 for place in range(12)], dtype=bool).reshape(3, 4)
    assert (study.mask_of(study.runs(mask), (3, 4)) == mask).all()


def test_runs_begin_with_what_is_not_in_the_mask(study: ModuleType) -> None:
    assert study.runs(np.array([[False, False, True], [True, False, True]])) == "2 2 1 1"
    assert study.runs(np.array([[True, False]])) == "0 1 1"


def test_a_run_of_seconds(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_phantom("em", tmp_path / "raw", dimensions=2, size=48, count=6)
    small = study.ssqat.PRESETS["quick"]["em"]
    small = study.ssqat.replace(small, width=2, steps_per_epoch=3, batch_size=2, patch_size=(32, 32))
    monkeypatch.setattr(study.ssqat, "PRESETS", {"cpu": {"em": small}})
    monkeypatch.setattr(study, "BITS", (2,))
    base = tmp_path / "study" / "em" / "cpu" / "float-relu" / "fold0-seed0"
    base.mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(uq.networks.FixedPointUNet(1, 1, width=2).state_dict(), base / "model.pt")
    out = tmp_path / "out"
    arguments = ["em", "--dataset", str(dataset), "--study", str(tmp_path / "study"), "--out", str(out)]
    arguments += ["--widths", "W3A4", "--epochs", "1"]
    assert study.main(arguments) == 0
    document = json.loads((out / "mechanism" / "em.json").read_text())
    assert document["gradients"]["batches"] == 3 and len(document["gradients"]["layers"]) == 15
    last = document["gradients"]["layers"]["last"]
    assert last["cosine"]["quantized"][0] == pytest.approx(1, abs=0.3), "nothing lies between it and the loss"
    assert set(document["spectra"]["networks"]) == {study.FLOAT, study.UNTRAINED, *study.TRAINED}
    assert set(document["skip"]["rounded"]) == {"float", "skip-2", "up-2", "all-2"}
    assert document["skip"]["rounded"]["float"]["dice"]["change"] == 0
    assert set(document["errors"]["rows"]) == set(study.TRAINED)
    assert next(out.rglob("errors.svg")).stat().st_size < 60_000
    assert set(document["errors"]["map"]["wrong"]) == {"W3A4 uniform", "W3A4 + both (SS-QAT)"}
    files = [*out.rglob("found.json"), *out.rglob("score.json"), *out.rglob("model.unetq")]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(files) == 14 and study.main(arguments) == 0
    assert before == {file: file.stat().st_mtime_ns for file in files}
    assert document == json.loads((out / "mechanism" / "em.json").read_text())
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "ssqat-mechanism.md").write_text(
        "\n".join(["before", study.MARKS[0], "old", study.MARKS[1], ""])
    )
    study.main(["page", "--out", str(out), "--page", str(pages)])
    text = (pages / "ssqat-mechanism.md").read_text()
    assert text.startswith("before\n") and "old" not in text and "| 2 | skip |" in text
    for figure in re.findall(r"\((ssqat-mechanism-em-\w+\.svg)\)", text):
        assert (pages / figure).read_text().startswith("<?xml")


def test_the_page_in_the_repository_is_what_its_json_gives(study: ModuleType, tmp_path: Path) -> None:
    out, pages = tmp_path / "out", tmp_path / "pages"
    (out / "mechanism").mkdir(parents=True)
    pages.mkdir()
    shutil.copy(RESULTS / "ssqat-mechanism.md", pages)
    found = sorted(RESULTS.glob("ssqat-mechanism-*.json"))
    assert found
    for file in found:
        shutil.copy(file, out / "mechanism" / f"{file.stem.removeprefix('ssqat-mechanism-')}.json")
    assert study.main(["page", "--out", str(out), "--page", str(pages)]) == 0
    assert (pages / "ssqat-mechanism.md").read_text() == (RESULTS / "ssqat-mechanism.md").read_text()
    for file in found:
        assert json.loads((pages / file.name).read_text()) == json.loads(file.read_text())
        for part, titles in (
            ("gradients", "norm of the gradient|signal to noise"),
            ("spectra", "→ decoder"),
            ("errors", r"uniform|\d+ invented"),
        ):
            # Drawn by another matplotlib it differs in places, not in what it shows.
            texts = [(folder / f"{file.stem}-{part}.svg").read_text() for folder in (pages, RESULTS)]
            assert len({tuple(re.findall(titles, text)) for text in texts}) == 1 and re.search(
                titles, texts[0]
            )
