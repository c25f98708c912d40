"""Send a labelled folder through a live service and compare each model version with its floor."""

import http.client
import json
import random
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

from detector.base.addresses import behind_proxy
from detector.base.console import SOON, printable, say
from detector.base.constants import CLASSES
from detector.base.errors import ImageError, UsageError
from detector.base.files import read_bytes, sha256
from detector.evaluation import intervals, metrics
from detector.evaluation.rules import HUGE
from detector.features.columns import COLUMNS
from detector.images.decoding import decode_image
from detector.images.facts import make_groups, thumbnail
from detector.images.folders import list_images
from detector.model.file import trained_on

TRIES = 5  # of one request, while the service is busy or a connection breaks
RETRY_S = 1  # the wait between two tries where the response has no usable Retry-After
LONGEST_WAIT_S = 60  # a longer Retry-After is cut to this
TIMEOUT_S = 60  # of one request; the service itself gives up earlier
RESPONSE_BYTES = 1 << 20
JOB = "detector-golden"


# ---- the service ----


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: urllib would send the token to the new address."""

    def redirect_request(self, *_):
        return None


class Service:
    """The service at a URL: service.ask("/model") -> (status, headers, JSON object or None)."""

    def __init__(self, url, token=""):
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--url {url}: must begin with http:// or https://")
        if not (token.isascii() and token.isprintable()):  # the message must not show the token
            raise UsageError(
                "API_KEY: holds characters that no header may carry; set it to the token alone"
            )
        self.url, self.reached = url.rstrip("/"), False
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.opener = urllib.request.build_opener(NoRedirect)

    def error(self, text):
        """UsageError that names the address, and the proxy in front of it."""
        return UsageError(f"--url {self.url}: {text}{behind_proxy(self.url)}")

    def ask(self, path, data=None, headers=None):
        """Send one request. Try again while the service is busy.

        Try again after a broken connection only where the service has responded before.
        Raises UsageError where the token is refused, OSError where no response arrives.
        """
        for left in range(TRIES - 1, -1, -1):
            try:
                status, received, body = self._once(path, data, headers or {})
            except (OSError, http.client.HTTPException) as error:
                if not (left and self.reached):
                    raise OSError(getattr(error, "reason", None) or error) from None
                time.sleep(RETRY_S)
                continue
            self.reached = True
            if status in (401, 403):
                raise self.error(
                    f"{status}, the service {'refuses this' if self.headers else 'asks for a'}"
                    " token: set the environment variable API_KEY to one that it knows"
                )
            if status != 503 or not left:
                return status, received, body
            time.sleep(retry_after(received))

    def _once(self, path, data, headers):
        try:
            request = urllib.request.Request(self.url + path, data, {**self.headers, **headers})
            with self.opener.open(request, timeout=TIMEOUT_S) as response:
                return response.status, response.headers, json_object(response.read(RESPONSE_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, json_object(error.read(RESPONSE_BYTES))
        except ValueError as error:  # a port that is no number, a host with a blank
            raise UsageError(f"--url {self.url}: {error}") from None

    def model(self):
        """GET /model: the serving model, with its version and golden_floor checked.

        Raises UsageError.
        """
        try:
            status, _, body = self.ask("/model")
        except OSError as error:
            raise self.error(
                f"cannot be reached ({error}); is the service running there?"
            ) from None
        body = body or {}
        if status != 200 and "error" in body:
            raise self.error(f"GET /model returned {status}: {body['error']}")
        version, floor = body.get("version"), body.get("golden_floor", "")
        if not isinstance(version, str) or not (floor is None or type(floor) in (int, float)):
            raise self.error(
                f"GET /model returned {status} and names no model; name the service's own address"
            )
        return body


def json_object(data):
    """Bytes -> JSON object, or None where they hold none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def retry_after(headers):
    """Seconds to wait before the next try, at most LONGEST_WAIT_S."""
    seconds = headers.get("Retry-After", "")
    if seconds.isascii() and seconds.isdigit():
        return min(int(seconds), LONGEST_WAIT_S)
    return RETRY_S


def classify(service, path):
    """Image file -> (classification, model version), or (the reason for no verdict, None).

    Raises UsageError.
    """
    try:
        body, content_type = form(read_bytes(path))
    except UsageError as error:
        return str(error), None
    try:
        status, headers, result = service.ask("/classify", body, {"Content-Type": content_type})
    except OSError as error:
        service.model()  # raises where the service is gone, not this connection alone
        return f"the connection broke ({error}); is it larger than the service takes?", None
    result = result or {}
    if status != 200:
        reason = result.get("error") or http.client.responses.get(status, "no reason given")
        return f"{status}: {reason}", None
    version = headers.get("X-Model-Version")
    if result.get("classification") not in CLASSES or not version:
        raise service.error(
            f"POST /classify returned {status} without a verdict; name the service's own address"
        )
    return result["classification"], version


def form(data):
    """Bytes of an image -> (body, content type) of a multipart form with the field `image`."""
    from requests import Request

    image = ("image", data, "application/octet-stream")
    request = Request("POST", "http://service", files={"image": image}).prepare()
    return request.body, request.headers["Content-Type"]


# ---- the run ----


def read_golden(data_dir):
    """Folder -> [(path, 'real' | 'fake', group number)], duplicate files once. Raises UsageError.

    The order is shuffled. If the model changes during the run, both versions see both classes.
    """
    from tqdm import tqdm

    entries = list_images(data_dir)
    names = ("label", "path", "source", "group")
    columns = {f"{name}s": np.array([getattr(entry, name) for entry in entries]) for name in names}
    read = tqdm(entries, "reading", unit="image", delay=SOON, disable=None)
    hashes, thumbs = zip(*(describe(Path(data_dir, entry.path)) for entry in read), strict=True)
    columns |= {"sha256": np.array(hashes), "thumb": np.stack(thumbs)}
    refuse_both_labels(columns, f"--data_dir {data_dir}")
    rows = np.sort(np.unique(columns["sha256"], return_index=True)[1])
    if len(rows) < len(entries):
        say(f"left out: {len(entries) - len(rows)} copies of other images in {data_dir}")
    groups, _ = make_groups({name: values[rows] for name, values in columns.items()})
    chosen = [
        (Path(data_dir, entries[row].path), CLASSES[entries[row].label], group)
        for row, group in zip(rows, groups.tolist(), strict=True)
    ]
    random.Random(0).shuffle(chosen)
    return chosen


def describe(path):
    """Image file -> (SHA-256, thumbnail uint8 [64]).

    A file that cannot be read resembles no other. `run_through` reports and counts it.
    """
    digest, thumb = str(path), np.zeros(64, np.uint8)
    with suppress(UsageError, ImageError):
        data = read_bytes(path)
        digest = sha256(data)
        thumb = thumbnail(decode_image(data, HUGE))
    return digest, thumb


def refuse_both_labels(columns, given):
    """Raises UsageError for one picture under both labels. `given`: the flag and its value."""
    for digest in np.intersect1d(*(columns["sha256"][columns["labels"] == k] for k in (0, 1)))[:1]:
        same = columns["sha256"] == digest
        fake, real = (columns["paths"][same & (columns["labels"] == k)][0] for k in (1, 0))
        raise UsageError(
            f"{given}: {fake} and {real} are one picture under both labels; remove the wrong one"
        )


def run_through(service, images, version):
    """Post all images -> {version: {'real': [(right or not, group)], 'fake': ..., 'errors': n}}.

    A verdict counts for the version in its header. An image without a verdict counts for the
    version of the last verdict, at first for `version`.
    """
    from tqdm import tqdm

    tallies = defaultdict(lambda: {**{label: [] for label in CLASSES}, "errors": 0})
    tally = tallies[version]
    asked = tqdm(images, "asking the service", unit="image", delay=SOON, disable=None)
    for path, label, group in asked:
        result, by = classify(service, path)
        if by is None:
            asked.write(printable(f"no verdict on {path}: {result}"), file=sys.stderr)
            tally["errors"] += 1
        else:
            tally = tallies[by]
            tally[label].append((result == label, group))
    return tallies


def tally_of(judged):
    """`Judged` of comparison.py -> the tally that the service's verdicts would make.

    Images that trained the model do not count.
    """
    new = ~trained_on(judged.model, judged.columns["sha256"])
    columns = {name: judged.columns[name][new] for name in COLUMNS}
    right = (judged.p_fake[new] >= judged.model["threshold"]) == columns["labels"]
    scored = np.stack([right, make_groups(columns)[0]], axis=1)
    return {name: scored[columns["labels"] == k] for k, name in enumerate(CLASSES)} | {"errors": 0}


def accuracies(tally):
    """Tally of one version -> (accuracy on reals, accuracy on fakes, balanced accuracy).

    Each is {'value', 'interval', 'n'}.
    """
    real, fake = (intervals.share(*np.reshape(tally[label], (-1, 2)).T) for label in CLASSES)
    return real, fake, metrics.of_both(real, fake)


def table(tallies, floors):
    """The printed result, one line for each version."""
    width = max(len("version"), *map(len, tallies))
    lines = [
        f"{'version':{width}}  images  errors  {'reals right':18}  {'fakes right':18} "
        f" {'balanced accuracy':18}  floor"
    ]
    for version, tally in tallies.items():
        shares, floor = accuracies(tally), floors.get(version)
        words = "  ".join(f"{intervals.words(share):18}" for share in shares)
        lines.append(
            f"{version:{width}}  {shares[2]['n']:6}  {tally['errors']:6}  {words}  "
            + ("none" if floor is None else f"{floor:.2f}")
        )
    return "\n".join(lines)


def without_floor(tallies, floors):
    """A line for each version that has no floor, with the reason."""
    return [
        f"{version} has no floor: "
        + ("its model holds no test metrics" if version in floors else "it served only in between")
        for version in tallies
        if floors.get(version) is None
    ]


def below(version, balanced, floor):
    """A line where the balanced accuracy is below the floor, else None."""
    if floor is None or balanced["value"] is None or balanced["value"] >= floor:
        return None
    chance = (
        f"; {balanced['n']} images are too few to rule out chance"
        if balanced["interval"][1] >= floor
        else ""
    )
    return (
        f"{version}: balanced accuracy {intervals.words(balanced, 3)} is below the floor"
        f" {floor:.3f}, the lower end of the interval on its test images{chance}"
    )


def complaints(tallies, floors, total, changed):
    """A line for each problem of the run."""
    lines = [
        below(version, accuracies(tally)[2], floors.get(version))
        for version, tally in tallies.items()
    ]
    if errors := sum(tally["errors"] for tally in tallies.values()):
        lines.append(f"{errors} of {total} images have no verdict")
    if changed:
        lines.append(
            f"the model changed during the run ({' -> '.join({**tallies, **floors})}): run it again"
            " to measure one model on all images"
        )
    return [line for line in lines if line]


# ---- the Pushgateway ----

GAUGES = {
    "accuracy": "Balanced accuracy on the golden images",
    "floor": "Lower end of the 95% interval of the balanced accuracy on the model's test images",
    "images": "Golden images with a verdict",
    "errors": "Golden images without a verdict",
    "run_timestamp_seconds": "When the run ended",
}


def figures(tally, floor, changed):
    """The value of each of GAUGES for one version, None where it was not measured.

    Where the model changed during the run, accuracy and timestamp are None. A few images are no
    reason for an alert, and nothing has measured the model that serves now.
    """
    balanced = accuracies(tally)[2]
    return {
        "accuracy": None if changed else balanced["value"],
        "floor": floor,
        "images": balanced["n"],
        "errors": tally["errors"],
        "run_timestamp_seconds": None if changed else time.time(),
    }


def push(gateway, tallies, floors, changed):
    """Send the metrics of a run to a Pushgateway. Raises UsageError.

    The PUT replaces everything that the job sent before. Otherwise a retired version would raise
    alerts for ever. Two services (staging, production) therefore need a gateway each. After a run
    that ended early, the old metrics stay, and their timestamp shows their age.
    """
    from prometheus_client import CollectorRegistry, Gauge, push_to_gateway

    registry = CollectorRegistry()
    gauges = {
        name: Gauge(f"detector_golden_{name}", text, ("model_version",), registry=registry)
        for name, text in GAUGES.items()
    }
    for version, tally in tallies.items():
        for name, value in figures(tally, floors.get(version), changed).items():
            if value is not None:  # 0 would be a measurement
                gauges[name].labels(version).set(value)
    try:
        push_to_gateway(gateway, job=JOB, registry=registry, timeout=10)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # the response of a gateway that refuses
        url = gateway if "://" in gateway else f"http://{gateway}"
        raise UsageError(
            f"--pushgateway {gateway}: the metrics could not be sent ({error}); is a Pushgateway"
            f" running there?{behind_proxy(url)}"
        ) from None
