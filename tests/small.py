"""A fast encoder for tests: a small ViT with fixed random weights, prepared once a process.

`CHECKPOINT` is its file, `ENCODER` its prepared folder; the cache of every test holds it.
made_up.BASELINE is a model on it.
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

ARCH = dict(
    kind="VisionTransformer",
    input_resolution=64,
    patch_size=16,
    width=128,
    layers=2,
    heads=2,
    output_dim=32,
)
FOLDER = Path(tempfile.mkdtemp(prefix="small-encoder-"))
CHECKPOINT = FOLDER / "small.pt"
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def random_weights(arch=ARCH, seed=0):
    """{name: float16 array}, so large that different images get different features."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in vit_shapes(arch).items():
        scale = (
            2.5 * (shape[-1] if len(shape) == 2 else np.prod(shape[1:], initial=1)) ** -0.5
            if len(shape) > 1
            else 0.1
        )
        weights[name] = (
            rng.normal(0, scale, shape) + (".ln_" in f".{name}" and name.endswith("weight"))
        ).astype(np.float16)
    return weights


def prepare(cache):
    """The encoder as prepare_clip.py stores it -> its folder.

    It runs in float32 on the CPU, whatever machine runs the tests: no test on it depends on
    bfloat16 or a GPU.
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
    """Put the encoder into another cache."""
    (Path(cache) / "encoders").mkdir(parents=True, exist_ok=True)
    os.symlink(ENCODER, Path(cache) / "encoders" / ENCODER.name)
