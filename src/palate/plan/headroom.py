"""Whether a recipe's step has room on the device that it will run on, asked before anything large loads.

The sum is the plan's, which leaves out workspace, fragmentation and text encoders, so what it calls too large is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from palate.plan.activations import Unit
from palate.plan.memory import ALONE, OFFLOAD, Plan, memory_of, memory_savings, micro_batches, plan
from palate.plan.table import FREE, GIB
from palate.recipe import Recipe
from palate.runtime.environment import host_memory
from palate.runtime.errors import InputError

KEY = "run.check_memory"


class Room(NamedTuple):
    """A step's memory on one device, and what the device has. Bytes."""

    need: float
    have: float
    device: str  # "cpu", or the name of the accelerator
    remedies: tuple[tuple[str, float], ...] = ()  # changes of one key that make it fit, with the need after each
    nearest: tuple[str, float] | None = None  # where none of them does

    @property
    def fits(self) -> bool:
        """Whether the step can be held at all."""
        return self.need <= self.have

    @property
    def sentence(self) -> str:
        """What a step needs, and if that is too much, the remedies."""
        text = f"a step needs {_gib(self.need)} of {_gib(self.have)} GiB on {self.device}"
        if self.fits:
            return text
        listed = " or ".join(f"{name} ({_gib(value)} GiB)" for name, value in self.remedies)
        if listed:
            return f"{text}: set {listed}"
        if self.nearest is None:
            return f"{text}, and no key of the recipe would make it fit; use a smaller trainer.batch_size"
        return f"{text}; nothing makes it fit, the nearest is {self.nearest[0]}: {_gib(self.nearest[1])} GiB"


def room(recipe: Recipe, *, gpus: int | None = None, units: Mapping[str, Unit] | None = None) -> Room | None:
    """The room of a step of the recipe on this machine; None for a recipe that cannot be planned (an own model, hpsv3).

    gpus: how many share the batch; None = the ranks that this process is one of. Ranks without an accelerator share
    the memory of their machine. Random numbers are left as they are.
    """
    ranks = gpus or int(os.environ.get("WORLD_SIZE", 1))
    try:
        with torch.random.fork_rng(devices=[]):
            made = plan(recipe, gpus=ranks, units=units)
    except Exception as error:  # of parts of one's own too: what cannot be counted must not keep a run from starting
        logging.getLogger("palate").debug("the memory of a step is not known: %s", error)
        return None
    name, have = _device(recipe)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if name == "cpu" else 1
    if made.bytes * local <= have:
        return Room(made.bytes * local, have, name)
    need, budget = made.bytes * local, FREE * have / local
    savings = [(key, value) for key, value in memory_savings(recipe, made) if name != "cpu" or key != OFFLOAD]
    single = [(key, value) for key, value in savings if "=" in key and not key.startswith(("all ", "trainer.micro"))]
    if finer := _micro_batches(recipe, made, budget):
        single.insert(0, finer)
    fitting = tuple((key, value * local) for key, value in single if value <= budget)
    if fitting or not savings:
        return Room(need, have, name, fitting)
    nearest, value = min(savings, key=lambda pair: pair[1])
    if nearest.startswith("all "):
        left_out = (*ALONE, "model.quantize=int8")  # which go with none of the others; less than nf4 saves
        nearest = " ".join(key for key, _ in savings[:-1] if key not in left_out)
        if value <= budget:
            return Room(need, have, name, ((nearest, value * local),))
    return Room(need, have, name, (), (nearest, value * local))


def require_room(recipe: Recipe, *, gpus: int | None = None) -> None:
    """InputError: a step of the recipe cannot be held by the device; the message names what needs less."""
    if not recipe.run.check_memory:
        return
    found = room(recipe, gpus=gpus)
    if found is not None and not found.fits:
        raise InputError(
            f"{found.sentence}\n`palate plan` shows the sum for this recipe; {KEY}=false starts the run all the same"
        )


def _micro_batches(recipe: Recipe, made: Plan, budget: float) -> tuple[str, float] | None:
    """The fewest micro-batches with which a step fits, and its bytes; None where even single images do not."""
    for parts in micro_batches(recipe, made.gpus):
        changed = replace(recipe, trainer=replace(recipe.trainer, micro_batches=parts))
        value = sum(memory_of(changed, made.units, made.counts, made.gpus).values())
        if value <= budget:
            return f"trainer.micro_batches={parts}", value
    return None


def _device(recipe: Recipe) -> tuple[str, float]:
    """Name and bytes of the device that the recipe's model is put on."""
    own = "cuda" if torch.cuda.is_available() and recipe.model.name != "emoji" else "cpu"
    place = torch.device(recipe.model.device or own)
    if place.type == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(place)
        return found.name, float(found.total_memory)
    return "cpu", host_memory()


def _gib(value: float) -> str:
    gib = value / GIB
    return f"{gib:.0f}" if gib >= 10 else f"{gib:.2g}"
