"""Settings that nothing reads beside others: whoever asks for one on the command line is told."""

from __future__ import annotations

import dataclasses

import pytest

from palate import recipe
from palate.algorithms import table as algorithms
from palate.recipe import SECTIONS, RecipeError, unread
from palate.recipe.guard import GuardSettings
from palate.recipe.unread import TABLE
from palate.runs import RunFolder

WORDS = "run: {{folder: runs/x}}\nalgorithm: {{name: {}}}\nreward: {{name: emoji}}\nprompts: {{list: [a dog]}}\n"


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("srpo", ["algorithm.groundtruth_ratio=0.5"], "algorithm.levels=window"),
        ("srpo", ["algorithm.levels=released", "algorithm.step=0.01"], "algorithm.levels=released"),
        ("srpo", ["algorithm.branches=[inversion]", "algorithm.k_denoise=[1, 1]"], "branches without denoise"),
        ("flow_grpo", ["algorithm.window_every=3"], "no algorithm.window"),
        ("flow_grpo", ["algorithm.trust=kl", "algorithm.clip=0.1"], "algorithm.trust=kl"),
        ("flow_grpo", ["algorithm.kl_limit=0.1"], "algorithm.trust=clip"),
        ("distar", ["algorithm.head_memory=100"], "algorithm.head_queries=0"),
        ("distar", ["algorithm.cfg=out"], "algorithm.alpha_cfg=0"),
        ("distar", ["algorithm.reward_scale=0", "algorithm.head_queries=16"], "algorithm.reward_scale=0"),
        ("srpo", ["prompts={images: x}", "algorithm.shift=2"], "and algorithm.levels=window"),
        ("sqdf", ["algorithm.buffer=none", "algorithm.buffer_size=64"], "algorithm.buffer=none"),
        ("dpo", ["algorithm.mu=0.5"], "algorithm.safeguard=off"),
        ("dpo", ["algorithm.posterior=true"], "pictures that are drawn"),
        ("dpo", ["algorithm.undesirable_weight=2"], "an algorithm.loss but kto"),
        ("leap_align", ["algorithm.leaps=1", "algorithm.nested=0.5"], "algorithm.leaps=1"),
        ("direct", ["algorithm.context_steps=20"], "no algorithm.context"),
        ("ddpo", ["algorithm.history=0", "algorithm.enough=4"], "algorithm.history=0"),
        ("srpo", ["model.weights=full", "model.lora_rank=4"], "model.weights=full"),
        ("srpo", ["model.start=runs/a", "model.lora_targets=[to_q]"], "model.start, whose layers the LoRA has"),
        ("srpo", ["trainer.ema_every=4"], "trainer.ema_decay=0"),
        ("srpo", ["trainer.reduce_gradients=loss"], "trainer.sharding=none"),
        ("srpo", ["trainer.guard.rollbacks=5"], "action=rollback"),
        ("srpo", ["trainer.guard.every=0", "trainer.guard.after=5"], "trainer.guard.every=0"),
        ("srpo", ["trainer.guard.every=0", "trainer.guard.concept_drop=0.1"], "trainer.guard.every=0"),
        ("srpo", ["trainer.guard.drift=0.3"], "the embedded model's judge"),
        ("srpo", ["trainer.guard.measures=images", "trainer.guard.concept_drop=0.1"], "image measures"),
        ("nft", ["algorithm.old_rate=0", "algorithm.old_most=0.1"], "algorithm.old_rate=0"),
    ],
)
def test_an_override_that_does_nothing_is_refused_with_what_it_depends_on(name, overrides, said):
    with pytest.raises(RecipeError, match="nothing reads it with") as caught:
        recipe.parse(WORDS.format(name), overrides)
    assert said in str(caught.value) and str(caught.value).startswith(overrides[-1].partition("=")[0] + ":")


def test_what_is_read_is_taken_and_so_is_a_recipe_that_names_everything():
    """A run writes all keys of its recipe, read or not, and goes on from it; a default asks for nothing."""
    read = recipe.parse(WORDS.format("flow_grpo"), ["algorithm.window=4", "algorithm.window_every=3"])
    again = recipe.parse(recipe.dump(read), ["algorithm.window=null"])
    assert again.algorithm.window_every == 3 and again.algorithm.window is None
    recipe.parse(WORDS.format("flow_grpo"), ["algorithm.window_every=25"])
    assert recipe.read("taste-emoji", ["model.start=runs/a"]).model.lora_targets


def test_every_key_of_the_tables_is_one_of_its_section():
    for name, rules in (TABLE | unread.SECTIONS).items():
        kind = (
            GuardSettings if name == "trainer.guard" else SECTIONS.get(name) or algorithms.find(name).settings_class()
        )
        known = {field.name: field for field in dataclasses.fields(kind)}
        for key in (key for rule in rules for key in rule.keys):
            assert known[key].default is not dataclasses.MISSING, (name, key)


TOLD_TWO = [
    "model={name: flux, folder: x, distilled_guidance: 3.5, rollout_distilled_guidance: 1}",
    "reward.name=clip-score",
]
WITHOUT_EFFECT = [
    ("draft", "prompts.images", ["prompts={images: x}"]),
    ("refl", "prompts.images", ["prompts={images: x}", "algorithm.pretrain=0"]),
    ("srpo", "model.lora_init", ["model.start=runs/a", "model.lora_init=gaussian"]),
    ("srpo", "model.reference", ["model.reference=start"]),
    ("srpo", "trainer.ema_every", ["trainer.steps=3", "trainer.ema_decay=0.9", "trainer.ema_every=4"]),
    ("srpo", "algorithm.positive, algorithm.negative", ["algorithm.positive=[3d, large]",
                                                        "algorithm.negative=[flat, large]"]),
    ("srpo", "algorithm.positive, algorithm.negative", ["algorithm.positive=[3d, large]",
                                                        "algorithm.negative=[flat, small, 3d]"]),  # the third pair
    ("srpo", "algorithm.positive, algorithm.negative", ["reward.name=warmth"]),
    ("srpo", "prompts.sizes", ["model={name: sdxl, folder: x}", "reward=null", "trainer.guard.every=0",
                               "optimize={oracle: {name: jpeg-size}}", "prompts.sizes=[512, 1024]"]),
    ("srpo", "model.rollout_distilled_guidance", [*TOLD_TWO, "algorithm.reference_penalty=0.1"]),
    *((name, "model.rollout_distilled_guidance", TOLD_TWO)
      for name in ("flow_grpo", "nft", "dgpo", "dpo")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "overrides"), WITHOUT_EFFECT)
def test_what_has_no_effect_begins_no_run_and_ends_none_that_is_stored(name, key, overrides, tmp_path, monkeypatch):
    """A run may be older than the rule; it is read, to be judged, looked at and gone on with."""
    with pytest.raises(RecipeError, match=f"^{key}: [^\n]*$"):
        recipe.parse(WORDS.format(name), overrides)
    with monkeypatch.context() as before:
        before.setattr("palate.recipe.checks.check_effects", lambda recipe, mistakes: None)
        (tmp_path / "recipe.yaml").write_text(recipe.dump(recipe.parse(WORDS.format(name), overrides)))
    with pytest.raises(RecipeError, match=f"^{key}: [^\n]*$"):
        recipe.read(str(tmp_path / "recipe.yaml"))
    assert RunFolder(tmp_path).recipe.algorithm.name == name
