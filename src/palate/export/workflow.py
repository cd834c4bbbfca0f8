"""A ComfyUI workflow that draws with an exported LoRA, in the form that ComfyUI's /prompt takes (its "API format").

{node id: {"class_type": name, "inputs": {input: value, or [node id, number of an output]}}}. Nodes and inputs are those
of ComfyUI's core; what a family is called there stands among its facts. Choose files anew where yours differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from palate.models import families
from palate.models.facts import ComfyUI, Facts, HasFacts
from palate.models.latents import sides
from palate.recipe import Recipe

Link = list[Any]  # [node id, number of its output]
PROMPT = "a photo of a lighthouse at dusk"


class Graph:
    """Nodes in the order in which they are added, numbered from 1."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, **inputs: Any) -> Callable[[int], Link]:
        """Add a node; what it gives is asked for by the number of the output."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
        return lambda output: [name, output]


def workflow(recipe: Recipe, lora: str) -> dict[str, Any] | None:
    """The graph for the recipe's model with the LoRA file of that name; None if its facts name no ComfyUI."""
    family = families.find(recipe.model.name).load_class()
    parts = family.facts.comfyui if isinstance(family, HasFacts) else None
    if parts is None:
        return None
    graph, told = Graph(), recipe.model
    height, width = sides(recipe.sample.image_size or told.image_size or _published_size(told.folder, family.facts))
    steps = recipe.sample.steps or parts.steps
    guidance = parts.guidance if recipe.sample.guidance is None else recipe.sample.guidance
    embedded = (told.rollout_distilled_guidance, told.distilled_guidance, parts.embedded)  # of calls without gradient
    model, clip, vae = _load(graph, parts)
    model = graph.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)(0)
    if parts.shift is not None:
        model = graph.add("ModelSamplingAuraFlow", model=model, shift=parts.shift)(0)
    positive = graph.add("CLIPTextEncode", text=PROMPT, clip=clip)(0)
    negative = graph.add("CLIPTextEncode", text="", clip=clip)(0)
    if embeds := [strength for strength in embedded if strength is not None]:
        positive = graph.add("FluxGuidance", conditioning=positive, guidance=embeds[0])(0)
        negative = graph.add("FluxGuidance", conditioning=negative, guidance=embeds[0])(0)
    latent = graph.add(parts.latent, width=width, height=height, batch_size=1)(0)
    if parts.scheduler:
        guider = graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=guidance)(0)
        noise, sampler = graph.add("RandomNoise", noise_seed=0)(0), graph.add("KSamplerSelect", sampler_name="euler")(0)
        sigmas = graph.add(parts.scheduler, steps=steps, width=width, height=height)(0)
        drawn = graph.add("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                          latent_image=latent)(0)  # fmt: skip
    else:
        name, scheduler = parts.sampler
        drawn = graph.add(
            "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=0, steps=steps,
            cfg=guidance, sampler_name=name, scheduler=scheduler, denoise=1.0,
        )(0)  # fmt: skip
    images = graph.add("VAEDecode", samples=drawn, vae=vae)(0)
    graph.add("SaveImage", images=images, filename_prefix=lora.removesuffix(".safetensors"))
    return graph.nodes


def workflow_text(recipe: Recipe, lora: str) -> str | None:
    """`workflow` as the text of a JSON file."""
    found = workflow(recipe, lora)
    return None if found is None else json.dumps(found, indent=2) + "\n"


def _published_size(folder: str | None, facts: Facts) -> int:
    """Pixels of a side that a model without model.image_size draws: the family's, unless the configuration of the
    denoiser in the folder, or in the hub's cache, has latents of another side (Stable Diffusion 2.1: 768, not 512)."""
    published = facts.published
    if published is None:
        return 1024
    usual, name = published.config.get("sample_size"), f"{facts.denoiser}/config.json"
    if usual is None or folder is None:
        return published.image_size
    file = Path(folder) / name
    if not file.is_file() and folder.count("/") == 1 and not folder.startswith((".", "/", "~")):
        cached = try_to_load_from_cache(folder, name)
        file = Path(cached) if isinstance(cached, str) else file
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return round(published.image_size * config.get("sample_size", usual) / usual)


def _load(graph: Graph, parts: ComfyUI) -> Sequence[Link]:
    """Model, CLIP and VAE."""
    if parts.checkpoint:
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=parts.checkpoint)
        return [loaded(0), loaded(1), loaded(2)]
    model = graph.add("UNETLoader", unet_name=parts.unet, weight_dtype="default")(0)
    if len(parts.encoders) == 2:
        first, second = parts.encoders
        clip = graph.add("DualCLIPLoader", clip_name1=first, clip_name2=second, type=parts.kind)(0)
    else:
        clip = graph.add("CLIPLoader", clip_name=parts.encoders[0], type=parts.kind)(0)
    return [model, clip, graph.add("VAELoader", vae_name=parts.vae)(0)]
