"""A LoRA as the start of a training: every layout in which people publish one, with its own rank and alpha."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from support.tiny_families import FAMILIES, load, saved

from palate.export import FORMATS
from palate.export.names import to_form
from palate.models import adapters, lora
from palate.models.facts import facts_of
from palate.models.original import Lora, fuse, split
from palate.runtime.errors import InputError

RANK, ALPHA = 4, 10.0
# of the families with several tiny pipelines, one
NAMES = [name for name in FAMILIES if name not in ("stable-diffusion-v", "flux-schnell", "pixart-sigma", "krea2-turbo")]
TIMES = torch.tensor([0.8, 0.4])


def drawn(model, std=0.2):
    """The model with a policy that says something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return model


def x0(model, weights="policy"):
    noise = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model.predict(noise, TIMES, model.encode_prompts(["a cat", "two dogs"]), weights=weights).x0


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(found[name].down, layer.down) and torch.equal(found[name].up, layer.up), name
        assert found[name].alpha == layer.alpha


@pytest.mark.parametrize("name", NAMES)
def test_every_export_of_every_family_comes_back_bit_by_bit(name, tmp_path):
    """Weights, rank and alpha of `palate export`'s files, each as model.start; the prediction is the trained one's."""
    model = drawn(load(name, lora_rank=RANK, lora_alpha=ALPHA))
    facts, layers = model.facts, adapters.layers_of(model.weights.network, "policy")
    forms = [form for form in FORMATS if form != "kohya" or facts.denoiser == "unet" or facts.original]
    assert "comfyui" in forms
    for form in forms:
        tensors, metadata = to_form(layers, form, facts)
        lora.write(tmp_path / form / "mine.safetensors", tensors, {"format": "pt", **metadata})
        begun = load(name, lora_rank=RANK)
        begun.weights.begin(tmp_path / form, rank=RANK, alpha=None)
        equal(adapters.layers_of(begun.weights.network, "policy"), layers)
        assert torch.allclose(x0(begun), x0(model), atol=1e-6) and not torch.allclose(x0(begun), x0(begun, "reference"))
        assert {p.dtype for p in begun.parameters()} == {torch.float32}
        assert all(p.requires_grad for p in begun.parameters())


def renamed(layers, prefix, *, down="lora_A.weight", up="lora_B.weight", alpha=False, flat=False):
    tensors = {}
    for name, layer in layers.items():
        stem = prefix + (name.replace(".", "_") if flat else name)
        tensors |= {f"{stem}.{down}": layer.down.contiguous(), f"{stem}.{up}": layer.up.contiguous()}
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
    return tensors


LAYOUTS = {  # prefix, how tensors end, what lies beside the file
    "PEFT": ("base_model.model.", {}, {"r": RANK, "lora_alpha": ALPHA}),
    "ai-toolkit": ("diffusion_model.", {"alpha": True}, None),
    "kohya of a transformer": ("lora_transformer_", {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": True,
                                                     "flat": True}, None),
    "no prefix": ("", {"alpha": True}, None),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3"])
def test_other_programs_layouts_are_read(name, layout, tmp_path, caplog):
    model = drawn(load(name, lora_rank=RANK, lora_alpha=ALPHA))
    layers = adapters.layers_of(model.weights.network, "policy")
    prefix, options, config = LAYOUTS[layout]
    tensors = renamed(layers, prefix, **options)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(4, 8)  # is left out
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    begun = load(name, lora_rank=RANK)
    with caplog.at_level(logging.WARNING, logger="palate"):
        for _ in range(2):
            begun.weights.begin(tmp_path, rank=RANK, alpha=None)
    equal(adapters.layers_of(begun.weights.network, "policy"), layers)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "changes text encoders too; that part is left out" in said[0]


def test_a_fused_lora_of_the_original_flux_is_taken_apart(tmp_path):
    """As kohya trains one: q, k, v share their down matrix. The weight changes by the same."""
    facts, generator = facts_of("flux"), torch.Generator().manual_seed(0)
    down, up = torch.randn(RANK, 16, generator=generator), torch.randn(48, RANK, generator=generator)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    shapes = adapters.shapes_of(saved("flux")[1].transformer)
    layers = lora.read(tmp_path / "theirs.safetensors", shapes, facts, "model.start")
    names = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    assert list(layers) == names
    change = torch.cat([layers[name].scale * layers[name].up @ layers[name].down for name in names])
    assert torch.allclose(change, 2.0 / RANK * up @ down) and {layer.rank for layer in layers.values()} == {RANK}


@pytest.mark.parametrize("trained", ["", "q", "v", "qk", "qkv"])
def test_untrained_parts_of_a_fused_layer_come_back(trained):
    """Their up is still zero; a part that the LoRA never had stays away."""
    kinds, generator = facts_of("flux").original, torch.Generator().manual_seed(0)
    shapes = {f"transformer_blocks.0.attn.to_{x}": (16, 16) for x in "qkv"}
    layers = {
        name: Lora(torch.randn(RANK, 16, generator=generator), float(name[-1] in trained) * torch.ones(16, RANK), ALPHA)
        for name in shapes
    }
    for part in (layers, {name: layer for name, layer in layers.items() if name[-1] in trained}):
        found = {}
        for name, fused in fuse(part, kinds).items():
            found |= split(name, fused, shapes, kinds)
        equal(found, part)


def test_untrained_parts_that_share_their_down_come_back():
    """As kohya begins: of a LoRA every part has the whole, of a DoRA the norms count too."""
    kinds, name = facts_of("flux").original, "double_blocks_0_img_attn_qkv"
    shapes = {f"transformer_blocks.0.attn.to_{x}": (16, 16) for x in "qkv"}
    up = torch.zeros(48, RANK)
    found = split(name, Lora(torch.ones(RANK, 16), up, ALPHA), shapes, kinds)
    equal(found, dict.fromkeys(shapes, Lora(torch.ones(RANK, 16), up[:16], ALPHA)))
    up[:16] = 1
    found = split(name, Lora(torch.ones(RANK, 16), up, ALPHA, torch.arange(48.0)), shapes, kinds)
    assert [layer.magnitude[0] for layer in found.values()] == [0, 16, 32]


def test_a_rank_stabilised_lora_counts_by_the_root_of_its_rank(tmp_path):
    """(alpha / sqrt(r)) up @ down, as PEFT adds it with use_rslora (Kalajdzievski 2023, arXiv 2312.03732)."""
    layers = {"x": Lora(torch.randn(4, 3), torch.randn(5, 4), 6.0)}
    record = json.dumps(lora.peft_config(layers) | {"use_rslora": True})
    lora.write(tmp_path / lora.FILE, lora.to_peft(layers), {"format": "pt", lora.METADATA: record})
    found = lora.read(tmp_path / lora.FILE, {"x": (5, 3)}, None, "model.start")["x"]
    expected = 6.0 / 4**0.5 * layers["x"].up @ layers["x"].down
    torch.testing.assert_close(found.change(torch.zeros(5, 3)), expected)


@pytest.mark.parametrize(
    "pattern", ["to_q", "attn.to_q", r"blocks\.\d+\.attn\.to_[qk]", "q", "blocks.2.attn.to_q", "*"]
)
def test_a_pattern_of_alphas_is_of_the_layers_that_peft_takes_it_for(pattern, tmp_path):
    name = "blocks.1.attn.to_q"
    layers = {name: Lora(torch.randn(4, 3), torch.randn(5, 4), 8.0)}
    record = json.dumps(lora.peft_config(layers) | {"alpha_pattern": {pattern: 2.0}})
    lora.write(tmp_path / lora.FILE, lora.to_peft(layers), {"format": "pt", lora.METADATA: record})
    found = lora.read(tmp_path / lora.FILE, {name: (5, 3)}, None, "model.start")[name]
    taken = pattern != "*" and get_pattern_key([pattern], name) == pattern  # which is no regular expression
    assert found.alpha == (2.0 if taken else 8.0)


def test_a_lora_in_krea2s_own_names_is_read(tmp_path):
    """As ai-toolkit and Krea's trainer write one; its alpha is the file's."""
    model = drawn(load("krea2", lora_rank=RANK, lora_alpha=ALPHA))
    layers = adapters.layers_of(model.weights.network, "policy")
    own = {"to_q": "wq", "to_k": "wk", "to_v": "wv", "to_out.0": "wo"}
    tensors = {}
    for name, layer in layers.items():
        start, _, end = name.replace("text_fusion.", "txtfusion.").partition(".attn.")
        stem = f"diffusion_model.{start.replace('transformer_blocks', 'blocks')}.attn.{own[end]}"
        tensors |= {f"{stem}.lora_A.weight": layer.down.contiguous(), f"{stem}.lora_B.weight": layer.up.contiguous()}
        tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, tmp_path / "theirs.safetensors")
    found = lora.read(
        tmp_path / "theirs.safetensors", adapters.shapes_of(model.weights.network), model.facts, "model.start"
    )
    equal(found, layers)


@pytest.mark.parametrize("use_dora", [False, True])
def test_patterns_of_rank_and_alpha_and_dora_survive_a_run(use_dora, tmp_path):
    """A LoRA whose layers differ: begun with, saved, loaded again, and exported, it is what the file says."""
    generator = torch.Generator().manual_seed(1)
    shapes = adapters.shapes_of(saved("sd3")[1].transformer)
    layers = {
        name: lora.Lora(
            torch.randn(rank, shapes[name][1], generator=generator),
            torch.randn(shapes[name][0], rank, generator=generator),
            alpha,
            torch.rand(shapes[name][0], generator=generator) + 0.5 if use_dora else None,
        )
        for name, rank, alpha in (
            ("transformer_blocks.0.attn.to_q", RANK, ALPHA),
            ("transformer_blocks.0.attn.to_k", RANK, 3.0),
            ("transformer_blocks.1.attn.to_q", 2, ALPHA),
        )
    }
    tensors, metadata = to_form(layers, "diffusers", facts_of("sd3"))
    lora.write(tmp_path / "a" / lora.FILE, tensors, metadata)
    first = load("sd3")
    first.weights.begin(tmp_path / "a", rank=RANK, alpha=None)
    first.save_adapter(tmp_path / "b")
    second = load("sd3")
    second.weights.begin(tmp_path / "b", rank=RANK, alpha=None)
    found = adapters.layers_of(second.weights.network, "policy")
    equal(found, layers)
    if use_dora:
        assert all(torch.equal(found[name].magnitude, layers[name].magnitude) for name in layers)
        with torch.no_grad():
            for p in first.parameters():
                p.mul_(1.5)
        first.save_adapter(tmp_path / "c")
        second.load_adapter(tmp_path / "c")
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    pipeline = saved("sd3")[1]
    again = type(pipeline.transformer).from_pretrained(saved("sd3")[0], subfolder="transformer")
    again.load_lora_adapter(str(tmp_path / "b"), weight_name=lora.FILE, prefix=None, adapter_name="x")
    theirs = adapters.layers_of(again, "x")
    equal(theirs, layers)


def test_the_reference_may_be_the_start(tmp_path):
    """model.reference=start: what the policy is compared with has the LoRA too, and never trains."""
    model = drawn(load("sdxl", lora_rank=RANK, lora_alpha=ALPHA))
    model.save_adapter(tmp_path)
    begun, other = load("sdxl", lora_rank=RANK), load("sdxl", lora_rank=RANK)
    begun.weights.begin(tmp_path, rank=RANK, alpha=None, reference="start")
    other.weights.begin(tmp_path, rank=RANK, alpha=None)
    assert torch.equal(x0(begun, "reference"), x0(begun)) and not torch.allclose(x0(other, "reference"), x0(other))
    before = x0(begun, "reference")
    with torch.no_grad():
        for p in begun.parameters():
            p.add_(0.1)
    assert torch.equal(x0(begun, "reference"), before) and not torch.allclose(x0(begun), before)
    assert len(begun.parameters()) == len(model.parameters())


def test_what_the_file_says_and_the_recipe_does_not_is_named(tmp_path):
    drawn(load("flux", lora_rank=RANK, lora_alpha=ALPHA)).save_adapter(tmp_path)
    begun = load("flux", lora_rank=RANK)
    for options, said in (
        ({"rank": 8, "alpha": None}, f"has rank {RANK}; set model.lora_rank={RANK}"),
        ({"rank": RANK, "alpha": 4.0}, "has alpha 10, model.lora_alpha is 4"),
    ):
        with pytest.raises(InputError, match=said):
            begun.weights.begin(tmp_path, **options)
    with pytest.raises(InputError, match=r"has alpha 10, this model 4; set model.lora_alpha=10"):
        begun.load_adapter(tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"lora_te1_text_model.lora_down.weight": torch.zeros(2, 4)}, "LoRA of text encoders alone"),
        ({"transformer.x.hada_w1_a": torch.zeros(2, 4)}, "holds LoHa"),
        ({"transformer.x.lokr_w1": torch.zeros(2, 4)}, "holds LoKr"),
        ({"transformer.x.lora_A.weight": torch.zeros(2, 4)}, "x has no lora_B"),
        ({"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}, "LoRA of another model"),
    ],
)
def test_what_is_no_lora_of_this_model_is_a_sentence(name, tensors, said, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    model = load(name)
    for use in (lambda: model.weights.begin(tmp_path, rank=4, alpha=None), lambda: model.weights.add_frozen(tmp_path)):
        with pytest.raises(InputError, match=said):
            use()


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3"])
def test_a_frozen_lora_may_have_any_layout(name, tmp_path):
    model = drawn(load(name, lora_rank=RANK, lora_alpha=ALPHA))
    layers = adapters.layers_of(model.weights.network, "policy")
    tensors, metadata = to_form(layers, "diffusers", model.facts)
    lora.write(tmp_path / lora.FILE, tensors, metadata)
    for training in ("lora", "full"):
        other = load(name, training=training)
        other.weights.add_frozen(tmp_path)
        assert torch.allclose(x0(other, "consistency"), x0(model), atol=1e-6)


def test_the_same_adapter_has_the_same_bytes(tmp_path):
    """Whatever the order of sets and of safetensors' metadata, which differs from process to process."""
    model = drawn(load("flux", lora_rank=RANK))
    digests = set()
    for i in range(4):
        model.save_adapter(tmp_path / str(i))
        digests.add(hashlib.sha256((tmp_path / str(i) / lora.FILE).read_bytes()).hexdigest())
    for _ in range(4):
        lora.write(tmp_path / "x", {"b": torch.zeros(3), "a": torch.ones(2)}, {str(k): "é" for k in range(20)})
        digests.add(hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest())
    assert len(digests) == 2 and load_file(tmp_path / "x")["a"].sum() == 2
