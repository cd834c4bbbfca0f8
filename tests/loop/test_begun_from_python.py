"""What `palate.train` says of arguments that cannot work, and of a run that is gone on with from other ones."""

import logging
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.loop import Quadratic, reward, rows, run, srpo
from torch import nn

import palate
from palate.core import Loss
from palate.recipe import GuardSettings
from palate.runs import read_recipe
from palate.testing import PROMPTS, TinyFlow, tiny_reward


def other_reward(images, prompts):
    return -reward(images, prompts)


class Other(Quadratic):
    """Another class."""


class Begun(Quadratic):
    """An algorithm with settings of its own."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings


def test_a_run_goes_on_with_what_it_was_begun_with_alone(tmp_path):
    given = {"algorithm": Quadratic(), "latents": torch.zeros(5, 3, 4, 4), "steps": 1}
    run(tmp_path, **given)
    for changes, said in {
        "prompts.digest": {"prompts": PROMPTS[::-1]},
        "prompts.latents": {"latents": torch.ones(5, 3, 4, 4)},
        "prompts.sizes": {"sizes": [8]},
    }.items():
        with pytest.raises(ValueError, match=rf"was begun with another {changes} \(then .*, now "):
            run(tmp_path, **given | {"steps": 2} | said, resume=True)
    with pytest.raises(ValueError, match=r"another prompts.latents \(then .*, now None\)"):
        run(tmp_path, algorithm=Quadratic(), steps=2, resume=True)
    assert run(tmp_path, **given | {"steps": 2}, resume=True)[1].step == 2


def test_objects_of_another_name_are_told(tmp_path, caplog):
    run(tmp_path, algorithm=Quadratic(), steps=1)
    with caplog.at_level(logging.WARNING, "palate"):
        run(tmp_path, algorithm=Quadratic(), steps=2, resume=True)
        assert not caplog.text
        run(tmp_path, algorithm=Other(), steps=3, resume=True)
        assert re.search(
            r"begun with another algorithm\.name \(then support.loop.Quadratic, now .*Other\)", caplog.text
        )
        run(tmp_path, algorithm=Other(), reward=other_reward, steps=4, resume=True)
        assert re.search(r"begun with another reward\.name \(then .*\.tiny_reward, now .*other_reward\)", caplog.text)


def test_a_run_goes_on_with_its_settings_and_words(tmp_path):
    run(tmp_path, steps=1)
    for changed in ({"positive": ["icy"]}, {"n": 2}, {"window": (0.1, 0.9)}):
        (key,) = changed
        with pytest.raises(ValueError, match=rf"another algorithm.{key} .*palate.steer"):
            run(tmp_path, algorithm=srpo(**changed), steps=2, resume=True)
    assert run(tmp_path, steps=2, resume=True)[1].step == 2


def test_what_an_earlier_version_did_not_write_down_is_not_compared(tmp_path):
    """It listed every prompt and had no digests; a function in the settings stood there by its place in memory."""
    run(tmp_path, algorithm=Begun(palate.SRPOSettings(positive=["warm"], negative=["cold"])), steps=1)
    text = (tmp_path / "recipe.yaml").read_text()
    tree = yaml.safe_load(text)
    tree["prompts"] = {"list": PROMPTS}
    del tree["algorithm"]["hinge"]
    tree["algorithm"]["template"] = "<function f at 0x7f>"
    tree["algorithm"]["gone"] = 1
    tree["reward"]["name"] = "python:__main__." + tree["reward"]["name"].rpartition(".")[2]
    (tmp_path / "recipe.yaml").write_text(text.split("\n")[0] + "\n" + yaml.safe_dump(tree))
    again = Begun(palate.SRPOSettings(positive=["warm"], negative=["cold"], hinge=1.0))
    with pytest.raises(ValueError, match=r"another prompts\.digest"):
        run(tmp_path, algorithm=again, prompts=PROMPTS[:3], steps=2, resume=True)
    assert run(tmp_path, algorithm=again, steps=2, resume=True)[1].step == 2


def test_more_prompts_than_a_page_holds(tmp_path):
    prompts = [f"a red fox with a number that is {i:05d} and many more words behind it" for i in range(6000)]
    assert run(tmp_path, prompts=prompts, steps=1)[1].reason == "finished"
    written = read_recipe(tmp_path)["prompts"]
    assert written["count"] == 6000 and written["list"] == prompts[: len(written["list"])] and written["list"]
    assert run(tmp_path, prompts=prompts, steps=2, resume=True)[1].step == 2
    palate.report(tmp_path)
    with pytest.raises(ValueError, match=r"another prompts\.digest"):
        run(tmp_path, prompts=[*prompts[:-1], "an old tree"], steps=3, resume=True)


def test_a_check_that_nothing_calls_or_reads(tmp_path):
    with pytest.raises(ValueError, match="the guard is off"):
        run(tmp_path, check=lambda *_: {"concept": 1.0}, steps=1)
    for given, said in {
        "accuracy": (lambda *_: {"accuracy": 1.0}, r"\(accuracy\) has no limit; name it as one of heldout, concept"),
        "empty": (lambda *_: {}, r"\(nothing\) has no limit"),
        "number": (lambda *_: 1.0, "check returned float; expected named numbers"),
    }.values():
        with pytest.raises(ValueError, match=said):
            run(tmp_path, check=given, guard=GuardSettings(every=1, prompts=4), steps=1)
    guard = GuardSettings(every=1, prompts=4, best="accuracy")
    assert run(tmp_path, check=lambda *_: {"accuracy": 1.0}, guard=guard, steps=1)[1].reason == "finished"


class Steps(Quadratic):
    """Yields what it is given."""

    def __init__(self, *losses, state=None):
        super().__init__()
        self.losses, self.state = losses, state or {}

    def step(self, model, reward, batch, rng):
        for value, name in self.losses:
            yield Loss(sum((p**2).sum() for p in model.parameters()) * value, {}, name)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_algorithms_that_cannot_train(tmp_path):
    for i, (algorithm, said) in enumerate(
        (
            (Steps(), r"Steps.step yielded no loss in any step"),
            (Steps((1.0, "polcy")), r"a loss updates 'polcy'; the algorithm's `trains` has policy"),
            (Steps((1.0, "policy"), state={"a": {1: 2}}), r"Steps.state_dict: .*keys of a saved state must be strings"),
            (Steps((1.0, "policy"), state={"a": {1, 2}}), r"Steps.state_dict: .*set is not JSON serializable"),
        )
    ):
        with pytest.raises(ValueError, match=said):
            run(tmp_path / str(i), algorithm=algorithm, steps=2, checkpoint_every=0)


def test_an_algorithm_that_collects_first(tmp_path):
    class Late(Quadratic):
        def step(self, model, reward, batch, rng):
            if rng.step > 1:
                yield from super().step(model, reward, batch, rng)

    assert run(tmp_path, algorithm=Late(), steps=2)[1].reason == "finished"


class Decodes(TinyFlow):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def decode(self, latents):
        return self.change(super().decode(latents))


def test_models_whose_pictures_are_none(tmp_path, caplog):
    for change, said in (
        (lambda x: x[:, :1], "torch.float32 \\(2, 1, 8, 8\\)"),
        (lambda x: (x * 255).byte(), "torch.uint8 .*"),
    ):
        with pytest.raises(ValueError, match=rf"model.decode returned .*{said}; expected floating-point images"):
            run(tmp_path, model=Decodes(change), algorithm=Quadratic(), steps=1)
    with caplog.at_level(logging.WARNING, "palate"):
        run(tmp_path / "a", algorithm=Quadratic(), steps=1)
        assert not caplog.text
        run(tmp_path / "b", model=Decodes(lambda x: x * 4 - 2), algorithm=Quadratic(), steps=1)
    assert "model.decode returned values from -1." in caplog.text


def test_latents_that_are_not_the_models(tmp_path):
    for shape in ((5, 4, 4, 4), (5, 3, 4), (5, 3, 3, 4, 4), (5, 2, 2, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"expected \(images, 3, height, width\)"):
            run(tmp_path, algorithm=Quadratic(), latents=torch.zeros(shape), steps=1)
    run(tmp_path, algorithm=Quadratic(), latents=torch.zeros(5, 2, 3, 4, 4), steps=1)


def test_prompts_in_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"palate\.data\.read_prompts reads words\.txt"):
        run(tmp_path, prompts=Path("words.txt"), steps=1)


def test_ranks_that_do_not_know_each_other(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(ValueError, match=r"one of several ranks.*process_group"):
        run(tmp_path, steps=1)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "1")
    assert run(tmp_path, steps=1)[1].reason == "finished"


class Judge(nn.Module):
    """A reward with dropout, whose weights would learn."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop, self.seen = nn.Linear(3, 1), nn.Dropout(0.5), []
        self.layer.bias.requires_grad_(False)
        self.drop.eval()

    def forward(self, images, prompts):
        self.seen.append((self.training, self.layer.weight.requires_grad))
        return self.drop(self.layer(images.mean((2, 3))))[:, 0]


def test_a_reward_that_is_a_module_judges_and_is_given_back_as_it_was(tmp_path):
    judge = Judge()
    run(tmp_path, reward=judge, algorithm=srpo(preference="absolute"), steps=1)
    assert judge.seen and set(judge.seen) == {(False, False)} and judge.layer.weight.grad is None
    assert judge.training and not judge.drop.training
    assert judge.layer.weight.requires_grad and not judge.layer.bias.requires_grad


def test_the_tests_reward_is_read(tmp_path):
    run(tmp_path, reward=tiny_reward, steps=1)
    assert [row["event"] for row in rows(tmp_path)] == ["step"]
