"""Do exported models compute what fake quantization computes? Networks, plans and targets, one against another.

Small networks are trained for some steps on real slices (2D: EM) or volumes (3D: hippocampus), quantized, calibrated and
exported; every target then runs on images that were not trained on. Compared are the integers at the last layer's input,
the logits and the labels, and what OpenVINO runs in INT8. Two controls tell causes: each engine running the same file
without its kernels of integers, and PyTorch in float32 against itself in float64. Everything is kept in --out and not done
twice.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import SimpleITK
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import monai_unetq as uq
from monai_unetq.deploy.qdq import to_qdq
from monai_unetq.deploy.qonnx import to_qonnx
from monai_unetq.deploy.trace import OPSET, trace
from monai_unetq.files import write_json
from monai_unetq.recipe import versions
from monai_unetq.runtime.verify import labels
from monai_unetq.surgery import observe, quantized_layers

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.processors import features, processor_kind, write_page

EXAMPLES = """\
examples:
  python benchmarks/exports.py run --em Dataset501_EM --hippocampus hippocampus --out exports
  python benchmarks/exports.py run --em Dataset501_EM --hippocampus hippocampus --out exports --networks "MONAI UNet, 2D"
  python benchmarks/exports.py page --out exports
"""

MARKS = "<!-- made by benchmarks/exports.py -->", "<!-- end -->"
STEPS = 40
ENGINES = ("onnxruntime", "openvino", "qonnx", "integer")
CONTROL = "float64"
FREE = "free sizes"
"""ONNX Runtime on a model whose image sizes are free, traced at ``Case.size`` and run at half as much again."""
COLUMNS = ("onnxruntime", FREE, *ENGINES[1:])
PLANS: dict[str, dict[str, str]] = {
    "W8A8": {"weights": "int8", "activations": "int8", "input": "uint8", "last": "int8"},
    "W7A8": {"weights": "int7", "activations": "int8", "input": "uint8", "last": "int7"},
    "W4A6": {"weights": "int4", "activations": "int6", "input": "uint8", "last": "int7"},
    "mixed": {"weights": "int4", "activations": "int6", "input": "uint8", "last": "int7"},
}
"""Formats; in ``mixed`` layers have 3, 4 and 5-bit weights by turns."""

ROUNDED_NORMS = " N8"
"""Ends the name of a plan in which instance and group norms read 8 bits, too."""


@dataclass(frozen=True)
class Case:
    """A network to be exported.

    Attributes:
        build: makes it, float, for 1 channel and 2 classes.
        size: of the images.
        holds: whether integers alone can compute it: batch norm, ReLU, no attention.
        prepare: what is done to it once it is trained and quantized.
    """

    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    holds: bool
    prepare: Callable[[nn.Module], None] = lambda network: None


def cases() -> dict[str, Case]:
    """Name → network, small ones, as their projects build them; with batch norm and ReLU where integers are to hold."""
    from monai.networks.nets import UNETR, BasicUNet, DynUNet, SegResNet, UNet

    def dyn(dimensions: int, norm: str, act: Any) -> nn.Module:
        return DynUNet(
            dimensions, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[8, 16, 32], norm_name=norm, act_name=act
        )

    square, cube = (64, 64), (32, 32, 32)
    return {
        "paper's U-Net, 2D": Case(lambda: uq.networks.FixedPointUNet(1, 2, width=8), square, True),
        "paper's U-Net, 3D": Case(
            lambda: uq.networks.FixedPointUNet(1, 2, width=8, spatial_dims=3), cube, True
        ),
        "MONAI UNet, 2D": Case(
            lambda: UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2, norm="batch", act="relu"), square, True
        ),
        "BasicUNet, 2D": Case(
            lambda: BasicUNet(2, 1, 2, (8, 8, 16, 16, 32, 8), norm="batch", act="relu"), square, True
        ),
        "BasicUNet, 3D, instance norm": Case(lambda: BasicUNet(3, 1, 2, (8, 8, 16, 16, 32, 8)), cube, False),
        "DynUNet, 2D": Case(lambda: dyn(2, "batch", "relu"), square, True),
        "DynUNet, 3D, instance norm": Case(lambda: dyn(3, "instance", ("leakyrelu", {"negative_slope": 0.01})), cube, False),
        "SegResNet, 2D": Case(
            lambda: SegResNet(2, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), square, False
        ),
        "UNETR, 3D": Case(
            lambda: UNETR(1, 2, cube, feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4), cube, False
        ),
        "nnU-Net plain, 2D": Case(lambda: _nnunet("PlainConvUNet", 2, True), square, True, _one_output),
        "nnU-Net plain, 3D, instance norm": Case(
            lambda: _nnunet("PlainConvUNet", 3, False), cube, False, _one_output
        ),
        "nnU-Net residual, 3D": Case(lambda: _nnunet("ResidualEncoderUNet", 3, True), cube, True, _one_output),
    }  # fmt: skip


def _nnunet(kind: str, dimensions: int, batch_norm: bool) -> nn.Module:
    from dynamic_network_architectures.architectures import unet

    residual = kind == "ResidualEncoderUNet"
    norm = getattr(nn, f"{'Batch' if batch_norm else 'Instance'}Norm{dimensions}d")
    network: nn.Module = getattr(unet, kind)(
        1, 3, [8, 16, 32], (nn.Conv2d, nn.Conv3d)[dimensions - 2], 3, [1, 2, 2], num_classes=2, conv_bias=True,
        norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=nn.ReLU if batch_norm else nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True, n_conv_per_stage_decoder=1,
        **{"n_blocks_per_stage" if residual else "n_conv_per_stage": 1},
    )  # fmt: skip
    return network


def _one_output(network: nn.Module) -> None:
    decoder: Any = network.decoder
    decoder.deep_supervision = False


def images_of(folder: Path, dimensions: int, part: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Real images in [0, 1] and their binary labels: EM slices of a prepared data set, or hippocampus volumes."""
    if dimensions == 2:
        found = [
            (case["image"], case["label"]) for case in uq.datasets.data_list(folder, 0, "train" if part == "train" else "test")
        ]  # fmt: skip
    else:
        files = sorted((folder / "images").glob("*.nii*"))
        chosen = files[:12] if part == "train" else files[-4:]
        found = [(str(f), str(folder / "labels" / f.name)) for f in chosen]
    images, masks = [], []
    for image, label in found:
        array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(image))).astype(np.float32).squeeze()
        top = max(float(np.percentile(array, 99.5)), 1.0)
        images.append(np.clip(array / top, 0, 1))
        masks.append(
            (SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(label))).squeeze() > 0).astype(np.int64)
        )
    return images, masks


def crops(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], size: Sequence[int], count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Random crops, (count, 1, …) and (count, …); small volumes are padded with zeros."""
    rng = np.random.default_rng(seed)
    pictures, labelled = [], []
    for _ in range(count):
        which = int(rng.integers(len(images)))
        margin = [(0, max(0, want - have)) for want, have in zip(size, images[which].shape, strict=True)]
        image, mask = np.pad(images[which], margin), np.pad(masks[which], margin)
        place = tuple(
            slice(begin := int(rng.integers(have - want + 1)), begin + want)
            for want, have in zip(size, image.shape, strict=True)
        )
        pictures.append(image[place])
        labelled.append(mask[place])
    return torch.from_numpy(np.stack(pictures))[:, None], torch.from_numpy(np.stack(labelled))


def train(network: nn.Module, images: Any, masks: Any, size: Sequence[int]) -> None:
    """Train for ``STEPS`` steps, enough for weights and activations that are no longer random."""
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    network.train()
    for step in range(STEPS):
        picture, mask = crops(images, masks, size, 4, step)
        out = network(picture)
        loss = F.cross_entropy(out[0] if isinstance(out, (list, tuple)) else out, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


def quantized(network: nn.Module, plan_name: str, split: bool, batches: Sequence[Tensor]) -> nn.Module:
    """A quantized and calibrated copy, scales powers of two."""
    network = copy.deepcopy(network)
    if split:
        uq.split(network, batches[0][:1])
    trace_ = observe(network, batches[0][:1])
    formats = plan_name.removesuffix(ROUNDED_NORMS)
    options: dict[str, Any] = dict(PLANS[formats])
    plan = uq.QuantPlan.uniform(
        network, **options, image_layers=trace_.image_layers(), last_layer=trace_.layers()[-1]
    )
    if formats == "mixed":
        changed = {
            name: replace(
                plan[name], weights=dict.fromkeys(plan[name].weights, uq.QFormat(f"int{3 + i % 3}"))
            )
            for i, name in enumerate(list(plan.layers)[1:-1])
        }
        plan = plan.with_layers(changed)
    if plan_name != formats:
        plan = plan.with_outputs(trace_.normalized_layers(), "int8")
    uq.quantize(network, plan, batches[0][:1])
    uq.calibrate(network, batches)
    return network


def compared(
    model: onnx.ModelProto, run: Callable[[onnx.ModelProto, np.ndarray, bool], list[np.ndarray]], image: np.ndarray,
    expected: np.ndarray, codes: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """Logits, labels, and integers at the last layer's input of one engine, against fake quantization's; and its logits in
    float where they are not the same.
    """
    held = copy.deepcopy(model)
    name = last_codes(held)
    if name is not None:
        held.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        known = [v for v in held.graph.value_info if v.name == name]
        if known:
            held.graph.output[-1].CopyFrom(known[0])
    logits, *rest = run(held, image, True)
    result: dict[str, Any] = difference(logits, expected)
    if rest:
        result |= apart(rest[0].astype(np.int64) - (128 if offset_of(held, name) else 0), codes)
    if not result["equal"]:
        result["in_float"] = difference(run(model, image, False)[0], expected)
    return result


def apart(found: np.ndarray, codes: np.ndarray) -> dict[str, float]:
    """How many integers are the same, and how many at most a step away."""
    return {
        "codes_within_1": float(np.mean(np.abs(found - codes) <= 1)),
        "codes_equal": float(np.mean(found == codes)),
    }


def difference(logits: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """How far logits are from those expected."""
    return {
        "equal": bool(np.array_equal(logits, expected)),
        "largest": float(np.abs(logits.astype(np.float64) - expected).max() / np.abs(expected).max()),
        "labels_differ": float(np.mean(labels(logits) != labels(expected))),
    }


def last_codes(model: onnx.ModelProto) -> str | None:
    """Name of the integers that the last convolution reads; None where it reads none."""
    makers = {output: node for node in model.graph.node for output in node.output}
    node = makers.get("logits")
    while node is not None and node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
        node = makers.get(node.input[0])
    source = None if node is None else makers.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return None
    return str(source.input[0])


def offset_of(model: onnx.ModelProto, name: str | None) -> bool:
    """Whether integers are stored with the zero point 128."""
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    readers = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == name]
    return bool(readers) and int(constants[readers[0].input[2]]) == 128


def by_onnxruntime(model: onnx.ModelProto, image: np.ndarray, integers: bool = True) -> list[np.ndarray]:
    """Outputs by ONNX Runtime as it optimizes; without, every node runs as it is written, convolutions in float."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not integers:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"image": image}))


def by_openvino(model: onnx.ModelProto, image: np.ndarray, integers: bool = True) -> list[np.ndarray]:
    """Outputs by OpenVINO's CPU plugin, float32 where it is not INT8; without integers, all of it."""
    compiled = _compiled(model, image.shape, integers)
    found = compiled(image)
    return [np.array(found[i]) for i in range(len(compiled.outputs))]


def _compiled(model: onnx.ModelProto, shape: Sequence[int], integers: bool = True) -> Any:
    import openvino

    from monai_unetq.deploy.openvino import read

    found = read(model)
    found.reshape(list(shape))
    options = {"INFERENCE_PRECISION_HINT": "f32", **({} if integers else {"LP_TRANSFORMS_MODE": "NO"})}
    return openvino.Core().compile_model(found, "CPU", options)


def by_qonnx(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    """Logits by the qonnx package, node by node, after its own clean-up."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    cleaned = cleanup_model(ModelWrapper(model))
    name = cleaned.graph.input[0].name
    return np.asarray(execute_onnx(cleaned, {name: image})[cleaned.graph.output[0].name])


def int8_layers(model: onnx.ModelProto, shape: Sequence[int]) -> tuple[float, list[str]]:
    """Share of the MACs that OpenVINO runs in INT8, and the layers that it does not."""
    from monai_unetq.runtime.executions import executions, int8_share

    found = executions(_compiled(model, shape))
    return int8_share(found) or 0.0, [
        f"{one.name} ({one.kind}, {one.precision})" for one in found if not one.is_int8
    ]


def verified(network: nn.Module, image: Tensor, larger: Tensor, holds: bool) -> dict[str, Any]:
    """All targets of one quantized network on one image, and ONNX Runtime with free sizes on a larger one."""
    folded = uq.fold(copy.deepcopy(network), image[:1])
    last_name = observe(folded, image[:1]).layers()[-1]
    (quantizer,) = quantized_layers(folded)[last_name].input_quantizers.values()
    seen: list[Tensor] = []
    hook = quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        expected = folded(image).numpy()
        hook.remove()
        codes = quantizer.codes(seen[0]).numpy()
        double = copy.deepcopy(folded).double()
        (quantizer,) = quantized_layers(double)[last_name].input_quantizers.values()
        quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        exact = double(image.double()).numpy()
    traced = trace(network, image, dynamic=False)
    array = image.numpy()
    found: dict[str, Any] = {
        CONTROL: difference(expected, exact) | apart(quantizer.codes(seen[1]).numpy(), codes)
    }
    lowered = to_qdq(traced)
    found["onnxruntime"] = compared(lowered.model, by_onnxruntime, array, expected, codes)
    found["onnxruntime"]["notes"] = lowered.notes
    found[FREE] = by_free_sizes(folded, network, image, larger)
    lowered = to_qdq(traced, target="openvino", shuffled=processor_kind() == "avx2")
    found["openvino"] = compared(lowered.model, by_openvino, array, expected, codes)
    share, floats = int8_layers(lowered.model, image.shape)
    found["openvino"] |= {"notes": lowered.notes, "int8_macs": share, "float_layers": floats}
    found["qonnx"] = difference(by_qonnx(to_qonnx(traced).model, array), expected)
    found["integer"] = by_integers(traced, network, array, exact) if holds else {"refused": _refusal(traced)}
    return found


def by_free_sizes(folded: nn.Module, network: nn.Module, image: Tensor, larger: Tensor) -> dict[str, Any]:
    """ONNX Runtime, on an image of another size than the model was traced at, and of one in place of two in the batch."""
    traced = trace(network, image)
    if not set(range(2, image.dim())) <= set(traced.dynamic):
        return {"refused": "the network has the size of its image"}
    with torch.no_grad():
        expected = folded(larger).numpy()
    lowered = to_qdq(traced)
    found = difference(by_onnxruntime(lowered.model, larger.numpy())[0], expected)
    if not found["equal"]:
        found["in_float"] = difference(by_onnxruntime(lowered.model, larger.numpy(), False)[0], expected)
    return found


def by_integers(traced: Any, network: nn.Module, image: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """The integer reference against fake quantization in float64."""
    from monai_unetq.deploy.integer import write
    from monai_unetq.runtime.integer import load

    with tempfile.TemporaryDirectory() as folder:
        write(traced, network, Path(folder))
        begin = time.perf_counter()
        logits, exponents = load(folder)(image)
        seconds = time.perf_counter() - begin
    column = np.asarray(exponents).reshape(-1, *[1] * (image.ndim - 2))
    return difference(np.ldexp(logits.astype(np.float64), -column), exact) | {"seconds": round(seconds, 2)}


def _refusal(traced: Any) -> str:
    from monai_unetq.deploy.integer import lower

    try:
        lower(traced)
    except ValueError as error:
        return str(error)
    return ""


def run(options: argparse.Namespace) -> None:
    """Do what is not done yet, and write the document."""
    chosen = {
        name: case for name, case in cases().items() if options.networks is None or name in options.networks
    }
    jobs = [
        (name, f"{plan}{ending}", split) for name, case in chosen.items()
        for ending in ("", *([] if case.holds else [ROUNDED_NORMS])) for plan in PLANS for split in (False, True)
        if not (split and name.startswith("SegResNet"))
    ]  # fmt: skip
    trained: dict[str, nn.Module] = {}
    for name, plan, split in tqdm(jobs, desc="exports", unit="case", disable=None):
        file = options.out / f"{_slug(name)}-{plan}-{'split' if split else 'whole'}.json"
        if file.exists():
            continue
        case = chosen[name]
        dimensions = len(case.size)
        folder = options.em if dimensions == 2 else options.hippocampus
        if name not in trained:
            torch.manual_seed(0)
            trained[name] = case.build()
            train(trained[name], *images_of(folder, dimensions, "train"), case.size)
        learned = images_of(folder, dimensions, "train")
        batches = [crops(*learned, case.size, 4, 1000 + i)[0] for i in range(2)]
        network = quantized(trained[name], plan, split, batches)
        case.prepare(network)
        tests = images_of(folder, dimensions, "test")
        image = crops(*tests, case.size, 2, 0)[0]
        larger = crops(*tests, [size * 3 // 2 for size in case.size], 1, 0)[0]
        result = {
            "network": name,
            "plan": plan,
            "split": split,
            **verified(network, image, larger, case.holds),
        }
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        tqdm.write(f"{name} {plan} {'split' if split else ''}: {_line(result)}")
    write_json(options.out / "norms.json", norm_errors())
    write_json(options.out / "exports.json", collected(options.out))


def _line(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{engine} {_cell(result[engine])}" for engine in COLUMNS)


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    """One engine's result without what says nothing: differences that are 0, empty notes, digits beyond the sixth."""
    if found.get("equal"):
        return {
            key: value
            for key, value in found.items()
            if key in ("equal", "int8_macs") or (key == "notes" and value)
        }
    rounded: dict[type, Callable[[Any], Any]] = {float: lambda value: round(value, 6), dict: _short}
    return {
        key: rounded.get(type(value), lambda value: value)(value)
        for key, value in found.items()
        if value not in ({}, [])
    }


def collected(out: Path) -> dict[str, Any]:
    """Everything that is there, as one document."""

    def read(file: Path) -> dict[str, Any]:
        case = json.loads(file.read_text(encoding="utf-8"))
        return {
            key: _short(value) if key in (*ENGINES, FREE, CONTROL) else value for key, value in case.items()
        }

    files = [file for file in sorted(out.glob("*.json")) if file.name not in ("exports.json", "norms.json")]
    return {
        "versions": versions("onnx", "onnxruntime", "openvino", "qonnx"),
        "processor": _processor(),
        "steps": STEPS,
        "norms": json.loads((out / "norms.json").read_text(encoding="utf-8"))
        if (out / "norms.json").exists()
        else {},
        "cases": [read(file) for file in files],
    }


def _processor() -> str:
    found = features()
    return f"x86-64 with {found[0].replace('_', ' ').upper()}" if found else "unknown"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _cell(found: Mapping[str, Any]) -> str:
    if "refused" in found:
        return "refused"
    if found["equal"]:
        return "equal"
    return f"{found['labels_differ']:.2%}"


def markdown(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's tables, made from the JSON documents alone, for each kind of processor."""
    parts = [["", f"## {kind.upper()}", *tables(document)] for kind, document in documents.items()]
    return "\n".join([*(line for part in parts for line in part), ""])


def tables(document: Mapping[str, Any]) -> list[str]:
    """Those of one document."""
    lines = [
        "",
        f"Processor: {document['processor']}. {', '.join(f'{k} {v}' for k, v in document['versions'].items())}.",
        "",
        "| network | plan | split | ONNX Runtime | free sizes | OpenVINO | QONNX | integers | INT8 MACs |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in document["cases"]:
        cells = [_cell(case[engine]) if engine in case else "" for engine in COLUMNS]
        share = f"{case['openvino']['int8_macs']:.1%}"
        lines.append(
            f"| {case['network']} | {case['plan']} | {'yes' if case['split'] else ''} | {' | '.join(cells)} | {share} |"
        )
    errors = document.get("norms", {})
    if errors:
        times = [
            f"{engine} {error / errors['PyTorch']:.1f}"
            for engine, error in errors.items()
            if engine != "PyTorch"
        ]
        lines += [
            "",
            f"An instance norm in float32 is {errors['PyTorch']:.1e} from float64 on average in PyTorch (of values with a standard "
            f"deviation of 1); times as far: {', '.join(times)}.",
        ]
    return [*lines, "", *exceptions(document["cases"])]


def exceptions(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every cell that is not equal, with its numbers and its cause."""
    lines = [
        "| exception | largest logit | labels | codes equal | codes within 1 | labels, in float | labels, float64 | cause |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for case in found:
        for engine in COLUMNS:
            one = case.get(engine, {})
            if one.get("equal", True):
                continue
            codes = [f"{one[key]:.2%}" if key in one else "" for key in ("codes_equal", "codes_within_1")]
            controls = [_cell(one["in_float"]) if "in_float" in one else ""]
            controls += [_cell(case[CONTROL]) if CONTROL in case else ""]
            title = f"{case['network']}, {case['plan']}{', split' if case['split'] else ''}: {engine}"
            cells = [
                f"{one['largest']:.1%}",
                f"{one['labels_differ']:.2%}",
                *codes,
                *controls,
                cause(case, engine),
            ]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def cause(case: Mapping[str, Any], engine: str) -> str:
    """Of an engine's difference, as far as the same file in float tells it; nothing where that was not run."""
    one = case[engine]
    if CONTROL not in case:
        return ""
    in_float = one.get("in_float", one)  # qonnx computes in float anyway
    if in_float["equal"]:
        return "integer kernels"
    more_than_half = 2 * in_float["labels_differ"] >= one["labels_differ"]
    return "float layers" if more_than_half else "float layers, integer kernels"


def norm_errors() -> dict[str, float]:
    """Mean error of an instance norm in float32, against float64: of PyTorch and of the engines, on one random tensor."""
    torch.manual_seed(0)
    image = torch.randn(1, 8, 32, 32, 32) + 1
    norm = nn.InstanceNorm3d(8)
    exact = norm(image.double()).numpy()
    program = torch.onnx.export(
        norm.eval(), (image,), dynamo=True, opset_version=OPSET, input_names=["image"], verbose=False
    )
    assert program is not None
    model = program.model_proto
    found = {
        "PyTorch": norm(image).numpy(),
        "ONNX Runtime": by_onnxruntime(model, image.numpy())[0],
        "OpenVINO": by_openvino(model, image.numpy())[0],
    }
    return {engine: float(np.abs(values - exact).mean()) for engine, values in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix, or write the page; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--em", type=Path, metavar="DIR", help="of unetq data em")
    parser.add_argument("--hippocampus", type=Path, metavar="DIR", help="with images/ and labels/")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results, one file for each case"
    )
    parser.add_argument(
        "--networks", nargs="+", choices=tuple(cases()), metavar="NAME", help="(default: all)"
    )
    parser.add_argument(
        "--page", type=Path, metavar="DIR", default=Path("docs/results"), help="folder of the page"
    )
    options = parser.parse_args(arguments)
    if options.what == "page":
        write_page("exports", collected(options.out), options.page, MARKS, markdown)
        return 0
    if options.em is None or options.hippocampus is None:
        parser.error("run: needs --em and --hippocampus")
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
