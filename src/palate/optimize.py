"""Online black-box optimisation: an oracle that can only be asked, a budget of questions, a surrogate that SQDF climbs.

After the black-box experiment of SQDF (arXiv 2512.04559), which has the structure of SEIKO (arXiv 2402.16359). Round
r = 1, 2, ...:

    1. draw images with the policy as it is, ask the oracle about each, write everything down    queries.jsonl
    2. fit a surrogate to all answers so far: affine heads on frozen, differentiable features
    3. SQDF climbs the surrogate from the policy as it is; its KL is to the pretrained model     round-01/, a run

The oracle is never differentiated. A question is written down before it is asked, so that the budget holds and no
question is asked twice, whatever interrupts the run: one whose answer was never seen counts as spent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from palate.core import Algorithm, Model, Random, Reward
from palate.evaluate import SIDES, quantise
from palate.recipe import OptimizeSettings, OracleSettings, Recipe, TrainerSettings
from palate.rewards.remote import TOKEN, RemoteReward
from palate.runtime import checkpoint
from palate.runtime.errors import InputError, RewardServiceError
from palate.sampling import sample
from palate.train import Outcome, prompt_order, restore_result, train

Oracle = Callable[[Tensor, Sequence[str]], Any]  # images (B, 3, H, W) in [0, 1], prompts -> B numbers, more is better
Features = Callable[[Tensor, Sequence[str]], Tensor]  # images, prompts -> (B, F), differentiable in the images

MAX_ANSWER = 1 << 20  # bytes of a command's or a server's answer
RIDGES = tuple(10.0**k for k in range(-3, 6))  # candidates, by leave-one-out error


class OracleError(RewardServiceError):
    """The oracle failed as often as is allowed. Every question and answer so far is in queries.jsonl."""


# ------------------------------------------------------------------------------------------------------- the rounds


def optimize(
    model: Model,
    make_algorithm: Callable[[], Algorithm],
    oracle: Oracle,
    features: Features,
    prompts: Sequence[str],
    *,
    folder: str | Path,
    settings: OptimizeSettings,
    trainer: TrainerSettings,
    sample_steps: int | None = None,
    sample_guidance: float | None = None,
    preview: Sequence[str] = (),
    identity: str = "",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Spend the budget and train after each round; continues what `folder` already holds. The model ends as the result.

    trainer.steps are the updates of one round, with a fresh optimizer and a fresh algorithm (an empty buffer).
    OracleError, ValueError and what `palate.train` raises leave everything that was asked in `folder`.
    """
    folder = Path(folder)
    queries = Queries(folder)
    steps = sample_steps or model.default_steps
    guidance = model.default_guidance if sample_guidance is None else sample_guidance
    scale: tuple[float, float] | None = None
    for number, size in enumerate(round_sizes(settings.budget, settings.rounds), 1):
        here = folder / f"round-{number:02d}"

        order = prompt_order(len(prompts), trainer.seed + number, 0, size)

        def draw(ids: list[int], number: int = number, order: list[int] = order) -> tuple[Tensor, list[str]]:
            words = [prompts[order[i]] for i in ids]
            noise = Random(trainer.seed, number, ids).normal("query", model.latent_shape)
            with torch.no_grad():
                noise = noise.to(model.parameters("policy")[0].device)
                x = sample(model, model.encode_prompts(words), noise, steps, guidance=guidance)
                return model.decode(x).float().cpu(), words

        ask_round(queries, number, size, draw, oracle, settings)
        images, words, scores, rounds = queries.answered(number)
        if len(scores) < 2:
            raise InputError(
                f"only {len(scores)} questions were answered in {queries.spent}; mend the oracle, and "
                "raise optimize.budget in another run.folder"
            )
        if scale is None:  # rewards in standard deviations of the base model's own answers: alpha_kl is per one of them
            scale = standard(scores[rounds == rounds.min()])
        targets = (scores - scale[0]) / scale[1]
        surrogate, fit = fit_surrogate(features, images, words, targets, settings, seed=trainer.seed)
        newest = scores[rounds == number]
        row = {"round": number, "spent": queries.spent, "answered": len(scores), **fit}
        if len(newest):
            row |= {"oracle": float(newest.mean()), "oracle_best": float(newest.max())}
        _write_row(folder / "rounds.jsonl", row)
        say(
            f"round {number}: {queries.spent} of {settings.budget} questions, mean answer "
            f"{float(newest.mean()):.4g}; the surrogate explains {fit['explained']:.0%} of the variance"
        )

        resume = bool(checkpoint.steps(here / "checkpoints"))
        if not resume:
            shutil.rmtree(here, ignore_errors=True)
        options = {**vars(trainer), "seed": trainer.seed + number}
        mark = hashlib.sha256(f"{identity}|{number}|{queries.digest(number)}".encode()).hexdigest()
        outcome = train(
            model,
            make_algorithm(),
            surrogate,
            list(prompts),
            folder=here,
            **options,
            identity=mark,
            preview=preview,
            resume=resume,
            sample_steps=sample_steps,
            sample_guidance=sample_guidance,
            progress=progress,
        )
        if outcome.exit_code:
            return outcome
        restore_result(model, here, warn=say)
    if (here / "adapter").is_dir():
        shutil.copytree(here / "adapter", folder / "adapter", dirs_exist_ok=True)
    return Outcome(folder, queries.spent, "finished", 0)


def ask_round(
    queries: Queries,
    number: int,
    size: int,
    draw: Callable[[list[int]], tuple[Tensor, list[str]]],
    oracle: Oracle,
    settings: OptimizeSettings,
) -> None:
    """Ask about the `size` images of a round that no earlier try has answered, never past the budget."""
    pending = [i for i in range(size) if (number, i) not in queries.closed]
    tries: dict[int, int] = {}
    while pending and queries.spent < settings.budget:
        now = pending[: min(settings.oracle.batch, settings.budget - queries.spent)]
        images, words = draw(now)
        images = quantise(images)  # what the stored PNG holds, for every kind of oracle
        asked = queries.ask(number, now, images, words)
        try:
            answer = numbers(within(settings.oracle.timeout, oracle, images, words), len(now))
            problem = "the answer is not a finite number"
        except Exception as error:  # whatever the user's own code raises is the oracle's failure, told below
            answer, problem = [math.nan] * len(now), f"{type(error).__name__}: {error}"
        queries.answer(asked, answer, problem)
        failed = [i for i, score in zip(now, answer, strict=True) if not math.isfinite(score)]
        for i in failed:
            tries[i] = tries.get(i, 0) + 1
        if any(tries[i] > settings.oracle.retries for i in failed):
            raise OracleError(
                f"the oracle failed {settings.oracle.retries + 1} times on the same images: "
                f"{problem.splitlines()[0]}. {queries.spent} of {settings.budget} questions are spent "
                f"and kept in {queries.log}; mend the oracle and give the same command again"
            )
        pending = failed + pending[len(now) :]


def round_sizes(budget: int, rounds: int) -> list[int]:
    """Questions of each round: 1 : 2 : 4 : ..., together exactly `budget`. 15360 in 4 gives 1024, 2048, 4096, 8192.

    ValueError when the first round has fewer than the two that a surrogate needs.
    """
    least = 2 * (2**rounds - 1)
    if budget < least:
        raise InputError(f"optimize.budget = {budget} is too small for {rounds} rounds; expected at least {least}")
    ends = [budget * (2**k - 1) // (2**rounds - 1) for k in range(rounds + 1)]
    return [b - a for a, b in itertools.pairwise(ends)]


def from_recipe(plan: Recipe, *, say: Callable[[str], None] = print) -> Outcome:
    """What `palate optimize` does with a checked recipe that has an `optimize` section."""
    from palate import recipe as recipes

    folder, settings = Path(plan.run.folder), plan.optimize
    checkpoint.check_space(folder, need=1 << 20)
    oracle = load_oracle(settings.oracle, seed=plan.trainer.seed)  # the cheap things that can be wrong come first
    round_sizes(settings.budget, settings.rounds)
    stored = folder / "recipe.yaml"
    begun = recipes.parse(stored.read_text("utf-8")) if stored.is_file() else plan
    if begun.optimize is None:
        raise InputError(f"{folder} holds a run of palate train; choose another run.folder, or replace it with --fresh")
    if identity_of(begun) != identity_of(plan):
        raise InputError(
            f"{folder} was begun with other settings (its recipe.yaml); only how the oracle is reached "
            "may change. Choose another run.folder, or replace it with --fresh, answers included"
        )
    prompts, preview = recipes.prompts_of(plan)
    recipes.check_start(plan)
    torch.manual_seed(plan.trainer.seed)  # the LoRA's first weights
    model = recipes.build_model(plan)
    recipes.load_consistency(plan, model)
    if hasattr(model, "cache_prompts"):
        model.cache_prompts([*prompts, *preview])
    checkpoint.write_atomically(stored, recipes.dump(plan).encode())
    features = reward_features(recipes.load_reward(settings.features, settings.features_source), prompts)
    return optimize(
        model,
        lambda: recipes.build_algorithm(plan),
        oracle,
        features,
        prompts,
        folder=folder,
        settings=settings,
        trainer=plan.trainer,
        sample_steps=plan.sample.steps,
        sample_guidance=plan.sample.guidance,
        preview=preview,
        identity=identity_of(plan),
        say=say,
    )


def identity_of(plan: Recipe) -> str:
    """Hash of what decides the questions and the updates: not how the oracle is reached, nor how long one waits."""
    from palate import recipe as recipes

    tree = recipes.as_tree(plan)
    oracle = {key: value for key, value in tree["optimize"]["oracle"].items() if key in ("name", "function", "noise")}
    kind = next((key for key in ("command", "url") if tree["optimize"]["oracle"][key] is not None), None)
    return _hash([recipes.fingerprint(plan), plan.trainer.steps, {**tree["optimize"], "oracle": [kind, oracle]}])


def _hash(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def newest_round(folder: Path) -> Path:
    """The last round's run that holds a checkpoint; ValueError when no round has come so far."""
    rounds = [path for path in sorted(folder.glob("round-*")) if checkpoint.steps(path / "checkpoints")]
    if not rounds:
        raise InputError(f"{folder} holds no trained round yet; continue it with palate optimize")
    return rounds[-1]


# ---------------------------------------------------------------------------------------------------- what was asked


class Queries:
    """queries.jsonl and queries/*.png: {"query", "round", "index", "prompt", "file", "sha256"} before a question,
    {"query", "score"} or {"query", "failed"} after it. Numbers of questions never come back."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "queries.jsonl"
        (folder / "queries").mkdir(parents=True, exist_ok=True)
        self.rows: dict[int, dict[str, Any]] = {}
        kept = []
        lines = self.log.read_text("utf-8").splitlines() if self.log.is_file() else []
        for place, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self.rows.setdefault(row["query"], {}).update(row)
            except (ValueError, KeyError, TypeError) as error:
                if place == len(lines):  # a crash cut it short, before its question was asked
                    break
                raise InputError(f"{self.log}, line {place}: not a query ({error})") from error
            kept.append(line + "\n")
        checkpoint.write_atomically(self.log, "".join(kept).encode())

    @property
    def spent(self) -> int:
        """Questions asked, answered or not."""
        return len(self.rows)

    @property
    def closed(self) -> set[tuple[int, int]]:
        """(round, index) of images not to be asked about again: answered, or asked and the answer never seen."""
        return {(row["round"], row["index"]) for row in self.rows.values() if "failed" not in row}

    def ask(self, number: int, ids: Sequence[int], images: Tensor, prompts: Sequence[str]) -> list[int]:
        """Write the questions down, durably. Their numbers."""
        first, rows = self.spent, []
        for k, (i, image, prompt) in enumerate(zip(ids, images, prompts, strict=True)):
            data, file = png(image), f"queries/{first + k:06d}.png"
            (self.folder / file).write_bytes(data)
            rows.append(
                {
                    "query": first + k,
                    "round": number,
                    "index": i,
                    "prompt": prompt,
                    "file": file,
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            )
        self._append(rows)
        return [row["query"] for row in rows]

    def answer(self, asked: Sequence[int], scores: Sequence[float], problem: str) -> None:
        self._append(
            [
                {"query": k, "score": score} if math.isfinite(score) else {"query": k, "failed": problem[:500]}
                for k, score in zip(asked, scores, strict=True)
            ]
        )

    def answered(self, last: int) -> tuple[Pictures, list[str], Tensor, Tensor]:
        """Images, prompts, scores (float64) and rounds of all answers up to round `last`, as they were asked."""
        rows = self._until(last)
        scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
        rounds = torch.tensor([row["round"] for row in rows])
        return Pictures(self.folder, rows), [row["prompt"] for row in rows], scores, rounds

    def digest(self, last: int) -> str:
        text = json.dumps([(row["query"], row["sha256"], row["score"]) for row in self._until(last)])
        return hashlib.sha256(text.encode()).hexdigest()

    def _until(self, last: int) -> list[dict[str, Any]]:
        return [self.rows[k] for k in sorted(self.rows) if "score" in self.rows[k] and self.rows[k]["round"] <= last]

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            self.rows.setdefault(row["query"], {}).update(row)


class Pictures:
    """The images of rows of queries.jsonl, read when a slice of them is asked for: (B, 3, H, W) in [0, 1].

    CheckpointError for one that is not what was asked about.
    """

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]):
        self.folder, self.rows = folder, rows

    def __getitem__(self, part: slice) -> Tensor:
        images = []
        for row in self.rows[part]:
            data = (self.folder / row["file"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise checkpoint.CheckpointError(
                    f"{self.folder / row['file']} is not the image that was asked about; "
                    "restore it, or start again with --fresh"
                )
            images.append(torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1).float() / 255)
        return torch.stack(images)


# ------------------------------------------------------------------------------------------------------- surrogates


class Surrogate:
    """A differentiable reward: the optimistic value of affine heads on frozen features.

    bootstrap: the largest of the heads. ucb: one head plus its uncertainty.
    """

    def __init__(
        self, features: Features, mean: Tensor, std: Tensor, heads: Tensor, bonus: tuple[Tensor, float, float] | None
    ):
        self.features, self.mean, self.std, self.heads, self.bonus = features, mean, std, heads, bonus

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        found = self.features(images, prompts)
        phi = with_one((found - self.mean.to(found)) / self.std.to(found))
        values = phi @ self.heads.to(phi).T
        if self.bonus is None:
            return values.amax(1)
        covariance, scale, ridge = self.bonus
        return values[:, 0] + ucb_bonus(phi, covariance, scale, ridge).to(values)


@torch.no_grad()
def fit_surrogate(
    features: Features,
    images: Tensor | Pictures,
    prompts: Sequence[str],
    targets: Tensor,
    settings: OptimizeSettings,
    *,
    seed: int,
) -> tuple[Surrogate, dict[str, float]]:
    """The surrogate of `targets` (N,), and what it explains of answers it has not seen (leave-one-out)."""
    parts = [features(images[k : k + 64], prompts[k : k + 64]).double() for k in range(0, len(targets), 64)]
    phi = torch.cat(parts)
    mean, std = phi.mean(0), phi.std(0, correction=0).clamp_min(1e-6)
    phi = with_one((phi - mean) / std)
    errors = {ridge: leave_one_out(phi, targets, ridge).square().mean() for ridge in RIDGES}
    ridge = min(errors, key=errors.get)
    fit = {"ridge": ridge, "explained": float(1 - errors[ridge] / targets.var(correction=0).clamp_min(1e-12))}
    if settings.surrogate == "ucb":
        heads = ridge_head(phi, targets, ridge)[None]
        scale = settings.exploration * float(errors[ridge].sqrt())
        return Surrogate(features, mean, std, heads, (phi.T @ phi, scale, ridge)), fit
    rng = np.random.default_rng((seed, len(targets)))
    drawn = [torch.from_numpy(rng.integers(0, len(targets), len(targets))) for _ in range(settings.heads)]
    heads = torch.stack([ridge_head(phi[rows], targets[rows], ridge) for rows in drawn])
    return Surrogate(features, mean, std, heads, None), fit


def with_one(phi: Tensor) -> Tensor:
    """(N, F) -> (N, F + 1): the last feature is 1."""
    return torch.cat([phi, torch.ones_like(phi[:, :1])], 1)


def ridge_head(phi: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """argmin_w |phi w - y|^2 + ridge |w without its last entry|^2, for phi (N, F) whose last column is the constant."""
    penalty = torch.full((phi.shape[1],), ridge, dtype=phi.dtype)
    penalty[-1] = 0
    return torch.linalg.solve(phi.T @ phi + penalty.diag(), phi.T @ targets)


def leave_one_out(phi: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """y_i minus the prediction of the head fitted to all others, (N,): e_i / (1 - h_ii), without fitting N times."""
    penalty = torch.full((phi.shape[1],), ridge, dtype=phi.dtype)
    penalty[-1] = 0
    solved = torch.linalg.solve(phi.T @ phi + penalty.diag(), phi.T)
    hat = (phi * solved.T).sum(1)
    return (targets - phi @ (solved @ targets)) / (1 - hat).clamp_min(1e-9)


def ucb_bonus(phi: Tensor, covariance: Tensor, scale: float, ridge: float, limit: float = 10.0) -> Tensor:
    """min(c sqrt(phi^T (C + ridge I)^-1 phi), limit), (B,).

    C is the sum of phi phi^T over the data here, so that the bonus shrinks as answers come in. The released program has
    their centred covariance in its place, with c = .01, ridge = .001: that one does not shrink.
    """
    whole = covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)
    solved = torch.linalg.solve(whole, phi.to(covariance).T)
    return (scale * (phi.to(covariance) * solved.T).sum(1).clamp_min(1e-24).sqrt()).clamp_max(limit)


def standard(scores: Tensor) -> tuple[float, float]:
    """Mean and standard deviation; 1 if the scores do not vary."""
    spread = float(scores.std(correction=0)) if len(scores) > 1 else 0.0
    return float(scores.mean()), spread if spread > 0 else 1.0


def reward_features(reward: Reward, prompts: Sequence[str]) -> Features:
    """A two-tower reward's image features, its score of the prompt, five closed-form statistics of the pixels, and the
    layout: over a 4 x 4 grid, the mean distance from the colour of the border. The layout stands there once more for
    each word that some but not all of `prompts` hold (4 to 96 %), zero where the word is missing, so that an affine
    head can want the drawing elsewhere on "left" than on "right"."""
    from palate.rewards import simple

    statistics = (simple.brightness, simple.warmth, simple.saturation, simple.colourfulness, simple.high_frequency)
    bags = [words_of(prompt) for prompt in prompts]
    shares = {word: sum(word in bag for bag in bags) / len(bags) for word in sorted(set().union(*bags))}
    dividing = [word for word, share in shares.items() if 0.04 <= share <= 0.96]

    def features(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = reward.image_features(images)
        rows = [reward.score(seen, prompts), *(f(images) for f in statistics)]
        apart = images - simple.border(images.detach())[..., None, None]
        layout = F.adaptive_avg_pool2d(torch.linalg.vector_norm(apart, dim=1, keepdim=True), 4).flatten(1)
        named = layout.new_tensor([[float(word in words_of(prompt)) for word in dividing] for prompt in prompts])
        by_word = torch.einsum("bw,bl->bwl", named, with_one(layout)).flatten(1)
        return torch.cat([seen, *(part.to(seen) for part in (torch.stack(rows, 1), layout, by_word))], 1)

    return features


def words_of(prompt: str) -> set[str]:
    return set(re.findall(r"\w+", prompt.lower()))


# ---------------------------------------------------------------------------------------------------------- oracles


def load_oracle(settings: OracleSettings, *, seed: int = 0) -> Oracle:
    """The oracle that a recipe names. ValueError if there is none of the kind."""
    if settings.function is not None:
        module, colon, name = settings.function.partition(":")
        with _importable(os.getcwd()):
            try:
                found = getattr(importlib.import_module(module), name) if colon and name else None
            except Exception as error:  # importing runs the user's own code
                raise InputError(
                    f"optimize.oracle.function: cannot import {settings.function!r} ({type(error).__name__}: {error})"
                ) from error
        if not callable(found):
            raise InputError(
                f"optimize.oracle.function: expected module:function of something callable, got {settings.function!r}"
            )
        return found
    if settings.command is not None:
        if shutil.which(settings.command[0]) is None:
            raise InputError(f"optimize.oracle.command: there is no program {settings.command[0]!r}")
        return command_oracle(settings.command, settings.timeout)
    if settings.url is not None and (token := os.environ.get(TOKEN)):  # a reward service: with its id and token
        return RemoteReward(
            settings.url,
            token,
            timeout=settings.timeout,
            retries=0,
            piece=settings.batch,
            concurrency=1,
            key="optimize.oracle.url",
        )
    if settings.url is not None:
        return http_oracle(settings.url, settings.timeout)
    return noisy(BUILT_IN[settings.name](), settings.noise, seed)


def exact_reward(name: str) -> Reward:
    """A built-in oracle without noise, as a reward: for judging, after everything was asked."""
    oracle = BUILT_IN[name]()
    return lambda images, prompts: torch.as_tensor(oracle(images, prompts), dtype=torch.float32)


def noisy(oracle: Oracle, std: float, seed: int) -> Oracle:
    """oracle + std z; z is a standard normal that is a function of (seed, prompt, image)."""
    if not std:
        return oracle

    def noisy_oracle(images: Tensor, prompts: Sequence[str]) -> list[float]:
        keys = [
            hashlib.blake2b(f"{seed}|{prompt}".encode() + png(image), digest_size=16).digest()
            for image, prompt in zip(images, prompts, strict=True)
        ]
        z = [np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).standard_normal() for key in keys]
        return [float(score) + std * float(e) for score, e in zip(oracle(images, prompts), z, strict=True)]

    return noisy_oracle


def small_file() -> Oracle:
    """Minus the size of the image as a JPEG, in kilobytes: compressibility."""
    from palate.rewards.simple import jpeg_size

    return lambda images, prompts: -jpeg_size(images) / 1000


def hidden_judge() -> Oracle:
    """How sure a judge that no surrogate sees is of the prompt's concept: its probability, in [0, 1]."""
    from palate.rewards.emoji import EmojiClassifier, parse_prompt

    judge = EmojiClassifier()

    @torch.no_grad()
    def judge_oracle(images: Tensor, prompts: Sequence[str]) -> Tensor:
        concepts = [parse_prompt(prompt).concept for prompt in prompts]
        if None in concepts:
            raise InputError(f"the hidden judge needs a concept; there is none in {prompts[concepts.index(None)]!r}")
        found = judge.logits(images)[0].softmax(-1)
        return found[torch.arange(len(images)), [judge.concepts.index(concept) for concept in concepts]]

    return judge_oracle


def colour_position() -> Oracle:
    """Exact, in [0, 1]: how near the border is to the background that the prompt names, and how far the drawing is on
    the side that it names; the mean of what is named."""
    from palate.models.vocabulary import vocabulary
    from palate.rewards.emoji import parse_prompt, position
    from palate.rewards.simple import border

    colours = {name: torch.tensor(rgb, dtype=torch.float32) / 255 for name, rgb in vocabulary().colours.items()}

    def exact(images: Tensor, prompts: Sequence[str]) -> list[float]:
        edge, centre, scores = border(images), position(images).nan_to_num(0.0), []
        for k, caption in enumerate(map(parse_prompt, prompts)):
            parts = []
            if caption.background is not None:
                parts.append(1 - float((edge[k] - colours[caption.background]).norm()) / math.sqrt(3))
            if caption.position is not None:
                axis, sign = SIDES[caption.position]
                parts.append((1 + sign * float(centre[k, axis])) / 2)
            if not parts:
                raise InputError(
                    f"the colour and position oracle needs a background or a side; {prompts[k]!r} names neither"
                )
            scores.append(sum(parts) / len(parts))
        return scores

    return exact


BUILT_IN: dict[str, Callable[[], Oracle]] = {
    "jpeg-size": small_file, "hidden-judge": hidden_judge, "colour-position": colour_position,
}  # fmt: skip


def command_oracle(command: Sequence[str], timeout: float) -> Oracle:
    """A program, started once for each batch without a shell.

    It reads {"images": [paths of PNG files], "prompts": [...]} from its standard input and prints {"scores": [...]}.
    """

    def run(images: Tensor, prompts: Sequence[str]) -> Any:
        with tempfile.TemporaryDirectory(prefix="palate-oracle-") as folder:
            paths = [Path(folder) / f"{k:04d}.png" for k in range(len(images))]
            for path, image in zip(paths, images, strict=True):
                path.write_bytes(png(image))
            question = json.dumps({"images": [str(path) for path in paths], "prompts": list(prompts)}).encode()
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                out, err = process.communicate(question, timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"{command[0]} gave no answer in {timeout:g} s") from error
            finally:
                if process.poll() is None:  # with its children: it leads a group of its own
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
        if process.returncode:
            last = err.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise RuntimeError(": ".join([f"{command[0]} ended with status {process.returncode}", *last]))
        return _scores(out)

    return run


def http_oracle(url: str, timeout: float) -> Oracle:
    """A server: POST {"images": [PNG in base64], "prompts": [...]} as JSON; the answer is {"scores": [...]}."""

    def post(images: Tensor, prompts: Sequence[str]) -> Any:
        body = {"images": [base64.b64encode(png(image)).decode() for image in images], "prompts": list(prompts)}
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return _scores(answer.read(MAX_ANSWER + 1))

    return post


def within(timeout: float, oracle: Oracle, images: Tensor, prompts: Sequence[str]) -> Any:
    """oracle(images, prompts), or TimeoutError. A Python callable that hangs is left behind in its thread."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append((oracle(images, list(prompts)), None))
        except BaseException as error:  # handed to the caller below
            found.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout + 1)  # a command or a server has its own, shorter limit
    if not found:
        raise TimeoutError(f"no answer in {timeout:g} s")
    answer, error = found[0]
    if error is not None:
        raise error
    return answer


def numbers(answer: Any, count: int) -> list[float]:
    """The oracle's answer as `count` floats, not all of them finite perhaps. ValueError if it is something else."""
    if isinstance(answer, Tensor) and answer.ndim > 1:
        raise InputError(f"expected {count} numbers, one an image, got a tensor of shape {tuple(answer.shape)}")
    if isinstance(answer, Tensor):
        answer = answer.detach().flatten().tolist()
    try:
        found = [float(score) for score in answer]
    except TypeError as error:
        raise InputError(f"expected {count} numbers, one an image, got {type(answer).__name__}") from error
    if len(found) != count:
        raise InputError(f"expected {count} numbers, one an image, got {len(found)}")
    return found


def png(image: Tensor) -> bytes:
    """An image (3, H, W) in [0, 1] as a PNG file."""
    stream = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _scores(data: bytes) -> Any:
    if len(data) > MAX_ANSWER:
        raise InputError(f"the answer is longer than {MAX_ANSWER >> 10} KiB")
    try:
        return json.loads(data)["scores"]
    except (ValueError, KeyError, TypeError) as error:
        got = data[:60].decode("utf-8", "replace")
        raise InputError(f'expected {{"scores": [...]}} as JSON, got {got!r}') from error


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """The current folder on the path of imports, as with `python -m`; the console script leaves it out."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _write_row(path: Path, row: dict[str, Any]) -> None:
    """Append the row of a round unless it is there: a resumed run fits the same surrogate again."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    if all(known["round"] != row["round"] for known in rows):
        checkpoint.write_atomically(path, "".join(json.dumps(r) + "\n" for r in [*rows, row]).encode())
