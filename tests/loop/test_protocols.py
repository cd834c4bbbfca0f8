"""What the loop asks of other people's objects is what palate.core documents, and a missing member is named at once."""

from __future__ import annotations

import pytest
import torch
from support.loop import run
from torch import nn

import palate
from palate.core import Sampleable
from palate.models.gaussian import GaussianModel
from palate.recipe import GuardSettings
from palate.testing import PROMPTS, TinyFlow
from palate.testing import tiny_reward as reward
from palate.train.checks import ALGORITHM_MEMBERS, MODEL_MEMBERS, SAMPLEABLE_MEMBERS
from palate.train.job import check_settings


class Mine:
    """Exactly the documented members of Model and Sampleable; everything else would be an AttributeError."""

    def __init__(self):
        inner = TinyFlow()
        for name in (*MODEL_MEMBERS, *SAMPLEABLE_MEMBERS):
            setattr(self, name, getattr(inner, name))


class MyLoss:
    """Exactly the documented members of Algorithm."""

    trains = ("policy",)

    def step(self, model, reward, batch, rng):
        noise = rng.normal("x", model.latent_shape)
        x0 = model.predict(noise, torch.full((len(noise),), 0.5), batch.cond).x0
        yield palate.Loss(-reward(model.decode(x0), batch.prompts).mean(), {}, "policy")


def test_the_listed_members_are_those_of_the_protocols():
    members = {name for name in dir(Sampleable) if not name.startswith("_")}
    assert members == {*MODEL_MEMBERS, *SAMPLEABLE_MEMBERS}
    assert {name for name in dir(palate.Algorithm) if not name.startswith("_")} == set(ALGORITHM_MEMBERS)


def test_a_class_with_exactly_the_documented_members_trains_with_previews_and_guard(tmp_path):
    seen = []
    _, outcome = run(
        tmp_path, model=Mine(), algorithm=MyLoss(), steps=2, preview_every=1, preview_prompts=2,
        guard=GuardSettings(every=1, prompts=4),
        check=lambda model, prompts, ids: seen.append(len(prompts)) or {"heldout": 1.0},
    )  # fmt: skip
    assert outcome.reason == "finished" and seen == [4, 4, 4]
    assert len(list((tmp_path / "samples").glob("step-*/0001.png"))) == 3


def test_the_gaussian_model_can_be_previewed(tmp_path):
    model = GaussianModel(torch.zeros(3, 4, 4), 0.5)
    assert isinstance(model, Sampleable)
    _, outcome = run(tmp_path, model=model, algorithm=MyLoss(), steps=1, preview_every=1, preview_prompts=2)
    assert outcome.step == 1


@pytest.mark.parametrize("missing", [*MODEL_MEMBERS, *SAMPLEABLE_MEMBERS])
def test_each_member_that_is_missing_is_named_before_anything_is_written(tmp_path, missing):
    model = Mine()
    delattr(model, missing)
    with pytest.raises(ValueError, match=f"the model .Mine. lacks {missing};"):
        run(tmp_path / "run", model=model, algorithm=MyLoss(), preview_every=1)
    assert not (tmp_path / "run").exists()


def test_a_network_or_a_number_is_told_all_that_it_lacks(tmp_path):
    told = (
        r"(?s)the model .Linear. lacks schedule, latent_shape.*the algorithm .int. lacks trains, step.*"
        r"the reward .str. cannot be called"
    )
    with pytest.raises(ValueError, match=told):
        palate.train(nn.Linear(2, 2), 3, "reward", PROMPTS, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="expected a list of prompts, got the text 'a cat'"):
        palate.train(Mine(), MyLoss(), reward, "a cat", folder=tmp_path / "run")


def test_options_are_checked_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown option 'step'; did you mean steps"):
        check_settings(None, {"step": 3})
    with pytest.raises(ValueError, match="unknown option 'zzz'; expected one of steps, "):
        check_settings(None, {"zzz": 3})
    with pytest.raises(ValueError, match=r"steps"):
        check_settings(None, {"steps": 0})
    settings = check_settings(check_settings(None, {"steps": 7, "lr": 1e-3}), {"lr": 1e-4})
    assert (settings.steps, settings.lr, settings.guard.every) == (7, 1e-4, 0)
