"""Log-probabilities of chosen tokens straight from hidden states, without the logits of a batch in fp32.

The head and the softmax of a large vocabulary cost as much as the rest of a small model, mostly in passes over memory.
Here each logit is computed once, and what the backward pass needs of it is kept in the dtype of the computation.
"""

from typing import Any

import torch
from torch import Tensor

# Logits made at a time, and of these in fp32 at a time: few enough to stay in a CPU's cache, or to fill a GPU.
_LOGITS = 2**26
_CPU_BLOCK, _GPU_BLOCK = 2**20, 2**26


def chosen_logprobs(
    states: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(scale * states @ weight.T), and that distribution's entropy.

    Runs in autocast's dtype where that is on. Gradients of any order but the first are not there.

    Args:
        states: [N, H]; weight: [V, H]; targets: int64 [N].
        scale: one for all, or [N].
        entropy: without it the second value is empty.

    Returns:
        float32 [N] each, in nats.
    """
    scales = torch.as_tensor(scale, dtype=torch.float32).expand(len(targets))
    scaled = not bool((scales == 1).all())  # asked where it lies, on the CPU: most often nothing has to be multiplied
    return _ChosenLogprobs.apply(states, weight, targets, scales.to(states.device)[:, None], scaled, entropy)


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, scaled: bool, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        x, w = states.to(dtype), weight.to(dtype)
        count, vocab = len(targets), len(weight)
        chosen = torch.empty(count, device=x.device)
        entropies = torch.empty(count if entropy else 0, device=x.device)
        # p - onehot: minus the gradient of a log-prob by the logits.
        error = x.new_empty(count, vocab) if any(ctx.needs_input_grad[:2]) else None
        for part in _slices(count, _LOGITS // vocab):
            logits = torch.mm(x[part], w.t(), out=None if error is None else error[part])
            for rows in _slices(len(logits), (_CPU_BLOCK if device == "cpu" else _GPU_BLOCK) // vocab):
                block = logits[rows].float()
                to = slice(part.start + rows.start, part.start + rows.start + len(block))
                if scaled:
                    block *= scale[to]
                p = block.softmax(dim=1)
                # The most likely token's p is never too small for its logarithm.
                total = block.amax(dim=1) - p.amax(dim=1).log()
                chosen[to] = block.gather(1, targets[to, None]).squeeze(1) - total
                if entropy:
                    entropies[to] = total - (p * block).sum(dim=1)
                if error is not None:
                    logits[rows] = p
        if error is not None:
            # Where the target is nearly certain, 1 - p has digits that p in bf16 has not.
            error[torch.arange(count, device=x.device), targets] = chosen.expm1().to(dtype)
            ctx.save_for_backward(x, w, targets, error, chosen, entropies)
            ctx.scale, ctx.dtypes = scale, (states.dtype, weight.dtype)
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, grad_chosen: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        x, w, targets, error, chosen, entropies = ctx.saved_tensors
        factor = -ctx.scale * grad_chosen[:, None]
        if len(entropies) and grad_entropies.any():
            # Both gradients go through the logits: d entropy / d logits = -p * (log p + entropy).
            p = error.to(torch.float32, copy=True)
            p[torch.arange(len(targets), device=p.device), targets] = chosen.exp()
            slope = torch.xlogy(p, p).add_(p * entropies[:, None]).mul_(-ctx.scale * grad_entropies[:, None])
            error = slope.add_(factor * error.float()).to(error.dtype)
            factor = torch.ones_like(factor)
        states_dtype, weight_dtype = ctx.dtypes
        grad_states = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_states = ((error @ w).float() * factor).to(states_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (error.t() @ (x.float() * factor).to(x.dtype)).to(weight_dtype)
        return grad_states, grad_weight, None, None, None, None


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + max(size, 1)) for start in range(0, count, max(size, 1))]
