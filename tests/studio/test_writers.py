"""Two who change one thing at the same moment: two windows, two studios, a command, the run that takes the words up."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

from palate import recipe
from palate.models.vocabulary import vocabulary
from palate.runtime.distributed import Ranks
from palate.runtime.errors import InputError
from palate.runtime.runlog import RunLog, read_metrics
from palate.studio import steering
from palate.studio.process import Processes
from palate.studio.runview import RunView
from palate.studio.workspace import Workspace
from palate.taste.votes import Picture, Vote
from palate.train.state import Replicas
from palate.train.steering import Steering

MANY = 40


def at_once(*acts):
    """Do all of them at the same time, in threads; what one of them raises is raised here."""
    errors, start = [], threading.Barrier(len(acts))

    def act_of(act):
        start.wait()
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=act_of, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


STUDIO = """
import sys
from palate.studio.workspace import Workspace
workspace, name, many = Workspace(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("here", flush=True)
sys.stdin.readline()
for k in range(many):
    workspace.begin_round(f"{name}-{k}")
    workspace.store.undo()
"""


def test_two_studios_on_one_folder_lose_no_round_and_no_undo(tmp_path):
    store = Workspace(tmp_path).store
    for k in range(2 * MANY):
        store.append(Vote("fox", Picture("0" * 64 + ".png"), Picture("1" * 64 + ".png"), "left", id=str(k)))
    command = [sys.executable, "-c", STUDIO, str(tmp_path)]
    with (
        subprocess.Popen([*command, "a", str(MANY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one,
        subprocess.Popen([*command, "b", str(MANY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as two,
    ):
        for process in (one, two):
            assert process.stdout.readline() == "here\n"
        for process in (one, two):
            process.stdin.write("go\n")
            process.stdin.flush()
    assert one.returncode == two.returncode == 0
    assert sorted(Workspace(tmp_path).rounds()) == sorted(f"{name}-{k}" for name in "ab" for k in range(MANY))
    assert store.read() == []  # each undo took back another vote


def test_two_windows_and_a_run_that_takes_their_words_lose_none(tmp_path):
    plan = recipe.read("srpo-flux", ["algorithm.positive=['a']", "algorithm.negative=['b']"])
    view = RunView(tmp_path.name, tmp_path, "running", "", plan, [], [])
    (tmp_path / "metrics.jsonl").touch()
    done = threading.Event()

    def window(side):
        for k in range(MANY):
            steering.change(view, side, f"{side}{k}", add=True)
            if k % 4 == 0:
                steering.change(view, side, f"{side}{k}", add=False)

    def run():
        replicas = Replicas(recipe.build_algorithm(plan), 1, Ranks())
        taken = Steering(tmp_path, replicas, Ranks(), unknown_words=lambda: "", note=lambda text: None)
        with RunLog(tmp_path) as log:
            step = 0
            while not done.is_set() or (tmp_path / "control.json").exists():
                step += 1
                if words := taken.take(step, log):
                    taken.confirm(step, words, log)

    trainer = threading.Thread(target=run)
    trainer.start()
    try:
        at_once(lambda: window("positive"), lambda: window("negative"))
    finally:
        done.set()
        trainer.join()
    last = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["event"] == "steer"][-1]
    for side, first in (("positive", "a"), ("negative", "b")):
        assert last[side] == [first, *(f"{side}{k}" for k in range(MANY) if k % 4)]


def test_two_windows_lose_no_word_of_a_draft(tmp_path, monkeypatch):
    monkeypatch.setattr(steering, "checked_word", lambda word, words, embedded: word)
    draft = steering.Draft(Workspace(tmp_path))
    at_once(*(lambda s=side: [draft.change(s, f"{s}{k}", add=True) for k in range(MANY)] for side in steering.SIDES))
    for side in steering.SIDES:
        assert list(draft.words().of(side)) == [f"{side}{k}" for k in range(MANY)]


def test_settings_that_a_window_left_alone_stay_as_another_window_set_them(studio):
    """Two windows show the form; one sets the prompts, then the other the mode."""
    client, found = studio
    own, htmx = vocabulary().concepts[0], {"hx-request": "true"}
    before = found.workspace.settings()
    seen = json.dumps(before)
    client.post("/choose/settings", data={"mode": "fresh", "prompts": own, "seen": seen}, headers=htmx)
    client.post("/choose/settings", data={"mode": "champion", "prompts": "", "seen": seen}, headers=htmx)
    assert found.workspace.settings() == before | {"mode": "champion", "prompts": [own]}
    now = json.dumps(found.workspace.settings())
    client.post("/choose/settings", data={"mode": "fresh", "prompts": "", "seen": now}, headers=htmx)
    assert found.workspace.settings() == before
    assert json.dumps(before) in client.get("/choose").text.replace("&#34;", '"')


def test_two_starts_under_one_name_are_one_run(tmp_path, monkeypatch):
    processes, begun = Processes(Workspace(tmp_path)), []
    monkeypatch.setattr(processes, "_start", lambda name, arguments: begun.append(arguments))

    def start(seed):
        try:
            processes.train("direct-emoji", "run-1", [f"trainer.seed={seed}"])
        except InputError as error:
            refused.append(str(error))

    refused: list[str] = []
    at_once(*(lambda seed=seed: start(seed) for seed in (1, 2)))
    assert len(begun) == len(refused) == 1 and "run-1 was begun in another window" in refused[0]
    seed = int(begun[0][2].removeprefix("trainer.seed="))
    assert recipe.read(str(Path(tmp_path) / "run-1" / "recipe.yaml")).trainer.seed == seed
