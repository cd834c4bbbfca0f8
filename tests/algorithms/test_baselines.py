"""The recipes of the baselines: two steps of each on the embedded model, and the same two with a stop between them."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch

from palate import recipe
from palate.algorithms import table as algorithms
from palate.train import train

SMALL = {  # the least that still runs every part of the method
    "refl-emoji": ["algorithm.T=3"],
    "draft-emoji": ["algorithm.steps=2"],
    "ddpo-emoji": ["algorithm.steps=3", "algorithm.history=2", "algorithm.enough=2"],
    "grpo-emoji": ["algorithm.steps=3", "algorithm.group=2"],
    "dance-grpo-emoji": ["algorithm.steps=3", "algorithm.group=2"],
    "mix-grpo-emoji": ["algorithm.steps=3", "algorithm.group=2", "algorithm.window_every=1"],
    "nft-emoji": ["algorithm.steps=2", "algorithm.group=2", "algorithm.old_rate=0.2"],
    "dpo-emoji": ["algorithm.steps=2"],
    "leap-emoji": ["algorithm.steps=3"],
    "dgpo-emoji": ["algorithm.steps=2", "algorithm.group=2", "algorithm.old_rate=0.2"],
    "awm-emoji": ["algorithm.steps=2", "algorithm.group=2", "algorithm.old_rate=0.2"],
    "grpo-emoji-released": ["algorithm.steps=3", "algorithm.group=2", "model.lora_alpha=null", "trainer.ema_every=1"],
}
ONLINE = [  # the settings of dpo that remember or look back
    "algorithm.steps=2",
    "algorithm.pairs_from=policy",
    "algorithm.refresh_every=1",
    "algorithm.safeguard=parameters",
    "algorithm.noise=tracked",
]
QUIET = [
    "trainer.batch_size=2",
    "trainer.steps=2",
    "trainer.warmup=0",
    "trainer.guard.every=0",
    "trainer.preview_every=0",
    "model.lora_rank=2",
]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    made = recipe.build(recipe.read("refl-emoji", QUIET))
    return made, [p.detach().clone() for p in made.model.parameters()]


def run(parts, plan, folder, **changes):
    """Train from the first weights, or from the checkpoint when resuming; returns the weights and the rows of steps."""
    made, start = parts
    if not changes.get("resume"):
        with torch.no_grad():
            for p, value in zip(made.model.parameters(), start, strict=True):
                p.copy_(value)
    # two prompts, so that a prompt comes twice and what is remembered of it is used
    train(
        made.model,
        recipe.build_algorithm(plan),
        made.reward,
        made.prompts[:2],
        folder=folder,
        progress=False,
        **{**vars(plan.trainer), **changes},
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]
    return [p.detach().clone() for p in made.model.parameters()], rows


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_two_steps_train_and_a_stop_between_them_changes_no_bit(name, parts, tmp_path):
    plan = recipe.read(name, [*QUIET, *SMALL[name]])
    whole, rows = run(parts, plan, tmp_path / "whole")
    assert [row["event"] for row in rows] == ["step", "step"]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(row["grad_norm"] > 0 for row in rows)
    assert any(not torch.equal(now, before) for now, before in zip(whole, parts[1], strict=True))
    run(parts, plan, tmp_path / "halves", steps=1)
    halves, again = run(parts, plan, tmp_path / "halves", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    assert again == rows


def test_online_dpo_resumes_with_its_moving_reference(parts, tmp_path):
    plan = recipe.read("dpo-emoji", [*QUIET, *ONLINE])
    whole, rows = run(parts, plan, tmp_path / "whole", steps=3)
    run(parts, plan, tmp_path / "parts", steps=2)
    resumed, again = run(parts, plan, tmp_path / "parts", resume=True, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)) and again == rows
    assert rows[1]["excess_preferred"] == 0.0 and all(0 <= row["safe_scale"] <= 1 for row in rows)


@pytest.mark.slow
def test_teachers_are_distilled_and_resume_exactly(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        made = recipe.build(recipe.read("draft-emoji", [*QUIET, "algorithm.steps=2"]))
        with torch.no_grad():
            for p in made.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        made.model.save_adapter(tmp_path / name)
    teachers = f"{{a: {{adapter: {tmp_path / 'a'}, file: animals}}, b: {{adapter: {tmp_path / 'b'}}}}}"
    changes = [f"algorithm.teachers={teachers}", "algorithm.steps=2", "algorithm.steps_trained=2"]
    plan = recipe.read("opd-emoji", [*QUIET, *changes])
    torch.manual_seed(0)
    made = recipe.build(plan)
    kept = {key: p.detach().clone() for key, p in made.model.weights.network.named_parameters() if ".a." in key}
    start = [p.detach().clone() for p in made.model.parameters()]
    whole, rows = run((made, start), plan, tmp_path / "whole")
    assert kept and all(torch.equal(p, dict(made.model.weights.network.named_parameters())[k]) for k, p in kept.items())
    assert rows[0]["distance_b"] > 0 and "distance_a" not in rows[0]  # no prompt of these is an animal of that file
    run((made, start), plan, tmp_path / "halves", steps=1)
    halves, again = run((made, start), plan, tmp_path / "halves", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True)) and again == rows


@pytest.mark.slow
def test_a_one_step_generator_trains_towards_a_black_box_and_resumes_exactly(tmp_path):
    changes = ["algorithm.head_queries=2", "algorithm.head_first=2", "algorithm.assistant_warmup_steps=0"]
    full = [change for change in QUIET if not change.startswith("model.")]
    plan = recipe.read("distar-emoji-blackbox", [*full, *changes])
    made = recipe.build(plan)
    names = ("policy", "assistant")
    start = {name: [p.detach().clone() for p in made.model.parameters(name)] for name in names}

    def train_from(folder, **options):
        if not options.get("resume"):
            with torch.no_grad():
                for name in names:
                    for p, value in zip(made.model.parameters(name), start[name], strict=True):
                        p.copy_(value)
        return run((made, start["policy"]), plan, folder, **options)

    whole, rows = train_from(tmp_path / "whole", steps=3)
    assert rows[-1]["head_answers"] == 6 and rows[-1]["answer"] < 0 and rows[-1]["force_reward"] > 0
    train_from(tmp_path / "parts", steps=2)
    resumed, again = train_from(tmp_path / "parts", resume=True, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)) and again == rows


def test_the_first_factor_of_a_lora_can_be_drawn_as_sqdfs_program_does():
    plan = recipe.read("sqdf-emoji", ["model.lora_rank=8", "model.lora_init=gaussian"])
    torch.manual_seed(0)
    named = dict(recipe.build_model(plan).weights.network.named_parameters())
    first = torch.cat([p.flatten() for key, p in named.items() if ".lora_A." in key])
    assert float(first.std()) == pytest.approx(1 / 8, rel=0.05) and abs(float(first.mean())) < 0.01
    assert all(not p.any() for key, p in named.items() if ".lora_B." in key)


def test_cost_of_the_recipes_for_one_prompt():
    """The table of docs/algorithms/baselines.md."""
    table = {
        "refl-emoji": (15, 2),
        "draft-emoji": (20, 6),
        "ddpo-emoji": (30, 14),
        "grpo-emoji": (352, 112),
        "dance-grpo-emoji": (208, 80),
        "mix-grpo-emoji": (160, 32),
        "nft-emoji": (112, 16),
        "nft-emoji-tasks": (112, 16),
        "dpo-emoji": (36, 2),
        "sqdf-emoji": (9, 1),
        "leap-emoji": (20, 4),
        "dgpo-emoji": (176, 16),
        "awm-emoji": (176, 16),
        "opd-emoji": (22, 4),
    }
    for name, expected in table.items():
        plan = recipe.read(name)
        module = importlib.import_module(algorithms.find(plan.algorithm.name).load_class().__module__)
        calls = module.calls_per_update(plan.algorithm)
        assert (calls["forward"], calls["backward"]) == expected, name


def test_every_method_has_a_recipe_of_its_own_family():
    named = {recipe.read(name).algorithm.name for name in SMALL}
    assert named == {"refl", "draft", "ddpo", "flow_grpo", "nft", "dpo", "leap_align", "dgpo"}
    dance, mix = recipe.read("dance-grpo-emoji").algorithm, recipe.read("mix-grpo-emoji").algorithm
    assert dance.same_noise and dance.fraction == 0.6 and dance.beta == 0 and dance.window is None
    assert mix.window and mix.same_noise and mix.fraction == 1
