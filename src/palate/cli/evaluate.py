"""What `palate evaluate` does once its options are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from palate.cli.evaluate_options import EvaluateOptions
from palate.cli.evaluate_questions import evaluate_with_questions
from palate.cli.evaluate_tasks import evaluate_with_tasks
from palate.cli.phases import show_phases
from palate.cli.result_tables import print_evaluation, print_strengths
from palate.data import geneval, read_prompts
from palate.data.published import PROMPT_SETS, find_prompt_set, read_prompt_set
from palate.evaluate import to_json
from palate.report import write_evaluation
from palate.report.sheet import write_sheet
from palate.rewards.tasks import geneval_prompts
from palate.runs.evaluation import evaluate_runs, prompts_of
from palate.runs.folder import RunFolder, open_runs
from palate.runs.protocol import evaluate_protocol
from palate.runs.strength import FOLDER, evaluate_strengths
from palate.runtime.errors import InputError
from palate.runtime.progress import printable

warn = logging.getLogger("palate").warning


def check(options: EvaluateOptions) -> None:
    """InputError for options that exclude each other."""
    if options.stored and (options.count or options.seeds or (options.prompts_file and not options.protocol)):
        raise InputError("--stored judges the images that are there; leave out --prompts-file, --count and --seeds")
    if options.protocol is not None and (options.tasks or options.questions):
        raise InputError("--protocol, --tasks and --questions are three evaluations; give one of them")
    if options.protocol is not None and options.protocol not in PROMPT_SETS:
        raise InputError(f"--protocol: got {options.protocol!r}; expected one of {', '.join(PROMPT_SETS)}")
    alone = (options.stored, options.tasks, options.questions, options.protocol, options.out)
    if options.strengths is not None and any(alone):
        raise InputError("--strength draws and judges by itself; leave out --stored, --tasks, --questions, --protocol, "
                         "--out")  # fmt: skip
    if options.judge is not None and (options.questions is None or options.tasks):
        raise InputError("--judge belongs to --questions; give both, or neither")
    if options.tasks and (options.prompts_file or options.count or options.stored or options.out):
        raise InputError("--tasks has prompts of its own and draws; leave out --prompts-file, --count, --stored, --out")
    if options.tasks and (drawn := [word for word in options.overrides if not word.startswith("model.")]):
        raise InputError(f"--tasks draws as the run's recipe says and judges by exact oracles; leave out {drawn[0]}")
    if options.questions is not None and (options.prompts_file or options.count or options.out):
        raise InputError("--questions has prompts of its own; leave out --prompts-file, --count and --out")


def evaluate_and_print(runs: Sequence[Path], options: EvaluateOptions) -> None:
    """Measure the runs in the way that the options name, and print tables, or JSON."""
    check(options)
    if options.strengths is not None:
        _evaluate_strengths(runs, options.strengths, options)
    elif options.tasks:
        prompts = None if options.questions is None else geneval_prompts(geneval(options.questions))
        evaluate_with_tasks(
            runs, options.seeds, prompts=prompts, as_json=options.as_json, quiet=options.quiet,
            load=lambda run: RunFolder(run, options.overrides).model(warn),
        )  # fmt: skip
    elif options.questions is not None:
        evaluate_with_questions(runs, options)
    else:
        _evaluate_rewards(runs, options)


def _evaluate_rewards(runs: Sequence[Path], options: EvaluateOptions) -> None:
    """The recipe's evaluation or a paper's; writes the page."""
    if options.protocol is not None:
        prompts = prompt_set(options.protocol, options.prompts_file)
        with show_phases(options.quiet):
            found = evaluate_protocol(
                runs, options.protocol, prompts, count=options.count, seeds=options.seed_range, stored=options.stored,
                overrides=options.overrides,
            )  # fmt: skip
    else:
        own = read_prompts(options.prompts_file) if options.prompts_file else None
        with show_phases(options.quiet):
            found = evaluate_runs(
                runs, prompts=own, count=options.count, seeds=options.seed_range, stored=options.stored, warn=warn,
                overrides=options.overrides,
            )  # fmt: skip
    page = write_evaluation(runs, found, options.out)
    if options.as_json:
        print(to_json(found), end="")
        return
    for name, evaluation in found["runs"].items():
        print_evaluation(name, evaluation)
    if options.protocol is not None:
        print_standings(found["runs"][found["first"]]["protocol"]["rewards"])
    print(f"report: {printable(str(page))}")


def _evaluate_strengths(runs: Sequence[Path], strengths: Sequence[float], options: EvaluateOptions) -> None:
    """Each run's LoRA at each strength: a table with a column per strength, and a sheet of the pictures."""
    own = read_prompts(options.prompts_file) if options.prompts_file else None
    found = {}
    for path, run in zip(runs, open_runs(runs, options.overrides), strict=True):
        with show_phases(options.quiet):
            found[str(path)] = evaluate_strengths(
                run, strengths, prompts=prompts_of(run.recipe, own, options.count), seeds=options.seed_range
            )
            write_sheet(path / FOLDER)
    if options.as_json:
        print(to_json(found), end="")
        return
    for name, result in found.items():
        print_strengths(name, result)
        print(f"pictures: {printable(str(Path(name) / FOLDER / 'grid.png'))}")


def prompt_set(name: str, file: str | None) -> dict[str, str]:
    """Prompt -> category of a protocol: of the file or folder that is given, else as `palate fetch` left it.
    InputError: it is not here; the message says where it is published."""
    if file is not None:
        path = Path(file).expanduser()
        if not path.exists():
            raise InputError(f"--prompts-file: {file} does not exist")
        return read_prompt_set([path])
    files = find_prompt_set(name)
    if files is None:
        known = PROMPT_SETS[name]
        fetch = f"; palate fetch {name} gets it ({known.licence}); or" if known.place else (
            f", and are not fetched (licence: {known.licence});")  # fmt: skip
        raise InputError(
            f"--protocol {name}: the {known.size} prompts of {known.title} are not here{fetch} give your copy with "
            "--prompts-file"
        )
    return read_prompt_set(files)


def print_standings(rewards: Mapping[str, Mapping[str, Any]]) -> None:
    """Which published rewards were found, 1 or 0, and what fetches the others."""
    table = Table("reward", "found", "weights, or what fetches them")
    for name, standing in rewards.items():
        table.add_row(name, str(standing["found"]), printable(str(standing.get("source") or standing["command"])))
    Console().print(table)
