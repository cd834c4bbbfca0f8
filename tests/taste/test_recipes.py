"""A taste in a recipe: read, built, mixed, guarded; what is missing is said before weights load."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from palate import fit_taste, recipe
from palate.algorithms.srpo import SRPO, SRPOSettings
from palate.cli import app
from palate.cli.requirements import files_required
from palate.data import RecipeError
from palate.models.vocabulary import vocabulary
from palate.recipe import GuardSettings
from palate.recipe.objective import check_taste
from palate.runtime.errors import InputError
from palate.train import broken_limits

PICTURES = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.3
PICTURES = PICTURES + torch.rand(24, 3, 1, 1, generator=torch.Generator().manual_seed(1)) * 0.7
PROMPT = vocabulary().concepts[0]


def taste_of(measure, seed):
    rng, values = np.random.default_rng(seed), measure(PICTURES)
    votes = []
    for _ in range(24):
        i, j = (int(k) for k in rng.choice(24, 2, replace=False))
        choice = "left" if values[i] > values[j] else "right"
        votes.append({"prompt": PROMPT, "left": PICTURES[i], "right": PICTURES[j], "choice": choice})
    return fit_taste(votes, blocks=["colour"])


@pytest.fixture(scope="module")
def tastes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tastes")
    taste_of(lambda x: x[:, 0].mean((1, 2)), 0).save(folder / "red")
    taste_of(lambda x: -x[:, 0].mean((1, 2)), 1).save(folder / "green")
    return folder


def reward_of(*overrides):
    read = recipe.read("taste-emoji", overrides)
    return recipe.build_reward(read.reward)(PICTURES, [PROMPT] * 24)


def test_settings_reach_the_reward(tastes):
    source = f"reward.source.taste={tastes / 'red'}"
    plain = reward_of(source, "reward.taste.absolute=0")
    emoji = recipe.load_reward("emoji")(PICTURES, [PROMPT] * 24)
    assert torch.allclose(reward_of(source) - plain, 8 * emoji, atol=1e-4)
    assert torch.allclose(reward_of(source, "reward.taste=null") - plain, 4 * emoji, atol=1e-4)
    assert torch.allclose(reward_of(source, "reward.taste.absolute=1.5") - plain, 1.5 * emoji, atol=1e-4)
    assert (reward_of(source, "reward.taste.absolute=0", "reward.taste.confidence=1") < plain).all()
    red = PICTURES[:, 0].mean((1, 2))
    assert float(np.corrcoef(plain.detach(), red)[0, 1]) > 0.8


def test_tastes_add_up_by_their_weights(tastes):
    both = f"{tastes / 'red'}:0.75, {tastes / 'green'}:0.25"
    mixed = reward_of(f"reward.source.taste={both}", "reward.taste.absolute=0")
    red = reward_of(f"reward.source.taste={tastes / 'red'}", "reward.taste.absolute=0")
    assert float(np.corrcoef(mixed.detach(), red.detach())[0, 1]) > 0.8
    opposed = reward_of(
        f"reward.source.taste={tastes / 'red'}:0.25, {tastes / 'green'}:0.75", "reward.taste.absolute=0"
    )
    assert float(np.corrcoef(opposed.detach(), red.detach())[0, 1]) < 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["reward.source={}"], "reward.source.taste: name the folder"),
        (["reward.name=emoji", "reward.source={}", "reward.taste={absolute: 1}"], "reward.taste"),
        (["reward.taste.confidence=-1"], "reward.taste.confidence"),
        (["reward.taste.lambda=4"], "unknown key"),
    ],
)
def test_mistakes_are_told_before_anything_loads(overrides, said):
    with pytest.raises(RecipeError, match=said):
        recipe.read("taste-emoji", overrides)


@pytest.fixture(scope="module")
def coin(tmp_path_factory):
    """The folder of a taste of choices at random."""
    rng = np.random.default_rng(2)
    votes = []
    for _ in range(24):
        i, j = (int(k) for k in rng.choice(24, 2, replace=False))
        choice = str(rng.choice(["left", "right"]))
        votes.append({"prompt": PROMPT, "left": PICTURES[i], "right": PICTURES[j], "choice": choice})
    return fit_taste(votes, blocks=["colour"]).save(tmp_path_factory.mktemp("coin") / "coin")


def test_what_a_taste_stands_on_is_asked_before_anything_loads(tastes, tmp_path):
    """The embedded reward knows no photographs; and the reward that a taste stands on is no held-out judge."""
    of = lambda name, folder: recipe.read(name, [f"reward.source.taste={folder}"])  # noqa: E731
    with pytest.raises(InputError, match=r"knows no other pictures: palate taste fit VOTES --features clip-score"):
        check_taste(of("taste-sdxl", tastes / "red").reward, "sdxl")
    check_taste(of("taste-emoji", tastes / "red").reward, "emoji")
    found = {need.what: need for need in files_required(of("taste-sdxl", tmp_path / "none"), None)}
    assert found["reward taste"].state == "bad" and "holds no taste" in found["reward taste"].text


def test_a_taste_that_is_not_learnt_is_not_trained_towards_unless_the_recipe_says_so(coin, tastes, monkeypatch):
    """Before anything large loads; a sum with such a part is refused as well. An evaluation may still read it."""
    built = []
    monkeypatch.setattr("palate.recipe.builder.build_model", lambda recipe, **options: built.append(recipe) or 1 / 0)
    for source in (f"{coin}", f"{tastes / 'red'}:0.7, {coin}:0.3"):
        given = f"reward.source.taste={source}"
        with pytest.raises(InputError, match=r"no taste is learnt yet.*Choose 20 more.*reward\.taste\.allow_unlearnt"):
            recipe.build(recipe.read("taste-emoji", [given]))
        assert not built
        with pytest.raises(ZeroDivisionError):
            recipe.build(recipe.read("taste-emoji", [given, "reward.taste.allow_unlearnt=true"]))
        assert recipe.build_reward(recipe.read("taste-emoji", [given]).reward)(PICTURES[:1], [PROMPT]).isfinite()
        built.clear()
    with pytest.raises(ZeroDivisionError):
        recipe.build(recipe.read("taste-emoji", [f"reward.source.taste={tastes / 'red'}"]))
    weighed = ["reward.name=null", "reward.weights={taste: 1.0, emoji: 1.0}", f"reward.source.taste={coin}"]
    with pytest.raises(InputError, match="no taste is learnt yet"):
        recipe.build(recipe.read("taste-emoji", weighed))


def test_the_command_line_says_that_a_taste_is_not_learnt_and_what_to_do(coin, tastes):
    said = {name: CliRunner().invoke(app, ["taste", "show", str(folder)]).output
            for name, folder in (("coin", coin), ("red", tastes / "red"))}  # fmt: skip
    assert "no taste is learnt yet" in said["coin"] and "Choose 20 more pictures" in said["coin"]
    assert "not learnt" not in said["red"] and "no taste" not in said["red"]


def test_the_command_line_says_a_taste_in_words(tastes, coin, tmp_path):
    """Pictures on red against plain grey ones: the red word is what a taste for red prefers."""
    colour = next(iter(vocabulary().colours))
    shades = [(128, 128, 128)] * 4 + [(250, 90, 90)] * 4
    lines = []
    for k, shade in enumerate(shades):
        Image.new("RGB", (64, 64), shade).save(tmp_path / f"{k}.png")
        prompt = PROMPT if k < 4 else f"{PROMPT} on a {colour} background"
        lines.append(json.dumps({"file": f"{k}.png", "prompt": prompt, "seed": k}))
    (tmp_path / "index.jsonl").write_text("\n".join(lines) + "\n")
    ask = ["taste", "words", str(tastes / "red"), str(tmp_path), "--prompt", f"a {PROMPT}"]
    said = CliRunner().invoke(app, ask).output
    assert f"{colour} (background): +" in said and said.rstrip().endswith(f"a {PROMPT} on a {colour} background")
    assert f"palate train taste-emoji-words reward.source.taste={tastes / 'red'} 'algorithm.context=[{colour}]'" in said
    said = CliRunner().invoke(app, ["taste", "words", str(tastes / "green"), str(tmp_path)]).output
    assert said.startswith(f"no word is worth 0.5 standard deviations; the best is {colour} with -")
    said = CliRunner().invoke(app, ["taste", "words", str(coin), str(tmp_path)]).output
    assert said.startswith("The words are a guess, because this taste is not learnt yet")


def test_a_guard_that_waits_for_words_asks_for_them(tastes):
    """Else the reward would be followed unwatched for as long."""
    given = [f"reward.source.taste={tastes / 'red'}"]
    with pytest.raises(InputError, match=r"algorithm\.context: name what the 60 updates .* train taste-emoji"):
        recipe.build(recipe.read("taste-emoji-words", given))
    assert recipe.build(recipe.read("taste-emoji-words", [*given, "algorithm.context=[red]"])).algorithm


def test_every_recipe_for_rounds_is_guarded_against_the_model_that_they_began_with():
    for name in recipe.published():
        if name.startswith(("taste-", "direct-")):
            guard = recipe.read(name).trainer.guard
            assert guard.every and guard.base == "reference", name


@pytest.mark.parametrize("source", ["nowhere", "nowhere:x", "a:1, b:2"])
def test_a_taste_that_is_not_there_is_named(source):
    read = recipe.read("taste-emoji", [f"reward.source.taste={source}"])
    with pytest.raises(ValueError, match="taste"):
        recipe.build_reward(read.reward)


def test_the_guard_watches_named_backgrounds_where_it_is_told_to():
    base, now = {"background": 1.0, "concept": 0.9}, {"background": 0.9, "concept": 0.9}
    assert not broken_limits(now, base, GuardSettings())
    assert "background fell from 1 to 0.9" in broken_limits(now, base, GuardSettings(background_drop=0.05))[0]


def test_an_absolute_preference_needs_no_words():
    algorithm = SRPO(SRPOSettings(preference="absolute", positive=(), negative=()))
    assert algorithm.control_texts("a cat") == {"positive": ["a cat"], "negative": ["a cat"]}
    again = SRPO(SRPOSettings())
    again.load_state_dict(algorithm.state_dict())
    assert again.words(0) == ("", "")
    with pytest.raises(ValueError, match="control words"):
        SRPOSettings(positive=())


def test_an_evaluation_of_direct_compares_the_generator_with_itself(tmp_path, monkeypatch):
    """Not with the many-step model, which is what other generators are judged beside."""
    from palate.runs import evaluation
    from palate.runs.folder import RunFolder

    for name, expected in (("direct-emoji", [True, True]), ("distar-emoji-quick", [False, True])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe.dump(recipe.read(name)))
        drawn = []

        def generate_parts(model, prompts, seeds, how, drawn=drawn):
            drawn.append((how.weights, how.sampler is not None))
            return [torch.zeros(len(prompts) * len(seeds), 3, 8, 8)]

        monkeypatch.setattr(evaluation, "generate_parts", generate_parts)
        monkeypatch.setattr(evaluation, "evaluate_samples", lambda *a, **k: {"metrics": {}, "failed": [], "prompts": 1})
        monkeypatch.setattr(evaluation, "verdict", lambda *a, **k: {"warnings": []})
        model = recipe.build_model(recipe.read("direct-emoji"))
        sampler = recipe.sampler_of(recipe.build_algorithm(recipe.read(name)))
        evaluation.evaluate_run(RunFolder(folder), prompts=["a dog"], seeds=[0], model=model, sampler=sampler)
        assert [with_sampler for _, with_sampler in drawn] == expected and drawn[0][0] == "reference"
