"""The model card of an export, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from palate import recipe as recipes
from palate.models.facts import facts_of
from palate.models.original import Lora
from palate.runtime.result import evaluation_of

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
    """Markdown under a YAML head: base model, licence, metrics before and after, how to load it, the recipe."""
    base = base_name(recipe)
    metrics = metrics_of(run)
    content = "\n".join(
        [
            "---",
            card_data(run, recipe, metrics).to_yaml(),
            "---",
            "",
            f"# {'Merged LoRA' if form == 'merged' else 'LoRA'} of {base}, trained with {recipe.algorithm.name}",
            "",
            *_how_to_load(recipe, form, layers, words),
            *_table(metrics),
            "```yaml",
            recipes.dump(recipe).rstrip(),
            "```",
            "",
        ]
    )
    return str(ModelCard(content))


def base_name(recipe: Any) -> str:
    """The base model as others know it: its hub id, or the last part of a local path, which says nothing of a disk."""
    folder = recipe.model.folder
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


def card_data(run: Path, recipe: Any, metrics: Mapping[str, tuple[float, float]]) -> ModelCardData:
    """The YAML head: licence, base model, tags and results. The licence is the base model's, where it is known."""
    facts, base = facts_of(recipe.model.name), recipe.model.folder or recipe.model.name
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
        base_model=base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["palate", "lora", "text-to-image", recipe.algorithm.name],
        model_name=run.resolve().name,
        eval_results=results or None,
    )


def _how_to_load(
    recipe: Any, form: str, layers: Mapping[str, Lora] | None, words: Mapping[str, str] | None
) -> list[str]:
    ranks = sorted({lora.rank for lora in layers.values()}) if layers else [recipe.model.lora_rank]
    alphas = sorted({lora.alpha for lora in layers.values()}) if layers else [recipe.model.lora_alpha or ranks[0]]
    said = [f"{side}: {text}" for side, text in (words or {}).items() if text]
    facts = facts_of(recipe.model.name)
    return [
        f"Format {form}, rank {', '.join(map(str, ranks))}, alpha {', '.join(f'{a:g}' for a in alphas)}. "
        f"To load: `{USE[form]}`.",
        "",
        *([f"Trained towards these words: {'; '.join(said)}.", ""] if said else []),
        *_beginning(recipe),
        f"Base model: {base_name(recipe)}. Its licence holds for this file too; the published {facts.name} is under: "
        f"{facts.licence}.",
        "",
    ]


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
