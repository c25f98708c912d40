"""What a data set's files betray before any detector sees a pixel."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from detector.base.console import printable
from detector.base.constants import CLASSES
from detector.base.errors import ImageError, UsageError
from detector.evaluation.metrics import auc, words
from detector.evaluation.probes import (
    MIN_IMAGES,
    doubtful_sources,
    label_errors,
    linear_scores,
    probe_all,
    telling_values,
)
from detector.evaluation.rules import LEAK_AUC, MAX_REPEATED, TELLING_AUC
from detector.features.columns import SEEN
from detector.images.facts import describe_image, make_groups, twin_clusters
from detector.images.folders import has_extension, list_images

HUGE = 50_000_000  # pixels: the service refuses larger ones
SHOWN = 5  # of each kind


# ---- findings ----


def audit(columns, cluster=None, unreadable=()):
    """Columns of a features file -> findings, a dict of plain numbers and strings.

    `cluster`: their twins where those are known; `unreadable`: (path, label) of files that could not be read.
    """
    if not (columns["labels"] >= 0).any():
        raise UsageError("no image has a label: an audit asks what gives labels away")
    known = np.flatnonzero(
        (columns["labels"] >= 0) & (columns.get("view", np.zeros(len(columns["labels"]))) == 0)
    )
    cluster = (
        twin_clusters(columns["thumb"][known], columns["sha256"][known])
        if cluster is None
        else cluster[known]
    )
    columns = {
        name: columns[name][known]
        for name in ("labels", "splits", "sources", "paths", "facts", "thumb", "sha256")
    }
    labels, facts, splits = columns["labels"].astype(int), columns["facts"], columns["splits"]
    groups, kind = make_groups(columns, cluster)
    both = np.intersect1d(cluster[labels == 0], cluster[labels == 1])
    trained = np.isin(cluster, cluster[splits == "train"])
    return {
        "images": len(known),
        "groups": kind,
        "formats": {
            name: {
                str(f): int(n)
                for f, n in zip(*np.unique(facts["format"][labels == i], return_counts=True))
            }
            for i, name in enumerate(CLASSES)
        },
        "twins": {
            "test": int((splits == "test").sum()),
            "test_with_twin_in_train": int(trained[splits == "test"].sum()),
            "clusters_with_both_labels": len(both),
            "largest_cluster": int(np.bincount(cluster).max(initial=0)),
        },
        "examples": [
            examples(columns["paths"], cluster, cluster[mask])
            for mask in (trained & (splits == "test"), np.isin(cluster, both))
        ],
        "probes": probe_all(facts, columns["thumb"], labels, groups, splits),
        "telling": telling_values(facts, labels, groups),
        "huge": int((facts["width"].astype(np.int64) * facts["height"] > HUGE).sum()),
        "unreadable": {
            "n": len(unreadable),
            "first": [path for path, _ in unreadable[:SHOWN]],
            **{name: sum(label == i for _, label in unreadable) for i, name in enumerate(CLASSES)},
        },
    }


def audit_labels(labels, p_fake, sources, paths, by_source):
    """Out-of-fold probabilities -> what they say of the labels: probable errors, clearest first, and doubtful sources.

    `by_source`: no fold's classifier has seen a source that it scores; without that a source cannot be doubted as a whole.
    """
    rows = label_errors(labels, p_fake)
    return {
        "images": len(labels),
        "probable_errors": len(rows),
        "first": [
            {
                "path": str(paths[i]),
                "label": CLASSES[labels[i]],
                "p_fake": round(float(p_fake[i]), 3),
            }
            for i in rows[:50]
        ],
        "doubtful_sources": doubtful_sources(labels, p_fake, sources) if by_source else [],
    }


def labels_of(columns):
    """-> (`audit_labels` on the features of a file, by a logistic regression; the AUC of that), None where there are too few images."""
    rows = np.flatnonzero(
        (columns["labels"] >= 0) & (columns["view"] == 0) & (columns["splits"] != SEEN)
    )
    labels = columns["labels"][rows].astype(int)
    if min(np.bincount(labels, minlength=2)) < MIN_IMAGES:
        return None, None
    groups, kind = make_groups(
        {name: columns[name][rows] for name in ("labels", "sources", "thumb", "sha256")}
    )
    p_fake = linear_scores(columns["features"][rows], labels, groups)
    if p_fake is None:
        return None, None
    return audit_labels(
        labels, p_fake, columns["sources"][rows], columns["paths"][rows], kind == "sources"
    ), auc(labels, p_fake, groups)


def examples(paths, cluster, chosen):
    """Of the three largest of the chosen clusters, the paths of four images each."""
    numbers, sizes = np.unique(chosen, return_counts=True)
    return [
        [str(path) for path in paths[cluster == c][:4]]
        for c in numbers[np.argsort(-sizes, kind="stable")][:3]
    ]


# ---- in words ----

SHAPE = "Crop both classes to one shape and size"
SAVE = "Save both classes alike, in one format and quality"
SUBJECTS = "Take both classes from sources that show the same subjects"


def remedy(what):
    """What to do about a probe or a telling value."""
    if what == "8x8 thumbnail":
        return SUBJECTS
    if what == "all file facts":
        return f"{SHAPE}, and save them alike"
    return (
        SHAPE
        if any(word in what for word in ("pixels", "aspect ratio", "multiples of 64"))
        else SAVE
    )


def is_leak(probe, detector):
    """Does one interval of a probe start at TELLING_AUC or above, and reach LEAK_AUC or the detector's interval?

    `detector`: {'auc', 'on_test'}, measured in the same two ways as the probe; either may be missing.
    """
    for way in ("auc", "on_test"):
        ends = (probe[way] or {}).get("interval")
        own = ((detector or {}).get(way) or {}).get("interval") or [1.0]
        if ends and ends[0] >= TELLING_AUC and ends[1] >= min(LEAK_AUC, own[0]):
            return True
    return False


def sentences(found):
    """Findings -> (lines that are fatal for a test figure, lines to know)."""
    twins, fatal, note = found["twins"], [], []
    if repeated := twins["test_with_twin_in_train"]:
        line = (
            f"{repeated} of {twins['test']} test images have a twin in train "
            f"(such as {', '.join(found['examples'][0][0])})"
        )
        if repeated > MAX_REPEATED * twins["test"]:
            fatal.append(
                f"{line}: a test accuracy on this split says how well pictures are remembered."
                " Train with --resplit."
            )
        else:
            note.append(f"{line}. Remove the copies, or train with --resplit.")
    if both := twins["clusters_with_both_labels"]:
        (fatal if both > MAX_REPEATED * found["images"] else note).append(
            f"{both} pictures stand under both labels, as copies of each other, such as"
            f" {', '.join(found['examples'][1][0])}. Keep each under its right label alone."
        )
    for probe in sorted(found["probes"], key=lowest_end, reverse=True):
        if lowest_end(probe) >= TELLING_AUC:
            where = (
                (probe["auc"], f"cross-validated over {found['groups']}"),
                (probe["on_test"], "learnt on train, tried on test"),
            )
            leaks = is_leak(probe, found.get("detector"))
            (fatal if leaks else note).append(
                f"{probe['what']} alone tells the labels apart: AUC "
                + "; ".join(f"{words(metric)} {how}" for metric, how in where if metric)
                + (". A test figure on these images proves little" if leaks else "")
                + f". {remedy(probe['what'])}, or judge by images of other sources."
            )
    for row in found["telling"][:SHOWN]:
        note.append(
            f"{row['what']}: {row['real']:.0%} of the reals, {row['fake']:.0%} of the fakes."
            f" {remedy(row['what'])}."
        )
    if bad := found["unreadable"]["n"]:
        note.append(
            f"{bad} files cannot be read ({found['unreadable']['real']} real,"
            f" {found['unreadable']['fake']} fake), such as"
            f" {', '.join(found['unreadable']['first'][:2])}. Mend or remove them."
        )
    if found["huge"]:
        note.append(
            f"{found['huge']} images have more than {HUGE:,} pixels; the service refuses those."
            " Shrink both classes alike."
        )
    for row in (found.get("labels") or {}).get("doubtful_sources", []):
        note.append(
            f"source '{row['source']}' ({' and '.join(row['labels'])}, {row['n']} images): a"
            f" classifier trained on the others contradicts its labels ({row['what']}"
            f" {words(row)}): swapped, or unlike everything else. Look at its images first."
        )
    return fatal, note


def lowest_end(probe):
    """The higher of the lower ends of a probe's intervals; 0 where there are none."""
    return max(
        (m["interval"][0] for m in (probe["auc"], probe["on_test"]) if m and m["interval"]),
        default=0,
    )


def leak_sentence(leak):
    """`detector_minus_leak` in one plain sentence; a warning where the detector is not clearly above the best probe."""
    difference = leak["difference"]
    line = (
        f"detector minus best leak: AUC {leak['detector']:z.2f} - {leak['leak']:z.2f}"
        f" ({leak['what']} alone, {leak['how']}) = {words(difference)}"
    )
    if not difference["interval"] or difference["interval"][0] <= 0:
        better = (
            "tell more than the detector"
            if difference["interval"] and difference["interval"][1] < 0
            else "may tell as much as the detector"
        )
        return f"{line}: on these images the files alone {better}; its figure proves little."
    return line + "."


# ---- the command ----


def describe_folder(data_dir):
    """Folder -> (the columns that `audit` needs, (path, label) of files that cannot be read); each of those is told."""
    from tqdm import tqdm

    def read(entry):
        try:
            return describe_image(Path(data_dir, entry.path).read_bytes())[1]
        except (OSError, ImageError) as error:
            return error

    entries, rows, unreadable = [], [], []
    listed = list_images(data_dir)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for entry, row in tqdm(
            zip(listed, pool.map(read, listed)), total=len(listed), desc="reading", unit="image"
        ):
            if isinstance(row, Exception):
                tqdm.write(f"left out {printable(entry.path)}: {row}", file=sys.stderr)
                if getattr(row, "is_image", True) or has_extension(
                    entry.path
                ):  # a caption is no broken image
                    unreadable.append((entry.path, entry.label))
            else:
                entries.append(entry)
                rows.append(row)
    if not rows:
        raise UsageError(f"--data_dir {data_dir}: no readable image")
    return {
        **{
            f"{name}s": np.array([getattr(e, name) for e in entries])
            for name in ("label", "split", "path", "source")
        },
        **{name: np.array([row[name] for row in rows]) for name in rows[0]},
        "view": np.zeros(len(rows), np.int8),
    }, unreadable


def report(found):
    """What the command prints."""
    fatal, note = sentences(found)
    nothing = (
        f"no format, size or other fact that tells the labels apart (AUC {TELLING_AUC} or more)"
        if found["probes"]
        else f"too few images for more: a probe takes {MIN_IMAGES} of each class"
    )
    lines = [
        f"{found['images']} images; formats of reals {found['formats']['real']}, of fakes"
        f" {found['formats']['fake']}"
    ]
    lines += [*(f"LEAK  {line}" for line in fatal), *(f"note  {line}" for line in note)] or [
        f"no twins across splits or labels; {nothing}"
    ]
    if found["probes"]:
        lines.append("what a cheap classifier reaches without a detector (AUC, 95% interval):")
        lines.append(
            f"  {'':44} {'cross-validated':18} "
            f" {'learnt on train, tried on test' if found['probes'][0]['on_test'] else ''}".rstrip()
        )
        lines += [
            f"  {p['what']:44} {words(p['auc']):18}  {words(p['on_test']) if p['on_test'] else ''}".rstrip()
            for p in found["probes"]
        ]
    elif fatal or note:
        lines.append(nothing)
    if found.get("labels"):
        lines.append(
            f"labels to look at first ({found['labels']['probable_errors']} of"
            f" {found['labels']['images']} are unlike their class):"
        )
        lines += [
            f"  {row['path']} is called {row['label']}" for row in found["labels"]["first"][:SHOWN]
        ]
    return "\n".join(lines), 1 if fatal else 0
