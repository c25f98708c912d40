"""From scores to a report: its metrics, texts, tables, page and model card."""

import csv
import json
import os
import re

import numpy as np
import pytest
from commands import ROOT
from PIL import Image
from test_audit import NOTHING
from test_metrics import scored

from detector.evaluation import metrics, operating, printed, report
from detector.evaluation.audit import leak_sentence
from detector.evaluation.intervals import share, words
from detector.evaluation.metrics import METRICS, measure
from detector.evaluation.pictures import condition
from detector.evaluation.printed import table
from detector.evaluation.report import (
    LEAST_IMAGES,
    assess,
    calibration_warning,
    elsewhere,
    fill,
    staged,
)
from detector.model import score

SHOWN = ("accuracy", *METRICS, "precision_real", "precision_fake")
MODEL = {
    "classifier": "logistic",
    "center": np.zeros(1),
    "scale": np.ones(1),
    "coef": np.ones(1),
    "intercept": 0.0,
    "calibrator": np.array([-1.0, 0.0]),
    "threshold": 0.5,
    "band": np.array([0.4, 0.7]),
    "hyperparameters": {"C": 0.01},
    "threshold_rule": {
        "words": "0.5 on the calibrated probability",
        "max_fpr": None,
        "band_error": 0.1,
    },
    "encoder": {"name": "made-up", "identity": "ab" * 32},
    "metrics": {
        "out_of_fold": {"value": 0.91, "interval": [0.88, 0.94], "n": 130},
        "left_out": {
            "sources": 3,
            "mean": 0.6,
            "worst": [{"source": "generator", "label": "fake", "n": 40, "value": 0.25}],
        },
    },
    "out_of_fold": {
        "scores": np.linspace(-3, 3, 130).astype(np.float32),
        "labels": (np.arange(130) > 69).astype(np.int8),
        "view": np.zeros(130, np.int8),
    },
    "versions": {"model": "v1.2.3", "code": "0123abc"},
    "training_data": {
        "sha256": "cd" * 32,
        "real": 70,
        "fake": 60,
        "views": 2,
        "sources": ["", "camera", "generator"],
        "images": np.arange(3),
    },
}
HOSTILE = '<script>alert("1")</script>'


def write_report(folder, result):
    with staged(folder) as place:
        fill(place, result)
    return folder


def columns_for(labels, p_fake, sources="", view=0):
    """Rows to which MODEL gives these probabilities."""
    return {
        "features": metrics.logit(p_fake)[:, None].astype(np.float32),
        "labels": np.asarray(labels),
        "view": np.full(len(labels), view),
        "sources": np.broadcast_to(np.asarray(sources, "U40"), len(labels)),
    }


def reported(labels, p_fake, sources="", **more):
    """The smallest report that `fill` takes: each image is a group, the audit has no findings."""
    rows = np.arange(len(labels))
    return {
        **report.about(MODEL),
        **assess(MODEL, columns_for(labels, p_fake, sources), rows, rows, rows),
        "audit": NOTHING,
        **more,
    }


def with_sources():
    """Scores of two known sources and three unseen sources, one with a hostile name."""
    labels, p_fake = scored(240)
    names = np.where(labels == 0, ["camera", "phone"] * 120, ["generator", "new"] * 120)
    names = names.astype("U40")
    names[::12] = HOSTILE
    return labels, p_fake, names


LEAK = {
    "what": "8x8 thumbnail",
    "leak": 0.6,
    "detector": 0.8,
    "how": "learnt on the training images",
    "difference": {"value": 0.2, "interval": [0.1, 0.3], "n": 240},
}


def training_report():
    """A report as train_model.py makes it."""
    right = share(np.arange(100) < 97)
    return reported(*with_sources()) | {
        "split": "our own split",
        "warnings": ["the rate is not certified"],
        "leak": LEAK,
        "false_alarms": {"untouched": right, "degraded": right},
        "classifiers": [
            {
                "classifier": kind,
                "hyperparameters": {"C": 1},
                "out_of_fold": right,
                "auc": right,
                "balanced_accuracy": right,
            }
            for kind in ("svm", "logistic")
        ],
        "leave_one_source_out": [{"source": HOSTILE, "label": "real", **right}],
        "audit": (
            NOTHING
            | {
                "labels": {
                    "images": 240,
                    "probable_errors": 1,
                    "first": [{"path": HOSTILE, "label": "real", "p_fake": 0.9}],
                    "doubtful_sources": [],
                }
            }
        ),
    }


def evaluation_report():
    """A report as evaluate.py makes it."""
    labels, p_fake, names = with_sources()
    known, rng = np.isin(names, MODEL["training_data"]["sources"]), np.random.default_rng(0)
    conditions = (("JPEG", "90", 0.05), ("JPEG", "30", 0.3), ("blur", "2 px", 0.2))
    noisy = [np.clip(p_fake + rng.normal(0, noise, 240), 0.01, 0.99) for *_, noise in conditions]
    rows = [
        condition(panel, level, labels, p, p_fake, 0.5, np.arange(240), known)
        for (panel, level, _), p in zip(
            (("untouched", "", 0), *conditions), (p_fake, *noisy), strict=True
        )
    ]
    probes = [{"what": HOSTILE, "auc": share(labels == 0), "on_test": None}]
    columns = columns_for(labels, p_fake, names)
    parts = operating.parts_of(MODEL, columns, p_fake, np.arange(240))
    return reported(
        labels,
        p_fake,
        names,
        **operating.tables(MODEL, parts, (0.2, 0.8), 500, (0.01, 0.5)),
        robustness=rows,
        arms=rows[:2],
        leak=LEAK,
        warnings=["the threshold is stale"],
        hardest=[{"path": HOSTILE, "label": "real", "p_fake": 0.99}],
        audit=NOTHING | {"probes": probes},
    )


REPORTS = {"training": training_report, "evaluation": evaluation_report}


@pytest.fixture(scope="module", params=REPORTS)
def written(request, tmp_path_factory):
    """-> (folder, the report written to it)"""
    report = REPORTS[request.param]()
    return write_report(tmp_path_factory.mktemp(request.param), report), report


# ---- from scores to numbers ----


def test_degraded_copies_known_and_unseen_sources_are_measured_apart():
    labels, p_fake, names = with_sources()
    columns = columns_for(labels, p_fake, names)
    many = {name: np.concatenate([column, column[:50]]) for name, column in columns.items()}
    many["view"][240:] = 1
    rows = np.arange(290)
    assessed = assess(MODEL, many, rows, np.tile(np.arange(240), 2)[:290], rows)
    known = np.isin(names, ["camera", "generator"])
    exact = score.probability(MODEL, many["features"][:240, 0])
    sure = (p_fake < 0.4) | (p_fake > 0.7)
    for part, mask in (("overall", known | True), ("known", known), ("unseen", ~known)):
        assert assessed[part] == measure(labels[mask], exact[mask], 0.5, np.flatnonzero(mask))
        answered = assessed["abstention"][part]["answered"]["value"]
        assert answered == pytest.approx(sure[mask].mean())
    degraded, right = assessed["degraded"], (p_fake >= 0.5) == labels
    assert degraded["n"] == 50 and degraded["accuracy"]["value"] == right[:50].mean()
    assert {row["source"]: row["known"] for row in assessed["by_source"]} == {
        "camera": True,
        "generator": True,
        "phone": False,
        "new": False,
        HOSTILE: False,
    }
    scores = {"labels": labels.tolist(), "p_fake": pytest.approx(p_fake.tolist(), abs=2e-6)}
    assert assessed["scores"] == scores
    assert assess(MODEL, many, rows[:240][known], rows, rows)["unseen"] is None


def test_the_slope_before_the_calibration_is_that_of_the_decision_values():
    labels, p_fake = scored()
    model, rows = MODEL | {"calibrator": np.array([-2.0, 0.0])}, np.arange(200)
    result = assess(model, columns_for(labels, p_fake), rows, rows, rows)
    assert result["uncalibrated"]["slope"]["value"] == pytest.approx(
        2 * result["calibration"]["slope"]["value"], rel=1e-6
    )
    raw = score.probability(MODEL, columns_for(labels, p_fake)["features"][:, 0].astype(float))
    assert result["uncalibrated"] == metrics.calibration(labels, raw, rows)


# ---- in words ----


def test_a_metric_in_words_has_its_interval_where_it_has_one():
    assert words({"value": 0.123, "interval": [0.1, 0.2]}) == "0.12 [0.10, 0.20]"
    assert words({"value": 0.5, "interval": None}, 3) == "0.500"
    assert words(None) == words({"value": None, "interval": [0, 1]}) == "n/a"


def test_the_table_has_a_line_for_each_metric_with_value_interval_and_number():
    result = measure(*scored(), 0.5, np.arange(200))
    lines = table(result).splitlines()[1:]
    for name, line in zip(SHOWN, lines, strict=True):
        value, (low, high), n = (result[name][key] for key in ("value", "interval", "n"))
        assert line.startswith(METRICS[name][0] if name in METRICS else name.replace("_", " "))
        assert line.endswith(f" {value:.3f}  {low:.3f} .. {high:.3f}  {n}")


@pytest.mark.parametrize(
    "value, ends, word",
    [
        (0.5, [0.4, 0.6], "overconfident"),
        (2, [1.5, 2.5], "underconfident"),
        (0.5, [0.1, 1.1], None),
        (0.7, [0.6, 0.79], "overconfident"),
        (0.7, [0.6, 0.81], None),
        (1.4, [1.26, 1.6], "underconfident"),
        (1.4, [1.24, 1.6], None),
        (0.5, None, None),
        (None, None, None),
    ],
)
def test_a_slope_with_an_interval_far_from_1_gives_a_warning(value, ends, word):
    slope = {"value": value, "interval": ends}
    line = calibration_warning({"slope": slope})
    assert line is None if word is None else word in line and words(slope) in line
    assert calibration_warning(None) is None


def test_a_printed_training_and_evaluation_hold_all_their_parts():
    result = training_report() | {"degraded": None}
    text = printed.training(result)
    for part in (
        table(result["overall"]),
        "logistic, C 0.01, on 'made-up'; threshold 0.500 (0.5 on the calibrated probability)",
        "the best out of fold was chosen",
        "called fake, out of fold: 0.970 [0.915, 0.990] of 100 real training images",
        "calibration slope",
        "detector minus best leak",
        HOSTILE[:43],
    ):
        assert part in text
    result = evaluation_report()
    text = printed.evaluation(result)
    for part in (
        table(result["known"]),
        table(result["unseen"]),
        "WARNING  the threshold is stale",
        "sources never seen",
        "verdicts flipped",
        "2 px",
        "of 500 uploads a day a share of 0.01 is fake",
        "the model's own: from 0.500",
        "pass below 0.2, reject from 0.8, of 500 uploads a day:",
    ):
        assert part in text
    assert "not measured" not in text
    text = printed.evaluation(result | {"not_measured": ["a", "b"]})
    assert "not measured without pictures (use --data_dir): a; b" in text
    assert "nan" not in text.lower().replace("unseen", "")


# ---- files ----


def parsed(path):
    """Standard JSON: Python's own NaN and Infinity are refused."""

    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def assert_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 130
        assert np.asarray(image.convert("L")).std() > 5  # something is drawn


def files(folder):
    return {path.name for path in folder.iterdir()}


ALWAYS = {
    "metrics.json",
    "overall.csv",
    "sources.csv",
    "report.html",
    "MODEL_CARD.md",
    "confusion_matrix.png",
    "roc.png",
    "calibration.png",
    "risk_coverage.png",
}


def test_a_report_is_one_json_file_tables_plots_a_page_and_a_model_card(written):
    folder, result = written
    more = {"left_out.csv"}
    if "robustness" in result:
        more = {"robustness.csv", "arms.csv", "robustness.png", "operating.png"}
        more |= {"operating.csv", "review.csv"}
    assert files(folder) == ALWAYS | {"sources.png"} | more
    assert parsed(folder / "metrics.json") == json.loads(json.dumps(result))
    for path in folder.glob("*.png"):
        assert_picture(path)


@pytest.mark.parametrize(
    "labels, p_fake",
    [
        scored(),
        scored(12),
        scored(fakes=0),
        scored(fakes=1),
        (np.array([0, 1]), np.array([0.2, 0.2])),
        (np.array([0] * 20 + [1] * 20), np.repeat([1e-9, 1 - 1e-9], 20)),
    ],
    ids=["200 images", "12 images", "reals only", "fakes only", "all alike", "all right"],
)
def test_a_report_of_few_images_one_class_or_no_errors_is_whole_and_without_nan(
    tmp_path, labels, p_fake
):
    result = reported(labels, p_fake)
    folder = write_report(tmp_path / "a" / "report", result)
    assert files(folder) == ALWAYS
    for path in folder.glob("*.png"):
        assert_picture(path)
    stored = parsed(folder / "metrics.json")
    ends = [
        stored["overall"][name]["interval"] for name in SHOWN if stored["overall"][name]["interval"]
    ]
    assert ends and all(0 <= low <= high for low, high in ends)
    for text in (
        table(stored["overall"]),
        (folder / "report.html").read_text(),
        (folder / "MODEL_CARD.md").read_text(),
    ):
        assert not re.search(r"\b(nan|inf|None|Undefined)\b", re.sub('base64,[^"]*', "", text))


def test_the_tables_agree_with_the_json_file(written):
    folder, _ = written
    stored = parsed(folder / "metrics.json")
    parts = [{"images": part, **stored[part]} for part in report.PARTS if stored[part]]
    tables = {"overall": parts, "sources": stored["by_source"]}
    names = ("robustness", "arms", "operating")
    tables |= {name: stored[name] for name in names if name in stored}
    for name, rows in tables.items():
        with open(folder / f"{name}.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines[0]) > 15
        for line, row in zip(lines, rows, strict=True):
            for column, text in line.items():
                value = cell(row, column)
                assert text == ("" if value is None else str(value)) or float(text) == value, column


def cell(row, column):
    """The value of a column of a CSV table, from the row of metrics.json."""
    metric, end = re.fullmatch("(.*?)(_low|_high)?", column).groups()
    value = row[metric]
    if not isinstance(value, dict):
        return value
    low, high = value["interval"] or [None, None]
    return {None: value["value"], "_low": low, "_high": high}[end]


def page(folder):
    """-> (report.html without its pictures, their number)"""
    return re.subn(
        r"data:image/png;base64,[A-Za-z0-9+/=]{1000,}",
        "PICTURE",
        (folder / "report.html").read_text(),
    )


def test_the_page_loads_nothing_and_holds_every_plot(written):
    folder, result = written
    text, number = page(folder)
    assert number == len(list(folder.glob("*.png")))
    assert set(re.findall(r"(?:src|href|action|data)\s*=\s*[\"']?([^\"'\s>]*)", text)) == {
        "PICTURE"
    }
    assert not re.search(r"http|//|@import|url\(|<link|<iframe|<object|<embed", text)


def test_names_are_escaped_in_the_page(written):
    text, _ = page(written[0])
    assert "<script" not in text and "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;" in text
    assert text.count("&lt;script") >= 3  # a source, a path, a probe or a source held out


def test_every_row_of_a_table_of_the_page_has_as_many_cells_as_its_head(written):
    tables = re.findall(r"<table>(.*?)</table>", page(written[0])[0], re.S)
    assert len(tables) >= 6
    for text in tables:
        rows = re.findall(r"<tr>(.*?)</tr>", text, re.S)
        cells = {len(re.findall(r"<t[dh]>", row)) for row in rows}
        assert len(rows) >= 2 and len(cells) == 1, rows[0]


def test_the_page_shows_the_metrics_of_the_report(written):
    folder, result = written
    text, _ = page(folder)
    for metric in (
        result["overall"]["auc"],
        result["known"]["balanced_accuracy"],
        result["unseen"]["accuracy_fake"],
        result["base_rates"]["0.01"],
        result["calibration"]["slope"],
        result["abstention"]["unseen"]["answered"],
        result["by_source"][0]["own"],
    ):
        assert words(metric) in text
    for part in result.get("warnings", []) + [row["level"] for row in result.get("robustness", [])]:
        assert part in text
    for row in result.get("leave_one_source_out", []) + result.get("classifiers", []):
        assert words(row.get("out_of_fold", row)) in text


def card(folder):
    return re.sub(r"[\s*]+", " ", (folder / "MODEL_CARD.md").read_text())


def test_the_model_card_names_the_uses_that_are_not_intended(written):
    sections = {part.split(" ")[0]: part for part in card(written[0]).split(" ## ")}
    for part in (
        "identity documents",
        "local edits of real photographs",
        "images of a few pixels",
        "screenshots",
        "artwork",
        "not evidence on its own",
        "do not decide about a person",
    ):
        assert part in sections["Intended"], part
    for part in ("Identity documents", "local edits", "tiny images", "screenshots and artwork"):
        assert part in sections["Limits"], part
    assert "People reach 62%" in sections["Metrics"]


def test_the_model_card_has_the_numbers_of_the_json_file_beside_it(written):
    folder, result = written
    text, stored = card(folder), parsed(folder / "metrics.json")
    for part in ("overall", "known", "unseen"):
        assert all(f"| {words(stored[part][name])} |" in text for name in METRICS)
    for share_, metric in stored["base_rates"].items():
        assert f"| {100 * float(share_):g}% | {words(metric)} |" in text
    assert ("Not measured: run `evaluate.py" in text) == ("robustness" not in stored)
    for row in stored.get("robustness", []):
        assert (
            f"| {row['panel']} | {row['level']} | {words(row['balanced_accuracy'])} |"
            f" {words(row['flipped'])} |".replace("  ", " ")
            in text
        )
    assert (
        "Trained on 70 real and 60 fake images and degraded copies, 2 of each, of 2 sources" in text
        and "stated error rate 10%" in text
    )


def test_the_tables_of_the_model_card_are_tables(written):
    blocks = re.findall(r"(?:^\|.*\n)+", (written[0] / "MODEL_CARD.md").read_text(), re.M)
    assert len(blocks) >= 3
    for block in blocks:
        rows = block.splitlines()
        assert (
            re.fullmatch(r"\|(-+\|)+", rows[1])
            and len(rows) >= 3
            and len({row.count("|") for row in rows}) == 1
        ), block


def test_the_model_card_begins_with_the_training_and_the_worst_sources_left_out(written):
    text = card(written[0])
    assert (
        "In training : AUC 0.91 [0.88, 0.94] on the training images, out of fold; with each of 3"
        " sources left out of the training in turn, on average 60% of its images of a class get"
        " the right verdict; worst on generator (fake, 40 images: 25% right)." in text
    )
    assert text.index("In training") < text.index("On sources never seen")


def test_the_model_card_names_unseen_sources_and_the_worst_of_them(written):
    folder, result = written
    text, unseen = card(folder), [row for row in result["by_source"] if not row["known"]]
    listed = [row for row in unseen if row["n"] >= LEAST_IMAGES]
    worst = min(listed, key=lambda row: row["own"]["value"])
    assert text.index("On sources never seen") < text.index("## Model")
    name = worst["source"].replace("<", "&lt;")
    assert (
        f"On sources never seen : AUC {words(result['unseen']['auc'])}, balanced accuracy"
        f" {words(result['unseen']['balanced_accuracy'])} on {result['unseen']['n']} images of"
        f" {len(unseen)} sources; worst on {name} ({worst['label']}, {worst['n']} images: " in text
    )


def test_a_card_without_unseen_sources_has_no_sentence_on_them():
    assert elsewhere({"unseen": None}) == ""
    assert report.training_words({"out_of_fold": None, "left_out": None}) == ""


def test_a_demonstration_is_marked_on_the_page_and_the_card(tmp_path):
    folder = write_report(tmp_path, reported(*scored(), notice="this encoder is a toy"))
    assert '<p class="warn">this encoder is a toy</p>' in page(folder)[0]
    assert "A demonstration. This encoder is a toy." in card(folder)


def test_the_page_lists_images_and_predictions_csv_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SHOWN_IMAGES", 2)
    rows = [{"path": f"{i}.jpg", "source": HOSTILE, "p_fake": i / 10} for i in range(3)]
    with staged(tmp_path) as place:
        fill(place, evaluation_report(), rows)
    text = page(tmp_path)[0]
    assert "The 2 most confidently wrong of\n3 images" in text
    assert "1.jpg" in text and "2.jpg" not in text
    assert text.count("<script") == 1
    with open(tmp_path / "predictions.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines == [{name: str(value) for name, value in row.items()} for row in rows]


def test_all_but_the_worst_sources_are_folded(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "WORST", 2)
    result = evaluation_report()
    text = page(write_report(tmp_path, result))[0]
    table, folded = text.split("<details><summary>3 other sources</summary>")
    table = table[table.index("<h2>Worst sources</h2>") :]
    for number, row in enumerate(result["by_source"]):
        assert f"<td>{words(row['own'])}</td>" in (table if number < 2 else folded)


def test_the_contact_sheet_is_on_the_page_where_it_exists(tmp_path):
    result = evaluation_report()
    with staged(tmp_path) as place:
        Image.effect_noise((200, 200), 90).save(place / "hardest.png")
        fill(place, result)
    assert "contact sheet" in page(tmp_path)[0]
    assert "contact sheet" not in page(write_report(tmp_path, result | {"hardest": []}))[0]


def test_the_report_leaves_no_figure_open_and_can_be_written_again(tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    for seed in (0, 1):
        write_report(tmp_path, reported(*scored(seed=seed)))
    assert pyplot.get_fignums() == before
    assert parsed(tmp_path / "metrics.json")["scores"]["labels"] == scored(seed=1)[0].tolist()


def test_the_shipped_reports_are_complete_and_their_cards_are_remade():
    for folder in (ROOT / "models" / "baseline_report", ROOT / "models" / "evaluation"):
        stored = parsed(folder / "metrics.json")
        assert {"encoder", "overall", "by_source", "scores", "audit"} <= stored.keys()
        # There is no page: it would hold pictures.
        assert {"MODEL_CARD.md", "overall.csv", "sources.csv"} <= files(folder)
        assert (folder / "MODEL_CARD.md").read_text() == report.render("model_card.md", stored)


def test_a_name_that_is_not_utf_8_or_holds_a_line_end_is_escaped_in_every_file(tmp_path):
    name = os.fsdecode(b"caf\xe9\nfake")
    labels, p_fake = scored()
    sources = np.where(np.arange(len(labels)) % 2, name, "other")
    result = reported(labels, p_fake.clip(0.001, 0.999), sources)
    folder = write_report(tmp_path / "report", result)
    escaped = "caf\\udce9\\nfake"
    assert escaped in {
        row["source"] for row in json.loads((folder / "metrics.json").read_text())["by_source"]
    }
    for file in ("sources.csv", "report.html", "MODEL_CARD.md"):
        assert escaped in (folder / file).read_bytes().decode(), file
    assert (folder / "sources.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "value, digits, text",
    [(-0.001, 2, "0.00"), (-0.0, 3, "0.000"), (-0.006, 2, "-0.01"), (0.5, 2, "0.50")],
)
def test_a_figure_is_never_minus_zero(value, digits, text):
    assert words({"value": value, "interval": [value, value]}, digits) == f"{text} [{text}, {text}]"
    difference = {"value": value, "interval": None}
    leak = {"what": "format", "leak": value, "detector": value, "how": "", "difference": difference}
    assert "-0.00 " not in leak_sentence(leak)
