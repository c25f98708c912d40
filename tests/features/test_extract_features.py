"""extract_features.py: columns of the file, draws, skipped and refused files, memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import small
from commands import ROOT, assert_one_line_error
from extracting import another_encoder, digest, extract, names
from made_up import DIM
from PIL import Image

from detector.base.errors import UsageError
from detector.base.files import sha256
from detector.encoders import runtime
from detector.encoders.closeness import cosines
from detector.features import extraction
from detector.features.extraction import draw
from detector.images import decoding, preprocessing
from detector.images.facts import FACTS
from detector.images.folders import Entry

pytestmark = pytest.mark.usefixtures("settings")

# ---- the file ----


def test_the_documented_command_writes_the_documented_columns(few, script, tmp_path):
    done = script("extract_features.py", "--data_dir", few, "--output_file", "features.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"features.npz: 24 images, {DIM}-d features (test/real 4, test/fake 4, train/real 8, "
        "train/fake 8); 0 of 24 skipped"
    ]
    assert names(tmp_path) == ["features.npz", "home"]
    with np.load(tmp_path / "features.npz", allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
    assert {
        name: (column.dtype.kind if column.dtype.kind in "UV" else str(column.dtype), column.shape)
        for name, column in columns.items()
    } == {
        "features": ("float32", (24, DIM)),
        "labels": ("int8", (24,)),
        "paths": ("U", (24,)),
        "splits": ("U", (24,)),
        "sources": ("U", (24,)),
        "groups": ("U", (24,)),
        "sha256": ("U", (24,)),
        "view": ("int8", (24,)),
        "facts": ("V", (24,)),
        "thumb": ("uint8", (24, 64)),
        "meta": ("U", ()),
    }
    assert columns["facts"].dtype == FACTS
    assert set(FACTS.names) == {
        "width",
        "height",
        "bytes",
        "format",
        "quant_mean",
        "quant_hash",
        "blockiness",
        "density",
    }


def test_each_row_is_about_its_own_file(few, tmp_path):
    columns = extract(few, tmp_path / "f.npz", "--batch_size", 5)
    encoder = runtime.Encoder(small.ENCODER)
    assert list(columns["paths"]) == sorted(
        p.relative_to(few).as_posix() for p in few.rglob("*.jpg")
    )
    for i, path in enumerate(columns["paths"]):
        data = (few / path).read_bytes()
        image = decoding.decode_image(data)
        assert columns["sha256"][i] == sha256(data)
        label = ["real", "fake"][columns["labels"][i]]
        assert [columns["splits"][i], label, columns["sources"][i]] == path.split("/")[:3]
        assert columns["facts"][i]["bytes"] == len(data) and columns["facts"][i]["format"] == "JPEG"
        assert (columns["facts"][i]["width"], columns["facts"][i]["height"]) == image.size
        # another batch size only changes the rounding
        alone = encoder.encode(preprocessing.preprocess(image, encoder.transform)[None])
        assert cosines(alone, columns["features"][[i]])[0] > 0.999


def test_meta_records_the_settings_but_no_time_and_no_place(few, tmp_path):
    meta = extract(few, tmp_path / "f.npz", "--precision", "float32")["meta"]
    manifest = json.loads((small.ENCODER / "encoder.json").read_text())
    # the whole meta: no clock, no host, no folder
    assert meta == {
        "format": 1,
        "commit": "c0de",
        "counts": {"images": 24, "bad": 0, "real": 12, "fake": 12},
        "encoder": {
            "name": "small",
            "identity": manifest["identity"],
            "layers": "final",
            "dim": DIM,
        },
        "key": {
            "encoder": manifest["identity"],
            "precision": "float32",
            "batch_size": 16,
            "limit": None,
            "unlabelled": False,
            "split_names": "train,val,test,external,extra",
            "max_pixels": 200_000_000,
            "views": 0,
            "crops": 0,
        },
    }
    with zipfile.ZipFile(tmp_path / "f.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_same_command_in_another_folder_writes_the_same_bytes(few, script, tmp_path):
    # copyfile gives the files other times of change
    shutil.copytree(few, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    for place, data_dir in (("one", few), ("two", "../elsewhere")):
        (tmp_path / place).mkdir()
        done = script(
            "extract_features.py",
            "--data_dir",
            data_dir,
            "--output_file",
            f"{place}.npz",
            cwd=tmp_path / place,
        )
        assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "one/one.npz") == digest(tmp_path / "two/two.npz")


def test_an_image_that_trained_the_encoder_gets_the_split_seen(few, tmp_path, capsys):
    known = digest(few / "train/fake/gan/000.jpg")
    another_encoder(seen=[known[:16]])
    columns = extract(few, tmp_path / "f.npz")
    assert list(columns["splits"][columns["sha256"] == known]) == ["seen"]
    assert (columns["splits"] == "seen").sum() == 1
    assert "1 images were used to train this encoder" in capsys.readouterr().err


def test_the_user_chooses_the_split_names(make_folder, tmp_path):
    data = make_folder(tmp_path / "data", {"Fit/real/a": 2, "check/fake/b": 2})
    columns = extract(data, tmp_path / "f.npz", "--split_names", "fit, Check")
    assert columns["splits"].tolist() == ["fit", "fit", "check", "check"]
    assert columns["sources"].tolist() == ["a", "a", "b", "b"]


def test_unlabelled_accepts_any_folder(make_folder, tmp_path):
    data = make_folder(tmp_path / "data", {"holiday/2014": 3, "real/x": 2})
    columns = extract(data, tmp_path / "f.npz", "--unlabelled")
    assert list(columns["labels"]) == [-1] * 5
    assert columns["meta"]["counts"] == {"images": 5, "bad": 0, "real": 0, "fake": 0}


def test_an_output_among_the_images_is_not_encoded(own, capsys):
    first = extract(own, own / "f.npz", "--unlabelled")
    before = digest(own / "f.npz")
    again = extract(own, own / "f.npz", "--unlabelled")
    counts = {"images": 24, "bad": 0, "real": 0, "fake": 0}
    assert first["meta"]["counts"] == again["meta"]["counts"] == counts
    assert digest(own / "f.npz") == before
    assert "skipped f.npz" not in capsys.readouterr().err


# ---- a draw ----


def entries_of(counts):
    return [
        Entry(f"{split}/{label}/{i:04d}.jpg", label, split, "")
        for (split, label), n in counts.items()
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "limit, expected",
    [
        (4, [1, 1, 1, 1]),
        (40, [10, 10, 10, 10]),
        (42, [11, 11, 10, 10]),
        (100, [40, 40, 10, 10]),
        (1000, [300, 100, 10, 10]),
    ],
)
def test_a_draw_is_as_even_over_class_and_split_as_possible(limit, expected):
    entries = entries_of({("train", 0): 300, ("train", 1): 100, ("test", 0): 10, ("test", 1): 10})
    drawn = draw(entries, limit)
    counts = Counter((e.split, e.label) for e in drawn)
    # any of the cells may get the remainder
    assert sorted(counts.values(), reverse=True) == expected
    assert drawn == [e for e in entries if e in set(drawn)]  # in the order they came


def test_a_draw_is_repeatable_and_not_the_first_images():
    entries = entries_of({("train", 0): 300, ("train", 1): 300})
    assert draw(entries, 20) == draw(entries, 20) != draw(entries, 20, seed=1)
    assert max(int(e.path[-8:-4]) for e in draw(entries, 20)) > 100


def test_limit_encodes_only_the_drawn_images(few, tmp_path, encoded):
    columns = extract(few, tmp_path / "f.npz", "--limit", 8)
    assert sum(encoded) == len(columns["labels"]) == 8
    cells = Counter(zip(columns["splits"].tolist(), columns["labels"].tolist(), strict=True))
    assert cells == {("test", 0): 2, ("test", 1): 2, ("train", 0): 2, ("train", 1): 2}


# ---- unreadable files ----


def truncate(path):
    data = next(path.parent.glob("00*.jpg")).read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (truncate, "cannot be decoded"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("no image"), "not an image format we take"),
        (lambda path: Image.new("RGB", (900, 2)).save(path), "900 x 2"),
        (lambda path: path.symlink_to("/nowhere.jpg"), "No such file"),
    ],
    ids=["truncated", "empty", "text", "strip", "dangling link"],
)
def test_an_unreadable_file_is_skipped_counted_and_reported(own, tmp_path, capsys, spoil, reason):
    spoil(own / "train/real/camera/spoilt.jpg")
    columns = extract(own, tmp_path / "f.npz")
    captured = capsys.readouterr()
    assert re.search(f"skipped train/real/camera/spoilt.jpg: .*{reason}", captured.err)
    assert "1 of 25 skipped" in captured.out
    assert len(columns["paths"]) == 24 and "train/real/camera/spoilt.jpg" not in columns["paths"]
    assert columns["meta"]["counts"] == {"images": 24, "bad": 1, "real": 12, "fake": 12}


def test_only_too_many_unreadable_files_fail_the_run(own, script, tmp_path):
    command = "extract_features.py", "--data_dir", own, "--output_file", tmp_path / "out/f.npz"
    truncate(own / "train/real/camera/spoilt.jpg")
    assert script(*command).returncode == 0  # 1 of 25 is below the limit of 5%
    (tmp_path / "out/f.npz").unlink()

    truncate(own / "test/fake/gan/spoilt.jpg")
    failed = script(*command)  # 2 of 26
    assert_one_line_error(failed, "2 of 26 images cannot be read", "--max_bad_fraction 0.05")
    assert failed.stdout == ""
    assert not (tmp_path / "out/f.npz").exists()

    # a second run names the files again but does not read them; a higher limit lets it pass
    failed = script(*command)
    assert_one_line_error(failed, "see the lines above")
    for folder in ("train/real/camera", "test/fake/gan"):
        assert failed.stderr.count(f"skipped {folder}/spoilt.jpg: ") == 1
    assert "resuming: 2 of 2 batches are stored already" in failed.stderr
    assert script(*command, "--max_bad_fraction", "0.1").returncode == 0
    assert names(tmp_path / "out") == ["f.npz"]


def test_a_repaired_file_gets_its_row(own, tmp_path, encoded):
    spoilt = own / "train/real/camera/spoilt.jpg"
    truncate(spoilt)
    extract(own, tmp_path / "f.npz")
    shutil.copy(own / "test/real/camera/000.jpg", spoilt)
    columns = extract(own, tmp_path / "f.npz")
    assert columns["paths"][-1] == "train/real/camera/spoilt.jpg"
    assert columns["meta"]["counts"] == {"images": 25, "bad": 0, "real": 13, "fake": 12}
    assert sum(encoded) == 24 + 1


def test_the_content_decides_the_format_and_not_the_name(own, tmp_path):
    photo = Image.open(own / "test/real/camera/000.jpg")
    formats = {"png.jpg": "PNG", "jpeg.png": "JPEG", "webp.bmp": "WEBP", "none": "BMP"}
    for name, kind in formats.items():
        photo.save(own / "test/real" / name, kind)
    columns = extract(own, tmp_path / "f.npz")
    by_path = dict(zip(columns["paths"], columns["facts"]["format"], strict=True))
    assert {name: by_path[f"test/real/{name}"] for name in formats} == formats


# ---- the user's mistakes ----


def without_labels(tmp_path, few):
    shutil.copytree(few / "train/real", tmp_path / "data/holiday")


def one_class(tmp_path, few):
    shutil.copytree(few / "train/real", tmp_path / "data/real")


def both_labels(tmp_path, few):
    shutil.copytree(few, tmp_path / "data")
    (tmp_path / "data/real/FAKE").mkdir(parents=True)
    shutil.copy(few / "test/real/camera/000.jpg", tmp_path / "data/real/FAKE/1.jpg")


def whole(tmp_path, few):
    shutil.copytree(few, tmp_path / "data")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize(
    "prepare, flags, words",
    [
        (
            without_labels,
            [],
            ["data", "no folder below it names a label", "real/ and fake/", "--unlabelled"],
        ),
        (one_class, [], ["only one class", "'real'", "--unlabelled"]),
        (both_labels, [], ["real/FAKE/1.jpg", "'real' and 'FAKE'", "rename"]),
        (lambda tmp_path, few: (tmp_path / "data").mkdir(), [], ["data", "the folder is empty"]),
        (lambda tmp_path, few: None, [], ["data", "no such folder"]),
        (
            whole,
            ["--output_file", "file/f.npz"],
            ["--output_file file/f.npz", "is a file", "name another place"],
        ),
        (whole, ["--output_file", "folder"], ["--output_file folder", "is a folder"]),
        (whole, ["--limit", "0"], ["--limit 0", "at least 1"]),
        (whole, ["--limit", "-5"], ["--limit -5", "at least 1"]),
        (whole, ["--batch_size", "0"], ["--batch_size 0", "at least 1"]),
        (whole, ["--views", "-1"], ["--views -1", "at least 0"]),
        (whole, ["--views", "21"], ["--views 21", "at most 20"]),
        (
            whole,
            ["--clip_model", "ViT-L-14"],
            ["'ViT-L-14' is neither a file nor one of RN50,", "ViT-L/14", "--clip_model"],
        ),
    ],
    ids=[
        "no labels",
        "one class",
        "both labels",
        "empty",
        "missing",
        "output below a file",
        "output is a folder",
        "limit 0",
        "limit -5",
        "batch size 0",
        "views -1",
        "views 21",
        "unknown encoder",
    ],
)
def test_a_mistake_is_a_one_line_error_and_leaves_no_files(
    prepare, flags, words, few, script, tmp_path
):
    prepare(tmp_path, few)
    before = names(tmp_path)
    assert_one_line_error(script("extract_features.py", "--data_dir", "data", *flags), *words)
    assert names(tmp_path) == before


# ---- memory ----


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """200 of these images are 600 MB decoded and 61 MB as input; their columns are 0.2 MB."""
    noise = np.random.default_rng(0).normal(128, 8, (125, 125, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).resize((1000, 1000)).save(tmp_path / "one.jpg")
    for folder, n in (("small", 40), ("large", 240)):
        for label in ("real", "fake"):
            (tmp_path / folder / label).mkdir(parents=True)
            for i in range(n // 2):
                os.link(tmp_path / "one.jpg", tmp_path / folder / label / f"{i}.jpg")
    # getrusage would start at the peak of the parent process, VmHWM does not
    code = f"""
import re, sys
sys.path.insert(0, {str(ROOT)!r})
import extract_features
for folder in ("small", "large"):
    output = folder + ".npz"
    extract_features.main(["--data_dir", folder, "--output_file", output, "--batch_size", "4"])
    print(re.search(r"VmHWM:.*", open("/proc/self/status").read())[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    before, after = (int(peak) / 1024 for peak in re.findall(r"VmHWM:\s+(\d+)", done.stdout))
    assert after - before < 30, f"{before:.0f} MB for 40 images, {after:.0f} MB for 240"


def test_no_more_than_three_batches_are_decoded_ahead_of_a_slow_encoder(few, tmp_path, monkeypatch):
    """Decoding is much faster than a large encoder."""
    read, encode = extraction.read_row, runtime.Encoder.encode
    begun, done, ahead = [], [], []

    def count(data_dir, entry, *rest):
        begun.append(entry)
        return read(data_dir, entry, *rest)

    def encode_slowly(self, pixels):
        time.sleep(0.1)
        ahead.append(len(begun) - sum(done))
        done.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(extraction, "read_row", count)
    monkeypatch.setattr(runtime.Encoder, "encode", encode_slowly)
    extract(few, tmp_path / "f.npz", "--batch_size", 2)
    assert len(ahead) == 12 and max(ahead) <= 3 * 2


@pytest.fixture
def processes(monkeypatch):
    """Context in which processes decode images, as beside a GPU. Yields [the started pool]."""

    @contextmanager
    def patched():
        started, start = [], extraction.reader_pool
        with monkeypatch.context() as patch:
            patch.setattr(
                extraction,
                "reader_pool",
                lambda device, count: started.append(start("cuda", count)) or started[0],
            )
            yield started

    return patched


def test_decoding_processes_give_the_same_file_as_threads(few, tmp_path, processes):
    with processes():
        extract(few, tmp_path / "by_processes.npz", "--views", 1)
    extract(few, tmp_path / "by_threads.npz", "--views", 1)
    assert digest(tmp_path / "by_processes.npz") == digest(tmp_path / "by_threads.npz")


def test_a_killed_decoding_process_is_an_error_and_the_run_can_resume(
    few, tmp_path, processes, monkeypatch
):
    store = extraction.store_batch

    def store_and_kill_a_reader(*args):
        part = store(*args)
        pools[0].submit(os._exit, 1)
        return part

    message = "was killed, most likely because memory ran out; run the same command again"
    with processes() as pools, monkeypatch.context() as patch:
        patch.setattr(extraction, "store_batch", store_and_kill_a_reader)
        with pytest.raises(UsageError, match=message):
            extract(few, tmp_path / "f.npz", "--batch_size", 2)
    assert not (tmp_path / "f.npz").exists() and list((tmp_path / "f.npz.parts").glob("0*.npz"))
    for name in ("f.npz", "whole.npz"):
        extract(few, tmp_path / name, "--batch_size", 2)
    assert digest(tmp_path / "f.npz") == digest(tmp_path / "whole.npz")
