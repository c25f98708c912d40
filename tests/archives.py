"""Write checkpoints in torch's file format without torch, with any wanted fault."""

import pickle
import zipfile

import numpy as np

STORAGES = {"float16": "HalfStorage", "float32": "FloatStorage", "int64": "LongStorage"}


def plain(value):
    """Opcodes that put a plain value on the stack."""
    return pickle.dumps(value, protocol=2)[2:-1]


def named(module, name):
    """Opcodes of a global name."""
    return f"c{module}\n{name}\n".encode()


def tensor(key, array, offset=0, shape=None, strides=None, numel=None, storage=None):
    """Opcodes of a tensor with its numbers in data/<key>, as torch writes them."""
    storage = storage or named("torch", STORAGES[array.dtype.name])
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(
            step // array.itemsize for step in np.empty(array.shape, array.dtype).strides
        )
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + b"(("
        + plain("storage")
        + storage
        + plain(key)
        + plain("cpu")
        + plain(array.size if numel is None else numel)
        + b"tQ"
        + plain(offset)
        + plain(shape)
        + plain(strides)
        + plain(False)
        + named("collections", "OrderedDict")
        + b")RtR"
    )


def state_dict(tensors):
    """{name: opcodes} -> the bytes of data.pkl."""
    items = b"".join(plain(name) + opcodes for name, opcodes in tensors.items())
    return b"\x80\x02" + named("collections", "OrderedDict") + b")R(" + items + b"u."


def write(path, arrays, compression=zipfile.ZIP_STORED, more=(), root=None, **faults):
    """{name: array} -> path of a state dict's checkpoint, with 'visual.' before every name.

    `faults`: {name: arguments of `tensor`}; `root`: other bytes for data.pkl; `more`: additional
    members.
    """
    keys = {name: str(number) for number, name in enumerate(arrays)}
    opcodes = {
        f"visual.{name}": tensor(keys[name], array, **faults.get(name, {}))
        for name, array in arrays.items()
    }
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", state_dict(opcodes) if root is None else root)
        for name, array in arrays.items():
            archive.writestr(f"archive/data/{keys[name]}", np.ascontiguousarray(array).tobytes())
        for name, data in more:
            archive.writestr(name, data)
    return path
