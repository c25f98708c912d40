"""Folders on this machine and in an object store, by one set of functions; and a features file kept as Parquet in one.

    files = list_stamps("s3://bucket/images")            # {path: (bytes, when changed)}
    data = read_bytes("s3://bucket/images", "train/real/1.jpg")
    for columns in iterate_parts("features.parquet", read_meta("features.parquet")["parts"]):    # columns.COLUMNS, some rows

A data set is a folder: parts, each written at once, and _meta.json, which names those that count. Whatever reads Parquet
reads the folder; what the parts are made of is told by `about_part`.
"""

import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from detector.base.addresses import is_remote
from detector.base.console import one_line
from detector.base.errors import UsageError
from detector.base.files import atomic_write
from detector.features.columns import COLUMNS
from detector.images.facts import FACTS
from detector.images.folders import arrange, list_files

AT_ONCE = 16  # requests to an object store


# ---- folders ----


def need_pyarrow(what):
    """Raises UsageError where pyarrow is not installed; `what` needs it."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError(
            f"{what} needs pyarrow, which is not installed: pip install -r requirements/ray.txt"
        ) from None


@functools.cache
def open_folder(address):
    """'s3://bucket/a' -> (pyarrow's filesystem, 'bucket/a'); credentials, region and AWS_ENDPOINT_URL as Amazon's own tools
    find them, `?endpoint_override=...` and other options as pyarrow has them. Raises UsageError."""
    need_pyarrow(address)
    from pyarrow.fs import FileSystem

    if (
        address.startswith("gs://") and "retry_limit" not in address
    ):  # it would ask for credentials for 15 minutes
        address += ("&" if "?" in address else "?") + "retry_limit_seconds=30"
    try:
        filesystem, root = FileSystem.from_uri(address)
    except (OSError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"{address}: {one_line(error)}; name a folder, s3://bucket/folder or gs://bucket/folder"
        ) from None
    return filesystem, root.rstrip("/")


def list_stamps(folder):
    """`list_folder`'s stamps."""
    return list_folder(folder)[1]


def list_folder(folder):
    """All that lies below a folder -> (folders.Listing, of its files {path: (bytes, time of last change in ns)}, sorted)."""
    if not is_remote(folder):
        listing = list_files(folder)
        return listing, {path: stamp(folder, path) for path in listing.files}
    from pyarrow.fs import FileSelector, FileType

    filesystem, root = open_folder(folder)
    try:
        found = filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed ({one_line(error)})") from None
    files = {
        info.path[len(root) + 1 :]: (info.size, info.mtime_ns)
        for info in found
        if info.type == FileType.File
    }
    listing = arrange(files)
    return listing, {path: files[path] for path in listing.files}


def stamp(folder, path):
    """Of a file here: (bytes, time of last change in ns), which are others when its content is; None where there is none."""
    try:
        stat = os.stat(Path(folder, path))
        return stat.st_size, stat.st_mtime_ns
    except OSError:  # a dangling link, or gone since it was listed: told when it is read
        return None


def read_bytes(folder, path):
    """A file's bytes. Raises OSError where that file cannot be read, UsageError where the object store does not answer."""
    if not is_remote(folder):
        return Path(folder, path).read_bytes()
    filesystem, root = open_folder(str(folder))
    try:
        with filesystem.open_input_file(f"{root}/{path}") as file:
            return file.read()
    except FileNotFoundError:
        raise
    except (
        OSError
    ) as error:  # of the store: a picture must not count as broken because a network was
        raise UsageError(
            f"{folder}/{path}: cannot be read ({one_line(error)}); the same command again goes on"
            " from what is stored"
        ) from None


def write_bytes(folder, path, data):
    """Write a file, there whole or not at all: by renaming here; in an object store it appears when it is closed."""
    if not is_remote(folder):
        with atomic_write(Path(folder, path)) as file:
            file.write(data)
        return
    filesystem, root = open_folder(str(folder))
    try:
        with filesystem.open_output_stream(f"{root}/{path}") as file:
            file.write(data)
    except OSError as error:
        raise UsageError(
            f"{folder}/{path}: cannot be written ({one_line(error)}); name another place"
        ) from None


def delete_file(folder, path):
    if not is_remote(folder):
        Path(folder, path).unlink(missing_ok=True)
        return
    filesystem, root = open_folder(str(folder))
    filesystem.delete_file(f"{root}/{path}")


# ---- a data set of features ----


def write_part(folder, name, columns, about):
    """Columns -> one Parquet file of the data set, and in its footer `about`, a dict."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        "features": pa.FixedSizeListArray.from_arrays(
            pa.array(columns["features"].reshape(-1)), columns["features"].shape[1]
        )
    }
    arrays |= {
        column: pa.array(
            columns[column].tolist() if columns[column].dtype.kind == "U" else columns[column]
        )
        for column in ("labels", "paths", "splits", "sources", "sha256", "view")
    }
    arrays["facts"] = pa.StructArray.from_arrays(
        [
            (
                pa.array(columns["facts"][field].tolist(), pa.string())
                if kind.kind == "U"
                else pa.array(columns["facts"][field])
            )
            for field, (kind, *_) in FACTS.fields.items()
        ],
        names=list(FACTS.names),
    )
    arrays["thumb"] = pa.FixedSizeListArray.from_arrays(pa.array(columns["thumb"].reshape(-1)), 64)
    table = pa.table(arrays).replace_schema_metadata({"about": json.dumps(about)})
    buffer = pa.BufferOutputStream()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        use_byte_stream_split=["features.list.element"],
        use_dictionary=["splits", "sources"],
    )
    write_bytes(folder, name, buffer.getvalue())


def about_part(folder, name):
    """What `write_part` was told of a part; its footer alone is read."""
    return json.loads(open_part(folder, name).schema_arrow.metadata[b"about"])


def about_parts(folder, names):
    """{name: `about_part`} of several parts."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(names, pool.map(lambda name: about_part(folder, name), names)))


def open_part(folder, name):
    import pyarrow.parquet as pq

    filesystem, root = open_folder(str(folder) if is_remote(folder) else os.path.abspath(folder))
    return pq.ParquetFile(f"{root}/{name}", filesystem=filesystem)


@contextmanager
def readable(folder, name):
    """A part that cannot be read is a UsageError."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:  # ValueError: pyarrow's own kinds
        raise UsageError(
            f"--features_file {folder}: {name} cannot be read ({one_line(error)}); extract again"
        ) from None


def read_part(folder, name, wanted=COLUMNS):
    """Columns of one part, as in a features file. Raises UsageError."""
    with readable(folder, name):
        return columns_of(open_part(folder, name).read(columns=list(wanted)), wanted)


def columns_of(table, wanted):
    """Arrow's table -> arrays as numpy has them in an .npz."""

    def column(name):
        values = table[name].combine_chunks()
        if name in ("features", "thumb"):
            if not hasattr(values.type, "list_size"):
                raise ValueError(f"'{name}' holds {values.type}")
            return values.flatten().to_numpy().reshape(len(table), values.type.list_size)
        if name == "facts":
            facts = np.empty(len(table), FACTS)
            for field in FACTS.names:
                facts[field] = values.field(field).to_numpy(zero_copy_only=False)
            return facts
        return (
            values.to_numpy(zero_copy_only=False)
            if values.type != "string"
            else np.array(values.to_pylist(), dtype=str)
        )

    return {name: column(name) for name in wanted}


def read_meta(folder):
    """_meta.json of a data set: a features file's meta, and `parts`, the names of those that count. Raises UsageError."""
    need_pyarrow(f"--features_file {folder}")
    try:
        meta = json.loads(read_bytes(folder, "_meta.json"))
        meta["parts"]
        return meta
    except OSError:
        raise UsageError(
            f"--features_file {folder} is not a features file, nor a finished data set (a folder"
            " with _meta.json); what extract_features.py --ray has not finished the same command"
            " goes on with"
        ) from None
    except (ValueError, KeyError):
        raise UsageError(
            f"--features_file {folder}: its _meta.json is damaged; extract again"
        ) from None


def count_rows(folder, names):
    """Rows of the parts together, from their footers. Raises UsageError."""

    def rows(name):
        with readable(folder, name):
            return open_part(folder, name).metadata.num_rows

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(rows, names))


def iterate_parts(folder, names, wanted=COLUMNS):
    """Columns of the parts, one after the other; the next is read meanwhile. Raises UsageError."""
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read_part, folder, names[0], wanted) if names else None
        for following in names[1:]:
            found, coming = coming.result(), ahead.submit(read_part, folder, following, wanted)
            yield found
        if coming:
            yield coming.result()
