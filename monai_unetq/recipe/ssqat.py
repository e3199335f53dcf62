"""SS-QAT, the whole recipe: a float network is equalized and split, its bits are allocated by sensitivity, it is trained
quantized with its skip connections supervised, folded, stripped and packed (Guo et al., ISCAS 2022).

``ssqat_network`` is the part before training, for whoever trains in a loop of his own (the bundles' ``ssqat.yaml``);
``ssqat`` is all of it.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from torch import Tensor, nn

from ..allocation import allocate
from ..allocation.budget import Budget
from ..deploy import inspect_packed, pack
from ..plan import QuantPlan
from ..sensitivity import Sensitivities, fisher, hessian_traces, sqnr
from ..sensitivity.metrics import from_first, network_digest
from ..sensitivity.table import tensor_name
from ..surgery import (
    attach_supervision,
    attach_teacher,
    equalize,
    fold,
    observe,
    plan_of,
    quantize,
    split,
    strip,
)
from ..surgery.calibrate import image_of
from ..training import (
    BestModel,
    Calibration,
    Checkpoint,
    EpochSeed,
    PlanLog,
    SkipSupervisionLoss,
    SupervisionDecay,
    cosine,
    parameter_groups,
)
from ..training.handlers.processes import rank
from ..training.handlers.seeding import isolated_randomness
from .stage import open_stage

__all__ = ["ssqat", "ssqat_network", "ssqat_plan"]

logger = logging.getLogger(__name__)

Metric = Literal["hessian", "fisher", "sqnr"]

ALLOCATION = "allocation.json"

END_BITS = 8
"""Of the image, and of the weights of the layers that it goes into and of the last one."""


def ssqat_plan(
    network: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    folder: str | Path | None = None,
    *,
    budget: Sequence[str] | str = ("weights=4bits", "activations=4bits"),
    choices: Sequence[int] = (2, 3, 4, 6, 8),
    activations: int | None = None,
    metric: Metric = "sqnr",
    probes: int = 200,
    scale: Literal["power-of-two", "free"] = "power-of-two",
    seed: int = 0,
) -> QuantPlan:
    """Allocate a float network's bits: sensitivities of all tensors, then the plan with the least Ω under the budget.

    The image has 8 bits, and so have the weights of the first layer and the last. Scales are learned.

    Args:
        network: float; split first, where skip and up are to get bits of their own. It is left as it is.
        loss: of the network's output and the label; without supervision.
        batches: of *training* data, with image and label; drawn once, with random numbers of ``seed``.
        folder: keeps ``sensitivities.json`` and ``allocation.json``, which are used again for the same network and
            arguments. That data and loss are the same is up to you.
        budget: see ``allocate``.
        choices: bit widths.
        activations: bits of every input but the image, which are not allocated then.
        metric: what Ω is made of: signal to noise, Hessian traces (the paper's; they settle slowly on structures that few
            crops show, see docs/results/sensitivity.md), or squared gradients.
        probes: most probes of the Hessian.
        scale: see ``QuantPlan``.
        seed: of batches and probes.

    Raises:
        ValueError: as ``hessian_traces`` and ``allocate`` do.
    """
    budgets = [budget] if isinstance(budget, str) else list(budget)
    for text in budgets:
        Budget.parse(text)  # a misspelled one fails before anything is measured
    widths = sorted({*choices, END_BITS, *([] if activations is None else [activations])})
    measured = {"network": network_digest(network), "metric": metric, "probes": probes, "widths": widths, "scale": scale, "seed": seed}  # fmt: skip
    settings = {**measured, "budget": budgets, "choices": list(choices), "activations": activations}  # fmt: skip
    place = None if folder is None else Path(folder)
    file = None if place is None else place / "sensitivity" / "sensitivities.json"

    def kept() -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The plan and the sensitivities that were made before."""
        if place is None or file is None:
            return None, None
        done = open_stage(place / "sensitivity", measured, [file.name, "sensitivities.state"])
        if (
            open_stage(place / "allocation", settings, [ALLOCATION])
            and (place / "allocation" / ALLOCATION).exists()
        ):
            return QuantPlan.load(place / "allocation" / ALLOCATION).to_json(), None
        return None, Sensitivities.load(file).to_json() if done and file.exists() else None

    allocated, found = from_first(kept)  # no other process may see the first one's disk
    if allocated is not None:
        return QuantPlan.from_json(allocated)
    if found is not None:
        sensitivities = Sensitivities.from_json(found)
    else:
        with isolated_randomness(seed, batches):
            drawn = list(batches)
        options: dict[str, Any] = {"widths": widths, "scale": scale}
        if metric == "hessian":
            state = None if file is None else file.with_suffix(".state")
            sensitivities = hessian_traces(
                network, loss, drawn, probes=probes, seed=seed, state=state, **options
            )
            _warn_of_unsettled(sensitivities)
        elif metric == "fisher":
            sensitivities = fisher(network, loss, drawn, **options)
        elif metric == "sqnr":
            sensitivities = sqnr(network, drawn, **options)
        else:
            raise ValueError(f"metric is {metric!r}, expected 'hessian', 'fisher' or 'sqnr'")
        if file is not None and rank() == 0:
            sensitivities.save(file)
    trace = observe(network, torch.zeros(sensitivities.image, device=next(network.parameters()).device))
    last = trace.layers()[-1]
    image_layers = trace.image_layers()
    fixed = dict.fromkeys([*image_layers, f"{last}.weight*"], END_BITS)
    if activations is not None:
        inputs = [unit for unit in sensitivities.units if unit.layer not in image_layers]
        fixed |= {tensor_name(unit.layer, unit.part, "input"): activations for unit in inputs}
    plan = allocate(
        sensitivities, budget=budgets, choices=choices, seed=seed, fixed=fixed, scale=scale, learned=True
    )  # fmt: skip
    if place is not None and rank() == 0:
        plan.save(place / "allocation" / ALLOCATION)
    return plan


def ssqat_network(
    network: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    folder: str | Path | None = None,
    *,
    num_classes: int = 1,
    equalized: bool = True,
    supervised: bool = True,
    distilled: bool = True,
    **options: Any,
) -> nn.Module:
    """Make a trained float network ready for SS-QAT, in place: equalize, split, sensitivity, allocation, quantizers,
    heads, and the float network as a teacher.

    What follows is calibration (``calibrate``, or the handler ``Calibration``), and training with
    ``SkipSupervisionLoss``; at the end ``strip`` and ``fold``.

    Args:
        network: float, trained.
        loss: see ``ssqat_plan``.
        batches: see ``ssqat_plan``; a list or a loader, as they are gone through several times.
        folder: see ``ssqat_plan``.
        num_classes: see ``attach_supervision``.
        equalized: bring the channels of activations to one range first, see ``equalize``.
        supervised: attach the heads.
        distilled: attach the float network as a teacher, see ``attach_teacher``.
        options: of ``ssqat_plan``: budget, choices, metric, ….

    Returns:
        the network.

    Raises:
        ValueError: as ``equalize``, ``split``, ``ssqat_plan``, ``quantize`` and ``attach_supervision`` do, or if batches
            is an iterator.
    """
    _refuse_iterator("ssqat_network: batches", batches)
    seed = options.get("seed", 0)
    with isolated_randomness(seed, batches):
        example = image_of(next(iter(batches)))[:1].to(next(network.parameters()).device)
    teacher = copy.deepcopy(network) if distilled else None
    if equalized:
        with isolated_randomness(seed, batches):
            equalize(network, batches)
    split(network, example)
    plan = ssqat_plan(network, loss, batches, folder, **options)
    quantize(network, plan, example)
    if supervised:
        # The heads' first weights follow from the seed, whatever was drawn before.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            attach_supervision(network, example, num_classes, teacher=teacher)
    elif teacher is not None:
        attach_teacher(network, teacher)
    return network


def ssqat(
    network: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    loader: DataLoader,
    out: str | Path,
    *,
    epochs: int,
    validate: Callable[[nn.Module], float] | None = None,
    learning_rate: float = 3e-4,
    supervision: float = 0.1,
    distillation: float = 1.0,
    equalized: bool = True,
    num_classes: int = 1,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    supervision_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """The whole recipe in one call: trained float network in, packed quantized network out.

    Equalize → split → sensitivity → allocation → calibration → batch norms estimated anew and frozen → SS-QAT with learned
    step sizes → strip → fold → packed. Everything is kept in ``out``: called again, it goes on where it was, and ends with
    the same weights, bit for bit on a CPU.

    Args:
        network: float, trained; a copy of it is worked on.
        loss: of prediction and label, such as ``DiceCELoss(sigmoid=True)``.
        loader: MONAI data loader of *training* data, batches with ``"image"`` and ``"label"``.
        out: folder for everything.
        epochs: of SS-QAT, each once through the loader.
        validate: gives a score of a network in evaluation, larger is better; called after every epoch, and the epoch with
            the best score is packed. By default the last one is: of many epochs on few cases, the best is the luckiest.
        learning_rate: Adam's, of the weights; it falls along a cosine. See ``parameter_groups`` for the others.
        supervision: λ at the beginning, see ``SkipSupervisionLoss``; 0 trains without heads.
        distillation: μ, how much the float network's prediction counts as a teacher; 0 trains without one.
        equalized: see ``ssqat_network``.
        num_classes: see ``attach_supervision``.
        calibration: batches for sensitivity, calibration and batch norms; the loader by default.
        seed: of everything random.
        device: where to train.
        supervision_options: of ``SkipSupervisionLoss``: activation, targets, boundary, ignore_label.
        options: of ``ssqat_plan``: budget, choices, metric, scale, ….

    Returns:
        ``out/model.unetq``; beside it ``plan.json``, ``model.pt`` (unfolded), ``allocation/`` and ``sensitivity/``.

    Raises:
        ValueError: as the stages do, if the loss or the validation is not finite, or if ``out`` holds files of these
            names but no ``stage.json``: something else wrote them, and they are left as they are.

    Example:
        >>> packed = ssqat(network, soft_dice_loss(), loader, "ssqat", epochs=20, budget="weights=3bits")
        >>> network = unpack(packed, FixedPointUNet(1, 1))
    """
    if epochs < 1 or not learning_rate > 0:
        raise ValueError(
            f"ssqat: epochs is {epochs}, learning_rate {learning_rate}, expected both to be positive"
        )
    supervised = SkipSupervisionLoss(
        loss, supervision, distillation=distillation, **(supervision_options or {})
    )
    _refuse_iterator("ssqat: calibration", calibration)
    out = Path(out)
    packed = out / "model.unetq"
    settings = {
        "network": network_digest(network), "epochs": epochs, "learning_rate": learning_rate, "supervision": supervision,
        "distillation": distillation, "equalized": equalized,
        "supervision_options": dict(supervision_options or {}), "num_classes": num_classes, "seed": seed,
        "validated": validate is not None,
        "options": {
            key: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for key, v in options.items()
        },
    }  # fmt: skip
    if (
        open_stage(out, settings, ["checkpoint.pt", "model.pt", "model.unetq", "plan.json"])
        and packed.exists()
    ):
        inspect_packed(packed)
        return packed
    batches = loader if calibration is None else calibration
    work = strip(copy.deepcopy(network)).to(device)
    ssqat_network(
        work, loss, batches, out, num_classes=num_classes, equalized=equalized, supervised=supervision > 0,
        distilled=distillation > 0, seed=seed, **options,
    )  # fmt: skip
    optimizer = torch.optim.Adam(parameter_groups(work, learning_rate))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(epochs))
    best = BestModel(work, out)
    trainer = SupervisedTrainer(
        device=device, max_epochs=epochs, train_data_loader=loader, network=work, optimizer=optimizer,
        loss_function=supervised, decollate=False,
    )  # fmt: skip
    trainer.logger = logger.getChild("trainer")  # ignite's own is that of all trainers of this class
    trainer.logger.setLevel(logging.WARNING)
    handler = Calibration(work, batches, epochs, freeze_norms_at=0.0)
    objects = {
        "network": work, "optimizer": optimizer, "lr_scheduler": scheduler, "best": best, "calibration": handler,
    }  # fmt: skip
    for part in (
        Checkpoint(out, objects, resume=(out / "checkpoint.pt").exists()),
        EpochSeed(seed, loader),
        handler,
        SupervisionDecay(supervised, epochs),
        PlanLog(work),
        LrScheduleHandler(scheduler, print_lr=False),  # type: ignore[arg-type]
    ):
        part.attach(trainer)

    def after_epoch(engine: Engine) -> None:
        if validate is None:
            best.keep(engine.state.epoch, engine.state.epoch)  # later is better
            return
        work.eval()
        score = float(validate(work))
        work.train()
        if not math.isfinite(score):
            raise ValueError(f"validate gave {score} in epoch {engine.state.epoch}, expected a finite number")
        if best.score is None or score > best.score:
            best.keep(score, engine.state.epoch)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, after_epoch)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, _check_loss)
    ProgressBar(desc="ss-qat", disable=None).attach(trainer)
    trainer.run()
    strip(work).load_state_dict(best.weights)
    fold(work.eval().cpu(), image_of(next(iter(batches)))[:1])
    plan_of(work).save(out / "plan.json")
    pack(work, packed)
    (out / "checkpoint.pt").unlink()
    return packed


def _refuse_iterator(name: str, batches: Any) -> None:
    """They are gone through several times."""
    if isinstance(batches, Iterator):
        raise ValueError(f"{name} is an iterator, which is empty after one pass; give a list or a loader")


def _check_loss(engine: Engine) -> None:
    loss = engine.state.output["loss"].item()  # type: ignore[index]
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {engine.state.iteration}: lower the learning rate")


def _warn_of_unsettled(sensitivities: Sensitivities) -> None:
    """Traces within their errors rank nothing, and below zero they say that rounding costs nothing."""
    unsettled = [name for name, entry in sensitivities.items() if entry.trace <= entry.error]
    if unsettled:
        logger.warning(
            "%d of %d Hessian traces have not settled after %d probes (%s, …): they cannot be told from 0, and bits are "
            "allocated as if rounding cost nothing there; give more probes, larger batches, or metric='sqnr'",
            len(unsettled), len(sensitivities), sensitivities.conditions["probes"], ", ".join(unsettled[:3]),
        )  # fmt: skip
