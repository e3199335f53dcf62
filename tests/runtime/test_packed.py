"""Packed files read without torch: the same codes, and every way a file can be wrong."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from monai_unetq.deploy import pack
from monai_unetq.networks import FixedPointUNet
from monai_unetq.plan import QuantPlan
from monai_unetq.runtime.packed import KEY, StoredTensor, layer_and_part, part_key, read
from monai_unetq.surgery import quantize, split
from monai_unetq.surgery.quantize import quantized_layers

IMAGE = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def network(weights: str = "int4", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = FixedPointUNet(1, 1, width=2, upsample="transposed").eval()
    if options.pop("split", False):
        split(net, IMAGE)
    plan = QuantPlan.uniform(net, weights, "int6", input="UQ0.8", last="int8", **options)
    return quantize(net, plan, IMAGE)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(network(split=True), tmp_path_factory.mktemp("packed") / "model.unetq")


@pytest.mark.parametrize("ternary", ["base3", "2bit"])
@pytest.mark.parametrize("weights", ["int4", "Q0.4:literal", "ternary", "binary", "pow2-4"])
def test_codes_are_the_quantizers(weights: str, ternary: Any, tmp_path: Path) -> None:
    net = network(weights, split=weights in ("int4", "ternary"))
    file = read(pack(net, tmp_path / "model.unetq", ternary))
    found = set()
    for name, layer in quantized_layers(net).items():
        seen = layer.folded_weights()
        for part, quantizer in layer.weight_quantizers.items():
            key = part_key(f"{name}.weight", part)
            assert layer_and_part(key) == (name, part)
            codes = quantizer.codes(seen[part]).numpy().reshape(-1)
            assert np.array_equal(file.codes(key), codes)
            assert file.number_format(key) == quantizer.number_format
            found.add(key)
    assert found == set(file.document["packed"])


def test_other_tensors_are_as_safetensors_reads_them(packed: Path) -> None:
    file, expected = read(packed), load_file(packed)
    assert file.tensors.keys() == expected.keys()
    for key, value in expected.items():
        found = file.tensors[key].array()
        assert found.dtype == value.dtype
        assert np.array_equal(found, value)


def test_a_type_that_numpy_has_not() -> None:
    with pytest.raises(ValueError, match="numpy has no type bfloat16"):
        StoredTensor("bfloat16", (1,), b"\0\0").array()


def test_it_needs_no_torch(packed: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from monai_unetq.runtime import packed\n"
        f"file = packed.read({str(packed)!r})\n"
        "print(len(file.document['packed']), sum(file.codes(key).size for key in file.document['packed']))\n"
        "assert not [name for name in sys.modules if name.startswith(('torch.', 'monai.'))]"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    file = read(packed)
    weights = sum(layer.weight.numel() for layer in quantized_layers(network(split=True)).values())
    assert done.stdout.split() == [str(len(file.document["packed"])), str(weights)]


def test_truncated_files(packed: Path, tmp_path: Path) -> None:
    data, path = packed.read_bytes(), tmp_path / "cut.unetq"
    for length in [*range(12), *np.linspace(12, len(data) - 1, 20).astype(int)]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: truncated, corrupted"):
            read(path)


def test_flipped_bits(packed: Path, tmp_path: Path) -> None:
    data, path = packed.read_bytes(), tmp_path / "flipped.unetq"
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    for offset in [*range(0, 60, 7), *range(begin, len(data), 211), len(data) - 1]:
        damaged = bytearray(data)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)


def test_foreign_and_missing_files(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "foreign.unetq"
    for content in (b"", b"PK\x03\x04" * 9, b'{"a": 1}' * 9, bytes(64)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated, corrupted, or no safetensors file"):
            read(path)
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="no packed checkpoint"):
        read(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "none.unetq")
    tensors = load_file(packed)
    newer = {"version": 9}
    save_file(tensors, path, {KEY: json.dumps(newer)})
    with pytest.raises(ValueError, match="packed format 9, this program reads up to 3"):
        read(path)
