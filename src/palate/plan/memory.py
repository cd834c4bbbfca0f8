"""The bytes of one GPU by term, what would need fewer, and what an update costs in all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from palate.models.quantised import BYTES
from palate.models.sizes import largest
from palate.plan.activations import Unit
from palate.plan.count import Counts, counts, takes_batch
from palate.plan.measure import family_of, local_config, measure
from palate.recipe import Recipe, trained_names
from palate.recipe.cross_checks import rewards_used
from palate.rewards import table as rewards
from palate.runtime.errors import InputError

OFFLOAD = "model.offload=true"
SHARDING = "trainer.sharding=full"
ALONE = (OFFLOAD, SHARDING)  # the first goes with none of 4 or 8 bits, the second with no LoRA and no 8-bit moments
MOMENTS = 2 * (1 + 4 / 256) / 4  # of adamw8bit, per byte of the parameters: a byte, and a scale for every 256
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Plan:
    """Of one update; memory of one GPU. FLOPs are multiply and add apart; bytes in `memory` are by term."""

    counts: Counts
    units: dict[str, Unit]
    flops: float  # all GPUs together
    memory: dict[str, float]
    gpus: int
    notes: tuple[str, ...] = ()

    @property
    def calls(self) -> dict[str, float]:
        """Images per update, all GPUs together."""
        return self.counts.calls

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def passes(self) -> float:
        """FLOPs in denoiser forwards of one image."""
        return self.flops / self.units["denoiser"].forward

    def seconds(self, tflops: float, utilisation: float) -> float:
        """Of one update, if every GPU reaches that share of its peak."""
        return self.flops / self.gpus / (tflops * 1e12 * utilisation)


def plan(recipe: Recipe, *, gpus: int = 1, units: Mapping[str, Unit] | None = None) -> Plan:
    """What an update of the recipe costs, of several image sizes at the largest. `units` measured before save the meta
    device another run. InputError: the batch cannot be cut into equal parts."""
    require_equal_parts(recipe, gpus)
    if recipe.prompts.sizes:
        recipe = replace(recipe, model=replace(recipe.model, image_size=largest(recipe.prompts.sizes)))
    units = dict(units or measure(recipe))
    asked = counts(recipe)
    calls = asked.calls
    checkpointed = recipe.model.gradient_checkpointing is not False and recipe.model.name != "emoji"
    flops = 0.0
    for part, unit in units.items():
        again = unit.forward if checkpointed and part in ("denoiser", "decoder") else 0.0
        frozen = calls.get(f"{part} frozen backward", 0.0)
        flops += calls.get(part, 0.0) * unit.forward + calls.get(f"{part} backward", 0.0) * (unit.backward + again)
        flops += frozen * (min(unit.backward, 1.2 * unit.forward) + again)  # no gradient of its own weights
    notes = []
    facts = family_of(recipe).facts if recipe.model.name != "emoji" else None
    if facts is not None and recipe.model.folder and not local_config(recipe, facts, facts.denoiser):
        notes.append(
            f"{recipe.model.folder} is not a local folder: the published architecture of {recipe.model.name} is assumed"
        )
    return Plan(asked, units, flops, memory_of(recipe, units, asked, gpus), gpus, tuple(notes))


def require_equal_parts(recipe: Recipe, gpus: int) -> None:
    """InputError: the run would refuse to cut its batch over so many GPUs."""
    size, micro = recipe.trainer.batch_size, recipe.trainer.micro_batches
    if size % (gpus * micro):
        raise InputError(
            f"trainer.batch_size: {size} cannot be cut into {gpus * micro} equal parts "
            f"({gpus} GPUs x trainer.micro_batches={micro}); expected a multiple"
        )


def memory_of(recipe: Recipe, units: Mapping[str, Unit], asked: Counts, gpus: int) -> dict[str, float]:
    """Bytes of one GPU by term. trainer.sharding cuts every network over the GPUs, or those of a machine; else each GPU
    has all of them.

    Activations are those of the largest single backward pass: DRaFT's last K steps share one, the losses of a critic
    and of a generator do not.
    """
    denoiser, names = units["denoiser"], len(trained_names(recipe.algorithm.name))
    full = recipe.model.weights == "full"
    checkpointed = recipe.model.gradient_checkpointing is not False  # of the embedded model both kinds are alike
    width = DTYPE_BYTES[recipe.model.dtype or ("float32" if recipe.model.name == "emoji" else "bfloat16")]
    base: float = (denoiser.parameters - (0 if full else denoiser.trained)) * width
    if recipe.model.quantize is not None:
        stored = denoiser.quantisable - (denoiser.whole if recipe.model.quantize == "nf4" else 0)
        base -= stored * (width - BYTES[recipe.model.quantize])
    if recipe.model.offload:
        base -= (denoiser.blocks - denoiser.largest_block) * (1 if recipe.model.quantize == "fp8" else width)
    pieces = _pieces(recipe, gpus)
    base, trained = base / pieces, names * denoiser.trained * 4 / pieces
    several = asked.passes > 1 and recipe.trainer.reduce_gradients == "update"
    gradients = denoiser.trained * 4 if pieces > 1 and several else trained  # whole until its last loss
    small = recipe.trainer.optimizer == "adamw8bit"
    ema = trained if recipe.trainer.ema_decay else 0.0
    batch = max(1.0, recipe.trainer.batch_size / gpus / recipe.trainer.micro_batches)
    decoder = units["decoder"]
    denoiser_kept, decoder_kept = (u.kept_checkpointed if checkpointed else u.kept for u in (denoiser, decoder))
    passed = {part: asked.graph.get(part, 0.0) for part in ("denoiser", "decoder", "reward")}
    return {
        "denoiser, frozen" if not full else "frozen reference": base,
        "trained weights (float32)": trained,
        "gradients (float32)": gradients,
        "Adam's two moments (8 bits)" if small else "Adam's two moments (float32)": trained * (MOMENTS if small else 2),
        "moving average": ema,
        "VAE": units["decoder"].weight_bytes + units["encoder"].weight_bytes,
        "rewards": units["reward"].weight_bytes,
        "activations: denoiser": batch * passed["denoiser"] * denoiser_kept,
        "activations: VAE decoder": batch * passed["decoder"] * decoder_kept,
        "activations: rewards": batch * passed["reward"] * units["reward"].kept,
        "the block being recomputed": batch * max(denoiser.block, units["decoder"].block)
        if checkpointed and passed["denoiser"]
        else 0.0,
    }


def _pieces(recipe: Recipe, gpus: int) -> int:
    """How many GPUs hold a network together."""
    if recipe.model.weights != "full" or recipe.trainer.sharding == "none":
        return 1
    return gpus if recipe.trainer.sharding == "full" else min(gpus, int(os.environ.get("LOCAL_WORLD_SIZE", gpus)))


def memory_savings(recipe: Recipe, made: Plan) -> list[tuple[str, float]]:
    """Changes of the recipe with the bytes of one GPU after each alone, the smallest first; the last, which begins with
    "all", is all of them."""
    changes = _changes(recipe, made.gpus)
    found = sorted(((name, _bytes(recipe, changed, made)) for name, changed in changes), key=lambda pair: pair[1])
    left_out = [name for name, _ in changes if name in ALONE]
    together = [(name, changed) for name, changed in changes if name not in ALONE]
    if len(together) > 1:
        every = recipe
        for _, changed in together:
            every = _both(recipe, every, changed)
        name = f"all but {' and '.join(left_out)}" if left_out else "all of these"
        found.append((name, _bytes(recipe, every, made)))
    return found


def _changes(recipe: Recipe, gpus: int) -> list[tuple[str, Recipe]]:
    """Each change of one key that needs less memory, and the recipe with it."""
    model, trainer, found = recipe.model, recipe.trainer, []
    if finer := micro_batches(recipe, gpus):
        most = finer[-1]
        found.append((f"trainer.micro_batches={most}", replace(recipe, trainer=replace(trainer, micro_batches=most))))
    if model.gradient_checkpointing is False:
        on = replace(recipe, model=replace(model, gradient_checkpointing=True))
        found.append(("model.gradient_checkpointing=true", on))
    if model.quantize is None and model.weights == "lora" and model.name != "emoji":
        found += [(f"model.quantize={q}", replace(recipe, model=replace(model, quantize=q))) for q in ("int8", "nf4")]
    if trainer.optimizer == "adamw" and trainer.sharding == "none":
        found.append(("trainer.optimizer=adamw8bit", replace(recipe, trainer=replace(trainer, optimizer="adamw8bit"))))
    if trainer.sharding != "none" and trainer.reduce_gradients == "update":
        cut = replace(recipe, trainer=replace(trainer, reduce_gradients="loss"))
        found.append(("trainer.reduce_gradients=loss", cut))
    if trainer.ema_decay:
        found.append(("trainer.ema_decay=0", replace(recipe, trainer=replace(trainer, ema_decay=0.0))))
    if model.weights == "full":
        name = "model.weights=lora" + ("" if trainer.sharding == "none" else " trainer.sharding=none")
        lora = replace(recipe, model=replace(model, weights="lora"), trainer=replace(trainer, sharding="none"))
        found.append((name, lora))
    if model.weights == "full" and gpus > 1 and trainer.sharding == "none" and trainer.optimizer == "adamw":
        found.append((SHARDING, replace(recipe, trainer=replace(trainer, sharding="full"))))
    alone = model.quantize in ("nf4", "int8") or model.compile or model.gradient_checkpointing is False
    if model.weights == "lora" and model.name != "emoji" and not model.offload and not alone:
        found.append((OFFLOAD, replace(recipe, model=replace(model, offload=True))))
    published = any(rewards.find(name).kind == "published" for name in rewards_used(recipe.reward))
    if recipe.reward.dtype != "bfloat16" and published:
        found.append(("reward.dtype=bfloat16", replace(recipe, reward=replace(recipe.reward, dtype="bfloat16"))))
    return found


def micro_batches(recipe: Recipe, gpus: int) -> list[int]:
    """More micro-batches than the recipe has, the fewest first, that divide the batch of a GPU into batches that the
    algorithm takes."""
    each = recipe.trainer.batch_size // gpus
    small = [number for number in range(1, int(each**0.5) + 1) if each % number == 0]
    finer = sorted({*small, *(each // number for number in small)})
    return [parts for parts in finer if parts > recipe.trainer.micro_batches and takes_batch(recipe, each // parts)]


def _both(recipe: Recipe, one: Recipe, other: Recipe) -> Recipe:
    """`one` with the sections that `other` has changed of `recipe`; changes of one section are joined key by key."""
    for section in ("model", "trainer", "reward"):
        before, after = vars(vars(recipe)[section]), vars(vars(other)[section])
        changed = {key: value for key, value in after.items() if value != before[key]}
        one = replace(one, **{section: replace(vars(one)[section], **changed)})
    return one


def _bytes(recipe: Recipe, changed: Recipe, made: Plan) -> float:
    if changed.model.weights != recipe.model.weights:
        return plan(changed, gpus=made.gpus).bytes
    units = dict(made.units)
    if changed.reward.dtype != recipe.reward.dtype:
        reward = units["reward"]
        units["reward"] = reward._replace(weight_bytes=reward.weight_bytes / 2, kept=reward.kept / 2)
    return sum(memory_of(changed, units, made.counts, made.gpus).values())
