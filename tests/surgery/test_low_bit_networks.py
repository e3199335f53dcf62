"""Networks with binary, ternary and power-of-two weights: trained a step, calibrated, loaded, folded, traced, exported."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import fold, plan_of, quantize, quantized_layers
from monai_unetq.training import calibrate

IMAGE = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
WEIGHTS = ("binary", "ternary", "pow2-3")
ACTIVATIONS = ("float", "binary", "ternary", "Q4.0", "int4")
PAIRS = list(product(WEIGHTS, ACTIVATIONS, ("relu", "tanh")))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": "free", "learned": True},
    {"granularity": "tensor"},
    {"scale": "free"},
    {"learned": True},
    {"scale": "free", "granularity": "tensor"},
    {"scale": "free", "granularity": "tensor", "learned": True},
]
"""Seven: in turn, they do not fall on the same formats again and again."""
SOME = [("binary", "binary", "tanh"), ("ternary", "ternary", "tanh"), ("pow2-3", "ternary", "relu")]


def build(weights: str, activations: str, activation: Any = "relu", **options: Any) -> nn.Module:
    """The papers' U-Net with batch norms as after training, quantized."""
    torch.manual_seed(0)
    network = FixedPointUNet(1, 1, width=4, activation=activation)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.3, 0.3)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.3, 0.6)
    plan = QuantPlan.uniform(network, weights, activations, input="UQ0.8", **options)
    return quantize(network, plan, IMAGE)


def run(network: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = network.eval()(IMAGE)
    return out


def loss_of(network: nn.Module) -> Tensor:
    label = (IMAGE.mean() < IMAGE).float()
    return nn.functional.binary_cross_entropy_with_logits(network(IMAGE), label)


@pytest.mark.parametrize(
    ("number", "weights", "activations", "activation"), [(n, *p) for n, p in enumerate(PAIRS)]
)
def test_a_network_trains_loads_and_folds(
    number: int, weights: str, activations: str, activation: str
) -> None:
    options = OPTIONS[number % len(OPTIONS)]
    network = calibrate(build(weights, activations, activation, **options), [IMAGE])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    loss_of(network.train()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    torch.optim.Adam(network.parameters(), 1e-3).step()
    assert all(
        not torch.equal(network.get_parameter(f"{name}.weight"), before[f"{name}.weight"])
        for name in quantized_layers(network)
    ), "a weight has no gradient"
    assert all(bool(value.isfinite().all()) for value in network.state_dict().values())
    out = run(network)
    assert bool(out.isfinite().all())
    for name, layer in quantized_layers(network).items():
        found = layer.effective_parameters()[0].detach()
        rows = layer.output_major(found).flatten(1) if layer.weight_quantizer.channels else found.view(1, -1)
        levels = layer.weight_quantizer.number_format.levels
        assert max(row.unique().numel() for row in rows) <= levels, name

    # Into a network that was built with other formats (one scale for all stays one for all), bit for bit.
    granularity = options.get("granularity", "channel")
    other = build("int4", "Q6.0", activation, granularity=granularity, learned="learned" not in options)
    other.load_state_dict(network.state_dict(), strict=True)
    assert plan_of(other).layers == plan_of(network).layers
    assert torch.equal(run(other), out)
    assert torch.equal(run(fold(network, IMAGE)), out)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_training_lowers_the_loss(weights: str) -> None:
    """Thirty steps at a fixed batch: also the rounded network follows its gradients."""
    network = calibrate(build(weights, "int4", scale="free"), [IMAGE])
    first = loss_of(network.train()).item()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(network)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.85 * first


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("weights", "activations", "activation"), SOME)
def test_tracing_keeps_the_outputs(weights: str, activations: str, activation: str) -> None:
    network = calibrate(build(weights, activations, activation), [IMAGE]).eval()
    with torch.no_grad():
        traced: Any = torch.jit.trace(network, IMAGE)
        other = torch.rand(1, 1, 32, 24, generator=torch.Generator().manual_seed(1))
        assert torch.equal(traced(IMAGE), network(IMAGE))
        assert torch.equal(traced(other), network(other)), "something of the example was recorded"


@pytest.mark.parametrize(("weights", "activations", "activation"), SOME)
def test_onnx_keeps_the_outputs(weights: str, activations: str, activation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)  # a small network: the exporter takes its time for every operation
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh() if activation == "tanh" else nn.ReLU(),
        nn.Conv2d(4, 2, 3),
    )
    quantize(network, QuantPlan.uniform(network, weights, activations), IMAGE)
    expected = run(calibrate(network, [IMAGE]))
    path = tmp_path / "network.onnx"
    with torch.no_grad():
        torch.onnx.export(network.eval(), (IMAGE,), str(path))
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
