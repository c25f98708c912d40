"""The encoder `tiny`: what its statistics count, what leaves them as they are, and that the shipped form is the module's."""
import numpy as np
import pytest
from conftest import assert_one_line_error

import encoders
import imaging
from demo import installed_photos

torch = pytest.importorskip("torch", reason="textures.py needs torch: pip install -r requirements.txt")
import textures  # noqa: E402

COLOURS, SCALE = 173, 136    # features of colours, and at each of the two scales
LAYOUT = slice(77, 173)      # those that depend on where in the picture something is
ROW, ACROSS = slice(4, 94), slice(94, 136)  # within a scale's


@pytest.fixture(scope="module")
def tower():
    return textures.Textures().eval()


@pytest.fixture(scope="module")
def pixels():
    """CLIP's input of some photographs and of crops of them, float32 [8, 3, 160, 160]."""
    photos = [imaging.decode_image(path.read_bytes()) for path in installed_photos()[:4]]
    pictures = [*photos, *(photo.crop((40, 40, 240, 200)) for photo in photos)]
    return np.stack([imaging.preprocess(picture, textures.SIDE) for picture in pictures])


def features(tower, pixels):
    with torch.inference_mode():
        return tower(torch.from_numpy(np.ascontiguousarray(pixels, np.float32))).numpy()


def scales(found):
    """Features -> those of each scale, [n, 136] twice."""
    return found[:, COLOURS:COLOURS + SCALE], found[:, COLOURS + SCALE:]


def test_a_value_between_two_steps_counts_for_both():
    counted = textures.soft(torch.tensor([[-2.0, -1, -0.25, 0, 0.5, 1, 7]]), -1, 1, 3)[0]
    assert counted.tolist() == [[1, 1, 0.25, 0, 0, 0, 0], [0, 0, 0.75, 1, 0.5, 0, 0], [0, 0, 0, 0, 0.5, 1, 1]]


def test_triples_are_counted_in_the_kinds_that_they_are_of():
    # plus, minus, plus and its negation are one kind, plus, plus, minus read from either end another
    signs = {-1: [1.0, 0, 0], 0: [0, 1.0, 0], 1: [0, 0, 1.0]}
    rows = [(1, -1, 1), (-1, 1, -1), (1, 1, -1), (1, -1, -1), (-1, 1, 1), (0, 0, 0)]
    of = [torch.tensor([signs[row[i]] for row in rows]).T for i in range(3)]
    alike = textures.kinds(lambda t: {t, t[::-1], textures.negated(t), textures.negated(t[::-1])})
    assert alike.shape == (27, 10) and textures.kinds(lambda t: {t, textures.negated(t)}).shape == (27, 14)
    assert sorted((6 * textures.triples(*of) @ alike).round().tolist()) == [0] * 7 + [1, 2, 3]


def test_shares_of_a_histogram_are_one_together(tower, pixels):
    found = features(tower, pixels)
    for part, number in (found[:, :16], 16), (found[:, 16:28], 12), (found[:, 28:77], 49):
        assert (part ** 2).sum(1) == pytest.approx(1 + number * 1e-5, abs=1e-4)
    for scale in scales(found):
        assert (scale[:, ROW].reshape(-1, 9, 10) ** 2).sum(2) == pytest.approx(1 + 1e-4, abs=1e-3)
        assert (scale[:, ACROSS].reshape(-1, 3, 14) ** 2).sum(2) == pytest.approx(1 + 1.4e-4, abs=1e-3)


@pytest.mark.parametrize("change", [lambda x: x[..., ::-1], lambda x: x[:, :, ::-1], lambda x: x.transpose(0, 1, 3, 2)],
                         ids=["mirrored", "upside down", "rows and columns exchanged"])
def test_only_the_layout_knows_which_way_up_a_picture_is(tower, pixels, change):
    plain, changed = features(tower, pixels), features(tower, change(pixels))
    differ = np.abs(plain - changed).max(0)
    assert np.delete(differ, np.arange(*LAYOUT.indices(999))).max() < 0.02 < 1 < differ[LAYOUT].max()  # a row at the border counts


def test_noise_and_smoothing_move_residuals_away_from_each_other(tower, pixels):
    noisy = pixels + np.random.default_rng(0).normal(0, 0.1, pixels.shape)
    smooth = torch.nn.functional.avg_pool2d(torch.from_numpy(pixels), 9, 1, 4).numpy()
    plain, noisy, smooth = (np.stack(scales(features(tower, x)))[..., ROW].reshape(2, -1, 3, 3, 10) for x in (pixels, noisy, smooth))
    plain, noisy, smooth = (found[:, :, 2, 0, -1] for found in (plain, noisy, smooth))  # luma, crossed: three times none
    assert (noisy < plain).all() and (smooth > plain).all()


@pytest.mark.parametrize("value", [-1.5, 0.0, 2.0])
def test_a_flat_picture_is_no_special_case(tower, value):
    flat = np.full((1, 3, textures.SIDE, textures.SIDE), value, np.float32)
    nearly = flat + np.random.default_rng(0).normal(0, 1e-4, flat.shape)
    found, beside = features(tower, flat), features(tower, nearly)
    assert np.isfinite(found).all() and np.abs(found - beside).max() < 0.2


def test_the_shipped_encoder_is_this_module(tmp_path, pixels, tower):
    textures.main(["--output_dir", str(tmp_path / "tiny")])
    written, shipped = (encoders.read_manifest(folder) for folder in (tmp_path / "tiny", encoders.SHIPPED))
    assert {**written, "commit": "", "golden": []} == {**shipped, "commit": "", "golden": []}
    assert written["golden"] == pytest.approx(shipped["golden"], rel=1e-4, abs=1e-4)
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["encoder.bin", "encoder.json", "encoder.xml"]
    for folder in (tmp_path / "tiny", encoders.SHIPPED):
        assert encoders.Encoder(folder).encode(pixels) == pytest.approx(features(tower, pixels), abs=2e-3)


def test_no_other_picture_of_a_batch_changes_what_one_gives(pixels):
    encoder = encoders.Encoder(encoders.SHIPPED)
    together = encoder.encode(pixels)
    assert together.shape == (len(pixels), encoder.dim)
    assert np.array_equal(together, np.concatenate([encoder.encode(one[None]) for one in pixels]))
    assert np.array_equal(encoder.encode(pixels[::-1])[::-1], together)


def test_without_torch_one_line_says_what_to_install(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    assert_one_line_error(script("textures.py", PYTHONPATH=str(tmp_path)), "needs torch", "pip install -r requirements.txt")


def test_a_place_that_cannot_be_written_is_one_line(script, tmp_path):
    (tmp_path / "file").touch()
    assert_one_line_error(script("textures.py", "--output_dir", "file/tiny"), "--output_dir file/tiny", "cannot be written")
