"""Find what gives labels away without a detector: duplicates, file formats, image sizes.

    python audit.py --data_dir DIR
    python audit.py --data_dir DIR --labels_file labels.csv
    python audit.py --features_file features.npz      # also lists labels that look wrong

Needs no model. A LEAK makes a test metric worthless, and the exit code is then 1. A note is only
for your information.
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
        "--features_file", metavar="FILE", help="features file that extract_features.py wrote"
    )
    parser.add_argument(
        "--labels_file", metavar="CSV", help="table of path, label, split, source, group"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(argv)
    if args.data_dir is not None:
        need_folder(args.data_dir)
    else:
        need_features(args.features_file, args.labels_file)
    return args


def main(argv=None):
    args = parse_args(argv)
    from detector.evaluation.audit import audit_features, audit_folder, report, sentences

    if args.data_dir:
        findings = audit_folder(args.data_dir, args.labels_file)
    else:
        findings = audit_features(args.features_file)
    findings = all_printable(findings)
    text, code = report(findings)
    fatal, note = sentences(findings)
    print(json.dumps({**findings, "fatal": fatal, "note": note}) if args.json else text)
    return code


if __name__ == "__main__":
    run(main)
