"""The published rewards: conversions against plain re-statements, preprocessing against PIL, gradients.

No weights are downloaded: tiny random networks of the real classes, and the real architectures on the meta device.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from palate.rewards import aesthetic, clip, hpsv3, image_reward
from palate.rewards.clip import ClipReward, from_open_clip, preprocess, vit_h_14
from palate.rewards.combine import score_pair
from palate.rewards.files import convert_command, weights_file
from palate.rewards.load import load_reward
from palate.rewards.published import PUBLISHED
from palate.runtime.errors import InputError

WORDS = ["<s>", "</s>", "[UNK]", "a", "red", "fox", "blue", "whale", "3d", "flat", "."]
PROMPTS = ["a red fox", "3d. a blue whale"]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_state(shapes, seed=0, scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator)
        + (1.0 if re.search(r"(ln|norm|LayerNorm)\w*\.weight$", name) else 0)
        for name, shape in shapes.items()
    }


def tokenizer_folder(folder, extra=()):
    """A word tokenizer in transformers' layout: <s> words </s>."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="[UNK]",
        additional_special_tokens=list(extra),
    )
    fast.save_pretrained(folder)
    return fast


def tokenize(prompts, length=8):
    ids = [[0, *(WORDS.index(w) for w in re.findall(r"\w+|\.", p)), 1] for p in prompts]
    return {"input_ids": torch.tensor([row + [1] * (length - len(row)) for row in ids])}


def close(got, expected, rel=1e-5):
    """Largest difference, relative to the largest value."""
    assert float((got - expected).abs().max() / expected.abs().max()) <= rel


# ------------------------------------------------------------------------- OpenCLIP's ViT, stated plainly

WIDTH, HEADS, LAYERS, PATCH, SIDE, TEXT, LENGTH, JOINT = 32, 4, 2, 4, 16, 24, 8, 12


def tiny_clip_config():
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": TEXT,
        "intermediate_size": 4 * TEXT,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "hidden_act": "gelu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=JOINT)


def open_clip_shapes(vision, text, layers, patch, side, vocabulary, length, joint):
    def tower(prefix, width, count):
        shapes = {}
        for i in range(count):
            block = f"{prefix}transformer.resblocks.{i}."
            shapes |= {block + n + k: (width,) for n in ("ln_1", "ln_2") for k in (".weight", ".bias")}
            shapes |= {
                block + "attn.in_proj_weight": (3 * width, width),
                block + "attn.in_proj_bias": (3 * width,),
                block + "attn.out_proj.weight": (width, width),
                block + "attn.out_proj.bias": (width,),
                block + "mlp.c_fc.weight": (4 * width, width),
                block + "mlp.c_fc.bias": (4 * width,),
                block + "mlp.c_proj.weight": (width, 4 * width),
                block + "mlp.c_proj.bias": (width,),
            }
        return shapes

    return {
        "positional_embedding": (length, text),
        "text_projection": (text, joint),
        "logit_scale": (),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": ((side // patch) ** 2 + 1, vision),
        "visual.proj": (vision, joint),
        "visual.conv1.weight": (vision, 3, patch, patch),
        **{f"visual.{n}.{k}": (vision,) for n in ("ln_pre", "ln_post") for k in ("weight", "bias")},
        **tower("visual.", vision, layers[0]),
        **tower("", text, layers[1]),
        "token_embedding.weight": (vocabulary, text),
        "ln_final.weight": (text,),
        "ln_final.bias": (text,),
    }


TINY = open_clip_shapes(WIDTH, TEXT, (LAYERS, LAYERS), PATCH, SIDE, len(WORDS), LENGTH, JOINT)


def blocks(x, state, prefix, heads, mask=None):
    """Pre-norm residual attention blocks on (B, N, D), with the packed q, k, v of nn.MultiheadAttention."""
    i = 0
    while f"{prefix}{i}.ln_1.weight" in state:
        w = {
            name.removeprefix(f"{prefix}{i}."): value
            for name, value in state.items()
            if name.startswith(f"{prefix}{i}.")
        }
        width = x.shape[-1]
        h = F.layer_norm(x, (width,), w["ln_1.weight"], w["ln_1.bias"])
        q, k, v = (
            F.linear(h, m, b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for m, b in zip(w["attn.in_proj_weight"].split(width), w["attn.in_proj_bias"].split(width), strict=False)
        )
        scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
        scores = scores if mask is None else scores + mask
        h = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(h, w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        h = F.layer_norm(x, (width,), w["ln_2.weight"], w["ln_2.bias"])
        x = x + F.linear(
            F.gelu(F.linear(h, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"])), w["mlp.c_proj.weight"], w["mlp.c_proj.bias"]
        )
        i += 1
    return x


def open_clip_image(state, pixels):
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, (WIDTH,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = blocks(x, state, "visual.transformer.resblocks.", HEADS)[:, 0]
    return F.normalize(
        F.layer_norm(x, (WIDTH,), state["visual.ln_post.weight"], state["visual.ln_post.bias"]) @ state["visual.proj"],
        dim=-1,
    )


def open_clip_text(state, ids):
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = blocks(x, state, "transformer.resblocks.", HEADS, torch.full((LENGTH, LENGTH), -math.inf).triu(1))
    x = F.layer_norm(x, (TEXT,), state["ln_final.weight"], state["ln_final.bias"])
    end = (ids == 1).int().argmax(1)
    return F.normalize(x[torch.arange(len(x)), end] @ state["text_projection"], dim=-1)


@pytest.fixture(scope="module")
def tiny():
    """(OpenCLIP's random tensors, the reward made of their conversion)."""
    state = random_state(TINY)
    model = CLIPModel(tiny_clip_config())
    model.load_state_dict(from_open_clip(state))
    return state, ClipReward(model, tokenize, image_size=SIDE)


def test_converted_open_clip_equals_its_plain_statement_forward_and_in_pixels(tiny):
    state, reward = tiny
    images = draw(2, 3, SIDE, SIDE).requires_grad_()
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (clip.MEAN, clip.STD))
    image = open_clip_image(state, (images - mean) / std)
    text = open_clip_text(state, tokenize(PROMPTS)["input_ids"])
    expected = (image * text).sum(1)
    got = reward(images, PROMPTS)
    close(reward.image_features(images).detach(), image.detach())
    close(torch.stack([reward._text(p) for p in PROMPTS]), text)
    close(got.detach(), expected.detach())
    close(*(torch.autograd.grad(value.sum(), images)[0] for value in (got, expected)))


def test_the_real_hpsv2_has_exactly_the_published_tensors():
    published = open_clip_shapes(1280, 1024, (32, 24), 14, 224, 49408, 77, 1024)
    assert sum(math.prod(shape) for shape in published.values()) == 986_109_441  # OpenCLIP's count for ViT-H-14
    with torch.device("meta"):
        converted = from_open_clip({name: torch.empty(shape) for name, shape in published.items()})
        own = CLIPModel(vit_h_14())
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in own.state_dict().items()}
    assert own.config.vision_config.hidden_act == own.config.text_config.hidden_act == "gelu"
    with pytest.raises(ValueError, match=r"visual.trunk.*OpenCLIP"):
        from_open_clip({"visual.trunk.x": torch.zeros(1)})


# ------------------------------------------------------------------------- preprocessing


def photograph(height, width, seed=0):
    """A smooth uint8 picture, inside the range, so that PIL's clipping has nothing to clip."""
    coarse = 0.15 + 0.7 * draw(1, 3, max(2, height // 16), max(2, width // 16), seed=seed)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]
    return (smooth * 255).round().byte().permute(1, 2, 0).numpy()


def as_tensor(array):
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)[None].float() / 255


SIZES = [(64, 64), (224, 224), (225, 301), (512, 768), (2048, 300), (333, 1000), (97, 64)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocessing_is_pils(size):
    array = photograph(*size)
    std = torch.tensor(clip.STD).view(3, 1, 1)
    reference = CLIPImageProcessorPil()(Image.fromarray(array), return_tensors="pt").pixel_values
    crop = preprocess(as_tensor(array), 224)
    assert float(((crop - reference) * std * 255).abs().max()) <= 2  # PIL rounds to whole grey levels, twice
    height, width = (max(1, round(side * 224 / max(size))) for side in size)
    canvas = Image.new("RGB", (224, 224))
    canvas.paste(
        Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC),
        ((224 - width) // 2, (224 - height) // 2),
    )
    pad = preprocess(as_tensor(array), 224, fit="pad")
    assert float(((pad - clip.normalised_pixels(as_tensor(canvas))) * std * 255).abs().max()) <= 2
    if size[0] == size[1]:
        assert torch.equal(crop, pad)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_gradient_of_preprocessing_and_of_the_reward(tiny, fit):
    state, _ = tiny
    model = CLIPModel(tiny_clip_config())
    model.load_state_dict(from_open_clip(state))
    reward = ClipReward(model.double(), tokenize, image_size=SIDE, fit=fit)
    images = draw(1, 3, 9, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, ["a fox"]), images, atol=1e-6, fast_mode=True)


# ------------------------------------------------------------------------- ImageReward's BLIP, stated plainly

BLIP_VISION = BlipVisionConfig(
    hidden_size=16,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
    layer_norm_eps=1e-6,
)
BLIP_TEXT = BlipTextConfig(
    vocab_size=len(WORDS),
    hidden_size=12,
    encoder_hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=40,
    is_decoder=True,
)


def image_reward_shapes(vision, layers, patch, side, text, text_layers, inner, vocabulary, length, head):
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, (side // patch) ** 2 + 1, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (vision,),
        "blip.visual_encoder.norm.weight": (vision,),
        "blip.visual_encoder.norm.bias": (vision,),
    }
    for i in range(layers):
        for name, shape in {
            "norm1": (vision,),
            "norm2": (vision,),
            "attn.qkv": (3 * vision, vision),
            "attn.proj": (vision, vision),
            "mlp.fc1": (4 * vision, vision),
            "mlp.fc2": (vision, 4 * vision),
        }.items():
            stem = f"blip.visual_encoder.blocks.{i}.{name}"
            shapes |= {stem + ".weight": shape, stem + ".bias": shape[:1]}
    stem = "blip.text_encoder."
    shapes |= {
        stem + "embeddings.word_embeddings.weight": (vocabulary, text),
        stem + "embeddings.position_embeddings.weight": (length, text),
        stem + "embeddings.LayerNorm.weight": (text,),
        stem + "embeddings.LayerNorm.bias": (text,),
        stem + "embeddings.position_ids": (1, length),
    }
    for i in range(text_layers):
        parts = {"intermediate.dense": (inner, text), "output.dense": (text, inner), "output.LayerNorm": (text,)}
        for attention, source in (("attention", text), ("crossattention", vision)):
            parts |= {
                f"{attention}.self.query": (text, text),
                f"{attention}.self.key": (text, source),
                f"{attention}.self.value": (text, source),
                f"{attention}.output.dense": (text, text),
                f"{attention}.output.LayerNorm": (text,),
            }
        for name, shape in parts.items():
            shapes |= {
                f"{stem}encoder.layer.{i}.{name}.weight": shape,
                f"{stem}encoder.layer.{i}.{name}.bias": shape[:1],
            }
    for n, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise(head), strict=False):
        shapes |= {f"mlp.layers.{n}.weight": (b, a), f"mlp.layers.{n}.bias": (b,)}
    return shapes | {"blip.vision_proj.weight": (4, vision)}


TINY_BLIP = image_reward_shapes(16, 2, 8, 16, 12, 2, 48, len(WORDS), 40, (12, 10, 8, 6, 4, 1))


def attention(q_in, kv_in, w, stem, heads, mask=None):
    q, k, v = (
        F.linear(x, w[f"{stem}.{n}.weight"], w[f"{stem}.{n}.bias"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for n, x in (("query", q_in), ("key", kv_in), ("value", kv_in))
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def plain_image_reward(state, pixels, ids, mask):
    """BLIP as its paper draws it: a pre-norm ViT; a post-norm BERT with cross-attention after each self-attention."""

    def layer(x, stem, norm=None):
        x = F.linear(x, state[stem + ".weight"], state[stem + ".bias"])
        return (
            x
            if norm is None
            else F.layer_norm(x + norm[1], x.shape[-1:], state[norm[0] + ".weight"], state[norm[0] + ".bias"], 1e-12)
        )

    def norm(x, stem):
        return F.layer_norm(x, x.shape[-1:], state[stem + ".weight"], state[stem + ".bias"], 1e-6)

    eye = "blip.visual_encoder."
    x = (
        F.conv2d(pixels, state[eye + "patch_embed.proj.weight"], state[eye + "patch_embed.proj.bias"], stride=8)
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat([state[eye + "cls_token"].expand(len(x), -1, -1), x], 1) + state[eye + "pos_embed"]
    for i in range(2):
        block = f"{eye}blocks.{i}."
        q, k, v = layer(norm(x, block + "norm1"), block + "attn.qkv").unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        h = ((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + layer(h, block + "attn.proj")
        x = x + layer(F.gelu(layer(norm(x, block + "norm2"), block + "mlp.fc1")), block + "mlp.fc2")
    seen = norm(x, eye + "norm")
    text = "blip.text_encoder."
    x = (
        state[text + "embeddings.word_embeddings.weight"][ids]
        + state[text + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    )
    x = F.layer_norm(
        x, x.shape[-1:], state[text + "embeddings.LayerNorm.weight"], state[text + "embeddings.LayerNorm.bias"], 1e-12
    )
    for i in range(2):
        block = f"{text}encoder.layer.{i}."
        for name, source, cover in (("attention", None, mask.bool()), ("crossattention", seen, None)):
            h = attention(x, x if source is None else source, state, f"{block}{name}.self", 3, cover)
            x = layer(h, f"{block}{name}.output.dense", (f"{block}{name}.output.LayerNorm", x))
        h = F.gelu(layer(x, block + "intermediate.dense"))
        x = layer(h, block + "output.dense", (block + "output.LayerNorm", x))
    x = x[:, 0]
    for n in (0, 2, 4, 6, 7):
        x = layer(x, f"mlp.layers.{n}")
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """(published-style random tensors, the folder they are saved in, the reward loaded from it)."""
    folder = tmp_path_factory.mktemp("image-reward")
    state = random_state(TINY_BLIP, scale=0.3)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(state, folder / "ImageReward.safetensors")
    tokenizer_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_reward, "blip_large", lambda: (BLIP_VISION, BLIP_TEXT))
        reward = image_reward.load_image_reward(str(folder))
    return state, folder, reward


def test_image_reward_equals_its_plain_statement_forward_and_in_pixels(blip):
    state, _, reward = blip
    images = draw(2, 3, 16, 16, seed=1).requires_grad_()
    ids = torch.full((2, image_reward.LENGTH), 1)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        words = tokenize([prompt])["input_ids"][0]
        count = len(re.findall(r"\w+|\.", prompt)) + 2
        ids[row, :count], mask[row, :count] = words[:count], 1
    expected = plain_image_reward(state, clip.normalised_pixels(images), ids, mask)
    got = reward(images, PROMPTS)
    close(got.detach(), expected.detach())
    close(*(torch.autograd.grad(value.sum(), images)[0] for value in (got, expected)))


def test_the_real_image_reward_has_exactly_the_published_tensors():
    published = image_reward_shapes(1024, 24, 16, 224, 768, 12, 3072, 30524, 512, (768, 1024, 128, 64, 16, 1))
    vision_config, text_config = image_reward.blip_large()
    with torch.device("meta"):
        vision, text, head = image_reward.split_checkpoint({n: torch.empty(s) for n, s in published.items()})
        own = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
    for converted, module in zip((vision, text), own, strict=False):
        assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in module.state_dict().items()}
    assert sorted(head) == sorted(f"layers.{n}.{k}" for n in (0, 2, 4, 6, 7) for k in ("weight", "bias"))
    assert text_config.num_attention_heads == 12 and vision_config.layer_norm_eps == 1e-6


# ------------------------------------------------------------------------- aesthetic


def aesthetic_head(width, inner=(10, 8, 6, 4)):
    """The published module: linear layers with dropout between, no activations."""
    sizes = [width, *inner, 1]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(
        layers[0], nn.Dropout(0.2), layers[1], nn.Dropout(0.2), layers[2], nn.Dropout(0.1), layers[3], layers[4]
    ).eval()


def test_aesthetic_head_is_one_affine_map_on_unit_embeddings(tiny):
    torch.manual_seed(0)
    head = aesthetic_head(JOINT)
    tower = CLIPVisionModelWithProjection(tiny_clip_config().vision_config)
    tower = CLIPVisionModelWithProjection(type(tower.config)(**{**tower.config.to_dict(), "projection_dim": JOINT}))
    reward = aesthetic.AestheticReward(
        tower, *aesthetic.affine_head({f"layers.{n}": t for n, t in head.state_dict().items()})
    )
    images = draw(3, 3, 20, 24).requires_grad_()
    features = tower(pixel_values=preprocess(images, SIDE)).image_embeds
    expected = head(features / features.norm(dim=-1, keepdim=True))[:, 0]
    got = reward(images, ["", "", ""])
    close(got.detach(), expected.detach())
    close(*(torch.autograd.grad(value.sum(), images)[0] for value in (got, expected)))
    published = aesthetic_head(768, (1024, 128, 64, 16))
    assert {n: tuple(t.shape) for n, t in published.state_dict().items()} == {
        "0.weight": (1024, 768),
        "0.bias": (1024,),
        "2.weight": (128, 1024),
        "2.bias": (128,),
        "4.weight": (64, 128),
        "4.bias": (64,),
        "6.weight": (16, 64),
        "6.bias": (16,),
        "7.weight": (1, 16),
        "7.bias": (1,),
    }


# ------------------------------------------------------------------------- HPSv3

HPS3_WORDS = ["<|vision_start|>", "<|image_pad|>", "<|Reward|>"]


def tiny_qwen():
    text = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=len(WORDS) + 1,
        vision_start_token_id=len(WORDS),
        video_token_id=len(WORDS) + 5,
        vision_end_token_id=len(WORDS) + 6,
    )


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(1)
    model, head = Qwen2VLModel(tiny_qwen()), hpsv3.head_of(16)

    def ids(prompt, count):
        return [
            len(WORDS),
            *[len(WORDS) + 1] * count,
            *tokenize([prompt])["input_ids"][0][: len(prompt.split()) + 1].tolist(),
            len(WORDS) + 2,
            3,
        ]

    return hpsv3.HPSv3Reward(model, head, ids, len(WORDS) + 2, pixels=16 * 28 * 28)


@pytest.mark.parametrize("size", [(112, 112), (84, 140)], ids=str)
def test_hpsv3_patches_are_the_processors(size):
    array = photograph(*size)
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=10**7)
    reference = processor(Image.fromarray(array), return_tensors="pt")
    rows, (h, w) = hpsv3.patches(clip.normalised_pixels(as_tensor(array)))
    assert reference.image_grid_thw.tolist() == [[1, h, w]]
    torch.testing.assert_close(rows, reference.pixel_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(448, 448), (512, 512), (1024, 768), (300, 900), (64, 64), (28, 2800)], ids=str)
def test_hpsv3_sizes_are_the_processors(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    assert hpsv3.resized_shape(*size) == smart_resize(*size, min_pixels=hpsv3.PIXELS, max_pixels=hpsv3.PIXELS)


def test_hpsv3_equals_the_model_without_positions_and_does_not_see_its_neighbours(qwen):
    """The authors call the language model with embeddings and no positions: 0, 1, 2, ... on all axes. Qwen2-VL's own
    forward numbers image tokens by row and column, which gives other scores."""
    images = draw(2, 3, 112, 112).requires_grad_()
    prompts = ["a red fox", "a blue whale 3d fox"]
    model, head = qwen.parts["model"], torch.nn.Linear(16, 2)  # the published head's random weights hide any difference
    with torch.no_grad():
        head.weight.copy_(10 * torch.randn(2, 16, generator=torch.Generator().manual_seed(3)))
    got = hpsv3.HPSv3Reward(model, head, qwen._ids, qwen.reward_id, pixels=qwen.pixels)(images, prompts)
    for i, prompt in enumerate(prompts):  # one at a time
        ids = torch.tensor([qwen._ids(prompt, 16)])
        rows, (h, w) = hpsv3.patches(clip.normalised_pixels(images[i : i + 1]))
        seen = model.get_image_features(rows, torch.tensor([[1, h, w]])).pooler_output[0]
        placed = ids == len(WORDS) + 1
        embedded = model.get_input_embeddings()(ids).masked_scatter(placed[..., None], seen)
        at = (ids[0] == len(WORDS) + 2).int().argmax()
        hidden = model.language_model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).last_hidden_state
        expected = head(hidden[:, at])[0, 0]
        close(got[i].detach(), expected.detach())
        close(
            torch.autograd.grad(got[i], images, retain_graph=True)[0][i],
            torch.autograd.grad(expected, images)[0][i],
            2e-5,
        )
        by_row_and_column = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=rows.detach(),
            image_grid_thw=torch.tensor([[1, h, w]]),
            mm_token_type_ids=placed.int(),
        ).last_hidden_state
        assert float((head(by_row_and_column[:, at])[0, 0] - expected).detach().abs()) > 1e-4


def test_hpsv3_real_size_and_published_names():
    with torch.device("meta"):
        model = Qwen2VLModel(
            Qwen2VLConfig(
                text_config={
                    "vocab_size": 152064,
                    "hidden_size": 3584,
                    "intermediate_size": 18944,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 28,
                    "num_key_value_heads": 4,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
                }
            )
        )
    assert sum(p.numel() for p in model.parameters()) == 8_291_375_616 - 152064 * 3584  # Qwen2-VL-7B without lm_head
    names = set(model.state_dict())
    for layout in (
        lambda n: "model." + n,
        lambda n: n if n.startswith("visual.") else n.replace("language_model.", "model."),
    ):
        old = {layout(n): torch.empty(0) for n in names} | {
            "lm_head.weight": torch.empty(0),
            "rm_head.0.weight": torch.empty(0),
        }
        got, head = hpsv3.split_checkpoint(old)
        assert set(got) == names and set(head) == {"0.weight"}


def test_hpsv3_is_read_from_a_folder_with_its_chat_text(qwen, tmp_path):
    """The published file's layout, config.json, tokenizer and prompt.txt: the scores of the model that was saved. The
    reward token is added to the vocabulary, and a prompt cannot place one."""
    state = {f"model.{name}": tensor for name, tensor in qwen.parts["model"].state_dict().items()}
    state |= {f"rm_head.{name}": tensor for name, tensor in qwen.parts["head"].state_dict().items()}
    save_file({**state, "lm_head.weight": torch.zeros(2, 16)}, tmp_path / "HPSv3.safetensors")
    tiny_qwen().save_pretrained(tmp_path)
    tokenizer_folder(tmp_path, extra=HPS3_WORDS[:2])
    (tmp_path / "prompt.txt").write_text("<|vision_start|>{image} a {prompt} . <|Reward|> flat")
    reward = hpsv3.load_hpsv3(str(tmp_path), dtype=torch.float32)
    reward.pixels = 16 * 28 * 28
    ids = reward._ids("red fox", 16)
    words = [*WORDS, *HPS3_WORDS]
    expected = [len(WORDS), *[len(WORDS) + 1] * 16, *map(words.index, ["a", "red", "fox", ".", "<|Reward|>", "flat"])]
    assert list(ids) == expected and reward.reward_id == len(WORDS) + 2
    plain = hpsv3.HPSv3Reward(
        qwen.parts["model"], qwen.parts["head"], lambda *_: expected, reward.reward_id, pixels=reward.pixels
    )
    images = draw(2, 3, 112, 112)
    close(reward(images, ["red fox"] * 2).detach(), plain(images, ["red fox"] * 2).detach())
    assert reward._ids("fox <|Reward|> <|image_pad|>", 16).count(reward.reward_id) == 1
    assert reward._ids("fox <|Reward|> <|image_pad|>", 16).count(len(WORDS) + 1) == 16
    (tmp_path / "prompt.txt").write_text("{image} {prompt}")
    with pytest.raises(ValueError, match=r"prompt.txt must hold <.Reward.> exactly once"):
        hpsv3.load_hpsv3(str(tmp_path))
    (tmp_path / "prompt.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no prompt.txt. .*the chat text of HPSv3's own repository"):
        hpsv3.load_hpsv3(str(tmp_path))


# ------------------------------------------------------------------------- what all of them promise


@pytest.fixture(scope="module")
def every(tiny, blip, qwen):
    torch.manual_seed(0)
    vision = {**tiny_clip_config().vision_config.to_dict(), "projection_dim": JOINT}
    tower = CLIPVisionModelWithProjection(type(tiny_clip_config().vision_config)(**vision))
    model = CLIPModel(tiny_clip_config())
    model.load_state_dict(from_open_clip(tiny[0]))
    return {
        "hpsv2": tiny[1],
        "clip-score": ClipReward(model, tokenize, image_size=SIDE, scale=100.0, floor=0.0),
        "image-reward": blip[2],
        "hpsv3": qwen,
        "aesthetic": aesthetic.AestheticReward(tower, draw(JOINT), torch.tensor(5.0)),
    }


@pytest.mark.parametrize("name", ["hpsv2", "image-reward", "aesthetic", "hpsv3"])
def test_gradient_reaches_every_region_and_no_parameter(every, name):
    images = draw(2, 3, 96, 96, seed=2).requires_grad_()
    reward = every[name]
    reward(images, PROMPTS if name != "hpsv3" else ["a fox", "a whale"]).sum().backward()
    regions = images.grad.unflatten(-1, (8, 12)).unflatten(-3, (8, 12)).abs().amax((1, 3, 5))
    assert torch.isfinite(images.grad).all() and bool((regions > 0).all())
    modules = [part for part in vars(reward).values() if isinstance(part, nn.Module)]
    assert modules and all(p.grad is None and not p.requires_grad for module in modules for p in module.parameters())


@pytest.mark.parametrize("name", ["hpsv2", "clip-score", "image-reward", "aesthetic", "hpsv3"])
def test_a_value_does_not_depend_on_the_batch(every, name):
    images, prompts = draw(3, 3, 40, 56, seed=3), ["a fox", "a red fox", "a blue whale"]
    with torch.no_grad():
        together = every[name](images, prompts)
        alone = torch.cat([every[name](images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=2e-6 * float(together.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["hpsv2", "image-reward", "aesthetic", "hpsv3"])
def test_a_reward_that_does_not_fit_on_a_device_is_whole_on_the_cpu_again(every, name, monkeypatch):
    """Weights move one by one: what went before the memory ended would pass for all of them at the next call."""
    reward, images, prompts, moved = every[name], draw(1, 3, 32, 32, seed=5), ["a fox"], []
    before = reward(images, prompts)

    def move(module, device):
        moved.append(device.type)
        if device.type == "meta":  # stands for a GPU
            raise torch.OutOfMemoryError("CUDA out of memory")
        return module

    monkeypatch.setattr(nn.Module, "to", move)
    with pytest.raises(torch.OutOfMemoryError):
        reward(images.to("meta"), prompts)
    assert moved == ["meta", "cpu"]
    assert bool((reward(images, prompts) == before).all()) and moved == ["meta", "cpu"]


def test_every_reward_follows_its_images_whole():
    for path in Path(clip.__file__).parent.glob("*.py"):
        assert ".to(images.device)" not in path.read_text("utf-8"), f"{path.name}: placement.follow moves weights"


@pytest.mark.parametrize(
    ("name", "load"), [("hpsv2", lambda: CLIPModel(tiny_clip_config())), ("image-reward", None), ("aesthetic", None)]
)
def test_bf16_follows_fp32(every, name, load, tiny, blip):
    images, prompts = draw(2, 3, 32, 32, seed=4).requires_grad_(), PROMPTS
    if name == "hpsv2":
        model = load()
        model.load_state_dict(from_open_clip(tiny[0]))
        half = ClipReward(model.bfloat16(), tokenize, image_size=SIDE)
    elif name == "image-reward":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(image_reward, "blip_large", lambda: (BLIP_VISION, BLIP_TEXT))
            half = image_reward.load_image_reward(str(blip[1]), dtype=torch.bfloat16)
    else:
        full = every[name]
        tower = CLIPVisionModelWithProjection(full.tower.config)
        tower.load_state_dict(full.tower.state_dict())
        half = aesthetic.AestheticReward(tower.bfloat16(), full.weight, full.bias)
    values = [reward(images, prompts) for reward in (every[name], half)]
    assert all(v.dtype == torch.float32 for v in values)
    assert float((values[0] - values[1]).detach().abs().max()) < 0.02 * max(1.0, float(values[0].detach().abs().max()))
    whole, rough = (torch.autograd.grad(v.sum(), images)[0].flatten() for v in values)
    assert float(F.cosine_similarity(whole, rough, dim=0)) > 0.99


@pytest.mark.parametrize("name", ["hpsv2", "image-reward", "hpsv3"])
def test_two_prompts_run_the_image_tower_once(every, name, monkeypatch):
    reward, calls = every[name], []
    towers = reward.image_features
    monkeypatch.setattr(reward, "image_features", lambda images: calls.append(1) or towers(images))
    images = draw(1, 3, 32, 32)
    first, second = score_pair(reward, images, ["a fox"], ["a whale"])
    assert len(calls) == 1
    close(first, reward(images, ["a fox"]))
    close(second, reward(images, ["a whale"]))
    assert float((first - second).abs()) > 1e-6


def test_scales_of_the_cosines(tiny, every):
    images = draw(2, 3, SIDE, SIDE)
    with torch.no_grad():
        cosine = tiny[1](images, PROMPTS)
        torch.testing.assert_close(every["clip-score"](images, PROMPTS), (100 * cosine).clamp_min(0))
        scaled = ClipReward(tiny[1].model, tokenize, image_size=SIDE, scale=3.0)
        torch.testing.assert_close(scaled(images, PROMPTS), 3 * cosine)


# ------------------------------------------------------------------------- loading


@pytest.fixture
def clip_folder(tmp_path, tiny):
    """A transformers folder of the tiny CLIP with its tokenizer."""
    model = CLIPModel(tiny_clip_config())
    model.load_state_dict(from_open_clip(tiny[0]))
    model.save_pretrained(tmp_path / "clip")
    tokenizer_folder(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_score_pickscore_and_hpsv2_load_from_folders(tiny, clip_folder, tmp_path, monkeypatch):
    images = draw(2, 3, SIDE, SIDE)
    cosine = tiny[1](images, PROMPTS)
    scale = float(tiny[0]["logit_scale"].exp())
    torch.testing.assert_close(clip.load_pickscore(str(clip_folder))(images, PROMPTS), scale * cosine)
    torch.testing.assert_close(clip.load_clip_score(str(clip_folder))(images, PROMPTS), (100 * cosine).clamp_min(0))
    monkeypatch.setattr(clip, "vit_h_14", tiny_clip_config)
    save_file(tiny[0], tmp_path / "HPS_v2.1_compressed.safetensors")
    tokenizer_folder(tmp_path)
    for source in (tmp_path, tmp_path / "HPS_v2.1_compressed.safetensors", clip_folder / "model.safetensors"):
        torch.testing.assert_close(clip.load_hpsv2(str(source))(images, PROMPTS), cosine)
    save_file(tiny[0] | {"visual.extra": torch.zeros(1)}, tmp_path / "HPS_v2.1_compressed.safetensors")
    with pytest.raises(ValueError, match=r"visual.extra"):
        clip.load_hpsv2(str(tmp_path))
    save_file(
        from_open_clip(tiny[0]) | {"vision_model.extra": torch.zeros(1)}, tmp_path / "HPS_v2.1_compressed.safetensors"
    )
    with pytest.raises(ValueError, match=r"1 of [0-9]+ tensors.*vision_model.extra"):
        clip.load_hpsv2(str(tmp_path))
    save_file({n: t for n, t in tiny[0].items() if n != "visual.proj"}, tmp_path / "HPS_v2.1_compressed.safetensors")
    with pytest.raises(ValueError, match=r"reward.source.hpsv2.*another architecture.*visual_projection.weight"):
        clip.load_hpsv2(str(tmp_path))


def test_pickscores_scale_is_not_rounded_with_the_weights(clip_folder):
    """Of the published scale, 100, bfloat16 would make 98.9, another unit than float32's."""
    model = CLIPModel.from_pretrained(clip_folder)
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(clip_folder)
    half = clip.load_pickscore(str(clip_folder), dtype=torch.bfloat16)
    assert half.scale == pytest.approx(100, rel=1e-6)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


def test_what_is_read_beside_the_weights_is_what_palate_fetch_gets(tiny, blip, tmp_path, monkeypatch):
    """By the same name: the hub's cache keeps a repository under the name by which it was asked for."""
    asked = {}

    def pretrained(kind, reward, source, **_):
        asked[reward] = source
        raise InputError("asked")

    for module in (clip, aesthetic):
        monkeypatch.setattr(module, "pretrained", pretrained)
    monkeypatch.setattr(clip, "vit_h_14", tiny_clip_config)
    monkeypatch.setattr(image_reward, "blip_large", lambda: (BLIP_VISION, BLIP_TEXT))
    head = {f"layers.{name}": tensor for name, tensor in aesthetic_head(JOINT).state_dict().items()}
    for name, state in (("hpsv2", tiny[0]), ("image-reward", blip[0]), ("aesthetic", head)):
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match="asked"):
            load_reward(name, str(tmp_path / f"{name}.safetensors"))
    assert asked == {name: PUBLISHED[name].extra[0].place for name in ("hpsv2", "image-reward", "aesthetic")}


def test_a_source_may_begin_at_home_and_a_precision_is_one_of_two(clip_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(clip_folder.parent))
    assert load_reward("pickscore", "~/clip", "bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"reward.dtype got 'bf16'; expected one of 'float32', 'bfloat16'"):
        load_reward("pickscore", "~/clip", "bf16")


def test_a_tower_that_is_not_whole_is_refused(tiny, clip_folder, tmp_path, capfd):
    """transformers would draw what is missing at random, and print a table."""
    weights = load_file(clip_folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if not name.startswith("visual_projection")}
    other = {**weights, "visual_projection.weight": torch.zeros(JOINT, WIDTH + 1)}
    for state in (lacking, other):
        save_file(state, clip_folder / "model.safetensors", metadata={"format": "pt"})
        for load in (clip.load_pickscore, clip.load_clip_score):
            with pytest.raises(InputError, match=r"is no CLIPModel, or not whole: 1 of \d+ .*visual_projection.weight"):
                load(str(clip_folder))
    save_file(
        {f"layers.{name}": tensor for name, tensor in aesthetic_head(JOINT).state_dict().items()},
        tmp_path / "head.safetensors",
    )
    config = json.loads((clip_folder / "config.json").read_text())
    config["vision_config"]["projection_dim"] = JOINT  # as in the published configuration
    (clip_folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "clip-vit-large-patch14").symlink_to(clip_folder)
    with pytest.raises(InputError, match=r"reward.source.aesthetic: .* is no CLIPVisionModelWithProjection"):
        aesthetic.load_aesthetic(str(tmp_path / "head.safetensors"))
    save_file(weights, clip_folder / "model.safetensors", metadata={"format": "pt"})
    assert aesthetic.load_aesthetic(str(tmp_path / "head.safetensors"))(draw(1, 3, SIDE, SIDE)).shape == (1,)
    assert "MISSING" not in capfd.readouterr().err


def test_long_prompts_warn_once_with_the_count(clip_folder):
    reward = clip.load_pickscore(str(clip_folder))
    with pytest.warns(UserWarning, match="of 12 tokens is cut at 8"):
        reward(draw(1, 3, SIDE, SIDE), ["a red fox " * 3 + "a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(draw(1, 3, SIDE, SIDE), ["a blue fox " * 3 + "a"])


def test_the_convert_command_turns_a_pickle_into_safetensors(tmp_path, monkeypatch):
    shared = torch.arange(4.0)
    torch.save(
        {"state_dict": {"a": shared, "b": shared, "c": shared.view(2, 2).T}, "epoch": 3}, tmp_path / "HPS_v2.1.pt"
    )
    with pytest.raises(ValueError, match="pickle") as refused:
        weights_file("hpsv2", str(tmp_path), default="x.safetensors", how="")
    command = str(refused.value).splitlines()[1]
    assert command == convert_command(tmp_path / "HPS_v2.1.pt")
    code, source, target = re.fullmatch(r'python -c "(.*)" (\S+) (\S+)', command).groups()
    assert convert_command(tmp_path / "my weights.pt").endswith(
        f"'{tmp_path}/my weights.pt' '{tmp_path}/my weights.safetensors'"
    )
    monkeypatch.setattr(sys, "argv", ["-c", source, target])
    exec(code, {})
    made = load_file(target)
    assert set(made) == {"a", "b", "c"} and torch.equal(made["c"], shared.view(2, 2).T)
    assert weights_file("hpsv2", str(target), default="x", how="") == tmp_path / "HPS_v2.1.safetensors"


LOADERS = {
    "hpsv2": clip.load_hpsv2,
    "aesthetic": aesthetic.load_aesthetic,
    "image-reward": image_reward.load_image_reward,
    "hpsv3": hpsv3.load_hpsv3,
    "pickscore": clip.load_pickscore,
    "clip-score": clip.load_clip_score,
}
OF_THE_HUB = ("pickscore", "clip-score")  # no source given means their own repository


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (key, what)
        for key in LOADERS
        for what in ("missing", "empty", "pickle", "damaged", "none")
        if not (what == "none" and key in OF_THE_HUB)
    ],
)
def test_missing_weights_say_how_to_get_them(key, what, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = {"missing": "./nowhere", "none": None}.get(what, str(tmp_path))
    if what == "pickle":
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    if what == "damaged":
        (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
        if key in OF_THE_HUB:
            tiny_clip_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        LOADERS[key](source)
    message = str(error.value)
    assert len(message.splitlines()) <= 3
    assert f"reward.source.{key}" in message or (what == "damaged" and str(tmp_path) in message)
    if what == "pickle" and key != "hpsv3":
        assert "convert" in message.lower() and "weights_only=True" in message
    elif what != "damaged":
        assert "hf download" in message or "github.com" in message or "hf " in message
        assert key not in ("hpsv2", "aesthetic", "image-reward") or f"palate fetch {key}" in message
