"""algorithms/dpo.py: the gradient's closed form, given and drawn pairs, what is called."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.gaussian import VP, C, D, linear, model_of

from palate import recipe
from palate.algorithms.dpo import DPO, DPOSettings, calls_per_update, dpo_loss, excess_error, pair_loss
from palate.core import Batch, Random
from palate.path import add_noise, flow_schedule
from palate.sampling import sample


def never(images, prompts):
    raise AssertionError("given pairs need no reward")


def run(settings, *, model=None, reward=linear, ids=(0, 1), pairs=None):
    model = model or model_of()
    prompts = [f"cat {i}" for i in ids]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)), pairs)
    for p in model.parameters():
        p.grad = None
    losses = []
    for loss in DPO(settings).step(model, reward, batch, Random(0, 1, ids)):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
    return model.parameters()[0].grad, losses


def pairs_of(n):
    return torch.randn(n, 2, 1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("moved", [0.0, 0.2])
@pytest.mark.parametrize("n", [1, 3])
def test_gradient_in_closed_form(schedule, moved, n):
    """A velocity shift b moves eps_theta by c b, c = alpha/(alpha + sigma). With e = eps - eps_ref and the margin
    s = -beta/2 (m_w - m_l):  dL/db = -(1 - sigmoid(s)) beta c / D (e_w - e_l),  (1 - sigmoid) = 1/2 at the reference;
    of several times the mean.
    """
    beta, model, pairs = 3.0, model_of(schedule), pairs_of(2)
    with torch.no_grad():
        model.parameters()[0].fill_(moved)
    grad, losses = run(DPOSettings(beta=beta, n=n), model=model, reward=never, pairs=pairs)
    assert [loss.update for loss in losses] == [None] * (n - 1) + ["policy"]
    rng, cond, expected = Random(0, 1, [0, 1]), model.encode_prompts(["cat", "cat"]), []
    for loss, name in zip(losses, ("", "-1", "-2")[:n], strict=True):
        eps, t = rng.normal(f"inject{name}", (1, 2, 2)).double(), 1 - rng.uniform(f"level{name}")
        alpha, sigma = schedule(t)
        c = alpha / (alpha + sigma)
        e_w, e_l = (
            eps - model.predict(add_noise(pairs[:, k], eps, alpha, sigma), t, cond, weights="reference").eps
            for k in (0, 1)
        )
        m_w, m_l = (((e - c * moved).square() - e.square()).mean((1, 2, 3)) for e in (e_w, e_l))
        s = -beta / 2 * (m_w - m_l)
        expected.append(-((1 - torch.sigmoid(s)).view(-1, 1, 1, 1) * beta * c / 4 * (e_w - e_l)).mean(0))
        value = -torch.nn.functional.logsigmoid(s).mean() / n
        torch.testing.assert_close(loss.value.detach(), value, atol=1e-12, rtol=0)
        torch.testing.assert_close(loss.metrics["excess_preferred"], m_w.mean(), atol=1e-12, rtol=0)  # sees the noise
        if not moved:
            assert float(loss.value.detach()) == pytest.approx(0.6931471805599453 / n)
    torch.testing.assert_close(grad, torch.stack(expected).mean(0), atol=1e-12, rtol=0)


def test_swapping_a_pair_swaps_the_gradient_and_equal_images_give_none():
    pairs = pairs_of(2)
    grad, _ = run(DPOSettings(beta=2.0), pairs=pairs)
    swapped, _ = run(DPOSettings(beta=2.0), pairs=pairs.flip(1))
    torch.testing.assert_close(swapped, -grad, atol=1e-12, rtol=0)
    same, _ = run(DPOSettings(beta=2.0), pairs=pairs[:, :1].expand(-1, 2, -1, -1, -1))
    assert float(same.abs().max()) < 1e-15


def test_drawn_pairs_are_the_references_samples_in_the_rewards_order():
    """They equal given pairs: two samples of the reference with ids 2 i and 2 i + 1, the better one first."""
    settings, model = DPOSettings(beta=2.0, steps=3, guidance=2.0), model_of()
    noise = Random(0, 1, [10, 11, 14, 15]).normal("rollout", (1, 2, 2)).double()
    cond = model.encode_prompts(["cat"] * 4)
    x0 = sample(model, cond, noise, 3, guidance=2.0, weights="reference").view(2, 2, 1, 2, 2)
    scores = (x0 * C).sum((2, 3, 4))
    pairs = torch.stack([x0[i] if scores[i, 0] >= scores[i, 1] else x0[i].flip(0) for i in range(2)])
    with torch.no_grad():
        model.parameters()[0].fill_(0.3)  # the policy has moved on, the drawn pairs have not
        model.networks["policy"]["log_std"].fill_(0.5)
    drawn, losses = run(settings, model=model, ids=(5, 7))
    given, _ = run(settings, model=model, ids=(5, 7), pairs=pairs, reward=never)
    torch.testing.assert_close(drawn, given, atol=1e-12, rtol=0)
    torch.testing.assert_close(losses[0].metrics["reward_gap"], (scores[:, 0] - scores[:, 1]).abs().mean())
    none, _ = run(settings, reward=lambda images, prompts: torch.ones(len(images), dtype=D))
    assert torch.equal(none, torch.zeros_like(none))


def test_training_makes_the_policy_prefer_and_lean_towards_the_reward():
    model, settings = model_of(), DPOSettings(beta=50.0, steps=3, guidance=1.0)
    noise, cond = torch.randn(64, 1, 2, 2, dtype=D), model.encode_prompts(["cat"] * 64)
    before = linear(sample(model, cond, noise, 6), None).mean()
    for _ in range(5):
        grad, losses = run(settings, model=model, ids=range(64))
        with torch.no_grad():
            model.parameters()[0].sub_(0.02 * grad)
    assert float(losses[0].metrics["prefers"]) > 0.5
    assert float(linear(sample(model, cond, noise, 6), None).mean()) > float(before) + 0.01


def test_loss_and_excess_error():
    losses, right = dpo_loss(torch.tensor([-0.1, 0.1], dtype=D), torch.tensor([0.1, 0.1], dtype=D), 10.0)
    expected = torch.tensor([1.0, 0.0], dtype=D)
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-expected)))
    assert right.tolist() == [1.0, 0.0]
    eps = torch.zeros(1, 1, 1, 2, dtype=D)
    got = excess_error(torch.tensor([[[[1.0, 2.0]]]], dtype=D), torch.tensor([[[[0.0, 1.0]]]], dtype=D), eps)
    assert float(got) == 2.0


@pytest.mark.parametrize("n", [1, 3])
def test_calls(n):
    model, settings = model_of(), DPOSettings(steps=3, guidance=2.0, n=n)
    run(settings, model=model, ids=(0, 1, 2))
    calls = calls_per_update(settings)
    assert [model.forward, model.backward, model.decoded] == [3 * calls[k] for k in ("forward", "backward", "decode")]
    model = model_of()
    run(settings, model=model, pairs=pairs_of(2), reward=never)
    calls = calls_per_update(settings, given=True)
    assert [model.forward, model.backward, model.decoded] == [2 * calls[k] for k in ("forward", "backward", "decode")]


def test_pairs_of_a_recipe_arrive_preferred_first_without_the_ties(tmp_path, monkeypatch, caplog):
    rows = [("a.png", "b.png", [0, 1]), ("b.png", "a.png", [1, 0]), ("a.png", "b.png", [1, 1])]
    for name, grey in (("a.png", 50), ("b.png", 200)):
        Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(tmp_path / name)
    listed = [
        {"prompt": f"cat {i}", "image_path": [a, b], "human_preference": votes} for i, (a, b, votes) in enumerate(rows)
    ]
    (tmp_path / "train.json").write_text(json.dumps(listed))
    model = SimpleNamespace(image_size=2, encode=lambda images: images)
    monkeypatch.setattr("palate.recipe.builder.build_model", lambda *args, **options: model)
    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda *args: (linear, None))
    text = f"algorithm: {{name: dpo}}\nreward: {{name: emoji}}\nprompts: {{pairs: {tmp_path / 'train.json'}}}"
    parts = recipe.build(recipe.parse(text))
    assert parts.prompts == ["cat 0", "cat 1"] and parts.latents.shape == (2, 2, 3, 2, 2)
    torch.testing.assert_close(parts.latents.mean((2, 3, 4)) * 255, torch.tensor([[200.0, 50.0]] * 2))
    assert "1 of 3 pairs are ties and are left out; algorithm.ties=equal learns from them" in caplog.text
    (tmp_path / "train.json").write_text(json.dumps(listed[2:]))
    with pytest.raises(recipe.RecipeError, match="holds no pair with a preference"):
        recipe.build(recipe.parse(text))
    for override, message in (
        ("algorithm.name=refl", "prompts.pairs: refl does not read pairs"),
        ("prompts.file=emoji-train", "got prompts.file and prompts.pairs"),
        ("prompts={images: x}", "prompts.images: dpo reads pairs of images"),
    ):
        with pytest.raises(recipe.RecipeError, match=message):
            recipe.parse(text, [override])


def test_given_ties_and_mirror_images_are_samples_of_their_own(tmp_path, monkeypatch, caplog):
    """A tie in both orders and a choice twice: the mean loss is that of preference 1/2 and 1. Pictures are mirrored
    before they are encoded: this encoder keeps the left half only, so mirroring latents would give another answer."""
    for name, sides in (("a.png", (50, 100)), ("b.png", (200, 250))):
        Image.fromarray(np.array([sides] * 2, np.uint8)).convert("RGB").save(tmp_path / name)
    listed = [{"prompt": f"cat {i}", "image_path": ["a.png", "b.png"], "human_preference": votes}
              for i, votes in enumerate([[0, 1], [1, 1]])]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(listed))
    model = SimpleNamespace(image_size=2, encode=lambda images: images[..., :1] * 255)
    monkeypatch.setattr("palate.recipe.builder.build_model", lambda *args, **options: model)
    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda *args: (linear, None))
    text = (f"algorithm: {{name: dpo, ties: equal, flip: true}}\nreward: {{name: emoji}}\n"
            f"prompts: {{pairs: {tmp_path / 'train.json'}}}")  # fmt: skip
    parts = recipe.build(recipe.parse(text))
    assert parts.prompts == ["cat 0", "cat 0", "cat 1", "cat 1"] * 2 and not caplog.text
    shades = parts.latents[:, :, 0, 0, 0].round().int().tolist()
    assert shades == [[200, 50], [200, 50], [50, 200], [200, 50], [250, 100], [250, 100], [100, 250], [250, 100]]
    m = torch.tensor([0.3, -0.2], dtype=torch.float64)
    both = pair_loss(torch.stack([m[0], m[1]]), torch.stack([m[1], m[0]]), 2.0)
    assert float(both.mean()) == pytest.approx(float(pair_loss(m[:1], m[1:], 2.0, "sigmoid", 0.5)))


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"expected \(B, 2, 1, 2, 2\).*prompts.pairs"):
        run(DPOSettings(), pairs=torch.zeros(2, 1, 2, 2))
    for wrong in ({"beta": 0}, {"steps": 0}, {"shift": 0}):
        with pytest.raises(ValueError, match="DPOSettings expected"):
            DPOSettings(**wrong)
