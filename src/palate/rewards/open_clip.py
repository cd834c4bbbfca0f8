"""OpenCLIP's ViT-H/14, as transformers spells it: its configuration and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPConfig

from palate.runtime.errors import InputError


def vit_h_14() -> CLIPConfig:
    """OpenCLIP's ViT-H-14 in transformers' terms."""
    text = {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 0,
        "projection_dim": 1024,
    }
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


_RENAMED = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # transformers' spelling
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
_IN_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's tensors under transformers' CLIPModel names: in_proj split in q, k, v; both projections transposed."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "attn_mask":  # a constant buffer of older files
            continue
        prefix = max((p for p in _RENAMED if name.startswith(p)), key=len, default=None)
        if prefix is None:
            raise InputError(
                f"{name} is no tensor of an OpenCLIP ViT; expected visual.*, transformer.*, text_projection, ..."
            )
        new = _RENAMED[prefix] + name[len(prefix) :]
        if ".attn.in_proj_" in new:
            stem, kind = new.split(".attn.in_proj_")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{stem}.self_attn.{part}_proj.{kind}"] = piece.contiguous()
            continue
        for old, now in _IN_BLOCK.items():
            new = new.replace(old, now)
        converted[new] = tensor.T.contiguous() if prefix in ("text_projection", "visual.proj") else tensor
    return converted
