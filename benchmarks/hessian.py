"""Time of all Hessian traces, layer by layer, beside the time PyHessian takes for its one number, in one run.

The same U-Net, batch and number of probes. See README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import monai_unetq as uq
from monai_unetq.sensitivity.derivatives import Derivatives, targets
from monai_unetq.sensitivity.metrics import PROBES_PER_PASS

EXAMPLES = """\
examples:
  python benchmarks/hessian.py                            width 16, 128 px, as many threads as cores
  python benchmarks/hessian.py --rounds 10 --out docs/results/hessian.json
  python benchmarks/hessian.py --rounds 1 --probes 5 --width 2 --size 16        a trial, seconds
"""

PEER = "PyHessian, one trace of the whole model"
PEER_WEIGHTS = "PyHessian, one trace of all convolution weights"
WEIGHTS = "monai-unetq, every layer's weight"
BOTH = "monai-unetq, every layer's weight and input"

Run = Callable[[nn.Module, Tensor, Tensor, int], tuple[float, float]]
"""Of network, images, labels and number of probes: the sum of the weights' traces and its standard error."""


def pyhessian(network: nn.Module, images: Tensor, labels: Tensor, probes: int) -> tuple[float, float]:
    """PyHessian, of all parameters that require gradients: biases and batch norms among them."""
    from pyhessian import hessian

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of create_graph in its backward
        found = hessian(network, uq.training.bce_dice_loss(), data=(images, labels), cuda=False)
        # With a tolerance of 0 or -1 it was seen to stop after a few probes where the trace is negative.
        numbers = found.trace(maxIter=probes, tol=-math.inf)
    network.zero_grad(set_to_none=True)
    if len(numbers) != probes:
        raise RuntimeError(
            f"PyHessian stopped after {len(numbers)} probes of {probes}: times cannot be compared"
        )
    return _summary(numbers)


def pyhessian_weights(network: nn.Module, images: Tensor, labels: Tensor, probes: int) -> tuple[float, float]:
    """PyHessian with the convolutions' weights alone requiring gradients: the sum of what we find layer by layer."""
    weights = {id(module.weight) for module in network.modules() if isinstance(module, nn.Conv2d)}
    try:
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in weights)
        return pyhessian(network, images, labels, probes)
    finally:
        for parameter in network.parameters():
            parameter.requires_grad_(True)


def ours(kinds: Sequence[str]) -> Run:
    """Our estimator, as ``hessian_traces`` runs it, without the rounding noise that Ω needs besides."""

    def run(network: nn.Module, images: Tensor, labels: Tensor, probes: int) -> tuple[float, float]:
        layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        wanted = [target for target in targets(layers, ()) if target.kind in kinds]
        derivatives = Derivatives(network, uq.training.bce_dice_loss(), wanted)
        sums = []
        for first in range(0, probes, PROBES_PER_PASS):
            found = derivatives.products(images, labels, range(first, min(first + PROBES_PER_PASS, probes)))
            sums.append(sum(value for name, value in found.items() if name.endswith(".weight")))
        return _summary(sums)

    return run


def _summary(numbers: Sequence[float]) -> tuple[float, float]:
    error = float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.inf
    return float(np.mean(numbers)), error


CONTENDERS: dict[str, Run] = {
    PEER: pyhessian,
    PEER_WEIGHTS: pyhessian_weights,
    WEIGHTS: ours(["weight"]),
    BOTH: ours(["weight", "input"]),
}
"""The first is what the others are divided by."""


def measure(
    width: int, size: int, images: int, probes: int, rounds: int, names: Sequence[str]
) -> dict[str, Any]:
    """Time all contenders round-robin, each round beginning with another; a ratio is taken within its round.

    Returns:
        name → ``seconds`` (one for each round), ``ratio`` (median and range; none without the peer), and the sum of the
        weights' ``trace`` with its standard ``error``.
    """
    torch.manual_seed(0)
    network = uq.networks.FixedPointUNet(1, 1, width=width)
    batch = torch.rand(images, 1, size, size)
    labels = (batch > 0.5).float()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(20):  # away from the initial weights, whose trace is about 0
        optimizer.zero_grad(set_to_none=True)
        uq.training.bce_dice_loss()(network(batch), labels).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    network.eval()
    results: dict[str, Any] = {name: {"seconds": []} for name in names}
    for index in tqdm(range(rounds), desc="hessian", unit="round", disable=None):
        first = index % len(names)
        for name in [*names[first:], *names[:first]]:
            if index == 0:
                CONTENDERS[name](network, batch, labels, 1)  # warm up
            start = time.perf_counter()
            trace, error = CONTENDERS[name](network, batch, labels, probes)
            results[name]["seconds"].append(time.perf_counter() - start)
            results[name] |= {"trace": trace, "error": error if math.isfinite(error) else None}
    for name in names:
        ratios = np.divide(results[name]["seconds"], results[PEER]["seconds"]) if PEER in names else None
        results[name]["ratio"] = (
            None
            if ratios is None
            else {"median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}
        )
    return results


def markdown(document: dict[str, Any], source: str) -> str:
    """The results as a page, made from the JSON document alone."""
    conditions = document["conditions"]
    lines = [
        "# Time of Hessian traces, layer by layer, over PyHessian's for one number",
        "",
        f"Made by `benchmarks/hessian.py` with [{source}]({source}); do not edit by hand.",
        "",
        "```",
        document["command"],
        "```",
        "",
        f"FixedPointUNet of width {conditions['width']}, {conditions['images']} images of {conditions['size']}², "
        f"{conditions['probes']} probes, {conditions['threads']} threads ({conditions['cpu_capability']}), "
        f"{conditions['rounds']} rounds. Median ratio to the first row of the same round, and its range. The trace is the "
        "sum over all convolutions' weights, so that all rows but the first estimate the same number; the whole model's counts "
        "biases and batch norms, too.",
        "",
        "| | s | ratio | range | trace |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in document["results"].items():
        ratio, error = row["ratio"], row["error"]
        shown = (
            "– | –" if ratio is None else f"{ratio['median']:.2f} | {ratio['low']:.2f}–{ratio['high']:.2f}"
        )
        trace = f"{row['trace']:.4g}" + ("" if error is None else f" ± {error:.1g}")
        lines.append(f"| {name} | {np.median(row['seconds']):.1f} | {shown} | {trace} |")
    found = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return "\n".join([*lines, "", f"Versions: {found}.", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument(
        "--probes", type=int, default=50, metavar="N", help="of each contender (default: %(default)s)"
    )
    parser.add_argument("--width", type=int, default=16, metavar="N", help="features (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, metavar="PX", help="side (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="threads")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; a Markdown page beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    versions = {"python": sys.version.split()[0], **{n: version(n) for n in ("monai-unetq", "torch")}}
    names = list(CONTENDERS)
    try:
        versions["PyHessian"] = version("pyhessian")
    except PackageNotFoundError:
        print("PyHessian is not installed and is left out: pip install pyhessian", file=sys.stderr)
        names = [WEIGHTS, BOTH]
    document: dict[str, Any] = {
        "command": shlex.join(
            ["python", "benchmarks/hessian.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "conditions": {
            **{
                key: getattr(options, key)
                for key in ("threads", "rounds", "probes", "width", "size", "images")
            },
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "results": measure(
            options.width, options.size, options.images, options.probes, options.rounds, names
        ),
    }
    page = markdown(document, options.out.name if options.out else "hessian.json")
    print(page)
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
