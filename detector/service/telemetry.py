"""What operators see: metrics for Prometheus, drift among them, and one JSON object a line on stderr.

telemetry = Telemetry()
telemetry.stage.labels("decode").observe(0.02)
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

disable_created_metrics()  # a second series beside each counter that says when it began: nobody asks

LOG = logging.getLogger("detector")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BINS = 10  # tenths of the model's reference scores
WINDOW = 250  # images that the mean of recent features remembers: half of its weight lies on the last 173


# ---- logs ----


def say_event(event, level="info", exc_info=False, **fields):
    """One JSON line. Never an image, never a token."""
    LOG.log(getattr(logging, level.upper()), event, extra={"fields": fields}, exc_info=exc_info)


class JsonFormatter(logging.Formatter):
    """{"time": ISO 8601 UTC, "level", "event", ...}; lines that are not ours (gunicorn's) stand under "message"."""

    def format(self, record):
        stamp = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z"
        )
        line = {"time": stamp, "level": record.levelname.lower()}
        if hasattr(record, "fields"):
            line |= {"event": record.msg, **record.fields}
        else:
            line |= {"event": record.name.split(".")[0], "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


# gunicorn's `logconfig_dict`: all of it through the one formatter
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "detector.service.telemetry.JsonFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
    "loggers": {"gunicorn.error": {"level": "INFO", "handlers": ["stderr"], "propagate": False}},
}


# ---- metrics ----


class Telemetry:
    """The metrics, in a registry of their own (one process, so nothing to merge)."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def new(kind, name, text, labels=(), **more):
            return kind(f"detector_{name}", text, labels, registry=registry, **more)

        self.requests = new(Counter, "requests", "Requests answered", ("route", "status"))
        self.seconds = new(
            Histogram, "request_seconds", "Whole requests", ("route", "status"), buckets=SECONDS
        )
        self.stage = new(
            Histogram,
            "stage_seconds",
            "Stages of a verdict: wait (for a slot), turn (in it, for others' decoding and passes),"
            " read (the body), decode (to the encoder's input), encode (a forward pass), classify",
            ("stage",),
            buckets=SECONDS,
        )
        self.queue = new(Gauge, "queue_depth", "Requests that wait for a slot")
        self.slots = new(Gauge, "slots", "Requests that are worked on at a time, at most")
        self.busy = new(Gauge, "slots_busy", "Requests that are worked on now")
        self.rejections = new(
            Counter,
            "rejections",
            "Requests turned away: queue_full, queue_timeout, not_ready, "
            "unauthorized, slow_body (late, or its sender gave up)",
            ("reason",),
        )
        self.image_errors = new(
            Counter, "image_errors", "Images refused, by the status that fits", ("status",)
        )
        self.verdicts = new(Counter, "verdicts", "Verdicts", ("model_version", "classification"))
        self.uncertain = new(
            Counter,
            "uncertain",
            "Verdicts inside the model's band of uncertainty",
            ("model_version",),
        )
        self.confidence = new(
            Histogram,
            "confidence",
            "Confidence of verdicts",
            buckets=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1),
        )
        self.scores = new(
            Counter,
            "scores",
            "Verdicts by tenth of the model's reference scores",
            ("model_version", "bin"),
        )
        self.reference = new(
            Gauge,
            "reference_share",
            "Share of the model's reference (out-of-fold) scores in each bin",
            ("model_version", "bin"),
        )
        self.distance = new(
            Gauge,
            "feature_distance",
            "Distance of the mean of recent features from the training classes' "
            "means, in training deviations",
            ("model_version",),
        )
        self.info = new(
            Gauge,
            "model_info",
            "The model that serves: 1",
            ("version", "commit", "sha256", "encoder", "identity", "precision", "demonstration"),
        )
        self.reloads = new(
            Counter, "reloads", "Models and keys read again, by result: ok, failed", ("result",)
        )
        self.ready = new(Gauge, "ready", "1 once verdicts can be given")
        self.feedback = new(Counter, "feedback", "Right labels that users sent", ("label",))
        self.drift, self.away, self.told, self._lock = None, 0, 0.0, threading.Lock()
        for metric, values in (
            (self.stage, ("wait", "turn", "read", "decode", "encode", "classify")),
            (self.reloads, ("ok", "failed")),
            (
                self.rejections,
                ("queue_full", "queue_timeout", "not_ready", "unauthorized", "slow_body"),
            ),
        ):
            for value in values:  # there from the first scrape: a counter that appears with its first event has no increase
                metric.labels(value)
        for route, status in itertools.product(("/classify", "/classify/batch"), (200, 500, 503)):
            self.requests.labels(route, status)

    def watch(self, slots):
        """Gauges read from the slots when they are asked for."""
        self.slots.set(slots.count)
        self.queue.set_function(lambda: slots.waiting)
        self.busy.set_function(lambda: slots.busy)

    def serve(self, detector, names):
        """A model begins to serve: its names, its reference, and drift measured from now on."""
        self.drift = Drift(detector.model)
        for gauge in (self.info, self.reference, self.distance):
            gauge.clear()
        self.info.labels(**names).set(1)
        for number, share in enumerate(self.drift.reference):
            self.reference.labels(names["version"], str(number)).set(share)
            self.scores.labels(names["version"], str(number))  # there from the first scrape, at 0
        self.distance.labels(names["version"]).set_function(self.drift.distance)
        self.ready.set(1)

    def turned_away(self, route, reason, seconds):
        """Count an upload that got its 503 at once. At most one line a second says how many there were."""
        self.requests.labels(route, 503).inc()
        self.seconds.labels(route, 503).observe(seconds)
        self.rejections.labels(reason).inc()
        with self._lock:
            self.away, now = self.away + 1, time.monotonic()
            if now < self.told + 1:
                return
            self.told, total = now, self.away
        say_event("turned_away", level="warning", reason=reason, total=total)

    def verdict(self, detector, facts, score, features):
        """Count one; `score` its decision value, `features` float32 [d]."""
        version = detector.model["versions"]["model"]
        self.verdicts.labels(version, facts["classification"]).inc()
        self.confidence.observe(facts["confidence"])
        if facts["uncertain"]:
            self.uncertain.labels(version).inc()
        drift = self.drift  # a reload may replace it meanwhile
        if (
            drift.model is detector.model
        ):  # one that began under the model before belongs to no reference
            self.scores.labels(version, str(drift.bin(score))).inc()
            drift.add(features)


class Drift:
    """How far live images are from those that the model was trained on.

    `reference`: share of the model's out-of-fold scores in each of BINS bins between their quantiles, float64 [BINS].
    `distance()`: of the exponentially weighted mean of recent standardised features from the line between the means of
    the two training classes, root mean square over the features, what so few images give by chance subtracted. 0: some
    mix of the training classes; 1: one training deviation away. The mix itself does not move it.
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
        """float32 [d]: one image's."""
        from detector.model.score import standardise

        row = standardise(self.model, features[None])[0]
        with self._lock:
            self.seen += 1
            weight = max(1 / self.seen, 1 / WINDOW)
            self.mean = self.mean + weight * (row - self.mean)
            self.noise = (
                (1 - weight) ** 2 * self.noise + weight** 2
            )  # sum of squared weights: variance of a mean of white noise

    def distance(self):
        if not self.seen:
            return 0.0
        with self._lock:
            mean, noise = self.mean, self.noise
        start, line = (
            self.model["means"][0].astype(np.float64),
            np.subtract(*self.model["means"][::-1].astype(np.float64)),
        )
        along = np.clip((mean - start) @ line / max(line @ line, 1e-12), 0, 1)
        away = mean - start - along * line
        return float(np.sqrt(max(0.0, (away * away).mean() - noise)))
