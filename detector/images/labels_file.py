"""Labels, splits, sources and groups from a table, for images that are not sorted into folders.

folder = read_labels("labels.csv", "pictures")     # as read_folder("pictures") of folders.py
"""

import csv
import io
import os
import posixpath
from collections import Counter
from difflib import get_close_matches

from detector.base.console import say
from detector.base.constants import CLASSES, SPLITS
from detector.base.errors import UsageError
from detector.base.files import read_bytes, sha256
from detector.images import folders

NEEDED, OPTIONAL = ("path", "label"), ("split", "source", "group")
DRAWN = ("seconds", "who", "probability", "images")  # columns of the page of draw_sample.py
CANNOT_TELL = "cannot tell"  # its third label
WORDS = {"0": 0, "1": 1, **folders.LABELS}
SHOWN = 100  # characters of a field in a message


def read_labels(labels_file, data_dir, split_names=SPLITS, listing=None):
    """CSV and folder -> folders.Folder: sorted entries of the listed images, and the other files.

    Folder names count for nothing. `listing`: of `list_files`, where it is known. The listing of
    the result holds the listed files alone. Raises UsageError, with the number of the wrong line.
    """
    listing = folders.list_files(data_dir) if listing is None else listing
    folders.say_left_out(data_dir, listing)
    folders.need_files(data_dir, listing)
    paths, seen, problems = Paths(data_dir, listing), {}, []
    untold = 0
    for line, row in read_rows(labels_file):
        if row.get("label", "").strip().lower() == CANNOT_TELL:
            untold += 1
            continue
        try:
            check_repeats(entry_of(row, paths, split_names), line, seen)
        except UsageError as error:
            problems.append(f"line {line}: {error}")
    if untold:
        say(f"left out: {untold} images of {labels_file} that its author cannot tell")
    if problems:
        raise UsageError(
            f"--labels_file {labels_file}: {problems[0]} (wrong lines: {len(problems)})"
        )
    entries = sorted(entry for (kind, _), (_, entry) in seen.items() if kind == "path")
    classes = [name for i, name in enumerate(CLASSES) if i in {entry.label for entry in entries}]
    if len(classes) < 2:
        raise UsageError(
            f"--labels_file {labels_file}: lists images of {' '.join(classes) or 'no class'}; a"
            " detector needs both classes"
        )
    listing = listing._replace(files=[entry.path for entry in entries])
    return folders.Folder(entries, unlisted(labels_file, data_dir, paths.files, listing), listing)


def keep_for_test(folder, share):
    """Folder of a table -> the same with `share` of its images in the split test, others in train.

    The hash of its path decides about an image, so that it stays where it is. A split that the
    table names stays, too.
    """

    def split(entry):
        kept = int(sha256(entry.path.encode())[:8], 16) < share * 2**32
        return entry._replace(split=entry.split or ("test" if kept else "train"))

    entries = [split(entry) for entry in folder.entries]
    kept = sum(entry.split == "test" for entry in entries)
    say(f"kept for test: {kept} of {len(entries)} labelled images; the others train")
    return folder._replace(entries=entries)


def unlisted(labels_file, data_dir, files, listing):
    """Names the files that the table does not list -> {folder: number of its image files}.

    Other files count as '*', as beside the label folders. The table itself is not among them.
    """
    own = os.path.relpath(os.path.realpath(labels_file), os.path.realpath(data_dir))
    rest = sorted(files - {own, *listing.files})
    if rest:
        say(f"ignored: {len(rest)} files that {labels_file} does not list, such as {rest[0]}")
    return Counter(
        os.path.dirname(path) or "." if folders.has_extension(path) else "*" for path in rest
    )


# ---- rows ----


def read_rows(labels_file):
    """Yield (line number, {column: text, None: further fields}) of each row that is not blank.

    The header decides between comma, semicolon and tab. Raises UsageError.
    """
    try:
        text = read_bytes(labels_file).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(
            f"--labels_file {labels_file}: is not UTF-8 text; save the table as CSV in UTF-8"
        ) from None
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=max(",;\t", key=text.lstrip().partition("\n")[0].count),
        skipinitialspace=True,
        strict=True,  # or an open quote would swallow the rows below it
    )
    try:
        rows = ((reader.line_num, row) for row in reader if any(map(str.strip, row)))
        names = [name.strip().lower() for name in next(rows, (1, []))[1]]
        check_header(labels_file, names)
        for line, row in rows:
            yield line, {None: row[len(names) :], **dict(zip(names, row, strict=False))}
    except csv.Error as error:
        raise UsageError(f"--labels_file {labels_file}: line {reader.line_num}: {error}") from None


def check_header(labels_file, names):
    """Names the columns that are not used. Raises UsageError unless the others stand there once."""
    for name in (*NEEDED, *OPTIONAL):
        if names.count(name) > 1 or name in NEEDED and name not in names:
            raise UsageError(
                f"--labels_file {labels_file}: the header needs one column '{name}'; there:"
                f" {', '.join(names)[:SHOWN] or 'nothing'}"
            )
    if others := ", ".join(name for name in names if name not in (*NEEDED, *OPTIONAL, *DRAWN)):
        say(f"ignored: columns of {labels_file}: {others[:SHOWN]}")


def entry_of(row, paths, split_names):
    """Row of the table -> Entry. Raises UsageError, without the line."""
    if row[None]:
        raise UsageError("it has more fields than the header; quote a field with the delimiter")
    label, split, *rest = (row.get(name, "").strip() for name in ("label", *OPTIONAL))
    number = known("label", label, WORDS.get(folders.plain(label)), WORDS)
    part = known("split", split, folders.split_of(split, split_names), split_names) if split else ""
    return folders.Entry(paths.resolve(row["path"]), number, part, *rest)


def known(column, word, value, accepted):
    """The value of a word. Raises UsageError where it has none."""
    if value is None:
        guess = "".join(
            f"; did you mean '{name}'?"
            for name in get_close_matches(folders.plain(word), accepted, 1, folders.CLOSE)
        )
        raise UsageError(f"'{word[:SHOWN]}' is no {column}; accepted: {', '.join(accepted)}{guess}")
    return value


def check_repeats(entry, line, seen):
    """Adds the entry to `seen`, {('path' or 'group', name): (line, its first entry)}.

    Raises UsageError for a path in two lines, and for a group in two splits.
    """
    before, first = seen.setdefault(("path", entry.path), (line, entry))
    if before != line:
        raise UsageError(
            f"'{entry.path}' is {CLASSES[entry.label]} here and {CLASSES[first.label]} in line"
            f" {before}; remove one of the lines"
        )
    before, first = seen.setdefault(("group", entry.group), (line, entry))
    if entry.group and first.split != entry.split:
        raise UsageError(
            f"the group '{entry.group[:SHOWN]}' is in the split '{entry.split}' here and in"
            f" '{first.split}' in line {before}; give its images one split"
        )


class Paths:
    """The paths that a table may name: the files of a folder, and any below unreadable folders.

    The reader of the images reports files that cannot be read.
    """

    def __init__(self, data_dir, listing):
        self.data_dir, self.files = data_dir, set(listing.files)
        self.closed = tuple(f"{folder}/" for folder, _ in listing.unreadable)
        self.guesses = {
            path.rpartition("/")[2]: f"; did you mean '{path}'?" for path in listing.files
        }

    def resolve(self, path):
        """Path of a table, such as '.\\a\\1.jpg' -> 'a/1.jpg'. Raises UsageError."""
        name = path if path in self.files else posixpath.normpath(path.replace("\\", "/"))
        if name in self.files or name.startswith(self.closed):
            return name
        guess = self.guesses.get(name.rpartition("/")[2], "")
        raise UsageError(
            f"'{path[:SHOWN]}' is not among the images of {self.data_dir}; give a path below that"
            f" folder, and of no hidden file{guess}"
        )
