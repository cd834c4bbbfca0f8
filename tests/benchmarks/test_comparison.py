"""The comparison, the claims and the results page, on rows whose answer is known."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import budget
import claims
import comparison
import distar
import methods
import opd
import results_page
import rows
import tasks
import time_to_preference

from palate import recipe
from palate.models.vocabulary import Caption
from palate.rewards import soft_tasks
from palate.rewards import tasks as geneval
from palate.rewards.detector import Detection
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
            "cast": [0.0] * 8, "detail": [0.1] * 8, "drift": [0.1 * k] * 8, "concept": [concept if k else 0.9] * 8,
        })  # fmt: skip
    sheet = [_png(20 * k) for k in range(looks)] if pictures else []
    return {"task": task, "method": method, "seed": seed, "ended": ended, "points": points, "pictures": sheet}


def _png(shade):
    stream = io.BytesIO()
    Image.new("RGB", (24, 8), (shade, 0, 0)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def keep(folder, *runs):
    for found in runs:
        name = methods.slug("comparison", found["task"], found["method"], found["seed"], 500)
        rows.keep(folder / f"{name}.json", found)
    return folder


# --- the comparison ---


@pytest.mark.parametrize("count", [3, 5])
def test_intervals_over_seeds_and_prompts_hold_the_truth_where_few_seeds_differ(count):
    """A two-way table of independent effects, the seeds' as large as the prompts'."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        values = rng.normal(0, 1.0, (count, 1)) + rng.normal(0, 1.0, (1, 40)) + rng.normal(0, 1.0, (count, 40))
        center, low, high = comparison.crossed(values)
        assert center == pytest.approx(values.mean())
        held += low <= 0 <= high
    assert 0.89 <= held / 400 <= 0.98  # a bootstrap of seeds and prompts: 0.79 with three seeds, 0.87 with five


def test_intervals_of_one_seed_or_one_prompt_are_students():
    line = np.linspace(0, 1, 40)
    half = comparison.student(39) * np.std(line, ddof=1) / 40**0.5
    for values in (line[None], np.tile(line, (5, 1)), line[:, None]):  # seeds that agree add nothing
        assert comparison.crossed(values) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    holes = np.where(np.arange(40) < 20, np.tile(line, (5, 1)), np.nan)
    assert comparison.crossed(holes) == pytest.approx(comparison.crossed(line[None, :20]))  # what nobody was asked
    some = np.tile(line, (5, 1))
    some[2, 7] = np.nan  # is filled with what its prompt has elsewhere
    assert comparison.crossed(some)[2] == pytest.approx(0.5 + half, rel=0.01)
    assert comparison.crossed(np.array([[2.0]])) == (2.0, -np.inf, np.inf)
    assert np.isnan(comparison.crossed(np.full((2, 3), np.nan))).all()


def test_a_run_says_why_it_ended():
    assert comparison.why_ended([1, 3, 2, 1, 2], spent=False) == "saturated"
    assert comparison.why_ended([1, 2, 5, 4, 3, 2], spent=True) == "saturated"  # at its last look, and as true
    assert comparison.why_ended([1, 2, 3, 4, 5, 6], spent=True) == "budget"
    assert comparison.why_ended([1, 2], spent=False) == "not finite"


def test_a_run_is_judged_at_the_best_goal_that_kept_its_concepts():
    found = row("SRPO", 0, 0.5)
    assert comparison.best_kept(found["points"], "style") == 5
    assert comparison.looks_judged(found) == [5, 5]
    lost = row("SRPO", 0, 0.5, concept=0.8)
    assert comparison.best_kept(lost["points"], "style") == 0  # all looks lost more than .05: the base
    assert comparison.best_kept(lost["points"], "scenes") == 5  # there prompts name several things
    assert comparison.stalled([0, 3, 2, 1, 2, 3]) and not comparison.stalled([0, 3, 2, 1, 4])
    assert not comparison.stalled([0, 1, 2])


def test_concepts_that_only_half_of_the_prompts_kept_are_lost_on_the_others():
    """Every look draws .1 more of one half and .1 less of the other: together all are kept, each half loses its own."""
    found = row("SRPO", 0, 0.5)
    for point in found["points"][1:]:
        point["concept"] = [1.0, 0.8] * 4
    found["points"][0]["concept"] = [0.9] * 8
    assert comparison.keeping(found["points"], 0.05) == list(range(6))
    assert comparison.keeping(found["points"], 0.05, slice(1, None, 2)) == [0]
    assert comparison.at_best([found], "concept").ravel().tolist() == pytest.approx([0.0, -0.1] * 4)


def test_a_best_look_that_is_chance_is_no_rise():
    """Nothing is learned, six looks differ by chance: the best of them has a rise on the prompts that chose it alone.
    Prompts that rise at different looks are not each judged at their own."""
    rng, found = np.random.default_rng(0), []
    for seed in range(200):
        run = row("SRPO", seed, 0.0)
        for point in run["points"][1:]:
            point["heldout"] = (1.0 + rng.normal(0, 0.1, 8)).tolist()
        found.append(run)
    values = [max(comparison.mean(point, "heldout") for point in run["points"]) - 1.0 for run in found]
    assert np.mean(values) > 0.03  # what a look chosen by its own prompts says
    assert abs(comparison.at_best(found, "heldout").mean()) < 0.01


def test_processor_seconds_are_those_of_the_run_that_was_disturbed_least():
    runs = [row("SRPO", s, 0.5) for s in range(4)]
    del runs[3]["points"][1:]  # it was not finite before its first look
    for point in runs[1]["points"]:
        point["processor_seconds"] *= 2.6  # the same run, beside other work
    cost = comparison.summary(runs)["style"]["methods"]["SRPO"]["to_best"]
    assert (cost["forwards"], cost["scored"], cost["processor_seconds"]) == (500, 50, pytest.approx(10.0))


def test_the_summary_pairs_seeds_and_names_what_it_cost(tmp_path):
    runs = [row("SRPO", s, 0.5) for s in range(3)] + [row("DDPO", s, 0.2, ended="saturated") for s in (1, 2)]
    found = comparison.summary(runs)["style"]
    assert found["leader"] == "SRPO" and found["methods"]["SRPO"]["goal"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["methods"]["DDPO"]["less than SRPO"] == pytest.approx((0.3, 0.3, 0.3))
    assert found["methods"]["DDPO"]["ended"] == {"saturated": 2}
    flat = [row("DDPO", 0, rise, ended=why) for rise, why in ((0.0, "saturated"), (0.0, "budget"), (0.1, "saturated"))]
    assert [comparison.how_ended(run) for run in flat] == ["never rose", "budget", "saturated"]
    lucky = [row("SRPO", s, 0.5) for s in range(3)] + [row("DDPO", 0, 0.9)]
    assert comparison.summary(lucky)["style"]["leader"] == "SRPO"  # one seed leads nobody with three
    never = comparison.summary([row("DDPO", 0, 0.0, ended="saturated")])
    assert "| DDPO | 1 | +0.000 |  |" in comparison.table(never)
    assert "| never |  |  | 1 never rose (at 500) |" in comparison.table(never)
    some = comparison.summary([row("DDPO", 0, 0.0), row("DDPO", 1, 0.2)])["style"]["methods"]["DDPO"]
    assert some["to_best"]["forwards"] == 500  # one that never rose got nowhere, at no cost that means anything
    text = comparison.table({"style": found})
    assert "| SRPO | 3 | +0.500 (+0.500 to +0.500) |  | +0.00" in text and "| 500 (25%) | 50 | 10 | 3 budget" in text
    rows.keep_tuned(tmp_path, {"style: SRPO": comparison.first_rate("SRPO") * 4})
    told = comparison.searched(runs, tmp_path)
    assert told == {"style": "Learning rates, the highest tried: SRPO; not searched, the recipe's: DDPO."}
    assert comparison.table({"style": found}, told).rstrip().endswith(told["style"])
    assert "| DDPO | 2 | +0.200 (+0.200 to +0.200) | +0.300 (+0.300 to +0.300) |" in text


def test_methods_that_differentiate_are_left_out_of_black_boxes():
    assert comparison.applies("SRPO", "style") and comparison.applies("DDPO", "jpeg")
    assert not comparison.applies("SRPO", "jpeg") and comparison.applies("LeapAlign", "scenes")  # its soft form
    assert comparison.applies("DRaFT-1", "scenes") and not comparison.applies("DRaFT-1", "style")
    assert comparison.applies("DiffusionNFT", "unguided") and not comparison.applies("DDPO", "unguided")
    assert set(tasks.TASKS) == {"style", "absolute", "scenes", "unguided", "jpeg", "taste"}


def test_a_task_fixes_settings_rate_and_guidance_of_its_methods(tmp_path, monkeypatch):
    fixed = methods.plan_of("DiffusionNFT", tasks.TASKS["unguided"])
    shared = methods.plan_of("DiffusionNFT", tasks.TASKS["scenes"])
    assert (fixed.model.lora_rank, fixed.trainer.batch_size) == (16, 8) != (shared.model.lora_rank, shared.trainer)
    assert fixed.algorithm.kl == 1e-3 and shared.model.lora_rank == 4
    rows.keep_tuned(tmp_path, {"style: DiffusionNFT": 0.5})
    assert methods.rate("DiffusionNFT", tmp_path, "unguided") == 1e-3
    assert methods.rate("DiffusionNFT", tmp_path, "jpeg") == 0.5
    told = comparison.searched([row("DiffusionNFT", 0, 0.1, task="unguided")], tmp_path)
    assert told == {"unguided": "Learning rates, not searched, 0.001: DiffusionNFT."}
    asked = []
    monkeypatch.setattr(methods, "generate", lambda *given, **named: asked.append(named["guidance"]))
    monkeypatch.setattr(methods, "quantise", lambda images: [])
    for name in ("unguided", "scenes"):
        with contextlib.suppress(KeyError):  # of no pictures there is nothing to measure
            methods.measure(None, methods.referees(2, (0,), False, name))
    assert asked == [1.0, None]


def test_images_that_a_reward_looks_at_are_counted_once_for_two_texts():
    reward = load_reward("emoji")
    counted = methods.counted(reward)
    images = torch.rand(3, 3, 64, 64)
    pair = tasks.preference(counted)(images, ["a dog"] * 3)
    assert counted.images == 3 and torch.allclose(pair, tasks.preference(reward)(images, ["a dog"] * 3))
    plain = methods.counted(lambda images, prompts: images.mean((1, 2, 3)))
    plain(images, ["a dog"] * 3)
    assert plain.images == 3


class Seen:
    """A detector that finds a cat where the left half is bright, and a dog where the right half is."""

    def detect(self, images):
        found = []
        for image in images:
            half = image.shape[-1] // 2
            sides = (("cat", -0.5, image[..., :half]), ("dog", 0.5, image[..., half:]))
            found.append([Detection(name, None, x, 0.0, 0.3, 0.9) for name, x, part in sides if part.mean() > 0.5])
        return found


def test_methods_that_differentiate_get_the_soft_form_and_all_are_judged_exactly(monkeypatch):
    """SRPO, ReFL, LeapAlign train on SoftTaskReward, DDPO on the exact fraction; the mirrored look turns its prompt."""
    trained = {}

    def stop(model, algorithm, reward, prompts, **settings):
        trained[name] = (reward.reward, list(prompts))
        return methods.Outcome(None, 1, "done", 0)

    monkeypatch.setattr(methods, "train", stop)
    monkeypatch.setattr(geneval, "load_detector", Seen)
    monkeypatch.setattr(soft_tasks, "load_detector", Seen)
    monkeypatch.setattr(tasks, "scene_prompts", lambda training: ["a cat"])
    scenes = tasks.TASKS["scenes"]._replace(prompts=tasks.scene_prompts)
    tasks.exact.cache_clear()
    who = methods.Referees(None, ["a cat"], (0,), {"values": {}}, scenes)
    for name in ("SRPO", "ReFL", "LeapAlign", "DDPO"):
        methods.watch(name, 0, who, budget=1, checks=1)
        kind = geneval.TaskReward if name == "DDPO" else soft_tasks.SoftTaskReward
        assert type(trained[name][0]) is kind and trained[name][1] == ["a cat"]
    judge, again = tasks.exact(strict=True), tasks.mirrored()
    images = torch.zeros(2, 3, 8, 8)
    images[0, ..., :4] = images[1, ..., 4:] = 1.0
    assert judge(images, ["a cat", "a cat"]).tolist() == [1.0, 0.0] == again(images.flip(-1), ["a cat"] * 2).tolist()
    tasks.exact.cache_clear()


# --- what it costs ---


def test_the_plan_is_the_sum_of_calls_times_prices(tmp_path, capsys):
    prices = budget.Prices(forward=1.0, backward=2.0, score=0.5, score_backward=0.25, look=10.0)
    assert budget.calls_of("DDPO") == (15, 7, 1)  # guidance 1: half of its recipe's
    assert budget.per_forward("DDPO", prices) == pytest.approx(1 + (7 * 2.0 + 0.5) / 15)
    assert budget.calls_of("SRPO") == (20, 4, 4)  # the rollout keeps its guidance
    assert budget.per_forward("SRPO", prices) == pytest.approx(1 + (4 * 2.0 + 4 * 0.75) / 20)
    assert budget.row_seconds("DDPO", prices, 1500, 6, 96) == pytest.approx(1500 + 100 * 14.5 + 6 * 96 * 10)
    wanted = [rows.Row(tmp_path / f"{seed}.json", comparison.run, ("jpeg", "DDPO", seed, 48, 1500, 6, [], True))
              for seed in range(3)]  # fmt: skip
    search = [rows.Row(tmp_path / "t.json", comparison.try_rate, ("style", "DDPO", 1e-3, 150, 48, []))]
    rows.stored(wanted[0]._replace(make=lambda *arguments: {}))
    whole = 2 * budget.row_seconds("DDPO", prices, 1500, 6, 96) + budget.row_seconds("DDPO", prices, 150, 1, 48)
    text = comparison.plan(wanted, search, 2, prices)
    assert f"3 of 4 rows are left, 1 of them of the search: at most {whole / 3600:.1f} processor hours" in text
    assert f"| DDPO | {budget.row_seconds('DDPO', prices, 1500, 6, 96) / 60:.1f} |" in text


def test_every_method_says_what_it_costs_and_is_compared_somewhere():
    for method in methods.available():
        assert 0 < budget.calls_of(method).backward < budget.calls_of(method).forward, method
        if method not in comparison.STAND_INS:
            assert any(comparison.applies(method, task) for task in tasks.TASKS), method


# --- several tastes ---


def test_tastes_share_the_concepts_and_are_told_apart_by_them():
    """A student that draws each taste on its own concepts; the merge draws both everywhere, half."""
    prompts = ["a dog on a blue background", "a red rose", "a beer", "a car"]
    owners = [opd.owner(prompt) for prompt in prompts]
    assert owners == ["3d", "3d", "3d", "outline"]
    own = {style: [float(who == style) for who in owners] for style in opd.TASTES}
    student, merge = own | {"concept": [1.0] * 4}, {style: [0.5] * 4 for style in opd.TASTES} | {"concept": [0.5] * 4}
    base = {style: [0.0] * 4 for style in opd.TASTES} | {"concept": [1.0] * 4}
    row_ = {"owners": owners, "models": {"base": base, "student": student, "merged": merge}}
    found = opd.summary([row_, row_])
    for style in opd.TASTES:
        assert found["student"][f"{style}, own"] == (1.0, 1.0, 1.0)
        assert found["merged"][f"{style}, own"] == (0.5, 0.5, 0.5)
        assert found["student"][f"{style}, others"] == (0.0, 0.0, 0.0)
    assert found["merged"]["concept"] == (-0.5, -0.5, -0.5)
    assert "| student |" in opd.table(found)


# --- rows ---


def test_rows_of_another_model_are_made_again_and_never_read(tmp_path, monkeypatch, capsys):
    """What was measured of a first model is no row of a second: no claim, no table, no tuned learning rate."""
    keep(tmp_path, *(row(name, s, 0.5) for name in ("SRPO", "DanceGRPO") for s in range(2)))
    rows.keep_tuned(tmp_path, {"style: SRPO": 1.0})
    wanted = rows.Row(tmp_path / "made.json", len, ([1, 2],), recipe="a")
    assert rows.stored(wanted) == 2 and rows.is_made(wanted)
    assert verdicts(tmp_path)["srpo-dance"].verdict == "fails" and methods.rate("SRPO", tmp_path) == 1.0
    for path in tmp_path.glob("*.json"):
        held = json.loads(path.read_text())
        path.write_text(json.dumps(held | {"of": held["of"] | {"model": "another"}}))
    assert {found.verdict for found in verdicts(tmp_path).values()} == {"not measured"}
    assert methods.rate("SRPO", tmp_path) != 1.0 and results_page.picture_table(tmp_path, "light") is None
    told = "\n".join(results_page.absent(tmp_path))
    assert "6 rows of comparison, made, tuned" in told and "no rows of style for any method" in told
    assert rows.stored(wanted._replace(arguments=([1, 2, 3],))) == 3  # in the old one's place
    with pytest.raises(ValueError, match="from a recipe with other settings"):
        rows.stored(wanted._replace(arguments=([1, 2, 3],), recipe="b"))


def test_a_row_is_of_all_the_weights_that_it_needs(tmp_path):
    part = tmp_path / "generator" / "delta.safetensors"
    part.parent.mkdir()
    part.write_bytes(b"one")
    wanted = rows.Row(tmp_path / "made.json", len, ([1, 2],), (str(part.parent),))
    rows.stored(wanted)
    assert rows.is_made(wanted)
    part.write_bytes(b"two")
    rows.digest.cache_clear()
    assert not rows.is_made(wanted) and list(rows.made_in(tmp_path, "*.json")) == []


def asked(folder, **more):
    """The command's arguments."""
    usual = vars(comparison.usual(folder)) | {"tasks": ["jpeg"], "methods": ["DDPO"], "jobs": 0, "minutes": np.inf}
    return comparison.argparse.Namespace(**usual | more)


def test_a_table_of_one_task_keeps_the_others_and_says_what_it_lacks(tmp_path):
    """comparison.py --tasks jpeg, after the style: the tables hold both, and no row of other settings."""
    for wanted in comparison.rows_of(asked(tmp_path, tasks=["style"], methods=["SRPO"])):
        rows.stored(wanted._replace(make=lambda task, method, seed, *_: row(method, seed, 0.5)))
    wanted = comparison.rows_of(asked(tmp_path))
    for one in wanted[:2]:  # cut off before the third seed
        rows.stored(one._replace(make=lambda task, method, seed, *_: row(method, seed, 0.2, task=task)))
    assert len(comparison.standing(asked(tmp_path), wanted)) == 2 + 5
    assert comparison.standing(asked(tmp_path, prompts=24), wanted) == wanted[:2]
    text = comparison.write(comparison.usual(tmp_path))
    assert "| SRPO | 5 |" in text and "| DDPO | 2 |" in text and "Fewer than 3 seeds: DDPO (2)." in text
    assert "Not measured: SQDF, ReFL, DRaFT-LV," in text
    assert "**absolute reward**: Not measured: `python benchmarks/comparison.py --tasks absolute`." in text
    assert rows.table_of(tmp_path / "comparison.md") == (text.strip(), True)
    assert [found["seed"] for found in time_to_preference.compared(tmp_path)] == [0, 1, 2, 3, 4]
    assert "| SRPO |" in time_to_preference.write(tmp_path) and "| DDPO |" not in time_to_preference.write(tmp_path)


def test_a_part_of_the_comparison_has_every_method_at_fewer_seeds(tmp_path):
    order = [row.arguments[1:3] for row in comparison.rows_of(asked(tmp_path, methods=["DDPO", "DiffusionNFT"]))]
    named = comparison.rows_of(asked(tmp_path, methods=["DDPO"], budget=60))[0].path.name
    assert named == "early-jpeg-DDPO-0-60.json"  # which no table reads
    assert order == [(name, seed) for seed in comparison.SEEDS for name in ("DDPO", "DiffusionNFT")]


@pytest.mark.parametrize(
    ("goals", "lost", "tried", "chosen"),
    [({1: 0.1, 2: 0.2, 4: 0.3}, 4, [1, 2, 4], 4), ({1: 0.1, 2: 0.2, 4: 0.1}, 2, [1, 2, 4], 2),
     ({1: 0.2, 2: 0.1, 0.5: 0.1}, 2, [1, 2, 0.5], 1), ({1: 0.2, 2: 0.4, 0.5: 0.3}, 1, [1, 2, 0.5], 0.5)],
)  # fmt: skip
def test_a_search_goes_on_from_the_better_of_two_rates(tmp_path, monkeypatch, goals, lost, tried, chosen):
    """Three runs for everybody; a rate above `lost` costs the concepts."""
    usual, made = recipe.read("refl-emoji").trainer.lr, []

    def run(task, method, lr, *_):
        made.append(lr / usual)
        factor = min(goals, key=lambda known: abs(known - lr / usual))
        return {"lr": lr, "goal": goals[factor], "concept": 0.9 if factor <= lost else 0.5, "concept_base": 0.9,
                "finite": True}  # fmt: skip

    monkeypatch.setattr(comparison, "try_rate", run)
    args = asked(tmp_path, tasks=["style", "jpeg"], methods=["ReFL"])
    assert comparison.tune(args) == {"style: ReFL": pytest.approx(usual * chosen)} and made == pytest.approx(tried)
    assert methods.rate("ReFL", tmp_path) == methods.rate("ReFL", tmp_path, "absolute") == usual * chosen
    assert comparison.unsearched(args) == [] and comparison.unsearched(asked(tmp_path)) == ["DDPO"]


# --- the claims ---


def verdicts(folder):
    return {found.claim.key: found for found in claims.judge(folder)}


def test_a_ratio_of_forwards_holds_fails_or_is_open(tmp_path):
    """SRPO is there at once, DiffusionNFT 2.5 times faster than Flow-GRPO, where 25 are claimed."""
    keep(tmp_path, *(row("SRPO", s, 0.5, speed=500.0) for s in range(3)))
    keep(tmp_path, *(row("DanceGRPO", s, 0.5) for s in range(3)))
    keep(tmp_path, *(row("Flow-GRPO", s, 0.5) for s in range(3)))
    keep(tmp_path, *(row("DiffusionNFT", s, 0.5, speed=2.5) for s in range(3)))
    found = verdicts(tmp_path)
    assert found["nft-flow"].found.value == pytest.approx(2.5) and found["nft-flow"].verdict == "fails"
    assert found["srpo-flow"].verdict == "holds" and found["srpo-flow"].found.bound  # there before anybody looked
    assert found["srpo-dance"].verdict == "open" and found["srpo-dance"].found.value == pytest.approx(4.0)
    for seed in range(3):  # looked at more often, with the same settings
        early = row("SRPO", seed, 0.5, speed=500.0)
        for point in early["points"]:
            point["forwards"] /= 10
        rows.keep(tmp_path / f"{methods.slug(comparison.EARLY, 'style', 'SRPO', seed, 50)}.json", early)
    found = verdicts(tmp_path)
    assert found["srpo-dance"].found.value == pytest.approx(40.0) and found["srpo-dance"].verdict == "open"
    keep(tmp_path, *(row("DanceGRPO", s, 0.5 * (s == 0)) for s in range(3)))  # two seeds never get there
    open_one = verdicts(tmp_path)["srpo-dance"]
    assert open_one.found.bound and open_one.verdict == "open"
    assert claims.told(open_one.found).startswith("about ") and open_one.found.high == np.inf
    keep(tmp_path, *(row("DanceGRPO", s, 0.5 * (s < 2)) for s in range(5)), *(row("SRPO", s, 0.5) for s in (3, 4)))
    assert verdicts(tmp_path)["srpo-dance"].found.low > 0  # two seeds may both be left out
    assert verdicts(tmp_path)["sqdf-draft"].verdict == "not measured"


def test_a_fast_method_that_does_not_get_there_holds_nothing(tmp_path):
    keep(tmp_path, *(row("SRPO", s, 0.5 * (s > 0), speed=2.5) for s in range(5)))  # the first seed learns nothing
    keep(tmp_path, *(row("Flow-GRPO", s, 0.4 + 0.001 * s) for s in range(5)))
    found = verdicts(tmp_path)["srpo-flow"]
    assert found.found.short and found.verdict == "open" and claims.told(found.found).startswith("at most ")


def test_methods_that_raise_nothing_are_open_and_not_unmeasured(tmp_path):
    keep(tmp_path, *(row(name, s, 0.0) for name in ("SRPO", "Flow-GRPO") for s in range(2)))
    found = verdicts(tmp_path)["srpo-flow"]
    assert found.verdict == "open" and claims.told(found.found) == "? (no interval)"
    assert claims.as_json([found])["srpo-flow"]["low"] is None  # JSON has no infinity


def test_intervals_of_ratios_see_seeds(tmp_path):
    """Logarithms of forwards that differ over seeds by s: half a width of t s sqrt(2 / n), whatever the prompts."""
    rng = np.random.default_rng(0)
    held = 0
    rise, even = np.array([[0.0], [1.0]]), np.ones(1)
    for _ in range(200):
        cubes = [[(np.array([0.0, np.exp(rng.normal(5, 0.2))]), rise) for _ in range(5)] for _ in range(2)]
        half = claims._half_width(cubes)
        held += abs(claims._log_ratio(cubes, even)) <= half
    assert 0.91 <= held / 200 <= 0.99
    assert claims._half_width([cubes[0][:1], cubes[1]]) == np.inf
    looks = np.array([0.0, 100, 200])  # whoever rises less sets the level, and so how far both have to go
    low = [(looks, np.array([[0.0], [each / 2], [each]])) for each in (0.1, 0.2, 0.3)]
    high = [(looks, np.array([[0.0], [0.4], [0.8]]))] * 3
    assert claims._half_width([low, high]) > claims._half_width([[low[1]] * 3, high]) == 0.0


def test_a_ratio_to_a_rise_that_is_chance_is_neither_bound(tmp_path):
    """The slow method goes up for two seeds of five."""
    keep(tmp_path, *(row("SRPO", s, 0.5, speed=2.5) for s in range(5)))
    keep(tmp_path, *(row("Flow-GRPO", s, 0.1 * (s < 2) + 0.01) for s in range(5)))
    assert claims._by_chance(claims.over_runs(comparison.at_best(claims.runs_of(tmp_path, "style", "Flow-GRPO")[0],
                                                                 "heldout")))  # fmt: skip
    found = verdicts(tmp_path)["srpo-flow"]
    assert found.verdict == "open" and claims.told(found.found).startswith("about ")


def test_two_methods_are_compared_at_one_budget(tmp_path):
    keep(tmp_path, *(row(name, s, 0.5) for name in ("SRPO", "DanceGRPO") for s in range(2)))
    longer = row("SRPO", 0, 0.9)
    rows.keep(tmp_path / f"{methods.slug('comparison', 'style', 'SRPO', 0, 9000)}.json", longer)
    pair, alone = claims.runs_of(tmp_path, "style", "SRPO", "DanceGRPO"), claims.runs_of(tmp_path, "style", "SRPO")
    assert [len(own) for own in pair] == [2, 2] and alone == [[longer]]
    assert claims.runs_of(tmp_path, "style", "SRPO", "ReFL") == [[], []]


def test_forwards_to_a_level_lie_on_the_line():
    forwards, rises = np.array([0.0, 100, 200]), np.array([0.0, 0.1, 0.3])
    assert claims.reach(forwards, rises, 0.2) == (pytest.approx(150), True, False)
    assert claims.reach(forwards, rises, 0.4) == (200.0, False, False)
    assert claims.reach(forwards, rises, 0.05) == (100.0, True, True)  # not 50: nobody looked before 100


def test_differences_of_ablations_are_paired_by_seed(tmp_path):
    for name, goals in (("the recipe", (3.0, 3.1, 3.2)), ("gamma 1", (2.9, 3.0, 3.1))):
        for seed, goal in enumerate(goals):
            path = tmp_path / f"{methods.slug('sqdf', 'ablations', name, seed, 4000)}.json"
            rows.keep(path, [{"heldout": 2.5}, {"heldout": goal}])
    found = verdicts(tmp_path)["sqdf-discount"]
    assert found.verdict == "holds" and tuple(found.found[:3]) == pytest.approx((0.1, 0.1, 0.1))
    assert claims.over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_above_counts_where_the_frontier_is_higher(tmp_path):
    better, worse = (row(name, 0, 0.5) for name in ("SQDF", "DRaFT-LV"))
    for point in worse["points"][1:]:
        point["diversity"] = [0.1] * 8
    keep(tmp_path, better, worse)
    found = verdicts(tmp_path)["sqdf-draft"]
    assert found.found.value > 0.95 and found.verdict == "holds"


def test_frontiers_are_compared_where_both_are(tmp_path):
    """DRaFT goes on where SQDF does not get; what has no diversity is left out, not zero; an end is no cut."""
    kept, far = row("SQDF", 0, 0.2, looks=4), row("DRaFT-LV", 0, 0.8)
    for k, point in enumerate(kept["points"]):
        point["diversity"] = [np.nan] * 4 + [0.2 - 0.001 * k] * 4
    for k, point in enumerate(far["points"]):
        point["diversity"] = [0.2 - 0.02 * k] * 8
    keep(tmp_path, kept, far)
    found = verdicts(tmp_path)["sqdf-draft"].found
    assert found.value > 0.95 and len(found.series["points"]["DRaFT-LV"]) == 6
    assert found.series["points"]["SQDF"][-1] == pytest.approx([1.2, 0.197])


def test_at_equal_diversity_the_held_out_reward_is_compared(tmp_path):
    first, second = row("SQDF", 0, 0.5), row("ReFL", 0, 0.2)
    for found in (first, second):
        for k, point in enumerate(found["points"]):
            point["diversity"] = [1.0 - 0.1 * k] * 8
    keep(tmp_path, first, second)
    found = verdicts(tmp_path)["sqdf-refl-heldout"]
    assert found.found.value > 0.9 and found.verdict == "holds" and found.found.series["at"] == "diversity"


def test_layout_is_judged_on_prompts_of_position_and_number(tmp_path, monkeypatch):
    """LeapAlign gains .3 of them in the mirror, and loses everywhere else; what its goal says counts for nothing."""
    prompts = ["two", "left"] + ["plain"] * 6
    read = {"two": Caption("dog", number=2), "left": Caption("dog", relation="left"), "plain": Caption("dog")}
    monkeypatch.setattr(claims, "parse_prompt", read.get)
    for method, gains in (("LeapAlign", [0.3, 0.3] + [-0.2] * 6), ("DRaFT-1", [0.0] * 8)):
        for seed in range(2):
            found = row(method, seed, 0.0, task="scenes")
            for point in found["points"][1:]:
                point["heldout"] = (1.0 + np.array(gains) + (method == "LeapAlign") * 1.0).tolist()
            for k, point in enumerate(found["points"]):
                point["again"] = np.array(gains if k else [0.0] * 8).tolist()
            keep(tmp_path, found | {"prompts": prompts})
    found = verdicts(tmp_path)["leap-draft"]
    assert found.found.value == pytest.approx(0.3) and found.verdict == "holds"
    assert verdicts(tmp_path)["leap-refl"].verdict == "not measured"


def test_style_counts_at_the_looks_that_kept_the_concepts(tmp_path):
    for seed in range(2):
        found = row("SRPO", seed, 0.5)
        for k, point in enumerate(found["points"]):
            point["style"], point["concept"] = [0.2 * k] * 8, [0.9 - 0.01 * k] * 8
        keep(tmp_path, found)
    assert verdicts(tmp_path)["srpo-style"].found.value == pytest.approx(0.6)  # .03 less at the fourth look
    assert verdicts(tmp_path)["srpo-style"].verdict == "fails"


def test_rises_of_the_tasks_and_a_black_box_beyond_the_best_of_eight(tmp_path):
    keep(tmp_path, *(row("Flow-GRPO released", s, 0.2, task="scenes") for s in range(2)))
    keep(tmp_path, row("DiffusionNFT", 0, 0.1, task="scenes"))
    assert verdicts(tmp_path)["nft-scenes"].verdict == "open"  # of one seed
    keep(tmp_path, row("DiffusionNFT", 1, 0.1, task="scenes"))
    made = {"score": [-1.0, -1.2] * 4, "best of 8": [-1.5, -1.4] * 4, "concept": [0.9] * 8,
            "concept before": [1.0] * 8}  # fmt: skip
    for seed in range(2):
        rows.keep(tmp_path / f"distar-blackbox-{seed}.json", made)
    found = verdicts(tmp_path)
    assert found["flow-scenes"].found.value == pytest.approx(0.2) and found["flow-scenes"].verdict == "holds"
    assert found["nft-scenes"].verdict == "fails"
    assert found["distar-blackbox"].found.value == pytest.approx(0.35) and found["distar-blackbox"].verdict == "holds"
    assert found["distar-blackbox-concept"].verdict == "fails"


def test_a_seed_that_settings_were_chosen_by_counts_for_no_claim(tmp_path):
    keep(tmp_path, *(row("DiffusionNFT", s, 0.2 if s else 0.9, task="unguided") for s in range(3)))
    assert verdicts(tmp_path)["nft-unguided"].found.value == pytest.approx(0.2)


def test_a_colour_cast_and_a_hacked_reward_count_against(tmp_path):
    def ablation(style, cast, optimised, heldout):
        return {"drift": {"colour_cast": cast, "high_frequency_ratio": 0.7}, "relative emoji": optimised,
                "relative emoji-heldout": heldout, "style": style, "style_base": 0.1, "concept": 0.9,
                "concept_base": 0.95}  # fmt: skip

    told = {"default": (0.02, 0.2, 0.1), "no inversion branch": (0.05, 0.2, 0.05), "late window": (0.1, 0.4, 0.02),
            "early window": (0.03, 0.2, 0.1), "absolute, both branches": (0.02, 0.2, 0.04)}  # fmt: skip
    for name, values in told.items():
        for seed in range(3):
            path = tmp_path / f"{methods.slug('srpo', 'ablations', name, seed)}.json"
            rows.keep(path, ablation(0.5, *values))
    found = verdicts(tmp_path)
    assert found["srpo-inversion-cast"].found.value == pytest.approx(0.03)
    assert found["srpo-inversion-heldout"].verdict == found["srpo-inversion-cast"].verdict == "holds"
    assert found["srpo-late-hacks"].found.value == pytest.approx(0.95 - 0.5)
    assert found["srpo-relative"].found.value == pytest.approx(0.8 - 0.5)  # less of its rise is the reward's alone


def test_the_cost_of_one_step_is_a_ratio_of_times(tmp_path):
    what = "network, batch 16"
    times = {f"teacher, {what}": 0.16, f"generator, {what}": 0.01, f"ratio, {what}": 16.0, f"ratio, {what}, low": 15.5,
             f"ratio, {what}, high": 16.5}  # fmt: skip
    change = {"value": 0.9, "base": 0.92, "change": -0.02, "change_low": -0.025, "change_high": 0.0}
    made = {"seconds": times, "plain": {}, "styled": {"style_named": change}}
    made["plain"] = {"concept": change, "reward/emoji-heldout": change}
    path = tmp_path / f"{methods.slug('distar', 'teacher', 'emoji-1step')}.json"
    rows.keep(path, made)
    found = verdicts(tmp_path)
    assert found["distar-cost"].verdict == found["distar-style"].verdict == "holds"
    assert found["distar-teacher"].verdict == "open" and found["distar-cost"].found.low == 15.5
    del times[f"ratio, {what}, low"], times[f"ratio, {what}, high"]
    rows.keep(path, made)
    assert verdicts(tmp_path)["distar-cost"].verdict == "open"  # 16 without an interval says nothing
    assert distar.of_median(np.arange(15.0)) == (3.0, 11.0) and distar.of_median(np.arange(3.0)) == (0.0, 2.0)


def test_the_claims_table_says_what_was_tried_and_how_to_measure(tmp_path):
    keep(tmp_path, *(row(name, s, 0.5) for name in ("SRPO", "DanceGRPO") for s in range(2)))
    text = claims.table(claims.judge(tmp_path))
    assert "| 1 (1 to 1) | seeds, prompts | **fails**; tried: learning rates of both searched alike" in text
    assert "**not measured**: `python benchmarks/srpo.py ablations`" in text
    assert f"Of {len(claims.CLAIMS)} claims: 1 hold, 2 fail, {len(claims.CLAIMS) - 3} are not measured" in text
    waiting = claims.missing(claims.judge(tmp_path))
    assert any(line.startswith("python benchmarks/srpo.py ablations  # srpo-inversion, srpo-inv") for line in waiting)
    assert len({line.split("  # ")[0] for line in waiting}) == len(waiting)


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
    told = "\n".join(results_page.absent(results))
    assert "not measured: python benchmarks/srpo.py ablations  # srpo-inversion" in told
    assert "no rows of jpeg for any method: python benchmarks/comparison.py --tasks jpeg" in told
    assert "no rows of style for SQDF, ReFL" in told and "SRPO" not in told.split("no rows of style")[1].split(":")[0]


@pytest.mark.parametrize(
    ("sides", "cut"),
    [
        ((5.0, 5.2), True), ((0.6, 0.9), False), ((0.61, 0.9), True), ((0.0, 0.1), False), ((-5.2, -5.0), False),
        ((5.0, 5.0), False),
    ],
)  # fmt: skip
def test_where_an_axis_does_not_begin_at_0_a_mean_is_a_stroke_and_no_bar(sides, cut):
    """It is cut where the values differ by less than half the smallest; every seed's dot stays inside."""
    bars = {"first": [sides[0]] * 2, "second": [sides[1]] * 2}
    measured = claims.Measured(0.2, 0.1, 0.3, series={"bars": bars})
    figure, axes = results_page.plt.subplots()
    results_page._bars(axes, claims.Judged(claims.CLAIMS[0], measured), results_page.THEMES["light"])
    low, high = axes.get_xlim()
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    strokes = [segment[:, 0].tolist() for lines in axes.collections for segment in lines.get_segments()]
    dots = [float(x) for line in axes.lines for x in line.get_xdata()]
    results_page.plt.close(figure)
    assert sorted(dots) == pytest.approx(sorted([*bars["first"], *bars["second"]]))
    assert low < min(dots) and max(dots) < high if cut else low <= min(dots) and max(dots) <= high
    if cut:
        assert low > 0 and not ends and strokes == [pytest.approx([side, side]) for side in sides]
    else:
        assert low <= 0 <= high and not strokes
        assert [sorted(end) for end in ends] == [pytest.approx(sorted((0, side))) for side in sides]


def test_pictures_are_of_looks_at_equal_merit():
    runs = [row("fast", 0, 0.9), row("slow", 0, 0.4), row("never", 0, 0.01)]
    level, found = results_page.equal_looks(runs)
    assert level == pytest.approx(1.4) and found == [("base", 0), ("fast", 2), ("slow", 5)]  # fast: .36 of .4
