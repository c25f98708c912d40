"""extract_features.py on Ray against itself without: what starting costs, and rows per second once it runs.

    python -m benchmarks.ray_workers --image photo.jpg --images 200     # ViT-B/16-8bit
    python -m benchmarks.ray_workers --image photo.jpg --images 64 --clip_model vit-l-14.pt

benchmarks/random_clip.py writes vit-l-14.pt.

The images are crops of one photograph (--image), each saved apart. One machine plays the cluster: nodes of one processor are
processes on it (ray.cluster_utils.Cluster), so two workers of one processor stand against one of two and against the plain
command, which has both. Each runs on a quarter of the images and on all: the difference is the rate, what remains is the start.
Prints Markdown.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import run

ROOT = Path(__file__).resolve().parent.parent
from detector.encoders.catalogue import EIGHT_BIT
from detector.encoders.prepare import ensure_encoder

NODES = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": int(sys.argv[2]), "object_store_memory": 80_000_000}
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
    parser.add_argument("--clip_model", default=EIGHT_BIT, metavar="NAME|FILE", help="what encodes")
    parser.add_argument("--images", type=int, default=2000, help="how many")
    parser.add_argument("--image", required=True, help="a photograph to cut them from")
    parser.add_argument("--side", type=int, default=500, help="of a crop, in pixels")
    return parser.parse_args(argv)


def cut(folder, image, count, side):
    """That many crops of the photograph, half of them under each label."""
    photo, rng = Image.open(image).convert("RGB"), np.random.default_rng(0)
    scale = max(1, (side + 50) / min(photo.size))
    photo = photo.resize((int(photo.width * scale), int(photo.height * scale)))
    for i in range(count):
        left, top = rng.integers(photo.width - side), rng.integers(photo.height - side)
        path = folder / "train" / ("real", "fake")[i % 2] / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((left, top, left + side, top + side)).save(path, quality=90)


def extract(folder, place, clip_model, *flags):
    """Seconds of the command."""
    output = place / ("f.parquet" if flags else "f.npz")
    command = [
        sys.executable,
        ROOT / "extract_features.py",
        "--data_dir",
        folder,
        "--output_file",
        output,
        "--clip_model",
        clip_model,
        *flags,
    ]
    seconds, _ = run("extract_features.py", command)
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    return seconds


def main():
    args, place = parse_args(None), Path(tempfile.mkdtemp())
    ensure_encoder(args.clip_model)  # not in the first row's time
    cut(place / "few", args.image, args.images // 4, args.side)
    cut(place / "many", args.image, args.images, args.side)
    print(
        f"| {args.images} images, `{args.clip_model}` | seconds | of these starting | rows/s then"
        " |\n|---|---|---|---|",
        flush=True,
    )

    def row(name, *flags):
        few, many = (
            extract(place / folder, place, args.clip_model, *flags) for folder in ("few", "many")
        )
        rate = (args.images - args.images // 4) / (many - few)
        print(f"| {name} | {many:.1f} | {many - args.images / rate:.1f} | {rate:.2f} |", flush=True)

    row("without Ray, two processors")
    row("`--ray local`: one worker of two processors", "--ray", "local")
    for nodes, words in (
        (1, "a node of one processor: one worker"),
        (2, "two nodes of one processor: two workers"),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", NODES, str(nodes), "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        address = next(line.split()[1] for line in process.stdout if line.startswith("at "))
        row(words, "--ray", address)
        process.stdin.close()
        process.wait()
    row("without Ray, again")
    shutil.rmtree(place)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
