"""Nothing is lost: kills, signals, full disks, lack of memory and malformed files.

docs/reliability.md lists the figures.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import statistics
import time
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import UNet2DModel
from support import ROOT
from support.checkpoints import write
from support.commands import short
from support.loop import rows
from support.ranks import MAKE, go, identical

from palate import recipe
from palate.models import delta
from palate.models.saved import save_network
from palate.recipe import GuardSettings, TrainerSettings
from palate.runtime import checkpoint, sharding
from palate.runtime.distributed import Ranks
from palate.runtime.files import new_folder
from palate.testing import TinyFlow
from palate.testing import tiny_reward as reward
from palate.train import OutOfMemoryError, memory_savings, read_metrics
from palate.train import train as palate_train
from palate.train.batches import Batches
from palate.train.saving import Saver

pytestmark = pytest.mark.usefixtures("one_thread")
SAVE_PARTS = ("write_durably", "sync", "replace", "save_file")
OTHERS = [name for name in MAKE if name != "srpo"]


# ------------------------------------------------------------------------------------------------- kill -9


class Clock:
    """Counts what a run does (network calls, rewards, updates, every write of a save) and acts at the n-th of them."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1, act=None):
        self.count, self.saving, self.at, self.act = 0, [], at, act
        for name in SAVE_PARTS:
            patch.setattr(checkpoint, name, self.ticking(getattr(checkpoint, name), saving=True))
        patch.setattr(TinyFlow, "decode", self.ticking(TinyFlow.decode))
        patch.setattr(torch.optim.AdamW, "step", self.ticking(torch.optim.AdamW.step))

    def ticking(self, function, *, saving=False):
        def tick(*arguments, **options):
            if self.count == self.at:
                self.act()
            if saving:
                self.saving.append(self.count)
            self.count += 1
            return function(*arguments, **options)

        return tick


def forked(act) -> int:
    """Exit status of a child process that does `act`: as of subprocess, minus the signal's number if one ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = act() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def survives_kills(folder: Path, name: str, points: int, inside_saves: int, steps: int = 5) -> None:
    """SIGKILL at random points of a run, some inside a save: resumed, each ends as the unkilled run."""
    options = {"steps": steps, "checkpoint_every": 2, "keep_checkpoints": 2}
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        go(folder / "whole", name, **options)
    draw = random.Random(f"kill {name}")
    chosen = draw.sample(clock.saving, inside_saves)
    chosen += draw.sample([n for n in range(clock.count) if n not in chosen], points - inside_saves)
    for at in chosen:
        killed = folder / f"killed-{at}"
        with pytest.MonkeyPatch.context() as patch:
            Clock(patch, at, kill)
            assert forked(lambda killed=killed: go(killed, name, **options) and 0) == -signal.SIGKILL
        began = bool(checkpoint.steps(killed / "checkpoints"))
        if not began:
            shutil.rmtree(killed, ignore_errors=True)  # killed before the first save: as the message says, start again
        go(killed, name, resume=began, **options)
        identical(killed, folder / "whole", steps)
        a, b = (checkpoint.load(f / "checkpoints" / checkpoint.name(steps)).state for f in (killed, folder / "whole"))
        assert a == b and not list((killed / "checkpoints").glob(".tmp-*"))
        shutil.rmtree(killed)


@pytest.mark.slow
def test_killed_at_any_of_25_points_it_ends_bit_identical(tmp_path):
    survives_kills(tmp_path, "srpo", points=25, inside_saves=10)


@pytest.mark.soak
@pytest.mark.parametrize("name", OTHERS)
def test_every_algorithm_survives_25_kills(tmp_path, name):
    survives_kills(tmp_path, name, points=25, inside_saves=8)


# --------------------------------------------------------------------------------------- resume at every step


def resumes_from(folder: Path, whole: Path, name: str, k: int, steps: int) -> None:
    shutil.copytree(whole, folder)
    for step in range(k + 1, steps + 1):
        shutil.rmtree(folder / "checkpoints" / checkpoint.name(step))
    go(folder, name, steps=steps, checkpoint_every=1, keep_checkpoints=99, resume=True)
    identical(folder, whole, steps)


@pytest.mark.parametrize("name", OTHERS)
def test_every_algorithm_resumes_bit_identical(tmp_path, name):
    go(tmp_path / "whole", name, steps=3, checkpoint_every=1, keep_checkpoints=99)
    resumes_from(tmp_path / "k", tmp_path / "whole", name, 2, 3)


@pytest.mark.soak
@pytest.mark.parametrize("name", MAKE)
def test_every_algorithm_resumes_from_each_of_twelve_steps(tmp_path, name):
    go(tmp_path / "whole", name, steps=13, checkpoint_every=1, keep_checkpoints=99)
    for k in range(1, 13):
        resumes_from(tmp_path / str(k), tmp_path / "whole", name, k, 13)


# --------------------------------------------------------------------------------------------------- signals


def test_a_second_signal_aborts_at_once(tmp_path):
    """The first waits for the end of the step, the second ends the process; the checkpoint of before is intact."""
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / str(number)

        def twice(images, prompts, folder=folder, number=number):
            if checkpoint.steps(folder / "checkpoints") == [1, 2]:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            return reward(images, prompts)

        assert (
            forked(lambda folder=folder, twice=twice: go(folder, reward=twice, checkpoint_every=1) and 0)
            == 128 + number
        )
        assert checkpoint.load_newest(folder / "checkpoints", warn=pytest.fail).step == 2


@pytest.mark.soak
def test_a_signal_is_answered_within_a_step_and_two_seconds(tmp_path):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        child = os.fork()
        if not child:
            signal.signal(number, signal.default_int_handler)
            os._exit(go(tmp_path / str(number), steps=10**6, checkpoint_every=0)[1].exit_code)
        while len(rows(tmp_path / str(number))) < 5:
            time.sleep(0.01)
        began = time.monotonic()
        os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
        assert time.monotonic() - began < 2 + 1
        assert checkpoint.load_newest(tmp_path / str(number) / "checkpoints", warn=pytest.fail).step >= 5


# ---------------------------------------------------------------------------------------------- cost of a save


def test_a_save_takes_no_longer_than_a_step(tmp_path, monkeypatch):
    """Medians in one process: the embedded model's LoRA with its average, steps of 2 images where the recipe has 8."""
    saves = []

    def timed(*arguments):
        began = time.perf_counter()
        save(*arguments)
        saves.append(time.perf_counter() - began)

    save = Saver.save
    monkeypatch.setattr(Saver, "save", timed)
    plan = recipe.read("srpo-emoji", ["trainer.batch_size=2", "algorithm.n=1"])
    parts = recipe.build(plan)
    palate_train(
        parts.model,
        parts.algorithm,
        parts.reward,
        parts.prompts,
        folder=tmp_path,
        steps=3,
        batch_size=2,
        ema_decay=0.8,
        checkpoint_every=1,
        progress=False,
    )
    step = statistics.median(row["step_seconds"] for row in read_metrics(tmp_path / "metrics.jsonl"))
    print(f"save {statistics.median(saves):.3f} s, step {step:.3f} s")
    assert len(saves) == 3 and statistics.median(saves) <= step


# ------------------------------------------------------------------------------------------------ a full disk


class SmallDisk:
    """Inside, no file can grow beyond `size` bytes, as if the disk were full."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_ten_fill_levels_leave_the_last_checkpoint_and_name_path_need_and_free(tmp_path):
    size = max(part.stat().st_size for part in write(tmp_path, 1).iterdir())
    for level in range(10):
        with SmallDisk(size * level // 10), pytest.raises(checkpoint.CheckpointError) as caught:
            write(tmp_path, 2)
        assert all(word in str(caught.value) for word in (str(tmp_path), "need about", "free", "run.folder", "intact"))
        assert checkpoint.load_newest(tmp_path, warn=pytest.fail).step == 1
        assert not list(tmp_path.glob(".tmp-*"))
    write(tmp_path, 2)
    assert checkpoint.load_newest(tmp_path, warn=pytest.fail).step == 2


def _network():
    return UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",))  # fmt: skip


TENSORS = {
    "a network": lambda folder: save_network(_network(), folder),
    "a sharded network": lambda folder: sharding.save_network(None, {"w": torch.randn(100, 100)}, folder),
    "a difference": lambda folder: delta.save(folder, {"w": torch.randn(300, 300)}, {"w": torch.zeros(300, 300)}),
}


@pytest.mark.parametrize("write_some", TENSORS.values(), ids=TENSORS)
def test_tensors_that_find_no_room_are_an_error_of_the_disk_that_names_the_place(tmp_path, write_some):
    """safetensors tells of a full disk in words alone, which were a traceback of hundreds of lines."""
    with SmallDisk(10_000), pytest.raises(OSError) as caught, new_folder(tmp_path / "out") as temporary:
        write_some(temporary)
    assert caught.value.errno == errno.EFBIG and str(caught.value.filename).startswith(str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(tmp_path):
    def filling(images, prompts):
        if checkpoint.steps(tmp_path / "run" / "checkpoints") == [2] and not disk:
            disk.append(SmallDisk(2000))
            disk[0].__enter__()
        return reward(images, prompts)

    disk: list[SmallDisk] = []
    try:
        with pytest.raises(checkpoint.CheckpointError, match="need about"):
            go(tmp_path / "run", reward=filling, checkpoint_every=2)
    finally:
        disk[0].__exit__()
    go(tmp_path / "run", resume=True, checkpoint_every=2)
    go(tmp_path / "whole", checkpoint_every=2)
    identical(tmp_path / "run", tmp_path / "whole")


# ------------------------------------------------------------------------- a whole checkpoint of something else


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    go(folder, steps=2)
    return folder


@pytest.mark.parametrize(
    "key", ["weights/policy/0001", "ema/policy/0000", "optimizer/policy/0002/exp_avg", "optimizer/policy/0002/step"]
)
@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "one more"])
def test_tensors_of_another_shape_dtype_or_number_are_refused_by_name(two_steps, tmp_path, key, change):
    """All hashes are right, as if it had been written so."""
    saved = checkpoint.load(two_steps / "checkpoints" / checkpoint.name(2))
    value = saved.tensors.pop(key)
    if change != "missing":
        saved.tensors[key] = {"shape": value[None], "dtype": value.double()}.get(change, value)
    if change == "one more":
        saved.tensors[key.replace("/000", "/001")] = value
    shutil.copytree(two_steps, tmp_path / "run")
    checkpoint.save(tmp_path / "run" / "checkpoints", 2, saved.tensors, saved.state)
    with pytest.raises(checkpoint.CheckpointError, match=key.split("/")[0]):
        go(tmp_path / "run", resume=True)


# ---------------------------------------------------------------------------------------------- out of memory


def test_a_step_that_does_not_fit_changes_nothing_and_says_what_needs_less(tmp_path):
    """torch's own error, in the second of two losses: the weights are those of the step before, the run goes on."""

    def hungry(images, prompts):
        if len(rows(tmp_path / "run")) == 2 and images.requires_grad and prompts[0].startswith(("cold", "dull")):
            torch.empty(1 << 50)
        return reward(images, prompts)

    with pytest.raises(OutOfMemoryError) as caught:
        go(tmp_path / "run", reward=hungry, checkpoint_every=1)
    for lever in (
        "trainer.micro_batches=2",
        "model.lora_rank",
        "GiB",
        "trainer.ema_decay=0",
        "--nproc",
        "sharding=full",
    ):
        assert lever in str(caught.value)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 2]
    go(tmp_path / "run", resume=True, micro_batches=1)
    go(tmp_path / "whole")
    identical(tmp_path / "run", tmp_path / "whole")


def test_levers_name_what_they_save():
    size = 1 << 30  # bytes of what is trained
    text = memory_savings(TrainerSettings(batch_size=6, micro_batches=2, ema_decay=0.9), size, "no more")
    assert "trainer.micro_batches=3: 67% of a step's activations" in text
    assert "holds 4.00 GiB" in text and "trainer.ema_decay=0: 1.00 GiB" in text
    assert "one image at a time is reached" in memory_savings(
        TrainerSettings(batch_size=2, micro_batches=2), size, "no"
    )


@pytest.mark.parametrize("batch_size, ranks", [(4, 1), (4, 2), (12, 2), (12, 3), (8, 8)])
def test_the_micro_batches_that_are_advised_can_be_made(batch_size, ranks):
    """Batches takes every advice, down to one image of a rank at a time."""
    advised, each = [1], batch_size // ranks
    while True:
        settings = TrainerSettings(batch_size=batch_size, micro_batches=advised[-1])
        text = memory_savings(settings, 1 << 20, "no", ranks=ranks)
        if "one image at a time is reached" in text:
            break
        advised.append(int(re.search(r"trainer.micro_batches=(\d+)", text)[1]))
        Batches(TinyFlow(), ["a"], None, seed=0, size=batch_size, micro_batches=advised[-1], ranks=Ranks(0, ranks))
    assert advised == [parts for parts in range(1, each + 1) if each % parts == 0]


def test_out_of_memory_is_exit_6(tiny, palate, monkeypatch):
    monkeypatch.setattr(
        "palate.recipe.builder.reward_and_tower",
        lambda settings: (
            lambda images, prompts: torch.empty(1 << 50) if images.requires_grad else reward(images, prompts),
            None,
        ),
    )
    code, _, err = palate("train", "tiny.yaml")
    assert code == 6 and short(err) and "trainer.micro_batches=2" in err


# ------------------------------------------------------------------------------------------------ determinism


def test_ten_repeats_have_one_sha256_whatever_is_logged_between(tmp_path):
    digests = set()
    for i in range(10):
        guarded = {"check": lambda *_: {"heldout": 1.0}, "guard": GuardSettings(every=2)} if i % 2 else {}
        go(tmp_path / str(i), preview_every=(0, 1, 2, 3)[i % 4], checkpoint_every=(0, 1, 3)[i % 3], **guarded)
        digests.add(hashlib.sha256((tmp_path / str(i) / "adapter" / "tiny.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_step_leaves_no_open_file(tmp_path):
    process, counts = psutil.Process(), []

    def counting(images, prompts):
        counts.append(process.num_fds())
        return reward(images, prompts)

    go(tmp_path, reward=counting, steps=12, checkpoint_every=3, preview_every=4)
    assert len(set(counts[4:])) == 1


# -------------------------------------------------------------------------------------------- malformed input

FILES = [  # a file of a run, what is written into it, the command, its exit code
    ("recipe.yaml", b"", ("resume",), 2), ("recipe.yaml", b"\x80\x04", ("resume",), 2),
    ("recipe.yaml", b"[1]", ("report",), 2),
    ("recipe.yaml", b"run: {folder: 3}", ("resume",), 2), ("recipe.yaml", None, ("resume",), 2),
    ("metrics.jsonl", b"{}\n{}\n", ("resume", "trainer.steps=5"), 2),
    ("metrics.jsonl", b"3\n" * 3, ("resume", "trainer.steps=5"), 2),
    ("metrics.jsonl", b"\xff\xfe\n", ("resume", "trainer.steps=5"), 2),
    ("metrics.jsonl", b'{"step": "1"}\n{"step": 2}\n', ("resume", "trainer.steps=5"), 2),
    ("steering.json", b"{", ("resume", "trainer.steps=5"), 2),
    ("steering.json", b"3", ("resume", "trainer.steps=5"), 2),
    ("steering.json", b'[{"a": 1}]', ("resume", "trainer.steps=5"), 2),
    ("checkpoints/step-000004/state.json", b"{}", ("checkpoints",), 4),
    ("checkpoints/step-000004/manifest.json", b"{}", ("checkpoints",), 4),
    ("checkpoints/step-000004/manifest.json", None, ("checkpoints",), 4),
    ("checkpoints/step-000004/tensors.safetensors", b"\0" * 99, ("checkpoints",), 4),
    ("failures/step-000001/state.json", b"{}", ("replay",), 4),
]  # fmt: skip


@pytest.mark.parametrize(("file", "content", "command", "expected"), FILES, ids=range(len(FILES)))
def test_a_malformed_file_of_a_run_is_named_in_a_few_lines(tiny, palate, file, content, command, expected):
    assert palate("train", "tiny.yaml", "trainer.preview_every=0")[0] == 0
    path = tiny / "runs/tiny" / file
    path.parent.mkdir(exist_ok=True, parents=True)
    path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
    target = str(path.parent) if command[0] == "replay" else "runs/tiny"
    code, _, err = palate(command[0], target, *command[1:])
    assert code == expected and short(err), err


def test_at_least_120_malformed_inputs_are_tested():
    recipes = longest_list(ROOT / "tests/recipe/test_recipe.py", "HOSTILE")
    commands = longest_list(ROOT / "tests/cli/test_cli.py", "test_bad_input_is_exit_2_and_a_few_lines")
    assert recipes + commands + len(FILES) + len(rest()) >= 120


def longest_list(path: Path, name: str) -> int:
    """Items of the longest list in the statement that defines `name`, which is a test's parameters."""
    for statement in ast.parse(path.read_text("utf-8")).body:
        targets = [t.id for t in getattr(statement, "targets", []) if isinstance(t, ast.Name)]
        if name in (*targets, getattr(statement, "name", None)):
            return max(len(node.elts) for node in ast.walk(statement) if isinstance(node, ast.List))
    raise AssertionError(f"{path} does not define {name}")


def rest() -> list[str]:
    """Override values of the wrong kind for every setting of the loop."""
    return [f"trainer.{name}={value}" for name in TrainerSettings.__dataclass_fields__ for value in ("[x]", "{a: 1}")]


def test_a_setting_of_the_wrong_kind_is_named(tmp_path):
    good = "run: {folder: runs/x}\nalgorithm: {name: draft}\nreward: {name: emoji}\nprompts: {list: [a dog]}"
    for override in rest():
        with pytest.raises(recipe.RecipeError) as caught:
            recipe.parse(good, [override])
        message = str(caught.value)
        assert message.startswith(override.partition("=")[0]) and len(message.splitlines()) <= 3, message
