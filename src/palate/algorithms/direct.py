"""Direct reward maximisation of a few-step generator, with control words that may change while it trains.

DRaFT-1 ("Directly Fine-Tuning Diffusion Models on Differentiable Rewards", Clark et al. 2023, arXiv 2309.17400) of a
generator whose whole sample is one network evaluation: then the gradient is exact and nothing is truncated. The words
are SRPO's relative preference (arXiv 2509.06942).

Idea: an image is one call of the network, so follow the reward's gradient through it. Half a processor second makes an
update on the embedded generator: a person sees the model move.

    x0   = G_theta(z, c)                                    one evaluation, no guidance          `FewStepGenerator`
    r    = R(x0, c)                                         without words
    r    = (1 + k) R(x0, "pos. c") - R(x0, "neg. c")        with words; none on a side = c       `combine.relative`
    loss = -mean r

Wanted and unwanted words are rotated, a pair per step. With a reward that reads the prompt in one part only (a taste
plus lambda R) the difference cancels the other part and k keeps it: k = 1 leaves it at its full weight.

Where the words that somebody likes are known, a prompt has them at once and a gradient finds them slowly. So the first
`context_steps` updates may teach the generator to draw what it draws with the words when they are not said, from the
same noise (context distillation: "A General Language Assistant as a Laboratory for Alignment", Askell et al. 2021,
arXiv 2112.00861, for pictures); no reward is asked then.

    loss = mean |G_theta(z, c) - G_ref(z, c with words)|^2                                        `context_distance`

Unregularised by design: run it under a guard. A generator of K > 1 evaluations carries gradient through the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from palate.core import Batch, Loss, Model, PutsWords, Random, Reward, require
from palate.rewards.combine import TEMPLATE, control_texts, relative, score_pair, with_control
from palate.runtime.errors import InputError
from palate.sampling import FewStepGenerator, state_kind


@dataclass(frozen=True)
class DirectSettings:
    """Hyperparameters of the direct maximisation of a reward through a few-step generator."""

    later_keys: ClassVar[Mapping[str, Any]] = {"context": [], "context_steps": 60}  # than the first runs

    generator: FewStepGenerator = field(default_factory=FewStepGenerator)
    positive: tuple[str, ...] = ()  # wanted words, rotated: the pair of step i is (POS[i], NEG[i]),
    negative: tuple[str, ...] = ()  # each index modulo its list's length; none on both sides: the plain reward
    k: float = 1.0  # with words: weight of the absolute reward beside the relative one
    template: str = TEMPLATE
    context: tuple[str, ...] = ()  # words that the generator first learns to draw by without being told
    context_steps: int = 60  # of the run's updates: the first, which the reward has no part in

    def __post_init__(self) -> None:
        for name in ("positive", "negative", "context"):
            object.__setattr__(self, name, word_list(name, vars(self)[name]))
        if overlap := sorted(set(self.positive) & set(self.negative)):
            raise InputError(f"DirectSettings: {overlap[0]!r} is wanted and unwanted at once; keep it on one side")
        if not self.k >= 0:
            raise InputError(f"DirectSettings expected k >= 0; got k = {self.k}")
        require(self, ("context_steps: at least 1", self.context_steps < 1))
        if "{control}" not in self.template or "{prompt}" not in self.template:
            raise InputError(
                f"DirectSettings expected a template with {{control}} and {{prompt}}; got {self.template!r}"
            )

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """The step after which an update asks the reward in place of the reference."""
        return (self.context_steps,) if self.context else ()


class Direct:
    """The algorithm object; its only state is the control words in force. `sampler` is how images are drawn."""

    trains = ("policy",)
    draws_reference = True  # the LoRA is over the generator, so the reference is that generator as it was
    needs_reward_gradient = True
    any_size = True
    reads_images = False

    def __init__(self, settings: DirectSettings):
        self.settings, self.sampler = settings, settings.generator
        self.positive, self.negative = settings.positive, settings.negative

    @property
    def later_metrics(self) -> tuple[str, ...]:
        """What the updates that teach the context do not log."""
        words = ("positive", "negative") if self.positive or self.negative else ()
        return ("reward", *words) if self.settings.context else ()

    def steer(self, positive: Sequence[str] | None = None, negative: Sequence[str] | None = None) -> None:
        """Replace the control words from the next step on; None keeps a list, an empty one takes its words back."""
        wanted = self.positive if positive is None else word_list("positive", positive)
        unwanted = self.negative if negative is None else word_list("negative", negative)
        if overlap := sorted(set(wanted) & set(unwanted)):
            raise InputError(f"{overlap[0]!r} is wanted and unwanted at once; keep it on one side")
        self.positive, self.negative = wanted, unwanted

    def control_texts(self, prompt: str) -> dict[str, list[str]]:
        """What the reward is asked about a prompt, for each control word in force."""
        return control_texts({"positive": self.positive, "negative": self.negative}, prompt, self.settings.template)

    def other_prompts(self, model: Model, prompts: Sequence[str]) -> list[str]:
        """The prompts with the context's words, as the reference is asked them; none without a context."""
        s = self.settings
        if not s.context:
            return []
        try:
            if isinstance(model, PutsWords):
                return [model.with_words(prompt, s.context) for prompt in prompts]
            return with_control(", ".join(s.context), prompts, s.template)
        except InputError as error:
            raise InputError(f"algorithm.context: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        return {"positive": list(self.positive), "negative": list(self.negative)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.positive, self.negative = tuple(state["positive"]), tuple(state["negative"])

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """One update: a batch drawn by the generator, and the reward's gradient through it."""
        s, kind = self.settings, state_kind(model)
        noises = [rng.normal(f"noise-{k}", model.latent_shape).to(**kind) for k in range(s.generator.steps)]
        if s.context and rng.step <= s.context_steps:
            with torch.no_grad():  # before the policy's call: a switch of adapters after it would lose its gradient
                cond = model.encode_prompts(self.other_prompts(model, batch.prompts))
                told = s.generator(model, cond, noises, weights="reference")
            distance = context_distance(s.generator(model, batch.cond, noises), told).mean()
            yield Loss(distance, {"context_distance": distance.detach()}, "policy")
            return
        images = model.decode(s.generator(model, batch.cond, noises))
        if not self.positive and not self.negative:
            r = reward(images, batch.prompts)
            yield Loss(-r.mean(), {"reward": r.mean().detach()}, "policy")
            return
        wanted, unwanted = (word_of(words, rng.step) for words in (self.positive, self.negative))
        texts = [with_control(word, batch.prompts, s.template) for word in (wanted, unwanted)]
        favoured, other = score_pair(reward, images, texts[0], texts[1])
        r = relative(favoured, other, s.k)
        metrics = {"reward": r.mean(), "positive": favoured.mean(), "negative": other.mean()}
        yield Loss(-r.mean(), {name: value.detach() for name, value in metrics.items()}, "policy")


def context_distance(x0: Tensor, told: Tensor) -> Tensor:
    """mean |x0 - told|^2 per element of the latents, (B,)."""
    return (x0 - told).square().flatten(1).mean(1)


def word_of(words: Sequence[str], step: int) -> str:
    """The word of a step; "" where there is none."""
    return words[step % len(words)] if words else ""


def word_list(side: str, words: Sequence[str] | str) -> tuple[str, ...]:
    """Words as a tuple; a text is split at its commas. InputError for what is not a word."""
    given = words.split(",") if isinstance(words, str) else words
    if not isinstance(given, (list, tuple)) or not all(isinstance(w, str) for w in given):
        raise InputError(f"{side}: expected words, as 3d or [3d, large], got {words!r}")
    found = tuple(word.strip() for word in given)
    if any(not word for word in found) and found != ("",):
        raise InputError(f"{side}: expected words, none empty, got {words!r}")
    return () if found == ("",) else found


def calls_per_update(settings: DirectSettings) -> dict[str, int]:
    """Denoiser evaluations of one update per prompt of the batch: forward = K, backward = decode = reward = 1.

    An update of the context has forward = 2 K and neither a decode nor a reward.
    """
    return {"forward": settings.generator.steps, "backward": 1, "decode": 1, "reward": 1}
