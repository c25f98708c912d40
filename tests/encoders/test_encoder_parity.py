"""The features of a prepared encoder are those of CLIP's own model with CLIP's own transform.

Small checkpoints with random weights stand in for OpenAI's; small_clip.py says how they are made to show mistakes, and
the planted faults below show that they do.
"""

import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import clip
import numpy as np
import pytest
import small_clip
import torch

from detector.base.errors import EncoderError
from detector.encoders import prepare, runtime, weights
from detector.images import preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 0.99999  # lowest cosine of any image in float32
CLOSE = 0.9995  # mean cosine in bfloat16 (and of any single image, CLOSE_EACH)
CLOSE_EACH = 0.998
Case = namedtuple("Case", "images tower path folder pixels reference")


@pytest.fixture(scope="module")
def images(photos):
    return small_clip.crops(photos)


@pytest.fixture(
    scope="module",
    params=[(kind, form) for kind in small_clip.SMALL for form in small_clip.FORMS],
    ids=lambda param: " as ".join(param),
)
def case(request, images, tmp_path_factory):
    """A checkpoint, its prepared folder, our pixels of the images, and the features that `clip.load` gives for them."""
    kind, form = request.param
    home = tmp_path_factory.mktemp("clip")
    tower = small_clip.SMALL[kind](images)
    path = small_clip.FORMS[form](tower, home / "small.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_CACHE", str(home / "cache"))
        folder = prepare.ensure_encoder(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch.jit.load, which clip.load tries first, is deprecated
        model, transform = clip.load(str(path), device="cpu")
    with torch.inference_mode():
        reference = model.encode_image(torch.stack([transform(image) for image in images])).numpy()
    return Case(
        images,
        tower,
        path,
        folder,
        small_clip.pixels_of(images, model.visual.input_resolution),
        reference,
    )


def encoder_of(case, precision):
    try:
        return runtime.Encoder(case.folder, "cpu", precision)
    except EncoderError as error:
        if "no bfloat16" in str(error):
            pytest.skip("this processor has no bfloat16")
        raise


def encode(encoder, pixels, batch_size):
    return np.concatenate(
        [encoder.encode(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)]
    )


def test_the_stand_ins_tell_images_apart(case):
    """Without this the comparisons below would mean little."""
    assert np.median(small_clip.pairwise_cosines(case.reference)) < 0.5
    assert np.isfinite(case.reference).all() and case.reference.dtype == np.float32


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_float32_features_are_clips(case, batch_size):
    features = encode(encoder_of(case, "float32"), case.pixels, batch_size)
    assert features.dtype == np.float32 and features.shape == case.reference.shape
    assert small_clip.centred_cosines(features, case.reference).min() >= EXACT
    assert np.linalg.norm(features) == pytest.approx(
        np.linalg.norm(case.reference), rel=1e-4
    )  # CLIP does not normalise


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_bfloat16_features_are_close_to_clips(case, batch_size):
    encoder = encoder_of(case, "bfloat16")
    assert encoder.precision == "bfloat16"
    cosines = small_clip.centred_cosines(encode(encoder, case.pixels, batch_size), case.reference)
    assert cosines.mean() >= CLOSE and cosines.min() >= CLOSE_EACH


def test_the_precision_by_default_is_one_of_the_two_and_does_not_change_the_identity(case):
    encoder = encoder_of(case, "auto")
    assert encoder.precision in ("float32", "bfloat16")
    assert encoder.identity == encoder_of(case, "float32").identity


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not runtime.cuda_visible():
        pytest.skip("this processor has no CUDA device beside it")
    return request.param


@pytest.mark.parametrize(
    "precision, least, least_each", [("float32", EXACT, EXACT), ("auto", CLOSE, CLOSE_EACH)]
)
def test_the_cuda_path_gives_clips_features(case, device, precision, least, least_each):
    """`torch_forward` is what runs on CUDA ('auto': float16, prepared as clip.load does there); with device 'cpu' as far as
    that can show it, which is all but the device's own kernels, and moving data to it and back."""
    forward, run_as = runtime.torch_forward(
        case.folder / "vision.safetensors", runtime.read_manifest(case.folder), device, precision
    )
    assert run_as == {"float32": "float32", "auto": "float16"}[precision]
    cosines = small_clip.centred_cosines(
        encode(SimpleNamespace(encode=forward), case.pixels, 3), case.reference
    )
    assert cosines.mean() >= least and cosines.min() >= least_each


def test_a_compiled_tower_sees_batches_of_one_size_and_gives_the_same(case, device, monkeypatch):
    shapes = []

    def watched(module):
        module.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        if device == "cuda":  # compiling takes a minute on a processor, and is never done there
            compiled(module)

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", watched)
    weights, manifest = case.folder / "vision.safetensors", runtime.read_manifest(case.folder)
    forward, _ = runtime.torch_forward(weights, manifest, device, "float32", compile=True)
    rows = [case.pixels[i:j] for i, j in ((0, 5), (5, 7), (7, 12), (12, 16))]
    found = [forward(pixels) for pixels in rows]
    assert [len(features) for features in found] == [5, 2, 5, 4]
    assert small_clip.centred_cosines(np.concatenate(found), case.reference).min() >= EXACT
    assert len(set(shapes)) == 1 and 5 in shapes[0]


# ---- planted faults: the comparison must see them, at the looser of the two bounds ----


def with_heads(case, factor):
    """Features of the same weights in a tower that has another number of heads."""
    arch = weights.architecture(small_clip.arrays_of(case.tower))
    tower = runtime.vision_tower(
        arch | {"heads": int(arch["heads"] * factor)}, case.tower.state_dict()
    )
    with torch.inference_mode():
        return tower(torch.from_numpy(case.pixels)).numpy()


def prepared(case, pixels):
    return encoder_of(case, "float32").encode(np.ascontiguousarray(pixels))


FAULTS = {
    "half the heads": lambda case: with_heads(case, 0.5),
    "twice the heads": lambda case: with_heads(case, 2),
    "swapped channels": lambda case: prepared(case, case.pixels[:, ::-1]),
    "no normalisation": lambda case: prepared(
        case, case.pixels * preprocessing.STD[:, None, None] + preprocessing.MEAN[:, None, None]
    ),
    "two images exchanged": lambda case: prepared(
        case, case.pixels[[1, 0, *range(2, len(case.pixels))]]
    ),
    "a pixel's shift": lambda case: prepared(case, np.roll(case.pixels, 1, axis=3)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_planted_fault(case, fault):
    cosines = small_clip.centred_cosines(FAULTS[fault](case), case.reference)
    assert cosines.mean() < CLOSE and cosines.min() < CLOSE_EACH


def test_right_heads_pass_where_wrong_ones_fail(case):
    """The builder of the fault above is itself right: with the derived number of heads it agrees."""
    assert small_clip.centred_cosines(with_heads(case, 1), case.reference).min() >= EXACT


# ---- determinism ----


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_pixels_give_the_same_features_every_time(case, precision):
    first, second = encoder_of(case, precision), encoder_of(case, precision)
    features = encode(first, case.pixels, 8)
    assert (encode(first, case.pixels, 8) == features).all()
    assert (encode(second, case.pixels, 8) == features).all()


def test_features_returned_earlier_are_not_overwritten_by_later_calls(case):
    encoder = encoder_of(case, "float32")
    first = encoder.encode(case.pixels[:2])
    kept = first.copy()
    encoder.encode(case.pixels[2:4])
    assert (first == kept).all()


def by_torch(case):
    return runtime.torch_forward(
        case.folder / "vision.safetensors", runtime.read_manifest(case.folder), "cpu", "float32"
    )[0]


PATHS = {
    "openvino, one thread": (
        lambda case: runtime.Encoder(case.folder, "cpu", "float32", threads=1).encode
    ),
    "openvino, two threads": (
        lambda case: runtime.Encoder(case.folder, "cpu", "float32", threads=2).encode
    ),
    "torch": by_torch,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch_size", [5, 16])
def test_neighbours_size_of_the_batch_and_threads_do_not_matter(case, path, batch_size):
    alone = encode(encoder_of(case, "float32"), case.pixels, 1)
    forward = PATHS[path](case)
    for order in (range(15, -1, -1), np.random.default_rng(0).permutation(16)):
        together = np.empty_like(alone)
        together[list(order)] = encode(
            SimpleNamespace(encode=forward), case.pixels[list(order)], batch_size
        )
        assert small_clip.centred_cosines(together, alone).min() >= EXACT


def test_a_bright_or_empty_neighbour_does_not_matter(case):
    alone, encoder = case.pixels[:1], encoder_of(case, "float32")
    for neighbour in (np.zeros_like(alone), np.full_like(alone, 100)):
        beside = encoder.encode(np.concatenate([neighbour, alone, neighbour]))[1:2]
        np.testing.assert_allclose(beside, encoder.encode(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_threads_that_share_an_encoder_get_their_own_features(case, path):
    alone, forward = encode(encoder_of(case, "float32"), case.pixels, 1), PATHS[path](case)
    with ThreadPoolExecutor(4) as pool:
        together = np.concatenate(
            list(pool.map(lambda i: forward(case.pixels[i : i + 1]), range(16)))
        )
    assert small_clip.centred_cosines(together, alone).min() >= EXACT


# ---- identity ----


def identity_of(tower, **changes):
    arrays = small_clip.arrays_of(tower)
    return weights.identity_of(arrays, {**weights.architecture(arrays), **changes})


def identity(path):
    return runtime.read_manifest(prepare.ensure_encoder(str(path)))["identity"]


@pytest.mark.parametrize("kind", small_clip.SMALL)
def test_both_file_forms_of_the_same_weights_are_the_same_encoder(kind, images, tmp_path):
    tower = small_clip.SMALL[kind](images)
    one, other = [
        identity(save(tower, tmp_path / f"{form}.pt")) for form, save in small_clip.FORMS.items()
    ]
    assert one == other and len(one) == 64


@pytest.mark.parametrize("kind", small_clip.SMALL)
def test_other_weights_are_another_encoder(kind, images, tmp_path):
    tower = small_clip.SMALL[kind](images)
    before = identity_of(tower)
    with torch.no_grad():
        weight = next(tower.parameters())
        weight.view(-1)[0] += 0.5  # one number of all
    assert identity_of(tower) != before
    assert identity_of(small_clip.SMALL[kind](images, seed=1)) != before
    assert identity_of(small_clip.SMALL[kind](images)) == before


def test_other_heads_or_statistics_are_another_encoder(images):
    tower = small_clip.small_resnet(images)
    before = identity_of(tower)
    assert identity_of(tower, heads=8) != before
    tower.bn1.running_mean[0] += 1
    assert identity_of(tower) != before
