"""What ``unetq sensitivity`` accepts and prints, and how it reads a trained bundle: network, loss and training data."""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inspect import aligned

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..sensitivity import Sensitivities

__all__ = ["TrainedBundle", "add_sensitivity_command", "dice_percent", "read_bundle", "training_batches"]

METRICS = ("hessian", "fisher", "sqnr", "drop")

_EXAMPLES = """\
examples:
  unetq sensitivity em_unet --data Dataset501_EM --out sensitivity.json
  unetq sensitivity em_unet --data Dataset501_EM --out sensitivity.json --set width=16 --figure traces.png
  unetq sensitivity em_unet --data Dataset501_EM --out drop.json --metric drop --widths 2,4
  torchrun --nproc_per_node 2 -m monai_unetq.cli sensitivity em_unet --data Dataset501_EM --out sensitivity.json

MODEL holds configs/train.yaml (or .json) with network_def, loss and train#dataset, and the trained models/model.pt.
Reading a bundle runs what its configuration says, as MONAI does. Only training cases of the fold are used.
An interrupted run goes on where it was when the same command is given again.
"""


def add_sensitivity_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``sensitivity`` to the commands of ``unetq``.

    Args:
        commands: argparse's object for subcommands.
        command: makes the parser of one, from commands, name, summary and examples.
    """
    parser = command(
        commands,
        "sensitivity",
        "measure how much each weight and input of a trained network minds being rounded",
        _EXAMPLES,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a trained MONAI bundle's folder")
    parser.add_argument("--data", type=Path, metavar="DIR", required=True, help="the prepared data set")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the JSON file to write")
    parser.add_argument(
        "--metric", choices=METRICS, default="hessian", help="what is measured (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        default=0.05,
        help="standard errors to reach, as a share of the largest trace (default: %(default)s)",
    )
    parser.add_argument(
        "--probes", type=int, metavar="N", default=400, help="most probes (default: %(default)s)"
    )
    parser.add_argument(
        "--widths",
        type=_widths,
        metavar="N,N…",
        default=(2, 3, 4, 6, 8),
        help="candidate bit widths (default: 2,3,4,6,8)",
    )
    parser.add_argument(
        "--images", type=_positive, metavar="N", default=8, help="training images (default: %(default)s)"
    )
    parser.add_argument(
        "--images-per-pass",
        type=_positive,
        metavar="N",
        help="smaller passes, less memory (default: a batch)",
    )
    parser.add_argument(
        "--without", nargs="+", metavar="PATTERN", default=[], help="layers that stay float, left out"
    )
    parser.add_argument("--no-split", action="store_true", help="convolutions over skip and up are not split")
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of images, crops and probes (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: %(default)s)"
    )
    parser.add_argument(
        "--fold", type=int, metavar="N", default=0, help="of the data set's splits (default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        type=_override,
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        dest="overrides",
        help="keys of the configuration that the training overrode, such as width=16",
    )
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="a PNG or SVG file: trace and MACs of each layer"
    )
    parser.set_defaults(run=_sensitivity, after_interrupt="; the same command goes on")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _widths(text: str) -> tuple[int, ...]:
    if not all(number.isdecimal() for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected bit widths such as 2,4,8, found {text!r}")
    return tuple(int(number) for number in text.split(","))


def _override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE such as width=16, found {text!r}")
    return key, value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@dataclass(frozen=True)
class TrainedBundle:
    """What sensitivities need of a MONAI bundle.

    Attributes:
        network: float, with its trained weights.
        loss: of the network's output and the label.
        dataset: items with ``image`` and ``label``, with the transforms of training.
        batch_size: images of a training step.
    """

    network: nn.Module
    loss: Callable[[Any, Any], Tensor]
    dataset: Any
    batch_size: int


def read_bundle(
    folder: Path, data: Path, fold: int = 0, device: str = "cpu", overrides: Sequence[tuple[str, str]] = ()
) -> TrainedBundle:
    """Read a trained bundle: ``network_def``, ``loss`` and ``train#dataset``, and ``models/model.pt``.

    Args:
        folder: of the bundle.
        data: the prepared data set, as ``unetq data`` makes it.
        fold: of its splits.
        device: where the network is put.
        overrides: keys and values of the configuration; values as Python writes them, anything else is text.

    Raises:
        FileNotFoundError: if the configuration, the weights or the data are missing.
        ValueError: if the configuration cannot be built, the weights do not fit, or the data set holds other cases
            than those of the fold's training part; the message names the key or the file.
    """
    names = ("train.yaml", "train.yml", "train.json")
    configuration = next((f for name in names if (f := folder / "configs" / name).is_file()), None)
    if configuration is None:
        raise FileNotFoundError(
            f"{folder / 'configs' / 'train.yaml'}: no such file, expected a MONAI bundle's folder"
        )
    weights = folder / "models" / "model.pt"
    if not weights.is_file():
        raise FileNotFoundError(
            f"{weights}: no such file: train the bundle first, or copy the trained model.pt to it"
        )
    from monai.bundle import ConfigParser

    from ..datasets import data_list
    from ..networks import QuantizedNetwork
    from ..surgery import dequantize

    cases = {case["image"] for case in data_list(data, fold, "train")}
    try:
        parser = ConfigParser(ConfigParser.load_config_file(str(configuration)))
    except Exception as error:  # whatever the reader of YAML or JSON raises
        raise ValueError(f"{configuration}: no configuration of a bundle: {error}") from None
    given: dict[str, Any] = {
        "bundle_root": str(folder),
        "dataset_dir": str(data),
        "fold": fold,
        "device": device,
    }
    for key, value in overrides:
        if key not in parser:
            raise ValueError(f"{configuration}: there is no key {key!r} to set")
        given[key] = _literal(value)
    for key, value in given.items():
        parser[key] = value
    if "cache_rate" in parser:
        parser["cache_rate"] = 0.0  # a few of the images are looked at once

    def content(key: str) -> Any:
        if key not in parser:
            raise ValueError(f"{configuration}: there is no {key!r}, expected the bundle's own under it")
        try:
            return parser.get_parsed_content(key)
        except Exception as error:  # the configuration's own code
            raise ValueError(
                f"{configuration}: {key!r} cannot be built: {error}; modules of the bundle's own are found with "
                f"PYTHONPATH={folder}"
            ) from error

    try:
        network = dequantize(QuantizedNetwork(content("network_def"), state=weights)).to(device)
    except ValueError as error:
        raise ValueError(
            f"{error}; values that the training overrode are given with --set, as width=16"
        ) from None
    dataset = content("train#dataset")
    strange = [case["image"] for case in dataset.data if case["image"] not in cases]
    if strange:
        raise ValueError(
            f"{configuration}: 'train#dataset' holds {strange[0]}, which is no training case of fold {fold}; "
            "sensitivities may not see validation or test cases"
        )
    size = content("batch_size") if "batch_size" in parser else 1
    return TrainedBundle(network, content("loss"), dataset, size)


def training_batches(bundle: TrainedBundle, images: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Draw training images with their augmentation, in batches of about the training's size.

    Args:
        bundle: see ``read_bundle``.
        images: how many; cases come again, augmented anew, only after all of them were drawn.
        seed: of the choice and the augmentation.

    Returns:
        pairs of image (N, C, spatial…) and label, the same ones for the same seed.
    """
    import torch
    from monai.data import list_data_collate
    from monai.utils import set_determinism

    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    while len(chosen) < images:
        chosen += torch.randperm(len(bundle.dataset), generator=generator).tolist()
    set_determinism(seed)
    try:
        transform: Any = getattr(bundle.dataset, "transform", None)
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(seed)
        items = [bundle.dataset[index] for index in chosen[:images]]
    finally:
        set_determinism(None)
    count = -(-images // bundle.batch_size)
    ends = [images * number // count for number in range(count + 1)]
    collated = [list_data_collate(items[a:b]) for a, b in pairwise(ends)]
    return [(batch["image"].as_tensor(), batch["label"].as_tensor()) for batch in collated]


def dice_percent(output: Any, label: Tensor) -> float:
    """Dice in percent, the mean over the classes, background among them, the batch's pixels pooled.

    Args:
        output: logits (N, 1, …), or (N, classes, …); of deep supervision the first of the list.
        label: classes (N, 1, …).
    """
    import torch

    logits = output[0] if isinstance(output, (list, tuple)) else output
    single = logits.shape[1] == 1
    found = (logits > 0).long() if single else logits.argmax(1, keepdim=True)
    classes = 2 if single else logits.shape[1]
    scores = []
    for number in range(classes):
        here, there = found == number, label.round() == number
        total = int(here.sum() + there.sum())
        scores.append(2 * int((here & there).sum()) / total if total else 1.0)
    return 100 * float(torch.tensor(scores).mean())


def _sensitivity(options: argparse.Namespace) -> None:
    if not options.model.is_dir():
        raise FileNotFoundError(f"{options.model}: no such folder, expected a trained MONAI bundle")
    if not options.out.parent.is_dir():
        raise FileNotFoundError(f"{options.out.parent}: no such folder to write {options.out.name} in")
    from ..recipe import check_device

    check_device(options.device)
    with _processes(options.device) as (rank, device):
        bundle = read_bundle(options.model, options.data, options.fold, device, options.overrides)
        batches = training_batches(bundle, options.images, options.seed)
        state = options.out.with_name(options.out.name + ".state")
        found = _measured(options, bundle, batches, state)
        if rank:
            return
        found.save(options.out)
        state.unlink(missing_ok=True)
        print(_table(found))
        print(f"\nsensitivities: {options.out}")
        if options.figure:
            from ..report.sensitivity import sensitivity_figure

            print(f"figure: {sensitivity_figure(found, options.figure)}")


@contextmanager
def _processes(device: str) -> Iterator[tuple[int, str]]:
    """Rank and device of this process; with those that ``torchrun`` started beside it, where it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, device
        return
    import torch
    from torch import distributed

    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield distributed.get_rank(), device
    finally:
        distributed.destroy_process_group()


def _measured(
    options: argparse.Namespace, bundle: TrainedBundle, batches: Sequence[Any], state: Path
) -> Sensitivities:
    from ..sensitivity import fisher, hessian_traces, score_drop, sqnr
    from ..surgery import split

    network = bundle.network
    if not options.no_split:
        split(network, batches[0][0][:1].to(next(network.parameters()).device))
    common: dict[str, Any] = {"widths": options.widths, "without": options.without}
    if options.metric == "sqnr":
        return sqnr(network, batches, **common)
    if options.metric == "drop":
        return score_drop(network, dice_percent, batches, **common)
    if options.metric == "fisher":
        return fisher(network, bundle.loss, batches, images_per_pass=options.images_per_pass or 1, **common)
    return hessian_traces(
        network,
        bundle.loss,
        batches,
        tolerance=options.tolerance,
        probes=options.probes,
        images_per_pass=options.images_per_pass,
        seed=options.seed,
        state=state,
        **common,
    )


def _table(found: Sensitivities) -> str:
    widths = sorted({bits for entry in found.values() for bits in entry.omega})
    header = ("tensor", "values", "trace", "± error", *(f"Ω at {bits}" for bits in widths))
    rows = [
        (
            name,
            f"{entry.count:,}",
            f"{entry.trace:.3g}",
            f"{entry.error:.1g}",
            *(f"{entry.omega[bits]:.3g}" for bits in widths),
        )
        for name, entry in found.items()
    ]
    lines = [aligned(header, rows)]
    if found.metric == "hessian":
        reached = "reached" if found.conditions["settled"] else "not reached: more --probes"
        lines.append(
            f"\n{found.conditions['probes']} probes; tolerance {found.conditions['tolerance']:g} {reached}"
        )
    return "\n".join(lines)
