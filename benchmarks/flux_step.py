"""What one SRPO update costs on a small FLUX with its VAE and a ViT: against the sum of its parts, and against a plain
re-statement of the released program's step, written from docs/algorithms/srpo.md.

    OMP_NUM_THREADS=1 python benchmarks/flux_step.py [--repeats 9]

The released step runs with autograd's anomaly mode on and with a VAE whose weights take gradients that nothing reads.
Here the same formulas run with both, with each alone, and with neither. Everything is timed in one process, in turns,
by process time, and the medians' ratios are printed: they do not hang on what else the machine does. Random networks of
the real classes in the published proportions; full training, no activation checkpointing, in all rows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from palate.algorithms.srpo import SRPO, SRPOSettings, calls_per_update
from palate.core import Batch, Random
from palate.models.autoencoder import Autoencoder
from palate.models.flux import Cond, Flux, pack, positions, unpack
from palate.models.parts import Parts
from palate.models.weights import NamedWeights
from palate.rewards.clip import ClipReward
from palate.rewards.combine import with_control
from palate.sampling import sample

SETTINGS = SRPOSettings(
    positive=("Detail",), negative=("Painting",), rollout_steps=6, noise="rollout", levels="released", hinge=0.7,
    k_denoise=(0.1, 0.25), k_inversion=(0.3, 0.01),
)  # fmt: skip
SMALL = {"pixels": 256, "width": 256, "blocks": (2, 4), "channels": (32, 64, 128, 128), "tower": (256, 6)}
CPU = torch.device("cpu")


def build(
    *, pixels: int, width: int, blocks: tuple[int, int], channels: tuple[int, ...], tower: tuple[int, int]
) -> tuple[Flux, ClipReward, Cond]:
    """A FLUX of `blocks` (double, single), its VAE, a ViT of `tower` (width, layers), and the text of one prompt."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        attention_head_dim=16,
        num_attention_heads=width // 16,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=channels[0] // 4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    vision = {
        "hidden_size": tower[0],
        "intermediate_size": 4 * tower[0],
        "num_hidden_layers": tower[1],
        "num_attention_heads": tower[0] // 32,
        "image_size": 224,
        "patch_size": 14,
    }
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 62,
        "eos_token_id": 63,
    }
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=64))
    weights = NamedWeights(network, training="full", rank=1, alpha=None, targets=())
    side = pixels // 2 ** (len(channels) - 1)
    parts = Parts(
        None,
        "transformer",
        weights,
        Autoencoder(vae, device=CPU),
        None,
        (4, side, side),
        (pixels, pixels),
        torch.float32,
        CPU,
        None,
    )

    def tokens(prompts: list[str]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[62, *(ord(letter) % 61 for letter in p[:40]), 63] for p in prompts])}

    return Flux(parts, None), ClipReward(clip, tokens, image_size=224), Cond(torch.randn(1, 32, 64), torch.randn(1, 32))


def optimizer_of(model: Flux) -> torch.optim.Optimizer:
    """With a rate that leaves the weights, and so the next measurement, as they are."""
    return torch.optim.AdamW(model.parameters(), lr=1e-12)


def apply(model: Flux, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def palate_gradients(model: Flux, reward: ClipReward, cond: Cond, rng: Random) -> None:
    """The gradients of one update, accumulated into the parameters."""
    for loss in SRPO(SETTINGS).step(model, reward, Batch(["a dog"], cond, torch.arange(1)), rng):
        loss.value.backward()


def released_gradients(model: Flux, reward: ClipReward, cond: Cond, rng: Random) -> None:
    """The same, from the published formulas alone: a loop over levels, one over the two branches."""
    s, transformer, vae = SETTINGS, model.weights.networks["policy"], model.parts.vae.vae

    def velocity(x: Tensor, level: float) -> Tensor:
        told = {"timestep": torch.full((1,), level), "guidance": torch.full((1,), model.distilled_guidance)}
        out = transformer(
            hidden_states=pack(x),
            encoder_hidden_states=cond.text,
            pooled_projections=cond.pooled,
            img_ids=positions(x),
            txt_ids=torch.zeros(cond.text.shape[1], 3),
            **told,
        ).sample
        return unpack(out, x.shape)

    def shifted(u: float) -> float:
        return s.shift * u / (1 + (s.shift - 1) * u)

    eps = x = rng.normal("rollout", model.latent_shape)
    with torch.no_grad():
        for j in range(s.rollout_steps):
            here, there = shifted(1 - j / s.rollout_steps), shifted(1 - (j + 1) / s.rollout_steps)
            x = x + (there - here) * velocity(x, math.floor(round(1000 * here, 9)) / 1000)
    n = s.timestep_length
    m0 = int(rng.integers("level", 5, n - 5))
    first, last = (shifted(1 - a / s.vis_sampling_step) for a in s.train_timestep)
    levels = torch.linspace(first, last, n, dtype=torch.float64)
    k = min(n - m0, m0, math.floor((1 - s.groundtruth_ratio) * n) + 1)
    wanted, unwanted = (with_control(words[0], ["a dog"], s.template) for words in (s.positive, s.negative))
    for denoise in (True, False):
        low = m0 if denoise else max(m0 - k, 1)
        high = min(low + k, n)
        start, end = (float(levels[n - i]) for i in ((high, low) if denoise else (low, high)))
        xs = (1 - start) * x + start * eps
        xe = xs + (end - start) * velocity(xs, math.floor(1000 * start) / 1000)
        clean = (xe - end * eps) / (1 - end)
        image = (vae.decode(clean / 0.3611 + 0.1159).sample / 2 + 0.5).clip(0, 1)
        features = reward.image_features(image)
        late, early = s.k_denoise if denoise else s.k_inversion
        share = late + (early - late) * low / (n - 1)
        favoured, other = (wanted, unwanted) if denoise else (unwanted, wanted)
        r = (1 + share) * reward.score(features, favoured) - reward.score(features, other)
        ((s.hinge - r).relu().mean() / 2).backward()


def count(model: Flux, reward: ClipReward, step: Callable[[], None]) -> dict[str, int]:
    """Calls of the transformer, the VAE's decoder and the image tower while `step` runs."""
    calls: Counter[str] = Counter()
    watched = {
        "predict": model.weights.networks["policy"],
        "decode": model.parts.vae.vae.decoder,
        "image_towers": reward.model.vision_model,
    }
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, module in watched.items()
    ]
    step()
    for hook in hooks:
        hook.remove()
    return dict(calls)


def in_turns(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Process seconds of each step, one after the other, `repeats` times; one unmeasured round before."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if turn:
                times[name].append(time.process_time() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    model, reward, cond = build(**SMALL)
    optimizer, vae = optimizer_of(model), model.parts.vae.vae
    latents, t = torch.randn(1, *model.latent_shape), torch.full((1,), 0.8)
    image = torch.rand(1, 3, *model.image_size, requires_grad=True)
    leaf = latents.clone().requires_grad_()
    feature = torch.randn(1, 64)

    def update(gradients: Callable[..., None], *, anomaly: bool = False, trainable: bool = False) -> None:
        vae.requires_grad_(trainable)
        with torch.autograd.set_detect_anomaly(True) if anomaly else nullcontext():
            gradients(model, reward, cond, Random(0, 1, [0]))
        apply(model, optimizer)
        optimizer.zero_grad()
        vae.requires_grad_(False)

    def parts_apply() -> None:
        for parameter in model.parameters():
            parameter.grad = parameter.detach()
        apply(model, optimizer)
        optimizer.zero_grad()

    def rollout() -> None:
        with torch.no_grad():
            sample(model, cond, latents, SETTINGS.rollout_steps, shift=SETTINGS.shift)

    rows = {
        "update": lambda: update(palate_gradients),
        "rollout": rollout,
        "denoiser": lambda: model.predict(latents, t, cond).x0.sum().backward(),
        "decoder": lambda: model.decode(leaf).sum().backward(),
        "reward": lambda: (reward.image_features(image) * feature).sum().backward(),
        "optimizer": parts_apply,
        "plain": lambda: update(released_gradients),
        "plain, anomaly mode": lambda: update(released_gradients, anomaly=True),
        "plain, VAE trainable": lambda: update(released_gradients, trainable=True),
        "plain, both": lambda: update(released_gradients, anomaly=True, trainable=True),
    }
    formula = calls_per_update(SETTINGS)
    for name, gradients in (("palate", palate_gradients), ("plain", released_gradients)):
        calls = count(model, reward, lambda: gradients(model, reward, cond, Random(0, 1, [0])))  # noqa: B023
        print(f"calls of {name}: {calls}")
        if any(calls[part] != formula[part] for part in calls):
            raise SystemExit(f"expected {formula}")
    optimizer.zero_grad()
    median = {name: statistics.median(times) for name, times in in_turns(rows, repeats).items()}
    branches = formula["backward"]
    shares = {
        "rollout": median["rollout"],
        "optimizer": median["optimizer"],
        **{part: branches * median[part] for part in ("denoiser", "decoder", "reward")},
    }
    total = sum(shares.values())
    print(f"{torch.get_num_threads()} thread, {repeats} turns, median process time; an update {median['update']:.3f} s")
    print("parts:", ", ".join(f"{name} {value / total:.0%}" for name, value in shares.items()))
    print(f"update / sum of its parts                   {median['update'] / total:.3f}   (at most 1.10)")
    for name, bound in (
        ("plain, both", "at least 1.5"),
        ("plain, anomaly mode", ""),
        ("plain, VAE trainable", ""),
        ("plain", "0.95 to 1.05"),
    ):
        ratio = median[name] / median["update"]
        print(f"{name + ' / update':<44}{ratio:.3f}" + (f"   ({bound})" if bound else ""))


if __name__ == "__main__":
    main()
