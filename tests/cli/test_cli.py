"""The command as a user meets it: exit codes, a few lines when something is wrong, nothing lost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from PIL import Image
from support.commands import short
from support.pages import fake_run

from palate import cli, recipe
from palate.runtime import checkpoint
from palate.runtime.progress import Progress, printable
from palate.testing import tiny_reward as reward
from palate.train import read_metrics


def test_help_is_quick_because_nothing_heavy_is_imported():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys; sys.argv = ['palate', '--help']\nfrom palate.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'pydantic'} & set(sys.modules)\n"
    code += "sys.exit(str(heavy) if heavy else 0)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0, ended.stderr
    for command in (
        "train",
        "resume",
        "steer",
        "sample",
        "evaluate",
        "compare",
        "report",
        "recipes",
        "checkpoints",
        "replay",
    ):
        assert command in ended.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # 0.2 s measured on a quiet core


def test_what_only_reads_waits_for_no_libraries_of_networks(tmp_path):
    """They take three quarters of the seconds of a command that only reads."""
    run = fake_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(recipe.dump(recipe.read("srpo-emoji", [f"run.folder={run}"])))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys\nfrom palate.cli import main\n"
    code += "for given in (['runs', '.'], ['report', 'run'], ['steer', 'run', '--positive', 'outline'], ['recipes'],\n"
    code += "              ['checkpoints', 'runs/none'], ['train', 'srpo-emoji', 'trainer.steps=-1']):\n"
    code += "    sys.argv = ['palate', *given]\n    try: main()\n    except SystemExit as ended: print(ended.code)\n"
    code += "heavy = {'diffusers', 'transformers', 'peft', 'scipy'} & set(sys.modules)\n"
    code += "sys.exit(str(heavy) if heavy else 0)"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-2:] == ["4", "2"] and "srpo-emoji" in ended.stdout
    assert "trainer.steps" in ended.stderr


def test_train_sample_checkpoints_and_resume(tiny, palate):
    code, out, err = palate("train", "tiny.yaml")
    assert (code, err) == (0, "") and "step 4/4" in out and "finished at step 4: runs/tiny" in out
    run = tiny / "runs" / "tiny"
    assert recipe.read(str(run / "recipe.yaml")).trainer.steps == 4
    assert {p.name for p in (run / "samples").iterdir()} == {"step-000000", "step-000002", "step-000004"}

    code, _, err = palate("train", "tiny.yaml")
    assert code == 2 and short(err) and "palate resume" in err and "--fresh" in err
    assert palate("train", "tiny.yaml", "--fresh")[0] == 0

    code, out, _ = palate(
        "sample", "runs/tiny", "--prompt", "a red fox", "--prompt", "a tree", "--seeds", "0-1,5", "--out", "drawn"
    )
    assert code == 0 and "6 images" in out
    assert Image.open("drawn/grid.png").size == (24, 16)
    index = [json.loads(line) for line in (tiny / "drawn" / "index.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["seed"]) for row in index] == [
        (p, s) for p in ("a red fox", "a tree") for s in (0, 1, 5)
    ]
    palate("sample", "--model", "emoji", "--prompt", "a red fox", "--seeds", "0", "--out", "base")
    assert (tiny / "base" / "0000.png").read_bytes() == (run / "samples" / "step-000000" / "0000.png").read_bytes()
    drawn = (tiny / "drawn" / "0000.png").read_bytes()
    assert (
        drawn
        == (run / "samples" / "step-000004" / "0000.png").read_bytes()
        != (tiny / "base" / "0000.png").read_bytes()
    )

    code, out, _ = palate("checkpoints", "runs/tiny")
    assert code == 0 and out.count(" ok") == 2
    code, out, _ = palate("resume", "runs/tiny", "trainer.steps=6")
    assert code == 0 and "finished at step 6" in out
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 7))


def test_steer(tiny, palate):
    palate("train", "tiny.yaml")
    assert palate("steer", "runs/tiny", "--positive", "3d, glossy")[0] == 0
    assert json.loads((tiny / "runs/tiny/control.json").read_text()) == {"positive": ["3d", "glossy"], "negative": None}
    assert palate("resume", "runs/tiny", "trainer.steps=6")[0] == 0
    steered = [row for row in read_metrics(tiny / "runs/tiny/metrics.jsonl") if row["event"] == "steer"]
    assert [(row["step"], row["positive"], row["negative"]) for row in steered] == [(5, ["3d", "glossy"], None)]
    for arguments in (("runs/none", "--positive", "a"), ("runs/tiny",), ("runs/tiny", "--positive", " , ")):
        code, _, err = palate("steer", *arguments)
        assert code == 2 and short(err)


@pytest.mark.parametrize("arguments", [
    ["train", "no-such-recipe"], ["train", "tiny.yaml", "trainer.stepz=3"],
    ["train", "tiny.yaml", "trainer.steps=x", "--fresh"],
    ["train"], ["trian"], ["train", "tiny.yaml", "--nope"], ["train", "tiny.yaml", "prompts={file: none.txt}"],
    ["train", "tiny.yaml", "prompts={images: .}"], ["train", "tiny.yaml", "prompts.list=[an unknownword]"],
    ["train", "."], ["resume", "nowhere"], ["resume", "."], ["sample"], ["sample", "--model", "emoji"],
    ["sample", "--model", "emoji", "--prompt", " "], ["sample", "--model", "emoji", "--prompt", "a", "--seeds", "x"],
    ["sample", "--model", "emoji", "--prompt", "a", "--seeds", "3-1"], ["sample", "--model", "nope", "--prompt", "a"],
    ["sample", "--model", "emoji", "--prompt", "a", "--seeds", f"0-{10**24}"],
    ["evaluate", "nowhere", "--seeds", str(10**24)], ["train", "tiny.yaml", f"evaluate.seeds={10**24}"],
    ["sample", ".", "--model", "emoji", "--prompt", "a"],
    ["sample", "--model", "emoji", "--prompts-file", "empty.txt"],
    ["sample", "--model", "emoji", "--prompt", "a", "--steps", "0"],
    ["sample", "--model", "emoji", "--prompt", "a", "--steps", "x"], ["evaluate", "nowhere"], ["report", "."],
    ["compare", ".", "."], ["compare", "."], ["recipes", "nope"],
])  # fmt: skip
def test_bad_input_is_exit_2_and_a_few_lines(tiny, palate, arguments):
    (tiny / "empty.txt").write_text("# nothing\n")
    code, _out, err = palate(*arguments)
    assert code == 2 and short(err), err
    assert not (tiny / "runs" / "tiny" / "metrics.jsonl").exists()


def test_a_run_that_cannot_be_written_or_read_is_exit_4(tiny, palate):
    (tiny / "file").write_text("in the way")
    code, _, err = palate("train", "tiny.yaml", "run.folder=file/run")
    assert code == 4 and short(err) and "file/run" in err
    palate("train", "tiny.yaml")
    for part in (tiny / "runs/tiny/checkpoints").rglob("*.safetensors"):
        part.write_bytes(part.read_bytes()[:-3])
    code, out, err = palate("checkpoints", "runs/tiny")
    assert code == 4 and "SHA-256" in out and short(err)
    code, _, err = palate("resume", "runs/tiny", "trainer.steps=9")
    assert code == 4 and short(err) and "all 2 are damaged" in err
    code, _, err = palate("checkpoints", ".")
    assert code == 4 and short(err)


def test_losses_that_are_not_finite_are_exit_3(tiny, palate, monkeypatch):
    calls = []

    def sick(images, prompts):
        calls.append(1)
        return reward(images, prompts) * (float("nan") if len(calls) > 1 else 1.0)

    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda settings: (sick, None))
    code, _, err = palate("train", "tiny.yaml")
    assert code == 3 and short(err) and "3 times in a row" in err
    assert checkpoint.steps(tiny / "runs/tiny/checkpoints") == [2, 3]


def test_resume_refuses_to_change_the_run(tiny, palate):
    palate("train", "tiny.yaml")
    code, _, err = palate("resume", "runs/tiny", "trainer.lr=0.5")
    assert code == 2 and short(err) and "trainer.steps" in err
    assert recipe.read("runs/tiny/recipe.yaml").trainer.lr == 0.01


def test_fresh_removes_runs_only(tiny, palate):
    (tiny / "precious").mkdir()
    (tiny / "precious" / "thesis.txt").write_text("years")
    code, _, err = palate("train", "tiny.yaml", "run.folder=precious", "--fresh")
    assert code == 2 and short(err) and "thesis.txt" in err and (tiny / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize("mistake", ["prompts={file: none.txt}", "evaluate.file=none.txt", "model.start=nowhere"])
def test_fresh_keeps_the_old_run_when_the_new_one_cannot_begin(tiny, palate, mistake):
    old = tiny / "runs" / "tiny"
    old.mkdir(parents=True)
    (old / "metrics.jsonl").write_text("")
    code, _, err = palate("train", "tiny.yaml", mistake, "--fresh")
    assert code == 2 and short(err) and (old / "metrics.jsonl").exists()


def test_fresh_keeps_the_answers_when_a_file_is_missing(tiny, palate):
    old = tiny / "runs" / "asked"
    old.mkdir(parents=True)
    (old / "queries.jsonl").write_text("")
    code, _, err = palate("optimize", "optimize-emoji", "run.folder=runs/asked", "prompts={file: none.txt}", "--fresh")
    assert code == 2 and short(err) and (old / "queries.jsonl").exists()


def test_fresh_keeps_the_key_of_a_blind_study(tiny, palate):
    assert palate("train", "tiny.yaml")[0] == 0
    key = tiny / "runs/tiny/compare-blind-key.json"
    key.write_text("{}")
    code, _, err = palate("train", "tiny.yaml", "--fresh")
    assert code == 2 and short(err) and "compare-blind-key.json" in err and key.exists()


def test_debug_shows_where_an_error_comes_from(tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["palate", "train", "nope", "--debug"])
    with pytest.raises(ValueError, match="no recipe named"):
        cli.main()


def test_recipes_are_listed_and_shown(palate):
    code, out, _ = palate("recipes")
    assert code == 0 and all(name in out for name in recipe.published())
    code, out, _ = palate("recipes", "srpo-emoji")
    assert code == 0 and recipe.parse(out) == recipe.read("srpo-emoji")


@pytest.mark.parametrize(("hostile", "plain"), [
    ("\x1b[31mred\x1b[0m", "red"), ("\x1b]0;title\x07text", "text"), ("\x1b]8;;http://x\x1b\\link", "link"),
    ("a\rb\x08c\x00", "abc"),
    ("\x9b2Jx", "2Jx"), ("\u202eevil", "evil"), ("\x1bcreset", "reset"), ("a dog, größer", "a dog, größer"),
    ("\x1b", ""),
])  # fmt: skip
def test_text_from_outside_cannot_drive_the_terminal(hostile, plain):
    assert printable(hostile) == plain


def test_hostile_names_are_stripped_from_errors(tiny, palate):
    code, _, err = palate("train", "\x1b[2Jnope\x1b]0;owned\x07")
    assert code == 2 and "\x1b" not in err and "\x07" not in err and "nope" in err


def test_plain_progress_tells_step_reward_and_time(capsys):
    with Progress(3) as bar:
        for step in (1, 2, 3):
            bar.show(step, {"reward_denoise": 0.25, "loss": 1.0, "step_seconds": 0.5})
        bar.note("\x1b[31mhello")
    out = capsys.readouterr().out
    assert (
        "step 1/3  33 %, 0 s left  0.50 s per step, reward_denoise 0.25" in out
        and "step 3/3" in out
        and "s left" in out
    )
    assert "hello" in out and "\x1b" not in out
    assert torch.is_grad_enabled()
