"""palate init writes recipes that read; palate train --dry-run says all that can be known, and writes nothing."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import typer
from support.tiny_families import saved

from palate import cli, recipe
from palate.cli.init import Answers, template_of, templates, write_recipe
from palate.plan.table import GIB
from palate.recipe.cross_checks import rewards_used
from palate.runtime.errors import InputError
from palate.runtime.trust import remember


def small(read):
    """A plan that fits every card."""
    return SimpleNamespace(bytes=1.0, gpus=1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_by_flags_it_writes_a_commented_recipe_that_passes_the_dry_run(here, capsys):
    cli.app(["init", "--model", "emoji", "--words", "cartoon", "--without", "3d, flat", "--card", "24"],
            standalone_mode=False)  # fmt: skip
    text = (here / "srpo-emoji.yaml").read_text()
    read = recipe.parse(text)
    assert read.algorithm.positive == ("cartoon",) and read.algorithm.negative == ("3d", "flat")
    assert read.run.folder.endswith("runs/srpo-emoji") and "# early to middle noise" in text
    assert text.startswith("# srpo on emoji") and "of 24 GiB" in text
    capsys.readouterr()
    cli.app(["train", "srpo-emoji.yaml", "--dry-run"], standalone_mode=False)
    said = capsys.readouterr().out
    for part in ("GiB on each", "run.folder", "ok       model emoji", "of training, the first:", "\nready: nothing"):
        assert part in said
    assert [path.name for path in here.iterdir()] == ["srpo-emoji.yaml"]  # nothing written
    (here / "runs" / "srpo-emoji").mkdir(parents=True)
    (here / "runs" / "srpo-emoji" / "metrics.jsonl").write_text("")
    assert cli.app(["train", "srpo-emoji.yaml", "--dry-run"], standalone_mode=False) == 2
    assert "holds a run already" in capsys.readouterr().out


@pytest.mark.slow
def test_every_model_and_method_that_is_offered_reads(here):
    known = templates()
    assert {("emoji", "srpo"), ("flux2", "srpo"), ("sdxl", "sqdf"), ("flux", "taste")} <= set(known)
    for number, (model, method) in enumerate(known):
        path = write_recipe(Answers(model, method, "80", prompts="real"), here / f"{number}.yaml", plan=small)
        read = recipe.parse(path.read_text())
        assert read.model.name == model and read.prompts.file is not None
        assert model == "emoji" or "# Licence of the base model: " in path.read_text()


def test_words_go_where_the_method_reads_them_and_a_reward_alone_is_absolute(here):
    words = write_recipe(
        Answers("sdxl", "sqdf", "80", ("film photo",), ("CG",), "pickscore"), here / "a.yaml", plan=small
    )
    relative = recipe.parse(words.read_text()).reward.relative
    assert (relative.positive, relative.negative, relative.k) == ("film photo", "CG", 4.0)
    alone = recipe.parse(
        write_recipe(Answers("sdxl", "srpo", "80", reward="pickscore"), here / "b.yaml", plan=small).read_text()
    )
    assert alone.reward.name == "pickscore" and not alone.reward.source
    assert alone.algorithm.preference == "absolute" and not any(alone.algorithm.positive)
    named = recipe.parse(
        write_recipe(
            Answers("flux2", "srpo", "80", ("photo",), ("CG",), "image-reward"), here / "c.yaml", plan=small
        ).read_text()
    )
    assert named.reward.source["image-reward"].endswith("weights/image-reward/ImageReward.safetensors")
    with pytest.raises(InputError, match="takes one wanted and one unwanted word"):
        write_recipe(Answers("sdxl", "sqdf", "80", ("a", "b")), here / "d.yaml", plan=small)
    with pytest.raises(InputError, match=r"--without: srpo compares wanted with unwanted words; give both"):
        write_recipe(Answers("flux", "srpo", "80", ("a",)), here / "d.yaml", plan=small)
    with pytest.raises(InputError, match=r"--words: the reward aesthetic reads no prompt"):
        write_recipe(Answers("sdxl", "sqdf", "80", ("a",)), here / "d.yaml", plan=small)


ONE_MODEL_EACH = [*{method: (model, method) for model, method in templates()}.values(), ("emoji", "srpo")]


@pytest.mark.parametrize("model, method", ONE_MODEL_EACH, ids=[f"{method} {model}" for model, method in ONE_MODEL_EACH])
def test_a_reward_in_place_of_the_templates_is_written_with_nothing_of_the_old_one(here, model, method):
    for number, reward in enumerate(("image-reward", "taste")):
        read = recipe.parse(
            write_recipe(Answers(model, method, "80", reward=reward), here / f"{number}.yaml", plan=small).read_text()
        )
        assert rewards_used(read.reward) == {reward} and reward in read.reward.source
        assert getattr(read.algorithm, "hinge", None) is None  # in units of the old reward
        words = read.algorithm if hasattr(read.algorithm, "positive") else SimpleNamespace(positive=(), negative=())
        assert not any((*words.positive, *words.negative)) and read.reward.relative is None
    if method != "srpo":  # which compares two words
        one = write_recipe(Answers(model, method, "80", ("3d",)), here / "word.yaml", plan=small).read_text()
        read = recipe.parse(one)
        assert "3d" in (getattr(read.algorithm, "positive", None) or read.reward.relative.positive)


def test_a_template_keeps_its_taste_and_finds_its_reward_where_it_is_fetched_to(here):
    taste = recipe.parse(write_recipe(Answers("sdxl", "taste", "80", reward="taste"), here / "a.yaml",
                                      plan=small).read_text()).reward  # fmt: skip
    assert taste.taste.absolute == 0.1 and set(taste.source) == {"taste", "clip-score"}
    fetched = recipe.parse(write_recipe(Answers("flux", "srpo", "80"), here / "b.yaml", plan=small).read_text())
    assert fetched.reward.source["hpsv2"].endswith("weights/hpsv2/HPS_v2.1_compressed.safetensors")
    server = write_recipe(Answers("emoji", "nft", "80", reward="remote"), here / "c.yaml", plan=small)
    assert recipe.parse(server.read_text()).reward.source["remote"].startswith("http://127.0.0.1")
    with pytest.raises(InputError, match=r"--words: the reward aesthetic reads no prompt"):
        write_recipe(Answers("flux", "srpo", "80", ("a",), ("b",), "aesthetic"), here / "d.yaml", plan=small)


def test_what_has_no_room_is_changed_as_the_plan_advises(here, monkeypatch):
    savings = [("model.quantize=nf4", 8 * GIB), ("model.quantize=int8", 10 * GIB)]
    monkeypatch.setattr("palate.plan.memory_savings", lambda read, made: savings)

    def plan(read):
        return SimpleNamespace(bytes={None: 30.0, "int8": 10.0, "nf4": 8.0}[read.model.quantize] * GIB, gpus=1)

    def quantised(card):
        path = write_recipe(Answers("flux2", "srpo", card), here / f"{card}.yaml", plan=plan)
        return recipe.parse(path.read_text()).model.quantize, path.read_text()

    assert quantised("40")[0] is None
    assert quantised("12")[0] == "int8"  # the gentlest that is enough
    assert quantised("9")[0] == "nf4"
    kind, text = quantised("6")
    assert kind == "nf4" and "MORE than 6 GiB" in text


def test_it_refuses_to_overwrite_and_names_what_it_knows(here, capsys):
    (here / "mine.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"mine.yaml is there already"):
        write_recipe(Answers("emoji"), here / "mine.yaml", plan=small)
    assert (here / "mine.yaml").read_text() == "mine"
    known = templates()
    with pytest.raises(InputError, match=r"--model: got 'dalle'; expected one of chroma|emoji"):
        template_of(Answers("dalle"), known)
    with pytest.raises(InputError, match=r"--model: expected one of"):
        write_recipe(Answers(), here / "x.yaml", plan=small)  # no terminal to ask on
    with pytest.raises(InputError, match=r"--method: no published recipe trains sdxl with 'ddpo'; expected one of"):
        template_of(Answers("sdxl", "ddpo"), known)


def test_a_model_without_srpo_gets_the_name_of_the_method_that_it_has(here):
    path = write_recipe(Answers("sana", card="24"), None, plan=small)
    assert path.name == "draft-sana.yaml" and recipe.parse(path.read_text()).run.folder == "runs/draft-sana"


def test_it_asks_on_a_terminal_for_what_is_missing(here, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    said = iter(["emoji", "srpo", "24", "outline", "3d", "", ""])
    monkeypatch.setattr(typer, "prompt", lambda *args, **options: next(said))
    read = recipe.parse(write_recipe(Answers(), None, plan=small).read_text())
    assert read.algorithm.positive == ("outline",) and not list(said)


def test_a_dry_run_names_what_is_missing_with_its_command(here, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (here / "mine.yaml").write_text(json.dumps({
        "model": {"name": "emoji"}, "algorithm": {"name": "draft", "K": 1, "n": 0, "steps": 2, "guidance": 1.0},
        "reward": {"name": "hpsv2"}, "prompts": {"list": ["a cat"]}, "run": {"folder": "runs/x"},
    }))  # fmt: skip
    assert cli.app(["train", "mine.yaml", "--dry-run"], standalone_mode=False) == 2
    said = capsys.readouterr().out
    assert "palate fetch hpsv2" in said and "not ready" in said and "a cat" in said


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("prompts.list=[a fox, a blarg]", "bad      the embedded model does not know 'blarg'"),
        ("algorithm.positive=[watercolor]", "bad      algorithm.positive: the embedded model does not know"),
        ("run.folder=file/run", "file is a file, where a folder is needed; change run.folder"),
        (f"run.folder=runs/{'x' * 300}", "bad: a name in it is too long for this disk; change run.folder"),
    ],
)  # fmt: skip
def test_a_dry_run_is_not_ready_where_the_training_would_refuse(here, capsys, override, told):
    """Exit code 0 is the promise that the run can start: words and the folder need no weights to be looked at."""
    (here / "file").write_text("")
    (here / "mine.yaml").write_text(json.dumps({
        "model": {"name": "emoji"}, "reward": {"name": "emoji"}, "prompts": {"list": ["a fox"]},
        "algorithm": {"name": "srpo", "positive": ["3d"], "negative": ["flat"]}, "run": {"folder": "runs/x"},
    }))  # fmt: skip
    assert not cli.app(["train", "mine.yaml", "--dry-run"], standalone_mode=False)
    capsys.readouterr()
    assert cli.app(["train", "mine.yaml", override, "--dry-run"], standalone_mode=False) == 2
    said = capsys.readouterr().out
    assert told in said and "not ready" in said


def test_an_unknown_device_is_said_before_anything_is_counted(here, monkeypatch, palate):
    monkeypatch.setattr("palate.plan.plan", lambda *args, **options: pytest.fail("counted first"))
    for command in (["plan", "srpo-emoji"], ["doctor", "srpo-emoji"]):
        code, _, error = palate(*command, "--device", "rtx4090")
        assert code == 2 and "--device: got 'rtx4090'; expected one of rtx-4060" in error


def test_a_model_that_is_none_is_told_from_a_run(here, palate):
    code, _, error = palate("sample", "--model", "nope", "--prompt", "a fox")
    assert code == 2 and "nope: there is no such model, run or folder; give emoji, emoji-1step, a run" in error


def test_prompts_are_given_by_flags(here):
    (here / "own.txt").write_text("a red kite\na small boat\n")
    cli.app(["init", "--model", "emoji", "--prompts", "own.txt", "--card", "24", "--out", "file.yaml"],
            standalone_mode=False)  # fmt: skip
    read = recipe.read("file.yaml")
    assert recipe.prompts_of(read)[0] == ["a red kite", "a small boat"] and read.prompts.list is None
    cli.app(["init", "--model", "emoji", "--prompt", "a kite, red", "--prompt", "a boat", "--card", "24", "--out",
             "list.yaml"], standalone_mode=False)  # fmt: skip
    read = recipe.read("list.yaml")
    assert recipe.prompts_of(read) == (["a kite, red", "a boat"], ["a kite, red", "a boat"])
    assert read.prompts.file is read.prompts.preview is read.evaluate.file is None
    for flags, said in (
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "own.txt", "--prompt", "a boat"], "give a file or single prompts, not both"),
        (["--card", "rtx-9999"], "--card: got 'rtx-9999'; expected one of"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            cli.app(["init", "--model", "emoji", "--out", "no.yaml", *flags], standalone_mode=False)
        assert not (here / "no.yaml").exists()


def dry_run(*overrides):
    return cli.app(["train", "draft-emoji", "--dry-run", "run.folder=runs/x", *overrides], standalone_mode=False)


def test_a_dry_run_says_what_stays_free_on_the_device_in_use(here, capsys, monkeypatch):
    memory = "palate.plan.headroom.host_memory"
    monkeypatch.setattr(memory, lambda: 64.0 * GIB)
    assert not dry_run()
    said = capsys.readouterr().out.partition("\nheadroom\n")[2]
    assert said.startswith("  ok       a step needs 0.") and "of 64 GiB on cpu, 64 GiB are left" in said
    monkeypatch.setattr(memory, lambda: 0.02 * GIB)
    assert dry_run() == 2  # as training would refuse
    said = capsys.readouterr().out.partition("\nheadroom\n")[2]
    assert said.startswith("  bad      a step needs 0.") and "trainer.micro_batches=" in said.splitlines()[0]
    assert not dry_run("run.check_memory=false")
    assert capsys.readouterr().out.partition("\nheadroom\n")[2].startswith("  note     a step needs")


@pytest.mark.parametrize("override, problem", [
    ("model.device=gpu", "model.device got 'gpu'; expected cpu, cuda or cuda:N"),
    ("model.device=cuda:1", "model.device cuda:1: this torch sees no such device"),
    ("trainer.tracker=[trackio]", "trainer.tracker: trackio is not installed"),
    ("model.training_adapter=nowhere", "model.training_adapter: nowhere does not exist"),
    ("model={name: sdxl, folder: ./none, training_adapter: nowhere}", "model.training_adapter: nowhere does not exist"),
])  # fmt: skip
def test_what_the_machine_lacks_is_said_before_anything_loads(here, capsys, monkeypatch, override, problem):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dry_run(override) == 2
    assert f"  bad      {problem}" in capsys.readouterr().out
    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda *given: pytest.fail("loaded first"))
    with pytest.raises(InputError, match=re.escape(problem) if "sdxl" not in override else "none"):
        cli.app(["train", "draft-emoji", "run.folder=runs/x", override], standalone_mode=False)


def test_a_dry_run_goes_on_where_nothing_can_be_counted(here, capsys):
    source = """class Mine:
    trains = ("policy",)

    def step(self, model, reward, batch, rng):
        raise ValueError("not without a network")
"""
    (here / "mine.py").write_text(source)
    remember(here / "mine.py")
    assert not dry_run("algorithm={name: mine.py:Mine}")
    said = capsys.readouterr().out
    assert said.startswith("no plan: not without a network\n")
    assert "note     not known: the memory of a step cannot be counted" in said and "\nready: nothing" in said


def test_a_dry_run_reads_the_models_small_files(here, capsys):
    """A size that the folder's model cannot draw, before anything is loaded."""
    overrides = ["model={name: stable-diffusion, folder: " + str(saved("stable-diffusion")[0]) + "}",
                 "reward={name: brightness}", "evaluate.heldout=null", "prompts={list: [a cat]}"]  # fmt: skip
    for key, value, problem in (
        ("model.image_size", "17", "model.image_size got 17; stable-diffusion needs a multiple of"),
        ("sample.image_size", "[16, 33]", "sample.image_size got 33; stable-diffusion needs a multiple of"),
        ("prompts.sizes", "[16, 18, 33]", "prompts.sizes got 33; stable-diffusion needs a multiple of"),
    ):
        assert dry_run(*overrides, f"{key}={value}") == 2
        assert f"bad      {problem}" in capsys.readouterr().out


def test_a_folder_that_lacks_a_part_is_told_from_one_of_another_family(here, capsys):
    """A second download would not help who has named the wrong folder."""
    cut = here / "cut"
    shutil.copytree(saved("stable-diffusion")[0], cut)
    shutil.rmtree(cut / "unet")
    for folder, why in ((cut, "the download is incomplete"), (saved("flux")[0], "it is a folder of another family")):
        assert dry_run("model={name: stable-diffusion, folder: " + str(folder) + "}", "prompts={list: [a cat]}",
                       "reward={name: brightness}", "evaluate.heldout=null") == 2  # fmt: skip
        assert f"lacks unet; {why}" in capsys.readouterr().out
    (cut / "model_index.json").unlink()
    dry_run("model={name: stable-diffusion, folder: " + str(cut) + "}", "prompts={list: [a cat]}",
            "reward={name: brightness}", "evaluate.heldout=null")  # fmt: skip
    assert "lacks unet; it holds no model_index.json" in capsys.readouterr().out
