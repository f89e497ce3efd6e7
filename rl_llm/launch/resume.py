"""Whether and where a run goes on: its directory, its checkpoints, and what may have changed since."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rl_llm.config import MAY_CHANGE, MUST_STAY, RunConfig, build_config
from rl_llm.errors import UserError, option
from rl_llm.files import free_name
from rl_llm.launch.preflight import Plan, refuse_unwritable
from rl_llm.runs import checkpoint
from rl_llm.runs.directory import CLEARING, LOCK
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.reader import RunFiles
from rl_llm.runs.writer import LINES
from rl_llm.runtime.shared import MARK
from rl_llm.trainer.state import Origin, TrainerState

# A run killed while it made its directory has left nothing worth keeping.
UNBORN = {"rollouts", *(f"{name}.jsonl" for name in LINES), ".config.yaml.partial", LOCK, CLEARING}


def refuse_foreign(path: Path) -> None:
    """Raise `UserError` where the run directory would be something else's."""
    if (path / "config.yaml").is_file() or not path.exists():
        return
    left = {entry.name for entry in path.iterdir() if not entry.name.startswith(MARK)} if path.is_dir() else {""}
    if not left <= UNBORN:
        raise UserError(f"{option('output')} {path} exists and is no run directory; name another one")


def find_checkpoint(plan: Plan, path: Path, resume: bool) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint to go on from, None to begin; and newer ones that cannot be used, with the reason.

    Raises:
        UserError: the directory holds another run, or what it was made from has changed.
    """
    refuse_foreign(path)
    if not (path / "config.yaml").is_file():
        refuse_unwritable(path, f"name another {option('output')}")
        return None, []
    if not resume:
        resumed, another = option("resume", "True"), option("output")
        raise UserError(f"{path} holds a run already; add {resumed} to go on with it, or name another {another}")
    refuse_unwritable(path, "a resumed run goes on in it")
    for name in LINES:
        read_jsonl(path / f"{name}.jsonl")  # a broken one is refused before anything starts
    found, refused = checkpoint.find(path / "checkpoints")
    if found is None:
        refuse_changes(path, changed_settings(RunFiles(path).config, plan.config))
    else:
        then = TrainerState.load(found)
        refuse_changes(path, [*changed_settings(then.run_config(), plan.config), *_changed_origin(then.origin, plan)])
    return found, refused


def open_directory(plan: Plan, path: Path, resume: bool, note: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, None to begin; those that cannot be used are put aside. Raises as the above."""
    found, refused = find_checkpoint(plan, path, resume)
    for folder, problem in refused:
        note(f"checkpoint {folder.name} is refused: {problem}")
        folder.rename(free_name(folder.with_name(f"refused-{folder.name}")))
    if found is not None:
        for name in plan.origin.other_code(TrainerState.load(found).origin):
            note(f"warning: the code of the reward {name} has changed since {found.name}, and the run goes on with it")
    elif (path / "config.yaml").is_file():
        note(f"{path} has no whole checkpoint; beginning anew")
    return found


def refuse_changes(path: Path, changed: list[str]) -> None:
    """Raise `UserError` where a run would go on with something else than it was made from."""
    if changed:
        raise UserError(
            f"{path} was made with something else, so it cannot be resumed with this: {'; '.join(changed)}. "
            f"Take the change back or name another {option('output')}"
        )


def refuse_other_base(path: Path, base: str, found: Path, origin: Origin) -> None:
    """Raise `UserError` where the warm start has given another policy than the run began with, and it would matter."""
    other = _other_files(TrainerState.load(found).origin.base, origin.base, base)
    refuse_changes(path, [f"{', '.join(other)} of the warm-started model {base}"] if other else [])


def _changed_origin(then: Origin, plan: Plan) -> Iterator[str]:
    """What of the data and the model is not what it was. Where nobody has taken a digest, nobody can tell."""
    if then.rows and then.rows != plan.origin.rows:
        yield f"the rows of {plan.task.name} are others"
    model = plan.config.policy.model or ""
    other = _other_files(then.model, plan.origin.model, model)
    if other:
        yield f"the model {model} has another {', '.join(other)}"


def _other_files(then: dict[str, str], now: dict[str, str], model: str) -> list[str]:
    # What is cached of a model of the Hub may be less now, or have been less then.
    names = then.keys() | now.keys() if then and Path(model).is_dir() else then.keys() & now.keys()
    return sorted(name for name in names if then.get(name) != now.get(name))


def changed_settings(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs and would make steps of another kind, as "key: before -> after"; each field says what may."""
    new = build_config(new.to_dict())  # as the old one has come out of its file
    return sorted(f"{key}: {before} -> {after}" for key, before, after in _differences(old, new, may_change=False))


def _differences(old: Any, new: Any, may_change: bool, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ and must not, as (dotted key, before, after); a section's mark holds for all in it."""
    for name, field in type(old).model_fields.items():
        key = f"{prefix}{field.alias or name}"
        before: Any = getattr(old, name)
        after: Any = getattr(new, name)
        free = MAY_CHANGE in field.metadata or (may_change and MUST_STAY not in field.metadata)
        if isinstance(before, BaseModel) and type(before) is type(after):
            yield from _differences(before, after, free, f"{key}.")
        elif isinstance(before, dict) and isinstance(after, dict):
            for item in {**before, **after}:
                one, other = before.get(item), after.get(item)
                if isinstance(one, BaseModel) and type(one) is type(other):
                    yield from _differences(one, other, free, f"{key}.{item}.")
                elif one != other and not free:
                    yield f"{key}.{item}", _plain(one), _plain(other)
        elif before != after and not free:
            yield key, _plain(before), _plain(after)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value


def complete(path: Path, config: RunConfig, found: Path | None) -> bool:
    """Whether nothing is left to do: the run ended by itself, at these steps, with every control made."""
    if found is None:
        return False
    summary, progress = RunFiles(path).summary, TrainerState.load(found).progress
    ended = (summary.get("status") == "stopped_early" and progress.exhausted(config.evaluation.patience)) or (
        summary.get("status") == "finished" and summary["steps"] >= config.trainer.steps
    )
    return ended and set(config.evaluation.controls) <= set(summary["controls"])
