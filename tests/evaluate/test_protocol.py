"""The protocols of papers: their prompts, every published reward that is here, what is missing, by category."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support.tiny_families import save_clip, saved

from palate import cli
from palate.data import published as prompt_sets
from palate.data.published import find_prompt_set, read_prompt_set
from palate.rewards import located as module
from palate.rewards.located import located, standings
from palate.rewards.published import PUBLISHED
from palate.runs import protocol


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def run(towers, tmp_path_factory):
    """A tiny Stable Diffusion after one update on pickscore."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    tree = {
        "run": {"folder": str(folder)},
        "model": {"name": "stable-diffusion", "folder": str(saved("stable-diffusion")[0]), "image_size": 32,
                  "dtype": "float32", "device": "cpu", "lora_rank": 2, "text_cache": str(towers.parent / "text")},
        "reward": {"name": "pickscore", "source": {"pickscore": str(towers)}},
        "algorithm": {"name": "draft", "K": 1, "n": 0, "steps": 2, "guidance": 1.0},
        "prompts": {"list": ["a red boat"]},
        "trainer": {"steps": 1, "batch_size": 1, "lr": 0.01, "preview_every": 0, "guard": {"every": 0}},
        "sample": {"steps": 2, "guidance": 2.0},
        "evaluate": {"prompts": 4, "seeds": 2},
    }  # fmt: skip
    recipe = folder.parent / "mine.yaml"
    recipe.write_text(json.dumps(tree))
    cli.app(["train", str(recipe)], standalone_mode=False)
    return folder


@pytest.fixture
def nothing_fetched(tmp_path, monkeypatch):
    """No weights in the hub's cache or in weights/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(prompt_sets, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(prompt_sets, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))


PARTI = "Prompt\tCategory\tChallenge\tNote\na red boat\tVehicles\tBasic\t\ntwo cats\tAnimals\tQuantity\t\n" \
        'the word "start"\tVehicles\tBasic\t\n'  # fmt: skip


@pytest.mark.slow
def test_a_run_is_judged_by_what_is_found_and_told_what_is_missing(run, towers, tmp_path, capsys, nothing_fetched):
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    cli.app(["evaluate", str(run), "--protocol", "parti", "--prompts-file", "PartiPrompts.tsv", "--seeds", "2",
             f"reward.source.clip-score={towers}"], standalone_mode=False)  # fmt: skip
    shown = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    assert found["images"] == 6 and found["optimised"] == ["pickscore"] and found["heldout"] == "clip-score"
    assert {"reward/clip-score", "reward/pickscore", "diversity", "vendi"} <= set(found["metrics"])
    rewards = found["protocol"]["rewards"]
    assert {name: standing["found"] for name, standing in rewards.items()} == {
        name: int(name in ("clip-score", "pickscore")) for name in PUBLISHED
    }
    assert rewards["hpsv3"]["command"] == "palate fetch hpsv3" and "palate fetch image-reward" in shown
    by = found["protocol"]["categories"]
    assert sorted(by) == ["Animals", "Vehicles"] and set(by["Animals"]) == {
        "reward/clip-score", "reward/pickscore", "reward/jpeg_size"
    }  # fmt: skip
    means = [by[kind]["reward/clip-score"]["change"] for kind in ("Vehicles", "Animals")]
    whole = found["metrics"]["reward/clip-score"]["change"]
    assert whole == pytest.approx((2 * means[0] + means[1]) / 3, rel=1e-3, abs=1e-6)
    cli.app(["compare", str(run), "--format", "latex"], standalone_mode=False)
    assert "clip-score &" in capsys.readouterr().out


@pytest.mark.slow
def test_intervals_of_a_category_are_over_prompts_and_not_over_pictures():
    """Five pictures of a prompt that are all alike tell no more than one."""
    prompts = {f"p{k}": "ab"[k % 2] for k in range(16)}

    def found(seeds):
        rows = [{"prompt": prompt, "seed": seed, "reward/x": math.sin(7 * k), "base": {"reward/x": math.cos(5 * k)}}
                for k, prompt in enumerate(prompts) for seed in range(seeds)]  # fmt: skip
        return protocol.by_category({"rows": rows, "metrics": {"reward/x": {}}, "by_prompt": [{}]}, prompts)

    assert found(5) == found(1) and list(found(1)) == ["a", "b"]


def test_without_a_reward_to_judge_it_says_which_to_fetch(run, nothing_fetched):
    with pytest.raises(ValueError, match=r"Fetch one: palate fetch clip-score, palate fetch hpsv2$"):
        protocol.evaluate_protocol([run], "drawbench", {"a red boat": ""})


def test_prompt_sets_are_read_with_their_categories(tmp_path):
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    assert read_prompt_set([tmp_path / "PartiPrompts.tsv"]) == {
        "a red boat": "Vehicles", "two cats": "Animals", 'the word "start"': "Vehicles"
    }  # fmt: skip
    styles = tmp_path / "benchmark"
    styles.mkdir()
    (styles / "anime.json").write_text('["a girl", "a robot"]')
    (styles / "photo.json").write_text('["a robot", "a dog"]')
    wanted = {"a girl": "anime", "a robot": "anime", "a dog": "photo"}
    assert read_prompt_set([styles]) == wanted == read_prompt_set([styles / "anime.json", styles / "photo.json"])
    (tmp_path / "drawbench.json").write_text('["a girl"]')
    assert read_prompt_set([tmp_path / "drawbench.json"]) == {"a girl": ""}


def test_what_was_fetched_is_found(tmp_path, nothing_fetched, monkeypatch):
    assert find_prompt_set("parti") is None and find_prompt_set("drawbench") is None
    file = tmp_path / "cache" / "palate" / "PartiPrompts.tsv"
    file.parent.mkdir(parents=True)
    file.write_text(PARTI)
    assert find_prompt_set("parti") == [file]
    there = {"benchmark/anime.json", "benchmark/photo.json"}
    monkeypatch.setattr(
        prompt_sets, "try_to_load_from_cache", lambda place, name, repo_type: f"/{name}" if name in there else None
    )
    assert find_prompt_set("hpdv2") is None  # two of four
    there |= {"benchmark/concept-art.json", "benchmark/paintings.json"}
    assert find_prompt_set("hpdv2")[0] == Path("/benchmark/anime.json")


def test_weights_are_looked_for_in_every_place(tmp_path, nothing_fetched, monkeypatch):
    assert [standing.found for standing in standings({})] == [False] * 6
    converted = tmp_path / "weights/hpsv2/HPS_v2.1_compressed.safetensors"
    converted.parent.mkdir(parents=True)
    converted.touch()
    (tmp_path / "weights/hpsv3").mkdir()
    (tmp_path / "weights/hpsv3/HPSv3.safetensors").touch()
    (tmp_path / "weights/hpsv3/config.json").touch()
    assert located("hpsv3") is None  # its chat text is not there yet, and it would end the evaluation
    (tmp_path / "weights/hpsv3/prompt.txt").touch()
    told = {standing.name: standing for standing in standings({"aesthetic": str(tmp_path), "pickscore": "/nowhere"})}
    assert told["hpsv2"].source == "weights/hpsv2/HPS_v2.1_compressed.safetensors"
    assert told["hpsv3"].source == "weights/hpsv3" and told["aesthetic"].source == str(tmp_path)
    assert not told["pickscore"].found and told["pickscore"].command == "palate fetch pickscore"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("hpsv2", "~/weights/hpsv2") == str(converted.parent) and located("hpsv2", "~/none") is None
    files = ("model.safetensors", "config.json", "tokenizer_config.json")
    cache = {("yuvalkirstain/PickScore_v1", file) for file in files}
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *key: "/x" if key in cache else None)
    assert located("pickscore") == "" and located("pickscore", "/nowhere") is None and located("clip-score") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "coco"], "--protocol: got 'coco'; expected one of drawbench, hpdv2, parti"),
        (
            ["--protocol", "drawbench"],
            r"DrawBench .* are not here, and are not fetched \(licence: none stated by its authors\); give your copy",
        ),
        (["--protocol", "parti"], r"palate fetch parti gets it \(Apache-2.0\); or give your copy with --prompts-file"),
        (["--protocol", "parti", "--tasks"], "three evaluations; give one of them"),
        (["--protocol", "parti", "--prompts-file", "none.tsv"], "none.tsv does not exist"),
        (["--judge", "http://x#m"], "--judge belongs to --questions"),
        (["--questions", "q.jsonl"], "--questions: name the judge that answers them, --judge http://127.0.0.1"),
        (["--questions", "q.jsonl", "--count", "3"], "--questions has prompts of its own"),
        (["--stored", "--count", "3"], "--stored judges the images that are there"),
        (["--tasks", "--stored"], "--tasks has prompts of its own and draws"),
    ],
)
def test_options_that_cannot_work(options, message, tmp_path, nothing_fetched):
    (tmp_path / "recipe.yaml").write_text("model:\n  name: emoji\n")
    with pytest.raises(ValueError, match=message):
        cli.app(["evaluate", str(tmp_path), *options], standalone_mode=False)
