"""Tune a pretrained CLIP on labelled images, for finetune_clip.py. Needs torch.

fine_tune(args)         # args of finetune_clip.py; True if a checkpoint was written
"""

import math
import resource
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from tempfile import TemporaryDirectory

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
from detector.finetuning.images import balanced_draw, draws, evenly, list_rows, load, to_pixels
from detector.finetuning.tail import Tail
from detector.finetuning.tokens import WHOLE, Tokens, drawn_views

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


def held_auc(model, batches, autocast):
    """AUC of the head on batches (input of the model, float32 labels)."""
    scores, labels = [], []
    with torch.inference_mode(), autocast:
        for inputs, truth in batches:
            scores.append(model(inputs)[:, 0].float().cpu())
            labels.append(truth.cpu())
    # NaN after a step that was too large; the loss of the next step ends the training
    scores = np.nan_to_num(torch.cat(scores).numpy())
    return float(roc_auc_score(torch.cat(labels).numpy(), scores))


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
        # views that are new in each step cannot be stored
        self.frozen = adapters.frozen_blocks(tower) if args.views else 0
        part = Tail(tower, self.frozen, args.checkpointing) if self.frozen else tower
        # evaluation mode, so that batch norms keep their statistics
        self.model = torch.nn.Sequential(part, torch.nn.Linear(tower.output_dim, 1)).eval()
        self.model.to(self.device, memory_format=torch.channels_last)
        if args.checkpointing and not self.frozen:
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

    def evaluate(self, inputs, rows, step):
        """Record and log the AUC on untouched images of held-out sources after `step` steps."""
        keys, size = [(i,) for i in range(len(rows))], self.args.batch_size
        batches = [keys[i : i + size] for i in range(0, len(keys), size)]
        auc = held_auc(self.model, inputs.batches(rows, batches), self.autocast)
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


class Pixels:
    """The pixels of views, which are read and made when their batch is due."""

    def __init__(self, training):
        self.training = training

    def batches(self, rows, batches):
        """Rows and batches of keys, as for `load` -> (CLIP's input, float32 labels)."""
        training, resolution = self.training, self.training.tower.input_resolution
        for batch in load(rows, batches, resolution, training.workers):
            yield to_pixels(*batch, training.device)


@contextmanager
def open_inputs(training, seen, test):
    """Yields Pixels, or Tokens if the first blocks are frozen. The tokens are removed at the end.

    After an interruption the tokens stay for the resumed training. A dry run prints their cost.
    """
    if not training.frozen:
        yield Pixels(training)
        return
    args, whole = training.args, [(len(seen) + i, WHOLE) for i in range(len(test))]
    views = drawn_views(seen, args, args.steps) + whole
    tokens = Tokens(training, seen + test, views, f"{args.output}.tokens")
    if args.dry_run:
        with TemporaryDirectory() as folder:
            few = Tokens(training, seen, drawn_views(seen, args, MEASURED), folder)
            started = time.monotonic()
            few.fill()
            seconds = (time.monotonic() - started) * len(views) / len(few.views)
            print(f"{tokens.description}, {timedelta(seconds=round(seconds))} to compute")
            yield few
    else:
        say(tokens.description)
        tokens.fill()
        yield tokens
        tokens.remove()


def fine_tune(args):
    """Tune what --train names, with a linear head that is discarded at the end.

    -> True if a checkpoint was written. Raises UsageError, EncoderError.
    """
    tower = load_visual(args.clip_model)
    torch.manual_seed(args.seed)  # after loading, which draws weights before it replaces them
    adapters.choose_trained(tower, args.train, args.last)
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
    with open_inputs(training, seen, test) as inputs:
        for number in take_steps(training, inputs, seen, first, last):
            if not args.dry_run and (number % args.every == 0 or number == args.steps):
                if test:
                    training.evaluate(inputs, test, number)
                store(args, key, training.parts, number)
        if not args.dry_run:
            finish(args, tower, training.best, seen, held)
    return not args.dry_run


def take_steps(training, inputs, rows, first, last):
    """Train on the rows from step `first` to `last`, with progress. Yield each step's number.

    Prints or logs the cost as soon as it is measured.
    """
    args, durations = training.args, []
    keys = draws(balanced_draw(rows), args, first)
    batches = inputs.batches(rows, keys)
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
