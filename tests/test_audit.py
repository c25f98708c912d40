"""What files betray: twins across splits and labels, single numbers that separate the labels, and the command that tells."""
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import audit
from audit import describe_image, near_pairs, sentences, twin_clusters
from conftest import assert_one_line_error
from written import encode, jpeg, pictures, rotated  # noqa: F401


# ---- twins ----

def described(*files):
    """File bytes -> (thumb, sha256) of all of them."""
    made = [describe_image(data)[1] for data in files]
    return np.stack([row["thumb"] for row in made]), np.array([row["sha256"] for row in made])


COPIES = {
    "byte for byte": lambda p: encode(p, "PNG"),
    "re-saved as JPEG": lambda p: jpeg(p, 90), "re-saved coarsely": lambda p: jpeg(p, 30),
    "re-saved as WebP": lambda p: encode(p, "WEBP", quality=60), "re-saved as AVIF": lambda p: encode(p, "AVIF", quality=60),
    "half the size": lambda p: jpeg(p.resize((p.width // 2, p.height // 2))),
    "a messenger's size": lambda p: jpeg(p.resize((160, 160 * p.height // p.width)), 50),
    "another shape": lambda p: jpeg(p.resize((300, 300))), "grey": lambda p: jpeg(p.convert("L")),
    "a border cut off": lambda p: jpeg(p.crop((4, 4, p.width - 4, p.height - 4))),
    "turned by EXIF": lambda p: rotated(p.transpose(Image.Transpose.ROTATE_180), "JPEG", 3),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copies_of_a_photograph_are_twins(pictures, copy):
    for name, picture in pictures.items():
        cluster = twin_clusters(*described(encode(picture, "PNG"), copy(picture)))
        assert cluster[0] == cluster[1], name


def test_different_photographs_are_no_twins(pictures):
    pieces = [p.crop((x * p.width // 2, y * p.height // 2, (x + 1) * p.width // 2, (y + 1) * p.height // 2))
              for p in pictures.values() for x in (0, 1) for y in (0, 1)]
    turned = [p.transpose(turn) for p in pictures.values() for turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180)]
    cluster = twin_clusters(*described(*(jpeg(image) for image in [*pictures.values(), *pieces, *turned])))
    assert len(set(cluster)) == 8 + 32 + 16


@pytest.mark.parametrize("shift, twins", [(0.004, True), (0.25, False), (0.5, False)])
def test_crops_side_by_side_are_twins_only_if_nearly_the_same(pictures, shift, twins):
    for name, picture in pictures.items():
        side, right = min(picture.size) // 2, round(shift * min(picture.size) / 2)
        crops = [picture.crop((left, 50, left + side, 50 + side)) for left in (10, 10 + right)]
        cluster = twin_clusters(*described(*map(jpeg, crops)))
        assert (cluster[0] == cluster[1]) == twins, name


def test_copies_of_copies_end_up_in_one_cluster(pictures):
    astronaut, coffee = pictures["astronaut.png"], pictures["coffee.png"]
    cluster = twin_clusters(*described(encode(astronaut, "PNG"), jpeg(coffee), jpeg(astronaut, 40), jpeg(coffee),
                                       encode(astronaut, "PNG")))
    assert cluster[0] == cluster[2] == cluster[4] != cluster[1] == cluster[3]
    assert set(cluster) == {0, 1}


@pytest.mark.parametrize("n", [0, 1])
def test_no_pairs_among_too_few(n):
    assert near_pairs(np.zeros((n, 64), np.uint8)).shape == (0, 2)


def test_pairs_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (30, 64))
    thumb = np.concatenate([pictures, pictures + rng.integers(-4, 5, pictures.shape)]).clip(0, 255).astype(np.uint8)
    order = rng.permutation(60)
    pairs, permuted = near_pairs(thumb), order[near_pairs(thumb[order])]
    assert (pairs[:, 0] < pairs[:, 1]).all() and len(pairs) == 30
    expected = {frozenset((i, i + 30)) for i in range(30)}
    assert {frozenset(p) for p in pairs.tolist()} == {frozenset(p) for p in permuted.tolist()} == expected


@pytest.mark.parametrize("block", [1, 7, 60, 1000])
def test_pairs_do_not_depend_on_how_many_are_compared_at_a_time(block):
    rng = np.random.default_rng(0)
    thumb = np.repeat(rng.integers(0, 256, (20, 64)).astype(np.uint8), 3, axis=0)
    expected = [[3 * i + a, 3 * i + b] for i in range(20) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert sorted(near_pairs(thumb, block).tolist()) == expected


def test_flat_pictures_are_twins_only_byte_for_byte():
    """A white page, a sky and a black frame have nothing to tell one from the other."""
    thumb = np.stack([np.full(64, grey, np.uint8) for grey in (0, 0, 128, 130, 255)])
    assert near_pairs(thumb).tolist() == []
    cluster = twin_clusters(thumb, np.array(["a", "a", "b", "c", "d"]))
    assert cluster[0] == cluster[1] and len(set(cluster)) == 4


def test_the_same_shape_at_another_brightness_is_no_twin():
    picture = np.random.default_rng(0).integers(0, 200, (1, 64))
    assert near_pairs(np.concatenate([picture, picture + 20]).astype(np.uint8)).tolist() == []


def test_equal_bytes_are_twins_whatever_the_picture_says():
    thumb = np.random.default_rng(0).integers(0, 256, (4, 64)).astype(np.uint8)
    cluster = twin_clusters(thumb, np.array(["a", "b", "a", "c"]))
    assert cluster[0] == cluster[2] and len(set(cluster)) == 3


def test_of_a_cluster_with_many_copies_all_are_found():
    rng = np.random.default_rng(0)
    one, rest = rng.integers(0, 256, (1, 64)), rng.integers(0, 256, (100, 64))
    thumb = np.concatenate([np.repeat(one, 70, axis=0), rest]).astype(np.uint8)
    assert np.bincount(twin_clusters(thumb, np.arange(170).astype(str))).max() == 70


# ---- one number ----

@pytest.mark.parametrize("seed", range(5))
def test_auc_is_scikit_learns_also_with_ties(seed):
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200)
    for values in (rng.integers(0, 4, 200) + labels, rng.normal(size=200), np.ones(200)):
        assert audit.auc(values, labels) == pytest.approx(roc_auc_score(labels, values))


def columns_of(*images):
    """(file bytes, label, split) of each -> the columns that `audit` looks at."""
    made = [describe_image(data)[1] for data, _, _ in images]
    return {"paths": np.array([f"{i}.jpg" for i in range(len(images))]),
            "labels": np.array([label for _, label, _ in images]), "splits": np.array([split for _, _, split in images]),
            **{name: np.array([row[name] for row in made]) for name in made[0]}}


def crops(pictures, n, sizes, seed):
    """n different crops of these (width, height) sizes."""
    rng, all_pictures = np.random.default_rng(seed), list(pictures.values())
    for i in range(n):
        picture, (width, height) = all_pictures[rng.integers(8)], sizes[i % len(sizes)]
        left, top = rng.integers(picture.width - width), rng.integers(picture.height - height)
        yield picture.crop((left, top, left + width, top + height))


SIZES = [(160, 120), (120, 160), (140, 140), (200, 150), (180, 180)]
PLANTS = {
    # what is planted: (sizes and JPEG quality of the reals, of the fakes, the numbers that must be told)
    "nothing": (SIZES, 75, SIZES, 75, set()),
    "fakes are square": ([(196, 100), (100, 196)], 75, [(140, 140)], 75, {"aspect ratio"}),
    "fakes are large": ([(100, 100)], 75, [(250, 250)], 75, {"pixels"}),
    "reals are saved better": (SIZES, 95, SIZES, 40, {"bytes per pixel", "quantisation", "blockiness"}),
}


@pytest.mark.parametrize("real_sizes, real_quality, fake_sizes, fake_quality, told", PLANTS.values(), ids=PLANTS)
def test_a_number_that_separates_the_labels_is_told_and_no_other(pictures, real_sizes, real_quality, fake_sizes,
                                                                 fake_quality, told):
    reals = [(jpeg(image, real_quality), 0, "train") for image in crops(pictures, 60, real_sizes, 0)]
    fakes = [(jpeg(image, fake_quality), 1, "train") for image in crops(pictures, 60, fake_sizes, 1)]
    found = audit.audit(columns_of(*reals, *fakes))
    numbers = found["auc_of_one_number"]
    separate = {name for name, value in numbers.items() if max(value, 1 - value) >= 0.7}
    assert told <= separate
    # Large images cost fewer bytes per pixel: that one may come along.
    assert separate - told <= ({"bytes per pixel"} if told else set())
    fatal, note = sentences(found)
    assert fatal == [] and len(note) == len(separate)
    for name in told:
        assert any(line.startswith(f"{name} alone separates the labels: AUC ") for line in note)


def test_the_formats_of_each_label_are_counted(pictures):
    a, b, c, d = crops(pictures, 4, SIZES, 0)
    found = audit.audit(columns_of((jpeg(a), 0, ""), (jpeg(b), 0, ""), (encode(c, "PNG"), 1, ""), (jpeg(d), 1, "")))
    assert found["formats"] == {"real": {"JPEG": 2}, "fake": {"PNG": 1, "JPEG": 1}}


# ---- findings ----

@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_test_image_with_a_copy_in_train_is_found(pictures, copy):
    one, *rest = pictures.values()
    found = audit.audit(columns_of((encode(one, "PNG"), 0, "train"), (copy(one), 0, "test"),
                                   *((jpeg(picture), i % 2, ("train", "test")[i // 2 % 2]) for i, picture in enumerate(rest))))
    assert found["twins"]["test_with_twin_in_train"] == 1 and found["twins"]["clusters_with_both_labels"] == 0
    fatal, _ = sentences(found)
    assert fatal[0].startswith("1 of 4 test images have a twin in train (such as 0.jpg, 1.jpg)") and "--resplit" in fatal[0] and len(fatal) == 1


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_picture_that_stands_under_both_labels_is_found(pictures, copy):
    one, *rest = pictures.values()
    found = audit.audit(columns_of((encode(one, "PNG"), 0, "train"), (copy(one), 1, "train"),
                                   *((jpeg(picture), 0, "test") for picture in rest)))
    assert found["twins"]["clusters_with_both_labels"] == 1 and found["twins"]["test_with_twin_in_train"] == 0
    assert sentences(found)[0] == ["1 pictures stand under both labels, as copies of each other, such as 0.jpg, 1.jpg."]


def test_twins_within_a_split_and_label_are_no_leak(pictures):
    images = [(jpeg(p, quality), i % 2, "train") for i, p in enumerate(pictures.values()) for quality in (90, 50)]
    found = audit.audit(columns_of(*images))
    assert found["twins"] == {"test": 0, "test_with_twin_in_train": 0, "clusters_with_both_labels": 0, "largest_cluster": 2}
    assert sentences(found)[0] == []


def test_a_twin_in_extra_is_no_twin_in_train(pictures):
    found = audit.audit(columns_of(*((jpeg(picture), i % 2, split) for i, picture in enumerate(pictures.values())
                                     for split in ("extra", "test"))))
    assert found["twins"]["test_with_twin_in_train"] == 0


@pytest.mark.parametrize("repeated, is_fatal", [(0, False), (1, False), (2, True)])
def test_one_repeated_image_in_a_hundred_is_noted_and_more_are_fatal(repeated, is_fatal):
    twins = {"test": 100, "test_with_twin_in_train": repeated, "clusters_with_both_labels": 0}
    formats = {"real": {"JPEG": 60}, "fake": {"JPEG": 40}}
    fatal, note = sentences({"images": 500, "formats": formats, "twins": twins, "auc_of_one_number": {},
                             "examples": [[["a", "b"]], []]})
    assert bool(fatal) == is_fatal and bool(note) == (repeated == 1)


def test_a_format_that_goes_with_the_label_is_told():
    twins = {"test": 0, "test_with_twin_in_train": 0, "clusters_with_both_labels": 0}
    formats = {"real": {"JPEG": 90, "PNG": 10}, "fake": {"PNG": 100}}
    _, note = sentences({"images": 200, "formats": formats, "twins": twins, "auc_of_one_number": {}, "examples": [[], []]})
    assert note == ["JPEG files are 90% of the reals and 0% of the fakes.", "PNG files are 10% of the reals and 100% of the fakes."]


# ---- the command ----

@pytest.fixture(scope="module")
def clean(make_folder, tmp_path_factory):
    """40 images, no two of one picture."""
    return make_folder(tmp_path_factory.mktemp("clean"),
                       {"train/real": 10, "train/fake": 10, "test/real": 10, "test/fake": 10})


@pytest.fixture
def leaking(clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "leaking")
    for i in range(5):
        Image.open(folder / f"train/real/00{i}.jpg").save(folder / f"test/real/copy{i}.jpg", quality=60)
    shutil.copy(folder / "train/real/009.jpg", folder / "train/fake/copy.jpg")
    return folder


def test_a_clean_folder_ends_with_0(clean, script):
    done = script("audit.py", "--data_dir", clean)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "40 images; formats of reals {'JPEG': 20}, of fakes {'JPEG': 20}"
    assert "LEAK" not in done.stdout


def test_a_leak_ends_with_1_and_says_what_to_do(leaking, script):
    done = script("audit.py", "--data_dir", leaking)
    assert done.returncode == 1, done.stderr
    assert "LEAK  5 of 25 test images have a twin in train" in done.stdout and "--resplit" in done.stdout
    assert "LEAK  1 pictures stand under both labels" in done.stdout


def test_json_holds_the_findings_and_the_sentences(leaking, script):
    done = script("audit.py", "--data_dir", leaking, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and len(found["fatal"]) == 2
    assert set(found) == {"images", "formats", "twins", "examples", "auc_of_one_number", "fatal", "note"}
    assert found["images"] == 46
    assert set(found["auc_of_one_number"]) == {"pixels", "aspect ratio", "bytes per pixel", "quantisation", "blockiness"}
    assert found["twins"] == {"test": 25, "test_with_twin_in_train": 5, "clusters_with_both_labels": 1, "largest_cluster": 2}


@pytest.mark.parametrize("folder", ["clean", "leaking"])
def test_the_folder_and_its_features_file_tell_the_same(folder, request, script, tmp_path):
    data = request.getfixturevalue(folder)
    made = script("extract_features.py", "--data_dir", data, "--output_file", "f.npz", CLIP_MODEL="tiny")
    assert made.returncode == 0, made.stderr
    told = [script("audit.py", *source, "--json") for source in (("--data_dir", data), ("--features_file", "f.npz"))]
    assert json.loads(told[0].stdout) == json.loads(told[1].stdout)
    assert told[0].returncode == told[1].returncode == (folder == "leaking")


def test_unlabelled_features_have_nothing_to_leak(clean, script):
    made = script("extract_features.py", "--data_dir", clean, "--output_file", "f.npz", "--unlabelled", CLIP_MODEL="tiny")
    assert made.returncode == 0, made.stderr
    done = script("audit.py", "--features_file", "f.npz", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 0


def test_images_that_cannot_be_read_are_told_and_left_out(leaking, script):
    (leaking / "train/real/text.jpg").write_text("no image")
    (leaking / "train/real/dangling.jpg").symlink_to("/nowhere")
    done = script("audit.py", "--data_dir", leaking, "--json")
    assert json.loads(done.stdout)["images"] == 46
    assert "left out train/real/text.jpg: not an image format we take" in done.stderr
    assert "left out train/real/dangling.jpg: " in done.stderr


def without_images(folder):
    for label in ("real", "fake"):
        (folder / "data" / label).mkdir(parents=True)
        (folder / "data" / label / "1.jpg").touch()


@pytest.mark.parametrize("prepare, flags, words", [
    (lambda folder: None, ["--data_dir", "data"], ["data", "no such folder"]),
    (lambda folder: (folder / "data").mkdir(), ["--data_dir", "data"], ["the folder is empty"]),
    (without_images, ["--data_dir", "data"], ["no readable image"]),
    (lambda folder: None, ["--features_file", "f.npz"], ["f.npz", "no such file", "extract_features.py"]),
    (lambda folder: (folder / "f.npz").write_text("text"), ["--features_file", "f.npz"], ["f.npz", "is not a features file"]),
], ids=["missing folder", "empty folder", "nothing readable", "missing file", "another file"])
def test_a_mistake_is_told_in_one_line(prepare, flags, words, script, tmp_path):
    prepare(tmp_path)
    assert_one_line_error(script("audit.py", *flags), *words)


@pytest.mark.parametrize("flags", [[], ["--data_dir", "d", "--features_file", "f"]], ids=["neither", "both"])
def test_a_folder_or_a_file_is_to_be_named_not_both(flags, script):
    assert script("audit.py", *flags).returncode == 2
