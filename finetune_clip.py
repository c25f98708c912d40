"""Labelled images -> CLIP tuned on them: a checkpoint for prepare_clip.py and `clip.load`.

    python finetune_clip.py --clip_model ViT-L/14 --train lora:8 --data_dir DIR --output tuned.pt
    python prepare_clip.py --clip_model tuned.pt
    CLIP_MODEL=tuned.pt python extract_features.py --data_dir DIR

A classifier must be trained on images that its encoder has not seen: on seen ones the scores are
far too good, and
with them the threshold and the calibration. So `--keep` holds back a share of `train`, the seen
ones are listed in
tuned.json beside the checkpoint, and extract_features.py marks their rows as split 'seen'.
"""

import argparse
import math
import os
import re
from pathlib import Path

from detector.base.console import Help, need_folder, run, say
from detector.base.errors import UsageError
from detector.base.files import check_file, only_writer
from detector.encoders import catalogue

LEARNING_RATES = {"blocks": 2e-5, "norms": 3e-4, "lora": 2e-4}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add(
        "--clip_model",
        default=os.environ.get("CLIP_MODEL") or "ViT-L/14",
        metavar="NAME|FILE",
        help=f"CLIP to start from: {', '.join(catalogue.NAMES)}, or a checkpoint",
    )
    add(
        "--data_dir",
        required=True,
        metavar="DIR",
        help="labelled images, as for extract_features.py",
    )
    add("--output", default="finetuned.pt", metavar="FILE", help="checkpoint to write")
    add("--train_splits", default="train,extra", metavar="A,B", help="splits to learn from")
    add(
        "--keep",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of 'train' that is kept from the encoder, for the classifier",
    )
    add(
        "--train",
        default="lora:8",
        metavar="WHAT",
        help=(
            "blocks:K (the last K and what follows them), norms, or lora:R (adapters of rank R on "
            "all linear layers)"
        ),
    )
    add("--steps", type=int, default=2000, metavar="N", help="optimiser steps")
    add(
        "--batch_size",
        type=int,
        default=32,
        metavar="N",
        help="images a forward pass, on average half of each class",
    )
    add("--accumulate", type=int, default=1, metavar="N", help="forward passes a step")
    add("--checkpointing", action="store_true", help="less memory, about a third more time")
    add(
        "--lr",
        type=float,
        metavar="X",
        help=(
            "peak learning rate (AdamW, cosine; default: 2e-4 "
            "for lora, 3e-4 for norms, 2e-5 for blocks)"
        ),
    )
    add(
        "--holdout",
        type=float,
        default=0.2,
        metavar="SHARE",
        help=(
            "share of each class's sources that is never trained on and says when to stop; 0: none"
        ),
    )
    add(
        "--every",
        type=int,
        default=100,
        metavar="N",
        help="steps between evaluations on them and stored states",
    )
    add(
        "--patience",
        type=int,
        default=5,
        metavar="N",
        help="evaluations without gain after which it stops",
    )
    add(
        "--dry_run",
        action="store_true",
        help="measure a few steps, print memory and time, and stop",
    )
    add("--seed", type=int, default=0, metavar="N", help="of weights and of every draw")
    args = parser.parse_args(argv)
    need_folder(args.data_dir)
    check(args)
    return args


def check(args):
    """Refuse values that cannot be, and fill in what follows from others. Raises UsageError,
    EncoderError."""
    from detector.encoders.prepare import source_of

    args.start = source_of(args.clip_model)
    if os.path.realpath(args.output) == os.path.realpath(args.clip_model):
        raise UsageError(
            f"--output {args.output}: that is the checkpoint to start from; name another file"
        )
    if not re.fullmatch(r"norms|(blocks|lora):[1-9]\d{0,3}", args.train):
        raise UsageError(f"--train {args.train}: blocks:K, norms or lora:R, with K or R from 1 on")
    if args.lr is None:
        args.lr = LEARNING_RATES[args.train.split(":")[0]]
    for name in ("steps", "batch_size", "accumulate", "every", "patience"):
        if (value := getattr(args, name)) < 1:
            raise UsageError(f"--{name} {value}: at least 1")
    for name in ("keep", "holdout"):
        if not 0 <= (value := getattr(args, name)) <= 1:
            raise UsageError(f"--{name} {value:g}: a share between 0 and 1")
    if not 0 < args.lr < math.inf:
        raise UsageError(f"--lr {args.lr:g}: above 0")
    if Path(args.output).is_dir() or Path(args.output).suffix == ".json":  # the card's name
        raise UsageError(f"--output {args.output}: name a file that ends in .pt")
    for path in (args.output, Path(args.output).with_suffix(".json")):
        check_file(path, f"--output {args.output}")


def main(argv=None):
    args = parse_args(argv)
    from detector.encoders.prepare import require_torch

    require_torch("training an encoder")
    import torch

    from detector.finetuning.tuning import fine_tune

    try:
        with only_writer(args.output, f"--output {args.output}"):
            written = fine_tune(args)
    except torch.OutOfMemoryError:
        raise UsageError(
            f"--batch_size {args.batch_size}: the GPU's memory does not suffice; "
            "give a smaller one and a larger --accumulate, or --checkpointing"
        ) from None
    if written:
        say(f"wrote {args.output}; next: python prepare_clip.py --clip_model {args.output}")


if __name__ == "__main__":
    run(main)
