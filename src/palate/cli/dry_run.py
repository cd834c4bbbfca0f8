"""What `palate train RECIPE --dry-run` does: all that can be known before anything large loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import typer

from palate import plan as planner
from palate import recipe as recipes
from palate.cli.doctor import STOPS, Finding
from palate.cli.requirements import files_required
from palate.data import check_images
from palate.models.options import place_of
from palate.plan.table import FREE, GIB
from palate.recipe import Recipe
from palate.recipe.pictures import pictures_of
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.files import nearest_existing
from palate.runtime.progress import printable
from palate.train.tracking import check_trackers

SHOWN = 5  # prompts
Prompts = tuple[list[str], list[str]]  # of training, of previews


def dry_run_of(recipe: Recipe, *, gpus: int = 1, fresh: bool = False) -> None:
    """Print plan, headroom, folders, what is there and what is missing with the command that fetches it, and the first
    prompts. gpus: the ranks that the run is to have.

    typer.Exit with 2 where the run could not start as it is.
    """
    made: planner.Plan | None = None
    try:
        made = planner.plan(recipe, gpus=gpus)
        print(planner.table(recipe, made, device=None))
    except Exception as error:  # a part of one's own: what cannot be counted can be trained
        print(f"no plan: {printable(str(error)) or type(error).__name__}")
    print("\nheadroom")
    good = _said(_headroom(recipe, made, gpus))
    print("\nfolders")
    good = _folders(recipe, fresh) and good
    print("\nneeded")
    wanted = list(files_required(recipe, made))
    good = _said(each.finding() for each in wanted) and good
    whole = not any(each.what.startswith("model") and each.state in STOPS for each in wanted)
    good = _said(_wrong(recipe, gpus, whole)) and good
    prompts = _prompts_of(recipe)
    good = _said(_unknown(recipe, prompts)) and good
    print("\nprompts")
    if any(prompts):
        _show(prompts)
    print(f"\n{'ready' if good else 'not ready'}: nothing was loaded, nothing written")
    if not good:
        raise typer.Exit(2)


def _said(findings: Iterator[Finding]) -> bool:
    """Print the findings; whether all of them are good."""
    good = True
    for finding in findings:
        print("\n".join(f"  {printable(line)}" for line in f"{finding.state:8} {finding.text}".split("\n")))
        good = good and finding.state not in STOPS
    return good


def _headroom(recipe: Recipe, made: planner.Plan | None, gpus: int) -> Iterator[Finding]:
    """What a step leaves free on the device that the run is to use, as `palate train` asks before it loads."""
    try:
        place_of(recipe.model.device)
    except InputError as error:
        yield Finding("bad", str(error))
        return
    found = planner.room(recipe, gpus=gpus, units=made.units) if made else None
    if found is None:
        yield Finding("note", "not known: the memory of a step cannot be counted")
        return
    if not found.fits:
        yield Finding("bad" if recipe.run.check_memory else "note", found.sentence)
        return
    left = (found.have - found.need) / GIB
    text = f"{found.sentence}, {left:.0f} GiB are left" if left >= 10 else f"{found.sentence}, {left:.2g} GiB are left"
    tight = found.need > FREE * found.have
    yield Finding("note" if tight else "ok", text + (": less than the tenth that kernels take" if tight else ""))


def _folders(recipe: Recipe, fresh: bool) -> bool:
    folder = Path(recipe.run.folder)
    problem = _unwritable(folder)
    held = not problem and (bool(checkpoint.steps(folder / "checkpoints")) or (folder / "metrics.jsonl").exists())
    state = problem or "new"
    if held:
        state = "holds a run, which --fresh replaces" if fresh else "holds a run already; add --fresh or change it"
    print(f"  run.folder {printable(str(folder))}: {state}")
    print(f"    metrics.jsonl, samples/, checkpoints/ (the newest {recipe.trainer.keep_checkpoints}), adapter/")
    if recipe.model.text_cache is not None:
        print(f"  model.text_cache {printable(recipe.model.text_cache)}")
    return not problem and (fresh or not held)


def _unwritable(folder: Path) -> str:
    """Why nothing can be written there, "" where something can."""
    there = nearest_existing(folder)
    if not there.is_dir():
        return f"bad: {there} is a file, where a folder is needed; change run.folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"bad: {there} may not be written to; change its permissions, or run.folder"
    if max(len(os.fsencode(part)) for part in folder.absolute().parts) > os.pathconf(there, "PC_NAME_MAX"):
        return "bad: a name in it is too long for this disk; change run.folder"
    return ""


def _wrong(recipe: Recipe, gpus: int, whole: bool) -> Iterator[Finding]:
    """What the files that are there say: a folder of another family, a size that it cannot draw, a LoRA that does not
    fit, a picture that cannot be read; a batch that the ranks cannot share; a tracker that is not installed. whole:
    whether the model is there to be asked."""
    model = _check_model if whole else recipes.check_named_files
    for check in (partial(planner.require_equal_parts, gpus=gpus), _check_trackers, _check_pictures, model):
        try:
            check(recipe)
        except (InputError, OSError) as error:
            yield Finding("bad", str(error).splitlines()[0])


def _check_trackers(recipe: Recipe) -> None:
    check_trackers(recipe.trainer.tracker)


def _check_pictures(recipe: Recipe) -> None:
    pictures = pictures_of(recipe)
    check_images(pictures.files if pictures else [])


def _check_model(recipe: Recipe) -> None:
    recipes.check_folder(recipe)
    recipes.check_start(recipe)
    recipes.warn_of_noise(recipe)


def _unknown(recipe: Recipe, prompts: Prompts) -> Iterator[Finding]:
    """Words that the embedded model does not know: it is in the package, so they need not wait for the training."""
    try:
        recipes.check_words(recipe, *prompts)
    except InputError as error:
        yield Finding("bad", str(error).splitlines()[0])


def _prompts_of(recipe: Recipe) -> Prompts:
    """Those of training and of previews; none where they cannot be read, which the files above say."""
    try:
        pictures = pictures_of(recipe)
        return recipes.prompts_of(recipe, pictures.prompts if pictures else None)
    except (InputError, OSError):
        return [], []


def _show(prompts: Prompts) -> None:
    training, preview = prompts
    for name, texts in (("training", training), ("previews", preview)):
        print(f"  {len(texts)} of {name}, the first:")
        for text in texts[:SHOWN]:
            print(f"    {printable(text)[:160]}")
