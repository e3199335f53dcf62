"""Number formats on EM membranes: every format's Dice, boundary measures and size, over seeds, against float.

Trains one float network a seed and every format from it, chooses weights on the validation slices, measures on
the test slices, and writes docs/results/em.md with the JSON it is made from. Every row of every seed is a stage of its
own: an interrupted study goes on where it was.

examples:
  python benchmarks/em_formats.py --data DIR --out em-study
  python benchmarks/em_formats.py --data DIR --out em-study --width 64 --steps 1600 --device cuda --batch-size 5
  python benchmarks/em_formats.py --out em-study --tables-only --docs docs/results
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from monai_unetq.allocation import cost_of
from monai_unetq.deploy import unpack
from monai_unetq.files import write_json
from monai_unetq.metrics import METRICS, summarize
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.recipe import (
    IMAGE_FORMAT,
    Data,
    evaluate,
    result_row,
    train_float,
    train_quantized,
    versions,
)
from monai_unetq.surgery import quantize
from monai_unetq.training import Schedule, train

PAPER_WIDTH = 64
ARGUMENTS = ("width", "steps", "qat_steps", "learning_rate", "batch_size", "device")
"""What a seed's results depend on, as the command line names it."""


@dataclass(frozen=True)
class Row:
    """One line of the table: formats, and how their scales are found."""

    activations: str
    weights: str
    how: Literal["static", "calibrated", "learned"]

    @property
    def name(self) -> str:
        return f"{self.activations}/{self.weights} {self.how}"

    def plan(self, network: FixedPointUNet) -> QuantPlan:
        """First and last layer have 8-bit weights, which are 0.02 % of all at the paper's width."""
        return QuantPlan.uniform(
            network,
            self.weights,
            self.activations,
            input=IMAGE_FORMAT,
            first="int8",
            last="int8",
            learned=self.how == "learned",
        )


ROWS = (
    Row("Q6.0", "Q0.4", "static"),
    Row("int6", "int4", "learned"),
    Row("int8", "int8", "calibrated"),
    Row("int4", "int4", "learned"),
    Row("Q4.0", "Q0.2", "static"),
    Row("int4", "int2", "learned"),
    Row("Q8.0", "Q0.8", "static"),
    Row("Q8.8", "Q8.8", "static"),
    Row("int8", "int8", "learned"),
)
SHOWN = ("Q8.8/Q8.8 static", "Q8.0/Q0.8 static", "Q6.0/Q0.4 static", "Q4.0/Q0.2 static", "int8/int8 calibrated",
         "int8/int8 learned", "int6/int4 learned", "int4/int4 learned", "int4/int2 learned")  # fmt: skip
LONGER = "float, trained on"
"""The control: float trained for as many further steps, at the same rate, as the quantized rows."""


def main() -> None:
    """Parse arguments, run what is missing, write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with image/ and label/")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the study: networks, results of each row"
    )
    parser.add_argument("--docs", type=Path, help="folder for em.md and em.json (default: the study's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1200, help="of float training (default: %(default)s)")
    parser.add_argument("--qat-steps", type=int, default=400, help="of QAT (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of QAT (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tables-only", action="store_true", help="write the tables of what is there")
    options = parser.parse_args()
    if not options.tables_only:
        if options.data is None:
            parser.error("--data is needed")
        data = Data.em(options.data)
        options.out.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            run_seed(data, seed, options)
    docs = options.docs or options.out
    study = collect(options.out)
    write_json(docs / "em.json", study)
    (docs / "em.md").write_text(markdown(study), encoding="utf-8")
    print(f"{docs / 'em.md'}")


def run_seed(data: Data, seed: int, options: argparse.Namespace) -> None:
    """Train, quantize and measure every row of one seed that has no result yet."""
    folder = options.out / f"seed-{seed}"
    schedule = Schedule(options.steps, options.batch_size, seed=seed)
    qat = Schedule(
        options.qat_steps,
        options.batch_size,
        seed=seed,
        learning_rate=options.learning_rate,
        freeze_norms_at=0.7,
    )
    network, history = train_float(data, options.width, schedule, folder / "float", options.device)
    assert isinstance(network, FixedPointUNet)
    conditions = {
        "versions": versions(),
        "split": {"train": data.split.train, "validation": data.split.validation, "test": data.split.test},
        "width": options.width,
        "steps": options.steps,
        "qat_steps": options.qat_steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "device": options.device,
        "threads": torch.get_num_threads(),
    }
    test = data.part(data.split.test)
    result = folder / "float.json"
    if not result.exists():
        metrics, _ = evaluate(network, test)
        row = result_row("float", network, ("float", "float"), metrics, data, None)
        write_json(result, {**row, "how": "", "validation": history.best, "conditions": conditions})
    result = folder / "float-longer.json"
    if not result.exists():
        longer = FixedPointUNet(1, 1, width=options.width)
        longer.load_state_dict(network.state_dict())
        checkpoint = folder / "float-longer" / "checkpoint.pt"
        cases = data.part(data.split.train), data.part(data.split.validation)
        history = train(longer, *cases, qat, checkpoint, LONGER, options.device)
        metrics, _ = evaluate(longer, test)
        row = result_row(LONGER, longer, ("float", "float"), metrics, data, None)
        write_json(result, {**row, "how": "trained on", "validation": history.best, "conditions": conditions})
    for row_of in ROWS:
        result = folder / f"{row_of.name.replace('/', '-').replace(' ', '-')}.json"
        if result.exists():
            continue
        plan = row_of.plan(network)
        stage = folder / result.stem
        trained = None if row_of.how == "calibrated" else qat
        packed, history = train_quantized(network, plan, data, trained, stage, options.device)
        fresh = FixedPointUNet(1, 1, width=options.width)
        quantized = unpack(packed, fresh).to(options.device)
        metrics, _ = evaluate(quantized, test)
        formats = (row_of.weights, row_of.activations)
        row = result_row(row_of.name, quantized, formats, metrics, data, packed)
        write_json(result, {**row, "how": row_of.how, "validation": history.best, "conditions": conditions})
        print(f"seed {seed}: {row_of.name}: Dice {metrics['dice']['mean']:.2f}", flush=True)


def collect(out: Path) -> dict[str, Any]:
    """One document of all rows that every seed has: per slice the mean over seeds, and the change from float."""
    seeds = sorted(p for p in out.glob("seed-*") if (p / "float.json").exists())
    if not seeds:
        raise SystemExit(f"{out}: no results yet")
    rows = [{path.stem: json.loads(path.read_text()) for path in seed.glob("*.json")} for seed in seeds]
    complete = [name for name in rows[0] if all(name in row for row in rows)]
    by_name = {rows[0][stem]["name"]: [row[stem] for row in rows] for stem in complete}
    float_runs = by_name["float"]
    document: dict[str, Any] = {
        "conditions": float_runs[-1]["conditions"],
        "seeds": [int(p.name.removeprefix("seed-")) for p in seeds],
        "rows": [],
    }
    for name in ("float", *(n for n in (LONGER, *SHOWN) if n in by_name)):
        runs = by_name[name]
        entry = {k: runs[0][k] for k in ("name", "weights", "activations", "how", "weight_bytes", "activation_bytes",
                                         "file_bytes", "weight_ratio", "activation_ratio")}  # fmt: skip
        entry["validation"] = [run["validation"] for run in runs]
        entry["metrics"], entry["change"] = {}, {}
        for metric in METRICS:
            better_high = metric != "hd95"
            values = _over_seeds(runs, metric)
            baseline = _over_seeds(float_runs, metric)
            change = {case: values[case] - baseline[case] for case in values}
            entry["metrics"][metric] = _summary(values, better_high)
            entry["metrics"][metric]["by_seed"] = [run["metrics"][metric]["mean"] for run in runs]
            entry["change"][metric] = _summary(change, better_high)
        entry["paper_width"] = _at_paper_width(name)
        document["rows"].append(entry)
    return document


def markdown(study: dict[str, Any]) -> str:
    """The page docs/results/em.md."""
    conditions, seeds = study["conditions"], study["seeds"]
    split = conditions["split"]
    command = [
        "python benchmarks/em_formats.py --data DIR --out em-study --docs docs/results --seeds",
        *map(str, seeds),
        *(f"--{key.replace('_', '-')} {conditions[key]}" for key in ARGUMENTS),
    ]
    lines = [
        "# Number formats on EM membranes",
        "",
        "Made by `benchmarks/em_formats.py` from [em.json](em.json); do not edit by hand. The command, "
        "with the folder of slices for `DIR`:",
        "",
        "```",
        " ".join(command),
        "```",
        "",
        f"- **Data**: ISBI 2012 slices {split['train'][0]}–{split['train'][-1]} for training, "
        f"{split['validation'][0]}–{split['validation'][-1]} for validation, {split['test'][0]}–{split['test'][-1]} "
        "for the test (blocks of consecutive slices).",
        f"- **Network**: `FixedPointUNet` of width {conditions['width']} (the paper's is {PAPER_WIDTH}), on "
        f"{conditions['device']}. Float: {conditions['steps']} steps of {conditions['batch_size']} crops of 192². Every "
        f"quantized row starts from the float network of its seed; all but *calibrated* train "
        f"{conditions['qat_steps']} further steps at {conditions['learning_rate']:g}.",
        f"- **Numbers**: mean over seeds {', '.join(map(str, seeds))} and the {len(split['test'])} test slices, "
        "with a 95 % Student t interval over the slices (each averaged over seeds). Weights were chosen on the "
        "validation slices, nothing on the test slices. *Change* is paired with float, slice by slice.",
        "- **Formats**: activations/weights. The image is UQ0.8, first and last layer have int8 weights, biases are on the "
        "accumulator's grid; `int` scales are powers of two, per output channel for weights.",
        "- **Dice** is that of the cell interior, as in the paper; answering *interior* everywhere scores about 88, "
        "so read the membrane column.",
        "- **Control**: the quantized rows train longer than float, so *float, trained on* trains float for as many further "
        "steps at the same rate.",
        "",
        "| format | how | Dice [95 %] | change | membrane Dice [95 %] | change | surface Dice 1 px | HD95 px | "
        "worst Dice (slice) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in study["rows"]:
        metrics, change = row["metrics"], row["change"]
        changes = ("–", "–") if row["name"] == "float" else tuple(
            f"{change[m]['mean']:+.2f} [{change[m]['low']:+.2f}, {change[m]['high']:+.2f}]" for m in ("dice", "membrane_dice")
        )  # fmt: skip
        name = _label(row)
        lines.append(
            f"| {name} | {row['how']} | {_interval(metrics['dice'])} | {changes[0]} | "
            f"{_interval(metrics['membrane_dice'])} | {changes[1]} | {metrics['nsd']['mean']:.1f} | "
            f"{metrics['hd95']['mean']:.1f} | {metrics['dice']['worst']:.2f} ({metrics['dice']['worst_case']}) |"
        )
    lines += [
        "",
        "Size of the weights (with float32 biases) and of the packed file, and memory of the activations (inputs of all "
        "convolutions, for one slice of 512²):",
        "",
        f"| format | weights | ratio | packed file | activations | ratio | weights at width {PAPER_WIDTH} | ratio | "
        "activations | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown = set()
    for row in study["rows"]:
        name = _label(row)
        if name in shown:
            continue
        shown.add(name)
        wide = row["paper_width"]
        packed = "–" if row["file_bytes"] is None else f"{row['file_bytes'] / 2**10:.0f} KiB"
        lines.append(
            f"| {name} | {row['weight_bytes'] / 2**10:.0f} KiB | {row['weight_ratio']:.1f} | {packed} | "
            f"{row['activation_bytes'] / 2**20:.1f} MiB | {row['activation_ratio']:.1f} | "
            f"{wide['weight_bytes'] / 2**20:.2f} MiB | {wide['weight_ratio']:.1f} | "
            f"{wide['activation_bytes'] / 2**20:.1f} MiB | {wide['activation_ratio']:.1f} |"
        )
    lines += [
        "",
        "Membrane Dice by seed:",
        "",
        "| format | how | " + " | ".join(f"seed {s}" for s in seeds) + " |",
    ]
    lines.append("|---" * (2 + len(seeds)) + "|")
    for row in study["rows"]:
        name = _label(row)
        values = " | ".join(f"{v:.2f}" for v in row["metrics"]["membrane_dice"]["by_seed"])
        lines.append(f"| {name} | {row['how']} | {values} |")
    found = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    lines += ["", f"Versions: {found}.", ""]
    return "\n".join(lines)


def _label(row: dict[str, Any]) -> str:
    return "float" if row["weights"] == "float" else f"{row['activations']}/{row['weights']}"


def _at_paper_width(name: str) -> dict[str, float]:
    example = torch.zeros(1, 1, 512, 512)
    network = FixedPointUNet(1, 1, width=PAPER_WIDTH)
    baseline = cost_of(network, example)
    for row in ROWS:
        if row.name == name:
            quantize(network, row.plan(network))
    cost = cost_of(network, example)
    return {
        "weight_bytes": cost.weight_bytes,
        "weight_ratio": baseline.weight_bytes / cost.weight_bytes,
        "activation_bytes": cost.activation_bytes,
        "activation_ratio": baseline.activation_bytes / cost.activation_bytes,
    }


def _over_seeds(runs: list[dict[str, Any]], metric: str) -> dict[str, float]:
    cases = runs[0]["metrics"][metric]["values"]
    return {case: float(np.mean([run["metrics"][metric]["values"][case] for run in runs])) for case in cases}


def _summary(values: dict[str, float], higher_is_better: bool) -> dict[str, Any]:
    return vars(summarize(values, higher_is_better)).copy()


def _interval(summary: dict[str, Any]) -> str:
    return f"{summary['mean']:.2f} [{summary['low']:.2f}, {summary['high']:.2f}]"


if __name__ == "__main__":
    main()
