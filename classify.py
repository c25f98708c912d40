"""Image -> real or fake, with a calibrated confidence.

python classify.py --image_path photo.jpg --model_path model.joblib
python classify.py --image_path folder/ --json
cat photo.jpg | python classify.py --image_path -
"""

import argparse
import json
import os
import sys
from pathlib import Path

from detector.base.console import printable, run, say
from detector.base.constants import MAX_PIXELS
from detector.base.errors import UsageError


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--image_path",
        required=True,
        nargs="+",
        metavar="IMG",
        help="images, folders, or - for the bytes of one on stdin",
    )
    parser.add_argument(
        "--model_path",
        metavar="FILE",
        help=(
            "from train_model.py (default: model.joblib where there is one, else the shipped"
            " baseline)"
        ),
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON; of several images one object a line, with the path",
    )
    parser.add_argument(
        "--details",
        action="store_true",
        help=(
            "also the probability of fake, the threshold, whether it is uncertain, which model said"
            " so, and what the file says of its own making"
        ),
    )
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="largest image taken (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to encode (default: %(default)s)",
    )
    return parser.parse_args(argv)


def list_paths(given):
    """Arguments of --image_path -> (list of files, was a folder unreadable?). Folders give all their files, sorted; '-' stays as
    it is. Raises UsageError."""
    paths, unreadable = [], False
    for path in given:
        if path != "-" and os.path.isdir(path):
            from detector.images.folders import list_files, say_left_out

            listing = list_files(path)
            say_left_out(path, listing)
            if not listing.files:
                raise UsageError(
                    f"--image_path {path}: the folder"
                    f" {'cannot be read' if listing.unreadable else 'holds no images' if any(listing) else 'is empty'}"
                )
            paths += [os.path.join(path, name) for name in listing.files]
            unreadable = unreadable or bool(listing.unreadable)
        elif path != "-" and not os.path.exists(path):
            raise UsageError(f"--image_path {path}: no such file")
        else:
            paths.append(path)
    return paths, unreadable


def line(model, verdict, provenance, args, path=None):
    """One Verdict as it is printed: text, or JSON with --json; `path` where several images are asked about."""
    from detector.verdict import answer, details

    classification, confidence, p_fake, uncertain, _ = verdict
    more = details(model, p_fake, uncertain, provenance) if args.details else {}
    if args.json:
        return json.dumps(
            {
                **({} if path is None else {"path": path}),
                **answer(classification, confidence),
                **more,
            }
        )
    if more:
        from detector.images.provenance import in_words

        more["provenance"] = in_words(provenance)
    text = f"{classification} (confidence {confidence:.2f})" + "".join(
        f"; {k} {v}" for k, v in more.items() if v is not None
    )
    return printable(text if path is None else f"{path}: {text}")


def main(argv=None):
    args = parse_args(argv)
    from detector.verdict import Detector, choose_model, classify_all, load

    single = len(args.image_path) == 1 and not Path(args.image_path[0]).is_dir()
    paths, unreadable = list_paths(args.image_path)
    detector = Detector(choose_model(args.model_path), args.device)
    if "notice" in detector.model:
        say(f"note: {detector.model['notice']}")
    if single:
        found = load(detector, paths[0], args.max_pixels, args.details)
        if isinstance(found, Exception):
            say(f"error: {paths[0]}: {found}")
            return 1
        pixels, provenance = found
        print(line(detector.model, *detector.judge(pixels[None]), provenance, args))
        return 0

    from tqdm import tqdm

    bad = 0
    answers = classify_all(detector, paths, args.max_pixels, details=args.details)
    for path, result in tqdm(answers, total=len(paths), unit="image", disable=None):
        if isinstance(result, Exception):
            bad += 1
            tqdm.write(printable(f"{path}: error: {result}"), file=sys.stderr)
            if args.json:
                tqdm.write(json.dumps({"path": path, "error": str(result)}))
        else:
            tqdm.write(line(detector.model, *result, args, path))
    if bad:
        say(f"{bad} of {len(paths)} images could not be read")
    return 1 if bad or unreadable else 0


if __name__ == "__main__":
    run(main)
