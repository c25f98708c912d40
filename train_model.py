"""features.npz -> model.joblib and a report: an RBF SVM, tuned, calibrated and tested.

    python train_model.py --features_file features.npz --model_output_path model.joblib
    python train_model.py --resplit                    # our own split by group, whatever the folders say
    python train_model.py --features_file mine.npz more.npz --train_splits train,extra

Images that look alike stay on one side of every split; with ten sources or more, whole sources do.
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np

import common
from common import CLASSES, UsageError, say
from dataset import COLUMNS, join_columns, load_features

FOLDS = 5
MIN_IMAGES = 20          # of each class, for training
SEARCH_ROWS = 3000       # C and gamma are searched on at most so many rows; the cost grows with their square
C_GRID = (0.3, 1, 3, 10, 30)
GAMMA_GRID = (0.1, 0.3, 1, 3)   # times 1 / number of features, scikit-learn's 'scale' for standardised features
MAX_CLUSTER = 0.05       # share of the data in one cluster of twins (if above 50 images) that stops everything: either the
                         # data are copies of a few pictures, or something chains them, and groups mean nothing
POOL = ("train", "val", "test", "")  # what --resplit divides anew; external, extra and seen images stay out of it


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=common.Help)
    parser.add_argument("--features_file", nargs="+", default=["features.npz"], metavar="FILE",
                        help="from extract_features.py (default: features.npz); several must be of one encoder")
    parser.add_argument("--model_output_path", default="model.joblib", metavar="FILE", help="model to write")
    parser.add_argument("--train_splits", default="train", metavar="A,B", help="splits to train on")
    parser.add_argument("--resplit", action="store_true", help="split by group here, whatever the folders say")
    parser.add_argument("--model_version", default="v0.0.0-dev", metavar="V", help="version stored in the model")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of splits and folds")
    return parser.parse_args(argv)


# ---- rows ----

def load_columns(paths):
    """Features files -> their joined columns and the encoder's entry. Raises UsageError on NaNs and mixed encoders."""
    files = [load_features(path) for path in paths]
    for path, file in zip(paths, files):
        if "encoder" not in file["meta"]:
            raise UsageError(f"{path} does not say which encoder made it: extract again")
    encoders = [file["meta"]["encoder"] for file in files]
    for path, encoder in zip(paths, encoders):
        if encoder["identity"] != encoders[0]["identity"]:
            raise UsageError(f"{paths[0]} was made by '{encoders[0]['name']}' ({encoders[0]['identity'][:12]}), {path} by "
                             f"'{encoder['name']}' ({encoder['identity'][:12]}): extract both with one encoder")
    columns = join_columns(files)
    bad = ~np.isfinite(columns["features"]).all(axis=1)
    if bad.any():
        raise UsageError(f"{bad.sum()} rows hold NaN or infinite features (first: {columns['paths'][bad][0]}); extract again")
    return columns, encoders[0]


def make_groups(columns):
    """Group number of each row, int [n]: twins share one; with 10 sources or more (5 of each class), sources do.

    Images without a source are grouped as twins alone. -> (groups, what they are, in words). Raises UsageError where
    one picture is more than MAX_CLUSTER of the data.
    """
    from audit import merge, twin_clusters
    cluster = twin_clusters(columns["thumb"], columns["sha256"])
    largest = int(np.bincount(cluster).argmax())
    n = int((cluster == largest).sum())
    if n > max(50, MAX_CLUSTER * len(cluster)):
        raise UsageError(f"{n} of {len(cluster)} images look like one and the same picture "
                         f"({', '.join(columns['paths'][cluster == largest][:3])}, ...): remove the copies, then extract again")
    sources = columns["sources"]
    named = np.flatnonzero(sources != "")
    of_class = [len(np.unique(sources[named][columns["labels"][named] == label])) for label in (0, 1)]
    if len(np.unique(sources[named])) < 10 or min(of_class) < FOLDS:
        return cluster, "near-identical images"
    first = {sources[i]: i for i in named[::-1]}
    return merge(cluster, np.array([(i, first[sources[i]]) for i in named])), "sources"


def choose_rows(columns, args, seed):
    """-> (train row numbers, test row numbers, groups of all rows, words on how they were chosen)."""
    labelled = columns["labels"] >= 0
    splits, wanted = columns["splits"], args.train_splits.split(",")
    missing = sorted(set(wanted) - set(splits[labelled]))
    if missing and args.train_splits != "train":  # without a split called so the default means our own
        raise UsageError(f"--train_splits {args.train_splits}: no labelled images in '{missing[0]}' "
                         f"(splits there: {', '.join(filter(None, sorted(set(splits[labelled])))) or 'none'})")
    in_train = labelled & np.isin(splits, wanted)
    in_test = labelled & (splits == "test")
    own = args.resplit or not in_train.any() or not in_test.any() or "test" in wanted
    pool = labelled & (np.isin(splits, (*POOL, *wanted)) if args.resplit or not in_train.any() else in_train)
    check_classes(columns, pool if own else in_train, "to train on")
    used = np.flatnonzero(pool if own else in_train | in_test)  # others' sources must not count
    groups = np.full(len(labelled), -1)
    groups[used], kind = make_groups({name: columns[name][used] for name in COLUMNS})
    if not own:
        return np.flatnonzero(in_train), np.flatnonzero(in_test), groups, f"the folders' split; folds by {kind}"
    rows = np.flatnonzero(pool)
    train, test = fold_rows(columns["labels"][rows], groups[rows], seed)[0]
    return rows[train], rows[test], groups, f"our own split by {kind}, a fifth for testing; folds the same way"


def check_classes(columns, rows, what):
    for label, name in enumerate(CLASSES):
        n = int((columns["labels"][rows] == label).sum())
        if n < MIN_IMAGES:
            raise UsageError(f"{n} {name} images {what}; at least {MIN_IMAGES} are needed "
                             f"(splits there: {', '.join(sorted(set(columns['splits']))) or 'none'}; see --train_splits)")


def fold_rows(labels, groups, seed):
    """List of FOLDS (train, test) row numbers, stratified by label, no group on both sides. Raises UsageError."""
    from sklearn.model_selection import StratifiedGroupKFold
    number = [len(np.unique(groups[labels == label])) for label in (0, 1)]
    if min(number) < FOLDS:
        raise UsageError(f"only {min(number)} groups of {CLASSES[int(np.argmin(number))]} images for {FOLDS} folds: "
                         "add images of other sources, or ones that are no copies")
    return list(StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels, groups))


# ---- fitting ----

def balanced_weights(labels):
    """Weight of each row, mean 1, the same sum for both classes: probabilities then hold at equal shares."""
    return (len(labels) / (2 * np.bincount(labels, minlength=2)))[labels]


def fit_svm(features, labels, C, gamma):
    """-> fitted scikit-learn pipeline of StandardScaler and SVC."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC
    svm = make_pipeline(StandardScaler(), SVC(C=C, gamma=gamma, cache_size=1000))
    return svm.fit(features, labels, svc__sample_weight=balanced_weights(labels))


def out_of_fold(features, labels, folds, C, gamma):
    """Decision value of each row by an SVM that has not seen its group, float64 [n]."""
    scores = np.empty(len(labels))
    for train, test in folds:
        scores[test] = fit_svm(features[train], labels[train], C, gamma).decision_function(features[test])
    return scores


def search_rows(labels, seed):
    """At most SEARCH_ROWS row numbers: of the smaller class as many as there are, up to half."""
    order = np.random.default_rng(seed).permutation(len(labels))
    of_class = [order[labels[order] == label] for label in (0, 1)]
    small = min(len(of_class[0]), len(of_class[1]), SEARCH_ROWS // 2)
    return np.sort(np.concatenate([rows[:SEARCH_ROWS - small] if len(rows) > small else rows for rows in of_class]))


def search(features, labels, groups, seed):
    """C and gamma with the best out-of-fold AUC on at most SEARCH_ROWS rows. -> (C, gamma)"""
    from audit import auc
    from tqdm import tqdm
    rows = search_rows(labels, seed)
    features, labels, groups = features[rows], labels[rows], groups[rows]
    folds = fold_rows(labels, groups, seed + 1)  # not the folds that calibrate: there the chosen point looks too good
    grid = [(C, g / features.shape[1]) for C in C_GRID for g in GAMMA_GRID]
    scores = {point: auc(out_of_fold(features, labels, folds, *point), labels) for point in tqdm(grid, desc="C, gamma")}
    return max(grid, key=scores.get)


def fit_sigmoid(scores, labels):
    """Platt's sigmoid with his smoothed targets, classes weighted equal: P(fake) = 1 / (1 + exp(a score + b)).

    The same as CalibratedClassifierCV(method='sigmoid', ensemble=False) on these scores. -> float64 [a, b]
    """
    from scipy.optimize import minimize
    weight = balanced_weights(labels)
    n_real, n_fake = (weight[labels == label].sum() for label in (0, 1))
    target = np.where(labels == 1, (n_fake + 1) / (n_fake + 2), 1 / (n_real + 2))

    def loss(ab):
        z = ab[0] * scores + ab[1]
        p = 0.5 * (1 - np.tanh(0.5 * z))
        slope = weight * (target - p)
        return (weight * (np.logaddexp(0, z) - (1 - target) * z)).sum(), np.array([slope @ scores, slope.sum()])
    return minimize(loss, [-1.0, 0.0], jac=True, method="L-BFGS-B", options={"gtol": 1e-6, "ftol": 64 * np.finfo(float).eps}).x


def build_model(columns, train, groups, encoder, args):
    """Search, out-of-fold scores once, sigmoid on them, final fit on all training rows -> the model dict."""
    features, labels = columns["features"][train], columns["labels"][train].astype(int)
    C, gamma = search(features, labels, groups[train], args.seed)
    folds = fold_rows(labels, groups[train], args.seed)
    scores = out_of_fold(features, labels, folds, C, gamma)
    scaler, svc = (step for _, step in fit_svm(features, labels, C, gamma).steps)
    digest = "".join(f"{s}{label}" for s, label in sorted(zip(columns["sha256"][train], labels)))
    return {
        "format": 1, "classifier": "svm", "C": C, "gamma": float(gamma),
        "center": scaler.mean_, "scale": scaler.scale_, "support_vectors": svc.support_vectors_.astype(np.float32),
        "dual_coef": svc.dual_coef_[0], "intercept": float(svc.intercept_[0]),
        "calibrator": fit_sigmoid(scores, labels), "threshold": 0.5,
        "threshold_rule": "0.5 on the calibrated probability", "encoder": dict(encoder),
        "versions": {"model": args.model_version, "code": common.code_commit(), **package_versions()},
        "training_data": {"sha256": common.sha256(digest.encode()), "real": int((labels == 0).sum()),
                          "fake": int((labels == 1).sum())},
        "out_of_fold": {"scores": scores.astype(np.float32), "labels": labels.astype(np.int8)},
    }


def package_versions():
    import sklearn
    return {"numpy": np.__version__, "scikit-learn": sklearn.__version__}


def evaluate_rows(model, columns, rows, groups):
    """Metrics on the test rows, per source too, and the scores that the plots are drawn from."""
    from model import decision, probability
    from report import by_source, measure
    labels = columns["labels"][rows].astype(int)
    p_fake = probability(model, decision(model, columns["features"][rows]))
    return {"test": measure(labels, p_fake, model["threshold"], groups[rows]),
            "by_source": by_source(labels, p_fake, model["threshold"], columns["sources"][rows]),
            "scores": {"labels": labels.tolist(), "p_fake": p_fake.round(6).tolist()}}


def check_output(path):
    """An unwritable place is told before the training, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"--model_output_path {path}: cannot be written ({error.strerror}); name another place") from None
    if path.is_dir():
        raise UsageError(f"--model_output_path {path} is a folder; name a file in it")


def left_out(columns, used):
    """Splits that neither trained nor tested, with their numbers: '415 external, 634 seen' or ''."""
    splits, n = np.unique(np.delete(columns["splits"], used), return_counts=True)
    return ", ".join(f"{k} {s or 'without split'}" for s, k in zip(splits, n))


def main(argv=None):
    args = parse_args(argv)
    check_output(Path(args.model_output_path))
    columns, encoder = load_columns(args.features_file)
    train, test, groups, how = choose_rows(columns, args, args.seed)
    say(f"{len(train)} images to train, {len(test)} to test ({how})")
    if rest := left_out(columns, np.concatenate([train, test])):
        say(f"left out: {rest}")

    from audit import audit, sentences
    used = np.concatenate([train, test])
    actual = np.repeat(["train", "test"], [len(train), len(test)])
    found = audit({**{name: columns[name][used] for name in COLUMNS}, "splits": actual})
    fatal, note = sentences(found)
    for line in [*(f"LEAK  {line}" for line in fatal), *(f"note  {line}" for line in note)]:
        say(line)
    model = build_model(columns, train, groups, encoder, args)
    if notice := encoder.get("notice"):
        say(f"note: {notice}")
    metrics = {"encoder": encoder["name"], "notice": notice, "model_version": args.model_version, "split": how, "C": model["C"],
               "gamma": model["gamma"], "training_data": model["training_data"],
               **evaluate_rows(model, columns, test, groups), "audit": found}
    model["metrics"] = {name: metrics[name] for name in ("encoder", "split", "test")}

    from model import save_model
    from report import table, write_report
    save_model(args.model_output_path, model)
    folder = write_report(Path(args.model_output_path).with_suffix("").as_posix() + "_report", metrics)
    print(f"SVM, C {model['C']:g}, gamma {model['gamma']:.3g}, {len(model['dual_coef'])} support vectors, on '{encoder['name']}'\n"
          f"{table(metrics['test'])}\n{args.model_output_path} {args.model_version}, report in {folder}/")


if __name__ == "__main__":
    common.run(main)
