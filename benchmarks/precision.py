"""What reduced precision costs and gives: float32, bfloat16, int8 weights only, int8.

    python -m benchmarks.precision --data_dir data          # ViT-B/16-8bit
    python -m benchmarks.random_clip --output vit-l-14.pt
    python -m benchmarks.precision --clip_model vit-l-14.pt --data_dir data --limit 40

The last line measures speed only, because the weights are random. Needs the packages of
requirements/int8.txt. Half of the images calibrate int8, the other half give cosines and verdicts.
The verdicts are those of a logistic regression on the first half's float32 features. Rates in
turns. Prints Markdown.
"""

import argparse
import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

from benchmarks.measure import heading, in_turns, ratios, row, spread
from detector.encoders import quantize, runtime
from detector.encoders.catalogue import EIGHT_BIT
from detector.encoders.prepare import ensure_encoder


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--clip_model", default=EIGHT_BIT, metavar="NAME|FILE", help="encoder to measure"
    )
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="labelled pictures")
    parser.add_argument("--limit", type=int, default=400, help="pictures to use")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="to measure")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, in turns")
    return parser.parse_args(argv)


def weights_only(folder, scratch, pixels, reference):
    import openvino as ov

    nncf, model, _ = quantize.prepared_model(folder)
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    ov.save_model(compressed, scratch / "encoder.xml", compress_to_fp16=True)


def variants(folder, place, pixels, reference):
    """-> {name: (Encoder, its folder)}"""
    encoders = {"float32": (runtime.Encoder(folder, "cpu", "float32"), folder)}
    if runtime.has_bfloat16():
        encoders["bfloat16"] = runtime.Encoder(folder, "cpu", "bfloat16"), folder
    for name, make in (("int8, weights only", weights_only), ("int8", quantize.plain)):
        scratch = Path(place, name)
        scratch.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(folder, scratch, pixels, reference)
        encoders[name] = quantize.describe(folder, scratch), scratch
    return encoders


def rate(encoder, batch):
    """Images a second over at least 0.2 seconds."""
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        encoder.encode(batch)
        passes += 1
    return passes * len(batch) / (time.perf_counter() - started)


def rates(encoders, batch, runs):
    """-> {name: [images a second]}"""
    measures = {name: partial(rate, encoder, batch) for name, (encoder, _) in encoders.items()}
    return in_turns(measures, runs)


def measure(args, folder, place):
    """-> (pictures that calibrated nothing, {batch size: rates}, {name: (MB, closeness)})"""
    pixels, labels = quantize.read_images(
        args.data_dir, args.limit, runtime.transform_of(runtime.read_manifest(folder))
    )
    half = len(pixels) // 2
    reference = quantize.encode(runtime.Encoder(folder, "cpu", "float32"), pixels)
    encoders = variants(folder, place, pixels[:half], reference[:half])
    speed = {n: rates(encoders, pixels[:n], args.runs) for n in args.batch_sizes}
    quality = {}
    for name, (encoder, own) in encoders.items():
        megabytes = Path(own, "encoder.bin").stat().st_size / 1e6
        features = quantize.encode(encoder, pixels[half:])
        quality[name] = megabytes, quantize.closeness(reference, features, labels)
    return len(pixels) - half, speed, quality


def main(argv=None):
    args = parse_args(argv)
    folder = ensure_encoder(args.clip_model)
    with tempfile.TemporaryDirectory() as place:
        os.environ["CLIP_CACHE"] = place  # for the compiled forms of encoders that do not stay
        pictures, speed, quality = measure(args, folder, place)
    print(f"{pictures} pictures that calibrated nothing.\n")
    batches = [text for n in speed for text in (f"images/s at batch {n}", "to float32")]
    heading(
        runtime.read_manifest(folder)["name"],
        *batches,
        "MB on the disk",
        "cosine to float32, mean and lowest",
        "verdicts that stay",
    )
    for name, (megabytes, close) in quality.items():
        cells = []
        for measured in speed.values():
            cells += [spread(measured[name]), ratios(measured[name], measured["float32"], 2)]
        row(
            name,
            *cells,
            f"{megabytes:.1f}",
            f"{close['cosine']:.4f}, {close['lowest']:.4f}",
            f"{100 * close['agreement']:.1f}%",
        )


if __name__ == "__main__":
    main()
