"""How fast do exported networks run? Ours beside the float networks and NNCF's own INT8, in one run, as ratios.

Each engine runs in a process of its own, one round after another in turns, so that what the machine does besides falls on
all of them; of each, the best time, and the most memory that its process held. Batch 1, weights at random: they do not
matter to the time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from monai_unetq.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.intervals import median_interval
from benchmarks.processors import features, processor_kind, write_page

EXAMPLES = """\
examples:
  python benchmarks/inference.py run --out inference                 both networks, about ten minutes on 2 cores
  python benchmarks/inference.py run --out inference --networks 2d --rounds 3
  python benchmarks/inference.py page --out inference
"""

MARKS = "<!-- made by benchmarks/inference.py -->", "<!-- end -->"
SIZES = {"2d": (256, 256), "3d": (64, 128, 128)}
FEATURES = {"2d": [32, 64, 128, 256, 512], "3d": [16, 32, 64, 128, 128]}
NORMS = ("instance", "batch")
ENGINES = (
    "torch float32", "torch bf16", "ONNX Runtime float32", "ONNX Runtime, ours", "ONNX Runtime, ours, float norms",
    "OpenVINO float32", "OpenVINO bf16",
    "OpenVINO, ours", "OpenVINO, ours, split", "OpenVINO, ours, float norms", "OpenVINO, ours, float norms, bf16",
    "OpenVINO, NNCF",
)  # fmt: skip
FILES = {
    "ONNX Runtime, ours": "onnx/model.onnx", "ONNX Runtime, ours, float norms": "onnx-float/model.onnx",
    "OpenVINO, ours": "openvino/model.xml", "OpenVINO, ours, split": "openvino-split/model.xml",
    "OpenVINO, ours, float norms": "openvino-float/model.xml",
    "OpenVINO, ours, float norms, bf16": "openvino-float/model.xml", "OpenVINO, NNCF": "nncf.xml",
}  # fmt: skip
"""Engine → what it runs; else the float network."""
REFERENCE = "torch float32"
PEER = "OpenVINO, NNCF"
IN_TURNS = (PEER, "OpenVINO, ours", "OpenVINO, ours, split")
"""What is compared once more in one process, run by run: processes that run minutes apart meet another load."""
SLOW = 10.0
"""Seconds; an engine that takes longer runs once in each round."""

ACTIVATION_SHAPES = ((100, 100), (100, 300))
WIDTH = 32
"""Of the paper's U-Net with either activation."""


def network_of(name: str, norm: str) -> Any:
    """nnU-Net's plain network with two classes; with batch norm it has ReLU, and all of it folds."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    torch.manual_seed(0)
    dimensions, levels = len(SIZES[name]), len(FEATURES[name])
    layer = getattr(nn, f"{norm.capitalize()}Norm{dimensions}d")
    network = PlainConvUNet(
        1, levels, FEATURES[name], (nn.Conv2d, nn.Conv3d)[dimensions - 2], 3, [1, *[2] * (levels - 1)], 2, 2, 2,
        conv_bias=True, norm_op=layer, norm_op_kwargs={"affine": True}, nonlin=nn.ReLU if norm == "batch" else nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    return network.eval()


def one_output(network: Any) -> Any:
    """The network as it predicts: without deep supervision."""
    network.decoder.deep_supervision = False
    return network


def quantized_network(name: str, norm: str, split: bool, rounded: bool) -> Any:
    """W8A8, calibrated on noise; whether what instance norms read is rounded to 8 bits, too."""
    import torch

    import monai_unetq as uq
    from monai_unetq.surgery import observe

    network = network_of(name, norm)
    image = torch.zeros(1, 1, *[size // 2 for size in SIZES[name]])
    if split:
        uq.split(network, image)
    seen = observe(network, image)
    used = one_output(network)
    seen = observe(used, image)
    plan = uq.QuantPlan.uniform(
        used, weights="int8", activations="int8", input="int8", keep_float=["decoder.seg_layers.[!" + str(len(FEATURES[name]) - 2) + "]"],
        image_layers=seen.image_layers(), last_layer=seen.layers()[-1],
    )  # fmt: skip
    if rounded:
        plan = plan.with_outputs(seen.normalized_layers(), "int8")
    uq.quantize(used, plan, image)
    return uq.calibrate(used, [torch.randn(2, 1, *image.shape[2:])])


def prepare(name: str, norm: str, folder: Path) -> None:
    """Write what the engines read: float ONNX and IR, ours, NNCF's."""
    import nncf
    import openvino
    import torch

    import monai_unetq as uq

    image = torch.randn(1, 1, *SIZES[name])
    network = one_output(network_of(name, norm))
    torch.onnx.export(
        network, (image,), folder / "float.onnx", dynamo=True, input_names=["image"], output_names=["logits"], verbose=False
    )  # fmt: skip
    core = openvino.Core()
    model = core.read_model(folder / "float.onnx")
    openvino.save_model(model, folder / "float.xml", compress_to_fp16=False)
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=image.shape).astype(np.float32) for _ in range(4)]
    openvino.save_model(
        nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples)), folder / "nncf.xml"
    )
    for ending, split, rounded in (("", False, True), ("-split", True, True), ("-float", False, False)):
        if norm != "instance" and not rounded:
            continue
        ours = quantized_network(name, norm, split, rounded)
        uq.export(ours, image, "openvino", folder / f"openvino{ending}", profile=processor_kind())
        if ending != "-split":
            uq.export(ours, image, "onnx", folder / f"onnx{ending}")


def runner(engine: str, name: str, norm: str, folder: Path) -> Callable[[np.ndarray], Any]:
    """A function that runs one engine on an image."""
    if engine.startswith("torch"):
        import torch

        network = one_output(network_of(name, norm))
        half = engine.endswith("bf16")

        def by_torch(image: np.ndarray) -> Any:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                return network(torch.from_numpy(image))

        return by_torch
    if engine.startswith("ONNX Runtime"):
        import onnxruntime

        file = folder / FILES.get(engine, "float.onnx")
        options = onnxruntime.SessionOptions()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {session.get_inputs()[0].name: image})
    import openvino

    file = folder / FILES.get(engine, "float.xml")
    core = openvino.Core()
    precision = "bf16" if engine.endswith("bf16") else "f32"
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": precision})
    request = compiled.create_infer_request()
    return lambda image: request.infer([image])


def measure(engine: str, name: str, norm: str, folder: Path, repeats: int) -> dict[str, float]:
    """Best time of an engine in this process, seconds, and the most memory that it held, MiB."""
    run = runner(engine, name, norm, folder)
    image = np.random.default_rng(0).normal(size=(1, 1, *SIZES[name])).astype(np.float32)
    first = _timed(lambda: run(image))
    # What takes that long (bf16 without hardware for it) is not made shorter by a second run.
    times = [first] if first > SLOW else [_timed(lambda: run(image)) for _ in range(repeats)]
    return {"seconds": min(times), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure_in_turns(name: str, norm: str, folder: Path, turns: int) -> dict[str, list[float]]:
    """Seconds of every run of the engines ``IN_TURNS``, each turn beginning with another one."""
    runs = {engine: runner(engine, name, norm, folder) for engine in IN_TURNS}
    image = np.random.default_rng(0).normal(size=(1, 1, *SIZES[name])).astype(np.float32)
    seconds: dict[str, list[float]] = {engine: [] for engine in runs}
    for run in runs.values():
        run(image)
    order = list(runs)
    for _ in range(turns):
        order = [*order[1:], order[0]]
        for engine in order:
            seconds[engine].append(_timed(partial(runs[engine], image)))
    return seconds


def activations(repeats: int) -> list[dict[str, Any]]:
    """The 2019 paper's table: ReLU and tanh of small tensors, float and rounded to INT8, in both engines."""
    import onnxruntime
    import openvino
    from onnx import TensorProto, helper, numpy_helper

    rows = []
    for shape in ACTIVATION_SHAPES:
        for operator in ("Relu", "Tanh"):
            for rounded in (False, True):
                nodes, constants = [], []
                ends = ("x", "y")
                if rounded:
                    constants = [
                        numpy_helper.from_array(np.array(1 / 16, np.float32), "scale"),
                        numpy_helper.from_array(np.array(0, np.int8), "zero"),
                    ]
                    for source, place in (("x", "a"), ("b", "y")):
                        nodes += [
                            helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"{place}_q"]),
                            helper.make_node("DequantizeLinear", [f"{place}_q", "scale", "zero"], [place]),
                        ]
                    ends = ("a", "b")
                nodes.insert(2 if rounded else 0, helper.make_node(operator, [ends[0]], [ends[1]]))
                values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
                graph = helper.make_graph(nodes, "activation", values[:1], values[1:], constants)
                model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
                data = model.SerializeToString()
                session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
                core = openvino.Core()
                request = core.compile_model(core.read_model(data), "CPU").create_infer_request()
                x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
                runs: dict[str, Callable[[], Any]] = {
                    "ONNX Runtime": partial(session.run, None, {"x": x}),
                    "OpenVINO": partial(request.infer, [x]),
                }
                for engine, run in runs.items():
                    run()
                    best = min(_timed(run) for _ in range(repeats))
                    kind = "INT8" if rounded else "float32"
                    rows.append({"engine": engine, "shape": list(shape), "layer": operator.lower(), "type": kind, "microseconds": 1e6 * best})  # fmt: skip
    return rows


def whole_networks(repeats: int) -> list[dict[str, Any]]:
    """The same of whole networks: the paper's U-Net with either, float and W8A8, in turns; best time of each."""
    import onnxruntime
    import openvino
    import torch

    import monai_unetq as uq
    from monai_unetq.runtime.engine import load

    image = torch.randn(1, 1, *SIZES["2d"])
    runs: dict[tuple[str, str, str], Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for activation in ("relu", "tanh"):
            folder = Path(scratch) / activation
            folder.mkdir()
            torch.manual_seed(0)
            network = uq.networks.FixedPointUNet(1, 1, width=WIDTH, activation=activation).eval()
            torch.onnx.export(network, (image,), folder / "float.onnx", dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(folder / "float.onnx", providers=["CPUExecutionProvider"])
            request = openvino.Core().compile_model(folder / "float.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()  # fmt: skip
            array = image.numpy()
            runs["ONNX Runtime", activation, "float32"] = partial(session.run, None, {session.get_inputs()[0].name: array})  # fmt: skip
            runs["OpenVINO", activation, "float32"] = partial(request.infer, [array])
            uq.quantize(network, uq.QuantPlan.uniform(network, weights="int8", activations="int8"), image)
            uq.calibrate(network, [image])
            uq.export(network, image, "onnx", folder / "onnx")
            uq.export(network, image, "openvino", folder / "openvino")
            runs["ONNX Runtime", activation, "INT8"] = partial(load(folder / "onnx"), array)
            runs["OpenVINO", activation, "INT8"] = partial(load(folder / "openvino"), array)
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(repeats + 1):  # the first time fills caches, and is no one's best
            for key, run in runs.items():
                best[key] = min(best[key], _timed(run))
    return [
        {"engine": engine, "layer": activation, "type": kind, "milliseconds": 1e3 * seconds}
        for (engine, activation, kind), seconds in best.items()
    ]


def _timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet, and write the document."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        for norm in NORMS:
            apart, together = (options.out / f"{name}-{norm}{end}.json" for end in ("", "-turns"))
            if apart.exists() and together.exists():
                continue
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                _started("prepare", folder, name, norm)
                if not apart.exists():
                    write_json(apart, _apart(name, norm, folder, options.rounds, options.repeats))
                if not together.exists():
                    write_json(together, _started("turns", folder, name, norm, "--turns", str(options.turns)))
    file = options.out / "activations.json"
    if not file.exists():
        write_json(file, {"rows": activations(300), "networks": whole_networks(20)})


def _apart(name: str, norm: str, folder: Path, rounds: int, repeats: int) -> dict[str, Any]:
    """All engines of one network, each in a process of its own, in rounds."""
    engines = [engine for engine in ENGINES if "bf16" not in engine or has_bf16()]
    engines = [engine for engine in engines if "float norms" not in engine or norm == "instance"]
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    turns = [(r, engine) for r in range(rounds) for engine in engines]
    for _, engine in tqdm(turns, desc=f"{name}, {norm} norm", unit="run", disable=None):
        how = ("--engine", engine, "--repeats", str(repeats))
        found[engine].append(_started("measure", folder, name, norm, *how))
    sizes = {
        "float32 ONNX": _size(folder, "float.onnx*"), "our ONNX": _size(folder / "onnx", "model.onnx"),
        "float32 IR": _size(folder, "float.bin"), "our IR": _size(folder / "openvino", "model.bin"),
        "NNCF IR": _size(folder, "nncf.bin"),
    }  # fmt: skip
    return {
        "network": name, "norm": norm, "size": list(SIZES[name]), "features": FEATURES[name], "bytes": sizes,
        "repeats": repeats,
        "engines": {
            engine: {
                "seconds": min(one["seconds"] for one in measured),
                "rounds": [one["seconds"] for one in measured],
                "peak_mib": max(one["peak_mib"] for one in measured),
            }
            for engine, measured in found.items()
        },
    }  # fmt: skip


def _started(what: str, folder: Path, name: str, norm: str, *options: str) -> Any:
    """What this script prints in a process of its own."""
    command = [sys.executable, __file__, what, "--out", str(folder), "--networks", name, "--norm", norm]
    printed = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
    return None if what == "prepare" else json.loads(printed.splitlines()[-1])


def has_bf16() -> bool:
    """Whether the processor has instructions for bf16; without them it is only slow, and is left out."""
    return any(name.endswith("bf16") for name in features())


def _size(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def collected(out: Path) -> dict[str, Any]:
    """Everything that is there, as one document."""
    import os

    from monai_unetq.recipe import versions

    def read(file: Path) -> Any:
        return json.loads(file.read_text(encoding="utf-8"))

    def turns(file: Path) -> dict[str, Any]:
        return {"turns": read(file)} if file.exists() else {}

    return {
        "versions": versions("onnxruntime", "openvino", "nncf"),
        "processor": f"{os.cpu_count()} cores, {(features() or ['unknown'])[0]}",
        "networks": [
            {**read(out / f"{n}-{k}.json"), **turns(out / f"{n}-{k}-turns.json")}
            for n in SIZES for k in NORMS if (out / f"{n}-{k}.json").exists()
        ],
        "activations": read(out / "activations.json") if (out / "activations.json").exists() else {"rows": [], "networks": []},
    }  # fmt: skip


def markdown(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's tables, made from the JSON documents alone, for each kind of processor."""
    parts = [["", f"## {kind.upper()}", *tables(document)] for kind, document in documents.items()]
    return "\n".join([*(line for part in parts for line in part), ""])


def tables(document: Mapping[str, Any]) -> list[str]:
    """Those of one document."""
    lines = [
        "",
        f"{document['processor']}; {', '.join(f'{k} {v}' for k, v in document['versions'].items())}.",
    ]
    for one in document["networks"]:
        engines = one["engines"]
        reference, peer = engines[REFERENCE]["seconds"], engines[PEER]["seconds"]
        size = "×".join(map(str, one["size"]))
        lines += [
            "", f"### {one['network'].upper()}, {one['norm']} norm, {size}, features {one['features']}", "",
            "| engine | ms | times faster than torch float32 | than NNCF's INT8 | peak memory [MiB] |", "|---|---:|---:|---:|---:|",
        ]  # fmt: skip
        for engine, found in engines.items():
            seconds = found["seconds"]
            lines.append(
                f"| {engine} | {1000 * seconds:.1f} | {reference / seconds:.2f} | {peer / seconds:.2f} | "
                f"{found['peak_mib']:.0f} |"
            )
        held = one["bytes"]
        lines += [
            "",
            f"Files: our ONNX {held['our ONNX'] / held['float32 ONNX']:.3f} of float32's, our IR's weights "
            f"{held['our IR'] / held['float32 IR']:.3f}, NNCF's {held['NNCF IR'] / held['float32 IR']:.3f}.",
            *_rounds(one),
            *_in_turns(one),
        ]
    lines += ["", "### Activation layers alone", "", "| engine | layer | shape | float32 [µs] | INT8 [µs] |", "|---|---|---|---:|---:|"]  # fmt: skip
    rows = {
        (r["engine"], r["layer"], tuple(r["shape"]), r["type"]): r["microseconds"] for r in document["activations"]["rows"]
    }  # fmt: skip
    for engine, layer, shape in dict.fromkeys(key[:3] for key in rows):
        cells = [f"{rows[engine, layer, shape, kind]:.1f}" for kind in ("float32", "INT8")]
        lines.append(f"| {engine} | {layer} | {'×'.join(map(str, shape))} | {' | '.join(cells)} |")
    size = "×".join(map(str, SIZES["2d"]))
    lines += [
        "", f"### The paper's U-Net with either, width {WIDTH}, {size}", "",
        "| engine | activation | float32 [ms] | INT8 [ms] |", "|---|---|---:|---:|",
    ]  # fmt: skip
    times = {
        (r["engine"], r["layer"], r["type"]): r["milliseconds"] for r in document["activations"]["networks"]
    }
    for engine, layer in dict.fromkeys(key[:2] for key in times):
        cells = [f"{times[engine, layer, kind]:.1f}" for kind in ("float32", "INT8")]
        lines.append(f"| {engine} | {layer} | {' | '.join(cells)} |")
    return lines


def _rounds(one: Mapping[str, Any]) -> list[str]:
    """How often it was measured, and how far the rounds are apart; documents of before do not have it."""
    if "repeats" not in one:
        return []
    rounds = {engine: np.array(found["rounds"]) for engine, found in one["engines"].items()}
    slower = {engine: found.max() / found.min() - 1 for engine, found in rounds.items()}
    worst = max(slower, key=lambda engine: slower[engine])
    return [
        "",
        f"{len(rounds[PEER])} rounds of {one['repeats']}; a round's best is up to {100 * slower[worst]:.0f} % slower than the "
        f"best of all ({worst}).",
    ]  # fmt: skip


def _in_turns(one: Mapping[str, Any]) -> list[str]:
    """The ratios that are asked for, of what ran in turns in one process."""
    if "turns" not in one:
        return []
    seconds = {engine: np.array(found) for engine, found in one["turns"].items()}
    peer, whole, split = (seconds[engine] for engine in IN_TURNS)
    return [
        "",
        f"In turns in one process, {len(peer)} times; median of the ratios and its 95 % interval: ours is {_median(peer / whole)} "
        f"times as fast as NNCF's, split {_median(peer / split)} times; split takes {_median(split / whole)} times what whole "
        "takes.",
    ]  # fmt: skip


def _median(ratios: NDArray[np.floating]) -> str:
    median, low, high = median_interval(ratios)
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write the page; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "page", "prepare", "measure", "turns"), help="run, or write the page; the others are what run starts")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results")
    parser.add_argument("--networks", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="in each (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=40, metavar="N", help="of OpenVINO's INT8 in one process (default: %(default)s)")  # fmt: skip
    parser.add_argument("--norm", choices=NORMS, help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument(
        "--page", type=Path, metavar="DIR", default=Path("docs/results"), help="folder of the page"
    )
    options = parser.parse_args(arguments)
    if options.what == "prepare":
        prepare(options.networks[0], options.norm, options.out)
    elif options.what in ("measure", "turns"):
        what = options.networks[0], options.norm, options.out
        found: Any = (
            measure(options.engine, *what, options.repeats)
            if options.what == "measure"
            else measure_in_turns(*what, options.turns)
        )
        print(json.dumps(found))
    elif options.what == "page":
        write_page("inference", collected(options.out), options.page, MARKS, markdown)
    else:
        run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
