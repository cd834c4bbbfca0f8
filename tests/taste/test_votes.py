"""taste/votes.py and readers.py: nothing is lost, every form is read, what is wrong is named."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from palate import recipe
from palate.data import preference_pairs, single_likes
from palate.recipe.identity import identity
from palate.runtime.errors import CheckpointError, InputError
from palate.taste.exported import export_votes
from palate.taste.readers import import_votes
from palate.taste.votes import Picture, Vote, VoteStore
from palate.train import read_metrics


def png(shade: int, size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def store_with(path, count=3):
    store = VoteStore(path)
    for i in range(count):
        left, right = (Picture(store.keep(png(10 * i + k)), "a fox", seed=i, steps=0) for k in (1, 2))
        store.append(Vote("fox", left, right, "left" if i % 2 else "tie", id=f"v{i}", ms=i))
    return store


def test_what_is_read_is_what_was_written(tmp_path):
    store = store_with(tmp_path)
    votes = store.read()
    assert [(v.id, v.choice, v.ms, v.left.seed, v.left.steps) for v in votes] == [
        ("v0", "tie", 0, 0, 0), ("v1", "left", 1, 1, 0), ("v2", "tie", 2, 2, 0)]  # fmt: skip
    assert store.path_of(votes[1].right).read_bytes() == png(12)


def test_undo_is_a_line_and_takes_back_the_newest_in_force(tmp_path):
    store = store_with(tmp_path)
    before = store.file.read_bytes()
    assert store.undo().id == "v2" and store.undo().id == "v1"
    assert store.file.read_bytes().startswith(before)
    assert [v.id for v in store.read()] == ["v0"]
    store.undo()
    assert store.undo() is None


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_file_cut_in_the_middle_of_a_vote_loses_that_vote_alone(tmp_path, cut):
    store = store_with(tmp_path)
    content = store.file.read_bytes()
    store.file.write_bytes(content[:-cut])
    assert [v.id for v in store.read()] == ["v0", "v1", "v2"][: 3 if cut == 1 else 2]
    store.append(Vote("fox", store.read()[0].left, store.read()[0].right, "right", id="new"))
    assert [v.id for v in store.read()][-1] == "new" and len(store.read()) >= 3


def test_pairs_asked_twice_are_known_again_after_an_import_and_a_store_is_not_added_to_itself(tmp_path):
    store = store_with(tmp_path / "a", 2)
    first = store.read()[0]
    store.append(Vote("fox", first.right, first.left, "left", id="again", repeat_of=first.id))
    other = VoteStore(tmp_path / "b")
    for _ in range(2):
        import_votes(tmp_path / "a", other)
    votes = other.read()
    assert len(votes) == 3 and [vote.repeat_of for vote in votes] == [None, None, votes[0].id]
    for same in (tmp_path / "a", store.file):
        with pytest.raises(InputError, match="votes that you add to"):
            import_votes(same, store)


def test_a_vote_may_be_cut_at_any_byte_and_written_on_after(tmp_path):
    """Also after the brace that ends a picture, where the line ends as a whole vote does."""
    store = store_with(tmp_path, 2)
    first, second = store.file.read_bytes().splitlines(keepends=True)
    for size in range(1, len(first) - 1):
        store.file.write_bytes(first[:size] + b"\n" + second)
        assert [v.id for v in store.read()] == ["v1"], first[:size]


def test_a_file_that_is_no_votes_is_told_what_to_give(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot read .*give a folder with votes\.jsonl"):
        VoteStore(tmp_path / "file").read()


def test_a_row_that_is_no_vote_is_named_with_its_line(tmp_path):
    store = store_with(tmp_path)
    with open(store.file, "a") as file:
        file.write('{"prompt": "x", "choice": "left", "left": {"file": "../../etc/passwd"}, "right": {}}\n')
    with pytest.raises(InputError, match=r"votes\.jsonl line 4"):
        store.read()


def test_the_disk_has_a_vote_before_the_next_pair_is_shown(tmp_path, monkeypatch):
    store, sizes, sync = store_with(tmp_path, 1), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size) or sync(file))
    store.append(replace(store.read()[0], id="new"))
    assert sizes == [store.file.stat().st_size]


def test_a_full_disk_is_said_and_the_votes_before_stay(tmp_path):
    store = store_with(tmp_path)
    vote, before = store.read()[0], store.file.read_bytes()
    size = store.file.stat().st_size
    child = os.fork()
    if child == 0:  # a limit on the size of files, in a process of its own
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
        try:
            store.append(vote)
        except CheckpointError as error:
            os._exit(0 if "cannot write" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.file.read_bytes() == before and len(store.read()) == 3


def test_pictures_that_are_gone_are_counted_not_fatal(tmp_path):
    store = store_with(tmp_path)
    store.path_of(store.read()[0].left).unlink()
    there, gone = store.with_pictures()
    assert (len(there), gone) == (2, 1)
    with pytest.raises(InputError, match="is gone"):
        store.path_of(store.read()[0].left)


@pytest.mark.parametrize("content", [b"", b"GIF89a", png(3)[:-30], b"<svg/>"], ids=["empty", "gif", "cut", "svg"])
def test_only_whole_pictures_are_kept(tmp_path, content):
    with pytest.raises(InputError):
        VoteStore(tmp_path).keep(content)
    assert not (tmp_path / "pictures").exists()


# ------------------------------------------------------------------------------------------------------------- readers


def folders(root, **sides):
    for name, shades in sides.items():
        (root / name).mkdir(parents=True)
        for stem, shade in shades.items():
            (root / name / f"{stem}.png").write_bytes(png(shade))


def chosen(store):
    """The bytes of the preferred and of the other picture of each vote."""
    found = []
    for vote in store.read():
        pair = [vote.left, vote.right] if vote.choice == "left" else [vote.right, vote.left]
        found.append(tuple(store.path_of(picture).read_bytes() for picture in pair))
    return found


def test_win_and_lose_pair_by_name_on_either_side(tmp_path):
    folders(tmp_path / "in", win={"a": 1, "b": 2}, lose={"a": 3, "b": 4})
    store = VoteStore(tmp_path / "votes")
    assert import_votes(tmp_path / "in", store, prompt="a fox") == 2
    assert chosen(store) == [(png(1), png(3)), (png(2), png(4))]
    assert {vote.choice for vote in store.read()} == {"left", "right"}
    assert import_votes(tmp_path / "in", store, prompt="a fox") == 0  # the same again is nothing new


def test_ranked_folders_are_votes_between_neighbours(tmp_path):
    folders(tmp_path / "in", **{"1": {"x": 1}, "2": {"y": 2}, "10": {"z": 3}})
    store = VoteStore(tmp_path / "votes")
    import_votes(tmp_path / "in", store)
    assert chosen(store) == [(png(1), png(2)), (png(2), png(3))]


def test_plain_json_and_a_path_that_leaves_its_folder(tmp_path):
    folders(tmp_path / "in", pics={"a": 1, "b": 2})
    row = {"prompt": "a fox", "left": "pics/a.png", "right": "pics/b.png", "choice": "right", "rater": "r1"}
    (tmp_path / "in" / "v.json").write_text(json.dumps([row, row | {"choice": "neither"}]))
    store = VoteStore(tmp_path / "votes")
    assert import_votes(tmp_path / "in" / "v.json", store) == 2
    assert [(v.choice, v.rater) for v in store.read()] == [("right", "r1"), ("both-bad", "r1")]
    (tmp_path / "in" / "v.json").write_text(json.dumps([row | {"left": "../../secret.png"}]))
    with pytest.raises(InputError, match="leaves the folder"):
        import_votes(tmp_path / "in" / "v.json", store)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"choice": "up"}, r"v\.json, row 2: .*got 'up'"), ({"right": 3}, r"v\.json, row 2: .*lacks right"),
     ({"left": "cut.png"}, r"cut\.png: .*damaged"), ({"left": "none.png"}, r"none\.png: No such file")],
    ids=["choice", "side", "damaged", "missing"],
)  # fmt: skip
def test_what_cannot_be_imported_is_named(tmp_path, change, said):
    folders(tmp_path / "in", pics={"a": 1, "b": 2})
    (tmp_path / "in" / "cut.png").write_bytes(png(1)[:-30])
    row = {"prompt": "a fox", "left": "pics/a.png", "right": "pics/b.png", "choice": "right"}
    (tmp_path / "in" / "v.json").write_text(json.dumps([row, row | change]))
    with pytest.raises(InputError, match=said):
        import_votes(tmp_path / "in" / "v.json", VoteStore(tmp_path / "votes"))
    assert not (tmp_path / "votes" / "votes.jsonl").exists()


def test_export_as_hpdv2_is_read_back_by_dpo_and_by_import(tmp_path):
    store = store_with(tmp_path / "votes")
    assert export_votes(store, tmp_path / "out") == 3
    pairs = list(preference_pairs(str(tmp_path / "out" / "train.json")))
    assert [pair.preference for pair in pairs] == [0.5, 1.0, 0.5]
    again = VoteStore(tmp_path / "again")
    assert import_votes(tmp_path / "out" / "train.json", again) == 3
    assert [v.choice for v in again.read()] == ["tie", "left", "tie"]
    assert import_votes(tmp_path / "out", again) == 0  # the folder says the same
    plain = VoteStore(tmp_path / "plain")
    assert export_votes(store, tmp_path / "rows", "json") == import_votes(tmp_path / "rows", plain) == 3
    first, second = ([(v.choice, v.left.file, v.right.file) for v in kept.read()] for kept in (store, plain))
    assert first == second


def test_exported_pictures_are_captioned_with_what_they_were_drawn_for(tmp_path):
    """Which may say more than the prompt that was shown."""
    store = VoteStore(tmp_path / "votes")
    left, right = Picture(store.keep(png(1)), "a 3d fox"), Picture(store.keep(png(2)))
    store.append(Vote("fox", left, right, "left"))
    export_votes(store, tmp_path / "out")
    lines = (tmp_path / "out" / "images" / "metadata.jsonl").read_text().splitlines()
    captions = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
    assert captions == {left.file: "a 3d fox", right.file: "fox"}


def test_votes_become_likes_that_kto_trains_on(tmp_path, tiny, palate):
    """The chosen picture is liked and the other one not, both bad is two dislikes, a tie is neither; and a recipe
    trains on the file, each picture on its own side, from the command line."""
    store = VoteStore(tmp_path / "votes")
    for i, choice in enumerate(("left", "both-bad", "tie", "right")):
        left, right = (Picture(store.keep(png(40 * i + 10 * k)), "a red fox") for k in (1, 2))
        store.append(Vote("a red fox", left, right, choice))
    code, out, _ = palate("votes", "export", "votes", "--out", "pairs", "--format", "likes")
    assert code == 0 and out.startswith("3 votes")
    likes = list(single_likes(str(tmp_path / "pairs" / "likes.jsonl")))
    assert [one.image.read_bytes() for one in likes] == [png(shade) for shade in (10, 20, 50, 60, 130, 140)]
    assert [one.like for one in likes] == [True, False, False, False, False, True]
    recipe_of_likes = {
        "run": {"folder": "runs/likes"}, "algorithm": {"name": "dpo", "loss": "kto", "beta": 10.0},
        "reward": {"name": "emoji"}, "prompts": {"likes": "pairs/likes.jsonl"},
        "trainer": {"steps": 2, "batch_size": 6, "preview_every": 0, "guard": {"every": 0}},
    }  # fmt: skip
    (tmp_path / "likes.yaml").write_text(json.dumps(recipe_of_likes))
    assert palate("train", "likes.yaml")[0] == 0
    steps = [row for row in read_metrics(tmp_path / "runs" / "likes" / "metrics.jsonl") if row["event"] == "step"]
    assert len(steps) == 2 and {"prefers", "excess_preferred", "excess_rejected"} <= steps[0].keys()
    parts = recipe.build(recipe.read("likes.yaml"))
    absent = parts.latents.isnan().flatten(2).all(2)
    assert absent.tolist() == [[not one.like, one.like] for one in likes] and parts.prompts == ["a red fox"] * 6
    shades = parts.latents.nan_to_num().sum(1).mean((1, 2, 3))
    assert shades.argsort().tolist() == list(range(6))
    before = identity(recipe.read("likes.yaml")), recipe.fingerprint(recipe.read("likes.yaml"))
    with (tmp_path / "pairs" / "likes.jsonl").open("a") as more:
        more.write(json.dumps({"prompt": "a red fox", "image": "images/" + likes[0].image.name, "like": True}) + "\n")
    after = identity(recipe.read("likes.yaml")), recipe.fingerprint(recipe.read("likes.yaml"))
    assert before[0]["prompts.likes"] != after[0]["prompts.likes"] and before[1] != after[1]
    for change, message in (
        ("algorithm.loss=sigmoid", "prompts.likes: algorithm.loss=sigmoid compares two pictures"),
        ("algorithm.safeguard=output", "algorithm.safeguard: output compares the two pictures"),
        ("algorithm.noise=tracked", "which likes lack"),
        ("algorithm.name=refl", "prompts.likes: refl does not read likes"),
        ("prompts.file=emoji-train", "got prompts.file and prompts.likes"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            recipe.read("likes.yaml", [change])
    store.file.write_text("".join(line for line in store.file.read_text().splitlines(True) if '"tie"' in line))
    code, _, error = palate("votes", "export", "votes", "--out", "none", "--format", "likes")
    assert code == 2 and "ties only" in error


def test_a_blind_study_is_read_through_its_key(tmp_path):
    folders(tmp_path / "runs", a={"0": 1}, b={"0": 2})
    pair = {"pair": 0, "left": "b", "prompt": "a fox", "seed": 3, "files": {"a": "0.png", "b": "0.png"}}
    places = {side: str(tmp_path / "runs" / side) for side in "ab"}
    key = {"study": "s1", "runs": {"a": "run-a", "b": "run-b"}, "folders": places, "pairs": [pair]}
    (tmp_path / "study-key.json").write_text(json.dumps(key))
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"study": "s1", "session": "me", "pair": 0, "choice": "right"}) + "\n")
    store = VoteStore(tmp_path / "votes")
    assert import_votes(choices, store) == 1
    assert chosen(store) == [(png(1), png(2))]  # left was run b, and right won: run a
    vote = store.read()[0]
    assert (vote.right.run, vote.right.seed, vote.session) == ("run-a", 3, "me")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_what_is_no_source_of_votes_is_said(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="win"):
        import_votes(tmp_path / name, VoteStore(tmp_path / "votes"))
    assert not (tmp_path / "votes").exists()


# -------------------------------------------------------------------------------------------- files that people edited


@pytest.mark.parametrize(
    ("key", "value"),
    [("ms", "fast"), ("ms", True), ("rater", ["a"]), ("rater", 5), ("session", {}), ("round", "x"), ("repeat_of", 3),
     ("id", ["x"]), ("prompt", 5), ("left.prompt", 5), ("left.model", [1]), ("right.seed", "x")],
)  # fmt: skip
def test_a_value_of_another_kind_is_named_with_its_line(tmp_path, key, value):
    """Whatever reads the votes after that may count, sort and divide them."""
    store = store_with(tmp_path, 1)
    row = json.loads(store.file.read_text())
    side, _, name = key.rpartition(".")
    (row[side] if side else row)[name] = value
    store.file.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"line 1: {name} must be"):
        store.read()
    (row[side] if side else row)[name] = None  # says nothing
    if name not in ("prompt", "id") or side:
        store.file.write_text(json.dumps(row) + "\n")
        assert len(store.read()) == 1


def test_a_list_from_another_program_is_read_as_it_is_meant(tmp_path):
    """A byte order mark, other line ends, a choice with a capital, an accent in a caption, an empty rater."""
    for shade in (1, 2):
        (tmp_path / f"{shade}.png").write_bytes(png(shade))
    rows = [f"renard é,1.png,2.png,{said},{who}" for said, who in (("Left", ""), ("both_bad", "ann"), ("Neither", ""))]
    text = "\r\n".join(["prompt,left,right,choice,rater", *rows])
    (tmp_path / "list.csv").write_bytes(text.encode("utf-8-sig"))
    store = VoteStore(tmp_path / "store")
    assert import_votes(tmp_path / "list.csv", store, rater="zoe") == 3
    votes = store.read()
    assert [vote.choice for vote in votes] == ["left", "both-bad", "both-bad"]
    assert [vote.rater for vote in votes] == ["zoe", "ann", "zoe"] and votes[0].prompt == "renard é"
    folders(tmp_path / "f", win={"a": 1}, lose={"a": 2})
    (tmp_path / "f/win/a.txt").write_bytes("﻿ein Füchschen\r\n".encode())
    captioned = VoteStore(tmp_path / "captioned")
    import_votes(tmp_path / "f", captioned)
    assert captioned.read()[0].prompt == "ein Füchschen"
    (tmp_path / "f/win/a.txt").write_bytes("Füchschen".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        import_votes(tmp_path / "f", captioned)


@pytest.mark.parametrize(
    "row", [{"prompt": ["x"]}, {"rater": ["x"]}, {"left": "\0"}, {"choice": "LEFTISH"}, {"left": ""}]
)
def test_a_row_that_says_nothing_is_named_and_no_vote_is_stored(tmp_path, row):
    (tmp_path / "1.png").write_bytes(png(1))
    good = {"prompt": "a fox", "left": "1.png", "right": "1.png", "choice": "left"}
    (tmp_path / "list.json").write_text(json.dumps([good, good | row]))
    store = VoteStore(tmp_path / "store")
    with pytest.raises(InputError, match=r"row 2|cannot read the picture"):
        import_votes(tmp_path / "list.json", store)
    assert not store.file.exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "fox " * 8000}, r"a vote takes 94 KiB, at most 64 are allowed; shorten its texts: "),
        ({"prompt": "\ud800"}, r"line 2: not JSON \(it has half of a character, .ud800\)"),
        ({"left": "\udfff.png"}, r"line 2: not JSON \(it has half of a character, .udfff\)"),
    ],
)
def test_a_text_that_no_store_could_hold_is_refused_and_the_store_is_read_as_before(tmp_path, row, said):
    """A line longer than `read` takes would have made every vote of the store unreadable."""
    store = store_with(tmp_path / "store")
    (tmp_path / "1.png").write_bytes(png(1))
    good, before = {"prompt": "a fox", "left": "1.png", "right": "1.png", "choice": "left"}, store.file.read_bytes()
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (good, good | row)))
    with pytest.raises(InputError, match=said):
        import_votes(tmp_path / "list.jsonl", store)
    assert store.file.read_bytes() == before and len(store.read()) == 3
    (tmp_path / "list.jsonl").write_text(json.dumps(good))
    with pytest.raises(InputError, match=r"a text of a vote is not UTF-8: .*caf"):
        import_votes(tmp_path / "list.jsonl", store, rater="caf\udce9")  # as Python reads such a word of a command
    assert store.file.read_bytes() == before
    with open(store.file, "a") as file:
        file.write('{"prompt": "\\ud800"}\n')
    with pytest.raises(InputError, match=r"votes.jsonl line 4: not a vote \(it has half of a character"):
        store.read()


def test_votes_of_palate_are_read_from_a_json_list_too_and_each_counts_once(tmp_path):
    store = store_with(tmp_path / "a", 2)
    rows = [json.loads(line) for line in store.file.read_text().splitlines()]
    (tmp_path / "a/all.json").write_text(json.dumps([*rows, rows[0]]))
    other = VoteStore(tmp_path / "b")
    assert import_votes(tmp_path / "a/all.json", other) == 2 == len(other.read())


def test_pictures_that_pairs_by_name_leave_out_are_counted(tmp_path, caplog):
    folders(tmp_path, win={"a": 1, "b": 2}, lose={"a": 3, "c": 4, "d": 5})
    assert import_votes(tmp_path, VoteStore(tmp_path / "store")) == 1
    assert "3 pictures are left out" in caplog.text


def test_a_file_in_the_way_is_named_and_not_the_picture(tmp_path):
    folders(tmp_path, win={"a": 1}, lose={"a": 2})
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file.*name another folder"):
        import_votes(tmp_path, VoteStore(tmp_path / "file"))


@pytest.mark.parametrize("size", [1, 4097])
def test_a_picture_that_no_page_can_show_is_refused_by_its_size(tmp_path, size):
    with pytest.raises(InputError, match=f"a picture of {size} x {size}; at"):
        VoteStore(tmp_path).keep(png(3, size))


def test_votes_that_are_left_out_of_an_export_are_counted(tmp_path, caplog):
    store = store_with(tmp_path / "a")
    store.path_of(store.read()[0].left).unlink()
    assert export_votes(store, tmp_path / "out") == 2
    assert "1 votes are left out" in caplog.text
