"""What a policy is: a Hugging Face model that acts and learns, whatever its actions are."""

import contextlib
import copy
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rl_llm.config import PolicyConfig
from rl_llm.errors import UserError
from rl_llm.policies.checkpointing import checkpointed, enable_checkpointing
from rl_llm.policies.folder import DTYPES, first_not_finite, in_dtype, savable, stored_dtype
from rl_llm.policies.loading import first_line, load_model, read_architecture, tokenizer_source, unloadable
from rl_llm.policies.memory import keep_freed_memory
from rl_llm.policies.packing import PackedRow
from rl_llm.policies.sampling import SamplingParams


@dataclass(frozen=True)
class Actions:
    """What a policy did, an entry a sample.

    Attributes:
        ids: int [length] each: tokens; one label; one tag a word.
        logprobs: float32 [length] each, of the untruncated distribution at the sampling temperature.
        log_kept_mass: float32 [length] each, of what truncation kept; 0: all.
        texts: what rewards read: a text up to the stop string that ended it, a label's name, tags.
        finish: "stop" or "length".
    """

    ids: list[np.ndarray]
    logprobs: list[np.ndarray]
    log_kept_mass: list[np.ndarray]
    texts: list[str]
    finish: list[str]


@dataclass(frozen=True)
class Forward:
    """What a pass over a batch tells of its actions.

    Attributes:
        logprobs: float32 [R, T], a row per sample; 0 where there is no action.
        entropy: float32 [R, T] of the whole distribution each action was drawn from, in nats; None if not asked for.
        states: [N, H], the hidden state that predicts each action, in the order that `PackedBatch.layout` takes.
    """

    logprobs: Tensor
    entropy: Tensor | None
    states: Tensor


class PackedBatch(Protocol):
    """A micro-batch as its policy lays it out; learners read these three and no more.

    Attributes:
        rows: int64 [R], the row of the step's batch that each sample is.
        mask: bool [R, T], where there are actions.
    """

    rows: Tensor
    mask: Tensor

    def layout(self, flat: Tensor) -> Tensor:
        """A value an action, [N], as [R, T] with 0 where there is none."""


class Policy(ABC):
    """A Hugging Face model with fp32 weights, its tokenizer, and what of it trains.

    This base holds all that does not depend on the kind of action. A kind says how it acts (`sample`), how samples are
    laid out (`pack`), what a pass over them tells (`forward`) and how a target text becomes actions (`encode_targets`).

    Attributes:
        model: the model as saved and loaded by `transformers` (or its `peft` wrapper with trainable="lora").
        trainable: parameters that learn, in a fixed order, under the names that the saved folder has them by.
        save_dtype: of the weights in a saved folder.
    """

    auto_class: ClassVar[Any]
    """What `transformers` loads it with."""
    task_type: ClassVar[str]
    """What `peft` calls its kind."""
    continues: ClassVar[bool] = False
    """Whether it writes on where its prompt ends; then no end token may stand there."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    trainable: dict[str, nn.Parameter]

    def __init__(
        self,
        folder: str | Path,
        config: PolicyConfig,
        architecture: PreTrainedConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Load from a folder (Hugging Face's, or `peft`'s of an adapter, which is merged) or a Hub name.

        Args:
            architecture: settings in place of the folder's own, such as those with fewer layers.
            device: where it is; without it a GPU if there is one.

        Raises:
            UserError: there is no such model, or this kind cannot use it.
        """
        self.config = config
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            keep_freed_memory()
        settings = architecture or read_architecture(str(folder))
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(str(folder)), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise unloadable(str(folder), error) from None
        model = load_model(self.auto_class, str(folder), settings)
        # A base that was made of the model says nothing of how that is stored.
        self.save_dtype = DTYPES.get(config.save_dtype) or stored_dtype(config.model or folder)
        self.check_tokenizer(self.tokenizer, str(folder))
        self.check_model(model)
        model.to(self.device).eval()
        broken = first_not_finite(model.named_parameters())
        if broken is not None:
            raise UserError(f"policy.model {str(folder)!r}: the weight {broken} holds NaN or infinite values")
        if model.can_generate():
            model.generation_config, _ = savable(model.generation_config)
        self.prepare(model)
        self.model = freeze(model, config, self.task_type)
        self.trainable = trainable_parameters(self.model)
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        self.autocast_dtype = torch.bfloat16 if wants_bf16(config.precision, self.device) else None

    # What a kind of policy says.

    @classmethod
    def check_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
        """Raise `UserError` where the tokenizer lacks what this kind needs; asked before anything starts."""

    @classmethod
    def check_model(cls, model: PreTrainedModel) -> None:
        """Raise `UserError` for an architecture that this kind cannot use; asked before anything starts."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Make of a loaded model what this kind needs, and learn what it has to know of it; before it is wrapped."""

    @abstractmethod
    def sample(self, prompts: Sequence[np.ndarray], sample_ids: np.ndarray, params: SamplingParams) -> Actions:
        """Act, `params.samples_per_prompt` times on each of P prompts (tokens).

        Args:
            sample_ids: int64 [P * n], which key the random numbers; samples of a prompt stand together.
        """

    @abstractmethod
    def pack(self, rows: Sequence[PackedRow]) -> PackedBatch:
        """Samples laid out for one pass."""

    @abstractmethod
    def forward(self, batch: Any, temperature: Tensor | float, entropy: bool = False) -> Forward:
        """What one pass over a batch of `pack` tells of its actions.

        Args:
            temperature: what logits are divided by; [R], each row's own, or one for all.
            entropy: only if asked for, it may cost a pass.
        """

    @abstractmethod
    def encode_targets(self, targets: Sequence[str], limit: int) -> list[np.ndarray]:
        """Texts to imitate as actions, int64 [length up to `limit`] each."""

    def states(self, batch: Any) -> Tensor:
        """`Forward.states` alone, where that is cheaper."""
        return self.forward(batch, 1.0).states

    # What all kinds share.

    @property
    def unwrapped(self) -> PreTrainedModel:
        """The model without the wrapper of an adapter."""
        model: Any = self.model
        return model.get_base_model() if self.config.trainable == "lora" else model

    @property
    def hidden_size(self) -> int:
        """The width of `Forward.states`."""
        return int(self.unwrapped.config.get_text_config().hidden_size)

    def clone(self) -> "Policy":
        """A second policy with weights of its own where this one learns; what is frozen is shared."""
        twin = copy.copy(self)
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        twin.model = copy.deepcopy(self.model, shared)
        twin.trainable = trainable_parameters(twin.model)
        return twin

    @contextlib.contextmanager
    def training(self, dropout: float) -> Iterator[None]:
        """Gradients; train mode with this dropout, eval mode with none; layers checkpointed where configured."""
        recomputing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if dropout > 0:
            # A model's own dropout cannot act in eval mode, however its modules keep it.
            _set_dropout(self.model, dropout)
            self.model.train()
        elif self.config.gradient_checkpointing:
            recomputing = checkpointed(self.model)
        try:
            with recomputing, torch.enable_grad():
                yield
        finally:
            self.model.eval()

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

    def named_weights(self) -> dict[str, Tensor]:
        """The trainable weights, as they are, under the names that the saved folder has them by."""
        return {name: p.detach() for name, p in self.trainable.items()}

    def load_named(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put weights in place by name. Raises `ValueError` for one that does not train here or has another shape."""
        with torch.no_grad():
            for name, tensor in tensors:
                p = self.trainable.get(name)
                if p is None or p.shape != tensor.shape:
                    raise ValueError(f"the weight {name} {list(tensor.shape)} fits none that trains here")
                p.copy_(tensor)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Leave a folder that `transformers` loads; an adapter is merged into the weights.

        Args:
            dtype: of its weights; None: as `policy.save_dtype` says.
        """
        model: Any = self.model
        if self.config.trainable == "lora":
            # Merging in place and taking it out again would change the weights by a rounding.
            model = _untied(copy.deepcopy(model)).merge_and_unload()
        in_dtype(model, dtype or self.save_dtype).save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))


def freeze(model: PreTrainedModel, config: PolicyConfig, task_type: str) -> nn.Module:
    """Leave only what `config.trainable` says requiring gradients; returns the model, wrapped by `peft` for an adapter.

    Raises:
        UserError: the model has fewer layers, or nothing that an adapter could be put on.
    """
    wrapped: nn.Module = model
    if config.trainable == "last_layers":
        model.requires_grad_(False)
        depth = model.config.get_text_config().num_hidden_layers
        if config.last_layers > depth:
            raise UserError(f"policy.last_layers {config.last_layers}: the model has {depth} layers")
        layers = next(m for m in text_part(model).modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        for layer in layers[-config.last_layers :]:
            layer.requires_grad_(True)
    elif config.trainable == "lora":
        import peft

        lora = config.lora
        settings = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, task_type=task_type)
        # The adapter's random half must not differ between the processes of a run.
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(0)
            # What it fears of an adapter on tied weights is seen to where they are saved.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
            try:
                wrapped = peft.get_peft_model(model, settings).eval()
            except ValueError as error:
                raise UserError(f"policy.lora.targets {lora.targets!r}: {first_line(error)}") from None
    if model.config.get_text_config() is not model.config:
        # What reads images or sound has no part in text: it would never learn.
        text = {id(p) for part in (text_part(model), model.get_output_embeddings()) for p in part.parameters()}
        for p in model.parameters():
            p.requires_grad_(p.requires_grad and id(p) in text)
    return wrapped


def text_part(model: PreTrainedModel) -> nn.Module:
    """The trunk that reads and writes text: all of it in most models, one of several in those that see or hear too."""
    part: nn.Module = model if model.config.get_text_config() is model.config else model.get_decoder()
    return part


def _untied(model: Any) -> Any:
    """A `peft` model in which no weight that an adapter is on stands in a second place.

    Merged into a weight that input embeddings and head share, an adapter on one would change the other as well.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    weights = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            inner: Any = module.get_base_layer()
            if weights[id(inner.weight)] > 1:
                inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
                settings = model.get_base_model().config
                settings.tie_word_embeddings = settings.get_text_config().tie_word_embeddings = False
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What requires gradients. `peft` saves an adapter's weights without the adapter's name; all others keep theirs."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}


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
