"""What operators see: metrics for Prometheus, drift, and a log of JSON objects on stderr.

telemetry = Telemetry()
telemetry.stage_seconds.labels("decode").observe(0.02)
say_event("verdict", request_id="...", classification="real")
"""

import itertools
import json
import logging
import threading
import time

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from detector.model.score import standardise

disable_created_metrics()  # nobody uses the second series that says when a counter began

LOG = logging.getLogger("detector")
BINS = 10  # tenths of the model's reference scores
WINDOW = 250  # images in the mean of recent features: half of its weight lies on the last 173


# ---- logs ----


def say_event(event, level="info", exc_info=False, **fields):
    """One JSON line. Never an image, never a token."""
    LOG.log(getattr(logging, level.upper()), event, extra={"fields": fields}, exc_info=exc_info)


class JsonFormatter(logging.Formatter):
    """{"time": ISO 8601 UTC, "level", "event", ...} for our own lines.

    Lines of other packages, such as gunicorn, have their text under "message".
    """

    def format(self, record):
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{seconds}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        if hasattr(record, "fields"):
            line |= {"event": record.msg, **record.fields}
        else:
            line |= {"event": record.name.split(".")[0], "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


# gunicorn's `logconfig_dict`: all lines go through the one formatter
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "detector.service.telemetry.JsonFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
    "loggers": {"gunicorn.error": {"level": "INFO", "handlers": ["stderr"], "propagate": False}},
}


# ---- metrics ----


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
STAGES = ("wait", "turn", "read", "decode", "encode", "classify")
REASONS = ("queue_full", "queue_timeout", "not_ready", "unauthorized", "slow_body")
RESULTS = ("ok", "failed")
MODEL = ("version", "commit", "sha256", "encoder", "identity", "precision", "demonstration")
# (kind, name, help, labels, and a histogram's buckets); the name is an attribute of Telemetry
METRICS = (
    (Counter, "requests", "Responses", ("route", "status")),
    (Histogram, "request_seconds", "Seconds of a whole request", ("route", "status"), SECONDS),
    (
        Histogram,
        "stage_seconds",
        "Seconds of a stage: wait (for a slot), turn (in a slot, for the decoding and the forward"
        " passes of others), read (the body), decode (bytes to the encoder's input), encode (a"
        " forward pass), classify",
        ("stage",),
        SECONDS,
    ),
    (Gauge, "queue_depth", "Requests that wait for a slot", ()),
    (Gauge, "slots", "Most requests that are processed at a time", ()),
    (Gauge, "slots_busy", "Slots in use now", ()),
    (
        Counter,
        "rejections",
        "Refused requests: queue_full, queue_timeout, not_ready, unauthorized, slow_body (the body"
        " came too late, or its client gave up)",
        ("reason",),
    ),
    (Counter, "image_errors", "Refused images, by the HTTP status that fits", ("status",)),
    (Counter, "verdicts", "Verdicts", ("model_version", "classification")),
    (Counter, "uncertain", "Verdicts in the model's uncertain band", ("model_version",)),
    (
        Counter,
        "decisions",
        "Decisions by REVIEW_LOW and REVIEW_HIGH: pass, review, reject",
        ("model_version", "decision"),
    ),
    (Histogram, "confidence", "Confidence of verdicts", (), SHARES),
    (
        Counter,
        "scores",
        "Verdicts by tenth of the model's reference scores",
        ("model_version", "bin"),
    ),
    (
        Gauge,
        "reference_share",
        "Share of the model's reference (out-of-fold) scores in each bin",
        ("model_version", "bin"),
    ),
    (
        Gauge,
        "feature_distance",
        "Distance of the mean of recent features from the means of the training classes, in"
        " training deviations",
        ("model_version",),
    ),
    (Gauge, "model_info", "The model that serves: 1", MODEL),
    (Counter, "reloads", "Reloads of model and keys, by result: ok, failed", ("result",)),
    (Gauge, "ready", "1 when the service can give verdicts", ()),
    (Counter, "feedback", "Correct labels that users sent", ("label",)),
)


class Telemetry:
    """The metrics, in a registry of their own. There is one process, so nothing to merge."""

    def __init__(self):
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        for kind, name, text, labels, *buckets in METRICS:
            options = {"buckets": buckets[0]} if buckets else {}
            metric = kind(f"detector_{name}", text, labels, registry=self.registry, **options)
            setattr(self, name, metric)
        self._start_at_zero()
        self.drift, self._lock = None, threading.Lock()
        self._refused, self._logged = 0, 0.0  # refused uploads, and when a line last said so

    def _start_at_zero(self):
        """A counter that appears with its first event has no increase for Prometheus to see."""
        for metric, values in (
            (self.stage_seconds, STAGES),
            (self.reloads, RESULTS),
            (self.rejections, REASONS),
        ):
            for value in values:
                metric.labels(value)
        for route, status in itertools.product(("/classify", "/classify/batch"), (200, 500, 503)):
            self.requests.labels(route, status)

    def watch(self, slots):
        """Let the gauges read the slots at each scrape."""
        self.slots.set(slots.count)
        self.queue_depth.set_function(lambda: slots.waiting)
        self.slots_busy.set_function(lambda: slots.busy)

    def serve(self, detector, names):
        """A model begins to serve: show its names and its reference, and restart the drift."""
        self.drift = Drift(detector.model)
        for gauge in (self.model_info, self.reference_share, self.feature_distance):
            gauge.clear()
        self.model_info.labels(**names).set(1)
        version = names["version"]
        for number, share in enumerate(self.drift.reference):
            self.reference_share.labels(version, str(number)).set(share)
            self.scores.labels(version, str(number))  # 0 from the first scrape
        self.feature_distance.labels(version).set_function(self.drift.distance)
        self.ready.set(1)

    def turned_away(self, route, reason, seconds):
        """Count an upload that got its 503 at once.

        At most one line a second is logged, with the total so far.
        """
        self.requests.labels(route, 503).inc()
        self.request_seconds.labels(route, 503).observe(seconds)
        self.rejections.labels(reason).inc()
        with self._lock:
            self._refused, now = self._refused + 1, time.monotonic()
            if now < self._logged + 1:
                return
            self._logged, total = now, self._refused
        say_event("turned_away", level="warning", reason=reason, total=total)

    def verdict(self, detector, facts, score, features):
        """Count a verdict; `score` is its decision value, `features` float32 [d]."""
        version = detector.model["versions"]["model"]
        self.verdicts.labels(version, facts["classification"]).inc()
        self.confidence.observe(facts["confidence"])
        if facts["uncertain"]:
            self.uncertain.labels(version).inc()
        if "decision" in facts:
            self.decisions.labels(version, facts["decision"]).inc()
        drift = self.drift  # a reload may replace it meanwhile
        if drift.model is detector.model:  # a verdict of the model before has another reference
            self.scores.labels(version, str(drift.bin(score))).inc()
            drift.add(features)


class Drift:
    """How far live images are from the images that the model was trained on.

    `reference`: share of the model's out-of-fold scores in each of BINS bins between their
    quantiles, float64 [BINS].
    `distance()`: from the exponentially weighted mean of recent standardised features to the line
    between the means of the two training classes, as a root mean square over the features. The
    distance that so few images have by chance is subtracted. 0 is some mix of the training
    classes, 1 is one training deviation away. A change of the mix does not move it.
    """

    def __init__(self, model):
        stored = model["out_of_fold"]
        scores = stored["scores"][stored["view"] == 0].astype(np.float64)
        self.edges = np.quantile(scores, np.arange(1, BINS) / BINS)
        self.reference = np.bincount(
            np.searchsorted(self.edges, scores, "right"), minlength=BINS
        ) / len(scores)
        self.model, self.mean, self.noise = model, np.zeros(len(model["center"])), 0.0
        self.seen, self._lock = 0, threading.Lock()

    def bin(self, score):
        """Decision value -> bin 0 .. BINS - 1."""
        return int(np.searchsorted(self.edges, score, "right"))

    def add(self, features):
        """Take the features of one image, float32 [d], into the mean."""
        row = standardise(self.model, features[None])[0]
        with self._lock:
            self.seen += 1
            weight = max(1 / self.seen, 1 / WINDOW)
            self.mean = self.mean + weight * (row - self.mean)
            # The sum of squared weights is the variance of a mean of white noise.
            self.noise = (1 - weight) ** 2 * self.noise + weight**2

    def distance(self):
        if not self.seen:
            return 0.0
        with self._lock:
            mean, noise = self.mean, self.noise
        start, end = self.model["means"].astype(np.float64)
        line = end - start
        along = np.clip((mean - start) @ line / max(line @ line, 1e-12), 0, 1)
        away = mean - start - along * line
        return float(np.sqrt(max(0.0, (away * away).mean() - noise)))
