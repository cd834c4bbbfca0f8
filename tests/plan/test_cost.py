"""What an update needs: bytes kept for its backward pass at FLUX's real size, and the network calls it makes."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from support import ROOT
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPModel

from palate.algorithms.srpo import SRPO, SRPOSettings
from palate.core import Batch, Random
from palate.models import flux
from palate.models.autoencoder import Autoencoder
from palate.models.facts import VAE_16
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


def unavoidable() -> dict[str, float]:
    """Bytes that the backward pass of one branch needs at 1024 pixels, batch 1, bfloat16, frozen weights, from shapes.

    Recomputed pieces: their input, once. Between them: the input of every norm and activation; q, k, v and output of
    every attention. Nothing else: a frozen layer's gradient needs its weight only.
    """
    tokens, width = 4096 + 512, 3072
    blocks = 19 + 38
    transformer = 2 * blocks * tokens * width + 2 * 4096 * width + 4 * 2 * tokens * 128  # last norm; rotary angles
    pieces = [(512, 128)] * 6 + [(512, 256)] * 4 + [(512, 512), *[(256, 512)] * 3] + [(256, 1024), *[(128, 1024)] * 3]
    decoder = sum(2 * channels * side**2 for channels, side in pieces) + 5 * 2 * 512 * 128**2  # and middle attention
    decoder += 4 * 3 * 1024**2  # the image, where it is clipped to [0, 1]
    tower = 32 * 2 * 257 * 1280 * (1 + 4 + 1 + 4)  # a layer: norm, attention, norm, activation (4 widths)
    return {"transformer": transformer, "decoder": decoder, "reward": tower}


@pytest.fixture(scope="module")
def real():
    """FLUX.1-dev, its VAE and HPSv2's tower at their real sizes, on the meta device."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True).bfloat16()
        vae = AutoencoderKL(**VAE_16).bfloat16()
        clip = CLIPModel(vit_h_14()).bfloat16()
    weights = NamedWeights(network, training="lora", rank=16, alpha=None, targets=flux.LORA_TARGETS)
    for parameter in weights.parameters():
        parameter.data = parameter.data.float()
    weights.checkpoint_activations()
    decoder = Autoencoder(vae, device=torch.device("meta"), gradient_checkpointing=True)
    cpu = torch.device("cpu")  # only asked whether to autocast
    parts = Parts(None, "transformer", weights, decoder, None, (16, 128, 128), (1024, 1024), torch.bfloat16, cpu, None)
    reward = ClipReward(clip, lambda prompts: {}, image_size=224)
    reward._text = lambda prompt: torch.empty(1024, device="meta")  # text features are cached by then
    return flux.Flux(parts, None), reward, [*network.parameters(), *vae.parameters(), *clip.parameters()]


def test_an_update_of_flux_keeps_no_more_than_its_backward_pass_needs(real):
    """Everything alive when a branch's loss is there, whoever holds it: graph, checkpoints, locals."""
    model, reward, weights = real
    cond = flux.Cond(torch.empty(1, 512, 4096, device="meta"), torch.empty(1, 768, device="meta"))
    latents = torch.empty(1, 16, 128, 128, device="meta")  # real images: the rollout keeps nothing anyway
    batch = Batch(["a dog"], cond, torch.arange(1), latents)
    steps = SRPO(SRPOSettings()).step(model, reward, batch, Random(0, 1, [0]))
    with fused_attention(), Alive(weights) as alive:
        loss = next(steps)
    needed = unavoidable()
    print(f"kept {alive.bytes() / GIB:.3f} GiB; needed", {name: f"{n / GIB:.3f}" for name, n in needed.items()})
    assert needed["transformer"] / GIB == pytest.approx(1.5, abs=0.05)
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
