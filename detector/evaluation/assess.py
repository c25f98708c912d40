"""A model's scores on labelled images it has not seen -> everything a report says of them."""

from pathlib import Path

import numpy as np

from detector.base.console import say
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.base.files import check_folder, sha256
from detector.evaluation import report
from detector.evaluation.baseline import changes_table, compare, read_baseline
from detector.evaluation.pictures import contact_sheet, distorted, encode_folder
from detector.features.columns import COLUMNS, SEEN, distinct, join_columns, without_repeats
from detector.features.file import open_files
from detector.images.facts import make_groups, twin_clusters
from detector.model.file import load_model
from detector.model.score import p_fake_of
from detector.model.threshold import stale_threshold
from detector.verdict import Detector, choose_model

SHOWN = 12  # hardest images of each class
PICTURES = (
    "robustness under re-saving, shrinking, blur, noise and crops",
    "files made alike",
    "hardest images",
)


def stored_columns(path, model, data_dir):
    """Columns of a features file, checked to be of the model's encoder and (where a folder is named) of that folder."""
    (file,), encoder = open_files([path], model.get("crops", 0))
    columns = join_columns(list(file.parts()))
    if encoder["identity"] != model["encoder"]["identity"]:
        raise UsageError(
            f"{path} is of encoder '{encoder['name']}' ({encoder['identity'][:12]}), the model"
            f" needs '{model['encoder']['name']}' ({model['encoder']['identity'][:12]}): extract"
            " with that one"
        )
    missing = [name for name in columns["paths"] if data_dir and not Path(data_dir, name).is_file()]
    if missing:
        raise UsageError(
            f"--data_dir {data_dir}: '{missing[0]}' of {path} is not there; name the folder that"
            f" was extracted, or where files were removed since, remove {path} and extract again"
        )
    return columns


def split_rows(columns, model, seen):
    """Labelled images that trained neither the model nor (`seen`: hashes' first 16 digits) its encoder: those to evaluate.

    -> (their row numbers, row numbers of those left out). Raises UsageError where none is left.
    """
    trained = {f"{int(number) + 2**63:016x}" for number in model["training_data"]["images"]}
    own = np.array([digest[:16] in trained for digest in columns["sha256"]], bool)
    by_encoder = np.isin([digest[:16] for digest in columns["sha256"]], seen) | (
        columns["splits"] == SEEN
    )
    labelled = columns["labels"] >= 0
    whole = columns["view"] == 0
    for mask, why in ((own, "trained the model"), (by_encoder & ~own, "trained its encoder")):
        if n := int((mask & labelled & whole).sum()):
            say(f"left out: {n} images that {why}")
    keep = distinct(columns, np.flatnonzero(labelled & ~own & ~by_encoder))
    if not len(keep):
        raise UsageError(
            "no labelled image is left that trained neither the model nor its encoder: name other"
            " images"
        )
    return keep, np.flatnonzero(labelled & (own | by_encoder))


def hardest(columns, p_fake, threshold):
    """The most confidently wrong of each class -> list of {path, label, p_fake}."""
    labels, found = columns["labels"], []
    for label, sign in ((0, -1), (1, 1)):
        rows = np.flatnonzero((labels == label) & ((p_fake >= threshold) != label))
        found += [
            {
                "path": str(columns["paths"][i]),
                "label": CLASSES[label],
                "p_fake": round(float(p_fake[i]), 4),
            }
            for i in rows[np.argsort(sign * p_fake[rows], kind="stable")][:SHOWN]
        ]
    return found


# ---- the report ----


def cross_validated_leak(columns, p_fake, groups):
    """The detector against probes cross-validated on these images (`probes.detector_minus_leak`), or None."""
    from detector.evaluation.probes import (
        MIN_IMAGES,
        boosted,
        cross_validated,
        detector_minus_leak,
        probes_of,
    )

    labels = columns["labels"].astype(int)
    if min(np.bincount(labels, minlength=2)) < MIN_IMAGES:
        return None
    leaks = {
        what: cross_validated(boosted, values, labels, groups)
        for what, values in probes_of(columns["facts"], columns["thumb"])[-2:]
    }
    if any(p is None for p in leaks.values()):
        return None
    return detector_minus_leak(p_fake, leaks, labels, groups) | {
        "how": "cross-validated on these images"
    }


def assess_all(model, columns, rows, left_out):
    """Everything that scores alone give on those rows, what the files betray (of the images left out, too: a test image may
    have a twin among them), and what is wrong with the model itself."""
    from detector.evaluation.audit import audit

    split = np.full(len(columns["labels"]), "train")
    split[rows] = "test"
    both = np.sort(np.concatenate([rows, left_out]))
    betrayed = audit({**{name: columns[name][both] for name in COLUMNS}, "splits": split[both]})
    columns = {name: columns[name][rows] for name in COLUMNS}
    twins = twin_clusters(columns["thumb"], columns["sha256"])
    groups, kind = make_groups(columns, twins)
    found = report.assess(model, columns, np.arange(len(rows)), groups, twins)
    betrayed["detector"] = {"on_test": found["overall"] and found["overall"]["auc"]}
    whole = columns["view"] == 0
    first = {name: columns[name][whole] for name in COLUMNS}
    p_fake = p_fake_of(model, first["features"])
    warnings = [stale_threshold(model), report.calibration_warning(found["calibration"])]
    return (
        first,
        groups[whole],
        p_fake,
        {
            **report.about(model),
            **found,
            "audit": betrayed,
            "leak": cross_validated_leak(first, p_fake, groups[whole]),
            "data": {
                "groups": kind,
                **{
                    part: digest(columns, mask)
                    for part, mask in report.parts_of(model, columns).items()
                },
            },
            "warnings": [line for line in warnings if line],
        },
    )


def digest(columns, mask):
    """Hash of those images, views and labels, in whatever order: two metrics are compared only where it is the same."""
    rows = zip(*(columns[name][mask] for name in ("sha256", "view", "labels")))
    return sha256("".join(sorted(f"{s} {view} {label} " for s, view, label in rows)).encode())


def evaluate(
    model_path=None,
    data_dir=None,
    features_file=None,
    report_dir="evaluation",
    baseline=None,
    robustness_images=1000,
    device="auto",
):
    """The flags of evaluate.py -> (what there is to print, what got worse than `baseline`, number of unreadable files).

    Writes the report. Raises DetectorError.
    """
    check_folder(report_dir, f"--report_dir {report_dir}")
    before = read_baseline(baseline, report_dir) if baseline else None
    model_path = choose_model(model_path)
    detector = Detector(model_path, device) if data_dir else None
    model = detector.model if detector else load_model(model_path)
    columns, bad = columns_of(detector, model, data_dir, features_file)
    seen = detector.encoder.manifest.get("seen", []) if detector else []
    first, groups, p_fake, found = assess_all(model, columns, *split_rows(columns, model, seen))
    rows = None if before is None else compare(found, before)
    with report.staged(report_dir) as place:
        if data_dir:
            found |= distorted(detector, data_dir, first, groups, robustness_images)
            found["hardest"] = hardest(first, p_fake, model["threshold"])
            contact_sheet(data_dir, first, found["hardest"], place / "hardest.png")
        else:
            found["not_measured"] = list(PICTURES)
        report.fill(place, found)
    text = f"{report.evaluation(found)}\nreport in {Path(report_dir)}/"
    if rows is None:
        return text, [], bad
    text += "\n" + (
        changes_table(rows)
        if rows
        else f"every metric lies in the interval that {baseline} records"
    )
    return (
        text,
        [f"{words} ({part})" for part, words, _, _, verdict in rows if verdict == "worse"],
        bad,
    )


def columns_of(detector, model, data_dir, features_file):
    """Columns of a features file, else of a folder that is encoded now -> (they, number of unreadable files)."""
    if features_file:
        return without_repeats(stored_columns(features_file, model, data_dir)), 0
    columns, bad = encode_folder(detector, data_dir)
    return without_repeats(columns), bad
