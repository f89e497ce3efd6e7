"""Attention that reads grouped keys and values as they are.

`transformers` repeats keys and values for every query head before it attends with a mask; while decoding, that copy of
the whole cache costs more than everything else. With one query token the heads that share a key can stand in the
query's place of positions instead: the same numbers without the copy.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "rl_llm_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The library's interface: query [B, heads, Q, D], key and value [B, key heads, K, D] -> [B, Q, heads, D]."""
    rows, heads, length, size = query.shape
    shared = key.shape[1]
    if length > 1 or heads == shared:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    together = query.reshape(rows, shared, heads // shared, size)
    out = torch.nn.functional.scaled_dot_product_attention(
        together, key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(rows, 1, heads, size), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
