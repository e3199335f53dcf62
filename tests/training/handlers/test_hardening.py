"""Gradual rounding against tables by hand: β of ternary activations, and which power-of-two weights are frozen when."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_unetq.plan import QuantPlan
from monai_unetq.surgery import quantize, quantized_layers
from monai_unetq.training import Calibration, Checkpoint, EpochSeed, IncrementalFreezing, TernaryAnnealing
from monai_unetq.training.handlers import hardening
from monai_unetq.training.handlers.hardening import annealed_beta, freeze_largest, frozen_share

SHARES = (0.5, 0.75, 0.875, 1.0)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, [1]),
        (2, [0.75, 1]),
        (3, [0.75, 0.875, 1]),
        (4, [0.5, 0.75, 0.875, 1]),
        (5, [0.5, 0.75, 0.875, 1, 1]),
        (8, [0.5, 0.5, 0.75, 0.75, 0.875, 0.875, 1, 1]),
        (10, [0.5, 0.5, 0.75, 0.75, 0.75, 0.875, 0.875, 1, 1, 1]),
    ],
)
def test_shares_follow_each_other_in_equal_parts(epochs: int, expected: list[float]) -> None:
    assert [frozen_share(epoch, epochs, SHARES) for epoch in range(1, epochs + 1)] == expected
    assert [frozen_share(epoch, epochs, SHARES) for epoch in (-3, 0, epochs + 1)] == [0, 0, 1]


@given(
    st.sets(st.floats(0.01, 0.99), max_size=6).map(lambda found: [*sorted(found), 1.0]), st.integers(1, 40)
)
def test_every_share_has_its_turn_and_all_weights_are_frozen_at_the_end(
    shares: list[float], epochs: int
) -> None:
    found = [frozen_share(epoch, epochs, shares) for epoch in range(1, epochs + 1)]
    assert found == sorted(found) and found[-1] == 1
    if epochs >= len(shares):
        assert sorted(set(found)) == shares


@pytest.mark.parametrize(
    ("epochs", "hard_at", "expected"),
    [
        # 8^(k/6) for k = 0…6
        (10, 0.7, [1, 2**0.5, 2, 2 * 2**0.5, 4, 4 * 2**0.5, 8, None, None, None]),
        (10, 0.5, [1, 8**0.25, 8**0.5, 8**0.75, 8, None, None, None, None, None]),
        (3, 0.7, [1, 8, None]),
        (2, 0.7, [8, None]),
        (1, 0.7, [None]),
        (4, 1.0, [1, 2, 4, 8]),
        (2, 0.0, [None, None]),
    ],
)
def test_beta_rises_geometrically_and_ends_hard(
    epochs: int, hard_at: float, expected: list[float | None]
) -> None:
    assert [annealed_beta(epoch, epochs, hard_at) for epoch in range(1, epochs + 1)] == [
        None if beta is None else pytest.approx(beta, rel=1e-12) for beta in expected
    ]
    assert annealed_beta(0, epochs, hard_at) is annealed_beta(epochs + 1, epochs, hard_at) is None


def test_the_largest_are_frozen_and_of_equal_ones_the_first() -> None:
    weight = torch.tensor([[0.1, -0.9, 0.5], [0.5, -0.5, 0.2]])
    first = freeze_largest(weight, 0.5)
    assert first.int().tolist() == [[0, 1, 1], [1, 0, 0]]
    # 0.75 of 6 is 4.5, to even 4: one more, the largest of those that are left, whatever the frozen ones are now.
    moved = torch.tensor([[0.1, 0.0, 0.0], [0.0, -0.5, -0.6]])
    second = freeze_largest(moved, 0.75, first)
    assert second.int().tolist() == [[0, 1, 1], [1, 0, 1]]
    assert freeze_largest(moved, 0.1, second).equal(second)  # nothing thaws
    assert freeze_largest(moved, 1.0, second).all()


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.lists(st.floats(0, 1), min_size=1, max_size=5)
)
def test_what_is_frozen_stays_frozen(values: list[int], shares: list[float]) -> None:
    weight = torch.tensor(values, dtype=torch.float32)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for share in sorted(shares):
        before, mask = mask, freeze_largest(weight, share, mask)
        assert (mask >= before).all()
        assert int(mask.sum()) == round(share * len(values))
        new, rest = weight.abs()[mask & ~before], weight.abs()[~mask]
        assert not len(new) or not len(rest) or new.min() >= rest.max()
        weight = torch.roll(weight, 1)  # trained on, and other weights are large now


def tiny(weights: str = "pow2-4", activations: str = "int6", seed: int = 0, paired: bool = True) -> nn.Module:
    """Three layers: one with a batch norm to fold, a transposed one whose output channels are axis 1, a plain one."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=not paired),
        nn.BatchNorm2d(6) if paired else nn.Identity(),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 1, 2, stride=2),
    )
    if weights:
        quantize(network, QuantPlan.uniform(network, weights, activations, input="UQ0.8"))
    return network


def records() -> list[dict[str, Tensor]]:
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return [{"image": image, "label": (image > 0.5).float()} for image in images]


def trainer_of(
    network: nn.Module,
    epochs: int,
    start_epoch: int,
    folder: Path | None = None,
    stop_after: int | None = None,
    resume: bool = False,
    freezing_first: bool = False,
) -> SupervisedTrainer:
    """A training by Adam with every handler that has a say in rounding, as in the bundles.

    The learning rate is high, so that weights that were small become the largest.
    """
    loader = DataLoader(CacheDataset(records(), progress=False), batch_size=2, shuffle=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-1)
    calibration = Calibration(network, loader, epochs, start_epoch)
    freezing = IncrementalFreezing(network, epochs, start_epoch)
    objects = {"network": network, "optimizer": optimizer, "calibration": calibration, "freezing": freezing}
    handlers: list[Any] = [] if folder is None else [Checkpoint(folder, objects, resume)]
    handlers += [
        EpochSeed(3, loader),
        *((freezing, calibration) if freezing_first else (calibration, freezing)),
    ]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=stop_after or epochs,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=nn.functional.binary_cross_entropy_with_logits,
        train_handlers=[*handlers, TernaryAnnealing(network, epochs, start_epoch)],
    )
    trainer.logger.setLevel("WARNING")
    return trainer


def masks_of(network: nn.Module) -> list[Tensor | None]:
    masks = [layer.weight_quantizer.frozen for layer in quantized_layers(network).values()]
    return [None if mask is None else mask.clone() for mask in masks]


def same(first: Any, second: Any) -> bool:
    """Equal, bit for bit, through dictionaries and lists of tensors and numbers."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


@pytest.mark.parametrize("paired", [True, False])
def test_frozen_weights_stand_still_while_the_others_are_trained(paired: bool) -> None:
    net = tiny(paired=paired)
    layers = quantized_layers(net)
    trainer = trainer_of(net, epochs=10, start_epoch=2)
    counts: dict[int, list[int]] = {}
    latent: list[Tensor] = []
    earlier: list[Tensor] = [torch.zeros((), dtype=torch.bool)] * 3

    def weights() -> list[Tensor]:
        return [layer.output_major(layer.weight).detach().clone() for layer in layers.values()]

    def before(engine: Engine) -> None:
        latent[:] = weights()

    def after(engine: Engine) -> None:
        masks = [
            torch.zeros_like(w, dtype=torch.bool) if m is None else m
            for w, m in zip(latent, masks_of(net), strict=True)
        ]
        counts[engine.state.epoch] = [int(mask.sum()) for mask in masks]
        for old, new, mask in zip(latent, weights(), masks, strict=True):
            assert not (old != new)[mask].any()
            assert (old != new)[~mask].any() or mask.all()
        assert all((now >= then).all() for now, then in zip(masks, earlier, strict=True))
        earlier[:] = masks

    trainer.add_event_handler(Events.ITERATION_STARTED, before)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, after)
    trainer.run()
    # Of 54, 96 and 16 weights; every share lasts two epochs, after the two in float.
    assert [counts[epoch] for epoch in range(1, 11)] == [
        *[[0, 0, 0]] * 2,
        *[[27, 48, 8]] * 2,
        *[[40, 72, 12]] * 2,
        *[[47, 84, 14]] * 2,
        *[[54, 96, 16]] * 2,
    ]


def test_the_largest_of_what_the_quantizer_sees_after_calibration_are_frozen() -> None:
    net = tiny()
    trainer = trainer_of(net, epochs=5, start_epoch=1)
    seen: list[Any] = []

    def look(engine: Engine) -> None:
        if engine.state.epoch == 2 and not seen:
            seen.append([layer.folded_weight().detach().abs() for layer in quantized_layers(net).values()])
            seen.append(masks_of(net))

    trainer.add_event_handler(Events.ITERATION_STARTED, look)
    trainer.run()
    for weight, mask in zip(*seen, strict=True):
        assert weight[mask].min() >= weight[~mask].max()
        assert int(mask.sum()) == mask.numel() // 2


@pytest.mark.parametrize("activations", ["Q2.3", "int6"])
def test_it_may_be_listed_before_calibration(activations: str) -> None:
    """Calibration rescales the weights for static formats; what was held from before would undo that."""
    states = []
    for freezing_first in (False, True):
        net = tiny(activations=activations)
        trainer_of(net, epochs=3, start_epoch=1, freezing_first=freezing_first).run()
        states.append([dict(net.state_dict()), masks_of(net)])
    assert same(*states)


@pytest.mark.parametrize(
    ("weights", "activations"), [("pow2-4", "int6"), ("pow2-3", "ternary"), ("ternary", "ternary")]
)
@pytest.mark.parametrize("stopped", [1, 2, 5])
def test_a_resumed_training_ends_as_the_undisturbed_one(
    weights: str, activations: str, stopped: int, tmp_path: Path
) -> None:
    """Interrupted in the float phase, at its end, and when a part of the weights was frozen."""
    settings: dict[str, Any] = {"epochs": 10, "start_epoch": 2}  # epoch 6 has the share of epoch 5
    undisturbed = tiny(weights, activations)
    trainer_of(undisturbed, folder=tmp_path / "whole", **settings).run()

    trainer_of(tiny(weights, activations), folder=tmp_path / "cut", stop_after=stopped, **settings).run()
    resumed = tiny(weights, activations, seed=99)
    trainer_of(resumed, folder=tmp_path / "cut", resume=True, **settings).run()
    assert same(dict(resumed.state_dict()), dict(undisturbed.state_dict()))
    assert same(masks_of(resumed), masks_of(undisturbed))
    first, second = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut")
    )
    assert same(first["freezing"], second["freezing"])
    assert bool(first["freezing"]["masks"]) == (weights != "ternary")


def test_masks_are_needed_to_resume(tmp_path: Path) -> None:
    """They are not what the weights of the next epoch would give again."""
    net = tiny()
    trainer_of(net, 9, 0, tmp_path, stop_after=2).run()
    document = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    masks = document["freezing"]["masks"]
    chosen = {n: freeze_largest(layer.folded_weight(), 0.5) for n, layer in quantized_layers(net).items()}
    assert not same(masks, chosen)


def test_a_second_training_of_the_same_network_begins_with_nothing_frozen() -> None:
    net = tiny()
    trainer_of(net, 2, 0).run()
    trainer = trainer_of(net, 4, 0)
    frozen = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: frozen.append(masks_of(net)[0]))
    trainer.run()
    assert [None if mask is None else int(mask.sum()) for mask in frozen] == [27, 40, 47, 54]


@pytest.mark.parametrize("weights", ["", "int4"])
def test_other_networks_are_left_alone(weights: str, caplog: pytest.LogCaptureFixture) -> None:
    net = tiny(weights)
    before = copy.deepcopy(net)
    handlers = IncrementalFreezing(net, 3, 1), TernaryAnnealing(net, 3, 1)
    engine = Engine(lambda *_: None)
    engine.logger.setLevel(logging.INFO)
    for handler in handlers:
        handler.attach(engine)
    engine.run([0], max_epochs=3)
    assert same(dict(net.state_dict()), dict(before.state_dict()))
    assert handlers[0].state_dict() == {"masks": {}}
    assert "ternary" not in caplog.text and "frozen" not in caplog.text
    for layer in quantized_layers(net).values():
        assert layer.weight_quantizer.frozen is None and layer.input_quantizer.beta is None


def test_beta_reaches_signed_ternary_inputs_only() -> None:
    net = tiny("ternary", "ternary")  # inputs: the image, the result of tanh, the result of ReLU
    quantizers = [layer.input_quantizer for layer in quantized_layers(net).values()]
    assert [str(q.number_format) for q in quantizers] == ["UQ0.8", "ternary", "uternary"]
    engine = Engine(lambda *_: None)
    TernaryAnnealing(net, 11, 1).attach(engine)
    found = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: found.append([q.beta for q in quantizers]))
    engine.run([0], max_epochs=11)
    assert [beta for _, beta, _ in found] == [None, *(annealed_beta(k, 10, 0.5) for k in range(1, 11))]
    assert {(image, positive) for image, _, positive in found} == {(None, None)}


def test_every_process_chooses_from_the_state_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    net, first = tiny(), tiny(seed=1)
    expected = [freeze_largest(layer.folded_weight(), 1 / 2) for layer in quantized_layers(first).values()]
    monkeypatch.setattr(hardening, "broadcast_state", lambda to: to.load_state_dict(first.state_dict()))
    engine = Engine(lambda *_: None)
    IncrementalFreezing(net, 4).attach(engine)
    engine.run([0], max_epochs=1)
    assert same(masks_of(net), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: TernaryAnnealing(net, 4, 4), "TernaryAnnealing: start_epoch is 4 of 4 epochs"),
        (lambda net: TernaryAnnealing(net, 4, hard_at=1.5), r"hard_at is 1.5, expected a share in \[0, 1\]"),
        (lambda net: IncrementalFreezing(net, 0), "IncrementalFreezing: start_epoch is 0 of 0 epochs"),
        (lambda net: IncrementalFreezing(net, 4, shares=(0.5, 0.9)), "expected rising shares above 0, the last of them 1"),
        (lambda net: IncrementalFreezing(net, 4, shares=(0.5, 0.5, 1)), "expected rising shares"),
        (lambda net: IncrementalFreezing(net, 4, shares=(0, 1)), "expected rising shares above 0"),
        (lambda net: IncrementalFreezing(net, 4, shares=()), "expected rising shares"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no 'masks'"),
        ({"masks": {"9": torch.ones(1, dtype=torch.bool)}}, "layer '9', which is not quantized here"),
        ({"masks": {"0": torch.ones(6, dtype=torch.bool)}}, r"layer '0' is torch.bool \(6,\), expected torch.bool \(6, 1, 3, 3\)"),
        ({"masks": {"0": torch.ones(6, 1, 3, 3)}}, r"layer '0' is torch.float32 \(6, 1, 3, 3\)"),
        ({"masks": {"0": [True]}}, "layer '0' is list"),
    ],
)  # fmt: skip
def test_a_foreign_state_is_refused(state: dict[str, Any], message: str) -> None:
    net = tiny()
    good = torch.zeros(4, 6, 2, 2, dtype=torch.bool)
    if "masks" in state:
        state = {"masks": {"3": good, **state["masks"]}}
    with pytest.raises(ValueError, match=message):
        IncrementalFreezing(net, 4).load_state_dict(state)
    assert masks_of(net) == [None] * 3
