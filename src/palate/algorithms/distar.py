"""Diff-Instruct* (DI*): a one-step generator aligned with a preference under a score divergence.

"Diff-Instruct*: Towards Human-Preferred One-step Text-to-image Generative Models", 2024 (ICML 2025 as "David and
Goliath"), arXiv 2410.20898, by Weijian Luo, Colin Zhang, Debing Zhang and Zhengyang Geng. The same file runs two of its
relatives: Diff-Instruct++ (arXiv 2410.18881, divergence="kl") and Score Implicit Matching (arXiv 2410.16794,
reward_scale=0).

Idea: a generator makes an image in one call. Noise that image and ask two diffusion networks what it was: the frozen
reference, and an assistant that keeps learning what the generator draws. Where they differ, the generator draws
something that the reference would not; push it back there, and up the reward's gradient elsewhere. No images are used.

    x0 = g_theta(z, c)                                     one call, t_init and input_scale            `Generator`
    xt = alpha x0 + sigma eps                              t ~ U(t_generator)                          `add_noise`
    y  = D_psi(xt) - D_ref(xt)                             D = E[x0 | xt], the network's x0
    d(y) = sqrt(||y||^2 + c^2) - c                         or ||y||^2                                  `distance_of`
    L_div = -d'(y) . (D_psi(xt) - x0)                      gradient of E d at a frozen xt, SIM th. 3.1 `distar_loss`
    L_rew = -reward_scale r(decode(x0), c)
    theta: minimise L_div + L_rew;   psi: minimise |eps_psi(xt) - eps|^2 on x0 = sg[g_theta(z, c)]     `assistant_loss`

xt stays attached to theta inside d' and inside both networks; their parameters are frozen in this phase. The value of
L_div has expectation 0 when the assistant is exact: it says how far the assistant lags behind, not how training goes.

Classifier-free guidance is an implicit reward. With guidance w = 1 + alpha_cfg, so that alpha_cfg = 0 is the plain
conditional reference:
    cfg="in"    D_ref := D_c + alpha_cfg (D_c - D_0)                             the published model
    cfg="out"   y keeps D_c, and - alpha_cfg sg[D_c - D_0] . x0 is added         `implicit_reward_loss`

What the paper leaves open, and what is chosen here:
- No program was released; c, w(t), the time laws, learning rates and the number of assistant steps are not stated.
- The distance is taken in x0 space (score space times sigma^2 / alpha; the theorem holds for any such factor), with
  c = .00054 sqrt(n) by default (the consistency models' convention), w(t) = 1 and t uniform.
- The normaliser of the pseudo-Huber distance is not detached, as the theorem has it.
- Whether the paper's "7.5" is alpha_cfg or 1 + alpha_cfg is unknown; here it is what the formula above says.
- gradient="total" adds d(y) itself: the derivative of E d along the samples too, not the paper's.
- `head_queries` > 0 trains with a black-box reward (Palate's, after TDM-R1, arXiv 2603.07700): between
  assistant and generator a head is told the reward's answers about the newest images and fitted anew; r is what it
  predicts, in standard deviations of the answers. Each rank and each micro-batch has a head of its own, learns from
  its own images and asks about `head_queries` of them, so that two ranks equal one that accumulates.
- `reward_cap` bounds the norm of the reward's gradient by a multiple of the divergence's, per sample (Palate's).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from palate.core import Batch, HasFeatures, Loss, Model, Random, Reward, require
from palate.path import Prediction, add_noise
from palate.rewards.learned import RewardHead
from palate.runtime.errors import InputError
from palate.sampling import FewStepGenerator, state_kind

Distance = Literal["pseudo_huber", "l2"]
Gradient = Literal["paper", "total"]
LAG_MEMORY = 0.98  # of the running means that tell the assistant's lag
LAG_STEPS = 50  # updates before the lag is judged
LAG_LIMIT = 0.5  # see `Distar.warnings`


Generator = FewStepGenerator

# Published starting points. Time k / N of a table of N steps is its label k - 1 (see `path.vp_schedule`).
SD15 = Generator(t_init=0.626)  # SiD-LSG: label 625, x = sigma z; sigma / alpha = 2.50
SDXL = Generator(t_init=0.400, input_scale=1.0)  # DMD2 and DI*: label 399, unit noise unscaled
PIXART = Generator(t_init=0.441, input_scale=2.5 / math.hypot(1, 2.5))  # SIM: 2.5 z in EDM's units; nearest label 440


@dataclass(frozen=True)
class DistarSettings:
    """Times are the model's t in [0, 1]; (low, high) are the ends of a uniform distribution."""

    old_keys: ClassVar[Mapping[str, str]] = {  # of recipes, for one release
        "assistant_first": "assistant_warmup_steps",
        "distil_steps": "reward_start_step",
        "head_questions": "head_queries",
    }

    generator: Generator = field(default_factory=Generator)

    divergence: Literal["distar", "kl"] = "distar"  # kl = Diff-Instruct++
    distance: Distance = "pseudo_huber"
    c: float | None = None  # of the pseudo-Huber distance, in latent units; None = .00054 sqrt(n)
    gradient: Gradient = "paper"
    weight: Literal["one", "normalised"] = "one"  # w(t); normalised = 1 / mean |x0 - D_ref|, as in DMD and SiD
    t_generator: tuple[float, float] = (0.02, 0.98)

    reward_scale: float = 1.0  # alpha_rew; 0 = distillation alone (SIM)
    reward_start_step: int = 0  # the last step without the reward
    reward_cap: float | None = None  # largest |dL_rew/dx0| as a multiple of |dL_div/dx0|, per sample
    alpha_cfg: float = 0.0  # guidance of the reference is 1 + alpha_cfg
    cfg: Literal["in", "out"] = "in"

    assistant_warmup_steps: int = 0  # the assistant learns alone; for a generator that is not the reference
    assistant_steps: int = 1  # K_TA: updates of the assistant before each one of the generator
    t_assistant: tuple[float, float] = (0.02, 0.98)
    assistant_error: Literal["eps", "velocity", "x0"] = "eps"  # lambda(t): what its squared error is taken in

    head_queries: int = 0  # images per step (rank, micro-batch) that a black-box reward is asked about; 0 = no head
    head_memory: int = 512  # newest answers that the head is fitted to
    head_first: int = 64  # answers before the head's gradient is used

    def __post_init__(self) -> None:
        for name in ("t_generator", "t_assistant"):
            object.__setattr__(self, name, tuple(vars(self)[name]))
        require(
            self,
            ("divergence: 'distar' or 'kl'", self.divergence not in ("distar", "kl")),
            ("distance: 'pseudo_huber' or 'l2'", self.distance not in ("pseudo_huber", "l2")),
            ("gradient: 'paper' or 'total'", self.gradient not in ("paper", "total")),
            (
                "gradient: 'paper' with divergence='kl', which has one gradient",
                self.divergence == "kl" and self.gradient != "paper",
            ),
            ("weight: 'one' or 'normalised'", self.weight not in ("one", "normalised")),
            ("cfg: 'in' or 'out'", self.cfg not in ("in", "out")),
            ("assistant_error: 'eps', 'velocity' or 'x0'", self.assistant_error not in ("eps", "velocity", "x0")),
            ("c: above 0, or null for .00054 sqrt(n)", self.c is not None and not self.c > 0),
            ("t_generator: (low, high) with 0 < low < high <= 1", not _inside(self.t_generator)),
            ("t_assistant: (low, high) with 0 < low < high <= 1", not _inside(self.t_assistant)),
            ("reward_scale and alpha_cfg: at least 0", not (self.reward_scale >= 0 and self.alpha_cfg >= 0)),
            ("reward_cap: above 0, or null for none", self.reward_cap is not None and not self.reward_cap > 0),
            ("assistant_steps: at least 1", self.assistant_steps < 1),
            ("reward_start_step: at least 0", self.reward_start_step < 0),
            ("assistant_warmup_steps: at least 0", self.assistant_warmup_steps < 0),
            ("head_queries: at least 0", self.head_queries < 0),
            (
                "head_first and head_memory: 2 <= head_first <= head_memory",
                not 2 <= self.head_first <= self.head_memory,
            ),
        )

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """The steps after which an update asks for more: the generator's part, the reward's."""
        return self.assistant_warmup_steps, self.reward_start_step if self.reward_scale else 0


class Distar:
    """The algorithm object; its state is the two running means that tell the assistant's lag, and the head's memory."""

    trains = ("policy", "assistant")
    needs_reward_gradient = True
    any_size = True
    compares_calls = True  # with a gradient, of trained weights, and without, of old or frozen ones
    reads_images = False

    def __init__(self, settings: DistarSettings):
        self.settings = settings
        self.sampler = settings.generator  # how images are drawn from the policy; see `evaluate.generate`
        self.loss_mean = self.scale_mean = 0.0
        self.updates = 0
        self.head = RewardHead(settings.head_memory) if settings.head_queries else None

    def state_dict(self) -> dict[str, Any]:
        state = {"loss_mean": self.loss_mean, "scale_mean": self.scale_mean, "updates": self.updates}
        return state if self.head is None else state | {"head": self.head.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss_mean, self.scale_mean, self.updates = state["loss_mean"], state["scale_mean"], state["updates"]
        if self.head is not None:
            self.head.load_state_dict(state["head"])

    @property
    def lag(self) -> float:
        """Running mean of L_div over that of d'(y) . y; 0 for an exact assistant.

        With an error e of the assistant it is -E[d'(y) . e] / E[d'(y) . y], positive when the assistant lags behind.
        """
        return self.loss_mean / self.scale_mean if self.scale_mean else 0.0

    @property
    def later_metrics(self) -> tuple[str, ...]:
        """What is logged once the reward counts: after `reward_start_step`, and once the head has its answers."""
        s = self.settings
        asked = ("answer", "head_answers", "head_explained") if s.head_queries else ()
        return ("reward", "force_reward", "reward_share", *asked) if s.reward_scale else ()

    def warnings(self, learning_rates: Mapping[str, float]) -> list[str]:
        """What to tell the user now, given the learning rates; the loop says each sentence once."""
        told = []
        bound = assistant_rate_bound(learning_rates["policy"], self.settings.assistant_steps)
        if learning_rates["assistant"] < bound:
            told.append(
                f"the assistant's learning rate {learning_rates['assistant']:g} is below {bound:g} (4 x the "
                "generator's / assistant_steps), where a linear analysis begins to oscillate; raise "
                "trainer.lrs.assistant or algorithm.assistant_steps if assistant_lag grows"
            )
        if self.updates >= LAG_STEPS and abs(self.lag) > LAG_LIMIT:
            told.append(
                f"the assistant lags behind the generator (assistant_lag is beyond {LAG_LIMIT:g}), so the "
                "divergence pushes in wrong directions; raise trainer.lrs.assistant or "
                "algorithm.assistant_steps, or lower trainer.lr"
            )
        return told

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """`assistant_steps` losses that update the assistant, then one that updates the generator (none in the first
        `assistant_warmup_steps` steps: a generator that draws what the assistant does not know is pushed at random)."""
        for i in range(self.settings.assistant_steps):
            value = self._assistant_phase(model, batch, rng, f"assistant-{i}")
            yield Loss(value, {"loss_assistant": value.detach()}, "assistant")
        if rng.step <= self.settings.assistant_warmup_steps:
            return
        value, metrics = self._generator_phase(model, reward, batch, rng)
        yield Loss(value, metrics, "policy")

    def _generate(self, model: Model, batch: Batch, rng: Random, purpose: str) -> Tensor:
        kind = state_kind(model)
        depth = rng.shared_integer(f"{purpose}-depth", 1, self.sampler.steps)
        noises = [rng.normal(f"{purpose}-z-{k}", model.latent_shape).to(**kind) for k in range(depth)]
        return self.sampler(model, batch.cond, noises)

    def _assistant_phase(self, model: Model, batch: Batch, rng: Random, purpose: str) -> Tensor:
        s = self.settings
        with torch.no_grad():
            x0 = self._generate(model, batch, rng, purpose)
        t = uniform(s.t_assistant, rng.uniform(f"{purpose}-t")).to(x0)
        eps = rng.normal(f"{purpose}-eps", model.latent_shape).to(x0)
        xt = add_noise(x0, eps, *model.schedule(t))
        pred = model.predict(xt, t, batch.cond, weights="assistant")
        return assistant_loss(pred, x0, eps, error=s.assistant_error).mean()

    def _generator_phase(
        self, model: Model, reward: Reward, batch: Batch, rng: Random
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """theta enters through x0 alone, so the gradients at x0 are collected on a leaf, and go back in one pass."""
        s = self.settings
        x0 = self._generate(model, batch, rng, "generator")
        leaf = x0.detach().requires_grad_()
        loss, grad_divergence, metrics = self._divergence(model, batch, rng, leaf)
        metrics["force_divergence"] = _norms(grad_divergence).mean()
        values = None
        if s.reward_scale and rng.step > s.reward_start_step:
            values, asked = self._reward(reward, model.decode(leaf), batch.prompts)
            metrics |= asked
        if values is not None:
            wanted = -s.reward_scale * values.mean()
            (grad_reward,) = torch.autograd.grad(wanted, leaf)
            scale = capped_scale(grad_reward, grad_divergence, s.reward_cap)
            metrics |= {
                "reward": values.mean(),
                "force_reward": _norms(grad_reward).mean(),
                "reward_share": scale.mean(),
            }
            loss, grad_divergence = loss + wanted.detach(), grad_divergence + scale * grad_reward
        value = (grad_divergence * x0).sum()
        value = value + (loss - value).detach()  # reads as the loss, differentiates as the gradients at x0
        return value, {name: metric.detach() for name, metric in metrics.items()}

    def _reward(self, reward: Reward, images: Tensor, prompts: list[str]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Rewards (B,) with their gradient, None while the head has too few answers; and what was asked."""
        if self.head is None:
            values = reward(images, prompts)
            if not values.requires_grad:
                raise InputError(
                    "the reward is not differentiable (a black box such as jpeg_size), and Diff-Instruct* "
                    "needs its gradient; use a differentiable one, algorithm.head_queries (a head that learns it), "
                    "or algorithm.reward_scale=0"
                )
            return values, {}
        if not isinstance(reward, HasFeatures):
            raise InputError(
                "algorithm.head_queries needs features on which the head can learn the reward; give "
                "palate.rewards.learned.BlackBox(reward, features)"
            )
        features = reward.features(images, prompts)
        now = slice(0, self.settings.head_queries)
        answers = reward(images.detach()[now], prompts[now]).detach()
        self.head.tell(features[now], answers)
        fit = self.head.fit
        metrics = {
            "answer": answers.double().mean(),
            "head_answers": torch.tensor(float(len(self.head))),
            "head_explained": torch.tensor(0.0 if fit is None else fit.explained),
        }
        return (self.head(features) if len(self.head) >= self.settings.head_first else None), metrics

    def _divergence(
        self, model: Model, batch: Batch, rng: Random, leaf: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(L_div, its gradient at x0, metrics)."""
        s = self.settings
        t = uniform(s.t_generator, rng.uniform("generator-t")).to(leaf)
        eps = rng.normal("generator-eps", model.latent_shape).to(leaf)
        xt = add_noise(leaf, eps, *model.schedule(t))
        with torch.no_grad():
            null = model.encode_prompts([""] * len(leaf)) if s.alpha_cfg else None
        c = 0.00054 * math.sqrt(leaf[0].numel()) if s.c is None else s.c
        with _frozen(model.parameters("assistant")):
            with torch.set_grad_enabled(s.divergence == "distar"):
                ours = model.predict(xt, t, batch.cond, weights="assistant").x0
                plain = target = model.predict(xt, t, batch.cond, weights="reference").x0
            if s.alpha_cfg:
                with torch.set_grad_enabled(s.divergence == "distar" and s.cfg == "in"):
                    unconditional = model.predict(xt, t, null, weights="reference").x0
                if s.cfg == "in":
                    target = plain + s.alpha_cfg * (plain - unconditional)
            weight = normaliser(leaf, target) if s.weight == "normalised" else 1.0
            tractable = distar_loss(ours, target, leaf, distance=s.distance, c=c, weight=weight, gradient=s.gradient)
            loss = kl_loss(ours, target, leaf, weight=weight).mean() if s.divergence == "kl" else tractable.mean()
            if s.alpha_cfg and s.cfg == "out":
                loss = loss + implicit_reward_loss(plain, unconditional, leaf, s.alpha_cfg, weight=weight).mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
        y = (ours - target).detach()
        gap = distance_of(y, s.distance, c)
        scale = _dot(slope_of(y, s.distance, c), y) * _column(weight)
        self._follow(
            float((tractable.detach() - (gap * _column(weight) if s.gradient == "total" else 0)).mean()),
            float(scale.mean()),
        )
        metrics = {
            "divergence": gap.mean(),
            "gap": y.square().flatten(1).sum(1).mean(),
            "loss_divergence": loss.detach(),
            "assistant_lag": torch.tensor(self.lag),
        }
        return loss.detach(), gradient, metrics

    def _follow(self, loss: float, scale: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(scale)):
            return
        keep = min(LAG_MEMORY, self.updates / (self.updates + 1))  # a plain mean at first
        self.loss_mean += (1 - keep) * (loss - self.loss_mean)
        self.scale_mean += (1 - keep) * (scale - self.scale_mean)
        self.updates += 1


# The equations, each (B,): sums over the dimensions of a sample, in float32 or better


def distar_loss(
    pred_assistant: Prediction | Tensor,
    pred_reference: Prediction | Tensor,
    x0: Tensor,
    *,
    distance: Distance = "pseudo_huber",
    c: float,
    weight: Tensor | float = 1.0,
    gradient: Gradient = "paper",
) -> Tensor:
    """w -d'(y) . (D_psi - x0), y = D_psi - D_ref: (B,), whose gradient is that of E d(y) for frozen samples.

    The predictions (or their x0, (B, ...)) are made from the same xt = alpha x0 + sigma eps with x0 ATTACHED. `c` is
    the pseudo-Huber constant in units of x0; `weight` is a number or (B,). gradient="total" adds w d(y), and with it
    the derivative along the samples.
    """
    if distance == "pseudo_huber" and not c > 0:
        raise InputError(f"distar_loss got c = {c}; expected above 0 (in units of x0)")
    if gradient not in ("paper", "total"):
        raise InputError(f"distar_loss got gradient {gradient!r}; expected paper or total")
    ours, theirs, x0 = _wide(pred_assistant), _wide(pred_reference), _wide(x0)
    y = ours - theirs
    loss = -_dot(slope_of(y, distance, c), ours - x0)
    if gradient == "total":
        loss = loss + distance_of(y, distance, c)
    return _column(weight) * loss


def distance_of(y: Tensor, distance: Distance, c: float) -> Tensor:
    """d(y), (B,): ||y||^2, or sqrt(||y||^2 + c^2) - c without cancellation."""
    square = _dot(y, y)
    if distance == "l2":
        return square
    if distance != "pseudo_huber":
        raise InputError(f"distance got {distance!r}; expected pseudo_huber or l2")
    return square / ((square + c * c).sqrt() + c)


def slope_of(y: Tensor, distance: Distance, c: float) -> Tensor:
    """d'(y), shape of y: 2 y, or y / sqrt(||y||^2 + c^2)."""
    if distance == "l2":
        return 2 * y
    if distance != "pseudo_huber":
        raise InputError(f"distance got {distance!r}; expected pseudo_huber or l2")
    return y / (_dot(y, y) + c * c).sqrt().view(-1, *[1] * (y.ndim - 1))


def kl_loss(
    pred_assistant: Prediction | Tensor,
    pred_reference: Prediction | Tensor,
    x0: Tensor,
    *,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """w sg[D_psi - D_ref] . x0, (B,): Diff-Instruct(++)'s gradient of the integral KL. Its value means nothing."""
    return _column(weight) * _dot((_wide(pred_assistant) - _wide(pred_reference)).detach(), _wide(x0))


def implicit_reward_loss(
    pred_conditional: Prediction | Tensor,
    pred_null: Prediction | Tensor,
    x0: Tensor,
    alpha_cfg: float,
    *,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """-w alpha_cfg sg[D_c - D_0] . x0, (B,): guidance as a reward (DI++). Added to `kl_loss` it equals cfg="in"."""
    difference = (_wide(pred_conditional) - _wide(pred_null)).detach()
    return -alpha_cfg * _column(weight) * _dot(difference, _wide(x0))


def assistant_loss(pred: Prediction, x0: Tensor, eps: Tensor, *, error: str = "eps") -> Tensor:
    """Denoising score matching on the generator's x0 (detached): the mean square of the chosen error, (B,).

    All three have the same minimiser, the score of what the generator draws; they are other weights of t.
    """
    of_x0, of_eps = _wide(pred.x0) - x0.detach(), _wide(pred.eps) - eps
    chosen = {"eps": of_eps, "x0": of_x0, "velocity": of_eps - of_x0}[error]
    return chosen.square().flatten(1).mean(1)


def normaliser(x0: Tensor, pred_reference: Prediction | Tensor) -> Tensor:
    """1 / mean |x0 - D_ref|, (B,), detached (DMD, arXiv 2311.18828, eq. 8; SiD)."""
    return 1 / (x0 - _wide(pred_reference)).detach().abs().flatten(1).mean(1).clamp_min(1e-8)


def capped_scale(grad_reward: Tensor, grad_divergence: Tensor, cap: float | None) -> Tensor:
    """The fraction of `grad_reward` that is kept, (B, 1, ...), at most 1: its norm is at most `cap` times that of
    `grad_divergence` per sample. cap: None = all of it."""
    scale = torch.ones(len(grad_reward), dtype=grad_reward.dtype, device=grad_reward.device)
    if cap is not None:
        limit = cap * grad_divergence.flatten(1).norm(dim=1)
        scale = (limit / grad_reward.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)
    return scale.view(-1, *[1] * (grad_reward.ndim - 1))


def assistant_rate_bound(lr: float, assistant_steps: int) -> float:
    """The assistant's smallest learning rate that does not oscillate: K_TA lr_TA >= 4 lr.

    Two time scales, gradient descent, Gaussian data, w = lambda = 1, the generator as wide as the reference. With Adam
    it is a rule of thumb.
    """
    return 4 * lr / assistant_steps


def uniform(ends: tuple[float, float], u: Tensor) -> Tensor:
    """u in [0, 1) carried to (low, high)."""
    return ends[0] + (ends[1] - ends[0]) * u


# Cost


def calls_per_update(
    settings: DistarSettings, *, distilling: bool = False, assistant_alone: bool = False
) -> dict[str, float]:
    """Calls of one update at any batch size, on average over the depth of a generator of K steps:

    predict = (assistant_steps + 1) (K + 1) / 2 for images, + assistant_steps, + 2 for y, + 1 with alpha_cfg;
    decode = reward = 1, or 0 without a reward or while distilling; updates of the assistant = assistant_steps.
    assistant_alone: in the first `assistant_warmup_steps` steps, assistant_steps ((K + 1) / 2 + 1) and nothing else.
    """
    s = settings
    if assistant_alone:
        alone = s.assistant_steps * ((s.generator.steps + 1) / 2 + 1)
        return {"predict": alone, "decode": 0, "reward": 0, "assistant": s.assistant_steps, "policy": 0}
    images = (s.assistant_steps + 1) * (s.generator.steps + 1) / 2
    rewards = 0 if distilling or not s.reward_scale else 1
    return {
        "predict": images + s.assistant_steps + 2 + (1 if s.alpha_cfg else 0),
        "decode": rewards,
        "reward": rewards,
        "assistant": s.assistant_steps,
        "policy": 1,
    }


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, a forward keeps nothing for these parameters' gradients; the backward belongs inside as well."""
    flags = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)


def _wide(pred: Prediction | Tensor) -> Tensor:
    """The x0 of a prediction, in float32 or better."""
    x0 = pred.x0 if isinstance(pred, Prediction) else pred
    return x0.to(torch.promote_types(x0.dtype, torch.float32))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _column(weight: Tensor | float) -> Tensor | float:
    """A weight per sample, (B,), or a number."""
    return weight.flatten() if isinstance(weight, Tensor) and weight.ndim else weight


def _norms(gradient: Tensor) -> Tensor:
    """Per sample, of a gradient of a mean over the batch: (B,)."""
    return len(gradient) * gradient.detach().flatten(1).norm(dim=1)


def _inside(ends: tuple[float, ...]) -> bool:
    return len(ends) == 2 and 0 < ends[0] < ends[1] <= 1
