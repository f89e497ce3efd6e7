"""A decoder-only language model as a policy: acts token by token, replays log-probs of packed groups."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rl_llm.errors import UserError
from rl_llm.policies import decoding
from rl_llm.policies.attention import GROUPED
from rl_llm.policies.base import Actions, Forward, Policy
from rl_llm.policies.logprobs import chosen_logprobs
from rl_llm.policies.packing import GroupBatch, PackedRow, pack
from rl_llm.policies.sampling import SamplingParams

# Logits of this many tokens exist at once; more would not be faster, only larger.
LOGPROB_CHUNK = 512


class CausalLM(Policy):
    """Actions are tokens. Groups share their prompt in training and while decoding."""

    auto_class = AutoModelForCausalLM
    task_type: ClassVar[str] = "CAUSAL_LM"
    continues: ClassVar[bool] = True

    @classmethod
    def check_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"policy.model {folder!r}: its tokenizer has no end-of-text token")

    @classmethod
    def check_model(cls, model: PreTrainedModel) -> None:
        # One with attention of its own would not know of packed groups.
        if not model._supports_attention_backend:
            raise UserError(
                f"policy.model: the architecture {model.config.model_type} does its attention itself, in a way that "
                "groups of samples cannot share a prompt in; take one that leaves it to transformers, such as llama, "
                "qwen or gpt2"
            )

    def prepare(self, model: PreTrainedModel) -> None:
        model.set_attn_implementation(GROUPED)
        # What some architectures do to the head's logits: Cohere and Granite scale them, Gemma caps them.
        factor, divisor, self._cap = (
            getattr(model.config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
        )
        self._scale = (factor or 1.0) / (divisor or 1.0)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a completion: the tokenizer's own and those the model's generation settings name."""
        named = getattr(self.unwrapped.generation_config, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        return sorted({self.tokenizer.eos_token_id, *(token for token in named if token is not None)})

    def sample(self, prompts: Sequence[np.ndarray], sample_ids: np.ndarray, params: SamplingParams) -> Actions:
        with self.acting():
            decoded = decoding.Decoding(self.unwrapped, self.tokenizer, self.end_ids, prompts, sample_ids, params)
            decoded.run()
        lengths = decoded.lengths.tolist()
        tokens, logprobs, kept = (
            [row[:n] for row, n in zip(table.cpu().numpy(), lengths, strict=True)]
            for table in (decoded.tokens, decoded.logprobs, decoded.log_kept_mass)
        )
        finish = ["stop" if ended else "length" for ended in decoded.ended.tolist()]
        return Actions(tokens, logprobs, kept, decoded.texts(), finish)

    def pack(self, rows: Sequence[PackedRow]) -> GroupBatch:
        return pack(rows)

    def encode_targets(self, targets: Sequence[str], limit: int) -> list[np.ndarray]:
        """Tokens cut at the limit; targets that fit end with the end token, cut ones do not."""
        end = self.tokenizer.eos_token_id
        encoded = self.tokenizer(list(targets), add_special_tokens=False)["input_ids"] if targets else []
        return [np.array([*ids, end][:limit], dtype=np.int64) for ids in encoded]

    def forward(self, batch: GroupBatch, temperature: Tensor | float, entropy: bool = False) -> Forward:
        if isinstance(temperature, Tensor):
            temperature = temperature.double()[:, None].expand(batch.mask.shape)[batch.mask]  # a token's own
        with self.autocast():
            states = self._states(batch)
            logprobs, entropies = self.chosen_logprobs(states, batch.targets.to(self.device), temperature, entropy)
        return Forward(batch.layout(logprobs), batch.layout(entropies) if entropy else None, states)

    def states(self, batch: GroupBatch) -> Tensor:
        with self.autocast():
            return self._states(batch)

    def _states(self, batch: GroupBatch) -> Tensor:
        model = self.unwrapped
        base = getattr(model, model.base_model_prefix)
        hidden = base(
            input_ids=batch.input_ids.to(self.device),
            attention_mask=batch.attention_mask().to(self.device),
            position_ids=batch.position_ids.to(self.device),
            use_cache=False,
            blocks=batch.blocks().to(self.device),
        ).last_hidden_state
        return hidden.flatten(0, 1)[batch.predictor.to(self.device)]

    def chosen_logprobs(
        self, states: Tensor, targets: Tensor, temperature: Tensor | float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each target from its predicting state, and the entropy of the distribution it is of.

        A head that is a matrix, as most are, takes the fast path; others, such as those that bend their logits, work
        chunk by chunk and recompute logits in the backward pass, so that those of a batch never exist at once.

        Args:
            states: [N, H]; targets: int64 [N].
            temperature: one for all, or [N].
            entropy: without it the second value is empty.

        Returns:
            float32 [N] each, in nats.
        """
        head = self.unwrapped.get_output_embeddings()
        if type(head) is nn.Linear and head.bias is None and self._cap is None:
            return chosen_logprobs(states, head.weight, targets, self._scale / temperature, entropy)
        parts = []
        divisor = torch.as_tensor(temperature, dtype=torch.float32, device=states.device).expand(len(targets))
        for start in range(0, len(targets), LOGPROB_CHUNK):
            chunk = slice(start, start + LOGPROB_CHUNK)
            piece = states[chunk], targets[chunk], divisor[chunk, None], entropy
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._chunk_logprobs, *piece, use_reentrant=False))
            else:
                parts.append(self._chunk_logprobs(*piece))
        empty = states.new_zeros(0, dtype=torch.float32)
        logprobs, entropies = zip(*parts, strict=True) if parts else ((empty,), (empty,))
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk_logprobs(
        self, states: Tensor, targets: Tensor, temperature: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logits = self.unwrapped.get_output_embeddings()(states) * self._scale
        if self._cap is not None:
            logits = self._cap * torch.tanh(logits / self._cap)
        logp = (logits.float() / temperature).log_softmax(dim=1)
        chosen = logp.gather(1, targets[:, None]).squeeze(1)
        return chosen, -(logp.exp() * logp).sum(dim=1) if entropy else chosen.new_zeros(0)
