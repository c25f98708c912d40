"""The three commands with a full-size ViT-L/14 of random weights, in OpenAI's file format.

The tests prove that 300 million weights give the features of clip.load. Accuracy is not tested.
"""

import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from small_clip import (
    centred_cosines,
    clip_load,
    pairwise_cosines,
    pixels_of,
    rounded,
    save_state_dict,
)

from detector.encoders import prepare, runtime
from detector.features.file import load_features
from detector.model.file import load_model

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """ViT-L/14's vision tower, with weights scaled so that different images differ."""
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
    counts = {"train/real": 20, "train/fake": 20, "test/real": 4, "test/fake": 4}
    make_folder(tmp_path / "images", counts)
    settings = {"CLIP_MODEL": str(checkpoint), "CLIP_CACHE": str(cache)}
    for command in (
        "extract_features.py --data_dir images",
        "train_model.py",
        "classify.py --image_path images/test/real/000.jpg --model_path model.joblib",
    ):
        started = time.monotonic()
        result = script(*command.split(), **settings)
        assert result.returncode == 0, result.stderr
        print(f"{command}: {time.monotonic() - started:.1f} s")
    assert re.fullmatch(r"(real|fake) \(confidence [01]\.\d\d(, uncertain)?\)\n", result.stdout)
    assert load_features(tmp_path / "features.npz")["features"].shape == (48, 768)
    assert load_model(tmp_path / "model.joblib")["support_vectors"].shape[1] == 768


def test_full_size_features_match_clip_load(checkpoint, cache, photos, monkeypatch):
    monkeypatch.setenv("CLIP_CACHE", str(cache))
    folder = prepare.ensure_encoder(str(checkpoint))
    images = [Image.open(path).convert("RGB") for path in photos.values()][:4]
    pixels = pixels_of(images, 224)
    exact, fast = (
        runtime.Encoder(folder, precision=precision).encode(pixels)
        for precision in ("float32", "auto")
    )
    model, transform = clip_load(checkpoint)
    with torch.inference_mode():
        theirs = model.encode_image(torch.stack([transform(image) for image in images])).numpy()
    assert np.median(pairwise_cosines(theirs)) < 0.5  # else the comparison proves nothing
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
def test_fine_tuning_a_full_size_vit_l_14_changes_the_named_parts(
    train, parts, checkpoint, make_folder, tmp_path, capsys
):
    import finetune_clip

    folders = ("train/real/a", "train/real/b", "train/fake/a", "train/fake/b")
    folder = make_folder(tmp_path / "images", dict.fromkeys(folders, 1))
    flags = f"--clip_model {checkpoint} --train {train} --data_dir {folder} --steps 2"
    flags += f" --batch_size 1 --lr 0.05 --keep 0 --checkpointing --output {tmp_path / 'tuned.pt'}"
    finetune_clip.main(flags.split())
    cost = re.search("--train .* GB", capsys.readouterr().err)[0]
    with capsys.disabled():
        print(cost)
    before, after = torch.load(checkpoint), torch.load(tmp_path / "tuned.pt")
    visual = [name.removeprefix("visual.") for name in before if name.startswith("visual.")]
    changed = {
        name
        for name in visual
        if not torch.equal(before[f"visual.{name}"], after[f"visual.{name}"])
    }
    named = {name for name in visual if re.match(parts, name)}
    assert changed <= named and len(changed) > 0.9 * len(named)
