"""Several ranks that train as one: torch.distributed and nothing above it, gloo on CPUs and nccl on GPUs.

A step's batch is cut into micro-batches of consecutive sample ids, and rank r of W works on the r-th of W equal slices.
Gradients are averaged once per update, so the update is that of one process that accumulates the micro-batches: bit for
bit on two ranks, and up to the order of additions on more. Decisions (a loss that is not finite, a signal, new words,
the guard's verdict) are exchanged, so that all ranks take the same one; rank 0 alone writes files.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from palate.runtime.deprecated import old_names
from palate.runtime.errors import InputError, PalateError, PeerAbortedError, RankLostError, first_line

T = TypeVar("T")
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # in the environment of each rank, as torchrun sets them


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
        with peers():
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
            with peers():
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
        with peers():
            if not self.is_main:
                dist.send(own, 0)
                return []
            rows = [own]
            for rank in range(1, self.size):
                rows.append(torch.empty(lengths[rank], dtype=torch.uint8))
                dist.recv(rows[-1], rank)
        return [load(row.numpy().tobytes()) for row in rows]


def joined() -> bool:
    """Whether this process knows its peers, where its environment names any."""
    alone = any(name not in os.environ for name in PLACE) or os.environ["WORLD_SIZE"] == "1"
    return alone or dist.is_initialized()


def ranks() -> Ranks:
    """This process's ranks: those of `process_group`, or it alone."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


@contextlib.contextmanager
def process_group(*, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Inside, this process is one of the ranks that the environment names. No rank waits longer than the time-out.

    RankLostError: they did not all arrive in time. InputError: the environment names a rank, and not the others.
    """
    if lacking := [name for name in PLACE if name not in os.environ]:
        raise InputError(
            f"RANK is set in the environment and {', '.join(lacking)} not; start several ranks with --nproc or "
            "torchrun, which set all of them, or run `unset RANK` for a single one"
        )
    gpu = torch.cuda.is_available()
    if gpu:
        own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= there:
            raise InputError(f"rank {own} of this machine has no GPU, it has {there}; start at most {there} (--nproc)")
        torch.cuda.set_device(own)
    limit = datetime.timedelta(seconds=timeout_seconds)
    with peers():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=limit)
    ended = False
    try:
        yield ranks()
        ended = True
    finally:
        if ended or not gpu:  # nccl would wait for peers in a collective, and the error would be said after that
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


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Inside, ranks talk to one another: what that raises is RankLostError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # dist.DistError and what gloo and nccl raise are RuntimeErrors
        raise RankLostError(f"another rank is lost ({first_line(error)}); continue with palate resume") from error


__getattr__ = old_names(__name__, {"join": process_group, "leave": exit_process})
