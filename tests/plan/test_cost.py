"""What an update needs: bytes kept for its backward pass at real sizes, and the network calls it makes."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from support import ROOT
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPModel

from palate.algorithms.srpo import SRPO, SRPOSettings
from palate.core import Batch, Random
from palate.models import flux, flux2
from palate.models.autoencoder import Autoencoder
from palate.models.parts import Parts
from palate.models.weights import NamedWeights
from palate.plan import GIB
from palate.plan.activations import fused_attention
from palate.rewards.clip import ClipReward, vit_h_14

sys.path.insert(0, str(ROOT / "benchmarks"))

import flux_step


class Alive(TorchDispatchMode):
    """The storages that are made inside; `bytes()` of those that something still holds, whatever holds them."""

    def __init__(self, known):
        super().__init__()
        self.known, self.made = {w.untyped_storage()._cdata for w in known}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return output

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def unavoidable(blocks: int) -> dict[str, float]:
    """Bytes that the backward pass of one branch needs at 1024 pixels, batch 1, bfloat16, frozen weights, from shapes.

    Recomputed pieces: their input, once. Between them: the input of every norm and activation; q, k, v and output of
    every attention. Nothing else: a frozen layer's gradient needs its weight only. FLUX.1 and FLUX.2-klein-4B have the
    same width, tokens and decoder, and another number of blocks.
    """
    tokens, width = 4096 + 512, 3072
    transformer = 2 * blocks * tokens * width + 2 * 4096 * width + 4 * 2 * tokens * 128  # last norm; rotary angles
    pieces = [(512, 128)] * 6 + [(512, 256)] * 4 + [(512, 512), *[(256, 512)] * 3] + [(256, 1024), *[(128, 1024)] * 3]
    decoder = sum(2 * channels * side**2 for channels, side in pieces) + 5 * 2 * 512 * 128**2  # and middle attention
    decoder += 4 * 3 * 1024**2  # the image, where it is clipped to [0, 1]
    tower = 32 * 2 * 257 * 1280 * (1 + 4 + 1 + 4)  # a layer: norm, attention, norm, activation (4 widths)
    return {"transformer": transformer, "decoder": decoder, "reward": tower}


FAMILIES = {  # its class, blocks, channels and side of the latents
    "flux": (flux.Flux, 19 + 38, (16, 128, 128)),
    "flux2": (flux2.Flux2, 5 + 20, (128, 64, 64)),  # klein 4B
}


@pytest.fixture(scope="module", params=FAMILIES)
def real(request):
    """The transformer of a family, its VAE and HPSv2's tower at their real sizes, on the meta device."""
    family, blocks, shape = FAMILIES[request.param]
    facts = family.facts
    with torch.device("meta"):
        network = facts.network(**facts.published.config).bfloat16()
        vae = facts.vae(**facts.published.vae).bfloat16()
        clip = CLIPModel(vit_h_14()).bfloat16()
    weights = NamedWeights(network, training="lora", rank=16, alpha=None, targets=facts.lora_targets)
    for parameter in weights.parameters():
        parameter.data = parameter.data.float()
    weights.checkpoint_activations()
    decoder = Autoencoder(vae, device=torch.device("meta"), gradient_checkpointing=True, layout=facts.layout)
    cpu = torch.device("cpu")  # only asked whether to autocast
    folder = SimpleNamespace(index={})
    parts = Parts(folder, facts, weights, decoder, None, shape, (1024, 1024), torch.bfloat16, cpu, None)
    reward = ClipReward(clip, lambda prompts: {}, image_size=224)
    reward._text = lambda prompt: torch.empty(1024, device="meta")  # text features are cached by then
    return family(parts, None), blocks, reward, [*network.parameters(), *vae.parameters(), *clip.parameters()]


def test_an_update_keeps_no_more_than_its_backward_pass_needs(real):
    """Everything alive when a branch's loss is there, whoever holds it: graph, checkpoints, locals."""
    model, blocks, reward, weights = real
    with torch.device("meta"):
        cond = model.facts.published.condition(model.weights.network.config, 512, torch.float32)
        latents = torch.empty(1, *model.latent_shape)  # real images: the rollout keeps nothing anyway
    batch = Batch(["a dog"], cond, torch.arange(1), latents)
    steps = SRPO(SRPOSettings()).step(model, reward, batch, Random(0, 1, [0]))
    with fused_attention(), Alive(weights) as alive:
        loss = next(steps)
    needed = unavoidable(blocks)
    print(f"kept {alive.bytes() / GIB:.3f} GiB; needed", {name: f"{n / GIB:.3f}" for name, n in needed.items()})
    assert needed["transformer"] / GIB == pytest.approx(0.026 * blocks, abs=0.06)
    assert loss.value.requires_grad
    assert sum(needed.values()) <= alive.bytes() <= 1.05 * sum(needed.values())


def test_an_update_of_flux_makes_the_calls_of_the_formula_and_the_gradient_of_the_released_step():
    """benchmarks/flux_step.py restates the released step from its formulas: the same calls, the same gradient."""
    model, reward, cond = flux_step.build(pixels=32, width=32, blocks=(1, 1), channels=(8,) * 4, tower=(32, 1))
    found = []
    for gradients in (flux_step.palate_gradients, flux_step.released_gradients):
        calls = flux_step.count(model, reward, lambda: gradients(model, reward, cond, Random(0, 1, [0])))  # noqa: B023
        assert calls == {"predict": 6 + 2, "decode": 2, "image_towers": 2}
        assert all(p.grad is None for p in [*model.parts.vae.vae.parameters(), *reward.model.parameters()])
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        for parameter in model.parameters():
            parameter.grad = None
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-5  # 2e-6: float32, another order of operations
