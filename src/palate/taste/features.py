"""What a taste sees of a picture: frozen, differentiable columns in named blocks.

    colour   22 statistics of the pixels, of the border (the background) and of the drawing in front of it
    words    what a two-tower reward says about known words of style, size and background, given the picture's concept
    tower    the reward's own unit image features
    pairs    for a reward without a vocabulary: what it says about pairs of opposite words ("a dark picture", ...)

Standardisation: z_k = (f_k - mean_k) / s_k with s_k the standard deviation inside a prompt on unlabelled pictures; each
block is then divided by the root of its total variance and the whole multiplied by sqrt(D / blocks), so that a typical
z'z is D and every block weighs the same. The constants are frozen with the taste.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from palate.core import Reward, TwoTower
from palate.models.vocabulary import parse_prompt, vocabulary
from palate.rewards.clip import ClipReward
from palate.rewards.simple import border, colourfulness, luma, saturation
from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically

EDGE, SOFT = 0.15, 40.0  # distance from the border's colour at which the drawing begins; steepness of that edge
FEW_PIXELS = 16.0  # added to the drawing's mass in a division by it
SHARPNESS = 4.0  # weight of the words' softmax beside their centred logits
SAME = 0.1  # mean change of the probe's columns, in standard deviations, below which a tower is the same
MINIMUM_STD = 1e-6  # of a column; one that does not vary says nothing

COLOUR_COLUMNS = (
    *(f"{c} light" for c in ("red", "green", "blue")), *(f"contrasts in {c}" for c in ("red", "green", "blue")),
    *(f"{c} light in the background" for c in ("red", "green", "blue")),
    *(f"{c} light in the drawing" for c in ("red", "green", "blue")),
    "a large drawing", "a vivid drawing", "vivid colours", "brightness", "contrast", "warm colours", "many colours",
    "sharp edges", "a bright background", "a vivid background",
)  # fmt: skip

WORD_PAIRS = (  # opposite descriptions that a text tower tells apart
    ("a bright picture", "a dark picture"), ("warm colours", "cold colours"), ("vivid colours", "muted colours"),
    ("a colourful picture", "a black and white picture"), ("high contrast", "low contrast"),
    ("a photograph", "a drawing"), ("a 3d render", "a flat illustration"), ("an oil painting", "a digital rendering"),
    ("a cartoon", "a realistic picture"), ("line art", "soft shading"), ("a detailed picture", "a simple picture"),
    ("a cluttered scene", "a minimalist scene"), ("a close-up", "a wide shot"), ("sharp focus", "blurred"),
    ("soft light", "hard light"), ("a happy mood", "a gloomy mood"), ("a vintage look", "a modern look"),
    ("pastel colours", "neon colours"), ("symmetrical", "asymmetrical"), ("a plain background", "a busy background"),
)  # fmt: skip


class Block(NamedTuple):
    """Columns of features that belong together, as those of one reward's tower."""

    name: str
    columns: tuple[str, ...]
    values: Callable[[Tensor, Tensor, Sequence[str]], Tensor]  # images, tower features, prompts -> (B, len(columns))


class Features:
    """The blocks of a taste, side by side; the image tower runs once. Images (B, 3, H, W), prompts -> (B, D)."""

    def __init__(self, tower: TwoTower | None, blocks: Sequence[Block], *, source: str):
        if not blocks:
            raise InputError("a taste needs at least one block of features: colour, words, pairs, tower")
        self.tower, self.blocks, self.source = tower, tuple(blocks), source

    @property
    def columns(self) -> list[str]:
        return [f"{block.name}: {column}" for block in self.blocks for column in block.columns]

    @property
    def sizes(self) -> list[int]:
        return [len(block.columns) for block in self.blocks]

    def seen(self, images: Tensor) -> Tensor:
        """What the tower sees, (B, F); empty rows without a tower."""
        return images.new_zeros(len(images), 0) if self.tower is None else self.tower.image_features(images)

    def of_seen(self, images: Tensor, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.cat([block.values(images, seen, prompts) for block in self.blocks], 1)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.of_seen(images, self.seen(images), prompts)

    def probe(self) -> Tensor:
        """What is seen in two painted pictures, (2, D): by it a saved taste tells its tower from another version."""
        x, y = torch.meshgrid(*[torch.linspace(0, 1, 64)] * 2, indexing="xy")
        disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).to(x)
        images = torch.stack([torch.stack([x, y, 1 - x]), torch.stack([disc, 0.2 + 0.5 * disc, 1 - disc])])
        with torch.no_grad():
            return self(images, ["", ""]).double().cpu()


def features_of(reward: Reward, source: str, blocks: Sequence[str] | None = None) -> Features:
    """The features that stand on a reward: words and colour for the embedded one ("emoji"), pairs and colour else.

    `source` is the reward's name, which a saved taste keeps. InputError for a block that there is not.
    """
    if not isinstance(reward, TwoTower):
        raise InputError(f"a taste stands on image and text features, and {source} has none; take clip-score or hpsv2")
    tower, embedded = reward, source == "emoji"
    names = list(blocks) if blocks is not None else ["words" if embedded else "pairs", "colour"]
    makers: dict[str, Callable[[], Block]] = {
        "colour": lambda: Block("colour", COLOUR_COLUMNS, lambda images, seen, prompts: colour(images)),
        "tower": lambda: _tower_block(tower),
        "words" if embedded else "pairs": lambda: _words_block(reward) if embedded else _pairs_block(tower),  # type: ignore[arg-type]
    }
    if wrong := [name for name in names if name not in makers or names.count(name) > 1]:
        raise InputError(f"features: got {wrong[0]!r}; of {source} there are {', '.join(makers)}, each once")
    return Features(tower, [makers[name]() for name in names], source=source)


def colour(images: Tensor) -> Tensor:
    """The statistics of COLOUR_COLUMNS, (B, 22); differentiable."""
    edge = border(images)  # (B, 3)
    apart = (images - edge[..., None, None]).abs().amax(1)  # (B, H, W)
    mask = torch.sigmoid(SOFT * (apart - EDGE))
    mass = mask.sum((1, 2)) + FEW_PIXELS
    drawing = (images * mask[:, None]).sum((2, 3)) / mass[:, None]
    high, low = images.amax(1), images.amin(1)
    own_saturation = ((high - low) * mask).sum((1, 2)) / mass
    grey = luma(images)
    flat = images.flatten(2)
    gradient = (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2)) + (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2))
    columns = [
        flat.mean(2), _std(flat), edge, drawing,
        torch.stack([
            mask.mean((1, 2)), own_saturation, saturation(images), grey.mean((1, 2)), _std(grey.flatten(1)),
            images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2)), colourfulness(images), gradient,
            luma(edge[..., None, None]).flatten(), edge.amax(1) - edge.amin(1),
        ], 1),
    ]  # fmt: skip
    return torch.cat(columns, 1)


def _std(values: Tensor) -> Tensor:
    """Standard deviation over the last axis, with gradient 0 where it is 0."""
    centred = values - values.mean(-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1) / values.shape[-1] ** 0.5


def concept_of(prompt: str) -> str:
    """The concept that the prompt names; "" without one, or where the vocabulary does not know its words."""
    try:
        return parse_prompt(prompt).concept or ""
    except InputError:
        return ""


def _words_block(reward: ClipReward) -> Block:
    """Centred logits of the styles (and of the backgrounds), size, and SHARPNESS times the softmaxes."""
    vocab = vocabulary()
    styles, colours = list(vocab.styles), list(vocab.colours)
    small, large = vocab.sizes[0], vocab.sizes[-1]
    scale = float(reward.model.logit_scale.detach().exp())

    def texts(concept: str) -> list[str]:
        return [
            *(f"{style} {concept}".strip() for style in styles), f"{small} {concept}".strip(),
            f"{large} {concept}".strip(), *(f"{concept} on a {colour} background".strip() for colour in colours),
        ]  # fmt: skip

    def values(images: Tensor, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        asked = [texts(concept_of(prompt)) for prompt in prompts]
        count = len(asked[0])
        flat = [text for row in asked for text in row]
        logits = scale * reward.score(seen.repeat_interleave(count, 0), flat).view(len(prompts), count)
        style, sizes, ground = logits.split([len(styles), 2, len(colours)], 1)
        return torch.cat([
            style - style.mean(1, keepdim=True), (sizes[:, 1] - sizes[:, 0])[:, None],
            ground - ground.mean(1, keepdim=True), SHARPNESS * style.softmax(1), SHARPNESS * ground.softmax(1),
        ], 1)  # fmt: skip

    columns = (*styles, large, *(f"{c} background" for c in colours), *(f"surely {s}" for s in styles),
               *(f"surely {c} background" for c in colours))  # fmt: skip
    return Block("words", columns, values)


def _pairs_block(tower: TwoTower) -> Block:
    def values(images: Tensor, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        count = len(WORD_PAIRS)
        spread = seen.repeat_interleave(count, 0)
        first, second = (tower.score(spread, [pair[k] for pair in WORD_PAIRS] * len(seen)) for k in (0, 1))
        return (first - second).view(len(seen), count)

    return Block("pairs", tuple(f"{first} rather than {second}" for first, second in WORD_PAIRS), values)


def _tower_block(tower: TwoTower) -> Block:
    with torch.no_grad():
        width = tower.image_features(torch.zeros(1, 3, 64, 64)).shape[1]
    return Block("tower", tuple(f"feature {k}" for k in range(width)), lambda images, seen, prompts: seen)


@dataclass(frozen=True)
class Scaling:
    """z = (f - mean) * gain, and the covariance of z over the pictures it was made on."""

    mean: Tensor  # (D,)
    gain: Tensor  # (D,)
    covariance: Tensor  # (D, D)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean.to(features)) * self.gain.to(features)

    def std(self, weights: Tensor) -> float:
        """The standard deviation of w'z over those pictures; 1 where it does not vary."""
        variance = float(weights.double() @ self.covariance @ weights.double())
        return variance**0.5 if variance > 0 else 1.0

    def same_tower(self, probe: Tensor, then: Tensor) -> bool:
        """Whether two `Features.probe`s are of one tower: another machine's rounding moves a column by far less than
        its standard deviation, other weights move most of them by about as much."""
        return probe.shape == then.shape and float(((probe - then) * self.gain).abs().mean()) < SAME

    def save(self, path: Path, probe: Tensor) -> None:
        """Write the constants with the features' probe, whole or not at all."""
        tensors = {"mean": self.mean, "gain": self.gain, "covariance": self.covariance, "probe": probe}
        write_atomically(path, save(tensors))

    @classmethod
    def load(cls, path: Path, probe: Tensor) -> Scaling | None:
        """What `save` wrote; None for a damaged file, or one of other features or of another tower than `probe`'s."""
        try:
            tensors = load_file(path)
            found = cls(tensors["mean"], tensors["gain"], tensors["covariance"])
            return found if found.same_tower(probe, tensors.get("probe", probe)) else None
        except (OSError, SafetensorError, KeyError, RuntimeError):
            return None


def scaling_of(features: Tensor, groups: Sequence[str], sizes: Sequence[int]) -> Scaling:
    """The constants from unlabelled pictures (N, D) of the prompts `groups`, blocks of `sizes` columns."""
    f = features.detach().double().cpu()
    if len(f) != len(groups) or len(f) < 2:
        raise InputError(f"got {len(f)} pictures and {len(groups)} prompts; expected at least two, one prompt each")
    order: dict[str, int] = {}
    rows = torch.tensor([order.setdefault(group, len(order)) for group in groups])
    counts = torch.bincount(rows).double()
    means = torch.zeros(len(order), f.shape[1], dtype=f.dtype).index_add_(0, rows, f) / counts[:, None]
    inside = f - means[rows] if len(f) > len(order) else f - f.mean(0)
    freedom = len(f) - len(order) if len(f) > len(order) else len(f) - 1
    std = (inside.square().sum(0) / freedom).sqrt()
    gain = torch.where(std > MINIMUM_STD, 1 / std.clamp_min(MINIMUM_STD), 0.0)
    mean = f.mean(0)
    z = (f - mean) * gain
    factors = []
    for block in z.split(list(sizes), 1):
        total = float(block.var(0, correction=0).sum())
        factors.append(torch.full((block.shape[1],), 1 / total**0.5 if total > 0 else 0.0, dtype=f.dtype))
    gain = gain * torch.cat(factors) * (f.shape[1] / len(sizes)) ** 0.5
    z = (f - mean) * gain
    return Scaling(mean, gain, torch.cov(z.T, correction=0))
