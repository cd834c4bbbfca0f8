"""A step that is not finite leaves a bundle from which it fails again, in the same place; six places are poisoned."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from support.commands import short
from support.loop import Quadratic, rows, run, srpo, tensors
from support.ranks import MAKE, TEACHERS, Networks

from palate import train as failure
from palate.algorithms.distar import Distar, DistarSettings, Generator
from palate.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from palate.cli import doctor
from palate.core import Loss
from palate.path import Prediction
from palate.rewards.combine import weighted
from palate.rewards.learned import BlackBox
from palate.runtime import checkpoint, distributed
from palate.runtime.errors import InputError, RankLostError
from palate.testing import PROMPTS, TinyFlow
from palate.testing import tiny_reward as reward

BAD = 3  # the step that is poisoned


class Inner:
    """Counts the algorithm's steps, so that a part can be poisoned in one of them."""

    def __init__(self):
        self.inner, self.step_number = srpo(), 0
        self.trains = ("policy",)

    def state_dict(self):
        return {"words": self.inner.state_dict()}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["words"])

    def step(self, model, reward, batch, rng):
        self.step_number = rng.step
        yield from self.inner.step(model, reward, batch, rng)
        self.step_number = 0


class PoisonedLoss(Inner):
    def step(self, model, reward, batch, rng):
        for loss in super().step(model, reward, batch, rng):
            yield loss._replace(value=loss.value * (math.inf if rng.step == BAD else 1.0))


class Steep(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def poisoned(place: str):
    """Model, algorithm and reward of which one goes wrong in step BAD."""
    algorithm = PoisonedLoss() if place == "loss" else Inner()

    def ill(value):
        return value * (math.nan if algorithm.step_number == BAD else 1.0)

    class Model(TinyFlow):
        def predict(self, xt, t, cond, **options):
            pred = super().predict(xt, t, ill(cond) if place == "cond" else cond, **options)
            return Prediction(ill(pred.x0), pred.eps) if place == "predict" else pred

        def decode(self, latents):
            return ill(super().decode(latents)) if place == "decode" else super().decode(latents)

    def rate(images, prompts):
        if place == "gradient" and algorithm.step_number == BAD:
            images = Steep.apply(images)
        values = reward(images, prompts)
        return torch.cat([values[:-1], ill(values[-1:])]) if place == "reward" else values

    return Model(), algorithm, rate


@pytest.mark.parametrize(("place", "first"), [
    ("cond", r"model.predict \(policy\) at t = 1.000"),
    ("predict", r"model.predict \(policy\) at t = 1.000"),
    ("decode", r"model.decode, 576 of 576 numbers"),
    ("reward", r"the reward of '.*' is nan"),
    ("loss", r"loss 1 of the step, -?inf"),
    ("gradient", r"the gradient of the reward for the images"),
])  # fmt: skip
def test_the_first_value_that_is_not_finite_is_found_again(tmp_path, place, first):
    model, algorithm, rate = poisoned(place)
    _, outcome = run(tmp_path, model=model, algorithm=algorithm, reward=rate, steps=4)
    assert outcome.reason == "finished"
    (skipped,) = (row for row in rows(tmp_path) if row["event"] == "skip")
    assert skipped["step"] == BAD
    before, after = tensors(tmp_path, BAD - 1), tensors(tmp_path, BAD)
    assert all(torch.equal(before[key], after[key]) for key in before)  # no weight, moment or average moved

    bundle = tmp_path / "failures" / checkpoint.name(BAD)
    assert {part.name for part in bundle.iterdir()} == {"tensors.safetensors", "state.json", "manifest.json"}
    again = failure.replay(bundle, *poisoned(place))
    assert again.reproduced == again.reported == skipped["reason"]
    assert re.match(first, again.trace[0]), again.trace
    assert f"first value that is not finite: {again.trace[0]}" in again.text()


def test_a_bundle_holds_the_given_images_of_its_step(tmp_path):
    class Offline:
        trains = ("policy",)

        def step(self, model, reward, batch, rng):
            value = sum((p**2).sum() for p in model.parameters()) * (math.inf if rng.step == BAD else 1.0)
            yield Loss(value, {"which": batch.latents[:, 0, 0, 0].mean()}, "policy")

    latents = torch.arange(float(len(PROMPTS))).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    run(tmp_path, algorithm=Offline(), latents=latents, steps=BAD)
    bundle = tmp_path / "failures" / checkpoint.name(BAD)
    again = failure.replay(bundle, TinyFlow(), Offline(), reward)
    prompts = checkpoint.load(bundle).state["prompts"]
    assert again.reproduced == again.reported
    assert again.metrics["which"] == pytest.approx(sum(map(PROMPTS.index, prompts)) / len(prompts))


def test_the_gradient_of_a_parameter_is_named(tmp_path):
    """sqrt |p - p0| at p = p0: a finite loss, an infinite gradient, of the first of four tensors only."""

    class Root(Quadratic):
        def step(self, model, reward, batch, rng):
            p = model.parameters()[0]
            value = ((p - p.detach()).abs() + 0.0).sqrt().sum() + sum((q**2).sum() for q in model.parameters())
            yield Loss(value, {}, "policy")

    with pytest.raises(
        RuntimeError, match=r"with `palate\.train\.replay\('.*step-000003', model, algorithm, reward\)`"
    ):
        run(tmp_path, algorithm=Root())
    again = failure.replay(tmp_path / "failures" / checkpoint.name(3), TinyFlow(), Root(), reward)
    assert again.reproduced.startswith("the norm of the policy gradient is")
    assert [entry.split(",")[0] for entry in again.trace] == ["the gradient of policy 0.weight"]


def test_a_step_of_several_updates_starts_again_before_the_first(tmp_path):
    """Two updates a step, the second one sick: the first is repeated from the weights and moments it had."""

    class Twice(Quadratic):
        seen: ClassVar[list] = []

        def step(self, model, reward, batch, rng):
            yield Loss(sum((p**2).sum() for p in model.parameters()), {}, "policy")
            value = sum((p**2).sum() for p in model.parameters())
            self.seen.append((rng.step, float(value.detach())))
            yield Loss(value * (math.nan if rng.step in (1, 3) else 1.0), {"size": value.detach()}, "policy")

    run(tmp_path, algorithm=Twice(), steps=3)
    sizes = dict(Twice.seen)
    assert checkpoint.steps(tmp_path / "failures") == [3]  # the newest one only
    again = failure.replay(tmp_path / "failures" / checkpoint.name(3), TinyFlow(), Twice(), reward)
    assert again.metrics["size"] == sizes[3] == Twice.seen[-1][1] and again.trace == ["loss 2 of the step, nan"]


def test_the_algorithm_starts_from_its_own_state(tmp_path):
    """One that goes wrong in its third step, by its own count: the bundle tells a new one that two are behind it."""

    class Counting(Quadratic):
        count = 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

        def step(self, model, reward, batch, rng):
            self.count += 1
            for loss in super().step(model, reward, batch, rng):
                yield loss._replace(value=loss.value * (math.nan if self.count == BAD else 1.0))

    run(tmp_path, algorithm=Counting(), steps=4)
    again = failure.replay(tmp_path / "failures" / checkpoint.name(BAD), TinyFlow(), Counting(), reward)
    assert again.reproduced and again.trace == ["loss 1 of the step, nan"]


def test_a_step_that_no_longer_fails_says_so(tmp_path):
    run(tmp_path, model=(parts := poisoned("reward"))[0], algorithm=parts[1], reward=parts[2], steps=4)
    healthy = failure.replay(tmp_path / "failures" / checkpoint.name(BAD), TinyFlow(), Inner(), reward)
    assert not healthy.reproduced and healthy.trace == [] and "no longer fails" in healthy.text()


def test_a_bundle_of_other_weights_or_damaged_is_refused(tmp_path):
    run(tmp_path, model=(parts := poisoned("reward"))[0], algorithm=parts[1], reward=parts[2], steps=4)
    bundle = tmp_path / "failures" / checkpoint.name(BAD)
    other = TinyFlow()
    with torch.no_grad():
        next(other.reference.parameters()).add_(1e-3)
    with pytest.raises(checkpoint.CheckpointError, match="other base weights"):
        failure.replay(bundle, other, Inner(), reward)
    with open(bundle / checkpoint.STATE, "ab") as file:
        file.write(b" ")
    with pytest.raises(checkpoint.CheckpointError, match="SHA-256"):
        failure.replay(bundle, TinyFlow(), Inner(), reward)


def test_latents_that_are_not_finite_are_refused_before_the_first_step(tmp_path):
    latents = torch.zeros(5, 3, 4, 4)
    latents[2, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match=r"latents of image 2.*not finite"):
        run(tmp_path / "run", latents=latents)
    assert not (tmp_path / "run").exists()


def test_the_command_names_the_place_and_its_exit_code_says_whether_it_fails(tiny, palate, monkeypatch):
    def sick(images, prompts):
        return reward(images, prompts) * (math.nan if images.requires_grad else 1.0)

    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda settings: (sick, None))
    assert palate("train", "tiny.yaml")[0] == 3
    bundle = "runs/tiny/failures/step-000003"
    code, out, err = palate("replay", bundle)
    assert (code, err) == (0, "")
    assert "first value that is not finite: the reward of 'warm. a " in out and "is nan" in out
    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda settings: (reward, None))
    code, out, _ = palate("replay", bundle)
    assert code == 1 and "no longer fails" in out
    code, _, err = palate("replay", "runs/tiny")
    assert code == 2 and short(err)
    assert palate("train", "tiny.yaml", "--fresh")[0] == 0  # a bundle is part of a run


class Sick(Networks):
    """Predicts nan from one of its calls on, counted from 1."""

    def __init__(self, others, call):
        super().__init__(others=others)
        self.calls, self.call = 0, call

    def predict(self, xt, t, cond, **options):
        pred = super().predict(xt, t, cond, **options)
        self.calls += 1
        return Prediction(pred.x0 * (math.nan if self.calls >= self.call else 1.0), pred.eps)


def features(images, prompts):
    return images.mean((2, 3))


REWARDS = {  # what an algorithm asks of a reward besides its values
    "distar-head": BlackBox(lambda images, prompts: reward(images, prompts).tolist(), features),
    "flow_grpo-parts": weighted({"plain": (1.0, reward), "half": (0.5, reward)}),
}
OTHERS = {"distar": ("assistant",), "distar-head": ("assistant",), "opd": tuple(TEACHERS)}
PARTS = {"flow_grpo-parts": lambda: FlowGRPO(FlowGRPOSettings(group=2, steps=3, guidance=1.0, per_reward=True))}


@pytest.mark.parametrize("name", [*MAKE, *PARTS])
def test_the_failed_step_of_every_method_is_repeated(tmp_path, name):
    make, others = {**MAKE, **PARTS}[name], OTHERS.get(name, ())
    rate = REWARDS.get(name, reward)
    first = 4 if name == "sqdf" else 1  # whose buffer leaves out what is not finite: its rollout is sound
    run(tmp_path, model=Sick(others, first), algorithm=make(), reward=rate, steps=1, batch_size=4)
    (skipped,) = (row for row in rows(tmp_path) if row["event"] == "skip")
    again = failure.replay(tmp_path / "failures" / checkpoint.name(1), Sick(others, first), make(), rate)
    assert again.reproduced == again.reported == skipped["reason"]
    assert again.trace[0].startswith("model.predict (")


def test_a_step_starts_again_before_its_first_update_also_where_the_step_before_made_fewer(tmp_path):
    """Diff-Instruct*'s assistant learns alone for a step; in the next one its update is made and the generator's fails.
    The bundle holds the assistant of before both."""

    def sick(images, prompts):
        return reward(images, prompts) * math.nan

    algorithm = Distar(DistarSettings(generator=Generator(t_init=0.7), assistant_warmup_steps=1))
    run(tmp_path, model=Networks(others=("assistant",)), algorithm=algorithm, reward=lambda images, prompts: (
        sick(images, prompts) if images.requires_grad else reward(images, prompts)
    ), steps=2)  # fmt: skip
    assert [row["step"] for row in rows(tmp_path) if row["event"] == "skip"] == [2]
    before, bundle = tensors(tmp_path, 1), checkpoint.load(tmp_path / "failures" / checkpoint.name(2)).tensors
    assert all(torch.equal(bundle[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["opd", "distar-head"])
def test_the_command_builds_all_that_the_algorithm_asks(tiny, palate, monkeypatch, name):
    """Teachers, and the features of a black-box reward."""
    asked, given = [], []

    def model(recipe, **options):
        made = Networks(others=OTHERS[name])
        made.weights.add_frozen = lambda adapter, name, key: given.append(name)
        made.encode_prompts = lambda prompts: Networks.encode_prompts(made, prompts) * (math.nan if asked else 1.0)
        return made

    def head(recipe):
        given.append("features")
        return features

    for place, stand_in in {"build_model": model, "head_features": head, "check_start": lambda recipe: None}.items():
        monkeypatch.setattr(f"palate.recipe.builder.{place}", stand_in)
    algorithm = {
        "opd": "{name: opd, steps: 2, teachers: {warm: {adapter: a}, cold: {adapter: b}}}",
        "distar-head": "{name: distar, head_queries: 2, head_first: 2, head_memory: 6}",
    }[name]
    recipe = (tiny / "tiny.yaml").read_text().splitlines()
    recipe = [f"algorithm: {algorithm}" if line.startswith("algorithm") else line for line in recipe]
    (tiny / "tiny.yaml").write_text("\n".join(recipe).replace("preview_every: 2", "preview_every: 0"))
    asked.append(True)
    code, _, err = palate("train", "tiny.yaml")
    assert code == 3, err
    first = list(given)
    code, out, err = palate("replay", "runs/tiny/failures/step-000003")
    assert (code, err) == (0, "") and "first value that is not finite: model.encode_prompts" in out
    assert given == first * 2


def test_memory_that_ran_out_among_ranks_is_no_lost_rank():
    with pytest.raises(torch.OutOfMemoryError), distributed.peers():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RankLostError), distributed.peers():
        raise RuntimeError("connection closed by peer")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for name in distributed.PLACE:
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = r"rank 2 of this machine has no GPU, it has 2.*--nproc"
    with pytest.raises(InputError, match=said), distributed.process_group():
        raise AssertionError("no group was made")


def test_a_card_without_bfloat16_of_its_own_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (2**30, 2**34))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="card", major=(7, 8)[i]))
    old, new = [found for found in doctor._devices() if "cuda:" in found.text]
    assert (old.state, new.state) == ("note", "ok") and "set model.dtype=float32" in old.text
