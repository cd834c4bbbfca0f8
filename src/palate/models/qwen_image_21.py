"""Qwen-Image-2.1: a rectified-flow transformer over 64-channel latents of 16 x 16 pixels; the words of Qwen3-VL.

Words and image are one sequence, causal but for the image's own tokens, so the image's positions begin where the words
end: prompts of different lengths are different calls. The words are what the language model has before its last norm,
without the system's part of the template. Images have an alpha channel; what is decoded is put on white. The model is
sampled without guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModel, AutoTokenizer

from palate.models.facts import Facts, NetworkCall, Published
from palate.models.families import LoadOptions
from palate.models.latents import LatentLayout
from palate.models.parts import LoadedModel, Options, Parts, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.models.text_cache import Encode
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "qwen-image-21"
PARTS = {
    "transformer": "QwenImage21Transformer2DModel",
    "vae": "AutoencoderKLQwenImage21",
    "text_encoder": "Qwen3VLForConditionalGeneration",
    "processor": "",
    "scheduler": "",
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"  # dropped again
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 4096), zero where the prompt has ended
    mask: Tensor | None  # (B, text_tokens) bool, true for the first so many; None = all


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.context_in_dim, dtype=dtype), None)


FACTS = Facts(
    FAMILY,
    PARTS,
    QwenImage21Transformer2DModel,
    LORA_TARGETS,
    licence="Qwen Research License (non-commercial)",
    licences={"Qwen/Qwen-Image-2.1": "qwen-research"},
    vae=AutoencoderKLQwenImage21,
    layout=LatentLayout(frames=True, alpha=True),
    patch=2,  # it takes single latents; a slot of its mask holds 2 x 2
    lora_loader=QwenImageLoraLoaderMixin,
    published=Published({}, {"z_dim": 64, "dim_mult": [1, 2, 4, 8, 8]}, 1024, 512, _condition, 8.77),
    few_steps="turbo|lightning",
    packs_noise=True,
)


class _MasksHaveValues(TorchFunctionMode):
    """The network reads the values of its masks, which the meta device does not have: on it they are the CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, named)) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in tensors) or all(x.is_meta for x in tensors):
            return func(*args, **named)
        if func in (torch.repeat_interleave, Tensor.repeat_interleave):
            named["output_size"] = int(args[1].sum())
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # places in the stead of a mask
            args = tree_map_only(Tensor, lambda x: x.nonzero()[:, 0] if x.dtype == torch.bool else x, args)
        return func(*tree_map_only(Tensor, lambda x: x.to("meta"), args), **named)


class QwenImage21(LoadedModel):
    """The `Model` protocol over Qwen-Image-2.1, text to image."""

    facts = FACTS
    schedule = staticmethod(flow_schedule)
    default_guidance = 1.0

    def __init__(self, parts: Parts, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__(parts, scheduler)
        self.sigmas: list[float] | None = parts.repository.index.get("sample_sigmas")  # the author's own, unshifted
        self.default_steps = len(self.sigmas) if self.sigmas else 40

    @classmethod
    def load(cls, folder: str | Path, *, text_tokens: int = 512, **options: Unpack[LoadOptions]) -> QwenImage21:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        tokenizer = repository.tokenizer("processor", AutoTokenizer)
        dropped = len(tokenizer(SYSTEM).input_ids)

        def read(prompt: str) -> Any:
            return tokenizer([SYSTEM + USER.format(prompt or " ")], return_tensors="pt")

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            qwen: Any = repository.read("text_encoder", AutoModel, precision).to(where)
            before_norm: list[Tensor] = []
            qwen.language_model.norm.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))

            def encode(prompt: str) -> dict[str, Tensor]:
                tokens = read(prompt).to(where)
                before_norm.clear()
                qwen(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
                text = before_norm[-1][0, dropped : dropped + text_tokens]
                mask = torch.arange(text_tokens, device=where) < len(text)
                return {"text": F.pad(text, (0, 0, 0, text_tokens - len(text))), "mask": mask}

            return encode

        text = TextReader(load_encoders, lambda prompt: len(read(prompt).input_ids[0]) - dropped, text_tokens)
        parts = load_parts(repository, FACTS, text, Options(**options), default_size=1024)
        return cls(parts, FlowMatchEulerDiscreteScheduler.from_config(repository.config("scheduler")))

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([""]), guidance)
        return from_velocity(xt, output, *self.schedule(t))

    @staticmethod
    def output(transformer: Any, xt: Tensor, t: Tensor, cond: Cond, call: NetworkCall) -> Tensor:
        """One call for each length of prompt."""
        height, width = xt.shape[-2:]

        def run(rows: Tensor | slice, length: int) -> Tensor:
            latents, text = xt[rows].flatten(2).transpose(1, 2), cond.text[rows, :length]
            place = torch.device("cpu") if xt.is_meta else xt.device  # its values are read
            image = torch.arange(length + height * width // 4, device=place) >= length
            with _MasksHaveValues() if xt.is_meta else nullcontext():
                tokens = transformer(
                    hidden_states=latents,
                    encoder_hidden_states=text,
                    timestep=t[rows],
                    img_shapes=[[(1, height, width)]] * len(latents),
                    img_mask=image.expand(len(latents), -1),
                ).sample
            return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

        if cond.mask is None:
            return run(slice(None), cond.text.shape[1])
        lengths = cond.mask.sum(1)
        found = torch.empty_like(xt)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            found = found.index_copy(0, rows, run(rows, length).to(found.dtype))
        return found

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): the author's own where there are so many, else even; shifted by size."""
        sigmas = self.sigmas if self.sigmas and len(self.sigmas) == steps else None
        tokens = self.latent_shape[1] * self.latent_shape[2]
        return flow_times(self.scheduler, steps, patches=tokens, even=True, sigmas=sigmas)
