"""evaluate.py and audit.py on images that a table labels: the figures of the same folders."""

import json
import shutil

import numpy as np
import pytest
from commands import assert_one_line_error
from made_up import BASELINE, make_columns, write_features

import audit as audit_command
import evaluate
from detector.evaluation import assess, audit, report
from detector.images.folders import read_folder

COUNTS = {f"test/{label}/{source}": 6 for label in ("real", "fake") for source in ("a", "b")}


@pytest.fixture(scope="module")
def folder(make_folder, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"), COUNTS)


@pytest.fixture
def flat(folder, tmp_path):
    """The same images in one folder -> (folder, function: group of each image -> its table)."""
    (tmp_path / "flat").mkdir()
    entries = read_folder(folder).entries
    for i, entry in enumerate(entries):
        shutil.copy(folder / entry.path, tmp_path / "flat" / f"{i:02d}.jpg")

    def write(group=lambda i: ""):
        lines = [
            f"{i:02d}.jpg,{e.label},{e.split},{e.source},{group(i)}" for i, e in enumerate(entries)
        ]
        (tmp_path / "labels.csv").write_text("\n".join(["path,label,split,source,group", *lines]))
        return tmp_path / "labels.csv"

    return tmp_path / "flat", write


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Function: flags of evaluate.py, in this process -> metrics.json. It has no probes."""
    monkeypatch.setattr(audit, "probe_all", lambda *_: [])
    monkeypatch.setattr(assess, "cross_validated_leak", lambda *_: None)

    def call(**flags):
        flags |= {"model_path": BASELINE, "robustness_images": 1, "report_dir": tmp_path / "out"}
        evaluate.main([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
        return json.loads((tmp_path / "out" / "metrics.json").read_text())

    return call


def test_a_table_and_folders_give_the_same_evaluation(folder, flat, run):
    data, write = flat
    by_folder, by_table = run(data_dir=folder), run(data_dir=data, labels_file=write())
    measured = ("overall", "by_source", "over_sources", "calibration", "scores", "data", "arms")
    assert all(by_table[name] == by_folder[name] for name in measured)


def test_a_group_counts_once_in_the_intervals_of_an_evaluation(flat, run, monkeypatch):
    data, write = flat
    measure, numbers = report.assess, []

    def assess_and_count(*words):  # groups of intervals over all images, and over each source
        numbers.extend(len(set(groups)) for groups in words[3:])
        return measure(*words)

    monkeypatch.setattr(report, "assess", assess_and_count)
    metrics = run(data_dir=data, labels_file=write(lambda i: f"scene {i // 3}"))
    assert metrics["data"]["groups"] == "near-identical images and given groups"
    assert metrics["overall"]["n"] == 24 and numbers == [8, 8]


def test_the_audit_of_a_table_is_that_of_the_same_folders(folder, flat, capsys):
    data, write = flat
    audit_command.main(["--data_dir", str(folder), "--json"])
    by_folder = capsys.readouterr().out
    audit_command.main(["--data_dir", str(data), "--labels_file", str(write()), "--json"])
    assert capsys.readouterr().out == by_folder and json.loads(by_folder)["images"] == 24


def test_the_audit_groups_the_images_of_a_table(flat):
    data, write = flat
    columns, _ = audit.describe_folder(data, write(lambda i: "x" if i < 2 else ""))
    assert columns["groups"].tolist() == ["x"] * 2 + [""] * 22
    assert audit.audit(columns)["groups"] == "near-identical images and given groups"


@pytest.mark.parametrize("script_name", ["audit.py", "evaluate.py"])
def test_a_table_beside_features_is_refused(script, tmp_path, script_name):
    flags = "--features_file", write_features(tmp_path / "f.npz"), "--labels_file", "labels.csv"
    assert_one_line_error(
        script(script_name, *flags), "--labels_file labels.csv", "leave out --features_file"
    )


def test_a_source_can_be_doubted_where_groups_are_given(monkeypatch):
    columns = make_columns()
    columns["sources"] = np.array([f"s{i // 10}" for i in range(120)])
    columns["groups"][:2] = "x"
    seen = []
    monkeypatch.setattr(audit, "audit_labels", lambda *words: seen.append(words[-1]))
    audit.labels_of(columns)
    assert seen == [True]
