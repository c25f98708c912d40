"""The model in service: how it is loaded, checked and replaced, and the queue in front of it.

engine = Engine(read_settings(), Telemetry())  # loads in a thread; detector is None until then
waited, facts = engine.judge(engine.ready(), [data])  # raises Busy without a model or a free place
engine.reload()  # reads the file again; a broken file leaves the old model serving
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
from detector.model.file import load_model
from detector.model.score import whole_of
from detector.service.settings import read_file, read_keys
from detector.service.telemetry import say_event
from detector.service.together import TOGETHER, Together
from detector.verdict import Detector, encoder_folder, flatten, unflatten

# How far the golden picture's features and probability may differ from the encoder's record.
GOLDEN_COSINE, GOLDEN_SHIFT = 0.99, 0.05
# Larger images are decoded one at a time, because 50 megapixels take up to 750 MB.
LARGE_PIXELS = 12_000_000
DECODE_S = 20  # seconds of decoding in one request, so that a hostile batch delays others no longer
LOADING = "the model is still loading"
FAILED = "the model cannot be loaded: the service's log says why"
QUEUE_FULL = "busy: as many requests as may wait are waiting already; try again later"


class Busy(Exception):
    """No verdict now; `reason` is 'queue_full', 'queue_timeout' or 'not_ready'."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class Slots:
    """Limits the requests in work and the requests that wait, first come, first served.

    slots = Slots(2, limit=16, timeout=5)
    with slots.take() as waited: ...   # seconds; raises Busy at once where `limit` requests wait,
                                       # and after `timeout` seconds
    with slots.take(2) as waited: ...  # two slots

    `observe` is called with the seconds of every wait, also of a wait that ends without a slot.
    """

    def __init__(self, count, limit, timeout, observe=lambda seconds: None):
        self.count, self.limit, self.timeout, self._observe = count, limit, timeout, observe
        self._lock, self._queue, self.busy = threading.Lock(), collections.deque(), 0

    @property
    def waiting(self):
        return len(self._queue)

    def full(self, places=1):
        """Would a request have to wait although the queue is full?"""
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
                self._next()  # the next in the queue may need fewer slots
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
        """Give free slots to the request that has waited longest. Called with the lock held."""
        while self._queue and self.busy + self._queue[0][1] <= self.count:
            turn, places = self._queue.popleft()
            self.busy += places
            turn.set()


class SharedDetector(Detector):
    """A detector in service: uploads that wait for its encoder share forward passes.

    They take turns where a shared pass is no faster. `passes`: those of a detector with the same
    encoder.
    """

    def __init__(self, *args, passes=None, **known):
        super().__init__(*args, **known)
        most = 1 if self.encoder.single else TOGETHER
        self.passes = passes or Together(lambda pixels: self.encoder.encode(pixels), most)

    def features(self, pixels):
        """As in `Detector.features`, in the shared passes."""
        return self.shared_features(pixels)[0]

    def shared_features(self, pixels):
        """`pixels` of n images -> (features as in `Detector.features`, seconds waited)."""
        features, waited = self.passes(flatten(pixels))
        return unflatten(features, pixels), waited


class Engine:
    """Holds the model that serves.

    `detector` (a SharedDetector) is replaced as a whole, so a request keeps the model that it
    began with. `error`: why there is no model. `keys`: API keys, {name: SHA-256 of its token}.
    """

    def __init__(self, settings, telemetry):
        self.settings, self.telemetry, self.detector, self.error = settings, telemetry, None, None
        self.keys = read_keys(settings["API_KEYS_FILE"])
        self.slots = Slots(
            slot_count(settings),
            settings["QUEUE_LIMIT"],
            settings["QUEUE_TIMEOUT_S"],
            telemetry.stage_seconds.labels("wait").observe,
        )
        telemetry.watch(self.slots)
        self.decoding = threading.BoundedSemaphore(runtime.processors())
        self.large, self.explaining = threading.Lock(), threading.Lock()
        self._asked = queue.SimpleQueue()
        threading.Thread(target=self._keep_loaded, daemon=True).start()

    def ready(self):
        """The detector that serves now. Raises Busy while there is none."""
        if self.detector is None:
            raise Busy("not_ready", self.error or LOADING)
        return self.detector

    def refusal(self):
        """The Busy that an upload would meet after it was read, or None."""
        if self.slots.full():
            return Busy("queue_full", QUEUE_FULL)
        return Busy("not_ready", self.error or LOADING) if self.detector is None else None

    def reload(self):
        """Read keys and model again, in the engine's own thread.

        Takes no lock, because a signal handler calls it.
        """
        self._asked.put(None)

    def _keep_loaded(self):
        """The engine's own thread: load, then reload on request.

        All requests that come during a load cause one more load.
        """
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
            if detector is self.detector:  # its drift measurement goes on
                say_event("unchanged", **named(detector))
                return True
            self.telemetry.serve(detector, named(detector))
        except Exception as error:  # a bad file of any kind leaves the old model serving
            say_event(
                "load_failed",
                level="error",
                message=f"the model cannot be loaded: {error}",
                old_model_serves=self.detector is not None,
                exc_info=not isinstance(error, DetectorError),
            )
            self.error = FAILED  # clients must not see paths and hashes
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
        """Bytes of images -> (seconds waited in all, [dict of facts of an image] in order).

        Facts without a verdict have `error` and `status`. With `details` they have `provenance`.
        Several images take up to half of the slots, which leaves room for single images.
        Raises Busy.
        """
        with self.slots.take(min(len(images), max(1, self.slots.count // 2))) as waited:
            end = time.perf_counter() + DECODE_S
            decoded = [self._decode(detector, data, end, details) for data in images]
            good = [(facts, pixels) for facts, pixels in decoded if pixels is not None]
            for start in range(0, len(good), TOGETHER):
                self._score(detector, good[start : start + TOGETHER])
        turns = sum(facts.pop("turn_s") for facts, _ in decoded)
        self.telemetry.stage_seconds.labels("turn").observe(turns)
        return waited + turns, [facts for facts, _ in decoded]

    def explain(self, detector, data):
        """Bytes of an image -> (its facts, the map of `Detector.explain`, or None with an error).

        One map is made at a time. Others have their turn after each of its passes, so verdicts
        go on. Raises Busy.
        """
        if not self.explaining.acquire(blocking=False):
            raise Busy("queue_full", "busy: another map is being made; try again later")
        try:
            with self.slots.take():
                end = time.perf_counter() + DECODE_S
                facts, pixels = self._decode(detector, data, end, details=False)
                return facts, None if pixels is None else detector.explain(pixels)
        finally:
            self.explaining.release()

    def _decode(self, detector, data, end, details):
        """Bytes of an image -> (its facts, the encoder's input, or None without it).

        An image whose turn comes after the time `end` is an error.
        """
        started = time.perf_counter()
        facts = {"sha256": sha256(data), "bytes": len(data), "turn_s": 0.0}
        if started > end:
            message = f"the images before it took {DECODE_S} s to decode: send fewer at a time"
            return {**facts, "status": 503, "error": message}, None
        try:
            image = decoding.open_image(data, self.settings["MAX_PIXELS"])
            facts |= {"format": image.format, "width": image.width, "height": image.height}
            with self._turn_to_decode(image) as facts["turn_s"]:
                pixels = detector.pixels(decoding.load_rgb(image))
                if details:
                    facts["provenance"] = provenance.read_provenance(image, data)
        except ImageError as error:
            return {**facts, "status": error.status, "error": str(error)}, None
        facts["decode_s"] = time.perf_counter() - started - facts["turn_s"]
        self.telemetry.stage_seconds.labels("decode").observe(facts["decode_s"])
        return facts, pixels

    @contextlib.contextmanager
    def _turn_to_decode(self, image):
        """One image for each processor, and one large image, at a time; yields seconds waited."""
        large = image.width * image.height > LARGE_PIXELS
        opened = time.perf_counter()
        with self.large if large else contextlib.nullcontext(), self.decoding:
            yield time.perf_counter() - opened

    def _score(self, detector, chunk):
        """[(facts, the encoder's input)] of one forward pass: adds verdict and seconds to facts."""
        started = time.perf_counter()
        features, waited = detector.shared_features(np.stack([pixels for _, pixels in chunk]))
        encoded = time.perf_counter()
        verdicts = detector.verdicts(features)
        seconds = {"encode": encoded - started - waited, "classify": time.perf_counter() - encoded}
        for stage, taken in seconds.items():
            self.telemetry.stage_seconds.labels(stage).observe(taken)
        for (facts, _), verdict, row in zip(chunk, verdicts, whole_of(features), strict=True):
            facts["turn_s"] += waited / len(chunk)
            facts |= {
                "classification": verdict.classification,
                "confidence": verdict.confidence,
                "p_fake": verdict.p_fake,
                "uncertain": verdict.uncertain,
                **({"decision": verdict.decision} if verdict.decision else {}),
                **{f"{stage}_s": taken / len(chunk) for stage, taken in seconds.items()},
            }
            self.telemetry.verdict(detector, facts, verdict.score, row)


def named(detector):
    """Names and hashes of a model and its encoder, for the log and the metrics."""
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
    """Checks everything that can be known before serving, without OpenVINO.

    A named encoder that is missing is prepared in a process of its own, so that the memory which
    this takes is freed. Raises DetectorError.
    """
    read_keys(settings["API_KEYS_FILE"])
    model = read_model(settings)
    encoder = model["encoder"]
    clip_model = runtime.clip_model_of(encoder)
    prepared = runtime.find_encoder(identity=encoder["identity"])
    if clip_model in catalogue.NAMES and prepared is None:
        prepare_encoder(clip_model, encoder["layers"])
    check_encoder(settings, model)


def prepare_encoder(clip_model, layers):
    """Run prepare_clip.py; where it fails, exit with its code. It has printed the reason."""
    command = [sys.executable, HERE / "prepare_clip.py"]
    command += ["--clip_model", clip_model, "--layers", layers]
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)


def read_model(settings):
    """The model file, checked against the pin and the key -> model dict. Raises DetectorError."""
    path = settings["MODEL_PATH"]
    if not path:
        raise UsageError(
            "MODEL_PATH is not set: name a model file from train_model.py"
            " (models/baseline.joblib is a demonstration)"
        )
    if not Path(path).is_file() and not Path(path).is_dir():  # load_model refuses a folder
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


def check_pin(pin_path, model_hash, model_path):
    """Raises ModelError unless the file holds this hash first, as sha256sum writes it."""
    data = read_file(
        "MODEL_SHA256_FILE", pin_path, "a file that sha256sum wrote, or leave it empty"
    )
    words = data.decode(errors="replace").split() or ["nothing"]
    if words[0].lower() != model_hash:
        raise ModelError(
            f"MODEL_PATH={model_path} has the SHA-256 {model_hash}, MODEL_SHA256_FILE={pin_path}"
            f" says {words[0][:64]}: put the right pair in place"
        )


def load_detector(settings, current=None):
    """-> SharedDetector, warm and checked on the golden picture.

    `current` itself is returned where the file is the same. Its encoder and its passes are used
    again where the encoder is the same. Raises DetectorError.
    """
    model = read_model(settings)
    if current is not None and current.model["sha256"] == model["sha256"]:
        return current
    check_encoder(settings, model)
    same = current is not None and current.encoder.identity == model["encoder"]["identity"]
    detector = SharedDetector(
        settings["MODEL_PATH"],
        threads=runtime.processors(),
        model=model,
        encoder=current.encoder if same else None,
        passes=current.passes if same else None,
        review=settings["review"],
    )
    prove(detector)
    if not same and not detector.encoder.single:
        side = detector.encoder.resolution
        for n in range(1, TOGETHER + 1):  # the first pass of each size is slow
            detector.encoder.encode(np.zeros((n, 3, side, side), np.float32))
    return detector


def slot_count(settings):
    return settings["SLOTS"] or runtime.processors() + TOGETHER


def prove(detector):
    """Compares the golden picture, from bytes to probability, with the encoder's record.

    Raises EncoderError where they differ.
    """
    recorded = detector.encoder.manifest.get("golden")
    if not recorded:
        raise EncoderError(
            f"the encoder '{detector.encoder.name}' has no golden features: remove its folder in "
            f"{runtime.cache_dir() / 'encoders'} and run prepare_clip.py again"
        )
    image = decoding.decode_image(runtime.golden_image())
    pixels = preprocessing.preprocess(image, detector.encoder.transform)
    features = np.stack([np.float32(recorded), detector.encoder.encode(pixels[None])[0]])
    norms = np.linalg.norm(features, axis=1)
    cosine = float(features[0] @ features[1] / norms[0] / norms[1])
    expected, here = (verdict.p_fake for verdict in detector.verdicts(features))
    close = cosine >= GOLDEN_COSINE and abs(here - expected) <= GOLDEN_SHIFT
    if not close:  # also where a value is NaN
        raise EncoderError(
            f"the golden picture's probability of fake is {here:.3f} on this machine,"
            f" {expected:.3f} by the encoder's record (cosine {cosine:.4f}): verdicts here cannot"
            " be trusted; prepare the encoder again"
        )
