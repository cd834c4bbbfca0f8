"""Seconds, TFLOP/s and peak memory of an SRPO update on real networks with random weights, beside what plan predicts.

    python benchmarks/gpu_step.py --all                           # every row of the table, in at most ten minutes
    python benchmarks/gpu_step.py flux2 [--size 1024] [--quantize nf4] [--compile] [--offload] [--updates 3]
    python benchmarks/gpu_step.py flux --nccl                     # one rank of nccl: what its collectives add
    python benchmarks/gpu_step.py --all --small --device cpu      # the same code on shrunken networks

SDXL, FLUX.1-dev, FLUX.2-klein-4B and SANA 1.6B. Nothing is downloaded: weights are random, in the published shapes.
LoRA, HPSv2.1's towers, batch 1, bfloat16, recomputed blocks; levels and branches are those of each recipe, and its
rollout, shortened to `--rollout` steps, because all steps of a rollout cost the same. With --all each row has a process
of its own, so that a row that runs out of memory says so and the next begins with an empty card.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import CLIPModel

from palate import plan as planner
from palate import recipe
from palate.core import Batch, Random
from palate.models import flux, flux2, sana, sdxl
from palate.models.autoencoder import Autoencoder
from palate.models.latents import latent_shape
from palate.models.parts import Options, Parts, named_weights, place
from palate.models.quantised import quantise
from palate.rewards.clip import ClipReward, vit_h_14

RECIPES = {"sdxl": "srpo-sdxl-24gb", "flux": "srpo-flux", "flux2": "srpo-flux2-klein", "sana": "draft-sana"}
FAMILIES = {"sdxl": sdxl.StableDiffusionXL, "flux": flux.Flux, "flux2": flux2.Flux2, "sana": sana.Sana}
SMALL = {
    "flux": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
             "axes_dims_rope": (4, 6, 6)},
    "flux2": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
              "axes_dims_rope": (4, 4, 4, 4), "joint_attention_dim": 48},
    "sdxl": {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 1),
             "attention_head_dim": (1, 2, 2)},
    "sana": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2,
             "cross_attention_head_dim": 16, "cross_attention_dim": 32},
}  # fmt: skip
SMALL_VAE = {"block_out_channels": (32, 32, 64, 64)}
SMALL_DC = {"encoder_block_out_channels": (32,) * 6, "decoder_block_out_channels": (32,) * 6,
            "encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (1,) * 6,
            "attention_head_dim": 16}  # fmt: skip
ROWS = [
    [name, *how]
    for name in RECIPES
    for how in ([], ["--compile"], ["--quantize", "nf4"])
    if (name, how) != ("sana", ["--compile"])  # diffusers names no repeated blocks of it
] + [["flux2", "--quantize", "nf4", "--compile"], ["flux2", "--offload"], ["flux2", "--nccl"]]  # fmt: skip


def random_network(kind: type, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Made on the device, in `dtype`, with weights that keep values finite."""
    with torch.device("meta"):
        network = kind(**config).to(dtype)
    network = network.to_empty(device=device)
    with torch.no_grad():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
        for name, buffer in network.named_buffers():
            buffer.fill_(1.0 if name.endswith("running_var") else 0.0)
    return network.eval().requires_grad_(False)


def scheduler_of(name: str) -> Any:
    """What the family reads of one; the times of a rollout are the recipe's."""
    if name == "sdxl":
        return EulerDiscreteScheduler()
    return FlowMatchEulerDiscreteScheduler() if name != "sana" else SimpleNamespace(
        config=SimpleNamespace(num_train_timesteps=1000)
    )  # fmt: skip


def build(args: argparse.Namespace, made: recipe.Recipe, device: torch.device) -> tuple[Any, ClipReward, Any]:
    """Model, reward, and the text of one prompt."""
    name, small, dtype = args.model, args.small, torch.bfloat16
    family = FAMILIES[name]
    facts = family.facts
    published = facts.published
    config = {**published.config, **(SMALL[name] if small else {})}
    vae_config = {**published.vae, **((SMALL_DC if name == "sana" else SMALL_VAE) if small else {})}
    where = torch.device("cpu") if args.offload else device
    network = random_network(facts.network, config, dtype, where)
    if args.quantize:
        network = quantise(network, args.quantize, dtype, facts.whole).to(device)
    options = Options(lora_rank=made.model.lora_rank, compile=args.compile, offload=args.offload)
    weights = named_weights(network, facts, options)
    place(weights, options, device)
    vae = Autoencoder(
        random_network(facts.vae, vae_config, dtype, device), device=device, gradient_checkpointing=True,
        layout=facts.layout,
    )  # fmt: skip
    shape = latent_shape(vae_config, args.size, family=name, patch=facts.patch or 1, fold=facts.layout.fold)
    parts = Parts(
        SimpleNamespace(index={}), facts, weights, vae, None, shape, (args.size,) * 2, dtype, device, None
    )  # fmt: skip
    towers = vit_h_14()
    for tower in (towers.vision_config, towers.text_config) if small else ():
        tower.num_hidden_layers, tower.hidden_size, tower.intermediate_size, tower.num_attention_heads = 1, 32, 64, 2
    reward = ClipReward(
        random_network(CLIPModel, {"config": towers}, dtype, device),
        lambda prompts: {"input_ids": torch.full((len(prompts), 77), 49407)},
        image_size=224,
    )
    with device:
        cond = published.condition(network.config, published.text_tokens, torch.float32)
    return family(parts, scheduler_of(name)), reward, type(cond)(*(torch.ones_like(tensor) for tensor in cond))


def settings(args: argparse.Namespace) -> recipe.Recipe:
    """The model's recipe at this size, one image a step, with a short rollout; DRaFT's for SANA as SRPO."""
    changes = [f"model.image_size={args.size}", "trainer.batch_size=1", "trainer.micro_batches=1"]
    if args.model == "sana":
        changes.append("algorithm={name: srpo, positive: [Realistic photo], negative: [CG Render]}")
    changes += [f"algorithm.rollout_steps={args.rollout}", "algorithm.rollout_guidance=1.0"]
    changes += [f"model.quantize={args.quantize}"] if args.quantize else []
    changes += ["model.offload=true"] if args.offload else []
    return recipe.read(RECIPES[args.model], changes)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One row: seconds of the first update (compilation and warm-up) and of the median one after it, peak GiB, plan."""
    device = torch.device(args.device)
    made = settings(args)
    if args.nccl:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    model, reward, cond = build(args, made, device)
    algorithm = recipe.build_algorithm(made)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    seconds = []
    for step in range(1, args.updates + 2):
        began = time.perf_counter()
        batch = Batch(["a photograph of a dog"], cond, torch.arange(1))
        for loss in algorithm.step(model, reward, batch, Random(0, step, [0])):
            loss.value.backward()
        if args.nccl:
            for p in model.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if args.nccl:
        dist.destroy_process_group()
    found: dict[str, Any] = {"first_seconds": seconds[0], "seconds": statistics.median(seconds[1:])}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if not args.small:
        planned = planner.plan(made)
        found |= {"plan_tflop": planned.flops / 1e12, "plan_gib": planned.bytes / 2**30}
        found["tflops"] = found["plan_tflop"] / found["seconds"]
    return found


def run_all(args: argparse.Namespace, rest: list[str]) -> None:
    """Every row of the table as a process of its own, until `--minutes` are over."""
    ends = time.monotonic() + 60 * args.minutes
    where = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"{where}, {args.size} x {args.size}, rollout of {args.rollout}, median of {args.updates} updates\n")
    print("| model | how | first s | s / update | TFLOP/s | peak GiB | plan's GiB |\n|---|---|---|---|---|---|---|")
    for name, *how in ROWS:
        left = ends - time.monotonic()
        command = [sys.executable, __file__, name, *how, "--json", *rest]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, left))
            row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
            why = (done.stderr.strip().splitlines() or ["?"])[-1][:80] if done.returncode else ""
        except subprocess.TimeoutExpired:
            row, why = {}, "no time left"
        keys = ("first_seconds", "seconds", "tflops", "peak_gib", "plan_gib")
        cells = [f"{row[key]:.2f}" if key in row else why if key == keys[0] else "" for key in keys]
        print(f"| {name} | {' '.join(how) or 'bfloat16'} | {' | '.join(cells)} |", flush=True)


def read(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=RECIPES, nargs="?")
    parser.add_argument("--all", action="store_true", help="every row of the table")
    parser.add_argument("--minutes", type=float, default=10.0, help="of --all; what does not begin by then is left out")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--rollout", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantize", choices=("nf4", "int8", "fp8"))
    parser.add_argument("--compile", action="store_true", help="the repeated blocks")
    parser.add_argument("--offload", action="store_true", help="frozen blocks wait on the host")
    parser.add_argument("--nccl", action="store_true", help="average the gradients over one rank (gloo on a CPU)")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(words)
    if args.model is None and not args.all:
        parser.error("give a model, or --all")
    return args


def main() -> None:
    args = read()
    if args.all:
        rest = [f"--size={args.size}", f"--updates={args.updates}", f"--rollout={args.rollout}"]
        run_all(args, [*rest, f"--device={args.device}", *(["--small"] if args.small else [])])
        return
    found = run(args)
    if args.json:
        print(json.dumps(found))
        return
    print(
        f"{args.model}, {args.size} x {args.size}, {args.device}: "
        + ", ".join(f"{k} {v:.3f}" for k, v in found.items())
    )


if __name__ == "__main__":
    main()
