"""What holds for every method, whoever adds one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import re

import pytest
import torch
import yaml
from support import ROOT
from support.loop import rows, run, srpo
from support.ranks import MAKE, TEACHERS, Networks

from palate import recipe
from palate.algorithms.direct import Direct, DirectSettings
from palate.algorithms.distar import Distar, DistarSettings, Generator
from palate.algorithms.leap_align import LeapAlign, LeapAlignSettings
from palate.algorithms.refl import ReFL, ReFLSettings
from palate.algorithms.table import OWN, find
from palate.core import Batch, Random, Stateful
from palate.recipe import GuardSettings
from palate.rewards.learned import BlackBox
from palate.runtime.errors import InputError
from palate.sampling import FewStepGenerator
from palate.testing import PROMPTS, tiny_reward


def test_every_algorithm_is_trained_on_two_ranks_and_resumed_to_the_last_bit():
    """tests/loop/test_distributed.py does both with each of MAKE."""
    assert {type(make()) for make in MAKE.values()} == {find(name).load_class() for name in OWN}


@pytest.mark.parametrize("name", OWN)
def test_every_algorithm_states_what_an_update_calls(name):
    """Its own test counts the calls; here that the statement answers with the settings' defaults."""
    entry = find(name)
    module = importlib.import_module(entry.load_class().__module__)
    needed = {"positive": ("a",), "negative": ("b",)} if name == "srpo" else {}
    if name == "opd":
        needed = {"teachers": {"a": module.Teacher("")}}
    told = module.calls_per_update(entry.settings_class()(**needed))
    assert told.get("forward", told.get("predict", 0)) > 0 and all(count >= 0 for count in told.values())


def page_of(name):
    """The text of docs/algorithms that is about the algorithm."""
    own = ROOT / f"docs/algorithms/{name}.md"
    return (own if own.exists() else own.with_name("baselines.md")).read_text("utf-8")


def as_read(cell):
    """What a cell says: "[0, 1], null, off" is three values; what is not null, true, false or a number is text."""
    if isinstance(cell, list):
        return [as_read(each) for each in cell]
    if cell in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[cell]
    try:
        return float(cell)
    except ValueError:
        return cell


@pytest.mark.parametrize("name", OWN)
def test_the_page_of_a_method_has_every_setting_with_its_default(name):
    table = page_of(name).split(f"| setting of `{name}` | default | meaning |\n")[1].split("\n\n")[0]
    stated = {}
    for row in table.splitlines()[1:]:
        keys, defaults = (cell.strip() for cell in row.split("|")[1:3])
        keys = re.findall(r"`(\w+)`", keys)
        values = [[]] if keys[0] in ("generator", "teachers") else as_read(yaml.load(f"[{defaults}]", yaml.BaseLoader))
        stated |= dict(zip(keys, values, strict=True))
    fields = dataclasses.fields(find(name).settings_class())
    assert set(stated) == {field.name for field in fields}
    for field in fields:
        if field.default is not dataclasses.MISSING:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert stated[field.name] == default, field.name


def test_every_metric_is_on_the_page_of_its_method():
    names = {find(name).load_class(): name for name in OWN}
    for key, make in MAKE.items():
        algorithm = make()
        others = {"distar": ("assistant",), "opd": tuple(TEACHERS)}.get(names[type(algorithm)], ())
        model, prompts = Networks(others=others), PROMPTS[:4]
        asked = (
            BlackBox(tiny_reward, lambda images, prompts: images.mean((2, 3))) if key == "distar-head" else tiny_reward
        )
        batch = Batch(prompts, model.encode_prompts(prompts), torch.arange(4))
        page = page_of(names[type(algorithm)])
        page = page.replace("distance_NAME", "distance_warm` `distance_cold").replace("_*`", "_denoise`")
        for loss in algorithm.step(model, asked, batch, Random(0, 1, range(4))):
            for metric in loss.metrics:
                assert f"`{metric.replace('_inversion', '_denoise')}`" in page, (key, metric)


@pytest.mark.parametrize("name", [*MAKE, "refl-pretrain"])
def test_who_never_reads_given_images_says_so_and_is_given_none(name, tmp_path):
    read = []

    class Given(Batch):
        latents = property(lambda batch: read.append(name))

    algorithm = ReFL(ReFLSettings(T=3, T1=1, T2=2, guidance=1.0, pretrain=0.5)) if "pre" in name else MAKE[name]()
    others = {"distar": ("assistant",), "distar-head": ("assistant",), "opd": tuple(TEACHERS)}.get(name, ())
    model, prompts = Networks(others=others), PROMPTS[:4]
    asked = BlackBox(tiny_reward, lambda images, prompts: images.mean((2, 3)))
    batch = Given(prompts, model.encode_prompts(prompts), torch.arange(4))
    with contextlib.suppress(InputError):  # pretrain misses its images
        list(algorithm.step(model, asked if name == "distar-head" else tiny_reward, batch, Random(0, 1, range(4))))
    assert bool(read) == (name in ("srpo", "dpo", "dpo-online", "refl-pretrain"))
    if not read:
        latents = torch.zeros(4, *model.latent_shape)
        with pytest.raises(InputError, match=f"latents: {type(algorithm).__name__} draws its own images"):
            run(tmp_path / "run", model=model, algorithm=algorithm, prompts=prompts, latents=latents)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in OWN if name not in ("srpo", "dpo")])
def test_a_recipe_gives_images_to_who_reads_them_only(name):
    needed = {"opd": {"teachers": {"a": {"adapter": "a"}}}, "direct": {"positive": ["3d"], "negative": ["flat"]}}
    tree = {"algorithm": {"name": name, **needed.get(name, {})}, "reward": {"name": "emoji"},
            "prompts": {"images": "x"}, "trainer": {"batch_size": 8}}  # fmt: skip
    with pytest.raises(InputError, match=f"prompts.images: {name} (draws its own|learns from given)") as caught:
        recipe.parse(yaml.safe_dump(tree))
    assert len(str(caught.value).splitlines()) == 1, caught.value
    if name == "refl":
        assert recipe.parse(yaml.safe_dump(tree), ["algorithm.pretrain=0.5"]).prompts.images


WITHOUT = ("opd", "distar-head", "sqdf")  # asks no reward; ends the run with a sentence; leaves the trajectory out


HINGED = {
    "srpo-hinge": lambda: srpo(hinge=0.7, preference="absolute", branches=("denoise",)),
    "leap_align-hinge": lambda: LeapAlign(LeapAlignSettings(steps=3, guidance=1.0, hinge=0.5)),
}  # ReFL has one by default
METHODS = {name: make for name, make in {**MAKE, **HINGED}.items() if name not in WITHOUT}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", METHODS)
def test_a_reward_that_is_not_finite_makes_the_loss_so_and_leaves_no_trace(name, bad):
    """The loop skips a step by its loss: a score that became 0 on the way, or an image that it made the best of its
    pair, would pass for an update, as would one above a hinge. What the algorithm remembers goes into a checkpoint,
    which holds finite numbers."""
    model, algorithm = Networks(others=("assistant",) if name == "distar" else ()), METHODS[name]()
    prompts = PROMPTS[:4]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.arange(4))

    def sick(images, prompts):
        values = tiny_reward(images, prompts)
        return torch.where(torch.arange(len(values)) == 1, values + bad, values)

    losses = [loss.value for loss in algorithm.step(model, sick, batch, Random(0, 1, range(4)))]
    assert not all(bool(torch.isfinite(value)) for value in losses)
    kept = algorithm.state_dict() if isinstance(algorithm, Stateful) else {}
    assert all(math.isfinite(value) for _, values in kept.get("seen", []) for value in values)
    assert all(bool(torch.isfinite(tensor).all()) for name in ("old", "reference") for tensor in kept.get(name) or [])


TINY = FewStepGenerator(steps=1)
LATE = {
    "context": lambda: Direct(DirectSettings(generator=TINY, context=("warm",), context_steps=2)),
    "start": lambda: Distar(DistarSettings(generator=Generator(t_init=0.7), reward_start_step=2)),
    "head": lambda: Distar(DistarSettings(generator=Generator(t_init=0.7), head_queries=1, head_first=3)),
}


@pytest.mark.parametrize("name", LATE)
def test_the_guard_waits_for_a_reward_that_comes_late_and_not_for_one_that_never_comes(tmp_path, name):
    """trainer.guard.best of a metric that the first updates of the policy lack: the best is the first check that has
    seen it. A misspelt one is refused after the first update all the same, with the late ones among those there are."""

    def trained(folder, best):
        model = Networks(others=() if name == "context" else ("assistant",))
        rate = BlackBox(tiny_reward, lambda images, prompts: images.mean((2, 3))) if name == "head" else tiny_reward
        guard = GuardSettings(every=2, best=best)
        return run(folder, algorithm=LATE[name](), model=model, reward=rate, steps=4, guard=guard,
                   check=lambda model, prompts, ids: {"heldout": 1.0})  # fmt: skip

    trained(tmp_path / "waits", "reward")
    logged = rows(tmp_path / "waits")
    with_reward = [row["step"] for row in logged if row["event"] == "step" and "reward" in row]
    assert with_reward[0] == 3
    assert [row["best_step"] for row in logged if row["event"] == "guard" and row["step"]] == [0, 4]
    with pytest.raises(InputError, match=r"no metric 'rewrad'; .*reward"):
        trained(tmp_path / "refused", "rewrad")
    assert {row["step"] for row in rows(tmp_path / "refused")} == {0, 1}
