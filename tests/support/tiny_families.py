"""Tiny random pipelines of the real diffusers and transformers classes, tokenizers included, made in code.

`saved(name)` writes one in the ordinary diffusers layout, so that tests load it as a user would.
"""

from __future__ import annotations

import functools
import json
import shutil
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from palate.models.aura_flow import AuraFlow
from palate.models.chroma import Chroma
from palate.models.flux import Flux
from palate.models.flux2 import Flux2
from palate.models.krea2 import Krea2
from palate.models.pixart import PixArt
from palate.models.qwen_image import QwenImage
from palate.models.qwen_image_21 import QwenImage21
from palate.models.sana import Sana
from palate.models.sd3 import StableDiffusion3
from palate.models.sdxl import StableDiffusionXL
from palate.models.stable_diffusion import StableDiffusion
from palate.models.z_image import ZImage

SIZE = 16  # pixels; latents are (4, 8, 8)
LETTERS = string.ascii_lowercase + string.digits + ",."
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


class Family(NamedTuple):
    model: type
    pipeline: Callable[[], Any]
    load: dict[str, Any]  # what a tiny one needs beside the folder
    adapted: int  # modules that the default LoRA targets match
    scale: int = 1  # its images are so many times SIZE


def clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", "!", *LETTERS, *(c + "</w>" for c in LETTERS)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=40)


def save_clip(folder: Path) -> Path:
    """A transformers folder of a tiny CLIP, as clip-score and pickscore are given."""
    tokenizer = clip_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(
        text_config={**size, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=8,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def clip(projection: bool = False) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=3 + 2 * len(LETTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, additional_special_tokens=None, model_max_length=512)


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=4 + len(LETTERS), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def qwen_tokenizer(dev: bool = False) -> Qwen2Tokenizer:
    tokens = ["<|endoftext|>", "Ġ", "Ċ", ":", *LETTERS]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    content = "m.content[0].text" if dev else "m.content"
    end = "" if dev else "assistant:"
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ {content} }}}}\n{{% endfor %}}{end}"
    return tokenizer


def qwen(layers: int = 2, kind: type = Qwen3Model) -> Any:
    return kind(
        Qwen3Config(
            vocab_size=4 + len(LETTERS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def vae(**constants: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIZE,
        **constants,
    )


def unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **{"cross_attention_dim": 16, **more},
    )


def stable_diffusion(**scheduler: Any) -> diffusers.StableDiffusionPipeline:
    settings = {**VP, "set_alpha_to_one": False, "steps_offset": 1, **scheduler}
    kind = DDIMScheduler if scheduler else PNDMScheduler
    settings |= {"clip_sample": False} if scheduler else {"skip_prk_steps": True}
    return diffusers.StableDiffusionPipeline(
        vae(scaling_factor=0.18215),
        clip(),
        clip_tokenizer(),
        unet(),
        kind(**settings),
        None,
        None,
        requires_safety_checker=False,
    )


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    network = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
    )
    scheduler = EulerDiscreteScheduler(**VP, steps_offset=1, timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(
        vae(scaling_factor=0.13025),
        clip(),
        clip(projection=True),
        clip_tokenizer(),
        clip_tokenizer(),
        network,
        scheduler,
    )


def sd3(with_t5: bool = True) -> diffusers.StableDiffusion3Pipeline:
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return diffusers.StableDiffusion3Pipeline(
        network,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(scaling_factor=1.5305, shift_factor=0.0609),
        clip(projection=True),
        clip_tokenizer(),
        clip(projection=True),
        clip_tokenizer(),
        t5() if with_t5 else None,
        t5_tokenizer() if with_t5 else None,
    )


def flux(distilled: bool = True) -> diffusers.FluxPipeline:
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=distilled,
    )
    dev = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    scheduler = FlowMatchEulerDiscreteScheduler(**(dev if distilled else {"shift": 1.0}))
    return diffusers.FluxPipeline(
        scheduler,
        vae(scaling_factor=0.3611, shift_factor=0.1159),
        clip(),
        clip_tokenizer(),
        t5(),
        t5_tokenizer(),
        network,
    )


def pixart(sigma: bool = False) -> diffusers.PixArtAlphaPipeline:
    network = PixArtTransformer2DModel(
        sample_size=8 if sigma else 128,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        caption_channels=32,
        norm_num_groups=4,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    return kind(t5_tokenizer(), t5(), vae(scaling_factor=0.13025), network, scheduler)


def z_image() -> diffusers.ZImagePipeline:
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    for token in (network.x_pad_token, network.cap_pad_token):  # left uninitialised by their class
        torch.nn.init.normal_(token)
    return diffusers.ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(scaling_factor=0.3611, shift_factor=0.1159),
        qwen(),
        qwen_tokenizer(),
        network,
    )


def flux2(kind: str = "klein") -> Any:
    """klein, klein-base (guidance), or dev, whose language model is another."""
    network = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=kind == "dev",
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIZE,
    )
    autoencoder.bn.running_mean.normal_(std=0.3)
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if kind == "dev":
        return diffusers.Flux2Pipeline(scheduler, autoencoder, mistral(), qwen_tokenizer(dev=True), network)
    encoder = qwen(layers=28, kind=Qwen3ForCausalLM)
    return diffusers.Flux2KleinPipeline(
        scheduler, autoencoder, encoder, qwen_tokenizer(), network, is_distilled=kind == "klein"
    )


def mistral() -> Mistral3ForConditionalGeneration:
    text = {
        "vocab_size": 4 + len(LETTERS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 31,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "model_type": "mistral",
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
        "model_type": "pixtral",
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=3))


def qwen_image() -> diffusers.QwenImagePipeline:
    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    text = {
        "vocab_size": 4 + len(LETTERS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=0.9)
    return diffusers.QwenImagePipeline(scheduler, qwen_vae(), encoder, qwen_tokenizer(), network)


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    )


def qwen_vl(layers: int, kind: type = Qwen3VLModel) -> Any:
    text = {
        "vocab_size": 8 + len(LETTERS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
    model: Any = kind(Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}))
    language = model.language_model if kind is Qwen3VLModel else model.model.language_model
    torch.nn.init.uniform_(language.norm.weight, 0.3, 3.0)  # born as ones, it would leave no trace
    return model


def krea2(distilled: bool = False) -> diffusers.Krea2Pipeline:
    network = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400)
    return diffusers.Krea2Pipeline(
        scheduler,
        qwen_vae(),
        qwen_vl(layers=4),
        qwen_tokenizer(),
        network,
        text_encoder_select_layers=(1, 2, 4),
        is_distilled=distilled,
    )


def words_of_a_processor() -> Any:
    """A tokenizer that answers as the processor around it does: its image half needs a library that is not here."""
    asked = {
        "tokenizer": property(lambda self: self),
        "apply_chat_template": lambda self, *args, **named: [Qwen2Tokenizer.apply_chat_template(self, *args, **named)],
    }
    tokens = ["<|endoftext|>", "Ġ", "Ċ", ":", "<", ">", "|", *LETTERS]
    made = type("Qwen2Tokenizer", (Qwen2Tokenizer,), asked)(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    made.add_tokens(["<|image_pad|>"], special_tokens=True)
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"
    )
    return made


def qwen_image_21(sigmas: list[float] | None = None) -> diffusers.QwenImage21Pipeline:
    network = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    autoencoder = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9)
    encoder = qwen_vl(layers=2, kind=Qwen3VLForConditionalGeneration)
    return diffusers.QwenImage21Pipeline(
        scheduler, autoencoder, encoder, words_of_a_processor(), network, sample_sigmas=sigmas
    )


def chroma() -> diffusers.ChromaPipeline:
    network = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    autoencoder = vae(scaling_factor=0.3611, shift_factor=0.1159)
    return diffusers.ChromaPipeline(scheduler, autoencoder, t5(), t5_tokenizer(), network)


def sana() -> diffusers.SanaPipeline:
    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41407,
    )
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=4 + len(LETTERS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2
    )
    return diffusers.SanaPipeline(t5_tokenizer(), encoder, autoencoder, network, scheduler)


def aura_flow() -> diffusers.AuraFlowPipeline:
    network = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    for parameter in network.parameters():  # as they are born, its gates leave no trace of the words
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=4 + len(LETTERS), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return diffusers.AuraFlowPipeline(t5_tokenizer(), encoder, vae(scaling_factor=0.13025), network, scheduler)


V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FAMILIES = {
    "stable-diffusion": Family(StableDiffusion, stable_diffusion, {}, 32),
    "stable-diffusion-v": Family(StableDiffusion, lambda: stable_diffusion(**V), {}, 32),
    "sdxl": Family(StableDiffusionXL, sdxl, {}, 32),
    "sd3": Family(StableDiffusion3, sd3, {"text_tokens": 32}, 19),
    "flux": Family(Flux, flux, {"text_tokens": 32, "image_size": SIZE}, 15),
    "flux-schnell": Family(Flux, lambda: flux(distilled=False), {"text_tokens": 32, "image_size": SIZE}, 15),
    "pixart-alpha": Family(PixArt, pixart, {"text_tokens": 32, "image_size": SIZE}, 16),
    "pixart-sigma": Family(PixArt, lambda: pixart(sigma=True), {"text_tokens": 32}, 16),
    "aura-flow": Family(AuraFlow, aura_flow, {"text_tokens": 32, "image_size": SIZE}, 16),
    "flux2-klein": Family(Flux2, flux2, {"text_tokens": 48, "image_size": SIZE}, 16),
    "flux2-base": Family(Flux2, lambda: flux2("base"), {"text_tokens": 48, "image_size": SIZE}, 16),
    "flux2-dev": Family(Flux2, lambda: flux2("dev"), {"text_tokens": 256, "image_size": SIZE}, 16),
    "qwen-image": Family(QwenImage, qwen_image, {"text_tokens": 256, "image_size": SIZE}, 16),
    "qwen-image-21": Family(QwenImage21, qwen_image_21, {"text_tokens": 100, "image_size": 4 * SIZE}, 8, 4),
    "krea2": Family(Krea2, krea2, {"text_tokens": 256, "image_size": SIZE}, 16),
    "krea2-turbo": Family(Krea2, lambda: krea2(distilled=True), {"text_tokens": 256, "image_size": SIZE}, 16),
    "chroma": Family(Chroma, chroma, {"text_tokens": 32, "image_size": SIZE}, 15),
    "sana": Family(Sana, sana, {"text_tokens": 32, "image_size": SIZE}, 16),
    "z-image": Family(ZImage, z_image, {"text_tokens": 48, "image_size": SIZE}, 16),
}


_HOME = tempfile.TemporaryDirectory(prefix="palate-tiny-")


@functools.cache
def saved(name: str) -> tuple[Path, Any]:
    """The folder of the tiny pipeline of that name, written once, and the pipeline itself. Leave both as they are."""
    torch.manual_seed(sum(map(ord, name)))
    pipeline = FAMILIES[name].pipeline()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    folder = Path(_HOME.name) / name
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return folder, pipeline


def load(name: str, folder: Path | None = None, **options: Any) -> Any:
    """Palate's model of that name, loaded as a user would; float32 on the CPU unless told otherwise."""
    family, folder = FAMILIES[name], folder or saved(name)[0]
    text = Path(_HOME.name) / "text"
    settings = {"dtype": "float32", "device": "cpu", "lora_rank": 4, "text_cache": text, **family.load}
    torch.manual_seed(0)  # the LoRA's first weights
    return family.model.load(folder, **{**settings, **options})


@functools.cache
def wide(name: str) -> Path:
    """The folder of the same pipeline with another denoiser, random and at least 64 wide, so that a row of a layer's
    weights is whole blocks of four-bit numbers, as in every published network. Leave it as it is."""
    folder = Path(_HOME.name) / f"{name}-wide"
    shutil.copytree(saved(name)[0], folder)
    torch.manual_seed(sum(map(ord, name)))  # after `saved`, which may draw: the same network whoever asked first
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    config = json.loads((folder / part / "config.json").read_text())
    times = 8 if part == "unet" or name.startswith("pixart") else 4
    for key in ("num_attention_heads", "num_cross_attention_heads", "num_key_value_heads", "caption_projection_dim",
                "n_heads", "n_kv_heads", "dim"):  # fmt: skip
        if config.get(key):
            config[key] *= times
    if "block_out_channels" in config:
        config["block_out_channels"] = [width * times for width in config["block_out_channels"]]
    if "caption_channels" in config:
        config["cross_attention_dim"] *= times
    network = getattr(diffusers, config["_class_name"]).from_config(config)
    if name == "aura-flow":  # as it is born its gates leave no trace of the words
        for p in network.parameters():
            torch.nn.init.normal_(p, 0, 0.15 / times**0.5)
    network.save_pretrained(folder / part)
    return folder
