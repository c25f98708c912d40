"""One verdict as a whole process, against the loop of OpenAI's README, and the service's start.

    python -m benchmarks.starting --image photo.jpg         # ViT-B/16-8bit
    python -m benchmarks.random_clip --output vit-l-14.pt
    python -m benchmarks.starting --clip_model vit-l-14.pt --image photo.jpg

Naive: `clip.load`, one image, and a calibrated scikit-learn SVC from joblib. Both classifiers were
trained on the same made-up features. Their verdicts are worth nothing; their times are measured.
At a first start the cache holds the encoder and not yet its compiled form. The page cache is warm.
The service is ready when /readyz responds with 200. Prints Markdown.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.checkpoint import checkpoint_of
from benchmarks.measure import heading, in_turns, machine, ratios, row, run, spread
from benchmarks.service import Server
from benchmarks.training import made_up, write_features
from detector.encoders import runtime
from detector.encoders.catalogue import EIGHT_BIT
from detector.encoders.prepare import ensure_encoder

ROOT = Path(__file__).resolve().parent.parent
NAIVE = """
import sys, warnings
warnings.simplefilter("ignore")
import clip, joblib, torch
from PIL import Image
encoder, preprocess = clip.load(sys.argv[1], device="cpu")
with torch.no_grad():
    features = encoder.encode_image(preprocess(Image.open(sys.argv[2])).unsqueeze(0)).numpy()
print(joblib.load(sys.argv[3]).predict_proba(features))
"""
BARE = """
import sys
import numpy as np, openvino as ov
model = ov.Core().compile_model(sys.argv[1], "CPU", {"PERFORMANCE_HINT": "LATENCY"})
pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
model.create_infer_request().infer([pixels])
"""


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--clip_model", default=EIGHT_BIT, metavar="NAME|FILE", help="encoder to measure"
    )
    parser.add_argument("--image", required=True, metavar="IMG", help="photograph to classify")
    parser.add_argument(
        "--rows", type=int, default=4000, help="rows that both classifiers are trained on"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each command, in turns")
    return parser.parse_args(argv)


def train_both(folder, encoder, rows):
    """Train ours and scikit-learn's classifier on the same made-up features -> their files."""
    import joblib
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    features, labels = made_up(rows + 400, d=encoder["dim"])
    named = {name: encoder[name] for name in ("name", "identity", "dim", "layers")}
    write_features(folder / "features.npz", features, labels, rows, named)
    subprocess.run(
        [sys.executable, ROOT / "train_model.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    svc = SVC(C=10, gamma="scale", cache_size=1000)
    naive = make_pipeline(StandardScaler(), CalibratedClassifierCV(svc, ensemble=False))
    joblib.dump(naive.fit(features[:rows], labels[:rows]), folder / "naive.joblib")
    return folder / "model.joblib", folder / "naive.joblib"


def first_start(command, cache, place):
    """`command` in a cache with the prepared encoders and nothing compiled."""
    place.mkdir()
    (place / "encoders").symlink_to(cache / "encoders")
    empty = ["sh", "-c", 'rm -rf "$CLIP_CACHE/compiled"; exec "$@"', "sh"]
    return ["env", f"CLIP_CACHE={place}", *empty, *command]


def until_ready(folder, model_path):
    """Start the service -> (seconds until it is ready, resident MB)."""
    started = time.perf_counter()
    server = Server([sys.executable, "app.py"], folder, None, MODEL_PATH=str(model_path))
    try:
        return time.perf_counter() - started, server.memory()
    finally:
        server.stop()


def main(argv=None):
    args = parse_args(argv)
    image, python = os.path.abspath(args.image), sys.executable
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        encoder = ensure_encoder(args.clip_model).absolute()
        checkpoint = checkpoint_of(args.clip_model, folder)
        ours, naive = train_both(place, runtime.read_manifest(encoder), args.rows)
        classify = [python, ROOT / "classify.py", "--image_path", image, "--model_path", ours]
        commands = {
            "`classify.py`": classify,
            "`classify.py`, first start": first_start(
                classify, encoder.parent.parent, place / "cache"
            ),
            "naive": [python, "-c", NAIVE, checkpoint, image, naive],
            "the encoder alone, no cache": [python, "-c", BARE, encoder / "encoder.xml"],
        }
        measures = {name: partial(run, command) for name, command in commands.items()}
        measures["`app.py`, until ready"] = partial(until_ready, folder, ours)
        measured = in_turns(measures, args.runs)
    print(f"`{args.clip_model}`, {machine()}.\n")
    whole, ratio = "one image, whole process", "naive's seconds to its own, pair by pair"
    heading(whole, "seconds", ratio, "peak MB")
    seconds = {name: [taken for taken, _ in runs] for name, runs in measured.items()}
    for name, own in seconds.items():
        peak = max(megabytes for _, megabytes in measured[name])
        row(name, spread(own), ratios(seconds["naive"], own), f"{peak:.0f}")


if __name__ == "__main__":
    main()
