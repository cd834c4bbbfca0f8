"""The embedded model: a small latent rectified flow over emoji, an ordinary diffusers folder inside the package.

UNet2DConditionModel on AutoencoderTiny latents (C, 16, 16) of 64 x 64 images, a CLIPTextModel for the words. The
network outputs velocity = eps - x0 at time 1000 t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from palate.models import delta
from palate.models.facts import Facts
from palate.models.options import Options, place_of
from palate.models.quiet import quietly
from palate.models.vocabulary import known_words, with_words
from palate.models.weights import NamedWeights
from palate.path import Prediction, flow_schedule, from_velocity
from palate.runtime.errors import InputError

FAMILY = "emoji"
LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "time_emb_proj",
)


FACTS = Facts(
    FAMILY,
    {"unet": "UNet2DConditionModel", "vae": "AutoencoderTiny", "text_encoder": "CLIPTextModel", "tokenizer": ""},
    UNet2DConditionModel,
    LORA_TARGETS,
    licence="Apache-2.0 (Palate)",
    licences={"emoji": "apache-2.0"},
    vae=AutoencoderTiny,
)

PLAIN = Options()


class EmojiModel:
    """The `Model` protocol over the embedded weights, or over a folder of the same layout."""

    facts = FACTS
    schedule = staticmethod(flow_schedule)
    image_size = 64
    default_steps = 8
    default_guidance = 3.0

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerFast,
        vae: AutoencoderTiny,
        options: Options = PLAIN,
    ):
        self.folder: Path | None = None  # where the parts came from
        # on the processor unless it is told otherwise: so small that a run there is soon done, and bit for bit the same
        self.device = torch.device("cpu") if options.device is None else place_of(options.device)
        self._fingerprint = _digest(unet, text_encoder, vae)
        self.text_encoder = text_encoder.eval().requires_grad_(False).to(self.device)
        self.tokenizer = tokenizer
        self.vae = vae.eval().requires_grad_(False).to(self.device)
        self.latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.training = options.training
        self.weights = NamedWeights(
            unet.eval().to(self.device),
            training=options.training,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            targets=options.lora_targets or LORA_TARGETS,
            names=options.names,
            facts=FACTS,
        )
        self._null = self._encode([""])

    @classmethod
    def load(
        cls,
        folder: Path | str | None = None,
        *,
        training: str = "lora",
        lora_rank: int = 16,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
        names: Sequence[str] = ("policy",),
        device: str | None = None,
    ) -> EmojiModel:
        """The embedded model, or one of the same layout from a diffusers folder. Weights are kept in float32.

        A folder may hold the UNet as its difference from the embedded one, and leave out other parts that are the same.
        names: what can be trained, `NamedWeights`' names; all begin as the reference. device: None = the processor.
        """
        embedded = Path(str(files("palate") / "assets/emoji"))
        folder = embedded if folder is None else _packaged(Path(folder))
        packed = (folder / delta.FILE).is_file()
        if not packed and not (folder / "unet").is_dir():
            raise InputError(
                f"model.folder {folder} is not a diffusers folder (no unet in it); leave it out for the embedded model"
            )
        try:
            own = {
                part: folder / part if (folder / part).is_dir() else embedded / part
                for part in ("unet", "text_encoder", "tokenizer", "vae")
            }
            with quietly(folder):
                parts = (
                    UNet2DConditionModel.from_pretrained(own["unet"], torch_dtype=torch.float32),
                    CLIPTextModel.from_pretrained(own["text_encoder"], dtype=torch.float32),
                    PreTrainedTokenizerFast.from_pretrained(own["tokenizer"]),
                    AutoencoderTiny.from_pretrained(own["vae"], torch_dtype=torch.float32),
                )
        except (OSError, SafetensorError) as error:
            raise InputError(f"model.folder {folder} could not be read: {error}") from error
        if packed:
            parts[0].load_state_dict(delta.load(folder, parts[0].state_dict()))
        model = cls(*parts, Options(training, lora_rank, lora_alpha, lora_targets, names, device=device))
        model.folder = folder
        return model

    def while_training(self) -> AbstractContextManager[None]:
        """Inside, the model is what it trains as: with the adapter of `model.training_adapter`."""
        return self.weights.selection.while_training()

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        """Inside, the policy's LoRA counts so many times: 0 = the base model, 1 = as trained."""
        return self.weights.selection.at_strength(strength)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        lines = [" ".join(known_words(prompt)) for prompt in prompts]
        length = self.text_encoder.config.max_position_embeddings
        ids = self.tokenizer(lines, padding="max_length", max_length=length, return_tensors="pt").input_ids
        with torch.no_grad():
            return self.text_encoder(ids.to(self.device)).last_hidden_state

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, words, width). ValueError for words outside the vocabulary; "" is the unconditional prompt."""
        return self._encode(prompts)

    def with_words(self, prompt: str, words: Sequence[str]) -> str:
        """The prompt with the words of style, size and background whose kind it does not name."""
        return with_words(prompt, words, replacing=False)

    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images.to(self.device) * 2 - 1).latents

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.device)).sample.add(1).div(2).clamp(0, 1)

    def predict(
        self, xt: Tensor, t: Tensor, cond: Tensor, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        alpha, sigma = self.schedule(t)
        with self.weights.using(weights) as unet:
            if guidance == 1.0:
                velocity = unet(xt, t * 1000, cond).sample
            else:
                null = self._null.expand(len(xt), -1, -1)
                both = unet(torch.cat([xt, xt]), torch.cat([t, t]) * 1000, torch.cat([null, cond])).sample
                unconditional, conditional = both.chunk(2)
                velocity = unconditional + guidance * (conditional - unconditional)
        return from_velocity(xt, velocity, alpha, sigma)

    def parameters(self, weights: str = "policy") -> list[nn.Parameter]:
        return self.weights.parameters(weights)

    def load_consistency(self, folder: Path | str | None = None) -> None:
        """Give the model the frozen weights "consistency": their x0 is where the base's guided ODE ends, at guidance 1.

        A LoRA over the base, from `folder` or from the package; tools/train_consistency.py distils one.
        """
        folder = Path(str(files("palate") / "assets/emoji-consistency")) if folder is None else Path(folder)
        if not folder.is_dir():
            raise InputError(
                f"there is no consistency model in {folder}; distil one with tools/train_consistency.py "
                "and name its folder in model.consistency, or use another estimator (tweedie, rollout-2)"
            )
        self.weights.add_frozen(folder, "consistency")

    def fingerprint(self) -> str:
        """SHA-256 of the base weights, adapters not included."""
        return self._fingerprint

    def save_adapter(self, folder: Path | str) -> None:
        """What was trained: the policy's LoRA file (full training: its unet folder), other names in folders below."""
        self.weights.save_all(folder)

    def reset(self, seed: int = 0) -> None:
        """Untrained again, so that the same object can be trained once more from the start."""
        self.weights.reset(seed)

    def load_adapter(self, folder: Path | str) -> None:
        """Read back what `save_adapter` wrote, into a model of the same training mode, rank and names."""
        self.weights.load_all(folder)


def _packaged(folder: Path) -> Path:
    """The folder, or the one of that name in the package (emoji-1step)."""
    own = Path(str(files("palate") / "assets" / folder.name))
    return own if len(folder.parts) == 1 and not folder.is_dir() and own.is_dir() else folder


def _digest(*modules: nn.Module) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
