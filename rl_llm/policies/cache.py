"""A key-value cache made for groups: prompts are read and kept once for all their samples, tokens written in place."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from rl_llm.policies.attention import Prompts


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

    def begin(self, rows: int, room: int) -> tuple[Tensor, Tensor]:
        """Hand out what there is, the prompts, and start anew for so many rows."""
        assert self.keys is not None
        assert self.values is not None
        prompts = self.keys.contiguous(), self.values.contiguous()
        self.keys, self.values = (x.new_empty(rows, x.shape[1], room, x.shape[3]) for x in prompts)
        self.length = 0
        return prompts

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


class GroupCache(Cache):
    """A cache for one rollout request: of prompts while they are read, then of the tokens of their samples.

    Attributes:
        prompts: what was read, once there are samples.
    """

    def __init__(self, num_layers: int) -> None:
        self.prompts: Prompts | None = None
        self._group_layers = [_GroupLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self._group_layers))

    def begin(self, samples: int, room: int) -> None:
        """From prompts to their samples: `samples` rows for each, with room for `room` tokens of their own."""
        first = self._group_layers[0].keys
        assert first is not None
        rows = len(first) * samples
        keys, values = zip(*(layer.begin(rows, room) for layer in self._group_layers), strict=True)
        self.prompts = Prompts(list(keys), list(values), samples, torch.arange(rows, device=first.device))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        assert self.prompts is not None
        self.prompts.slots = self.prompts.slots[rows]
        for layer in self._group_layers:
            layer.keep(rows)


def left_pad(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as int64 [P, S] ending at the same column, and bool [P, S] marking real tokens."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    return torch.from_numpy(ids), torch.from_numpy(np.arange(width) >= (width - lengths)[:, None])
