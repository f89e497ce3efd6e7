"""The transformers engine: its own decode loop on the library's models and cache interface."""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rl_llm.policies import CausalLM
from rl_llm.policies.cache import GroupCache, left_pad
from rl_llm.policies.sampling import SamplingParams, draw, uniforms
from rl_llm.table import make_shard, ragged

# Finished rows are dropped when they are this share of the batch: dropping copies the cache.
DROP_SHARE = 0.25


def generate(
    policy: CausalLM,
    prompts: pa.Table,
    sample_ids: np.ndarray,
    groups: np.ndarray,
    params: SamplingParams,
    version: int,
) -> pa.Table:
    """Sample completions for one request.

    Args:
        policy: what acts.
        prompts: `prompt_id`, `prompt`, `prompt_ids`, `field/<name>`; [P] rows.
        sample_ids, groups: int64 [P * n], of each sample; samples of a prompt stand together.
        params: how to sample; n is `params.samples_per_prompt`.
        version: learner updates behind the weights.

    Returns:
        A shard of the rollout table, [P * n] rows.
    """
    with policy.acting():
        decoding = _Decoding(policy, ragged(prompts["prompt_ids"]), sample_ids, params)
        decoding.run()
    lengths = decoding.lengths.tolist()
    tokens, logprobs, kept = (x.cpu().numpy() for x in (decoding.tokens, decoding.logprobs, decoding.log_kept_mass))
    texts = policy.tokenizer.batch_decode(
        [row[:n] for row, n in zip(tokens, lengths, strict=True)], skip_special_tokens=True
    )
    columns = {
        "sample_id": sample_ids,
        "group": groups,
        "policy_version": np.full(len(lengths), version),
        "completion": [_before_stop(text, params.stop) for text in texts],
        "completion_ids": [row[:n] for row, n in zip(tokens, lengths, strict=True)],
        "action_mask": [np.ones(n, dtype=bool) for n in lengths],
        "logprobs": [row[:n] for row, n in zip(logprobs, lengths, strict=True)],
        "log_kept_mass": [row[:n] for row, n in zip(kept, lengths, strict=True)],
        "temperature": np.full(len(lengths), params.temperature, dtype=np.float32),
        "finish": ["stop" if ended else "length" for ended in decoding.ended.tolist()],
    }
    return make_shard(prompts, params.samples_per_prompt, columns)


class _Decoding:
    """State of one request while it decodes. Results are [R, T]; `active` are the rows still in the batch."""

    def __init__(
        self, policy: CausalLM, prompts: list[np.ndarray], sample_ids: np.ndarray, params: SamplingParams
    ) -> None:
        self.policy, self.params, self.prompts = policy, params, prompts
        rows, steps, device = len(sample_ids), params.max_new_tokens, policy.device
        self.uniform = uniforms(params.seed, sample_ids, steps) if params.temperature > 0 else torch.zeros(rows, steps)
        self.end_ids = torch.tensor(policy.end_ids, device=device)
        self.tokens = torch.zeros(rows, steps, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, steps, device=device)
        self.log_kept_mass = torch.zeros(rows, steps, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.active = torch.arange(rows, device=device)

    def run(self) -> None:
        params, device = self.params, self.policy.device
        cache = GroupCache(self.policy.lm.config.num_hidden_layers)
        ids, real = left_pad(self.prompts, self.policy.tokenizer.eos_token_id)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        logits = self._forward(ids.to(device), prefill_mask(real).to(device), positions.to(device), cache)
        n = params.samples_per_prompt
        cache.begin(n, params.max_new_tokens)
        logits = logits.repeat_interleave(n, dim=0)
        start = real.sum(dim=1).repeat_interleave(n).to(device)
        visible = (
            torch.nn.functional.pad(real, (0, params.max_new_tokens), value=True).repeat_interleave(n, dim=0).to(device)
        )
        width = ids.shape[1]
        for step in range(params.max_new_tokens):
            drawn = draw(
                logits,
                self.uniform[self.active.cpu(), step],
                params,
                banned=self.policy.end_ids if step < params.min_new_tokens else [],
            )
            self._record(step, drawn.tokens, drawn.logprobs, drawn.log_kept_mass)
            running = ~self.ended[self.active]
            left = int(running.sum())
            if left == 0 or step + 1 == params.max_new_tokens:
                return
            tokens = drawn.tokens
            if left <= (1 - DROP_SHARE) * len(running):
                rows = running.nonzero().squeeze(1)
                cache.keep(rows)
                self.active, tokens, start, visible = self.active[rows], tokens[rows], start[rows], visible[rows]
            mask = visible[:, None, None, : width + step + 1]
            logits = self._forward(tokens[:, None], mask, (start + step)[:, None], cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: GroupCache) -> Tensor:
        out = self.policy.lm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            prompts=cache.prompts,
        )
        return out.logits[:, -1]

    def _record(self, step: int, tokens: Tensor, logprobs: Tensor, log_kept_mass: Tensor) -> None:
        """Keep this step's token of every row that has not ended before; mark the rows that end with it."""
        going = ~self.ended[self.active]
        rows = self.active[going]
        self.tokens[rows, step] = tokens[going]
        self.logprobs[rows, step] = logprobs[going]
        self.log_kept_mass[rows, step] = log_kept_mass[going]
        self.lengths[rows] = step + 1
        self.ended[rows] = torch.isin(tokens[going], self.end_ids)
        if self.params.stop and step + 1 >= self.params.min_new_tokens:
            self._end_at_stop_strings(rows, step + 1)

    def _end_at_stop_strings(self, rows: Tensor, length: int) -> None:
        # A stop string is spelled by at most its number of bytes in tokens, however the tokenizer cuts it.
        tail = max(len(stop.encode()) for stop in self.params.stop) + 1
        # With special tokens, as a stop string may be one: the completion's text, without them, ends there by itself.
        texts = self.policy.tokenizer.batch_decode(self.tokens[rows, max(length - tail, 0) : length])
        found = [any(stop in text for stop in self.params.stop) for text in texts]
        self.ended[rows] |= torch.tensor(found, device=self.ended.device)


def prefill_mask(real: Tensor) -> Tensor:
    """bool [P, 1, S, S] for left-padded prompts: causal over real tokens; padding looks at itself."""
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ((causal & real[:, None, :]) | torch.eye(length, dtype=torch.bool))[:, None]


def _before_stop(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first stop string in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
