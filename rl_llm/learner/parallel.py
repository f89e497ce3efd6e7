"""Several learners that share the rows of a step: what they add up, over torch.distributed."""

import datetime
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A peer that does not show up in this time is gone. The slowest may be a micro-batch behind, not more.
TIMEOUT = datetime.timedelta(minutes=30)


class Peers:
    """The learners of a run, of which this is one; alone until it has joined others.

    Attributes:
        rank, count: which of how many this is.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._store: dist.TCPStore | None = None

    def open(self, host: str) -> int:
        """For the first of them: take a free port where the others find it."""
        self._store = dist.TCPStore(host, 0, self.count, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return int(self._store.port)

    def join(self, host: str, port: int, on_gpu: bool) -> None:
        """Returns when all have joined. Sums of single numbers are always added up on the CPU."""
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        store = self._store or dist.TCPStore(host, port, self.count, is_master=False, timeout=TIMEOUT)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.count, timeout=TIMEOUT)

    def total(self, values: Tensor) -> Tensor:
        """The sum of each number over all learners, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def highest(self, values: Tensor) -> Tensor:
        """The highest of each number over all learners, in place."""
        if self.count > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every learner's gradients become their sum; the loss of each is its part of the whole batch's already."""
        if self.count == 1:
            return
        under_way = []
        for p in parameters:
            # A learner without rows in this update has none; the others wait for its part all the same.
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            under_way.append(dist.all_reduce(p.grad, async_op=True))
        for work in under_way:
            work.wait()

    def copy_first(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every learner takes the first one's weights."""
        if self.count > 1:
            for p in parameters:
                dist.broadcast(p.data, src=0)
