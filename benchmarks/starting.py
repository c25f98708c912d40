"""One verdict, the whole process: classify.py against what a competent user writes from OpenAI's README.

    python -m benchmarks.random_clip --output vit-l-14.pt
    python -m benchmarks.starting --clip_model vit-l-14.pt --image photo.jpg

Naive: `clip.load`, one image, and a calibrated scikit-learn SVC from joblib. Both were trained on the same made-up features:
what they say is worth nothing, how long they take is. The page cache is warm. Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
from benchmarks.measure import in_turns, ratios, spread
from benchmarks.training import made_up, write_features
from detector.encoders import runtime

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
model.create_infer_request().infer([np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)])
"""


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--clip_model",
        required=True,
        metavar="FILE",
        help="checkpoint, as random_clip.py writes one",
    )
    parser.add_argument("--image", required=True, metavar="IMG", help="photograph to classify")
    parser.add_argument(
        "--rows", type=int, default=4000, help="that both classifiers are trained on"
    )
    parser.add_argument("--runs", type=int, default=5, help="of each command, in turns")
    return parser.parse_args(argv)


def train_both(folder, encoder, rows):
    """Our model file and a pickled scikit-learn classifier, of the same made-up features -> their paths."""
    import joblib
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    features, labels = made_up(rows + 400, d=encoder["dim"])
    write_features(folder / "features.npz", features, labels, rows)
    with np.load(folder / "features.npz") as file:
        columns = dict(file)
    named = {name: encoder[name] for name in ("name", "identity", "dim", "layers")}
    np.savez(
        folder / "features.npz", **columns | {"meta": np.array(json.dumps({"encoder": named}))}
    )
    subprocess.run(
        [sys.executable, ROOT / "train_model.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    theirs = make_pipeline(
        StandardScaler(),
        CalibratedClassifierCV(SVC(C=10, gamma="scale", cache_size=1000), ensemble=False),
    )
    joblib.dump(theirs.fit(features[:rows], labels[:rows]), folder / "naive.joblib")
    return folder / "model.joblib", folder / "naive.joblib"


def main(argv=None):
    args = parse_args(argv)
    image, checkpoint = os.path.abspath(args.image), os.path.abspath(args.clip_model)
    # as a process: a child's peak memory counts from what its parent held when it was born
    prepared = subprocess.run(
        [sys.executable, ROOT / "prepare_clip.py", "--clip_model", checkpoint],
        check=True,
        stdout=subprocess.PIPE,
    )
    encoder = Path(prepared.stdout.decode().strip())
    with tempfile.TemporaryDirectory() as folder:
        ours, naive = train_both(Path(folder), runtime.read_manifest(encoder), args.rows)
        found = in_turns(
            {
                "`classify.py`": [
                    sys.executable,
                    ROOT / "classify.py",
                    "--image_path",
                    image,
                    "--model_path",
                    ours,
                ],
                "naive": [sys.executable, "-c", NAIVE, checkpoint, image, naive],
                "the encoder alone, no cache": [
                    sys.executable,
                    "-c",
                    BARE,
                    encoder / "encoder.xml",
                ],
            },
            args.runs,
        )
    print(
        "\n| one image, whole process | seconds | naive's seconds to its own, pair by pair | peak"
        " MB |\n|---|---|---|---|"
    )
    for name, pairs in found.items():
        seconds = [s for s, _ in pairs]
        print(
            f"| {name} | {spread(seconds)} | {ratios([s for s, _ in found['naive']], seconds)} |"
            f" {max(mb for _, mb in pairs):.0f} |"
        )


if __name__ == "__main__":
    main()
