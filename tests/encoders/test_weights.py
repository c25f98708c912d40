"""Reading checkpoints without torch: torch's numbers, and one line for a bad file."""

import pickle
import struct
import warnings
import zipfile

import archives
import numpy as np
import pytest
import small
from commands import assert_one_line_error
from made_up import Planted

from detector.base.errors import EncoderError
from detector.encoders import weights

ARRAYS = small.random_weights()
VECTOR = "ln_pre.bias"


def refusal(path):
    """The one-line message that refuses a file."""
    with pytest.raises(EncoderError) as error:
        weights.read_checkpoint(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 600
    return message


# ---- sound files ----


def test_a_state_dict_written_by_hand_gives_its_arrays(tmp_path):
    arrays = weights.read_checkpoint(archives.write(tmp_path / "c.pt", ARRAYS))
    assert arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in arrays)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("form", ["state dict", "archive"])
def test_both_torch_file_forms_give_torchs_numbers(kind, form, photos, tmp_path):
    import small_clip
    import torch

    tower = small_clip.SMALL[kind](small_clip.crops(photos))
    arrays = weights.read_checkpoint(small_clip.FORMS[form](tower, tmp_path / "c.pt"))
    state = {
        name: tensor for name, tensor in tower.state_dict().items() if tensor.is_floating_point()
    }
    assert {name for name, array in arrays.items() if array.dtype.kind == "f"} == state.keys()
    assert all(torch.equal(torch.from_numpy(arrays[name]).float(), state[name]) for name in state)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_any_precision_of_a_checkpoint_is_read_as_float16(dtype, tmp_path):
    import torch

    tensors = {
        name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in ARRAYS.items()
    }
    torch.save({f"visual.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "c.pt")
    arrays = weights.read_checkpoint(tmp_path / "c.pt")
    assert all(np.array_equal(arrays[name], tensors[name].half().numpy()) for name in tensors)


def test_views_transposes_and_parameters_are_read_as_in_torch(tmp_path):
    import torch

    tensors = {f"visual.{name}": torch.from_numpy(array) for name, array in ARRAYS.items()}
    shared = torch.zeros(3, 128, dtype=torch.float16)
    shared[1] = tensors[f"visual.{VECTOR}"]
    tensors[f"visual.{VECTOR}"] = shared[1]  # a view of a larger storage
    tensors["visual.proj"] = torch.nn.Parameter(tensors["visual.proj"].T.contiguous().T)
    torch.save(tensors, tmp_path / "c.pt")
    arrays = weights.read_checkpoint(tmp_path / "c.pt")
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in arrays)


IDENTITIES = {
    "final": "81a56d8573d53de7904ee6c8c7a516c4078fcab2718b9a5e1d41bed3f2447c70",
    "1,2,final": "b9d2f690e553c0d0de604cc6c4dbf8fa78c81f49d5bc9177a50705d38750d0ec",
}


def test_the_identity_of_a_vit_has_not_changed():
    """The hashes were recorded from torch's towers. Prepared encoders must stay valid."""
    arch = weights.architecture(ARRAYS)
    assert arch == small.ARCH and all(type(n) is int for n in arch.values() if n != arch["kind"])
    identities = {layers: weights.identity_of(ARRAYS, arch, layers) for layers in IDENTITIES}
    assert identities == IDENTITIES


def test_the_identity_of_a_resnet_has_not_changed():
    import clip.model

    state = clip.model.ModifiedResNet([1, 1, 1, 1], 32, 16, 96, 32).state_dict()
    arrays = {}
    for number, (name, tensor) in enumerate(sorted(state.items())):
        noise = np.random.default_rng(number).normal(0, 0.1, tuple(tensor.shape))
        arrays[name] = noise.astype(np.float16) if tensor.is_floating_point() else tensor.numpy()
    arch = weights.architecture(arrays)
    assert arch == {
        "kind": "ModifiedResNet",
        "layers": [1, 1, 1, 1],
        "output_dim": 32,
        "heads": 16,
        "input_resolution": 96,
        "width": 32,
    }
    identity = "df1f095725e0445b607de87ab78db2d40a956fa8fbd9c79fed7cae7cb11517f8"
    assert weights.identity_of(arrays, arch) == identity


# ---- planted and damaged files ----


def test_a_planted_pickle_is_refused_and_never_called(tmp_path):
    marker = tmp_path / "called"
    root = pickle.dumps({"visual.proj": Planted(marker)}, protocol=2)
    path = archives.write(tmp_path / "c.pt", ARRAYS, root=root)
    assert "names 'posix.mkdir'" in refusal(path) and not marker.exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor"),
        ("builtins", "eval"),
        ("torch.storage", "_load_from_bytes"),
        ("numpy", "load"),
    ],
)
def test_no_other_function_name_is_accepted(module, name, tmp_path):
    root = b"\x80\x02" + archives.named(module, name) + archives.plain("x") + b"\x85R."
    assert f"names '{module}.{name}'" in refusal(archives.write(tmp_path / "c.pt", {}, root=root))


def test_a_pickle_cannot_change_functions_for_the_next_file(tmp_path):
    function = archives.named("torch._utils", "_rebuild_tensor_v2")
    change = function + archives.plain({"__defaults__": (1,)}) + b"b"
    refusal(archives.write(tmp_path / "bad.pt", ARRAYS, root=b"\x80\x02" + change + b"."))
    arrays = weights.read_checkpoint(archives.write(tmp_path / "good.pt", ARRAYS))
    assert arrays.keys() == ARRAYS.keys()


BEYOND = "reaches beyond its storage"
FAULTS = {
    "offset beyond the storage": ({"offset": 1}, BEYOND),
    "a far offset": ({"offset": 1 << 40}, BEYOND),
    "a negative offset": ({"offset": -1}, "invalid sizes"),
    "a long stride": ({"strides": (2,)}, BEYOND),
    "a negative stride": ({"strides": (-1,)}, "invalid sizes"),
    "a stride of zero over gigabytes": ({"shape": (1 << 40,), "strides": (0,)}, "has the shape"),
    "a float as a size": ({"shape": (128.0,)}, "invalid sizes"),
    "a boolean as an offset": ({"offset": True}, "invalid sizes"),
    "more strides than sizes": ({"strides": (1, 1)}, "invalid sizes"),
    "a storage declared too long": ({"numel": 1 << 30}, "bytes, not"),
    "a storage declared too short": ({"numel": 127}, BEYOND),
    "another type of number": ({"storage": archives.named("torch", "FloatStorage")}, "bytes, not"),
    "a quantised storage": (
        {"storage": archives.named("torch", "QInt8Storage")},
        "names 'torch.QInt8Storage'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_outside_of_its_storage_is_refused(fault, tmp_path):
    change, reason = FAULTS[fault]
    assert reason in refusal(archives.write(tmp_path / "c.pt", ARRAYS, **{VECTOR: change}))


def test_a_zero_stride_on_a_short_storage_is_refused(tmp_path):
    """The shape is right, but the storage is too short for it."""
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    arrays = {**ARRAYS, name: ARRAYS[name][:1]}
    fault = {name: {"shape": ARRAYS[name].shape, "strides": (0, 1)}}
    assert BEYOND in refusal(archives.write(tmp_path / "c.pt", arrays, **fault))


def test_compressed_members_are_refused(tmp_path):
    path = archives.write(tmp_path / "c.pt", ARRAYS, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_two_members_of_one_name_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own
        path = archives.write(tmp_path / "c.pt", ARRAYS, more=[("archive/data/0", b"again")])
    assert "same name" in refusal(path)


def test_a_missing_member_is_named(tmp_path):
    tensors = {f"visual.{name}": archives.tensor("99", array) for name, array in ARRAYS.items()}
    path = archives.write(tmp_path / "c.pt", {}, root=archives.state_dict(tensors))
    assert "data/99" in refusal(path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_truncated_archive_is_refused(share, tmp_path):
    data = archives.write(tmp_path / "whole.pt", ARRAYS).read_bytes()
    (tmp_path / "c.pt").write_bytes(data[: int(share * len(data))])
    assert "truncated or damaged" in refusal(tmp_path / "c.pt")


def test_a_flipped_bit_is_refused(tmp_path):
    path = archives.write(tmp_path / "c.pt", ARRAYS)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "CRC" in refusal(path) or "checksum" in refusal(path) or "damaged" in refusal(path)


def test_torchs_old_format_is_refused_with_a_remedy(tmp_path):
    import torch

    tensors = {"visual.proj": torch.zeros(2, 2)}
    torch.save(tensors, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    assert "old format; load it in torch and save it again" in refusal(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not a zip file"),
        (b"no checkpoint", "not a zip file"),
        (b"PK\3\4 and no archive", "truncated or damaged"),
    ],
)
def test_a_file_that_is_no_archive_is_refused(content, reason, tmp_path):
    (tmp_path / "c.pt").write_bytes(content)
    assert reason in refusal(tmp_path / "c.pt")


def test_numbers_with_the_high_byte_first_are_refused(tmp_path):
    path = archives.write(tmp_path / "c.pt", ARRAYS, more=[("archive/byteorder", b"big")])
    assert "high byte first" in refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    arrays = {**ARRAYS, VECTOR: np.full_like(ARRAYS[VECTOR], value)}
    assert "not finite" in refusal(archives.write(tmp_path / "c.pt", arrays))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda arrays: arrays.pop("proj"), "no vision tower"),
        (lambda arrays: arrays.pop("ln_pre.bias"), "visual.ln_pre.bias"),
        (lambda arrays: arrays.update(extra=np.zeros(3, np.float16)), "visual.extra"),
        (lambda arrays: arrays.update(proj=np.zeros((64, 32), np.float16)), "visual.proj"),
    ],
)
def test_an_incomplete_tower_is_refused_by_tensor_name(change, reason, tmp_path):
    arrays = dict(ARRAYS)
    change(arrays)
    assert reason in refusal(archives.write(tmp_path / "c.pt", arrays))


def test_nested_references_are_read_in_bounded_time(tmp_path):
    """Forty levels, each with two references to the next: 2**40 paths."""
    parts = {}
    for _ in range(40):
        parts = {"a": parts, "b": parts}
    path = archives.write(tmp_path / "c.pt", {}, root=pickle.dumps(parts, protocol=2))
    assert "no vision tower" in refusal(path)


def test_a_huge_memo_index_is_refused(tmp_path):
    root = b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b"."
    assert "LONG_BINPUT" in refusal(archives.write(tmp_path / "c.pt", {}, root=root))


def test_a_pickle_that_contains_itself_is_refused(tmp_path):
    root = b"\x80\x02}q\x00(" + archives.plain("visual") + b"h\x00u."
    assert "no vision tower" in refusal(archives.write(tmp_path / "c.pt", {}, root=root))


def test_random_damage_is_a_one_line_error_or_harmless(tmp_path):
    """A changed byte of the pickle gives a refusal, or arrays of the right shapes."""
    tensors = {
        f"visual.{name}": archives.tensor(str(i), array)
        for i, (name, array) in enumerate(ARRAYS.items())
    }
    root, rng = archives.state_dict(tensors), np.random.default_rng(0)
    read = 0
    for _ in range(100):
        data = bytearray(root)
        data[rng.integers(len(data))] = rng.integers(256)
        path = archives.write(tmp_path / "c.pt", ARRAYS, root=bytes(data))
        try:
            arrays = weights.read_checkpoint(path)
            read += 1
            weights.check_shapes({name: array.shape for name, array in arrays.items()})
        except EncoderError as error:
            assert "\n" not in str(error)
    assert 0 < read < 100


def test_an_unreadable_file_error_gives_the_reason(tmp_path):
    for path in (tmp_path / "nowhere.pt", tmp_path):
        assert "cannot read" in refusal(path)


def test_the_command_refuses_a_planted_checkpoint(script, tmp_path):
    marker = tmp_path / "called"
    archives.write(tmp_path / "c.pt", ARRAYS, root=pickle.dumps(Planted(marker), protocol=2))
    result = script("prepare_clip.py", "--clip_model", "c.pt")
    assert_one_line_error(result, "c.pt", "may be malicious")
    assert not marker.exists()
