"""What a run was started with, by content: kept in its identity.json and compared whenever the run is used again.

The base model's files are compared by the checkpoints themselves, with their own fingerprint.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from palate.models.lora import find_file
from palate.recipe.cross_checks import rewards_used, stands_on_tower
from palate.recipe.reader import content_digest, fingerprint
from palate.recipe.relocation import Moves
from palate.recipe.settings import Recipe
from palate.recipe.start import UsesTeachers, adapters_of, start_folder
from palate.rewards import table as rewards
from palate.rewards.table import HELD_OUT_CANDIDATES
from palate.runtime.code import code_digest, names_a_file, short_name
from palate.runtime.errors import InputError
from palate.runtime.files import file_digest, json_digest, parse_json
from palate.taste.saved import parts_of

FILE = "identity.json"
WEIGHTS = "*.safetensors"
KEY = "reward.source."
DIGEST = re.compile("[0-9a-f]{64}")


def identity(recipe: Recipe) -> dict[str, str]:
    """Key of the recipe -> SHA-256 of what it names: prompts, images, pairs, likes, code, what rewards are made of,
    frozen LoRAs; of a judge behind a URL the name of its model, whose address may change."""
    prompts, found = recipe.prompts, {}
    named = {"file": prompts.file, "images": prompts.images, "pairs": prompts.pairs, "likes": prompts.likes}
    for key, path in named.items():
        if path is not None and Path(path).exists():
            found[f"prompts.{key}"] = content_digest(path) or ""
    for key, name in (("model.name", recipe.model.name), ("algorithm.name", recipe.algorithm.name)):
        if names_a_file(name):
            found[key] = code_digest(name)
    if recipe.optimize is not None and (function := recipe.optimize.oracle.function) is not None:
        found["optimize.oracle.function"] = code_digest(function)
    for name in sorted(filter(names_a_file, rewards_used(recipe.reward))):
        found[f"reward {short_name(name)}"] = code_digest(name)
    return found | weights_of_rewards(recipe) | other_sources(recipe) | frozen(recipe)


def weights_of_rewards(recipe: Recipe) -> dict[str, str]:
    """Likewise of published rewards and of the questions of a checklist: in the checkpoints' identity as well."""
    sources, found = recipe.reward.source, {}
    for name in sorted(rewards_used(recipe.reward) & sources.keys()):
        if name == "checklist":
            found[KEY + name] = content_digest(sources[name].rpartition(" ")[0]) or ""
        elif rewards.find(name).kind == "published":
            found[KEY + name] = weights_digest(sources[name])
    return found


def other_sources(recipe: Recipe) -> dict[str, str]:
    """Likewise of what else reward.source names: a taste, what it or a head stands on, the model of a judge, what a
    reward of one's own is given. Where a server is does not count."""
    sources, used, found = recipe.reward.source, rewards_used(recipe.reward), {}
    for name in sorted(used & sources.keys()):
        if name == "taste":
            found[KEY + name] = json_digest([[weights_digest(part), share] for part, share in parts_of(sources[name])])
        elif name in ("vlm-judge", "checklist"):
            found[f"{KEY}{name} model"] = sources[name].rpartition(" ")[2].partition("#")[2]
        elif rewards.find(name).kind == "external" and "://" not in sources[name]:
            found[KEY + short_name(name)] = content_digest(sources[name]) or ""
    bases = sorted({*HELD_OUT_CANDIDATES} & sources.keys() - used) if stands_on_tower(recipe) else []
    return found | {KEY + base: weights_digest(sources[base]) for base in bases}


def frozen(recipe: Recipe) -> dict[str, str]:
    """Likewise of the LoRAs that a run reads anew whenever it goes on, and of what its teachers teach; a LoRA that is
    not there has no digest. A start that is no reference is read once: the checkpoints have what became of it."""
    model = recipe.model
    loras = adapters_of(recipe)
    loras += [("model.start", str(start_folder(model.start)))] if model.start and model.reference == "start" else []
    found: dict[str, str] = {}
    for key, source in loras:
        with contextlib.suppress(InputError):
            found[key] = file_digest(find_file(source, key))
    for name, teacher in recipe.algorithm.teachers.items() if isinstance(recipe.algorithm, UsesTeachers) else ():
        path = getattr(teacher, "file", None)
        if path is not None and Path(path).is_file():
            found[f"algorithm.teachers.{name}.file"] = file_digest(Path(path))
    return found


def run_identity(recipe: Recipe, moves: Moves | None = None) -> str:
    """What a resumed run must share: the settings that decide its numbers, and the weights of its rewards. moves: as
    of `fingerprint`."""
    weights = weights_of_rewards(recipe)
    settings = fingerprint(recipe, moves)
    return json_digest([settings, weights]) if weights else settings


def weights_digest(source: str) -> str:
    """SHA-256 of the weights at a file, in a folder, or of a hub id in the local cache; else the id itself."""
    path = Path(source).expanduser()
    if not path.exists() and source.count("/") == 1:
        cached = try_to_load_from_cache(source, "model.safetensors")
        path = Path(cached) if isinstance(cached, str) else path
    if path.is_file():
        return file_digest(path)
    digests = [file_digest(each) for each in sorted(path.glob(WEIGHTS))] if path.is_dir() else []
    return digests[0] if len(digests) == 1 else json_digest(digests) if digests else source


def identity_text(recipe: Recipe) -> str:
    """The text of identity.json."""
    return json.dumps(identity(recipe), indent=1, sort_keys=True) + "\n"


def changes(folder: Path, recipe: Recipe) -> list[str]:
    """What has changed since the run in `folder` began, a sentence each; empty for a run that kept no identity."""
    try:
        before = parse_json((folder / FILE).read_bytes())
        if not isinstance(before, dict) or not all(isinstance(digest, str) for digest in before.values()):
            raise ValueError("expected texts by name")
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise InputError(f"{folder / FILE}: not what a run keeps ({error}); delete it to go on without it") from error
    now = identity(recipe)
    return [
        f"{key}: what it names has changed since the run began ({_short(before[key])}, now {_short(now[key])})"
        for key in before
        if key in now and before[key] != now[key]
    ]


def _short(name: str) -> str:
    """The first digits of a digest; a name, as that of a model, whole."""
    return name[:12] if DIGEST.fullmatch(name) else name


def check_identity(folder: Path, recipe: Recipe) -> None:
    """InputError: something that the run in `folder` was started with has changed."""
    if changed := changes(folder, recipe):
        raise InputError("\n".join([*changed, "restore it, or start a new run"]))
