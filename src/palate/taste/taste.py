"""A taste: what `fit_taste` learns from votes, with its card; saved as safetensors and JSON, never as a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from palate.core import Reward
from palate.rewards.load import load_reward
from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically
from palate.taste import card as cards
from palate.taste.features import Features, Scaling, features_of, scaling_of
from palate.taste.learner import Array, Posterior, fit, leave_one_out, pair_of_votes, rater_qualities
from palate.taste.pictures import as_choice, features_of_choices, pool_beside, raw_features, read_choices
from palate.taste.reward import ABSOLUTE, TasteReward
from palate.taste.saved import CARD, FILE, parts_of, source_of
from palate.taste.votes import OUTCOMES, VoteStore

SIDE_STD = 1.0  # logits: prior of how much somebody favours the left place


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
        """Whether held-out votes are predicted well enough to align to it (`card.learnt`)."""
        return cards.learnt(self.card)

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
        left, right = features_of_choices(self.features, choices)
        gain = self.scaling.gain.numpy()
        return self.posterior.probability((left - right) * gain)

    def save(self, folder: str | Path) -> Path:
        """Write taste.safetensors and card.json; the folder. What was there is replaced. Of the people who chose their
        number and qualities are written, and no names: a taste is for handing on."""
        folder, card = Path(folder), dict(self.card)
        if raters := card.get("raters"):
            card["raters"] = {f"voter {k}": quality for k, quality in enumerate(raters.values(), 1)}
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "mean": torch.from_numpy(self.posterior.mean.copy()), "covariance": torch.from_numpy(
                self.posterior.covariance.copy()), "scaling_mean": self.scaling.mean,
            "scaling_gain": self.scaling.gain, "scaling_covariance": self.scaling.covariance,
            "probe": self.features.probe(),
        }  # fmt: skip
        about = {
            "source": self.features.source, "blocks": [block.name for block in self.features.blocks],
            "columns": self.features.columns, "prior": self.posterior.prior, "votes": self.digest,
            "log_evidence": self.posterior.log_evidence, "absolute": self.base is not None, "card": card,
        }  # fmt: skip
        whole = {k: v.double().contiguous() for k, v in tensors.items()}
        write_atomically(folder / FILE, save(whole, {"taste": json.dumps(about)}))
        write_atomically(folder / CARD, (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
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
            probe = t.pop("probe", None)  # tastes of the first release have none
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
        if probe is not None and not scaling.same_tower(features.probe(), probe):
            raise InputError(
                f"{folder} was learned on another version of the reward {about['source']}: its numbers mean nothing "
                "here. The votes keep their pictures; fit it again from them with palate taste fit"
            )
        posterior = Posterior(t["mean"].numpy(), t["covariance"].numpy(), float(about["prior"]),
                              float(about["log_evidence"]), np.zeros(0))  # fmt: skip
        return cls(features, scaling, posterior, reward if about["absolute"] else None, about["card"], about["votes"])


def base_reward(source: str) -> Reward:
    """The reward whose features a taste stands on; InputError if only the caller can load it."""
    if source != "emoji":
        raise InputError(f"this taste stands on {source}; give that reward as base, with its weights")
    return load_reward(source)


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
    unlabelled (images, prompts) that the features are standardised on; None = those beside the studio's votes, else the
    votes' own pictures. `scaling`: the constants of an earlier round, so that old votes keep their meaning. Votes whose
    pictures are gone do not count, and are warned of. InputError: there are no others.
    """
    choices = read_choices(votes)
    if not choices:
        raise InputError("got no votes; a taste needs some")
    if pool is None and scaling is None:
        pool = pool_beside(votes)
    reward = base if base is not None else base_reward(source)
    features = features_of(reward, source, blocks)
    left, right = features_of_choices(features, choices)
    rows, groups, voted = np.concatenate([left, right]), [c.prompt for c in choices] * 2, len(choices)
    if pool is not None:
        rows, groups, voted = raw_features(features, *pool), list(pool[1]), 0
    if scaling is None:
        scaling = scaling_of(torch.from_numpy(rows), groups, features.sizes)
    outcomes = np.array([OUTCOMES[choice.choice] for choice in choices])
    differences = (left - right) * scaling.gain.numpy()
    z = (np.concatenate([left, right]) - scaling.mean.numpy()) * scaling.gain.numpy()
    names = [choice.name for choice in choices]
    unseen = cards.unseen_pairs(rows * scaling.gain.numpy(), groups, voted)
    posterior, card = learn(differences, outcomes, [c.rater for c in choices], z, features.columns, unseen)
    shown = [c.left for c in choices] + [c.right for c in choices]
    card |= cards.extremes(z @ posterior.mean, [str(p) if isinstance(p, (str, Path)) else "" for p in shown])
    text = json.dumps([[c.prompt, c.choice, c.rater, name] for c, name in zip(choices, names, strict=True)])
    digest = hashlib.sha256(text.encode() + differences.round(4).tobytes()).hexdigest()
    return Taste(features, scaling, posterior, reward, card | {"features": source, "votes_sha256": digest}, digest)


def learn(
    differences: Array, outcomes: Array, raters: Sequence[str], z: Array, columns: Sequence[str], unseen: Array
) -> tuple[Posterior, dict[str, Any]]:
    """The posterior and its card, from standardised differences (n, D), the pictures z (N, D) they were of, and the
    differences of pairs that were not chosen by the taste (`cards.unseen_pairs`)."""
    quality = rater_qualities(differences, outcomes, raters, side_std=SIDE_STD)
    scaled = differences * np.array([quality[name] for name in raters])[:, None]
    posterior = fit(scaled, outcomes, side_std=SIDE_STD)
    pairs = pair_of_votes(differences)
    predicted = leave_one_out(scaled, outcomes, pairs=pairs, side_std=SIDE_STD)
    share = 1 / np.bincount(pairs)[pairs]  # of a pair's evidence, which counts once
    told = posterior if (share == 1).all() else fit(scaled, outcomes, share, side_std=SIDE_STD)
    sides = fit(np.zeros_like(scaled), outcomes, share, side_std=SIDE_STD)
    found = cards.accuracy(predicted, outcomes, pairs)
    card: dict[str, Any] = {
        "votes": len(outcomes), "pairs": int(pairs.max(initial=-1)) + 1, "ties": int((outcomes == 0.5).sum()), **found,
        "calibration_error": cards.calibration_error(predicted, outcomes),
        "expected": cards.expected_accuracy(posterior, unseen, predicted), "prior": posterior.prior,
        "log_evidence": told.log_evidence, "log_evidence_of_sides": sides.log_evidence, "side": posterior.side,
        "words": cards.telling_columns(posterior, z, columns), "raters": quality,
    }  # fmt: skip
    return posterior, card | {"verdict": cards.verdict(card), "learnt": cards.learnt(card)}


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
    card = {"mixed": [{"weight": weight, "votes": taste.digest, "learnt": taste.learnt} for weight, taste in parts]}
    return Taste(first.features, first.scaling, posterior, first.base, card, first.digest)


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
    tastes: list[tuple[float, Taste]] = []
    rewards: dict[str, Reward] = {}
    for folder, weight in parts_of(source):
        name = source_of(folder)
        if name not in rewards:
            rewards[name] = base_reward(name) if base is None else base(name)
        tastes.append((weight, Taste.load(folder, base=rewards[name])))
    taste = tastes[0][1] if len(tastes) == 1 and tastes[0][0] == 1.0 else mixed(tastes)
    return taste.objective(absolute=absolute, confidence=confidence)
