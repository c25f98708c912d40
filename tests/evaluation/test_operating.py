"""What a threshold or a review queue would do to a day of uploads."""

import numpy as np
import pytest
from test_report import MODEL, columns_for

from detector.base.errors import UsageError
from detector.evaluation import operating
from detector.model.threshold import choose_threshold, decide, training_scores

LABELS = np.repeat([0, 1], 50)
P_FAKE = np.concatenate([np.arange(50) / 100, 0.3 + np.arange(50) / 100])
PART = {"all": (LABELS, P_FAKE, np.arange(100))}


@pytest.fixture
def model():
    """A model whose scores out of fold are of 400 reals and 400 fakes that overlap."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 400).astype(np.int8)
    scores = rng.normal(np.where(labels == 1, 1.5, -1.5), 1).astype(np.float32)
    stored = {"scores": scores, "labels": labels, "view": np.zeros(800, np.int8)}
    return MODEL | {"out_of_fold": stored}


def row_of(table, **wanted):
    """The only row of a table with these values."""
    (row,) = (row for row in table if all(row[name] == value for name, value in wanted.items()))
    return row


def test_the_table_counts_a_day_by_hand(model):
    table = operating.operating_table(model | {"threshold": 0.4}, PART, 1000, (0.01, 0.5))
    row = row_of(table, rule="the model's own", prevalence=0.01)
    real, fake = 10 / 50, 40 / 50  # of 0.40 .. 0.49, and of 0.40 .. 0.79
    assert row["false_positives"]["value"] == real and row["caught"]["value"] == fake
    assert row["alarms"]["value"] == pytest.approx(990 * real + 10 * fake)
    assert row["false_alarms"]["value"] == pytest.approx(990 * real)
    assert row["precision"]["value"] == pytest.approx(10 * fake / (990 * real + 10 * fake))
    for name in ("false_positives", "caught", "precision", "alarms", "false_alarms"):
        low, high = row[name]["interval"]
        assert low < row[name]["value"] < high


def test_thresholds_come_from_the_training_and_not_from_the_images(model):
    p_fake, labels, view, _ = training_scores(model)
    for part in (PART, {"all": (LABELS, P_FAKE[::-1].copy(), np.arange(100))}):
        table = operating.operating_table(model, part, 1, (0.5,))
        assert [row["threshold"] for row in table] == [
            *(choose_threshold(p_fake, labels, rate, view) for rate in operating.RATES),
            model["threshold"],
        ]


def test_images_of_one_group_widen_the_intervals():
    alone = operating.at_threshold(PART["all"], 0.4)
    grouped = operating.at_threshold((LABELS, P_FAKE, np.arange(100) // 10), 0.4)
    for one, other in zip(alone, grouped, strict=True):
        assert one["interval"][0] > other["interval"][0]


def test_known_and_unseen_sources_are_apart_and_parts_of_one_class_are_left_out():
    sources = np.array(["camera", "generator", "new", "new", "other"])
    labels = np.array([0, 1, 0, 1, 1])
    columns = columns_for(labels, np.full(5, 0.5), sources)
    parts = operating.parts_of(MODEL, columns, np.arange(5.0), np.arange(5), ", re-saved")
    assert {name: part[1].tolist() for name, part in parts.items()} == {
        "known sources, re-saved": [0, 1],
        "sources never seen, re-saved": [2, 3, 4],
    }
    known = {name: values[:2] for name, values in columns.items()}
    assert list(operating.parts_of(MODEL, known, np.arange(2.0), np.arange(2))) == ["known sources"]
    unnamed = columns_for(labels, np.full(5, 0.5))
    assert list(operating.parts_of(MODEL, unnamed, np.arange(5.0), np.arange(5))) == ["all"]


def test_the_review_table_counts_a_day_by_hand():
    (row,) = operating.review_table(PART, (0.35, 0.45), 1000, (0.1,))
    decisions = np.array([decide(p, (0.35, 0.45)) for p in P_FAKE])
    real, fake = ({d: np.mean(decisions[LABELS == i] == d) for d in DECIDED} for i in (0, 1))
    assert row["queue"]["value"] == pytest.approx(900 * real["review"] + 100 * fake["review"])
    assert row["passed_fakes"]["value"] == pytest.approx(fake["pass"])
    assert row["rejected_reals"]["value"] == pytest.approx(real["reject"])
    passed, rejected = ((900 * real[d], 100 * fake[d]) for d in ("pass", "reject"))
    assert row["fakes_in_pass"]["value"] == pytest.approx(passed[1] / sum(passed))
    assert row["reals_in_reject"]["value"] == pytest.approx(rejected[0] / sum(rejected))


DECIDED = ("pass", "review", "reject")


def test_a_suggested_pair_keeps_both_limits_out_of_fold(model, capsys):
    low, high = operating.suggest_review(model, 0.01, 0.1)
    p_fake, labels, *_ = training_scores(model)
    assert 0 < np.mean(p_fake[labels == 0] >= high) <= 0.01
    assert 0.09 < np.mean(p_fake[labels == 1] < low) <= 0.1
    assert low < high
    said = capsys.readouterr().err
    assert said.startswith(f"suggested: --review {low:.4g} {high:.4g}; out of fold this rejects")


def test_a_single_threshold_may_keep_both_limits(model):
    low, high = operating.suggest_review(model, 0.3, 0.3)
    assert low == high


@pytest.mark.parametrize(
    "limits, words",
    [
        ((0.001, 0.2), "--max_false_reject 0.001 .400 images are too few, it takes 1000.;"),
        ((0.1, 0.002), "--max_missed 0.002 .400 images are too few, it takes 500.;"),
    ],
)
def test_a_limit_that_cannot_be_had_is_named(model, limits, words):
    with pytest.raises(UsageError, match=words):
        operating.suggest_review(model, *limits)


@pytest.mark.parametrize(
    "end, words",
    [(9, "max_false_reject 0.01 .it rejects no fake"), (-9, "max_missed 0.01 .it passes no real")],
)
def test_a_limit_that_leaves_no_decision_is_named(model, end, words):
    stored = model["out_of_fold"]
    scores, label = stored["scores"].copy(), 0 if end > 0 else 1
    scores[np.flatnonzero(stored["labels"] == label)[:50]] = end  # surest, and wrong
    changed = model | {"out_of_fold": stored | {"scores": scores}}
    with pytest.raises(UsageError, match=words):
        operating.suggest_review(changed, 0.01, 0.01)
