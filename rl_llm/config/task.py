"""The section `task`: where prompts come from."""

from typing import Any, Literal

from pydantic import Field, model_validator

from rl_llm.config.base import Section


class SplitConfig(Section):
    by: str = Field("prompt", description="'prompt', or the column whose hash decides the side of a row")
    tune: float = Field(0.1, gt=0, lt=1, description="share of rows that validate, pick the best policy and stop early")
    test: float = Field(0.1, gt=0, lt=1, description="share of rows seen only before and after training")

    @model_validator(mode="after")
    def _leaves_train(self) -> "SplitConfig":
        if self.tune + self.test >= 1:
            raise ValueError("tune + test leave no rows to train on; lower one of them")
        return self


class TaskConfig(Section):
    data: str = Field(
        "builtin:records",
        description="a JSONL, CSV or Parquet file (may be .gz), 'hub:owner/name' or 'builtin:records'",
    )
    hub_subset: str | None = Field(None, description="configuration name of a Hub data set")
    hub_split: str = Field("train", description="split of a Hub data set to read; sides are made by `split`")
    rows: int | None = Field(None, ge=10, description="read (or generate) at most this many rows")
    prompt: str = Field("{prompt}", description="template over the columns; a column of messages is used as it is")
    columns: dict[str, str] = Field({}, description="name seen by rewards: column in the data, e.g. reference: summary")
    chat: bool = Field(False, description="send a plain prompt as a user message through the chat template")
    system: str | None = Field(None, description="system message put before a chat prompt")
    chat_args: dict[str, Any] = Field({}, description="arguments of the chat template, e.g. enable_thinking: false")
    max_prompt_tokens: int = Field(512, ge=1)
    on_bad_row: Literal["skip", "fail"] = Field(
        "skip", description="bad rows are always reported, then skipped or fatal"
    )
    split: SplitConfig = SplitConfig()
