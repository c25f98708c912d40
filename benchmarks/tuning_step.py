"""What a step of fine-tuning costs: CLIP's own code, and the code of finetune_clip.py.

    python -m benchmarks.tuning_step
    python -m benchmarks.tuning_step --arms "norms --last 4"

The first blocks are frozen, and their outputs are random numbers here. The speed does not depend on
them. The variants of an arm take steps in turns. Prints Markdown. Needs torch.
"""

import argparse
import time

import torch

import finetune_clip
from benchmarks.measure import heading, in_turns, machine, ratios, row, spread
from detector.base.console import Help, run
from detector.encoders.prepare import load_visual
from detector.finetuning.adapters import choose_trained
from detector.finetuning.tokens import KEPT_PATCHES
from detector.finetuning.tuning import Training

ARMS = ["blocks:4", "lora:8 --last 4", "blocks:2", "norms --last 4"]


class ClipTail(torch.nn.Module):
    """What `Tail` computes from its tokens, by the blocks of clip/model.py."""

    def __init__(self, tower, frozen):
        super().__init__()
        self.tower, self.frozen = tower, frozen

    def forward(self, tokens):
        tokens = tokens.transpose(0, 1)
        for block in self.tower.transformer.resblocks[self.frozen :]:
            tokens = block(tokens)
        return self.tower.ln_post(tokens[0]) @ self.tower.proj


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--clip_model", default="ViT-B/16-8bit", metavar="NAME|FILE", help="encoder to start from")
    add("--arms", nargs="+", default=ARMS, metavar="WHAT", help="values of --train to measure")
    add("--runs", type=int, default=7, metavar="N", help="timed steps of each variant")
    return parser.parse_args(argv)


def timed_step(clip_model, arm, share, own_code=False):
    """-> function () -> seconds of a step on this share of the patches."""
    flags = ["--data_dir", ".", "--output", "unused.pt", "--clip_model", clip_model]
    args = finetune_clip.parse_args([*flags, "--train", *arm.split()])
    tower = load_visual(clip_model)
    choose_trained(tower, args.train, args.last)
    training = Training(args, tower)
    if own_code:
        training.model[0] = ClipTail(tower, training.frozen)
    patches, width = tower.positional_embedding[1:].shape
    shape = args.batch_size, 1 + round(share * patches), width
    tokens = torch.randn(shape, dtype=training.dtype, device=training.device)
    labels = torch.arange(args.batch_size, device=training.device) % 2.0

    def step():
        started = time.perf_counter()
        training.step([(tokens, labels)], 1)
        return time.perf_counter() - started

    return step


def main(argv=None):
    args = parse_args(argv)
    print(f"A step of 32 images, `{args.clip_model}`, on {machine()}; median and range.\n")
    heading("trained", "computed by", "seconds a step", "of CLIP's own code")
    for arm in args.arms:
        variants = {
            "CLIP's own code, all patches": timed_step(args.clip_model, arm, 1, own_code=True),
            "`Tail`, all patches": timed_step(args.clip_model, arm, 1),
            "`Tail`, half of the patches": timed_step(args.clip_model, arm, KEPT_PATCHES),
        }
        seconds = in_turns(variants, args.runs)
        own = next(iter(seconds.values()))
        for name, values in seconds.items():
            row(f"`{arm}`", name, spread(values), ratios(values, own, 2))


if __name__ == "__main__":
    run(main)
