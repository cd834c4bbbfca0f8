"""Rows: what was measured, a file each, made once and of one model.

A row is a JSON file in RESULTS with three things: the arguments that made it, what they were applied to, and what was
found. It is not made again, so a command goes on where it was cut off; a row is written whole or not at all.

Rows of one model never meet those of another: a row keeps the digest of the weights that drew and judged, and one whose
weights are not those of the package is taken for missing. So a new embedded model needs no tidying up: its rows are
made in the places of the old ones. Other arguments, or another recipe, are refused: whoever changes a setting deletes
the rows that it changes, or names other --results.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch

ASSETS = Path(str(files("palate") / "assets"))
MODEL = ("emoji", "judge", "reward-emoji", "reward-heldout", "prompts")  # what every row is drawn and judged with
TUNED = "tuned.json"
MARK = "<!-- of the embedded model {} -->"  # the first line of a table
BEGAN = time.perf_counter()  # of the command


class Row(NamedTuple):
    """What belongs into the file: make(*arguments), a function of a module, of values that can be sent to a process.

    beside: folders, of the package or by path, whose weights it needs besides the model's. recipe: the fingerprint of
    what is trained; "" where the arguments say it all.
    """

    path: Path
    make: Callable[..., Any]
    arguments: tuple = ()
    beside: tuple[str, ...] = ()
    recipe: str = ""

    @property
    def of(self) -> dict[str, str]:
        """What the row is of: digests by name."""
        told = {"model": digest(*MODEL), **{name: digest(name) for name in self.beside}}
        return told | ({"recipe": self.recipe} if self.recipe else {})


@cache
def digest(*names: str) -> str:
    """16 digits of SHA-256 over the weights and the prompts for evaluation in these folders of the package, or in
    folders by path."""
    found = hashlib.sha256()
    for name in names:
        folder = ASSETS / name if (ASSETS / name).is_dir() else Path(name)
        for path in sorted(
            [*folder.rglob("*.safetensors"), *folder.glob("emoji-eval.txt"), *folder.glob("*styled.txt")]
        ):
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def content(path: Path) -> dict[str, Any] | None:
    """What the file of a row holds; None where there is none, or where it is of other weights than those here."""
    if not path.is_file():
        return None
    held = json.loads(path.read_text())
    of = held.get("of", {})
    ours = "model" in of and all(of[name] == digest(*(MODEL if name == "model" else (name,)))
                                 for name in of if name != "recipe")  # fmt: skip
    return held if ours else None


def made(path: Path) -> Any:
    """What was found, whatever made it. ValueError: the row is of another model."""
    held = content(path)
    if held is None:
        raise ValueError(f"{path} is no row of the model in the package; its command makes it again")
    return held["made"]


def made_in(results: Path, pattern: str) -> Iterator[tuple[Path, Any]]:
    """Every row of this model whose file's name matches, and what was found, by name."""
    for path in sorted(results.glob(pattern)):
        held = content(path)
        if held is not None:
            yield path, held["made"]


def of_others(results: Path) -> list[Path]:
    """The rows that are of another model than the package's."""
    rows = (path for path in sorted(results.glob("*.json")) if '"arguments"' in path.read_text()[:40])
    return [path for path in rows if content(path) is None]


def is_made(row: Row) -> bool:
    """Whether the file holds just this row: of this model, by these arguments, from this recipe."""
    held = content(row.path)
    return held is not None and held["arguments"] == _plain(row.arguments) and _same_recipe(held, row)


def stored(row: Row) -> Any:
    """What the file holds, made and written first, whole or not at all, if there is none of this model."""
    held = content(row.path)
    if held is None:
        held = keep(row.path, row.make(*row.arguments), _plain(row.arguments), row.of)
    if held["arguments"] != _plain(row.arguments):
        raise ValueError(
            f"{row.path} was made with {held['arguments']}, not with {_plain(row.arguments)}; delete it, or name other "
            "--results"
        )
    if not _same_recipe(held, row):
        raise ValueError(f"{row.path} was made from a recipe with other settings; delete it, or name other --results")
    return held["made"]


def _plain(arguments: Sequence[Any]) -> Any:
    return json.loads(json.dumps(arguments))


def _same_recipe(held: dict[str, Any], row: Row) -> bool:
    return held["of"].get("recipe", row.recipe) == row.recipe  # the first rows do not say


def keep(path: Path, found: Any, arguments: Any = (), of: dict[str, str] | None = None) -> dict[str, Any]:
    """Write a row of this model and return what its file holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"arguments": arguments, "of": of or Row(path, keep).of, "made": found}, indent=1)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text + "\n")
    os.replace(part, path)
    return json.loads(text)


class _Here(Executor):
    """Makes each row at once, in this process."""

    def submit(self, act: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(act(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def _begin() -> None:
    """Of a process that makes rows: one thread, and it does not outlive the command, however that ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None, "rows are made in processes that a command began"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def measured(
    rows: Sequence[Row],
    jobs: int,
    show: Callable[[Any], Any] = lambda found: found,
    *,
    minutes: float = math.inf,
) -> list[Any]:
    """The JSON of every row, in order, `jobs` of them at once in processes of one thread (0: in this process). A row
    that fails does not stop the others; the first error is raised when they are done. No row is begun later than
    `minutes` after the command was: SystemExit then says how many are left."""
    missing = [row for row in rows if content(row.path) is None]
    began, errors, done, waiting = time.perf_counter(), [], 0, list(missing)
    context = multiprocessing.get_context("spawn")
    running: dict[Future, Row] = {}
    with ProcessPoolExecutor(min(jobs, len(missing)), context, _begin) if jobs and missing else _Here() as pool:
        while True:
            while waiting and len(running) < max(jobs, 1) and time.perf_counter() - BEGAN < 60 * minutes:
                row = waiting.pop(0)
                running[pool.submit(stored, row)] = row
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                row, error, done = running.pop(future), future.exception(), done + 1
                if error is not None:
                    errors.append(error)
                said = f"failed, {type(error).__name__}: {error}" if error else json.dumps(show(future.result()))
                spent = (time.perf_counter() - began) / 60
                print(f"[{done} of {len(missing)}, {spent:.1f} min] {row.path.stem}: {said}", flush=True)
    if errors:
        raise errors[0]
    if waiting:
        left = f"{len(waiting)} of {len(rows)} rows are left after {minutes:g} minutes"
        raise SystemExit(f"{left}; the same command goes on")
    return [stored(row) for row in rows]


def write_table(path: Path, text: str) -> None:
    """A table of rows of this model, for publish.py, which tells readers where one is of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{MARK.format(digest(*MODEL))}\n{text.rstrip()}\n", "utf-8")


def table_of(path: Path) -> tuple[str, bool]:
    """What `write_table` was given, and whether it is of this model."""
    text = path.read_text("utf-8")
    first, _, rest = text.partition("\n")
    marked = first.startswith(MARK.partition("{")[0])
    return (rest if marked else text).strip(), first == MARK.format(digest(*MODEL))


def tuned(results: Path) -> dict[str, float]:
    """Learning rate of each method that has been tuned on this model."""
    path = results / TUNED
    return made(path) if content(path) is not None else {}


def keep_tuned(results: Path, chosen: dict[str, float]) -> dict[str, float]:
    """Add the chosen learning rates to those that were tuned on this model before."""
    return keep(results / TUNED, tuned(results) | chosen)["made"]
