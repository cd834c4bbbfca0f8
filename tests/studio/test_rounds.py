"""Rounds: whose pictures are chosen among, what the guard says over several of them, and runs of other machines."""

from __future__ import annotations

import socket

import pytest
from starlette.testclient import TestClient

from palate import recipe
from palate.models.vocabulary import vocabulary
from palate.studio import app as studio_app
from palate.studio.app import make_app, opened_in_browser, serve
from palate.studio.routes_train import _steered
from palate.studio.runview import RunView, Words

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def studio(tmp_path):
    """(a client that is let in, the studio), no model loaded."""
    access = make_app(tmp_path, token=TOKEN)
    client = TestClient(access, base_url="http://localhost", headers={"hx-request": "true"})
    client.get(f"/?token={TOKEN}")
    return client, access.app.state.studio


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
    a_run(found, "steer-1", "direct-emoji", "align-2")
    a_run(found, "align-3", "taste-emoji", "steer-1")
    a_run(found, "align-4", "taste-emoji", "deleted-since")
    steered = {name: _steered(found, name) for name in ("align-1", "align-2", "steer-1", "align-3", "align-4")}
    assert steered == {"align-1": False, "align-2": False, "steer-1": True, "align-3": True, "align-4": False}


def test_the_guard_says_that_it_counts_over_all_rounds_and_when_nothing_is_left_to_give(studio):
    _, found = studio
    first, second = a_run(found, "a", "taste-emoji"), a_run(found, "b", "taste-emoji", "a")
    row = {"step": 10, "event": "guard", "verdict": "concept fell from 0.99 to 0.94, more than 0.04", "action": "stop"}

    def said(view, best):
        return RunView(
            view.name, view.folder, "finished", "", view.recipe, [row | {"best_step": best}], []
        ).guard_sentence()

    assert "over all rounds" not in said(first, 0) and "and changed nothing." in said(first, 0)
    assert "over all rounds (concept fell" in said(second, 0)
    assert said(second, 0).endswith("More rounds of this taste would cost more than they give.")
    assert said(second, 20).endswith("The run ended there; its result is step 20.")


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


def test_what_a_word_did_is_counted_from_the_last_pictures_without_it(studio, monkeypatch):
    _, found = studio
    styles, large = vocabulary().styles, vocabulary().sizes[-1]
    view = a_run(found, "s", "direct-emoji")
    view = RunView("s", view.folder, "running", "", view.recipe, [], [0, 5, 10, 15])
    monkeypatch.setattr(found.effects, "_count", lambda view, step: dict.fromkeys([*styles, large], step) | {"": 16})
    found.artist.ready.set()
    words = Words({styles[0]: 0, large: 10}, {styles[1]: 16, styles[2]: -1})
    told = {word: (row["before"], row["now"], row["of"]) for word, row in found.effects.of(view, words).items()}
    assert told == {
        styles[0]: (0, 15, 16),  # since the first update
        large: (5, 15, 16),  # the pictures of step 10 know it already
        styles[1]: (15, None, 16),  # no picture since
        styles[2]: (15, None, 16),  # it waits for the next step
    }


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


def test_a_run_of_another_machine_is_stopped_there(studio, monkeypatch):
    client, found = studio
    a_run(found, "far", "taste-emoji")
    monkeypatch.setattr(found.processes, "stop", lambda name: False)
    assert "nothing to stop" in client.post("/runs/far/stop").text
    monkeypatch.setattr(found.processes, "state", lambda folder: ("running", "It is trained by process 7 on node2."))
    answer = client.post("/runs/far/stop")
    assert answer.status_code == 422 and "process 7 on node2. Stop it there" in answer.text


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
    assert f"port {port} is in use; taking" in err and "no browser could be opened here" in err and "ssh -L" in err
    serve(tmp_path, port=0, browser=False)
    assert not capsys.readouterr().err
