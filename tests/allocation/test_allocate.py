"""``allocate`` against every combination of widths, and what it refuses."""

from __future__ import annotations

import itertools
import math
import re
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import monai_unetq as uq
from monai_unetq.allocation import allocate, budgets_reached, omega_of
from monai_unetq.allocation.allocate import Method
from monai_unetq.allocation.budget import Budget
from monai_unetq.allocation.cost import of_width
from monai_unetq.parts import WHOLE
from monai_unetq.plan import QuantPlan
from monai_unetq.sensitivity.table import KINDS, Kind, Sensitivities
from monai_unetq.surgery.workload import Unit, workload

from .problems import WIDTHS, large, made_up

CHOICES = (2, 4, 8)


def named(*names: str) -> tuple[Unit, ...]:
    """Units whose part is in brackets, each with other counts."""
    units = []
    for number, name in enumerate(names, 1):
        layer, _, part = name.partition("[")
        units.append(
            Unit(
                layer,
                part.rstrip("]") or WHOLE,
                100 * number + 3,
                64 * number,
                64,
                900 * (6 - number),
                number,
            )
        )
    return tuple(units)


UNITS = named("first", "decoder[skip]", "decoder[up]")


def falling(units: tuple[Unit, ...] = UNITS, scales: tuple[float, ...] = (1.0, 30.0, 5.0)) -> Sensitivities:
    """Ω = scale × 4^-bits, inputs a tenth of weights."""
    return made_up(
        units,
        {
            (unit.name, kind): {b: scale * share * 4.0**-b for b in WIDTHS}
            for unit, scale in zip(units, scales, strict=False)
            for kind, share in zip(KINDS, (1.0, 0.1), strict=True)
        },
    )


def total(sensitivities: Sensitivities, plan: QuantPlan) -> float:
    return math.fsum(omega_of(sensitivities, plan).values())


def widths(plan: QuantPlan, sensitivities: Sensitivities) -> dict[str, tuple[int, int]]:
    """Unit → bits of weight and input."""
    return {
        u.name: (plan[u.layer].weight_of(u.part).bits, plan[u.layer].input_of(u.part).bits)
        for u in sensitivities.units
    }


def brute(sensitivities: Sensitivities, budgets: list[str], free: Any = lambda chosen: True) -> float:
    """The least total Ω of all combinations of widths that keep the budgets and what ``free`` asks for."""
    units, parsed = sensitivities.units, [Budget.parse(text) for text in budgets]
    limits = [budget.limit(units, sensitivities.other_parameters) for budget in parsed]
    best = math.inf
    for flat in itertools.product(CHOICES, repeat=2 * len(units)):
        chosen = {u.name: flat[2 * i : 2 * i + 2] for i, u in enumerate(units)}
        amounts = [sum(b.amount(u, *map(of_width, chosen[u.name])) for u in units) for b in parsed]
        if free(chosen) and all(a <= limit for a, limit in zip(amounts, limits, strict=True)):
            entries = [entry for u in units for entry in _entries(sensitivities, u)]
            best = min(best, math.fsum(e.omega[b] for e, b in zip(entries, flat, strict=True)))
    return best


def _entries(sensitivities: Sensitivities, unit: Unit) -> list[Any]:
    return [
        e
        for kind in ("weight", "input")
        for e in sensitivities.values()
        if (e.layer, e.part, e.kind) == (unit.layer, unit.part, kind)
    ]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Sensitivities, list[str], dict[str, Any], Any]:
    """Three units, one to two budgets, sometimes a group or a least width; and what a combination has to keep."""
    count, macs = st.integers(1, 5000), st.integers(1, 10**6)
    units = tuple(Unit(u.layer, u.part, draw(count), draw(count), 64, draw(macs), 1) for u in UNITS)
    omegas = st.one_of(st.just(0.0), st.floats(1e-12, 1e3))
    omega: dict[tuple[str, Kind], dict[int, float]] = {
        (u.name, kind): {b: draw(omegas) for b in CHOICES} for u in units for kind in ("weight", "input")
    }
    spellings = st.one_of(
        st.integers(420, 1500).map(lambda n: f"size={n / 100}x"),
        st.integers(200, 800).map(lambda n: f"weights={n / 100}bits"),
        st.integers(200, 800).map(lambda n: f"activations={n / 100}bits"),
        st.integers(1600, 25600).map(lambda n: f"bops={n / 100}x"),
        st.integers(1500, 4000).map(lambda n: f"energy={n / 100}x"),
    )
    budgets = draw(st.lists(spellings, min_size=1, max_size=2))
    rules: dict[str, tuple[dict[str, Any], Any]] = {
        "none": ({}, lambda chosen: True),
        "group": (
            {"groups": [["first", "*[up]"]]},
            lambda chosen: chosen["first"] == chosen["decoder[up]"],
        ),
        "at least": (
            {"at_least": {"decoder.weight[skip]": 4}},
            lambda chosen: chosen["decoder[skip]"][0] >= 4,
        ),
        "at most": ({"at_most": {"first": 4}}, lambda chosen: max(chosen["first"]) <= 4),
        "fixed": ({"fixed": {"decoder.input*": 8}}, lambda c: c["decoder[up]"][1] == c["decoder[skip]"][1] == 8),
    }  # fmt: skip
    constraints, free = rules[draw(st.sampled_from(sorted(rules)))]
    return made_up(units, omega, draw(st.integers(0, 50))), budgets, constraints, free


@settings(max_examples=60)
@given(problems())
def test_equals_brute_force(problem: tuple[Sensitivities, list[str], dict[str, Any], Any]) -> None:
    sensitivities, budgets, constraints, free = problem
    kinds = {kind for text in budgets for kind in Budget.parse(text).kinds}

    def widest(chosen: dict[str, tuple[int, int]]) -> bool:
        """Kinds that no budget is on take the widest choice."""
        at_most = constraints.get("at_most", {})
        return free(chosen) and all(
            kind in kinds or bits == min(8, at_most.get(name, 8))
            for name, pair in chosen.items()
            for kind, bits in zip(("weight", "input"), pair, strict=True)
        )

    best = brute(sensitivities, budgets, widest)
    if best == math.inf:
        with pytest.raises(ValueError, match="is out of reach; the nearest that is not is"):
            allocate(sensitivities, budget=budgets, choices=CHOICES, **constraints)
        return
    plan = allocate(sensitivities, budget=budgets, choices=CHOICES, **constraints)
    assert widest(widths(plan, sensitivities))
    assert total(sensitivities, plan) == pytest.approx(best, rel=1e-9, abs=0)
    for budget, reached in zip(budgets, budgets_reached(sensitivities, budgets, plan), strict=True):
        asked, found = Budget.parse(budget), Budget.parse(reached)
        assert (found.number >= asked.number) if asked.unit == "x" else (found.number <= asked.number + 0.001)


@pytest.mark.parametrize("budget", [["size=8x", "activations=6bits"], ["weights=4bits", "bops=64x"]])
def test_a_hundred_layers_take_seconds(budget: list[str]) -> None:
    """About a second on one core; the bound is for machines that are busy."""
    sensitivities = large(100, 0)
    start = time.perf_counter()
    plan = allocate(sensitivities, budget=budget)
    assert time.perf_counter() - start < 10
    controls: tuple[Method, ...] = ("uniform", "random")
    for control in controls:
        other = allocate(sensitivities, budget=budget, method=control)
        assert total(sensitivities, plan) < total(sensitivities, other)


def test_higher_omega_gets_more_bits() -> None:
    units = tuple(Unit(name, WHOLE, 1000, 64, 64, 900, 1) for name in "abc")
    plan = allocate(falling(units, (1.0, 1000.0, 1e6)), budget="weights=4bits")
    found = [bits for bits, _ in widths(plan, falling(units)).values()]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_budgets_on_one_kind_leave_the_other_at_its_widest() -> None:
    sensitivities = falling()
    weights = widths(allocate(sensitivities, budget="weights=3bits"), sensitivities)
    assert {input for _, input in weights.values()} == {8}
    inputs = widths(allocate(sensitivities, budget="activations=3bits"), sensitivities)
    assert {weight for weight, _ in inputs.values()} == {8}


def test_equal_omega_takes_the_widest_that_fits() -> None:
    flat = falling(UNITS, (0.0, 0.0, 0.0))
    assert set(widths(allocate(flat, budget="size=1x"), flat).values()) == {(8, 8)}
    weights = [w for w, _ in widths(allocate(flat, budget="weights=4bits"), flat).values()]
    assert sum(w * u.weights for w, u in zip(weights, UNITS, strict=True)) > 3.5 * sum(
        u.weights for u in UNITS
    )


def test_layers_that_stay_float() -> None:
    sensitivities = falling()
    plan = allocate(sensitivities, budget="size=1.1x", keep_float=["first"])
    assert "first" not in plan.layers
    plan = allocate(sensitivities, budget="size=1.1x", keep_float=["*.weight[up]"])
    assert str(plan["decoder"].weight_of("up")) == "float"
    assert str(plan["decoder"].weight_of("skip")) == "int8"
    assert str(plan["decoder"].input_of("up")) == "int8"


def test_widths_that_are_asked_for() -> None:
    sensitivities = falling()
    plan = allocate(
        sensitivities, budget="weights=5bits", fixed={"first": 6}, at_least={"decoder[skip]": 4},
        at_most={"decoder*": 4}, choices=CHOICES,
    )  # fmt: skip
    found = widths(plan, sensitivities)
    assert found["first"] == (6, 6), "also a width that is no choice"
    assert found["decoder[skip]"] == (4, 4)
    assert max(found["decoder[up]"]) <= 4


def test_a_group_has_one_width() -> None:
    sensitivities = falling(UNITS, (1.0, 1e6, 5.0))
    apart = widths(allocate(sensitivities, budget="weights=4bits"), sensitivities)
    assert apart["first"] != apart["decoder[skip]"]
    together = widths(
        allocate(sensitivities, budget="weights=4bits", groups=[["first", "decoder[skip]"]]), sensitivities
    )
    assert together["first"] == together["decoder[skip]"]
    chained = allocate(
        sensitivities,
        budget="weights=4bits",
        groups=[["first", "decoder[skip]"], ["decoder[skip]", "decoder[up]"]],
    )
    assert len(set(widths(chained, sensitivities).values())) == 1


def test_options_stand_in_the_plan() -> None:
    plan = allocate(falling(), budget="size=8x", scale="free", granularity="tensor", learned=True)
    assert (plan.scale, plan.granularity, plan.learned) == ("free", "tensor", True)


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ("weights=4.5bits", (4, 8)),
        (["weights=4bits", "activations=6bits"], (4, 6)),
        ("bops=64x", (4, 4)),  # 2 × 8 takes as many operations, but has the narrower width
        ("bops=50x", (4, 4)),
        ("bops=42.6x", (4, 6)),  # 24 of 1024; inputs take what one of the two can have
    ],
)
def test_uniform(budgets: str | list[str], expected: tuple[int, int]) -> None:
    sensitivities = falling()
    plan = allocate(sensitivities, budget=budgets, method="uniform")
    assert set(widths(plan, sensitivities).values()) == {expected}


def test_uniform_as_far_as_constraints_let_it() -> None:
    sensitivities = falling()
    plan = allocate(
        sensitivities,
        budget="weights=5bits",
        method="uniform",
        fixed={"first.weight": 8},
        at_most={"decoder[up]": 3},
    )
    weights = {name: weight for name, (weight, _) in widths(plan, sensitivities).items()}
    assert weights == {
        "first": 8,
        "decoder[skip]": 6,
        "decoder[up]": 3,
    }  # (8·103 + 6·203 + 3·303) / 609 = 4.85


def test_random_is_seeded_differs_and_uses_the_budget_up() -> None:
    sensitivities = large(30, 1)
    budgets = ["weights=4bits", "activations=5bits"]
    plans = [allocate(sensitivities, budget=budgets, method="random", seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    for plan in plans:
        for asked, reached in zip(budgets, budgets_reached(sensitivities, budgets, plan), strict=True):
            number, limit = (float(Budget.parse(text).number) for text in (reached, asked))
            assert 0.97 * limit < number <= limit
    assert len(set(widths(plans[0], sensitivities).values())) > 5


@pytest.mark.parametrize("method", ["optimal", "uniform", "random"])
@pytest.mark.parametrize(
    "budget", ["size=20x", "size=10B", "weights=1.5bits", "activations=1bits", "bops=300x", "energy=1000x"]
)
def test_out_of_reach_says_the_nearest_which_is_in_reach(budget: str, method: Any) -> None:
    sensitivities = falling()
    with pytest.raises(ValueError, match=f"{budget} is out of reach") as caught:
        allocate(sensitivities, budget=budget, method=method)
    (nearest,) = re.findall(r"the nearest that is not is (\S+) ", str(caught.value))
    plan = allocate(sensitivities, budget=nearest, method=method)
    kind = {"activations": 1}.get(budget.partition("=")[0], 0)
    assert {pair[kind] for pair in widths(plan, sensitivities).values()} == {2}


def test_two_budgets_out_of_reach_are_both_named() -> None:
    with pytest.raises(ValueError, match=r"weights=1bits is .* weights=2bits; bops=999x is .* bops=256x"):
        allocate(falling(), budget=["weights=1bits", "bops=999x"])


def test_budgets_in_reach_alone_are_in_reach_together() -> None:
    sensitivities = falling()
    plan = allocate(sensitivities, budget=["weights=2bits", "activations=2bits", "bops=256x"])
    assert set(widths(plan, sensitivities).values()) == {(2, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": []}, "no budget was given"),
        ({"method": "best"}, "method is 'best'"),
        ({"choices": ()}, "choices: found none"),
        ({"choices": (2, 1)}, "choices: found 1, expected a whole number of bits from 2 to 24"),
        ({"choices": (2, 5)}, "'first.weight' was not measured at 5 bits, there is Ω for 2, 3, 4, 6, 8"),
        ({"fixed": {"first": True}}, "fixed: found True"),
        ({"keep_float": ["last"]}, "keep_float: 'last' matches none of the tensors first.weight"),
        ({"groups": [["nothing*"]]}, r"groups: 'nothing\*' matches none of first"),
        ({"at_most": {"first": 3}, "at_least": {"first": 4}}, "at_most: 'first' = 3 leaves 'first.weight' no"),
        ({"fixed": {"*": 4, "first": 8}}, "fixed: 'first' = 8 leaves 'first.weight' no width"),
        ({"fixed": {"first": 8}, "keep_float": ["*"]}, "fixed: 'first' = 8 leaves 'first.weight' no width"),
        (
            {"fixed": {"first": 8}, "at_most": {"decoder[up]": 4}, "groups": [["*"]]},
            "there is no width that all of a group may have: 'first.weight' may have 8",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(falling(), **{"budget": "size=8x", **options})


def test_a_tensor_that_was_not_measured() -> None:
    whole = falling()
    entries = {name: entry for name, entry in whole.items() if name != "first.input"}
    lacking = Sensitivities(entries, "hessian", whole.units, 5, (1, 1, 8, 8), {})
    with pytest.raises(ValueError, match=r"the sensitivities have no 'first\.input'; measure it, or keep it"):
        allocate(lacking, budget="size=8x")
    allocate(lacking, budget="size=2x", keep_float=["first"])


class Small(nn.Module):
    """A level of a U-Net: one convolution to split."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.below = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.read = nn.Conv2d(10, 2, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skip = torch.relu(self.enter(image))
        low = torch.relu(self.below(nn.functional.max_pool2d(skip, 2)))
        up = nn.functional.interpolate(low, scale_factor=2.0)
        out: torch.Tensor = self.read(torch.cat([skip, up], 1))
        return out


def of_network(network: nn.Module) -> Sensitivities:
    return falling(workload(network, torch.zeros(1, 1, 8, 8)).units, (1.0, 2.0, 300.0, 4.0))


def test_the_plan_quantizes_a_split_network() -> None:
    network, image = Small().eval(), torch.rand(1, 1, 8, 8)
    uq.split(network, image)
    plan = uq.allocate(of_network(network), network, budget="weights=4bits")
    uq.quantize(network, plan, image)
    found = uq.plan_of(network)
    assert found["read"].weights == plan["read"].weights
    assert found["read"].weight_of("skip").bits > found["read"].weight_of("up").bits
    assert {f.bits for f in found["read"].inputs.values()} == {8}
    assert not any(f.signed for f in found["read"].inputs.values())


def test_another_network_is_named_by_its_first_difference() -> None:
    split, whole = Small().eval(), Small().eval()
    uq.split(split, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"it has 'read\[skip\]' .*, they have 'read' "):
        allocate(of_network(whole), split, budget="size=8x")
    longer = nn.Sequential(whole, nn.Conv2d(2, 1, 1))
    sensitivities = of_network(nn.Sequential(whole))
    with pytest.raises(ValueError, match=r"they have no '1' \(2 weights, 128 inputs, 128 MACs\)"):
        allocate(sensitivities, longer, budget="size=8x")
    with pytest.raises(ValueError, match="it has no '1'"):
        allocate(of_network(longer), nn.Sequential(whole), budget="size=8x")
