"""report.html in a real browser: a table that sorts and filters, and no requests."""

import numpy as np
import pytest
from made_up import build, make_columns, write_features

from detector.evaluation import assess
from detector.model.file import save_model


@pytest.fixture
def page(browser, tmp_path, monkeypatch):
    """The report of an evaluation, opened from its file; `requests` lists what it asked for."""
    monkeypatch.setattr(assess, "cross_validated_leak", lambda *_: None)
    save_model(tmp_path / "m.joblib", build(make_columns(seed=1)))
    columns = make_columns(real=12, fake=12, seed=2, gap=0.5, splits=False)
    columns["sources"] = np.array(["camera", "studio"] * 12, "U20")
    features = write_features(tmp_path / "f.npz", columns)
    flags = {"model_path": tmp_path / "m.joblib", "features_file": features}
    assess.evaluate(**flags, report_dir=tmp_path / "out", review=(0.2, 0.8))
    context = browser.new_context()
    page = context.new_page()
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto((tmp_path / "out" / "report.html").as_uri())
    yield page
    context.close()


def column(page, number):
    cells = page.locator(f"#images tbody tr:visible td:nth-child({number})")
    return cells.all_inner_texts()


def test_a_reader_sorts_and_filters_the_images(page):
    p_fake, labels = column(page, 5), column(page, 4)
    wrong = [
        float(p) if label == "real" else 1 - float(p)
        for p, label in zip(p_fake, labels, strict=True)
    ]
    assert len(wrong) == 24 and wrong == sorted(wrong, reverse=True)
    heading = page.get_by_role("button", name="p fake")
    for rising in (True, False):
        heading.click()
        values = [float(text) for text in column(page, 5)]
        assert values == sorted(values, reverse=not rising)
    page.get_by_label("Show rows that contain").fill("Studio")
    assert column(page, 2) == ["studio"] * 12
    page.get_by_label("Show rows that contain").fill("")
    assert len(column(page, 2)) == 24


def test_the_report_asks_for_nothing_but_its_own_file(page):
    assert [url.split(":")[0] for url in page.requests] == ["file"]
