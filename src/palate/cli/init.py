"""What `palate init` does: a recipe for a model, a card, a method and what is wanted, written with its comments.

A new recipe is a published one of the same model and method with the answers put in, so its numbers are those that are
documented. What a card has no room for is changed as `palate plan` advises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import typer

from palate import plan as planner
from palate import recipe as recipes
from palate.cli.options import Words
from palate.data import read_prompts
from palate.models.facts import facts_of
from palate.plan.table import GIB, Device, find_device
from palate.recipe import Recipe
from palate.recipe.cross_checks import ControlWords, PrefersWords, rewards_used
from palate.recipe.editing import with_value, with_values, without_head
from palate.recipe.reader import literal, text_of
from palate.rewards import table as rewards
from palate.rewards.published import PUBLISHED
from palate.runtime.errors import InputError
from palate.runtime.files import in_shell, write_atomically

KEPT = 4.0  # of the absolute reward beside a relative one: with 1 concepts are lost before a style is there
ROUNDS = 4  # changes that make a recipe fit, at most
Planner = Callable[[Recipe], planner.Plan]


class Answers(NamedTuple):
    """What is asked. None = not answered."""

    model: str | None = None
    method: str | None = None
    card: str | None = None  # a name that `palate plan --device` knows, or GiB
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    reward: str | None = None
    prompts: str | None = None  # a file, or the name of one in the package
    prompt_list: tuple[str, ...] = ()


@cache
def templates() -> dict[tuple[str, str], str]:
    """(model, method) -> the published recipe that a new one begins with, the one with the shortest name."""
    found: dict[tuple[str, str], str] = {}
    for name in sorted(recipes.published(), key=len):
        recipe = recipes.read(name)
        if recipe.optimize is None and not name.endswith(("-released", "-blackbox", "-quick")):
            method = "taste" if name.startswith("taste-") else recipe.algorithm.name
            found.setdefault((recipe.model.name, method), name)
    return found


def write_recipe(answers: Answers, out: Path | None, *, plan: Planner = planner.plan) -> Path:
    """Write the recipe; returns its path. InputError: the file is there already, or an answer cannot be used."""
    if out is not None:
        _check_free(out)
    known = templates()
    if sys.stdin.isatty():
        answers = asked(answers, known)
    template = template_of(answers, known)
    text = with_values(text_of(template), changes_for(recipes.read(template), answers))
    name, card = card_of(answers.card)
    text, sentence = fitted(text, name, card, plan)
    model, method = next(pair for pair, name in known.items() if name == template)
    path = out or Path(f"{method}-{model}.yaml")
    _check_free(path)
    folder = f"runs/{path.stem}"
    text = with_value(text, "run.folder", folder)
    recipe = recipes.parse(text)
    text = "\n".join([*_head(recipe, path, template, sentence), without_head(text)])
    write_atomically(path, text.encode())
    return path


def template_of(answers: Answers, known: dict[tuple[str, str], str]) -> str:
    """The published recipe of the model and method. InputError: there is none."""
    models = list(dict.fromkeys(model for model, _ in known))
    if answers.model not in models:
        got = f"got {answers.model!r}; " if answers.model else ""
        raise InputError(f"--model: {got}expected one of {', '.join(sorted(models))}")
    methods = [method for model, method in known if model == answers.model]
    method = answers.method or ("srpo" if "srpo" in methods else methods[0])
    if (answers.model, method) not in known:
        raise InputError(
            f"--method: no published recipe trains {answers.model} with {method!r}; expected one of "
            f"{', '.join(sorted(methods))}"
        )
    return known[answers.model, method]


def changes_for(recipe: Recipe, answers: Answers) -> dict[str, Any]:
    """Keys of the template that the answers change, with their values. InputError: answers that exclude each other."""
    changes = _reward_changes(recipe, answers.reward)
    if answers.positive or answers.negative:
        changes |= _word_changes(recipe, answers)
    elif answers.reward is not None and isinstance(recipe.algorithm, ControlWords):  # it alone is what is wanted
        changes |= {"algorithm.positive": [], "algorithm.negative": []}
        if isinstance(recipe.algorithm, PrefersWords):
            changes |= {"algorithm.preference": "absolute", "algorithm.branches": ["denoise"],
                        "algorithm.k_denoise": None, "algorithm.k_inversion": None}  # fmt: skip
    if answers.prompts is not None:
        read_prompts(answers.prompts)  # InputError: it is not there, or holds none
    if answers.prompts is not None or answers.prompt_list:
        changes |= {"prompts.file": answers.prompts, "prompts.list": list(answers.prompt_list) or None,
                    "prompts.images": None, "prompts.pairs": None, "prompts.likes": None,
                    "prompts.preview": None, "evaluate.file": None}  # fmt: skip
    return changes


def _reward_changes(recipe: Recipe, name: str | None) -> dict[str, Any]:
    """The reward that is named in place of the template's, with nothing of the old one's; None: the template's. Either
    is looked for where it will be."""
    reward, used, kept = recipe.reward, rewards_used(recipe.reward), recipe.reward.source
    changes: dict[str, Any] = {}
    if name is not None and used != {name}:
        used, kept = {name}, {}
        changes = {"reward.name": name, "reward.weights": None, "reward.taste": None, "reward.relative": None,
                   "reward.scale": None, "reward.noised": None}  # fmt: skip
        if getattr(recipe.algorithm, "hinge", None) is not None:  # in units of the old one
            changes["algorithm.hinge"] = None
        if recipe.evaluate.heldout == name:
            changes["evaluate.heldout"] = None
    source = {**kept, **{each: place for each in sorted(used) if (place := _place(each))}}
    if source != reward.source:
        changes["reward.source"] = source or None
    return changes


def _place(reward: str) -> str:
    """Where `palate fetch` or `palate taste fit` writes it, or a server's usual address; "" where none is needed."""
    known = PUBLISHED.get(reward)
    if known is not None and known.converted:
        return f"weights/{reward}/{known.converted}"
    return "tastes/mine" if reward == "taste" else rewards.find(reward).example


def _word_changes(recipe: Recipe, answers: Answers) -> dict[str, Any]:
    """The words, where the method reads them."""
    name, own = recipe.algorithm.name, isinstance(recipe.algorithm, ControlWords)
    if isinstance(recipe.algorithm, PrefersWords) and not (answers.positive and answers.negative):
        missing = "--without" if answers.positive else "--words"
        raise InputError(f"{missing}: {name} compares wanted with unwanted words; give both")
    if not own and (len(answers.positive) > 1 or len(answers.negative) > 1):
        raise InputError(f"--words: {name} takes one wanted and one unwanted word")
    asked = {answers.reward} if answers.reward else rewards_used(recipe.reward)
    if not any(rewards.find(each).reads_prompt for each in asked):
        raise InputError(
            f"--words: the reward {', '.join(sorted(asked))} reads no prompt, so no word changes it; add --reward "
            "hpsv2, or another that reads prompts"
        )
    if own:
        return {"algorithm.positive": list(answers.positive), "algorithm.negative": list(answers.negative),
                "algorithm.preference": None}  # fmt: skip
    pair = {"positive": (*answers.positive, "")[0], "negative": (*answers.negative, "")[0]}
    return {"reward.relative": {**pair, "k": KEPT}}


def card_of(card: str | None) -> tuple[str, Device]:
    """A device of `palate plan`, one of so many GiB, or None for this machine."""
    try:
        gib = float((card or "").lower().removesuffix("gib").removesuffix("gb").strip())
    except ValueError:
        try:
            return find_device(card)
        except InputError as error:
            raise InputError(str(error).replace("--device", "--card")) from error
    if not 0 < gib <= 1000:
        raise InputError(f"--card: expected a card (as rtx-4090) or its GiB, got {card!r}")
    return f"a card of {gib:g} GiB", Device(100.0, gib)


def fitted(text: str, name: str, card: Device, plan: Planner) -> tuple[str, str]:
    """The text with the changes that make a step fit the card, and a sentence on its memory."""
    for _ in range(ROUNDS):
        recipe = recipes.parse(text)
        made = plan(recipe)
        if made.bytes <= card.room:
            return text, f"Memory by `palate plan`: {made.bytes / GIB:.2g} of {card.gib:g} GiB on {name}"
        found = [(key, need) for key, need in planner.memory_savings(recipe, made) if not key.startswith("all ")]
        if not found:
            break
        gentle = [key for key, need in reversed(found) if need <= card.room]  # the last of those that are enough
        for change in (gentle or [found[0][0]])[0].split():  # of two keys where one goes with the other
            key, _, value = change.partition("=")
            text = with_value(text, key, literal(value, key))
    return text, f"Memory by `palate plan`: {made.bytes / GIB:.2g} GiB, MORE than {card.gib:g} GiB on {name} have room"


def asked(answers: Answers, known: dict[tuple[str, str], str]) -> Answers:
    """The answers, those that are missing asked for on the terminal."""
    model = answers.model or _choice("Model", sorted({model for model, _ in known}), "emoji")
    methods = sorted(method for name, method in known if name == model)
    method = answers.method or _choice("Method", methods, "srpo" if "srpo" in methods else (*methods, "srpo")[0])
    card = answers.card or typer.prompt("Card (a name, or its GiB; empty = this machine)", default="") or None
    positive, negative, reward = answers.positive, answers.negative, answers.reward
    if not (positive or negative or reward):
        positive = Words(typer.prompt("Words that pictures should match better (empty = none)", default=""))
        negative = Words(typer.prompt("Words that they should match less (empty = none)", default=""))
    if not reward:
        reward = typer.prompt("Reward (empty = as in the published recipe)", default="") or None
    prompts = answers.prompts
    if not (prompts or answers.prompt_list):
        prompts = typer.prompt("File of prompts (empty = the published recipe's)", default="") or None
    return Answers(model, method, card, positive, negative, reward, prompts, answers.prompt_list)


def _choice(what: str, choices: Sequence[str], default: str) -> str:
    return typer.prompt(f"{what} ({', '.join(choices)})", default=default)


def _check_free(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path} is there already; give another --out")


def _head(recipe: Recipe, path: Path, template: str, sentence: str) -> list[str]:
    lines = [
        f"# {recipe.algorithm.name} on {recipe.model.name}, begun with palate init from the published {template}",
        f"# palate train {in_shell(path)} --dry-run    what is missing, what it takes; then the same without --dry-run",
    ]
    if recipe.model.name != "emoji":
        facts = facts_of(recipe.model.name)
        lines.append(f"# Licence of the base model: {facts.licences.get(recipe.model.folder or '', facts.licence)}")
    return [*lines, f"# {sentence}."]
