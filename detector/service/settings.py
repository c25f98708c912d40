"""The service's settings, all from environment variables, and the API keys that one of them names.

read_settings()                     # {"PORT": 8000, ...}; UsageError names a bad value
read_settings({"PORT": "9000"})
"""

import hmac
import os
import re

from detector.base.console import check_review, printable
from detector.base.errors import UsageError
from detector.base.files import read_bytes, sha256

# name: (default, meaning); a test compares the table in docs/service.md with this one
SETTINGS = {
    "MODEL_PATH": ("", "model file from train_model.py; required; read again on SIGHUP"),
    "MODEL_SHA256_FILE": (
        "",
        "file with the model's SHA-256, as sha256sum writes it; another model is refused",
    ),
    "MODEL_PUBLIC_KEY": (
        "",
        "PEM file of an Ed25519 key; a model without its signature beside it is refused",
    ),
    "API_KEYS_FILE": (
        "",
        "file of 'name sha256-of-token' lines; requests then need 'Authorization: Bearer TOKEN'",
    ),
    "ALLOW_DEMO_MODEL": ("0", "1 serves a model with a notice, such as the shipped baseline"),
    "MAX_UPLOAD_BYTES": ("10485760", "largest request body; beyond it 413"),
    "MAX_PIXELS": (
        "50000000",
        "largest image, counted from its header before decoding; beyond it 413",
    ),
    "REVIEW_LOW": ("", "probability of fake below which the decision is 'pass'"),
    "REVIEW_HIGH": (
        "",
        "probability of fake from which the decision is 'reject'; below it 'review'",
    ),
    "BATCH_LIMIT": ("16", "most images in one POST /classify/batch; beyond it 413"),
    "SLOTS": (
        "0",
        "requests processed at a time; a batch takes up to half; 0: 4 more than processors",
    ),
    "QUEUE_LIMIT": ("16", "requests that may wait for a slot; beyond it 503 at once"),
    "QUEUE_TIMEOUT_S": (
        "5",
        "longest wait for a slot, and the value of Retry-After; beyond it 503",
    ),
    "BODY_TIMEOUT_S": ("20", "longest time for a request to arrive; beyond it 408"),
    "HOST": ("127.0.0.1", "address to listen on"),
    "PORT": ("8000", "port to listen on"),
    "CORS_ORIGINS": (
        "",
        "sites whose pages may call the service, such as https://app.example; '*' is every site",
    ),
    "TRUSTED_PROXIES": ("0", "number of proxies that set X-Forwarded-Prefix; 0 ignores the header"),
    "SCRIPT_NAME": (
        "",
        "path prefix, such as /detector, where the proxy forwards it as part of the path",
    ),
}
SPARE_THREADS = 16  # HTTP threads for slow uploads, health and metrics while all slots are taken
MOST_THREADS = 500  # each costs memory, and connections are at most 1,000
# As browsers send it in `Origin`: in small letters, and without the default port.
ORIGIN = re.compile(
    r"(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]+)?"
)
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")  # needs no escaping in HTML, JSON or an address
POSITIVE = ("BATCH_LIMIT", "QUEUE_TIMEOUT_S", "BODY_TIMEOUT_S", "MAX_UPLOAD_BYTES", "MAX_PIXELS")


def read_settings(given=None):
    """Environment, overridden by `given` -> {name: str or int; CORS_ORIGINS: list of str}.

    Raises UsageError that names a bad value.
    """
    values = {}
    for name, (default, _) in SETTINGS.items():
        value = (given or {}).get(name, os.environ.get(name) or default)
        values[name] = whole_number(name, value) if default.isdigit() else value
    threads = values["SLOTS"] + values["QUEUE_LIMIT"] + SPARE_THREADS
    if threads > MOST_THREADS:
        raise UsageError(
            f"SLOTS={values['SLOTS']}, QUEUE_LIMIT={values['QUEUE_LIMIT']}: with {SPARE_THREADS}"
            f" spare threads they make {threads:,} threads; must be at most {MOST_THREADS}"
        )
    if values["PORT"] > 65535:
        raise UsageError(f"PORT={values['PORT']}: must be at most 65535")
    if values["SCRIPT_NAME"] and not PREFIX.fullmatch(values["SCRIPT_NAME"]):
        raise UsageError(
            f"SCRIPT_NAME={printable(values['SCRIPT_NAME'])}: must be a path such as /detector, of"
            " letters, digits and ._~-, without a slash at its end"
        )
    return values | {
        "CORS_ORIGINS": read_origins(values["CORS_ORIGINS"]),
        "review": review_of(values["REVIEW_LOW"], values["REVIEW_HIGH"]),
    }


def read_origins(value):
    """Origins, separated by commas or spaces -> list of them in small letters.

    Raises UsageError where one is none, and where '*' is not alone.
    """
    origins = value.lower().replace(",", " ").split()
    for origin in origins:
        if origins != ["*"] and not ORIGIN.fullmatch(origin):
            raise UsageError(
                f"CORS_ORIGINS: {printable(origin)} is no origin; write scheme and host, such as"
                " https://app.example, without a path, a slash at the end or the default port; or"
                " '*' alone"
            )
    return origins


def review_of(low, high):
    """REVIEW_LOW, REVIEW_HIGH -> (low, high) as floats, or None where both are empty.

    Raises UsageError.
    """
    if not (low or high):
        return None
    try:
        review = float(low), float(high)
    except ValueError:
        raise UsageError(
            f"REVIEW_LOW={low}, REVIEW_HIGH={high}: must be two probabilities, or both empty"
        ) from None
    check_review(review, "REVIEW_LOW, REVIEW_HIGH")
    return review


def whole_number(name, value):
    """Raises UsageError where the value is not a whole number, or 0 in a setting of POSITIVE."""
    if not str(value).isdecimal():
        raise UsageError(f"{name}={value}: must be a whole number")
    if name in POSITIVE and int(value) == 0:
        raise UsageError(f"{name}=0: must be at least 1")
    return int(value)


def read_file(name, path, remedy):
    """Bytes of the file that a setting names. Raises UsageError."""
    try:
        return read_bytes(path)
    except UsageError as error:
        raise UsageError(f"{name}: {error}; name {remedy}") from None


# ---- API keys ----

KEY_LINE = re.compile(r"\s*(?:([^\s#]+)\s+([0-9a-fA-F]{64})\s*)?(?:#.*)?")


def read_keys(path):
    """File of `name sha256-of-token` lines -> {name: 32 bytes}; {} for an empty path.

    Raises UsageError.
    """
    if not path:
        return {}
    keys, data = {}, read_file("API_KEYS_FILE", path, "a file of lines 'name sha256-of-token'")
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        place, match = f"API_KEYS_FILE={path}: line {number}", KEY_LINE.fullmatch(line)
        if not match:
            raise UsageError(f"{place} is not 'name sha256-of-token'")
        name, digest = match.groups()
        if name in keys:
            raise UsageError(f"{place} repeats the name of another line; give each key its own")
        if name:
            keys[name] = bytes.fromhex(digest)
    if not keys:
        raise UsageError(
            f"API_KEYS_FILE={path}: holds no key; add a line 'name sha256-of-token', or leave the"
            " setting empty"
        )
    return keys


def key_name(authorization, keys):
    """Name of the key whose token this header holds, or None.

    The token is compared with every key, each time in constant time.
    """
    scheme, _, token = authorization.partition(" ")
    digest = bytes.fromhex(sha256(token.strip().encode()))
    names = [name for name, known in keys.items() if hmac.compare_digest(known, digest)]
    return names[0] if names and scheme.lower() == "bearer" else None
