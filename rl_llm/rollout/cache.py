"""A key-value cache made for groups: prompts are read once, spread over their samples, then written in place."""

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _GroupLayer(CacheLayerMixin):
    """Keys and values [rows, heads, capacity, head size], of which the first `length` positions are filled."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        # Under autocast rotated keys are fp32; attention would cast all of them anew for every token.
        key_states = key_states.to(value_states.dtype)
        start, self.length = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def spread(self, repeats: int, room: int) -> None:
        self.keys, self.values = (_spread(x, repeats, room) for x in (self.keys, self.values))

    def keep(self, rows: Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def _spread(filled: Tensor | None, repeats: int, room: int) -> Tensor:
    assert filled is not None
    rows, heads, length, size = filled.shape
    out = filled.new_empty(rows * repeats, heads, length + room, size)
    out[:, :, :length] = filled.repeat_interleave(repeats, dim=0)
    return out


class GroupCache(Cache):
    """A cache for one rollout request."""

    def __init__(self, num_layers: int) -> None:
        self._group_layers = [_GroupLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self._group_layers))

    def spread(self, repeats: int, room: int) -> None:
        """Repeat each prompt's rows `repeats` times and make room for `room` more tokens."""
        for layer in self._group_layers:
            layer.spread(repeats, room)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        for layer in self._group_layers:
            layer.keep(rows)


def left_pad(prompts: list[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as int64 [P, S] ending at the same column, and bool [P, S] marking real tokens."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    return torch.from_numpy(ids), torch.from_numpy(np.arange(width) >= (width - lengths)[:, None])
