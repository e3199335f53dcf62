"""Which tensors mind being rounded, by four metrics, and what the plans made of them are worth, on real data.

Begins with the float networks of ``unetq reproduce``: Hessian traces and the cheaper metrics on training crops, figures of
trace and computation per layer, then post-training quantization at equal size with the plan of each metric, of uniform
and of random widths, and on request a short training of each. Everything is kept in --out and not done twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import monai_unetq as uq
from monai_unetq.datasets import data_list
from monai_unetq.files import write_json
from monai_unetq.recipe import versions
from monai_unetq.report.sensitivity import sensitivity_figure
from monai_unetq.reproduction.pages import interval, write_page
from monai_unetq.reproduction.run import PRESETS, Comparison, alone, score
from monai_unetq.sensitivity import Sensitivities, Sensitivity, fisher, hessian_traces, score_drop, sqnr
from monai_unetq.sensitivity.table import KINDS, tensor_name
from monai_unetq.surgery.workload import Unit

EXAMPLES = """\
examples:
  unetq reproduce em --data Dataset501_EM --out study --rows "Full precision"
  python benchmarks/sensitivity.py em --dataset Dataset501_EM --study study --out sensitivity
  python benchmarks/sensitivity.py em --dataset Dataset501_EM --study study --out sensitivity --train 3
"""

CROPS = 16
BATCH = 2
AVERAGES = (4.0, 3.0)
"""Mean bits of the weights; activations have 8."""

MARKS = "<!-- made by benchmarks/sensitivity.py -->", "<!-- end -->"

METRICS = ("hessian", "fisher", "sqnr", "drop")
DRAWS = 3
"""Random allocations."""


@dataclass(frozen=True)
class Study:
    """One data set's networks and folders."""

    comparison: Comparison
    out: Path

    @property
    def kind(self) -> str:
        return self.comparison.kind

    def network(self) -> nn.Module:
        """The trained float network, split."""
        file = self.comparison.folder / "float-relu" / f"fold0-seed{self.comparison.seed}" / "model.pt"
        network = uq.networks.FixedPointUNet(1, 1, width=self.comparison.settings.width)
        network.load_state_dict(torch.load(file, weights_only=True))
        return uq.split(network.eval(), torch.zeros(1, 1, 64, 64))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Crops of the training cases, as training sees them, the same ones every time."""
        parser = self._parser()
        loader = parser.get_parsed_content("train#dataloader")
        found: list[tuple[Tensor, Tensor]] = []
        for batch in loader:
            image, label = (batch[key].as_tensor() for key in ("image", "label"))
            found += [(image[i : i + BATCH], label[i : i + BATCH]) for i in range(0, len(image), BATCH)]
            if len(found) * BATCH >= CROPS:
                break
        return found[: CROPS // BATCH]

    def loss(self) -> Callable[[Any, Any], Tensor]:
        """The bundle's loss."""
        loss: Callable[[Any, Any], Tensor] = self._parser().get_parsed_content("loss")
        return loss

    def _parser(self) -> Any:
        from monai.bundle import ConfigParser
        from monai.utils import set_determinism

        set_determinism(self.comparison.seed)
        parser = ConfigParser()
        parser.read_config(str(self.comparison.bundle / "configs" / "train.yaml"))
        settings = self.comparison.settings
        overrides = {
            "bundle_root": str(self.comparison.bundle), "dataset_dir": str(self.comparison.dataset), "fold": 0,
            "device": "cpu", "batch_size": settings.batch_size, "patch_size": list(settings.patch_size),
            "steps_per_epoch": CROPS, "cache_rate": 0.0, "num_workers": 0,
        }  # fmt: skip
        parser.update(overrides)
        parser.parse()
        return parser


def dice_of(output: Tensor, label: Tensor) -> float:
    """Dice of foreground and background, averaged, in percent: the score whose drop is measured."""
    predicted, truth = (output > 0).float(), (label > 0.5).float()
    scores = []
    for one, other in ((predicted, truth), (1 - predicted, 1 - truth)):
        scores.append(200 * float((one * other).sum() + 1e-6) / float((one + other).sum() + 2e-6))
    return sum(scores) / 2


def measured(study: Study) -> dict[str, Sensitivities]:
    """All four metrics, from files where they were measured before."""
    found: dict[str, Sensitivities] = {}
    missing = [m for m in METRICS if not (study.out / f"{study.kind}-{m}.json").exists()]
    if missing:
        network, batches, loss = study.network(), study.batches(), study.loss()
        options: dict[str, Any] = {"widths": (2, 3, 4, 6, 8), "scale": "free"}
        run: dict[str, Callable[[], Sensitivities]] = {
            "hessian": lambda: hessian_traces(
                network, loss, batches, state=study.out / f"{study.kind}-hessian.state", **options
            ),
            "fisher": lambda: fisher(network, loss, batches, **options),
            "sqnr": lambda: sqnr(network, batches, **options),
            "drop": lambda: score_drop(network, dice_of, batches, **options),
        }
        for metric in missing:
            run[metric]().save(study.out / f"{study.kind}-{metric}.json")
    for metric in METRICS:
        found[metric] = Sensitivities.load(study.out / f"{study.kind}-{metric}.json")
    return found


def plans(found: dict[str, Sensitivities], bits: float, draw: int) -> Iterator[tuple[str, uq.QuantPlan]]:
    """Name → plan at the same mean number of weight bits; ``draw`` is the seed of the random one."""
    from monai_unetq.allocation import allocate

    options: dict[str, Any] = {"budget": f"weights={bits:g}bits", "choices": (2, 3, 4, 6, 8), "scale": "free"}
    for metric in METRICS:
        yield metric, allocate(found[metric], **options)
    yield "uniform", allocate(found["sqnr"], **{**options, "method": "uniform"})
    yield f"random {draw}", allocate(found["sqnr"], **options, method="random", seed=draw)


def quantized_in_place(study: Study, plan: uq.QuantPlan, batches: Sequence[Any]) -> nn.Module:
    """Post-training quantization: no step of training."""
    network = study.network()
    uq.quantize(network, plan, batches[0][0][:1])
    return uq.calibrate(network, [image for image, _ in batches])


def ptq(study: Study, found: dict[str, Sensitivities]) -> list[dict[str, Any]]:
    """Test Dice of every plan without training, and of the float network."""
    batches = study.batches()
    rows: list[dict[str, Any]] = [{**_kept(study, "float", study.network), "name": "float", "bits": 32.0}]
    for bits in AVERAGES:
        for draw in range(DRAWS):
            for name, plan in plans(found, bits, draw):
                if draw and not name.startswith("random"):
                    continue
                key = f"{name}-{bits:g}".replace(" ", "")
                found_dice = _kept(study, key, partial(quantized_in_place, study, plan, batches))
                rows.append({**found_dice, "name": name, "bits": bits})
                print(study.kind, name, bits, f"{np.mean(list(rows[-1]['dice'].values())):.2f}", flush=True)
    return rows


def _kept(study: Study, key: str, build: Callable[[], nn.Module]) -> dict[str, Any]:
    """Dice of a network on the test cases, through the bundle's inference."""
    folder = study.out / study.kind / key
    file = folder / "score.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        network = build()
        model = folder / "model.pt"
        if any(True for m in network.modules() if hasattr(m, "rounds_bias")):
            model = uq.pack(network, folder / "model.unetq")
        else:
            torch.save(network.state_dict(), model)
        comparison = study.comparison
        comparison._bundle_run(
            ("inference",),
            output_dir=str(folder / "predictions"),
            model=str(model),
            **comparison._common("relu", 0),
        )
        cases = data_list(comparison.dataset, 0, "test")
        write_json(file, score(comparison.kind, cases, folder / "predictions"))
    return json.loads(file.read_text(encoding="utf-8"))


def trained(study: Study, found: dict[str, Sensitivities], bits: float, seeds: int) -> list[dict[str, Any]]:
    """Test Dice of every plan after a short quantization-aware training, for several seeds."""
    rows = []
    for seed in range(seeds):
        for name, plan in plans(found, bits, seed):
            folder = study.out / study.kind / f"trained-{name}-{bits:g}-seed{seed}".replace(" ", "")
            if not (folder / "score.json").exists():
                _train(study, plan, folder, seed)
            row = json.loads((folder / "score.json").read_text(encoding="utf-8"))
            label = "random" if name.startswith("random") else name
            rows.append({**row, "name": label, "bits": bits, "seed": seed})
            print(study.kind, "trained", name, seed, f"{np.mean(list(row['dice'].values())):.2f}", flush=True)
    return rows


def _train(study: Study, plan: uq.QuantPlan, folder: Path, seed: int) -> None:
    comparison = study.comparison
    with alone(folder):
        plan.save(folder / "plan-asked.json")
        base = comparison.folder / "float-relu" / f"fold0-seed{comparison.seed}"
        training = {**comparison._training("relu", 0, folder), "seed": seed}
        comparison._bundle_run(
            ("train", "fixed_point"), output_dir=str(folder), epochs=comparison.settings.epochs, learning_rate=3e-4,
            float_model=str(base / "model.pt"), plan=str(folder / "plan-asked.json"), val_interval=5, **training,
        )  # fmt: skip
        comparison._bundle_run(
            ("inference",), output_dir=str(folder / "predictions"), model=str(folder / "model.unetq"),
            **comparison._common("relu", 0),
        )  # fmt: skip
        cases = data_list(comparison.dataset, 0, "test")
        write_json(folder / "score.json", score(comparison.kind, cases, folder / "predictions"))


def traces(found: Sensitivities) -> list[dict[str, Any]]:
    """Average Hessian traces with their standard errors, and MACs, of every layer and part."""
    rows = []
    for unit in found.units:
        weight, image = (found[tensor_name(unit.layer, unit.part, kind)] for kind in KINDS)
        rows.append(
            {
                "unit": unit.name, "layer": unit.layer, "part": unit.part, "macs": unit.macs, "weights": unit.weights,
                "weight_trace": weight.trace, "weight_error": weight.error, "input_trace": image.trace,
                "input_error": image.error,
            }
        )  # fmt: skip
    return rows


def figure_of(document: Mapping[str, Any], path: Path) -> Path:
    """The traces and MACs of a document as a figure."""
    entries, units = {}, []
    for row in document["traces"]:
        units.append(Unit(row["layer"], row["part"], row["weights"], 0, 0, row["macs"]))
        for kind in KINDS:
            trace, error = row[f"{kind}_trace"], row[f"{kind}_error"]
            entry = Sensitivity(row["layer"], row["part"], kind, 0, trace, error, {8: 0.0}, {8: 0.0})
            entries[entry.name] = entry
    return sensitivity_figure(Sensitivities(entries, "hessian", tuple(units), 0, (1,), {}), path)


def ratios(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[str, float | None]]:
    """Layer → its skip half over its up half, for every split layer; None where one is within two standard errors of 0."""
    split: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if row["part"] in ("skip", "up"):
            error = row.get(key.replace("trace", "error"), 0.0) if key.endswith("trace") else 0.0
            split.setdefault(row["layer"], {})[row["part"]] = row[key] if abs(row[key]) > 2 * error else None
    found: list[tuple[str, float | None]] = []
    for layer, both in split.items():
        skip, up = both.get("skip"), both.get("up")
        found.append((layer, None if skip is None or up is None else skip / up))
    return found


def markdown(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's tables, made from the JSON documents alone."""
    lines: list[str] = []
    for kind, document in documents.items():
        rows, probes = document["traces"], document["probes"]
        lines += [
            "", f"## {kind.upper()}", "", f"Traces of {document['crops']} training crops, {probes} probes.", "",
            "| layer | weight: trace | ± | input: trace | ± | MACs [10^6] |", "|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for row in rows:
            lines.append(
                f"| {row['unit']} | {row['weight_trace']:.3g} | {row['weight_error']:.1g} | {row['input_trace']:.3g} | "
                f"{row['input_error']:.1g} | {row['macs'] / 1e6:.1f} |"
            )
        lines += ["", "| skip over up | inputs | weights | MACs |", "|---|---:|---:|---:|"]
        columns = [ratios(rows, key) for key in ("input_trace", "weight_trace", "macs")]
        for (layer, image), (_, weight), (_, macs) in zip(*columns, strict=True):
            cells = ("–" if ratio is None else f"{ratio:.2f}" for ratio in (image, weight, macs))
            lines.append(f"| {layer} | {' | '.join(cells)} |")
        lines += ["", *_results(document)]
    return "\n".join([*lines, ""])


def _results(document: Mapping[str, Any]) -> list[str]:
    """Dice of every plan, without and with training."""
    full = float(np.mean(list(document["ptq"][0]["dice"].values())))
    widths = sorted({row["bits"] for row in document["ptq"][1:]}, reverse=True)
    names = list(dict.fromkeys(row["name"] for row in document["ptq"][1:]))
    lines = [
        f"Test Dice after post-training quantization (8-bit activations; float: {full:.2f}), mean and change with its "
        "95 % interval over test units:", "",
        "| plan | " + " | ".join(f"{bits:g} bits | change" for bits in widths) + " |",
        "|---|" + "---:|---:|" * len(widths),
    ]  # fmt: skip
    reference = document["ptq"][0]["dice"]
    for name in names:
        cells = []
        for bits in widths:
            (dice,) = (row["dice"] for row in document["ptq"] if (row["name"], row["bits"]) == (name, bits))
            changes = [dice[unit] - reference[unit] for unit in reference]
            cells.append(f"{np.mean(list(dice.values())):.2f} | {interval(changes)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if document["trained"]:
        seeds = len({row["seed"] for row in document["trained"]})
        lines += [
            "", f"After training ({document['steps']} steps, {document['trained'][0]['bits']:g} bits), mean over {seeds} "
            "seeds with its 95 % interval:", "", "| plan | cells | membranes |", "|---|---:|---:|",
        ]  # fmt: skip
        for name in dict.fromkeys(row["name"] for row in document["trained"]):
            cells = []
            for key in ("dice", "membrane_dice"):
                means = [
                    float(np.mean(list(row[key].values())))
                    for row in document["trained"]
                    if row["name"] == name and key in row
                ]
                cells.append(interval(means) if means else "–")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study of one data set; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "kind", choices=("em", "gm", "nih", "page"), help="a data set; page: write --page from --out"
    )
    parser.add_argument(
        "--page", type=Path, metavar="DIR", default=Path("docs/results"), help="folder of the page"
    )
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="the prepared data set")
    parser.add_argument("--study", type=Path, metavar="DIR", help="--out of unetq reproduce")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="everything is kept there")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="of unetq reproduce")
    parser.add_argument(
        "--train", type=int, default=0, metavar="SEEDS", help="also train every plan, with so many seeds"
    )
    parser.add_argument("--measure-only", action="store_true", help="sensitivities, no plans")
    options = parser.parse_args(arguments)
    if options.kind == "page":
        documents = write_page("sensitivity", options.out, options.page, MARKS, markdown)
        for kind, document in documents.items():
            figure_of(document, options.page / f"sensitivity-{kind}.svg")
        return 0
    bundle = Path(__file__).parents[1] / "bundles" / f"{options.kind}_unet"
    comparison = Comparison(
        options.kind, options.dataset.resolve(), bundle.resolve(), options.study / options.kind / options.preset,
        options.preset, PRESETS[options.preset][options.kind],
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(comparison, options.out)
    found = measured(study)
    if options.measure_only:
        return 0
    settings = comparison.settings
    document = {
        "kind": options.kind, "versions": versions(), "crops": CROPS, "probes": found["hessian"].conditions["probes"],
        "traces": traces(found["hessian"]), "ptq": ptq(study, found), "steps": settings.epochs * settings.steps_per_epoch,
        "trained": trained(study, found, AVERAGES[-1], options.train) if options.train else [],
    }  # fmt: skip
    write_json(options.out / f"{options.kind}.json", document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
