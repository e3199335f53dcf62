"""``attach_supervision`` and ``strip``: heads read what the decoder reads, train what makes the skips, leave no trace."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from monai_unetq.deploy import pack
from monai_unetq.formats import QFormat
from monai_unetq.layers import QuantizedLayer, SupervisionHead
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import LayerPlan, QuantPlan
from monai_unetq.surgery import (
    SupervisedOutput,
    attach_supervision,
    attach_teacher,
    calibrate,
    dequantize,
    find_skips,
    fold,
    inference_state,
    plan_of,
    quantize,
    quantized_layers,
    set_quantizers,
    split,
    strip,
)
from monai_unetq.training import SkipSupervisionLoss, freeze_norms
from tests.processes import run_two
from tests.surgery.networks import NETWORKS, Level

UNBATCHED = "own, unbatched"
SUPERVISED = [name for name, case in NETWORKS.items() if case.parts and name != UNBATCHED]
FEW = ["FixedPointUNet", "UNet", "PlainConvUNet 3D", "own, two readers"]
CASES = [
    *[(name, "float") for name in SUPERVISED],
    *[(name, kind) for name in FEW for kind in ("split", "quantized", "split and quantized")],
]


@cache
def built(name: str, kind: str = "float") -> nn.Module:
    """The network without heads, not to be changed."""
    image = NETWORKS[name].image(2)
    if kind == "float":
        torch.manual_seed(0)
        network = NETWORKS[name].build()
        for module in network.modules():  # nnU-Net begins residual blocks with a norm that multiplies with 0
            if isinstance(module, (nn.InstanceNorm2d, nn.InstanceNorm3d)) and module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return network
    network = make(name)
    if "split" in kind:
        split(network, image[:1])
    if "quantized" in kind:
        calibrate(quantize(network, QuantPlan.uniform(network, "int6", "int6"), image[:1]), [image])
    return network


@cache
def supervised(name: str, kind: str) -> nn.Module:
    """The network with heads of three classes, not to be changed."""
    network = make(name, kind)
    torch.manual_seed(1)
    assert attach_supervision(network, NETWORKS[name].image(), num_classes=3) is network
    return network


def make(name: str, kind: str = "float") -> nn.Module:
    return copy.deepcopy(built(name, kind))


def make_supervised(name: str, kind: str = "float") -> nn.Module:
    return copy.deepcopy(supervised(name, kind))


@cache
def skips_of(name: str) -> dict[str, tuple[int, ...]]:
    """The layer that makes each skip → the skip's resolution; the image is none."""
    found = find_skips(built(name), NETWORKS[name].image()).splittable
    return {
        part.source: entry.resolution
        for entry in found
        for part in entry.parts
        if part.name.startswith("skip") and part.source
    }


def tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def same(found: Any, wanted: Any) -> bool:
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def train(network: nn.Module, image: Tensor) -> Any:
    """A training pass, with the same random numbers every time."""
    torch.manual_seed(7)
    return network.train()(image)


def evaluate(network: nn.Module, image: Tensor) -> Any:
    with torch.no_grad():
        return network.eval()(image)


def weighted(outputs: Any) -> Tensor:
    """A sum in which every number counts otherwise, so that no norm makes its gradient vanish."""
    total = sum(
        (t.float() * torch.linspace(-1, 1.5, t.numel()).view(t.shape)).sum() for t in tensors(outputs)
    )
    assert isinstance(total, Tensor)
    return total


def gradients(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Of everything that the network returns in training."""
    network.zero_grad()
    weighted(train(network, image)).backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def hooks(network: nn.Module) -> list[int]:
    """How many entries each module has in torch's books of forward hooks, and in our taps."""
    return [
        len(value)
        for module in network.modules()
        for key, value in vars(module).items()
        if key.startswith(("_forward_hooks", "_forward_pre_hooks", "taps"))
    ]


# What the heads are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_stand_beside_the_same_output_in_training_and_nowhere_else(name: str, kind: str) -> None:
    plain, network = make(name, kind), make_supervised(name, kind)
    image = NETWORKS[name].image(2)
    out = train(network, image)
    assert isinstance(out, SupervisedOutput)
    assert same(out.prediction, train(plain, image))
    assert [tuple(logits.shape) for logits in out.skips] == [(2, 3, *r) for r in skips_of(name).values()]
    assert same(evaluate(network, image), evaluate(plain, image))


@pytest.mark.parametrize("name", SUPERVISED)
def test_heads_train_themselves_and_all_that_makes_the_skips(name: str) -> None:
    network, image = make_supervised(name), NETWORKS[name].image(2)
    made: list[Tensor] = []
    for source in skips_of(name):
        network.get_submodule(source).register_forward_hook(lambda *args: made.append(args[-1]))
    out = train(network, image)
    parameters = dict(network.named_parameters())
    reached = torch.autograd.grad(
        weighted(made), list(parameters.values()), retain_graph=True, allow_unused=True
    )
    pairs = zip(parameters.items(), reached, strict=True)
    makers = {n for (n, p), gradient in pairs if gradient is not None and p.dim() > 1}
    assert makers
    weighted(out.skips).backward()
    heads = [head for head in network.modules() if isinstance(head, SupervisionHead)]
    assert len(heads) == len(skips_of(name))
    for parameter in [*(parameters[n] for n in makers), *(p for head in heads for p in head.parameters())]:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["quantized", "split and quantized"])
@pytest.mark.parametrize(("name", "first"), [("FixedPointUNet", "skip"), ("PlainConvUNet", "up")])
def test_a_head_reads_the_skip_as_the_decoders_quantizer_rounded_it(name: str, first: str, kind: str) -> None:
    network, image = make_supervised(name, kind), NETWORKS[name].image(2)
    heads = [head for head in network.modules() if isinstance(head, SupervisionHead)]
    layers = [network.get_submodule(entry.layer) for entry in find_skips(network, image[:1]).splittable]
    read: dict[nn.Module, Tensor] = {}
    for module in [*heads, *layers]:
        module.register_forward_pre_hook(lambda module, args: read.update({module: args[0].detach()}))

    def of_skip(tensor: Tensor) -> Tensor:
        channels = tensor.shape[1] // 2 if name == "PlainConvUNet" else heads[number].weight.shape[1]
        return tensor[:, :channels] if first == "skip" else tensor[:, -channels:]

    train(network, image)
    for number, layer in enumerate(layers):
        assert isinstance(layer, QuantizedLayer) and bool(layer.parts) == ("split" in kind)
        raw = of_skip(read[layer])
        rounded = (
            layer.input_quantizers["skip"](raw)
            if layer.parts
            else of_skip(layer.input_quantizer(read[layer]))
        )
        assert torch.equal(read[heads[number]], rounded)
        assert not torch.equal(rounded, raw)
    train(set_quantizers(network, False), image)  # the float phase
    for number, layer in enumerate(layers):
        assert torch.equal(read[heads[number]], of_skip(read[layer]))


def test_a_head_reads_the_whole_skip_where_the_plan_cuts_the_input_elsewhere() -> None:
    """Of 4 channels of the skip and 8 of the upsampled path the plan makes parts of 3 and 9."""
    torch.manual_seed(0)
    network, image = FixedPointUNet(1, 1, width=4), torch.rand(2, 1, 32, 32)
    whole = QuantPlan.uniform(network, "int4", "uint4")
    parts = {"skip": QFormat("uint2"), "up": QFormat("uint4")}
    cut = LayerPlan(dict.fromkeys(parts, QFormat("int4")), parts, channels=(("skip", 3), ("up", 9)))
    quantize(network, replace(whole, layers={**whole.layers, "decoder.2.conv1": cut}), image)
    calibrate(network, [image])
    attach_supervision(network, image)
    head = [module for module in network.modules() if isinstance(module, SupervisionHead)][-1]
    layer = network.get_submodule("decoder.2.conv1")
    assert isinstance(layer, QuantizedLayer)
    read: dict[nn.Module, Tensor] = {}
    for module in (head, layer):
        module.register_forward_pre_hook(lambda module, args: read.update({module: args[0].detach()}))
    train(network, image)
    given = read[layer]
    rounded = [layer.input_quantizers["skip"](given[:, :3]), layer.input_quantizers["up"](given[:, 3:4])]
    assert torch.equal(read[head], torch.cat(rounded, 1))


@pytest.mark.parametrize(("name", "heads"), [("own, two readers", 1), ("own, five parts", 1), ("UNETR", 4)])
def test_a_skip_that_is_read_twice_has_one_head(name: str, heads: int) -> None:
    out = train(make_supervised(name), NETWORKS[name].image(2))
    assert len(out.skips) == heads < sum(part.count("skip") for part in NETWORKS[name].parts)


def test_the_image_is_no_skip_to_learn_from() -> None:
    network = make_supervised("own, nested")  # its concatenation: image, skip, up
    shapes = [tuple(p.shape) for p in network.get_submodule("skip_supervision").parameters()]
    assert shapes == [(3, 4, 3, 3), (3,)]


def nnunet(dimensions: int, features: list[int]) -> nn.Module:
    """A network as nnU-Net plans it by default: full width, strides of 2."""
    architectures: Any = importlib.import_module("dynamic_network_architectures.architectures.unet")
    convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    stages = len(features)
    network: nn.Module = architectures.PlainConvUNet(
        1, stages, features, convolution, 3, [1] + [2] * (stages - 1), 2, 3, [2] * (stages - 1), conv_bias=True
    )  # fmt: skip
    return network


@pytest.mark.parametrize(
    ("build", "shape", "classes"),
    [
        (partial(FixedPointUNet, 1, 1, width=16), (1, 1, 64, 64), 1),
        (partial(FixedPointUNet, 1, 1, width=64), (1, 1, 64, 64), 1),
        (partial(nnunet, 2, [32, 64, 128, 256, 512, 512, 512, 512]), (1, 1, 256, 256), 3),
        (partial(nnunet, 3, [32, 64, 128, 256, 320, 320]), (1, 1, 64, 64, 64), 3),
    ],
)
def test_heads_are_at_most_a_hundredth_of_the_parameters(
    build: Callable[[], nn.Module], shape: tuple[int, ...], classes: int
) -> None:
    with torch.device("meta"):
        network, example = build(), torch.zeros(shape)
    before = sum(p.numel() for p in network.parameters())
    attach_supervision(network, example, classes)
    heads = sum(p.numel() for p in network.get_submodule("skip_supervision").parameters())
    assert 0 < heads <= 0.01 * before


# Gone without a trace ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] != "float"])
def test_a_stripped_network_is_one_that_never_had_heads(name: str, kind: str) -> None:
    plain, network = make(name, kind), make_supervised(name, kind)
    image = NETWORKS[name].image(2)
    assert hooks(network) != hooks(plain)
    assert strip(network) is network
    assert hooks(network) == hooks(plain) and not any(hooks(network))
    assert network.state_dict().keys() == plain.state_dict().keys()
    modules = dict(network.named_modules(remove_duplicate=False))
    assert {n: type(m) for n, m in modules.items()} == {
        n: type(m) for n, m in plain.named_modules(remove_duplicate=False)
    }
    assert all(vars(modules[n]).keys() == vars(m).keys() for n, m in plain.named_modules())
    assert same(evaluate(network, image), evaluate(plain, image))
    assert same(train(network, image), train(plain, image))
    assert strip(network) is network  # twice is once


@pytest.mark.parametrize(
    ("name", "kind"), [("FixedPointUNet", "float"), ("own, two readers", "split and quantized")]
)
def test_the_exported_graph_of_a_stripped_network_is_the_plain_one(name: str, kind: str) -> None:
    plain, network = make(name, kind).eval(), make_supervised(name, kind)
    image = NETWORKS[name].image(2)
    train(network, image)
    graphs = [str(torch.export.export(n.eval(), (image,)).graph) for n in (strip(network), plain)]
    assert graphs[0] == graphs[1]


def test_heads_come_and_go_again() -> None:
    name = "FixedPointUNet"
    network, image = make(name, "split and quantized"), NETWORKS[name].image(2)
    for classes in (1, 4):
        out = train(attach_supervision(network, image[:1], classes), image)
        assert [logits.shape[1] for logits in out.skips] == [classes] * 3
        strip(network)
    assert dequantize(network) is network
    assert isinstance(train(network, image), Tensor)


@pytest.mark.parametrize("wrap", [DataParallel, AveragedModel, partial(torch.compile, backend="eager")])
def test_heads_are_found_within_what_wraps_the_network(wrap: Callable[[nn.Module], Any]) -> None:
    network = make_supervised("FixedPointUNet")
    wrapped = wrap(network)
    state = inference_state(wrapped)
    with pytest.raises(ValueError, match=r"call strip\(network\) first"):
        fold(wrapped)
    assert strip(wrapped) is wrapped
    assert not any("supervision" in name for name, _ in wrapped.named_modules()) and not any(hooks(wrapped))
    assert state.keys() == wrapped.state_dict().keys()


class TwoNames(nn.Module):
    """Holds one network under two names, as nnU-Net holds its encoder."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.again = network, network


def test_heads_of_a_network_with_two_names_go_at_once() -> None:
    holder = TwoNames(make_supervised("FixedPointUNet"))
    plain = TwoNames(make("FixedPointUNet"))
    assert inference_state(holder).keys() == strip(holder).state_dict().keys() == plain.state_dict().keys()


# Copies and checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("kind", ["float", "split and quantized"])
def test_a_copy_has_heads_of_its_own(kind: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    name = "FixedPointUNet"
    network, image = make_supervised(name, kind), NETWORKS[name].image(2)
    twin = duplicate(network)
    wanted = train(
        copy.deepcopy(network), image
    )  # of a copy, because a pass moves the batch norms' statistics
    assert same(train(twin, image), wanted)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    changed = train(twin, image)
    assert isinstance(changed, SupervisedOutput) and not any(logits.any() for logits in changed.skips)
    strip(twin)
    assert not any(hooks(twin)) and isinstance(train(twin, image), Tensor)
    assert same(train(network, image), wanted)


@pytest.mark.parametrize("name", FEW)
def test_checkpoints_hold_the_heads_and_inference_states_do_not(name: str) -> None:
    plain, image = make(name, "split and quantized"), NETWORKS[name].image(2)
    network = make_supervised(name, "split and quantized")
    wanted, state = train(network, image), copy.deepcopy(network.state_dict())
    torch.manual_seed(2)
    again = attach_supervision(copy.deepcopy(plain), image[:1], num_classes=3)
    assert not same(train(again, image).skips, wanted.skips)
    again.load_state_dict(state)
    assert same(train(again, image), train(network, image))
    kept = inference_state(network)
    assert kept.keys() == plain.state_dict().keys() < state.keys()
    plain.load_state_dict(kept)
    assert same(evaluate(plain, image), evaluate(network, image))
    assert isinstance(network.train()(image), SupervisedOutput)


# In a training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "split and quantized"])
@pytest.mark.parametrize("name", FEW)
def test_heads_run_under_autocast(name: str, kind: str) -> None:
    network, image = make_supervised(name, kind), NETWORKS[name].image(2)
    wanted = train(network, image)
    with torch.autocast("cpu", torch.bfloat16):
        found = train(network, image)
    assert {logits.dtype for logits in found.skips} == {torch.bfloat16}
    for half, full in zip(found.skips, wanted.skips, strict=True):
        limit = 0.1 if kind == "float" else 2  # values close to the middle are rounded the other way
        assert (half - full).abs().max() < limit * full.abs().max()
    weighted(found).backward()


class CastWithin(Level):
    """Chooses half precision by itself."""

    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(image)


@pytest.mark.parametrize("network", [CastWithin(), Level().bfloat16()])
def test_heads_keep_their_precision_where_the_network_chose_another(network: nn.Module) -> None:
    image = torch.rand(1, 1, 16, 16, dtype=next(network.parameters()).dtype)
    out = train(attach_supervision(network, image), image)
    assert out.prediction.dtype == torch.bfloat16
    assert out.skips[0].dtype == torch.float32
    weighted(out).backward()


class Keyword(Level):
    """Calls its convolution with a keyword."""

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.read(input=torch.cat([skip, up], 1))
        return out


def test_a_layer_may_be_called_with_a_keyword() -> None:
    image = torch.rand(1, 1, 16, 16)
    assert train(attach_supervision(Keyword(), image), image).skips[0].shape == image.shape


def test_images_of_monai_and_other_sizes_and_layouts_are_taken() -> None:
    network = make_supervised("FixedPointUNet")
    for image in (MetaTensor(torch.rand(1, 1, 24, 40)), torch.rand(3, 1, 8, 8)):
        out = train(network, image)
        assert [logits.shape[2] for logits in out.skips] == [image.shape[2] // n for n in (4, 2, 1)]
    network.to(memory_format=torch.channels_last)
    image = torch.rand(2, 1, 16, 16).to(memory_format=torch.channels_last)
    assert all(gradient.isfinite().all() for gradient in gradients(network, image).values())


def test_without_gradients_it_runs_in_training_mode_too() -> None:
    network = make_supervised("FixedPointUNet")
    with torch.no_grad():
        out = train(network, NETWORKS["FixedPointUNet"].image(2))
    assert isinstance(out, SupervisedOutput) and not out.skips[0].requires_grad


def test_two_passes_may_come_before_one_step() -> None:
    network = make_supervised("own, two readers")
    first, second = torch.rand(2, 1, 1, 32, 32)
    apart = [gradients(network, image) for image in (first, second)]
    network.zero_grad()
    a, b = train(network, first), train(network, second)
    assert not same(a.skips, b.skips)
    (weighted(a) + weighted(b)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name])


class BrokenOffError(Exception):
    """As if memory had run out."""


def test_a_pass_that_is_broken_off_does_no_harm() -> None:
    name = "FixedPointUNet"
    network, image = make_supervised(name), NETWORKS[name].image(2)
    wanted = train(network, image)

    def stop(*_: Any) -> None:
        raise BrokenOffError

    handle = network.get_submodule("last").register_forward_hook(stop)
    for again in (train, evaluate, train):
        with pytest.raises(BrokenOffError):
            train(network, image)
        twin = copy.deepcopy(network)
        handle.remove()
        twin.get_submodule("last")._forward_hooks.clear()
        assert same(train(twin, image), wanted)
        found = again(network, image)
        assert same(found, wanted) if again is train else isinstance(found, Tensor)
        handle = network.get_submodule("last").register_forward_hook(stop)


def test_it_compiles() -> None:
    torch._dynamo.reset()  # what was compiled before knows of no hooks
    name = "own, group norm between"
    network, image = make_supervised(name), NETWORKS[name].image(2)
    wanted = train(network, image), gradients(network, image), evaluate(network, image)
    compiled: Any = torch.compile(network, backend="aot_eager", fullgraph=True)
    found = train(compiled, image)
    assert isinstance(found, SupervisedOutput)
    torch.testing.assert_close(found, wanted[0])
    torch.testing.assert_close(list(gradients(compiled, image).values()), list(wanted[1].values()))
    torch.testing.assert_close(evaluate(compiled, image), wanted[2])
    assert isinstance(train(strip(compiled), image), Tensor)


def save_memory(network: nn.Module, blocks: str, reentrant: bool) -> nn.Module:
    """Compute some blocks of a ``FixedPointUNet`` once more in the backward pass."""
    for block in network.get_submodule(blocks).children():
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
    return network


@pytest.mark.parametrize("kind", ["float", "split and quantized"])
def test_checkpointed_networks_learn_the_same(kind: str) -> None:
    name = "FixedPointUNet"
    network, image = make_supervised(name, kind), NETWORKS[name].image(2).requires_grad_()
    freeze_norms(
        network, 1, 1, 0.0
    )  # a pair rounds by its running statistics, which a second pass moves again
    wanted = gradients(copy.deepcopy(network), image)
    saving = save_memory(save_memory(copy.deepcopy(network), "encoder", False), "decoder", False)
    found = gradients(saving, image)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    found = gradients(
        save_memory(copy.deepcopy(network), "encoder", True), image
    )  # the heads read outside of it
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("blocks", ["decoder", "decoder.1"])
@pytest.mark.parametrize("kind", ["float", "split and quantized"])
def test_reentrant_checkpoints_that_would_cut_heads_off_are_an_error(kind: str, blocks: str) -> None:
    name = "FixedPointUNet"
    network, image = make_supervised(name, kind), NETWORKS[name].image(2).requires_grad_()
    if blocks == "decoder":
        save_memory(network, blocks, True)
    else:  # one of three heads only
        block = network.get_submodule(blocks)
        block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        train(network, image)


def test_a_frozen_network_is_an_error() -> None:
    network = make_supervised("FixedPointUNet").requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen, so strip the network"):
        train(network, NETWORKS["FixedPointUNet"].image())


class Shallow(Level):
    """Leaves its decoder out when it is told to."""

    deep = True

    def join(self, image: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        return super().join(image, skip, up) if self.deep else skip


@pytest.mark.parametrize("heads", [True, False])
def test_copies_that_data_parallel_makes_are_an_error(heads: bool) -> None:
    name = "FixedPointUNet"
    network, image = make_supervised(name) if heads else make(name), NETWORKS[name].image(2)
    if not heads:
        attach_teacher(network, make(name))
    replica = network.train()._replicate_for_data_parallel()  # what every GPU would get
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(image)
    assert isinstance(network(image), SupervisedOutput)


def test_a_skip_that_is_not_read_is_an_error() -> None:
    network, image = Shallow(), torch.rand(1, 1, 16, 16)
    attach_supervision(network, image)
    network.deep = False
    with pytest.raises(RuntimeError, match="'read' did not read 'skip' in this pass"):
        train(network, image)
    assert evaluate(network, image).shape[1] == 4


def test_a_skip_without_a_batch_axis_is_an_error() -> None:
    network = make_supervised(UNBATCHED)
    with pytest.raises(RuntimeError, match=r"'skip' of shape \(4, 32, 32\), without a batch axis"):
        train(network, NETWORKS[UNBATCHED].image(2))


@pytest.mark.parametrize("name", ["DynUNet", "PlainConvUNet", "PlainConvUNet 3D"])
def test_deep_supervision_goes_through_the_loss(name: str) -> None:
    network, image = make_supervised(name, "split"), NETWORKS[name].image(2)
    label = (image > 0.5).float()
    label[:, :, :, :3] = 1
    seen: list[int] = []

    def deep(predictions: Any, targets: list[Tensor]) -> Tensor:
        scales = list(predictions.unbind(1)) if isinstance(predictions, Tensor) else predictions  # DynUNet's
        seen.append(len(scales))
        pairs = zip(scales, targets, strict=True)
        return torch.stack(
            [F.binary_cross_entropy_with_logits(p[:, :1], t.expand_as(p[:, :1])) for p, t in pairs]
        ).sum()

    plain = train(strip(copy.deepcopy(network)), image)
    shapes = [p.shape[2:] for p in (plain.unbind(1) if isinstance(plain, Tensor) else plain)]
    targets = [F.interpolate(label, tuple(shape)) for shape in shapes]
    losses = {w: SkipSupervisionLoss(deep, weight=w)(train(network, image), targets) for w in (0.0, 0.4)}
    assert losses[0.0] == SkipSupervisionLoss(deep)(plain, targets) < losses[0.4]
    assert seen == [len(targets)] * 3 and len(targets) > 1
    losses[0.4].backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for n, p in network.named_parameters()
        if n.startswith("skip_supervision")
    )


PROCESS = """
import importlib.util, sys
from pathlib import Path
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from monai_unetq.plan import QuantPlan
from monai_unetq.networks import FixedPointUNet
from monai_unetq.surgery import attach_supervision, quantize, split

# The loss alone: the package that it is in imports all of MONAI's engines, which takes longer than the rest.
training = importlib.util.find_spec("monai_unetq.training")
sys.modules["monai_unetq.training"] = importlib.util.module_from_spec(training)
from monai_unetq.training.supervision import SkipSupervisionLoss

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
result = {}
for kind, weight in (("plain", 0.0), ("zero", 0.0), ("full", 0.4)):
    torch.manual_seed(0)
    network = FixedPointUNet(1, 1, width=2)
    image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(rank))  # each process its own
    split(network, image)
    quantize(network, QuantPlan.uniform(network, "int8", "int8", learned=True), image)
    if kind != "plain":
        attach_supervision(network, image)
        result.update({f"start {kind} {n}": p.detach().clone() for n, p in network.named_parameters()})
    wrapped = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    loss = SkipSupervisionLoss(torch.nn.functional.binary_cross_entropy_with_logits, weight)
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss(wrapped(image), (image > 0.5).float()).backward()
        optimizer.step()
    result.update({f"{kind} {name}": p.detach() for name, p in network.named_parameters()})
torch.save(result, folder / f"{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_train_one_network_without_unused_parameters(tmp_path: Path) -> None:
    first, second = run_two(PROCESS, tmp_path)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    plain = [key.removeprefix("plain ") for key in first if key.startswith("plain ")]
    heads = [key.removeprefix("full ") for key in first if key.startswith("full skip_supervision")]
    assert len(heads) == 6
    assert all(torch.equal(first[f"zero {key}"], first[f"plain {key}"]) for key in plain)
    assert all(torch.equal(first[f"zero {key}"], first[f"start zero {key}"]) for key in heads)
    assert all(not torch.equal(first[f"full {key}"], first[f"start full {key}"]) for key in heads)
    makers = [key for key in plain if key.startswith("encoder.0") and key.endswith("weight")]
    assert makers and all(not torch.equal(first[f"full {key}"], first[f"plain {key}"]) for key in makers)


# What is refused ---------------------------------------------------------------------------------------------------


def taken() -> nn.Module:
    network = Level()
    network.skip_supervision = nn.Identity()
    return network


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: attach_supervision(Level()), {}, r"call strip\(network\) first"),
        (Level, {"num_classes": 0}, "num_classes is 0, expected at least 1"),
        (Level, {"kernel_size": 2}, "kernel_size is 2, expected an odd number"),
        (Level, {"kernel_size": -1}, "kernel_size is -1"),
        (Level, {"example": torch.zeros(1, 3, 16, 16)}, r"Level failed on an example of shape \(1, 3, 16, 16\)"),
        (lambda: nn.Sequential(Level()), {}, "a Sequential runs every module that it holds"),
        (NETWORKS["own, branches"].build, {}, "no concatenation of a skip and an upsampled path"),
        (NETWORKS["own, functional"].build, {}, "there is nothing to supervise"),
        (NETWORKS["SegResNet"].build, {}, "SegResNet has no concatenation"),
        (lambda: DataParallel(Level()), {}, "inside a DataParallel"),
        (lambda: torch.compile(Level()), {}, "then wrap it"),
        (taken, {}, "has an attribute 'skip_supervision' of its own"),
    ],
)  # fmt: skip
def test_networks_and_arguments_that_are_refused_are_left_as_they_are(
    build: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    network = build()
    before = hooks(network), list(network.state_dict()), [n for n, _ in network.named_modules()]
    with pytest.raises(ValueError, match=message):
        attach_supervision(network, **options)
    assert before == (hooks(network), list(network.state_dict()), [n for n, _ in network.named_modules()])


VERBS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "attach_supervision": lambda network, _: attach_supervision(network),
    "quantize": lambda network, _: quantize(network, plan_of(network)),
    "dequantize": lambda network, _: dequantize(network),
    "split": lambda network, _: split(network),
    "fold": lambda network, _: fold(network),
    "pack": lambda network, folder: pack(network, folder / "model.unetq"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_that_change_layers_ask_to_strip_first(verb: str, tmp_path: Path) -> None:
    network = make_supervised("FixedPointUNet", "split and quantized")
    layers = list(quantized_layers(network))
    for whole in (network, TwoNames(network)):
        with pytest.raises(ValueError, match=rf"{verb}: .* call strip\(network\) first"):
            VERBS[verb](whole, tmp_path)
    assert list(quantized_layers(network)) == layers and not list(tmp_path.iterdir())
    assert isinstance(train(network, NETWORKS["FixedPointUNet"].image(2)), SupervisedOutput)


# The teacher ------------------------------------------------------------------------------------------------------


def with_teacher(heads: bool) -> tuple[nn.Module, nn.Module]:
    """A quantized network with its teacher, and the float network that the teacher is."""
    torch.manual_seed(0)
    network = FixedPointUNet(1, 1, width=4)
    teacher = copy.deepcopy(network)
    quantize(network, QuantPlan.uniform(network, "int3", "int3"))
    if heads:
        return attach_supervision(network, teacher=teacher), teacher
    return attach_teacher(network, teacher), teacher


IMAGE = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("heads", [False, True])
def test_a_teachers_answer_stands_beside_the_same_prediction(heads: bool) -> None:
    network, teacher = with_teacher(heads)
    bare = strip(copy.deepcopy(network))
    output = train(network, IMAGE)
    assert isinstance(output, SupervisedOutput)
    assert len(output.skips) == (3 if heads else 0)
    assert torch.equal(output.teacher, evaluate(teacher, IMAGE))
    assert not output.teacher.requires_grad
    assert torch.equal(output.prediction, train(bare, IMAGE))
    assert torch.equal(evaluate(network, IMAGE), evaluate(bare, IMAGE))
    with torch.no_grad():
        assert train(network, IMAGE).teacher is None  # nothing is learned


@pytest.mark.parametrize("heads", [False, True])
def test_a_teacher_is_no_part_of_the_network(heads: bool) -> None:
    network, teacher = with_teacher(heads)
    bare = strip(copy.deepcopy(network))
    found, wanted = inference_state(network), bare.state_dict()
    assert found.keys() == wanted.keys()
    assert [n for n, _ in network.named_parameters() if not n.startswith("skip_supervision.heads")] == [
        n for n, _ in bare.named_parameters()
    ]
    assert not any("teacher" in name for name, _ in network.named_modules())
    assert not bare._forward_hooks
    assert not bare._forward_pre_hooks
    for parameter in teacher.parameters():  # the network keeps a copy
        parameter.data.zero_()
    assert not torch.equal(train(network, IMAGE).teacher, evaluate(teacher, IMAGE))


def test_a_teacher_stays_in_evaluation_and_follows_to_another_type() -> None:
    network, teacher = with_teacher(heads=True)
    network.train().double()
    output = network(IMAGE.double())
    output.prediction.sum().backward()
    assert torch.equal(output.teacher, evaluate(teacher.double(), IMAGE.double()))


def test_a_copy_has_a_teacher_of_its_own() -> None:
    network, teacher = with_teacher(heads=False)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    assert torch.equal(train(copied, IMAGE).teacher, evaluate(teacher, IMAGE))


def test_a_teacher_needs_no_skips() -> None:
    image = NETWORKS["SegResNet"].image()
    network = NETWORKS["SegResNet"].build()
    output = train(attach_teacher(network, copy.deepcopy(network)), image)
    assert output.teacher.shape == output.prediction.shape
    assert output.skips == ()


def test_a_network_has_one_teacher() -> None:
    network, teacher = with_teacher(heads=False)
    for attach in (partial(attach_teacher, teacher=teacher), attach_supervision):
        with pytest.raises(ValueError, match="the network has supervision heads or a teacher; call strip"):
            attach(network)
    with pytest.raises(ValueError, match="attach_teacher: a Sequential runs every module"):
        attach_teacher(nn.Sequential(nn.Conv2d(1, 1, 3)), teacher)
