"""The names of Stability's own UNet program, sgm, in which sd-scripts and others write LoRAs of SDXL.

input_blocks.I.J     down_blocks.B.resnets.K or .attentions.K, B and K = divmod(I - 1, n); n = layers a block + 1
middle_block.I       mid_block.resnets.0, .attentions.0, .resnets.1
output_blocks.I.J    up_blocks.B.resnets.K, .attentions.K or .upsamplers.0, B and K = divmod(I, n)
"""

from __future__ import annotations

import re

MIDDLE = ("mid_block_resnets_0", "mid_block_attentions_0", "mid_block_resnets_1")
INSIDE = {  # of a residual block
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
BLOCK = re.compile(r"(input_blocks|output_blocks)_(\d+)_(\d)_(.+)")


def to_diffusers(name: str, layers_per_block: int) -> str:
    """diffusers' name of a layer, its dots written as underscores, for sgm's written so; any other name as it is."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    if found := re.fullmatch(r"middle_block_([012])_(.+)", name):
        return f"{MIDDLE[int(found[1])]}_{INSIDE.get(found[2], found[2])}"
    if not (found := BLOCK.fullmatch(name)):
        return name
    down, inner, rest = found[1] == "input_blocks", int(found[3]), found[4]
    block, layer = divmod(int(found[2]) - down, layers_per_block + 1)
    start = f"{'down' if down else 'up'}_blocks_{block}"
    if rest in ("op", "conv"):
        return f"{start}_{'downsamplers' if down else 'upsamplers'}_0_conv"
    return f"{start}_{('resnets', 'attentions')[min(inner, 1)]}_{layer}_{INSIDE.get(rest, rest)}"
