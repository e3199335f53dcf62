"""Why supervised skips may help at few bits: gradients, spectra of skip features, one skip rounded alone, and errors.

Everything is measured on the float network of ``unetq reproduce`` and on rows of ``benchmarks/ssqat.py``, which are
trained here where they are missing: gradients of the first step on training crops, spectra and the rounded skip on
validation cases, the trained rows' errors on test cases. Every part is kept in --out and not done twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import monai_unetq as uq
from monai_unetq.datasets import data_list
from monai_unetq.files import write_json
from monai_unetq.layers import QuantizedLayer
from monai_unetq.metrics import band_power, summarize
from monai_unetq.recipe import versions
from monai_unetq.recipe.stage import open_stage
from monai_unetq.report.figures import _COLORS, _SOFT, _figure, _picture
from monai_unetq.reproduction.pages import write_page
from monai_unetq.reproduction.run import alone, prediction_file, read_mask, read_pixels
from monai_unetq.sensitivity.metrics import network_digest
from monai_unetq.surgery import SkipConvolution
from monai_unetq.training import SkipSupervisionLoss, reestimate_norms
from monai_unetq.training.handlers.seeding import seed_everything
from monai_unetq.training.predict import predict_logits

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import ssqat

EXAMPLES = """\
examples:
  unetq reproduce em --data Dataset501_EM --out study --rows "Full precision"
  python benchmarks/mechanism.py em --dataset Dataset501_EM --study study --out ssqat --widths W3A4
  python benchmarks/mechanism.py page --out ssqat
"""

SEED = 0
UNIFORM, SUPERVISED, BOTH = "uniform", "+ supervision", "+ both (SS-QAT)"
TRAINED = (UNIFORM, SUPERVISED, BOTH)
"""Rows of ``ssqat.py``; the second differs from the first in the heads alone."""

SUPERVISION = 0.4
"""λ of the gradients that are compared; they are linear in it. Rows are trained with that of ``ssqat.py``."""

FLOAT, FLOAT_HEADS, QUANTIZED, HEADS = "float", "float, heads", "quantized", "quantized, heads"
UNTRAINED = "calibrated, untrained"

EDGES = (*(number / 32 for number in range(17)), math.inf)
"""Of the bands, in cycles per pixel of the skip; the last one holds the corners of the spectrum."""

UPPER = 8
"""First band of the upper half, from a quarter of a cycle per pixel on."""

SLICES = 12
"""At most, of the validation cases, for spectra."""

TARGETS = ("skip", "up", "all")
BITS = (8, 4, 3, 2)
MEASURES = {"dice": "Dice", "membrane_dice": "membrane Dice", "nsd": "boundary Dice", "hd95": "HD95 [px]"}
NEAR = 2.0
"""Pixels from the true boundary within which an error counts as one of the boundary."""

SIDE = 128
"""Of the section that an error map shows, in pixels, at most."""

GREYS = 16
WRONG = {"false positive": "#D62728", "false negative": "#1F5FD6"}
MARKS = "<!-- made by benchmarks/mechanism.py -->", "<!-- end -->"


# What is kept


def kept(folder: Path, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """A part's result, from its folder where it was made before with the same settings."""
    file = folder / "found.json"
    with alone(folder):
        if not (open_stage(folder, settings, [file.name]) and file.exists()):
            write_json(file, make())
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def rounded(document: Any) -> Any:
    """A JSON document with its numbers at four significant digits."""
    if isinstance(document, float):
        return float(f"{document:.4g}")
    if isinstance(document, Mapping):
        return {key: rounded(value) for key, value in document.items()}
    return [rounded(value) for value in document] if isinstance(document, (list, tuple)) else document


def crops(study: ssqat.Study, count: int | None = None) -> tuple[list[Any], Callable[[Any, Any], Tensor]]:
    """The first batches of an epoch's training crops, or all, and the loss; ``ssqat.run`` calibrates with the same."""
    loader, loss = study.crops()
    seed_everything(0, loader)
    total = len(loader) if count is None else count
    bar = tqdm(islice(loader, count), desc="crops", unit="batch", total=total, leave=False, disable=None)
    return list(bar), loss


def first_step(study: ssqat.Study, row: str, widths: str, batches: Sequence[Any], loss: Any) -> nn.Module:
    """The network of a row as its training begins: calibrated, its batch norms estimated anew."""
    calibration = batches[: ssqat.CALIBRATION_BATCHES]
    torch.manual_seed(SEED)
    network = ssqat.ours(study, row, widths, calibration, loss, study.out / study.kind / widths)
    return reestimate_norms(network, calibration)


def trained(study: ssqat.Study, row: str, widths: str) -> nn.Module:
    """The packed network of a row, which is trained where it is missing."""
    ssqat.run(study, row, widths, SEED)
    network = uq.networks.FixedPointUNet(1, 1, width=study.comparison.settings.width)
    return uq.unpack(ssqat.folder_of(study, row, widths, SEED) / "model.unetq", network)


# Gradients


def gradients(
    network: nn.Module, loss: Callable[[Any, Any], Tensor], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """∂loss/∂weight of every convolution, in the order in which they run: name → (batches, weights).

    In training mode, as a step sees it, but the network stays as it is: running statistics, which the rounding of a
    paired weight follows, do not move.
    """
    layers = uq.observe(network, batches[0]["image"][:1].as_tensor()).layers()
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    for batch in tqdm(batches, desc="gradients", unit="batch", leave=False, disable=None):
        network.zero_grad(set_to_none=True)
        loss(network(batch["image"].as_tensor()), batch["label"].as_tensor()).backward()
        for layer in layers:
            gradient = cast(Tensor, network.get_submodule(layer).weight).grad
            assert gradient is not None
            found[layer].append(gradient.flatten().clone())
    return {layer: torch.stack(each) for layer, each in found.items()}


def mean_norm(gradient: Tensor) -> float:
    """Mean over the batches of ‖g‖; of (batches, weights)."""
    return float(gradient.norm(dim=1).mean())


def signal_to_noise(gradient: Tensor) -> float:
    """‖mean g‖² over the variance Σ‖g - mean g‖²/(N - 1), of (batches, weights).

    Of gradients without a common direction it is about 1/N, not 0.
    """
    variance = float(gradient.double().var(0).sum())
    return float(gradient.double().mean(0).square().sum()) / max(variance, sys.float_info.min)


def alignment(gradient: Tensor, reference: Tensor) -> tuple[float, float]:
    """Cosine between the two gradients of a batch, both (batches, weights): its mean and standard error."""
    cosines = F.cosine_similarity(gradient.double(), reference.double(), dim=1)
    return float(cosines.mean()), float(cosines.std() / len(cosines) ** 0.5)


def gradient_part(study: ssqat.Study, widths: str) -> dict[str, Any]:
    """Norm, alignment and signal to noise of every convolution's gradient at the first step, with heads and without."""
    batches, loss = crops(study)
    supervised = SkipSupervisionLoss(loss, SUPERVISION)
    quantized = first_step(study, UNIFORM, widths, batches, loss)
    heads = first_step(study, SUPERVISED, widths, batches, loss)
    floating = uq.attach_supervision(study.network(), batches[0]["image"][:1].as_tensor())
    # The same heads, so that the two differ in the rounding alone.
    same = heads.get_submodule("skip_supervision").state_dict()
    floating.get_submodule("skip_supervision").load_state_dict(same)
    networks = {FLOAT: study.network(), FLOAT_HEADS: floating, QUANTIZED: quantized, HEADS: heads}
    found = {name: gradients(network, supervised, batches) for name, network in networks.items()}
    return {
        "batches": len(batches),
        "supervision": SUPERVISION,
        "layers": {
            layer: {
                "norm": {name: mean_norm(found[name][layer]) for name in networks},
                "snr": {name: signal_to_noise(found[name][layer]) for name in networks},
                "cosine": {
                    name: alignment(found[name][layer], found[FLOAT][layer]) for name in (QUANTIZED, HEADS)
                },
                "cosine_same_loss": alignment(found[HEADS][layer], found[FLOAT_HEADS][layer]),
            }
            for layer in found[FLOAT]
        },
    }


# Spectra


def slices_of(study: ssqat.Study) -> list[Tensor]:
    """Whole slices of the validation cases, (1, 1, H, W), as the bundle's inference sees them, spread over the cases."""
    loader, _, _ = study.inference(study.out / "mechanism", "validation")
    cases = [batch["image"].as_tensor() for batch in loader]
    share = math.ceil(SLICES / len(cases))
    found: list[Tensor] = []
    for image in cases:
        stack = image if image.dim() == 5 else image[..., None]
        places = np.linspace(0, stack.shape[-1] - 1, share + 2)[1:-1].round().astype(int)
        found += [stack[..., place] for place in sorted(set(places.tolist()))]
    return found[:SLICES]


@contextlib.contextmanager
def reading(
    network: nn.Module, skips: Sequence[SkipConvolution]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While it lasts, every pass leaves each skip's feature, by layer: before and behind the layer's input quantizer.

    The same tensor twice where the layer is float. Both (N, channels, H, W).
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for skip in skips:
        names = [part.name for part in skip.parts]
        start = sum(part.channels for part in skip.parts[: names.index("skip")])
        channels = slice(start, start + skip.parts[names.index("skip")].channels)

        def take(
            _: nn.Module, args: Any, output: Any = None, layer: str = skip.layer, at: slice = channels
        ) -> None:
            after = args[0] if output is None else output
            found[layer] = args[0][:, at], after[:, at]

        module = network.get_submodule(skip.layer)
        if isinstance(module, QuantizedLayer):
            place = module.input_parts if module.parts else module.input_quantizer
            hooks.append(place.register_forward_hook(take))
        else:
            hooks.append(module.register_forward_pre_hook(take))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def spectra(
    network: nn.Module, skips: Sequence[SkipConvolution], images: Sequence[Tensor]
) -> dict[str, dict[str, list[float]]]:
    """Of each skip's rounded feature, by layer: its power in every band, of the feature before it was rounded, and of
    what rounding changed; each the sum over channels, mean over images.
    """
    sums = {skip.layer: torch.zeros(3, len(EDGES) - 1, dtype=torch.float64) for skip in skips}
    network.eval()
    with reading(network, skips) as features:
        for image in tqdm(images, desc="spectra", unit="slice", leave=False, disable=None):
            predict_logits(network, image)
            for layer, (before, after) in features.items():
                each = [band_power(f[0], EDGES).sum(0) for f in (after, before, after - before)]
                sums[layer] += torch.stack(each) / len(images)
    names = ("power", "before", "change")
    return {layer: dict(zip(names, total.tolist(), strict=True)) for layer, total in sums.items()}


def spectrum_part(study: ssqat.Study, widths: str) -> dict[str, Any]:
    """Spectra of every skip: of the float network, quantized without training, and of the trained rows."""
    images = slices_of(study)
    batches, loss = crops(study, ssqat.CALIBRATION_BATCHES)
    networks = {FLOAT: study.network(), UNTRAINED: first_step(study, UNIFORM, widths, batches, loss)}
    networks |= {row: trained(study, row, widths) for row in TRAINED}
    skips = uq.find_skips(study.network(), images[0][..., :64, :64]).splittable
    return {
        "slices": len(images),
        "skips": {skip.layer: skip.parts[0].source for skip in skips},
        "networks": {name: spectra(network, skips, images) for name, network in networks.items()},
    }


def upper_share(power: Sequence[float]) -> float:
    """Share of the power in the upper half of the band, in percent."""
    return 100 * sum(power[UPPER:]) / sum(power)


def signal_to_rounding(found: Mapping[str, Sequence[float]]) -> tuple[float, float] | None:
    """Power of a feature over that of what rounding changed, in dB: lower and upper half; None where nothing changed."""
    halves = slice(None, UPPER), slice(UPPER, None)
    signal, noise = ([sum(found[key][half]) for half in halves] for key in ("before", "change"))
    if not all((*signal, *noise)):
        return None
    lower, upper = (10 * math.log10(s / n) for s, n in zip(signal, noise, strict=True))
    return lower, upper


def relative_to_float(power: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each band's share of the power over its share in the reference, in dB, up to half a cycle per pixel; NaN where
    both have none.
    """
    shares = [np.asarray(each[:-1]) / sum(each) for each in (power, reference)]
    with np.errstate(divide="ignore", invalid="ignore"):
        decibels: list[float] = (10 * np.log10(shares[0] / shares[1])).tolist()
    return decibels


# One skip rounded


def one_rounded(study: ssqat.Study, target: str, bits: int, batches: Sequence[Any]) -> nn.Module:
    """The float network with one part of the input of the last decoder level's first convolution rounded, or all
    activations; the image keeps its 8 bits. Calibrated, not trained.
    """
    network, image = study.network(), batches[0]["image"][:1].as_tensor()
    number_format, floating = uq.QFormat(f"int{bits}"), uq.QFormat("float")
    if target == "all":
        plan = uq.QuantPlan.uniform(
            network, floating, number_format, input=f"int{ssqat.END_BITS}", scale=study.scale
        )
    else:
        uq.split(network, image)
        last = uq.find_skips(network, image).splittable[-1]
        inputs = {part.name: number_format if part.name == target else floating for part in last.parts}
        layer = uq.LayerPlan(dict.fromkeys(inputs, floating), inputs, "float")
        plan = uq.QuantPlan({last.layer: layer}, scale=study.scale)
    uq.quantize(network, plan, image)
    return uq.calibrate(network, batches)


def skip_part(study: ssqat.Study, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures on the validation cases of the network with one tensor rounded, and their change to the float network."""
    batches, _ = crops(study, ssqat.CALIBRATION_BATCHES)

    def measured(network: Callable[[], nn.Module], name: str) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            study.predict(network(), folder / name / "predictions", "validation")
            return ssqat.tested(study, folder / name / "predictions", "validation")

        return kept(folder / name, settings, make)

    reference = measured(study.network, "float")
    found: dict[str, Any] = {"float": changed(reference, reference)}
    jobs = [(target, bits) for bits in BITS for target in TARGETS]
    for target, bits in tqdm(jobs, desc=f"{study.kind}: one tensor rounded", unit="network", disable=None):

        def network(target: str = target, bits: int = bits) -> nn.Module:
            return one_rounded(study, target, bits, batches)

        found[f"{target}-{bits}"] = changed(measured(network, f"{target}-{bits}"), reference)
    return {"units": len(reference["dice"]), "slices": len(reference["nsd"]), "rounded": found}


def changed(found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Of every measure its mean, the mean change to the reference over units, and the half width of its 95 % interval."""
    result: dict[str, dict[str, float | None]] = {}
    for measure in MEASURES:
        if measure in found:
            change = {unit: value - reference[measure][unit] for unit, value in found[measure].items()}
            summary = summarize(change)
            half = summary.high - summary.mean if summary.count > 1 else None
            mean = float(np.mean(list(found[measure].values())))
            result[measure] = {"mean": mean, "change": summary.mean, "half": half}
    return result


# Errors


def error_part(study: ssqat.Study, widths: str, figure: Path) -> dict[str, Any]:
    """How many pixels of the test cases each trained row gets wrong, and where; and the first case's error map.

    The map with the image is drawn into a file; the result has what is wrong in it, and neither image nor label.
    """
    cases = data_list(study.comparison.dataset, study.fold, "test")
    found: dict[str, Any] = {}
    for row in TRAINED:
        ssqat.run(study, row, widths, SEED)
        counts = np.zeros(4)
        for case in cases:
            true, guess = masks(study, row, widths, case)
            counts += errors(true, guess)
        found[row] = dict(
            zip(("pixels", "false_positives", "false_negatives", "near"), map(int, counts), strict=True)
        )
    case = cases[0]
    pairs = {row: masks(study, row, widths, case) for row in (UNIFORM, BOTH)}
    true = pairs[UNIFORM][0]
    place = int(true.sum((1, 2)).argmax())
    section = section_of(true[place])
    image = read_pixels(Path(case["image"]))
    grey = levels((image if image.ndim == 3 else image[None])[place].astype(float))[section]
    wrong = {}
    for row, (label, guess) in pairs.items():
        truth, guessed = label[place][section], guess[place][section]
        wrong[f"{widths} {row}"] = (guessed & ~truth, truth & ~guessed)
    title = f"{study.kind.upper()}: {case['case']}, slice {place}"
    error_figure(grey, wrong, title, figure)
    maps = {name: [runs(mask) for mask in pair] for name, pair in wrong.items()}
    return {
        "cases": len(cases), "rows": found, "map": {"title": title, "shape": list(grey.shape), "wrong": maps},
    }  # fmt: skip


def masks(
    study: ssqat.Study, row: str, widths: str, case: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Label and a trained row's prediction of a test case, bool, (slices, H, W)."""
    predictions = ssqat.folder_of(study, row, widths, SEED) / "predictions"
    true, guess = read_mask(Path(case["label"])), read_mask(prediction_file(predictions, case))
    return (true, guess) if true.ndim == 3 else (true[None], guess[None])


def errors(true: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Pixels, false positives, false negatives, and wrong pixels near the true boundary, of (slices, H, W), slice by
    slice: (4,).
    """
    near = 0
    for label, wrong in zip(true, true != guess, strict=True):
        if label.any() and not label.all():
            # Distance of a pixel to the nearest one of the other class, in pixels.
            distance = distance_transform_edt(label) + distance_transform_edt(~label)
            near += int((wrong & (distance <= NEAR)).sum())
    return np.array([true.size, (guess & ~true).sum(), (true & ~guess).sum(), near])


def section_of(mask: np.ndarray) -> tuple[slice, slice]:
    """A square section around the middle of a structure, of its extent and a quarter more, at most ``SIDE`` pixels."""
    extents = []
    for axis in (0, 1):
        places = np.flatnonzero(mask.any(1 - axis))
        extents.append((int(places[0]), int(places[-1]) + 1) if len(places) else (0, mask.shape[axis]))
    side = min(SIDE, *mask.shape, max(48, round(1.25 * max(end - start for start, end in extents))))
    starts = [
        min(max((start + end - side) // 2, 0), size - side)
        for (start, end), size in zip(extents, mask.shape, strict=True)
    ]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def levels(image: np.ndarray) -> np.ndarray:
    """Grey values in [0, 1] of an image, few of them, so that a figure of it stays small."""
    low, high = np.percentile(image, (1, 99))
    shown = np.clip((image - low) / max(high - low, 1e-9), 0, 1)
    return np.round(shown * (GREYS - 1)) / (GREYS - 1)


def runs(mask: np.ndarray) -> str:
    """A mask as lengths of runs in row-major order, the first of them of what is not in it."""
    changes = np.flatnonzero(np.diff(mask.ravel(), prepend=False))
    return " ".join(map(str, np.diff(changes, prepend=0, append=mask.size)))


def mask_of(lengths: str, shape: Sequence[int]) -> np.ndarray:
    """The mask that ``runs`` was given."""
    counts = np.array(lengths.split(), dtype=int)
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(shape)


def error_figure(
    grey: np.ndarray, wrong: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, path: Path
) -> Path:
    """A background in [0, 1], (H, W), with what each prediction invented and missed in colours, in one SVG file."""
    with _figure(path, (3.4 * len(wrong), 4.6)) as figure:
        figure.suptitle(title, fontsize=10)
        axes = figure.subplots(1, len(wrong), squeeze=False)[0]
        for axis, (name, pair) in zip(axes, wrong.items(), strict=True):
            colored = np.repeat(grey[..., None], 3, 2)
            for mask, color in zip(pair, WRONG.values(), strict=True):
                colored[mask] = to_rgb(color)
            invented, missed = (int(mask.sum()) for mask in pair)
            _picture(axis, f"{name}\n{invented} invented, {missed} missed", colored, interpolation="none")
            axis.set_xlabel(f"{grey.shape[1]} × {grey.shape[0]} pixels")
        handles = [Patch(facecolor=color, label=name) for name, color in WRONG.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return path


def error_map(document: Mapping[str, Any], path: Path) -> Path:
    """What is wrong in the section of a document's error map, on white: neither image nor label is shown."""
    found = document["errors"]["map"]
    wrong = {
        name: (mask_of(invented, found["shape"]), mask_of(missed, found["shape"]))
        for name, (invented, missed) in found["wrong"].items()
    }
    return error_figure(np.ones(found["shape"]), wrong, found["title"], path)


# The page


def markdown(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's tables, made from the JSON documents alone."""
    lines: list[str] = []
    for kind, document in documents.items():
        lines += ["", f"## {kind.upper()}, {document['widths']}", ""]
        lines += [*_gradient_table(kind, document), *_spectrum_table(kind, document)]
        lines += [*_skip_table(document), *_error_table(kind, document)]
        lines.append(
            f"Width {document['width']}, {document['float_steps']} float steps, then {document['steps']} steps for every "
            f"trained row, learning rate {document['learning_rate']:g}, λ = {document['supervision']:g}, "
            f"{document['scale']} scales, seed {SEED}."
        )
    return "\n".join([*lines, ""])


def _gradient_table(kind: str, document: Mapping[str, Any]) -> list[str]:
    found = document["gradients"]
    lines = [
        "### Gradients at the first step", "",
        f"Mean over {found['batches']} training batches; with heads at λ = {found['supervision']:g}. Cosine: to the float network's gradient on the same crops; "
        "“same loss”: of quantized with heads to float with the same heads, which begin at random. SNR: ‖mean‖² over variance, "
        f"{1 / found['batches']:.2g} or so where gradients have nothing in common.", "",
        f"![{kind.upper()}: norm, alignment and signal to noise of gradients, layer by layer]"
        f"(ssqat-mechanism-{kind}-gradients.svg)", "",
        "| layer | norm: float | quantized | + heads | cosine: quantized | + heads | same loss | SNR: float | quantized "
        "| + heads |", "|---|" + "---:|" * 9,
    ]  # fmt: skip
    for layer, row in found["layers"].items():
        cells = [f"{row['norm'][name]:.2g}" for name in (FLOAT, QUANTIZED, HEADS)]
        cosines = (*(row["cosine"][name] for name in (QUANTIZED, HEADS)), row["cosine_same_loss"])
        cells += [f"{mean:.2f}" for mean, _ in cosines]
        cells += [f"{row['snr'][name]:.2g}" for name in (FLOAT, QUANTIZED, HEADS)]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return [*lines, ""]


def _spectrum_table(kind: str, document: Mapping[str, Any]) -> list[str]:
    found = document["spectra"]
    lines = [
        "### Spectra of the skips", "",
        f"Of {found['slices']} validation slices. Upper half: share of the feature's power from a quarter of a cycle per "
        "pixel on. Signal to rounding: power of the feature over that of what its quantizer changes in it.", "",
        f"![{kind.upper()}: spectra of skip features relative to float](ssqat-mechanism-{kind}-spectra.svg)", "",
        "| skip | network | upper half [%] | power to float [dB] | signal to rounding, lower half [dB] | upper half [dB] |",
        "|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for layer, source in found["skips"].items():
        reference = sum(found["networks"][FLOAT][layer]["power"])
        for name, features in found["networks"].items():
            power, ratio = features[layer]["power"], signal_to_rounding(features[layer])
            cells = "– | –" if ratio is None else f"{ratio[0]:.1f} | {ratio[1]:.1f}"
            level = 10 * math.log10(sum(power) / reference)
            lines.append(f"| {source} | {name} | {upper_share(power):.1f} | {level:+.1f} | {cells} |")
    return [*lines, ""]


def _skip_table(document: Mapping[str, Any]) -> list[str]:
    found = document["skip"]
    measures = [measure for measure in MEASURES if measure in found["rounded"]["float"]]
    full = ", ".join(f"{MEASURES[m]} {found['rounded']['float'][m]['mean']:.2f}" for m in measures)
    lines = [
        "### One skip rounded", "",
        f"Of the float network, not trained: the full-resolution skip alone is rounded, the upsampled part beside it alone, "
        f"or all activations. Validation cases ({found['units']} units, {found['slices']} slices with the structure); "
        f"float: {full}. Change, mean and 95 % interval:", "",
        "| bits | rounded | " + " | ".join(MEASURES[m] for m in measures) + " |", "|---:|---|" + "---:|" * len(measures),
    ]  # fmt: skip
    for bits in BITS:
        for target in TARGETS:
            changes = [found["rounded"][f"{target}-{bits}"][m] for m in measures]
            cells = [
                f"{c['change']:+.2f}" + (f" ± {c['half']:.2f}" if c["half"] is not None else "")
                for c in changes
            ]
            lines.append(f"| {bits} | {target} | {' | '.join(cells)} |")
    return [*lines, ""]


def _error_table(kind: str, document: Mapping[str, Any]) -> list[str]:
    found = document["errors"]
    lines = [
        "### Errors of the trained networks", "",
        f"Pixels of the {found['cases']} test cases that are wrong, and how many of them lie within {NEAR:g} pixels of the "
        "true boundary. The map shows what is wrong in a section of the first case, without image and label.", "",
        f"![{kind.upper()}: false positives in red, false negatives in blue](ssqat-mechanism-{kind}-errors.svg)", "",
        "| row | false positives [‰] | false negatives [‰] | near the boundary [%] |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for row, counts in found["rows"].items():
        positives, negatives = counts["false_positives"], counts["false_negatives"]
        near = 100 * counts["near"] / max(positives + negatives, 1)
        cells = [f"{1000 * count / counts['pixels']:.2f}" for count in (positives, negatives)]
        lines.append(f"| {row} | {' | '.join(cells)} | {near:.1f} |")
    return [*lines, ""]


def gradient_figure(document: Mapping[str, Any], path: Path) -> Path:
    """Norm, cosine and signal to noise of a document's gradients: lines over the layers in the order in which they run."""
    layers = document["gradients"]["layers"]
    colors = dict(zip((QUANTIZED, HEADS, FLOAT_HEADS), _COLORS, strict=False)) | {FLOAT: _SOFT}
    with _figure(path, (7.5, 7.5)) as figure:
        norm, cosine, noise = figure.subplots(3, 1, sharex=True)
        for name, color in colors.items():
            style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 3.5, "label": name}
            norm.plot([row["norm"][name] for row in layers.values()], **style)
            noise.plot([row["snr"][name] for row in layers.values()], **style)
            if name in (QUANTIZED, HEADS):
                means, spread = zip(*(row["cosine"][name] for row in layers.values()), strict=True)
                cosine.errorbar(range(len(layers)), means, spread, elinewidth=1.0, **style)
        means, spread = zip(*(row["cosine_same_loss"] for row in layers.values()), strict=True)
        cosine.errorbar(
            range(len(layers)), means, spread, elinewidth=1.0, color=colors[HEADS], marker="o", markersize=3.5,
            linestyle="--", label=f"{HEADS}, to {FLOAT_HEADS}",
        )  # fmt: skip
        noise.axhline(1 / document["gradients"]["batches"], color=_SOFT, linewidth=0.8, linestyle=":")
        for axis, title in (
            (norm, "norm of the gradient of the weight"),
            (cosine, "cosine to the float network's gradient (mean and standard error over batches)"),
            (noise, "signal to noise over batches (dotted: nothing in common)"),
        ):
            axis.set_title(title, loc="left")
            axis.grid(axis="y")
        norm.set_yscale("log")
        noise.set_yscale("log")
        norm.legend(loc="best", ncols=2)
        cosine.legend(loc="best")
        noise.set_xticks(range(len(layers)), list(layers), rotation=45, ha="right", rotation_mode="anchor")
    return path


def spectrum_figure(document: Mapping[str, Any], path: Path) -> Path:
    """A panel for each skip: every band's share of the power relative to float, in dB, over frequency."""
    found = document["spectra"]
    middles = [(low + high) / 2 for low, high in pairwise(EDGES[:-1])]
    with _figure(path, (3.4 * len(found["skips"]), 3.6)) as figure:
        axes = figure.subplots(1, len(found["skips"]), squeeze=False, sharey=True)[0]
        for axis, (layer, source) in zip(axes, found["skips"].items(), strict=True):
            reference = found["networks"][FLOAT][layer]["power"]
            axis.axhline(0, color=_SOFT, linewidth=0.8)
            others = (item for item in found["networks"].items() if item[0] != FLOAT)
            for (name, features), color in zip(others, _COLORS, strict=False):
                decibels = relative_to_float(features[layer]["power"], reference)
                axis.plot(middles, decibels, color=color, label=name, linewidth=1.6)
            axis.set_title(f"{source} → {layer}", loc="left", fontsize=9)
            axis.set_xlabel("cycles per pixel of the skip")
            axis.grid(axis="y")
        axes[0].set_ylabel("share of the power, to float [dB]")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return path


def collected(study: ssqat.Study, widths: str) -> dict[str, Any]:
    """Every part of one data set, measured where it is missing, as one document."""
    folder = study.out / "mechanism" / study.kind
    settings = {
        "float": network_digest(study.network()), "scale": study.scale, "preset": study.comparison.preset,
    }  # fmt: skip
    networks = settings | {row: network_digest(trained(study, row, widths)) for row in TRAINED}
    heads, maps = settings | {"supervision": SUPERVISION}, folder / widths / "errors"
    parts: dict[str, tuple[Path, Mapping[str, Any], Callable[[], dict[str, Any]]]] = {
        "gradients": (folder / widths / "gradients", heads, lambda: gradient_part(study, widths)),
        "spectra": (folder / widths / "spectra", networks, lambda: spectrum_part(study, widths)),
        "skip": (folder / "skip", settings, lambda: skip_part(study, folder / "skip", settings)),
        "errors": (maps, networks, lambda: error_part(study, widths, maps / "errors.svg")),
    }  # fmt: skip
    found = {}
    with tqdm(parts.items(), desc=f"{study.kind}: parts", unit="part", disable=None) as bar:
        for name, (place, depends, make) in bar:
            bar.set_postfix_str(name)
            found[name] = kept(place, depends, make)
    preset = study.comparison.settings
    return {
        "kind": study.kind, "versions": versions(), "preset": study.comparison.preset, "width": preset.width,
        "widths": widths, "float_steps": preset.float_epochs * preset.steps_per_epoch,
        "steps": study.epochs * preset.steps_per_epoch, "scale": study.scale,
        "learning_rate": ssqat.learning_rate(study.kind, SUPERVISED, widths), "supervision": ssqat.SUPERVISION, **found,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one data set, or write the page; returns the exit status."""
    parser = ssqat.study_parser(__doc__, EXAMPLES, "--out of ssqat.py")
    parser.add_argument(
        "--widths", choices=ssqat.WIDTHS, default="W3A4", metavar="WnAm", help="(default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    source = options.out / "mechanism"
    if options.kind == "page":
        for kind, document in write_page("ssqat-mechanism", source, options.page, MARKS, markdown).items():
            gradient_figure(document, options.page / f"ssqat-mechanism-{kind}-gradients.svg")
            spectrum_figure(document, options.page / f"ssqat-mechanism-{kind}-spectra.svg")
            error_map(document, options.page / f"ssqat-mechanism-{kind}-errors.svg")
        return 0
    document = collected(ssqat.study_of(options), options.widths)
    write_json(source / f"{options.kind}.json", rounded(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
