"""What a black-box objective was asked, and its answers, written down so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import append, json_line, read_json_lines, sync, write_atomically, write_durably
from palate.runtime.images import encode_png, from_pixels, read_pixels, to_pixels

ASKED = ("round", "index", "prompt", "file", "sha256")  # of a query, written before its answer


class Queries:
    """queries.jsonl and queries/*.png: {"query", "round", "index", "prompt", "file", "sha256"} before a query,
    {"query", "score"} or {"query", "failed"} after it. Numbers of queries never come back."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "queries.jsonl"
        (folder / "queries").mkdir(parents=True, exist_ok=True)
        self.rows: dict[int, dict[str, Any]] = {}
        rows = read_json_lines(self.log, cut_short=True) if self.log.is_file() else []
        for place, row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("query"), int):
                raise InputError(f"{self.log}, line {place}: not a query")
            self.rows.setdefault(row["query"], {}).update(row)
            lacking = [key for key in ASKED if key not in self.rows[row["query"]]]
            if lacking or not isinstance(row.get("score", 0.0), (int, float)):
                why = f"has no {lacking[0]}" if lacking else f"has the score {row['score']!r}, which is no number"
                raise InputError(f"{self.log}, line {place}: query {row['query']} {why}; restore the file")
        write_atomically(self.log, b"".join(json_line(row) for _, row in rows))

    @property
    def spent(self) -> int:
        """Queries made, answered or not."""
        return len(self.rows)

    @property
    def closed(self) -> set[tuple[int, int]]:
        """(round, index) of images that are not queried again: answered, or queried and the answer never seen."""
        return {(row["round"], row["index"]) for row in self.rows.values() if "failed" not in row}

    def ask(self, number: int, ids: Sequence[int], images: Tensor, prompts: Sequence[str]) -> list[int]:
        """Write the queries down, durably. Their numbers."""
        first = self.spent
        rows: list[dict[str, Any]] = []
        for k, (i, image, prompt) in enumerate(zip(ids, images, prompts, strict=True)):
            data, file = encode_png(to_pixels(image)), f"queries/{first + k:06d}.png"
            write_durably(self.folder / file, data)
            rows.append(
                {
                    "query": first + k,
                    "round": number,
                    "index": i,
                    "prompt": prompt,
                    "file": file,
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            )
        sync(self.folder / "queries")
        self._append(rows)
        return [row["query"] for row in rows]

    def answer(self, asked: Sequence[int], scores: Sequence[float], problem: str) -> None:
        self._append(
            [
                {"query": k, "score": score} if math.isfinite(score) else {"query": k, "failed": problem[:500]}
                for k, score in zip(asked, scores, strict=True)
            ]
        )

    def evaluated(self, last: int) -> tuple[Pictures, list[str], Tensor, Tensor]:
        """Images, prompts, scores (float64) and rounds of all answers up to round `last`, as they were asked."""
        rows = self._until(last)
        scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
        rounds = torch.tensor([row["round"] for row in rows])
        return Pictures(self.folder, rows), [row["prompt"] for row in rows], scores, rounds

    def digest(self, last: int) -> str:
        text = json.dumps([(row["query"], row["sha256"], row["score"]) for row in self._until(last)])
        return hashlib.sha256(text.encode()).hexdigest()

    def _until(self, last: int) -> list[dict[str, Any]]:
        return [self.rows[k] for k in sorted(self.rows) if "score" in self.rows[k] and self.rows[k]["round"] <= last]

    def _append(self, rows: list[dict[str, Any]]) -> None:
        append(self.log, b"".join(json_line(row) for row in rows), durably=True)
        for row in rows:
            self.rows.setdefault(row["query"], {}).update(row)


class Pictures:
    """The images of rows of queries.jsonl, read when a slice of them is asked for: (B, 3, H, W) in [0, 1].

    CheckpointError for one that is not what was asked about.
    """

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]):
        self.folder, self.rows = folder, rows

    def __getitem__(self, part: slice) -> Tensor:
        images = []
        for row in self.rows[part]:
            data = (self.folder / row["file"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise CheckpointError(
                    f"{self.folder / row['file']} is not the image that was asked about; "
                    "restore it, or start again with --fresh"
                )
            images.append(from_pixels(read_pixels(data)))
        return torch.stack(images)  # one by one, so that sums run in the same order as when they were drawn
