"""Make the int8 form of a prepared encoder for CPUs, calibrated and tested on real images.

    folder, report = quantize(folder, pixels, labels)

The command is `prepare_clip.py --precision int8`. Half of the images set the ranges of the
activations (NNCF's post-training quantisation: SmoothQuant, weights by channel). The other half
decides whether the result may be used.
"""

import contextlib
import json
import logging
import shutil
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from detector.base.console import SOON, say
from detector.base.constants import LEAST_INT8_IMAGES
from detector.base.errors import EncoderError, ImageError, UsageError
from detector.base.files import read_bytes, sha256
from detector.encoders.closeness import cosines
from detector.encoders.prepare import keep
from detector.encoders.runtime import (
    Encoder,
    cache_dir,
    find_encoder,
    golden_image,
    openvino_core,
    read_manifest,
    transform_of,
)
from detector.images import decoding, preprocessing
from detector.images.folders import draw_evenly, list_images


def ensure_int8(folder, args):
    """Folder of a prepared encoder -> folder of its int8 form, which is made if it is missing.

    Raises EncoderError, UsageError.
    """
    manifest = read_manifest(folder)
    int8_folder = find_encoder(source=f"{manifest['source']} int8", layers=manifest["layers"])
    if int8_folder is None:
        require_nncf()
        images = read_images(args.data_dir, args.limit, transform_of(manifest))
        int8_folder, report = quantize(folder, *images)
        say(report)
    return int8_folder


LEAST_COSINE = 0.99  # mean over the images, int8 to float32 features
LEAST_AGREEMENT = 0.99  # share of unchanged verdicts
BATCH = 8
TRANSFORMERS = ("VisionTransformer", "timm:VisionTransformer", "timm:Eva")
RANKED = 20  # images by which accuracy control ranks a hundred layers
C = 1e-2  # regularisation of the compared verdicts: the middle of train_model.py's grid


def require_nncf():
    try:
        import nncf
    except ImportError as error:
        raise EncoderError(
            f"--precision int8 needs nncf ({error}): pip install -r requirements/int8.txt"
        ) from None
    nncf.set_log_level(logging.ERROR)
    return nncf


def read_images(data_dir, limit, transform):
    """A labelled folder -> (pixels float32 [n, 3, r, r], labels int [n]), n at most `limit`.

    Draws the classes as evenly as possible, in random order. Copies and unreadable images are left
    out. Raises UsageError if too few are left.
    """
    entries = list_images(data_dir)
    entries = [entries[i] for i in draw_evenly([e.label for e in entries], limit)]

    def read(entry):
        with contextlib.suppress(ImageError, UsageError):
            data = read_bytes(Path(data_dir, entry.path))
            pixels = preprocessing.preprocess(decoding.decode_image(data), transform)
            return sha256(data), (pixels, entry.label)

    with ThreadPoolExecutor() as pool:
        loaded = tqdm(pool.map(read, entries), desc="reading", total=len(entries), delay=SOON)
        # by hash, because a copy in both halves would prove nothing
        good = list(dict(filter(None, loaded)).values())
    if min(np.bincount([label for _, label in good], minlength=2)) < LEAST_INT8_IMAGES // 2:
        raise UsageError(
            f"--data_dir {data_dir}: {len(good)} different images can be read; int8 needs at least "
            f"{LEAST_INT8_IMAGES}, half of them of each class"
        )
    order = np.random.default_rng(0).permutation(len(good))
    return np.stack([good[i][0] for i in order]), np.array([good[i][1] for i in order])


def quantize(folder, pixels, labels):
    """-> (folder of the int8 encoder in the cache, one line with its closeness to float32).

    If plain quantisation fails, NNCF's accuracy control returns the costliest layers to float.
    Raises EncoderError if that fails too.
    """
    half = len(pixels) // 2
    reference = encode(Encoder(folder, "cpu", "float32"), pixels)
    for attempt in (plain, accuracy_controlled):
        scratch = Path(tempfile.mkdtemp(dir=cache_dir(), prefix=".quantizing-"))
        try:
            # NNCF prints its progress; stdout is for results
            with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                attempt(folder, scratch, pixels[:half], reference[:half])
            encoder = describe(folder, scratch)
            close = closeness(reference, encode(encoder, pixels[half:]), labels)
            report = (
                f"cosine to float32: mean {close['cosine']:.4f}, lowest {close['lowest']:.4f}; "
                f"{100 * close['agreement']:.1f}% of the verdicts unchanged, on "
                f"{len(pixels) - half} test images"
            )
            if close["cosine"] >= LEAST_COSINE and close["agreement"] >= LEAST_AGREEMENT:
                return keep(scratch, encoder.name, encoder.identity), report
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise EncoderError(
        f"int8 is refused for this encoder: {report}; at least {LEAST_COSINE} and "
        f"{100 * LEAST_AGREEMENT:.0f}% are needed; use it in float32 or bfloat16"
    )


def plain(folder, scratch, pixels, reference):
    """Calibrate on float32 [n, 3, r, r] and write encoder.xml and encoder.bin to `scratch`."""
    import openvino as ov

    nncf, model, arguments = prepared_model(folder)
    ov.save_model(
        nncf.quantize(model, dataset(nncf, pixels), **arguments),
        scratch / "encoder.xml",
        compress_to_fp16=True,
    )


def accuracy_controlled(folder, scratch, pixels, reference):
    """Like `plain`, but keep layers in float until the cosine loses at most half of its limit."""
    import openvino as ov

    nncf, model, arguments = prepared_model(folder)
    number_of = {pixels[i : i + 1].tobytes(): i for i in range(len(pixels))}

    def quality(compiled, rows):
        """`rows`: all images, or the few that rank the layers."""
        rows = list(rows)
        expected = reference[[number_of[row.tobytes()] for row in rows]]
        cosine = cosines(np.concatenate([compiled(row)[0] for row in rows]), expected)
        return float(cosine.mean()), cosine.tolist()

    data = dataset(nncf, pixels)
    ranking = nncf.AdvancedAccuracyRestorerParameters(ranking_subset_size=RANKED)
    controlled = nncf.quantize_with_accuracy_control(
        model,
        data,
        data,
        quality,
        max_drop=(1 - LEAST_COSINE) / 2,
        advanced_accuracy_restorer_parameters=ranking,
        **arguments,
    )
    ov.save_model(controlled, scratch / "encoder.xml", compress_to_fp16=True)


def prepared_model(folder):
    """-> (nncf, the encoder as an openvino model, NNCF's arguments for it)."""
    nncf = require_nncf()
    transformer = read_manifest(folder)["arch"]["kind"] in TRANSFORMERS
    arguments = {
        "preset": nncf.QuantizationPreset.MIXED,
        "model_type": nncf.ModelType.TRANSFORMER if transformer else None,
    }
    return nncf, openvino_core().read_model(Path(folder) / "encoder.xml"), arguments


def dataset(nncf, pixels):
    return nncf.Dataset([pixels[i : i + 1] for i in range(len(pixels))])


def encode(encoder, pixels):
    starts = tqdm(range(0, len(pixels), BATCH), desc="encoding", delay=SOON)
    return np.concatenate([encoder.encode(pixels[i : i + BATCH]) for i in starts])


def closeness(reference, int8_features, labels):
    """Compare int8 features with float32 ones -> {'cosine', 'lowest', 'agreement'}.

    `reference`: float32 features of both halves; `int8_features`: of the second half. The verdicts
    are those of a logistic regression on the first half's float32 features.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    half = len(reference) - len(int8_features)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000))
    classifier.fit(reference[:half], labels[:half])
    same = classifier.predict(reference[half:]) == classifier.predict(int8_features)
    cosine = cosines(reference[half:], int8_features)
    return {
        "cosine": float(cosine.mean()),
        "lowest": float(cosine.min()),
        "agreement": float(same.mean()),
    }


def describe(folder, scratch):
    """Write encoder.json beside the int8 weights -> the Encoder.

    The identity includes the weights, because other calibration images give another encoder.
    """
    manifest = read_manifest(folder)
    weights = sha256(
        (scratch / "encoder.bin").read_bytes() + (scratch / "encoder.xml").read_bytes()
    )
    manifest |= {
        "name": f"{manifest['name']} int8",
        "source": f"{manifest['source']} int8",
        "precision": "int8",
        "identity": sha256(f"{manifest['identity']} int8 {weights}".encode()),
    }
    (scratch / "encoder.json").write_text(json.dumps(manifest))
    encoder = Encoder(scratch, "cpu")
    golden = encoder.encode(
        preprocessing.preprocess(decoding.decode_image(golden_image()), encoder.transform)[None]
    )[0]
    manifest["golden"] = [float(f"{value:.6g}") for value in golden]
    (scratch / "encoder.json").write_text(json.dumps(manifest, indent=1))
    return encoder
