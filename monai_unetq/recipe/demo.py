"""The demonstration's way: data → float network → quantized network → packed file → results and report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ..allocation import cost_of
from ..datasets import Case, Split, block_split, membrane_phantom, read_em
from ..deploy import inspect_packed, pack, unpack
from ..files import replace_file, write_json
from ..metrics import METRICS, score, summarize
from ..networks import FixedPointUNet
from ..plan import QuantPlan
from ..surgery import fold, quantize
from ..training import (
    History,
    Schedule,
    calibrate,
    predict,
    reestimate_norms,
    train,
    validation_score,
)
from .stage import check_device, open_stage, versions

__all__ = ["Data", "demo", "evaluate", "result_row", "train_float", "train_quantized"]

RESULTS = ("checkpoint.pt", "history.json", "float.safetensors", "model.unetq")
"""Files of a stage."""

CALIBRATION_CASES = 8
"""Training images that scales and batch norm statistics are found from."""

QAT_LEARNING_RATE = 1e-3
QAT_FREEZE_NORMS_AT = 0.7
"""Share of the QAT steps after which batch norm statistics stand still and the folded network is trained."""

IMAGE_FORMAT = "UQ0.8"
"""An 8-bit image in [0, 1]; its own format, since Q6.0 would make it binary."""


@dataclass(frozen=True)
class Data:
    """Cases and how they are split.

    Args:
        name: what reports call the data.
        cases: all cases, in the order that the split refers to.
        split: names for training, validation and test.
    """

    name: str
    cases: tuple[Case, ...]
    split: Split

    @classmethod
    def phantom(cls, seed: int = 0) -> Data:
        """The membrane phantom: 24 slices of 192 × 192, 16 for training, 3 for validation, 5 for the test."""
        cases = tuple(membrane_phantom(seed=seed))
        return cls(f"membrane phantom, seed {seed}", cases, block_split([case.name for case in cases]))

    @classmethod
    def em(cls, folder: Path) -> Data:
        """EM slices of a folder, split in blocks of consecutive slices; errors as ``read_em``'s."""
        cases = tuple(read_em(folder))
        return cls(folder.resolve().name, cases, block_split([case.name for case in cases]))

    def part(self, names: Sequence[str]) -> list[Case]:
        """The cases of one part of the split."""
        return [case for case in self.cases if case.name in set(names)]

    @property
    def fingerprint(self) -> str:
        """Digest of all images, labels and names: stages made from other data are made again."""
        digest = hashlib.sha256()
        for case in self.cases:
            digest.update(case.name.encode() + case.image.tobytes() + case.label.tobytes())
        return digest.hexdigest()[:16]


def train_float(
    data: Data, width: int, schedule: Schedule, folder: Path, device: str
) -> tuple[nn.Module, History]:
    """The float network, trained or read from ``folder``.

    Args:
        data: cases and split.
        width: features of the first level of ``FixedPointUNet``.
        schedule: of the training; its seed also makes the initial weights.
        folder: where the stage's files lie; an interrupted run continues from them.
        device: where to train.
    """
    network = _network(data, width, schedule.seed)
    weights = folder / "float.safetensors"
    settings = {"data": data.fingerprint, "width": width, "schedule": asdict(schedule)}
    if open_stage(folder, settings, RESULTS) and weights.exists():
        try:
            network.load_state_dict(load_file(weights))
            return network.to(device), _load_history(folder)
        except (SafetensorError, RuntimeError, OSError, ValueError) as error:
            tqdm.write(f"{weights}: cannot be read ({error}); trained again")
    history = _train(network, data, schedule, folder, "float", device)
    replace_file(weights, lambda path: save_file(_on_cpu(network), path))
    return network, history


def train_quantized(
    float_network: nn.Module,
    plan: QuantPlan,
    data: Data,
    schedule: Schedule | None,
    folder: Path,
    device: str,
) -> tuple[Path, History]:
    """Quantize, calibrate, train (QAT), fold and pack a network, or find it done in ``folder``.

    Args:
        float_network: trained; a copy of its weights is what is quantized.
        plan: formats.
        data: cases and split; calibration takes training images only.
        schedule: of the quantization-aware training; None calibrates only.
        folder: where the stage's files lie; an interrupted run continues from them.
        device: where to train.

    Returns:
        the packed file (``model.unetq``) and the history of its training.
    """
    packed = folder / "model.unetq"
    weights = hashlib.sha256(
        b"".join(t.numpy().tobytes() for t in _on_cpu(float_network).values())
    ).hexdigest()
    settings = {
        "data": data.fingerprint,
        "float": weights[:16],
        "plan": plan.to_json(),
        "schedule": None if schedule is None else asdict(schedule),
    }
    if open_stage(folder, settings, RESULTS) and packed.exists():
        try:
            inspect_packed(packed)
            return packed, _load_history(folder)
        except ValueError as error:
            tqdm.write(f"{error}; made again")
    network = _like(float_network, data)
    network.load_state_dict(_on_cpu(float_network))
    quantize(network, plan)
    network.to(device)
    images = [torch.as_tensor(c.image)[None] for c in _spread(data.part(data.split.train), CALIBRATION_CASES)]
    images = [_cropped(image) for image in images]
    calibrate(network, images)
    reestimate_norms(network, images)
    name = f"{_most_common(plan, 'input')}/{_most_common(plan, 'weight')}"
    if schedule is None:
        history = History(best=validation_score(network, data.part(data.split.validation)))
        _save_history(folder, history)
    else:
        history = _train(network, data, schedule, folder, name, device)
    fold(network)
    pack(network, packed)
    return packed, history


def evaluate(network: nn.Module, cases: Sequence[Case]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics of a network on cases, and its predictions.

    Returns:
        metric → ``metrics.Summary`` as a dictionary, and case name → prediction.
    """
    network.eval()
    predictions, scores = {}, {}
    for case in tqdm(cases, desc="evaluation", unit="image", dynamic_ncols=True, leave=False):
        predictions[case.name] = predict(network, case.image)
        scores[case.name] = score(predictions[case.name], case.label)
    summaries = {
        metric: asdict(
            summarize({n: s[metric] for n, s in scores.items()}, higher_is_better=metric != "hd95")
        )
        for metric in METRICS
    }
    for summary in summaries.values():  # a single case has no interval; JSON has no NaN
        summary.update({k: None for k in ("low", "high") if not np.isfinite(summary[k])})
    return summaries, predictions


def result_row(
    name: str,
    network: nn.Module,
    formats: tuple[str, str],
    metrics: Mapping[str, Any],
    data: Data,
    packed: Path | None,
) -> dict[str, Any]:
    """One row of ``results.json``; ratios are against the same network in float32.

    Args:
        name: of the row.
        network: as evaluated.
        formats: of weights and of activations, as the user wrote them.
        metrics: from ``evaluate``.
        data: its first case's image is what activations are counted for.
        packed: the packed file, if there is one.
    """
    example = _cropped(torch.as_tensor(data.cases[0].image)[None])
    device = next(network.parameters()).device
    cost = cost_of(network, example.to(device))
    baseline = cost_of(_like(network, data), example)
    return {
        "name": name,
        "weights": formats[0],
        "activations": formats[1],
        "metrics": dict(metrics),
        "weight_bytes": cost.weight_bytes,
        "activation_bytes": cost.activation_bytes,
        "file_bytes": None if packed is None else packed.stat().st_size,
        "weight_ratio": baseline.weight_bytes / cost.weight_bytes,
        "activation_ratio": baseline.activation_bytes / cost.activation_bytes,
    }


def demo(
    data: Path | None,
    out: Path,
    width: int | None = None,
    steps: int | None = None,
    qat_steps: int | None = None,
    weights: str = "Q0.4",
    activations: str = "Q6.0",
    seed: int = 0,
    device: str = "cpu",
    command: str = "unetq demo",
) -> dict[str, Any]:
    """Train a float U-Net, make it fixed point, measure both on held-out images, and write a report.

    Args:
        data: folder of EM slices (``image/``, ``label/``); None for the membrane phantom.
        out: folder for the results; what it holds of an earlier, interrupted run is continued.
        width: features of the first level; 16 by default.
        steps: of float training; 300 for the phantom, 1,200 for data by default.
        qat_steps: of quantization-aware training; 200 for the phantom, 600 for data by default.
        weights: format of the weights.
        activations: format of the activations.
        seed: of everything random.
        device: ``"cpu"``, ``"cuda"``, ….
        command: what the report says it was made with.

    Returns:
        what ``results.json`` holds. Also written: ``report.html``, ``figures/*.png``, ``model.unetq`` and
        ``plan.json``.

    Raises:
        FileNotFoundError: if the data folder or a part of it is missing.
        ValueError: for bad data, formats or a device that is not there; nothing is written then.
    """
    check_device(device)
    source = Data.phantom(seed) if data is None else Data.em(Path(data))
    width = 16 if width is None else width
    long = data is not None
    smallest = min(source.cases[0].image.shape[1:])
    patch = min(192 if long else 128, max(8, smallest // 8 * 8))
    schedule = _schedule(steps or (1200 if long else 300), patch, seed)
    qat = replace(
        _schedule(qat_steps or (600 if long else 200), patch, seed),
        learning_rate=QAT_LEARNING_RATE,
        freeze_norms_at=QAT_FREEZE_NORMS_AT,
    )
    probe = _network(source, width, seed)
    plan = QuantPlan.uniform(probe, weights, activations, input=IMAGE_FORMAT, first="int8", last="int8")
    out.mkdir(parents=True, exist_ok=True)
    float_network, float_history = train_float(source, width, schedule, out / "stages" / "float", device)
    stage, qat_history = train_quantized(
        float_network, plan, source, qat, out / "stages" / "quantized", device
    )
    network = unpack(stage, _like(float_network, source)).to(device)

    test = source.part(source.split.test)
    float_metrics, float_predictions = evaluate(float_network, test)
    metrics, predictions = evaluate(network, test)
    name = f"{activations}/{weights}"
    packed = out / "model.unetq"
    replace_file(packed, lambda path: shutil.copyfile(stage, path))
    held = inspect_packed(packed)
    results = {
        "title": f"Fixed-point U-Net {name} on {source.name}",
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "data": {
            "name": source.name,
            "split": {k: list(v) for k, v in asdict(source.split).items()},
            "image_shape": list(source.cases[0].image.shape),
        },
        "network": {
            "name": "FixedPointUNet",
            "width": width,
            "parameters": sum(p.numel() for p in float_network.parameters()),
        },
        "rows": [
            result_row("float", float_network, ("float", "float"), float_metrics, source, None),
            result_row(name, network, (weights, activations), metrics, source, packed),
        ],
        "training": {
            "float": {"loss": float_history.loss, "validation": float_history.validation},
            name: {"loss": qat_history.loss, "validation": qat_history.validation},
        },
        "layers": held["layers"],
    }
    QuantPlan.from_json(held["plan"]).save(out / "plan.json")
    write_json(out / "results.json", results)
    shown = test[0]
    _report(out, results, shown, {"float": float_predictions[shown.name], name: predictions[shown.name]})
    return results


def _schedule(steps: int, patch_size: int, seed: int) -> Schedule:
    return Schedule(steps, patch_size=patch_size, seed=seed, epoch_steps=min(steps, 50))


def _report(out: Path, results: dict[str, Any], case: Case, predictions: dict[str, np.ndarray]) -> None:
    from ..report import segmentation_figure, size_figure, training_figure, weight_figure, write_report

    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    colours = "Membrane pixels found, missed and invented"
    figures = [
        (f"{colours}, test slice {case.name}.", folder / "segmentation.png"),
        (
            "Loss, and validation Dice (mean of interior and membrane), over the steps of both trainings.",
            folder / "training.png",
        ),
        ("How often each layer's weights take each code.", folder / "weights.png"),
        ("Dice on the test slices against the size of the weights.", folder / "size.png"),
    ]
    segmentation_figure(case.image, case.label, predictions, figures[0][1])
    training_figure(results["training"], figures[1][1])
    weight_figure(results["layers"], figures[2][1])
    size_figure(results["rows"], figures[3][1])
    write_report(out, results, figures)


def _network(data: Data, width: int, seed: int) -> FixedPointUNet:
    torch.manual_seed(seed)
    image = data.cases[0].image
    return FixedPointUNet(
        in_channels=image.shape[0], out_channels=1, width=width, spatial_dims=image.ndim - 1
    )


def _like(network: nn.Module, data: Data) -> FixedPointUNet:
    """A float network of the same width, with fresh weights."""
    last = network.get_submodule("last")
    return _network(data, int(last.in_channels), seed=0)  # type: ignore[arg-type]


def _train(
    network: nn.Module, data: Data, schedule: Schedule, folder: Path, label: str, device: str
) -> History:
    checkpoint = folder / "checkpoint.pt"
    cases = data.part(data.split.train), data.part(data.split.validation)
    history = train(network, *cases, schedule, checkpoint, label, device)
    _save_history(folder, history)
    return history


def _save_history(folder: Path, history: History) -> None:
    found = {"loss": history.loss, "validation": history.validation, "best": history.best}
    write_json(folder / "history.json", found)


def _load_history(folder: Path) -> History:
    document = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return History(
        [tuple(p) for p in document["loss"]], [tuple(p) for p in document["validation"]], document["best"]
    )


def _on_cpu(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}


def _spread(cases: Sequence[Case], count: int) -> list[Case]:
    chosen = np.unique(np.linspace(0, len(cases) - 1, min(count, len(cases))).round().astype(int))
    return [cases[i] for i in chosen]


def _cropped(image: torch.Tensor) -> torch.Tensor:
    """The image cut at its far ends to sizes divisible by 8."""
    for axis in range(2, image.dim()):
        image = image.narrow(axis, 0, image.shape[axis] // 8 * 8)
    return image


def _most_common(plan: QuantPlan, part: str) -> str:
    names = [str(getattr(layer, part)) for layer in plan.layers.values()]
    return max(set(names), key=names.count)
