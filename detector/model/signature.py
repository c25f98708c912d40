"""A detached Ed25519 signature beside a model file, for teams that load only their own models.

openssl genpkey -algorithm ed25519 -out key.pem && openssl pkey -in key.pem -pubout -out public.pem
python train_model.py --model_version v1.0.0 --sign key.pem     # writes model.joblib.sig
MODEL_PUBLIC_KEY=public.pem python classify.py --image_path photo.jpg
"""

import base64
from pathlib import Path

from detector.base.errors import ModelError, UsageError
from detector.base.files import atomic_write, read_bytes

MAKE_KEYS = (
    "make one with openssl genpkey -algorithm ed25519, its public half with openssl pkey -pubout"
)


def signature_path(path):
    return Path(f"{path}.sig")


def read_key(path, given, kind):
    """PEM file -> Ed25519 key. `kind`: 'private' or 'public'.

    `given` is the flag or setting that names the file. Raises UsageError.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UsageError(
            f"{given} {path}: needs cryptography ({error}): pip install -r requirements-serve.txt"
        ) from None
    expected, load, options = {
        "private": (ed25519.Ed25519PrivateKey, serialization.load_pem_private_key, [None]),
        "public": (ed25519.Ed25519PublicKey, serialization.load_pem_public_key, []),
    }[kind]
    try:
        key = load(read_bytes(path), *options)
    except UsageError as error:
        raise UsageError(f"{given} {path}: {error}; {MAKE_KEYS}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        key = None
    if not isinstance(key, expected):
        raise UsageError(
            f"{given} {path}: is no {kind} Ed25519 key in PEM without a password; {MAKE_KEYS}"
        )
    return key


def sign(path, data, key):
    """Model file, its bytes and private key -> its .sig, base64 of 64 bytes.

    Without a key, a .sig of an earlier file is removed. The bytes are those that were written:
    another process may have replaced the file since.
    """
    if key is None:
        return signature_path(path).unlink(missing_ok=True)
    with atomic_write(signature_path(path), "w") as file:
        file.write(base64.b64encode(key.sign(data)).decode() + "\n")


def check_signature(path, data, public_key):
    """Raises ModelError unless that key signed `data`, the bytes of `path`."""
    key, signature = read_key(public_key, "MODEL_PUBLIC_KEY", "public"), signature_path(path)
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(base64.b64decode(signature.read_bytes().strip(), validate=True), data)
    except OSError as error:
        reason = (
            f"it is not signed: {signature} cannot be read ({error.strerror}), and"
            f" MODEL_PUBLIC_KEY={public_key} requires a signature"
        )
    except (InvalidSignature, ValueError):
        reason = (
            f"{signature} is no signature of it by MODEL_PUBLIC_KEY={public_key}: the file has"
            " changed, or another key signed it"
        )
    else:
        return
    raise ModelError(
        f"{path} is refused: {reason}; sign it with train_model.py --sign, or pull it again"
    )
