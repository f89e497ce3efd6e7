"""Which reward components there are, and what each of them takes.

A component is a function in batch form with TRL's signature, or a class whose instances are called that way:

    @reward("chrf", range=(0, 1))
    def chrf(completions, reference, *, word_order=0, **columns) -> list[float | None]: ...

It is called with keywords: `prompts`, `completions`, `completion_ids`, the task's columns, and TRL's `trainer_state`,
`log_extra` and `log_metric`. Parameters before the `*` are filled from those; keyword-only ones (for a class: those of
`__init__`) are arguments, filled from the config alone.
"""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from rl_llm.errors import UserError, did_you_mean
from rl_llm.imports import import_function

HOOKS = ("trainer_state", "log_extra", "log_metric")
RESERVED = ("prompts", "completions", "completion_ids", *HOOKS)

Target = TypeVar("Target", bound=Callable[..., Any])


@dataclass(frozen=True)
class Takes:
    """What a component reads in a column, in the annotation of its parameter: `target: Annotated[list, Takes(float)]`.

    Attributes:
        read: called before a run starts on each value of the column that is not missing. Data with a value for which it
            raises `ValueError` or `TypeError` are refused with that message.
    """

    read: Callable[[Any], Any]


@dataclass(frozen=True)
class Parameters:
    """What a component takes, by where it comes from.

    Attributes:
        arguments: filled from the config's `args` only.
        columns: filled from the task's columns, or from `args` where those name them.
        inputs: which of `RESERVED` it names.
        any_column: whether all else is passed too (`**columns`).
        own: the parameter that is the component itself, such as `self`; empty for a function.
        takes: by column what is read in it, where the parameter says so.
    """

    arguments: dict[str, inspect.Parameter]
    columns: dict[str, inspect.Parameter]
    inputs: set[str]
    any_column: bool
    own: str
    takes: dict[str, Takes]


@dataclass(frozen=True)
class Registered:
    """A component that configs can name.

    Attributes:
        target: the function or class.
        range: least and greatest value, higher is better.
        summary: first line of its documentation.
        arguments: each argument and its default as written in Python, "required" where it has none.
        columns: columns of the task it cannot do without.
    """

    name: str
    target: Callable[..., Any]
    range: tuple[float, float]
    summary: str
    arguments: dict[str, str]
    columns: list[str]


_registered: dict[str, Registered] = {}


def reward(name: str, *, range: tuple[float, float]) -> Callable[[Target], Target]:
    """Register a function or class as component `name` with values in `range`; the target itself is left as it is.

    Raises:
        UserError: another component has that name.
    """

    def register(target: Target) -> Target:
        other = _registered.get(name)
        # The same definition run again, as notebooks and reloads do, replaces itself.
        if other and _origin(other.target) != _origin(target):
            raise UserError(f"a component {name!r} exists already ({_origin(other.target)}); choose another name")
        parameters = parameters_of(target)
        _registered[name] = Registered(
            name,
            target,
            range,
            summary=(inspect.getdoc(target) or "").partition("\n")[0],
            arguments={k: "required" if _required(p) else repr(p.default) for k, p in parameters.arguments.items()},
            columns=[k for k, p in parameters.columns.items() if _required(p)],
        )
        return target

    return register


def known() -> dict[str, Registered]:
    """Every registered component by name."""
    return dict(sorted(_registered.items()))


def resolve(use: str) -> Callable[..., Any]:
    """The function or class that `use` names: a registered component or `package.module:function`.

    Raises:
        UserError: no such component, module or function.
    """
    if ":" not in use:
        if use not in _registered:
            hint = did_you_mean(use, _registered)
            raise UserError(f"no reward component {use!r}; {hint} (a function of your own: package.module:function)")
        return _registered[use].target
    return import_function(use, "reward")


def parameters_of(target: Callable[..., Any]) -> Parameters:
    """The parameters of a component, sorted by where they are filled from."""
    if inspect.isclass(target):
        if not any("__call__" in vars(base) for base in target.__mro__):
            raise UserError(f"reward {_origin(target)} is a class without __call__(self, completions, ...)")
        arguments = _named(inspect.signature(target))
        called = list(inspect.signature(target.__call__).parameters.values())[1:]
        named = _named(inspect.Signature(called))
    else:
        called = list(inspect.signature(target).parameters.values())
        named = _named(inspect.Signature(called))
        arguments = {k: p for k, p in named.items() if p.kind is p.KEYWORD_ONLY and k not in RESERVED}
        named = {k: p for k, p in named.items() if k not in arguments}
    columns = {k: p for k, p in named.items() if k not in RESERVED}
    any_column = any(p.kind is p.VAR_KEYWORD for p in called)
    function = _function(target)
    takes = _takes(function, columns)
    return Parameters(arguments, columns, set(named) - set(columns), any_column, _own(target, function), takes)


def _function(target: Any) -> Any:
    """The function that a call of the component, or of an instance of it, ends in."""
    if inspect.isclass(target):
        return target.__call__
    called = target if inspect.isroutine(target) else type(target).__call__
    return getattr(called, "__func__", called)


def _own(target: Any, function: Any) -> str:
    return "" if function is target else next(iter(inspect.signature(function).parameters), "")


def _takes(function: Any, columns: dict[str, inspect.Parameter]) -> dict[str, Takes]:
    annotations = {k: p.annotation for k, p in columns.items()}
    with contextlib.suppress(Exception):  # annotations may name what is there for a type checker alone
        annotations |= get_type_hints(function, include_extras=True)
    marks = {k: getattr(annotations[k], "__metadata__", ()) for k in columns}
    return {k: mark for k, found in marks.items() for mark in found if isinstance(mark, Takes)}


def _named(signature: inspect.Signature) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def _origin(target: Callable[..., Any]) -> str:
    return f"{target.__module__}:{target.__qualname__}"
