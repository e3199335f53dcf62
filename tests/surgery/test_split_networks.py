"""``split`` on every network: nothing that it computes, learns, stores or can do afterwards is another than before."""

from __future__ import annotations

import copy
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from monai_unetq.layers import QuantizedLayer, SplitLayer
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import (
    Skips,
    dequantize,
    find_skips,
    fold,
    plan_of,
    quantize,
    quantized_layers,
    split,
)
from tests.processes import run_two
from tests.surgery.networks import NETWORKS

NNUNET = [name for name in NETWORKS if name.startswith(("PlainConv", "Residual"))]


@cache
def original(name: str) -> tuple[nn.Module, Skips]:
    """The float network, not to be changed, and what it has to be split."""
    torch.manual_seed(0)
    network = NETWORKS[name].build()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
    return network, find_skips(network, NETWORKS[name].image())


def tensors(out: Any) -> list[Tensor]:
    """What a network returns, deep supervision's outputs and all."""
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def run(network: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors(network.eval()(image))


def step(network: nn.Module, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A training pass and its gradients, the image's first, with the same random numbers every time."""
    network.train()
    image = image.clone().requires_grad_()
    torch.manual_seed(7)
    out = tensors(network(image))
    used = [image, *network.parameters()]
    loss = sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in out)
    assert isinstance(loss, Tensor)
    found = torch.autograd.grad(loss, used, allow_unused=True)
    return [t.detach() for t in out], [
        torch.zeros_like(u) if g is None else g for g, u in zip(found, used, strict=True)
    ]


def assert_agree(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def assert_split(network: nn.Module, skips: Skips) -> None:
    """Exactly the layers that were found are split, each into the parts that were found."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, (SplitLayer, QuantizedLayer))}
    found = {name: layer.parts for name, layer in layers.items() if layer.parts}
    assert found == {entry.layer: entry.parts for entry in skips.splittable}


def forget(network: nn.Module) -> nn.Module:
    """Other numbers in every parameter and buffer of a network."""
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(1)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_a_split_network_computes_and_learns_the_same(name: str) -> None:
    network, skips = original(name)
    image = NETWORKS[name].image(2)
    wanted = run(network, image)
    plain = step(copy.deepcopy(network), image)
    divided = copy.deepcopy(network)
    assert split(divided, image[:1]) is divided
    assert_split(divided, skips)
    assert all(torch.equal(a, b) for a, b in zip(run(divided, image), wanted, strict=True))
    outputs, gradients = step(divided, image)
    assert divided.training
    assert_agree(outputs, plain[0])
    assert_agree(gradients, plain[1])
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoints_copies_and_modes(name: str) -> None:
    network, skips = original(name)
    image = NETWORKS[name].image(2)
    state, wanted = copy.deepcopy(network.state_dict()), run(network, image)
    divided = split(copy.deepcopy(network), image[:1])
    assert list(divided.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in divided.state_dict().items())
    # A checkpoint from before loads after, and the other way, both strictly.
    forget(divided).load_state_dict(state)
    assert_agree(run(divided, image), wanted)
    again = forget(copy.deepcopy(network))
    again.load_state_dict(divided.state_dict())
    assert_agree(run(again, image), wanted)
    twin = copy.deepcopy(divided)
    assert_split(twin, skips)
    assert_agree(run(twin, image), wanted)
    assert find_skips(twin, image[:1]) == skips
    assert_split(split(twin, image[:1]), skips)  # twice is once
    assert all(not module.training for module in divided.modules())
    assert all(module.training for module in divided.train().modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_split_network_runs_under_autocast(name: str) -> None:
    network, _ = original(name)
    image = NETWORKS[name].image(2)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = run(network, image)
        found = run(split(copy.deepcopy(network), image[:1]), image)
    assert any(t.dtype == torch.bfloat16 for t in wanted)
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    assert_agree([t.float() for t in found], [t.float() for t in wanted])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_split_network_is_quantized_part_by_part_and_back(name: str) -> None:
    network, skips = original(name)
    image = NETWORKS[name].image(2)
    wanted = run(network, image)
    rounded = split(copy.deepcopy(network), image[:1])
    quantize(rounded, QuantPlan.uniform(rounded, "int8", "int8"), image[:1])
    layers = quantized_layers(rounded)
    parts = {entry.layer: [part.name for part in entry.parts] for entry in skips.splittable}
    for layer, module in layers.items():
        names = parts.get(layer, ["input"])
        assert list(module.input_quantizers) == list(module.weight_quantizers) == names
        assert len({id(quantizer) for quantizer in module.quantizers}) == 2 * len(names)
    assert parts.keys() <= layers.keys()
    assert find_skips(rounded, image[:1]) == skips
    found = run(rounded, image)
    assert all(t.isfinite().all() for t in found)
    assert any(not torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    twin = copy.deepcopy(rounded)
    forget(twin).load_state_dict(rounded.state_dict())
    assert_agree(run(twin, image), found)
    assert dequantize(rounded) is rounded
    assert not quantized_layers(rounded)
    assert_split(rounded, skips)
    assert all(isinstance(rounded.get_submodule(layer), SplitLayer) for layer in parts)
    assert rounded.state_dict().keys() == network.state_dict().keys()
    assert_agree(run(rounded, image), wanted)


@pytest.mark.parametrize("name", ["FixedPointUNet", "UNet", "PlainConvUNet 3D", "own, two readers"])
def test_a_quantized_split_network_trains_folds_and_runs_under_autocast(name: str) -> None:
    network, skips = original(name)
    image = NETWORKS[name].image(2)
    rounded = split(copy.deepcopy(network), image[:1])
    quantize(rounded, QuantPlan.uniform(rounded, "int8", "int8"), image[:1])
    _, gradients = step(rounded, image)
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients[1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert all(t.isfinite().all() for t in run(rounded, image))
    wanted = run(rounded, image)
    plan = plan_of(rounded)
    for entry in skips.splittable:
        assert plan[entry.layer].channels == tuple((part.name, part.channels) for part in entry.parts)
    fold(rounded)
    assert_agree(run(rounded, image), wanted)
    assert_split(rounded, skips)


@pytest.mark.parametrize("rounds", [False, True])
def test_torch_compile(rounds: bool) -> None:
    name = "own, group norm between"
    network, skips = original(name)
    image = NETWORKS[name].image(2)
    divided = split(copy.deepcopy(network), image)
    if rounds:
        quantize(divided, QuantPlan.uniform(divided, "int8", "int8"), image)
    outputs, gradients = step(copy.deepcopy(divided), image)
    compiled: Any = torch.compile(divided, backend="aot_eager", fullgraph=not rounds)
    found = step(compiled, image)
    assert_agree(found[0], outputs)
    assert_agree(found[1], gradients)
    assert_split(divided, skips)


# nnU-Net registers every convolution under up to four names -------------------------------------------------------


def storages(path: Path) -> list[int]:
    """Bytes of each tensor's memory in a file of ``torch.save``."""
    with zipfile.ZipFile(path) as archive:
        return sorted(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)


def bytes_of_quantizers(layer: QuantizedLayer) -> list[int]:
    """Hand-counted: a weight scale for each output channel and an input scale, 4 bytes each; five codes, 4 bytes
    each, beside every scale; kind, number and channels of each part, 4 bytes each, for weight and input.
    """
    parts = len(layer.parts) or 1
    order = [3 * 4 * len(layer.parts)] * 2 if layer.parts else []
    return [*[4 * layer.out_channels, 4, 5 * 4, 5 * 4] * parts, *order]


@pytest.mark.parametrize("name", NNUNET)
def test_one_object_under_all_its_names(name: str, tmp_path: Path) -> None:
    network, skips = original(name)
    image = NETWORKS[name].image()
    names: dict[int, list[str]] = {}
    divided = copy.deepcopy(network)
    for key, module in divided.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(key)
    torch.save(divided.state_dict(), tmp_path / "float.pt")
    parameters = sum(parameter.numel() for parameter in divided.parameters())
    quantize(split(divided, image), QuantPlan.uniform(divided, "int8", "int8"), image)

    layers = quantized_layers(divided)
    assert max(len(names[id(layer)]) for layer in layers.values()) >= 4
    for layer in layers.values():
        assert len(names[id(layer)]) >= 2 or "decoder" in names[id(layer)][0]
        assert all(divided.get_submodule(key) is layer for key in names[id(layer)])
    assert {id(layer) for layer in layers.values()} <= names.keys()
    assert len({id(layer) for layer in layers.values()}) == len(layers)
    assert sum(parameter.numel() for parameter in divided.parameters()) == parameters
    assert_split(divided, skips)

    torch.save(divided.state_dict(), tmp_path / "quantized.pt")
    added = [size for layer in layers.values() for size in bytes_of_quantizers(layer)]
    assert storages(tmp_path / "quantized.pt") == sorted(storages(tmp_path / "float.pt") + added)


# Two processes ----------------------------------------------------------------------------------------------------

PROCESS = """
import sys
from pathlib import Path
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from monai_unetq.plan import QuantPlan
from monai_unetq.networks import FixedPointUNet
from monai_unetq.surgery import quantize, split

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
result = {}
for kind in ("float", "split", "quantized"):
    torch.manual_seed(0)
    network = FixedPointUNet(1, 1, width=2)
    image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(rank))  # each process its own
    if kind != "float":
        split(network, image)
    if kind == "quantized":
        quantize(network, QuantPlan.uniform(network, "int8", "int8"), image)
    wrapped = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(image).square().mean().backward()
        optimizer.step()
    result.update({f"{kind} {name}": p.detach() for name, p in network.named_parameters()})
torch.save(result, folder / f"{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_train_one_split_network(tmp_path: Path) -> None:
    first, second = run_two(PROCESS, tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(0)
    start = dict(FixedPointUNet(1, 1, width=2).named_parameters())
    assert_agree([first[f"split {key}"] for key in start], [first[f"float {key}"] for key in start])
    weights = [key for key in start if key.endswith("weight")]
    assert all(not torch.equal(first[f"quantized {key}"], start[key]) for key in weights)
