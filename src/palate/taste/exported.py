"""Votes written where other programs, and recipes, read them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically
from palate.taste.votes import Vote, VoteStore


def _understood(vote: Vote, reads: Callable[[str], bool]) -> bool:
    return all(reads(text) for text in (vote.prompt, *(p.prompt or vote.prompt for p in (vote.left, vote.right))))


def export_votes(
    store: VoteStore, folder: str | Path, form: str = "hpdv2", *, reads: Callable[[str], bool] = lambda prompt: True
) -> int:
    """Write the votes with their pictures where other programs read them; how many.

    reads: whether whoever is to read them understands a prompt; votes about other prompts are left out.

    hpdv2: train.json beside its images, for `prompts.pairs` of dpo. likes: likes.jsonl, for `prompts.likes`; both
    bad is two dislikes, and ties are left out. json: rows of file names. All write images/ with the captions that
    `prompts.images` reads. InputError: another form, or no vote.
    """
    folder = Path(folder)
    if form not in ("hpdv2", "likes", "json"):
        raise InputError(f"--format: expected hpdv2, likes or json, got {form!r}")
    votes, gone = store.with_pictures()
    if gone:
        logging.getLogger("palate").warning("%s: %d votes are left out: a picture of them is gone", store.file, gone)
    if votes and not any(_understood(vote, reads) for vote in votes):
        raise InputError(f"{store.file} holds no vote about a prompt that the model reads; choose among its pictures")
    votes = [vote for vote in votes if _understood(vote, reads)]
    if form == "likes" and votes and all(vote.choice == "tie" for vote in votes):
        raise InputError(f"{store.file} holds ties only, which are neither likes nor dislikes")
    votes = [vote for vote in votes if form != "likes" or vote.choice != "tie"]
    if not votes:
        raise InputError(f"{store.file} holds no vote whose pictures are there")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for picture in {p.file: p for vote in votes for p in (vote.left, vote.right)}.values():
        (folder / "images" / picture.file).write_bytes(store.path_of(picture).read_bytes())
    captions = {p.file: p.prompt or vote.prompt for vote in votes for p in (vote.left, vote.right)}
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items()]
    write_atomically(folder / "images" / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    rows: list[dict[str, Any]] = []
    for vote in votes:
        paths = [f"images/{vote.left.file}", f"images/{vote.right.file}"]
        if form == "json":
            rows.append({"id": vote.id, "prompt": vote.prompt, "left": paths[0], "right": paths[1],
                         "choice": vote.choice, "session": vote.session, "rater": vote.rater})  # fmt: skip
        elif form == "likes":
            rows += [{"prompt": vote.prompt, "image": path, "like": vote.choice == side}
                     for path, side in zip(paths, ("left", "right"), strict=True)]  # fmt: skip
        else:
            share = {1.0: [1, 0], 0.0: [0, 1], 0.5: [0, 0]}[vote.outcome]
            rows.append({"prompt": vote.prompt, "image_path": paths, "human_preference": share})
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    if form == "likes":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    name = {"hpdv2": "train.json", "likes": "likes.jsonl", "json": "votes.json"}[form]
    write_atomically(folder / name, (text + "\n").encode())  # last, and whole: a run may be reading the one before
    return len(votes)
