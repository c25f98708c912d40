"""Labelled images -> CLIP tuned on them: a checkpoint for prepare_clip.py and `clip.load`.

    python finetune_clip.py --clip_model ViT-L/14 --train lora:8 --data_dir DIR --output tuned.pt
    python prepare_clip.py --clip_model tuned.pt
    CLIP_MODEL=tuned.pt python extract_features.py --data_dir DIR

Train the classifier only on images that its encoder has not seen. On seen images the scores are far
too good, and so the threshold and the calibration are wrong. `--keep` therefore holds back a share
of `train`. tuned.json beside the checkpoint lists the seen images, and extract_features.py marks
their rows as split 'seen'.
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
    add_file_arguments(parser.add_argument)
    add_step_arguments(parser.add_argument)
    add_stopping_arguments(parser.add_argument)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="measure a few steps, print memory and time, and stop",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of new weights and of every draw"
    )
    args = parser.parse_args(argv)
    need_folder(args.data_dir)
    check(args)
    return args


def add_file_arguments(add):
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
    add("--train_splits", default="train,extra", metavar="A,B", help="splits to train on")
    add(
        "--keep",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of 'train' kept for the classifier; the encoder does not see it",
    )


def add_step_arguments(add):
    add(
        "--train",
        default="lora:8",
        metavar="WHAT",
        help=(
            "blocks:K (the last K blocks and the layers after them), norms, or lora:R (adapters of"
            " rank R on all linear layers)"
        ),
    )
    add(
        "--last",
        type=int,
        metavar="K",
        help="for norms and lora:R: the last K blocks of a vision transformer alone",
    )
    add(
        "--views",
        type=int,
        default=3,
        metavar="N",
        help=(
            "fixed views of an image, where the first blocks are frozen: their outputs are stored"
            " beside --output until the training ends. 0: new views in each step, nothing stored"
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
            "peak learning rate (AdamW, cosine; default: 2e-4 for lora, 3e-4 for norms, 2e-5 for"
            " blocks)"
        ),
    )


def add_stopping_arguments(add):
    add(
        "--holdout",
        type=float,
        default=0.2,
        metavar="SHARE",
        help=(
            "share of each class's sources to hold out; their AUC decides when to stop. 0 holds out"
            " none"
        ),
    )
    add(
        "--every",
        type=int,
        default=100,
        metavar="N",
        help="steps between evaluations; each also stores a state to resume from",
    )
    add(
        "--patience",
        type=int,
        default=5,
        metavar="N",
        help="stop after N evaluations without a better AUC",
    )


def check(args):
    """Refuse bad values, and fill in `start` and `lr`. Raises UsageError, EncoderError."""
    from detector.encoders.prepare import source_of

    args.start = source_of(args.clip_model)
    if os.path.realpath(args.output) == os.path.realpath(args.clip_model):
        raise UsageError(
            f"--output {args.output}: is the checkpoint to start from; name another file"
        )
    if not re.fullmatch(r"norms|(blocks|lora):[1-9]\d{0,3}", args.train):
        raise UsageError(
            f"--train {args.train}: must be blocks:K, norms or lora:R, with K or R at least 1"
        )
    if args.last is not None and args.train.startswith("blocks"):
        raise UsageError(
            f"--last {args.last}: goes with --train lora:R or norms; blocks:K has its own number"
        )
    if args.views < 0:
        raise UsageError(f"--views {args.views}: must be at least 0")
    if args.lr is None:
        args.lr = LEARNING_RATES[args.train.split(":")[0]]
    for name in ("steps", "batch_size", "accumulate", "every", "patience", "last"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    for name in ("keep", "holdout"):
        if not 0 <= (value := getattr(args, name)) <= 1:
            raise UsageError(f"--{name} {value:g}: must be a share between 0 and 1")
    if not 0 < args.lr < math.inf:
        raise UsageError(f"--lr {args.lr:g}: must be above 0, and finite")
    check_output(args.output)


def check_output(output):
    """Raises UsageError unless the checkpoint and its card can be written."""
    if Path(output).is_dir() or Path(output).suffix == ".json":  # the card's name
        raise UsageError(f"--output {output}: name a file that ends in .pt")
    for path in (output, Path(output).with_suffix(".json")):
        check_file(path, f"--output {output}")


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
            f"--batch_size {args.batch_size}: the GPU's memory does not suffice; give a smaller"
            " batch and a larger --accumulate, or --checkpointing"
        ) from None
    if written:
        say(f"wrote {args.output}; next: python prepare_clip.py --clip_model {args.output}")


if __name__ == "__main__":
    run(main)
