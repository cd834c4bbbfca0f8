"""What must fit together in the section `model` of a recipe, before anything is looked for on the disk."""

from __future__ import annotations

from typing import Any

from palate.models import families
from palate.models.options import Options, check_placement
from palate.recipe.settings import ModelSettings
from palate.runtime.code import names_a_file, refused_call
from palate.runtime.errors import InputError


def check_model(model: ModelSettings, mistakes: list[str]) -> None:
    """Add to `mistakes` what the family does not read, and what the keys of `model` exclude of each other."""
    try:
        family = families.find(model.name)
        if names_a_file(model.name):
            _check_load(family.load_class(), mistakes)
        reads = [key for key in family.keys if key in vars(model)]
    except InputError as error:
        mistakes.append(str(error))
        return
    given = {key: value for key, value in vars(model).items() if value is not None}
    own = {key for name in families.names() for key in families.find(name).keys}
    for key in sorted((own & given.keys()) - set(reads)):
        mistakes.append(f"model.{key}: {model.name} does not read it; its own keys: {', '.join(reads) or 'none'}")
    if model.training_adapter is not None and model.weights != "lora":
        mistakes.append("model.training_adapter: it joins a LoRA; set model.weights=lora, or leave it out")
    _check_placement(model, mistakes)
    own_family = family.module.startswith("palate.models.") and model.name != "emoji"
    if own_family and model.folder is None and model.file is None:  # a single file knows its published base
        mistakes.append(f"model.folder: {model.name} needs a diffusers folder or a hub id, or model.file a checkpoint")


def _check_load(kind: Any, mistakes: list[str]) -> None:
    """Whether a class of one's own can be loaded as a recipe loads it."""
    load = getattr(kind, "load", None)
    problem = refused_call(load, None, **dict.fromkeys(families.GIVEN)) if callable(load) else "it has none"
    if problem:
        mistakes.append(
            f"model.name: {getattr(kind, '__name__', kind)}.load is called as (folder, {', '.join(families.GIVEN)}), "
            f"the latter by name, and with the keys of model that it has: {problem}"
        )


def check_lora_read(model: ModelSettings, mistakes: list[str]) -> None:
    """Add to `mistakes` what nothing would read of the start of a LoRA and its reference."""
    if model.reference == "start" and (model.start is None or model.weights != "lora"):
        mistakes.append(
            "model.reference: start is the base with the LoRA of model.start; name one, with model.weights=lora, or "
            "set model.reference=base"
        )
    if model.lora_init != "zero" and (model.weights != "lora" or model.start is not None):
        why = "the LoRA begins as that of model.start" if model.weights == "lora" else "model.weights=full has no LoRA"
        mistakes.append(f"model.lora_init: {why}; set model.lora_init=zero")


def _check_placement(model: ModelSettings, mistakes: list[str]) -> None:
    """Where frozen weights are."""
    try:
        check_placement(
            Options(
                training=model.weights,
                quantize=model.quantize,
                compile=bool(model.compile),
                offload=bool(model.offload),
                gradient_checkpointing=model.gradient_checkpointing is not False,
            )
        )
    except InputError as error:
        mistakes.append(str(error))
