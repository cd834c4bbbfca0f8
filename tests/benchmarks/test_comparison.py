"""The comparison, the claims and the results page, on rows whose answer is known."""

from __future__ import annotations

import base64
import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import claims
import comparison
import methods
import results_page
import tasks

from palate.rewards.emoji import load_reward


def row(method, seed, rise, *, task="style", speed=1.0, looks=6, ended="budget", pictures=False, concept=0.9):
    """A run whose goal rises in a line to `rise` at `speed` x 100 forwards per look; prompts differ by a little."""
    prompts = np.linspace(-0.01, 0.01, 8)
    points = []
    for k in range(looks):
        goal = 1.0 + rise * min(1.0, k * speed / (looks - 1)) + prompts
        points.append({
            "updates": k, "forwards": 100 * k, "differentiated": 25 * k, "scored": 10 * k, "processor_seconds": 2.0 * k,
            "heldout": goal.tolist(), "reward": goal.tolist(), "style": [0.5] * 8, "diversity": [0.2] * 8,
            "cast": [0.0] * 8, "detail": [0.1] * 8, "concept": [concept if k else 0.9] * 8,
        })  # fmt: skip
    sheet = [_png(20 * k) for k in range(looks)] if pictures else []
    return {"task": task, "method": method, "seed": seed, "ended": ended, "points": points, "pictures": sheet}


def _png(shade):
    stream = io.BytesIO()
    Image.new("RGB", (24, 8), (shade, 0, 0)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def keep(folder, *rows):
    for found in rows:
        name = methods.slug("comparison", found["task"], found["method"], found["seed"], 500)
        (folder / f"{name}.json").write_text(json.dumps({"arguments": [], "made": found}))
    return folder


# --- the comparison ---


def test_the_pigeonhole_bootstrap_sees_seeds_and_prompts():
    """Of a two-way table of independent effects its variance is near that of both means together."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        values = rng.normal(0, 1.0, (5, 1)) + rng.normal(0, 1.0, (1, 40)) + rng.normal(0, 1.0, (5, 40))
        center, low, high = comparison.pigeonhole(values, resamples=200, seed=trial)
        assert center == pytest.approx(values.mean())
        held += low <= 0 <= high
    assert 0.80 <= held / 200 <= 0.97  # few seeds: a percentile bootstrap of five is somewhat narrow
    alike = np.tile(np.linspace(0, 1, 40), (5, 1))
    _, low, high = comparison.pigeonhole(alike)
    assert high - low == pytest.approx(2 * 1.96 * 0.288 / 40**0.5, rel=0.15)  # prompts alone, whose spread is 0.288
    holes = np.where(np.arange(40) < 20, alike, np.nan)
    assert comparison.pigeonhole(holes)[0] == pytest.approx(np.nanmean(holes))


def test_a_run_is_judged_at_the_best_goal_that_kept_its_concepts():
    found = row("SRPO", 0, 0.5)
    assert comparison.best_kept(found["points"], "style") == 5
    lost = row("SRPO", 0, 0.5, concept=0.8)
    assert comparison.best_kept(lost["points"], "style") == 0  # all looks lost more than .05: the base
    assert comparison.best_kept(lost["points"], "scenes") == 5  # there prompts name several things
    assert comparison.stalled([0, 3, 2, 1, 2, 3]) and not comparison.stalled([0, 3, 2, 1, 4])
    assert not comparison.stalled([0, 1, 2])


def test_the_summary_pairs_seeds_and_names_what_it_cost():
    rows = [row("SRPO", s, 0.5) for s in range(3)] + [row("DDPO", s, 0.2, ended="saturated") for s in (1, 2)]
    found = comparison.summary(rows)["style"]
    assert found["leader"] == "SRPO" and found["methods"]["SRPO"]["goal"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["methods"]["DDPO"]["less than SRPO"] == pytest.approx((0.3, 0.3, 0.3))
    assert found["methods"]["DDPO"]["ended"] == {"saturated": 2}
    text = comparison.table({"style": found})
    assert "| SRPO | 3 | +0.500 (+0.500 to +0.500) |  | +0.00" in text and "| 500 (25%) | 50 | 10 | 3 budget" in text
    assert "| DDPO | 2 | +0.200 (+0.200 to +0.200) | +0.300 (+0.300 to +0.300) |" in text


def test_methods_that_differentiate_are_left_out_of_black_boxes():
    assert comparison.applies("SRPO", "style") and comparison.applies("DDPO", "jpeg")
    assert not comparison.applies("SRPO", "jpeg") and not comparison.applies("LeapAlign", "scenes")
    assert set(tasks.TASKS) == {"style", "absolute", "scenes", "jpeg", "taste"}


def test_images_that_a_reward_looks_at_are_counted_once_for_two_texts():
    reward = load_reward("emoji")
    counted = methods.counted(reward)
    images = torch.rand(3, 3, 64, 64)
    pair = tasks.preference(counted)(images, ["a dog"] * 3)
    assert counted.images == 3 and torch.allclose(pair, tasks.preference(reward)(images, ["a dog"] * 3))
    plain = methods.counted(lambda images, prompts: images.mean((1, 2, 3)))
    plain(images, ["a dog"] * 3)
    assert plain.images == 3


# --- the claims ---


def verdicts(folder):
    return {found.claim.key: found for found in claims.judge(folder)}


def test_a_ratio_of_forwards_holds_fails_or_is_open(tmp_path):
    """SRPO is there at once, DiffusionNFT five times faster than Flow-GRPO: of 75 and 25 one holds, one fails."""
    keep(tmp_path, *(row("SRPO", s, 0.5, speed=500.0) for s in range(3)))
    keep(tmp_path, *(row("DanceGRPO", s, 0.5) for s in range(3)))
    keep(tmp_path, *(row("Flow-GRPO", s, 0.5) for s in range(3)))
    keep(tmp_path, *(row("DiffusionNFT", s, 0.5, speed=5.0) for s in range(3)))
    found = verdicts(tmp_path)
    assert found["nft-flow"].found.value == pytest.approx(5.0) and found["nft-flow"].verdict == "fails"
    assert found["srpo-flow"].verdict == "holds" and not found["srpo-flow"].found.bound
    assert found["srpo-dance"].verdict == "fails" and found["srpo-dance"].found.value == pytest.approx(5.0)
    keep(tmp_path, *(row("DanceGRPO", s, 0.5 * (s == 0)) for s in range(3)))  # two seeds never get there
    open_one = verdicts(tmp_path)["srpo-dance"]
    assert open_one.found.bound and open_one.verdict == "open" and "at least" in claims.told(open_one.found)
    assert verdicts(tmp_path)["sqdf-draft"].verdict == "not measured"


def test_forwards_to_a_level_lie_on_the_line():
    forwards, rises = np.array([0.0, 100, 200]), np.array([0.0, 0.1, 0.3])
    assert claims.reach(forwards, rises, 0.2) == (pytest.approx(150), True)
    assert claims.reach(forwards, rises, 0.4) == (200.0, False)


def test_differences_of_ablations_are_paired_by_seed(tmp_path):
    for name, goals in (("the recipe", (3.0, 3.1, 3.2)), ("gamma 1", (2.9, 3.0, 3.1))):
        for seed, goal in enumerate(goals):
            path = tmp_path / f"{methods.slug('sqdf', 'ablations', name, seed, 4000)}.json"
            path.write_text(json.dumps({"arguments": [], "made": [{"heldout": 2.5}, {"heldout": goal}]}))
    found = verdicts(tmp_path)["sqdf-discount"]
    assert found.verdict == "holds" and tuple(found.found[:3]) == pytest.approx((0.1, 0.1, 0.1))
    assert claims.over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))


def test_above_counts_where_the_frontier_is_higher(tmp_path):
    better, worse = (row(name, 0, 0.5) for name in ("SQDF", "DRaFT-LV"))
    for point in worse["points"][1:]:
        point["diversity"] = [0.1] * 8
    keep(tmp_path, better, worse)
    found = verdicts(tmp_path)["sqdf-draft"]
    assert found.found.value > 0.95 and found.verdict == "holds"


def test_the_claims_table_says_what_was_tried_and_how_to_measure(tmp_path):
    keep(tmp_path, *(row(name, s, 0.5) for name in ("SRPO", "DanceGRPO") for s in range(2)))
    text = claims.table(claims.judge(tmp_path))
    assert "| 75 times the forwards | 1 (1 to 1) | **fails**; tried: learning rates of both searched alike" in text
    assert "**not measured**: `python benchmarks/srpo.py ablations`" in text and "Of 16 claims: 1 fails, 15 not" in text


# --- the page ---


def test_the_page_has_a_figure_per_claim_in_both_themes_with_words(tmp_path):
    results, images = tmp_path / "results", tmp_path / "images"
    results.mkdir()
    keep(results, *(row(name, s, rise, pictures=s == 0) for name, rise in (("SRPO", 0.5), ("DanceGRPO", 0.4))
                    for s in range(2)))  # fmt: skip
    page = results_page.write(results, images).read_text()
    assert "claim-srpo-dance-light.svg#only-light" in page and "claim-srpo-dance-dark.svg#only-dark" in page
    assert "![SRPO needs 75 times less than DanceGRPO: does not hold. Found" in page
    light, dark = ((images / f"claim-srpo-dance-{theme}.svg").read_text() for theme in ("light", "dark"))
    assert results_page.THEMES["light"]["first"] in light and results_page.THEMES["dark"]["first"] in dark
    assert light.count("<svg") == 1 and "<image" not in light and "denoiser forwards" in light and "DanceGRPO" in light
    before = light
    results_page.write(results, images)
    assert (images / "claim-srpo-dance-light.svg").read_text() == before  # the same rows, the same bytes
    assert "The same prompts and noise drawn by the base model and by DanceGRPO, SRPO" in page
    shown = Image.open(images / "equal-reward-light.png")
    assert shown.width > 500 and (images / "equal-reward-dark.png").is_file()
    assert json.loads((results / "claims.json").read_text())["srpo-dance"]["verdict"] == "fails"


def test_pictures_are_of_looks_at_equal_merit():
    rows = [row("fast", 0, 0.9), row("slow", 0, 0.4), row("never", 0, 0.01)]
    level, found = results_page.equal_looks(rows)
    assert level == pytest.approx(1.4) and found == [("base", 0), ("fast", 2), ("slow", 5)]  # fast: .36 of .4
