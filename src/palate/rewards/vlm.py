"""A vision-language model as the reward, behind any server that speaks OpenAI's chat completions (vLLM, SGLang, ...).

One question per image: the picture, the prompt, and the request for a number from 1 to 5, which is parsed. There is no
gradient through it. UnifiedReward and its like are served so; the words that such a model was trained to be asked with
are its authors', and are given as `question`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from palate.rewards.chat import ChatModel, reply_of
from palate.rewards.client import TOKEN, Patience, RemoteError
from palate.runtime.errors import InputError
from palate.runtime.images import encode_png, to_pixels

QUESTION = (
    'How well does this picture show the following text, and how good is it as a picture?\nText: "{prompt}"\n'
    "Answer with one line: Score: N, where N is a number from 1 (not at all) to 5 (perfectly)."
)
RANGE = r"\d\s*(?:-|\u2013|to)\s*\d+\s*[)\]]"  # what may be answered, in brackets behind the word: (1-5)
SCORE = re.compile(
    rf"score(?:\s*[(\[]\s*{RANGE})?\W{{0,6}}(?!{RANGE})(\d+(?:\.\d+)?)(?!\.?\d|[-\u2013]\d)", re.IGNORECASE
)


class VLMReward:
    """(images, prompts) -> (B,) float32 from 1 to 5.

    url: of chat completions; model: the server's name for the one to ask. question: holds {prompt}; the answer to it
    says "Score: N", or is a bare number.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        model: str,
        question: str = QUESTION,
        concurrency: int = 4,
        patience: Patience | None = None,
    ):
        if question.count("{prompt}") != 1:
            raise InputError("vlm-judge: the question must hold {prompt} exactly once")
        self.chat = ChatModel(url, token, model, patience=patience, key="reward.source.vlm-judge")
        self.question, self.concurrency = question, concurrency

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with ThreadPoolExecutor(self.concurrency) as pool:
            scores = list(pool.map(self._score, to_pixels(images), prompts))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, pixels: np.ndarray, prompt: str) -> float:
        text = self.question.replace("{prompt}", prompt)
        answer = self.chat.ask(encode_png(pixels, compress_level=1), text, max_tokens=512)
        try:
            return parse(reply_of(answer).text)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise RemoteError(
                f"vlm-judge {self.chat.url}: a bad answer; expected a chat completion that says Score: N, N from 1 "
                f"to 5, got {answer[:80]!r}. Nothing of this batch is used"
            ) from error


def parse(text: str) -> float:
    """The last "Score: N" of an answer, or an answer that is a number only; ValueError if there is none in 1..5."""
    found = SCORE.findall(text)
    score = float(found[-1] if found else text.strip())
    if not 1 <= score <= 5:
        raise InputError(f"a score of {score}, not in 1..5")
    return score


def load_vlm(source: str | None) -> VLMReward:
    """`source` is the URL of chat completions with the model's name behind it: http://127.0.0.1:8000/v1/...#MODEL."""
    url, _, model = (source or "").partition("#")
    return VLMReward(url, os.environ.get(TOKEN, ""), model=model)
