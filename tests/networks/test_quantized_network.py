"""``QuantizedNetwork`` as a ``_target_`` of MONAI configurations: stock networks, plans, and files of weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import DynUNet, UNet
from torch import nn

from monai_unetq import LayerPlan, QFormat, QuantPlan, pack, plan_of
from monai_unetq.layers import QuantizedLayer
from monai_unetq.networks import FixedPointUNet, QuantizedNetwork, state_file
from monai_unetq.parts import WHOLE
from monai_unetq.surgery import quantized_layers

UNET = {
    "_target_": "UNet",
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8, 16],
    "strides": [2, 2],
    "num_res_units": 1,
    "norm": "batch",
}
DYNUNET = {
    "_target_": "DynUNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [4, 8, 16],
    "deep_supervision": True,
}


def small() -> FixedPointUNet:
    torch.manual_seed(0)
    return FixedPointUNet(1, 1, width=2)


def configured(network: dict[str, Any], **keys: Any) -> nn.Module:
    """What a MONAI configuration makes of a network_def that is wrapped."""
    wrapped = {"_target_": "monai_unetq.networks.QuantizedNetwork", "network": network, **keys}
    made: nn.Module = ConfigParser({"network_def": wrapped}).get_parsed_content("network_def")
    return made


@pytest.mark.parametrize(
    ("network", "kind", "size"), [(UNET, UNet, (16, 16)), (DYNUNET, DynUNet, (16, 16, 16))]
)
def test_a_stock_configuration_becomes_quantized_by_its_network_def_alone(
    network: dict[str, Any], kind: type[nn.Module], size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    plain: nn.Module = ConfigParser({"network_def": network}).get_parsed_content("network_def")
    made = configured(network, weights="int4", activations="int8", input="int8", first="int8", last="float")
    assert type(made) is kind
    layers = quantized_layers(made)
    ran = list(plan_of(made))
    assert str(plan_of(made)[ran[0]].weight) == "int8"
    assert {str(layer.weight_quantizer.number_format) for layer in layers.values()} == {"int4", "int8"}
    # Keys, classes of layers, attributes: those of the float network, which its checkpoint still fits.
    assert set(plain.state_dict()) <= set(made.state_dict())
    for name, layer in plain.named_modules():
        assert isinstance(made.get_submodule(name), type(layer))
    made.load_state_dict(plain.state_dict())
    copy.deepcopy(made)
    assert made.eval()(torch.rand(1, 1, *size)).shape == (1, 2, *size)


def test_last_is_the_layer_that_runs_last_not_the_one_registered_last() -> None:
    made = configured(DYNUNET, weights="int4", activations="int8", last="int8")
    assert str(plan_of(made)["output_block.conv.conv"].weight) == "int8"
    assert str(plan_of(made)["deep_supervision_heads.0.conv.conv"].weight) == "int4"


def test_layers_stay_float_by_pattern_and_formats_may_come_from_a_plan_file(tmp_path: Path) -> None:
    made = QuantizedNetwork(small(), weights="int8", activations="int8", keep_float=["decoder.*"])
    assert all(name.startswith(("encoder", "last")) for name in quantized_layers(made))
    plan = QuantPlan({"encoder.0.conv2": LayerPlan({WHOLE: QFormat("Q0.4")}, {"input": QFormat("UQ6.0")})})
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        made = QuantizedNetwork(small(), plan=given)
        assert list(quantized_layers(made)) == ["encoder.0.conv2"]


def test_without_formats_the_network_stays_float() -> None:
    network = small()
    assert QuantizedNetwork(network) is network
    assert not quantized_layers(network)


@pytest.mark.parametrize(
    "formats",
    [
        {"weights": "Q0.4", "activations": "Q6.0", "input": "UQ0.8", "first": "int8"},
        {"weights": "int4", "activations": "int6", "scale": "free", "learned": True},
        {"weights": "int4", "activations": "float", "granularity": "tensor"},
    ],
)
@pytest.mark.parametrize("kind", ["model.pt", "model.unetq"])
def test_a_file_says_itself_how_its_network_is_quantized(
    tmp_path: Path, formats: dict[str, Any], kind: str
) -> None:
    trained = QuantizedNetwork(small(), **formats)
    image = torch.rand(2, 1, 16, 16)
    for _ in range(2):
        trained(image)  # running statistics other than the initial ones
    trained.eval()
    if kind == "model.pt":
        torch.save(trained.state_dict(), tmp_path / kind)
    else:
        pack(trained, tmp_path / kind)
    loaded = QuantizedNetwork(FixedPointUNet(1, 1, width=2), state=tmp_path / kind).eval()
    assert plan_of(loaded).layers == plan_of(trained).layers
    assert torch.equal(loaded(image), trained(image))


def test_a_float_state_is_loaded_before_the_network_is_quantized(tmp_path: Path) -> None:
    trained = small()
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(1)
    loaded = QuantizedNetwork(
        FixedPointUNet(1, 1, width=2), weights="int8", activations="int8", state=tmp_path / "model.pt"
    )
    layer = loaded.get_submodule("last")
    assert isinstance(layer, QuantizedLayer)
    expected = QuantizedNetwork(small(), weights="int8", activations="int8").get_submodule("last")
    assert torch.equal(layer.weight, trained.last.weight)
    assert isinstance(expected, QuantizedLayer)
    assert torch.equal(layer.weight_quantizer.scale, expected.weight_quantizer.scale)


def test_an_example_shape_serves_networks_of_one_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.linear = nn.Linear(2 * 12 * 12, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(self.conv(image).flatten(1))
            return out

    made = QuantizedNetwork(Fixed(), weights="int8", activations="int8", example_shape=[1, 1, 12, 12])
    assert set(quantized_layers(made)) == {"conv", "linear"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": "int4"}, "only 'weights' is given, expected both of weights and activations"),
        ({"activations": "int4"}, "only 'activations' is given"),
        (
            {"weights": "int4", "activations": "int4", "plan": QuantPlan()},
            "'plan' and 'weights' are both given",
        ),
        ({"input": "UQ0.8"}, "'input' needs weights and activations"),
        ({"keep_float": ["last"]}, "'keep_float' needs weights and activations"),
        ({"weights": "int4", "activations": "int4", "keep_float": ["nosuch"]}, "matches none of the layers"),
        ({"weights": "Q0,4", "activations": "int4"}, "Q0,4"),
    ],
)
def test_contradictions_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedNetwork(small(), **keys)


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file; train first"):
        QuantizedNetwork(small(), state=tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pt: no state dict that loads safely"):
        QuantizedNetwork(small(), state=tmp_path / "text.pt")
    torch.save({"network": small().state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: holds no state dict"):
        QuantizedNetwork(small(), state=tmp_path / "checkpoint.pt")
    torch.save(FixedPointUNet(1, 1, width=4).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"wide\.pt does not fit this FixedPointUNet: (.|\n)*size mismatch"):
        QuantizedNetwork(small(), state=tmp_path / "wide.pt")
    assert state_file(tmp_path / "wide.pt") == tmp_path / "wide.pt"


def test_formats_that_a_quantized_file_would_replace_are_refused(tmp_path: Path) -> None:
    formats: dict[str, Any] = {"weights": "Q0.4", "activations": "Q6.0"}
    others: list[dict[str, Any]] = [{"weights": "Q2.2"}, {"activations": "Q4.4"}, {"keep_float": ["last"]}]
    trained = QuantizedNetwork(small(), **formats)
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    QuantizedNetwork(small(), **formats, state=tmp_path / "model.pt")
    for other in others:
        with pytest.raises(ValueError, match=r"model\.pt: layer '.*' is .* there, .* was asked for"):
            QuantizedNetwork(small(), **{**formats, **other}, state=tmp_path / "model.pt")
    pack(trained, tmp_path / "model.unetq")
    with pytest.raises(ValueError, match=r"model\.unetq is packed and says its formats itself"):
        QuantizedNetwork(small(), **formats, state=tmp_path / "model.unetq")


def test_layers_of_a_plan_stay_float_by_pattern_too() -> None:
    plan = QuantPlan.uniform(small(), "int8", "int8")
    made = QuantizedNetwork(small(), plan=plan, keep_float="decoder.*")
    assert all(name.startswith(("encoder", "last")) for name in quantized_layers(made))
    with pytest.raises(ValueError, match="'nosuch' matches none of the layers"):
        QuantizedNetwork(small(), plan=plan, keep_float=["nosuch"])
    with pytest.raises(ValueError, match="'learned' needs weights and activations; a plan names it itself"):
        QuantizedNetwork(small(), plan=plan, learned=True)
