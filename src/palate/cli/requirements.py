"""`palate doctor RECIPE`: every file that a recipe needs, its size, licence and gate; disk and memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_token, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from palate import recipe as recipes
from palate.cli.doctor import Finding
from palate.models import families
from palate.models.facts import Facts, HasFacts, facts_of
from palate.models.source import published_base
from palate.plan import GIB, Plan, plan
from palate.plan.table import find_device
from palate.recipe import Recipe
from palate.recipe.objective import check_taste
from palate.recipe.pictures import pictures_of
from palate.rewards.located import cached, located
from palate.rewards.published import PUBLISHED
from palate.runtime.errors import InputError
from palate.runtime.files import nearest_existing, parse_json
from palate.taste.saved import parts_of, source_of

GATED = ("black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3")  # beginnings of hub ids behind terms
VAE_GIGABYTES = 0.17


class Requirement(NamedTuple):
    """One thing that must be there. state: ok, missing, bad or note; `command` makes a missing one right."""

    state: str
    what: str
    text: str
    command: str = ""
    gigabytes: float = 0.0  # still to download

    def finding(self) -> Finding:
        """As `palate doctor` prints it."""
        return Finding(self.state, f"{self.what}: {self.text}" + (f"\n        {self.command}" if self.command else ""))


def requirements(recipe: Recipe, device: str | None = None) -> Iterator[Requirement]:
    """Everything, in the order in which a run would ask for it."""
    try:
        made, why = plan(recipe), ""
    except InputError as error:  # an own model, a reward that has to be loaded: their files are listed all the same
        made, why = None, str(error)
    yield from files_required(recipe, made)
    yield _memory(made, device) if made else Requirement("note", "memory", f"not known: {why}")


def files_required(recipe: Recipe, made: Plan | None) -> Iterator[Requirement]:
    """What must lie on the disk. made: the recipe's plan; None where it cannot be planned."""
    found = [*_model(recipe, made), *_rewards(recipe), *_prompts(recipe)]
    yield from found
    yield from _disk(sum(each.gigabytes for each in found))


# --- model ------------------------------------------------------------------------------------------------------------


def _model(recipe: Recipe, made: Plan | None) -> Iterator[Requirement]:
    if recipe.model.name == "emoji":
        yield Requirement("ok", "model emoji", "in the package, Apache-2.0")
        return
    if not isinstance(families.find(recipe.model.name).load_class(), HasFacts):
        yield Requirement("ok", f"model {recipe.model.name}", "read by a class of its own")
        return
    if recipe.model.file is not None and not Path(recipe.model.file).expanduser().is_file():
        yield Requirement("bad", "model.file", f"{recipe.model.file} does not exist")
    facts, folder = facts_of(recipe.model.name), recipe.model.folder
    if folder is None and recipe.model.file is not None:
        folder = published_base(Path(recipe.model.file).expanduser(), recipe.model.name)
    what = f"model {folder}"
    if folder is None:
        yield Requirement("bad", f"model {recipe.model.name}", "model.folder names no diffusers folder or hub id")
        return
    if Path(folder).expanduser().is_dir():
        lacking = [part for part in facts.parts if not (Path(folder).expanduser() / part).is_dir()
                   and part not in facts.optional]  # fmt: skip
        text = f"lacks {', '.join(lacking)}; {_why(Path(folder), lacking)}" if lacking else "a local folder"
        yield Requirement("bad" if lacking else "ok", what, f"{text}; licence of {facts.name}: {facts.licence}")
        return
    text_parameters = facts.published.text_parameters if facts.published else 0.0
    denoiser = made.units["denoiser"].parameters / 1e9 if made else 0.0
    size = (denoiser + text_parameters) * 2 + VAE_GIGABYTES
    licence = facts.licences.get(folder, facts.licence)
    try:
        validate_repo_id(folder)
    except HFValidationError:
        yield Requirement("bad", what, "is no folder here, and no hub id (owner/name)")
        return
    missing = [part for part in facts.parts if not _cached_part(folder, part)]
    if not missing:
        yield Requirement("ok", what, f"in the hub's cache; licence {licence}")
        return
    yield Requirement(
        "missing", what, f"{', '.join(missing)}, about {size:.0f} GB in all; licence {licence}",
        f"hf download {folder} {' '.join(f'--include {pattern}' for pattern in _patterns(facts))}", size,
    )  # fmt: skip
    if folder.startswith(GATED):
        yield Requirement(
            "note" if get_token() else "missing",
            f"access to {folder}",
            "gated: its terms are accepted once, at https://huggingface.co/" + folder,
            "" if get_token() else "hf auth login",
        )


def _why(folder: Path, lacking: list[str]) -> str:
    """Why parts are not in a local folder, as far as its own index tells."""
    try:
        parts = parse_json((folder.expanduser() / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "it holds no model_index.json, so it is no diffusers folder, or its download is incomplete"
    named = isinstance(parts, dict) and set(lacking) & set(parts)
    return "the download is incomplete" if named else "it is a folder of another family; see docs/models.md"


def _patterns(facts: Facts) -> list[str]:
    return ["model_index.json", *(f"'{part}/*'" for part in facts.parts)]


def _cached_part(repository: str, part: str) -> bool:
    """Whether the hub's cache holds a part: its configuration, or a tokenizer's or scheduler's own small file."""
    names = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
    found = [path for name in names
             if isinstance(path := try_to_load_from_cache(repository, f"{part}/{name}"), str)]  # fmt: skip
    if not found:
        return False
    if Path(found[0]).name != "config.json":
        return True
    return any(Path(found[0]).parent.glob("*.safetensors"))


# --- rewards ----------------------------------------------------------------------------------------------------------


def _rewards(recipe: Recipe) -> Iterator[Requirement]:
    settings = recipe.reward
    used = list(settings.weights or ([settings.name] if settings.name else []))
    judge = recipes.heldout_of(recipe) if recipe.model.name != "emoji" else None
    sources = settings.source or {}
    if "taste" in used:
        yield from _taste(recipe)
    for name in used:
        if name == "taste":
            continue
        yield _reward(f"reward {name}", name, sources.get(name))
    if judge:  # training goes on without it
        found = _reward(f"held-out reward {judge}", judge, sources.get(judge))
        missing = found.state == "missing"
        yield found._replace(state="note", text=f"trains without it; {found.text}", gigabytes=0.0) if missing else found


def _taste(recipe: Recipe) -> Iterator[Requirement]:
    """The taste, and the published reward that it stands on."""
    sources = recipe.reward.source
    try:
        check_taste(recipe.reward, recipe.model.name)
        bases = {source_of(folder) for folder, _ in parts_of(sources.get("taste"))}
    except InputError as error:
        yield Requirement("bad", "reward taste", str(error))
        return
    yield Requirement("ok", "reward taste", sources["taste"])
    for base in sorted(bases & PUBLISHED.keys()):
        yield _reward(f"reward {base}, on which the taste stands", base, sources.get(base))


def _reward(what: str, name: str, source: str | None) -> Requirement:
    known = PUBLISHED.get(name)
    if known is None:
        return Requirement("ok", what, source or "nothing to download")
    note = f"; {known.note}" if known.note else ""
    if source and Path(source).expanduser().exists():
        return Requirement("ok", what, f"{source}; licence {known.licence}{note}")
    if here := located(name):
        command = f"add reward.source.{name}={here}"
        return Requirement(
            "missing", what, f"fetched, but the recipe does not name it; licence {known.licence}", command
        )
    place = known.weights._replace(place=source or known.weights.place)
    if name != "hpsv3" and cached(known._replace(weights=place)):
        return Requirement("ok", what, f"in the hub's cache; licence {known.licence}{note}")
    return Requirement(
        "missing", what, f"about {known.gigabytes:.2f} GB; licence {known.licence}{note}", f"palate fetch {name}",
        known.gigabytes,
    )  # fmt: skip


# --- the rest ---------------------------------------------------------------------------------------------------------


def _prompts(recipe: Recipe) -> Iterator[Requirement]:
    try:
        pictures = pictures_of(recipe)
        training, preview = recipes.prompts_of(recipe, pictures.prompts if pictures else None)
    except (InputError, OSError) as error:
        yield Requirement("bad", "prompts", str(error).splitlines()[0])
        return
    yield Requirement("ok", "prompts", f"{len(training)} to train on, {len(preview)} for previews")


def _disk(download: float) -> Iterator[Requirement]:
    free = shutil.disk_usage(nearest_existing(Path(HF_HUB_CACHE))).free / 1e9
    text = f"{free:.0f} GB free in the hub's cache ({HF_HUB_CACHE}), {download:.1f} GB still to download"
    yield Requirement("ok" if free > download * 1.05 + 1 else "bad", "disk", text)


def _memory(made: Plan, device: str | None) -> Requirement:
    name, card = find_device(device)
    need, room = made.bytes / GIB, card.room / GIB
    text = f"{need:.1f} GiB per device for a step, {card.gib:.0f} GiB on {name}, of which {room:.0f} to use"
    if need <= room:
        return Requirement("ok", "memory", text)
    return Requirement("bad", "memory", text, "palate plan RECIPE says what needs less")
