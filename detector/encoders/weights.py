"""Read the arrays of the vision tower from a CLIP checkpoint, without torch.

    weights = read_checkpoint("ViT-L-14.pt")    # {"conv1.weight": float16 [1024, 3, 14, 14], ...}
    arch = architecture(weights)                # arguments that build this tower
    identity = identity_of(weights, arch, "final")

OpenAI's format has two forms, both zip files written by torch: a TorchScript archive, as OpenAI
ships it, and a saved state dict. A pickle in the file names the tensors. Each tensor's numbers are
in another member. We call no function that a file names, and read no number outside of its member.
"""

import hashlib
import io
import json
import pickle
import pickletools
import re
import zipfile
import zlib
from collections import namedtuple

import numpy as np

from detector.base.errors import EncoderError
from detector.encoders.runtime import PREPROCESSING

# A tensor as described in the pickle. Its numbers are in the member data/<key>.
Tensor = namedtuple("Tensor", "key dtype numel offset shape strides")
DTYPES = {
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
# The opcodes that torch writes for containers and tensors. EXT and INST could name code, too.
OPCODES = {
    "PROTO",
    "FRAME",
    "STOP",
    "MARK",
    "GLOBAL",
    "STACK_GLOBAL",
    "BINPERSID",
    "REDUCE",
    "NEWOBJ",
    "BUILD",
    "MEMOIZE",
    "BINPUT",
    "LONG_BINPUT",
    "BINGET",
    "LONG_BINGET",
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "EMPTY_TUPLE",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "EMPTY_LIST",
    "APPEND",
    "APPENDS",
    "EMPTY_DICT",
    "SETITEM",
    "SETITEMS",
}
OLD_FORMAT = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number before its files were zips


# ---- the file ----


def read_checkpoint(path):
    """File -> {name: array} of the vision tower, names without 'visual.', floats as float16.

    Raises EncoderError for a file that is no checkpoint, is damaged or may be malicious.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return read_archive(archive)
    except EncoderError as error:
        reason = str(error)
    except OSError as error:
        raise EncoderError(f"cannot read {path}: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        reason = describe_non_zip(path)
    except Exception as error:  # a crafted pickle raises almost anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise EncoderError(
        f"{path} is not a CLIP checkpoint that can be read: {reason[:300]}"
    ) from None


def describe_non_zip(path):
    with open(path, "rb") as file:
        start = file.read(64)
    if OLD_FORMAT in start:
        return "it has torch's old format; load it in torch and save it again"
    return "it is truncated or damaged" if start.startswith(b"PK") else "it is not a zip file"


def read_archive(archive):
    """Open zip file -> the arrays. Raises EncoderError, and the errors of zipfile and pickle."""
    members = {info.filename: info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise EncoderError("two of its members have the same name")
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise EncoderError("it contains no data.pkl of torch")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members and read_member(archive, f"{folder}byteorder") != b"little":
        raise EncoderError("its numbers are stored with the high byte first")
    tensors = named_tensors(unpickle(read_member(archive, pickles[0])))
    visual = {
        name.removeprefix("visual."): tensor
        for name, tensor in tensors.items()
        if name.startswith("visual.")
    }
    check_shapes({name: tensor.shape for name, tensor in visual.items()})
    return {name: read_tensor(archive, folder, tensor) for name, tensor in visual.items()}


def read_member(archive, name):
    """Bytes of a member. Refuses compression, because a small file could expand to gigabytes."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise EncoderError(f"its member {name} is compressed; torch never compresses")
    try:
        return archive.read(info)
    except (EOFError, zlib.error):
        raise EncoderError(f"its member {name} is truncated") from None


# ---- the pickle ----


def unpickle(data):
    """data.pkl -> its root: nested dicts that contain Tensors. Raises EncoderError."""
    check_opcodes(data)
    return make_unpickler()(io.BytesIO(data)).load()


def check_opcodes(data):
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES or "PUT" in opcode.name and argument > len(data):
            raise EncoderError(f"its pickle contains {opcode.name}, which torch does not write")


def make_unpickler():
    """-> a restricted Unpickler class.

    Its functions are made anew for each file, because a pickle could change their attributes.
    """

    class Parts(dict):
        """An OrderedDict, or a TorchScript module with its attributes."""

        def __setstate__(self, state):
            self.update(state)

    def tensor(storage, offset, shape, strides, *_):
        return Tensor(*storage, offset, shape, strides)

    def first(value, *_):
        return value

    known = {
        ("collections", "OrderedDict"): Parts,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): first,
        **{("torch", name): dtype for name, dtype in DTYPES.items()},
    }

    class Restricted(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return Parts
            if module == "torch.jit._pickle":
                return first
            if (module, name) not in known:
                raise EncoderError(f"it names {f'{module}.{name}'!r} and may be malicious")
            return known[module, name]

        def persistent_load(self, storage):
            _, dtype, key, _, numel = storage
            return key, dtype, numel

    return Restricted


def named_tensors(root):
    """Nested parts -> {'visual.conv1.weight': Tensor, ...}.

    Visits each part once, because nested references could otherwise grow beyond the memory.
    """
    tensors, seen, waiting = {}, set(), [("", root)]
    while waiting:
        prefix, parts = waiting.pop()
        if id(parts) in seen or not isinstance(parts, dict):
            continue
        seen.add(id(parts))
        for name, value in parts.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            else:
                waiting.append((f"{prefix}{name}.", value))
    return tensors


def read_tensor(archive, folder, tensor):
    """-> the tensor's array, floats as float16, OpenAI's precision. Raises EncoderError."""
    key, dtype, numel, offset, shape, strides = tensor
    numbers = (numel, offset, *shape, *strides)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
        raise EncoderError("it describes a tensor with invalid sizes")
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    size = int(np.prod(shape, dtype=object))
    if size == 0 or size > numel or last >= numel:
        raise EncoderError("it describes a tensor that reaches beyond its storage")
    data, half = read_member(archive, f"{folder}data/{key}"), dtype == "bfloat16"
    stored = np.frombuffer(data, "<u2" if half else dtype)
    if len(stored) != numel:
        raise EncoderError(f"its storage {key} has {len(data)} bytes, not those of {numel} numbers")
    if half:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    steps = [step * stored.itemsize for step in strides]
    array = np.lib.stride_tricks.as_strided(stored[offset:], shape, steps)
    if array.dtype.kind != "f":
        return array.copy()
    with np.errstate(over="ignore"):  # becomes infinity, which is refused below
        array = array.astype(np.float16)
    if not np.isfinite(array).all():
        raise EncoderError("it contains weights that are not finite in float16")
    return array


# ---- the architecture ----


def check_shapes(shapes):
    """Raises EncoderError unless {name: shape} is a complete vision tower of CLIP."""
    if "proj" not in shapes and "attnpool.c_proj.weight" not in shapes:
        raise EncoderError("it contains no vision tower of CLIP")
    if "proj" not in shapes:
        return  # a ResNet: torch compares the shapes at loading
    expected = vit_shapes(arch_of(shapes))
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != tuple(shapes.get(name, ())):
            raise EncoderError(
                f"its tensor visual.{name} has the shape {shapes.get(name)}, but the other "
                f"tensors imply {expected.get(name)}"
            )


def architecture(weights):
    """{name: array} -> 'kind', the class in clip.model, and its arguments, with the heads."""
    return arch_of({name: array.shape for name, array in weights.items()})


def arch_of(shapes):
    """`architecture` from {name: shape}, with the rules of clip.model.build_model."""
    if "proj" in shapes:
        width, _, _, patch = shapes["conv1.weight"]
        grid = round((shapes["positional_embedding"][0] - 1) ** 0.5)
        layers = sum(name.endswith(".attn.in_proj_weight") for name in shapes)
        return {
            "kind": "VisionTransformer",
            "input_resolution": patch * grid,
            "patch_size": patch,
            "width": width,
            "layers": layers,
            "heads": width // 64,
            "output_dim": shapes["proj"][1],
        }
    grid = round((shapes["attnpool.positional_embedding"][0] - 1) ** 0.5)
    layers = [
        len({name.split(".")[1] for name in shapes if name.startswith(f"layer{i}.")})
        for i in (1, 2, 3, 4)
    ]
    width = shapes["layer1.0.conv1.weight"][0]
    return {
        "kind": "ModifiedResNet",
        "layers": layers,
        "input_resolution": grid * 32,
        "width": width,
        "output_dim": shapes["attnpool.c_proj.weight"][0],
        "heads": width * 32 // 64,
    }


def vit_shapes(arch):
    """Architecture of a VisionTransformer -> {name: shape} of all its tensors."""
    width, patch = arch["width"], arch["patch_size"]
    tokens = (arch["input_resolution"] // patch) ** 2 + 1
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (tokens, width),
        "conv1.weight": (width, 3, patch, patch),
        "proj": (width, arch["output_dim"]),
    }
    blocks = [f"transformer.resblocks.{i}" for i in range(arch["layers"])]
    for norm in ("ln_pre", "ln_post", *(f"{b}.ln_{k}" for b in blocks for k in (1, 2))):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for block in blocks:
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
        }
        for name, inner, outer in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {f"{block}.{name}.weight": (outer, inner), f"{block}.{name}.bias": (outer,)}
    return shapes


def identity_of(weights, arch, layers="final", transform=None):
    """SHA-256 over the fp16 tensors in name order, the layers and the preprocessing.

    Both file forms of the same weights give the same hash. `arch` is hashed as text, so its numbers
    must be plain ints. `transform`: a Transform that is not CLIP's own.
    """
    text = f"layers={layers} preprocessing={PREPROCESSING} {sorted(arch.items())}"
    if transform is not None:
        text += json.dumps(transform._asdict())
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(weights.items()):
        if array.dtype.kind == "f":
            digest.update(f"{name} {array.shape}".encode())
            digest.update(array.astype(np.float16).tobytes())
    return digest.hexdigest()
