"""What 1, 4 and 16 thousand images cost, command by command: audit, extract, train, evaluate.

    python -m benchmarks.amounts --data_dir data
    python -m benchmarks.amounts --data_dir data --thousands 1 --robustness_images 200

A folder of N thousand images holds pictures of --data_dir, spread over its classes and splits.
Where there are too few, random crops of them are added: 80 to 100% of the sides, JPEG quality 90.
Each command runs once, as a whole process. Prints Markdown.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import heading, machine, row, run
from detector.base.console import Help
from detector.encoders.catalogue import EIGHT_BIT
from detector.features.extraction import draw
from detector.images.decoding import decode_image
from detector.images.distort import crop, jpeg_bytes
from detector.images.folders import list_images

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--data_dir", required=True, metavar="DIR", help="labelled images")
    add("--thousands", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="amounts")
    add("--clip_model", default=EIGHT_BIT, metavar="NAME|FILE", help="encoder")
    add("--robustness_images", type=int, default=500, metavar="N", help="of evaluate.py")
    return parser.parse_args(argv)


def write_images(data_dir, count, folder):
    """`count` images in the layout of `data_dir`. The first copies are the files themselves."""
    entries, rng = list_images(data_dir), np.random.default_rng(0)
    entries = draw(entries, min(count, len(entries)))
    for number in range(count):
        entry = entries[number % len(entries)]
        data = Path(data_dir, entry.path).read_bytes()
        if number >= len(entries):
            share, x, y = rng.uniform(0.8, 1), rng.random(), rng.random()
            data = jpeg_bytes(crop(decode_image(data), share, x, y), 90)
        path = Path(folder, entry.path)
        path = path.with_name(f"{number // len(entries)}-{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def commands(args, folder, place):
    """-> {name of a step: its command}, in order."""
    features, model = place / "features.npz", place / "model.joblib"
    encoder = ["--clip_model", args.clip_model]
    report = ["--robustness_images", args.robustness_images, "--report_dir", place / "report"]
    train = ["--features_file", features, "--model_output_path", model]
    return {
        "`audit.py`": ["audit.py", "--data_dir", folder],
        "`extract_features.py`": [
            *["extract_features.py", "--data_dir", folder, "--output_file", features, *encoder]
        ],
        "`train_model.py`": ["train_model.py", *train],
        f"`evaluate.py --robustness_images {args.robustness_images}`": [
            *["evaluate.py", "--model_path", model, "--features_file", features],
            *["--data_dir", folder, *report],
        ],
    }


def main(argv=None):
    args = parse_args(argv)
    print(f"`{args.clip_model}`, {machine()}. Each command ran once.\n")
    heading("images", "command", "minutes", "images a second", "peak MB")
    for thousands in args.thousands:
        with tempfile.TemporaryDirectory() as place:
            folder, count = Path(place, "data"), 1000 * thousands
            write_images(args.data_dir, count, folder)
            for name, command in commands(args, folder, Path(place)).items():
                # an audit that finds a leak ends with 1
                seconds, peak = run([sys.executable, ROOT / command[0], *command[1:]], (0, 1))
                rate = f"{count / seconds:.0f}" if "evaluate" not in name else ""
                row(f"{count:,}", name, f"{seconds / 60:.1f}", rate, f"{peak:.0f}")


if __name__ == "__main__":
    main()
