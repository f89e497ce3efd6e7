"""The sections `policy` and `warm_start`: what acts and learns, and how it comes to its start."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rl_llm.config.base import MAY_CHANGE, Section
from rl_llm.process import absolute


class ScratchConfig(Section):
    """A small GPT-like model (Llama architecture) with a byte-pair tokenizer trained on the task's own text."""

    layers: int = Field(4, ge=1)
    hidden_size: int = Field(128, ge=8)
    heads: int = Field(4, ge=1)
    vocab_size: int = Field(512, ge=64)

    @model_validator(mode="after")
    def _heads_divide(self) -> "ScratchConfig":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 x heads ({2 * self.heads})")
        return self


class LoraConfig(Section):
    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    targets: str | list[str] = "all-linear"

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | list[str]) -> str | list[str]:
        if not targets:
            raise ValueError("it names no module; leave it out for all linear layers")
        return targets


class PolicyConfig(Section):
    type: str = Field("causal_lm", description="kind of policy, or package.module:Class")
    model: str | None = Field(None, description="a Hugging Face folder or Hub name; empty: built from `scratch`")
    scratch: ScratchConfig = ScratchConfig()
    trainable: Literal["all", "last_layers", "lora"] = "all"
    last_layers: int = Field(2, ge=1, description="how many of the last layers train with trainable=last_layers")
    lora: LoraConfig = LoraConfig()
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 autocast where it is native")
    save_dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], MAY_CHANGE] = Field(
        "auto", description="of the saved model; auto: as the given one is stored"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, one more forward")
    dropout: float = Field(0.0, ge=0, lt=1, description="for warm start; reinforcement learning runs without")

    @field_validator("model")
    @classmethod
    def _whole_path(cls, model: str | None) -> str | None:
        # Workers look for it too, from wherever they run.
        folder = absolute(model or "")
        return str(folder) if model and folder.is_dir() else model


class WarmStartConfig(Section):
    """Training before reinforcement learning; its result is cached and shared by runs with the same settings."""

    pretrain_steps: int = Field(0, ge=0, description="self-supervised: next token on prompts and targets")
    supervised_steps: int = Field(0, ge=0, description="supervised: the target given the prompt")
    target: str = Field("reference", description="column with the text to imitate (a list: one is drawn each time)")
    batch_size: int = Field(32, ge=1)
    max_target_tokens: int = Field(128, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(20, ge=0)
