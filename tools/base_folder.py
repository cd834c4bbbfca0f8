"""The base model as a diffusers folder, and a sheet of what it draws.

python tools/base_folder.py .cache/base/model [--out src/palate/assets/emoji]    # put it into the package
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from data import ASSETS, save_grid
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from words import tokenize

from palate.runtime.files import new_folder

PREVIEW = [
    "a 3d dog on a blue background",
    "a flat apple on a white background",
    "a cartoon rocket on a yellow background",
    "an outline octopus on a green background",
    "a 3d robot on a white background",
    "a flat dragon on a pink background",
    "a cartoon ghost on a black background",
    "an outline camera on a yellow background",
    "a cat",
    "a guitar",
    "a heart",
    "a book",
    "a small key at the left on a blue background",
    "a small star at the top on a black background",
    "a blue car on a yellow background",
    "a red butterfly on a white background",
    "a cat to the left of a rocket on a gray background",
    "a tree above a house on a white background",
    "a red apple and a blue car on a white background",
    "a green dinosaur to the right of a purple gift",
    "two 3d dogs on a green background",
    "three apples on a blue background",
    "four cartoon bees on a white background",
    "three flat stars on a purple background",
]


@torch.no_grad()
def preview(unet, text_encoder, tokenizer, vae, path: Path, guidance: float = 3.0, steps: int = 8) -> None:
    """A sheet of PREVIEW, two noises each."""
    prompts = [prompt for prompt in PREVIEW for _ in range(2)]
    x = torch.randn(len(prompts), unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    cond = text_encoder(tokenize(tokenizer, [*prompts, ""])).last_hidden_state
    cond, null = cond[:-1], cond[-1:].expand(len(prompts), -1, -1)
    for t, s in zip(torch.linspace(1, 0, steps + 1)[:-1], torch.linspace(1, 0, steps + 1)[1:], strict=True):
        u, c = unet(torch.cat([x, x]), t * 1000, torch.cat([null, cond])).sample.chunk(2)
        x = x + (s - t) * (u + guidance * (c - u))
    save_grid(vae.decode(x).sample.add(1).div(2).clamp(0, 1), path, columns=8, zoom=2)


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "vae": ["diffusers", "AutoencoderTiny"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}


@torch.no_grad()
def save(networks, ema: dict[str, Tensor], tokenizer, vae, vae_folder: Path, work: Path) -> None:
    """The averaged weights as a diffusers folder (work/model), and a sheet of what they draw (work/grid.png)."""
    raw = {name: p.detach().clone() for name, p in networks.named_parameters()}
    for name, p in networks.named_parameters():
        p.copy_(ema[name])
    preview(networks["unet"], networks["text_encoder"], tokenizer, vae, work / "grid.png")
    folder = work / "model"
    networks["unet"].half().save_pretrained(folder / "unet")
    networks["text_encoder"].half().save_pretrained(folder / "text_encoder")
    networks.float()
    for name, p in networks.named_parameters():
        p.copy_(raw[name])
    shutil.copytree(vae_folder, folder / "vae", dirs_exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=1) + "\n")


def ship(source: Path, out: Path) -> int:
    """Put the model folder `source` in the place of `out`, all weights in float16, without a path of this machine.

    The bytes of what it wrote. Where it fails, `out` stays.
    """
    with new_folder(out) as whole:
        shutil.copytree(source, whole, ignore=shutil.ignore_patterns("vae"), dirs_exist_ok=True)
        AutoencoderTiny.from_pretrained(source / "vae", torch_dtype=torch.float16).save_pretrained(whole / "vae")
        config = whole / "vae/config.json"  # without where it came from, and a key that diffusers complains of
        table = json.loads(config.read_text())
        for key in ("_name_or_path", "block_out_channels"):
            table.pop(key, None)
        config.write_text(json.dumps(table, indent=2) + "\n")
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="what tools/train_base.py wrote")
    parser.add_argument("--out", type=Path, default=ASSETS / "emoji")
    args = parser.parse_args()
    print(f"{ship(args.source, args.out) / 1e6:.1f} MB -> {args.out}")


if __name__ == "__main__":
    main()
