"""features.npz -> model.joblib and a report: a classifier on frozen features, tuned, calibrated and tested.

    python train_model.py --features_file features.npz --model_output_path model.joblib
    python train_model.py --max_fpr 0.01               # threshold: at most 1% of real images called fake
    python train_model.py --resplit                    # our own split by group, whatever the folders say
    python train_model.py --classifier all             # compare four kinds, train the best

Images that look alike stay on one side of every split; with ten sources or more, whole sources do.
"""
import argparse
from pathlib import Path

import common
from common import CLASSES, MAX_CROPS, NOTICE, VERSION, UsageError, say


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=common.Help)
    parser.add_argument("--features_file", nargs="+", default=["features.npz"], metavar="FILE",
                        help="from extract_features.py (default: features.npz); several must be of one encoder")
    parser.add_argument("--model_output_path", default="model.joblib", metavar="FILE", help="model to write")
    parser.add_argument("--classifier", choices=["svm", "linear-svm", "logistic", "mlp", "all"], default="svm",
                        help="kind; all: compare, train the best")
    parser.add_argument("--crops", type=int, default=0, metavar="N",
                        help="squares in full resolution scored beside the whole; extract with --crops, too")
    parser.add_argument("--max_fpr", type=float, metavar="X",
                        help="threshold at which at most this share of real images is called fake (default: 0.5 on the "
                             "calibrated probability)")
    parser.add_argument("--train_splits", default="train", metavar="A,B", help="splits to train on")
    parser.add_argument("--resplit", action="store_true", help="split by group here, whatever the folders say")
    parser.add_argument("--model_version", default="v0.0.0-dev", metavar="V", help="version stored in the model")
    parser.add_argument("--notice", metavar="TEXT", help="what the model is not fit for: told beside every verdict; the service "
                                                         "then takes it with ALLOW_DEMO_MODEL=1 alone")
    parser.add_argument("--sign", metavar="KEY", help="private Ed25519 key in PEM: signs the model, for MODEL_PUBLIC_KEY")
    parser.add_argument("--export_sklearn", metavar="FILE",
                        help="also a scikit-learn Pipeline, for skops.io.load; calibrator and threshold are in the model alone")
    parser.add_argument("--max_rows", type=int, default=100_000, metavar="N",
                        help="more rows than this are sampled; linear-svm takes all of a Parquet data set, in passes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of splits and folds")
    args = parser.parse_args(argv)
    if args.max_rows < 1:
        raise UsageError(f"--max_rows {args.max_rows}: must be at least 1")
    if not 0 <= args.crops <= MAX_CROPS:
        raise UsageError(f"--crops {args.crops}: must be at least 0, at most {MAX_CROPS}")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must be at least 0")
    if not VERSION.fullmatch(args.model_version):
        raise UsageError(f"--model_version {args.model_version!r}: must be of 1 to 64 plain characters without spaces")
    if args.notice is not None and not NOTICE.fullmatch(args.notice):
        raise UsageError(f"--notice {args.notice!r}: must be of 1 to 200 plain characters in one line")
    if args.max_fpr is not None and not 0 < args.max_fpr < 1:
        raise UsageError(f"--max_fpr {args.max_fpr:g}: must be between 0 and 1")
    if args.export_sklearn and Path(args.export_sklearn).resolve() == Path(args.model_output_path).resolve():
        raise UsageError(f"--export_sklearn {args.export_sklearn}: that is the model file's place; name another")
    for path in args.features_file:
        common.need_features(path)
    return args


if __name__ == "__main__":  # --help and wrong flags are answered now, before what takes a second to import
    common.answered(parse_args)

import numpy as np  # noqa: E402

import export  # noqa: E402
import metrics  # noqa: E402
import signing  # noqa: E402
import streaming  # noqa: E402
from classifiers import GRIDS, calibrated, fit, fold_rows, one_thread, out_of_fold, row_weights, search, svc  # noqa: E402
from dataset import COLUMNS  # noqa: E402
from features import crops_of, load_rows  # noqa: E402
from model import FORMAT, choose_band, choose_threshold, decision, probability, save_model  # noqa: E402
from training_rows import Rows, choose_rows, open_files  # noqa: E402

BAND_ERROR = 0.1         # of each class, the share that may lie on the wrong side outside the 'uncertain' band
HELD_OUT_ROWS = 1500     # of the other sources, for each line of the leave-one-source-out table


# ---- one classifier ----

def build(kind, rows, seed):
    """Search, out-of-fold scores once, a sigmoid on them, final fit on all rows -> the classifier's part of the model dict."""
    point = search(kind, rows.features, rows.labels, rows.weight, rows.groups, rows.images, seed)
    scores = out_of_fold(kind, rows.features, rows.labels, rows.weight, fold_rows(rows.labels, rows.groups, seed), seed, **point)
    return calibrated(fit(kind, rows.features, rows.labels, rows.weight, seed, **point), point, scores, rows)


def out_of_fold_probability(model):
    return probability(model, model["out_of_fold"]["scores"].astype(np.float64))


def set_threshold(model, max_fpr):
    """The model with its threshold, the band around it, and the rule that both follow from its out-of-fold scores."""
    p_fake, labels = out_of_fold_probability(model), model["out_of_fold"]["labels"]
    threshold = choose_threshold(p_fake, labels, max_fpr, model["out_of_fold"]["view"])
    copies = ", and at most so many of their degraded copies" if model["out_of_fold"]["view"].any() else ""
    words = "0.5 on the calibrated probability" if max_fpr is None else \
        f"at most {max_fpr:g} of the real training images called fake, out of fold{copies}"
    return {**model, "threshold": threshold, "threshold_rule": {"words": words, "max_fpr": max_fpr, "band_error": BAND_ERROR},
            "band": choose_band(p_fake, labels, threshold, BAND_ERROR)}


def training_data(rows):
    """What the model says of the rows that trained it. `images`: first 64 bits of each image's hash."""
    digest = "".join(f"{s}{label}" for s, label in sorted(zip(rows.columns["sha256"][rows.whole], rows.labels[rows.whole])))
    hashes = sorted({int(s[:16], 16) - 2 ** 63 for s in rows.columns["sha256"]})
    return {"sha256": common.sha256(digest.encode()), "real": int((rows.labels[rows.whole] == 0).sum()),
            "fake": int((rows.labels[rows.whole] == 1).sum()), "views": int(rows.columns["view"].max()),
            "sources": sorted(set(rows.columns["sources"].tolist())), "images": np.array(hashes, np.int64)}


def describe_training(data, encoder, args):
    """What the model file says of where it comes from; `data`: from `training_data`."""
    import sklearn
    return {
        "format": FORMAT, "encoder": dict(encoder),
        "versions": {"model": args.model_version, "code": common.code_commit(), "numpy": np.__version__,
                     "scikit-learn": sklearn.__version__, "svm": svc().__module__.split(".")[0]},
        "training_data": data, "crops": args.crops, **({"notice": args.notice} if args.notice else {})}


def false_alarms(model, rows):
    """Share of real images called fake, out of fold: {'untouched', 'degraded': share with interval}."""
    fake = out_of_fold_probability(model) >= model["threshold"]
    real = rows.labels == 0
    return {name: metrics.share(fake[real & mask], rows.groups[real & mask])
            for name, mask in (("untouched", rows.whole), ("degraded", ~rows.whole)) if (real & mask).any()}


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
        others = others[:HELD_OUT_ROWS // (1 + model["crops"])]
        if len(np.unique(labels[others])) < 2:
            continue
        weight = row_weights(labels[others], sources[others])  # anew: a class that lost a source would count for less
        again = fit(model["classifier"], rows.features[others], labels[others], weight, seed, **model["hyperparameters"])
        p_fake = probability(model, decision(again, rows.features[own]))
        for i, name in enumerate(CLASSES):
            if (labels[own] == i).any():
                right = (p_fake[labels[own] == i] >= model["threshold"]) == i
                found.append({"source": str(source), "label": name, **metrics.share(right, twins[own][labels[own] == i])})
    return sorted(found, key=lambda r: (r["value"], -r["n"]))


def leak(model, columns, train, test, groups):
    """The detector against probes that saw the same training rows and no picture (`probes.detector_minus_leak`)."""
    from probes import detector_minus_leak, probe_scores
    used = [rows[columns["view"][rows] == 0] for rows in (train, test)]
    labels = columns["labels"].astype(int)
    leaks = probe_scores(columns["facts"], columns["thumb"], labels, *used)
    found = detector_minus_leak(p_of(model, columns, used[1]), leaks, labels[used[1]], groups[used[1]])
    return found and found | {"how": "learnt on the training images"}


def audit_labels_of(model, rows):
    """What the out-of-fold probabilities say of the labels (`audit.audit_labels`), untouched images alone."""
    from audit import audit_labels
    by_source = len(set(zip(rows.columns["sources"], rows.groups))) == len(set(rows.columns["sources"]))  # no source in two groups
    return audit_labels(rows.labels[rows.whole], out_of_fold_probability(model)[rows.whole], rows.columns["sources"][rows.whole],
                        rows.columns["paths"][rows.whole], by_source)


def compare(models, rows, columns, test, groups):
    """-> rows {classifier, hyperparameters, out_of_fold, auc, balanced_accuracy} of several kinds on the same folds."""
    whole, found = test[columns["view"][test] == 0], []
    for kind, model in models.items():
        on_test = metrics.measure(columns["labels"][whole].astype(int), p_of(model, columns, whole), model["threshold"], groups[whole])
        found.append({"classifier": kind, "hyperparameters": model["hyperparameters"],
                      "out_of_fold": metrics.auc(rows.labels, model["out_of_fold"]["scores"], rows.groups),
                      "auc": on_test["auc"], "balanced_accuracy": on_test["balanced_accuracy"]})
    return found


def p_of(model, columns, rows):
    return probability(model, decision(model, columns["features"][rows]))


# ---- the command ----

def left_out(columns, used):
    """Splits that neither trained nor tested, with their numbers: '830 external' or ''."""
    splits, n = np.unique(np.delete(columns["splits"], used), return_counts=True)
    return ", ".join(f"{k} {s or 'without split'}" for s, k in zip(splits, n))


def warn_of_few_reals(max_fpr, rows):
    """Warns where the training reals are too few to certify the rate."""
    if max_fpr is None:
        return
    n = int((rows.whole & (rows.labels == 0)).sum())
    if n < 3 / max_fpr:  # the rule of three: with fewer, even no false alarm at all leaves the rate open
        say(f"warning: {n} real training images are too few to certify a rate of {max_fpr:g}: it takes {int(np.ceil(3 / max_fpr))}")


def audit_training(columns, train, test, twins):
    """What `audit.py` finds in the rows as they are used here. -> findings"""
    from audit import audit
    used = np.concatenate([train, test])
    return audit({**{name: columns[name][used] for name in COLUMNS},
                  "splits": np.repeat(["train", "test"], [len(train), len(test)])}, twins[used])


def say_findings(found, before=()):
    """LEAK and note lines on stderr, those of `before` left out. -> the lines"""
    from audit import sentences
    fatal, note = sentences(common.all_printable(found))
    lines = [*(f"LEAK  {line}" for line in fatal), *(f"note  {line}" for line in note)]
    for line in lines:
        if line not in before:
            say(line)
    return lines


def main(argv=None):
    args = parse_args(argv)
    with one_thread(), common.only_writer(args.model_output_path, f"--model_output_path {args.model_output_path}"):
        train_and_report(args)


def train_and_report(args):
    """All of it: rows, audit, classifiers, report, model."""
    common.check_file(args.model_output_path, f"--model_output_path {args.model_output_path}")
    if args.export_sklearn:
        export.need_skops(args.export_sklearn)
        common.check_file(args.export_sklearn, f"--export_sklearn {args.export_sklearn}")
    key = signing.read_key(args.sign, "--sign", "private") if args.sign else None
    files, encoder = open_files(args.features_file, args.crops)
    columns, numbers = load_rows(files, args.max_rows, args.seed)
    train, test, groups, twins, how = choose_rows(columns, args, args.seed)
    streams = numbers is not None and args.classifier == streaming.KIND and all(file.whole is None for file in files)
    if streams and any(crops_of(file.meta) for file in files):
        raise UsageError("--classifier linear-svm takes all rows of a large data set only without crops: extract without --crops, or "
                         "raise --max_rows")
    if numbers is not None:
        how += (f"; {len(numbers)} of {sum(file.distinct.sum() for file in files)} rows, a draw even over class and source"
                + (", and the others train as well" if streams else ""))
    rows, whole = Rows(columns, train, groups, twins), columns["view"] == 0
    copies = f", and {(~whole[train]).sum()} degraded copies" if not whole[train].all() else ""
    say(f"{whole[train].sum()} images to train{copies}, {whole[test].sum()} to test ({how})")
    if rest := left_out(columns, np.concatenate([train, test])):
        say(f"left out: {rest}")
    if args.crops:
        say(f"each verdict will take {1 + args.crops} forward passes: the whole image and {args.crops} crops of it")
    warn_of_few_reals(args.max_fpr, rows)
    found = audit_training(columns, train, test, twins)
    said = say_findings(found)

    if streams:
        part, data = streaming.build(files, numbers, columns, rows, train, test, groups, args.seed)
        parts = {streaming.KIND: part}
    else:
        data = training_data(rows)
        parts = {kind: build(kind, rows, args.seed) for kind in (GRIDS if args.classifier == "all" else [args.classifier])}
    models = {kind: set_threshold(part, args.max_fpr) for kind, part in parts.items()}
    kinds = compare(models, rows, columns, test, groups)
    model = models[max(kinds, key=lambda row: row["out_of_fold"]["value"])["classifier"]]  # never by the test images
    model |= describe_training(data, encoder, args)

    import report
    found["labels"], assessed = audit_labels_of(model, rows), report.assess(model, columns, test, groups, twins)
    found["detector"] = {"on_test": assessed["overall"]["auc"]}
    say_findings(found, said)
    found = {**report.about(model), "split": how, "audit": found, "leak": leak(model, columns, train, test, groups),
             "false_alarms": false_alarms(model, rows), "classifiers": kinds, **assessed,
             "leave_one_source_out": leave_one_source_out(model, rows, args.seed)}
    model["metrics"] = {name: found[name] for name in ("split", "overall", "degraded", "calibration")}
    folder = Path(args.model_output_path).with_suffix("").as_posix() + "_report"
    with report.staged(folder) as place:  # the model and its report land together
        report.fill(place, found)
        save_model(args.model_output_path, model)
        signing.sign(args.model_output_path, key)
        if args.export_sklearn:
            export.write(args.export_sklearn, model, args.seed)
    print(report.training(found))
    print(f"{args.model_output_path} {args.model_version}, report in {folder}/")


if __name__ == "__main__":
    common.run(main)
