"""A reward behind HTTP, for scorers that do not fit into the trainer. `palate.rewards.server` is the other side.

    POST /score   {"id": text, "prompts": [text], "images": [base64 of a PNG]}   ->   {"id": text, "scores": [number]}

There is no gradient through it, so it serves methods that need none. Images travel as 8-bit PNG inside JSON, never as a
pickle. A bearer token is always asked for; plain http is for the same machine only; a retry repeats the same id, and
the server answers an id it has seen from memory. A bad answer stops the step: half a batch is never returned.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from palate.rewards.client import LOOPBACK, TOKEN, JsonClient, Patience, RemoteError
from palate.runtime.files import parse_json
from palate.runtime.images import encode_png, to_pixels

__all__ = ["LOOPBACK", "TOKEN", "Patience", "RemoteError", "RemoteReward", "load_remote"]

PATIENCE = Patience()


class RemoteReward:
    """(images, prompts) -> (B,) float32 by POST to `url`. No gradient.

    A batch is sent in pieces of at most `piece` images, at most `concurrency` at a time. `patience`: how long
    and how often it tries. `key` is what its errors name.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        patience: Patience = PATIENCE,
        piece: int = 16,
        concurrency: int = 2,
        key: str = "reward.source.remote",
    ):
        self.client = JsonClient(url, token, patience, key=key)
        self.piece, self.concurrency = piece, concurrency

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = to_pixels(images)
        starts = range(0, len(pixels), self.piece)
        with ThreadPoolExecutor(self.concurrency) as pool:
            pieces = list(
                pool.map(lambda i: self._scores(pixels[i : i + self.piece], list(prompts[i : i + self.piece])), starts)
            )
        return torch.tensor([score for piece in pieces for score in piece], dtype=torch.float32, device=images.device)

    def _scores(self, pixels: np.ndarray, prompts: list[str]) -> list[float]:
        content = {
            "prompts": prompts,
            "images": [base64.b64encode(encode_png(array, compress_level=1)).decode() for array in pixels],
        }
        name = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
        return self._checked(self.client.ask({"id": name, **content}), name, len(prompts))

    def _checked(self, answer: bytes, name: str, count: int) -> list[float]:
        try:
            tree = parse_json(answer)
            scores = tree["scores"]
            good = (
                tree["id"] == name
                and isinstance(scores, list)
                and len(scores) == count
                and all(isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) for s in scores)
            )
        except (ValueError, KeyError, TypeError, OverflowError):
            good = False
        if not good:
            raise RemoteError(
                f'reward service {self.client.place}: a bad answer; expected {{"id": the request\'s, "scores": '
                f"[{count} finite numbers]}}, got {answer[:80]!r}. Nothing of this batch is used"
            )
        return scores


def load_remote(source: str | None) -> RemoteReward:
    """The reward at the URL `source`, with the token from the environment."""
    return RemoteReward(source or "", os.environ.get(TOKEN, ""))
