"""Frozen weights in fewer bits: what a LoRA learns on them is what it learns on the whole ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_families import FAMILIES, load, saved, wide
from transformers import T5EncoderModel, UMT5EncoderModel

from palate import recipe
from palate.cli.export import export_run
from palate.models import adapters
from palate.models.quantised import BYTES, METHODS, Float8Linear, quantisable, quantise, stored_in_fours
from palate.plan import Unit
from palate.plan.count import Counts
from palate.plan.memory import memory_of
from palate.runtime.errors import InputError

NAMES = [n for n in FAMILIES if not n.endswith(("-v", "-schnell", "-sigma", "-base", "-dev", "-turbo"))]
# Smallest cosine of the two gradients, on one random network each, 64 to 192 wide. docs/models.md has the median of
# four: one in four of FLUX.2, SANA and Z-Image is below .99, and this is FLUX.2's. Width makes no difference: a random
# matrix passes as much of its error on as of itself. Aura-flow's weights are drawn large, and amplify.
LIMITS = {"nf4": 0.99, "int8": 0.999, "fp8": 0.99}
LOWER = {
    "flux2-klein": {"nf4": 0.98, "int8": 0.999, "fp8": 0.99},
    "aura-flow": {"nf4": 0.5, "int8": 0.998, "fp8": 0.93},
}


def gradient(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    noise = torch.randn((2, *model.latent_shape), generator=generator)
    cond = model.encode_prompts(["a cat", "two dogs"])
    model.predict(noise, torch.tensor([0.7, 0.4]), cond).x0.square().mean().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def test_an_adapter_of_a_network_in_eight_bits_is_not_in_eight_bits():
    network = load("flux", quantize="fp8").weights.network
    adapters.add(network, "later", network.peft_config["policy"])
    later = adapters.own_parameters(network, "later", adapter=True)
    assert later and {p.dtype for p in later.values()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_lora_is_that_of_the_whole_network(name, method):
    pytest.importorskip("bitsandbytes")
    whole = load(name, wide(name))
    expected = gradient(whole)
    model = load(name, wide(name), quantize=method)
    model.parts = whole.parts  # the same words: what the encoders lose is not what is compared
    found = gradient(model)
    assert found.isfinite().all() and expected.norm() > 0
    cosine = float(torch.nn.functional.cosine_similarity(found, expected, dim=0))
    print(f"{name} {method}: cosine {cosine:.5f}")
    assert cosine > LOWER.get(name, LIMITS)[method] and not torch.equal(found, expected)


def test_the_layers_of_the_blocks_are_stored_in_fewer_bits_and_no_other():
    network = saved("flux")[1].transformer
    names = quantisable(network)
    assert "transformer_blocks.0.attn.to_out.0" in names and "single_transformer_blocks.0.proj_mlp" in names
    assert not {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} & set(names)
    model = load("flux", quantize="fp8")
    stored = {n: m for n, m in model.weights.network.named_modules() if isinstance(m, Float8Linear)}
    assert {name.removesuffix(".base_layer") for name in stored} == set(names)
    assert {m.weight.dtype for m in stored.values()} == {torch.float8_e4m3fn}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_rounding_is_the_formats():
    """fp8: at most 1/16 of a weight, whose mantissa has three bits; nf4 and int8 by their own distances."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x = torch.eye(64)
    for method, limit in (("fp8", 0.04), ("int8", 0.01), ("nf4", 0.12)):
        net = torch.nn.Module()
        net.blocks = torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=False)])
        net.blocks[0].weight.data = weight.clone()
        found = quantise(net, method, torch.float32).to("cpu").blocks[0](x).T
        assert 0 < float((found - weight).norm() / weight.norm()) < limit, method


@pytest.mark.parametrize("name", NAMES)
def test_words_are_read_by_stored_encoders_as_by_whole_ones(name):
    prompts = ["a cat on a red mat", "two dogs"]
    whole = load(name, training="none").encode_prompts(prompts)
    for method in ("int8", "fp8"):  # nf4 leaves encoders of this width whole
        found = load(name, quantize=method, training="none").encode_prompts(prompts)
        for ours, theirs in zip(found, whole, strict=True):
            if theirs.is_floating_point():
                cosine = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
                assert cosine > 0.98, (method, float(cosine))
            else:
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [T5EncoderModel, UMT5EncoderModel])
def test_t5_reads_on_through_weights_of_any_type(kind, method):
    """Its feed-forward casts to the type of the weights of `wo`, which in four bits is a byte's."""
    torch.manual_seed(0)
    encoder = kind(kind.config_class(vocab_size=40, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)).eval()
    words = torch.arange(2, 22).view(2, 10)
    with torch.no_grad():
        expected = encoder(words).last_hidden_state.flatten()
        stored = quantise(encoder.requires_grad_(False), method, torch.float32).to("cpu")
        found = stored(words).last_hidden_state.flatten()
    assert 0.98 < torch.nn.functional.cosine_similarity(found, expected, dim=0) < 1


def test_four_bits_of_a_row_that_ends_inside_a_block_are_not_trusted():
    """bitsandbytes' kernel for processors takes the scales of another row's blocks; such a layer stays as it is."""
    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList([torch.nn.Linear(width, 64, bias=False) for width in (16, 64, 160, 192)])
    assert [int(name[-1]) for name in stored_in_fours(net)] == [1, 3]
    kept = net.blocks[2]
    assert quantise(net, "nf4", torch.float32).blocks[2] is kept


def test_what_a_family_starts_from_stays_whole_in_four_bits_alone():
    network = load("z-image", wide("z-image"), training="none").weights.network
    facts = load("z-image", training="none").facts
    every, fours = quantisable(network), stored_in_fours(network, facts.whole)
    assert {name for name, layer in every.items() if layer.in_features % 64 == 0} - fours.keys() == {
        name for name, layer in every.items() if set(facts.whole) & set(name.split(".")) and layer.in_features % 64 == 0
    }
    model = load("z-image", wide("z-image"), quantize="nf4", training="none").weights.network
    stored = {name for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert stored == fours.keys() and 0 < len(fours) < len(every)


def test_a_start_and_an_export_of_a_quantised_run(tmp_path):
    first = load("flux", wide("flux"), quantize="nf4")
    gradient(first)
    first.save_adapter(tmp_path)
    second = load("flux", wide("flux"), quantize="int8")
    second.weights.begin(tmp_path, rank=4, alpha=None)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(InputError, match=r"cannot be merged; load it with model.quantize=null"):
        first.weights.merged()


def test_a_run_whose_frozen_weights_are_stored_small_is_merged_with_whole_ones(tmp_path, monkeypatch):
    """`palate export --format merged` of a run with model.quantize and model.offload."""

    def trained(model, run, *, warn):
        for k, p in enumerate(model.parameters()):
            p.data.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))

    monkeypatch.setattr("palate.runs.folder.load_result", trained)
    changes = [
        f"model.folder={wide('flux')}", f"model.text_cache={tmp_path}", "model.dtype=float32", "model.lora_rank=4",
        "model.quantize=fp8", "model.offload=true", "algorithm.preference=absolute", "reward={name: warmth}",
    ]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe.dump(recipe.read("srpo-flux", changes)))
    export_run(tmp_path, "merged", None)
    plain = load("flux", wide("flux"))
    trained(plain, tmp_path, warn=print)
    expected = plain.weights.merged().state_dict()
    found = load_file(tmp_path / "export/merged/transformer/diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "_name_or_path" not in (tmp_path / "export/merged/transformer/config.json").read_text()


def test_what_does_not_go_together_is_a_sentence():
    with pytest.raises(InputError, match="expected one of nf4, int8, fp8"):
        load("flux", quantize="nf5")
    with pytest.raises(InputError, match=r"model.quantize stores frozen weights; set model.weights=lora"):
        load("flux", quantize="nf4", training="full")


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_knows_what_is_stored(method):
    base = ["model.folder=owner/base", "algorithm.preference=absolute", "reward={name: warmth}"]
    made = recipe.read("srpo-flux", base)
    less = recipe.read("srpo-flux", [*base, f"model.quantize={method}"])
    unit = Unit(1000, 1.0, 1.0, 0.0, 0.0, 0.0, 100, 0.0, 600)
    units = {name: unit for name in ("denoiser", "decoder", "encoder", "reward")}
    before, after = (memory_of(r, units, Counts({}, {}), 1)["denoiser, frozen"] for r in (made, less))
    assert before == 900 * 2 and after == pytest.approx(300 * 2 + 600 * BYTES[method])
    assert recipe.fingerprint(made) != recipe.fingerprint(less)


def test_a_plan_leaves_out_what_four_bits_leave_whole():
    base = ["model.folder=owner/base", "algorithm.preference=absolute", "reward={name: warmth}"]
    unit = Unit(1000, 1.0, 1.0, 0.0, 0.0, 0.0, 100, 0.0, 600, whole=200)
    units = {name: unit for name in ("denoiser", "decoder", "encoder", "reward")}

    def frozen(method):
        read = recipe.read("srpo-flux", [*base, f"model.quantize={method}"])
        return memory_of(read, units, Counts({}, {}), 1)["denoiser, frozen"]

    assert frozen("nf4") == pytest.approx(500 * 2 + 400 * BYTES["nf4"]) and frozen("int8") == 300 * 2 + 600
