"""OpenAI's vision transformers in shape, three blocks deep: features are clip.load's."""

import warnings

import numpy as np
import pytest
import small_clip
import torch
from PIL import Image

from detector.encoders import layers, prepare, runtime, weights

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
                weight.mul_(3.5)  # at 2.5 images look alike to the larger ones
    return small_clip.rounded(tower)


@pytest.fixture(scope="module")
def files(tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return {form: save(tower, folder / f"{form}.pt") for form, save in small_clip.FORMS.items()}


@pytest.fixture(scope="module")
def pixels(tower, photos):
    return small_clip.pixels_of(
        [Image.open(path).convert("RGB") for path in photos.values()], tower.input_resolution
    )


def test_both_file_forms_hold_the_same_tower(tower, files):
    state = tower.state_dict()
    for path in files.values():
        arrays = weights.read_checkpoint(path)
        assert arrays.keys() == state.keys()
        assert all(
            torch.equal(torch.from_numpy(arrays[name]).float(), state[name]) for name in state
        )


def references(path, pixels):
    """{layers: features by clip.load, hooks on its own modules}."""
    import clip

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch.jit.load, which clip.load tries first, is deprecated
        model, _ = clip.load(str(path), device="cpu")
    tower, seen = model.visual, {}
    for number, block in enumerate(tower.transformer.resblocks, 1):
        block.register_forward_hook(
            lambda _, given, out, number=number: seen.update({str(number): out[0]})
        )
    tower.ln_post.register_forward_hook(lambda _, given, out: seen.update(penultimate=out))
    with torch.inference_mode():
        seen["final"] = model.encode_image(torch.from_numpy(pixels))
    unit = {name: part / part.norm(dim=1, keepdim=True) for name, part in seen.items()}
    joined = {"2": ["2"], "1,3": ["1", "3"], "multi": ["1", "2", "final"]}
    return {
        "final": seen["final"].numpy(),
        "penultimate": seen["penultimate"].numpy(),
        **{
            asked: torch.cat([unit[name] for name in names], 1).numpy()
            for asked, names in joined.items()
        },
    }


def test_features_of_every_choice_of_layers_are_those_of_clip_load(
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
            features = np.concatenate(
                [encoder.encode(pixels[i : i + size]) for i in range(0, len(pixels), size)]
            )
            assert small_clip.centred_cosines(features, reference).min() >= 0.99999, (asked, size)
