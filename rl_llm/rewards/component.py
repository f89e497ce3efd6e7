"""A reward component at work: bound to its arguments, called on the rollout table, its failures sorted out."""

import asyncio
import functools
import inspect
import math
import numbers
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from rl_llm.columns import values_of
from rl_llm.config import ComponentConfig
from rl_llm.errors import RunFailed, UserError, did_you_mean
from rl_llm.process import Apart
from rl_llm.rewards.hooks import Log, RunState, as_python
from rl_llm.rewards.registry import HOOKS, Takes, parameters_of, resolve
from rl_llm.table import ERROR, FIELD, NOT_APPLICABLE, OK, TIMEOUT, reward_inputs

FAILED = (ERROR, TIMEOUT)
GIVE_UP_AFTER = 8
"""Rows retried one by one that may all fail before the rest of a batch is given up unasked."""
CANCEL_GRACE_S = 5.0
"""What an async component has beyond its `timeout_s` before its worker is killed: to be cancelled, and to try rows."""

_MAX_MESSAGES = 5
_MAX_MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class Scores:
    """What a component returned for some rows.

    Attributes:
        values: a number a row, None where there is none.
        status: "ok", "not_applicable", "error" or "timeout", a row.
        seconds: time spent in the component.
        errors: the distinct failure messages, a few of them, the first one first; a batch that failed as a whole
            leaves its message here even where every row succeeded by itself.
        retried: rows of a call that failed, by the status they had, where all of them then succeeded by themselves.
        logged: sum and count of what the component logged, by name.
    """

    values: list[float | None]
    status: list[str]
    seconds: float
    errors: list[str]
    retried: dict[int, str] = field(default_factory=dict)
    logged: dict[str, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def failed(cls, rows: int, status: str, message: str, seconds: float = 0.0) -> "Scores":
        """Scores of rows that were lost as a whole, e.g. with a worker killed at its deadline."""
        return cls([None] * rows, [status] * rows, seconds, [message])

    @classmethod
    def merge(cls, parts: Sequence["Scores"]) -> "Scores":
        """The scores of consecutive shards as one."""
        retried: dict[int, str] = {}
        start, log = 0, Log()
        for part in parts:
            log.add(part.logged)
            retried |= {start + row: status for row, status in part.retried.items()}
            start += len(part.values)
        return cls(
            [value for part in parts for value in part.values],
            [status for part in parts for status in part.status],
            sum(part.seconds for part in parts),
            _distinct(message for part in parts for message in part.errors),
            retried,
            log.logged,
        )


def deadline_s(config: ComponentConfig, fn: Callable[..., Any] | None = None) -> float:
    """Seconds after which a reward worker on a request of a component is killed; `fn` as for `Component`.

    An async function is cancelled in its worker after `timeout_s`, which costs less than a worker.
    """
    target: Any = fn if fn is not None else resolve(config.use)
    is_async = inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(target.__call__)
    return config.timeout_s + CANCEL_GRACE_S if is_async else config.timeout_s


@dataclass(frozen=True)
class _Score:
    value: float | None
    status: str
    message: str = ""


class Component:
    """A component of the mixture, ready to be called.

    An async function that misses the deadline is cancelled. A plain one cannot be stopped from inside its own process:
    there a hanging reward hangs the run, while a reward worker is killed.

    Args:
        name: its name in the mixture.
        config: where it is found, its arguments and deadline.
        fn: the function, class or callable object itself, in place of what `config.use` names.

    Raises:
        UserError: it is not found, does not take these arguments, or cannot have a cache.
    """

    def __init__(self, name: str, config: ComponentConfig, fn: Callable[..., Any] | None = None) -> None:
        self.name = name
        self.config = config
        self._apart = Apart(f"component {name!r}")
        target = fn if fn is not None else resolve(config.use)
        is_class = inspect.isclass(target)
        self._parameters = parameters_of(target)
        if config.cache and (hooks := sorted(self._parameters.inputs.intersection(HOOKS))):
            raise UserError(
                f"component {name!r} takes {', '.join(hooks)}, and what is cached neither logs nor knows the step; "
                "leave out its `cache`"
            )
        args = self._checked_arguments(is_class)
        try:
            with self._apart.entered():
                self._function: Callable[..., Any] = target(**args) if is_class else target
        except (TypeError, ValueError) as error:
            raise UserError(f"component {name!r}: {error}") from error
        self._args = {} if is_class else args
        self._ready = False

    def _checked_arguments(self, is_class: bool) -> dict[str, Any]:
        arguments = self._parameters.arguments
        settable = arguments if is_class else {**self._parameters.columns, **arguments}
        for key in self.config.args:
            if key not in settable:
                hint = did_you_mean(key, settable) if settable else "it takes none"
                raise UserError(f"component {self.name!r} has no argument {key!r}; {hint}")
        for key, parameter in arguments.items():
            if key not in self.config.args and parameter.default is parameter.empty:
                raise UserError(f"component {self.name!r} needs args.{key}")
        return {key: self._checked(settable[key], value) for key, value in self.config.args.items()}

    def _checked(self, parameter: inspect.Parameter, value: Any) -> Any:
        if parameter.annotation is parameter.empty or isinstance(parameter.annotation, str):
            if isinstance(parameter.default, bool) and str(value).lower() in ("yes", "no", "on", "off"):
                raise UserError(
                    f"component {self.name!r}, args.{parameter.name}: {value!r} is a text; write true or false"
                )
            return value
        try:
            return TypeAdapter(parameter.annotation).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"component {self.name!r}, args.{parameter.name}: {reason} (given: {value!r})") from None
        except PydanticUserError:  # an annotation of the user's that says nothing about plain values
            return value

    @property
    def reads_tokens(self) -> bool:
        """Whether it needs `completion_ids`: it names them, or a class has an attribute of this name that says so."""
        return bool(getattr(self._function, "reads_tokens", "completion_ids" in self._parameters.inputs))

    @property
    def _reads_columns(self) -> Mapping[str, Takes]:
        """Columns that a class needs because of its arguments: an attribute `reads_columns` says so."""
        return getattr(self._function, "reads_columns", {})

    def check_columns(self, fields: Iterable[str]) -> None:
        """Raises `UserError` where the component needs a column that is not among the task's `fields`."""
        fields = sorted(fields)
        columns = self._parameters.columns.items()
        needed = [k for k, p in columns if p.default is p.empty and k not in self.config.args]
        for key in (*needed, *self._reads_columns):
            if key not in fields:
                known = ", ".join(fields) or "the data has no other columns"
                raise UserError(
                    f"component {self.name!r} needs a column {key!r}; map it with task.columns.{key}: <one of {known}>"
                )

    def misread(self, table: pa.Table) -> tuple[int, str] | None:
        """The first row of prompts with a value that the component does not take, and what to say of it."""
        takes_of = {key: takes for key, takes in self._parameters.takes.items() if key not in self.config.args}
        for key, takes in {**takes_of, **self._reads_columns}.items():
            if FIELD + key not in table.column_names:
                continue
            for row, value in enumerate(values_of(table[FIELD + key])):
                if value is None:
                    continue
                try:
                    takes.read(value)
                except (TypeError, ValueError) as error:
                    return row, f"component {self.name!r} cannot read the column {key!r}: {error}"
        return None

    def setup(self) -> None:
        """Call the component's own `setup()`, once, where it has one. Raises `RunFailed` where that fails."""
        if self._ready:
            return
        setup = getattr(self._function, "setup", None)
        if setup is not None:
            try:
                with self._apart.entered():
                    setup()
            except Exception as error:
                raise RunFailed(f"component {self.name!r}: setup() failed with {_describe(error)}") from error
        self._ready = True

    def score(self, table: pa.Table, max_steps: int = 0) -> Scores:
        """Score the rows of a rollout table, of a run of `max_steps`.

        Rows whose call raised, returned the wrong count or no finite number are tried again one by one, unless the
        first `GIVE_UP_AFTER` of them all fail again. None is "not applicable" and no failure.
        """
        self.setup()
        start = time.perf_counter()
        inputs, log = reward_inputs(table), Log()
        versions = table["policy_version"].to_pylist() if "policy_version" in table.column_names else []
        state = RunState(max([0, *versions]), max_steps)
        scores = self._attempt(inputs, table.num_rows, state, log)
        messages = [score.message for score in scores]
        failed = {row: score.status for row, score in enumerate(scores) if score.status in FAILED}
        still_failing = 0
        for tried, row in enumerate(failed if table.num_rows > 1 else []):
            if tried == still_failing == GIVE_UP_AFTER:
                break
            alone = {key: column[row : row + 1] for key, column in inputs.items()}
            (scores[row],) = self._attempt(alone, 1, state, log)
            messages.append(scores[row].message)
            still_failing += scores[row].status in FAILED
        return Scores(
            [score.value for score in scores],
            [score.status for score in scores],
            time.perf_counter() - start,
            _distinct(messages),
            {} if any(scores[row].status in FAILED for row in failed) else failed,
            log.logged,
        )

    def _attempt(self, inputs: dict[str, list[Any]], rows: int, state: RunState, log: Log) -> list[_Score]:
        if rows == 0:
            return []
        own = Log()  # what a failed call logs is not kept: its rows are asked again
        hooks = {"trainer_state": state, "log_extra": own.log_extra, "log_metric": own.log_metric}
        try:
            with self._apart.entered():
                # What has a cache must not use them, and in `**columns` nobody could see that it does.
                returned = list(self._call(inputs if self.config.cache else {**inputs, **hooks}))
            if len(returned) != rows:
                return [_Score(None, ERROR, f"returned {len(returned)} values for {rows} completions")] * rows
            log.add(own.logged)
            return [_score_of(value) for value in returned]
        except TimeoutError as error:
            message = _describe(error) if str(error) else f"TimeoutError: no values within {self.config.timeout_s:g} s"
            return [_Score(None, TIMEOUT, message)] * rows
        except Exception as error:
            return [_Score(None, ERROR, _describe(error))] * rows

    def inputs_of(self, table: pa.Table) -> dict[str, list[Any]]:
        """What it is called with for the rows of a rollout table, by name, beside its arguments."""
        return self._passed(reward_inputs(table))

    def _call(self, inputs: dict[str, Any]) -> Any:
        result = self._function(**{**self._passed(inputs), **self._args})
        return _run(result, self.config.timeout_s) if inspect.isawaitable(result) else result

    def _passed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        takes = self._parameters
        named = {*takes.inputs, *takes.columns, *self._reads_columns}
        # A column that happens to share its name with an argument, or with `self`, is not that.
        hidden = {*takes.arguments, takes.own}
        passed = {k: v for k, v in inputs.items() if k in named or (takes.any_column and k not in hidden)}
        return {k: v for k, v in passed.items() if k not in self._args}


def _score_of(value: Any) -> _Score:
    value = as_python(value)
    if value is None:
        return _Score(None, NOT_APPLICABLE)
    if not isinstance(value, numbers.Real):
        return _Score(None, ERROR, f"returned a value of type {type(value).__name__}, not a number")
    number = float(value)
    return _Score(number, OK) if math.isfinite(number) else _Score(None, ERROR, f"returned the value {number}")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _distinct(messages: Iterable[str]) -> list[str]:
    found = dict.fromkeys(message[:_MAX_MESSAGE_LENGTH] for message in messages if message)
    return list(found)[:_MAX_MESSAGES]


# One loop for all components and calls: clients that a component opened in its first call keep working in the next,
# and a loop that already runs in the caller's thread, as in a notebook, is not in the way.
@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def _run(result: Awaitable[Any], timeout_s: float) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(result, timeout_s)

    future = asyncio.run_coroutine_threadsafe(limited(), _event_loop())
    try:
        return future.result()
    finally:
        future.cancel()  # only an interrupted call is still under way here
