"""An override's value is what it says: no comment, no YAML document; and the commonest slips find their key."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from palate import recipe
from palate.cli.train import _trained
from palate.recipe import RecipeError
from palate.runtime.errors import InputError

GOOD = "run: {folder: runs/x}\nalgorithm: {name: srpo}\nreward: {name: emoji}\nprompts: {list: [a dog]}\n"

TEXTS = [
    "exp #2", "a: b", "*star", "&anchor", "@x", "`x`", "!tag", "- a", "| x", "> x", "%x", "a, b", "x # y # z", "?",
    "'half", '"half', "it's", "C:/runs/x", "2024-01-01", "12:30", "yes please", "ключ", "a\tb", "no",
    "off", "Yes", "on",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["run.folder", "prompts.file", "model.start"])
def test_a_text_is_taken_as_it_stands(key, text):
    extra = ["prompts.list=null"] if key == "prompts.file" else []
    made = recipe.parse(GOOD, [*extra, f"{key}={text}"])
    section, name = key.split(".")
    assert vars(vars(made)[section])[name] == text


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("trainer.steps=40", ("trainer", "steps"), 40),
        ("trainer.lr=1e-4", ("trainer", "lr"), 1e-4),
        ("trainer.lr=0.5", ("trainer", "lr"), 0.5),
        ("sample.guidance=null", ("sample", "guidance"), None),
        ("sample.guidance=", ("sample", "guidance"), None),
        ("model.gradient_checkpointing=false", ("model", "gradient_checkpointing"), False),
        ("model.gradient_checkpointing=off", ("model", "gradient_checkpointing"), False),
        ("model.gradient_checkpointing=yes", ("model", "gradient_checkpointing"), True),
        ("algorithm.positive=[3d, flat]", ("algorithm", "positive"), ("3d", "flat")),
        ("algorithm.positive=[on, no]", ("algorithm", "positive"), ("on", "no")),
        ("algorithm.positive=3d, glossy photo", ("algorithm", "positive"), ("3d", "glossy photo")),
        ("algorithm.branches=denoise", ("algorithm", "branches"), ("denoise",)),
        ("run.folder='exp #2'", ("run", "folder"), "exp #2"),
        ('run.folder="7"', ("run", "folder"), "7"),
        ("prompts.list=a dog, sitting", ("prompts", "list"), ["a dog, sitting"]),
        ("model.lora_targets=to_q, to_k", ("model", "lora_targets"), ["to_q", "to_k"]),
    ],
)
def test_values_of_every_kind(override, where, value):
    extra = ["model.name=stable-diffusion", "model.folder=x"] if "gradient" in override else []
    made = recipe.parse(GOOD, [*extra, override])
    assert vars(vars(made)[where[0]]).get(where[1]) == value


def test_a_choice_that_older_yaml_takes_for_a_boolean_needs_no_quotes():
    assert recipe.read("dpo-emoji-online", ["algorithm.safeguard=off"]).algorithm.safeguard == "off"
    text = GOOD.replace("{name: srpo}", "{name: dpo, safeguard: off}")
    assert recipe.parse(text).algorithm.safeguard == "off"


@pytest.mark.parametrize("key", ["run.folder", "model.text_cache", "model.start", "prompts.file"])
def test_a_tilde_is_the_home_folder(key):
    extra = ["prompts.list=null"] if key == "prompts.file" else []
    if key == "model.text_cache":
        extra = ["model.name=flux", "model.folder=x"]
    made = recipe.parse(GOOD, [*extra, f"{key}=~/somewhere"])
    section, name = key.split(".")
    assert vars(vars(made)[section])[name] == str(Path.home() / "somewhere")


def test_a_path_is_found_from_another_folder(tmp_path, monkeypatch):
    """In the current folder first, then beside the recipe; what lies nowhere stays a name."""
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
        (folder / "list.txt").write_text("a dog\n")
    (beside / "own.yaml").write_text(GOOD.replace("list: [a dog]", "file: list.txt"))
    monkeypatch.chdir(here)
    assert recipe.read(str(beside / "own.yaml")).prompts.file == str(here / "list.txt")
    (here / "list.txt").unlink()
    made = recipe.read(str(beside / "own.yaml"))
    assert made.prompts.file == str(beside / "list.txt")
    monkeypatch.chdir(tmp_path)
    assert recipe.parse(recipe.dump(made)) == made
    assert recipe.read("srpo-emoji").prompts.file == "emoji-train"


FROZEN = [
    "algorithm.teachers={a: {adapter: runs/a/adapter, file: emoji-eval}, b: {adapter: runs/b/adapter, file: b.txt}}",
    "model.training_adapter=runs/a/adapter",
]


def frozen(made):
    teachers = made.algorithm.teachers
    return [made.model.training_adapter, *(path for t in "ab" for path in (teachers[t].adapter, teachers[t].file))]


def test_frozen_loras_are_found_from_another_folder_once_the_run_has_begun(tmp_path, monkeypatch):
    """Until then they are as they are written, as in the fingerprints of runs from before."""
    began, beside, bare = tmp_path / "began", tmp_path / "beside", ["runs/a/adapter", "runs/b/adapter", "b.txt"]
    monkeypatch.chdir(tmp_path)
    shipped, own = (recipe.fingerprint(recipe.read("opd-emoji", more)) for more in ([], FROZEN))
    for folder in (began, beside):
        for path in ("runs/a/adapter", "runs/b/adapter", "runs/srpo-emoji/adapter"):
            (folder / path).mkdir(parents=True)
        (folder / "b.txt").write_text("a dog\n")
    monkeypatch.chdir(began)
    written = recipe.read("opd-emoji", FROZEN)
    assert [recipe.fingerprint(recipe.read("opd-emoji")), recipe.fingerprint(written)] == [shipped, own]
    assert frozen(written) == [bare[0], bare[0], "emoji-eval", bare[1], bare[2]]
    a, b, file = (str(began / path) for path in bare)
    made = recipe.begun(written)
    assert frozen(made) == [a, a, "emoji-eval", b, file]
    (beside / "own.yaml").write_text(recipe.dump(written))
    monkeypatch.chdir(tmp_path)
    assert recipe.parse(recipe.dump(made)) == made == recipe.begun(made)
    assert frozen(recipe.read(str(beside / "own.yaml")))[1] == str(beside / bare[0])


def test_a_run_keeps_what_it_has_begun_with(tmp_path, monkeypatch):
    """recipe.yaml and the checkpoints' identity are those of the absolute paths; a run that goes on keeps its own."""
    (tmp_path / "runs/a/adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    written, kept = recipe.read("opd-emoji", FROZEN[1:]), []
    parts = dict.fromkeys(("model", "algorithm", "reward", "buckets", "latents", "tower"))
    parts = SimpleNamespace(prompts=[], preview_prompts=[], **parts)
    monkeypatch.setattr("palate.recipe.build", lambda *args, **options: parts, raising=False)
    monkeypatch.setattr("palate.recipe.guard_measure", lambda *args: None, raising=False)
    keep = lambda job, **options: kept.append((job.recipe, job.identity))  # noqa: E731
    monkeypatch.setitem(_trained.__globals__, "run_job", keep)
    for resume in (False, True):
        _trained(written, lambda act: act(), resume=resume, fresh=False, quiet=True)
    assert kept == [(recipe.dump(made), recipe.run_identity(made)) for made in (recipe.begun(written), written)]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("steps=3", "did you mean trainer.steps=3"),
        ("lr=0.1", "did you mean trainer.lr=0.1"),
        ("every=5", "did you mean trainer.guard.every=5"),
        ("folder=x", "model.folder=x"),
        ("positive=[a]", "did you mean algorithm.positive or reward.relative.positive?"),
        ("budget=9", "did you mean optimize.budget=9"),
    ],
)
def test_a_key_without_its_section_finds_it(override, hint):
    with pytest.raises(RecipeError) as caught:
        recipe.parse(GOOD, [override])
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "override", ["trainer.betas=3", "algorithm.window=x", "algorithm.positive=5", "reward.scale=[1]"]
)
def test_nobody_reads_the_word_tuple(override):
    with pytest.raises(RecipeError) as caught:
        recipe.parse(GOOD, [override])
    assert "tuple" not in str(caught.value).lower()


def test_equal_words_and_a_huge_rate_get_a_sentence(caplog, monkeypatch):
    for positive, negative in (("3d", "3d"), ("a, b", "b, a")):
        with pytest.raises(RecipeError, match="so neither is preferred"):
            recipe.parse(GOOD, [f"algorithm.positive={positive}", f"algorithm.negative={negative}"])
    monkeypatch.setattr("palate.recipe.builder.check_start", lambda made: (_ for _ in ()).throw(KeyboardInterrupt))
    for rate, told in (("100", 1), ("0.001", 0)):
        caplog.clear()
        with pytest.raises(KeyboardInterrupt):
            recipe.build(recipe.parse(GOOD, [f"trainer.lr={rate}"]))
        assert caplog.text.count("AdamW moves each weight") == told


def test_without_a_network_one_sentence_says_so(monkeypatch):
    """No retries of the hub's client: two short tries of our own, once per process."""
    from palate.rewards import files
    from palate.runtime import hub

    calls = []
    monkeypatch.setattr("socket.create_connection", lambda *_: calls.append(1) or (_ for _ in ()).throw(OSError()))
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    hub.reachable.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(
                InputError, match=r"reward.source.hpsv2: nobody/nothing is not in the local cache"
            ) as told:
                files.weights_file("hpsv2", "nobody/nothing", default="model.safetensors", how="It is published there.")
            assert len(str(told.value).splitlines()) == 1
        assert len(calls) == hub.TRIES
    finally:
        hub.reachable.cache_clear()
