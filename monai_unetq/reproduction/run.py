"""How a comparison runs: one row after another through the data set's MONAI bundle, each row a folder and a file.

A row begins with the float network of its activation function, which is trained once for all of them. It is trained
on in its formats, predicts the test cases into files, and is measured on those files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import SimpleITK
import torch
from PIL import Image
from tqdm import tqdm

from ..datasets import data_list
from ..files import write_json
from ..recipe import check_device, versions
from .rows import STUDIES, Kind, Row, paper_rows, study_rows

__all__ = [
    "PRESETS",
    "Comparison",
    "Settings",
    "alone",
    "prediction_file",
    "read_mask",
    "read_pixels",
    "score",
]

logger = logging.getLogger(__name__)

EXAMPLE_SIZE = 200
"""Side of the image, in pixels, that activation memory is counted for: the paper's crops."""


@dataclass(frozen=True)
class Settings:
    """How long and on what a bundle's networks are trained; all else is the bundle's own.

    Attributes:
        width: features of the first level.
        float_epochs: of the float network that the rows begin with.
        epochs: of a row after that, times the row's length.
        steps_per_epoch: optimizer steps.
        batch_size: crops a step.
        patch_size: height and width of a crop in pixels.
        val_interval: epochs from one validation to the next, at most those of a row.
        cosine: the learning rate falls along a cosine instead of the bundle's schedule (EM's falls to a tenth after
            every fifth of the epochs, which leaves a short training little to learn with).
    """

    width: int
    float_epochs: int
    epochs: int
    steps_per_epoch: int
    batch_size: int
    patch_size: tuple[int, int]
    val_interval: int = 1
    cosine: bool = True


PRESETS: Mapping[str, Mapping[Kind, Settings]] = {
    "quick": {
        "em": Settings(8, 4, 2, 25, 4, (96, 96)),
        "gm": Settings(8, 4, 2, 25, 4, (96, 96)),
        "nih": Settings(8, 4, 2, 25, 4, (96, 96), 2),
    },
    "cpu": {
        "em": Settings(16, 24, 5, 25, 4, (160, 160)),
        "gm": Settings(16, 24, 5, 25, 6, (112, 112)),
        "nih": Settings(16, 48, 5, 25, 4, (160, 160), 6),
    },
    "paper": {
        "em": Settings(64, 200, 40, 50, 5, (200, 200), cosine=False),
        "gm": Settings(64, 200, 40, 50, 16, (200, 200), 5),
        "nih": Settings(64, 200, 40, 50, 16, (200, 200), 5),
    },
}


@dataclass(frozen=True)
class Comparison:
    """One data set's comparison in one folder; every method may be called again and does only what is missing.

    Attributes:
        kind: the data set.
        dataset: folder with ``dataset.json``.
        bundle: the data set's bundle, a folder with ``configs``.
        folder: where everything is written.
        preset: name of the settings.
        settings: see ``Settings``.
        folds: of the data set's splits; each row is trained in all of them.
        seed: of weights, crops and augmentation.
        device: ``"cpu"``, ``"cuda"``, ….
    """

    kind: Kind
    dataset: Path
    bundle: Path
    folder: Path
    preset: str
    settings: Settings
    folds: tuple[int, ...] = (0,)
    seed: int = 0
    device: str = "cpu"

    def run(self, rows: Sequence[Row], after: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
        """Train and measure the rows that have no results yet, and show how far it is.

        A row that fails is recorded with its error, and tried again by the next call.

        Args:
            rows: which ones.
            after: called after each row.

        Returns:
            the results of the rows, in their order.

        Raises:
            FileNotFoundError: if a case of the data set is missing.
            ValueError: if there is no such fold or device; nothing is run then.
        """
        for fold in self.folds:
            for part in ("train", "validation", "test"):
                data_list(self.dataset, fold, part)
        check_device(self.device)
        todo = [row for row in rows if not self._finished(row)]
        with tqdm(total=len(todo), desc=f"{self.kind}: rows", unit="row", dynamic_ncols=True) as bar:
            for row in todo:
                bar.set_postfix_str(f"{row.name}, {row.activation}")
                found = self.run_row(row)
                bar.update()
                after()
                bar.write(f"{self.kind}: {row.name}, {row.activation}: {_outcome(found)}; {_left(bar)}")
        return self._results(rows)

    def run_row(self, row: Row) -> dict[str, Any]:
        """Train and measure one row in all folds, or find it done; another process at the same is waited for."""
        for fold in self.folds:
            folder = self.row_folder(row, fold)
            with alone(folder):
                found = self._fold_result(row, fold)
                if found is None or found["status"] != "done":
                    self._run_fold(row, fold, folder)
        result = self.result(row)
        assert result is not None  # each fold wrote one
        return result

    def result(self, row: Row) -> dict[str, Any] | None:
        """The results of a row over the folds, also of one that failed; None where a fold was not run like this."""
        found = [result for fold in self.folds if (result := self._fold_result(row, fold)) is not None]
        if len(found) < len(self.folds):
            return None
        failed = next((result for result in found if result["status"] == "failed"), None)
        return failed or _merged(found)

    def document(self) -> dict[str, Any]:
        """All results that there are, of whichever process or part, as one JSON document."""
        cases = [case for fold in self.folds for case in data_list(self.dataset, fold, "test")]
        return {
            "kind": self.kind,
            "preset": self.preset,
            "settings": asdict(self.settings),
            "folds": list(self.folds),
            "seed": self.seed,
            "versions": versions(),
            "constant_dice": score(self.kind, cases, None)["dice"],
            "rows": self._results(paper_rows(self.kind)),
            "studies": {study: found for study in STUDIES if (found := self._results(study_rows(study)))},
        }

    def row_folder(self, row: Row, fold: int) -> Path:
        """The folder of a row in one fold; its predicted test cases lie in ``predictions`` there."""
        return self.folder / "rows" / row.slug / self._run_name(fold)

    def _run_name(self, fold: int) -> str:
        return f"fold{fold}-seed{self.seed}"

    def _results(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [found for row in rows if (found := self.result(row)) is not None]

    def _finished(self, row: Row) -> bool:
        found = self.result(row)
        return found is not None and found["status"] == "done"

    def _fold_result(self, row: Row, fold: int) -> dict[str, Any] | None:
        file = self.row_folder(row, fold) / "row.json"
        if not file.exists():
            return None
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return document if document.pop("request", None) == self._request(row, fold) else None

    def _request(self, row: Row, fold: int) -> dict[str, Any]:
        """What a result depends on: results of another request are made again."""
        base = self._base_request(row.activation, fold)
        request = {**asdict(row), **base, "settings": asdict(self.settings)}
        return json.loads(json.dumps(request))

    def _base_request(self, activation: str, fold: int) -> dict[str, Any]:
        settings = asdict(self.settings)
        del settings["epochs"]  # of the rows
        return {
            "activation": activation,
            "settings": json.loads(json.dumps(settings)),
            "dataset": self._digest(
                "prepared.json", "dataset.json", "splits_final.json", folder=self.dataset
            ),
            "configurations": self._digest("train.yaml", "fixed_point.yaml", folder=self.bundle / "configs"),
            "fold": fold,
            "seed": self.seed,
        }

    @staticmethod
    def _digest(*names: str, folder: Path) -> str:
        """Of files' contents: what was made from other data or configurations is made again."""
        files = [folder / name for name in names]
        contents = [file.read_bytes() for file in files if file.exists()]
        return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]

    def _run_fold(self, row: Row, fold: int, folder: Path) -> None:
        result: dict[str, Any] = {
            "name": row.name,
            "activation": row.activation,
            "study": row.study,
            "learning_rate": row.learning_rate,
            "device": self.device,
            "versions": versions(),
        }
        with _logged(folder / "training.log"):
            try:
                result |= {"status": "done", "error": None, **self._train_and_measure(row, fold, folder)}
            except Exception as error:  # whatever happens to one row, the others go on
                logger.error("%s", traceback.format_exc())
                cause = _cause(error)
                result |= {"status": "failed", "error": f"{type(cause).__name__}: {cause}"}
                (folder / "checkpoint.pt").unlink(missing_ok=True)  # the next try begins anew
        write_json(folder / "row.json", {**result, "request": self._request(row, fold)})

    def _train_and_measure(self, row: Row, fold: int, folder: Path) -> dict[str, Any]:
        base = self._float_network(row.activation, fold)
        begin = time.monotonic()
        self._open(folder, self._request(row, fold))
        self._bundle_run(
            ("train", "fixed_point"),
            output_dir=str(folder),
            epochs=self.settings.epochs * row.length,
            float_model=str(base / "model.pt"),
            dropout=row.dropout,
            learning_rate=row.learning_rate,
            **self._training(row.activation, fold, folder),
            # Also at the end of a row, whatever its length.
            val_interval=min(self.settings.val_interval, self.settings.epochs),
            **row.formats,
        )
        packed = folder / "model.unetq"
        model = packed if packed.exists() else folder / "model.pt"
        predictions = folder / "predictions"
        self._bundle_run(
            ("inference",),
            output_dir=str(predictions),
            model=str(model),
            **self._common(row.activation, fold),
        )
        found = score(self.kind, data_list(self.dataset, fold, "test"), predictions)
        best = torch.load(folder / "checkpoint.pt", weights_only=True)["best"]
        found["validation"] = 100 * best["score"]
        epochs = self.settings.float_epochs + self.settings.epochs * row.length
        found["steps"] = self.settings.steps_per_epoch * epochs
        found |= _sizes(row, self.settings.width, model)
        found["training_seconds"] = round(time.monotonic() - begin, 1)
        (folder / "checkpoint.pt").unlink()  # only needed to resume
        return found

    def _float_network(self, activation: str, fold: int) -> Path:
        """The folder of the float network of an activation function, trained by the first row that needs it."""
        folder = self.folder / f"float-{activation}" / self._run_name(fold)
        with alone(folder):
            done = folder / "done.json"
            request = self._base_request(activation, fold)
            if done.exists() and json.loads(done.read_text(encoding="utf-8")) == request:
                return folder
            self._open(folder, request)
            self._bundle_run(
                ("train",),
                output_dir=str(folder),
                epochs=self.settings.float_epochs,
                val_interval=self.settings.val_interval,
                **self._training(activation, fold, folder),
            )
            write_json(done, request)
            (folder / "checkpoint.pt").unlink()
        return folder

    def _open(self, folder: Path, request: Mapping[str, Any]) -> None:
        """Keep what an interrupted training with the same request left in its folder, and nothing else."""
        file = folder / "request.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) == request:
            return
        for entry in folder.iterdir():
            if entry.name not in (LOCK, "training.log"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_json(file, request)

    def _common(self, activation: str, fold: int) -> dict[str, Any]:
        return {
            "bundle_root": str(self.bundle),
            "dataset_dir": str(self.dataset),
            "fold": fold,
            "device": self.device,
            "width": self.settings.width,
            "activation": activation,
        }

    def _training(self, activation: str, fold: int, folder: Path) -> dict[str, Any]:
        return {
            **self._common(activation, fold),
            "seed": self.seed,
            "steps_per_epoch": self.settings.steps_per_epoch,
            "batch_size": self.settings.batch_size,
            "patch_size": list(self.settings.patch_size),
            "resume": (folder / "checkpoint.pt").exists(),
            **({"lr_factor": "$monai_unetq.training.cosine(@epochs)"} if self.settings.cosine else {}),
        }

    def _bundle_run(self, configs: Sequence[str], **overrides: Any) -> None:
        from monai.bundle import run

        files = [str(self.bundle / "configs" / f"{name}.yaml") for name in configs]
        # Without the bundle's logging.conf, which writes to the terminal.
        run(config_file=files, logging_file=False, **overrides)  # type: ignore[arg-type]


def _merged(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of one row over its folds: units together, sizes of the first, means and sums of the others."""
    merged = dict(folds[0])
    for key in ("dice", "membrane_dice"):
        if key in merged:
            merged[key] = {unit: value for result in folds for unit, value in result[key].items()}
    merged["validation"] = float(np.mean([result["validation"] for result in folds]))
    merged["training_seconds"] = sum(result["training_seconds"] for result in folds)
    return merged


LOCK = ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder; the lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(
                f"{folder.parent.name}/{folder.name}: another process is at it; waiting", file=sys.stderr
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _logged(file: Path) -> Iterator[None]:
    """Append what is logged and printed to a file instead of the terminal; MONAI's loggers hold standard output."""
    root, terminal = logging.getLogger(), sys.stdout
    level, handlers = root.level, list(root.handlers)
    with open(file, "a", encoding="utf-8") as log, redirect_stdout(log):
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
        root.handlers = [handler]
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        _redirect(terminal, log)
        try:
            yield
        finally:
            root.handlers = handlers
            root.setLevel(level)
            logging.captureWarnings(False)
            _redirect(log, terminal)


def _redirect(source: TextIO, target: TextIO) -> None:
    """Let every logger's handler that writes to ``source`` write to ``target``."""
    for name in list(logging.root.manager.loggerDict):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is source:
                handler.setStream(target)


def _cause(error: BaseException) -> BaseException:
    """What an error comes from: MONAI wraps those of a configuration's components."""
    return error if error.__cause__ is None else _cause(error.__cause__)


def _sizes(row: Row, width: int, model: Path) -> dict[str, int]:
    """Bytes of all parameters and of the activations of one 200 × 200 image."""
    from ..allocation import cost_of
    from ..networks import FixedPointUNet, QuantizedNetwork

    network = QuantizedNetwork(
        FixedPointUNet(1, 1, width=width, activation=row.activation),  # type: ignore[arg-type]
        state=model,
    )
    cost = cost_of(network, torch.zeros(1, 1, EXAMPLE_SIZE, EXAMPLE_SIZE))
    return {"weight_bytes": cost.weight_bytes, "activation_bytes": cost.activation_bytes}


def score(kind: Kind, cases: Sequence[Mapping[str, str]], predictions: Path | None) -> dict[str, Any]:
    """Dice in percent of each unit (EM: slice; GM: person; NIH: patient), its cases' pixels pooled.

    Args:
        kind: the data set.
        cases: of ``data_list``.
        predictions: folder of ``…_seg`` files as the bundles write them; None for the constant answer
            "all foreground".

    Returns:
        ``{"dice": {unit: percent}}``; for EM also ``"membrane_dice"``, of the background, the thin class.

    Raises:
        FileNotFoundError: if a prediction is missing.
        ValueError: if a prediction has another size than its label.
    """
    counts: dict[str, np.ndarray] = {}
    for case in cases:
        unit = case["case"] if kind == "em" else case["group"]
        label = read_mask(Path(case["label"]))
        predicted = (
            np.ones_like(label) if predictions is None else read_mask(prediction_file(predictions, case))
        )
        if predicted.shape != label.shape:
            raise ValueError(
                f"{case['case']}: prediction {predicted.shape}, label {label.shape}: expected the same"
            )
        overlap = [(predicted & label).sum(), (~predicted & ~label).sum()]
        sizes = [predicted.sum() + label.sum(), (~predicted).sum() + (~label).sum()]
        counts[unit] = counts.get(unit, np.zeros((2, 2))) + np.array([overlap, sizes], dtype=float)
    found: dict[str, Any] = {"dice": {u: _dice(c[0, 0], c[1, 0]) for u, c in counts.items()}}
    if kind == "em":
        found["membrane_dice"] = {u: _dice(c[0, 1], c[1, 1]) for u, c in counts.items()}
    return found


def prediction_file(predictions: Path, case: Mapping[str, str]) -> Path:
    """The file in which ``inference.yaml`` wrote a case's segmentation."""
    name = Path(case["image"]).name
    ending = ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix
    return predictions / f"{name.removesuffix(ending)}_seg{ending}"


def read_mask(path: Path) -> np.ndarray:
    """A label or prediction as bool; see ``read_pixels``."""
    return read_pixels(path) > 0


def read_pixels(path: Path) -> np.ndarray:
    """The values of an image in the order that its reader gives: (H, W) of a PNG, (slices, H, W) of a NIfTI file.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image)
    return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))


def _dice(overlap: float, sizes: float) -> float:
    return 200 * overlap / sizes if sizes else 100.0


def _outcome(found: Mapping[str, Any]) -> str:
    if found["status"] == "failed":
        return f"failed: {found['error'].splitlines()[0]}"
    return f"Dice {np.mean(list(found['dice'].values())):.2f}"


def _left(bar: tqdm[Any]) -> str:
    remaining = (bar.total or 0) - bar.n
    if not remaining:
        return "all rows done"
    seconds = bar.format_dict["elapsed"] / max(bar.n, 1) * remaining
    return f"{remaining} rows, about {tqdm.format_interval(seconds)} left"
