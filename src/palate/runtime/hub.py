"""Whether the hub can be reached, asked once: without a network its client tries for most of a minute at each file."""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlsplit

TRIES, SECONDS = 2, 3.0


@cache
def reachable() -> bool:
    """True if a connection to the hub opens, or where a proxy makes it; False offline, or with HF_HUB_OFFLINE=1."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    for _ in range(TRIES):
        try:
            socket.create_connection((address.hostname or "", port), SECONDS).close()
            return True
        except OSError:
            continue
    return False
