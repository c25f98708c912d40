"""The service's settings, all from environment variables, and the API keys that one of them names.

read_settings()                     # {"PORT": 8000, ...}; UsageError names a bad value
read_settings({"PORT": "9000"})
"""

import hmac
import os

from detector.base.errors import UsageError
from detector.base.files import read_bytes, sha256

# name: (default, what it is); the README's table is held against this one by a test
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
    "ALLOW_DEMO_MODEL": ("0", "1 serves a model with a notice, as the shipped baseline has"),
    "MAX_UPLOAD_BYTES": ("10485760", "largest request body; beyond it 413"),
    "MAX_PIXELS": (
        "50000000",
        "largest image, counted from its header before decoding; beyond it 413",
    ),
    "BATCH_LIMIT": ("16", "most images in one POST /classify/batch; beyond it 413"),
    "SLOTS": (
        "0",
        "requests worked on at a time, a batch counts for up to half; 0: 4 more than processors",
    ),
    "QUEUE_LIMIT": ("16", "requests that may wait for a slot; beyond it 503 at once"),
    "QUEUE_TIMEOUT_S": ("5", "longest wait for a slot, and what Retry-After says; beyond it 503"),
    "BODY_TIMEOUT_S": ("20", "longest time for a request to arrive; beyond it 408"),
    "SPARE_THREADS": (
        "16",
        "HTTP threads beside those that wait or work: slow bodies, health, metrics",
    ),
    "THREADS": ("0", "processor threads of a forward pass; 0: as many as the CPU limit allows"),
    "HOST": ("127.0.0.1", "address to listen on"),
    "PORT": ("8000", "port to listen on"),
}
MOST_THREADS = 500  # each costs memory, and connections are at most 1,000
POSITIVE = (
    "BATCH_LIMIT",
    "QUEUE_TIMEOUT_S",
    "BODY_TIMEOUT_S",
    "SPARE_THREADS",
    "MAX_UPLOAD_BYTES",
    "MAX_PIXELS",
)


def read_settings(given=None):
    """Environment, and `given` over it -> {name: str or int}. Raises UsageError that names a bad value."""
    values = {
        name: (given or {}).get(name, os.environ.get(name) or default)
        for name, (default, _) in SETTINGS.items()
    }
    for name, (default, _) in SETTINGS.items():
        if default.isdigit():
            if not str(values[name]).isdecimal():
                raise UsageError(f"{name}={values[name]}: must be a whole number")
            values[name] = int(values[name])
        if name in POSITIVE and not values[name]:
            raise UsageError(f"{name}=0: must be at least 1")
    if (
        threads := values["SLOTS"] + values["QUEUE_LIMIT"] + values["SPARE_THREADS"]
    ) > MOST_THREADS:
        raise UsageError(
            f"SLOTS={values['SLOTS']}, QUEUE_LIMIT={values['QUEUE_LIMIT']},"
            f" SPARE_THREADS={values['SPARE_THREADS']}: together {threads:,} threads; must be at"
            f" most {MOST_THREADS}"
        )
    if values["PORT"] > 65535:
        raise UsageError(f"PORT={values['PORT']}: must be at most 65535")
    return values


def read_file(name, path, remedy):
    """Bytes of the file that a setting names. Raises UsageError."""
    try:
        return read_bytes(path)
    except UsageError as error:
        raise UsageError(f"{name}: {error}; name {remedy}") from None


# ---- API keys ----


def read_keys(path):
    """File of `name sha256-of-token` lines -> {name: 32 bytes}; {} where no file is set. Raises UsageError."""
    keys = {}
    data = (
        read_file("API_KEYS_FILE", path, "a file of lines 'name sha256-of-token'") if path else b""
    )
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            name, digest = words[0], bytes.fromhex(words[1])
            if len(words) != 2 or len(digest) != 32:
                raise ValueError
        except (ValueError, IndexError):
            raise UsageError(
                f"API_KEYS_FILE={path}: line {number} is not 'name sha256-of-token'"
            ) from None
        if name in keys:
            raise UsageError(
                f"API_KEYS_FILE={path}: line {number} has a name that another line has; give it one"
                " of its own"
            )
        keys[name] = digest
    if path and not keys:
        raise UsageError(
            f"API_KEYS_FILE={path}: holds no key; add a line 'name sha256-of-token', or leave the"
            " setting empty"
        )
    return keys


def key_of(authorization, keys):
    """Name of the key whose token this header bears, or None. All are compared, each in constant time."""
    scheme, _, token = authorization.partition(" ")
    digest = bytes.fromhex(sha256(token.strip().encode()))
    names = [name for name, known in keys.items() if hmac.compare_digest(known, digest)]
    return names[0] if names and scheme.lower() == "bearer" else None
