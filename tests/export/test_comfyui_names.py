"""Exports for ComfyUI against its own table of names, by family: it leaves a layer whose name it does not know."""

from __future__ import annotations

import re

import pytest
from support.tiny_families import FAMILIES, load

from palate.export.names import to_form
from palate.models import adapters

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
NET, IN_OUT = ("net.0.proj", "net.2"), ("linear_in", "linear_out")


def names(*kinds: tuple[str, tuple[str, ...]]) -> re.Pattern[str]:
    """transformer.LIST.NUMBER.PART.LAYER, for each (LIST and PART, layers)."""
    every = [f"{blocks}.({'|'.join(map(re.escape, layers))})" for blocks, layers in kinds]
    return re.compile(rf"transformer\.({'|'.join(every)})")


FLUX = (
    (r"transformer_blocks\.\d+\.attn", (*ATTENTION, *ADDED)),
    (r"single_transformer_blocks\.\d+\.attn", ATTENTION[:3]),
)
FEED = r"transformer_blocks\.\d+\.(ff|ff_context)"
KNOWN = {  # comfy/lora.py and comfy/utils.py of ComfyUI, the names after "transformer." that its key map has
    "flux": names(*FLUX, (FEED, NET), (r"single_transformer_blocks\.\d+", ("proj_mlp", "proj_out"))),
    "chroma": names(*FLUX, (FEED, NET), (r"single_transformer_blocks\.\d+", ("proj_mlp", "proj_out"))),
    "flux2-klein": names(FLUX[0], (FEED, IN_OUT),
                         (r"single_transformer_blocks\.\d+\.attn", ("to_qkv_mlp_proj", "to_out"))),
    "sd3": names((r"transformer_blocks\.\d+\.(attn|attn2)", (*ATTENTION, *ADDED))),
    "aura-flow": names((r"joint_transformer_blocks\.\d+\.attn", (*ATTENTION, *ADDED)),
                       (r"single_transformer_blocks\.\d+\.attn", ATTENTION)),
    "pixart-alpha": names((r"transformer_blocks\.\d+\.(attn1|attn2)", ATTENTION)),
    "qwen-image": names((r"transformer_blocks\.\d+\.attn", (*ATTENTION, *ADDED))),  # its own names are diffusers'
    "qwen-image-21": names((r"transformer_blocks\.\d+\.attn", ATTENTION)),
    "krea2": names((r"transformer_blocks\.\d+\.attn", ATTENTION),
                   (r"text_fusion\.(layerwise|refiner)_blocks\.\d+\.attn", ATTENTION)),
    "z-image": names((r"(layers|noise_refiner|context_refiner)\.\d+\.attention", ATTENTION)),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_every_layer_of_the_default_lora_has_a_name_that_comfyui_knows(name):
    """SANA is left out, which ComfyUI does not load; UNets, whose names are kohya's, are in test_lora.py."""
    model = load(name)
    layers = adapters.layers_of(model.weights.network, "policy")
    tensors, _ = to_form(layers, "comfyui", model.facts)
    stems = {key.removesuffix(end) for key in tensors for end in (".lora_A.weight", ".lora_B.weight", ".alpha")
             if key.endswith(end)}  # fmt: skip
    assert len(stems) == len(layers) == FAMILIES[name].adapted and len(tensors) == 3 * len(stems)
    unknown = sorted(stem for stem in stems if not KNOWN[name].fullmatch(stem))
    assert not unknown, f"ComfyUI would leave {unknown}"
