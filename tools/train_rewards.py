"""Train the embedded rewards and the judge on compositions.

    python tools/train_rewards.py emoji | heldout | judge [--minutes 20] [--seed 1]

emoji    a transformers CLIPModel (ViT and causal text tower): the reward that runs optimise
heldout  a VisionTextDualEncoderModel (Swin and BERT): never optimised, another architecture, data order and seed
judge    a ResNetForImageClassification: names concept and style

Contrastive loss (InfoNCE) with four hard negatives per image: its caption with a wrong style, background or concept,
and with something else that is wrong (`shown.wrong`). With --negatives (tools/build_negatives.py) a fifth of each batch
are pairs as well: a caption, a real image that fulfils it, and a sample that was made for it; the real one has to score
higher. Captions that are true of another image of the batch are no negatives of it. Images are blurred, noised and
passed through the autoencoder at random, so that a score does not hang on pixels that no sampler makes; half of each
batch is composed afresh and all of it moved and mirrored (`shown.varied`, `jittered`), so that no pool is known by
heart. The same command resumes, and --minutes counts in all.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pool
import torch
import torch.nn.functional as F
from data import ASSETS, Atlas, Composer
from progress import Progress
from safetensors.torch import load_file
from shown import MEAN, STD, Shown, true_of, varied, weather, weathered, wrong
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from words import LENGTH, build_tokenizer, tokenize

from palate.models.vocabulary import vocabulary

WRONG = ("style", "background", "concept", "detail")  # what `shown.wrong` makes wrong, in its order


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


def begin_with(model: torch.nn.Module, folder: Path, tokenizer) -> None:
    """Take over the weights of a reward of the same shape, which may know other words and fewer places: those that
    both know are taken, the others stay as they are."""
    earlier = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in type(model).from_pretrained(folder, dtype=torch.float32).state_dict().items():
        if name.endswith(("word_embeddings.weight", "token_embedding.weight")):
            for word, row in tokenizer.get_vocab().items():
                if word in earlier:
                    own[name][row] = value[earlier[word]]
        elif name.endswith(("position_embeddings.weight", "position_embedding.weight")):
            own[name][: len(value)] = value
        else:
            own[name] = value
    model.load_state_dict(own)


def features(model: torch.nn.Module, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    image = model.get_image_features(pixel_values=pixels).pooler_output
    text = model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
    return F.normalize(image.float().flatten(1), dim=-1), F.normalize(text.float(), dim=-1)


def contrastive(model, shown: Shown, pixels: Tensor, tokenizer, rng: np.random.Generator) -> tuple[Tensor, dict]:
    """InfoNCE in both directions, each image against its batch's captions and four wrong ones of every image."""
    captions, count = [scene.caption for scene in shown.scenes], len(shown.scenes)
    lies = [wrong(scene, rng) for scene in shown.scenes]
    texts = captions + [row[kind] for kind in range(len(WRONG)) for row in lies]
    image, text = features(model, pixels, tokenize(tokenizer, texts))
    logits = model.logit_scale.clamp(max=math.log(50)).exp() * image @ text.T
    own = torch.arange(count)
    also_true = true_of(texts, shown)
    also_true[own, own] = False
    for kind in range(1, len(WRONG) + 1):
        also_true[own, kind * count + own] = False
    masked = logits.masked_fill(also_true, -torch.inf)
    loss = (F.cross_entropy(masked, own) + F.cross_entropy(masked[:, :count].T, own)) / 2
    with torch.no_grad():
        right = {
            name: (logits[own, own] > logits[own, (kind + 1) * count + own]).float().mean()
            for kind, name in enumerate(WRONG)
        }
        return loss, {"top1": (masked.argmax(1) == own).float().mean()} | right


class Rivals(NamedTuple):
    """Samples that a reward must not like, beside real images of what their captions ask for."""

    images: Tensor  # (N, 3, 64, 64) uint8
    captions: list[str]
    fulfilling: list[Tensor]  # for each, rows of the pool that show its caption

    @classmethod
    def load(cls, path: Path, shown: Shown, first: int) -> Rivals:
        images, captions = load_file(path)["images"], json.loads(path.with_suffix(".json").read_text())
        rows = [first + row.nonzero()[:, 0] for row in true_of(captions, shown).T[:, first:]]
        usable = [k for k, found in enumerate(rows) if len(found)]
        return cls(images[usable], [captions[k] for k in usable], [rows[k] for k in usable])

    def draw(self, shown: Shown, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """(real, sampled) images in [0, 1] and their captions; both weathered alike."""
        chosen = rng.integers(len(self.captions), size=count)
        real = shown.images[[int(rng.choice(self.fulfilling[k])) for k in chosen]].float() / 255
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


def jittered(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Each image turned by up to 15 degrees, scaled by .8 to 1.2, moved by up to an eighth of a side, half of them
    mirrored: what names neither the concept nor the style. What comes in at the border repeats it."""
    count = len(pixels)
    angle, scale = rng.uniform(-0.26, 0.26, count), rng.uniform(0.8, 1.2, count)
    mirror, (x, y) = rng.choice([-1.0, 1.0], count), rng.uniform(-0.25, 0.25, (2, count))
    rows = [
        [scale * mirror * np.cos(angle), -scale * np.sin(angle), x],
        [scale * mirror * np.sin(angle), scale * np.cos(angle), y],
    ]
    theta = torch.from_numpy(np.array(rows)).permute(2, 0, 1).to(pixels)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def classify(model, shown: Shown, pixels: Tensor) -> tuple[Tensor, dict]:
    """Cross-entropy of concept (where the scene has one) and style."""
    logits = model(pixels).logits
    concepts = len(vocabulary().concepts)
    one = torch.tensor([scene.kind != "two" for scene in shown.scenes])
    loss = F.cross_entropy(logits[one, :concepts], shown.concept[one])
    loss = loss + F.cross_entropy(logits[:, concepts:], shown.style)
    return loss, {
        "concept": (logits[one, :concepts].argmax(1) == shown.concept[one]).float().mean(),
        "style": (logits[:, concepts:].argmax(1) == shown.style).float().mean(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=["emoji", "heldout", "judge"])
    parser.add_argument("--minutes", type=float, default=20, help="of training in all, resumed time included")
    parser.add_argument("--chunks", type=int, help="of the pool, 2,000 images each; all if left out")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pool", type=Path, default=pool.POOL)
    parser.add_argument("--vae", type=Path, default=Path(".cache/autoencoder/vae"))
    parser.add_argument("--negatives", type=Path, help="of build_negatives.py; for the reward emoji")
    parser.add_argument("--init", type=Path, help="a reward folder to start from, of this or of an earlier vocabulary")
    parser.add_argument("--work", type=Path, default=Path(".cache/rewards"))
    parser.add_argument("--assets", type=Path, default=ASSETS)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    shown = weathered(args.pool, pool.ready(args.pool)[: args.chunks], args.vae, args.work / "weathered")
    composer = Composer(Atlas.load())
    held_out = 1000  # of the pool, for the figures at the end
    rivals = Rivals.load(args.negatives, shown, held_out) if args.negatives else None
    model = build(args.which, len(tokenizer)).train()
    if args.init:
        begin_with(model, args.init, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.02)
    run = Progress(args.work / f"{args.which}.pt", {"model": model, "optimizer": optimizer}, args.minutes)

    def evaluate(part: Shown, step: int) -> tuple[Tensor, dict]:
        pixels = (part.images.float() / 255 - MEAN) / STD
        if args.which == "judge":
            if model.training:
                pixels = jittered(pixels, np.random.default_rng((args.seed, 4, step)))
            return classify(model, part, pixels)
        return contrastive(model, part, pixels, tokenizer, np.random.default_rng((args.seed, 3, step)))

    for step in run:
        order = np.random.default_rng((args.seed, 2, step))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 100) * (0.51 + 0.49 * math.cos(math.pi * run.share))
        part = shown.take(order.integers(held_out, len(shown.scenes), args.batch - args.batch // 2))
        part = part.with_fresh(composer, args.batch // 2, order)
        part = part if args.which == "judge" else varied(part, order)
        # torch's fused attention is slow backwards under bfloat16 on a CPU
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss, metrics = evaluate(part, step)
            if rivals:
                against, told = rivalry(model, *rivals.draw(shown, args.batch // 4, order), tokenizer)
                loss, metrics = loss + against, metrics | told
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log({"loss": loss} | metrics)
    model.eval()
    with torch.no_grad():
        totals = [evaluate(shown.take(range(k, k + 100)), k)[1] for k in range(0, held_out, 100)]
    print("held-out", {name: round(float(np.mean([t[name] for t in totals])), 4) for name in totals[0]})
    folder = args.assets / ("judge" if args.which == "judge" else f"reward-{args.which}")
    model.half().save_pretrained(folder)
    if args.which != "judge":
        tokenizer.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {run.step} steps -> {folder}")


if __name__ == "__main__":
    main()
