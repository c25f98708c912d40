"""A pretrained CLIP tuned on labelled images: finetune_clip.py --clip_model. Needs torch.

fine_tune(args)         # args of finetune_clip.py; True if a checkpoint was written
"""

import math
import resource
import sys
import time
from datetime import timedelta
from itertools import islice

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from detector.base.console import say
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.encoders.prepare import load_visual, read_card
from detector.encoders.runtime import has_bfloat16, processors
from detector.finetuning import adapters
from detector.finetuning.descent import descend, resume, save, store, training_key
from detector.finetuning.images import balanced_draw, draws, evenly, list_rows, load
from detector.images import preprocessing

HEAD_LR = 1e-3  # of the head, whatever --lr: it starts from nothing
HELD_IMAGES = (
    512  # most in an evaluation, even over class and source: they cost as much as a dozen steps
)
MEASURED = 4  # steps that tell what the rest will take; the first is slower and left out


def precision():
    """-> ("cuda" | "cpu", the dtype of autocast there). float16 needs scaled gradients, bfloat16 does not."""
    if torch.cuda.is_available():
        return "cuda", (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return "cpu", torch.bfloat16 if has_bfloat16() else torch.float32


def to_pixels(crops, labels, device):
    """uint8 [n, r, r, 3] and int64 [n], as the loader has them -> CLIP's input and float32 labels, both on the device."""
    return torch.from_numpy(preprocessing.normalise(crops.numpy())).to(device), labels.float().to(
        device
    )


def held_auc(model, rows, resolution, batch_size, autocast, device, workers):
    """AUC of the head on untouched images, from rows (path, label, source, sha256)."""
    keys, scores = [(i,) for i in range(len(rows))], []
    with torch.inference_mode(), autocast:
        for crops, labels in load(
            rows,
            [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)],
            resolution,
            workers,
        ):
            scores.append(model(to_pixels(crops, labels, device)[0])[:, 0].float().cpu())
    scores = np.nan_to_num(
        torch.cat(scores).numpy()
    )  # after a step too far: the next one's loss will say so
    return float(roc_auc_score([row[1] for row in rows], scores))


def peak_gb(device):
    """Most memory so far, 1e9 bytes: of the GPU's, or all of this process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def cost(args, tower, took, images, device, dtype):
    """One line: what is trained, memory, time. `took`: seconds of each step so far."""
    step = float(np.median(took[1:] or took))
    trained, all_of_it = (
        sum(p.numel() for p in tower.parameters() if p.requires_grad or everything)
        for everything in (False, True)
    )
    a_step = args.batch_size * args.accumulate
    epoch, run = (timedelta(seconds=round(step * steps)) for steps in (images / a_step, args.steps))
    return (
        f"--train {args.train}: {trained:,} of {all_of_it:,} parameters; {device},"
        f" {str(dtype).removeprefix('torch.')}; {step:.2f} s a step of {a_step} images, {epoch} an"
        f" epoch of {images:,}, {run} for {args.steps:,} steps; peak memory"
        f" {peak_gb(device):.2f} GB"
    )


def fine_tune(args):
    """Tune what --train names and a linear head, which is then thrown away, on images from disk. -> was a checkpoint written?

    Raises UsageError, EncoderError.
    """
    tower = load_visual(args.clip_model)
    torch.manual_seed(args.seed)  # after loading, which draws weights before it replaces them
    adapters.choose_trained(tower, args.train)
    seen, kept, held = list_rows(args)
    say(
        f"{len(seen)} images to learn from, {len(kept)} kept for the classifier, {len(held)} of"
        " held-out sources"
    )
    device, dtype = precision()
    model = torch.nn.Sequential(
        tower, torch.nn.Linear(tower.output_dim, 1)
    ).eval()  # batch norms keep their statistics
    model.to(device, memory_format=torch.channels_last)
    if args.checkpointing:
        adapters.checkpoint_blocks(tower)
    groups = [
        {"params": [p for p in tower.parameters() if p.requires_grad]},
        {"params": model[1].parameters()},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, weight_decay=0
    )  # towards zero would be away from what was learnt before
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [args.lr, HEAD_LR], total_steps=args.steps, pct_start=0.1
    )
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    best = adapters.Best(adapters.Trained(model), args.patience)
    of = training_key(args, seen, device, dtype)
    parts = dict(
        model=best.trained, optimizer=optimizer, schedule=schedule, scaler=scaler, best=best
    )
    first = 0 if args.dry_run else resume(args, of, parts)

    workers = (
        min(8, processors()) if device == "cuda" else 0
    )  # on a processor reading costs a hundredth of a step, and no fork
    views = load(seen, draws(balanced_draw(seen), args, first), tower.input_resolution, workers)
    batches = (to_pixels(*batch, device) for batch in views)
    test, took = evenly(held, HELD_IMAGES), []
    last = min(args.steps, MEASURED) if args.dry_run else args.steps
    progress = tqdm(range(first, last), initial=first, total=last, unit="step")
    for step in progress:
        if best.over:
            break
        started = time.monotonic()
        loss = descend(
            model, list(islice(batches, args.accumulate)), optimizer, schedule, scaler, autocast
        )
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss is no number any more at step {step + 1}: give a smaller --lr than"
                f" {args.lr:g}"
            )
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        took.append(time.monotonic() - started)
        if len(took) == min(MEASURED, last - first):
            line = cost(args, tower, took, len(seen), device, dtype)
            print(line) if args.dry_run else say(f" {line}")
        if not args.dry_run and ((step + 1) % args.every == 0 or step + 1 == args.steps):
            if test:
                auc = held_auc(
                    model, test, tower.input_resolution, args.batch_size, autocast, device, workers
                )
                best.saw(auc, step + 1)
                say(
                    f" step {step + 1}: AUC {auc:.3f} on {len(test)} images of held-out sources, "
                    f"best {best.found['auc']:.3f} at step {best.found['step']}"
                )
            store(args, of, parts, step + 1)
    if not args.dry_run:
        finish(args, tower, best, seen, held)
    return not args.dry_run


def finish(args, tower, best, seen, held):
    """The best weights, adapters merged into them, as a checkpoint with its card."""
    best.restore()
    adapters.merge(tower.cpu())
    before = read_card(args.clip_model)
    card = {}
    if held:
        card = {
            "auc": best.found["auc"],
            "step": best.found["step"],
            "held_out": sorted({f"{CLASSES[row[1]]}/{row[2]}" for row in held}),
        }
    save(args, tower, seen, card, before.get("seen", ()))
