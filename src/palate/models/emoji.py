"""The embedded model: a small latent rectified flow over emoji, an ordinary diffusers folder inside the package.

UNet2DConditionModel on AutoencoderTiny latents (6, 16, 16) of 64 x 64 images, a CLIPTextModel for the words. The network
outputs velocity = eps - x0 at time 1000 t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from palate.models.weights import NamedWeights
from palate.path import Prediction, flow_schedule, from_velocity
from palate.vocabulary import known_words

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1",
                "conv2", "time_emb_proj")


class EmojiModel:
    """The `Model` protocol over the embedded weights, or over a folder of the same layout."""

    schedule = staticmethod(flow_schedule)
    image_size = 64
    default_steps = 8
    default_guidance = 3.0

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerFast,
                 vae: AutoencoderTiny, *, training: str = "lora", lora_rank: int = 16, lora_alpha: float | None = None):
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.vae = vae.eval().requires_grad_(False)
        self._fingerprint = _digest(unet, text_encoder, vae)
        self.latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.training = training
        self.weights = NamedWeights(unet.eval(), training=training, rank=lora_rank, alpha=lora_alpha,
                                    targets=LORA_TARGETS)
        self._null = self._encode([""])

    @classmethod
    def load(cls, folder: Path | str | None = None, *, training: str = "lora", lora_rank: int = 16,
             lora_alpha: float | None = None) -> EmojiModel:
        """The embedded model, or one of the same layout from a diffusers folder. Weights are kept in float32."""
        folder = Path(str(files("palate") / "assets/emoji")) if folder is None else Path(folder)
        if not (folder / "unet").is_dir():
            raise ValueError(f"model.folder {folder} is not a diffusers folder (no unet in it); leave it out for the "
                             "embedded model")
        try:
            parts = (
                UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
                CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
                PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
                AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32),
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"model.folder {folder} could not be read: {error}") from error
        return cls(*parts, training=training, lora_rank=lora_rank, lora_alpha=lora_alpha)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        lines = [" ".join(known_words(prompt)) for prompt in prompts]
        length = self.text_encoder.config.max_position_embeddings
        ids = self.tokenizer(lines, padding="max_length", max_length=length, return_tensors="pt").input_ids
        with torch.no_grad():
            return self.text_encoder(ids).last_hidden_state

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, words, width). ValueError for words outside the vocabulary; "" is the unconditional prompt."""
        return self._encode(prompts)

    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images * 2 - 1).latents

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample.add(1).div(2).clamp(0, 1)

    def predict(self, xt: Tensor, t: Tensor, cond: Tensor, *, guidance: float = 1.0,
                weights: str = "policy") -> Prediction:
        alpha, sigma = self.schedule(t)
        with self.weights.speaking_as(weights) as unet:
            if guidance == 1.0:
                velocity = unet(xt, t * 1000, cond).sample
            else:
                null = self._null.expand(len(xt), -1, -1)
                both = unet(torch.cat([xt, xt]), torch.cat([t, t]) * 1000, torch.cat([null, cond])).sample
                unconditional, conditional = both.chunk(2)
                velocity = unconditional + guidance * (conditional - unconditional)
        return from_velocity(xt, velocity, alpha, sigma)

    def parameters(self, weights: str = "policy") -> list[nn.Parameter]:
        return self.weights.parameters if weights == "policy" else []

    def fingerprint(self) -> str:
        """SHA-256 of the base weights, adapters not included."""
        return self._fingerprint

    def save_adapter(self, folder: Path | str) -> None:
        """What was trained: a diffusers LoRA file, or with full training a diffusers unet folder."""
        if self.training == "lora":
            self.weights.network.save_lora_adapter(folder, adapter_name="policy")
        else:
            self.weights.network.save_pretrained(folder)

    def load_adapter(self, folder: Path | str) -> None:
        """Read back what `save_adapter` wrote, into a model of the same training mode and rank."""
        if self.training == "lora":
            path = Path(folder) / "pytorch_lora_weights.safetensors"
        else:
            path = Path(folder) / "diffusion_pytorch_model.safetensors"
        if not path.exists():
            raise ValueError(f"no {path.name} in {folder}; expected the adapter folder of a {self.training} run")
        network = self.weights.network
        own = {name: p for name, p in network.named_parameters() if p.requires_grad}
        saved = load_file(path)
        if self.training == "lora":
            saved = {name.replace(".lora_A.", ".lora_A.policy.").replace(".lora_B.", ".lora_B.policy."): tensor
                     for name, tensor in saved.items()}
        if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in saved.items()}:
            raise ValueError(f"the adapter in {folder} does not fit this model: another rank, target or architecture")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])


def _digest(*modules: nn.Module) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
