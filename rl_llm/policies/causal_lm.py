"""A decoder-only language model as a policy: acts token by token, replays log-probs of packed groups."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from rl_llm.errors import UserError
from rl_llm.policies import decoding
from rl_llm.policies.attention import GROUPED, attention_of, windows_used
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
                f"policy.model: the architecture {model.config.model_type} attends in a way of its own, in which "
                "samples cannot share their prompt; take one that leaves attention to transformers, such as llama, "
                "qwen3 or gpt2"
            )

    def prepare(self, model: PreTrainedModel) -> None:
        self._own_attention = attention_of(model)
        model.set_attn_implementation(GROUPED)
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad(), windows_used() as windows:
            states = _trunks(model)[0](input_ids=token, use_cache=False).last_hidden_state
            self._hidden_size = states.shape[-1]
            self._scale = _scale_of_head(model, self._hidden_size)
        self._limits = [(window, f"sees the last {window} tokens only") for window in windows]
        self._limits += [
            (length, f"turns all rows of a batch otherwise where one has more than {length} tokens (rope scaling)")
            for length in _rope_limits(model)
        ]

    @contextlib.contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The model as the library has it, with the attention it was loaded with; acting and learning are wrong."""
        model = self.unwrapped
        model.set_attn_implementation(self._own_attention)
        try:
            yield model
        finally:
            model.set_attn_implementation(GROUPED)

    @property
    def hidden_size(self) -> int:
        return self._hidden_size

    def check_length(self, tokens: int) -> None:
        """Raise `UserError` where a prompt with its completion may come to more tokens than are computed rightly."""
        for limit, what in self._limits:
            if tokens > limit:
                raise UserError(
                    f"policy.model: {self.unwrapped.config.model_type} {what}, and a prompt with its completion comes "
                    f"to {tokens}: lower task.max_prompt_tokens or rollout.max_new_tokens, or take another model"
                )

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a completion: the tokenizer's own and those the model's generation settings name."""
        named = getattr(self.unwrapped.generation_config, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        return sorted({self.tokenizer.eos_token_id, *(token for token in named if token is not None)})

    def sample(self, prompts: Sequence[np.ndarray], sample_ids: np.ndarray, params: SamplingParams) -> Actions:
        self.check_length(max(map(len, prompts)) + params.max_new_tokens)
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
        self.check_length(max(len(row.prompt) + max(map(len, row.completions)) for row in rows))
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
        hidden = _trunks(self.unwrapped)[0](
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

        A head that is a matrix and a factor, as most are, takes the fast path; others, such as those that bend their
        logits, work chunk by chunk and recompute logits in the backward pass, so that those of a batch never exist at
        once.

        Args:
            states: [N, H]; targets: int64 [N].
            temperature: one for all, or [N].
            entropy: without it the second value is empty.

        Returns:
            float32 [N] each, in nats.
        """
        head = self.unwrapped.get_output_embeddings()
        if self._scale is not None and type(head) is nn.Linear:  # an adapter may have wrapped it
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
        logp = (_own_logits(self.unwrapped, states).float() / temperature).log_softmax(dim=1)
        chosen = logp.gather(1, targets[:, None]).squeeze(1)
        return chosen, -(logp.exp() * logp).sum(dim=1) if entropy else chosen.new_zeros(0)


class _States(BaseModelOutputWithPast):
    """What a trunk is made to return: states, and nothing of all else that a model may ask for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)


def _trunks(model: PreTrainedModel) -> list[Any]:
    """The models within a model: what makes states of tokens, then its parts, any of which it may call."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]


def _own_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """[N, V] of a trunk's states [N, H], by the model's own forward, which may do more than multiply by its head."""
    trunks = _trunks(model)
    for trunk in trunks:
        trunk.forward = lambda *args, **kwargs: _States(last_hidden_state=states[None])
    try:
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
        return logits
    finally:
        for trunk in trunks:
            del trunk.forward


def _scale_of_head(model: PreTrainedModel, width: int) -> float | None:
    """What the head's products are multiplied by, to six digits; None where more is done to states or logits."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.in_features != width:
        return None
    states = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(model.device)
    states *= 1000 / head(states).abs().max()  # so large that a cap would be seen
    products, logits = head(states).double(), _own_logits(model, states).double()
    scale = float((logits * products).sum() / products.square().sum())
    return float(f"{scale:.6g}") if torch.allclose(logits, scale * products, rtol=1e-4, atol=0.1) else None


def _rope_limits(model: PreTrainedModel) -> Iterator[int]:
    """Lengths above which rotary embeddings follow the longest row of a batch, so that rows change their neighbours."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for layers, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and "dynamic" in kind:
                yield module.original_max_seq_len
            elif kind == "longrope":
                settings = module.config.rope_parameters
                yield (settings[layers] if layers else settings)["original_max_position_embeddings"]
