"""Rows of a features file -> a calibrated classifier with its threshold, and what is known of it."""

import numpy as np

from detector.base.console import all_printable, say
from detector.base.constants import CLASSES
from detector.base.files import sha256
from detector.base.project import code_commit
from detector.evaluation import metrics, report
from detector.features.columns import COLUMNS
from detector.model.file import FORMAT
from detector.model.score import decision, p_fake_of, probability
from detector.model.threshold import choose_band, choose_threshold
from detector.training.classifiers import (
    GRIDS,
    calibrated,
    fit,
    fold_rows,
    out_of_fold,
    row_weights,
    search,
    svc,
)

BAND_ERROR = (
    0.1  # of each class, the share that may lie on the wrong side outside the 'uncertain' band
)
HELD_OUT_ROWS = 1500  # of the other sources, for each line of the leave-one-source-out table


# ---- one classifier ----


def build(kind, rows, seed):
    """Search, out-of-fold scores once, a sigmoid on them, final fit on all rows -> the classifier's part of the model dict."""
    point = search(kind, rows.features, rows.labels, rows.weight, rows.groups, rows.images, seed)
    scores = out_of_fold(
        kind,
        rows.features,
        rows.labels,
        rows.weight,
        fold_rows(rows.labels, rows.groups, seed),
        seed,
        **point,
    )
    return calibrated(
        fit(kind, rows.features, rows.labels, rows.weight, seed, **point), point, scores, rows
    )


def out_of_fold_probability(model):
    return probability(model, model["out_of_fold"]["scores"].astype(np.float64))


def set_threshold(model, max_fpr):
    """The model with its threshold, the band around it, and the rule that both follow from its out-of-fold scores."""
    p_fake, labels = out_of_fold_probability(model), model["out_of_fold"]["labels"]
    threshold = choose_threshold(p_fake, labels, max_fpr, model["out_of_fold"]["view"])
    copies = (
        ", and at most so many of their degraded copies"
        if model["out_of_fold"]["view"].any()
        else ""
    )
    words = (
        "0.5 on the calibrated probability"
        if max_fpr is None
        else f"at most {max_fpr:g} of the real training images called fake, out of fold{copies}"
    )
    return {
        **model,
        "threshold": threshold,
        "threshold_rule": {"words": words, "max_fpr": max_fpr, "band_error": BAND_ERROR},
        "band": choose_band(p_fake, labels, threshold, BAND_ERROR),
    }


def training_data(rows):
    """What the model says of the rows that trained it. `images`: first 64 bits of each image's hash."""
    digest = "".join(
        f"{s}{label}"
        for s, label in sorted(zip(rows.columns["sha256"][rows.whole], rows.labels[rows.whole]))
    )
    hashes = sorted({int(s[:16], 16) - 2**63 for s in rows.columns["sha256"]})
    return {
        "sha256": sha256(digest.encode()),
        "real": int((rows.labels[rows.whole] == 0).sum()),
        "fake": int((rows.labels[rows.whole] == 1).sum()),
        "views": int(rows.columns["view"].max()),
        "sources": sorted(set(rows.columns["sources"].tolist())),
        "images": np.array(hashes, np.int64),
    }


def describe_training(data, encoder, args):
    """What the model file says of where it comes from; `data`: from `training_data`."""
    import sklearn

    return {
        "format": FORMAT,
        "encoder": dict(encoder),
        "versions": {
            "model": args.model_version,
            "code": code_commit(),
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "svm": svc().__module__.split(".")[0],
        },
        "training_data": data,
        "crops": args.crops,
        **({"notice": args.notice} if args.notice else {}),
    }


def false_alarms(model, rows):
    """Share of real images called fake, out of fold: {'untouched', 'degraded': share with interval}."""
    fake = out_of_fold_probability(model) >= model["threshold"]
    real = rows.labels == 0
    return {
        name: metrics.share(fake[real & mask], rows.groups[real & mask])
        for name, mask in (("untouched", rows.whole), ("degraded", ~rows.whole))
        if (real & mask).any()
    }


def leave_one_source_out(model, rows, seed):
    """Each source as if it were new: a classifier of the same kind, trained without it, on its untouched images.

    -> rows {source, label, n, value, interval}, worst first; [] unless both classes have two named sources or more. The
    others, their copies too, give at most HELD_OUT_ROWS rows to each fit.
    """
    sources, labels, twins = rows.columns["sources"], rows.labels, rows.twins
    names = np.setdiff1d(sources, [""])
    if min(len(np.intersect1d(names, sources[labels == label])) for label in (0, 1)) < 2:
        return []
    from tqdm import tqdm

    order, found = np.random.default_rng(seed).permutation(len(labels)), []
    for source in tqdm(names, desc="leaving one source out"):
        own = np.flatnonzero(rows.whole & (sources == source))
        others = order[~np.isin(rows.groups[order], rows.groups[own]) & (sources[order] != source)]
        others = others[: HELD_OUT_ROWS // (1 + model["crops"])]
        if len(np.unique(labels[others])) < 2:
            continue
        weight = row_weights(
            labels[others], sources[others]
        )  # anew: a class that lost a source would count for less
        again = fit(
            model["classifier"],
            rows.features[others],
            labels[others],
            weight,
            seed,
            **model["hyperparameters"],
        )
        p_fake = probability(model, decision(again, rows.features[own]))
        for i, name in enumerate(CLASSES):
            if (labels[own] == i).any():
                right = (p_fake[labels[own] == i] >= model["threshold"]) == i
                found.append(
                    {
                        "source": str(source),
                        "label": name,
                        **metrics.share(right, twins[own][labels[own] == i]),
                    }
                )
    return sorted(found, key=lambda r: (r["value"], -r["n"]))


def leak(model, columns, train, test, groups):
    """The detector against probes that saw the same training rows and no picture (`probes.detector_minus_leak`)."""
    from detector.evaluation.probes import detector_minus_leak, probe_scores

    used = [rows[columns["view"][rows] == 0] for rows in (train, test)]
    labels = columns["labels"].astype(int)
    leaks = probe_scores(columns["facts"], columns["thumb"], labels, *used)
    found = detector_minus_leak(
        p_of(model, columns, used[1]), leaks, labels[used[1]], groups[used[1]]
    )
    return found and found | {"how": "learnt on the training images"}


def audit_labels_of(model, rows):
    """What the out-of-fold probabilities say of the labels (`audit.audit_labels`), untouched images alone."""
    from detector.evaluation.audit import audit_labels

    by_source = len(set(zip(rows.columns["sources"], rows.groups))) == len(
        set(rows.columns["sources"])
    )  # no source in two groups
    return audit_labels(
        rows.labels[rows.whole],
        out_of_fold_probability(model)[rows.whole],
        rows.columns["sources"][rows.whole],
        rows.columns["paths"][rows.whole],
        by_source,
    )


def compare(models, rows, columns, test, groups):
    """-> rows {classifier, hyperparameters, out_of_fold, auc, balanced_accuracy} of several kinds on the same folds."""
    whole, found = test[columns["view"][test] == 0], []
    for kind, model in models.items():
        on_test = metrics.measure(
            columns["labels"][whole].astype(int),
            p_of(model, columns, whole),
            model["threshold"],
            groups[whole],
        )
        found.append(
            {
                "classifier": kind,
                "hyperparameters": model["hyperparameters"],
                "out_of_fold": metrics.auc(
                    rows.labels, model["out_of_fold"]["scores"], rows.groups
                ),
                "auc": on_test["auc"],
                "balanced_accuracy": on_test["balanced_accuracy"],
            }
        )
    return found


def p_of(model, columns, rows):
    return p_fake_of(model, columns["features"][rows])


# ---- the command ----


def audit_training(data):
    """What `audit.py` finds in the rows as they are used here. -> findings"""
    from detector.evaluation.audit import audit

    used = np.concatenate([data.train, data.test])
    return audit(
        {
            **{name: data.columns[name][used] for name in COLUMNS},
            "splits": np.repeat(["train", "test"], [len(data.train), len(data.test)]),
        },
        data.twins[used],
    )


def say_findings(found, before=()):
    """LEAK and note lines on stderr, those of `before` left out. -> the lines"""
    from detector.evaluation.audit import sentences

    fatal, note = sentences(all_printable(found))
    lines = [*(f"LEAK  {line}" for line in fatal), *(f"note  {line}" for line in note)]
    for line in lines:
        if line not in before:
            say(line)
    return lines


def train_best(data, args):
    """Data -> (model with threshold, band and origin: of several kinds the best out of fold; rows of `compare`)."""
    kinds = GRIDS if args.classifier == "all" else [args.classifier]
    parts = {kind: build(kind, data.rows, args.seed) for kind in kinds}
    models = {kind: set_threshold(part, args.max_fpr) for kind, part in parts.items()}
    compared = compare(models, data.rows, data.columns, data.test, data.groups)
    best = max(compared, key=lambda row: row["out_of_fold"]["value"])[
        "classifier"
    ]  # never by the test images
    return models[best] | describe_training(training_data(data.rows), data.encoder, args), compared


def describe_model(model, kinds, data, audited, seed):
    """Model, rows of `compare`, Data, findings of `audit_training` -> what the report says.

    Adds labels and the detector to the findings, and the test metrics to the model.
    """
    assessed = report.assess(model, data.columns, data.test, data.groups, data.twins)
    audited["labels"] = audit_labels_of(model, data.rows)
    audited["detector"] = {"on_test": assessed["overall"]["auc"]}
    found = {
        **report.about(model),
        "split": data.split,
        "audit": audited,
        "leak": leak(model, data.columns, data.train, data.test, data.groups),
        "false_alarms": false_alarms(model, data.rows),
        "classifiers": kinds,
        **assessed,
        "leave_one_source_out": leave_one_source_out(model, data.rows, seed),
    }
    model["metrics"] = {
        name: found[name] for name in ("split", "overall", "degraded", "calibration")
    }
    return found
