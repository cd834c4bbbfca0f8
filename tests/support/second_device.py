"""A second device in the machine's own memory: `gpu:0`, which computes what the CPU computes and mixes with nothing.

torch lets Python be a backend. Here each operation on tensors of `gpu:0` runs on the CPU over the same memory, so the
numbers are the CPU's to the last bit, and a tensor that was left on the CPU meets it with the error that it would meet
on a GPU. What this cannot show: memory, speed, kernels, and everything that asks `torch.cuda`.

Import it first in a process of its own: torch then has an accelerator, and other tests expect none.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "gpu"
_CPU, _OTHER = 1, 12  # DLPack's device types
_MAY_MIX = {  # as on a GPU: copies between devices, and indices that wait on the CPU
    f"aten::{name}"
    for name in ("copy_", "_to_copy", "_copy_from", "_copy_from_and_resize", "index", "index_put_", "_index_put_impl_")
}

_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Module:
    """What torch asks of `torch.gpu`."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _same_memory(tensor: torch.Tensor, device: int) -> torch.Tensor:
    """DLPack's record begins with a pointer to the data, the type of the device and its number."""
    capsule = torch._C._to_dlpack(tensor)
    ctypes.c_int32.from_address(_address(capsule, b"dltensor") + 8).value = device
    return torch._C._from_dlpack(capsule)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _here(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    left = [t for t in given if not _here(t) and t.dim()]
    if left and len(left) < len(given) and op._schema.name not in _MAY_MIX:
        raise RuntimeError(f"{op}: expected all tensors on one device, got one of {tuple(left[0].shape)} on the CPU")
    if op._schema.name == "aten::_copy_from":
        _on_cpu(args[1]).copy_(_on_cpu(args[0]))
        return args[1]
    if op._schema.name == "aten::as_strided":  # its offset counts from the storage's start
        return torch.ops.aten.alias(args[0]).as_strided_(*args[1:], **kwargs)
    wanted = kwargs.get("device")
    stays = wanted is not None and torch.device(wanted).type == "cpu"
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def lent(leaf: Any) -> Any:
        own = _on_cpu(leaf)
        if _here(leaf):
            moved[id(own)] = leaf, own
        return own

    def back(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in moved:  # written in place
            ours, own = moved[id(leaf)]
            if own.shape != ours.shape or own.stride() != ours.stride():
                ours.data = _same_memory(own, _OTHER)
            return ours
        for ours, own in moved.values():
            if _storage(leaf) == _storage(own) and leaf.dtype == own.dtype:  # a view: autograd reads its offset
                offset = ours.storage_offset() + leaf.storage_offset()
                return torch.ops.aten.alias(ours).as_strided_(leaf.shape, leaf.stride(), offset)
        return leaf if stays else _same_memory(leaf, _OTHER)

    args, kwargs = tree_map(lent, args), tree_map(lent, kwargs)
    try:
        return tree_map(back, op(*args, **kwargs))
    except RuntimeError as error:  # a number in a tensor's place: another overload takes it
        if "Cast error details" not in str(error):
            raise
        return tree_map(back, op.overloadpacket(*args, **kwargs))


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu") if leaf.type == NAME else leaf
    if not _here(leaf):
        return leaf
    return _same_memory(leaf, _CPU) if leaf.numel() else torch.empty(leaf.shape, dtype=leaf.dtype)  # may be resized


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_library = torch.library.Library("_", "IMPL")
_library.fallback(_run, "PrivateUse1")


def _own(name: str, op: Any) -> None:
    """torch has a kernel for every device here, which refuses; ours takes its place."""
    torch.library.impl(f"aten::{name}", "PrivateUse1", lib=_own_kernels)(lambda *a, **k: _run(op, *a, **k))


_own_kernels = torch.library.Library("aten", "IMPL")
_own("convolution_overrideable", torch.ops.aten.convolution.default)
_own("_conj", torch.ops.aten.conj_physical.default)  # DLPack knows no lazy conjugate
_own("fft_fftfreq", torch.ops.aten.fft_fftfreq.default)  # torch's own writes past the end of an empty slice
_own("native_group_norm", torch.ops.aten.native_group_norm.default)
_own("native_layer_norm", torch.ops.aten.native_layer_norm.default)


@torch.library.impl("aten::convolution_backward_overrideable", "PrivateUse1", lib=_own_kernels)
def _convolution_backward(grad: Any, x: Any, weight: Any, *settings: Any) -> Any:
    *rest, mask = settings
    bias = [grad.shape[1]] if mask[2] else None
    return _run(torch.ops.aten.convolution_backward.default, grad, x, weight, bias, *rest, mask)


@torch.library.impl("aten::_fused_sdp_choice", "PrivateUse1", lib=_own_kernels)
def _plain_attention(*args: Any, **kwargs: Any) -> int:
    return 0


# autocast: matrix products and convolutions in the chosen precision, all else as it comes
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def _casting(name: str) -> None:
    op = getattr(torch.ops.aten, name)

    def cast(leaf: Any) -> Any:
        floats = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(torch.get_autocast_dtype(NAME)) if floats else leaf

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    torch.library.impl(f"aten::{name}", "AutocastPrivateUse1", lib=_own_kernels)(run)


for _name in ("linear", "matmul", "mm", "bmm", "baddbmm", "addmm", "conv2d", "conv3d", "scaled_dot_product_attention"):
    _casting(_name)

# copy.deepcopy of a buffer copies its storage, which asks for the device's own allocator
_deepcopy = torch.Tensor.__deepcopy__


def _deep(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    if not _here(tensor) or id(tensor) in memo:
        return _deepcopy(tensor, memo)
    memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


torch.Tensor.__deepcopy__ = _deep  # type: ignore[method-assign]

torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps its parameters, as it does on a GPU
