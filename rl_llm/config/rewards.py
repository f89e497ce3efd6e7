"""The section `rewards`: components, and how they are mixed."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from rl_llm.config.base import MAY_CHANGE, Scheduled, Section
from rl_llm.errors import did_you_mean


class GateConfig(Section):
    """Count a component only where another one is good enough; elsewhere it is `else`."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    component: str
    above: float | None = Field(None, description="open where the raw value is at least this")
    below: float | None = Field(None, description="open where the raw value is at most this")
    otherwise: float = Field(alias="else", description="the value where the gate is shut")

    @model_validator(mode="after")
    def _one_bound(self) -> "GateConfig":
        if self.above is None and self.below is None:
            raise ValueError("a gate needs 'above' or 'below'")
        return self


class ComponentConfig(Section):
    use: str = Field(description="a registered component or package.module:function")
    args: dict[str, Any] = {}
    timeout_s: float = Field(60.0, gt=0, description="deadline of a call; enforced by killing the reward worker")
    on_failure: Literal["raise", "mask", "impute"] = "mask"
    impute: float | None = Field(None, description="the value a failed row gets with on_failure=impute")
    max_failure_rate: float = Field(
        0.5, ge=0, le=1, description="a step with a larger share of failed rows ends the run"
    )
    clip: tuple[float, float] | None = None
    scale: float = 1.0
    gate: GateConfig | None = None

    @model_validator(mode="after")
    def _impute_value(self) -> "ComponentConfig":
        if (self.on_failure == "impute") != (self.impute is not None):
            raise ValueError("on_failure: impute and a value `impute: <number>` go together")
        if self.clip and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip must be [low, high] with low < high, not {list(self.clip)}")
        return self


def expand_components(value: Any) -> Any:
    """Accept `[chrf, pkg.mod:fn]`, `{name: id}`, `{name: {use: id, ...}}` and `{id: {args...}}`."""
    if isinstance(value, list):
        named: dict[str, Any] = {}
        for item in value:
            if not isinstance(item, str):
                raise ValueError(f"a list holds ids only, not {item!r}; with settings write name: {{use: id, ...}}")
            name = item.rsplit(":", 1)[-1]
            if name in named:
                raise ValueError(f"two components are called {name!r}; write them as name: id")
            named[name] = item
        value = named
    if not isinstance(value, dict):
        return value
    out: dict[str, Any] = {}
    for name, spec in value.items():
        if isinstance(spec, str):
            spec = {"use": spec}
        elif spec is None:
            spec = {"use": name}
        elif isinstance(spec, dict):
            spec = {"use": name, **spec}
        out[str(name)] = spec
    return out


Components = Annotated[dict[str, ComponentConfig], BeforeValidator(expand_components)]


class RewardsConfig(Section):
    components: Components = Field(description="name: id, or name: {use: id, args: {...}, ...}")
    weights: Annotated[dict[str, Scheduled], MAY_CHANGE] = Field(
        {}, description="lambda of each component; 1 where not given"
    )
    combine: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    std_floor: float = Field(
        0.1, ge=0, description="a group's std is never taken below this share of the first policy's std"
    )

    @model_validator(mode="after")
    def _names(self) -> "RewardsConfig":
        if not self.components:
            raise ValueError("at least one component is needed, e.g. rewards.components: [chrf]")
        for name in self.weights:
            if name not in self.components:
                raise ValueError(f"weights.{name}: no such component; {did_you_mean(name, self.components)}")
        for name, component in self.components.items():
            if component.gate and component.gate.component not in self.components:
                gate = component.gate.component
                raise ValueError(f"components.{name}.gate.component {gate!r}: {did_you_mean(gate, self.components)}")
        self.weights = {name: self.weights.get(name, 1.0) for name in self.components}
        return self
