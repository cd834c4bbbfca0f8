"""After a run was lengthened and interrupted, sample, evaluate, export, report and the studio speak of one result."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from palate import cli, recipe
from palate.evaluate import read_index
from palate.report import write_report
from palate.runs import RunFolder, adapter_of, load_result
from palate.runtime import checkpoint, runlock, runlog
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.result import evaluation_of, result_of
from palate.runtime.runlog import RunLog, rewind
from palate.studio.undo import adapter_now, go_back
from palate.train import Job, run_job, steer
from palate.train.steering import CONTROL

SMALL = [
    "trainer.batch_size=2", "algorithm.rollout_steps=1", "algorithm.n=1", "trainer.guard.every=0",
    "trainer.preview_every=0", "prompts={list: [a dog, an apple]}", "trainer.lr=0.01", "model.lora_rank=2",
]  # fmt: skip


def trained(folder, steps, *, resume=False, dies_after=None):
    """A run of the embedded model, as `palate train` leaves it; `dies_after`: checkpoints, as kill -9 leaves them."""
    made = recipe.read("srpo-emoji", [*SMALL, f"trainer.steps={steps}", "trainer.checkpoint_every=1"])
    torch.manual_seed(made.trainer.seed)
    parts = recipe.build(made)

    class Dies:
        def __call__(self, images, prompts):
            if images.requires_grad and checkpoint.steps(folder / "checkpoints")[-1:] == [dies_after]:
                raise KeyboardInterrupt
            return parts.reward(images, prompts)

    job = Job(
        parts.model, parts.algorithm, parts.reward if dies_after is None else Dies(), parts.prompts, folder,
        made.trainer, parts.preview_prompts, identity=recipe.run_identity(made), recipe=recipe.dump(made),
        kept=recipe.identity_text(made),
    )  # fmt: skip
    return run_job(job, resume=resume, progress=False)


@pytest.fixture(scope="module")
def lengthened(tmp_path_factory):
    """Finished at step 2 and measured there; lengthened, and dead after step 4."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    trained(folder, 2)
    command("evaluate", folder, "--count", 1, "--seeds", 1)
    assert evaluation_of(folder)["outdated"] == "" and evaluation_of(folder)["checkpoint"].endswith("step-000002")
    shutil.copytree(folder / "adapter", folder.parent / "earlier")
    with pytest.raises(KeyboardInterrupt):
        trained(folder, 40, resume=True, dies_after=4)
    return folder


@pytest.fixture
def run(lengthened, tmp_path):
    return shutil.copytree(lengthened, tmp_path / "mine")


def command(*words):
    before, sys.argv = sys.argv, ["palate", "--quiet", *map(str, words)]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, words
    finally:
        sys.argv = before


def saved_tensors(run, step):
    tensors = checkpoint.load(run / "checkpoints" / checkpoint.name(step)).tensors
    kind = "ema" if any(key.startswith("ema/") for key in tensors) else "weights"
    return [tensor for key, tensor in sorted(tensors.items()) if key.startswith(f"{kind}/policy/")]


def adapter_tensors(folder):
    found = load_file(next(folder.glob("*.safetensors")))
    return sorted(found.values(), key=lambda t: (t.shape, float(t.double().sum())))


def test_five_commands_have_one_answer(run, tmp_path):
    assert result_of(run).step == 4 and not (run / "adapter").exists()
    model, _ = RunFolder(run).model()
    weights = [p.detach().clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, saved_tensors(run, 4), strict=True))
    model.save_adapter(tmp_path / "expected")
    expected = adapter_tensors(tmp_path / "expected")

    def same(folder):
        return all(torch.equal(a, b) for a, b in zip(adapter_tensors(folder), expected, strict=True))

    command("export", run, "--out", tmp_path / "ex")
    assert same(tmp_path / "ex") and same(run / "adapter")
    shutil.rmtree(run / "adapter")
    assert same(adapter_now(run))  # the studio
    assert "Measured at step 2, and the run is at step 4 now" in write_report(run).read_text("utf-8")
    # sample, evaluate: the same noise gives the same picture
    command("evaluate", run, "--count", 1, "--seeds", 1)
    row = read_index(run / "evaluation/result")[0]
    command("sample", run, "--prompt", row["prompt"], "--seeds", "0", "--out", tmp_path / "drawn")
    files = [run / "evaluation/result" / row["file"], *(tmp_path / "drawn").glob("0*.png")]
    pictures = [Image.open(file).tobytes() for file in files]
    assert len(pictures) == 2 and pictures[0] == pictures[1]
    assert pictures[0] != Image.open(run / "evaluation/base" / row["file"]).tobytes()
    assert json.loads((run / "evaluation.json").read_text())["checkpoint"] == "checkpoints/step-000004"
    assert "Measured at step" not in write_report(run).read_text("utf-8")


def test_going_back_is_an_answer_too(run):
    model, _ = RunFolder(run).model()
    adapter_of(run, lambda: model)
    kept = checkpoint.steps(run / "checkpoints")
    go_back(run, kept[0])
    assert result_of(run).step == kept[0] and load_result(model, run, warn=pytest.fail) == kept[0]
    model.save_adapter(run / "again")
    assert all(
        torch.equal(a, b) for a, b in zip(adapter_tensors(run / "again"), adapter_tensors(run / "adapter"), strict=True)
    )


def test_an_evaluation_from_before_going_back_is_not_of_the_new_weights(run):
    """The run comes to the step of the evaluation again, on another way."""
    measured = json.loads((run / "evaluation.json").read_text()) | result_of(run).measured()
    (run / "evaluation.json").write_text(json.dumps(measured))
    assert evaluation_of(run)["outdated"] == ""
    go_back(run, 3)
    saved = checkpoint.load(run / "checkpoints/step-000003")
    tensors = {key: value + 1 for key, value in saved.tensors.items()}
    checkpoint.save(
        run / "checkpoints", 4, tensors, {k: v for k, v in saved.state.items() if k not in ("schema", "step")}
    )
    assert "Measured at step 4, to which the run came anew" in evaluation_of(run)["outdated"]
    assert "Measured at step 4" in write_report(run).read_text("utf-8")
    (run / "evaluation.json").write_text(json.dumps({k: v for k, v in measured.items() if k != "manifest"}))
    assert evaluation_of(run)["outdated"] == ""  # an older version kept no digest


def test_going_back_takes_later_words_away(run, monkeypatch):
    """Those that a resumed run would replay, and those that wait for the step after the newest one."""
    words = {"positive": ["cartoon"], "negative": ["flat"]}

    def write_words():
        with RunLog(run) as log:
            log.write({"step": 4, "event": "steer", **words})

    write_words()
    assert len(rewind(run, 3)) == 1  # resumed from step 3, it comes to step 4 again
    write_words()
    (run / CONTROL).write_text(json.dumps(words))
    with monkeypatch.context() as patch:  # a crash before the log is cut: it can be gone back again
        patch.setattr(runlog, "write_atomically", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            go_back(run, 3)
    assert runlog.read_metrics(run / "metrics.jsonl")[-1]["step"] == 4
    go_back(run, 3)
    assert rewind(run, 3) == [] and not (run / CONTROL).exists()
    steer(run, **words)
    go_back(run, 3)  # nothing is later: what waits was given at that step
    assert (run / CONTROL).exists()


def test_a_running_run_says_so_or_is_refused(run, capsys):
    elsewhere = runlock.Owner("another.machine", 1, "", "2026-01-01T00:00:00")
    (run / runlock.OWNER).write_text(json.dumps(elsewhere._asdict()))
    told = []
    model = recipe.build_model(RunFolder(run).recipe)
    assert load_result(model, run, warn=told.append) == 4
    assert len(told) == 1 and "is being trained by" in told[0] and "its weights of step 4" in told[0]
    for ask in (lambda: adapter_of(run, lambda: model), lambda: adapter_now(run), lambda: go_back(run, 4)):
        with pytest.raises(InputError, match="is being trained by"):
            ask()
    assert "being trained by process 1 on another.machine" in write_report(run).read_text("utf-8")
    for form in ("diffusers", "merged", "one-step"):
        with pytest.raises(AssertionError):
            command("export", run, "--format", form, "--out", run.parent / form)
        assert "is being trained by" in capsys.readouterr().err and not (run.parent / form).exists()


def test_of_a_search_the_newest_round_is_the_result(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"round-{number:02d}").mkdir()
    assert result_of(tmp_path) is None
    with pytest.raises(CheckpointError, match="has no result yet"):
        load_result(torch.nn.Identity(), tmp_path, warn=pytest.fail)
    for number, step in ((1, 40), (2, 20)):
        checkpoint.save(tmp_path / f"round-{number:02d}/checkpoints", step, {"a": torch.zeros(1)}, {"finished": ""})
    assert result_of(tmp_path).checkpoint == "round-02/checkpoints/step-000020"


def test_other_settings_are_a_new_run_from_these_weights(run, capsys):
    with pytest.raises(AssertionError):
        command("resume", run, "trainer.lr=0.5")
    told = " ".join(capsys.readouterr().err.split())
    assert f"palate train {run}/recipe.yaml run.folder=NEW trainer.lr=0.5 model.start={run}" in told
