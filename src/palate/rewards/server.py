"""A server of one reward for `palate.rewards.remote`, to start from (fastapi, from `pip install 'palate[server]'`).

It refuses calls without the token (401), under a host name not among its own or from a web page of another origin
(403), larger than the limits (413), in another form (400, 415), and more than `waiting` at a time (503).
"""

import base64
import hashlib
import hmac
import io
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from palate.core import Reward
from palate.models.options import place_of as device_of
from palate.rewards.client import LOOPBACK, TOKEN, place_of
from palate.rewards.combine import as_scores
from palate.runtime.errors import InputError
from palate.runtime.files import parse_json
from palate.runtime.images import as_rgb, from_pixels


@dataclass(frozen=True)
class Limits:
    """What a server takes: bytes of a request, images of a request, pixels of a side, requests at a time; and how many
    answers it remembers for retries."""

    max_bytes: int = 64 << 20
    max_images: int = 64
    max_side: int = 2048
    waiting: int = 8
    remembered: int = 1024


class _Refused(Exception):
    """An HTTP status and the sentence that goes with it."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class _Scorer:
    """Computes one request at a time on `device`, and answers a repeated one from memory."""

    def __init__(self, reward: Reward, remembered: int, device: torch.device):
        self.reward, self.remembered, self.device = reward, remembered, device
        self.answers: OrderedDict[tuple[str, bytes], list[float]] = OrderedDict()
        self.one_at_a_time = threading.Lock()

    def compute(self, key: tuple[str, bytes], images: list[Image.Image], prompts: list[str]) -> list[float]:
        with self.one_at_a_time:
            if key in self.answers:
                return self.answers[key]
            groups: dict[tuple[int, int], list[int]] = {}
            for i, image in enumerate(images):
                groups.setdefault(image.size, []).append(i)
            scores = [math.nan] * len(images)
            for rows in groups.values():
                batch = torch.stack([from_pixels(np.asarray(images[i])) for i in rows]).to(self.device)
                with torch.no_grad():
                    values = _numbers(self.reward(batch, [prompts[i] for i in rows]), len(rows), self.device)
                for i, value in zip(rows, values, strict=True):
                    scores[i] = float(value)
            if not all(math.isfinite(score) for score in scores):
                raise _Refused(500, "the reward gave a value that is not finite")
            self.answers[key] = scores
            while len(self.answers) > self.remembered:
                self.answers.popitem(last=False)
            return scores


def _numbers(answer: Any, count: int, device: torch.device) -> list[float]:
    """A reward's answer, of any kind that the loop takes too."""
    values = as_scores(answer, device)
    if not isinstance(values, torch.Tensor) or values.shape != (count,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise _Refused(500, f"the reward gave {got}; expected {count} numbers, one per image")
    return values.tolist()


def make_app(
    reward: Reward,
    token: str,
    *,
    hosts: Sequence[str] = LOOPBACK,
    limits: Limits | None = None,
    device: str | None = None,
) -> Any:
    """The ASGI application of one reward, which is given its images on `device`; None = the accelerator if there is
    one. InputError: the token is shorter than 16 characters, or there is no such device."""
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse

    limits = limits or Limits()
    if len(token) < 16:
        raise InputError(
            f"the token of a reward server needs at least 16 characters, got {len(token)}; "
            "make one with python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    scorer = _Scorer(reward, limits.remembered, device_of(device, key="device"))
    inside = 0

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        nonlocal inside
        try:
            _admit(request.headers, token, hosts, limits.max_bytes)
            if inside >= limits.waiting:
                raise _Refused(503, "too many requests are waiting")
            inside += 1
            try:
                body = b""
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limits.max_bytes:
                        raise _Refused(413, f"the request is larger than {limits.max_bytes} bytes")
                name, prompts, images = await run_in_threadpool(_parsed, body, limits)
                key = (name, hashlib.sha256(body).digest())
                scores = await run_in_threadpool(scorer.compute, key, images, prompts)
                return JSONResponse({"id": name, "scores": scores})
            finally:
                inside -= 1
        except _Refused as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status)

    return app


def serve(
    reward: Reward,
    *,
    host: str = "127.0.0.1",
    port: int = 8411,
    limits: Limits | None = None,
    device: str | None = None,
) -> None:
    """Serve until interrupted; the token comes from the environment. Put TLS in front of any host but this machine.
    device: as of `make_app`."""
    import uvicorn

    app = make_app(reward, os.environ.get(TOKEN, ""), hosts=(*LOOPBACK, host), limits=limits, device=device)
    uvicorn.run(app, host=host, port=port, log_level="warning", limit_concurrency=64, server_header=False)


def _admit(headers: Any, token: str, hosts: Sequence[str], max_bytes: int) -> None:
    """What can be judged before a byte of the body is read."""
    name, _ = place_of("//" + headers.get("host", ""))
    if name not in hosts:
        raise _Refused(403, "this host name is not allowed")
    origin = headers.get("origin")
    if origin is not None and (
        origin.partition("://")[2] != headers.get("host") or headers.get("sec-fetch-site") == "cross-site"
    ):
        raise _Refused(403, "calls from another origin are not allowed")
    given = headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise _Refused(401, "the bearer token is missing or wrong")
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise _Refused(415, "expected application/json")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 12 or int(length) > max_bytes:
        raise _Refused(413, f"the request is larger than {max_bytes} bytes")


def _parsed(body: bytes, limits: Limits) -> tuple[str, list[str], list[Image.Image]]:
    try:
        tree = parse_json(body)
        name, prompts, images = tree["id"], tree["prompts"], tree["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise _Refused(400, 'expected {"id", "prompts", "images"}') from error
    texts = (
        isinstance(prompts, list) and isinstance(images, list) and all(isinstance(t, str) for t in [*prompts, *images])
    )
    if not texts or len(prompts) != len(images) or not isinstance(name, str) or len(name) > 128:
        raise _Refused(400, "expected as many prompts as images, all of them text, and a short id")
    if not 1 <= len(images) <= limits.max_images:
        raise _Refused(413, f"{len(images)} images; from 1 to {limits.max_images} are allowed")
    return name, prompts, [_opened(image, limits.max_side) for image in images]


def _opened(text: str, max_side: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if max(image.size) > max_side:  # known from the header, before anything is unpacked
                raise _Refused(413, f"an image of {image.size[0]} x {image.size[1]}; at most {max_side} on a side")
            return as_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _Refused(400, "an image is not a base64 PNG") from error
