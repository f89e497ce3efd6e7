"""The decode loop of decoder-only models, on the library's models and cache interface."""

import os
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_llm.policies.cache import GroupCache, left_pad
from rl_llm.policies.sampling import SamplingParams, draw, uniforms

# Finished rows are dropped when they are this share of the batch: dropping copies the cache.
DROP_SHARE = 0.25


class Decoding:
    """One request while it decodes; call it within `Policy.acting`.

    Args:
        end_ids: tokens that end a sample.
        sample_ids: int64 [R]; samples of a prompt stand together.

    Attributes:
        tokens, logprobs, log_kept_mass: [R, T], 0 behind a sample's end.
        lengths: int64 [R].
        ended: bool [R], whether a sample came to an end by itself.
        active: the rows still in the batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: list[int],
        prompts: Sequence[np.ndarray],
        sample_ids: np.ndarray,
        params: SamplingParams,
    ) -> None:
        self.model, self.tokenizer, self.params, self.prompts = model, tokenizer, params, prompts
        self.ends = end_ids
        rows, steps, device = len(sample_ids), params.max_new_tokens, model.device
        self.uniform = uniforms(params.seed, sample_ids, steps) if params.temperature > 0 else torch.zeros(rows, steps)
        self.end_ids = torch.tensor(end_ids, device=device)
        self.tokens = torch.zeros(rows, steps, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, steps, device=device)
        self.log_kept_mass = torch.zeros(rows, steps, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.active = torch.arange(rows, device=device)

    def run(self) -> None:
        params, device = self.params, self.model.device
        cache = GroupCache(self.model.config.get_text_config().num_hidden_layers)
        ids, real = left_pad(self.prompts, self.tokenizer.eos_token_id)
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
                banned=self.ends if step < params.min_new_tokens else [],
            )
            self.record(step, drawn.tokens, drawn.logprobs, drawn.log_kept_mass)
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
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            prompts=cache.prompts,
        )
        return out.logits[:, -1]

    def record(self, step: int, tokens: Tensor, logprobs: Tensor, log_kept_mass: Tensor) -> None:
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
        start = max(length - max(len(stop.encode()) for stop in self.params.stop) - 1, 0)
        texts = decode(self.tokenizer, self.tokens[rows, start:length].tolist())
        for row, text in zip(rows, texts, strict=True):
            if any(stop in text for stop in self.params.stop):
                [before] = decode(self.tokenizer, [self.tokens[row, start : length - 1].tolist()])
                self.ended[row] |= stop_begins(before, text, self.params.stop) is not None

    def texts(self) -> list[str]:
        """What each sample says, up to the stop string that ended it; tokens that end or pad a sample say nothing."""
        silent = {*self.ends, self.tokenizer.pad_token_id}
        rows = [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]
        texts = decode(self.tokenizer, rows, silent)
        for i in self.ended.nonzero().squeeze(1).tolist() if self.params.stop else []:
            [before] = decode(self.tokenizer, [rows[i][:-1]], silent)
            texts[i] = texts[i][: stop_begins(before, texts[i], self.params.stop)]
        return texts


def decode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], silent: Collection[int] = ()
) -> list[str]:
    """The text of tokens as it was written, special ones included and nothing tidied; `silent` ones are left out."""
    written = [[token for token in row if token not in silent] for row in rows]
    return list(tokenizer.batch_decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def stop_begins(before: str, text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins that the last token completed: in `text`, and not in `before`, without it."""
    known = len(os.path.commonprefix([before, text]))  # noqa: RUF071 - character by character is what is meant
    found = [text.find(stop, max(known - len(stop) + 1, 0)) for stop in stops]
    return min((at for at in found if at >= 0), default=None)


def prefill_mask(real: Tensor) -> Tensor:
    """bool [P, 1, S, S] for left-padded prompts: causal over real tokens; padding looks at itself."""
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ((causal & real[:, None, :]) | torch.eye(length, dtype=torch.bool))[:, None]
