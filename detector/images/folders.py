"""The images in a folder. Labels, splits and sources come from folder names.

entries = list_images("data")             # sorted, each (path, label, split, source)
"""

import errno
import os
import re
from collections import Counter, deque, namedtuple
from difflib import get_close_matches

import numpy as np

from detector.base.console import need_folder, say
from detector.base.constants import CLASSES, SPLITS
from detector.base.errors import UsageError

LABELS = {
    **dict.fromkeys("real 0_real nature natural human photo photos".split(), 0),
    **dict.fromkeys("fake 1_fake ai generated synthetic ai_generated".split(), 1),
}
Entry = namedtuple("Entry", "path label split source group", defaults=[""])
# relative paths; unreadable: (folder, reason)
Listing = namedtuple("Listing", "files hidden thumbnails special unreadable")
Folder = namedtuple("Folder", "entries ignored listing")

SPLIT_ALIASES = {
    **dict.fromkeys(("valid", "validation", "dev"), "val"),
    "training": "train",
    "testing": "test",
}
# Network drives, archives and photo programs keep small copies and deleted files in these folders.
THUMBNAILS = set(
    "@eadir .@__thumb @__thumb _thumbs thumbs .thumbs _thumbnails thumbnails .thumbnails"
    " .picasaoriginals #recycle @recycle $recycle.bin __macosx lost+found #snapshot".split()
)
# A file with one of these extensions counts as an image, even where its content is none.
EXTENSIONS = set(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .gif .bmp .dib .tif .tiff .heic .heif .hif .jxl"
    " .jp2 .j2k .jpx .dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .psd .tga .ppm .pgm .pnm .ico".split()
)
CLOSE = 0.66  # difflib's ratio from which a name counts as a misspelling
SHOWN_IGNORED = 3
# fields of Listing that are left out: (field, name)
LEFT_OUT = (
    ("hidden", "hidden files"),
    ("thumbnails", "thumbnails of other programs"),
    ("special", "pipes, sockets or devices"),
)


def plain(folder):
    """A folder's name in the spelling of LABELS: 'AI-Generated' -> 'ai_generated'."""
    return folder.lower().replace("-", "_").replace(" ", "_")


def split_of(folder, split_names=SPLITS):
    """Folder name -> split ('Testing' -> 'test'), or None."""
    if folder.lower() in split_names:
        return folder.lower()
    name = re.sub("_?(set|data|images|split)$", "", plain(folder))
    name = SPLIT_ALIASES.get(name, name)
    return name if name in split_names else None


def describe(path, split_names=SPLITS, unlabelled=False):
    """Relative path 'test/progan/cat/0_real/1.png' -> Entry(path, 0, 'test', 'progan/cat').

    The label is 0, 1 or -1. The split is the first of `split_names` above the label. All other
    folders are the source. With `unlabelled` no folder is a label.
    Raises UsageError where two folders name different labels.
    """
    folders = path.split("/")[:-1]
    known = {} if unlabelled else LABELS
    named = {i: known[plain(f)] for i, f in enumerate(folders) if plain(f) in known}
    if len(set(named.values())) > 1:
        both = "' and '".join(folders[i] for i in named)
        raise UsageError(f"{path}: the folders '{both}' name both labels; rename one of them")
    above = folders[: min(named, default=len(folders))]
    splits = {i: split for i, f in enumerate(above) if (split := split_of(f, split_names))}
    own = min(splits, default=None)
    source = "/".join(f for i, f in enumerate(folders) if i not in named and i != own)
    return Entry(path, min(named.values(), default=-1), splits.get(own, ""), source)


# ---- listing ----


def list_files(data_dir):
    """All files below a folder of this machine -> Listing, each part sorted. No file is opened.

    Links to folders are followed once. Raises UsageError where `data_dir` is no folder.
    """
    need_folder(data_dir)
    files, special, unreadable, walked, waiting = [], [], [], set(), deque([""])
    while waiting:
        folder = waiting.popleft()
        place = os.path.join(data_dir, folder)
        if (real := os.path.realpath(place)) in walked:  # a link leads back
            continue
        walked.add(real)
        try:
            with os.scandir(place) as scan:
                entries = sorted(scan, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            unreadable.append((folder, error.strerror))
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if (kind := kind_of(entry)) == "folder" and not entry.is_symlink():
                waiting.appendleft(path)  # before links, so that its own path gives the label
            else:
                {"folder": waiting, "file": files, "special": special}[kind].append(path)
    return arrange(files, special, unreadable)


def kind_of(entry):
    """os.DirEntry -> 'folder', 'file' or 'special' (a pipe, a socket, a device).

    A broken link is a file, so it is reported with the unreadable files.
    """
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or not os.path.exists(entry.path) else "special"
    except OSError:
        return "file"


def arrange(files, special=(), unreadable=()):
    """Relative paths -> Listing, each part sorted."""
    groups = {"files": [], "hidden": [], "thumbnails": [], "special": []}
    pipes = set(special)
    for path in sorted([*files, *special]):
        group = group_of(path)
        groups["special" if group == "files" and path in pipes else group].append(path)
    seen = [(folder, reason) for folder, reason in unreadable if group_of(folder) == "files"]
    return Listing(**groups, unreadable=seen)


def group_of(path):
    """Relative path -> 'thumbnails', 'hidden' or 'files'."""
    parts = path.lower().split("/")
    if parts[-1].endswith(".thm") or any(part in THUMBNAILS for part in parts):  # .thm: of a film
        return "thumbnails"
    return "hidden" if any(part.startswith(".") for part in parts) else "files"


def say_left_out(data_dir, listing):
    """One line on stderr for each kind of file that is left out, and each unreadable folder."""
    for field, name in LEFT_OUT:
        if paths := getattr(listing, field):
            say(f"left out: {len(paths)} {name}, such as {paths[0]}")
    for folder, reason in listing.unreadable:
        closed = reason == os.strerror(errno.EACCES)
        remedy = "change its permissions" if closed else "check that its disk is mounted"
        say(f"cannot be read: the folder {os.path.join(data_dir, folder)} ({reason}); {remedy}")


def list_images(data_dir, split_names=SPLITS, unlabelled=False, listing=None):
    """`read_folder`'s entries, then an entry for each unreadable folder, as if it were a file."""
    folder = read_folder(data_dir, split_names, unlabelled, listing)
    paths = [f"{closed}/" for closed, _ in folder.listing.unreadable]
    closed = [describe(path, split_names, unlabelled) for path in paths]
    return folder.entries + [entry for entry in closed if unlabelled or entry.label >= 0]


def read_folder(data_dir, split_names=SPLITS, unlabelled=False, listing=None):
    """Folder -> Folder: sorted entries of the images, and the files that no folder labels.

    `listing`: of `list_files`, where it is known. stderr names all files that are left out.
    Raises UsageError without files, without a label, and with only one class.
    """
    listing = list_files(data_dir) if listing is None else listing
    say_left_out(data_dir, listing)
    need_files(data_dir, listing)
    entries = [describe(path, split_names, unlabelled) for path in listing.files]
    if unlabelled:
        return Folder(entries, {}, listing)
    labelled = [entry for entry in entries if entry.label >= 0]
    ignored = ignored_folders(entries, split_names)
    notes = [ignored_note(folder, number) for folder, number in ignored.items()]
    need_classes(data_dir, {entry.label for entry in labelled}, notes)
    for note in [*notes, *doubtful_splits(labelled, split_names)]:
        say(note)
    return Folder(labelled, ignored, listing)


def need_files(data_dir, listing):
    """Raises UsageError without files."""
    if listing.files:
        return
    problem = "the folder has no usable file" if any(listing) else "the folder is empty"
    if listing.unreadable:
        problem = "the folder cannot be read"
    raise UsageError(f"--data_dir {data_dir}: {problem}")


def need_classes(data_dir, labels, notes):
    """Raises UsageError unless both labels occur. `notes`: lines on ignored folders."""
    if len(labels) == 2:
        return
    problem = (
        f"only one class has images ('{CLASSES[min(labels)]}'); a detector needs both"
        if labels
        else "no folder below it names a label; expected real/ and fake/ (accepted:"
        f" {', '.join(LABELS)})"
    )
    problem += " (extract_features.py takes any folder with --unlabelled)"
    raise UsageError("; ".join([f"--data_dir {data_dir}: {problem}", *notes[:SHOWN_IGNORED]]))


def ignored_folders(entries, split_names):
    """Entries -> {folder: files without a label below it}: the highest folder that is no split.

    Files beside such folders, such as a README, count as 'train/*' or '*'.
    """
    numbers = Counter()
    for entry in entries:
        if entry.label < 0:
            folders = entry.path.split("/")[:-1]
            outside = (i for i, f in enumerate(folders, 1) if not split_of(f, split_names))
            depth = next(outside, None)
            numbers["/".join(folders[:depth] if depth else [*folders, "*"])] += 1
    return numbers


def ignored_note(folder, number):
    """'ignored: train/screens (32 files): not a label; ...'"""
    name = plain(folder.rpartition("/")[2])
    close = get_close_matches(name, LABELS, 1, CLOSE)
    close += [part for part in name.split("_") if part in LABELS]
    guess = f"; did you mean '{close[0]}'?" if close else ""
    return f"ignored: {folder} ({number} files): not a label; accepted: {', '.join(LABELS)}{guess}"


def doubtful_splits(entries, split_names):
    """Lines on folders that count as a source, though their name is close to a split's."""
    notes, known = [], [*split_names, *SPLIT_ALIASES]
    for name in sorted({e.source.split("/")[0] for e in entries if not e.split and e.source}):
        if close := get_close_matches(plain(name), known, 1, CLOSE):
            notes.append(
                f"note: the folder '{name}' counts as a source, not as a split;"
                f" did you mean '{close[0]}'? --split_names {name},... makes it a split"
            )
    return notes


def has_extension(path):
    """Does the name of a file say that it is an image?"""
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def summary_of(folder):
    """Folder -> end of a line on files not taken, such as '; left out 3 hidden files', or ''."""
    ignored, unreadable = sum(folder.ignored.values()), len(folder.listing.unreadable)
    counts = [
        (ignored, f"ignored {ignored} files in {len(folder.ignored)} folders without a label")
    ]
    for field, name in LEFT_OUT:
        number = len(getattr(folder.listing, field))
        counts.append((number, f"left out {number} {name}"))
    counts.append((unreadable, f"{unreadable} folders could not be read"))
    return "".join(f"; {text}" for number, text in counts if number)


def draw_evenly(cells, most, seed=0):
    """Cell names [n] -> at most `most` row numbers, sorted: one of each cell, then a second."""
    order = np.random.default_rng(seed).permutation(len(cells))
    turn, rank = {}, np.empty(len(cells), int)
    for i in order:
        rank[i] = turn[cells[i]] = turn.get(cells[i], -1) + 1
    return np.sort(order[np.argsort(rank[order], kind="stable")][:most])
