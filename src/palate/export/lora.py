"""The LoRA of a run as a file for other programs, and the network with it merged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from palate import recipe as recipes
from palate.export.card import CARD, base_name, model_card, write_card
from palate.export.names import FORMATS, to_form
from palate.export.workflow import workflow_text
from palate.models.adapters import layers_of
from palate.models.facts import Facts, facts_of
from palate.models.lora import FILE, METADATA, write
from palate.models.original import Lora
from palate.models.saved import save_network
from palate.recipe import Recipe, reader
from palate.runtime.errors import InputError
from palate.runtime.files import new_folder, write_atomically

MAX_SHARD_SIZE = "10GB"  # diffusers' own
RECIPE = "recipe.yaml"  # beside an export: the run's own
WORKFLOW = "workflow.json"  # beside a LoRA for ComfyUI
RUN_NAME = "ss_output_name"  # of a file's metadata: kohya's key for the name that a LoRA was written under

Words = Mapping[str, str]  # "positive", "negative": the control words at the end of the run


def lora_file(run: Path, form: str) -> str:
    """The file's name: diffusers looks for its own; other programs list files by name, so there it is the run's."""
    return FILE if form == "diffusers" else f"{run.resolve().name}.safetensors"


def export_lora(
    run: Path, form: str, out: Path | None = None, words: Words | None = None, *, recipe: Recipe | None = None
) -> Path:
    """Write the LoRA of a finished run as `names` says; the folder written to, `run`/export/`form` if left out.
    recipe: the run's, where it has been read already."""
    return write_lora(run, form, out, words, recipe=recipe)[0].parent


def write_lora(
    run: Path, form: str, out: Path | None = None, words: Words | None = None, *, recipe: Recipe | None = None
) -> list[Path]:
    """`export_lora`; the files that it wrote, the LoRA first."""
    if form not in FORMATS:
        raise InputError(f"--format: got {form!r}; expected one of {', '.join(FORMATS)}, merged")
    recipe = recipe or _recipe(run)
    if recipe.model.weights != "lora":
        raise InputError(f"{run} trained the full model; its network is in {run / 'adapter'}, for from_pretrained")
    facts = facts_of(recipe.model.name)
    if recipe.model.name == "emoji" and form != "diffusers":
        raise InputError(f"--format {form}: no other program loads the embedded model; use diffusers")
    layers = read_adapter(run / "adapter")
    tensors, extra = to_form(layers, form, facts)
    metadata = {"format": "pt", **extra, **describe(run, recipe, layers, words)}
    folder = run / "export" / form if out is None else out
    texts = {CARD: model_card(run, recipe, form, layers, words), RECIPE: reader.to_share(recipe)}
    if form == "comfyui" and (graph := workflow_text(recipe, lora_file(run, form))) is not None:
        texts[WORKFLOW] = graph
    if out is not None:
        _check_others(out, texts, metadata[RUN_NAME])
    write(folder / lora_file(run, form), tensors, metadata)
    write_card(folder, texts[CARD])
    for name in texts.keys() - {CARD}:
        write_atomically(folder / name, texts[name].encode())
    return [folder / lora_file(run, form), *(folder / name for name in texts)]


def _check_others(folder: Path, names: Iterable[str], run: str) -> None:
    """InputError: the folder holds a file of one of the names that no export of a LoRA wrote, or the LoRA of another
    run than the one of that name, whose card and recipe are there."""
    for file in sorted(folder.glob("*.safetensors")):
        if (other := _run_of(file)) not in (None, run):
            raise InputError(
                f"--out: {folder} holds {file.name} of the run {other}, whose {' and '.join(names)} would be written "
                "over; name a folder of its own in it"
            )
    card = folder / CARD
    if card.is_file() and re.search(r"^# LoRA of .*, trained with ", card.read_text("utf-8", "replace"), re.MULTILINE):
        return
    if there := next((name for name in names if (folder / name).exists()), None):
        raise InputError(f"--out: {folder} holds a {there} that would be written over; name a folder of its own in it")


def _run_of(file: Path) -> str | None:
    """The run whose LoRA an export wrote into the file; None for every other file."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return metadata.get(RUN_NAME) if "palate.version" in metadata else None


def export_merged(
    run: Path,
    model: Any,
    out: Path | None = None,
    *,
    recipe: Recipe | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Path:
    """The trained network of a run with its LoRA added to the weights, as a diffusers folder; `model` is the run's, and
    `recipe`, where it has been read already. max_shard_size: of one file, as diffusers takes it ("10GB"); a larger
    network is written as several, with an index. Without `out`, `run`/export/merged is replaced, once it is whole."""
    recipe = recipe or _recipe(run)
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|KiB|MiB|GiB)", max_shard_size):
        raise InputError(f"--max-shard-size: expected for example 10GB or 500MB, got {max_shard_size!r}")
    if out is None:
        folder = run / "export" / "merged"
        with new_folder(folder) as whole:
            export_merged(run, model, whole, recipe=recipe, max_shard_size=max_shard_size)
        return folder
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out: {out} is not empty; give a new folder")
    layers = layers_of(model.weights.network, "policy") if recipe.model.weights == "lora" else None
    part = out / facts_of(recipe.model.name).denoiser
    save_network(model.weights.merged(), part, max_shard_size=max_shard_size)
    write_card(out, model_card(run, recipe, "merged", layers, None))
    write_atomically(out / RECIPE, reader.to_share(recipe).encode())
    return out


def describe(run: Path, recipe: Recipe, layers: Mapping[str, Lora], words: Words | None) -> dict[str, str]:
    """What the file says of itself: palate's own keys, kohya's, and those of the modelspec standard that lists show."""
    ranks, alphas = sorted({lora.rank for lora in layers.values()}), sorted({lora.alpha for lora in layers.values()})
    said = {side: text for side, text in (words or {}).items() if text}
    facts: Facts = facts_of(recipe.model.name)
    wanted = "".join(f"; {side}: {text}" for side, text in said.items())
    inputs = {name: lora.down.shape[1] for name, lora in layers.items()}
    return {
        "palate.version": version("palate"),
        "palate.recipe": recipes.fingerprint(recipe),
        "palate.algorithm": recipe.algorithm.name,
        "palate.base_model": base_name(recipe),
        "palate.family": recipe.model.name,
        "palate.rank": ",".join(map(str, ranks)),
        "palate.alpha": ",".join(f"{alpha:g}" for alpha in alphas),
        **{f"palate.{side}": text for side, text in said.items()},
        "ss_network_dim": str(ranks[-1]),
        "ss_network_alpha": f"{alphas[-1]:g}",  # where kohya's tools look
        RUN_NAME: run.resolve().name,
        "modelspec.title": run.resolve().name,
        "modelspec.architecture": f"{facts.name}/lora",
        "modelspec.description": f"{recipe.algorithm.name} on {facts.name}{wanted}",
        **(facts.listed_as(inputs) if facts.listed_as else {}),
    }


def read_adapter(folder: Path) -> dict[str, Lora]:
    """Layer path -> its LoRA, from what a run wrote; alpha from the file's own metadata."""
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no {FILE}, which a run writes at its end: finish the run first")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in list(file.keys())}
        config = json.loads(metadata[METADATA])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is not a LoRA that a run wrote ({error or type(error).__name__}); delete {folder}, and "
            "palate export makes it again from the newest checkpoint"
        ) from error
    if config.get("use_rslora"):
        raise InputError(f"{path} is a rank-stabilised LoRA; only plain ones and DoRA can be exported")
    alphas = config.get("alpha_pattern") or {}
    layers, taken = {}, 0
    for name, down in tensors.items():
        layer, dot, kind = name.partition(".lora_A.")
        if not dot:
            continue
        up, magnitude = tensors.get(f"{layer}.lora_B.{kind}"), tensors.get(f"{layer}.lora_magnitude_vector")
        if up is None:
            raise InputError(f"{path}: {name} has no lora_B beside it")
        layers[layer] = Lora(down, up, float(alphas.get(layer, config["lora_alpha"])), magnitude)
        taken += 2 if magnitude is None else 3
    if taken != len(tensors):
        raise InputError(f"{path}: {len(tensors) - taken} of {len(tensors)} tensors belong to no LoRA layer")
    return layers


def _recipe(run: Path) -> Recipe:
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run} is not a run (it holds no recipe.yaml); give the folder of one, as runs/NAME")
    return recipes.read(str(run / "recipe.yaml"), stored=True)
