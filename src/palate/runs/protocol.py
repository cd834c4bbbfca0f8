"""A run judged as papers do: a published set of prompts, every published reward whose weights are here, diversity.

What is missing is reported with the command that fetches it; nothing is downloaded. The rest is `evaluate_runs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from palate.core import Reward, TwoTower
from palate.data import evenly_spaced
from palate.evaluate.measurement import mean_and_interval, round_floats, to_json
from palate.evaluate.panel import EvaluationPanel, embedded_panel, published_panel
from palate.recipe.cross_checks import heldout_of, rewards_placed, rewards_used
from palate.recipe.evaluators import judging_device
from palate.rewards.load import load_reward
from palate.rewards.located import Standing, standings
from palate.rewards.table import HELD_OUT_CANDIDATES
from palate.runs.comparison import column
from palate.runs.evaluation import evaluate_runs
from palate.runs.folder import SOURCE, RunFolder, source_name
from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically


def evaluate_protocol(
    run_folders: Sequence[str | Path],
    name: str,
    prompts: Mapping[str, str],
    *,
    count: int | None = None,
    seeds: Sequence[int] | None = None,
    stored: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """`evaluate_runs` on the prompts (prompt -> category) with every published reward that is found.

    Each evaluation has "protocol" besides: {"name", "rewards": {name: {"found": 0 or 1, "source" or "command"}},
    "categories": {category: {metric: as in metrics}}}. overrides: `reward.source.NAME` may name any published reward.
    InputError: no reward is left that none of the runs optimised and whose features measure diversity."""
    judging = [override for override in overrides if not override.startswith(SOURCE)]
    runs = [RunFolder(folder, judging) for folder in run_folders]
    given, own = _split(overrides, runs)
    sources = {key: value for run in runs for key, value in run.recipe.reward.source.items()} | given
    found = standings(sources)
    panel = protocol_panel(runs, found)
    asked = None if stored else evenly_spaced(list(prompts), count or len(prompts))
    result = evaluate_runs(
        run_folders,
        prompts=asked,
        seeds=seeds,
        stored=stored,
        panel=panel,
        overrides=own,
    )
    for folder, evaluation in zip(run_folders, result["runs"].values(), strict=True):
        evaluation["protocol"] = {
            "name": name,
            "rewards": {standing.name: _standing_json(standing) for standing in found},
            "categories": by_category(evaluation, prompts),
        }
        write_atomically(Path(folder) / "evaluation.json", to_json(evaluation).encode())
    return result


def protocol_panel(runs: Sequence[RunFolder], found: Sequence[Standing]) -> EvaluationPanel:
    """Every reward that is found; the embedded model keeps its own evaluators beside them."""
    settings = runs[0].recipe.reward
    rewards: dict[str, Reward] = {
        standing.name: load_reward(standing.name, standing.source or None, settings.dtype)
        for standing in found
        if standing.source is not None
    }
    if all(run.recipe.model.name == "emoji" for run in runs):
        panel = embedded_panel()
        return panel._replace(rewards=panel.rewards | rewards)
    optimised = {name for run in runs for name in rewards_used(run.recipe.reward)}
    wanted = (heldout_of(runs[0].recipe), *HELD_OUT_CANDIDATES)
    judge = next((name for name in wanted if name in rewards and name not in optimised), None)
    if judge is None:
        commands = ", ".join(f"palate fetch {name}" for name in HELD_OUT_CANDIDATES if name not in optimised)
        raise InputError(
            "no reward is left to judge these runs: its features must measure diversity, and none of the runs may have "
            f"optimised it. Fetch one: {commands or 'all of them were optimised'}"
        )
    reward = rewards[judge]
    assert isinstance(reward, TwoTower), "the candidates are two-tower rewards"
    panel = published_panel(judge, reward, judging_device(runs[0].recipe))
    return panel._replace(rewards=panel.rewards | rewards)


def by_category(evaluation: dict[str, Any], prompts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The rewards' means, intervals and paired changes over the prompts of each category; {} where there is one."""
    rows = evaluation["rows"]
    kinds = [prompts.get(row["prompt"], "") for row in rows]
    if len(set(kinds)) < 2:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(kinds):
        there = torch.tensor([own == kind for own in kinds])
        groups = [row["prompt"] for row, own in zip(rows, kinds, strict=True) if own == kind]
        for metric in (name for name in evaluation["metrics"] if name.startswith("reward/")):
            now, before = column(evaluation, metric), column(evaluation, metric, base=True)
            if not bool(now[there].isnan().all()):
                found.setdefault(kind, {})[metric] = mean_and_interval(now[there], before[there], groups)
    return round_floats(found)


def _standing_json(standing: Standing) -> dict[str, Any]:
    if standing.found:
        return {"found": 1, "source": standing.source or "the hub's cache"}
    return {"found": 0, "command": standing.command}


def _split(overrides: Sequence[str], runs: Sequence[RunFolder]) -> tuple[dict[str, str], list[str]]:
    """The sources that overrides name, and the overrides that the runs' own recipes understand."""
    given = {source_name(o): o.partition("=")[2] for o in overrides if o.startswith(SOURCE)}
    known = {name for run in runs for name in rewards_placed(run.recipe)}
    return given, [o for o in overrides if not o.startswith(SOURCE) or source_name(o) in known]
