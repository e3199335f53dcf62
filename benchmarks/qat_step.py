"""Time of one QAT step over one float step, for this package, Brevitas and NVIDIA modelopt, in one run.

All of them train the same MONAI BasicUNet on the same batch with the same loss and optimizer; SS-QAT adds its heads' loss.
See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import monai_unetq as uq
from monai_unetq.datasets import membrane_phantom
from monai_unetq.training import (
    SkipSupervisionLoss,
    bce_dice_loss,
    freeze_norms,
    reestimate_norms,
    settle_norms,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.intervals import median_interval

EXAMPLES = """\
examples:
  python benchmarks/qat_step.py                              batch 4 of 192², instance norm, as many threads as cores
  python benchmarks/qat_step.py --norm both --threads 2 --out qat_step.json
  python benchmarks/qat_step.py --rounds 3 --width 8 --batch 2 --size 64      a trial, seconds

The peers are optional: pip install brevitas nvidia-modelopt requests huggingface_hub
"""

FLOAT = "float"
WARMUP_ROUNDS = 2
LEARNING_RATE = 1e-4
CHECK_SIZE = 64
"""Largest side of the image on which the check that everything is rounded runs, px."""

PACKAGES = ("monai-unetq", "torch", "monai", "brevitas", "nvidia-modelopt")


@dataclass(frozen=True)
class Contender:
    """One network that is timed.

    Args:
        name: its row in the table.
        build: makes the QAT network out of a float network (in place or not) and a batch to calibrate on, which
            is the contender's own copy.
        levels: largest number of values that a rounded tensor may take; 0 for a float network.
        install: what pip needs to install for it.
    """

    name: str
    build: Callable[[nn.Module, Tensor], nn.Module]
    levels: int = 256
    install: str = ""


def unetq_network(
    network: nn.Module, images: Tensor, weights: str, activations: str, learned: bool = False
) -> nn.Module:
    """This package: all convolutions, biases on the accumulator's grid, calibrated."""
    plan = uq.QuantPlan.uniform(network, weights, activations, input="UQ0.8", learned=learned)
    uq.quantize(network, plan, images[:1])
    return uq.calibrate(network, [images])


def ssqat_network(network: nn.Module, images: Tensor) -> nn.Module:
    """This package's SS-QAT: split convolutions, learned scales, a supervised head on every skip, batch norms standing still."""
    uq.split(network, images[:1])
    network = unetq_network(network, images, "int8", "int8", learned=True)
    freeze_norms(settle_norms(network, [images]), epoch=1, epochs=1, share=0)
    return uq.attach_supervision(network, images[:1])


def brevitas_network(network: nn.Module, images: Tensor) -> nn.Module:
    """Brevitas' layerwise quantization with weight scales per channel instead of per tensor, calibrated.

    Calibration also ends the first phase of Brevitas' input quantizers (300 steps that take a percentile of
    every tensor), so what is timed is the faster second phase with learned input scales.
    """
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import LAYERWISE_COMPUTE_LAYER_MAP, layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloat

    layer_map = {
        cls: (entry[0], {**entry[1], "weight_quant": Int8WeightPerChannelFloat})
        for cls, entry in LAYERWISE_COMPUTE_LAYER_MAP.items()
        if cls in (nn.Conv2d, nn.ConvTranspose2d) and entry is not None
    }
    network = layerwise_quantize(network, layer_map)
    with torch.no_grad(), calibration_mode(network):
        network(images)
    return network


def modelopt_network(network: nn.Module, images: Tensor, everything: bool = False) -> nn.Module:
    """NVIDIA modelopt's INT8_DEFAULT_CFG, calibrated.

    Args:
        network: float.
        images: batch to calibrate on.
        everything: the configuration as it is, which also rounds what enters pooling and instance norm; else only
            what enters convolutions, as the others do.
    """
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    if not everything:
        for parent in ("nn.InstanceNorm2d", "nn.MaxPool2d"):
            config["quant_cfg"].append({"parent_class": parent, "quantizer_name": "*", "enable": False})

    def forward_loop(model: nn.Module) -> None:
        with torch.no_grad():
            model(images)

    quantized: nn.Module = mtq.quantize(network, config, forward_loop)
    return quantized


_MODELOPT = "nvidia-modelopt requests huggingface_hub"  # it imports the last two without declaring them

CONTENDERS = (
    Contender(FLOAT, lambda network, images: network, levels=0),
    Contender("float again (control)", lambda network, images: network, levels=0),
    Contender("monai-unetq int8/int8", lambda n, x: unetq_network(n, x, "int8", "int8")),
    Contender(
        "monai-unetq int8/int8 learned", lambda n, x: unetq_network(n, x, "int8", "int8", learned=True)
    ),
    Contender("monai-unetq Q6.0/Q0.4", lambda n, x: unetq_network(n, x, "Q0.4", "Q6.0")),
    Contender("monai-unetq int8/int8 SS-QAT", ssqat_network),
    Contender("Brevitas int8/int8", brevitas_network, install="brevitas"),
    Contender("modelopt int8/int8", modelopt_network, install=_MODELOPT),
    Contender(
        "modelopt int8/int8 default", lambda n, x: modelopt_network(n, x, everything=True), install=_MODELOPT
    ),
)
"""The rows, as activations/weights; the first is what the others are divided by."""


class _ConvolutionArguments(TorchDispatchMode):
    """Counts the distinct values in what reaches every convolution, whoever called it.

    ``inputs`` holds one count for each convolution, ``weights`` the largest count of any channel, ``tensors`` the
    weights themselves. A transposed weight may be scaled along its input or its output channels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[int] = []
        self.weights: list[int] = []
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            input, weight, transposed = args[0], args[1], args[6]
            by_axis = [weight, weight.transpose(0, 1)] if transposed else [weight]
            self.inputs.append(_most_levels(input.reshape(1, -1)))
            self.weights.append(min(_most_levels(w.flatten(1)) for w in by_axis))
            self.tensors.append(weight.detach().clone())
        return func(*args, **(kwargs or {}))


def _most_levels(rows: Tensor) -> int:
    """The largest number of distinct values in any row of a matrix."""
    return int((rows.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1).max()) + 1


def check_quantized(network: nn.Module, reference: nn.Module, images: Tensor, levels: int) -> dict[str, Any]:
    """Make sure that a QAT network rounds every convolution's input and weight in training mode.

    Args:
        network: the QAT network; not changed.
        reference: the float network that it was made of; not changed.
        images: (N, 1, H, W).
        levels: how many values a rounded tensor (of a weight: a channel) may take.

    Returns:
        number of convolutions, largest count of values in an input and in a weight's channel, and the relative
        error of the output.

    Raises:
        RuntimeError: if something reaches a convolution unrounded, or the output is the float network's.
    """
    sample = images[:1, :, :CHECK_SIZE, :CHECK_SIZE]
    seen, outputs = [], []
    for net in (reference, network):
        # A copy, because a pass in training mode moves batch norm's statistics; without heads, which stay float.
        with torch.no_grad(), _ConvolutionArguments() as arguments:
            outputs.append(uq.strip(copy.deepcopy(net)).train()(sample))
        seen.append(arguments)
    plain, rounded = seen
    if len(rounded.inputs) != len(plain.inputs):
        raise RuntimeError(
            f"{len(rounded.inputs)} convolutions ran, {len(plain.inputs)} in the float network"
        )
    if max(plain.inputs) <= levels:
        raise RuntimeError(
            f"the check shows nothing: the float network's inputs take at most {max(plain.inputs)} values"
        )
    for index, (inputs, weights) in enumerate(zip(rounded.inputs, rounded.weights, strict=True)):
        where = f"convolution {index} in running order"
        for what, count in (("input", inputs), ("weight, in one channel", weights)):
            if count > levels:
                raise RuntimeError(f"{where}: {what}: {count} distinct values, expected at most {levels}")
        if torch.equal(rounded.tensors[index], plain.tensors[index]):
            raise RuntimeError(f"{where}: the weight is the float network's")
    error = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    if not error > 0:
        raise RuntimeError(f"the output differs from the float network's by {error}")
    return {
        "convolutions": len(rounded.inputs),
        "input_levels": max(rounded.inputs),
        "weight_levels": max(rounded.weights),
        "output_error": error,
    }


def float_network(norm: str, width: int, images: Tensor) -> nn.Module:
    """A 2D BasicUNet, 1 channel in and out, with He's initialization and the batch's statistics.

    MONAI's own initialization would round to 0 in Q0.4.

    Args:
        norm: ``instance`` or ``batch``.
        width: channels of the first level; 32 gives MONAI's default.
        images: a batch for batch norm's statistics.
    """
    torch.manual_seed(0)
    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    network = BasicUNet(
        spatial_dims=2, in_channels=1, out_channels=1, features=features, norm=(norm, {"affine": True})
    )
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight)
    reestimate_norms(network, [images])
    return network.train()


def time_step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Seconds of forward, loss, backward and the optimizer's step."""
    # Of a network without heads it is what is in the brackets.
    loss_function = SkipSupervisionLoss(bce_dice_loss())
    optimizer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = loss_function(network(images), labels)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


def measure(
    contenders: Sequence[Contender],
    norm: str,
    images: Tensor,
    labels: Tensor,
    rounds: int,
    width: int,
    memory_format: torch.memory_format,
) -> dict[str, dict[str, Any]]:
    """Time all contenders round-robin, each beside a float step of its own, so that the machine's load of the moment meets
    both.

    Every round begins with another contender, and in every second one the float step comes last. Ratios are of the pairs.

    Args:
        contenders: the rows; the first is divided by.
        norm: ``instance`` or ``batch``.
        images: (N, 1, H, W).
        labels: (N, 1, H, W).
        rounds: rounds that count, after the warm-up.
        width: see ``float_network``.
        memory_format: of all networks' weights.

    Returns:
        name → ``seconds`` and ``float_seconds`` (one for each round), ``ratio`` (median, quartiles, and the median's 95 %
        interval) and ``check``, or ``skipped`` with the reason.

    Raises:
        RuntimeError: if a contender does not quantize.
    """
    results: dict[str, dict[str, Any]] = {}
    training: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    reference = float_network(norm, width, images).to(memory_format=memory_format)
    for contender in contenders:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # peers print what they do
                network = contender.build(copy.deepcopy(reference), images)
        except ImportError as error:
            if not contender.install:
                raise
            results[contender.name] = {"skipped": f"not installed (pip install {contender.install}): {error}"}
            continue
        network = network.to(memory_format=memory_format).train()
        results[contender.name] = {"seconds": [], "float_seconds": []}
        if contender.levels:
            try:
                check = check_quantized(network, reference, images, contender.levels)
            except RuntimeError as error:
                raise RuntimeError(f"{contender.name} ({norm} norm): {error}") from None
            results[contender.name]["check"] = check
        training[contender.name] = network, torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    names = list(training)
    plain = names[0]
    for index in tqdm(range(-WARMUP_ROUNDS, rounds), desc=f"{norm} norm", unit="round", disable=None):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            pair = (plain, name) if index % 2 else (name, plain)
            seconds = {which: time_step(*training[which], images, labels) for which in dict.fromkeys(pair)}
            if index >= 0:
                results[name]["seconds"].append(seconds[name])
                results[name]["float_seconds"].append(seconds[plain])
    for name in names:
        ratios = np.divide(results[name]["seconds"], results[name]["float_seconds"])
        low, high = np.percentile(ratios, [25, 75])
        median, *interval = median_interval(ratios)
        results[name]["ratio"] = {
            "median": median,
            "low": float(low),
            "high": float(high),
            "interval": interval,
        }
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results of ``measure`` as lines of text."""
    width = max(len(name) for name in results)
    lines = [
        f"{'activations/weights':<{width}}  {'ms/step':>8}  {'ratio':>6}  {'95 %':>13}  {'middle half':>13}  {'output error':>12}"
    ]
    for name, row in results.items():
        if "skipped" in row:
            lines.append(f"{name:<{width}}  {row['skipped']}")
            continue
        ratio = row["ratio"]
        middle = f"{ratio['low']:.3f}-{ratio['high']:.3f}"
        sure = "{:.3f}-{:.3f}".format(*ratio["interval"])
        error = f"{100 * row['check']['output_error']:.1f} %" if "check" in row else ""
        milliseconds = 1000 * float(np.median(row["seconds"]))
        lines.append(
            f"{name:<{width}}  {milliseconds:8.1f}  {ratio['median']:6.3f}  {sure:>13}  {middle:>13}  {error:>12}".rstrip()
        )
    return "\n".join(lines)


def markdown(document: dict[str, Any], source: str) -> str:
    """The results as a page, made from the JSON document alone."""
    conditions, versions = document["conditions"], document["versions"]
    network = conditions["network"]
    lines = [
        "# Time of a QAT step over a float step",
        "",
        f"Made by `benchmarks/qat_step.py` with [{source}]({source}); do not edit by hand. "
        "[benchmarks/README.md](../../benchmarks/README.md) says what each row is and how it is measured.",
        "",
        "```",
        document["command"],
        "```",
        "",
        f"MONAI BasicUNet, 2D, {network['width']} channels in its first level, {network['parameters']:,} parameters; "
        f"batch of shape {conditions['input_shape']}; {conditions['threads']} threads ({conditions['cpu_capability']}); "
        f"{conditions['rounds']} rounds. Median ratio to a float step right before or behind, its 95 % interval (bootstrap), and the "
        "middle half of the ratios. "
        "Output error: root mean square against the float network before any training.",
    ]
    for norm, results in document["results"].items():
        lines += [
            "",
            f"## {norm.capitalize()} norm",
            "",
            "| activations/weights | ms | ratio | 95 % | middle half | output error |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for name, row in results.items():
            if "skipped" in row:
                lines.append(f"| {name} | – | {row['skipped']} | – | – | – |")
                continue
            ratio = row["ratio"]
            error = f"{100 * row['check']['output_error']:.1f} %" if "check" in row else "–"
            lines.append(
                f"| {name} | {1000 * float(np.median(row['seconds'])):.0f} | {ratio['median']:.3f} | "
                f"{ratio['interval'][0]:.3f}–{ratio['interval'][1]:.3f} | {ratio['low']:.3f}–{ratio['high']:.3f} | {error} |"
            )
    found = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return "\n".join([*lines, "", f"Versions: {found}.", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    cases = membrane_phantom(count=options.batch, size=options.size)
    images = torch.from_numpy(np.stack([case.image for case in cases]))
    labels = torch.from_numpy(np.stack([case.label for case in cases])).float()
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    norms = ("instance", "batch") if options.norm == "both" else (options.norm,)
    parameters = sum(p.numel() for p in float_network(norms[0], options.width, images[:1]).parameters())
    print(
        f"MONAI BasicUNet, 2D, {options.width} channels in its first level, {parameters:,} parameters; "
        f"batch {options.batch} of {options.size}²; {options.threads} threads; {options.rounds} rounds"
    )
    document: dict[str, Any] = {
        "title": "Time of a QAT step over a float step",
        "command": shlex.join(
            ["python", "benchmarks/qat_step.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}},
        "conditions": {
            "threads": options.threads,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "input_shape": list(images.shape),
            "channels_last": options.channels_last,
            "network": {"name": "monai BasicUNet", "width": options.width, "parameters": parameters},
            "loss": "0.5 BCE + 0.5 Dice",
            "optimizer": f"Adam, learning rate {LEARNING_RATE}",
            "warmup_rounds": WARMUP_ROUNDS,
            "rounds": options.rounds,
        },
        "results": {},
    }
    try:
        for norm in norms:
            results = measure(CONTENDERS, norm, images, labels, options.rounds, options.width, memory_format)
            document["results"][norm] = results
            print(f"\n{norm} norm\n{table(results)}", flush=True)
    except RuntimeError as error:
        print(f"qat_step: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qat_step: interrupted; nothing written", file=sys.stderr)
        return 130
    if options.out is not None:
        page = options.out.with_suffix(".md")
        _write(options.out, json.dumps(document, indent=1) + "\n")
        _write(page, markdown(document, options.out.name))
        print(f"\nwritten: {options.out}, {page}")
    return 0


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time of one QAT step (forward, loss, backward, Adam) over one float step: "
        "monai-unetq, Brevitas and NVIDIA modelopt on the same network, in turns.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=_at_least(1), default=20, metavar="N", help="measured rounds (20)")
    parser.add_argument("--batch", type=_at_least(1), default=4, metavar="N", help="images in a batch (4)")
    parser.add_argument(
        "--size", type=_size, default=192, metavar="PX", help="height and width, a multiple of 16 (192)"
    )
    parser.add_argument(
        "--width", type=_at_least(2), default=32, metavar="N", help="channels of the first level (32)"
    )
    parser.add_argument("--norm", choices=("instance", "batch", "both"), default="instance", help="normalization (instance)")  # fmt: skip
    parser.add_argument("--threads", type=_at_least(1), default=torch.get_num_threads(), metavar="N", help="threads (%(default)s)")  # fmt: skip
    parser.add_argument("--channels-last", action="store_true", help="memory format NHWC instead of NCHW")
    parser.add_argument(
        "--out",
        type=_file,
        metavar="FILE.json",
        help="write versions, conditions and all times, and a page FILE.md",
    )
    return parser.parse_args(arguments)


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from {least}")
        return int(text)

    return parse


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 32 or int(text) % 16:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a multiple of 16 from 32")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a file in a folder that exists")
    return path


if __name__ == "__main__":
    sys.exit(main())
