"""A run folder as the trainer leaves it, drawn without a model, and a reader of the pages that are made of it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw

from palate import evaluate
from palate import runs as folders

HOSTILE = (
    "<script>alert(1)</script> \"' onload=x {{ 7*7 }} {% raw %} \x1b[31mred \u202eevil \x00 </td><img src=http://x/y>"
)


def sketch(i: int, share: float, size: int = 64) -> Image.Image:
    """A ball on a coloured ground; `share` adds shading, as a "3d" style would."""
    ground = [(88, 140, 220), (240, 200, 80), (110, 190, 130), (230, 120, 140), (150, 120, 210), (90, 90, 100)][i % 6]
    image = Image.new("RGB", (size, size), ground)
    draw = ImageDraw.Draw(image)
    x, y, r = 20 + 7 * (i % 4), 26 + 5 * (i % 3), 15 + i % 5
    for k in range(r, 0, -1):
        glow = int(90 * share * (1 - k / r))
        offset = share * (r - k) * 0.35
        colour = tuple(min(255, c + glow) for c in ((200, 60, 50), (250, 240, 230), (60, 70, 160))[i % 3])
        draw.ellipse([x - k - offset + 8, y - k - offset + 6, x + k - offset + 8, y + k - offset + 6], fill=colour)
    return image


def pixels(images: list[Image.Image]) -> torch.Tensor:
    stacked = torch.stack([torch.tensor(list(image.tobytes())).view(64, 64, 3) for image in images])
    return stacked.permute(0, 3, 1, 2).float() / 255


def fake_run(
    folder,
    *,
    prompts=("an apple on a blue background", "a dog", "a fox, small", "a bicycle on green"),
    seeds=(0,),
    lift=1.0,
    steps=5,
):
    """A run folder as the trainer leaves it, with an evaluation by stand-in judges."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "run": {"folder": f"runs/{folder.name}"},
        "model": {"name": "emoji"},
        "algorithm": {"name": "srpo", "positive": ["3d"], "negative": ["flat", "outline"]},
        "reward": {"name": "emoji"},
        "trainer": {"steps": 40, "batch_size": 16, "lr": 1e-5, "seed": 0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11", "threads": 2, "versions": {"torch": "2.13.0"}})
    )
    words, numbers = evaluate.pairs(prompts, seeds)
    for k in range(steps):
        images = pixels([sketch(i, lift * k / (steps - 1)) for i in range(len(words))])
        folders.write_samples(folder / f"samples/step-{10 * k:06d}", images, words, numbers, guidance=3.0, steps=8)
    rows = []
    for step in range(41):
        if step:
            wave = 0.05 * math.sin(step * 1.7)
            rows.append(
                {
                    "event": "step",
                    "step": step,
                    "reward_denoise": lift * step / 40 + wave,
                    "reward_inversion": 0.3 - 0.2 * step / 40,
                }
            )
        if step == 20:
            rows.append({"event": "steer", "step": 20, "positive": ["outline"], "negative": ["3d"]})
        if step % 5 == 0:
            s = 1 / (1 + math.exp(-(step - 12) / 4)) * lift
            row = {
                "event": "guard",
                "step": step,
                "verdict": "ok",
                "reward": 20 + 2 * s,
                "heldout": 18 + 0.8 * s - 0.6 * s * s,
            }
            row |= {
                "style/3d": 0.1 + 0.8 * s,
                "style/flat": 0.5 - 0.45 * s,
                "style/outline": 0.2 - 0.15 * s,
                "style/noto": 0.2 - 0.2 * s,
            }
            row |= {
                "concept": 0.98 - 0.03 * s,
                "background": 0.99 - 0.01 * s,
                "diversity": 0.3 - 0.03 * s,
                "saturation": 0.5 + 0.02 * s,
            }
            if step == 35:
                row |= {"verdict": "concept fell by 0.06 (limit 0.05)", "action": "rollback"}
            rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    many = evaluate.pairs(prompts, range(4))
    for side, share in (("base", 0.0), ("result", lift)):
        images = pixels([sketch(i, share) for i in range(len(many[0]))])
        folders.write_samples(folder / "evaluation" / side, images, *many, guidance=3.0, steps=8)
    result = folders.evaluate_samples(
        folder / "evaluation/result", base_folder=folder / "evaluation/base", panel=referee()
    )
    result |= {"optimised": ["emoji-relative", "emoji"], "heldout": "emoji-heldout"}
    result["words"] = {"positive": ["3d"], "negative": ["flat", "outline"]}
    result["verdict"] = evaluate.verdict(result["metrics"], result["optimised"], "emoji-heldout", result["failed"])
    (folder / "evaluation.json").write_text(evaluate.to_json(result))
    return folder


class FakeClassifier:
    styles, concepts = ["3d", "flat"], ["apple", "dog"]
    features = staticmethod(lambda images: torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))
    concept = staticmethod(lambda images: torch.zeros(len(images), dtype=torch.long))
    style = staticmethod(lambda images: (images.std((1, 2, 3)) < 0.22).long())


def all_blue(images):
    return torch.zeros(len(images))


def referee():
    bright = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    rewards = {
        "emoji": bright,
        "emoji-relative": lambda i, p: i.amax((1, 2, 3)),
        "emoji-heldout": lambda i, p: i[:, 0].std((1, 2)),
    }

    def parse(prompt):
        return SimpleNamespace(concept="apple" if "apple" in prompt else None, style=None, background=None)

    return evaluate.EvaluationPanel(rewards, "emoji-heldout", FakeClassifier(), parse, all_blue, ["blue"])


class Page(HTMLParser):
    """Tags, the addresses they load and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sources, self.handlers, self.alts, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.alts += [value for name, value in attributes if name == "alt"]

    def handle_data(self, data):
        self.text += data
