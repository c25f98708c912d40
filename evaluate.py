"""A model on labelled images it has not seen: metrics with intervals, robustness, what files betray. Fits and tunes nothing.

    python evaluate.py --model_path model.joblib --data_dir data --report_dir evaluation
    python evaluate.py --model_path model.joblib --features_file features.npz
    python evaluate.py --features_file features.npz --data_dir data     # stored features, pictures for what needs them
    python evaluate.py --data_dir golden --baseline golden_before/metrics.json     # exit code 1: something got worse
    kubectl logs deploy/detector | python evaluate.py --feedback -     # what users said of the service's verdicts

Images that trained the model or its encoder are left out, by their hashes. Tables that need pictures are left out of an
evaluation of a features file, and named.
"""
import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
from common import CLASSES, UsageError, say


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=common.Help)
    parser.add_argument("--model_path", metavar="FILE",
                        help="from train_model.py (default: model.joblib where there is one, else the shipped baseline)")
    parser.add_argument("--data_dir", metavar="DIR", help="folder of labelled images")
    parser.add_argument("--features_file", metavar="FILE",
                        help="features of the model's encoder: nothing is encoded again; with --data_dir, the folder they are of")
    parser.add_argument("--report_dir", default="evaluation", metavar="DIR", help="folder to write the report to")
    parser.add_argument("--baseline", metavar="FILE", help="metrics.json of an earlier evaluation of the same images: what got worse?")
    parser.add_argument("--feedback", nargs="+", metavar="LOG", help="logs of the service, - for stdin: how right it is in production")
    parser.add_argument("--robustness_images", type=int, default=1000, metavar="N",
                        help="at most so many images go through the distortions (a seeded draw)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to encode")
    args = parser.parse_args(argv)
    if args.robustness_images < 1:
        raise UsageError(f"--robustness_images {args.robustness_images}: must be at least 1")
    if args.feedback:
        return args
    if not (args.data_dir or args.features_file):
        raise UsageError("nothing to evaluate on: name --data_dir, --features_file or both")
    if args.data_dir:
        common.need_folder(args.data_dir)
    if args.features_file:
        common.need_features(args.features_file)
    return args


if __name__ == "__main__":  # --help and wrong flags are answered now, before what takes a second to import
    common.answered(parse_args)

import numpy as np  # noqa: E402

import feedback  # noqa: E402
import imaging  # noqa: E402
import metrics  # noqa: E402
import report  # noqa: E402
from classify import Detector, choose_model  # noqa: E402
from dataset import COLUMNS, SEEN, distinct, draw_evenly, join_columns, list_images, without_repeats  # noqa: E402
from distort import ARMS, CONDITIONS, manageable  # noqa: E402
from extract_features import encode_ahead, join_parts, labels_of  # noqa: E402
from facts import make_groups, twin_clusters  # noqa: E402
from features import take_crops  # noqa: E402
from model import decision, load_model, probability, stale_threshold  # noqa: E402
from training_rows import open_files  # noqa: E402

BATCH = 16
SHOWN = 12  # hardest images of each class
PICTURES = ("robustness under re-saving, shrinking, blur, noise and crops", "files made alike", "hardest images")


# ---- images ----

def encode_folder(detector, data_dir):
    """Folder -> (columns as in a features file, number of files that cannot be read; each of those is told)."""
    from tqdm import tqdm
    entries, parts = list_images(data_dir), []
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(entries), desc="encoding", unit="image") as progress:
        for part in encode_ahead(data_dir, entries, detector.encoder, BATCH, pool, common.MAX_PIXELS, crops=detector.crops):
            parts.append(part)
            progress.update(min(BATCH, len(entries) - progress.n))
    columns, bad = join_parts(parts)
    columns["features"] = take_crops(columns["features"], detector.crops, detector.crops)
    for path, why, _ in bad:
        say(f"left out {common.printable(path)}: {why}")
    return columns | labels_of(columns, entries, detector.encoder), sum(is_image for _, _, is_image in bad)


def stored_columns(path, model, data_dir):
    """Columns of a features file, checked to be of the model's encoder and (where a folder is named) of that folder."""
    (file,), encoder = open_files([path], model.get("crops", 0))
    columns = join_columns(list(file.parts()))
    if encoder["identity"] != model["encoder"]["identity"]:
        raise UsageError(f"{path} is of encoder '{encoder['name']}' ({encoder['identity'][:12]}), the model "
                         f"needs '{model['encoder']['name']}' ({model['encoder']['identity'][:12]}): extract with that one")
    missing = [name for name in columns["paths"] if data_dir and not Path(data_dir, name).is_file()]
    if missing:
        raise UsageError(f"--data_dir {data_dir}: '{missing[0]}' of {path} is not there; name the folder that was extracted, or "
                         f"where files were removed since, remove {path} and extract again")
    return columns


def split_rows(columns, model, seen):
    """Labelled images that trained neither the model nor (`seen`: hashes' first 16 digits) its encoder: those to evaluate.

    -> (their row numbers, row numbers of those left out). Raises UsageError where none is left.
    """
    trained = {f"{int(number) + 2 ** 63:016x}" for number in model["training_data"]["images"]}
    own = np.array([digest[:16] in trained for digest in columns["sha256"]], bool)
    by_encoder = np.isin([digest[:16] for digest in columns["sha256"]], seen) | (columns["splits"] == SEEN)
    labelled = columns["labels"] >= 0
    whole = columns["view"] == 0
    for mask, why in ((own, "trained the model"), (by_encoder & ~own, "trained its encoder")):
        if n := int((mask & labelled & whole).sum()):
            say(f"left out: {n} images that {why}")
    keep = distinct(columns, np.flatnonzero(labelled & ~own & ~by_encoder))
    if not len(keep):
        raise UsageError("no labelled image is left that trained neither the model nor its encoder: name other images")
    return keep, np.flatnonzero(labelled & (own | by_encoder))


# ---- what needs pictures ----

def read_picture(data_dir, path, sha256):
    """The picture of a row, decoded; UsageError where its file is no longer the one that was encoded."""
    data = common.read_bytes(Path(data_dir, path))
    if common.sha256(data) != sha256:
        raise UsageError(f"--data_dir {data_dir}: '{path}' is not the file that was encoded; extract again")
    return imaging.decode_image(data)


def changed(detector, data_dir, columns, changes):
    """Probability of fake of each image under each change, float64 [images, 1 + changes], untouched first; `changes`: (for
    reals, for fakes)."""
    from tqdm import tqdm
    paths, labels = columns["paths"], columns["labels"]

    def pixels(i):
        image = read_picture(data_dir, paths[i], columns["sha256"][i])
        base = manageable(image)
        return np.stack([detector.pixels(image), *(detector.pixels(change[labels[i]](base)) for change in changes)])
    found = np.empty((len(paths), 1 + len(changes)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = [pool.submit(pixels, i) for i in range(min(2, len(paths)))]
        for i in tqdm(range(len(paths)), desc="distorting", unit="image"):
            rows = ahead.pop(0).result()
            if i + 2 < len(paths):
                ahead.append(pool.submit(pixels, i + 2))
            found[i] = np.concatenate([detector.p_fake(rows[k:k + BATCH]) for k in range(0, len(rows), BATCH)])
    return found


def condition(panel, level, labels, p_fake, untouched, threshold, groups, known):
    """One row of the tables of distortions and arms; `flipped` is None for the untouched images themselves."""
    fake, flips = p_fake >= threshold, (p_fake >= threshold) != (untouched >= threshold)

    def right(mask):
        return [metrics.share(fake[mask & (labels == i)] == i, groups[mask & (labels == i)]) for i in (0, 1)]
    real, generated = right(np.ones(len(labels), bool))
    return {"panel": panel, "level": level, "n": len(labels), "accuracy_real": real, "accuracy_fake": generated,
            "balanced_accuracy": metrics.of_both(real, generated), "auc": metrics.auc(labels, p_fake, groups),
            "known": metrics.of_both(*right(known)), "unseen": metrics.of_both(*right(~known)),
            "flipped": None if p_fake is untouched else metrics.share(flips, groups)}


def distorted(detector, data_dir, columns, groups, most):
    """-> {robustness, arms}: rows of `condition`, the untouched images first in both."""
    rows = draw_evenly(list(zip(columns["labels"].tolist(), columns["sources"].tolist())), most)
    labels, threshold = columns["labels"][rows].astype(int), detector.model["threshold"]
    changes = [(change, change) for _, _, change in CONDITIONS] + [arm[1:] for arm in ARMS]
    p_fake = changed(detector, data_dir, {name: columns[name][rows] for name in ("paths", "labels", "sha256")}, changes)
    untouched, known = p_fake[:, 0], report.known_rows(detector.model, columns["sources"][rows])
    names = [("untouched", ""), *((panel, level) for panel, level, _ in CONDITIONS)]
    arms = [0, *range(len(names), p_fake.shape[1])]

    def table(names, chosen):
        return [condition(*name, labels, p_fake[:, k] if k else untouched, untouched, threshold, groups[rows], known)
                for name, k in zip(names, chosen)]
    return {"robustness": table(names, range(len(names))),
            "arms": table([("files", "as they are"), *(("files", name) for name, _, _ in ARMS)], arms)}


def hardest(columns, p_fake, threshold):
    """The most confidently wrong of each class -> list of {path, label, p_fake}."""
    labels, found = columns["labels"], []
    for label, sign in ((0, -1), (1, 1)):
        rows = np.flatnonzero((labels == label) & ((p_fake >= threshold) != label))
        found += [{"path": str(columns["paths"][i]), "label": CLASSES[label], "p_fake": round(float(p_fake[i]), 4)}
                  for i in rows[np.argsort(sign * p_fake[rows], kind="stable")][:SHOWN]]
    return found


def contact_sheet(data_dir, columns, found, path, side=150):
    """PNG of the hardest images, reals above, fakes below, each under its probability of fake; none where there are none."""
    from PIL import Image, ImageDraw
    if not found:
        return
    of_class = [[h for h in found if h["label"] == name] for name in CLASSES]
    sheet = Image.new("RGB", (max(map(len, of_class)) * side, 2 * (side + 14)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, images in enumerate(of_class):
        for column, h in enumerate(images):
            picture = read_picture(data_dir, h["path"], columns["sha256"][columns["paths"] == h["path"]][0])
            picture.thumbnail((side - 4, side - 4))
            sheet.paste(picture, (column * side + 2, row * (side + 14) + 13))
            pen.text((column * side + 2, row * (side + 14)), f"{h['label']}, {h['p_fake']:.3f}", fill="black")
    with common.atomic_write(path) as file:
        sheet.save(file, "PNG")


# ---- the report ----

def cross_validated_leak(columns, p_fake, groups):
    """The detector against probes cross-validated on these images (`probes.detector_minus_leak`), or None."""
    from probes import MIN_IMAGES, boosted, cross_validated, detector_minus_leak, probes_of
    labels = columns["labels"].astype(int)
    if min(np.bincount(labels, minlength=2)) < MIN_IMAGES:
        return None
    leaks = {what: cross_validated(boosted, values, labels, groups) for what, values in probes_of(columns["facts"], columns["thumb"])[-2:]}
    if any(p is None for p in leaks.values()):
        return None
    return detector_minus_leak(p_fake, leaks, labels, groups) | {"how": "cross-validated on these images"}


def assess_all(model, columns, rows, left_out):
    """Everything that scores alone give on those rows, what the files betray (of the images left out, too: a test image may
    have a twin among them), and what is wrong with the model itself."""
    from audit import audit
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
    p_fake = probability(model, decision(model, first["features"]))
    warnings = [stale_threshold(model), report.calibration_warning(found["calibration"])]
    return first, groups[whole], p_fake, {
        **report.about(model), **found, "audit": betrayed, "leak": cross_validated_leak(first, p_fake, groups[whole]),
        "data": {"groups": kind, **{part: digest(columns, mask) for part, mask in report.parts_of(model, columns).items()}},
        "warnings": [line for line in warnings if line]}


def digest(columns, mask):
    """Hash of those images, views and labels, in whatever order: two metrics are compared only where it is the same."""
    rows = zip(*(columns[name][mask] for name in ("sha256", "view", "labels")))
    return common.sha256("".join(sorted(f"{s} {view} {label} " for s, view, label in rows)).encode())


def compare(now, before):
    """Two reports of the same images -> rows (part, words, now, recorded interval, 'better' | 'worse') that left their interval.

    Parts that hold other images (a model may know other sources) are passed over. Raises UsageError where all do.
    """
    parts = [part for part in ("overall", "known", "unseen", "degraded")
             if now[part] and before[part] and now["data"][part] == before["data"].get(part)]
    if not parts:
        raise UsageError("--baseline is of other images; images that trained one of the two models count for neither: compare "
                         "on a folder that trained none")
    try:
        return [(part, *row[1:]) for part in parts for row in metrics.left_interval(now[part], before[part])]
    except (TypeError, AttributeError, LookupError):
        raise UsageError("--baseline is damaged: its metrics are not what evaluate.py writes") from None


def changes_table(rows):
    lines = [f"{'':10}{'metric':22}{'now':>7}  recorded interval"]
    return "\n".join([*lines, *(f"{part:10}{words:22}{value:z7.3f}  {ends[0]:z.3f} .. {ends[1]:z.3f}  {verdict}"
                                for part, words, value, ends, verdict in rows)])


def read_baseline(path, report_dir):
    """The parts of an earlier metrics.json that are compared. Raises UsageError."""
    if Path(path).resolve() == Path(report_dir, "metrics.json").resolve():
        raise UsageError(f"--baseline {path} would be overwritten by this report: copy it, or name another --report_dir")
    try:
        found = json.loads(common.read_bytes(path))
        return {"data": dict(found["data"]), **{name: found[name] for name in ("overall", "known", "unseen", "degraded")}}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--baseline {path} is not a metrics.json of evaluate.py: name one from its report folder") from None


def main(argv=None):
    args = parse_args(argv)
    if args.feedback:
        return feedback.main(args)
    common.check_folder(args.report_dir, f"--report_dir {args.report_dir}")
    before = read_baseline(args.baseline, args.report_dir) if args.baseline else None
    model_path, bad = choose_model(args.model_path), 0
    detector = Detector(model_path, args.device) if args.data_dir else None
    model, seen = (detector.model, detector.encoder.manifest.get("seen", [])) if detector else (load_model(model_path), [])
    if args.features_file:
        columns = stored_columns(args.features_file, model, args.data_dir)
    else:
        columns, bad = encode_folder(detector, args.data_dir)
    columns = without_repeats(columns)
    first, groups, p_fake, found = assess_all(model, columns, *split_rows(columns, model, seen))
    rows = None if before is None else compare(found, before)
    folder = Path(args.report_dir)
    with report.staged(folder) as place:
        if args.data_dir:
            found |= distorted(detector, args.data_dir, first, groups, args.robustness_images)
            found["hardest"] = hardest(first, p_fake, model["threshold"])
            contact_sheet(args.data_dir, first, found["hardest"], place / "hardest.png")
        else:
            found["not_measured"] = list(PICTURES)
        report.fill(place, found)
    print(report.evaluation(found))
    print(f"report in {folder}/")
    if rows is None:
        return 1 if bad else 0
    print(changes_table(rows) if rows else f"every metric lies in the interval that {args.baseline} records")
    worse = [f"{words} ({part})" for part, words, _, _, verdict in rows if verdict == "worse"]
    if worse:
        say(f"worse than the baseline: {', '.join(worse)}")
    return 1 if worse or bad else 0


if __name__ == "__main__":
    common.run(main)
