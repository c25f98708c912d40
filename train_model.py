"""features.npz -> model.joblib and a report: a classifier on frozen features, tuned, calibrated and tested.

    python train_model.py --features_file features.npz --model_output_path model.joblib
    python train_model.py --max_fpr 0.01               # threshold: at most 1% of real images called fake
    python train_model.py --resplit                    # our own split by group, whatever the folders say
    python train_model.py --classifier all             # compare four kinds, train the best

Images that look alike stay on one side of every split; with ten sources or more, whole sources do.
"""
import argparse
from pathlib import Path

from detector.base.console import Help, need_features, run, say
from detector.base.constants import MAX_CROPS, NOTICE, VERSION
from detector.base.errors import UsageError
from detector.base.files import check_file, only_writer


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=Help)
    parser.add_argument("--features_file", nargs="+", default=["features.npz"], metavar="FILE",
                        help="from extract_features.py (default: features.npz); several must be of one encoder")
    parser.add_argument("--model_output_path", default="model.joblib", metavar="FILE", help="model to write")
    parser.add_argument("--classifier", choices=["svm", "linear-svm", "logistic", "mlp", "all"], default="svm",
                        help="kind; all: compare, train the best")
    parser.add_argument("--crops", type=int, default=0, metavar="N",
                        help="squares in full resolution scored beside the whole; extract with --crops, too")
    parser.add_argument("--max_fpr", type=float, metavar="X",
                        help="threshold at which at most this share of real images is called fake (default: 0.5 on the "
                             "calibrated probability)")
    parser.add_argument("--train_splits", default="train", metavar="A,B", help="splits to train on")
    parser.add_argument("--resplit", action="store_true", help="split by group here, whatever the folders say")
    parser.add_argument("--model_version", default="v0.0.0-dev", metavar="V", help="version stored in the model")
    parser.add_argument("--notice", metavar="TEXT", help="what the model is not fit for: told beside every verdict; the service "
                                                         "then takes it with ALLOW_DEMO_MODEL=1 alone")
    parser.add_argument("--sign", metavar="KEY", help="private Ed25519 key in PEM: signs the model, for MODEL_PUBLIC_KEY")
    parser.add_argument("--export_sklearn", metavar="FILE",
                        help="also a scikit-learn Pipeline, for skops.io.load; calibrator and threshold are in the model alone")
    parser.add_argument("--max_rows", type=int, default=100_000, metavar="N",
                        help="more rows than this are sampled; linear-svm takes all of a Parquet data set, in passes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of splits and folds")
    args = parser.parse_args(argv)
    if args.max_rows < 1:
        raise UsageError(f"--max_rows {args.max_rows}: must be at least 1")
    if not 0 <= args.crops <= MAX_CROPS:
        raise UsageError(f"--crops {args.crops}: must be at least 0, at most {MAX_CROPS}")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must be at least 0")
    if not VERSION.fullmatch(args.model_version):
        raise UsageError(f"--model_version {args.model_version!r}: must be of 1 to 64 plain characters without spaces")
    if args.notice is not None and not NOTICE.fullmatch(args.notice):
        raise UsageError(f"--notice {args.notice!r}: must be of 1 to 200 plain characters in one line")
    if args.max_fpr is not None and not 0 < args.max_fpr < 1:
        raise UsageError(f"--max_fpr {args.max_fpr:g}: must be between 0 and 1")
    if args.export_sklearn and Path(args.export_sklearn).resolve() == Path(args.model_output_path).resolve():
        raise UsageError(f"--export_sklearn {args.export_sklearn}: that is the model file's place; name another")
    for path in args.features_file:
        need_features(path)
    return args


def main(argv=None):
    args = parse_args(argv)
    from detector.training.classifiers import one_thread
    with one_thread(), only_writer(args.model_output_path, f"--model_output_path {args.model_output_path}"):
        train_and_report(args)


def train_and_report(args):
    """All of it: rows, audit, classifiers, report, model."""
    import numpy as np

    from detector.features.file import crops_of, load_rows, open_files
    from detector.model import signature
    from detector.model.file import save_model
    from detector.training import export, streaming
    from detector.training.classifiers import GRIDS
    from detector.training.rows import Rows, choose_rows
    from detector.training.train import (
        audit_labels_of,
        audit_training,
        build,
        compare,
        describe_training,
        false_alarms,
        leak,
        leave_one_source_out,
        left_out,
        say_findings,
        set_threshold,
        training_data,
        warn_of_few_reals,
    )
    check_file(args.model_output_path, f"--model_output_path {args.model_output_path}")
    if args.export_sklearn:
        export.need_skops(args.export_sklearn)
        check_file(args.export_sklearn, f"--export_sklearn {args.export_sklearn}")
    key = signature.read_key(args.sign, "--sign", "private") if args.sign else None
    files, encoder = open_files(args.features_file, args.crops)
    columns, numbers = load_rows(files, args.max_rows, args.seed)
    train, test, groups, twins, how = choose_rows(columns, args, args.seed)
    streams = numbers is not None and args.classifier == streaming.KIND and all(file.whole is None for file in files)
    if streams and any(crops_of(file.meta) for file in files):
        raise UsageError("--classifier linear-svm takes all rows of a large data set only without crops: extract without --crops, or "
                         "raise --max_rows")
    if numbers is not None:
        how += (f"; {len(numbers)} of {sum(file.distinct.sum() for file in files)} rows, a draw even over class and source"
                + (", and the others train as well" if streams else ""))
    rows, whole = Rows(columns, train, groups, twins), columns["view"] == 0
    copies = f", and {(~whole[train]).sum()} degraded copies" if not whole[train].all() else ""
    say(f"{whole[train].sum()} images to train{copies}, {whole[test].sum()} to test ({how})")
    if rest := left_out(columns, np.concatenate([train, test])):
        say(f"left out: {rest}")
    if args.crops:
        say(f"each verdict will take {1 + args.crops} forward passes: the whole image and {args.crops} crops of it")
    warn_of_few_reals(args.max_fpr, rows)
    found = audit_training(columns, train, test, twins)
    said = say_findings(found)

    if streams:
        part, data = streaming.build(files, numbers, columns, rows, train, test, groups, args.seed)
        parts = {streaming.KIND: part}
    else:
        data = training_data(rows)
        parts = {kind: build(kind, rows, args.seed) for kind in (GRIDS if args.classifier == "all" else [args.classifier])}
    models = {kind: set_threshold(part, args.max_fpr) for kind, part in parts.items()}
    kinds = compare(models, rows, columns, test, groups)
    model = models[max(kinds, key=lambda row: row["out_of_fold"]["value"])["classifier"]]  # never by the test images
    model |= describe_training(data, encoder, args)

    from detector.evaluation import report
    found["labels"], assessed = audit_labels_of(model, rows), report.assess(model, columns, test, groups, twins)
    found["detector"] = {"on_test": assessed["overall"]["auc"]}
    say_findings(found, said)
    found = {**report.about(model), "split": how, "audit": found, "leak": leak(model, columns, train, test, groups),
             "false_alarms": false_alarms(model, rows), "classifiers": kinds, **assessed,
             "leave_one_source_out": leave_one_source_out(model, rows, args.seed)}
    model["metrics"] = {name: found[name] for name in ("split", "overall", "degraded", "calibration")}
    folder = Path(args.model_output_path).with_suffix("").as_posix() + "_report"
    with report.staged(folder) as place:  # the model and its report land together
        report.fill(place, found)
        save_model(args.model_output_path, model)
        signature.sign(args.model_output_path, key)
        if args.export_sklearn:
            export.write(args.export_sklearn, model, args.seed)
    print(report.training(found))
    print(f"{args.model_output_path} {args.model_version}, report in {folder}/")


if __name__ == "__main__":
    run(main)
