"""Find what gives labels away without a detector: duplicates, file facts, wrong labels."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from detector.base.console import printable
from detector.base.constants import CLASSES
from detector.base.errors import ImageError, UsageError
from detector.evaluation.intervals import words
from detector.evaluation.metrics import auc
from detector.evaluation.probes import (
    doubtful_sources,
    label_errors,
    linear_scores,
    probe_all,
    telling_values,
)
from detector.evaluation.rules import HUGE, LEAK_AUC, MAX_REPEATED, MIN_IMAGES, TELLING_AUC
from detector.features.columns import SEEN, without_repeats
from detector.features.file import load_features
from detector.images.facts import describe_image, make_groups, twin_clusters
from detector.images.folders import has_extension, list_images
from detector.images.labels_file import read_labels

SHOWN = 5  # of each kind
NEEDED = ("labels", "splits", "sources", "paths", "groups", "facts", "thumb", "sha256")


# ---- findings ----


def audit(columns, cluster=None, unreadable=()):
    """Columns of a features file -> findings, a dict of plain numbers and strings.

    `cluster`: cluster of duplicates of each row, computed here where None.
    `unreadable`: (path, label) of files that could not be read.
    """
    if not (columns["labels"] >= 0).any():
        raise UsageError("no image has a label: an audit looks for what gives labels away")
    view = columns.get("view", np.zeros(len(columns["labels"])))
    rows = np.flatnonzero((columns["labels"] >= 0) & (view == 0))
    columns = {name: columns[name][rows] for name in NEEDED}
    labels, facts, splits = columns["labels"].astype(int), columns["facts"], columns["splits"]
    if cluster is None:
        cluster = twin_clusters(columns["thumb"], columns["sha256"])
    else:
        cluster = cluster[rows]
    groups, kind = make_groups(columns, cluster)
    return {
        "images": len(rows),
        "groups": kind,
        "formats": {
            name: count_formats(facts["format"][labels == i]) for i, name in enumerate(CLASSES)
        },
        **duplicates(columns, labels, cluster),
        "probes": probe_all(facts, columns["thumb"], labels, groups, splits),
        "telling": telling_values(facts, labels, groups),
        "huge": int((facts["width"].astype(np.int64) * facts["height"] > HUGE).sum()),
        "unreadable": {
            "n": len(unreadable),
            "first": [path for path, _ in unreadable[:SHOWN]],
            **{name: sum(label == i for _, label in unreadable) for i, name in enumerate(CLASSES)},
        },
    }


def count_formats(formats):
    """Format names [n] -> {name: number}."""
    names, counts = np.unique(formats, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def duplicates(columns, labels, cluster):
    """Clusters of duplicates across splits and labels -> 'twins', 'other_splits', 'examples'."""
    test = columns["splits"] == "test"
    trained = np.isin(cluster, cluster[columns["splits"] == "train"])
    both = np.intersect1d(cluster[labels == 0], cluster[labels == 1])
    return {
        "twins": {
            "test": int(test.sum()),
            "test_with_twin_in_train": int(trained[test].sum()),
            "clusters_with_both_labels": len(both),
            "largest_cluster": int(np.bincount(cluster).max(initial=0)),
        },
        "other_splits": repeated_elsewhere(columns, cluster, trained),
        "examples": [
            examples(columns["paths"], cluster, cluster[trained & test]),
            examples(columns["paths"], cluster, cluster[np.isin(cluster, both)]),
        ],
    }


def repeated_elsewhere(columns, cluster, trained):
    """Other splits to measure on whose images repeat in train -> {split: n, repeated, first}.

    `first`: paths of one such image and of its duplicate in train.
    """
    rows = {}
    for split in np.setdiff1d(columns["splits"], ["train", "extra", "test", "seen", ""]):
        own = columns["splits"] == split
        if repeated := int((own & trained).sum()):
            same = cluster == cluster[own & trained][0]
            pair = [columns["paths"][same & (columns["splits"] == s)][0] for s in (split, "train")]
            rows[str(split)] = {
                "n": int(own.sum()),
                "repeated": repeated,
                "first": [str(path) for path in pair],
            }
    return rows


def examples(paths, cluster, chosen):
    """The three largest of the chosen clusters, each as the paths of up to four images."""
    numbers, sizes = np.unique(chosen, return_counts=True)
    return [
        [str(path) for path in paths[cluster == c][:4]]
        for c in numbers[np.argsort(-sizes, kind="stable")][:3]
    ]


def audit_labels(labels, p_fake, sources, twins, paths, by_source):
    """Out-of-fold probabilities -> probable label errors, clearest first, and doubtful sources.

    `by_source`: no fold's classifier was trained on a source that it scores. Otherwise no source
    can be doubted as a whole.
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
        "doubtful_sources": (doubtful_sources(labels, p_fake, sources, twins) if by_source else []),
    }


def labels_of(columns):
    """Columns of a features file -> (`audit_labels` by a logistic regression, its AUC).

    Both are None where there are too few images.
    """
    rows = np.flatnonzero(
        (columns["labels"] >= 0) & (columns["view"] == 0) & (columns["splits"] != SEEN)
    )
    columns = {name: columns[name][rows] for name in (*NEEDED, "features")}
    labels = columns["labels"].astype(int)
    if min(np.bincount(labels, minlength=2)) < MIN_IMAGES:
        return None, None
    twins = twin_clusters(columns["thumb"], columns["sha256"])
    groups, kind = make_groups(columns, twins)
    p_fake = linear_scores(columns["features"], labels, groups)
    if p_fake is None:
        return None, None
    by_source = kind.startswith("sources")
    findings = audit_labels(labels, p_fake, columns["sources"], twins, columns["paths"], by_source)
    return findings, auc(labels, p_fake, groups)


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
    shape = any(word in what for word in ("pixels", "aspect ratio", "multiples of 64"))
    return SHAPE if shape else SAVE


def is_leak(probe, detector):
    """Does an interval of a probe start at TELLING_AUC or above, and reach LEAK_AUC or a detector?

    `detector`: {'auc', 'on_test'}, measured in the same two ways as the probe. Either may be
    missing. The probe reaches the detector where it reaches the lower end of its interval.
    """
    for way in ("auc", "on_test"):
        ends = (probe[way] or {}).get("interval")
        own = ((detector or {}).get(way) or {}).get("interval") or [1.0]
        if ends and ends[0] >= TELLING_AUC and ends[1] >= min(LEAK_AUC, own[0]):
            return True
    return False


def sentences(findings):
    """Findings -> (lines that make a test metric worthless, lines to know)."""
    fatal, note = [], []
    for line, is_fatal in (*duplicate_lines(findings), *probe_lines(findings)):
        (fatal if is_fatal else note).append(line)
    return fatal, [*note, *other_lines(findings)]


def duplicate_lines(findings):
    """Yield (line, is it fatal?) for duplicates across splits and across labels."""
    twins = findings["twins"]
    if repeated := twins["test_with_twin_in_train"]:
        line = (
            f"{repeated} of {twins['test']} test images have a duplicate in train "
            f"(such as {', '.join(findings['examples'][0][0])})"
        )
        if repeated > MAX_REPEATED * twins["test"]:
            measures = "test accuracy on this split measures how well the model remembers images"
            yield f"{line}: {measures}. Train with --resplit.", True
        else:
            yield f"{line}. Remove the copies, or train with --resplit.", False
    for split, row in findings.get("other_splits", {}).items():  # older reports lack it
        yield (
            f"{row['repeated']} of {row['n']} images of '{split}' have a duplicate in"
            f" train (such as {', '.join(row['first'])}). Remove the copies.",
            row["repeated"] > MAX_REPEATED * row["n"],
        )
    if both := twins["clusters_with_both_labels"]:
        yield (
            f"{both} images have copies under both labels, such as"
            f" {', '.join(findings['examples'][1][0])}. Keep each under its right label alone.",
            both > MAX_REPEATED * findings["images"],
        )


def probe_lines(findings):
    """Yield (line, is it fatal?) for each probe that separates the labels, clearest first."""
    for probe in sorted(findings["probes"], key=lowest_end, reverse=True):
        if lowest_end(probe) < TELLING_AUC:
            return
        leaks = is_leak(probe, findings.get("detector"))
        measured = (
            (probe["auc"], f"cross-validated over {findings['groups']}"),
            (probe["on_test"], "learnt on train, tried on test"),
        )
        yield (
            f"{probe['what']} alone separates the labels: AUC "
            + "; ".join(f"{words(metric)} {way}" for metric, way in measured if metric)
            + (". A test metric on these images proves little" if leaks else "")
            + f". {remedy(probe['what'])}, or judge by images of other sources.",
            leaks,
        )


def other_lines(findings):
    """Yield the lines that are never fatal."""
    for row in findings["telling"][:SHOWN]:
        yield (
            f"{row['what']}: {row['real']:.0%} of the reals, {row['fake']:.0%} of the fakes."
            f" {remedy(row['what'])}."
        )
    unreadable = findings["unreadable"]
    if unreadable["n"]:
        yield (
            f"{unreadable['n']} files cannot be read ({unreadable['real']} real,"
            f" {unreadable['fake']} fake), such as {', '.join(unreadable['first'][:2])}."
            " Mend or remove them."
        )
    if findings["huge"]:
        yield (
            f"{findings['huge']} images have more than {HUGE:,} pixels; the service refuses those."
            " Shrink both classes alike."
        )
    for row in (findings.get("labels") or {}).get("doubtful_sources", []):
        yield (
            f"source '{row['source']}' ({' and '.join(row['labels'])}, {row['n']} images): a"
            f" classifier trained on the other sources contradicts its labels ({row['what']}"
            f" {words(row)}). They are swapped, or the source is unlike the others."
            " Look at its images first."
        )


def lowest_end(probe):
    """The higher of the lower ends of a probe's intervals; 0 where there are none."""
    return max(
        (m["interval"][0] for m in (probe["auc"], probe["on_test"]) if m and m["interval"]),
        default=0,
    )


def leak_sentence(leak):
    """`detector_minus_leak` in words, with a warning unless the detector is clearly better."""
    difference = leak["difference"]
    ends = difference["interval"]
    line = (
        f"detector minus best leak: AUC {leak['detector']:z.2f} - {leak['leak']:z.2f}"
        f" ({leak['what']} alone, {leak['how']}) = {words(difference)}"
    )
    if ends and ends[0] > 0:
        return line + "."
    if ends and ends[1] < 0:
        compared = "separate the labels better than the detector"
    else:
        compared = "may separate the labels as well as the detector"
    return f"{line}: on these images the files alone {compared}; its metrics prove little."


# ---- the command ----


def audit_folder(data_dir, labels_file=None):
    """Folder (and table of labels) -> findings; duplicate files count once. Raises UsageError."""
    columns, unreadable = describe_folder(data_dir, labels_file)
    return audit(without_repeats(columns), unreadable=unreadable)


def audit_features(path):
    """Features file -> findings, with those on its labels. Raises UsageError."""
    columns = without_repeats(load_features(path))
    findings = audit(columns)
    labels, linear = labels_of(columns)
    return {**findings, "labels": labels, "detector": {"auc": linear}}


def describe_folder(data_dir, labels_file=None):
    """Folder -> (the columns that `audit` needs, (path, label) of files that cannot be read).

    Prints a line for each file that cannot be read.
    """
    from tqdm import tqdm

    def read(entry):
        try:
            return describe_image(Path(data_dir, entry.path).read_bytes())[1]
        except (OSError, ImageError) as error:
            return error

    entries, rows, unreadable = [], [], []
    listed = read_labels(labels_file, data_dir).entries if labels_file else list_images(data_dir)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        described = zip(listed, pool.map(read, listed), strict=True)
        for entry, row in tqdm(described, total=len(listed), desc="reading", unit="image"):
            if not isinstance(row, Exception):
                entries.append(entry)
                rows.append(row)
                continue
            tqdm.write(f"left out {printable(entry.path)}: {row}", file=sys.stderr)
            # A caption is no broken image.
            if getattr(row, "is_image", True) or has_extension(entry.path):
                unreadable.append((entry.path, entry.label))
    if not rows:
        raise UsageError(f"--data_dir {data_dir}: no readable image")
    return {
        **{
            f"{name}s": np.array([getattr(entry, name) for entry in entries])
            for name in ("label", "split", "path", "source", "group")
        },
        **{name: np.array([row[name] for row in rows]) for name in rows[0]},
        "view": np.zeros(len(rows), np.int8),
    }, unreadable


def report(findings):
    """Findings -> (what the command prints, its exit code)."""
    fatal, note = sentences(findings)
    nothing = (
        f"no format, size or other fact that separates the labels (AUC {TELLING_AUC} or more)"
        if findings["probes"]
        else "too few images for an AUC, so no file fact can be a LEAK here: an AUC takes"
        f" {MIN_IMAGES} of each class"
    )
    lines = [
        f"{findings['images']} images; formats of reals {findings['formats']['real']}, of fakes"
        f" {findings['formats']['fake']}"
    ]
    lines += [*(f"LEAK  {line}" for line in fatal), *(f"note  {line}" for line in note)] or [
        f"no duplicates across splits or labels; {nothing}"
    ]
    if findings["probes"]:
        lines += probe_table(findings["probes"])
    elif fatal or note:
        lines.append(nothing)
    if labels := findings.get("labels"):
        lines.append(
            f"labels to look at first ({labels['probable_errors']} of {labels['images']} are"
            " unlike their class):"
        )
        lines += [f"  {row['path']} is called {row['label']}" for row in labels["first"][:SHOWN]]
    return "\n".join(lines), 1 if fatal else 0


def probe_table(probes):
    """Lines with the AUC of each probe."""
    on_test = "learnt on train, tried on test" if probes[0]["on_test"] else ""
    rows = [("", "cross-validated", on_test)]
    for probe in probes:
        tested = words(probe["on_test"]) if probe["on_test"] else ""
        rows.append((probe["what"], words(probe["auc"]), tested))
    return [
        "AUC of a cheap classifier without a detector (95% interval):",
        *(f"  {what:44} {auc_words:18}  {tested}".rstrip() for what, auc_words, tested in rows),
    ]
