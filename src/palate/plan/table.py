"""A plan as lines of text, for a device."""

from __future__ import annotations

import json
import time
from typing import NamedTuple

import torch

from palate.plan.measure import family_of, published_of
from palate.plan.memory import DTYPE_BYTES, Plan, memory_savings
from palate.recipe import Recipe
from palate.runtime.environment import host_memory
from palate.runtime.errors import InputError
from palate.runtime.progress import counted

GIB = 2**30
FREE = 0.9  # of the memory; kernels' workspace, fragmentation and the context take the rest


class Device(NamedTuple):
    """Dense bfloat16 TFLOP/s (float32 accumulation) and GiB, by the maker's data sheet."""

    tflops: float
    gib: float

    @property
    def room(self) -> float:
        """Bytes that a step may take: all but a tenth."""
        return FREE * self.gib * GIB


DEVICES = {
    "rtx-4060": Device(30, 8),
    "rtx-3060": Device(26, 12),
    "rtx-4080": Device(97, 16),
    "rtx-3090": Device(71, 24),
    "rtx-4090": Device(165, 24),
    "rtx-5090": Device(210, 32),
    "l40s": Device(362, 48),
    "a100-40": Device(312, 40),
    "a100-80": Device(312, 80),
    "h100": Device(989, 80),
    "h200": Device(989, 141),
    "b200": Device(2250, 180),
}


def this_machine() -> tuple[str, Device]:
    """What `palate plan` assumes where no device is named: this machine's first GPU, or its processor ("cpu").

    A GPU that DEVICES does not know, and the processor, are timed on one matrix product.
    """
    if not torch.cuda.is_available():
        return "cpu", _processor()
    properties = torch.cuda.get_device_properties(0)
    words, gib = set(properties.name.lower().replace("-", " ").split()), properties.total_memory / GIB
    for name, device in DEVICES.items():
        if set(name.split("-")[:2]) - {"40", "80", "rtx"} <= words and abs(device.gib - gib) < 0.1 * device.gib:
            return name, device
    return properties.name, Device(_measured(torch.device("cuda"), torch.bfloat16, 8192), round(gib, 1))


def _processor() -> Device:
    return Device(_measured(torch.device("cpu"), torch.float32, 512), round(host_memory() / GIB, 1))


def _measured(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """TFLOP/s of a matrix product, the best of five."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return float(f"{2 * size**3 / best / 1e12:.2g}")


def find_device(name: str | None) -> tuple[str, Device]:
    """The device of that name, "cpu" or None being this machine. InputError: an unknown name."""
    if name in DEVICES:
        return name, DEVICES[name]
    if name is None:
        return this_machine()
    if name == "cpu":
        return "cpu", _processor()
    raise InputError(f"--device: got {name!r}; expected one of {', '.join(DEVICES)}, cpu")


def fits(made: Plan, device: Device) -> bool:
    """Whether the plan leaves a tenth of the device's memory free."""
    return made.bytes <= device.room


def table(
    recipe: Recipe,
    made: Plan,
    *,
    device: str | None = "h100",
    utilisation: float = 0.35,
    price: float | None = None,
) -> str:
    """The plan as lines of text. device: a name of DEVICES, "cpu", None = this machine; price: per GPU and hour."""
    name, card = find_device(device)
    _check_utilisation(utilisation)
    lines = [
        f"{recipe.algorithm.name} on {recipe.model.name}, {recipe.model.weights}, batch {recipe.trainer.batch_size}, "
        f"{made.gpus} x {name}",
        "",
        *_parts(made),
        "",
        *_time(recipe, made, card, utilisation, price),
        "",
        f"GiB on each {'GPU' if name != 'cpu' else 'machine'}",
        *(f"  {term:34}{value / GIB:9.3f}" for term, value in made.memory.items() if value),
        f"  {'total':34}{made.bytes / GIB:9.3f}  of {card.gib:g}, of which 10 to 15 % should stay free",
    ]
    if recipe.model.name != "emoji":
        width = DTYPE_BYTES[recipe.model.dtype or "bfloat16"]
        encoders = published_of(family_of(recipe).facts).text_parameters * width * 1e9 / GIB
        fewer = f", less by model.quantize={recipe.model.quantize}" if recipe.model.quantize else ""
        lines.append(f"  before training, while prompts are encoded: {encoders:.1f} GiB of text encoders{fewer}")
    if not fits(made, card):
        lines += ["", *_too_large(recipe, made, card)]
    return "\n".join([*lines, *([""] if made.notes else []), *(f"note: {note}" for note in made.notes)])


def as_json(
    recipe: Recipe, made: Plan, *, device: str | None, utilisation: float = 0.35, price: float | None = None
) -> str:
    """The plan for scripts: bytes and FLOPs of an update, its seconds on the device, whether it fits; with a price per
    GPU and hour the cost of the run."""
    name, card = find_device(device)
    _check_utilisation(utilisation)
    seconds = made.seconds(card.tflops, utilisation)
    found = {
        "device": name, "device_gib": card.gib, "gpus": made.gpus, "fits": fits(made, card),
        "total_bytes": made.bytes, "memory_bytes": made.memory, "flops_per_update": made.flops,
        "seconds_per_update": seconds, "seconds": seconds * recipe.trainer.steps, "calls_per_update": made.calls,
        "notes": list(made.notes),
        "savings_bytes": {} if fits(made, card) else dict(memory_savings(recipe, made)),
    }  # fmt: skip
    if price is not None:
        found["cost"] = _cost(made, seconds * recipe.trainer.steps, price)
    return json.dumps(found, indent=1)


def _check_utilisation(utilisation: float) -> None:
    if not 0 < utilisation <= 1:
        raise InputError(f"--utilisation: got {utilisation}; expected above 0 and at most 1")


def _cost(made: Plan, seconds: float, price: float) -> float:
    return price * made.gpus * seconds / 3600


def _parts(made: Plan) -> list[str]:
    lines = [
        f"{'part':10}{'parameters':>12}{'TFLOP per image':>17}{'backward':>10}{'images per update':>19}"
        f"{'with backward':>15}"
    ]
    for part, unit in made.units.items():
        back = made.calls.get(f"{part} backward", 0) + made.calls.get(f"{part} frozen backward", 0)
        ratio = f"{unit.backward / unit.forward:.2f} F" if unit.forward else "-"
        lines.append(
            f"{part:10}{unit.parameters / 1e6:10.1f} M{unit.forward / 1e12:17.4f}{ratio:>10}"
            f"{made.calls.get(part, 0):19.1f}{back:15.1f}"
        )
    return lines


def _time(recipe: Recipe, made: Plan, card: Device, utilisation: float, price: float | None) -> list[str]:
    seconds = made.seconds(card.tflops, utilisation)
    whole = seconds * recipe.trainer.steps
    cost = "" if price is None else f"; {_cost(made, whole, price):.2f} at {price:g} per GPU and hour"
    return [
        f"per update: {made.flops / 1e12:.3f} TFLOP = {made.passes:.1f} denoiser forwards; "
        f"{duration(seconds)} at {utilisation:.0%} of {card.tflops:g} TFLOP/s",
        f"{counted(recipe.trainer.steps, 'update')}: {duration(whole)}{cost} "
        "(previews, evaluation and text encoding not counted)",
    ]


def _too_large(recipe: Recipe, made: Plan, card: Device) -> list[str]:
    """What reduces memory, and whether it is enough."""
    found = [(name, value) for name, value in memory_savings(recipe, made) if value < made.bytes]
    lines = [f"This does not fit into {card.gib:g} GiB. To reduce memory:"] if found else []
    lines += [f"  {name:38}{value / GIB:9.3f} GiB{'  fits' if value <= card.room else ''}" for name, value in found]
    if recipe.model.weights == "full":
        key = " with trainer.sharding=full" if recipe.trainer.sharding == "none" else ""
        lines.append(f"  more GPUs (--gpus){key}: weights, gradients and moments are shared out")
    if not found:
        return [f"This does not fit into {card.gib:g} GiB, and no key of the recipe would need less.", *lines]
    name, value = min(found, key=lambda pair: pair[1])
    if value > card.room:
        lines.append(f"Nothing here makes it fit. The nearest is {name}: {value / GIB:.1f} of {card.gib:g} GiB.")
    return lines


def can_fit(recipe: Recipe, made: Plan, device: str | None) -> bool:
    """Whether the recipe fits the device as it is, or with a change that `table` names."""
    card = find_device(device)[1]
    return fits(made, card) or any(value <= card.room for _, value in memory_savings(recipe, made))


def duration(seconds: float) -> str:
    """Seconds in the largest unit of which there are two or more."""
    units = ((86400, "days"), (3600, "h"), (60, "min"))
    unit, name = next(((n, name) for n, name in units if seconds >= 2 * n), (1, "s"))
    count = seconds / unit
    return f"{count:,.0f} {name}" if count >= 1000 else f"{count:.3g} {name}"
