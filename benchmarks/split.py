"""Time of split networks over the unsplit one, in float and quantized, training and inference, in one run.

What a split convolution costs: nothing in float, where it is the same convolution; two quantizers instead of one when
quantized. Beside it what it would cost to run it as two convolutions and an addition. See README.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import BasicUNet, DynUNet
from torch import Tensor, nn
from tqdm import tqdm

import monai_unetq as uq
from monai_unetq.layers import SplitLayer

EXAMPLES = """\
examples:
  python benchmarks/split.py                          2D and 3D, as many threads as cores
  python benchmarks/split.py --rounds 30 --out docs/results/split.json
  python benchmarks/split.py --rounds 2 --width 4 --size 32        a trial, seconds
"""

WARMUP_ROUNDS = 2


def two_convolutions(network: nn.Module, example: Tensor) -> nn.Module:
    """Every split convolution run as conv(skip) + conv(up), as one would write it first."""
    uq.split(network, example)
    for module in network.modules():
        if isinstance(module, SplitLayer):
            module.forward = partial(_sum_of_parts, module)  # type: ignore[method-assign]
    return network


def _sum_of_parts(layer: SplitLayer, input: Tensor) -> Tensor:
    sizes = [part.channels for part in layer.parts]
    pieces = zip(input.split(sizes, 1), layer.weight.split(sizes, 1), strict=True)
    first, *others = [
        layer._conv_forward(piece, weight, layer.bias if index == 0 else None)
        for index, (piece, weight) in enumerate(pieces)
    ]
    return sum(others, start=first)


def quantized(network: nn.Module, example: Tensor, split: bool, up: str = "int8") -> nn.Module:
    """int8 everywhere; of a split network the up parts in another format."""
    if split:
        uq.split(network, example)
    halves = {}
    for name, module in network.named_modules():
        if isinstance(module, SplitLayer):
            formats = {p.name: uq.QFormat("int8" if p.name.startswith("skip") else up) for p in module.parts}
            halves[name] = uq.LayerPlan(formats, formats)
    plan = uq.QuantPlan.uniform(network, "int8", "int8").with_layers(halves)
    return uq.calibrate(uq.quantize(network, plan, example), [example])


@dataclass(frozen=True)
class Contender:
    """One row: its name, and how its network is made of the float one and an example."""

    name: str
    build: Callable[[nn.Module, Tensor], nn.Module]


CONTENDERS = (
    Contender("float", lambda network, example: network),
    Contender("float again (control)", lambda network, example: network),
    Contender("float, split", uq.split),
    Contender("float, two convolutions and an addition", two_convolutions),
    Contender("int8/int8", lambda network, example: quantized(network, example, split=False)),
    Contender("int8/int8, split", lambda network, example: quantized(network, example, split=True)),
    Contender("int8/int8 skip, int4/int4 up", lambda n, x: quantized(n, x, split=True, up="int4")),
)
"""The first is what the others are divided by."""


def float_networks(width: int, size: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Name → network and batch: a 2D BasicUNet on four images, a 3D DynUNet on a patch."""
    torch.manual_seed(0)
    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    flat = BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=features)
    filters = (width, 2 * width, 4 * width)
    solid = DynUNet(3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=filters)
    return {
        "2D BasicUNet": (flat, torch.rand(4, 1, size, size)),
        "3D DynUNet": (solid, torch.rand(1, 1, *[max(size // 4, 16)] * 3)),
    }


def training_step(network: nn.Module, images: Tensor) -> None:
    """Forward, a loss and backward."""
    network.zero_grad(set_to_none=True)
    network(images).square().mean().backward()


@torch.no_grad()
def inference(network: nn.Module, images: Tensor) -> None:
    """Forward alone."""
    network(images)


def measure(network: nn.Module, images: Tensor, training: bool, rounds: int, title: str) -> dict[str, Any]:
    """Time all contenders round-robin, each round beginning with another; a ratio is taken within its round.

    Returns:
        name → ``seconds`` (one for each round) and ``ratio`` (median and quartiles).
    """
    networks = {c.name: c.build(copy.deepcopy(network), images[:1]).train(training) for c in CONTENDERS}
    run = training_step if training else inference
    names = list(networks)
    results: dict[str, Any] = {name: {"seconds": []} for name in names}
    for index in tqdm(range(-WARMUP_ROUNDS, rounds), desc=title, unit="round", disable=None):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            run(networks[name], images)
            if index >= 0:
                results[name]["seconds"].append(time.perf_counter() - start)
    for name in names:
        ratios = np.divide(results[name]["seconds"], results[names[0]]["seconds"])
        low, median, high = np.percentile(ratios, [25, 50, 75])
        results[name]["ratio"] = {"median": float(median), "low": float(low), "high": float(high)}
    return results


def markdown(document: dict[str, Any], source: str) -> str:
    """The results as a page, made from the JSON document alone."""
    conditions = document["conditions"]
    lines = [
        "# Time of split networks over the unsplit float one",
        "",
        f"Made by `benchmarks/split.py` with [{source}]({source}); do not edit by hand.",
        "",
        "```",
        document["command"],
        "```",
        "",
        f"{conditions['threads']} threads ({conditions['cpu_capability']}), {conditions['rounds']} rounds. Median ratio to "
        "the first row of the same round, and its middle half. A split convolution in float is the same convolution; "
        "the control shows the measurement's own error.",
    ]
    for title, results in document["results"].items():
        lines += ["", f"## {title}", "", "| network | ms | ratio | middle half |", "|---|---:|---:|---:|"]
        for name, row in results.items():
            ratio, milliseconds = row["ratio"], 1000 * float(np.median(row["seconds"]))
            lines.append(
                f"| {name} | {milliseconds:.0f} | {ratio['median']:.3f} | {ratio['low']:.3f}–{ratio['high']:.3f} |"
            )
    found = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return "\n".join([*lines, "", f"Versions: {found}.", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, metavar="N", help="channels (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=192, metavar="PX", help="2D size; 3D a quarter (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="threads")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; a Markdown page beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    document: dict[str, Any] = {
        "command": shlex.join(
            ["python", "benchmarks/split.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": sys.version.split()[0],
            **{n: version(n) for n in ("monai-unetq", "torch", "monai")},
        },
        "conditions": {
            "threads": options.threads,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "rounds": options.rounds,
            "width": options.width,
        },
        "results": {},
    }
    for name, (network, images) in float_networks(options.width, options.size).items():
        for training in (True, False):
            shape = "×".join(map(str, images.shape))
            title = f"{name}, {'training step' if training else 'inference'}, batch of {shape}"
            document["results"][title] = measure(network, images, training, options.rounds, title)
    page = markdown(document, options.out.name if options.out else "split.json")
    print(page)
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
