"""Attention over grouped keys and packed groups, without copies of keys and without what a mask would hide.

`transformers` repeats keys and values for every query head before it attends with a mask. Here the heads that share a
key stand in one matrix with the positions, so keys stay as they are. And where groups are packed, a block mask hides
most pairs of tokens from each other: prompts and completions attend apart, so that hidden pairs are never computed.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rl_llm.policies.packing import Blocks

GROUPED = "rl_llm_grouped"

# Scores of this many pairs at a time: they stay in a CPU's cache.
_SCORES = 2**22


@dataclass
class Prompts:
    """What rows that are being decoded look at before their own tokens; there once for all samples of a prompt.

    Attributes:
        keys, values: by layer, [P, key heads, S, D].
        samples: how many rows each prompt has at the most.
        slots: int64 [R], where each row is among P * samples.
    """

    keys: list[Tensor]
    values: list[Tensor]
    samples: int
    slots: Tensor

    def gather(self, rows: Tensor) -> Tensor:
        """[R, key heads, M, X] -> [P, key heads, samples * M, X], zeros for rows that are no more."""
        out = rows.new_zeros(len(self.keys[0]) * self.samples, *rows.shape[1:]).index_copy_(0, self.slots, rows)
        return out.unflatten(0, (-1, self.samples)).transpose(1, 2).flatten(2, 3)

    def scatter(self, prompts: Tensor) -> Tensor:
        """What `gather` came from."""
        return prompts.unflatten(2, (self.samples, -1)).transpose(1, 2).flatten(0, 1).index_select(0, self.slots)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    blocks: Blocks | None = None,
    prompts: Prompts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The library's interface: query [B, heads, Q, D], key and value [B, key heads, K, D] -> [B, Q, heads, D].

    `blocks` says what `attention_mask` says of packed groups, in a form that spares the work. With `prompts`, keys and
    values are those of the tokens behind the prompt, and the mask is of both.
    """
    if (heard := _listening.get()) is not None:
        heard.hear(attention_mask)
    if attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    layer: Any = module.layer_idx
    # Under autocast rotated queries and keys are fp32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    with torch.autocast(query.device.type, enabled=False):
        if prompts is not None:
            return _attend_after_prompts(query, key, value, attention_mask, prompts, layer, scale), None
        if blocks is not None:
            return _attend_blocks(query, key, value, blocks, scale, dropout), None
        return _attend(query, key, value, attention_mask, scale, dropout).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)


@dataclass
class _Listening:
    """Masks made meanwhile with the lengths they are for, and which of these came to attention."""

    made: list[tuple[Tensor, int | None]] = field(default_factory=list)
    windows: set[int] = field(default_factory=set)

    def hear(self, mask: Tensor | None) -> None:
        own = [window for made, window in self.made if made is mask]
        # A mask that a model has worked on may be any of them.
        self.windows.update(w for w in own or [window for _, window in self.made] if w is not None)


_listening: ContextVar[_Listening | None] = ContextVar("listening", default=None)


def _mask(*args: Any, local_size: int | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """The library's own mask."""
    heard = _listening.get()
    skip = allow_is_causal_skip and heard is None
    mask: Tensor | None = sdpa_mask(*args, local_size=local_size, allow_is_causal_skip=skip, **kwargs)
    if heard is not None and mask is not None:
        heard.made.append((mask, local_size))
    return mask


AttentionMaskInterface.register(GROUPED, _mask)


@contextlib.contextmanager
def windows_used() -> Iterator[set[int]]:
    """The lengths, in tokens, of the windows and chunks that masks of attention have meanwhile.

    The masks of packed groups have no window: samples may not be longer. What attention is told of windows beside its
    mask does not count, nor does it for the library's own.
    """
    heard = _Listening()
    token = _listening.set(heard)
    try:
        yield heard.windows
    finally:
        _listening.reset(token)


def attention_of(model: PreTrainedModel) -> dict[str, str]:
    """The attention that a model and its parts have now, as `set_attn_implementation` takes it."""
    parts = {"": model.config, **{name: getattr(model.config, name) for name in model.config.sub_configs}}
    return {name: part._attn_implementation for name, part in parts.items() if part is not None}


def _attend_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, dropout: float) -> Tensor:
    """Packed [B, heads, S, D] -> [B, S, heads, D]."""
    rows, _, length, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))

    def take(x: Tensor, positions: Tensor) -> Tensor:
        return x.index_select(0, positions.flatten()).unflatten(0, positions.shape).transpose(1, 2)

    q_prompt, k_prompt, v_prompt = (take(x, blocks.prompts) for x in (q, k, v))
    q_own, k_seen, v_seen = take(q, blocks.completions), take(k, blocks.keys), take(v, blocks.keys)
    blocked = (
        _attend(q_prompt, k_prompt, v_prompt, blocks.prompt_mask, scale, dropout),
        _attend(q_own, k_seen, v_seen, blocks.completion_mask, scale, dropout),
    )
    together = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in blocked])
    return together.index_select(0, blocks.back).unflatten(0, (rows, length))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    """query [N, heads, Q, D], key and value [N, key heads, K, D], mask bool [1 or N, 1, Q, K] -> [N, heads, Q, D]."""
    heads_per_key, length = query.shape[1] // key.shape[1], query.shape[2]
    together = query.unflatten(1, (-1, heads_per_key)).flatten(2, 3)
    if query.device.type == "cpu" and not dropout:
        out = _MatrixAttention.apply(together, key, value, mask, scale)
    else:
        out = nn.functional.scaled_dot_product_attention(
            together, key, value, attn_mask=mask.repeat(1, 1, heads_per_key, 1), dropout_p=dropout, scale=scale
        )
    return out.unflatten(2, (heads_per_key, length)).flatten(1, 2)


def _attend_after_prompts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prompts: Prompts, layer: int, scale: float
) -> Tensor:
    """query [R, heads, 1, D], mask bool [R, 1, 1, S + K] -> [R, 1, heads, D]; no gradients.

    A prompt's keys and values are read once for all its samples, not once for each.
    """
    q = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3).float() * scale
    at_prompts = prompts.scatter(prompts.gather(q) @ prompts.keys[layer].mT.float())
    scores = torch.cat([at_prompts, q @ key.mT.float()], dim=-1)
    weights = scores.masked_fill_(~mask, -torch.inf).softmax(dim=-1).to(value.dtype)
    of_prompts, own = weights.split([at_prompts.shape[-1], key.shape[2]], dim=-1)
    out = prompts.scatter(prompts.gather(of_prompts) @ prompts.values[layer]) + own @ value
    return out.flatten(1, 2)[:, None]


class _MatrixAttention(torch.autograd.Function):
    """Attention as batched matrix products, for CPUs.

    Their fused kernel takes the products of one head at a time, which for blocks of a hundred tokens is several times
    slower. Scores are made again for the backward pass, not kept, and only some rows' exist at once.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        """query [N, key heads, M * Q, D], key and value [N, key heads, K, D], mask bool [1 or N, 1, Q, K]."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for part in _parts(query, key):
            weights = _weights(query[part], key[part], mask if len(mask) == 1 else mask[part], scale)
            torch.matmul(weights.to(value.dtype), value[part], out=out[part])
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        for part in _parts(query, key):
            weights = _weights(query[part], key[part], mask if len(mask) == 1 else mask[part], ctx.scale)
            grad_value[part] = weights.to(grad.dtype).mT @ grad[part]
            grad_weights = (grad[part] @ value[part].mT).float()
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            grad_scores = grad_scores.to(query.dtype)
            grad_query[part] = grad_scores @ key[part]
            grad_key[part] = grad_scores.mT @ query[part]
        return grad_query, grad_key, grad_value, None, None


def _parts(query: Tensor, key: Tensor) -> list[slice]:
    """Rows whose scores exist at once."""
    rows = max(_SCORES // (query[0, ..., 0].numel() * key.shape[2]), 1)
    return [slice(start, start + rows) for start in range(0, len(query), rows)]


def _weights(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What each query takes of each value, in fp32: scores of bf16 would be off where they are large."""
    scores = (query.float() * scale) @ key.float().mT
    scores.unflatten(2, (-1, mask.shape[2])).masked_fill_(~mask[:, :, None], -torch.inf)
    return scores.softmax(dim=-1)
