"""nnU-Net's float trainer against ``nnUNetTrainerSSQAT`` and ``nnUNetTrainerQAT`` on real data, all by nnU-Net's own commands.

One float training of fold 0 is the beginning of every quantized one and of a control that is trained on in float; all of
them for the same number of steps. What is compared are nnU-Net's own validation files of the last checkpoint, so nothing is
chosen on them. Everything is kept in --out and not done twice; a training that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from monai_unetq.files import write_json
from monai_unetq.reproduction.pages import between

EXAMPLES = """\
examples:
  python benchmarks/nnunet.py --data data --out study               data/hippocampus and data/em; hours of one core
  python benchmarks/nnunet.py --data data --out study --datasets hippocampus --rows "float" "SS-QAT W4A6"
  python benchmarks/nnunet.py --data data --out study --checks      also nnU-Net's other commands on the finished rows
  python benchmarks/nnunet.py --out study --page docs/results       the page, from what is there
  python benchmarks/nnunet.py --data data --out full --preset full --device cuda

data/hippocampus holds images/ and labels/ of MSD Task04, data/em what 'unetq data em' reads.
"""

FLOAT, CONTROL = "float", "float, trained on"
WIDTHS = ("W8A8", "W4A6", "W4A4")
MIXED = "M4A6"
"""SS-QAT's own default: weights of 2 to 8 bits, 4 on average."""

TRAINERS = {"SS-QAT": "nnUNetTrainerSSQAT", "QAT": "nnUNetTrainerQAT"}
FLOAT_TRAINER, CONTROL_TRAINER = "nnUNetTrainerStudyFloat", "nnUNetTrainerStudyOn"
PLANS = "StudyPlans"
LEARNING_RATE = 1e-3
TARGET = "SS-QAT W4A6", -0.5
"""The row, and the change of Dice that it is to reach."""

MARKS = "<!-- made by benchmarks/nnunet.py -->", "<!-- end -->"
PREDICT_WORKERS = ("-npp", "1", "-nps", "1")


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        name: in tables and on the command line.
        trainer: nnU-Net's name of it.
        plans: identifier of its plans.
        widths: ``W4A6``; empty in float.
    """

    name: str
    trainer: str
    plans: str
    widths: str = ""


ROWS = (
    Row(FLOAT, FLOAT_TRAINER, PLANS),
    Row(CONTROL, CONTROL_TRAINER, PLANS),
    *(
        Row(f"{name} {widths}", trainer, PLANS + widths, widths)
        for widths in WIDTHS
        for name, trainer in TRAINERS.items()
    ),
    Row(f"SS-QAT {MIXED}", TRAINERS["SS-QAT"], PLANS + MIXED, MIXED),
)


@dataclass(frozen=True)
class Setting:
    """How a data set is trained; None is what nnU-Net planned.

    Attributes:
        dataset: nnU-Net's name of it.
        configuration: nnU-Net's.
        patch_size, batch_size: of a step.
        features: of each resolution.
        adam: whether the float training has Adam in place of nnU-Net's SGD, whose momentum of 0.99 needs longer.
        float_epochs: of the float training, each of ``iterations`` steps.
        epochs: of each further training.
        iterations, val_iterations: of each epoch.
    """

    dataset: str
    configuration: str
    patch_size: tuple[int, ...] | None
    batch_size: int | None
    features: tuple[int, ...] | None
    adam: bool
    float_epochs: int
    epochs: int
    iterations: int
    val_iterations: int


KINDS = ("hippocampus", "em")
PRESETS: Mapping[str, Mapping[str, Setting]] = {
    "cpu": {
        "hippocampus": Setting(
            "Dataset004_Hippocampus", "3d_fullres", (40, 56, 40), 2, (8, 16, 32, 64), True, 25, 8, 20, 2
        ),
        "em": Setting(
            "Dataset501_EM", "2d", (256, 256), 2, (8, 16, 32, 64, 128, 128, 128, 128), True, 20, 6, 20, 2
        ),
    },
    "full": {
        "hippocampus": Setting(
            "Dataset004_Hippocampus", "3d_fullres", None, None, None, False, 1000, 100, 250, 50
        ),
        "em": Setting("Dataset501_EM", "2d", None, None, None, False, 1000, 100, 250, 50),
    },
}


# -- nnU-Net's commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """One data set's folders and settings.

    Attributes:
        kind: of data.
        base: folder of nnU-Net's raw, preprocessed and results folders, of logs and of each row's result.
        setting: how it is trained.
        device: nnU-Net's ``-device``.
        threads: of torch; None for nnU-Net's own choice, on a CPU all.
    """

    kind: str
    base: Path
    setting: Setting
    device: str = "cpu"
    threads: int | None = None

    @property
    def preprocessed(self) -> Path:
        return self.base / "preprocessed" / self.setting.dataset

    def folder(self, row: Row) -> Path:
        """nnU-Net's folder of a row, of all its folds."""
        name = f"{row.trainer}__{row.plans}__{self.setting.configuration}"
        return self.base / "results" / self.setting.dataset / name

    def environment(self) -> dict[str, str]:
        """nnU-Net's variables: folders, and as few processes as it can do with on a CPU."""
        from monai_unetq.nnunet import external_folder

        trainers = (Path(__file__).parent / "nnunet_trainers", external_folder())
        found = {
            "nnUNet_raw": str(self.base / "raw"),
            "nnUNet_preprocessed": str(self.base / "preprocessed"),
            "nnUNet_results": str(self.base / "results"),
            "nnUNet_extTrainer": os.pathsep.join(map(str, trainers)),
        }
        if self.device == "cpu":
            found |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0"}
        if self.threads is not None:
            found |= {"UNETQ_STUDY_THREADS": str(self.threads), "OMP_NUM_THREADS": str(self.threads)}
        return found

    def command(self, *words: str, log: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment; its output is in ``stdout`` and in a log.

        Raises:
            FileNotFoundError: if there is no such command.
        """
        done = subprocess.run(
            [str(Path(sys.executable).parent / words[0]), *words[1:]],
            env={**os.environ, **self.environment(), **changes},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        folder = self.base / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{log}.txt").write_text(done.stdout, encoding="utf-8")
        return done

    def run(self, *words: str, log: str, **changes: str) -> str:
        """Run a command that has to succeed; its output.

        Raises:
            RuntimeError: if it fails, with the end of its output.
        """
        done = self.command(*words, log=log, **changes)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: status {done.returncode}\n{done.stdout[-3000:]}")
        return done.stdout


def slug(name: str) -> str:
    """A file's name for a row's."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


# -- data and plans --------------------------------------------------------------------------------------------------------


def held_out(fold: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """One fold for nnU-Net from one of ``unetq data``'s: validated are its validation and test blocks, and a slice that touches
    them is left out. Nothing is chosen on either, so both may be reported on.
    """
    validated = {*fold["val"], *fold["test"]}
    order = sorted({*fold["train"], *validated})
    touching = {
        name
        for at, name in enumerate(order)
        if validated & {*order[max(at - 1, 0) : at], *order[at + 1 : at + 2]}
    }
    return {
        "train": [name for name in fold["train"] if name not in touching],
        "val": sorted(validated),
    }


def write_raw(study: Study, data: Path) -> None:
    """Make nnU-Net's raw folder of a data set, whole or not at all.

    Args:
        study: where to.
        data: the folder with ``hippocampus`` and ``em``.

    Raises:
        FileNotFoundError: if there are no images.
    """
    folder = study.base / "raw" / study.setting.dataset
    if (folder / "dataset.json").is_file():
        return
    source = data / study.kind
    if study.kind == "em":
        study.run("unetq", "data", "em", "--source", str(source), "--out", str(folder.parent), log="data")
        return
    images = sorted((source / "images").glob("*.nii.gz"))
    if not images:
        raise FileNotFoundError(
            f"{source / 'images'}: no .nii.gz files, expected images/ and labels/ of MSD Task04"
        )
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for image in images:
        case = image.name.removesuffix(".nii.gz")
        shutil.copy(image, folder / "imagesTr" / f"{case}_0000.nii.gz")
        shutil.copy(source / "labels" / image.name, folder / "labelsTr")
    document = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(images),
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", document)


def study_plans(plans: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """nnU-Net's plans, under the study's name, with its patch, batch, features and lengths of training.

    Args:
        plans: nnU-Net's; they are left as they are.
        setting: of the data set.

    Raises:
        ValueError: if there is another number of resolutions.
    """
    found: dict[str, Any] = json.loads(json.dumps(plans))
    found["plans_name"] = PLANS
    configuration = found["configurations"][setting.configuration]
    if setting.patch_size is not None:
        configuration["patch_size"] = list(setting.patch_size)
    if setting.batch_size is not None:
        configuration["batch_size"] = setting.batch_size
    options = configuration["architecture"]["arch_kwargs"]
    if setting.features is not None:
        if len(setting.features) != options["n_stages"]:
            raise ValueError(
                f"{setting.dataset}: nnU-Net planned {options['n_stages']} resolutions, features are for "
                f"{len(setting.features)}"
            )
        options["features_per_stage"] = list(setting.features)
    configuration["study"] = {
        "float_epochs": setting.float_epochs, "epochs": setting.epochs, "iterations": setting.iterations,
        "val_iterations": setting.val_iterations, "learning_rate": LEARNING_RATE, "adam": setting.adam,
    }  # fmt: skip
    return found


def plan_words(widths: str, setting: Setting) -> list[str]:
    """``unetq nnunet plan``, with its arguments, for ``W4A6`` or the mixed widths."""
    weights, activations = re.findall(r"\d+", widths)
    width = (
        ["--weights", f"int{weights}"] if widths.startswith("W") else ["--budget", f"weights={weights}bits"]
    )
    return [
        "unetq", "nnunet", "plan", "-d", setting.dataset, "-c", setting.configuration, "-p", PLANS, "-o", PLANS + widths,
        "--base-trainer", FLOAT_TRAINER, *width, "--activations", f"int{activations}", "--epochs", str(setting.epochs),
        "--iterations", str(setting.iterations), "--val-iterations", str(setting.val_iterations),
        "--learning-rate", str(LEARNING_RATE),
    ]  # fmt: skip


def prepare(study: Study, data: Path) -> None:
    """Raw folder, nnU-Net's planning and preprocessing, the study's plans, and the split."""
    setting = study.setting
    write_raw(study, data)
    (study.base / "results").mkdir(parents=True, exist_ok=True)
    planned = study.preprocessed / "nnUNetPlans.json"
    done = study.preprocessed / "preprocessed"
    if not done.is_file():
        number = setting.dataset[7:10].lstrip("0")
        study.run(
            "nnUNetv2_plan_and_preprocess", "-d", number, "-c", setting.configuration, "-np", "1", "-npfp", "1",
            "--no_pbar", log="plan", nnUNet_n_proc_DA="1",
        )  # fmt: skip
        if study.kind == "em":
            folds = json.loads((study.base / "raw" / setting.dataset / "splits_final.json").read_text())
            write_json(study.preprocessed / "splits_final.json", [held_out(folds[0])])
        done.touch()
    plans = study_plans(json.loads(planned.read_text(encoding="utf-8")), setting)
    target = study.preprocessed / f"{PLANS}.json"
    if target.is_file() and json.loads(target.read_text(encoding="utf-8")) != plans:
        raise ValueError(f"{target}: has other settings than this script's; give another --out")
    write_json(target, plans)


# -- rows ------------------------------------------------------------------------------------------------------------------


def train(study: Study, row: Row) -> dict[str, Any]:
    """Train and validate one row, or read what is there; its result."""
    file = study.base / "rows" / f"{slug(row.name)}.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    setting = study.setting
    if row.widths and not (study.preprocessed / f"{row.plans}.json").is_file():
        study.run(*plan_words(row.widths, setting), log=f"plan-{row.widths}")
    fold = study.folder(row) / "fold_0"
    begun = any((fold / f"checkpoint_{which}.pth").is_file() for which in ("latest", "final"))
    begin = time.monotonic()
    study.run(*train_words(study, row), *(["--c"] if begun else []), log=slug(row.name))
    result = {
        "row": row.name, "trainer": row.trainer, "widths": row.widths,
        "steps": (setting.float_epochs if row.name == FLOAT else setting.epochs) * setting.iterations,
        "epoch_seconds": round(epoch_seconds(fold), 1), "command_seconds": round(time.monotonic() - begin, 1),
        **sizes(fold), "dice": dice_of(json.loads((fold / "validation" / "summary.json").read_text()), study.kind),
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    return result


def train_words(study: Study, row: Row) -> list[str]:
    """``nnUNetv2_train`` of fold 0 of a row."""
    setting = study.setting
    return [
        "nnUNetv2_train", setting.dataset, setting.configuration, "0", "-tr", row.trainer, "-p", row.plans, "-device",
        study.device,
    ]  # fmt: skip


def epoch_seconds(fold: Path) -> float:
    """Time of all finished epochs, training and its validation steps, from nnU-Net's logs of a fold."""
    texts = (file.read_text(encoding="utf-8") for file in fold.glob("training_log_*.txt"))
    return sum(float(seconds) for text in texts for seconds in re.findall(r"Epoch time: ([\d.]+) s", text))


def sizes(fold: Path) -> dict[str, int]:
    """Bytes of a row's weights: of the packed file and of the codes in it, or of the float parameters."""
    import torch

    from monai_unetq.deploy import inspect_packed

    packed = fold / "model.unetq"
    if packed.is_file():
        found = inspect_packed(packed)
        return {"bytes": found["file_bytes"], "weight_bytes": found["weight_bytes"]}
    weights = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)[
        "network_weights"
    ]
    # nnU-Net registers each layer under several names; heads that only deep supervision runs are not counted.
    heads = sorted({key.split(".")[2] for key in weights if key.startswith("decoder.seg_layers.")}, key=int)
    unused = tuple(f"decoder.seg_layers.{head}." for head in heads[:-1])
    tensors = {value.data_ptr(): value.nbytes for key, value in weights.items() if not key.startswith(unused)}
    return {"bytes": sum(tensors.values())}


def dice_of(summary: Mapping[str, Any], kind: str) -> dict[str, dict[str, float]]:
    """Dice in percent of each class and case, from the summary that nnU-Net writes beside its validation files.

    A case without a class, in the label and in the prediction, has none for it. Of EM also the background's: the membranes,
    the thin class.
    """
    names = {"hippocampus": {"1": "anterior", "2": "posterior"}, "em": {"1": "cells"}}[kind]
    found: dict[str, dict[str, float]] = {name: {} for name in names.values()}
    if kind == "em":
        found["membranes"] = {}
    for entry in summary["metric_per_case"]:
        case = Path(entry["prediction_file"]).name.split(".")[0]
        for label, name in names.items():
            counts = entry["metrics"][label]
            pairs = [(name, counts["TP"])]
            if kind == "em":
                pairs.append(("membranes", counts["TN"]))
            for which, overlap in pairs:
                both = 2 * overlap + counts["FP"] + counts["FN"]
                if both:
                    found[which][case] = round(200 * overlap / both, 3)
    return found


# -- nnU-Net's other commands ----------------------------------------------------------------------------------------------


def same_files(first: Path, second: Path, ending: str) -> str:
    """``""`` where two folders hold the same segmentations, voxel for voxel; else what differs."""
    import SimpleITK

    names = [{file.name for file in folder.glob(f"*{ending}")} for folder in (first, second)]
    if names[0] != names[1] or not names[0]:
        return f"{len(names[0])} files beside {len(names[1])}"
    different = 0
    for name in sorted(names[0]):
        if not filecmp.cmp(first / name, second / name, shallow=False):
            one, other = (
                SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / name)))
                for folder in (first, second)
            )
            different += not np.array_equal(one, other)
    return f"{different} of {len(names[0])} cases differ" if different else ""


def checks(study: Study, row: Row) -> list[dict[str, Any]]:
    """Run nnU-Net's other commands on a finished row, and say what each did.

    The row's validation folder is as before when this returns.
    """
    setting = study.setting
    folder = study.folder(row)
    validation = folder / "fold_0" / "validation"
    kept = study.base / "validation" / slug(row.name)
    ending = json.loads((folder / "dataset.json").read_text())["file_ending"]
    if not kept.is_dir():
        shutil.copytree(validation, kept)

    def predict() -> str:
        images, out = study.base / "predict" / "in", study.base / "predict" / "out"
        shutil.rmtree(images.parent, ignore_errors=True)
        images.mkdir(parents=True)
        for file in kept.glob(f"*{ending}"):
            name = f"{file.name.removesuffix(ending)}_0000{ending}"
            shutil.copy(study.base / "raw" / setting.dataset / "imagesTr" / name, images)
        study.run(
            "nnUNetv2_predict", "-i", str(images), "-o", str(out), "-d", setting.dataset, "-c", setting.configuration,
            "-f", "0", "-tr", row.trainer, "-p", row.plans, "-device", study.device, *PREDICT_WORKERS, log="predict",
        )  # fmt: skip
        return same_files(kept, out, ending)

    def validate(*more: str) -> str:
        shutil.rmtree(validation)
        study.run(*train_words(study, row), "--val", *more, log="val" + "".join(more))
        return same_files(kept, validation, ending)

    def validate_best() -> str:
        try:
            different = validate("--val_best")
            summary = json.loads((validation / "summary.json").read_text())
            dice = 100 * float(summary["foreground_mean"]["Dice"])
            return f"! foreground Dice {dice:.2f}; {different or 'the same segmentations as of the last checkpoint'}"
        finally:
            shutil.rmtree(validation, ignore_errors=True)
            shutil.copytree(kept, validation)

    def best(*words: str) -> str:
        text = study.run(
            "nnUNetv2_find_best_configuration", setting.dataset, "-c", setting.configuration, "-f", "0", "-np", "1", *words,
            log="best",
        )  # fmt: skip
        found = re.findall(r"^\*Best\*: (.*)$", text, re.MULTILINE)
        return f"! best: {found[0]}"

    other = next(r for r in ROWS if r.name == "SS-QAT W8A8")
    float_row = ROWS[0]

    def probabilities() -> str:
        for each in (other, float_row):
            study.run(*train_words(study, each), "--val", "--npz", log="val-npz")
        return ""

    steps: list[tuple[str, Callable[[], str]]] = [
        ("nnUNetv2_predict of the validation cases gives the training's own validation files", predict),
        ("nnUNetv2_train … --val gives them again", validate),
        ("nnUNetv2_train … --val --npz gives them again", lambda: validate("--npz")),
        (f"--val --npz of {other.name} and of float", probabilities),
        (
            f"nnUNetv2_find_best_configuration -f 0 of {row.name} and {other.name}, with their ensemble",
            lambda: best("-tr", row.trainer, "-p", row.plans, other.plans),
        ),
        (
            f"nnUNetv2_find_best_configuration -f 0 of float and {row.name}: two trainers, two plans",
            lambda: best("-tr", float_row.trainer, row.trainer, "-p", float_row.plans, row.plans),
        ),
        ("nnUNetv2_train … --val --val_best", validate_best),
    ]
    file = study.base / "rows" / "checks.json"
    done: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    for what, step in steps:
        if any(entry["check"] == what for entry in done):
            continue
        begin = time.monotonic()
        try:
            answer = step()
        except RuntimeError as error:
            answer = f"failed: {str(error).strip().splitlines()[-1]}".replace(f"{study.base}{os.sep}", "")
        done.append(
            {
                "check": what,
                "outcome": answer.removeprefix("! ") or "as expected",
                "passed": not answer or answer.startswith("! "),
                "seconds": round(time.monotonic() - begin, 1),
            }
        )
        write_json(file, done)
        print(f"{study.kind}: {what}: {done[-1]['outcome']}", flush=True)
    return done


# -- the document and the page ---------------------------------------------------------------------------------------------


def collected(study: Study) -> dict[str, Any]:
    """Everything of one data set that is there."""
    split = json.loads((study.preprocessed / "splits_final.json").read_text())[0]
    files = [study.base / "rows" / f"{slug(row.name)}.json" for row in ROWS]
    record = study.base / "rows" / "checks.json"
    plans = json.loads((study.preprocessed / f"{PLANS}.json").read_text())
    found = plans["configurations"][study.setting.configuration]
    return {
        **asdict(study.setting), "patch_size": found["patch_size"], "batch_size": found["batch_size"],
        "features": found["architecture"]["arch_kwargs"]["features_per_stage"], "threads": study.threads,
        "device": study.device, "train_cases": len(split["train"]), "validation_cases": len(split["val"]),
        "rows": [json.loads(file.read_text()) for file in files if file.is_file()],
        "checks": json.loads(record.read_text()) if record.is_file() else [],
    }  # fmt: skip


def bootstrap(values: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean over cases and its 95 % percentile bootstrap interval; the same for the same values.

    Args:
        values: one a case, at least one.
        draws: resampled means.
    """
    cases = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(0).integers(0, cases.size, (draws, cases.size))
    low, high = np.percentile(cases[chosen].mean(axis=1), (2.5, 97.5))
    return float(cases.mean()), float(low), float(high)


def changes(row: Mapping[str, Any], reference: Mapping[str, Any], name: str) -> list[float]:
    """Change of a class' Dice to another row's, case by case."""
    return [
        value - reference["dice"][name][case]
        for case, value in row["dice"][name].items()
        if case in reference["dice"][name]
    ]


def mean_changes(row: Mapping[str, Any], reference: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """Change of the mean Dice over classes to another row's, case by case."""
    pairs = [
        [(row["dice"][name][case], reference["dice"][name][case]) for name in names]
        for case in row["dice"][names[0]]
        if all(case in found["dice"][name] for found in (row, reference) for name in names)
    ]
    return [float(np.mean([mine - theirs for mine, theirs in case])) for case in pairs]


def shown(values: Sequence[float], sign: str = "") -> str:
    """``88.21 [87.02, 89.30]``."""
    mean, low, high = bootstrap(values)
    return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def foreground(row: Mapping[str, Any]) -> list[str]:
    """nnU-Net's foreground classes of a row; membranes are EM's background."""
    return [name for name in row["dice"] if name != "membranes"]


def table(document: Mapping[str, Any]) -> list[str]:
    """The lines of one data set's table."""
    rows = {row["row"]: row for row in document["rows"]}
    if FLOAT not in rows:
        return ["The float network is not trained yet."]
    reference = rows[FLOAT]
    names = list(reference["dice"])
    lines = [
        "| row | " + " | ".join(f"{name}, Dice" for name in names) + " | "
        + " | ".join(f"{name}, change to float" for name in names)
        + " | mean, change to the control | packed [KiB] | of float | steps | epochs [s] | command [s] |",
        "|---|" + "---:|" * (2 * len(names) + 6),
    ]  # fmt: skip
    for row in ROWS:
        if row.name not in rows:
            continue
        found = rows[row.name]
        cells = [shown(list(found["dice"][name].values())) for name in names]
        cells += ["" if row.name == FLOAT else shown(changes(found, reference, name), "+") for name in names]
        compared = row.widths and CONTROL in rows
        cells += [shown(mean_changes(found, rows[CONTROL], foreground(found)), "+") if compared else ""]
        whole = found["command_seconds"]
        cells += [
            f"{found['bytes'] / 1024:.0f}", f"1/{reference['bytes'] / found['bytes']:.1f}" if row.widths else "1",
            str(found["steps"]), f"{found['epoch_seconds']:.0f}", "–" if whole is None else f"{whole:.0f}",
        ]  # fmt: skip
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def verdict(document: Mapping[str, Any]) -> str:
    """Whether the target was reached, in a sentence; empty where its row is missing."""
    rows = {row["row"]: row for row in document["rows"]}
    name, limit = TARGET
    if name not in rows or FLOAT not in rows:
        return ""
    lines = []
    for other in (FLOAT, CONTROL):
        if other in rows:
            values = mean_changes(rows[name], rows[other], foreground(rows[name]))
            mean, low, _ = bootstrap(values)
            reached = "not reached" if mean < limit else "reached"
            if mean >= limit > low:
                reached += " by the mean; the interval does not exclude a larger loss"
            lines.append(f"{shown(values, '+')} to {other!r}: {reached}.")
    return f"Target, {name} within {-limit} Dice (mean of nnU-Net's foreground classes): {' '.join(lines)}"


def contest(document: Mapping[str, Any]) -> str:
    """SS-QAT less plain QAT at the same widths, in a sentence; empty where a width has not both."""
    rows = {row["row"]: row for row in document["rows"]}
    lines = []
    for widths in WIDTHS:
        mine, control = (rows.get(f"{name} {widths}") for name in TRAINERS)
        if mine is not None and control is not None:
            lines.append(f"{widths} {shown(mean_changes(mine, control, foreground(mine)), '+')}")
    return f"SS-QAT less QAT (mean of nnU-Net's foreground classes): {', '.join(lines)}." if lines else ""


def conditions(document: Mapping[str, Any]) -> str:
    """How a data set was trained, in a sentence."""
    size, features = (document[key] for key in ("patch_size", "features"))
    optimizer = f"Adam ({LEARNING_RATE:g})" if document["adam"] else "nnU-Net's SGD"
    threads = f"{document['threads']} thread(s)" if document["threads"] else "all threads"
    return (
        f"{document['configuration']}, fold 0: {document['train_cases']} training cases, {document['validation_cases']} validation "
        f"cases. Patch {'×'.join(map(str, size))}, batch {document['batch_size']}, {', '.join(map(str, features))} features; "
        f"{document['float_epochs'] * document['iterations']} float steps with {optimizer}, then {document['epochs'] * document['iterations']} steps "
        f"for every row, in epochs of {document['iterations']}. {document['device']}, {threads}."
    )


def markdown(documents: Mapping[str, Any]) -> str:
    """The page's tables, made from the JSON document alone."""
    lines: list[str] = []
    titles = {"hippocampus": "Hippocampus (3D)", "em": "EM (2D)"}
    for kind in KINDS:
        if kind not in documents["datasets"]:
            continue
        document = documents["datasets"][kind]
        lines += ["", f"## {titles[kind]}", "", *table(document), "", conditions(document)]
        for said in (verdict(document), contest(document)):
            lines += ["", said] if said else []
        if document["checks"]:
            lines += ["", "| nnU-Net's other commands, on SS-QAT W4A6 | outcome | s |", "|---|---|---:|"]
            lines += [f"| {c['check']} | {c['outcome']} | {c['seconds']:.0f} |" for c in document["checks"]]
    return "\n".join([*lines, ""])


def write_page(documents: Mapping[str, Any], folder: Path) -> None:
    """Write the tables of ``nnunet.md`` anew, and the JSON beside it.

    Raises:
        FileNotFoundError: if there is no page.
        ValueError: if a mark is missing; nothing is written then.
    """
    page = folder / "nnunet.md"
    text = between(page.read_text(encoding="utf-8"), *MARKS, markdown(documents))
    write_json(folder / "nnunet.json", documents)
    page.write_text(text, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data sets; without it nothing is trained"
    )
    found.add_argument("--out", type=Path, required=True, metavar="DIR", help="everything is kept there")
    found.add_argument(
        "--datasets",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help="hippocampus, em (default: both)",
    )
    found.add_argument(
        "--rows",
        nargs="+",
        choices=[row.name for row in ROWS],
        metavar="ROW",
        help=f"(default: all) {', '.join(r.name for r in ROWS)}",
    )
    found.add_argument(
        "--checks",
        action="store_true",
        help="run nnU-Net's other commands, too, on the first data set of --datasets",
    )
    found.add_argument(
        "--page", type=Path, metavar="DIR", help="write nnunet.md and nnunet.json there, such as docs/results"
    )
    found.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="full: nnU-Net's own schedule (default: %(default)s)",
    )
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    found.add_argument(
        "--threads", type=int, metavar="N", help="of torch (default: nnU-Net's choice, on a CPU all)"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or write the page from what is there; returns the exit status."""
    from monai_unetq.recipe import versions

    options = parser().parse_args(arguments)
    out: Path = options.out.resolve()
    file = out / "nnunet.json"
    documents: dict[str, Any] = (
        json.loads(file.read_text())
        if file.is_file()
        else {"versions": {**versions(), "nnunetv2": version("nnunetv2")}, "datasets": {}}
    )
    if options.data is not None:
        for kind in options.datasets:
            study = Study(kind, out / kind, PRESETS[options.preset][kind], options.device, options.threads)
            prepare(study, options.data.resolve())
            rows = [
                row for row in ROWS if options.rows is None or row.name in options.rows or row.name == FLOAT
            ]
            for row in rows:
                print(f"{time.strftime('%H:%M:%S')} {kind}: {row.name}", flush=True)
                result = train(study, row)
                print(
                    f"{time.strftime('%H:%M:%S')} {kind}: {row.name}: "
                    + ", ".join(
                        f"{name} {shown(list(values.values()))}" for name, values in result["dice"].items()
                    )
                    + f"; {result['epoch_seconds']:.0f} of {result['command_seconds']:.0f} s in epochs",
                    flush=True,
                )
                documents["datasets"][kind] = collected(study)
                write_json(file, documents)
            if options.checks and kind == options.datasets[0]:
                checks(study, next(row for row in ROWS if row.name == TARGET[0]))
                documents["datasets"][kind] = collected(study)
                write_json(file, documents)
    if options.page is not None:
        write_page(documents, options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
