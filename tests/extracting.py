"""For the tests of extract_features.py: folders of images, the command in this process, what it wrote."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import small
from commands import ROOT
from patience import PATIENCE

import extract_features
from detector.encoders import runtime
from detector.features.columns import COLUMNS
from detector.features.file import load_features

FEW = {"train/real/camera": 8, "train/fake/gan": 8, "test/real/camera": 4, "test/fake/gan": 4}
# No git repository at that place, so that meta holds CODE_COMMIT: an edit of the code during a test changes no bytes.
SETTINGS = {"CLIP_MODEL": str(small.CHECKPOINT), "GIT_DIR": "/nowhere", "CODE_COMMIT": "c0de"}


def extract(data_dir, output, *flags):
    """The command, in this process; -> the columns it wrote."""
    extract_features.main(
        ["--data_dir", str(data_dir), "--output_file", str(output), *map(str, flags)]
    )
    return load_features(output)


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names(folder):
    """What lies in a folder, hidden files and all."""
    return sorted(p.name for p in Path(folder).iterdir())


def another_encoder(**changes):
    """The small encoder of this test's cache gets another identity, and these changes."""
    folder = runtime.cache_dir() / "encoders" / small.ENCODER.name
    folder.unlink()  # a link
    shutil.copytree(small.ENCODER, folder)
    manifest = runtime.read_manifest(folder)
    (folder / "encoder.json").write_text(json.dumps({**manifest, "identity": "f" * 64, **changes}))


def rows(columns, keep=slice(None)):
    """Columns -> {path: the row's values}, to compare rows whatever their place."""
    return {
        columns["paths"][i]: [
            (
                columns[name][i].tobytes()
                if name in ("features", "facts", "thumb")
                else columns[name][i]
            )
            for name in COLUMNS
        ]
        for i in range(len(columns["paths"]))[keep]
    }


# ---- as a process ----


def command(data_dir, output, *flags):
    return [
        sys.executable,
        str(ROOT / "extract_features.py"),
        "--data_dir",
        str(data_dir),
        "--output_file",
        str(output),
        "--batch_size",
        "2",
        *flags,
    ]


def finish(data_dir, output, *flags):
    """The same command once more, left in peace; -> its stderr."""
    done = subprocess.run(
        command(data_dir, output, *flags),
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


# Each plants one fatal blow, at a moment that is too short to be met from outside; N is how often it lets pass.
BLOWS = {
    "before anything is stored": "runtime.Encoder = die",
    "in the middle of a part": (
        "np.savez = lambda file, **columns: count() and half(file) or savez(file, **columns)"
    ),
    "between a part's last byte and its name": (
        "os.replace = lambda a, b: count() and die() or replace(a, b)"
    ),
    "in the middle of the file": "np.savez_compressed = lambda file, **columns: half(file)",
    "before the file gets its name": (
        "os.replace = lambda a, b: Path(b).name == 'f.npz' and die() or replace(a, b)"
    ),
    "when the file has its name": (
        "os.replace = lambda a, b: (replace(a, b), Path(b).name == 'f.npz' and die())"
    ),
    "while the parts are removed": (
        "Path.unlink = lambda path, **k: path.suffix == '.npz' and count() and die() or"
        " unlink(path, **k)"
    ),
    "when all parts are removed": (
        "shutil.rmtree = lambda parts: (os.unlink(parts / 'key.json'), die())"
    ),
}


def strike(blow, data_dir, output, *flags, after, ends_with=-signal.SIGKILL):
    """Run the command in a process that kills itself at the moment planted, or at the `after`-th such moment."""
    code = f"""
import itertools, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import extract_features
from detector.base.console import run
from detector.encoders import runtime
replace, savez, unlink, calls = os.replace, np.savez, Path.unlink, itertools.count(1)
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
half = lambda file: (file.write(b"half"), file.flush(), die())
count = lambda: next(calls) == {after}
{blow}
run(extract_features.main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *command(data_dir, output, *flags)[2:]],
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == ends_with, done.stderr
