"""Evaluate a model on labelled images that it has not seen, and write the report."""

from pathlib import Path

import numpy as np

from detector.base.console import say
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.base.files import check_folder, sha256
from detector.evaluation import operating, printed, report
from detector.evaluation.baseline import changes_table, compare, read_baseline
from detector.evaluation.labelled import read_labelled, whole_folder
from detector.evaluation.metrics import PREVALENCES
from detector.evaluation.pictures import contact_sheet, distorted, encode_folder
from detector.features.columns import COLUMNS, SEEN, distinct, join_columns, without_repeats
from detector.features.file import open_files
from detector.images.distort import CONDITIONS
from detector.images.facts import make_groups, merge_named, twin_clusters
from detector.images.folders import list_images
from detector.model.file import load_model, trained_on
from detector.model.score import p_fake_of
from detector.model.threshold import decide, outside, stale_threshold, verdict
from detector.verdict import Detector, choose_model

SHOWN = 12  # hardest images of each class
# the distortion that stands for re-saved uploads in the operating table
RESAVED = next(i for i, (panel, _, _) in enumerate(CONDITIONS) if panel == "re-saved")
PICTURES = (
    "robustness under re-saving, shrinking, blur, noise and crops",
    "both classes saved alike",
    "hardest images",
)


def stored_columns(path, model, data_dir):
    """Columns of a features file. Raises UsageError unless they fit the model and the folder."""
    (file,), encoder = open_files([path], model.get("crops", 0))
    columns = join_columns(list(file.parts()))
    if encoder["identity"] != model["encoder"]["identity"]:
        raise UsageError(
            f"{path} is of encoder '{encoder['name']}' ({encoder['identity'][:12]}), the model"
            f" needs '{model['encoder']['name']}' ({model['encoder']['identity'][:12]}): extract"
            " with that encoder"
        )
    missing = [name for name in columns["paths"] if data_dir and not Path(data_dir, name).is_file()]
    if missing:
        raise UsageError(
            f"--data_dir {data_dir}: '{missing[0]}' of {path} is not there; name the folder that"
            f" was extracted, or where files were removed since, remove {path} and extract again"
        )
    return columns


def split_rows(columns, model, seen):
    """Leave out labelled images that trained the model or its encoder.

    `seen`: first 16 digits of the hashes of the encoder's training images. -> (row numbers to
    evaluate, row numbers left out). Raises UsageError where nothing is left to evaluate.
    """
    hashes = [digest[:16] for digest in columns["sha256"]]
    own = trained_on(model, columns["sha256"])
    by_encoder = np.isin(hashes, seen) | (columns["splits"] == SEEN)
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
    labels, images = columns["labels"], []
    for label, sign in ((0, -1), (1, 1)):
        rows = np.flatnonzero((labels == label) & ((p_fake >= threshold) != label))
        images += [
            {
                "path": str(columns["paths"][i]),
                "label": CLASSES[label],
                "p_fake": round(float(p_fake[i]), 4),
            }
            for i in rows[np.argsort(sign * p_fake[rows], kind="stable")][:SHOWN]
        ]
    return images


# ---- the report ----


def cross_validated_leak(columns, p_fake, groups):
    """`detector_minus_leak` with probes cross-validated on these images; None with too few."""
    from detector.evaluation import probes

    labels = columns["labels"].astype(int)
    if min(np.bincount(labels, minlength=2)) < probes.MIN_IMAGES:
        return None
    leaks = {
        what: probes.cross_validated(probes.boosted, values, labels, groups)
        for what, values in probes.probes_of(columns["facts"], columns["thumb"])[-2:]
    }
    if any(scores is None for scores in leaks.values()):
        return None
    return probes.detector_minus_leak(p_fake, leaks, labels, groups) | {
        "how": "cross-validated on these images"
    }


def audit_evaluation(columns, rows, left_out):
    """Audit the rows to evaluate as the test split, and the rows left out as the train split.

    An image to evaluate may have a duplicate among those left out.
    """
    from detector.evaluation.audit import audit

    split = np.full(len(columns["labels"]), "train")
    split[rows] = "test"
    both = np.sort(np.concatenate([rows, left_out]))
    return audit({**{name: columns[name][both] for name in COLUMNS}, "splits": split[both]})


def assess_all(model, columns, rows, left_out):
    """Measure everything that needs no image files.

    -> (columns of the images themselves, without degraded copies; their groups; their probability
    of fake; the parts of the operating table; the report)
    """
    findings = audit_evaluation(columns, rows, left_out)
    columns = {name: columns[name][rows] for name in COLUMNS}
    twins = twin_clusters(columns["thumb"], columns["sha256"])
    groups, kind = make_groups(columns, twins)
    twins = merge_named(twins, columns["groups"])
    assessed = report.assess(model, columns, np.arange(len(rows)), groups, twins)
    findings["detector"] = {"on_test": assessed["overall"] and assessed["overall"]["auc"]}
    whole = columns["view"] == 0
    first = {name: columns[name][whole] for name in COLUMNS}
    of_all = p_fake_of(model, columns["features"])
    p_fake, in_use = of_all[whole], parts_in_use(model, columns, of_all, groups)
    warnings = [stale_threshold(model), report.calibration_warning(assessed["calibration"])]
    parts = report.parts_of(model, columns)
    metrics = {
        **report.about(model),
        **assessed,
        "audit": findings,
        "leak": cross_validated_leak(first, p_fake, groups[whole]),
        "data": {"groups": kind, **{part: digest(columns, mask) for part, mask in parts.items()}},
        "warnings": [line for line in warnings if line],
    }
    return first, groups[whole], p_fake, in_use, metrics


def parts_in_use(model, columns, p_fake, groups):
    """The parts of the operating table: untouched images, and their degraded copies."""
    parts = {}
    for mask, what in ((columns["view"] == 0, ""), (columns["view"] > 0, ", degraded copies")):
        own = {name: columns[name][mask] for name in ("labels", "sources")}
        parts |= operating.parts_of(model, own, p_fake[mask], groups[mask], what)
    return parts


def assess_pictures(detector, data_dir, columns, groups, p_fake, most, place):
    """Measure what needs image files, and draw the hardest into the folder `place`.

    `most`: the largest number of images to distort.
    -> (its part of the report, parts of the operating table, {row: distortions that flip it})
    """
    worst = hardest(columns, p_fake, detector.model["threshold"])
    contact_sheet(data_dir, columns, worst, place / "hardest.png")
    tables, drawn, shifted = distorted(detector, data_dir, columns, groups, most)
    own = {name: columns[name][drawn] for name in ("labels", "sources")}
    panel, level = CONDITIONS[RESAVED][:2]
    parts = operating.parts_of(
        detector.model, own, shifted[:, 1 + RESAVED], groups[drawn], f", {panel} {level}"
    )
    fake = shifted >= detector.model["threshold"]
    flips = {
        int(row): "; ".join(
            f"{panel} {level}" for (panel, level, _), f in zip(CONDITIONS, flags, strict=True) if f
        )
        for row, flags in zip(drawn, fake[:, 1:] != fake[:, :1], strict=True)
    }
    return tables | {"hardest": worst}, parts, flips


def digest(columns, mask):
    """Hash of the images, views and labels in any order.

    Metrics are compared only where their digests are equal.
    """
    rows = zip(*(columns[name][mask] for name in ("sha256", "view", "labels")), strict=True)
    return sha256("".join(sorted(f"{s} {view} {label} " for s, view, label in rows)).encode())


def open_model(model_path, data_dir, device):
    """-> (Detector, or None without images to encode; the model)"""
    if data_dir:
        detector = Detector(model_path, device)
        return detector, detector.model
    return None, load_model(model_path)


def evaluate(
    model_path=None,
    data_dir=None,
    features_file=None,
    report_dir="evaluation",
    baseline=None,
    robustness_images=1000,
    device="auto",
    uploads_per_day=1000,
    prevalence=PREVALENCES,
    review=None,
    labels_file=None,
):
    """The flags of evaluate.py -> (text to print, rows of `compare` that got worse, unreadable: n).

    `review`: (low, high), or the arguments of `operating.suggest_review`. Raises DetectorError.
    """
    check_folder(report_dir, f"--report_dir {report_dir}")
    before = read_baseline(baseline, report_dir) if baseline else None
    detector, model = open_model(choose_model(model_path), data_dir, device)
    review = operating.suggest_review(model, **review) if isinstance(review, dict) else review
    columns, unreadable = columns_of(detector, model, data_dir, features_file, labels_file)
    seen = detector.encoder.manifest.get("seen", []) if detector else []
    first, groups, p_fake, parts, content = assess_all(
        model, columns, *split_rows(columns, model, seen)
    )
    rows, flips = compare(content, before) if before else [], {}
    content["whole_folder"] = whole_folder(labels_file, first, p_fake >= model["threshold"])
    with report.staged(report_dir) as place:
        if detector:
            given = detector, data_dir, first, groups, p_fake, robustness_images, place
            tables, more, flips = assess_pictures(*given)
            content, parts = content | tables, parts | more
        else:
            content["not_measured"] = list(PICTURES)
        content |= operating.tables(model, parts, review, uploads_per_day, prevalence)
        report.fill(place, content, predictions(first, p_fake, model, review, flips))
    lines = [printed.evaluation(content), f"report in {Path(report_dir)}/"]
    lines += [changes_table(rows, baseline)] if baseline else []
    return "\n".join(lines), [row for row in rows if row[-1] == "worse"], unreadable


def predictions(columns, p_fake, model, review, flips):
    """-> rows of predictions.csv, the most confidently wrong first.

    `flips`: {row number: the distortions that flip its verdict}, of the rows that were distorted.
    """
    labels = columns["labels"].astype(int)
    order = np.argsort(np.where(labels == 1, p_fake, 1 - p_fake), kind="stable")
    certain = outside(p_fake, model["band"])
    return [
        {
            "path": str(columns["paths"][i]),
            "source": str(columns["sources"][i]),
            "split": str(columns["splits"][i]),
            "label": CLASSES[labels[i]],
            "p_fake": round(float(p_fake[i]), 4),
            "verdict": verdict(model, p_fake[i])[0],
            "uncertain": "" if certain[i] else "yes",
            "decision": decide(p_fake[i], review) or "",
            "flipped_by": flips.get(i, ""),
        }
        for i in order
    ]


def columns_of(detector, model, data_dir, features_file, labels_file):
    """-> (columns of the features file, else of the encoded folder; number of unreadable files)."""
    if features_file:
        columns, unreadable = stored_columns(features_file, model, data_dir), 0
    else:
        labels = read_labelled(labels_file, data_dir) if labels_file else list_images(data_dir)
        columns, unreadable = encode_folder(detector, data_dir, labels)
    return without_repeats(columns), unreadable
