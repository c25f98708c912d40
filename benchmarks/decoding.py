"""Decoding: pictures a second from JPEG bytes to the encoder's input, against plain Pillow.

    python -m benchmarks.decoding --data_dir data
    python -m benchmarks.decoding --data_dir data --megapixels 50 --pictures 4

Large pictures are mosaics of those in the folder. A mosaic has detail at every scale, which an
enlarged picture lacks. Plain Pillow is what CLIP's README leads to: `Image.open` and CLIP's own
transform, one picture at a time or in threads. Draft mode lets libjpeg decode at 1/2, 1/4 or 1/8
of the size. The last column shows how far it moves the features of --clip_model. In turns; prints
Markdown.
"""

import argparse
import io
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import heading, in_turns, ratios, row, spread
from detector.encoders import runtime
from detector.encoders.catalogue import EIGHT_BIT
from detector.encoders.closeness import cosines
from detector.encoders.prepare import ensure_encoder
from detector.images.decoding import decode_image, load_rgb, open_image
from detector.images.facts import describe_image
from detector.images.folders import draw_evenly, list_images
from detector.images.preprocessing import clip_transform, preprocess

SIDE = 224
TILE = 240  # pixels of each picture of a mosaic
MARGIN = 2  # draft mode keeps at least this many times SIDE, so the bicubic resize still averages


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data_dir", required=True, metavar="DIR", help="labelled pictures for the mosaics"
    )
    parser.add_argument(
        "--megapixels", type=float, nargs="+", default=[2, 12, 24], help="sizes of the mosaics"
    )
    parser.add_argument("--pictures", type=int, default=12, help="mosaics of each size")
    parser.add_argument("--runs", type=int, default=5, help="runs of each way, in turns")
    parser.add_argument(
        "--clip_model",
        default=EIGHT_BIT,
        metavar="NAME|FILE",
        help="encoder that measures the effect of draft mode",
    )
    return parser.parse_args(argv)


def mosaics(data_dir, megapixels, n):
    """-> list of `n` JPEG files (bytes), 3:2, quality 90."""
    entries = list_images(data_dir)
    columns = max(1, round((megapixels * 1e6 * 1.5) ** 0.5 / TILE))
    rows = max(1, round(megapixels * 1e6 / TILE**2 / columns))
    limit = min(len(entries), n * columns * rows)
    tiles = [
        Image.open(Path(data_dir, entries[i].path))
        .convert("RGB")
        .resize((TILE, TILE), Image.Resampling.LANCZOS)
        for i in draw_evenly([entry.label for entry in entries], limit)
    ]
    rng, files = np.random.default_rng(0), []
    for _ in range(n):
        sheet, buffer = Image.new("RGB", (columns * TILE, rows * TILE)), io.BytesIO()
        for cell, i in enumerate(rng.integers(0, len(tiles), columns * rows)):
            sheet.paste(tiles[i], (cell % columns * TILE, cell // columns * TILE))
        sheet.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


# ---- bytes -> float32 [3, 224, 224], each in its own way ----


def plain(transform):
    return lambda data: transform(Image.open(io.BytesIO(data))).numpy()


def ours(data, side=SIDE):
    return preprocess(decode_image(data), clip_transform(side))


def ours_described(data):
    """As extract_features.py does, with hash, facts and thumbnail."""
    return preprocess(describe_image(data)[0], clip_transform(SIDE))


def drafted(data, side=SIDE):
    image = open_image(data)
    image.draft("RGB", (MARGIN * side, MARGIN * side))
    return preprocess(load_rgb(image), clip_transform(side))


def in_threads(function):
    def run(files):
        with ThreadPoolExecutor(runtime.processors()) as pool:
            return list(pool.map(function, files))

    return run


def one_by_one(function):
    return lambda files: [function(data) for data in files]


def rate(way, files):
    """Pictures a second."""
    started = time.perf_counter()
    way(files)
    return len(files) / (time.perf_counter() - started)


def draft_cosines(encoder, files):
    """Features of draft mode to those of the exact pixels: float32 [n]."""
    exact, draft = (
        encoder.encode(np.stack([way(data, encoder.resolution) for data in files]))
        for way in (ours, drafted)
    )
    return cosines(exact, draft)


def print_row(encoder, ways, args, megapixels):
    files = mosaics(args.data_dir, megapixels, args.pictures)
    rates = in_turns({name: partial(rate, way, files) for name, way in ways.items()}, args.runs)
    width, height = Image.open(io.BytesIO(files[0])).size
    size = statistics.mean(map(len, files)) / 1e6
    pillow = (rates[f"plain Pillow, {mode}"] for mode in ("one by one", "in threads"))
    cosine = draft_cosines(encoder, files)
    row(
        f"{megapixels:g} ({width} x {height}, {size:.1f} MB)",
        *(spread(values, 1) for values in rates.values()),
        ", ".join(ratios(rates["ours"], values, 2) for values in pillow),
        ratios(rates["draft mode"], rates["ours"], 2),
        f"{cosine.mean():.4f}, {cosine.min():.4f}",
    )


def main(argv=None):
    args = parse_args(argv)
    import clip

    pillow = plain(clip.clip._transform(SIDE))
    encoder = runtime.Encoder(ensure_encoder(args.clip_model), "cpu", "float32")
    ways = {
        "plain Pillow, one by one": one_by_one(pillow),
        "plain Pillow, in threads": in_threads(pillow),
        "ours": in_threads(ours),
        "ours, with hash and facts": in_threads(ours_described),
        "draft mode": in_threads(drafted),
    }
    print(f"{os.cpu_count()} processors; images a second.\n")
    heading(
        "megapixels",
        *ways,
        "ours to Pillow one by one, in threads",
        "draft to ours",
        "draft's cosine, mean and lowest",
    )
    for megapixels in args.megapixels:
        print_row(encoder, ways, args, megapixels)


if __name__ == "__main__":
    main()
