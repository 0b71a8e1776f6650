"""Several processes as one run, started by torchrun. In a single process, all of this has no effect.

Every function but `rank`, `world_size`, `is_main`, `shares` and the warning is collective: all processes call it at the
same point.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
Number = TypeVar("Number", bound=np.number[Any])


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started; NCCL carries data on GPUs and Gloo the rest."""
    if not dist.is_torchelastic_launched():
        yield
        return
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        # torchrun keeps its store when it restarts the processes, so the new ones would find the old addresses (PyTorch
        # issue 135712). Machines disagree on the number of restarts: runs on several need the README's remedy.
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Some wait for the slowest share of an extraction or for the search, perhaps longer than PyTorch's half hour.
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timedelta(days=1))
    yield
    dist.destroy_process_group()  # not after an error: it would wait for a process that has died


def warn_of_separate_runs() -> None:
    """Warns if another launcher than torchrun started several processes: they do not join, so each is a run of its own.

    SLURM tells a job script of its tasks too, of which there may be one process yet.
    """
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1 and not dist.is_torchelastic_launched():
            logger.warning(
                f"{name} is {count}, but torchrun did not start this process: each of them makes the whole run by "
                f"itself; for one run use torchrun --standalone --nproc_per_node={count}, with srun one task a machine"
            )
            return


def rank() -> int:
    """This process's number; process 0 writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, on all machines together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine, which is also the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and reports to the user."""
    return rank() == 0


def shares(count: int, unit: int = 1) -> list[slice]:
    """Splits `count` rows into a contiguous part for each process, without splitting units of `unit` rows."""
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(-(-count // unit)), world_size())])
    bounds = [0, *np.minimum(ends * unit, count).tolist()]
    return [slice(start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def broadcast(value: Value) -> Value:
    """The main process's value, for all."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_main(call: Callable[[], Value]) -> Value:
    """The result of a call that only the main process makes, for all."""
    return broadcast(call() if is_main() else None)  # type: ignore[return-value]


def gather_objects(value: Value) -> list[Value]:
    """Each process's value, in order, for all."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until all processes are here."""
    gather_objects(None)


def maximum(value: int) -> int:
    """The largest of the processes' values."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def gather_shares(count: int, rows_of: Callable[[slice], NDArray[Number]], unit: int = 1) -> NDArray[Number]:
    """The rows of `count` items for the main process; the others get their own back.

    Args:
        rows_of: computes the rows of a share, perhaps none.
        unit: rows that stay together, see `shares`.
    """
    rows = rows_of(shares(count, unit)[rank()])
    if world_size() == 1:
        return rows
    parts: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(rows, parts, dst=0)
    return rows if parts is None else np.concatenate([part for part in parts if len(part)] or [rows])


def gather_with_gradient(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """All processes' rows concatenated, for all; in each process the gradient flows into its own rows.

    The first `counts[rank()]` rows count; others are of a process without any, whose backward pass must still run. A
    loss of the result is the same in each process, and its gradient for the parameters is the SUM over the processes,
    while DistributedDataParallel takes the mean: multiply the loss by `world_size()` before `backward`.
    """
    own = rows[: counts[rank()]]
    if world_size() == 1:
        return own
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(own)] = own.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    parts[rank()] = own
    return torch.cat(parts)


def broadcast_weights(module: nn.Module) -> None:
    """Gives all processes the main process's weights."""
    if world_size() > 1:
        for value in module.state_dict().values():
            dist.broadcast(value, src=0)


def replicate(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the processes; call again after freezing parts of it."""
    return module if world_size() == 1 else DistributedDataParallel(module, gradient_as_bucket_view=True)
