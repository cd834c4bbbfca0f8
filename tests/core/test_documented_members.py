"""palate.core says what a model, a reward and an algorithm have: that is enough, and nothing else is asked for."""

from __future__ import annotations

import inspect
from typing import Protocol

import pytest
import torch
from torch import nn

import palate
from palate import core
from palate.models.gaussian import GaussianModel
from palate.path import flow_schedule, from_velocity
from palate.recipe import GuardSettings

PROTOCOLS = [
    kind
    for kind in vars(core).values()
    if inspect.isclass(kind) and issubclass(kind, Protocol) and kind.__module__.startswith(core.__name__)
]


def members(*protocols) -> set[str]:
    """The names that protocols list, inherited ones included."""
    found = set()
    for kind in protocols:
        for base in kind.__mro__:
            if base in PROTOCOLS:
                found |= {name for name in vars(base) if not name.startswith("_")} | set(
                    vars(base).get("__annotations__", ())
                )
    return found


class Watched:
    """Notes every member that somebody asks for and it does not have."""

    def __getattr__(self, name: str):
        if not name.startswith("__"):
            self.__dict__.setdefault("asked", set()).add(name)
        raise AttributeError(f"{type(self).__name__} has no {name}")


class Model(Watched):
    schedule = staticmethod(flow_schedule)
    latent_shape = (3, 4, 4)
    default_steps, default_guidance, image_size = 2, 1.0, 4
    device = torch.device("cpu")

    def __init__(self):
        torch.manual_seed(0)
        self.asked, self._net = set(), nn.Conv2d(4, 3, 1)
        self._frozen = nn.Conv2d(4, 3, 1).requires_grad_(False)

    def encode_prompts(self, prompts):
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    def encode(self, images):
        return images * 2 - 1

    def decode(self, latents):
        return (latents * 0.5 + 0.5).clamp(0, 1)

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        time = t.to(xt)[:, None, None, None].expand(-1, 1, *xt.shape[2:])
        network = self._net if weights == "policy" else self._frozen
        return from_velocity(xt, network(torch.cat([xt, time], 1)), *self.schedule(t.to(xt)))

    def parameters(self, weights="policy"):
        return list(self._net.parameters())


class Algorithm(Watched):
    trains = ("policy",)

    def __init__(self):
        self.asked = set()

    def step(self, model, reward, batch, rng):
        noise = rng.normal("start", model.latent_shape)
        images = model.decode(palate.sample(model, batch.cond, noise, 2, grad_steps=1))
        rewards = reward(images, batch.prompts)
        yield core.Loss(-rewards.mean(), {"reward": rewards.mean().detach()}, "policy")


class Reward(Watched):
    def __init__(self):
        self.asked = set()

    def __call__(self, images, prompts):
        return images[:, 0].mean((1, 2))


def measure(model, prompts, ids):
    noise = core.Random(0, 0, ids).normal("guard", model.latent_shape)
    images = model.decode(palate.sample(model, model.encode_prompts(prompts), noise, model.default_steps))
    return {"heldout": float(images.mean())}


def trained(folder, model, **options):
    parts = model, Algorithm(), Reward()
    outcome = palate.train(
        *parts, ["a red fox", "a whale"], folder=folder, steps=3, batch_size=2, lr=1e-2, preview_every=1,
        checkpoint_every=2, guard=GuardSettings(every=1), check=measure, progress=False, **options,
    )  # fmt: skip
    return outcome, parts


def test_objects_with_exactly_the_documented_members_train_with_previews_and_guard(tmp_path):
    model = Model()
    assert {name for name in dir(model) if not name.startswith("_")} - {"asked"} == members(core.Sampleable)
    before = [p.clone() for p in model.parameters()]
    outcome, _ = trained(tmp_path, model)
    assert (outcome.step, outcome.reason) == (3, "finished")
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(list(tmp_path.glob("samples/step-*/0000.png"))) == 4  # the base model, and each step
    guarded = [row for row in palate.train.read_metrics(tmp_path / "metrics.jsonl") if row["event"] == "guard"]
    assert [row["step"] for row in guarded] == [0, 1, 2, 3] and all("heldout" in row for row in guarded)


def test_it_resumes_too(tmp_path):
    trained(tmp_path, Model())
    outcome = palate.train(
        Model(), Algorithm(), Reward(), ["a red fox", "a whale"], folder=tmp_path, steps=4, batch_size=2, lr=1e-2,
        preview_every=1, checkpoint_every=2, guard=GuardSettings(every=1), check=measure, progress=False, resume=True,
    )  # fmt: skip
    assert outcome.step == 4


def test_nothing_is_asked_for_that_core_does_not_list(tmp_path):
    _, parts = trained(tmp_path, Model())
    listed = members(*PROTOCOLS)
    for part in parts:
        assert part.asked <= listed, f"{type(part).__name__} was asked for {sorted(part.asked - listed)}"


@pytest.mark.parametrize("missing", sorted(members(core.Sampleable) - members(core.Model)))
def test_a_model_that_cannot_be_sampled_is_told_which_member_it_lacks(tmp_path, missing):
    kept = {name: value for name, value in vars(Model).items() if name not in (missing, "__dict__", "__weakref__")}
    part = type("Part", (Watched,), kept)()
    with pytest.raises(ValueError, match=missing):
        trained(tmp_path, part)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_gaussian_model_draws_previews(tmp_path):
    """It is a whole `Sampleable`, so that a user's first test can look at its pictures."""
    model = GaussianModel(torch.full((3, 4, 4), 0.5), 0.1)
    outcome, _ = trained(tmp_path, model)
    assert outcome.step == 3 and (tmp_path / "samples/step-000003/0000.png").exists()
