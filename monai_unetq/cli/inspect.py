"""What ``unetq inspect`` accepts and prints: packed models, MONAI bundles and nnU-Net's trained models; and how a
model that a user names becomes a network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..surgery import Skips

__all__ = ["LoadedModel", "add_inspect_command", "add_model_arguments", "aligned", "load_model", "on_meta"]

_Found = TypeVar("_Found")

_EXAMPLES = """\
examples:
  unetq inspect unetq-demo/model.unetq                a packed model: formats, sizes, skips
  unetq inspect --json unetq-demo/model.unetq > model.json
  unetq inspect bundles/em_unet --size 512 512        a MONAI bundle: the network that its network_def builds
  unetq inspect nnUNet_results/Dataset502_GM/nnUNetTrainer__nnUNetPlans__3d_fullres
                                                      nnU-Net's folder of a trained model
  unetq inspect nnUNet_preprocessed/Dataset502_GM/nnUNetPlans.json --configuration 3d_fullres
                                                      plans, before anything is trained

Inspecting a bundle runs what its configuration says, as MONAI does.
"""

_CONFIGURATIONS = tuple(f"{name}.{end}" for name in ("train", "inference") for end in ("yaml", "yml", "json"))


def add_inspect_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``inspect`` to the commands of ``unetq``.

    Args:
        commands: argparse's object for subcommands.
        command: makes the parser of one, from commands, name, summary and examples.
    """
    inspect = command(commands, "inspect", "print what a model holds, and its skip connections", _EXAMPLES)
    add_model_arguments(inspect)
    inspect.set_defaults(run=_inspect, after_interrupt="")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``load_model`` reads, and ``--json``."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a packed model, a MONAI bundle's folder, nnU-Net's folder of a trained model, or a plans file",
    )
    parser.add_argument(
        "--configuration",
        metavar="NAME",
        help="of nnU-Net's plans (default: the one the folder is named for)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="N",
        help="of the image that MACs are counted for: H W or H W D (default: what the model says)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as they need to be, under their names."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, ["-" * width for width in widths], *rows)
    )


@dataclass(frozen=True)
class LoadedModel:
    """A float network and the image it is for.

    Attributes:
        head: path, and nnU-Net's configuration.
        network: on the meta device where nnU-Net built it.
        example: (1, C, spatial…), on the meta device.
        source: where the image's size is from.
    """

    head: dict[str, Any]
    network: nn.Module
    example: Tensor
    source: str


def load_model(options: argparse.Namespace) -> LoadedModel | None:
    """The network of what ``add_model_arguments`` accepts; None for a packed file, which holds none.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is none, or the size or the configuration do not fit it.
    """
    model: Path = options.model
    if not model.exists():
        raise FileNotFoundError(
            f"{model}: no such file or folder, expected a packed model, a MONAI bundle's folder, nnU-Net's folder of "
            "a trained model, or a plans file"
        )
    if model.is_dir() and (configuration := _bundle_configuration(model)):
        _refuse(options, "a bundle has one network", "configuration")
        return _bundle(model, configuration, options.size)
    if model.is_dir() or model.suffix == ".json":
        return _nnunet(*_plans(model, options.configuration), options.size)
    _refuse(options, f"the packed file {model} says it itself", "configuration", "size")
    return None


def _inspect(options: argparse.Namespace) -> None:
    loaded = load_model(options)
    description = _packed(options.model) if loaded is None else {**loaded.head, **_described(loaded)}
    print(json.dumps(description, indent=1) if options.json else _text(description))


def _refuse(options: argparse.Namespace, reason: str, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: {reason}; leave it out")


def _bundle_configuration(folder: Path) -> Path | None:
    return next((f for name in _CONFIGURATIONS if (f := folder / "configs" / name).is_file()), None)


def _packed(file: Path) -> dict[str, Any]:
    from ..deploy import inspect_packed

    return inspect_packed(file)


def _bundle(folder: Path, configuration: Path, size: Sequence[int] | None) -> LoadedModel:
    """The network of a bundle's ``network_def``, in float."""
    metadata = folder / "configs" / "metadata.json"
    said = _image_size(_document(metadata)) if metadata.is_file() else None
    from monai.bundle import ConfigParser
    from torch import nn

    from ..surgery import dequantize
    from ..surgery.observe import example_for

    try:
        parser = ConfigParser(ConfigParser.load_config_file(str(configuration)))
    except Exception as error:  # whatever the reader of YAML or JSON raises
        raise ValueError(f"{configuration}: no configuration of a bundle: {error}") from None
    if "network_def" not in parser:
        raise ValueError(
            f"{configuration}: there is no 'network_def', expected the bundle's network under it"
        )
    parser["bundle_root"] = str(folder)
    try:
        network = parser.get_parsed_content("network_def")
    except Exception as error:  # the configuration's own code
        raise ValueError(
            f"{configuration}: 'network_def' cannot be built: {error}; modules of the bundle's own are found with "
            f"PYTHONPATH={folder}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{configuration}: 'network_def' is a {type(network).__name__}, expected a torch.nn.Module"
        )
    try:
        default = example_for(network)
    except ValueError as error:
        raise ValueError(f"{configuration}: {error}") from None
    shape = tuple(default.shape[2:])
    source = "--size" if size else "metadata.json" if said else "by default; see --size"
    chosen = _sized(default, size or said or shape, "--size" if size else str(metadata))
    return LoadedModel({"path": str(folder)}, dequantize(network), chosen, source)


def _image_size(metadata: dict[str, Any]) -> tuple[int, ...] | None:
    """The size that a bundle's metadata gives for its image; None where it is an expression, such as ``8*n``."""
    found: Any = metadata
    for key in ("network_data_format", "inputs", "image", "spatial_shape"):
        found = found.get(key) if isinstance(found, dict) else None
    if isinstance(found, list) and found and all(type(n) is int and n > 0 for n in found):
        return tuple(found)
    return None


def _plans(model: Path, configuration: str | None) -> tuple[Path, dict[str, Any], dict[str, Any], str]:
    """File and content of nnU-Net's plans, the content of its data set's ``dataset.json``, and the configuration."""
    file = model / "plans.json" if model.is_dir() else model
    if model.is_dir() and not (file.is_file() and (model / "dataset.json").is_file()):
        raise ValueError(
            f"{model}: neither a MONAI bundle (configs/train.yaml or .json) nor nnU-Net's folder of a trained model "
            "(plans.json and dataset.json); of preprocessed data, give the plans file"
        )
    plans = _document(file)
    known = plans.get("configurations")
    if not isinstance(known, dict) or not known:
        raise ValueError(f"{file}: there are no 'configurations', expected nnU-Net's plans")
    dataset = file.parent / "dataset.json"
    if not dataset.is_file():
        raise FileNotFoundError(
            f"{dataset}: no such file; it says how many channels and labels the network has: copy it from the data "
            "set's folder, next to the plans"
        )
    name = configuration
    if name is None and model.is_dir() and "__" in model.resolve().name:
        name = model.resolve().name.rsplit("__", 1)[1]
    if name is None and len(known) == 1:
        name = next(iter(known))
    if name is None or name not in known:
        asked = f"there is no configuration {name!r}" if name else "no configuration was asked for"
        raise ValueError(f"{file}: {asked}; give --configuration, one of {', '.join(known)}")
    return file, plans, _document(dataset), name


def _nnunet(
    file: Path,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    configuration: str,
    size: Sequence[int] | None,
) -> LoadedModel:
    """The network as nnU-Net builds it from plans, with the outputs that it has when it predicts."""
    import torch

    try:
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    except ImportError as error:
        raise ImportError(
            f"{file}: nnU-Net builds this network: pip install monai-unetq[nnunet] ({error})"
        ) from None
    try:
        with redirect_stdout(sys.stderr), torch.device("meta"):
            manager = PlansManager(plans)
            found = manager.get_configuration(configuration)
            channels = determine_num_input_channels(manager, found, dataset)
            network = get_network_from_plans(
                found.network_arch_class_name,
                found.network_arch_init_kwargs,
                found.network_arch_init_kwargs_req_import,
                channels,
                manager.get_label_manager(dataset).num_segmentation_heads,
                allow_init=False,
                deep_supervision=False,
            )
            example = torch.zeros(1, channels, *found.patch_size)
    except Exception as error:  # nnU-Net reads the plans, and says in many ways what they lack
        raise ValueError(
            f"{file}: nnU-Net cannot build the configuration {configuration!r} ({type(error).__name__}: {error})"
        ) from error
    chosen = _sized(example, size or tuple(example.shape[2:]), "--size")
    source = "--size" if size else f"patch of {configuration}"
    return LoadedModel({"path": str(file), "configuration": configuration}, network, chosen, source)


def _document(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: found a {type(found).__name__}, expected a JSON object")
    return found


def _sized(example: Tensor, size: Sequence[int], source: str) -> Tensor:
    """The example with another spatial shape, on the meta device."""
    import torch

    dimensions = example.dim() - 2
    if len(size) != dimensions or min(size) < 1:
        raise ValueError(
            f"{source}: found {' '.join(map(str, size))}, expected {dimensions} whole numbers of at least 1, the size "
            f"of a {dimensions}D image"
        )
    return torch.zeros(*example.shape[:2], *size, device="meta")


def on_meta(network: nn.Module, example: Tensor, run: Callable[[nn.Module, Tensor], _Found]) -> _Found:
    """``run(network, example)`` on the meta device, or with values where the network does not run there.

    Raises:
        ValueError: what ``run`` raises, and that the size can be given.
    """
    import copy

    import torch

    try:
        try:
            return run(copy.deepcopy(network).to("meta"), example)
        except (ValueError, RuntimeError, TypeError):
            if any(parameter.is_meta for parameter in network.parameters()):
                raise
            # Some networks look at values in their forward, and there are none on the meta device.
            return run(network, torch.zeros(example.shape))
    except ValueError as error:
        raise ValueError(f"{error}; on the command line: --size") from None


def _described(loaded: LoadedModel) -> dict[str, Any]:
    """What there is to say of a float network.

    MACs are those of convolutions, transposed convolutions and linear layers.
    """
    network = loaded.network
    skips, macs = on_meta(network, loaded.example, _observed)
    return {
        "network": f"{type(network).__module__}.{type(network).__qualname__}",
        "image": list(loaded.example.shape[1:]),
        "image_from": loaded.source,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "macs": macs,
        "skips": skips.to_json(),
        "up_to_skip_macs": _up_to_skip(skips),
    }


def _observed(network: nn.Module, example: Tensor) -> tuple[Skips, int]:
    from ..surgery import find_skips, observe
    from ..surgery.skips import applications

    modules = dict(network.named_modules())
    calls = observe(network, example).calls
    weights = {call.layer: cast("Tensor", modules[call.layer].weight).numel() for call in calls}
    macs = sum(weights[call.layer] * applications(call, modules[call.layer]) for call in calls)
    return find_skips(network, example), macs


def _up_to_skip(skips: Skips) -> float | None:
    """How many times the MACs of the skip halves the up halves take; None where nothing can be split."""
    from ..parts import kind_of

    macs = {"skip": 0, "up": 0}
    for found in skips.splittable:
        for part, count in zip(found.parts, found.macs, strict=True):
            macs[kind_of(part.name)] += count
    return macs["up"] / macs["skip"] if macs["skip"] else None


def _text(description: dict[str, Any]) -> str:
    sections = _packed_text(description) if "layers" in description else [_network_text(description)]
    if "layers" in description and not description["skips"]:
        return "\n\n".join(sections)
    from ..surgery import Skips

    skips = Skips.from_json(description["skips"], f"{description['path']}: 'skips'")
    ratio = _up_to_skip(skips)
    if ratio is not None:
        sections += [str(skips), f"the up halves take {ratio:.2f} times the MACs of the skip halves"]
    else:
        sections.append(str(skips))
    return "\n\n".join(sections)


def _network_text(description: dict[str, Any]) -> str:
    image = "×".join(map(str, description["image"]))
    configuration = description.get("configuration")
    rows = [
        ("network", description["network"]),
        *([("configuration", configuration)] if configuration else []),
        ("image", f"{image} ({description['image_from']})"),
        ("parameters", f"{description['parameters']:,}"),
        ("MACs", f"{description['macs']:,}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _packed_text(description: dict[str, Any]) -> list[str]:
    weights, in_float = description["weight_bytes"], description["float_bytes"]
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    rows = [
        tuple(
            f"{layer[key]:.2f}" if key == "bits" else str(layer[key])
            for key in ("name", "weight", "input", "parameters", "bytes", "bits", "codes")
        )
        for layer in description["layers"]
    ]
    ratio = f" ({in_float / weights:.2f} times smaller than {in_float} bytes in float32)" if weights else ""
    head = (
        f"network  {description['network']}",
        f"made by  {versions}",
        f"file     {description['file_bytes']} bytes",
        f"weights  {weights} bytes{ratio}",
    )
    table = aligned(("layer", "weight", "input", "parameters", "bytes", "bits each", "codes"), rows)
    return ["\n".join(head), table]
