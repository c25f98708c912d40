"""The live service at 1, 2, 4 and 8 clients who ask again as soon as they have their answer, against the bare encoder's own rate.

    python -m benchmarks.clients --image photo.jpg                              # the shipped demonstration
    python -m benchmarks.random_clip --output vit-l-14.pt                       # full size: what is trained on it knows nothing
    CLIP_MODEL=vit-l-14.pt python extract_features.py --data_dir data --output_file random.npz --limit 40
    python train_model.py --features_file random.npz --model_output_path random.joblib
    python -m benchmarks.clients --image photo.jpg --model_path random.joblib --requests 32 --runs 1

Needs `hey` (apt-get install hey), on the same processors as the service. The encoder alone runs in this process while the
service is idle, before and after each load; its rate is that of its better batch size. Prints Markdown.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
from benchmarks.measure import spread
from benchmarks.service import Server, hey, multipart, sent
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
    parser.add_argument(
        "--model_path", default=str(ROOT / "models" / "baseline.joblib"), help="model to serve"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=400,
        help="of each number of clients, in each run; a multiple of 8",
    )
    parser.add_argument("--runs", type=int, default=3, help="in turns")
    return parser.parse_args(argv)


def bare_rate(encoder, pixels, images):
    """Images a second of the encoder alone on the upload's pixels (zeros take less time), `images` of them at each batch size;
    the better one's."""
    rates = []
    for n in BATCHES:
        batch, started = np.stack([pixels] * n), time.perf_counter()
        for _ in range(max(1, images // n)):
            encoder.encode(batch)
        rates.append(max(1, images // n) * n / (time.perf_counter() - started))
    return max(rates)


def load(server, body, clients, requests):
    """-> (verdicts a second, seconds of each)"""
    started, process = hey(server, body, "-n", requests, "-c", clients)
    rows = sent(started, process)
    if len(rows) != requests or any(status != 200 for status, *_ in rows):
        sys.exit(
            f"{requests} requests of {clients} clients: {len(rows)} answers, statuses"
            f" {sorted({status for status, *_ in rows})}"
        )
    return len(rows) / (max(when for *_, when in rows) - started), [taken for _, taken, _ in rows]


def decode_seconds(data, side):
    """Processor seconds of one upload's decoding."""
    started = time.process_time()
    for _ in range(10):
        preprocess(decode_image(data), side)
    return (time.process_time() - started) / 10


def main(argv=None):
    args = parse_args(argv)
    if not shutil.which("hey"):
        sys.exit("error: hey is not installed: apt-get install hey")
    encoder = runtime.Encoder(
        encoder_folder(load_model(args.model_path)["encoder"], args.model_path),
        "cpu",
        threads=runtime.processors(),
    )
    data = Path(args.image).read_bytes()
    one, pixels = (
        decode_seconds(data, encoder.resolution),
        preprocess(decode_image(data), encoder.resolution),
    )
    found = {clients: [] for clients in CLIENTS}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            [sys.executable, "app.py"],
            folder,
            None,
            MODEL_PATH=os.path.abspath(args.model_path),
            ALLOW_DEMO_MODEL="1",
            QUEUE_TIMEOUT_S="120",
        )
        try:
            if (served := server.ask("/model")["encoder"]["precision"]) != encoder.precision:
                sys.exit(
                    f"the service encodes in {served}, this process in {encoder.precision}: not to"
                    " be compared"
                )
            body = multipart(args.image, folder)
            load(server, body, 8, 16)
            bare_rate(encoder, pixels, 1)
            for _ in range(args.runs):
                for clients in CLIENTS:
                    before = bare_rate(encoder, pixels, args.requests // 8)
                    rate, taken = load(server, body, clients, args.requests)
                    bare = (before + bare_rate(encoder, pixels, args.requests // 8)) / 2
                    found[clients].append((rate, bare, taken))
        finally:
            server.stop()
    print(
        f"Encoder `{Path(encoder.name).stem}`, {encoder.precision}, {runtime.processors()}"
        f" processors, {len(data) / 1000:.0f} kB, {1000 * one:.0f} ms of a processor to decode;"
        f" {args.runs} runs of {args.requests} requests.\n\n| clients | verdicts/s | ms at 50 / 95"
        " / 99% | encoder alone, images/s | share of it | share of what arithmetic allows"
        " |\n|---|---|---|---|---|---|"
    )
    for clients, runs in found.items():
        ms = [
            1000 * value
            for value in np.percentile([t for *_, taken in runs for t in taken], (50, 95, 99))
        ]
        shares = [100 * rate / bare for rate, bare, _ in runs]
        # a client alone waits for both; several keep all processors at both
        allowed = [
            100 * rate * (1 / bare + one / min(clients, runtime.processors()))
            for rate, bare, _ in runs
        ]
        print(
            f"| {clients} | {spread([rate for rate, *_ in runs])} |"
            f" {' / '.join(f'{value:.0f}' for value in ms)} |"
            f" {statistics.median(bare for _, bare, _ in runs):.2f} | {spread(shares, 0)}% |"
            f" {statistics.median(allowed):.0f}% |",
            flush=True,
        )


if __name__ == "__main__":
    main()
