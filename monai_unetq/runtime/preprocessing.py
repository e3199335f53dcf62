"""What an image goes through before an exported network: the steps that its ``export.json`` carries.

Imports no torch itself; MONAI or nnU-Net, which run the steps, do. Nothing of a document is executed: steps are looked up
in a table, and their arguments are plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line

__all__ = ["MONAI_STEPS", "preprocessor"]

MONAI_STEPS: Mapping[str, frozenset[str]] = {
    name: frozenset(arguments.split())
    for name, arguments in {
        "LoadImaged": "image_only ensure_channel_first",
        "EnsureChannelFirstd": "channel_dim",
        "Orientationd": "axcodes labels",
        "Spacingd": "pixdim diagonal mode padding_mode align_corners",
        "ScaleIntensityd": "minv maxv factor channel_wise",
        "ScaleIntensityRanged": "a_min a_max b_min b_max clip",
        "ScaleIntensityRangePercentilesd": "lower upper b_min b_max clip relative channel_wise",
        "NormalizeIntensityd": "subtrahend divisor nonzero channel_wise",
        "EnsureTyped": "data_type",
    }.items()
}
"""Transforms of MONAI that are run, with the arguments beside ``keys`` that they may have."""


def preprocessor(preprocessing: Mapping[str, Any], dimensions: int) -> Callable[[Sequence[Path]], np.ndarray]:
    """What makes an image, one file for each channel, what the exported network reads.

    Args:
        preprocessing: that of ``export.json``, with ``monai_transforms`` or nnU-Net's ``configuration``.
        dimensions: 2 or 3; a volume for a network in 2D becomes a batch of its slices.

    Returns:
        a function from the files of a case to (N, C, spatial…), float32; it raises ValueError where a step fails on them.

    Raises:
        ValueError: if a step is none that is run here.
        ImportError: without MONAI or nnU-Net.
    """
    if "monai_transforms" in preprocessing:
        run, slices_first = _by_monai(preprocessing["monai_transforms"]), (3, 0, 1, 2)
    elif "configuration" in preprocessing:
        run, slices_first = _by_nnunet(preprocessing), (1, 0, 2, 3)
    else:
        raise ValueError(
            f"export.json: 'preprocessing' has the keys {sorted(preprocessing)}, expected 'monai_transforms' or "
            "nnU-Net's 'configuration'; save images that are preprocessed as .npy"
        )

    def prepared(files: Sequence[Path]) -> np.ndarray:
        image = run(files)
        if image.ndim == dimensions + 2 == 4:
            return np.ascontiguousarray(image.transpose(slices_first))
        if image.ndim != dimensions + 1:
            raise ValueError(
                f"{files[0]}: has {image.ndim - 1} dimensions behind its preprocessing, expected {dimensions}"
            )
        return image[None]

    return prepared


def _by_monai(composed: Any) -> Callable[[Sequence[Path]], np.ndarray]:
    """Through a ``Compose`` of MONAI: (C, spatial…)."""
    steps = composed.get("transforms", [composed]) if isinstance(composed, Mapping) else composed
    wanted = []
    for number, step in enumerate(steps):
        if not isinstance(step, Mapping) or "_target_" not in step:
            raise _unknown(number, repr(step))
        name = str(step["_target_"]).removeprefix("monai.transforms.")
        arguments = {key: value for key, value in step.items() if key != "_target_"}
        keys = arguments.pop("keys", "image")
        if name not in MONAI_STEPS or keys not in ("image", ["image"]):
            raise _unknown(number, name)
        for argument, value in arguments.items():
            if argument not in MONAI_STEPS[name] or not _plain(value):
                raise _unknown(number, f"{name}({argument}={value!r})")
        wanted.append((name, arguments))
    from monai import transforms as monai

    transforms = [(name, getattr(monai, name)(keys="image", **arguments)) for name, arguments in wanted]

    def run(files: Sequence[Path]) -> np.ndarray:
        case: dict[str, Any] = {"image": str(files[0]) if len(files) == 1 else [str(file) for file in files]}
        for name, transform in transforms:
            try:
                case = transform(case)
            except Exception as error:  # MONAI's transforms raise whatever an image makes them
                raise ValueError(
                    f"{files[0]}: the preprocessing step {name} fails on it ({one_line(error)})"
                ) from error
        return np.asarray(case["image"], dtype=np.float32)

    return run


def _plain(value: Any) -> bool:
    """No expression or reference of MONAI's configurations."""
    if isinstance(value, list):
        return all(_plain(one) for one in value)
    return not (isinstance(value, str) and value.startswith(("$", "@", "%"))) and not isinstance(
        value, Mapping
    )


def _unknown(number: int, what: str) -> ValueError:
    return ValueError(
        f"export.json: step {number} of the preprocessing is {what}, expected one of {', '.join(MONAI_STEPS)} with "
        "plain arguments; save images that are preprocessed as .npy"
    )


def _by_nnunet(settings: Mapping[str, Any]) -> Callable[[Sequence[Path]], np.ndarray]:
    """As nnU-Net prepares a case, transposed, cropped, normalized and resampled: (C, spatial…)."""
    try:
        from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
    except ImportError as error:
        raise ImportError(
            f"nnU-Net prepares the images of this network: pip install monai-unetq[nnunet] ({error}), or save images "
            "that are preprocessed as .npy"
        ) from None
    plans = PlansManager(
        {
            "image_reader_writer": settings["image_reader_writer"],
            "transpose_forward": settings["transpose_forward"],
            "transpose_backward": settings["transpose_backward"],
            "foreground_intensity_properties_per_channel": settings["intensities"],
        }
    )
    configuration = ConfigurationManager(dict(settings["configuration"]))
    document = {"channel_names": settings["channel_names"], "labels": settings["labels"]}
    steps = configuration.preprocessor_class(verbose=False)

    def run(files: Sequence[Path]) -> np.ndarray:
        try:
            image, _, _ = steps.run_case([str(file) for file in files], None, plans, configuration, document)
        except Exception as error:  # readers and resampling raise whatever an image makes them
            raise ValueError(
                f"{files[0]}: nnU-Net's preprocessing fails on it ({one_line(error)})"
            ) from error
        return np.asarray(image, dtype=np.float32)

    return run
