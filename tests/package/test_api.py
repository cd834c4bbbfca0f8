"""The public names, and a run that Python began: everything that a run is good for works on it."""

from __future__ import annotations

import dataclasses
import logging
import pydoc
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.loop import run, srpo
from support.ranks import MAKE

import palate
from palate import api
from palate.evaluate import published_panel, read_samples
from palate.models.emoji import EmojiModel
from palate.recipe import SampleSettings
from palate.runtime.errors import InputError
from palate.testing import PROMPTS, TinyFlow, text_vector
from palate.testing import tiny_reward as reward


def test_every_public_name_is_there_and_listed():
    for name in palate.__all__:
        assert getattr(palate, name) is not None
    assert set(dir(palate)) == set(palate.__all__)
    assert {"SRPO", "SQDF", "Distar", "Flux", "load", "evaluate", "report", "train", "load_reward"} <= set(dir(palate))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        palate.nothing  # noqa: B018


def test_what_type_checkers_see_is_what_is_there():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(palate.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname or alias.name for node in block.body for alias in node.names}
    assert seen == set(palate.__all__) - {"__version__"}


def test_every_family_and_algorithm_is_exported():
    from palate.algorithms import table
    from palate.models import families

    classes = {places.find(name).load_class() for places in (families, table) for name in places.names()}
    assert {found.__name__ for found in classes} <= set(palate.__all__)


def test_help_on_train_shows_how_it_is_called():
    shown = pydoc.render_doc(palate.train, renderer=pydoc.plaintext)
    assert "palate.train(model: " in shown[:800] and "trainer: the settings of the loop" in shown


@pytest.mark.slow
def test_looking_at_the_names_does_not_import_torch():
    code = "import sys, palate; dir(palate); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python") / "run"
    model, _ = run(folder, steps=3, preview_every=3, preview_prompts=2, sample=SampleSettings(steps=3))
    return folder, model


def test_a_run_from_python_can_be_loaded_drawn_and_reported(begun):
    folder, trained = begun
    loaded = palate.load(folder, model=TinyFlow())
    assert loaded.step == 3
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), trained.parameters(), strict=True))
    images = loaded.sample(PROMPTS[:2], seeds=(0, 1))
    assert len(images) == 4 and images._repr_png_().startswith(b"\x89PNG")
    base = loaded.sample(PROMPTS[:2], seeds=(0, 1), weights="reference")
    assert not torch.equal(images.tensor, base.tensor)
    assert loaded.how.steps == 3 and torch.equal(loaded.sample(["a"], steps=3).tensor, loaded.sample(["a"]).tensor)
    page = palate.report(folder)
    text = page.read_text("utf-8")
    assert page.name == "report.html" and "python:palate.algorithms.srpo.SRPO" in text and PROMPTS[0] in text


def test_what_cannot_be_rebuilt_is_named_with_the_way_that_works(begun):
    from palate import recipe

    folder, _ = begun
    with pytest.raises(ValueError, match=r"model, algorithm, reward cannot be rebuilt.*resume=True.*palate.load"):
        recipe.read(str(folder / "recipe.yaml"))
    with pytest.raises(ValueError, match=r"pass the model: palate.load"):
        palate.load(folder)
    with pytest.raises(ValueError, match=r"continue it with train\(..., resume=True\)"):
        run(folder, steps=3)
    with pytest.raises(ValueError, match="is not a run"):
        palate.load(folder / "nowhere")


def test_a_run_from_python_goes_on_and_can_be_steered(begun, tmp_path):
    folder = shutil.copytree(begun[0], tmp_path / "run")
    palate.steer(folder, ["icy"])
    _, outcome = run(folder, steps=4, resume=True)
    assert outcome.step == 4


class Towers:
    """A held-out reward with an image tower: minus what the run optimises."""

    def __call__(self, images, prompts):
        return self.score(self.image_features(images), prompts)

    @staticmethod
    def image_features(images):
        return images.mean((2, 3)) + 0.1

    @staticmethod
    def score(features, prompts):
        return -(features * torch.stack([text_vector(p, 3) for p in prompts])).sum(1)


def judged(run, **options):
    panel = published_panel("towers", Towers())
    return palate.evaluate(run, panel=panel, seeds=[0, 1], **options)


def test_a_run_from_python_is_measured_with_the_objects_that_are_passed(begun, tmp_path):
    folder = shutil.copytree(begun[0], tmp_path / "run")
    palate.steer(folder, ["icy"])
    run(folder, steps=4, resume=True)
    found = judged(folder, model=TinyFlow(), reward=reward)
    name = "tiny_reward-relative"
    assert found["optimised"] == [name, "tiny_reward"] and found["heldout"] == "towers"
    assert found["words"] == {"positive": ["icy"], "negative": ["cold", "dull"]} and found["prompts"] == len(PROMPTS)
    assert found["checkpoint"].endswith("step-000004")
    loaded = palate.load(folder, model=TinyFlow())
    drawn, base = (loaded.sample(PROMPTS, seeds=(0, 1), weights=w).tensor for w in ("policy", "reference"))
    prompts = [p for p in PROMPTS for _ in range(2)]
    for images, side in ((drawn, "value"), (base, "base")):
        wanted, cold, dull = (reward(images, [f"{word}. {p}" for p in prompts]) for word in ("icy", "cold", "dull"))
        expected = float((wanted - (cold + dull) / 2).mean())
        assert found["metrics"][f"reward/{name}"][side] == pytest.approx(expected, abs=1e-5)
    text = palate.report(folder).read_text("utf-8")
    assert "tiny_reward" in text and "not judged" not in text
    alone = judged(folder, model=TinyFlow())
    assert alone["optimised"] == [] and alone["metrics"]["reward/towers"] == found["metrics"]["reward/towers"]


def test_a_generator_from_python_is_measured_as_it_draws(tmp_path):
    algorithm = MAKE["direct"]()
    palate.train(TinyFlow(), algorithm, reward, PROMPTS, folder=tmp_path, steps=2, batch_size=2, lr=0.1, progress=False)
    found = [
        judged(tmp_path, model=TinyFlow(), reward=reward, **more)["rows"] for more in ({"algorithm": algorithm}, {})
    ]
    assert found[0] != found[1]
    drawn = palate.load(tmp_path, model=TinyFlow(), algorithm=algorithm).sample(PROMPTS[:1], seeds=[0]).tensor
    kept = read_samples(tmp_path / "evaluation" / "result")[0][:1]
    assert not torch.equal(drawn, kept)
    judged(tmp_path, model=TinyFlow(), algorithm=algorithm)
    assert torch.equal(drawn, read_samples(tmp_path / "evaluation" / "result")[0][:1])


def test_what_an_evaluation_from_python_lacks_is_named(begun):
    with pytest.raises(InputError, match=r"pass the model: palate.evaluate\('.*', model=...\)"):
        palate.evaluate(begun[0])
    with pytest.raises(InputError, match=r"has no judges of its own.*published_panel"):
        palate.evaluate(begun[0], model=TinyFlow())


def test_training_an_object_twice_is_told_unless_it_was_reset(tmp_path, caplog):
    def told(folder, model, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "palate"):
            palate.train(model, srpo(), reward, PROMPTS, folder=tmp_path / folder, steps=1, batch_size=1, lr=0.1,
                         progress=False, **options)  # fmt: skip
        return {record.getMessage() for record in caplog.records if "trained before" in record.getMessage()}

    logging.getLogger("palate").propagate = True
    model = TinyFlow()
    start = [p.detach().clone() for p in model.parameters()]
    assert not told("a", model) and len(told("b", model)) == 1
    assert not told("b", model, resume=True)
    with torch.no_grad():
        for p, value in zip(model.parameters(), start, strict=True):
            p.copy_(value)
    assert not told("c", model)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_reset_model_is_as_it_was_loaded(training):
    torch.manual_seed(0)
    model = EmojiModel.load(training=training, lora_rank=2)
    model.reset(7)
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model.reset(8)
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True)) == (training == "full")
    model.reset(7)
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    x, t = torch.zeros(1, *model.latent_shape), torch.full((1,), 0.5)
    cond = model.encode_prompts(["a dog"])
    with torch.no_grad():
        assert torch.equal(model.predict(x, t, cond).x0, model.predict(x, t, cond, weights="reference").x0)


def test_a_loaded_run_draws_as_its_recipe_says(monkeypatch):
    """As `palate sample` and `palate evaluate` draw it; what a generator cannot follow is not ignored."""
    drawn = []

    def generate(model, prompts, seeds, **how):
        drawn.append((how["steps"], how["guidance"]))
        return torch.zeros(len(prompts) * len(seeds), 3, 4, 4)

    monkeypatch.setattr(api, "generate", generate)
    loaded = api.LoadedRun(Path("runs/x"), TinyFlow(), 3, None, SampleSettings(steps=7, guidance=1.5))
    loaded.sample("a dog")
    loaded.sample(["a dog"], steps=2, guidance=1.0)
    assert drawn == [(7, 1.5), (2, 1.0)]
    with pytest.raises(InputError, match="leave them out"):
        dataclasses.replace(loaded, sampler=object()).sample(["a dog"], steps=2)


def test_a_generators_run_is_drawn_in_its_one_step_whoever_loads_the_model(tmp_path, request):
    """A model that is given must not be drawn in many guided steps: the evaluation would be of other pictures."""
    command = request.getfixturevalue("palate")
    command("train", "direct-emoji", f"run.folder={tmp_path / 'run'}", "trainer.steps=1",
            "trainer.batch_size=2", "trainer.preview_every=0", "trainer.guard.every=0")  # fmt: skip
    alone = palate.load(tmp_path / "run")
    given = palate.load(tmp_path / "run", model=alone.model)
    assert alone.sampler is not None and given.sampler == alone.sampler
    drawn = [each.sample(["a dog"], seeds=[0]).tensor for each in (alone, given)]
    assert torch.equal(*drawn)
    found = [palate.evaluate(tmp_path / "run", prompts=["a dog"], seeds=[0], **more)["metrics"]["reward/emoji"]["value"]
             for more in ({}, {"model": alone.model})]  # fmt: skip
    assert found[0] == found[1]
