"""A command reads the recipe of each run that it takes once, however many of its parts ask for it."""

from __future__ import annotations

import shutil
import sys

import pytest

from palate import cli
from palate.recipe import reader

pytestmark = pytest.mark.slow

opened: list[str] = []


def listen(event: str, args: tuple) -> None:
    """A mode is what `open` has; os.open has none, by which an evaluation locks the file without reading it."""
    if event == "open" and watching and args[1] is not None:
        opened.append(str(args[0]))


sys.addaudithook(listen)
watching: list[bool] = []  # an audit hook cannot be taken away again: it listens while this is not empty

RECIPE = """
run: {folder: runs/a}
model: {name: emoji, lora_rank: 2}
algorithm: {name: srpo, positive: [3d], negative: [outline], rollout_steps: 1}
reward: {name: emoji}
prompts: {list: [a dog]}
trainer: {steps: 1, batch_size: 1, lr: 0.001, preview_every: 1, preview_prompts: 1, guard: {every: 0}, threads: 1}
sample: {steps: 1}
"""
COMMANDS = {
    "train": ["train", "mine.yaml", "run.folder=runs/b"],
    "plan": ["plan", "mine.yaml"],
    "resume": ["resume", "runs/a", "trainer.steps=2"],
    "steer": ["steer", "runs/a", "--positive", "flat"],
    "sample": ["sample", "runs/a", "--prompt", "a dog", "--seeds", "0"],
    "evaluate": ["evaluate", "runs/a", "--count", "1", "--seeds", "1"],
    "report": ["report", "runs/a"],
    "compare": ["compare", "runs/a", "runs/b"],
    "compare --format": ["compare", "runs/a", "runs/b", "--format", "csv", "--group", "lr"],
    "compare --blind": ["compare", "runs/a", "runs/b", "--blind"],
    "export": ["export", "runs/a", "--out", "lora"],
    "export a run that died": ["export", "runs/c", "--out", "lora"],
    "checkpoints": ["checkpoints", "runs/a"],
    "runs": ["runs", "runs"],
    "evaluate both": ["evaluate", "runs/a", "runs/b", "--count", "1", "--seeds", "1"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with mine.yaml and its runs: a and b, evaluated, and c without its adapter."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "mine.yaml").write_text(RECIPE)
        assert run(patch, "train", "mine.yaml") in (0, None)
        shutil.copytree("runs/a", "runs/c")
        shutil.rmtree("runs/c/adapter")
        run(patch, "evaluate", "runs/a", "--count", "1", "--seeds", "1")
        shutil.copytree("runs/a", "runs/b")
    return folder


def run(patch, *arguments: str) -> int:
    patch.setattr(sys, "argv", ["palate", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_command_opens_a_recipe_once(place, tmp_path, monkeypatch, command):
    shutil.copytree(place, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    if "run.folder=runs/b" in command:
        shutil.rmtree("runs/b")
    reader._text_of_file.cache_clear()  # each command is a process of its own
    opened.clear()
    watching.append(True)
    try:
        code = run(monkeypatch, *command)
    finally:
        watching.clear()
    assert code in (0, None)
    files = {word: word if word == "mine.yaml" else f"{word}/recipe.yaml" for word in command[1:]
             if word == "mine.yaml" or word.startswith("runs/")}  # fmt: skip
    if command == COMMANDS["runs"]:
        files = {name: f"{name}/recipe.yaml" for name in ("runs/a", "runs/b", "runs/c")}
    for name, file in files.items():
        times = sum(str(path).endswith(file) for path in opened)
        assert times == (command[0] != "checkpoints" and "--blind" not in command), (name, times)
