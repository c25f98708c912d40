"""Encoding: images a second of ours, of OpenAI's loop, of open_clip's, and what the machine's arithmetic allows.

    python -m benchmarks.random_clip --output vit-l-14.pt
    python -m benchmarks.encoding --clip_model vit-l-14.pt --image photo.jpg          # an hour where there is no bfloat16
    python -m benchmarks.encoding --image photo.jpg         # ViT-B/16-8bit
    python -m benchmarks.encoding --clip_model vit-l-14.pt --image photo.jpg --device cuda --batch_sizes 1 64 256 --megapixels 0.25 2 --images 4096 12288

With a checkpoint of a ViT-L/14, `clip.load` takes part, and open_clip where it is installed
(pip install open_clip_torch). The limit is torch's own matrix multiplication at the shapes of a
ViT-L/14, which takes 162 GFLOP an image.

All from pixels in the machine's memory to features there; these in turns, extract_features.py
after them; prints Markdown.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
from benchmarks.measure import in_turns, ratios, spread
from detector.encoders import runtime
from detector.encoders.catalogue import EIGHT_BIT
from detector.encoders.prepare import ensure_encoder
from detector.images.facts import describe_image
from detector.images.preprocessing import preprocess

GFLOP = 162  # of an image in a ViT-L/14
SHAPES = [
    (1024, 3072),
    (1024, 1024),
    (1024, 4096),
    (4096, 1024),
]  # of its four matrix products, 257 rows an image
COMPILED = "ours, compiled"


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--clip_model",
        default=EIGHT_BIT,
        metavar="NAME|FILE",
        help="what encodes; a file: a ViT-L/14, as random_clip.py writes it",
    )
    parser.add_argument(
        "--image", required=True, metavar="IMG", help="photograph that all are made of"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to encode")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[1, 4, 8, 16], help="to try for each"
    )
    parser.add_argument("--runs", type=int, default=3, help="of each, in turns")
    parser.add_argument(
        "--megapixels",
        type=float,
        nargs="*",
        default=[2, 12],
        help="of the photographs for extract_features.py",
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs=2,
        default=[16, 48],
        help="that it extracts: the difference is the rate",
    )
    return parser.parse_args(argv)


# ---- forward passes ----


def torch_loop(checkpoint, device):
    """What OpenAI's README leads to: float32 on a CPU, float16 on CUDA, one batch after the other."""
    import clip
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = clip.load(checkpoint, device=device)[0]

    def forward(pixels):
        with torch.no_grad():
            return model.encode_image(torch.from_numpy(pixels).to(device)).cpu().numpy()

    return forward


def open_clip_loop(device):
    """The same network by open_clip, weights as it initialises them, on CUDA in float16; None where it is not installed."""
    try:
        import open_clip
    except ImportError:
        return None
    import torch

    dtype = {"cpu": torch.float32, "cuda": torch.float16}[device]
    model = open_clip.create_model("ViT-L-14-quickgelu", device=device).eval().to(dtype)

    def forward(pixels):
        with torch.no_grad():
            return model.encode_image(torch.from_numpy(pixels).to(device, dtype)).cpu().numpy()

    return forward


def multiplications(n, device):
    """-> function that multiplies what `n` images multiply in one of the 24 layers, and how many images' worth that is."""
    import torch

    kind = {"device": device, "dtype": {"cpu": torch.float32, "cuda": torch.float16}[device]}
    pairs = [(torch.randn(257 * n, a, **kind), torch.randn(a, b, **kind)) for a, b in SHAPES]
    worth = sum(2 * 257 * n * a * b for a, b in SHAPES) / (GFLOP * 1e9)

    def run(_):
        for left, right in pairs:
            product = left @ right
        product[0, 0].item()  # a GPU says that it is done

    return run, worth


def rates(args, folder):
    """-> {name: {batch size: [images a second]}}"""
    side, float_ = (
        runtime.read_manifest(folder)["resolution"],
        {"cpu": "float32", "cuda": "float16"}[args.device],
    )
    ours = runtime.Encoder(folder, args.device)
    loops = {f"ours, {ours.precision}": ours.encode}
    if args.device == "cuda":
        loops[COMPILED] = runtime.Encoder(folder, args.device, compile=True).encode
    elif runtime.has_bfloat16():
        loops["ours, float32"] = runtime.Encoder(folder, "cpu", "float32").encode
    if args.clip_model != EIGHT_BIT:
        loops[f"`clip.load`, torch {float_}"] = torch_loop(args.clip_model, args.device)
        if peer := open_clip_loop(args.device):
            loops[f"open_clip, torch {float_}"] = peer
    passes = {"cpu": 1, "cuda": 8}[args.device]
    at_once = ThreadPoolExecutor(
        {"cpu": 1, "cuda": 2}[args.device]
    )  # as extract_features.py calls it
    found, rng = (
        {name: {n: [] for n in args.batch_sizes} for name in loops},
        np.random.default_rng(0),
    )
    limit = {n: [] for n in args.batch_sizes}
    for turn in range(args.runs + 1):
        for n in args.batch_sizes:
            pixels = rng.standard_normal((n, 3, side, side)).astype(np.float32)
            multiply, worth = multiplications(n, args.device)
            for name, forward, worth_of in [
                *((k, f, n) for k, f in loops.items()),
                ("limit", multiply, worth),
            ]:
                if name == COMPILED and n < max(args.batch_sizes):
                    continue  # smaller ones are padded to the largest
                started = time.perf_counter()
                list((at_once.map if name.startswith("ours") else map)(forward, [pixels] * passes))
                rate = passes * worth_of / (time.perf_counter() - started)
                if turn:
                    (limit if name == "limit" else found[name])[n].append(rate)
    if args.clip_model != EIGHT_BIT:
        found[f"limit: torch's {float_} matrix product"] = limit
    return found


# ---- the command ----


def photographs(path, megapixels, n, folder):
    """`n` JPEG files of that size, ten pictures of them, no two files alike."""
    image = Image.open(path).convert("RGB")
    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
    )
    for i in range(min(n, 10)):
        ImageChops.offset(image, 8 * i, 0).save(folder / f"{i:05d}.jpg", quality=85 + i)
    saved = [file.read_bytes() for file in sorted(folder.iterdir())]
    for i in range(10, n):
        (folder / f"{i:05d}.jpg").write_bytes(
            saved[i % 10] + b"%d" % i
        )  # what follows the picture is not decoded


def decode_seconds(path, side):
    """Processor seconds of one file: decode, hash, facts, preprocess."""
    data, started = path.read_bytes(), time.process_time()
    for _ in range(3):
        preprocess(describe_image(data)[0], side)
    return (time.process_time() - started) / 3


def extraction(args, encoder, bare, megapixels):
    """One row: images a second of the whole command, from two numbers of images, and what the arithmetic allows."""
    with tempfile.TemporaryDirectory() as place:
        folders = {n: Path(place, str(n)) for n in args.images}
        for n, folder in folders.items():
            folder.mkdir()
            photographs(args.image, megapixels, n, folder)
        one = decode_seconds(next(folder.iterdir()), runtime.read_manifest(encoder)["resolution"])
        command = [
            sys.executable,
            ROOT / "extract_features.py",
            "--unlabelled",
            "--clip_model",
            args.clip_model,
            "--device",
            args.device,
        ]
        again = Path(place, "f.npz")
        found = in_turns(
            {
                n: [
                    "sh",
                    "-c",
                    f'rm -rf {again}*; exec "$@"',
                    "sh",
                    *command,
                    "--data_dir",
                    folder,
                    "--output_file",
                    again,
                ]
                for n, folder in folders.items()
            },
            max(1, args.runs - 1),
        )
    few, many = args.images
    rate = [(many - few) / (b - a) for (a, _), (b, _) in zip(found[few], found[many])]
    decoded = runtime.processors() / one
    allowed = (
        1 / (1 / bare + 1 / decoded) if args.device == "cpu" else min(bare, decoded)
    )  # which share the processors, or do not
    peak = {n: max(mb for _, mb in pairs) for n, pairs in found.items()}
    print(
        f"| {megapixels:g} | {spread(rate, 3)} | {bare:.3f} |"
        f" {100 * statistics.median(rate) / bare:.0f}% | {allowed:.3f} |"
        f" {100 * statistics.median(rate) / allowed:.0f}% | {1000 * one:.0f} |"
        f" {many / statistics.median(s for s, _ in found[many]):.3f} | {peak[few]:.0f},"
        f" {peak[many]:.0f} |",
        flush=True,
    )


def main(argv=None):
    args = parse_args(argv)
    # in a process of its own: a child's peak memory counts from what its parent held when it was born
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        folder = pool.submit(ensure_encoder, args.clip_model).result()
        found = pool.submit(rates, args, folder).result()
    best = {
        name: max(by_size, key=lambda n: statistics.median(by_size[n] or [0]))
        for name, by_size in found.items()
    }
    base = next((name for name in found if "clip.load" in name), next(iter(found)))
    print(
        f"| images a second | {' | '.join(f'batch {n}' for n in args.batch_sizes)} | best, against"
        f" {base} at its best |\n|---|" + "---|" * (len(args.batch_sizes) + 1)
    )
    for name, by_size in found.items():
        print(
            f"| {name} |"
            f" {' | '.join(spread(by_size[n], 3) if by_size[n] else '-' for n in args.batch_sizes)}"
            f" | {ratios(by_size[best[name]], found[base][best[base]], 2)} |",
            flush=True,
        )
    ours = next(iter(found))
    if args.megapixels:
        print(
            "\n| megapixels | `extract_features.py`, images/s | encoder alone | share of it |"
            " arithmetic allows | share of it | ms of processor to decode | whole run, start"
            " included | peak MB of the shorter, the longer"
            " |\n|---|---|---|---|---|---|---|---|---|"
        )
    for megapixels in args.megapixels:
        extraction(args, folder, statistics.median(found[ours][best[ours]]), megapixels)


if __name__ == "__main__":
    main()
