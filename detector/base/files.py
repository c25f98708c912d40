"""Reading and writing files, and the remedies where the system refuses."""

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

# ---- errors of the system ----

ANOTHER_PLACE = "name another place"
AGAIN = ", and run the same command again"  # it then works, or resumes
REMEDIES = {
    getattr(errno, name): remedy
    for names, remedy in (
        ("ENOSPC EDQUOT", f"free some space{AGAIN}"),
        ("EFBIG", f"raise the limit on the size of files (ulimit -f){AGAIN}"),
        ("EMFILE ENFILE", "raise the limit on open files (ulimit -n)"),
        ("ENOMEM", f"free some memory{AGAIN}"),
        ("EIO ESTALE ENOTCONN EHOSTDOWN ENODEV", f"check the disk or network drive{AGAIN}"),
        ("ENAMETOOLONG", "give it a shorter name"),
        ("ENOENT", "check the path"),
        ("EACCES EPERM EROFS ENOTDIR EISDIR ELOOP", ANOTHER_PLACE),
        ("EBUSY ETXTBSY ENXIO EINVAL", ANOTHER_PLACE),
    )
    for name in names.split()
}


def reason(error):
    """OSError -> 'No space left on device; free some space ...'."""
    text = "a folder of its path is a file" if error.errno == errno.EEXIST else error.strerror
    return f"{text or error}; {REMEDIES.get(error.errno, ANOTHER_PLACE)}"


@contextmanager
def refusal(problem, of_other_files=True):
    """An OSError becomes a UsageError: `problem`, the reason, the remedy.

    Unless `of_other_files`, an OSError that names a file passes: a write names none.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not of_other_files:
            raise
        raise UsageError(f"{problem}: {reason(error)}") from None


@contextmanager
def atomic_write(path, mode="wb"):
    """Write beside `path` and rename at the end. A reader sees the old file or the whole new file.

    Symbolic links are followed. A new file's mode follows the umask; an existing file keeps its
    mode. Raises UsageError where `path` is no regular file, and where the system refuses.
    """
    refuse_place(path, f"cannot write {path}")
    given, path = Path(path), Path(os.path.realpath(path))
    temporary = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with refusal(f"cannot write {given}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        # the locale may have another encoding, and a file name may not be UTF-8
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with refusal(f"cannot write {given}", False), os.fdopen(handle, mode, **text) as file:
            yield file
        with refusal(f"cannot write {given}"):
            put(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def put(temporary, path):
    """Rename a file to `path`. It takes the mode and the owner of the file that it replaces."""
    with suppress(FileNotFoundError):
        before = os.stat(path)
        with suppress(OSError):
            os.chown(temporary, before.st_uid, before.st_gid)
        os.chmod(temporary, stat.S_IMODE(before.st_mode))
    os.replace(temporary, path)


def refuse_place(path, given):
    """Raises UsageError where `path` exists and is no regular file."""
    if Path(path).is_dir():
        raise UsageError(f"{given}: it is a folder; name a file in it")
    if Path(path).exists() and not Path(path).is_file():
        raise UsageError(f"{given}: it is a device or a pipe; name a file")


@contextmanager
def atomic_folder(folder, own=()):
    """Yields a new folder inside `folder`. At the end its files move to `folder`.

    Older files in `folder` with a name in `own` are then removed. Raises UsageError.
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
    except UsageError as error:  # the user knows no scratch folder
        raise UsageError(str(error).replace(str(scratch), str(folder))) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def only_writer(path, given):
    """Hold a lock beside `path` while this process writes there; `given`: the flag and its value.

    Raises UsageError where another process holds the lock. Object stores, and file systems
    without locks, are not locked.
    """
    if is_remote(path):
        yield
        return
    if not os.path.isdir(path):  # --ray writes a folder
        refuse_place(path, given)
    path = Path(os.path.realpath(path))
    lock = path.with_name(os.fsdecode(b".%s.lock" % os.fsencode(path.name)[:200]))
    with refusal(f"{given}: cannot be written"):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with take(lock, given) as file:
        try:
            file.truncate(0)
            print(os.getpid(), end="", file=file, flush=True)
            yield
        finally:
            lock.unlink(missing_ok=True)


def take(lock, given):
    """The lock file, opened and locked. Raises UsageError where another process holds it.

    Its holder removes the file at the end. A lock on a file that is gone protects nothing.
    """
    while True:
        with refusal(f"{given}: cannot be written"):
            file = open(lock, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise UsageError(
                    f"{given}: process {file.read() or 'of another machine'} is writing it; "
                    "wait until it ends, or name another place"
                ) from None
        except OSError:  # no locks here
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        file.close()


def reserve(folder, size):
    """Raises OSError unless `folder` has room for `size` bytes. Some libraries do not report it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)


def check_file(path, given):
    """Raises UsageError, before the work, where no file can be written at `path`."""
    refuse_place(path, given)
    check_folder(Path(os.path.realpath(path)).parent, given)


def check_folder(path, given):
    """Make the folder where it is missing. `given`: the flag and its value.

    Raises UsageError, before the work, where no file can be written in it.
    """
    with refusal(f"{given}: cannot be written"):
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


# ---- reading ----


def read_bytes(path):
    """The bytes of a file. Raises UsageError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def sha256(data):
    return hashlib.sha256(data).hexdigest()
