"""A run whose base model was exchanged: no command goes on with another base, and each says which."""

from __future__ import annotations

import shutil
from importlib.resources import files

import pytest
from safetensors.torch import load_file, save_file
from support.commands import SMALL


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a copy of the embedded model, whose UNet is then another."""
    from palate import recipe
    from palate.train import Job, run_job

    home = tmp_path_factory.mktemp("changed")
    shutil.copytree(str(files("palate") / "assets/emoji"), home / "base")
    made = recipe.read("srpo-emoji", [*SMALL, f"run.folder={home / 'run'}", f"model.folder={home / 'base'}"])
    parts = recipe.build(made)
    job = Job(
        parts.model, parts.algorithm, parts.reward, parts.prompts, home / "run", made.trainer, parts.preview_prompts,
        identity=recipe.run_identity(made), recipe=recipe.dump(made),
    )  # fmt: skip
    run_job(job, progress=False)
    shutil.copytree(home / "run" / "adapter", home / "adapter")
    file = next((home / "base" / "unet").glob("*.safetensors"))
    save_file({key: value * 0.9 for key, value in load_file(file).items()}, file)
    return home / "run"


COMMANDS = {
    "resume": ["trainer.steps=2"],
    "sample": ["--prompt", "a dog", "--seeds", "0"],
    "evaluate": ["--count", "1", "--seeds", "1"],
    "export merged": ["--format", "merged"],
    "export without an adapter": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_goes_on_with_another_base(command, run, palate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = shutil.copytree(run, tmp_path / "mine")
    if command.endswith("adapter"):
        shutil.rmtree(mine / "adapter")
    out = ["--out", tmp_path / "out"] if command.startswith(("sample", "export")) else []
    code, _, error = palate(command.split()[0], mine, *COMMANDS[command], *out)
    assert code == 4 and "was trained from other base weights" in error and len(error.splitlines()) <= 4
    assert not (tmp_path / "out").exists() and not (mine / "evaluation").exists()
