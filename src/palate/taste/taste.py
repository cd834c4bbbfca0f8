"""A taste: what `fit_taste` learns from votes, with its card; saved as safetensors and JSON, never as a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palate.core import Reward
from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically
from palate.runtime.images import UNREADABLE, as_rgb, from_pixels, read_pixels
from palate.taste import card as cards
from palate.taste.features import Features, Scaling, features_of, scaling_of
from palate.taste.learner import Array, Posterior, fit, leave_one_out, rater_qualities
from palate.taste.reward import ABSOLUTE, TasteReward
from palate.taste.votes import CHOICES, OUTCOMES, VoteStore

FILE, CARD = "taste.safetensors", "card.json"
SIDE_STD = 1.0  # logits: prior of how much somebody favours the left place
BATCH = 64


class Choice(NamedTuple):
    """Two pictures of one prompt and what was chosen. A picture is (3, H, W) in [0, 1], a PIL image, or a file."""

    prompt: str
    left: Any
    right: Any
    choice: str = "tie"  # one of votes.CHOICES
    rater: str = ""
    name: str = ""


@dataclass(frozen=True)
class Taste:
    """What somebody likes, as a posterior over a linear utility on frozen features. `card` says how good it is."""

    features: Features
    scaling: Scaling
    posterior: Posterior
    base: Reward | None  # the reward whose tower the features stand on
    card: dict[str, Any] = field(default_factory=dict)
    digest: str = ""  # of the votes

    @property
    def learnt(self) -> bool:
        """Whether held-out votes are foretold well enough to align to it."""
        accuracy = self.card.get("accuracy")
        return accuracy is not None and accuracy > cards.LEARNT

    def objective(self, *, absolute: float | None = None, confidence: float = 0.0) -> TasteReward:
        """The differentiable reward; absolute None = its default, 0 for a taste without a base reward."""
        mean, covariance = (torch.from_numpy(x) for x in (self.posterior.mean, self.posterior.covariance))
        if absolute is None:
            absolute = ABSOLUTE if self.base is not None else 0.0
        return TasteReward(self.features, self.scaling, mean, covariance, self.base, absolute=absolute,
                           confidence=confidence)  # fmt: skip

    def reward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) for images (B, 3, H, W) in [0, 1]: the taste in standard deviations plus the absolute reward."""
        return self.objective()(images, prompts)

    def utility(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) the taste alone, in standard deviations of the pictures that it was standardised on."""
        with torch.no_grad():
            objective = self.objective(absolute=0.0)
            return objective(images, prompts)

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Array:
        """Standardised features (B, D)."""
        with torch.no_grad():
            return self.scaling(self.features(images, prompts).double()).numpy()

    def predict(self, pairs: Sequence[Any]) -> Array:
        """P(left is better), (n,), of pairs: `Choice`, (left, right), (left, right, prompt), or mappings with the keys
        left, right and prompt."""
        if not len(pairs):
            return np.zeros(0)
        choices = [as_choice(pair) for pair in pairs]
        left, right = _features_of_choices(self.features, choices)
        gain = self.scaling.gain.numpy()
        return self.posterior.probability((left - right) * gain)

    def save(self, folder: str | Path) -> Path:
        """Write taste.safetensors and card.json; the folder. What was there is replaced."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "mean": torch.from_numpy(self.posterior.mean.copy()), "covariance": torch.from_numpy(
                self.posterior.covariance.copy()), "scaling_mean": self.scaling.mean,
            "scaling_gain": self.scaling.gain, "scaling_covariance": self.scaling.covariance,
        }  # fmt: skip
        about = {
            "source": self.features.source, "blocks": [block.name for block in self.features.blocks],
            "columns": self.features.columns, "prior": self.posterior.prior, "votes": self.digest,
            "log_evidence": self.posterior.log_evidence, "absolute": self.base is not None, "card": self.card,
        }  # fmt: skip
        temporary = folder / f".tmp-{FILE}"
        save_file({k: v.double().contiguous() for k, v in tensors.items()}, temporary, {"taste": json.dumps(about)})
        temporary.replace(folder / FILE)
        write_atomically(folder / CARD, (json.dumps(self.card, indent=1, ensure_ascii=False) + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, base: Reward | None = None) -> Taste:
        """Read what `save` wrote. `base`: the reward it stands on; None = the embedded one.

        InputError: no taste there, damaged, or learned on other features than this version has.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise InputError(f"{folder} holds no taste ({FILE}); make one with palate taste fit VOTES -o {folder}")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["taste"])
                t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            size = len(about["columns"])
            shapes = {"mean": (size,), "covariance": (size, size), "scaling_mean": (size,), "scaling_gain": (size,),
                      "scaling_covariance": (size, size)}  # fmt: skip
            if {k: tuple(v.shape) for k, v in t.items()} != shapes or not all(
                bool(torch.isfinite(v).all()) for v in t.values()
            ):
                raise ValueError("its tensors have another shape, or are not finite")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a taste, or a damaged one ({str(error)[:80]})") from error
        reward = base if base is not None else base_reward(about["source"])
        features = features_of(reward, about["source"], about["blocks"])
        if features.columns != about["columns"]:
            raise InputError(
                f"{folder} was learned on other features than this version has; fit it again from its votes with "
                "palate taste fit"
            )
        scaling = Scaling(t["scaling_mean"], t["scaling_gain"], t["scaling_covariance"])
        posterior = Posterior(t["mean"].numpy(), t["covariance"].numpy(), float(about["prior"]),
                              float(about["log_evidence"]), np.zeros(0))  # fmt: skip
        return cls(features, scaling, posterior, reward if about["absolute"] else None, about["card"], about["votes"])


def source_of(folder: str | Path) -> str:
    """The name of the reward that a saved taste stands on. InputError: there is no taste."""
    path = Path(folder) / FILE
    try:
        with safe_open(path, "pt") as file:
            return str(json.loads((file.metadata() or {})["taste"])["source"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} holds no taste ({FILE}); make one with palate taste fit VOTES") from error


def base_reward(source: str) -> Reward:
    """The reward whose features a taste stands on; InputError if only the caller can load it."""
    if source != "emoji":
        raise InputError(f"this taste stands on {source}; give that reward as base, with its weights")
    from palate.rewards.emoji import load_reward

    return load_reward("emoji")


def fit_taste(
    votes: str | Path | VoteStore | Sequence[Any],
    *,
    base: Reward | None = None,
    source: str = "emoji",
    blocks: Sequence[str] | None = None,
    pool: tuple[Tensor, Sequence[str]] | None = None,
    scaling: Scaling | None = None,
) -> Taste:
    """The taste behind votes: a store or its path, `Choice`s, or mappings with prompt, left, right, choice.

    base, source: a two-tower reward and its name; None = the embedded one. blocks: names of feature blocks. pool:
    unlabelled (images, prompts) that the features are standardised on; None = the votes' own pictures. `scaling`: the
    constants of an earlier round, so that old votes keep their meaning. InputError: no votes, or pictures are missing.
    """
    choices = read_choices(votes)
    if not choices:
        raise InputError("got no votes; a taste needs some")
    reward = base if base is not None else base_reward(source)
    features = features_of(reward, source, blocks)
    left, right = _features_of_choices(features, choices)
    if scaling is None:
        if pool is None:
            rows, groups = np.concatenate([left, right]), [c.prompt for c in choices] * 2
        else:
            rows, groups = raw_features(features, *pool), list(pool[1])
        scaling = scaling_of(torch.from_numpy(rows), groups, features.sizes)
    outcomes = np.array([OUTCOMES[choice.choice] for choice in choices])
    differences = (left - right) * scaling.gain.numpy()
    z = (np.concatenate([left, right]) - scaling.mean.numpy()) * scaling.gain.numpy()
    names = [choice.name for choice in choices]
    posterior, card = learn(differences, outcomes, [c.rater for c in choices], z, features.columns)
    text = json.dumps([[c.prompt, c.choice, c.rater, name] for c, name in zip(choices, names, strict=True)])
    digest = hashlib.sha256(text.encode() + differences.round(4).tobytes()).hexdigest()
    return Taste(features, scaling, posterior, reward, card | {"features": source, "votes_sha256": digest}, digest)


def learn(
    differences: Array, outcomes: Array, raters: Sequence[str], z: Array, columns: Sequence[str]
) -> tuple[Posterior, dict[str, Any]]:
    """The posterior and its card, from standardised differences (n, D) and the pictures z (N, D) they were of."""
    quality = rater_qualities(differences, outcomes, raters, side_std=SIDE_STD)
    scaled = differences * np.array([quality[name] for name in raters])[:, None]
    posterior = fit(scaled, outcomes, side_std=SIDE_STD)
    foretold = leave_one_out(scaled, outcomes, side_std=SIDE_STD)
    found = cards.accuracy(foretold, outcomes)
    card = {
        "votes": len(outcomes), "ties": int((outcomes == 0.5).sum()), **found,
        "calibration_error": cards.calibration_error(foretold, outcomes), "prior": posterior.prior,
        "log_evidence": posterior.log_evidence, "side": posterior.side,
        "words": cards.telling_columns(posterior, z, columns), "raters": quality,
        "verdict": cards.verdict(found, len(outcomes)),
    }  # fmt: skip
    return posterior, card


def mixed(parts: Sequence[tuple[float, Taste]]) -> Taste:
    """Tastes added up with weights, each first brought to standard deviation 1 over the first one's pictures.

    InputError unless all stand on the same features.
    """
    if not parts:
        raise InputError("got no tastes to mix")
    first = parts[0][1]
    gain = first.scaling.gain
    size = len(gain)
    mean, covariance = np.zeros(size), np.zeros((size, size))
    for weight, taste in parts:
        if taste.features.columns != first.features.columns:
            raise InputError("tastes that stand on different features cannot be mixed; fit them on the same")
        factor = torch.where(gain > 0, taste.scaling.gain / gain.clamp_min(1e-300), 0.0)  # its columns in ours
        own = torch.from_numpy(taste.posterior.mean) * factor
        scale = weight / first.scaling.std(own)
        mean += scale * own.numpy()
        covariance += scale**2 * (factor[:, None] * torch.from_numpy(taste.posterior.covariance) * factor).numpy()
    posterior = Posterior(mean, covariance, first.posterior.prior, 0.0, np.zeros(0))
    card = {"mixed": [{"weight": weight, "votes": taste.digest} for weight, taste in parts]}
    return Taste(first.features, first.scaling, posterior, first.base, card, first.digest)


def read_choices(votes: str | Path | VoteStore | Sequence[Any]) -> list[Choice]:
    """The votes as `Choice`s with files for pictures; those whose pictures are gone are left out."""
    if isinstance(votes, (str, Path)):
        votes = VoteStore(votes)
    if isinstance(votes, VoteStore):
        there, missing = votes.with_pictures()
        if not there and missing:
            raise InputError(f"the pictures of all {missing} votes are gone from {votes.pictures}; copy them back")
        paths = [(votes.path_of(v.left), votes.path_of(v.right)) for v in there]
        return [
            Choice(v.prompt, left, right, v.choice, v.rater, f"{left.name}{right.name}")
            for v, (left, right) in zip(there, paths, strict=True)
        ]
    return [as_choice(vote) for vote in votes]


def as_choice(pair: Any) -> Choice:
    """A `Choice` from what a caller may give instead of one."""
    if isinstance(pair, Choice):
        return pair
    if isinstance(pair, Mapping):
        if not {"left", "right"} <= pair.keys():
            raise InputError(f"a pair needs left and right, got {', '.join(map(str, pair))}")
        choice = str(pair.get("choice", "tie")).replace("neither", "both-bad")
        if choice not in CHOICES:
            raise InputError(f"choice: expected one of {', '.join(CHOICES)}, got {choice!r}")
        return Choice(str(pair.get("prompt", "")), pair["left"], pair["right"], choice, str(pair.get("rater", "")))
    if isinstance(pair, (tuple, list)) and len(pair) in (2, 3):
        return Choice(str(pair[2]) if len(pair) == 3 else "", pair[0], pair[1])
    raise InputError(f"expected pairs as (left, right, prompt) or mappings, got {type(pair).__name__}")


def as_image(picture: Any) -> Tensor:
    """(3, H, W) in [0, 1] of a tensor, a PIL image or a file."""
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
            raise InputError(f"a picture of shape {tuple(picture.shape)}; expected (3, H, W) floats in [0, 1]")
        return picture.detach().float().cpu()
    if isinstance(picture, Image.Image):
        return from_pixels(np.asarray(as_rgb(picture)))
    if isinstance(picture, (str, Path)):
        try:
            return from_pixels(read_pixels(Path(picture)))
        except UNREADABLE as error:
            raise InputError(f"cannot read the picture {picture}: {error}") from error
    raise InputError(f"expected a picture as a tensor, a PIL image or a file, got {type(picture).__name__}")


def raw_features(features: Features, images: Tensor, prompts: Sequence[str]) -> Array:
    """(N, D) in batches, without gradient."""
    with torch.no_grad():
        parts = [features(images[i : i + BATCH], prompts[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return torch.cat(parts).double().cpu().numpy()


def _features_of_choices(features: Features, choices: Sequence[Choice]) -> tuple[Array, Array]:
    """Features (n, D) of the left and of the right pictures; one that occurs in several votes is looked at once."""
    index: dict[tuple[Any, str], int] = {}
    wanted: list[tuple[Any, str]] = []
    places = []
    for choice in choices:
        for picture in (choice.left, choice.right):
            key = (str(picture) if isinstance(picture, (str, Path)) else id(picture), choice.prompt)
            if key not in index:
                index[key] = len(wanted)
                wanted.append((picture, choice.prompt))
            places.append(index[key])
    rows: list[Array | None] = [None] * len(wanted)
    by_size: dict[tuple[int, ...], list[int]] = {}
    loaded = [as_image(picture) for picture, _ in wanted]
    for i, image in enumerate(loaded):
        by_size.setdefault(tuple(image.shape), []).append(i)
    for members in by_size.values():
        images = torch.stack([loaded[i] for i in members])
        for i, row in zip(members, raw_features(features, images, [wanted[i][1] for i in members]), strict=True):
            rows[i] = row
    table = np.stack([row for row in rows if row is not None])[places].reshape(len(choices), 2, -1)
    return table[:, 0], table[:, 1]


def load_objective(
    source: str | None,
    *,
    absolute: float | None = None,
    confidence: float = 0.0,
    base: Callable[[str], Reward] | None = None,
) -> TasteReward:
    """The reward of a saved taste, as recipes name it: FOLDER, or several that add up, "FOLDER:WEIGHT, FOLDER:WEIGHT".

    absolute, confidence: lambda and kappa of `TasteReward`. base: loads the reward that it stands on by name; None =
    the embedded one only. InputError: no such taste, or a weight is no number.
    """
    parts = [part.strip() for part in (source or "").split(",") if part.strip()]
    if not parts:
        raise InputError("reward.source.taste: name the folder of a taste, as tastes/mine (palate taste fit makes one)")
    tastes: list[tuple[float, Taste]] = []
    rewards: dict[str, Reward] = {}
    for part in parts:
        folder, colon, weight = part.rpartition(":")
        try:
            share = float(weight) if colon and not Path(part).is_dir() else 1.0
        except ValueError as error:
            raise InputError(f"reward.source.taste: {part!r}: expected FOLDER or FOLDER:WEIGHT") from error
        place = folder if colon and not Path(part).is_dir() else part
        name = source_of(place)
        if name not in rewards:
            rewards[name] = base_reward(name) if base is None else base(name)
        tastes.append((share, Taste.load(place, base=rewards[name])))
    taste = tastes[0][1] if len(tastes) == 1 and tastes[0][0] == 1.0 else mixed(tastes)
    return taste.objective(absolute=absolute, confidence=confidence)
