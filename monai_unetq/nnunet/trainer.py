"""nnU-Net's trainers that quantize: ``nnUNetTrainerSSQAT``, ``nnUNetTrainerQAT`` and ``nnUNetTrainerFixedPoint``.

One training has two phases. The float phase is nnU-Net's own, and is skipped where its weights are there already. In
front of the first quantized epoch the network is equalized and split, its bits are allocated, and it is quantized and
calibrated on training cases of the fold; from then on it is trained quantized. Checkpoints hold the network without what
only training needs, so that nnU-Net's own commands load them.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from ..allocation import Budget
from ..deploy import pack
from ..files import replace_file
from ..plan import QuantPlan
from ..recipe import ssqat_plan
from ..sensitivity.metrics import from_first, network_digest
from ..surgery import (
    attach_supervision,
    attach_teacher,
    calibrate,
    equalize,
    fold,
    inference_state,
    plan_of,
    quantize,
    settle_norms,
    split,
    strip,
)
from ..training import SkipSupervisionLoss, cosine, freeze_norms, parameter_groups
from ..training.handlers.seeding import isolated_randomness
from ..training.supervision import supervision_weight
from .network import (
    example_image,
    on_batch_norm,
    request_plan,
    requested_network,
    with_norms,
    without_deep_supervision,
)
from .progress import caption
from .request import SECTION, Request

__all__ = ["nnUNetTrainerFixedPoint", "nnUNetTrainerQAT", "nnUNetTrainerSSQAT"]

FLOAT, QUANTIZED = "float", "quantized"

RECORD = "monai_unetq"
"""The key in nnU-Net's checkpoint of what resuming needs beyond the network's weights."""

SEED = 0


class _QuantizingTrainer(nnUNetTrainer):
    """What the trainers share: the two phases, their checkpoints, and what inference builds.

    Attributes:
        defaults: the request where the plans have no section, or say nothing.
        splits: whether convolutions over skip and up get formats of their own.
        request: what the plans ask for.
        phase: ``float`` or ``quantized``.
    """

    defaults: ClassVar[Request]
    splits: ClassVar[bool] = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if device.type == "cpu":
            self.device = device  # nnU-Net takes any process group for one of GPUs
        self.request = self.request_of(self.configuration_manager)
        self.phase = FLOAT
        self.float_epochs = self.request.float_epochs
        self.num_epochs = self.float_epochs + self.request.epochs
        self.num_iterations_per_epoch = self.request.iterations
        self.num_val_iterations_per_epoch = self.request.val_iterations
        self._oversampling = self.oversample_foreground_percent  # nnU-Net makes it each process's own
        self._untrained = ""  # digest of the network before weights are loaded into it
        self._begun = False
        # In training the network is float at first; inference asks the class, which builds the quantized one.
        self.build_network_architecture = self.build_float_network  # type: ignore[method-assign]

    # -- what the plans ask for --------------------------------------------------------------------------------------

    @classmethod
    def request_of(cls, configuration: Any) -> Request:
        """What a configuration asks for.

        Args:
            configuration: nnU-Net's ``ConfigurationManager``.

        Raises:
            ValueError: if its section is broken, or asks for what this trainer does not do.
        """
        section = configuration.configuration.get(SECTION, {})
        where = f"plans, section '{SECTION}'"
        request = cls.defaults.with_section(section, where)
        for text in request.budget:
            Budget.parse(text)
        cls.check_request(request, where)
        return request

    @classmethod
    def check_request(cls, request: Request, where: str) -> None:
        """Raise a ValueError for a request that this trainer cannot serve."""

    @classmethod
    def network_configuration(cls, configuration: Any) -> Any:
        """The configuration that the network is built from; nnU-Net's ``ConfigurationManager``."""
        return configuration

    @classmethod
    def build_float_network(
        cls, plans_manager: Any, configuration_manager: Any, *more: Any, **options: Any
    ) -> nn.Module:
        """The float network; arguments as ``build_network_architecture``'s."""
        configuration = cls.network_configuration(configuration_manager)
        return nnUNetTrainer.build_network_architecture(plans_manager, configuration, *more, **options)

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The quantized network that any fold's trained weights load into; what nnU-Net's inference builds."""
        network = cls.build_float_network(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        _check_supported(network)
        example = example_image(configuration_manager, num_input_channels)
        network.eval()
        return requested_network(network, cls.request_of(configuration_manager), example, cls.splits)

    # -- phases ------------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """nnU-Net's, with a float network."""
        if self.device.type == "mps":
            raise NotImplementedError(
                f"{type(self).__name__} runs on cuda and cpu; fake quantization has no kernels on mps"
            )
        super().initialize()
        _check_supported(self.core)
        self._try_quantized()
        self._untrained = network_digest(self.core)

    def _try_quantized(self) -> None:
        """Quantize a network that is thrown away: what cannot be, is to fail before the float phase."""
        network = type(self).build_network_architecture(
            self.plans_manager, self.configuration_manager, self.num_input_channels,
            self.label_manager.num_segmentation_heads, self.enable_deep_supervision,
        )  # fmt: skip
        if self.request.budget:
            self._try_budget()
        if self.request.supervision:
            try:
                attach_supervision(
                    network, example_image(self.configuration_manager, self.num_input_channels)
                )
            except ValueError as error:
                raise NotImplementedError(
                    f'{type(self).__name__}: {error}; train without heads: "supervision": 0 in the plans\' section '
                    f"'{SECTION}'"
                ) from None

    def _try_budget(self) -> None:
        """Allocate the narrowest widths, on noise: whether a budget is in reach follows from the layers' sizes alone."""
        network = self._float_network(None)
        patch = self.configuration_manager.patch_size
        noise = torch.randn(1, self.num_input_channels, *patch, device=self.device)
        with without_deep_supervision(network):
            split(network, self._example())  # a trainer with a budget splits
            narrowest = replace(self.request, metric="sqnr", choices=(min(self.request.choices),))
            self._allocated(network, [{"image": noise}], narrowest)

    @property
    def core(self) -> nn.Module:
        """The network itself, without what distributes or compiles it."""
        network: Any = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def on_train_start(self) -> None:
        """nnU-Net's; and the float phase is skipped where its weights are there."""
        if self.phase == QUANTIZED and self.request.distillation and not self._float_file.is_file():
            raise FileNotFoundError(
                f"{self._float_file}: no such file, expected the float weights that the network learns from; put back the "
                "fold's folder as it was, or train anew"
            )
        super().on_train_start()
        if not self._begun and self.phase == FLOAT and self.current_epoch == 0:
            self._skip_float_phase()
        self._begun = True
        self.num_epochs = self.float_epochs + self.request.epochs
        float_phase = (
            f"epochs 0 to {self.float_epochs - 1} in float" if self.float_epochs else "no float phase"
        )
        self.print_to_log_file(
            f"monai-unetq: {float_phase}, epochs {self.float_epochs} to {self.num_epochs - 1} quantized: {self.request}"
        )
        # Here already, for loops that are not nnU-Net's, such as MONAI's SupervisedTrainer.
        self._quantize_when_due()

    def _skip_float_phase(self) -> None:
        """Take the float weights that there are: pretrained ones, or those of the float trainer's fold."""
        if network_digest(self.core) != self._untrained:
            # nnU-Net does not transfer the segmentation layers, so this network is no teacher.
            self.request = replace(self.request, distillation=0.0)
            self.float_epochs = 0
            self.print_to_log_file(
                "monai-unetq: pretrained weights were given, so there is no float phase; their segmentation layers are "
                "not transferred by nnU-Net, so the network has no teacher"
            )
            return
        file = self.float_checkpoint()
        if file is None:
            return
        if not file.is_file():
            self.print_to_log_file(f"monai-unetq: {file} is not there, so the float phase comes first")
            return
        weights = torch.load(file, map_location=self.device, weights_only=False)["network_weights"]
        _load_float(self.core, weights, file)
        self.float_epochs = 0
        self.print_to_log_file(f"monai-unetq: float weights of {file}; there is no float phase")

    def float_checkpoint(self) -> Path | None:
        """Where the float trainer leaves the weights of this fold; None where it trains another network."""
        base = self.request.base_plans or self.plans_manager.plans_name
        name = f"{self.request.base_trainer}__{base}__{self.configuration_name}"
        fold = Path(nnUNet_results) / self.plans_manager.dataset_name / name / f"fold_{self.fold}"
        return fold / "checkpoint_final.pth"

    def on_epoch_start(self) -> None:
        """In front of the first quantized epoch the network becomes quantized."""
        self._quantize_when_due()
        super().on_epoch_start()

    def _quantize_when_due(self) -> None:
        if self.phase == FLOAT and self.current_epoch == self.float_epochs:
            self._begin_quantized()
            self._save_latest()

    def _begin_quantized(self) -> None:
        say = self.print_to_log_file
        say("monai-unetq: quantizing; calibration and sensitivities on training cases of this fold")
        batches = self._batches()
        network = self._float_network(self.core.state_dict())
        weights = copy.deepcopy(network.state_dict())
        writes = self.local_rank == 0 and not self.disable_checkpointing
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.request.distillation:
                replace_file(self._float_file, lambda path: torch.save(weights, path))
        if self.request.equalized:
            # With deep supervision, or the layers that only it runs would not follow what they read.
            network.decoder.deep_supervision = True  # type: ignore[union-attr]
            equalize(network, batches)
        with without_deep_supervision(network):
            # Processes could measure differently; DDP would share the state of formats, not what is computed with.
            plan = QuantPlan.from_json(from_first(self._plan(network, batches).to_json))
            quantize(network, plan, self._example())
            calibrate(network, batches)
            if _has_batch_norms(network):
                settle_norms(network, batches)
        self._train_quantized(network, weights)
        self._best_ema = None  # or checkpoint_best stays the float network
        if writes:
            plan_of(network).save(self.folder / "plan.json")
        say(f"monai-unetq: quantized {len(plan.layers)} layers; the plan is {self.folder / 'plan.json'}")

    def _plan(self, network: nn.Module, batches: list[dict[str, Any]]) -> QuantPlan:
        """The plan of this fold; the network is split where the trainer splits."""
        example = self._example()
        if self.splits:
            split(network, example)
        if not self.request.budget:
            return request_plan(network, self.request, example, learned=True)
        # What was measured is used again for the same cases only: folds may have been drawn anew.
        measured = None if self.disable_checkpointing else self.folder / _digest(batches)
        plan = self._allocated(network, batches, self.request, measured)
        return with_norms(plan, network, self.request, example)

    def _allocated(
        self, network: nn.Module, batches: list[dict[str, Any]], request: Request, folder: Path | None = None
    ) -> QuantPlan:
        """The plan that keeps a request's budget, from sensitivities measured on batches."""
        return ssqat_plan(
            network, self._full_resolution_loss(), batches, folder, budget=request.budget,
            choices=request.choices, activations=request.activation_bits, metric=request.metric,
            scale=request.scale, seed=SEED,
        )  # fmt: skip

    def _train_quantized(self, network: nn.Module, weights: Mapping[str, Tensor] | None) -> None:
        """Make a quantized network the one that is trained: heads, teacher, loss, optimizer, and what wraps it."""
        teacher = None
        if self.request.distillation and weights is not None:
            teacher = self._float_network(weights)
            teacher.decoder.deep_supervision = False  # type: ignore[union-attr]
        if self.request.supervision:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(SEED)
                classes = self.label_manager.num_segmentation_heads
                attach_supervision(network, self._example(), classes, teacher=teacher)
        elif teacher is not None:
            attach_teacher(network, teacher)
        network.decoder.deep_supervision = self.enable_deep_supervision  # type: ignore[union-attr]
        self.phase = QUANTIZED
        wrapped: Any = torch.compile(network) if self._do_i_compile() else network
        if self.is_ddp:
            devices = [self.local_rank] if self.device.type == "cuda" else None
            # Without batch norms nothing in the buffers changes, and a process without a validation case may miss a
            # broadcast.
            norms = _has_batch_norms(network)
            wrapped = DistributedDataParallel(wrapped, device_ids=devices, broadcast_buffers=norms)
        self.network = wrapped
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.loss = SkipSupervisionLoss(
            self._build_loss(),
            self.request.supervision,
            "sigmoid" if self.label_manager.has_regions else "softmax",
            ignore_label=self.label_manager.ignore_label,
            distillation=self.request.distillation,
        )

    def configure_optimizers(self) -> tuple[Any, Any]:
        """nnU-Net's in the float phase; then Adam with groups of its own for learned scales and heads, along a cosine."""
        if self.phase == FLOAT:
            total, self.num_epochs = self.num_epochs, self.float_epochs
            found = super().configure_optimizers()
            self.num_epochs = total
            return found
        optimizer = torch.optim.Adam(parameter_groups(self.core, self.request.learning_rate))
        return optimizer, _EpochSchedule(optimizer, cosine(self.request.epochs), self.float_epochs)

    def on_train_epoch_start(self) -> None:
        """nnU-Net's; λ falls, and batch norms stand still."""
        if self.phase == QUANTIZED:
            done = self.current_epoch - self.float_epochs
            epochs = self.request.epochs
            self.loss.weight = self.request.supervision * supervision_weight(done / epochs)
            freeze_norms(self.core, done + 1, epochs, share=0)  # what is trained is the folded network
        super().on_train_epoch_start()

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """nnU-Net's; the moving average of the pseudo Dice begins anew with the quantized network."""
        super().on_validation_epoch_end(val_outputs)
        if self.phase == QUANTIZED and self.current_epoch == self.float_epochs:
            averages = self.logger.get_value("ema_fg_dice", step=None)
            averages[-1] = self.logger.get_value("mean_fg_dice", step=-1)
            for logger in self.logger.loggers:  # Weights & Biases, where it is on
                logger.log("ema_fg_dice", averages[-1], self.current_epoch)

    def on_epoch_end(self) -> None:
        """nnU-Net's; the end of the float phase is kept, and progress.png says where it was."""
        super().on_epoch_end()
        if self.phase == FLOAT and self.current_epoch == self.float_epochs:
            self._save_latest()
        if self.local_rank == 0:
            phases = f"float: epochs 0 to {self.float_epochs - 1}. " if self.float_epochs else ""
            phases += f"quantized from epoch {self.float_epochs}: {self._described()}"
            caption(Path(self.output_folder) / "progress.png", f"{type(self).__name__}. {phases}")

    def on_train_end(self) -> None:
        """nnU-Net's; then the network loses its heads, and is packed beside the checkpoint."""
        super().on_train_end()
        network = strip(self.core)
        if self.local_rank == 0 and not self.disable_checkpointing:
            packed = copy.deepcopy(network).eval().cpu()
            with without_deep_supervision(packed):
                fold(packed, self._example().cpu())
                file = pack(packed, Path(self.output_folder) / "model.unetq")
            self.print_to_log_file(f"monai-unetq: packed weights in {file}")

    def _described(self) -> str:
        request = self.request
        weights = (
            request.weights or f"{', '.join(request.budget)} of {', '.join(map(str, request.choices))} bits"
        )
        return f"weights {weights}, activations {request.activations or 'by the budget'}"

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, its network without heads; what resuming needs besides goes into a key of its own.

        The file is replaced when it is whole, so that a killed training leaves none that is broken.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return

        def write(path: Path) -> None:
            buffer = io.BytesIO()
            super(_QuantizingTrainer, self).save_checkpoint(buffer)
            buffer.seek(0)
            checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)
            record: dict[str, Any] = {"phase": self.phase, "float_epochs": self.float_epochs}
            if self.phase == QUANTIZED:
                weights = checkpoint["network_weights"]
                kept = inference_state(self.core)
                record["plan"] = plan_of(self.core).to_json()
                record["teacher"] = bool(self.request.distillation)
                record["heads"] = {key: value for key, value in weights.items() if key not in kept}
                checkpoint["network_weights"] = {key: value for key, value in weights.items() if key in kept}
            torch.save({**checkpoint, RECORD: record}, path)

        replace_file(Path(filename), write)

    def _save_latest(self) -> None:
        """A checkpoint from which the epoch that comes now can be begun."""
        self.current_epoch -= 1  # nnU-Net writes down the epoch after the one that it is in
        self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        self.current_epoch += 1

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Go on from a checkpoint of this trainer, in the phase that it was made in.

        Raises:
            ValueError: if another trainer made it, or it does not fit the network.
        """
        if isinstance(filename_or_checkpoint, str):
            source = filename_or_checkpoint
            checkpoint = torch.load(source, map_location=self.device, weights_only=False)
        else:
            source, checkpoint = "the checkpoint", filename_or_checkpoint
        record = checkpoint.get(RECORD)
        if record is None:
            raise ValueError(
                f"{source}: made by {checkpoint.get('trainer_name')}, expected a checkpoint of {type(self).__name__}; give "
                "float weights with -pretrained_weights, or remove the file to begin anew"
            )
        if not self.was_initialized:
            self.initialize()
        self.float_epochs = record["float_epochs"]
        self.num_epochs = self.float_epochs + self.request.epochs
        weights = checkpoint["network_weights"]
        if record["phase"] == QUANTIZED:
            if not record["teacher"]:
                self.request = replace(self.request, distillation=0.0)
            network = self._float_network(None)
            with without_deep_supervision(network):
                quantize(network, QuantPlan.from_json(record["plan"]), self._example())
            self._train_quantized(network, self._float_weights())
        else:
            self.optimizer, self.lr_scheduler = self.configure_optimizers()
        _load_all(self.core, {**weights, **record.get("heads", {})}, source)
        self.my_init_kwargs = checkpoint["init_args"]
        self.current_epoch = checkpoint["current_epoch"]
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])

    # -- networks and data -------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where the fold's plan, sensitivities and float weights are kept."""
        return Path(self.output_folder) / "quantization"

    def _float_network(self, weights: Mapping[str, Tensor] | None) -> nn.Module:
        network: nn.Module = self.build_float_network(
            self.plans_manager, self.configuration_manager, self.num_input_channels,
            self.label_manager.num_segmentation_heads, self.enable_deep_supervision,
        ).to(self.device)  # fmt: skip
        if weights is not None:
            network.load_state_dict(weights)
        if self.is_ddp and self.device.type == "cuda":  # as nnU-Net does; on CPUs there is none
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network.eval()

    @property
    def _float_file(self) -> Path:
        return self.folder / "float.pt"

    def _float_weights(self) -> dict[str, Tensor] | None:
        """The teacher's; None where there is none, or only validation is possible."""
        if not self.request.distillation or not self._float_file.is_file():
            return None
        found: dict[str, Tensor] = torch.load(self._float_file, map_location=self.device, weights_only=True)
        return found

    def _example(self) -> Tensor:
        return example_image(self.configuration_manager, self.num_input_channels, self.device)

    def _full_resolution_loss(self) -> Callable[[Any, Any], Tensor]:
        """nnU-Net's loss of one resolution, which can be differentiated twice and asks no other process."""
        deep = self._build_loss()
        loss: Any = deep.loss if self.enable_deep_supervision else deep
        loss.dc = getattr(loss.dc, "_orig_mod", loss.dc)
        loss.dc.ddp = False
        return loss

    def _batches(self) -> list[dict[str, Any]]:
        """Batches of this fold's training cases, without augmentation, the same in every call and every process."""
        cases, _ = self.do_split()
        dataset = self.dataset_class(
            self.preprocessed_dataset_folder, cases,
            folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage,
        )  # fmt: skip
        labels = self.label_manager
        transforms = self.get_validation_transforms(
            None, is_cascaded=self.is_cascaded, foreground_labels=labels.foreground_labels,
            regions=labels.foreground_regions if labels.has_regions else None, ignore_label=labels.ignore_label,
        )  # fmt: skip
        patch = self.configuration_manager.patch_size
        loader = nnUNetDataLoader(
            dataset, self.configuration_manager.batch_size, patch, patch, labels,
            oversample_foreground_percent=self._oversampling,
            probabilistic_oversampling=self.probabilistic_oversampling, transforms=transforms,
        )  # fmt: skip
        with isolated_randomness(SEED, None):
            drawn = [next(loader) for _ in range(self.request.calibration_batches)]
        return [
            {"image": batch["data"].to(self.device), "label": batch["target"].to(self.device)}
            for batch in drawn
        ]


class _EpochSchedule:
    """Learning rates of all groups, multiplied by a function of the quantized epoch; ``step`` as nnU-Net calls it."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], first: int) -> None:
        self._optimizer, self._factor, self._first = optimizer, factor, first
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def step(self, epoch: int) -> None:
        """Set the learning rates of an epoch, counted from the beginning of the training."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._factor(epoch - self._first)


def _digest(batches: list[dict[str, Any]]) -> str:
    """A short name of what batches hold."""
    digest = sha256()
    for batch in batches:
        digest.update(batch["image"].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _has_batch_norms(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _check_supported(network: nn.Module) -> None:
    """Raise a NotImplementedError for a network that is no nnU-Net with an encoder and a decoder."""
    decoder = getattr(network, "decoder", None)
    if not hasattr(decoder, "seg_layers") or not hasattr(decoder, "deep_supervision"):
        raise NotImplementedError(
            f"{type(network).__name__} has no decoder with seg_layers and deep_supervision, expected one of nnU-Net's "
            "U-Nets (PlainConvUNet, ResidualEncoderUNet); choose other plans with -p"
        )


def _load_float(network: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Load a float trainer's weights; a ValueError says what does not fit, and nothing is loaded then."""
    own = network.state_dict()
    for key, value in own.items():
        if key not in weights:
            raise ValueError(
                f"{file}: holds no {key!r}, so it is of other plans or another trainer than this network's; name the ones "
                f"that it was trained with as base_plans and base_trainer in the plans' section '{SECTION}', or remove it"
            )
        if weights[key].shape != value.shape:
            raise ValueError(
                f"{file}: {key!r} has the shape {tuple(weights[key].shape)}, this network's {tuple(value.shape)}: it was "
                f"trained with other plans; name them as base_plans in the plans' section '{SECTION}'"
            )
    network.load_state_dict({key: weights[key] for key in own})


def _load_all(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source}: does not fit the network that the plans describe: {error}") from None


class nnUNetTrainerSSQAT(_QuantizingTrainer):  # noqa: N801 (nnU-Net's way to call trainers)
    """SS-QAT: split convolutions, bits allocated in each fold, skips supervised, the float network as a teacher."""

    defaults = Request(budget=("weights=4bits",), activations="int6")
    splits = True


class nnUNetTrainerQAT(_QuantizingTrainer):  # noqa: N801
    """Plain quantization-aware training at uniform widths with learned scales: the control."""

    defaults = Request(weights="int4", activations="int6", supervision=0.0, distillation=0.0)

    @classmethod
    def check_request(cls, request: Request, where: str) -> None:
        """It has uniform widths, and no heads and no teacher."""
        if request.budget:
            raise ValueError(
                f"{where}: budget {list(request.budget)} is for nnUNetTrainerSSQAT; {cls.__name__} has uniform widths, "
                "give weights"
            )

    @classmethod
    def request_of(cls, configuration: Any) -> Request:
        """What a configuration asks for, of which heads and teacher are left out: plans may be shared with SS-QAT."""
        return replace(super().request_of(configuration), supervision=0.0, distillation=0.0)


class nnUNetTrainerFixedPoint(nnUNetTrainerQAT):  # noqa: N801
    """Fixed point throughout: uniform Q(i.f) formats, batch norm and ReLU, so that integers alone can run it."""

    defaults = Request(weights="Q1.7", activations="Q4.4", supervision=0.0, distillation=0.0)

    @classmethod
    def check_request(cls, request: Request, where: str) -> None:
        """Scales are powers of two."""
        super().check_request(request, where)
        if request.scale != "power-of-two":
            raise ValueError(f"{where}: scale is {request.scale!r}, {cls.__name__} has powers of two")

    def float_checkpoint(self) -> Path | None:
        """None: other trainers have other norms."""
        return None

    @classmethod
    def network_configuration(cls, configuration: Any) -> Any:
        """With batch norms and ReLU."""
        return on_batch_norm(configuration)
