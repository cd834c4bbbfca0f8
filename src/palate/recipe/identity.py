"""What a run was started with, by content: kept in its identity.json and compared whenever the run is used again.

The base model's files are compared by the checkpoints themselves, with their own fingerprint.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from palate.models.lora import find_file
from palate.recipe.cross_checks import rewards_used
from palate.recipe.reader import content_digest, fingerprint
from palate.recipe.settings import Recipe
from palate.recipe.start import UsesTeachers, start_folder, teachers_of, wants_consistency
from palate.rewards import table as rewards
from palate.runtime.code import code_digest, names_a_file, short_name
from palate.runtime.errors import InputError
from palate.runtime.files import file_digest, json_digest, parse_json

FILE = "identity.json"
WEIGHTS = "*.safetensors"


def identity(recipe: Recipe) -> dict[str, str]:
    """Key of the recipe -> SHA-256 of what it names: prompts, images, pairs, likes, code, weights of rewards, frozen
    LoRAs."""
    prompts, found = recipe.prompts, {}
    named = {"file": prompts.file, "images": prompts.images, "pairs": prompts.pairs, "likes": prompts.likes}
    for key, path in named.items():
        if path is not None and Path(path).exists():
            found[f"prompts.{key}"] = content_digest(path) or ""
    for key, name in (("model.name", recipe.model.name), ("algorithm.name", recipe.algorithm.name)):
        if names_a_file(name):
            found[key] = code_digest(name)
    for name in sorted(rewards_used(recipe.reward)):
        if names_a_file(name):
            found[f"reward {short_name(name)}"] = code_digest(name)
        elif rewards.find(name).kind == "published" and name in recipe.reward.source:
            found[f"reward.source.{name}"] = weights_digest(recipe.reward.source[name])
        elif name == "checklist" and (source := recipe.reward.source.get(name)):
            found["reward.source.checklist"] = content_digest(source.rpartition(" ")[0]) or ""
    return found | frozen(recipe)


def frozen(recipe: Recipe) -> dict[str, str]:
    """Likewise of the LoRAs that a run reads anew whenever it goes on, and of what its teachers teach; a LoRA that is
    not there has no digest. A start that is no reference is read once: the checkpoints have what became of it."""
    model = recipe.model
    loras = [("model.training_adapter", model.training_adapter)]
    loras += [(key, adapter) for _, key, adapter in teachers_of(recipe)]
    loras += [("model.start", str(start_folder(model.start)))] if model.start and model.reference == "start" else []
    loras += [("model.consistency", model.consistency)] if wants_consistency(recipe) else []
    found: dict[str, str] = {}
    for key, source in loras:
        with contextlib.suppress(InputError):
            found |= {key: file_digest(find_file(source, key))} if source is not None else {}
    for name, teacher in recipe.algorithm.teachers.items() if isinstance(recipe.algorithm, UsesTeachers) else ():
        path = getattr(teacher, "file", None)
        if path is not None and Path(path).is_file():
            found[f"algorithm.teachers.{name}.file"] = file_digest(Path(path))
    return found


def run_identity(recipe: Recipe) -> str:
    """What a resumed run must share: the settings that decide its numbers, and the weights of its rewards."""
    weights = {key: value for key, value in identity(recipe).items() if key.startswith("reward.source.")}
    return json_digest([fingerprint(recipe), weights]) if weights else fingerprint(recipe)


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
        f"{key}: what it names has changed since the run began ({before[key][:12]}, now {now[key][:12]})"
        for key in before
        if key in now and before[key] != now[key]
    ]


def check_identity(folder: Path, recipe: Recipe) -> None:
    """InputError: something that the run in `folder` was started with has changed."""
    if changed := changes(folder, recipe):
        raise InputError("\n".join([*changed, "restore it, or start a new run"]))
