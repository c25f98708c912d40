"""extract_features.py --ray: the same rows, made by as many workers as a Ray cluster has room for, in a Parquet data set.

    python extract_features.py --data_dir DIR --output_file features.parquet --ray local

Images are dealt out in parts. A worker keeps an encoder; it reads the images of a part, encodes them and writes the part, whole
or not at all, under a name that follows from the names, sizes and times of its images. So whatever is killed, a worker, a node or
this command: a part that is stored is not made again, one made twice is one file, and _meta.json, written last, says which count.
"""

import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
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
    check_skipped,
    encode_ahead,
    exit_code,
    find_images,
    join_parts,
    key_of,
    labels_of,
    meta_of,
    part_name,
    reader_pool,
    summary,
    tell_skipped,
)
from detector.images.folders import Entry

PART_BATCHES = 16  # batches in a part: what is lost where a worker is killed, a few minutes at most
CPUS_OF_A_WORKER = 8  # on larger nodes there are several: an encoder takes half as long on twice the processors, up to there
REPORT_ROWS = (
    1_000_000  # up to so many rows a run that adds images looks for look-alikes among them
)


# ---- the cluster ----


@contextmanager
def connected(address):
    """Ray, connected to a cluster or ('local') started here, and ended afterwards. Raises UsageError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a detector phones nobody
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # and says nothing of a variable that we do not use
    try:
        import ray
        import ray.data
    except ImportError:
        raise UsageError(
            "--ray needs Ray, which is not installed: pip install -r requirements/ray.txt"
        ) from None
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if re.fullmatch(r"[^/]+:\d+", address):  # Ray itself would ask there for minutes
            host, port = address.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=5).close()
        if address == "local":
            ray.init("local", num_cpus=runtime.processors(), include_dashboard=False, **quiet)
        else:
            ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(
            f"--ray {address}: no cluster answers ({one_line(error)}); 'auto' on one of its nodes,"
            " HOST:PORT or 'local'"
        ) from None
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(
        logging.CRITICAL
    )  # what it tells comes as an exception, too
    with redirect_stdout(sys.stderr):  # there Ray tells of workers that died, and goes on
        try:
            yield ray
        finally:
            ray.shutdown()


def plan(nodes, device, folder):
    """Ray's nodes -> (device, processors of a worker, GPUs of a worker, workers that there is room for)."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    with_gpu = [(r.get("CPU", 0), r["GPU"]) for r in resources if r.get("GPU", 0) >= 1]
    if (
        device == "cuda"
        or device == "auto"
        and with_gpu
        and (Path(folder) / "vision.safetensors").is_file()
    ):
        if not with_gpu:
            raise UsageError("--device cuda: no node of the cluster has a GPU; use --device cpu")
        return (
            "cuda",
            max(1, int(min(cpu / gpu for cpu, gpu in with_gpu))),
            1,
            int(sum(gpu for _, gpu in with_gpu)),
        )
    cpus = [int(r.get("CPU", 0)) for r in resources]
    share = min(CPUS_OF_A_WORKER, max(cpus))
    if share < 1:
        raise UsageError("--ray: no node of the cluster has a processor to give")
    return "cpu", share, 0, sum(n // share for n in cpus)


class Worker:
    """What runs on the cluster: keeps an encoder, turns the images of a part into a stored part."""

    def __init__(self, *how):
        self.how, self.encoder = how, None

    def open(self, encoder, args, device, cpus):
        """Done with the first part, not before: what goes wrong in a constructor is told as a worker that died."""
        for flag in ("data_dir", "output_file"):
            place = getattr(args, flag)
            if not is_remote(place) and not Path(place).is_dir():
                raise UsageError(
                    f"--{flag} {place}: not there on {socket.gethostname()}; every node must see"
                    " it, as with NFS or s3://"
                )
        self.args = args
        self.encoder = runtime.Encoder(
            unpack(encoder), device, args.precision, cpus if device == "cpu" else 0
        )
        self.readers = reader_pool(device, cpus)

    def __call__(self, part):
        """{'name': [name], 'images': [JSON of [Entry, stamp] of each]} -> {'name': [name], 'about': [JSON of `about_part`]}.

        What a user can mend is {'error': words} instead: of exceptions Ray brings the traceback, not the exception.
        """
        try:
            if self.encoder is None:
                self.open(*self.how)
            about = self.make(part["name"][0], json.loads(part["images"][0]))
        except DetectorError as error:
            about = {"error": str(error)}
        return {"name": part["name"], "about": [json.dumps(about)]}

    def make(self, name, images):
        entries = [Entry(*entry) for entry, _ in images]
        columns, bad = join_parts(
            list(
                encode_ahead(
                    self.args.data_dir,
                    entries,
                    self.encoder,
                    self.args.batch_size,
                    self.readers,
                    self.args.max_pixels,
                    self.args.views,
                    self.args.crops,
                )
            )
        )
        columns |= labels_of(columns, entries, self.encoder)
        about = describe(
            columns, [(entry.path, stamp) for entry, (_, stamp) in zip(entries, images)]
        )
        about |= {"bad": bad, "precision": self.encoder.precision}
        storage.write_part(self.args.output_file, name, columns, about)
        return about


def describe(columns, stamps):
    """What the footer of a part says: its images and their stamps, and how many rows it has of what."""
    kept = set(columns["paths"].tolist())
    return {
        "stamps": [[path, stamp] for path, stamp in stamps if path in kept],
        "rows": len(columns["paths"]),
        "cells": count_cells(columns),
    }


def pack(ray, folder, address):
    """A prepared encoder in Ray's memory, for the nodes that do not have it: (its manifest, [reference to {name: bytes}])."""
    manifest = runtime.read_manifest(folder)
    if address == "local":
        return manifest, []
    return manifest, [ray.put({file.name: file.read_bytes() for file in Path(folder).iterdir()})]


def unpack(encoder):
    """-> the folder of the prepared encoder on this node, written into its cache where it was not there."""
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
    """Entries -> {name of part: [[entry, stamp], ...]}, `size` images each, numbered from `first` on. In order."""
    parts = {}
    for number, start in enumerate(range(0, len(entries), size), first):
        batch = entries[start : start + size]
        name = part_name(number, [(e.path, stamps[e.path]) for e in batch])
        parts[f"part-{name}.parquet"] = [[e, stamps[e.path]] for e in batch]
    return parts


def number_of(name):
    return int(re.fullmatch(r"part-(\d+)-\w+\.parquet", name)[1])


def encode_missing(ray, parts, args, folder, workers):
    """Have every part made that is not stored yet, by `plan`'s workers; -> {name: `about_part`} of all of them."""
    from tqdm import tqdm

    files = storage.list_stamps(args.output_file)
    abouts = storage.about_parts(args.output_file, [name for name in parts if name in files])
    missing = [
        {"name": name, "images": json.dumps(parts[name])} for name in parts if name not in abouts
    ]
    for about in abouts.values():
        tell_skipped(about["bad"])
    if abouts:
        say(f"going on: {len(abouts)} of {len(parts)} parts are stored already")
    if not missing:
        return abouts
    device, cpus, gpus, room = workers
    say(
        f"{len(missing)} parts of {len(parts[missing[0]['name']])} images; room for {room} workers"
        f" of {cpus} processors{' and a GPU' * gpus}"
    )
    pool = ray.data.ActorPoolStrategy(
        min_size=max(1, min(room, len(missing))), max_size=len(missing)
    )
    made = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
        Worker,
        batch_size=1,
        compute=pool,
        num_cpus=cpus,
        num_gpus=gpus,
        fn_constructor_args=(pack(ray, folder, args.ray), args, device, cpus),
    )
    with tqdm(total=sum(map(len, parts.values())), unit="image") as progress:
        progress.update(sum(len(parts[name]) for name in abouts))
        progress.initial = progress.n
        for row in made.iter_rows():
            abouts[row["name"]] = about = json.loads(row["about"])
            if "error" in about:
                raise UsageError(about["error"])
            tell_skipped(about["bad"])
            progress.update(len(parts[row["name"]]))
    return abouts


# ---- the data set ----


def check_output(output):
    """A place that cannot be written, or that holds other things, is told before anything is started. Raises UsageError."""
    if not is_remote(output):
        if Path(output).is_file():
            raise UsageError(
                f"--output_file {output}: is a file; --ray writes a folder of Parquet files, name"
                " another"
            )
        check_folder(output, f"--output_file {output}")
    files = storage.list_stamps(output)
    if files and "_key.json" not in files:
        raise UsageError(
            f"--output_file {output}: is a folder of other things; name one that is not there yet"
        )


def open_output(output, key):
    """{name: `about_part`} of the data set as an earlier run finished it. What cannot be added to is set aside, in an object
    store refused. Raises UsageError."""
    files = storage.list_stamps(output)
    if files and json.loads(storage.read_bytes(output, "_key.json")) != key:
        if is_remote(output):
            raise UsageError(
                f"--output_file {output}: was made with other flags or another encoder; name"
                " another place"
            )
        growing.set_aside(output, "was made with other flags or another encoder")
        files = {}
    storage.write_bytes(output, "_key.json", json.dumps(key).encode())
    return (
        storage.about_parts(output, storage.read_meta(output)["parts"])
        if "_meta.json" in files
        else {}
    )


def changes(abouts, stamps, prune, listing):
    """Of the images of stored parts: (paths whose rows stay, whose file has changed or is to be pruned, whose file is gone).

    Nobody can say that a file in an unreadable folder is gone: its rows stay.
    """
    stored = {path: tuple(stamp) for about in abouts.values() for path, stamp in about["stamps"]}
    unread = tuple(f"{folder}/" if folder else "" for folder, _ in listing.unreadable)
    gone = {path for path in stored if path not in stamps and not path.startswith(unread)}
    changed = {path for path in stored if stamps.get(path) and stamps[path] != stored[path]}
    if stored:
        told = [f"{len(stored) - len(changed) - len(gone)} images are there and stay as they are"]
        told += [f"{len(changed)} have changed"] if changed else []
        told += (
            [
                (
                    f"{len(gone)} are gone and dropped"
                    if prune
                    else f"{len(gone)} are gone; --prune drops their rows"
                )
            ]
            if gone
            else []
        )
        say(f"{', '.join(told)}")
    return (
        set(stored) - changed - gone,
        changed | (gone if prune else set()),
        set() if prune else gone,
    )


def rewrite(args, abouts, drop, gone, new):
    """Stored parts without the rows of `drop`, and without those of `gone` that the parts `new` hold again, under another name.

    -> {name: `about_part`}, in order; parts that lose nothing as they are.
    """
    moved = {
        digest
        for name in new
        if gone
        for digest in storage.read_part(args.output_file, name, ["sha256"])["sha256"]
    }
    gone = gone if moved else set()
    kept = {}
    for name, about in abouts.items():
        paths = {path for path, _ in about["stamps"]}
        if not paths & (drop | gone):
            kept[name] = about
            continue
        columns = storage.read_part(args.output_file, name)
        stay = ~np.isin(columns["paths"], list(paths & drop))
        stay &= ~(
            np.isin(columns["paths"], list(paths & gone)) & np.isin(columns["sha256"], list(moved))
        )
        if stay.all():
            kept[name] = about
        elif stay.any():
            columns = {column: columns[column][stay] for column in COLUMNS}
            about = about | {"bad": []} | describe(columns, about["stamps"])
            name = f"part-{part_name(number_of(name), [name, about['stamps']])}.parquet"
            storage.write_part(args.output_file, name, columns, about)
            kept[name] = about
    return kept


def add_up(abouts):
    """-> (images by split and class, rows) of parts."""
    cells = {}
    for about in abouts.values():
        for cell, n in about["cells"].items():
            cells[cell] = cells.get(cell, 0) + n
    order = sorted(
        cells,
        key=lambda cell: (
            cell.rpartition("/")[0],
            (*CLASSES, "unlabelled").index(cell.rpartition("/")[2]),
        ),
    )
    return {cell: cells[cell] for cell in order}, sum(about["rows"] for about in abouts.values())


def images_of(output, names):
    """All columns but the features, of a data set's parts."""
    wanted = [name for name in COLUMNS if name != "features"]
    return join_columns(
        [
            {**part, "features": np.empty((len(part["paths"]), 0))}
            for part in storage.iterate_parts(output, names, wanted)
        ]
    )


def tell_new(output, before, after):
    """What `growing` says of the images that were added, where there were some before; too many are only counted."""
    if not before:
        return
    if add_up(after)[1] > REPORT_ROWS:
        say(f"more than {REPORT_ROWS} rows: what is new is not compared with what was there")
        return
    digests = growing.digests_of(images_of(output, list(before)))
    for line in growing.words(growing.whats_new(digests, images_of(output, list(after)))):
        say(line)


def finish(args, meta, abouts):
    """_meta.json: from here on these parts are the data set; all others go."""
    storage.write_bytes(
        args.output_file,
        "_meta.json",
        json.dumps({**meta, "parts": list(abouts)}, sort_keys=True).encode(),
    )
    for name in storage.list_stamps(args.output_file):
        if name.endswith(".parquet") and name not in abouts:
            storage.delete_file(args.output_file, name)


def extract(args):
    from detector.encoders.prepare import ensure_encoder

    check_output(args.output_file)
    listing, stamps = storage.list_folder(args.data_dir)
    found = find_images(args, listing)
    entries = [e for e in found.entries if can_be_stored(e.path)]
    folder = ensure_encoder(args.clip_model, args.precision, args.layers)
    encoder = runtime.read_manifest(folder)
    with connected(args.ray) as ray:
        workers = plan(ray.nodes(), args.device, folder)
        args.batch_size = args.batch_size or (256 if workers[0] == "cuda" else 16)
        key = key_of(args, encoder, args.precision)
        before = open_output(args.output_file, key)
        stay, drop, gone = changes(before, stamps, args.prune, listing)
        todo = [e for e in entries if e.path not in stay]
        parts = deal(
            todo,
            stamps,
            PART_BATCHES * args.batch_size,
            max(map(number_of, before), default=-1) + 1,
        )
        made = encode_missing(ray, parts, args, folder, workers)
    skipped = [is_image for about in made.values() for _, _, is_image in about["bad"]]
    check_skipped(skipped, len(entries), args)
    new = {name: made[name] for name in parts if made[name]["rows"]}
    after = rewrite(args, before, drop, gone, list(new)) | new
    cells, rows = add_up(after)
    if not rows:
        raise UsageError("not one image could be read (see the lines above)")
    if seen := sum(n for cell, n in cells.items() if cell.startswith(f"{SEEN}/")):
        say(
            f"{seen} images were used to train this encoder: split '{SEEN}', not for training a"
            " classifier"
        )
    tell_new(args.output_file, before, after)
    counts = {
        "images": sum(cells.values()),
        "bad": len(skipped),
        **{c: sum(n for cell, n in cells.items() if cell.endswith(f"/{c}")) for c in CLASSES},
    }
    finish(args, {**meta_of(key, encoder), "counts": counts}, after)
    print(f"{args.output_file}: {summary(cells, rows, encoder['dim'], len(skipped), found)}")
    return exit_code(args, found)


def can_be_stored(path):
    """Is a file's name text? Parquet holds no other."""
    if re.search("[\ud800-\udfff]", path):
        say(f"skipped {path}: its name is not UTF-8; rename it")
        return False
    return True
