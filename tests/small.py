"""A fast encoder for tests: a small ViT with fixed random weights, prepared once per process.

`CHECKPOINT` is its file, `ENCODER` its prepared folder. The cache of every test contains it.
made_up.BASELINE is a model for it.
"""

import atexit
import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import archives
import numpy as np
import pytest

from detector.encoders.weights import vit_shapes

ARCH = {
    "kind": "VisionTransformer",
    "input_resolution": 64,
    "patch_size": 16,
    "width": 128,
    "layers": 2,
    "heads": 2,
    "output_dim": 32,
}
FOLDER = Path(tempfile.mkdtemp(prefix="small-encoder-"))
CHECKPOINT = FOLDER / "small.pt"
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def random_weights(arch=ARCH, seed=0):
    """{name: float16 array}, large enough to give different images different features."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in vit_shapes(arch).items():
        inputs = shape[-1] if len(shape) == 2 else np.prod(shape[1:], initial=1)
        scale = 2.5 * inputs**-0.5 if len(shape) > 1 else 0.1
        mean = ".ln_" in f".{name}" and name.endswith("weight")
        weights[name] = (rng.normal(0, scale, shape) + mean).astype(np.float16)
    return weights


def prepare(cache):
    """Prepare the encoder as prepare_clip.py does -> its folder.

    It runs in float32 on the CPU of any machine. So its tests never depend on bfloat16 or a GPU.
    """
    from detector.encoders import prepare

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setenv("CLIP_CACHE", str(cache))
        folder = prepare.ensure_encoder(str(archives.write(CHECKPOINT, random_weights())))
    manifest = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**manifest, "precision": "float32"}))
    (folder / "vision.safetensors").unlink()
    return folder


ENCODER = prepare(FOLDER)


def link_encoder(cache):
    """Link the encoder into another cache."""
    (Path(cache) / "encoders").mkdir(parents=True, exist_ok=True)
    os.symlink(ENCODER, Path(cache) / "encoders" / ENCODER.name)
