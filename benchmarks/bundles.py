"""The three bundles on real data: float and the paper's four fixed-point settings, in each bundle's docs/README.md.

Every row is what a user would run: train.yaml (and fixed_point.yaml, from the float network), then inference.yaml on the
test cases, measured in each image's own geometry. A row's results are a file of their own: an interrupted study
goes on where it was.

examples:
  python benchmarks/bundles.py em --dataset Dataset501_EM --out study
  python benchmarks/bundles.py gm --dataset Dataset502_GM --out study --folds 0 1 2 3 4
  python benchmarks/bundles.py nih --dataset Dataset503_NIH --out study --preset paper
  python benchmarks/bundles.py em --out study --tables-only
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import run

from monai_unetq.datasets import data_list
from monai_unetq.deploy import inspect_packed
from monai_unetq.files import write_json
from monai_unetq.metrics import summarize
from monai_unetq.recipe import versions
from monai_unetq.reproduction import Kind, score
from monai_unetq.reproduction.pages import between

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
FLOAT, LONGER = "float", "float, trained on"
ROWS = (LONGER, "Q8.8/Q8.8", "Q8.0/Q0.8", "Q6.0/Q0.4", "Q4.0/Q0.2")
"""Activations/weights; the control is trained as many further epochs as the quantized rows."""
MARKS = ("<!-- results: made by benchmarks/bundles.py -->", "<!-- end of results -->")


@dataclass(frozen=True)
class Settings:
    """How a bundle is trained; what differs from its configuration files is written with the results."""

    width: int
    epochs: int
    qat_epochs: int
    steps_per_epoch: int
    batch_size: int
    patch_size: tuple[int, int]
    val_interval: int


PRESETS = {
    "cpu": {
        "em": Settings(16, 20, 8, 25, 4, (160, 160), 1),
        "gm": Settings(16, 12, 4, 25, 6, (112, 112), 1),
        "nih": Settings(16, 20, 8, 25, 4, (160, 160), 4),
    },
    "paper": {
        "em": Settings(64, 200, 67, 50, 5, (200, 200), 1),
        "gm": Settings(64, 200, 67, 50, 16, (200, 200), 5),
        "nih": Settings(64, 200, 67, 50, 16, (200, 200), 5),
    },
}
TITLES = {"em": "cell Dice", "gm": "grey matter Dice", "nih": "pancreas Dice"}
UNITS = {"em": "slice", "gm": "person", "nih": "patient"}


def main() -> None:
    """Parse arguments, run what is missing, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("em", "gm", "nih"))
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="folder with dataset.json")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the study")
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables-only", action="store_true", help="write the table of what is there")
    options = parser.parse_args()
    study = options.out / options.kind / options.preset
    settings = PRESETS[options.preset][options.kind]
    if not options.tables_only:
        if options.dataset is None:
            parser.error("--dataset is needed")
        for fold in options.folds:
            run_fold(
                options.kind, options.dataset.resolve(), fold, settings, study, options.device, options.seed
            )
    write_table(options.kind, options.preset, settings, study)


def run_fold(
    kind: Kind, dataset: Path, fold: int, settings: Settings, study: Path, device: str, seed: int
) -> None:
    """Train and measure every row of one fold that has no results yet."""
    base = study / f"fold{fold}"
    for row in (FLOAT, *ROWS):
        folder = base / row.replace("/", "_").replace(" ", "_")
        if (folder / "scores.json").exists():
            continue
        logging.getLogger().setLevel(logging.WARNING)
        common: dict[str, Any] = {
            "dataset_dir": str(dataset),
            "fold": fold,
            "device": device,
            "width": settings.width,
        }
        training: dict[str, Any] = {
            **common,
            "bundle_root": str(BUNDLES / f"{kind}_unet"),
            "output_dir": str(folder),
            "seed": seed,
            "steps_per_epoch": settings.steps_per_epoch,
            "batch_size": settings.batch_size,
            "patch_size": list(settings.patch_size),
            "val_interval": settings.val_interval,
            "resume": (folder / "checkpoint.pt").exists(),
        }
        configs = BUNDLES / f"{kind}_unet" / "configs"
        print(f"{kind} fold {fold}: {row}", flush=True)
        if row == FLOAT:
            run(config_file=str(configs / "train.yaml"), epochs=settings.epochs, **training)
        else:
            activations, weights = ("float", "float") if row == LONGER else row.split("/")
            ends = {"input": "float", "first": "float", "last": "float"} if row == LONGER else {}
            run(
                config_file=[str(configs / "train.yaml"), str(configs / "fixed_point.yaml")],
                epochs=settings.qat_epochs,
                float_model=str(base / FLOAT / "model.pt"),
                weights=weights,
                activations=activations,
                **ends,
                **training,
            )
        packed = folder / "model.unetq"
        run(
            config_file=str(configs / "inference.yaml"),
            bundle_root=training["bundle_root"],
            output_dir=str(folder / "predictions"),
            model=str(packed if packed.exists() else folder / "model.pt"),
            **common,
        )
        scores = score(kind, data_list(dataset, fold, "test"), folder / "predictions")
        best = torch.load(folder / "checkpoint.pt", weights_only=True)["best"]
        scores["validation"] = best["score"]
        scores["weight_bytes"] = inspect_packed(packed)["weight_bytes"] if packed.exists() else None
        write_json(folder / "scores.json", scores)
        print(f"{kind} fold {fold}: {row}: {summarize(scores['dice']).mean:.2f}", flush=True)


def write_table(kind: str, preset: str, settings: Settings, study: Path) -> None:
    """docs/results.json of the bundle, and the table in its README.md, from the results that are there."""
    docs = BUNDLES / f"{kind}_unet" / "docs"
    rows: dict[str, Any] = {}
    folds = sorted(study.glob("fold*"), key=lambda folder: int(folder.name.removeprefix("fold")))
    for row in (FLOAT, *ROWS):
        files = [fold / row.replace("/", "_").replace(" ", "_") / "scores.json" for fold in folds]
        merged: dict[str, Any] = {}
        for file in files:
            if not file.exists():
                continue
            for key, value in json.loads(file.read_text()).items():
                if isinstance(value, dict):
                    merged.setdefault(key, {}).update(value)
                elif key == "weight_bytes":
                    merged[key] = value
        if merged:
            rows[row] = merged
    if FLOAT not in rows:
        raise SystemExit(f"{study}: no results of the float network yet")
    document = {
        "kind": kind,
        "preset": preset,
        "settings": asdict(settings),
        "folds": [fold.name for fold in folds],
        "versions": versions(),
        "rows": rows,
    }
    write_json(docs / "results.json", document)
    readme = docs / "README.md"
    text = between(readme.read_text(encoding="utf-8"), *MARKS, f"{table(document)}\n")
    readme.write_text(text, encoding="utf-8")
    print(table(document))


def table(document: dict[str, Any]) -> str:
    """The results as Markdown: means, and paired differences to float with 95 % intervals over the units."""
    kind, settings, rows = document["kind"], document["settings"], document["rows"]
    measures = ["dice", *(["membrane_dice"] if kind == "em" else [])]
    names = {"dice": TITLES[kind], "membrane_dice": "membrane Dice"}
    base = rows[FLOAT]
    units = len(base["dice"])
    head = ["activations/weights", "weights, bytes"]
    for measure in measures:
        head += [names[measure], "change"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in rows.items():
        size = row.get("weight_bytes")
        cells = [name, "float32" if size is None else f"{size:,}"]
        for measure in measures:
            mean = summarize(row[measure]).mean
            change = summarize(
                {u: v - base[measure][u] for u, v in row[measure].items() if u in base[measure]}
            )
            cells += [f"{mean:.2f}"]
            cells += ["" if name == FLOAT else f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"]
        lines.append(f"| {' | '.join(cells)} |")
    folds = len(document["folds"])
    unit = UNITS[kind]
    conditions = (
        f"Test: {units} {unit}s"
        + (f" in {folds} folds, each left out once" if folds > 1 else "")
        + f"; width {settings['width']}, {settings['epochs'] * settings['steps_per_epoch']} float steps, then "
        f"{settings['qat_epochs'] * settings['steps_per_epoch']} further steps for every other row, batch "
        f"{settings['batch_size']}, crops {settings['patch_size'][0]}×{settings['patch_size'][1]}, one seed. "
        f"Change: mean over {unit}s of the paired difference to float, 95 % Student interval. Weights are chosen on "
        "validation only."
    )
    return "\n".join([*lines, "", conditions])


if __name__ == "__main__":
    main()
