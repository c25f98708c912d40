"""CLIP weights -> one vision-only encoder folder in the cache, once. The other scripts call this when they need to.

    python prepare_clip.py                              # ViT-L/14, downloaded and checked by OpenAI's package
    python prepare_clip.py --clip_model ViT-B/16
    python prepare_clip.py --clip_model finetuned.pt    # a checkpoint of one's own
    python prepare_clip.py --precision int8 --data_dir data     # faster on processors; calibrated and proved on your images
    python prepare_clip.py --layers penultimate         # another layer than CLIP's embedding

The folder (in CLIP_CACHE or ~/.cache/clip, below encoders/) holds encoder.xml and encoder.bin for OpenVINO,
vision.safetensors for CUDA and encoder.json, which says what it is.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import common
from common import EncoderError, UsageError, need_folder, say
from encoders import (OPENAI_NAMES, PREPROCESSING, SHIPPED, cache_dir, check_precision, find_encoder, golden_image, prepared,
                      read_manifest)
from layers import canonical, layers_flag, with_layers

LEAST_IMAGES = 40  # that int8 is calibrated and proved on


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clip_model", default=os.environ.get("CLIP_MODEL") or "ViT-L/14", metavar="NAME|FILE",
                        help=f"{', '.join(OPENAI_NAMES)}, a checkpoint in OpenAI's format, or tiny "
                             "(default: CLIP_MODEL, else ViT-L/14)")
    parser.add_argument("--precision", choices=["float16", "int8"], default="float16",
                        help="of the stored weights; int8 is another encoder: extract and train again with it (default: %(default)s)")
    parser.add_argument("--layers", type=layers_flag, default="final", metavar="L",
                        help="final, penultimate, multi or blocks, as for extract_features.py (default: %(default)s)")
    parser.add_argument("--data_dir", metavar="DIR", help="labelled images to calibrate int8 on and to prove it with")
    parser.add_argument("--limit", type=int, default=400, metavar="N", help="how many of them, half for each (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.precision == "int8" and not args.data_dir:
        raise UsageError("--precision int8: name labelled images with --data_dir")
    if args.limit < LEAST_IMAGES:
        raise UsageError(f"--limit {args.limit}: at least {LEAST_IMAGES} images")
    if args.data_dir:
        need_folder(args.data_dir)
    return args


def ensure_encoder(clip_model, precision="float16", layers="final"):
    """Name or checkpoint -> folder of the prepared encoder; prepares it where it is missing, but for int8, which takes images.

    Raises EncoderError."""
    source = read_manifest(SHIPPED)["source"] if clip_model == "tiny" else source_of(clip_model)
    if precision == "int8":
        if clip_model == "tiny":
            check_precision(read_manifest(SHIPPED), precision)
        folder = find_layers(f"{source} int8", layers)
        if folder is None:
            flags = f"--clip_model {clip_model}" + (f" --layers {layers}" if layers != "final" else "")
            raise EncoderError(f"--precision int8: '{clip_model}' has no int8 form in {cache_dir()} yet: run python prepare_clip.py "
                               f"{flags} --precision int8 --data_dir DIR")
        return folder
    folder = find_layers(source, layers)
    if folder is None and clip_model == "tiny":
        raise EncoderError(f"--layers {layers}: 'tiny' is shipped with its final layer alone; "
                           "name another encoder with --clip_model")
    if folder is None:
        require_torch(f"preparing '{clip_model}'",
                      f", or copy a prepared folder into {cache_dir() / 'encoders'}, or set CLIP_MODEL=tiny (a demonstration)")
        from filelock import FileLock
        try:
            (cache_dir() / "encoders").mkdir(parents=True, exist_ok=True)
            lock = FileLock(cache_dir() / "encoders.lock").acquire()  # a second process waits here, then finds the folder
        except OSError as error:
            raise EncoderError(f"cannot write {cache_dir()}: {error.strerror}; set CLIP_CACHE to another place") from None
        with lock:
            folder = find_layers(source, layers) or prepare(clip_model, source, layers)
    return folder


def find_layers(source, layers):
    """Folder of the prepared encoder from this source that gives these layers, or None. Raises EncoderError."""
    for folder in prepared(source=source):
        manifest = read_manifest(folder)
        if manifest["layers"] == canonical(layers, manifest["arch"]):
            return folder
    return None


def source_of(clip_model):
    """What an encoder is looked up by: the name itself, or for a file 'sha256:' and the hash of its bytes."""
    if clip_model in OPENAI_NAMES:
        return clip_model
    if Path(clip_model).is_file():
        with open(clip_model, "rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    raise EncoderError(f"'{clip_model}' is neither a file nor one of {', '.join(OPENAI_NAMES)}, tiny; "
                       "set --clip_model or CLIP_MODEL to one of these")


def require_torch(what, else_do=""):
    """Raises EncoderError where what preparing and training an encoder need is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # clip-anytorch: pkg_resources is deprecated
            import clip, filelock, safetensors, torch  # noqa: E401, F401
    except ImportError as error:
        raise EncoderError(f"{what} needs torch and clip ({error}): pip install -r requirements.txt{else_do}") from None


def prepare(clip_model, source, layers):
    """Load, convert and store: -> the new folder. Written beside its place and renamed, so never half there."""
    from tqdm import tqdm
    with tqdm(total=3, desc=f"preparing {clip_model}", unit="step") as progress:
        visual = load_visual(clip_model)
        progress.update()
        name = clip_model if source == clip_model else Path(clip_model).stem
        if source != clip_model and name in OPENAI_NAMES:
            name += " (a file)"  # a model that names it must not send anyone to OpenAI's
        manifest, arch = read_card(clip_model), architecture(visual)
        layers = canonical(layers, arch)
        name += f" {layers}" if layers != "final" else ""
        manifest |= {"name": name, "source": source, "identity": identity_of(visual, layers), "layers": layers,
                     "preprocessing": PREPROCESSING, "resolution": visual.input_resolution, "arch": arch}
        for left in cache_dir().glob(".preparing-*"):  # by a process that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=cache_dir(), prefix=".preparing-"))
        try:
            write_folder(visual, layers, manifest, scratch, progress)
            return keep(scratch, name, manifest["identity"])
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def keep(scratch, name, identity):
    """A finished folder -> its place in the cache, readable by a service under another user."""
    folder = cache_dir() / "encoders" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{identity[:12]}"
    scratch.chmod(0o755)
    for file in scratch.iterdir():
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)
    return folder


def read_card(clip_model):
    """What finetune_clip.py wrote beside a checkpoint (which images it has seen), {} where there is none."""
    try:
        card = json.loads(Path(clip_model).with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) and "seen" in card else {}


def load_visual(clip_model):
    """Vision tower of a model as `clip.load` builds it, float32, eval mode. Raises EncoderError with the way out."""
    import clip
    target = cache_dir() / os.path.basename(clip.clip._MODELS.get(clip_model, ""))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated; a copy with another hash is fetched again
            return clip.load(clip_model, device="cpu", download_root=str(cache_dir()))[0].visual.float().eval()
    except Exception as error:  # torch's unpickler and the network raise anything
        reason = str(error).split("\n")[0]
        if clip_model not in OPENAI_NAMES:
            raise EncoderError(f"{clip_model} is not a CLIP checkpoint that clip.load can read: {reason}") from None
        if target.is_file() and source_of(str(target)).removeprefix("sha256:") not in clip.clip._MODELS[clip_model]:
            target.unlink()  # half of a download, or another file of that name: clip would fetch it again as well
            reason = "what arrived does not have the SHA-256 that OpenAI states" + ("" if "SHA256" in reason else f": {reason}")
        raise EncoderError(f"cannot download {clip_model} ({reason}): copy {target.name} to {target.parent}, "
                           "or set CLIP_MODEL=tiny (a demonstration)") from None


def architecture(visual):
    """The arguments that build this tower again; heads included, since another number of them loads without an error."""
    if hasattr(visual, "transformer"):
        return dict(kind="VisionTransformer", input_resolution=visual.input_resolution,
                    patch_size=visual.conv1.kernel_size[0], width=visual.conv1.out_channels,
                    layers=visual.transformer.layers, heads=visual.transformer.resblocks[0].attn.num_heads,
                    output_dim=visual.output_dim)
    return dict(kind="ModifiedResNet", layers=[len(getattr(visual, f"layer{i}")) for i in (1, 2, 3, 4)],
                output_dim=visual.output_dim, heads=visual.attnpool.num_heads,
                input_resolution=visual.input_resolution, width=2 * visual.conv1.out_channels)


def golden_features(module, resolution):
    """The golden picture's features in torch, float32: what every other way of running this encoder is compared with."""
    import torch
    from imaging import decode_image, preprocess
    pixels = preprocess(decode_image(golden_image()), resolution)
    with torch.inference_mode():
        return [float(f"{value:.6g}") for value in module(torch.from_numpy(pixels[None]))[0]]


def identity_of(visual, layers="final"):
    """SHA-256 over the tower's fp16 tensors in name order, layers and preprocessing: the same for every file form."""
    digest = hashlib.sha256(f"layers={layers} preprocessing={PREPROCESSING} {sorted(architecture(visual).items())}".encode())
    for name, tensor in sorted(visual.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_folder(visual, layers, manifest, folder, progress):
    """Vision tower -> vision.safetensors, encoder.xml, encoder.bin and encoder.json in `folder`.

    fp16 weights: OpenAI ships fp16, so nothing is lost. That is why the frontend is called rather than
    `ov.convert_model`, which multiplies a ResNet's batch norms into its convolutions first, and the products are no
    fp16 numbers (cosine 0.99999 to the original, instead of 1.0).
    """
    import openvino as ov
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    from safetensors.torch import save_file
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in visual.state_dict().items()},
              folder / "vision.safetensors")
    side, module = visual.input_resolution, with_layers(visual, layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer doubts the asserts in multi-head attention
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(module, example_input=torch.zeros(2, 3, side, side))
        model = frontend.convert(frontend.load(decoder))  # which must not outlive the decoder
        model.reshape([-1, 3, side, side])
    progress.update()
    ov.save_model(model, folder / "encoder.xml", compress_to_fp16=True)
    golden = golden_features(module, side)
    (folder / "encoder.json").write_text(json.dumps({**manifest, "dim": len(golden), "golden": golden}, indent=1))
    progress.update()


def main(argv=None):
    args = parse_args(argv)
    folder = ensure_encoder(args.clip_model, layers=args.layers)
    if args.precision == "int8":
        folder = ensure_int8(folder, args)
    print(folder)


def ensure_int8(folder, args):
    """The int8 form of a prepared encoder -> its folder; made where it is missing. Raises EncoderError, UsageError."""
    manifest = read_manifest(folder)
    check_precision(manifest, "int8")
    found = find_encoder(source=f"{manifest['source']} int8", layers=manifest["layers"])
    if found is None:
        import quantize
        quantize.require_nncf()
        (cache_dir() / "encoders").mkdir(parents=True, exist_ok=True)
        images = quantize.read_images(args.data_dir, args.limit, manifest["resolution"])
        found, words = quantize.quantize(folder, *images)
        say(words)
    return found


if __name__ == "__main__":
    common.run(main)
