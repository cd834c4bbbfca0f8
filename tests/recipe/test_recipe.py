"""A recipe is checked whole before anything loads: every mistake is named with its key and a remedy."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import palate
from palate import recipe
from palate.algorithms.opd import Teacher, routes_of
from palate.data import load_images
from palate.recipe import RecipeError, RelativeSettings, RewardSettings, TrainerSettings, builder, reader
from palate.recipe.objective import reward_objective

GOOD = """
run: {folder: runs/x}
algorithm: {name: srpo, positive: ["3d"], negative: [flat]}
reward: {name: emoji}
prompts: {list: [a dog]}
"""

# what is wrong, the text or the overrides, words that the message must hold
HOSTILE = [
    ("empty", "", [], ["mapping of sections"]),
    ("a number", "3", [], ["got int"]),
    ("a list", "- a\n- b", [], ["got list"]),
    ("a word", "srpo", [], ["got str"]),
    ("null", "null", [], ["got nothing"]),
    ("broken YAML", "run: [1, 2", [], ["not valid YAML", "line"]),
    ("a tab", "run:\n\tfolder: x", [], ["not valid YAML"]),
    ("python object", "run: !!python/object/apply:os.system ['true']", [], ["not valid YAML"]),
    ("python name", "a: !!python/name:os.system", [], ["not valid YAML"]),
    ("unknown tag", "a: !secret 3", [], ["not valid YAML"]),
    ("two documents", GOOD + "\n---\na: 1", [], ["not valid YAML"]),
    ("an unhashable key", "? [1]\n: 2", [], ["recipe"]),
    ("a number as key", GOOD + "\n3: 4", [], ["3"]),
    ("unknown section", GOOD + "trainr: {steps: 3}", [], ["trainr", "did you mean trainer?"]),
    ("unknown key", GOOD, ["trainer.stepz=3"], ["trainer.stepz", "did you mean trainer.steps?"]),
    ("unknown algorithm key", GOOD, ["algorithm.positve=[a]"], ["did you mean algorithm.positive?"]),
    ("unknown guard key", GOOD, ["trainer.guard.evry=3"], ["did you mean trainer.guard.every?"]),
    ("a key like no other", GOOD, ["sample.qqqqqq=3"], ["sample.qqqqqq", "valid keys: steps, guidance"]),
    ("algorithm missing", "prompts: {list: [a]}\nreward: {name: emoji}", [], ["algorithm", "srpo"]),
    ("algorithm without name", GOOD, ["algorithm.name=null"], ["algorithm.name", "srpo"]),
    ("algorithm unknown", GOOD, ["algorithm.name=srop"], ["did you mean srpo?"]),
    ("algorithm a list", GOOD, ["algorithm=[1]"], ["algorithm", "mapping"]),
    ("dotted import", GOOD, ["algorithm.name=os.system"], ["algorithm.name", "srpo"]),
    ("reward unknown", GOOD, ["reward.name=emojy"], ["reward.name", "did you mean emoji?"]),
    ("reward twice", GOOD, ["reward.weights={warmth: 1.0}"], ["reward.name", "reward.weights"]),
    ("reward none", GOOD, ["reward.name=null"], ["reward.name", "reward.weights"]),
    ("reward weight unknown", GOOD, ["reward={weights: {warmt: 1.0}}"], ["reward.weights", "warmt"]),
    ("reward weight not finite", GOOD, ["reward={weights: {warmth: .nan}}"], ["reward.weights.warmth"]),
    (
        "reward without gradient",
        GOOD,
        ["reward.name=jpeg_size"],
        ["reward.name: srpo needs", "jpeg_size", "flow_grpo", "palate optimize"],
    ),
    (
        "rewards without gradient",
        GOOD,
        ["reward={weights: {remote: 1, jpeg_size: 1}, source: {remote: 'http://a'}}"],
        ["reward.weights: srpo needs", "jpeg_size, remote"],
    ),
    ("relative with srpo", GOOD, ["reward.relative={positive: 3d}"], ["reward.relative: srpo", "algorithm.positive"]),
    ("relative without words", GOOD, ["algorithm={name: draft}", "reward.relative={k: 1}"], ["positive, negative"]),
    (
        "relative without prompt",
        GOOD,
        ["algorithm={name: draft}", "reward={name: warmth, relative: {negative: flat}}"],
        ["reward.relative: warmth reads no prompt"],
    ),
    (
        "words that no reward reads",
        GOOD,
        ["reward.name=warmth", "algorithm.positive=[3d]", "algorithm.negative=[flat]"],
        ["algorithm.positive, algorithm.negative: warmth reads no prompt", "algorithm.preference=absolute"],
    ),
    (
        "relative misspelt",
        GOOD,
        ["algorithm={name: draft}", "reward.relative={positve: 3d, negative: flat}"],
        ["did you mean reward.relative.positive?"],
    ),
    ("prompts none", GOOD, ["prompts={}"], ["exactly one of prompts.file, prompts.list, prompts.images"]),
    ("prompts two", GOOD, ["prompts.file=a.txt"], ["got prompts.file and prompts.list", "prompts.file=null"]),
    ("prompts empty", GOOD, ["prompts.list=[]"], ["prompts.list"]),
    ("prompts numbers", GOOD, ["prompts.list=[1]"], ["prompts.list.0", "string"]),
    ("prompts an empty one", GOOD, ['prompts.list=[""]'], ["prompts.list.0"]),
    ("steps zero", GOOD, ["trainer.steps=0"], ["trainer.steps", "greater than or equal to 1"]),
    ("steps text", GOOD, ["trainer.steps=many"], ["trainer.steps", "integer", "'many'"]),
    ("steps half", GOOD, ["trainer.steps=1.5"], ["trainer.steps", "integer"]),
    ("lr negative", GOOD, ["trainer.lr=-1"], ["trainer.lr", "greater than 0"]),
    ("lr infinite", GOOD, ["trainer.lr=.inf"], ["trainer.lr", "finite"]),
    ("betas short", GOOD, ["trainer.betas=[0.9]"], ["trainer.betas"]),
    ("beta one", GOOD, ["trainer.betas=[0.9, 1.0]"], ["trainer.betas.1", "less than 1"]),
    ("ema one", GOOD, ["trainer.ema_decay=1"], ["trainer.ema_decay", "less than 1"]),
    ("keep one", GOOD, ["trainer.keep_checkpoints=1"], ["trainer.keep_checkpoints"]),
    ("seed negative", GOOD, ["trainer.seed=-1"], ["trainer.seed"]),
    ("guard action", GOOD, ["trainer.guard.action=stpo"], ["trainer.guard.action", "did you mean stop?"]),
    ("guard ratio", GOOD, ["trainer.guard.diversity_ratio=1.5"], ["trainer.guard.diversity_ratio"]),
    ("weights", GOOD, ["model.weights=lorra"], ["model.weights", "did you mean lora?"]),
    ("rank", GOOD, ["model.lora_rank=0"], ["model.lora_rank"]),
    ("folder empty", GOOD, ["run.folder=''"], ["run.folder"]),
    ("folder a number", GOOD, ["run.folder=7"], ["run.folder", "string"]),
    ("control words empty", GOOD, ["algorithm.positive=[]"], ["algorithm", "positive"]),
    ("window reversed", GOOD, ["algorithm.window=[0.9, 0.1]"], ["algorithm", "window"]),
    ("branch unknown", GOOD, ["algorithm.branches=[denois]"], ["algorithm.branches.0"]),
    ("section a value", GOOD, ["trainer=3"], ["trainer", "3"]),
    ("internal name", GOOD, ["algorithm_name=srpo"], ["algorithm_name", "algorithm.name"]),
    ("override without value", GOOD, ["trainer.steps"], ["section.key=value"]),
    ("override without key", GOOD, ["=3"], ["section.key=value"]),
    ("override with a gap", GOOD, ["trainer..steps=3"], ["section.key=value"]),
    ("override through a value", GOOD, ["trainer.steps.more=3"], ["trainer.steps", "integer"]),
    ("override of bad YAML", GOOD, ["trainer.steps=[1"], ["value of trainer.steps", "not valid YAML"]),
    ("override with an object", GOOD, ["trainer.steps=!!python/object:os.x {}"], ["trainer.steps", "integer"]),
    ("too large", "# " + "x" * recipe.YAML_LIMIT + "\n" + GOOD, [], ["larger than 256 KiB"]),
    (
        "a bomb",
        "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 1}]" for i in range(30)]),
        [],
        ["aliases"],
    ),
    ("a key twice", GOOD + "trainer: {lr: 1.0, steps: 2, lr: 2.0}", [], ["lr", "given twice", "line 6"]),
    ("deep nesting", "a: " + "[" * 5000, [], ["YAML"]),
]


def test_what_is_no_recipe_is_said_with_what_it_is(tmp_path):
    """A folder, a run, and an override before the recipe are no file that is missing."""
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(RecipeError, match="run' is a folder, not a recipe; name the recipe's file in it"):
        recipe.read(str(run))
    (run / "recipe.yaml").write_text(GOOD)
    with pytest.raises(
        RecipeError, match=r"is a run, not a recipe: palate resume continues it; its recipe is .*\.yaml"
    ):
        recipe.read(str(run))
    with pytest.raises(RecipeError, match=r"'run.folder=runs/x' is an override; the recipe comes first"):
        recipe.read("run.folder=runs/x", ["srpo-emoji"])


@pytest.mark.parametrize(("text", "overrides", "words"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_bad_input_is_named_in_a_few_lines(text, overrides, words):
    with pytest.raises(RecipeError) as caught:
        recipe.parse(text, overrides)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 4 and max(map(len, message.splitlines())) < 400, message


def test_who_changes_what_was_read_changes_it_for_nobody_else():
    """A text is read once; its tree belongs to whoever asked."""
    text = "trainer: {steps: 2}\nprompts: {list: [a, b]}"
    first = reader.read_yaml(text, "recipe")
    first["trainer"]["steps"], first["prompts"]["list"][0] = 9, "c"
    assert reader.read_yaml(text, "recipe") == {"trainer": {"steps": 2}, "prompts": {"list": ["a", "b"]}}
    for _ in range(2):
        with pytest.raises(RecipeError, match="trainer: given twice"):
            reader.read_yaml("trainer: {}\ntrainer: {}", "recipe")


def test_all_mistakes_come_at_once():
    overrides = [
        "trainer.stepz=1",
        "trainer.lr=-1",
        "modle.name=x",
        "reward.name=no",
        "algorithm.n=zero",
        "trainer.guard.action=x",
        "a",
    ]
    with pytest.raises(RecipeError) as caught:
        recipe.parse(GOOD, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    for key in ("trainer.stepz", "trainer.lr", "modle", "reward.name", "algorithm.n", "trainer.guard.action", "a:"):
        assert any(line.startswith(key) for line in lines), key


@pytest.mark.parametrize(("overrides", "starts"), [
    (["algorithm.positve=1", "algorithm.step=0.9"], ["algorithm.positve: unknown key", "algorithm: SRPOSettings"]),
    (["model.name=flux", "trainer.stepz=4", "trainer.guard.evry=1"],
     ["trainer.stepz: unknown key", "trainer.guard.evry: unknown key", "model.folder: flux needs"]),
    (["model.name=flux", "algorithm.step=0.9"], ["algorithm: SRPOSettings", "model.folder: flux needs"]),
])  # fmt: skip
def test_an_unknown_key_does_not_hide_other_mistakes(overrides, starts):
    with pytest.raises(RecipeError) as caught:
        recipe.parse(GOOD, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(starts)
    assert all(any(line.startswith(start) for line in lines) for start in starts), lines


def test_a_reward_without_gradient_is_for_those_that_need_none():
    for algorithm in ("ddpo", "flow_grpo", "nft", "distar, reward_scale: 0"):
        recipe.parse(GOOD, [f"algorithm={{name: {algorithm}}}", "reward.name=jpeg_size"])
    recipe.parse(GOOD, ["reward={weights: {jpeg_size: 0.1, emoji: 1.0}}"])  # the gradient is that of emoji
    for algorithm in ("distar", "refl", "draft", "sqdf"):
        with pytest.raises(RecipeError, match=f"reward.name: {algorithm} needs the reward's gradient"):
            recipe.parse(GOOD, [f"algorithm={{name: {algorithm}}}", "reward.name=jpeg_size"])


@pytest.mark.parametrize("k", [None, 1.0])
@pytest.mark.parametrize(
    "section",
    [
        {"name": "brightness"},
        {"weights": {"brightness": 0.5}},
        {"weights": {"brightness": -2.0}},
        {"weights": {"brightness": -1.0, "warmth": 0.1}},
        {"name": "brightness", "scale": {"brightness": (5.0, 2.0)}},
    ],
)
def test_an_evaluation_calls_that_the_objective_which_training_lets_rise(section, k):
    """The first reward of an evaluation puts any two pictures in the order of what the loop is handed."""
    relative = None if k is None else RelativeSettings(positive="bright", k=k)
    objective = reward_objective(RewardSettings(**section, relative=relative))
    rewards, optimised = objective.rewards({"held": lambda images, prompts: images.mean((1, 2, 3))}, "held")
    images, prompts = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), ["dog"] * 8
    trained, shown = objective.reward()(images, prompts), rewards[optimised[0]](images, prompts)
    assert torch.equal(trained.argsort(), shown.argsort()) and len(trained.unique()) == 8


def test_a_reward_of_a_sum_that_moves_nothing_is_told(caplog):
    for overrides, told in (
        (["reward={weights: {jpeg_size: 0.1, emoji: 1.0}}"], "jpeg_size gives no gradient, and srpo learns by"),
        (["reward={weights: {warmth: 0.1, emoji: 1.0}}"], ""),
        (["algorithm={name: ddpo}", "reward={weights: {jpeg_size: 0.1, emoji: 1.0}}"], ""),
        (["algorithm={name: distar, head_queries: 16}", "reward={weights: {jpeg_size: 0.1, emoji: 1.0}}"], ""),
    ):
        caplog.clear()
        builder.warn_of_no_gradient(recipe.parse(GOOD, overrides))
        assert told in caplog.text and bool(told) == bool(caplog.text)


def test_two_files_of_one_name_are_not_one_reward(tmp_path):
    """An evaluation would have asked the second alone, and called it the sum."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3))\n")
    weights = json.dumps({f"{tmp_path}/{name}/mine.py:score": 1.0 for name in ("a", "b")})
    with pytest.raises(RecipeError, match=r"reward.weights: mine.py:score is in two folders.*rename"):
        recipe.parse(GOOD, [f"reward={{weights: {weights}}}"])
    recipe.parse(GOOD, [f"reward={{weights: {json.dumps({f'{tmp_path}/a/mine.py:score': 1.0})}}}"])


def test_the_relative_reward_of_a_recipe_is_the_formula(monkeypatch):
    plain = recipe.parse(GOOD, ["algorithm={name: draft}"])
    made = recipe.parse(GOOD, ["algorithm={name: draft}", "reward.relative={positive: 3d, negative: flat, k: 0.5}"])
    assert recipe.fingerprint(made) != recipe.fingerprint(plain) and recipe.parse(recipe.dump(made)) == made
    monkeypatch.setattr(
        "palate.recipe.objective.load_reward", lambda *_: lambda images, prompts: torch.tensor([len(prompts[0]) * 1.0])
    )
    value = recipe.build_reward(made.reward)(torch.zeros(1, 3, 2, 2), ["a dog"])
    assert float(value) == 1.5 * len("3d. a dog") - len("flat. a dog")


def test_a_start_of_the_other_kind_says_which_to_set(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"model.start: no .* in .*emoji-1step.*set model.weights=full"):
        recipe.check_start(recipe.parse(GOOD, ["model.start=emoji-1step"]))
    recipe.check_start(recipe.parse(GOOD, ["model.start=emoji-1step", "model.weights=full"]))
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"model.start: .*set model.weights=lora"):
        recipe.check_start(recipe.parse(GOOD, [f"model.start={tmp_path}", "model.weights=full"]))

    class Misfit:
        weights = property(lambda self: self)

        def load(self, folder, name):
            raise ValueError("another rank")

    monkeypatch.setattr("palate.models.emoji.EmojiModel.load", lambda *_, **__: Misfit())
    with pytest.raises(ValueError, match=r"model.start: another rank"):
        recipe.build_model(recipe.parse(GOOD, ["model.start=x", "model.weights=full"]))


def test_a_start_that_does_not_fit_is_found_before_the_reward_loads(monkeypatch):
    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda settings: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match=r"model.start"):
        recipe.build(recipe.parse(GOOD, ["model.start=emoji-1step"]))


def test_a_file_of_prompts_that_is_missing_is_named_by_its_key(monkeypatch):
    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda settings: pytest.fail("loaded"))
    for key in ("evaluate.file", "prompts.file", "prompts.preview"):
        alone = ["prompts.list=null"] if key == "prompts.file" else []
        with pytest.raises(RecipeError, match=f"^{key}: prompt file 'nope' does not exist"):
            recipe.build(recipe.parse(GOOD, [*alone, f"{key}=nope"]))
    with pytest.raises(RecipeError, match=r"^algorithm.teachers.one.file: prompt file 'nope' does not exist"):
        routes_of({"one": Teacher("x", file="nope")})


def test_overrides_are_yaml_values_and_later_ones_win():
    made = recipe.parse(GOOD,
                        ["trainer.steps=3", "trainer.steps=7", "algorithm.positive=[a, b]", "trainer.guard.every=0",
                               "trainer.lr=1.0e-3", "sample.guidance=2.5"])  # fmt: skip
    assert (made.trainer.steps, made.trainer.lr, made.trainer.guard.every) == (7, 1e-3, 0)
    assert made.algorithm.positive == ("a", "b") and made.sample.guidance == 2.5


@pytest.mark.parametrize("name", sorted(recipe.published()))
def test_published_recipes_are_valid_and_survive_writing(name):
    made = recipe.read(name)
    assert recipe.parse(recipe.dump(made)) == made
    assert made.run.folder == f"runs/{name}"
    assert len(recipe.published()[name]) > 20


def test_the_released_recipe_has_the_released_numbers():
    """specs of the authors' HPSv2.1 script: 19 updates of 32 prompts, AdamW 5e-6, weight decay 1e-4, clip 0.1, ..."""
    made = recipe.read("srpo-emoji-released")
    t, a = made.trainer, made.algorithm
    assert (t.steps, t.batch_size, t.lr, t.weight_decay, t.clip_norm, t.betas) == (
        19,
        32,
        5e-6,
        1e-4,
        0.1,
        (0.9, 0.999),
    )
    assert (a.rollout_steps, a.shift, a.rollout_guidance, a.guidance, a.noise, a.levels) == (
        25,
        3.0,
        1.0,
        3.5,
        "rollout",
        "released",
    )
    assert (a.timestep_length, a.groundtruth_ratio, a.train_timestep, a.vis_sampling_step) == (1000, 0.9, (5, 25), 50)
    assert (a.k_denoise, a.k_inversion, a.hinge) == ((0.1, 0.25), (0.3, 0.01), 0.7)


def test_only_what_decides_the_numbers_decides_the_fingerprint():
    plain = recipe.fingerprint(recipe.parse(GOOD))
    for harmless in ("run.folder=other", "trainer.steps=999", "trainer.preview_every=3", "trainer.checkpoint_every=1"):
        assert recipe.fingerprint(recipe.parse(GOOD, [harmless])) == plain
    for decisive in (
        "trainer.lr=0.5",
        "trainer.seed=1",
        "algorithm.positive=[x]",
        "prompts.list=[b]",
        "trainer.guard.every=3",
    ):
        assert recipe.fingerprint(recipe.parse(GOOD, [decisive])) != plain


def test_the_python_interface_has_the_defaults_of_a_recipe():
    from palate.train.job import check_settings

    assert dataclasses.replace(check_settings(None, {}), guard=TrainerSettings().guard) == TrainerSettings()
    assert callable(palate.train)


def test_an_unknown_recipe_lists_the_near_one():
    with pytest.raises(RecipeError, match=r"did you mean srpo-emoji?"):
        recipe.read("srpo-emojy")
    with pytest.raises(RecipeError, match="published recipes"):
        recipe.read("/no/such/file.yaml")


# ------------------------------------------------------------------------------------------- prompts and images


def test_prompt_files(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("# a comment\n a dog \n\na cat\n", "utf-8")
    assert recipe.read_prompts(str(file)) == ["a dog", "a cat"]
    file.write_text("\n# only\n")
    with pytest.raises(RecipeError, match="holds no prompt"):
        recipe.read_prompts(str(file))
    file.write_bytes(b"caf\xe9")
    with pytest.raises(RecipeError, match=r"not UTF-8 text \(byte 3\); save it as UTF-8"):
        recipe.read_prompts(str(file))
    with pytest.raises(RecipeError, match="does not exist"):
        recipe.read_prompts("../recipe")
    assert recipe.evenly_spaced([str(i) for i in range(10)] * 2, 5) == ["0", "2", "4", "6", "8"]


@pytest.fixture
def images(tmp_path):
    for i, name in enumerate(("b.png", "a.jpg", "c.webp")):
        Image.fromarray(np.full((12, 20, 3), 40 * (i + 1), np.uint8)).save(tmp_path / name)
    return tmp_path


def test_captions_from_each_of_three_places(images):
    expected = [("a.jpg", "one"), ("b.png", "two words"), ("c.webp", "three")]
    for stem, caption in (("a", "one"), ("b", "two\nwords"), ("c", "three")):
        (images / f"{stem}.txt").write_text(caption)
    assert [(p.name, c) for p, c in recipe.captioned_images(images)] == expected
    (images / "captions.txt").write_text("".join(f"{name}\t{caption}\n" for name, caption in expected))
    assert [(p.name, c) for p, c in recipe.captioned_images(images)] == expected
    (images / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": c}) + "\n" for n, c in expected))
    assert [(p.name, c) for p, c in recipe.captioned_images(images)] == expected
    loaded = load_images([p for p, _ in recipe.captioned_images(images)], size=8)
    assert loaded.shape == (3, 3, 8, 8)
    torch.testing.assert_close(loaded.mean((1, 2, 3)) * 255, torch.tensor([80.0, 40.0, 120.0]), atol=2.0, rtol=0)


def test_names_with_accents_are_found_however_they_are_written(images):
    composed, apart = "caf\u00e9.png", "cafe\u0301.png"
    (images / "b.png").rename(images / apart)
    for name in ("a.jpg", "c.webp"):
        (images / name).unlink()
    (images / "captions.txt").write_text(f"{composed}\ta house\n", "utf-8")
    assert recipe.captioned_images(images) == [(images / apart, "a house")]


def test_images_that_cannot_be_used(images):
    with pytest.raises(RecipeError, match=r"3 of 3 images have no caption, a.jpg"):
        recipe.captioned_images(images)
    (images / "captions.txt").write_text("a.jpg one\n")
    with pytest.raises(RecipeError, match=r"line 1.*a tab"):
        recipe.captioned_images(images)
    (images / "metadata.jsonl").write_text('{"file_name": "a.jpg"}\n')
    with pytest.raises(RecipeError, match=r"metadata.jsonl, line 1"):
        recipe.captioned_images(images)
    whole = (images / "b.png").read_bytes()
    for broken in (whole[:40], b"", b"not an image", whole[:20] + b"\xff" * 20 + whole[40:]):
        (images / "b.png").write_bytes(broken)
        with pytest.raises(RecipeError, match=r"cannot read the image .*b.png.*repair or remove"):
            load_images([images / "a.jpg", images / "b.png"], size=8)
    (images / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"holds no .png"):
        recipe.captioned_images(images / "empty")
    with pytest.raises(RecipeError, match="not a folder"):
        recipe.captioned_images(images / "b.png")


FLUX = """
model: {name: flux, folder: black-forest-labs/FLUX.1-dev}
algorithm: {name: draft}
reward: {name: brightness}
prompts: {list: [a cat]}
"""


@pytest.mark.parametrize(
    "changes, said",
    [
        (["reference=start"], "model.reference: start is the base with the LoRA of model.start; name one"),
        (["reference=start", "start=x", "weights=full"], "model.reference: start is the base with the LoRA"),
        (["lora_init=gaussian", "start=x"], "model.lora_init: the LoRA begins as that of model.start; set"),
        (["lora_init=gaussian", "weights=full"], "model.lora_init: model.weights=full has no LoRA; set"),
        (["quantize=nf4", "weights=full"], "model.quantize stores frozen weights; set model.weights=lora"),
        (["offload=true", "compile=true"], "leave model.compile out"),
        (["offload=true", "quantize=int8"], "use model.quantize=fp8"),
        (["offload=true", "gradient_checkpointing=false"], "needs model.gradient_checkpointing=true"),
    ],
)
def test_keys_of_the_model_that_exclude_each_other_are_said_when_the_recipe_is_read(changes, said):
    with pytest.raises(recipe.RecipeError, match=re.escape(said)):
        recipe.parse(FLUX, [f"model.{change}" for change in changes])
    assert recipe.parse(FLUX, ["model.reference=start", "model.start=x"]).model.reference == "start"


@pytest.mark.parametrize("change", ["model.quantize=nf4", "model.quantize=int8", "trainer.optimizer=adamw8bit"])
def test_a_missing_package_is_said_before_anything_is_read(change, monkeypatch):
    monkeypatch.setattr("palate.models.quantised.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{change} needs bitsandbytes: pip install"):
        recipe.check_folder(recipe.parse(FLUX, [change]))  # no folder is there: it is not looked for


@pytest.mark.parametrize("name, compiles", [("flux", True), ("sdxl", True), ("sd3", False), ("pixart", False)])
def test_a_network_that_cannot_be_compiled_is_said_before_anything_is_read(name, compiles):
    said = "no such folder" if compiles else "model.compile: diffusers names no repeated blocks of"
    with pytest.raises(ValueError, match=said):
        recipe.check_folder(recipe.parse(FLUX, ["model.compile=true", f"model.name={name}", "model.folder=none/here"]))


def test_what_an_algorithm_needs_of_rewards_and_pairs_is_said_when_the_recipe_is_read():
    parts = ["reward.name=null", "reward.weights={emoji: 1, brightness: 0.1}"]
    relative = 'reward.relative={positive: "3d", negative: flat}'
    made = recipe.read("grpo-emoji", [*parts, "algorithm.per_reward=true"])
    assert made.algorithm.per_reward
    for changes in (["algorithm.per_reward=true"], [*parts, relative, "algorithm.per_reward=true"]):
        with pytest.raises(RecipeError, match=r"algorithm.per_reward: it compares the parts of reward.weights"):
            recipe.read("grpo-emoji", changes)
    given = ["prompts.file=null", "prompts.pairs=train.json"]
    with pytest.raises(RecipeError, match=r"algorithm.noise: tracked needs the noise of each picture"):
        recipe.read("dpo-emoji-online", [*given, "algorithm.noise=tracked"])
    assert recipe.read("dpo-emoji-online", given).algorithm.noise == "fresh"


def test_a_caption_is_text_and_the_remedy_names_the_file_that_is_read(images):
    for path in images.glob("*.txt"):
        path.unlink()
    names = sorted(path.name for path in images.iterdir())
    rows = [{"file_name": name, "text": "a dog"} for name in names]
    for wrong in (None, 3, ["a dog"]):
        lines = [json.dumps({**rows[0], "text": wrong}), *map(json.dumps, rows[1:])]
        (images / "metadata.jsonl").write_text("\n".join(lines))
        with pytest.raises(recipe.RecipeError, match=r"line 1: expected .* with both as texts"):
            recipe.captioned_images(images)
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    (images / f"{Path(names[0]).stem}.txt").write_text("a cat")
    with pytest.raises(recipe.RecipeError, match=r"add a line for each to metadata.jsonl, which is read in their"):
        recipe.captioned_images(images)
    (images / "metadata.jsonl").rename(images / "captions.txt")
    (images / "captions.txt").write_text("".join(f"{name}\ta dog\n" for name in names[1:]))
    with pytest.raises(recipe.RecipeError, match=r"add a line for each to captions.txt, which is read in their"):
        recipe.captioned_images(images)


def test_what_a_file_manager_leaves_in_a_folder_is_no_picture_and_changes_no_run(images):
    (images / "captions.txt").write_text("".join(f"{path.name}\ta dog\n" for path in images.iterdir()))
    before = recipe.captioned_images(images), reader.content_digest(str(images))
    first = before[0][0][0]
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", f"._{first.name}", f"._{first.stem}.txt"):
        (images / name).write_bytes(b"\0\5\x16\7")
    (images / "folder.png").mkdir()
    assert (recipe.captioned_images(images), reader.content_digest(str(images))) == before
    (images / "more.txt").write_text("a caption")
    assert reader.content_digest(str(images)) != before[1]


def test_an_empty_section_has_its_defaults_inside_another_too():
    made = recipe.parse(GOOD, ["trainer.guard=null"])
    assert made.trainer.guard == recipe.GuardSettings()
    with pytest.raises(RecipeError, match=r"trainer.guard: input should be a mapping of keys, got \[1\]"):
        recipe.parse(GOOD, ["trainer.guard=[1]"])


def test_a_prompt_with_a_next_line_sign_is_kept_as_it_is():
    """U+0085 is what an ellipsis of Windows becomes when it is read as Latin-1; to YAML it is a line end."""
    made = recipe.parse(GOOD, ["prompts={list: ['a dog']}"])
    made = dataclasses.replace(made, prompts=dataclasses.replace(made.prompts, list=["a dog\x85running"]))
    assert recipe.parse(recipe.dump(made), stored=True).prompts.list == ["a dog\x85running"]
