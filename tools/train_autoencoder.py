"""Train the embedded model's autoencoder: 64 x 64 images to 16 x 16 latents, diffusers' AutoencoderTiny.

    python tools/pool.py --chunks 30
    python tools/train_autoencoder.py [--minutes 60] [--channels 8] [--width 48]

Loss: L1 of pixels, of image gradients and of the Laplacian, and of how strong the Laplacian is in each neighbourhood:
the last term pays for fine detail as such, where L1 alone prefers none to a misplaced one. Noise on the latents keeps
the decoder smooth where a diffusion model lands, and each latent channel is pulled to mean 0, variance 1, so that the
scaling factor is 1. State is saved every three minutes; the same command resumes, and --minutes counts in all.

--anchor FOLDER begins with that autoencoder's encoder, adds channels to its latents, and holds the channels that it had
to what it makes of the images: a denoiser of the narrower latents then goes on on the wider ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pool
import torch
import torch.nn.functional as F
from data import Atlas, Composer, save_grid
from diffusers import AutoencoderTiny
from progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn

BATCH, EMA, NOISE = 16, 0.998, 0.1
_LAPLACE = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).expand(3, 1, 3, 3).contiguous()


def build(channels: int, width: int, encoder_width: int) -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(encoder_width,) * 3,
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(3, 3, 1),
        scaling_factor=1.0,
    )


def begin_with(model: AutoencoderTiny, anchor: AutoencoderTiny) -> None:
    """Give the encoder the anchor's weights; channels that the anchor lacks keep their own start."""
    own = model.encoder.state_dict()
    for name, value in anchor.encoder.state_dict().items():
        own[name][: len(value)] = value
    model.encoder.load_state_dict(own)


@torch.no_grad()
def targets(anchor: AutoencoderTiny, images: Tensor, folder: Path, chunks: Sequence[int]) -> Tensor:
    """The anchor's latents of the images (float16), kept on disk per chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    for chunk, part in zip(chunks, images.split(pool.CHUNK), strict=True):
        if not (path := folder / f"anchor-{chunk}.safetensors").exists():
            with torch.autocast("cpu", torch.bfloat16):
                found = [anchor.encode(piece.float() / 255 * 2 - 1).latents.half() for piece in part.split(100)]
            pool.keep(path, {"latents": torch.cat(found)})
    return torch.cat([load_file(folder / f"anchor-{chunk}.safetensors")["latents"] for chunk in chunks])


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def laplacian(images: Tensor) -> Tensor:
    """(N, 3, H - 2, W - 2): what is fine in an image."""
    return F.conv2d(images, _LAPLACE, groups=3)


def losses(decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
    """The terms of the reconstruction loss, before their weights."""
    fine, true = laplacian(decoded), laplacian(images)
    strength = [F.avg_pool2d(x.abs().mean(1, keepdim=True), 5, 2) for x in (fine, true)]
    return {
        "pixel": (decoded - images).abs().mean(),
        "edge": sum((a - b).abs().mean() for a, b in zip(gradients(decoded), gradients(images), strict=True)),
        "fine": (fine - true).abs().mean(),
        "strength": (strength[0] - strength[1]).abs().mean(),
        "square": (decoded - images).square().mean(),
    }


WEIGHTS = {"pixel": 1.0, "edge": 1.0, "fine": 0.25, "strength": 0.5, "square": 8.0, "spread": 0.02, "anchor": 0.05}


@torch.no_grad()
def fidelity(vae: AutoencoderTiny, images: Tensor) -> dict[str, float]:
    """PSNR in dB (mean over images), Laplacian energy decoded / original, and the latents' statistics."""
    latents = torch.cat([vae.encode(part * 2 - 1).latents for part in images.split(64)])
    decoded = torch.cat([vae.decode(part).sample.add(1).div(2).clamp(0, 1) for part in latents.split(64)])
    energy = [laplacian(x).square().mean() for x in (decoded, images)]
    return {
        "psnr": float(-10 * (decoded - images).square().mean((1, 2, 3)).log10().mean()),
        "energy": float(energy[0] / energy[1]),
        "smallest std": float(latents.std((0, 2, 3)).min()),
        "largest std": float(latents.std((0, 2, 3)).max()),
    }


def fresh(count: int = 256, seed: int = 99) -> Tensor:
    """Compositions that no training sees."""
    return Composer(Atlas.load()).compose(np.random.default_rng((seed, 0)), count).images


def save(vae: AutoencoderTiny, folder: Path) -> None:
    vae.save_pretrained(folder)
    config = folder / "config.json"  # without a key that diffusers adds on saving and complains of on loading
    table = {k: v for k, v in json.loads(config.read_text()).items() if k != "block_out_channels"}
    config.write_text(json.dumps(table, indent=2) + "\n")


def step_loss(model: AutoencoderTiny, batch: Tensor, held: Tensor | None, rng: torch.Generator) -> dict[str, Tensor]:
    """The terms of one step, before their weights. held: what the first channels should be."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.encoder((batch * 2 - 1).contiguous(memory_format=torch.channels_last))
    latents = latents.float()
    spread = latents.var((0, 2, 3)).sub(1).square().mean() + latents.mean((0, 2, 3)).square().mean()
    noisy = latents + NOISE * torch.rand(len(batch), 1, 1, 1, generator=rng) * torch.randn(latents.shape, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = model.decoder(noisy)
    terms = losses(decoded.float().add(1).div(2).contiguous(), batch) | {"spread": spread}
    if held is not None:
        terms["anchor"] = (latents[:, : held.shape[1]] - held.float()).square().mean()
    return terms


def descend(loss: Tensor, trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimizer, on gradients of norm 1 at most."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def follow(average: AutoencoderTiny, model: AutoencoderTiny, step: int) -> None:
    """Move the average of the weights."""
    decay = min(EMA, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def show(vae: AutoencoderTiny, images: Tensor, path: Path) -> None:
    """A sheet of images, each beside its reconstruction."""
    decoded = vae.decode(vae.encode(images * 2 - 1).latents).sample.add(1).div(2).clamp(0, 1)
    save_grid(torch.stack([images, decoded], 1).flatten(0, 1), path, columns=12, zoom=2)


def finish(run: Progress, average: AutoencoderTiny, check: Tensor, folder: Path, sheet: Path) -> None:
    """Say how good the average is on images that no training saw, and write it and a sheet of them."""
    print(f"{run.step} steps of {BATCH}, {run.spent / 60:.1f} min, fresh {fidelity(average.eval(), check)}", flush=True)
    show(average, check[:48], sheet)
    save(average, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="of training in all, resumed time included")
    parser.add_argument("--anchor", type=Path, help="an autoencoder's folder")
    parser.add_argument("--channels", type=int, default=10)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=Path, default=pool.POOL)
    parser.add_argument("--work", type=Path, default=Path(".cache/autoencoder"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    anchor = AutoencoderTiny.from_pretrained(args.anchor).float().eval() if args.anchor else None
    encoder_width = anchor.config.encoder_block_out_channels[0] if anchor else args.width
    model = build(args.channels, args.width, encoder_width).to(memory_format=torch.channels_last)
    if anchor:
        begin_with(model, anchor)
    average = build(args.channels, args.width, encoder_width)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99))
    parts = {"model": model, "average": average, "optimizer": optimizer}
    chunks, check = pool.ready(args.pool), fresh()
    images = pool.images(args.pool, chunks)
    held = targets(anchor, images, args.work / "anchor", chunks) if anchor else None
    run = Progress(args.work / "state.pt", parts, args.minutes)
    for step in run:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 100) * min(1, max(0.01, 1.8 * (1 - run.share)))
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        pick = torch.randint(len(images), (BATCH,), generator=rng)
        terms = step_loss(model, images[pick].float() / 255, None if held is None else held[pick], rng)
        loss = sum(WEIGHTS[name] * value for name, value in terms.items())
        descend(loss, model, optimizer)
        follow(average, model, step)
        run.log(terms)
        if step % 1000 == 0:
            print(f"step {step} fresh {fidelity(average.eval(), check)}", flush=True)
            save(average, args.work / "vae")
    finish(run, average, check, args.work / "vae", args.work / "grid.png")


if __name__ == "__main__":
    main()
