"""Vision transformers of OpenAI's shapes, with three blocks: features match clip.load."""

import numpy as np
import pytest
import small_clip
import torch
from PIL import Image

from detector.encoders import layers, prepare, runtime

pytestmark = pytest.mark.long

# resolution, patch, width, output of clip.model.VisionTransformer
SHAPES = {
    "ViT-B/32": (224, 32, 768, 512),
    "ViT-B/16": (224, 16, 768, 512),
    "ViT-L/14": (224, 14, 1024, 768),
    "ViT-L/14@336px": (336, 14, 1024, 768),
}
DEPTH = 3


@pytest.fixture(scope="module", params=SHAPES)
def tower(request):
    import clip.model

    resolution, patch, width, output = SHAPES[request.param]
    torch.manual_seed(0)
    tower = clip.model.VisionTransformer(resolution, patch, width, DEPTH, width // 64, output)
    with torch.no_grad():
        for weight in tower.transformer.parameters():
            if weight.ndim > 1:
                weight.mul_(3.5)  # 2.5 gives similar images in the larger shapes
    return small_clip.rounded(tower)


@pytest.fixture(scope="module")
def files(tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return {form: save(tower, folder / f"{form}.pt") for form, save in small_clip.FORMS.items()}


@pytest.fixture(scope="module")
def pixels(tower, photos):
    images = [Image.open(path).convert("RGB") for path in photos.values()]
    return small_clip.pixels_of(images, tower.input_resolution)


def references(path, pixels):
    """{layers: features by hooks on the modules of clip.load}."""
    model, _ = small_clip.clip_load(path)
    outputs = small_clip.outputs_by_hooks(model.visual, pixels)
    names = {"2": ["2"], "1,3": ["1", "3"], "multi": ["1", "2", "final"]}
    return {
        "final": outputs["final"].numpy(),
        "penultimate": outputs["penultimate"].numpy(),
        **{asked: small_clip.joined(outputs, blocks) for asked, blocks in names.items()},
    }


def test_features_of_each_choice_of_layers_match_clip_load(
    tower, files, pixels, tmp_path, monkeypatch
):
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    expected = references(files["state dict"], pixels)
    assert np.median(small_clip.pairwise_cosines(expected["final"])) < 0.5
    for asked, reference in expected.items():
        folder = prepare.ensure_encoder(str(files["archive"]), layers=asked)
        assert runtime.read_manifest(folder)["layers"] == layers.canonical(asked, {"layers": DEPTH})
        encoder = runtime.Encoder(folder, "cpu", "float32")
        for size in (1, 3, 8):
            features = small_clip.encode(encoder.encode, pixels, size)
            assert small_clip.centred_cosines(features, reference).min() >= 0.99999, (asked, size)
