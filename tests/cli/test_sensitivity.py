"""``unetq sensitivity``: a whole run on a trained bundle, what it reads, what it refuses, and processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import monai_unetq as uq
from monai_unetq.cli import main
from monai_unetq.cli.sensitivity import dice_percent, read_bundle, training_batches
from monai_unetq.datasets import data_list, write_phantom
from monai_unetq.sensitivity import Sensitivities

ROOT = Path(__file__).parents[2]
SET = ["--set", "width=2", "patch_size=[32, 32]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom data set."""
    return write_phantom("em", tmp_path_factory.mktemp("raw"), size=64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The EM bundle with weights of width 2."""
    folder = tmp_path_factory.mktemp("bundle") / "em_unet"
    shutil.copytree(ROOT / "bundles" / "em_unet", folder, ignore=shutil.ignore_patterns("*.pt"))
    torch.manual_seed(0)
    torch.save(uq.networks.FixedPointUNet(1, 1, width=2).state_dict(), folder / "models" / "model.pt")
    return folder


def run(bundle: Path, data: Path, out: Path, *more: str) -> int:
    arguments = ["sensitivity", str(bundle), "--data", str(data), "--out", str(out), *more]
    return main([*arguments, "--images", "2", "--widths", "2,4", *SET])


def test_a_whole_run(bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra 'report'")
    out, figure = tmp_path / "found.json", tmp_path / "traces.png"
    assert run(bundle, data, out, "--probes", "4", "--figure", str(figure)) == 0
    found = Sensitivities.load(out)
    assert found.metric == "hessian" and found.image == (1, 1, 32, 32)
    assert "decoder.0.conv1.weight[skip]" in found and set(found["last.input"].omega) == {2, 4}
    printed = capsys.readouterr().out
    for name, entry in found.items():
        assert f"{name} " in printed and f"{entry.trace:.3g}" in printed
    assert "4 probes; tolerance 0.05 not reached: more --probes" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["found.json", "traces.png"], (
        "no state is left"
    )
    assert run(bundle, data, tmp_path / "again.json", "--probes", "4") == 0
    assert (tmp_path / "again.json").read_text() == out.read_text(), "the same seed"


@pytest.mark.parametrize("metric", ["fisher", "sqnr", "drop"])
def test_the_other_metrics(
    metric: str, bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    options = ["--without", "encoder.*", "--no-split"] if metric == "drop" else ["--images-per-pass", "1"]
    assert run(bundle, data, out, "--metric", metric, *options) == 0
    found = Sensitivities.load(out)
    assert found.metric == metric
    assert ("encoder.0.conv1.weight" in found) == (metric != "drop")
    assert ("decoder.0.conv1.weight" in found) == (metric == "drop")
    assert "probes" not in capsys.readouterr().out


def test_an_interrupted_run_goes_on(
    bundle: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from monai_unetq.sensitivity import metrics

    assert run(bundle, data, tmp_path / "whole.json", "--probes", "6") == 0
    keep, calls = metrics._keep, []

    def interrupt(*arguments: Any) -> None:
        keep(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    out = tmp_path / "found.json"
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_keep", interrupt)
        assert run(bundle, data, out, "--probes", "6") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not out.exists() and (tmp_path / "found.json.state").exists()
    assert run(bundle, data, out, "--probes", "6") == 0
    assert out.read_text() == (tmp_path / "whole.json").read_text()
    assert not (tmp_path / "found.json.state").exists()


def test_batches_are_training_cases_drawn_by_the_seed(bundle: Path, data: Path) -> None:
    overrides = [("width", "2"), ("patch_size", "[32, 32]")]
    found = read_bundle(bundle, data, overrides=overrides)
    assert {case["image"] for case in found.dataset.data} == {c["image"] for c in data_list(data, 0, "train")}
    one, two, other = (training_batches(found, 7, seed) for seed in (0, 0, 1))
    assert [len(image) for image, _ in one] == [3, 4]  # 7 images, the training's batches are 5
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    assert one[0][0].shape == (3, 1, 32, 32) == one[0][1].shape


def test_dice_is_the_mean_over_classes() -> None:
    label = torch.tensor([[[[1.0, 1, 0, 0]]]])
    assert dice_percent(torch.tensor([[[[1.0, -1, -1, -1]]]]), label) == pytest.approx(
        100 * (2 / 3 + 4 / 5) / 2
    )
    logits = torch.tensor([[[[0.0, 0, 9, 9]], [[9.0, 9, 0, 0]]]])
    assert dice_percent([logits, logits], label) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "width=4"], "does not fit this FixedPointUNet"),
        (["--set", "depth=4"], "there is no key 'depth' to set"),
        (["--set", "protocol=paper", *SET[1:]], "which is no training case of fold 0"),
        (["--fold", "99"], "there is no fold 99"),
        (["--widths", "1,2", *SET], "between 2 and 16"),
        (["--without", "x*", *SET], "'x*' matches none of the layers"),
    ],
    ids=["width", "key", "protocol", "fold", "widths", "without"],
)
def test_what_is_refused(
    arguments: list[str], message: str, bundle: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "found.json"
    base = ["sensitivity", str(bundle), "--data", str(data), "--out", str(out), "--images", "1"]
    assert main([*base, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_that_are_missing(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "none", data, out) == 2
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err
    assert run(tmp_path / "empty", data, out) == 2
    assert "train.yaml: no such file, expected a MONAI bundle's folder" in capsys.readouterr().err
    untrained = tmp_path / "untrained"
    shutil.copytree(bundle, untrained, ignore=shutil.ignore_patterns("*.pt"))
    assert run(untrained, data, out) == 2
    assert "model.pt: no such file: train the bundle first" in capsys.readouterr().err
    assert run(bundle, data, tmp_path / "none" / "found.json") == 2
    assert "no such folder to write found.json in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument", [["--widths", "2,x"], ["--images", "0"], ["--set", "width"], ["--metric", "guess"]]
)
def test_arguments_that_do_not_parse(argument: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                "sensitivity",
                str(tmp_path),
                "--data",
                str(tmp_path),
                "--out",
                str(tmp_path / "x.json"),
                *argument,
            ]
        )


def test_torchrun_writes_once(bundle: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [
        *launch,
        "-m",
        "monai_unetq.cli",
        "sensitivity",
        str(bundle),
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, "--images", "2", "--probes", "4", "--widths", "2,4", *SET],
        text=True, capture_output=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sensitivities: ") == 1
    assert json.loads(out.read_text())["conditions"]["probes"] == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["found.json"]
