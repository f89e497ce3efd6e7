"""Several learners that share the rows of a step: how a policy lies over them, and what they add up."""

import datetime
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rl_llm.policies import Policy

# A learner that does not show up in this time is gone. The slowest may be a micro-batch behind, not more.
TIMEOUT = datetime.timedelta(minutes=30)

Named = Iterable[tuple[str, Tensor]]


class Parallel(Protocol):
    """One of `count` learners. What is said of all of them has to be called by all of them, in the same order.

    The loss of each is its part of the whole batch's, so gradients are added up, never averaged.
    """

    rank: int
    count: int

    def open(self, host: str) -> int:
        """For the first of them: take a free port where the others find it."""

    def join(self, host: str, port: int, device: torch.device) -> None:
        """Returns when all have joined."""

    def wrap(self, policy: Policy) -> None:
        """Lay a loaded policy over the learners; before it has an optimiser."""

    def sync_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every learner's gradients become those of the whole batch, as far as they are its own to keep."""

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scale synced gradients down to a norm of `limit`; returns the norm before, over all learners."""

    def whole(self, named: Named) -> Iterator[tuple[str, Tensor]]:
        """Tensors that lie over the learners as full ones, one at a time."""

    def scatter(self, named: Named) -> Iterator[tuple[str, Tensor]]:
        """The inverse: full tensors, those of the first learner, as the part that this one has to put in place."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of each number over all learners."""

    def highest(self, values: Tensor) -> Tensor:
        """The highest of each number over all learners."""

    def close(self) -> None:
        """Leave the others."""


MakeParallel = Callable[[int, int], Parallel]
"""`(rank, count) -> Parallel`."""


class DataParallel:
    """Every learner has the whole policy, its own rows, and makes the same update; over torch.distributed."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._store: dist.TCPStore | None = None

    def open(self, host: str) -> int:
        self._store = dist.TCPStore(host, 0, self.count, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return int(self._store.port)

    def join(self, host: str, port: int, device: torch.device) -> None:
        # Sums of single numbers are always added up on the CPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = self._store or dist.TCPStore(host, port, self.count, is_master=False, timeout=TIMEOUT)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.count, timeout=TIMEOUT)

    def wrap(self, policy: Policy) -> None:
        """Nothing lies elsewhere."""

    def sync_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.count == 1:
            return
        under_way = []
        for p in parameters:
            # A learner without rows in this update has none; the others wait for its part all the same.
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            under_way.append(dist.all_reduce(p.grad, async_op=True))
        for work in under_way:
            work.wait()

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def whole(self, named: Named) -> Iterator[tuple[str, Tensor]]:
        yield from named

    def scatter(self, named: Named) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            if self.count > 1:
                dist.broadcast(tensor, src=0)
            yield name, tensor

    def total(self, values: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def highest(self, values: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def close(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
        self._store = None
