"""From votes to an aligned generator: how many votes a taste needs, and what alignment to it is worth to its owner.

    python benchmarks/taste.py accuracy [--seeds 0 1 2]     votes 10 to 160, at random and by BALD
    python benchmarks/taste.py align [--people warm3d large] [--rounds 3] [--seeds 0 1 2]
    python benchmarks/taste.py golden                       one round of "warm3d" as it was first measured
    python benchmarks/taste.py all --quick                  the mechanics, in a minute; its numbers mean nothing

A person with one seed is a row, a file in RESULTS that is not made again: an interrupted command goes on where it was.
--jobs 1 leaves the other core alone. The tables go to RESULTS/taste-accuracy.md and RESULTS/taste-rounds.md.

Simulated people have a true taste u and choose the left picture with probability s((u_left - u_right) / T), where T is
set so that they are right on 87.5 % of random pairs. Six tastes are made of what the features measure (the last is
conditional, which a linear utility cannot hold), six others are not expressed by any feature directly.

Rounds: 20 votes by BALD on the pictures of the current generator, the taste fitted to all votes so far, 30 updates of
`direct` under the guard, on from the current weights; a taste that picks another background than before is begun with
60 updates that teach the generator to draw by it unasked, and 10 of the reward. Rivals at equal votes: the best of 8
pictures by the learned taste, words that the taste picks, and Diffusion-DPO on the voted pairs (on the base model, 60
updates). How both are trained is what the recipes taste-emoji, taste-emoji-words and taste-emoji-dpo say, DPO without
its guard. What counts is the true taste on prompts of the evaluation, in standard deviations of the pool; the win rate
against the unaligned picture of the same noise; the share of right concepts; diversity against the base's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import about, fingerprints, parsed, slug
from rows import Row, measured, write_table
from torch import Tensor

from palate import recipe
from palate.core import Random
from palate.evaluate import diversity, embedded_panel, generate, pairs
from palate.models.vocabulary import parse_prompt, vocabulary, with_words
from palate.rewards.simple import border, luma, saturation, warmth
from palate.studio.voting import REFIT_PRIOR
from palate.taste.ask import RANDOM, next_pair
from palate.taste.card import accuracy, expected_accuracy, learnt, over_chance, unseen_pairs
from palate.taste.features import Features, Scaling, features_of, scaling_of
from palate.taste.learner import PRIORS, Posterior, fit, leave_one_out
from palate.taste.pictures import raw_features
from palate.taste.reward import TasteReward
from palate.taste.taste import SIDE_STD
from palate.taste.words import WordChoice, hidden_prompt, offered, unasked, word_gains
from palate.train import train

RIGHT = 0.875  # of random pairs
VOTES = (10, 20, 40, 80, 160)
ANIMALS = {
    "dog", "cat", "fox", "lion", "tiger", "horse", "unicorn", "cow", "pig", "sheep", "mouse", "rabbit", "hamster",
    "squirrel", "bear", "panda", "koala", "raccoon", "wolf", "frog", "monkey", "elephant", "rhino", "giraffe", "zebra",
    "deer", "camel", "hedgehog", "bat", "penguin", "owl", "swan", "duck", "chicken", "chick", "bird", "flamingo",
    "peacock", "parrot", "turtle", "snake", "crocodile", "dragon", "dinosaur", "whale", "dolphin", "fish", "shark",
    "octopus", "crab", "snail", "butterfly", "bee", "ladybug", "spider", "scorpion",
}  # fmt: skip
GENERATOR = "emoji-1step"  # draws what is voted on; a row is of its weights as well
Utility = Callable[[Tensor, list[str]], Tensor]
ROUNDS = ("taste-emoji", "taste-emoji-words", "taste-emoji-dpo")  # the recipes of a row of rounds
FIRST = ROUNDS[::2]  # of the other rows, which the second, added later, has no part in
UNCONDITIONAL = ("warm3d", "large", "contrast", "pastel", "darkline")  # of what the features measure
PEOPLE = (*UNCONDITIONAL, "toonzoo", "symmetric", "round", "low", "leftish", "few-colours", "soft-edges")


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
    known: dict[Utility, np.ndarray] = field(default_factory=dict)

    def utilities(self, utility: Utility) -> np.ndarray:
        """Of every picture; a person looks at each once, however often is asked."""
        if utility not in self.known:
            self.known[utility] = in_parts(utility, self.images, self.prompts)
        return self.known[utility]


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

    def __init__(self, utility: Utility, pool: Pool, scaling: Scaling, seed: int, *, side_std: float = SIDE_STD):
        self.side_std = side_std
        self.utility, self.scaling, self.rng = utility, scaling, np.random.default_rng(seed)
        self.temperature = temperature(pool.utilities(utility), self.rng)
        self.d: list[np.ndarray] = []
        self.y: list[float] = []
        self.voted: list[tuple[Tensor, Tensor, str]] = []  # preferred, other, prompt
        self.posterior: Posterior | None = None
        self.unseen = np.zeros((0, 0))  # pairs of the pictures that were last chosen among

    def vote(self, pool: Pool, count: int, *, bald: bool) -> None:
        u, z = pool.utilities(self.utility), self.scaling(torch.from_numpy(pool.raw)).numpy()
        shown: set[frozenset[int]] = set()
        self.unseen = unseen_pairs(z, pool.prompts)
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
        """As the studio does: refitted after every vote, the prior chosen anew after every REFIT_PRIOR."""
        again = self.posterior is None or len(self.y) % REFIT_PRIOR == 0
        priors = PRIORS if again or self.posterior is None else (self.posterior.prior,)
        return fit(np.stack(self.d), np.array(self.y), priors=priors, side_std=self.side_std)

    def held_out(self) -> dict[str, Any]:
        """What a taste's card says of the votes: accuracy on held-out ones with its interval, the evidence, and the
        share of unseen pairs that the taste expects to order rightly."""
        d, y = np.stack(self.d), np.array(self.y)
        assert self.posterior is not None
        predicted = leave_one_out(d, y, side_std=self.side_std)
        expected = expected_accuracy(self.posterior, self.unseen, predicted)
        return accuracy(predicted, y) | {
            "votes": len(y), "log_evidence": self.posterior.log_evidence, "expected": expected}  # fmt: skip

    def predicts(self, pool: Pool, pairs_: int = 4000) -> float:
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

    def __init__(self, concepts: int, quick: bool, blocks: tuple[str, ...] | None = None):
        self.quick = quick
        self.panel = embedded_panel()
        self.people = people(self.panel)
        self.reward = self.panel.rewards["emoji"]
        self.features = features_of(self.reward, "emoji", blocks)
        self.plan = recipe.read("taste-emoji")
        self.model = recipe.build_model(self.plan)
        self.sampler = recipe.sampler_of(recipe.build_algorithm(self.plan))
        self.size = {"concepts": 12, "each": 6} if quick else {"concepts": concepts, "each": 10}
        self.first = draw_pool(self.model, self.sampler, self.features, **self.size, seed=1)
        self.scaling = scaling_of(torch.from_numpy(self.first.raw), self.first.prompts, self.features.sizes)
        self.prompts = recipe.evenly_spaced(recipe.prompts_of(self.plan)[1], 8 if quick else concepts)
        self.shown, _ = pairs(self.prompts, (0, 1))

    @cached_property
    def unseen(self) -> Pool:
        """Pictures that nobody votes on."""
        return draw_pool(self.model, self.sampler, self.features, **self.size, seed=2)

    @cached_property
    def base(self) -> Tensor:
        """The unaligned pictures that results are compared with."""
        return self.pictures(self.model, self.prompts, "reference")

    @cached_property
    def candidates(self) -> Tensor:
        """Of which the best by a taste is taken, (8, N, 3, H, W): the same for everybody."""
        many = 2 if self.quick else 8
        return torch.stack(
            [self.pictures(self.model, self.prompts, "reference", (10 + 2 * k, 11 + 2 * k)) for k in range(many)]
        )

    def measured(self, utility: Utility, images: Tensor, base: Tensor, prompts: list[str]) -> dict[str, float]:
        """The true taste in standard deviations of the first pool, the share of wins against the base's pictures with a
        tie as half, as `palate compare` counts, the share of ties, what was kept."""
        pool = self.first.utilities(utility)
        u, before = (in_parts(utility, x, prompts) for x in (images, base))
        judge = self.panel.classifier
        wanted = [parse_prompt(p).concept for p in prompts]
        right = [
            [judge.concepts[int(k)] == want for k, want in zip(judge.concept(x), wanted, strict=True)]
            for x in (images, base)
        ]
        spread = [float(diversity(judge.features(x), prompts).nanmean()) for x in (images, base)]
        after, start = ((float(x.mean()) - pool.mean()) / pool.std() for x in (u, before))
        ties = float((u == before).mean())
        return {"taste": float(after), "before": float(start), "win": float((u > before).mean()) + ties / 2,
                "ties": ties, "concept": float(np.mean(right[0])), "concept_before": float(np.mean(right[1])),
                "diversity": spread[0] / spread[1] if spread[1] > 0 else float("nan")}  # fmt: skip

    def pictures(
        self, model: Any, prompts: list[str], weights: str = "policy", seeds: tuple[int, ...] = (0, 1)
    ) -> Tensor:
        return generate(model, prompts, seeds, weights=weights, sampler=self.sampler)

    def words(self, voter: Voter, pool: Pool) -> list[WordChoice]:
        """The words that the taste picks on a pool's pictures."""
        assert voter.posterior is not None
        z = self.scaling(torch.from_numpy(pool.raw)).numpy()
        std = self.scaling.std(torch.from_numpy(voter.posterior.mean))
        return offered(word_gains(z, pool.hidden, voter.posterior, std))

    def align(self, model: Any, objective: TasteReward, seed: int, context: Sequence[str]) -> str:
        """One round of training as the recipe has it, with the guard; why it ended. context: words to be learnt."""
        given = [f"algorithm.context=[{', '.join(context)}]"] if context else []
        plan = recipe.read("taste-emoji-words" if context else "taste-emoji", given)
        changes = {"steps": 2, "guard": recipe.GuardSettings(every=0)} if self.quick else {}
        with tempfile.TemporaryDirectory() as folder:
            outcome = train(
                model, recipe.build_algorithm(plan), objective, recipe.prompts_of(plan)[0], folder=Path(folder) / "run",
                preview=recipe.prompts_of(plan)[1], progress=False, **(of_recipe(plan, seed) | changes),
            )  # fmt: skip
        return outcome.reason

    def rivals(self, voter: Voter, objective: TasteReward) -> dict[str, Tensor]:
        """Without training: the best of 8 by the learned taste, and the words that it picks."""
        with torch.no_grad():
            scores = torch.stack([objective(images, self.shown) for images in self.candidates])
        best = self.candidates[scores.argmax(0), torch.arange(len(self.shown))]
        words = [choice.word for choice in self.words(voter, self.first)]
        named = [
            with_words(prompt, words) if parse_prompt(prompt).background is None else prompt for prompt in self.prompts
        ]
        return {"best-of-8": best, "words": self.pictures(self.model, named, "reference")}

    def dpo(self, voter: Voter, utility: Utility, seed: int) -> dict[str, float]:
        """Diffusion-DPO on the voted pairs, on the base model; measured against the base model's own pictures."""
        plan = recipe.read("taste-emoji-dpo")
        torch.manual_seed(seed)
        model, algorithm = recipe.build_model(plan), recipe.build_algorithm(plan)
        changes = {"guard": recipe.GuardSettings(every=0)} | ({"steps": 1} if self.quick else {})
        with torch.no_grad():
            latents = torch.stack([model.encode(torch.stack([a, b])) for a, b, _ in voter.voted])
        with tempfile.TemporaryDirectory() as folder:
            train(model, algorithm, self.reward, [prompt for _, _, prompt in voter.voted], folder=Path(folder) / "run",
                  latents=latents, progress=False, **(of_recipe(plan, seed) | changes))  # fmt: skip
        prompts = recipe.evenly_spaced(self.prompts, 4 if self.quick else 52)
        shown, _ = pairs(prompts, (0, 1))
        images, base = (generate(model, prompts, (0, 1), weights=weights) for weights in ("policy", "reference"))
        return self.measured(utility, images, base, shown)


def of_recipe(plan: Any, seed: int) -> dict[str, Any]:
    """How the recipe trains, as arguments of `train`; without checkpoints or previews."""
    t = plan.trainer
    return {"steps": t.steps, "batch_size": t.batch_size, "lr": t.lr, "clip_norm": t.clip_norm, "warmup": t.warmup,
            "guard": t.guard, "seed": seed, "checkpoint_every": 0}  # fmt: skip


@cache
def bench(concepts: int, quick: bool, blocks: tuple[str, ...] | None = None) -> Bench:
    """One per process."""
    return Bench(concepts, quick, blocks)


def in_parts(utility: Utility, images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    """The true taste of many pictures, 64 at a time."""
    with torch.no_grad():
        return np.concatenate([utility(images[i : i + 64], list(prompts[i : i + 64])).double().numpy()
                               for i in range(0, len(images), 64)])  # fmt: skip


def reward_of(voter: Voter, features: Features, reward: Any, absolute: float) -> TasteReward:
    """What is optimised: the voter's posterior mean, with `absolute` times the reward."""
    assert voter.posterior is not None
    mean, covariance = (torch.from_numpy(x) for x in (voter.posterior.mean, voter.posterior.covariance))
    return TasteReward(features, voter.scaling, mean, covariance, reward, absolute=absolute)


# ----------------------------------------------------------------------------------------------------------- the rows


def accuracy_row(name: str, seed: int, concepts: int, quick: bool) -> list[dict[str, Any]]:
    """How many unseen pairs are predicted after 10 to 160 votes, at random and by BALD."""
    here, rows = bench(concepts, quick), []
    for bald in (False, True):
        voter = Voter(here.people[name], here.first, here.scaling, seed)
        for count in VOTES[:2] if quick else VOTES:
            voter.vote(here.first, count - len(voter.y), bald=bald)
            found = voter.held_out() if count <= 80 else {}  # refits of more take long
            found |= {"learnt": learnt(found), "nats": over_chance(found)} if found else {}
            rows.append({"person": name, "seed": seed, "bald": bald, "votes": count,
                         "unseen": voter.predicts(here.unseen), **found})  # fmt: skip
    return rows


def align_row(name: str, seed: int, rounds: int, votes: int, concepts: int, quick: bool) -> list[dict[str, Any]]:
    """Rounds of voting and aligning, and the rivals after each at the same votes."""
    here, rows = bench(concepts, quick), []
    utility = here.people[name]
    torch.manual_seed(seed)
    model = recipe.build_model(here.plan)
    voter, pool = Voter(utility, here.first, here.scaling, seed), here.first
    about_: dict[str, Any] = {}
    known: list[str] = []  # words that the model draws by already
    for number in range(1, rounds + 1):
        voter.vote(pool, votes, bald=True)
        found = voter.held_out()
        about_ = {"person": name, "seed": seed, "round": number, "votes": len(voter.y), "held_out": found["accuracy"],
                  "low": found["low"], "offered": learnt(found)}  # fmt: skip
        words = unasked(here.words(voter, pool), known)  # as the studio does: of what the model in use draws
        objective = reward_of(voter, here.features, here.reward, here.plan.reward.taste.absolute)
        began = time.process_time()
        ended = here.align(model, objective, seed, words)
        known = words or known
        seconds = time.process_time() - began
        images = here.pictures(model, here.prompts)
        rows.append(about_ | {"way": "direct", "ended": ended, "context": words, "cpu_seconds": seconds,
                              **here.measured(utility, images, here.base, here.shown)})  # fmt: skip
        rows += [about_ | {"way": way} | here.measured(utility, found, here.base, here.shown)
                 for way, found in here.rivals(voter, objective).items()]  # fmt: skip
        for row in rows[-3:]:
            print(f"{name} {seed}, round {number}: {row['way']} {row['taste']:+.2f}, won {row['win']:.2f}", flush=True)
        if number < rounds:
            pool = draw_pool(model, here.sampler, here.features, **here.size, seed=10 * number + seed)
    rows.append(about_ | {"way": "dpo"} | here.dpo(voter, utility, seed))
    return rows


def golden_row(seed: int, concepts: int, quick: bool) -> dict[str, Any]:
    """The first measured round: "warm3d", `colour` features, 40 random votes, lambda 4, 30 updates without guard."""
    here = bench(concepts, quick, ("colour",))
    utility = here.people["warm3d"]
    torch.manual_seed(seed)
    model = recipe.build_model(here.plan)
    voter = Voter(utility, here.first, here.scaling, seed, side_std=0.0)
    voter.vote(here.first, 40, bald=False)
    assert voter.posterior is not None
    began = time.process_time()
    ended = here.align(model, reward_of(voter, here.features, here.reward, 4.0), seed, [])
    seconds = time.process_time() - began
    found = here.measured(utility, here.pictures(model, here.prompts), here.base, here.shown)
    return {"seed": seed, "prior": voter.posterior.prior, "log_evidence": voter.posterior.log_evidence,
            "unseen": voter.predicts(here.unseen), "ended": ended, "cpu_seconds": seconds, **found}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the tables


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    """Unseen pairs predicted, over people and seeds; those whom a linear utility of the features can hold, and all."""
    lines = ["| votes | random | BALD | random, all people | BALD, all people |", "|--:|--:|--:|--:|--:|"]
    for votes in VOTES:
        cells = []
        for names in (UNCONDITIONAL, None):
            for bald in (False, True):
                values = [r["unseen"] for r in rows if r["bald"] == bald and r["votes"] == votes
                          and (names is None or r["person"] in names)]  # fmt: skip
                cells.append(about(values) if values else "-")
        lines.append(f"| {votes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def left_alone(concepts: int) -> float:
    """The share of the pictures that words leave as they are: those of prompts that name a background."""
    prompts = recipe.evenly_spaced(recipe.prompts_of(recipe.read("taste-emoji"))[1], concepts)
    return float(np.mean([parse_prompt(prompt).background is not None for prompt in prompts]))


def won(row: dict[str, Any], alone: float) -> float:
    """The share of blind comparisons that a way wins, a tie as half. The first rows, which do not keep their ties,
    counted them as lost. Only words can tie there: over `alone` of the pictures, `left_alone`, and over all of them
    where the taste picked no word, which shows in a taste that is the same number before and after."""
    if "ties" in row or row["way"] != "words":
        return float(row["win"])
    return float(row["win"]) + (1.0 if row["taste"] == row["before"] else alone) / 2


def rounds_table(rows: Sequence[dict[str, Any]], alone: float) -> str:
    """A line per person and way after the last round; means and standard deviations over seeds. Below, where all of
    them were measured, each round of the five together, whose taste a linear utility of the features can hold. alone:
    of `won`."""
    lines = ["| person | round | way | true taste, before -> after | blind win rate, a tie half | concepts | diversity "
             "| held out | learnt |", "|---|--:|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    rows = [r | {"win": won(r, alone)} for r in rows]
    together = [r | {"person": "the five"} for r in rows if r["person"] in UNCONDITIONAL]
    whole = {r["person"] for r in rows} >= set(UNCONDITIONAL)
    last = max(r["round"] for r in rows)
    rows = [*(r for r in rows if r["round"] == last), *(together if whole else ())]
    for person, number, way in dict.fromkeys((r["person"], r["round"], r["way"]) for r in rows):
        own = [r for r in rows if (r["person"], r["round"], r["way"]) == (person, number, way)]

        def mean(key: str, form: str = "{:.2f}", own: list[dict[str, Any]] = own) -> str:
            return about([r[key] for r in own], form)

        kept = about([r["concept"] - r["concept_before"] for r in own], "{:+.3f}")
        offers = sum(r["offered"] for r in own)
        lines.append(f"| {person} | {number} | {way} | {np.mean([r['before'] for r in own]):+.2f} -> "
                     f"{mean('taste', '{:+.2f}')} | {mean('win')} | {kept} | {mean('diversity')} | {mean('held_out')} "
                     f"| {offers} of {len(own)} |")  # fmt: skip
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=("accuracy", "align", "golden", "all"))
    made.add_argument("--people", nargs="+", default=None, help="names; all twelve if left out")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--votes", type=int, default=20, help="per round")
    made.add_argument("--concepts", type=int, default=min(104, len(vocabulary().concepts)),
                      help="of the pools (10 pictures each) and of the pictures that are judged (2 each)")  # fmt: skip
    return parsed(made)


def main() -> None:
    given = arguments()
    names = given.people or (["warm3d"] if given.quick else list(PEOPLE))
    seeds, count = (given.seeds[:1], 1) if given.quick else (given.seeds, given.rounds)
    results, tables = given.results, {}
    size = (given.concepts, given.quick)

    def rows(
        what: str, recipes: Sequence[str], make: Callable[..., Any], shown: str, *more: int
    ) -> list[dict[str, Any]]:
        cells = [(name, seed) for seed in seeds for name in names]
        wanted = [Row(results / f"{slug('taste', what, *cell)}.json", make, (*cell, *more, *size), (GENERATOR,),
                      fingerprints(*recipes)) for cell in cells]  # fmt: skip
        made = measured(wanted, given.jobs, lambda found: [round(row[shown], 3) for row in found],
                        minutes=given.minutes)  # fmt: skip
        return [row for found in made for row in found]

    if given.what in ("accuracy", "all"):
        tables["taste-accuracy"] = accuracy_table(rows("accuracy", FIRST, accuracy_row, "unseen"))
    if given.what in ("align", "all"):
        found = rows("align", ROUNDS, align_row, "taste", count, given.votes)
        tables["taste-rounds"] = rounds_table(found, left_alone(given.concepts))
    if given.what == "golden":
        first = fingerprints(*FIRST)
        found = measured([Row(results / f"{slug('taste', 'golden', seed)}.json", golden_row,
                              (seed, given.concepts, given.quick), (GENERATOR,), first) for seed in seeds],
                         given.jobs, minutes=given.minutes)  # fmt: skip
        for row in found:
            print(row)
    for name, text in tables.items():
        write_table(results / f"{name}.md", text)
        print(text)


if __name__ == "__main__":
    main()
