"""The loop's promises: exact resume, exact updates, no silent failure, words that change while it runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from importlib import resources

import pytest
import torch
from support import ROOT
from support.loop import STEPS, Quadratic, Steering, rows, run, same, srpo, tensors
from support.ranks import MAKE

import palate
from palate import recipe as recipes
from palate.algorithms.dpo import DPO, DPOSettings
from palate.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from palate.algorithms.nft import NFT, NFTSettings
from palate.core import Loss
from palate.evaluate import generate, quantise, read_samples
from palate.recipe import GuardSettings
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.testing import PROMPTS, TinyFlow
from palate.testing import tiny_reward as reward
from palate.train import NonFiniteError, broken_limits, prompt_order, restore_result
from palate.train.guard import Guard
from palate.train.notes import how_to_continue
from palate.train.python_recipe import HEAD
from palate.train.state import Counters
from palate.train.steering import await_words

# ------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    changes = {3: (["icy"], ["hot"]), 6: (None, ["grey", "pale"])}
    run(folder, algorithm=Steering(folder, changes), ema_decay=0.7, warmup=4, preview_every=4,
        guard=GuardSettings(every=2), check=lambda model, prompts, ids: {"heldout": 1.0})  # fmt: skip
    return folder


@pytest.mark.parametrize("k", range(1, STEPS))
def test_resuming_at_any_step_equals_never_having_stopped(uninterrupted, tmp_path, k):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for step in range(k + 1, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / checkpoint.name(step))
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 8, "eve')  # the crash cut a line short
    run(folder, ema_decay=0.7, warmup=4, preview_every=4, resume=True,
        guard=GuardSettings(every=2), check=lambda model, prompts, ids: {"heldout": 1.0})  # fmt: skip
    assert same(tensors(folder), tensors(uninterrupted))
    assert rows(folder) == rows(uninterrupted)
    assert [(r["step"], r["positive"], r["negative"]) for r in rows(folder) if r["event"] == "steer"] == [
        (4, ["icy"], ["hot"]), (7, None, ["grey", "pale"])
    ]  # fmt: skip
    saved = [checkpoint.load(f / "checkpoints" / checkpoint.name(STEPS)).state for f in (folder, uninterrupted)]
    assert saved[0] == saved[1]
    for name in ("adapter/tiny.safetensors", "samples/step-000008/0000.png"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_crash_while_resuming_does_not_lose_the_words(uninterrupted, tmp_path):
    """Resume from 2, be killed at once, resume again: the words of steps 4 and 7 still come."""
    from palate.train import rewind

    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    first, second = rewind(folder, 2), rewind(folder, 2)
    assert [row["step"] for row in first] == [4, 7] and first == second


def test_words_given_before_a_resume_come_after_the_replayed_ones(uninterrupted, tmp_path):
    """Died with words of steps 4 and 7 after its checkpoint of 2: new words are newer, so they are in force last."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for step in range(3, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / checkpoint.name(step))
    palate.steer(folder, ["new"])
    run(folder, ema_decay=0.7, warmup=4, preview_every=4, resume=True,
        guard=GuardSettings(every=2), check=lambda model, prompts, ids: {"heldout": 1.0})  # fmt: skip
    assert [(r["step"], r["positive"], r["negative"]) for r in rows(folder) if r["event"] == "steer"] == [
        (4, ["icy"], ["hot"]), (7, None, ["grey", "pale"]), (8, ["new"], None)
    ]  # fmt: skip
    assert same(tensors(folder, 7), tensors(uninterrupted, 7))
    saved = checkpoint.load(folder / "checkpoints" / checkpoint.name(STEPS)).state["algorithm"]
    assert saved == {"positive": ["new"], "negative": ["grey", "pale"]}


def test_words_that_were_taken_when_a_kill_came_are_not_taken_twice(uninterrupted, tmp_path):
    """Their event was logged and their file not yet deleted: the resumed run replays them, and that is all."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for step in range(3, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / checkpoint.name(step))
    (folder / "control.json").write_text('{"positive": null, "negative": ["grey", "pale"]}')
    run(folder, ema_decay=0.7, warmup=4, preview_every=4, resume=True,
        guard=GuardSettings(every=2), check=lambda model, prompts, ids: {"heldout": 1.0})  # fmt: skip
    assert rows(folder) == rows(uninterrupted) and not (folder / "control.json").exists()


def test_frequencies_of_previews_and_checkpoints_change_nothing(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    changes = {3: (["icy"], ["hot"]), 6: (None, ["grey", "pale"])}
    run(folder, algorithm=Steering(folder, changes), ema_decay=0.7, warmup=4, checkpoint_every=0)
    assert same(tensors(folder), tensors(uninterrupted))


def test_a_finished_run_can_be_made_longer(tmp_path):
    run(tmp_path / "short", steps=5)
    _, outcome = run(tmp_path / "short", resume=True)
    run(tmp_path / "long")
    assert outcome.step == STEPS and same(tensors(tmp_path / "short"), tensors(tmp_path / "long"))
    _, again = run(tmp_path / "short", resume=True)
    assert again == outcome


def test_resume_refuses_other_settings_and_other_base_weights(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="settings differ"):
        run(tmp_path, resume=True, lr=1e-3)
    model = TinyFlow()
    with torch.no_grad():
        next(model.reference.parameters()).add_(1e-3)
    with pytest.raises(checkpoint.CheckpointError, match="other base weights"):
        run(tmp_path, resume=True, model=model)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    damaged = tmp_path / "b" / "checkpoints" / checkpoint.name(STEPS) / checkpoint.TENSORS
    damaged.write_bytes(damaged.read_bytes()[:-1])
    _, outcome = run(tmp_path / "b", resume=True)
    assert outcome.step == STEPS and same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def test_a_run_goes_on_with_as_many_threads_as_it_began_with(tmp_path):
    """Sums over more of them, or fewer, differ in the last bits."""
    seen, before = [], torch.get_num_threads()

    class Counting(Quadratic):
        def step(self, *given):
            seen.append(torch.get_num_threads())
            yield from super().step(*given)

    try:
        for threads, steps in ((1, 1), (2, 2)):
            torch.set_num_threads(threads)
            run(tmp_path, algorithm=Counting(), steps=steps, resume=steps > 1)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]


@pytest.mark.parametrize("average", [0.0, 0.6])
def test_the_room_that_is_asked_for_is_that_of_the_checkpoints_that_stay(tmp_path, monkeypatch, average):
    """The newest ones that are kept, the guard's best, and the one that is being written."""
    asked = []
    monkeypatch.setattr(checkpoint, "check_space", lambda folder, need: asked.append(need))
    run(tmp_path, algorithm=Quadratic(), steps=2, ema_decay=average, keep_checkpoints=3)
    one = sum(value.numel() * value.element_size() for value in tensors(tmp_path, 2).values())
    assert asked == [pytest.approx(5 * one, rel=0.05)]


def test_the_disk_has_the_log_before_the_checkpoint_and_before_words_that_wait_are_forgotten(tmp_path, monkeypatch):
    """After a power cut a checkpoint would else stand without its rows, and words would be taken up and unknown."""
    events, log = [], tmp_path / "metrics.jsonl"
    sync, unlink, save = os.fsync, os.unlink, checkpoint.save

    def synced(file):
        events.extend(["log"] if log.is_file() and os.path.samestat(os.fstat(file), log.stat()) else [])
        return sync(file)

    def forgotten(path, **options):
        events.extend(["words"] if str(path).endswith("control.json") else [])
        return unlink(path, **options)

    def saved(folder, step, *given):
        events.append(f"step {step}")
        return save(folder, step, *given)

    for where, name, spy in ((os, "fsync", synced), (os, "unlink", forgotten), (checkpoint, "save", saved)):
        monkeypatch.setattr(where, name, spy)
    run(tmp_path, algorithm=Steering(tmp_path, {1: (["icy"], None)}), steps=2)
    before = {event: events[k - 1] for k, event in enumerate(events) if event != "log"}
    assert before == {"step 1": "log", "words": "log", "step 2": "log"}


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, steps=1)
    before = hashlib.sha256((tmp_path / "metrics.jsonl").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="resume=True"):
        run(tmp_path, steps=1)
    assert hashlib.sha256((tmp_path / "metrics.jsonl").read_bytes()).hexdigest() == before


KILLED = """
    import os, signal, sys, traceback
    from pathlib import Path
    from palate.runtime import checkpoint, files
    from support.loop import run

    def train(folder, after):
        count, sync = [0], files.sync
        def kill(path):
            count[0] += 1
            if count[0] == after:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)
        checkpoint.sync = files.sync = kill
        run(folder, ema_decay=0.5, resume=(folder / "checkpoints").exists())

    for after in sys.argv[2:]:  # processes of their own, begun after the imports and before any thread
        child = os.fork()
        if child == 0:
            try:
                train(Path(sys.argv[1]), int(after))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_saves_it_ends_bit_identical(tmp_path):
    """SIGKILL twice, each time inside a save (each save synchronises three times), then run to the end."""
    run(tmp_path / "whole", ema_decay=0.5)
    script = textwrap.dedent(KILLED)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # bit for bit holds for one number of threads
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), "12", "7", "1000000"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stdout.split() == [str(-signal.SIGKILL.value)] * 2 + ["0"], ended.stderr
    assert same(tensors(tmp_path / "killed"), tensors(tmp_path / "whole"))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_resumes_exactly(tmp_path, number, code):
    # a job in the background may have been told to ignore it
    before = signal.signal(number, signal.default_int_handler)

    class Signalled(Steering):
        def step(self, model, reward, batch, rng):
            if rng.step == 3:
                os.kill(os.getpid(), number)
            yield from self.inner.step(model, reward, batch, rng)

    _, outcome = run(tmp_path / "a", algorithm=Signalled(tmp_path, {}), checkpoint_every=0)
    assert (outcome.step, outcome.exit_code) == (3, code)
    assert checkpoint.steps(tmp_path / "a" / "checkpoints") == [3]
    assert signal.signal(number, before) is signal.default_int_handler
    run(tmp_path / "a", resume=True, checkpoint_every=0)
    run(tmp_path / "b", checkpoint_every=0)
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b")) and rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.parametrize("method", ["flow_grpo-released", "nft-released"])
def test_ended_between_two_updates_of_a_batch_it_resumes_exactly(tmp_path, method):
    """A crash takes the step back to the last checkpoint; a signal lets it finish both updates and saves then."""

    class Ended(type(MAKE[method]())):
        def step(self, model, reward, batch, rng):
            ended = False
            for loss in super().step(model, reward, batch, rng):
                yield loss
                if rng.step == 3 and loss.update and not ended:  # the first of two updates is made
                    ended = True
                    signal.raise_signal(signal.SIGTERM) if by_signal else 1 / 0

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = {"steps": 5, "batch_size": 2, "checkpoint_every": 2}
    run(tmp_path / "whole", algorithm=MAKE[method](), **options)
    for by_signal, name, ended_at in ((False, "crash", 2), (True, "signal", 3)):
        with contextlib.nullcontext() if by_signal else pytest.raises(ZeroDivisionError):
            run(tmp_path / name, algorithm=Ended(MAKE[method]().settings), **options)
        assert checkpoint.steps(tmp_path / name / "checkpoints")[-1] == ended_at
        run(tmp_path / name, algorithm=MAKE[method](), resume=True, **options)
        assert same(tensors(tmp_path / name, 5), tensors(tmp_path / "whole", 5))
        assert rows(tmp_path / name) == rows(tmp_path / "whole")
    signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------ updates


def test_the_first_update_is_that_of_adamw(tmp_path):
    """p <- p (1 - lr wd) - lr g / (|g| + eps), g the gradient clipped to a global norm of 0.5 (Loshchilov 2019)."""
    before = [p.detach().clone() for p in TinyFlow().parameters()]
    model, _ = run(tmp_path, algorithm=Quadratic(), steps=1, lr=0.01, weight_decay=0.1, clip_norm=0.5)
    norm = math.sqrt(sum(float((p**2).sum()) for p in before))
    assert norm > 0.5
    for p, q in zip(before, model.parameters(), strict=True):
        g = p * 0.5 / norm
        expected = p * (1 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(q.detach(), expected, rtol=1e-5, atol=1e-7)
    moment = {k: v for k, v in tensors(tmp_path, 1).items() if k.endswith("exp_avg")}
    clipped = math.sqrt(sum(float((v**2).sum()) for v in moment.values())) / 0.1
    assert clipped == pytest.approx(0.5, rel=1e-5)
    (row,) = rows(tmp_path)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5) and row["loss"] == pytest.approx(norm**2 / 2, rel=1e-5)
    assert row["samples"] == 3  # of the batch
    run(tmp_path / "betas", algorithm=Quadratic(), steps=1, clip_norm=0.5, betas=(0.5, 0.9))
    kept = tensors(tmp_path / "betas", 1)
    first, second = (torch.cat([v.flatten() for k, v in kept.items() if k.endswith(m)]) for m in ("avg", "avg_sq"))
    assert float(first.norm()) == pytest.approx(0.5 * 0.5, rel=1e-5)  # (1 - beta1) g, g of norm .5
    assert float(second.sum()) == pytest.approx(0.1 * 0.25, rel=1e-5)  # (1 - beta2) g^2


def test_what_an_algorithm_warns_of_is_said_once(tmp_path, caplog):
    class Lagging(Quadratic):
        def warnings(self, rates):
            return ["it lags behind"]

    with caplog.at_level("INFO", logger="palate"):
        run(tmp_path, algorithm=Lagging(), steps=3)
    assert caplog.text.count("it lags behind") == 1


def test_losses_without_an_update_accumulate(tmp_path):
    one, _ = run(tmp_path / "one", algorithm=Quadratic(1), steps=2)
    four, _ = run(tmp_path / "four", algorithm=Quadratic(4), steps=2)
    for p, q in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert rows(tmp_path / "four")[0]["loss"] == pytest.approx(rows(tmp_path / "one")[0]["loss"], rel=1e-5)


def test_warmup_and_average_follow_their_formulas(tmp_path):
    run(tmp_path, algorithm=Quadratic(), steps=5, lr=0.02, warmup=4, ema_decay=0.6)
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02])
    average = [p.detach().clone() for p in TinyFlow().parameters()]
    for step in range(1, 6):
        saved = tensors(tmp_path, step)
        average = [0.6 * a + 0.4 * saved[f"weights/policy/{i:04d}"] for i, a in enumerate(average)]
        for i, a in enumerate(average):
            torch.testing.assert_close(saved[f"ema/policy/{i:04d}"], a, rtol=1e-5, atol=1e-7)


def test_the_average_moves_every_so_many_steps(tmp_path):
    """trainer.ema_every = 2: after 2 and 4 steps, from where it stood; a resumed run does the same."""
    run(tmp_path / "whole", algorithm=Quadratic(), steps=5, lr=0.02, ema_decay=0.6, ema_every=2)
    average = [p.detach().clone() for p in TinyFlow().parameters()]
    for step in range(1, 6):
        saved = tensors(tmp_path / "whole", step)
        if step % 2 == 0:
            average = [0.6 * a + 0.4 * saved[f"weights/policy/{i:04d}"] for i, a in enumerate(average)]
        for i, a in enumerate(average):
            torch.testing.assert_close(saved[f"ema/policy/{i:04d}"], a, rtol=1e-5, atol=1e-7)
    for steps in (3, 5):
        run(tmp_path / "parts", algorithm=Quadratic(), steps=steps, lr=0.02, ema_decay=0.6, ema_every=2,
            resume=steps == 5)  # fmt: skip
    assert same(tensors(tmp_path / "whole", 5), tensors(tmp_path / "parts", 5))


def test_an_average_that_would_never_move_is_refused_before_the_run(tmp_path):
    """The result would be the weights that it began with. A run may end at its first move."""
    average = {"algorithm": Quadratic(), "ema_decay": 0.9, "ema_every": 4}
    with pytest.raises(InputError, match=r"trainer.ema_every: .* first moves at step 4, .* trainer.steps=3; set"):
        run(tmp_path / "no", steps=3, **average)
    assert not (tmp_path / "no").exists()
    model, _ = run(tmp_path / "yes", steps=4, **average)
    restore_result(model, tmp_path / "yes", warn=pytest.fail)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), TinyFlow().parameters(), strict=True))


def test_one_image_of_a_pair_may_be_absent_and_nothing_else_may(tmp_path):
    """Single likes reach kto through `train`; latents that are broken are named as before."""
    pairs = torch.zeros(len(PROMPTS), 2, 3, 4, 4)
    pairs[::2, 1] = math.nan
    run(tmp_path / "likes", algorithm=DPO(DPOSettings(beta=10.0, loss="kto")), latents=pairs, steps=1)
    for where in ((0, 0), (1, 0, 0, 0, 0)):  # the whole pair; a single number
        broken = pairs.clone()
        broken[where] = math.nan
        with pytest.raises(InputError, match=f"the latents of image {where[0]} .* are not finite"):
            run(tmp_path / "no", algorithm=DPO(DPOSettings(loss="kto")), latents=broken, steps=1)


def test_the_result_is_the_average_and_the_weights_stay(tmp_path):
    from safetensors.torch import load_file

    model, _ = run(tmp_path, algorithm=Quadratic(), steps=4, ema_decay=0.6)
    saved, adapter = tensors(tmp_path, 4), load_file(str(tmp_path / "adapter" / "tiny.safetensors"))
    fresh = TinyFlow()
    assert restore_result(fresh, tmp_path, warn=pytest.fail) == 4
    for i, p in enumerate(model.parameters()):
        assert torch.equal(p, saved[f"weights/policy/{i:04d}"])
        assert torch.equal(adapter[str(i)], saved[f"ema/policy/{i:04d}"])
        assert torch.equal(fresh.parameters()[i], adapter[str(i)])
        assert not torch.equal(p, adapter[str(i)])


def test_guard_and_previews_look_at_the_average(tmp_path):
    """They judge what the run will hand over, and not the weights that train."""
    seen = []

    def check(model, prompts, ids):
        seen.append([p.detach().clone() for p in model.parameters()])
        return {"heldout": 1.0}

    run(tmp_path, algorithm=Quadratic(), steps=4, lr=0.05, ema_decay=0.6, preview_every=4,
        guard=GuardSettings(every=2), check=check)  # fmt: skip
    for step, looked in zip((2, 4), seen[1:], strict=True):
        saved = tensors(tmp_path, step)
        assert all(torch.equal(p, saved[f"ema/policy/{i:04d}"]) for i, p in enumerate(looked))
        assert not all(torch.equal(p, saved[f"weights/policy/{i:04d}"]) for i, p in enumerate(looked))
    fresh = TinyFlow()
    restore_result(fresh, tmp_path, warn=pytest.fail)
    images, shown = read_samples(tmp_path / "samples" / checkpoint.name(4))
    assert torch.equal(images, quantise(generate(fresh, [row["prompt"] for row in shown], [0])))


def test_prompts_each_come_once_an_epoch_in_an_order_that_any_slice_agrees_on():
    whole = prompt_order(7, 3, 0, 21)
    assert all(sorted(whole[e : e + 7]) == list(range(7)) for e in (0, 7, 14)) and whole[:7] != whole[7:14]
    assert [i for first in range(0, 21, 3) for i in prompt_order(7, 3, first, 3)] == whole
    assert prompt_order(7, 4, 0, 21) != whole


def test_real_images_keep_their_captions(tmp_path):
    """Offline: row i of the batch's latents belongs to row i of its prompts."""
    seen = []

    class Look(Quadratic):
        def step(self, model, reward, batch, rng):
            seen.extend(zip(batch.prompts, batch.latents[:, 0, 0, 0].tolist(), batch.ids.tolist(), strict=True))
            yield from super().step(model, reward, batch, rng)

    latents = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    run(tmp_path, algorithm=Look(), latents=latents)
    assert all(PROMPTS[int(value)] == prompt for prompt, value, _ in seen)
    assert [i for *_, i in seen] == list(range(STEPS * 3))


# ------------------------------------------------------------------------------------------------- failures


class Sick:
    """The reward, but not finite during the given steps (each step scores twice: once a branch)."""

    def __init__(self, steps, value=math.nan):
        self.steps, self.value, self.calls = set(steps), value, -1

    def __call__(self, images, prompts):
        self.calls += 1
        step = self.calls // 4  # two branches, two words; before training one call for shapes and three for words
        return reward(images, prompts) * (self.value if step in self.steps else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(tmp_path, value):
    _, outcome = run(tmp_path, reward=Sick({3, 5}, value))
    assert outcome.reason == "finished"
    skipped = [(row["step"], row["in_a_row"]) for row in rows(tmp_path) if row["event"] == "skip"]
    assert skipped == [(3, 1), (5, 1)]
    assert [row["step"] for row in rows(tmp_path) if row["event"] == "step"] == [1, 2, 4, 6, 7, 8]
    assert same(tensors(tmp_path, 2), tensors(tmp_path, 3)) and not same(tensors(tmp_path, 3), tensors(tmp_path, 4))
    assert checkpoint.load(tmp_path / "checkpoints" / checkpoint.name(8)).state["skipped"] == 2


def test_three_in_a_row_stop_the_run_and_keep_the_last_good_weights(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 5.*3 times in a row"):
        run(tmp_path, reward=Sick({3, 4, 5}), checkpoint_every=0)
    assert checkpoint.steps(tmp_path / "checkpoints") == [5]
    run(tmp_path.with_name("good"), steps=2)
    assert same(tensors(tmp_path, 5), tensors(tmp_path.with_name("good"), 2))
    bundle = checkpoint.load(tmp_path / "failures" / checkpoint.name(5))
    assert bundle.step == 5 and len(bundle.state["prompts"]) == 3


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too(tmp_path):
    class Root(Quadratic):
        def step(self, model, reward, batch, rng):
            p = model.parameters()[0]
            yield Loss(((p - p.detach()).abs() + 0.0).sqrt().sum() + (p**2).sum(), {}, "policy")

    with pytest.raises(NonFiniteError, match="norm of the policy gradient"):
        run(tmp_path, algorithm=Root())


def test_a_loss_without_gradient_is_refused_with_its_likely_cause(tmp_path):
    with pytest.raises(ValueError, match=r"no gradient.*reward is not differentiable"):
        run(tmp_path / "a", reward=lambda images, prompts: reward(images.detach(), prompts), algorithm=srpo())

    class Detached(TinyFlow):
        def predict(self, *arguments, **options):
            with torch.no_grad():
                return super().predict(*arguments, **options)

    with pytest.raises(ValueError, match=r"no gradient.*model.predict loses"):
        run(tmp_path / "b", model=Detached())

    class Blind(TinyFlow):
        def decode(self, latents):
            return super().decode(latents).detach()

    with pytest.raises(ValueError, match=r"no gradient.*model.decode"):
        run(tmp_path / "c", model=Blind())

    class OtherNetwork(Quadratic):
        def step(self, model, reward, batch, rng):
            yield Loss(torch.ones(1, requires_grad=True).sum(), {}, "policy")

    guard = GuardSettings(every=2, prompts=4)  # its first look leaves a checkpoint of step 0
    for resume in (False, True):
        with pytest.raises(ValueError, match="policy gradient of step 1 is zero in all 4 tensors"):
            run(tmp_path / "d", algorithm=OtherNetwork(), guard=guard, resume=resume)
    with pytest.raises(ValueError, match=r"does not read the prompt.*algorithm.preference=absolute"):
        run(tmp_path / "e", reward=lambda images, prompts: images.mean((1, 2, 3)))
    run(tmp_path / "f", reward=lambda images, prompts: images.mean((1, 2, 3)), algorithm=srpo(preference="absolute"))


def test_rewards_that_are_all_alike_end_no_run_that_compares_them(tmp_path):
    """A group without a best image has no gradient; from the next step on there may be one."""
    algorithm = FlowGRPO(FlowGRPOSettings(group=2, steps=2, guidance=1.0))
    for kind, none in (("tensor", lambda x, prompts: torch.zeros(len(x))), ("list", lambda x, prompts: [0.0] * len(x))):
        outcome = run(tmp_path / kind, algorithm=algorithm, reward=none, steps=2, batch_size=1)[1]
        assert outcome.step == 2


def test_the_first_look_stands_once_in_the_log_of_a_run_that_died_before_its_second_checkpoint(tmp_path):
    def dies(images, prompts):
        if (tmp_path / "died" / "checkpoints").exists():  # in the first step
            raise KeyboardInterrupt
        return reward(images, prompts)

    looks = {"guard": GuardSettings(every=2, prompts=2), "check": lambda model, prompts, i: {"diversity": 1.0}}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "died", reward=dies, steps=2, checkpoint_every=2, **looks)
    assert [path.name for path in (tmp_path / "died" / "checkpoints").iterdir()] == [checkpoint.name(0)]
    run(tmp_path / "died", steps=2, checkpoint_every=2, resume=True, **looks)
    run(tmp_path / "whole", steps=2, checkpoint_every=2, **looks)
    assert rows(tmp_path / "died") == rows(tmp_path / "whole")


def test_the_reward_of_the_page_on_adding_trains(tmp_path):
    page = (ROOT / "docs" / "adding.md").read_text("utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    for part, small in (
        ("runs/contrast", str(tmp_path)),
        ("steps=10", "steps=1, batch_size=2, progress=False"),
        ("SRPOSettings(", "SRPOSettings(rollout_steps=2, "),
    ):
        assert part in code
        code = code.replace(part, small)
    exec(code, {})
    assert [row["event"] for row in rows(tmp_path)] == ["step"]


@pytest.mark.parametrize(("bad", "message"), [
    (lambda images, prompts: reward(images, prompts)[:, None],
     r"shape \(2, 1\) for 2 images; expected a tensor of shape \(2,\)"),
    (lambda images, prompts: float(images.mean()), "returned float"),
    (lambda images, prompts: reward(images, prompts) * math.nan, "expected finite numbers"),
])  # fmt: skip
def test_a_reward_of_the_wrong_kind_is_refused_before_the_first_step(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", reward=bad)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_bad_arguments_are_all_named(tmp_path):
    with pytest.raises(ValueError) as caught:
        run(tmp_path, steps=0, lr=-1.0, ema_decay=1.0, keep_checkpoints=1)
    assert all(name in str(caught.value) for name in ("steps", "lr", "ema_decay", "keep_checkpoints"))
    with pytest.raises(ValueError, match="no prompts"):
        run(tmp_path, prompts=[])
    with pytest.raises(ValueError, match="unknown word"):
        run(tmp_path, prompts=["fine", "an unknownword"], seed=0)
    with pytest.raises(ValueError, match="2 latents and 5 prompts"):
        run(tmp_path, latents=torch.zeros(2, 3, 4, 4))


# ------------------------------------------------------------------------------------------------- steering


def test_new_words_hold_from_the_next_step_and_equal_a_run_that_began_with_them(tmp_path):
    """Words changed during step 1 = words of the state from step 2: same losses as if loaded at a resume of step 1."""
    run(tmp_path / "a", algorithm=Steering(tmp_path / "a", {1: (["icy"], ["hot"])}), steps=3)
    run(tmp_path / "b", steps=3)
    a, b = ([row for row in rows(tmp_path / name) if row["event"] == "step"] for name in "ab")
    assert a[0] == b[0] and a[1] != b[1]
    assert not (tmp_path / "a" / "control.json").exists()
    saved = checkpoint.load(tmp_path / "a" / "checkpoints" / "step-000002")
    assert saved.state["algorithm"] == {"positive": ["icy"], "negative": ["hot"]}


def test_words_that_are_refused_do_not_end_the_run(tmp_path):
    def fussy(images, prompts):
        if any("gibberish" in p for p in prompts):
            raise ValueError("unknown word gibberish")
        return reward(images, prompts)

    a, b = tmp_path / "a", tmp_path / "b"
    changes = {1: (["gibberish"], None), 3: (["icy", "gibberish"], None), 4: (["icy"], ["hot", "gibberish"])}
    run(a, algorithm=Steering(a, changes), reward=fussy)
    run(b)
    refused = [row for row in rows(a) if row["event"] == "steer_refused"]
    assert [(row["step"], row["reason"].split(":")[0]) for row in refused] == [
        (2, "algorithm.positive"),
        (4, "algorithm.positive"),
        (5, "algorithm.negative"),
    ]
    assert [row for row in rows(a) if row not in refused] == rows(b) and same(tensors(a), tensors(b))
    assert not (a / "control.json").exists()
    with open(b / "metrics.jsonl", "a") as log:  # a run that an earlier version let take such words up
        log.write('{"step": 9, "event": "steer", "positive": ["icy", "gibberish"], "negative": null}\n')
    assert run(b, reward=fussy, resume=True, steps=10)[1].reason == "finished"
    assert rows(b)[STEPS]["event"] == "steer_refused"


def test_unknown_words_of_the_recipe_are_refused_before_the_run_begins(tmp_path):
    def fussy(images, prompts):
        if "gibberish" in prompts[0]:
            raise ValueError("unknown word gibberish")
        return reward(images, prompts)

    for side in ("positive", "negative"):
        with pytest.raises(ValueError, match=f"algorithm.{side}: unknown word"):
            run(tmp_path / "run", reward=fussy, algorithm=srpo(**{side: ("fine", "gibberish")}))
    assert not (tmp_path / "run").exists()


def test_a_run_s_answer_is_the_one_to_the_newest_words(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"step": 1, "event": "step"}\n{"step": 2, "event": "steer", "positive": ["old"], "negative": null}\n'
    )
    assert await_words(tmp_path, 2, 0.0) is None
    with log.open("a") as file:
        file.write('{"step": 3, "event": "step"}\n{"step": 4, "event": "steer_refused", "reason": "no"}\n')
    assert await_words(tmp_path, 2, 9.0)["step"] == 4


def test_words_given_while_others_wait_join_them(tmp_path):
    class Twice(Steering):
        def step(self, model, reward, batch, rng):
            if rng.step in (2, 3):  # in step 3 those of step 2 have been read, but not yet been logged
                palate.steer(self.folder, [f"icy{rng.step}"])
                palate.steer(self.folder, None, ["hot"])
            yield from self.inner.step(model, reward, batch, rng)

    run(tmp_path, algorithm=Twice(tmp_path, {}), steps=4)
    steered = [(row["step"], row["positive"], row["negative"]) for row in rows(tmp_path) if row["event"] == "steer"]
    assert steered == [(3, ["icy2"], ["hot"]), (4, ["icy3"], ["hot"])]


@pytest.mark.parametrize(
    "junk", [b"", b"{", b"[]", b'{"positive": 3}', b"\xff\xfe", b'{"positive": 3, "negative": null}']
)
def test_a_broken_control_file_is_ignored(tmp_path, junk):
    class Junk(Steering):
        def step(self, model, reward, batch, rng):
            if rng.step == 2:
                (self.folder / "control.json").write_bytes(junk)
            yield from self.inner.step(model, reward, batch, rng)

    _, outcome = run(tmp_path, algorithm=Junk(tmp_path, {}))
    assert outcome.reason == "finished" and not (tmp_path / "control.json").exists()
    assert all(row["event"] == "step" for row in rows(tmp_path))


@pytest.mark.parametrize(("name", "known"), [("emoji", False), ("clip-score", True)])
def test_the_reward_that_is_asked_decides_which_words_may_be_steered_to(tmp_path, name, known):
    """The embedded model never sees them, so its vocabulary counts where its own reward does."""
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipes.read("srpo-emoji", [f"reward={{name: {name}}}"])))
    with contextlib.nullcontext() if known else pytest.raises(InputError, match=r"^positive: .*dreamlike"):
        palate.steer(tmp_path, ["dreamlike"])
    assert (tmp_path / "control.json").exists() == known


def test_words_are_checked_together_with_those_that_wait(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipes.read("srpo-emoji")))
    palate.steer(tmp_path, ["outline"])
    with pytest.raises(InputError, match="both be outline"):
        palate.steer(tmp_path, None, ["outline"])
    assert json.loads((tmp_path / "control.json").read_text()) == {"positive": ["outline"], "negative": None}


def test_steer_checks_what_it_is_given(tmp_path):
    with pytest.raises(ValueError, match="not a run"):
        palate.steer(tmp_path, ["3d"])
    (tmp_path / "metrics.jsonl").touch()
    for words in ((None, None), (["3d", " "], None), ("3d", None), (None, [3])):
        with pytest.raises(ValueError):
            palate.steer(tmp_path, *words)
    palate.steer(tmp_path, [" 3d "])
    assert json.loads((tmp_path / "control.json").read_text()) == {"positive": ["3d"], "negative": None}
    recipe = resources.files("palate") / "recipes"
    (tmp_path / "recipe.yaml").write_text((recipe / "refl-emoji.yaml").read_text("utf-8"))
    with pytest.raises(ValueError, match="trains with refl, which has no control words"):
        palate.steer(tmp_path, ["3d"])
    (tmp_path / "recipe.yaml").write_text((recipe / "srpo-emoji.yaml").read_text("utf-8"))
    palate.steer(tmp_path, None, ["flat"])
    assert json.loads((tmp_path / "control.json").read_text()) == {"positive": ["3d"], "negative": ["flat"]}
    steered = {"step": 3, "event": "steer", "positive": ["cartoon"], "negative": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(steered) + "\n")
    (tmp_path / "control.json").unlink()  # as the run does that has taken it
    with pytest.raises(ValueError, match="both be cartoon"):  # of the words in force now, not of the recipe's
        palate.steer(tmp_path, None, ["cartoon"])


# --------------------------------------------------------------------------------------------------- guard


class Checks:
    """Scripted measurements: the value at each call, the first one being the base model's."""

    def __init__(self, *values, key="heldout"):
        self.values, self.key = list(values), key

    def __call__(self, model, prompts, ids):
        assert len(prompts) == len(ids) == len(set(ids)) and len(set(prompts)) * 2 == len(prompts)
        return {self.key: self.values.pop(0)}


def test_the_guard_stops_and_the_result_is_the_best_step(tmp_path):
    guard = GuardSettings(every=2, heldout_drop=0.1)
    _model, outcome = run(tmp_path, guard=guard, check=Checks(1.0, 0.95, 0.92, 0.85), checkpoint_every=0)
    assert outcome.step == 6 and outcome.exit_code == 0 and "heldout fell from 1 to 0.85" in outcome.reason
    run(tmp_path.with_name("four"), steps=4)
    assert same(tensors(tmp_path, 6), tensors(tmp_path.with_name("four"), 4))
    events = [
        (row["step"], row["verdict"] == "ok", row.get("best_step")) for row in rows(tmp_path) if row["event"] == "guard"
    ]
    assert events == [(0, False, None), (2, True, 2), (4, True, 4), (6, False, 4)]
    _, again = run(tmp_path, guard=guard, check=Checks(), checkpoint_every=0, steps=STEPS + 4, resume=True)
    assert again == outcome  # more steps are for a run that had too few of them


def test_the_guard_keeps_the_highest_of_the_named_metric(tmp_path):
    checks = Checks(1.0, 3.0, 2.0, 2.5, -9.0)
    _, outcome = run(
        tmp_path, guard=GuardSettings(every=2, best="heldout"), check=checks, checkpoint_every=1, keep_checkpoints=2
    )
    assert "guard" in outcome.reason
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 7, 8]
    assert same({k: v for k, v in tensors(tmp_path).items()}, tensors(tmp_path, 2))


def test_a_best_metric_that_does_not_exist_is_refused_after_one_step(tmp_path):
    with pytest.raises(ValueError, match=r"trainer.guard.best: there is no metric 'nope'.*grad_norm, heldout, loss"):
        run(tmp_path, guard=GuardSettings(every=4, best="nope"), check=Checks(1.0))
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]


def test_the_guard_takes_the_mean_of_a_metric_over_the_steps_that_have_it():
    """A metric that every fourth step logs, higher in each window: the windows with fewer of its rows are no worse,
    one without any is not the best, and a step without it ends no run that has seen it, also after a resume."""
    guard = Guard(GuardSettings(every=10, best="prefers"))
    guard.begin({"heldout": 1.0})
    best = []
    for step in range(1, 41):
        logged = {"prefers": 1 + 0.1 * (step // 10)} if (step - 1) % 4 == 0 and step < 31 else {}
        guard.add({"grad_norm": 1.0} | logged)
        if step % 7 == 0:
            resumed = Guard(guard.settings)
            resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
            guard = resumed
        if step % 10 == 0:
            best.append((guard.decide(step, {"heldout": 1.0}).row["best_step"], guard.state.best_value))
    assert best == [(10, 1.0), (20, pytest.approx(1.1)), (30, pytest.approx(1.2)), (30, pytest.approx(1.2))]


def test_an_older_checkpoint_of_the_guard_has_one_count_for_all_metrics():
    old = {"base": {}, "best_step": 0, "best_value": None, "rollbacks": 1, "sums": {"reward": 6.0}, "steps": 3}
    guard = Guard(GuardSettings(every=4, best="reward"))
    guard.load_state_dict(old)
    assert guard.state.means() == {"reward": 2.0}
    guard.add({"grad_norm": 1.0})  # a step without it
    guard.add({"grad_norm": 1.0, "reward": 4.0})
    assert guard.decide(4, {}).row["best_step"] == 4 and guard.state.best_value == 2.5


def test_a_best_metric_may_come_later_than_a_step_without_gradient():
    """DPO in a step of ties alone, Diff-Instruct* while its assistant warms up, also beyond a check."""
    guard = Guard(GuardSettings(every=2, best="prefers"))
    guard.begin({"heldout": 1.0})
    for step in (1, 2):
        guard.add({"grad_norm": 0.0} if step == 1 else {"grad_norm_assistant": 1.0})
    assert guard.decide(2, {"heldout": 1.0}).row["best_step"] == 0
    guard.add({"grad_norm": 1.0, "prefers": 0.5})
    assert guard.decide(4, {"heldout": 1.0}).row["best_step"] == 4


def test_the_guard_rolls_back_with_half_the_rate_and_then_stops(tmp_path):
    guard = GuardSettings(every=2, action="rollback", rollbacks=1)
    _, outcome = run(tmp_path, guard=guard, check=Checks(1.0, 1.0, 0.0, 0.0), checkpoint_every=2)
    assert outcome.step == 6 and "guard" in outcome.reason
    assert same(tensors(tmp_path, 4), tensors(tmp_path, 2)) and same(tensors(tmp_path, 6), tensors(tmp_path, 2))
    assert [row["lr"] for row in rows(tmp_path) if row["event"] == "step"] == pytest.approx([1e-2] * 4 + [5e-3] * 2)
    halves = tmp_path.with_name("halves")  # stopped after it went back: the rate and the count of rollbacks stay
    run(halves, guard=guard, check=Checks(1.0, 1.0, 0.0), checkpoint_every=2, steps=5)
    _, resumed = run(halves, guard=guard, check=Checks(0.0), checkpoint_every=2, resume=True)
    assert rows(halves) == rows(tmp_path) and resumed.reason == outcome.reason


def test_a_rollback_takes_the_algorithms_memory_back_too(tmp_path):
    """Else DiffusionNFT would go on drawing its samples with old weights that stand beyond the limit, and be mirrored
    about them, and DPO be held to a reference from there."""
    slow = NFT(NFTSettings(group=2, steps=2, n=1, old_rate=1.0, old_most=0.9))
    guard = GuardSettings(every=2, action="rollback", rollbacks=1)
    run(tmp_path, algorithm=slow, guard=guard, check=Checks(1.0, 1.0, 0.0, 1.0), steps=6, checkpoint_every=2)
    before, after, later = (tensors(tmp_path, step) for step in (2, 4, 6))
    old, weights = ([t for k, t in before.items() if k.startswith(p)] for p in ("algorithm/", "weights/"))
    assert old and not all(torch.equal(a, b) for a, b in zip(old, weights, strict=True))
    assert same(before, after) and not same(after, later)


def test_new_words_begin_the_search_for_the_best_anew(tmp_path):
    """What was reached under other words, by a check or by the steps before it, does not compare."""
    run(tmp_path, algorithm=Steering(tmp_path, {3: (["icy"], None)}), check=Checks(1.0, 3.0, 2.0, 1.5), steps=6,
        guard=GuardSettings(every=2, best="heldout"))  # fmt: skip
    best = [row["best_step"] for row in rows(tmp_path) if row["event"] == "guard" and row["step"]]
    assert best == [2, 4, 4]
    guard = Guard(GuardSettings(every=2, best="reward"))
    guard.begin({"heldout": 1.0})
    guard.add({"reward": 9.0})
    guard.forget_best()
    guard.add({"reward": 1.0})
    guard.decide(2, {"heldout": 1.0})
    assert guard.state.best_value == 1.0


def test_words_stay_in_force_where_the_guard_goes_back(tmp_path):
    guard = GuardSettings(every=2, action="rollback", rollbacks=1)
    run(tmp_path, algorithm=Steering(tmp_path, {3: (["icy"], None)}), check=Checks(1.0, 1.0, 0.0, 1.0), guard=guard,
        steps=6, checkpoint_every=2)  # fmt: skip
    assert same(tensors(tmp_path, 4), tensors(tmp_path, 2))
    saved = [checkpoint.load(tmp_path / "checkpoints" / checkpoint.name(step)).state for step in (2, 4, 6)]
    assert [state["algorithm"]["positive"] for state in saved] == [["warm"], ["icy"], ["icy"]]


def test_the_guard_can_only_warn(tmp_path):
    run(tmp_path / "a", guard=GuardSettings(every=2, action="warn"), check=Checks(1.0, 0.0, 0.0, 0.0, 0.0))
    run(tmp_path / "b")
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def test_limits_are_absolute_falls_and_a_ratio():
    guard = GuardSettings(heldout_drop=0.1, concept_drop=0.05, diversity_ratio=0.8)
    base = {"heldout": 0.5, "concept": 0.9, "diversity": 0.5}
    assert broken_limits({"heldout": 0.41, "concept": 0.86, "diversity": 0.41}, base, guard) == []
    for key, value in (("heldout", 0.39), ("concept", 0.84), ("diversity", 0.39)):
        (broken,) = broken_limits({**base, key: value}, base, guard)
        assert broken.startswith(key)
    assert len(broken_limits({"heldout": math.nan, "concept": 0.0, "diversity": math.nan}, base, guard)) == 3


# --------------------------------------------------------------------------------------------------- records


def test_the_run_folder_holds_what_is_promised(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"metrics.jsonl", "environment.json", "samples", "checkpoints", "adapter"} <= names
    assert sorted(p.name for p in (uninterrupted / "samples").iterdir()) == [
        "step-000000",
        "step-000004",
        "step-000008",
    ]
    index = [(p / "index.jsonl").read_text() for p in sorted((uninterrupted / "samples").iterdir())]
    assert index[0] == index[1] == index[2] and len(index[0].splitlines()) == len(PROMPTS)
    first = json.loads(index[0].splitlines()[0])
    assert set(first) == {"file", "prompt", "seed", "guidance", "steps"}
    assert not list(uninterrupted.rglob(".tmp-*"))


@pytest.mark.soak
def test_two_thousand_steps_leave_memory_and_files_flat(tmp_path):
    import gc

    import psutil

    process, marks = psutil.Process(), []

    def look(model, prompts, ids):
        gc.collect()
        marks.append((process.memory_info().rss, process.num_fds()))
        return {"heldout": 1.0}

    run(tmp_path, steps=2000, keep_checkpoints=2, checkpoint_every=50, guard=GuardSettings(every=200), check=look)
    assert marks[-1][0] - marks[3][0] < 8 << 20 and marks[-1][1] == marks[3][1]


def test_a_metric_that_is_no_number_does_not_end_a_guarded_run(tmp_path):
    """It is left out of the means by which the best step is chosen, and of the checkpoint, which holds numbers."""

    class Odd(Steering):
        def step(self, model, reward, batch, rng):
            for loss in self.inner.step(model, reward, batch, rng):
                value = math.nan if rng.step == 2 else float(rng.step)
                yield loss._replace(metrics=loss.metrics | {"odd": torch.tensor(value)})

    guard = GuardSettings(every=2, best="odd")
    _, outcome = run(tmp_path, algorithm=Odd(tmp_path, {}), steps=4, guard=guard, check=lambda *given: {"heldout": 1.0})
    kept = checkpoint.load(tmp_path / "checkpoints" / checkpoint.name(4)).state["guard"]
    assert outcome.reason == "finished" and (kept["best_step"], kept["best_value"]) == (4, 3.5)


def test_a_guard_that_cannot_compare_says_so_before_the_first_step(tmp_path):
    guard = GuardSettings(every=2)
    with pytest.raises(InputError, match=r"^trainer.guard: heldout is nan before training"):
        run(tmp_path, steps=4, guard=guard, check=lambda *given: {"heldout": math.nan})


@pytest.mark.parametrize(
    ("text", "way"), [(None, "more steps"), ("# Begun from", "resume=True"), ("a: 1", "`palate r")]
)
def test_how_a_finished_run_goes_on_is_told_as_it_works(tmp_path, text, way):
    """A round of a search has no recipe of its own, and a run that Python began is gone on with from there."""
    if text:
        (tmp_path / "recipe.yaml").write_text(HEAD if text.startswith("#") else text)
    assert way in how_to_continue(Counters(step=4, finished="finished"), tmp_path)


class Ending:
    """SRPO whose last loss of a step names no weights, or whose metrics have a name of the log's own."""

    def __init__(self, *, update="policy", metric=None):
        self.inner, self.update, self.metric = srpo(), update, metric
        self.trains, self.steer = self.inner.trains, self.inner.steer

    def step(self, model, reward, batch, rng):
        for loss in self.inner.step(model, reward, batch, rng):
            metrics = loss.metrics | ({self.metric: torch.tensor(1.0)} if self.metric else {})
            yield loss._replace(update=loss.update and self.update, metrics=metrics)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"update": None}, "last loss names no weights"), ({"metric": "step"}, "metric is named step")],
)
def test_a_step_that_could_not_count_is_refused_and_the_folder_can_be_used_again(tmp_path, wrong, said):
    """What fails before its first step leaves nothing in the way of the next try, whatever the caller's autograd."""
    with pytest.raises(InputError, match=said):
        run(tmp_path, algorithm=Ending(**wrong), steps=2)
    with torch.no_grad():
        _, outcome = run(tmp_path, algorithm=Ending(), steps=2)
    assert outcome.step == 2 and [row["step"] for row in rows(tmp_path) if row["event"] == "step"] == [1, 2]
    with pytest.raises(InputError, match="already holds a run"):
        run(tmp_path, algorithm=Ending(), steps=2)


def test_a_reward_that_changes_its_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="the reward changed the images"):
        run(tmp_path, reward=lambda images, prompts: images.mul_(0.5).mean((1, 2, 3)))
