"""Train the embedded base model: a rectified flow on autoencoder latents, saved as a diffusers folder.

    python tools/train_base.py [--minutes 55] [--seed 0] [--vae .cache/autoencoder/vae]

UNet2DConditionModel 64/160 with a CLIPTextModel and a word-level tokenizer, all trained together. Latents of a pool of
compositions are made once. State is saved every 500 steps; the same command resumes, and --minutes counts in all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from data import compose, held_out_pairs, load_sprites, save_grid
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from palate.models.vocabulary import MAX_WORDS, known_words, vocabulary

LENGTH = MAX_WORDS + 2
BATCH, LR, EMA, DROP = 32, 6e-4, 0.999, 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<start>", "<unk>", "<end>", *vocabulary().words]  # id 2 as end means another thing to CLIP
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


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


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=6,
        out_channels=6,
        block_out_channels=(64, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> torch.Tensor:
    lines = [" ".join(known_words(prompt)) for prompt in prompts]
    return tokenizer(lines, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids


@torch.no_grad()
def build_pool(vae: AutoencoderTiny, tokenizer: PreTrainedTokenizerFast, count: int, seed: int, path: Path) -> dict:
    """`count` latents (float16) and their token ids, cached on disk."""
    if path.exists():
        return load_file(path)
    sprites, latents, ids = load_sprites(), [], []
    for chunk in range(count // 200):
        batch = compose(np.random.default_rng((seed, 1, chunk)), sprites, 200, exclude=held_out_pairs())
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(batch.images * 2 - 1).latents.half())
        ids.append(tokenize(tokenizer, batch.captions))
    pool = {"latents": torch.cat(latents), "ids": torch.cat(ids)}
    save_file(pool, path)
    return pool


@torch.no_grad()
def preview(unet, text_encoder, tokenizer, vae, path: Path, guidance: float = 3.0, steps: int = 12) -> None:
    prompts = [
        f"{style} {concept} on a {colour} background"
        for concept, colour in [
            ("dog", "blue"),
            ("apple", "white"),
            ("rocket", "yellow"),
            ("octopus", "green"),
            ("tiger", "gray"),
            ("cupcake", "pink"),
        ]
        for style in vocabulary().styles
    ] + ["a cat", "a rose", "a large car"] * 3
    noise = torch.randn(len(prompts), 6, 16, 16, generator=torch.Generator().manual_seed(1))
    cond = text_encoder(tokenize(tokenizer, [*prompts, ""])).last_hidden_state
    cond, null = cond[:-1], cond[-1:].expand(len(prompts), -1, -1)
    x = noise
    for t, s in zip(torch.linspace(1, 0, steps + 1)[:-1], torch.linspace(1, 0, steps + 1)[1:], strict=True):
        u, c = unet(torch.cat([x, x]), t * 1000, torch.cat([null, cond])).sample.chunk(2)
        x = x + (s - t) * (u + guidance * (c - u))
    save_grid(vae.decode(x).sample.add(1).div(2).clamp(0, 1), path, columns=12, zoom=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=55, help="of training in all, resumed time included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=48_000)
    parser.add_argument("--vae", type=Path, default=Path(".cache/autoencoder/vae"))
    parser.add_argument("--init", type=Path, help="a model folder to start from, as src/palate/assets/emoji")
    parser.add_argument("--work", type=Path, default=Path(".cache/base"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    vae = AutoencoderTiny.from_pretrained(args.vae).eval()
    tokenizer = build_tokenizer()
    pool = build_pool(vae, tokenizer, args.pool, args.seed, args.work / "pool.safetensors")
    networks = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(len(tokenizer))})
    if args.init:
        networks["unet"].load_state_dict(load_file(args.init / "unet/diffusion_pytorch_model.safetensors"))
        networks["text_encoder"].load_state_dict(load_file(args.init / "text_encoder/model.safetensors"))
    ema = {name: p.detach().clone() for name, p in networks.named_parameters()}
    optimizer = torch.optim.AdamW(networks.parameters(), lr=LR, weight_decay=0.01, fused=True)
    step, spent = 0, 0.0
    if (args.work / "state.pt").exists():
        state = torch.load(args.work / "state.pt", weights_only=True)
        networks.load_state_dict(state["networks"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
    null = tokenize(tokenizer, [""])
    empty, start, losses = null[0], time.time() - spent, []

    def save(folder: Path) -> None:
        raw = {name: p.detach().clone() for name, p in networks.named_parameters()}
        with torch.no_grad():
            for name, p in networks.named_parameters():
                p.copy_(ema[name])
        networks["unet"].half().save_pretrained(folder / "unet")
        networks["text_encoder"].half().save_pretrained(folder / "text_encoder")
        networks.float()
        shutil.copytree(args.vae, folder / "vae", dirs_exist_ok=True)
        tokenizer.save_pretrained(folder / "tokenizer")
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(
            json.dumps(
                {
                    "_class_name": "StableDiffusionPipeline",
                    "_diffusers_version": "0.42.1",
                    "vae": ["diffusers", "AutoencoderTiny"],
                    "unet": ["diffusers", "UNet2DConditionModel"],
                    "text_encoder": ["transformers", "CLIPTextModel"],
                    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
                    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                    "safety_checker": [None, None],
                    "feature_extractor": [None, None],
                    "image_encoder": [None, None],
                    "requires_safety_checker": False,
                },
                indent=1,
            )
            + "\n"
        )
        preview(networks["unet"], networks["text_encoder"], tokenizer, vae, args.work / "grid.png")
        with torch.no_grad():
            for name, p in networks.named_parameters():
                p.copy_(raw[name])

    while (spent := time.time() - start) < args.minutes * 60:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, step / 200) * min(1, max(0.02, 2.5 * (1 - spent / 60 / args.minutes)))
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        pick = torch.randint(len(pool["ids"]), (BATCH,), generator=rng)
        x0, ids = pool["latents"][pick].float(), pool["ids"][pick]
        ids = torch.where((torch.rand(BATCH, generator=rng) < DROP)[:, None], empty, ids)
        t = torch.sigmoid(torch.randn(BATCH, generator=rng))
        eps = torch.randn(x0.shape, generator=rng)
        xt = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
        with torch.autocast("cpu", torch.bfloat16):
            cond = networks["text_encoder"](ids).last_hidden_state
            v = networks["unet"](xt, t * 1000, cond).sample
        loss = (v.float() - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(EMA, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), list(networks.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step} {spent / 60:.1f} min loss {np.mean(losses[-100:]):.4f}", flush=True)
        if step % 500 == 0:
            torch.save(
                {
                    "networks": networks.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "ema": ema,
                    "step": step,
                    "spent": time.time() - start,
                },
                args.work / "state.pt",
            )
        if step % 1000 == 0:
            save(args.work / "model")
    save(args.work / "model")
    print(f"{step} steps of {BATCH}, {spent / 60:.1f} minutes")


if __name__ == "__main__":
    main()
