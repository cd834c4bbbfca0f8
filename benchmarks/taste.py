"""From votes to an aligned generator: how many votes a taste needs, and what alignment to it is worth to its owner.

    python benchmarks/taste.py accuracy [--seeds 0 1 2]     votes 10 to 160, at random and by BALD
    python benchmarks/taste.py align [--people warm3d large] [--rounds 3] [--seeds 0 1 2]
    python benchmarks/taste.py all --quick                  the mechanics, in a minute; its numbers mean nothing

Simulated people have a true taste u and choose the left picture with probability s((u_left - u_right) / T), where T is
set so that they are right on 87.5 % of random pairs. Six tastes are made of what the features measure (the last is
conditional, which a linear utility cannot hold), six others are not expressed by any feature directly.

Rounds: 20 votes by BALD on the pictures of the current generator, the taste fitted to all votes so far, 30 updates of
`direct` under the guard, on from the current weights. Rivals at equal votes: the best of 8 pictures by the learned
taste, words that the taste picks, and Diffusion-DPO on the voted pairs (on the base model, 60 updates). What counts is
the true taste on prompts of the evaluation, in standard deviations of the pool; the win rate against the unaligned
picture of the same noise; the share of right concepts; diversity against the base's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palate import recipe
from palate.core import Random
from palate.evaluate import diversity, embedded_panel, generate, pairs
from palate.models.vocabulary import parse_prompt, vocabulary
from palate.rewards.simple import border, luma, saturation, warmth
from palate.studio.artist import hidden_prompt
from palate.taste.ask import RANDOM, next_pair
from palate.taste.card import LEARNT, accuracy
from palate.taste.features import Features, Scaling, features_of, scaling_of
from palate.taste.learner import Posterior, fit, leave_one_out
from palate.taste.pictures import raw_features
from palate.taste.reward import TasteReward
from palate.taste.taste import SIDE_STD
from palate.taste.words import offered, with_words, word_gains
from palate.train import train

RIGHT = 0.875  # of random pairs
VOTES = (10, 20, 40, 80, 160)
ANIMALS = {"dog", "cat", "fox", "lion", "tiger", "horse", "unicorn", "cow", "pig", "mouse", "rabbit", "hamster", "bear",
           "panda", "koala", "monkey", "elephant", "owl", "penguin", "frog", "wolf", "chick", "parrot"}  # fmt: skip
Utility = Callable[[Tensor, list[str]], Tensor]


def mask_of(images: Tensor) -> Tensor:
    """Where the drawing is, (B, H, W)."""
    return torch.sigmoid(40 * ((images - border(images)[..., None, None]).abs().amax(1) - 0.15))


def people(panel: Any) -> dict[str, Utility]:
    """The true tastes by name; the first six are the features' own, the others are not."""
    judge = panel.classifier

    def style(images: Tensor, name: str) -> Tensor:
        return judge.logits(images)[1].softmax(1)[:, judge.styles.index(name)]

    def toon_zoo(images: Tensor, prompts: list[str]) -> Tensor:
        animal = torch.tensor([float((parse_prompt(p).concept or "") in ANIMALS) for p in prompts])
        return animal * style(images, "cartoon") + (1 - animal) * style(images, "flat")

    def places(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = mask_of(images)
        line = torch.linspace(-1, 1, images.shape[-1])
        mass = mask.sum((1, 2)).clamp_min(1)
        return mask, (mask * line).sum((1, 2)) / mass, (mask * line[:, None]).sum((1, 2)) / mass

    def round_shape(images: Tensor, prompts: list[str]) -> Tensor:
        mask = mask_of(images)
        edge = (mask[:, 1:] - mask[:, :-1]).abs().sum((1, 2)) + (mask[:, :, 1:] - mask[:, :, :-1]).abs().sum((1, 2))
        return 4 * torch.pi * mask.sum((1, 2)) / edge.square().clamp_min(1)

    def hues(images: Tensor, prompts: list[str]) -> Tensor:
        few = (images * 3.999).floor()
        codes = (few[:, 0] * 16 + few[:, 1] * 4 + few[:, 2]).flatten(1).long()
        shares = torch.stack([torch.bincount(row, minlength=64).float() for row in codes]) / codes.shape[1]
        return -(shares * shares.clamp_min(1e-9).log()).sum(1)

    return {
        "warm3d": lambda x, p: 1.5 * style(x, "3d") + 3 * warmth(x),
        "large": lambda x, p: mask_of(x).mean((1, 2)),
        "contrast": lambda x, p: luma(x).flatten(1).std(1),
        "pastel": lambda x, p: luma(x).mean((1, 2)) - saturation(x),
        "darkline": lambda x, p: style(x, "outline") - 2 * luma(x).mean((1, 2)),
        "toonzoo": toon_zoo,
        "symmetric": lambda x, p: -(x - x.flip(-1)).abs().mean((1, 2, 3)),
        "round": round_shape,
        "low": lambda x, p: places(x)[2],
        "leftish": lambda x, p: -places(x)[1],
        "few-colours": lambda x, p: -hues(x, p),
        "soft-edges": lambda x, p: -(x[..., 1:] - x[..., :-1]).abs().flatten(1).quantile(0.95, dim=1),
    }


@dataclass
class Pool:
    """Pictures that can be voted on, with what a taste and a person see in them."""

    images: Tensor
    prompts: list[str]
    hidden: list[str]
    raw: np.ndarray

    def utilities(self, utility: Utility) -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([utility(self.images[i : i + 64], self.prompts[i : i + 64]).double().numpy()
                                   for i in range(0, len(self.images), 64)])  # fmt: skip


def draw_pool(model: Any, sampler: Any, features: Features, *, concepts: int, each: int, seed: int) -> Pool:
    """`each` pictures of as many concepts, half of them with hidden words."""
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.permutation(vocabulary().concepts)[:concepts]]
    prompts = [name for name in names for _ in range(each)]
    hidden = [p if i % each < each // 2 else hidden_prompt(p, rng) for i, p in enumerate(prompts)]
    images = []
    with torch.no_grad():
        for i in range(0, len(hidden), 32):
            part = hidden[i : i + 32]
            noise = Random(seed, 0, range(i, i + len(part))).normal("pool", model.latent_shape)
            images.append(model.decode(sampler(model, model.encode_prompts(part), [noise])))
    stack = torch.cat(images)
    return Pool(stack, prompts, hidden, raw_features(features, stack, prompts))


def temperature(u: np.ndarray, rng: np.random.Generator) -> float:
    """T at which a person is right on RIGHT of random pairs, by bisection."""
    i, j = rng.integers(0, len(u), (2, 4000))
    gap = np.abs(u[i] - u[j])
    low, high = 1e-6, 100 * gap.mean() + 1e-6
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (1 / (1 + np.exp(-gap / middle))).mean() > RIGHT else (low, middle)
    return middle


class Voter:
    """One simulated person, the votes so far, and the taste fitted to them."""

    def __init__(self, utility: Utility, pool: Pool, scaling: Scaling, seed: int):
        self.utility, self.scaling, self.rng = utility, scaling, np.random.default_rng(seed)
        self.temperature = temperature(pool.utilities(utility), self.rng)
        self.d: list[np.ndarray] = []
        self.y: list[float] = []
        self.voted: list[tuple[Tensor, Tensor, str]] = []  # preferred, other, prompt
        self.posterior: Posterior | None = None

    def vote(self, pool: Pool, count: int, *, bald: bool) -> None:
        u, z = pool.utilities(self.utility), self.scaling(torch.from_numpy(pool.raw)).numpy()
        shown: set[frozenset[int]] = set()
        for _ in range(count):
            asked = self.posterior if bald and len(self.y) >= RANDOM else None
            pair = next_pair(asked, z, pool.prompts, shown, self.rng)
            if pair is None:
                break
            i, j = pair
            shown.add(frozenset(pair))
            left = self.rng.random() < 1 / (1 + np.exp(-(u[i] - u[j]) / self.temperature))
            self.d.append(z[i] - z[j])
            self.y.append(float(left))
            first, second = (i, j) if left else (j, i)
            self.voted.append((pool.images[first], pool.images[second], pool.hidden[first]))
            self.posterior = self.fitted()

    def fitted(self) -> Posterior:
        return fit(np.stack(self.d), np.array(self.y), side_std=SIDE_STD)

    def held_out(self) -> float:
        return accuracy(leave_one_out(np.stack(self.d), np.array(self.y), side_std=SIDE_STD), np.array(self.y))[
            "accuracy"
        ]

    def foretells(self, pool: Pool, pairs_: int = 4000) -> float:
        """Share of unseen pairs of one prompt that the taste orders as the person would."""
        u, z = pool.utilities(self.utility), self.scaling(torch.from_numpy(pool.raw)).numpy()
        i, j = np.random.default_rng(99).integers(0, len(u), (2, pairs_ * 20))
        groups = np.array(pool.prompts)
        same = (groups[i] == groups[j]) & (i != j)
        i, j = i[same][:pairs_], j[same][:pairs_]
        assert self.posterior is not None
        return float((((z[i] - z[j]) @ self.posterior.mean > 0) == (u[i] > u[j])).mean())


class Bench:
    """Models, rewards and pools that every cell of the tables uses."""

    def __init__(self, quick: bool):
        self.quick = quick
        self.panel = embedded_panel()
        self.people = people(self.panel)
        self.reward = self.panel.rewards["emoji"]
        self.features = features_of(self.reward, "emoji")
        self.plan = recipe.read("taste-emoji")
        self.model, self.algorithm = recipe.build_model(self.plan), recipe.build_algorithm(self.plan)
        self.sampler = recipe.sampler_of(self.algorithm)
        size = {"concepts": 12, "each": 6} if quick else {"concepts": min(104, len(vocabulary().concepts)), "each": 10}
        self.size = size
        self.first = draw_pool(self.model, self.sampler, self.features, **size, seed=1)
        self.unseen = draw_pool(self.model, self.sampler, self.features, **size, seed=2)
        self.scaling = scaling_of(torch.from_numpy(self.first.raw), self.first.prompts, self.features.sizes)
        self.prompts = recipe.prompts_of(self.plan)[1][: 8 if quick else 104]

    def accuracy_rows(self, names: list[str], seeds: list[int]) -> list[dict[str, Any]]:
        rows = []
        for name in names:
            for seed in seeds:
                for bald in (False, True):
                    voter = Voter(self.people[name], self.first, self.scaling, seed)
                    began = time.perf_counter()
                    for count in VOTES[:2] if self.quick else VOTES:
                        voter.vote(self.first, count - len(voter.y), bald=bald)
                        rows.append({"what": "accuracy", "person": name, "seed": seed, "bald": bald, "votes": count,
                                     "unseen": voter.foretells(self.unseen), "held_out": voter.held_out()})  # fmt: skip
                    rows[-1]["seconds_per_vote"] = (time.perf_counter() - began) / len(voter.y)
        return rows

    def measured(
        self, model: Any, utility: Utility, images: Tensor, base: Tensor, prompts: list[str]
    ) -> dict[str, float]:
        """The true taste in standard deviations of the first pool, wins against the base's pictures, what was kept."""
        pool = self.first.utilities(utility)
        u, before = (utility(x, prompts).double().numpy() for x in (images, base))
        judge = self.panel.classifier
        wanted = [parse_prompt(p).concept for p in prompts]
        right = [judge.concepts[int(k)] == want for k, want in zip(judge.concept(images), wanted, strict=True)]
        spread = [float(diversity(judge.features(x), prompts).nanmean()) for x in (images, base)]
        after, start = ((float(x.mean()) - pool.mean()) / pool.std() for x in (u, before))
        return {"taste": float(after), "before": float(start),
                "win": float((u > before).mean()), "concept": float(np.mean(right)),
                "diversity": spread[0] / spread[1] if spread[1] > 0 else float("nan")}  # fmt: skip

    def pictures(
        self, model: Any, prompts: list[str], weights: str = "policy", seeds: tuple[int, ...] = (0, 1)
    ) -> Tensor:
        return generate(model, prompts, seeds, weights=weights, sampler=self.sampler)

    def align_rows(self, name: str, seed: int, rounds: int, votes: int) -> list[dict[str, Any]]:
        """Rounds of voting and aligning, and the rivals after each at the same votes."""
        utility, rows = self.people[name], []
        torch.manual_seed(seed)
        model = recipe.build_model(self.plan)
        voter, pool = Voter(utility, self.first, self.scaling, seed), self.first
        shown, _ = pairs(self.prompts, (0, 1))
        base = self.pictures(model, self.prompts, "reference")
        for number in range(1, rounds + 1):
            voter.vote(pool, votes, bald=True)
            assert voter.posterior is not None
            held_out = voter.held_out()
            about = {"what": "align", "person": name, "seed": seed, "round": number, "votes": len(voter.y),
                     "held_out": held_out, "offered": held_out > LEARNT}  # fmt: skip
            objective = TasteReward(self.features, self.scaling, torch.from_numpy(voter.posterior.mean),
                                    torch.from_numpy(voter.posterior.covariance), self.reward)  # fmt: skip
            began = time.process_time()
            outcome = self._train(model, objective, seed)
            seconds = time.process_time() - began
            images = self.pictures(model, self.prompts)
            rows.append(about | {"way": "direct", "ended": outcome, "cpu_seconds": seconds,
                                 **self.measured(model, utility, images, base, shown)})  # fmt: skip
            rows += [about | {"way": way} | self.measured(model, utility, found, base, shown)
                     for way, found in self.rivals(model, voter, objective).items()]  # fmt: skip
            pool = draw_pool(model, self.sampler, self.features, **self.size, seed=10 * number + seed)
        rows.append(about | {"way": "dpo"} | self.dpo(voter, utility, seed))
        return rows

    def _train(self, model: Any, objective: TasteReward, seed: int) -> str:
        changes = (
            {"steps": 2, "guard": recipe.GuardSettings(every=0)} if self.quick else {"guard": self.plan.trainer.guard}
        )
        with tempfile.TemporaryDirectory() as folder:
            outcome = train(
                model, self.algorithm, objective, recipe.prompts_of(self.plan)[0], folder=Path(folder) / "run",
                preview=recipe.prompts_of(self.plan)[1], progress=False, batch_size=8, lr=2e-3, warmup=5,
                seed=seed, checkpoint_every=0, **({"steps": 30} | changes),
            )  # fmt: skip
        return outcome.reason

    def rivals(self, model: Any, voter: Voter, objective: TasteReward) -> dict[str, Tensor]:
        """Without training: the best of 8 by the learned taste, and the words that it picks."""
        assert voter.posterior is not None
        many = 2 if self.quick else 8
        shown, _ = pairs(self.prompts, (0, 1))
        drawn = torch.stack(
            [self.pictures(model, self.prompts, "reference", (10 + 2 * k, 11 + 2 * k)) for k in range(many)]
        )
        with torch.no_grad():
            scores = torch.stack([objective(images, shown) for images in drawn])
        best = drawn[scores.argmax(0), torch.arange(len(shown))]
        z = self.scaling(torch.from_numpy(self.first.raw)).numpy()
        gains = word_gains(
            z @ voter.posterior.mean, self.first.hidden, self.scaling.std(torch.from_numpy(voter.posterior.mean))
        )
        words = [choice.word for choice in offered(gains)]
        named = [
            with_words(prompt, words) if parse_prompt(prompt).background is None else prompt for prompt in self.prompts
        ]
        return {"best-of-8": best, "words": self.pictures(model, named, "reference")}

    def dpo(self, voter: Voter, utility: Utility, seed: int) -> dict[str, float]:
        """Diffusion-DPO on the voted pairs, on the base model; measured against the base model's own pictures."""
        plan = recipe.read("dpo-emoji")
        torch.manual_seed(seed)
        model = recipe.build_model(plan)
        algorithm = recipe.build_algorithm(recipe.read("taste-emoji-dpo"))
        with torch.no_grad():
            latents = torch.stack([model.encode(torch.stack([a, b])) for a, b, _ in voter.voted])
        with tempfile.TemporaryDirectory() as folder:
            train(model, algorithm, self.reward, [prompt for _, _, prompt in voter.voted], folder=Path(folder) / "run",
                  latents=latents, steps=1 if self.quick else 60, batch_size=16, lr=1e-3, warmup=5, seed=seed,
                  checkpoint_every=0, progress=False)  # fmt: skip
        prompts = self.prompts[: 4 if self.quick else 52]
        shown, _ = pairs(prompts, (0, 1))
        images, base = (generate(model, prompts, (0, 1), weights=weights) for weights in ("policy", "reference"))
        return self.measured(model, utility, images, base, shown)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over people and seeds, a line each."""
    lines = []
    for bald in (False, True):
        for votes in VOTES:
            values = [
                r["unseen"] for r in rows if r["what"] == "accuracy" and r["bald"] == bald and r["votes"] == votes
            ]
            if values:
                how = "BALD" if bald else "random"
                lines.append(f"{votes:4} votes, {how:6}: {np.mean(values):.3f} of unseen pairs ({len(values)} runs)")
    keys = dict.fromkeys((r["person"], r["round"], r["way"]) for r in rows if r["what"] == "align")
    for person, number, way in keys:
        own = [r for r in rows if r["what"] == "align" and (r["person"], r["round"], r["way"]) == (person, number, way)]
        mean = {
            k: np.nanmean([r[k] for r in own]) for k in ("before", "taste", "win", "concept", "diversity", "held_out")
        }
        lines.append(f"{person:12} round {number} {way:10} taste {mean['before']:+.2f} -> {mean['taste']:+.2f}  win "
                     f"{mean['win']:.2f}  concept {mean['concept']:.3f}  diversity x {mean['diversity']:.2f}  held-out "
                     f"{mean['held_out']:.2f}{'' if own[0]['offered'] else '  not offered'}")  # fmt: skip
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=("accuracy", "align", "all"))
    made.add_argument("--people", nargs="+", default=None, help="names; all twelve if left out")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--votes", type=int, default=20, help="per round")
    made.add_argument("--quick", action="store_true")
    made.add_argument("--out", type=Path, default=None, help="JSON of every row")
    return made


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    given = parser().parse_args(arguments)
    bench = Bench(given.quick)
    names = given.people or (["warm3d"] if given.quick else list(bench.people))
    seeds, rounds = (given.seeds[:1], 1) if given.quick else (given.seeds, given.rounds)
    rows: list[dict[str, Any]] = []
    if given.what in ("accuracy", "all"):
        rows += bench.accuracy_rows(names, seeds)
    if given.what in ("align", "all"):
        for name in names:
            for seed in seeds:
                rows += bench.align_rows(name, seed, rounds, given.votes)
                if given.out:
                    given.out.write_text(json.dumps(rows, indent=1))
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
