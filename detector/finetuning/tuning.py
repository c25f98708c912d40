"""Tune a pretrained CLIP on labelled images, for finetune_clip.py. Needs torch.

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

HEAD_LR = 1e-3  # learning rate of the head, whatever --lr, because the head starts untrained
# Most images in an evaluation, even over class and source. They cost as much as a dozen steps.
HELD_IMAGES = 512
MEASURED = 4  # steps that are timed; the first is slower and left out


def precision():
    """-> ("cuda" | "cpu", dtype of autocast). float16 needs scaled gradients, bfloat16 does not."""
    if not torch.cuda.is_available():
        return "cpu", torch.bfloat16 if has_bfloat16() else torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "cuda", torch.bfloat16 if native else torch.float16


def to_pixels(crops, labels, device):
    """The loader's uint8 [n, r, r, 3] and int64 [n] -> CLIP's input and float32 labels."""
    pixels = torch.from_numpy(
        preprocessing.normalise(crops.numpy(), preprocessing.clip_transform(crops.shape[1]))
    )
    return pixels.to(device), labels.float().to(device)


def held_auc(model, rows, resolution, batch_size, autocast, device, workers):
    """AUC of the head on untouched images, from rows (path, label, source, sha256)."""
    keys, scores = [(i,) for i in range(len(rows))], []
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    with torch.inference_mode(), autocast:
        for crops, labels in load(rows, batches, resolution, workers):
            pixels, _ = to_pixels(crops, labels, device)
            scores.append(model(pixels)[:, 0].float().cpu())
    # NaN after a step that was too large; the loss of the next step ends the training
    scores = np.nan_to_num(torch.cat(scores).numpy())
    return float(roc_auc_score([row[1] for row in rows], scores))


def peak_gb(device):
    """Peak memory so far, 1e9 bytes: of the GPU, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Training:
    """A tower with a linear head, and the optimiser, schedule and precision of its training."""

    def __init__(self, args, tower):
        self.args, self.tower = args, tower
        self.device, self.dtype = precision()
        # evaluation mode, so that batch norms keep their statistics
        self.model = torch.nn.Sequential(tower, torch.nn.Linear(tower.output_dim, 1)).eval()
        self.model.to(self.device, memory_format=torch.channels_last)
        if args.checkpointing:
            adapters.checkpoint_blocks(tower)
        trained = [p for p in tower.parameters() if p.requires_grad]
        groups = [{"params": trained}, {"params": self.model[1].parameters()}]
        # no weight decay, which would pull the weights away from those of the pretraining
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, [args.lr, HEAD_LR], total_steps=args.steps, pct_start=0.1
        )
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.dtype == torch.float16)
        self.autocast = torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)
        self.best = adapters.Best(adapters.Trained(self.model), args.patience)
        # On a CPU, reading costs a hundredth of a step, and no process needs to be forked.
        self.workers = min(8, processors()) if self.device == "cuda" else 0
        self.parts = {  # of a stored state
            "model": self.best.trained,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
            "best": self.best,
        }

    def step(self, batches, number):
        """One step of the optimiser -> its loss. Raises UsageError if that is not finite."""
        loss = descend(
            self.model, batches, self.optimizer, self.schedule, self.scaler, self.autocast
        )
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss is no number any more at step {number}: give a smaller --lr than"
                f" {self.args.lr:g}"
            )
        return loss

    def evaluate(self, rows, step):
        """Record and log the AUC on rows of held-out sources after `step` steps."""
        auc = held_auc(
            self.model,
            rows,
            self.tower.input_resolution,
            self.args.batch_size,
            self.autocast,
            self.device,
            self.workers,
        )
        self.best.record(auc, step)
        say(
            f" step {step}: AUC {auc:.3f} on {len(rows)} images of held-out sources, best"
            f" {self.best.state['auc']:.3f} at step {self.best.state['step']}"
        )

    def cost(self, durations, images):
        """Parameters, memory and time in a line. `durations`: seconds of each step so far."""
        args, sizes = self.args, [(p.numel(), p.requires_grad) for p in self.tower.parameters()]
        trained, total = sum(n for n, is_trained in sizes if is_trained), sum(n for n, _ in sizes)
        seconds = float(np.median(durations[1:] or durations))
        batch = args.batch_size * args.accumulate
        epoch, run = (
            timedelta(seconds=round(seconds * steps)) for steps in (images / batch, args.steps)
        )
        return (
            f"--train {args.train}: {trained:,} of {total:,} parameters; {self.device},"
            f" {str(self.dtype).removeprefix('torch.')}; {seconds:.2f} s a step of {batch} images,"
            f" {epoch} an epoch of {images:,}, {run} for {args.steps:,} steps; peak memory"
            f" {peak_gb(self.device):.2f} GB"
        )


def fine_tune(args):
    """Tune what --train names, with a linear head that is discarded at the end.

    -> True if a checkpoint was written. Raises UsageError, EncoderError.
    """
    tower = load_visual(args.clip_model)
    torch.manual_seed(args.seed)  # after loading, which draws weights before it replaces them
    adapters.choose_trained(tower, args.train)
    seen, kept, held = list_rows(args)
    say(
        f"{len(seen)} images to train on, {len(kept)} kept for the classifier, {len(held)} of"
        " held-out sources"
    )
    training = Training(args, tower)
    key = training_key(args, seen, training.device, training.dtype)
    first = 0 if args.dry_run else resume(args, key, training.parts)
    last = min(args.steps, MEASURED) if args.dry_run else args.steps
    test = evenly(held, HELD_IMAGES)
    for number in take_steps(training, seen, first, last):
        if not args.dry_run and (number % args.every == 0 or number == args.steps):
            if test:
                training.evaluate(test, number)
            store(args, key, training.parts, number)
    if not args.dry_run:
        finish(args, tower, training.best, seen, held)
    return not args.dry_run


def take_steps(training, rows, first, last):
    """Train on the rows from step `first` to `last`, with progress. Yield each step's number.

    Prints or logs the cost as soon as it is measured.
    """
    args, durations = training.args, []
    keys = draws(balanced_draw(rows), args, first)
    views = load(rows, keys, training.tower.input_resolution, training.workers)
    batches = (to_pixels(*batch, training.device) for batch in views)
    progress = tqdm(range(first + 1, last + 1), initial=first, total=last, unit="step")
    for number in progress:
        if training.best.over:
            return
        started = time.monotonic()
        loss = training.step(list(islice(batches, args.accumulate)), number)
        durations.append(time.monotonic() - started)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if len(durations) == min(MEASURED, last - first):
            line = training.cost(durations, len(rows))
            print(line) if args.dry_run else say(f" {line}")
        yield number


def finish(args, tower, best, seen, held):
    """Write the best weights, with merged adapters, as a checkpoint with its card."""
    best.restore()
    adapters.merge(tower.cpu())
    card = {}
    if held:
        card = {
            "auc": best.state["auc"],
            "step": best.state["step"],
            "held_out": sorted({f"{CLASSES[row[1]]}/{row[2]}" for row in held}),
        }
    save(args, tower, seen, card, read_card(args.clip_model).get("seen", ()))
