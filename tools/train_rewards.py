"""Train the embedded rewards and the judge on composed sprites.

    python tools/train_rewards.py emoji | heldout | judge [--steps 1500] [--seed 1]

emoji    a transformers CLIPModel (ViT and causal text tower): the reward that runs optimise
heldout  a VisionTextDualEncoderModel (Swin and BERT): never optimised, another architecture, data order and seed
judge    a ResNetForImageClassification: names concept and style

Contrastive loss (InfoNCE) with two hard negatives an image: its caption with a wrong style, and with a wrong
background. With --negatives (tools/build_negatives.py) a fifth of each batch are pairs as well: a caption, a real
image that fulfils it, and a sample that was made for it; the real one has to score higher. Captions that are true of
another image of the batch are no negatives of it. Images are blurred, noised and passed through the autoencoder at
random, so that a score does not hang on pixels that no sampler makes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data import ASSETS, Samples, compose, load_sprites
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_base import LENGTH, build_tokenizer, tokenize
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from palate.models.vocabulary import Caption, parse_prompt, vocabulary

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)


def build(which: str, words: int) -> torch.nn.Module:
    vocab = vocabulary()
    if which == "emoji":
        text = CLIPTextConfig(
            vocab_size=words,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
        )
        vision = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            hidden_act="gelu",
        )
        return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=96))
    if which == "heldout":
        text = BertConfig(
            vocab_size=words,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        vision = SwinConfig(
            image_size=64,
            patch_size=4,
            embed_dim=48,
            depths=[1, 2, 1],
            num_heads=[3, 4, 6],
            window_size=4,
            mlp_ratio=3.0,
            drop_path_rate=0.0,
        )
        config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=96)
        return VisionTextDualEncoderModel(config, SwinModel(vision), BertModel(text))
    labels = [*vocab.concepts, *vocab.styles]
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[48, 96, 160],
            depths=[1, 1, 1],
            layer_type="basic",
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: k for k, label in enumerate(labels)},
        )
    )


def weather(images: Tensor, generator: torch.Generator, vae: AutoencoderTiny | None) -> Tensor:
    """Images as samplers may leave them: a third decoded, a third blurred, a third noisy, in all combinations."""

    def some(share: float) -> Tensor:
        return (torch.rand(len(images), 1, 1, 1, generator=generator) < share).float()

    if vae is not None:
        part = len(images) // 3
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images[:part] * 2 - 1).latents.float()
            latents = latents + 0.2 * torch.rand(part, 1, 1, 1, generator=generator) * torch.randn(
                latents.shape, generator=generator
            )
            decoded = vae.decode(latents).sample.float().add(1).div(2).clamp(0, 1)
        images = torch.cat([decoded, images[part:]])
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, some(0.33) * torch.rand(len(images), 1, 1, 1, generator=generator))
    noise = 0.12 * torch.rand(len(images), 1, 1, 1, generator=generator) * some(0.33)
    return (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def build_pool(count: int, vae_folder: Path, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """`count` weathered images (uint8), what they show, and their captions; made once and kept beside `path`."""
    captions_path = path.with_suffix(".json")
    if not captions_path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sprites, vae, parts, captions = load_sprites(), AutoencoderTiny.from_pretrained(vae_folder).eval(), [], []
        generator = torch.Generator().manual_seed(0)
        for chunk in range(count // 120):
            samples = compose(np.random.default_rng((11, chunk)), sprites, 120)
            images = weather(samples.images, generator, vae).mul(255).round().byte()
            parts.append((images, samples.concept, samples.style, samples.colour))
            captions += samples.captions
        pool = {
            name: torch.cat([part[k] for part in parts])
            for k, name in enumerate(("images", "concept", "style", "colour"))
        }
        save_file(pool, path)
        captions_path.write_text(json.dumps(captions))
    return load_file(path), json.loads(captions_path.read_text())


def draw(pool: dict[str, Tensor], captions: list[str], rows: np.ndarray) -> Samples:
    return Samples(
        pool["images"][rows].float() / 255,
        [captions[k] for k in rows],
        pool["concept"][rows],
        pool["style"][rows],
        pool["colour"][rows],
    )


def true_of(captions: list[Caption], samples: Samples) -> Tensor:
    """(images, captions) bool: every thing the caption names is so in the image."""
    vocab = vocabulary()
    colours = list(vocab.colours)
    concept = torch.tensor([vocab.concepts.index(c.concept) for c in captions])
    style = torch.tensor([vocab.styles.index(c.style) if c.style else -1 for c in captions])
    colour = torch.tensor([colours.index(c.background) if c.background else -1 for c in captions])
    return (
        (samples.concept[:, None] == concept)
        & ((style == -1) | (samples.style[:, None] == style))
        & ((colour == -1) | (samples.colour[:, None] == colour))
    )


def hard_negatives(caption: str, rng: np.random.Generator) -> list[str]:
    """The caption with a wrong style, and with a wrong background."""
    vocab, seen = vocabulary(), parse_prompt(caption)
    wrong_style = str(rng.choice([s for s in vocab.styles if s != seen.style]))
    wrong_colour = str(rng.choice([c for c in vocab.colours if c != seen.background]))
    first = caption.replace(seen.style, wrong_style) if seen.style else f"{wrong_style}. {caption}"
    second = (
        caption.replace(f"on a {seen.background}", f"on a {wrong_colour}").replace(
            f"on {seen.background}", f"on {wrong_colour}"
        )
        if seen.background
        else f"{caption} on a {wrong_colour} background"
    )
    return [first, second]


def features(model: torch.nn.Module, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    image = model.get_image_features(pixel_values=pixels).pooler_output
    text = model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
    return F.normalize(image.float().flatten(1), dim=-1), F.normalize(text.float(), dim=-1)


def contrastive(model, samples: Samples, pixels: Tensor, tokenizer, rng: np.random.Generator) -> tuple[Tensor, dict]:
    wrong = [hard_negatives(c, rng) for c in samples.captions]
    texts = samples.captions + [w[0] for w in wrong] + [w[1] for w in wrong]
    image, text = features(model, pixels, tokenize(tokenizer, texts))
    logits = model.logit_scale.clamp(max=math.log(50)).exp() * image @ text.T
    count = len(samples.captions)
    also_true = true_of([parse_prompt(c) for c in texts], samples)
    also_true[torch.arange(count), torch.arange(count)] = False
    logits = logits.masked_fill(also_true, -torch.inf)
    target = torch.arange(count)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2
    own = logits[target, target]
    named = torch.tensor([parse_prompt(c).style is not None for c in samples.captions])
    return loss, {
        "top1": (logits.argmax(1) == target).float().mean(),
        "style": (own > logits[target, count + target])[named].float().mean(),
        "background": (own > logits[target, 2 * count + target]).float().mean(),
    }


class Rivals(NamedTuple):
    """Samples that a reward must not like, beside real images of what their captions ask for."""

    images: Tensor  # (N, 3, 64, 64) uint8
    captions: list[str]
    fulfilling: list[Tensor]  # for each, rows of the pool that show its caption

    @classmethod
    def load(cls, path: Path, pool: dict[str, Tensor], first: int) -> Rivals:
        images, captions = load_file(path)["images"], json.loads(path.with_suffix(".json").read_text())
        real = Samples(pool["images"], [], pool["concept"], pool["style"], pool["colour"])
        rows = [first + row.nonzero()[:, 0] for row in true_of([parse_prompt(c) for c in captions], real).T[:, first:]]
        usable = [k for k, found in enumerate(rows) if len(found)]
        return cls(images[usable], [captions[k] for k in usable], [rows[k] for k in usable])

    def draw(self, pool: dict[str, Tensor], count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """(real, sampled) images in [0, 1] and their captions; both weathered alike."""
        chosen = rng.integers(len(self.captions), size=count)
        real = pool["images"][[int(rng.choice(self.fulfilling[k])) for k in chosen]].float() / 255
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        sampled = weather(self.images[chosen].float() / 255, generator, None)
        return real, sampled, [self.captions[k] for k in chosen]


def rivalry(model, real: Tensor, sampled: Tensor, captions: list[str], tokenizer) -> tuple[Tensor, dict]:
    """Cross-entropy of telling the real image from the sampled one, by their scores against the caption."""
    pixels = (torch.cat([real, sampled]) - MEAN) / STD
    image, text = features(model, pixels, tokenize(tokenizer, captions))
    scores = (image.unflatten(0, (2, -1)) * text).sum(-1).T
    loss = F.cross_entropy(
        model.logit_scale.clamp(max=math.log(50)).exp() * scores, torch.zeros(len(captions), dtype=torch.long)
    )
    return loss, {"rival": (scores[:, 0] > scores[:, 1]).float().mean()}


def classify(model, samples: Samples, pixels: Tensor) -> tuple[Tensor, dict]:
    logits = model(pixels).logits
    concepts = len(vocabulary().concepts)
    loss = F.cross_entropy(logits[:, :concepts], samples.concept) + F.cross_entropy(logits[:, concepts:], samples.style)
    return loss, {
        "concept": (logits[:, :concepts].argmax(1) == samples.concept).float().mean(),
        "style": (logits[:, concepts:].argmax(1) == samples.style).float().mean(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=["emoji", "heldout", "judge"])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pool", type=int, default=20_400)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vae", type=Path, default=Path(".cache/autoencoder/vae"))
    parser.add_argument("--negatives", type=Path, help="of build_negatives.py; for the reward emoji")
    parser.add_argument("--init", type=Path, help="a reward folder to start from")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    pool, captions = build_pool(args.pool, args.vae, Path(".cache/rewards/pool.safetensors"))
    held_out = 1000  # of the pool, for the figures at the end
    order = np.random.default_rng((args.seed, 2))
    rivals = Rivals.load(args.negatives, pool, held_out) if args.negatives else None
    model = build(args.which, len(tokenizer)).train()
    if args.init:
        model.load_state_dict(load_file(args.init / "model.safetensors"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.02)
    start, log = time.time(), []

    def evaluate(samples: Samples, step: int) -> tuple[Tensor, dict]:
        pixels = (samples.images - MEAN) / STD
        if args.which == "judge":
            return classify(model, samples, pixels)
        return contrastive(model, samples, pixels, tokenizer, np.random.default_rng((args.seed, 3, step)))

    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 100) * (0.51 + 0.49 * math.cos(math.pi * step / args.steps))
        samples = draw(pool, captions, order.integers(held_out, len(captions), args.batch))
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = evaluate(samples, step)
            if rivals:
                against, told = rivalry(model, *rivals.draw(pool, args.batch // 4, order), tokenizer)
                loss, metrics = loss + against, metrics | told
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.append({name: value.item() for name, value in ({"loss": loss} | metrics).items()})
        if step % 25 == 0:
            recent = {name: round(float(np.mean([row[name] for row in log[-25:]])), 4) for name in log[-1]}
            print(f"step {step} {(time.time() - start) / 60:.1f} min {recent}", flush=True)
    model.eval()
    with torch.no_grad():
        totals = [evaluate(draw(pool, captions, np.arange(k, k + 100)), k)[1] for k in range(0, held_out, 100)]
    print("held-out", {name: round(float(np.mean([t[name] for t in totals])), 4) for name in totals[0]})
    folder = ASSETS / ("judge" if args.which == "judge" else f"reward-{args.which}")
    model.half().save_pretrained(folder)
    if args.which != "judge":
        tokenizer.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters -> {folder}")


if __name__ == "__main__":
    main()
