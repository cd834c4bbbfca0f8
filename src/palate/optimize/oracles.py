"""Ways to reach a black-box objective: built in, a function, a program, a server, a judge with questions."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from palate.recipe.settings import OracleSettings
from palate.rewards.checklist import load_checklist
from palate.rewards.client import TOKEN, JsonClient, Patience
from palate.rewards.oracles import BUILT_IN, Oracle
from palate.rewards.remote import RemoteReward
from palate.runtime.code import load_module_object, load_object, names_a_file, refused_call
from palate.runtime.errors import InputError
from palate.runtime.files import parse_json
from palate.runtime.images import encode_png, to_pixels

MAX_ANSWER = 1 << 20  # bytes of a program's answer


def load_oracle(settings: OracleSettings, *, seed: int = 0) -> Oracle:
    """The oracle that a recipe names. InputError if there is no such function or program."""
    if settings.function is not None:
        key, named = "optimize.oracle.function", settings.function
        found = load_object(named, key=key) if names_a_file(named) else load_module_object(named, key=key)
        if not callable(found):
            raise InputError(f"{key}: expected module:function of something callable, got {named!r}")
        if problem := refused_call(found, None, []):
            raise InputError(f"{key}: {named} is called as (images, prompts): {problem}")
        return found
    if settings.command is not None:
        if shutil.which(settings.command[0]) is None:
            raise InputError(f"optimize.oracle.command: there is no program {settings.command[0]!r}")
        return command_oracle(settings.command, settings.timeout)
    if settings.checklist is not None:
        return load_checklist(settings.checklist, key="optimize.oracle.checklist")
    if settings.url is not None and (token := os.environ.get(TOKEN)):  # a reward service: with its id and token
        return RemoteReward(
            settings.url,
            token,
            patience=Patience(settings.timeout, retries=0),
            piece=settings.batch,
            concurrency=1,
            key="optimize.oracle.url",
        )
    if settings.url is not None:
        return http_oracle(settings.url, settings.timeout)
    assert settings.name is not None, "the recipe was checked"
    return noisy(BUILT_IN[settings.name](), settings.noise, seed)


def noisy(oracle: Oracle, std: float, seed: int) -> Oracle:
    """oracle + std z; z is a standard normal that is a function of (seed, prompt, image)."""
    if not std:
        return oracle

    def noisy_oracle(images: Tensor, prompts: Sequence[str]) -> list[float]:
        keys = [
            hashlib.blake2b(f"{seed}|{prompt}".encode() + encode_png(to_pixels(image)), digest_size=16).digest()
            for image, prompt in zip(images, prompts, strict=True)
        ]
        z = [np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).standard_normal() for key in keys]
        return [float(score) + std * float(e) for score, e in zip(oracle(images, prompts), z, strict=True)]

    return noisy_oracle


def command_oracle(command: Sequence[str], timeout: float) -> Oracle:
    """A program, started once for each batch without a shell.

    It reads {"images": [paths of PNG files], "prompts": [...]} from its standard input and prints {"scores": [...]}.
    """

    def run(images: Tensor, prompts: Sequence[str]) -> Any:
        with tempfile.TemporaryDirectory(prefix="palate-oracle-") as folder:
            paths = [Path(folder) / f"{k:04d}.png" for k in range(len(images))]
            for path, image in zip(paths, images, strict=True):
                path.write_bytes(encode_png(to_pixels(image)))
            query = json.dumps({"images": [str(path) for path in paths], "prompts": list(prompts)}).encode()
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                out, err = process.communicate(query, timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"{command[0]} gave no answer in {timeout:g} s") from error
            finally:
                if process.poll() is None:  # with its children: it leads a group of its own
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
        if process.returncode:
            last = err.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise RuntimeError(": ".join([f"{command[0]} ended with status {process.returncode}", *last]))
        return _scores(out)

    return run


def http_oracle(url: str, timeout: float) -> Oracle:
    """A server: POST {"images": [PNG in base64], "prompts": [...]} as JSON; the answer is {"scores": [...]}."""
    client = JsonClient(url, None, Patience(timeout, retries=0), key="optimize.oracle.url")

    def post(images: Tensor, prompts: Sequence[str]) -> Any:
        pictures = [base64.b64encode(encode_png(to_pixels(image))).decode() for image in images]
        return _scores(client.ask({"images": pictures, "prompts": list(prompts)}))

    return post


def call_with_timeout(timeout: float, oracle: Oracle, images: Tensor, prompts: Sequence[str]) -> Any:
    """oracle(images, prompts), or TimeoutError. A Python callable that hangs is left behind in its thread."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append((oracle(images, list(prompts)), None))
        except BaseException as error:  # handed to the caller below
            found.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout + 1)  # a command or a server has its own, shorter limit
    if not found:
        raise TimeoutError(f"no answer in {timeout:g} s")
    answer, error = found[0]
    if isinstance(error, SystemExit):  # of the user's code: it must not end the run without a word
        raise RuntimeError(f"it ended itself by sys.exit({error.code!r})") from error
    if error is not None:
        raise error
    return answer


def validate_scores(answer: Any, count: int) -> list[float]:
    """The oracle's answer as `count` floats, which need not be finite. InputError if it is something else."""
    if isinstance(answer, Tensor) and answer.ndim > 1:
        raise InputError(f"expected {count} numbers, one per image, got a tensor of shape {tuple(answer.shape)}")
    if isinstance(answer, Tensor):
        answer = answer.detach().flatten().tolist()
    got = f"{type(answer).__name__} {str(answer)[:60]}"
    if isinstance(answer, (str, bytes, Mapping, Set)):  # whose letters, keys or members are no scores in order
        raise InputError(f"expected {count} numbers, one per image, got {got}")
    try:
        found = [float(score) for score in answer]
    except TypeError as error:
        raise InputError(f"expected {count} numbers, one per image, got {got}") from error
    if len(found) != count:
        raise InputError(f"expected {count} numbers, one per image, got {len(found)}")
    return found


def _scores(data: bytes) -> Any:
    if len(data) > MAX_ANSWER:
        raise InputError(f"the answer is longer than {MAX_ANSWER >> 10} KiB")
    try:
        return parse_json(data)["scores"]
    except (ValueError, KeyError, TypeError) as error:
        got = data[:60].decode("utf-8", "replace")
        raise InputError(f'expected {{"scores": [...]}} as JSON, got {got!r}') from error
