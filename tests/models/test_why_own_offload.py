"""Why blocks wait on the host by code of Palate's own: what diffusers' group offloading does to a LoRA that trains.

The day that one of these fails, diffusers may have become able to do it: see `palate.models.placement`.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup, apply_group_offloading
from support.tiny_families import load
from torch.utils.checkpoint import set_checkpoint_early_stop

from palate.models.placement import blocks_of

CPU = torch.device("cpu")


@pytest.fixture
def groups(monkeypatch):
    """Each group of modules as it is now, "on" the accelerator or "off" it; off it, frozen weights are not a number, as
    unreachable as those of another device."""
    state, values = {}, {}

    def frozen(group):
        return [p for module in group.modules for p in module.parameters() if not p.requires_grad]

    def onload(group):
        state[id(group)] = "on"
        for p in frozen(group):
            p.data = values.get(id(p), p.data)

    def offload(group):
        state[id(group)] = "off"
        for p in frozen(group):
            values.setdefault(id(p), p.data)
            p.data = torch.full_like(p, torch.nan)

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    return state


def loss_of(model):
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    noise, cond = torch.randn(2, *model.latent_shape), model.encode_prompts(["a cat", "a dog"])
    return model.predict(noise, torch.tensor([0.7, 0.4]), cond).x0.square().mean()


def test_blocks_pile_up_in_the_backward_pass(groups):
    """A recomputation ends by an exception, past which diffusers' wrapper of `forward` does not offload."""
    model = load("flux")
    apply_group_offloading(model.weights.network, CPU, CPU, num_blocks_per_group=1)
    loss = loss_of(model)
    assert "on" not in groups.values()
    loss.backward()
    blocks = len(blocks_of(model.weights.network))
    assert blocks >= 2 and list(groups.values()).count("on") == blocks  # and so nearly all of the weights


def test_or_their_weights_are_gone_before_their_gradient_is_made(groups):
    """Recomputed to their end, blocks are offloaded there, and the backward pass finds the frozen weights elsewhere:
    checkpoint keeps the parameter itself, whose data was put in another place."""
    model = load("flux")
    apply_group_offloading(model.weights.network, CPU, CPU, num_blocks_per_group=1)
    with set_checkpoint_early_stop(False):
        loss_of(model).backward()
    assert any(not bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_and_what_trains_is_moved_without_its_gradient():
    """Second losses of a step add to a gradient that stayed behind: `data` moves, `grad` does not."""
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    group = ModuleGroup([layer], torch.device("meta"), CPU, offload_leader=layer)
    moved = []
    group._transfer_tensor_to_device = lambda tensor, source, stream: moved.append(tensor)
    group._process_tensors_from_modules()
    assert {id(t) for t in moved} == {id(layer.weight), id(layer.bias)}
    assert not any(tensor is layer.weight.grad for tensor in moved)
