"""A prepared encoder -> the same in int8 for processors, calibrated and proved on real images of this machine.

    folder, words = quantize(folder, pixels, labels)

`prepare_clip.py --precision int8` is the command. Half of the images set the ranges of the activations (NNCF's post-training
quantisation: SmoothQuant, weights by channel); the other half decide whether the result may be used at all.
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

from detector.base.console import say
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
)
from detector.images import decoding, preprocessing
from detector.images.folders import draw_evenly, list_images


def ensure_int8(folder, args):
    """The int8 form of a prepared encoder -> its folder; made where it is missing. Raises
    EncoderError, UsageError."""
    manifest = read_manifest(folder)
    found = find_encoder(source=f"{manifest['source']} int8", layers=manifest["layers"])
    if found is None:
        require_nncf()
        (cache_dir() / "encoders").mkdir(parents=True, exist_ok=True)
        images = read_images(args.data_dir, args.limit, manifest["resolution"])
        found, words = quantize(folder, *images)
        say(words)
    return found


LEAST_COSINE, LEAST_AGREEMENT = (
    0.99,
    0.99,
)  # to float32 features, on average; share of verdicts that stay
BATCH = 8
RANKED = 20  # images by which accuracy control ranks a hundred layers
C = 1e-2  # of the logistic regression whose verdicts are compared: the middle of what train_model.py searches


def require_nncf():
    try:
        import nncf
    except ImportError as error:
        raise EncoderError(
            f"--precision int8 needs nncf ({error}): pip install -r requirements/int8.txt"
        ) from None
    nncf.set_log_level(logging.ERROR)
    return nncf


def read_images(data_dir, limit, resolution):
    """A labelled folder -> (pixels float32 [n, 3, r, r], labels int [n]) of `limit` images, classes as even as they allow, in
    random order; those that cannot be read are left out."""
    entries = list_images(data_dir)
    entries = [entries[i] for i in draw_evenly([e.label for e in entries], limit)]

    def read(entry):
        with contextlib.suppress(ImageError, UsageError):
            return (
                preprocessing.preprocess(
                    decoding.decode_image(read_bytes(Path(data_dir, entry.path))), resolution
                ),
                entry.label,
            )

    with ThreadPoolExecutor() as pool:
        good = [row for row in pool.map(read, entries) if row is not None]
    if min(np.bincount([label for _, label in good], minlength=2)) < LEAST_INT8_IMAGES // 2:
        raise UsageError(
            f"--data_dir {data_dir}: {len(good)} images can be read; int8 is calibrated and proved"
            f" on at least {LEAST_INT8_IMAGES}, half of them of each class"
        )
    order = np.random.default_rng(0).permutation(len(good))
    return np.stack([good[i][0] for i in order]), np.array([good[i][1] for i in order])


def quantize(folder, pixels, labels):
    """-> (folder of the int8 encoder in the cache, words on how close it is). Raises EncoderError where it is not close enough.

    Where plain quantisation fails, NNCF's accuracy control gives those layers back to float that cost the most.
    """
    half = len(pixels) // 2
    reference = encode(Encoder(folder, "cpu", "float32"), pixels)
    for attempt in (plain, accuracy_controlled):
        scratch = Path(tempfile.mkdtemp(dir=cache_dir(), prefix=".quantizing-"))
        try:
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stdout(sys.stderr),
            ):  # NNCF's progress; stdout is for results
                warnings.simplefilter("ignore")
                attempt(folder, scratch, pixels[:half], reference[:half])
            encoder = describe(folder, scratch)
            close = closeness(reference, encode(encoder, pixels[half:]), labels)
            words = (
                f"cosine to float32 {close['cosine']:.4f} on average, {close['lowest']:.4f} at"
                f" least; {100 * close['agreement']:.1f}% of the verdicts stay, on"
                f" {len(pixels) - half} images that calibrated nothing"
            )
            if close["cosine"] >= LEAST_COSINE and close["agreement"] >= LEAST_AGREEMENT:
                return keep(scratch, encoder.name, encoder.identity), words
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise EncoderError(
        f"int8 is refused for this encoder: {words}; at least {LEAST_COSINE} and"
        f" {100 * LEAST_AGREEMENT:.0f}% are needed; use it in float32 or bfloat16"
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
    """The same, but with layers left as they are until the mean cosine is within half of what is allowed."""
    import openvino as ov

    nncf, model, arguments = prepared_model(folder)
    number_of = {pixels[i : i + 1].tobytes(): i for i in range(len(pixels))}

    def quality(compiled, rows):  # `rows`: of all images, or of a few that rank the layers
        numbers, rows = zip(*((number_of[row.tobytes()], row) for row in rows))
        cosine = cosines(
            np.concatenate([compiled(row)[0] for row in rows]), reference[list(numbers)]
        )
        return float(cosine.mean()), cosine.tolist()

    data = dataset(nncf, pixels)
    ranking = nncf.AdvancedAccuracyRestorerParameters(ranking_subset_size=RANKED)
    found = nncf.quantize_with_accuracy_control(
        model,
        data,
        data,
        quality,
        max_drop=(1 - LEAST_COSINE) / 2,
        advanced_accuracy_restorer_parameters=ranking,
        **arguments,
    )
    ov.save_model(found, scratch / "encoder.xml", compress_to_fp16=True)


def prepared_model(folder):
    """-> (nncf, the encoder as an openvino model, how NNCF is to take it)."""
    nncf = require_nncf()
    transformer = read_manifest(folder)["arch"]["kind"] == "VisionTransformer"
    return (
        nncf,
        openvino_core().read_model(Path(folder) / "encoder.xml"),
        {
            "preset": nncf.QuantizationPreset.MIXED,
            "model_type": nncf.ModelType.TRANSFORMER if transformer else None,
        },
    )


def dataset(nncf, pixels):
    return nncf.Dataset([pixels[i : i + 1] for i in range(len(pixels))])


def encode(encoder, pixels):
    return np.concatenate(
        [encoder.encode(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
    )


def closeness(reference, found, labels):
    """Float32 features of both halves, int8 features of the second, labels -> {'cosine', 'lowest', 'agreement'}.

    The verdicts are those of a logistic regression on the first half's float32 features.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    half = len(reference) - len(found)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000)).fit(
        reference[:half], labels[:half]
    )
    fake = [classifier.predict(features) for features in (reference[half:], found)]
    cosine = cosines(reference[half:], found)
    return {
        "cosine": float(cosine.mean()),
        "lowest": float(cosine.min()),
        "agreement": float((fake[0] == fake[1]).mean()),
    }


def describe(folder, scratch):
    """Write encoder.json beside the int8 weights -> the Encoder. Other calibration images make another encoder."""
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
        preprocessing.preprocess(decoding.decode_image(golden_image()), encoder.resolution)[None]
    )[0]
    manifest["golden"] = [float(f"{value:.6g}") for value in golden]
    (scratch / "encoder.json").write_text(json.dumps(manifest, indent=1))
    return encoder
