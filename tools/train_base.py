"""Train the embedded base model: a rectified flow on autoencoder latents, saved as a diffusers folder.

    python tools/pool.py --chunks 30
    python tools/train_base.py [--minutes 120] [--vae .cache/autoencoder/vae] [--init src/palate/assets/emoji]

UNet2DConditionModel 64/160, two transformer blocks at each place of attention, with a CLIPTextModel and a word-level
tokenizer, all trained together. Latents of the pool are made once. State is saved every five minutes; the same command
resumes, and --minutes counts in all.

--init FOLDER begins with that model's weights. It may know fewer words, read shorter captions, have fewer transformer
blocks, and fewer latent channels if the autoencoder's first channels are its own (`train_autoencoder.py --anchor`):
what it lacks begins anew, new blocks without effect.

Noise levels: sigmoid(N(0, 1)), and a share (--noisy) evenly from .8 to 1. Where a drawing stands, and how many there
are, is decided there, where the first law alone has 1.4 % of its levels above .9: a model of 20,000 steps of it gives
"at the left" and "at the right" the same image, to a hundredth of its side, from every noise.

For such words the network has to know where a cell is, and only the zeros beside the image tell it; in 26,000 steps it
did not find out. So each attention is taught it (--place): from what its queries are made of, a linear map has to tell
the cell's column and row. The maps are no part of the model.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pool
import torch
from base_folder import save
from data import held_out_pairs
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast
from words import LENGTH, build_tokenizer, tokenize

BATCH, EMA, DROP = 32, 0.9995, 0.1


def build_text_encoder(words: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=128,
            intermediate_size=384,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
        )
    )


def build_unet(channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        transformer_layers_per_block=2,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def begin_with(networks: torch.nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Give the networks the weights of the model in `folder`, word by word and channel by channel where it has fewer.

    New input channels begin without effect; new words begin at the mean of the old ones, new places at the last one.
    """
    old = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    own = networks["unet"].state_dict()
    for name in own.keys() - old.keys():  # a block adds to what comes in; its last layers add nothing at first
        if re.search(r"(to_out\.0|ff\.net\.2)\.(weight|bias)$", name):
            own[name].zero_()
    for name, value in old.items():
        if name == "conv_in.weight":
            own[name].zero_()
        own[name][tuple(slice(side) for side in value.shape)] = value.float()
    networks["unet"].load_state_dict(own)

    old = load_file(folder / "text_encoder/model.safetensors")
    known = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    own = networks["text_encoder"].state_dict()
    for name, value in old.items():
        value = value.float()
        if name.endswith("token_embedding.weight"):
            spread = own[name] - own[name].mean(0)
            own[name] = value.mean(0) + spread * value.std() / spread.std() * 0.5
            for word, k in tokenizer.get_vocab().items():
                if word in known:
                    own[name][k] = value[known[word]]
        elif name.endswith("position_embedding.weight"):
            own[name] = torch.cat([value, value[-1:].expand(len(own[name]) - len(value), -1)])
        else:
            own[name] = value
    networks["text_encoder"].load_state_dict(own)


@torch.no_grad()
def latents(vae: AutoencoderTiny, tokenizer, folder: Path, chunks: Sequence[int], cache: Path) -> dict[str, Tensor]:
    """Latents (float16) and token ids of the pool's images, without the held-out pairs; kept on disk per chunk."""
    cache.mkdir(parents=True, exist_ok=True)
    held_out, found = held_out_pairs(), []
    vae = vae.to(memory_format=torch.channels_last)
    for chunk in chunks:
        if not (path := cache / f"latents-{chunk}.safetensors").exists():
            scenes = pool.scenes(folder, [chunk])
            rows = [
                k for k, scene in enumerate(scenes) if not held_out & {(t.concept, scene.style) for t in scene.things}
            ]
            images = pool.images(folder, [chunk])[rows]
            with torch.autocast("cpu", torch.bfloat16):
                parts = [vae.encode(_signed(part)).latents.half().contiguous() for part in images.split(100)]
            ids = tokenize(tokenizer, [scenes[k].caption for k in rows])
            pool.keep(path, {"latents": torch.cat(parts), "ids": ids})
        found.append(load_file(path))
    return {name: torch.cat([part[name] for part in found]) for name in ("latents", "ids")}


class Places(torch.nn.Module):
    """For every attention of the UNet, a linear map from its normalised input to each cell's column and row."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        norms = [part for name, part in unet.named_modules() if re.search(r"attentions\.\d+\.norm$", name)]
        self.maps = torch.nn.ModuleList(torch.nn.Conv2d(part.num_channels, 2, 1) for part in norms)
        self.seen: dict[int, Tensor] = {}
        for k, part in enumerate(norms):
            torch.nn.init.zeros_(self.maps[k].weight)
            torch.nn.init.zeros_(self.maps[k].bias)
            part.register_forward_hook(lambda _, __, out, k=k: self.seen.update({k: out}))

    def loss(self) -> Tensor:
        """Mean squared error of the last forward's cells, in units of half the image's side."""
        total = torch.zeros(())
        for k, told in enumerate(self.maps):
            rows, columns = (torch.linspace(-1, 1, side) for side in self.seen[k].shape[2:])
            goal = torch.stack([columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))])
            total = total + (told(self.seen[k]).float() - goal).square().mean()
        return total / len(self.maps)


def _signed(images: Tensor) -> Tensor:
    """uint8 to [-1, 1], in the memory format in which the convolutions are fast."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=120, help="of training in all, resumed time included")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--noisy", type=float, default=0.25, help="share of the levels that are drawn from .8 to 1")
    parser.add_argument("--place", type=float, default=0.2, help="weight of telling each cell's column and row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=Path, default=pool.POOL)
    parser.add_argument("--chunks", type=int, help="of the pool, 2,000 images each; all if left out")
    parser.add_argument("--vae", type=Path, default=Path(".cache/autoencoder/vae"))
    parser.add_argument("--init", type=Path, help="a model folder to start from, as src/palate/assets/emoji")
    parser.add_argument("--work", type=Path, default=Path(".cache/base"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    vae = AutoencoderTiny.from_pretrained(args.vae).eval()
    tokenizer = build_tokenizer()
    networks = torch.nn.ModuleDict(
        {"unet": build_unet(vae.config.latent_channels), "text_encoder": build_text_encoder(len(tokenizer))}
    )
    networks["unet"].set_attn_processor(AttnProcessor())  # torch's fused attention is slow backwards on a CPU
    if args.init:
        begin_with(networks, tokenizer, args.init)
    ema = {name: p.detach().clone() for name, p in networks.named_parameters()}
    optimizer = torch.optim.AdamW(networks.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    places = Places(networks["unet"])  # learnt anew by every command, in some hundred steps
    place_optimizer = torch.optim.AdamW(places.parameters(), lr=3e-3)
    step, spent, told = 0, 0.0, []
    if (args.work / "state.pt").exists():
        state = torch.load(args.work / "state.pt", weights_only=True)
        networks.load_state_dict(state["networks"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
    chunks = pool.ready(args.pool)[: args.chunks]
    data = latents(vae, tokenizer, args.pool, chunks, args.work / "latents")
    empty, losses = tokenize(tokenizer, [""])[0], []
    start, saved = time.time() - spent, time.time()

    def keep() -> None:
        parts = {"networks": networks.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
        torch.save(parts | {"step": step, "spent": time.time() - start}, args.work / "state.new")
        (args.work / "state.new").rename(args.work / "state.pt")

    while (spent := time.time() - start) < args.minutes * 60:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 200) * min(1, max(0.02, 2.5 * (1 - spent / 60 / args.minutes)))
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        pick = torch.randint(len(data["ids"]), (BATCH,), generator=rng)
        x0, ids = data["latents"][pick].float(), data["ids"][pick]
        ids = torch.where((torch.rand(BATCH, generator=rng) < DROP)[:, None], empty, ids)
        t = torch.sigmoid(torch.randn(BATCH, generator=rng))
        eps = torch.randn(x0.shape, generator=rng)
        noisy = torch.rand(BATCH, generator=rng) < args.noisy
        t = torch.where(noisy, 1 - 0.2 * torch.rand(BATCH, generator=rng), t)
        xt = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            cond = networks["text_encoder"](ids).last_hidden_state
            v = networks["unet"](xt, t * 1000, cond).sample
            place = places.loss()
        loss = (v.float() - (eps - x0)).square().mean()
        optimizer.zero_grad()
        place_optimizer.zero_grad()
        (loss + args.place * place).backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        place_optimizer.step()
        with torch.no_grad():
            decay = min(EMA, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), list(networks.parameters()), 1 - decay)
        losses.append(loss.item())
        told.append(place.item())
        if step % 100 == 0:
            means = f"loss {np.mean(losses[-100:]):.4f} place {np.mean(told[-100:]):.4f}"
            print(f"step {step} {spent / 60:.1f} min {means}", flush=True)
        if time.time() - saved > 300:
            keep()
            saved = time.time()
        if step % 1000 == 0:
            save(networks, ema, tokenizer, vae, args.vae, args.work)
    keep()
    save(networks, ema, tokenizer, vae, args.vae, args.work)
    print(f"{step} steps of {BATCH}, {spent / 60:.1f} minutes")


if __name__ == "__main__":
    main()
