"""Results as text on a terminal, under the names that the pages use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from palate.report.html import number, signed
from palate.report.story import sentence, wanted_styles
from palate.report.tables import headline_keys, metric_rows
from palate.runtime.progress import printable


def print_evaluation(name: str, evaluation: dict[str, Any]) -> None:
    """The sentence, a table with the headline metrics first, warnings and notes."""
    console = Console()
    console.print(printable(f"{name}: {sentence(evaluation)}"), markup=False, highlight=False)
    table = Table("", "before", "after", "change")
    headline = headline_keys(evaluation, wanted_styles(evaluation))
    rows = [row for row in metric_rows(evaluation) if row.get("base") is not None and row.get("value") is not None]
    rows.sort(key=lambda row: headline.index(row["key"]) if row["key"] in headline else len(headline))
    for i, row in enumerate(rows):
        marked = f"{row['name']} ({row['tag']})" if row["tag"] else row["name"]
        change = row["value"] - row["base"]
        last = i + 1 == len(headline) < len(rows)
        table.add_row(printable(marked), number(row["base"]), number(row["value"]), signed(change), end_section=last)
    console.print(table)
    verdict = evaluation.get("verdict") or {}
    for text in (*verdict.get("warnings", ()), *verdict.get("notes", ())):
        console.print(printable(text), markup=False, highlight=False)


def print_changes(name: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of metrics before and after, with the 95 % interval of each change."""
    table = Table(printable(name), "before", "after", "change", "95 % interval")
    for metric, values in metrics.items():
        interval = f"{signed(values['change_low'])} to {signed(values['change_high'])}"
        table.add_row(
            printable(metric), number(values["base"]), number(values["value"]), signed(values["change"]), interval
        )
    Console().print(table)


def print_strengths(name: str, result: dict[str, Any]) -> None:
    """A table with a column for each strength of a run's LoRA; at 0 stands the base model."""
    found = result["strengths"]
    first = next(iter(found.values()))
    table = Table(printable(name), "base", *found)
    rows = [row for row in metric_rows(first) if row.get("value") is not None]
    for row in rows:
        values = [evaluation["metrics"].get(row["key"], {}).get("value") for evaluation in found.values()]
        base = row.get("base")
        table.add_row(
            printable(row["name"]),
            "" if base is None else number(base),
            *("" if value is None else number(value) for value in values),
        )
    Console().print(table)
