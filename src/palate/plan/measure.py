"""The real networks of a recipe on one image: on the meta device, without weights; the embedded model on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from palate.models import families
from palate.models.autoencoder import decode_with, encode_with, recompute_pieces
from palate.models.emoji import EmojiModel
from palate.models.facts import Facts, NetworkCall, Published
from palate.models.latents import latent_shape, sides
from palate.models.parts import LoadedModel, Options, named_weights
from palate.models.quantised import quantisable, stored_in_fours
from palate.models.repository import read_settings
from palate.plan.activations import Unit, measure_unit
from palate.recipe import Recipe
from palate.rewards.clip import vit_h_14
from palate.rewards.emoji import load_reward
from palate.rewards.image_reward import LENGTH, blip_large
from palate.rewards.table import HELD_OUT_CANDIDATES, find
from palate.rewards.tasks import load_detector
from palate.runtime.errors import InputError
from palate.taste.saved import parts_of, source_of

VIT_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 768,
}


def measure(recipe: Recipe) -> dict[str, Unit]:
    """denoiser, decoder, encoder and reward on one image."""
    if recipe.model.name == "emoji":
        return _embedded(recipe)
    family, rewards = family_of(recipe), _rewards(recipe)  # first, for what cannot be measured
    facts = family.facts
    published = published_of(facts)
    vae_config = local_config(recipe, facts, "vae") or published.vae
    config = local_config(recipe, facts, facts.denoiser) or published.config
    size = sides(recipe.model.image_size or published.image_size)
    patch = facts.patch or config.get("patch_size", 2)
    shape = latent_shape(vae_config, size, family=facts.name, patch=patch, fold=facts.layout.fold)
    dtype = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
    network: Any
    vae: Any
    with torch.device("meta"):
        # not diffusers' own `to`, which warns of precisions that make no difference to shapes
        network = nn.Module.to(facts.network(**config), dtype).requires_grad_(False).eval()
        vae = facts.vae(**vae_config).to(dtype).requires_grad_(False).eval()
        xt, t = torch.empty(1, *shape, dtype=dtype), torch.empty(1)
        cond = published.condition(network.config, recipe.model.text_tokens or published.text_tokens, dtype)
        latents = torch.empty(1, *shape, dtype=dtype, requires_grad=True)
        image = torch.empty(1, 3, *size, dtype=dtype)
        _train(network, facts, recipe)

    def denoise() -> Tensor:
        return family.output(network, xt, t, cond, NetworkCall(size))

    def decode() -> Tensor:
        # a view made without gradient says of itself that it has one, which the counter's hooks then miss
        return decode_with(vae, facts.layout, latents if torch.is_grad_enabled() else latents.detach())

    def encode() -> Tensor:
        return encode_with(vae, facts.layout, image)

    recompute = partial(recompute_pieces, vae.decoder)
    units = {
        "denoiser": measure_unit(network, denoise, network.enable_gradient_checkpointing),
        "decoder": measure_unit(vae.decoder, decode, recompute),
        "encoder": measure_unit(vae.encoder, encode, None),
    }
    layers, fours = quantisable(network), stored_in_fours(network, facts.whole)
    whole = sum(layer.weight.numel() for name, layer in layers.items() if name not in fours)
    units["denoiser"] = units["denoiser"]._replace(whole=whole)
    return units | rewards


def family_of(recipe: Recipe) -> type[LoadedModel]:
    """The class of the recipe's family. InputError: it says nothing about itself."""
    family = families.find(recipe.model.name).load_class()
    if not issubclass(family, LoadedModel):
        raise InputError(f"palate plan: {recipe.model.name} is no models.parts.LoadedModel; its costs are not known")
    return family


def published_of(facts: Facts) -> Published:
    """The published architecture of a family. InputError: its facts have none."""
    if facts.published is None:
        raise InputError(f"palate plan: the facts of {facts.name} name no published architecture; training needs none")
    return facts.published


def local_config(recipe: Recipe, facts: Facts, part: str) -> dict[str, Any] | None:
    """The configuration of a part in a local model.folder; None where there is no such folder."""
    if not recipe.model.folder:
        return None
    folder, names = Path(recipe.model.folder), ("unet", "transformer") if part == facts.denoiser else (part,)
    there = next((name for name in names if (folder / name / "config.json").is_file()), None)
    if there is None:
        return None
    config, expected = read_settings(folder / there / "config.json"), facts.parts[part]
    if (got := config.get("_class_name", expected)) != expected:
        raise InputError(f"model.folder {folder}: its {there} is a {got}, {facts.name} needs a {expected}")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _train(network: nn.Module, facts: Facts, recipe: Recipe) -> None:
    """What the recipe trains gets a gradient: a LoRA in float32, or every weight."""
    if recipe.model.weights == "full":
        network.requires_grad_(True)
        return
    targets = recipe.model.lora_targets
    options = Options(lora_rank=recipe.model.lora_rank, lora_targets=targets, gradient_checkpointing=False)
    named_weights(network, facts, options)


def _rewards(recipe: Recipe) -> dict[str, Unit]:
    """All rewards of the recipe together, as one part."""
    dtype = torch.bfloat16 if recipe.reward.dtype == "bfloat16" else torch.float32
    return {"reward": _towers(networks_of(recipe), dtype)}


def networks_of(recipe: Recipe) -> tuple[str, ...]:
    """The names of the rewards whose networks the recipe runs; of a taste, of those that it stands on."""
    names = [recipe.reward.name] if recipe.reward.name else list(recipe.reward.weights or ())
    return tuple(each for name in names for each in (_under_taste(recipe) if name == "taste" else (name,)))


def _under_taste(recipe: Recipe) -> list[str]:
    """What the recipe's taste stands on; where there is no taste yet, what the recipe gives a place beside it."""
    try:
        return sorted({source_of(folder) for folder, _ in parts_of(recipe.reward.source.get("taste"))})
    except InputError:
        given = [name for name in HELD_OUT_CANDIDATES if name in recipe.reward.source]
        return given or (["emoji"] if recipe.model.name == "emoji" else [])


@cache
def _towers(names: tuple[str, ...], dtype: torch.dtype) -> Unit:
    """The networks of these rewards together; measured once per process, so that a training may ask before it
    begins."""
    total = Unit(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for name in names:
        if find(name).kind != "embedded":
            with torch.device("meta"):
                found = _reward_tower(name, dtype)
        else:
            found = _embedded_tower(name)
        if found is None:
            continue
        unit = measure_unit(*found, None)
        both: Any = (a + b for a, b in zip(total, unit, strict=True))
        total = Unit(*both)
    return total


def _embedded_tower(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    image = torch.rand(1, 3, EmojiModel.image_size, EmojiModel.image_size, requires_grad=True)
    if name not in ("emoji", "emoji-heldout"):  # of the tasks, which a detector reads
        detector = load_detector()
        return detector, lambda: detector(image)[0]
    reward: Any = load_reward(name)
    return reward.model, lambda: reward.image_features(image)


def _reward_tower(name: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]] | None:
    """The network of a published reward and a run of its image tower; None for rewards without a network here."""
    pixels = torch.empty(1, 3, 224, 224, dtype=dtype, requires_grad=True)
    if name in ("hpsv2", "pickscore", "clip-score"):
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        config = (
            CLIPConfig(text_config=text, vision_config=VIT_L, projection_dim=768)
            if name == "clip-score"
            else vit_h_14()
        )
        model: Any = CLIPModel(config)
        model = model.to(dtype).requires_grad_(False).eval()
        return model, lambda: model.get_image_features(pixel_values=pixels).pooler_output
    if name == "aesthetic":
        tower: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_L))
        tower = tower.to(dtype).requires_grad_(False).eval()
        return tower, lambda: tower(pixel_values=pixels).image_embeds
    if name == "image-reward":
        return _blip(pixels)
    if name == "hpsv3":
        raise InputError(
            "plan: hpsv3 cannot be measured without its weights, because its vision tower reads the values of a grid; "
            "plan with another reward, and add 14.4 GiB for its 7.7e9 bfloat16 weights"
        )
    return None


def _blip(pixels: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    vision_config, text_config = blip_large()
    towers = nn.ModuleList([BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)])
    towers = towers.to(pixels.dtype).requires_grad_(False).eval()
    ids = torch.empty(1, LENGTH, dtype=torch.long)

    def run() -> Tensor:
        seen = towers[0](pixel_values=pixels).last_hidden_state
        return towers[1](input_ids=ids, encoder_hidden_states=seen, is_decoder=False).last_hidden_state[:, 0]

    return towers, run


def _embedded(recipe: Recipe) -> dict[str, Unit]:
    settings = recipe.model
    measure_model = _of_embedded if settings.folder is None else _of_embedded.__wrapped__
    parts = measure_model(settings.folder, settings.weights, settings.lora_rank, tuple(settings.lora_targets or ()))
    return parts | _rewards(recipe)


@cache  # of the package, once per process; another folder may change meanwhile
def _of_embedded(folder: str | None, training: str, rank: int, targets: tuple[str, ...]) -> dict[str, Unit]:
    model = EmojiModel.load(folder, training=training, lora_rank=rank, lora_targets=targets or None)
    cond, latents = model.encode_prompts([""]), torch.randn(1, *model.latent_shape, requires_grad=True)
    image = torch.rand(1, 3, model.image_size, model.image_size, requires_grad=True)
    return {
        "denoiser": measure_unit(
            model.weights.network, lambda: model.predict(latents.detach(), torch.full((1,), 0.5), cond).x0, None
        ),
        "decoder": measure_unit(model.vae.decoder, lambda: model.decode(latents), None),
        "encoder": measure_unit(model.vae.encoder, lambda: model.encode(image), None),
    }
