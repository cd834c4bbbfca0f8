"""The shipped one-step generator: a UNet stored as a difference, beside which the base model's parts are found."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

from palate import recipe
from palate.algorithms.distar import DistarSettings, Generator
from palate.algorithms.srpo import SRPO
from palate.cli import app
from palate.evaluate import generate
from palate.export import export_one_step, load_one_step, one_step_folder
from palate.models import delta
from palate.models.emoji import EmojiModel
from palate.train import train

sys.path.insert(0, str(ROOT / "tools"))


def test_a_difference_comes_back_within_half_a_step_of_each_row():
    noise = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(8, 3, 3, 3, generator=noise), "b": torch.randn(8, generator=noise)}
    moved = {
        "w": 10.0 ** torch.arange(-4.0, 4.0).view(-1, 1, 1, 1) * torch.randn(8, 3, 3, 3, generator=noise),
        "b": torch.full((8,), 2.0**-10),
    }
    moved["w"][2] = 0  # a row that did not move comes back to the bit
    packed = delta.pack({name: base[name] + moved[name] for name in base}, base)
    assert packed["w"].dtype == torch.int8 and packed["w.scale"].shape == (8,) and packed["b"].dtype == torch.float16
    found = delta.unpack(packed, base)
    bound = moved["w"].flatten(1).abs().amax(1) / 254 * 1.001 + 1e-6
    assert bool(((found["w"] - base["w"] - moved["w"]).flatten(1).abs().amax(1) <= bound).all())
    assert torch.equal(found["w"][2], base["w"][2])
    torch.testing.assert_close(found["b"], base["b"] + 2.0**-10, atol=1e-6, rtol=0)


def test_it_belongs_to_one_base(tmp_path):
    base = {"w": torch.ones(2, 2)}
    delta.save(tmp_path, {"w": torch.zeros(2, 2)}, base)
    torch.testing.assert_close(delta.load(tmp_path, base)["w"], torch.zeros(2, 2))
    with pytest.raises(ValueError, match="another base"):
        delta.load(tmp_path, {"w": torch.ones(2, 2) + 1e-3})
    (tmp_path / delta.FILE).write_bytes(b"no")
    with pytest.raises(ValueError, match="could not be read"):
        delta.load(tmp_path, base)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """(exported folder, shipped folder) of a generator whose every weight was moved."""
    from ship_generator import ship

    folder = tmp_path_factory.mktemp("generator")
    model = EmojiModel.load(training="full")
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.add_(0.02 * p.std().nan_to_num(0.1) * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    export_one_step(model, DistarSettings(generator=Generator(t_init=0.714)), folder / "one-step")
    return folder / "one-step", folder / "emoji-1step", ship(folder / "one-step", folder / "emoji-1step")


def test_the_shipped_folder_is_small_and_draws_the_same(shipped, tmp_path, capsys):
    exported, folder, found = shipped
    assert {path.name for path in folder.iterdir()} == {delta.FILE, "generator.json", "README.md"}
    weights = sum(p.numel() for p in load_one_step(exported)[0].weights.network.parameters())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1.1 * weights  # a byte each, and little beside
    assert found["mean_difference"] < 1e-3 and found["largest_difference"] < 0.05
    words = ["a 3d dog on a blue background", "a cat on a red background"]
    app(
        [
            "sample",
            "--model",
            str(folder),
            "--prompt",
            words[0],
            "--prompt",
            words[1],
            "--seeds",
            "0",
            "--out",
            str(tmp_path),
        ],
        standalone_mode=False,
    )
    assert [json.loads(line)["steps"] for line in (tmp_path / "index.jsonl").read_text().splitlines()] == [1, 1]
    (ours, sampler), (theirs, _) = load_one_step(folder), load_one_step(exported)
    torch.testing.assert_close(
        generate(ours, words, (0,), sampler=sampler), generate(theirs, words, (0,), sampler=sampler), atol=0.05, rtol=0
    )
    moved = ours.weights.network.state_dict()["conv_in.weight"]
    assert float((moved - EmojiModel.load(training="none").weights.network.state_dict()["conv_in.weight"]).abs().mean())


def test_other_methods_begin_with_it(shipped, tmp_path):
    """Full training: its weights are the policy's, the reference stays the base model. A LoRA has no place for them."""
    _, folder, _ = shipped
    plan = recipe.read("srpo-emoji", ["model.weights=full", f"model.start={folder}", "trainer.batch_size=1"])
    model = recipe.build_model(plan)
    base, start = (EmojiModel.load(place, training="none").weights.network.state_dict() for place in (None, folder))
    for name, state in (("policy", start), ("reference", base)):
        ours = model.weights.networks[name].state_dict()
        assert all(torch.equal(ours[key], state[key]) for key in state)
    train(
        model,
        SRPO(plan.algorithm),
        recipe.build_reward(plan.reward),
        ["a dog"],
        folder=tmp_path,
        steps=1,
        batch_size=1,
        lr=1e-5,
        progress=False,
        guard=recipe.GuardSettings(every=0),
    )
    ours = model.weights.networks["policy"].state_dict()
    assert any(not torch.equal(ours[key], start[key]) for key in start)
    with pytest.raises(ValueError, match="is no part of a LoRA"):
        recipe.build_model(recipe.read("srpo-emoji", [f"model.start={folder}"]))


def test_a_name_stands_for_the_packaged_one(shipped, monkeypatch):
    with pytest.raises(ValueError, match=r"model\.start: emoji-no-such-folder does not exist"):
        recipe.build_model(recipe.read("srpo-emoji", ["model.start=emoji-no-such-folder"]))
    seen = []
    monkeypatch.setattr(
        "palate.models.weights.NamedWeights.begin", lambda self, source, **how: seen.append(Path(source))
    )
    recipe.build_model(recipe.read("srpo-emoji", ["model.start=emoji-consistency"]))  # any folder of the package
    assert [source.parts[-2:] for source in seen] == [("assets", "emoji-consistency")]
    assert recipe.read("distar-emoji-quick").model.start == "emoji-1step"


def test_a_generator_without_a_family_is_the_embedded_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = one_step_folder("emoji-1step")
    earlier = Path(shutil.copytree(folder, tmp_path / "earlier"))  # exports did not always name their family
    said = json.loads((earlier / "generator.json").read_text())
    assert said.pop("family") == "emoji"
    (earlier / "generator.json").write_text(json.dumps(said))
    model, sampler = load_one_step(earlier)
    assert isinstance(model, EmojiModel) and sampler == Generator(t_init=0.714, input_scale=0.714)
    assert one_step_folder("no-such") is None and one_step_folder(str(folder)) == folder
