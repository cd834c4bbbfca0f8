"""Questions about a picture, answered by a vision-language model: a score in [0, 1] per question, and their means.

After Soft-TIFA (GenEval 2, arXiv 2512.16853): a question's score is the probability that the judge gives its right
answer, read from the likeliest tokens where the server tells them, else 1 or 0 by the answer's text. A prompt's score
is the arithmetic mean of its questions (how much of it is there), or the geometric one (whether all of it is).

As the reward `checklist` there is no gradient through it. Every prompt must have its questions in the file.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from palate.data.checklists import Checklist, Question, read_checklists
from palate.rewards.answers import Answers, as_kept
from palate.rewards.chat import ChatModel, Reply, reply_of
from palate.rewards.client import AGAIN, TOKEN, Patience, RemoteError
from palate.runtime.errors import InputError
from palate.runtime.images import UNREADABLE, encode_png, read_pixels, to_pixels
from palate.runtime.phases import tell

KEY = "reward.source.checklist"
CONCURRENCY = 8
TOP_TOKENS = 20  # the most that OpenAI's interface allows
MAX_TOKENS = 24  # an answer is a word; a model that explains itself has said it by then
SURE = 0.5  # of the judge's probability that must be on yes and no, on numbers, or on the grades, together
PATIENT = Patience(timeout=300.0, retries=5, wait=1.0, again=(*AGAIN, 500))
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BEFORE = ("answer", "the", "is")  # what may stand before an answer
SPACES = ("\u0120", "\u010a")  # letters that stand for a space and a line's end in byte-level vocabularies
Picture = np.ndarray | Path  # pixels (H, W, 3), uint8, or a file of them


class Score(NamedTuple):
    """Of one question: in [0, 1], and whether the judge answered in a form that could be read."""

    value: float
    clear: bool = True


# --- scores: pure functions -----------------------------------------------------------------------------------------


def score_of(question: Question, reply: Reply) -> Score:
    """The probability of the right answer, or the mean grade over the best one; by the text where the server told no
    tokens, or where a number or a grade is wanted and the first word is most likely none. An answer that cannot be read
    is 0 and not clear."""
    words = [plain(place[0][0]) for place in reply.places]
    start = next((k for k, word in enumerate(words) if word and (word not in BEFORE or _goes_on(reply, k))), None)
    if start is None:
        return _by_text(question, reply.text)
    if question.grades:
        chances = [_chance(reply, start, grade) for grade in question.grades]
        total = sum(chances)
        if total < SURE:
            return _by_text(question, reply.text)
        return Score(sum(k * chance for k, chance in enumerate(chances)) / total / (len(chances) - 1))
    value = _chance(reply, start, question.answer)
    if plain(question.answer) in ("yes", "no"):
        return Score(value, _chance(reply, start, "yes") + _chance(reply, start, "no") >= SURE)
    if _is_number(plain(question.answer)):
        said = sum(chance for token, chance in reply.places[start] if _is_number(plain(token)))
        read = Score(value) if max(said, value) >= SURE else _by_text(question, reply.text)
        return read if read.clear else Score(value, False)
    return Score(value)


def plain(text: str) -> str:
    """Lower case, without the marks that tokenizers and markdown put around a word."""
    return re.sub(r"^[\s\W_\u2581\u0120\u010a]+|[\s\W_]+$", "", text).lower()


def _is_number(word: str) -> bool:
    return word in NUMBERS or word.isdecimal()


def spellings(answer: str) -> set[str]:
    """An answer as it may be written: numbers also as digits."""
    word = plain(answer)
    if word in NUMBERS:
        return {word, str(NUMBERS.index(word))}
    if word.isdecimal() and int(word) < len(NUMBERS):
        return {word, NUMBERS[int(word)]}
    return {word}


def _chance(reply: Reply, start: int, answer: str) -> float:
    """The probability of the answer at that place: that of the tokens that spell it, and of the written ones together
    where it takes several. What was written counts up to the end of its word: "1" of "12" is not 1. An answer of
    several tokens that was not written counts 0."""
    wanted = spellings(answer)
    found = sum(chance for token, chance in reply.places[start][1:] if plain(token) in wanted)
    written, chance = "", 1.0
    for k, place in enumerate(reply.places[start:], start):
        token, own = place[0]
        written, chance = written + token, chance * own
        if plain(written) in wanted and not _goes_on(reply, k):
            return min(1.0, found + chance)
    return min(1.0, found)


def _goes_on(reply: Reply, k: int) -> bool:
    """Whether the word written at that place is not over: the next token begins with a letter or a digit."""
    first = reply.places[k + 1][0][0][:1] if k + 1 < len(reply.places) else ""
    return first.isalnum() and first not in SPACES


def _by_text(question: Question, text: str) -> Score:
    words = re.findall(r"[^\W_]+", text.rpartition("</think>")[2].lower())
    if question.grades:
        graded = next((word for word in words if word in question.grades), None)
        if graded is None:
            return Score(0.0, False)
        return Score(question.grades.index(graded) / (len(question.grades) - 1))
    answer = plain(question.answer)
    if answer in ("yes", "no"):
        said = next((word for word in words if word in ("yes", "no")), None)
        return Score(float(said == answer), said is not None)
    numbers = [word for word in words if _is_number(word)]
    if _is_number(answer):
        return Score(float(bool(numbers) and numbers[0] in spellings(answer)), bool(numbers))
    phrase = " ".join(re.findall(r"[^\W_]+", answer))
    return Score(float(f" {phrase} " in f" {' '.join(words)} "), bool(words))


def means(questions: Sequence[Question], scores: Sequence[float]) -> tuple[float, float]:
    """The arithmetic and the geometric mean by the questions' weights. A question whose parent counts below one half,
    by its answer or by a parent of its own, counts 0 in both: DPG-Bench's program goes down the list so."""
    counted = list(scores)
    for place, question in enumerate(questions):
        if any(counted[parent] < 0.5 for parent in question.parents):
            counted[place] = 0.0
    total = sum(question.weight for question in questions)
    pairs = list(zip(questions, counted, strict=True))
    arithmetic = sum(question.weight * score for question, score in pairs) / total
    if any(score == 0 and question.weight > 0 for question, score in pairs):
        return arithmetic, 0.0
    return arithmetic, math.exp(sum(question.weight * math.log(score) for question, score in pairs) / total)


def request_text(question: Question) -> str:
    """What the judge reads: the question and the form of its answer."""
    if question.grades:
        form = f"Answer with one of {', '.join(question.grades)} and nothing else."
    elif plain(question.answer) in ("yes", "no"):
        form = "Answer with yes or no and nothing else."
    else:
        form = "Answer with one word or number and nothing else."
    return f"{question.text}\n{form}"


# --- the judge ------------------------------------------------------------------------------------------------------


class QuestionJudge:
    """Asks `chat` about pictures, at most `concurrency` at a time, and never again what `answers` holds."""

    def __init__(self, chat: ChatModel, *, answers: Answers | None = None, concurrency: int = CONCURRENCY):
        self.chat, self.answers, self.concurrency = chat, answers, concurrency
        self.asked = 0  # of the server, by this object

    def scores(self, asked: Sequence[tuple[Picture, Question]]) -> list[Score]:
        """A score for each (picture, question); a file is read when it is asked about, so that many need no memory.
        RemoteError: the judge failed; what it answered is kept. InputError names a file that cannot be read."""
        texts = [request_text(question) for _, question in asked]
        digests: dict[int, str] = {}
        for picture, _ in asked:
            if id(picture) not in digests:
                digests[id(picture)] = digest_of(pixels_of(picture))
        keys = [(digests[id(picture)], text, self.chat.model) for (picture, _), text in zip(asked, texts, strict=True)]
        replies = {key: found for key in keys if self.answers and (found := self.answers.get(key)) is not None}
        missing = {key: place for place, key in enumerate(keys) if key not in replies}
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = {pool.submit(self._ask, asked[place][0], key): key for key, place in missing.items()}
            try:
                for done, future in enumerate(as_completed(waiting), 1):
                    replies[waiting[future]] = future.result()
                    tell("asking the judge", done, len(waiting))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those on their way are still kept
                raise
        return [score_of(question, replies[key]) for (_, question), key in zip(asked, keys, strict=True)]

    def _ask(self, picture: Picture, key: tuple[str, str, str]) -> Reply:
        self.asked += 1
        png = encode_png(pixels_of(picture), compress_level=1)
        answer = self.chat.ask(png, key[1], max_tokens=MAX_TOKENS, top_tokens=TOP_TOKENS)
        try:
            reply = as_kept(reply_of(answer))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise RemoteError(
                f"checklist {self.chat.url}: a bad answer; expected a chat completion, got {answer[:80]!r}"
            ) from error
        if self.answers is not None:
            self.answers.add(key, reply)
        return reply


def pixels_of(picture: Picture) -> np.ndarray:
    """The pixels (H, W, 3) of a picture. InputError names a file that cannot be read."""
    if isinstance(picture, np.ndarray):
        return picture
    try:
        return read_pixels(picture)
    except UNREADABLE as error:
        raise InputError(f"image {picture} cannot be read ({error}); draw it again, without --stored") from error


def digest_of(pixels: np.ndarray) -> str:
    """What tells a picture from another: SHA-256 of its size and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def connect(source: str, *, key: str = KEY, answers: Answers | None = None) -> QuestionJudge:
    """The judge at URL#MODEL, with the token from the environment."""
    url, _, model = source.partition("#")
    return QuestionJudge(ChatModel(url, os.environ.get(TOKEN, ""), model, patience=PATIENT, key=key), answers=answers)


# --- the reward -----------------------------------------------------------------------------------------------------


class ChecklistReward:
    """(images, prompts) -> (B,) float32 in [0, 1]: the arithmetic mean over the prompt's questions. No gradient."""

    def __init__(self, checklists: Sequence[Checklist], judge: QuestionJudge, *, key: str = KEY):
        self.key = key  # what errors name
        self.questions = {item.prompt: item.questions for item in checklists}
        self.judge = judge

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked = []
        for pixels, prompt in zip(to_pixels(images), prompts, strict=True):
            if prompt not in self.questions:
                raise InputError(
                    f"{self.key}: its file has no questions for the prompt {prompt[:80]!r}; set prompts.file to that "
                    "file"
                )
            asked += [(pixels, question) for question in self.questions[prompt]]
        scores = self.judge.scores(asked)
        values, place = [], 0
        for prompt in prompts:
            own = self.questions[prompt]
            values.append(means(own, [score.value for score in scores[place : place + len(own)]])[0])
            place += len(own)
        return torch.tensor(values, dtype=torch.float32, device=images.device)


def load_checklist(source: str | None, *, key: str = KEY) -> ChecklistReward:
    """`source` is the file of questions and the judge: questions.jsonl http://127.0.0.1:8000/v1/...#MODEL. key: what
    errors name."""
    file, _, url = (source or "").rpartition(" ")
    if not file.strip():
        raise InputError(
            f"{key}: got {source!r}; expected a file and a URL, as questions.jsonl http://HOST/v1/...#MODEL"
        )
    return ChecklistReward(read_checklists(file.strip()), connect(url, key=key), key=key)
