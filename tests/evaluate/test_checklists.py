"""Pictures judged by questions: means, skills, kinds and pairs with the base; a run's files; GenEval's own words."""

from __future__ import annotations

import json

import pytest
import torch
from support.judge import SECRET, FakeJudge, serving

from palate import cli, evaluate
from palate.cli import evaluate as evaluate_command
from palate.data.checklists import Checklist, Question
from palate.evaluate.checklists import evaluate_checklists
from palate.models.vocabulary import vocabulary
from palate.path import flow_schedule, from_x0
from palate.rewards.chat import ChatModel
from palate.rewards.checklist import QuestionJudge
from palate.rewards.client import TOKEN, Patience
from palate.rewards.tasks import geneval_prompts
from palate.runs.checklist import evaluate_runs_by_questions
from palate.runtime.errors import RewardServiceError

LISTS = [
    Checklist("a dog", (Question("Is there a dog?", "yes", "object"), Question("Is it red?", "yes", "colour")), "easy"),
    Checklist("two cats", (Question("How many cats?", "two", "count"),), "hard"),
]


@pytest.fixture
def judge():
    """Bright pictures are right with .9, dark ones with .2, whatever is asked."""

    def say(pixels, question):
        right = 0.9 if pixels.mean() > 128 else 0.2
        answer, other = ("two", "five") if "many" in question else ("yes", "no")
        return {answer: right, other: 1 - right}

    with serving(FakeJudge(say)) as found:
        found.asks = lambda: QuestionJudge(
            ChatModel(found.url, SECRET, "m", patience=Patience(timeout=5, retries=0), key="checklist")
        )
        yield found


def pictures(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 4)


def test_means_over_images_and_questions_in_pairs_with_the_base(judge):
    prompts, seeds = ["a dog", "a dog", "two cats", "two cats"], [0, 1, 0, 1]
    found = evaluate_checklists(
        pictures(1.0, 1.0, 0.0, 1.0), prompts, seeds, LISTS, judge.asks(), base=pictures(0.0, 1.0, 0.0, 0.0)
    )
    metrics = found["metrics"]
    assert metrics["arithmetic"]["value"] == pytest.approx((0.9 + 0.9 + 0.2 + 0.9) / 4)
    assert metrics["arithmetic"]["base"] == pytest.approx((0.2 + 0.9 + 0.2 + 0.2) / 4)
    assert metrics["geometric"]["change"] == pytest.approx(0.35)
    assert metrics["skill/count"]["value"] == pytest.approx(0.55) and metrics["skill/object"]["base"] == 0.55
    assert metrics["arithmetic/hard"]["change"] == pytest.approx(0.35) and "geometric/easy" in metrics
    assert found["questions"] == 6 and found["unclear"] == {"result": 0, "base": 0} and found["judge"] == "m"
    assert found["rows"][0] == {"prompt": "a dog", "seed": 0, "arithmetic": 0.9, "geometric": 0.9,
                                "scores": [0.9, 0.9],
                                "base": {"arithmetic": 0.2, "geometric": 0.2, "scores": [0.2, 0.2]}}  # fmt: skip
    assert [row["kind"] for row in found["by_prompt"]] == ["easy", "hard"]


def test_an_unanswered_question_counts_as_wrong_and_is_counted(judge):
    judge.say = lambda pixels, question: "yes" if pixels.mean() > 128 else "banana"
    found = evaluate_checklists(pictures(1.0, 0.0), ["a dog"] * 2, [0, 1], LISTS, judge.asks())
    assert found["unclear"] == {"result": 2} and found["metrics"]["arithmetic"]["value"] == 0.5
    judge.say = lambda pixels, question: "banana"
    with pytest.raises(RewardServiceError, match=r"no answer could be read, of 2; is m a model that sees pictures"):
        evaluate_checklists(pictures(1.0), ["a dog"], [0], LISTS, judge.asks())
    with pytest.raises(ValueError, match="no questions for the prompt 'a fox'"):
        evaluate_checklists(pictures(1.0), ["a fox"], [0], LISTS, judge.asks())


RECIPE = """
run: {folder: x}
model: {name: emoji}
reward: {name: emoji}
algorithm: {name: srpo, positive: [3d]}
prompts: {list: [a dog]}
"""


@pytest.fixture
def runs(tmp_path):
    """Two runs with stored pictures of both prompts and of one without questions."""
    for name, levels in (("one", (1.0, 0.0, 0.4)), ("two", (1.0, 1.0, 0.4))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE)
        for side, own in (("base", (0.0, 0.0, 0.4)), ("result", levels)):
            prompts = ["a dog", "two cats", "a fox"]
            evaluate.write_samples(
                folder / "evaluation" / side, pictures(*own), prompts, [0] * 3, guidance=1.0, steps=1
            )
    return [tmp_path / "one", tmp_path / "two"]


def test_runs_are_judged_in_pairs_and_what_they_share_is_asked_once(judge, runs):
    found = evaluate_runs_by_questions(runs, LISTS, judge.asks(), stored=True)
    assert found["first"] == "one" and found["runs"]["one"]["images"] == 2
    stored = json.loads((runs[1] / "checklist.json").read_text())
    assert stored == json.loads(json.dumps(found["runs"]["two"])) and stored["rows"][1]["file"] == "0001.png"
    assert found["between"]["two"]["arithmetic"]["change"] == pytest.approx(0.35)
    assert len(judge.asked) == 2 + 2 + 1 + 1  # dark dog, bright dog, dark cats, and the other run's bright cats
    again = evaluate_runs_by_questions(runs, LISTS, judge.asks(), stored=True)
    assert again == found and len(judge.asked) == 6
    with pytest.raises(ValueError, match="no stored picture is of a prompt of the file"):
        evaluate_runs_by_questions(runs, [Checklist("a bee", LISTS[0].questions)], judge.asks(), stored=True)


class Shown:
    """Its result shows a dog bright; the base, and every other prompt, stay dark."""

    schedule = staticmethod(flow_schedule)
    latent_shape, image_size, device = (3, 4, 4), 4, torch.device("cpu")
    default_steps, default_guidance = 1, 1.0

    def encode_prompts(self, prompts):
        return list(prompts)

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        bright = torch.tensor([float(weights == "policy" and prompt == "a dog") for prompt in cond])
        return from_x0(xt, bright[:, None, None, None].expand_as(xt), *self.schedule(t))

    def parameters(self, weights="policy"):
        return []


def test_an_evaluation_stays_beside_the_pictures_of_the_questions(judge, runs):
    """So that what was measured before can still be compared, and `stored` finds the pictures that were asked about."""
    for run in runs:
        (run / "evaluation.json").write_text("{}")
    before = [path.read_bytes() for run in runs for path in sorted((run / "evaluation").glob("*/*"))]
    drawn = evaluate_runs_by_questions(runs, LISTS, judge.asks(), seeds=[7], load=lambda run: (Shown(), None))
    assert [path.read_bytes() for run in runs for path in sorted((run / "evaluation").glob("*/*"))] == before
    assert (runs[0] / "evaluation.json").read_text() == "{}"
    assert {row["seed"] for row in drawn["runs"]["one"]["rows"]} == {7}
    again = evaluate_runs_by_questions(runs, LISTS, judge.asks(), stored=True)
    assert again == drawn  # the newest of those with as many prompts


# --- GenEval's metadata in the embedded model's words ---

SCENES = vocabulary()._replace(
    counts=("two", "three", "four"), relations=("above", "below"), paints=("red", "blue"), turnable=("car", "dog")
)


def thing(name, count=1, **more):
    return {"class": name, "count": count, **more}


@pytest.mark.parametrize(
    ("tag", "include", "task", "prompt"),
    [
        ("single_object", [thing("dog")], "single object", "a dog"),
        ("two_object", [thing("dog"), thing("apple")], "two objects", "a dog and an apple"),
        ("counting", [thing("dog", 3)], "counting", "three dogs"),
        ("colors", [thing("car", color="red")], "colours", "a red car"),
        ("position", [thing("car"), thing("dog", position=["left of", 0])], "position", "a dog to the left of a car"),
        ("position", [thing("car"), thing("dog", position=["above", 0])], "position", "a dog above a car"),
        ("color_attr", [thing("car", color="red"), thing("dog", color="blue")], "binding", "a red car and a blue dog"),
    ],
)
def test_geneval_in_the_embedded_models_words(tag, include, task, prompt):
    assert geneval_prompts([{"tag": tag, "include": include, "prompt": "x"}] * 2, SCENES) == {task: [prompt]}


@pytest.mark.parametrize(
    ("tag", "include"),
    [
        ("single_object", [thing("toaster")]),
        ("counting", [thing("dog", 5)]),
        ("colors", [thing("car", color="brown")]),
        ("colors", [thing("apple", color="red")]),
        ("position", [thing("car"), thing("dog", position=["behind", 0])]),
        ("something", [thing("dog")]),
    ],
)
def test_prompts_of_geneval_without_words_are_left_out(tag, include):
    rows = [{"tag": tag, "include": include, "prompt": "x"}]
    with pytest.raises(ValueError, match="has the words for no prompt"):
        geneval_prompts(rows, SCENES)
    more = [*rows, {"tag": "single_object", "include": [thing("dog")], "prompt": "x"}]
    assert geneval_prompts(more, SCENES) == {"single object": ["a dog"]}


# --- the command ---


def test_the_command_asks_prints_and_compares(judge, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(TOKEN, SECRET)
    file = tmp_path / "questions.jsonl"
    file.write_text(
        '{"prompt": "a dog", "kind": "easy", "questions": [["Is there a dog?", "yes", "object"]]}\n'
        '{"prompt": "two cats", "kind": "hard", "questions": [["How many cats?", "two", "count"]]}\n'
    )
    command = ["evaluate", *map(str, runs), "--questions", str(file), "--judge", judge.source, "--stored"]
    cli.app(command, standalone_mode=False)
    shown = capsys.readouterr().out
    assert "one: 2 prompts, 2 pictures, 4 questions" in shown and "two against one" in shown and "skill/count" in shown
    cli.app([*command, "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["between"]["two"]["geometric"]["change"] == pytest.approx(0.35)
    measured = {
        "metrics": {"reward/emoji-heldout": {"value": 0.5, "base": 0.4}},
        "heldout": "emoji-heldout",
        "rows": [{"prompt": "a dog", "seed": 0}],
    }
    for run in runs:
        (run / "evaluation.json").write_text(json.dumps(measured))
    cli.app(["compare", *map(str, runs), "--format", "csv"], standalone_mode=False)
    assert "checklist/arithmetic,two,0.9,,1" in capsys.readouterr().out
    one = json.loads((runs[0] / "checklist.json").read_text())
    assert one["asked"] == told["runs"]["two"]["asked"]
    for other in ({"judge": "another"}, {"asked": "other questions"}):  # another scale
        (runs[0] / "checklist.json").write_text(json.dumps(one | other))
        cli.app(["compare", *map(str, runs), "--format", "csv"], standalone_mode=False)
        assert "checklist" not in capsys.readouterr().out


def test_genevals_metadata_becomes_tasks(runs, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(evaluate_command, "geneval_prompts", lambda rows: geneval_prompts(rows, SCENES))
    monkeypatch.setattr(
        evaluate_command, "evaluate_with_tasks", lambda runs, seeds, *, prompts, **rest: seen.update(prompts)
    )
    file = tmp_path / "evaluation_metadata.jsonl"
    row = {"tag": "counting", "include": [thing("dog", 3)], "prompt": "a photo of three dogs"}
    file.write_text(json.dumps(row) + "\n")
    cli.app(["evaluate", str(runs[0]), "--tasks", "--questions", str(file)], standalone_mode=False)
    assert seen == {"counting": ["three dogs"]}
