"""One picture and one text to a vision-language model behind OpenAI's chat completions, and what it says.

The transport of `vlm-judge` and of checklists: vLLM, SGLang, llama.cpp's server and others speak it.
"""

from __future__ import annotations

import base64
import math
from typing import Any, NamedTuple

from palate.rewards.client import JsonClient, Patience, RemoteError
from palate.runtime.errors import InputError
from palate.runtime.files import parse_json


class Reply(NamedTuple):
    """What the model wrote, and where the server tells them, the likeliest tokens of each place: (token, probability),
    the written one first."""

    text: str
    places: tuple[tuple[tuple[str, float], ...], ...] = ()


class ChatModel:
    """`url` is that of chat completions, `model` the server's name for the one to ask; `key` is what errors name."""

    def __init__(self, url: str, token: str, model: str, *, patience: Patience | None = None, key: str):
        if not model:
            raise InputError(f"{key}: {url} names no model; write it behind the URL, as {url}#MODEL")
        self.client, self.model = JsonClient(url, token, patience or Patience(), key=key), model
        self.tells_tokens = True  # until the server refuses

    @property
    def url(self) -> str:
        """Where it is asked."""
        return self.client.place

    def ask(self, png: bytes, text: str, *, max_tokens: int, top_tokens: int = 0) -> bytes:
        """The body of the answer; RemoteError after every retry. With `top_tokens` the likeliest tokens of each place
        are asked for too; a server that refuses them (HTTP 400 or 422) is asked without, from then on."""
        picture = "data:image/png;base64," + base64.b64encode(png).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        request: dict[str, Any] = {
            "model": self.model, "temperature": 0, "max_tokens": max_tokens, "messages": [message]
        }  # fmt: skip
        if not top_tokens or not self.tells_tokens:
            return self.client.ask(request)
        try:
            return self.client.ask(request | {"logprobs": True, "top_logprobs": top_tokens})
        except RemoteError as error:
            if error.status not in (400, 422):
                raise
            answer = self.client.ask(request)  # it may have been something else that was refused
            self.tells_tokens = False
            return answer


def reply_of(answer: bytes) -> Reply:
    """The first choice of a chat completion. ValueError, LookupError or TypeError: it is none."""
    choice = parse_json(answer)["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise TypeError(f"content is {type(text).__name__}, not a text")
    logprobs = choice.get("logprobs")
    written = logprobs.get("content") if isinstance(logprobs, dict) else None
    return Reply(text, tuple(_place(place) for place in written or ()))


def _place(place: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """The written token first; the others by their order. A token that a server lists twice counts once."""
    found = {str(place["token"]): _probability(place["logprob"])}
    for other in place.get("top_logprobs") or ():
        found.setdefault(str(other["token"]), _probability(other["logprob"]))
    return tuple(found.items())


def _probability(logprob: float) -> float:
    if math.isnan(logprob):
        raise ValueError("a probability that is no number")
    return math.exp(min(0.0, logprob))
