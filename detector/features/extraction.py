"""Images -> the rows of a features file: read, encoded in batches, stored in parts, assembled."""

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
from detector.images.folders import has_extension, list_files, read_folder, summary_of

COMPILE_FROM = 30_000  # images from which on torch.compile pays on CUDA: 6 s, for 0.2 ms an image


def draw(entries, limit, seed=0):
    """`limit` entries, as even over (label, split) as their numbers allow; in the order they came.

    Drawn by a seeded hash of the path: images added later leave most of the draw as it was.
    """

    def chance(i):
        return hashlib.sha256(os.fsencode(f"{seed} {entries[i].path}")).hexdigest()

    cells = {}
    for i in sorted(range(len(entries)), key=chance):
        cells.setdefault((entries[i].label, entries[i].split), []).append(i)
    rank = sorted((k, cell, i) for cell, members in cells.items() for k, i in enumerate(members))
    return [entries[i] for i in sorted(i for _, _, i in rank[:limit])]


# ---- state that survives being killed ----


def check_writable(given, parts):
    """An output that cannot be written is told before the hours of encoding, not after. Raises UsageError."""
    refuse_place(given, f"--output_file {given}")
    with atomic_write(parts / "probe"):
        pass
    (parts / "probe").unlink()
    if not any(parts.iterdir()):  # leave no trace if nothing comes of this run
        parts.rmdir()


# ---- encoding ----


def read_row(data_dir, entry, resolution, max_pixels, views=0, crops=0):
    """One image of a folder, here or in an object store -> (entry, pieces uint8 [1 + views, 1 + crops, r, r, 3], its stored columns),
    or (entry, None, [why not, is it an image]). The first is the image as it is, the others are degraded copies, drawn from the hash
    of its bytes; the pieces of each are `preprocessing.in_pieces`."""
    from detector.images.distort import degrade, manageable, view_rng
    from detector.images.facts import describe_image

    try:
        rgb, row = describe_image(storage.read_bytes(data_dir, entry.path), max_pixels)
        base = manageable(rgb) if views else None
        copies = (degrade(base, view_rng(row["sha256"], number)) for number in range(1, views + 1))
        return (
            entry,
            np.stack(
                [preprocessing.in_pieces(image, resolution, crops) for image in (rgb, *copies)]
            ),
            row,
        )
    except (ImageError, OSError) as error:
        return (
            entry,
            None,
            [str(error), getattr(error, "is_image", True) or has_extension(entry.path)],
        )


def read_rows(data_dir, entries, *how):
    return [read_row(data_dir, entry, *how) for entry in entries]


def reader_pool(device, count):
    """What decodes on `count` processors: threads where these encode, too; beside a GPU processes, since Pillow and numpy hold
    the interpreter's lock for a third of the work, and three images at a time would be all."""
    if device == "cpu":
        return ThreadPoolExecutor(count)
    return ProcessPoolExecutor(
        count, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )


def encode_ahead(data_dir, entries, encoder, size, readers, max_pixels, views=0, crops=0):
    """Columns of each batch of `size` entries (see `encode_batch`), one after the other; the next is read meanwhile."""

    def read(batch):
        return [
            readers.submit(read_row, data_dir, entry, encoder.resolution, max_pixels, views, crops)
            for entry in batch
        ]

    batches = [entries[i : i + size] for i in range(0, len(entries), size)]
    ahead = read(batches[0])
    for following in [*batches[1:], []]:
        rows, ahead = ahead, read(following)
        yield encode_batch([row.result() for row in rows], encoder, size, crops)


def encode_batch(rows, encoder, size, crops):
    """Rows from `read_row` -> the columns of one part, and 'bad': JSON of [path, reason, is it an image].

    `size` squares go through the encoder at a time; the features of an image's pieces lie one after the other in its row.
    """
    good = [
        (entry, row, view)
        for entry, pieces, row in rows
        if pieces is not None
        for view in range(len(pieces))
    ]
    pieces = [
        square
        for _, several, _ in rows
        if several is not None
        for square in several.reshape(-1, *several.shape[2:])
    ]
    features = [
        encoder.encode(preprocessing.normalise(np.stack(pieces[i : i + size])))
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


def part_name(number, stamps):
    """Name of a batch from its [path, (bytes, time)]: other when any of its files is, so stale parts are never picked up."""
    return f"{number:06d}-{hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]}"


def tell_skipped(bad):
    """One line for each file without a row: [path, reason, is it an image]."""
    from tqdm import tqdm

    for path, why, _ in bad:
        tqdm.write(printable(f"skipped {path}: {why}"), file=sys.stderr)


def store_batch(rows, path, encoder, size, crops):
    """Futures of `read_rows` -> one part on the disk, there whole or not at all; -> its columns."""
    part = encode_batch([row for some in rows for row in some.result()], encoder, size, crops)
    with atomic_write(path) as file:
        np.savez(file, **part)
    return part


def encode_missing(batches, parts, args, encoder):
    """Encode every batch that has no part yet; -> the parts' paths in order.

    Three batches are in work: one is decoded on all processors, one is encoded, and the third, decoded already, begins the
    moment the second ends: joining arrays and writing parts cost the encoder nothing.
    """
    from tqdm import tqdm

    stamps = [[(e.path, storage.stamp(args.data_dir, e.path)) for e in batch] for batch in batches]
    paths = [parts / f"{part_name(i, stamp)}.npz" for i, stamp in enumerate(stamps)]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    if len(missing) < len(paths):
        for i in sorted(set(range(len(paths))) - set(missing)):
            with np.load(paths[i], allow_pickle=False) as part:
                tell_skipped(json.loads(str(part["bad"])))
        say(f"going on: {len(paths) - len(missing)} of {len(paths)} batches are stored already")
    readers, encoding, waiting = (
        reader_pool(encoder.device, runtime.processors()),
        ThreadPoolExecutor(2),
        deque(),
    )
    how = encoder.resolution, args.max_pixels, args.views, args.crops
    with tqdm(total=sum(map(len, batches)), unit="image") as progress:
        progress.update(progress.total - sum(len(batches[i]) for i in missing))
        progress.initial = progress.n

        def finish(i, stored):
            tell_skipped(json.loads(str(stored.result()["bad"])))
            progress.update(len(batches[i]))

        try:
            for i in missing:
                share = math.ceil(len(batches[i]) / runtime.processors())
                rows = [
                    readers.submit(read_rows, args.data_dir, batches[i][j : j + share], *how)
                    for j in range(0, len(batches[i]), share)
                ]
                waiting.append(
                    (
                        i,
                        encoding.submit(
                            store_batch, rows, paths[i], encoder, args.batch_size, args.crops
                        ),
                    )
                )
                if len(waiting) == 3:
                    finish(*waiting.popleft())
            for i, stored in waiting:
                finish(i, stored)
        except BrokenProcessPool:
            raise UsageError(
                "a process that decodes images was killed, most likely for want of memory; run the"
                " same command again: it goes on from what is stored"
            ) from None
        finally:  # an interrupted run ends with what is being encoded
            for pool in (readers, encoding):
                pool.shutdown(wait=False, cancel_futures=True)
    return paths


# ---- the features file ----


def find_images(args, listing):
    """folders.Listing -> folders.Folder of what there is to encode; not the output, which may lie among the images."""
    folder, output = args.data_dir.rstrip("/"), args.output_file.rstrip("/")
    own = (
        output.removeprefix(f"{folder}/")
        if is_remote(folder)
        else os.path.relpath(output, folder).replace(os.sep, "/")
    )
    lock = os.path.join(os.path.dirname(own), f".{os.path.basename(own)}.lock")
    listing = listing._replace(
        hidden=[path for path in listing.hidden if path != lock],
        files=[
            path
            for path in listing.files
            if path != own and not path.startswith((f"{own}/", f"{own}.parts", f"{own}.old-"))
        ],
    )
    split_names = [name.strip() for name in args.split_names.lower().split(",")]
    found = read_folder(args.data_dir, split_names, args.unlabelled, listing)
    return found._replace(entries=draw(found.entries, args.limit)) if args.limit else found


def exit_code(args, found):
    """1 where a folder could not be read, and with --strict where a folder is ignored."""
    return (
        1
        if found.listing.unreadable
        or args.strict
        and any(not name.endswith("*") for name in found.ignored)
        else 0
    )


def key_of(args, encoder, precision):
    """What rows of one features file have in common."""
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
    """Column sets from `encode_batch` -> (their columns joined, [path, reason, is it an image] of each file without a row)."""
    bad = [entry for part in parts for entry in json.loads(str(part["bad"]))]
    return {
        name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "bad"
    }, bad


def check_skipped(skipped, total, args):
    """Raises UsageError where too many images could not be read; `skipped`: of each file without a row, is it an image?"""
    if (
        sum(skipped) > args.max_bad_fraction * total
    ):  # a caption beside each image is no broken image
        raise UsageError(
            f"{sum(skipped)} of {total} images cannot be read, more than --max_bad_fraction "
            f"{args.max_bad_fraction}; mend them (see the lines above) or raise the limit"
        )


def labels_of(columns, entries, encoder):
    """Columns of parts -> those of them that follow from the paths: labels, splits, sources."""
    by_path = {e.path: e for e in entries}
    rows = [by_path[path] for path in columns["paths"]]
    seen = np.isin([digest[:16] for digest in columns["sha256"]], encoder.manifest.get("seen", []))
    return {
        "labels": np.array([e.label for e in rows], np.int8),
        "sources": np.array([e.source for e in rows], dtype=str),
        "splits": np.where(seen, SEEN, np.array([e.split for e in rows], dtype=str)),
    }


def assemble(part_paths, old, entries, encoder, meta):
    """Old rows, then the parts' -> all columns of the features file, old rows first and as they were.

    Beside them, of each file that was skipped, whether it is an image.
    """
    parts = [dict(np.load(path, allow_pickle=False)) for path in part_paths]
    columns, bad = join_parts(parts) if parts else (None, [])
    skipped = [is_image for _, _, is_image in bad]
    if columns is not None:
        columns |= labels_of(columns, entries, encoder)
    if (
        old is not None and columns is not None
    ):  # a file that was moved (a label put right, say) is not there twice
        moved = ~np.isin(old["paths"], [e.path for e in entries]) & np.isin(
            old["sha256"], columns["sha256"]
        )
        old = {name: old[name][~moved] for name in COLUMNS}
    if old is None and not (columns and len(columns["labels"])):
        raise UsageError("not one image could be read (see the lines above)")
    columns = join_columns([c for c in (old, columns) if c is not None])
    labels = columns["labels"][columns["view"] == 0]
    counts = {
        "images": len(labels),
        "bad": len(skipped),
        **{c: int((labels == i).sum()) for i, c in enumerate(CLASSES)},
    }
    columns["meta"] = np.array(json.dumps({**meta, "counts": counts}, sort_keys=True))
    return columns, skipped


def summary(cells, rows, dim, skipped, found):
    """One line for stdout: what was written, and what not. `cells`: images by split and class; `rows`: with their degraded
    copies; `found`: folders.Folder."""
    images = sum(cells.values())
    views = f" and {rows - images} degraded copies" if rows > images else ""
    return (
        f"{images} images{views}, {dim}-d features ("
        + ", ".join(f"{cell} {n}" for cell, n in cells.items())
        + f"); {skipped} of {len(found.entries)} skipped"
        + summary_of(found)
    )


def extract(args):
    output = Path(os.path.realpath(args.output_file))  # of a link the target: the link stays
    parts = Path(f"{output}.parts")
    check_writable(args.output_file, parts)
    found = find_images(args, list_files(args.data_dir))
    entries = found.entries

    from detector.encoders.prepare import ensure_encoder

    folder = ensure_encoder(args.clip_model, args.precision, args.layers)
    encoder = runtime.Encoder(
        folder, args.device, args.precision, compile=len(entries) >= COMPILE_FROM
    )
    args.batch_size = args.batch_size or (256 if encoder.device == "cuda" else 16)
    key = key_of(args, encoder.manifest, encoder.precision)
    open_parts(parts, key)

    old, before = growing.earlier_rows(output, key, args.data_dir, args.prune)
    known = set() if old is None else set(old["paths"])
    todo = [e for e in entries if e.path not in known]
    batches = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    part_paths = encode_missing(batches, parts, args, encoder)

    columns, skipped = assemble(part_paths, old, entries, encoder, meta_of(key, encoder.manifest))
    check_skipped(skipped, len(entries), args)
    say_news(before, columns)
    store(columns, parts, output)
    print(
        printable(
            f"{args.output_file}:"
            f" {summary(count_cells(columns), *columns['features'].shape, len(skipped), found)}"
        )
    )
    return exit_code(args, found)


def open_parts(parts, key):
    """The folder of parts is this run's from here on; what other flags left in it is set aside."""
    state = parts / "key.json"
    left_by = json.loads(state.read_text()) if state.is_file() else None
    if left_by != key and any(parts.glob("*.npz")):
        growing.set_aside(parts, "was left by other flags, another encoder or precision")
    with atomic_write(state, "w") as file:
        json.dump(key, file)


def say_news(before, columns):
    """What is new beside the rows that were there, said before the file is: a killed run says it again."""
    if (columns["splits"] == SEEN).any():
        say(
            f"{len(np.unique(columns['paths'][columns['splits'] == SEEN]))} images were used to"
            f" train this encoder: split '{SEEN}', not for training a classifier"
        )
    if before:
        for line in growing.words(growing.whats_new(before, columns)):
            say(line)


def store(columns, parts, output):
    """Columns -> the features file, whole or not at all; its parts are removed."""
    with atomic_write(
        parts / "all"
    ) as file:  # in there, so that a killed run leaves nothing else behind
        np.savez_compressed(file, **columns)
    put(parts / "all", output)
    for path in parts.glob(
        "*.npz"
    ):  # key.json goes last: parts never lie there without a word on how they were made
        path.unlink()
    shutil.rmtree(parts)
