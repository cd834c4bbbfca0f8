"""How a denoiser's blocks run: with which attention kernels, compiled, or kept in the host's memory between calls.

`keep_blocks_on_host` needs little of the accelerator: a frozen block's weights are copied there for its call and let go
after it. Blocks that are recomputed in the backward pass (gradient checkpointing, which it needs) bring their weights
once more, and autograd holds those for as long as the block's gradient takes. What trains, a LoRA, never moves.

diffusers' own group offloading (`hooks/group_offloading.py` of 0.42.1) cannot serve a LoRA that trains; held by
tests/models/test_why_own_offload.py:

- It offloads in `GroupOffloadingHook.post_forward`, which its wrapper of `forward` (`HookRegistry.register_hook`)
  reaches only if `forward` returns. torch's checkpoint ends a recomputation by an exception as soon as it has what it
  needs, so each block that the backward pass recomputes stays: in the end all of them.
- With that turned off (`set_checkpoint_early_stop(False)`) a block is offloaded once it is recomputed and before its
  gradient is made. `ModuleGroup._offload_to_memory` puts `param.data` elsewhere, and checkpoint keeps a frozen
  parameter itself, no alias: the gradient would be made of weights on the host. So would that of `leaf_level`.
- A block's LoRA travels with it. `ModuleGroup._process_tensors_from_modules` brings `data` back and not `grad`, so the
  second loss of a step, or the second micro-batch, cannot be added to the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from palate.runtime.errors import InputError, first_line

_HOME: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()  # of networks whose blocks wait on the host


def use_attention(network: Any, backend: str) -> None:
    """Have every attention use that kernel of diffusers, "native", "flash" or "_native_math". InputError: it cannot."""
    try:
        network.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise InputError(
            f"model.attention={backend}: {first_line(error)}; leave it out for torch's own kernels"
        ) from error


def compile_blocks(network: Any, backend: str = "inductor") -> None:
    """Compile the repeated blocks, each alone: seconds rather than minutes, and one for all blocks of a kind.

    InputError: diffusers does not know this network's repeated blocks.
    """
    check_compile(type(network))
    # a version for each name, size and gradient mode; past torch's eight the rest would run uncompiled
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    network.compile_repeated_blocks(backend=backend)


def check_compile(kind: Any) -> None:
    """InputError: diffusers names no repeated blocks of that class of network. Asked before any weight loads."""
    if issubclass(kind, ModelMixin) and not kind._repeated_blocks:
        raise InputError(f"model.compile: diffusers names no repeated blocks of {kind.__name__}; leave it out")


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks that are recomputed one by one, most of the network's weights: of a UNet the layers inside its blocks,
    of others their own lists."""
    if isinstance(network, UNet2DConditionModel):
        return [part for part in network.modules() if isinstance(part, (ResnetBlock2D, BasicTransformerBlock))]
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]


def keep_blocks_on_host(network: nn.Module, device: torch.device) -> None:
    """From now on the frozen weights of the network's blocks are on `device` only while their block runs.

    All else, adapters too, is moved there for good. InputError: the network has no lists of blocks.
    """
    blocks = blocks_of(network)
    if not blocks:
        raise InputError(f"model.offload: {type(network).__name__} has no list of blocks; leave it out")
    _HOME[network] = device
    waiting = {id(p) for block in blocks for p in block.parameters() if not p.requires_grad}
    for tensor in (*network.parameters(), *network.buffers()):
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(device)
    for block in blocks:
        kept = _Kept(block, device)
        block.register_forward_pre_hook(kept.bring)
        block.register_forward_hook(kept.let_go, always_call=True)  # a recomputation ends by an exception


class _Kept:
    """One block's frozen weights on the host, in pinned memory where there is an accelerator to copy them to.

    For a call other parameters stand in their places: autograd holds those until the block's gradient is made, and
    never meets the ones on the host.
    """

    def __init__(self, block: nn.Module, device: torch.device):
        self.device = device
        self.places = [
            (module, name, p)
            for module in block.modules()
            for name, p in module.named_parameters(recurse=False)
            if not p.requires_grad
        ]
        for _, _, p in self.places:
            p.data = p.data.cpu().pin_memory() if device.type == "cuda" else p.data.cpu()

    def bring(self, block: nn.Module, given: Any) -> None:
        for module, name, p in self.places:
            value = torch.empty_like(p, device=self.device).copy_(p, non_blocking=True)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def let_go(self, block: nn.Module, given: Any, output: Any) -> None:
        for module, name, p in self.places:
            module._parameters[name] = p


def waits_on_host(network: nn.Module) -> bool:
    """Whether the network's blocks wait on the host."""
    return network in _HOME


def bring_adapters(network: nn.Module, added: Iterable[nn.Parameter]) -> None:
    """Adapters added after `keep_blocks_on_host` come to the accelerator, as the first ones did."""
    if network in _HOME:
        for p in added:
            p.data = p.data.to(_HOME[network])
