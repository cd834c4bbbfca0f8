"""replay_buffer.py: what is drawn, in closed form; first in first out; shards that read back what was written."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from palate.algorithms.replay_buffer import (
    UNIFORM_FRACTION,
    ReplayBuffer,
    inverse_cdf,
    step_probabilities,
    trajectory_probabilities,
    without_replacement,
)
from palate.runtime import checkpoint

D = torch.float64


def filled(count, capacity=100, *, length=4, memory=1 << 30, rewards=None, start=0):
    """Trajectory n, index i, holds the number n + i / 100 everywhere."""
    buffer = ReplayBuffer(capacity, memory=memory)
    for n in range(start, start + count):
        x = n + torch.arange(length).view(1, length, 1, 1, 1) / 100 + torch.zeros(1, length, 2, 2, 2)
        buffer.insert(x, [f"prompt {n}"], [n + 1.0 if rewards is None else rewards[n]])
    return buffer


def uniforms(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, dtype=D, generator=generator), torch.rand(count, dtype=D, generator=generator)


def test_prioritised_probabilities():
    torch.testing.assert_close(
        trajectory_probabilities(torch.tensor([2.0, 6.0, -1.0], dtype=D)), torch.tensor([0.25, 0.75, 0], dtype=D)
    )
    p, t = step_probabilities(50, 0.9), 50
    assert float(p[49]) == pytest.approx(0.1005180, abs=5e-8) and float(p[49]) == pytest.approx(0.1 / (1 - 0.9**t))
    assert float(p[0]) == pytest.approx(0.000575608, abs=5e-10)
    left = torch.arange(49, -1, -1, dtype=D)
    assert float((p * left).sum()) == pytest.approx(8.740976, abs=5e-7)
    assert float((p * left).sum()) == pytest.approx(9 - t * 0.9**t / (1 - 0.9**t))
    assert float((p * 0.9**left).sum()) == pytest.approx(0.5290283, abs=5e-8)
    assert float((0.9**left).mean()) == pytest.approx(0.1989692, abs=5e-8)
    torch.testing.assert_close(step_probabilities(50, 1.0), torch.full((50,), 0.02, dtype=D))
    assert step_probabilities(50, 0.0).tolist() == [0.0] * 49 + [1.0]


@pytest.mark.parametrize("rewards", [[-3.0, -1.0, -2.0], [0.0, 0.0, -1.0]])
def test_without_a_positive_reward_trajectories_are_drawn_uniformly(rewards):
    got = trajectory_probabilities(torch.tensor(rewards, dtype=D))
    torch.testing.assert_close(got, torch.full((3,), 1 / 3, dtype=D))
    draw = filled(3, rewards=rewards).draw("prioritised", *uniforms(60), gamma=0.5)
    assert set(draw.prompts) == {"prompt 0", "prompt 1", "prompt 2"}


def test_prioritised_draws_follow_the_law():
    n = 6000
    draw = filled(3, rewards=[2.0, 6.0, -1.0]).draw("prioritised", *uniforms(n), gamma=0.6)
    share = [draw.prompts.count(f"prompt {k}") / n for k in range(3)]
    assert share[2] == 0 and share[0] == pytest.approx(0.25, abs=4 * math.sqrt(0.1875 / n))
    for i, p in enumerate(step_probabilities(4, 0.6).tolist()):
        assert float((draw.step == i).double().mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    assert bool((draw.weight == 1).all())


def test_importance_weights_recover_the_uniform_mean():
    """The weighted mean of draws is the mean over all states, of a reward below zero too; weights have their bound."""
    rewards, n = torch.tensor([0.5, 3.0, -2.0], dtype=D), 12_000
    draw = filled(3, rewards=rewards.tolist()).draw("importance", *uniforms(n), gamma=0.5)
    f = draw.states[:, 0, 0, 0].double() ** 2
    want = np.mean([(k + i / 100) ** 2 for k, i in itertools.product(range(3), range(4))])
    weighted = draw.weight * f
    assert float(weighted.mean()) == pytest.approx(want, abs=4 * float(weighted.std()) / math.sqrt(n))
    assert abs(float(f.mean()) - want) > 0.2  # what it would be without the weights
    assert float(draw.weight.max()) == pytest.approx(1 / UNIFORM_FRACTION)
    p = float(0.9 * trajectory_probabilities(rewards)[1] * step_probabilities(4, 0.5)[3] + 0.1 / 12)
    last = torch.tensor([prompt == "prompt 1" for prompt in draw.prompts]) & (draw.step == 3)
    assert float(draw.weight[last][0]) == pytest.approx(1 / (12 * p))
    assert float(last.double().mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_inverse_cdf_never_returns_the_impossible():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=D)
    got = [int(inverse_cdf(p, torch.tensor([u], dtype=D))) for u in (0.0, 0.49999, 0.5, 0.999, 1 - 2**-53)]
    assert got == [1, 1, 3, 3, 3]


def test_draws_without_replacement_are_uniform():
    """Every ordered choice of 3 of 5 takes the same share of the unit cube."""
    cells = (torch.arange(60, dtype=D) + 0.5) / 60
    counts = {}
    for u in itertools.product(cells.tolist(), repeat=2):
        chosen = tuple(without_replacement(torch.tensor([*u, 0.5], dtype=D), 5).tolist())
        assert len(set(chosen)) == 3
        counts[chosen[:2]] = counts.get(chosen[:2], 0) + 1
    assert len(counts) == 20 and set(counts.values()) == {180}
    assert sorted(without_replacement(uniforms(7)[0], 7).tolist()) == list(range(7))


@pytest.mark.parametrize("memory", [1 << 30, 0, 3000], ids=["memory", "disk", "both"])
def test_first_in_first_out(memory):
    for count in (1, 4, 5, 6, 23):
        buffer = filled(count, 5, memory=memory)
        assert list(buffer.ids) == list(range(max(0, count - 5), count)) and buffer.held_bytes <= memory
        draw = buffer.draw("uniform", *uniforms(min(count, 5)))
        assert sorted(draw.prompts) == sorted(f"prompt {n}" for n in buffer.ids)  # all of them: without replacement
        for k, prompt in enumerate(draw.prompts):
            n = int(prompt.split()[1])
            torch.testing.assert_close(draw.states[k], torch.full((2, 2, 2), n + int(draw.step[k]) / 100))
            assert int(draw.age[k]) == count - 1 - n
        assert not set(buffer._held) & set(buffer._mapped) and len(buffer._held) + len(buffer._mapped) == len(buffer)
        if buffer._scratch:  # shards whose trajectories are forgotten are deleted
            assert sum(1 for _ in Path(buffer._scratch.name).iterdir()) == len(buffer._shards) <= 5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_what_is_spilled_lies_in_mapped_files():
    """Nothing of it is held, also when the state is taken: every spilled tensor points into its shard."""
    buffer = filled(12, 9, memory=500)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if buffer._scratch.name in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    state = dict(zip(buffer.ids, buffer.state_dict()["trajectories"], strict=True))
    assert len(buffer._mapped) >= 5 and len(buffer._held) + len(buffer._mapped) == 9
    for k in buffer._mapped:
        assert any(low <= state[k].data_ptr() < high for low, high in ranges)


def test_inclusion_probability():
    buffer, hits = filled(6, 6, length=1), [0] * 6
    for seed in range(600):
        for prompt in buffer.draw("uniform", *uniforms(2, seed)).prompts:
            hits[int(prompt[-1])] += 1
    assert all(abs(h / 600 - 1 / 3) < 4 * math.sqrt(2 / 9 / 600) for h in hits)


def test_too_few_trajectories_are_an_error():
    with pytest.raises(ValueError, match=r"holds 3 trajectories, fewer than the 4.*buffer_size"):
        filled(3).draw("uniform", *uniforms(4))
    with pytest.raises(ValueError, match="holds 0"):
        ReplayBuffer(4).draw("prioritised", *uniforms(1))
    assert len(filled(3).draw("prioritised", *uniforms(4)).prompts) == 4
    with pytest.raises(ValueError, match="expected uniform"):
        filled(3).draw("reward", *uniforms(2))
    with pytest.raises(ValueError, match="capacity 0"):
        ReplayBuffer(0)
    with pytest.raises(ValueError, match="holds trajectories"):
        filled(3).insert(torch.zeros(1, 5, 2, 2, 2), ["x"], [1.0])


def test_what_is_not_finite_is_left_out():
    buffer = ReplayBuffer(9)
    x = torch.zeros(4, 2, 1, 1, 1)
    x[1, 1] = float("nan")
    assert buffer.insert(x, list("abcd"), [1.0, 1.0, float("nan"), float("inf")]) == 1
    assert list(buffer.prompts) == ["a"] and list(buffer.ids) == [0]


@pytest.mark.parametrize("memory", [1 << 30, 3000], ids=["memory", "spilled"])
def test_state_travels_through_a_checkpoint(tmp_path, memory):
    buffer, tensors = filled(9, 6, memory=memory), {}
    tree = checkpoint.flatten_state(buffer.state_dict(), "algorithm", tensors)
    checkpoint.save(tmp_path, 1, tensors, {"algorithm": tree})
    saved = checkpoint.load(tmp_path / "step-000001")
    back = ReplayBuffer(6, memory=memory)
    back.load_state_dict(checkpoint.unflatten_state(saved.state["algorithm"], saved.tensors))
    assert list(back.ids) == list(buffer.ids) and back.held_bytes <= memory
    for law in ("uniform", "prioritised", "importance"):
        for one, other in zip(buffer.draw(law, *uniforms(5)), back.draw(law, *uniforms(5)), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    with pytest.raises(ValueError, match="buffer_size is 3"):
        ReplayBuffer(3).load_state_dict(buffer.state_dict())


def test_what_is_kept_is_a_copy():
    x = torch.zeros(1, 2, 1, 1, 1)
    buffer = ReplayBuffer(2)
    buffer.insert(x, ["a"], [1.0])
    x += 1
    assert float(buffer.draw("uniform", *uniforms(1)).states.sum()) == 0
