"""Drawing the next token: random numbers keyed by sample, exact log-probs, truncation that is accounted for."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rl_llm import rng
from rl_llm.config import RolloutConfig
from rl_llm.errors import RunFailed

_BLOCK = 256


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy (log-probs then are those at temperature 1)."""

    samples_per_prompt: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    min_new_tokens: int
    stop: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, rollout: RolloutConfig, samples: int, temperature: float, seed: int) -> "SamplingParams":
        """How to sample `samples` completions a prompt under a run's rollout settings."""
        return cls(
            samples_per_prompt=samples,
            temperature=temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=rollout.max_new_tokens,
            min_new_tokens=rollout.min_new_tokens,
            stop=tuple(rollout.stop),
            seed=seed,
        )


def uniforms(seed: int, sample_ids: np.ndarray, length: int) -> Tensor:
    """float64 [R, length] in [0, 1), a stream per sample from a counter-based generator keyed by (seed, sample_id).

    Which worker draws them, in which batch, makes no difference.
    """
    rows = [rng.keyed(seed, int(i)).random(length) for i in sample_ids]
    return torch.from_numpy(np.stack(rows))


@dataclass
class Draws:
    """tokens int64 [R]; logprobs float32 [R] untruncated; log_kept_mass float32 [R] of what truncation kept."""

    tokens: Tensor
    logprobs: Tensor
    log_kept_mass: Tensor


def draw(logits: Tensor, uniform: Tensor, params: SamplingParams, banned: list[int]) -> Draws:
    """One token a row.

    Args:
        logits: float [R, V], modified in place.
        uniform: float64 [R] in [0, 1); not read where greedy.
        params: temperature, top_p, top_k.
        banned: tokens that may not be chosen now (the ends, before the minimum length).

    Raises:
        RunFailed: a row has NaN or an infinite logit; tokens that no model wrote would follow.
    """
    logits = logits.float()
    if params.temperature > 0:
        logits /= params.temperature
    highest = logits.amax(dim=1, keepdim=True)
    if not highest.isfinite().all():
        raise RunFailed(
            "the policy's logits are NaN or infinite: its weights are, or it overflows in the precision it runs in; "
            "try policy.precision=fp32 or another model"
        )
    weights = (logits - highest).exp_()
    kept_weights = _truncate(weights, params, banned)
    blocks = _block_sums(kept_weights)
    if params.temperature > 0:
        tokens = _inverse_cdf(kept_weights, blocks, uniform.to(logits.device))
    else:
        tokens = kept_weights.argmax(dim=1)
    chosen = weights.gather(1, tokens[:, None]).squeeze(1).double()
    kept = blocks.sum(dim=1)
    total = kept if kept_weights is weights else _block_sums(weights).sum(dim=1)
    return Draws(tokens, (chosen / total).log().float(), (kept / total).log().float())


def _block_sums(weights: Tensor) -> Tensor:
    """float64 [R, ceil(V / block)]: sums of `_BLOCK` neighbours; fp32 is enough for so few, not for all."""
    rows, vocab = weights.shape
    whole = vocab - vocab % _BLOCK
    sums = weights[:, :whole].view(rows, -1, _BLOCK).sum(dim=2)
    if whole < vocab:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    return sums.double()


def _truncate(weights: Tensor, params: SamplingParams, banned: list[int]) -> Tensor:
    """Weights with everything outside the bans, top_k and top_p set to 0; the same object if nothing is cut."""
    kept = weights
    if banned:
        kept = kept.clone()
        kept[:, banned] = 0
    if params.temperature == 0:
        return kept
    if 0 < params.top_k < weights.shape[1]:
        least = kept.topk(params.top_k, dim=1).values[:, -1:]
        kept = torch.where(kept >= least, kept, 0)
    if params.top_p < 1:
        order = kept.sort(dim=1, descending=True, stable=True)
        mass = order.values.cumsum(dim=1, dtype=torch.float64)
        # A token stays if those before it have not filled top_p yet: the one that crosses is kept.
        outside = mass - order.values >= params.top_p * mass[:, -1:]
        kept = kept.masked_fill(torch.zeros_like(outside).scatter(1, order.indices, outside), 0)
    return kept


def _inverse_cdf(weights: Tensor, blocks: Tensor, uniform: Tensor) -> Tensor:
    """Token whose stretch of the cumulated weights holds the uniform: one number a row instead of one a token.

    Cumulates blocks first and then inside the chosen block only, in float64. A token of weight 0 is never chosen.
    """
    coarse = blocks.cumsum(dim=1)
    point = _below(uniform * coarse[:, -1], coarse[:, -1])
    block = torch.searchsorted(coarse, point[:, None], right=True)
    before = coarse.gather(1, block) - blocks.gather(1, block)
    positions = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, positions.clamp(max=weights.shape[1] - 1)).double()
    fine = inside.masked_fill_(positions >= weights.shape[1], 0).cumsum(dim=1)
    inner = torch.searchsorted(fine, _below(point - before.squeeze(1), fine[:, -1])[:, None], right=True)
    return (block * _BLOCK + inner).squeeze(1)


def _below(point: Tensor, top: Tensor) -> Tensor:
    """Rounding may put a point on the upper end, behind the last token; keep it within [0, top)."""
    return torch.minimum(point.clamp(min=0), torch.nextafter(top, torch.zeros_like(top)))
