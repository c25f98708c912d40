"""Labelled images -> an encoder of one's own, as a checkpoint that `clip.load` and prepare_clip.py accept.

    python finetune_clip.py --clip_model ViT-L/14 --train lora:8 --data_dir DIR --output tuned.pt
    python finetune_clip.py --arch tiny-resnet --data_dir DIR --output small.pt     # from scratch: a small network
    python prepare_clip.py --clip_model tuned.pt
    CLIP_MODEL=tuned.pt python extract_features.py --data_dir DIR

A classifier must be trained on images that its encoder has not seen: on seen ones the scores are far too good, and
with them the threshold and the calibration. So `--keep` holds back a share of `train`, the seen ones are listed in
tuned.json beside the checkpoint, and extract_features.py marks their rows as split 'seen'.
"""
import argparse
import math
import os
import re
import sys
from pathlib import Path

import common
from common import UsageError
from prepare_clip import require_torch, source_of

ARCHITECTURES = {  # arguments of clip.model.ModifiedResNet; heads follow from the width as `clip.load` derives them
    "tiny-resnet": dict(layers=[2, 2, 2, 2], output_dim=128, heads=20 * 32 // 64, input_resolution=160, width=20),
}
AVERAGE = 0.998          # weights averaged by this factor a step: worth about 3 points of AUC
NOTICE = "this encoder was trained from scratch on {} images: not a detector to rely on"
PRECISION = "float32"    # how `auto` runs it: bfloat16 saves 0.7 ms an image here and turns 4 of 1,425 verdicts
SAVE_EVERY = 200         # steps between stored states
SIDE = 768               # all images are held in memory, shrunk to this long side: for thousands, not for millions
FROM_SCRATCH = dict(steps=4000, batch_size=48, lr=1e-3)
TUNED = dict(train="lora:8", steps=2000, batch_size=32, accumulate=1, holdout=0.2, every=100, patience=5)
TUNED_LR = {"blocks": 2e-5, "norms": 3e-4, "lora": 2e-4}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=common.Help)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--arch", choices=ARCHITECTURES, default="tiny-resnet", help="network, trained from scratch")
    start.add_argument("--clip_model", metavar="NAME|FILE", help="CLIP to fine-tune: one of OpenAI's names or a checkpoint")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="labelled images, as for extract_features.py")
    parser.add_argument("--output", default="finetuned.pt", metavar="FILE", help="checkpoint to write")
    parser.add_argument("--train_splits", default="train,extra", metavar="A,B", help="splits to learn from")
    parser.add_argument("--keep", type=float, default=0.5, metavar="SHARE",
                        help="share of 'train' that is kept from the encoder, for the classifier")
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default: 4000 from scratch, 2000 with --clip_model)")
    parser.add_argument("--batch_size", type=int, metavar="N",
                        help="images a forward pass, on average half of each class (default: 48 from scratch, else 32)")
    parser.add_argument("--lr", type=float, metavar="X", help="peak learning rate (AdamW, cosine; default: 1e-3 from scratch, "
                                                              "2e-4 for lora, 3e-4 for norms, 2e-5 for blocks)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and of every draw")
    tuning = parser.add_argument_group("with --clip_model")
    tuning.add_argument("--train", metavar="WHAT", help="blocks:K (the last K and what follows them), norms, or lora:R "
                                                        "(adapters of rank R on all linear layers) (default: lora:8)")
    tuning.add_argument("--accumulate", type=int, metavar="N", help="forward passes a step (default: 1)")
    tuning.add_argument("--checkpointing", action="store_true", help="less memory, about a third more time")
    tuning.add_argument("--holdout", type=float, metavar="SHARE",
                        help="share of each class's sources that is never trained on and says when to stop; 0: none (default: 0.2)")
    tuning.add_argument("--every", type=int, metavar="N", help="steps between evaluations on them and stored states (default: 100)")
    tuning.add_argument("--patience", type=int, metavar="N", help="evaluations without gain after which it stops (default: 5)")
    tuning.add_argument("--dry_run", action="store_true", help="measure a few steps, print memory and time, and stop")
    args = parser.parse_args(argv)
    common.need_folder(args.data_dir)
    settle(args)
    return args


def settle(args):
    """Fill in the defaults of the chosen start and refuse what it cannot have. Raises UsageError, EncoderError."""
    if args.clip_model:
        args.arch = None
        if args.clip_model == "tiny":
            raise UsageError("--clip_model tiny: it has no weights to train; give a checkpoint, or --arch tiny-resnet")
        args.start = source_of(args.clip_model)
        if os.path.realpath(args.output) == os.path.realpath(args.clip_model):
            raise UsageError(f"--output {args.output}: that is the checkpoint to start from; name another file")
        args.train = args.train or TUNED["train"]
        if not re.fullmatch(r"norms|(blocks|lora):[1-9]\d{0,3}", args.train):
            raise UsageError(f"--train {args.train}: blocks:K, norms or lora:R, with K or R from 1 on")
        defaults = {**TUNED, "lr": TUNED_LR[args.train.split(":")[0]]}
    else:
        for name in (*(TUNED.keys() - FROM_SCRATCH), "checkpointing", "dry_run"):
            if getattr(args, name) is not None and getattr(args, name) is not False:  # 0 was given
                raise UsageError(f"--{name} goes with --clip_model: name a CLIP to start from")
        defaults = FROM_SCRATCH
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "batch_size", "accumulate", "every", "patience"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name} {value}: at least 1")
    for name in ("keep", "holdout"):
        if (value := getattr(args, name)) is not None and not 0 <= value <= 1:
            raise UsageError(f"--{name} {value:g}: a share between 0 and 1")
    if not 0 < args.lr < math.inf:
        raise UsageError(f"--lr {args.lr:g}: above 0")
    if Path(args.output).is_dir() or Path(args.output).suffix == ".json":  # the card's name
        raise UsageError(f"--output {args.output}: name a file that ends in .pt")
    common.check_folder(Path(args.output).parent, f"--output {args.output}")


if __name__ == "__main__":  # --help and wrong flags are answered now, before what takes a second to import
    common.answered(parse_args)

import imaging  # noqa: E402
from dataset import list_images  # noqa: E402
from descent import descend, resume, save, store, training_key  # noqa: E402
from training_images import balanced_draw, kept_back  # noqa: E402


def load_images(args):
    """-> rows (PIL RGB image, label, source, sha256) of the chosen splits, and the same of those kept back."""
    from distort import fit
    from tqdm import tqdm
    splits, seen, kept = args.train_splits.split(","), [], []
    for entry in tqdm([e for e in list_images(args.data_dir) if e.split in splits], desc="reading", unit="image"):
        data = common.read_bytes(Path(args.data_dir, entry.path))
        try:
            row = fit(imaging.decode_image(data), SIDE), entry.label, entry.source, common.sha256(data)
        except common.ImageError as error:
            tqdm.write(f"left out {entry.path}: {error}", file=sys.stderr)
            continue
        (kept if entry.split == "train" and kept_back(row[3], args.keep) else seen).append(row)
    if len({row[1] for row in seen}) < 2:
        raise UsageError(f"--data_dir {args.data_dir}: no images of both classes in the splits {args.train_splits}")
    return seen, kept


def views(rows, chosen, rng, resolution):
    """Random views of the chosen images -> (float32 [n, 3, r, r], float32 labels [n])."""
    import numpy as np
    import torch
    from distort import random_view
    pixels = [imaging.preprocess(random_view(rows[i][0], rng, resolution), resolution) for i in chosen]
    return torch.from_numpy(np.stack(pixels)), torch.tensor([float(rows[i][1]) for i in chosen])


def kept_auc(model, rows, resolution):
    """AUC of the network's own head on untouched images that it has not seen."""
    import numpy as np
    import torch
    from sklearn.metrics import roc_auc_score
    model.eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack([imaging.preprocess(r[0], resolution) for r in rows]))
        scores = torch.cat([model(part) for part in pixels.split(64)])[:, 0]
    return roc_auc_score([r[1] for r in rows], scores.numpy())


def from_scratch(args):
    """A small network trained on images in memory; its checkpoint holds the average of the weights over the steps."""
    import numpy as np
    import torch
    from clip.model import ModifiedResNet
    from tqdm import tqdm

    torch.manual_seed(args.seed)
    seen, kept = load_images(args)
    common.say(f"{len(seen)} images to learn from, {len(kept)} kept for the classifier")
    arch = ARCHITECTURES[args.arch]
    resolution = arch["input_resolution"]
    model = torch.nn.Sequential(ModifiedResNet(**arch), torch.nn.Linear(arch["output_dim"], 1))
    model = model.to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE),
                                                  use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    autocast = torch.autocast("cpu", torch.bfloat16)  # 1.3 times the speed where the processor has it
    weight = balanced_draw(seen)
    of, parts = training_key(args, seen), dict(model=model, average=average, optimizer=optimizer, schedule=schedule)
    first = resume(args, of, parts)

    # No thread makes the next batch ahead: beside torch's own threads it made a step three times as long on two cores.
    progress = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step")
    for step in progress:
        rng = np.random.default_rng([args.seed, step])
        pixels, labels = views(seen, rng.choice(len(seen), args.batch_size, p=weight), rng, resolution)
        model.train()
        batch = pixels.contiguous(memory_format=torch.channels_last), labels
        loss = descend(model, [batch], optimizer, schedule, scaler, autocast)
        average.update_parameters(model)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            store(args, of, parts, step + 1)
            if kept:
                common.say(f" step {step + 1}: AUC {kept_auc(average.module, kept, resolution):.3f} on kept images")
    save(args, average.module[0].eval(), seen, {"notice": NOTICE.format(len(seen)), "precision": PRECISION})
    return True


def main(argv=None):
    args = parse_args(argv)
    require_torch("training an encoder")
    import torch
    if args.clip_model:
        from tuning import fine_tune as train
    else:
        train = from_scratch
    try:
        written = train(args)
    except torch.OutOfMemoryError:
        raise UsageError(f"--batch_size {args.batch_size}: the GPU's memory does not suffice; give a smaller one and a larger "
                         "--accumulate, or --checkpointing") from None
    if written:
        common.say(f"wrote {args.output}; next: python prepare_clip.py --clip_model {args.output}")


if __name__ == "__main__":
    common.run(main)
