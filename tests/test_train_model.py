"""Training: which rows train and test, what is written, what is refused; and that it learns what is there, no more."""
import json
import subprocess

import numpy as np
import pytest

import common
import train_model
from audit import auc
from common import UsageError
from conftest import ROOT, assert_one_line_error
from made_up import ENCODER, build, make_columns, training_arguments, write_features
from model import decision, load_model, probability
from report import area, bootstrap, measure
from train_model import balanced_weights, choose_rows, fit_sigmoid, fold_rows, make_groups, out_of_fold

METRICS = ("accuracy", "balanced accuracy", "auc", "precision real", "recall real", "precision fake", "recall fake")


def chosen(columns, **changes):
    """choose_rows with the given flags -> (train rows, test rows, groups, words)."""
    return choose_rows(columns, training_arguments(**changes), 0)


def joined(*parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Function: columns or features files, and flags -> (model, metrics.json, stdout, stderr) of one training."""
    monkeypatch.setattr(common, "code_commit", lambda: "0123abc")

    def run(*data, name="model", **flags):
        files = [write_features(tmp_path / f"{name}{i}.npz", part) if isinstance(part, dict) else part
                 for i, part in enumerate(data)]
        output = tmp_path / f"{name}.joblib"
        given = [word for flag, value in flags.items() for word in (f"--{flag}", *([] if value is True else [str(value)]))]
        train_model.main(["--features_file", *map(str, files), "--model_output_path", str(output), *given])
        captured = capsys.readouterr()
        return (load_model(output), json.loads((tmp_path / f"{name}_report" / "metrics.json").read_text()),
                captured.out, captured.err)
    return run


# ---- which rows ----

def test_the_folders_split_is_used():
    columns = make_columns()
    rows, test, _, how = chosen(columns)
    assert set(columns["splits"][rows]) == {"train"} and set(columns["splits"][test]) == {"test"}
    assert len(rows) + len(test) == len(columns["labels"])
    assert "folders' split" in how


@pytest.mark.parametrize("splits", ["", "val"], ids=["no split folders", "another split only"])
def test_without_a_split_a_fifth_of_each_class_tests(splits):
    columns = make_columns(real=100, fake=50, splits=False)
    columns["splits"][:] = splits
    rows, test, _, how = chosen(columns)
    assert "our own split" in how and "a fifth" in how
    assert np.bincount(columns["labels"][test]).tolist() == [20, 10]
    assert sorted(np.concatenate([rows, test])) == list(range(150))


def test_without_test_images_a_fifth_of_train_tests():
    columns = make_columns(real=90, fake=90)
    columns["splits"] = np.where(columns["splits"] == "test", "external", "train")
    rows, test, _, how = chosen(columns)
    assert "our own split" in how and set(columns["splits"][np.concatenate([rows, test])]) == {"train"}
    assert (len(rows), len(test)) == (96, 24)


def test_resplit_divides_anew_whatever_the_folders_say_and_leaves_external_out():
    columns = make_columns(real=100, fake=100)
    columns["splits"][::10] = "external"
    rows, test, _, how = chosen(columns, resplit=True)
    assert "our own split" in how
    assert {"train", "test"} == set(columns["splits"][rows]) == set(columns["splits"][test])
    assert np.bincount(columns["labels"][test]).tolist() == [18, 18]


def test_train_splits_chooses_what_to_train_on():
    columns = make_columns()
    columns["splits"][::4] = "extra"
    rows, test, _, _ = chosen(columns, train_splits="train,extra")
    assert set(columns["splits"][rows]) == {"train", "extra"} and set(columns["splits"][test]) == {"test"}


def test_images_to_train_on_never_test_even_where_the_user_names_the_test_split():
    columns = make_columns()
    rows, test, _, how = chosen(columns, train_splits="train,test")
    assert not set(rows) & set(test)
    assert "our own split" in how and len(rows) + len(test) == len(columns["labels"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_unlabelled_images_neither_train_nor_test(split):
    columns = make_columns()
    unknown = np.flatnonzero(columns["splits"] == split)[::3]
    columns["labels"][unknown] = -1
    for resplit in (False, True):
        rows, test, _, _ = chosen(columns, resplit=resplit)
        assert not set(unknown) & set(np.concatenate([rows, test]))


def test_what_is_left_out_is_said(train):
    columns = make_columns()
    columns["splits"][:3], columns["splits"][3:5] = "external", "seen"
    assert "left out: 3 external, 2 seen" in train(columns)[3]


# ---- groups ----

def with_twins(columns, copies=4, seed=0):
    """Every picture there `copies` times: other bytes, nearly the same thumbnail."""
    rng = np.random.default_rng(seed)
    many = {name: np.repeat(column, copies, axis=0) for name, column in columns.items()}
    many["sha256"] = np.array([f"{i:064x}" for i in range(len(many["sha256"]))])
    many["thumb"] = np.clip(many["thumb"].astype(int) + rng.integers(-1, 2, many["thumb"].shape), 0, 255).astype(np.uint8)
    return many


def test_near_identical_pictures_are_one_group():
    groups, kind = make_groups(with_twins(make_columns(), copies=4))
    assert kind == "near-identical images"
    assert (groups.reshape(-1, 4) == groups[::4, None]).all() and len(set(groups)) == 120


def test_byte_identical_files_are_one_group():
    columns = make_columns()
    columns["sha256"][5] = columns["sha256"][100]
    groups, _ = make_groups(columns)
    assert groups[5] == groups[100] and len(set(groups)) == 119


@pytest.mark.parametrize("sources, kind", [(3, "near-identical images"), (9, "near-identical images"), (12, "sources")])
def test_ten_sources_or_more_are_groups_fewer_are_not(sources, kind):
    columns = make_columns()
    columns["sources"] = np.array([f"source {i % sources}" for i in range(120)])
    groups, found = make_groups(columns)
    assert found == kind
    if kind == "sources":
        assert all(len(set(groups[columns["sources"] == name])) == 1 for name in set(columns["sources"]))
        assert len(set(groups)) == sources


def test_ten_sources_of_which_too_few_hold_one_class_are_no_groups():
    columns = make_columns()
    columns["sources"] = np.array([f"camera {i % 12}" for i in range(60)] + [f"generator {i % 2}" for i in range(60)])
    assert make_groups(columns)[1] == "near-identical images"


def test_a_twin_ties_two_sources_together():
    columns = make_columns()
    columns["sources"] = np.array([f"source {i % 12}" for i in range(120)])
    columns["sha256"][0] = columns["sha256"][1]
    assert len(set(make_groups(columns)[0])) == 11


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_group_is_ever_on_both_sides(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 300)
    groups = rng.integers(0, 60, 300) * 2 + labels
    folds = fold_rows(labels, groups, seed)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(300))
    for rows, test in folds:
        assert not set(groups[rows]) & set(groups[test])
        assert abs(labels[test].mean() - labels.mean()) < 0.15


@pytest.mark.parametrize("sources", [1, 20])
def test_our_own_split_keeps_groups_whole(sources):
    columns = with_twins(make_columns(splits=False))
    columns["sources"] = np.array([f"source {i // 4 % sources}" for i in range(480)])
    rows, test, groups, _ = chosen(columns)
    assert not set(groups[rows]) & set(groups[test]) and len(test) > 50


def test_twins_across_the_folders_split_are_told_and_resplit_mends_it(train):
    columns = with_twins(make_columns(real=40, fake=40), copies=2)
    columns["splits"][:] = ["train", "test"] * 80
    assert "LEAK  80 of 80 test images have a twin in train" in train(columns)[3]
    assert "LEAK" not in train(columns, resplit=True)[3]


# ---- what comes out ----

@pytest.fixture
def command(script, tmp_path):
    """Function: train_model.py as a process on a features file, into tmp_path / 'out.joblib'."""
    def run(*flags, features=None, **env):
        return script("train_model.py", "--features_file", *(features or [write_features(tmp_path / "f.npz")]),
                      "--model_output_path", tmp_path / "out.joblib", *flags, **env)
    return run


def test_the_command_writes_model_and_report_and_prints_each_metric_with_its_interval(command, tmp_path):
    result = command("--model_version", "v1.2.0")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out_report"
    assert {p.name for p in folder.iterdir()} == {"confusion_matrix.png", "roc.png", "calibration.png", "metrics.json"}

    metrics, model = json.loads((folder / "metrics.json").read_text()), load_model(tmp_path / "out.joblib")
    for name in METRICS:
        m = metrics["test"][name.replace(" ", "_")]
        assert f"{m['value']:.3f}  {m['interval'][0]:.3f} .. {m['interval'][1]:.3f}  {m['n']}" in result.stdout
    for told in ("v1.2.0", str(tmp_path / "out.joblib"), str(folder), "'made-up'", f"C {model['C']:g}",
                 f"{len(model['dual_coef'])} support vectors"):
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
    assert {name: model["training_data"][name] for name in ("real", "fake")} == {"real": 40, "fake": 40}
    assert int(model["training_data"]["sha256"], 16) and len(model["training_data"]["sha256"]) == 64
    assert model["metrics"]["test"] == json.loads((tmp_path / "out_report" / "metrics.json").read_text())["test"]


def test_the_same_seed_and_features_give_the_same_bytes(train):
    columns = make_columns(gap=1)
    first = train(columns, name="a")[0]
    assert train(columns, name="b")[0]["sha256"] == first["sha256"]
    other = train(columns, name="c", seed=1)[0]
    assert not np.array_equal(other["out_of_fold"]["scores"], first["out_of_fold"]["scores"])  # other folds


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
    elif what == "the order":
        return {name: column[::-1] for name, column in columns.items()}
    return columns


@pytest.mark.parametrize("what, other", [("a label", True), ("a file's bytes", True), ("an image less", True),
                                         ("a test image", False), ("the order", False)])
def test_the_hash_of_the_training_data_changes_with_them_and_only_with_them(monkeypatch, what, other):
    monkeypatch.setattr(train_model, "search", lambda *_: (1, 0.1))

    def digest(columns):
        rows = np.flatnonzero(columns["splits"] == "train")
        model = train_model.build_model(columns, rows, np.arange(len(columns["labels"])), ENCODER, training_arguments())
        return model["training_data"]["sha256"]
    columns = make_columns()
    assert (digest(changed(columns, what)) != digest(columns)) == other


def test_several_features_files_are_joined(train):
    model, metrics, _, told = train(make_columns(), make_columns(seed=1, splits=False) | {"splits": np.full(120, "train")})
    assert model["training_data"]["real"] == 40 + 60 and metrics["test"]["n"] == 40
    assert "200 images to train, 40 to test" in told


def test_a_test_split_of_one_class_is_measured_as_far_as_it_can_be(train):
    columns = make_columns()
    keep = (columns["splits"] == "train") | (columns["labels"] == 0)
    _, metrics, printed, _ = train({name: column[keep] for name, column in columns.items()})
    assert metrics["test"]["auc"] == {"value": None, "interval": [0, 1], "n": 20}
    assert metrics["test"]["recall_real"]["n"] == 20 and "n/a" in printed


# ---- refusals ----

def test_features_of_two_encoders_are_refused_and_both_are_named(command, tmp_path):
    other = {**ENCODER, "name": "ViT-L/14", "identity": "cd" * 32}
    files = [write_features(tmp_path / "a.npz"), write_features(tmp_path / "b.npz", encoder=other, seed=1)]
    assert_one_line_error(command(features=files), files[0], files[1], "made-up", "abababababab", "ViT-L/14", "cdcdcdcdcdcd")


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
    """All fakes to train on are copies of four pictures."""
    fakes = np.flatnonzero((columns["labels"] == 1) & (columns["splits"] == "train"))
    columns["sha256"][fakes] = columns["sha256"][fakes[np.arange(len(fakes)) % 4]]


@pytest.mark.parametrize("spoil, words", [
    (nan, ["1 rows hold NaN", "0/00007.jpg", "extract again"]), (infinite, ["1 rows hold NaN or infinite"]),
    (one_class, ["0 fake images to train on", "at least 20"]), (nineteen_fakes, ["19 fake images", "at least 20"]),
    (no_labels, ["0 real images"]), (four_pictures, ["only 4 groups of fake images for 5 folds", "add images"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_data_that_cannot_train_are_refused_in_one_line(command, tmp_path, spoil, words):
    columns = make_columns()
    spoil(columns)
    assert_one_line_error(command(features=[write_features(tmp_path / "f.npz", columns)]), *words)
    assert not (tmp_path / "out.joblib").exists()


@pytest.mark.parametrize("content, words", [
    (None, ["no such file", "extract_features.py"]), (b"hello", ["not a features file", "extract again"]),
    (b"", ["not a features file"]), (b"PK\x03\x04 cut", ["not a features file"]),
], ids=["missing", "text", "empty", "truncated"])
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
    result = script("train_model.py", "--features_file", features, "--model_output_path", tmp_path / place)
    assert_one_line_error(result, tmp_path / place)
    assert "images to train" not in result.stderr


def test_an_unknown_flag_is_refused(command):
    result = command("--modell", "x")
    assert result.returncode == 2 and "unrecognized arguments: --modell" in result.stderr


# ---- it learns what is there, and no more ----

def held_out(columns, model):
    """-> (labels, probabilities of fake) of rows that the model has not seen."""
    return columns["labels"].astype(int), probability(model, decision(model, columns["features"]))


def test_what_can_be_told_apart_is(train):
    _, metrics, _, _ = train(make_columns(gap=6))
    assert metrics["test"]["auc"]["value"] > 0.99 and metrics["test"]["accuracy"]["value"] > 0.95


@pytest.mark.parametrize("seed", range(4))
def test_on_noise_the_interval_of_the_auc_holds_one_half(seed):
    model = build(make_columns(gap=0, seed=seed))
    labels, p_fake = held_out(make_columns(real=150, fake=150, gap=0, seed=100 + seed), model)
    low, high = bootstrap(area, np.arange(300), labels, p_fake)
    assert low < 0.5 < high


def test_on_noise_the_out_of_fold_scores_are_chance():
    # C and gamma fixed: the best of twenty points would be a little above chance by the choice alone
    values = []
    for seed in range(20):
        columns = make_columns(gap=0, seed=seed)
        features, labels = columns["features"], columns["labels"].astype(int)
        values.append(auc(out_of_fold(features, labels, fold_rows(labels, np.arange(120), 0), 3, 0.05), labels))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 0.5) < 2.5 * error < 0.08


def grouped(seed):
    """80 places with five pictures each, nearly alike, and a label for each place that nothing in the pictures bears out."""
    rng, place = np.random.default_rng(seed), np.repeat(np.arange(80), 5)
    columns = make_columns(real=200, fake=200, splits=False)
    columns["features"] = (rng.normal(size=(80, 6))[place] + 0.05 * rng.normal(size=(400, 6))).astype(np.float32)
    columns["labels"] = rng.permutation(np.repeat(np.int8([0, 1]), 40))[place]
    columns["sources"] = np.array([f"place {i}" for i in place])
    return columns


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_permuted_by_group_are_chance_for_who_cannot_remember_the_group(train, seed):
    model, metrics, _, told = train(grouped(seed))
    assert "our own split by sources" in told
    scores = model["out_of_fold"]
    assert abs(auc(scores["scores"], scores["labels"]) - 0.5) < 0.15  # 1.0 where groups lie on both sides of a fold
    low, high = metrics["test"]["auc"]["interval"]
    slack = (high - low) / 2  # a 95% interval misses one time in twenty; twice as wide, next to never
    assert low - slack < 0.5 < high + slack


# ---- calibration ----

def true_probability(columns, gap):
    """Of two normal classes `gap` apart, at equal shares."""
    return 1 / (1 + np.exp(-gap * (columns["features"][:, 0].astype(float) - gap / 2)))


@pytest.mark.parametrize("real, fake", [(1000, 1000), (1500, 300), (300, 1500)], ids=["equal", "5 to 1", "1 to 5"])
def test_probabilities_hold_at_equal_shares_whatever_the_shares_in_training(real, fake):
    gap, columns = 1.5, make_columns(real=real, fake=fake, gap=1.5, dim=4)
    features, labels = columns["features"], columns["labels"].astype(int)
    scores = out_of_fold(features, labels, fold_rows(labels, np.arange(real + fake), 0), 1, 0.05)
    p_fake = probability({"calibrator": fit_sigmoid(scores, labels)}, scores)
    weights = balanced_weights(labels)

    assert abs(p_fake - true_probability(columns, gap)).mean() < 0.05
    assert np.average(p_fake, weights=weights) == pytest.approx(0.5, abs=0.01)
    error = 0
    for rows in np.array_split(np.argsort(p_fake), 10):
        stated, seen = (np.average(v[rows], weights=weights[rows]) for v in (p_fake, labels))
        error += abs(stated - seen) * weights[rows].sum() / weights.sum()
    assert error < 0.04


def test_a_model_trained_on_one_to_five_favours_neither_class():
    model = build(make_columns(real=60, fake=300, gap=1.5))
    labels, p_fake = held_out(make_columns(real=2000, fake=2000, gap=1.5, seed=1), model)
    found = measure(labels, p_fake, 0.5, labels)
    assert p_fake.mean() == pytest.approx(0.5, abs=0.05)
    assert found["recall_real"]["value"] == pytest.approx(found["recall_fake"]["value"], abs=0.1)


def test_weights_give_both_classes_the_same_sum_and_mean_one():
    labels = np.array([0] * 30 + [1] * 150)
    weights = balanced_weights(labels)
    assert weights[labels == 0].sum() == pytest.approx(weights[labels == 1].sum()) and weights.mean() == pytest.approx(1)


def test_fold_rows_refuses_fewer_groups_than_folds():
    labels = np.repeat([0, 1], 50)
    with pytest.raises(UsageError, match="only 4 groups of real images for 5 folds"):
        fold_rows(labels, np.concatenate([np.arange(50) % 4, 10 + np.arange(50)]), 0)


@pytest.mark.parametrize("copies, others, stops", [(51, 100, True), (50, 100, False), (60, 1300, False), (70, 1300, True)])
def test_one_picture_above_5_percent_of_the_data_and_50_images_stops_everything(copies, others, stops):
    columns = make_columns(real=copies + others - 40, fake=40)
    columns["thumb"][:copies] = columns["thumb"][0]
    if not stops:
        assert np.bincount(train_model.make_groups(columns)[0]).max() == copies
        return
    with pytest.raises(UsageError, match=f"^{copies} of {copies + others} images look like one .*remove the copies"):
        train_model.make_groups(columns)
