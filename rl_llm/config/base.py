"""What the sections of a config are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator

from rl_llm.config.overrides import NUMBER, RAMP

# Marks of fields, as `Annotated[int, MAY_CHANGE]`: whether a resumed run may have another. By default none may, and
# the mark of a section holds for all in it that is not marked itself.
MAY_CHANGE, MUST_STAY = "may change on resuming", "must stay on resuming"


_NUMBERS: tuple[Any, ...] = (int, float, int | None, float | None)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in _NUMBERS:
            raise ValueError("a number is needed, not true or false")
        return value


class Ramp(Section):
    """A value that moves in a straight line from `start` to `end` over the first `steps` steps and then stays."""

    start: float
    end: float
    steps: int = Field(ge=1)

    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


def _kind(value: Any) -> str:
    return RAMP if isinstance(value, dict | Ramp) else NUMBER


# Told apart by their shape, so that a wrong one is explained as what it was meant to be.
Scheduled = Annotated[Annotated[float, Tag(NUMBER)] | Annotated[Ramp, Tag(RAMP)], Discriminator(_kind)]


def value_at(value: Scheduled, step: int) -> float:
    """The number a plain or scheduled setting stands for at `step` (counted from 0)."""
    return value.at(step) if isinstance(value, Ramp) else value
