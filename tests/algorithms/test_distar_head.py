"""algorithms/distar.py with a reward that can only be asked: a head learns it, the generator climbs the head."""

from __future__ import annotations

import math

import pytest
import torch

from palate.algorithms.distar import Distar, DistarSettings, calls_per_update
from palate.core import Batch, Random
from palate.models.gaussian import GaussianModel
from palate.rewards.learned import BlackBox
from palate.runtime.errors import InputError
from palate.sampling import FewStepGenerator

D = torch.float64
SHAPE = (3, 2, 2)


def network():
    return GaussianModel(
        torch.full(SHAPE, 0.2, dtype=D), 0.8, trains=("mean", "log_std"), networks=("policy", "assistant")
    )


def features(images, prompts):
    return images.mean((2, 3))


def taste(images, prompts):
    """Linear in the features, with a unit and an origin of its own."""
    return 40 + 7 * (images.mean((2, 3)) * torch.tensor([1.0, -2.0, 0.5], dtype=D)).sum(1)


def settings_of(**changes):
    small = {"generator": FewStepGenerator(t_init=0.6), "c": 0.1, "head_queries": 4, "head_first": 8}
    return DistarSettings(**(small | {"head_memory": 64} | changes))


def run(algorithm, model, step, reward, ids=range(8), lr=0.0):
    prompts = ["cat"] * len(ids)
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    for who in ("policy", "assistant"):
        for p in model.parameters(who):
            p.grad = None
    for loss in algorithm.step(model, reward, batch, Random(0, step, ids)):
        loss.value.backward()
        with torch.no_grad():
            for p in model.parameters(loss.update):
                p.sub_(lr * p.grad)
    return [p.grad.clone() for p in model.parameters("policy")], loss


def test_once_learnt_the_heads_gradient_is_the_rewards_own_in_its_standard_deviations():
    """y is linear in the features, so the head is exact up to its ridge: the update is that of (R - mean) / std."""
    model, algorithm = network(), Distar(settings_of())
    asked = []

    def counted(images, prompts):
        asked.append(len(images))
        return taste(images, prompts)

    for step in range(1, 12):
        grads, loss = run(algorithm, model, step, BlackBox(counted, features))
    assert asked == [4] * 11 and float(loss.metrics["head_answers"]) == 44
    assert float(loss.metrics["head_explained"]) > 0.9999
    std = float(algorithm.head.answers.std(correction=0))
    known, _ = run(Distar(settings_of(head_queries=0)), model, 11, lambda images, prompts: taste(images, prompts) / std)
    for ours, exact in zip(grads, known, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5)
    plain, _ = run(Distar(settings_of(head_queries=0, reward_scale=0)), model, 11, taste)
    assert float((plain[0] - grads[0]).abs().max()) > 1e-2


def test_until_it_has_answers_enough_only_the_divergence_moves_the_generator():
    model, algorithm = network(), Distar(settings_of(head_first=12))
    box = BlackBox(taste, features)
    for step, learnt in ((1, False), (2, False), (3, True)):
        grads, loss = run(algorithm, model, step, box)
        plain, _ = run(Distar(settings_of(head_queries=0, reward_scale=0)), model, step, taste)
        assert torch.equal(grads[0], plain[0]) != learnt and ("reward" in loss.metrics) == learnt
        assert "answer" in loss.metrics


def test_training_raises_what_the_black_box_answers():
    model, algorithm = network(), Distar(settings_of(reward_scale=0.5, assistant_steps=2))
    answers = []
    for step in range(1, 60):
        _, loss = run(algorithm, model, step, BlackBox(taste, features), lr=0.02)
        answers.append(float(loss.metrics["answer"]))
    assert sum(answers[-10:]) / 10 > sum(answers[:10]) / 10 + 1


def test_a_resumed_run_repeats_the_head_to_the_last_bit():
    model, algorithm, box = network(), Distar(settings_of()), BlackBox(taste, features)
    for step in range(1, 6):
        run(algorithm, model, step, box)
    again = Distar(settings_of())
    again.load_state_dict(algorithm.state_dict())
    ours, theirs = (run(a, model, 6, box)[0] for a in (algorithm, again))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert "head" not in Distar(settings_of(head_queries=0)).state_dict()


def test_an_image_that_is_not_finite_leaves_no_trace_in_the_head():
    """Its update is not finite, so the loop skips it; what the head remembers, and a checkpoint holds, stays sound. An
    answer that is not finite about a sound image is the reward's own fault."""
    algorithm = Distar(settings_of())
    for step in range(1, 4):
        run(algorithm, network(), step, BlackBox(taste, features))
    before = algorithm.head.fit

    def sick(images, prompts):
        return torch.where(torch.arange(len(images))[:, None] < 4, images.mean((2, 3)) * math.nan, features(images, 0))

    for answer in (taste, lambda images, prompts: taste(images, prompts) * math.nan):
        _, loss = run(algorithm, network(), 4, BlackBox(answer, sick))
        assert not bool(torch.isfinite(loss.value)) and len(algorithm.head) == 12
        assert torch.equal(algorithm.head.fit.head, before.head)
    assert bool(torch.isfinite(algorithm.state_dict()["head"]["features"]).all())
    with pytest.raises(InputError, match="answered with numbers that are not finite"):
        run(algorithm, network(), 4, BlackBox(answer, features))


def test_no_call_of_a_network_is_added():
    calls = []

    class Counted(GaussianModel):
        def predict(self, *args, **kwargs):
            calls.append(1)
            return super().predict(*args, **kwargs)

    model = Counted(torch.full(SHAPE, 0.2, dtype=D), 0.8, trains=("mean",), networks=("policy", "assistant"))
    algorithm = Distar(settings_of())
    run(algorithm, model, 1, BlackBox(taste, features))
    assert len(calls) == calls_per_update(algorithm.settings)["predict"]


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match=r"head_queries needs features"):
        run(Distar(settings_of()), network(), 1, taste)
    with pytest.raises(ValueError, match=r"algorithm\.head_queries \(a head"):
        run(Distar(settings_of(head_queries=0)), network(), 1, lambda images, prompts: taste(images, prompts).detach())
    for wrong in ({"head_queries": -1}, {"head_first": 1}, {"head_first": 100}):
        with pytest.raises(ValueError, match="DistarSettings expected head"):
            settings_of(**wrong)
