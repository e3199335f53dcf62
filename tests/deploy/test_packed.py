"""The packed checkpoint: the same outputs bit for bit, the size it promises, and every way a file can be wrong."""

from __future__ import annotations

import copy
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import BasicUNet
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from monai_unetq.allocation import cost_of
from monai_unetq.coding import TernaryCoding
from monai_unetq.deploy import inspect_packed, pack, unpack
from monai_unetq.deploy import packed as packing
from monai_unetq.formats import QFormat
from monai_unetq.networks import FixedPointUNet
from monai_unetq.parts import WHOLE
from monai_unetq.plan import LayerPlan, QuantPlan
from monai_unetq.surgery import fold, plan_of, quantize
from monai_unetq.surgery.quantize import quantized_layers
from monai_unetq.training import calibrate

KEY = "monai_unetq"
IMAGE = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def with_statistics(network: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training, one γ negative, activations of a few units."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            shape = (module.num_features,)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(0.2 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            with torch.no_grad():
                module.weight.copy_(3 + torch.rand(shape, generator=generator))
                module.weight[0] *= -1
                module.bias.copy_(1 + torch.randn(shape, generator=generator))
    return network.eval()


def unet(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return with_statistics(FixedPointUNet(1, 1, **{"width": 4, **options}), seed)


@torch.no_grad()
def run(network: nn.Module, image: Tensor = IMAGE) -> Tensor:
    out: Tensor = network(image)
    return out


def read_independently(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Header, tensors and the codes of every packed weight, by safetensors and numpy alone: no torch, no pickle."""
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()[KEY])
    tensors = load_file(path)
    codes = {}
    for key, shape in document["packed"].items():
        number_format = QFormat(document["plan"]["layers"][key.removesuffix(".weight")]["weight"])
        count, bits = int(np.prod(shape)), number_format.bits
        if document.get("codings", {}).get(key) == "base3":
            digits = np.stack([tensors[key] // 3**place % 3 for place in range(5)], axis=1)
            codes[key] = digits.reshape(-1)[:count].astype(np.int64) - 1
            continue
        stream = np.unpackbits(tensors[key], bitorder="little")[: count * bits].reshape(count, bits)
        numbers = (stream * (1 << np.arange(bits))).sum(axis=1)
        codes[key] = 2 * numbers - 1 if number_format.kind == "binary" else numbers + number_format.qmin
    return document, tensors, codes


def assert_same_network(found: nn.Module, packed: nn.Module, image: Tensor = IMAGE) -> None:
    expected = run(packed, image)
    assert expected.std() > 1e-3
    assert not found.training
    assert torch.equal(run(found, image), expected)


FORMATS: dict[str, dict[str, Any]] = {
    "Q6.0/Q0.4": {"weights": "Q0.4", "activations": "Q6.0", "input": "UQ0.8"},
    "int8, free": {"weights": "int8", "activations": "int8", "scale": "free"},
    "int4, learned": {"weights": "int4", "activations": "int6", "learned": True},
    "int3, learned, free": {"weights": "int3", "activations": "int6", "learned": True, "scale": "free"},
    "int5, per tensor": {"weights": "int5", "activations": "int8", "granularity": "tensor"},
    "int5, per tensor, free": {
        "weights": "int5",
        "activations": "int8",
        "granularity": "tensor",
        "scale": "free",
    },
    "literal": {"weights": "Q0.4:literal", "activations": "Q4.4:literal"},
    "first and last float": {"weights": "int4", "activations": "Q4.4", "first": "float", "last": "float"},
    "wide": {"weights": "Q4.12", "activations": "Q8.8"},
    "weights float": {"weights": "float", "activations": "Q4.4", "last": "int8"},
}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("formats", list(FORMATS))
def test_there_and_back(formats: str, folded: bool, tmp_path: Path) -> None:
    network = unet(upsample="transposed")
    quantize(network, QuantPlan.uniform(network, **FORMATS[formats]), IMAGE)
    calibrate(network, [IMAGE])
    before = copy.deepcopy(network.state_dict())
    if folded:
        fold(network)
    path = tmp_path / "model.unetq"
    assert pack(network, path) == path
    if not folded:
        assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
    found = unpack(path, unet(seed=7, upsample="transposed"))
    assert_same_network(found, network)
    assert plan_of(found) == plan_of(network)
    _, _, codes = read_independently(path)
    layers = quantized_layers(found)
    assert codes.keys() == {
        f"{name}.weight" for name, m in layers.items() if not m.weight_quantizer.number_format.is_float
    }
    for key, values in codes.items():
        layer = layers[key.removesuffix(".weight")]
        number_format = layer.weight_quantizer.number_format
        assert len(np.unique(values)) <= 2**number_format.bits
        assert number_format.qmin <= values.min() <= values.max() <= number_format.qmax
        scale = layer.weight_quantizer.scale.detach().numpy().reshape(-1, *[1] * 3)
        weight = layer.output_major(layer.effective_parameters()[0]).detach().numpy()
        assert np.array_equal(values.reshape(weight.shape).astype(np.float32) * scale, weight)


def grouped(bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, bias=bias), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 2, 3, groups=2), nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1),
        )
    )  # fmt: skip


class ConvNormAct(nn.Module):
    """Registers its layers under two names, as nnU-Net's ConvDropoutNormReLU does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.all_modules = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.all_modules(x)
        return out


def twice_named() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(nn.Sequential(ConvNormAct(1, 4), ConvNormAct(4, 4), nn.Conv2d(4, 1, 1)))


def instance_norms() -> nn.Module:
    torch.manual_seed(0)
    return BasicUNet(2, 1, 1, features=(4, 4, 4, 4, 4, 4), norm=("instance", {"affine": True})).eval()


@pytest.mark.parametrize("build", [grouped, lambda: grouped(bias=True), twice_named, instance_norms])
@pytest.mark.parametrize("formats", ["Q6.0/Q0.4", "int8, free", "int4, learned", "first and last float"])
def test_other_networks_there_and_back(build: Callable[[], nn.Module], formats: str, tmp_path: Path) -> None:
    network, image = build(), torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    quantize(network, QuantPlan.uniform(network, **FORMATS[formats]), image)
    calibrate(network, [image])
    path = pack(network, tmp_path / "model.unetq")
    target = build()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1.0)
    assert_same_network(unpack(path, target), network, image)


def test_a_volume_there_and_back(tmp_path: Path) -> None:
    network, image = unet(width=2, spatial_dims=3), torch.rand(1, 1, 8, 8, 8)
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.2", input="UQ0.8"), image)
    path = pack(network, tmp_path / "model.unetq")
    assert_same_network(unpack(path, unet(seed=1, width=2, spatial_dims=3)), network, image)


def test_unpacked_can_be_packed_again(tmp_path: Path) -> None:
    network = unet()
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8"), IMAGE)
    first = pack(network, tmp_path / "first.unetq")
    second = pack(unpack(first, unet()), tmp_path / "second.unetq")
    assert first.read_bytes() == second.read_bytes()


def test_modules_with_two_names_are_stored_once(tmp_path: Path) -> None:
    network = twice_named()
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8"), IMAGE)
    document, tensors, _ = read_independently(pack(network, tmp_path / "model.unetq"))
    assert set(document["packed"]) == {"0.conv.weight", "1.conv.weight", "2.weight"}
    assert not any("all_modules" in key for key in tensors)
    assert sum(t.nbytes for k, t in tensors.items() if k in document["packed"]) == (36 + 144 + 4) // 2


def test_the_papers_network_is_eight_times_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = FixedPointUNet(1, 1).eval()
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8"), torch.zeros(1, 1, 8, 8))
    path = pack(network, tmp_path / "model.unetq")
    document, tensors, codes = read_independently(path)
    assert len(codes) == 15
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d))
    assert weights == sum(values.size for values in codes.values())
    assert 4 * weights / sum(tensors[key].nbytes for key in codes) == 8.0
    assert 4 * 4_837_249 / path.stat().st_size >= 7.8
    for key, values in codes.items():
        assert len(np.unique(values)) <= 16, key
        assert values.min() >= -8
        assert values.max() <= 7
    assert document["network"] == "monai_unetq.networks.fixed_point_unet.FixedPointUNet"
    # What the package itself says of the file is what the independent reader counts.
    held = inspect_packed(path)
    assert held["weight_bytes"] == weights // 2
    assert held["float_bytes"] == 4 * weights
    assert held["file_bytes"] == path.stat().st_size
    for layer in held["layers"]:
        values, counts = np.unique(codes[f"{layer['name']}.weight"], return_counts=True)
        assert layer["codes"] == len(values)
        assert layer["histogram"] == {str(v): int(c) for v, c in zip(values, counts, strict=True)}
        assert (layer["weight"], layer["bytes"]) == ("Q0.4", layer["parameters"] // 2)
    assert [layer["input"] for layer in held["layers"]] == ["UQ0.8", *["UQ6.0"] * 14]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed network."""
    network = small()
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0", input="UQ0.8"), IMAGE)
    return pack(network, tmp_path_factory.mktemp("packed") / "model.unetq")


def small(channels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(
        nn.Sequential(
            nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 1, 1)
        )
    )


def refused(path: Path, error: type[Exception] = ValueError, network: nn.Module | None = None) -> str:
    """The message with which a file is refused; the network is as it was and the file is named."""
    network = small() if network is None else network
    classes = {name: type(module) for name, module in network.named_modules()}
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(error) as caught:
        unpack(path, network)
    assert {name: type(module) for name, module in network.named_modules()} == classes
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert str(path) in str(caught.value)
    return str(caught.value)


def rewritten(
    packed: Path, path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]
) -> Path:
    """A copy of the file with another header or other tensors, a valid safetensors file."""
    document, tensors, _ = read_independently(packed)
    change(document, tensors)
    save_file(tensors, path, {KEY: json.dumps(document)})
    return path


def test_truncated_at_any_length(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    path = tmp_path / "cut.unetq"
    for length in sorted({*range(20), *np.linspace(20, len(data) - 1, 60).astype(int), len(data) - 1}):
        path.write_bytes(data[:length])
        assert "truncated, corrupted" in refused(path)
        with pytest.raises(ValueError, match="truncated, corrupted"):
            inspect_packed(path)


def test_a_flipped_byte_anywhere(packed: Path, tmp_path: Path) -> None:
    """An error, or (in spaces that fill up the header) the same content."""
    data = packed.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    document, tensors, _ = read_independently(packed)
    path = tmp_path / "flipped.unetq"
    refusals = {"header": 0, "payload": 0}
    header_offsets = {*range(16), *range(16, header, 7), *range(header - 16, header)}
    for offset in sorted({*header_offsets, *range(header, len(data))}):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        try:
            inspect_packed(path)
        except ValueError as error:
            assert str(path) in str(error)
            refusals["header" if offset < header else "payload"] += 1
            continue
        found_document, found_tensors, _ = read_independently(path)
        assert offset < header
        assert found_document == document
        assert found_tensors.keys() == tensors.keys()
        assert all(np.array_equal(found_tensors[key], tensors[key]) for key in tensors)
    assert refusals["payload"] == len(data) - header > 100
    assert refusals["header"] >= len(header_offsets) - 32


def test_a_flipped_byte_leaves_the_network_alone(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[-1] ^= 1
    path = tmp_path / "flipped.unetq"
    path.write_bytes(data)
    assert "checksum" in refused(path)


def test_appended_bytes_are_refused(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "longer.unetq"
    path.write_bytes(packed.read_bytes() + b"\0")
    refused(path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"just some text\n" * 100, b"\x80\x04K\x01." * 20, bytes(64)]
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.unetq"
    path.write_bytes(content)
    assert "truncated, corrupted, or no safetensors file" in refused(path)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"0.weight": np.zeros((4, 1, 3, 3), np.float32)}, path, metadata)
        assert "no packed checkpoint" in refused(path)
    save_file({"0.weight": np.zeros(1, np.float32)}, path, {KEY: "{"})
    assert "header is not JSON" in refused(path)
    for text in ("[]", "{}", "null", '{"version": 1}', '{"version": "1"}'):
        save_file({"0.weight": np.zeros(1, np.float32)}, path, {KEY: text})
        assert "corrupted" in refused(path)


def test_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.unetq", FileNotFoundError)
    refused(tmp_path, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="no such file"):
        inspect_packed(tmp_path / "none.unetq")


def test_a_newer_version_is_named(packed: Path, tmp_path: Path) -> None:
    def newer(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        document["version"] = 4
        document["folded"] = {"another": "structure"}

    path = rewritten(packed, tmp_path / "newer.unetq", newer)
    assert "packed format 4, this program reads up to 3: update monai-unetq" in refused(path)


def test_a_changed_header_or_tensor_is_refused(packed: Path, tmp_path: Path) -> None:
    def other_plan(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        document["plan"]["layers"]["0"]["weight"] = "Q1.3"

    def other_name(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["3.Bias"] = tensors.pop("3.bias")

    def other_bias(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["3.bias"] = tensors["3.bias"] + 1

    def other_type(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["3.bias"] = tensors["3.bias"].view(np.int32)

    for number, change in enumerate((other_plan, other_name, other_bias, other_type)):
        path = rewritten(packed, tmp_path / f"{number}.unetq", change)
        assert "checksum does not match" in refused(path)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small(channels=5), "has the shape"),
        (lambda: Other(), "it has no 0, 3, 1"),
        (lambda: nn.Sequential(*small().children(), nn.Conv2d(1, 1, 1)), "missing"),
        (lambda: nn.Sequential(*list(small().children())[:3]), "it has no 3"),
        (lambda: nn.Sequential(*list(small().children())[:1], nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 1, 1)), "1 is a GroupNorm, expected a batch norm"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, (1, 9)), *list(small().children())[1:]), r"'0.weight' has the shape \(4, 1, 3, 3\), expected \(4, 1, 1, 9\)"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(1, 4, 3), *list(small().children())[1:]), r"'0.weight' has the shape \(4, 1, 3, 3\), expected \(1, 4, 3, 3\)"),
        (lambda: nn.Sequential(nn.Identity(), *list(small().children())[1:]), "cannot quantize a layer of class Identity"),
        (lambda: nn.Sequential(nn.Conv3d(1, 4, 3), *list(small().children())[1:]), "'0.weight' has the shape"),
    ],
)  # fmt: skip
def test_a_wrong_network_is_refused(packed: Path, build: Callable[[], nn.Module], message: str) -> None:
    found = refused(packed, network=build())
    assert "holds a Sequential that does not fit this" in found
    assert re.search(message, found), found


def test_a_quantized_network_is_refused(packed: Path) -> None:
    network = small()
    quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"), IMAGE)
    assert "quantized Sequential" in refused(packed, network=network)


def test_a_float_network_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Sequential is not quantized"):
        pack(small(), tmp_path / "model.unetq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["0.weight", "3.weight", "3.bias", "1.running_var", "3.weight_quantizer.log2_scale"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_not_packed(key: str, bad: float, tmp_path: Path) -> None:
    network = small()
    quantize(network, QuantPlan.uniform(network, "int4", "int6"), IMAGE)
    network.state_dict()[key].view(-1)[0] = bad
    with pytest.raises(ValueError, match=f"'{key}' holds NaN or infinity"):
        pack(network, tmp_path / "model.unetq")
    assert list(tmp_path.iterdir()) == []


def quantized_small() -> nn.Module:
    network = small()
    return quantize(network, QuantPlan.uniform(network, "Q0.4", "Q6.0"), IMAGE)


def test_an_unwritable_place(tmp_path: Path) -> None:
    network = quantized_small()
    with pytest.raises(FileNotFoundError, match="missing"):
        pack(network, tmp_path / "missing" / "model.unetq")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(OSError, match="file"):
        pack(network, tmp_path / "file" / "model.unetq")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        pack(network, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(PermissionError):
        pack(quantized_small(), folder / "model.unetq")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_failure_keeps_the_old_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(quantized_small(), tmp_path / "model.unetq")
    before = path.read_bytes()
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    def broken(*paths: Any) -> None:
        raise OSError(5, "Input/output error")

    if failing == "write":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr("monai_unetq.deploy.packed.os.replace", broken)
    network = quantized_small()
    with torch.no_grad():
        quantized_layers(network)["3"].weight.mul_(2)
    with pytest.raises(OSError, match=r"No space|Input/output"):
        pack(network, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_packing_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    network = quantized_small().train()
    classes = {name: type(module) for name, module in network.named_modules()}
    before = copy.deepcopy(network.state_dict())
    pack(network, tmp_path / "model.unetq")
    assert {name: type(module) for name, module in network.named_modules()} == classes
    assert all(module.training for module in network.modules())
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


def test_the_plan_is_in_the_file(packed: Path) -> None:
    document, _, _ = read_independently(packed)
    plan = QuantPlan.from_json(document["plan"])
    assert dict(plan.layers) == {
        "0": LayerPlan({WHOLE: QFormat("Q0.4")}, {"input": QFormat("UQ0.8")}),
        "3": LayerPlan({WHOLE: QFormat("Q0.4")}, {"input": QFormat("UQ6.0")}),
    }
    assert document["folded"] == ["1"]
    assert set(document["versions"]) == {"monai-unetq", "torch"}
    assert set(quantized_layers(unpack(packed, small()))) == {"0", "3"}


def test_a_network_with_other_functions_is_refused(tmp_path: Path) -> None:
    """No tensor tells tanh from ReLU, or one way of upsampling from another."""
    net = FixedPointUNet(1, 1, width=4)
    quantize(net, QuantPlan.uniform(net, "Q0.4", "Q6.0", input="UQ0.8"))
    path = pack(net, tmp_path / "m.unetq")
    with pytest.raises(ValueError, match=r"'encoder\.0\.act1' is Tanh\(\), expected ReLU\(\)"):
        unpack(path, FixedPointUNet(1, 1, width=4, activation="tanh"))
    other = FixedPointUNet(1, 1, width=4)
    other.upsample[1] = nn.Upsample(scale_factor=2, mode="nearest")
    with pytest.raises(ValueError, match=r"'upsample\.1' is Upsample\(.*nearest"):
        unpack(path, other)


# Weights, coding of ternary ones, and what the tests below expect to be stored for 36 and for 4 weights.
LOW_BIT: dict[str, tuple[str, TernaryCoding, int, int]] = {
    "binary": ("binary", "base3", 5, 1),  # 36 / 8 = 4.5, 4 / 8 = 0.5
    "ternary": ("ternary", "base3", 8, 1),  # 36 / 5 = 7.2
    "ternary, 2 bits": ("ternary", "2bit", 9, 1),
    "pow2-3": ("pow2-3", "base3", 14, 2),  # 36 · 3 / 8 = 13.5, 12 / 8 = 1.5
    "pow2-4": ("pow2-4", "base3", 18, 2),
    "pow2-5": ("pow2-5", "base3", 23, 3),  # 22.5, 2.5
    "pow2-6": ("pow2-6", "base3", 27, 3),
}

GRIDS: dict[str, dict[str, Any]] = {
    "power of two": {},
    "free": {"scale": "free"},
    "per tensor": {"granularity": "tensor"},
    "per tensor, free": {"granularity": "tensor", "scale": "free"},
    "learned": {"learned": True},
    "learned, free": {"learned": True, "scale": "free"},
}


@pytest.mark.parametrize(
    ("weights", "grid", "activation"),
    [
        *((weights, grid, "relu") for weights in ("binary", "ternary") for grid in GRIDS),
        *((weights, "free", "tanh") for weights in ("binary", "ternary", "ternary, 2 bits")),
        # Scales of these are powers of two and are not learned, whatever the plan says.
        ("pow2-3", "power of two", "relu"),
        ("pow2-3", "learned, free", "tanh"),
        ("pow2-5", "power of two", "tanh"),
        ("pow2-5", "per tensor", "relu"),
    ],
)
def test_low_bit_weights_there_and_back(weights: str, grid: str, activation: str, tmp_path: Path) -> None:
    name, coding, *_ = LOW_BIT[weights]
    options: dict[str, Any] = {"activation": activation, "upsample": "transposed"}
    network = unet(**options)
    quantize(network, QuantPlan.uniform(network, name, "int6", last="int8", **GRIDS[grid]), IMAGE)
    calibrate(network, [IMAGE])
    path = pack(network, tmp_path / "model.unetq", ternary=coding)
    found = unpack(path, unet(seed=7, **options))
    assert_same_network(found, network)
    assert plan_of(found) == plan_of(network)
    again = pack(found, tmp_path / "again.unetq", ternary=coding)
    assert again.read_bytes() == path.read_bytes()
    _, _, codes = read_independently(path)
    layers = quantized_layers(found)
    assert len(codes) == len(layers)
    seen = set()
    for key, values in codes.items():
        layer = layers[key.removesuffix(".weight")]
        expected = layer.weight_quantizer.codes(layer.output_major(layer.weight))
        assert np.array_equal(values, expected.numpy().reshape(-1)), key
        if layer.weight_quantizer.number_format == QFormat(name):
            seen.update(values.tolist())
    number_format = QFormat(name)
    every = {*range(number_format.qmin, number_format.qmax + 1)} - ({0} if name == "binary" else set())
    assert seen == every if number_format.bits < 4 else len(seen) > 8


@pytest.mark.parametrize(
    ("weights", "activations", "activation"),
    [
        ("binary", "binary", "relu"),
        ("binary", "binary", "tanh"),
        ("ternary", "ternary", "relu"),
        ("ternary", "ternary", "tanh"),
        ("binary", "float", "relu"),
        ("pow2-4", "Q4.0", "tanh"),
    ],
)
def test_low_bit_activations_there_and_back(
    weights: str, activations: str, activation: str, tmp_path: Path
) -> None:
    network = unet(activation=activation)
    quantize(network, QuantPlan.uniform(network, weights, activations, input="UQ0.8", last="int8"), IMAGE)
    calibrate(network, [IMAGE])
    path = pack(network, tmp_path / "model.unetq")
    assert_same_network(unpack(path, unet(seed=7, activation=activation)), network)
    assert_same_network(unpack(path, unet(seed=8, activation=activation)), fold(network))


@pytest.mark.parametrize("build", [grouped, twice_named])
@pytest.mark.parametrize("weights", ["binary", "ternary", "pow2-4"])
def test_low_bit_weights_of_other_networks(
    build: Callable[[], nn.Module], weights: str, tmp_path: Path
) -> None:
    name, coding, *_ = LOW_BIT[weights]
    network, image = build(), torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    quantize(network, QuantPlan.uniform(network, name, "int6", scale="free"), image)
    calibrate(network, [image])
    path = pack(network, tmp_path / "model.unetq", ternary=coding)
    target = build()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1.0)
    assert_same_network(unpack(path, target), network, image)


@pytest.mark.parametrize("weights", list(LOW_BIT))
def test_low_bit_weights_take_the_bytes_that_were_counted_by_hand(weights: str, tmp_path: Path) -> None:
    name, coding, first, last = LOW_BIT[weights]
    network = small()
    quantize(network, QuantPlan.uniform(network, name, "int6", input="UQ0.8"), IMAGE)
    path = pack(network, tmp_path / "model.unetq", ternary=coding)
    document, tensors, _ = read_independently(path)
    assert tensors["0.weight"].nbytes == first
    assert tensors["3.weight"].nbytes == last
    ternary = {"0.weight": coding, "3.weight": coding} if name == "ternary" else None
    assert document.get("codings") == ternary
    assert document["version"] == (2 if ternary else 1)
    held = inspect_packed(path)
    assert held["weight_bytes"] == first + last
    assert [layer["bytes"] for layer in held["layers"]] == [first, last]
    assert [layer["bits"] for layer in held["layers"]] == [8 * first / 36, 8 * last / 4]


@pytest.mark.parametrize(("weights", "mebibytes", "in_a_byte"), [("binary", 0.57, 8), ("ternary", 0.92, 5)])
def test_low_bit_weights_of_the_papers_network(
    weights: str, mebibytes: float, in_a_byte: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, image = FixedPointUNet(1, 1).eval(), torch.zeros(1, 1, 8, 8)
    assert sum(p.numel() for p in network.parameters()) == 4_837_249
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    counts = [m.weight.numel() for m in layers]
    quantize(network, QuantPlan.uniform(network, weights, "int4"), image)
    held = inspect_packed(pack(network, tmp_path / "model.unetq"))
    assert held["weight_bytes"] == sum(-(-count // in_a_byte) for count in counts)
    assert held["weight_bytes"] / 2**20 == pytest.approx(mebibytes, abs=0.006)
    assert 8 * held["weight_bytes"] / sum(counts) == pytest.approx(8 / in_a_byte, abs=1e-4)
    # What the cost counts is what the file holds, and a bias for each channel when the norms are folded.
    beside = 4 * sum(m.out_channels for m in layers)
    assert cost_of(fold(network), image).weight_bytes == held["weight_bytes"] + beside


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed network with ternary weights, five in a byte, and one layer of int4."""
    network = small()
    quantize(network, QuantPlan.uniform(network, "ternary", "int6", input="UQ0.8", last="int4"), IMAGE)
    return pack(network, tmp_path_factory.mktemp("ternary") / "model.unetq")


def forged(packed: Path, path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> Path:
    """``rewritten``, with the checksum of what it holds: only the content can give it away."""

    def change_and_sign(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        change(document, tensors)
        del document["checksum"]
        held = {key: torch.from_numpy(value) for key, value in tensors.items()}
        document["checksum"] = packing._checksum(document, held)

    return rewritten(packed, path, change_and_sign)


def header_of(path: Path) -> str:
    with safe_open(path, framework="numpy") as file:
        text: str = file.metadata()[KEY]
    return text


def refused_everywhere(path: Path) -> str:
    """``refused`` by ``unpack``, and with the same words by ``inspect_packed``."""
    found = refused(path)
    with pytest.raises(ValueError) as caught:
        inspect_packed(path)
    assert str(caught.value) == found
    return found


@pytest.mark.parametrize("byte", [243, 250, 255])
def test_a_byte_above_five_digits_is_refused(ternary: Path, byte: int, tmp_path: Path) -> None:
    def change(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["0.weight"][3] = byte

    path = forged(ternary, tmp_path / "forged.unetq", change)
    assert (
        refused_everywhere(path)
        == f"{path}: '0.weight': byte 3 is {byte}, five ternary digits give 242 at most"
    )


def test_digits_behind_the_last_weight_are_refused(ternary: Path, tmp_path: Path) -> None:
    def change(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["0.weight"][-1] = 3 + tensors["0.weight"][-1] % 3  # 36 weights: one digit in the last byte

    path = forged(ternary, tmp_path / "forged.unetq", change)
    assert refused_everywhere(path) == f"{path}: '0.weight': the digits after the last code are not zero"


@pytest.mark.parametrize("removed", [1, 8])
def test_ternary_weights_that_are_too_short_are_refused(ternary: Path, removed: int, tmp_path: Path) -> None:
    def change(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["0.weight"] = tensors["0.weight"][:-removed].copy()

    path = forged(ternary, tmp_path / "forged.unetq", change)
    assert f"'0.weight': found {8 - removed} bytes, expected 8 for 36 ternary digits" in refused_everywhere(
        path
    )


@pytest.mark.parametrize("coding", ["base4", "", None, 3, ["base3"]])
def test_a_foreign_coding_is_refused(ternary: Path, coding: object, tmp_path: Path) -> None:
    def change(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        document["codings"]["0.weight"] = coding

    path = forged(ternary, tmp_path / "forged.unetq", change)
    assert refused_everywhere(path) == (
        f"{path}: '0.weight': {coding!r} is no coding of ternary weights, expected 'base3' or '2bit'"
    )


def test_another_coding_than_the_one_it_was_stored_with_is_refused(ternary: Path, tmp_path: Path) -> None:
    def other(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        document["codings"]["0.weight"] = "2bit"

    def none(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        del document["codings"]["0.weight"]

    for number, change in enumerate((other, none)):
        path = forged(ternary, tmp_path / f"{number}.unetq", change)
        assert "'0.weight': found 8 bytes, expected 9 for 36 codes of 2 bits" in refused_everywhere(path)


def test_codings_of_what_is_not_ternary_are_refused(ternary: Path, tmp_path: Path) -> None:
    def of_integers(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        document["codings"]["3.weight"] = "base3"

    def of_nothing(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        document["codings"]["9.weight"] = "base3"

    path = forged(ternary, tmp_path / "integers.unetq", of_integers)
    assert "'3.weight' has the coding 'base3', but is int4, not ternary" in refused_everywhere(path)
    path = forged(ternary, tmp_path / "nothing.unetq", of_nothing)
    assert "a coding for '9.weight', which is no packed weight" in refused_everywhere(path)


@pytest.mark.parametrize("codings", [None, [], "base3"])
def test_codings_that_are_no_mapping_are_refused(ternary: Path, codings: object, tmp_path: Path) -> None:
    def change(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        document["codings"] = codings

    path = forged(ternary, tmp_path / "forged.unetq", change)
    assert "'codings' is missing from its header or no dict" in refused_everywhere(path)


def test_a_code_beyond_the_format_is_refused(tmp_path: Path) -> None:
    """Four bits hold -4 to 11, pow2-4 has codes up to 4."""
    network = small()
    quantize(network, QuantPlan.uniform(network, "pow2-4", "int6"), IMAGE)

    def change(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["3.weight"][0] = 15 << 4 | 4  # codes 0 and 11

    path = forged(pack(network, tmp_path / "model.unetq"), tmp_path / "forged.unetq", change)
    found = refused_everywhere(path)
    assert f"{path}: '3.weight': found codes " in found
    assert found.endswith(" to 11, those of pow2-4 are -4 to 4")


def test_files_of_version_1_still_load(ternary: Path, packed: Path, tmp_path: Path) -> None:
    """They have no entry for codings; ternary weights stand at 2 bits in them."""
    assert json.loads(header_of(packed))["version"] == 1  # what can be said in version 1 is
    assert "codings" not in json.loads(header_of(packed))
    expected, other = small(), small()
    unpack(ternary, expected)

    def older(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        assert document.pop("codings") == {"0.weight": "2bit"}
        document["version"] = 1

    two_bits = pack(expected, tmp_path / "model.unetq", ternary="2bit")
    path = forged(two_bits, tmp_path / "older.unetq", older)
    assert_same_network(unpack(path, other), expected)
    assert inspect_packed(path)["layers"] == inspect_packed(two_bits)["layers"]


def test_truncated_ternary_files_are_refused(ternary: Path, tmp_path: Path) -> None:
    data = ternary.read_bytes()
    path = tmp_path / "cut.unetq"
    for length in np.linspace(0, len(data) - 1, 20).astype(int):
        path.write_bytes(data[:length])
        assert "truncated, corrupted" in refused_everywhere(path)


@pytest.mark.parametrize("weights", ["ternary", "int4"])
def test_an_unknown_coding_is_not_packed(weights: str, tmp_path: Path) -> None:
    network = small()
    quantize(network, QuantPlan.uniform(network, weights, "int6"), IMAGE)
    path = tmp_path / "model.unetq"
    with pytest.raises(
        ValueError, match="'base4' is no coding of ternary weights, expected 'base3' or '2bit'"
    ):
        pack(network, path, ternary="base4")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
