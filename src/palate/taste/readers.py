"""Votes from elsewhere: blind studies of Palate, folders of better and worse pictures, ranked folders, HPDv2,
Pick-a-Pic, plain JSON. Each reader copies the pictures into the store.

    win/ lose/       two folders; pictures of equal name are a pair, else each winner meets each loser in turn
    1/ 2/ 3/ ...     ranked folders, 1 the best: pictures of neighbouring ranks
    *.jsonl, *.json  rows {"prompt", "left": FILE, "right": FILE, "choice"}, or votes of Palate
    train.json       HPDv2;   *.parquet   Pick-a-Pic (`palate.data.preference_pairs`)
    choices          of `palate compare --blind`, with the key beside them
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from palate.data import IMAGE_ENDINGS, Pair, preference_pairs, read_rows, read_text
from palate.runtime.errors import InputError
from palate.runtime.files import file_digest, parse_json
from palate.taste.staging import bring_in, staging
from palate.taste.votes import PICTURES, Picture, Vote, VoteStore, choice_of, vote_of

LISTS = ("train.json", "votes.json")  # in a folder, as `export_votes` writes them
STUDY_KEYS = {"study", "session", "pair", "choice"}
CAPTION_LIMIT = 64 * 1024  # bytes of a picture's caption


def import_votes(
    source: str | Path,
    store: VoteStore,
    *,
    prompt: str = "",
    session: str = "",
    rater: str = "",
    key: Path | None = None,
) -> int:
    """Read the votes at `source`, whichever of the forms above it has, into the store; how many are new.

    prompt, session, rater: of votes that come without one. key: of a blind study. InputError names what cannot be
    read; no vote and no picture is stored then.
    """
    source = Path(source)
    if source.resolve() in (store.folder.resolve(), store.file.resolve()):
        raise InputError(f"{source} holds the votes that you add to; name another source, or another folder with --to")
    with staging(store) as staged:
        found = list(_read(source, staged, prompt, key))
        if not found:
            raise InputError(f"{source} holds no vote")
        named = [_named(vote, vote.session or session, vote.rater or rater) for vote in found]
        now = {old.id: new.id for old, new in zip(found, named, strict=True)}
        votes = [replace(vote, repeat_of=now.get(vote.repeat_of or "")) for vote in named]
        return bring_in(staged, store, lambda: store.extend(votes))


def _named(vote: Vote, session: str, rater: str) -> Vote:
    """The vote under an id made of what it says, so that the same import twice adds nothing."""
    text = json.dumps([vote.prompt, vote.left.file, vote.right.file, vote.choice, session, rater, vote.id])
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    tree = {**vote.__dict__, "session": session, "rater": rater, "id": name}
    return Vote(**tree)


def _read(source: Path, store: VoteStore, prompt: str, key: Path | None) -> Iterator[Vote]:
    if source.is_dir():
        if (source / "votes.jsonl").is_file():
            yield from _of_store(VoteStore(source).read(), source, store)
        elif lists := [source / name for name in LISTS if (source / name).is_file()]:
            yield from _read(lists[0], store, prompt, key)
        elif (source / "win").is_dir() and (source / "lose").is_dir():
            yield from _ranked([source / "win", source / "lose"], store, prompt)
        else:
            numbered = (path for path in source.iterdir() if path.is_dir() and path.name.isdecimal())
            ranks = sorted(numbered, key=lambda path: int(path.name))
            if len(ranks) < 2:
                raise InputError(
                    f"{source}: expected win/ and lose/, ranked folders 1/ 2/ ..., or one of votes.jsonl, "
                    f"{', '.join(LISTS)} in it"
                )
            yield from _ranked(ranks, store, prompt)
        return
    if not source.is_file():
        raise InputError(f"{source} does not exist; give a file of votes or a folder with win/ and lose/")
    if source.suffix.lower() == ".parquet":
        yield from _of_pairs(source, store)
        return
    rows = read_rows(source)
    if rows and rows[0].keys() >= STUDY_KEYS:
        yield from _of_study(source, rows, store, key)
    elif rows and "image_path" in rows[0]:
        yield from _of_pairs(source, store)
    elif rows and isinstance(rows[0].get("left"), dict):
        if source.suffix == ".jsonl":  # with votes that were cut short or taken back
            votes = VoteStore(source).read()
        else:
            votes = [vote_of(row, f"{source}, row {number}") for number, row in enumerate(rows, 1)]
        yield from _of_store(votes, source.parent, store)
    else:
        yield from _of_rows(source, rows, store, prompt)


def _of_store(votes: list[Vote], folder: Path, store: VoteStore) -> Iterator[Vote]:
    for vote in votes:
        for picture in (vote.left, vote.right):
            _kept(store, folder / PICTURES / picture.file)
        yield vote


def _of_pairs(source: Path, store: VoteStore) -> Iterator[Vote]:
    for number, pair in enumerate(preference_pairs(str(source))):
        yield _of_pair(pair, store, f"{source.name}:{number}")


def _of_pair(pair: Pair, store: VoteStore, name: str) -> Vote:
    left, right = (
        store.keep(image) if isinstance(image, bytes) else _kept(store, image) for image in (pair.first, pair.second)
    )
    choice = "tie" if pair.preference == 0.5 else "left" if pair.preference > 0.5 else "right"
    return Vote(pair.prompt, Picture(left, pair.prompt), Picture(right, pair.prompt), choice, id=name)


def _ranked(folders: list[Path], store: VoteStore, prompt: str) -> Iterator[Vote]:
    for better, worse in itertools.pairwise(folders):
        winners, losers = _pictures(better), _pictures(worse)
        by_name = {path.stem: path for path in losers}
        same = [(path, by_name[path.stem]) for path in winners if path.stem in by_name]
        if same and (alone := len(winners) + len(losers) - 2 * len(same)):
            logging.getLogger("palate").warning(
                "%s and %s: %d pictures are left out, whose names only one of them has; rename them to pairs",
                better, worse, alone,
            )  # fmt: skip
        longer = max(len(winners), len(losers))
        crossed = [(winners[i % len(winners)], losers[i % len(losers)]) for i in range(longer)]
        for number, (first, second) in enumerate(same or crossed):
            text = _caption(first) or prompt
            shown = [(first, "left"), (second, "right")]
            if number % 2:  # half of the winners on either side
                shown = [(second, "left"), (first, "right")]
            sides = {side: Picture(_kept(store, path), text) for path, side in shown}
            yield Vote(text, sides["left"], sides["right"], "right" if number % 2 else "left",
                       id=f"{better.name}/{first.name}:{worse.name}/{second.name}")  # fmt: skip


def _pictures(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    if not found:
        raise InputError(f"{folder} holds no picture ({', '.join(IMAGE_ENDINGS)})")
    return found


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    return " ".join(read_text(text, limit=CAPTION_LIMIT).split()) if text.is_file() else ""


def _of_rows(source: Path, rows: list[dict[str, Any]], store: VoteStore, prompt: str) -> Iterator[Vote]:
    for number, row in enumerate(rows, 1):
        where = f"{source}, row {number}"
        if lacking := [side for side in ("left", "right") if not isinstance(row.get(side), str)]:
            raise InputError(
                f'{where}: expected {{"prompt", "left": FILE, "right": FILE, "choice"}}; it lacks {lacking[0]}, '
                f"and has {', '.join(map(str, row))[:80] or 'nothing'}"
            )
        for name in ("prompt", "rater", "session"):
            if not isinstance(row.get(name) or "", (str, int)):
                raise InputError(f"{where}: {name} must be text, got {str(row[name])[:40]!r}")
        try:
            choice = choice_of(row.get("choice"))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        text = str(row.get("prompt") or prompt)
        files = {side: _inside(source.parent, row[side]) for side in ("left", "right")}
        left, right = (Picture(_kept(store, files[side]), text) for side in ("left", "right"))
        yield Vote(text, left, right, choice, id=str(row.get("id", number)),
                   session=str(row.get("session") or ""), rater=str(row.get("rater") or ""))  # fmt: skip


def _of_study(source: Path, rows: list[dict[str, Any]], store: VoteStore, key: Path | None) -> Iterator[Vote]:
    """The choices of `palate compare --blind`; the key says which pictures were shown where."""
    places = [key] if key else sorted(source.parent.glob("*-key.json"))
    study = None
    for path in places:
        try:
            tree = parse_json(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not the key of a blind study ({str(error)[:60]})") from error
        if isinstance(tree, dict) and tree.get("study") == rows[0]["study"]:
            study = tree
    if study is None:
        raise InputError(f"{source}: the key of its study is not beside it; name it with --key")
    try:
        pairs = {int(pair["pair"]): pair for pair in study["pairs"]}
        _ = study["runs"]["a"], study["runs"]["b"], study["folders"]["a"], study["folders"]["b"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: the key of its study is damaged; take it from a copy") from error
    for row in rows:
        pair = pairs.get(row["pair"]) if row.keys() >= STUDY_KEYS and isinstance(row["pair"], int) else None
        if pair is None or row["study"] != study["study"] or row["choice"] not in ("left", "right", "tie"):
            raise InputError(f"{source}: {str(row)[:80]} is not a choice of this study")
        run = {"left": pair["left"], "right": "b" if pair["left"] == "a" else "a"}
        sides = {}
        for side, name in run.items():
            path = Path(study["folders"][name]) / Path(pair["files"][name]).name
            if path.is_file() and file_digest(path) != pair.get("sha256", {}).get(name, file_digest(path)):
                raise InputError(f"{path} was drawn anew since the study; its choices are about pictures that are gone")
            sides[side] = Picture(_kept(store, path), pair["prompt"], seed=pair["seed"], run=study["runs"][name])
        yield Vote(pair["prompt"], sides["left"], sides["right"], row["choice"], id=f"{row['session']}:{row['pair']}",
                   session=str(row["session"]))  # fmt: skip


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name.replace("\0", "")).resolve()  # of which no file's name has any
    if not path.is_relative_to(folder.resolve()):
        raise InputError(
            f"{folder}: the picture {name!r} leaves the folder of its list; put the list beside its pictures"
        )
    return path


def _kept(store: VoteStore, path: Path) -> str:
    """The name of a picture's copy in the store. InputError names a file that cannot be read, or is no picture."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the picture {path}: {error.strerror or error}") from error
    try:
        return store.keep(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
