"""Image -> real or fake, with a calibrated confidence.

python classify.py --image_path photo.jpg --model_path model.joblib
python classify.py --image_path folder/ --json
cat photo.jpg | python classify.py --image_path -
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from detector.base.console import check_review, printable, run, say
from detector.base.constants import MAX_PIXELS
from detector.base.errors import UsageError
from detector.base.files import atomic_write, check_file
from detector.verdict import Detector, answer, choose_model, classify_all, details, flatten, load


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_input_arguments(parser)
    add_verdict_arguments(parser)
    add_decision_arguments(parser)
    args = parser.parse_args(argv)
    check_review(args.review)
    args.details |= bool(args.review)
    return args


def add_input_arguments(parser):
    parser.add_argument(
        "--image_path",
        required=True,
        nargs="+",
        metavar="IMG",
        help="images, folders, or - to read one image from stdin",
    )
    parser.add_argument(
        "--model_path",
        metavar="FILE",
        help="from train_model.py (default: model.joblib if it exists, else the shipped baseline)",
    )


def add_verdict_arguments(parser):
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON; for several images, one object a line with its path",
    )
    parser.add_argument(
        "--details",
        action="store_true",
        help=(
            "also print the probability of fake, the threshold, whether the verdict is uncertain,"
            " the model's version, and what the file states about its origin"
        ),
    )
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="largest image accepted (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to encode (default: %(default)s)",
    )


def add_decision_arguments(parser):
    parser.add_argument(
        "--review",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help=(
            "decide by the probability of fake: pass below LOW, reject from HIGH on, else review;"
            " implies --details"
        ),
    )
    parser.add_argument(
        "--explain",
        metavar="PNG",
        help="for a single image, also draw which parts moved the verdict",
    )


def list_paths(given):
    """Arguments of --image_path -> (list of files, True if a folder was unreadable).

    A folder gives all its files, sorted. '-' stays as it is. Raises UsageError.
    """
    paths, unreadable = [], False
    for path in given:
        if path != "-" and os.path.isdir(path):
            listing = list_folder(path)
            paths += [os.path.join(path, name) for name in listing.files]
            unreadable = unreadable or bool(listing.unreadable)
        elif path != "-" and not os.path.exists(path):
            raise UsageError(f"--image_path {path}: no such file")
        else:
            paths.append(path)
    return paths, unreadable


def check_explain(path, single):
    """Raises UsageError, before the work, where no map can be drawn."""
    if not single:
        raise UsageError(f"--explain {path}: draws a single image; give --image_path one image")
    check_file(path, f"--explain {path}")


def list_folder(path):
    """Folder -> its Listing. Raises UsageError if it holds no image."""
    from detector.images.folders import list_files, say_left_out

    listing = list_files(path)
    say_left_out(path, listing)
    if listing.files:
        return listing
    if listing.unreadable:
        reason = "cannot be read"
    else:
        reason = "holds no images" if any(listing) else "is empty"
    raise UsageError(f"--image_path {path}: the folder {reason}")


def line(model, verdict, provenance, args, path=None):
    """One Verdict as text, or as JSON with --json. `path` is given for several images."""
    more = {}
    if args.details:
        more = details(model, *verdict[2:4], verdict.decision, provenance)
    if args.json:
        named = {} if path is None else {"path": path}
        return json.dumps(named | answer(*verdict[:2]) | more)
    if more:
        from detector.images.provenance import in_words

        more["provenance"] = in_words(provenance)
    unsure = ", uncertain" if verdict.uncertain else ""
    text = f"{verdict.classification} (confidence {verdict.confidence:.2f}{unsure})"
    text += "".join(f"; {name} {value}" for name, value in more.items() if value is not None)
    return printable(text if path is None else f"{path}: {text}")


def classify_one(detector, path, args):
    """Print the verdict on a single image -> exit code."""
    loaded = load(detector, path, args.max_pixels, args.details)
    if isinstance(loaded, Exception):
        say(f"error: {path}: {loaded}")
        return 1
    pixels, provenance = loaded
    started = time.perf_counter()
    verdict = detector.judge(pixels[None])[0]
    print(line(detector.model, verdict, provenance, args), flush=True)
    if args.explain:
        explain(detector, pixels, args.explain, time.perf_counter() - started)
    return 0


def explain(detector, pixels, path, pass_s):
    """Write the map of `Detector.explain` as PNG. `pass_s`: seconds that one verdict took."""
    from detector.evaluation.plots import plot_map
    from detector.images.occlusion import MEANING, PASSES

    if (expected := PASSES * pass_s) > 60:
        say(f"--explain: about {expected:.0f} s for {PASSES} forward passes")
    started = time.perf_counter()
    figure = plot_map(flatten(pixels)[0], detector.encoder.transform, detector.explain(pixels))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    say(f"{path}: {PASSES} forward passes in {time.perf_counter() - started:.1f} s. {MEANING}")


def classify_several(detector, paths, args):
    """Print a line for each image, with progress -> number of images that could not be read."""
    from tqdm import tqdm

    bad = 0
    results = classify_all(detector, paths, args.max_pixels, details=args.details)
    for path, result in tqdm(results, total=len(paths), unit="image", disable=None):
        if isinstance(result, Exception):
            bad += 1
            tqdm.write(printable(f"{path}: error: {result}"), file=sys.stderr)
            if args.json:
                tqdm.write(json.dumps({"path": path, "error": str(result)}))
        else:
            tqdm.write(line(detector.model, *result, args, path))
    return bad


def main(argv=None):
    args = parse_args(argv)
    single = len(args.image_path) == 1 and not Path(args.image_path[0]).is_dir()
    paths, unreadable = list_paths(args.image_path)
    if args.explain:
        check_explain(args.explain, single)
    detector = Detector(choose_model(args.model_path), args.device, review=args.review)
    if "notice" in detector.model:
        say(f"note: {detector.model['notice']}")
    if single:
        return classify_one(detector, paths[0], args)
    bad = classify_several(detector, paths, args)
    if bad:
        say(f"{bad} of {len(paths)} images could not be read")
    return 1 if bad or unreadable else 0


if __name__ == "__main__":
    run(main)
