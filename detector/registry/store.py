"""The MLflow registry behind registry.py: its address, its errors, its file, its folders."""

import contextlib
import logging
import os
import re
import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from detector.base.addresses import behind_proxy, is_remote, masked
from detector.base.errors import UsageError
from detector.base.files import reserve

ADDRESS = re.compile(r"(postgresql|mysql|mssql)(\+\w+)?://.+|https?://.+|sqlite(\+\w+)?:///[^?]+")
REMEDIES = {  # pattern of a reason: what to do about it
    "locked": "another program holds it; end that program, or wait for it",
    "readonly|read-only|unable to open|Permission denied": (
        "let this user write the file and its folder, or set MLFLOW_TRACKING_URI to another place"
    ),
    "not a database|malformed|disk I/O": "the file is damaged; put a copy of it back",
    "no such table": (
        "the file is empty or another program's; remove it, or set MLFLOW_TRACKING_URI to another"
    ),
    "out-of-date database schema": "take the version of requirements/mlflow.txt that wrote it",
    "full|No space left|File too large": "free some space, then run this command again",
    "No module named": "pip install the driver of this database",
}
ENVIRONMENT = {  # of MLflow; the user's own settings win
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
FILE_BYTES = 2_000_000  # above the size of an empty registry


def registry_uri():
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def check_address(uri):
    """Raises UsageError unless MLflow can keep a registry there."""
    try:
        parts = urlsplit(uri)
        usable = (
            ADDRESS.fullmatch(uri)
            and (parts.hostname or not uri.startswith("http"))
            and parts.port != 0
        )
    except ValueError:  # for example, a port that is no number
        usable = False
    if not usable or uri.endswith(":memory:"):
        raise UsageError(
            f"MLFLOW_TRACKING_URI={masked(uri)}: cannot hold a registry; set it to "
            "sqlite:///mlflow.db (a file), http://HOST:PORT (an MLflow server) or a postgresql, "
            "mysql or mssql database"
        )


def database_file():
    """Path of the SQLite file that holds the registry, or None."""
    kind, _, path = registry_uri().partition(":///")
    return Path(path) if kind.startswith("sqlite") else None


def connect(create=False):
    """-> MLflow's client. `create`: make a missing SQLite file. Raises UsageError."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
        import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"registry.py needs mlflow ({error}): pip install -r requirements/mlflow.txt"
        ) from None
    check_address(registry_uri())
    for name in ("alembic", "mlflow"):  # they raise what they log, too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with one_line(OSError, ImportError):
        if path := database_file():
            check_file(path, create)
        mlflow.set_tracking_uri(registry_uri())
        return mlflow.MlflowClient()


def check_file(path, create):
    """Ask SQLite first. MLflow would try ten times, and write into another program's file."""
    if not path.exists():
        if not create:
            raise UsageError(
                f"no registry at {registry_uri()} yet: registry.py register NAME model.joblib "
                "makes it; check this folder and MLFLOW_TRACKING_URI"
            )
        make_file(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("SELECT version_num FROM alembic_version").fetchall()


def make_file(path):
    """The file appears with all its tables or not at all. It never replaces another process's."""
    import mlflow

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        reserve(folder, FILE_BYTES)
        draft = Path(os.path.relpath(folder), path.name)
        mlflow.MlflowClient(f"sqlite:///{draft}")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)


# ---- errors ----


def mlflow_error():
    """MLflow's exception class, imported late because MLflow takes long to import."""
    from mlflow.exceptions import MlflowException

    return MlflowException


@contextlib.contextmanager
def one_line(*others):
    """Errors of MLflow, database, network and `others` become a UsageError of one line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if not isinstance(error, (sqlite3.Error, *others)):
            from requests import RequestException
            from sqlalchemy.exc import SQLAlchemyError

            if not isinstance(error, (mlflow_error(), SQLAlchemyError, RequestException)):
                raise
        raise UsageError(explained(error)) from None


def explained(error):
    """The registry's address, the reason of the error and the remedy, in one line."""
    why, uri = reason(error), registry_uri()
    remedies = (remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, why))
    remedy = next(remedies, "is MLFLOW_TRACKING_URI right?")
    return f"the registry {masked(uri)}: {why}; {remedy}{behind_proxy(uri, 'all')}"


def reason(error):
    """The innermost cause of the system, SQLite or an import, else MLflow's words. One line."""
    inner = innermost(error)
    words = " ".join(str(getattr(inner, "strerror", None) or inner).split())
    if page := re.search(r"<(!doctype|html)", words, re.IGNORECASE):
        start = words[: page.start()].rstrip(" '")
        words = f"{start} a web page, so no MLflow server is there"
    # MLflow and shutil collect several errors of the system in one text
    if system := re.search(r"\[Errno -?\d+\] ([^'\")]+)", words):
        words = system[1].strip()
    place = getattr(inner, "filename2", None) or getattr(inner, "filename", None)
    return words[:300] + (f" ({place})" if place else "")


def innermost(error):
    """The deepest cause that is of the system, of SQLite or of an import, else the error itself."""
    cause = error
    while error := error.__cause__ or error.__context__:
        if isinstance(error, (OSError, sqlite3.Error, ImportError)):
            cause = error
    return cause


# ---- the files of a version ----


def folder_of(uri, writing=False):
    """Where the files of a run lie -> path or URI.

    MLflow stores absolute paths. After a registry in a file has moved, its files lie in `mlruns`
    beside it.
    """
    database, (_, root, below) = database_file(), uri.rpartition("/mlruns/")
    if database is None or not root or is_remote(uri):
        return uri
    beside = database.absolute().parent / "mlruns" / below
    return str(beside) if writing or beside.exists() else uri


def artifact_location(name):
    """Where a new experiment's files go: beside an SQLite file; a server decides itself (None)."""
    database = database_file()
    return database and str(database.absolute().parent / "mlruns" / name)
