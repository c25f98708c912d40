"""Reading and writing files, and what the system refuses."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from detector.base.addresses import is_remote
from detector.base.errors import UsageError

# ---- what the system refuses ----

ANOTHER_PLACE = "name another place"
# What the user can do about a refusal of the system's; the same command then works, or resumes.
REMEDIES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), "free some space, and run the same command again"
    ),
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), and run the same command again",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)"),
    errno.ENOMEM: "free some memory, and run the same command again",
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV),
        "check the disk or network drive, and run the same command again",
    ),
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOENT: "check the path",
    **dict.fromkeys(
        (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.ELOOP,
            errno.EBUSY,
            errno.ETXTBSY,
            errno.ENXIO,
            errno.EINVAL,
        ),
        ANOTHER_PLACE,
    ),
}


def reason(error):
    """OSError -> 'No space left on device; free some space ...'."""
    words = "a folder of its path is a file" if error.errno == errno.EEXIST else error.strerror
    return f"{words or error}; {REMEDIES.get(error.errno, ANOTHER_PLACE)}"


@contextmanager
def refusal(what):
    """An OSError becomes a UsageError: `what`, the reason, the remedy."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{what}: {reason(error)}") from None


@contextmanager
def atomic_write(path, mode="wb"):
    """Write beside `path`, rename at the end: a reader sees the old file or the whole new one.

    A symbolic link is followed. A new file's mode follows the umask, an existing file keeps its
    own. Raises UsageError where `path` is no regular file, and for what the system refuses.
    """
    refuse_place(path, f"cannot write {path}")
    given, path = Path(path), Path(os.path.realpath(path))
    temporary = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with refusal(f"cannot write {given}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        # whatever the locale, whatever a name
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with unnamed_refusal(f"cannot write {given}"), os.fdopen(handle, mode, **text) as file:
            yield file
        with refusal(f"cannot write {given}"):
            put(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def put(temporary, path):
    """Rename a file to `path`; a file that was there leaves it its mode and its owner."""
    with suppress(FileNotFoundError):
        before = os.stat(path)
        with suppress(OSError):
            os.chown(temporary, before.st_uid, before.st_gid)
        os.chmod(temporary, stat.S_IMODE(before.st_mode))
    os.replace(temporary, path)


@contextmanager
def unnamed_refusal(what):
    """`refusal` of a write; an OSError that names a file is of another file, and passes."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise UsageError(f"{what}: {reason(error)}") from None


def refuse_place(path, given):
    """Raises UsageError where `path` is there and is no regular file."""
    if Path(path).is_dir():
        raise UsageError(f"{given}: it is a folder; name a file in it")
    if Path(path).exists() and not Path(path).is_file():
        raise UsageError(f"{given}: it is a device or a pipe; name a file")


@contextmanager
def atomic_folder(folder, own=()):
    """Yields a new folder beside `folder`. At the end its files take their places in `folder`.

    Then what `folder` still has of the names `own` is removed. Raises UsageError.
    """
    folder = Path(os.path.realpath(folder))
    with refusal(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".part-"))
    try:
        yield scratch
        new = sorted(path.name for path in scratch.iterdir())
        with refusal(f"cannot write {folder}"):
            for name in new:
                put(scratch / name, folder / name)
            for name in set(own) - set(new):
                (folder / name).unlink(missing_ok=True)
    except UsageError as error:  # of a file in a folder that is gone when this is read
        raise UsageError(str(error).replace(str(scratch), str(folder))) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def only_writer(path, given):
    """Hold a lock beside `path` while this process writes there; `given`: the flag and its value.

    Raises UsageError where another process holds it. An object store, and a file system without
    locks, do without.
    """
    if is_remote(path):
        yield
        return
    if not os.path.isdir(path):  # which --ray writes
        refuse_place(path, given)
    path = Path(os.path.realpath(path))
    lock = path.with_name(os.fsdecode(b".%s.lock" % os.fsencode(path.name)[:200]))
    with refusal(f"{given}: cannot be written"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{given}: process {file.read() or 'of another machine'} is writing it; "
                "wait until it ends, or name another place"
            ) from None
        except OSError:
            pass
        try:
            file.truncate(0)
            print(os.getpid(), end="", file=file, flush=True)
            yield
        finally:
            lock.unlink(missing_ok=True)


def reserve(folder, size):
    """Raises OSError unless `folder` has room for `size` bytes: some libraries do not say so."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)


def check_file(path, given):
    """A place where no file can be written is told before the work. Raises UsageError."""
    refuse_place(path, given)
    check_folder(Path(os.path.realpath(path)).parent, given)


def check_folder(path, given):
    """Make the folder where it is missing; a place that cannot be written is told before the work.

    `given`: the flag and value that it comes from. Raises UsageError.
    """
    with refusal(f"{given}: cannot be written"):
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


# ---- what every script does ----


def read_bytes(path):
    """The bytes of a file; UsageError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def sha256(data):
    return hashlib.sha256(data).hexdigest()
