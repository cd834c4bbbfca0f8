"""One contract for every model: what `palate.core.Model` promises and types cannot say."""

from __future__ import annotations

import pytest
import torch
from support import tiny_families

from palate.models.emoji import EmojiModel
from palate.models.gaussian import Decoding, GaussianModel
from palate.path import add_noise

PROMPTS = ["a 3d dog on a blue background", "a cat", "a flat apple on red"]
MODELS = {
    "emoji-lora": lambda: EmojiModel.load(training="lora", lora_rank=4),
    "emoji-full": lambda: EmojiModel.load(training="full"),
    "gaussian": lambda: GaussianModel(torch.full((2, 3, 4), 0.3), 0.6, decoding=Decoding(0.1, 0.5)),
    **{name: lambda name=name: tiny_families.load(name) for name in tiny_families.FAMILIES},
    "sdxl-full": lambda: tiny_families.load("sdxl", training="full"),
    "flux-full": lambda: tiny_families.load("flux", training="full"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def noisy(model):
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn((3, *model.latent_shape), generator=generator)
    return xt, torch.tensor([0.9, 0.5, 0.2]), model.encode_prompts(PROMPTS)


def test_prediction_adds_up_to_the_input(model, noisy):
    xt, t, cond = noisy
    pred = model.predict(xt, t, cond, guidance=2.5)
    assert torch.allclose(add_noise(*pred, *model.schedule(t)), xt, atol=1e-5)


def test_rows_do_not_depend_on_the_batch(model, noisy):
    xt, t, cond = noisy
    whole = model.predict(xt, t, cond, guidance=2.5).x0
    alone = model.predict(xt[1:2], t[1:2], model.encode_prompts(PROMPTS[1:2]), guidance=2.5).x0
    assert torch.allclose(whole[1:2], alone, atol=2e-5)


def test_decode_is_differentiable_and_in_range(model):
    latents = 0.1 * torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(1))
    latents.requires_grad_()
    images = model.decode(latents)
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert gradient.abs().sum() > 0 and images.min() >= 0 and images.max() <= 1


def test_gradient_survives_a_call_of_the_reference(model, noisy):
    """peft takes requires_grad from an adapter that is switched off: a backward after that would be silently empty."""
    xt, t, cond = noisy

    def gradients(between) -> list[torch.Tensor]:
        for p in model.parameters("policy"):
            p.grad = None
        loss = model.predict(xt, t, cond).x0.square().mean()
        between()
        loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters("policy")]

    plain = gradients(lambda: None)
    switched = gradients(lambda: model.predict(xt, t, cond, weights="reference"))
    assert sum(float(g.abs().sum()) for g in plain) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, switched, strict=True))


def test_the_policy_is_restored_when_the_reference_fails(model, noisy):
    xt, t, cond = noisy
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        model.predict(xt[:, :0], t, cond, weights="reference")
    assert model.predict(xt, t, cond).x0.requires_grad


def test_the_reference_stays_where_the_policy_began(model, noisy):
    xt, t, cond = noisy
    before = model.predict(xt, t, cond, weights="reference").x0.detach()
    kept = [p.detach().clone() for p in model.parameters("policy")]
    with torch.no_grad():
        for p in model.parameters("policy"):
            p.add_(0.05)
    moved = model.predict(xt, t, cond).x0.detach()
    after = model.predict(xt, t, cond, weights="reference").x0.detach()
    with torch.no_grad():
        for p, value in zip(model.parameters("policy"), kept, strict=True):
            p.copy_(value)
    assert torch.equal(before, after) and not torch.allclose(moved, before, atol=1e-3)
    assert not after.requires_grad


def test_unknown_weights_are_refused(model, noisy):
    with pytest.raises(ValueError, match=r"policy or reference|weights"):
        model.predict(*noisy, weights="teacher")
