"""A model on labelled images it has not seen: metrics with intervals, robustness, what files betray. Fits and tunes nothing.

    python evaluate.py --model_path model.joblib --data_dir data --report_dir evaluation
    python evaluate.py --model_path model.joblib --features_file features.npz
    python evaluate.py --features_file features.npz --data_dir data     # stored features, pictures for what needs them
    python evaluate.py --data_dir golden --baseline golden_before/metrics.json     # exit code 1: something got worse
    kubectl logs deploy/detector | python evaluate.py --feedback -     # what users said of the service's verdicts

Images that trained the model or its encoder are left out, by their hashes. Tables that need pictures are left out of an
evaluation of a features file, and named.
"""

import argparse

from detector.base.console import Help, need_features, need_folder, run, say
from detector.base.errors import UsageError


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument(
        "--model_path",
        metavar="FILE",
        help=(
            "from train_model.py (default: model.joblib where there is one, else the shipped"
            " baseline)"
        ),
    )
    parser.add_argument("--data_dir", metavar="DIR", help="folder of labelled images")
    parser.add_argument(
        "--features_file",
        metavar="FILE",
        help=(
            "features of the model's encoder: nothing is encoded again; with --data_dir, the folder"
            " they are of"
        ),
    )
    parser.add_argument(
        "--report_dir", default="evaluation", metavar="DIR", help="folder to write the report to"
    )
    parser.add_argument(
        "--baseline",
        metavar="FILE",
        help="metrics.json of an earlier evaluation of the same images: what got worse?",
    )
    parser.add_argument(
        "--feedback",
        nargs="+",
        metavar="LOG",
        help="logs of the service, - for stdin: how right it is in production",
    )
    parser.add_argument(
        "--robustness_images",
        type=int,
        default=1000,
        metavar="N",
        help="at most so many images go through the distortions (a seeded draw)",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to encode"
    )
    args = parser.parse_args(argv)
    if args.robustness_images < 1:
        raise UsageError(f"--robustness_images {args.robustness_images}: must be at least 1")
    if args.feedback:
        return args
    if not (args.data_dir or args.features_file):
        raise UsageError("nothing to evaluate on: name --data_dir, --features_file or both")
    if args.data_dir:
        need_folder(args.data_dir)
    if args.features_file:
        need_features(args.features_file)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.feedback:
        from detector.evaluation.feedback import tell_feedback

        return tell_feedback(args)
    from detector.evaluation.assess import evaluate

    text, worse, bad = evaluate(
        **{name: value for name, value in vars(args).items() if name != "feedback"}
    )
    print(text)
    if worse:
        say(f"worse than the baseline: {', '.join(worse)}")
    return 1 if worse or bad else 0


if __name__ == "__main__":
    run(main)
