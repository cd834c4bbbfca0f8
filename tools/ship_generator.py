"""Put a one-step generator into the package: src/palate/assets/emoji-1step.

    palate export RUN --format one-step
    python tools/ship_generator.py RUN/export/one-step

Only the UNet is kept, as its eight-bit difference from the embedded base model's (`palate.models.delta`); the other
parts are the base model's own. Prints, and writes into the card, how far that moves the pictures.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from data import ASSETS
from diffusers import UNet2DConditionModel

from palate import recipe
from palate.evaluate import generate
from palate.export import load_one_step
from palate.models import delta
from palate.models.emoji import EmojiModel
from palate.runtime.files import new_folder


def ship(source: Path, out: Path, history: str = "") -> dict[str, float]:
    """Write `out`; what was packed, judged by the images of 32 prompts. history: of the runs before, for the card."""
    base = EmojiModel.load(training="none").weights.networks["reference"].state_dict()
    weights = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=torch.float32).state_dict()
    with new_folder(out) as whole:  # where it fails, `out` stays
        shutil.copy(source / "generator.json", whole / "generator.json")
        delta.save(whole, weights, base)
    prompts = recipe.evenly_spaced(recipe.read_prompts("emoji-eval"), 32)
    (before, sampler), (after, _) = load_one_step(source), load_one_step(out)
    images = [generate(model, prompts, (0,), sampler=sampler) for model in (before, after)]
    apart = (images[0] - images[1]).abs()
    found = {
        "megabytes": (out / delta.FILE).stat().st_size / 1e6,
        "mean_difference": float(apart.mean()),
        "largest_difference": float(apart.max()),
    }
    trained = source.parent.parent / "recipe.yaml"
    (out / "README.md").write_text(
        CARD.format(
            label=json.loads((out / "generator.json").read_text())["t_init"],
            history=history,
            **found,
            recipe=published(trained.read_text()) if trained.is_file() else "# not known",
        )
    )
    return found


def published(text: str) -> str:
    """A recipe without the folders of the machine it ran on."""
    return re.sub(r"^(  (?:start|folder): )/.*$", r"\1an earlier run", text.rstrip(), flags=re.MULTILINE)


CARD = """# emoji-1step: the embedded one-step generator

Trained with Diff-Instruct* from the embedded base model (`emoji`), on prompts only. It draws in one network
evaluation without guidance, from noise at time {label}; the base model takes 16.

    palate sample --model emoji-1step --prompt "a 3d dog on a blue background"
    palate train distar-emoji-quick                                    # trains it on
    palate train srpo-emoji model.weights=full model.start=emoji-1step # begins another method with its weights

`delta.safetensors` ({megabytes:.1f} MB) is the UNet's difference from the base model's, eight bits a weight; text
encoder, tokenizer and VAE are the base model's. Packing moves a pixel by {mean_difference:.1e} on average and by
{largest_difference:.3f} at most (32 prompts, of 1). Figures against the teacher: docs/algorithms/distar.md,
`python benchmarks/distar.py teacher emoji-1step`.

It knows what the base model knows, with its faults. Licence: as the base model's, see ../README.md. {history}The recipe
of its last run:

```yaml
{recipe}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="what `palate export RUN --format one-step` wrote")
    parser.add_argument("--out", type=Path, default=ASSETS / "emoji-1step")
    parser.add_argument("--history", default="", help="of the runs before the last, for the card: a sentence or two")
    args = parser.parse_args()
    print(json.dumps(ship(args.source, args.out, args.history and f"{args.history} ")))


if __name__ == "__main__":
    main()
