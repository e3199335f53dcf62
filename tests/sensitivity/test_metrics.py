"""The four metrics through their public faces: values by hand, seeds, resuming, processes, memory and mistakes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import monai_unetq as uq
from monai_unetq.layers import QuantizedLayer
from monai_unetq.sensitivity import Sensitivities, fisher, hessian_traces, score_drop, sqnr
from monai_unetq.sensitivity.derivatives import Derivatives, targets
from tests.sensitivity.networks import DeepSupervised, Level, bce, deep_bce, exact

FAST: dict[str, Any] = {"widths": (2, 4), "progress": False}


def batches(count: int = 2, images: int = 2, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shape = (images, 1, size, size)
    return [
        (torch.randn(shape, generator=generator), torch.rand(shape, generator=generator).round())
        for _ in range(count)
    ]


def level() -> nn.Module:
    torch.manual_seed(0)
    return uq.split(Level(), torch.zeros(1, 1, 4, 4))


def numbers(found: Sensitivities) -> dict[str, tuple[float, float]]:
    return {name: (entry.trace, entry.error) for name, entry in found.items()}


def test_traces_are_averages_over_values_and_batches_within_their_error() -> None:
    network, data = level(), batches()
    found = hessian_traces(network, bce, data, tolerance=0, probes=600, **FAST)
    for name in ("enter", "down", "up"):
        for kind in ("weight", "input"):
            whole = [exact(network, bce, image, label, name, kind) for image, label in data]
            entry = found[f"{name}.{kind}"]
            # Inputs: the sum over both images of a batch, over the values of one.
            assert entry.count == whole[0].numel() // (2 if kind == "input" else 1)
            expected = sum(float(block.sum()) for block in whole) / 2 / entry.count
            assert abs(entry.trace - expected) <= 4 * entry.error, (name, kind)
    assert list(found)[-4:] == ["read.weight[skip]", "read.input[skip]", "read.weight[up]", "read.input[up]"]
    assert found.conditions["probes"] == 600 and found.conditions["settled"] is False


def test_omega_is_trace_times_noise_and_never_negative() -> None:
    found = hessian_traces(level(), bce, batches(), tolerance=0, probes=20, **FAST)
    assert any(entry.trace < 0 for entry in found.values())  # few probes
    for entry in found.values():
        for bits in (2, 4):
            assert entry.omega[bits] == max(entry.trace, 0) * entry.noise[bits]
        assert entry.noise[2] > entry.noise[4] > 0


def test_it_stops_when_all_errors_are_small_beside_the_largest_trace() -> None:
    found = hessian_traces(level(), bce, batches(), tolerance=0.5, probes=4000, **FAST)
    assert found.conditions["settled"] is True
    assert 80 <= found.conditions["probes"] < 4000
    for kind in ("weight", "input"):
        entries = [entry for entry in found.values() if entry.kind == kind]
        assert max(e.error for e in entries) <= 0.5 * max(abs(e.trace) for e in entries)


def test_a_seed_determines_everything() -> None:
    one, two, other = (
        hessian_traces(level(), bce, batches(), tolerance=0, probes=20, seed=seed, **FAST)
        for seed in (1, 1, 2)
    )
    assert one == two
    assert numbers(one) != numbers(other)


class InterruptedRunError(Exception):
    """Stands for a signal."""


def test_a_continued_run_is_an_undisturbed_one(tmp_path: Path) -> None:
    state = tmp_path / "state"
    options = {**FAST, "tolerance": 0.0, "probes": 30, "state": state}
    calls = 0

    def interrupting(output: Any, label: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise InterruptedRunError
        return bce(output, label)

    with pytest.raises(InterruptedRunError):
        hessian_traces(level(), interrupting, batches(), **options)
    done = json.loads(state.read_text())["done"]
    assert 0 < done < 10
    resumed = hessian_traces(level(), bce, batches(), **options)
    state.unlink()
    assert resumed == hessian_traces(level(), bce, batches(), **options)
    torch.manual_seed(9)
    with pytest.raises(ValueError, match=r"state: cannot be gone on with: its 'network' is"):
        hessian_traces(uq.split(Level(), torch.zeros(1, 1, 4, 4)), bce, batches(), **options)
    with pytest.raises(ValueError, match="its 'seed' is 0, now it is 3"):
        hessian_traces(level(), bce, batches(), seed=3, **options)
    state.write_text("[]")
    with pytest.raises(ValueError, match="remove it to begin anew"):
        hessian_traces(level(), bce, batches(), **options)


def test_smaller_passes_have_the_same_mean() -> None:
    network, data = level(), batches(1, images=4)
    found = hessian_traces(network, bce, data, tolerance=0, probes=400, images_per_pass=1, **FAST)
    (image, label), entry = data[0], found["enter.input"]
    expected = float(exact(network, bce, image, label, "enter", "input").sum()) / 16
    assert abs(entry.trace - expected) <= 4 * entry.error


def test_deep_supervision_labels_in_lists_and_dictionaries() -> None:
    torch.manual_seed(0)
    image, label = batches(1)[0]
    one = hessian_traces(DeepSupervised(), lambda o, y: deep_bce(o, y[0]), [(image, [label])], probes=10, images_per_pass=1, **FAST)  # fmt: skip
    torch.manual_seed(0)
    two = hessian_traces(DeepSupervised(), lambda o, y: deep_bce(o, y["a"]), [{"image": image, "label": {"a": label}}], probes=10, images_per_pass=1, **FAST)  # fmt: skip
    assert one == two and "head.weight" in one


def test_a_network_with_heads_for_training_only() -> None:
    network = uq.networks.FixedPointUNet(1, 1, width=2)
    network.head = nn.Conv2d(8, 1, 1)
    image, label = batches(1, size=16)[0]
    found = hessian_traces(network, bce, [(image, label)], probes=4, **FAST)
    assert not any(name.startswith("head") for name in found)
    assert len(found) == 30 and all(entry.noise[2] > 0 for entry in found.values())


def test_what_can_be_gone_through_once_is_kept_and_what_dries_up_is_refused() -> None:
    listed = hessian_traces(level(), bce, batches(), probes=20, tolerance=0, **FAST)
    assert hessian_traces(level(), bce, iter(batches()), probes=20, tolerance=0, **FAST) == listed

    class Once:
        """Empty the second time."""

        def __init__(self) -> None:
            self.pairs = batches()

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            pairs, self.pairs = self.pairs, []
            return iter(pairs)

    with pytest.raises(ValueError, match="none the second time"):
        hessian_traces(level(), bce, Once(), probes=4, **FAST)


def test_quantized_and_split_networks_are_measured_in_float_and_left_alone() -> None:
    plain = level()
    expected = hessian_traces(plain, bce, batches(), probes=10, **FAST)
    network = uq.quantize(plain, uq.QuantPlan.uniform(plain, "int4", "int6"), torch.zeros(1, 1, 4, 4))
    uq.calibrate(network, batches())
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    modes = [module.training for module in network.modules()]
    output = network(batches()[0][0])
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    required = [parameter.requires_grad for parameter in network.parameters()]
    assert hessian_traces(network, bce, batches(), probes=10, **FAST) == expected
    fisher(network, bce, batches(), **FAST)
    sqnr(network, batches(), widths=(2, 4))
    score_drop(network, lambda o, y: -float(bce(o, y)), batches(), **FAST)
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == required
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.equal(network(batches()[0][0]), output)


def test_fisher_is_the_mean_squared_gradient() -> None:
    network = level().eval()
    found = fisher(network, bce, batches(), **FAST)
    weight = network.get_submodule("down").get_parameter("weight")
    squares = []
    for image, label in batches():
        for one, truth in zip(image.split(1), label.split(1), strict=True):
            (gradient,) = torch.autograd.grad(bce(network(one), truth), weight)
            squares.append(float(gradient.square().mean()))
    assert found["down.weight"].trace == pytest.approx(sum(squares) / 4, rel=1e-4)
    assert found["down.weight"].error == pytest.approx(float(torch.tensor(squares).std()) / 2, rel=1e-3)
    entry = found["down.weight"]
    assert entry.omega[2] == entry.trace * entry.noise[2]
    (together,) = {fisher(network, bce, batches(1), images_per_pass=2, **FAST)["down.weight"].error}
    assert together == 0.0  # of one pass there is none


def test_sqnr_is_noise_over_power() -> None:
    network = level()
    found = sqnr(network, [image for image, _ in batches()], widths=(3,))
    weight = network.get_submodule("down").get_parameter("weight")
    entry = found["down.weight"]
    assert entry.omega[3] == pytest.approx(entry.noise[3] / float(weight.detach().square().sum()), rel=1e-6)
    image = torch.cat([image for image, _ in batches()])
    entry = found["enter.input"]
    assert entry.omega[3] == pytest.approx(entry.noise[3] / (float(image.square().sum()) / 4), rel=1e-6)


class OneMatters(nn.Module):
    """The second layer's result is a millionth of the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.first(image) + 1e-6 * self.second(image)
        return out


def test_score_drop_finds_the_layer_that_matters() -> None:
    torch.manual_seed(0)
    network = OneMatters().eval()
    data = [(image, network(image).detach()) for image, _ in batches()]
    found = score_drop(network, lambda o, y: 100 - float((o - y).abs().mean()), data, **FAST)
    assert found.conditions["score"] == pytest.approx(100)
    assert found["first.weight"].omega[2] > found["first.weight"].omega[4] > 1e-3
    assert found["second.weight"].omega[2] < 1e-4
    assert math.isnan(found["first.weight"].trace)
    expected = score_drop(
        network, lambda o, y: 100 - float((o - y).abs().mean()), data, without=["second"], **FAST
    )
    assert list(expected) == ["first.weight", "first.input"]
    # By hand: one tensor rounded, the others not.
    plan = uq.QuantPlan.uniform(network, "int2", "float", keep_float=["second"])
    rounded = uq.calibrate(uq.quantize(OneMatters().eval(), plan, data[0][0]), [image for image, _ in data])
    rounded.load_state_dict(network.state_dict(), strict=False)
    for layer in rounded.modules():
        if isinstance(layer, QuantizedLayer):
            layer.calibrate_weight()
    by_hand = sum(float((rounded(image) - label).abs().mean()) for image, label in data) / 2
    assert found["first.weight"].omega[2] == pytest.approx(by_hand, rel=0.02)


def test_a_score_that_is_nan_is_named() -> None:
    with pytest.raises(ValueError, match="the score is nan of the float network"):
        score_drop(level(), lambda o, y: math.nan, batches(), **FAST)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "no batch was given"),
        ([torch.zeros(1, 1, 4, 4)], {}, "a batch has no label"),
        ([{"image": torch.zeros(1, 1, 4, 4)}], {}, "a batch has no label"),
        ([(torch.full((1, 1, 4, 4), math.nan), 0)], {}, "batch 0 holds NaN or infinity"),
        (None, {"without": ["nothing*"]}, "'nothing\\*' matches none of the layers"),
        (None, {"without": ["*"]}, "no layer to measure"),
        (None, {"widths": (1, 4)}, "between 2 and 16"),
        (None, {"images_per_pass": 0}, "images_per_pass is 0"),
        (None, {"probes": 1}, "probes is 1"),
        (None, {"tolerance": -1}, "tolerance is -1"),
    ],
)
def test_arguments_out_of_range(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hessian_traces(level(), bce, batches() if data is None else data, **{**FAST, **options})


PROGRAM = """
import sys, torch
from torch import distributed
from monai_unetq.sensitivity import hessian_traces
from tests.sensitivity.networks import bce
from tests.sensitivity.test_metrics import batches, level
distributed.init_process_group("gloo")
rank = distributed.get_rank()
def mistaken(output, label):
    return bce(output, label) * (float("nan") if rank == 1 else 1)
options = dict(tolerance=0, probes=40, widths=(2, 4))
found = hessian_traces(level(), bce, batches(3), **options, state=sys.argv[1] + ".state")
found.save(f"{sys.argv[1]}.{rank}")
try:
    hessian_traces(level(), mistaken, batches(3), **options)
except ValueError as error:
    open(f"{sys.argv[1]}.{rank}.error", "w").write(str(error))
distributed.destroy_process_group()
"""


def test_two_processes_find_what_one_finds_and_fail_together(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "found")],
        capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = hessian_traces(level(), bce, batches(3), tolerance=0, probes=40, **FAST)
    for rank in (0, 1):
        found = Sensitivities.load(tmp_path / f"found.{rank}")
        assert found.conditions == expected.conditions
        for name, (trace, error) in numbers(expected).items():
            assert (found[name].trace, found[name].error) == pytest.approx((trace, error), rel=1e-4, abs=1e-9)
        assert "the loss is nan" in (tmp_path / f"found.{rank}.error").read_text()
    assert (tmp_path / "found.state").exists()


def test_the_sum_of_all_traces_is_pyhessians() -> None:
    peer = pytest.importorskip("pyhessian", reason="PyHessian is a peer of the benchmarks")
    torch.manual_seed(0)
    network = uq.networks.FixedPointUNet(1, 1, width=2)
    image = torch.randn(4, 1, 16, 16)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):  # to where the trace is far from 0
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(network(image), image).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    network.eval()
    found = hessian_traces(network, F.mse_loss, [(image, image)], tolerance=0, probes=100, **FAST)
    ours = [entry for entry in found.values() if entry.kind == "weight"]
    total, variance = sum(e.trace * e.count for e in ours), sum((e.error * e.count) ** 2 for e in ours)
    weights = {id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d)}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in weights)
    theirs = torch.tensor(
        peer.hessian(network, F.mse_loss, data=(image, image), cuda=False).trace(maxIter=80, tol=-math.inf)
    )
    error = math.sqrt(variance + float(theirs.var()) / len(theirs))
    assert abs(total - float(theirs.mean())) <= 4 * error
    assert error < 0.25 * abs(total)


class Peak(TorchDispatchMode):
    """Bytes of all tensors alive at once, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: Any = WeakIdKeyDictionary()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.storages:
                    size = storage.nbytes()
                    self.storages[storage] = size
                    self.now += size
                    weakref.finalize(storage, self.free, size)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, size: int) -> None:
        self.now -= size


def test_a_pass_takes_less_than_three_times_the_memory_of_a_training_step() -> None:
    torch.manual_seed(0)
    network = BasicUNet(2, 1, 1, (8, 8, 16, 32, 64, 8))
    image = torch.randn(2, 1, 64, 64)
    label = (image > 0).float()
    optimizer = torch.optim.Adam(network.parameters())
    with Peak() as training:
        bce(network(image), label).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    network.eval()
    wanted = targets([n for n, m in network.named_modules() if isinstance(m, nn.modules.conv._ConvNd)], ())
    found = Derivatives(network, bce, wanted)
    with Peak() as probing:
        found.products(image, label, [1, 2])
    print(f"memory of a pass over that of a training step: {probing.peak / training.peak:.2f}")
    assert probing.peak <= 3 * training.peak
