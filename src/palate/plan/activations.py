"""What a network costs on one image: FLOPs by torch's counter, and the bytes that autograd keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from palate.models.placement import blocks_of
from palate.models.quantised import quantisable


class Unit(NamedTuple):
    """One network on one image, in FLOPs and bytes."""

    parameters: int
    forward: float
    backward: float  # without recomputation
    kept: float  # bytes for the backward pass, every activation
    kept_checkpointed: float  # bytes with each block recomputed
    block: float  # bytes of the largest block while it is recomputed
    trained: int = 0  # parameters with a gradient
    weight_bytes: float = 0.0
    quantisable: int = 0  # parameters that model.quantize stores in fewer bits
    blocks: int = 0  # frozen parameters of the network's blocks, which model.offload keeps on the host
    largest_block: int = 0  # of one of them
    whole: int = 0  # of `quantisable`, what four bits leave as it is


def measure_unit(module: nn.Module, run: Callable[[], Tensor], checkpointing: Callable[[Any], None] | None) -> Unit:
    """The costs of `module` on what `run` sends through it; `checkpointing(function)` has its blocks recomputed."""
    weights = list(module.parameters()) + list(module.buffers())
    own = {w.untyped_storage()._cdata for w in weights}
    with fused_attention():
        with FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                run()
            forward = counter.get_total_flops()
        with kept_bytes(own) as kept, FlopCounterMode(display=False) as counter:
            output = run()
            if output.requires_grad:
                output.backward(torch.empty_like(output))
            backward = counter.get_total_flops() - forward if output.requires_grad else 0
        for p in module.parameters():
            p.grad = None
        fewer, block = kept.total, 0.0
        if checkpointing is not None:
            with kept_bytes(own) as stored:
                checkpointing(stored.recomputed)
                run()
            fewer, block = stored.total, stored.largest
    return Unit(
        sum(p.numel() for p in module.parameters()),
        float(forward),
        float(backward),
        kept.total,
        fewer,
        block,
        sum(p.numel() for p in module.parameters() if p.requires_grad),
        float(sum(p.numel() * p.element_size() for p in module.parameters())),
        sum(layer.weight.numel() for layer in quantisable(module).values()),
        sum(frozen := [_frozen(block) for block in blocks_of(module)]),
        max(frozen, default=0),
    )


def _frozen(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not p.requires_grad)


class KeptBytes:
    """Bytes of the different storages that autograd keeps, weights left out."""

    def __init__(self, own: set[int]):
        self.own, self.largest = own, 0.0
        self.seen: dict[int, int] = {}
        self.alive: list[torch.UntypedStorage] = []

    @property
    def total(self) -> float:
        return float(sum(self.seen.values()))

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.seen[storage._cdata] = storage.nbytes()
            self.alive.append(storage)  # so that no other takes its address
        return tensor

    def recomputed(self, function: Callable[..., Any], *args: Any) -> Any:
        """As torch.utils.checkpoint: only the arguments are kept; what is made inside is counted as one block."""
        for value in args:
            if isinstance(value, Tensor):
                self.note(value)
        inside = KeptBytes(self.own | self.seen.keys())
        with torch.autograd.graph.saved_tensors_hooks(inside.note, lambda tensor: tensor):
            output = function(*args)
        self.largest = max(self.largest, inside.total)
        return output


@contextmanager
def kept_bytes(own: set[int]) -> Iterator[KeptBytes]:
    """Counts what autograd keeps for the backward pass inside the block; storages in `own` are not counted."""
    counted = KeptBytes(own)
    with torch.autograd.graph.saved_tensors_hooks(counted.note, lambda tensor: tensor):
        yield counted


class _Attention(torch.autograd.Function):
    """softmax(q k^T) v as fused kernels keep it: q, k, v, the output and one number per row, never a matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = (q @ k.transpose(-1, -2)) @ v
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        p = q.new_empty(*q.shape[:-1], k.shape[-2])
        dp = grad @ v.transpose(-1, -2)
        return dp @ k, dp.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


@contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device torch would take the unfused path, which keeps matrices that no real run keeps; on the CPU,
    one that its counter does not know. Values do not matter here."""
    original = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, enable_gqa: bool = False, **options: Any
    ) -> Tensor:
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return _Attention.apply(query, key, value)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
