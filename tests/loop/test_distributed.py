"""Two ranks are one process that accumulates two micro-batches, bit for bit: every algorithm, copies or shards.

Run as a program, this file is one of the ranks: all scenarios of a launch share one pair of gloo processes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.loop import rows, run, srpo, tensors
from support.ranks import MAKE, STEPS, Networks, go, identical

import palate
from palate import train as failure
from palate.core import Random
from palate.recipe import GuardSettings
from palate.runtime import checkpoint, distributed
from palate.runtime import launch as launcher
from palate.runtime.errors import InputError, PalateError, RankLostError
from palate.testing import tiny_reward as reward
from palate.train import NonFiniteError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
MEANS = ("srpo", "refl", "draft", "dpo", "opd", "distar")  # their loss is a mean over the batch's samples
KINDS = {"lora": {"training": "lora"}, "full": {"sharding": "full"}}  # copies of adapters; FSDP2


# ------------------------------------------------------------------------------------- what the ranks do

OUTSIDE = -1


def of_rank(rank: int) -> bool:
    return int(os.environ.get("RANK", OUTSIDE)) == rank


class Noticed:
    """SRPO during whose given step rank 1 does something."""

    def __init__(self, step, act, rank=1):
        self.inner, self.at, self.act, self.rank = srpo(), step, act, rank
        self.trains, self.steer, self.control_texts = self.inner.trains, self.inner.steer, self.inner.control_texts
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict

    def step(self, model, reward, batch, rng):
        if rng.step == self.at and of_rank(self.rank):
            self.act()
        yield from self.inner.step(model, reward, batch, rng)


class HalfWay:
    """SRPO that notes after its first loss of step 1 which of the network's gradients are there, as pieces."""

    def __init__(self, said):
        self.inner, self.said = srpo(), said
        self.trains, self.steer = self.inner.trains, self.inner.steer

    def step(self, model, reward, batch, rng):
        for number, loss in enumerate(self.inner.step(model, reward, batch, rng)):
            if number == 1 and rng.step == 1:
                self.said += [p.grad is not None for p in model.parameters("policy")]
            yield loss


class SickEnd:
    """SRPO whose last loss of step 2 is not a number, in the second share."""

    def __init__(self):
        self.inner = srpo()
        self.trains, self.steer = self.inner.trains, self.inner.steer

    def step(self, model, reward, batch, rng):
        sick = rng.step == 2 and rng.ids[0] % 8 == 4
        for loss in self.inner.step(model, reward, batch, rng):
            yield loss._replace(value=loss.value * math.nan) if sick and loss.update else loss


class SickSample:
    """The reward, but not a number for one prompt, in the first half of the run."""

    def __call__(self, images, prompts):
        bad = torch.tensor([math.nan if prompt.endswith("an old tree") else 1.0 for prompt in prompts])
        return reward(images, prompts) * (bad if images.requires_grad else 1.0)


def refuse(images, prompts):
    if images.requires_grad and of_rank(1):
        raise InputError("rank 1 does not know these words")
    return reward(images, prompts)


def together(folder: Path) -> None:
    said = {}
    for name in MAKE:
        for kind, options in KINDS.items():
            go(folder / f"{name}-{kind}", name, **options)
            go(folder / f"{name}-{kind}-and-back", name, steps=3, resume=True, **options)  # begun by one process
    go(folder / "srpo-hybrid", sharding="hybrid")
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if the two were on two machines
    go(folder / "distar-hybrid", "distar", sharding="hybrid")
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    for name in MEANS:
        go(folder / f"{name}-fused", name, dtype=torch.float64)
    go(folder / "srpo-fused-full", dtype=torch.float64, sharding="full")
    for way in ("update", "loss"):
        said[f"pieces after a loss, reduced at each {way}"] = pieces = []
        go(folder / f"srpo-fused-{way}", algorithm=HalfWay(pieces), dtype=torch.float64, sharding="full",
           reduce_gradients=way)  # fmt: skip
    for name in ("one-two", "one-full"):  # begun by one process, in float64
        go(folder / name, dtype=torch.float64, resume=True, sharding="full" if name == "one-full" else "none")
    go(folder / "two-one", dtype=torch.float64, steps=2)
    go(folder / "full-one", dtype=torch.float64, steps=2, sharding="full")
    go(folder / "sqdf-one", "sqdf", steps=2)

    _, outcome = go(folder / "stopped", algorithm=Noticed(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    said["stopped"] = [outcome.step, outcome.exit_code]
    first = Noticed(2, lambda: palate.steer(folder / "steered", ["icy"]), rank=0)
    go(folder / "steered", algorithm=first, guard=GuardSettings(every=2, action="rollback"), preview_every=2,
       check=lambda model, prompts, ids: {"heldout": 1.0 - distributed.ranks().rank})  # fmt: skip
    go(folder / "sick-end", algorithm=SickEnd(), sharding="full")
    for name, sharding in (("sick", "none"), ("sick-full", "full")):
        try:
            go(folder / name, reward=SickSample(), sharding=sharding)
        except NonFiniteError as error:
            said[name] = str(error).split(":")[0]
    try:
        go(folder / "refused", reward=refuse)
    except PalateError as error:
        said["refused"] = [type(error).__name__, str(error), error.exit_code]
    (folder / f"said-{distributed.ranks().rank}.json").write_text(json.dumps(said))


def killed(folder: Path) -> None:
    def die():
        (folder / "died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    go(folder / "run", algorithm=Noticed(3, die), checkpoint_every=1, sharding=os.environ["SHARDING"])


def refused(folder: Path) -> None:
    def fail():
        raise InputError("rank 1 does not know these words")

    go(folder / "run", algorithm=Noticed(2, fail), sharding="full")


def hung(folder: Path) -> None:
    go(folder / "run", algorithm=Noticed(3, lambda: time.sleep(120)), checkpoint_every=1)


def start(folder: Path, what: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return launcher.launch([sys.executable, __file__, what, str(folder)], 2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("pair")
    for name in ("one-two", "one-full"):
        go(folder / name, dtype=torch.float64, steps=2)
    for name in MAKE:
        for kind in KINDS:
            go(folder / f"{name}-{kind}-and-back", name, training=kind, steps=1, micro_batches=2)
    assert start(folder, "together") == 0
    return folder


def furthest(a: Path, b: Path, step: int = STEPS) -> float:
    first, second = tensors(a, step), tensors(b, step)
    assert set(first) == set(second)
    return max(float((first[key] - second[key]).abs().max()) for key in first)


# ---------------------------------------------------------------------------------------------- equalities


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAKE)
def test_two_ranks_are_one_that_accumulates_two_micro_batches(pair, tmp_path, name, kind):
    """Adapters as copies, and all weights cut by FSDP2; also begun on 1 rank, continued on 2 and ended on 1."""
    go(tmp_path, name, training=kind, micro_batches=2)
    back = pair / f"{name}-{kind}-and-back"
    go(back, name, training=kind, micro_batches=2, resume=True)
    for folder in (pair / f"{name}-{kind}", back):
        identical(tmp_path, folder)
        states = [checkpoint.load(f / "checkpoints" / checkpoint.name(STEPS)).state for f in (tmp_path, folder)]
        assert states[0] == states[1]
    assert all(row["grad_norm"] > 1e-5 for row in rows(tmp_path) if row["event"] == "step")  # so the norm was clipped


@pytest.mark.parametrize("name", ["srpo", "distar"])
def test_hybrid_sharding_is_bit_identical_too(pair, tmp_path, name):
    """srpo: two ranks of one machine hold a half each; distar: of two machines, so each holds everything."""
    go(tmp_path, name, micro_batches=2)
    identical(tmp_path, pair / f"{name}-hybrid")


@pytest.mark.parametrize("folder", ["srpo-full", "distar-full", "srpo-hybrid", "distar-hybrid"])
def test_sharded_networks_are_exported_whole(pair, folder):
    averages, adapter = tensors(pair / folder, STEPS), pair / folder / "adapter"
    for part, network in (("policy", adapter), ("assistant", adapter / "assistant")):
        if part == "policy" or folder.startswith("distar"):
            exported = load_file(str(network / "diffusion_pytorch_model.safetensors"))
            for i, (name, _) in enumerate(Networks().net.named_parameters()):
                assert torch.equal(exported[name], averages[f"ema/{part}/{i:04d}"])


def test_ranks_of_a_sharded_network_may_need_different_numbers_of_calls():
    """What makes the equality of "sqdf-fresh" say something: the longest walks of the two shares differ."""
    longest = [
        [
            int(Random(5, step, range(first, first + 4)).integers("index", 0, 5).max())
            for step in range(1, STEPS + 1)
            for first in [8 * (step - 1) + 4 * rank]
        ]
        for rank in (0, 1)
    ]
    assert any(a > b for a, b in zip(*longest, strict=True)) and any(a < b for a, b in zip(*longest, strict=True))


@pytest.mark.parametrize("folder", [*(f"{name}-fused" for name in MEANS), "srpo-fused-full", "srpo-fused-loss"])
def test_two_ranks_are_the_whole_batch_in_one_go(pair, tmp_path, folder):
    """A mean over samples, whose numbers follow from their ids: only the order of additions differs."""
    go(tmp_path, folder.partition("-")[0], dtype=torch.float64)
    assert furthest(tmp_path, pair / folder) <= 1e-12


def test_gradients_that_are_reduced_at_each_loss_are_never_whole_on_a_rank(pair):
    said = json.loads((pair / "said-0.json").read_text())
    assert all(said["pieces after a loss, reduced at each loss"])
    waiting = said["pieces after a loss, reduced at each update"]  # a sum that each rank keeps whole until its end
    assert waiting and not any(waiting)


@pytest.mark.parametrize("folder", ["one-two", "one-full", "two-one", "full-one"])
def test_a_run_goes_on_with_another_number_of_ranks(pair, tmp_path, folder):
    whole, run_folder = tmp_path / "whole", pair / folder
    go(whole, dtype=torch.float64)
    if folder.endswith("-one"):
        go(run_folder, dtype=torch.float64, resume=True)
    assert furthest(whole, run_folder) <= 1e-10


def test_each_share_keeps_its_own_replay_buffer(pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair / "sqdf-one", folder)
    with pytest.raises(ValueError, match="a state for each of its 2 parts of a batch"):
        go(folder, "sqdf", resume=True)
    go(folder, "sqdf", resume=True, micro_batches=2)
    identical(folder, pair / "sqdf-full")


# ----------------------------------------------------------------------------------------------- decisions


def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_step(pair, tmp_path):
    said = [json.loads((pair / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0]["stopped"] == said[1]["stopped"] == [2, 143]
    assert checkpoint.steps(pair / "stopped" / "checkpoints") == [2]
    go(pair / "stopped", resume=True, micro_batches=2)
    identical(pair / "stopped", pair / "srpo-full")


def test_new_words_and_the_guards_verdict_hold_on_all_ranks(pair, tmp_path):
    """Rank 1 measured 1 less than rank 0; had it listened to itself, the ranks would have parted."""
    steered = [row for row in rows(pair / "steered") if row["event"] == "steer"]
    assert [(row["step"], row["positive"]) for row in steered] == [(3, ["icy"])]
    assert {row["verdict"] for row in rows(pair / "steered") if row["event"] == "guard"} == {"base", "ok"}
    assert {path.name for path in (pair / "steered" / "samples").iterdir()} == {f"step-00000{i}" for i in (0, 2, 4)}
    assert not list(pair.rglob(".tmp-*"))


@pytest.mark.parametrize("name", ["sick", "sick-full"])
def test_a_value_on_one_rank_that_is_not_finite_stops_the_update_on_all(pair, tmp_path, name):
    skipped = [row["step"] for row in rows(pair / name) if row["event"] == "skip"]
    alone = tmp_path / "alone"
    said = [json.loads((pair / f"said-{rank}.json").read_text()).get(name) for rank in (0, 1)]
    try:
        go(alone, reward=SickSample(), micro_batches=2)
    except NonFiniteError as error:
        assert said == [str(error).split(":")[0]] * 2
    assert skipped and [row["step"] for row in rows(alone) if row["event"] == "skip"] == skipped
    last = checkpoint.steps(alone / "checkpoints")[-1]
    identical(alone, pair / name, last)
    again = failure.replay(pair / name / "failures" / checkpoint.name(skipped[-1]), Networks(), srpo(), SickSample())
    assert again.reproduced and "an old tree" in again.trace[0]


def test_a_step_that_is_given_up_half_way_leaves_nothing_in_sharded_networks(pair, tmp_path):
    """FSDP adds up the gradients of a step's losses by itself; those of a skipped step must not reach the next one."""
    go(tmp_path, algorithm=SickEnd(), micro_batches=2)
    assert [row["step"] for row in rows(tmp_path) if row["event"] == "skip"] == [2]
    identical(tmp_path, pair / "sick-end")


def test_an_error_of_one_rank_ends_sharded_ones_too(tmp_path, monkeypatch):
    """Rank 0 waits inside a network then; it must neither hang nor hide the exit code of the rank that knows why."""
    monkeypatch.setenv("TIMEOUT", "120")
    began = time.time()
    assert start(tmp_path, "refused") == 2
    assert time.time() - began < 100


def test_an_error_of_one_rank_ends_all_with_its_exit_code(pair):
    said = [json.loads((pair / f"said-{rank}.json").read_text())["refused"] for rank in (0, 1)]
    assert said[0] == ["PeerAbortedError", "rank 1: rank 1 does not know these words", 2]
    assert said[1] == ["InputError", "rank 1 does not know these words", 2]


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_killed_rank_ends_the_job_and_the_run_goes_on_bit_identical(tmp_path, monkeypatch, sharding):
    monkeypatch.setenv("SHARDING", sharding)
    code = start(tmp_path, "killed")
    assert code == 128 + signal.SIGKILL
    assert time.time() - float((tmp_path / "died").read_text()) <= 10
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 2]
    go(tmp_path / "run", resume=True, micro_batches=2)
    go(tmp_path / "whole", micro_batches=2)
    identical(tmp_path / "run", tmp_path / "whole")


@pytest.mark.soak
def test_a_rank_that_hangs_ends_the_job_after_the_time_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMEOUT", "10")
    began = time.time()
    assert start(tmp_path, "hung") == RankLostError.exit_code
    last = max(path.stat().st_mtime for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert time.time() - last <= 10 + 5 + 2 and time.time() - began > 10


# --------------------------------------------------------------------------------------- what is refused


def test_what_cannot_work_is_refused_with_its_remedy(tmp_path):
    with pytest.raises(
        ValueError, match=r"batch_size = 8 cannot be cut into 3 equal parts \(1 ranks x 3 micro_batches\)"
    ):
        go(tmp_path / "a", micro_batches=3)
    with pytest.raises(ValueError, match=r"sharding needs more than one rank.*--nproc"):
        go(tmp_path / "b", sharding="full")
    with pytest.raises(ValueError, match=r"sharding is for model.weights = full"):
        run(tmp_path / "c", sharding="full")
    assert not any((tmp_path / name / "metrics.jsonl").exists() for name in "abc")


def test_the_launcher_reports_the_first_real_failure_and_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 2.0)
    code = "import os, sys, time; r = os.environ['RANK']; time.sleep(60 * (r == '2')); sys.exit({'0': 7, '1': 3}[r])"
    began = time.monotonic()
    assert launcher.launch([sys.executable, "-S", "-c", code], 3) == 3
    assert time.monotonic() - began < 30
    assert launcher.launch([sys.executable, "-S", "-c", "import os; assert os.environ['WORLD_SIZE'] == '2'"], 2) == 0


def test_a_rank_ends_without_the_tear_down_that_gloos_threads_abort():
    code = "import atexit; atexit.register(print, 'torn down'); from palate.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "no-such-recipe"]
    alone = subprocess.run(command, capture_output=True, text=True)
    rank = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RANK": "0"})
    assert (alone.returncode, rank.returncode) == (2, 2) and "no-such-recipe" in rank.stderr
    assert "torn down" in alone.stdout and "torn down" not in rank.stdout


def test_a_rank_alone_in_the_environment_is_named_with_what_is_missing(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    said = r"RANK is set.*WORLD_SIZE, MASTER_ADDR, MASTER_PORT not.*unset RANK"
    with pytest.raises(InputError, match=said), distributed.process_group():
        pass


if __name__ == "__main__":
    code = 0
    try:
        with distributed.process_group(timeout_seconds=float(os.environ.get("TIMEOUT", "60"))):
            globals()[sys.argv[1]](Path(sys.argv[2]))
    except PalateError as error:  # with the exit codes of the command line
        print(repr(error), file=sys.stderr)
        code = error.exit_code
    distributed.exit_process(code)
