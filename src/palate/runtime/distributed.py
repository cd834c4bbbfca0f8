"""Several ranks that train as one: torch.distributed and nothing above it, gloo on CPUs and nccl on GPUs.

A step's batch is cut into shares of consecutive sample ids, and rank r of W works on the r-th of W equal slices.
Gradients are averaged once per update, so the update is that of one process that accumulates the shares: bit for bit on
two ranks, and up to the order of additions on more. Decisions (a loss that is not finite, a signal, new words, the
guard's verdict) are exchanged, so that all ranks take the same one; rank 0 alone writes files.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from palate.runtime.deprecated import old_names
from palate.runtime.errors import InputError, PalateError, PeerAbortedError, RankLostError

T = TypeVar("T")


class Ranks:
    """This process's place among the ranks of a run, and the few things that they do together."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.is_main = rank == 0

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, in the order of ranks."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with _peers():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(own)]))
            longest = int(max(lengths))
            rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(rows, nn.functional.pad(own, (0, longest - len(own))))
        return [json.loads(row[: int(n)].numpy().tobytes()) for row, n in zip(rows, lengths, strict=True)]

    def on_main(self, act: Callable[[], T]) -> T | None:
        """Rank 0 does `act` while the others wait; an error of it ends all of them. Only rank 0 gets the result."""
        result, error = None, None
        if self.is_main:
            try:
                result = act()
            except (ValueError, OSError, RuntimeError) as caught:
                error = caught
        self.raise_if_any(error)
        return result

    def raise_if_any(self, error: Exception | None) -> None:
        """Raise on all ranks if any of them met an error: its own where there is one, `PeerAbortedError` elsewhere."""
        if self.size == 1:
            if error:
                raise error
            return
        code = error.exit_code if isinstance(error, PalateError) else 4 if isinstance(error, OSError) else 1
        said = self.all_gather_json(None if error is None else [str(error), code])
        if error:
            raise error
        for rank, other in enumerate(said):
            if other:
                raise PeerAbortedError(f"rank {rank}: {other[0]}", other[1])

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in place; one reduction for each dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in group])
            with _peers():
                dist.all_reduce(flat)
            flat /= self.size
            for tensor, mean in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's named tensors, on rank 0 in the order of ranks; the other ranks get []."""
        if self.size == 1:
            return [dict(tensors)]
        plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        own = torch.frombuffer(bytearray(save(plain)), dtype=torch.uint8)
        lengths = self.all_gather_json(len(own))
        with _peers():
            if not self.is_main:
                dist.send(own, 0)
                return []
            rows = [own]
            for rank in range(1, self.size):
                rows.append(torch.empty(lengths[rank], dtype=torch.uint8))
                dist.recv(rows[-1], rank)
        return [load(row.numpy().tobytes()) for row in rows]


def ranks() -> Ranks:
    """This process's ranks: those of `process_group`, or it alone."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


def launched() -> bool:
    """Whether torchrun, srun or `palate --nproc` started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextlib.contextmanager
def process_group(*, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Inside, this process is one of the ranks that the environment names. No rank waits longer than the time-out.

    RankLostError: they did not all arrive in time.
    """
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit = datetime.timedelta(seconds=timeout_seconds)
    with _peers():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=limit)
    try:
        yield ranks()
    finally:
        dist.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """End this rank's process at once, without Python's tear-down.

    Sharded networks and meshes keep gloo's threads beyond `process_group`. Such a thread that meets the tear-down of
    Python aborts the process ("terminate called without an active exception"): 4 of 25 finished runs on two ranks did.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def orphaned() -> bool:
    """Whether the process that launched this rank is gone."""
    launcher = os.environ.get("PALATE_LAUNCHER")
    return launcher is not None and os.getppid() != int(launcher)


# Networks too large for one device: FSDP2


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


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """`value` (whole, the same on every rank), cut as `target` is."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return value


def max_over_ranks(calls: int, weight: Tensor) -> int:
    """The largest `calls` of all ranks if `weight` is cut over them, else `calls` as it is.

    A sharded network gathers its pieces in every call, so a rank that has no work left must call it as often as the
    others; what it computes then is thrown away. All ranks ask at the same place, before the calls.
    """
    return max(ranks().all_gather_json(calls)) if isinstance(weight, DTensor) else calls


def global_norm(gradients: Sequence[Tensor]) -> float:
    """The 2-norm of all of them together.

    Summed in float64 and rounded to their own precision (at least float32), so it does not depend on how they are cut.
    """
    if not gradients:
        return 0.0
    pieces = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    total = torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64).square() for piece in pieces]).sum()
    if isinstance(gradients[0], DTensor):
        with _peers():
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
    save_file(dict(state), str(folder / "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})


@contextlib.contextmanager
def inside_networks() -> Iterator[None]:
    """Inside, sharded networks may talk to other ranks on their own: a lost one shows as RankLostError here too."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankLostError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        with _peers():
            raise


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # dist.DistError and what gloo and nccl raise are RuntimeErrors
        reason = str(error).splitlines()[0][:120]
        raise RankLostError(f"another rank is lost ({reason}); continue with palate resume") from error


__getattr__ = old_names(
    __name__,
    {
        "full": gather,
        "join": process_group,
        "leave": exit_process,
        "like": shard_like,
        "most": max_over_ranks,
        "whole": full_state_dict,
    },
)
