"""What other weights would have preferred: stored rollouts, re-weighed by the run's own mixture and advantage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rl_llm.algorithms import build_algorithm
from rl_llm.errors import UserError
from rl_llm.mixture import Mixed, Mixture
from rl_llm.runs.reader import RunFiles
from rl_llm.runs.text import one_line, printable, prompt_text, short, sparkline
from rl_llm.table import component_columns

EXAMPLES = 3
SAME = 1e-6  # advantages nearer than this are equal: tables hold them as float32


@dataclass(frozen=True)
class Answer:
    """A completion with its raw component values, None where a component had no value."""

    completion: str
    values: dict[str, float | None]


@dataclass(frozen=True)
class Example:
    """A group whose best completion is another one under the other weights.

    Attributes:
        gap: how much better, in the other weights' advantage, their best is than the run's.
    """

    step: int
    prompt: str
    run_best: Answer
    other_best: Answer
    gap: float


@dataclass(frozen=True)
class Side:
    """One way of weighing the same rollouts.

    Attributes:
        weights: of the last replayed step.
        reward: mean weighted reward over rows with a value; NaN where no row has one.
        shares: by component its covariance share of the advantage over all rows; they add up to 1, or are all 0.
        best: by component its mean over the best completion of each group (ties count in equal parts), NaN for none.
    """

    weights: dict[str, float]
    reward: float
    shares: dict[str, float]
    best: dict[str, float]


@dataclass(frozen=True)
class Replay:
    """Stored rollouts under the run's own weights and under others.

    Attributes:
        flipped: share of rows with a value whose advantage would have had the opposite sign.
        flipped_by_step: the same for each replayed step.
        other_best: share of groups whose best completion would have been another.
        rows: rows with a value.
        examples: the groups that disagree most.
    """

    run: Side
    other: Side
    flipped: float
    flipped_by_step: dict[int, float]
    other_best: float
    rows: int
    examples: list[Example]

    def __rich__(self) -> RenderableType:
        return Group(*self._summary(), *(self._example(example) for example in self.examples))

    def _summary(self) -> list[RenderableType]:
        steps = list(self.flipped_by_step)
        head = Text(
            f"{self.rows} samples of steps {steps[0]} to {steps[-1]}, re-weighed\n"
            f"advantage of the opposite sign: {self.flipped:.1%} of samples, "
            f"by step {sparkline(list(self.flipped_by_step.values()))}\n"
            f"another best completion: {self.other_best:.1%} of groups"
        )
        table = Table()
        for title in ("component", "weight", "other", "share of advantage", "other", "best of group", "other"):
            table.add_column(title, justify="left" if title == "component" else "right")
        for name in self.run.weights:
            cells = [side[name] for kind in ("weights", "shares", "best") for side in self._sides(kind)]
            table.add_row(Text(name), *(short(cell) for cell in cells))
        table.add_row("weighted reward", "", "", "", "", short(self.run.reward), short(self.other.reward))
        table.caption = "share of advantage: adds up to 1; best of group: mean over the preferred completions"
        table.caption_justify = "left"
        return [head, table]

    def _sides(self, kind: str) -> tuple[dict[str, float], dict[str, float]]:
        return getattr(self.run, kind), getattr(self.other, kind)

    def _example(self, example: Example) -> RenderableType:
        table = Table(title=f"step {example.step}", title_justify="left", show_header=False, min_width=60)
        table.add_row("prompt", Text(printable(one_line(prompt_text(example.prompt)))))
        for label, answer in (("this run prefers", example.run_best), ("the others prefer", example.other_best)):
            values = "  ".join(f"{name} {short(value)}" for name, value in answer.values.items())
            table.add_row(label, Text(f"{printable(one_line(answer.completion))}\n{values}"))
        return table


@dataclass(frozen=True)
class _Step:
    """A step's rollouts under both weighings; `run_best` and `other_best` as `_best` gives them."""

    run: Mixed
    other: Mixed
    components: dict[str, np.ndarray]
    flips: np.ndarray
    run_best: np.ndarray
    other_best: np.ndarray
    groups: int
    examples: list[Example]


def replay(run_dir: str | Path, weights: Mapping[str, float]) -> Replay:
    """Re-weigh the rollout tables that a run kept.

    The advantages that the learner followed are compared with those it would have been given. Standard deviations have
    their floor from the earliest kept table, which is the first policy's, as in the run, where step 1 was kept.

    Args:
        run_dir: the run directory.
        weights: the other weights by component; one not named keeps the run's own, schedule included.

    Raises:
        UserError: no run, no rollout table in it, or weights that are no component's or not finite.
    """
    run = RunFiles(run_dir)
    rewards = run.config.rewards.uncontrolled()  # what a controller made of the weights is logged
    own, other = Mixture(rewards), Mixture(rewards)
    for name, weight in weights.items():
        other.set_weight(name, weight)
    # A table without its line in metrics.jsonl is of a step that a kill cut short and a resume does again.
    logged = run.metrics.set_index("step")
    steps = [step for step in run.rollout_steps if step in logged.index]
    if not steps:
        raise UserError(f"{run.path} has no rollout tables to replay; set logging.rollouts above 0 and run again")
    done: dict[int, _Step] = {}
    for step in steps:
        for name in own.weights:
            own.set_weight(name, float(logged.loc[step, f"weights/{name}"]))
            other.set_weight(name, weights.get(name, own.weights[name]))
        done[step] = _replay_step(run, step, own, other)
    return _collect(done, own.weights_at(0), other.weights_at(0))


def _replay_step(run: RunFiles, step: int, own: Mixture, other: Mixture) -> _Step:
    table = run.rollouts(step)
    algorithm = build_algorithm(run.config.algorithm)
    components = component_columns(table)
    groups = np.unique(table["group"].to_numpy(), return_inverse=True)[1]
    mixed_by = None if algorithm.per_token else groups
    mine, theirs = (mixture.mix(components, mixed_by, step, algorithm.scale) for mixture in (own, other))
    before = table["advantage"].to_numpy(zero_copy_only=False).astype(np.float64)
    after = theirs.advantages
    flips = (np.minimum(np.abs(before), np.abs(after)) > SAME) & (np.sign(before) != np.sign(after))
    run_best, other_best = (_best(advantages, groups, mine.valid) for advantages in (before, after))
    examples = []
    for group in range(groups.max() + 1):
        rows = np.flatnonzero((groups == group) & mine.valid)
        if len(rows) and not (run_best[rows] * other_best[rows]).any():
            old, new = int(rows[np.argmax(before[rows])]), int(rows[np.argmax(after[rows])])
            example = Example(
                step=step,
                prompt=table["prompt"][old].as_py(),
                run_best=_answer(table["completion"][old].as_py(), components, old),
                other_best=_answer(table["completion"][new].as_py(), components, new),
                gap=float(after[new] - after[old]),
            )
            examples.append(example)
    return _Step(mine, theirs, components, flips[mine.valid], run_best, other_best, groups.max() + 1, examples)


def _best(advantages: np.ndarray, groups: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Weights [N] that pick the best valid row of each group, shared equally by rows that tie, 0 elsewhere."""
    highest = np.full(groups.max() + 1, -np.inf)
    np.maximum.at(highest, groups[valid], advantages[valid])
    best = valid & (advantages > highest[groups] - SAME)
    return best / np.maximum(np.bincount(groups, best), 1)[groups]


def _answer(completion: str, components: dict[str, np.ndarray], row: int) -> Answer:
    values = {name: float(column[row]) for name, column in components.items()}
    return Answer(completion, {name: None if np.isnan(value) else value for name, value in values.items()})


def _collect(steps: dict[int, _Step], own: dict[str, float], other: dict[str, float]) -> Replay:
    every = list(steps.values())
    components = {name: np.concatenate([step.components[name] for step in every]) for name in own}
    flips = np.concatenate([step.flips for step in every])
    examples = sorted((example for step in every for example in step.examples), key=lambda example: -example.gap)
    return Replay(
        run=_side(own, [step.run for step in every], components, np.concatenate([step.run_best for step in every])),
        other=_side(other, [step.other for step in every], components, np.concatenate([s.other_best for s in every])),
        flipped=_mean(flips),
        flipped_by_step={number: _mean(step.flips) for number, step in steps.items()},
        other_best=len(examples) / sum(step.groups for step in every),
        rows=len(flips),
        examples=examples[:EXAMPLES],
    )


def _side(weights: dict[str, float], mixed: list[Mixed], components: dict[str, np.ndarray], best: np.ndarray) -> Side:
    advantages = np.concatenate([step.advantages for step in mixed])
    power = float(advantages @ advantages)
    shares = {}
    means = {}
    for name, values in components.items():
        part = np.concatenate([step.contributions[name] for step in mixed])
        shares[name] = float(part @ advantages) / power if power > 0 else 0.0
        there = best * ~np.isnan(values)
        means[name] = float(there @ np.nan_to_num(values) / there.sum()) if there.any() else float("nan")
    rewards = np.concatenate([step.reward[step.valid] for step in mixed])
    return Side(weights, float(rewards.mean()) if len(rewards) else float("nan"), shares, means)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
