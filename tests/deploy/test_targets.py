"""One case for each network and target: what an engine computes is what fake quantization computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup_model
from torch import nn

import monai_unetq as uq
from monai_unetq.deploy.integer import lower, write
from monai_unetq.deploy.openvino import read
from monai_unetq.deploy.qdq import to_qdq
from monai_unetq.deploy.qonnx import quant_attributes, to_qonnx
from monai_unetq.deploy.trace import trace
from monai_unetq.runtime.executions import executions, int8_share
from monai_unetq.runtime.integer import load
from monai_unetq.runtime.verify import labels
from monai_unetq.surgery import observe, quantized_layers
from tests.deploy.networks import NETWORKS, quantized, traced

EVERY = pytest.mark.parametrize("name", NETWORKS)
FLOAT_NORMS = ("dynunet", "segresnet", "unetr", "nnunet residual")
"""Networks with float layers between integer ones, whose sums engines take in another order."""


def by_onnxruntime(model: onnx.ModelProto, image: np.ndarray, optimized: bool = False) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = session.run(None, {"image": image})[0]
    return found


def close(found: np.ndarray, expected: np.ndarray, name: str) -> bool:
    if name not in FLOAT_NORMS:
        return np.array_equal(found, expected)
    return float(np.abs(found - expected).mean()) < 0.01 * float(np.abs(expected).max())


@EVERY
def test_onnx_runtime(name: str) -> None:
    case = traced(name)
    model = to_qdq(case.trace).model
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)
    image, expected = case.image.numpy(), case.logits.numpy()
    assert close(by_onnxruntime(model, image), expected, name)
    assert close(by_onnxruntime(model, image, optimized=True), expected, name)


@EVERY
def test_openvino(name: str) -> None:
    openvino = pytest.importorskip("openvino")
    case = traced(name)
    model = read(to_qdq(case.trace, target="openvino").model)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found, expected = np.array(compiled(case.image.numpy())[0]), case.logits.numpy()
    if name in FLOAT_NORMS:
        # A value near a rounding border may fall to the other side in the last bits, and one norm after another of random
        # weights enlarges that; docs/results/exports.md has the numbers of trained networks.
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95
    else:
        assert np.array_equal(found, expected)
    ran = executions(compiled)
    assert any(one.kind == "Convolution" for one in ran)
    share = int8_share(ran)
    assert share is not None and share >= 0.95


@EVERY
def test_qonnx(name: str) -> None:
    if name == "unetr":
        pytest.skip("qonnx runs node by node: minutes for a transformer")
    case = traced(name)
    model = cleanup_model(ModelWrapper(to_qonnx(case.trace).model))
    found = execute_onnx(model, {model.graph.input[0].name: case.image.numpy()})[model.graph.output[0].name]
    assert close(found, case.logits.numpy(), name)


@EVERY
def test_integers(name: str, tmp_path: Path) -> None:
    case = traced(name)
    if not NETWORKS[name].holds:
        with pytest.raises(ValueError, match="cannot be computed in integers"):
            lower(case.trace)
        return
    write(case.trace, case.network, tmp_path)
    codes, exponents = load(tmp_path)(case.image.numpy())
    assert np.issubdtype(codes.dtype, np.integer)
    column = np.asarray(exponents).reshape(-1, *[1] * (case.image.dim() - 2))
    exact = np.ldexp(codes.astype(np.float64), -column)
    assert np.array_equal(exact.astype(np.float32), case.logits.numpy())


def test_a_split_convolution_stays_one() -> None:
    case = traced("paper")
    lowered = to_qdq(case.trace)
    assert lowered.notes == {}
    operators = [node.op_type for node in lowered.model.graph.node]
    assert operators.count("Conv") == 15 and operators.count("Concat") == 3
    makers = {output: node.op_type for node in lowered.model.graph.node for output in node.output}
    joined = [node for node in lowered.model.graph.node if node.op_type == "Concat"]
    assert {makers[name] for node in joined for name in node.input} == {"QuantizeLinear"}


def test_parts_whose_scales_cannot_meet_become_two_convolutions() -> None:
    network = quantized(NETWORKS["paper"].build, (1, 1, 32, 32), True, scale="free")
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        expected = network(image).numpy()
    lowered = to_qdq(trace(network, image, dynamic=False))
    assert set(lowered.notes) == {f"decoder.{level}.conv1" for level in range(3)}
    assert all("2 convolutions" in note for note in lowered.notes.values())
    assert [node.op_type for node in lowered.model.graph.node].count("Conv") == 18
    found = by_onnxruntime(lowered.model, image.numpy())
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.mean(labels(found) != labels(expected)) < 0.01


@pytest.mark.parametrize("weights", ["ternary", "binary", "pow2-4"])
def test_qonnx_holds_every_weight_format(weights: str) -> None:
    network = quantized(NETWORKS["nnunet plain"].build, (1, 1, 16, 16), True, weights, "int3", "int8")
    image = torch.rand(1, 1, 16, 16)
    model = to_qonnx(trace(network, image, dynamic=False)).model
    kinds = {node.op_type for node in model.graph.node if node.domain}
    assert kinds == ({"Quant", "BipolarQuant"} if weights == "binary" else {"Quant"})
    found = execute_onnx(ModelWrapper(model), {"image": image.numpy()})["logits"]
    with torch.no_grad():
        assert np.array_equal(found, network(image).numpy())


def test_tensorrt_takes_signed_integers_only() -> None:
    case = traced("paper")
    with pytest.raises(ValueError, match=r"encoder\.0\.conv1': its input is unsigned with 256"):
        to_qdq(case.trace, target="tensorrt")
    network = quantized(NETWORKS["nnunet plain"].build, (1, 1, 16, 16), True, image_format="uint7")
    image = torch.rand(1, 1, 16, 16)
    model = to_qdq(trace(network, image, dynamic=False), target="tensorrt").model
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    rounding = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [constants[node.input[2]] for node in rounding]
    assert {zero.dtype for zero in zeros} == {np.dtype(np.int8)} and not any(zero.any() for zero in zeros)
    # Its DequantizeLinear takes no int32, so biases are float; all else that a layer reads was dequantized.
    assert {array.dtype.name for array in constants.values()} == {"int8", "float32"}
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    assert {makers[name] for node in layers for name in node.input[:2]} == {"DequantizeLinear"}
    with torch.no_grad():
        assert np.array_equal(by_onnxruntime(model, image.numpy()), network(image).numpy())


@pytest.mark.parametrize("bias", [True, False])
def test_a_skip_of_8_bits_beside_a_signed_part_keeps_them(bias: bool) -> None:
    def build() -> nn.Module:
        network = Skip()
        if not bias:
            network.last.bias = None
        return network

    image = torch.rand(1, 1, 16, 16)
    network = quantized(build, (1, 1, 16, 16), True, activations="int8", last="int4")
    assert [str(q.number_format) for q in quantized_layers(network)["last"].input_quantizers.values()] == [
        "uint8",
        "int8",
    ]
    traced_network = trace(network, image, dynamic=False)
    with torch.no_grad():
        expected = network(image).numpy()
    both = [(np.dtype(np.uint8), 0), (np.dtype(np.uint8), 128)]

    lowered = to_qdq(traced_network)
    assert lowered.notes == {} and joined_zero_points(lowered.model) == both
    assert [node.op_type for node in lowered.model.graph.node].count("Conv") == 3
    for optimized in (False, True):
        assert np.array_equal(by_onnxruntime(lowered.model, image.numpy(), optimized=optimized), expected)

    openvino = pytest.importorskip("openvino")
    lowered = to_qdq(traced_network, target="openvino")
    assert lowered.notes == {} and joined_zero_points(lowered.model) == both
    compiled = openvino.Core().compile_model(read(lowered.model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.array_equal(np.array(compiled(image.numpy())[0]), expected)
    assert int8_share(executions(compiled)) == 1


def test_a_layer_with_float_input_is_named() -> None:
    network = NETWORKS["paper"].build().eval()
    plan = uq.QuantPlan.uniform(network, weights="int4", activations="float", scale="power-of-two")
    image = torch.rand(1, 1, 16, 16)
    network = uq.calibrate(uq.quantize(network, plan, image), [image])
    notes = to_qdq(trace(network, image, dynamic=False)).notes
    assert set(notes) == set(plan.layers) and set(notes.values()) == {
        "its input is float, and so are its products"
    }
    for name in NETWORKS:
        assert to_qdq(traced(name).trace).notes == {}


def test_four_bit_weights_in_half_the_bytes() -> None:
    case = traced("paper")
    whole, half = to_qdq(case.trace), to_qdq(case.trace, store="int4")
    assert half.model.ByteSize() < whole.model.ByteSize()
    assert half.notes and all("float" in note for note in half.notes.values())
    found = by_onnxruntime(half.model, case.image.numpy())
    assert np.array_equal(found, case.logits.numpy())


def test_openvino_on_seven_bit_weights_and_macs_by_hand() -> None:
    openvino = pytest.importorskip("openvino")
    network = quantized(NETWORKS["nnunet plain"].build, (1, 1, 32, 32), False, "int7", "int8", "int7")
    image = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    model = read(to_qdq(trace(network, image, dynamic=False), target="openvino").model)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        assert np.array_equal(np.array(compiled(image.numpy())[0]), network(image).numpy())
    # 1→4 at 32², 4→8 at 16², 8→4 transposed 2×2 to 32², 8→4 and 4→2 (1×1) at 32²
    by_hand = sorted([9 * 4 * 32**2, 9 * 4 * 8 * 16**2, 4 * 8 * 4 * 16**2, 9 * 8 * 4 * 32**2, 4 * 2 * 32**2])
    assert sorted(one.macs for one in executions(compiled)) == by_hand


@pytest.mark.parametrize(
    ("weights", "spread", "between"),
    [("int4", 1.0, "Clip"), ("int4", 4.0, "Clip"), ("int8", 1.0, "Max"), ("int8", 4.0, "Clip")],
    ids=["one scale", "a scale per channel", "one scale, 8 bits", "a scale per channel, 8 bits"],
)
def test_openvino_leaves_the_epsilon_of_norms_alone(weights: str, spread: float, between: str) -> None:
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, bias=False)
    with torch.no_grad():  # all channels with the same largest weight, or the last ones with a smaller one
        conv.weight.clamp_(-0.1, 0.1)[:, 0, 0, 0] = 0.1
        conv.weight[2:] /= spread
    network = nn.Sequential(conv, nn.InstanceNorm2d(4))
    image = 0.02 * torch.randn(1, 2, 24, 24)  # the outputs' variance is not far above ε
    plan = uq.QuantPlan.uniform(network, weights=weights, activations="int6", scale="power-of-two")
    uq.calibrate(uq.quantize(network, plan, image), [image])
    lowered = to_qdq(trace(network, image, dynamic=False), target="openvino").model
    makers = {output: node for node in lowered.graph.node for output in node.output}
    (norm,) = (node for node in lowered.graph.node if node.op_type == "InstanceNormalization")
    assert makers[norm.input[0]].op_type == between
    compiled = openvino.Core().compile_model(read(lowered), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = network(image).numpy()
    assert np.abs(np.array(compiled(image.numpy())[0]) - expected).max() < 1e-5


def normalized(norm: str) -> nn.Module:
    """A norm that cannot be folded between two convolutions."""
    torch.manual_seed(0)
    layer = nn.InstanceNorm3d(4, affine=True) if norm == "instance" else nn.GroupNorm(2, 4)
    nn.init.uniform_(layer.weight, 0.5, 2.0)
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), layer, nn.LeakyReLU(0.01), nn.Conv3d(4, 2, 1)).eval()


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_norms_on_integers(norm: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    network = normalized(norm)
    image = 0.02 * torch.randn(1, 2, 12, 12, 12)  # the outputs' variance is not far above ε
    plan = uq.QuantPlan.uniform(network, weights="int4", activations="int8", last="int7")
    plan = plan.with_outputs(observe(network, image).normalized_layers(), "int8")
    uq.calibrate(uq.quantize(network, plan, image), [image])
    with torch.no_grad():
        expected = network(image).numpy()
    traced_ = trace(network, image, dynamic=False)
    compiled = openvino.Core().compile_model(
        read(to_qdq(traced_, target="openvino").model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    ran = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kernels = {str(info["layerType"].value): str(info["primitiveType"].value) for info in ran}
    assert kernels["MVN"].endswith("i8")
    model = cleanup_model(ModelWrapper(to_qonnx(traced_).model))
    by_qonnx = execute_onnx(model, {model.graph.input[0].name: image.numpy()})[model.graph.output[0].name]
    by_openvino = np.array(compiled(image.numpy())[0])
    for found in (
        by_openvino,
        by_onnxruntime(to_qdq(traced_).model, image.numpy(), optimized=True),
        by_qonnx,
    ):
        assert np.mean(found != expected) < 1e-3
    uq.pack(network, tmp_path / "model.unetq")
    with torch.no_grad():
        unpacked = uq.unpack(tmp_path / "model.unetq", normalized(norm))(image).numpy()
    assert np.array_equal(unpacked, expected)


def rounded_as(formats: str) -> tuple[nn.Module, torch.Tensor]:
    """One convolution with its input in a format."""
    torch.manual_seed(0)
    network, image = nn.Sequential(nn.Conv2d(2, 3, 3)), torch.randn(1, 2, 9, 9)
    uq.quantize(network, uq.QuantPlan.uniform(network, weights="int4", activations=formats), image)
    return uq.calibrate(network, [image]), image


@pytest.mark.parametrize(
    ("formats", "note"), [("int12", "codes -2048 to 2047 is rounded in float"), ("binary", "-1 to 1")]
)
def test_formats_that_eight_bits_do_not_hold_are_rounded_in_float(formats: str, note: str) -> None:
    network, image = rounded_as(formats)
    lowered = to_qdq(trace(network, image, dynamic=False))
    assert note in lowered.notes["0"]
    with torch.no_grad():
        assert np.array_equal(by_onnxruntime(lowered.model, image.numpy()), network(image).numpy())


def test_the_literal_formula_on_an_input_is_refused() -> None:
    traced_ = trace(*rounded_as("Q2.4:literal"), dynamic=False)
    for lowering in (to_qdq, to_qonnx):
        with pytest.raises(ValueError, match="layer '0': "):
            lowering(traced_)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((-8, 7), (4, 1, 0)), ((0, 15), (4, 0, 0)), ((-1, 1), (2, 1, 1)), ((0, 2), (2, 0, 1)), ((0, 1), (1, 0, 0)), ((-7, 7), (4, 1, 1))],
)  # fmt: skip
def test_bits_signed_and_narrow_of_codes(codes: tuple[int, int], expected: tuple[int, int, int]) -> None:
    bits, attributes = quant_attributes(*codes) or (0, {})
    assert (bits, attributes["signed"], attributes["narrow"]) == expected


def test_codes_without_a_quant() -> None:
    assert quant_attributes(-5, 9) is None


class Skip(nn.Module):
    """A skip and a signed upsampled part, concatenated after padding by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.up, self.last = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(8, 2, 3, padding=1)
        self.enter_act, self.down_act = nn.ReLU(), nn.ReLU()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skip = self.enter_act(self.enter(image))
        up = nn.functional.pad(self.up(self.down_act(self.down(skip))), (0, 0, 0, 0))
        out: torch.Tensor = self.last(torch.cat([skip, up], 1))
        return out


def joined_zero_points(model: onnx.ModelProto) -> list[tuple[np.dtype[Any], int]]:
    """Type and zero point of each part of the only concatenation."""
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    (joined,) = (node for node in model.graph.node if node.op_type == "Concat")
    found = []
    for name in joined.input:
        maker = makers[name]
        while maker.op_type == "Pad":
            maker = makers[maker.input[0]]
        zero = constants[maker.input[2]]
        found.append((zero.dtype, int(zero)))
    return found


def test_a_skip_of_7_bits_beside_a_signed_part_takes_its_type_and_is_rounded_once() -> None:
    image = torch.rand(1, 1, 16, 16)
    network = quantized(Skip, (1, 1, 16, 16), True)
    assert [str(q.number_format) for q in quantized_layers(network)["last"].input_quantizers.values()] == [
        "uint6",
        "int6",
    ]
    model = to_qdq(trace(network, image, dynamic=False)).model
    assert joined_zero_points(model) == [(np.dtype(np.uint8), 128)] * 2
    operators = [node.op_type for node in model.graph.node]
    assert "Pad" not in operators
    assert operators.count("QuantizeLinear") == 4, "image, skip (once for both readers), below, up"
    with torch.no_grad():
        assert np.array_equal(by_onnxruntime(model, image.numpy()), network(image).numpy())
