"""Vision towers of timm (PyTorch Image Models) as encoders.

    arrays, arch, transform = read("timm:vit_pe_core_large_patch14_336.fb", {})
    arrays, arch, transform = read("timm:convnext_tiny.fb_in22k@weights.safetensors", {})

The first form downloads from Hugging Face's hub. `final` is the tower's own pooled output, before
a classifier or a projection.
"""

import os
from difflib import get_close_matches

from detector.base.console import one_line, say
from detector.base.constants import CROP_MODES
from detector.base.errors import EncoderError
from detector.encoders.runtime import TIMM, cache_dir
from detector.images.preprocessing import Transform

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # as OpenVINO's, in runtime.py
OPEN = ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "mit")


def read(clip_model, crop):
    """Name -> ({name: array} with floats as float16, architecture, Transform). Raises EncoderError.

    `crop`: --crop_share and --crop_mode where the user gave them. Prints licence and notes.
    """
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise EncoderError(
            f"preparing '{clip_model}' needs timm ({error}): pip install -r requirements/timm.txt"
        ) from None
    name, _, file = clip_model.removeprefix(TIMM).partition("@")
    config = config_of(name)
    name = f"{config.architecture}.{config.tag}".removesuffix(".")
    transform = transform_of(clip_model, config, crop)
    tower = load(clip_model, name, file, config.hf_hub_id)
    for line in (licence(config.license), *(config.notes or ())):
        say(f"{clip_model}: {line}")
    arch = {
        "kind": f"{TIMM}{type(tower).__name__}",
        "model": name,
        "layers": len(tower.feature_info),
        "input_resolution": transform.resolution,
    }
    return half_precision(clip_model, tower.state_dict()), arch, transform


def config_of(name):
    """timm's `pretrained_cfg` of a tower. Raises EncoderError for a name that must not be used."""
    import timm

    try:
        config = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # neither such a tower, nor such a tag of a tower
        close = get_close_matches(name, timm.list_pretrained(), 1, 0.5)
        meant = f"; did you mean {TIMM}{close[0]}?" if close else ""
        raise EncoderError(f"'{name}' is no tower of timm {timm.__version__}{meant}") from None
    arch, tag = config.architecture, config.tag
    if "QuickGELU" in "".join(config.notes or ()) and "quickgelu" not in arch:
        right = arch.replace("_clip_", "_clip_quickgelu_")
        raise EncoderError(
            f"'{name}' computes these weights with another activation than they were trained with; "
            f"use {TIMM}{right}.{tag}"
        )
    return config


def transform_of(clip_model, config, crop):
    """`pretrained_cfg`, the user's crop -> Transform. Raises EncoderError."""
    from timm.data import resolve_data_config

    asked = {"crop_pct": crop.get("crop_share"), "crop_mode": crop.get("crop_mode")}
    data = resolve_data_config(asked, config.to_dict())
    _, height, width = data["input_size"]
    if height != width:
        raise EncoderError(f"'{clip_model}' takes images of {width} x {height}, not squares")
    if data["crop_mode"] not in CROP_MODES:
        raise EncoderError(
            f"'{clip_model}': its crop mode '{data['crop_mode']}' is not supported; name "
            f"--crop_mode {' or '.join(CROP_MODES)}"
        )
    numbers = (tuple(map(float, data[name])) for name in ("mean", "std"))
    share = float(data["crop_pct"])
    return Transform(height, *numbers, data["interpolation"], share, data["crop_mode"])


def load(clip_model, name, file, repository):
    """-> the tower with its weights, in eval mode. Raises EncoderError."""
    import timm
    from safetensors.torch import load_file

    try:
        # as a state dict and with the classifier, so that timm refuses missing tensors
        overlay = {"state_dict": load_file(file)} if file else None
        tower = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir() / "timm"
        )
    except Exception as error:  # of the hub, of the network, of safetensors and of torch
        hub = f" of https://huggingface.co/{repository}" if repository else ""
        raise EncoderError(
            f"cannot load '{clip_model}' ({type(error).__name__}: {one_line(error)}): fetch "
            f"model.safetensors{hub} and name it, --clip_model {TIMM}{name}@model.safetensors"
        ) from None
    tower.reset_classifier(0)
    return tower.eval()


def licence(name):
    """timm's name of a licence -> a line for the user."""
    if name in OPEN:
        return f"timm states the licence {name}"
    if name and ("-nc-" in name or "noncommercial" in name):
        return f"timm states the licence {name}, which is non-commercial: ask before you deploy"
    return f"timm states the licence {name or 'unknown'}: read it before you deploy"


def half_precision(clip_model, state):
    """State dict -> {name: array}, floats as float16. Raises EncoderError for those too large."""
    import torch

    arrays = {}
    for name, tensor in state.items():
        tensor = tensor.half() if tensor.is_floating_point() else tensor
        if not torch.isfinite(tensor).all():
            raise EncoderError(f"'{clip_model}': {name} is not finite in float16")
        arrays[name] = tensor.numpy()
    return arrays
