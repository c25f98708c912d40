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
from pathlib import Path

from detector.base.console import Help, need_features, need_folder, run, say
from detector.base.errors import UsageError
from detector.base.files import check_folder


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument("--model_path", metavar="FILE",
                        help="from train_model.py (default: model.joblib where there is one, else the shipped baseline)")
    parser.add_argument("--data_dir", metavar="DIR", help="folder of labelled images")
    parser.add_argument("--features_file", metavar="FILE",
                        help="features of the model's encoder: nothing is encoded again; with --data_dir, the folder they are of")
    parser.add_argument("--report_dir", default="evaluation", metavar="DIR", help="folder to write the report to")
    parser.add_argument("--baseline", metavar="FILE", help="metrics.json of an earlier evaluation of the same images: what got worse?")
    parser.add_argument("--feedback", nargs="+", metavar="LOG", help="logs of the service, - for stdin: how right it is in production")
    parser.add_argument("--robustness_images", type=int, default=1000, metavar="N",
                        help="at most so many images go through the distortions (a seeded draw)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to encode")
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
    from detector.evaluation import feedback, report
    from detector.evaluation.assess import PICTURES, assess_all, hardest, split_rows, stored_columns
    from detector.evaluation.baseline import changes_table, compare, read_baseline
    from detector.evaluation.pictures import contact_sheet, distorted, encode_folder
    from detector.features.columns import without_repeats
    from detector.model.file import load_model
    from detector.verdict import Detector, choose_model
    if args.feedback:
        return feedback.main(args)
    check_folder(args.report_dir, f"--report_dir {args.report_dir}")
    before = read_baseline(args.baseline, args.report_dir) if args.baseline else None
    model_path, bad = choose_model(args.model_path), 0
    detector = Detector(model_path, args.device) if args.data_dir else None
    model, seen = (detector.model, detector.encoder.manifest.get("seen", [])) if detector else (load_model(model_path), [])
    if args.features_file:
        columns = stored_columns(args.features_file, model, args.data_dir)
    else:
        columns, bad = encode_folder(detector, args.data_dir)
    columns = without_repeats(columns)
    first, groups, p_fake, found = assess_all(model, columns, *split_rows(columns, model, seen))
    rows = None if before is None else compare(found, before)
    folder = Path(args.report_dir)
    with report.staged(folder) as place:
        if args.data_dir:
            found |= distorted(detector, args.data_dir, first, groups, args.robustness_images)
            found["hardest"] = hardest(first, p_fake, model["threshold"])
            contact_sheet(args.data_dir, first, found["hardest"], place / "hardest.png")
        else:
            found["not_measured"] = list(PICTURES)
        report.fill(place, found)
    print(report.evaluation(found))
    print(f"report in {folder}/")
    if rows is None:
        return 1 if bad else 0
    print(changes_table(rows) if rows else f"every metric lies in the interval that {args.baseline} records")
    worse = [f"{words} ({part})" for part, words, _, _, verdict in rows if verdict == "worse"]
    if worse:
        say(f"worse than the baseline: {', '.join(worse)}")
    return 1 if worse or bad else 0


if __name__ == "__main__":
    run(main)
