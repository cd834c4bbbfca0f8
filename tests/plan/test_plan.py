"""The planner against published figures, the algorithms' own formulas, and the counter's reading of a real update."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_families import FAMILIES, SIZE, load, saved
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from palate import cli, recipe
from palate.algorithms.distar import calls_per_update as calls_of
from palate.algorithms.srpo import calls_per_update
from palate.cli.doctor import FLOORS, Finding, check_reward, findings
from palate.cli.dry_run import _wrong
from palate.core import Batch, Random
from palate.plan import (
    DEVICES,
    GIB,
    Unit,
    as_json,
    count,
    duration,
    measure,
    measure_unit,
    memory_savings,
    plan,
    table,
    this_machine,
)
from palate.plan.activations import fused_attention, kept_bytes
from palate.plan.count import counts
from palate.rewards.tasks import load_detector
from palate.runtime.errors import InputError
from palate.taste.saved import FILE

BASE = """
run: {{folder: runs/x}}
model: {{name: {name}, weights: lora{folder}}}
algorithm: {{name: srpo, positive: ["3d"], negative: [flat], rollout_steps: 4}}
reward: {{name: {reward}}}
prompts: {{list: [a dog]}}
trainer: {{batch_size: 2}}
"""


def recipe_of(name, *overrides):
    emoji = name == "emoji"
    return recipe.parse(
        BASE.format(name=name, folder="" if emoji else ", folder: owner/base", reward="emoji" if emoji else "hpsv2"),
        overrides,
    )


# parameters, forward TFLOP of the denoiser and of its VAE's decoder, as measured on the published networks
FIGURES = {"stable-diffusion": (860e6, 0.803, 2.5), "flux": (11.9e9, 74.4, 10.5)}


@pytest.mark.parametrize("name", FIGURES)
def test_published_networks_have_their_size_and_cost(name):
    parameters, tflop, decode = FIGURES[name]
    units = measure(recipe_of(name, "model.lora_rank=1"))
    denoiser = units["denoiser"]
    assert denoiser.parameters - denoiser.trained == pytest.approx(parameters, rel=0.005)
    assert denoiser.forward / 1e12 == pytest.approx(tflop, rel=0.01)
    assert units["decoder"].forward / 1e12 == pytest.approx(decode, rel=0.02)
    assert units["decoder"].backward / units["decoder"].forward == pytest.approx(1.03, abs=0.03)
    assert (
        units["reward"].forward / 1e12 == pytest.approx(0.335, rel=0.01) and units["reward"].parameters == 986_109_441
    )
    assert units["reward"].backward / units["reward"].forward == pytest.approx(1.03, abs=0.05)
    for unit in (denoiser, units["decoder"]):
        assert 0 < unit.kept_checkpointed < unit.kept and unit.block > 0
    if name == "flux":  # at 1024 pixels, rank 1: what block checkpointing leaves, and the decoder without any
        assert denoiser.kept_checkpointed / GIB == pytest.approx(1.5, rel=0.05)
        assert units["decoder"].kept / GIB == pytest.approx(11.1, rel=0.01)
        assert units["decoder"].kept_checkpointed / GIB == pytest.approx(2.3, abs=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm.n=2"],
        ["algorithm.branches=[denoise]"],
        ["algorithm.reference_penalty=1.0"],
        ["trainer.batch_size=3"],
    ],
)
def test_counted_calls_are_the_algorithms_formula(overrides):
    made = recipe_of("emoji", *overrides)
    calls, formula, batch = count(made, updates=2), calls_per_update(made.algorithm), made.trainer.batch_size
    assert calls["denoiser"] == batch * formula["predict"]
    assert calls["decoder"] == calls["decoder backward"] == batch * formula["decode"]
    assert calls["reward"] == calls["reward backward"] == batch * formula["image_towers"]
    assert calls["denoiser backward"] == batch * formula["backward"]


def test_updates_are_counted_of_every_phase_of_a_run():
    """The assistant alone, then the generator without and with its reward: calls are the mean over the run, and memory
    is that of the most an update asks for."""
    changes = ["trainer.steps=100", "trainer.batch_size=2", "algorithm.assistant_warmup_steps=20"]
    made = recipe.read("distar-emoji", [*changes, "algorithm.reward_start_step=60"])
    calls, largest, _ = counts(made)
    alone, silent, whole = (
        calls_of(made.algorithm, **phase) for phase in ({"assistant_alone": True}, {"distilling": True}, {})
    )
    for part, key in {"denoiser": "predict", "decoder": "decode", "reward": "reward"}.items():
        expected = 2 * (0.2 * alone[key] + 0.4 * silent[key] + 0.4 * whole[key])
        assert calls[part] == pytest.approx(expected)
    assert largest["decoder"] == largest["reward"] == 1 and largest["denoiser"] == 3
    short = counts(recipe.read("distar-emoji", [*changes, "trainer.steps=20"]))
    assert "decoder" not in short.calls and short.graph == {"denoiser": 1}
    words = recipe.read("taste-emoji-words", ["algorithm.context=[black]", "trainer.steps=120"])
    assert counts(words).calls["decoder"] == words.trainer.batch_size / 2
    head = recipe.read("distar-emoji-blackbox", ["algorithm.head_first=512", "algorithm.head_queries=1"])
    assert counts(head).graph["decoder"] == 1  # once the head has its answers


def test_parts_that_are_compared_are_counted_once_an_image():
    weights = ["reward.name=null", "reward.weights={emoji: 1, emoji-heldout: 1}"]
    plain, parted = (count(recipe.read("grpo-emoji", [*weights, *more]), updates=1)
                     for more in ([], ["algorithm.per_reward=true"]))  # fmt: skip
    assert parted == plain


def test_guidance_doubles_and_a_reward_without_towers_runs_twice():
    guided = count(recipe_of("emoji", "algorithm.rollout_guidance=3.0"), updates=1)
    assert guided["denoiser"] == 2 * (2 * 4 + 2) and guided["denoiser backward"] == 2 * 2
    plain = count(recipe_of("emoji", "reward.name=emoji-tasks-soft"), updates=1)
    assert plain["reward"] == 2 * 2 * 2


def test_flops_of_a_real_update_are_the_plans():
    made = recipe_of("emoji", "algorithm.n=2", "algorithm.rollout_guidance=3.0")
    expected = plan(made).flops
    model, reward, algorithm = recipe.build_model(made), recipe.build_reward(made.reward), recipe.build_algorithm(made)
    prompts = ["a dog", "an apple"]
    batch, rng = Batch(prompts, model.encode_prompts(prompts), torch.arange(2)), Random(0, 1, range(2))
    reward(torch.rand(2, 3, 64, 64), [f"{word}. {p}" for word in ("3d", "flat") for p in prompts][:2])
    reward(torch.rand(2, 3, 64, 64), [f"flat. {p}" for p in prompts])  # text features are cached from here on
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for loss in algorithm.step(model, reward, batch, rng):
            loss.value.backward()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


ONE_OF_EACH = [n for n in FAMILIES if not n.endswith(("-v", "-schnell", "-sigma", "-base", "-dev", "-turbo"))]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_flops_of_every_family_are_those_of_a_real_call(name):
    """The plan of a folder, on the meta device, against torch's counter around the loaded model's own calls."""
    folder, model = saved(name)[0], load(name, lora_rank=16, gradient_checkpointing=False)
    side = SIZE * FAMILIES[name].scale
    settings = {"folder": folder, "dtype": "float32", **FAMILIES[name].load, "image_size": side}
    reward = ("reward.name=warmth", "algorithm.preference=absolute")
    made = recipe_of(model.facts.name, *reward, *(f"model.{k}={v}" for k, v in settings.items()))
    units, network = measure(made), model.weights.network
    published = model.facts.published
    cond = published.condition(network.config, made.model.text_tokens or published.text_tokens, torch.float32)
    cond = type(cond)(*(torch.zeros_like(tensor) if tensor is not None else None for tensor in cond))
    xt, t = torch.randn(1, *model.latent_shape), torch.tensor([0.5])
    calls = {
        "denoiser": lambda: model.output(network, xt, t, cond, model.call),
        "decoder": lambda: model.decode(xt),
        "encoder": lambda: model.encode(torch.rand(1, 3, side, side)),
    }
    for part, call in calls.items():
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        assert units[part].forward == pytest.approx(counter.get_total_flops(), rel=0.01), part


def test_kept_bytes_are_what_autograd_keeps():
    rows, width = 32, 8
    net = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)).requires_grad_(False)
    net[0].requires_grad_(True)
    x = torch.randn(rows, width, requires_grad=True)
    unit = measure_unit(net, lambda: net(x), lambda run: setattr(net, "forward", partial(run, net.forward)))
    assert unit.parameters == 2 * (width * width + width) and unit.trained == width * width + width
    assert unit.forward == 2 * 2 * rows * width * width and unit.backward == (2 + 1) * 2 * rows * width * width
    assert unit.kept == 2 * rows * width * 4  # x for the weight's gradient, and what GELU saw
    assert unit.kept_checkpointed == rows * width * 4 and unit.block == rows * width * 4
    with torch.device("meta"):
        q, k, v = (torch.empty(1, 2, n, width, requires_grad=True) for n in (5, 7, 7))
    with fused_attention(), kept_bytes(set()) as kept, FlopCounterMode(display=False) as counter:
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert counter.get_total_flops() == 2 * 2 * 2 * 5 * 7 * width
        output.sum().backward()
    assert counter.get_total_flops() == (1 + 2) * 2 * 2 * 2 * 5 * 7 * width
    assert kept.total == 4 * 2 * width * (5 + 7 + 7 + 5) + 4 * 2 * 5


UNITS = {
    "denoiser": Unit(10 * 10**9 + 10**7, 1e13, 1.2e13, 8 * GIB, GIB, GIB / 2, 10**7, 20 * GIB),
    "decoder": Unit(5 * 10**7, 1e12, 1e12, 4 * GIB, GIB, GIB / 4, 0, 0.1 * GIB),
    "encoder": Unit(3 * 10**7, 1e12, 0.0, 0.0, 0.0, 0.0, 0, 0.1 * GIB),
    "reward": Unit(10**9, 1e11, 1e11, GIB, GIB, 0.0, 0, 4 * GIB),
}


def test_sums_times_and_savings():
    made = recipe_of("flux", "trainer.ema_decay=0.9")
    whole = plan(made, units=UNITS)
    calls = count(made)
    checked = calls["denoiser"] * 1e13 + calls["denoiser backward"] * (1.2e13 + 1e13) + calls["decoder"] * 1e12
    checked += calls["decoder backward"] * 2e12 + (calls["reward"] + calls["reward backward"]) * 1e11
    assert whole.flops == pytest.approx(checked) and whole.passes == pytest.approx(checked / 1e13)
    assert whole.seconds(100, 0.5) == pytest.approx(checked / 5e13)
    assert plan(made, units=UNITS, gpus=2).seconds(100, 0.5) == pytest.approx(checked / 1e14)
    assert whole.memory["Adam's two moments (float32)"] == 8e7 and whole.memory["moving average"] == 4e7
    assert whole.memory["denoiser, frozen"] == 2e10 and whole.memory["activations: denoiser"] == 2 * GIB
    slack = plan(recipe_of("flux", "model.gradient_checkpointing=false"), units=UNITS)
    assert slack.memory["activations: denoiser"] == 16 * GIB and slack.flops < whole.flops
    full = plan(
        recipe_of("flux", "model.weights=full", "trainer.sharding=full", "trainer.batch_size=4"),
        units={**UNITS, "denoiser": UNITS["denoiser"]._replace(trained=10**10)},
        gpus=4,
    )
    assert full.memory["Adam's two moments (float32)"] == 2e10 and full.memory["frozen reference"] > 5e9
    small = dict(memory_savings(made, whole))
    assert small["trainer.micro_batches=2"] < whole.bytes and small["reward.dtype=bfloat16"] == pytest.approx(
        whole.bytes - 2.5 * GIB + 0, rel=0.05
    )
    text = table(made, whole, device="rtx-3090")
    assert (
        "does not fit into 24 GiB" in text
        and "trainer.micro_batches=2" in text
        and "published architecture of flux is assumed" in text
    )
    assert "does not fit" not in table(made, whole, device="h200")
    for options, words in (({"device": "tpu"}, "--device: got 'tpu'"), ({"utilisation": 0.0}, "--utilisation")):
        with pytest.raises(ValueError, match=words):
            table(made, whole, **options)


def test_a_plan_that_no_change_makes_fit_says_what_comes_nearest(monkeypatch, capfd):
    """Exit 1, so that a script sees it; and 0 where a change is enough."""
    monkeypatch.setattr("palate.plan.memory.measure", lambda recipe: UNITS)
    flux = ["srpo-flux", "trainer.batch_size=2", "trainer.micro_batches=1"]
    for device, ends in (("rtx-3060", 1), ("h200", 0)):
        monkeypatch.setattr(sys, "argv", ["palate", "plan", *flux, "--device", device])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        text = capfd.readouterr().out
        assert (ended.value.code or 0) == ends and ("Nothing here makes it fit" in text) == bool(ends)
    made = recipe_of("flux", "trainer.ema_decay=0.9")
    savings = memory_savings(made, plan(made, units=UNITS))
    assert savings[-1][0] == "all but model.offload=true" and savings[-1][1] < min(value for _, value in savings[:-1])
    made = recipe_of("emoji", "trainer.ema_decay=0.9")
    assert memory_savings(made, plan(made, units=UNITS))[-1][0] == "all of these"


def test_no_cost_of_planning_grows_with_the_batch():
    """The calls are the formula's, and nothing of the batch's size is allocated."""
    made = recipe_of("emoji", "trainer.batch_size=100000000")
    calls, formula = count(made, updates=1), calls_per_update(made.algorithm)
    assert calls["denoiser"] == 1e8 * formula["predict"] and calls["reward"] == 1e8 * formula["image_towers"]
    odd = count(recipe_of("emoji", "trainer.batch_size=100003"), updates=1)  # a prime
    assert odd["denoiser"] == pytest.approx(100003 * formula["predict"])


def test_time_and_cost_follow_the_device_and_the_price():
    made = recipe_of("flux")
    whole = plan(made, units=UNITS)
    hours = whole.seconds(DEVICES["h200"].tflops, 0.5) * made.trainer.steps / 3600
    text = table(made, whole, device="h200", utilisation=0.5, price=3.0)
    assert f"{3.0 * hours:.2f} at 3 per GPU and hour" in text
    both = [as_json(made, plan(made, units=UNITS, gpus=n), device="h200", utilisation=0.5, price=3.0) for n in (1, 2)]
    found = [json.loads(text) for text in both]  # two GPUs need half the time, and cost as much
    assert found[0]["cost"] == found[1]["cost"] == pytest.approx(3.0 * hours)
    assert found[0]["seconds"] == 2 * found[1]["seconds"] == pytest.approx(3600 * hours)
    name, device = this_machine()
    assert device.tflops > 0 and device.gib > 0.5
    assert f"1 x {name}" in table(made, whole, device=None) and (name == "cpu") != torch.cuda.is_available()


def test_doctor_names_floors_and_tries_a_reward(monkeypatch):
    found = list(findings())
    assert all(any(text.startswith(f"{name} ") and state == "ok" for state, text in found) for name in FLOORS)
    assert any("embedded model" in text for _, text in found)
    versions = {"torch": "2.9.1", "peft": None, "pyiqa": "0.1"}
    original = importlib.import_module("palate.cli.doctor")._version
    monkeypatch.setattr("palate.cli.doctor._version", lambda name: versions.get(name, original(name)))
    bad = [text for state, text in findings() if state == "bad"]
    assert len(bad) == 3 and "needs >= 2.10" in bad[0] and "peft missing" in bad[1] and "non-commercial" in bad[2]
    assert [state for state, _ in check_reward("warmth", None)] == ["ok", "ok", "ok", "note"]


@pytest.mark.parametrize("name", sorted(recipe.published()))
def test_every_published_recipe_can_be_counted(name):
    made = recipe.read(name)
    calls = count(made, updates=1)
    assert calls["denoiser"] >= calls.get("denoiser backward", 0.0) > 0


def test_the_commands_answer_in_text_and_refuse_in_a_line(monkeypatch, capfd, tmp_path):
    def palate(*arguments):
        monkeypatch.setattr(sys, "argv", ["palate", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capfd.readouterr()

    monkeypatch.setattr("palate.plan.memory.measure", lambda recipe: UNITS)
    well = [Finding("ok", "all is well"), Finding("note", "no GPU")]
    monkeypatch.setattr("palate.cli.doctor.findings", lambda: iter(well))
    code, out, _ = palate("plan", "srpo-emoji", "trainer.batch_size=4", "--device", "h200", "--gpus", "2")
    assert code == 0 and "batch 4, 2 x h200" in out and "GiB on each GPU" in out
    assert [duration(seconds) for seconds in (0.5, 90, 600, 9000)] == ["0.5 s", "90 s", "10 min", "2.5 h"]
    assert [duration(days * 86400) for days in (1.9, 53, 1234.4)] == ["45.6 h", "53 days", "1,234 days"]
    assert palate("doctor")[:2] == (0, "ok      all is well\nnote    no GPU\n")
    monkeypatch.setattr("palate.cli.doctor.findings", lambda: iter([Finding("bad", "torch 1.0; needs >= 2.10")]))
    assert palate("doctor")[0] == 2
    for arguments, words in (
        (("plan", "srpo-emoji", "--device", "abacus"), "--device: got 'abacus'; expected one of rtx-4060"),
        (("plan", "srpo-emojy"), "did you mean srpo-emoji"),
        (("export", str(tmp_path)), "is not a run"),
        (("export", str(tmp_path / "none")), "is not a run"),
    ):
        code, _, error = palate(*arguments)
        assert code == 2 and words in error and len(error.splitlines()) <= 3


WHOLE = {**UNITS, "denoiser": UNITS["denoiser"]._replace(trained=10**10 + 10**7)}  # with model.weights=full


@pytest.mark.parametrize(
    ("sharding", "machine", "pieces"), [("none", None, 1), ("full", None, 4), ("hybrid", None, 4), ("hybrid", "2", 2)]
)
def test_ranks_hold_pieces_of_what_is_sharded_and_copies_of_all_else(sharding, machine, pieces, monkeypatch):
    """As docs/distributed.md: trainer.sharding cuts every network, the frozen reference as well."""
    if machine:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", machine)
    made = recipe_of("flux", "model.weights=full", "trainer.ema_decay=0.9", f"trainer.sharding={sharding}",
                     "trainer.batch_size=4")  # fmt: skip
    whole = plan(made, units=WHOLE, gpus=4).memory
    number = WHOLE["denoiser"].trained
    assert whole["trained weights (float32)"] == whole["moving average"] == 4 * number / pieces
    assert whole["Adam's two moments (float32)"] == 8 * number / pieces
    assert whole["frozen reference"] == 2 * WHOLE["denoiser"].parameters / pieces
    assert whole["gradients (float32)"] == 4 * number  # SRPO's several losses are reduced together
    made = replace(made, trainer=replace(made.trainer, reduce_gradients="loss"))
    assert plan(made, units=WHOLE, gpus=4).memory["gradients (float32)"] == 4 * number / pieces
    one = replace(made, trainer=replace(made.trainer, reduce_gradients="update"),
                  algorithm=replace(made.algorithm, branches=("denoise",), n=1))  # fmt: skip
    assert plan(one, units=WHOLE, gpus=4).memory["gradients (float32)"] == 4 * number / pieces


def test_what_several_ranks_could_share_is_named_with_the_key_that_shares_it(monkeypatch):
    monkeypatch.setattr("palate.plan.memory.measure", lambda recipe: UNITS)  # of a LoRA
    made = recipe_of("flux", "model.weights=full", "trainer.batch_size=8")
    found = dict(memory_savings(made, plan(made, units=WHOLE, gpus=8)))
    cut = recipe_of("flux", "model.weights=full", "trainer.batch_size=8", "trainer.sharding=full")
    assert found["trainer.sharding=full"] == plan(cut, units=WHOLE, gpus=8).bytes
    assert any(key.startswith("all but") and "trainer.sharding=full" in key for key in found)
    text = table(made, plan(made, units=WHOLE, gpus=8), device="rtx-3090")
    assert "more GPUs (--gpus) with trainer.sharding=full:" in text
    assert "trainer.sharding=full" not in dict(memory_savings(made, plan(made, units=WHOLE)))  # needs several ranks
    for change in memory_savings(cut, plan(cut, units=WHOLE, gpus=8)):
        if change[0].startswith(("model.", "trainer.", "reward.")):  # each can be set as it stands
            values = change[0].split()
            recipe_of("flux", "model.weights=full", "trainer.batch_size=8", "trainer.sharding=full", *values)


def test_a_moving_average_is_kept_of_every_name_that_is_trained():
    made = recipe.read("distar-sd15", ["model.folder=owner/base", "trainer.ema_decay=0.9"])
    found, model = plan(made, units=UNITS).memory, recipe.trained_names("distar")
    assert len(model) == 2 and found["moving average"] == found["trained weights (float32)"]


def test_text_encoders_take_the_bytes_of_their_precision():
    sizes = []
    for dtype in ("bfloat16", "float32"):
        made = recipe_of("flux", f"model.dtype={dtype}")
        (line,) = [row for row in table(made, plan(made, units=UNITS)).splitlines() if "text encoders" in row]
        sizes.append(float(line.split(":")[1].split()[0]))
    assert sizes[1] == pytest.approx(2 * sizes[0], abs=0.1) and sizes[0] > 5


def test_gpus_that_do_not_divide_the_batch_are_refused_as_in_training():
    with pytest.raises(ValueError, match=r"trainer.batch_size: 2 cannot be cut into 3 equal parts \(3 GPUs x"):
        plan(recipe_of("emoji"), gpus=3)
    assert [found.state for found in _wrong(recipe_of("emoji"), 3, True)] == ["bad"]
    assert not [*_wrong(recipe_of("emoji"), 2, True)]


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "transformer").mkdir()
    for text in ('{"_class_name": "Flux', "[1]", "\xff"):
        (tmp_path / "transformer/config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=r"model.folder: .*config.json .*download it again"):
            plan(recipe_of("flux", f"model.folder={tmp_path}"), units=UNITS)


def test_a_recipe_that_cannot_be_planned_still_has_its_files_listed(monkeypatch):
    from palate.cli.requirements import requirements

    monkeypatch.setattr("palate.cli.requirements.plan", lambda recipe: plan(recipe))  # measures hpsv3
    found = {row.what: row for row in requirements(recipe_of("flux", "reward.name=hpsv3"), "h100")}
    assert found["model owner/base"].state == "missing" and "reward hpsv3" in found
    assert found["memory"].state == "note" and "hpsv3 cannot be measured" in found["memory"].text


def test_a_first_recipe_takes_one_change_at_a_time_and_never_the_sum_of_them():
    from palate.cli.init import fitted

    text = recipe.text_of("srpo-flux")
    for card in (20.0, 24.0, 32.0):
        changed, said = fitted(text, "a card", DEVICES["h100"]._replace(gib=card), lambda r: plan(r, units=UNITS))
        assert "Memory by `palate plan`" in said and recipe.parse(changed).model.name == "flux"


def test_a_taste_costs_the_networks_that_it_stands_on(tmp_path):
    """And so does each reward of a sum, whatever model is trained."""

    def reward(*overrides):
        return measure(recipe_of("emoji", *overrides))["reward"]

    emoji, clip = reward(), reward("reward.name=clip-score")
    assert clip.weight_bytes > 1.5e9 > emoji.weight_bytes > 1e6
    both = reward("reward={weights: {emoji: 1, clip-score: 0.1}}")
    assert both.weight_bytes == emoji.weight_bytes + clip.weight_bytes
    place = f"reward={{name: taste, source: {{taste: {tmp_path}, hpsv2: x}}}}"
    expected = reward("reward.name=hpsv2")
    assert reward(place) == expected, "there is no taste yet: what is given a place beside it"
    save_file({"mean": torch.zeros(1)}, tmp_path / FILE, {"taste": json.dumps({"source": "clip-score", "card": {}})})
    assert reward(place) == clip
    with_detector = reward("algorithm={name: ddpo}", "reward.name=emoji-tasks")
    assert with_detector.parameters == sum(p.numel() for p in load_detector().parameters())
