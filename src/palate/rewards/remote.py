"""A reward behind HTTP, for scorers that do not fit into the trainer: the client, and a server to start from.

    POST /score   {"id": text, "prompts": [text], "images": [base64 of a PNG]}   ->   {"id": text, "scores": [number]}

There is no gradient through it, so it serves methods that need none. Images travel as 8-bit PNG inside JSON, never as a
pickle. A bearer token is always asked for; plain http is for the same machine only; a retry repeats the same id, and
the server answers an id it has seen from memory. A bad answer stops the step: half a batch is never returned.
"""

import base64
import hashlib
import hmac
import http.client
import io
import json
import math
import os
import random
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from palate.core import Reward
from palate.runtime.errors import InputError, RewardServiceError
from palate.runtime.images import UNREADABLE, encode_png, from_pixels, to_pixels

TOKEN = "PALATE_REWARD_TOKEN"  # the environment variable of both sides
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANSWER_LIMIT = 1 << 20  # bytes of an answer
AGAIN = (429, 502, 503, 504)  # answers after which another try makes sense


class RemoteError(RewardServiceError):
    """The reward service failed, after every retry or with an answer that no retry mends. Exit code 5."""


class RemoteReward:
    """(images, prompts) -> (B,) float32 by POST to `url`. No gradient.

    A batch is sent in pieces of at most `piece` images, at most `concurrency` at a time. `timeout` is in seconds and
    holds for a whole try; between tries the wait doubles from `wait`, up to 30 s. `key` is what its errors name.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout: float = 120.0,
        retries: int = 4,
        wait: float = 0.5,
        piece: int = 16,
        concurrency: int = 2,
        key: str = "reward.source.remote",
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise InputError(f"{key}: got {url!r}; expected a URL, as http://127.0.0.1:8411/score, without a password")
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise InputError(f"{key}: {url} would send the token in the clear; use https, or tunnel to 127.0.0.1")
        if not token:
            raise InputError(
                f"{key}: no token; set the environment variable {TOKEN} to the one the server was started with"
            )
        self.url, self._parts, self._token = url, parts, token
        self.timeout, self.retries, self.wait, self.piece, self.concurrency = timeout, retries, wait, piece, concurrency

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = to_pixels(images)
        starts = range(0, len(pixels), self.piece)
        with ThreadPoolExecutor(self.concurrency) as pool:
            pieces = list(
                pool.map(lambda i: self._scores(pixels[i : i + self.piece], list(prompts[i : i + self.piece])), starts)
            )
        return torch.tensor([score for piece in pieces for score in piece], dtype=torch.float32, device=images.device)

    def _scores(self, pixels: np.ndarray, prompts: list[str]) -> list[float]:
        pictures = [base64.b64encode(encode_png(array, compress_level=1)).decode() for array in pixels]
        content = {"prompts": prompts, "images": pictures}
        name = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
        return self._checked(self.ask({"id": name, **content}), name, len(prompts))

    def ask(self, content: dict[str, Any]) -> bytes:
        """The body of the answer to a POST of `content` as JSON; RemoteError when every try failed."""
        body = json.dumps(content).encode()
        for attempt in range(self.retries + 1):
            try:
                status, answer = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                problem = f"no answer ({error or type(error).__name__})"
            else:
                if status == 200:
                    return answer
                problem = f"HTTP {status} ({_error_of(answer)})"
                if status not in AGAIN:
                    raise RemoteError(f"reward service {self.url}: {problem}. {_REMEDY.get(status, 'Look at its log')}")
            if attempt < self.retries:
                time.sleep(min(30.0, self.wait * 2**attempt) * (0.5 + random.random()))
        raise RemoteError(
            f"reward service {self.url}: {problem}, {self.retries + 1} times. Is it running? Continue with "
            "`palate resume` when it is"
        )

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body. Redirects are not followed, so the token goes nowhere else."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname, self._parts.port, timeout=self.timeout)
        watchdog = threading.Timer(
            self.timeout, _hang_up, [connection]
        )  # a socket's own time-out starts anew at each byte
        try:
            connection.connect()
            watchdog.start()
            path = (self._parts.path or "/") + (f"?{self._parts.query}" if self._parts.query else "")
            connection.request(
                "POST", path, body, {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            )
            response = connection.getresponse()
            answer = response.read(ANSWER_LIMIT + 1)
            if len(answer) > ANSWER_LIMIT:
                raise RemoteError(f"reward service {self.url}: its answer is larger than {ANSWER_LIMIT // 1024} KiB")
            return response.status, answer
        finally:
            watchdog.cancel()
            connection.close()

    def _checked(self, answer: bytes, name: str, count: int) -> list[float]:
        try:
            tree = json.loads(answer)
            scores = tree["scores"]
            good = (
                tree["id"] == name
                and isinstance(scores, list)
                and len(scores) == count
                and all(isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) for s in scores)
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise RemoteError(
                f'reward service {self.url}: a bad answer; expected {{"id": the request\'s, "scores": [{count} finite '
                f"numbers]}}, got {answer[:80]!r}. Nothing of this batch is used"
            )
        return scores


_REMEDY = {
    401: f"Set {TOKEN} to the token that the server was started with",
    403: "Call it by the host name that it allows, and from no web page",
    404: "The path of the URL is usually /score",
    413: "Lower trainer.batch_size or the image size, or raise the server's limits",
}


def load_remote(source: str | None) -> RemoteReward:
    """The reward at the URL `source`, with the token from the environment."""
    return RemoteReward(source or "", os.environ.get(TOKEN, ""))


def _hang_up(connection: http.client.HTTPConnection) -> None:
    try:
        connection.sock.shutdown(socket.SHUT_RDWR)
    except (AttributeError, OSError):
        return  # it was closed a moment before


def _error_of(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return answer[:80].decode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------------- server


class _Refused(Exception):
    """An HTTP status and the sentence that goes with it."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def make_app(
    reward: Reward,
    token: str,
    *,
    hosts: Sequence[str] = LOOPBACK,
    max_bytes: int = 64 << 20,
    max_images: int = 64,
    max_side: int = 2048,
    waiting: int = 8,
    remembered: int = 1024,
) -> Any:
    """The ASGI application of one reward (fastapi, from `pip install 'palate[server]'`).

    It refuses calls without the token (401), under a host name not in `hosts` or from a web page of another origin
    (403), larger than the limits (413), in another form (400, 415), and more than `waiting` at a time (503).
    """
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse

    if len(token) < 16:
        raise InputError(
            f"the token of a reward server needs at least 16 characters, got {len(token)}; "
            "make one with python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    answers: OrderedDict[tuple[str, bytes], list[float]] = OrderedDict()
    one_at_a_time = threading.Lock()
    inside = 0

    def compute(key: tuple[str, bytes], images: list[Image.Image], prompts: list[str]) -> list[float]:
        with one_at_a_time:
            if key in answers:
                return answers[key]
            groups: dict[tuple[int, int], list[int]] = {}
            for i, image in enumerate(images):
                groups.setdefault(image.size, []).append(i)
            scores = [math.nan] * len(images)
            for rows in groups.values():
                batch = from_pixels([np.asarray(images[i]) for i in rows])
                with torch.no_grad():
                    values = reward(batch, [prompts[i] for i in rows]).tolist()
                for i, value in zip(rows, values, strict=True):
                    scores[i] = float(value)
            if not all(math.isfinite(score) for score in scores):
                raise _Refused(500, "the reward gave a value that is not finite")
            answers[key] = scores
            while len(answers) > remembered:
                answers.popitem(last=False)
            return scores

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        nonlocal inside
        try:
            _admit(request.headers, token, hosts, max_bytes)
            if inside >= waiting:
                raise _Refused(503, "too many requests are waiting")
            inside += 1
            try:
                body = b""
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_bytes:
                        raise _Refused(413, f"the request is larger than {max_bytes} bytes")
                name, prompts, images = await run_in_threadpool(_parsed, body, max_images, max_side)
                key = (name, hashlib.sha256(body).digest())
                return JSONResponse({"id": name, "scores": await run_in_threadpool(compute, key, images, prompts)})
            finally:
                inside -= 1
        except _Refused as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status)

    return app


def serve(reward: Reward, *, host: str = "127.0.0.1", port: int = 8411, **limits: Any) -> None:
    """Serve until interrupted; the token comes from the environment. Put TLS in front of any host but this machine."""
    import uvicorn

    app = make_app(reward, os.environ.get(TOKEN, ""), hosts=(*LOOPBACK, host), **limits)
    uvicorn.run(app, host=host, port=port, log_level="warning", limit_concurrency=64, server_header=False)


def _admit(headers: Any, token: str, hosts: Sequence[str], max_bytes: int) -> None:
    """What can be judged before a byte of the body is read."""
    name = urlsplit("//" + headers.get("host", "")).hostname or ""
    if name not in hosts:
        raise _Refused(403, "this host name is not allowed")
    origin = headers.get("origin")
    if origin is not None and (
        urlsplit(origin).netloc != headers.get("host") or headers.get("sec-fetch-site") == "cross-site"
    ):
        raise _Refused(403, "calls from another origin are not allowed")
    given = headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise _Refused(401, "the bearer token is missing or wrong")
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise _Refused(415, "expected application/json")
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > max_bytes:
        raise _Refused(413, f"the request is larger than {max_bytes} bytes")


def _parsed(body: bytes, max_images: int, max_side: int) -> tuple[str, list[str], list[Image.Image]]:
    try:
        tree = json.loads(body)
        name, prompts, images = tree["id"], tree["prompts"], tree["images"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Refused(400, 'expected {"id", "prompts", "images"}') from error
    texts = (
        isinstance(prompts, list) and isinstance(images, list) and all(isinstance(t, str) for t in [*prompts, *images])
    )
    if not texts or len(prompts) != len(images) or not isinstance(name, str) or len(name) > 128:
        raise _Refused(400, "expected as many prompts as images, all of them text, and a short id")
    if not 1 <= len(images) <= max_images:
        raise _Refused(413, f"{len(images)} images; from 1 to {max_images} are allowed")
    return name, prompts, [_opened(image, max_side) for image in images]


def _opened(text: str, max_side: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if max(image.size) > max_side:  # known from the header, before anything is unpacked
                raise _Refused(413, f"an image of {image.size[0]} x {image.size[1]}; at most {max_side} on a side")
            return image.convert("RGB")
    except UNREADABLE as error:
        raise _Refused(400, "an image is not a base64 PNG") from error
