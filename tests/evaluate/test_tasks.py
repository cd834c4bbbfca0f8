"""Tasks asked of a model and its base: shares, their change, and a mean in which tasks count alike."""

from __future__ import annotations

import pytest
import torch

from palate import recipe
from palate.evaluate import tasks as module
from palate.evaluate.tasks import evaluate_tasks, tasks_json

PROMPTS = {"counting": ["two cats", "three cats"], "colours": ["a red car"]}


@pytest.fixture
def drawn(monkeypatch):
    """Pictures that are as bright as they are right: the base never, the result on its even seeds, red cars always."""

    def generate(model, prompts, seeds, *, weights="policy", **how):
        asked.append((weights, how["steps"], how["guidance"], how["sampler"]))
        rows = [(prompt, seed) for prompt in prompts for seed in seeds]
        value = [float(weights == "policy" and ("car" in prompt or seed % 2 == 0)) for prompt, seed in rows]
        return torch.tensor(value)[:, None, None, None].expand(-1, 3, 4, 4)

    asked = []
    monkeypatch.setattr(module, "generate", generate)
    reward = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    reward.asked = asked
    return reward


def test_scores_are_shares_of_right_images(drawn):
    found = evaluate_tasks(None, seeds=range(4), prompts=PROMPTS, reward=drawn)
    assert found["counting"][:3] == (0.0, 0.5, 0.5) and found["colours"][:3] == (0.0, 1.0, 1.0)
    assert found["counting"].change_low <= 0.5 <= found["counting"].change_high


def test_tasks_count_alike_whatever_their_number_of_prompts(drawn):
    found = evaluate_tasks(None, seeds=range(4), prompts=PROMPTS, reward=drawn)
    assert found["mean"].value == pytest.approx(0.75) and found["mean"].change == pytest.approx(0.75)
    assert tasks_json(found)["mean"]["base"] == 0.0


def test_a_vocabulary_of_single_drawings_has_no_tasks(tmp_path, monkeypatch):
    """A sentence says so before anything is loaded or drawn."""
    from palate.cli import evaluate_tasks as command
    from palate.models.vocabulary import vocabulary
    from palate.rewards.tasks import task_prompts
    from palate.runtime.errors import InputError

    single = vocabulary()._replace(counts=(), relations=(), paints=(), turnable=())
    monkeypatch.setattr(command, "task_prompts", lambda: task_prompts(vocab=single))
    with pytest.raises(InputError, match="no words for counts, places and colours"):
        command.evaluate_with_tasks([tmp_path], 2, load=lambda run: pytest.fail("loaded"), as_json=False, quiet=True)
    assert not (tmp_path / "tasks.json").exists()


def test_the_command_writes_each_runs_scores(tmp_path, drawn, capsys):
    import json

    from palate.cli import evaluate_tasks as command

    (tmp_path / "recipe.yaml").write_text(recipe.text_of("nft-emoji-tasks").replace("guidance: 1.0", "guidance: 2.0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "task_prompts", lambda: PROMPTS)
        patch.setattr(command, "TaskReward", lambda strict: drawn)
        command.evaluate_with_tasks([tmp_path], 2, load=lambda run: (None, None), as_json=False, quiet=True)
    assert json.loads((tmp_path / "tasks.json").read_text())["colours"]["value"] == 1.0
    assert "counting" in capsys.readouterr().out
    assert set(drawn.asked) == {(weights, None, 2.0, None) for weights in ("reference", "policy")}


def test_a_generator_is_compared_with_what_it_was_drawn_likewise(tmp_path):
    """`direct` begins with a generator, whose weights in many steps draw nothing; DI* stands beside its teacher."""
    from palate.runs import RunFolder
    from palate.runs.evaluation import sides

    for name, alike in (("taste-emoji", True), ("distar-emoji", False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe.text_of(name))
        base, result = sides(RunFolder(folder), "one step")
        assert result.sampler == "one step" and base.sampler == ("one step" if alike else None)
        assert (base.weights, result.weights) == ("reference", "policy")
