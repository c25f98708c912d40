"""Find prepared encoders and run them on CLIP's input.

encoder = Encoder(find_encoder(source="ViT-L/14"))  # a folder that prepare_clip.py wrote
features = encoder.encode(pixels)  # float32 [n, 3, r, r] -> float32 [n, d]
"""

import ctypes
import importlib.util
import io
import json
import math
import os
import queue
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from detector.base.errors import EncoderError

# Images of a pass in long runs. A processor with AMX took 1.3 times as long for single passes.
BLOCK = 16
# Version of detector/images/preprocessing.py, part of every encoder's identity. Change it whenever
# the same bytes and the same Transform would become other pixels.
PREPROCESSING = "clip-1"
TIMM = "timm:"  # how the names of timm's towers begin

# Intel's usage statistics: with this entry OpenVINO sends nothing.
sys.modules.setdefault("openvino_telemetry", None)


def cache_dir():
    """Folder of CLIP's weights and prepared encoders: CLIP_CACHE, else OpenAI's ~/.cache/clip.

    Raises EncoderError.
    """
    try:
        return Path(os.environ.get("CLIP_CACHE") or Path.home() / ".cache" / "clip")
    except RuntimeError:  # no HOME, and no entry of the user in /etc/passwd
        raise EncoderError(
            "no folder for encoders: neither HOME nor CLIP_CACHE is set; set CLIP_CACHE to a folder"
        ) from None


def read_manifest(folder):
    """encoder.json of a prepared folder as a dict, {} if there is none. Raises EncoderError."""
    path = Path(folder) / "encoder.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise EncoderError(
            f"{path} is damaged: remove that folder and prepare the encoder again"
        ) from None


def prepared(**wanted):
    """Folders of the prepared encoders whose manifest has these values (identity=..., source=...).

    Encoders made for other preprocessing are skipped, and int8 ones, which earlier versions made.
    """
    wanted["preprocessing"] = PREPROCESSING
    for folder in sorted((cache_dir() / "encoders").glob("*")):
        manifest = read_manifest(folder)
        if wanted.items() <= manifest.items() and manifest.get("precision") != "int8":
            yield folder


def find_encoder(**wanted):
    """The first folder of `prepared`, or None."""
    return next(prepared(**wanted), None)


def transform_of(manifest):
    """encoder.json -> `Transform` of its images. Older files are CLIP's and do not state it."""
    from detector.images.preprocessing import Transform, clip_transform

    stated = manifest.get("transform")
    return Transform(**stated) if stated else clip_transform(manifest["resolution"])


def clip_model_of(encoder):
    """`encoder` entry of features or a model -> value of --clip_model: its name without layers."""
    return encoder["name"].removesuffix(f" {encoder['layers']}")


def processors(cgroup="/sys/fs/cgroup"):
    """Number of processors this process may use: its affinity, and a container's CPU limit.

    OpenVINO ignores the CPU limit.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path(cgroup, "cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup of version 2, so no limit
        return count


def golden_image():
    """A synthetic picture, the same on every machine: PNG bytes, 320 x 240.

    prepare_clip.py records its features in encoder.json. A service compares them with its own.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 160, (6, 8, 3)), np.ones((40, 40, 1), int))
    ramp = (np.arange(320)[None, :, None] + np.arange(240)[:, None, None]) // 12
    pixels = blocks + ramp + rng.integers(0, 40, blocks.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def cuda_visible():
    """Is there a CUDA device? Asks the driver, because importing torch takes over a second."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return False
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return not failed and count.value > 0


def is_timm(arch):
    return arch["kind"].startswith(TIMM)


def has_torch(arch):
    """Are the packages that build this architecture on CUDA installed? Does not import them."""
    names = ("torch", "safetensors", "timm" if is_timm(arch) else "clip")
    return all(importlib.util.find_spec(name) for name in names)


class Encoder:
    """A prepared vision tower: CLIP's input -> features.

    encoder = Encoder(folder)  # a folder that prepare_clip.py wrote
    encoder.encode(pixels)     # float32 [n, 3, r, r] -> float32 [n, d]

    `identity` is that of the weights, layers and preprocessing. `transform` prepares an image for
    `preprocess`. `precision` ('float32', 'bfloat16', on CUDA 'float16') does not change the
    identity. Several threads may call `encode`. On a CPU a pass uses all `threads` of one socket,
    and other passes wait. `compile`: on CUDA, spend some seconds at the first pass to speed up
    later ones. Raises EncoderError.
    """

    def __init__(self, folder, device="auto", precision="auto", threads=0, compile=False):
        self.manifest = read_manifest(folder)
        if not self.manifest:
            raise EncoderError(
                f"{folder} contains no prepared encoder: prepare one with prepare_clip.py"
            )
        self.name, self.identity = self.manifest["name"], self.manifest["identity"]
        self.resolution, self.dim = self.manifest["resolution"], self.manifest["dim"]
        self.transform = transform_of(self.manifest)
        if precision == "auto":  # a manifest may fix the precision, as that of the tests does
            precision = self.manifest.get("precision", "auto")
        weights = Path(folder) / "vision.safetensors"
        if device == "auto":  # the quickest check first
            on_cuda = weights.is_file() and has_torch(self.manifest["arch"]) and cuda_visible()
            device = "cuda" if on_cuda else "cpu"
        elif device == "cuda":
            check_cuda(weights, self.manifest)
        self.device, self.single = device, False
        if device == "cuda":
            self._forward, self.precision = torch_forward(
                weights, self.manifest, "cuda", precision, compile
            )
        else:
            self._forward, self.precision, self.single = openvino_forward(
                folder, precision, threads
            )

    def encode(self, pixels):
        """float32 [n, 3, r, r] (from `preprocess`) -> float32 [n, d], CLIP's `encode_image`.

        The features are not normalised.
        """
        return self._forward(pixels)


def check_cuda(weights, manifest):
    """Raises EncoderError if the encoder cannot run on CUDA here."""
    name, arch = manifest["name"], manifest["arch"]
    if not cuda_visible():
        raise EncoderError("--device cuda: no CUDA device is visible here; use --device cpu")
    if not weights.is_file():
        raise EncoderError(
            f"--device cuda: '{name}' has no weights for CUDA here, vision.safetensors; "
            "use --device cpu"
        )
    if not has_torch(arch):
        package, file = (
            ("timm", "requirements/timm.txt") if is_timm(arch) else ("clip", "requirements.txt")
        )
        raise EncoderError(
            f"--device cuda: torch and {package} are not installed: pip install -r {file}"
        )


@cache
def openvino_core():
    """OpenVINO's Core, the only one for the life of the process.

    Its CPU plugin gives the thread that makes it a signal stack. The plugin frees the stack with
    its last encoder. With two plugins, freed in the wrong order, a signal's handler ran on memory
    that was in use again.
    """
    import openvino as ov

    return ov.Core()


def has_bfloat16():
    """Does this processor compute in bfloat16, according to OpenVINO?"""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino_forward(folder, precision, threads):
    """Prepared folder -> (forward pass on the CPU, its precision, is its graph of one image?).

    The forward pass takes float32 [n, 3, r, r] and returns float32 [n, d].
    """
    if precision == "bfloat16" and not has_bfloat16():
        raise EncoderError(
            "--precision bfloat16: this processor has no bfloat16; use --precision float32"
        )
    fastest = "bfloat16" if has_bfloat16() else "float32"
    precision = fastest if precision == "auto" else precision
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    path = Path(folder) / "encoder.xml"
    compiled, one_at_a_time = compile_cached(path, config), threading.Lock()
    request, fixed = compiled.create_infer_request(), compiled.input(0).partial_shape.is_static
    infer = (
        passes_of_one_image(request, path, config)
        if fixed
        else lambda pixels: request.infer([pixels])[0].copy()
    )

    def forward(pixels):
        with one_at_a_time:
            return infer(pixels)

    return forward, precision, fixed


def compile_cached(path, config):
    """encoder.xml -> openvino.CompiledModel. Raises EncoderError.

    Without a cache OpenVINO compiles at each start, which takes a second for a ViT-L/14.
    """
    with suppress(OSError):
        (cache_dir() / "compiled").mkdir(parents=True, exist_ok=True)
        # OPTIMIZE_SIZE: the weights stay in encoder.bin
        cache = {"CACHE_DIR": str(cache_dir() / "compiled"), "CACHE_MODE": "OPTIMIZE_SIZE"}
        config = config | cache
    try:
        return openvino_core().compile_model(path, "CPU", config)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise EncoderError(
            f"the encoder in {path.parent} cannot be read ({reason}): remove that folder and"
            " prepare it again"
        ) from None


def passes_of_one_image(request, path, config):
    """Function: float32 [n, 3, r, r] -> float32 [n, d], of a graph of one image.

    It runs the graph for each image, or reshaped for each BLOCK. The features are the same, bit
    for bit. The reshaped graph is compiled at the first block.
    """
    import numpy as np

    @cache
    def request_of_block():
        model = openvino_core().read_model(path)
        model.reshape([BLOCK, *model.input(0).shape[1:]])
        return openvino_core().compile_model(model, "CPU", config).create_infer_request()

    def infer(pixels):
        whole = len(pixels) - len(pixels) % BLOCK
        passes = [(request_of_block(), slice(i, i + BLOCK)) for i in range(0, whole, BLOCK)]
        passes += [(request, slice(i, i + 1)) for i in range(whole, len(pixels))]
        return np.concatenate([own.infer([pixels[rows]])[0].copy() for own, rows in passes])

    return infer


def vision_tower(arch, weights):
    """Architecture of a manifest, {name: torch tensor} -> torch module, float32, eval mode."""
    if is_timm(arch):
        import timm

        tower = timm.create_model(arch["model"], pretrained=False)
        tower.reset_classifier(0)
    else:
        import clip.model

        arguments = dict(arch)
        tower = getattr(clip.model, arguments.pop("kind"))(**arguments)
    tower.load_state_dict(weights)
    return tower.eval()


def torch_forward(weights, manifest, device, precision, compile=False):
    """vision.safetensors -> (forward pass in torch, precision it runs in).

    The forward pass takes float32 [n, 3, r, r] and returns float32 [n, d]. Two threads may call it
    at a time, each in its own stream: one copies its pixels while the other computes.
    `compile` compiles a block once for all blocks. That took 6 s; the whole tower took 17 s and was
    3% faster.
    """
    import torch

    module, dtype = torch_module(weights, manifest, device, precision, compile)
    # CLIP's tower holds float16 weights. timm's towers hold float32, which each pass rounds.
    mixed = is_timm(manifest["arch"]) and dtype == torch.float16
    largest, streams = 0, queue.SimpleQueue()
    for _ in range(2):
        streams.put(torch.cuda.Stream() if device == "cuda" else None)

    @torch.inference_mode()
    def forward(pixels):
        nonlocal largest
        batch, n = torch.from_numpy(pixels).to(dtype), len(pixels)  # float16: half the bytes
        # another batch size would compile again, so pad to the largest size so far
        if compile and n < (largest := max(largest, n)):
            batch = torch.cat([batch, batch.new_zeros(largest - n, *batch.shape[1:])])
        stream = streams.get()
        try:
            with torch.cuda.stream(stream), torch.autocast(device, torch.float16, mixed):
                if device == "cuda":
                    batch = batch.pin_memory().to(device, non_blocking=True)
                features = module(batch.contiguous(memory_format=torch.channels_last))
                return features[:n].float().cpu().numpy()
        finally:
            streams.put(stream)

    return forward, str(dtype).removeprefix("torch.")


def torch_module(weights, manifest, device, precision, compile):
    """-> (the tower with its layers on the device, its dtype)."""
    import torch
    from safetensors.torch import load_file

    from detector.encoders.layers import with_layers

    if precision == "bfloat16":
        raise EncoderError(
            "--precision bfloat16 is for CPUs; on CUDA use auto (float16) or float32"
        )
    dtype = torch.float32 if precision == "float32" else torch.float16
    tower = vision_tower(manifest["arch"], load_file(weights))
    if dtype == torch.float16 and not is_timm(manifest["arch"]):
        from clip.model import convert_weights

        convert_weights(tower)  # like clip.load on CUDA; CLIP's norms need float32
    # cuDNN's float16 convolutions expect channels_last
    tower = tower.to(device, memory_format=torch.channels_last)
    if compile:
        parts = getattr(getattr(tower, "transformer", None), "resblocks", None)
        for part in parts or getattr(tower, "blocks", [tower]):
            part.compile()
    return with_layers(tower, manifest["layers"]), dtype
