"""What reduced precision costs and gives: float32, bfloat16, int8 weights only, int8, on one encoder and this machine.

    python -m benchmarks.precision --data_dir data                               # ViT-B/16-8bit
    python -m benchmarks.random_clip --output vit-l-14.pt
    python -m benchmarks.precision --clip_model vit-l-14.pt --data_dir data --limit 40    # speed only: its weights are random

Needs what requirements/int8.txt names. Half of the images calibrate int8, the other half are what cosine and verdicts are told
of; the verdicts are those of a logistic regression on the first half's float32 features. Rates in turns. Prints Markdown.
"""

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks.measure import ratios, spread
from detector.encoders import quantize, runtime
from detector.encoders.catalogue import EIGHT_BIT
from detector.encoders.prepare import ensure_encoder


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--clip_model", default=EIGHT_BIT, metavar="NAME|FILE", help="what encodes")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="labelled pictures")
    parser.add_argument("--limit", type=int, default=400, help="pictures")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="to measure")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turns")
    return parser.parse_args(argv)


def weights_only(folder, scratch, pixels, reference):
    import openvino as ov

    nncf, model, _ = quantize.prepared_model(folder)
    ov.save_model(
        nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM),
        scratch / "encoder.xml",
        compress_to_fp16=True,
    )


def variants(folder, place, pixels, reference):
    """-> {name: Encoder}"""
    found = {"float32": runtime.Encoder(folder, "cpu", "float32")}
    if runtime.has_bfloat16():
        found["bfloat16"] = runtime.Encoder(folder, "cpu", "bfloat16")
    for name, make in (("int8, weights only", weights_only), ("int8", quantize.plain)):
        scratch = Path(place, name)
        scratch.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(folder, scratch, pixels, reference)
        found[name] = quantize.describe(folder, scratch)
    return found


def rates(found, pixels, n, runs):
    """-> {name: [images a second]} at batch size `n`."""
    measured = {name: [] for name in found}
    for turn in range(runs + 1):
        for name, encoder in found.items():
            started, passes = time.perf_counter(), 0
            while time.perf_counter() - started < 0.2:
                encoder.encode(pixels[:n])
                passes += 1
            if turn:
                measured[name].append(passes * n / (time.perf_counter() - started))
    return measured


def main(argv=None):
    args = parse_args(argv)
    folder = ensure_encoder(args.clip_model)
    pixels, labels = quantize.read_images(
        args.data_dir, args.limit, runtime.read_manifest(folder)["resolution"]
    )
    half = len(pixels) // 2
    with tempfile.TemporaryDirectory() as place:
        os.environ["CLIP_CACHE"] = place  # the compiled forms of passing encoders go with them
        reference = quantize.encode(runtime.Encoder(folder, "cpu", "float32"), pixels)
        found = variants(folder, place, pixels[:half], reference[:half])
        size = {
            name: (
                Path(Path(place, name) if name.startswith("int8") else folder, "encoder.bin")
                .stat()
                .st_size
            )
            for name in found
        }
        speed = {n: rates(found, pixels, n, args.runs) for n in args.batch_sizes}
        close = {
            name: quantize.closeness(reference, quantize.encode(encoder, pixels[half:]), labels)
            for name, encoder in found.items()
        }
    name = runtime.read_manifest(folder)["name"]
    print(
        f"{len(pixels) - half} pictures that calibrated nothing.\n\n| {name} | "
        + " | ".join(f"images/s at batch {n} | to float32" for n in args.batch_sizes)
        + " | MB on the disk | cosine to float32, mean and lowest | verdicts that stay |\n|---|"
        + "---|---|" * len(args.batch_sizes)
        + "---|---|---|"
    )
    for name in found:
        columns = " | ".join(
            f"{spread(speed[n][name])} | {ratios(speed[n][name], speed[n]['float32'], 2)}"
            for n in args.batch_sizes
        )
        print(
            f"| {name} | {columns} | {size[name] / 1e6:.1f} | {close[name]['cosine']:.4f},"
            f" {close[name]['lowest']:.4f} | {100 * close[name]['agreement']:.1f}% |"
        )


if __name__ == "__main__":
    main()
