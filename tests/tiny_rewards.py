"""Rewards of the tiny task, named in configs as "tiny_rewards:match". Worker processes import them without torch."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

from rl_llm.runs.jsonl import read_jsonl


def match(
    completions: list[str],
    colour: list[str],
    trainer_state: Any = None,
    log_extra: Any = None,
    log_metric: Any = None,
    **columns: Any,
) -> list[float]:
    """The share of words that are the colour asked for; logs how many there are, and the step."""
    found = [text.split() for text in completions]
    if trainer_state is not None:
        log_extra("words", [len(words) for words in found])
        log_metric("step", trainer_state.global_step)
    return [sum(w == c for w in words) / max(len(words), 1) for words, c in zip(found, colour, strict=True)]


def noted(completions: list[str], prompts: list[str], colour: list[str], *, notes: str) -> list[float]:
    """`match` that notes in a file what it is asked for."""
    with Path(notes).open("a") as file:
        file.writelines(f"{asked}\n" for asked in zip(prompts, completions, strict=True))
    return match(completions, colour)


def match_dying_once(completions: list[str], colour: list[str], *, mark: str, **columns: Any) -> list[float]:
    """`match` that brings its process down the first time it scores anything after `mark` has been made."""
    if Path(mark).exists():
        Path(mark).unlink()
        os._exit(1)
    return match(completions, colour, **columns)


def match_held(completions: list[str], colour: list[str], *, run: str, step: int, **columns: Any) -> list[float]:
    """`match` that stops within step `step` of the run directory `run`, says so by a file `held`, and goes on when
    something is written to the pipe `go` of the directory above it; only once."""
    folder = Path(run).parent
    held = folder / "held"
    if not held.exists() and len(read_jsonl(Path(run) / "metrics.jsonl")) == step - 1:
        held.touch()
        (folder / "go").read_bytes()
    return match(completions, colour, **columns)


def hanging(completions: list[str], prompts: list[str], *, on: str, **columns: Any) -> list[float]:
    """1 for everything; never returns where one of the prompts is `on`."""
    if on in prompts:
        threading.Event().wait()
    return [1.0] * len(completions)


async def hanging_async(completions: list[str], prompts: list[str], *, on: str, **columns: Any) -> list[float]:
    """`hanging` that can be cancelled."""
    if on in prompts:
        await asyncio.Event().wait()
    return [1.0] * len(completions)


def moody(completions: list[str], *, mode: str = "", folder: str = "", **columns: Any) -> list[float]:
    """0 for everything, by a process whose id is noted; by `mode` it may fail, once where that says so."""
    with (Path(folder) / "pids").open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    done, once = Path(folder) / mode, mode.endswith("once")
    if mode and not (once and done.exists()):
        done.touch()
        if mode.startswith("die"):
            os._exit(1)
        if mode.startswith("hang"):
            threading.Event().wait()
        if mode == "raise":
            raise ValueError("out of mood")
        return [float("nan")] * len(completions)
    return [0.0] * len(completions)
