"""FLOPs, bytes and time of a recipe, without weights.

How: the recipe's own algorithm runs a few updates on a two-by-two model that only counts (images per call, with and
without backward); the real networks are built on the meta device and run once on one image, under torch's FLOP counter
and under hooks that see what autograd keeps. A plan is counts times units. Nothing in it is fitted.

Bytes leave out kernels' workspace, the allocator's fragmentation and the CUDA context: leave 10 to 15 % free.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from palate.core import Batch, Random
from palate.models.autoencoder import latent_shape, recompute_pieces, sides
from palate.models.gaussian import GaussianModel
from palate.path import Prediction
from palate.recipe import MODELS, Recipe, build_algorithm, trained_names
from palate.runtime.errors import InputError

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
DEVICES = {  # name -> dense bfloat16 TFLOP/s, GiB, by the makers' data sheets
    "rtx-3090": (71, 24),
    "rtx-4090": (165, 24),
    "l40s": (362, 48),
    "a100-40": (312, 40),
    "a100-80": (312, 80),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
}
VAE_SMALL = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
VAE_16 = {**VAE_SMALL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


class Published(NamedTuple):
    """A published architecture: what diffusers' class takes, its VAE, its text condition, its other weights."""

    kind: str
    config: dict[str, Any]
    vae: dict[str, Any]
    image_size: int
    cond: dict[str, tuple[int, ...]]  # fields of the family's Cond, shapes of one image
    text_parameters: float  # of the text encoders, in units of 1e9
    patch: int = 1
    default_steps: int = 28


PUBLISHED = {
    "stable-diffusion": Published(
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        VAE_SMALL,
        512,
        {"text": (77, 768)},
        0.123,
    ),
    "sdxl": Published(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        VAE_SMALL,
        1024,
        {"text": (77, 2048), "pooled": (1280,)},
        0.818,
    ),
    "sd3": Published(
        "SD3Transformer2DModel",
        {  # 3.5 medium
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        VAE_16,
        1024,
        {"text": (333, 4096), "pooled": (2048,)},
        5.58,
        2,
    ),
    "flux": Published(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        VAE_16,
        1024,
        {"text": (512, 4096), "pooled": (768,)},
        4.88,
        2,
    ),
    "pixart": Published(
        "PixArtTransformer2DModel",
        {"sample_size": 64, "caption_channels": 4096},
        VAE_SMALL,
        512,  # alpha at 512
        {"text": (120, 4096), "mask": (120,)},
        4.76,
        2,
    ),
    "z-image": Published("ZImageTransformer2DModel", {}, VAE_16, 1024, {"text": (512, 2560), "mask": (512,)}, 4.02, 2),
}
CONDITION_TOKENS = {"sd3": 77}  # tokens before those of the long encoder


class Unit(NamedTuple):
    """One network on one image, in FLOPs and bytes."""

    parameters: int
    forward: float
    backward: float  # without recomputation
    kept: float  # bytes for the backward pass, every activation
    kept_checkpointed: float  # bytes with each block recomputed
    block: float  # bytes of the largest block while it is recomputed
    trained: int = 0  # parameters with a gradient
    weight_bytes: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Of one update; memory of one GPU. FLOPs are multiply and add apart; bytes in `memory` are by term."""

    calls: dict[str, float]  # images an update, all GPUs together
    units: dict[str, Unit]
    flops: float  # all GPUs together
    memory: dict[str, float]
    gpus: int
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def passes(self) -> float:
        """FLOPs in denoiser forwards of one image."""
        return self.flops / self.units["denoiser"].forward

    def seconds(self, tflops: float, utilisation: float) -> float:
        """Of one update, if every GPU reaches that share of its peak."""
        return self.flops / self.gpus / (tflops * 1e12 * utilisation)


def plan(recipe: Recipe, *, gpus: int = 1, units: Mapping[str, Unit] | None = None) -> Plan:
    """What an update of the recipe costs. `units` measured before save the meta device another run."""
    units = dict(units or measure(recipe))
    calls = count(recipe)
    checkpointed = recipe.model.gradient_checkpointing is not False and recipe.model.name != "emoji"
    flops = 0.0
    for part, unit in units.items():
        again = unit.forward if checkpointed and part in ("denoiser", "decoder") else 0.0
        frozen = calls.get(f"{part} frozen backward", 0.0)
        flops += calls.get(part, 0.0) * unit.forward + calls.get(f"{part} backward", 0.0) * (unit.backward + again)
        flops += frozen * (min(unit.backward, 1.2 * unit.forward) + again)  # no gradient of its own weights
    notes = []
    if recipe.model.folder and not _local(recipe, "denoiser") and recipe.model.name != "emoji":
        notes.append(
            f"{recipe.model.folder} is not a local folder: the published architecture of {recipe.model.name} is assumed"
        )
    return Plan(calls, units, flops, _memory(recipe, units, calls, gpus, checkpointed), gpus, tuple(notes))


# ------------------------------------------------------------------------------------------------------- counts


class _Counted(GaussianModel):
    """Exact predictions of a known Gaussian on 2 x 2 latents; every call is added up, per image."""

    def __init__(self, names: Sequence[str]):
        super().__init__(torch.zeros(1, 2, 2), 0.6, networks=[*names, "consistency"])
        self.calls: Counter[str] = Counter()
        self.trained = names
        self.default_steps, self.default_guidance = 28, 1.0

    def predict(
        self, xt: Tensor, t: Tensor, cond: Tensor, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        images = len(xt) * (1 if guidance == 1.0 else 2)
        self.calls["denoiser"] += images
        pred = super().predict(xt, t, cond, guidance=guidance, weights=weights)
        learns = weights in self.trained and any(p.requires_grad for p in self.parameters(weights))
        return Prediction(*self.watched(torch.stack(pred), "denoiser" if learns else "denoiser frozen", images))

    def encode(self, images: Tensor) -> Tensor:
        self.calls["encoder"] += len(images)
        return super().encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        self.calls["decoder"] += len(latents)
        return self.watched(super().decode(latents), "decoder", len(latents))

    def watched(self, output: Tensor, part: str, images: int) -> Tensor:
        """The output, which adds to "`part` backward" when a backward pass comes through it."""
        if output.requires_grad:
            output.register_hook(lambda gradient: self.calls.update({f"{part} backward": images}))
        return output


def count(recipe: Recipe, *, updates: int = 8) -> dict[str, float]:
    """Images an update that go through each part, forward and backward, the mean over the first `updates`."""
    algorithm, size = build_algorithm(recipe), recipe.trainer.batch_size
    model = _Counted(trained_names(recipe.algorithm_name))
    if getattr(recipe.algorithm, "rollout_every", 1) > 1:
        updates = recipe.algorithm.rollout_every * max(1, updates // recipe.algorithm.rollout_every)

    def image_features(images: Tensor) -> Tensor:
        model.calls["reward"] += len(images)
        return model.watched(images.mean((1, 2, 3)) + 0 * images.sum(), "reward", len(images))

    def score(features: Tensor, prompts: Sequence[str]) -> Tensor:
        return features + torch.tensor([0.01 * len(prompt) for prompt in prompts])

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return score(image_features(images), prompts)

    if _two_tower(recipe):
        reward.image_features, reward.score = image_features, score
    prompts = [f"prompt {'x' * i}" for i in range(size)]
    for step in range(1, updates + 1):
        rng = Random(0, step, range(size))
        latents = None
        if recipe.prompts.images is not None or getattr(recipe.prompts, "pairs", None) is not None:
            pair = (2,) if getattr(recipe.prompts, "pairs", None) is not None else ()
            latents = torch.stack([rng.normal("x", (1, 2, 2))] * 2, 1) if pair else rng.normal("x", (1, 2, 2))
        for loss in algorithm.step(
            model, reward, Batch(prompts, model.encode_prompts(prompts), torch.arange(size), latents), rng
        ):
            loss.value.backward()
            if loss.update is not None:
                for name in algorithm.trains:
                    for p in model.parameters(name):
                        p.grad = None
    return {name: total / updates for name, total in model.calls.items()}


def _two_tower(recipe: Recipe) -> bool:
    names = {recipe.reward.name} if recipe.reward.name else set(recipe.reward.weights or ())
    return bool(names & {"emoji", "emoji-heldout", "clip-score", "pickscore", "hpsv2", "image-reward", "hpsv3"})


# -------------------------------------------------------------------------------------------------------- units


def measure(recipe: Recipe) -> dict[str, Unit]:
    """denoiser, decoder, encoder and reward on one image: on the meta device, the embedded model on the CPU."""
    if recipe.model.name == "emoji":
        return _measure_emoji(recipe)
    published = PUBLISHED.get(recipe.model.name)
    if published is None:
        raise InputError(
            f"palate plan does not know the shapes of {recipe.model.name}: they are not in its PUBLISHED; "
            "training does not need them"
        )
    vae_config = _local(recipe, "vae") or published.vae
    size = sides(recipe.model.image_size or published.image_size)
    shape = latent_shape(vae_config, size, family=recipe.model.name, patch=published.patch)
    dtype = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
    network, run = _denoiser(recipe, published, shape, size, dtype)
    with torch.device("meta"):
        vae = AutoencoderKL(**vae_config).to(dtype).requires_grad_(False).eval()
        latents, image = (
            torch.empty(1, *shape, dtype=dtype, requires_grad=True),
            torch.empty(1, 3, *size, dtype=dtype),
        )
    units = {
        "denoiser": _unit(network, run, network.enable_gradient_checkpointing),
        "decoder": _unit(vae.decoder, lambda: vae.decode(latents).sample, partial(recompute_pieces, vae.decoder)),
        "encoder": _unit(vae.encoder, lambda: vae.encode(image).latent_dist.mode(), None),
    }
    return units | _rewards(recipe)


def _denoiser(
    recipe: Recipe, published: Published, shape: tuple[int, int, int], size: tuple[int, int], dtype: torch.dtype
) -> tuple[nn.Module, Callable[[], Tensor]]:
    module = importlib.import_module(MODELS[recipe.model.name][0])
    family = getattr(module, MODELS[recipe.model.name][1])
    config = _local(recipe, "denoiser") or published.config
    fields = dict(published.cond)
    if recipe.model.text_tokens is not None:
        before = CONDITION_TOKENS.get(recipe.model.name, 0)
        fields = {
            name: (before + recipe.model.text_tokens, *shape[1:]) if name in ("text", "mask") else shape
            for name, shape in fields.items()
        }
    with torch.device("meta"):
        network = getattr(diffusers, published.kind)(**config).to(dtype).requires_grad_(False).eval()
        xt, t = torch.empty(1, *shape, dtype=dtype), torch.empty(1)
        cond = module.Cond(**{name: torch.empty(1, *shape, dtype=dtype) for name, shape in fields.items()})
    if recipe.model.name == "z-image":
        cond = cond._replace(mask=[slice(None)])  # every token counts; a mask's content is not known here
    if recipe.model.weights == "full":
        network.requires_grad_(True)
    else:
        with torch.device("meta"):
            config_of_lora = LoraConfig(
                r=recipe.model.lora_rank,
                target_modules=list(recipe.model.lora_targets or module.LORA_TARGETS),
                init_lora_weights=False,
            )
            inject_adapter_in_model(config_of_lora, network, adapter_name="policy")
        for name, p in network.named_parameters():
            if ".lora_" in name:  # it is kept, and works, in float32
                p.data = p.data.float()
                p.requires_grad_(True)
    told = SimpleNamespace(
        scheduler=SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000)),
        image_size=size,
        distilled=bool(config.get("guidance_embeds")),
        distilled_guidance=3.5,
        rollout_distilled_guidance=None,
    )
    return network, lambda: family._output(told, network, xt, t, cond)


def _rewards(recipe: Recipe) -> dict[str, Unit]:
    """All rewards of the recipe together, as one part."""
    names = [recipe.reward.name] if recipe.reward.name else list(recipe.reward.weights or ())
    dtype = torch.bfloat16 if recipe.reward.dtype == "bfloat16" else torch.float32
    total = Unit(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for name in names:
        with torch.device("meta"):
            tower, run = _reward_tower(name, dtype)
        if tower is None:
            continue
        unit = _unit(tower, run, None)
        total = Unit(*(a + b for a, b in zip(total, unit, strict=False)))
    return {"reward": total}


def _reward_tower(name: str, dtype: torch.dtype) -> tuple[nn.Module | None, Callable[[], Tensor] | None]:
    """The network of a published reward and a run of its image tower; None for rewards without a network here."""
    from transformers import (
        BlipTextModel,
        BlipVisionModel,
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    from palate.rewards.clip import vit_h_14
    from palate.rewards.image_reward import LENGTH, blip_large

    vit_l = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 768,
    }
    pixels = torch.empty(1, 3, 224, 224, dtype=dtype, requires_grad=True)
    if name in ("hpsv2", "pickscore", "clip-score"):
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        config = (
            CLIPConfig(text_config=text, vision_config=vit_l, projection_dim=768)
            if name == "clip-score"
            else vit_h_14()
        )
        model = CLIPModel(config).to(dtype).requires_grad_(False).eval()
        return model, lambda: model.get_image_features(pixel_values=pixels).pooler_output
    if name == "aesthetic":
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**vit_l)).to(dtype).requires_grad_(False).eval()
        return tower, lambda: tower(pixel_values=pixels).image_embeds
    if name == "image-reward":
        vision_config, text_config = blip_large()
        towers = nn.ModuleList([BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)])
        towers = towers.to(dtype).requires_grad_(False).eval()
        ids = torch.empty(1, LENGTH, dtype=torch.long)

        def run() -> Tensor:
            seen = towers[0](pixel_values=pixels).last_hidden_state
            return towers[1](input_ids=ids, encoder_hidden_states=seen, is_decoder=False).last_hidden_state[:, 0]

        return towers, run
    if name == "hpsv3":
        raise InputError(
            "plan: hpsv3 cannot be measured without its weights, because its vision tower reads the values of a grid; "
            "plan with another reward, and add 14.4 GiB for its 7.7e9 bfloat16 weights"
        )
    return None, None


def _measure_emoji(recipe: Recipe) -> dict[str, Unit]:
    from palate.models.emoji import EmojiModel
    from palate.rewards.emoji import load_reward

    model = EmojiModel.load(recipe.model.folder, training=recipe.model.weights, lora_rank=recipe.model.lora_rank)
    cond, latents = model.encode_prompts([""]), torch.randn(1, *model.latent_shape, requires_grad=True)
    image = torch.rand(1, 3, model.image_size, model.image_size, requires_grad=True)
    reward = load_reward("emoji")
    return {
        "denoiser": _unit(
            model.weights.network, lambda: model.predict(latents.detach(), torch.full((1,), 0.5), cond).x0, None
        ),
        "decoder": _unit(model.vae.decoder, lambda: model.decode(latents), None),
        "encoder": _unit(model.vae.encoder, lambda: model.encode(image), None),
        "reward": _unit(reward.model, lambda: reward.image_features(image), None),
    }


def _local(recipe: Recipe, part: str) -> dict[str, Any] | None:
    """The configuration of a part in a local model.folder."""
    folder = Path(recipe.model.folder or "")
    names = ("vae",) if part == "vae" else ("unet", "transformer")
    for name in names:
        if recipe.model.folder and (file := folder / name / "config.json").is_file():
            config = json.loads(file.read_text("utf-8"))
            expected = "AutoencoderKL" if part == "vae" else PUBLISHED[recipe.model.name].kind
            if (got := config.get("_class_name", expected)) != expected:
                raise InputError(
                    f"model.folder {folder}: its {name} is a {got}, {recipe.model.name} needs a {expected}"
                )
            return {key: value for key, value in config.items() if not key.startswith("_")}
    return None


def _unit(module: nn.Module, run: Callable[[], Tensor], checkpointing: Callable[[Any], None] | None) -> Unit:
    weights = list(module.parameters()) + list(module.buffers())
    own = {w.untyped_storage()._cdata for w in weights}
    with _fused_attention():
        with FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                run()
            forward = counter.get_total_flops()
        with _kept(own) as kept, FlopCounterMode(display=False) as counter:
            output = run()
            if output.requires_grad:
                output.backward(torch.empty_like(output))
            backward = counter.get_total_flops() - forward if output.requires_grad else 0
        for p in module.parameters():
            p.grad = None
        fewer, block = kept.total, 0.0
        if checkpointing is not None:
            with _kept(own) as stored:
                checkpointing(stored.recomputed)
                run()
            fewer, block = stored.total, stored.largest
    return Unit(
        sum(p.numel() for p in module.parameters()),
        float(forward),
        float(backward),
        kept.total,
        fewer,
        block,
        sum(p.numel() for p in module.parameters() if p.requires_grad),
        float(sum(p.numel() * p.element_size() for p in module.parameters())),
    )


class _Kept:
    """Bytes of the different storages that autograd keeps, weights left out."""

    def __init__(self, own: set[int]):
        self.own, self.seen, self.largest, self.alive = own, {}, 0.0, []

    @property
    def total(self) -> float:
        return float(sum(self.seen.values()))

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.seen[storage._cdata] = storage.nbytes()
            self.alive.append(storage)  # so that no other takes its address
        return tensor

    def recomputed(self, function: Callable[..., Any], *args: Any) -> Any:
        """As torch.utils.checkpoint: only the arguments are kept; what is made inside is counted as one block."""
        for value in args:
            if isinstance(value, Tensor):
                self.note(value)
        inside = _Kept(self.own | self.seen.keys())
        with torch.autograd.graph.saved_tensors_hooks(inside.note, lambda tensor: tensor):
            output = function(*args)
        self.largest = max(self.largest, inside.total)
        return output


@contextmanager
def _kept(own: set[int]) -> Iterator[_Kept]:
    counted = _Kept(own)
    with torch.autograd.graph.saved_tensors_hooks(counted.note, lambda tensor: tensor):
        yield counted


class _Attention(torch.autograd.Function):
    """softmax(q k^T) v as fused kernels keep it: q, k, v, the output and one number a row, never the square matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = (q @ k.transpose(-1, -2)) @ v
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        p = q.new_empty(*q.shape[:-1], k.shape[-2])
        dp = grad @ v.transpose(-1, -2)
        return dp @ k, dp.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch would take the unfused path, which keeps matrices that no real run keeps; on the CPU,
    one that its counter does not know. Values do not matter here."""
    original = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, enable_gqa: bool = False, **options: Any
    ) -> Tensor:
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return _Attention.apply(query, key, value)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


# ------------------------------------------------------------------------------------------------------- memory


def _memory(
    recipe: Recipe, units: Mapping[str, Unit], calls: Mapping[str, float], gpus: int, checkpointed: bool
) -> dict[str, float]:
    """Bytes of one GPU by term. Full training shards what is trained over the GPUs; a LoRA is on each."""
    denoiser, names = units["denoiser"], len(trained_names(recipe.algorithm_name))
    full = recipe.model.weights == "full"
    width = DTYPE_BYTES[recipe.model.dtype or ("float32" if recipe.model.name == "emoji" else "bfloat16")]
    base = (denoiser.parameters - (0 if full else denoiser.trained)) * width
    shards = gpus if full else 1
    trained = names * denoiser.trained * 4 / shards
    ema = denoiser.trained * 4 / shards if recipe.trainer.ema_decay else 0.0
    batch = max(1.0, recipe.trainer.batch_size / gpus)
    kept = "kept_checkpointed" if checkpointed else "kept"
    backward = any(calls.get(f"denoiser{frozen} backward") for frozen in ("", " frozen"))
    through = {part: calls.get(f"{part} backward", 0.0) > 0 for part in ("decoder", "reward")}
    depth = _graph_depth(calls, recipe)
    return {
        "denoiser, frozen" if not full else "frozen reference": base,
        "trained weights (float32)": trained,
        "gradients (float32)": trained,
        "Adam's two moments (float32)": 2 * trained,
        "moving average": ema,
        "VAE": units["decoder"].weight_bytes + units["encoder"].weight_bytes,
        "rewards": units["reward"].weight_bytes,
        "kept: denoiser": batch * depth * getattr(denoiser, kept) if backward else 0.0,
        "kept: VAE decoder": batch * getattr(units["decoder"], kept) if through["decoder"] else 0.0,
        "kept: rewards": batch * units["reward"].kept if through["reward"] else 0.0,
        "the block being recomputed": batch * max(denoiser.block, units["decoder"].block)
        if checkpointed and backward
        else 0.0,
    }


def _graph_depth(calls: Mapping[str, float], recipe: Recipe) -> int:
    """Denoiser calls in one graph: those that share a backward pass (DRaFT's last K steps)."""
    backward = calls.get("denoiser backward", 0.0) + calls.get("denoiser frozen backward", 0.0)
    graphs = calls.get("decoder backward", 0.0)
    return max(1, round(backward / graphs)) if graphs else 1


def levers(recipe: Recipe, made: Plan) -> list[tuple[str, float]]:
    """Changes of the recipe that save memory, with the bytes of one GPU after each alone; the smallest first."""
    model, trainer = recipe.model, recipe.trainer
    changes: list[tuple[str, Recipe]] = []
    if trainer.batch_size > made.gpus:
        changes.append(
            (f"trainer.batch_size={made.gpus}", replace(recipe, trainer=replace(trainer, batch_size=made.gpus)))
        )
    if model.gradient_checkpointing is False:
        changes.append(
            ("model.gradient_checkpointing=true", replace(recipe, model=replace(model, gradient_checkpointing=True)))
        )
    if trainer.ema_decay:
        changes.append(("trainer.ema_decay=0", replace(recipe, trainer=replace(trainer, ema_decay=0.0))))
    found = []
    for name, changed in changes:
        checkpointed = changed.model.gradient_checkpointing is not False
        found.append((name, sum(_memory(changed, made.units, made.calls, made.gpus, checkpointed).values())))
    if model.weights == "full":
        small = replace(recipe, model=replace(model, weights="lora"))
        found.append(("model.weights=lora", plan(small, gpus=made.gpus).bytes))
    if recipe.reward.dtype != "bfloat16" and made.units["reward"].parameters:
        half = made.memory["rewards"] + made.memory["kept: rewards"]
        found.append(("reward.dtype=bfloat16", made.bytes - half / 2))
    return sorted(found, key=lambda pair: pair[1])


def table(recipe: Recipe, made: Plan, *, device: str = "h100", utilisation: float = 0.35) -> str:
    """The plan as lines of text."""
    if device not in DEVICES:
        raise InputError(f"--device: got {device!r}; expected one of {', '.join(DEVICES)}")
    if not 0 < utilisation <= 1:
        raise InputError(f"--utilisation: got {utilisation}; expected above 0 and at most 1")
    tflops, gib = DEVICES[device]
    lines = [
        f"{recipe.algorithm_name} on {recipe.model.name}, {recipe.model.weights}, batch {recipe.trainer.batch_size}, "
        f"{made.gpus} x {device}",
        "",
        f"{'part':10}{'parameters':>12}{'TFLOP an image':>16}{'backward':>10}{'images an update':>18}"
        f"{'with backward':>15}",
    ]
    for part, unit in made.units.items():
        back = made.calls.get(f"{part} backward", 0) + made.calls.get(f"{part} frozen backward", 0)
        ratio = f"{unit.backward / unit.forward:.2f} F" if unit.forward else "-"
        lines.append(
            f"{part:10}{unit.parameters / 1e6:10.1f} M{unit.forward / 1e12:16.4f}{ratio:>10}"
            f"{made.calls.get(part, 0):18.1f}{back:15.1f}"
        )
    lines += [
        "",
        f"an update: {made.flops / 1e12:.3f} TFLOP = {made.passes:.1f} denoiser forwards; "
        f"{made.seconds(tflops, utilisation):.3g} s at {utilisation:.0%} of {tflops} TFLOP/s",
        f"{recipe.trainer.steps} updates: {_duration(made.seconds(tflops, utilisation) * recipe.trainer.steps)} "
        "(previews, evaluation and text encoding not counted)",
        "",
        "GiB on each GPU",
    ]
    lines += [f"  {name:34}{value / GIB:9.3f}" for name, value in made.memory.items() if value]
    lines.append(f"  {'together':34}{made.bytes / GIB:9.3f}  of {gib}, of which 10 to 15 % should stay free")
    if recipe.model.name in PUBLISHED:
        lines.append(
            "  before training, while prompts are encoded: "
            f"{PUBLISHED[recipe.model.name].text_parameters * 2e9 / GIB:.1f} GiB of text encoders"
        )
    if made.bytes > 0.9 * gib * GIB:
        lines += ["", f"This does not fit into {gib} GiB. What helps:"]
        found = levers(recipe, made)
        lines += [
            f"  {name:38}{value / GIB:9.3f} GiB{'  fits' if value <= 0.9 * gib * GIB else ''}"
            for name, value in found
            if value < made.bytes
        ]
        if recipe.model.weights == "full":
            lines.append("  more GPUs (--gpus): trained weights, gradients and moments are shared out")
    return "\n".join([*lines, *([""] if made.notes else []), *(f"note: {note}" for note in made.notes)])


def _duration(seconds: float) -> str:
    unit, name = next(((n, name) for n, name in ((3600, "h"), (60, "min")) if seconds >= 2 * n), (1, "s"))
    return f"{seconds / unit:.3g} {name}"
