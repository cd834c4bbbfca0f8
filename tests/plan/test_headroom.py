"""`palate train` asks the plan's sum first: never wrong for what fits, a remedy that works for what does not."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter

import pytest
import torch

from palate import cli, recipe
from palate.core import Batch, Random
from palate.plan import GIB, plan, require_room, room
from palate.plan.activations import fused_attention
from palate.plan.count import counts
from palate.plan.headroom import KEY
from palate.plan.measure import _of_embedded
from palate.plan.table import FREE
from palate.runtime import environment
from palate.runtime.errors import InputError

MEMORY = "palate.plan.headroom.host_memory"


class LiveBytes:
    """The most bytes of different storages that autograd holds at one time; those in `own` are weights."""

    def __init__(self, own):
        self.own, self.holders, self.sizes, self.peak = own, Counter(), {}, 0

    def pack(self, tensor):
        class Saved:
            value = tensor

        saved, storage = Saved(), tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.holders[storage._cdata] += 1
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(saved, self.drop, storage._cdata)
            self.peak = max(self.peak, sum(self.sizes[key] for key, count in self.holders.items() if count))
        saved.value = tensor
        return saved

    def drop(self, key):
        self.holders[key] -= 1


@pytest.mark.parametrize(
    ("name", "graph"),
    [
        ("srpo-emoji", {"denoiser": 1, "decoder": 1, "reward": 1}),
        ("draft-emoji", {"denoiser": 2, "decoder": 1, "reward": 1}),  # the last two steps share a graph
        ("grpo-emoji", {"denoiser": 4}),  # two branches of guidance, two losses of a group
        ("distar-emoji-quick", {"denoiser": 1}),  # of its first phase alone, in which the assistant learns
    ],
)
def test_activations_are_those_that_a_real_update_holds(name, graph):
    more = {"grpo-emoji": ["algorithm.group=2"], "distar-emoji-quick": ["trainer.steps=30"]}.get(name, [])
    made = recipe.read(name, ["trainer.batch_size=4", *more])
    found, parts = plan(made), recipe.build(made)
    gc.collect()  # a network that is still to be freed must not lend its addresses
    own = {
        weight.untyped_storage()._cdata
        for module in gc.get_objects()
        if isinstance(module, torch.nn.Module)
        for weight in (*module.parameters(), *module.buffers())
    }
    live, prompts, rng = LiveBytes(own), (parts.prompts * 4)[:4], Random(0, 1, range(4))
    batch = Batch(prompts, parts.model.encode_prompts(prompts), torch.arange(4))
    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(live.pack, lambda saved: saved.value):
        for loss in parts.algorithm.step(parts.model, parts.reward, batch, rng):
            loss.value.backward()
            del loss
    planned = sum(value for term, value in found.memory.items() if term.startswith("activations"))
    assert planned <= live.peak <= 1.03 * planned
    assert counts(made).graph == graph


def test_what_fits_is_let_through_and_what_does_not_has_a_remedy_that_works(monkeypatch):
    made = recipe.read("srpo-emoji", ["trainer.batch_size=64"])
    need = plan(made).bytes
    monkeypatch.setattr(MEMORY, lambda: need)
    before = torch.get_rng_state()
    _of_embedded.cache_clear()
    require_room(made)  # exactly
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(MEMORY, lambda: need - 1)
    found = room(made)
    assert not found.fits and found.need == need
    assert [key for key, _ in found.remedies] == ["trainer.micro_batches=2"]
    remedied = recipe.read("srpo-emoji", ["trainer.batch_size=64", found.remedies[0][0]])
    assert room(remedied).need == found.remedies[0][1] and room(remedied).fits
    monkeypatch.setattr(MEMORY, lambda: 1e6)
    nothing = room(made)
    assert not nothing.remedies and "nothing makes it fit, the nearest is trainer.micro_batches=64" in nothing.sentence
    with pytest.raises(InputError, match=f"of 0.00093 GiB on cpu.*\n.*{KEY}=false"):
        require_room(made)
    require_room(recipe.read("srpo-emoji", ["trainer.batch_size=64", f"{KEY}=false"]))


def test_a_remedy_is_a_batch_that_the_algorithm_takes(monkeypatch):
    """DDPO compares rewards inside a batch, so single images are no remedy."""
    made = recipe.read("ddpo-emoji", ["trainer.batch_size=16", "algorithm.minibatches=1"])
    eighths = plan(recipe.read("ddpo-emoji", ["trainer.batch_size=16", "algorithm.minibatches=1",
                                              "trainer.micro_batches=8"])).bytes  # fmt: skip
    for budget, remedy in ((1.001 * eighths, ["trainer.micro_batches=8"]), (0.98 * eighths, [])):
        monkeypatch.setattr(MEMORY, lambda budget=budget: budget / FREE)
        assert [key for key, _ in room(made).remedies if "micro_batches" in key] == remedy


def test_ranks_without_an_accelerator_share_their_machine(monkeypatch):
    made = recipe.read("srpo-emoji", ["trainer.batch_size=64"])
    monkeypatch.setattr(MEMORY, lambda: 64 * GIB)
    need = room(made, gpus=2).need
    assert need == 2 * plan(made, gpus=2).bytes
    monkeypatch.setattr(MEMORY, lambda: 0.45 * need)
    (key, _), *_ = room(made, gpus=2).remedies
    assert room(recipe.read("srpo-emoji", ["trainer.batch_size=64", key]), gpus=2).fits
    monkeypatch.setattr(MEMORY, lambda: 64 * GIB)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # on two machines
    assert room(made).need == 2 * plan(made, gpus=4).bytes


def test_what_cannot_be_planned_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(MEMORY, lambda: 1.0)
    assert room(recipe.read("srpo-flux", ["reward={name: hpsv3}"])) is None
    monkeypatch.setattr("palate.plan.headroom.plan", lambda *a, **k: 1 / 0)
    assert room(recipe.read("srpo-emoji")) is None
    require_room(recipe.read("srpo-emoji"))


def test_the_memory_of_a_container_is_its_limit(monkeypatch):
    whole = environment.host_memory()
    limits = {"/sys/fs/cgroup/memory.max": 2.0 * GIB}
    monkeypatch.setattr(environment, "_number", limits.get)
    assert environment.host_memory() == 2 * GIB
    limits["/sys/fs/cgroup/memory.max"] = 2.0**63  # no limit, as version 1 writes it
    assert environment.host_memory() == whole


@pytest.mark.parametrize("command", ["train", "optimize"])
def test_the_command_refuses_before_anything_loads(command, monkeypatch, capfd, tmp_path):
    name = {"train": "srpo-emoji", "optimize": "optimize-emoji"}[command]
    monkeypatch.chdir(tmp_path)

    def built(*_, **options):
        raise AssertionError("built")

    monkeypatch.setattr("palate.recipe.builder.build_model", built)
    words = ["palate", command, name, "run.folder=r"]
    if command == "train":
        words.append("trainer.batch_size=100000000")
    else:
        monkeypatch.setattr(MEMORY, lambda: 1e6)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capfd.readouterr().err
    assert ended.value.code == 2 and "a step needs" in error and f"{KEY}=false" in error
    assert "set trainer.micro_batches=" in error or command == "optimize"
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", [*words, f"{KEY}=false"])
    with pytest.raises(AssertionError, match="built"):
        cli.main()
