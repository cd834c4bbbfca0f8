"""Diffusion-DPO: preference optimisation from pairs of images, offline or online, with a safeguard.

"Diffusion Model Alignment Using Direct Preference Optimization", 2023, arXiv 2311.12908, by Bram Wallace, Meihua Dang,
Rafael Rafailov, Linqi Zhou, Aaron Lou, Senthil Purushwalkam, Stefano Ermon, Caiming Xiong, Shafiq Joty and Nikhil Naik.
"Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models", 2025, arXiv 2511.03317: `safeguard`.
"Offline Preference Optimization for Rectified Flow with Noise-Tracked Pairs" (PNAPO), 2026, arXiv 2605.09433:
noise = "tracked".

Idea: no reward's gradient. Of two images for a prompt one is preferred; the network should denoise that one better than
the reference does, and the other one worse.

    x_t^w, x_t^l = alpha x0 + sigma eps for the preferred and the rejected image, same eps and t
    m(x)         = |eps - eps_theta(x_t)|^2 - |eps - eps_ref(x_t)|^2                   `excess_error`
    s            = -beta/2 (m(x^w) - m(x^l))
    loss         = E -log sigmoid(s)                                                   `pair_loss`     (eq. 14)

Making the rejected image worse is easy and unbounded, and drags the preferred one along: plain DPO collapses that way.
The safeguard scales the rejected image's gradient by lambda <= 1, as large as keeps a step from raising that error:

    <g_w, g_w - lambda g_l> >= mu |g_w|^2,   g the gradients of the two square errors   `safe_scale` (SDPO, eq. 15-17)

It bounds the direction of a step on the step's own noise. Pairs that are told apart already pull weakly, so that after
many large steps the mean error may rise all the same; `keep` adds

    keep beta/2 max(0, m(x^w))                                                         `kept_error`

after DPO-Positive (arXiv 2402.13228), which has it inside the sigmoid, where it fades with the pair's own weight.

Squares are means over the latent's elements and the half is the authors' program's; its beta is 5000 in both launchers
and stands for the paper's beta T omega. For a flow the error of eps is (1 - t) times that of the velocity, so this is
Flow-DPO (arXiv 2501.13918) with beta_t = beta (1 - t)^2.

Pairs come in one of these ways:
- `Batch.latents` (B, 2, C, h, w): [:, 0] the preferred, [:, 1] the rejected image's latent. In a recipe: prompts.pairs,
  a file in the layout of HPDv2 or Pick-a-Pic (`palate.data.preference_pairs`), encoded once before training.
  (B, 4, C, h, w) has the noises that the two were made from as well, for noise = "tracked". A side that is NaN is
  absent, which only loss = "kto" takes: a like, or a dislike, by itself (in a recipe: prompts.likes). The networks
  are not asked about it, and in `prefers` it counts as denoised as well as by the reference.
- Without them, `candidates` samples are drawn for each prompt and the reward says which is the best and which the
  worst. pairs_from = "reference": of the frozen reference, the offline method on a data set labelled on the way.
  "policy": of the policy as it is, online DPO. refresh_every > 0 makes the policy the new reference every so many
  steps: iterative DPO.

Deviations from the papers and their programs:
- The drawn pairs; times are uniform in (0, 1], as the paper's discrete ones are.
- safeguard = "output" is SDPO's proxy, gradients in the network's output, but for each pair by itself, where its
  program has one lambda per batch. "parameters" takes the gradients in the parameters, to which the guarantee belongs,
  for the rank's whole batch, at each of the n levels by itself; it costs three more backwards each.
- PNAPO's dynamic beta is left out.
- `flip` mirrors both images of a pair together, before they are encoded; each pair of prompts.pairs then stands there
  twice, once mirrored, where the program tosses a coin each time. Latents that are given from Python are taken as they
  are, and drawn pairs are mirrored as latents.
- A tie of prompts.pairs with ties = "equal" stands there in both orders, and every other pair twice: on average that
  is `preference` 1/2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palate.algorithms.snapshot import sharded_like, taken, using
from palate.core import Batch, Loss, Model, Random, Reward, require
from palate.path import add_noise
from palate.runtime.errors import InputError
from palate.runtime.sharding import is_cut
from palate.sampling import sample, state_kind

CUT = (
    "algorithm.safeguard: parameters compares gradients of whole networks, and trainer.sharding cuts them; "
    "set algorithm.safeguard=output, or trainer.sharding=none"
)
PairLoss = Literal["sigmoid", "hinge", "ipo", "kto"]


@dataclass(frozen=True)
class DPOSettings:
    """Hyperparameters of Diffusion-DPO and of its variants; defaults are the authors' launchers'."""

    beta: float = 5000.0  # both of the authors' launchers
    loss: PairLoss = "sigmoid"
    safeguard: Literal["off", "output", "parameters"] = "off"  # SDPO
    mu: float = 0.9  # how much of the preferred image's own descent must remain (SDPO's SD1.5 script)
    keep: float = 0.0  # weight of beta/2 max(0, m_w), which brings that error back where it has risen above its start
    noise: Literal["fresh", "tracked"] = "fresh"  # tracked: each image with the noise it was made from (PNAPO)
    n: int = 1  # noise levels trained per pair and update; the program has one

    pairs_from: Literal["reference", "policy"] = "reference"  # this and the next five: how pairs are drawn
    candidates: int = 2  # images per prompt, of which the best and the worst make the pair
    steps: int = 25
    guidance: float = 7.5
    shift: float = 1.0
    tie_margin: float = 0.0  # rewards no further apart are a tie
    # equal: a pair without preference, drawn or given, whose loss is least at s = 0; kto has no such loss
    ties: Literal["drop", "equal"] = "drop"
    refresh_every: int = 0  # steps after which the policy becomes the reference; 0 = never

    desirable_weight: float = 1.0  # lambda_D and lambda_U of loss = "kto": how much a like and a dislike count
    undesirable_weight: float = 1.0

    caption_dropout: float = 0.0  # share of pairs trained without their prompt (the authors' program: .2)
    flip: bool = False  # mirror half of the pairs (the authors' program does); of prompts.pairs before encoding
    posterior: bool = False  # draw given images' latents from the encoder's Gaussian, anew each time (the program does)

    later_keys: ClassVar[Mapping[str, float]] = {"desirable_weight": 1.0, "undesirable_weight": 1.0, "n": 1}

    def __post_init__(self) -> None:
        require(
            self,
            ("beta: above 0", not self.beta > 0),
            ("loss: 'sigmoid', 'hinge', 'ipo' or 'kto'", self.loss not in ("sigmoid", "hinge", "ipo", "kto")),
            ("safeguard: 'off', 'output' or 'parameters'", self.safeguard not in ("off", "output", "parameters")),
            ("mu: between 0 and 1", not 0 <= self.mu <= 1),
            ("keep: at least 0", not self.keep >= 0),
            ("noise: 'fresh' or 'tracked'", self.noise not in ("fresh", "tracked")),
            ("n: at least 1", self.n < 1),
            ("pairs_from: 'reference' or 'policy'", self.pairs_from not in ("reference", "policy")),
            ("candidates: at least 2", self.candidates < 2),
            ("steps: at least 1", self.steps < 1),
            ("shift: above 0", not self.shift > 0),
            ("tie_margin: at least 0", not self.tie_margin >= 0),
            ("ties: 'drop' or 'equal'", self.ties not in ("drop", "equal")),
            (
                "ties: 'drop' with loss = 'kto', which learns from likes and dislikes alone",
                self.ties == "equal" and self.loss == "kto",
            ),
            ("refresh_every: at least 0", self.refresh_every < 0),
            ("desirable_weight: above 0", not self.desirable_weight > 0),
            ("undesirable_weight: above 0", not self.undesirable_weight > 0),
            ("caption_dropout: at least 0 and below 1", not 0 <= self.caption_dropout < 1),
        )


class Pairs(NamedTuple):
    """B pairs, the preferred image first. `preference` is 1, or 1/2 for a tie; `weight` 0 leaves a pair out."""

    x0: Tensor  # (B, 2, C, h, w)
    noise: Tensor | None  # (B, 2, C, h, w), what they were made from, where it is known
    preference: Tensor  # (B,)
    weight: Tensor  # (B,)
    present: Tensor  # (B, 2), 0 where a side is absent


class DPO:
    """Its state is the moving reference, once the policy has become one."""

    trains = ("policy",)
    reads_pairs = True
    injects_noise = True  # into finished images, for the trained forward
    any_size = True
    compares_calls = True  # with a gradient, of trained weights, and without, of old or frozen ones

    def __init__(self, settings: DPOSettings):
        self.settings = settings
        self.reference: list[Tensor] | None = None  # None = the frozen one

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference = None if state["reference"] is None else [tensor.clone() for tensor in state["reference"]]

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """One update on a pair for each prompt, at n levels; then, every `refresh_every` steps, a new reference."""
        s = self.settings
        if self.reference is not None:
            self.reference = sharded_like(self.reference, model.parameters("policy"))
        with torch.no_grad():
            pairs, drawing = self._pairs(model, reward, batch, rng)
        for j in range(s.n):
            value, metrics = self._loss(model, pairs, batch, rng, "" if j == 0 else f"-{j}")
            metrics = {name: number.detach() for name, number in (drawing | metrics).items()}
            yield Loss(value / s.n, metrics, "policy" if j == s.n - 1 else None)
        if s.refresh_every and rng.step % s.refresh_every == 0:
            self.reference = taken(model.parameters("policy"))

    def _loss(
        self, model: Model, pairs: Pairs, batch: Batch, rng: Random, name: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The pairs' loss at one level each, and its metrics. name: what tells its random numbers from the others'."""
        s = self.settings
        with torch.no_grad():
            captions, there = self._captions(batch.prompts, rng) * 2, rows_present(pairs)
            cond = model.encode_prompts([captions[i] for i in there.tolist()])
            noised = self._noised(model, pairs, rng, f"inject{name}", drawn=batch.latents is None)
            x0, eps = (both[there] for both in noised)
            t = (1 - rng.uniform(f"level{name}")).to(x0).repeat(2)[there]
            xt = add_noise(x0, eps, *model.schedule(t))
            with self._speaks(model) as weights:
                reference = model.predict(xt, t, cond, weights=weights).eps
        policy = model.predict(xt, t, cond).eps
        preferred, rejected = spread(excess_error(policy, reference, eps), there, len(captions)).chunk(2)
        of_pairs = {}
        if s.safeguard != "off":
            errors = spread((policy - eps).detach().flatten(1), there, len(captions))
            scale = of_pairs["safe_scale"] = self._safe_scale(model, errors, preferred, rejected, pairs)
            rejected = scaled_gradient(rejected, scale)
        losses, right = dpo_loss(preferred, rejected, s.beta, s.loss, pairs.preference, side_weights(pairs, s))
        of_pairs |= {"prefers": right, "excess_preferred": preferred, "excess_rejected": rejected}
        losses = losses + pairs.present[:, 0] * kept_error(preferred, s.beta, s.keep)
        return (pairs.weight * losses).mean(), means_of(of_pairs, pairs)

    def _speaks(self, model: Model) -> Any:
        """A context in which the weights it names are the reference. For calls without gradient only."""
        if self.reference is None:
            return nullcontext("reference")
        return _named(using(model.parameters("policy"), self.reference), "policy")

    def _captions(self, prompts: list[str], rng: Random) -> list[str]:
        if not self.settings.caption_dropout:
            return list(prompts)
        dropped = rng.uniform("caption") < self.settings.caption_dropout
        return ["" if gone else prompt for gone, prompt in zip(dropped.tolist(), prompts, strict=True)]

    def _noised(self, model: Model, pairs: Pairs, rng: Random, name: str, *, drawn: bool) -> tuple[Tensor, Tensor]:
        """Clean latents and noises (2 B, C, h, w), first all preferred images, then all rejected ones."""
        x0, noise = pairs.x0, pairs.noise
        if self.settings.noise == "fresh" or noise is None:
            noise = rng.normal(name, model.latent_shape).to(x0)[:, None].expand_as(x0)
        if self.settings.flip and drawn:
            flip = (rng.uniform("flip") < 0.5).to(x0.device).view(-1, 1, 1, 1, 1)
            x0, noise = torch.where(flip, x0.flip(-1), x0), torch.where(flip, noise.flip(-1), noise)
        return torch.cat([x0[:, 0], x0[:, 1]]), torch.cat([noise[:, 0], noise[:, 1]])

    def _safe_scale(self, model: Model, errors: Tensor, preferred: Tensor, rejected: Tensor, pairs: Pairs) -> Tensor:
        """lambda (B,), detached. errors: eps_theta - eps (2 B, D), first of all preferred images."""
        s = self.settings
        # by how much each pair's own loss pulls at either error
        pull = pair_slope(preferred, rejected, s.beta, s.loss, pairs.preference, side_weights(pairs, s))
        if s.safeguard == "output":
            ours, theirs = errors.chunk(2)
            return safe_scale(ours, theirs, s.mu, pull)
        with torch.no_grad():
            pull = pull[0] + pairs.present[:, 0] * s.keep * s.beta / 2 * (preferred > 0), pull[1]
        weight = pairs.weight / len(preferred)
        own = model.parameters("policy")
        if is_cut(own[0]):  # the graph is of the whole parameters, which are gone by now
            raise InputError(CUT)
        protected, mine, others = (
            gradients(value, own)
            for value in (
                (pairs.weight * preferred).mean(),
                (weight * pull[0] * preferred).sum(),
                (weight * pull[1] * rejected).sum(),
            )
        )
        lift, drag = (
            torch.stack([(a * b).sum() for a, b in zip(protected, side, strict=True)]).sum() for side in (mine, others)
        )
        return bounded(lift, -drag, s.mu).expand(len(preferred))

    def _pairs(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> tuple[Pairs, dict[str, Tensor]]:
        """Pairs, given or drawn, and metrics of the drawing. Run it under no_grad."""
        s, kind = self.settings, state_kind(model)
        if batch.latents is not None:
            latents = batch.latents.to(**kind)
            if s.posterior:
                latents = drawn_latents(latents, rng.normal("posterior", (2, *model.latent_shape)).to(latents))
            return given_pairs(latents, model.latent_shape, s), {}
        n = s.candidates
        rng = Random(rng.seed, rng.step, [n * i + k for i in rng.ids for k in range(n)])
        prompts = [prompt for prompt in batch.prompts for _ in range(n)]
        noise = rng.normal("rollout", model.latent_shape).to(**kind)
        speaks = nullcontext("policy") if s.pairs_from == "policy" else self._speaks(model)
        with speaks as weights:
            x0 = sample(
                model,
                model.encode_prompts(prompts),
                noise,
                s.steps,
                guidance=s.guidance,
                shift=s.shift,
                weights=weights,
            )
        scores = reward(model.decode(x0), prompts).detach().view(-1, n)
        best, worst = scores.argmax(1), scores.argmin(1)
        worst = torch.where(best == worst, (best + 1) % n, worst)  # all equal
        rows = torch.arange(len(best), device=best.device)
        both = [values.view(-1, n, *model.latent_shape) for values in (x0, noise)]
        x0, noise = (torch.stack([values[rows, best], values[rows, worst]], 1) for values in both)
        gap = scores[rows, best] - scores[rows, worst]
        tie = gap <= s.tie_margin
        preference = torch.where(tie, 0.5, 1.0).to(x0)
        weight = (~tie).to(x0) if s.ties == "drop" else torch.ones_like(preference)
        weight = weight + 0 * gap.to(x0)  # a reward that is not finite orders nothing: nan, so the update is skipped
        metrics = {"reward": scores.mean(), "reward_gap": gap.mean(), "ties": tie.to(x0).mean()}
        return Pairs(x0, noise, preference, weight, torch.ones(len(x0), 2, **kind)), metrics


def drawn_latents(posterior: Tensor, noise: Tensor) -> Tensor:
    """mean + std noise (B, 2, C, h, w) of encoded pairs (B, 2, 2 C, h, w), mean and std side by side."""
    if posterior.ndim != 5 or posterior.shape[2] != 2 * noise.shape[2]:
        raise InputError(
            f"algorithm.posterior needs latents (B, 2, 2 C, h, w), means and standard deviations side by side, got "
            f"{tuple(posterior.shape)}; give prompts.pairs, or set algorithm.posterior=false"
        )
    mean, std = posterior.chunk(2, 2)
    return mean + std * noise


def given_pairs(latents: Tensor, shape: tuple[int, ...], settings: DPOSettings) -> Pairs:
    """Pairs of `Batch.latents`, (B, 2, C, h, w) or (B, 4, C, h, w); ValueError for what the settings cannot use."""
    sides = latents.shape[1] if latents.ndim == 5 else 0
    if latents.shape[2:] != tuple(shape) or sides not in (2, 4):
        raise InputError(
            f"DPO got latents of shape {tuple(latents.shape)}; expected "
            f"(B, 2, {', '.join(map(str, shape))}), the preferred and the rejected "
            "image of each prompt: give prompts.pairs, or prompts.file to have pairs drawn"
        )
    if settings.noise == "tracked" and sides == 2:
        raise InputError(
            "algorithm.noise = 'tracked' needs the noise that each image was made from, and these pairs have none; "
            "let pairs be drawn (prompts.file), give latents (B, 4, ...) from Python, or set algorithm.noise=fresh"
        )
    present = torch.isfinite(latents[:, :2]).flatten(2).all(2)
    if settings.loss != "kto" and not bool(present.all()):
        raise InputError("DPO got a pair with one image only; only algorithm.loss = 'kto' learns from single likes")
    x0 = torch.where(present.view(-1, 2, 1, 1, 1), latents[:, :2], 0.0)
    noise = torch.nan_to_num(latents[:, 2:]) if sides == 4 else None
    ones = torch.ones(len(x0), dtype=x0.dtype, device=x0.device)
    return Pairs(x0, noise, ones, ones, present.to(x0))


def means_of(values: dict[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """The mean of each (B,) over the pairs that are not left out; of an error, over the images that are there."""
    found = {}
    for name, each in values.items():
        present = {"excess_preferred": pairs.present[:, 0], "excess_rejected": pairs.present[:, 1]}.get(name)
        counted = (pairs.weight if present is None else pairs.weight * present) > 0
        if bool(counted.any()):
            found[name] = each[counted].mean()
    return found


def rows_present(pairs: Pairs) -> Tensor:
    """Which of the 2 B images, first all preferred ones, then all rejected ones, are there."""
    return pairs.present.T.flatten().nonzero().flatten()


def side_weights(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """(B, 2): how much either image of a pair counts where each is judged by itself; 0 of an absent one."""
    weights = settings.desirable_weight, settings.undesirable_weight
    return pairs.present * pairs.present.new_tensor(weights)


def spread(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count, ...): the values at their rows, 0 elsewhere."""
    return values.new_zeros(count, *values.shape[1:]).index_put((rows,), values)


# The equations


def excess_error(policy: Tensor, reference: Tensor, eps: Tensor) -> Tensor:
    """m (B,): by how much the policy's square error of the noise exceeds the reference's; means over the elements."""
    return ((policy - eps).square() - (reference - eps).square()).flatten(1).mean(1)


def dpo_loss(preferred: Tensor, rejected: Tensor, beta: float, *options: Any) -> tuple[Tensor, Tensor]:
    """`pair_loss` (B,), and 1 where the policy agrees with the preference, m_w < m_l, (B,)."""
    return pair_loss(preferred, rejected, beta, *options), (preferred < rejected).to(preferred)


def pair_loss(
    preferred: Tensor,
    rejected: Tensor,
    beta: float,
    loss: PairLoss = "sigmoid",
    preference: Tensor | float = 1.0,
    sides: Tensor | None = None,
) -> Tensor:
    """(B,), of s = -beta/2 (m_w - m_l): preference l(s) + (1 - preference) l(-s), with l(s) one of

    sigmoid  -log sigmoid(s)
    hinge    max(0, 1 - s)       SLiC, arXiv 2305.10425
    ipo      (s - 1/2)^2         IPO, arXiv 2310.12036
    kto has two terms that do not see each other, 1/2 [1 - sigmoid(-beta/2 m_w)] + 1/2 [1 - sigmoid(beta/2 m_l)]
    (Diffusion-KTO, arXiv 2404.04465, with the reference as the reference point); `sides` (B, 2) are how much either
    counts, lambda_D and lambda_U (KTO, arXiv 2402.01306, eq. 7), 0 of an absent one.
    """
    if loss == "kto":
        each = torch.stack([torch.sigmoid(beta / 2 * preferred), torch.sigmoid(-beta / 2 * rejected)], 1)
        return (each if sides is None else each * sides).sum(1) / 2
    s = -beta / 2 * (preferred - rejected)
    forth, back = {
        "sigmoid": (-F.logsigmoid(s), -F.logsigmoid(-s)),
        "hinge": ((1 - s).relu(), (1 + s).relu()),
        "ipo": ((s - 0.5) ** 2, (s + 0.5) ** 2),
    }[loss]
    return preference * forth + (1 - preference) * back


def pair_slope(preferred: Tensor, rejected: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """d loss / d m_w and d loss / d m_l of each pair, (B,) each; `options` as of `pair_loss`."""
    with torch.enable_grad():
        m_w, m_l = preferred.detach().requires_grad_(), rejected.detach().requires_grad_()
        on_w, on_l = torch.autograd.grad(pair_loss(m_w, m_l, *options).sum(), (m_w, m_l))
    return on_w, on_l


def gradients(value: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """d value / d parameters, the graph kept; 0 for one that the value does not depend on: a network may have such, as
    the last block of Qwen-Image, whose text is read by nobody."""
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


def kept_error(preferred: Tensor, beta: float, keep: float) -> Tensor:
    """keep beta/2 max(0, m_w), (B,): 0 while the policy denoises the preferred image as well as the reference does."""
    return keep * beta / 2 * preferred.relu()


def safe_scale(
    error_preferred: Tensor, error_rejected: Tensor, mu: float, pull: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """lambda (B,) from the errors eps_theta - eps of both images, (B, D), to which the gradients are proportional.

    pull: the loss's slopes in either error, (B,) each; None = equal and opposite, as those of one margin are. kto's are
    not, and ipo's turn round past its margin.
    """
    lift, drag = error_preferred.square().sum(1), (error_preferred * error_rejected).sum(1)
    if pull is not None:
        size = torch.where(pull[0] == 0, torch.ones_like(lift), pull[0].abs())
        idle = (pull[0] == 0) & (pull[1] == 0)  # there is no gradient to scale
        lift, drag = (torch.where(idle, x, f / size * x) for x, f in ((lift, pull[0]), (drag, -pull[1])))
    return bounded(lift, drag, mu)


def bounded(lift: Tensor, drag: Tensor, mu: float) -> Tensor:
    """The largest lambda in [0, 1] with lift - lambda drag >= mu lift; 1 where drag <= 0, 0 where lift <= 0 < drag.

    lift is the protected descent, <g_w, own gradient>, and drag what the rejected image takes away at lambda = 1.
    """
    positive = drag > 0
    most = (1 - mu) * lift.clamp_min(0) / torch.where(positive, drag, torch.ones_like(drag))
    return torch.where(positive, most.clamp(0, 1), torch.ones_like(drag))


def scaled_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """x to the last bit, with `scale` times its gradient."""
    return x.detach() + scale * (x - x.detach())


class _named:
    """A context manager that enters another one and returns a name."""

    def __init__(self, inner: Any, name: str):
        self.inner, self.name = inner, name

    def __enter__(self) -> str:
        self.inner.__enter__()
        return self.name

    def __exit__(self, *reason: Any) -> Any:
        return self.inner.__exit__(*reason)


def calls_per_update(settings: DPOSettings, *, given: bool = False) -> dict[str, int]:
    """Denoiser evaluations of one update per prompt of the batch, a guided call counted twice; `given`: pairs are.
    A single like, of which one image is absent, costs half of 4 n and 2 n.

    forward = 4 n + (0 given, else candidates steps g),  backward = 2 n,  decode = reward = (0 given, else candidates),
    g = 2 with guidance.
    """
    drawn = 0 if given else settings.candidates
    guided = 1 if settings.guidance == 1 else 2
    forward = 4 * settings.n + drawn * settings.steps * guided
    return {"forward": forward, "backward": 2 * settings.n, "decode": drawn, "reward": drawn}
