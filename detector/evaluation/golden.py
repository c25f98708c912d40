"""A labelled folder through a live service: accuracy of each model version, against its floor."""

import http.client
import json
import random
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from detector.base.addresses import behind_proxy
from detector.base.console import say
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.base.files import read_bytes, sha256
from detector.evaluation import metrics
from detector.images.folders import list_images

TRIES = 5  # of one request, while the service is busy or cannot be reached for a moment
RETRY_S = 1  # between them, where the service names no time
LONGEST_WAIT_S = 60  # whatever it names
TIMEOUT_S = 60  # of one request; the service itself gives up earlier
ANSWER_BYTES = 1 << 20
JOB = "detector-golden"


# ---- the service ----


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would carry the token on to wherever it points."""

    def redirect_request(self, *_):
        return None


class Service:
    """The service at a URL. service.ask("/model") -> (status, headers, JSON object or None)"""

    def __init__(self, url, token=""):
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--url {url}: must begin with http:// or https://")
        if not (token.isascii() and token.isprintable()):  # said without the token
            raise UsageError(
                "API_KEY: holds characters that no header may carry; set it to the token alone"
            )
        self.url, self.reached = url.rstrip("/"), False
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.opener = urllib.request.build_opener(NoRedirect)

    def error(self, text):
        """One that names the address, and a proxy before it."""
        return UsageError(f"--url {self.url}: {text}{behind_proxy(self.url)}")

    def ask(self, path, data=None, headers=None):
        """One request; again while the service is busy, or cannot be reached though it has answered before.

        Raises UsageError where the token is refused, OSError where nothing answers.
        """
        for left in range(TRIES - 1, -1, -1):
            try:
                status, answered, body = self._once(path, data, headers or {})
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
                return status, answered, body
            time.sleep(retry_after(answered))

    def _once(self, path, data, headers):
        try:
            request = urllib.request.Request(self.url + path, data, {**self.headers, **headers})
            with self.opener.open(request, timeout=TIMEOUT_S) as response:
                return response.status, response.headers, as_object(response.read(ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, as_object(error.read(ANSWER_BYTES))
        except ValueError as error:  # a port that is no number, a host with a blank
            raise UsageError(f"--url {self.url}: {error}") from None

    def model(self):
        """GET /model of the model that serves now, its version and golden_floor checked. Raises UsageError."""
        try:
            status, _, body = self.ask("/model")
        except OSError as error:
            raise self.error(
                f"cannot be reached ({error}); is the service running there?"
            ) from None
        body = body or {}
        if status != 200 and "error" in body:
            raise self.error(f"GET /model answers {status}: {body['error']}")
        version, floor = body.get("version"), body.get("golden_floor", "")
        if not isinstance(version, str) or not (floor is None or type(floor) in (int, float)):
            raise self.error(
                f"GET /model answers {status} and names no model; name the service's own address"
            )
        return body


def as_object(data):
    """Bytes -> JSON object, None where they are none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def retry_after(headers):
    """Seconds that a busy service asks for."""
    given = headers.get("Retry-After", "")
    return min(int(given), LONGEST_WAIT_S) if given.isascii() and given.isdigit() else RETRY_S


def classify(service, path):
    """Image file -> (classification, model version), or (why there is none, None). Raises UsageError."""
    try:
        boundary, data = uuid.uuid4().hex, read_bytes(path)
    except UsageError as error:
        return str(error), None
    body = (
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        + data
        + f"\r\n--{boundary}--\r\n".encode()
    )
    try:
        status, headers, answer = service.ask(
            "/classify", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )
    except OSError as error:
        service.model()  # a service that is gone ends the run; one that cut off this image alone does not
        return f"the connection broke ({error}); is it larger than the service takes?", None
    if status != 200:
        return (
            (
                f"{status}:"
                f" {(answer or {}).get('error') or http.client.responses.get(status, 'no reason given')}"
            ),
            None,
        )
    version = headers.get("X-Model-Version")
    if (answer or {}).get("classification") not in CLASSES or not version:
        raise service.error(
            f"POST /classify answers {status} without a verdict; name the service's own address"
        )
    return answer["classification"], version


# ---- the run ----


def read_golden(data_dir):
    """Folder -> [(path, 'real' | 'fake')], each picture once. In a drawn order: should the model change during the run,
    both versions have seen both classes. Raises UsageError."""
    first, chosen, entries = {}, [], list_images(data_dir)
    for entry in entries:
        path = Path(data_dir, entry.path)
        try:
            digest = sha256(read_bytes(path))
        except UsageError:  # told and counted when its turn comes
            digest = entry.path
        if digest not in first:
            first[digest] = entry
            chosen.append((path, CLASSES[entry.label]))
        elif first[digest].label != entry.label:
            raise UsageError(
                f"--data_dir {data_dir}: {first[digest].path} and {entry.path} are one picture"
                " under both labels; remove the wrong one"
            )
    if len(chosen) < len(entries):
        say(f"left out: {len(entries) - len(chosen)} copies of other images in {data_dir}")
    random.Random(0).shuffle(chosen)
    return chosen


def run_through(service, images, version):
    """Post them all -> {version: {'real': [right or not], 'fake': [...], 'errors': n}}. A verdict is that of the version in its
    header; an image without one counts for the version seen last, at first `version`."""
    found = {}

    def entry(name):
        return found.setdefault(name, {**{label: [] for label in CLASSES}, "errors": 0})

    entry(version)
    for path, label in images:
        said, by = classify(service, path)
        if by is None:
            say(f"no verdict on {path}: {said}")
            entry(version)["errors"] += 1
        else:
            version = by
            entry(version)[label].append(said == label)
    return found


def accuracies(tally):
    """Of one version -> (reals right, fakes right, balanced accuracy), each {'value', 'interval', 'n'}."""
    real, fake = (metrics.share(tally[label]) for label in CLASSES)
    return real, fake, metrics.of_both(real, fake)


def table(found, floors):
    width = max(len("version"), *map(len, found))
    lines = [
        f"{'version':{width}}  images  errors  {'reals right':18}  {'fakes right':18} "
        f" {'balanced accuracy':18}  floor"
    ]
    for version, tally in found.items():
        shares, floor = accuracies(tally), floors.get(version)
        words = "  ".join(f"{metrics.words(share):18}" for share in shares)
        lines.append(
            f"{version:{width}}  {shares[2]['n']:6}  {tally['errors']:6}  {words}  "
            + ("none" if floor is None else f"{floor:.2f}")
        )
    return "\n".join(lines)


def below(version, balanced, floor):
    """The line that says so where the accuracy is below its floor, else None."""
    if floor is None or balanced["value"] is None or balanced["value"] >= floor:
        return None
    chance = (
        f"; {balanced['n']} images are too few to rule out chance"
        if balanced["interval"][1] >= floor
        else ""
    )
    return (
        f"{version}: balanced accuracy {metrics.words(balanced, 3)} is below the floor {floor:.3f},"
        f" the lower end of what its test images gave{chance}"
    )


def complaints(found, floors, total, changed):
    """What is wrong with the run, a line each."""
    lines = [
        below(version, accuracies(tally)[2], floors.get(version))
        for version, tally in found.items()
    ]
    if errors := sum(tally["errors"] for tally in found.values()):
        lines.append(f"{errors} of {total} images have no verdict")
    if changed:
        lines.append(
            f"the model changed during the run ({' -> '.join({**found, **floors})}): run it again"
            " for figures of one model on all images"
        )
    return [line for line in lines if line]


def push(gateway, found, floors, changed):
    """Send the figures. A PUT, which replaces all that the job sent before: a version that serves no more must not stand there
    for ever, and raise an alarm for ever. What it costs: two services (staging, production) need a gateway each. After a
    run that ended early the old figures stay; their timestamp says how old they are. Where the model changed during the run,
    accuracy and timestamp are not sent: a handful of images is nothing to alarm on, and the model that serves now has yet
    to be measured."""
    from prometheus_client import CollectorRegistry, Gauge, push_to_gateway

    registry = CollectorRegistry()
    accuracy, floor, images, errors, stamp = (
        Gauge(f"detector_golden_{name}", text, ("model_version",), registry=registry)
        for name, text in (
            ("accuracy", "Balanced accuracy on the golden images"),
            (
                "floor",
                (
                    "Lower end of the 95% interval of the balanced accuracy on the model's own test"
                    " images"
                ),
            ),
            ("images", "Golden images with a verdict"),
            ("errors", "Golden images without a verdict"),
            ("run_timestamp_seconds", "When the run ended"),
        )
    )
    for version, tally in found.items():
        balanced = accuracies(tally)[2]
        for gauge, value in (
            (accuracy, None if changed else balanced["value"]),
            (floor, floors.get(version)),
            (images, balanced["n"]),
            (errors, tally["errors"]),
            (stamp, None if changed else time.time()),
        ):
            if value is not None:  # no figure is no figure, not 0
                gauge.labels(version).set(value)
    try:
        push_to_gateway(gateway, job=JOB, registry=registry, timeout=10)
    except (OSError, http.client.HTTPException, ValueError) as error:
        url = gateway if "://" in gateway else f"http://{gateway}"
        raise UsageError(
            f"--pushgateway {gateway}: the figures could not be sent ({error}); is a Pushgateway"
            f" running there?{behind_proxy(url)}"
        ) from None
