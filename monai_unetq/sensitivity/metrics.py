"""Ω of every tensor and width, by four metrics under one interface: Hessian traces and what they are compared with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from ..surgery import quantized_layers, set_quantizers
from ..surgery.calibrate import image_of
from ..surgery.observe import evaluating
from ..surgery.workload import Workload, workload
from .derivatives import Derivatives, Loss, targets
from .noise import Rounding, float_twin, rounded_twin, rounding_noise
from .table import KINDS, Metric, Sensitivities, Sensitivity, tensor_name

__all__ = ["Score", "fisher", "from_first", "hessian_traces", "network_digest", "score_drop", "sqnr"]

LEAST_SAMPLES = 10
"""Of every trace, before its standard error is believed."""

PROBES_PER_PASS = 8
"""At most: probes of one batch share its forward and first backward, a third of the time of a probe of its own."""

_T = TypeVar("_T")

Score = Callable[[Any, Any], float]
"""Of the network's output and a batch's label: a number that is better when it is larger, such as Dice in percent."""


@dataclass
class _Running:
    """Mean and variance of numbers that come one by one (Welford, 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for fewer than two numbers."""
        if self.count < 2:
            return math.inf
        return math.sqrt(self.squares / (self.count - 1) / self.count)


def hessian_traces(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    tolerance: float = 0.05,
    probes: int = 400,
    widths: Sequence[int] = (2, 3, 4, 6, 8),
    scale: Any = "power-of-two",
    granularity: Any = "channel",
    without: Sequence[str] = (),
    images_per_pass: int | None = None,
    seed: int = 0,
    state: str | Path | None = None,
    progress: bool = True,
) -> Sensitivities:
    """Average Hessian trace of every weight and every layer's input, and Ω for each width.

    Ω = tr(H)/n · ‖Q(T) - T‖², as HAWQ-V2 defines it (Dong et al., NeurIPS 2020, arXiv 1911.03852, equation 2.11).
    Traces are estimated by Hutchinson's method: the mean of vᵀHv over probes v of random signs, for all tensors in one
    double backward. A sample is the mean of up to eight probes on the next batch, so that its standard error knows what
    differs between batches, too. It ends when every standard error is below ``tolerance`` times the largest trace
    among weights, or among inputs, so that layers near zero cannot hold it up; not before ten samples.

    Inputs are counted for one image: the trace is the sum over the images of a pass, so that it does not depend on the
    size of batches where the loss is a mean over images.

    Args:
        network: float or quantized, split or not; its quantizers are left out, it is in evaluation mode, and left as
            it is.
        loss: see ``Loss``; deep-supervised networks pass it their list of outputs.
        batches: pairs (image, label), or dictionaries with ``"image"`` and ``"label"``; gone through again and again.
            In the same order if a run is to be continued or repeated.
        tolerance: see above.
        probes: most probes in all, at least two.
        widths: candidate bit widths.
        scale: of the rounding whose error counts; see ``QuantPlan``.
        granularity: see ``QuantPlan``.
        without: names or shell patterns of layers that are left out; they stay float in a plan made of this.
        images_per_pass: batches are cut into so many images, for a smaller memory; all at once by default.
        seed: of the probes.
        state: a file that keeps what is done, and is gone on with; removed at the end by nobody but you. It is
            refused for another network or other settings; that the data is the same is up to you.
        progress: shows a bar.

    Where ``torch.distributed`` is initialized (``torchrun``), every process takes its share of the samples, each with
    a batch of its own, and all return the same.

    Returns:
        the sensitivities, ``trace`` and ``error`` of all tensors with them.

    Raises:
        ValueError: if there is no batch or label, an argument is out of its range, the loss is NaN, does not depend on
            a layer, or cannot be differentiated twice (the message names the layer); or ``state`` does not fit.

    Example:
        >>> found = hessian_traces(network, DiceLoss(sigmoid=True), loader)
        >>> found["decoder.0.conv1.weight[skip]"].trace
    """
    if probes < 2:
        raise ValueError(f"probes is {probes}, expected at least 2: one has no standard error")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}, expected a share of at least 0")
    run = _Run(network, batches, widths, scale, granularity, without, images_per_pass)
    derivatives = Derivatives(run.twin, loss, run.targets)
    together = max(1, min(PROBES_PER_PASS, probes // LEAST_SAMPLES))
    conditions = {
        "seed": seed, "images_per_pass": images_per_pass, "probes_per_pass": together, "without": list(without),
        "images": sum(len(image) for image in run.images), "network": network_digest(run.twin),
    }  # fmt: skip
    rank, world = _processes()
    sums, done = from_first(lambda: _restore(state, conditions))
    passes = run.passes(done + rank, world)

    def sample() -> dict[str, float]:
        image, label = next(passes)
        return derivatives.products(image, label, [_seed(seed, done + rank, n) for n in range(together)])

    with tqdm(
        total=probes // together * together,
        initial=done * together,
        desc="hessian traces",
        unit="probe",
        disable=None if progress and not rank else True,
    ) as bar:
        while done * together + together <= probes and not _settled(sums, tolerance):
            for found in _gathered(sample):
                done += 1
                for name, value in found.items():
                    sums.setdefault(name, _Running()).add(value / run.counts[name])
            if not rank:
                _keep(state, conditions, sums, done)
            bar.update(world * together)
            bar.set_postfix_str(f"{_worst(sums):.1%} of the largest trace")
    traces = {name: (entry.mean, entry.error) for name, entry in sums.items()}
    settled = _settled(sums, tolerance)
    return run.table(
        "hessian",
        traces,
        {**conditions, "tolerance": tolerance, "probes": done * together, "settled": settled},
    )


def fisher(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    widths: Sequence[int] = (2, 3, 4, 6, 8),
    scale: Any = "power-of-two",
    granularity: Any = "channel",
    without: Sequence[str] = (),
    images_per_pass: int | None = 1,
    progress: bool = True,
) -> Sensitivities:
    """Mean squared gradient of every weight and input: the empirical Fisher information's diagonal, one backward each.

    Arguments as in ``hessian_traces``. By default every image is a pass of its own: gradients of several images cancel
    each other in their sum.
    """
    run = _Run(network, batches, widths, scale, granularity, without, images_per_pass)
    derivatives = Derivatives(run.twin, loss, run.targets)
    sums: dict[str, _Running] = {}
    for image, label in tqdm(
        list(run.one_round()), desc="fisher", unit="pass", disable=None if progress else True
    ):
        for name, value in derivatives.squares(image, label).items():
            sums.setdefault(name, _Running()).add(value / run.counts[name])
    traces = {n: (s.mean, s.error if s.count > 1 else 0.0) for n, s in sums.items()}
    return run.table("fisher", traces, {"images_per_pass": images_per_pass, "without": list(without)})


def sqnr(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    widths: Sequence[int] = (2, 3, 4, 6, 8),
    scale: Any = "power-of-two",
    granularity: Any = "channel",
    without: Sequence[str] = (),
) -> Sensitivities:
    """Rounding noise over signal of every weight and input: Ω = ‖Q(T) - T‖² / ‖T‖², no derivative at all.

    Arguments as in ``hessian_traces``; batches may be images alone.
    """
    run = _Run(network, batches, widths, scale, granularity, without, None)
    traces = {name: (1 / max(power, 1e-30), 0.0) for name, power in run.power.items()}
    return run.table("sqnr", traces, {"without": list(without)})


@torch.no_grad()
def score_drop(
    network: nn.Module,
    score: Score,
    batches: Iterable[Any],
    *,
    widths: Sequence[int] = (2, 3, 4, 6, 8),
    scale: Any = "power-of-two",
    granularity: Any = "channel",
    without: Sequence[str] = (),
    progress: bool = True,
) -> Sensitivities:
    """What the score loses when one tensor is rounded and all others are not: Ω = score in float - score, or 0.

    As many evaluations as tensors times widths. Arguments as in ``hessian_traces``.

    Args:
        score: see ``Score``; its mean over the batches counts.

    Raises:
        ValueError: see ``hessian_traces``; or if the score is NaN.
    """
    run = _Run(network, batches, widths, scale, granularity, without, None)
    pairs = list(run.one_round())

    def mean(net: nn.Module, which: str) -> float:
        found = sum(float(score(net(image), label)) for image, label in pairs) / len(pairs)
        if not math.isfinite(found):
            raise ValueError(f"the score is {found} {which}, expected a finite number")
        return found

    best = mean(run.twin, "of the float network")
    drops: dict[str, dict[int, float]] = {}
    total = len(run.counts) * len(run.rounding.widths)
    with tqdm(total=total, desc="score drop", unit="tensor", disable=None if progress else True) as bar:
        for bits in run.rounding.widths:
            twin = rounded_twin(run.twin, bits, run.rounding, run.images)
            set_quantizers(twin, False)
            with evaluating(twin):
                for layer, module in quantized_layers(twin).items():
                    for kind, quantizers in zip(
                        KINDS, (module.weight_quantizers, module.input_quantizers), strict=True
                    ):
                        for part, quantizer in quantizers.items():
                            name = tensor_name(layer, part, kind)
                            if name not in run.counts:
                                continue
                            quantizer.enabled = True
                            found = mean(twin, f"with '{name}' at {bits} bits")
                            drops.setdefault(name, {})[bits] = max(0.0, best - found)
                            quantizer.enabled = False
                            bar.update()
    conditions = {"score": best, "without": list(without)}
    return run.table("drop", {name: (math.nan, 0.0) for name in drops}, conditions, drops)


class _Run:
    """What all metrics share: the float network, batches, rounding noise, and the table of results."""

    def __init__(
        self,
        network: nn.Module,
        batches: Iterable[Any],
        widths: Sequence[int],
        scale: Any,
        granularity: Any,
        without: Sequence[str],
        images_per_pass: int | None,
    ) -> None:
        if images_per_pass is not None and images_per_pass < 1:
            raise ValueError(f"images_per_pass is {images_per_pass}, expected at least 1")
        self.twin = float_twin(network).eval()
        self.device = next(self.twin.parameters(), torch.zeros(0)).device
        # What can be gone through once only is kept.
        self.batches = list(batches) if isinstance(batches, Iterator) else batches
        self.images_per_pass = images_per_pass
        self.rounding = Rounding(tuple(sorted(set(widths))), scale, granularity)
        self.images = [image_of(batch).to(self.device) for batch in self.batches]
        if not self.images:
            raise ValueError("no batch was given, expected at least one batch of training images and labels")
        for number, image in enumerate(self.images):
            if not torch.isfinite(image).all():
                raise ValueError(f"batch {number} holds NaN or infinity: repair or exclude it")
        self.work: Workload = workload(self.twin, self.images[0][:1])
        self.targets = targets(list(dict.fromkeys(unit.layer for unit in self.work.units)), without)
        kept = {target.layer for target in self.targets}
        self.units = [unit for unit in self.work.units if unit.layer in kept]
        self.counts = {
            tensor_name(unit.layer, unit.part, kind): count
            for unit in self.units
            for kind, count in zip(KINDS, (unit.weights, unit.inputs), strict=True)
        }
        self.noise, self.power = rounding_noise(self.twin, self.images, self.rounding)

    def one_round(self) -> Iterator[tuple[Tensor, Any]]:
        """Image and label of every pass."""
        for batch in self.batches:
            image, label = image_of(batch).to(self.device), _moved(label_of(batch), self.device)
            step = self.images_per_pass or len(image)
            for start in range(0, len(image), step):
                yield image[start : start + step], _cut(label, start, start + step)

    def passes(self, first: int, step: int) -> Iterator[tuple[Tensor, Any]]:
        """Passes without end, from one of them on, every so many."""
        number = 0
        while True:
            begin = number
            for pair in self.one_round():
                if number >= first and (number - first) % step == 0:
                    yield pair
                number += 1
            if number == begin:
                raise ValueError(
                    "the batches were there once, and none the second time: give a list or a loader"
                )

    def table(
        self,
        metric: Metric,
        traces: Mapping[str, tuple[float, float]],
        conditions: Mapping[str, Any],
        omegas: Mapping[str, Mapping[int, float]] | None = None,
    ) -> Sensitivities:
        entries = {}
        for unit in self.units:
            for kind in KINDS:
                name = tensor_name(unit.layer, unit.part, kind)
                trace, error = traces[name]
                noise = self.noise[name]
                omega = omegas[name] if omegas else {bits: max(trace, 0.0) * n for bits, n in noise.items()}
                entries[name] = Sensitivity(
                    unit.layer,
                    unit.part,
                    kind,
                    self.counts[name],
                    trace,
                    error,
                    noise,
                    omega,
                )
        rounding = {**asdict(self.rounding), "widths": list(self.rounding.widths)}
        images = sum(len(image) for image in self.images)
        return Sensitivities(
            entries, metric, self.work.units, self.work.other_parameters, self.work.image,
            {**conditions, "images": images, "rounding": rounding},
        )  # fmt: skip


def label_of(batch: Any) -> Any:
    """The label of a batch: ``batch["label"]``, or the second of a sequence.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(batch, Mapping) and "label" in batch:
        return batch["label"]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[1]
    raise ValueError(
        "a batch has no label, expected a pair (image, label) or a dictionary with 'image' and 'label'"
    )


def _moved(label: Any, device: torch.device) -> Any:
    # MONAI's MetaTensor would take its metadata along through every operation.
    return _each(label, lambda t: (t.as_tensor() if hasattr(t, "as_tensor") else t).to(device))


def _cut(label: Any, start: int, end: int) -> Any:
    """Labels of some images of a batch; deep supervision has one for each scale."""
    return _each(label, lambda tensor: tensor[start:end] if tensor.dim() else tensor)


def _each(label: Any, change: Callable[[Any], Tensor]) -> Any:
    """A label, tensors in lists and dictionaries of it changed."""
    if isinstance(label, Tensor):
        return change(label)
    if isinstance(label, Mapping):
        return {key: _each(entry, change) for key, entry in label.items()}
    if isinstance(label, (list, tuple)):
        return [_each(entry, change) for entry in label]
    return label


def _settled(sums: Mapping[str, _Running], tolerance: float) -> bool:
    return bool(sums) and min(s.count for s in sums.values()) >= LEAST_SAMPLES and _worst(sums) <= tolerance


def _worst(sums: Mapping[str, _Running]) -> float:
    """The largest standard error over the largest trace, of weights and of inputs apart."""
    worst = 0.0
    for kind in (".weight", ".input"):
        found = [
            entry
            for name, entry in sums.items()
            if name.partition("[")[0].endswith(kind) or name.partition("[")[0] == kind[1:]
        ]
        largest = max((abs(entry.mean) for entry in found), default=0.0)
        error = max((entry.error for entry in found), default=0.0)
        if error > 0:
            worst = max(worst, error / largest if largest else math.inf)
    return worst


def _seed(seed: int, sample: int, probe: int) -> int:
    """A seed for every probe, so that a continued run draws what an undisturbed one draws."""
    return int.from_bytes(sha256(f"{seed}:{sample}:{probe}".encode()).digest()[:7], "big")


def network_digest(network: nn.Module) -> str:
    """A short digest of all values that a network's state holds."""
    digest = sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _processes() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _gathered(compute: Callable[[], _T]) -> list[_T]:
    """What every process computes, in their order; a mistake that one of them finds is raised by all."""
    _, world = _processes()
    if world == 1:
        return [compute()]
    try:
        mine: tuple[_T | None, str] = compute(), ""
    except ValueError as error:
        mine = None, str(error)
    every: list[Any] = [None] * world
    distributed.all_gather_object(every, mine)
    for _, message in every:
        if message:
            raise ValueError(message)
    return [found for found, _ in every]


def from_first(compute: Callable[[], _T]) -> _T:
    """What the first process computes, known to all: no other sees its files where each has a disk of its own."""
    return _gathered(compute if not _processes()[0] else lambda: cast(_T, None))[0]


def _restore(state: str | Path | None, conditions: Mapping[str, Any]) -> tuple[dict[str, _Running], int]:
    if state is None or not Path(state).exists():
        return {}, 0
    try:
        document = json.loads(Path(state).read_text(encoding="utf-8"))
        for key, value in conditions.items():
            if document["conditions"][key] != value:
                raise ValueError(f"its {key!r} is {document['conditions'][key]!r}, now it is {value!r}")
        return {name: _Running(*entry) for name, entry in document["sums"].items()}, int(document["done"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{state}: cannot be gone on with: {error}; remove it to begin anew") from None


def _keep(
    state: str | Path | None, conditions: Mapping[str, Any], sums: Mapping[str, _Running], done: int
) -> None:
    if state is None:
        return
    path = Path(state)
    scratch = path.with_name(path.name + ".part")
    entries = {name: [entry.count, entry.mean, entry.squares] for name, entry in sums.items()}
    scratch.write_text(
        json.dumps({"conditions": dict(conditions), "done": done, "sums": entries}), encoding="utf-8"
    )
    scratch.replace(path)
