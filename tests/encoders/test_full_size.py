"""The user's three commands with a full-size ViT-L/14 checkpoint: random weights, OpenAI's shape and file format.

It says nothing about accuracy; it says that 300 million weights go all the way, and come out as clip.load's.
"""

import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from small_clip import centred_cosines, pairwise_cosines, rounded, save_state_dict

from detector.encoders import prepare, runtime
from detector.features.file import load_features
from detector.images import preprocessing
from detector.model.file import load_model

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """ViT-L/14's vision tower, 24 layers of width 1024, weights scaled so that different images differ."""
    import clip.model

    torch.manual_seed(0)
    tower = clip.model.VisionTransformer(224, 14, 1024, 24, 16, 768)
    with torch.no_grad():
        for weight in tower.transformer.parameters():
            if weight.ndim > 1:
                weight.mul_(1.5)
    return save_state_dict(rounded(tower), tmp_path_factory.mktemp("full") / "vit-l-14.pt")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_the_three_commands_run_with_a_full_size_vit_l_14(
    checkpoint, cache, make_folder, script, tmp_path
):
    folder = make_folder(
        tmp_path / "images", {"train/real": 20, "train/fake": 20, "test/real": 4, "test/fake": 4}
    )
    settings = {"CLIP_MODEL": str(checkpoint), "CLIP_CACHE": str(cache)}
    for words in (
        ["extract_features.py", "--data_dir", folder],
        ["train_model.py"],
        [
            "classify.py",
            "--image_path",
            folder / "test/real/000.jpg",
            "--model_path",
            "model.joblib",
        ],
    ):
        started = time.monotonic()
        result = script(*words, **settings)
        assert result.returncode == 0, result.stderr
        print(f"{words[0]}: {time.monotonic() - started:.1f} s")
    assert re.fullmatch(r"(real|fake) \(confidence [01]\.\d\d\)\n", result.stdout)
    assert load_features(tmp_path / "features.npz")["features"].shape == (48, 768)
    assert load_model(tmp_path / "model.joblib")["support_vectors"].shape[1] == 768


def test_its_features_are_those_of_clip_load(checkpoint, cache, photos, monkeypatch):
    import clip

    monkeypatch.setenv("CLIP_CACHE", str(cache))
    folder = prepare.ensure_encoder(str(checkpoint))
    images = [Image.open(path).convert("RGB") for path in photos.values()][:4]
    pixels = np.stack([preprocessing.preprocess(image, 224) for image in images])
    exact, fast = (
        runtime.Encoder(folder, precision=precision).encode(pixels)
        for precision in ("float32", "auto")
    )
    model, transform = clip.load(str(checkpoint), device="cpu")
    with torch.inference_mode():
        theirs = model.encode_image(torch.stack([transform(image) for image in images])).numpy()
    assert np.median(pairwise_cosines(theirs)) < 0.5, (
        "the images must differ for the comparison to mean something"
    )
    assert centred_cosines(exact, theirs).min() >= 0.99999
    assert centred_cosines(fast, theirs).min() >= 0.9995


@pytest.mark.parametrize(
    "train, parts",
    [
        ("blocks:1", r"transformer\.resblocks\.23\.|ln_post\.|proj$"),
        ("norms", r".*ln_"),
        ("lora:4", r".*(in_proj_weight|out_proj.weight|c_fc.weight|c_proj.weight)$"),
    ],
)
def test_two_steps_of_fine_tuning_change_what_is_named_of_a_full_size_vit_l_14(
    train, parts, checkpoint, make_folder, tmp_path, capsys
):
    import finetune_clip

    folder = make_folder(
        tmp_path / "images",
        {f"train/{label}/{source}": 1 for label in ("real", "fake") for source in "ab"},
    )
    finetune_clip.main(
        [
            "--clip_model",
            str(checkpoint),
            "--train",
            train,
            "--data_dir",
            str(folder),
            "--steps",
            "2",
            "--batch_size",
            "1",
            "--lr",
            "0.05",
            "--keep",
            "0",
            "--checkpointing",
            "--output",
            str(tmp_path / "tuned.pt"),
        ]
    )
    cost = re.search("--train .* GB", capsys.readouterr().err)[0]
    with capsys.disabled():
        print(cost)
    before, after = torch.load(checkpoint), torch.load(tmp_path / "tuned.pt")
    changed = {
        name.removeprefix("visual.")
        for name in before
        if name.startswith("visual.") and not torch.equal(before[name], after[name])
    }
    named = {
        name
        for name in (k.removeprefix("visual.") for k in before if k.startswith("visual."))
        if re.match(parts, name)
    }
    assert changed <= named and len(changed) > 0.9 * len(named)
