"""The model card of an export, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from palate import recipe as recipes
from palate.models.facts import facts_of
from palate.models.original import Lora
from palate.recipe.reader import to_share
from palate.runtime.files import write_atomically
from palate.runtime.result import evaluation_of

CARD = "README.md"
PICTURES, SIDES = "pictures", ("base", "result")  # pictures/base-0000.png, beside the card that shows it

USE = {
    "diffusers": "pipe.load_lora_weights(folder)",
    "kohya": "place the file in the LoRA folder of your program",
    "comfyui": "place the file in ComfyUI/models/loras",
    "merged": "diffusers' class of the network: from_pretrained(folder)",
}
LICENCE_IDS = ("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m")  # that the hub knows


def model_card(
    run: Path,
    recipe: Any,
    form: str,
    layers: Mapping[str, Lora] | None,
    words: Mapping[str, str] | None,
) -> str:
    """Markdown under a YAML head: base model, licence, metrics before and after, how to load it, the recipe. layers: of
    the LoRA; None where every weight was trained."""
    base = base_name(recipe)
    metrics = metrics_of(run)
    content = "\n".join(
        [
            "---",
            card_data(run, recipe, form, metrics).to_yaml(),
            "---",
            "",
            f"# {_what(recipe, form)} of {base}, trained with {recipe.algorithm.name}",
            "",
            *_how_to_load(recipe, form, layers, words),
            *_table(metrics),
            "```yaml",
            to_share(recipe).rstrip(),
            "```",
            "",
        ]
    )
    return str(ModelCard(content))


def write_card(folder: Path, text: str) -> None:
    """Write an export's README.md, and take away the pictures of an earlier card, which this one does not show."""
    for side in SIDES:
        for picture in (folder / PICTURES).glob(f"{side}-*.png"):
            picture.unlink()
    write_atomically(folder / CARD, text.encode())


def _what(recipe: Any, form: str) -> str:
    if recipe.model.weights == "full":
        return "Fully trained network"
    return "Merged LoRA" if form == "merged" else "LoRA"


def base_name(recipe: Any) -> str:
    """The base model as others know it: its hub id, or the last part of a local path, which says nothing of a disk."""
    folder = recipe.model.folder
    if recipe.model.file:
        return Path(recipe.model.file).name
    if not folder:
        return recipe.model.name
    local = Path(folder).expanduser().exists() or folder.startswith((".", "/", "~")) or folder.count("/") != 1
    return Path(folder).name if local else folder


def metrics_of(run: Path) -> dict[str, tuple[float, float]]:
    """Metric -> (before, after), of the run's evaluation; {} without one, or where it was of an earlier result."""
    evaluation = evaluation_of(run)
    found = evaluation.get("metrics", {}) if evaluation and not evaluation["outdated"] else {}
    both = {name: (m.get("base"), m.get("value")) for name, m in found.items()}
    return {name: (base, value) for name, (base, value) in both.items() if base is not None and value is not None}


def card_data(run: Path, recipe: Any, form: str, metrics: Mapping[str, tuple[float, float]]) -> ModelCardData:
    """The YAML head: licence, base model, tags and results. The licence is the base model's, where it is known."""
    facts = facts_of(recipe.model.name)
    base = recipe.model.file or recipe.model.folder or recipe.model.name  # of a file nobody knows the licence
    known = base.count("/") == 1 and not recipe.model.file and not base.startswith((".", "/", "~"))
    licence = facts.licences.get(base)
    named = licence is None or licence in LICENCE_IDS
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name="prompts of the recipe",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, (_, value) in metrics.items()
    ]
    return ModelCardData(
        license=licence if named and licence else "other",
        license_name=None if named else licence,
        base_model=base if known else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["palate", *(["lora"] if form != "merged" else []), "text-to-image", recipe.algorithm.name],
        model_name=run.resolve().name,
        eval_results=results or None,
    )


def _how_to_load(
    recipe: Any, form: str, layers: Mapping[str, Lora] | None, words: Mapping[str, str] | None
) -> list[str]:
    said = [f"{side}: {text}" for side, text in (words or {}).items() if text]
    facts = facts_of(recipe.model.name)
    return [
        f"Format {form}, {_trained(layers)}. To load: `{USE[form]}`.",
        "",
        *([f"Trained towards these words: {'; '.join(said)}.", ""] if said else []),
        *_beginning(recipe),
        f"Base model: {base_name(recipe)}. Its licence holds for this file too; the published {facts.name} is under: "
        f"{facts.licence}.",
        "",
    ]


def _trained(layers: Mapping[str, Lora] | None) -> str:
    if not layers:
        return "every weight trained"
    ranks, alphas = sorted({lora.rank for lora in layers.values()}), sorted({lora.alpha for lora in layers.values()})
    return f"rank {', '.join(map(str, ranks))}, alpha {', '.join(f'{alpha:g}' for alpha in alphas)}"


def _beginning(recipe: Any) -> list[str]:
    reference = recipes.reference_of(recipe)
    if reference is None:
        return []
    return [f"Begun with the LoRA {Path(recipe.model.start).name}; held to, and compared with, {reference}.", ""]


def _table(metrics: Mapping[str, tuple[float, float]]) -> list[str]:
    if not metrics:
        return ["Not evaluated: `palate evaluate` writes the metrics before and after.", ""]
    rows = [f"| {name} | {base:.3f} | {value:.3f} |" for name, (base, value) in metrics.items()]
    return ["| metric | before | after |", "|---|---|---|", *rows, ""]
