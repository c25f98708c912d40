"""train_model.py as users run it: its files, its output and its errors."""

import json
import pickle
import re
import subprocess
import time
from unittest.mock import Mock

import numpy as np
import pytest
from commands import ROOT, assert_one_line_error
from made_up import ENCODER, build, make_columns, training_rows, with_views, write_features
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_info, threadpool_limits

import train_model
from detector.base.errors import UsageError
from detector.evaluation.intervals import words
from detector.evaluation.plots import PLOTS
from detector.evaluation.report import NAMES
from detector.model.file import load_model
from detector.model.score import p_fake_of, probability
from detector.model.threshold import stale_threshold
from detector.training import classifiers, recipe, rows
from detector.training.classifiers import GRIDS


def row_of(metric):
    """A metric's value, interval and number of images, as the tables print them."""
    low, high = metric["interval"]
    return f"{metric['value']:.3f}  {low:.3f} .. {high:.3f}  {metric['n']}"


def counts(model, *names):
    return tuple(model["training_data"][name] for name in names)


# ---- outputs ----


def test_the_command_writes_model_and_report_and_prints_each_metric(command, tmp_path):
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    known = subprocess.run(git, capture_output=True, text=True)
    commit = known.stdout.strip() if known.returncode == 0 else "4a5b6c"
    result = command("--model_version", "v1.2.0", CODE_COMMIT="4a5b6c")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out_report"
    names = {path.name for path in folder.iterdir()}
    assert {"metrics.json", "report.html", "MODEL_CARD.md", "overall.csv"} < names
    assert {"confusion_matrix.png", "roc.png", "calibration.png"} <= names
    assert {name for name in names if name.endswith(".png")} <= {f"{name}.png" for name in PLOTS}

    overall = json.loads((folder / "metrics.json").read_text())["overall"]
    model = load_model(tmp_path / "out.joblib")
    words = ["v1.2.0", str(tmp_path / "out.joblib"), str(folder), "'made-up'", "svm"]
    words += [f"C {model['hyperparameters']['C']:g}", "threshold 0.500"]
    words += [row_of(overall[name]) for name in ("accuracy", "precision_real", "precision_fake")]
    words += [row_of(overall[name]) for name in NAMES]
    assert [word for word in words if word not in result.stdout] == []
    assert "80 images to train, 40 to test" in result.stderr and "Traceback" not in result.stderr

    assert model["versions"]["model"] == "v1.2.0"
    assert model["versions"]["code"].removesuffix("-dirty") == commit
    assert model["encoder"] == ENCODER and counts(model, "real", "fake") == (40, 40)
    assert re.fullmatch("[0-9a-f]{64}", model["training_data"]["sha256"])
    assert model["metrics"]["overall"] == overall


@pytest.mark.parametrize("kind", GRIDS)
def test_every_kind_is_byte_for_byte_the_same_at_another_time(monkeypatch, kind):
    columns = with_views(make_columns(gap=1), 1)
    first = build(columns, kind)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: 4_000_000_000)
    assert pickle.dumps(build(columns, kind)) == pickle.dumps(first)
    versions = {"model", "code", "numpy", "scikit-learn", "svm"}  # no clock
    assert set(first["versions"]) == versions


def test_training_takes_one_thread(tmp_path, monkeypatch):
    seen = []

    def look(args):
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        raise UsageError("enough seen")

    monkeypatch.setattr(rows, "read_data", look)
    features = write_features(tmp_path / "f.npz")
    with threadpool_limits(2), pytest.raises(UsageError, match="enough seen"):
        train_model.main(
            ["--features_file", str(features), "--model_output_path", str(tmp_path / "m.joblib")]
        )
    assert len(seen) > 1 and set(seen) == {1}


def test_the_files_are_held_against_the_detector_on_the_test_images(train, quick):
    report = train(make_columns())[1]
    assert report["audit"]["detector"] == {"on_test": report["overall"]["auc"]}


def test_the_same_seed_and_features_give_the_same_bytes(train):
    columns = with_views(make_columns(gap=1), 1)
    first = train(columns, name="a")[0]
    assert train(columns, name="b")[0]["sha256"] == first["sha256"]
    other = train(columns, name="c", seed=1)[0]  # has other folds
    assert not np.array_equal(other["out_of_fold"]["scores"], first["out_of_fold"]["scores"])


def with_first(columns, name, split, value):
    """The columns with another value in the first row of the split."""
    column = columns[name].copy()
    column[np.flatnonzero(columns["splits"] == split)[0]] = value
    return columns | {name: column}


def take(columns, rows):
    return {name: column[rows] for name, column in columns.items()}


@pytest.mark.parametrize(
    "change, differs",
    [
        (lambda columns: with_first(columns, "labels", "train", 1), True),
        (lambda columns: with_first(columns, "sha256", "train", "0" * 64), True),
        (lambda columns: take(columns, slice(1, None)), True),
        (lambda columns: with_first(columns, "sha256", "test", "0" * 64), False),
        (lambda columns: take(columns, slice(None, None, -1)), False),
        (lambda columns: with_views(columns, 2), False),
    ],
    ids=["label", "bytes", "removed image", "test image", "order", "copies"],
)
def test_the_hash_of_the_training_data_depends_on_these_data_alone(change, differs):
    def digest(columns):
        rows = training_rows(take(columns, columns["splits"] == "train"))
        return recipe.training_data(rows)["sha256"]

    columns = make_columns()
    assert (digest(change(columns)) != digest(columns)) == differs


def test_several_features_files_are_joined(train):
    more = make_columns(seed=1, splits=False) | {"splits": np.full(120, "train")}
    model, content, _, log = train(make_columns(), more)
    assert counts(model, "real") == (40 + 60,) and content["overall"]["n"] == 40
    assert "200 images to train, 40 to test" in log


def test_a_test_split_of_a_single_class_has_no_auc(train):
    columns = make_columns()
    keep = (columns["splits"] == "train") | (columns["labels"] == 0)
    _, content, printed, _ = train(take(columns, keep))
    assert content["overall"]["auc"] == {"value": None, "interval": None, "n": 20}
    assert content["overall"]["accuracy_real"]["n"] == 20 and "n/a" in printed


# ---- copies ----


def test_degraded_copies_train_and_are_reported_apart(train, quick):
    columns = with_views(make_columns(gap=1.5), 3, noise=2)
    model, content, printed, log = train(columns)
    assert "80 images to train, and 240 degraded copies, 40 to test" in log
    assert counts(model, "real", "fake", "views") == (40, 40, 3)
    assert np.bincount(model["out_of_fold"]["view"]).tolist() == [80] * 4
    assert len(model["training_data"]["images"]) == 80

    test, whole = columns["splits"] == "test", columns["view"] == 0
    right = (p_fake_of(model, columns["features"]) >= 0.5) == columns["labels"]
    for part, mask, n in (("overall", test & whole, 40), ("degraded", test & ~whole, 120)):
        accuracy = content[part]["accuracy"]
        assert (accuracy["value"], accuracy["n"]) == (pytest.approx(right[mask].mean()), n)
        assert row_of(accuracy) in printed and model["metrics"][part] == content[part]
    assert right[test & whole].mean() != right[test & ~whole].mean()
    assert "on 120 degraded copies of the test images:" in printed
    for images in ("40 real training images", "120 degraded copies of them"):
        assert re.search(rf"(?m)called fake, out of fold: 0\.\d+ \[.*\] of {images}$", printed)


def test_without_copies_the_output_does_not_mention_them(train, quick):
    _, content, printed, log = train(make_columns())
    assert content["degraded"] is None and "degraded" not in printed + log


# ---- a rate of false positives ----


@pytest.mark.parametrize("views", [0, 2])
def test_the_rate_of_the_threshold_is_printed_and_at_most_max_fpr(train, quick, views):
    columns = with_views(make_columns(real=150, fake=150, gap=1), views, noise=1)
    model, content, printed, _ = train(columns, max_fpr=0.1)
    stored, rates = model["out_of_fold"], content["false_alarms"]
    fake = probability(model, stored["scores"].astype(float)) >= model["threshold"]
    masks = {"untouched": stored["view"] == 0, "degraded": stored["view"] > 0}
    assert list(rates) == (["untouched", "degraded"] if views else ["untouched"])
    for name, rate in rates.items():
        mask = masks[name] & (stored["labels"] == 0)
        assert (rate["value"], rate["n"]) == (pytest.approx(fake[mask].mean()), mask.sum())
        assert f"called fake, out of fold: {rate['value']:.3f} [" in printed
        assert rate["value"] <= 0.1  # untouched images and copies each on their own
    assert max(rate["value"] for rate in rates.values()) > 0.05
    copies = ", and at most so many of their degraded copies" if views else ""
    assert (
        f"threshold {model['threshold']:.3f} (at most 0.1 of the real training images called fake,"
        f" out of fold{copies})" in printed
    )
    assert model["threshold_rule"]["max_fpr"] == 0.1 and stale_threshold(model) is None


@pytest.mark.parametrize("views", [0, 1])
def test_a_warning_says_that_the_interval_ends_above_max_fpr(train, quick, views):
    columns = with_views(make_columns(real=150, fake=150, gap=1), views, noise=1)
    _, content, printed, _ = train(columns, max_fpr=0.1)
    names = ["untouched", "degraded"][: 1 + views]
    assert len(content["warnings"]) == len(names)
    for name, line in zip(names, content["warnings"], strict=True):
        rate = content["false_alarms"][name]
        assert f"WARNING  {line}\n" in printed
        assert line.startswith(f"{words(rate, 3)} of the {name} real training images")
        assert rate["interval"][1] > 0.1


def test_a_rate_whose_interval_ends_below_max_fpr_comes_without_a_warning():
    content = {
        "threshold_rule": {"max_fpr": 0.05},
        "false_alarms": {"untouched": {"value": 0.01, "interval": [0.0, 0.049], "n": 500}},
    }
    assert recipe.rate_warnings(content) == []


def test_copies_of_a_picture_certify_no_rate(quick):
    columns = make_columns(real=150, fake=150, gap=8)
    model, rows = build(columns), training_rows(columns)
    assert recipe.false_alarms(model, rows)["untouched"]["interval"][1] < 0.05
    rows.groups = rows.groups % 30
    assert recipe.false_alarms(model, rows)["untouched"]["interval"][1] > 0.05


# ---- another threshold for the same classifier ----


def test_a_threshold_moves_without_another_training(train, quick, tmp_path, monkeypatch):
    columns = make_columns(real=150, fake=150, gap=1)
    old, before, _, _ = train(columns, name="old", notice="a test")
    monkeypatch.setattr(recipe, "build", Mock(side_effect=AssertionError("trained again")))
    flags = {"from_model": str(tmp_path / "old.joblib"), "model_version": "v2.0.0"}
    new, content, printed, _ = train(columns, name="new", max_fpr=0.02, **flags)
    assert new["sha256"] != old["sha256"] and new["versions"]["model"] == "v2.0.0"
    moved = {"threshold", "threshold_rule", "band", "metrics", "versions", "sha256", "squares"}
    for name in old.keys() - moved:
        assert pickle.dumps(old[name]) == pickle.dumps(new[name]), name
    assert new["threshold"] > old["threshold"] and stale_threshold(new) is None
    assert new["threshold_rule"]["max_fpr"] == 0.02
    assert content["overall"]["auc"] == before["overall"]["auc"]
    assert content["overall"]["threshold"] == new["threshold"]
    by_hand, _, printed, _ = train(columns, name="hand", threshold=0.7, **flags)
    assert by_hand["threshold"] == 0.7 and stale_threshold(by_hand) is None
    assert "threshold 0.700 (0.7, given with --threshold)" in printed


def test_a_model_of_other_rows_keeps_its_threshold(train, quick, tmp_path):
    train(make_columns(), name="old")
    with pytest.raises(UsageError, match="--from_model .*old.joblib: was trained on other rows"):
        train(make_columns(real=100), from_model=str(tmp_path / "old.joblib"), threshold=0.7)


def test_models_whose_names_differ_after_a_dot_have_reports_of_their_own(train, quick, tmp_path):
    for name in ("model_v1.2", "model_v1.3"):
        train(make_columns(), name=name)
        assert (tmp_path / f"{name}_report" / "metrics.json").is_file()


# ---- which kind ----


def curved_in_train_straight_in_test():
    """Training images with a curved border, test images with a straight one.

    The kind that is best out of fold is then not the best on the test images.
    """
    columns = make_columns(real=300, fake=300, gap=0)
    x, train = columns["features"], columns["splits"] == "train"
    fake = np.where(train, x[:, 0] * x[:, 1] + 0.35 * x[:, 2] > 0, x[:, 2] > 0)
    return columns | {"labels": fake.astype(np.int8)}


def test_of_all_kinds_the_best_out_of_fold_is_trained(train, quick):
    model, content, printed, _ = train(curved_in_train_straight_in_test(), classifier="all")
    kinds = {row["classifier"]: row for row in content["classifiers"]}
    assert list(kinds) == list(GRIDS)
    by_folds, by_test = (
        max(kinds, key=lambda kind: kinds[kind][key]["value"]) for key in ("out_of_fold", "auc")
    )
    assert by_folds != by_test
    assert model["classifier"] == content["classifier"] == by_folds
    assert content["overall"]["auc"]["value"] == pytest.approx(kinds[by_folds]["auc"]["value"])
    for kind, row in kinds.items():
        figures = [f"{row[name]['value']:.2f} \\[" for name in ("out_of_fold", "auc")]
        assert re.search(rf"(?m)^{kind} +{figures[0]}.*\] +{figures[1]}", printed)
        assert row["hyperparameters"] == GRIDS[kind][0]
    assert "the best out of fold was chosen:" in printed


@pytest.mark.parametrize("kind", GRIDS)
def test_a_named_kind_is_trained_without_a_table(train, quick, kind):
    model, content, printed, _ = train(make_columns(), classifier=kind)
    assert model["classifier"] == kind and printed.startswith(f"{kind}, ")
    assert "out-of-fold AUC" not in printed
    assert [row["classifier"] for row in content["classifiers"]] == [kind]


# ---- sources held out ----


def with_sources(real=("a", "b"), fake=("x", "y"), **arguments):
    """Columns whose images take the names of their class in turn."""
    columns = make_columns(**arguments)
    for label, names in enumerate((real, fake)):
        rows = np.flatnonzero(columns["labels"] == label)
        columns["sources"][rows] = np.array(names)[rows % len(names)]
    return columns


def test_each_source_is_judged_by_a_classifier_without_it_and_its_twins(monkeypatch):
    columns = with_views(with_sources(), 1)
    columns["features"][:, 5] = np.arange(240)  # the row's number
    rows, sources = training_rows(columns), columns["sources"]
    model = build(columns, "linear-svm")
    rows.groups[sources == "a"] = np.arange(60) // 2
    rows.groups[2:4] = 0  # the second image is a twin in another source
    spy = Mock(wraps=classifiers.fit)
    monkeypatch.setattr(recipe, "fit", spy)
    table, _ = recipe.leave_one_source_out(model, rows, 0)

    held_out = []
    for call in spy.call_args_list:
        _, features, labels, weight, _ = call.args
        used = features[:, 5].astype(int)
        (missing,) = set("abxy") - set(sources[used])
        assert not set(rows.groups[used]) & set(rows.groups[sources == missing])
        # also if a class lost a source
        assert weight[labels == 0].sum() == pytest.approx(weight[labels == 1].sum())
        held_out.append(missing)
    assert sorted(held_out) == list("abxy")
    judged = sorted((row["source"], row["label"], row["n"]) for row in table)
    assert judged == [("a", "real", 30), ("b", "real", 30), ("x", "fake", 30), ("y", "fake", 30)]


def test_the_table_of_held_out_sources_is_printed_worst_first(train):
    columns = with_sources(real=("camera", "phone"), fake=("gan", "other", "odd"), gap=4)
    # without this source in the training, its fakes look real
    columns["features"][columns["sources"] == "odd", :2] += [-4, 6]
    _, content, printed, _ = train(columns, classifier="logistic")
    rows = content["leave_one_source_out"]
    worst = rows[0]
    assert (worst["source"], worst["label"]) == ("odd", "fake")
    assert worst["value"] < 0.3 and rows[1]["value"] > 0.6
    shown = printed[printed.index("source held out") :].splitlines()[1:6]
    expected = [[row["source"], row["label"], str(row["n"])] for row in rows]
    assert [line.split()[:3] for line in shown] == expected
    assert f"{worst['value']:.2f} [" in shown[0]
    assert content["overall"]["accuracy_fake"]["value"] > worst["value"]


def test_the_auc_of_held_out_sources_is_over_images_judged_without_their_source(train, monkeypatch):
    judged = []

    def kept(model, rows, used, own, seed):
        judged.append((rows.labels[own], held_out_p_fake(model, rows, used, own, seed)))
        return judged[-1][1]

    held_out_p_fake = recipe.held_out_p_fake
    monkeypatch.setattr(recipe, "held_out_p_fake", kept)
    model, content, _, _ = train(with_views(with_sources(gap=1), 1), classifier="logistic")
    labels, p_fake = map(np.concatenate, zip(*judged, strict=True))
    auc = content["trained"]["left_out"]["auc"]
    assert auc == model["metrics"]["left_out"]["auc"] and auc["n"] == len(labels) == 80
    assert auc["value"] == pytest.approx(roc_auc_score(labels, p_fake))
    low, high = auc["interval"]
    assert low < auc["value"] < high and high - low > 0.5  # of four sources, not of 80 images


@pytest.mark.parametrize(
    "real, fake",
    [(("",), ("",)), (("a", "b"), ("x",)), (("a", "b"), ("x", "")), (("a",), ("a",))],
    ids=["no sources", "a single fake source", "fakes without source", "a shared source"],
)
def test_without_two_sources_in_both_classes_the_table_is_left_out(train, quick, real, fake):
    _, content, printed, _ = train(with_sources(real, fake))
    assert content["leave_one_source_out"] == [] and "source held out" not in printed
    assert content["trained"]["left_out"] is None


# ---- refusals ----


RATES = ["0", "1", "2", "nan", "-0.1", "inf"]
VERSIONS = ["v1 – test", "", "a" * 65, "v1\n"]
NOTICES = ["", "two\nlines", "a" * 201, "caf\u00e9"]


@pytest.mark.parametrize(
    "flag, value, message",
    [
        *(("max_fpr", rate, f"--max_fpr {rate}: must be between 0 and 1") for rate in RATES),
        *(("model_version", v, f"--model_version {v!r}: must be 1 to 64 plain") for v in VERSIONS),
        *(("notice", notice, f"--notice {notice!r}: must be 1 to 200 plain") for notice in NOTICES),
    ],
)
def test_a_bad_value_is_refused_before_the_training(train, monkeypatch, flag, value, message):
    monkeypatch.setattr(recipe, "build", lambda *_: pytest.fail("trained first"))
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        train(make_columns(), **{flag: value})


def test_a_bad_value_is_a_one_line_error(command):
    result = command("--notice", "two\nlines")
    assert_one_line_error(result, r"--notice 'two\nlines'", "200 plain characters")


def test_features_of_two_encoders_are_refused_and_both_are_named(command, tmp_path):
    other = {**ENCODER, "name": "ViT-L/14", "identity": "cd" * 32}
    files = [
        write_features(tmp_path / "a.npz"),
        write_features(tmp_path / "b.npz", encoder=other, seed=1),
    ]
    words = *files, "made-up", "abababababab", "ViT-L/14", "cdcdcdcdcdcd"
    assert_one_line_error(command(features=files), *words)


def four_pictures(columns):
    """All fakes to train on show one of four pictures."""
    fakes = np.flatnonzero((columns["labels"] == 1) & (columns["splits"] == "train"))
    columns["thumb"][fakes] = columns["thumb"][fakes[np.arange(len(fakes)) % 4]]


def spoilt(name, value, rows=slice(None)):
    """Function: columns -> the columns with this value in the rows of a column."""

    def change(columns):
        columns[name][rows] = value

    return change


FAKE_BUT_19 = np.arange(60 + 19, 120)
SPOILT = {
    "NaN": (
        spoilt("features", np.nan, (7, 3)),
        ["1 rows hold NaN", "0/00007.jpg", "extract again"],
    ),
    "infinite": (spoilt("features", np.inf, (7, 3)), ["1 rows hold NaN or infinite"]),
    "a single class": (spoilt("labels", 0), ["0 fake images to train on", "at least 20"]),
    "19 fakes": (spoilt("labels", -1, FAKE_BUT_19), ["19 fake images", "at least 20"]),
    "no labels": (spoilt("labels", -1), ["0 real images"]),
    "4 pictures": (four_pictures, ["only 4 groups of fake images for 5 folds", "add images"]),
}


@pytest.mark.parametrize("spoil, words", SPOILT.values(), ids=SPOILT)
def test_unusable_data_are_a_one_line_error(command, tmp_path, spoil, words):
    columns = make_columns()
    spoil(columns)
    assert_one_line_error(command(features=[write_features(tmp_path / "f.npz", columns)]), *words)
    assert not (tmp_path / "out.joblib").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["no such file", "extract_features.py"]),
        (b"hello", ["not a features file", "extract again"]),
        (b"", ["not a features file"]),
        (b"PK\x03\x04 cut", ["not a features file"]),
    ],
    ids=["missing", "text", "empty", "truncated"],
)
def test_a_file_without_features_is_a_one_line_error(command, tmp_path, content, words):
    path = tmp_path / "odd.npz"
    if content is not None:
        path.write_bytes(content)
    assert_one_line_error(command(features=[path]), path, *words)


@pytest.mark.parametrize("splits", ["trian", "train,extra", "external"])
def test_an_unknown_split_is_refused_with_the_known_splits(command, splits):
    assert_one_line_error(command("--train_splits", splits), splits, "splits there: test, train")


@pytest.mark.parametrize("place", ["file/model.joblib", "folder"])
def test_an_unwritable_place_is_refused_before_the_training(command, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    result = command("--model_output_path", tmp_path / place)
    assert_one_line_error(result, tmp_path / place)
    assert "images to train" not in result.stderr


def test_a_notice_goes_into_the_model_and_its_report(train):
    model, report, _, _ = train(make_columns(), notice="not for use")
    assert model["notice"] == report["notice"] == "not for use"
    model, report, _, _ = train(make_columns(), name="other")
    assert "notice" not in model and report["notice"] is None
