"""``allocate``: bit widths for every tensor of a network, the least total Ω under budgets."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, Literal

import torch
from torch import nn

from ..formats import QFormat
from ..parts import WHOLE
from ..plan import LayerPlan, QuantPlan
from ..sensitivity.table import KINDS, Kind, Sensitivities, Sensitivity, tensor_name
from ..surgery.workload import Unit, workload
from .budget import Budget
from .cost import FLOAT, of_width
from .program import Option, Variables, least, totals

__all__ = ["Constraints", "Method", "allocate", "budgets_reached", "check_network", "omega_of", "tightest"]

Method = Literal["optimal", "uniform", "random"]


def allocate(
    sensitivities: Sensitivities,
    network: nn.Module | None = None,
    *,
    budget: str | Sequence[str],
    choices: Sequence[int] = (2, 3, 4, 6, 8),
    method: Method = "optimal",
    seed: int = 0,
    keep_float: Sequence[str] = (),
    fixed: Mapping[str, int] | None = None,
    at_least: Mapping[str, int] | None = None,
    at_most: Mapping[str, int] | None = None,
    groups: Sequence[Sequence[str]] = (),
    scale: Literal["power-of-two", "free"] = "power-of-two",
    granularity: Literal["channel", "tensor"] = "channel",
    learned: bool = False,
) -> QuantPlan:
    """Choose the bit width of every weight and every input under one or more budgets.

    ``optimal`` is the plan with the least total Ω (HAWQ-V2, Dong et al., NeurIPS 2020, section 3.2, as an integer
    program, HAWQ-V3, Yao et al., ICML 2021, equation 4); see ``least`` for how exact. Of widths with the same Ω the
    widest is taken that the budgets allow.

    ``uniform`` gives all weights one width and all inputs one width, the widest that keep the budgets: the pair whose
    narrower width is the widest, then the widest sum, then the wider inputs. A tensor that may not have that width gets
    its widest below, or else its narrowest.

    ``random`` draws every width independently and evenly from the tensor's widths, then narrows random tensors by one
    step while a budget is exceeded, then widens random tensors by one step as long as one fits, so that no tensor can
    be widened any more.

    A budget on weights (``size``, ``weights``) says nothing of inputs, which then get the widest choice, and the other
    way round; ``bops`` and ``energy`` are of both.

    Patterns are layer names (``decoder.0.conv``), parts (``decoder.0.conv[skip]``) or tensors
    (``decoder.0.conv.weight[skip]``), in which ``*`` and ``?`` stand for anything; a layer's name means all its tensors.

    Args:
        sensitivities: Ω of every tensor at every choice.
        network: checked to be the one that was measured, where it is given.
        budget: ``size=8x`` or ``size=1.5MiB`` (all parameters), ``weights=4.0bits`` and ``activations=6bits``
            (averages over values), ``bops=12x``, ``energy=10x``; all of them are kept.
        choices: bit widths.
        method: see above.
        seed: of ``random``.
        keep_float: patterns of tensors that stay float.
        fixed: pattern → width, also one that is no choice.
        at_least: pattern → least width.
        at_most: pattern → greatest width.
        groups: patterns of layers or parts that get one width for all their weights and one for all their inputs.
        scale: see ``QuantPlan``.
        granularity: see ``QuantPlan``.
        learned: see ``QuantPlan``.

    Returns:
        the plan: ``intN`` for weights and inputs (``quantize`` makes inputs unsigned that cannot be negative).

    Raises:
        ValueError: if a budget is out of reach (the message says the nearest that is not), a pattern matches nothing,
            constraints leave a tensor no width, the sensitivities lack one, or the network is another one.
    """
    if method not in ("optimal", "uniform", "random"):
        raise ValueError(f"method is {method!r}, expected 'optimal', 'uniform' or 'random'")
    budgets = [Budget.parse(text) for text in ([budget] if isinstance(budget, str) else budget)]
    if not budgets:
        raise ValueError("no budget was given, expected one such as size=8x")
    if network is not None:
        check_network(network, sensitivities)
    constraints = Constraints(choices, keep_float, fixed or {}, at_least or {}, at_most or {}, groups)
    variables = _variables(sensitivities, budgets, constraints)
    limits = _limits(sensitivities, budgets, variables)
    options = [variable.options for variable in variables]
    if method == "optimal":
        chosen = least(options, limits)
    elif method == "uniform":
        chosen = _uniform(variables, limits)
    else:
        chosen = _random(variables, limits, random.Random(seed))
    found = {
        name: variable.widths[index][number]
        for variable, index in zip(variables, chosen, strict=True)
        for number, names in enumerate(variable.tensors)
        for name in names
    }
    return _plan(sensitivities.units, found, scale=scale, granularity=granularity, learned=learned)


def check_network(network: nn.Module, sensitivities: Sensitivities) -> None:
    """Raise a ValueError unless the network's layers, parts and their work are those that were measured."""
    parameter = next(network.parameters())
    image = torch.zeros(sensitivities.image, dtype=parameter.dtype, device=parameter.device)
    found, expected = workload(network, image).units, sensitivities.units
    for has, measured in zip(found, expected, strict=False):
        if has != measured:
            raise ValueError(
                f"the sensitivities are of another network: where it has {_described(has)}, they have "
                f"{_described(measured)}; measure this network, split as it is now"
            )
    if len(found) != len(expected):
        lacking, longer = ("they have", found) if len(found) > len(expected) else ("it has", expected)
        first = longer[min(len(found), len(expected))]
        raise ValueError(
            f"the sensitivities are of another network: {lacking} no {_described(first)}; measure this network, split "
            "as it is now"
        )


def _described(unit: Unit) -> str:
    return f"'{unit.name}' ({unit.weights} weights, {unit.inputs} inputs, {unit.macs} MACs)"


def omega_of(sensitivities: Sensitivities, plan: QuantPlan) -> dict[str, float]:
    """Ω of every tensor under a plan, by its name; 0 where it stays float.

    Raises:
        ValueError: if a tensor has a width whose Ω is unknown.
    """
    found = {}
    for name, entry in sensitivities.items():
        layer = plan[entry.layer]
        chosen = layer.weight_of(entry.part) if entry.kind == "weight" else layer.input_of(entry.part)
        found[name] = _omega(entry, chosen.bits)
    return found


def budgets_reached(sensitivities: Sensitivities, budgets: Iterable[str], plan: QuantPlan) -> list[str]:
    """For each budget the tightest of its kind that the plan keeps, such as ``size=8.031x`` for ``size=8x``.

    Raises:
        ValueError: if a budget is none.
    """
    units, others = sensitivities.units, sensitivities.other_parameters
    formats = [(u, plan[u.layer].weight_of(u.part), plan[u.layer].input_of(u.part)) for u in units]
    parsed = [Budget.parse(text) for text in budgets]
    return [b.reached(sum(b.amount(*entry) for entry in formats), units, others) for b in parsed]


def tightest(sensitivities: Sensitivities, budget: str, constraints: Constraints) -> str:
    """The tightest budget of a kind that is in reach, such as ``size=15.9x`` for ``size=8x``.

    Raises:
        ValueError: as ``allocate`` does.
    """
    parsed = Budget.parse(budget)
    (least_amount,) = _narrowest(_variables(sensitivities, [parsed], constraints), 1)
    return parsed.reached(least_amount, sensitivities.units, sensitivities.other_parameters)


@dataclass(frozen=True)
class Constraints:
    """What widths tensors may have; see ``allocate``."""

    choices: Sequence[int] = (2, 3, 4, 6, 8)
    keep_float: Sequence[str] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)
    at_least: Mapping[str, int] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    groups: Sequence[Sequence[str]] = ()


def _allowed(sensitivities: Sensitivities, constraints: Constraints) -> dict[str, list[int]]:
    """Tensor's name → the widths that it may have, narrow to wide; 32 is float."""
    choices, fixed = constraints.choices, constraints.fixed
    at_least, at_most = constraints.at_least, constraints.at_most
    tensors = [
        (unit, kind, tensor_name(unit.layer, unit.part, kind))
        for unit in sensitivities.units
        for kind in KINDS
    ]
    if not choices:
        raise ValueError("choices: found none, expected bit widths such as 2, 3, 4, 6, 8")
    for what, given in (
        ("choices", choices), ("fixed", fixed.values()), ("at_least", at_least.values()), ("at_most", at_most.values())
    ):  # fmt: skip
        for bits in given:
            if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 24:
                raise ValueError(f"{what}: found {bits!r}, expected a whole number of bits from 2 to 24")
    allowed = {name: sorted(set(choices)) for _, _, name in tensors}
    rules = [
        *(("keep_float", pattern, FLOAT.bits) for pattern in constraints.keep_float),
        *(("fixed", pattern, bits) for pattern, bits in fixed.items()),
        *(("at_least", pattern, bits) for pattern, bits in at_least.items()),
        *(("at_most", pattern, bits) for pattern, bits in at_most.items()),
    ]
    exact: dict[str, str] = {}
    for rule, pattern, bits in rules:
        matched = [name for unit, _, name in tensors if _matches(pattern, unit, name)]
        if not matched:
            raise ValueError(f"{rule}: {pattern!r} matches none of the tensors {_listed(allowed)}")
        for name in matched:
            before = allowed[name]
            if rule in ("keep_float", "fixed"):
                allowed[name] = [bits] if name not in exact or bits in before else []
                exact[name] = rule
            else:
                allowed[name] = [b for b in before if (b >= bits if rule == "at_least" else b <= bits)]
            if not allowed[name]:
                raise ValueError(
                    f"{rule}: {pattern!r} = {bits} leaves '{name}' no width; before it there were "
                    f"{', '.join(map(str, before))}"
                )
    for name, widths in allowed.items():
        _check_known(sensitivities, name, widths)
    return allowed


def _check_known(sensitivities: Sensitivities, name: str, widths: Sequence[int]) -> None:
    if widths == [FLOAT.bits]:
        return
    if name not in sensitivities:
        raise ValueError(f"the sensitivities have no '{name}'; measure it, or keep it float")
    for bits in widths:
        _omega(sensitivities[name], bits)


def _omega(entry: Sensitivity, bits: int) -> float:
    if bits == FLOAT.bits:
        return 0.0
    if bits not in entry.omega:
        known = ", ".join(str(width) for width in sorted(entry.omega)) or "no width"
        raise ValueError(f"'{entry.name}' was not measured at {bits} bits, there is Ω for {known}")
    return entry.omega[bits]


def _matches(pattern: str, unit: Unit, tensor: str = "") -> bool:
    """Whether a pattern means a unit or its tensor; brackets, in which parts are written, stand for themselves."""
    literal = pattern.replace("[", "[[]")
    return any(fnmatchcase(name, literal) for name in (unit.layer, unit.name, tensor) if name)


def _listed(names: Iterable[str], most: int = 12) -> str:
    shown = list(names)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _clusters(units: Sequence[Unit], groups: Sequence[Sequence[str]]) -> list[list[Unit]]:
    """Units that get the same widths, in the order of their first one."""
    together = {unit.name: [unit] for unit in units}
    for patterns in groups:
        for pattern in patterns:
            if not any(_matches(pattern, unit) for unit in units):
                raise ValueError(f"groups: {pattern!r} matches none of {_listed(u.name for u in units)}")
        merged: list[Unit] = []
        for unit in units:
            if any(_matches(pattern, unit) for pattern in patterns) and unit not in merged:
                merged.extend(together[unit.name])
        for unit in merged:
            together[unit.name] = merged
    return list({id(cluster): cluster for cluster in together.values()}.values())


@dataclass(frozen=True)
class _Variable:
    """Tensors that are decided on together.

    Attributes:
        tensors: names of the weights, and of the inputs, or of only one kind.
        kinds: of each of them.
        widths: one for each of ``tensors``, for each option.
        options: what each costs, from narrow to wide.
    """

    tensors: tuple[tuple[str, ...], ...]
    kinds: tuple[Kind, ...]
    widths: tuple[tuple[int, ...], ...]
    options: tuple[Option, ...]


def _variables(
    sensitivities: Sensitivities,
    budgets: Sequence[Budget],
    constraints: Constraints,
) -> list[_Variable]:
    """One for the weights and one for the inputs of each cluster; one for both where a budget multiplies them."""
    widths = _allowed(sensitivities, constraints)
    joint = any(len(budget.kinds) > 1 for budget in budgets)
    limited = {kind for budget in budgets for kind in budget.kinds}
    found = []
    for cluster in _clusters(sensitivities.units, constraints.groups):
        common = {kind: _common(cluster, kind, widths) for kind in KINDS}
        for kind in KINDS:
            if kind not in limited:
                common[kind] = common[kind][-1:]
        for kinds in (KINDS,) if joint else tuple((kind,) for kind in KINDS):
            pairs = sorted(product(*(common[kind] for kind in kinds)), key=lambda pair: (sum(pair), pair))
            found.append(
                _Variable(
                    tuple(tuple(tensor_name(u.layer, u.part, kind) for u in cluster) for kind in kinds),
                    kinds,
                    tuple(pairs),
                    tuple(
                        _option(sensitivities, budgets, cluster, dict(zip(kinds, pair, strict=True)))
                        for pair in pairs
                    ),
                )
            )
    return found


def _common(cluster: Sequence[Unit], kind: Kind, widths: Mapping[str, Sequence[int]]) -> list[int]:
    names = [tensor_name(unit.layer, unit.part, kind) for unit in cluster]
    common = sorted(set[int].intersection(*(set(widths[name]) for name in names)))
    if not common:
        listed = "; ".join(f"'{name}' may have {', '.join(map(str, widths[name]))}" for name in names)
        raise ValueError(f"groups: there is no width that all of a group may have: {listed}")
    return common


def _option(
    sensitivities: Sensitivities,
    budgets: Sequence[Budget],
    cluster: Sequence[Unit],
    widths: Mapping[Kind, int],
) -> Option:
    """What widths cost; a kind that is not among them is for another variable, so its budgets get 0 of this one."""
    omega = math.fsum(
        0.0 if bits == FLOAT.bits else _omega(sensitivities[tensor_name(u.layer, u.part, kind)], bits)
        for kind, bits in widths.items()
        for u in cluster
    )
    formats = {kind: of_width(widths.get(kind, FLOAT.bits)) for kind in KINDS}
    amounts = tuple(
        sum(budget.amount(unit, formats["weight"], formats["input"]) for unit in cluster)
        if budget.kinds <= set(widths)
        else 0
        for budget in budgets
    )
    return Option(omega, amounts)


def _limits(
    sensitivities: Sensitivities, budgets: Sequence[Budget], variables: Sequence[_Variable]
) -> list[int]:
    """What the amounts may add up to.

    The narrowest widths take the least of every budget at once, so budgets that are in reach alone are in reach
    together.
    """
    units, others = sensitivities.units, sensitivities.other_parameters
    limits = [budget.limit(units, others) for budget in budgets]
    lowest = _narrowest(variables, len(budgets))
    beyond = [
        f"{budget} is out of reach; the nearest that is not is {budget.reached(amount, units, others)}"
        for budget, amount, limit in zip(budgets, lowest, limits, strict=True)
        if amount > limit
    ]
    if beyond:
        raise ValueError(f"{'; '.join(beyond)} (every tensor at its narrowest width)")
    return limits


def _narrowest(variables: Sequence[_Variable], count: int) -> list[int]:
    return totals([variable.options for variable in variables], [0] * len(variables), count)


def _fits(options: Variables, limits: Sequence[int], chosen: Sequence[int]) -> bool:
    taken = totals(options, chosen, len(limits))
    return all(amount <= limit for amount, limit in zip(taken, limits, strict=True))


def _uniform(variables: Sequence[_Variable], limits: Sequence[int]) -> list[int]:
    options = [variable.options for variable in variables]
    seen: dict[Kind, set[int]] = {kind: set() for kind in KINDS}
    for variable in variables:
        for widths in variable.widths:
            for kind, bits in zip(variable.kinds, widths, strict=True):
                seen[kind].add(bits)
    best, best_key = [0] * len(variables), (0, 0, 0)
    for weight, input in product(*(sorted(seen[kind]) for kind in KINDS)):
        asked: dict[Kind, int] = {"weight": weight, "input": input}
        chosen = [_nearest(variable, asked) for variable in variables]
        key = (min(weight, input), weight + input, input)
        if key > best_key and _fits(options, limits, chosen):
            best, best_key = chosen, key
    return best


def _nearest(variable: _Variable, asked: Mapping[Kind, int]) -> int:
    """The option whose widths are the widest up to those asked for, or else the narrowest."""
    wanted = []
    for number, kind in enumerate(variable.kinds):
        possible = sorted({widths[number] for widths in variable.widths})
        wanted.append(max((bits for bits in possible if bits <= asked[kind]), default=possible[0]))
    return variable.widths.index(tuple(wanted))


def _random(variables: Sequence[_Variable], limits: Sequence[int], rng: random.Random) -> list[int]:
    options = [variable.options for variable in variables]
    chosen = [rng.randrange(len(variable.options)) for variable in variables]
    while not _fits(options, limits, chosen):
        taken = totals(options, chosen, len(limits))
        over = [k for k, limit in enumerate(limits) if taken[k] > limit]
        v, index = rng.choice(
            [
                (v, index)
                for v, variable in enumerate(variables)
                for index in _steps(variable, chosen[v], -1)
                if any(options[v][index].amounts[k] < options[v][chosen[v]].amounts[k] for k in over)
            ]
        )
        chosen[v] = index
    while True:
        wider = [(v, i) for v, variable in enumerate(variables) for i in _steps(variable, chosen[v], 1)]
        rng.shuffle(wider)
        for v, index in wider:
            changed = [*chosen[:v], index, *chosen[v + 1 :]]
            if _fits(options, limits, changed):
                chosen = changed
                break
        else:
            return chosen


def _steps(variable: _Variable, index: int, direction: Literal[-1, 1]) -> list[int]:
    """Options that differ in one width, by the next narrower or wider one."""
    found = []
    widths = variable.widths[index]
    for number, bits in enumerate(widths):
        possible = sorted({pair[number] for pair in variable.widths})
        place = possible.index(bits) + direction
        if 0 <= place < len(possible):
            found.append(variable.widths.index((*widths[:number], possible[place], *widths[number + 1 :])))
    return found


def _plan(units: Sequence[Unit], widths: Mapping[str, int], **options: Any) -> QuantPlan:
    formats: dict[str, dict[Kind, dict[str, QFormat]]] = {}
    for unit in units:
        layer = formats.setdefault(unit.layer, {"weight": {}, "input": {}})
        for kind in KINDS:
            layer[kind][unit.part] = of_width(widths[tensor_name(unit.layer, unit.part, kind)])
    parts: dict[str, list[tuple[str, int]]] = {}
    for unit in units:
        if unit.part != WHOLE and unit.channels:
            parts.setdefault(unit.layer, []).append((unit.part, unit.channels))
    layers = {
        name: LayerPlan(layer["weight"], layer["input"], channels=tuple(parts.get(name, ())) or None)
        for name, layer in formats.items()
    }
    return QuantPlan({name: layer for name, layer in layers.items() if not layer.is_float}, **options)
