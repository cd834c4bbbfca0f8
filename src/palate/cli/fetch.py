"""`palate fetch`: the weights of a published reward, downloaded once and converted where they are a pickle."""

from __future__ import annotations

import contextlib
import os
import shutil
import urllib.request
import warnings
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from palate.data.published import PROMPT_SETS, beside_the_cache
from palate.rewards.published import PUBLISHED, Download, PublishedReward
from palate.runtime.errors import InputError, first_line
from palate.runtime.hub import UNREACHED, hub_file
from palate.runtime.tensors import writing_tensors


def fetch(name: str, out: Path, source: Path | None = None) -> str:
    """Everything that the reward needs, in the hub's cache and, converted or local, in out/NAME. Returns the value of
    reward.source.NAME, "" where the recipe needs none. `source`: weights that are already here, to convert alone.

    InputError: an unknown name, a download that fails, a file that is no plain checkpoint."""
    if name in PROMPT_SETS:
        raise InputError(
            f"--from converts the weights of a reward, and {name} is a set of prompts; give your copy to {_use(name)}"
        )
    if name not in PUBLISHED:
        raise InputError(f"fetch: got {name!r}; expected one of {', '.join(sorted({*PUBLISHED, *PROMPT_SETS}))}")
    reward = PUBLISHED[name]
    if source is None:
        files = download(reward.weights, name)
        for extra in reward.extra:
            download(extra, name)
    else:
        if not _takes_file(name):
            raise InputError(
                f"--from: nothing of {name} is converted; give a folder with {', '.join(reward.weights.files[:2])} and "
                f"the tokenizer to the recipe as reward.source.{name}=FOLDER"
            )
        if not source.is_file():
            raise InputError(f"--from: {source} does not exist; give the downloaded {reward.weights.files[0]}")
        if reward.converted is None and source.suffix != ".safetensors":
            raise InputError(f"--from: {source} is no .safetensors; give the downloaded {reward.weights.files[0]}")
        files = [source]
    if reward.converted is not None:
        target = out / name / reward.converted
        if source is not None or not target.is_file() or target.stat().st_mtime < files[0].stat().st_mtime:
            convert(files[0], target)  # a file that was named is meant, however old it is
        return str(target)
    if name == "hpsv3":
        return str(_together(reward, files[0], out / name))
    return ""


def fetch_prompts(name: str) -> list[Path]:
    """The files of a prompt set, in the hub's cache or beside it. InputError: it may not be fetched, or cannot be."""
    known = PROMPT_SETS[name]
    if not known.place:
        raise InputError(
            f"fetch {name}: the licence of {known.title} is {known.licence}, so Palate does not fetch it; give your "
            f"own copy to {_use(name)}"
        )
    if known.place.startswith("https://"):
        return [_download_address(known.place, name, f"Download it elsewhere and give it to {_use(name)}")]
    try:
        return [hub_file(known.place, file, repo_type="dataset") for file in known.files]
    except UNREACHED as error:
        raise InputError(
            f"fetch {name}: {known.place} cannot be reached ({first_line(error)}). Download its files elsewhere and "
            f"give their folder with --prompts-file: {', '.join(known.files)}"
        ) from error


def download(what: Download, name: str) -> list[Path]:
    """The files' places on this machine; files that a repository lacks are left out but for the weights."""
    if what.place.startswith("https://"):
        remedy = f"Download it elsewhere, copy it here, then palate fetch {name} --from FILE"
        return [_download_address(what.place, name, remedy)]
    found = []
    for file in what.files:
        try:
            found.append(hub_file(what.place, file))
        except GatedRepoError as error:
            raise InputError(
                f"fetch {name}: {what.place} is gated; accept its terms at https://huggingface.co/{what.place}, then "
                "hf auth login"
            ) from error
        except LocalEntryNotFoundError as error:
            raise InputError(_unreachable(name, what, error)) from error
        except EntryNotFoundError as error:
            if file.endswith((".safetensors", ".pt")):
                raise InputError(f"fetch {name}: {what.place} has no {file} any more; see docs/rewards.md") from error
            continue  # a tokenizer in one form is enough
        except UNREACHED as error:
            raise InputError(_unreachable(name, what, error)) from error
    return found


def _takes_file(name: str) -> bool:
    """Whether --from can make the reward ready: its weights are converted, or linked beside what they need."""
    return PUBLISHED[name].converted is not None or name == "hpsv3"


def _use(name: str) -> str:
    return f"palate evaluate RUN --protocol {name} --prompts-file FILE"


def _unreachable(name: str, what: Download, error: Exception) -> str:
    steps = f"hf download {what.place} {' '.join(what.files)}"
    cached = f"models--{what.place.replace('/', '--')}"
    then = f"copy {cached} of its hub cache into {HF_HUB_CACHE} here"
    if what == PUBLISHED[name].weights and _takes_file(name):
        then = f"copy the file here, then palate fetch {name} --from FILE"
    return f"fetch {name}: {what.place} cannot be reached ({first_line(error)}). Where it can: {steps}; {then}"


def _download_address(address: str, name: str, remedy: str) -> Path:
    target = beside_the_cache(address)
    if target.is_file():
        return target
    with _beside(target) as part, open(part, "wb") as file:
        for chunk in _received(address, f"fetch {name}: {address} cannot be reached", remedy):
            file.write(chunk)
    return target


def _received(address: str, refusal: str, remedy: str) -> Iterator[bytes]:
    """What lies at an address, in parts. InputError: it is not there, or the connection broke off."""
    try:
        with urllib.request.urlopen(address) as answer:
            while chunk := answer.read(1 << 20):
                yield chunk
            if answer.length:  # what is left of the length that was promised; reading it to its end raises nothing
                raise OSError(f"the connection broke off, {answer.length} bytes before the end")
    except (OSError, HTTPException) as error:
        raise InputError(f"{refusal} ({error}). {remedy}") from error


def convert(source: Path, target: Path) -> None:
    """A pickled checkpoint as safetensors; only tensors are read, no code in it can run. InputError where the file
    holds anything but tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols
            state = torch.load(source, "cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a file of anything, the reader's stack may fail in any way
        raise InputError(
            f"{source} is no checkpoint of plain tensors, or its download is incomplete; fetch it again. It was not run"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    tensors = {key: value.clone().contiguous() for key, value in state.items() if isinstance(value, Tensor)} \
        if isinstance(state, dict) else {}  # fmt: skip
    if not tensors:
        raise InputError(f"{source} holds no named tensors; is it {target.stem} as its authors publish it?")
    with _beside(target) as part, writing_tensors(part):
        save_file(tensors, part)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary name that takes the place of `target` when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _together(reward: PublishedReward, weights: Path, folder: Path) -> Path:
    """Weights, configuration and tokenizer in one folder, as hpsv3 reads them; the weights are linked, not copied."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [weights, *(file for extra in reward.extra for file in download(extra, "hpsv3"))]:
        target = folder / path.name
        if target.exists():
            continue
        if path.suffix == ".safetensors":
            target.symlink_to(path.resolve())
        else:
            shutil.copyfile(path, target)
    return folder
