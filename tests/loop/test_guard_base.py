"""What a guard compares with: where this run began, or the model without a LoRA, over all rounds."""

from __future__ import annotations

import math

import pytest
import torch
from support.loop import rows, run

from palate.core import Sampleable
from palate.recipe import GuardSettings
from palate.runtime.errors import InputError
from palate.testing import PROMPTS, TinyFlow
from palate.train.guard import Guard, as_reference

LIMIT = 0.1


def predicted(model, weights: str = "policy") -> torch.Tensor:
    xt = torch.linspace(-1, 1, 2 * math.prod(model.latent_shape)).view(2, *model.latent_shape)
    with torch.no_grad():
        return model.predict(xt, torch.full((2,), 0.5), model.encode_prompts(PROMPTS[:2]), weights=weights).x0


def kept(model, prompts, ids) -> dict[str, float]:
    """A share that falls with the distance of what is measured from the untrained model."""
    return {"concept": 1 - float((predicted(model) - predicted(TinyFlow())).abs().mean())}


def lost(model) -> float:
    return 1 - kept(model, [], [])["concept"]


def a_round(folder, model, base: str, limit: float):
    guard = GuardSettings(every=1, prompts=4, concept_drop=limit, base=base)
    return run(folder, model=model, check=kept, guard=guard, steps=4, preview_every=0)[1]


def test_the_losses_of_rounds_add_up_in_front_of_the_guard(tmp_path):
    """Two rounds that each lose less than the limit lose more together: only a guard on the reference sees it."""
    free = TinyFlow()
    a_round(tmp_path / "free-1", free, "start", 9.0)
    one = lost(free)
    a_round(tmp_path / "free-2", free, "start", 9.0)
    limit = 1.1 * max(one, lost(free) - one)
    assert lost(free) > 1.2 * limit
    losses = {}
    for base in ("start", "reference"):
        model = TinyFlow()
        first = a_round(tmp_path / f"{base}-1", model, base, limit)
        second = a_round(tmp_path / f"{base}-2", model, base, limit)
        assert first.reason == "finished"
        losses[base] = lost(model)
        begun = [row for row in rows(tmp_path / f"{base}-2") if row.get("event") == "guard" and row["step"] == 0]
        if base == "reference":
            assert second.reason.startswith("guard: concept fell from 1 ")
            assert [row["verdict"] for row in begun] == ["base", "ok"]
            assert begun[1]["concept"] == pytest.approx(1 - one, abs=1e-4)
        else:
            assert second.reason == "finished" and [row["verdict"] for row in begun] == ["base"]
    assert losses["start"] > limit >= losses["reference"]


def test_an_untrained_model_is_measured_once(tmp_path):
    seen = []

    def check(model, prompts, ids):
        seen.append(model)
        return kept(model, prompts, ids)

    guard = GuardSettings(every=1, prompts=4, concept_drop=9.0, base="reference")
    run(tmp_path / "run", model=TinyFlow(), check=check, guard=guard, steps=2, preview_every=0)
    assert len(seen) == 3  # before training, and after each step


def test_the_view_of_a_model_predicts_as_its_reference_and_leaves_the_policy_alone():
    model = TinyFlow()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    view = as_reference(model)
    before = predicted(model)
    assert not torch.equal(before, predicted(model, "reference"))
    assert torch.equal(predicted(view), predicted(model, "reference"))
    assert torch.equal(predicted(model), before)
    assert isinstance(view, Sampleable) is isinstance(model, Sampleable)
    assert all(a is b for a, b in zip(view.parameters(), model.parameters(), strict=True))


def test_the_guard_s_prompts_are_spaced_evenly_over_all(tmp_path):
    seen = []

    def check(model, prompts, ids):
        seen.append(prompts)
        return {"concept": 1.0}

    run(tmp_path, check=check, guard=GuardSettings(every=1, prompts=4), steps=1, preview_every=0)
    assert seen[0] == [PROMPTS[0]] * 2 + [PROMPTS[len(PROMPTS) // 2]] * 2


def test_a_start_outside_the_limits_is_refused_before_a_step():
    guard = Guard(GuardSettings(base="reference", concept_drop=0.04))
    with pytest.raises(InputError, match=r"concept fell from 0.97 to 0.9.*model.start.*trainer.guard.base=start"):
        guard.begin({"concept": 0.97}, {"concept": 0.90})
    assert guard.begin({"concept": 0.97}, {"concept": 0.94})[1]["verdict"] == "ok"
    assert guard.decide(10, {"concept": 0.92}).broken, "the start's .94 is not what counts"


@pytest.mark.parametrize(("after", "measured", "looked"), [(3, [1, 1, 1], [0, 3, 4]), (2, [1, 0.2], [0, 2])])
def test_a_guard_looks_from_the_step_on_that_it_is_given(tmp_path, after, measured, looked):
    """Before it every picture may be broken; the limits hold at the first look."""
    guard, shares = GuardSettings(every=1, after=after, prompts=4, concept_drop=0.1), iter(measured)
    _, outcome = run(tmp_path, check=lambda *_: {"concept": next(shares)}, guard=guard, steps=4, preview_every=0)
    assert [row["step"] for row in rows(tmp_path) if row.get("event") == "guard"] == looked
    assert outcome.reason.startswith("finished" if looked[-1] == 4 else "guard: concept fell from 1 ")
