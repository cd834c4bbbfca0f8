"""Rounds: whose pictures are chosen among, what the guard says over several of them, and runs of other machines."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from palate import recipe
from palate.data import evenly_spaced
from palate.models.vocabulary import vocabulary
from palate.runtime import runlock
from palate.runtime.errors import InputError
from palate.studio import app as studio_app
from palate.studio import routes_runs
from palate.studio.app import make_app, opened_in_browser, serve
from palate.studio.artist import Drawn
from palate.studio.curves import curves_of
from palate.studio.process import Processes
from palate.studio.routes_compare import _wall
from palate.studio.routes_train import _steered, _unasked
from palate.studio.runview import RunView, Words
from palate.studio.shared import readable
from palate.taste.votes import Picture, Vote
from palate.taste.words import WordChoice

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def studio(tmp_path):
    """(a client that is let in, the studio), no model loaded."""
    access = make_app(tmp_path, token=TOKEN)
    client = TestClient(access, base_url="http://localhost", headers={"hx-request": "true"})
    client.get(f"/?token={TOKEN}")
    return client, access.app.state.studio


def picture(shade):
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def a_run(found, name, kind, start="", *overrides):
    folder = found.workspace.runs / name
    folder.mkdir()
    began = [f"model.start='{found.workspace.runs / start / 'adapter'}'"] if start else []
    (folder / "recipe.yaml").write_text(recipe.dump(recipe.read(kind, [*began, *overrides])))
    return found.view(name)


def test_what_words_cost_is_not_held_against_a_taste_that_goes_on_from_there(studio):
    _, found = studio
    assert a_run(found, "align-1", "taste-emoji").began_with == ""
    assert a_run(found, "align-2", "taste-emoji", "align-1").began_with == "align-1"
    runs = found.workspace.runs
    by_hand = {name: f"model.start='{start}'" for name, start in (("b", runs / "align-1"), ("c", "/elsewhere/align-1"))}
    assert a_run(found, "b", "taste-emoji", "", by_hand["b"]).began_with == "align-1"  # the run itself, not its adapter
    assert a_run(found, "c", "taste-emoji", "", by_hand["c"]).began_with == "/elsewhere/align-1"  # no run of these
    assert a_run(found, "d", "taste-emoji", "", "model.start=emoji-1step").began_with == ""  # in the package
    a_run(found, "steer-1", "direct-emoji", "align-2")
    a_run(found, "align-3", "taste-emoji", "steer-1")
    a_run(found, "align-4", "taste-emoji", "deleted-since")
    steered = {name: _steered(found, name) for name in ("align-1", "align-2", "steer-1", "align-3", "align-4")}
    assert steered == {"align-1": False, "align-2": False, "steer-1": True, "align-3": True, "align-4": False}


def test_the_guard_says_that_it_counts_over_all_rounds_and_when_nothing_is_left_to_give(studio):
    _, found = studio
    first, second = a_run(found, "a", "taste-emoji"), a_run(found, "b", "taste-emoji", "a")
    base = {"step": 0, "event": "guard", "verdict": "base", "concept": 0.99, "diversity": 0.4}
    row = {"step": 10, "event": "guard", "verdict": "concept fell from 0.99 to 0.94, more than 0.04", "action": "stop",
           "concept": 0.94, "diversity": 0.04, "variety": 0.5}  # fmt: skip

    def said(view, best):
        return RunView(
            view.name, view.folder, "finished", "", view.recipe, [base, row | {"best_step": best}], []
        ).guard_sentence()

    assert said(first, 0).startswith(
        "The guard at step 10: too much was lost of pictures that show the right thing (94 of 100 now, 99 before). "
    )
    assert "and changed nothing." in said(first, 0)
    assert said(second, 0).startswith("The guard at step 10 over all rounds: too much")
    assert said(second, 0).endswith("More rounds of this taste would cost more than they give.")
    assert said(second, 20).endswith("The run ended there; its result is step 20.")
    row["verdict"] = "concept fell from 1 to 0.9, more than 0.03; diversity fell from 1 to 0.1, below 0.85 of it"
    assert "thing (94 of 100 now, 99 before) and of variety (10 % is left)." in said(first, 20)
    row["verdict"] = "variety is 0.5 of the base's, below 0.6; heldout fell from 0.9 to 0.7, more than 0.1"
    assert "of variety (50 % is left) and of the fit to the prompt, as a second judge sees it." in said(first, 20)
    row["verdict"] = "drift is 1.2 of the base's spread, more than 1"
    assert "step 10: the pictures changed more than they may." in said(first, 20)


def test_the_pictures_to_choose_among_are_those_of_any_round_or_of_the_model_as_it_came(studio):
    client, found = studio
    a_run(found, "align-1", "taste-emoji")
    found.workspace.write("rounds.json", {"runs": ["align-1", "gone"]})
    page = client.get("/choose").text
    assert '<option value="align-1" >' in page and "gone" not in page
    assert client.post("/choose/settings", data={"source": "align-1"}).status_code == 204
    assert found.workspace.settings()["source"] == "align-1"
    assert '<option value="align-1" selected>' in client.get("/choose").text
    client.post("/choose/settings", data={"mode": "champion"})  # a form without the choice leaves it
    assert found.workspace.settings() == {"mode": "champion", "prompts": [], "source": "align-1"}
    answer = client.post("/choose/settings", data={"source": "gone"})
    assert answer.status_code == 422 and "no round named" in answer.text
    client.post("/choose/settings", data={"source": "-"})
    assert found.workspace.settings()["source"] == ""


def test_a_run_that_went_on_is_drawn_from_anew_once_it_has_ended(studio, monkeypatch):
    """Pictures of its earlier step are asked about no longer; while it trains, the model stays as it was."""
    _, found = studio
    view, artist, loaded = a_run(found, "align-1", "taste-emoji"), found.artist, []
    found.workspace.set(source="align-1")
    monkeypatch.setattr("palate.studio.artist.trained_model", lambda run, warn: loaded.append(run) or (None, "sampler"))

    def after(step):
        (view.folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        artist._follow_source()
        file = found.workspace.store.keep(picture(step))
        artist.pool.append(Drawn("fox", Picture(file, run="align-1", step=artist._step), None))
        return [drawn.picture.step for drawn in artist.rows()]

    assert after(30) == [30] and len(loaded) == 1
    with runlock.owned(view.folder):
        assert after(35) == [30, 30] and len(loaded) == 1
    assert after(60) == [60] and len(loaded) == 2
    shutil.rmtree(view.folder)
    with pytest.raises(InputError, match="align-1, which drew these pictures, is gone; choose others under Settings"):
        artist._follow_source()


def test_runs_of_any_way_are_compared_each_on_its_own_model(studio, monkeypatch):
    """Also those that train on pictures, which name no prompts; LoRAs of two models are not mixed."""
    _, found = studio
    monkeypatch.setattr("palate.studio.comparing.EmojiModel.load", lambda folder, training: folder or "base")
    monkeypatch.setattr(found.comparing, "_lora", lambda run: run)
    drawn, strengths = [], []

    def draw(showing, prompts, parts):
        drawn.append((showing.model, [run for _, run in parts]))
        strengths[:] = [strength for strength, _ in parts]
        return torch.zeros(len(prompts), 3, 8, 8)

    monkeypatch.setattr(found.comparing, "_draw", draw)
    for name in ("taste-emoji", "taste-emoji-srpo", "taste-emoji-dpo"):
        a_run(found, name, name)
        (found.workspace.runs / name / "checkpoints" / "step-000030").mkdir(parents=True)
        assert len(found.comparing.showing(name).prompts) >= 24
    study = found.comparing.study("taste-emoji", "taste-emoji-dpo")
    pairs = found.workspace.read(f"compare/{study}/study.json")["pairs"]
    assert {pair["left"] for pair in pairs} == {"a", "b"}  # neither side is always the run's
    listed = evenly_spaced(found.comparing.showing("taste-emoji").prompts, len(pairs))
    assert [pair["prompt"] for pair in pairs] != listed and {pair["prompt"] for pair in pairs} == set(listed)
    assert drawn == [("emoji-1step", ["taste-emoji"]), ("base", ["taste-emoji-dpo"])]
    for number in range(5):
        found.comparing.answer(study, number, "tie")
    rate = found.comparing.win_rate(study)
    assert (rate["rate"], rate["run"], rate["other"]) == (0.5, "taste-emoji", "taste-emoji-dpo")
    with pytest.raises(InputError, match="train different models, so they do not mix"):
        found.comparing.grid("taste-emoji", 1.0, "taste-emoji-dpo", 0.5)
    found.comparing.grid("taste-emoji-srpo", 1.0, "taste-emoji-dpo", 0.5)
    assert drawn[-1] == ("base", ["taste-emoji-srpo", "taste-emoji-dpo"])
    found.comparing.grid("taste-emoji-srpo", 0.8, "taste-emoji-dpo", 0.25)  # a quarter of it is the other run's
    assert strengths == pytest.approx([0.6, 0.2])


def test_a_run_that_others_began_with_is_not_deleted(studio):
    """Without it they could not be resumed, undone or drawn from."""
    client, found = studio
    a_run(found, "align-1", "taste-emoji")
    a_run(found, "align-2", "taste-emoji", "align-1")
    answer = client.post("/runs/align-1/delete", data={"sure": "align-1"})
    assert answer.status_code == 422 and "align-2 began with the result of align-1" in answer.text
    client.post("/runs/align-2/delete", data={"sure": "align-2"})
    assert client.post("/runs/align-1/delete", data={"sure": "align-1"}).status_code == 204
    assert not found.workspace.names()


def test_strength_is_offered_of_a_result(studio):
    client, found = studio
    view = a_run(found, "align-1", "taste-emoji")
    assert "align-1 has no result yet" in client.get("/compare?run=align-1").text
    (view.folder / "checkpoints" / "step-000005").mkdir(parents=True)
    assert 'name="strength"' in client.get("/compare?run=align-1").text
    with runlock.owned(view.folder):
        page = client.get("/compare?run=align-1").text
    assert "align-1 is training" in page and 'name="strength"' not in page


def test_a_run_that_cannot_be_read_is_said(studio):
    client, found = studio
    view = a_run(found, "old", "taste-emoji")
    (view.folder / "recipe.yaml").write_text("algorithm: {name: srpoo}\n")
    for path in ("/runs", "/runs/list"):
        page = client.get(path).text
        assert "<strong>old</strong>: " in page and "srpo" in page and "No run yet" not in page


def test_a_round_begins_with_the_background_that_the_taste_likes_unless_the_model_draws_it_already(studio, monkeypatch):
    client, found = studio
    begun = []
    monkeypatch.setattr(found.processes, "train", lambda *given: begun.append(given))
    offered = [WordChoice("3d", "style", 2.0, 9), WordChoice("black", "background", 1.5, 9)]
    taste = {"learnt": True, "verdict": "", "expected": 0.8, "words": {}, "offered": offered}
    monkeypatch.setattr(found.voting, "summary", lambda: {"votes": 30, "start": 20, "good": 40, "taste": taste})
    monkeypatch.setattr(found.voting, "learn_taste", lambda: found.workspace.home)
    monkeypatch.setattr(found.voting, "votes", lambda: [None] * 30)

    def started():
        answer = client.post("/align/start", data={"way": "taste-emoji"})
        assert answer.status_code == 204, answer.text
        kind, _, overrides = begun[-1]
        return kind, [given for given in overrides if given.startswith("algorithm.")]

    assert started() == ("taste-emoji-words", ['algorithm.context=["black"]'])
    assert "will have a black one" in client.get("/align").text
    a_run(found, "align-7", "taste-emoji-words", "", "algorithm.context=[black]")
    a_run(found, "align-8", "taste-emoji", "align-7")
    (found.workspace.runs / "align-8" / "adapter").mkdir()
    found.workspace.set(source="align-8")
    monkeypatch.setattr("palate.studio.routes_train.adapter_now", lambda folder: folder / "adapter")
    assert _unasked(found) == [] and started() == ("taste-emoji", [])
    assert "will have a" not in client.get("/align").text
    assert any(given.startswith("model.start=") and "align-8/adapter" in given for given in begun[-1][2])
    assert "trainer.guard.base=start" not in begun[-1][2]  # tastes are compared with the plain model
    offered[1] = WordChoice("white", "background", 1.5, 9)
    assert started() == ("taste-emoji-words", ['algorithm.context=["white"]'])
    offered[1] = WordChoice("white", "background", 1.5, 9, error=1.1)  # not clearly better than the black
    assert started() == ("taste-emoji", [])
    offered[1] = WordChoice("orange", "background", 1.5, 9)
    assert "will have an orange one" in client.get("/align").text
    del offered[1]
    assert started() == ("taste-emoji", [])
    a_run(found, "steer-9", "direct-emoji")
    (found.workspace.runs / "steer-9" / "adapter").mkdir()
    found.workspace.set(source="steer-9")
    started()
    assert "trainer.guard.base=start" in begun[-1][2]  # what its words cost was asked for


def test_votes_say_the_round_that_they_are_of_and_the_newest_round_comes_last(studio):
    _, found = studio
    for run, rounds in (("a", ["a"]), ("b", ["a", "b"]), ("a", ["b", "a"])):
        found.workspace.begin_round(run)
        assert found.workspace.rounds() == rounds and found.workspace.settings()["source"] == run
    found.voting.add_pictures("fox", [("1", picture(1))], [("2", picture(2))])
    assert [vote.round for vote in found.voting.votes()] == [3]


def test_a_form_that_was_refused_leads_back_to_its_page(studio):
    client, _ = studio
    for path, page in (("/choose/upload", "/choose"), ("/runs/a/export/merged", "/runs"), ("/train", "/")):
        answer = client.post(path, headers={"hx-request": ""})
        assert answer.status_code == 422 and f'<a href="{page}">Go on</a>' in answer.text


def test_after_every_twelfth_choice_a_pair_is_asked_again_that_was_asked_once_and_is_there(studio):
    """Whatever is drawn by lot: own pictures, repeats and pairs that were repeated are not in the urn."""
    _, found = studio
    store, voting = found.workspace.store, found.voting
    voting.add_pictures("fox", [(f"{i}", picture(i)) for i in range(3)], [("9", picture(9))])
    files = [store.keep(picture(20 + i)) for i in range(21)]
    votes = [Vote("fox", Picture(files[k], model="m"), Picture(files[20], model="m"), "left", id=f"v{k}")
             for k in range(20)]  # fmt: skip
    gone = Picture("0" * 64 + ".png", model="m")
    votes[0] = replace(votes[0], left=gone)
    votes[2:2] = [replace(votes[1], id="again", left=votes[1].right, right=votes[1].left, repeat_of="v1")]
    store.extend(votes)
    assert len(voting.votes()) == 24
    asked = {voting._next(voting.votes()[-1]).repeat_of for _ in range(60)}
    assert asked <= {f"v{k}" for k in range(2, 15)} and len(asked) > 5


def test_own_pictures_that_the_model_has_no_words_for_are_no_training_pairs(studio, monkeypatch, tmp_path):
    client, found = studio
    begun, store = [], found.workspace.store
    monkeypatch.setattr(found.processes, "train", lambda *given: begun.append(given))
    taste = {"learnt": True, "verdict": "", "expected": 0.8}
    monkeypatch.setattr(found.voting, "summary", lambda: {"votes": 30, "start": 20, "good": 40, "taste": taste})
    monkeypatch.setattr(found.voting, "learn_taste", lambda: tmp_path)
    for prompt in ("my dog Rex", ""):
        found.voting.add_pictures(prompt, [(f"{k}", picture(k)) for k in range(10, 20)], [("2", picture(2))])
    answer = client.post("/align/start", data={"way": "taste-emoji-dpo"})
    assert answer.status_code == 422 and "no vote about a prompt that the model reads" in answer.text and not begun
    found.voting.add_pictures("fox", [("3", picture(3))], [("4", picture(4))])
    for way in ("taste-emoji-dpo", "taste-emoji-srpo"):
        assert client.post("/align/start", data={"way": way}).status_code == 204
        folder = next((found.workspace.home / "pairs").iterdir())
        assert [row["prompt"] for row in json.loads((folder / "train.json").read_text())] == ["fox"]
        assert len(list((folder / "images").glob("*.png"))) == 2
    assert len(begun) == 2 and len(store.read()) == 21


def test_an_answer_cut_short_swallows_not_the_next_one(studio):
    _, found = studio
    pairs = [{"prompt": "fox", "left": "a", "files": {"a": "x", "b": "y"}}] * 3
    found.workspace.write("compare/a.base.30/study.json", {"run": "a", "other": "", "pairs": pairs})
    path = found.workspace.home / "compare" / "a.base.30" / "choices.jsonl"
    found.comparing.answer("a.base.30", 0, "left")
    path.write_bytes(path.read_bytes() + b'{"pair": 1, "cho')
    found.comparing.answer("a.base.30", 2, "right")
    assert found.comparing.answers("a.base.30") == {0: "left", 2: "right"}


def test_a_win_is_one_of_the_run_s_own_picture_on_whichever_side_it_stands(studio):
    _, found = studio
    pairs = [{"prompt": "fox", "left": side, "files": {"a": "the run's", "b": "another"}} for side in "abbab"]
    for wanted, rate in (("the run's", 1.0), ("another", 0.0)):
        found.workspace.write(f"compare/{rate}/study.json", {"run": "a", "other": "", "pairs": pairs})
        while (pair := found.comparing.next(str(rate))) is not None:
            side = "left" if pair["left"] == wanted else "right"
            found.comparing.answer(str(rate), pair["number"], side)
        assert found.comparing.win_rate(str(rate))["rate"] == rate


@pytest.mark.parametrize(
    ("count", "wanted", "said"),
    [(8, "the run's", "clearly more than half"), (8, "another", "clearly less than half"), (8, "", "half lies between"),
     (5, "the run's", "the pairs are too few to tell")],
)  # fmt: skip
def test_whether_a_study_shows_more_than_chance_is_said_once_after_its_last_pair(studio, count, wanted, said):
    """Said at each answer, it would be said of two models that are alike in one study of five."""
    client, found = studio
    sides = {"a": "the run's", "b": "another"}
    pairs = [{"prompt": "fox", "left": side, "files": sides} for side in "abbabaab"[:count]]
    found.workspace.write("compare/s/study.json", {"run": "a", "other": "", "pairs": pairs})
    for number in range(count):
        pair = found.comparing.next("s")
        choice = "tie" if not wanted else "left" if pair["left"] == wanted else "right"
        page = client.post("/compare/answer", data={"study": "s", "number": number, "choice": choice}).text
        assert (said in page) == (number == count - 1)
        assert ("can be said after the last pair" in page) == (5 <= number + 1 < count)
        assert ("blind comparisons with the model as it came" in page) == (number >= 4)


def test_charts_are_of_the_last_five_batches_and_of_ratios_to_what_was_before(studio):
    _, found = studio
    rows = [{"event": "step", "step": k, "reward": float(k)} for k in range(1, 9)]
    rows += [{"event": "guard", "step": step, "verdict": "ok", "concept": concept, "diversity": diversity}
             for step, concept, diversity in ((0, 0.8, 0.5), (8, 0.4, 1.0))]  # fmt: skip
    trained, stays = curves_of(replace(a_run(found, "mine", "direct-emoji"), rows=rows))
    assert [trained["lines"][0]["points"][k] for k in (0, -1)] == [(1, 1.0), (8, 6.0)]  # the mean of 4 to 8
    assert {line["label"]: line["points"] for line in stays["lines"]} == {
        "right thing shown": [(0, 1.0), (8, 0.5)], "variety": [(0, 1.0), (8, 2.0)]}  # fmt: skip


def test_a_word_that_stays_keeps_the_step_from_which_it_holds(studio):
    _, found = studio
    view = a_run(found, "mine", "direct-emoji", "", "algorithm.positive=['3d']")
    changes = ((4, ["3d", "cartoon"]), (7, ["cartoon"]), (9, ["cartoon", "3d"]))
    rows = [{"event": "steer", "step": step, "positive": words, "negative": None} for step, words in changes]
    held = [replace(view, rows=rows[:count]).words().positive for count in (1, 2, 3)]
    assert held == [{"3d": 0, "cartoon": 4}, {"cartoon": 4}, {"cartoon": 4, "3d": 9}]


def test_what_a_word_did_is_counted_from_the_last_pictures_without_it(studio, monkeypatch):
    _, found = studio
    styles, large = vocabulary().styles, vocabulary().sizes[-1]
    view = a_run(found, "s", "direct-emoji")
    view = RunView("s", view.folder, "running", "", view.recipe, [], [0, 5, 10, 15])
    monkeypatch.setattr(
        found.effects, "_count", lambda view, step, rows: dict.fromkeys([*styles, large], step) | {"": 16}
    )
    found.artist.ready.set()
    words = Words({styles[0]: 0, large: 10}, {styles[1]: 16, styles[2]: -1})
    told = {word: (row["before"], row["now"], row["of"]) for word, row in found.effects.of(view, words).items()}
    assert told == {
        styles[0]: (0, 15, 16),  # since the first update
        large: (5, 15, 16),  # the pictures of step 10 know it already
        styles[1]: (15, None, 16),  # no picture since
        styles[2]: (15, None, 16),  # it waits for the next step
    }


def test_what_a_word_did_is_counted_on_the_pictures_that_both_steps_have(studio, monkeypatch):
    """A resumed run may draw other prompts than before."""
    _, found = studio
    style, view = vocabulary().styles[0], a_run(found, "s", "direct-emoji")
    for step, prompts in ((0, ["a dog", "a cat"]), (5, ["a fox", "a dog", "a cow"])):
        folder = view.folder / f"samples/step-{step:06d}"
        folder.mkdir(parents=True)
        rows = [{"file": f"{k}.png", "prompt": prompt, "seed": 0} for k, prompt in enumerate(prompts)]
        (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            (folder / row["file"]).write_bytes(picture(9))
    monkeypatch.setattr(
        found.effects, "_read", lambda images, prompts: {"": len(prompts), style: prompts.count("a dog")}
    )
    found.artist.ready.set()
    assert found.effects.of(found.view("s"), Words({style: 1})) == {style: {"before": 1, "now": 1, "of": 1}}


def test_a_run_goes_on_where_its_words_are_and_a_many_step_model_draws_no_pairs(studio, monkeypatch):
    client, found = studio
    monkeypatch.setattr(found.processes, "resume", lambda name, overrides: None)
    kinds = {"taste-emoji": "/align", "direct-emoji": "/steer", "srpo-emoji": "/steer", "taste-emoji-srpo": "/align"}
    for kind, page in kinds.items():
        a_run(found, kind, kind)
        assert client.post(f"/runs/{kind}/resume").headers["hx-redirect"] == f"{page}?run={kind}"
    assert 'href="/steer?run=srpo-emoji">Open' in client.get("/runs").text
    answer = client.post("/runs/taste-emoji-srpo/keep")
    assert answer.status_code == 422 and "no run of a one-step generator" in answer.text
    assert not found.workspace.rounds()


def test_a_finished_run_goes_on_for_as_many_steps_more(studio, monkeypatch):
    client, found = studio
    asked = []
    monkeypatch.setattr(found.processes, "resume", lambda name, overrides: asked.append((name, overrides)))
    folder = a_run(found, "mine", "direct-emoji", "", "trainer.steps=8").folder
    (folder / "metrics.jsonl").write_text('{"event": "step", "step": 8}\n')
    for more in (0, 20):
        client.post("/runs/mine/resume", data={"more": more})
    assert asked == [("mine", []), ("mine", ["trainer.steps=28"])]


def test_a_run_of_another_machine_is_stopped_there(studio, monkeypatch):
    client, found = studio
    a_run(found, "far", "taste-emoji")
    monkeypatch.setattr(found.processes, "stop", lambda name: False)
    assert "nothing to stop" in client.post("/runs/far/stop").text
    monkeypatch.setattr(found.processes, "state", lambda folder: ("running", "It is trained by process 7 on node2."))
    answer = client.post("/runs/far/stop")
    assert answer.status_code == 422 and "process 7 on node2. Stop it there" in answer.text


def test_runs_that_are_no_folder_are_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--runs: .*name a folder that can be written to"):
        make_app(tmp_path / "file", token=TOKEN)


def test_a_page_is_opened_where_there_is_a_display(monkeypatch):
    asked = []
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(studio_app.webbrowser, "open", lambda url: asked.append(url) or True)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not opened_in_browser("http://x") and not asked
    monkeypatch.setenv("DISPLAY", ":0")
    assert opened_in_browser("http://x") and asked == ["http://x"]


def test_a_port_in_use_and_no_display_are_said_beside_the_one_line_with_the_link(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studio_app.uvicorn.Server, "run", lambda self, sockets: [s.close() for s in sockets])
    monkeypatch.setattr(studio_app, "opened_in_browser", lambda url: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        serve(tmp_path, port=port)
    out, err = capsys.readouterr()
    assert out.startswith("Palate Studio: http://127.0.0.1:") and out.count("\n") == 1 and f":{port}/" not in out
    assert (
        f"port {port} is in use or not allowed; taking" in err
        and "no browser could be opened here" in err
        and "ssh -L" in err
    )
    serve(tmp_path, port=0, browser=False)
    assert not capsys.readouterr().err


def test_palate_demo_begins_a_run_of_its_own_beside_that_of_make_demo(tmp_path, monkeypatch, capsys):
    """`make demo` leaves a finished srpo-emoji run named demo; called again, palate demo says that its own is there."""
    begun = []
    monkeypatch.setattr(studio_app.uvicorn.Server, "run", lambda self, sockets: [s.close() for s in sockets])
    monkeypatch.setattr(Processes, "_start", lambda self, name, arguments: begun.append((name, arguments[:2])))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "recipe.yaml").write_text(recipe.dump(recipe.read("srpo-emoji")))
    for said in ("", "demo-studio was begun before"):
        serve(tmp_path, port=0, browser=False, first_run="direct-emoji")
        out, err = capsys.readouterr()
        assert "/steer?run=demo-studio&token=" in out and said in err and bool(said) == bool(err)
    assert begun == [("demo-studio", ["train", "direct-emoji"])]
    assert recipe.read(str(tmp_path / "demo" / "recipe.yaml")).algorithm.name == "srpo"


def test_a_fault_of_ours_is_said_on_the_page(studio, monkeypatch):
    client, found = studio
    quiet = TestClient(client.app, base_url="http://localhost", cookies=client.cookies, raise_server_exceptions=False)
    monkeypatch.setattr(found, "seen", lambda: 1 / 0)
    answer = quiet.get("/runs/list", headers={"hx-request": "true"})
    assert answer.status_code == 500 and "fault of palate" in answer.text
    assert answer.headers["HX-Retarget"] == "#notice"


def test_one_run_that_cannot_be_read_hides_no_other(studio, monkeypatch):
    _, found = studio
    a_run(found, "good", "direct-emoji")
    (found.workspace.runs / "bad").mkdir()
    (found.workspace.runs / "bad/recipe.yaml").write_text("run: {folder: x}")
    plain = found.view

    def view(name):
        if name == "bad":
            raise PermissionError(13, "Permission denied", "bad/metrics.jsonl")
        return plain(name)

    monkeypatch.setattr(found, "view", view)
    views, unreadable = found.seen()
    assert [view.name for view in views] == ["good"] and list(unreadable) == ["bad"]


def test_a_run_under_any_name_is_listed_with_what_it_takes_to_open_it(studio):
    """The command line takes spaces, accents and bytes that are no UTF-8; a page that said "No run yet" hid them."""
    client, found = studio
    odd = ["lauf é: 100% {x}", "a" * 65, os.fsdecode(b"caf\xe9")]
    for name in odd:
        (found.workspace.runs / name).mkdir()
        (found.workspace.runs / name / "recipe.yaml").write_text("run: {folder: x}")
    try:
        assert not found.workspace.names() or not set(odd) & set(found.workspace.names())
        page = client.get("/runs").text
        for shown in (*odd[:2], "caf\N{REPLACEMENT CHARACTER}"):
            assert f"<strong>{shown}</strong>: rename the folder to open it" in page
        assert "No run yet" not in page and "none yet" not in client.get("/").text
    finally:
        for name in odd:
            shutil.rmtree(found.workspace.runs / name)


def test_pictures_that_another_window_takes_away_are_no_fault(studio, monkeypatch):
    """Counted words and the taste's chart read previews; going back to a step deletes them, file by file."""
    _, found = studio
    view = a_run(found, "mine", "direct-emoji", "")
    folder = view.folder / "samples/step-000000"
    folder.mkdir(parents=True)
    (folder / "index.jsonl").write_text(json.dumps({"file": "0.png", "prompt": "fox", "seed": 0}) + "\n")
    monkeypatch.setattr(found.effects, "_read", lambda images, prompts: {"": 1})
    for content in (None, b"", b"\x89PNG\r\n\x1a\n cut"):
        if content is not None:
            (folder / "0.png").write_bytes(content)
        assert found.effects._count(found.view("mine"), 0, view.pictures(0)) == {}
        assert found.liking._known(found.view("mine"), 0, lambda images, prompts: images.mean((1, 2, 3))) is None
    Image.new("RGB", (4, 4)).save(folder / "0.png")
    assert found.effects._count(found.view("mine"), 0, view.pictures(0)) == {"": 1}


def test_nobody_takes_a_run_that_is_being_deleted(studio, monkeypatch):
    """What another window's start would meet, looked at from inside the deletion."""
    client, found = studio
    folder, seen = a_run(found, "mine", "direct-emoji").folder, []
    monkeypatch.setattr(routes_runs, "remove_folder", lambda path: seen.append((runlock.status(path).state, path)))
    client.post("/runs/mine/delete", data={"sure": "mine"})
    assert seen == [("running", folder)]


def test_what_is_said_of_the_taste_follows_the_pictures_that_are_chosen_among(studio, monkeypatch):
    """Two rounds whose pools are full have as many pictures."""
    _, found = studio
    said = []
    monkeypatch.setattr(found.voting, "_card", lambda: said.append(1) or {"round": len(said)})
    monkeypatch.setattr("palate.studio.voting.cards.START", 0)
    found.artist.ready.set()
    found.artist.pool = [1, 2]
    for name, expected in (("a", 1), ("a", 1), ("b", 2)):
        drawn = [Drawn("fox", Picture(f"{name}{k}.png"), np.zeros(1)) for k in range(2)]
        monkeypatch.setattr(found.artist, "rows", lambda drawn=drawn: drawn)
        assert found.voting.summary()["taste"] == {"round": expected}


def test_a_run_that_is_deleted_says_nothing_of_a_later_one_of_its_name(studio):
    client, found = studio
    a_run(found, "mine", "direct-emoji")
    found.workspace.logs.mkdir()
    found.processes.log_path("mine").write_text("palate: out of memory\n")
    assert found.view("mine").state == "died"
    assert client.post("/runs/mine/delete", data={"sure": "mine"}).status_code in (204, 303)
    assert a_run(found, "mine", "direct-emoji").state == "stopped"
    assert found.workspace.new_name("mine") == "mine-1"


def test_what_was_counted_of_a_step_is_counted_again_when_it_is_drawn_anew(studio, monkeypatch):
    """A run that went back draws the same steps again, with other words."""
    _, found = studio
    view = a_run(found, "mine", "direct-emoji", "")
    folder = view.folder / "samples/step-000000"
    effects, seen = found.effects, []
    monkeypatch.setattr(effects, "_read", lambda images, prompts: seen.append(float(images.mean())) or {"": 1})
    for time, shade in ((1, 10), (2, 200)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "0000.png").write_bytes(picture(shade))
        (folder / "index.jsonl").write_text('{"file": "0000.png", "prompt": "a dog", "seed": 0}\n')
        os.utime(folder / "index.jsonl", ns=(time, time))
        effects._count(view, 0, view.pictures(0))
        effects._count(view, 0, view.pictures(0))
    assert len(seen) == 2 and seen[0] != seen[1]


def test_a_study_of_an_earlier_run_of_the_name_is_not_shown_as_one_of_this(studio, monkeypatch):
    _, found = studio
    a_run(found, "mine", "direct-emoji")
    step = found.workspace.runs / "mine/checkpoints/step-000003"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("first")

    def make(name, run, other):
        made = found.comparing._made(run, other)
        found.workspace.write(f"compare/{name}/study.json", {"run": run, "other": other, "made": made, "pairs": []})

    monkeypatch.setattr(found.comparing, "_make", make)
    first = found.comparing.study("mine")
    assert found.comparing.existing("mine") == first == found.comparing.study("mine")
    (step / "manifest.json").write_text("second")  # trained anew, as long as before
    assert found.comparing.existing("mine") is None
    assert found.comparing.study("mine") == found.comparing.existing("mine") != first
    with pytest.raises(InputError, match="with itself"):
        found.comparing.study("mine", "mine")


def test_before_and_after_are_of_one_prompt_where_a_resumed_run_drew_others(studio):
    _, found = studio
    folder = a_run(found, "mine", "direct-emoji").folder / "samples"
    for step, prompts in ((0, ("a dog", "a fox")), (9, ("a fox", "a cat", "a dog"))):
        place = folder / f"step-{step:06d}"
        place.mkdir(parents=True)
        rows = [{"file": f"{prompt[2:]}{step}.png", "prompt": prompt, "seed": 0} for prompt in prompts]
        (place / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wall = _wall(found.view("mine"), None)
    assert wall["wall"] == [
        {"prompt": "a dog", "before": "dog0.png", "after": "dog9.png"},
        {"prompt": "a fox", "before": "fox0.png", "after": "fox9.png"},
    ]


def drew(folder, pictures):
    """Previews of a run: {step: [(prompt, shade), ...]}."""
    for step, drawn in pictures.items():
        place = folder / "samples" / f"step-{step:06d}"
        place.mkdir(parents=True)
        for k, (_, shade) in enumerate(drawn):
            (place / f"{k:04d}.png").write_bytes(picture(shade))
        rows = [{"file": f"{k:04d}.png", "prompt": prompt, "seed": 0} for k, (prompt, _) in enumerate(drawn)]
        (place / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_two_runs_are_shown_beside_each_other_prompt_by_prompt(studio):
    """What is held is the other run's newest picture, not the model as it came."""
    client, found = studio
    for name, last in (("one", [("a fox", 90)]), ("two", [("a cat", 7), ("a fox", 200)])):
        drew(a_run(found, name, "direct-emoji").folder, {0: [("a dog", 1), ("a fox", 2)], 5: last})
    page = client.get("/compare?run=one&other=two").text
    assert 'data-before="/sample/two/5/0001.png" data-after="/sample/one/5/0000.png"' in page
    assert 'data-held="two"' in page and "Hold to see two" in page
    assert client.get("/sample/two/5/0001.png").content == picture(200)
    alone = client.get("/compare?run=one").text
    assert 'data-before="/sample/one/0/0001.png"' in alone and "Hold to see before" in alone


def test_a_run_says_what_it_waits_for_while_no_step_ends(studio):
    _, found = studio
    view = a_run(found, "mine", "direct-emoji", "", "trainer.steps=4")

    def at(state, step):
        rows = [{"event": "step", "step": k, "step_seconds": 2.0} for k in range(1, step + 1)]
        made = replace(view, state=state, rows=rows)
        return made.waits_for, made.time_left

    assert "Loading" in at("waiting", 0)[0] and "before the first step" in at("running", 0)[0]
    assert at("running", 2) == ("", "4 seconds left")
    assert at("running", 3)[1] == "2 seconds left" and replace(view, state="running", rows=[
        {"event": "step", "step": 3, "step_seconds": 0.5}]).time_left == "1 second left"  # fmt: skip
    assert at("running", 4) == ("A last look; then it is saved.", "")  # not "0 seconds left" for as long as that takes
    assert at("finished", 4) == ("", "")


def test_runs_are_told_in_words_that_are_no_names_of_methods(studio):
    client, found = studio
    words = ("algorithm.positive=[cartoon, large]", "algorithm.negative=[outline]")
    assert a_run(found, "steer-1", "direct-emoji", "", *words).aim == "Your words: + cartoon, + large, − outline"
    assert a_run(found, "align-1", "taste-emoji").aim == "Your taste"
    drew(found.workspace.runs / "align-1", {0: [("a dog on a orange background", 9)]})
    page = client.get("/runs").text
    assert "direct" not in page and 'alt="a dog on an orange background"' in page
    assert readable("a owl, a unicorn and a hourglass") == "an owl, a unicorn and an hourglass"


def test_the_page_align_shows_the_run_that_is_watched_first_and_runs_of_words_elsewhere(studio, monkeypatch):
    client, found = studio
    a_run(found, "align-1", "taste-emoji")
    os.utime(a_run(found, "steer-1", "direct-emoji").folder / "recipe.yaml", (2e9, 2e9))  # the newer one
    page = client.get("/align").text
    assert 'data-run="align-1"' in page and page.index('data-testid="align-start"') < page.index('data-run="align-1"')
    watched = client.get("/align?run=align-1").text
    assert watched.index('data-run="align-1"') < watched.index('data-testid="align-start"')
    monkeypatch.setattr(Processes, "state", lambda self, folder: ("running", ""))
    busy = client.get("/align").text
    assert busy.index('data-testid="step"') < busy.index('data-testid="align-start"')


def test_words_that_the_run_refused_are_said_once(studio, monkeypatch):
    client, found = studio
    view = a_run(found, "mine", "direct-emoji")
    row = {"step": 3, "event": "steer_refused", "positive": ["3d"], "negative": None, "reason": "no such word here"}
    (view.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(Processes, "state", lambda self, folder: ("running", ""))
    assert client.get("/steer?run=mine").text.count("no such word here") == 1


def test_a_picture_is_drawn_by_a_model_and_its_own_sampler(studio):
    """Both change while another thread waits for its turn to draw."""
    _, found = studio
    artist, seen = found.artist, []

    class Stand:
        latent_shape = (3, 8, 8)

        def __init__(self, name):
            self.name, self.steps = name, 1

        def encode_prompts(self, prompts):
            return prompts

        def decode(self, latents):
            return latents

        def __call__(self, model, cond, noises, *, weights="policy"):
            seen.append((model.name, self.name))
            return noises[0]

    artist.model, artist.sampler = Stand("old"), Stand("old")
    with artist._using:
        drawing = threading.Thread(target=artist.draw, args=(["fox"], [0]))
        drawing.start()
        drawing.join(0.3)  # it waits
        artist.model, artist.sampler = Stand("new"), Stand("new")
    drawing.join()
    assert seen == [("new", "new")]
