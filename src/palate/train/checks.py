"""What can be found out before the first step, and what to say when a step cannot work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from palate.core import ComparesWords, HasNetworks, Model, Reward, Sampleable
from palate.recipe import TrainerSettings
from palate.recipe.cross_checks import NeedsRewardGradient
from palate.rewards.combine import as_scores, as_tensor_reward
from palate.runtime import distributed
from palate.runtime.code import refused_call
from palate.runtime.distributed import Ranks
from palate.runtime.errors import InputError, OutOfMemoryError
from palate.runtime.phases import tell
from palate.runtime.sharding import mesh, shard
from palate.train.steering import noise_images

if TYPE_CHECKING:
    from palate.train.state import Weights

logger = logging.getLogger("palate")
MODEL_MEMBERS = ("schedule", "latent_shape", "encode_prompts", "encode", "decode", "predict", "parameters")
SAMPLEABLE_MEMBERS = ("default_steps", "default_guidance", "image_size", "device")
ALGORITHM_MEMBERS = ("trains", "step")


def missing_members(thing: object, members: Sequence[str]) -> list[str]:
    """Those of `members` that the object does not have."""
    return [name for name in members if not hasattr(thing, name)]  # those that a proxy hands on count


def check_parts(model: Model, algorithm: Any, reward: Reward, *, samples: bool) -> None:
    """InputError: one of the objects lacks members of its protocol; the message lists all of them.

    samples: whether previews or the guard draw images from the model.
    """
    needed = MODEL_MEMBERS + (SAMPLEABLE_MEMBERS if samples else ())
    problems = []
    if missing := missing_members(model, needed):
        remedy = "see palate.core.Model" + (" and Sampleable" if set(missing) & set(SAMPLEABLE_MEMBERS) else "")
        if not set(missing) - set(SAMPLEABLE_MEMBERS):
            remedy += ", or train without previews and guard (preview_every=0, guard.every=0)"
        problems.append(f"the model ({type(model).__name__}) lacks {', '.join(missing)}; {remedy}")
    if missing := missing_members(algorithm, ALGORITHM_MEMBERS):
        problems.append(
            f"the algorithm ({type(algorithm).__name__}) lacks {', '.join(missing)}; see palate.core.Algorithm"
        )
    if not callable(reward):
        problems.append(
            f"the reward ({type(reward).__name__}) cannot be called; expected a function (images, prompts) -> (B,)"
        )
    elif problem := refused_call(reward, None, []):
        problems.append(f"the reward is called as (images, prompts): {problem}")
    if problems:
        raise InputError("\n".join(problems))


def encode_all(model: Model, used: list[str], preview: list[str]) -> None:
    """Encode the prompts of a run once, so that one that the model cannot read ends it before the first step."""
    with torch.no_grad():
        for start in range(0, len(used), 64):
            tell("encoding", start, len(used))
            model.encode_prompts(used[start : start + 64])
        if preview:
            model.encode_prompts(preview)


def require_sampleable(model: Model, what: str) -> Sampleable:
    """The model, as one that says how it is sampled."""
    if not isinstance(model, Sampleable):
        missing = ", ".join(missing_members(model, SAMPLEABLE_MEMBERS))
        raise InputError(f"{what} need a model that says how it is sampled; {type(model).__name__} lacks {missing}")
    return model


def checked_images(images: Tensor) -> Tensor:
    """The images. InputError: what a model decodes are none. A warning: their values are far outside [0, 1], in which
    rewards and the pictures of the run take them to be."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"model.decode returned {images.dtype} {tuple(images.shape)}; expected floating-point images (B, 3, H, W)"
        )
    low, high = float(images.min()), float(images.max())
    if low < -0.05 or high > 1.05:
        logger.warning(
            f"model.decode returned values from {low:.3g} to {high:.3g}; rewards and pictures take images to lie in "
            "[0, 1]: let it end with .add(1).div(2).clamp(0, 1) where its decoder speaks of [-1, 1]"
        )
    return images


def check_reward(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Reward:
    """The reward, as one that returns a float tensor: lists, NumPy arrays and whole numbers are converted.

    InputError: it does not return one finite number for each image, or changes the images.
    """
    before = images.clone()
    values = reward(images, prompts)
    if not torch.equal(images, before):
        raise InputError(
            "the reward changed the images that it was given, which others look at after it; let it work on a copy"
        )
    if not isinstance(values, Tensor) or not values.is_floating_point():
        reward = as_tensor_reward(reward)
        values = as_scores(values, images.device)
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"the reward returned {got} for {len(images)} images; expected a tensor of shape ({len(images)},)"
        )
    if not torch.isfinite(values).all():
        raise InputError(
            f"the reward returned {[round(float(v), 4) for v in values]} for images of noise; expected finite numbers"
        )
    return reward


@contextlib.contextmanager
def as_judge(reward: Reward) -> Iterator[None]:
    """Inside, a reward that is a module judges: without dropout, and its weights collect no gradients."""
    if not isinstance(reward, nn.Module):
        yield
        return
    training = [module for module in reward.modules() if module.training]
    learning = [p for p in reward.parameters() if p.requires_grad]
    reward.eval()
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for p in learning:
            p.requires_grad_(True)


def shard_networks(model: Model, sharding: str, ranks: Ranks) -> list[nn.Module]:
    """Cut the model's networks over the ranks (full training only); returns them."""
    if not isinstance(model, HasNetworks) or model.weights.training != "full":
        raise InputError("trainer.sharding is for model.weights = full; with lora set it to none: ranks hold copies")
    if ranks.size == 1:
        raise InputError("trainer.sharding needs more than one rank; add --nproc, or start it with torchrun")
    return shard(model.weights.networks.values(), mesh(sharding))


def gradient_cause(
    model: Model, algorithm: Any, reward: Reward, prompt: str, policy: Sequence[nn.Parameter], seed: int
) -> str:
    """Ask the parts, one after the other, which of them loses the gradient; "" where none does and the algorithm does
    not differentiate the reward: rewards that are all alike give it no gradient."""
    differentiates = isinstance(algorithm, NeedsRewardGradient) and algorithm.needs_reward_gradient
    prompts = [prompt] * 2
    device = policy[0].device
    latents = torch.zeros((2, *model.latent_shape), device=device, requires_grad=True)
    images = model.decode(latents)
    if differentiates and not images.requires_grad:
        return "model.decode returns images without gradient (run under no_grad, or detached)"
    images = torch.full_like(images, 0.5).requires_grad_()
    if differentiates and not reward(images, prompts).requires_grad:
        return "the reward is not differentiable (a black box such as jpeg_size); use a differentiable one"
    if not any(p.requires_grad for p in policy):
        return "no policy parameter requires a gradient (an adapter switched off or frozen)"
    t = torch.full((2,), 0.5, device=device)
    pred = model.predict(latents.detach(), t, model.encode_prompts(prompts))
    if not pred.x0.requires_grad:
        return "model.predict loses the policy's gradient (run under no_grad, or another adapter left active)"
    if _same_for_all_words(algorithm, reward, prompt, noise_images(model, seed, 1)):
        return (
            "the reward does not read the prompt, so the relative preference is always 0: set "
            "algorithm.preference=absolute, with reward.noised (combine.noised_relative) for a negative"
        )
    return "a reward past its hinge, fully saturated pixels, or a step length of zero" if differentiates else ""


@torch.no_grad()
def _same_for_all_words(algorithm: Any, reward: Reward, prompt: str, image: Tensor) -> bool:
    """Whether a preference between control words is what is trained, and the reward knows no difference."""
    if not isinstance(algorithm, ComparesWords) or not algorithm.relative:
        return False
    texts = {text for each in algorithm.control_texts(prompt).values() for text in each}
    return len(texts) > 1 and len({float(reward(image, [text])) for text in texts}) == 1


@contextlib.contextmanager
def memory_advice(weights: Weights) -> Iterator[None]:
    """Turns an out-of-memory error inside into one that says which settings need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        signs = (
            "out of memory", "can't allocate memory", "not enough memory",
            "CUBLAS_STATUS_ALLOC_FAILED", "unable to find an engine",
        )  # fmt: skip
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in signs)
        if not known:
            raise
        asked = str(error) or "the machine has no more"
        advice = memory_savings(weights.settings, weights.size(), asked, ranks=distributed.ranks().size)
        raise OutOfMemoryError(advice) from error


def memory_savings(s: TrainerSettings, trained_bytes: int, error: str, *, ranks: int = 1) -> str:
    """A message for a step that did not fit: what was asked for, and each setting that needs less, with its GiB."""
    trained = trained_bytes / 2**30
    each = s.batch_size // ranks
    finer = next((m for m in range(s.micro_batches + 1, each + 1) if each % m == 0), None)
    lines = [f"out of memory: {error.splitlines()[0][:200]}. No update was made. To reduce memory:"]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    if finer:
        taken = 0 if peak is None else max(peak - 4 * trained, 0)
        part = "" if peak is None else f", of the {taken:.1f} GiB that images and activations took"
        lines.append(
            f"trainer.micro_batches={finer}: {s.micro_batches / finer:.0%} of a step's activations at a time{part}"
        )
    else:
        lines.append(
            "a smaller image, fewer differentiated steps, or gradient checkpointing: one image at a time is reached"
        )
    lines.append(
        f"model.weights=lora, or a smaller model.lora_rank: training holds {4 * trained:.2f} GiB now "
        "(weights, gradients, two moments)"
    )
    if s.ema_decay:
        lines.append(f"trainer.ema_decay=0: {trained:.2f} GiB")
    lines.append(
        "--nproc N: each rank works on 1/N of the batch; with model.weights=full and trainer.sharding=full each "
        f"holds 1/N of the {4 * trained:.2f} GiB"
    )
    return "\n".join(lines)
