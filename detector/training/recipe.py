"""Rows of a features file -> a calibrated classifier with its threshold, and its report."""

import numpy as np

from detector.base.console import all_printable, say
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.base.files import sha256
from detector.base.project import code_commit
from detector.evaluation import intervals, metrics, report
from detector.features.columns import COLUMNS
from detector.images.facts import merge_named
from detector.model.file import FORMAT, load_model
from detector.model.score import decision, p_fake_of, probability
from detector.model.threshold import choose_band, choose_threshold, training_scores
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

BAND_ERROR = 0.1  # share of each class that may lie on the wrong side of the 'uncertain' band
MANY_ROWS = 20_000  # from here on the last fit may take minutes, and shows no progress
HELD_OUT_ROWS = 1500  # training rows for each line of the leave-one-source-out table


# ---- one classifier ----


def build(kind, rows, seed):
    """Search, score out of fold, fit on all rows, calibrate -> part of the model dict."""
    data = rows.features, rows.labels, rows.weight
    point = search(kind, *data, rows.groups, rows.images, seed)
    folds = fold_rows(rows.labels, rows.groups, seed)
    scores = out_of_fold(kind, *data, folds, seed, **point)
    if len(rows.labels) >= MANY_ROWS:
        say(f"fitting {kind} on all {len(rows.labels)} rows")
    return calibrated(fit(kind, *data, seed, **point), point, scores, rows)


def set_threshold(model, max_fpr, given=None):
    """The model with its threshold, its band, and the rule that derives both from its scores.

    `given`: a threshold chosen by hand, in the place of `max_fpr`.
    """
    p_fake, labels, view, _ = training_scores(model)
    rule = {"max_fpr": max_fpr, "band_error": BAND_ERROR}
    if given is not None:
        rule |= {"words": f"{given:g}, given with --threshold", "given": given}
    elif max_fpr is None:
        rule["words"] = "0.5 on the calibrated probability"
    else:
        rule["words"] = f"at most {max_fpr:g} of the real training images called fake, out of fold"
        if view.any():
            rule["words"] += ", and at most so many of their degraded copies"
    threshold = choose_threshold(p_fake, labels, max_fpr, view, rule.get("given", 0.5))
    return {
        **model,
        "threshold": threshold,
        "threshold_rule": rule,
        "band": choose_band(p_fake, labels, threshold, BAND_ERROR),
    }


def training_data(rows):
    """What the model file states about its training rows.

    `images`: the first 64 bits of each image's hash, int64.
    """
    labels, hashes = rows.labels[rows.whole], rows.columns["sha256"][rows.whole]
    pairs = sorted(zip(hashes, labels, strict=True))
    images = sorted({int(digest[:16], 16) - 2**63 for digest in rows.columns["sha256"]})
    return {
        "sha256": sha256("".join(f"{digest}{label}" for digest, label in pairs).encode()),
        "real": int((labels == 0).sum()),
        "fake": int((labels == 1).sum()),
        "views": int(rows.columns["view"].max()),
        "sources": sorted(set(rows.columns["sources"].tolist())),
        "images": np.array(images, np.int64),
    }


def describe_training(data, encoder, args):
    """What the model file states about its origin. `data`: from `training_data`."""
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
    """Share of real images called fake, out of fold: {'untouched', 'degraded': with interval}."""
    fake = training_scores(model)[0] >= model["threshold"]
    real = rows.labels == 0
    return {
        name: intervals.share(fake[real & mask], rows.groups[real & mask])
        for name, mask in (("untouched", rows.whole), ("degraded", ~rows.whole))
        if (real & mask).any()
    }


def rate_warnings(content):
    """A line for each rate of false alarms whose interval ends above --max_fpr."""
    target = content["threshold_rule"]["max_fpr"]
    return [
        f"{intervals.words(alarm, 3)} of the {name} real training images are called fake, which"
        f" does not certify --max_fpr {target:g}: add real images of other sources, or name a lower"
        " rate"
        for name, alarm in content["false_alarms"].items()
        if target is not None and alarm["interval"][1] > target
    ]


def leave_one_source_out(model, rows, seed):
    """Judge the untouched images of each source by a classifier trained without that source.

    -> (rows {source, label, n, value, interval}, worst first; the AUC over the images of all these
    sources, with an interval that draws whole sources). ([], None) unless both classes have two
    named sources or more.
    """
    from tqdm import tqdm

    sources, labels = rows.columns["sources"], rows.labels
    names = np.setdiff1d(sources, [""])
    if min(len(np.intersect1d(names, sources[labels == label])) for label in (0, 1)) < 2:
        return [], None
    order, table = np.random.default_rng(seed).permutation(len(labels)), []
    p_fake = np.full(len(labels), np.nan)
    for source in tqdm(names, desc="leaving one source out"):
        own = np.flatnonzero(rows.whole & (sources == source))
        others = order[~np.isin(rows.groups[order], rows.groups[own]) & (sources[order] != source)]
        others = others[: HELD_OUT_ROWS // (1 + model["crops"])]
        if len(np.unique(labels[others])) < 2:
            continue
        p_fake[own] = held_out_p_fake(model, rows, others, own, seed)
        fake = p_fake[own] >= model["threshold"]
        for label in np.unique(labels[own]):
            mask = labels[own] == label
            accuracy = intervals.share(fake[mask] == label, rows.twins[own][mask])
            table.append({"source": str(source), "label": CLASSES[label], **accuracy})
    judged, groups = np.isfinite(p_fake), merge_named(rows.groups, sources)
    auc = metrics.auc(labels[judged], p_fake[judged], groups[judged])
    return sorted(table, key=lambda row: (row["value"], -row["n"])), auc


def summary_of(rows, auc):
    """Result of `leave_one_source_out` -> {sources, mean, auc, worst: three rows}, or None."""
    if not rows:
        return None
    return {
        "sources": len({row["source"] for row in rows}),
        "mean": float(np.mean([row["value"] for row in rows])),
        "auc": auc,
        "worst": rows[:3],
    }


def held_out_p_fake(model, rows, train, test, seed):
    """Probability of fake of the rows `test` by the model's classifier, fitted on `train` alone.

    The weights are computed anew, because a class that lost a source would weigh less.
    """
    labels = rows.labels[train]
    weight = row_weights(labels, rows.columns["sources"][train])
    point = model["hyperparameters"]
    fitted = fit(model["classifier"], rows.features[train], labels, weight, seed, **point)
    return probability(model, decision(fitted, rows.features[test]))


def leak(model, columns, train, test, groups):
    """The detector against probes of file facts that were trained on the same rows.

    See `probes.detector_minus_leak`.
    """
    from detector.evaluation.probes import detector_minus_leak, probe_scores

    train, test = (rows[columns["view"][rows] == 0] for rows in (train, test))
    labels = columns["labels"].astype(int)
    leaks = probe_scores(columns["facts"], columns["thumb"], labels, train, test)
    comparison = detector_minus_leak(p_of(model, columns, test), leaks, labels[test], groups[test])
    return comparison and comparison | {"how": "learnt on the training images"}


def audit_labels_of(model, rows):
    """Wrong labels that out-of-fold probabilities suggest (`audit.audit_labels`).

    Only untouched images are looked at.
    """
    from detector.evaluation.audit import audit_labels

    whole, sources = rows.whole, rows.columns["sources"]
    pairs = set(zip(sources, rows.groups, strict=True))
    return audit_labels(
        rows.labels[whole],
        training_scores(model)[0][whole],
        sources[whole],
        rows.twins[whole],
        rows.columns["paths"][whole],
        by_source=len(pairs) == len(set(sources)),  # no source is in two groups
    )


def compare(models, rows, columns, test, groups):
    """Several kinds on the same folds.

    -> rows {classifier, hyperparameters, out_of_fold, auc, balanced_accuracy}
    """
    whole, table = test[columns["view"][test] == 0], []
    labels = columns["labels"][whole].astype(int)
    for kind, model in models.items():
        p_fake, scores = p_of(model, columns, whole), model["out_of_fold"]["scores"]
        on_test = metrics.measure(labels, p_fake, model["threshold"], groups[whole])
        row = {
            "classifier": kind,
            "hyperparameters": model["hyperparameters"],
            "out_of_fold": metrics.auc(rows.labels, scores, rows.groups),
            "auc": on_test["auc"],
            "balanced_accuracy": on_test["balanced_accuracy"],
        }
        table.append(row)
    return table


def p_of(model, columns, rows):
    return p_fake_of(model, columns["features"][rows])


# ---- the command ----


def audit_training(data):
    """Findings of `audit.py` on the rows that train and test here."""
    from detector.evaluation.audit import audit

    used = np.concatenate([data.train, data.test])
    columns = {name: data.columns[name][used] for name in COLUMNS}
    columns["splits"] = np.repeat(["train", "test"], [len(data.train), len(data.test)])
    # images of a named group are no duplicates
    return audit(columns, None if (columns["groups"] != "").any() else data.twins[used])


def say_findings(findings, before=()):
    """Print LEAK and note lines on stderr, except those of `before`. -> the lines"""
    from detector.evaluation.audit import sentences

    fatal, note = sentences(all_printable(findings))
    lines = [*(f"LEAK  {line}" for line in fatal), *(f"note  {line}" for line in note)]
    for line in lines:
        if line not in before:
            say(line)
    return lines


def train_best(data, args, trained=None):
    """Data -> (model with threshold, band and origin; rows of `compare`).

    Of several kinds the best out of fold is chosen, never by the test images. The classifier of a
    model that is `trained` stays as it is, and only its threshold is chosen anew.
    """
    if trained:
        parts = {trained["classifier"]: trained}
    else:
        kinds = GRIDS if args.classifier == "all" else [args.classifier]
        parts = {kind: build(kind, data.rows, args.seed) for kind in kinds}
    models = {
        kind: set_threshold(part, args.max_fpr, args.threshold) for kind, part in parts.items()
    }
    compared = compare(models, data.rows, data.columns, data.test, data.groups)
    best = max(compared, key=lambda row: row["out_of_fold"]["value"])
    origin = describe_training(training_data(data.rows), data.encoder, args)
    return models[best["classifier"]] | origin, compared


def read_trained(path, data):
    """The model of --from_model. Raises UsageError unless the rows of Data trained it."""
    model, rows = load_model(path), training_data(data.rows)
    same = model["encoder"]["identity"] == data.encoder["identity"] and all(
        np.array_equal(model["training_data"].get(name), value) for name, value in rows.items()
    )
    if not same:
        raise UsageError(
            f"--from_model {path}: was trained on other rows than these flags choose; give"
            " --features_file, --train_splits, --crops and --resplit as in its training"
        )
    return model


def describe_model(model, kinds, data, audited, seed):
    """Model, rows of `compare`, Data, findings of `audit_training` -> the report's content.

    Adds labels and the detector to the findings, and the test metrics to the model. `test_images`
    is a hash of the untouched test images. Figures on equal hashes can be compared.
    """
    from detector.evaluation.assess import digest

    assessed = report.assess(model, data.columns, data.test, data.groups, data.twins)
    audited["labels"] = audit_labels_of(model, data.rows)
    audited["detector"] = {"on_test": assessed["overall"]["auc"]}
    left_out, left_out_auc = leave_one_source_out(model, data.rows, seed)
    model["metrics"] = {
        "split": data.split,
        **{name: assessed[name] for name in ("overall", "degraded", "calibration")},
        "out_of_fold": next(
            row["out_of_fold"] for row in kinds if row["classifier"] == model["classifier"]
        ),
        "left_out": summary_of(left_out, left_out_auc),
    }
    content = {
        **report.about(model),
        "split": data.split,
        "test_images": digest(data.columns, data.test[data.columns["view"][data.test] == 0]),
        "audit": audited,
        "leak": leak(model, data.columns, data.train, data.test, data.groups),
        "false_alarms": false_alarms(model, data.rows),
        "classifiers": kinds,
        **assessed,
        "leave_one_source_out": left_out,
    }
    return content | {"warnings": rate_warnings(content)}
