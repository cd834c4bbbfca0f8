"""A blind study: people choose between two runs' pictures without knowing whose they are; from it, the win rate.

The page holds everything it needs and sends nothing: choices are downloaded from it as JSONL. Which run is on which
side is in the key alone; sides and order come from a secret seed, and pictures are encoded anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.evaluate import read_index
from palate.evaluate.intervals import MANY_PEOPLE, win_rate_interval
from palate.report.html import render
from palate.report.pictures import picture, preview_folders
from palate.runs.comparison import common_rows, common_to_all
from palate.runs.stored import run_names
from palate.runtime.errors import InputError
from palate.runtime.files import file_digest, parse_json, split_lines, write_atomically
from palate.runtime.progress import counted

CHOICES = ("left", "right", "tie")


def write_study(
    run_a: str | Path, run_b: str | Path, *, page: str | Path | None = None, count: int = 40, seed: int | None = None
) -> tuple[Path, Path]:
    """Write the page (None = compare-blind.html in run_a) and beside it its key, *-key.json; return both paths.

    Shown are the images of the evaluations that have the most prompts and seeds in common, else those of the last
    previews: at most `count` pairs, drawn at random. `seed` fixes the draw; None = a secret one. InputError when the
    runs share no prompt and seed, a picture cannot be read, or a key is there already, without which its page's
    choices could not be read.
    """
    runs = {"a": Path(run_a), "b": Path(run_b)}
    names = run_names(list(runs.values()))
    page = runs["a"] / "compare-blind.html" if page is None else Path(page)
    key_path = page.with_name(f"{page.stem}-key.json")
    if key_path.exists():
        raise InputError(
            f"{key_path} is there already and reads the choices of its page; move both, or name another page with --out"
        )
    folders = _folders(runs)
    rows = {side: read_index(folder) for side, folder in folders.items()}
    shared = common_to_all([rows["a"], rows["b"]], names)
    rows = {side: [rows[side][each[place]] for each in shared] for place, side in enumerate("ab")}
    seed = secrets.randbits(128) if seed is None else seed
    order = sorted(range(len(rows["a"])), key=lambda i: _draw(seed, "order", i))[:count]
    pairs, shown = [], []
    for number, i in enumerate(order):
        left, right = ("a", "b") if _draw(seed, "side", i)[0] % 2 else ("b", "a")
        row = rows["a"][i]
        both = {"left": picture(folders[left] / rows[left][i]["file"]),
                "right": picture(folders[right] / rows[right][i]["file"])}  # fmt: skip
        pairs.append({"pair": number, "left": left, "prompt": row["prompt"], "seed": row["seed"], "files": {
            side: rows[side][i]["file"] for side in folders}, "sha256": {
            side: file_digest(folders[side] / rows[side][i]["file"]) for side in folders}})  # fmt: skip
        shown.append({"prompt": row["prompt"], **both})
    study = _draw(seed, "study", 0).hex()[:16]
    text = render("study.html", styles=("style.css", "study.css"), script="study.js", title="Which is better?",
                  study=study, pairs=shown)  # fmt: skip
    key = {"study": study, "seed": seed, "runs": dict(zip("ab", names, strict=True)), "pairs": pairs,
           "folders": {side: str(folder) for side, folder in folders.items()}}  # fmt: skip
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page, text.encode())  # first: a key without its page would stand in the way of the next try
    write_atomically(key_path, (json.dumps(key, indent=1, sort_keys=True) + "\n").encode())
    return page, key_path


def _folders(runs: dict[str, Path]) -> dict[str, Path]:
    """Where each side's pictures lie: the two evaluations that share most rows, the newest first; else the previews."""
    judged = {
        side: [folder for folder in (run / "evaluation/result", *sorted(run.glob("evaluations/*/evaluation/result")))
               if (folder / "index.jsonl").is_file()]
        for side, run in runs.items()
    }  # fmt: skip
    rows = {folder: read_index(folder) for found in judged.values() for folder in found}
    couples = [(a, b) for a in judged["a"] for b in judged["b"]]
    shared = {couple: len(common_rows(rows[couple[0]], rows[couple[1]])) for couple in couples}
    best = max(couples, key=lambda couple: shared[couple]) if couples else None
    previews = {side: preview_folders(run)[-1:] for side, run in runs.items()}
    if best is not None and (shared[best] or not all(previews.values())):
        return dict(zip("ab", best, strict=True))
    for side, run in runs.items():
        if not previews[side]:
            raise InputError(
                f"{run} has no pictures that {runs['b' if side == 'a' else 'a']} has too; run palate evaluate on both"
            )
    return {side: found[0] for side, found in previews.items()}


def _draw(seed: int, purpose: str, i: int) -> bytes:
    return hashlib.blake2b(f"{seed}|{purpose}|{i}".encode(), digest_size=16).digest()


# --- the result -----------------------------------------------------------------------------------------------------


def read_choices(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The rows of one or more downloaded files, {"study", "session", "pair", "choice"}; a row that comes twice counts
    once. InputError names the file and line of a row that is not a choice, or that contradicts an earlier one."""
    seen: dict[tuple[str, str, int], dict[str, Any]] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise InputError(f"{path} does not exist; expected the file that the page's download button saves")
        for number, line in enumerate(split_lines(path.read_bytes().decode("utf-8-sig", "replace")), 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = parse_json(line)
                mark = (str(row["study"]), str(row["session"]), row["pair"])
                good = row["choice"] in CHOICES and type(row["pair"]) is int
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f'{where}: expected {{"study", "session", "pair", "choice"}}; got {line[:80]!r}'
                ) from error
            if not good:
                raise InputError(
                    f"{where}: choice must be one of {', '.join(CHOICES)} and pair a number; got {line[:80]!r}"
                )
            if mark in seen and seen[mark]["choice"] != row["choice"]:
                raise InputError(
                    f"{where}: pair {row['pair']} of session {mark[1]} was {seen[mark]['choice']!r} before and is "
                    f"{row['choice']!r} here; give one file a session, the last one"
                )
            seen[mark] = row
    if not seen:
        raise InputError(f"{paths[0]} holds no choice; make some on the page and download them")
    return list(seen.values())


def find_key(
    choices: Sequence[str | Path], key: str | Path | None = None, run: str | Path | None = None
) -> dict[str, Any]:
    """The key of the study that the first choice belongs to: `key`, or the *-key.json with its name among those beside
    the choices, in `run` and in the folders of runs/. InputError where there is none."""
    if key is not None:
        return _read_key(Path(key))
    study = read_choices(choices[:1])[0]["study"]
    places = [Path(choices[0]).parent, *([Path(run)] if run else []), *sorted(Path("runs").glob("*/"))]
    for path in [path for place in places for path in sorted(place.glob("*-key.json"))]:
        with contextlib.suppress(InputError):  # a broken key of another study
            found = _read_key(path)
            if found["study"] == study:
                return found
    raise InputError(
        f"the key of study {str(study)[:40]!r} is not in {', '.join(map(str, places[:3]))}; name it with --key"
    )


def _read_key(path: Path) -> dict[str, Any]:
    try:
        key = parse_json(path.read_text(encoding="utf-8"))
        _ = key["study"], key["runs"]["a"], key["runs"]["b"], [pair["left"] for pair in key["pairs"]]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give the key that was written with the page") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{path} is not the key of a blind study; give the *-key.json that was written with the page"
        ) from error
    return key


def score(choices: Sequence[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any]:
    """How often run a was preferred: {"wins": {"a", "b"}, "ties", "choices", "sessions", "win_rate", "low", "high"} and
    the same among the choices that were not ties ("decided", None when all were).

    A tie counts as half a win for each. The 95 % intervals are those of `evaluate.intervals.win_rate_interval`, grouped
    by prompt and by session: several choices on one prompt, or by one person, say less than as many on different ones.
    """
    wins, ties = {"a": 0, "b": 0}, 0
    scores, prompts, people = [], [], []
    for row in choices:
        if row["study"] != key["study"]:
            raise InputError(
                f"a choice is of study {str(row['study'])[:40]!r}, the key of {key['study']!r}; "
                "score one study at a time"
            )
        if not 0 <= row["pair"] < len(key["pairs"]):
            raise InputError(f"a choice is of pair {row['pair']}; this study has pairs 0 to {len(key['pairs']) - 1}")
        left = key["pairs"][row["pair"]]["left"]
        winner = None if row["choice"] == "tie" else left if row["choice"] == "left" else "ab".replace(left, "")
        prompts.append(key["pairs"][row["pair"]].get("prompt", row["pair"]))
        people.append(str(row["session"]))
        scores.append(0.5 if winner is None else float(winner == "a"))
        if winner is None:
            ties += 1
        else:
            wins[winner] += 1
    rows = list(zip(scores, prompts, people, strict=True))
    decided = [row for row in rows if row[0] != 0.5]
    return {
        "runs": key["runs"],
        "wins": wins,
        "ties": ties,
        "choices": len(choices),
        "sessions": len(set(people)),
        **_rate(*zip(*rows, strict=True)),
        "decided": _rate(*zip(*decided, strict=True)) if decided else None,
    }


def _rate(scores: Sequence[float], prompts: Sequence[str | int], people: Sequence[str]) -> dict[str, float]:
    low, high = win_rate_interval(scores, prompts, people)
    return {"win_rate": sum(scores) / len(scores), "low": low, "high": high}


def text_of(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    a, b = result["runs"]["a"], result["runs"]["b"]
    lead = a if result["low"] > 0.5 else b if result["high"] < 0.5 else None
    wins = [f"{name}: {counted(result['wins'][side], 'win')}" for side, name in (("a", a), ("b", b))]
    made = ", ".join(counted(result[kind + "s"], kind) for kind in ("choice", "session"))
    lines = [
        f"{', '.join(wins)}, {counted(result['ties'], 'tie')} ({made})",
        f"win rate of {a}: {result['win_rate']:.3f}, 95 % interval {result['low']:.3f} to {result['high']:.3f} "
        "(a tie is half a win)",
    ]
    if rate := result["decided"]:
        lines.append(f"without ties: {rate['win_rate']:.3f}, {rate['low']:.3f} to {rate['high']:.3f}")
    whose = "" if result["sessions"] >= MANY_PEOPLE else f" by {'this person' if result['sessions'] == 1 else 'these'}"
    return "\n".join(
        [*lines, f"{lead} is preferred{whose}" if lead else "no preference is shown: the interval holds one half"]
    )
