"""The live service under 1, 2, 4 and 8 clients without a pause, against the encoder alone.

    python -m benchmarks.clients --image photo.jpg
    python -m benchmarks.random_clip --output vit-l-14.pt
    export CLIP_MODEL=vit-l-14.pt
    python extract_features.py --data_dir data --output_file random.npz --limit 80
    python train_model.py --features_file random.npz --model_output_path random.joblib
    python -m benchmarks.clients --image photo.jpg --model_path random.joblib --requests 32 --runs 1

The first line measures the shipped demonstration, the others a full-size encoder with random
weights. What is trained on random weights knows nothing.

Needs `hey` (apt-get install hey), on the same processors as the service. The encoder alone runs in
this process while the service is idle, before and after each load. Its rate is that of its better
batch size. Prints Markdown.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.measure import heading, row, spread
from benchmarks.service import BASELINE, Server, hey, multipart, sent
from detector.encoders import runtime
from detector.images.decoding import decode_image
from detector.images.preprocessing import preprocess
from detector.model.file import load_model
from detector.verdict import encoder_folder

CLIENTS, BATCHES = (1, 2, 4, 8), (1, 4)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--image", required=True, help="photograph to send")
    parser.add_argument("--model_path", default=BASELINE, help="model to serve")
    parser.add_argument(
        "--requests",
        type=int,
        default=400,
        help="requests of each number of clients in each run; a multiple of 8",
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each, in turns")
    return parser.parse_args(argv)


def bare_rate(encoder, pixels, images):
    """Images a second of the encoder alone at its better batch size.

    `pixels` are the upload's, because zeros take less time. Encodes `images` at each batch size.
    """
    rates = []
    for n in BATCHES:
        batch, passes, started = np.stack([pixels] * n), max(1, images // n), time.perf_counter()
        for _ in range(passes):
            encoder.encode(batch)
        rates.append(passes * n / (time.perf_counter() - started))
    return max(rates)


def load(server, body, clients, requests):
    """-> (verdicts a second, seconds of each)"""
    started, process = hey(server, body, "-n", requests, "-c", clients)
    rows = sent(started, process)
    if len(rows) != requests or any(status != 200 for status, *_ in rows):
        sys.exit(
            f"{requests} requests of {clients} clients: {len(rows)} responses, statuses"
            f" {sorted({status for status, *_ in rows})}"
        )
    return len(rows) / (max(when for *_, when in rows) - started), [taken for _, taken, _ in rows]


def decode_seconds(data, transform):
    """Processor seconds of one upload's decoding."""
    started = time.process_time()
    for _ in range(10):
        preprocess(decode_image(data), transform)
    return (time.process_time() - started) / 10


@contextmanager
def service(args, folder, precision):
    """The live service. Exits where it encodes in another precision than this process."""
    env = {"MODEL_PATH": os.path.abspath(args.model_path), "ALLOW_DEMO_MODEL": "1"}
    server = Server([sys.executable, "app.py"], folder, None, QUEUE_TIMEOUT_S="120", **env)
    try:
        if (served := server.ask("/model")["encoder"]["precision"]) != precision:
            sys.exit(
                f"the service encodes in {served}, this process in {precision}: "
                "their rates cannot be compared"
            )
        yield server
    finally:
        server.stop()


def measure(args, encoder, pixels):
    """-> {clients: [(verdicts a second, the encoder's rate, seconds of each request)]}"""
    runs, images = {clients: [] for clients in CLIENTS}, args.requests // 8
    with (
        tempfile.TemporaryDirectory() as folder,
        service(args, folder, encoder.precision) as server,
    ):
        body = multipart(args.image, folder)
        load(server, body, 8, 16)
        bare_rate(encoder, pixels, 1)
        for _ in range(args.runs):
            for clients in CLIENTS:
                before = bare_rate(encoder, pixels, images)
                rate, taken = load(server, body, clients, args.requests)
                bare = (before + bare_rate(encoder, pixels, images)) / 2
                runs[clients].append((rate, bare, taken))
    return runs


def print_row(clients, runs, decoding):
    """`decoding`: processor seconds of one upload's decoding."""
    rates, bare, seconds = zip(*runs, strict=True)
    quantiles = np.percentile(np.concatenate(seconds), (50, 95, 99))
    # a single client waits for both; several clients keep all processors busy with both
    shared = decoding / min(clients, runtime.processors())
    row(
        clients,
        spread(rates),
        " / ".join(f"{1000 * value:.0f}" for value in quantiles),
        f"{statistics.median(bare):.2f}",
        f"{spread([100 * rate / b for rate, b, _ in runs], 0)}%",
        f"{statistics.median(100 * rate * (1 / b + shared) for rate, b, _ in runs):.0f}%",
    )


def main(argv=None):
    args = parse_args(argv)
    if not shutil.which("hey"):
        sys.exit("error: hey is not installed: apt-get install hey")
    folder = encoder_folder(load_model(args.model_path)["encoder"], args.model_path)
    encoder = runtime.Encoder(folder, "cpu", threads=runtime.processors())
    data = Path(args.image).read_bytes()
    decoding = decode_seconds(data, encoder.transform)
    runs = measure(args, encoder, preprocess(decode_image(data), encoder.transform))
    print(
        f"Encoder `{encoder.name}`, {encoder.precision}, {runtime.processors()}"
        f" processors, {len(data) / 1000:.0f} kB, {1000 * decoding:.0f} ms of a processor to"
        f" decode; {args.runs} runs of {args.requests} requests.\n"
    )
    heading(
        "clients",
        "verdicts/s",
        "ms at 50 / 95 / 99%",
        "encoder alone, images/s",
        "share of it",
        "share of what arithmetic allows",
    )
    for clients, measured in runs.items():
        print_row(clients, measured, decoding)


if __name__ == "__main__":
    main()
