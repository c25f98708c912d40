"""Compare two models on the same labelled images: differences, intervals, disagreements.

    python compare.py a.joblib b.joblib --data_dir data
    python compare.py a.joblib b.joblib --features_files a.npz b.npz

The models may have different encoders. Images that trained a model or its encoder are left out, by
their hashes. --data_dir also shares every image on social media, and shows the images with two
verdicts. The exit code is 1 where an image cannot be read.
"""

import argparse
from pathlib import Path

from detector.base.console import Help, need_folder, run
from detector.base.files import only_writer


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument("models", nargs=2, metavar="FILE", help="models of train_model.py, a and b")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--data_dir", metavar="DIR", help="folder of labelled images")
    images.add_argument(
        "--features_files",
        nargs=2,
        metavar="FILE",
        help="features of the same images, by the encoder of a and by that of b",
    )
    parser.add_argument(
        "--report_dir", default="comparison", metavar="DIR", help="folder to write the report to"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to encode"
    )
    args = parser.parse_args(argv)
    if args.data_dir:
        need_folder(args.data_dir)
    return args


def main(argv=None):
    args = parse_args(argv)
    from detector.evaluation.comparison import compare

    # The folder's parent may be read-only.
    with only_writer(Path(args.report_dir, "comparison.json"), f"--report_dir {args.report_dir}"):
        text, unreadable = compare(**vars(args))
    print(text)
    return 1 if unreadable else 0


if __name__ == "__main__":
    run(main)
