"""The model in service: loaded and proved before it serves, swapped without losing a request, and the queue before it.

engine = Engine(read_settings(), Telemetry())    # loads in a thread; engine.detector is None until a model has proved itself
waited, facts = engine.judge(engine.ready(), [data])   # Busy where there is no model yet, or too many wait already
engine.reload()                                  # the file anew; a broken one leaves the old model serving
"""

import collections
import contextlib
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from detector.base.errors import DetectorError, EncoderError, ImageError, ModelError, UsageError
from detector.base.files import sha256
from detector.base.project import HERE
from detector.encoders import catalogue, runtime
from detector.images import decoding, preprocessing, provenance
from detector.service.settings import read_file, read_keys
from detector.service.telemetry import say_event
from detector.service.together import TOGETHER, Together
from detector.verdict import Detector, encoder_folder, flatten, unflatten

GOLDEN_COSINE, GOLDEN_SHIFT = (
    0.99,
    0.05,
)  # the golden picture's features and probability may differ from the record by this
LARGE_PIXELS = (
    12_000_000  # images above this are decoded one at a time: 50 megapixels take up to 750 MB
)
DECODE_S = 20  # of one request: what made-up files of a batch may hold up the others
LOADING = "the model is still loading"
FAILED = "the model cannot be loaded: the service's log says why"
QUEUE_FULL = "busy: as many requests as may wait are waiting already; try again later"


class Busy(Exception):
    """No verdict now; `reason` is 'queue_full', 'queue_timeout' or 'not_ready'."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class Slots:
    """So many requests in work at a time, so many waiting for a while, first come, first served, and no more.

    slots = Slots(2, limit=16, timeout=5)
    with slots.take() as waited: ...    # seconds; raises Busy at once where `limit` wait, and after `timeout` seconds
    with slots.take(2) as waited: ...   # two of them

    `observe` is called with the seconds of every wait, those that end without a turn too.
    """

    def __init__(self, count, limit, timeout, observe=lambda seconds: None):
        self.count, self.limit, self.timeout, self._observe = count, limit, timeout, observe
        self._lock, self._queue, self.busy = threading.Lock(), collections.deque(), 0

    @property
    def waiting(self):
        return len(self._queue)

    def full(self, places=1):
        """Would one that comes now have to wait, though as many as may do already?"""
        return self.waiting >= self.limit and (self.waiting > 0 or self.busy + places > self.count)

    @contextlib.contextmanager
    def take(self, places=1):
        started, turn = time.perf_counter(), threading.Event()
        with self._lock:
            if self.full(places):
                raise Busy("queue_full", QUEUE_FULL)
            self._queue.append((turn, places))
            self._next()
        turn.wait(self.timeout)
        with self._lock:
            if not turn.is_set():
                self._queue.remove((turn, places))
                self._next()  # one that asked for fewer may stand behind it
        waited = time.perf_counter() - started
        self._observe(waited)
        if not turn.is_set():
            raise Busy(
                "queue_timeout", f"busy: no turn came within {self.timeout} s; try again later"
            )
        try:
            yield waited
        finally:
            with self._lock:
                self.busy -= places
                self._next()

    def _next(self):
        """Give free slots to the one that has waited longest. Called with the lock held."""
        while self._queue and self.busy + self._queue[0][1] <= self.count:
            turn, places = self._queue.popleft()
            self.busy += places
            turn.set()


class SharedDetector(Detector):
    """A detector in service: uploads that wait for its encoder share forward passes.

    `passes`: those of a detector with the same encoder.
    """

    def __init__(self, *args, passes=None, **known):
        super().__init__(*args, **known)
        self.passes = passes or Together(lambda pixels: self.encoder.encode(pixels))

    def shared_features(self, pixels):
        """`pixels` of n images -> (their features as `features` has them, seconds waited for a pass)."""
        features, waited = self.passes(flatten(pixels))
        return unflatten(features, pixels), waited


class Engine:
    """Holds the model that serves. `detector` (a `verdict.Detector`) is replaced whole, so a request keeps the one it
    began with; `error`: it could not be loaded; `keys` are the API keys, {name: SHA-256 of its token}.
    """

    def __init__(self, settings, telemetry):
        self.settings, self.telemetry, self.detector, self.error = settings, telemetry, None, None
        self.keys = read_keys(settings["API_KEYS_FILE"])
        self.slots = Slots(
            slots_of(settings),
            settings["QUEUE_LIMIT"],
            settings["QUEUE_TIMEOUT_S"],
            telemetry.stage.labels("wait").observe,
        )
        telemetry.watch(self.slots)
        self.decoding, self.large = (
            threading.BoundedSemaphore(runtime.processors()),
            threading.Lock(),
        )
        self._asked = queue.SimpleQueue()
        threading.Thread(target=self._keep_loaded, daemon=True).start()

    def ready(self):
        """The detector that serves now. Raises Busy while there is none."""
        if self.detector is None:
            raise Busy("not_ready", self.error or LOADING)
        return self.detector

    def refusal(self):
        """The Busy that an upload which has yet to be read would meet later anyway, or None."""
        if self.slots.full():
            return Busy("queue_full", QUEUE_FULL)
        return Busy("not_ready", self.error or LOADING) if self.detector is None else None

    def reload(self):
        """Read keys and model again, in the engine's own thread. A signal handler calls this: it takes no lock."""
        self._asked.put(None)

    def _keep_loaded(self):
        """The engine's own thread: load, and then again whenever asked; what is asked meanwhile becomes one more time."""
        self._load()
        while True:
            self._asked.get()
            while not self._asked.empty():
                self._asked.get()
            self._reload()

    def _load(self):
        started = time.monotonic()
        try:
            detector = load_detector(self.settings, self.detector)
            if detector is self.detector:  # its drift is measured on
                say_event("unchanged", **named(detector))
                return True
            self.telemetry.serve(detector, named(detector))
        except Exception as error:  # whatever a file on a disk can do: say so and stay as we are
            say_event(
                "load_failed",
                level="error",
                message=f"the model cannot be loaded: {error}",
                old_model_serves=self.detector is not None,
                exc_info=not isinstance(error, DetectorError),
            )
            self.error = FAILED  # the rest is nobody's business: paths and hashes
            return False
        say_event("ready", seconds=round(time.monotonic() - started, 3), **named(detector))
        if "notice" in detector.model:
            say_event("demonstration", level="warning", message=detector.model["notice"])
        self.detector, self.error = detector, None
        return True

    def _reload(self):
        try:
            self.keys = read_keys(self.settings["API_KEYS_FILE"])
            good = True
        except DetectorError as error:
            say_event("load_failed", level="error", message=f"the old keys stay: {error}")
            good = False
        good = self._load() and good
        self.telemetry.reloads.labels("ok" if good else "failed").inc()

    # ---- verdicts ----

    def judge(self, detector, images, details=False):
        """Bytes of images -> (seconds waited in all, one dict of facts an image, in order; `error` and `status` where there
        is no verdict; `provenance` with `details`). Several images take up to half of the slots: beside a batch there is room for
        single ones. Raises Busy."""
        with self.slots.take(min(len(images), max(1, self.slots.count // 2))) as waited:
            end = time.perf_counter() + DECODE_S
            found = [self._decode(detector, data, end, details) for data in images]
            good = [(facts, pixels) for facts, pixels in found if pixels is not None]
            for start in range(0, len(good), TOGETHER):
                self._score(detector, good[start : start + TOGETHER])
        turns = sum(facts.pop("turn_s") for facts, _ in found)
        self.telemetry.stage.labels("turn").observe(turns)
        return waited + turns, [facts for facts, _ in found]

    def _decode(self, detector, data, end, details):
        """Bytes of an image -> (its facts, the encoder's input or None, also where it is past this `end`)."""
        started, facts = (
            time.perf_counter(),
            {"sha256": sha256(data), "bytes": len(data), "turn_s": 0.0},
        )
        if started > end:
            return {
                **facts,
                "status": 503,
                "error": f"the images before it took {DECODE_S} s to decode: send fewer at a time",
            }, None
        try:
            image = decoding.open_image(data, self.settings["MAX_PIXELS"])
            facts |= {"format": image.format, "width": image.width, "height": image.height}
            opened = time.perf_counter()
            with (
                (
                    self.large
                    if image.width * image.height > LARGE_PIXELS
                    else contextlib.nullcontext()
                ),
                self.decoding,
            ):
                facts["turn_s"] = time.perf_counter() - opened
                pixels = detector.pixels(decoding.load_rgb(image))
                if details:
                    facts["provenance"] = provenance.read_provenance(image, data)
        except ImageError as error:
            return {**facts, "status": error.status, "error": str(error)}, None
        facts["decode_s"] = time.perf_counter() - started - facts["turn_s"]
        self.telemetry.stage.labels("decode").observe(facts["decode_s"])
        return facts, pixels

    def _score(self, detector, chunk):
        """[(facts, the encoder's input)] of one forward pass: verdict, probability of fake and seconds into each facts."""
        from detector.model.score import whole_of

        started = time.perf_counter()
        features, waited = detector.shared_features(np.stack([pixels for _, pixels in chunk]))
        encoded = time.perf_counter()
        verdicts = detector.verdicts(features)
        seconds = {"encode": encoded - started - waited, "classify": time.perf_counter() - encoded}
        for stage, taken in seconds.items():
            self.telemetry.stage.labels(stage).observe(taken)
        for (facts, _), found, row in zip(chunk, verdicts, whole_of(features), strict=True):
            facts["turn_s"] += waited / len(chunk)
            facts |= {
                "classification": found.classification,
                "confidence": found.confidence,
                "p_fake": found.p_fake,
                "uncertain": found.uncertain,
                **{f"{stage}_s": taken / len(chunk) for stage, taken in seconds.items()},
            }
            self.telemetry.verdict(detector, facts, found.score, row)


def named(detector):
    """What the log and the metrics call a model."""
    model, encoder = detector.model, detector.encoder
    return {
        "version": model["versions"]["model"],
        "commit": model["versions"]["code"],
        "sha256": model["sha256"],
        "encoder": encoder.name,
        "identity": encoder.identity,
        "precision": encoder.precision,
        "demonstration": str("notice" in model).lower(),
    }


def check(settings):
    """Everything that can be known before serving, in one line: raises DetectorError. Without OpenVINO.

    A named encoder that is missing is prepared by a process of its own: the memory that takes ends with it.
    """
    read_keys(settings["API_KEYS_FILE"])
    model = read_model(settings)
    wanted = model["encoder"]
    if (clip_model := runtime.clip_model_of(wanted)) in catalogue.NAMES and runtime.find_encoder(
        identity=wanted["identity"]
    ) is None:
        prepared = subprocess.run(
            [
                sys.executable,
                HERE / "prepare_clip.py",
                "--clip_model",
                clip_model,
                "--layers",
                wanted["layers"],
            ],
            stdout=sys.stderr,
        )
        if prepared.returncode:
            sys.exit(prepared.returncode)  # it has said why
    check_encoder(settings, model)


def read_model(settings):
    """The model file, if it is the pinned one -> model dict. Raises DetectorError."""
    from detector.model.file import load_model

    path = settings["MODEL_PATH"]
    if not path:
        raise UsageError(
            "MODEL_PATH is not set: name a model file from train_model.py (models/baseline.joblib"
            " is a demonstration)"
        )
    if not Path(path).is_file() and not Path(path).is_dir():  # load_model says what a folder is
        raise UsageError(
            f"MODEL_PATH={path}: no such file; make it with train_model.py, or see a demonstration:"
            " MODEL_PATH=models/baseline.joblib ALLOW_DEMO_MODEL=1"
        )
    model = load_model(path, settings["MODEL_PUBLIC_KEY"])
    if settings["MODEL_SHA256_FILE"]:
        check_pin(settings["MODEL_SHA256_FILE"], model["sha256"], path)
    if "notice" in model and not settings["ALLOW_DEMO_MODEL"]:
        raise UsageError(
            f"MODEL_PATH={path}: {model['notice']}; set ALLOW_DEMO_MODEL=1 to serve it all the same"
        )
    return model


def check_encoder(settings, model):
    """Raises EncoderError unless the model's encoder is prepared."""
    encoder_folder(model["encoder"], settings["MODEL_PATH"], prepare=False)


def check_pin(pin_path, found, model_path):
    """Raises ModelError unless the file (as sha256sum writes it: the hash first) holds this hash."""
    data = read_file(
        "MODEL_SHA256_FILE", pin_path, "a file that sha256sum wrote, or leave it empty"
    )
    words = data.decode(errors="replace").split()
    if not words or words[0].lower() != found:
        raise ModelError(
            f"MODEL_PATH={model_path} has the SHA-256 {found}, MODEL_SHA256_FILE={pin_path} says "
            f"{words[0][:64] if words else 'nothing'}: put the right pair in place"
        )


def load_detector(settings, current=None):
    """-> SharedDetector, warm and proved on the golden picture; `current` itself where it is of the same file. Its encoder and
    its passes are used again where the encoder is the same.

    Raises DetectorError.
    """
    model = read_model(settings)
    if current is not None and current.model["sha256"] == model["sha256"]:
        return current
    check_encoder(settings, model)
    same = current is not None and current.encoder.identity == model["encoder"]["identity"]
    detector = SharedDetector(
        settings["MODEL_PATH"],
        threads=settings["THREADS"] or runtime.processors(),
        model=model,
        encoder=current.encoder if same else None,
        passes=current.passes if same else None,
    )
    prove(detector)
    if not same:
        side = detector.encoder.resolution
        for n in range(1, TOGETHER + 1):  # the first pass of a size takes longer
            detector.encoder.encode(np.zeros((n, 3, side, side), np.float32))
    return detector


def slots_of(settings):
    return settings["SLOTS"] or runtime.processors() + TOGETHER


def prove(detector):
    """The golden picture, from bytes to probability, against what the encoder's record gives. Raises EncoderError."""
    recorded = detector.encoder.manifest.get("golden")
    if not recorded:
        raise EncoderError(
            f"the encoder '{detector.encoder.name}' has no golden features: remove its folder in "
            f"{runtime.cache_dir() / 'encoders'} and run prepare_clip.py again"
        )
    pixels = preprocessing.preprocess(
        decoding.decode_image(runtime.golden_image()), detector.encoder.resolution
    )
    features = np.stack([np.float32(recorded), detector.encoder.encode(pixels[None])[0]])
    cosine = float(
        features[0] @ features[1] / np.linalg.norm(features[0]) / np.linalg.norm(features[1])
    )
    expected, found = (verdict.p_fake for verdict in detector.verdicts(features))
    if not (
        cosine >= GOLDEN_COSINE and abs(found - expected) <= GOLDEN_SHIFT
    ):  # written so that NaN fails
        raise EncoderError(
            f"the golden picture's probability of fake is {found:.3f} on this machine,"
            f" {expected:.3f} by the encoder's record (cosine {cosine:.4f}): verdicts here cannot"
            " be trusted; prepare the encoder again"
        )
