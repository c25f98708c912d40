"""audit.py: duplicates across splits and labels, file facts that separate the labels, bad files."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import small
from commands import assert_one_line_error
from made_up import make_columns, write_features
from PIL import Image
from test_facts import COPIES
from written import encode, jpeg

import audit as command
from detector.evaluation import audit, rules
from detector.evaluation.audit import audit_labels, labels_of, leak_sentence, sentences
from detector.evaluation.intervals import wilson
from detector.images.facts import describe_image


def columns_of(*images):
    """(file bytes, label, split) of each -> the columns that `audit` needs."""
    described = [describe_image(data)[1] for data, _, _ in images]
    return {
        "paths": np.array([f"{i}.jpg" for i in range(len(images))]),
        "sources": np.full(len(images), ""),
        "groups": np.full(len(images), ""),
        "labels": np.array([label for _, label, _ in images]),
        "splits": np.array([split for _, _, split in images]),
        **{name: np.array([row[name] for row in described]) for name in described[0]},
    }


def crops(pictures, n, sizes, seed):
    """n different crops of these (width, height) sizes."""
    rng, all_pictures = np.random.default_rng(seed), list(pictures.values())
    for i in range(n):
        picture, (width, height) = all_pictures[rng.integers(8)], sizes[i % len(sizes)]
        left, top = rng.integers(picture.width - width), rng.integers(picture.height - height)
        yield picture.crop((left, top, left + width, top + height))


# ---- facts that separate the labels ----

SIZES = [(160, 120), (120, 160), (140, 140), (200, 150), (180, 180)]
BYTES = {"bytes per pixel", "bytes per pixel for what is in the picture"}
QUALITY = {"quantisation", "quantisation table", "blockiness"} | BYTES
PLANTS = {
    # what is planted: (sizes of reals, their JPEG quality, sizes of fakes, their quality,
    # the probes that must separate the labels, the probes that may)
    "nothing": (SIZES, 75, SIZES, 75, set(), set()),
    "fakes are square": ([(196, 100), (100, 196)], 75, [(140, 140)], 75, {"aspect ratio"}, BYTES),
    "fakes are large": ([(100, 100)], 75, [(250, 250)], 75, {"pixels"}, BYTES | {"8x8 thumbnail"}),
    "fakes have sides of 64": (
        [(130, 132), (188, 196)],
        75,
        [(128, 128), (192, 192)],
        75,
        {"sides that are multiples of 64"},
        BYTES | {"aspect ratio", "pixels"},
    ),
    "reals are saved better": (SIZES, 95, SIZES, 40, QUALITY, set()),
}


@pytest.mark.parametrize(
    "real_sizes, real_quality, fake_sizes, fake_quality, expected, may", PLANTS.values(), ids=PLANTS
)
def test_only_the_planted_facts_are_reported(
    pictures, real_sizes, real_quality, fake_sizes, fake_quality, expected, may
):
    reals = [
        (jpeg(image, real_quality), 0, "train") for image in crops(pictures, 60, real_sizes, 0)
    ]
    fakes = [
        (jpeg(image, fake_quality), 1, "train") for image in crops(pictures, 60, fake_sizes, 1)
    ]
    findings = audit.audit(columns_of(*reals, *fakes))
    fatal, note = sentences(findings)
    lines = [line for line in fatal + note if " alone " in line]
    reported = {line.split(" alone separates the labels: AUC ")[0] for line in lines}
    assert expected <= reported <= expected | may | ({"all file facts"} if expected else set())
    ends = {p["what"]: p["auc"]["interval"] for p in findings["probes"]}
    assert reported == {what for what, (low, _) in ends.items() if low >= rules.TELLING_AUC}
    assert len(fatal) == sum(ends[what][1] >= rules.LEAK_AUC for what in reported)
    assert bool(fatal) == bool(expected)
    assert all("cross-validated over near-identical images" in line for line in lines)
    assert not any("learnt on train" in line for line in lines)


def test_the_formats_of_each_label_are_counted(pictures):
    a, b, c, d = crops(pictures, 4, SIZES, 0)
    findings = audit.audit(
        columns_of((jpeg(a), 0, ""), (jpeg(b), 0, ""), (encode(c, "PNG"), 1, ""), (jpeg(d), 1, ""))
    )
    assert findings["formats"] == {"real": {"JPEG": 2}, "fake": {"PNG": 1, "JPEG": 1}}


# ---- duplicates ----


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_test_image_with_a_copy_in_train_is_fatal(pictures, copy):
    one, *rest = pictures.values()
    findings = audit.audit(
        columns_of(
            (encode(one, "PNG"), 0, "train"),
            (copy(one), 0, "test"),
            *(
                (jpeg(picture), i % 2, ("train", "test")[i // 2 % 2])
                for i, picture in enumerate(rest)
            ),
        )
    )
    assert (
        findings["twins"]["test_with_twin_in_train"] == 1
        and findings["twins"]["clusters_with_both_labels"] == 0
    )
    (line,) = sentences(findings)[0]
    assert line.startswith("1 of 4 test images have a duplicate in train (such as 0.jpg, 1.jpg)")
    assert "--resplit" in line


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_picture_with_copies_under_both_labels_is_fatal(pictures, copy):
    one, *rest = pictures.values()
    findings = audit.audit(
        columns_of(
            (encode(one, "PNG"), 0, "train"),
            (copy(one), 1, "train"),
            *((jpeg(picture), 0, "test") for picture in rest),
        )
    )
    assert (
        findings["twins"]["clusters_with_both_labels"] == 1
        and findings["twins"]["test_with_twin_in_train"] == 0
    )
    assert sentences(findings)[0] == [
        "1 images have copies under both labels, such as 0.jpg, 1.jpg. Keep each under its right"
        " label alone."
    ]


def test_duplicates_within_a_split_and_label_are_no_leak(pictures):
    images = [
        (jpeg(p, quality), i % 2, "train")
        for i, p in enumerate(pictures.values())
        for quality in (90, 50)
    ]
    findings = audit.audit(columns_of(*images))
    assert findings["twins"] == {
        "test": 0,
        "test_with_twin_in_train": 0,
        "clusters_with_both_labels": 0,
        "largest_cluster": 2,
    }
    assert sentences(findings)[0] == []


def test_a_duplicate_of_a_training_image_in_external_is_a_leak(pictures):
    images = [
        (jpeg(picture), i % 2, split)
        for i, picture in enumerate(pictures.values())
        for split in ("train", "external")
    ]
    fatal, _ = sentences(audit.audit(columns_of(*images)))
    n = len(pictures)
    assert fatal[0].startswith(f"{n} of {n} images of 'external' have a duplicate in train")
    assert "(such as 1.jpg, 0.jpg)" in fatal[0]


def test_up_to_one_percent_of_duplicates_in_another_split_is_a_note():
    row = {"n": 100, "repeated": 1, "first": ["val/a.jpg", "train/a.jpg"]}
    fatal, note = sentences(NOTHING | {"other_splits": {"val": row}})
    assert fatal == [] and note[0].startswith("1 of 100 images of 'val' have a duplicate in train")
    assert sentences(NOTHING | {"other_splits": {"val": row | {"repeated": 2}}})[0]


def test_a_duplicate_in_extra_is_no_duplicate_in_train(pictures):
    findings = audit.audit(
        columns_of(
            *(
                (jpeg(picture), i % 2, split)
                for i, picture in enumerate(pictures.values())
                for split in ("extra", "test")
            )
        )
    )
    assert findings["twins"]["test_with_twin_in_train"] == 0


# ---- sentences ----

NOTHING = {
    "images": 500,
    "groups": "sources",
    "formats": {"real": {"JPEG": 60}, "fake": {"JPEG": 40}},
    "probes": [],
    "telling": [],
    "huge": 0,
    "other_splits": {},
    "twins": {
        "test": 100,
        "test_with_twin_in_train": 0,
        "clusters_with_both_labels": 0,
        "largest_cluster": 1,
    },
    "examples": [[["a", "b"]], [["c", "d"]]],
    "unreadable": {"n": 0, "first": [], "real": 0, "fake": 0},
}


def test_without_findings_nothing_is_reported():
    assert sentences(NOTHING) == ([], [])
    text, code = audit.report(NOTHING)
    assert code == 0 and "no duplicates across splits or labels" in text
    assert "cheap classifier" not in text


@pytest.mark.parametrize(
    "what, most", [("test_with_twin_in_train", 1), ("clusters_with_both_labels", 5)]
)
def test_one_duplicate_in_a_hundred_is_a_note_and_more_are_fatal(what, most):
    for repeated, is_fatal in ((0, False), (1, False), (most, False), (most + 1, True)):
        findings = NOTHING | {"twins": NOTHING["twins"] | {what: repeated}}
        fatal, note = sentences(findings)
        assert (bool(fatal), bool(note)) == (is_fatal, bool(repeated) and not is_fatal)
        assert audit.report(findings)[1] == is_fatal


def metric(value, low, high):
    return {"value": value, "interval": [low, high], "n": 100}


def test_probes_with_an_interval_above_chance_are_reported_clearest_first():
    low = rules.TELLING_AUC
    probes = [
        {"what": "a", "auc": metric(0.9, low - 0.01, 0.9), "on_test": None},
        {"what": "b", "auc": metric(0.7, low, 0.8), "on_test": None},
        {
            "what": "c",
            "auc": {"value": 0.99, "interval": None, "n": 9},
            "on_test": metric(0.92, 0.9, 0.94),
        },
        {"what": "d", "auc": None, "on_test": None},
    ]
    advice = (
        "Save both classes alike, in one format and quality, or judge by images of other sources."
    )
    assert sentences(NOTHING | {"probes": probes}) == (
        [],
        [
            "c alone separates the labels: AUC 0.99 cross-validated over sources; 0.92 [0.90, 0.94]"
            f" learnt on train, tried on test. {advice}",
            f"b alone separates the labels: AUC 0.70 [{low:.2f}, 0.80] cross-validated over"
            f" sources. {advice}",
        ],
    )


@pytest.mark.parametrize(
    "ends, detector, leaks",
    [
        ((0.80, 0.94), None, False),
        ((0.80, 0.95), None, True),  # the interval of a perfect guess on 73 groups starts at 0.95
        ((0.80, 0.90), (0.91, 0.99), False),
        ((0.80, 0.91), (0.91, 0.99), True),
        ((0.66, 0.70), (0.60, 0.80), True),
        ((0.80, 0.96), (0.97, 0.99), True),  # a better detector has no room left either
        ((0.64, 0.97), (0.60, 0.80), False),  # so wide an interval may be chance
    ],
)
@pytest.mark.parametrize("way", ["auc", "on_test"])
def test_a_fact_is_a_leak_where_its_interval_reaches_the_limit_or_the_detector(
    ends, detector, leaks, way
):
    probe = {"what": "format", "auc": None, "on_test": None, way: metric(sum(ends) / 2, *ends)}
    findings = NOTHING | {"probes": [probe], "detector": {way: detector and metric(0.9, *detector)}}
    fatal, note = sentences(findings)
    assert (len(fatal), len(note), audit.report(findings)[1]) == (
        (1, 0, 1) if leaks else (0, int(ends[0] >= rules.TELLING_AUC), 0)
    )


def test_a_wide_interval_on_a_few_test_images_makes_no_leak_of_a_fact_that_is_a_note():
    probe = {"what": "format", "auc": metric(0.75, 0.7, 0.8), "on_test": metric(0.8, 0.5, 0.97)}
    found = NOTHING | {"probes": [probe], "detector": {"on_test": metric(0.8, 0.6, 0.9)}}
    fatal, note = sentences(found)
    assert (len(fatal), len(note)) == (0, 1)


def test_a_fact_is_compared_with_a_detector_measured_in_the_same_way():
    probe = {"what": "format", "auc": metric(0.75, 0.7, 0.8), "on_test": None}
    assert (
        sentences(NOTHING | {"probes": [probe], "detector": {"on_test": metric(0.75, 0.7, 0.8)}})[0]
        == []
    )


def test_the_upper_threshold_is_wilsons_lower_end_of_73_right_guesses_of_73():
    assert wilson(73, 73)[0] == pytest.approx(rules.LEAK_AUC, abs=1e-3)


@pytest.mark.parametrize(
    "what, words",
    [
        ("format", "Save both classes alike"),
        ("bytes per pixel", "Save both"),
        ("JPEG files", "Save both"),
        ("aspect ratio", "one shape"),
        ("pixels", "one shape"),
        ("files with both sides multiples of 64", "one shape"),
        ("files of 320x320 pixels", "one shape"),
        ("all file facts", "one shape and size, and save them alike"),
        ("8x8 thumbnail", "same subjects"),
    ],
)
def test_each_fact_has_a_remedy(what, words):
    assert words in audit.remedy(what)


def test_help_defines_both_thresholds(script):
    text = " ".join(script("audit.py", "--help").stdout.split())
    assert "starts at 0.65" in text and "reaches 0.95" in text
    assert (
        "above 1% of that split" in text and "above 1% of all images" in text and "%%" not in text
    )


def test_telling_values_huge_files_unreadable_files_and_doubtful_sources_are_noted():
    telling = [
        {"what": what, "real": 0.1, "fake": 0.9, "errors": 9}
        for what in ("PNG files", "files of 8x8 pixels")
    ]
    doubtful = {"source": "s", "labels": ["real", "fake"], "what": "AUC", **metric(0.1, 0.05, 0.2)}
    findings = NOTHING | {
        "telling": telling,
        "huge": 2,
        "unreadable": {"n": 3, "first": ["x", "y", "z"], "real": 1, "fake": 2},
        "labels": {"doubtful_sources": [doubtful]},
    }
    fatal, note = sentences(findings)
    assert fatal == [] and note[:4] == [
        "PNG files: 10% of the reals, 90% of the fakes. Save both classes alike, in one format and"
        " quality.",
        "files of 8x8 pixels: 10% of the reals, 90% of the fakes. Crop both classes to one shape"
        " and size.",
        "3 files cannot be read (1 real, 2 fake), such as x, y. Mend or remove them.",
        "2 images have more than 50,000,000 pixels; the service refuses those. Shrink both"
        " classes alike.",
    ]
    assert note[4].startswith("source 's' (real and fake, 100 images): ")
    assert "contradicts its labels (AUC 0.10 [0.05, 0.20])" in note[4]


@pytest.mark.parametrize(
    "ends, words",
    [
        ([0.1, 0.3], "= 0.20 [0.10, 0.30]."),
        ([-0.1, 0.3], "may separate the labels as well as the detector"),
        ([-0.3, -0.1], "separate the labels better than the detector"),
        (None, "may separate the labels as well as the detector"),
    ],
)
def test_the_leak_sentence_warns_unless_the_detector_is_clearly_better(ends, words):
    leak = {"what": "8x8 thumbnail", "leak": 0.6, "detector": 0.8, "how": "learnt elsewhere"}
    line = leak_sentence({**leak, "difference": {"value": 0.2, "interval": ends, "n": 9}})
    start = (
        "detector minus best leak: AUC 0.80 - 0.60 (8x8 thumbnail alone, learnt elsewhere) = 0.20"
    )
    assert line.startswith(start) and words in line
    assert ("prove little" in line) == (ends != [0.1, 0.3])


# ---- labels ----


def test_labels_that_look_wrong_are_listed_with_path_and_label():
    labels, p_fake = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.2, 0.95, 0.9, 0.8, 0.45])
    alone, paths = np.arange(6), np.array(list("abcdef"))
    findings = audit_labels(labels, p_fake, np.full(6, ""), alone, paths, True)
    assert findings == {
        "images": 6,
        "probable_errors": 1,
        "first": [{"path": "c", "label": "real", "p_fake": 0.95}],
        "doubtful_sources": [],
    }


def test_copies_and_seen_and_unlabelled_images_are_left_out_of_the_label_check():
    columns = make_columns(gap=8)
    columns["labels"][:5] = 1  # reals called fake
    columns["labels"][100:105] = -1
    columns["splits"][110:115] = "seen"
    columns["view"][90:95] = 1
    findings, linear = labels_of(columns)
    assert findings["images"] == 105 and findings["probable_errors"]
    assert {row["path"] for row in findings["first"]} <= set(columns["paths"][:5])
    assert linear["n"] == 105 and linear["value"] > 0.9
    assert labels_of(make_columns(real=19)) == (None, None)


# ---- the command ----


@pytest.fixture
def run(capsys):
    """Function: flags of audit.py, run in this process -> its CompletedProcess."""

    def call(*flags):
        code = command.main([*map(str, flags)])
        return subprocess.CompletedProcess(flags, code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def clean(make_folder, tmp_path_factory):
    """40 images, no two of one picture."""
    return make_folder(
        tmp_path_factory.mktemp("clean"),
        {"train/real": 10, "train/fake": 10, "test/real": 10, "test/fake": 10},
    )


@pytest.fixture(scope="module")
def leaking(clean, tmp_path_factory):
    """The clean folder with five test images that have a copy in train, and a contradiction."""
    folder = shutil.copytree(clean, tmp_path_factory.mktemp("leaking") / "data")
    for i in range(5):
        with Image.open(folder / f"train/real/00{i}.jpg") as picture:
            picture.save(folder / f"test/real/copy{i}.jpg", quality=60)
    shutil.copy(folder / "train/real/009.jpg", folder / "train/fake/copy.jpg")
    return folder


@pytest.fixture
def without_probes(monkeypatch):
    """For tests that are not about probes, which take most of an audit's time."""
    monkeypatch.setattr(audit, "probe_all", lambda *_: [])


def test_a_clean_folder_ends_with_0(clean, run):
    done = run("--data_dir", clean)
    assert done.returncode == 0 and "LEAK" not in done.stdout
    formats = "formats of reals {'JPEG': 20}, of fakes {'JPEG': 20}"
    assert done.stdout.splitlines()[0] == f"40 images; {formats}"


def test_a_leak_ends_with_1_and_names_the_remedy(leaking, run, without_probes):
    done = run("--data_dir", leaking)
    assert done.returncode == 1 and "--resplit" in done.stdout
    assert "LEAK  5 of 25 test images have a duplicate in train" in done.stdout
    assert "LEAK  1 images have copies under both labels" in done.stdout


@pytest.fixture
def extract(script, tmp_path):
    """Function: folder and flags -> features file of the small encoder."""

    def run(folder, *flags):
        path = tmp_path / "f.npz"
        arguments = ("--data_dir", folder, "--output_file", path, *flags)
        done = script("extract_features.py", *arguments, CLIP_MODEL=str(small.CHECKPOINT))
        assert done.returncode == 0, done.stderr
        return path

    return run


def test_the_folder_and_its_features_file_give_the_same_json(leaking, run, extract):
    by_folder, by_file = (
        run(flag, data, "--json")
        for flag, data in (("--data_dir", leaking), ("--features_file", extract(leaking)))
    )
    assert by_folder.returncode == by_file.returncode == 1
    findings, again = (json.loads(done.stdout) for done in (by_folder, by_file))
    assert again.pop("labels")["images"] == 46 and again.pop("detector") and again == findings
    assert findings.keys() == {*NOTHING, "fatal", "note"}
    assert len(findings["fatal"]) == 2 and findings["images"] == 46
    assert [row["what"] for row in findings["probes"][-2:]] == ["all file facts", "8x8 thumbnail"]
    assert findings["twins"] == {
        "test": 25,
        "test_with_twin_in_train": 5,
        "clusters_with_both_labels": 1,
        "largest_cluster": 2,
    }


def test_features_without_a_label_are_refused_in_one_line(clean, script, extract):
    done = script("audit.py", "--features_file", extract(clean, "--unlabelled"))
    assert_one_line_error(done, "no image has a label")


def test_unreadable_images_are_listed_and_counted_by_class_and_are_no_leak(
    clean, run, tmp_path, without_probes
):
    folder = shutil.copytree(clean, tmp_path / "data")
    (folder / "train/real/text.txt").write_text("no image")  # a caption is no broken image
    (folder / "train/real/dangling.jpg").symlink_to("/nowhere")
    for i in (1, 2):
        data = (folder / f"train/fake/00{i}.jpg").read_bytes()
        (folder / f"train/fake/cut{i}.jpg").write_bytes(data[: len(data) // 2])
    done = run("--data_dir", folder, "--json")
    findings = json.loads(done.stdout)
    assert (findings["images"], done.returncode) == (40, 0)
    first = ["train/fake/cut1.jpg", "train/fake/cut2.jpg", "train/real/dangling.jpg"]
    assert findings["unreadable"] == {"n": 3, "first": first, "real": 1, "fake": 2}
    assert (
        f"3 files cannot be read (1 real, 2 fake), such as {first[0]}, {first[1]}."
        " Mend or remove them." in findings["note"]
    )
    assert "left out train/real/text.txt: not an image format we take" in done.stderr
    assert all(f"left out {path}: " in done.stderr for path in first)


def test_labels_that_look_wrong_in_a_features_file_are_listed(run, tmp_path, without_probes):
    columns = make_columns(gap=8)
    columns["labels"][:4] = 1
    done = run("--features_file", write_features(tmp_path / "f.npz", columns))
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout[done.stdout.index("labels to look at first (") :].splitlines()
    assert "of 120 are unlike their class" in head and lines
    assert set(lines) <= {f"  0/0000{i}.jpg is called fake" for i in range(4)}


def test_a_folder_of_png_fakes_and_jpeg_reals_is_a_leak(make_folder, run, tmp_path):
    folder = make_folder(tmp_path / "data", {"real": 30, "fake": 30})
    for path in (folder / "fake").iterdir():
        with Image.open(path) as picture:
            picture.save(path.with_suffix(".png"))
        path.unlink()
    done = run("--data_dir", folder)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LEAK  format alone")]
    assert "AUC 1.00" in line and "Save both classes alike" in line


def test_too_few_images_for_a_leak_are_named_with_the_number_needed(make_folder, run, tmp_path):
    folder = make_folder(tmp_path / "few", {"real": 19, "fake": 19})
    for path in folder.rglob("fake/*.jpg"):
        with Image.open(path) as image:
            image.save(path, "PNG")
    done = run("--data_dir", folder)
    assert done.returncode == 0 and "note  PNG files: 0% of the reals, 100%" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "no file fact can be a LEAK" in last and "takes 20 of each class" in last


def test_the_same_file_under_two_names_counts_once(clean, run, tmp_path, without_probes):
    folder = shutil.copytree(clean, tmp_path / "twice")
    for name in ("train/real/000.jpg", "train/fake/003.jpg"):
        shutil.copy(folder / name, (folder / name).with_name("again.jpg"))
    once, twice = (run("--data_dir", data, "--json") for data in (clean, folder))
    assert "2 rows repeat an earlier image and are dropped" in twice.stderr
    assert once.stdout == twice.stdout and json.loads(once.stdout)["images"] == 40


def without_images(folder):
    for label in ("real", "fake"):
        (folder / "data" / label).mkdir(parents=True)
        (folder / "data" / label / "1.jpg").touch()


@pytest.mark.parametrize(
    "prepare, flags, words",
    [
        (lambda folder: None, ["--data_dir", "data"], ["data", "no such folder"]),
        (lambda folder: (folder / "data").mkdir(), ["--data_dir", "data"], ["the folder is empty"]),
        (without_images, ["--data_dir", "data"], ["no readable image"]),
        (
            lambda folder: None,
            ["--features_file", "f.npz"],
            ["f.npz", "no such file", "extract_features.py"],
        ),
        (
            lambda folder: (folder / "f.npz").write_text("text"),
            ["--features_file", "f.npz"],
            ["f.npz", "is not a features file"],
        ),
    ],
    ids=["missing folder", "empty folder", "nothing readable", "missing file", "another file"],
)
def test_a_mistake_gives_a_one_line_error(prepare, flags, words, script, tmp_path):
    prepare(tmp_path)
    assert_one_line_error(script("audit.py", *flags), *words)


@pytest.mark.parametrize(
    "flags", [[], ["--data_dir", "d", "--features_file", "f"]], ids=["neither", "both"]
)
def test_a_folder_or_a_file_is_required_but_not_both(flags, capsys):
    with pytest.raises(SystemExit) as error:
        command.parse_args(flags)
    assert error.value.code == 2
