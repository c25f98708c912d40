"""What a data set's files betray before any detector sees a pixel: twins across splits and labels, telling formats and sizes.

    python audit.py --data_dir DIR
    python audit.py --features_file features.npz      # and labels that look wrong

Needs no model. A LEAK makes a test figure worthless, and the exit code is then 1. A note is something to know.
"""

import argparse
import json

from detector.base.console import all_printable, need_features, need_folder, run
from detector.evaluation.rules import RULES


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=RULES)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--data_dir", metavar="DIR", help="folder of labelled images")
    group.add_argument(
        "--features_file", metavar="FILE", help="or the facts stored by extract_features.py"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(argv)
    if args.data_dir is not None:
        need_folder(args.data_dir)
    else:
        need_features(args.features_file)
    return args


def main(argv=None):
    args = parse_args(argv)
    from detector.evaluation.audit import audit, describe_folder, labels_of, report, sentences
    from detector.features.columns import without_repeats
    from detector.features.file import load_features

    columns, unreadable = (
        describe_folder(args.data_dir) if args.data_dir else (load_features(args.features_file), ())
    )
    columns = without_repeats(columns)
    found = audit(columns, unreadable=unreadable)
    if args.features_file:
        found["labels"], linear = labels_of(columns)
        found["detector"] = {"auc": linear}
    found = all_printable(found)
    text, code = report(found)
    fatal, note = sentences(found)
    print(json.dumps({**found, "fatal": fatal, "note": note}) if args.json else text)
    return code


if __name__ == "__main__":
    run(main)
