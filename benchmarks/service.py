"""The service under load: latency, throughput, /healthz and memory, and the pods that it needs.

    python -m benchmarks.service --image photo.jpg
    python -m benchmarks.service --image photo.jpg --model_path model.joblib
    python -m benchmarks.service --image photo.jpg --server_cpus 0

The loads are half, once and four times the capacity. The first line serves the shipped
demonstration, the second your model. In the third the load comes from the other processors.

Needs `hey` (apt-get install hey), which sends the requests. Ours runs beside a first try: Flask's
own threaded server around the same `Detector`, without a queue. Both in one run, in turns. Writes
nothing; prints Markdown.
"""

import argparse
import contextlib
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

from benchmarks.measure import heading, row

ROOT = Path(__file__).resolve().parent.parent
BASELINE = str(ROOT / "models" / "baseline.joblib")
UPLOADS = (1, 10, 100)  # a second, for the numbers of pods
PLACES = 22  # requests in work and waiting, by the defaults on two processors
HEYS = 8  # processes that send
FILL = 0.7  # share of a pod's capacity to plan with: the autoscaler's target in deploy/scaling.yaml
NAIVE = """
import sys
from flask import Flask, request, jsonify
from detector.verdict import Detector
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
    parser.add_argument("--model_path", default=BASELINE, help="model to serve")
    add_load_arguments(parser)
    parser.add_argument(
        "--memory_requests",
        type=int,
        default=2200,
        help="requests over which memory is watched; 0: not at all",
    )
    return parser.parse_args(argv)


def add_load_arguments(parser):
    parser.add_argument("--seconds", type=int, default=20, help="seconds of each load")
    parser.add_argument(
        "--loads",
        type=float,
        nargs="*",
        default=[0.5, 1, 4],
        metavar="N",
        help="loads in capacities, or none; a slow encoder needs more --seconds for each",
    )
    parser.add_argument(
        "--server_cpus",
        type=int,
        nargs="+",
        metavar="N",
        help="processors of the servers; the load then comes from the others "
        "(default: all share all)",
    )


class Server:
    """A service as a process of its own, ready."""

    def __init__(self, command, folder, cpus, **env):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", Path(folder, f"log{self.port}")
        pin = ["taskset", "-c", ",".join(map(str, cpus))] if cpus else []
        command = pin + [part.replace("PORT", str(self.port)) for part in command]
        env = {**os.environ, **env, "PORT": str(self.port)}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=env
            )
        self.wait("/readyz" if "app.py" in command else "/healthz")

    def wait(self, path):
        for _ in range(3000):
            try:
                return urllib.request.urlopen(self.url + path, timeout=5).close()
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None:
                    sys.exit(f"the service ended: {self.log.read_text()}")
                time.sleep(0.02)
        sys.exit("the service is not ready after a minute")

    def memory(self):
        """Resident MB of the process and its children."""
        pid, kilobytes = self.process.pid, 0
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in [pid, *children]:
            status = Path(f"/proc/{one}/status").read_text()
            kilobytes += int(re.search(r"VmRSS:\s+(\d+)", status).group(1))
        return kilobytes / 1024

    def ask(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

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
    """Start sending. `sent` reads the responses."""
    path, content_type = body
    request = ["-m", "POST", "-T", content_type, "-D", path, f"{server.url}/classify"]
    command = ["hey", *map(str, limits), "-t", "120", "-o", "csv", *request]
    return time.perf_counter(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def sent(started, process):
    """-> [(status, seconds, time of the response)]. hey leaves out requests without a response."""
    rows = []
    for line in csv.DictReader(io.StringIO(process.communicate()[0])):
        taken = float(line["response-time"])
        rows.append((int(line["status-code"]), taken, started + float(line["offset"]) + taken))
    return rows


def together(server, body, **limit):
    """Verdicts a second of four clients without a pause, for `seconds` or `requests`."""
    limits = ("-z", f"{limit['seconds']}s") if "seconds" in limit else ("-n", limit["requests"])
    started, process = hey(server, body, *limits, "-c", 4)
    rows = sent(started, process)
    return sum(status == 200 for status, *_ in rows) / (max(when for *_, when in rows) - started)


def paced(server, body, rate, seconds):
    """Send `rate` requests a second, whatever comes back.

    -> ([(status, seconds)] of the responses while all clients were at work, seconds of that time,
    number of requests without a response)

    All clients of one hey send in the same instant. So several start one after the other, within
    the time between two requests of a client. Bursts would fill any queue, then leave it empty.
    """
    # so many that waiting clients do not slow down the others, and each sends at least four times
    clients = math.ceil(min(max(3 * PLACES, rate), rate * seconds / 4) / HEYS)
    between, each = clients * HEYS / rate, math.ceil(rate * seconds / HEYS / clients)
    running, limits = [], ("-n", each * clients, "-c", clients, "-q", f"{1 / between:.6f}")
    for _ in range(HEYS):
        running.append(hey(server, body, *limits))
        time.sleep(between / HEYS)
    begin, end = time.perf_counter(), running[0][0] + each * between
    rows = [line for started, process in running for line in sent(started, process)]
    answered = [(status, taken) for status, taken, when in rows if begin <= when <= end]
    return answered, end - begin, each * clients * HEYS - len(rows)


class HealthWatch(threading.Thread):
    """Asks /healthz ten times a second, and keeps the seconds of each response."""

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


def quantiles(seconds, *shares):
    """'12 / 15' milliseconds; '-' where there are none."""
    ordered, last = sorted(seconds), len(seconds) - 1
    if not ordered:
        return " / ".join("-" for _ in shares)
    return " / ".join(
        f"{1000 * ordered[min(last, int(share * len(ordered)))]:.0f}" for share in shares
    )


def print_load(name, factor, server, body, seconds, capacity):
    """Print the row of a load of `factor` times the capacity."""
    watch = HealthWatch(server.url)
    watch.start()
    rows, window, unanswered = paced(server, body, factor * capacity, seconds)
    watch.stopped = True
    watch.join()
    good, busy = ([taken for status, taken in rows if status == s] for s in (200, 503))
    row(
        name,
        f"{factor:g}",
        f"{len(rows) / window:.1f}",
        f"{len(good) / window:.1f}",
        quantiles(good, 0.5, 0.95, 0.99),
        len(busy),
        quantiles(busy, 0.5, 0.99),
        len(rows) - len(good) - len(busy),
        unanswered,
        quantiles(watch.seconds, 0.99, 1),
        f"{server.memory():.0f}",
    )


def capacities(servers, body, seconds):
    """{name: [verdicts a second with four clients], three times}, in turns."""
    rates = {name: [] for name in servers}
    for server in servers.values():
        together(server, body, requests=20)
    for _ in range(3):
        for name, server in servers.items():
            rates[name].append(together(server, body, seconds=seconds))
    return rates


def memory_curve(server, body, requests):
    """Print the resident memory after 200 requests and after every tenth of the rest."""
    together(server, body, requests=200)
    curve = [server.memory()]
    for _ in range(10):
        together(server, body, requests=(requests - 200) // 10)
        curve.append(server.memory())
    print(
        f"\nMemory after 200 requests and at every tenth of {requests - 200} more:"
        f" {', '.join(f'{mb:.0f}' for mb in curve)} MB ({100 * (curve[-1] / curve[0] - 1):+.1f}%)"
    )


def sizing(server, capacity, cpus):
    """Print the table of docs/deployment.md: the rate of a pod, and how many pods are needed."""
    encoder = server.ask("/model")["encoder"]
    pods = [math.ceil(n / (FILL * capacity)) for n in UPLOADS]
    uploads = f"pods of {cpus} processors for {', '.join(map(str, UPLOADS))} uploads/s"
    print()
    heading("encoder", "images/s a processor", "MB a pod", uploads)
    row(
        f"`{encoder['name']}`, {encoder['precision']}",
        f"{capacity / cpus:.2g}",
        f"{server.memory():.0f}",
        ", ".join(map(str, pods)),
    )


def measure(args, servers, body):
    rates = capacities(servers, body, args.seconds / 2)
    capacity, naive = (statistics.median(rates[name]) for name in ("ours", "naive"))
    cpus = len(args.server_cpus or range(os.cpu_count()))
    print(
        f"{Path(args.image).stat().st_size / 1000:.0f} kB photograph, {cpus} processors,"
        f" load from {'others' if args.server_cpus else 'the same'}. Four clients at once,"
        f" medians of three: ours {capacity:.3g} verdicts a second ({min(rates['ours']):.3g}"
        f" to {max(rates['ours']):.3g}), naive {naive:.3g}.\n"
    )
    heading(
        "server",
        "load",
        "answers/s",
        "verdicts/s",
        "ms at 50 / 95 / 99%",
        "503",
        "ms of a 503 at 50 / 99%",
        "other answers",
        "no answer",
        "/healthz ms at 99 / 100%",
        "MB",
    )
    for factor in args.loads:
        for name, server in servers.items():
            print_load(name, factor, server, body, args.seconds, capacity)
    if args.memory_requests:
        memory_curve(servers["ours"], body, args.memory_requests)
    sizing(servers["ours"], capacity, cpus)


def main(argv=None):
    args = parse_args(argv)
    for tool in ("hey", "taskset"):
        if not shutil.which(tool):
            sys.exit(f"error: {tool} is not installed: apt-get install hey util-linux")
    if args.server_cpus:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - set(args.server_cpus))
    env = {"MODEL_PATH": os.path.abspath(args.model_path), "ALLOW_DEMO_MODEL": "1"}
    commands = {"ours": ["app.py"], "naive": ["-c", NAIVE, env["MODEL_PATH"], "PORT"]}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        servers = {}
        for name, words in commands.items():
            servers[name] = Server([sys.executable, *words], folder, args.server_cpus, **env)
            running.callback(servers[name].stop)
        measure(args, servers, multipart(args.image, folder))


if __name__ == "__main__":
    main()
