"""Distil the embedded base model's guided ODE into a consistency model, a LoRA over the base.

    python tools/train_consistency.py [--minutes 20] [--guidance 3] [--seed 0]
    python tools/train_consistency.py --steps 5 --samples 8 --work /tmp/consistency        # to see that it works

Consistency distillation (Song et al. 2023, arXiv 2303.01469) on the flow's ODE with guidance built in (LCM, arXiv
2310.04378): the student's x0 at t must be its own moving average's x0 one guided Euler step closer to the data. The
boundary f(x, 0) = x holds by itself, because x0 = x - t velocity. Prints the error of x0 against the ODE solved with 20
steps at ten noise levels, before and after; writes pytorch_lora_weights.safetensors (float16), errors.json and a card.
State is saved every three minutes; the same command resumes, and --minutes counts in all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from data import Atlas, Composer, held_out_pairs
from progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from palate.models.emoji import EmojiModel
from palate.path import add_noise, move

NAME = "pytorch_lora_weights.safetensors"
LEVELS = [round(0.1 * k, 1) for k in range(1, 11)]
EULER = 0.05  # the teacher's step: the ODE in 20 steps
DECAY = 0.95  # of the target's moving average


@torch.no_grad()
def ode(model: EmojiModel, x: Tensor, t: Tensor, cond: Tensor, guidance: float, steps: int = 20) -> Tensor:
    """Where the base's guided ODE carries x (B, C, h, w) from t (B,) to 0."""
    for k in range(steps):
        pred = model.predict(x, t * (1 - k / steps), cond, guidance=guidance, weights="reference")
        x = move(pred, *model.schedule(t * (1 - (k + 1) / steps)))
    return x


@torch.no_grad()
def errors(model: EmojiModel, x0: Tensor, eps: Tensor, cond: Tensor, truth: list[Tensor], weights: str) -> list[float]:
    """Root mean square of x0 minus the ODE's end, in latent units, at each of LEVELS."""
    found = []
    for level, end in zip(LEVELS, truth, strict=True):
        t = torch.full((len(x0),), level)
        guess = model.predict(add_noise(x0, eps, *model.schedule(t)), t, cond, weights=weights).x0
        found.append(float((guess - end).square().mean().sqrt()))
    return found


def distil(model: EmojiModel, x0: Tensor, eps: Tensor, t: Tensor, cond: Tensor, guidance: float, c: float) -> Tensor:
    """Pseudo-Huber distance of the student at t from the target one guided Euler step nearer to the data."""
    xt, nearer = add_noise(x0, eps, *model.schedule(t)), (t - EULER).clamp_min(0)
    with torch.no_grad():
        teacher = model.predict(xt, t, cond, guidance=guidance, weights="reference")
        there = move(teacher, *model.schedule(nearer))
        target = model.predict(there, nearer, cond, weights="target").x0
    student = model.predict(xt, t, cond, weights="policy").x0
    distance = (student - target).square().flatten(1).mean(1)
    return ((distance + c * c).sqrt() - c).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20, help="of training in all, resumed time included")
    parser.add_argument("--steps", type=int, help="stop after so many, whatever the time")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=EmojiModel.default_guidance)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="a model folder; the embedded base if left out")
    parser.add_argument("--samples", type=int, default=32, help="to measure the error on")
    parser.add_argument("--work", type=Path, default=Path(".cache/consistency"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = EmojiModel.load(args.base, lora_rank=args.rank, names=("policy", "target"))
    student, target = model.parameters("policy"), model.parameters("target")
    average(target, student, 0.0)
    optimizer = torch.optim.AdamW(student, lr=args.lr, weight_decay=0.0)
    composer = Composer(Atlas.load(), exclude=held_out_pairs())

    def draw(part: int, step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((args.seed, part, step))
        batch = composer.compose(rng, count)
        with torch.no_grad():
            x0, cond = model.encode(batch.images), model.encode_prompts(batch.captions)
        return x0, torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)), cond

    x0, eps, cond = draw(1, 0, args.samples)
    starts = [(add_noise(x0, eps, *model.schedule(t)), t) for t in (torch.full((len(x0),), v) for v in LEVELS)]
    truth = [ode(model, x, t, cond, args.guidance) for x, t in starts]
    before = errors(model, x0, eps, cond, truth, "reference")

    parts = {"student": nn.ParameterList(student), "target": nn.ParameterList(target), "optimizer": optimizer}
    progress = Progress(args.work / f"state-{model.fingerprint()[:8]}.pt", parts, args.minutes)  # of this base
    for step in progress:
        x0_now, eps_now, cond_now = draw(0, step, args.batch)
        t = torch.rand(args.batch, generator=torch.Generator().manual_seed(args.seed + step)).clamp_min(0.005)
        loss = distil(model, x0_now, eps_now, t, cond_now, args.guidance, c=0.03)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / 50)
        optimizer.step()
        average(target, student, DECAY)
        progress.log({"loss": loss.detach()})
        if args.steps is not None and step >= args.steps:
            progress.save()
            break

    model.weights.save(args.work, "target")
    with safe_open(args.work / NAME, framework="pt") as file:
        half, metadata = {key: file.get_tensor(key).half() for key in list(file.keys())}, file.metadata()
    save_file(half, args.work / NAME, metadata=metadata)
    shipped = EmojiModel.load(args.base, training="none")
    shipped.load_consistency(args.work)
    after = errors(shipped, x0, eps, cond, truth, "consistency")
    result = {
        "steps": progress.step,
        "guidance": args.guidance,
        "levels": LEVELS,
        "before": before,
        "after": after,
        "base": model.fingerprint(),
    }
    (args.work / "errors.json").write_text(json.dumps(result, indent=1) + "\n")
    text = card(args, progress.step, (args.work / NAME).stat().st_size, before, after)
    (args.work / "README.md").write_text(text)
    print(text)


def card(args: argparse.Namespace, steps: int, size: int, before: list[float], after: list[float]) -> str:
    rows = "\n".join(f"| {t:.1f} | {a:.4f} | {b:.4f} |" for t, a, b in zip(LEVELS, before, after, strict=True))
    gains = [1 - b / a for a, b in zip(before, after, strict=True)]
    return CARD.format(
        **vars(args), size=size / 1e6, done=steps, rows=rows, count=args.samples, least=min(gains), most=max(gains)
    )


CARD = """# emoji-consistency: a consistency model of the embedded base model

A LoRA of rank {rank} (float16, {size:.1f} MB) over `emoji`, distilled from its own ODE with guidance {guidance:g}
on the training data, without the held-out pairs. It estimates the clean image from any noise level in one
evaluation without guidance; SQDF's `estimator: consistency` reads it.

    python tools/train_consistency.py --minutes {minutes:g} --lr {lr:g} --batch {batch}      # {done} steps; seed {seed}
    palate train sqdf-emoji algorithm.estimator=consistency algorithm.estimator_guidance=1

Root mean square error of x0, in latent units, against the guided ODE in 20 steps from the same noisy
latents, {count} compositions:

| noise level | the base's posterior mean | this |
|---|---|---|
{rows}

Its error is smaller by {least:.0%} (at the level where it gains least) to {most:.0%}. A LoRA of this size does not
learn the whole map: samples of one step are blurred; `emoji-1step` is the model for those. Licence: as the base
model's, see ../README.md.
"""


@torch.no_grad()
def average(target: list[Tensor], student: list[Tensor], decay: float) -> None:
    for a, b in zip(target, student, strict=True):
        a.lerp_(b, 1 - decay)


if __name__ == "__main__":
    main()
