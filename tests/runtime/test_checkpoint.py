"""A checkpoint is whole or it is refused: every damage is found, no crash loses the one before."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import STATE, TENSORS, Killed, kill_at, write

from palate.runtime import checkpoint
from palate.runtime.errors import InputError


def test_what_is_loaded_is_bitwise_what_was_saved(tmp_path):
    saved = checkpoint.load(write(tmp_path, 5))
    assert saved.step == 5 and saved.state["algorithm"] == STATE["algorithm"]
    assert set(saved.tensors) == set(TENSORS)
    for key, value in TENSORS.items():
        assert saved.tensors[key].dtype == value.dtype and torch.equal(saved.tensors[key], value + 5)


def test_every_damaged_byte_is_found_and_the_one_before_is_used(tmp_path):
    """>= 200 mutants: flips, cuts, growth, swaps, pickles; each is refused and step 1 is loaded in its place."""
    folder = tmp_path / "checkpoints"
    write(folder, 1)
    newest = write(folder, 2)
    whole = {part.name: part.read_bytes() for part in newest.iterdir()}
    older = {part.name: part.read_bytes() for part in (folder / "step-000001").iterdir()}
    draw = random.Random(0)
    mutants: list[dict[str, bytes | None]] = []
    for name, data in whole.items():
        for _ in range(60):
            place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
            mutants.append({name: data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]})
        for _ in range(8):
            mutants.append({name: data[: draw.randrange(len(data))]})
        bomb = pickle.dumps({"__reduce__": print})
        mutants += [{name: None}, {name: data + b" "}, {name: b""}, {name: older[name]}, {name: bomb}]
    mutants.append(dict(older))  # a whole checkpoint under another step's name
    assert len(mutants) >= 200
    for mutant in mutants:
        for name, data in {**whole, **mutant}.items():
            (newest / name).unlink(missing_ok=True) if data is None else (newest / name).write_bytes(data)
        assert checkpoint.verify(newest)
        warnings: list[str] = []
        assert checkpoint.load_newest(folder, warn=warnings.append).step == 1
        assert len(warnings) == 1 and "step-000002" in warnings[0]


@pytest.mark.parametrize("content", ["nan", "pickle", "schema"])
def test_a_forged_manifest_does_not_make_bad_content_good(tmp_path, content):
    path = write(tmp_path, 3)
    if content == "nan":
        save_file({"weights/a": torch.tensor([1.0, float("nan")])}, str(path / checkpoint.TENSORS))
    elif content == "pickle":
        (path / checkpoint.TENSORS).write_bytes(pickle.dumps([1, 2]))
    schema = 0 if content == "schema" else checkpoint.SCHEMA
    files = {part: checkpoint.file_digest(path / part) for part in (checkpoint.STATE, checkpoint.TENSORS)}
    (path / checkpoint.MANIFEST).write_bytes(checkpoint.canonical_json({"schema": schema, "step": 3, "files": files}))
    assert checkpoint.verify(path)


def test_a_crash_at_any_point_of_a_save_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    """Stop before each write, fsync and rename in turn: step 1 or the finished step 2 is there, never a part."""
    points = 0
    for point in range(30):
        folder = tmp_path / str(point)
        write(folder, 1)
        with monkeypatch.context() as patch:
            left = kill_at(patch, point, ("write_durably", "sync", "replace", "save_file"))
            try:
                write(folder, 2)
            except Killed:
                points += 1
        finished = left[0] > 0
        saved = checkpoint.load_newest(folder, warn=lambda text: pytest.fail(text))
        assert saved.step == 2 if finished else saved.step in (1, 2)
        assert torch.equal(saved.tensors["ids"], TENSORS["ids"] + saved.step)
        write(folder, 2)  # and the next attempt clears what was left over
        assert checkpoint.load_newest(folder, warn=pytest.fail).step == 2
        assert not list(folder.glob(".tmp-*"))
        if finished:
            break
    assert points >= 7


def test_a_full_disk_names_path_need_and_free_and_keeps_the_last_one(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for part in ("write_durably", "sync", "save_file", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, part, full)
            with pytest.raises(checkpoint.CheckpointError, match=r"No space left.*need about.*free.*intact") as caught:
                write(tmp_path, 2)
        assert str(tmp_path) in str(caught.value)
        assert checkpoint.load_newest(tmp_path, warn=pytest.fail).step == 1
        assert not list(tmp_path.glob(".tmp-*"))
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
        checkpoint.check_space(tmp_path, need=1 << 60)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2, also={4})
    assert checkpoint.steps(tmp_path) == [4, 8, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000008", "step-000010"]


def test_a_checkpoint_that_is_being_deleted_is_none_any_more(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, step)

    def killed(path, **options):
        (path / checkpoint.MANIFEST).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, keep=2, also=set())
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_without_a_good_one_the_error_says_so(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="there is none"):
        checkpoint.load_newest(tmp_path, warn=print)
    shutil.rmtree(write(tmp_path, 1) / "..", ignore_errors=True)
    (write(tmp_path, 1) / checkpoint.STATE).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="all 1 are damaged"):
        checkpoint.load_newest(tmp_path, warn=lambda text: None)


def test_split_and_join_are_inverse():
    tree = {"a": [1, {"b": torch.arange(3)}], "c": {"d": torch.ones(2), "e": "text", "f": None}}
    tensors: dict[str, torch.Tensor] = {}
    plain = checkpoint.flatten_state(tree, "x", tensors)
    assert len(tensors) == 2 and all(key.startswith("x/") for key in tensors)
    back = checkpoint.unflatten_state(plain, tensors)
    assert back["c"]["e"] == "text" and back["a"][0] == 1 and back["c"]["f"] is None
    assert torch.equal(back["a"][1]["b"], torch.arange(3)) and torch.equal(back["c"]["d"], torch.ones(2))
    with pytest.raises(TypeError, match="must be strings"):
        checkpoint.flatten_state({1: 2}, "x", {})


def test_a_folder_whose_name_cannot_be_opened_is_not_called_damaged(tmp_path):
    """safetensors opens UTF-8 paths alone: said before a run begins, and no reason to start a whole one again."""
    write(tmp_path / "run", 1)
    odd = tmp_path / os.fsdecode(b"run\xe9")
    (tmp_path / "run").rename(odd)
    for act in (lambda: checkpoint.load_newest(odd, warn=pytest.fail), lambda: checkpoint.check_space(odd, need=1)):
        with pytest.raises(InputError, match=r"not UTF-8.*rename it"):
            act()
