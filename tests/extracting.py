"""Helpers for tests of extract_features.py: folders, the command in this process and as another."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import small
from commands import ROOT
from made_up import ENCODER
from patience import PATIENCE

import extract_features
from detector.encoders import runtime
from detector.features import storage
from detector.features.columns import COLUMNS
from detector.features.file import load_features

FEW = {"train/real/camera": 8, "train/fake/gan": 8, "test/real/camera": 4, "test/fake/gan": 4}
MANY = {"train/real/camera": 60, "train/fake/gan": 60, "test/real/camera": 20, "test/fake/gan": 20}
# no git repository there, so meta holds CODE_COMMIT and an edit during a test changes no bytes
SETTINGS = {"CLIP_MODEL": str(small.CHECKPOINT), "GIT_DIR": "/nowhere", "CODE_COMMIT": "c0de"}


def extract(data_dir, output, *flags):
    """Run the command in this process -> the columns it wrote."""
    extract_features.main(
        ["--data_dir", str(data_dir), "--output_file", str(output), *map(str, flags)]
    )
    return load_features(output)


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names(folder):
    """Names in a folder, with hidden files."""
    return sorted(p.name for p in Path(folder).iterdir())


def another_encoder(**changes):
    """Give the small encoder of this test's cache another identity, and these changes."""
    folder = runtime.cache_dir() / "encoders" / small.ENCODER.name
    folder.unlink()  # a link
    shutil.copytree(small.ENCODER, folder)
    manifest = runtime.read_manifest(folder)
    (folder / "encoder.json").write_text(json.dumps({**manifest, "identity": "f" * 64, **changes}))


def rows(columns, keep=slice(None)):
    """Columns -> {(path, view): the row's values}, to compare rows in any order."""
    return {
        (columns["paths"][i], columns["view"][i]): [columns[name][i].tobytes() for name in COLUMNS]
        for i in range(len(columns["paths"]))[keep]
    }


def write_dataset(folder, columns, parts=3, encoder=ENCODER):
    """Columns -> a finished Parquet data set of this many parts."""
    cuts = np.linspace(0, len(columns["labels"]), parts + 1).astype(int)
    files = [f"part-{i:06d}-{i:016x}.parquet" for i in range(parts)]
    for name, start, end in zip(files, cuts[:-1], cuts[1:], strict=True):
        part = {column: columns[column][start:end] for column in COLUMNS}
        storage.write_part(folder, name, part, {"start": int(start)})
    meta = json.dumps({"encoder": encoder, "parts": files})
    storage.write_bytes(folder, "_meta.json", meta.encode())
    return folder


# ---- as a process ----


def command(data_dir, output, *flags):
    places = ["--data_dir", str(data_dir), "--output_file", str(output)]
    return [sys.executable, str(ROOT / "extract_features.py"), *places, "--batch_size", "2", *flags]


def start(data_dir, output, *flags):
    return subprocess.Popen(
        command(data_dir, output, *flags),
        env={**os.environ, **SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(data_dir, output, *flags, code=0, **env):
    """Run the command to its end -> CompletedProcess."""
    done = subprocess.run(
        command(data_dir, output, *flags),
        env={**os.environ, **SETTINGS, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stderr
    return done


# Each kills the process at a moment too short to hit from outside.
# count() is true at the `after`th call.
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
        "Path.unlink = lambda path, **k: "
        "path.suffix == '.npz' and count() and die() or unlink(path, **k)"
    ),
    "when all parts are removed": (
        "shutil.rmtree = lambda parts: (os.unlink(parts / 'key.json'), die())"
    ),
}
LATE_BLOWS = [blow for blow in BLOWS if blow != "before anything is stored"]


def strike(blow, data_dir, output, *flags, after, ends_with=-signal.SIGKILL):
    """Run the command in a process that executes `blow`, code that kills it, first."""
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
