"""Whether and where a run goes on: its directory, its checkpoints, and what may have changed since."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rl_llm.config import MAY_CHANGE, MUST_STAY, RunConfig
from rl_llm.errors import UserError
from rl_llm.runs import checkpoint
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.reader import RunFiles
from rl_llm.runs.writer import LINES
from rl_llm.runtime.shared import MARK
from rl_llm.trainer.state import TrainerState


def open_directory(config: RunConfig, path: Path, resume: bool, note: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, or None to begin. Raises `UserError` where the directory holds another run."""
    if not (path / "config.yaml").is_file():
        # A run killed while it made its directory has left nothing worth keeping.
        unborn = {"rollouts", "metrics.jsonl", "eval.jsonl", "failures.jsonl", ".config.yaml.partial"}
        left = {entry.name for entry in path.iterdir() if not entry.name.startswith(MARK)} if path.is_dir() else set()
        if path.exists() and not (path.is_dir() and left <= unborn):
            raise UserError(f"--output {path} exists and is no run directory; name another one")
        return None
    if not resume:
        raise UserError(f"{path} holds a run already; add --resume to go on with it, or name another --output")
    refuse_changes(RunFiles(path).config, config, path)
    for name in LINES:
        read_jsonl(path / f"{name}.jsonl")  # a broken one is refused before anything starts
    found, refused = checkpoint.find(path / "checkpoints")
    for folder, problem in refused:
        note(f"checkpoint {folder.name} is refused: {problem}")
        folder.rename(folder.with_name(f"refused-{folder.name}"))
    if found is None:
        note(f"{path} has no whole checkpoint; beginning anew")
        return None
    TrainerState.load(found)  # one of another version is refused before anything starts
    return found


def refuse_changes(old: RunConfig, new: RunConfig, path: Path) -> None:
    """Raise `UserError` for what differs and would make steps of another kind; each field says what may."""
    changed = [f"{key}: {before} -> {after}" for key, before, after in _differences(old, new, may_change=False)]
    if changed:
        raise UserError(
            f"{path} was made with another config, so it cannot be resumed with this one: {'; '.join(sorted(changed))}."
            " Take the change back or name another --output"
        )


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
