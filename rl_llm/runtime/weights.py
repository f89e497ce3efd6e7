"""Weights on their way from those who learn to those who act: what a publish is, and the channels it may take."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rl_llm.runtime.replica import fetch, put

Manifest = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape of each tensor, in the order in which they lie."""


@dataclass(frozen=True)
class Weights:
    """One publish of a policy's trainable weights.

    Attributes:
        number: counts the publishes of a channel; never the same for other weights, whatever is restored. What a reader
            compares with what it has loaded.
        step: learner updates behind them, the rows' `policy_version`.
        kind: all that trains of a model, or an adapter.
        manifest: of `data`, under the names that the saved folder has them by.
        data: flat uint8 array, or a reference to one; None where reader and learner share memory.
    """

    number: int
    step: int
    kind: Literal["full", "adapter"] = "full"
    manifest: Manifest = ()
    data: Any = None


class Publisher(Protocol):
    """What a channel asks of the learners."""

    kind: Literal["full", "adapter"]

    def weights(self) -> tuple[Manifest, Any]: ...


class WeightChannel(Protocol):
    """A way for weights. The driver publishes; a reader, in whatever process, has a copy of its own to read with."""

    def publish(self, learner: Publisher | None, step: int) -> Weights: ...

    def tensors(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """What a reader has to put in place, by name."""


class Holder(Protocol):
    """Whatever has weights by name."""

    def named_weights(self) -> dict[str, Tensor]: ...


class InPlace:
    """For readers in the learner's own process: nothing is carried. One that acts with the learner's policy has no need
    to read either.

    Args:
        policy: the learner's; None where nobody learns.
    """

    def __init__(self, policy: Holder | None = None) -> None:
        self._policy = policy
        self._published = 0

    def publish(self, learner: Publisher | None, step: int) -> Weights:
        self._published += 1
        return Weights(self._published, step)

    def tensors(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        yield from {} if self._policy is None else self._policy.named_weights().items()


class ObjectStore:
    """One flat array, which every reader of a node maps from Ray's object store; torch tensors would be copied by each.

    Args:
        shared: whether readers are actors; else the array is handed over as it is.
    """

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        self._published = 0

    def publish(self, learner: Publisher | None, step: int) -> Weights:
        assert learner is not None
        manifest, data = learner.weights()
        self._published += 1
        return Weights(self._published, step, learner.kind, manifest, put(data) if self._shared else data)

    def tensors(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        [data] = fetch([weights.data])
        yield from unflatten(weights.manifest, data)


def flatten(named: Iterable[tuple[str, Tensor]]) -> tuple[Manifest, np.ndarray]:
    """Tensors as one flat uint8 array with its manifest."""
    manifest, parts = [], []
    for name, tensor in named:
        flat = tensor.detach().cpu().contiguous().view(-1)
        manifest.append((name, str(flat.dtype).removeprefix("torch."), tuple(tensor.shape)))
        parts.append(flat.view(torch.uint8).numpy())
    return tuple(manifest), np.concatenate(parts) if parts else np.empty(0, np.uint8)


def unflatten(manifest: Manifest, data: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a flat array, each with memory of its own. Raises `ValueError` where the size is another."""
    start = 0
    for name, dtype, shape in manifest:
        kind = getattr(torch, dtype)
        end = start + int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if end > data.nbytes:
            raise ValueError(f"weights of {data.nbytes} bytes end within {name}")
        # torch wants a writable buffer although it only reads this one; a view over mapped memory is not. Nor empty.
        flat = torch.frombuffer(bytearray(data[start:end]), dtype=kind) if end > start else torch.empty(0, dtype=kind)
        yield name, flat.view(shape)
        start = end
    if start != data.nbytes:
        raise ValueError(f"weights of {data.nbytes} bytes are more than the {start} of their manifest")
