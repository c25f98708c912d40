"""The service under load: latency and throughput at half, once and four times its capacity, /healthz meanwhile, memory, and
how many pods that makes.

    python -m benchmarks.service --image photo.jpg                              # the shipped demonstration
    python -m benchmarks.service --image photo.jpg --model_path model.joblib    # yours
    python -m benchmarks.service --image photo.jpg --server_cpus 0              # the load comes from the other processors

Needs `hey` (apt-get install hey), which sends the requests. Beside ours stands what a first try looks like: Flask's own
threaded server around the same `Detector`, no queue. Both in one run, in turns. Writes nothing; prints Markdown.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UPLOADS = (1, 10, 100)  # a second: how many pods
PLACES, HEYS = (
    22,
    8,
)  # requests in work and waiting, of the defaults on two processors; processes that send
FILL = (
    0.7  # of a pod's capacity that is planned with: the autoscaler's target in deploy/scaling.yaml
)
NAIVE = """
import sys
from flask import Flask, request, jsonify
from classify import Detector
detector, app = Detector(sys.argv[1]), Flask("naive")
@app.post("/classify")
def classify():
    classification, confidence = detector.classify(request.files["image"].read())
    return jsonify(classification=classification, confidence=confidence)
@app.get("/healthz")
def healthz():
    return "ok"
app.run(port=int(sys.argv[2]), threaded=True)
"""


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--image", required=True, help="photograph to send")
    parser.add_argument(
        "--model_path", default=str(ROOT / "models" / "baseline.joblib"), help="model to serve"
    )
    parser.add_argument("--seconds", type=int, default=20, help="of each load")
    parser.add_argument(
        "--loads",
        type=float,
        nargs="*",
        default=[0.5, 1, 4],
        metavar="N",
        help="in capacities; a slow encoder wants more --seconds for each, or none",
    )
    parser.add_argument(
        "--server_cpus",
        type=int,
        nargs="+",
        metavar="N",
        help=(
            "processors of the servers; the load then comes from the others (default: all share"
            " all)"
        ),
    )
    parser.add_argument(
        "--memory_requests",
        type=int,
        default=2200,
        help="requests over which memory is watched; 0: not at all",
    )
    return parser.parse_args(argv)


class Server:
    """A service as a process of its own, ready."""

    def __init__(self, command, folder, cpus, **env):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, log = (
            f"http://127.0.0.1:{self.port}",
            open(Path(folder) / f"log{self.port}", "wb"),
        )
        pin = ["taskset", "-c", ",".join(map(str, cpus))] if cpus else []
        command = pin + [part.replace("PORT", str(self.port)) for part in command]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **env, "PORT": str(self.port)},
        )
        log.close()
        path = "/readyz" if "app.py" in str(command) else "/healthz"
        for _ in range(600):
            try:
                urllib.request.urlopen(self.url + path, timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None:
                    sys.exit(f"the service ended: {Path(log.name).read_text()}")
                time.sleep(0.1)
        sys.exit("the service is not ready after a minute")

    def memory(self):
        """Resident MB of the process and its children."""
        kilobytes = 0
        for pid in [
            self.process.pid,
            *Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split(),
        ]:
            kilobytes += int(
                re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1)
            )
        return kilobytes / 1024

    def ask(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)


def multipart(path, folder):
    """A request's body in a file, for hey -D -> (its path, its content type)."""
    head = b'--cut\r\nContent-Disposition: form-data; name="image"; filename="photo"\r\n\r\n'
    body = Path(folder) / "body"
    body.write_bytes(head + Path(path).read_bytes() + b"\r\n--cut--\r\n")
    return body, "multipart/form-data; boundary=cut"


def hey(server, body, *limits):
    """Start sending; `sent` reads what came of it."""
    path, content_type = body
    command = [
        "hey",
        *map(str, limits),
        "-t",
        "120",
        "-m",
        "POST",
        "-T",
        content_type,
        "-D",
        path,
        "-o",
        "csv",
        f"{server.url}/classify",
    ]
    return time.perf_counter(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def sent(started, process):
    """-> [(status, seconds, when it was answered)]. hey tells nothing of requests that got no answer."""
    rows = list(csv.DictReader(io.StringIO(process.communicate()[0])))
    return [
        (
            int(row["status-code"]),
            float(row["response-time"]),
            started + float(row["offset"]) + float(row["response-time"]),
        )
        for row in rows
    ]


def together(server, body, **limit):
    """Four clients, each asking again as soon as it has its answer, for `seconds` or `requests` -> verdicts a second."""
    limits = ("-z", f"{limit['seconds']}s") if "seconds" in limit else ("-n", limit["requests"])
    started, process = hey(server, body, *limits, "-c", 4)
    rows = sent(started, process)
    return sum(status == 200 for status, *_ in rows) / (max(when for *_, when in rows) - started)


def paced(server, body, rate, seconds):
    """`rate` requests a second, come what may -> ([(status, seconds)] of those answered while all clients were at work, how
    many seconds that was, how many requests got no answer).

    All clients of one hey ask in the same instant, so there are several, started one after the other within the time
    between two requests of a client: uploads come spread, not in bursts that fill any queue and then leave it empty.
    """
    # enough that those who wait for an answer do not slow down the others, and each asks at least four times
    clients = math.ceil(min(max(3 * PLACES, rate), rate * seconds / 4) / HEYS)
    between, each = clients * HEYS / rate, math.ceil(rate * seconds / HEYS / clients)
    running = []
    for _ in range(HEYS):
        running.append(
            hey(server, body, "-n", each * clients, "-c", clients, "-q", f"{1 / between:.6f}")
        )
        time.sleep(between / HEYS)
    begin, end = time.perf_counter(), running[0][0] + each * between
    rows = [row for started, process in running for row in sent(started, process)]
    return (
        [(status, taken) for status, taken, when in rows if begin <= when <= end],
        end - begin,
        each * clients * HEYS - len(rows),
    )


class HealthWatch(threading.Thread):
    """Asks /healthz ten times a second: seconds that it took, the slowest last."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.seconds, self.stopped = f"{url}/healthz", [], False

    def run(self):
        while not self.stopped:
            started = time.perf_counter()
            try:
                urllib.request.urlopen(self.url, timeout=30).close()
                self.seconds.append(time.perf_counter() - started)
            except OSError:
                self.seconds.append(30.0)
            time.sleep(0.1)


def row(name, factor, server, body, seconds, capacity):
    """One line of the table: a load of `factor` times the capacity."""
    watch = HealthWatch(server.url)
    watch.start()
    rows, window, unanswered = paced(server, body, factor * capacity, seconds)
    watch.stopped = True
    watch.join()
    good = sorted(taken for status, taken in rows if status == 200)
    busy = sorted(taken for status, taken in rows if status == 503)

    def ms(values, share):
        return (
            f"{1000 * values[min(len(values) - 1, int(share * len(values)))]:.0f}"
            if values
            else "-"
        )

    health = sorted(watch.seconds)
    print(
        f"| {name} | {factor:g} | {len(rows) / window:.1f} | {len(good) / window:.1f} |"
        f" {ms(good, 0.5)} / {ms(good, 0.95)} / {ms(good, 0.99)} | {len(busy)} | {ms(busy, 0.5)} /"
        f" {ms(busy, 0.99)} | {len(rows) - len(good) - len(busy)} | {unanswered} | {ms(health, 0.99)}"
        f" / {ms(health, 1)} | {server.memory():.0f} |",
        flush=True,
    )


def capacities(servers, body, seconds):
    """Four clients at once -> {server: verdicts a second, three times}; in turns, since the machine's mood changes."""
    rates = {server: [] for server in servers}
    for server in servers:
        together(server, body, requests=20)
    for _ in range(3):
        for server in servers:
            rates[server].append(together(server, body, seconds=seconds))
    return rates


def sizing(server, capacity, cpus):
    """The README's row: what one pod takes, and how many it takes."""
    encoder, pods = (
        server.ask("/model")["encoder"],
        [math.ceil(n / (FILL * capacity)) for n in UPLOADS],
    )
    print(
        f"\n| encoder | images/s a processor | MB a pod | pods of {cpus} processors for"
        f" {', '.join(map(str, UPLOADS))} uploads/s |\n|---|---|---|---|\n|"
        f" `{Path(encoder['name']).stem}`, {encoder['precision']} | {capacity / cpus:.2g} |"
        f" {server.memory():.0f} | {', '.join(map(str, pods))} |"
    )


def main(argv=None):
    args = parse_args(argv)
    for tool in ("hey", "taskset"):
        if not shutil.which(tool):
            sys.exit(f"error: {tool} is not installed: apt-get install hey util-linux")
    if args.server_cpus:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - set(args.server_cpus))
    with tempfile.TemporaryDirectory() as folder:
        body = multipart(args.image, folder)
        env = {"MODEL_PATH": os.path.abspath(args.model_path), "ALLOW_DEMO_MODEL": "1"}
        ours = Server([sys.executable, "app.py"], folder, args.server_cpus, **env)
        naive = Server(
            [sys.executable, "-c", NAIVE, env["MODEL_PATH"], "PORT"], folder, args.server_cpus
        )
        try:
            rates = capacities((ours, naive), body, args.seconds / 2)
            capacity, cpus = (
                statistics.median(rates[ours]),
                len(args.server_cpus or range(os.cpu_count())),
            )
            print(
                f"{Path(args.image).stat().st_size / 1000:.0f} kB photograph, {cpus} processors,"
                f" load from {'others' if args.server_cpus else 'the same'}. Four clients at once,"
                f" medians of three: ours {capacity:.3g} verdicts a second ({min(rates[ours]):.3g}"
                f" to {max(rates[ours]):.3g}), naive {statistics.median(rates[naive]):.3g}.\n"
            )
            print(
                "| server | load | answers/s | verdicts/s | ms at 50 / 95 / 99% | 503 | ms of a 503"
                " at 50 / 99% | other answers | no answer | /healthz ms at 99 / 100% | MB"
                " |\n|---|---|---|---|---|---|---|---|---|---|---|"
            )
            for factor in args.loads:
                for name, server in (("ours", ours), ("naive", naive)):
                    row(name, factor, server, body, args.seconds, capacity)
            if args.memory_requests:
                memory_curve(ours, body, args.memory_requests)
            sizing(ours, capacity, cpus)
        finally:
            ours.stop()
            naive.stop()


def memory_curve(server, body, requests):
    """Resident memory after 200 requests and every tenth of the rest."""
    together(server, body, requests=200)
    curve = [server.memory()]
    for _ in range(10):
        together(server, body, requests=(requests - 200) // 10)
        curve.append(server.memory())
    print(
        f"\nMemory after 200 requests and at every tenth of {requests - 200} more:"
        f" {', '.join(f'{mb:.0f}' for mb in curve)} MB ({100 * (curve[-1] / curve[0] - 1):+.1f}%)"
    )


if __name__ == "__main__":
    main()
