"""Training before reinforcement learning: self-supervised on text, supervised on targets."""

from collections.abc import Callable

import numpy as np
import torch

from rl_llm.config import LearnerConfig, WarmStartConfig
from rl_llm.learner.optimizer import build_optimizer, learning_rate, set_rate
from rl_llm.policies import CausalLM
from rl_llm.policies.packing import Group, microbatches, pack

# Second word of the key of the draws of examples, far above any sample's id and below the ids of evaluation.
DRAWS = 1 << 61

# (prompt tokens, targets as tokens with the end token), one entry a training row.
Examples = list[tuple[np.ndarray, list[np.ndarray]]]


def encode_examples(
    policy: CausalLM, prompts: list[np.ndarray], targets: list[list[str]], max_target_tokens: int
) -> Examples:
    """Targets as tokens, cut at the limit; those that fit end with the end token, cut ones do not."""
    tokenizer, end = policy.tokenizer, policy.tokenizer.eos_token_id
    flat = [text for row in targets for text in row]
    ids = iter(tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
    encoded = [[next(ids) for _ in row] for row in targets]
    return [
        (prompt, [np.array([*text, end][:max_target_tokens], dtype=np.int64) for text in row])
        for prompt, row in zip(prompts, encoded, strict=True)
        if row
    ]


def train_supervised(
    policy: CausalLM,
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
    generator = np.random.Generator(np.random.Philox(key=[seed, DRAWS + whole_text]))
    trained = 0
    with torch.random.fork_rng(), policy.training(policy.config.dropout):
        torch.manual_seed(seed)
        for step in range(steps):
            batch = [_draw(examples, generator, whole_text) for _ in range(config.batch_size)]
            count = sum(len(group.completions[0]) for group in batch)
            loss = 0.0
            for part in microbatches(batch, settings.tokens_per_microbatch):
                packed = pack(part)
                part_loss = -policy.logprobs(packed, 1.0).sum() / count
                part_loss.backward()
                loss += float(part_loss.detach())
            torch.nn.utils.clip_grad_norm_(policy.trainable.values(), settings.max_grad_norm)
            set_rate(optimizer, learning_rate(settings, step, steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            trained += count
            if progress:
                progress(step + 1, steps, loss)
    return trained


def _draw(examples: Examples, generator: np.random.Generator, whole_text: bool) -> Group:
    prompt, targets = examples[generator.integers(len(examples))]
    target = targets[generator.integers(len(targets))]
    if whole_text:
        text = np.concatenate([prompt, target])
        return Group((0,), text[:1], (text[1:],))
    return Group((0,), prompt, (target,))
