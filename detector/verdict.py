"""`Detector`: pixels, features and verdicts of one model. No other code joins these steps."""

import os
import sys
from collections import namedtuple
from pathlib import Path

from detector.base.console import say
from detector.base.constants import MAX_PIXELS
from detector.base.errors import EncoderError, ImageError, UsageError
from detector.base.files import read_bytes
from detector.base.project import HERE
from detector.encoders import catalogue, runtime

SHIPPED_MODEL = HERE / "models" / "baseline.joblib"
# classification: 'real' | 'fake'; confidence: calibrated probability of that class, four places;
# p_fake: probability of fake; uncertain: p_fake lies in the model's band; score: decision value;
# decision: 'pass' | 'review' | 'reject', None without review thresholds
Verdict = namedtuple("Verdict", "classification confidence p_fake uncertain score decision")


class Detector:
    """A model and the encoder it was trained on: bytes of an image -> verdict.

    detector = Detector("model.joblib")
    detector.classify(data)                          # ('real', 0.95)
    detector.classify_files(["a.jpg", "b.jpg"])      # [('a.jpg', Verdict(...)), ...]

    The model names the identity of its encoder, which the cache must hold. CLIP_MODEL has no
    effect. `model` and `encoder` may be given already loaded. `review`: the two thresholds of a
    decision (`threshold.decide`). Raises ModelError, EncoderError.
    """

    def __init__(self, model_path, device="auto", threads=0, model=None, encoder=None, review=None):
        from detector.model.file import load_model

        self.model, self.review = model or load_model(model_path), review
        self.crops = self.model.get("crops", 0)
        self.encoder = encoder or runtime.Encoder(
            encoder_folder(self.model["encoder"], model_path), device, threads=threads
        )

    def pixels(self, image):
        """PIL RGB image -> encoder's input, float32 [3, r, r]; with crops [1 + crops, 3, r, r]."""
        from detector.images.preprocessing import in_pieces, normalise

        transform = self.encoder.transform
        pieces = normalise(in_pieces(image, transform, self.crops), transform)
        return pieces if self.crops else pieces[0]

    def features(self, pixels):
        """`pixels` of n images, float32 [n, ...] -> float32 [n, d]; crops: [n, 1 + crops, d]."""
        return unflatten(self.encoder.encode(flatten(pixels)), pixels)

    def verdicts(self, features):
        """`features` of n images -> [Verdict]."""
        from detector.model.score import decision, probability
        from detector.model.threshold import decide, outside, verdict

        scores = decision(self.model, features)
        p_fake = probability(self.model, scores)
        uncertain = ~outside(p_fake, self.model["band"])
        return [
            Verdict(
                *verdict(self.model, p), float(p), bool(u), float(score), decide(p, self.review)
            )
            for p, u, score in zip(p_fake, uncertain, scores, strict=True)
        ]

    def judge(self, pixels):
        """`pixels` of n images -> [Verdict]."""
        return self.verdicts(self.features(pixels))

    def p_fake(self, pixels):
        """`pixels` of n images -> calibrated probability of fake, float64 [n]."""
        import numpy as np

        return np.array([verdict.p_fake for verdict in self.judge(pixels)])

    def explain(self, pixels):
        """`pixels` of an image -> how much each part adds to the log-odds of fake, float64 [7, 7].

        A part is hidden, and the log-odds fall by this much. With crops, the map shows the whole
        view alone. It takes `occlusion.PASSES` forward passes of one image.
        """
        import numpy as np

        from detector.images.occlusion import cell_means, occluded

        view = flatten(pixels)[0]
        scores = np.array([self.judge(copy[None])[0].score for copy in (view, *occluded(view))])
        return -self.model["calibrator"][0] * cell_means(scores[0] - scores[1:])

    def classify(self, data, max_pixels=MAX_PIXELS):
        """Image bytes -> (classification, confidence). Raises ImageError or a subclass."""
        from detector.images.decoding import decode_image

        return self.judge(self.pixels(decode_image(data, max_pixels))[None])[0][:2]

    def classify_files(self, paths, max_pixels=MAX_PIXELS):
        """Paths -> [(path, Verdict, or the error of a file that cannot be read)], in order."""
        results = classify_all(self, list(paths), max_pixels)
        return [(path, r if isinstance(r, Exception) else r[0]) for path, r in results]


def flatten(pixels):
    """Pixels of images or of their pieces, float32 [n, ..., 3, r, r] -> [m, 3, r, r]."""
    return pixels.reshape(-1, *pixels.shape[-3:])


def unflatten(features, pixels):
    """Features float32 [m, d] of `flatten(pixels)` -> [n, ..., d]."""
    return features.reshape(*pixels.shape[:-3], -1)


def encoder_folder(encoder, model_path, prepare=True):
    """A model's encoder entry -> the folder of the prepared encoder. Raises EncoderError.

    A missing encoder of the catalogue is prepared first. The service passes `prepare=False`,
    because the memory that preparing takes would stay in its process.
    """
    folder = runtime.find_encoder(identity=encoder["identity"])
    clip_model = runtime.clip_model_of(encoder)
    if folder is None and prepare and clip_model in catalogue.NAMES:
        from detector.encoders.prepare import ensure_encoder

        ensure_encoder(clip_model, layers=encoder["layers"])
        folder = runtime.find_encoder(identity=encoder["identity"])
    if folder is None and clip_model.endswith(" int8"):
        raise EncoderError(
            f"{model_path} was trained on encoder '{clip_model}', and int8 is no longer supported: "
            f"extract features with '{clip_model.removesuffix(' int8')}' and train again"
        )
    if folder is None:
        named = clip_model in catalogue.NAMES or clip_model.startswith(runtime.TIMM)
        checkpoint = clip_model if named else "with its checkpoint"
        if encoder["layers"] != "final":
            checkpoint += f" --layers {encoder['layers']}"
        raise EncoderError(
            f"{model_path} was trained on encoder '{encoder['name']}' ({encoder['identity'][:12]}),"
            f" which is not in {runtime.cache_dir()}: run python prepare_clip.py --clip_model"
            f" {checkpoint}"
        )
    return folder


def choose_model(model_path):
    """The given path, else model.joblib, else the shipped baseline. Logs a choice of its own."""
    if model_path is None:
        model_path = "model.joblib" if Path("model.joblib").is_file() else SHIPPED_MODEL
        say(f"model: {'the shipped baseline' if model_path is SHIPPED_MODEL else model_path}")
    if not Path(model_path).is_file():
        raise UsageError(f"--model_path {model_path}: no such file; make it with train_model.py")
    return model_path


def load(detector, path, max_pixels, details=False):
    """One file, or stdin for '-' -> (the encoder's input, provenance or None), or the error.

    Provenance is read with `details` only. It is what the file states about its origin.
    """
    from detector.images.decoding import load_rgb, open_image

    try:
        data = sys.stdin.buffer.read() if path == "-" else read_bytes(path)
        image = open_image(data, max_pixels)
        pixels = detector.pixels(load_rgb(image))
        if not details:
            return pixels, None
        from detector.images.provenance import read_provenance

        return pixels, read_provenance(image, data)
    except (ImageError, UsageError) as error:
        return error


def classify_all(detector, paths, max_pixels, batch=8, details=False):
    """Yield (path, (Verdict, provenance or None) or the error), in order.

    Threads decode the next batch while the encoder works on this one.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def start(chunk):
            return [pool.submit(load, detector, path, max_pixels, details) for path in chunk]

        chunks = [paths[i : i + batch] for i in range(0, len(paths), batch)]
        following = start(chunks[0]) if chunks else []
        for number, chunk in enumerate(chunks, 1):
            loaded = [future.result() for future in following]
            following = start(chunks[number]) if number < len(chunks) else []
            yield from zip(chunk, judge_loaded(detector, loaded), strict=True)


def judge_loaded(detector, loaded):
    """Results of `load` -> (Verdict, provenance or None) or the error of each."""
    import numpy as np

    good = [result[0] for result in loaded if not isinstance(result, Exception)]
    verdicts = iter(detector.judge(np.stack(good)) if good else ())
    for result in loaded:
        yield result if isinstance(result, Exception) else (next(verdicts), result[1])


def answer(classification, confidence):
    """The documented JSON, exactly these keys."""
    return {"classification": classification, "confidence": confidence}


def details(model, p_fake, uncertain, decision, provenance):
    """What stands behind a verdict, as JSON that is added on request only.

    `provenance` has no influence on the verdict.
    """
    low, high = model["band"]
    reason = (
        f"the probability of fake lies between {low:.2f} and {high:.2f}, where too many training"
        " images are on either side"
    )
    notice = {"notice": model["notice"]} if "notice" in model else {}
    decided = {"decision": decision} if decision else {}
    return {
        "p_fake": round(p_fake, 4),
        "threshold": round(model["threshold"], 4),
        "uncertain": uncertain,
        "reason": reason if uncertain else None,
        **decided,
        "model_version": model["versions"]["model"],
        **notice,
        "provenance": provenance,
    }
