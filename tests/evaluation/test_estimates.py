"""What is drawn to be labelled, and what the labels say of the whole folder."""

import json

import numpy as np
import pytest
from commands import ROOT
from sklearn.metrics import cohen_kappa_score

from detector.evaluation import sampling

N = 600


@pytest.fixture(scope="module")
def folder():
    """A folder with 20% fakes: labels, probabilities of fake, verdicts, images of each row."""
    rng = np.random.default_rng(0)
    labels = (np.arange(N) < N // 5).astype(int)
    p_fake = 1 / (1 + np.exp(-rng.normal(np.where(labels == 1, 1.5, -1.5), 1.5)))
    return labels, p_fake, p_fake >= 0.5, 1 + (rng.random(N) < 0.1)


def true_figures(labels, fake, images):
    certain = np.ones(len(labels))
    return {
        name: figure["value"]
        for name, figure in sampling.estimates(labels, fake, certain, images).items()
    }


@pytest.mark.parametrize("number", [10, 200, 599, 600, 900])
def test_each_draw_has_its_number_and_half_of_it_is_chance(folder, number):
    weights = sampling.closeness(folder[1], 0.5)
    probabilities = sampling.inclusion(weights, number)
    assert probabilities.max() <= 1
    assert probabilities.sum() == pytest.approx(min(number, N))
    if number < 300:
        assert probabilities.min() > 0.5 * number / N
        near = np.argsort(-weights)[: N // 10]
        assert probabilities[near].mean() > 1.5 * number / N
    for seed in range(20):
        rows = sampling.draw(probabilities, seed)
        assert len(rows) == min(number, N) == len(set(rows.tolist()))
    assert not np.array_equal(sampling.draw(probabilities, 0), sampling.draw(probabilities, 1)) or (
        number >= N
    )


def test_each_row_is_drawn_as_often_as_its_probability_says(folder):
    probabilities = sampling.inclusion(sampling.closeness(folder[1], 0.5), 60)
    times = np.zeros(N)
    for seed in range(2000):
        times[sampling.draw(probabilities, seed)] += 1
    noise = np.sqrt(probabilities * (1 - probabilities) / 2000)
    assert np.abs(times / 2000 - probabilities).max() < 5 * noise.max()


def test_the_truth_lies_in_95_of_100_intervals_and_not_without_the_weights():
    """On the images of the shipped evaluation; docs/labelling.md states the result."""
    report = json.loads((ROOT / "models" / "evaluation" / "metrics.json").read_text())
    labels, p_fake = (np.array(report["scores"][name]) for name in ("labels", "p_fake"))
    fake, images = p_fake >= report["threshold"], np.ones(len(labels))
    truth = true_figures(labels, fake, images)
    probabilities = sampling.inclusion(sampling.closeness(p_fake, report["threshold"]), 150)
    hits = {name: [[], []] for name in truth}
    for seed in range(4000):
        rows = sampling.draw(probabilities, seed)
        for weighted, drawn in enumerate((np.full(150, 150 / len(labels)), probabilities[rows])):
            figures = sampling.estimates(labels[rows], fake[rows], drawn, images[rows])
            for name, figure in figures.items():
                low, high = figure["interval"]
                hits[name][weighted].append(low <= truth[name] <= high)
    assert all(0.935 <= np.mean(weighted) <= 0.965 for _, weighted in hits.values())
    assert np.mean(hits["accuracy"][0]) < 0.05


def test_a_whole_folder_that_is_labelled_leaves_no_doubt(folder):
    labels, _, fake, images = folder
    figures = sampling.estimates(labels, fake, np.ones(N), images)
    right = (fake == (labels == 1)) * images
    assert figures["accuracy"]["value"] == pytest.approx(right.sum() / images.sum())
    assert figures["accuracy"]["more"] == 0


def test_so_many_more_labels_halve_the_interval(folder):
    labels, p_fake, fake, images = folder

    def prevalences(number):
        probabilities = sampling.inclusion(sampling.closeness(p_fake, 0.5), number)
        for seed in range(100):
            rows = sampling.draw(probabilities, seed)
            given = labels[rows], fake[rows], probabilities[rows], images[rows]
            yield sampling.estimates(*given)["prevalence"]

    few = list(prevalences(80))
    more = round(np.mean([figure["more"] for figure in few]))
    before, after = (
        np.mean([np.ptp(figure["interval"]) for figure in figures])
        for figures in (few, prevalences(80 + more))
    )
    assert after / before == pytest.approx(0.5, abs=0.1)


def test_without_an_image_called_fake_there_is_no_precision():
    labels, fake = np.array([0, 1, 0]), np.zeros(3, bool)
    figures = sampling.estimates(labels, fake, np.full(3, 0.5), np.ones(3))
    assert figures["precision"] == {"value": None, "interval": [0.0, 1.0], "n": 0, "more": 2}
    assert figures["false_positive_rate"]["value"] == 0
    assert figures["false_positive_rate"]["interval"][1] > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    first = rng.choice(["real", "fake", "cannot tell"], 80)
    second = np.where(rng.random(80) < 0.7, first, rng.choice(["real", "fake"], 80))
    kappa = sampling.kappa(first.tolist(), second.tolist())
    assert kappa["value"] == pytest.approx(cohen_kappa_score(first, second))
    low, high = kappa["interval"]
    assert -1 <= low < kappa["value"] < high <= 1


def test_two_people_with_one_label_for_all_have_no_kappa():
    assert sampling.kappa(["real"] * 9, ["real"] * 9)["value"] is None
