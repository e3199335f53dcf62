"""Quantizing in place: names, keys, errors that change nothing, other people's networks, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet, UNet
from torch import Tensor, nn

from monai_unetq.formats import QFormat
from monai_unetq.layers import PairedNorm, QuantizedLayer
from monai_unetq.networks import FixedPointUNet
from monai_unetq.parts import WHOLE
from monai_unetq.plan import LayerPlan, QuantPlan
from monai_unetq.surgery import (
    calibrate,
    dequantize,
    fold,
    observe,
    plan_of,
    plan_of_state,
    quantize,
    set_quantizers,
    split,
)
from monai_unetq.surgery.quantize import quantized_layers

IMAGE = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def unet(seed: int = 0, **options: Any) -> FixedPointUNet:
    """A small network with batch norms as after training."""
    torch.manual_seed(seed)
    network = FixedPointUNet(1, 1, **{"width": 2, **options})
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(module.weight, 4.0, 1.0)  # so that activations fill Q6.0
            nn.init.normal_(module.bias, 1.0, 1.0)
            nn.init.normal_(module.running_mean, 0.0, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return network.eval()


@torch.no_grad()
def run(network: nn.Module, image: Tensor = IMAGE) -> Tensor:
    out: Tensor = network(image)
    return out


def snapshot(network: nn.Module) -> tuple[dict[str, type], dict[str, Tensor]]:
    return {n: type(m) for n, m in network.named_modules()}, copy.deepcopy(network.state_dict())


def assert_unchanged(network: nn.Module, before: tuple[dict[str, type], dict[str, Tensor]]) -> None:
    classes, state = snapshot(network)
    assert classes == before[0]
    assert state.keys() == before[1].keys()
    assert all(torch.equal(value, before[1][key]) for key, value in state.items())


def test_in_place_with_names_and_keys_kept() -> None:
    network = unet()
    objects = dict(network.named_modules())
    parameters = dict(network.named_parameters())
    state = copy.deepcopy(network.state_dict())
    assert quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8")) is network
    assert all(network.get_submodule(name) is module for name, module in objects.items())
    assert all(network.get_parameter(name) is parameter for name, parameter in parameters.items())
    new = network.state_dict()
    assert all(torch.equal(new[key], value) for key, value in state.items())
    added = new.keys() - state.keys()
    assert added
    assert all(".input_quantizer." in key or ".weight_quantizer." in key for key in added)
    assert len(quantized_layers(network)) == 15
    assert all(isinstance(m, (nn.Conv2d, QuantizedLayer)) for m in quantized_layers(network).values())


def test_the_rounded_network_is_another_function_on_the_grid() -> None:
    network = unet()
    before = run(network)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8"))
    assert (run(network) - before).abs().max() > 1e-3
    for layer in quantized_layers(network).values():
        weight, _ = layer.effective_parameters()
        assert torch.equal(weight * 16, (weight * 16).round())
        assert weight.min() >= -0.5
        assert weight.max() <= 0.4375


def test_a_float_checkpoint_loads_after_quantization() -> None:
    trained, network = unet(seed=1), unet(seed=2)
    plan = QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8")
    quantize(network, plan)
    missing, unexpected = network.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected
    assert all("_quantizer." in key for key in missing)
    assert torch.equal(run(network), run(quantize(trained, plan)))


def test_activations_after_relu_become_unsigned_and_are_stored_so() -> None:
    network = unet(activation="relu")
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"))
    plan = plan_of(network)
    assert str(plan["encoder.0.conv1"].input) == "Q6.0"  # the image
    assert {str(plan[name].input) for name in plan if name != "encoder.0.conv1"} == {"UQ6.0"}
    codes = {n: m.input_quantizer.format_code.tolist() for n, m in quantized_layers(network).items()}
    assert QFormat.from_code(codes["last"][:4]) == QFormat("UQ6.0")
    network = unet(activation="tanh")
    quantize(network, QuantPlan.uniform(network, "int4", "int6", input="UQ0.8"))
    plan = plan_of(network)
    assert str(plan["encoder.0.conv1"].input) == "UQ0.8"
    assert {str(plan[name].input) for name in plan if name != "encoder.0.conv1"} == {"int6"}


def test_plan_of_gives_the_plan_back() -> None:
    network = unet()
    asked = QuantPlan.uniform(
        network, "int4", "int6", input="UQ0.8", last="int8", keep_float=("encoder.0.*",),
        scale="free", granularity="tensor", learned=True,
    )  # fmt: skip
    quantize(network, asked)
    found = plan_of(network)
    assert (found.scale, found.granularity, found.learned) == ("free", "tensor", True)
    assert set(found) == set(asked) == set(quantized_layers(network))
    assert str(found["last"].weight) == "int8"
    assert type(network.get_submodule("encoder.0.conv1")) is nn.Conv2d
    again = plan_of(quantize(unet(), found))
    assert again == found
    with pytest.raises(ValueError, match="not quantized"):
        plan_of(unet())


class Odd(nn.Module):
    """Holds a layer that never runs and one that cannot be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.idle, self.bilinear = nn.Conv2d(1, 1, 1), nn.Bilinear(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def layer_plan(weight: str = "Q0.4", input: str = "Q6.0") -> LayerPlan:
    return LayerPlan({WHOLE: QFormat(weight)}, {"input": QFormat(input)})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"conv": layer_plan(), "missing": layer_plan()}, "'missing' is not in Odd"),
        (
            {"conv": layer_plan(), "bilinear": layer_plan()},
            "'bilinear' is a Bilinear, expected one of Conv1d",
        ),
        ({"conv": layer_plan(), "norm": layer_plan()}, "'norm' is a BatchNorm2d"),
        ({"conv": layer_plan(), "idle": layer_plan()}, "'idle' did not run"),
        ({"conv": layer_plan("int4", "pow2-4")}, "input of layer 'conv': format 'pow2-4' is for weights"),
    ],
)
def test_errors_leave_the_network_unchanged(layers: dict[str, LayerPlan], message: str) -> None:
    network = Odd()
    before = snapshot(network)
    with pytest.raises(ValueError, match=message):
        quantize(network, QuantPlan(layers))
    assert_unchanged(network, before)


def test_a_refused_format_in_the_last_layer_leaves_the_first_unchanged() -> None:
    network = unet()
    before = snapshot(network)
    plan = QuantPlan.uniform(network, "Q0.4", "Q6.0").with_layers({"last": layer_plan("Q0.4", "pow2-3")})
    with pytest.raises(ValueError, match=r"input of layer 'last': format 'pow2-3' is for weights"):
        quantize(network, plan)
    assert_unchanged(network, before)


@pytest.mark.parametrize(
    ("activation", "asked", "found"),
    [
        ("relu", "ternary", "uternary"),
        ("relu", "binary", "uint1"),
        ("tanh", "ternary", "ternary"),
        ("tanh", "binary", "binary"),
    ],
)
def test_low_bit_activations_lose_their_sign_where_nothing_is_negative(
    activation: str, asked: str, found: str
) -> None:
    plan = plan_of(
        quantize(network := unet(activation=activation), QuantPlan.uniform(network, "pow2-4", asked))
    )
    assert str(plan["encoder.0.conv2"].input) == found
    assert str(plan["encoder.0.conv1"].input) == asked, "the image is signed"
    assert plan.scale == "power-of-two"


@pytest.mark.parametrize("scale", ["power-of-two", "free"])
def test_plan_of_low_bit_networks_reads_back(scale: Any) -> None:
    plan = QuantPlan.uniform(
        unet(), "pow2-4", "ternary", input="UQ0.8", last="binary", scale=scale, learned=True
    )
    network = quantize(unet(), plan)
    assert plan_of(network).scale == scale
    assert plan_of(network).learned
    carried = plan_of_state(network.state_dict())
    assert carried is not None
    assert carried.layers == plan_of(network).layers
    assert carried.scale == scale


@pytest.mark.parametrize("key", ["decoder.1.conv2.weight", "decoder.1.norm2.running_var"])
@pytest.mark.parametrize("weights", ["Q0.4", "int4"])
def test_nan_in_the_network_is_refused(key: str, weights: str) -> None:
    network = unet()
    network.state_dict()[key][0] = float("nan")
    classes = snapshot(network)[0]
    with pytest.raises(ValueError, match=f"'{key}' holds NaN"):
        quantize(network, QuantPlan.uniform(network, weights, "Q6.0"))
    assert snapshot(network)[0] == classes


def test_quantizing_twice_is_refused() -> None:
    network = unet()
    plan = QuantPlan.uniform(network, "Q0.4", "Q6.0")
    quantize(network, plan)
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"'encoder\.0\.conv1' is quantized already; call dequantize"):
        quantize(network, plan)
    assert_unchanged(network, before)


def test_an_example_that_fails_leaves_the_network_unchanged() -> None:
    network = unet()
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"failed on an example of shape \(1, 1, 9, 9\)"):
        quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"), torch.zeros(1, 1, 9, 9))
    assert_unchanged(network, before)


def test_layers_may_be_quantized_in_two_calls() -> None:
    at_once, in_two = unet(), unet()
    plan = QuantPlan.uniform(at_once, "Q0.4", "Q6.0", input="UQ0.8")
    quantize(at_once, plan)
    names = list(plan)
    for part in (names[:6], names[6:]):
        quantize(in_two, QuantPlan({name: plan[name] for name in part}))
    assert plan_of(in_two) == plan_of(at_once)
    assert run(at_once).std() > 0.01
    assert torch.equal(run(in_two), run(at_once))


MONAI: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BasicUNet": (
        lambda: BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4), norm="batch", act="relu"),
        (32, 32),
    ),
    "BasicUNet, defaults": (lambda: BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4)), (32, 32)),
    "UNet, residual units": (
        lambda: UNet(2, 1, 2, channels=(4, 4, 8), strides=(2, 2), num_res_units=2, norm="batch"),
        (16, 16),
    ),
    "UNet, 3D": (lambda: UNet(3, 1, 2, channels=(4, 4), strides=(2,), num_res_units=1), (8, 8, 8)),
    "DynUNet": (lambda: dyn_unet(2, deep_supervision=False), (16, 16)),
    "DynUNet, deep supervision, 3D": (lambda: dyn_unet(3, deep_supervision=True), (8, 8, 8)),
}


def dyn_unet(dimensions: int, deep_supervision: bool) -> nn.Module:
    return DynUNet(
        dimensions, 1, 2, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 4, 4],
        deep_supervision=deep_supervision, deep_supr_num=1,
    )  # fmt: skip


@pytest.mark.parametrize("name", list(MONAI))
def test_networks_of_monai(name: str) -> None:
    build, sizes = MONAI[name]
    torch.manual_seed(0)
    network, image = build().eval(), torch.rand(1, 1, *sizes)
    before, state = run(network, image), set(network.state_dict())
    count = sum(type(m).__name__.startswith("Conv") for m in network.modules() if hasattr(m, "kernel_size"))
    quantize(network, QuantPlan.uniform(network, "int8", "Q8.8"), image)
    layers = quantized_layers(network)
    assert len(layers) == count >= 5
    assert state <= set(network.state_dict())
    after = run(network, image)
    assert after.shape == before.shape
    change = (after - before).abs().max() / before.abs().max()
    assert 0 < change < 0.2  # eight bits are near the float network
    network.train()
    out = network(torch.cat([image, image]))
    (out if isinstance(out, Tensor) else out[0]).square().mean().backward()
    assert all(torch.isfinite(m.weight.grad).all() for m in layers.values() if m.weight.grad is not None)
    assert sum(m.weight.grad is not None for m in layers.values()) >= count - 1
    network.eval()
    dequantize(network)
    assert set(network.state_dict()) == state


class ConvNormAct(nn.Module):
    """Registers its layers under two names, as nnU-Net's ConvDropoutNormReLU does, and runs the second one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.nonlin = nn.ReLU(inplace=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, self.nonlin)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.all_modules(x)
        return out


@pytest.mark.parametrize("name", ["0.conv", "0.all_modules.0"])
def test_a_module_registered_under_two_names(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(ConvNormAct(1, 3), nn.Conv2d(3, 1, 1)).eval()
    before, keys = run(network), set(network.state_dict())
    quantize(network, QuantPlan({name: layer_plan("Q0.2"), "1": layer_plan("Q0.2")}))
    block = network[0]
    assert isinstance(block, ConvNormAct)
    assert block.conv is block.all_modules[0]
    layer = quantized_layers(network)["0.conv"]
    objects: tuple[object, ...] = (layer, layer.paired_norm)
    assert objects[0] is block.conv
    assert objects[1] is block.norm
    assert not torch.equal(run(network), before)
    assert keys <= set(network.state_dict())
    assert set(plan_of(network)) == {"0.conv", "1"}
    dequantize(network)
    assert set(network.state_dict()) == keys
    assert torch.equal(run(network), before)


def test_a_module_planned_under_both_names_is_quantized_once() -> None:
    network = nn.Sequential(ConvNormAct(1, 3), nn.Conv2d(3, 1, 1)).eval()
    quantize(network, QuantPlan({"0.conv": layer_plan(), "0.all_modules.0": layer_plan()}))
    assert set(plan_of(network)) == {"0.conv"}


@pytest.mark.parametrize("options", [{}, {"scale": "free", "learned": True}])
def test_dequantize_is_the_way_back(options: dict[str, Any]) -> None:
    network = unet()
    before, out = snapshot(network), run(network)
    attributes = {name: set(vars(module)) for name, module in network.named_modules()}
    quantize(network, QuantPlan.uniform(network, "int4", "int6", **options))
    for module in network.modules():
        if isinstance(module, PairedNorm):
            module.frozen = True
    assert dequantize(network) is network
    assert_unchanged(network, before)
    assert torch.equal(run(network), out)
    assert {name: set(vars(module)) for name, module in network.named_modules()} == attributes


def test_a_deep_copy_is_independent() -> None:
    network = unet()
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8"))
    before = run(network)
    assert before.std() > 0.01
    twin = copy.deepcopy(network)
    assert torch.equal(run(twin), before)
    for name, layer in quantized_layers(twin).items():
        if layer.paired_norm is not None:
            assert layer.paired_norm is twin.get_submodule(name.replace("conv", "norm"))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    fold(twin)
    assert not torch.equal(run(twin), before)
    assert torch.equal(run(network), before)


def test_state_dict_carries_the_formats_to_another_plan() -> None:
    """Folds of nnU-Net differ in their formats and are loaded into one network object, strictly."""
    first, second = unet(seed=1), unet(seed=2)
    quantize(first, QuantPlan.uniform(first, "Q0.4", "Q6.0", input="UQ0.8"))
    quantize(second, QuantPlan.uniform(second, "int6", "int8", scale="free"))
    for layer in quantized_layers(second).values():
        layer.input_quantizer.set_scale(torch.tensor(0.013))
    outs = run(first), run(second)
    assert not torch.equal(*outs)
    network = quantize(unet(seed=3), QuantPlan.uniform(first, "Q2.2", "Q4.4"))
    for fold_number in (0, 1, 0):
        trained = (first, second)[fold_number]
        network.load_state_dict(copy.deepcopy(trained.state_dict()), strict=True)
        assert torch.equal(run(network), outs[fold_number])
        assert plan_of(network).layers == plan_of(trained).layers


def test_training_step_reaches_every_weight_and_keeps_scales() -> None:
    network = unet().train()
    quantize(network, QuantPlan.uniform(network, "int4", "UQ6.2", learned=True))
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    before = {n: m.weight.detach().clone() for n, m in quantized_layers(network).items()}
    network(IMAGE).square().mean().backward()
    optimizer.step()
    moved = [n for n, m in quantized_layers(network).items() if not torch.equal(m.weight, before[n])]
    assert len(moved) == 15
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_compiled_gives_the_eager_output() -> None:
    network = unet(width=1)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.2", input="UQ0.8"))
    before = run(network)
    assert before.std() > 0.01
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IMAGE), before)


@pytest.mark.parametrize("bias", ["accumulator", "float"])
def test_biases_are_rounded_where_the_plan_says_so(bias: Any) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        network[0].bias.copy_(torch.tensor([0.3, 0.7]))  # type: ignore[operator]
    formats = {"input": QFormat("UQ0.2")}
    quantize(network, QuantPlan({"0": LayerPlan({WHOLE: QFormat("Q0.2")}, formats, bias)}))
    layer = quantized_layers(network)["0"]
    _, found = layer.effective_parameters()
    expected = torch.tensor([0.3125, 0.6875] if bias == "accumulator" else [0.3, 0.7])  # step 2^-2 · 2^-2
    assert found is not None
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-7)
    assert plan_of(network)["0"].bias == bias


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_a_hook_computes_are_not_paired() -> None:
    network = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(1, 2, 3)), nn.BatchNorm2d(2)).eval()
    nn.init.constant_(network[1].weight, 3.0)  # type: ignore[arg-type]
    quantize(network, QuantPlan.uniform(network, "int8", "float"), IMAGE)
    assert not any(isinstance(m, PairedNorm) for m in network.modules())
    before = run(network)
    assert torch.equal(run(fold(network, IMAGE)), before)


def test_transposed_convolutions_take_an_output_size() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(1, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[34, 34])

    network = Up()
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"), IMAGE)
    assert run(network).shape == (2, 2, 34, 34)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"weights": "Q0.4", "activations": "Q6.0"},
        {"weights": "int3", "activations": "int4", "scale": "free", "learned": True},
        {"weights": "Q0.4:literal", "activations": "Q6.0"},
    ],
)
def test_with_its_quantizers_off_a_network_computes_in_float(options: dict[str, Any], training: bool) -> None:
    network = unet()
    quantized = quantize(copy.deepcopy(network), QuantPlan.uniform(network, **options))
    keys = set(quantized.state_dict())
    expected = run(copy.deepcopy(network).train(training))
    assert not torch.allclose(run(copy.deepcopy(quantized).train(training)), expected, rtol=1e-3)
    set_quantizers(quantized, False)
    torch.testing.assert_close(run(copy.deepcopy(quantized).train(training)), expected, rtol=1e-4, atol=1e-4)
    assert set(quantized.state_dict()) == keys
    with pytest.raises(ValueError, match="quantizers off"):
        fold(quantized)
    set_quantizers(quantized, True)
    assert not torch.allclose(run(quantized.train(training)), expected, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "Q0.4", "activations": "Q6.0", "input": "UQ0.8", "last": "int8"},
        {"weights": "int4", "activations": "int6", "scale": "free", "granularity": "tensor"},
    ],
)
def test_a_state_dict_says_which_plan_its_network_has(options: dict[str, Any]) -> None:
    network = unet()
    assert plan_of_state(network.state_dict()) is None
    quantize(network, QuantPlan.uniform(network, **options))
    assert plan_of_state(network.state_dict()) == plan_of(network)


def test_a_damaged_state_dict_is_refused_by_key() -> None:
    network = unet()
    quantize(network, QuantPlan.uniform(network, "int4", "int4"))
    state = network.state_dict()
    del state["last.weight_quantizer.log2_scale"]
    with pytest.raises(ValueError, match=r"'last.weight_quantizer' is incomplete"):
        plan_of_state(state)
    state = network.state_dict()
    state["last.input_quantizer.format_code"] = torch.full((5,), 99, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"'last.input_quantizer.format_code'"):
        plan_of_state(state)


def test_a_float_checkpoint_loads_strictly_into_the_quantized_network() -> None:
    network, other = unet(), unet(seed=1)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"))
    network.load_state_dict(other.state_dict())
    expected = quantize(other, QuantPlan.uniform(other, "Q0.4", "Q6.0"))
    assert torch.equal(run(network), run(expected))


def normalized() -> nn.Module:
    """Two convolutions with instance norms, the second one over a concatenation."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.first_norm = nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4)
            self.down, self.up = nn.Conv2d(4, 4, 2, 2), nn.ConvTranspose2d(4, 4, 2, 2)
            self.second, self.second_norm = nn.Conv2d(8, 4, 3, padding=1), nn.InstanceNorm2d(4)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, image: Tensor) -> Tensor:
            x = torch.relu(self.first_norm(self.first(image)))
            x = torch.cat([x, self.up(torch.relu(self.down(x)))], 1)
            out: Tensor = self.last(torch.relu(self.second_norm(self.second(x))))
            return out

    return Two().eval()


@pytest.mark.parametrize("options", [{}, {"scale": "free"}, {"scale": "free", "learned": True}])
def test_what_norms_read_is_rounded(options: dict[str, Any]) -> None:
    network = normalized()
    split(network, IMAGE)
    plan = QuantPlan.uniform(network, "int4", "int6", **options)
    plan = plan.with_outputs(observe(network, IMAGE).normalized_layers(), "int8")
    calibrate(quantize(network, plan, IMAGE), [IMAGE])
    found = plan_of(network)
    assert [name for name in found if found[name].output] == ["first", "second"]
    assert plan_of_state(network.state_dict()) == replace(found, learned=False)
    seen: list[Tensor] = []
    modules = dict(network.named_modules())
    for norm in ("first_norm", "second_norm"):
        modules[norm].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run(network)
    for name, values in zip(("first", "second"), seen, strict=True):
        quantizer = quantized_layers(network)[name].output_quantizer
        assert quantizer is not None
        codes = values / quantizer.scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert 64 < codes.abs().max() <= 128
    other = normalized()
    split(other, IMAGE)
    quantize(other, plan, IMAGE).load_state_dict(network.state_dict())
    assert torch.equal(run(other), run(network))
    expected = normalized()
    assert torch.allclose(run(set_quantizers(other, False)), run(expected), atol=1e-5)
    assert torch.allclose(run(dequantize(network)), run(expected), atol=1e-5)
    assert network.state_dict().keys() == expected.state_dict().keys()


def test_an_output_in_front_of_a_batch_norm_that_folds_is_refused() -> None:
    network = unet()
    plan = QuantPlan.uniform(network, "int4", "int6").with_outputs(["encoder.0.conv1"], "int8")
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"'encoder.0.conv1' folds the batch norm 'encoder.0.norm1'"):
        quantize(network, plan)
    assert_unchanged(network, before)
