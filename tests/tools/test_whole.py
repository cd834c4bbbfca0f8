"""The tools leave what is there where they fail, and say that they failed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))


def test_the_chain_ends_with_the_code_of_what_failed(tmp_path):
    """Its log goes through a pipe, whose own code is that of tee."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(f'#!/bin/bash\ncase "$1" in *stage.py) exit 0;; -c) exec {sys.executable} "$@";; esac\nexit 7\n')
    python.chmod(0o755)
    work = tmp_path / "work"
    for part in ("emoji", "reward-heldout"):
        (work / "shipped" / part).mkdir(parents=True)
    ended = subprocess.run(
        ["bash", str(ROOT / "tools/train_all.sh"), str(work)],
        env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "build_atlas.py" in ended.stdout and "build_prompts.py" not in ended.stdout
    assert ended.returncode == 7


def test_the_chain_goes_on_with_a_run_that_is_begun_and_keeps_one_that_is_exported(tmp_path):
    """`palate train` refuses a folder that holds a run, and `palate export` one that holds files."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(f'#!/bin/bash\ncase "$1" in -c) exec {sys.executable} "$@";; esac\nexit 0\n')
    python.chmod(0o755)
    work, said = tmp_path / "work", []
    for part in ("emoji", "reward-heldout"):
        (work / "shipped" / part).mkdir(parents=True)
    (work / "consistency").mkdir()
    for name in ("README.md", "pytorch_lora_weights.safetensors"):
        (work / "consistency" / name).touch()
    for made in ((), ("checkpoints",), ("checkpoints", "export/one-step")):
        for name in made:
            (work / "runs/one-step" / name).mkdir(parents=True, exist_ok=True)
        ended = subprocess.run(
            ["bash", str(ROOT / "tools/train_all.sh"), str(work)],
            env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        said.append([word for word in ("palate train", "palate resume", "palate export") if word in ended.stdout])
    assert said == [["palate train", "palate export"], ["palate resume", "palate export"], []]


def test_a_source_that_is_not_there_deletes_no_asset(tmp_path):
    base_folder = pytest.importorskip("base_folder")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model_index.json").write_text("{}")
    (tmp_path / "half/unet").mkdir(parents=True)  # without its autoencoder
    for source in ("nothing", "half"):
        with pytest.raises(OSError):
            base_folder.ship(tmp_path / source, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["model_index.json"], source
        assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "out"]


def test_a_stage_that_cannot_be_copied_whole_takes_nothing_away(tmp_path, monkeypatch):
    stage = pytest.importorskip("stage")
    package = tmp_path / "src/palate"
    for name in ("licences", "prompts", "emoji"):
        (package / "assets" / name).mkdir(parents=True)
    (package / "assets/emoji/old").write_text("o")
    monkeypatch.setattr(stage, "PACKAGE", package)
    assets = stage.build(tmp_path / "stage")
    (assets / "emoji").mkdir()
    (assets / "emoji/new").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError):
        stage.take(tmp_path / "stage")
    assert [path.name for path in (package / "assets/emoji").iterdir()] == ["old"]


def test_a_quick_measurement_does_not_write_over_the_shipped_figures(monkeypatch, capsys):
    evaluate_assets = pytest.importorskip("evaluate_assets")
    monkeypatch.setattr(evaluate_assets, "Bench", lambda *_: pytest.fail("it began to measure"))
    monkeypatch.setattr(sys, "argv", ["evaluate_assets.py", "--quick", "--only", "autoencoder"])
    with pytest.raises(SystemExit) as ended:
        evaluate_assets.main()
    assert ended.value.code == 2 and "--quick: give --out" in capsys.readouterr().err


def test_a_table_of_keys_has_the_whole_comment_of_each_field_and_of_no_other():
    docs_hooks = pytest.importorskip("docs_hooks")
    rows = {}
    for line in docs_hooks._recipe_keys().splitlines():
        if line.startswith("| `"):
            rows.setdefault(line.split("`")[1], line.rpartition(" | ")[2].removesuffix(" |"))
    assert rows["source"] == 'of published weights: a file, a folder, a hub id; of "remote": a URL'
    assert rows["scale"] == "(mean, std) on images you trust: (R - mean) / std is what is weighed"
    assert rows["noised"].startswith("std of the noised image")
    assert rows["base"].startswith('what "before training" is.') and rows["base"].endswith("counts as well")
    assert rows["training_adapter"].startswith("a frozen LoRA of a distilled model")
    assert not [row for row in rows.values() if row.startswith("^")]
    assert rows["heldout_drop"] == "largest fall of the held-out reward, in its own units"


@pytest.mark.parametrize("name", ["train_autoencoder", "train_base", "shown"])
def test_what_is_made_once_is_whole_or_absent_after_a_kill(name, tmp_path, monkeypatch):
    """The next command would read a file that is cut short, and end."""
    tool, pool = pytest.importorskip(name), pytest.importorskip("pool")
    torch = pytest.importorskip("torch")
    vae = tool.AutoencoderTiny(latent_channels=2, encoder_block_out_channels=(8,) * 3,
                               decoder_block_out_channels=(8,) * 3, num_encoder_blocks=(1,) * 3,
                               num_decoder_blocks=(1,) * 3)  # fmt: skip
    pictures = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr(pool, "CHUNK", 4)
    monkeypatch.setattr(pool, "images", lambda *_: pictures)
    scene = pool.Scene("one", "a dog", 0, 0, [pool.Thing(0, 0, None, 0.0, 0.0, 1.0, 0.0, False)])
    monkeypatch.setattr(pool, "scenes", lambda *_: [scene] * 4)
    monkeypatch.setattr(tool.AutoencoderTiny, "from_pretrained", lambda *_: vae)

    def killed(tensors, path, *_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    for module in (tool, pool):
        monkeypatch.setattr(module, "save_file", killed, raising=False)
    make = {
        "train_autoencoder": lambda: tool.targets(vae, pictures, tmp_path, [0]),
        "train_base": lambda: tool.latents(vae, tool.build_tokenizer(), tmp_path, [0], tmp_path),
        "shown": lambda: tool.weathered(tmp_path, [0], tmp_path, tmp_path),
    }[name]
    with pytest.raises(KeyboardInterrupt):
        make()
    assert not list(tmp_path.glob("*.safetensors"))
