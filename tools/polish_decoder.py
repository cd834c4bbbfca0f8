"""Train the autoencoder's decoder on, with its encoder as it is: latents, and what was trained on them, stay valid.

    python tools/polish_decoder.py [--minutes 20] [--detail 2]

The loss is that of train_autoencoder.py with more weight on how strong fine detail is (`--detail`), and with the root
mean square of the Laplacian in each neighbourhood beside its mean: L1 loses energy first where it cannot place a line
to the pixel. Begins with WORK/vae as train_autoencoder.py left it, writes WORK/polished; the same command resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pool
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from progress import Progress
from torch import Tensor
from train_autoencoder import BATCH, NOISE, WEIGHTS, descend, fidelity, finish, follow, fresh, laplacian, losses, save


def energy(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean difference of the Laplacian's root mean square in neighbourhoods of 8 x 8, half over each other."""
    strength = [
        F.avg_pool2d(laplacian(x).square().mean(1, keepdim=True), 8, 4).add(1e-4).sqrt() for x in (decoded, images)
    ]
    return (strength[0] - strength[1]).abs().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20, help="of training in all, resumed time included")
    parser.add_argument("--detail", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pool", type=Path, default=pool.POOL)
    parser.add_argument("--work", type=Path, default=Path(".cache/autoencoder"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = AutoencoderTiny.from_pretrained(args.work / "vae").float().to(memory_format=torch.channels_last)
    average = AutoencoderTiny.from_pretrained(args.work / "vae").float()
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99))
    weights = WEIGHTS | {"strength": 0.0, "energy": args.detail}
    images, check = pool.images(args.pool, pool.ready(args.pool)), fresh()
    print(f"before: {fidelity(average.eval(), check)}", flush=True)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    run = Progress(args.work / "polish.pt", parts, args.minutes)
    for step in run:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 100) * max(0.01, 1 - run.share)
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        batch = images[torch.randint(len(images), (BATCH,), generator=rng)].float() / 255
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder((batch * 2 - 1).contiguous(memory_format=torch.channels_last)).float()
        latents = latents + NOISE * torch.rand(BATCH, 1, 1, 1, generator=rng) * torch.randn(
            latents.shape, generator=rng
        )
        with torch.autocast("cpu", torch.bfloat16):
            decoded = model.decoder(latents)
        decoded = decoded.float().add(1).div(2).contiguous()
        terms = losses(decoded, batch) | {"energy": energy(decoded, batch)}
        loss = sum(weights[name] * value for name, value in terms.items())
        descend(loss, model.decoder, optimizer)
        follow(average, model, step)
        run.log(terms)
        if step % 500 == 0:
            print(f"step {step} fresh {fidelity(average.eval(), check)}", flush=True)
            save(average, args.work / "polished")
    finish(run, average, check, args.work / "polished", args.work / "polished.png")


if __name__ == "__main__":
    main()
