from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from PIL import Image
from torch import nn

import monai_unetq as uq
from monai_unetq.nnunet import Request
from monai_unetq.nnunet.network import (
    example_image,
    float_layers,
    on_batch_norm,
    request_plan,
    requested_network,
    without_deep_supervision,
)
from monai_unetq.nnunet.progress import caption

REQUEST = Request(weights="int4", activations="int6")


def network() -> nn.Module:
    """Three resolutions in 2D, with deep supervision."""
    torch.manual_seed(0)
    return PlainConvUNet(
        1, 3, (4, 4, 4), nn.Conv2d, 3, ((1, 1), (2, 2), (2, 1)), 1, 2, 1, conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
    ).eval()  # fmt: skip


def configuration(strides: Any, patch: list[int]) -> Any:
    return SimpleNamespace(pool_op_kernel_sizes=strides, patch_size=patch)


def test_the_example_is_twice_the_deepest_stride() -> None:
    assert example_image(configuration([[1, 1], [2, 2], [2, 1]], [64, 64]), 3).shape == (1, 3, 8, 4)
    assert example_image(configuration([1, 2, 2], [64, 64, 64]), 1).shape == (1, 1, 8, 8, 8)


def test_layers_of_deep_supervision_alone_stay_float() -> None:
    net = network()
    assert float_layers(net) == ["decoder.seg_layers.0"]
    with without_deep_supervision(net):
        plan = request_plan(net, REQUEST, torch.zeros(1, 1, 8, 4), learned=True)
    assert "decoder.seg_layers.0" not in plan and str(plan["decoder.seg_layers.1"].weight) == "int8"
    first = plan["encoder.stages.0.0.convs.0.conv"]
    assert (str(first.weight), str(first.input)) == ("int8", "int8")
    inner = plan["encoder.stages.1.0.convs.0.conv"]
    assert (str(inner.weight), str(inner.input)) == ("int4", "int6")


def test_what_instance_norms_read_is_rounded_on_request() -> None:
    net = network()
    with without_deep_supervision(net):
        plan = request_plan(net, replace(REQUEST, norms="int8"), torch.zeros(1, 1, 8, 4), learned=True)
        assert all(
            layer.output is None
            for layer in request_plan(net, REQUEST, torch.zeros(1, 1, 8, 4), True).layers.values()
        )
    rounded = {name for name, layer in plan.layers.items() if layer.output is not None}
    assert rounded == {name for name in plan if ".convs." in name} and len(rounded) == 5


def test_deep_supervision_comes_back_after_an_error() -> None:
    net = network()
    with pytest.raises(RuntimeError), without_deep_supervision(net):
        assert isinstance(net(torch.zeros(1, 1, 8, 4)), torch.Tensor)
        raise RuntimeError
    assert len(net(torch.zeros(1, 1, 8, 4))) == 2


@pytest.mark.parametrize("scale", ["power-of-two", "free"])
def test_any_allocation_of_a_request_loads_strictly(scale: Any) -> None:
    request = Request(budget=("weights=4bits",), activations="int6", scale=scale)
    example = torch.zeros(1, 1, 8, 4)
    target = requested_network(network(), request, example, splits=True)
    image = torch.randn(2, 1, 16, 8)
    for bits in (2, 8):
        trained = uq.split(network(), example)
        with without_deep_supervision(trained):
            plan = request_plan(
                trained, Request(weights=f"int{bits}", activations="int3"), example, learned=True
            )
            plan = uq.QuantPlan(plan.layers, scale=scale, granularity=plan.granularity, learned=True)
            uq.calibrate(uq.quantize(trained, plan, example), [image])
        target.load_state_dict(trained.state_dict())
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(trained(image), target(image), strict=True))


def test_batch_norm_and_relu_replace_what_integers_cannot_hold() -> None:
    options = {
        "norm_op": "torch.nn.InstanceNorm3d",
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    plans = {"patch_size": [8, 8, 8], "architecture": {"arch_kwargs": options}}
    before = ConfigurationManager(copy.deepcopy(plans))
    found = on_batch_norm(before).network_arch_init_kwargs
    assert found["norm_op"].endswith("BatchNorm3d") and found["nonlin"] == "torch.nn.ReLU"
    assert before.network_arch_init_kwargs == options


def test_a_caption_stands_above_the_figure(tmp_path: Any) -> None:
    file = tmp_path / "progress.png"
    caption(file, "nothing there")
    assert not file.exists()
    Image.new("RGB", (300, 100), "red").save(file)
    caption(file, "float: epochs 0 to 9. quantized from epoch 10")
    with Image.open(file) as figure:
        assert figure.width == 300 and figure.height > 100
        assert figure.getpixel((150, figure.height - 50)) == (255, 0, 0)
        top = figure.crop((0, 0, 300, figure.height - 100)).convert("L")
        assert top.histogram()[255] > 0 and sum(top.histogram()[:50]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["progress.png"]
