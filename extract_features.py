"""Encode a folder of labelled images with CLIP and write features.npz.

    python extract_features.py --data_dir DIR --output_file features.npz
    CLIP_MODEL=ViT-B/16-8bit python extract_features.py --data_dir DIR
    python extract_features.py --data_dir DIR --limit 4000 --views 3
    python extract_features.py --data_dir s3://bucket/images \\
        --output_file s3://bucket/features.parquet --ray auto

Folders are train/real/..., train/fake/..., test/real/..., test/fake/..., as in the Kaggle set.
The other folders of a path are the source (a generator, a camera). Run the command again to resume
an interrupted run, or to encode images that were added later.
"""

import argparse
import os

from detector.base.addresses import is_remote
from detector.base.console import Help, need_folder, run
from detector.base.constants import MAX_CROPS, MAX_PIXELS, MAX_VIEWS, SPLITS
from detector.base.errors import UsageError
from detector.base.files import only_writer
from detector.encoders.layers import layers_flag

# flag: (least, most) value
LIMITS = {
    "limit": (1, None),
    "batch_size": (1, None),
    "max_pixels": (1, None),
    "views": (0, MAX_VIEWS),
    "crops": (0, MAX_CROPS),
}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add_main_arguments(parser)
    add_selection_arguments(parser)
    add_folder_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    args.output_file = args.output_file or ("features.parquet" if args.ray else "features.npz")
    check_numbers(args)
    check_places(args)
    return args


def add_main_arguments(parser):
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="folder of images")
    parser.add_argument(
        "--output_file", metavar="FILE", help="features to write (default: features.npz)"
    )
    parser.add_argument(
        "--clip_model",
        default=os.environ.get("CLIP_MODEL") or "ViT-L/14",
        metavar="NAME|FILE",
        help="name (docs/encoders.md) or checkpoint; CLIP_MODEL sets the default",
    )
    parser.add_argument(
        "--layers",
        type=layers_flag,
        default="final",
        metavar="L",
        help="final, penultimate, multi, or blocks (8,14,20) whose outputs are joined",
    )


def add_selection_arguments(parser):
    parser.add_argument(
        "--limit", type=int, metavar="N", help="draw N images, evenly over class and split"
    )
    parser.add_argument(
        "--views", type=int, default=0, metavar="N", help="also encode N degraded copies per image"
    )
    parser.add_argument(
        "--crops", type=int, default=0, metavar="N", help="also encode N full-resolution crops"
    )


def add_folder_arguments(parser):
    parser.add_argument("--prune", action="store_true", help="drop the rows of deleted files")
    parser.add_argument(
        "--strict", action="store_true", help="exit with code 1 if images are ignored"
    )
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--labels_file", metavar="CSV", help="table of path, label, split, source, group"
    )
    labels.add_argument(
        "--unlabelled", action="store_true", help="accept any folder; all labels are -1"
    )
    parser.add_argument(
        "--keep_for_test", type=float, metavar="X", help="share of the table for the split test"
    )
    parser.add_argument(
        "--split_names",
        default=",".join(SPLITS),
        metavar="A,B",
        help="folder names that are splits",
    )
    parser.add_argument(
        "--max_bad_fraction",
        type=float,
        default=0.05,
        metavar="X",
        help="accepted share of unreadable images",
    )
    parser.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS, metavar="N", help="largest image accepted"
    )


def add_run_arguments(parser):
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help="images in one forward pass (default: 16, on CUDA 256)",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to encode"
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto: the fastest",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="write features.parquet on Ray: 'local' starts Ray here, 'auto' joins this "
        "machine's cluster",
    )


def check_numbers(args):
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= (most or value):
            limit = f"at least {least}" + (f", at most {most}" if most else "")
            raise UsageError(f"--{name} {value}: must be {limit}")


def check_places(args):
    need_folder(args.data_dir)
    if args.keep_for_test is not None and not (args.labels_file and 0 < args.keep_for_test < 1):
        raise UsageError(
            f"--keep_for_test {args.keep_for_test:g}: must be between 0 and 1, with --labels_file"
        )
    if args.ray and args.output_file.endswith(".npz"):
        raise UsageError(
            f"--output_file {args.output_file}: --ray writes a folder of Parquet files; name it "
            "features.parquet"
        )
    if args.ray and args.labels_file:
        raise UsageError(
            f"--labels_file {args.labels_file}: --ray takes labels from folder names alone; leave "
            "out --ray, or sort the images into folders"
        )
    if args.ray:
        return
    for flag in ("data_dir", "output_file"):
        place = getattr(args, flag)
        if is_remote(place) or flag == "output_file" and place.endswith(".parquet"):
            raise UsageError(
                f"--{flag} {place}: object stores and Parquet need --ray (--ray local starts Ray "
                "here)"
            )


def main(argv=None):
    args = parse_args(argv)
    from detector.features.extraction import extract

    if args.ray:
        from detector.features import cluster
    with only_writer(args.output_file, f"--output_file {args.output_file}"):
        return cluster.extract(args) if args.ray else extract(args)


if __name__ == "__main__":
    run(main)
