"""extract_features.py --views: degraded copies of each image, equal in every run."""

import itertools
import json
import shutil
import threading

import numpy as np
import pytest
import small
from extracting import digest, extract, names, rows
from made_up import DIM

from detector.encoders import runtime
from detector.features.columns import COLUMNS
from detector.images import decoding, preprocessing
from detector.images.distort import degrade, view_rng

pytestmark = pytest.mark.usefixtures("settings")

ABOUT_THE_FILE = [name for name in COLUMNS if name not in ("features", "view")]


@pytest.fixture(scope="module")
def plain(few, tmp_path_factory):
    """The 24 images without and with two copies: (columns, columns)."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_MODEL", str(small.CHECKPOINT))
        return tuple(extract(few, folder / f"{views}.npz", "--views", views) for views in (0, 2))


def test_copies_follow_their_image_and_share_all_but_the_features(plain):
    alone, copied = plain
    assert copied["view"].tolist() == [0, 1, 2] * 24 and copied["view"].dtype == np.int8
    for name in ABOUT_THE_FILE:
        assert np.array_equal(copied[name], np.repeat(alone[name], 3, axis=0)), name
    # another batch size changes the rounding
    np.testing.assert_allclose(copied["features"][::3], alone["features"], rtol=0.05, atol=0.05)
    by_image = copied["features"].reshape(24, 3, -1)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        apart = np.abs(by_image[:, one] - by_image[:, other]).max(1)
        assert (apart > 0).all() and np.median(apart) > 0.3


def test_copies_are_the_stated_degradations_of_the_image(few, plain):
    encoder, columns = runtime.Encoder(small.ENCODER), plain[1]
    for i in range(0, len(columns["paths"]), 7):
        image = decoding.decode_image((few / columns["paths"][i]).read_bytes())
        if columns["view"][i]:
            image = degrade(image, view_rng(columns["sha256"][i], int(columns["view"][i])))
        alone = encoder.encode(preprocessing.preprocess(image, encoder.transform)[None])[0]
        np.testing.assert_allclose(columns["features"][i], alone, rtol=0.05, atol=0.05)


def test_copies_do_not_depend_on_label_name_or_number(few, plain, tmp_path):
    moves = {
        "train/real/camera": "test/fake/x",
        "train/fake/gan": "test/real/y",
        "test/real/camera": "train/fake/z",
        "test/fake/gan": "train/real",
    }
    for before, after in moves.items():
        (tmp_path / "data" / after).mkdir(parents=True)
        for path in (few / before).iterdir():
            shutil.copyfile(path, tmp_path / "data" / after / f"renamed-{path.name}")
    columns = extract(tmp_path / "data", tmp_path / "f.npz", "--views", 3)
    expected, actual = (
        {(c["sha256"][i], c["view"][i]): c["features"][i] for i in range(len(c["paths"]))}
        for c in (plain[1], columns)
    )
    assert len(actual) == 24 * 4
    for row in expected:
        np.testing.assert_allclose(expected[row], actual[row], rtol=0.05, atol=0.05)


def test_a_second_run_with_views_encodes_and_changes_nothing(few, tmp_path, encoded):
    for name in ("a", "b"):
        extract(few, tmp_path / f"{name}.npz", "--views", 2)
    assert digest(tmp_path / "a.npz") == digest(tmp_path / "b.npz") and sum(encoded) == 2 * 72
    extract(few, tmp_path / "a.npz", "--views", 2)
    assert digest(tmp_path / "a.npz") == digest(tmp_path / "b.npz") and sum(encoded) == 2 * 72
    assert max(encoded) == 16  # the batch size, as without copies


def test_images_and_copies_are_counted_separately(few, own, tmp_path, capsys):
    (own / "train/real/camera/spoilt.jpg").write_bytes(b"\xff\xd8\xff cut")
    columns = extract(own, tmp_path / "f.npz", "--views", 2)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/f.npz: 24 images and 48 degraded copies, {DIM}-d features (test/real 4, "
        "test/fake 4, train/real 8, train/fake 8); 1 of 25 skipped"
    ]
    assert columns["meta"]["counts"] == {"images": 24, "bad": 1, "real": 12, "fake": 12}
    assert columns["meta"]["key"]["views"] == 2


def test_a_changed_folder_keeps_the_copies_of_other_images(own, few, tmp_path, encoded):
    old = extract(own, tmp_path / "f.npz", "--views", 2)
    changed, added = "test/real/camera/001.jpg", "train/fake/gan/added.jpg"
    shutil.copyfile(few / "train/real/camera/000.jpg", own / changed)
    (own / "test/real/camera/002.jpg").unlink()
    (own / added).write_bytes((own / "train/fake/gan/003.jpg").read_bytes() + b" ")
    new = extract(own, tmp_path / "f.npz", "--views", 2)
    assert sum(encoded) == 72 + 2 * 3
    assert new["view"].tolist() == [0, 1, 2] * 25
    assert set(new["paths"]) - set(old["paths"]) == {added}
    assert {key: row for key, row in rows(old).items() if key[0] != changed} == {
        key: row for key, row in rows(new).items() if key[0] not in (changed, added)
    }


def test_a_failed_run_resumes_with_all_copies(few, tmp_path, monkeypatch, capsys):
    extract(few, tmp_path / "fresh.npz", "--views", 2, "--batch_size", 4)
    savez, stored, number = np.savez, [], itertools.count(1)

    def stop_at_the_fourth(file, **columns):  # two threads store
        stored.append(len(columns["paths"]))
        return savez(file, **columns) if next(number) < 4 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", stop_at_the_fourth)
        before = set(threading.enumerate())
        with pytest.raises(ZeroDivisionError):
            extract(few, tmp_path / "f.npz", "--views", 2, "--batch_size", 4)
        # a failed run ends after the batches being encoded
        for thread in set(threading.enumerate()) - before:
            thread.join(20)
    assert set(stored) == {12} and len(stored) >= 4
    assert json.loads((tmp_path / "f.npz.parts/key.json").read_text())["views"] == 2
    extract(few, tmp_path / "f.npz", "--views", 2, "--batch_size", 4)
    assert "resuming: 3 of 6 batches are stored already" in capsys.readouterr().err
    assert digest(tmp_path / "f.npz") == digest(tmp_path / "fresh.npz")
    assert names(tmp_path) == ["f.npz", "fresh.npz", "home"]
