"""A LoRA that a distilled model has while it trains: active in steps, absent in samples, previews and exports."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from support.tiny_families import SIZE, load, saved

import palate
from palate import recipe
from palate.models import adapters
from palate.models.lora import FILE, write
from palate.models.merge import merge_adapters
from palate.recipe.start import is_distilled, warn_of_noise

TIMES = torch.tensor([0.8, 0.4])


def drawn(model, seed, std=0.2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return model


def x0(model, weights="policy"):
    noise = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(7))
    return model.predict(noise, TIMES, model.encode_prompts(["a cat", "two dogs"]), weights=weights).x0


def with_adapter(folder):
    model = load("flux")
    model.weights.add_frozen(folder, "training_adapter", "model.training_adapter")
    model.weights.selection.companion = "training_adapter"
    return model


def test_it_is_there_in_training_and_nowhere_else(tmp_path):
    """Inside, policy and reference are what they are with the LoRA's change added to the base weights."""
    theirs = drawn(load("flux", lora_rank=4, lora_alpha=6.0), 1)
    theirs.save_adapter(tmp_path)
    model, plain, merged = with_adapter(tmp_path), load("flux"), load("flux")
    for each in (model, plain, merged):
        drawn(each, 2)
    layers = adapters.layers_of(theirs.weights.network, "policy")
    with torch.no_grad():
        for name, lora in layers.items():
            merged.weights.network.get_submodule(name).base_layer.weight += lora.scale * lora.up @ lora.down
    for weights in ("policy", "reference"):
        assert torch.equal(x0(model, weights), x0(plain, weights))
        with model.weights.selection.while_training():
            inside = x0(model, weights)
        assert torch.allclose(inside, x0(merged, weights), atol=1e-5)
        assert not torch.allclose(inside, x0(plain, weights), atol=1e-3)
    with model.while_training():
        x0(model).square().mean().backward()  # recomputed blocks have it too
        assert torch.equal(x0(model, "training_adapter"), x0(theirs))  # by itself nothing joins it
    x0(merged).square().mean().backward()
    found, expected = ([p.grad for p in each.parameters()] for each in (model, merged))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert torch.equal(x0(model), x0(plain))
    model.save_adapter(tmp_path / "out")
    plain.save_adapter(tmp_path / "plain")
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "plain" / FILE).read_bytes()


def test_a_run_trains_with_it_and_previews_without(tmp_path):
    """One of zeros trains the same weights; another trains others, and step 0 looks the same under all three."""
    small = [
        "trainer={steps: 2, batch_size: 2, preview_every: 1, preview_prompts: 2, lr: 1.0e-3, guard: {every: 0}}",
        "algorithm.rollout_steps=2", "prompts={list: [a dog, an apple]}", "model.lora_rank=2",
    ]  # fmt: skip
    base = recipe.build_model(recipe.read("srpo-emoji", small))
    base.save_adapter(tmp_path / "zero")
    drawn(base, 3).save_adapter(tmp_path / "other")
    found = {}
    for name in (None, "zero", "other"):
        more = [] if name is None else [f"model.training_adapter={tmp_path / name}"]
        made = recipe.read("srpo-emoji", [*small, *more])
        torch.manual_seed(0)  # the LoRA's first weights
        parts = recipe.build(made)
        folder = tmp_path / f"run-{name}"
        palate.train(
            parts.model, parts.algorithm, parts.reward, parts.prompts, folder=folder, trainer=made.trainer,
            preview=parts.preview_prompts, progress=False,
        )  # fmt: skip
        pictures = sorted((folder / "samples" / "step-000000").glob("*.png"))
        found[name] = (
            [p.detach().clone() for p in parts.model.parameters()],
            [picture.read_bytes() for picture in pictures],
        )
    equal = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))  # noqa: E731
    assert found[None][1] == found["zero"][1] == found["other"][1] and len(found[None][1]) == 3  # and their grid
    assert equal(found[None][0], found["zero"][0]) and not equal(found[None][0], found["other"][0])


def test_a_teacher_of_another_model_is_refused_before_anything_loads(tmp_path, monkeypatch):
    save_layers(tmp_path, "sdxl")
    free = "reward: {name: brightness}\nprompts: {list: [a cat]}\n"
    model = f"model: {{name: flux, folder: '{saved('flux')[0]}', image_size: {SIZE}, device: cpu}}\n"
    monkeypatch.setattr("palate.recipe.builder.build_model", lambda made, **options: pytest.fail("a model is loaded"))
    for adapter, said in ((tmp_path, "LoRA of another model"), (tmp_path / "none", "does not exist")):
        text = f"algorithm: {{name: opd, teachers: {{warm: {{adapter: '{adapter}'}}}}}}\n"
        with pytest.raises(ValueError, match=rf"algorithm.teachers.warm.adapter: .*{said}"):
            recipe.build(recipe.parse(free + model + text))


def save_layers(folder, name):
    layers = adapters.layers_of(load(name).weights.network, "policy")
    write(folder / FILE, {f"{n}.lora_{k}.weight": getattr(v, s) for n, v in layers.items()
                          for k, s in (("A", "down"), ("B", "up"))}, {"format": "pt"})  # fmt: skip


def test_one_of_another_model_is_refused_before_anything_loads(tmp_path):
    save_layers(tmp_path, "sdxl")
    free = ["reward={name: brightness}", "algorithm.preference=absolute", "prompts={list: [a cat]}"]
    settings = [f"model.folder={saved('flux')[0]}", f"model.image_size={SIZE}", "model.device=cpu"]
    made = recipe.read("srpo-flux", [*free, *settings, f"model.training_adapter={tmp_path}"])
    with pytest.raises(ValueError, match=r"model.training_adapter: .*LoRA of another model"):
        recipe.build(made)
    with pytest.raises(recipe.RecipeError, match=r"model.training_adapter: it joins a LoRA; set model.weights=lora"):
        recipe.read("srpo-flux", [*free, *settings, "model.training_adapter=x", "model.weights=full"])


DISTILLED = {
    "black-forest-labs/FLUX.2-klein-4B": "flux2", "black-forest-labs/FLUX.1-schnell": "flux",
    "Tongyi-MAI/Z-Image-Turbo": "z-image", "krea/Krea-2-Turbo": "krea2", "stabilityai/sdxl-turbo": "sdxl",
    "ByteDance/SDXL-Lightning": "sdxl",
}  # fmt: skip
WHOLE = {
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2", "black-forest-labs/FLUX.1-dev": "flux",
    "krea/Krea-2-Raw": "krea2", "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
}  # fmt: skip


def noisy(name, folder, algorithm):
    text = f"model: {{name: {name}, folder: {folder}}}\nalgorithm: {{name: {algorithm}}}\n"
    return recipe.parse(f"{text}reward: {{name: clip-score}}\nprompts: {{list: [a cat]}}\n", [])


def test_distilled_models_are_known_by_name_and_by_their_folders():
    for folder, name in DISTILLED.items():
        assert is_distilled(noisy(name, folder, "refl")), folder
    for folder, name in WHOLE.items():
        assert not is_distilled(noisy(name, folder, "refl")), folder
    assert is_distilled(noisy("flux2", saved("flux2-klein")[0], "refl"))
    assert not is_distilled(noisy("flux2", saved("flux2-base")[0], "refl"))
    assert json.loads((saved("krea2-turbo")[0] / "model_index.json").read_text())["is_distilled"] is True


TURBO = "Tongyi-MAI/Z-Image-Turbo"
OF_NOISE = {
    "ddpo": True, "flow_grpo": True, "nft": True, "dgpo": True, "dpo": True, "sqdf, estimator: tweedie": True,
    "refl, eta: 0.5": True, "opd, eta: 0.5, teachers: {a: {adapter: x}}": True,
    "refl": False, "srpo": False, "draft": False, "leap_align": False, "distar": False,
    "opd, teachers: {a: {adapter: x}}": False,
}  # fmt: skip


@pytest.mark.parametrize("algorithm", OF_NOISE)
def test_noise_and_a_distilled_model_are_warned_of(algorithm, caplog):
    for source, name, distilled in ((TURBO, "z-image", True), ("black-forest-labs/FLUX.1-dev", "flux", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="palate"):
            warn_of_noise(noisy(name, source, algorithm))
        said = any(f"{source} is distilled to few steps" in record.getMessage() for record in caplog.records)
        assert said == (OF_NOISE[algorithm] and distilled)


def test_a_distilled_single_file_is_known_without_a_folder():
    text = "model: {name: z-image, file: z_image_turbo_bf16.safetensors}\nalgorithm: {name: ddpo}\n"
    made = recipe.parse(f"{text}reward: {{name: brightness}}\nprompts: {{list: [a cat]}}\n", [])
    assert is_distilled(made)


def test_merging_is_not_touched(tmp_path):
    """The file that a run with it writes is the policy's alone, so it merges with others."""
    theirs = drawn(load("flux"), 1)
    theirs.save_adapter(tmp_path / "theirs")
    model = drawn(with_adapter(tmp_path / "theirs"), 2)
    model.save_adapter(tmp_path / "mine")
    assert merge_adapters([tmp_path / "mine"], [1.0], tmp_path / "out") == 4
