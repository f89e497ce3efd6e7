"""A decoder-only language model as a policy: loads, replays log-probs, trades weights, saves."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rl_llm.config import PolicyConfig
from rl_llm.errors import UserError
from rl_llm.policies.attention import GROUPED
from rl_llm.policies.logprobs import chosen_logprobs
from rl_llm.policies.memory import keep_freed_memory
from rl_llm.policies.packing import GroupBatch

# Logits of this many tokens exist at once; more would not be faster, only larger.
LOGPROB_CHUNK = 512


def check_attention(lm: PreTrainedModel) -> None:
    """Raise `UserError` for an architecture with attention of its own: it would not know of packed groups."""
    if not lm._supports_attention_backend:
        raise UserError(
            f"policy.model: the architecture {lm.config.model_type} does its attention itself, in a way that groups of "
            "samples cannot share a prompt in; take one that leaves it to transformers, such as llama, qwen or gpt2"
        )


def freeze(lm: PreTrainedModel, config: PolicyConfig) -> nn.Module:
    """Leave only what `config.trainable` says requiring gradients; returns the model, wrapped by `peft` for an adapter.

    Raises:
        UserError: the model has fewer layers, or nothing that an adapter could be put on.
    """
    model: nn.Module = lm
    if config.trainable == "last_layers":
        lm.requires_grad_(False)
        depth = lm.config.num_hidden_layers
        if config.last_layers > depth:
            raise UserError(f"policy.last_layers {config.last_layers}: the model has {depth} layers")
        layers = next(m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        for layer in layers[-config.last_layers :]:
            layer.requires_grad_(True)
    elif config.trainable == "lora":
        import peft

        lora = config.lora
        settings = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")
        # The adapter's random half must not differ between the processes of a run.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                model = peft.get_peft_model(lm, settings).eval()
            except ValueError as error:
                raise UserError(f"policy.lora.targets {lora.targets!r}: {str(error).splitlines()[0]}") from None
    return model


@dataclass(frozen=True)
class Forward:
    """What a pass over a batch tells of its completion tokens.

    Attributes:
        logprobs: float32 [R, T], a row per sample; 0 where there is no token.
        entropy: float32 [R, T] of the whole distribution each token was drawn from, in nats; None if not asked for.
        states: [N, H], the last hidden state that predicts each token, in the order of `GroupBatch.targets`.
    """

    logprobs: Tensor
    entropy: Tensor | None
    states: Tensor


class CausalLM:
    """A Hugging Face causal LM with fp32 weights, its tokenizer, and what of it trains.

    Attributes:
        model: the model as saved and loaded by `transformers` (or its `peft` wrapper with trainable="lora").
        trainable: parameters that learn, by name, in a fixed order.
    """

    def __init__(self, folder: str | Path, config: PolicyConfig) -> None:
        """Load from a Hugging Face folder or Hub name. Raises `UserError` if there is no such model."""
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            keep_freed_memory()
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder))
            self.lm: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"policy.model {str(folder)!r} cannot be loaded: {str(error).splitlines()[0]}") from None
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"policy.model {str(folder)!r}: its tokenizer has no end-of-text token")
        check_attention(self.lm)
        self.lm.set_attn_implementation(GROUPED)
        self.lm.to(self.device).eval()
        self.model = freeze(self.lm, config)
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if config.gradient_checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        # What some architectures do to the head's logits: Cohere and Granite scale them, Gemma caps them.
        factor, divisor, self._cap = (
            getattr(self.lm.config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
        )
        self._scale = (factor or 1.0) / (divisor or 1.0)
        self.autocast_dtype = torch.bfloat16 if wants_bf16(config.precision, self.device) else None

    def clone(self) -> "CausalLM":
        """A second policy with weights of its own where this one learns; what is frozen is shared."""
        twin = copy.copy(self)
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        twin.model = copy.deepcopy(self.model, shared)
        wrapped: Any = twin.model
        twin.lm = wrapped.get_base_model() if self.config.trainable == "lora" else wrapped
        twin.trainable = {name: p for name, p in twin.model.named_parameters() if p.requires_grad}
        return twin

    @contextlib.contextmanager
    def training(self, dropout: float) -> Iterator[None]:
        """Train mode with this dropout where dropout or gradient checkpointing needs it; acting is always without."""
        # A model's own dropout cannot act in eval mode, however its modules keep it.
        if dropout > 0 or self.config.gradient_checkpointing:
            _set_dropout(self.model, dropout)
            self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a completion: the tokenizer's own and those the model's generation settings name."""
        named = getattr(self.lm.generation_config, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        return sorted({self.tokenizer.eos_token_id, *(token for token in named if token is not None)})

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def casting_once(self) -> contextlib.AbstractContextManager:
        """Within, weights are cast to bf16 by the first forward that needs their gradients, and not again by the next.

        For the micro-batches of one update. A forward without gradients of this policy has no place in it: autocast
        would hand its casts, which lead back to no weight, to those that follow.
        """
        # Autocast forgets its casts where the outermost of its contexts ends; this one casts nothing itself.
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """No gradients, and weights cast to bf16 once for the whole of a rollout instead of once a token."""
        # Autocast keeps a cast weight only if it could need a gradient, so frozen ones are marked for the while.
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def logprobs(self, batch: GroupBatch, temperature: float) -> Tensor:
        """Log-probabilities of the completion tokens of a batch at a sampling temperature.

        Args:
            batch: groups packed a row each, see `GroupBatch`.
            temperature: what the logits are divided by.

        Returns:
            float32 [R, T], a row per sample in the batch's order; 0 where there is no token.
        """
        return self.forward(batch, temperature).logprobs

    def forward(self, batch: GroupBatch, temperature: float, entropy: bool = False) -> "Forward":
        """What one pass over a batch tells of its completion tokens; `entropy` only if asked for, it costs a pass."""
        with self.autocast():
            states = self._states(batch)
            logprobs, entropies = self.chosen_logprobs(states, batch.targets.to(self.device), temperature, entropy)
        return Forward(batch.layout(logprobs), batch.layout(entropies) if entropy else None, states)

    def states(self, batch: GroupBatch) -> Tensor:
        """The last hidden state that predicts each completion token, [N, H] in the order of `GroupBatch.targets`."""
        with self.autocast():
            return self._states(batch)

    def _states(self, batch: GroupBatch) -> Tensor:
        base = getattr(self.lm, self.lm.base_model_prefix)
        hidden = base(
            input_ids=batch.input_ids.to(self.device),
            attention_mask=batch.attention_mask().to(self.device),
            position_ids=batch.position_ids.to(self.device),
            use_cache=False,
            blocks=batch.blocks().to(self.device),
        ).last_hidden_state
        return hidden.flatten(0, 1)[batch.predictor.to(self.device)]

    def chosen_logprobs(
        self, states: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each target from its predicting state, and the entropy of the distribution it is of.

        A head that is a matrix, as most are, takes the fast path; others, such as those that bend their logits, work
        chunk by chunk and recompute logits in the backward pass, so that those of a batch never exist at once.

        Args:
            states: [N, H]; targets: int64 [N].
            entropy: without it the second value is empty.

        Returns:
            float32 [N] each, in nats.
        """
        head = self.lm.get_output_embeddings()
        if type(head) is nn.Linear and head.bias is None and self._cap is None:
            return chosen_logprobs(states, head.weight, targets, self._scale / temperature, entropy)
        parts = []
        for start in range(0, len(targets), LOGPROB_CHUNK):
            piece = states[start : start + LOGPROB_CHUNK], targets[start : start + LOGPROB_CHUNK], temperature, entropy
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._chunk_logprobs, *piece, use_reentrant=False))
            else:
                parts.append(self._chunk_logprobs(*piece))
        empty = states.new_zeros(0, dtype=torch.float32)
        logprobs, entropies = zip(*parts, strict=True) if parts else ((empty,), (empty,))
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk_logprobs(
        self, states: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logits = self.lm.get_output_embeddings()(states) * self._scale
        if self._cap is not None:
            logits = self._cap * torch.tanh(logits / self._cap)
        logp = (logits.float() / temperature).log_softmax(dim=1)
        chosen = logp.gather(1, targets[:, None]).squeeze(1)
        return chosen, -(logp.exp() * logp).sum(dim=1) if entropy else chosen.new_zeros(0)

    def export_weights(self) -> np.ndarray:
        """The trainable weights as one flat uint8 array: readers map it from the object store without a copy."""
        return np.concatenate(
            [p.detach().cpu().contiguous().view(-1).numpy().view(np.uint8) for p in self.trainable.values()]
        )

    def load_weights(self, flat: np.ndarray) -> None:
        """Put weights exported by another replica in place."""
        sizes = [p.numel() * p.element_size() for p in self.trainable.values()]
        if sum(sizes) != flat.nbytes:
            raise ValueError(f"weights of {flat.nbytes} bytes do not fit {sum(sizes)} bytes of trainable parameters")
        with torch.no_grad():
            for p, part in zip(self.trainable.values(), np.split(flat, np.cumsum(sizes)[:-1]), strict=True):
                # torch wants a writable buffer although it only reads this one; a view over mapped memory is not.
                p.copy_(torch.frombuffer(bytearray(part), dtype=p.dtype).view(p.shape))

    def save_pretrained(self, folder: str | Path) -> None:
        """Leave a folder that `transformers` loads; an adapter is merged into the weights."""
        lm: Any = self.lm
        if self.config.trainable == "lora":
            # Merging in place and taking it out again would change the weights by a rounding.
            lm = copy.deepcopy(self.model).merge_and_unload()  # type: ignore[operator]
        lm.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))


def _set_dropout(model: nn.Module, dropout: float) -> None:
    """Set every dropout of a model: modules made for it, and numbers such as `attention_dropout` that modules keep."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
            continue
        for name, value in list(vars(module).items()):
            if "dropout" in name and type(value) in (int, float):
                setattr(module, name, dropout)


def wants_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run in bf16: as told, or where `auto` finds the hardware made for it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    # torch says nothing public about native bf16 of a CPU; emulated it is many times slower than fp32.
    return flags.exists() and any(flag in flags.read_text() for flag in ("amx_bf16", "avx512_bf16", " bf16"))
