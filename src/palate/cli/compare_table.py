"""Several evaluations as one table for papers and scripts: mean and standard deviation over groups of runs."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palate.report.curves import read_json
from palate.report.html import flatten
from palate.report.story import wanted_styles
from palate.report.tables import headline_keys, metric_name
from palate.runs.comparison import on_common_rows, same_meaning
from palate.runs.stored import read_recipe, run_names
from palate.runtime.errors import InputError
from palate.runtime.files import in_shell
from palate.runtime.result import evaluation_of

ROUNDING = 1e-3  # of a metric of the same pictures, drawn on two machines
LATEX = {sign: "\\" + sign for sign in "&%$#_{}"} | {
    "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
}  # fmt: skip
FORMATS = ("markdown", "latex", "csv", "json")


class Cell(NamedTuple):
    """Of one metric in one group: mean and sample standard deviation over its runs (None of a single run)."""

    mean: float
    std: float | None
    runs: int


def compare_runs(runs: Sequence[Path], group: str | None) -> tuple[list[str], list[str], dict[str, dict[str, Cell]]]:
    """(groups, metric keys, cells by group and key). Runs whose recipes differ only in `group` (for example seed, or
    trainer.seed) form one group, named by what else differs, of several methods by the method and what else differs
    among its runs; without `group` each run is its own. The base model's values are the first group, or one beside each
    where they differ. InputError where a run was not evaluated or has no such key."""
    evaluations: list[dict[str, Any]] = []
    run_names(runs)  # each once
    for run in runs:
        found = evaluation_of(run)
        if found is None:
            raise InputError(f"{run} has no evaluation.json; run palate evaluate {' '.join(map(in_shell, runs))}")
        told = all("prompt" in row and "seed" in row for row in found.get("rows") or ())
        if not (told and found.get("rows") and all("value" in metric for metric in found["metrics"].values())):
            raise InputError(
                f"{run / 'evaluation.json'}: rows or the value of a metric are missing; write it again with palate "
                f"evaluate {in_shell(run)}"
            )
        if found["outdated"]:
            logging.getLogger("palate").warning("%s: %s", run, found["outdated"])
        evaluations.append(found)
    evaluations = on_common_rows(evaluations, [str(run) for run in runs])
    for evaluation, answered in zip(evaluations, _checklists(runs), strict=True):
        evaluation["metrics"] |= answered
    names = _group_names(runs, group)
    first = evaluations[0]
    keys = headline_keys(first, wanted_styles(first))
    keys += [key for key in first["metrics"] if key not in keys]
    keys = [key for key in keys if all(key in evaluation["metrics"] for evaluation in evaluations)]
    if different := [key for key in keys if not same_meaning(evaluations, key)]:
        keys = [key for key in keys if key not in different]
        logging.getLogger("palate").warning(
            "left out, because the runs were trained with different words, weights or tastes: %s",
            ", ".join(map(metric_name, different)),
        )
    bases = [{key: evaluation["metrics"][key].get("base") for key in keys} for evaluation in evaluations]
    shared = all(_alike(base, bases[0]) for base in bases)  # else of several models, or drawn in several ways
    values: dict[str, dict[str, list[float]]] = {"base": {}} if shared else {}
    for name, evaluation, base in zip(names, evaluations, bases, strict=True):
        own = f"{name} (run)" if shared and name == "base" else name
        for key in keys:
            if base[key] is not None:
                values.setdefault("base" if shared else f"base of {name}", {}).setdefault(key, []).append(base[key])
            values.setdefault(own, {}).setdefault(key, []).append(evaluation["metrics"][key]["value"])
    cells = {name: {key: _cell(column) for key, column in columns.items()} for name, columns in values.items()}
    return [name for name in cells if cells[name]], keys, cells


def _alike(base: Mapping[str, float | None], other: Mapping[str, float | None]) -> bool:
    """Whether two runs start from the same base: up to what another machine rounds."""
    both = [(base[key] or 0.0, other[key] or 0.0) for key in base]
    return all(math.isclose(one, two, rel_tol=ROUNDING, abs_tol=ROUNDING) for one, two in both)


def _checklists(runs: Sequence[Path]) -> list[dict[str, dict[str, float]]]:
    """The metrics of each run's checklist.json, as checklist/NAME; none of any where the questions or judges differ."""
    found = [read_json(run / "checklist.json") or {} for run in runs]
    asked = [(answers.get("asked"), answers.get("judge"), answers.get("seeds")) for answers in found]
    if any(one != asked[0] for one in asked):
        logging.getLogger("palate").warning(
            "left out, because the runs were asked other questions, by other judges, or some not at all: checklist.json"
        )
        return [{} for _ in runs]
    return [{f"checklist/{name}": metric for name, metric in answers.get("metrics", {}).items()} for answers in found]


def _cell(values: Sequence[float]) -> Cell:
    mean = sum(values) / len(values)
    spread = None if len(values) < 2 else (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return Cell(mean, spread, len(values))


def _group_names(runs: Sequence[Path], group: str | None) -> list[str]:
    if group is None:
        names = [run.resolve().name for run in runs]
        return names if len(set(names)) == len(names) else [str(run) for run in runs]
    trees = []
    for run in runs:
        tree = dict(flatten(read_recipe(run)))
        keys = [key for key in tree if key == group or key.endswith(f".{group}")]
        if not keys:
            raise InputError(f"--group: the recipe of {run} has no key {group!r}; for example trainer.seed")
        trees.append({key: value for key, value in tree.items() if key not in (*keys, "run.folder")})
    methods = [tree.get("algorithm.name") for tree in trees]
    differing = []
    for method in methods:  # other methods have other keys, so that all of a method's would differ from theirs
        alike = [tree for tree, its in zip(trees, methods, strict=True) if its == method]
        keys = sorted({key for tree in alike for key in tree})
        differing.append([key for key in keys if len({tree.get(key) for tree in alike}) > 1])
    last = [key.rpartition(".")[2] for key in {key for keys in differing for key in keys}]
    names = []
    for tree, method, keys in zip(trees, methods, differing, strict=True):
        short = [name if last.count(name) == 1 else key for key in keys for name in [key.rpartition(".")[2]]]
        told = [str(method)] if len(set(methods)) > 1 else []
        told += [f"{name} {tree.get(key)}" for name, key in zip(short, keys, strict=True)]
        names.append(", ".join(told) or "all runs")
    return names


def as_text(form: str, groups: Sequence[str], keys: Sequence[str], cells: dict[str, dict[str, Cell]]) -> str:
    """The table in one of FORMATS: a row per metric, a column per group, mean ± standard deviation."""
    if form not in FORMATS:
        raise InputError(f"--format: got {form!r}; expected one of {', '.join(FORMATS)}")
    if form == "json":
        found = {name: {key: cells[name][key]._asdict() for key in keys if key in cells[name]} for name in groups}
        return json.dumps(found, indent=1) + "\n"
    if form == "csv":
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(["metric", "group", "mean", "std", "runs"])
        for key in keys:
            for name in groups:
                if cell := cells[name].get(key):
                    writer.writerow([key, name, f"{cell.mean:.6g}", "" if cell.std is None else f"{cell.std:.6g}",
                                     cell.runs])  # fmt: skip
        return stream.getvalue()
    rows = [[metric_name(key), *(_spelled(cells[name].get(key), form) for name in groups)] for key in keys]
    return _latex(groups, rows) if form == "latex" else _markdown(groups, rows)


def _spelled(cell: Cell | None, form: str) -> str:
    if cell is None:
        return ""
    numbers = [value for value in (cell.mean, cell.std) if value is not None]
    if form != "latex":
        return " ± ".join(map(_rounded, numbers))
    return "$" + " \\pm ".join(map(_in_powers, map(_rounded, numbers))) + "$"


def _rounded(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1000 or (value and abs(value) < 5e-4) else f"{value:.3f}"


def _in_powers(number: str) -> str:
    """7.4e-05 as mathematics writes it."""
    digits, _, exponent = number.partition("e")
    return f"{digits} \\times 10^{{{int(exponent)}}}" if exponent else digits


def _markdown(groups: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [["", *groups], ["---", *["---:"] * len(groups)], *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _latex(groups: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = " \\\\\n".join(" & ".join([_escaped(row[0]), *row[1:]]) for row in rows)
    head = " & ".join(["", *map(_escaped, groups)])
    columns = "l" + "r" * len(groups)
    top = f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n"
    return f"{top}{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n"


def _escaped(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)
