"""The embedded model, its words, its rewards and its oracle, on the weights that ship."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from support import ROOT

from palate.models.emoji import EmojiModel
from palate.models.vocabulary import Caption, known_words, plural, vocabulary
from palate.rewards.clip import preprocess
from palate.rewards.emoji import COLOURS, EmojiClassifier, background, load_reward, parse_prompt, position
from palate.rewards.tasks import task_prompts
from palate.sampling import sample

ASSETS = files("palate") / "assets"


@pytest.fixture(scope="module")
def model():
    return EmojiModel.load(training="lora", lora_rank=4)


@pytest.fixture(scope="module")
def judge():
    return EmojiClassifier()


@pytest.fixture(scope="module")
def drawn(model):
    """Twelve sampled images of three styles, from fixed noise."""
    prompts = [
        f"a {style} {concept} on a {colour} background"
        for style in ("3d", "flat", "outline")
        for concept, colour in (("dog", "blue"), ("apple", "white"), ("rocket", "yellow"), ("octopus", "green"))
    ]
    noise = torch.randn((12, *model.latent_shape), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return prompts, model.decode(sample(model, model.encode_prompts(prompts), noise, 8, guidance=3.0))


def test_words_are_resolved():
    assert known_words("3D, a GLOSSY puppy in a grey background!") == [
        "3d",
        "a",
        "3d",
        "dog",
        "on",
        "a",
        "gray",
        "background",
    ]
    assert parse_prompt("a small outlined fox at the left on blue") == Caption(
        "fox", "outline", "blue", "small", "left"
    )
    assert parse_prompt("flat. a 3d dog").style == "3d"
    assert parse_prompt("dogs").concept == "dog"


def test_several_of_a_kind_are_that_kind_whatever_a_synonym_says(monkeypatch):
    told = vocabulary()._replace(synonyms={plural(concept): "key" for concept in vocabulary().concepts})
    monkeypatch.setattr("palate.models.vocabulary.vocabulary", lambda: told)
    assert all(parse_prompt(plural(concept)).concept == concept for concept in told.concepts)


def test_a_model_of_single_drawings_takes_each_colour_for_the_background(monkeypatch):
    plain = vocabulary()._replace(counts=(), relations=(), paints=(), turnable=())
    monkeypatch.setattr("palate.models.vocabulary.vocabulary", lambda: plain)
    assert parse_prompt("a blue dog") == Caption("dog", None, "blue")
    with pytest.raises(ValueError, match="words for counts"):
        task_prompts(vocab=plain)


@pytest.mark.parametrize(
    ("prompt", "near"), [("a doog", "dog"), ("octopuz on blue", "octopus"), ("a balon", "balloon")]
)
def test_unknown_words_name_near_ones(model, prompt, near):
    with pytest.raises(ValueError, match=near) as error:
        model.encode_prompts([prompt])
    assert "3d, flat, cartoon, outline" in str(error.value)


def test_a_slip_of_the_pen_in_a_thing_names_that_thing():
    """A letter in the middle left out, of every thing that has four or more."""
    vocab = vocabulary()
    for concept in vocab.concepts:
        slip = concept[: len(concept) // 2] + concept[len(concept) // 2 + 1 :]
        if len(concept) > 3 and slip.removesuffix("s") not in {*vocab.words, *vocab.synonyms}:
            with pytest.raises(ValueError, match=rf"{slip}' \(near: [^)]*\b{concept}\b"):
                known_words(f"a {slip}")


def test_overlong_prompts_are_refused(model):
    longest = vocabulary().max_words
    model.encode_prompts(["dog " * longest])
    with pytest.raises(ValueError, match=f"has {longest + 1} words, the embedded model reads {longest}:"):
        model.encode_prompts(["dog " * (longest + 1)])


def test_every_shipped_prompt_is_understood():
    """Those of tasks name what their task asks for (tests/tools/test_scenes.py); the others one thing on one colour."""
    for path in (ASSETS / "prompts").iterdir():
        if not path.name.startswith("emoji-"):
            continue
        captions = [parse_prompt(prompt) for prompt in path.read_text().splitlines()]
        assert all(c.concept for c in captions)
        if "tasks" not in path.name:
            assert all(c.background for c in captions) or path.stem == "emoji-taste"
            assert not any(c.second or c.number or c.paint for c in captions)
        if path.stem in ("emoji-styled", "emoji-heldout"):
            assert all(c.style for c in captions)
        elif path.stem != "emoji-distil":
            assert not any(c.style for c in captions)


def test_evaluation_prompts_are_not_trained_on():
    train, evaluation, styled, distil = (
        set((ASSETS / f"prompts/emoji-{name}.txt").read_text().splitlines())
        for name in ("train", "eval", "styled", "distil")
    )
    asked = Counter(parse_prompt(prompt).concept for prompt in evaluation)
    assert set(asked) == set(vocabulary().concepts) and len(set(asked.values())) == 1  # all, and each equally often
    assert not (train | distil) & (evaluation | styled)
    assert train < distil and {parse_prompt(prompt).style for prompt in distil - train} == set(vocabulary().styles)


def test_equals_the_diffusers_parts(model):
    """The folder is an ordinary diffusers one: its own classes, scheduler and loop give the same latents."""
    folder = ASSETS / "emoji"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    cond = model.encode_prompts(["a 3d dog on a blue background"])
    null = model.encode_prompts([""])
    x = noise = torch.randn((1, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            u, c = unet(torch.cat([x, x]), t, torch.cat([null, cond])).sample.chunk(2)
            x = scheduler.step(u + 3.0 * (c - u), t, x).prev_sample
        ours = sample(model, cond, noise, 5, guidance=3.0)
        vae = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        images = (vae.decode(x).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(ours, x, atol=1e-4)
    assert torch.allclose(model.decode(ours), images, atol=1e-4)


def test_draws_what_the_prompt_says(drawn, judge):
    """A weak bar on twelve images; the model card has the figures."""
    prompts, images = drawn
    wanted = [parse_prompt(p) for p in prompts]
    concept = [judge.concepts[k] == w.concept for k, w in zip(judge.concept(images), wanted, strict=True)]
    style = [judge.styles[k] == w.style for k, w in zip(judge.style(images), wanted, strict=True)]
    colour = [COLOURS[k] == w.background for k, w in zip(background(images), wanted, strict=True)]
    assert np.mean(concept) >= 0.75 and np.mean(style) >= 0.75 and np.mean(colour) >= 0.9


@pytest.mark.parametrize("name", ["emoji", "emoji-heldout"])
def test_rewards_prefer_the_true_prompt(drawn, name):
    prompts, images = drawn
    reward = load_reward(name)
    own = reward(images, prompts)
    for wrong in (
        [p.replace(parse_prompt(p).concept, "key") for p in prompts],
        [p.replace(parse_prompt(p).style, "cartoon") for p in prompts],
        [p.replace(parse_prompt(p).background, "purple") for p in prompts],
    ):
        assert (own > reward(images, wrong)).float().mean() >= 0.75


@pytest.mark.parametrize("name", ["emoji", "emoji-heldout"])
def test_reward_is_differentiable_frozen_and_independent_of_the_batch(drawn, name):
    prompts, images = drawn
    reward = load_reward(name)
    images = images[:4].clone().requires_grad_()
    values = reward(images, prompts[:4])
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert (gradient.flatten(1).abs().sum(1) > 0).all() and not any(p.requires_grad for p in reward.model.parameters())
    assert torch.allclose(values[2:3], reward(images[2:3], prompts[2:3]), atol=1e-5)
    assert torch.equal(reward.score(reward.image_features(images), prompts[:4]), values)


def test_background_oracle_is_exact():
    """Every named colour, a sprite over half of the border included."""
    rgb = torch.tensor(list(vocabulary().colours.values())) / 255
    images = rgb[:, :, None, None].expand(-1, 3, 64, 64).clone()
    images[:, :, 10:, 20:44] = 0.5
    assert background(images).tolist() == list(range(len(COLOURS)))


def test_position_oracle_is_exact():
    images = torch.full((3, 3, 64, 64), 0.2)
    images[0, :, 24:40, 24:40] = 0.9
    images[1, :, 8:16, 40:56] = 0.9
    found = position(images)
    assert torch.allclose(found[:2], torch.tensor([[0.0, 0.0], [0.5, -0.625]]), atol=1e-6) and found[2].isnan().all()


def test_preprocess_equals_pil():
    """Bicubic with antialiasing, as CLIP's own processor: within PIL's rounding."""
    pixels = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((42, 32), Image.Resampling.BICUBIC)
    theirs = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()[:, :, 5:37] / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    ours = preprocess(pixels.float() / 255, 32)[0] * std[:, None, None] + mean[:, None, None]
    assert (ours.clamp(0, 1) - theirs).abs().max() <= 3 / 255
    constant = preprocess(torch.full((1, 3, 50, 70), 0.4), 32)
    assert torch.allclose(constant[0, :, 0, 0], (0.4 - mean) / std, atol=1e-5) and constant.std((2, 3)).max() < 1e-5


@pytest.mark.parametrize("training", ["lora", "full"])
def test_adapter_round_trip(tmp_path, training):
    first = EmojiModel.load(training=training, lora_rank=4)
    with torch.no_grad():
        for k, p in enumerate(first.parameters()):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    first.save_adapter(tmp_path)
    second = EmojiModel.load(training=training, lora_rank=4)
    second.load_adapter(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.fingerprint() == second.fingerprint()
    if training == "lora":
        with pytest.raises(ValueError, match="does not fit"):
            EmojiModel.load(training="lora", lora_rank=2).load_adapter(tmp_path)


def test_lora_file_loads_through_diffusers(tmp_path, model):
    """`load_lora_adapter` of a plain diffusers UNet reproduces the policy."""
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    model.save_adapter(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(ASSETS / "emoji/unet", torch_dtype=torch.float32)
    unet.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    x, t = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(0)), torch.tensor([0.8, 0.3])
    cond = model.encode_prompts(["a cat", "a dog"])
    with torch.no_grad():
        theirs = unet(x, t * 1000, cond).sample
        ours = model.predict(x, t, cond)
    assert torch.allclose(ours.eps - ours.x0, theirs, atol=1e-4)
    for p in model.parameters():
        p.data.zero_()


def test_the_readme_and_the_notebook_count_what_the_model_knows():
    vocab = vocabulary()
    readme, notebook = ((ROOT / name).read_text("utf-8") for name in ("README.md", "examples/embedded_model.ipynb"))
    assert f"{len(vocab.concepts)} concepts in four styles" in readme and len(vocab.styles) == 4
    assert f"{len(vocab.words)} words and {len(vocab.synonyms)} synonyms" in " ".join(readme.split())
    assert f"{len(vocab.concepts)} concepts in four styles on ten backgrounds" in notebook and len(COLOURS) == 10


def test_assets_stay_small():
    total = sum(f.stat().st_size for f in Path(str(ASSETS)).rglob("*") if f.is_file())
    assert total <= 40e6


def test_the_packaged_consistency_model_is_nearer_to_the_odes_end_than_the_posterior_mean():
    model = EmojiModel.load(training="none")
    model.load_consistency()
    cond = model.encode_prompts([f"a {word} on a blue background" for word in ("dog", "rocket", "pizza", "car")] * 2)
    x, far = torch.randn(8, *model.latent_shape, generator=torch.Generator().manual_seed(0)), torch.ones(8)
    with torch.no_grad():
        end = sample(model, cond, x, 20, guidance=3.0)
        errors = [
            float((model.predict(x, far, cond, weights=weights).x0 - end).square().mean())
            for weights in ("reference", "consistency")
        ]
    assert errors[1] < 0.9 * errors[0]


def test_a_device_holds_all_of_the_model_and_what_it_returns():
    """On the meta device, where a tensor left behind on the processor cannot be combined with the rest."""
    moved = EmojiModel.load(lora_rank=4, device="meta")
    assert moved.device.type == "meta" and moved.fingerprint() == EmojiModel.load(training="none").fingerprint()
    parts = (moved.weights.network, moved.text_encoder, moved.vae)
    assert all(tensor.is_meta for part in parts for tensor in (*part.parameters(), *part.buffers()))
    latents, cond = torch.randn(2, *moved.latent_shape, device="meta"), moved.encode_prompts(["a dog", "an apple"])
    for weights in ("policy", "reference"):
        assert moved.predict(latents, latents.new_full((2,), 0.5), cond, guidance=3.0, weights=weights).x0.is_meta
    assert moved.encode(moved.decode(latents)).is_meta
    with pytest.raises(ValueError, match=r"model\.device"):
        EmojiModel.load(device="gpu")
