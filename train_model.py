"""features.npz -> model.joblib and a report: a tuned, calibrated and tested classifier.

    python train_model.py --features_file features.npz --model_output_path model.joblib
    python train_model.py --max_fpr 0.01               # threshold: at most 1% false positives
    python train_model.py --resplit                    # split anew by group
    python train_model.py --classifier all             # compare four kinds, train the best
    python train_model.py --from_model model.joblib --max_fpr 0.02 --model_output_path strict.joblib

Images that look alike stay on one side of every split. From ten sources on, so do whole sources.
"""

import argparse
from pathlib import Path

from detector.base.console import Help, need_features, run
from detector.base.constants import MAX_CROPS, NOTICE, VERSION
from detector.base.errors import UsageError
from detector.base.files import check_file, only_writer


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add_file_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    add_draw_arguments(parser)
    args = parser.parse_args(argv)
    check(args)
    return args


def add_file_arguments(parser):
    parser.add_argument(
        "--features_file",
        nargs="+",
        default=["features.npz"],
        metavar="FILE",
        help="from extract_features.py (default: features.npz); several need the same encoder",
    )
    parser.add_argument(
        "--model_output_path", default="model.joblib", metavar="FILE", help="model to write"
    )


def add_training_arguments(parser):
    parser.add_argument(
        "--classifier",
        choices=["svm", "linear-svm", "logistic", "mlp", "all"],
        default="svm",
        help="kind; 'all' compares them and trains the best",
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=0,
        metavar="N",
        help="also score N full-resolution crops of each image; extract with --crops, too",
    )
    threshold = parser.add_mutually_exclusive_group()
    threshold.add_argument(
        "--max_fpr",
        type=float,
        metavar="X",
        help="threshold for at most this share of reals called fake",
    )
    threshold.add_argument(
        "--threshold", type=float, metavar="P", help="set the threshold by hand (default: 0.5)"
    )
    parser.add_argument(
        "--from_model",
        metavar="FILE",
        help="only move the threshold of this model; needs the features of its training",
    )
    parser.add_argument("--train_splits", default="train", metavar="A,B", help="splits to train on")
    parser.add_argument(
        "--resplit", action="store_true", help="split anew by group and ignore the folders' split"
    )


def add_output_arguments(parser):
    parser.add_argument(
        "--model_version", default="v0.0.0-dev", metavar="V", help="version stored in the model"
    )
    parser.add_argument(
        "--notice",
        metavar="TEXT",
        help=(
            "what the model is not fit for, shown with verdicts; the service then needs"
            " ALLOW_DEMO_MODEL=1"
        ),
    )
    parser.add_argument(
        "--sign",
        metavar="KEY",
        help="private Ed25519 key in PEM that signs the model, for MODEL_PUBLIC_KEY",
    )
    parser.add_argument(
        "--export_sklearn",
        metavar="FILE",
        help=(
            "also write a scikit-learn Pipeline for skops.io.load, without calibrator and threshold"
        ),
    )


def add_draw_arguments(parser):
    parser.add_argument(
        "--max_rows",
        type=int,
        default=100_000,
        metavar="N",
        help="above N rows, draw N, even over class and source",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of splits, folds and classifiers"
    )


def check(args):
    """Raises UsageError for a value that is out of range or a features file that is missing."""
    if args.max_rows < 1:
        raise UsageError(f"--max_rows {args.max_rows}: must be at least 1")
    if not 0 <= args.crops <= MAX_CROPS:
        raise UsageError(f"--crops {args.crops}: must be at least 0, at most {MAX_CROPS}")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must be at least 0")
    check_texts(args)
    for name in ("max_fpr", "threshold"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1:
            raise UsageError(f"--{name} {value:g}: must be between 0 and 1")
    export = args.export_sklearn
    if export and Path(export).resolve() == Path(args.model_output_path).resolve():
        raise UsageError(f"--export_sklearn {export}: is the model file's place; name another")
    for path in args.features_file:
        need_features(path)


def check_texts(args):
    """Raises UsageError for a bad version or notice."""
    if not VERSION.fullmatch(args.model_version):
        raise UsageError(
            f"--model_version {args.model_version!r}: must be 1 to 64 plain characters without"
            " spaces"
        )
    if args.notice is not None and not NOTICE.fullmatch(args.notice):
        raise UsageError(f"--notice {args.notice!r}: must be 1 to 200 plain characters in one line")


def check_outputs(args):
    """Refuse places that cannot be written, and a bad key, before the training.

    -> the key that signs, or None. Raises UsageError.
    """
    from detector.model import signature
    from detector.training import export

    check_file(args.model_output_path, f"--model_output_path {args.model_output_path}")
    if args.export_sklearn:
        export.need_skops(args.export_sklearn)
        check_file(args.export_sklearn, f"--export_sklearn {args.export_sklearn}")
    return signature.read_key(args.sign, "--sign", "private") if args.sign else None


def write(args, model, findings, key):
    """Write model, report, signature and export together -> the report's folder."""
    from detector.evaluation import report
    from detector.model import signature
    from detector.model.file import report_folder, save_model
    from detector.training import export

    folder = report_folder(args.model_output_path)
    with report.staged(folder) as place:
        report.fill(place, findings)
        data = save_model(args.model_output_path, model)
        signature.sign(args.model_output_path, data, key)
        if args.export_sklearn:
            export.write(args.export_sklearn, model, args.seed)
    return folder


def main(argv=None):
    args = parse_args(argv)
    from detector.evaluation.printed import training
    from detector.training.classifiers import one_thread
    from detector.training.recipe import (
        audit_training,
        describe_model,
        read_trained,
        say_findings,
        train_best,
    )
    from detector.training.rows import read_data, say_rows

    place = args.model_output_path
    with one_thread(), only_writer(place, f"--model_output_path {place}"):
        key = check_outputs(args)
        data = read_data(args)
        say_rows(data, args)
        trained = read_trained(args.from_model, data) if args.from_model else None
        audited = audit_training(data)
        shown = say_findings(audited)
        model, kinds = train_best(data, args, trained)
        findings = describe_model(model, kinds, data, audited, args.seed)
        say_findings(audited, shown)
        folder = write(args, model, findings, key)
    print(training(findings))
    print(f"{place} {args.model_version}, report in {folder}/")


if __name__ == "__main__":
    run(main)
