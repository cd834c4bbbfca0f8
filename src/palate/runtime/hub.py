"""Whether the hub can be reached, asked once: without a network its client tries for most of a minute at each file."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

TRIES, SECONDS = 2, 3.0
# what the hub's client raises where it gets no answer: of its HTTP library some are no OSError, as a refused connection
UNREACHED: tuple[type[Exception], type[Exception]] = (HfHubHTTPError.__bases__[0], OSError)


@cache
def reachable() -> bool:
    """True if a connection to the hub opens, directly or through a proxy; False offline, or with HF_HUB_OFFLINE=1."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        try:
            get_session().head(endpoint, timeout=SECONDS)  # any answer will do
            return True
        except UNREACHED:
            return False
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    for _ in range(TRIES):
        try:
            socket.create_connection((address.hostname or "", port), SECONDS).close()
            return True
        except OSError:
            continue
    return False


def hub_file(repository: str, name: str, *, repo_type: str = "model") -> Path:
    """A file of a repository of the hub, in the local cache; downloaded if the hub can be reached.

    LocalEntryNotFoundError: it is not in the cache and cannot be fetched; other errors are the hub client's.
    """
    if reachable():
        return Path(hf_hub_download(repository, name, repo_type=repo_type))
    found = try_to_load_from_cache(repository, name, repo_type=repo_type)
    if not isinstance(found, str):
        raise LocalEntryNotFoundError(f"{name} is not in the local cache, and the hub cannot be reached")
    return Path(found)
