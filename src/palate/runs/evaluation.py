"""A run judged: base model against result on the same noise, written beside the run.

evaluation/{base,result} and evaluation.json are the newest evaluation. One on other prompts or seeds does not replace
it: the older one moves to evaluations/KEY, where KEY tells its prompts and seeds, and comes back when they are asked
for again.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from palate.core import DrawsReference, Model, Sampleable, Sampler
from palate.data import evenly_spaced, listed, prompts_at
from palate.evaluate.measurement import evaluate_samples, to_json
from palate.evaluate.panel import EvaluationPanel
from palate.evaluate.samples import (
    Drawing,
    check_same,
    generate_parts,
    pairs,
    read_index,
    steps_and_guidance,
    write_samples,
)
from palate.evaluate.verdicts import verdict
from palate.models.sizes import at_size
from palate.recipe import evaluators
from palate.recipe.cross_checks import heldout_of
from palate.recipe.objective import ORACLE, Term
from palate.recipe.settings import Recipe
from palate.runs.comparison import between
from palate.runs.folder import RunFolder, open_runs
from palate.runs.stored import RECIPE, run_names
from palate.runtime.errors import InputError
from palate.runtime.exclusive import alone
from palate.runtime.files import json_digest, replace, write_atomically
from palate.runtime.result import evaluation_of, result_of, step_of

SIDES = ("base", "result")
CURRENT = ("evaluation", "evaluation.json")
Load = Callable[[Path], tuple[Model, Sampler | None]]


def evaluate_run(
    run_folder: str | Path | RunFolder,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    model: Model | None = None,
    panel: EvaluationPanel | None = None,
    sampler: Sampler | None = None,
    stored: bool = False,
) -> dict[str, Any]:
    """Base model against the run's result on prompts x seeds from the same noise: every reward with the optimised one
    marked, a verdict, the images. Writes evaluation/{base,result}/ and evaluation.json into the run folder and returns
    the latter. None = what the recipe's evaluate section says. `stored`: judge the images that lie there already.
    The panel's digests are of rewards that other runs optimise."""
    run = run_folder if isinstance(run_folder, RunFolder) else RunFolder(run_folder)
    panel = panel or evaluators.panel_of(run.recipe)
    with evaluating(run):
        if stored:
            return _judge_of(run, panel, stored=True)()
        prompts = prompts_of(run.recipe) if prompts is None else listed(prompts)
        seeds = seeds_of(run.recipe) if seeds is None else list(seeds)
        judge = _judge_of(run, panel, stored=False)
        _draw(run, run.model if model is None else lambda: (model, sampler), prompts, seeds)
        return judge()


def _judge_of(run: RunFolder, panel: EvaluationPanel, *, stored: bool) -> Callable[[], dict[str, Any]]:
    """What judges the pictures that lie in the run when it is called: those that are stored now, or are drawn next."""
    if stored:
        check_stored(run)
    measured, words = _measured(run, stored)
    rewards, optimised = run.objective().with_words(*words).rewards(panel.rewards, panel.heldout)
    told = measured | {"digests": {**panel.digests, **digests(run.objective().terms)}}
    return partial(_judged, run, panel._replace(rewards=rewards), optimised, told, words)


def _draw(
    run: RunFolder, load: Callable[[], tuple[Model, Sampler | None]], prompts: Sequence[str], seeds: Sequence[int]
) -> None:
    """Both sides of an evaluation, which becomes the current one. A model that `load` makes ends with this call: the
    judges find its memory free."""
    model, sampler = load()
    make_current(run.path, evaluation_key(*pairs(prompts, seeds)))
    draw_sides(run, run.path, model, sampler, prompts, seeds)
    del model, sampler
    gc.collect()  # a network and what recomputes its blocks hold one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _judged(
    run: RunFolder, panel: EvaluationPanel, optimised: list[str], told: dict[str, Any],
    words: tuple[list[str], list[str]],
) -> dict[str, Any]:  # fmt: skip
    """Write what the panel says of the pictures that lie in the run, and return it."""
    folder, objective = run.path / "evaluation", run.objective()
    result = evaluate_samples(folder / "result", base_folder=folder / "base", panel=panel)
    (positive, negative), fall = words, run.may_fall
    result |= {
        "optimised": optimised,
        "heldout": panel.heldout,
        **({"heldout_may_fall": fall} if fall else {}),
        "objective": objective.description(),
        **told,
        **({"reference": run.reference} if run.reference else {}),
        "words": {"positive": positive, "negative": negative} | ({"k": objective.k} if objective.k else {}),
        "verdict": verdict(
            result["metrics"], optimised, panel.heldout, result["failed"], num_prompts=result["prompts"], may_fall=fall
        ),
    }
    if f"{ORACLE}hidden-judge" in optimised:
        result["verdict"]["warnings"].append(
            "the oracle was the judge itself: concepts, diversity and drift are not "
            "independent of what was optimised; the held-out reward is"
        )
    write_atomically(run.path / "evaluation.json", to_json(result).encode())
    return result


def evaluate_runs(
    run_folders: Sequence[str | Path],
    *,
    prompts: Sequence[str] | None = None,
    count: int | None = None,
    seeds: Sequence[int] | None = None,
    stored: bool = False,
    panel: EvaluationPanel | None = None,
    load: Load | None = None,
    warn: Callable[[str], None] = warnings.warn,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """`evaluate_run` for each, on the same prompts and seeds and by the same rewards: those that any of the runs
    optimised are asked of all. Returns {"first": name, "runs": {name: evaluation}, "between": {name: {metric: ...}}},
    the last as `between` gives it against the first run, on the prompts and seeds that both have.

    prompts, count (at most so many), seeds: None = each recipe's own, which must then agree. InputError before any
    image is drawn where they do not. `load`: folder -> model, sampler; None = `RunFolder.model`. `warn` gets a
    sentence for each run whose base model was drawn in other steps or with other guidance. `overrides`: as of
    `open_runs`.
    """
    names = run_names([Path(folder) for folder in run_folders])
    runs = open_runs(run_folders, overrides)
    asked: list[tuple[list[str], list[int]] | None] = []
    for run in runs:
        if stored:
            check_stored(run)
            asked.append(None)
            continue
        mine = prompts_of(run.recipe, prompts, count), seeds_of(run.recipe) if seeds is None else list(seeds)
        asked.append(mine)
        check_same(_rows(*(asked[0] or mine)), _rows(*mine), names[0], names[len(asked) - 1])
    panel = panel or _common_panel(runs, names)
    shared: dict[str, Term] = {}  # of rewards with one label, as two tastes, all are asked the first; a run its own too
    for run in runs:
        shared = {term.label: term for term in run.objective().terms} | shared
        panel = panel._replace(rewards=run.objective().load(panel.rewards))
    told, judges = digests(shared.values()), {}
    with ExitStack() as held:
        for run in runs:
            held.enter_context(evaluating(run))
        for name, run, given in zip(names, runs, asked, strict=True):
            own = {t.label: t.load() for t in run.objective().terms if t.digest() != shared[t.label].digest()}
            judging = panel._replace(rewards=dict(panel.rewards) | own, digests=told)
            judges[name] = _judge_of(run, judging, stored=given is None)
            if given is not None:
                _draw(run, partial(run.model, warn) if load is None else partial(load, run.path), *given)
        found = {name: judge() for name, judge in judges.items()}  # last: on a GPU they stay where the networks draw
    first, ways = names[0], [_how_drawn(run) for run in runs]
    for name, way in zip(names, ways, strict=True):
        if way != ways[0]:
            warn(
                f"{first} is drawn with {ways[0]}, {name} with {way}: more than the training differs between them; "
                "give both the same sample.guidance and sample.steps"
            )
    return {"first": first, "runs": found, "between": {name: between(found[first], found[name]) for name in names[1:]}}


def digests(terms: Iterable[Term]) -> dict[str, str]:
    """What tells rewards of the same label apart, by label; without those whose name says it all."""
    return {term.label: digest for term in terms if (digest := term.digest()) is not None}


def prompts_of(recipe: Recipe, prompts: Sequence[str] | None = None, count: int | None = None) -> list[str]:
    """Those given, else evaluate.prompts of the recipe's: of evaluate.file, the preview's, the training prompts.
    `count` of either, evenly spaced."""
    if prompts is None:
        asked = recipe.prompts
        files = {"evaluate.file": recipe.evaluate.file, "prompts.preview": asked.preview, "prompts.file": asked.file}
        prompts = next((prompts_at(key, file) for key, file in files.items() if file), asked.list)
        count = count or recipe.evaluate.prompts
    if not prompts:
        raise InputError(
            "the recipe names no prompts to evaluate on; set evaluate.file to a text file, one prompt per line"
        )
    return evenly_spaced(listed(prompts), count or len(prompts))


def seeds_of(recipe: Recipe) -> list[int]:
    """0 ... evaluate.seeds - 1."""
    return list(range(recipe.evaluate.seeds))


# --- evaluations that are kept --------------------------------------------------------------------------------------


def evaluation_key(prompts: Sequence[str], seeds: Sequence[int]) -> str:
    """What tells an evaluation's rows, all prompts and seeds in order, from another's."""
    return json_digest([[prompt, int(seed)] for prompt, seed in zip(prompts, seeds, strict=True)])[:12]


def make_current(run: Path, key: str) -> None:
    """Make room for an evaluation: one on other rows moves to evaluations/KEY, one on the same comes back."""
    if (run / "evaluation" / "result" / "index.jsonl").is_file():
        rows = read_index(run / "evaluation" / "result")
        there = evaluation_key([row["prompt"] for row in rows], [row["seed"] for row in rows])
        if there == key:
            return
        _move(run, run / "evaluations" / there)
    if (kept := run / "evaluations" / key).is_dir():
        _move(kept, run)
        kept.rmdir()


def _move(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in CURRENT:
        if (source / name).exists():
            replace(source / name, target / name)


def _measured(run: RunFolder, stored: bool) -> tuple[dict[str, Any], tuple[list[str], list[str]]]:
    """The checkpoint that the images are of, as evaluation.json keeps it, and the words that it was trained with last.
    None where that is not known: without a checkpoint, or where evaluation.json is older than the images, because what
    should have judged them then broke off."""
    if not stored:
        now = result_of(run.path)
        return {"checkpoint": None} if now is None else now.measured(), run.words()
    known, drawn = run.path / "evaluation.json", run.path / "evaluation" / "result" / "index.jsonl"
    whole = known.is_file() and known.stat().st_mtime_ns >= drawn.stat().st_mtime_ns
    found = (evaluation_of(run.path) or {}) if whole else {}
    measured = {"checkpoint": found.get("checkpoint")}
    if "manifest" in found:  # the run may have gone back since, and come to that step with other words
        words = found["words"]["positive"], found["words"]["negative"]
        return {**measured, "manifest": found["manifest"]}, words
    return measured, run.words(None if measured["checkpoint"] is None else step_of(measured["checkpoint"]))


# --- parts ----------------------------------------------------------------------------------------------------------


def evaluating(run: RunFolder) -> AbstractContextManager[None]:
    """Inside, this process alone draws and judges the run's pictures. InputError: another one does."""
    return alone(
        run.path / RECIPE,
        f"{run.path} is being evaluated by another process, and the pictures of the two would be mixed; wait for it",
    )


def sides(run: RunFolder, sampler: Sampler | None) -> tuple[Drawing, Drawing]:
    """How base and result are drawn, by the run's recipe and the result's own sampler."""
    how, algorithm = run.sample, run.algorithm
    alike = isinstance(algorithm, DrawsReference) and algorithm.draws_reference
    base = sampler if alike else None  # else the result stands beside its teacher, drawn in many steps
    return (
        Drawing(how.steps, how.guidance, "reference", sampler=base),
        Drawing(how.steps, how.guidance, sampler=sampler),
    )


def draw_sides(
    run: RunFolder, into: Path, model: Model, sampler: Sampler | None, prompts: Sequence[str], seeds: Sequence[int]
) -> None:
    """Write the pictures of base and result on prompts x seeds into `into`/evaluation/{base,result}."""
    assert isinstance(model, Sampleable), "a run's model can be sampled"
    for side, how in zip(SIDES, sides(run, sampler), strict=True):
        steps, guidance = steps_and_guidance(model, how)
        with at_size(model, run.sample.image_size):  # the images are drawn as they are written
            images = generate_parts(model, prompts, seeds, how)
            write_samples(into / "evaluation" / side, images, *pairs(prompts, seeds), guidance=guidance, steps=steps)


def _common_panel(runs: Sequence[RunFolder], names: Sequence[str]) -> EvaluationPanel:
    judges = [heldout_of(run.recipe) for run in runs]
    for name, judge in zip(names, judges, strict=True):
        if judge != judges[0]:
            raise InputError(
                f"{names[0]} is judged by {judges[0]}, {name} by {judge}; give evaluate.heldout=NAME, one that "
                "neither optimised"
            )
    return evaluators.panel_of(runs[0].recipe)


def check_stored(run: RunFolder) -> None:
    """InputError: the run has no pictures of an evaluation."""
    for side in SIDES:
        if not (run.path / "evaluation" / side / "index.jsonl").is_file():
            raise InputError(
                f"{run.path} has no stored images of the {side}; run palate evaluate on it without --stored"
            )


def _rows(prompts: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [{"prompt": p, "seed": s} for p, s in zip(*pairs(prompts, seeds), strict=True)]


def _how_drawn(run: RunFolder) -> str:
    """How the base images of an evaluation were drawn."""
    row = read_index(run.path / "evaluation" / "base")[0]
    return ", ".join(f"{key} {row[key]:g}" for key in ("guidance", "steps") if key in row)
