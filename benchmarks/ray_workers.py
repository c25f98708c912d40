"""extract_features.py with and without Ray: seconds to start, and rows a second after that.

    python -m benchmarks.ray_workers --image photo.jpg --images 200     # ViT-B/16-8bit
    python -m benchmarks.ray_workers --image photo.jpg --images 64 --clip_model vit-l-14.pt

benchmarks/random_clip.py writes vit-l-14.pt.

The images are crops of one photograph (--image). One machine plays the cluster: nodes of one
processor are processes on it (ray.cluster_utils.Cluster). The plain command has both processors.
Each way runs on a quarter of the images and on all. The difference gives the rate, and the rest is
the start. Prints Markdown.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import heading, row, run
from detector.encoders.catalogue import EIGHT_BIT
from detector.encoders.prepare import ensure_encoder

ROOT = Path(__file__).resolve().parent.parent
NODES = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
for _ in range(int(sys.argv[1]) - 1):
    cluster.add_node(**node)
cluster.wait_for_nodes()
print("at", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--clip_model", default=EIGHT_BIT, metavar="NAME|FILE", help="encoder to use"
    )
    parser.add_argument("--images", type=int, default=2000, help="number of images")
    parser.add_argument("--image", required=True, help="photograph to crop them from")
    parser.add_argument("--side", type=int, default=500, help="side of a crop, in pixels")
    return parser.parse_args(argv)


def cut(folder, image, count, side):
    """Save `count` crops of the photograph, half of them under each label."""
    photo, rng = Image.open(image).convert("RGB"), np.random.default_rng(0)
    scale = max(1, (side + 50) / min(photo.size))
    photo = photo.resize((int(photo.width * scale), int(photo.height * scale)))
    for i in range(count):
        left, top = rng.integers(photo.width - side), rng.integers(photo.height - side)
        path = folder / "train" / ("real", "fake")[i % 2] / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((left, top, left + side, top + side)).save(path, quality=90)


def extract(folder, place, clip_model, flags):
    """Seconds of the command."""
    output = place / ("f.parquet" if flags else "f.npz")
    files = ["--data_dir", folder, "--output_file", output, "--clip_model", clip_model]
    seconds, _ = run([sys.executable, ROOT / "extract_features.py", *files, *flags])
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    return seconds


def compare(args, place, name, *flags):
    few, many = (extract(place / size, place, args.clip_model, flags) for size in ("few", "many"))
    rate = (args.images - args.images // 4) / (many - few)
    row(name, f"{many:.1f}", f"{many - args.images / rate:.1f}", f"{rate:.2f}")


@contextmanager
def cluster(nodes):
    """Address of a cluster of `nodes` nodes with one processor each."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", NODES, str(nodes)],
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield next(line.split()[1] for line in process.stdout if line.startswith("at "))
    process.stdin.close()
    process.wait()


def main(argv=None):
    args = parse_args(argv)
    ensure_encoder(args.clip_model)  # not part of the first row's time
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cut(place / "few", args.image, args.images // 4, args.side)
        cut(place / "many", args.image, args.images, args.side)
        title = f"{args.images} images, `{args.clip_model}`"
        heading(title, "seconds", "of these starting", "rows/s then")
        compare(args, place, "without Ray, two processors")
        compare(args, place, "`--ray local`: one worker of two processors", "--ray", "local")
        for nodes, words in (
            (1, "a node of one processor: one worker"),
            (2, "two nodes of one processor: two workers"),
        ):
            with cluster(nodes) as address:
                compare(args, place, words, "--ray", address)
        compare(args, place, "without Ray, again")


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
