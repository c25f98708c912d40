"""A folder of images: what is in it. Labels, splits and sources come from folder names.

entries = list_images("data")             # sorted, each (path, label, split, source)
"""

import errno
import os
import re
from collections import deque, namedtuple
from difflib import get_close_matches

import numpy as np

from detector.base.console import need_folder, say
from detector.base.constants import CLASSES, SPLITS
from detector.base.errors import UsageError

LABELS = {
    **dict.fromkeys("real 0_real nature natural human photo photos".split(), 0),
    **dict.fromkeys("fake 1_fake ai generated synthetic ai_generated".split(), 1),
}
Entry = namedtuple("Entry", "path label split source")
Listing = namedtuple(
    "Listing", "files hidden thumbnails special unreadable"
)  # relative paths; unreadable: (folder, why)
Folder = namedtuple("Folder", "entries ignored listing")

SPLIT_ALIASES = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}
# Folders in which network drives, archives and photo programs keep small copies, or what was thrown away.
THUMBNAILS = {
    "@eadir",
    ".@__thumb",
    "@__thumb",
    "_thumbs",
    "thumbs",
    ".thumbs",
    "_thumbnails",
    "thumbnails",
    ".thumbnails",
    ".picasaoriginals",
    "#recycle",
    "@recycle",
    "$recycle.bin",
    "__macosx",
    "lost+found",
    "#snapshot",
}
# A file with one of these extensions is meant to be an image, whatever is in it.
EXTENSIONS = set(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .gif .bmp .dib .tif .tiff .heic .heif .hif .jxl"
    " .jp2 .j2k .jpx .dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .psd .tga .ppm .pgm .pnm .ico".split()
)
CLOSE = 0.66  # of difflib's ratio, from which on a name is taken for a misspelt one
SHOWN_IGNORED = 3


def plain(folder):
    """A folder's name as labels and splits are written: 'AI-Generated' -> 'ai_generated'."""
    return folder.lower().replace("-", "_").replace(" ", "_")


def split_of(folder, split_names=SPLITS):
    """The split that a folder's name means ('Testing' -> 'test'), or None."""
    if folder.lower() in split_names:
        return folder.lower()
    name = re.sub("_?(set|data|images|split)$", "", plain(folder))
    name = SPLIT_ALIASES.get(name, name)
    return name if name in split_names else None


def describe(path, split_names=SPLITS, unlabelled=False):
    """Relative path 'test/progan/cat/0_real/1.png' -> Entry(path, label 0 | 1 | -1, split 'test', source 'progan/cat').

    The split is the first of `split_names` above the label; all other folders are the source; `unlabelled` takes no
    folder for a label. Raises UsageError where two folders name different labels.
    """
    folders = path.split("/")[:-1]
    named = {
        i: LABELS[plain(f)] for i, f in enumerate(folders) if plain(f) in LABELS and not unlabelled
    }
    if len(set(named.values())) > 1:
        both = "' and '".join(folders[i] for i in named)
        raise UsageError(f"{path}: the folders '{both}' name both labels; rename one of them")
    above = folders[: min(named, default=len(folders))]
    splits = {i: split for i, f in enumerate(above) if (split := split_of(f, split_names))}
    own = min(splits, default=None)
    source = "/".join(f for i, f in enumerate(folders) if i not in named and i != own)
    return Entry(path, min(named.values(), default=-1), splits.get(own, ""), source)


# ---- the walk of a folder ----


def list_files(data_dir):
    """All that lies below a folder of this machine -> Listing, each part sorted. Nothing is opened.

    Links to folders are followed, once. Raises UsageError where `data_dir` is no folder.
    """
    need_folder(data_dir)
    files, special, unreadable, walked, waiting = [], [], [], set(), deque([""])
    while waiting:
        folder = waiting.popleft()
        place = os.path.join(data_dir, folder)
        if (real := os.path.realpath(place)) in walked:  # a link that leads back
            continue
        walked.add(real)
        try:
            with os.scandir(place) as found:
                found = sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            unreadable.append((folder, error.strerror))
            continue
        for entry in found:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if (kind := kind_of(entry)) == "folder" and not entry.is_symlink():
                waiting.appendleft(path)  # before all links: its own place says what its label is
            else:
                {"folder": waiting, "file": files, "special": special}[kind].append(path)
    return arrange(files, special, unreadable)


def kind_of(entry):
    """'folder', 'file' or 'special' (a pipe, a socket, a device) of an os.DirEntry. A link that leads
    nowhere, or cannot be followed, is a file: why it cannot be read is told with the others."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or not os.path.exists(entry.path) else "special"
    except OSError:
        return "file"


def arrange(files, special=(), unreadable=()):
    """Relative paths -> Listing: what is hidden, and the thumbnails of others, apart from the files."""

    def apart(path):
        parts = path.split("/")
        film = parts[-1].lower().endswith(".thm")  # a camera's thumbnail of it
        if film or any(part.lower() in THUMBNAILS for part in parts):
            return "thumbnails"
        return "hidden" if any(part.startswith(".") for part in parts) else "files"

    found = {"files": [], "hidden": [], "thumbnails": []}
    for path in sorted([*files, *special]):
        found[apart(path)].append(path)
    special = set(special)
    return Listing(
        [path for path in found["files"] if path not in special],
        found["hidden"],
        found["thumbnails"],
        [path for path in found["files"] if path in special],
        [(folder, why) for folder, why in unreadable if apart(folder) == "files"],
    )


def say_left_out(data_dir, listing):
    """One line for each kind of files that are not looked at, with the first of each. Nothing is left out unsaid."""
    for paths, what in (
        (listing.hidden, "hidden files"),
        (listing.thumbnails, "thumbnails of other programs"),
        (listing.special, "pipes, sockets or devices"),
    ):
        if paths:
            say(f"left out: {len(paths)} {what}, such as {paths[0]}")
    for folder, why in listing.unreadable:
        closed = why == os.strerror(errno.EACCES)
        remedy = "change its permissions" if closed else "look whether its disk is there"
        say(f"cannot be read: the folder {os.path.join(data_dir, folder)} ({why}); {remedy}")


def list_images(data_dir, split_names=SPLITS, unlabelled=False, listing=None):
    """`read_folder`'s entries; behind them, as files that cannot be read, folders that cannot."""
    found = read_folder(data_dir, split_names, unlabelled, listing)
    closed = [
        describe(f"{folder}/", split_names, unlabelled) for folder, _ in found.listing.unreadable
    ]
    return found.entries + [entry for entry in closed if unlabelled or entry.label >= 0]


def read_folder(data_dir, split_names=SPLITS, unlabelled=False, listing=None):
    """Folder -> Folder: entries of the images, sorted, and what is ignored since no folder above it names a label.

    `listing`: where that is known. What is left out is said on stderr. Raises UsageError where there is nothing to
    take, where no folder names a label, and where only one class is there.
    """
    listing = list_files(data_dir) if listing is None else listing
    say_left_out(data_dir, listing)
    if not listing.files:
        raise UsageError(
            f"--data_dir {data_dir}: "
            + (
                "the folder cannot be read"
                if listing.unreadable
                else (
                    "the folder is empty" if not any(listing) else "holds no file that can be taken"
                )
            )
        )
    entries = [describe(path, split_names, unlabelled) for path in listing.files]
    if unlabelled:
        return Folder(entries, {}, listing)
    labelled, ignored = [e for e in entries if e.label >= 0], ignored_folders(entries, split_names)
    told = [in_words(folder, number) for folder, number in ignored.items()]
    classes = {e.label for e in labelled}
    if not classes:
        problem = (
            "no folder below it names a label; expected real/ and fake/ (accepted:"
            f" {', '.join(LABELS)})"
        )
    elif len(classes) == 1:
        problem = f"only one class is there ('{CLASSES[classes.pop()]}'); a detector needs both"
    else:
        for line in [*told, *doubtful_splits(labelled, split_names)]:
            say(line)
        return Folder(labelled, ignored, listing)
    raise UsageError(
        "; ".join(
            [
                (
                    f"--data_dir {data_dir}: {problem} (extract_features.py takes any folder with"
                    " --unlabelled)"
                ),
                *told[:SHOWN_IGNORED],
            ]
        )
    )


def ignored_folders(entries, split_names):
    """Entries without a label -> {folder: number of files below it}: the highest folder that is no split.

    Files that lie beside such folders, a README say, are counted as 'train/*' or '*'.
    """
    found = {}
    for entry in entries:
        if entry.label < 0:
            folders = entry.path.split("/")[:-1]
            depth = next(
                (i for i, f in enumerate(folders, 1) if not split_of(f, split_names)), None
            )
            folder = "/".join(folders[:depth] if depth else [*folders, "*"])
            found[folder] = found.get(folder, 0) + 1
    return found


def in_words(folder, number):
    """'ignored: train/screens (32 files): not a label; ...'"""
    name = folder.rpartition("/")[2]
    close = get_close_matches(plain(name), LABELS, 1, CLOSE) or [
        part for part in plain(name).split("_") if part in LABELS
    ]
    return f"ignored: {folder} ({number} files): not a label; accepted: {', '.join(LABELS)}" + (
        f"; did you mean '{close[0]}'?" if close else ""
    )


def doubtful_splits(entries, split_names):
    """Lines on folders that were taken for a source, though their name is close to a split's."""
    names = {e.source.split("/")[0] for e in entries if not e.split and e.source}
    close = {
        name: get_close_matches(plain(name), [*split_names, *SPLIT_ALIASES], 1, CLOSE)
        for name in sorted(names)
    }
    return [
        f"note: the folder '{name}' is taken for a source, not for a split; did you mean"
        f" '{found[0]}'? --split_names {name},... makes it a split"
        for name, found in close.items()
        if found
    ]


def has_extension(path):
    """Is a file meant to be an image, by its name?"""
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def summary_of(folder):
    """Folder -> what of it was not taken, for the end of a line: '; ignored 32 files in 1 folder', or ''."""
    listing, ignored = folder.listing, sum(folder.ignored.values())
    counts = [
        (ignored, f"ignored {ignored} files in {len(folder.ignored)} folders without a label"),
        *(
            (len(paths), f"left out {len(paths)} {what}")
            for paths, what in (
                (listing.hidden, "hidden files"),
                (listing.thumbnails, "thumbnails"),
                (listing.special, "pipes or devices"),
            )
        ),
        (len(listing.unreadable), f"{len(listing.unreadable)} folders could not be read"),
    ]
    return "".join(f"; {words}" for number, words in counts if number)


def draw_evenly(cells, most, seed=0):
    """At most `most` row numbers, sorted, of cell names [n]: one of every cell, then a second of every cell, and so on."""
    order = np.random.default_rng(seed).permutation(len(cells))
    turn, rank = {}, np.empty(len(cells), int)
    for i in order:
        rank[i] = turn[cells[i]] = turn.get(cells[i], -1) + 1
    return np.sort(order[np.argsort(rank[order], kind="stable")][:most])
