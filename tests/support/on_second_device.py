"""The tests of tests/loop/test_second_device.py, which runs them in a process of its own."""

from __future__ import annotations

import pytest
import support.loop
import torch
from support import ranks, second_device
from support.tiny_families import FAMILIES, load

from palate.core.random import Random
from palate.models.emoji import EmojiModel
from palate.recipe.start import start_folder
from palate.rewards import table
from palate.rewards.load import load_reward
from palate.sampling import sample

GPU = torch.device(second_device.NAME, 0)
KINDS = {family.model: name for name, family in reversed(FAMILIES.items())}  # one of each class
OWN = [name for name, entry in table.OWN.items() if entry.kind in ("function", "embedded")]
PROMPTS = ["a 3d dog on a blue background", "two apples"]


def test_a_tensor_left_on_the_cpu_is_found():
    here, left = torch.ones(2, 2, device=GPU), torch.ones(2, 2)
    for wrong in (lambda: here + left, lambda: here @ left, lambda: torch.cat([here, left]), here.numpy):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert torch.equal((here @ here).cpu(), left @ left)


class Moved(ranks.Networks):
    """The stand-in, which lives there."""

    device = GPU

    def __init__(self, dtype, others, training):
        super().__init__(dtype, others, training)
        for network in {self.net, self.reference, *getattr(self.weights, "networks", {}).values()}:
            network.to(GPU)

    def encode_prompts(self, prompts):
        return super().encode_prompts(prompts).to(GPU)

    def decode(self, latents):
        return super().decode(latents.to(GPU))

    def predict(self, xt, t, cond, **how):
        assert xt.device == GPU
        return super().predict(xt, t, cond, **how)

    def fingerprint(self):
        return "moved"


@pytest.mark.parametrize("name", ranks.MAKE)
def test_a_method_trains_the_same_weights(name, tmp_path, monkeypatch):
    settings = {"training": "lora", "checkpoint_every": 1, "preview_every": 2}
    ranks.go(tmp_path / "cpu", name, **settings)
    monkeypatch.setattr(ranks, "Networks", Moved)
    ranks.go(tmp_path / "gpu", name, **settings | {"steps": 2})
    ranks.go(tmp_path / "gpu", name, **settings, resume=True)
    here, there = (support.loop.tensors(tmp_path / where, ranks.STEPS) for where in ("cpu", "gpu"))
    assert here.keys() == there.keys()
    for key, value in here.items():
        torch.testing.assert_close(there[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def drawn(model):
    """Pictures, and the gradient that a call of the network has in them."""
    noise = Random(0, 0, range(2)).normal("noise", model.latent_shape).to(model.device)
    cond = model.encode_prompts(PROMPTS)
    images = model.decode(sample(model, cond, noise, 2, guidance=2.0))
    x0 = model.predict(noise, torch.tensor([0.8, 0.3], device=model.device), cond).x0
    model.decode(x0).square().mean().backward()
    return [images, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", KINDS.values())
def test_a_family_draws_the_same_pictures(name):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = drawn(load(name))
    found = drawn(load(name, device=str(GPU)))
    assert all(value.device == GPU for value in found)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value.cpu(), other, rtol=1e-3, atol=1e-5)


def test_full_training_computes_in_bfloat16():
    model = load("flux", training="full", dtype="bfloat16", device=str(GPU))
    noise = Random(0, 0, range(2)).normal("noise", model.latent_shape).to(GPU)
    seen = []
    model.weights.network.register_forward_hook(lambda module, given, output: seen.append(output[0].dtype))
    model.weights.network.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    x0 = model.predict(noise, torch.tensor([0.8, 0.3], device=GPU), model.encode_prompts(PROMPTS)).x0
    x0.square().mean().backward()
    assert seen == [torch.bfloat16, False] and x0.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"training": "full"}], ids=["lora", "full"])
def test_the_embedded_model_draws_and_reads_pictures(options):
    here, there = EmojiModel.load(**options), EmojiModel.load(**options, device=str(GPU))
    if "training" in options:  # a difference from the base's weights, as the package holds it
        for model in (here, there):
            model.weights.load(start_folder("emoji-1step"), "policy")
    noise = torch.randn(1, *here.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = here.encode_prompts(PROMPTS[:1])
    torch.testing.assert_close(there.encode_prompts(PROMPTS[:1]).cpu(), cond, rtol=1e-4, atol=1e-5)
    images = sampled(here, noise, cond)
    torch.testing.assert_close(sampled(there, noise.to(GPU), cond.to(GPU)).cpu(), images, rtol=1e-3, atol=1e-4)
    for model in (here, there):  # pictures and noise come from the CPU as well
        model.decode(noise), model.encode(images)
    torch.testing.assert_close(there.encode(images).cpu(), here.encode(images), rtol=1e-3, atol=1e-4)


def sampled(model, noise, cond):
    with torch.no_grad():
        return model.decode(sample(model, cond, noise, 1))


@pytest.mark.parametrize("name", OWN)
def test_a_reward_follows_its_images(name):
    reward = load_reward(name)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = reward(images, PROMPTS)
    found = reward(images.to(GPU), PROMPTS)
    assert found.device == GPU
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
