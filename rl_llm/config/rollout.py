"""The section `rollout`: how a step is sampled."""

from pydantic import Field, model_validator

from rl_llm.config.base import Ramp, Scheduled, Section


class RolloutConfig(Section):
    engine: str = Field("transformers", description="what samples, or package.module:function")
    prompts_per_step: int = Field(8, ge=1)
    samples_per_prompt: int = Field(8, ge=1, description="size of a group")
    rows_per_request: int | None = Field(
        None, ge=1, description="rows decoded together; fixes the numbers, so it does not follow the worker count"
    )
    max_new_tokens: int = Field(64, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    temperature: Scheduled = Field(1.0, description="exploration; a number or {start, end, steps}")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: no limit")
    stop: list[str] = Field([], description="strings that end a completion")

    @property
    def request_rows(self) -> int:
        """Rows of one request: whole groups, by default as near to 32 rows as they come."""
        return self.rows_per_request or max(32 // self.samples_per_prompt, 1) * self.samples_per_prompt

    @model_validator(mode="after")
    def _consistent(self) -> "RolloutConfig":
        if self.request_rows % self.samples_per_prompt:
            raise ValueError(
                f"rows_per_request {self.request_rows} must be a multiple of "
                f"samples_per_prompt {self.samples_per_prompt}"
            )
        if "" in self.stop:
            raise ValueError("stop: an empty string would end every completion before it begins; leave it out")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}")
        ends = (
            [self.temperature.start, self.temperature.end] if isinstance(self.temperature, Ramp) else [self.temperature]
        )
        if min(ends) <= 0:
            raise ValueError("temperature must stay above 0; evaluation is greedy on its own")
        return self
