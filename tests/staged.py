"""The stage of a game day: services as their operator has them, Prometheus, the runbook's commands.

Prometheus evaluates the shipped rules with all times divided by 100.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import small
import yaml
from commands import OPENAI_CACHE, ROOT
from live import PATIENT, Live, free_port
from made_up import BASELINE, SHIPPED
from patience import PATIENCE
from PIL import Image, ImageFilter
from standins import is_ready

from detector.base.files import sha256
from detector.evaluation.golden import form
from detector.model.file import load_model, save_model

RULES = yaml.safe_load((ROOT / "deploy/prometheus-rules.yaml").read_text())
PARTS = re.split(r"^##+ (.*)\n", (ROOT / "docs/runbook.md").read_text(), flags=re.MULTILINE)
SECTIONS = dict(zip(PARTS[1::2], PARTS[2::2], strict=True))
TOKEN = "a token of the game day"
WEEK_S = 7 * 24 * 3600 // 100  # of this Prometheus
# The service's own gunicorn.conf.py, with a bug where details are asked for.
PLANTED = """
exec(compile(open({conf!r}).read(), {conf!r}, "exec"))
original = post_worker_init

def post_worker_init(worker):
    original(worker)
    import detector.service.app as app
    app.details = lambda *_: 1 / 0
"""


def blocks(section, language="sh"):
    """The fenced blocks of a section of the runbook, without those for Kubernetes."""
    fenced = re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE)
    return [block for block in fenced if not block.startswith("kubectl ")]


def until(condition, what="the condition did not become true"):
    """Wait for something that Prometheus or the service does -> the condition's value."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return result


# ---- Prometheus ----


def hundredth(match):
    seconds = int(match[0][:-1]) * {"m": 60, "h": 3600, "d": 86400, "w": 604800}[match[0][-1]]
    return f"{seconds * 10}ms"


def hurried(rules):
    """The rules with all their times divided by 100."""
    rules = json.loads(json.dumps(rules))
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        scaled = re.sub(r"(?<=\[)\d+\w(?=\])|(?<=offset )\d+\w", hundredth, rule["expr"])
        rule["expr"] = scaled.replace("13 * 3600", "13 * 36")
        assert not re.search(r"(?<!:)\b\d+[smhdw]\b|\b3600\b", rule["expr"]), rule["expr"]
        if "for" in rule:
            rule["for"] = re.sub(r"^\d+\w$", hundredth, rule["for"])
    return rules


def last_week():
    """What the recording rules of last week left: even scores of 4,000 uploads, in OpenMetrics."""
    now, labels = int(time.time()), 'namespace="staging",model_version="v0.9.0"'
    series = {f"fleet:detector_scores:increase6h{{{labels}}}": 4000}
    for number in range(10):
        series[f'fleet_bin:detector_scores:share6h{{{labels},bin="{number}"}}'] = 0.1
    times = range(now - WEEK_S - 60, now - WEEK_S + 1200, 15)
    lines = [f"{name} {value} {at}" for name, value in series.items() for at in times]
    return "\n".join([*lines, "# EOF", ""])


class Prometheus:
    """Prometheus as a process, with the hurried rules."""

    def __init__(self, place, targets, gateway, past):
        if shutil.which("prometheus") is None:
            pytest.skip("prometheus is not installed: apt-get install prometheus")
        self.place, self.url = place, f"http://127.0.0.1:{free_port()}"
        (place / "rules.yaml").write_text(yaml.safe_dump(hurried(RULES)))
        (place / "prometheus.yaml").write_text(yaml.safe_dump(self._settings(targets, gateway)))
        (place / "past").write_text(past)
        past = ["promtool", "tsdb", "create-blocks-from", "openmetrics"]
        subprocess.run([*past, "past", "data"], cwd=place, check=True, capture_output=True)
        options = {
            "config.file": "prometheus.yaml",
            "storage.tsdb.path": "data",
            "web.listen-address": self.url.removeprefix("http://"),
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        with open(place / "log", "w") as log:
            self.process = subprocess.Popen(
                ["prometheus", *words], cwd=place, stdout=log, stderr=log
            )

    def _settings(self, targets, gateway):
        every = {"scrape_interval": "1s", "scrape_timeout": "1s"}
        # A late scrape would begin DetectorGoldenStale's four minutes anew.
        calm = {"scrape_interval": "5s", "scrape_timeout": "5s"}
        jobs = [
            {
                "job_name": namespace,
                **(every if namespace == "detector" else calm),
                "static_configs": [{"targets": [target], "labels": {"namespace": namespace}}],
            }
            for namespace, target in targets.items()
        ]
        pushed = {
            "job_name": "pushgateway",
            "honor_labels": True,
            "static_configs": [{"targets": [gateway]}],
        }
        return {
            "global": {**every, "evaluation_interval": "500ms"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [*jobs, pushed],
        }

    def ask(self, path, **query):
        """-> what Prometheus' HTTP API returns."""
        return requests.get(f"{self.url}/api/v1/{path}", query, timeout=PATIENCE).json()["data"]

    def value(self, expression):
        """Value of the first series, or None."""
        result = self.ask("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else None

    def firing(self, name=None, **labels):
        """The alerts that fire, all or those of a name with these labels."""
        return [
            alert
            for alert in self.ask("alerts")["alerts"]
            if alert["state"] == "firing"
            and name in (None, alert["labels"]["alertname"])
            and labels.items() <= alert["labels"].items()
        ]

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


# ---- services ----


def version_of(source, path, **changes):
    """Save a model under the version that the path names, with these changes -> the path."""
    model = load_model(source)
    del model["sha256"]
    versions = {**model["versions"], "model": path.stem}
    save_model(path, {**model, **changes, "versions": versions})
    return path


def report_of(model):
    """Put the shipped report beside a version of the shipped model."""
    folder = model.with_name(f"{model.stem}_report")
    shutil.copytree(SHIPPED.parent / "baseline_report", folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "model_version": model.stem}))


class Service:
    """A live service in a folder as its operator has it: the code, a token, the log, a model."""

    def __init__(self, place, model, cache, **settings):
        place.mkdir()
        for part in [*ROOT.glob("*.py"), ROOT / "detector"]:
            (place / part.name).symlink_to(part)
        (place / "service.log").symlink_to("log")
        (place / "token").write_text(TOKEN)
        (place / "api_keys").write_text(f"ops {sha256(TOKEN.encode())}\n")
        self.place, self.port = place, free_port()
        self.settings = {"CLIP_CACHE": str(cache), **settings}
        self.headers = {"Authorization": f"Bearer {TOKEN}"}
        self.put(model)
        self.start()

    def start(self):
        self.live = Live(
            self.place,
            PORT=str(self.port),
            MODEL_PATH="model.joblib",
            MODEL_SHA256_FILE="model.joblib.sha256",
            API_KEYS_FILE="api_keys",
            **self.settings,
        )

    def put(self, model, pin=True):
        """Put a model and, with `pin`, its hash in place."""
        shutil.copy(model, self.place / "new")
        (self.place / "new").replace(self.place / "model.joblib")
        if pin:
            (self.place / "model.joblib.sha256").write_text(sha256(model.read_bytes()))

    def reload(self):
        self.live.process.send_signal(signal.SIGHUP)

    def kill_worker(self):
        pids = re.findall(r"Booting worker with pid: (\d+)", self.live.log.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pids[-1]), signal.SIGKILL)

    def restore(self, model):
        """Serve a good model again."""
        self.put(model)
        self.reload()
        self.until_serving(load_model(model)["versions"]["model"])

    def until_serving(self, version):
        until(lambda: self.get("/model").json().get("version") == version)

    def get(self, path):
        return requests.get(self.live.url + path, headers=self.headers, timeout=PATIENCE)

    def post(self, path, *images, token=TOKEN):
        return requests.post(
            self.live.url + path,
            files=[("image", image) for image in images],
            headers={"Authorization": f"Bearer {token}"},
            timeout=PATIENCE,
        )

    def post_slowly(self, image):
        """The body needs three seconds."""
        body, content_type = form(image)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            headers = {**self.headers, "Content-Type": content_type, "Content-Length": len(body)}
            connection.putrequest("POST", "/classify")
            for name, value in headers.items():
                connection.putheader(name, str(value))
            connection.endheaders(body[:100])
            time.sleep(3)
            connection.send(body[100:])
            connection.getresponse().read()

    def run(self, section, gateway=""):
        """Run the commands of a section of the runbook -> what they print."""
        scripts = [block.replace(":8000", f":{self.port}") for block in blocks(section)]
        return "".join(
            self.sh(script.replace("http://127.0.0.1:9091", gateway)) for script in scripts
        )

    def sh(self, script):
        """Run it in bash in the service's folder -> what it prints."""
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=self.place,
            env={**os.environ, **self.settings, "PATH": path},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        low = "golden.py" in script and "is below the floor" in done.stderr  # a result
        assert done.returncode == low, f"{script}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr


@contextlib.contextmanager
def repeated(*works):
    """Each of `works` is done again and again during the body, in a thread of its own."""
    stop = threading.Event()

    def repeat(work):
        while not stop.is_set():
            work()

    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(repeat, work) for work in works]
        try:
            yield
        finally:
            stop.set()
        for future in running:
            future.result()


class Stage:
    """Two services, a Pushgateway and Prometheus.

    `detector` serves the shipped model as v1.0.0, with one slot. v1.1.0 reverses all its verdicts.
    `staging` serves the small model as v0.9.0, which no golden run has measured. Both folders
    `golden` hold images that v1.0.0 gets right.
    """

    def __init__(self, place, gateway, stack, photos, make_folder):
        shipped = load_model(SHIPPED)
        reverse = {name: -shipped[name] for name in ("coef", "intercept")}
        self.good = version_of(SHIPPED, place / "v1.0.0.joblib")
        self.bad = version_of(SHIPPED, place / "v1.1.0.joblib", **reverse)
        self.small = version_of(BASELINE, place / "v0.9.0.joblib")
        planted = place / "planted.conf.py"
        planted.write_text(PLANTED.format(conf=str(ROOT / "gunicorn.conf.py")))
        self.detector = Service(
            place / "detector",
            self.good,
            OPENAI_CACHE,
            SLOTS="1",
            QUEUE_LIMIT="1",
            GUNICORN_CMD_ARGS=f"{PATIENT} --config {planted}",
        )
        stack.callback(lambda: self.detector.live.stop())
        self.staging = Service(place / "staging", self.small, small.FOLDER)
        stack.callback(lambda: self.staging.live.stop())
        self.images = odd_images(make_folder(place / "crops", {".": 48}), place / "odd")
        self.sort_golden(place / "golden", photos)
        self.gateway = gateway
        (place / "prometheus").mkdir()
        targets = {s.place.name: f"127.0.0.1:{s.port}" for s in (self.detector, self.staging)}
        self.prometheus = Prometheus(
            place / "prometheus", targets, gateway.removeprefix("http://"), last_week()
        )
        stack.callback(self.prometheus.stop)
        until(lambda: is_ready(f"{self.prometheus.url}/-/ready"))

    def sort_golden(self, folder, photos):
        """Sort photographs by the verdict of v1.0.0, so that only the model can be at fault."""
        images = [path.read_bytes() for path in photos]
        results = self.detector.post("/classify/batch", *images).json()["results"]
        for image, result in zip(images, results, strict=True):
            path = folder / result["classification"] / f"{sha256(image)}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        assert {path.name for path in folder.iterdir()} == {"real", "fake"}
        for service in (self.detector, self.staging):
            (service.place / "golden").symlink_to(folder)
            (service.place / "looked").symlink_to(folder)

    def until_firing(self, name, **labels):
        """Wait for an alert -> it."""
        return until(lambda: self.prometheus.firing(name, **labels), f"{name} never fires")[0]

    def until_silent(self, name, **labels):
        until(lambda: not self.prometheus.firing(name, **labels), f"{name} never ends")


def odd_images(folder, output):
    """Outlines of photographs, saved again as JPEG -> their paths."""
    output.mkdir()
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as image:
            image.filter(ImageFilter.FIND_EDGES).save(output / path.name, quality=60)
    return sorted(output.glob("*.jpg"))
