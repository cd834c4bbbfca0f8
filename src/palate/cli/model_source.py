"""What `palate sample` can draw with: a run, the embedded model, an exported generator, any base model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError

from palate.cli.options import recipe_file
from palate.core import Model, Sampler
from palate.export import load_one_step, one_step_folder
from palate.models import families
from palate.models.emoji import EmojiModel
from palate.models.facts import facts_of
from palate.models.repository import kinds_in
from palate.runs.folder import trained_model
from palate.runtime.errors import InputError, first_line
from palate.runtime.files import parse_json
from palate.runtime.hub import UNREACHED, hub_file

INDEX = "model_index.json"


def load_source(source: str) -> tuple[Model, Sampler | None]:
    """The model of that name, hub id or folder, and how it draws (None = as itself). InputError: no such one."""
    path = Path(source).expanduser()
    if source == "emoji" and not path.is_dir():
        return base_model(), None
    if exported := one_step_folder(source):
        return load_one_step(exported)
    if (path / INDEX).is_file() or (not path.exists() and source.count("/") == 1):
        return load_base(source), None
    if source in families.names() and not path.exists():
        known = next(iter(facts_of(source).licences), "owner/name")
        raise InputError(f"{source} is a family of models; give the folder or hub id of one, for example {known}")
    if not path.exists():
        raise InputError(
            f"{source}: there is no such model, run or folder; give emoji, emoji-1step, a run, a diffusers folder or a "
            "hub id"
        )
    return load_run(path)


def base_model() -> Model:
    """The embedded model, untrained."""
    return EmojiModel.load(training="none")


def load_run(run: Path) -> tuple[Model, Sampler | None]:
    """The result of a run; InputError where the folder is none."""
    return trained_model(recipe_file(run).parent, warn=logging.getLogger("palate").warning)


def load_base(source: str) -> Model:
    """A diffusers folder or hub id, untrained, by the family whose parts it holds."""
    index = _index(source)
    return families.find(family_of(index, source)).load_class().load(source, training="none")


def family_of(index: dict[str, Any], source: str) -> str:
    """The family whose parts model_index.json lists, the one with the most where several fit."""
    kinds = kinds_in(index)
    found: dict[str, int] = {}
    for name in families.names():
        facts = None if name == "emoji" else facts_of(name)
        if facts is None or kinds.get(facts.denoiser) != facts.parts[facts.denoiser]:
            continue  # other parts have more than one class: T5Tokenizer, T5TokenizerFast
        needed = [part for part in facts.parts if part not in facts.optional]
        if all(part in kinds for part in needed):
            found[name] = len(needed)
    if not found:
        held = ", ".join(sorted(kinds.values())) or "no parts"
        raise InputError(f"{source} is of no family that Palate knows ({held}); see docs/models.md")
    return max(found, key=lambda name: found[name])


def _index(source: str) -> dict[str, Any]:
    path = Path(source).expanduser() / INDEX
    try:
        if not path.is_file():
            path = hub_file(source, INDEX)
        found = parse_json(path.read_text("utf-8"))
    except (HFValidationError, *UNREACHED, ValueError) as error:
        raise InputError(
            f"{source} is no run, no folder with a {INDEX} and no hub id that can be reached ({first_line(error)}); "
            "give emoji, a run or a diffusers folder"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}; expected the index of a diffusers pipeline")
    return found
