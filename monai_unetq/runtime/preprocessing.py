"""What an image goes through before an exported network: the steps that its ``export.json`` carries.

Imports no torch itself; MONAI or nnU-Net, which run the steps, do. Nothing of a document is executed: steps are looked up
in a table, and their arguments are plain values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line

__all__ = ["MONAI_STEPS", "preprocessed"]

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


def preprocessed(files: Sequence[Path], preprocessing: Mapping[str, Any], dimensions: int) -> np.ndarray:
    """An image of one file for each channel as the exported network reads it.

    Args:
        files: of one case.
        preprocessing: that of ``export.json``, with ``monai_transforms`` or nnU-Net's ``configuration``.
        dimensions: 2 or 3; a volume for a network in 2D becomes a batch of its slices.

    Returns:
        (N, C, spatial…), float32.

    Raises:
        ValueError: if a step is none that is run here, or fails on the image.
        ImportError: without MONAI or nnU-Net.
    """
    if "monai_transforms" in preprocessing:
        image = _by_monai(files, preprocessing["monai_transforms"])
        slices_last = True
    elif "configuration" in preprocessing:
        image = _by_nnunet(files, preprocessing)
        slices_last = False
    else:
        raise ValueError(
            f"export.json: 'preprocessing' has the keys {sorted(preprocessing)}, expected 'monai_transforms' or "
            "nnU-Net's 'configuration'; save images that are preprocessed as .npy"
        )
    if image.ndim == dimensions + 2 == 4:
        return np.ascontiguousarray(
            image.transpose(3, 0, 1, 2) if slices_last else image.transpose(1, 0, 2, 3)
        )
    if image.ndim != dimensions + 1:
        raise ValueError(
            f"{files[0]}: has {image.ndim - 1} dimensions behind its preprocessing, expected {dimensions}"
        )
    return image[None]


def _by_monai(files: Sequence[Path], composed: Any) -> np.ndarray:
    """Through a ``Compose`` of MONAI: (C, spatial…)."""
    steps = composed.get("transforms", [composed]) if isinstance(composed, Mapping) else composed
    transforms = []
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
        transforms.append((name, arguments))
    from monai import transforms as monai

    case: dict[str, Any] = {"image": str(files[0]) if len(files) == 1 else [str(file) for file in files]}
    for name, arguments in transforms:
        try:
            case = getattr(monai, name)(keys="image", **arguments)(case)
        except Exception as error:  # MONAI's transforms raise whatever an image makes them
            raise ValueError(
                f"{files[0]}: the preprocessing step {name} fails on it ({one_line(error)})"
            ) from error
    return np.asarray(case["image"], dtype=np.float32)


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


def _by_nnunet(files: Sequence[Path], settings: Mapping[str, Any]) -> np.ndarray:
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
    try:
        image, _, _ = configuration.preprocessor_class(verbose=False).run_case(
            [str(file) for file in files], None, plans, configuration, document
        )
    except Exception as error:  # readers and resampling raise whatever an image makes them
        raise ValueError(f"{files[0]}: nnU-Net's preprocessing fails on it ({one_line(error)})") from error
    return np.asarray(image, dtype=np.float32)
