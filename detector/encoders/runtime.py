"""CLIP's input -> features: prepared encoders, where they are found, and how they are run.

encoder = Encoder(find_encoder(source="ViT-L/14"))   # a folder that prepare_clip.py wrote
features = encoder.encode(pixels)                    # float32 [n, 3, r, r] -> float32 [n, d]
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

PREPROCESSING = (  # changes whenever the same bytes would become other pixels; part of an encoder's identity
    "clip-1"
)

# Intel's usage statistics: with this entry OpenVINO takes its silent stand-in. A detector phones nobody.
sys.modules.setdefault("openvino_telemetry", None)


def cache_dir():
    """Where CLIP's weights and prepared encoders live: CLIP_CACHE, or ~/.cache/clip as OpenAI's package has it."""
    try:
        return Path(os.environ.get("CLIP_CACHE") or Path.home() / ".cache" / "clip")
    except RuntimeError:  # no HOME, and a user id without an entry
        raise EncoderError(
            "no folder for encoders: neither HOME nor CLIP_CACHE is set; set CLIP_CACHE to a folder"
        ) from None


def read_manifest(folder):
    """encoder.json of a prepared folder, as a dict; {} where there is none."""
    path = Path(folder) / "encoder.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise EncoderError(
            f"{path} is damaged: remove that folder and prepare the encoder again"
        ) from None


def prepared(**wanted):
    """Folders of the prepared encoders whose manifest has these values (identity=..., source=...).

    Those made for other preprocessing are passed over.
    """
    wanted["preprocessing"] = PREPROCESSING
    for folder in sorted((cache_dir() / "encoders").glob("*")):
        if (
            wanted.items()
            <= {k: v for k, v in read_manifest(folder).items() if k in wanted}.items()
        ):
            yield folder


def find_encoder(**wanted):
    """The first of them, or None."""
    return next(prepared(**wanted), None)


def clip_model_of(encoder):
    """What --clip_model was for the `encoder` entry of features or a model: its name says the layers, too."""
    return encoder["name"].removesuffix(f" {encoder['layers']}")


def processors(cgroup="/sys/fs/cgroup"):
    """How many processors this process may use: affinity, and a container's CPU limit, which OpenVINO does not look at."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path(cgroup, "cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup (version 2), so no limit
        return count


def golden_image():
    """A made-up picture, the same on every machine: PNG bytes, 320 x 240. Its features are recorded in encoder.json when
    an encoder is prepared, so that a service can tell whether this machine computes what it should.
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
    """Is there a CUDA device? Asked of the driver, because importing torch to ask takes over a second."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        return (
            driver.cuInit(0) == 0
            and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
            and count.value > 0
        )
    except OSError:
        return False


def has_torch():
    """Is what the CUDA path imports installed? Found without importing it."""
    return all(importlib.util.find_spec(name) for name in ("torch", "clip", "safetensors"))


class Encoder:
    """A prepared vision tower: CLIP's input -> features.

    encoder = Encoder(folder)           # a folder that prepare_clip.py wrote
    encoder.encode(pixels)              # float32 [n, 3, r, r] -> float32 [n, d]

    `identity` names the weights, layers and preprocessing; `precision` is how they are run ('float32', 'bfloat16',
    on CUDA 'float16') and does not change the identity; 'int8' is another encoder, with a folder of its own. `encode` may be
    called by several threads; on a CPU a pass takes all `threads` (of one socket), and the others wait.
    `compile`: on CUDA, some seconds at the first pass for faster ones after it.
    """

    def __init__(self, folder, device="auto", precision="auto", threads=0, compile=False):
        self.manifest = read_manifest(folder)
        if not self.manifest:
            raise EncoderError(
                f"{folder} holds no prepared encoder: prepare one with prepare_clip.py"
            )
        self.name, self.identity = self.manifest["name"], self.manifest["identity"]
        self.resolution, self.dim = self.manifest["resolution"], self.manifest["dim"]
        if precision == "auto":
            precision = self.manifest.get("precision", "auto")
        weights = Path(folder) / "vision.safetensors"
        if device == "cuda" and not cuda_visible():
            raise EncoderError("--device cuda: no CUDA device is visible here; use --device cpu")
        if device == "cuda" and not weights.is_file():
            raise EncoderError(
                f"--device cuda: '{self.name}' has no weights for CUDA here, vision.safetensors;"
                " use --device cpu"
            )
        if device == "cuda" and not has_torch():
            raise EncoderError(
                "--device cuda: torch and clip are not installed: pip install -r requirements.txt"
            )
        if (
            device == "cuda"
            or device == "auto"
            and weights.is_file()
            and has_torch()
            and cuda_visible()
        ):
            self.device = "cuda"
            self._forward, self.precision = torch_forward(
                weights, self.manifest, "cuda", precision, compile
            )
        else:
            self.device = "cpu"
            self._forward, self.precision = openvino_forward(folder, precision, threads)

    def encode(self, pixels):
        """float32 [n, 3, r, r] (from `preprocess`) -> float32 [n, d], CLIP's `encode_image`, not normalised."""
        return self._forward(pixels)


@cache
def openvino_core():
    """OpenVINO's entry, one for as long as the process lives.

    Its CPU plugin gives the thread that makes it a stack for signals and takes it away when the last encoder of that plugin goes.
    With two plugins and the wrong order a signal, a child's end even, was then handled on memory that others use.
    """
    import openvino as ov

    return ov.Core()


def has_bfloat16():
    """Does this processor compute in bfloat16, by OpenVINO's account?"""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino_forward(folder, precision, threads):
    """Prepared folder -> (function float32 [n, 3, r, r] -> float32 [n, d], precision as run) on the CPU."""
    config = {"PERFORMANCE_HINT": "LATENCY"}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    if precision == "bfloat16" and not has_bfloat16():
        raise EncoderError(
            "--precision bfloat16: this processor has no bfloat16; use --precision float32"
        )
    fastest = (
        "bfloat16" if has_bfloat16() else "float32"
    )  # also of those layers of int8 that stay float
    precision = fastest if precision == "auto" else precision
    config["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[
        fastest if precision == "int8" else precision
    ]
    with suppress(
        OSError
    ):  # where nothing can be written OpenVINO compiles each time, which takes a second for a ViT-L/14
        (cache_dir() / "compiled").mkdir(parents=True, exist_ok=True)
        config |= {
            "CACHE_DIR": str(cache_dir() / "compiled"),
            "CACHE_MODE": "OPTIMIZE_SIZE",
        }  # weights stay in encoder.bin
    try:
        compiled = openvino_core().compile_model(Path(folder) / "encoder.xml", "CPU", config)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise EncoderError(
            f"the encoder in {folder} cannot be read ({reason}): remove that folder and prepare it"
            " again"
        ) from None
    request, one_at_a_time = compiled.create_infer_request(), threading.Lock()

    def forward(pixels):
        with one_at_a_time:
            return request.infer([pixels])[0].copy()

    return forward, precision


def vision_tower(arch, weights):
    """`architecture`'s answer and {name: torch tensor} -> the torch module, float32, eval mode."""
    import clip.model

    arguments = dict(arch)
    tower = getattr(clip.model, arguments.pop("kind"))(**arguments)
    tower.load_state_dict(weights)
    return tower.eval()


def torch_forward(weights, manifest, device, precision, compile=False):
    """vision.safetensors -> (function float32 [n, 3, r, r] -> float32 [n, d], precision as run) in torch.

    Two threads may call it at a time, each in a stream of its own: while one computes, the other copies its pixels over.
    `compile`: the blocks, once for all of them (6 s; the whole tower took 17 and was 3% faster); batches are then padded to
    the largest so far, because another size is compiled anew.
    """
    import torch
    from clip.model import convert_weights
    from safetensors.torch import load_file

    from detector.encoders.layers import with_layers

    if precision == "bfloat16":
        raise EncoderError(
            "--precision bfloat16 is for processors; on CUDA use auto (float16) or float32"
        )
    dtype = torch.float32 if precision == "float32" else torch.float16
    tower = vision_tower(manifest["arch"], load_file(weights))
    if dtype == torch.float16:
        convert_weights(
            tower
        )  # as clip.load on CUDA: the norms stay float32, their code wants it so
    tower = tower.to(
        device, memory_format=torch.channels_last
    )  # of the convolutions, as cuDNN wants them for float16
    if compile:
        for part in tower.transformer.resblocks if hasattr(tower, "transformer") else [tower]:
            part.compile()
    module = with_layers(tower, manifest["layers"])
    largest, free = 0, queue.SimpleQueue()
    for _ in range(2):
        free.put(torch.cuda.Stream() if device == "cuda" else None)

    @torch.inference_mode()
    def forward(pixels):
        nonlocal largest
        batch, n = torch.from_numpy(pixels).to(dtype), len(pixels)  # half the bytes to copy
        if compile and n < (largest := max(largest, n)):
            batch = torch.cat([batch, batch.new_zeros(largest - n, *batch.shape[1:])])
        stream = free.get()
        try:
            with torch.cuda.stream(stream):  # of None: does nothing
                if device == "cuda":
                    batch = batch.pin_memory().to(device, non_blocking=True)
                return (
                    module(batch.contiguous(memory_format=torch.channels_last))[:n]
                    .float()
                    .cpu()
                    .numpy()
                )
        finally:
            free.put(stream)

    return forward, str(dtype).removeprefix("torch.")
