"""What ``unetq export`` and ``unetq verify`` accept and print, and how a trained model becomes a quantized network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..nnunet.inference import TrainedFolder

__all__ = ["add_export_command", "add_verify_command"]

_EXPORT_EXAMPLES = """\
examples:
  unetq export bundles/em_unet --set model=bundles/em_unet/models/fixed_point/model.unetq \\
      --to openvino --out em-openvino                                a network that a bundle trained
  unetq export nnUNet_results/Dataset004_Hippocampus/nnUNetTrainerSSQAT__nnUNetPlans__3d_fullres \\
      --fold 0 --to onnx --out hippocampus-onnx                      one fold of an nnU-Net
  unetq export unetq-demo/model.unetq --to integer --out demo-integer      a packed U-Net of the 2019 paper
  unetq export unetq-demo/model.unetq --to onnx --out demo-onnx --image slice.png    and a real golden image
  unetq verify em-openvino                                           does it compute what it should?

--to onnx      standard QDQ operators, weights in int8, for ONNX Runtime, OpenVINO and (--for tensorrt) TensorRT
--to openvino  OpenVINO's IR, weights in int8, fastest with VNNI; --for avx2 is faster without
--to qonnx     Quant and BipolarQuant nodes, any bit width, for FINN and hls4ml
--to integer   a program for integers only, in numpy, without torch; power-of-two scales and folded batch norm
--to packed    weights at their true bit width, for monai_unetq.unpack

Exporting a bundle runs what its configuration says, as MONAI does.
"""

_VERIFY_EXAMPLES = """\
examples:
  unetq verify em-openvino                       files, then the golden image through the engine
  unetq verify em-onnx --data slices             and every image of a folder, preprocessed as the model says
  unetq verify em-onnx --data slices --against em-integer    and how far another export's results are from it
  unetq verify em-integer --json
"""


def add_export_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``export`` to the commands of ``unetq``.

    Args:
        commands: argparse's object for subcommands.
        command: makes the parser of one, from commands, name, summary and examples.
    """
    parser = command(commands, "export", "write a trained quantized model for an engine", _EXPORT_EXAMPLES)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a MONAI bundle's folder, nnU-Net's folder of a trained model, or a packed model",
    )
    parser.add_argument(
        "--to", required=True, choices=("onnx", "openvino", "qonnx", "integer", "packed"), help="the target"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--store", choices=("int8", "int4"), default="int8",
        help="of --to onnx: type of weights; int4 is smaller, and run in float (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--for", dest="profile", choices=("onnxruntime", "tensorrt", "vnni", "avx2"),
        help="whose rules the model keeps: of --to onnx onnxruntime (default) or tensorrt; of --to openvino vnni (default), or "
        "avx2 for processors without VNNI",
    )  # fmt: skip
    parser.add_argument(
        "--image", type=Path, nargs="+", metavar="FILE",
        help="the golden image, of nnU-Net and packed models one file for each channel; preprocessed as the model says (default: noise)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="of the image: H W or H W D")
    parser.add_argument("--fold", metavar="F", help="of an nnU-Net (default: the first that is finished)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="of a bundle: a key of its inference.yaml, such as model=FILE, or width=16 as it was trained with; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print export.json")
    parser.set_defaults(run=_export, after_interrupt="; nothing was written")


def add_verify_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``verify`` to the commands of ``unetq``; arguments as in ``add_export_command``."""
    parser = command(
        commands,
        "verify",
        "check an exported folder against its golden output, or on images",
        _VERIFY_EXAMPLES,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="written by unetq export")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="images (PNG, NIfTI, MHA) to run besides, preprocessed as export.json says; NPY: already preprocessed",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="another export of the same network, compared on --data; fails where more than 0.01%% of an image's voxels differ",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=_verify, after_interrupt="")


def _export(options: argparse.Namespace) -> None:
    from torch.onnx import OnnxExporterError

    from ..deploy import export
    from ..runtime.engine import ENGINES

    if options.size is not None and min(options.size) < 1:
        raise ValueError(f"--size {' '.join(map(str, options.size))}: expected numbers of at least 1")
    network, example, preprocessing = _trained(options)
    _check_size(network, example, options)
    try:
        document = export(
            network, example, options.to, options.out,
            store=options.store, profile=options.profile, preprocessing=preprocessing,
        )  # fmt: skip
    except OnnxExporterError as error:
        raise ValueError(
            f"{options.model}: PyTorch's ONNX exporter fails on this network ({one_line(error.__cause__ or error)}); "
            "--to packed needs no exporter"
        ) from error
    if options.json:
        print(json.dumps(document, indent=1))
        return
    for name in sorted(document["files"]):
        print(f"{(options.out / name).stat().st_size:>12,} bytes  {name}")
    for layer, note in document["notes"].items():
        print(f"{layer}: {note}")
    if options.to in ENGINES:
        print(f"\nnext: unetq verify {options.out}")
    else:
        print(
            f"\nnext: unetq verify {options.out}, and monai_unetq.unpack('{options.out / 'model.unetq'}', network)"
        )


def _trained(options: argparse.Namespace) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The quantized network of a trained model, an image for it, and what images must go through first."""
    model: Path = options.model
    if not model.exists():
        raise FileNotFoundError(
            f"{model}: no such file or folder, expected a bundle, nnU-Net's folder of a trained model, or a packed model"
        )
    if model.is_file():
        _refuse(options, model, "a packed model", "fold", "overrides")
        return _packed(model, options)
    if (model / "configs").is_dir():
        _refuse(options, model, "a bundle", "fold")
        return _bundle(model, options)
    _refuse(options, model, "nnU-Net's folder", "overrides")
    return _nnunet(model, options)


def _check_size(network: nn.Module, example: Tensor, options: argparse.Namespace) -> None:
    """Run the network once: what it does not take would come out of the exporter as a message of something else."""
    import torch

    from ..surgery.observe import evaluating

    dimensions = _dimensions(network)
    if example.dim() != dimensions + 2:
        raise ValueError(f"--size has {example.dim() - 2} numbers, expected {dimensions}")
    try:
        with evaluating(network), torch.no_grad():
            network(example)
    except Exception as error:  # the network's own code
        size = " ".join(map(str, example.shape[2:]))
        raise ValueError(
            f"{options.model}: the network does not take images of the size {size} ({one_line(error)}); give another "
            "--size, of U-Nets multiples of 32"
        ) from error


def _refuse(options: argparse.Namespace, model: Path, what: str, *names: str) -> None:
    for name in names:
        if getattr(options, name):
            flag = "set" if name == "overrides" else name
            raise ValueError(f"--{flag}: {model} is {what}, which has none; leave it out")


def _packed(file: Path, options: argparse.Namespace) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    import torch

    from ..deploy import inspect_packed, unpack
    from ..networks import FixedPointUNet

    held = inspect_packed(file)
    if held["network"] != f"{FixedPointUNet.__module__}.{FixedPointUNet.__qualname__}":
        raise ValueError(
            f"{file}: holds the weights of a {held['network'].rpartition('.')[2]}, not its code; give the bundle or "
            "the nnU-Net folder that it came from"
        )
    network = unpack(file, _paper_network(file))
    if options.image is None:
        return network, _example(network, options.size), {}
    from ..runtime.images import read_channels
    from ..surgery.observe import example_for

    channels = example_for(network).shape[1]
    if len(options.image) != channels:
        raise ValueError(
            f"--image has {len(options.image)} files, but the network of {file} reads {channels} channels; give one file "
            "a channel"
        )
    image = torch.from_numpy(read_channels(options.image, _dimensions(network))[:1])
    return network, _fitted(image, options.size), {}


def _paper_network(file: Path) -> nn.Module:
    """The paper's U-Net as a packed file has it, by the shapes in it."""
    from ..deploy.packed import packed_shapes
    from ..networks import FixedPointUNet

    shapes, functions = packed_shapes(file)
    first, last = shapes["encoder.0.conv1.weight"], shapes["last.weight"]
    named: dict[str, Literal["tanh", "hardtanh"]] = {"Tanh": "tanh", "Hardtanh": "hardtanh"}
    activation: Literal["relu", "tanh", "hardtanh"] = named.get(
        functions.get("encoder.0.act1", "").partition("(")[0], "relu"
    )
    return FixedPointUNet(
        first[1], last[0], width=first[0], activation=activation, spatial_dims=len(first) - 2,
        upsample="transposed" if "upsample.0.weight" in shapes else "linear",
    )  # fmt: skip


def _bundle(folder: Path, options: argparse.Namespace) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from monai.bundle import ConfigParser
    from torch import nn

    from ..nnunet.inference import TrainedFolder
    from ..surgery.quantize import quantized_layers

    found = [f for end in ("yaml", "yml", "json") if (f := folder / "configs" / f"inference.{end}").is_file()]
    if not found:
        raise FileNotFoundError(f"{folder / 'configs'}: found no inference.yaml or inference.json")
    try:
        parser = ConfigParser(ConfigParser.load_config_file(str(found[0])))
        parser["bundle_root"] = str(folder)
        for override in options.overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise ValueError(f"--set {override}: expected KEY=VALUE")
            known = _keys(parser.get())
            if key.replace("::", "#") not in known:
                near = get_close_matches(key, known) or [name for name in known if "#" not in name]
                raise ValueError(
                    f"--set {key}: {found[0]} has no such key, expected one of its own: {', '.join(near)}"
                )
            parser[key] = _literal(value)
        with redirect_stdout(sys.stderr):  # nnU-Net says which trainer it found
            network = parser.get_parsed_content("network_def")
        steps = parser.get("preprocessing", {})
    except ValueError:
        raise
    except Exception as error:  # the configuration's own code
        cause: BaseException = error
        while cause.__cause__ is not None:  # MONAI names the component, not what is wrong with it
            cause = cause.__cause__
        raise ValueError(
            f"{found[0]}: 'network_def' cannot be built: {cause}; values that the training overrode are given with --set, "
            "as width=16"
        ) from error
    if isinstance(network, TrainedFolder):  # written by `unetq nnunet bundle`
        return _of_nnunet(network, folder / "models", options)
    if not isinstance(network, nn.Module) or not quantized_layers(network):
        given = parser.get_parsed_content("model") if "model" in parser else None
        missing = f" ({given}: no such file)" if isinstance(given, str) and not Path(given).is_file() else ""
        raise ValueError(f"{found[0]}: its network is not quantized{missing}; {_quantized_files(folder)}")
    preprocessing = (
        {"monai_transforms": _literal_steps(parser, "preprocessing", steps)}
        if isinstance(steps, dict)
        else {}
    )
    if options.image is None:
        return network, _example(network, options.size), preprocessing
    files = [str(file) for file in options.image]
    try:
        image = parser.get_parsed_content("preprocessing")({"image": files if len(files) > 1 else files[0]})[
            "image"
        ]
    except Exception as error:  # MONAI's transforms raise whatever a file makes them
        raise ValueError(f"{options.image[0]}: the bundle's preprocessing fails on it: {error}") from error
    image = image.as_tensor() if hasattr(image, "as_tensor") else image
    if len(image.shape) == _dimensions(network) + 2:  # a volume for a network in 2D: its middle slice
        image = image[..., image.shape[-1] // 2]
    return network, _fitted(image[None].float(), options.size), preprocessing


def _literal_steps(parser: Any, place: str, found: Any) -> Any:
    """A part of a configuration with its references and expressions replaced by their values, where JSON can hold them."""
    if isinstance(found, dict):
        return {key: _literal_steps(parser, f"{place}#{key}", value) for key, value in found.items()}
    if isinstance(found, list):
        return [_literal_steps(parser, f"{place}#{number}", value) for number, value in enumerate(found)]
    if not isinstance(found, str) or not found.startswith(("@", "$", "%")):
        return found
    try:
        value = parser.get_parsed_content(place)
        json.dumps(value)
    except Exception:  # an object, or the configuration's own code
        return found
    return value


def _keys(config: Any, above: str = "") -> list[str]:
    """The keys of a configuration, the outer ones first, as --set takes them: ``width``, ``network_def#network#width``."""
    entries = (
        config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    )
    named = [(f"{above}{key}", value) for key, value in entries]
    return [name for name, _ in named] + [key for name, value in named for key in _keys(value, f"{name}#")]


def _quantized_files(folder: Path) -> str:
    """What to do about a bundle whose ``model`` is no quantized network: with what its trainings left, if they did."""
    trained = sorted((folder / "models").glob("**/model.unetq"))
    if not trained:
        return (
            "train it with configs/fixed_point.yaml or ssqat.yaml, and name the trained file with --set model=FILE where "
            "it is not the bundle's own"
        )
    return "give the file of a quantized training: " + ", or ".join(f"--set model={file}" for file in trained)


def _nnunet(folder: Path, options: argparse.Namespace) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from ..nnunet.inference import TrainedFolder

    folds = None if options.fold is None else [options.fold]
    try:
        with redirect_stdout(sys.stderr):  # nnU-Net says which trainer it found
            trained = TrainedFolder(folder, folds=folds, mirroring=False)
    except ImportError as error:
        raise ImportError(
            f"{folder}: nnU-Net builds this network: pip install monai-unetq[nnunet] ({error})"
        ) from None
    return _of_nnunet(trained, folder, options)


def _of_nnunet(
    trained: TrainedFolder, folder: Path, options: argparse.Namespace
) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    import torch

    from ..surgery.quantize import quantized_layers

    network = trained.network.eval()
    if not quantized_layers(network):
        raise ValueError(f"{folder}: its network is not quantized; train with -tr nnUNetTrainerSSQAT")
    size = options.size or trained.patch_size
    preprocessing = trained.settings()
    if options.image is not None:
        return network, _fitted(trained.preprocess(options.image)[None], size), preprocessing
    torch.manual_seed(0)
    return network, torch.randn(1, len(preprocessing["channel_names"]), *size), preprocessing


def _example(network: nn.Module, size: list[int] | None) -> Tensor:
    """A seeded image in [0, 1], of the size asked for or of one that the network takes."""
    import torch

    from ..surgery.observe import example_for

    shape = list(example_for(network).shape)
    if size is not None:
        if len(size) != len(shape) - 2:
            raise ValueError(f"--size has {len(size)} numbers, expected {len(shape) - 2}")
        shape[2:] = size
    torch.manual_seed(0)
    return torch.rand(shape)


def _dimensions(network: nn.Module) -> int:
    from ..surgery.observe import example_for

    return example_for(network).dim() - 2


def _fitted(image: Tensor, size: Sequence[int] | None) -> Tensor:
    """The middle of an image (1, C, spatial…), cut and filled with zeros to a size; by default to multiples of 32."""
    from torch.nn.functional import pad

    wanted = list(size) if size else [max(32, have // 32 * 32) for have in image.shape[2:]]
    if len(wanted) != image.dim() - 2:
        raise ValueError(f"--size has {len(wanted)} numbers, expected {image.dim() - 2}")
    for axis, want in enumerate(wanted, 2):
        have = image.shape[axis]
        if have > want:
            image = image.narrow(axis, (have - want) // 2, want)
        elif have < want:
            before = (want - have) // 2
            after = [0, 0] * (image.dim() - 1 - axis) + [before, want - have - before]
            image = pad(image, after)
    return image.contiguous()


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _verify(options: argparse.Namespace) -> None:
    from ..runtime.verify import ALLOWED_DIFFERENCE, verify

    if options.against is not None and options.data is None:
        raise ValueError("--against compares two exports on images: give them with --data")
    found = verify(options.folder)
    document = {"folder": str(options.folder), **found.to_json()}
    if options.data is not None:
        from ..runtime.images import run_images

        document["images"] = run_images(options.folder, options.data, options.against)
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        print(f"files      as exported, for {found.target}")
        if found.equal is None:
            print(f"logits     not compared: {found.hint}")
        else:
            print(f"logits     {'equal, bit for bit' if found.equal else f'largest difference {found.largest:.3g} ({found.relative:.2%} of the largest)'}")  # fmt: skip
            print(f"labels     {found.labels_differ:.4%} of the voxels differ")
        if found.int8_share is not None:
            print(f"INT8       {found.int8_share:.1%} of the layers' multiplications, on this processor")
        for layer in found.float_layers:
            print(f"float      {layer}")
        for image in document.get("images", []):
            shares = ", ".join(f"{k}: {v:.2%}" for k, v in image["labels"].items())
            other = f"  differ: {image['labels_differ']:.4%}" if "labels_differ" in image else ""
            print(f"{image['image']}  {image['seconds']:.2f} s  {shares}{other}")
    if not found.passed:
        raise ValueError(f"{options.folder}: does not compute what fake quantization does: {found.hint}")
    differing = [
        one for one in document.get("images", []) if one.get("labels_differ", 0) > ALLOWED_DIFFERENCE
    ]
    if differing:
        worst = max(differing, key=lambda one: one["labels_differ"])
        raise ValueError(
            f"{options.folder}: other labels than {options.against} on more than {ALLOWED_DIFFERENCE:.2%} of the voxels of "
            f"{len(differing)} of {len(document['images'])} images, most on {worst['image']} ({worst['labels_differ']:.2%})"
        )
