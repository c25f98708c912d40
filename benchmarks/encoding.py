"""Encoding: images a second of ours, of OpenAI's loop and of open_clip's, and the machine's limit.

    python -m benchmarks.encoding --image photo.jpg         # ViT-B/16-8bit
    python -m benchmarks.encoding --image photo.jpg --megapixels 0.1 2 --views 1
    python -m benchmarks.random_clip --output vit-l-14.pt
    python -m benchmarks.encoding --clip_model vit-l-14.pt --image photo.jpg
    python -m benchmarks.encoding --clip_model vit-l-14.pt --image photo.jpg --device cuda \
        --batch_sizes 1 64 256 --megapixels 0.25 2 --images 4096 12288

The fourth line takes an hour on a processor without bfloat16. The last line is for a GPU.

open_clip takes part where it is installed (pip install open_clip_torch). The limit is the encoder's
own matrix multiplications and nothing else, by torch and on a processor by OpenVINO. It counts what
the features need. The last block's other tokens than the class token do not count.

Encoding starts from pixels in the machine's memory and ends with features there. The loops run in
turns, and extract_features.py after them. Prints Markdown.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from benchmarks.checkpoint import checkpoint_of
from benchmarks.measure import heading, in_turns, machine, ratios, row, run, spread
from detector.base.constants import MAX_PIXELS
from detector.encoders import runtime
from detector.encoders.catalogue import EIGHT_BIT
from detector.encoders.prepare import ensure_encoder
from detector.features.extraction import read_row
from detector.images.folders import Entry

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"cpu": "float32", "cuda": "float16"}  # what clip.load computes in
PEERS = {768: "ViT-B-16-quickgelu", 1024: "ViT-L-14-quickgelu"}  # open_clip's names, by width
PASSES = {"cpu": 1, "cuda": 8}
THREADS = {"cpu": 1, "cuda": 2}  # that call our encoder, as in extract_features.py
COMPILED = "ours, compiled"


def add_encoder_arguments(parser):
    parser.add_argument(
        "--clip_model", default=EIGHT_BIT, metavar="NAME|FILE", help="encoder to measure"
    )
    parser.add_argument(
        "--image", required=True, metavar="IMG", help="photograph that all images are made of"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to encode")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[1, 4, 8, 16], help="batch sizes to try"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each, in turns")


def add_extraction_arguments(parser):
    parser.add_argument(
        "--megapixels",
        type=float,
        nargs="*",
        default=[2, 12],
        help="sizes of the photographs for extract_features.py",
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs=2,
        default=[16, 48],
        help="numbers of photographs for it; their difference gives the rate",
    )
    parser.add_argument("--views", type=int, default=0, help="its degraded copies of an image")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_encoder_arguments(parser)
    add_extraction_arguments(parser)
    return parser.parse_args(argv)


# ---- forward passes ----


def torch_forward(model, device, dtype):
    """OpenAI's loop around a model: one batch after the other."""
    import torch

    def forward(pixels):
        with torch.no_grad():
            batch = torch.from_numpy(pixels).to(device, dtype)
            return model.encode_image(batch).cpu().numpy()

    return forward


def torch_loop(checkpoint, device):
    """The loop of OpenAI's README. `clip.load` computes in float16 on CUDA."""
    import clip
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = clip.load(checkpoint, device=device)[0]
    return torch_forward(model, device, torch.float32)


def open_clip_loop(width, device):
    """The same network by open_clip, with its initial weights; None where it is not installed."""
    try:
        import open_clip
    except ImportError:
        return None
    import torch

    dtype = getattr(torch, DTYPES[device])
    model = open_clip.create_model(PEERS[width], device=device).eval().to(dtype)
    return torch_forward(model, device, dtype)


def loops_of(args, folder):
    """-> {name: function of pixels}, ours first."""
    ours = runtime.Encoder(folder, args.device)
    loops = {f"ours, {ours.precision}": ours.encode}
    if args.device == "cuda":
        loops[COMPILED] = runtime.Encoder(folder, args.device, compile=True).encode
    elif runtime.has_bfloat16():
        loops["ours, float32"] = runtime.Encoder(folder, "cpu", "float32").encode
    dtype = DTYPES[args.device]
    with tempfile.TemporaryDirectory() as place:
        checkpoint = checkpoint_of(args.clip_model, place)
        loops[f"`clip.load`, torch {dtype}"] = torch_loop(checkpoint, args.device)
    if peer := open_clip_loop(ours.manifest["arch"]["width"], args.device):
        loops[f"open_clip, torch {dtype}"] = peer
    return loops


# ---- the machine's limit ----


def products(arch, n):
    """Architecture, images -> (rows and shapes of a block's matrix products, FLOP of an image)."""
    width, patch = arch["width"], arch["patch_size"]
    tokens = (arch["input_resolution"] // patch) ** 2 + 1
    # in an order in which each product's result can be the next one's input
    shapes = [(width, 4 * width), (4 * width, width), (width, width), (width, 3 * width)]
    block = 2 * tokens * sum(a * b for a, b in shapes) + 4 * tokens**2 * width
    spared = 2 * (tokens - 1) * 9 * width**2  # of the last block: all but q, k and v
    patches = 2 * (tokens - 1) * 3 * patch**2 * width
    return n * tokens, shapes, arch["layers"] * block - spared + patches


def by_torch(rows, shapes, device, dtype):
    import torch

    kind = {"device": device, "dtype": getattr(torch, dtype)}
    pairs = [(torch.randn(rows, a, **kind), torch.randn(a, b, **kind)) for a, b in shapes]

    def multiply(_):
        for left, right in pairs:
            product = left @ right
        product[0, 0].item()  # waits for the GPU

    return multiply


def by_openvino(rows, shapes, dtype):
    """A chain, so that only the first input has to be converted."""
    import openvino as ov
    from openvino import opset13

    rng = np.random.default_rng(0)
    x = parameter = opset13.parameter([rows, shapes[0][0]], np.float32)
    for a, b in shapes:
        matrix = (rng.standard_normal((a, b)) / a**0.5).astype(np.float32)
        x = opset13.matmul(x, opset13.constant(matrix), False, False)
    hint = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    model = ov.Model([x], [parameter], "products")
    request = runtime.openvino_core().compile_model(model, "CPU", config).create_infer_request()
    left = rng.standard_normal((rows, shapes[0][0])).astype(np.float32)
    return lambda _: request.infer([left], share_inputs=True, share_outputs=True)


def limits(device, arch, n):
    """-> ({name: function that multiplies}, the images whose encoding multiplies as much)."""
    rows, shapes, image = products(arch, n)
    dtypes = [DTYPES[device]]
    if device == "cpu" and runtime.has_bfloat16():
        dtypes.insert(0, "bfloat16")
    multiply = {}
    for dtype in dtypes:
        multiply[f"limit, {dtype}: torch"] = by_torch(rows, shapes, device, dtype)
        if device == "cpu":
            multiply[f"limit, {dtype}: OpenVINO"] = by_openvino(rows, shapes, dtype)
    return multiply, sum(2 * rows * a * b for a, b in shapes) / image


# ---- rates ----


def rate(forward, batches, worth, apply):
    """Images a second of `apply(forward, batches)`, where each batch counts as `worth` images."""
    started = time.perf_counter()
    list(apply(forward, batches))
    return len(batches) * worth / (time.perf_counter() - started)


def rates(args, folder):
    """-> {name: {batch size: [images a second]}}"""
    loops, measures, rng = loops_of(args, folder), {}, np.random.default_rng(0)
    arch = runtime.read_manifest(folder)["arch"]
    side = arch["input_resolution"]
    pool = ThreadPoolExecutor(THREADS[args.device])
    for n in args.batch_sizes:
        pixels = rng.standard_normal((n, 3, side, side)).astype(np.float32)
        batches = [pixels] * PASSES[args.device]
        for name, forward in loops.items():
            if name != COMPILED or n == max(args.batch_sizes):  # it pads smaller ones to that
                apply = pool.map if name.startswith("ours") else map
                measures[name, n] = partial(rate, forward, batches, n, apply)
        multiply, worth = limits(args.device, arch, n)
        for name, function in multiply.items():
            # as many calls as multiply about what encoding the batch does
            calls = range(len(batches) * max(1, round(n / worth)))
            measures[name, n] = partial(rate, function, calls, worth, map)
    by_name = {name: {} for name, _ in measures}
    for (name, n), measured in in_turns(measures, args.runs).items():
        by_name[name][n] = measured
    return by_name


# ---- the command ----


def photographs(path, megapixels, n, folder):
    """`n` JPEG files of that size, ten pictures of them, no two files alike."""
    image = Image.open(path).convert("RGB")
    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    size = round(image.width * scale), round(image.height * scale)
    image = image.resize(size, Image.Resampling.LANCZOS)
    folder.mkdir()
    for i in range(min(n, 10)):
        ImageChops.offset(image, 8 * i, 0).save(folder / f"{i:05d}.jpg", quality=85 + i)
    saved = [file.read_bytes() for file in sorted(folder.iterdir())]
    for i in range(10, n):  # a decoder ignores bytes after the end of the picture
        (folder / f"{i:05d}.jpg").write_bytes(saved[i % 10] + b"%d" % i)


def reading_seconds(folder, transform, views):
    """Processor seconds of a file: decode, hash, facts, degraded copies, preprocess."""
    paths, started = sorted(folder.iterdir())[:10], time.process_time()
    for path in paths:
        read_row(str(folder), Entry(path.name, -1, "", "", ""), transform, MAX_PIXELS, views)
    return (time.process_time() - started) / len(paths)


def time_extractions(args, place, megapixels):
    """{number of images: [(seconds, peak MB)]} of extract_features.py on images in `place`."""
    output, measures = place / "f.npz", {}
    for n in args.images:
        photographs(args.image, megapixels, n, place / str(n))
        command = ["sh", "-c", f'rm -rf {output}*; exec "$@"', "sh", sys.executable]
        command += [ROOT / "extract_features.py", "--unlabelled", "--clip_model", args.clip_model]
        command += ["--device", args.device, "--data_dir", place / str(n), "--output_file", output]
        command += ["--views", args.views]
        measures[n] = partial(run, command)
    return in_turns(measures, max(1, args.runs - 1))


def extraction(args, encoder, bare, megapixels):
    """Print a row: the rate of the whole command, from two numbers of images, and its limit."""
    few, many = args.images
    with tempfile.TemporaryDirectory() as folder:
        measured = time_extractions(args, Path(folder), megapixels)
        transform = runtime.transform_of(runtime.read_manifest(encoder))
        reading = reading_seconds(Path(folder, str(many)), transform, args.views)
    seconds = {n: [taken for taken, _ in measured[n]] for n in args.images}
    peaks = [f"{max(megabytes for _, megabytes in measured[n]):.0f}" for n in args.images]
    rates = [
        (many - few) / (long - short)
        for short, long in zip(seconds[few], seconds[many], strict=True)
    ]
    rate, read = statistics.median(rates), runtime.processors() / reading
    bare /= 1 + args.views
    # on a CPU decoding and encoding share the processors
    allowed = 1 / (1 / bare + 1 / read) if args.device == "cpu" else min(bare, read)
    row(
        f"{megapixels:g}",
        spread(rates, 3),
        f"{bare:.3f}",
        f"{100 * rate / bare:.0f}%",
        f"{allowed:.3f}",
        f"{100 * rate / allowed:.0f}%",
        f"{1000 * reading:.0f}",
        f"{many / statistics.median(seconds[many]):.3f}",
        ", ".join(peaks),
    )


def print_shares(measured, batch_sizes):
    """Rows of the table: ours as a share of the faster limit of its dtype, by medians."""
    for name in measured:
        limit = name.replace("ours, ", "limit, ") + ":"
        bounds = [by_size for other, by_size in measured.items() if other.startswith(limit)]
        if bounds:
            shares = (
                statistics.median(measured[name][n])
                / max(statistics.median(bound[n]) for bound in bounds)
                for n in batch_sizes
            )
            row(f"{name}, share of the limit", *(f"{100 * share:.0f}%" for share in shares), "")


def print_rates(measured, batch_sizes):
    """The table of forward passes. -> median images a second of ours at its best batch size"""
    best = {
        name: max(by_size.values(), key=statistics.median) for name, by_size in measured.items()
    }
    ours = next(iter(measured))
    base = next((name for name in measured if "clip.load" in name), ours)
    sizes = (f"batch {n}" for n in batch_sizes)
    heading("images a second", *sizes, f"best, against {base} at its best")
    for name, by_size in measured.items():
        cells = [spread(by_size[n], 3) if n in by_size else "-" for n in batch_sizes]
        row(name, *cells, ratios(best[name], best[base], 2))
    print_shares(measured, batch_sizes)
    return statistics.median(best[ours])


def main(argv=None):
    args = parse_args(argv)
    folder = ensure_encoder(args.clip_model)
    measured = rates(args, folder)
    if args.device == "cpu":
        print(f"`{args.clip_model}`, {machine()}.\n")
    bare = print_rates(measured, args.batch_sizes)
    if args.megapixels:
        print()
        heading(
            "megapixels",
            "`extract_features.py`, images/s",
            "encoder alone, all copies",
            "share of it",
            "arithmetic allows",
            "share of it",
            "ms of processor to read",
            "whole run, start included",
            "peak MB of the shorter, the longer",
        )
    for megapixels in args.megapixels:
        extraction(args, folder, bare, megapixels)


if __name__ == "__main__":
    main()
