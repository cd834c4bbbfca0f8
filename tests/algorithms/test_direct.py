"""algorithms/direct.py: the exact gradient of a one-step generator, words as a relative reward, steering."""

from __future__ import annotations

import pytest
import torch
from support.gaussian import D, model_of

from palate.algorithms.direct import Direct, DirectSettings, calls_per_update
from palate.core import Batch, Random
from palate.runtime.errors import InputError
from palate.sampling import FewStepGenerator

Y = torch.randn(1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(3))
GENERATOR = FewStepGenerator(t_init=0.7, steps=1)


def quadratic(images, prompts):
    return -0.5 * (images - Y).square().sum((1, 2, 3))


def by_length(images, prompts):
    """A reward that reads the prompt: mean of the picture times the prompt's length."""
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts], dtype=images.dtype)
    return images.mean((1, 2, 3)) * lengths


def run(algorithm, *, model=None, reward=quadratic, ids=(0, 1, 2), step=1):
    model = model or model_of()
    for p in model.parameters():
        p.grad = None
    prompts = ["cat"] * len(ids)
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(ids))
    losses = list(algorithm.step(model, reward, batch, Random(0, step, ids)))
    losses[-1].value.backward()
    assert [loss.update for loss in losses] == ["policy"]
    return [p.grad for p in model.parameters()], losses[-1]


def drawn(model, ids=(0, 1, 2), step=1):
    """One evaluation at t_init, written out."""
    noise = Random(0, step, ids).normal("noise-0", model.latent_shape).to(D)
    t = torch.full((len(ids),), 0.7, dtype=D)
    _, sigma = model.schedule(t)
    return model.decode(model.predict(sigma * noise, t, model.encode_prompts(["cat"] * len(ids))).x0)


def test_gradient_is_that_of_the_reward_through_the_one_evaluation():
    model = model_of()
    grads, loss = run(Direct(DirectSettings(generator=GENERATOR)), model=model)
    value = -quadratic(drawn(model), ["cat"] * 3).mean()
    expected = torch.autograd.grad(value, model.parameters(), allow_unused=True)
    assert float(loss.value.detach()) == pytest.approx(float(value.detach()), rel=1e-12)
    for got, want in zip(grads, expected, strict=True):
        assert (got is None) == (want is None)
        assert want is None or torch.allclose(got, want, rtol=0, atol=1e-12)


def test_words_make_the_reward_relative_and_rotate():
    """(1 + k) R("dogs. cat") - R("x. cat"): lengths 9 and 6; the step takes the second wanted word, and the only
    unwanted one."""
    model, k = model_of(), 0.5
    settings = DirectSettings(generator=GENERATOR, positive=("big", "dogs"), negative=("x",), k=k)
    _, loss = run(Direct(settings), model=model, reward=by_length, step=3)
    mean = drawn(model, step=3).mean((1, 2, 3)).mean().detach()
    assert float(loss.value.detach()) == pytest.approx(float(-(1 + k) * 9 * mean + 6 * mean), rel=1e-12)
    assert float(loss.metrics["positive"]) == pytest.approx(float(9 * mean), rel=1e-12)


def test_a_side_without_words_asks_the_plain_prompt():
    model = model_of()
    only = Direct(DirectSettings(generator=GENERATOR, negative=("flat",), k=0.0))
    _, loss = run(only, model=model, reward=by_length)
    mean = drawn(model).mean((1, 2, 3)).mean().detach()
    assert float(loss.value.detach()) == pytest.approx(float(-(3 - 9) * mean), rel=1e-12)


def test_what_a_reward_says_without_the_prompt_cancels_but_for_k():
    """R = taste + R(prompt): the taste's part of the objective is k times itself, whatever the words."""
    model, taste = model_of(), 5.0
    settings = DirectSettings(generator=GENERATOR, positive=("ab",), negative=("cd",), k=1.0)
    _, plain = run(Direct(settings), model=model, reward=by_length)
    _, more = run(Direct(settings), model=model, reward=lambda x, p: by_length(x, p) + taste)
    assert float(plain.value.detach() - more.value.detach()) == pytest.approx(1.0 * taste, rel=1e-12)


def test_steering_replaces_lists_and_refuses_contradictions():
    algorithm = Direct(DirectSettings(positive=("3d",)))
    algorithm.steer(negative=["flat"])
    assert (algorithm.positive, algorithm.negative) == (("3d",), ("flat",))
    with pytest.raises(InputError, match="at once"):
        algorithm.steer(positive=["flat"])
    assert algorithm.positive == ("3d",)
    algorithm.steer(positive=[], negative=[])
    assert algorithm.positive == () and algorithm.control_texts("cat") == {"positive": [], "negative": []}
    again = Direct(DirectSettings())
    algorithm.steer(positive=["x"])
    again.load_state_dict(algorithm.state_dict())
    assert again.positive == ("x",)


def test_words_are_read_from_a_text_and_checked():
    assert DirectSettings(positive="3d, glossy").positive == ("3d", "glossy")
    assert DirectSettings(positive="").positive == ()
    for wrong in ({"positive": ["", "x"]}, {"positive": [3]}, {"positive": ("a",), "negative": ("a",)}, {"k": -1.0},
                  {"template": "{control}"}):  # fmt: skip
        with pytest.raises(InputError):
            DirectSettings(**wrong)


def test_a_generator_of_two_evaluations_carries_gradient_through_the_last():
    model, ids = model_of(), (0, 1, 2)
    settings = DirectSettings(generator=FewStepGenerator(t_init=0.7, steps=2))
    grads, _ = run(Direct(settings), model=model)
    rng, cond = Random(0, 1, ids), model.encode_prompts(["cat"] * 3)
    z0, z1 = (rng.normal(f"noise-{k}", model.latent_shape).to(D) for k in (0, 1))
    t0, t1 = (torch.full((3,), t, dtype=D) for t in (0.7, 0.35))
    x0 = model.predict(model.schedule(t0)[1] * z0, t0, cond).x0.detach()
    alpha, sigma = model.schedule(t1)
    value = -quadratic(model.decode(model.predict(alpha * x0 + sigma * z1, t1, cond).x0), ["cat"] * 3).mean()
    for got, want in zip(grads, torch.autograd.grad(value, model.parameters(), allow_unused=True), strict=True):
        assert want is None or torch.allclose(got, want, rtol=0, atol=1e-12)
    assert calls_per_update(settings) == {"forward": 2, "backward": 1, "decode": 1, "reward": 1}


# ------------------------------------------------------------------------------------------------------ the context


def never(images, prompts):
    raise AssertionError("the reward has no part in the updates of the context")


def told_of(word):
    """The base's mean of "cat" is .2, and that of "cat" with the word .9."""
    model = model_of()
    model.means = {word: torch.full((1, 2, 2), 0.9, dtype=D)}
    return model


def test_the_context_is_learnt_by_the_distance_to_what_the_reference_draws_with_the_words():
    """Of N(mu, s^2) the evaluation's x0 moves with mu by f = sigma^2 / (alpha^2 s^2 + sigma^2), and with the trained
    velocity, here .1, by -sigma / (alpha + sigma) = -sigma: the reference's does not."""
    model, s = told_of("dark. cat"), 0.6
    model.parameters()[0].data.fill_(0.1)
    settings = DirectSettings(generator=GENERATOR, context=("dark",), context_steps=4)
    (grad,), loss = run(Direct(settings), model=model, reward=never, step=4)
    alpha, sigma = 0.3, 0.7
    apart = sigma**2 / (alpha**2 * s**2 + sigma**2) * (0.2 - 0.9) - 0.1 * sigma
    assert float(loss.value.detach()) == pytest.approx(apart**2, rel=1e-12)
    assert torch.allclose(grad, torch.full_like(grad, -2 * sigma * apart / grad.numel()), rtol=0, atol=1e-12)
    assert float(loss.metrics["context_distance"]) == pytest.approx(apart**2, rel=1e-12)
    assert (model.forward, model.backward, model.decoded) == (6, 3, 0)


def test_after_the_context_the_reward_is_followed_and_without_one_from_the_first_update():
    settings = DirectSettings(generator=GENERATOR, context=("dark",), context_steps=4)
    model = told_of("dark. cat")
    plain, loss = run(Direct(DirectSettings(generator=GENERATOR)), model=model, step=5)
    after, later = run(Direct(settings), model=model, step=5)
    assert torch.equal(plain[0], after[0]) and loss.metrics == later.metrics
    assert Direct(DirectSettings()).other_prompts(model, ["cat"]) == []


def test_a_model_that_knows_its_words_puts_the_context_in_and_names_the_key_of_one_that_it_does_not_know():
    class Words:
        def with_words(self, prompt, words):
            if "xyzzy" in words:
                raise InputError("unknown word 'xyzzy'")
            return prompt if "blue" in prompt else f"{prompt} on {words[0]}"

    def made(*words):
        return Direct(DirectSettings(context=words)).other_prompts

    assert made("black")(Words(), ["cat", "cat on blue"]) == ["cat on black", "cat on blue"]
    assert made("dark", "large")(model_of(), ["cat"]) == ["dark, large. cat"]
    with pytest.raises(InputError, match=r"algorithm\.context: unknown word"):
        made("xyzzy")(Words(), ["cat"])
    with pytest.raises(InputError, match="context_steps"):
        DirectSettings(context_steps=0)
