"""Decoding: pictures a second from JPEG bytes to the encoder's input, against plain Pillow, and what JPEG's draft mode would change.

    python -m benchmarks.decoding --data_dir data
    python -m benchmarks.decoding --data_dir data --megapixels 50 --pictures 4

Large pictures are mosaics of those in the folder: detail at every scale, which a picture made larger would not have. Plain
Pillow is what CLIP's README leads to: `Image.open`, CLIP's own transform, one at a time; and the same in threads. Draft mode
lets libjpeg decode at 1/2, 1/4 or 1/8; how far the features of --clip_model
move is measured too. In turns; prints Markdown.
"""

import argparse
import io
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import ratios, spread
from detector.encoders import runtime
from detector.encoders.catalogue import EIGHT_BIT
from detector.encoders.closeness import cosines
from detector.encoders.prepare import ensure_encoder
from detector.images.decoding import decode_image, load_rgb, open_image
from detector.images.facts import describe_image
from detector.images.folders import draw_evenly, list_images
from detector.images.preprocessing import preprocess

SIDE = 224
TILE = 240  # pixels of each picture of a mosaic
MARGIN = 2  # draft mode keeps at least this many times SIDE, so that the bicubic resize still has something to average


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data_dir",
        required=True,
        metavar="DIR",
        help="labelled pictures that the mosaics are made of",
    )
    parser.add_argument(
        "--megapixels", type=float, nargs="+", default=[2, 12, 24], help="of the mosaics"
    )
    parser.add_argument("--pictures", type=int, default=12, help="of each size")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turns")
    parser.add_argument(
        "--clip_model",
        default=EIGHT_BIT,
        metavar="NAME|FILE",
        help="encoder that sees the difference of draft mode",
    )
    return parser.parse_args(argv)


def mosaics(data_dir, megapixels, n):
    """-> list of `n` JPEG files (bytes), 3:2, quality 90."""
    entries = list_images(data_dir)
    columns = max(1, round((megapixels * 1e6 * 1.5) ** 0.5 / TILE))
    rows = max(1, round(megapixels * 1e6 / TILE**2 / columns))
    chosen, found = (
        draw_evenly([e.label for e in entries], min(len(entries), n * columns * rows)),
        [],
    )
    tiles = [
        Image.open(Path(data_dir, entries[i].path))
        .convert("RGB")
        .resize((TILE, TILE), Image.Resampling.LANCZOS)
        for i in chosen
    ]
    rng = np.random.default_rng(0)
    for _ in range(n):
        sheet, buffer = Image.new("RGB", (columns * TILE, rows * TILE)), io.BytesIO()
        for cell, i in enumerate(rng.integers(0, len(tiles), columns * rows)):
            sheet.paste(tiles[i], (cell % columns * TILE, cell // columns * TILE))
        sheet.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


# ---- bytes -> float32 [3, 224, 224], each in its own way ----


def plain(transform):
    return lambda data: transform(Image.open(io.BytesIO(data))).numpy()


def ours(data, side=SIDE):
    return preprocess(decode_image(data), side)


def ours_described(data):
    """What extract_features.py does: hash, facts and thumbnail too."""
    return preprocess(describe_image(data)[0], SIDE)


def drafted(data, side=SIDE):
    image = open_image(data)
    image.draft("RGB", (MARGIN * side, MARGIN * side))
    return preprocess(load_rgb(image), side)


def in_threads(function):
    def run(files):
        with ThreadPoolExecutor(runtime.processors()) as pool:
            return list(pool.map(function, files))

    return run


def one_by_one(function):
    return lambda files: [function(data) for data in files]


def draft_cosines(encoder, files):
    """Features of draft mode to those of the exact pixels: float32 [n]."""
    a, b = (
        encoder.encode(np.stack([way(data, encoder.resolution) for data in files]))
        for way in (ours, drafted)
    )
    return cosines(a, b)


def main(argv=None):
    args = parse_args(argv)
    import clip

    transform = clip.clip._transform(SIDE)
    encoder = runtime.Encoder(ensure_encoder(args.clip_model), "cpu", "float32")
    ways = {
        "plain Pillow, one by one": one_by_one(plain(transform)),
        "plain Pillow, in threads": in_threads(plain(transform)),
        "ours": in_threads(ours),
        "ours, with hash and facts": in_threads(ours_described),
        "draft mode": in_threads(drafted),
    }
    print(
        f"{os.cpu_count()} processors; images a second.\n\n| megapixels | {' | '.join(ways)} | ours"
        " to Pillow one by one, in threads | draft to ours | draft's cosine, mean and lowest"
        f" |\n|---|{'---|' * len(ways)}---|---|---|"
    )
    for megapixels in args.megapixels:
        files, rates = (
            mosaics(args.data_dir, megapixels, args.pictures),
            {name: [] for name in ways},
        )
        for turn in range(args.runs + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                way(files)
                if turn:
                    rates[name].append(len(files) / (time.perf_counter() - started))
        cosine = draft_cosines(encoder, files)
        width, height = Image.open(io.BytesIO(files[0])).size
        print(
            f"| {megapixels:g} ({width} x {height}, {statistics.mean(map(len, files)) / 1e6:.1f}"
            f" MB) | {' | '.join(spread(values, 1) for values in rates.values())} |"
            f" {ratios(rates['ours'], rates['plain Pillow, one by one'], 2)},"
            f" {ratios(rates['ours'], rates['plain Pillow, in threads'], 2)} |"
            f" {ratios(rates['draft mode'], rates['ours'], 2)} | {cosine.mean():.4f},"
            f" {cosine.min():.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
