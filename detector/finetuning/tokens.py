"""Tokens that the frozen blocks make of fixed views of the images, kept on the disk. Needs torch.

tokens = Tokens(training, rows, drawn_views(seen, args), "tuned.pt.tokens")
tokens.fill()                               # computes the files that are missing
for inputs, labels in tokens.batches(seen, draws(weight, args, first)):
    ...                                     # [n, t, width], float32 [n]

A file holds FILE_VIEWS records (int16 label, float16 [t, width]). Its name starts with a hash of
all that determines the records. An interrupted training therefore finds them again, and another
training does not use them.
"""

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from detector.base.files import atomic_write, check_folder, refusal, reserve, sha256
from detector.finetuning.images import balanced_draw, draws, load, to_pixels

FILE_VIEWS = 1024
WHOLE = -1  # number of the view that is the whole picture
# Share of the patches in a training step, drawn anew in each step. It halves the time of a step
# (PatchDropout, Liu et al., WACV 2023), and evaluations use all patches.
KEPT_PATCHES = 0.5


def drawn_view(seed, views):
    """Seed of a draw -> (number of the view, generator of the rest of the draw)."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(views)), rng


def drawn_views(rows, args, steps):
    """Views that the first `steps` steps draw from the rows, as pairs (row, number), in order."""
    batches = islice(draws(balanced_draw(rows), args, 0), steps * args.accumulate)
    return sorted({(row, drawn_view(seed, args.views)[0]) for b in batches for row, *seed in b})


def view_key(rows, row, number, seed):
    """Key for `load` of view `number`, the same wherever the image is among the rows."""
    return (row,) if number == WHOLE else (row, seed, int(rows[row][3][:8], 16), number)


class Tokens:
    """Stored tokens of `views`, pairs (index into `rows`, number of the view or WHOLE)."""

    def __init__(self, training, rows, views, folder):
        self.training, self.rows, self.views = training, rows, views
        self.folder = Path(folder)
        self.places = {(rows[row][0], number): i for i, (row, number) in enumerate(views)}
        embedding = training.tower.positional_embedding
        self.record = np.dtype([("label", "<i2"), ("tokens", "<f2", tuple(embedding.shape))])
        args, tail = training.args, training.model[0]
        contents = [(rows[row][3], number) for row, number in views]
        values = [args.start, args.seed, tail.frozen, str(training.dtype), contents]
        self.key = sha256(repr(values).encode())[:16]

    @property
    def description(self):
        size = len(self.views) * self.record.itemsize / 1e9
        return (
            f"the first {self.training.frozen} blocks are frozen; their outputs for"
            f" {len(self.views):,} views take {size:.2f} GB in {self.folder} until the training"
            " ends"
        )

    def path(self, number):
        return self.folder / f"{self.key}-{number}"

    def fill(self):
        """Compute and store what is missing, with progress. Raises UsageError on a full disk.

        Files of other settings are removed.
        """
        check_folder(self.folder, f"--output: its folder {self.folder}")
        for path in self.folder.iterdir():
            if not path.name.startswith(self.key):
                path.unlink()
        starts = range(0, len(self.views), FILE_VIEWS)
        missing = [i for i in starts if not self.path(i // FILE_VIEWS).is_file()]
        views = [self.views[i : i + FILE_VIEWS] for i in missing]
        if not missing:
            return
        number = sum(map(len, views))
        with refusal(f"cannot write {number * self.record.itemsize / 1e9:.1f} GB to {self.folder}"):
            reserve(self.folder, number * self.record.itemsize)
        with tqdm(total=number, desc="frozen blocks", unit="view") as progress:
            for start, part in zip(missing, views, strict=True):
                with atomic_write(self.path(start // FILE_VIEWS)) as file:
                    for records in self.compute(part):
                        file.write(records.tobytes())
                        progress.update(len(records))

    def compute(self, views):
        """Views -> their records, a batch at a time."""
        training, size = self.training, self.training.args.batch_size
        keys = [view_key(self.rows, row, number, training.args.seed) for row, number in views]
        batches = [keys[i : i + size] for i in range(0, len(keys), size)]
        resolution = training.tower.input_resolution
        for crops, labels in load(self.rows, batches, resolution, training.workers):
            pixels, _ = to_pixels(crops, labels, training.device)
            with torch.inference_mode(), training.autocast:
                tokens = training.model[0].first(pixels)
            records = np.empty(len(labels), self.record)
            records["label"], records["tokens"] = labels, tokens.half().cpu()
            yield records

    def batches(self, rows, batches):
        """Rows and batches of keys, as for `load` -> (tokens [n, t, width], float32 labels [n]).

        A key with a seed takes a view and KEPT_PATCHES of its patches by that seed.
        """
        training = self.training
        for keys in batches:
            read = [self.read(rows[row][0], seed) for row, *seed in keys]
            labels, tokens = map(np.stack, zip(*read, strict=True))
            tokens = torch.from_numpy(tokens).to(training.device, training.dtype)
            yield tokens, torch.from_numpy(labels).float().to(training.device)

    def read(self, path, seed):
        """-> (label, float16 [t, width]), tokens of a drawn view or of the whole picture."""
        number, rng = drawn_view(seed, self.training.args.views) if seed else (WHOLE, None)
        part, place = divmod(self.places[path, number], FILE_VIEWS)
        # mapped anew each time, so that pages of earlier reads do not count as memory in use
        record = np.memmap(self.path(part), self.record, "r")[place]
        tokens = record["tokens"]
        if not seed:
            return record["label"], np.array(tokens)
        patches = rng.permutation(len(tokens) - 1)[: round(KEPT_PATCHES * (len(tokens) - 1))]
        return record["label"], tokens[[0, *(1 + patches)]]

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)
