"""The features of a prepared encoder match CLIP's own model with CLIP's own transform.

Small checkpoints with random weights replace OpenAI's. small_clip.py makes them so that mistakes
show. The planted faults below prove it.
"""

from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import small_clip
import torch
from small_clip import encode

from detector.base.errors import EncoderError
from detector.encoders import prepare, runtime, weights
from detector.images.preprocessing import clip_transform

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 0.99999  # lowest cosine of any image in float32
CLOSE = 0.9995  # mean cosine in bfloat16
CLOSE_EACH = 0.998  # lowest cosine of any image in bfloat16
Case = namedtuple("Case", "tower folder pixels reference")


@pytest.fixture(scope="module")
def images(photos):
    return small_clip.crops(photos)


@pytest.fixture(
    scope="module",
    params=[(kind, form) for kind in small_clip.SMALL for form in small_clip.FORMS],
    ids=lambda param: " as ".join(param),
)
def case(request, images, tmp_path_factory):
    """A checkpoint, its prepared folder, our pixels of the images, and the features of CLIP."""
    kind, form = request.param
    home = tmp_path_factory.mktemp("clip")
    tower = small_clip.SMALL[kind](images)
    path = small_clip.FORMS[form](tower, home / "small.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_CACHE", str(home / "cache"))
        folder = prepare.ensure_encoder(str(path))
    model, transform = small_clip.clip_load(path)
    with torch.inference_mode():
        reference = model.encode_image(torch.stack([transform(image) for image in images])).numpy()
    pixels = small_clip.pixels_of(images, tower.input_resolution)
    return Case(tower, folder, pixels, reference)


def encoder_of(case, precision):
    try:
        return runtime.Encoder(case.folder, "cpu", precision)
    except EncoderError as error:
        if "no bfloat16" in str(error):
            pytest.skip("this processor has no bfloat16")
        raise


def torch_forward(case, device, precision, **options):
    weights, manifest = case.folder / "vision.safetensors", runtime.read_manifest(case.folder)
    return runtime.torch_forward(weights, manifest, device, precision, **options)


def test_the_random_encoders_separate_the_images(case):
    """Otherwise the comparisons below would prove little."""
    assert np.median(small_clip.pairwise_cosines(case.reference)) < 0.5
    assert np.isfinite(case.reference).all() and case.reference.dtype == np.float32


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_float32_features_match_clip(case, batch_size):
    features = encode(encoder_of(case, "float32").encode, case.pixels, batch_size)
    assert features.dtype == np.float32 and features.shape == case.reference.shape
    assert small_clip.centred_cosines(features, case.reference).min() >= EXACT
    # CLIP does not normalise
    assert np.linalg.norm(features) == pytest.approx(np.linalg.norm(case.reference), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_bfloat16_features_are_close_to_clip(case, batch_size):
    encoder = encoder_of(case, "bfloat16")
    assert encoder.precision == "bfloat16"
    features = encode(encoder.encode, case.pixels, batch_size)
    cosines = small_clip.centred_cosines(features, case.reference)
    assert cosines.mean() >= CLOSE and cosines.min() >= CLOSE_EACH


def test_the_default_precision_does_not_change_the_identity(case):
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
def test_the_cuda_path_matches_clip(case, device, precision, least, least_each):
    """`torch_forward` runs on CUDA ('auto': float16, prepared as clip.load does on CUDA).

    On the CPU the test covers all but CUDA's kernels and the copies to the device and back.
    """
    forward, run_as = torch_forward(case, device, precision)
    assert run_as == {"float32": "float32", "auto": "float16"}[precision]
    cosines = small_clip.centred_cosines(encode(forward, case.pixels, 3), case.reference)
    assert cosines.mean() >= least and cosines.min() >= least_each


def test_a_compiled_tower_gets_batches_of_one_size_and_matches_clip(case, device, monkeypatch):
    shapes = []

    def watched(module):
        module.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        if device == "cuda":  # on a CPU it is never used and takes a minute
            compile_module(module)

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", watched)
    forward, _ = torch_forward(case, device, "float32", compile=True)
    batches = np.split(case.pixels, [5, 7, 12])
    features = [forward(pixels) for pixels in batches]
    assert [len(part) for part in features] == [5, 2, 5, 4]
    assert small_clip.centred_cosines(np.concatenate(features), case.reference).min() >= EXACT
    assert len(set(shapes)) == 1 and 5 in shapes[0]


# ---- planted faults: the comparison must detect them, even with the looser limits ----


def with_heads(case, factor):
    """Features of the same weights in a tower with another number of heads."""
    arch = weights.architecture(small_clip.arrays_of(case.tower))
    arch["heads"] = int(arch["heads"] * factor)
    tower = runtime.vision_tower(arch, case.tower.state_dict())
    with torch.inference_mode():
        return tower(torch.from_numpy(case.pixels)).numpy()


def prepared(case, pixels):
    return encoder_of(case, "float32").encode(np.ascontiguousarray(pixels))


MEAN, STD = (
    np.float32(getattr(clip_transform(1), name))[:, None, None] for name in ("mean", "std")
)
FAULTS = {
    "half the heads": lambda case: with_heads(case, 0.5),
    "twice the heads": lambda case: with_heads(case, 2),
    "swapped channels": lambda case: prepared(case, case.pixels[:, ::-1]),
    "no normalisation": lambda case: prepared(case, case.pixels * STD + MEAN),
    "two images exchanged": lambda case: prepared(
        case, case.pixels[[1, 0, *range(2, len(case.pixels))]]
    ),
    "a pixel's shift": lambda case: prepared(case, np.roll(case.pixels, 1, axis=3)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_detects_a_planted_fault(case, fault):
    cosines = small_clip.centred_cosines(FAULTS[fault](case), case.reference)
    assert cosines.mean() < CLOSE and cosines.min() < CLOSE_EACH


def test_the_planted_fault_with_the_right_heads_passes(case):
    """The planted fault comes from the heads and not from its own tower."""
    assert small_clip.centred_cosines(with_heads(case, 1), case.reference).min() >= EXACT


# ---- determinism ----


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_pixels_give_the_same_features_every_time(case, precision):
    first, second = encoder_of(case, precision), encoder_of(case, precision)
    features = encode(first.encode, case.pixels, 8)
    assert (encode(first.encode, case.pixels, 8) == features).all()
    assert (encode(second.encode, case.pixels, 8) == features).all()


@pytest.mark.parametrize("case", [("vit", "state dict")], indirect=True, ids=["vit"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("number", [2, runtime.BLOCK, 2 * runtime.BLOCK + 3])
def test_alone_or_among_others_an_image_has_the_same_features(case, precision, number):
    encoder = encoder_of(case, precision)
    rows = np.random.default_rng(0).integers(len(case.pixels), size=number)
    assert encoder.single
    alone = encode(encoder.encode, case.pixels, 1)[rows]
    assert (encoder.encode(case.pixels[rows]) == alone).all()


def test_features_returned_earlier_are_not_overwritten_by_later_calls(case):
    encoder = encoder_of(case, "float32")
    first = encoder.encode(case.pixels[:2])
    kept = first.copy()
    encoder.encode(case.pixels[2:4])
    assert (first == kept).all()


PATHS = {
    "openvino, one thread": (
        lambda case: runtime.Encoder(case.folder, "cpu", "float32", threads=1).encode
    ),
    "openvino, two threads": (
        lambda case: runtime.Encoder(case.folder, "cpu", "float32", threads=2).encode
    ),
    "torch": lambda case: torch_forward(case, "cpu", "float32")[0],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch_size", [5, 16])
def test_batch_order_batch_size_and_threads_do_not_change_features(case, path, batch_size):
    alone = encode(encoder_of(case, "float32").encode, case.pixels, 1)
    forward = PATHS[path](case)
    for order in (np.arange(16)[::-1], np.random.default_rng(0).permutation(16)):
        together = np.empty_like(alone)
        together[order] = encode(forward, case.pixels[order], batch_size)
        assert small_clip.centred_cosines(together, alone).min() >= EXACT


def test_a_bright_or_black_image_in_the_batch_does_not_change_features(case):
    alone, encoder = case.pixels[:1], encoder_of(case, "float32")
    for neighbour in (np.zeros_like(alone), np.full_like(alone, 100)):
        beside = encoder.encode(np.concatenate([neighbour, alone, neighbour]))[1:2]
        np.testing.assert_allclose(beside, encoder.encode(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_threads_that_share_an_encoder_get_their_own_features(case, path):
    alone = encode(encoder_of(case, "float32").encode, case.pixels, 1)
    with ThreadPoolExecutor(4) as pool:
        together = np.concatenate(list(pool.map(PATHS[path](case), np.split(case.pixels, 16))))
    assert small_clip.centred_cosines(together, alone).min() >= EXACT


# ---- identity ----


def identity_of(tower, **changes):
    arrays = small_clip.arrays_of(tower)
    return weights.identity_of(arrays, {**weights.architecture(arrays), **changes})


@pytest.mark.parametrize("kind", small_clip.SMALL)
def test_both_file_forms_of_the_same_weights_are_the_same_encoder(kind, images, tmp_path):
    tower = small_clip.SMALL[kind](images)
    one, other = (
        runtime.read_manifest(prepare.ensure_encoder(str(save(tower, tmp_path / f"{form}.pt"))))
        for form, save in small_clip.FORMS.items()
    )
    assert one["identity"] == other["identity"] and len(one["identity"]) == 64


@pytest.mark.parametrize("kind", small_clip.SMALL)
def test_changed_weights_change_the_identity(kind, images, tmp_path):
    tower = small_clip.SMALL[kind](images)
    before = identity_of(tower)
    with torch.no_grad():
        weight = next(tower.parameters())
        weight.view(-1)[0] += 0.5  # a single number
    assert identity_of(tower) != before
    assert identity_of(small_clip.SMALL[kind](images, seed=1)) != before
    assert identity_of(small_clip.SMALL[kind](images)) == before


def test_changed_heads_or_statistics_change_the_identity(images):
    tower = small_clip.small_resnet(images)
    before = identity_of(tower)
    assert identity_of(tower, heads=8) != before
    tower.bn1.running_mean[0] += 1
    assert identity_of(tower) != before
