"""How ``split`` composes with the other verbs: quantize, calibrate, fold, pack, dequantize; and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import monai_unetq as uq
from monai_unetq.allocation import cost_of
from monai_unetq.formats import QFormat
from monai_unetq.layers import QuantizedLayer, SplitLayer, split_layer
from monai_unetq.networks import QuantizedNetwork
from monai_unetq.parts import WHOLE, Part
from monai_unetq.plan import LayerPlan, QuantPlan
from monai_unetq.surgery import plan_of_state, quantized_layers


class TwoLevels(nn.Module):
    """A U-Net with one skip; the concatenation is read by a convolution with batch norm."""

    def __init__(self, dimensions: int = 2, bias: bool = True) -> None:
        super().__init__()
        conv: Any = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        up: Any = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 2]
        norm: Any = (nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 2]
        self.encoder = nn.Sequential(conv(1, 4, 3, padding=1, bias=bias), norm(4), nn.ReLU())
        self.below = nn.Sequential(conv(4, 6, 3, stride=2, padding=1, bias=bias), norm(6), nn.ReLU())
        self.up = nn.Sequential(up(6, 5, 2, stride=2, bias=bias), norm(5), nn.ReLU())
        self.decoder = nn.Sequential(conv(9, 4, 3, padding=1, bias=bias), norm(4), nn.ReLU())
        self.last = conv(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x)
        return self.last(self.decoder(torch.cat([skip, self.up(self.below(skip))], dim=1)))


def trained(dimensions: int = 2, bias: bool = True) -> TwoLevels:
    """With batch norms that have seen something, one gain of them negative."""
    torch.manual_seed(3)
    network = TwoLevels(dimensions, bias)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.2, 0.3)
    with torch.no_grad():
        cast(Any, network.decoder)[1].weight[1] *= -1
    for _ in range(3):
        network(torch.rand(4, 1, *[16] * dimensions) * 2)
    return network.eval()


def image(dimensions: int = 2) -> Tensor:
    torch.manual_seed(4)
    return torch.rand(2, 1, *[16] * dimensions)


def by_part(**formats: str) -> dict[str, QFormat]:
    return {name: QFormat(spelling) for name, spelling in formats.items()}


def with_halves(
    network: nn.Module, weights: dict[str, QFormat], inputs: dict[str, QFormat], **options: Any
) -> QuantPlan:
    """All layers int8/int8, the halves of the decoder as given."""
    plan = QuantPlan.uniform(network, "int8", "int8", **options)
    return plan.with_layers({"decoder.0": LayerPlan(weights, inputs)})


FORMATS = [
    ("int8", "int3", {}),
    ("Q0.6", "Q1.2", {}),
    ("int8", "int3", {"scale": "free"}),
    ("int4", "int6", {"scale": "free", "granularity": "tensor"}),
    ("binary", "int4", {"scale": "free"}),
    ("binary", "int4", {}),
    ("ternary", "binary", {"granularity": "tensor"}),
    ("pow2-4", "ternary", {"scale": "free", "learned": True}),
    ("float", "int4", {}),
    ("Q0.4:literal", "int8", {}),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("skip", "up", "options"), FORMATS)
def test_a_pair_is_folded_without_changing_one_weight(
    skip: str, up: str, options: dict[str, Any], dimensions: int, bias: bool
) -> None:
    network: Any = uq.split(trained(dimensions, bias), image(dimensions))
    plan = with_halves(network, by_part(skip=skip, up=up), by_part(skip="uint6", up="uint4"), **options)
    uq.calibrate(uq.quantize(network, plan, image(dimensions)), [image(dimensions)])
    layer = quantized_layers(network)["decoder.0"]
    before, parameters = network(image(dimensions)), layer.effective_parameters()
    uq.fold(network, image(dimensions))
    assert layer.paired_norm is None
    for found, expected in zip(layer.effective_parameters(), parameters, strict=True):
        assert found is not None and expected is not None
        assert torch.equal(found, expected)
    assert torch.equal(network(image(dimensions)), before)


@pytest.mark.parametrize(("skip", "up", "options"), FORMATS)
def test_training_and_evaluation_run_the_same_rounded_weight(
    skip: str, up: str, options: dict[str, Any]
) -> None:
    """What the layer gives in training, normalized with the running statistics, is what evaluation gives."""
    network: Any = uq.split(trained(), image())
    plan = with_halves(network, by_part(skip=skip, up=up), by_part(skip="uint8", up="uint8"), **options)
    uq.calibrate(uq.quantize(network, plan, image()), [image()])
    layer, norm = quantized_layers(network)["decoder.0"], network.decoder[1]
    layer.rounds_bias = False
    torch.manual_seed(5)
    values = torch.rand(2, 9, 16, 16)
    expected = layer(values)
    norm.train()
    with torch.no_grad():
        raw = layer(values)
    factors = [layer.norm_factors(norm, quantizer) for quantizer in layer.weight_quantizers.values()]
    gains = [before if after is None else before * after for before, after in factors]
    assert torch.equal(gains[0], gains[1]), "both halves take one gain"
    shift = norm.bias - norm.running_mean * gains[0]
    found = raw * gains[0].view(-1, 1, 1) + shift.view(-1, 1, 1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_quantization_is_the_networks_with_each_half_rounded_by_hand() -> None:
    network: Any = uq.split(trained(), image())
    plan = with_halves(network, by_part(skip="Q1.6", up="Q1.2"), by_part(skip="UQ2.6", up="UQ3.1"))
    uq.fold(uq.quantize(network, plan, image()), image())
    layer = quantized_layers(network)["decoder.0"]
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.register_forward_hook(lambda _, args, out: seen.append(out))
    network(image())

    def rounded(x: Tensor, step: float, low: float, high: float) -> Tensor:
        return (x / step).round().mul(step).clamp(low, high)

    weight = torch.cat(
        [rounded(layer.weight[:, :4], 2**-6, -1, 1 - 2**-6), rounded(layer.weight[:, 4:], 0.25, -1, 0.75)], 1
    )
    values = torch.cat(
        [rounded(seen[0][:, :4], 2**-6, 0, 4 - 2**-6), rounded(seen[0][:, 4:], 0.5, 0, 7.5)], 1
    )
    bias = (cast(Tensor, layer.bias) / 2**-12).round() * 2**-12
    assert torch.equal(seen[1], nn.functional.conv2d(values, weight, bias, padding=1))


def test_the_plan_of_a_split_network_goes_through_json_and_state(tmp_path: Path) -> None:
    network: Any = uq.split(trained(), image())
    plan = with_halves(network, by_part(skip="int6", up="int3"), by_part(skip="UQ2.6", up="UQ3.1"))
    uq.quantize(network, plan, image())
    found = uq.plan_of(network)
    assert found["decoder.0"].channels == (("skip", 4), ("up", 5))
    assert found["decoder.0"].weights == by_part(skip="int6", up="int3")
    found.save(tmp_path / "plan.json")
    entry = json.loads((tmp_path / "plan.json").read_text())["layers"]["decoder.0"]
    assert entry == {
        "weight": {"skip": "int6", "up": "int3"},
        "input": {"skip": "UQ2.6", "up": "UQ3.1"},
        "bias": "accumulator",
        "parts": [["skip", 4], ["up", 5]],
    }
    # The plan says how the layer is split: a float network that is not gets it from there.
    other = trained()
    uq.quantize(other, QuantPlan.load(tmp_path / "plan.json"), image())
    assert torch.equal(other(image()), network(image()))
    assert plan_of_state(network.state_dict()) == found
    # A network that is built from the state alone loads it strictly.
    carried = plan_of_state(network.state_dict())
    assert carried is not None
    third = uq.quantize(TwoLevels(), carried, image()).eval()
    third.load_state_dict(network.state_dict())
    assert torch.equal(third(image()), network(image()))


@pytest.mark.parametrize(("skip", "up", "options"), FORMATS)
def test_packed_files_hold_each_half(skip: str, up: str, options: dict[str, Any], tmp_path: Path) -> None:
    network: Any = uq.split(trained(), image())
    plan = with_halves(network, by_part(skip=skip, up=up), by_part(skip="uint6", up="uint4"), **options)
    uq.calibrate(uq.quantize(network, plan, image()), [image()])
    uq.pack(network, tmp_path / "model.unetq")
    expected = uq.fold(copy.deepcopy(network), image())(image())
    back = uq.unpack(tmp_path / "model.unetq", TwoLevels())
    assert torch.equal(back(image()), expected)
    uq.pack(back, tmp_path / "again.unetq")
    assert torch.equal(uq.unpack(tmp_path / "again.unetq", TwoLevels())(image()), expected)
    held = uq.inspect_packed(tmp_path / "model.unetq")
    counts = {layer["name"]: layer["parameters"] for layer in held["layers"]}
    assert counts["decoder.0[up]"] == 4 * 5 * 9
    assert counts.get("decoder.0[skip]", 4 * 4 * 9) == 4 * 4 * 9
    assert [(p["name"], p["source"]) for p in held["skips"][0]["parts"]] == [
        ("skip", "encoder.0"),
        ("up", "up.0"),
    ]


def test_bytes_are_counted_for_each_half(tmp_path: Path) -> None:
    network: Any = uq.split(trained(bias=False), image())
    plan = with_halves(network, by_part(skip="int8", up="int2"), by_part(skip="uint6", up="uint4"))
    uq.fold(uq.quantize(network, plan, image()), image())
    held = {layer["name"]: layer for layer in uq.inspect_packed(uq.pack(network, tmp_path / "m"))["layers"]}
    assert held["decoder.0[skip]"]["bytes"] == 4 * 4 * 9
    assert held["decoder.0[up]"]["bytes"] == 4 * 5 * 9 // 4
    cost = cost_of(network, image()[:1])
    weights = 4 * 9 + 6 * 4 * 9 + 6 * 5 * 4 + 4 * 4 * 9 + 4 * 5 * 9 // 4 + 4
    biases = 4 * (4 + 6 + 5 + 4 + 1)
    assert cost.weight_bytes == weights + biases
    inputs = 256 + 4 * 256 + 6 * 64 + 4 * 256  # all int8 but the decoder's
    assert cost.activation_bytes == inputs + 4 * 256 * 6 // 8 + 5 * 256 * 4 // 8


def test_static_formats_are_met_by_rescaling() -> None:
    network: Any = uq.split(trained(), image())
    before = uq.fold(copy.deepcopy(network), image())(image())
    plan = with_halves(
        network,
        by_part(skip="Q0.8", up="Q0.8"),
        by_part(skip="UQ8.0", up="UQ6.2"),
        first="int8",
        input="UQ0.8",
    )
    uq.quantize(network, plan, image())
    wrong = (network(image()) - before).abs().mean()
    uq.calibrate(network, [image()])
    assert (network(image()) - before).abs().mean() < wrong / 2


def test_a_format_given_once_holds_for_every_part() -> None:
    network: Any = uq.split(trained(), image())
    uq.quantize(network, QuantPlan.uniform(network, "int4", "Q4.0"), image())
    layer = quantized_layers(network)["decoder.0"]
    assert {str(q.number_format) for q in layer.weight_quantizers.values()} == {"int4"}
    assert {str(q.number_format) for q in layer.input_quantizers.values()} == {"UQ4.0"}
    assert len({id(q) for q in layer.quantizers}) == 4


def test_fold_in_float_keeps_the_split_and_split_follows_fold() -> None:
    first, second = trained(), trained()
    uq.fold(uq.split(first, image()), image())
    uq.split(uq.fold(second, image()), image())
    for network in (first, second):
        assert isinstance(network.decoder[0], SplitLayer)
        assert isinstance(network.decoder[1], nn.Identity)
    assert torch.equal(first(image()), second(image()))


def test_split_twice_is_split_once_also_after_quantize() -> None:
    network: Any = uq.split(trained(), image())
    layer = network.decoder[0]
    parts = layer.parts
    uq.split(network, image())
    assert network.decoder[0].parts is parts
    uq.quantize(network, QuantPlan.uniform(network, "int8", "int8"), image())
    uq.split(network, image())
    assert isinstance(network.decoder[0], QuantizedLayer) and network.decoder[0].parts is parts
    uq.dequantize(network)
    assert network.decoder[0] is layer and isinstance(layer, SplitLayer)


def test_what_is_quantized_whole_is_not_split_and_nothing_changes() -> None:
    network: Any = trained()
    uq.quantize(network, QuantPlan.uniform(network, "int8", "int8"), image())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"'decoder\.0' is quantized already.*split first, then quantize"):
        uq.split(network, image())
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            LayerPlan(by_part(skip="int8", up="int4"), {WHOLE: QFormat("int8")}),
            "formats for the parts skip, up, but is not split; call split",
        ),
        (
            LayerPlan({WHOLE: QFormat("int8")}, {WHOLE: QFormat("int8")}, channels=(("skip", 3), ("up", 5))),
            "skip=3 | up=5 are not the layer's 9 input channels",
        ),
    ],
)
def test_a_plan_that_does_not_fit_leaves_the_network(layer: LayerPlan, message: str) -> None:
    network: Any = trained()
    plan = QuantPlan.uniform(network, "int8", "int8").with_layers({"decoder.0": layer})
    with pytest.raises(ValueError, match=r"plan: layer 'decoder\.0'") as error:
        uq.quantize(network, plan, image())
    assert message in str(error.value)
    assert not quantized_layers(network)
    assert type(network.decoder[0]) is nn.Conv2d
    assert "parts" not in network.decoder[0].__dict__


@pytest.mark.parametrize(
    ("channels", "found"),
    [
        (None, "skip, skip.1, but is split into skip=4, up=5"),
        ((("skip", 5), ("up", 4)), "skip=5, up=4, but is split into skip=4, up=5"),
        ((("up", 5), ("skip", 4)), "up=5, skip=4, but is split into skip=4, up=5"),
    ],
)
def test_a_plan_for_other_parts_is_refused(channels: tuple[tuple[str, int], ...] | None, found: str) -> None:
    network: Any = uq.split(trained(), image())
    names = ("skip", "skip.1") if channels is None else tuple(part for part, _ in channels)
    layer = LayerPlan(dict.fromkeys(names, QFormat("int8")), {WHOLE: QFormat("int8")}, channels=channels)
    with pytest.raises(ValueError, match=r"plan: layer 'decoder\.0'") as error:
        uq.quantize(network, QuantPlan({"decoder.0": layer}), image())
    assert found in str(error.value)
    assert isinstance(network.decoder[0], SplitLayer)


def test_a_packed_file_of_a_whole_network_stays_readable_by_older_programs(tmp_path: Path) -> None:
    from safetensors import safe_open

    network: Any = trained()
    uq.quantize(network, QuantPlan.uniform(network, "int8", "int8"), image())
    for name, split in (("whole", False), ("split", True)):
        net = uq.split(trained(), image()) if split else trained()
        uq.quantize(net, QuantPlan.uniform(net, "int8", "int8"), image())
        uq.pack(net, tmp_path / name)
        with safe_open(tmp_path / name, framework="pt") as file:
            assert json.loads(file.metadata()["monai_unetq"])["version"] == (3 if split else 1)


def up_first() -> nn.Module:
    """The concatenation has what comes from below first, in halves of equal width."""

    class UpFirst(TwoLevels):
        def forward(self, x: Tensor) -> Tensor:
            skip = self.encoder(x)
            return self.last(self.decoder(torch.cat([self.up(self.below(skip)), skip], dim=1)))

    torch.manual_seed(3)
    network = UpFirst()
    network.up = nn.Sequential(nn.ConvTranspose2d(6, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    network.decoder = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return network.eval()


def test_the_order_of_the_parts_survives_sorted_keys(tmp_path: Path) -> None:
    network: Any = uq.split(up_first(), image())
    formats = by_part(up="int3", skip="int8")
    uq.quantize(network, with_halves(network, formats, by_part(up="uint3", skip="uint8")), image())
    plan = uq.plan_of(network)
    again = QuantPlan.from_json(json.loads(json.dumps(plan.to_json(), sort_keys=True)))
    assert again == plan and again["decoder.0"].channels == (("up", 4), ("skip", 4))
    state = dict(sorted(network.state_dict().items()))
    assert plan_of_state(state) == plan
    swapped = LayerPlan(formats, formats, channels=(("skip", 4), ("up", 4)))
    assert swapped != LayerPlan(formats, formats, channels=(("up", 4), ("skip", 4)))
    uq.pack(network, tmp_path / "model.unetq")
    other: Any = up_first()
    split_layer(other.decoder[0], [Part("skip", 4), Part("up", 4)])
    with pytest.raises(
        ValueError, match=r"decoder\.0: it is split into .*'skip', 4.* here, .*'up', 4.* there"
    ):
        uq.unpack(tmp_path / "model.unetq", other)


@pytest.mark.parametrize("asked", [{"skip": "UQ6.0", "up": "Q6.0"}, {"skip": "Q6.0", "up": "Q6.0"}])
def test_each_part_has_a_sign_of_its_own(asked: dict[str, str]) -> None:
    network: Any = trained()
    network.up = network.up[:2]  # without ReLU: what comes up is signed
    uq.split(network, image())
    plan = with_halves(network, by_part(skip="int8", up="int8"), by_part(**asked))
    uq.quantize(network, plan, image())
    quantizers = quantized_layers(network)["decoder.0"].input_quantizers
    assert [str(q.number_format) for q in quantizers.values()] == ["UQ6.0", "Q6.0"]


def test_one_format_for_a_split_layer_gets_the_sign_of_each_part() -> None:
    network: Any = trained()
    network.up = network.up[:2]
    uq.split(network, image())
    uq.quantize(network, QuantPlan.uniform(network, "int8", "int2"), image())
    quantizers = quantized_layers(network)["decoder.0"].input_quantizers
    assert {name: str(q.number_format) for name, q in quantizers.items()} == {"skip": "uint2", "up": "int2"}


def test_a_plan_that_splits_gets_the_sign_of_each_part() -> None:
    network: Any = trained()
    network.up = network.up[:2]
    formats = by_part(skip="int4", up="int4")
    channels = (("skip", 4), ("up", 5))
    uq.quantize(network, QuantPlan({"decoder.0": LayerPlan(formats, formats, channels=channels)}), image())
    quantizers = quantized_layers(network)["decoder.0"].input_quantizers
    assert [str(q.number_format) for q in quantizers.values()] == ["uint4", "int4"]


def test_parts_of_a_transposed_convolution_share_their_sign() -> None:
    class Transposed(TwoLevels):
        """Its decoder is a transposed convolution, as MONAI's UNet has it."""

        def __init__(self) -> None:
            super().__init__()
            self.up = cast(Any, nn.ConvTranspose2d(6, 5, 2, stride=2))
            self.decoder = nn.Sequential(nn.ConvTranspose2d(9, 4, 3, padding=1))

    network: Any = Transposed().eval()
    uq.split(network, image())
    uq.quantize(network, QuantPlan.uniform(network, "int8", "int4"), image())
    quantizers = quantized_layers(network)["decoder.0"].input_quantizers
    assert [str(q.number_format) for q in quantizers.values()] == ["int4", "int4"]


def test_one_layer_under_two_names_has_one_plan() -> None:
    network: Any = trained()
    network.alias = network.decoder[0]
    plan = QuantPlan.uniform(network, "int8", "int8")
    other = plan.with_layers({"alias": LayerPlan.whole(QFormat("int4"), QFormat("int8"))})
    with pytest.raises(ValueError, match="are the same layer, but have different formats"):
        uq.quantize(network, other, image())
    assert not quantized_layers(network)


def test_one_weight_of_two_layers_with_different_formats_is_not_packed(tmp_path: Path) -> None:
    network: Any = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    network[1].weight = network[0].weight
    plan = QuantPlan(
        {str(i): LayerPlan.whole(QFormat(f), QFormat("int8")) for i, f in enumerate(("int8", "int4"))}
    )
    uq.quantize(network, plan, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="'0' and '1' share one weight and round it differently"):
        uq.pack(network, tmp_path / "model.unetq")
    assert not (tmp_path / "model.unetq").exists()


def test_calibration_that_fails_changes_no_scale() -> None:
    class Idle(TwoLevels):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.mean() > 0 else self.last(self.encoder(x))

    network: Any = uq.split(Idle(), image())
    uq.quantize(network, QuantPlan.uniform(network, "int8", "int8"), image())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="no values seen"):
        uq.calibrate(network, [-image()])
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_state_says_how_the_network_is_split_to_a_wrapper_that_asks_for_the_same_formats(
    tmp_path: Path,
) -> None:
    network: Any = uq.split(up_first(), image())
    uq.quantize(network, QuantPlan.uniform(network, "int8", "int6"), image())
    torch.save(network.state_dict(), tmp_path / "model.pt")
    options: dict[str, Any] = {"weights": "int8", "example_shape": (1, 1, 16, 16)}
    back = QuantizedNetwork(up_first(), activations="int6", state=tmp_path / "model.pt", **options)
    assert torch.equal(back.eval()(image()), network(image()))
    with pytest.raises(ValueError, match=r"is int8/uint6 there, int8/uint4 was asked for"):
        QuantizedNetwork(up_first(), activations="int4", state=tmp_path / "model.pt", **options)
