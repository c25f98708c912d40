"""extract_features.py --ray: the same rows, made by workers on a Ray cluster, as Parquet files.

    python extract_features.py --data_dir DIR --output_file features.parquet --ray local

Images are dealt out in parts. A worker keeps an encoder. It reads and encodes the images of a part
and writes the part atomically. The part's name follows from the names, sizes and times of its
images. So a worker, a node or this command may be killed: a stored part is not made again, and a
part made twice is one file. _meta.json is written last and lists the parts that count.
"""

import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np

from detector.base.addresses import is_remote
from detector.base.console import one_line, say
from detector.base.constants import CLASSES
from detector.base.errors import DetectorError, UsageError
from detector.base.files import check_folder
from detector.encoders import runtime
from detector.features import growing, storage
from detector.features.columns import COLUMNS, SEEN, count_cells, join_columns
from detector.features.extraction import (
    BATCH,
    check_skipped,
    drawn,
    encode_ahead,
    exit_code,
    find_images,
    join_parts,
    labels_of,
    meta_of,
    part_name,
    reader_pool,
    report_seen,
    report_skipped,
    run_key,
    summary,
)
from detector.images.folders import Entry

PART_BATCHES = 16  # batches in a part: a killed worker loses a few minutes at most
CPUS_OF_A_WORKER = 8  # up to here, twice the processors halve an encoder's time
REPORT_ROWS = 1_000_000  # more rows are not searched for look-alikes


# ---- the cluster ----


@contextmanager
def connected(address):
    """Yield Ray, connected to a cluster or ('local') started here. Raises UsageError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    # silences Ray's warning about a variable that we do not use
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UsageError(
            "--ray needs Ray, which is not installed: pip install -r requirements/ray.txt"
        ) from None
    connect(ray, address)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised as well
    with redirect_stdout(sys.stderr):  # Ray prints that workers died, and continues
        try:
            yield ray
        finally:
            ray.shutdown()


def connect(ray, address):
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if re.fullmatch(r"[^/]+:\d+", address):  # without this check Ray waits for minutes
            host, port = address.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=5).close()
        if address == "local":
            quiet |= {"num_cpus": runtime.processors(), "include_dashboard": False}
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(
            f"--ray {address}: no cluster responds ({one_line(error)}); name 'auto' on a node of "
            "the cluster, HOST:PORT or 'local'"
        ) from None


def plan(nodes, device, folder):
    """Ray's nodes -> (device, processors of a worker, GPUs of a worker, number of workers).

    Raises UsageError.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    with_gpu = [(r.get("CPU", 0), r["GPU"]) for r in resources if r.get("GPU", 0) >= 1]
    if device == "auto" and with_gpu and (Path(folder) / "vision.safetensors").is_file():
        device = "cuda"
    if device == "cuda":
        if not with_gpu:
            raise UsageError("--device cuda: no node of the cluster has a GPU; use --device cpu")
        share = max(1, int(min(cpu / gpu for cpu, gpu in with_gpu)))
        return "cuda", share, 1, int(sum(gpu for _, gpu in with_gpu))
    cpus = [int(r.get("CPU", 0)) for r in resources]
    share = min(CPUS_OF_A_WORKER, max(cpus))
    if share < 1:
        raise UsageError("--ray: no node of the cluster has a processor to give")
    return "cpu", share, 0, sum(n // share for n in cpus)


class Worker:
    """Runs on the cluster. Keeps an encoder and turns the images of a part into a stored part."""

    def __init__(self, *options):
        self.options, self.encoder = options, None

    def open(self, encoder, args, device, cpus):
        """Called with the first part, because Ray reports an error in a constructor as a crash."""
        for flag in ("data_dir", "output_file"):
            place = getattr(args, flag)
            if not is_remote(place) and not Path(place).is_dir():
                raise UsageError(
                    f"--{flag} {place}: not there on {socket.gethostname()}; every node must see "
                    "it, as with NFS or s3://"
                )
        self.args = args
        self.encoder = runtime.Encoder(
            unpack(encoder), device, args.precision, cpus if device == "cpu" else 0
        )
        self.readers = reader_pool(device, cpus)

    def __call__(self, part):
        """{'name': [name], 'images': [JSON of [Entry, stamp] of each]} -> {'name', 'about'}.

        'about' is [JSON of `about_part`]. A user's error is {'error': message}, because Ray returns
        only the traceback of an exception.
        """
        try:
            if self.encoder is None:
                self.open(*self.options)
            about = self.store(part["name"][0], json.loads(part["images"][0]))
        except DetectorError as error:
            about = {"error": str(error)}
        return {"name": part["name"], "about": [json.dumps(about)]}

    def store(self, name, images):
        args, entries = self.args, [Entry(*entry) for entry, _ in images]
        sizes = args.max_pixels, args.views, args.crops
        parts = encode_ahead(
            args.data_dir, entries, self.encoder, args.batch_size, self.readers, *sizes
        )
        columns, bad = join_parts(list(parts))
        columns |= labels_of(columns, entries, self.encoder)
        stamps = [(entry[0], stamp) for entry, stamp in images]
        about = describe(columns, stamps) | {"bad": bad, "precision": self.encoder.precision}
        storage.write_part(args.output_file, name, columns, about)
        return about


def describe(columns, stamps):
    """Footer of a part: its images with their stamps, its number of rows, and its counts."""
    kept = set(columns["paths"].tolist())
    return {
        "stamps": [[path, stamp] for path, stamp in stamps if path in kept],
        "rows": len(columns["paths"]),
        "cells": count_cells(columns),
    }


def pack(ray, folder, address):
    """Put a prepared encoder into Ray's memory, for nodes that lack it.

    -> (its manifest, [reference to {name: bytes}]).
    """
    manifest = runtime.read_manifest(folder)
    if address == "local":
        return manifest, []
    return manifest, [ray.put({file.name: file.read_bytes() for file in Path(folder).iterdir()})]


def unpack(encoder):
    """-> folder of the prepared encoder on this node. Writes it into the cache if it is missing."""
    import ray

    from detector.encoders.prepare import keep

    manifest, files = encoder
    folder = runtime.find_encoder(identity=manifest["identity"])
    if folder:
        return folder
    (runtime.cache_dir() / "encoders").mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=runtime.cache_dir(), prefix=".unpacking-"))
    try:
        for name, data in ray.get(files[0]).items():
            (scratch / name).write_bytes(data)
        return keep(scratch, manifest["name"], manifest["identity"])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---- parts ----


def deal(entries, stamps, size, first):
    """Entries -> {name of part: [[entry, stamp], ...]}, `size` images each.

    The parts are numbered from `first` on.
    """
    parts = {}
    for number, start in enumerate(range(0, len(entries), size), first):
        batch = entries[start : start + size]
        name = part_name(number, [(e.path, stamps[e.path]) for e in batch])
        parts[f"part-{name}.parquet"] = [[e, stamps[e.path]] for e in batch]
    return parts


def number_of(name):
    return int(re.fullmatch(r"part-(\d+)-\w+\.parquet", name)[1])


def encode_missing(ray, parts, args, folder, workers):
    """Have the workers of `plan` make every part that is not stored yet.

    -> {name: `about_part`} of all parts.
    """
    from tqdm import tqdm

    abouts = read_stored(parts, args.output_file)
    missing = {name: images for name, images in parts.items() if name not in abouts}
    if not missing:
        return abouts
    rows = start_workers(ray, missing, args, folder, workers)
    with tqdm(total=sum(map(len, parts.values())), unit="image") as progress:
        progress.update(sum(len(parts[name]) for name in abouts))
        progress.initial = progress.n
        for row in rows:
            abouts[row["name"]] = about = json.loads(row["about"])
            if "error" in about:
                raise UsageError(about["error"])
            report_skipped(about["bad"])
            progress.update(len(parts[row["name"]]))
    return abouts


def read_stored(parts, output):
    """{name: `about_part`} of the parts that an earlier run stored. Names the files it skipped."""
    files = storage.list_stamps(output)
    abouts = storage.about_parts(output, [name for name in parts if name in files])
    for about in abouts.values():
        report_skipped(about["bad"])
    if abouts:
        say(f"resuming: {len(abouts)} of {len(parts)} parts are stored already")
    return abouts


def start_workers(ray, missing, args, folder, workers):
    """{name: [[entry, stamp], ...]} -> iterator over the results of `Worker`, in any order."""
    device, cpus, gpus, room = workers
    say(
        f"{len(missing)} parts of {len(next(iter(missing.values())))} images; room for {room} "
        f"workers of {cpus} processors{' and a GPU' * gpus}"
    )
    items = [{"name": name, "images": json.dumps(images)} for name, images in missing.items()]
    pool = ray.data.ActorPoolStrategy(min_size=max(1, min(room, len(items))), max_size=len(items))
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Worker,
        batch_size=1,
        compute=pool,
        num_cpus=cpus,
        num_gpus=gpus,
        fn_constructor_args=(pack(ray, folder, args.ray), args, device, cpus),
    )
    return results.iter_rows()


# ---- the data set ----


def check_output(output):
    """Raises UsageError for an output that cannot be written or is a folder of something else."""
    if not is_remote(output):
        if Path(output).is_file():
            raise UsageError(
                f"--output_file {output}: is a file; --ray writes a folder of Parquet files, name "
                "another"
            )
        check_folder(output, f"--output_file {output}")
    files = storage.list_stamps(output)
    if files and "_key.json" not in files:
        raise UsageError(f"--output_file {output}: is a folder with other files; name a new folder")


def open_output(output, key):
    """{name: `about_part`} of the data set that an earlier run finished.

    A data set of other settings is set aside; in an object store it is refused. Raises UsageError.
    """
    files = storage.list_stamps(output)
    if files and json.loads(storage.read_bytes(output, "_key.json")) != key:
        reason = "was made with other flags or another encoder"
        if is_remote(output):
            raise UsageError(f"--output_file {output}: {reason}; name another place")
        growing.set_aside(output, reason)
        files = {}
    storage.write_bytes(output, "_key.json", json.dumps(key).encode())
    if "_meta.json" not in files:
        return {}
    return storage.about_parts(output, storage.read_meta(output)["parts"])


def changes(abouts, stamps, prune, listing):
    """Sort the images of stored parts by their fate.

    -> (paths whose rows stay, paths changed or to prune, paths that are gone but not to prune).
    Rows of files in an unreadable folder stay.
    """
    stored = {path: tuple(stamp) for about in abouts.values() for path, stamp in about["stamps"]}
    unread = tuple(f"{folder}/" if folder else "" for folder, _ in listing.unreadable)
    gone = {path for path in stored if path not in stamps and not path.startswith(unread)}
    changed = {path for path in stored if stamps.get(path) and stamps[path] != stored[path]}
    stay = set(stored) - changed - gone
    if stored:
        counts = [f"{len(stay)} images are unchanged"]
        counts += [f"{len(changed)} have changed"] if changed else []
        remedy = "and dropped" if prune else "(--prune drops their rows)"
        counts += [f"{len(gone)} are gone {remedy}"] if gone else []
        say(", ".join(counts))
    return (stay, changed | gone, set()) if prune else (stay, changed, gone)


def rewrite(args, abouts, drop, gone, new):
    """Stored parts without the rows of `drop`, and without rows of `gone` that were moved.

    A row is moved if its bytes are in a part of `new`. A part that loses rows gets another name.
    -> {name: `about_part`}, in order.
    """
    moved = set()
    for name in new if gone else ():
        moved.update(storage.read_part(args.output_file, name, ["sha256"])["sha256"])
    gone = gone if moved else set()
    kept = {}
    for name, about in abouts.items():
        paths = {path for path, _ in about["stamps"]}
        if not paths & (drop | gone):
            kept[name] = about
            continue
        columns = storage.read_part(args.output_file, name)
        lost = np.isin(columns["paths"], list(paths & gone))
        lost &= np.isin(columns["sha256"], list(moved))
        lost |= np.isin(columns["paths"], list(paths & drop))
        if not lost.any():
            kept[name] = about
        elif not lost.all():
            columns = {column: columns[column][~lost] for column in COLUMNS}
            about = about | {"bad": []} | describe(columns, about["stamps"])
            name = f"part-{part_name(number_of(name), [name, about['stamps']])}.parquet"
            storage.write_part(args.output_file, name, columns, about)
            kept[name] = about
    return kept


def add_up(abouts):
    """-> (images by split and class, number of rows) of parts."""
    cells = Counter()
    for about in abouts.values():
        cells.update(about["cells"])

    def rank(cell):
        split, _, label = cell.rpartition("/")
        return split, (*CLASSES, "unlabelled").index(label)

    rows = sum(about["rows"] for about in abouts.values())
    return {cell: cells[cell] for cell in sorted(cells, key=rank)}, rows


def images_of(output, names):
    """Parts of a data set -> all columns but the features."""
    wanted = [name for name in COLUMNS if name != "features"]
    parts = storage.iterate_parts(output, names, wanted)
    return join_columns([{**p, "features": np.empty((len(p["paths"]), 0))} for p in parts])


def report_new(output, before, after):
    """Report the images that were added, as `growing` does. Skips a very large data set."""
    if not before:
        return
    if add_up(after)[1] > REPORT_ROWS:
        say(f"more than {REPORT_ROWS} rows: new images are not compared with the earlier ones")
        return
    digests = growing.digests_of(images_of(output, list(before)))
    for line in growing.words(growing.whats_new(digests, images_of(output, list(after)))):
        say(line)


def finish(args, meta, abouts):
    """Write _meta.json, which makes these parts the data set. Then delete all other parts."""
    meta = json.dumps({**meta, "parts": list(abouts)}, sort_keys=True)
    storage.write_bytes(args.output_file, "_meta.json", meta.encode())
    for name in storage.list_stamps(args.output_file):
        if name.endswith(".parquet") and name not in abouts:
            storage.delete_file(args.output_file, name)


def extract(args):
    from detector.encoders.prepare import ensure_encoder

    check_output(args.output_file)
    listing, stamps = storage.list_folder(args.data_dir)
    images = drawn(args, find_images(args, listing))
    entries = [e for e in images.entries if can_be_stored(e.path)]
    folder = ensure_encoder(args.clip_model, args.layers)
    encoder = runtime.read_manifest(folder)
    with connected(args.ray) as ray:
        workers = plan(ray.nodes(), args.device, folder)
        args.batch_size = args.batch_size or BATCH[workers[0]]
        key = run_key(args, encoder, args.precision)
        before = open_output(args.output_file, key)
        stay, drop, gone = changes(before, stamps, args.prune, listing)
        todo = [e for e in entries if e.path not in stay]
        first = max(map(number_of, before), default=-1) + 1
        parts = deal(todo, stamps, PART_BATCHES * args.batch_size, first)
        abouts = encode_missing(ray, parts, args, folder, workers)
    skipped = [is_image for about in abouts.values() for _, _, is_image in about["bad"]]
    check_skipped(skipped, len(entries), args)
    new = {name: abouts[name] for name in parts if abouts[name]["rows"]}
    after = rewrite(args, before, drop, gone, list(new)) | new
    cells, rows = add_up(after)
    if not rows:
        raise UsageError("no image could be read (see the lines above)")
    report_seen(sum(n for cell, n in cells.items() if cell.startswith(f"{SEEN}/")))
    report_new(args.output_file, before, after)
    finish(args, {**meta_of(key, encoder), "counts": count(cells, len(skipped))}, after)
    print(f"{args.output_file}: {summary(cells, rows, encoder['dim'], len(skipped), images)}")
    return exit_code(args, images)


def count(cells, skipped):
    """Images by split and class, number of skipped files -> `counts` of _meta.json."""
    by_class = {c: sum(n for cell, n in cells.items() if cell.endswith(f"/{c}")) for c in CLASSES}
    return {"images": sum(cells.values()), "bad": skipped, **by_class}


def can_be_stored(path):
    """Is the file name valid text? Parquet stores nothing else."""
    if re.search("[\ud800-\udfff]", path):
        say(f"skipped {path}: its name is not UTF-8; rename it")
        return False
    return True
