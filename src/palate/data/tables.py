"""Text files and tables, read whole and with limits; what is wrong is reported with its file and line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from palate.runtime.errors import InputError
from palate.runtime.files import parse_json, split_lines

TEXT_LIMIT = 64 * 1024 * 1024  # bytes of a prompt file
MORE = "more fields"  # of a row, than the table has columns
END = "\x1eend"  # put behind a table: what does not come back as a row of its own was swallowed by an open quotation


class RecipeError(InputError):
    """Everything that is wrong with a recipe or with a file that it names, one per line."""


def read_text(path: Path, *, limit: int) -> str:
    """A file of UTF-8 text of at most `limit` bytes; InputError names the file and what is wrong with it."""
    try:
        if path.stat().st_size > limit:
            raise RecipeError(f"{path} is larger than {limit // 1024} KiB")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file; a plain text in a list counts as {"prompt": text}."""
    reader = TABLES.get(path.suffix.lower())
    if reader is None:
        raise RecipeError(f"{path}: expected a file ending in {', '.join(TABLES)}")
    rows = []
    for number, row in enumerate(reader(path), 1):
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise RecipeError(f"{path}, row {number}: expected a prompt or a mapping, got {type(row).__name__}")
        rows.append(row)
    return rows


def _jsonl(path: Path) -> Iterator[Any]:
    for number, line in enumerate(split_lines(read_text(path, limit=TEXT_LIMIT)), 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise RecipeError(f"{path}, line {number}: not JSON ({str(error)[:80]})") from error


def _json(path: Path) -> list[Any]:
    try:
        tree = parse_json(read_text(path, limit=TEXT_LIMIT * 16))
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{path}: not JSON ({str(error)[:80]})") from error
    if not isinstance(tree, list):
        raise RecipeError(f"{path}: expected a list of prompts or of mappings, got {type(tree).__name__}")
    return tree


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    text = read_text(path, limit=TEXT_LIMIT)
    if not text.strip():
        return
    # of .tsv the public sets know no quoting: a quotation mark is one
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {"delimiter": ","}
    try:
        *_, last = csv.reader(io.StringIO(f"{text}\n{END}", newline=""), **form)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey=MORE, **form))
    except csv.Error as error:
        raise RecipeError(f"{path}: not a table ({error})") from error
    if last != [END]:
        raise RecipeError(f"{path}: a quotation mark is not closed; is the file cut short?")
    for number, row in enumerate(rows, 1):
        if any(part and not part.isspace() for part in row.pop(MORE, ())):
            raise RecipeError(
                f"{path}, row {number}: more fields than the first line has names; put a text with a comma in double "
                'quotation marks ("a fox, red")'
            )
        yield row


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, each as a mapping of its columns."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RecipeError(
            f"{path}: reading .parquet needs pyarrow; install it with pip install 'palate[data]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(f"{path}: not a readable parquet file ({str(error)[:120]})") from error


TABLES: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": parquet_rows,
}
