"""Evaluate a model on labelled images that it has not seen, with intervals. Trains nothing.

    python evaluate.py --model_path model.joblib --data_dir data --report_dir evaluation
    python evaluate.py --model_path model.joblib --features_file features.npz
    python evaluate.py --features_file features.npz --data_dir data     # stored features and images
    python evaluate.py --data_dir golden --baseline golden_before/metrics.json
    kubectl logs deploy/detector | python evaluate.py --feedback -      # what users reported

Images that trained the model or its encoder are left out, by their hashes. Some tables need image
files. Without --data_dir they are left out, and the report names them. The exit code is 1 where a
metric is worse than the baseline or an image cannot be read.
"""

import argparse
from pathlib import Path

from detector.base.console import Help, check_review, need_features, need_folder, run, say
from detector.base.errors import UsageError
from detector.base.files import only_writer


def add_input_arguments(parser):
    parser.add_argument(
        "--model_path",
        metavar="FILE",
        help="model of train_model.py (default: model.joblib if it exists, else the shipped model)",
    )
    parser.add_argument("--data_dir", metavar="DIR", help="folder of labelled images")
    parser.add_argument(
        "--labels_file",
        nargs="+",
        metavar="CSV",
        help="table of path, label, split, source, group; of a draw also probability, from one or"
        " two people",
    )
    parser.add_argument(
        "--features_file",
        metavar="FILE",
        help="features of the model's encoder, so that nothing is encoded again; "
        "--data_dir then names the folder that was extracted",
    )


def add_report_arguments(parser):
    parser.add_argument(
        "--report_dir", default="evaluation", metavar="DIR", help="folder to write the report to"
    )
    parser.add_argument(
        "--baseline",
        metavar="FILE",
        help="metrics.json of an earlier evaluation of the same images, to compare with",
    )
    parser.add_argument(
        "--uploads_per_day",
        type=int,
        default=1000,
        metavar="N",
        help="uploads a day, for the alarms in the operating table",
    )
    parser.add_argument(
        "--prevalence",
        type=float,
        nargs="+",
        default=[0.01, 0.1, 0.5],
        metavar="P",
        help="shares of fakes among the uploads, for the operating table (default: 0.01 0.1 0.5)",
    )
    parser.add_argument(
        "--feedback",
        nargs="+",
        metavar="LOG",
        help="logs of the service (- for stdin), to measure its accuracy in production",
    )


def add_review_arguments(parser):
    review = parser.add_mutually_exclusive_group()
    review.add_argument(
        "--review",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="also measure a review queue: pass below LOW, reject from HIGH on, else review",
    )
    review.add_argument(
        "--suggest_review",
        action="store_true",
        help="propose LOW and HIGH from the training's scores, and measure them",
    )
    parser.add_argument(
        "--max_false_reject",
        type=float,
        default=0.005,
        metavar="X",
        help="share of reals that --suggest_review may reject",
    )
    parser.add_argument(
        "--max_missed",
        type=float,
        default=0.2,
        metavar="X",
        help="share of fakes that --suggest_review may pass",
    )


def add_encoding_arguments(parser):
    parser.add_argument(
        "--robustness_images",
        type=int,
        default=1000,
        metavar="N",
        help="distort at most N images, drawn with a fixed seed",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to encode"
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add_input_arguments(parser)
    add_report_arguments(parser)
    add_review_arguments(parser)
    add_encoding_arguments(parser)
    args = parser.parse_args(argv)
    check_numbers(args)
    if args.feedback:
        return args
    if not (args.data_dir or args.features_file):
        raise UsageError("nothing to evaluate on: name --data_dir, --features_file or both")
    if args.data_dir:
        need_folder(args.data_dir)
    if args.features_file:
        need_features(args.features_file, " ".join(args.labels_file or ()))
    return args


def check_numbers(args):
    """Raises UsageError for a number that is out of range."""
    for name in ("robustness_images", "uploads_per_day"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    shares = [("prevalence", share) for share in args.prevalence]
    shares += [(name, getattr(args, name)) for name in ("max_false_reject", "max_missed")]
    for name, share in shares:
        if not 0 < share < 1:
            raise UsageError(f"--{name} {share:g}: must be between 0 and 1")
    check_review(args.review)
    if len(args.labels_file or ()) > 2:
        raise UsageError(
            f"--labels_file {' '.join(args.labels_file)}: takes the tables of one or two people"
        )


def main(argv=None):
    args = parse_args(argv)
    if args.feedback:
        from detector.evaluation.feedback import report_feedback

        return report_feedback(args)
    from detector.evaluation.assess import evaluate

    options = vars(args)
    limits = {name: options.pop(name) for name in ("max_false_reject", "max_missed")}
    if options.pop("suggest_review"):
        options["review"] = limits
    del options["feedback"]
    place = Path(args.report_dir, "metrics.json")  # the folder's parent may be read-only
    with only_writer(place, f"--report_dir {args.report_dir}"):
        text, worse, unreadable = evaluate(**options)
    print(text)
    if worse:
        names = ", ".join(f"{words} ({part})" for part, words, *_ in worse)
        say(f"worse than the baseline: {names}")
    return 1 if worse or unreadable else 0


if __name__ == "__main__":
    run(main)
