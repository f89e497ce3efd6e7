"""The section `rewards`: components, and how they are mixed."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from rl_llm.config.base import MAY_CHANGE, Ramp, Scheduled, Section, value_at
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


OF_THE_MIXTURE = ("clip", "scale", "gate")
"""What of a component changes its advantage, and not what is measured."""


class ComponentConfig(Section):
    use: str = Field(description="a registered component or package.module:function")
    args: dict[str, Any] = {}
    timeout_s: float = Field(60.0, gt=0, description="deadline of a call; enforced by killing the reward worker")
    on_failure: Literal["raise", "mask", "impute"] = "mask"
    impute: float | None = Field(None, description="the value a failed row gets with on_failure=impute")
    max_failure_rate: float = Field(
        0.5, ge=0, le=1, description="a step with a larger share of failed rows ends the run"
    )
    cache: Annotated[bool, MAY_CHANGE] = Field(
        False, description="keep its values and use them again for the same prompt and completion"
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


class BoundConfig(Section):
    """Where the mean of a component's raw values is held."""

    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "BoundConfig":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a constraint is either 'at_least' or 'at_most'")
        return self


class ControllerConfig(Section):
    """A rule that moves the weights; what each does is in `controllers.py`."""

    kind: Literal["constraint", "variation", "variance", "hypervolume"]
    constraints: dict[str, BoundConfig] = Field({}, description="by component, with kind: constraint")
    lr: float = Field(1.0, gt=0, description="step size of the multipliers, with kind: constraint")

    @model_validator(mode="after")
    def _constraints_of_their_kind(self) -> "ControllerConfig":
        if (self.kind == "constraint") != bool(self.constraints):
            raise ValueError("kind: constraint and constraints, such as chrf: {at_least: 0.5}, go together")
        return self


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
    controller: Annotated[ControllerConfig | None, MAY_CHANGE] = Field(
        None, description="a rule that moves the weights; empty: they stay as they are given"
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

    @model_validator(mode="after")
    def _controlled(self) -> "RewardsConfig":
        if self.controller is None:
            return self
        for name, weight in self.weights.items():
            if isinstance(weight, Ramp):
                raise ValueError(f"weights.{name} is moved by a ramp already; leave out one of ramp and controller")
        if len(self.components) < 2:
            raise ValueError("controller moves weights against each other: it needs two components or more")
        if self.controller.kind == "variance" and self.combine != "normalize_then_sum":
            raise ValueError("controller.kind variance weighs normalised components: set combine: normalize_then_sum")
        for name, bound in self.controller.constraints.items():
            if name not in self.components:
                known = did_you_mean(name, self.components)
                raise ValueError(f"controller.constraints.{name}: no such component; {known}")
            side, sign = ("at_least", 1) if bound.at_most is None else ("at_most", -1)
            if value_at(self.weights[name], 0) * self.components[name].scale * sign <= 0:
                raise ValueError(
                    f"controller.constraints.{name}.{side}: its weight times its scale must be "
                    f"{'above' if sign > 0 else 'below'} 0, or more weight would push it the wrong way"
                )
        free = [name for name, weight in self.weights.items() if weight and name not in self.controller.constraints]
        if not free:
            raise ValueError("controller.constraints: leave one component unconstrained, to be maximised")
        return self

    def uncontrolled(self) -> "RewardsConfig":
        """The same without its controller, for weights that are given."""
        return self.model_copy(update={"controller": None})
