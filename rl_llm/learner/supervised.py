"""Training before reinforcement learning: self-supervised on text, supervised on targets."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rl_llm.config import LearnerConfig, WarmStartConfig
from rl_llm.learner.optimizer import Schedule, build_optimizer, set_rate
from rl_llm.policies import PackedRow, Policy
from rl_llm.policies.packing import microbatches
from rl_llm.rng import Purpose, stream

# (prompt tokens, targets as tokens with the end token), one entry a training row.
Examples = list[tuple[np.ndarray, list[np.ndarray]]]


def encode_examples(
    policy: Policy, prompts: Sequence[np.ndarray], targets: Sequence[list[str]], max_target_tokens: int
) -> Examples:
    """Targets as the policy's actions, see `Policy.encode_targets`; rows without a target are left out."""
    encoded = iter(policy.encode_targets([text for row in targets for text in row], max_target_tokens))
    return [(prompt, [next(encoded) for _ in row]) for prompt, row in zip(prompts, targets, strict=True) if row]


def train_supervised(
    policy: Policy,
    examples: Examples,
    config: WarmStartConfig,
    seed: int,
    *,
    steps: int = 0,
    tokens: int = 0,
    whole_text: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> int:
    """Minimise the mean negative log-likelihood of target tokens with AdamW and a cosine rate.

    Args:
        steps, tokens: how long; with `tokens`, as many steps as come nearest to that many target tokens.
        whole_text: predict the prompt's tokens too (self-supervised).
        progress: called with (step, steps, loss) after each step.

    Returns:
        Target tokens trained on.
    """
    if tokens:
        mean_length = float(np.mean([np.mean([len(t) for t in targets]) for _, targets in examples]))
        steps = max(round(tokens / (mean_length * config.batch_size)), 1)
    settings = LearnerConfig(
        lr=config.lr, weight_decay=config.weight_decay, warmup_steps=min(config.warmup_steps, steps), schedule="cosine"
    )
    optimizer = build_optimizer(policy.trainable.values(), settings)
    rate = Schedule.of(settings, steps)
    generator = stream(seed, Purpose.EXAMPLES, int(whole_text))
    trained = 0
    with torch.random.fork_rng(), policy.training(policy.config.dropout):
        torch.manual_seed(seed)
        for step in range(steps):
            batch = [_draw(examples, generator, whole_text) for _ in range(config.batch_size)]
            count = sum(len(group.completions[0]) for group in batch)
            loss = 0.0
            for part in microbatches(batch, settings.tokens_per_microbatch):
                part_loss = -policy.forward(policy.pack(part), 1.0).logprobs.sum() / count
                part_loss.backward()
                loss += float(part_loss.detach())
            torch.nn.utils.clip_grad_norm_(policy.trainable.values(), settings.max_grad_norm)
            set_rate(optimizer, rate.at(step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            trained += count
            if progress:
                progress(step + 1, steps, loss)
    return trained


def _draw(examples: Examples, generator: np.random.Generator, whole_text: bool) -> PackedRow:
    prompt, targets = examples[generator.integers(len(examples))]
    target = targets[generator.integers(len(targets))]
    if whole_text:
        text = np.concatenate([prompt, target])
        return PackedRow((0,), text[:1], (text[1:],))
    return PackedRow((0,), prompt, (target,))
