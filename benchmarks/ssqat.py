"""SS-QAT on real data: what splitting with mixed precision and supervised skips are worth at few bits, beside the peers.

Every row begins with the same float network, that of ``unetq reproduce``, and is trained for the same steps on the same
crops: float on (the control), uniform widths, split with mixed widths, each with and without supervised skips, each with
the float network as a teacher, Brevitas and NVIDIA modelopt. The last step's network is what is tested, so nothing is
chosen on the test cases; what is to be chosen is compared with --candidates. Three rows are ``recipe.ssqat`` as it is shipped,
packed: with power-of-two scales and the last epoch (the default), with the epoch that is best on the validation cases, and
with free scales.
Everything is kept in --out and not done twice.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import monai_unetq as uq
from monai_unetq.allocation.cost import layer_costs
from monai_unetq.datasets import data_list
from monai_unetq.datasets.layout import Part
from monai_unetq.files import write_json
from monai_unetq.metrics import score as measures_of
from monai_unetq.metrics import summarize
from monai_unetq.recipe import check_device, ssqat, ssqat_plan, versions
from monai_unetq.reproduction.pages import interval, write_page
from monai_unetq.reproduction.run import PRESETS, Comparison, alone, prediction_file, read_mask, score
from monai_unetq.surgery import reestimate_norms, settle_norms
from monai_unetq.surgery.workload import workload
from monai_unetq.training import SkipSupervisionLoss, freeze_norms, parameter_groups
from monai_unetq.training.handlers.seeding import epoch_seed, seed_everything
from monai_unetq.training.supervision import supervision_weight

EXAMPLES = """\
examples:
  unetq reproduce em --data Dataset501_EM --out study --rows "Full precision"
  python benchmarks/ssqat.py em --dataset Dataset501_EM --study study --out ssqat --widths W3A3 W2A2 --seeds 0 1 2
  python benchmarks/ssqat.py gm --dataset Dataset502_GM --study study --out ssqat --widths W2A4 --rows uniform Brevitas \\
      --candidates 3e-4 1e-3
  unetq reproduce gm --data Dataset502_GM --out study --rows "Full precision" --folds 0 1 2 3 4
  python benchmarks/ssqat.py gm --dataset Dataset502_GM --study study --out ssqat --rows "+ equalization" --folds 0 1 2 3 4
  python benchmarks/ssqat.py page --out ssqat
"""

WIDTHS = ("W4A4", "W3A4", "W2A4", "W3A3", "W2A2")
FLOAT, CONTROL = "float", "float, trained on"
PEERS = {"Brevitas": 3e-4, "modelopt": 3e-4, "Brevitas, 1e-3": 1e-3, "modelopt, 1e-3": 1e-3}
"""With their learning rate: of the two, neither is better for them everywhere."""
EQUALIZED_PEER = "Brevitas, equalized"
"""A peer's quantizers on our equalized float network, to tell what is whose."""


class Parts(NamedTuple):
    """What a row of ours has beside quantization-aware training: split convolutions with allocated bits, supervised
    skips, the float network as a teacher, channels of equal range.
    """

    mixed: bool = False
    supervised: bool = False
    distilled: bool = False
    equalized: bool = False


PARTS = {
    "uniform": Parts(),
    "+ split, mixed": Parts(mixed=True),
    "+ supervision": Parts(supervised=True),
    "+ both (SS-QAT)": Parts(mixed=True, supervised=True),
    "+ teacher": Parts(distilled=True),
    "+ both + teacher": Parts(mixed=True, supervised=True, distilled=True),
    "+ equalization": Parts(equalized=True),
    "+ equalization, mixed": Parts(mixed=True, equalized=True),
    "+ equalization, supervision": Parts(supervised=True, equalized=True),
    "+ equalization, teacher": Parts(distilled=True, equalized=True),
    "+ all but supervision": Parts(mixed=True, distilled=True, equalized=True),
    "+ all": Parts(mixed=True, supervised=True, distilled=True, equalized=True),
}

SHIPPED, BEST_EPOCH, FREE_SCALES = "as shipped", "as shipped, best epoch", "as shipped, free scales"
"""``recipe.ssqat``, packed and read again; the second with ``validate``, the third with ``scale="free"``."""
RECIPE = (SHIPPED, BEST_EPOCH, FREE_SCALES)

ROWS = (*PARTS, *RECIPE, *PEERS, EQUALIZED_PEER)
LEARNING_RATE = 3e-4
COARSE_LEARNING_RATE = 1e-3
"""Ours, the latter with 2-bit activations: each the better of the two in the pilot on validation cases. Where batch norms
stand still from the first step on, the former is the better one with 2-bit activations, too."""

EQUALIZED_LEARNING_RATES = {"em": 1e-3, "gm": 1e-3, "nih": 3e-4}
"""Of the rows with equalization: the better of the two on the validation cases of the data set (the tables show them)."""

CONTROL_LEARNING_RATE = 3e-4

SUPERVISION = 0.1
DISTILLATION = 1.0
FREEZE_NORMS_AT = 0.7
CALIBRATION_BATCHES = 8
END_BITS = 8
"""Of the image, and of the first and last layer's weights, in every row."""

NAMES = {"dice": "Dice", "membrane_dice": "membrane Dice", "nsd": "boundary Dice", "hd95": "HD95 [px]"}
MEASURES = tuple(NAMES)
UNIFORM, EQUALIZED, EVERYTHING = "uniform", "+ equalization", "+ all"
ABLATION = (UNIFORM, "+ split, mixed", "+ supervision", "+ both (SS-QAT)")
"""Guo et al.'s."""
LIMITS = {"W4A4": 0.5, "W3A4": 0.5, "W2A4": 1.0}
"""Of the drop of Dice, in points, at the widths that are asked to be as good as float."""

MARKS = "<!-- made by benchmarks/ssqat.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Study:
    """The float network, crops and test cases of one fold of a data set."""

    comparison: Comparison
    out: Path
    epochs: int
    fold: int = 0
    scale: Any = "free"
    metric: Any = "sqnr"

    @property
    def kind(self) -> str:
        return self.comparison.kind

    @property
    def device(self) -> str:
        return self.comparison.device

    def network(self) -> nn.Module:
        """The trained float network."""
        file = (
            self.comparison.folder / "float-relu" / f"fold{self.fold}-seed{self.comparison.seed}" / "model.pt"
        )
        network = uq.networks.FixedPointUNet(1, 1, width=self.comparison.settings.width)
        network.load_state_dict(torch.load(file, weights_only=True))
        return network.eval().to(self.device)

    def crops(self) -> tuple[Any, Callable[[Any, Any], Tensor]]:
        """The bundle's training loader and loss."""
        settings = self.comparison.settings
        parser = self._parser(
            "train", steps_per_epoch=settings.steps_per_epoch, batch_size=settings.batch_size,
            patch_size=list(settings.patch_size), num_workers=0,
        )  # fmt: skip
        return parser.get_parsed_content("train#dataloader"), parser.get_parsed_content("loss")

    def inference(self, folder: Path, part: Part = "test") -> tuple[Any, Any, Any]:
        """The bundle's loader of the images of a part, its inferer, and what writes segmentations into a folder."""
        images = [case["image"] for case in data_list(self.comparison.dataset, self.fold, part)]
        parser = self._parser("inference", output_dir=str(folder), model="", images=images)
        loader, inferer, postprocessing = (
            parser.get_parsed_content(name) for name in ("dataloader", "inferer", "postprocessing")
        )
        return loader, inferer, postprocessing

    def predict(self, network: nn.Module, folder: Path, part: Part = "test") -> None:
        """Write the network's segmentations of the cases of a part, as the bundle's inference does."""
        from monai.engines import SupervisedEvaluator

        loader, inferer, postprocessing = self.inference(folder, part)
        SupervisedEvaluator(
            device=torch.device(self.device),
            val_data_loader=loader,
            network=network,
            inferer=inferer,
            postprocessing=postprocessing,
        ).run()

    def _parser(self, config: str, **more: Any) -> Any:
        from monai.bundle import ConfigParser

        parser = ConfigParser()
        parser.read_config(str(self.comparison.bundle / "configs" / f"{config}.yaml"))
        parser.update(
            {"bundle_root": str(self.comparison.bundle), "dataset_dir": str(self.comparison.dataset), "fold": self.fold,
             "device": self.device, "width": self.comparison.settings.width, **more}
        )  # fmt: skip
        parser.parse()
        return parser


def bits_of(widths: str) -> tuple[int, int]:
    """Weight and activation bits of ``W3A4``."""
    weights, activations = widths[1:].split("A")
    return int(weights), int(activations)


def learning_rate(kind: str, row: str, widths: str) -> float:
    """Of a row on the test cases."""
    if row in RECIPE:
        return LEARNING_RATE
    if row == EQUALIZED_PEER or (row in PARTS and PARTS[row].equalized):
        return EQUALIZED_LEARNING_RATES[kind]
    if row not in PARTS:
        return PEERS.get(row, CONTROL_LEARNING_RATE)
    return LEARNING_RATE if bits_of(widths)[1] > 2 else COARSE_LEARNING_RATE


def uniform_plan(network: nn.Module, widths: str, scale: Any) -> uq.QuantPlan:
    """The same widths everywhere but at the ends."""
    weights, activations = bits_of(widths)
    return uq.QuantPlan.uniform(
        network, f"int{weights}", f"int{activations}", input=f"int{END_BITS}", first=f"int{END_BITS}",
        last=f"int{END_BITS}", scale=scale, learned=True,
    )  # fmt: skip


def budget_of(network: nn.Module, plan: uq.QuantPlan, image: Tensor) -> list[str]:
    """The mean widths of a plan, as budgets for another one."""
    units = workload(network, image).units
    weights, inputs = (
        sum(formats.bits * count for formats, count in found) / sum(count for _, count in found)
        for found in (
            [(plan[unit.layer].weight, unit.weights) for unit in units],
            [(plan[unit.layer].input, unit.inputs) for unit in units],
        )
    )
    return [f"weights={weights + 1e-6:.6f}bits", f"activations={inputs + 1e-6:.6f}bits"]


def ours(study: Study, row: str, widths: str, batches: Sequence[Any], loss: Any, folder: Path) -> nn.Module:
    """A network of ours, calibrated, with what the row has of heads and teacher."""
    network = study.network()
    mixed, supervised, distilled, equalized = PARTS[row]
    image = batches[0]["image"][:1]
    if equalized:
        uq.equalize(network, batches)
    plan = uniform_plan(network, widths, study.scale)
    if mixed:
        budget = budget_of(network, plan, image)
        uq.split(network, image)
        plan = ssqat_plan(
            network, loss, batches, folder, budget=budget, metric=study.metric, scale=study.scale, probes=200
        )
    uq.quantize(network, plan, image)
    uq.calibrate(network, batches)
    teacher = study.network() if distilled else None
    if supervised:
        return uq.attach_supervision(network, image, teacher=teacher)
    return network if teacher is None else uq.attach_teacher(network, teacher)


def shipped(
    study: Study, row: str, widths: str, seed: int, rate: float, loader: Any, loss: Any, batches: Sequence[Any],
    folder: Path,
) -> nn.Module:  # fmt: skip
    """The packed network of ``recipe.ssqat`` with its own defaults, under the mean widths of the uniform plan."""
    network = study.network().cpu()
    image = batches[0]["image"][:1]
    cases = data_list(study.comparison.dataset, study.fold, "validation")

    def validate(trained: nn.Module) -> float:
        study.predict(trained, folder / "validation", "validation")
        return float(
            np.mean(list(score(study.comparison.kind, cases, folder / "validation")["dice"].values()))
        )

    packed = ssqat(
        network, loss, loader, folder / "recipe", epochs=study.epochs, learning_rate=rate, calibration=batches, seed=seed,
        device=study.device, validate=validate if row == BEST_EPOCH else None, scale="free" if row == FREE_SCALES else "power-of-two",
        budget=budget_of(network, uniform_plan(network, widths, "power-of-two"), image),
    )  # fmt: skip
    return uq.unpack(packed, network).to(study.device)


def brevitas(network: nn.Module, widths: str, batches: Sequence[Any]) -> nn.Module:
    """Weight scales per channel from the weights, learned activation scales, unsigned behind ReLU, calibrated."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    weights, activations = bits_of(widths)
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        first = name == names[0]
        rounded = qnn.QuantConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding, bias=True,
            weight_quant=Int8WeightPerChannelFloat,
            weight_bit_width=END_BITS if name in (names[0], names[-1]) else weights,
            input_quant=Int8ActPerTensorFloat if first else Uint8ActPerTensorFloat,
            input_bit_width=END_BITS if first else activations, return_quant_tensor=False,
        )  # fmt: skip
        rounded.weight.data.copy_(layer.weight.data)
        assert layer.bias is not None and rounded.bias is not None
        rounded.bias.data.copy_(layer.bias.data)
        rounded.to(layer.weight.device)
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, rounded)
    with torch.no_grad(), calibration_mode(network):
        for batch in batches:
            network(batch["image"].as_tensor())
    return network


def modelopt(network: nn.Module, widths: str, batches: Sequence[Any]) -> nn.Module:
    """modelopt's integer configuration (weights per channel, largest magnitudes), unsigned behind ReLU."""
    import modelopt.torch.quantization as mtq

    weights, activations = bits_of(widths)
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    config["quant_cfg"].append({"parent_class": "nn.MaxPool2d", "quantizer_name": "*", "enable": False})
    for name in names:
        ends = name in (names[0], names[-1])
        image = name == names[0]
        config["quant_cfg"] += [
            {
                "quantizer_name": f"{name}.weight_quantizer",
                "cfg": {"num_bits": END_BITS if ends else weights, "axis": 0},
            },
            {
                "quantizer_name": f"{name}.input_quantizer",
                "cfg": {"num_bits": END_BITS if image else activations, "axis": None, "unsigned": not image},
            },
        ]

    def forward_loop(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch["image"].as_tensor())

    quantized: nn.Module = mtq.quantize(network, config, forward_loop)
    return quantized


def moved(batch: Mapping[str, Any], device: str | torch.device) -> dict[str, Any]:
    """A batch with its image and label on a device."""
    return {**batch, **{key: batch[key].to(device) for key in ("image", "label")}}


def train(
    network: nn.Module, loader: Any, loss: Callable[[Any, Any], Tensor], batches: Sequence[Any], epochs: int, seed: int,
    groups: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Train a network in place, the same crops for the same seed; batch norms stand still in the last part where ours."""
    optimizer = torch.optim.Adam([dict(group) for group in groups])
    supervised = SkipSupervisionLoss(loss, SUPERVISION, distillation=DISTILLATION)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, uq.training.cosine(epochs))
    steps, total, losses = 0, epochs * len(loader), []
    device = next(network.parameters()).device
    begin = time.monotonic()
    network.train()
    for epoch in tqdm(range(1, epochs + 1), desc="training", unit="epoch", leave=False, disable=None):
        seed_everything(epoch_seed(seed, epoch), loader)
        if epoch - 1 <= FREEZE_NORMS_AT * epochs < epoch:
            reestimate_norms(network, batches)
        freeze_norms(network, epoch, epochs, FREEZE_NORMS_AT)
        network.train()
        for batch in loader:
            supervised.weight = SUPERVISION * supervision_weight(steps / total)
            optimizer.zero_grad(set_to_none=True)
            batch = moved(batch, device)
            found = supervised(network(batch["image"].as_tensor()), batch["label"].as_tensor())
            found.backward()
            optimizer.step()
            losses.append(float(found.detach()))
            steps += 1
        scheduler.step()
    seconds = time.monotonic() - begin
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "loss": float(np.mean(losses[-len(losses) // epochs :])),
    }


def folder_of(study: Study, row: str, widths: str, seed: int, candidate: float | None = None) -> Path:
    """Where a row is kept: ``score.json``, predictions of both parts, and of ours the packed network; see ``run``."""
    bits = widths if row not in (FLOAT, CONTROL) else "float"
    training = f"fold{study.fold}-seed{seed}"
    if candidate is not None:
        name = _slug(row) if row == FLOAT else f"{_slug(row)}-{candidate:g}"
        return study.out / study.kind / "validation" / bits / name / training
    return study.out / study.kind / bits / _slug(row) / training


def run(study: Study, row: str, widths: str, seed: int, candidate: float | None = None) -> dict[str, Any]:
    """Train and test one row, or find it done; with a candidate for the learning rate, on the validation cases alone."""
    folder = folder_of(study, row, widths, seed, candidate)
    part: Part = "test" if candidate is None else "validation"
    file = folder / "score.json"
    with alone(folder):
        if file.exists():
            return dict(json.loads(file.read_text(encoding="utf-8")))
        loader, loss = study.crops()
        seed_everything(0, loader)
        first = [batch for batch, _ in zip(loader, range(CALIBRATION_BATCHES), strict=False)]
        batches = [moved(batch, study.device) for batch in first]
        torch.manual_seed(seed)
        result: dict[str, Any] = {"row": row, "widths": widths, "fold": study.fold, "seed": seed}
        if study.device != "cpu":
            result["device"] = study.device
        network = study.network()
        with contextlib.redirect_stdout(sys.stderr):  # peers print what they do
            if row in PEERS or row == EQUALIZED_PEER:
                network = uq.equalize(network, batches) if row == EQUALIZED_PEER else network
                network = (brevitas if row.startswith("Brevitas") else modelopt)(network, widths, batches)
            elif row in PARTS:
                network = ours(study, row, widths, batches, loss, study.out / study.kind / widths)
        rate = learning_rate(study.kind, row, widths) if candidate is None else candidate
        if row in RECIPE:
            network = shipped(study, row, widths, seed, rate, loader, loss, first, folder)
            result |= {"learning_rate": rate, "steps": study.epochs * len(loader)}
        elif row != FLOAT:
            mine = row in PARTS
            groups: Sequence[Mapping[str, Any]] = (
                parameter_groups(network, rate)
                if mine
                else [{"params": list(network.parameters()), "lr": rate}]
            )
            result["learning_rate"] = rate
            if mine:
                settle_norms(network, batches)
            result |= train(network, loader, loss, batches, study.epochs, seed, groups)
            if not mine:
                reestimate_norms(network, batches)
        uq.strip(network.eval())
        if row in (*PARTS, *RECIPE):
            work = workload(network, torch.zeros(1, 1, 200, 200, device=study.device))
            cost = layer_costs(work.units, uq.plan_of(network), work.other_parameters)
            result |= {"weight_bytes": cost.weight_bytes, "bops": cost.bops}
        if row in PARTS:
            uq.plan_of(network).save(folder / "plan.json")
            uq.pack(network, folder / "model.unetq")
        study.predict(network, folder / "predictions", part)
        result |= tested(study, folder / "predictions", part)
        if candidate is None:
            study.predict(network, folder / "validation", "validation")
            validated = tested(study, folder / "validation", "validation")
            result["validation"] = {m: float(np.mean(list(validated[m].values()))) for m in ("dice", "nsd")}
        write_json(file, result)
    return result


def tested(study: Study, predictions: Path, part: Part = "test") -> dict[str, Any]:
    """Dice of each unit (EM: slice; GM: person; NIH: patient); boundary Dice and HD95 of each slice with the structure."""
    cases = data_list(study.comparison.dataset, study.fold, part)
    found: dict[str, Any] = score(study.comparison.kind, cases, predictions)
    found |= {"nsd": {}, "hd95": {}}
    for case in cases:
        label, predicted = read_mask(Path(case["label"])), read_mask(prediction_file(predictions, case))
        if label.ndim == 2:
            label, predicted = label[None], predicted[None]
        for number, (true, guess) in enumerate(zip(label, predicted, strict=True)):
            if true.any():
                measured = measures_of(guess[None].astype(np.uint8), true[None].astype(np.uint8))
                for name in ("nsd", "hd95"):
                    found[name][f"{case['case']}/{number}"] = measured[name]
    return found


def _slug(row: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in row).strip("-").lower()


def collected(study: Study) -> dict[str, Any]:
    """Everything that is there, as one document, to three decimals, or digits of what is below 1."""

    def shortened(number: str) -> float:
        value = float(number)
        return round(value, 3) if abs(value) >= 1 else float(f"{value:.3g}")

    def read(file: Path) -> Any:
        text = file.read_text(encoding="utf-8")
        return json.loads(text, parse_float=shortened)

    folder = study.out / study.kind
    files = sorted(folder.glob("W*/*/fold*/score.json")) + sorted(folder.glob("float/*/fold*/score.json"))
    candidates = sorted((folder / "validation").glob("*/*/fold*/score.json"))
    settings = study.comparison.settings
    return {
        "kind": study.kind, "versions": versions(), "preset": study.comparison.preset, "width": settings.width,
        "float_steps": settings.float_epochs * settings.steps_per_epoch, "steps": study.epochs * settings.steps_per_epoch,
        "batch_size": settings.batch_size, "patch_size": list(settings.patch_size), "scale": study.scale,
        "metric": study.metric, "rows": [read(file) for file in files], "validation": [read(file) for file in candidates],
    }  # fmt: skip


def trainings(
    document: Mapping[str, Any], row: str, widths: str, folds: Sequence[int] | None = None
) -> list[Mapping[str, Any]]:
    """The trainings of a row, in some folds or in all."""
    return [
        found
        for found in document["rows"]
        if (found["row"], found["widths"]) == (row, widths) and (folds is None or found["fold"] in folds)
    ]


def folds_of(found: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({training["fold"] for training in found})


def counted(found: Sequence[Mapping[str, Any]]) -> str:
    """How many trainings, and in how many folds where there are several."""
    folds = len(folds_of(found))
    return f"{len(found)} in {folds} folds" if folds > 1 else f"{len(found)}"


def changes(
    document: Mapping[str, Any], row: str, widths: str, measure: str, folds: Sequence[int] | None = None
) -> list[float]:
    """Change to the fold's float network, one number for each unit and training, in some folds or in all."""
    references = {found["fold"]: found for found in document["rows"] if found["row"] == FLOAT}
    return [
        value - references[found["fold"]][measure][unit]
        for found in trainings(document, row, widths, folds)
        if measure in found
        for unit, value in found[measure].items()
    ]


def mean_change(
    document: Mapping[str, Any], row: str, widths: str, measure: str, folds: Sequence[int]
) -> float:
    """Mean over folds, each of which counts the same however many trainings and units it has."""
    return float(np.mean([np.mean(changes(document, row, widths, measure, [fold])) for fold in folds]))


def markdown(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's tables, made from the JSON documents alone."""
    lines = beside_the_peers(documents) + ablation_table(documents) + bounds_table(documents)
    for kind, document in documents.items():
        references = trainings(document, FLOAT, FLOAT)
        measures = [m for m in MEASURES if m in references[0]]
        lines += ["", f"## {kind.upper()}", ""]
        for reference in references:
            means = ", ".join(f"{NAMES[m]} {np.mean(list(reference[m].values())):.2f}" for m in measures)
            fold = f" of fold {reference['fold']}" if len(references) > 1 else ""
            lines.append(f"Float network{fold}: {means}.")
        lines += [
            "", "Change to the fold's float network, mean and 95 % interval over test units and trainings:", "",
            "| widths | row | trainings | weights [KiB] | GBOPs | " + " | ".join(NAMES[m] for m in measures) + " |",
        ]  # fmt: skip
        lines += ["|---|---|---:|---:|---:|" + "---:|" * len(measures)]
        for widths in (FLOAT, *WIDTHS):
            for row in (CONTROL,) if widths == FLOAT else ROWS:
                found = trainings(document, row, widths)
                if not found:
                    continue
                size = f"{found[0]['weight_bytes'] / 1024:.1f}" if "weight_bytes" in found[0] else ""
                bops = f"{found[0]['bops'] / 1e9:.1f}" if "bops" in found[0] else ""
                cells = [interval(changes(document, row, widths, m), "+") for m in measures]
                lines.append(
                    f"| {widths} | {row} | {counted(found)} | {size} | {bops} | {' | '.join(cells)} |"
                )
        lines += [
            "", f"Width {document['width']}, {document['float_steps']} float steps, then {document['steps']} steps for every "
            f"row, batch {document['batch_size']}, crops {'×'.join(map(str, document['patch_size']))}, {document['scale']} "
            f"scales, bits allocated by {document['metric']}; the last step's network is tested. `{SHIPPED}`: power-of-two scales, "
            f"from the packed file; `{BEST_EPOCH}`: of the epoch that is best on the validation cases; `{FREE_SCALES}`: scales as they are.",
        ]  # fmt: skip
        lines += candidates_table(document) + parts_table(document)
    return "\n".join([*lines, ""])


def compared(document: Mapping[str, Any], widths: str) -> tuple[list[str], list[int]]:
    """The peers, each at its learning rates, that were trained in all folds that they share with ours; and these folds."""
    folds = folds_of(trainings(document, EQUALIZED, widths))
    peers = {row: set(folds) & set(folds_of(trainings(document, row, widths))) for row in PEERS}
    shared = sorted(set[int]().union(*peers.values()))
    tried = [row for row in PEERS if shared and peers[row] == set(shared)]
    return tried, shared if tried else folds


def beside_the_peers(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Ours beside the better peer, in the same folds."""
    lines = [
        "", "Change of Dice / boundary Dice to float, mean over the folds in which all cells of a line were trained, with the "
        "number of trainings where there are several; the better peer at the better of its learning rates, read off "
        "the test cases:", "",
        "| | as shipped | everything | + equalization | uniform | better peer | of the peer's loss |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    ahead: dict[str, list[float]] = {SHIPPED: [], EVERYTHING: [], EQUALIZED: []}
    for (kind, document), widths in itertools.product(documents.items(), WIDTHS):
        tried, folds = compared(document, widths)
        if not folds:
            continue

        def change(row: str, measure: str, here: Any = (document, widths, folds)) -> float:
            return mean_change(here[0], row, here[1], measure, here[2])

        cells = [cell(document, row, widths, folds) for row in (*ahead, UNIFORM)]
        if tried:
            best = max(tried, key=lambda row: change(row, "dice"))
            for row, text in zip(ahead, cells, strict=False):
                if text:  # beside the peer with the best boundary Dice, which may be another one
                    ahead[row].append(change(row, "nsd") - max(change(peer, "nsd") for peer in tried))
            # What is within a point of float differs by seeds and cases, not by the method.
            loss = change(best, "dice")
            shares = [
                f"{max(-change(row, 'dice'), 0) / -loss:.2f}" if text else "–"
                for row, text in zip(ahead, cells, strict=False)
            ]
            cells += [
                f"{cell(document, best, widths, folds)} {best}",
                " / ".join(shares) if loss < -1 else "",
            ]
        else:
            cells += ["", ""]
        name = f"{kind.upper()}, {widths}" + (f", {len(folds)} folds" if len(folds) > 1 else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    leads = [
        f"`{row}` by {np.mean(found):+.1f} on average over {len(found)} lines (median {np.median(found):+.2f}), by "
        f"{min(found):+.2f} where least"
        for row, found in ahead.items()
        if found
    ]
    if leads:
        lines += [
            "", f"Boundary Dice is ahead of the peer's that has the best: {'; '.join(leads)}. Of the peer's loss of Dice: that of "
            "what is shipped / of everything / of `+ equalization`, over the peer's, where it loses more than 1.",
        ]  # fmt: skip
    pairs = [
        (EVERYTHING, EQUALIZED),
        (SHIPPED, EVERYTHING),
        (SHIPPED, EQUALIZED),
        (BEST_EPOCH, SHIPPED),
        (FREE_SCALES, SHIPPED),
    ]
    beside = [text for row, other in pairs if (text := row_beside_row(documents, row, other))]
    return lines + (["", f"On average, in the folds that both have: {'; '.join(beside)}."] if beside else [])


def row_beside_row(documents: Mapping[str, Mapping[str, Any]], row: str, other: str) -> str:
    """Mean difference of two rows over the data sets and widths that have both, in the folds that both have."""
    found = []
    for document, widths in itertools.product(documents.values(), WIDTHS):
        folds = sorted(
            set(folds_of(trainings(document, row, widths)))
            & set(folds_of(trainings(document, other, widths)))
        )
        if folds:
            found.append(
                [
                    mean_change(document, row, widths, measure, folds)
                    - mean_change(document, other, widths, measure, folds)
                    for measure in ("dice", "nsd")
                ]
            )
    if not found:
        return ""
    dice, nsd = np.mean(found, axis=0)
    return f"`{row}` beside `{other}` {dice:+.2f} Dice and {nsd:+.2f} boundary Dice over {len(found)} lines"


def cell(document: Mapping[str, Any], row: str, widths: str, folds: Sequence[int]) -> str:
    """Change of Dice / boundary Dice; empty for a row that lacks one of the folds."""
    found = trainings(document, row, widths, folds)
    if folds_of(found) != list(folds):
        return ""
    dice, nsd = (mean_change(document, row, widths, measure, folds) for measure in ("dice", "nsd"))
    return f"{dice:+.1f} / {nsd:+.1f}" + (f" ({len(found)})" if len(found) > 1 else "")


def ablation_table(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Guo et al.'s rows side by side, in the folds that have all of them; nothing where none has."""
    lines = []
    for (kind, document), widths in itertools.product(documents.items(), WIDTHS):
        folds = sorted(
            set.intersection(*(set(folds_of(trainings(document, row, widths))) for row in ABLATION))
        )
        if folds:
            cells = [cell(document, row, widths, folds) for row in ABLATION]
            lines.append(f"| {kind.upper()}, {widths} | {' | '.join(cells)} |")
    if not lines:
        return []
    return [
        "", "Guo et al.'s ablation, without equalization and teacher, change of Dice / boundary Dice to float, with the number of "
        "trainings where there are several:", "",
        f"| | {' | '.join(ABLATION)} |", "|---|" + "---:|" * len(ABLATION), *lines,
    ]  # fmt: skip


def bounds_table(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Upper bounds of what is lost at 4-bit activations, beside the limits that are asked for."""
    rows = (CONTROL, UNIFORM, EQUALIZED, EVERYTHING, SHIPPED, BEST_EPOCH)
    lines = [
        "", "Drop from float, upper 95 % bound (two-sided interval, over test units and trainings; none of a single number):", "",
        f"| | at most | {' | '.join(rows)} |", "|---|---:|" + "---:|" * len(rows),
    ]  # fmt: skip
    for (kind, document), (widths, limit) in itertools.product(documents.items(), LIMITS.items()):
        for measure in ("dice", "membrane_dice"):
            cells = []
            for row in rows:
                found = changes(document, row, FLOAT if row == CONTROL else widths, measure)
                trained = trainings(document, row, FLOAT if row == CONTROL else widths)
                if len(found) > 1:
                    bound = summarize({str(number): -change for number, change in enumerate(found)}).high
                    cells.append(f"{bound:+.2f}" + (f" ({counted(trained)})" if len(trained) > 1 else ""))
                else:
                    cells.append("")
            if any(cells[1:]):
                lines.append(
                    f"| {kind.upper()}, {widths}, {NAMES[measure]} | {limit:.1f} | {' | '.join(cells)} |"
                )
    return lines


def candidates_table(document: Mapping[str, Any]) -> list[str]:
    """Learning rates side by side on the validation cases; nothing where none was tried."""
    rows = document.get("validation", [])
    rates = sorted({row["learning_rate"] for row in rows if "learning_rate" in row})
    if not rates:
        return []
    references = [row for row in rows if row["row"] == FLOAT]

    def cell(found: Sequence[Mapping[str, Any]], rate: float) -> str:
        tried = [row for row in found if row["learning_rate"] == rate]
        many = f" ({len(tried)} trainings)" if len(tried) > 1 else ""
        return dice_and_boundary(tried) + many if tried else ""

    lines = [
        "", f"On the validation cases (float: {dice_and_boundary(references)}), Dice / boundary Dice by learning rate:", "",
        "| widths | row | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|---|" + "---:|" * len(rates),
    ]  # fmt: skip
    for widths, name in itertools.product((FLOAT, *WIDTHS), (CONTROL, *ROWS)):
        found = [row for row in rows if (row["row"], row["widths"]) == (name, widths)]
        if found:
            lines.append(f"| {widths} | {name} | {' | '.join(cell(found, rate) for rate in rates)} |")
    return lines


def parts_table(document: Mapping[str, Any]) -> list[str]:
    """What each part adds to equalization, on the validation cases and on the test cases; of trainings in folds that have all."""
    rows = [row for row in PARTS if PARTS[row].equalized]
    lines = []
    for widths in WIDTHS:
        held = {row: [r for r in trainings(document, row, widths) if "validation" in r] for row in rows}
        sets = [{(r["fold"], r["seed"]) for r in found} for found in held.values() if found]
        if len(sets) < 2:
            continue
        common = set.intersection(*sets)
        references = {r["fold"]: r for r in trainings(document, FLOAT, FLOAT)}
        for row, found in held.items():
            pairs = [(r, references[r["fold"]]) for r in found if (r["fold"], r["seed"]) in common]
            if not pairs:
                continue
            changed = {
                part: [
                    float(np.mean([of(r, m) - of(before, m) for r, before in pairs])) for m in ("dice", "nsd")
                ]
                for part, of in (("validation", _validated), ("test", _tested))
            }
            cells = [" / ".join(f"{value:+.1f}" for value in values) for values in changed.values()]
            lines.append(f"| {widths} | {row} | {counted([r for r, _ in pairs])} | {' | '.join(cells)} |")
    if not lines:
        return []
    return [
        "", "Parts beside equalization, change of Dice / boundary Dice to float; of the trainings that every row of a width has:", "",
        "| widths | row | trainings | validation cases | test cases |", "|---|---|---:|---:|---:|", *lines,
    ]  # fmt: skip


def _validated(found: Mapping[str, Any], measure: str) -> float:
    return float(found["validation"][measure])


def _tested(found: Mapping[str, Any], measure: str) -> float:
    return float(np.mean(list(found[measure].values())))


def dice_and_boundary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over the units of all rows."""
    return " / ".join(
        f"{np.mean([value for row in rows for value in row[m].values()]):.1f}" for m in ("dice", "nsd")
    )


def study_of(options: argparse.Namespace) -> Study:
    """The study that ``kind``, ``dataset``, ``study``, ``out``, ``preset`` and ``epochs`` of a command line name."""
    bundle = Path(__file__).parents[1] / "bundles" / f"{options.kind}_unet"
    comparison = Comparison(
        options.kind, options.dataset.resolve(), bundle.resolve(), options.study / options.kind / options.preset,
        options.preset, PRESETS[options.preset][options.kind],
    )  # fmt: skip
    return Study(comparison, options.out, options.epochs)


def study_parser(description: str | None, examples: str, out: str) -> argparse.ArgumentParser:
    """A parser of what ``study_of`` and the page take; ``out`` says what --out is."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "kind", choices=("em", "gm", "nih", "page"), help="a data set; page: write --page from --out"
    )
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="the prepared data set")
    parser.add_argument("--study", type=Path, metavar="DIR", help="--out of unetq reproduce")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
    parser.add_argument(
        "--page", type=Path, metavar="DIR", default=Path("docs/results"), help="folder of the page"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="of unetq reproduce")
    parser.add_argument(
        "--epochs", type=int, default=8, metavar="N", help="of every row (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study of one data set, or write the page; returns the exit status."""
    parser = study_parser(__doc__, EXAMPLES, "everything is kept there")
    parser.add_argument(
        "--widths", nargs="+", choices=WIDTHS, default=WIDTHS, metavar="WnAm", help="(default: all)"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=(CONTROL, *ROWS), default=(CONTROL, *ROWS), metavar="ROW"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(default: 0)")
    parser.add_argument("--folds", type=int, nargs="+", default=[0], metavar="K", help="(default: 0)")
    parser.add_argument(
        "--metric", choices=("hessian", "fisher", "sqnr"), default="sqnr", help="(%(default)s)"
    )
    parser.add_argument(
        "--scale", choices=("free", "power-of-two"), default="free", help="of ours (%(default)s)"
    )
    parser.add_argument(
        "--candidates", type=float, nargs="+", default=[], metavar="RATE",
        help="learning rates that are compared on the validation cases; no row is tested then",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.kind == "page":
        write_page("ssqat", options.out, options.page, MARKS, markdown)
        return 0
    check_device(options.device)
    study = study_of(options)
    comparison = replace(study.comparison, device=options.device)
    study = replace(study, comparison=comparison, scale=options.scale, metric=options.metric)
    rates: list[float | None] = list(options.candidates) or [None]
    jobs: list[tuple[int, str, str, int, float | None]] = []
    for fold in options.folds:
        jobs.append((fold, FLOAT, FLOAT, 0, rates[0]))
        for seed, rate in itertools.product(options.seeds, rates):
            jobs += [(fold, CONTROL, FLOAT, seed, rate)] if CONTROL in options.rows else []
            trained = [row for row in options.rows if row != CONTROL]
            jobs += [(fold, row, widths, seed, rate) for widths in options.widths for row in trained]
    for fold, row, widths, seed, rate in tqdm(jobs, desc=f"{options.kind}: rows", unit="row", disable=None):
        found = run(replace(study, fold=fold), row, widths, seed, rate)
        candidate = "" if rate is None else f", learning rate {rate:g}, validation"
        measured = dice_and_boundary([found])
        tqdm.write(
            f"{options.kind} fold {fold} {widths} {row} seed {seed}{candidate}: Dice / boundary Dice {measured}"
        )
        write_json(options.out / f"{options.kind}.json", collected(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
