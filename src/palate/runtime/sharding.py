"""Networks too large for one device, cut over the ranks: FSDP2, and what must know of the pieces.

Elsewhere a parameter may be a DTensor without anybody noticing: `gather` and `shard_like` pass plain tensors through.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from palate.runtime.deprecated import old_names
from palate.runtime.distributed import peers, ranks
from palate.runtime.errors import InputError, RankLostError
from palate.runtime.tensors import writing_tensors


def mesh(sharding: str) -> DeviceMesh:
    """ "full": every rank holds a piece of everything. "hybrid": so inside a machine, with copies across machines."""
    device, size = ("cuda" if torch.cuda.is_available() else "cpu"), dist.get_world_size()
    if sharding == "full":
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size % local:
        raise InputError(
            f"trainer.sharding: hybrid needs as many ranks on each machine; got {size}, {local} of them here"
        )
    return init_device_mesh(device, (size // local, local), mesh_dim_names=("replicate", "shard"))


def shard(networks: Iterable[nn.Module], over: DeviceMesh) -> list[nn.Module]:
    """Cut each network's parameters over the mesh, block by block; returns the different networks.

    Parameters become DTensors, whole again only inside forward and backward of their block. Half-precision gradients
    are reduced in float32.
    """
    different = list({id(network): network for network in networks}.values())
    for network in different:
        half = next(network.parameters()).dtype in (torch.bfloat16, torch.float16)
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)
        names = set(getattr(network, "_no_split_modules", None) or ())
        blocks = [module for module in network.modules() if type(module).__name__ in names]
        for module in (*reversed(blocks), network):  # inner blocks first; the root last
            # resharded after every forward, the root's too: outside of it `parameters` must list the pieces
            fully_shard(module, mesh=over, mp_policy=policy, reshard_after_forward=True)
    return different


def sync_gradients(networks: Iterable[nn.Module], now: bool) -> None:
    """Whether the next backward of sharded networks reduces gradients over the ranks, or adds them up on each."""
    for network in networks:
        assert isinstance(network, FSDPModule), "only networks that `shard` has cut"
        network.set_requires_gradient_sync(now)


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_host(tensor: Tensor) -> Tensor:
    """The same, on the CPU where it was cut: no device has room for many whole tensors."""
    return gather(tensor).cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """`value` (whole, the same on every rank), cut as `target` is."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return value


def is_cut(weight: Tensor) -> bool:
    """Whether a parameter is this rank's piece of one that is cut over the ranks."""
    return isinstance(weight, DTensor)


def max_over_ranks(calls: int, weight: Tensor) -> int:
    """The largest `calls` of all ranks if `weight` is cut over them, else `calls` as it is.

    A sharded network gathers its pieces in every call, so a rank that has no work left must call it as often as the
    others; what it computes then is thrown away. All ranks ask at the same place, before the calls.
    """
    return max(ranks().all_gather_json(calls)) if is_cut(weight) else calls


def global_norm(gradients: Sequence[Tensor]) -> float:
    """The 2-norm of all of them together.

    Summed in float64 and rounded to their own precision (at least float32), so it does not depend on how they are cut.
    """
    if not gradients:
        return 0.0
    pieces = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    total = torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64).square() for piece in pieces]).sum()
    if isinstance(gradients[0], DTensor):
        with peers():
            dist.all_reduce(total, group=gradients[0].device_mesh.get_group("shard"))
    return float(total.sqrt().to(torch.promote_types(gradients[0].dtype, torch.float32)))


def full_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded network in full tensors on the CPU, on every rank; all ranks must ask for it."""
    return {name: gather(value).cpu().contiguous() for name, value in network.state_dict().items()}


def save_network(network: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a sharded network, whose `full_state_dict` is given, as a diffusers folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if callable(save_config := getattr(network, "save_config", None)):
        save_config(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    with writing_tensors(file):
        save_file(dict(state), str(file), metadata={"format": "pt"})


@contextlib.contextmanager
def inside_networks() -> Iterator[None]:
    """Inside, sharded networks may talk to other ranks on their own: a lost one shows as RankLostError here too."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankLostError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        with peers():
            raise


__getattr__ = old_names(
    __name__, {"full": gather, "like": shard_like, "most": max_over_ranks, "whole": full_state_dict}
)
