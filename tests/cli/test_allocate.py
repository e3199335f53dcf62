"""``unetq allocate``: a plan, a table, the budgets that are reached, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from monai_unetq.allocation import allocate, omega_of
from monai_unetq.cli import main
from monai_unetq.plan import QuantPlan
from monai_unetq.sensitivity import Sensitivities
from monai_unetq.surgery.workload import Unit
from tests.allocation.problems import WIDTHS, made_up

Printed = Callable[..., str]

UNITS = (
    Unit("first", "input", 36, 64, 256, 2304, 1),
    Unit("up.0", "skip", 400, 256, 128, 9000, 4),
    Unit("up.0", "up", 600, 384, 0, 12000, 6),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    omega = {
        (unit.name, kind): {bits: (number + 1) * 4.0**-bits for bits in WIDTHS}
        for number, unit in enumerate(UNITS)
        for kind in ("weight", "input")
    }
    made_up(UNITS, omega).save(tmp_path / "sensitivity.json")  # type: ignore[arg-type]
    return tmp_path / "sensitivity.json"


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What ``unetq allocate`` prints; its error where it ends in one."""
    monkeypatch.delenv("UNETQ_DEBUG", raising=False)

    def run(*arguments: str | Path) -> str:
        status = main(["allocate", *map(str, arguments)])
        captured = capsys.readouterr()
        assert status == (2 if captured.err.startswith("unetq: error: ") else 0), captured.err
        return captured.out if status == 0 else captured.err.removeprefix("unetq: error: ")

    return run


def test_the_plan_is_the_one_of_allocate(file: Path, tmp_path: Path, printed: Printed) -> None:
    out = tmp_path / "plan.json"
    budgets = ("--budget", "weights=4bits", "--budget", "activations=6bits")
    text = printed(file, *budgets, "--choices", "2,4,8", "--out", out)
    sensitivities = Sensitivities.load(file)
    plan = allocate(sensitivities, budget=["weights=4bits", "activations=6bits"], choices=(2, 4, 8))
    assert QuantPlan.load(out) == plan
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "part", "weight", "input", "Ω"]
    assert lines[2].split()[:3] == ["first", str(plan["first"].weight), str(plan["first"].input)]
    skip = plan["up.0"]
    assert lines[3].split()[:4] == ["up.0", "skip", str(skip.weight_of("skip")), str(skip.input_of("skip"))]
    assert lines[5].split() == ["total", f"{sum(omega_of(sensitivities, plan).values()):.3g}"]
    assert lines[7].startswith("weights=4bits: weights=")
    assert lines[8].startswith("activations=6bits: activations=")
    assert lines[9] == f"plan: {out}"


def test_constraints_and_controls_reach_allocate(file: Path, tmp_path: Path, printed: Printed) -> None:
    out = tmp_path / "plan.json"
    printed(
        file, "--budget", "size=1.2x", "--out", out, "--keep-float", "first.input", "--fix", "first.weight=6",
        "--at-least", "up.0.input[skip]=8", "--at-most", "*.weight[up]=3", "up.0.weight*=6",
    )  # fmt: skip
    plan = QuantPlan.load(out)
    assert (str(plan["first"].weight), str(plan["first"].input)) == ("int6", "float")
    assert plan["up.0"].weight_of("up").bits == 3
    assert plan["up.0"].weight_of("skip").bits == 6
    printed(file, "--budget", "weights=3.5bits", "--out", out, "--group", "first,up.0[skip]")
    plan = QuantPlan.load(out)
    assert plan["first"].weight == plan["up.0"].weight_of("skip")
    random = ("--budget", "bops=60x", "--method", "random", "--out", out)
    found = []
    for seed in (1, 1, 2, 3, 4, 5):
        printed(file, *random, "--seed", str(seed))
        found.append(out.read_text())
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_pareto_writes_a_picture(file: Path, tmp_path: Path, printed: Printed) -> None:
    picture = tmp_path / "front.png"
    printed(
        file, "--budget", "size=8x", "--budget", "bops=30x", "--out", tmp_path / "plan.json",
        "--pareto", picture,
    )  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "size=50x"], "size=50x is out of reach; the nearest that is not is size="),
        (["--budget", "size=8"], "budget 'size=8' is none; accepted: size=8x"),
        (
            ["--budget", "size=8x", "--fix", "gone=4"],
            "fixed: 'gone' matches none of the tensors first.weight",
        ),
        (["--budget", "size=8x", "--choices", "5"], "'first.weight' was not measured at 5 bits"),
    ],
)
def test_errors_write_nothing(
    arguments: list[str], message: str, file: Path, tmp_path: Path, printed: Printed
) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "front.png"
    assert printed(file, *arguments, "--out", out, "--pareto", picture).startswith(message)
    assert not out.exists()
    assert not picture.exists()


def test_a_file_that_holds_no_sensitivities(tmp_path: Path, printed: Printed) -> None:
    other = tmp_path / "plan.json"
    other.write_text(json.dumps({"version": 7}))
    assert printed(other, "--budget", "size=8x", "--out", tmp_path / "out.json").startswith(
        f"{other}: 'version' is 7"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fix", "first"], "expected PATTERN=BITS such as 'up.*=4', found 'first'"),
        (["--at-most", "first=x"], "expected PATTERN=BITS"),
        (["--choices", "2,a"], "expected bit widths such as 2,4,8, found '2,a'"),
        (["--method", "best"], "invalid choice: 'best'"),
    ],
)
def test_arguments_that_do_not_parse(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["allocate", "sensitivity.json", "--budget", "size=8x", "--out", "plan.json", *arguments])
    assert message in capsys.readouterr().err
