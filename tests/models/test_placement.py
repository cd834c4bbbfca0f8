"""How blocks run changes no gradient: on the host between calls, compiled, with named kernels; and plan knows it."""

from __future__ import annotations

import pytest
import torch
from support.tiny_families import load, saved

from palate import recipe
from palate.models import adapters, placement
from palate.models.options import place_of
from palate.models.placement import blocks_of, compile_blocks
from palate.plan import Unit
from palate.plan.count import Counts
from palate.plan.memory import memory_of
from palate.runtime.errors import InputError

CUT = """
model: {{name: flux, folder: {}, weights: full, dtype: float32}}
algorithm: {{name: draft, K: 1, n: 0, steps: 2, guidance: 1.0}}
reward: {{name: brightness}}
evaluate: {{heldout: clip-score}}
prompts: {{list: [a cat]}}
trainer: {{sharding: full, guard: {{every: 0}}}}
"""
TIMES = torch.tensor([0.7, 0.4])


def gradient(model):
    """Of a prediction that the reference is asked beside, through policy and VAE, in every trained tensor."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    noise, cond = torch.randn((2, *model.latent_shape), generator=generator), model.encode_prompts(["a cat", "a dog"])
    found = model.predict(noise, TIMES, cond).x0
    with torch.no_grad():
        other = model.predict(noise, TIMES, cond, weights="reference").x0
    (found - other).square().mean().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def test_networks_that_are_to_be_cut_wait_on_the_host(monkeypatch):
    """FSDP brings them to the card block by block; whole, a large one would not fit. A result is drawn uncut."""
    model = load("flux", training="full", cut=True, device="meta")
    assert {p.device.type for network in model.weights.networks.values() for p in network.parameters()} == {"cpu"}
    assert model.device.type == "meta" and all(p.is_meta for p in model.parts.vae.vae.parameters())
    made = recipe.parse(CUT.format(saved("flux")[0]))
    asked = []
    monkeypatch.setattr("palate.models.flux.Flux.load", lambda folder, **options: asked.append(options) or 1 / 0)
    for build in (recipe.build, recipe.build_model):
        with pytest.raises(ZeroDivisionError):
            build(made)
    assert asked[0]["cut"] is True and "cut" not in asked[1]


@pytest.mark.parametrize("name", ["flux", "qwen-image", "chroma", "sd3", "sdxl", "stable-diffusion"])
def test_blocks_on_the_host_change_no_gradient(name, monkeypatch):
    """Between calls their weights here are not a number, as unreachable for autograd as those of another device."""
    expected = gradient(load(name))
    bring, let_go, values = placement._Kept.bring, placement._Kept.let_go, {}

    def fetched(self, block, given):
        for _, _, p in self.places:
            p.data = values.get(id(p), p.data)
        bring(self, block, given)

    def unreachable(self, block, given, output):
        let_go(self, block, given, output)
        for _, _, p in self.places:
            values.setdefault(id(p), p.data)
            p.data = torch.full_like(p, torch.nan)

    monkeypatch.setattr(placement._Kept, "bring", fetched)
    monkeypatch.setattr(placement._Kept, "let_go", unreachable)
    model = load(name, offload=True)
    assert len(blocks_of(model.weights.network)) >= 2
    found = gradient(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    waiting = [p for block in blocks_of(model.weights.network) for p in block.parameters() if not p.requires_grad]
    assert waiting and all(bool(p.isnan().all()) for p in waiting)


def test_a_recomputation_that_ends_early_lets_its_block_go():
    """torch stops a recomputation by an exception once it has what it needs."""
    model = load("flux", offload=True)
    gradient(model)
    for block in blocks_of(model.weights.network):
        kept = next(iter(block._forward_pre_hooks.values())).__self__
        assert kept.places and all(module._parameters[name] is p for module, name, p in kept.places)


def test_adapters_that_come_later_are_where_the_others_are(tmp_path):
    model = load("flux", offload=True)
    gradient(model)
    model.save_adapter(tmp_path)
    begun = load("flux", offload=True)
    begun.weights.begin(tmp_path, rank=4, alpha=None, reference="start")
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), model.parameters(), strict=True))
    assert {p.device.type for p in begun.weights.network.parameters()} == {"cpu"}
    with pytest.raises(InputError, match=r"to merge, load it with model.offload=null"):
        begun.weights.merged()


def test_an_adapter_named_as_a_part_of_the_network_brings_itself_only(monkeypatch):
    network = load("flux").weights.network
    monkeypatch.setitem(placement._HOME, network, torch.float64)  # in place of a device: what moves is seen
    adapters.add(network, "0", adapters.config_of(adapters.layers_of(network, "policy")))
    brought = {key for key, p in network.named_parameters() if p.dtype == torch.float64}
    assert brought == adapters.own_parameters(network, "0", adapter=True).keys() != set()


def test_compiled_blocks_predict_the_same():
    """Traced as torch.compile does, without writing machine code: what tracing cannot follow breaks here."""
    torch._dynamo.reset()
    plain, model = load("flux"), load("flux")
    compile_blocks(model.weights.network, backend="eager")
    expected, found = gradient(plain), gradient(model)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found, expected, strict=True))
    assert torch._dynamo.config.recompile_limit >= 64  # eight names, sizes and gradient modes are soon passed
    assert all(block._compiled_call_impl is not None for block in blocks_of(model.weights.network))
    with pytest.raises(InputError, match=r"model.compile: diffusers names no repeated blocks of SD3Transformer2DModel"):
        compile_blocks(load("sd3").weights.network)


def test_named_attention_kernels():
    plain, model = load("flux"), load("flux", attention="_native_math")
    expected, found = gradient(plain), gradient(model)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found, expected, strict=True))
    with pytest.raises(InputError, match=r"model.attention=flasch: .*must be one of.*leave it out for torch's own"):
        load("flux", attention="flasch")
    with pytest.raises(InputError, match=r"model.attention=flash: .*leave it out for torch's own kernels"):
        load("flux", attention="flash")  # which is not installed


def test_kernels_without_a_gradient_do_not_train():
    with pytest.raises(InputError, match=r"model.attention=sage_hub has no gradient.*leave it out"):
        load("flux", attention="sage_hub")


def test_each_of_several_processes_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place_of("cuda:1") == torch.device("cuda:1")
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert place_of("cuda:1") == torch.device("cuda:1") and place_of("cuda") == torch.device("cuda")
    with pytest.raises(InputError, match=r"model.device cuda:0: .*leave it out"):
        place_of("cuda:0")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"training": "full"}, "set model.weights=lora"),
        ({"compile": True}, "leave model.compile out"),
        ({"quantize": "nf4"}, "use model.quantize=fp8"),
        ({"gradient_checkpointing": False}, "needs model.gradient_checkpointing=true"),
    ],
)
def test_what_does_not_go_with_offload_is_a_sentence(options, said):
    with pytest.raises(InputError, match=f"model.offload .*{said}"):
        load("flux", offload=True, **options)


def test_a_plan_knows_offload_and_the_small_optimizer():
    base = ["model.folder=owner/base", "algorithm.preference=absolute", "reward={name: warmth}"]
    unit = Unit(1000, 1.0, 1.0, 0.0, 0.0, 0.0, 100, 0.0, 600, 800, 80)
    units = {name: unit for name in ("denoiser", "decoder", "encoder", "reward")}

    def planned(*more):
        return memory_of(recipe.read("srpo-flux", [*base, *more]), units, Counts({}, {}), 1)

    assert planned("model.offload=true")["denoiser, frozen"] == (900 - 800 + 80) * 2
    assert planned("model.offload=true", "model.quantize=fp8")["denoiser, frozen"] == 300 * 2 + 600 - 720
    assert planned()["Adam's two moments (float32)"] == 8 * 100
    small = planned("trainer.optimizer=adamw8bit")
    assert small["Adam's two moments (8 bits)"] == pytest.approx(2 * 100 * (1 + 4 / 256))
    with pytest.raises(recipe.RecipeError, match=r"adamw8bit keeps its moments whole on each rank"):
        recipe.read("srpo-flux", [*base, "trainer.optimizer=adamw8bit", "trainer.sharding=full"])
