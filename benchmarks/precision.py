"""What reduced precision costs and gives: float32, bfloat16, int8 weights only, int8.

    pip install nncf==3.4.0
    python -m benchmarks.precision --data_dir data

The folder has the splits train, test and external. Images of `train` calibrate int8. Cosines,
verdicts and AUC are those of the model on `test` and `external`. Rates in turns. Prints Markdown.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import heading, in_turns, machine, ratios, row, spread
from detector.encoders import runtime
from detector.encoders.closeness import cosines
from detector.images.folders import draw_evenly, list_images
from detector.model.file import load_model
from detector.model.score import p_fake_of
from detector.verdict import SHIPPED_MODEL, encoder_folder

BATCH = 8


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="labelled pictures")
    parser.add_argument(
        "--model_path", default=SHIPPED_MODEL, metavar="FILE", help="model whose encoder to measure"
    )
    parser.add_argument("--calibrate", type=int, default=200, help="pictures that calibrate int8")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="to measure")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, in turns")
    return parser.parse_args(argv)


# ---- pictures ----


def read(data_dir, entries, transform):
    """-> CLIP's input of the pictures, float32 [n, 3, r, r]"""
    from detector.images.decoding import decode_image
    from detector.images.preprocessing import preprocess

    def pixels(entry):
        return preprocess(decode_image(Path(data_dir, entry.path).read_bytes()), transform)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(pixels, entries)))


def pictures(args, transform):
    """-> (calibrating pixels, judged pixels, their labels, their splits)"""
    entries = list_images(args.data_dir)
    train = [entry for entry in entries if entry.split == "train"]
    drawn = [train[i] for i in draw_evenly([entry.label for entry in train], args.calibrate)]
    judged = [entry for entry in entries if entry.split in ("test", "external")]
    labels, splits = (np.array([getattr(e, name) for e in judged]) for name in ("label", "split"))
    pixels = (read(args.data_dir, listed, transform) for listed in (drawn, judged))
    return *pixels, labels, splits


# ---- forms of the encoder ----


def weights_only(original, group):
    """int8 matrices. OpenVINO rounds activations to int8 in groups of `group` numbers, 0: never."""
    import nncf

    mode = nncf.CompressWeightsMode.INT8_SYM
    model = nncf.compress_weights(original.clone(), mode=mode)
    model.set_rt_info(str(group), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return model


def calibrated(original, pixels, in_float=()):
    """int8 matrices and activations, except the matrix products of the names `in_float`."""
    import nncf

    return nncf.quantize(
        original.clone(),
        nncf.Dataset([pixels[i : i + 1] for i in range(len(pixels))]),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(pixels),
        ignored_scope=nncf.IgnoredScope(names=list(in_float)),
        # NNCF 3.4.0 fails on the bias of a convolution over one dimension
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )


def narrowing(model):
    """Names of the products that follow QuickGELU: their matrices have four times more columns."""
    for node in model.get_ops():
        if node.get_type_name() in ("MatMul", "Convolution"):
            shape = node.input(1).get_partial_shape()
            if shape.is_static and shape[1].get_length() == 4 * shape[0].get_length():
                yield node.get_friendly_name()


def int8_forms(folder, pixels):
    """Yield (name, openvino.Model)."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    original = runtime.openvino_core().read_model(Path(folder) / "encoder.xml")
    yield "int8, weights only", weights_only(original, 0)
    yield "int8, activations rounded in groups of 32", weights_only(original, 32)
    yield "int8, calibrated", calibrated(original, pixels)
    names = list(narrowing(original))
    yield "int8, calibrated, products after QuickGELU in float", calibrated(original, pixels, names)


def variants(folder, place, pixels):
    """-> {name: (forward pass, MB on the disk)}, the fastest float first."""
    import openvino as ov

    floats = ["bfloat16", "float32"] if runtime.has_bfloat16() else ["float32"]
    folders = dict.fromkeys(floats, folder)
    # NNCF prints its progress; stdout is for results
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        for name, model in int8_forms(folder, pixels):
            folders[name] = Path(place, name)
            folders[name].mkdir()
            ov.save_model(model, folders[name] / "encoder.xml", compress_to_fp16=True)
    return {
        name: (
            # an int8 form has float layers, too
            runtime.openvino_forward(own, name if name in floats else floats[0], 0)[0],
            Path(own, "encoder.bin").stat().st_size / 1e6,
        )
        for name, own in folders.items()
    }


# ---- measuring ----


def rate(forward, batch):
    """Images a second over at least a second."""
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < 1:
        forward(batch)
        passes += 1
    return passes * len(batch) / (time.perf_counter() - started)


def quality(model, reference, features, labels, splits):
    """-> cells: cosine, share of equal verdicts, AUC of each split"""
    from sklearn.metrics import roc_auc_score

    cosine = cosines(reference, features)
    p_fake = p_fake_of(model, features)
    threshold = model["threshold"]
    same = (p_fake >= threshold) == (p_fake_of(model, reference) >= threshold)
    auc = [
        roc_auc_score(labels[splits == split], p_fake[splits == split])
        for split in ("test", "external")
    ]
    return [
        f"{cosine.mean():.4f}, {cosine.min():.4f}",
        f"{100 * same.mean():.1f}%",
        *(f"{value:.3f}" for value in auc),
    ]


def main(argv=None):
    args = parse_args(argv)
    model = load_model(args.model_path)
    folder = encoder_folder(model["encoder"], args.model_path)
    transform = runtime.transform_of(runtime.read_manifest(folder))
    calibrating, judged, labels, splits = pictures(args, transform)
    with tempfile.TemporaryDirectory() as place:
        os.environ["CLIP_CACHE"] = place  # for the compiled forms of encoders that do not stay
        forms = variants(folder, place, calibrating)
        speed = {
            n: in_turns({k: partial(rate, f, judged[:n]) for k, (f, _) in forms.items()}, args.runs)
            for n in args.batch_sizes
        }
        batches = [judged[i : i + BATCH] for i in range(0, len(judged), BATCH)]
        features = {k: np.concatenate([f(b) for b in batches]) for k, (f, _) in forms.items()}
    fastest = next(iter(forms))
    print(f"{machine()}. {len(calibrating)} images of `train` calibrated int8.\n")
    sizes = [text for n in speed for text in (f"images/s at batch {n}", f"to {fastest}")]
    close = ["cosine to float32, mean and lowest", "verdicts that stay"]
    tests = [f"AUC on {(splits == name).sum()} of `{name}`" for name in ("test", "external")]
    heading(model["encoder"]["name"], *sizes, "MB on the disk", *close, *tests)
    for name, (_, megabytes) in forms.items():
        cells = []
        for measured in speed.values():
            cells += [spread(measured[name]), ratios(measured[name], measured[fastest], 2)]
        cells += [f"{megabytes:.1f}"]
        row(name, *cells, *quality(model, features["float32"], features[name], labels, splits))


if __name__ == "__main__":
    main()
