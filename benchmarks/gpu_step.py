"""Seconds and peak memory of an SRPO update on the real FLUX.1 or SDXL with random weights, beside what plan predicts.

    python benchmarks/gpu_step.py flux  [--size 1024] [--compile] [--updates 5]
    python benchmarks/gpu_step.py sdxl
    python benchmarks/gpu_step.py flux --small --device cpu       # the same code on shrunken networks

Nothing is downloaded: weights are random, in the published shapes. LoRA, HPSv2.1's towers, batch 1, bfloat16,
recomputed blocks; the rollout, levels and branches are those of srpo-flux and srpo-sdxl-24gb.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from torch import nn
from transformers import CLIPModel

from palate import plan as planner
from palate import recipe
from palate.core import Batch, Random
from palate.models import flux, sdxl
from palate.models.autoencoder import Autoencoder, latent_shape
from palate.models.facts import facts_of
from palate.models.parts import Options, Parts, named_weights
from palate.rewards.clip import ClipReward, vit_h_14

RECIPES = {"flux": "srpo-flux", "sdxl": "srpo-sdxl-24gb"}
SMALL = {
    "flux": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
             "axes_dims_rope": (4, 6, 6)},
    "sdxl": {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 1),
             "attention_head_dim": (1, 2, 2)},
}  # fmt: skip


def random_network(kind: type, config: dict, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Made on the device, in `dtype`, with weights that keep values finite."""
    with torch.device("meta"):
        network = kind(**config).to(dtype)
    network = network.to_empty(device=device)
    with torch.no_grad():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
        for buffer in network.buffers():
            buffer.zero_()
    return network


def build(name: str, made: recipe.Recipe, size: int, device: torch.device, *, small: bool):
    """Model, reward, and the text of one prompt."""
    facts = facts_of(name)
    published = facts.published
    config = {**published.config, **(SMALL[name] if small else {})}
    vae_config = {**published.vae, **({"block_out_channels": (32, 32, 64, 64)} if small else {})}
    dtype = torch.bfloat16
    network = random_network(facts.network, config, dtype, device)
    weights = named_weights(network, facts, Options(lora_rank=made.model.lora_rank))
    vae = Autoencoder(
        random_network(AutoencoderKL, vae_config, dtype, device), device=device, gradient_checkpointing=True
    )
    shape = latent_shape(vae_config, size, family=name, patch=facts.patch or 1)
    parts = Parts(SimpleNamespace(index={}), facts, weights, vae, None, shape, (size, size), dtype, device, None)
    model = flux.Flux(parts, None) if name == "flux" else sdxl.StableDiffusionXL(parts, EulerDiscreteScheduler())
    towers = vit_h_14()
    if small:
        towers.vision_config.num_hidden_layers = towers.text_config.num_hidden_layers = 1
    reward = ClipReward(
        random_network(CLIPModel, {"config": towers}, dtype, device),
        lambda prompts: {"input_ids": torch.full((len(prompts), 77), 49407)},
        image_size=224,
    )
    with device:
        cond = published.condition(network.config, published.text_tokens, torch.float32)
    return model, reward, type(cond)(*(torch.randn_like(tensor) for tensor in cond))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="diffusers' compile_repeated_blocks")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    made = recipe.read(RECIPES[args.model], [f"model.image_size={args.size}", "trainer.batch_size=1"])
    model, reward, cond = build(args.model, made, args.size, device, small=args.small)
    if args.compile:
        model.weights.network.compile_repeated_blocks()
    algorithm = recipe.build_algorithm(made)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    seconds = []
    for step in range(1, args.updates + 2):
        began = time.perf_counter()
        batch = Batch(["a photograph of a dog"], cond, torch.arange(1))
        for loss in algorithm.step(model, reward, batch, Random(0, step, [0])):
            loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{args.model}, {args.size} x {args.size}, {where}, compiled: {args.compile}, small: {args.small}")
    print(
        f"first update {seconds[0]:.2f} s (with warm-up), median of {args.updates} more "
        f"{statistics.median(seconds[1:]):.3f} s"
    )
    if device.type == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated")
    if not args.small:
        planned = planner.plan(made)
        print(
            f"plan: {planned.flops / 1e12:.1f} TFLOP, {planned.bytes / 2**30:.2f} GiB; measured "
            f"{planned.flops / 1e12 / statistics.median(seconds[1:]):.0f} TFLOP/s"
        )


if __name__ == "__main__":
    main()
