"""Addresses of object stores, registries and proxies."""

import os
import re


def is_remote(path):
    """Is it in an object store, as s3://bucket/folder is?"""
    return "://" in str(path)


def masked(url):
    """An address with its password hidden."""
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", url)


def behind_proxy(url, *also):
    """End of an error message that names the proxy for `url` and the remedy; '' without a proxy.

    `also`: 'all' for clients that follow ALL_PROXY.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    parts, proxies = urlsplit(url), getproxies()
    kinds = [kind for kind in (parts.scheme, *also) if kind in proxies]
    is_http = parts.scheme in ("http", "https")
    if not is_http or not kinds or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    variables = (f"{kinds[0]}_proxy", f"{kinds[0]}_PROXY".upper())
    source = next((name for name in variables if name in os.environ), "the system's settings")
    return (
        f"; the connection goes through the proxy {masked(proxies[kinds[0]])} of {source};"
        f" unset {source}, or set NO_PROXY={parts.hostname}, where it is not needed"
    )
