"""Addresses of object stores, registries and proxies."""

import os
import re


def is_remote(path):
    """Is it in an object store, as s3://bucket/folder is?"""
    return "://" in str(path)


def masked(url):
    """An address without the password in it, to be shown."""
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", url)


def behind_proxy(url, *also):
    """Words for the error of a connection to `url` where a proxy lies between: its address, its variable, the remedy. Else ''.

    `also`: 'all' for clients that follow ALL_PROXY.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    parts, proxies = urlsplit(url), getproxies()
    kinds = [kind for kind in (parts.scheme, *also) if kind in proxies]
    if (
        parts.scheme not in ("http", "https")
        or not kinds
        or proxy_bypass(parts.netloc.rpartition("@")[2])
    ):
        return ""
    names = [
        name for name in (f"{kinds[0]}_proxy", f"{kinds[0]}_PROXY".upper()) if name in os.environ
    ]
    name = names[0] if names else "the system's settings"
    return (
        f"; the proxy {masked(proxies[kinds[0]])} of {name} lies between: unset {name}, or set"
        f" NO_PROXY={parts.hostname}, where it is not needed"
    )
