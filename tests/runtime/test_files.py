"""Files of a run: lines, JSON lines, folders that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import signal
import stat
import threading
from pathlib import Path

import pytest

import palate
from palate.cli.app import exit_code_of
from palate.data import captioned_images, read_prompts
from palate.evaluate import read_index
from palate.export import load_one_step
from palate.models.lora import Rates
from palate.optimize.queries import Queries
from palate.recipe.identity import changes
from palate.report.curves import read_json
from palate.report.study import find_key, read_choices
from palate.rewards.answers import Answers
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import (
    append,
    file_digest,
    folder_size,
    in_shell,
    json_line,
    new_folder,
    parse_json,
    read_json_lines,
    replace,
    split_lines,
    with_remedy,
    write_atomically,
    write_durably,
    write_file,
    write_problem,
)
from palate.runtime.result import evaluation_of
from palate.runtime.runlog import RunLog, read_metrics
from palate.train.steering import parse_control


def choice_beside(path):
    choices = path.with_name("choices.jsonl")
    choices.write_text('{"study": "s", "session": "1", "pair": 0, "choice": "left"}\n')
    return choices


@pytest.mark.parametrize("text", [b"[" * 100_000, b"1" * 5_000, b"[1, 2]"])
def test_such_words_for_a_run_are_refused_and_do_not_end_it(text):
    with pytest.raises(ValueError):
        parse_control(text)


READERS = {  # of files that a run, a person or a server writes
    "index.jsonl": lambda path: read_index(path.parent),
    "metrics.jsonl": read_metrics,
    "evaluation.json": lambda path: evaluation_of(path.parent),
    "checklist.json": read_json,
    "choices.jsonl": lambda path: read_choices([path]),
    "study-key.json": lambda path: find_key([choice_beside(path)], path),
    "metadata.jsonl": lambda path: captioned_images(path.parent),
    "prompts.jsonl": lambda path: read_prompts(str(path)),
    "prompts.json": lambda path: read_prompts(str(path)),
    "answers.jsonl": Answers,
    "queries.jsonl": lambda path: Queries(path.parent),
    "adapter_config.json": lambda path: Rates({}, path.with_name("adapter.safetensors")),
    "identity.json": lambda path: changes(path.parent, None),
    "generator.json": lambda path: load_one_step(path.parent),
}


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, "[1, 2]"], ids=["deep", "long number", "list"])
@pytest.mark.parametrize("name", READERS)
def test_json_that_python_cannot_read_is_a_sentence_about_its_file(tmp_path, name, text):
    (tmp_path / "picture.png").touch()
    (tmp_path / name).write_text(text + "\n\n")
    with pytest.raises(InputError, match=name):
        READERS[name](tmp_path / name)


def test_half_of_a_character_is_no_text():
    """What has it can be read, and then neither printed nor written."""
    for text in ('{"a": ["\\ud83d "]}', b'{"\\uDE00": 1}'):
        with pytest.raises(ValueError, match=r"it has half of a character, .u(d83d|de00)"):
            parse_json(text)
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600" and parse_json(r'"\\ud800"') == r"\ud800"


ODD = "a\u2028b\u0085c\x0cd\x1ce"


def test_only_line_ends_end_a_line():
    assert split_lines("a\nb\r\nc\rd") == ["a", "b", "c", "d"]
    assert split_lines(f"{ODD}\n\n") == [ODD, ""] and split_lines("") == []


def test_json_lines_keep_every_character(tmp_path):
    path = tmp_path / "rows.jsonl"
    raw = "a\u2028b\u0085c"
    path.write_bytes(json_line({"prompt": ODD}) + f'{{"prompt": "{raw}"}}\n\n'.encode())
    assert [number for number, _ in read_json_lines(path)] == [1, 2]
    assert [row["prompt"] for _, row in read_json_lines(path)] == [ODD, raw]
    path.write_bytes(b'{"a": 1}\n{"a"')
    assert read_json_lines(path, cut_short=True) == [(1, {"a": 1})]
    with pytest.raises(InputError, match="line 2"):
        read_json_lines(path)
    path.write_bytes(b"{\n{}\n")
    with pytest.raises(InputError, match="line 1"):
        read_json_lines(path, cut_short=True)


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    for text in ("old", "new"):
        with new_folder(tmp_path / "x") as folder:
            (folder / "f").write_text(text)
    with pytest.raises(KeyError), new_folder(tmp_path / "x") as folder:
        (folder / "f").write_text("broken")
        raise KeyError
    assert (tmp_path / "x/f").read_text() == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_the_disk_has_a_file_before_it_takes_its_name_and_the_name_before_it_is_done(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, os.replace

    def synced(file):
        found = os.fstat(file)
        events.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)
        return sync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: events.append("named") or rename(old, new))
    write_atomically(tmp_path / "a", b"12345")
    assert events == [5, "named", "folder"]


def test_a_digest_is_that_of_the_bytes(tmp_path):
    write_atomically(tmp_path / "f", b"palate" * 1000)
    assert file_digest(tmp_path / "f") == hashlib.sha256(b"palate" * 1000).hexdigest()


def test_a_log_appends_rows_and_writes_no_nan(tmp_path):
    for step in (1, 2):
        with RunLog(tmp_path) as log:
            log.write({"step": step, "event": "step", "loss": float("nan")})
            log.sync()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": s, "event": "step", "loss": "nan"} for s in (1, 2)]
    with RunLog(tmp_path / "nowhere", writes=False) as log:
        log.write({"step": 1})
        log.sync()
    assert not (tmp_path / "nowhere").exists()


def test_a_full_disk_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with RunLog(tmp_path) as log, pytest.raises(CheckpointError, match="MiB"):
        log.write({"step": 1})


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(28, "Free some space"), (30, "read-only"), (13, "permissions"), (17, "in the way"), (20, "where a folder is"),
     (2, "moved or deleted"), (5, "health"), (36, "shorter"), (99, "another place")],
)  # fmt: skip
def test_the_remedy_of_a_write_error_fits_the_error(tmp_path, number, remedy):
    text = write_problem(tmp_path, 1, OSError(number, os.strerror(number)))
    assert remedy in text and str(tmp_path) in text and ("Free some space" in text) == (number == 28)


def test_a_full_disk_met_anywhere_has_the_remedy(tmp_path, capsys):
    """A preview, a grid, an export: what is no checkpoint raises the plain error, which the command line explains."""
    full = OSError(28, os.strerror(28), str(tmp_path / "samples" / ".tmp-step-000010"))
    assert exit_code_of(full) == CheckpointError.exit_code
    said = capsys.readouterr().err
    assert "Free some space" in said and "samples" in said and "need about" not in said
    for write in (write_file, write_durably, append):  # write(2) tells no name: the error gets it
        with pytest.raises(OSError, match="/dev/full") as full:
            write(Path("/dev/full"), b"x" * 9999)
        assert exit_code_of(full.value) == CheckpointError.exit_code
        assert "cannot write /dev/full" in (said := capsys.readouterr().err) and "Free some space" in said
    assert "a disk is full: free some space" in with_remedy(OSError(28, os.strerror(28)))
    other = OSError(2, os.strerror(2), "gone.txt")
    assert exit_code_of(other) == CheckpointError.exit_code and "Free" not in capsys.readouterr().err


def test_a_row_for_which_there_is_no_room_is_taken_back(tmp_path):
    """A raw write that fits in part raises nothing, and the next row would go on in the middle of this one."""
    path = tmp_path / "rows.jsonl"
    append(path, b"one\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))
    try:
        with pytest.raises(OSError, match=r"rows.jsonl"):
            append(path, b"two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    append(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"


def test_no_file_is_cut_at_the_separators_inside_a_prompt():
    """`str.splitlines` also cuts at U+2028, U+0085 and form feeds; files are read by `split_lines`."""
    read = re.compile(r"read_text\([^()]*\)\.splitlines|read_bytes\(\)\.decode\([^()]*\)\.splitlines")
    files = sorted(Path(palate.__file__).parent.rglob("*.py"))
    assert len(files) > 150 and read.search('path.read_text("utf-8").splitlines()')
    assert [file.name for file in files if read.search(file.read_text("utf-8"))] == []


def test_two_writers_of_one_file_leave_the_content_of_one_of_them_whole(tmp_path):
    errors = []

    def write(letter):
        try:
            for _ in range(50):
                write_atomically(tmp_path / "file", letter * 100_000)
                assert (tmp_path / "file").read_bytes() in (b"a" * 100_000, b"b" * 100_000)
        except (OSError, AssertionError) as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_never_replaced_by_a_file(tmp_path):
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/result").write_text("weeks of work")
    with pytest.raises(InputError, match="is a folder, where a file is to be written"):
        write_atomically(tmp_path / "runs", b"<html>")
    assert (tmp_path / "runs/mine/result").read_text() == "weeks of work"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("path", ["file/below", "folder", "x" * 300])
def test_a_path_that_cannot_be_used_is_named_with_its_remedy(tmp_path, path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        (tmp_path / path).write_text("")
    assert exit_code_of(caught.value) == 4
    said = capsys.readouterr().err
    assert path[:40] in said and "name a" in said and "Errno" not in said


def test_the_size_of_a_folder_that_changes_meanwhile_is_no_error(tmp_path, monkeypatch):
    """A run that trains renames and deletes checkpoints under whoever lists it."""
    for name in ("a", "b/c", "b/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    assert folder_size(tmp_path) == 15
    plain = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: plain(path if not str(path).endswith("c") else "gone"))
    assert folder_size(tmp_path) == 10
    assert folder_size(tmp_path / "never") == 0


def test_commands_to_copy_take_any_path():
    """Every command that a message offers names its run as a shell reads it."""
    assert in_shell(Path("runs/a b")) == "'runs/a b'" and in_shell("runs/mine") == "runs/mine"
    verbs = "resume|evaluate|train|report|export|replay|optimize"
    offered = re.compile(rf"palate (?:{verbs}) \{{(?!in_shell|printable\(in_shell|' ')")
    files = Path(palate.__file__).parent.rglob("*.py")
    found = [str(path) for path in files if offered.search(path.read_text("utf-8"))]
    assert found == []


def test_an_error_of_a_write_names_the_file_and_not_its_temporary_one(tmp_path):
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "none" / "mine.yaml", b"")
    said = with_remedy(caught.value)
    assert said.startswith(f"{tmp_path / 'none' / 'mine.yaml'}: No such file") and "make the folder" in said


def test_a_folder_that_cannot_be_deleted_is_named_whole(tmp_path, monkeypatch):
    """Python 3.11 names a file by its last part alone: "0000.png: Read-only file system"."""

    def refuse(folder):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "0000.png")

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(OSError) as caught:
        replace(tmp_path / "new", tmp_path)
    assert with_remedy(caught.value).startswith(f"{tmp_path}: Read-only file system. The disk is mounted read-only")


def test_a_new_folder_that_cannot_be_filled_is_named_and_not_its_temporary_one(tmp_path):
    with pytest.raises(OSError) as caught, new_folder(tmp_path / "merged") as temporary:
        (temporary / "none" / "file").write_bytes(b"")
    assert caught.value.filename == str(tmp_path / "merged" / "none" / "file")
