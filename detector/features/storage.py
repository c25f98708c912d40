"""Read and write folders on this machine and in object stores, and features stored as Parquet.

    files = list_stamps("s3://bucket/images")  # {path: (bytes, time of change)}
    data = read_bytes("s3://bucket/images", "train/real/1.jpg")
    parts = read_meta("features.parquet")["parts"]
    for columns in iterate_parts("features.parquet", parts):  # columns.COLUMNS, some rows

A data set is a folder of parts, each written atomically. Its _meta.json lists the parts that count.
Any Parquet reader reads the folder. `about_part` describes the images of a part.
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

AT_ONCE = 16  # parallel requests to an object store


# ---- folders ----


def need_pyarrow(what):
    """Raises UsageError if pyarrow is not installed. `what` is the value that needs it."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError(
            f"{what} needs pyarrow, which is not installed: pip install -r requirements/ray.txt"
        ) from None


@functools.cache
def open_folder(address):
    """'s3://bucket/a' -> (pyarrow's filesystem, 'bucket/a').

    Credentials, region and AWS_ENDPOINT_URL come from the same places as for Amazon's tools.
    Options such as `?endpoint_override=...` are pyarrow's. Raises UsageError.
    """
    need_pyarrow(address)
    from pyarrow.fs import FileSystem

    # by default pyarrow looks for Google's credentials for 15 minutes
    if address.startswith("gs://") and "retry_limit" not in address:
        address += ("&" if "?" in address else "?") + "retry_limit_seconds=30"
    try:
        filesystem, root = FileSystem.from_uri(address)
    except (OSError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"{address}: {one_line(error)}; name a folder, s3://bucket/folder or gs://bucket/folder"
        ) from None
    return filesystem, root.rstrip("/")


def list_stamps(folder):
    """The stamps of `list_folder`."""
    return list_folder(folder)[1]


def list_folder(folder):
    """List a folder recursively -> (folders.Listing, {path: (bytes, time of change in ns)}).

    Raises UsageError.
    """
    if not is_remote(folder):
        listing = list_files(folder)
        return listing, {path: stamp(folder, path) for path in listing.files}
    from pyarrow.fs import FileSelector, FileType

    filesystem, root = open_folder(folder)
    try:
        infos = filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed ({one_line(error)})") from None
    files = {
        info.path[len(root) + 1 :]: (info.size, info.mtime_ns)
        for info in infos
        if info.type == FileType.File
    }
    listing = arrange(files)
    return listing, {path: files[path] for path in listing.files}


def stamp(folder, path):
    """(bytes, time of change in ns) of a local file, to detect a change; None if it is missing."""
    try:
        stat = os.stat(Path(folder, path))
        return stat.st_size, stat.st_mtime_ns
    except OSError:  # a dangling link or a deleted file; reported when it is read
        return None


def read_bytes(folder, path):
    """Bytes of a file.

    Raises OSError if the file cannot be read, UsageError if the object store fails.
    """
    if not is_remote(folder):
        return Path(folder, path).read_bytes()
    filesystem, root = open_folder(str(folder))
    try:
        with filesystem.open_input_file(f"{root}/{path}") as file:
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as error:  # a network failure must not count as a broken image
        raise UsageError(
            f"{folder}/{path}: cannot be read ({one_line(error)}); run the same command again to "
            "resume"
        ) from None


def write_bytes(folder, path, data):
    """Write a file atomically: by renaming it here, by closing it in an object store.

    Raises UsageError.
    """
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
    """Write columns as one Parquet file of the data set, with the dict `about` in its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({column: arrow_array(columns[column]) for column in COLUMNS})
    table = table.replace_schema_metadata({"about": json.dumps(about)})
    buffer = pa.BufferOutputStream()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        use_byte_stream_split=["features.list.element"],
        use_dictionary=["splits", "sources"],
    )
    write_bytes(folder, name, buffer.getvalue())


def arrow_array(values):
    """A column as numpy has it -> pyarrow's array: lists of the rows, structs of the facts."""
    import pyarrow as pa

    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    if values.dtype.names:
        fields = [arrow_array(values[field]) for field in values.dtype.names]
        return pa.StructArray.from_arrays(fields, names=list(values.dtype.names))
    return pa.array(values.tolist(), pa.string()) if values.dtype.kind == "U" else pa.array(values)


def about_part(folder, name):
    """The `about` of `write_part`. Reads only the footer of the part."""
    return json.loads(open_part(folder, name).schema_arrow.metadata[b"about"])


def about_parts(folder, names):
    """{name: `about_part`} of several parts."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        abouts = pool.map(lambda name: about_part(folder, name), names)
        return dict(zip(names, abouts, strict=True))


def open_part(folder, name):
    import pyarrow.parquet as pq

    filesystem, root = open_folder(str(folder) if is_remote(folder) else os.path.abspath(folder))
    return pq.ParquetFile(f"{root}/{name}", filesystem=filesystem)


@contextmanager
def readable(folder, name):
    """Turn the errors of an unreadable part into a UsageError."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        raise UsageError(
            f"--features_file {folder}: {name} cannot be read ({one_line(error)}); extract again"
        ) from None


def read_part(folder, name, wanted=COLUMNS):
    """Columns of one part, as in a features file. Raises UsageError."""
    with readable(folder, name):
        return columns_of(open_part(folder, name).read(columns=list(wanted)), wanted)


def columns_of(table, wanted):
    """Arrow's table -> numpy's arrays, as in an .npz."""

    def column(name):
        if name == "groups" and name not in table.column_names:  # of an earlier version
            return np.full(len(table), "")
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
        if values.type == "string":
            return np.array(values.to_pylist(), dtype=str)
        return values.to_numpy(zero_copy_only=False)

    return {name: column(name) for name in wanted}


def read_meta(folder):
    """_meta.json of a data set: a features file's meta, and the names of its `parts`.

    Raises UsageError.
    """
    need_pyarrow(f"--features_file {folder}")
    try:
        meta = json.loads(read_bytes(folder, "_meta.json"))
        meta["parts"]
        return meta
    except OSError:
        raise UsageError(
            f"--features_file {folder} is neither a features file nor a finished data set (a "
            "folder with _meta.json); to resume extract_features.py --ray, run the same command "
            "again"
        ) from None
    except (ValueError, KeyError):
        raise UsageError(
            f"--features_file {folder}: its _meta.json is damaged; extract again"
        ) from None


def count_rows(folder, names):
    """Total rows of the parts, from their footers. Raises UsageError."""

    def rows(name):
        with readable(folder, name):
            return open_part(folder, name).metadata.num_rows

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(rows, names))


def iterate_parts(folder, names, wanted=COLUMNS):
    """Yield the columns of each part, and read the next part meanwhile. Raises UsageError."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read_part, folder, names[0], wanted) if names else None
        for following in names[1:]:
            columns, ahead = ahead.result(), pool.submit(read_part, folder, following, wanted)
            yield columns
        if ahead:
            yield ahead.result()
