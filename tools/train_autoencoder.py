"""Train the embedded model's autoencoder: 64 x 64 images to 6 x 16 x 16 latents, diffusers' AutoencoderTiny.

    python tools/train_autoencoder.py [--minutes 8] [--seed 0]

Loss: L1 + L1 of image gradients, noise on the latents (so that the decoder is smooth where a diffusion model lands),
and a pull of every latent channel to mean 0, variance 1 (so that the scaling factor is 1). Resumes from its own state
file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from data import compose, load_sprites, save_grid
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file


def build() -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=6,
        encoder_block_out_channels=(40, 40, 40),
        decoder_block_out_channels=(40, 40, 40),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        scaling_factor=1.0,
    )


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(".cache/autoencoder"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    sprites, model = load_sprites(), build()
    state = args.work / "state.safetensors"
    if state.exists():
        model.load_state_dict(load_file(state))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    start, step = time.time(), 0
    while (progress := (time.time() - start) / 60 / args.minutes) < 1:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, step / 50) * (0.5 + 0.5 * np.cos(np.pi * progress)) + 1e-5
        images = compose(np.random.default_rng((args.seed, step)), sprites, 24).images
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(images * 2 - 1)
        latents = latents.float()
        spread = latents.var((0, 2, 3)).sub(1).square().mean() + latents.mean((0, 2, 3)).square().mean()
        noisy = latents + 0.1 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(latents)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = model.decoder(noisy)
        decoded = decoded.float().add(1).div(2)
        error = (decoded - images).abs().mean()
        edges = sum((a - b).abs().mean() for a, b in zip(gradients(decoded), gradients(images), strict=True))
        optimizer.zero_grad()
        (error + edges + 0.02 * spread).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            psnr = -10 * (decoded.clamp(0, 1) - images).square().mean().log10()
            print(f"step {step} {progress:.0%} l1 {error:.4f} psnr {psnr:.2f} dB spread {spread:.3f}", flush=True)
            save_file(model.state_dict(), state)
    save_file(model.state_dict(), state)

    model.eval()
    images = compose(np.random.default_rng((args.seed, 0)), sprites, 256).images
    with torch.no_grad():
        latents = model.encode(images * 2 - 1).latents
        decoded = model.decode(latents).sample.add(1).div(2).clamp(0, 1)
    print(
        f"held-out psnr {-10 * (decoded - images).square().mean((1, 2, 3)).log10().mean():.2f} dB, "
        f"latent std {latents.std((0, 2, 3)).tolist()}, {step} steps of 24"
    )
    save_grid(torch.stack([images[:32], decoded[:32]], 1).flatten(0, 1), args.work / "grid.png", zoom=2)
    model.save_pretrained(args.work / "vae")
    config = args.work / "vae/config.json"  # a key that diffusers adds on saving and complains of on loading
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "block_out_channels"}, indent=2)
        + "\n"
    )


if __name__ == "__main__":
    main()
