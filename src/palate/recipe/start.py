"""What training begins from: the model's folder, model.start, the consistency weights that some estimators need."""

from __future__ import annotations

import importlib.resources
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from palate.algorithms import table as algorithms
from palate.core import Model, TakesConsistency
from palate.data import RecipeError
from palate.models import families
from palate.models.facts import HasFacts
from palate.models.latents import ImageSize
from palate.models.lora import find_file
from palate.models.parts import LoadedModel
from palate.models.placement import check_compile
from palate.models.quantised import check_installed, require_bitsandbytes
from palate.models.repository import check_channels, open_repository
from palate.models.repository_checks import check_file
from palate.models.saved import FILES, adapter_file
from palate.models.sizes import shape_of
from palate.recipe.settings import Recipe
from palate.runtime.errors import InputError


@runtime_checkable
class UsesEstimator(Protocol):
    """Settings of an algorithm that may ask the model for its consistency weights."""

    @property
    def estimator(self) -> str: ...


@runtime_checkable
class UsesTeachers(Protocol):
    """Settings of an algorithm that learns from frozen adapters by name."""

    @property
    def teachers(self) -> Mapping[str, Any]:
        """Name -> an object with `adapter`, the folder of a LoRA."""


def check_named_files(recipe: Recipe) -> None:
    """That the weights which the recipe names beside the model's folder are there, whatever else is."""
    settings = recipe.model
    if settings.file is not None:
        check_file(Path(settings.file).expanduser())
    for key, adapter in adapters_of(recipe):
        find_file(adapter, key)
    start = None if settings.start is None else start_folder(settings.start)
    whole = start is not None and any((start / name).is_file() for name in FILES["full"])
    if start is not None and settings.weights == "lora" and not whole:
        find_file(start, "model.start")
    elif start is not None:
        try:
            adapter_file(start, settings.weights)
        except ValueError as error:
            raise RecipeError(f"model.start: {error}") from error


def check_start(recipe: Recipe) -> None:
    """The weights that the recipe names, and its LoRAs against the architecture of its folder, before weights load."""
    check_named_files(recipe)
    settings, family = recipe.model, families.find(recipe.model.name).load_class()
    if not isinstance(family, HasFacts) or (settings.folder is None and settings.file is None):
        return
    facts = family.facts
    if wants_consistency(recipe) and settings.consistency is None:
        raise RecipeError(
            "model.consistency: name the folder of an LCM-LoRA (pytorch_lora_weights.safetensors) "
            f"for {settings.name}, or use another algorithm.estimator: tweedie, rollout-2"
        )
    adapters = adapters_of(recipe)
    started = settings.start is not None and settings.weights == "lora"
    if not (started or adapters):
        return
    denoiser = facts.denoiser
    repository = open_repository(
        settings.folder,
        family=settings.name,
        parts={denoiser: facts.parts[denoiser]},
        options={"file": settings.file},
    )
    if started and settings.start is not None:
        repository.check_lora(facts, start_folder(settings.start), key="model.start", rank=settings.lora_rank)
    for key, adapter in adapters:
        repository.check_lora(facts, adapter, key=key)


def adapters_of(recipe: Recipe) -> list[tuple[str, str]]:
    """Key of the recipe and LoRA, of all that stay frozen beside the model."""
    model = recipe.model
    found = [("model.training_adapter", model.training_adapter)]
    found += [("model.consistency", model.consistency)] if wants_consistency(recipe) else []
    found += [(key, adapter) for _, key, adapter in teachers_of(recipe)]
    return [(key, adapter) for key, adapter in found if adapter is not None]


def check_folder(recipe: Recipe) -> None:
    """The model's folder or hub id, whole and of the family, and every image size that the recipe names, by its small
    files alone, and the packages that its keys need: before any weight loads, a reward's neither. InputError names the
    key."""
    settings, kind = recipe.model, families.find(recipe.model.name).load_class()
    check_installed(settings.quantize)
    if recipe.trainer.optimizer == "adamw8bit":
        require_bitsandbytes("trainer.optimizer=adamw8bit")
    if not (isinstance(kind, type) and issubclass(kind, LoadedModel)):
        return
    if settings.folder is None and settings.file is None:
        return
    facts = kind.facts
    if settings.compile:
        check_compile(facts.network)
    repository = open_repository(
        settings.folder,
        family=settings.name,
        parts=facts.parts,
        optional=facts.optional,
        options={"file": settings.file},
    )
    check_channels(repository, facts)
    for key, size in named_sizes(recipe):
        try:
            shape_of(repository, facts, size)
        except InputError as error:
            raise InputError(str(error).replace("model.image_size", key)) from error


def named_sizes(recipe: Recipe) -> list[tuple[str, ImageSize]]:
    """The image sizes that a recipe gives, each with its key."""
    given = [("model.image_size", recipe.model.image_size), ("sample.image_size", recipe.sample.image_size)]
    given += [("prompts.sizes", size) for size in recipe.prompts.sizes or ()]
    return [(key, size) for key, size in given if size is not None]


def reference_of(recipe: Recipe) -> str | None:
    """In words, what the policy of a run that begins with a LoRA is held to and compared with; None for other runs."""
    model = recipe.model
    if model.start is None or model.weights != "lora":
        return None
    return f"the base with the LoRA {Path(model.start).name}" if model.reference == "start" else "the base"


def load_consistency(recipe: Recipe, model: Model) -> None:
    """Give the model its consistency weights, if the algorithm asks for them."""
    if not wants_consistency(recipe):
        return
    if isinstance(model, TakesConsistency):
        model.load_consistency(recipe.model.consistency)
    else:
        model.weights.add_frozen(recipe.model.consistency, "consistency")  # type: ignore[attr-defined]


def teachers_of(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Name, key of the recipe and LoRA of each teacher; none where the algorithm learns from none."""
    teachers = recipe.algorithm.teachers if isinstance(recipe.algorithm, UsesTeachers) else {}
    return [(name, f"algorithm.teachers.{name}.adapter", teacher.adapter) for name, teacher in teachers.items()]


def wants_consistency(recipe: Recipe) -> bool:
    """Whether the algorithm asks the model for its consistency weights."""
    return isinstance(recipe.algorithm, UsesEstimator) and recipe.algorithm.estimator == "consistency"


@runtime_checkable
class InjectsNoise(Protocol):
    """An algorithm that trains on noise of its own, if the attribute is true: between the steps of a rollout, or put
    into finished images at any level."""

    injects_noise: bool


@runtime_checkable
class DrawsWithNoise(Protocol):
    """Settings of an algorithm whose rollouts are random with eta above 0."""

    @property
    def eta(self) -> float: ...


def is_distilled(recipe: Recipe) -> bool:
    """Whether the recipe's model is known to draw in few steps: by its folder's own word, or by its name."""
    model, family = recipe.model, families.find(recipe.model.name).load_class()
    if not isinstance(family, HasFacts):
        return False
    index = Path(model.folder or "").expanduser() / "model_index.json"
    told = index.read_text("utf-8", "replace") if model.folder is not None and index.is_file() else ""
    if re.search(r'"is_distilled": *true', told):
        return True
    pattern = family.facts.few_steps
    return bool(pattern) and re.search(pattern, f"{model.folder or ''} {model.file or ''}", re.IGNORECASE) is not None


def warn_of_noise(recipe: Recipe) -> None:
    """Say so when an algorithm that trains on noise of its own meets a model that was distilled to few steps."""
    algorithm = algorithms.find(recipe.algorithm.name).load_class()
    noisy = isinstance(algorithm, InjectsNoise) and algorithm.injects_noise
    noisy = noisy or (isinstance(recipe.algorithm, DrawsWithNoise) and recipe.algorithm.eta > 0)
    if noisy and recipe.model.training_adapter is None and is_distilled(recipe):
        logging.getLogger("palate").warning(
            "%s is distilled to few steps, and %s puts noise between them or into finished images, which such a model "
            "never saw: its images lose their detail and the training the model's speed. Use srpo, draft or distar, "
            "the model that it was distilled from, or model.training_adapter",
            recipe.model.file or recipe.model.folder,
            recipe.algorithm.name,
        )


def start_folder(start: str) -> Path:
    """A folder, or the name of one in the package."""
    packaged = importlib.resources.files("palate") / "assets" / start
    return Path(start) if Path(start).is_dir() or not packaged.is_dir() else Path(str(packaged))
