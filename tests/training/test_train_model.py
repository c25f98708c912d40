"""train_model.py as users run it: what it writes, says and refuses."""

import json
import pickle
import re
import subprocess
import time

import numpy as np
import pytest
from commands import ROOT, assert_one_line_error
from made_up import ENCODER, build, make_columns, training_rows, with_views, write_features
from threadpoolctl import threadpool_info, threadpool_limits

import train_model
from detector.base.errors import UsageError
from detector.evaluation.plots import PLOTS
from detector.evaluation.report import NAMES
from detector.model.file import load_model
from detector.model.score import decision, probability
from detector.model.threshold import stale_threshold
from detector.training import classifiers, recipe, rows
from detector.training.classifiers import GRIDS
from detector.training.rows import warn_of_few_reals

# ---- what comes out ----


def test_the_command_writes_model_and_report_and_prints_each_metric_with_its_interval(
    command, tmp_path
):
    result = command("--model_version", "v1.2.0")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out_report"
    pictures = {p.name for p in folder.glob("*.png")}
    assert {"metrics.json", "report.html", "MODEL_CARD.md", "overall.csv"} < {
        p.name for p in folder.iterdir()
    }
    assert (
        {"confusion_matrix.png", "roc.png", "calibration.png"}
        <= pictures
        <= {f"{name}.png" for name in PLOTS}
    )

    found, model = (
        json.loads((folder / "metrics.json").read_text()),
        load_model(tmp_path / "out.joblib"),
    )
    for name in ("accuracy", "precision_real", "precision_fake", *NAMES):
        m = found["overall"][name]
        assert (
            f"{m['value']:.3f}  {m['interval'][0]:.3f} .. {m['interval'][1]:.3f}  {m['n']}"
            in result.stdout
        )
    for told in (
        "v1.2.0",
        str(tmp_path / "out.joblib"),
        str(folder),
        "'made-up'",
        f"C {model['hyperparameters']['C']:g}",
        "svm",
        "threshold 0.500",
    ):
        assert told in result.stdout
    assert "80 images to train, 40 to test" in result.stderr and "Traceback" not in result.stderr


def test_the_model_says_where_it_comes_from(command, tmp_path):
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    known = subprocess.run(git, capture_output=True, text=True)
    expected = known.stdout.strip() if known.returncode == 0 else "4a5b6c"
    assert command("--model_version", "v1.2.0", CODE_COMMIT="4a5b6c").returncode == 0
    model = load_model(tmp_path / "out.joblib")
    assert model["versions"]["model"] == "v1.2.0"
    assert model["versions"]["code"].removesuffix("-dirty") == expected
    assert model["encoder"] == ENCODER
    assert {name: model["training_data"][name] for name in ("real", "fake")} == {
        "real": 40,
        "fake": 40,
    }
    assert int(model["training_data"]["sha256"], 16) and len(model["training_data"]["sha256"]) == 64
    assert (
        model["metrics"]["overall"]
        == json.loads((tmp_path / "out_report" / "metrics.json").read_text())["overall"]
    )


@pytest.mark.parametrize("kind", GRIDS)
def test_every_kind_is_the_same_to_the_byte_when_built_again_at_another_time(monkeypatch, kind):
    columns = with_views(make_columns(gap=1), 1)
    first = build(columns, kind)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: 4_000_000_000)
    assert pickle.dumps(build(columns, kind)) == pickle.dumps(first)
    assert set(first["versions"]) == {
        "model",
        "code",
        "numpy",
        "scikit-learn",
        "svm",
    }  # no clock among them


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
    other = train(columns, name="c", seed=1)[0]
    assert not np.array_equal(
        other["out_of_fold"]["scores"], first["out_of_fold"]["scores"]
    )  # other folds


def changed(columns, what):
    """Columns with one thing changed in the first training row."""
    columns = {name: column.copy() for name, column in columns.items()}
    if what == "a label":
        columns["labels"][0] = 1
    elif what == "a file's bytes":
        columns["sha256"][0] = "0" * 64
    elif what == "an image less":
        return {name: column[1:] for name, column in columns.items()}
    elif what == "a test image":
        columns["sha256"][np.flatnonzero(columns["splits"] == "test")[0]] = "0" * 64
    elif what == "copies":
        return with_views(columns, 2)
    elif what == "the order":
        return {name: column[::-1] for name, column in columns.items()}
    return columns


@pytest.mark.parametrize(
    "what, other",
    [
        ("a label", True),
        ("a file's bytes", True),
        ("an image less", True),
        ("a test image", False),
        ("the order", False),
        ("copies", False),
    ],
)
def test_the_hash_of_the_training_data_changes_with_them_and_only_with_them(what, other):
    def digest(columns):
        trained = {name: column[columns["splits"] == "train"] for name, column in columns.items()}
        return recipe.training_data(training_rows(trained))["sha256"]

    columns = make_columns()
    assert (digest(changed(columns, what)) != digest(columns)) == other


def test_several_features_files_are_joined(train):
    model, found, _, told = train(
        make_columns(), make_columns(seed=1, splits=False) | {"splits": np.full(120, "train")}
    )
    assert model["training_data"]["real"] == 40 + 60 and found["overall"]["n"] == 40
    assert "200 images to train, 40 to test" in told


def test_a_test_split_of_one_class_is_measured_as_far_as_it_can_be(train):
    columns = make_columns()
    keep = (columns["splits"] == "train") | (columns["labels"] == 0)
    _, found, printed, _ = train({name: column[keep] for name, column in columns.items()})
    assert found["overall"]["auc"] == {"value": None, "interval": None, "n": 20}
    assert found["overall"]["accuracy_real"]["n"] == 20 and "n/a" in printed


# ---- copies ----


def test_degraded_copies_train_along_and_are_reported_apart(train, quick):
    columns = with_views(make_columns(gap=1.5), 3, noise=2)
    model, found, printed, told = train(columns)
    assert "80 images to train, and 240 degraded copies, 40 to test" in told
    assert {name: model["training_data"][name] for name in ("real", "fake", "views")} == {
        "real": 40,
        "fake": 40,
        "views": 3,
    }
    assert (
        np.bincount(model["out_of_fold"]["view"]).tolist() == [80] * 4
        and len(model["training_data"]["images"]) == 80
    )

    test, whole = columns["splits"] == "test", columns["view"] == 0
    right = (probability(model, decision(model, columns["features"])) >= 0.5) == columns["labels"]
    for part, mask, n in (("overall", test & whole, 40), ("degraded", test & ~whole, 120)):
        accuracy = found[part]["accuracy"]
        assert (accuracy["value"], accuracy["n"]) == (pytest.approx(right[mask].mean()), n)
        assert (
            f"{accuracy['value']:.3f}  {accuracy['interval'][0]:.3f} .."
            f" {accuracy['interval'][1]:.3f}  {n}" in printed
        )
        assert model["metrics"][part] == found[part]
    assert right[test & whole].mean() != right[test & ~whole].mean()
    assert "on 120 degraded copies of the test images:" in printed
    for n, words in ((40, "real training images"), (120, "degraded copies of them")):
        assert re.search(
            rf"called fake, out of fold: 0\.\d+ \[.*\] of {n} {words}$", printed, re.MULTILINE
        )


def test_without_copies_there_is_no_word_of_them(train, quick):
    _, found, printed, told = train(make_columns())
    assert found["degraded"] is None and "degraded" not in printed + told


# ---- a rate of false alarms ----


@pytest.mark.parametrize("views", [0, 2])
def test_the_rate_that_the_threshold_reaches_is_stated_and_is_at_most_the_one_asked_for(
    train, quick, views
):
    model, found, printed, _ = train(
        with_views(make_columns(real=150, fake=150, gap=1), views, noise=1), max_fpr=0.1
    )
    stored = model["out_of_fold"]
    real = stored["labels"] == 0
    fake = probability(model, stored["scores"].astype(float)) >= model["threshold"]
    for name, mask in {
        "untouched": real & (stored["view"] == 0),
        "degraded": real & (stored["view"] > 0),
    }.items():
        if mask.any():
            alarms = found["false_alarms"][name]
            assert (alarms["value"], alarms["n"]) == (pytest.approx(fake[mask].mean()), mask.sum())
            assert f"called fake, out of fold: {alarms['value']:.3f} [" in printed
            assert (
                alarms["value"] <= 0.1
            )  # the copies on their own, too: far from each other they would hide in the mean
    assert max(alarms["value"] for alarms in found["false_alarms"].values()) > 0.05
    assert ("degraded" in found["false_alarms"]) == (views > 0)
    copies = ", and at most so many of their degraded copies" if views else ""
    assert (
        f"threshold {model['threshold']:.3f} (at most 0.1 of the real training images called fake,"
        f" out of fold{copies})" in printed
    )
    assert model["threshold_rule"]["max_fpr"] == 0.1 and stale_threshold(model) is None


@pytest.mark.parametrize("rate", ["0", "1", "2", "nan", "-0.1", "inf"])
def test_a_rate_that_is_none_is_refused_before_the_training(train, monkeypatch, rate):
    monkeypatch.setattr(recipe, "build", lambda *_: pytest.fail("trained first"))
    with pytest.raises(UsageError, match=f"^--max_fpr {rate}: must be between 0 and 1$"):
        train(make_columns(), max_fpr=rate)


def test_a_refused_rate_is_one_line(command):
    assert_one_line_error(command("--max_fpr", "nan"), "--max_fpr nan", "between 0 and 1")


@pytest.mark.parametrize("version", ["v1 – test", "", "a" * 65, "v1\n"])
def test_a_version_that_fits_into_no_header_is_one_line(command, version):
    assert_one_line_error(
        command("--model_version", version), f"--model_version {version!r}", "plain characters"
    )


@pytest.mark.parametrize(
    "rate, needed", [(0.05, 60), (0.074, 41), (0.075, None), (0.5, None), (0.01, 300)]
)
@pytest.mark.parametrize("views", [0, 3])
def test_too_few_reals_to_certify_a_rate_are_warned_of(capsys, rate, needed, views):
    rows = training_rows(
        with_views(make_columns(real=40, fake=200), views)
    )  # copies certify nothing
    warn_of_few_reals(rate, rows)
    expected = (
        f"warning: 40 real training images are too few to certify a rate of {rate:g}: it takes"
        f" {needed}\n"
    )
    assert capsys.readouterr().err == (expected if needed else "")


def test_the_warning_is_given_by_the_command_too(train, quick):
    assert "too few to certify a rate of 0.01" in train(make_columns(), max_fpr=0.01)[3]


# ---- which kind ----


def bent_in_train_straight_in_test():
    """Training images whose border is bent, test images that a straight one tells apart: there the best kinds differ."""
    columns = make_columns(real=300, fake=300, gap=0)
    x, train = columns["features"], columns["splits"] == "train"
    columns["labels"] = np.where(train, x[:, 0] * x[:, 1] + 0.35 * x[:, 2] > 0, x[:, 2] > 0).astype(
        np.int8
    )
    return columns


def test_of_all_kinds_the_best_out_of_fold_is_trained_whatever_the_test_images_say(train, quick):
    model, found, printed, _ = train(bent_in_train_straight_in_test(), classifier="all")
    kinds = {row["classifier"]: row for row in found["classifiers"]}
    assert list(kinds) == list(GRIDS)
    by_folds, by_test = (
        max(kinds, key=lambda kind: kinds[kind][key]["value"]) for key in ("out_of_fold", "auc")
    )
    assert by_folds != by_test
    assert model["classifier"] == found["classifier"] == by_folds
    assert found["overall"]["auc"]["value"] == pytest.approx(kinds[by_folds]["auc"]["value"])
    for kind, row in kinds.items():
        assert re.search(
            rf"^{kind} +{row['out_of_fold']['value']:.2f} \[.*\] +{row['auc']['value']:.2f} \[",
            printed,
            re.MULTILINE,
        )
        assert row["hyperparameters"] == GRIDS[kind][0]
    assert "the best out of fold was chosen:" in printed


@pytest.mark.parametrize("kind", GRIDS)
def test_a_kind_that_is_named_is_trained_and_no_table_is_shown(train, quick, kind):
    model, found, printed, _ = train(make_columns(), classifier=kind)
    assert (
        model["classifier"] == kind
        and printed.startswith(f"{kind}, ")
        and "out-of-fold AUC" not in printed
    )
    assert [row["classifier"] for row in found["classifiers"]] == [kind]


# ---- sources held out ----


def with_sources(real=("a", "b"), fake=("x", "y"), **arguments):
    columns = make_columns(**arguments)
    columns["sources"] = np.array(
        [
            (real, fake)[label][i % len((real, fake)[label])]
            for i, label in enumerate(columns["labels"])
        ]
    )
    return columns


def test_each_source_is_answered_by_a_classifier_that_was_trained_without_it_and_without_its_twins(
    monkeypatch,
):
    columns = with_views(with_sources(), 1)
    columns["features"][:, 5] = np.arange(240)  # tells which row it is
    rows, fit, held_out = training_rows(columns), classifiers.fit, []
    model = build(columns, "linear-svm")
    rows.groups[columns["sources"] == "a"], rows.groups[2:4] = (
        np.arange(60) // 2,
        0,
    )  # the second image: a twin in another source

    def spy(kind, features, labels, weight, seed, **point):
        used = features[:, 5].astype(int)
        assert weight[labels == 0].sum() == pytest.approx(
            weight[labels == 1].sum()
        )  # also where a class lost a source
        missing = set("abxy") - set(rows.columns["sources"][used])
        assert len(missing) == 1 and not set(rows.groups[used]) & set(
            rows.groups[rows.columns["sources"] == min(missing)]
        )
        held_out.append(min(missing))
        return fit(kind, features, labels, weight, seed, **point)

    monkeypatch.setattr(recipe, "fit", spy)
    found = recipe.leave_one_source_out(model, rows, 0)
    assert sorted(held_out) == sorted(row["source"] for row in found) == list("abxy")
    assert {row["source"]: (row["label"], row["n"]) for row in found} == {
        **dict.fromkeys("ab", ("real", 30)),
        **dict.fromkeys("xy", ("fake", 30)),
    }


def test_the_table_of_held_out_sources_is_printed_worst_first(train):
    columns = with_sources(real=("camera", "phone"), fake=("gan", "other", "odd"), gap=4)
    columns["features"][columns["sources"] == "odd", :2] += [
        -4,
        6,
    ]  # looks real to who knows the other fakes alone
    _, found, printed, _ = train(columns, classifier="logistic")
    rows = found["leave_one_source_out"]
    assert (
        [rows[0]["source"], rows[0]["label"]] == ["odd", "fake"]
        and rows[0]["value"] < 0.3
        and rows[1]["value"] > 0.6
    )
    shown = printed[printed.index("source held out") :].splitlines()[1:6]
    assert [line.split()[:3] for line in shown] == [
        [row["source"], row["label"], str(row["n"])] for row in rows
    ]
    assert (
        f"{rows[0]['value']:.2f} [" in shown[0]
        and found["overall"]["accuracy_fake"]["value"] > rows[0]["value"]
    )


@pytest.mark.parametrize(
    "real, fake",
    [(("",), ("",)), (("a", "b"), ("x",)), (("a", "b"), ("x", "")), (("a",), ("a",))],
    ids=["no sources", "one of the fakes", "some without", "one of both"],
)
def test_without_two_sources_in_both_classes_there_is_no_such_table(train, quick, real, fake):
    _, found, printed, _ = train(with_sources(real, fake))
    assert found["leave_one_source_out"] == [] and "source held out" not in printed


# ---- refusals ----


def test_features_of_two_encoders_are_refused_and_both_are_named(command, tmp_path):
    other = {**ENCODER, "name": "ViT-L/14", "identity": "cd" * 32}
    files = [
        write_features(tmp_path / "a.npz"),
        write_features(tmp_path / "b.npz", encoder=other, seed=1),
    ]
    assert_one_line_error(
        command(features=files),
        files[0],
        files[1],
        "made-up",
        "abababababab",
        "ViT-L/14",
        "cdcdcdcdcdcd",
    )


def nan(columns):
    columns["features"][7, 3] = np.nan


def infinite(columns):
    columns["features"][7, 3] = np.inf


def one_class(columns):
    columns["labels"][:] = 0


def nineteen_fakes(columns):
    columns["labels"][np.flatnonzero(columns["labels"] == 1)[19:]] = -1


def no_labels(columns):
    columns["labels"][:] = -1


def four_pictures(columns):
    """All fakes to train on show one of four pictures."""
    fakes = np.flatnonzero((columns["labels"] == 1) & (columns["splits"] == "train"))
    columns["thumb"][fakes] = columns["thumb"][fakes[np.arange(len(fakes)) % 4]]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (nan, ["1 rows hold NaN", "0/00007.jpg", "extract again"]),
        (infinite, ["1 rows hold NaN or infinite"]),
        (one_class, ["0 fake images to train on", "at least 20"]),
        (nineteen_fakes, ["19 fake images", "at least 20"]),
        (no_labels, ["0 real images"]),
        (four_pictures, ["only 4 groups of fake images for 5 folds", "add images"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_data_that_cannot_train_are_refused_in_one_line(command, tmp_path, spoil, words):
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
def test_what_is_no_features_file_is_refused_in_one_line(command, tmp_path, content, words):
    path = tmp_path / "odd.npz"
    if content is not None:
        path.write_bytes(content)
    assert_one_line_error(command(features=[path]), path, *words)


@pytest.mark.parametrize("splits", ["trian", "train,extra", "external"])
def test_an_unknown_split_is_refused_with_those_that_are_there(command, splits):
    assert_one_line_error(command("--train_splits", splits), splits, "splits there: test, train")


@pytest.mark.parametrize("place", ["file/model.joblib", "folder"])
def test_an_unwritable_place_is_told_before_the_training(script, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    features = write_features(tmp_path / "f.npz")
    result = script(
        "train_model.py", "--features_file", features, "--model_output_path", tmp_path / place
    )
    assert_one_line_error(result, tmp_path / place)
    assert "images to train" not in result.stderr


def test_an_unknown_flag_is_refused(command):
    result = command("--modell", "x")
    assert result.returncode == 2 and "unrecognized arguments: --modell" in result.stderr


def test_a_notice_goes_into_the_model_and_its_report(train):
    model, report, _, _ = train(make_columns(), notice="not for use")
    assert model["notice"] == report["notice"] == "not for use"
    model, report, _, _ = train(make_columns(), name="other")
    assert "notice" not in model and report["notice"] is None


@pytest.mark.parametrize("notice", ["", "two\nlines", "a" * 201, "caf\u00e9"])
def test_a_notice_that_fits_into_no_header_is_one_line(command, notice):
    assert_one_line_error(
        command("--notice", notice), f"--notice {notice!r}", "200 plain characters"
    )
