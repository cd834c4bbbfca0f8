"""Text embeddings on disk, one safetensors file per prompt, so that the text encoders need not stay in memory.

A file's name is a hash of everything that decides its content: the encoders' and tokenizers' files, the settings, the
prompt. Prompts are encoded one at a time, so an embedding does not depend on its neighbours, to the last bit.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically
from palate.runtime.phases import tell

Encode = Callable[[str], dict[str, Tensor]]  # one prompt -> its tensors, without a batch axis


class TextReader(NamedTuple):
    """How a family reads prompts. load: (dtype, device) -> the function that encodes one prompt."""

    load: Callable[[torch.dtype, torch.device], Encode]
    count_tokens: Callable[[str], int]  # of a prompt, before any is cut off
    limit: int  # how many tokens are read
    text_tokens: int | None = None  # the recipe's, where `limit` is another number
    empty: str = ""  # the prompt of guidance's other half
    settings: str = ""  # what decides an embedding beside the files, the dtype and `limit`: a template, chosen layers


class TextCache:
    """Embeddings of prompts. The encoders are loaded when one is missing and dropped once nothing is.

    load: returns the function that encodes one prompt. key: hash of encoders, tokenizers and settings. The reader's
    `empty` is always kept.
    """

    def __init__(
        self,
        reader: TextReader,
        load: Callable[[], Encode],
        *,
        key: str,
        device: torch.device,
        folder: str | Path | None = None,
    ):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = Path(folder).expanduser() if folder is not None else cache / "palate" / "text"
        self._load, self._key, self._count = load, key, reader.count_tokens
        self.limit, self.empty, self.device = reader.limit, reader.empty, device
        self.text_tokens = reader.limit if reader.text_tokens is None else reader.text_tokens
        self._encode: Encode | None = None
        self._warned = False
        self._unwritten: dict[str, dict[str, Tensor]] = {}  # of prompts whose files another user forbids

    @property
    def loaded(self) -> bool:
        """Whether the encoders are in memory."""
        return self._encode is not None

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The prompts' tensors, stacked (B, ...), on the device."""
        found = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, tensors in found.items() if tensors is None]
        if missing:
            self._warn_of_long(missing)
            if self._encode is None:
                self._check_folder()
                self._encode = self._load()
                missing += [self.empty] if self.empty not in found and self._read(self.empty) is None else []
            found |= {prompt: self._write(prompt) for prompt in missing}
        elif self._encode is not None:
            self.free()
        rows = [tensors for prompt in prompts if (tensors := found[prompt]) is not None]
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def fill(self, prompts: Sequence[str]) -> None:
        """Encode what is missing of `prompts` and the empty one, then free the encoders. Warns once of long prompts."""
        different = list(dict.fromkeys([self.empty, *prompts]))
        self._warn_of_long(different)
        missing = [prompt for prompt in different if self._read(prompt) is None]
        if missing:
            self._check_folder()
            self._encode = self._encode or self._load()
        for done, prompt in enumerate(missing):
            tell("encoding", done, len(missing))
            self._write(prompt)
        self.free()

    def free(self) -> None:
        if self._encode is not None:
            self._encode = None
            gc.collect()  # encoders in four bits hold themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check_folder(self) -> None:
        """InputError if nothing can be written, before the encoders load."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise InputError(
                f"text embeddings cannot be written to {self.folder} ({error.strerror}); set model.text_cache to a "
                "folder that can be written to"
            ) from error

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(json.dumps([self._key, prompt]).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, prompt: str) -> dict[str, Tensor] | None:
        if prompt in self._unwritten:
            return self._unwritten[prompt]
        try:
            return load_file(self._path(prompt))
        except (OSError, SafetensorError):  # not there, cut short by a crash, or another user's: encoded again
            return None

    @torch.no_grad()
    def _write(self, prompt: str) -> dict[str, Tensor]:
        if self._encode is None:
            self._encode = self._load()
        tensors = {name: value.cpu().contiguous() for name, value in self._encode(prompt).items()}
        path = self._path(prompt)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(tensors))
        except PermissionError as error:  # a part of a shared folder that another user made
            if not self._unwritten:
                warnings.warn(
                    f"model.text_cache: {path.parent}: {error.strerror}; what cannot be kept there is kept in memory, "
                    "and encoded again by the next run",
                    stacklevel=3,
                )
            self._unwritten[prompt] = tensors
        return tensors

    def _warn_of_long(self, prompts: list[str]) -> None:
        if self._warned:
            return
        given = [prompt for prompt in prompts if prompt != self.empty]
        long = sum(self._count(prompt) > self.limit for prompt in given)
        if long:
            self._warned = True
            warnings.warn(
                f"{long} of {len(given)} prompts are longer than the {self.limit} tokens the text encoder "
                "reads; the rest of each is cut off",
                stacklevel=3,
            )
