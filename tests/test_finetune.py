"""finetune_clip.py: a checkpoint that clip.load and prepare_clip.py accept, interrupted or not, and honest about what
it has seen."""
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training an encoder needs it")
clip = pytest.importorskip("clip", reason="clip is not installed: training an encoder needs it")
from PIL import Image  # noqa: E402

import encoders  # noqa: E402
import imaging  # noqa: E402
import finetune_clip  # noqa: E402
import prepare_clip  # noqa: E402
from conftest import assert_one_line_error  # noqa: E402
from features import load_features  # noqa: E402

pytestmark = pytest.mark.slow

STEPS = ["--steps", "4", "--batch_size", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_folder):
    return make_folder(tmp_path_factory.mktemp("images"), {f"train/{label}/s{i}": 8 for label in ("real", "fake") for i in (0, 1)})


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "mine.pt"
    finetune_clip.main(["--data_dir", str(folder), "--output", str(output), *STEPS])
    return output


def test_clip_load_reads_the_checkpoint_and_the_prepared_folder_gives_its_features(trained, photos):
    model, transform = clip.load(str(trained), device="cpu")
    encoder = encoders.Encoder(prepare_clip.ensure_encoder(str(trained)), precision="float32")
    images = [Image.open(path).convert("RGB") for path in photos.values()]
    with torch.inference_mode():
        theirs = model.encode_image(torch.stack([transform(image) for image in images])).numpy()
    ours = encoder.encode(np.stack([imaging.preprocess(image, encoder.resolution) for image in images]))
    theirs, ours = theirs - theirs.mean(0), ours - ours.mean(0)
    cosine = (theirs * ours).sum(1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(ours, axis=1)
    assert cosine.min() > 0.9999


@pytest.mark.long
def test_an_interrupted_training_goes_on_to_the_same_weights(folder, trained, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(finetune_clip, "SAVE_EVERY", 2)
    monkeypatch.setattr(finetune_clip, "kept_auc", killed)  # called right after the state is stored
    arguments = ["--data_dir", str(folder), "--output", str(tmp_path / "mine.pt"), *STEPS]
    with pytest.raises(Killed):
        finetune_clip.main(arguments)
    assert not (tmp_path / "mine.pt").exists()
    monkeypatch.undo()
    finetune_clip.main(arguments)
    whole, resumed = torch.load(trained), torch.load(tmp_path / "mine.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(p.name for p in tmp_path.glob("mine*")) == ["mine.json", "mine.pt"]


def test_images_that_the_encoder_has_seen_are_marked_and_the_kept_ones_are_not(folder, trained, script, tmp_path):
    result = script("extract_features.py", "--data_dir", folder, CLIP_MODEL=str(trained))
    assert result.returncode == 0, result.stderr
    columns = load_features(tmp_path / "features.npz")
    card = json.loads(trained.with_suffix(".json").read_text())
    seen = columns["splits"] == "seen"
    assert seen.sum() == card["images"] > 0 and (~seen).sum() > 0
    for digest, was_seen in zip(columns["sha256"], seen):
        assert finetune_clip.kept_back(digest, card["arguments"]["keep"]) != was_seen
    assert re.search(rf"{seen.sum()} images were used to train this encoder", result.stderr)


def test_half_of_every_draw_goes_to_each_class_and_small_sources_are_not_drowned():
    rows = [(None, label, source, "") for label, source, n in ((0, "big", 90), (0, "small", 10), (1, "only", 30)) for _ in range(n)]
    weight = finetune_clip.balanced_draw(rows)
    of = {key: sum(w for w, row in zip(weight, rows) if row[1:3] == key) for key in {row[1:3] for row in rows}}
    assert of[1, "only"] == pytest.approx(0.5) and of[0, "big"] + of[0, "small"] == pytest.approx(0.5)
    assert of[0, "big"] / of[0, "small"] == pytest.approx(3)  # root of 90 / 10


def test_a_folder_without_both_classes_in_the_chosen_splits_is_one_line(folder, script):
    assert_one_line_error(script("finetune_clip.py", "--data_dir", folder, "--train_splits", "extra"), "extra", "both classes")
