"""Diffusion-DPO: offline preference optimisation from pairs of images.

"Diffusion Model Alignment Using Direct Preference Optimization", 2023, arXiv 2311.12908, by Bram Wallace, Meihua Dang,
Rafael Rafailov, Linqi Zhou, Aaron Lou, Senthil Purushwalkam, Stefano Ermon, Caiming Xiong, Shafiq Joty and Nikhil Naik.

Idea: no reward model and no sampling. Of two images for a prompt one is preferred; the network should denoise that one
better than the reference does, and the other one worse.

    x_t^w, x_t^l = alpha x0 + sigma eps for the preferred and the rejected image, same eps and t
    m(x)         = |eps - eps_theta(x_t)|^2 - |eps - eps_ref(x_t)|^2                   `excess_error`
    loss         = -E log sigmoid(-beta/2 (m(x^w) - m(x^l)))                           `dpo_loss`     (eq. 14)

Squares are means over the latent's elements and the half is the authors' program's; its beta (2000 for SD1.5, 5000 for
SDXL) stands for the paper's beta T omega. For a flow the error of eps is (1 - t) times that of the velocity, so this
is Flow-DPO (arXiv 2501.13918) with beta_t = beta (1 - t)^2.

Pairs come in one of two ways:
- `Batch.latents` (B, 2, C, h, w): [:, 0] the preferred, [:, 1] the rejected image's latent. In a recipe: prompts.pairs,
  a file in the layout of HPDv2 or Pick-a-Pic (`palate.data.preference_pairs`), encoded once before training.
- Without them, two samples of the frozen reference are drawn for each prompt and the reward says which is preferred.
  They depend on nothing that is trained, so this is the offline method on a labelled data set made on the way. Equal
  rewards are no preference and weigh 0.

Deviation from the paper: the drawn pairs; times are uniform in (0, 1], as its discrete ones are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.core import Batch, Loss, Model, Random, Reward
from palate.path import add_noise
from palate.runtime.errors import InputError
from palate.sampling import sample, state_kind


@dataclass(frozen=True)
class DPOSettings:
    beta: float = 5000.0
    steps: int = 25  # this and the next two: how pairs are drawn when none are given
    guidance: float = 7.5
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.steps >= 1 and self.shift > 0):
            raise InputError(
                "DPOSettings expected beta > 0, steps >= 1, shift > 0; "
                f"got beta = {self.beta}, steps = {self.steps}, shift = {self.shift}"
            )


class DPO:
    trains = ("policy",)

    def __init__(self, settings: DPOSettings):
        self.settings = settings

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """One update on a pair for each prompt."""
        with torch.no_grad():
            pairs, weight, metrics = self._pairs(model, reward, batch, rng)
            cond = model.encode_prompts(batch.prompts * 2)
            eps = rng.normal("inject", model.latent_shape).to(pairs).repeat(2, 1, 1, 1)
            t = (1 - rng.uniform("level")).to(pairs).repeat(2)
            xt = add_noise(torch.cat([pairs[:, 0], pairs[:, 1]]), eps, *model.schedule(t))
            reference = model.predict(xt, t, cond, weights="reference").eps
        policy = model.predict(xt, t, cond).eps
        preferred, rejected = excess_error(policy, reference, eps).chunk(2)
        losses, right = dpo_loss(preferred, rejected, self.settings.beta)
        metrics |= {"prefers": right.mean(), "excess_preferred": preferred.mean(), "excess_rejected": rejected.mean()}
        value = (weight * losses).mean()
        yield Loss(value, {name: number.detach() for name, number in metrics.items()}, "policy")

    def _pairs(
        self, model: Model, reward: Reward, batch: Batch, rng: Random
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Pairs (B, 2, C, h, w), preferred first, and their weights (B,). Run it under no_grad."""
        s = self.settings
        kind = state_kind(model)
        if batch.latents is not None:
            if batch.latents.shape[1:] != (2, *model.latent_shape):
                raise InputError(
                    f"DPO got latents of shape {tuple(batch.latents.shape)}; expected "
                    f"(B, 2, {', '.join(map(str, model.latent_shape))}), the preferred and the rejected "
                    "image of each prompt: give prompts.pairs, or prompts.file to have pairs drawn"
                )
            return batch.latents.to(**kind), torch.ones(len(batch.prompts), **kind), {}
        rng = Random(rng.seed, rng.step, [2 * i + k for i in rng.ids for k in range(2)])
        prompts = [prompt for prompt in batch.prompts for _ in range(2)]
        x0 = sample(
            model,
            model.encode_prompts(prompts),
            rng.normal("rollout", model.latent_shape).to(**kind),
            s.steps,
            guidance=s.guidance,
            shift=s.shift,
            weights="reference",
        )
        scores = reward(model.decode(x0), prompts).view(-1, 2)
        best = scores.argmax(1)
        rows = torch.arange(len(best), device=best.device)
        x0 = x0.view(-1, 2, *model.latent_shape)
        pairs = torch.stack([x0[rows, best], x0[rows, 1 - best]], 1)
        gap = (scores[:, 0] - scores[:, 1]).abs()
        return pairs, (gap > 0).to(pairs), {"reward_gap": gap.mean()}


# The equations


def excess_error(policy: Tensor, reference: Tensor, eps: Tensor) -> Tensor:
    """m (B,): by how much the policy's square error of the noise exceeds the reference's; means over the elements."""
    return ((policy - eps).square() - (reference - eps).square()).flatten(1).mean(1)


def dpo_loss(preferred: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid(-beta/2 (m_w - m_l)), (B,), and 1 where the policy agrees with the preference, (B,)."""
    logits = -beta / 2 * (preferred - rejected)
    return -F.logsigmoid(logits), (logits > 0).to(logits)


def calls_per_update(settings: DPOSettings, *, given: bool = False) -> dict[str, int]:
    """Denoiser evaluations of one update per prompt of the batch, a guided call counted twice; `given`: pairs are.

    forward = 4 + (0 given, else 2 steps g),  backward = 2,  decode = reward = (0 given, else 2),  g = 2 with guidance.
    """
    drawn = 0 if given else 2
    guided = 1 if settings.guidance == 1 else 2
    return {"forward": 4 + drawn * settings.steps * guided, "backward": 2, "decode": drawn, "reward": drawn}
