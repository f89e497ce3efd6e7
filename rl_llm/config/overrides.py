"""Plain settings under a pydantic model: dotted overrides, and what is wrong in a user's words."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from rl_llm.config.yaml12 import read_yaml
from rl_llm.errors import UserError, did_you_mean

# Tags of a union's branches. Problems name them in their path, but they are no keys of the user's.
NUMBER, RAMP = "<number>", "<ramp>"
_BRANCHES = (NUMBER, RAMP, "str", "list[str]")


def apply_override(raw: dict[str, Any], override: str, root: type[BaseModel]) -> None:
    """Put `section.key=value` into `raw`, in place. Raises `UserError` where it cannot be read or leads nowhere."""
    path, sep, text = override.partition("=")
    keys = path.split(".")
    if not sep or not all(keys):
        raise UserError(f"override {override!r}: write it as section.key=value")
    put(raw, path, _value(keys, text, override, root), f"override {override!r}")


def put(raw: dict[str, Any], path: str, value: Any, origin: str) -> None:
    """Put a value at a dotted path of `raw`, in place. Raises `UserError` where the path leads through a value."""
    *sections, last = path.split(".")
    node = raw
    for depth, key in enumerate(sections, start=1):
        child = node.get(key)
        if child is not None and not isinstance(child, dict):
            raise UserError(f"{origin}: {'.'.join(sections[:depth])} is {child!r}, not a section")
        node[key] = child = child or {}
        node = child
    node[last] = value


def _value(keys: list[str], text: str, override: str, root: type[BaseModel]) -> Any:
    """The YAML value of an override; where a text is wanted, `Summarise: {article}` is that and no mapping."""
    field = _section_at(keys[:-1], root).model_fields.get(keys[-1])
    wants_text = field is not None and field.annotation in (str, str | None)
    try:
        value = read_yaml(text)
    except ValueError as error:
        if wants_text:
            return text
        raise UserError(f"override {override!r}: {text!r} is not valid YAML: {error}") from None
    return text if wants_text and not isinstance(value, str | None) else value


def explain(problem: dict[str, Any], overrides: Sequence[str], where: str, root: type[BaseModel]) -> str:
    """A line for one of pydantic's problems: its origin (an override, else `where`), the key, what is wrong."""
    loc = [str(part) for part in problem["loc"] if part not in _BRANCHES]
    key = ".".join(loc)
    origin = next((f"override {text!r}" for text in overrides if _meet(text.partition("=")[0], key)), where)
    if problem["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key!r}; {did_you_mean(loc[-1], _keys(_section_at(loc[:-1], root)))}"
    if problem["type"] == "missing":
        return f"{origin}: {key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "model_type":
        message = f"a section is needed here, with keys such as {', '.join(_keys(_section_at(loc, root))[:3])}"
    if problem["type"] in ("dict_type", "list_type"):
        field = root.model_fields.get(loc[0])
        for example in field.examples or [] if field else []:
            message = f"this is written as {loc[0]}: {example}"
    if loc and loc[-1] == "[key]":
        key, message = ".".join(loc[:-2]), "its keys are names"
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{origin}: {key}: {message}{shown}" if key else f"{origin}: {message}"


def _meet(path: str, key: str) -> bool:
    """Whether one of two dotted paths leads through the other."""
    return bool(key) and (f"{key}.".startswith(f"{path}.") or f"{path}.".startswith(f"{key}."))


def _section_at(loc: Sequence[str], root: type[BaseModel]) -> type[BaseModel]:
    """The section that a path leads to, found by walking the models along it."""
    model = root
    for key in loc:
        annotation: Any = model.model_fields[key].annotation if key in model.model_fields else model
        model = next(_models_in(annotation), model)
    return model


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for arg in get_args(annotation):
        yield from _models_in(arg)
