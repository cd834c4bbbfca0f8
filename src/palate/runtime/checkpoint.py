"""Checkpoints that are whole or absent: tensors as safetensors, the rest as JSON, a SHA-256 manifest written last.

`save` writes a hidden folder, makes every byte durable, and only then renames it to step-NNNNNN; `load` checks every
byte before anything is used; `load_newest` falls back to the newest good one. Nothing here can run code on load.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import (
    canonical_json,
    file_digest,
    parse_json,
    remove_folder,
    replace,
    sync,
    write_durably,
    write_problem,
)
from palate.runtime.tensors import as_umask_says

SCHEMA = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
ASIDE = ".tmp-aside-"  # before the name of a checkpoint whose place a new one of the same step takes
_NAME = re.compile(r"step-(\d{6,})")


class OutOfReachError(CheckpointError):
    """A checkpoint cannot be read now, for lack of a right or by an error of the disk."""


class Checkpoint(NamedTuple):
    """What `load` read, after every hash was checked."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder under `folder`, ascending. Unfinished (.tmp-*) ones do not count."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    return sorted(int(match[1]) for match in found if match)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write folder/step-NNNNNN durably. Raises CheckpointError; what was there is untouched until the end."""
    final, temporary = folder / name(step), folder / f".tmp-{name(step)}"
    plain = {key: value.detach().to("cpu").clone().contiguous() for key, value in tensors.items()}
    need = sum(value.numel() * value.element_size() for value in plain.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        temporary.mkdir()
        save_file(plain, str(temporary / TENSORS))
        as_umask_says(temporary / TENSORS)
        write_durably(temporary / STATE, canonical_json({"schema": SCHEMA, "step": step, **state}))
        sync(temporary / TENSORS)
        files = {part: file_digest(temporary / part) for part in (STATE, TENSORS)}
        write_durably(temporary / MANIFEST, canonical_json({"schema": SCHEMA, "step": step, "files": files}))
        sync(temporary)
        _put(temporary, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(write_problem(folder, need, error)) from error
    return final


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every byte verified. CheckpointError: the first problem found; InputError: the path is
    not UTF-8."""
    _require_utf8(path)
    manifest = _manifest(path)
    for part, expected in manifest["files"].items():
        try:
            got = file_digest(path / part)
        except OSError as error:
            raise _of(error, path / part) from error
        if got != expected:
            raise CheckpointError(f"{path / part}: the content does not match its SHA-256 in {MANIFEST}")
    try:
        state = parse_json((path / STATE).read_bytes())
        tensors = load_file(str(path / TENSORS))
    except OSError as error:
        raise _of(error, path / STATE) from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA or state.get("step") != manifest["step"]:
        raise CheckpointError(f"{path / STATE}: schema or step differs from {MANIFEST}")
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"{path / TENSORS}: {bad[0]} holds values that are not finite")
    return Checkpoint(manifest["step"], tensors, state)


def load_newest(folder: Path, *, warn: Callable[[str], None]) -> Checkpoint:
    """The newest good checkpoint under `folder`; `warn` gets a sentence for each one passed over.

    CheckpointError: none is good, or one cannot be read at all, which says nothing of what is in it.
    """
    found = steps(folder)
    for step in reversed(found):
        try:
            return load(folder / name(step))
        except OutOfReachError:
            raise
        except CheckpointError as error:
            warn(f"checkpoint {name(step)} is damaged and passed over: {error}")
    problem = f"all {len(found)} are damaged" if found else "there is none"
    raise CheckpointError(f"no checkpoint to continue from in {folder}: {problem}; start the run again")


def verify(path: Path) -> str | None:
    """None if the checkpoint at `path` is whole, else what is wrong with it."""
    try:
        load(path)
    except CheckpointError as error:
        return str(error)
    return None


def prune(folder: Path, *, keep: int, also: set[int]) -> None:
    """Delete all but the newest `keep` checkpoints and those at the steps `also`."""
    for step in steps(folder)[: -max(keep, 1)]:
        if step not in also:
            doomed = folder / f".tmp-pruned-{name(step)}"
            with contextlib.suppress(OSError):  # on NFS, what another process reads; a later save deletes it
                replace(folder / name(step), doomed)  # a half-deleted folder must never look like a checkpoint
                remove_folder(doomed)


def check_space(folder: Path, *, need: int) -> None:
    """CheckpointError now rather than after an hour, if `folder` cannot be written or lacks `need` bytes; InputError if
    its name is not UTF-8."""
    _require_utf8(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".tmp-probe"
        write_durably(probe, b"palate")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(write_problem(folder, need, error)) from error
    if free < need:
        raise CheckpointError(write_problem(folder, need, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))


def flatten_state(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """JSON-able copy of `tree` with its tensors moved into `tensors` under `prefix/...`.

    `unflatten_state` is the inverse. Keys of dictionaries must be strings. Tuples come back as lists.
    """
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {"__tensor__": prefix}
    if isinstance(tree, Mapping):
        if wrong := [key for key in tree if not isinstance(key, str)]:
            raise TypeError(f"{prefix}: keys of a saved state must be strings, got {wrong[0]!r}")
        return {key: flatten_state(value, f"{prefix}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [flatten_state(value, f"{prefix}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


def unflatten_state(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `flatten_state` took apart."""
    if isinstance(tree, dict):
        if set(tree) == {"__tensor__"}:
            return tensors[tree["__tensor__"]]
        return {key: unflatten_state(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [unflatten_state(value, tensors) for value in tree]
    return tree


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
        manifest = parse_json(raw)
        whole = isinstance(manifest, dict) and canonical_json(manifest) == raw
        whole = whole and set(manifest["files"]) == {STATE, TENSORS}
        known = whole and manifest["schema"] == SCHEMA
        placed = whole and path.name == name(int(manifest["step"]))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: the checkpoint was never finished") from error
    except OSError as error:
        raise _of(error, file) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: unreadable ({error})") from error
    if not whole:
        raise CheckpointError(f"{file}: not a manifest of this program")
    if not known:
        raise CheckpointError(f"{file}: schema {manifest['schema']!r}, this version reads {SCHEMA}")
    if not placed:
        raise CheckpointError(f"{file}: belongs to step {manifest['step']}, not to {path.name}")
    return manifest


def _require_utf8(path: Path) -> None:
    """InputError: safetensors would not open the path, whatever lies there."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = str(path).encode(errors="replace").decode()
        raise InputError(
            f"{shown}: a name in this path is not UTF-8, and no tensors can be kept there; rename it"
        ) from error


def set_aside(folder: Path) -> list[Path]:
    """Whole checkpoints that a save which was cut short had moved aside."""
    return sorted(folder.glob(f"{ASIDE}*"))


def settle(folder: Path) -> None:
    """Clear away what a save that was cut short has left, and put back what it had moved aside."""
    for aside in set_aside(folder):
        if not (whole := aside.with_name(aside.name.removeprefix(ASIDE))).exists():
            os.rename(aside, whole)
    for left_over in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # what another process reads cannot be deleted on NFS; a later save tries
            remove_folder(left_over) if left_over.is_dir() else left_over.unlink()


def _put(temporary: Path, final: Path) -> None:
    """Rename the finished folder to its place. A checkpoint of the same step is whole until then, aside or there."""
    aside = final.with_name(ASIDE + final.name)
    if final.is_dir():
        replace(final, aside)
    replace(temporary, final)
    with contextlib.suppress(OSError):
        remove_folder(aside)


def _of(error: OSError, path: Path) -> CheckpointError:
    """A file that is missing is damage; one that cannot be read now may be whole, and must not be passed over."""
    reason = f"{path}: {error.strerror or error}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return CheckpointError(reason)
    return OutOfReachError(
        f"{reason}. It may be whole, so it is not passed over: make it readable, or delete {path.parent} to do without"
    )
