"""The one HTTP client of the package: JSON by POST, patient, bounded in time and size, and it follows no redirect."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import threading
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from palate.runtime.errors import InputError, RewardServiceError
from palate.runtime.files import parse_json

TOKEN = "PALATE_REWARD_TOKEN"  # the environment variable of both sides
HOSTS = "PALATE_REWARD_HOSTS"  # of the client: the machines, beside this one, that the token may go to
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANSWER_LIMIT = 1 << 20  # bytes of an answer
AGAIN = (429, 502, 503, 504)  # answers after which another try makes sense
REMEDY = {
    401: f"Set {TOKEN} to the token that the server was started with",
    403: "Call it by the host name that it allows, and from no web page",
    404: "The path of the URL is usually /score, of a chat server /v1/chat/completions; and the model's name is the "
    "server's own",
    413: "Lower trainer.batch_size or the image size, or raise the server's limits",
}


class RemoteError(RewardServiceError):
    """The reward service failed, after every retry or with an answer that no retry fixes. Exit code 5. `status`: of the
    last HTTP answer, None where there was none."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Patience(NamedTuple):
    """`timeout` is in seconds and holds for a whole try; between tries the wait doubles from `wait`, up to 30 s.

    again: the HTTP answers after which another try makes sense."""

    timeout: float = 120.0
    retries: int = 4
    wait: float = 0.5
    again: tuple[int, ...] = AGAIN


def place_of(url: str, *, strict: bool = False) -> tuple[str, int | None]:
    """Host and port of a URL; "" and None where there is none that can be read. strict: a port that is no number, or a
    name that no network has, leaves no host either."""
    name, port = "", None
    try:  # a bracket may not be closed
        parts = urlsplit(url)
        name, port = parts.hostname or "", None
        port = parts.port
        if strict:
            name.encode("idna")
    except ValueError:
        name = "" if strict else name
    return name, port


class JsonClient:
    """POSTs JSON to `url`. With a token, plain http is for the same machine only. `key` is what its errors name."""

    def __init__(self, url: str, token: str | None, patience: Patience, *, key: str):
        name, _ = place_of(url, strict=True)
        if not name or (parts := urlsplit(url)).scheme not in ("http", "https") or parts.username or parts.password:
            raise InputError(
                f"{key}: got {url!r}; expected a URL without a password, for example http://127.0.0.1:8411/score"
            )
        if token is not None and parts.scheme == "http" and name not in LOOPBACK:
            raise InputError(f"{key}: {url} would send the token in the clear; use https, or tunnel to 127.0.0.1")
        named = [host.strip().lower() for host in os.environ.get(HOSTS, "").split(",")]
        if token and name not in (*LOOPBACK, *named):  # a recipe, or a run, may come from somebody else
            raise InputError(
                f"{key}: the token in {TOKEN} goes to no other machine than you name; if {name} is your server, set "
                f"{HOSTS}={name} (several with commas)"
            )
        if not url.isascii() or not url.isprintable() or " " in url:
            raise InputError(f"{key}: got {url!r}; write signs that are not ASCII, and spaces, as %20 and the like")
        if token is not None and not token:
            raise InputError(
                f"{key}: no token; set the environment variable {TOKEN} to the one the server was started with"
            )
        if token is not None and not (token.isascii() and token.isprintable()):
            raise InputError(f"{key}: the token in {TOKEN} has a line end or a sign that is not ASCII; set it again")
        self.url, self.patience, self._parts, self._host, self._token = url, patience, parts, name, token

    @property
    def place(self) -> str:
        """The URL as messages show it: without what follows a question mark, which may be a key."""
        return self.url.partition("?")[0]

    def ask(self, content: dict[str, Any]) -> bytes:
        """The body of the answer to a POST of `content` as JSON; RemoteError when every try failed."""
        body = json.dumps(content).encode()
        last: int | None = None
        for attempt in range(self.patience.retries + 1):
            try:
                status, answer = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                problem, last = f"no answer ({error or type(error).__name__})", None
            else:
                last = status
                if status == 200:
                    return answer
                problem = f"HTTP {status} ({_error_of(answer)})"
                if status not in self.patience.again:
                    remedy = REMEDY.get(status, "Look at its log")
                    raise RemoteError(f"reward service {self.place}: {problem}. {remedy}", status)
            if attempt < self.patience.retries:
                time.sleep(min(30.0, self.patience.wait * 2**attempt) * (0.5 + random.random()))
        raise RemoteError(
            f"reward service {self.place}: {problem}, {self.patience.retries + 1} times. Is it running? When it is, "
            "`palate resume` goes on with a run, and an evaluation is asked for again",
            last,
        )

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body. Redirects are not followed, so the token goes nowhere else."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._host, self._parts.port, timeout=self.patience.timeout)
        # a socket's own time-out starts anew at each byte
        watchdog = threading.Timer(self.patience.timeout, _hang_up, [connection])
        try:
            connection.connect()
            watchdog.start()
            path = (self._parts.path or "/") + (f"?{self._parts.query}" if self._parts.query else "")
            headers = {"Content-Type": "application/json"}
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            answer = response.read(ANSWER_LIMIT + 1)
            if len(answer) > ANSWER_LIMIT:
                raise RemoteError(f"reward service {self.place}: its answer is larger than {ANSWER_LIMIT // 1024} KiB")
            return response.status, answer
        finally:
            watchdog.cancel()
            connection.close()


def _hang_up(connection: http.client.HTTPConnection) -> None:
    try:
        connection.sock.shutdown(socket.SHUT_RDWR)
    except (AttributeError, OSError):
        return  # it was closed a moment before


def _error_of(answer: bytes) -> str:
    try:
        return str(parse_json(answer)["error"])[:200]
    except (ValueError, KeyError, TypeError):
        return answer[:80].decode("utf-8", "replace")
