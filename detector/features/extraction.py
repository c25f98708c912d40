"""Read images, encode them in batches, store the batches as parts, assemble the features file."""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from detector.base.addresses import is_remote
from detector.base.console import printable, say
from detector.base.constants import CLASSES
from detector.base.errors import ImageError, UsageError
from detector.base.files import atomic_write, put, refuse_place
from detector.base.project import code_commit
from detector.encoders import runtime
from detector.features import growing, storage
from detector.features.columns import COLUMNS, SEEN, count_cells, join_columns
from detector.images import preprocessing
from detector.images.facts import FACTS
from detector.images.folders import Entry, has_extension, list_files, read_folder, summary_of
from detector.images.labels_file import keep_for_test, read_labels

COMPILE_FROM = 30_000  # images; torch.compile takes 6 s on CUDA and saves 0.2 ms an image
BATCH = {"cpu": 16, "cuda": 256}  # images in one forward pass
AHEAD = 3  # batches in work: one being decoded, one being encoded, one decoded and ready


def draw(entries, limit, seed=0):
    """Draw `limit` entries as evenly over (label, split) as possible; keeps their order.

    A seeded hash of the path decides. So images added later change little of the draw.
    """

    def chance(i):
        return hashlib.sha256(os.fsencode(f"{seed} {entries[i].path}")).hexdigest()

    cells = {}
    for i in sorted(range(len(entries)), key=chance):
        cells.setdefault((entries[i].label, entries[i].split), []).append(i)
    rank = sorted((k, cell, i) for cell, members in cells.items() for k, i in enumerate(members))
    return [entries[i] for i in sorted(i for _, _, i in rank[:limit])]


# ---- encoding ----


def read_row(data_dir, entry, transform, max_pixels, views=0, crops=0):
    """Read and prepare one image of a folder or an object store.

    -> (entry, pieces uint8 [1 + views, 1 + crops, r, r, 3], its stored columns), or for a bad file
    (entry, None, [reason, is it an image]). The first view is the image itself. The others are
    degraded copies, drawn from the hash of its bytes. `preprocessing.in_pieces` gives the pieces.
    """
    from detector.images.distort import degrade, manageable, view_rng
    from detector.images.facts import describe_image

    try:
        rgb, row = describe_image(storage.read_bytes(data_dir, entry.path), max_pixels)
        base = manageable(rgb) if views else None
        copies = (degrade(base, view_rng(row["sha256"], number)) for number in range(1, views + 1))
        pieces = [preprocessing.in_pieces(image, transform, crops) for image in (rgb, *copies)]
        return entry, np.stack(pieces), row
    except (ImageError, OSError) as error:
        is_image = getattr(error, "is_image", True) or has_extension(entry.path)
        return entry, None, [str(error), is_image]


def read_rows(data_dir, entries, *options):
    return [read_row(data_dir, entry, *options) for entry in entries]


def reader_pool(device, count):
    """Pool that decodes on `count` processors: threads on a CPU, processes beside a GPU.

    Pillow and numpy hold the interpreter's lock for a third of the work. Threads would decode only
    three images at a time.
    """
    if device == "cpu":
        return ThreadPoolExecutor(count)
    return ProcessPoolExecutor(
        count, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )


def encode_ahead(data_dir, entries, encoder, size, readers, max_pixels, views=0, crops=0):
    """Yield the columns of each batch of `size` entries (see `encode_batch`).

    Reads the next batch meanwhile.
    """

    def read(batch):
        return [
            readers.submit(read_row, data_dir, entry, encoder.transform, max_pixels, views, crops)
            for entry in batch
        ]

    batches = [entries[i : i + size] for i in range(0, len(entries), size)]
    ahead = read(batches[0])
    for following in [*batches[1:], []]:
        rows, ahead = ahead, read(following)
        yield encode_batch([row.result() for row in rows], encoder, size, crops)


def encode_batch(rows, encoder, size, crops):
    """Rows from `read_row` -> columns of a part, and 'bad': JSON of [path, reason, is it an image].

    Encodes `size` pieces at a time. A row's features are those of its pieces, one after the other.
    """
    good = [
        (entry, row, view)
        for entry, pieces, row in rows
        if pieces is not None
        for view in range(len(pieces))
    ]
    pieces = [
        piece
        for _, several, _ in rows
        if several is not None
        for piece in several.reshape(-1, *several.shape[2:])
    ]
    features = [
        encoder.encode(preprocessing.normalise(np.stack(pieces[i : i + size]), encoder.transform))
        for i in range(0, len(pieces), size)
    ]
    features = np.concatenate([np.empty((0, encoder.dim), np.float32), *features])
    return {
        "features": features.reshape(len(good), (1 + crops) * encoder.dim),
        "paths": np.array([e.path for e, _, _ in good], dtype=str),
        "view": np.array([v for _, _, v in good], np.int8),
        "sha256": np.array([r["sha256"] for _, r, _ in good], dtype="U64"),
        "facts": np.array([r["facts"] for _, r, _ in good], dtype=FACTS),
        "thumb": np.array([r["thumb"] for _, r, _ in good], np.uint8).reshape(-1, 64),
        "bad": np.array(json.dumps([[e.path, *why] for e, pieces, why in rows if pieces is None])),
    }


# ---- parts: a killed run resumes from them ----


def check_writable(output, parts):
    """Raises UsageError for an output that cannot be written, before hours of encoding."""
    refuse_place(output, f"--output_file {output}")
    with atomic_write(parts / "probe"):
        pass
    (parts / "probe").unlink()
    if not any(parts.iterdir()):  # leave nothing behind if this run fails
        parts.rmdir()


def open_parts(parts, key):
    """Take the folder of parts for this run. Sets aside parts of a run with other settings."""
    state = parts / "key.json"
    earlier_key = json.loads(state.read_text()) if state.is_file() else None
    if earlier_key != key and any(parts.glob("*.npz")):
        growing.set_aside(parts, "was left by other flags, another encoder or precision")
    with atomic_write(state, "w") as file:
        json.dump(key, file)


def part_name(number, stamps):
    """Name of a part from its number and its [path, (bytes, time)].

    The name changes with any file of the part, so outdated parts are never used.
    """
    return f"{number:06d}-{hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]}"


def report_skipped(bad):
    """Print one line for each file without a row: [path, reason, is it an image]."""
    from tqdm import tqdm

    for path, why, _ in bad:
        tqdm.write(printable(f"skipped {path}: {why}"), file=sys.stderr)


def store_batch(rows, path, encoder, size, crops):
    """Futures of `read_rows` -> one part on the disk, written atomically; -> its columns."""
    part = encode_batch([row for some in rows for row in some.result()], encoder, size, crops)
    with atomic_write(path) as file:
        np.savez(file, **part)
    return part


def encode_missing(batches, parts, args, encoder):
    """Encode every batch that has no part yet; -> the parts' paths in order."""
    from tqdm import tqdm

    stamps = [[(e.path, storage.stamp(args.data_dir, e.path)) for e in batch] for batch in batches]
    paths = [parts / f"{part_name(i, stamp)}.npz" for i, stamp in enumerate(stamps)]
    missing = [pair for pair in zip(batches, paths, strict=True) if not pair[1].is_file()]
    report_stored(set(paths) - {path for _, path in missing}, len(paths))
    with (
        tqdm(total=sum(map(len, batches)), unit="image") as progress,
        closing(store_ahead(missing, args, encoder)) as stored,
    ):
        progress.update(progress.total - sum(len(batch) for batch, _ in missing))
        progress.initial = progress.n
        for batch, part in stored:
            report_skipped(json.loads(str(part["bad"])))
            progress.update(len(batch))
    return paths


def report_stored(paths, total):
    """Say how many parts an earlier run stored, and name the files it skipped."""
    for path in sorted(paths):
        with np.load(path, allow_pickle=False) as part:
            report_skipped(json.loads(str(part["bad"])))
    if paths:
        say(f"resuming: {len(paths)} of {total} batches are stored already")


def store_ahead(missing, args, encoder):
    """[(batch, path of its part)] -> yield (batch, columns of the part) once the part is stored.

    Works on AHEAD batches at a time. So the encoder never waits for joined arrays or written parts.
    """
    readers = reader_pool(encoder.device, runtime.processors())
    encoding, waiting = ThreadPoolExecutor(2), deque()
    options = encoder.transform, args.max_pixels, args.views, args.crops
    try:
        for batch, path in missing:
            share = math.ceil(len(batch) / runtime.processors())
            rows = [
                readers.submit(read_rows, args.data_dir, batch[j : j + share], *options)
                for j in range(0, len(batch), share)
            ]
            stored = encoding.submit(store_batch, rows, path, encoder, args.batch_size, args.crops)
            waiting.append((batch, stored))
            if len(waiting) == AHEAD:
                batch, stored = waiting.popleft()
                yield batch, stored.result()
        for batch, stored in waiting:
            yield batch, stored.result()
    except BrokenProcessPool:
        raise UsageError(
            "a decoding process was killed, most likely because memory ran out; run the same "
            "command again to resume"
        ) from None
    finally:  # an interrupted run ends after the batches being encoded
        for pool in (readers, encoding):
            pool.shutdown(wait=False, cancel_futures=True)


# ---- the features file ----


def find_images(args, listing):
    """folders.Listing -> folders.Folder of the labelled images, before the draw of --limit.

    Leaves out the output, which may be in the same folder.
    """
    folder, output = args.data_dir.rstrip("/"), args.output_file.rstrip("/")
    own = (
        output.removeprefix(f"{folder}/")
        if is_remote(folder)
        else os.path.relpath(output, folder).replace(os.sep, "/")
    )
    lock = os.path.join(os.path.dirname(own), f".{os.path.basename(own)}.lock")
    own_files = (f"{own}/", f"{own}.parts", f"{own}.old-")
    listing = listing._replace(
        hidden=[path for path in listing.hidden if path != lock],
        files=[path for path in listing.files if path != own and not path.startswith(own_files)],
    )
    split_names = [name.strip() for name in args.split_names.lower().split(",")]
    if args.labels_file:
        labelled = read_labels(args.labels_file, args.data_dir, split_names, listing)
        return keep_for_test(labelled, args.keep_for_test) if args.keep_for_test else labelled
    return read_folder(args.data_dir, split_names, args.unlabelled, listing)


def drawn(args, images):
    """folders.Folder -> the same with the entries that --limit draws."""
    return images._replace(entries=draw(images.entries, args.limit)) if args.limit else images


def exit_code(args, images):
    """1 if a folder could not be read, or with --strict if a folder is ignored."""
    ignored = any(not name.endswith("*") for name in images.ignored)
    return int(bool(images.listing.unreadable or args.strict and ignored))


def run_key(args, encoder, precision):
    """The settings that all rows of a features file share."""
    return {
        "encoder": encoder["identity"],
        "precision": precision,
        "batch_size": args.batch_size,
        "limit": args.limit,
        "unlabelled": args.unlabelled,
        "split_names": args.split_names,
        "max_pixels": args.max_pixels,
        "views": args.views,
        "crops": args.crops,
    }


def meta_of(key, encoder):
    named = {k: v for k, v in encoder.items() if k in ("name", "identity", "layers", "dim")}
    return {"format": 1, "key": key, "commit": code_commit(), "encoder": named}


def join_parts(parts):
    """Column sets from `encode_batch` -> (columns, [path, reason, is it an image] of bad files)."""
    bad = [entry for part in parts for entry in json.loads(str(part["bad"]))]
    return {
        name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "bad"
    }, bad


def check_skipped(skipped, total, args):
    """Raises UsageError if too many images are unreadable.

    `skipped`: for each file without a row, whether it is an image. A text file is no bad image.
    """
    if sum(skipped) > args.max_bad_fraction * total:
        raise UsageError(
            f"{sum(skipped)} of {total} images cannot be read, more than --max_bad_fraction "
            f"{args.max_bad_fraction}; repair them (see the lines above) or raise the limit"
        )


def labels_of(columns, entries, encoder):
    """Columns of parts -> those that follow from the paths: labels, splits, sources, groups."""
    by_path = {e.path: e for e in entries}
    rows = [by_path[path] for path in columns["paths"]]
    seen = np.isin([digest[:16] for digest in columns["sha256"]], encoder.manifest.get("seen", []))
    return {
        "labels": np.array([e.label for e in rows], np.int8),
        "sources": np.array([e.source for e in rows], dtype=str),
        "groups": np.array([e.group for e in rows], dtype=str),
        "splits": np.where(seen, SEEN, np.array([e.split for e in rows], dtype=str)),
    }


def relabel(old, entries, encoder):
    """Rows of an earlier file, with the labels, splits, sources and groups of today's entries.

    The other rows keep their own.
    """
    names = ("paths", "labels", "splits", "sources", "groups")
    stored = map(Entry._make, zip(*(old[name].tolist() for name in names), strict=True))
    new = labels_of(old, [*stored, *entries], encoder)
    if n := int(np.any([old[name] != new[name] for name in new], axis=0).sum()):
        say(f"{n} rows have another label, split, source or group than before")
    return old | new


def assemble(part_paths, old, entries, encoder, meta):
    """Old rows, parts -> (columns of the features file, for each skipped file: is it an image?).

    The old rows come first, unchanged.
    """
    parts = [dict(np.load(path, allow_pickle=False)) for path in part_paths]
    columns, bad = join_parts(parts) if parts else (None, [])
    skipped = [is_image for _, _, is_image in bad]
    if columns is not None:
        columns |= labels_of(columns, entries, encoder)
    if old is not None and columns is not None:
        # a moved file (its label corrected, say) has a row already
        moved = ~np.isin(old["paths"], [e.path for e in entries])
        moved &= np.isin(old["sha256"], columns["sha256"])
        old = {name: old[name][~moved] for name in COLUMNS}
    if old is None and not (columns and len(columns["labels"])):
        raise UsageError("no image could be read (see the lines above)")
    columns = join_columns([c for c in (old, columns) if c is not None])
    labels = columns["labels"][columns["view"] == 0]
    counts = {
        "images": len(labels),
        "bad": len(skipped),
        **{c: int((labels == i).sum()) for i, c in enumerate(CLASSES)},
    }
    columns["meta"] = np.array(json.dumps({**meta, "counts": counts}, sort_keys=True))
    return columns, skipped


def summary(cells, rows, dim, skipped, images):
    """One line for stdout about the rows written and the files skipped.

    `cells`: images by split and class; `rows`: with degraded copies; `images`: folders.Folder.
    """
    count = sum(cells.values())
    views = f" and {rows - count} degraded copies" if rows > count else ""
    return (
        f"{count} images{views}, {dim}-d features ("
        + ", ".join(f"{cell} {n}" for cell, n in cells.items())
        + f"); {skipped} of {len(images.entries)} skipped"
        + summary_of(images)
    )


def extract(args):
    output = Path(os.path.realpath(args.output_file))  # a symbolic link stays a link
    parts = Path(f"{output}.parts")
    check_writable(args.output_file, parts)
    every = find_images(args, list_files(args.data_dir))
    images = drawn(args, every)
    entries = images.entries

    from detector.encoders.prepare import ensure_encoder

    folder = ensure_encoder(args.clip_model, args.layers)
    encoder = runtime.Encoder(
        folder, args.device, args.precision, compile=len(entries) >= COMPILE_FROM
    )
    args.batch_size = args.batch_size or BATCH[encoder.device]
    key = run_key(args, encoder.manifest, encoder.precision)
    open_parts(parts, key)

    listed = set(every.listing.files) if args.labels_file else None
    old, before = growing.earlier_rows(output, key, args.data_dir, args.prune, listed)
    old = None if old is None else relabel(old, every.entries, encoder)
    known = set() if old is None else set(old["paths"])
    todo = [e for e in entries if e.path not in known]
    batches = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    part_paths = encode_missing(batches, parts, args, encoder)

    columns, skipped = assemble(part_paths, old, entries, encoder, meta_of(key, encoder.manifest))
    check_skipped(skipped, len(entries), args)
    report_new(before, columns)
    store(columns, parts, output)
    line = summary(count_cells(columns), *columns["features"].shape, len(skipped), images)
    print(printable(f"{args.output_file}: {line}"))
    return exit_code(args, images)


def report_seen(count):
    if count:
        say(
            f"{count} images were used to train this encoder: split '{SEEN}', not for training a "
            "classifier"
        )


def report_new(before, columns):
    """Report the new images before the file is written, so a killed run reports them again."""
    report_seen(len(np.unique(columns["paths"][columns["splits"] == SEEN])))
    if before:
        for line in growing.words(growing.whats_new(before, columns)):
            say(line)


def store(columns, parts, output):
    """Write the features file atomically and remove its parts."""
    # inside the folder of parts, so a killed run leaves nothing else behind
    with atomic_write(parts / "all") as file:
        np.savez_compressed(file, **columns)
    put(parts / "all", output)
    for path in parts.glob("*.npz"):  # key.json goes last: it describes the parts
        path.unlink()
    shutil.rmtree(parts)
